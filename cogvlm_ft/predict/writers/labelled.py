"""Predictions as labelled boxes, and how doubtful those of each photo are."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from cogvlm_ft import plain_files
from cogvlm_ft.data.record import box_defect
from cogvlm_ft.errors import ConfigError
from cogvlm_ft.grounding.targets import Box

_NOT_IN_XML = re.compile("[\x00-\x1f\x7f\ufffe\uffff]")
_UNKNOWN_DOUBT = 0.5


@dataclass(frozen=True)
class LabelledBox:
    """xyxy: pixels of the photo, with an area. confidence: None if unknown."""

    label: str
    xyxy: Box
    confidence: float | None


@dataclass(frozen=True)
class LabelledPhoto:
    """name: as in predictions.jsonl, without parts that lead out of a folder. path: its file.

    doubt: 0 (certain) to 1, that of its most doubtful answer.
    """

    name: str
    path: Path
    size_px: tuple[int, int]
    boxes: tuple[LabelledBox, ...]
    doubt: float

    def file(self, ending: str) -> str:
        """Return the name of its annotation file."""
        return PurePosixPath(self.name).with_suffix(ending).as_posix()


@dataclass
class LeftOut:
    """Numbers of boxes that are not written: asked for in other words than the name of a target; without an area."""

    unnamed: int = 0
    without_area: int = 0

    def __str__(self) -> str:
        texts = []
        if self.unnamed:
            texts.append(f"{self.unnamed} boxes without a name (ask for them with --targets)")
        if self.without_area:
            texts.append(f"{self.without_area} boxes without an area")
        return f"; left out: {', '.join(texts)}" if texts else ""


@dataclass
class _Gathered:
    """The content of the lines about one photo."""

    name: str
    path: Path
    size_px: tuple[int, int]
    boxes: list[LabelledBox] = field(default_factory=list)
    doubt: float = 0.0


def read_labelled(lines: Iterable[Mapping[str, Any]], paths: Mapping[str, Path]) -> tuple[list[LabelledPhoto], LeftOut]:
    """Gather lines of predictions.jsonl by photo; photos that could not be answered about are not among them.

    paths: the file of each photo, by its name in the lines.
    """
    gathered: dict[str, _Gathered] = {}
    left_out = LeftOut()
    for line in lines:
        if "answers" in line:
            width, height = line["image_size_px"]
            name, path = line["image"], paths[line["image"]]
            photo = gathered.setdefault(file_of(path), _Gathered(inside(name), path, (width, height)))
            for answer in line["answers"]:
                photo.doubt = max(photo.doubt, doubt_of(answer))
                photo.boxes += _boxes(answer, photo.size_px, left_out)
    photos = [
        LabelledPhoto(each.name, each.path, each.size_px, tuple(each.boxes), each.doubt) for each in gathered.values()
    ]
    return photos, left_out


def file_of(path: Path) -> str:
    """Return what is equal for two ways to write the path of a file."""
    return os.path.normpath(path.absolute())


def inside(name: str) -> str:
    """Return the name of a photo as a path that cannot lead out of a folder."""
    return "/".join(part for part in PurePosixPath(name).parts if part != ".." and part.strip("/"))


def doubt_of(answer: Mapping[str, Any]) -> float:
    """Return the doubt of an answer: that of its least certain box, or of its decision that there is none.

    An unreadable answer has the highest doubt, 1.
    """
    boxes, not_found_prob = answer["boxes"], answer["not_found_prob"]
    if boxes is None:
        return 1.0
    if not boxes:
        return _UNKNOWN_DOUBT if not_found_prob is None else 1 - float(not_found_prob)
    known = [float(box["confidence"]) for box in boxes if box["confidence"] is not None]
    return max(1 - min(known) if known else _UNKNOWN_DOUBT, not_found_prob or 0.0)


def _boxes(answer: Mapping[str, Any], size_px: tuple[int, int], left_out: LeftOut) -> Iterable[LabelledBox]:
    for box in answer["boxes"] or ():
        label = " ".join(_NOT_IN_XML.sub(" ", box.get("phrase") or "").split())
        x0, y0, x1, y1 = box["xyxy"]
        if not label:
            left_out.unnamed += 1
        elif box_defect((x0, y0, x1, y1), size_px):
            left_out.without_area += 1
        else:
            yield LabelledBox(label, (x0, y0, x1, y1), box["confidence"])


def labels_of(photos: Iterable[LabelledPhoto], asked: Iterable[str]) -> list[str]:
    """Return all labels, those that were asked for first, also if nothing was found."""
    named = (" ".join(_NOT_IN_XML.sub(" ", label).split()) for label in asked)
    return list(dict.fromkeys([*named, *(box.label for photo in photos for box in photo.boxes)]))


def check_names(paths: Mapping[str, Path], *, file_each: bool) -> None:
    """Raise ConfigError if two photos would have one name in the written files. paths: as of `read_labelled`.

    file_each: each photo has an annotation file, which has its name without ending.
    """
    photo_of: dict[str, str] = {}
    for name, path in paths.items():
        written = inside(name)
        if file_each:
            written = PurePosixPath(written).with_suffix("").as_posix()
        other = photo_of.setdefault(written, name)
        if file_of(paths[other]) != file_of(path):
            raise ConfigError(f"{other} and {name} would both be called {written} in the output. Rename one of them.")


def write_text(path: Path, text: str) -> None:
    """Write a file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain_files.write_text(path, text)


def write_json(path: Path, content: Any) -> None:
    """Write JSON for people and tools."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=2) + "\n")


def relative_path(photo: Path, folder: Path) -> str:
    """Return the path from a folder to a photo, as tools write it."""
    return Path(os.path.relpath(photo.absolute(), folder.absolute())).as_posix()


def rounded(values: Sequence[float], digits: int = 2) -> list[float]:
    return [round(value, digits) for value in values]
