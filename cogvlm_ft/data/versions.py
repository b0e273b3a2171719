"""Notice files on a server that are replaced while a run reads them: their offsets are those of the first content."""

from __future__ import annotations

from cogvlm_ft.data.addresses import shown
from cogvlm_ft.errors import DataError

_first: dict[str, tuple[str, ...]] = {}  # by address; a loader process inherits those of its rank


def check_same(url: str, marks: tuple[str, ...]) -> None:
    """Raise DataError if the file at an address is no longer the one that this process read first.

    marks: what the server states about the content, such as ETag and date, in a fixed order; "" where it states
    nothing. Mirrors of one file may differ in one of them, so all must differ.
    """
    pairs = [(now, first) for now, first in zip(marks, _first.setdefault(url, marks), strict=True) if now and first]
    if pairs and all(now != first for now, first in pairs):
        now, first = pairs[0]
        raise DataError(
            f"{shown(url)}: found another file ({now}) than when it was read first ({first}); expected the same tar "
            "until the run ends. Put it back, or start a run with another output_dir"
        )
