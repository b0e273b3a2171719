"""Review a source in one pass with several processes; memory does not grow with the source."""

from __future__ import annotations

import multiprocessing
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from cogvlm_ft.errors import DataError
from cogvlm_ft.shards.packing.candidates import Problem
from cogvlm_ft.shards.packing.tar_writing import to_json_bytes
from cogvlm_ft.shards.packing.workers import die_with_parent
from cogvlm_ft.shards.reviewing.gallery import Galleries, Measure, measure_photo
from cogvlm_ft.shards.reviewing.ledger import Ledger, PhotoRow
from cogvlm_ft.shards.reviewing.photo_rules import as_boxes, find_suspects, view_of
from cogvlm_ft.shards.reviewing.photos import Photo, PhotoFile, open_photo
from cogvlm_ft.shards.reviewing.readings import (
    Reading,
    Tally,
    boxes_of,
    count_readings,
    in_pixels,
    judge_readings,
    read_as,
)
from cogvlm_ft.shards.reviewing.settings import ReviewSettings
from cogvlm_ft.shards.reviewing.sources import Item, Place
from cogvlm_ft.shards.reviewing.statistics import count_candidate, report_of
from cogvlm_ft.shards.reviewing.suspect_texts import KINDS, NOTE
from cogvlm_ft.shards.reviewing.suspects import (
    Chosen,
    Suspect,
    View,
    draw_fairly,
    smallest,
    suspect_of_problem,
)

_CHUNK = 32
_EXAMPLES = 3
_MOST_FREQUENT = 30
_MAX_PARTS = 200_000
"""Maximum number of parts on the page covered by decisions about whole kinds, all kinds together."""

Example = tuple[bytes, View]
"""(rank, view)"""


@dataclass
class Findings:
    """The findings of one part of the source.

    measures: of its images, for the galleries. examples: a few images per reading that fixes their boxes.
    """

    tally: Tally = field(default_factory=Counter)
    phrases: Counter[str] = field(default_factory=Counter)
    suspects: list[Suspect] = field(default_factory=list)
    photos: list[PhotoRow] = field(default_factory=list)
    measures: list[Measure] = field(default_factory=list)
    examples: dict[tuple[str, Reading], list[Example]] = field(default_factory=lambda: defaultdict(list))


@dataclass(frozen=True)
class Survey:
    """The result of a review. report: review.json. The others are in the order of the page.

    shown: suspects by kind. parts: by kind and level, 8 bytes each: what a decision about the whole kind decides.
    num_parts_left_out: by kind, because there are more than _MAX_PARTS.
    galleries: the photos to show.
    """

    report: dict[str, Any]
    shown: dict[str, Chosen]
    parts: dict[str, dict[str, bytearray]]
    num_parts_left_out: Counter[str]
    galleries: dict[str, list[Item]]


def survey(parts: Iterable[Item | Problem], out: Path, settings: ReviewSettings) -> Survey:
    """Review the whole source, write suspects.jsonl to `out`, and choose the suspects shown on the page."""
    with closing(Ledger(out / ".review.sqlite")) as ledger, (out / "suspects.jsonl").open("wb") as file:
        gathered = _Gathered(ledger, file, settings.max_pictures + settings.max_listed)
        with tqdm(unit="", desc="review") as bar:
            for findings, chunk in _all_findings(parts, settings.image_size, settings.num_workers):
                gathered.add(findings, chunk)
                bar.update(len(chunk))
        gathered.add_suspects(_source_suspects(gathered.tally, gathered.examples))
        for suspect in ledger.suspects():
            gathered.add_suspects([suspect])
        shown = draw_fairly(gathered.by_kind(), settings.max_pictures, settings.max_listed)
        counts = {kind: gathered.counts[kind] for kind in gathered.kinds()}
        notes = sum(count for kind, count in counts.items() if kind.startswith(NOTE))
        report = {
            **report_of(gathered.tally, settings.weights_size),
            "labels": ledger.labels(),
            "phrases": ledger.phrases(_MOST_FREQUENT),
            "num_suspects": sum(counts.values()) - notes,
            "num_notes": notes,
            "suspects": counts,
            "suspects_shown": {kind: len(chosen.pictured) for kind, chosen in shown.items()},
            "suspects_listed": {kind: len(chosen.listed) for kind, chosen in shown.items()},
        }
        return Survey(report, shown, gathered.parts, gathered.num_parts_left_out, gathered.galleries.chosen())


