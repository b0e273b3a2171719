from __future__ import annotations

from pathlib import Path

import numpy as np

from cogvlm_ft.model.fingerprint import BLOCK_BYTES, NUM_BLOCKS, fingerprint


def write(
    folder: Path, seed: int = 0, name: str = "model.safetensors", size: int = 3 * BLOCK_BYTES * NUM_BLOCKS
) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(np.random.default_rng(seed).bytes(size))
    (folder / "config.json").write_text("{}")
    return folder


def test_the_same_weights_elsewhere_have_the_same_fingerprint(tmp_path: Path) -> None:
    first = fingerprint(write(tmp_path / "a"))
    assert fingerprint(write(tmp_path / "b")) == first
    (tmp_path / "b" / "README.md").write_text("not the model")
    assert fingerprint(tmp_path / "b") == first


def test_other_weights_names_sizes_or_settings_have_another(tmp_path: Path) -> None:
    found = [
        fingerprint(write(tmp_path / "a")),
        fingerprint(write(tmp_path / "b", seed=1)),
        fingerprint(write(tmp_path / "c", name="other.safetensors")),
        fingerprint(write(tmp_path / "d", size=1000)),
        fingerprint(write(tmp_path / "e", size=1001)),
    ]
    (tmp_path / "a" / "config.json").write_text('{"hidden_size": 8}')
    assert len({*found, fingerprint(tmp_path / "a")}) == 6


def test_first_and_last_byte_count_and_all_of_a_small_file(tmp_path: Path) -> None:
    for size, places in ((5 * BLOCK_BYTES * NUM_BLOCKS + 7, (0, -1)), (2 * BLOCK_BYTES + 3, (0, BLOCK_BYTES + 1, -1))):
        path = write(tmp_path / "a", size=size) / "model.safetensors"
        first, content = fingerprint(tmp_path / "a"), bytearray(path.read_bytes())
        for place in places:
            changed = bytearray(content)
            changed[place] ^= 1
            path.write_bytes(changed)
            assert fingerprint(tmp_path / "a") != first
