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
from annotation_samples import WITNESS, Parts, Sample, candidates_of, notes_of, problems_of, samples
from folder_samples import folder_samples
from mutate import TEXTS, cpu_limit, deepened, mutate_json, mutate_text
from PIL import Image
from scaling import scaled

from cogvlm_ft.data.index import load_index
from cogvlm_ft.data.mentions import mentions_colour, mentions_place
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.data.record import box_defect, record_from_json, record_to_json
from cogvlm_ft.errors import DataError
from cogvlm_ft.grounding.boxes import parse_boxes
from cogvlm_ft.shards.build import BuildSettings, build
from cogvlm_ft.shards.formats import FORMATS, recognise_format
from cogvlm_ft.shards.negatives import NegativeSettings
from cogvlm_ft.shards.packing.candidates import Problem
from cogvlm_ft.shards.packing.checks import check_candidate
from cogvlm_ft.shards.packing.decisions import part_ids
from cogvlm_ft.shards.packing.exif import EXIF_MODES
from cogvlm_ft.shards.packing.splits import key_of
from cogvlm_ft.shards.packing.tar_writing import problem_row, to_json_bytes
from cogvlm_ft.shards.packing.verify import VERIFY
from cogvlm_ft.shards.review import annotated_items, review

NUM_READ, NUM_BUILT, NUM_REVIEWED = max(30, scaled(120)), scaled(30), scaled(10)  # of each sample
NUM_DECISIONS = scaled(150)
SECONDS = 10.0  # of computing, for an input that takes milliseconds
SAMPLES = {**samples(), **folder_samples()}

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
    assert outcomes["problems"] > NUM_READ / 8


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
    num_images = sample.num_images(data)
    if num_images is not None:
        num_joined = sum(problem.reason == "image_listed_again" for problem in notes_of(parts))
        assert num_lost_when_read(parts) + len(candidates_of(parts)) + num_joined == num_images


def num_lost_when_read(parts: Parts) -> int:
    """Samples of which the reader makes no candidate."""
    return sum(isinstance(part, Problem) and part.level == "sample" for part in parts)


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
    assert problem.level in ("sample", "target", "box", "turn", "note") and problem.reason and problem.detail
    row = json.loads(to_json_bytes(problem_row(problem)))
    assert row["reason"] == problem.reason


@pytest.mark.parametrize("name", SAMPLES)
def test_whole_builds(name: str, tmp_path: Path) -> None:
    sample = SAMPLES[name]()
    place = Place(tmp_path, sample)
    path = place.annotations / sample.annotations
    for number in range(NUM_BUILT):
        files = sample.mutated(random.Random(f"build {name} {number}"))
        place.write(files)
        settings = BuildSettings(
            sample.format,
            place.images,
            path,
            val_fraction=0.5,
            verify=VERIFY[number % 2],
            exif=EXIF_MODES[number % 3],
            max_side=200 if number % 5 == 0 else None,
            negatives=NegativeSettings(0.3) if number % 4 else None,
        )
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
    assert num_samples + lost == len(candidates_of(parts)) + num_lost_when_read(parts)
    assert index["rejected"] == dict(sorted(Counter(row["reason"] for row in rows).items()))
    notes = [json.loads(line) for line in (out / "notes.jsonl").read_bytes().split(b"\n")[:-1]]
    assert index["notes"] == dict(sorted(Counter(row["reason"] for row in notes).items()))
    assert all(row["level"] == "note" for row in notes) and all(row["level"] != "note" for row in rows)
    assert len(rows) >= len(problems_of(parts)) and len(notes) >= len(notes_of(parts))


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


