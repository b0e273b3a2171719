"""Candidates on disk: the same ones come back, in the order of the shards, with little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from photo_builds import image_bytes

from cogvlm_ft.grounding.targets import Target, Turn
from cogvlm_ft.shards.packing.candidates import Candidate, Problem
from cogvlm_ft.shards.packing.splits import shuffle_rank
from cogvlm_ft.shards.packing.staging import Spool, read_note, read_slice

ROOT = Path(__file__).parents[3]
FULL = Candidate(
    image="一/\udcffa.jpg",
    key="mine",
    source="x.json:1 \udcff",
    targets=(
        Target("狗", "zh", ((0.1, 1e-9, 1e300, float("inf")), (-1.0, 2.0, 3.0, 4.0)), "一只狗"),
        Target("cat", "en", ()),
    ),
    turns=(
        Turn("p\n", "q"),
        Turn("p", "q", Target("a", "en", ((1.0, 2.0, 3.0, 4.0),)), (("p1", "a1"), ("p2", "a2")), False, 3, "steps"),
    ),
    stated_size_px=(640, 480),
    units="unit",
    embedded_in=Path("a b/x.json"),
    problems=(Problem("box", "zero_area", "detail", "source"),),
)


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool.sqlite", seed=3)


def content_of(
    spool: Spool, val_fraction: float = 0.0, samples_per_shard: int = 100
) -> dict[str, list[tuple[str, Candidate]]]:
    slices = spool.slices(val_fraction=val_fraction, samples_per_shard=samples_per_shard)
    spool.finish()
    return {part.name: [(key, candidate) for key, candidate, _ in read_slice(spool.path, part)] for part in slices}


def test_every_field_comes_back(spool: Spool) -> None:
    empty = Candidate("b.jpg", None, "")
    for full, plain in ((FULL, empty), (FULL.turns[1], Turn("", "")), (FULL.targets[0], Target("", "", ()))):
        assert all(getattr(full, field.name) != getattr(plain, field.name) for field in fields(plain)), (
            "not all is tried"
        )
    spool.add(FULL)
    spool.add(empty)
    found = dict(content_of(spool)["train-000000"])
    assert found == {"mine": FULL, "b": empty}
    assert isinstance(found["mine"].targets[0].boxes_xyxy[0], tuple)


def test_the_order_is_by_image_and_then_by_key(spool: Spool) -> None:
    candidates = [Candidate(f"{i % 10}.jpg", f"key{i:02d}", "") for i in range(30)]
    for candidate in reversed(candidates):
        spool.add(candidate)
    found = content_of(spool, val_fraction=0.25, samples_per_shard=7)
    images = sorted({candidate.image for candidate in candidates}, key=lambda image: shuffle_rank(image, 3))
    wanted = sorted(candidates, key=lambda candidate: (images.index(candidate.image), candidate.key))
    assert [len(part) for part in found.values()] == [7, 7, 7, 3, 6]
    in_order = [candidate for name in sorted(found, reverse=True) for _, candidate in found[name]]
    assert in_order[:6] == wanted[:6]  # val: 2 of 10 images
    assert [candidate for name in sorted(found)[:4] for _, candidate in found[name]] == wanted[6:]


@pytest.mark.parametrize(("val_fraction", "num_val"), [(0.0, 0), (0.04, 0), (0.5, 5), (0.99, 10)])
def test_the_share_of_val_is_rounded(spool: Spool, val_fraction: float, num_val: int) -> None:
    for i in range(10):
        spool.add(Candidate(f"{i}.jpg", None, ""))
    slices = spool.slices(val_fraction=val_fraction, samples_per_shard=100)
    assert sum(len(part) for part in slices if part.name.startswith("val")) == num_val
    assert sum(len(part) for part in slices) == 10


def test_a_taken_key_is_lost_unless_it_was_made_from_another_image(spool: Spool) -> None:
    first, problem = Candidate("a.jpg", None, "1"), Problem("box", "crowd", "d", "s")
    parts = [
        first,
        Candidate("a.png", None, "2"),
        Candidate("a.jpg", None, "3", problems=(problem,)),
        Candidate("a.png", None, "4"),
        Candidate("b.jpg", "a", "5"),
        problem,
    ]
    for part in parts:
        spool.add(part)
    keys = [key for key, _ in content_of(spool)["train-000000"]]
    assert len(keys) == 2 and "a" in keys
    found = list(spool.problems())
    assert found[0] == (problem, None)  # what belongs to no candidate comes first
    assert found[1] == (problem, "a.jpg")
    assert [(lost.reason, lost.source, image) for lost, image in found[2:]] == [
        ("duplicate_key", "3", "a.jpg"),
        ("duplicate_key", "4", "a.png"),
        ("duplicate_key", "5", "b.jpg"),
    ]
    assert "taken by a.png (2)" in found[3][0].detail


def test_what_else_is_said_about_an_image(spool: Spool) -> None:
    parts = [Candidate(f"{i % 3}.jpg", f"k{i}", str(i)) for i in range(9)]
    duplicate, dropped = Candidate("0.jpg", "k1", "duplicate"), Candidate("2.jpg", "k99", "dropped")
    for part in (*parts, duplicate):
        spool.add(part)
    spool.remember(dropped)
    slices = spool.slices(val_fraction=0.0, samples_per_shard=2)  # images are cut in two
    remembered = {kept[0].image: others for kept, others in spool.photos()}
    assert remembered == {"0.jpg": [duplicate], "1.jpg": [], "2.jpg": [dropped]}
    spool.note("n", {"a": [1]})
    spool.finish()
    assert read_note(spool.path, "n") == {"a": [1]}
    found = {row.candidate: row.others for part in slices for row in read_slice(spool.path, part, with_others=True)}
    assert set(found) == set(parts)
    for candidate, others in found.items():
        wanted = {part for part in (*parts, duplicate, dropped) if part.image == candidate.image} - {candidate}
        assert len(others) == len(wanted) and set(others) == wanted


def test_the_hash_is_of_everything(tmp_path: Path) -> None:
    def sha256(*parts: Candidate | Problem) -> str:
        spool = Spool(tmp_path / "spool.sqlite", seed=0)
        for part in parts:
            spool.add(part)
        spool.close()
        return spool.sha256

    problem = FULL.problems[0]
    variants = [(), (FULL,), (problem,), (FULL, problem), (replace(FULL, source="x"),), (FULL, FULL)]
    assert len({sha256(*parts) for parts in variants}) == len(variants)
    assert sha256(FULL, problem) == sha256(FULL, problem)


def test_what_a_killed_build_left_is_thrown_away(tmp_path: Path) -> None:
    path = tmp_path / "spool.sqlite"
    for rubbish in (b"", b"no database", b"SQLite format 3\0" + bytes(5000)):
        path.write_bytes(rubbish)
        spool = Spool(path, seed=0)
        spool.add(FULL)
        assert len(content_of(spool)["train-000000"]) == 1
        spool.close()
        assert not path.exists()


def peak_of_build(folder: Path, num_records: int) -> int:
    """MiB of a build of so many records, in a process of its own."""
    folder.mkdir()
    (folder / "a.png").write_bytes(image_bytes(8, 8, image_format="PNG"))
    line = {
        "image": "a.png",
        "targets": [{"phrase": "red cat", "boxes": [[1, 2, 7, 8]]}, {"phrase": "dog", "boxes": []}],
    }
    with (folder / "x.jsonl").open("w") as file:
        for i in range(num_records):
            file.write(json.dumps({**line, "key": f"k{i}"}) + "\n")
    code = (
        "import resource, sys; from pathlib import Path; from cogvlm_ft.shards.build import BuildSettings, build; "
        f"p = Path({str(folder)!r}); build(BuildSettings('jsonl', p, p / 'x.jsonl'), p / 'out', num_workers=1); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    index = json.loads((folder / "out" / "index.json").read_bytes())
    assert sum(split["num_samples"] for split in index["splits"].values()) == num_records
    return int(done.stdout) >> 10


def test_five_times_the_records_need_no_more_memory(tmp_path: Path) -> None:
    small, large = (peak_of_build(tmp_path / str(number), number) for number in (1_000, 5_000))
    assert large - small < 12, f"{small} MiB for 1,000 records, {large} MiB for 5,000"


@pytest.mark.slow
def test_a_hundred_thousand_records_need_no_more_memory(tmp_path: Path) -> None:
    small, large = (peak_of_build(tmp_path / str(number), number) for number in (20_000, 100_000))
    assert large - small < 32, f"{small} MiB for 20,000 records, {large} MiB for 100,000"
