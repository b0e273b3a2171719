"""Keys of samples, and which sample goes into which shard."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from format_files import read_all

from cogvlm_ft.shards.formats import FORMATS
from cogvlm_ft.shards.packing.candidates import Candidate
from cogvlm_ft.shards.packing.given_splits import GivenSplits, VocLists
from cogvlm_ft.shards.packing.splits import ShardPlan, key_of, key_with_hash, plan_shards, safe_key, shuffle_rank


def test_keys_have_no_dots_and_no_slashes_and_are_short() -> None:
    images = [
        "a.jpg",
        "d/a.jpg",
        "d_a.jpg",
        "d.a.jpg",
        "x" * 200 + "1.jpg",
        "x" * 200 + "2.jpg",
        "照片.jpg",
        "\udcff.jpg",
    ]
    keys = [key_of(Candidate(image, None, "")) for image in images]
    assert len(set(keys)) == len(images)
    assert {"a", "d_a", "照片"} < set(keys)
    for key in keys:
        assert "." not in key and "/" not in key and len(key.encode()) <= 80
        assert safe_key(key) == key


def test_the_users_own_key_comes_first() -> None:
    assert key_of(Candidate("a.jpg", "mine", "")) == "mine"
    assert key_of(Candidate("a.jpg", "not.mine", "")).startswith("not_mine-")


def test_a_hash_makes_a_taken_key_different() -> None:
    assert key_with_hash("a", "a.png") == "a-7f071235"
    assert key_with_hash("a", "a.png") != key_with_hash("a", "a.jpg")
    assert len(key_with_hash("文" * 80, "x").encode()) <= 80


def test_the_order_depends_on_the_seed_and_never_changes() -> None:
    names = [f"{i}.jpg" for i in range(8)]
    orders = [sorted(names, key=lambda name, seed=seed: shuffle_rank(name, seed)) for seed in (0, 1)]
    assert orders[0] != orders[1]
    assert orders[0] == [
        "2.jpg",
        "3.jpg",
        "1.jpg",
        "5.jpg",
        "0.jpg",
        "4.jpg",
        "7.jpg",
        "6.jpg",
    ]  # shards are built again and gone on with


def test_slices_are_whole_but_for_the_last() -> None:
    assert plan_shards({"train": 5, "val": 3, "test": 1}, samples_per_shard=2) == [
        ShardPlan("train-000000", 3, 5),
        ShardPlan("train-000001", 5, 7),
        ShardPlan("train-000002", 7, 8),
        ShardPlan("val-000000", 0, 2),
        ShardPlan("val-000001", 2, 3),
        ShardPlan("test-000000", 8, 9),
    ]
    assert plan_shards({}, samples_per_shard=2) == []


@pytest.mark.parametrize(
    ("name", "line"),
    [("Validation", "a"), ("val", "a.jpg"), ("VAL", "a.XML"), ("valid", '"a.png" 1'), ("dev", "a -1\r")],
)
def test_lists_of_voc_as_tools_write_them(tmp_path: Path, name: str, line: str) -> None:
    """CVAT calls the lists as its subsets; other tools keep the endings of the photos."""
    path = tmp_path / "ImageSets" / "Main" / f"{name}.txt"
    path.parent.mkdir(parents=True)
    path.write_text(f"{line}\nb.c\n")
    lists = VocLists(tmp_path)
    assert [lists.split_of(f"Annotations/{stem}.xml") for stem in ("a", "b.c", "d")] == ["val", "val", None]


@pytest.mark.parametrize(
    ("image", "source", "split"),
    [
        ("obj_Train_data/a.jpg", "obj_Train_data/a.txt", "train"),  # YOLO of CVAT
        ("obj_Validation_data/a.jpg", "obj_Validation_data/a.txt", "val"),
        ("photos/a.jpg", "valid/project.json: task 1", "val"),  # Label Studio
        ("test/data/a.jpg", "test/labels.json: image id 1", "test"),  # FiftyOne
        ("valid/a.jpg", "valid/_annotations.csv: _annotations.csv:2", "val"),  # Roboflow
    ],
)
def test_folders_of_tools_state_the_split(tmp_path: Path, image: str, source: str, split: str) -> None:
    assert GivenSplits(tmp_path, tmp_path).of(Candidate(image, None, source)) == split


@pytest.mark.parametrize("line", ["./images/{0}/a.jpg", "/content/set/images/{0}/a.jpg", "data/images/{0}/a.jpg"])
def test_lists_of_images_of_another_machine(tmp_path: Path, line: str) -> None:
    """Such as those that CVAT writes for Ultralytics."""
    for name in ("train", "val"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "a.jpg").touch()
        (tmp_path / f"{name}.txt").write_text(line.format({"train": "val", "val": "train"}[name]))
    (tmp_path / "data.yaml").write_text("names: [dog]\ntrain: train.txt\nval: val.txt\n")
    splits = GivenSplits(tmp_path, tmp_path)
    assert [splits.of(Candidate(f"images/{name}/a.jpg", None, "x")) for name in ("train", "val")] == ["val", "train"]


@pytest.mark.parametrize("column", ["split", "Set", "subset"])
def test_a_column_or_a_field_states_the_split(tmp_path: Path, column: str) -> None:
    stated = {"a.jpg": "training", "b.jpg": "Valid", "c.jpg": "", "d.jpg": "set 3"}
    rows = [f"{image},1,2,9,9,dog,{split}" for image, split in stated.items()]
    (tmp_path / "x.csv").write_text("\n".join([f"image,left,top,right,bottom,label,{column}", *rows]))
    lines = [{"image": image, "targets": [], column.lower(): split} for image, split in stated.items()]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for name, file in (("csv", "x.csv"), ("jsonl", "x.jsonl")):
        found = read_all(FORMATS[name].read, tmp_path / file)
        if name == "csv" or column == "split":
            assert [candidate.split for candidate in found.candidates] == ["train", "val", None, None]
