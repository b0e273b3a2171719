"""Checkpoint folders on disk: which count, which go, and what is said about broken ones."""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_files import SHAPES, made_tensor, write_checkpoint

from cogvlm_ft.checkpoints import reading
from cogvlm_ft.checkpoints.checkpoint import (
    STATE_FILE,
    Best,
    TrainState,
    discard_later_evaluations,
    list_checkpoints,
    newest_intact,
    prune_checkpoints,
    read_state,
    record_evaluation,
    remove_leftovers,
)
from cogvlm_ft.checkpoints.manifest import MANIFEST_FILE, find_damage
from cogvlm_ft.checkpoints.slices import MOMENTS, WEIGHT, open_slices, rank_file
from cogvlm_ft.errors import CheckpointError, ServerError
from cogvlm_ft.grounding.confidence import KeptBoxes
from cogvlm_ft.model.loading import read_whole
from cogvlm_ft.plain_files import sync_tree
from cogvlm_ft.run_folder import step_name
from cogvlm_ft.settings import CheckpointConfig

STATE = TrainState(
    step=12,
    epoch=1,
    samples_consumed=190,
    evaluated_step=10,
    kept_boxes=KeptBoxes(0.3, only_best=True),
    best=Best(value=0.5, step=10, num_since=1),
    wandb_run_id="abc",
    config_sha256="c",
    data_sha256="d",
    world_size=2,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_only_whole_checkpoints_are_listed_oldest_first(tmp_path: Path) -> None:
    for step in (20, 3, 100, 7):
        write_checkpoint(tmp_path, step)
    (tmp_path / step_name(7) / MANIFEST_FILE).unlink()
    (tmp_path / step_name(500) / "ranks").mkdir(parents=True)
    write_checkpoint(tmp_path, 200).rename(tmp_path / f".tmp-{step_name(200)}")
    write_checkpoint(tmp_path, 300).rename(tmp_path / f".tmp-old-{step_name(300)}")
    (tmp_path / "step-notes.txt").write_text("not a checkpoint")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000020", "step-00000100"]


def test_a_folder_that_is_not_there_or_empty_has_none(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path) == list_checkpoints(tmp_path / "nothing") == []


@pytest.mark.parametrize(
    ("keep_last", "best_step", "kept"),
    [
        (1, None, [5]),
        (2, None, [4, 5]),
        (2, 1, [1, 4, 5]),
        (2, 5, [4, 5]),
        (1, 3, [3, 5]),
        (2, 77, [4, 5]),
        (9, 1, [1, 2, 3, 4, 5]),
    ],
)
def test_the_newest_and_the_best_are_kept(
    tmp_path: Path, keep_last: int, best_step: int | None, kept: list[int]
) -> None:
    for step in range(1, 6):
        write_checkpoint(tmp_path, step)
    for _ in range(2):
        prune_checkpoints(tmp_path, CheckpointConfig(keep_last=keep_last), best_step)
        assert names(tmp_path) == [step_name(step) for step in kept]
        for step in kept:
            assert find_damage(tmp_path / step_name(step)) == []


def test_the_first_of_every_so_many_steps_stays_for_good(tmp_path: Path) -> None:
    """Epochs of 30 steps, and one checkpoint to keep from every 100 steps: each is pruned as soon as it may be."""
    for step in range(30, 451, 30):
        write_checkpoint(tmp_path, step)
        prune_checkpoints(tmp_path, CheckpointConfig(keep_last=1, keep_every_steps=100), best_step=None)
    assert names(tmp_path) == [step_name(step) for step in (120, 210, 300, 420, 450)]


def test_pruning_leaves_everything_else_alone(tmp_path: Path) -> None:
    for step in (1, 2):
        write_checkpoint(tmp_path, step)
    copies = [f"{step_name(1)}-good", f"{step_name(2)}.bak"]  # as users make them
    for copy, step in zip(copies, (1, 2), strict=True):
        shutil.copytree(tmp_path / step_name(step), tmp_path / copy)
    (tmp_path / step_name(0)).mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    prune_checkpoints(tmp_path, CheckpointConfig(keep_last=1, keep_every_steps=5), best_step=None)
    assert newest_intact(tmp_path) == tmp_path / step_name(2)
    assert names(tmp_path) == ["notes.txt", step_name(0), copies[0], step_name(2), copies[1]]


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1)
    write_checkpoint(tmp_path, 2).rename(tmp_path / f".tmp-{step_name(2)}")
    write_checkpoint(tmp_path, 3).rename(tmp_path / f".tmp-old-{step_name(3)}")
    (tmp_path / "notes.txt").write_text("mine")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["notes.txt", step_name(1)]
    remove_leftovers(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("state", [STATE, TrainState(), dataclasses.replace(STATE, best=None, wandb_run_id=None)])
def test_a_state_reads_back(tmp_path: Path, state: TrainState) -> None:
    path = write_checkpoint(tmp_path, state.step, state, state.world_size)
    assert read_state(path) == state


def test_an_evaluation_is_recorded_beside_its_checkpoint(tmp_path: Path) -> None:
    evaluated = dataclasses.replace(STATE, evaluated_step=STATE.step, best=Best(value=0.7, step=STATE.step))
    path = write_checkpoint(tmp_path, STATE.step, STATE, STATE.world_size)
    record_evaluation(tmp_path, evaluated)
    assert read_state(path) == evaluated
    assert find_damage(path) == [] and list_checkpoints(tmp_path) == [path] and newest_intact(tmp_path) == path
    discard_later_evaluations(tmp_path, STATE.step)
    assert read_state(path) == evaluated
    discard_later_evaluations(tmp_path, STATE.step - 1)
    assert read_state(path) == STATE and names(tmp_path) == [path.name]


def test_a_record_goes_with_its_checkpoint(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step)
        record_evaluation(tmp_path, TrainState(step=step, evaluated_step=step))
    (tmp_path / ".tmp-evaluated-00000004.json").write_text("{")  # of a kill while it was written
    remove_leftovers(tmp_path)
    prune_checkpoints(tmp_path, CheckpointConfig(keep_last=1), best_step=1)
    assert names(tmp_path) == ["evaluated-00000001.json", "evaluated-00000003.json", step_name(1), step_name(3)]


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 12)
    (tmp_path / "evaluated-00000012.json").write_text('{"evaluated_step": 12')
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/evaluated-00000012.json cannot be read"):
        read_state(path)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b'{"step": 12, "epo', id="cut off"),
        pytest.param(b"\xff\xfe", id="no text"),
        pytest.param(b"{}", id="no fields"),
        pytest.param(b"null", id="null"),
        pytest.param(b"[1, 2]", id="list"),
        pytest.param(b'{"step": 12, "best": null, "speed": 3}', id="unknown field"),
        pytest.param(b'{"step": 12, "best": {"value": 0.5}}', id="half a best"),
        pytest.param(b'{"step": 12, "best": 0.5}', id="another best"),
    ],
)
def test_a_state_that_cannot_be_read_names_its_file(tmp_path: Path, content: bytes) -> None:
    path = write_checkpoint(tmp_path, 12)
    (path / STATE_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{path / STATE_FILE} cannot be read"):
        read_state(path)


def test_a_missing_state_names_its_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"{tmp_path / STATE_FILE} cannot be read"):
        read_state(tmp_path)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_slices_of_any_number_of_ranks_are_whole_again(tmp_path: Path, num_ranks: int) -> None:
    path = write_checkpoint(tmp_path, 3, num_ranks=num_ranks)
    for kind in (WEIGHT, *MOMENTS):
        slices = open_slices(path, kind)
        assert slices.keys() == SHAPES.keys()
        for name, tensor in slices.items():
            whole = made_tensor(kind, name, 3)
            assert torch.equal(read_whole(tensor, torch.float32), whole)
            for start, stop in ((0, 0), (0, 1), (1, whole.numel()), (2, 5)):
                stop = min(stop, whole.numel())
                assert torch.equal(tensor.read(min(start, stop), stop), whole.flatten()[start:stop])


