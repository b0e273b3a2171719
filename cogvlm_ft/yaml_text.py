"""Read YAML with bounds: a short file can describe values without end, and a deep one exhausts the stack."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Any

import yaml

from cogvlm_ft.plain_files import read_bytes

MAX_BYTES = 2**21
MAX_VALUES, MAX_DEPTH = 100_000, 64
_BOM = "\ufeff"

Loader = type[yaml.BaseLoader] | type[yaml.SafeLoader]


class YamlError(ValueError):
    """The text is not YAML that can be used; the message is one line."""


def read_yaml(path: Path, loader: Loader = yaml.SafeLoader) -> Any:
    """Return the content of a file. Raises OSError, YamlError or UnicodeDecodeError, a ValueError too."""
    return parse_yaml(decode_yaml(read_bytes(path, MAX_BYTES)), loader)


def decode_yaml(data: bytes) -> str:
    """Decode UTF-8, or UTF-16 that begins with its mark. Raises UnicodeDecodeError."""
    return data.decode("utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8")


def parse_yaml(text: str, loader: Loader = yaml.SafeLoader) -> Any:
    """Return the value that a text describes; None for an empty one. Raises YamlError."""
    reader, root = _compose(text, loader)
    try:
        return None if root is None else reader.construct_document(root)
    except yaml.YAMLError as error:
        raise YamlError(explain(error)) from None
    except (ValueError, OverflowError) as error:  # of a value, such as a date with month 13
        raise YamlError(f"not valid YAML: {error}") from None
    except RecursionError:
        raise YamlError("not valid YAML: an alias refers to a value around it") from None


def compose_yaml(text: str, loader: Loader = yaml.SafeLoader) -> yaml.Node | None:
    """Return the nodes of a text, each as it is written; None for an empty text. Raises YamlError."""
    return _compose(text, loader)[1]


def _compose(text: str, loader: Loader) -> tuple[Any, yaml.Node | None]:
    try:
        if len(text) > MAX_BYTES:
            raise YamlError(f"found {len(text)} characters of YAML; expected at most {MAX_BYTES}")
        reader = _counting(loader)(text.removeprefix(_BOM))
        root = reader.get_single_node()
        if root is not None:
            _check_extent(root)
    except yaml.YAMLError as error:
        raise YamlError(explain(error)) from None
    except RecursionError:
        raise YamlError(f"found YAML that is nested more than {MAX_DEPTH} deep; expected a few levels") from None
    return reader, root


def explain(error: yaml.YAMLError) -> str:
    """Describe a mistake in YAML in one line, with its place."""
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    mark = getattr(error, "problem_mark", None)
    place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    hint = ""
    if "alias" in problem or "anchor" in problem:
        hint = ". Write a text that begins with * or & in quotes"
    elif "cannot start any token" in problem:
        hint = ". Indent with spaces, not tabs; write a text that begins with @, % or ` in quotes"
    return f"not valid YAML: {problem}{place}{hint}"


def _counting(loader: Loader) -> Any:
    """Return the loader with an end to its nodes: each takes a hundred times the bytes of its text."""

    class Counting(loader):  # type: ignore[misc,valid-type]
        num_nodes, depth = 0, 0

        def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
            self.num_nodes += 1
            self.depth += 1
            _check_count(self.num_nodes)
            if self.depth > MAX_DEPTH:
                raise RecursionError
            node: yaml.Node | None = super().compose_node(parent, index)
            self.depth -= 1
            return node

    return Counting


def _check_count(num_values: int) -> None:
    if num_values > MAX_VALUES:
        raise YamlError(f"found YAML of more than {MAX_VALUES} values, aliases written out; expected at most that many")


def _check_extent(root: yaml.Node) -> None:
    """Refuse nodes that with every alias and merge key written out are too many or too deep, or endless."""
    extents: dict[int, tuple[int, int]] = {}  # of a node: values in it, levels
    entered: set[int] = set()

    def extent(node: yaml.Node) -> tuple[int, int]:
        if id(node) in extents:
            return extents[id(node)]
        if id(node) in entered:
            raise YamlError("not valid YAML: an alias refers to a value around it")
        entered.add(id(node))
        parts = list(node.value) if isinstance(node, yaml.SequenceNode) else []
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        inner = [extent(part) for part in parts]
        found = 1 + sum(count for count, _ in inner), 1 + max((depth for _, depth in inner), default=0)
        _check_count(found[0])
        if found[1] > MAX_DEPTH:
            raise RecursionError
        entered.discard(id(node))
        extents[id(node)] = found
        return found

    extent(root)
