"""Draw a few photos of a shard set and build a set of their own, in which training and validation are the same."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cogvlm_ft.data.index import ShardIndex, load_index
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.data.record import BadSampleError, Record
from cogvlm_ft.errors import DataError
from cogvlm_ft.grounding.targets import Target
from cogvlm_ft.plain_files import write_text
from cogvlm_ft.shards.build import BuildSettings, build
from cogvlm_ft.shards.packing.splits import SPLITS

LINES, MAX_LINES_BYTES = "lines.jsonl", 1 << 28
STORED_SIDES = 4
"""Photos are stored at this many times the side of the model's input: they are decoded again for every step."""


def draw_photos(shards: Path, number: int, seed: int) -> list[tuple[ShardReader, int]]:
    """Draw photos with something to find, from all splits; fewer than `number` if there are not more.

    The order depends on the seed and the keys alone. Raises DataError if there are none.
    """
    readers = [ShardReader(index) for index in _indexes(shards)]
    places = [(reader.index.key(i), reader, i) for reader in readers for i in range(len(reader))]
    places.sort(key=lambda place: place[0])
    random.Random(f"rehearsal {seed}").shuffle(places)
    drawn: list[tuple[ShardReader, int]] = []
    for _, reader, i in places:
        if len(drawn) == number:
            break
        if _has_answers(reader, i):
            drawn.append((reader, i))
    if not drawn:
        raise DataError(f"{shards}: found no photo with a box or a turn; expected at least one. Check the review")
    return drawn


def write_chosen(drawn: list[tuple[ShardReader, int]], image_size: int, out: Path) -> list[Record]:
    """Build `out`/shards with the drawn photos as its only split, train. Return their records."""
    images = out / "images"
    images.mkdir(parents=True, exist_ok=True)
    records, lines = [], []
    for number, (reader, i) in enumerate(drawn):
        sample = reader.read(i)
        name = f"{number:02d}.png"
        sample.image.save(images / name)
        records.append(sample.record)
        lines.append(json.dumps(_line(sample.record, name), ensure_ascii=False) + "\n")
    write_text(out / LINES, "".join(lines))
    settings = BuildSettings(
        "jsonl", images, out / LINES, val_fraction=0.0, split="random", max_side=STORED_SIDES * image_size
    )
    build(settings, out / "shards", num_workers=1, overwrite=True)
    return records


def _indexes(shards: Path) -> Iterator[ShardIndex]:
    for split in SPLITS:
        try:
            yield load_index(shards, split)
        except DataError:
            if split == SPLITS[0]:
                raise


def _has_answers(reader: ShardReader, i: int) -> bool:
    try:
        record = reader.read(i).record
    except BadSampleError:
        return False
    return bool(record.turns) or any(target.boxes_xyxy for target in record.targets)


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
