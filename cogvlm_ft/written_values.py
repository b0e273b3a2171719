"""Values of settings as they are written: text stays text, where YAML 1.1 would read a number, a time or a bool.

`output_dir=20241128_120000`, `0123`, `1e5`, `12:30:00`, `yes` and `runs/a #2` name folders. A number is read by the
type of its setting, never by its look.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from typing import Any

import yaml

from cogvlm_ft.errors import ConfigError
from cogvlm_ft.settings import Config
from cogvlm_ft.yaml_text import YamlError, compose_yaml

NULLS = ("", "~", "null", "Null", "NULL")
PYTHON_NULLS = ("None", "none")  # text, unless the setting takes null
_WHOLE, _DECIMAL, _BOOL = "a whole number, such as 1000", "a number, such as 1e-5", "true or false"
_EXPECTED = {"Integer": _WHOLE, "int": _WHOLE, "Float": _DECIMAL, "float": _DECIMAL, "bool": _BOOL, "str": "a text"}
_OF_OMEGACONF = (
    (r"Value ('.*') of type '\w+' could not be converted to (\w+)$", "found {0}; expected {expected}"),
    (r"Value ('.*') is not a valid (bool)", "found {0}; expected {expected}"),
    (r"Incompatible value 'None' for field of type '(\w+)'", "found null or nothing; expected {expected}"),
    (r"Invalid type assigned: NoneType is not a subclass of (\w+)\.", "found null or nothing; expected {expected}"),
    (r"field '.*' is not Optional", "found null or nothing; expected a value. Leave it out for the default"),
    (r"Merge error: .* is not a subclass of \w+\. value: (.*)", "found {0}; expected settings, such as train.lr=1e-5"),
    (r"Key '.*' not in '\w+'\.?(.*)", "found an unknown setting; expected one of docs/config.md.{0}"),
)
"""Patterns of OmegaConf's errors and the messages that replace them; the last group is the type."""
_LOCATION = "path"
"""Key in a list of shards whose value is always text."""
_INSIDE_ANY = object()  # the type of what is in a setting that takes several forms
_NUMBER = re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)([eE][-+]?\d+)?")
_QUOTED = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)


def values_of_yaml(text: str, kind: Any = Config) -> dict[str, Any]:
    """Return the settings in a YAML text, sections as dicts. Raises ConfigError or YamlError.

    kind: the dataclass whose fields they are.
    """
    root = compose_yaml(text)
    if root is None or _is_null(root):
        return {}
    value = _value(root, kind)
    if not isinstance(value, dict):
        raise ConfigError(f"found {str(value)[:80]!r}; expected settings, such as train: {{lr: 1e-5}}")
    return value


def value_of_argument(key: str, text: str) -> Any:
    """Return the value of `key=text` on the command line. Raises YamlError."""
    kind, text = _kind_of(key), text.strip()
    if kind is _INSIDE_ANY:
        return text if key.endswith(f".{_LOCATION}") else _number(text)
    is_container = dataclasses.is_dataclass(kind) or typing.get_origin(kind) in (list, dict)
    if _QUOTED.fullmatch(text) or is_container or (kind is Any and text.startswith(("[", "{"))):
        root = compose_yaml(text)
        if root is not None and not (is_container and isinstance(root, yaml.ScalarNode)):
            return _value(root, kind)
    return None if _means_null(text, kind) else text


def _kind_of(key: str) -> Any:
    """Return the type of a setting or section; None of an unknown key."""
    kind: Any = Config
    for name in key.split("."):
        if kind is Any or kind is _INSIDE_ANY:
            kind = _INSIDE_ANY
        else:
            kind = _fields(kind).get(name) if dataclasses.is_dataclass(kind) else None
    return kind


def _fields(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _means_null(text: str, kind: Any) -> bool:
    return text in NULLS or (text in PYTHON_NULLS and (kind is Any or type(None) in typing.get_args(kind)))


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.value in NULLS


def _value(node: yaml.Node, kind: Any) -> Any:
    """Return the value of a node for a setting of this type; in a mapping without known keys, numbers are numbers."""
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, kind)
    if isinstance(node, yaml.SequenceNode):
        return [_value(part, Any if kind is Any else str) for part in node.value]
    return None if node.style is None and _means_null(node.value, kind) else node.value


def _mapping(node: yaml.MappingNode, kind: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    known = _fields(kind) if dataclasses.is_dataclass(kind) else None
    for key_node, part in _pairs(node):
        key = key_node.value
        if not isinstance(key_node, yaml.ScalarNode):
            raise YamlError(f"found a key that is no text, line {key_node.start_mark.line + 1}; expected names")
        if key in found:
            raise YamlError(f"found the key {key} twice, line {key_node.start_mark.line + 1}; expected it once")
        if known is None and key != _LOCATION and isinstance(part, yaml.ScalarNode) and part.style is None:
            found[key] = None if _is_null(part) else _number(part.value)
        else:
            found[key] = _value(part, Any if known is None else known.get(key, Any))
    return found


def _pairs(node: yaml.MappingNode) -> list[tuple[yaml.Node, yaml.Node]]:
    """Return the keys and values, those of merge keys (`<<`) first where the mapping has no such key itself."""
    own = [pair for pair in node.value if pair[0].tag != "tag:yaml.org,2002:merge"]
    names = {pair[0].value for pair in own if isinstance(pair[0], yaml.ScalarNode)}
    merged: dict[str, tuple[yaml.Node, yaml.Node]] = {}
    for key, part in node.value:
        if key.tag == "tag:yaml.org,2002:merge":
            for source in part.value if isinstance(part, yaml.SequenceNode) else [part]:
                if not isinstance(source, yaml.MappingNode):
                    raise YamlError(f"found a merge key without settings, line {key.start_mark.line + 1}")
                for pair in _pairs(source):
                    merged.setdefault(str(pair[0].value), pair)
    return [*(pair for name, pair in merged.items() if name not in names), *own]


def _number(text: str) -> int | float | str | bool:
    if not _NUMBER.fullmatch(text):
        return {"true": True, "false": False}.get(text.lower(), text)
    plain = text.replace("_", "")
    return int(plain) if re.fullmatch(r"[-+]?\d+", plain) else float(plain)


def explained(problem: str) -> str:
    """Return what was found and expected, from a line of OmegaConf; other lines unchanged."""
    if "ListConfig" in problem:
        return "found one value; expected a list, such as [model.vision.*] or [4, 2, 1]"
    if "incompatible container types" in problem:
        return "found a part of a list or mapping; expected the whole, such as [model.vision.*]"
    if "Dict[str, float]" in problem:
        return "found one value; expected patterns with factors, such as {model.vision.*: 0.1}"
    for pattern, kind in _OF_OMEGACONF:
        found = re.match(pattern, problem, re.DOTALL)
        if found:
            return kind.format(*found.groups(), expected=_EXPECTED.get(found[found.lastindex or 0], "a value"))
    return problem