class _Gathered:
    """The findings so far."""

    def __init__(self, ledger: Ledger, file: BinaryIO, most_of_a_kind: int) -> None:
        self.tally: Tally = Counter()
        self.counts: Counter[str] = Counter()
        self.examples: dict[tuple[str, Reading], list[Example]] = defaultdict(list)
        self.galleries = Galleries()
        self.parts: dict[str, dict[str, bytearray]] = defaultdict(lambda: defaultdict(bytearray))
        self.num_parts_left_out: Counter[str] = Counter()
        self._num_parts = 0
        self._chosen: dict[str, list[Suspect]] = defaultdict(list)
        self._ledger = ledger
        self._file = file
        self._most = max(1, most_of_a_kind)

    def add(self, findings: Findings, chunk: list[Item | Problem]) -> None:
        self.tally.update(findings.tally)
        self._ledger.add((part for part in chunk if isinstance(part, Item)), findings.photos, findings.phrases)
        for key, examples in findings.examples.items():
            self.examples[key] = _few(self.examples[key] + examples)
        for measure in findings.measures:
            item = chunk[measure.position]
            assert isinstance(item, Item)
            self.galleries.add(measure, item)
        self.add_suspects(findings.suspects)

    def add_suspects(self, suspects: list[Suspect]) -> None:
        for suspect in suspects:
            self._file.write(to_json_bytes(suspect.row()) + b"\n")
            self.counts[suspect.kind] += 1
            self._add_parts(suspect)
            self._chosen[suspect.kind].append(suspect)
            if len(self._chosen[suspect.kind]) >= 2 * self._most:
                self._chosen[suspect.kind] = smallest(self._chosen[suspect.kind], self._most)

    def _add_parts(self, suspect: Suspect) -> None:
        for part in suspect.parts:
            level, _, digest = part.partition("-")
            self._num_parts += 1
            if self._num_parts <= _MAX_PARTS:
                self.parts[suspect.kind][level] += bytes.fromhex(digest)
            else:
                self.num_parts_left_out[suspect.kind] += 1

    def kinds(self) -> list[str]:
        """Return the kinds that were found, in the order of the page."""
        order = {kind: number for number, kind in enumerate(KINDS)}
        return sorted(self.counts, key=lambda kind: (order.get(kind, len(order)), kind))

    def by_kind(self) -> dict[str, list[Suspect]]:
        return {kind: smallest(self._chosen[kind], self._most) for kind in self.kinds()}


def examine(parts: list[Item | Problem], image_size: int) -> Findings:
    """Examine one part of the source."""
    findings, known = Findings(), dict[Place, PhotoFile]()
    for position, part in enumerate(parts):
        if isinstance(part, Problem):
            findings.suspects.append(suspect_of_problem(part))
            continue
        opened = open_photo(part, known)
        photo = opened if isinstance(opened, Photo) else None
        findings.tally.update(count_candidate(part.candidate, photo, part.split))
        findings.phrases.update(target.phrase for target in part.candidate.targets)
        findings.suspects.extend(find_suspects(part, opened, image_size))
        if photo:
            findings.photos.append(_photo_row(part, photo))
            findings.measures.append(measure_photo(position, part, photo))
            _weigh_readings(part, photo, findings)
    return findings


def _all_findings(
    parts: Iterable[Item | Problem], image_size: int, num_workers: int
) -> Iterator[tuple[Findings, list[Item | Problem]]]:
    """Yield the findings and what they are about, in the order of the source, whatever the number of processes."""
    stream = iter(parts)
    chunks = iter(lambda: list(islice(stream, _CHUNK)), [])
    if num_workers <= 1:
        yield from ((examine(chunk, image_size), chunk) for chunk in chunks)
        return
    context = multiprocessing.get_context("forkserver")  # as in shards/packing/workers.py
    context.set_forkserver_preload(["cogvlm_ft.shards.reviewing.survey"])
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=die_with_parent) as pool:
        waiting: deque[tuple[Future[Findings], list[Item | Problem]]] = deque()
        try:
            for chunk in chunks:
                waiting.append((pool.submit(examine, chunk, image_size), chunk))
                if len(waiting) > 4 * num_workers:
                    future, examined = waiting.popleft()
                    yield future.result(), examined
            for future, examined in waiting:
                yield future.result(), examined
        except BrokenProcessPool:
            detail = "a worker process was ended from outside, perhaps for want of memory; try fewer --workers"
            raise DataError(detail) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _photo_row(item: Item, photo: Photo) -> PhotoRow:
    candidate = item.candidate
    drawn = iter(as_boxes(in_pixels(boxes_of(candidate), candidate.units, photo.size_px)))
    return PhotoRow(
        sha256=photo.sha256,
        image=candidate.image,
        source=candidate.source,
        split=item.split,
        part=item.ids.sample,
        place=item.place,
        upright=photo.upright,
        look=photo.look,
        targets=tuple((target.phrase, tuple(islice(drawn, len(target.boxes_xyxy)))) for target in candidate.targets),
    )


def _weigh_readings(item: Item, photo: Photo, findings: Findings) -> None:
    candidate = item.candidate
    boxes = boxes_of(candidate)
    if not len(boxes):
        return
    tally, explaining = count_readings(boxes, candidate.units, photo.size_px)
    findings.tally.update(tally)
    for reading in explaining:
        view = replace(
            view_of(item, photo),
            part=None,
            marked=as_boxes(in_pixels(boxes, candidate.units, photo.size_px)),
            instead=as_boxes(read_as(boxes, reading, photo.size_px)),
            others=(),
        )
        key = candidate.units, reading
        findings.examples[key] = _few([*findings.examples[key], (photo.sha256, view)])


def _source_suspects(tally: Tally, examples: dict[tuple[str, Reading], list[Example]]) -> list[Suspect]:
    found = []
    for kind, units, reading, values in judge_readings(tally):
        views = tuple(view for _, view in examples.get((units, reading), []))
        found.append(Suspect(f"source.{kind}.{units}", kind, "source", "", values, views))
    return found


def _few(examples: list[Example]) -> list[Example]:
    return sorted(examples, key=lambda example: example[0])[:_EXAMPLES]
