"""How many of a test's many inputs are tried: a fraction by default, all of them in `make soak`."""

from __future__ import annotations

import math
import os

SCALE = float(os.environ.get("COGVLM_FUZZ_SCALE", "0.05"))


def scaled(full: int) -> int:
    """Return how many of `full` inputs to try, at least one."""
    return max(1, math.ceil(full * SCALE))
