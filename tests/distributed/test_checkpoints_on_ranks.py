"""How runs use checkpoints: with other numbers of ranks, with damaged ones, on a full disk."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from ranks import OWN_NAMESPACE, read_metrics, run, run_program, started, wait_for_step
from reference import NUM_SAMPLES, NUM_STEPS, reference_settings
from run_states import assert_same_end

from cogvlm_ft.checkpoints.checkpoint import list_checkpoints
from cogvlm_ft.checkpoints.consolidate import open_weights
from cogvlm_ft.checkpoints.slices import rank_file

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("shared runs")]
LIMITED = Path(__file__).with_name("limited.py")


def settings(shards: Path, start_model: Path, output_dir: Path, *changes: str) -> list[str]:
    """Return the reference run's settings with one evaluation, at the end."""
    rare = ["evaluate.every_epochs=100", "evaluate.before_training=false"]
    return reference_settings(shards, start_model, output_dir, *rare, *changes)


def losses(run_folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run_folder, "train")]


def test_other_numbers_of_ranks_continue_the_same_run(
    reference_run: Path, shards: Path, start_model: Path, tmp_path: Path
) -> None:
    arguments = ["launch/train.py", *settings(shards, start_model, tmp_path / "run")]
    done = 0
    for world_size, micro_batch_size in ((2, 6), (4, 3), (1, 12)):
        own = f"train.micro_batch_size={micro_batch_size}"
        with started([*arguments, own], world_size, tmp_path / "logs") as ranks:
            wait_for_step(tmp_path / "run", done + 1, ranks)
            ranks.processes[-1].send_signal(signal.SIGTERM)
            assert ranks.wait() == [0] * world_size, ranks.output()
        done = read_metrics(tmp_path / "run", "train")[-1]["step"]
        assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == f"step-{done:08d}"
    assert done < NUM_STEPS
    run([*arguments, "train.micro_batch_size=4"], 3, tmp_path / "logs")
    assert losses(tmp_path / "run") == pytest.approx(losses(reference_run), rel=1e-5)
    assert_same_end(tmp_path / "run", reference_run, tolerance=1e-5)
    assert keys_by_epoch(tmp_path / "run") == keys_by_epoch(reference_run)


def keys_by_epoch(run_folder: Path) -> dict[int, Counter]:
    """Count how often each sample was seen; a whole epoch sees each once."""
    seen: dict[int, Counter] = {}
    for path in (run_folder / "sample_losses").glob("*.jsonl"):
        for row in map(json.loads, path.read_text().splitlines()):
            seen.setdefault(row["epoch"], Counter())[row["key"]] += 1
    assert set(seen[0].values()) == set(seen[1].values()) == {1}
    assert len(seen[0]) == len(seen[1]) == NUM_SAMPLES
    return seen


def test_a_damaged_newest_checkpoint_is_skipped(
    reference_run: Path, shards: Path, start_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(reference_run, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    file = checkpoints / f"step-{NUM_STEPS:08d}" / rank_file(1)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    output = run(["launch/train.py", *settings(shards, start_model, tmp_path / "run")], 2, tmp_path / "logs")
    assert "step-00000010 is corrupt and skipped: ranks/rank-00001.safetensors is not what was written" in output
    assert "resuming from" in output
    assert "step-00000009 (step 9)" in output
    assert losses(tmp_path / "run") == losses(reference_run)
    assert_same_end(tmp_path / "run", reference_run)
    assert (checkpoints / f"damaged-step-{NUM_STEPS:08d}").is_dir()


def test_another_model_is_named(reference_run: Path, shards: Path, start_model: Path, tmp_path: Path) -> None:
    shutil.copytree(reference_run, tmp_path / "run")
    arguments = [*settings(shards, start_model, tmp_path / "run"), "model.image_size=84"]
    with started(["launch/train.py", *arguments], 1, tmp_path / "logs") as ranks:
        assert ranks.wait() == [2]
        assert "position_embedding.weight: found (17, 45), expected (37, 45)" in ranks.output()


@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_a_full_disk_leaves_what_was_saved(
    on_error: str, reference_run: Path, shards: Path, start_model: Path, tmp_path: Path
) -> None:
    """Put the run folder on a real file system with room for three checkpoints but not for a fourth."""
    size = sum(file.stat().st_size for file in list_checkpoints(reference_run / "checkpoints")[-1].rglob("*"))
    disk = tmp_path / "disk"
    disk.mkdir()
    more = ["checkpoint.every_steps=2", "checkpoint.keep_last=9", f"checkpoint.on_error={on_error}"]
    if subprocess.run(["unshare", "--map-root-user", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("mount namespaces are not allowed here")
    mount = f'mount -t tmpfs -o size={int(size * 3.5)} tmpfs "{disk}"'
    program = ["launch/train.py", *settings(shards, start_model, disk / "run"), *more]
    done = run_program([OWN_NAMESPACE, mount, f'cp -r "{disk}/run" "{tmp_path}"', *program])
    # The last state cannot be saved either, so both end with an error; one of them after all its steps.
    assert done.returncode == 2, done.stdout + done.stderr
    assert "could not be saved in" in done.stderr
    assert "No space left on device" in done.stderr
    assert "Earlier ones are unchanged" in done.stderr
    assert len(losses(tmp_path / "run")) == (NUM_STEPS if on_error == "continue" else 6)
    saved = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [path.name for path in saved] == ["step-00000002", "step-00000003", "step-00000004"]
    assert open_weights(saved[-1])
    assert not list((tmp_path / "run" / "checkpoints").glob(".tmp-*"))


def test_a_write_that_fails_half_way_leaves_nothing_and_the_run_continues(
    shards: Path, start_model: Path, tmp_path: Path
) -> None:
    """Fail as a quota does, which the free space does not show: here by a limit on the size of a file."""
    more = ["checkpoint.every_steps=4", "checkpoint.on_error=continue"]
    done = run_program([LIMITED, "FSIZE", 1000 << 10, *settings(shards, start_model, tmp_path / "run"), *more])
    assert done.returncode == 2, done.stdout + done.stderr
    assert "rank 0: [Errno 27] File too large" in done.stderr
    assert "training continues, as checkpoint.on_error=continue" in done.stderr
    assert f"the last state, that of step {NUM_STEPS}, could not be saved" in done.stderr
    assert len(losses(tmp_path / "run")) == NUM_STEPS
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_trouble_of_rank_0_alone_ends_every_rank(shards: Path, start_model: Path, tmp_path: Path) -> None:
    """Rank 0 finds a file where the folder should be; the others would wait for it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("not a folder")
    with started(["launch/train.py", *settings(shards, start_model, tmp_path / "run")], 2, tmp_path / "logs") as ranks:
        assert ranks.wait(timeout_s=90) == [2, 2], ranks.output()
        assert "File exists" in ranks.output()
    assert (tmp_path / "run" / "checkpoints").read_text() == "not a folder"
