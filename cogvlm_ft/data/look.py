"""What the model sees of an image in training: its frame, its colours, the questions and the answers. Without torch."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from cogvlm_ft.data.augment import Colours, augments, choose_look
from cogvlm_ft.data.frames import Frame, fit, move_record, whole_frame
from cogvlm_ft.data.record import Record
from cogvlm_ft.data.stored_photo import Photo
from cogvlm_ft.grounding.targets import Turn
from cogvlm_ft.grounding.turns import build_turns
from cogvlm_ft.grounding.wording import Wording
from cogvlm_ft.settings import AugmentConfig


@dataclass(frozen=True)
class Look:
    """An image as it is shown in one epoch, and the turns about what is seen of it."""

    frame: Frame
    colours: Colours
    turns: list[Turn]

    def draw(self, photo: Photo, image_size: int) -> Image.Image:
        """Return the S x S image before it is normalised, S = image_size. photo: as for `Frame.apply_image`."""
        return self.colours.apply(self.frame.apply_image(photo, image_size))


def build_look(
    record: Record,
    wording: Wording,
    augment: AugmentConfig,
    resize: str,
    *,
    seed: int,
    epoch: int,
    tile: Frame | None = None,
) -> Look:
    """Choose the frame and the colours of an image, and build the turns about what the model sees.

    tile: the part of the image that is shown; the record holds what is asked about it then.

    Raises BadSampleError (boxes_in_turns) if boxes move and turns of the record hold boxes as text.
    """
    frame = whole_frame(record, resize) if tile is None else fit(tile, resize)
    colours, turns = Colours(), None
    if augments(augment):  # what may change depends on the texts
        turns = turns_of(record, wording, seed=seed, epoch=epoch)
        frame, colours = choose_look(record, turns, augment, resize, seed=seed, epoch=epoch, tile=tile)
    if turns is None or not frame.is_whole_photo:  # build them for the boxes in the frame
        turns = turns_of(move_record(record, frame), wording, seed=seed, epoch=epoch)
    return Look(frame, colours, turns)


def turns_of(record: Record, wording: Wording, *, seed: int, epoch: int) -> list[Turn]:
    """Build an image's turns: those of the record verbatim, then those about its targets.

    The wording of the latter depends on (seed, epoch, key) only.
    """
    assert record.image_size_px is not None
    worded = build_turns(record.targets, record.image_size_px, wording, seed=seed, epoch=epoch, key=record.key)
    return [*record.turns, *worded]


def describe_changes(look: Look) -> list[str]:
    """Name what was done to the image, in words of the settings; [] if nothing was."""
    frame, (width, height) = look.frame, look.frame.photo_px
    x0, y0, x1, y1 = frame.window_px
    found = []
    if x1 - x0 < width or y1 - y0 < height:
        found.append(f"crop\u00a0{min(1, (x1 - x0) / width):.0%}\u00a0×\u00a0{min(1, (y1 - y0) / height):.0%}")
    if frame.mirrored:
        found.append("flip")
    factors = {name: value for name, value in vars(look.colours).items() if name != "hue" and value != 1}
    found += [f"{name}\u00a0×\u00a0{value:.2f}" for name, value in factors.items()]
    if look.colours.hue:
        found.append(f"hue {look.colours.hue:+.2f}")
    return found