def test_damaged_checkpoints_are_passed_over_named_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (4, 6, 8, 10):
        write_checkpoint(tmp_path, step)
    (tmp_path / step_name(10) / rank_file(1)).unlink()
    file = tmp_path / step_name(8) / rank_file(0)
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    assert newest_intact(tmp_path) == tmp_path / step_name(6)
    assert f"{step_name(10)} is corrupt and skipped: {rank_file(1)} cannot be read: No such" in caplog.text
    assert f"{step_name(8)} is corrupt and skipped: {rank_file(0)} is not what was written" in caplog.text
    kept = [step_name(4), step_name(6)]
    assert names(tmp_path) == [f"damaged-{step_name(step)}" for step in (8, 10)] + kept
    prune_checkpoints(tmp_path, CheckpointConfig(keep_last=1), best_step=None)  # damaged ones do not count
    assert newest_intact(tmp_path) == tmp_path / step_name(6)


def test_without_an_intact_one_nothing_is_begun_anew_or_renamed(tmp_path: Path) -> None:
    assert newest_intact(tmp_path) is None
    for step in (4, 6):
        (write_checkpoint(tmp_path, step) / MANIFEST_FILE).unlink()
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"no intact checkpoint.*(\n.*step-0000000[46]: .*is missing.*){2}"):
            newest_intact(tmp_path)
    assert names(tmp_path) == [step_name(4), step_name(6)]


