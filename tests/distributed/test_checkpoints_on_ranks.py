"""What a run makes of its checkpoints: on other numbers of ranks, with damaged ones, on a full disk."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from ranks import REPOSITORY, read_metrics, run, started, wait_for_step

from cogvlm_ft.checkpoints.checkpoint import list_checkpoints
from cogvlm_ft.checkpoints.consolidate import open_weights
from cogvlm_ft.checkpoints.slices import MOMENTS, open_slices, rank_file
from cogvlm_ft.model.loading import read_whole

pytestmark = pytest.mark.slow
NUM_STEPS = 13

SAMPLE_LOSSES = "sample_losses"


def settings(shards: Path, start_model: Path, output_dir: Path) -> list[str]:
    """Three steps an epoch; the global batch can be shared by 1, 2, 3 and 4 ranks."""
    return [
        f"output_dir={output_dir}",
        f"model.path={start_model}",
        f"data.shards={shards}",
        "data.num_workers=0",
        f"train.max_steps={NUM_STEPS}",
        "train.epochs=10",
        "train.global_batch_size=12",
        "train.micro_batch_size=1",
        "train.lr=1e-3",
        "train.eps=1e-6",  # as in test_training.py
        "train.patience=null",
        "evaluate.every_epochs=100",
        "evaluate.before_training=false",
        "evaluate.max_new_tokens=4",
        "tracking.mode=disabled",
    ]


@pytest.fixture(scope="module")
def reference_run(shards: Path, start_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Undisturbed on two ranks, with a checkpoint of every second step."""
    folder = tmp_path_factory.mktemp("reference")
    kept = ["checkpoint.every_steps=2", "checkpoint.keep_last=9"]
    run(["launch/train.py", *settings(shards, start_model, folder / "run"), *kept], 2, folder / "logs")
    return folder / "run"


