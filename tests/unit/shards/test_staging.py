"""Candidates on disk: the same ones come back, in the order of the shards, with little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from photo_builds import image_bytes
from scaling import SCALE, scaled

from cogvlm_ft.grounding.targets import Target, Turn
from cogvlm_ft.shards.packing.candidates import Candidate, Problem
from cogvlm_ft.shards.packing.split_plan import SplitRules
from cogvlm_ft.shards.packing.splits import shuffle_rank
from cogvlm_ft.shards.packing.staging import StagingDatabase, read_staged_samples, read_value

ROOT = Path(__file__).parents[3]
FULL = Candidate(
    image="一/\udcffa.jpg",
    key="mine",
    source="x.json:1 \udcff",
    targets=(
        Target("狗", "zh", ((0.1, 1e-9, 1e300, float("inf")), (-1.0, 2.0, 3.0, 4.0)), "一只狗", (("en", "dog"),)),
        Target("cat", "en", ()),
    ),
    turns=(
        Turn("p\n", "q"),
        Turn("p", "q", Target("a", "en", ((1.0, 2.0, 3.0, 4.0),)), (("p1", "a1"), ("p2", "a2")), False, 3, "steps"),
    ),
    stated_size_px=(640, 480),
    units="unit",
    unit_basis="documented",
    embedded_in=Path("a b/x.json"),
    problems=(Problem("box", "zero_area", "detail", "source"),),
    image_hint="a hint",
    split="test",
    written_as="sizes",
    lists_all=False,
)


@pytest.fixture
def staging(tmp_path: Path) -> StagingDatabase:
    return StagingDatabase(tmp_path / "staging.sqlite", seed=3)


def content_of(
    staging: StagingDatabase, val_fraction: float = 0.0, samples_per_shard: int = 100
) -> dict[str, list[tuple[str, Candidate]]]:
    plans, _ = staging.plan_shards(SplitRules(val_fraction), samples_per_shard=samples_per_shard)
    staging.commit()
    return {plan.name: [row[:2] for row in read_staged_samples(staging.path, plan)] for plan in plans}


def test_every_field_comes_back(staging: StagingDatabase) -> None:
    empty = Candidate("b.jpg", None, "")
    for full, plain in ((FULL, empty), (FULL.turns[1], Turn("", "")), (FULL.targets[0], Target("", "", ()))):
        assert all(getattr(full, field.name) != getattr(plain, field.name) for field in fields(plain)), (
            "not all is tried"
        )
    staging.add(FULL)
    staging.add(empty)
    found = dict(content_of(staging)["train-000000"])
    assert found == {"mine": FULL, "b": empty}
    assert isinstance(found["mine"].targets[0].boxes_xyxy[0], tuple)


def test_the_order_is_by_image_and_then_by_key(staging: StagingDatabase) -> None:
    candidates = [Candidate(f"{i % 10}.jpg", f"key{i:02d}", "") for i in range(30)]
    for candidate in reversed(candidates):
        staging.add(candidate)
    found = content_of(staging, val_fraction=0.25, samples_per_shard=7)
    images = sorted({candidate.image for candidate in candidates}, key=lambda image: shuffle_rank(image, 3))
    wanted = sorted(candidates, key=lambda candidate: (images.index(candidate.image), candidate.key))
    assert [len(part) for part in found.values()] == [7, 7, 7, 3, 6]
    in_order = [candidate for name in sorted(found, reverse=True) for _, candidate in found[name]]
    assert in_order[:6] == wanted[:6]  # val: 2 of 10 images
    assert [candidate for name in sorted(found)[:4] for _, candidate in found[name]] == wanted[6:]


@pytest.mark.parametrize(("val_fraction", "num_val"), [(0.0, 0), (0.04, 0), (0.5, 5), (0.99, 10)])
def test_the_share_of_val_is_rounded(staging: StagingDatabase, val_fraction: float, num_val: int) -> None:
    for i in range(10):
        staging.add(Candidate(f"{i}.jpg", None, ""))
    plans, _ = staging.plan_shards(SplitRules(val_fraction), samples_per_shard=100)
    assert sum(len(plan) for plan in plans if plan.name.startswith("val")) == num_val
    assert sum(map(len, plans)) == 10


def test_a_taken_key_is_lost_unless_it_was_made_from_another_image(staging: StagingDatabase) -> None:
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
        staging.add(part)
    keys = [key for key, _ in content_of(staging)["train-000000"]]
    assert len(keys) == 2 and "a" in keys
    found = list(staging.problems())
    assert found[0] == (problem, None)  # what belongs to no candidate comes first
    assert found[1] == (problem, "a.jpg")
    assert [(lost.reason, lost.source, image) for lost, image in found[2:]] == [
        ("duplicate_key", "3", "a.jpg"),
        ("duplicate_key", "4", "a.png"),
        ("duplicate_key", "5", "b.jpg"),
    ]
    assert "already used by a.png (2)" in found[3][0].detail


def test_what_else_is_said_about_an_image(staging: StagingDatabase) -> None:
    parts = [Candidate(f"{i % 3}.jpg", f"k{i}", str(i)) for i in range(9)]
    duplicate, dropped = Candidate("0.jpg", "k1", "duplicate"), Candidate("2.jpg", "k99", "dropped")
    for part in (*parts, duplicate):
        staging.add(part)
    staging.add_context(dropped)
    plans, _ = staging.plan_shards(SplitRules(0.0), samples_per_shard=2)  # images are cut in two
    context = {kept[0].image: others for kept, others in staging.by_image()}
    assert context == {"0.jpg": [duplicate], "1.jpg": [], "2.jpg": [dropped]}
    staging.add_value("n", {"a": [1]})
    staging.commit()
    assert read_value(staging.path, "n") == {"a": [1]}
    rows = [row for plan in plans for row in read_staged_samples(staging.path, plan, with_others=True)]
    found = {row.candidate: row.others for row in rows}
    assert set(found) == set(parts)
    for candidate, others in found.items():
        wanted = {part for part in (*parts, duplicate, dropped) if part.image == candidate.image} - {candidate}
        assert len(others) == len(wanted) and set(others) == wanted


def test_the_hash_is_of_everything(tmp_path: Path) -> None:
    def sha256(*parts: Candidate | Problem) -> str:
        staging = StagingDatabase(tmp_path / "staging.sqlite", seed=0)
        for part in parts:
            staging.add(part)
        staging.close()
        return staging.sha256

    problem = FULL.problems[0]
    variants = [(), (FULL,), (problem,), (FULL, problem), (replace(FULL, source="x"),), (FULL, FULL)]
    assert len({sha256(*parts) for parts in variants}) == len(variants)
    assert sha256(FULL, problem) == sha256(FULL, problem)


def test_what_a_killed_build_left_is_thrown_away(tmp_path: Path) -> None:
    path = tmp_path / "staging.sqlite"
    for rubbish in (b"", b"no database", b"SQLite format 3\0" + bytes(5000)):
        path.write_bytes(rubbish)
        staging = StagingDatabase(path, seed=0)
        staging.add(FULL)
        assert len(content_of(staging)["train-000000"]) == 1
        staging.close()
        assert not path.exists()


def peak_of_build(folder: Path, num_records: int) -> int:
    """MiB of a build of that many records, in a process of its own."""
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


@pytest.mark.slow
def test_a_hundred_thousand_records_need_no_more_memory(tmp_path: Path) -> None:
    few, many = scaled(20_000), scaled(100_000)
    small, large = (peak_of_build(tmp_path / str(number), number) for number in (few, many))
    assert large - small < max(12, 32 * SCALE), f"{small} MiB for {few} records, {large} MiB for {many}"
