"""Photos of the galleries: a picture, and the boxes and phrases that the page draws on it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from PIL import Image

from cogvlm_ft.data.reader import MAX_PIXELS, decode_image
from cogvlm_ft.data.record import BadSampleError
from cogvlm_ft.grounding.boxes import boxes_from_bins, parse_boxes
from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.shards.packing.candidates import Rejected
from cogvlm_ft.shards.reviewing.labels import NUM_COLOURS, Label, Named, place_labels
from cogvlm_ft.shards.reviewing.photo_rules import PATCH_PX, as_boxes
from cogvlm_ft.shards.reviewing.photos import Photo, open_photo
from cogvlm_ft.shards.reviewing.pictures import cut_out, jpeg_uri, zoom_region
from cogvlm_ft.shards.reviewing.readings import boxes_of, in_pixels
from cogvlm_ft.shards.reviewing.sources import Item, read_photo

SIDE_PX, ZOOM_SIDE_PX = 720, 300
_FRAME_PX, _WIDE_PART_PX, _NARROW_PART_PX = (290, 218), (182, 218), (106, 218)
"""Size of a picture on the page, alone or beside another; used to place labels until the script measures it."""
MAX_BOXES = 400
"""Maximum number of boxes drawn on one picture."""
_MAX_LEGEND, _MAX_TEXT = 12, 120

Words = tuple[str, str]
"""A text in English and in Chinese."""


@dataclass(frozen=True)
class Layer:
    """A picture as a data URI, and what is drawn on it.

    outlines: of each colour, all boxes as one SVG path. scale: of the labels, before the script corrects it.
    """

    uri: str
    size_px: tuple[int, int]
    scale: float
    outlines: dict[int, str]
    labels: list[Label]


@dataclass(frozen=True)
class Phrase:
    """An entry of the legend."""

    text: str
    colour: int
    num_boxes: int


@dataclass(frozen=True)
class Shot:
    """A photo. layers: the whole one, and a small box enlarged. note: what is special about it."""

    image: str
    size_px: tuple[int, int]
    split: str
    layers: list[Layer]
    note: Words
    legend: list[Phrase]
    num_more: int
    absent: list[str]


def draw_shot(item: Item, gallery: str, image_size: int) -> Shot | None:
    """Draw a photo of a gallery; None if it cannot be shown any more."""
    photo = open_photo(item, {})
    image = decoded(item, photo) if isinstance(photo, Photo) else None
    if image is None or not isinstance(photo, Photo):
        return None
    named, legend = _named_boxes(item, photo)
    boxes = [each.box for each in named]
    note, special = _note(gallery, boxes, photo.size_px, image_size)
    region = zoom_region(special, image.size) if special and gallery == "smallest" else None
    whole = (0.0, 0.0, float(image.width), float(image.height))
    layers = [draw_layer(image, whole, named, SIDE_PX, _WIDE_PART_PX if region else _FRAME_PX)]
    if region:
        enlarged = [each for each in named if each.box == special]
        layers.append(draw_layer(image, region, enlarged, ZOOM_SIDE_PX, _NARROW_PART_PX))
    absent = [_cut(target.phrase) for target in item.candidate.targets if not target.boxes_xyxy]
    return Shot(
        image=item.candidate.image,
        size_px=photo.size_px,
        split=item.split or "",
        layers=layers,
        note=note,
        legend=legend[:_MAX_LEGEND],
        num_more=max(0, len(legend) - _MAX_LEGEND),
        absent=absent[:_MAX_LEGEND],
    )


def decoded(item: Item, photo: Photo) -> Image.Image | None:
    """Decode the photo as its boxes were drawn on it; None if that fails."""
    try:
        return decode_image(read_photo(item.place), item.candidate.image, MAX_PIXELS, upright=photo.upright)
    except (Rejected, BadSampleError):
        return None


def draw_layer(
    image: Image.Image, region: Box, named: Sequence[Named], side_px: int, screen_px: tuple[int, int]
) -> Layer:
    """Cut a region out of an image, and place the boxes and their phrases on it.

    screen_px: the space that it has on the page.
    """
    picture, scale = cut_out(image, region, side_px)
    moved = []
    for each in named:
        x0, y0, x1, y1 = (
            min(max((edge - region[i % 2]) * scale, -4.0), picture.size[i % 2] + 4.0) for i, edge in enumerate(each.box)
        )
        moved.append(Named((min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)), each.phrase, each.colour))
    outlines: dict[int, str] = {}
    for each in moved:
        x0, y0, x1, y1 = each.box
        path = f"M{x0:.1f} {y0:.1f}H{x1:.1f}V{y1:.1f}H{x0:.1f}z"
        outlines[each.colour] = outlines.get(each.colour, "") + path
    scale = max(picture.width / screen_px[0], picture.height / screen_px[1])
    return Layer(jpeg_uri(picture), picture.size, round(scale, 3), outlines, place_labels(moved, picture.size, scale))


def legend_of(named: Iterable[Named], phrases: Iterable[str]) -> list[Phrase]:
    """Count the boxes of every phrase, in the order of the annotation."""
    counts: dict[str, list[int]] = {phrase: [number, 0] for number, phrase in enumerate(dict.fromkeys(phrases))}
    for each in named:
        counts[each.phrase][1] += 1
    return [
        Phrase(_cut(text), number % NUM_COLOURS, num_boxes) for text, (number, num_boxes) in counts.items() if num_boxes
    ]


def _named_boxes(item: Item, photo: Photo) -> tuple[list[Named], list[Phrase]]:
    """Return the boxes of the targets and of the answers, and the legend."""
    candidate = item.candidate
    drawn = iter(as_boxes(in_pixels(boxes_of(candidate), candidate.units, photo.size_px)))
    texts = [(target.phrase, [next(drawn) for _ in target.boxes_xyxy]) for target in candidate.targets]
    for turn in candidate.turns:
        bins = parse_boxes(turn.answer)
        texts.append((turn.prompt, list(as_boxes(boxes_from_bins(bins, photo.size_px))) if bins else []))
    colours = {phrase: number % NUM_COLOURS for number, phrase in enumerate(dict.fromkeys(text for text, _ in texts))}
    named = [
        Named(box, phrase, colours[phrase]) for phrase, boxes in texts for box in boxes if all(map(math.isfinite, box))
    ]
    return named[:MAX_BOXES], legend_of(named, colours)


def _note(gallery: str, boxes: list[Box], size_px: tuple[int, int], image_size: int) -> tuple[Words, Box | None]:
    """Return what makes the photo special, and the box that does."""
    if gallery == "crowded":
        return (f"{len(boxes)} boxes", f"{len(boxes)} 个框"), None
    if gallery not in ("smallest", "largest") or not boxes:
        return ("", ""), None
    inside = [box for box in boxes if _side(box, size_px) > 0] or boxes
    box = (min if gallery == "smallest" else max)(inside, key=lambda box: _side(box, size_px))
    width, height = box[2] - box[0], box[3] - box[1]
    if gallery == "largest":
        share = f"{width / size_px[0]:.0%} × {height / size_px[1]:.0%}"
        return (f"{share} of the photo", f"占图片 {share}"), box
    patches = min(width / size_px[0], height / size_px[1]) * image_size / PATCH_PX
    size = f"{width:.3g} × {height:.3g} px"
    return (
        f"{size}, {patches:.1f} patches at {image_size} px",
        f"{size}，在 {image_size} 像素下为 {patches:.1f} 个图块",
    ), box


def _side(box: Box, size_px: tuple[int, int]) -> float:
    width = min(box[2], size_px[0]) - max(box[0], 0.0)
    height = min(box[3], size_px[1]) - max(box[1], 0.0)
    return math.sqrt(width * height / (size_px[0] * size_px[1])) if width > 0 and height > 0 else 0.0


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 1]}…"
