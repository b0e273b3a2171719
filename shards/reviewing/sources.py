"""Yield what is reviewed: the candidates of annotations or the samples of shards, with the location of their images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cogvlm_ft.data.index import ShardIndex, load_index
from cogvlm_ft.data.record import BadSampleError, record_from_json
from cogvlm_ft.data.shard_sets import read_json_file
from cogvlm_ft.data.tars import MAX_MEMBER_BYTES
from cogvlm_ft.errors import DataError
from cogvlm_ft.shards.formats import FORMATS
from cogvlm_ft.shards.packing.box_units import BoxUnits, UnclearUnitError, survey_units
from cogvlm_ft.shards.packing.candidates import Candidate, Problem, Rejected
from cogvlm_ft.shards.packing.checks import read_image
from cogvlm_ft.shards.packing.decisions import PartIds, part_ids
from cogvlm_ft.shards.packing.given_splits import GivenSplits
from cogvlm_ft.shards.packing.photo_names import with_photos
from cogvlm_ft.shards.packing.splits import SPLITS


@dataclass(frozen=True)
class Place:
    """Where the bytes of an image are: a file below a folder, or a part of a tar.

    embedded_in: an annotation that contains the image, used if there is no file.
    """

    folder: str
    name: str
    offset: int = 0
    size: int | None = None
    embedded_in: str | None = None

    def row(self) -> list[Any]:
        """Return the fields for JSON: Place(*row) restores it."""
        return [self.folder, self.name, self.offset, self.size, self.embedded_in]


@dataclass(frozen=True)
class Item:
    """A candidate and the location of its image; in shards also its split, and whether its boxes are upright.

    stated_split: in annotations, the split that the user's files state, which a build keeps.
    """

    candidate: Candidate
    place: Place
    split: str | None = None
    upright: bool | None = None
    stated_split: str | None = None

    @cached_property
    def ids(self) -> PartIds:
        """Return the ids of the candidate and its parts."""
        return part_ids(self.candidate)


def annotated_items(name: str, annotations: Path, images: Path, box_unit: str = "auto") -> Iterator[Item | Problem]:
    """Yield what a format reads, one by one, as shards/build.py would. Raises DataError like the format.

    box_unit: of the user, or "auto". A format that leaves the unit open is read twice. If the unit is not clear, a
    problem says so, and the boxes keep the unit that the format assumes: the page shows what is wrong with it.
    """
    annotated = FORMATS[name]
    first_pass = with_photos(annotated.read(annotations, images), images) if annotated.has_open_units else ()
    found_units = survey_units(first_pass, images)
    try:
        box_units = found_units.decide(box_unit, annotations)
    except UnclearUnitError as error:
        box_units = BoxUnits({})
        yield Problem("box", "box_unit_unclear", str(error), annotations.name)
    yield from box_units.notes
    given = GivenSplits(annotations, images)
    for found in with_photos(annotated.read(annotations, images), images):
        if not annotated.has_open_units:
            found_units.add(found)
        part = found if isinstance(found, Problem) else box_units.settle(found)
        if isinstance(part, Problem):
            yield part
        else:
            embedded_in = str(part.embedded_in) if part.embedded_in else None
            place = Place(str(images), part.image, embedded_in=embedded_in)
            yield Item(part, place, stated_split=given.of(part))
    if not annotated.has_open_units:
        try:
            found_units.check_stated(annotations)
        except UnclearUnitError as error:
            yield Problem("box", "box_unit_unclear", str(error), annotations.name)


def shard_items(folder: Path) -> Iterator[Item | Problem]:
    """Yield the samples of both splits as stored: nothing is clipped or left out. Raises DataError."""
    splits = [split for split in SPLITS if _has_samples(folder, split)]
    if not splits:
        raise DataError(f"{folder} has no samples; expected a folder written by shards/build.py")
    for split in splits:
        index = load_index(str(folder), split)
        for loss in index.losses:
            detail = loss.detail or f"sample {loss.key!r} of {loss.shard} cannot be read"
            yield Problem("sample", loss.reason, detail, f"{loss.shard} {loss.key}")
        for note in index.notes:
            yield Problem("note", note.reason, note.detail, f"{note.shard} {note.key}")
        for i in range(len(index)):
            yield _stored_item(index, i)


def read_photo(place: Place) -> bytes:
    """Read an image; raises Rejected, also if the path leads out of its folder or is not a regular file."""
    if place.size is None:
        embedded_in = Path(place.embedded_in) if place.embedded_in else None
        return read_image(Candidate(place.name, None, "", embedded_in=embedded_in), Path(place.folder))[1]
    if place.size > MAX_MEMBER_BYTES:
        detail = f"{place.name} has a member of {place.size} bytes; expected at most {MAX_MEMBER_BYTES}"
        raise Rejected("sample", "too_large", detail)
    try:
        with Path(place.folder, place.name).open("rb") as file:
            file.seek(place.offset)
            return file.read(place.size)
    except OSError as error:
        raise Rejected("sample", "unreadable_shard", f"{place.name}: {error}") from None


def _has_samples(folder: Path, split: str) -> bool:
    if not (folder / "index.json").is_file():
        return any(folder.glob(f"{split}-*.tar"))
    try:
        return bool(read_json_file(folder / "index.json")["splits"][split]["num_samples"])
    except (KeyError, TypeError):
        return any(folder.glob(f"{split}-*.tar"))


def _stored_item(index: ShardIndex, i: int) -> Item | Problem:
    key = index.key(i)
    tar = Path(str(index.shard_paths[int(index.shard_number[i])]))
    place = Place(str(tar.parent), tar.name, int(index.image_offset[i]), int(index.image_num_bytes[i]))
    record_place = Place(str(tar.parent), tar.name, int(index.json_offset[i]), int(index.json_num_bytes[i]))
    source = f"{tar.name} {key}"
    try:
        record = record_from_json(read_photo(record_place), key)
    except BadSampleError as error:
        return Problem("sample", error.reason, error.detail, source)
    except Rejected as rejected:
        return rejected.problem(source)
    image = f"{key}.{bytes(index.exts[i]).decode()}"
    candidate = Candidate(image, key, source, record.targets, record.turns, record.image_size_px)
    return Item(candidate, place, index.split, record.upright)
