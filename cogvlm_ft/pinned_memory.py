"""How torch allocates pinned host memory, from which GPUs copy; to be settled before torch is imported.

torch rounds each allocation up to a power of two and keeps what is freed: for the 17B model that is 1.2 to 1.7 times
the memory asked for. Since version 2.13 two options of an environment variable limit both to small allocations. They
belong together: memory that is kept is handed out by the power of two above its size, so what is kept must be rounded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, MutableMapping
from importlib.metadata import PackageNotFoundError, version

VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # torch reads the first set
EXACT = "pinned_max_round_threshold_mb:1,pinned_max_cached_size_mb:1"
FIRST_VERSION = (2, 13)  # earlier ones end with an error at an option that they do not know
HOW_NOT_TO_ROUND = f"Use torch 2.13 or later; if PYTORCH_ALLOC_CONF is set, add {EXACT} to it"
_LIMIT = re.compile(r"(?:pinned_max_round_threshold_mb|pinned_max_cached_size_mb)\s*:\s*(\d+)")


def allocate_pinned_exactly(environment: MutableMapping[str, str]) -> None:
    """Forbid rounding above 1 MiB, unless the user has set torch's allocator, or torch is too old.

    Torch must not be imported yet.
    """
    if has_options() and not _chosen(environment):
        environment["PYTORCH_ALLOC_CONF"] = EXACT


def has_options() -> bool:
    """Return whether the installed torch has these options."""
    try:
        found = re.match(r"(\d+)\.(\d+)", version("torch"))
    except PackageNotFoundError:
        return False
    return found is not None and (int(found[1]), int(found[2])) >= FIRST_VERSION


def rounded_up_to(environment: Mapping[str, str]) -> float:
    """Return the bytes up to which torch rounds a pinned allocation under this environment; infinity: all of them."""
    limits = [int(number) * 2**20 for number in _LIMIT.findall(_chosen(environment))]
    return min(limits, default=math.inf)


def allocated_bytes(sizes: Iterable[int], rounded_up_to: float) -> int:
    """Return the bytes that torch allocates for pinned tensors of these bytes."""
    return sum(1 << (size - 1).bit_length() if 0 < size <= rounded_up_to else size for size in sizes)


def _chosen(environment: Mapping[str, str]) -> str:
    return next((environment[name] for name in VARIABLES if environment.get(name)), "")
