"""Generate a small grounding data set of coloured shapes, with questions in Chinese and English.

The output folder contains scene-000000.png, ... and annotations.jsonl, ready for shards/build.py. The same seed gives
the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from cogvlm_ft import __version__
from cogvlm_ft.command_line import exit_code
from cogvlm_ft.terminal import say

_EXAMPLES = """examples:
  python shards/demo_scenes.py --out demo/ --num-scenes 500 --seed 0
  python shards/build.py --annotations demo/annotations.jsonl --out demo_shards/
"""
NUM_TARGETS = 4
MIN_IMAGE_SIZE_PX = 24

COLOURS = {
    "red": ("红色", (214, 38, 40)),
    "green": ("绿色", (40, 160, 60)),
    "blue": ("蓝色", (30, 80, 220)),
    "yellow": ("黄色", (240, 200, 20)),
    "black": ("黑色", (15, 15, 15)),
    "white": ("白色", (250, 250, 250)),
}
KINDS = {"square": "正方形", "ring": "圆环", "cross": "十字"}

# So a scene has about 2.4 different objects, and about 1.6 of its 4 questions are about absent ones.
SHAPE_COUNTS, SHAPE_COUNT_PROBABILITIES = (2, 3), (0.4, 0.6)
TWIN_PROBABILITY = 0.25
HARD_NEGATIVE_PROBABILITY = 0.75
NUM_CELLS = 8  # shapes are aligned to 8 x 8 cells: few coordinates, quickly learned
SIDES_IN_CELLS = (3, 4)
TRIES_PER_SHAPE = 100

PixelBox = tuple[int, int, int, int]


class Thing(NamedTuple):
    """A shape of one colour and kind, as a phrase names it."""

    colour: str
    kind: str


def write_scenes(out_dir: Path, num_scenes: int, image_size_px: int, seed: int, start: int = 0) -> Path:
    """Write scenes start .. start + num_scenes - 1 and return the path of their annotations.jsonl.

    A scene depends on (seed, its number, image_size_px) only.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    annotations = out_dir / "annotations.jsonl"
    with annotations.open("w", encoding="utf-8") as lines:
        for number in range(start, start + num_scenes):
            image, targets = make_scene(random.Random(f"{seed}:{number}"), image_size_px)
            name = f"scene-{number:06d}.png"
            image.save(out_dir / name)
            lines.write(json.dumps({"image": name, "targets": targets}, ensure_ascii=False) + "\n")
    return annotations


def make_scene(rng: random.Random, image_size_px: int) -> tuple[Image.Image, list[dict[str, Any]]]:
    """Draw a square image; return it with its four targets, whose boxes are the extents of the drawn pixels, xyxy."""
    things = _choose_things(rng)
    image = _noisy_background(rng, image_size_px)
    boxes: dict[Thing, list[PixelBox]] = {}
    for thing, place in zip(things, _choose_places(rng, len(things), image_size_px), strict=True):
        boxes.setdefault(thing, []).append(_draw_shape(image, thing, place))
    asked = list(boxes) + _choose_absent(rng, list(boxes), NUM_TARGETS - len(boxes))
    rng.shuffle(asked)
    return image, [_make_target(rng, thing, boxes.get(thing, [])) for thing in asked]


def _choose_things(rng: random.Random) -> list[Thing]:
    """Choose two or three objects, all different except that two of them may be twins."""
    count = rng.choices(SHAPE_COUNTS, SHAPE_COUNT_PROBABILITIES)[0]
    everything = [Thing(colour, kind) for colour in COLOURS for kind in KINDS]
    things = rng.sample(everything, count)
    if rng.random() < TWIN_PROBABILITY:
        things[-1] = things[0]
    return things


def _choose_absent(rng: random.Random, present: list[Thing], count: int) -> list[Thing]:
    """Choose absent objects; in most scenes hard ones, whose colour and kind are present, but on different shapes."""
    colours, kinds = {thing.colour for thing in present}, {thing.kind for thing in present}
    absent = [Thing(colour, kind) for colour in COLOURS for kind in KINDS if (colour, kind) not in present]
    rng.shuffle(absent)
    if rng.random() < HARD_NEGATIVE_PROBABILITY:
        absent.sort(key=lambda thing: (thing.colour in colours) + (thing.kind in kinds), reverse=True)
    return absent[:count]