@pytest.mark.parametrize("name", [name for name in SAMPLES if name.split()[0] not in ("voc", "cvat", "yolo", "csv")])
def test_values_nested_about_as_deep_as_python_can_read(name: str, tmp_path: Path) -> None:
    """Where reading them just works, and printing them in a message may not."""
    sample = SAMPLES[name]()
    place = Place(tmp_path, sample)
    files = sample.mutated(random.Random(0))
    value = sample.files[sample.changed]
    for depth in range(900, 1000, 3):
        rng = random.Random(f"deep {name} {depth}")
        data = deepened(rng, value[0] if sample.changed.endswith(".jsonl") else value, depth)
        place.write({**files, sample.changed: data})
        with cpu_limit(SECONDS), explained(name, depth, data):
            try:
                parts = list(FORMATS[sample.format].read(place.annotations / sample.annotations, place.images))
            except DataError as error:
                assert str(error)
                continue
            _check_parts(place, parts, VERIFY[0], Counter(), has_witness=False)


@pytest.mark.parametrize("number", range(len(TEXTS)))
def test_odd_texts_in_every_field_take_no_time(number: int, tmp_path: Path) -> None:
    text, box = TEXTS[number], [1, 2, 30, 20]
    target = {"phrase": text, "boxes": [box], "description": text}
    talk = [{"role": "user", "content": f"<image>{text}"}, {"role": "assistant", "content": text}]
    rows: dict[str, list[Any]] = {
        "jsonl": [
            {"image": "a.jpg", "targets": [target], "turns": [{"prompt": text, "answer": text}]},
            {"image": "a.jpg", "key": text, "targets": [target]},
            {"image": text, "targets": [target]},
            {"image": "b.jpg", "Prompt": text, "Label": text},
        ],
        "swift": [
            {"messages": talk, "images": ["a.jpg"]},
            {"query": f"<ref>{text}</ref>", "response": "<box>(1,2),(3,4)</box>", "images": ["b.jpg"]},
            {"query": "Look at <ref-object>", "response": "Yes.", "images": ["b.jpg"], "objects": text},
        ],
        "odvg": [{"filename": "a.jpg", "detection": {"instances": [{"bbox": box, "category": text}]}}],
    }
    place = Place(tmp_path, SAMPLES["jsonl"]())
    good: dict[str, Any] = {
        "jsonl": {"image": "witness.jpg", "targets": [{**target, "phrase": "a", "description": None}]}
    }
    good["swift"] = {"query": "?", "response": "!", "images": ["witness.jpg"]}
    good["odvg"] = {"filename": "witness.jpg", "detection": {"instances": [{"bbox": box, "category": "a"}]}}
    for name, values in rows.items():
        data = "\n".join(json.dumps(value) for value in [*values, good[name]]).encode()
        place.write({"a.jsonl": data})
        path = place.annotations / "a.jsonl"
        settings = BuildSettings(name, place.images, path, val_fraction=0.5, negatives=NegativeSettings(0.5))
        with cpu_limit(SECONDS), explained(name, number, data):
            build(settings, tmp_path / name, num_workers=1)
            parts = list(FORMATS[name].read(path, place.images))
            _check_build(tmp_path / name, parts)
            assert not any(place.secret in tar.read_bytes() for tar in (tmp_path / name).glob("*.tar"))
            if name == "jsonl":  # a review is the same for every format
                report = review(annotated_items(name, path, place.images), name, tmp_path / "review").report
                _check_review(tmp_path / "review", report, parts)
    with cpu_limit(SECONDS):
        parse_boxes(text), mentions_place(text), mentions_colour(text)


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_decisions(kind: str, tmp_path: Path) -> None:
    """Every candidate stays, or is reported; a decision that is no decision is refused."""
    sample = SAMPLES["jsonl"]()
    place = Place(tmp_path, sample)
    place.write({"a.jsonl": b"\n".join(json.dumps(row).encode() for row in sample.files["a.jsonl"])})
    parts = list(FORMATS["jsonl"].read(place.annotations / "a.jsonl", place.images))
    ids = [part_ids(part) for part in candidates_of(parts)]
    rows = [
        {"id": ids[0].boxes[0][0], "decision": "drop"},
        {"id": ids[0].targets[1], "decision": "edit", "phrase": "一只猫", "language": "zh", "boxes": [[1, 2, 30, 40]]},
        {"id": ids[0].turns[0] + ".bad_box_text", "decision": "edit", "answer": "A dog."},
        {"id": ids[1].sample, "decision": "drop", "note": "blurred"},
        {"id": ids[1].targets[0], "decision": "accept"},
    ]
    outcomes: Counter[str] = Counter()
    for number in range(NUM_DECISIONS):
        rng = random.Random(f"decisions {kind} {number}")
        lines = [
            "id,decision,phrase,boxes",
            *(f"{row['id']},{row['decision']},{row.get('phrase', '')}," for row in rows),
        ]
        data = mutate_json(rng, {"decisions": rows}) if kind == "json" else mutate_text(rng, "\n".join(lines).encode())
        path = tmp_path / f"decisions.{kind}"
        path.write_bytes(data)
        settings = BuildSettings("jsonl", place.images, place.annotations / "a.jsonl", val_fraction=0.0, decisions=path)
        with cpu_limit(SECONDS), explained(kind, number, data):
            try:
                build(settings, tmp_path / "out", num_workers=1, overwrite=True)
            except DataError as error:
                assert path.name in str(error)
                outcomes["refused"] += 1
                continue
        found = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_bytes().split(b"\n")[:-1]]
        lost = sum(row["level"] == "sample" and row["reason"] != "decision_fits_nothing" for row in found)
        num_samples = json.loads((tmp_path / "out" / "index.json").read_bytes())["splits"]["train"]["num_samples"]
        assert num_samples + lost == len(parts)
        outcomes["built"] += 1
    assert min(outcomes["built"], outcomes["refused"]) >= NUM_DECISIONS // 30


