"""How a setting is declared: default, description, unit and bounds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Rules:
    """Description and allowed values of a setting; null is always allowed if the type is optional.

    least, most: allowed themselves; above, below: not; of every value in a list or mapping. length: of a list.
    choices: all there are; empty: any value of the type.
    """

    description: str
    unit: str = ""
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    length: int | None = None
    choices: tuple[str, ...] = ()
    is_path: bool = False


def setting(default: Any, description: str, **rules: Any) -> Any:
    """Declare a setting with its `Rules`."""
    metadata = {"rules": Rules(description, **rules)}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)
