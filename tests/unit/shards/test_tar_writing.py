"""The tar of a shard: the bytes that webdataset writes, the same every time, and offsets that lead to them."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from photo_builds import image_bytes
from webdataset.writer import TarWriter

from cogvlm_ft.data.record import Record, record_to_json
from cogvlm_ft.data.tars import scan_tar
from cogvlm_ft.grounding.targets import Target
from cogvlm_ft.shards.packing.candidates import Candidate, Problem
from cogvlm_ft.shards.packing.checks import CheckedSample
from cogvlm_ft.shards.packing.split_plan import SplitRules
from cogvlm_ft.shards.packing.staging import StagingDatabase, read_staged_samples
from cogvlm_ft.shards.packing.tar_writing import (
    WriteSettings,
    _Tar,
    is_written,
    prepare_sample,
    problem_row,
    shard_paths,
    to_json_bytes,
    write_shard,
)

NAMES = ["a", "x" * 80, "照片" * 10, "é"]


@pytest.fixture
def settings(tmp_path: Path) -> WriteSettings:
    """Four photos under short, long and Chinese names."""
    for seed, name in enumerate(NAMES):
        (tmp_path / f"{name}.{'jpg' if seed % 2 else 'png'}").write_bytes(
            image_bytes(30 + seed, 20, seed, "JPEG" if seed % 2 else "PNG")
        )
    (tmp_path / "out").mkdir()
    return WriteSettings(tmp_path / "staging.sqlite", tmp_path, tmp_path / "out", max_pixels=10**6)


def candidates(settings: WriteSettings) -> list[Candidate]:
    images = [path.name for path in sorted(settings.images.glob("*.*g"))]
    target = Target("一只狗", "zh", ((1.0, 2.0, 3.0, 4.0),))
    return [Candidate(image, None, "s", (target, Target("cat", "en", ()))) for image in [*images, "gone.jpg"]]


def staged(settings: WriteSettings, parts: list[Candidate]) -> StagingDatabase:
    staging = StagingDatabase(settings.staging, seed=0)
    for part in parts:
        staging.add(part)
    return staging


def test_the_tar_has_the_bytes_that_webdataset_writes(settings: WriteSettings) -> None:
    staging = staged(settings, candidates(settings))
    [part], _ = staging.plan_shards(SplitRules(0.0), samples_per_shard=10)
    staging.commit()
    assert write_shard(part, settings) == 5 and is_written(part, settings.out)
    tar_path, offsets_path = shard_paths(part.name, settings.out)

    by_key = {staged.key: staged for staged in read_staged_samples(staging.path, part)}
    content = json.loads(offsets_path.read_bytes())
    buffer = io.BytesIO()
    with TarWriter(buffer, encoder=False, mtime=0, user="shards", group="shards", mode=0o444) as writer:
        for row in content["samples"]:
            sample, problems = prepare_sample(by_key[row["key"]], settings, Counter())
            assert sample and not problems
            writer.write({"__key__": row["key"], sample.ext: sample.image, "json": record_to_json(sample.record)})
    assert tar_path.read_bytes() == buffer.getvalue()
    entries, losses, _ = scan_tar(tar_path)
    assert not losses and [(e.key, e.ext, [e.image_offset, e.image_num_bytes]) for e in entries] == [
        (row["key"], row["ext"], row["image"]) for row in content["samples"]
    ]
    assert content["sha256"] == hashlib.sha256(buffer.getvalue()).hexdigest()
    assert content["size"] == len(buffer.getvalue())
    counts = {name: value for name, value in content.items() if name.startswith("num_")}
    assert counts == {"num_samples": 4, "num_targets": 8, "num_boxes": 4, "num_absent": 4, "num_turns": 0}
    assert [row["num_questions"] for row in content["samples"]] == [[2, 0]] * 4
    assert [row["reason"] for row in content["rejected"]] == ["missing_image"]


@pytest.mark.parametrize("name", ["a", "x" * 120, "照片" * 40])
@pytest.mark.parametrize("num_bytes", [0, 1, 511, 512, 513, 30_000])
def test_offsets_lead_to_the_members(name: str, num_bytes: int) -> None:
    image = bytes(range(256)) * (num_bytes // 256) + bytes(num_bytes % 256)
    written = []
    for _ in range(2):
        buffer = io.BytesIO()
        with _Tar(buffer) as tar:
            for key in (name, "b"):
                tar.add_sample(CheckedSample(Record(key, (4, 3), "s", (), ()), "jpg", image))
        written.append(buffer.getvalue())
    assert written[0] == written[1] and len(written[0]) % tarfile.RECORDSIZE == 0
    identity = {"sha256": hashlib.sha256(written[0]).hexdigest(), "size": len(written[0])}
    assert tar.identity() == identity
    for row in tar.samples:
        for ext, (start, size) in (("jpg", row["image"]), ("json", row["json"])):
            with tarfile.open(fileobj=io.BytesIO(written[0])) as whole:
                member = whole.getmember(f"{row['key']}.{ext}")
                assert (member.offset_data, member.size) == (start, size)
                assert (member.mtime, member.uname, member.gname, member.mode) == (0, "shards", "shards", 0o444)


@pytest.mark.slow
def test_workers_write_without_torch() -> None:
    code = (
        "import sys; from cogvlm_ft.shards.packing.workers import import_webdataset_without_torch as load; load(); "
        "from webdataset.writer import TarWriter; print('torch' in sys.modules); import torch; print(torch.ones(1))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "tensor([1.])"]


def test_a_shard_without_its_offsets_is_not_written(settings: WriteSettings) -> None:
    staging = staged(settings, candidates(settings))
    [part], _ = staging.plan_shards(SplitRules(0.0), samples_per_shard=10)
    staging.commit()
    assert not is_written(part, settings.out)
    write_shard(part, settings)
    for path in shard_paths(part.name, settings.out):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        assert not is_written(part, settings.out)
        path.write_bytes(whole)
    assert is_written(part, settings.out)


def test_a_rejection_keeps_bytes_that_are_no_text() -> None:
    row = problem_row(Problem("box", "crowd", "detail \udcff", "source"), "\udce4.jpg", "k")
    assert to_json_bytes(row) == (
        rb'{"level":"box","reason":"crowd","image":"\udce4.jpg","key":"k","source":"source","detail":"detail \udcff"}'
    )