def test_one_step_later() -> None:
    later = STATE.advanced(num_samples=16, epoch=2)
    assert later == dataclasses.replace(STATE, step=13, samples_consumed=206, epoch=2)


def test_names_sort_as_their_steps_do() -> None:
    steps = [0, 9, 10, 99, 12_345, 99_999_999]
    assert sorted(map(step_name, reversed(steps))) == [step_name(step) for step in steps]


# Disks and servers


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP])
def test_folders_that_cannot_be_synced_are_written_anyway(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CIFS and some FUSE file systems refuse to sync a folder."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    path = write_checkpoint(tmp_path, STATE.step, STATE)
    sync_tree(path)
    record_evaluation(tmp_path, dataclasses.replace(STATE, evaluated_step=STATE.step))
    assert read_state(path).evaluated_step == STATE.step
    monkeypatch.setattr(os, "fsync", lambda _: os.strerror(number) and fail(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        sync_tree(path)


def fail(number: int) -> None:
    raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EACCES])
@pytest.mark.parametrize("name", [MANIFEST_FILE, STATE_FILE, rank_file(1)])
def test_a_checkpoint_that_cannot_be_read_now_is_not_damaged(
    number: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read again, and then the start ends: an older checkpoint must not take its place."""
    for step in (1, 2):
        write_checkpoint(tmp_path, step)
    failing, num_left = tmp_path / step_name(2) / name, [2]

    def failing_open(real: Callable[..., object]) -> Callable[..., object]:
        def open_(file: object, *arguments: object, **named: object) -> object:
            if str(file) == str(failing) and num_left[0]:
                num_left[0] -= 1
                fail(number)
            return real(file, *arguments, **named)

        return open_

    monkeypatch.setattr(io, "open", failing_open(io.open))
    if sys.version_info < (3, 11):  # its pathlib keeps a reference to io.open
        monkeypatch.setattr(Path, "open", failing_open(Path.open))
    monkeypatch.setattr(reading, "PAUSES_S", (0.0, 0.0))
    assert newest_intact(tmp_path) == tmp_path / step_name(2)
    assert open_slices(tmp_path / step_name(2)) and num_left == [0]
    num_left[0] = 100
    with pytest.raises(ServerError, match=r"expected a file system that can be read\. Nothing was changed"):
        newest_intact(tmp_path)
    assert names(tmp_path) == [step_name(1), step_name(2)]


@pytest.mark.parametrize(
    ("number", "expected", "message"),
    [
        (errno.EIO, ServerError, "Input/output error; expected a file system that can be read. Nothing was changed"),
        (errno.EACCES, CheckpointError, "Permission denied; expected a folder that this account can read. Change"),
    ],
)
def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(
    number: int, expected: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the run would begin again."""
    write_checkpoint(tmp_path, 1)
    monkeypatch.setattr(Path, "iterdir", lambda _: fail(number))
    monkeypatch.setattr(reading, "PAUSES_S", (0.0,))
    with pytest.raises(expected, match=f"^{tmp_path}: {message}"):
        newest_intact(tmp_path)
    with pytest.raises(OSError, match=os.strerror(number)):
        list_checkpoints(tmp_path)


@pytest.mark.parametrize("name", ["gone", "file/x", "loop", "x" * 300])
def test_where_there_is_no_folder_there_are_no_checkpoints(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    assert list_checkpoints(tmp_path / name) == [] and newest_intact(tmp_path / name) is None