def _choose_places(rng: random.Random, count: int, image_size_px: int) -> list[PixelBox]:
    """Choose squares of two sizes with a gap between them."""
    while True:
        places: list[PixelBox] = []
        for _ in range(count * TRIES_PER_SHAPE):
            place = _random_square(rng, image_size_px)
            if all(_are_apart(place, other) for other in places):
                places.append(place)
            if len(places) == count:
                return places


def _random_square(rng: random.Random, image_size_px: int) -> PixelBox:
    side = rng.choice(SIDES_IN_CELLS)
    column, row = rng.randint(0, NUM_CELLS - side), rng.randint(0, NUM_CELLS - side)
    x0, y0, x1, y1 = (round(edge * image_size_px / NUM_CELLS) for edge in (column, row, column + side, row + side))
    return x0, y0, x1, y1


def _are_apart(a: PixelBox, b: PixelBox) -> bool:
    return a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]


def _noisy_background(rng: random.Random, image_size_px: int) -> Image.Image:
    """Draw middle grey: about 0 once CogVLM has normalised the colours, so that an untrained model sees the shapes."""
    noise = np.frombuffer(rng.randbytes(image_size_px**2), dtype=np.uint8).reshape(image_size_px, image_size_px, 1) % 12
    tint = np.array([rng.randint(110, 125) for _ in range(3)], dtype=np.uint8)
    return Image.fromarray(tint + noise)


def _draw_shape(image: Image.Image, thing: Thing, place: PixelBox) -> PixelBox:
    """Draw the thing into its place and return the extents of the pixels it covers (right and bottom edge outside)."""
    x0, y0, x1, y1 = place[0], place[1], place[2] - 1, place[3] - 1
    mask = Image.new("1", image.size)
    pen = ImageDraw.Draw(mask)
    side = x1 - x0 + 1
    if thing.kind == "square":
        pen.rectangle((x0, y0, x1, y1), fill=1)
    elif thing.kind == "ring":
        rim = max(2, round(0.25 * side))
        pen.ellipse((x0, y0, x1, y1), fill=1)
        pen.ellipse((x0 + rim, y0 + rim, x1 - rim, y1 - rim), fill=0)
    else:
        arm = round(0.36 * side)
        pen.rectangle((x0 + arm, y0, x1 - arm, y1), fill=1)
        pen.rectangle((x0, y0 + arm, x1, y1 - arm), fill=1)
    image.paste(COLOURS[thing.colour][1], mask=mask)
    extents = mask.getbbox()
    assert extents is not None, "a shape covers at least one pixel"
    return extents


def _make_target(rng: random.Random, thing: Thing, boxes: Sequence[PixelBox]) -> dict[str, Any]:
    language = rng.choice(("zh", "en"))
    chinese_phrase = f"{COLOURS[thing.colour][0]}{KINDS[thing.kind]}"
    phrase = chinese_phrase if language == "zh" else f"the {thing.colour} {thing.kind}"
    return {"phrase": phrase, "language": language, "boxes": [list(box) for box in boxes]}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line: write the scenes and print their number."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--num-scenes", type=int, required=True, help="number of images")
    parser.add_argument("--image-size", type=int, default=56, help="side of the square images in px")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes")
    options = parser.parse_args(argv)
    if options.num_scenes < 1 or options.image_size < MIN_IMAGE_SIZE_PX:
        parser.error(
            f"found --num-scenes {options.num_scenes} and --image-size {options.image_size};"
            f" expected at least 1 scene of at least {MIN_IMAGE_SIZE_PX} px"
        )
    return exit_code(lambda: _write(options))


def _write(options: argparse.Namespace) -> None:
    annotations = write_scenes(options.out, options.num_scenes, options.image_size, options.seed)
    say(f"{options.num_scenes} scenes, {options.num_scenes * NUM_TARGETS} targets: {annotations}")


if __name__ == "__main__":
    sys.exit(main())
