"""Damaged and hostile annotations of every format: nothing crashes, hangs, or is lost without a word."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from annotation_samples import WITNESS, Parts, Sample, candidates_of, problems_of, samples
from mutate import cpu_limit
from PIL import Image

from cogvlm_ft.data.record import box_defect, record_from_json, record_to_json
from cogvlm_ft.errors import DataError
from shards.build import BuildSettings, build
from shards.candidates import Candidate, Problem
from shards.checks import check_candidate
from shards.layout import key_of
from shards.formats import FORMATS, recognise_format
from shards.pack import rejection, to_json_bytes
from shards.review import annotated_items, review
from shards.verify import VERIFY

NUM_READ, NUM_BUILT, NUM_REVIEWED = 110, 14, 4  # of each sample
SECONDS = 10.0  # of computing, for an input that takes milliseconds
SAMPLES = samples()

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300, method="thread")]


class Place:
    """A folder of images with traps, and the annotations beside it."""

    def __init__(self, root: Path, sample: Sample) -> None:
        self.root, self.images, self.annotations = root, root / "images", root / "annotations"
        self.secret = _jpeg((64, 48), "red")
        (self.images / "sub").mkdir(parents=True)
        (root / "secret.jpg").write_bytes(self.secret)
        (self.images / "link.jpg").symlink_to("../secret.jpg")
        (self.images / "linked").symlink_to("..")
        os.mkfifo(self.images / "pipe.jpg")
        for name, size in sample.images.items():
            path = self.images / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_jpeg(size, "gray"))

    def write(self, files: dict[str, bytes]) -> None:
        shutil.rmtree(self.annotations, ignore_errors=True)
        for name, data in files.items():
            path = self.annotations / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def _jpeg(size: tuple[int, int], colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize("name", SAMPLES)
def test_reading_and_checking(name: str, tmp_path: Path) -> None:
    sample = SAMPLES[name]()
    place = Place(tmp_path, sample)
    path = place.annotations / sample.annotations
    outcomes: Counter[str] = Counter()
    for number in range(NUM_READ):
        files = sample.mutated(random.Random(f"{name} {number}"))
        place.write(files)
        with cpu_limit(SECONDS), explained(name, number, files[sample.changed]):
            _recognise(path)
            try:
                parts = list(FORMATS[sample.format].read(path, place.images))
            except DataError as error:
                assert str(error)
                outcomes["refused"] += 1
                assert not sample.has_witness
                continue
            _check_count(sample, files[sample.changed], parts, outcomes)
            _check_parts(place, parts, VERIFY[number % 2], outcomes, sample.has_witness)
    assert outcomes["kept"] > NUM_READ / 2, "the changes leave nothing to look at"
    assert outcomes["problems"] > NUM_READ / 8 and outcomes["lost"] > 0


def _recognise(path: Path) -> None:
    try:
        assert recognise_format(path)
    except DataError as error:
        assert str(error)


def _check_count(sample: Sample, data: bytes, parts: Parts, outcomes: Counter[str]) -> None:
    """Good and reported are what was given."""
    given, found = sample.given(data), sample.found(parts)
    if given is not None and found is not None:
        outcomes["counted"] += 1
        assert found == given


def _check_parts(place: Place, parts: Parts, verify: str, outcomes: Counter[str], has_witness: bool) -> None:
    images = set()
    for part in parts:
        if isinstance(part, Problem):
            _check_problem(part, outcomes)
            continue
        checked, problems = check_candidate(part, key_of(part), place.images, 10**7, verify)
        for problem in problems:
            _check_problem(problem, outcomes)
        new = Counter(problem.level for problem in problems[len(part.problems) :])
        if checked is None:
            assert new["sample"] == 1
            outcomes["lost"] += 1
            continue
        record = checked.record
        assert not new["sample"] and checked.image != place.secret
        assert new["target"] == len(part.targets) - len(record.targets) and record.turns == part.turns
        boxes = [box for target in record.targets for box in target.boxes_xyxy]
        assert new["box"] == sum(len(target.boxes_xyxy) for target in part.targets) - len(boxes)
        assert record.image_size_px and not any(box_defect(box, record.image_size_px) for box in boxes)
        assert record_from_json(record_to_json(record), record.key) == record
        outcomes["kept"] += 1
        images.add(Path(part.image).stem)
    assert not has_witness or WITNESS in images


def _check_problem(problem: Problem, outcomes: Counter[str]) -> None:
    outcomes["problems"] += 1
    assert problem.level in ("sample", "target", "box", "turn") and problem.reason and problem.detail
    row = json.loads(to_json_bytes(rejection(problem)))
    assert row["reason"] == problem.reason


@pytest.mark.parametrize("name", SAMPLES)
def test_whole_builds(name: str, tmp_path: Path) -> None:
    sample = SAMPLES[name]()
    place = Place(tmp_path, sample)
    path = place.annotations / sample.annotations
    for number in range(NUM_BUILT):
        files = sample.mutated(random.Random(f"build {name} {number}"))
        place.write(files)
        settings = BuildSettings(sample.format, place.images, path, val_fraction=0.5, verify=VERIFY[number % 2])
        out = tmp_path / f"out{number}"
        with cpu_limit(SECONDS), explained(name, number, files[sample.changed]):
            try:
                build(settings, out, num_workers=1)
            except DataError as error:
                assert str(error) and not sample.has_witness
                continue
            parts = list(FORMATS[sample.format].read(path, place.images))
            _check_build(out, parts)


def _check_build(out: Path, parts: Parts) -> None:
    """Every candidate and every lost sample of the reader is in the shards or in rejected.jsonl."""
    index = json.loads((out / "index.json").read_bytes())
    rows = [json.loads(line) for line in (out / "rejected.jsonl").read_bytes().split(b"\n")[:-1]]
    num_samples = sum(split["num_samples"] for split in index["splits"].values())
    lost = sum(row["level"] == "sample" for row in rows)
    lost_when_read = sum(isinstance(part, Problem) and part.level == "sample" for part in parts)
    assert num_samples + lost == len(candidates_of(parts)) + lost_when_read
    assert index["rejected"] == dict(sorted(Counter(row["reason"] for row in rows).items()))
    assert len(rows) >= len(problems_of(parts))


@pytest.mark.parametrize("name", SAMPLES)
def test_reviews(name: str, tmp_path: Path) -> None:
    sample = SAMPLES[name]()
    place = Place(tmp_path, sample)
    path = place.annotations / sample.annotations
    for number in range(NUM_REVIEWED):
        files = sample.mutated(random.Random(f"review {name} {number}"))
        place.write(files)
        with cpu_limit(3 * SECONDS), explained(name, number, files[sample.changed]):
            try:
                found = review(annotated_items(sample.format, path, place.images), name, tmp_path / "out")
            except DataError as error:
                assert str(error) and not sample.has_witness
                continue
            parts = list(FORMATS[sample.format].read(path, place.images))
            _check_review(tmp_path / "out", found.report, parts)


def _check_review(out: Path, report: dict[str, Any], parts: Parts) -> None:
    assert report["counts"]["samples"] == len(candidates_of(parts))
    rows = [json.loads(line) for line in (out / "suspects.jsonl").read_bytes().split(b"\n")[:-1]]
    assert sum(report["suspects"].values()) == len(rows) >= len(problems_of(parts))
    assert (out / "review.html").read_bytes().decode().rstrip().endswith("</html>")


class explained:
    """Says which input it was when something else than a DataError comes out."""

    def __init__(self, name: str, number: int, data: bytes) -> None:
        self._what = f"{name}, input {number}, {len(data)} bytes: {data[:2000]!r}"

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            error.add_note(self._what)