def last_state(run_folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the last checkpoint, whole."""
    checkpoint = list_checkpoints(run_folder / "checkpoints")[-1]
    assert checkpoint.name == f"step-{NUM_STEPS:08d}"
    tensors = {f"weight/{name}": tensor for name, tensor in open_weights(checkpoint).items()}
    for moment in MOMENTS:
        tensors |= {f"{moment}/{name}": tensor for name, tensor in open_slices(checkpoint, moment).items()}
    return {key: read_whole(tensor, torch.float32) for key, tensor in tensors.items()}


def assert_same_end(found: Path, wanted: Path, tolerance: float = 0.0) -> None:
    a, b = last_state(found), last_state(wanted)
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=tolerance, rtol=0, msg=lambda m, k=key: f"{k}: {m}")


def losses(run_folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run_folder, "train")]


def test_other_numbers_of_ranks_go_on_with_the_same_training(
    reference_run: Path, shards: Path, start_model: Path, tmp_path: Path
) -> None:
    arguments = ["launch/train.py", *settings(shards, start_model, tmp_path / "run")]
    done = 0
    for world_size in (2, 4, 1):
        with started(arguments, world_size, tmp_path / "logs") as ranks:
            wait_for_step(tmp_path / "run", done + 1, ranks)
            ranks.processes[-1].send_signal(signal.SIGTERM)
            assert ranks.wait() == [0] * world_size, ranks.output()
        done = read_metrics(tmp_path / "run", "train")[-1]["step"]
        assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == f"step-{done:08d}"
    assert done < NUM_STEPS
    run(arguments, 3, tmp_path / "logs")
    assert losses(tmp_path / "run") == pytest.approx(losses(reference_run), rel=1e-5)
    assert_same_end(tmp_path / "run", reference_run, tolerance=1e-5)
    assert keys_by_epoch(tmp_path / "run") == keys_by_epoch(reference_run)


def keys_by_epoch(run_folder: Path) -> dict[int, Counter]:
    """How often each sample was seen; a whole epoch sees each once."""
    seen: dict[int, Counter] = {}
    for path in (run_folder / SAMPLE_LOSSES).glob("*.jsonl"):
        for row in map(json.loads, path.read_text().splitlines()):
            seen.setdefault(row["epoch"], Counter())[row["key"]] += 1
    assert set(seen[0].values()) == set(seen[1].values()) == {1}
    assert len(seen[0]) == len(seen[1]) == 33
    return seen


def test_a_damaged_newest_checkpoint_is_passed_over(
    reference_run: Path, shards: Path, start_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(reference_run, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    file = checkpoints / f"step-{NUM_STEPS:08d}" / rank_file(1)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    output = run(["launch/train.py", *settings(shards, start_model, tmp_path / "run")], 2, tmp_path / "logs")
    assert "step-00000013 is damaged and passed over: ranks/rank-00001.safetensors is not what was written" in output
    assert "resuming from" in output
    assert "step-00000012 (step 12)" in output
    assert losses(tmp_path / "run") == losses(reference_run)
    assert_same_end(tmp_path / "run", reference_run)
    assert (checkpoints / f"damaged-step-{NUM_STEPS:08d}").is_dir()


def test_written_before_training_goes_on_it_is_the_same_checkpoint(
    reference_run: Path, shards: Path, start_model: Path, tmp_path: Path
) -> None:
    more = ["checkpoint.background=false", "checkpoint.every_steps=3"]
    run(["launch/train.py", *settings(shards, start_model, tmp_path / "run"), *more], 2, tmp_path / "logs")
    assert_same_end(tmp_path / "run", reference_run)


def test_another_model_is_named(reference_run: Path, shards: Path, start_model: Path, tmp_path: Path) -> None:
    shutil.copytree(reference_run, tmp_path / "run")
    arguments = [*settings(shards, start_model, tmp_path / "run"), "model.image_size=84"]
    with started(["launch/train.py", *arguments], 1, tmp_path / "logs") as ranks:
        assert ranks.wait() == [2]
        assert "position_embedding.weight: found (17, 45), wanted (37, 45)" in ranks.output()


@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_a_full_disk_leaves_what_was_saved(
    on_error: str, reference_run: Path, shards: Path, start_model: Path, tmp_path: Path
) -> None:
    """A real one: the run folder is on a file system with room for three checkpoints but not for a fourth."""
    size = sum(file.stat().st_size for file in list_checkpoints(reference_run / "checkpoints")[-1].rglob("*"))
    disk = tmp_path / "disk"
    disk.mkdir()
    more = ["checkpoint.every_steps=2", "checkpoint.keep_last=9", f"checkpoint.on_error={on_error}"]
    command = [sys.executable, "launch/train.py", *settings(shards, start_model, disk / "run"), *more]
    mount = f'mount -t tmpfs -o size={int(size * 3.5)} tmpfs "{disk}"'
    script = f'{mount} && "$@"; code=$?; cp -r "{disk}/run" "{tmp_path}"; exit $code'
    outside = ["unshare", "--map-root-user", "--mount", "bash", "-c", script, "-"]
    if subprocess.run([*outside[:3], "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody make a mount namespace: no small disk to fill")
    done = subprocess.run([*outside, *command], cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    # The last state cannot be saved either, so both end with an error; one of them after all its steps.
    assert done.returncode == 2, done.stdout + done.stderr
    assert "could not be saved in" in done.stderr
    assert "No space left on device" in done.stderr
    assert "Those before are untouched" in done.stderr
    assert len(losses(tmp_path / "run")) == (NUM_STEPS if on_error == "continue" else 6)
    saved = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [path.name for path in saved] == ["step-00000002", "step-00000003", "step-00000004"]
    assert open_weights(saved[-1])
    assert not list((tmp_path / "run" / "checkpoints").glob(".tmp-*"))


def test_a_write_that_fails_half_way_leaves_nothing_and_the_run_goes_on(
    shards: Path, start_model: Path, tmp_path: Path
) -> None:
    """As a quota does it, which no look at the free space foretells: here a limit on the size of a file."""
    more = ["checkpoint.every_steps=4", "checkpoint.on_error=continue"]
    command = [sys.executable, "launch/train.py", *settings(shards, start_model, tmp_path / "run"), *more]
    limited = ["bash", "-c", 'ulimit -f 1000 && exec "$@"', "-", *command]
    done = subprocess.run(limited, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "rank 0: [Errno 27] File too large" in done.stderr
    assert "training goes on, as checkpoint.on_error=continue" in done.stderr
    assert f"the last state, that of step {NUM_STEPS}, could not be saved" in done.stderr
    assert len(losses(tmp_path / "run")) == NUM_STEPS
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_trouble_of_rank_0_alone_ends_every_rank(shards: Path, start_model: Path, tmp_path: Path) -> None:
    """The others would wait for it. Here a file lies where the folder should be."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("not a folder")
    with started(["launch/train.py", *settings(shards, start_model, tmp_path / "run")], 2, tmp_path / "logs") as ranks:
        assert ranks.wait(timeout_s=90) == [2, 2], ranks.output()
        assert "File exists" in ranks.output()
    assert (tmp_path / "run" / "checkpoints").read_text() == "not a folder"
