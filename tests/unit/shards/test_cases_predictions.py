"""Photos of unusual kinds, as tools write them, through a build, with and without --max-side."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from photo_builds import run_build
from PIL import Image

from cogvlm_ft.data.index import load_index
from cogvlm_ft.data.reader import ShardReader, decode_image
from cogvlm_ft.data.record import Record
from cogvlm_ft.data.tars import IMAGE_FORMATS
from cogvlm_ft.grounding.targets import Target
from cogvlm_ft.predict.large_photos import load_photo
from cogvlm_ft.shards.packing.checks import CheckedSample
from cogvlm_ft.shards.packing.shrink import shrink_sample
from cogvlm_ft.shards.packing.verify import VERIFY
from cogvlm_ft.tile_settings import TilesConfig

CASES = Path(__file__).parents[2] / "cases"


def build_case(name: str, out: Path, **options: Any) -> tuple[dict[str, NDArray[np.uint8]], dict[str, str]]:
    """Return the pixels that training reads, and the details of the rejected photos, by file name."""
    folder = CASES / name / "in"
    found = run_build("jsonl", folder / "l.jsonl", folder, out, **options)
    pixels = {}
    if found["records"]:
        reader = ShardReader(load_index(out, "train"))
        samples = [reader.read(i) for i in range(len(reader))]
        lines = [json.loads(line)["image"] for line in (folder / "l.jsonl").read_text(encoding="utf-8").splitlines()]
        names = {name.rpartition(".")[0]: name for name in lines}
        pixels = {names[sample.record.key]: np.asarray(sample.image) for sample in samples}
    rejected = {row["image"]: f"{row['reason']}: {row['detail']}" for row in found["rejected"]}
    assert sorted([*pixels, *rejected]) == sorted(
        json.loads(line)["image"] for line in (folder / "l.jsonl").read_text(encoding="utf-8").splitlines()
    )
    return pixels, rejected


@pytest.mark.parametrize("verify", VERIFY)
@pytest.mark.parametrize("max_side", [None, 50])
def test_16_bit_and_float(verify: str, max_side: int | None, tmp_path: Path) -> None:
    pixels, rejected = build_case("09-png-16bit", tmp_path / "out", verify=verify, max_side=max_side)
    assert sorted(pixels) == ["a.png", "b.tif", "f.tif"] and not rejected
    for name, seen in pixels.items():
        scale = 1 if max_side is None else 2
        inside, outside = seen[20 // scale, 20 // scale], seen[70 // scale, 90 // scale]
        assert inside.min() > 250 and outside.max() < 5, name
        predicted = load_photo(CASES / "09-png-16bit" / "in" / name, upright=True, tiles=TilesConfig())
        small = predicted.resize(seen.shape[1::-1], Image.Resampling.LANCZOS)
        assert np.abs(np.asarray(small).astype(int) - seen).max() <= (0 if max_side is None else 12), name


@pytest.mark.parametrize("verify", VERIFY)
def test_a_png_with_a_large_text(verify: str, tmp_path: Path) -> None:
    pixels, rejected = build_case("10-png-text", tmp_path / "out", verify=verify)
    assert sorted(pixels) == ["a.png", "b.png"] and not rejected
    assert all(seen[5, 5].tolist() == [10, 200, 10] for seen in pixels.values())


@pytest.mark.parametrize("verify", VERIFY)
def test_other_kinds_of_photos(verify: str, tmp_path: Path) -> None:
    pixels, rejected = build_case("24-pictures", tmp_path / "out", verify=verify)
    red = {"mpo.jpg", "cmyk.jpg", "anim.webp", "pal.png", "prog.jpg", "motion.jpg", "png_named.jpg", "g.jpg"}
    for name in red:
        red_, green, blue = pixels.pop(name)[5, 10]
        assert red_ >= 195 and green < 60 and blue < 60, name
    assert sorted(pixels) == ["bit.png", "la.png"]
    assert (pixels["la.png"] == 90).all() and (pixels["bit.png"] == 255).all()
    expected = f"expected one of {', '.join(IMAGE_FORMATS)}. Convert the image"
    assert rejected.pop("h.jpg") == f"broken_image: found HEIC; {expected}"
    assert list(rejected) == ["noeoi.jpg"]  # without its last bytes


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from([("PNG", "uint16"), ("TIFF", "uint16"), ("TIFF", "int32"), ("TIFF", "float32")]),
    st.tuples(st.integers(24, 90), st.integers(24, 90)),
    st.integers(1, 4),
    st.data(),
)
def test_a_shrunken_photo_has_the_greys_of_the_whole_one(
    kind: tuple[str, str], size: tuple[int, int], factor: int, data: st.DataObject
) -> None:
    """Shrinking before scaling would give each its own range."""
    width, height = size
    slope = np.add.outer(np.arange(height), np.arange(width))
    values = (data.draw(st.integers(0, 30_000)) + slope * data.draw(st.integers(1, 150))).astype(kind[1])
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, kind[0])
    whole = decode_image(buffer.getvalue(), "k", 10**6)
    record = Record("k", size, "s", (Target("dog", "en", ((0.0, 0.0, 9.0, 7.0),)),), (), upright=False)
    small = shrink_sample(CheckedSample(record, "png", buffer.getvalue()), max(width, height) // factor)
    seen = decode_image(small.image, "k", 10**6)
    expected = whole.resize(seen.size, Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(seen).astype(int) - np.asarray(expected)).mean() < 3
