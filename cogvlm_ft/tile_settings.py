"""Settings of tiles, overlapping parts of large photos."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from cogvlm_ft.setting_rules import setting


@dataclass
class TilesConfig:
    """Tiles for small targets. A large photo is also shown in overlapping parts; off unless `side_px` is set."""

    side_px: Optional[int] = setting(
        None,
        "Side of a tile in pixels of the photo, such as 980. null: no tiles. Photos that are not larger are not cut.",
        unit="px",
        least=16,
    )
    overlap: float = setting(
        0.2, "Minimum overlap of neighbouring tiles, as a fraction of their side.", least=0, most=0.9
    )
    whole: bool = setting(
        True, "Also show the whole photo. In training, it is always shown if a target is not used in any tile."
    )
    min_visible: float = setting(
        0.6,
        "Minimum fraction of a box inside a tile for its target to be used there, with the box clipped. If less is "
        "inside, the tile has no question about the target, neither as present nor as absent.",
        above=0,
        most=1,
    )
    fully_annotated: bool = setting(
        False,
        "Every object that a phrase can mean is annotated, so a target elsewhere in the photo is an absent target of "
        "the tile. false: only the absent targets of the record are.",
    )
    absent: float = setting(
        0.4,
        "Fraction of absent targets among the questions about a tile, if there are any, rounded for each tile: 0.4 is "
        "one absent target for one or two present ones.",
        least=0,
        below=1,
    )
    empty: float = setting(
        0.4,
        "Fraction of training tiles without a target; each has one question, about an absent target.",
        least=0,
        below=1,
    )
    partly_annotated: list[str] = setting(
        [],
        "Sources for which `fully_annotated` is false all the same: names of folders in `data.shards`, where that is a "
        "list.",
    )
