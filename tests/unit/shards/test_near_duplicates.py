"""Photos that look alike in two splits, labels that are spelled alike, and a first file for --names."""

from __future__ import annotations

import io
import json
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from case_files import CASES, write_photo
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from cogvlm_ft.data.index import load_index
from cogvlm_ft.shards.build import main as build
from cogvlm_ft.shards.packing.label_names import load_names
from cogvlm_ft.shards.packing.splits import shuffle_rank
from cogvlm_ft.shards.review import main as review
from cogvlm_ft.shards.reviewing.label_words import names_text, spelling_suspects
from cogvlm_ft.shards.reviewing.near_duplicates import HashedPhoto, near_duplicates, photo_hash


def scene(seed: int) -> Image.Image:
    """A picture with coarse structure, as photos have."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((320, 240), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def pairs(train: list[bytes], val: list[bytes]) -> list[tuple[int, int]]:
    numbers = count()
    photos = [
        HashedPhoto(next(numbers), split, value)
        for split, images in (("train", train), ("val", val))
        for value in map(photo_hash, images)
        if value is not None
    ]
    return [(pair.second.number, pair.first.number - len(train)) for pair in near_duplicates(photos)]


def test_resized_brightened_and_recompressed_copies_are_found_and_other_photos_are_not() -> None:
    train = [jpeg(scene(seed)) for seed in range(40)]
    bright = ImageEnhance.Brightness(scene(7)).enhance(1.2)
    val = [jpeg(scene(3).resize((200, 150))), jpeg(bright), jpeg(scene(11), 30), jpeg(scene(99))]
    assert pairs(train, val) == [(3, 0), (7, 1), (11, 2)]


def test_plain_and_broken_photos_have_no_hash() -> None:
    assert photo_hash(jpeg(Image.new("RGB", (50, 40), "grey"))) is None
    assert photo_hash(b"no image") is None


@settings(max_examples=30, deadline=None)
@given(
    hashes=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=8),
    flipped=st.lists(st.integers(0, 63), max_size=6),
    seed=st.integers(0, 99),
)
def test_few_bits_make_a_duplicate(hashes: list[int], flipped: list[int], seed: int) -> None:
    chosen = hashes[seed % len(hashes)]
    changed = chosen
    for bit in set(flipped):
        changed ^= 1 << bit
    photos = [*(HashedPhoto(i, "train", value) for i, value in enumerate(hashes)), HashedPhoto(100, "val", changed)]
    (found,) = near_duplicates(photos)
    assert found.num_bits == min((changed ^ value).bit_count() for value in hashes) <= len(set(flipped))
    assert list(near_duplicates(photos[:-1])) == []


def test_a_review_of_shards_and_of_their_source_lists_near_duplicates(tmp_path: Path, capsys: Any) -> None:
    for split, seed, quality in (("train", 1, 90), ("train", 2, 90), ("valid", 1, 60), ("valid", 5, 90)):
        folder = tmp_path / "in" / split
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{seed}{split}.jpg").write_bytes(jpeg(scene(seed), quality))
        (folder / f"{seed}{split}.txt").write_text("0 0.5 0.5 0.25 0.5\n")
    (tmp_path / "in" / "classes.txt").write_text("dog\n")
    annotations = ["--annotations", str(tmp_path / "in"), "--workers", "1"]
    assert review([*annotations, "--out", str(tmp_path / "before")]) == 0
    assert "1 Photos in two splits look alike" in capsys.readouterr().out
    assert "1valid.jpg (val)" in (tmp_path / "before" / "suspects.jsonl").read_text()
    assert build([*annotations, "--out", str(tmp_path / "out")]) == 0
    assert review(["--shards", str(tmp_path / "out"), "--out", str(tmp_path / "review"), "--workers", "1"]) == 0
    assert "1 Photos in two splits look alike" in capsys.readouterr().out


def test_before_a_random_split_the_review_knows_the_splits_of_a_build(tmp_path: Path) -> None:
    """Also with two records of one photo, and a photo that cannot be read but counts in the fraction."""
    names = [f"{number:02}.jpg" for number in range(15)]
    names.sort(key=lambda name: shuffle_rank(name, 0))
    (tmp_path / names[4]).write_bytes(b"no photo")
    for number, name in enumerate(names):
        if number != 4:
            (tmp_path / name).write_bytes(jpeg(scene(number % 13), 90 - number))
    rows = [
        {"image": name, "key": f"{name}{k}", "targets": [{"phrase": "dog", "boxes": [[1, 2, 30, 40]]}]}
        for k in (1, 2)
        for name in names
    ]
    (tmp_path / "x.jsonl").write_text("".join(map(lambda row: json.dumps(row) + "\n", rows)))
    annotations = ["--annotations", str(tmp_path / "x.jsonl"), "--workers", "1"]
    assert review([*annotations, "--out", str(tmp_path / "review")]) == 0
    found = [json.loads(line) for line in (tmp_path / "review" / "suspects.jsonl").read_text().splitlines()]
    texts = [str(row) for row in found if row["kind"] == "near_duplicate"]
    assert build([*annotations, "--out", str(tmp_path / "out")]) == 0
    index = load_index(tmp_path / "out", "val")
    assert {index.key(i)[:2] for i in range(len(index))} == {name[:2] for name in names[:2]}  # 13 is like 0, 14 like 1
    assert len(texts) == 2
    for val, train in ((names[0], names[13]), (names[1], names[14])):
        assert any(f"{val} (val)" in text and f"{train} (train)" in text for text in texts)


def test_31_labels_that_differ_in_case_are_a_suspect_and_names_yaml_is_written(tmp_path: Path, capsys: Any) -> None:
    assert [
        suspect.values["names"] for suspect in spelling_suspects({"Dog": 2, "dog": 3, "hot_dog": 1, "hot dog": 1})
    ] == [
        "'Dog' (2), 'dog' (3)",
        "'hot dog' (1), 'hot_dog' (1)",
    ]
    out = tmp_path / "review"
    arguments = ["--annotations", str(CASES / "31-label-spelling" / "in"), "--out", str(out), "--workers", "1"]
    assert review(arguments) == 0
    assert "Labels that differ only in spelling" in capsys.readouterr().out
    load_names(out / "names.yaml")
    (out / "names.yaml").write_text("dog: [hound]\n")
    assert review(arguments) == 0
    assert (out / "names.yaml").read_text() == "dog: [hound]\n"


@pytest.mark.parametrize("label", ["dog", "no", "1", "a: b", "# c", "交通灯", "RBC", "'x", "null", "[[1]]"])
def test_the_first_names_file_can_be_used_as_it_is(label: str, tmp_path: Path) -> None:
    write_photo(tmp_path / "a.png")
    (tmp_path / "names.yaml").write_text(names_text({label: 3, "cat": 9}), encoding="utf-8")
    content = yaml.load((tmp_path / "names.yaml").read_text(encoding="utf-8"), yaml.BaseLoader)
    assert list(content) == ["cat", label] and content["cat"] == ["cat", "猫"]
    load_names(tmp_path / "names.yaml")
