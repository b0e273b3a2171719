"""Preprocessed images of every kind equal those of the reference to the bit."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from golden_cases import root
from PIL import Image
from safetensors.torch import load_file

from cogvlm_ft.model import preprocess_image

FOLDER = root() / "preprocess"
ROWS = json.loads((FOLDER / "golden.json").read_text(encoding="utf-8"))["images"]
PHOTOS = sorted(name for name in ROWS if (FOLDER / name).is_file())


def test_there_are_photos_of_several_kinds() -> None:
    assert {ROWS[name]["mode"] for name in PHOTOS} >= {"RGB", "L", "P"}
    assert "exif6.jpg" in PHOTOS


@pytest.mark.parametrize("name", PHOTOS)
def test_pixels_are_the_reference_s(name: str) -> None:
    image = Image.open(FOLDER / name)
    row, tensors = ROWS[name], load_file(FOLDER / "golden.safetensors")
    assert (image.mode, list(image.size)) == (row["mode"], row["file_size_wh"])
    large = preprocess_image(image, 490)
    assert large.dtype == torch.float32
    chosen = large[:, row["sub8_rows_cols"]][:, :, row["sub8_rows_cols"]]
    assert torch.equal(chosen, tensors[f"{name}.490.sub8"])
    assert torch.equal(preprocess_image(image, 56), tensors[f"{name}.56"])
    assert hashlib.sha256(large.numpy().tobytes()).hexdigest() == row["f32_490_sha256"]
