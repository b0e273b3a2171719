"""Draw a few photos of a shard set and build a set of their own, in which training and validation are the same."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cogvlm_ft.data.index import ShardIndex, load_index
from cogvlm_ft.data.reader import Sample, ShardReader
from cogvlm_ft.data.record import BadSampleError, Record
from cogvlm_ft.data.stored_photo import whole_image
from cogvlm_ft.errors import DataError
from cogvlm_ft.grounding.targets import Target
from cogvlm_ft.plain_files import read_json, write_text
from cogvlm_ft.shards.build import BuildSettings, build
from cogvlm_ft.shards.build import main as build_shards
from cogvlm_ft.shards.packing.splits import SPLITS
from cogvlm_ft.terminal import say

LINES, MAX_LINES_BYTES = "lines.jsonl", 1 << 28
VAL_FRACTIONS = (0.2, 0.5)  # of few photos, if a tenth is none
STORED_SIDES = 4
"""Photos are stored at this many times the side of the model's input: they are decoded again for every step."""


def build_all(source: Sequence[str], shards: Path) -> int:
    """Build shards of all photos, with at least one for validation if two can be used; return the exit code.

    source: options of shards/build.py.
    """
    options = [*source, "--out", str(shards), "--overwrite"]
    code = build_shards(options)
    for fraction in VAL_FRACTIONS:
        if code or count(shards, "num_samples", ["val"]) or count(shards, "num_samples") < 2:
            break
        say(f"\nval is empty: building again with --val-fraction {fraction}", flush=True)
        code = build_shards([*options, "--val-fraction", str(fraction)])
    return code


def count(shards: Path, what: str, splits: Sequence[str] = SPLITS) -> int:
    """Return the number of `what` in the splits, such as num_samples, by the index of the shards."""
    found = read_json(shards / "index.json")["splits"]
    return sum(found[split][what] for split in splits if split in found)


def draw_photos(shards: Path, number: int, seed: int) -> list[Sample]:
    """Draw photos with something to find, from all splits; fewer than `number` if there are not more.

    The order depends on the seed and the keys alone. Raises DataError if there are none.
    """
    readers = [ShardReader(index) for index in _indexes(shards)]
    places = [(reader.index.key(i), reader, i) for reader in readers for i in range(len(reader))]
    places.sort(key=lambda place: place[0])
    random.Random(f"rehearsal {seed}").shuffle(places)
    drawn: list[Sample] = []
    for _, reader, i in places:
        if len(drawn) == number:
            break
        sample = _with_answers(reader, i)
        if sample:
            drawn.append(sample)
    if not drawn:
        raise DataError(f"{shards}: found no photo with a box or a turn; expected at least one. Check the review")
    return drawn


def lines_of(records: list[Record]) -> str:
    """Return the records as lines of the builder's own format."""
    rows = (_line(record, _image_name(number)) for number, record in enumerate(records))
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_chosen(samples: list[Sample], image_size: int, out: Path) -> None:
    """Build `out`/shards with the drawn photos as its only split, train."""
    images = out / "images"
    images.mkdir(parents=True, exist_ok=True)
    for number, sample in enumerate(samples):
        whole_image(sample.image).save(images / _image_name(number))
    write_text(out / LINES, lines_of([_in_whole_image(sample) for sample in samples]))
    settings = BuildSettings(
        "jsonl", images, out / LINES, val_fraction=0.0, split="random", max_side=STORED_SIDES * image_size
    )
    build(settings, out / "shards", num_workers=1, overwrite=True)


def _in_whole_image(sample: Sample) -> Record:
    """Return the record with its boxes in pixels of the image that is saved, smaller than a photo in tiles."""
    (width, height), (photo_width, photo_height) = whole_image(sample.image).size, sample.image.size
    if (width, height) == (photo_width, photo_height):
        return sample.record
    x, y = width / photo_width, height / photo_height
    targets = (
        replace(target, boxes_xyxy=tuple((a * x, b * y, c * x, d * y) for a, b, c, d in target.boxes_xyxy))
        for target in sample.record.targets
    )
    return replace(sample.record, targets=tuple(targets))


def _indexes(shards: Path) -> Iterator[ShardIndex]:
    for split in SPLITS:
        try:
            yield load_index(shards, split)
        except DataError:
            if split == SPLITS[0]:
                raise


def _with_answers(reader: ShardReader, i: int) -> Sample | None:
    """Read a sample; None without a box or a turn, or if it cannot be used."""
    try:
        sample = reader.read(i)
    except BadSampleError:
        return None
    record = sample.record
    return sample if record.turns or any(target.boxes_xyxy for target in record.targets) else None


def _image_name(number: int) -> str:
    return f"{number:02d}.png"


def _line(record: Record, image: str) -> dict[str, Any]:
    """Return the record as a line of the builder's own format. Boxes are in pixels of the upright photo."""
    turns = [
        {"prompt": turn.prompt, "answer": turn.answer} | ({"history": turn.history} if turn.history else {})
        for turn in record.turns
    ]
    return {"image": image, "key": record.key, "targets": list(map(_target, record.targets)), "turns": turns}


def _target(target: Target) -> dict[str, Any]:
    """A label with words to ask with is asked by the first of them."""
    language, phrase = target.names[0] if target.names else (target.language, target.phrase)
    fields = {"phrase": phrase, "language": language, "boxes": target.boxes_xyxy}
    return fields | ({"description": target.description} if target.description else {})
