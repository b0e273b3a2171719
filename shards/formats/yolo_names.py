"""Read the settings of YOLO labels from their folder: class names and the shape of keypoints.

Training with Ultralytics uses the names of data.yaml. A classes.txt may be left from a labelling tool with other names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from cogvlm_ft.errors import DataError
from cogvlm_ft.shards.formats.encodings import Decoded, decode_text
from cogvlm_ft.shards.formats.yolo_lines import is_label_file
from cogvlm_ft.shards.packing.candidates import Problem, Rejected
from cogvlm_ft.shards.packing.files import read_inside
from cogvlm_ft.yaml_text import YamlError, compose_yaml

Names = dict[int, str]

LISTS = ("classes.txt", "*.names", "_darknet.labels")
YAMLS = ("*.yaml", "*.yml")
_YAML_ENDINGS = (".yaml", ".yml")
_FOLDERS_ABOVE = 2
_MAX_BYTES = 2**20
_NUMBER = re.compile("[0-9]{1,6}")
_NUMBERED = re.compile(r"([0-9]{1,6})(?:\s*[:=,;.)]\s*|\s+)(\S.*)")
_HAS_NAMES = re.compile(rb"""^[ \t]*["']?names["']?[ \t]*:""", re.M)
_MAX_SHOWN = 5
_SIMILAR = re.compile(
    r".*(?:class|label|name|notes|data).*\.(?:txt|json|yaml|yml|csv|labels|names|pbtxt)", re.IGNORECASE
)
_OUTLINE_TASKS = ("segment", "obb")


@dataclass(frozen=True)
class LabelSettings:
    """The content of a file of class names. num_keypoint_columns: of every line; outlines: all lines are some."""

    file: Path
    names: Names
    num_keypoint_columns: int | None = None
    outlines: bool = False
    notes: tuple[Problem, ...] = ()


def load_label_settings(root: Path, folder: str) -> LabelSettings:
    """Return what the nearest YAML file with names says, else the nearest list; with a note about the choice.

    Raises DataError if there is none, if two of a kind differ, or if a YAML file cannot be read.
    """
    below = Path(folder)
    inside = [root / place for place in (below, *below.parents)] if folder else [root]
    above = list(root.absolute().parents[:_FOLDERS_ABOVE])
    found = [*_with_names(inside, YAMLS, strict=True), *_with_names(inside, LISTS, strict=True)]
    num_inside = len(found)
    if not any(settings.file.suffix in _YAML_ENDINGS for settings in found):
        found += _with_names(above, YAMLS, strict=not found)[:1]
    if not num_inside:
        found += _with_names(above, LISTS, strict=False)[:1]
    if not found:
        raise _no_names([*inside, *above[:1]], root / folder)
    chosen = next((settings for settings in found if settings.file.suffix in _YAML_ENDINGS), found[0])
    difference = next((text for other in found if (text := _difference(chosen, other, root))), None)
    if difference and found.index(chosen) >= num_inside > 0:
        raise DataError(f"{difference}; expected the same names. Remove or correct the wrong file.")
    return _with_notes(chosen, difference, root, folder)


def _no_names(places: list[Path], folder: Path) -> DataError:
    similar: dict[str, None] = {}
    for place in places:
        with suppress(OSError):
            similar |= dict.fromkeys(sorted(entry.name for entry in place.iterdir() if _SIMILAR.fullmatch(entry.name)))
    found = f"found {', '.join(list(similar)[:_MAX_SHOWN])}; " if similar else ""
    expected = "names: [cat, dog] in data.yaml, or classes.txt with the name of class 0 in the first line, and so on"
    none = f"none of {', '.join((*YAMLS, *LISTS))} with names there or above"
    return DataError(
        f"no file of class names for the YOLO labels in {folder}: {none}; {found}expected {expected}. Write one."
    )


def _with_notes(chosen: LabelSettings, difference: str | None, root: Path, folder: str) -> LabelSettings:
    names = [f"{number} {name}" for number, name in list(chosen.names.items())[:_MAX_SHOWN]]
    more = ", ..." if len(chosen.names) > _MAX_SHOWN else ""
    detail = f"those of {_shown(chosen.file, root)}: {', '.join(names)}{more}"
    notes = [Problem("note", "class_names", detail, folder or ".")]
    if difference:
        detail = f"{difference}; used those of {_shown(chosen.file, root)}. Remove or correct the wrong file."
        notes.append(Problem("note", "class_names_differ", detail, folder or "."))
    return replace(chosen, notes=(*notes, *chosen.notes))


def _difference(chosen: LabelSettings, other: LabelSettings, root: Path) -> str | None:
    """Return the first class that has two names, for people; None if one file only has more names."""
    both = sorted(chosen.names.keys() & other.names.keys())
    number = next((number for number in both if chosen.names[number] != other.names[number]), None)
    if number is None:
        return None
    in_other = f"{other.names[number]!r:.80} in {_shown(other.file, root)}"
    return f"class {number} is {in_other} and {chosen.names[number]!r:.80} in {_shown(chosen.file, root)}"


def _shown(file: Path, root: Path) -> str:
    return str(file.relative_to(root)) if file.is_relative_to(root) else str(file)


def _with_names(places: list[Path], patterns: tuple[str, ...], *, strict: bool) -> list[LabelSettings]:
    """Return one file with names of each place that has any. Raises DataError if a place has two that differ.

    strict: a file that cannot be read is an error too.
    """
    chosen = []
    for place in places:
        found = [settings for settings in _all_in(place, patterns, strict=strict) if settings.names]
        if any(settings.names != found[0].names for settings in found):
            files = " and ".join(settings.file.name for settings in found)
            raise DataError(f"{place} has {files} with different class names. Keep only the correct one.")
        if found:
            chosen.append(next((settings for settings in found if settings.num_keypoint_columns), found[0]))
    return chosen


def _all_in(place: Path, patterns: tuple[str, ...], *, strict: bool) -> Iterator[LabelSettings]:
    for path in sorted(path for pattern in patterns for path in place.glob(pattern) if path.is_file()):
        try:
            data = read_inside(path.parent, path.name, "annotation", _MAX_BYTES)
        except Rejected:
            continue
        try:
            yield _of_list(path, data) if path.suffix not in _YAML_ENDINGS else _of_yaml(path, data)
        except DataError:
            if strict and (path.suffix not in _YAML_ENDINGS or _HAS_NAMES.search(data)):
                raise


def _of_list(path: Path, data: bytes) -> LabelSettings:
    if path.suffix == ".txt" and is_label_file(path):
        return LabelSettings(path, {})
    try:
        decoded = decode_text(data)
    except Rejected:  # the names that are not UTF-8 are reported with their targets
        decoded = Decoded(data.decode("utf-8", "surrogateescape"))
    lines = [line.strip() for line in decoded.text.rstrip().split("\n")]
    numbered = [_NUMBERED.fullmatch(line) for line in lines]
    if len(lines) > 1 and all(numbered):
        lines = _without_numbers(path, [(int(match[1]), match[2]) for match in numbered if match])
    if "" in lines and any(lines):
        raise DataError(
            f"{path}: line {lines.index('') + 1} is empty; expected a class name per line, as its number is that of "
            "its line. Remove the line, or write the name."
        )
    return LabelSettings(path, {i: line for i, line in enumerate(lines) if line}, notes=decoded.notes(path.name))


def _without_numbers(path: Path, lines: list[tuple[int, str]]) -> list[str]:
    """Return the names of lines like "0 cat"; other names may begin with a number too. Raises DataError."""
    numbers = [number for number, _ in lines]
    if numbers == list(range(len(lines))):
        return [name for _, name in lines]
    if numbers == list(range(1, len(lines) + 1)):
        raise DataError(
            f"{path}: its lines are numbered from 1, classes of YOLO from 0; expected a class name per line. "
            "Remove the numbers if the first line is class 0."
        )
    return [f"{number} {name}" for number, name in lines]


def _of_yaml(path: Path, data: bytes) -> LabelSettings:
    """Return `names:`, a list or a mapping of numbers, and `kpt_shape:`. Raises DataError.

    Only nodes are read, so that class "no" is not False, and a name given twice is seen.
    """
    try:
        decoded = decode_text(data)
        root = compose_yaml(decoded.text, yaml.BaseLoader)
    except Rejected as rejected:
        raise DataError(f"{path}: {rejected.detail}") from None
    except YamlError as error:
        raise DataError(f"{path}: {error}; expected YAML with class names. Correct the file.") from None
    fields: dict[str, yaml.Node] = {}
    for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
        if key.value == "names" and "names" in fields:
            raise DataError(f"{path}: names: is there twice; expected one list. Remove the wrong one.")
        fields[str(key.value)] = value
    names = _names_of(fields.get("names"), path)
    notes = decoded.notes(path.name) if names else ()
    outlines = _scalar(fields.get("task")) in _OUTLINE_TASKS
    return LabelSettings(path, names, _keypoint_columns(fields.get("kpt_shape"), path), outlines, notes)


def _names_of(node: yaml.Node | None, path: Path) -> Names:
    if isinstance(node, yaml.SequenceNode):
        return {i: value.value for i, value in enumerate(node.value) if isinstance(value, yaml.ScalarNode)}
    names: Names = {}
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        number = _scalar(key)
        if number is None or not _NUMBER.fullmatch(number) or not isinstance(value, yaml.ScalarNode):
            continue
        if names.setdefault(int(number), value.value) != value.value:
            detail = f"class {number} is {names[int(number)]!r:.80} and {value.value!r:.80}"
            raise DataError(f"{path}: names: {detail}; expected one name. Remove the wrong one.")
    return names


def _keypoint_columns(node: yaml.Node | None, path: Path) -> int | None:
    """Return how many columns of a line are keypoints. Raises DataError."""
    if node is None or _scalar(node) in ("", "null", "~"):
        return None
    values = [_scalar(value) or "" for value in node.value] if isinstance(node, yaml.SequenceNode) else []
    if len(values) != 2 or not all(map(_NUMBER.fullmatch, values)) or int(values[1]) not in (2, 3):
        found = values or _scalar(node)
        raise DataError(f"{path}: kpt_shape: {found}; expected [number of keypoints, 2 or 3]. Correct it.")
    return int(values[0]) * int(values[1])


def _scalar(node: yaml.Node | None) -> str | None:
    return str(node.value) if isinstance(node, yaml.ScalarNode) else None
