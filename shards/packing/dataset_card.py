"""README.md of a shard folder: tells the `datasets` library which files are samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cogvlm_ft.shards.packing.tar_writing import write_atomically

CARD_FILE = "README.md"
_HEADER = "---\nconfigs:\n- config_name: default\n  data_files:\n"
_SPLIT_NAMES = {"val": "validation"}


def write_dataset_card(out: Path, splits: Sequence[str]) -> None:
    """Write the card, without which `load_dataset` reads the offsets files; a README.md of the user's stays."""
    path = out / CARD_FILE
    if path.exists() and not path.read_bytes().startswith(_HEADER.encode()):
        return
    files = "".join(f"  - split: {_SPLIT_NAMES.get(name, name)}\n    path: {name}-*.tar\n" for name in splits)
    write_atomically(path, f"{_HEADER}{files}---\n\nWebDataset shards of images with grounding targets.\n".encode())
