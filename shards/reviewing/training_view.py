"""Show the model's input for a few photos: resized, augmented, with question and answer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image

from cogvlm_ft.data.look import build_look, describe_changes
from cogvlm_ft.data.record import Record, box_defect, clip_box
from cogvlm_ft.errors import ConfigError, DataError
from cogvlm_ft.grounding.boxes import boxes_from_bins, parse_boxes
from cogvlm_ft.grounding.targets import Target
from cogvlm_ft.grounding.wording import Wording, load_wording
from cogvlm_ft.settings import AugmentConfig
from cogvlm_ft.shards.packing.splits import key_of
from cogvlm_ft.shards.reviewing.labels import NUM_COLOURS, Named
from cogvlm_ft.shards.reviewing.photo_rules import as_boxes
from cogvlm_ft.shards.reviewing.photos import Photo, open_photo
from cogvlm_ft.shards.reviewing.readings import in_pixels
from cogvlm_ft.shards.reviewing.settings import EXAMPLE_AUGMENT, ReviewSettings
from cogvlm_ft.shards.reviewing.shots import Layer, decoded, draw_layer
from cogvlm_ft.shards.reviewing.sources import Item

NUM_SHOWN = 6
_MAX_TURNS, _MAX_TEXT = 5, 400
_SEED = 0
_SCREEN_PX = (265, 265)


@dataclass(frozen=True)
class Exchange:
    """A question and its answer. colour: of its boxes; None if it has none."""

    prompt: str
    answer: str
    colour: int | None


@dataclass(frozen=True)
class Seen:
    """One input of the model. problem: why there is none."""

    layer: Layer | None
    exchanges: list[Exchange] = field(default_factory=list)
    num_more: int = 0
    changes: list[str] = field(default_factory=list)
    problem: str = ""


@dataclass(frozen=True)
class SeenPhoto:
    """A photo without and with augmentation."""

    image: str
    size_px: tuple[int, int]
    plain: Seen
    augmented: Seen


def see_photos(items: Iterable[Item], settings: ReviewSettings) -> list[SeenPhoto]:
    """Show the first NUM_SHOWN photos that have something to ask. Raises ConfigError for an unknown wording."""
    wording = load_wording(settings.wording)
    shown: list[SeenPhoto] = []
    for item in items:
        if len(shown) < NUM_SHOWN and item.split in (None, "train"):
            seen = _see_photo(item, wording, settings)
            shown += [seen] if seen else []
    return shown


def augment_words(augment: AugmentConfig) -> str:
    """Write the augmentation as settings of a run."""
    plain = vars(AugmentConfig())
    stated = {name: value for name, value in vars(augment).items() if value != plain[name]}
    return " ".join(f"data.augment.{name}={value:g}" for name, value in stated.items())


def _see_photo(item: Item, wording: Wording, settings: ReviewSettings) -> SeenPhoto | None:
    photo = open_photo(item, {})
    if not isinstance(photo, Photo) or item.candidate.stated_size_px not in (None, photo.size_px, photo.stored_px):
        return None
    record = _record_of(item, photo)
    if not record.targets and not record.turns:
        return None
    image = decoded(item, photo)
    if image is None:
        return None
    plain = _see(record, image, wording, settings, AugmentConfig())
    augmented = _see(record, image, wording, settings, settings.augment or EXAMPLE_AUGMENT)
    return SeenPhoto(item.candidate.image, photo.size_px, plain, augmented)


def _record_of(item: Item, photo: Photo) -> Record:
    """Keep the same parts as a build: boxes that fit the photo, and targets that have a box or are absent."""
    candidate, size = item.candidate, photo.size_px
    targets: list[Target] = []
    for target in candidate.targets:
        pixels = in_pixels(np.array(target.boxes_xyxy, dtype=np.float64).reshape(-1, 4), candidate.units, size)
        boxes = tuple(clip_box(box, size) for box in as_boxes(pixels) if box_defect(box, size) is None)
        if boxes or not target.boxes_xyxy:
            targets.append(replace(target, boxes_xyxy=boxes))
    return Record(key_of(candidate), size, candidate.source, tuple(targets), candidate.turns, photo.upright)


def _see(
    record: Record, image: Image.Image, wording: Wording, settings: ReviewSettings, augment: AugmentConfig
) -> Seen:
    try:
        look = build_look(record, wording, augment, settings.resize, seed=_SEED, epoch=0)
    except (ConfigError, DataError) as error:
        return Seen(None, problem=str(error))
    side = settings.image_size
    named, exchanges = [], []
    for number, turn in enumerate(look.turns[:_MAX_TURNS]):
        bins = parse_boxes(turn.answer) or parse_boxes(turn.prompt) or []
        boxes = as_boxes(boxes_from_bins(bins, (side, side)))
        phrase = turn.target.phrase if turn.target else f"{number + 1}"
        named += [Named(box, phrase, number % NUM_COLOURS) for box in boxes]
        exchanges.append(Exchange(_cut(turn.prompt), _cut(turn.answer), number % NUM_COLOURS if boxes else None))
    seen = look.draw(image, side)
    layer = draw_layer(seen, (0.0, 0.0, float(side), float(side)), named, side, _SCREEN_PX)
    return Seen(layer, exchanges, max(0, len(look.turns) - _MAX_TURNS), describe_changes(look))


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 1]}…"