@pytest.mark.parametrize("name", FORMATS)
def test_other_things_where_a_file_or_folder_is_wanted(name: str, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "folder" / "a.jpg").mkdir(parents=True)
    (tmp_path / "empty").write_bytes(b"")
    for path in (tmp_path / "folder", tmp_path / "empty"):
        settings = BuildSettings(name, tmp_path / "images", path)
        with cpu_limit(SECONDS), pytest.raises(DataError):
            build(settings, tmp_path / "out", num_workers=1, overwrite=True)
        with pytest.raises(DataError, match="is of no known format"):
            recognise_format(path)


def test_file_names_that_are_no_text(tmp_path: Path) -> None:
    name = os.fsdecode(b"a\xff")
    place = Place(tmp_path, SAMPLES["jsonl"]())
    (place.images / f"{name}.jpg").write_bytes(_jpeg((40, 30), "gray"))
    talk = {"conversations": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
    row = {"image": "a.jpg", "targets": [{"phrase": "dog", "boxes": [[1, 2, 3, 4]]}]}
    files = {f"{name}.jsonl": row, f"{name}/labels_zh/{name}.json": talk, f"{name}/labels_zh/b.json": talk}
    place.write({path: json.dumps(value).encode() for path, value in files.items()})
    for name_of_format, path, num_samples in (("jsonl", f"{name}.jsonl", 1), ("cogvlm-sft", name, 2)):
        settings = BuildSettings(name_of_format, place.images, place.annotations / path, val_fraction=0.0)
        build(settings, tmp_path / name_of_format, num_workers=1)
        reader = ShardReader(load_index(tmp_path / name_of_format, "train"))
        assert len(reader) == num_samples
        assert all("\\udcff" in reader.read(i).record.source for i in range(num_samples))
        reader.close()
        items = annotated_items(name_of_format, place.annotations / path, place.images)
        assert review(items, path, tmp_path / "review").report["counts"]["samples"] == num_samples


class explained:
    """Says which input it was when something else than a DataError comes out."""

    def __init__(self, name: str, number: int, data: bytes) -> None:
        self._what = f"{name}, input {number}, {len(data)} bytes: {data[:2000]!r}"

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            error.add_note(self._what)
