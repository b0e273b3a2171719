"""Checkpoints after what disks, networks and people do to them: always detected and named, the one before is taken."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_files import made_tensor, write_checkpoint
from scaling import scaled

from cogvlm_ft.checkpoints.checkpoint import newest_intact, read_state
from cogvlm_ft.checkpoints.consolidate import open_weights
from cogvlm_ft.checkpoints.manifest import MANIFEST_FILE
from cogvlm_ft.errors import CheckpointError
from cogvlm_ft.model.loading import read_whole

pytestmark = pytest.mark.slow
OLD_STEP, NEW_STEP = 4, 6
NUM_EACH = scaled(24)

# A mutation changes `file`, which is in the newer checkpoint; `older` is the same file of the one before.
Mutation = Callable[[Path, Path, random.Random], None]


def flip_bit(file: Path, older: Path, chance: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def cut_off(file: Path, older: Path, chance: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: chance.randrange(len(content))])


def append(file: Path, older: Path, chance: random.Random) -> None:
    file.write_bytes(file.read_bytes() + chance.randbytes(chance.randrange(1, 99)))


def zero_block(file: Path, older: Path, chance: random.Random) -> None:
    """Zero the end, as some file systems leave a file after a power failure: the length is right."""
    content = bytearray(file.read_bytes())
    start = chance.randrange(len(content) // 2)
    content[start:] = bytes(len(content) - start)
    file.write_bytes(content)


def swap_bytes(file: Path, older: Path, chance: random.Random) -> None:
    content = bytearray(file.read_bytes())
    places = [place for place in range(len(content) - 1) if content[place] != content[place + 1]]
    at = chance.choice(places)
    content[at], content[at + 1] = content[at + 1], content[at]
    file.write_bytes(content)


def remove(file: Path, older: Path, chance: random.Random) -> None:
    file.unlink()


def take_older(file: Path, older: Path, chance: random.Random) -> None:
    shutil.copyfile(older, file)


def swap_with_neighbour(file: Path, older: Path, chance: random.Random) -> None:
    checkpoint = next(parent for parent in file.parents if parent.name.startswith("step-"))
    others = [path for path in checkpoint.rglob("*") if path.is_file() and path != file]
    other = chance.choice([path for path in others if path.read_bytes() != file.read_bytes()])
    mine = file.read_bytes()
    file.write_bytes(other.read_bytes())
    other.write_bytes(mine)


def make_folder(file: Path, older: Path, chance: random.Random) -> None:
    file.unlink()
    file.mkdir()


def link_to_nothing(file: Path, older: Path, chance: random.Random) -> None:
    file.unlink()
    file.symlink_to("nowhere")


MUTATIONS: list[Mutation] = [
    flip_bit,
    cut_off,
    append,
    zero_block,
    swap_bytes,
    remove,
    take_older,
    swap_with_neighbour,
    make_folder,
    link_to_nothing,
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_a_mutation_is_seen_and_the_checkpoint_before_is_taken(
    mutation: Mutation, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chance = random.Random(mutation.__name__)
    for number in range(NUM_EACH):
        folder = tmp_path / str(number)
        intact, newer = write_checkpoint(folder, OLD_STEP), write_checkpoint(folder, NEW_STEP)
        file = chance.choice(sorted(path for path in newer.rglob("*") if path.is_file()))
        inside = file.relative_to(newer)
        if mutation is take_older and file.read_bytes() == (intact / inside).read_bytes():
            inside = Path(MANIFEST_FILE)  # configs are the same in both
        mutation(newer / inside, intact / inside, chance)
        with pytest.raises(CheckpointError) as error:
            open_weights(newer)
        assert str(newer) in str(error.value)
        assert any(named in str(error.value) for named in (inside.name, MANIFEST_FILE, "its sha256 differs"))
        caplog.clear()
        assert newest_intact(folder) == intact, inside
        assert f"{newer} is corrupt and skipped" in caplog.text
        assert read_state(intact).step == OLD_STEP
        for name, tensor in open_weights(intact).items():
            assert torch.equal(read_whole(tensor, torch.float32), made_tensor("weight", name, OLD_STEP))


def test_a_copy_under_another_name_is_not_taken_for_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    intact = write_checkpoint(tmp_path, OLD_STEP)
    shutil.copytree(intact, tmp_path / "step-00000099")
    assert newest_intact(tmp_path) == intact
    assert "step-00000099 is corrupt and skipped: state.json is that of step 4" in caplog.text


def test_a_manifest_cannot_lead_outside(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, OLD_STEP)
    manifest = path / MANIFEST_FILE
    manifest.write_text(manifest.read_text().replace("state.json", "../../etc/passwd"))
    with pytest.raises(CheckpointError, match=r"its own hash does not fit"):
        open_weights(path)
