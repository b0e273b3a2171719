"""The type of the fixture `run_checks`."""

from __future__ import annotations

from collections.abc import Callable

Examine = Callable[..., tuple[int, str]]
"""checks, settings -> (number of red lines, what was printed)"""
