"""A line of the acceptance run, and numbers that several parts need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gpu import Setup  # noqa: F401 (the type of what every part is given)


@dataclass(frozen=True)
class Line:
    """name: what is checked. found: the number, and what is expected of it."""

    name: str
    is_green: bool
    found: str


def at_most(name: str, value: float, limit: float, unit: str = "") -> Line:
    """Return a line that is green up to a limit; NaN is red."""
    return Line(name, value <= limit, f"{value:.3g}{unit}; expected at most {limit:.3g}{unit}")


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, divided by the norm of what is expected."""
    found, expected = (each.detach().to("cpu", torch.float64) for each in (found, expected))
    return float((found - expected).norm() / expected.norm())


def largest_difference(found: list[float], expected: list[float]) -> float:
    """Return the largest relative difference of two equally long series."""
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
