"""Compare resolutions and tiles by how much of the targets the model sees, and by what they cost.

A target of one patch shares it with its surroundings; from two patches on, at least one is its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.grounding.tiles import tile_windows
from cogvlm_ft.shards.reviewing.photo_rules import PATCH_PX
from cogvlm_ft.shards.reviewing.readings import Tally

MIN_PATCHES = 2
ENOUGH = 0.9
"""Fraction of boxes that must have MIN_PATCHES on their shorter side; the cheapest such option is recommended."""
TILE_SIDES_PX = (490, 980)
OVERLAP = 0.2  # the default of data.tiles.overlap


def count_photo(tally: Tally, size_px: tuple[int, int]) -> None:
    """Count the images that are shown of a photo: its tiles and, if there are several, the whole photo."""
    for side in TILE_SIDES_PX:
        num_tiles = len(tile_windows(size_px, side, OVERLAP))
        tally["shown in tiles", side] += num_tiles + (num_tiles > 1)


def count_box(tally: Tally, box: Box, size_px: tuple[int, int], image_sizes: Sequence[int]) -> None:
    """Count the inputs of the model in which a box has MIN_PATCHES, whole and in tiles."""
    sides = box[2] - box[0], box[3] - box[1]
    for shown_px in (0, *TILE_SIDES_PX):
        frame = [min(shown_px or length, length) for length in size_px]
        shorter = min(side / length for side, length in zip(sides, frame, strict=True))
        for size in image_sizes:
            tally["two patches", shown_px, size] += shorter * size >= MIN_PATCHES * PATCH_PX


def compare(tally: Tally, weights_size: int, image_sizes: Sequence[int]) -> dict[str, Any]:
    """Return the options from the cheapest on, and the recommended setting; none of them is below `weights_size`.

    share: of the boxes with MIN_PATCHES or more. tokens: of an average photo. cost: tokens, relative to the whole
    photo at `weights_size`. recommended: None without a box. enough: whether it reaches ENOUGH.
    """
    photos, boxes = tally["photos",], tally["good boxes",]
    if not photos or not boxes or weights_size not in image_sizes:
        return {"options": [], "recommended": None, "enough": False}
    own = (weights_size // PATCH_PX) ** 2 + 2
    options: list[dict[str, Any]] = []
    for size in (size for size in image_sizes if size >= weights_size):
        share, tokens = tally["two patches", 0, size] / boxes, (size // PATCH_PX) ** 2 + 2
        options.append({"setting": f"model.image_size={size}", "share": share, "tokens": tokens})
    for side in (side for side in TILE_SIDES_PX if tally["shown in tiles", side] > photos):
        share, looks = tally["two patches", side, weights_size] / boxes, tally["shown in tiles", side] / photos
        options.append({"setting": f"data.tiles.side_px={side}", "share": share, "tokens": round(own * looks)})
    options.sort(key=lambda option: option["tokens"])
    options = [{**option, "cost": round(option["tokens"] / own, 2)} for option in options]
    enough = [option for option in options if option["share"] >= ENOUGH]
    best = enough[0] if enough else max(options, key=lambda option: (option["share"], -option["tokens"]))
    return {"options": options, "recommended": best["setting"], "enough": bool(enough)}


def explain(found: dict[str, Any], weights_size: int) -> str:
    """Return the lines for the terminal, "" where the model's own resolution shows enough."""
    own = f"model.image_size={weights_size}"
    if not found["recommended"] or (found["enough"] and found["recommended"] == own):
        return ""
    lines = [f"if small targets matter: {found['recommended']} (docs/small_targets.md)"]
    if not found["enough"]:
        lines.append(f"  no setting gives {ENOUGH:.0%} of the boxes {MIN_PATCHES} patches; this one comes closest")
    for each in found["options"]:
        large, cost = (
            f"{each['share']:.1%} of the boxes have {MIN_PATCHES} patches or more",
            f"{each['cost']:g} x the tokens",
        )
        lines.append(f"  {each['setting']:24} {large}, {cost}")
    return "\n".join(lines)
