"""Settings of tiles: large photos are shown in parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from cogvlm_ft.setting_rules import setting


@dataclass
class TilesConfig:
    """Tiles for small targets. A large photo is also shown in overlapping parts; off unless `side_px` is set."""

    side_px: Optional[int] = setting(
        None,
        "Side of a tile in pixels of the photo, such as 980. null: no tiles. Photos that are not larger stay whole.",
        unit="px",
        least=16,
    )
    overlap: float = setting(
        0.2, "Least overlap of neighbouring tiles, as a fraction of their side.", least=0, most=0.9
    )
    whole: bool = setting(True, "Show the whole photo too. In training it is shown anyway where no tile asks a target.")
    min_visible: float = setting(
        0.6,
        "Least fraction of a box inside a tile for its target to be asked there, with the box clipped. Below it the "
        "target is neither asked nor called absent in that tile.",
        above=0,
        most=1,
    )
    fully_annotated: bool = setting(
        False,
        "Every object that a phrase can mean is annotated, so a target elsewhere in the photo is absent from a tile. "
        "false: only the records' own absent targets are.",
    )
    absent: float = setting(
        0.4,
        "Fraction of absent targets among the questions about a tile, where there are any; rounded in each tile: 0.4 "
        "is one beside one or two targets.",
        least=0,
        below=1,
    )
    empty: float = setting(
        0.4, "Fraction of training tiles without a target; each asks for one absent target.", least=0, below=1
    )
