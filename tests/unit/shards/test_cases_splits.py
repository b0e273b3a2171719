"""Splits that users' files state, and copies of photos: never in two splits. tests/cases and their kinds."""

from __future__ import annotations

import json
import random
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest
from case_files import CASES, write_photo
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvlm_ft.shards.build import main
from cogvlm_ft.shards.packing.candidates import Candidate, Problem, make_targets
from cogvlm_ft.shards.packing.given_splits import GivenSplits, split_of_folder
from cogvlm_ft.shards.packing.source_photos import photo_name
from cogvlm_ft.shards.packing.split_plan import SplitRules
from cogvlm_ft.shards.packing.staging import StagingDatabase

QUICK = settings(max_examples=30, deadline=None)


def built(out: Path, annotations: Path, *options: str) -> dict[str, Any]:
    """Keys by split; the index, the notes."""
    assert main(["--annotations", str(annotations), "--out", str(out), "--workers", "1", *options]) == 0
    keys: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for path in out.glob("*-*.json"):
        keys[path.name.split("-")[0]] += [row["key"] for row in json.loads(path.read_bytes())["samples"]]
    rows = map(json.loads, (out / "notes.jsonl").read_bytes().splitlines())
    notes = [row for row in rows if row["reason"] != "class_names"]
    return keys | {"index": json.loads((out / "index.json").read_bytes()), "notes": notes}


def yolo(folder: Path, **photos: int) -> Path:
    """One box per photo; photos: path of the photo without ending, with __ for / -> seed of its content."""
    for name, seed in photos.items():
        path = folder / f"{name.replace('__', '/')}.png"
        write_photo(path, (60, 40), seed)
        label = Path(str(path).replace("/images/", "/labels/")).with_suffix(".txt")
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text("0 0.5 0.5 0.25 0.5\n")
    (folder / "classes.txt").write_text("dog\n")
    return folder


def stems(keys: list[str]) -> set[str]:
    return {match[0] for key in keys if (match := re.search(r"IMG_\d", key))}


def test_27_roboflow_copies_stay_together_and_valid_stays_val(tmp_path: Path, capsys: Any) -> None:
    found = built(tmp_path / "out", CASES / "27-roboflow-leak" / "in")
    assert stems(found["val"]) == {"IMG_8", "IMG_9"} and len(found["train"]) == 24
    assert "24 photos in 8 groups" in capsys.readouterr().out


@pytest.mark.parametrize("fraction", ["0.1", "0.3", "0.7"])
def test_27_no_copy_is_in_train_and_val_when_split_at_random(tmp_path: Path, fraction: str, capsys: Any) -> None:
    found = built(tmp_path / "out", CASES / "27-roboflow-leak" / "in", "--val-fraction", fraction)
    assert not stems(found["train"]) & stems(found["val"])
    assert abs(len(found["val"]) - float(fraction) * 26) <= 3
    assert "not used" in capsys.readouterr().out


def test_val_fraction_1_gives_only_val(tmp_path: Path, capsys: Any) -> None:
    found = built(tmp_path / "out", CASES / "27-roboflow-leak" / "in", "--val-fraction", "1")
    assert (len(found["train"]), len(found["val"])) == (0, 26)
    assert "train is empty" in capsys.readouterr().out


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_source_can_be_one_split(tmp_path: Path, split: str) -> None:
    found = built(tmp_path / "out", CASES / "27-roboflow-leak" / "in", "--split", split)
    assert {name: len(found[name]) for name in ("train", "val", "test") if found[name]} == {split: 26}
    assert ("test" in found["index"]["splits"]) == (split == "test")


def test_ultralytics_folders_with_a_test_split(tmp_path: Path) -> None:
    names = ("images__train2017__a", "images__train2017__b", "images__val2017__c", "images__test2017__d")
    found = built(tmp_path / "out", yolo(tmp_path / "in", **{name: i for i, name in enumerate(names)}))
    assert [len(found[split]) for split in ("train", "val", "test")] == [2, 1, 1]


def test_train_and_test_folders_leave_val_to_the_fraction(tmp_path: Path) -> None:
    photos = {f"{split}__images__p{i}": i + 100 * (split == "test") for split in ("train", "test") for i in range(20)}
    found = built(tmp_path / "out", yolo(tmp_path / "in", **photos))
    assert [len(found[split]) for split in ("train", "val", "test")] == [18, 2, 20]


def test_data_yaml_names_the_splits_of_other_folders(tmp_path: Path) -> None:
    folder = yolo(tmp_path / "in", images__one__a=1, images__one__b=2, images__two__c=3)
    (folder / "data.yaml").write_text("path: .\ntrain: images/one\nval: ./images/two\nnames: [dog]\n")
    found = built(tmp_path / "out", folder)
    assert (len(found["train"]), len(found["val"])) == (2, 1) and "two" in found["val"][0]
    (folder / "list.txt").write_text("./images/one/b.png\n./images/two/c.png\n")
    (folder / "data.yaml").write_text("train: images/one/a.png\nval: list.txt\nnames: [dog]\n")
    given = GivenSplits(folder, folder)
    states = [given.of(Candidate(f"images/{name}.png", None, "")) for name in ("one/b", "two/c")]
    assert states == ["val", "val"]
    (folder / "data.yaml").write_text("train: images/one\nval: images/one\nnames: [dog]\n")
    assert GivenSplits(folder, folder).of(Candidate("images/one/a.png", None, "")) is None


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("train/_annotations.coco.json: image id 3", "train"),
        ("annotations/instances_val2017.json: image id 3", "val"),
        ("test.json: image id 3", "test"),
        ("contest.json: image id 3", None),
        ("rows.jsonl:3", None),
    ],
)
def test_coco_files_state_a_split(source: str, expected: str | None, tmp_path: Path) -> None:
    assert GivenSplits(tmp_path, tmp_path).of(Candidate("a.jpg", None, source)) == expected


def voc(folder: Path, **lists: str) -> Path:
    """Photos a to d with one box each, and ImageSets/Main/NAME.txt."""
    for i, stem in enumerate("abcd"):
        write_photo(folder / "JPEGImages" / f"{stem}.png", (60, 40), i)
        corners = "".join(f"<{name}>{value}</{name}>" for name, value in zip(VOC_BOX, (1, 2, 30, 20), strict=True))
        content = f"<annotation><object><name>dog</name><bndbox>{corners}</bndbox></object></annotation>"
        (folder / "Annotations").mkdir(parents=True, exist_ok=True)
        (folder / "Annotations" / f"{stem}.xml").write_text(content)
    for name, text in lists.items():
        path = folder / "ImageSets" / "Main" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


VOC_BOX = ("xmin", "ymin", "xmax", "ymax")


def test_the_lists_of_voc_state_splits(tmp_path: Path, capsys: Any) -> None:
    folder = voc(tmp_path / "VOC2012", train="a\nb\n", val="c  1\r\n", test='"d"', dog_val="a -1\n", trainval="a\nc\n")
    for i, source in enumerate((folder, tmp_path / "VOC2012" / "Annotations")):
        images = ["--images", str(folder / "JPEGImages")] if i else []
        found = built(tmp_path / str(i), source, *images)
        assert [len(found[split]) for split in ("train", "val", "test")] == [2, 1, 1]
        assert "splits: as in the files (2 train, 1 val, 1 test)" in capsys.readouterr().out
        assert found["val"][0][-1] == "c" or "c-" in found["val"][0]
    found = built(tmp_path / "random", folder, "--val-fraction", "0")
    printed = capsys.readouterr().out
    assert len(found["train"]) == 4 and "those in the files" in printed
    assert "val is empty" in printed and "1 of 4 photos needs --val-fraction 0.25" in printed
    arguments = ["--annotations", str(folder), "--out", str(tmp_path / "0"), "--workers", "1"]
    build_json = tmp_path / "0" / "build.json"
    earlier = json.loads(build_json.read_bytes())
    for changes in ({"splitting": {**earlier["splitting"], "kept": False}}, {"split": None, "splitting": None}):
        kept = {name: value for name, value in {**earlier, **changes}.items() if value is not None or name != "split"}
        build_json.write_text(json.dumps(kept))
        assert main(arguments) == 2
        assert "Splits that the files state are kept now" in (error := capsys.readouterr().err)
        assert "--split random" in error and "--overwrite" in error


def test_a_photo_in_two_lists_of_voc_has_no_split(tmp_path: Path) -> None:
    folder = voc(tmp_path / "in" / "VOC2007", train="a\nb", val="b\nsub/c")
    given = GivenSplits(tmp_path / "in", tmp_path / "in")
    stated = {
        name: given.of(Candidate("x.jpg", None, f"VOC2007/Annotations/{name}.xml"))
        for name in ("a", "b", "c", "d", "sub/c")
    }
    assert stated == {"a": "train", "b": None, "c": None, "d": None, "sub/c": "val"}
    assert GivenSplits(folder / "Annotations" / "a.xml", folder).of(Candidate("x.jpg", None, "a.xml")) == "train"


def test_subsets_of_cvat_are_splits(tmp_path: Path, capsys: Any) -> None:
    box = '<box label="dog" xtl="1" ytl="2" xbr="21" ybr="12"/>'
    subsets = {"a": "Train", "b": "Train", "c": "Validation", "d": "Test", "e": "default"}
    for i, stem in enumerate(subsets):
        write_photo(tmp_path / "in" / f"{stem}.png", (60, 40), i)
    photos = "".join(
        f'<image id="{i}" name="{stem}.png" subset="{subset}" width="60" height="40">{box}</image>'
        for i, (stem, subset) in enumerate(subsets.items())
    )
    (tmp_path / "in" / "x.xml").write_text(f"<annotations>{photos}</annotations>")
    found = built(tmp_path / "out", tmp_path / "in")
    assert {split: found[split] for split in ("val", "test")} == {"val": ["c"], "test": ["d"]}
    assert "the 1 others are train" in capsys.readouterr().out
    assert len(built(tmp_path / "val", tmp_path / "in", "--split", "val")["val"]) == 5


def test_folders_of_other_names_are_no_splits() -> None:
    names = ("trains", "contest", "value", "testimony", "devices", "training_room")
    assert [name for name in names if split_of_folder(name)] == []
    names = ("Train", "valid", "validation", "train2017", "testing", "images_train", "val_images")
    assert all(split_of_folder(name) for name in names)


def test_a_copy_in_the_stated_train_goes_where_its_photo_is(tmp_path: Path, capsys: Any) -> None:
    photos = {"train__images__a_aug_1": 1, "valid__images__a": 2, "train__images__b": 3, "test__images__c": 3}
    found = built(tmp_path / "out", yolo(tmp_path / "in", **photos, train__images__d=4))
    assert [len(found[split]) for split in ("train", "val", "test")] == [1, 2, 2]
    assert sorted(row["reason"] for row in found["notes"]) == ["moved_to_test", "moved_to_val"]
    printed = capsys.readouterr().out
    assert "2 photos are copies of photos of another split" in printed, printed


def test_equal_names_in_two_stated_splits_are_two_photos(tmp_path: Path) -> None:
    photos = {"train__images__0001": 1, "train__images__0001_aug_1": 2, "valid__images__0001": 3}
    found = built(tmp_path / "out", yolo(tmp_path / "in", **photos))
    assert (len(found["train"]), len(found["val"]), found["notes"]) == (2, 1, [])


@pytest.mark.parametrize("rule", ["folder", "seq[0-9]+", "(seq)([0-9]+)"])
def test_series_stay_together(tmp_path: Path, rule: str) -> None:
    photos = {f"images__seq{number}__{i}": 10 * number + i for number in range(5) for i in range(4)}
    found = built(tmp_path / "out", yolo(tmp_path / "in", **photos), "--group-by", rule, "--val-fraction", "0.4")
    series = [{match[0] for key in found[split] if (match := re.search(r"seq\d", key))} for split in ("train", "val")]
    assert [len(names) for names in series] == [3, 2] and not series[0] & series[1]


def test_a_bad_expression_is_refused(tmp_path: Path, capsys: Any) -> None:
    arguments = ["--annotations", str(yolo(tmp_path / "in", a=1)), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--group-by", "(seq"]) == 2
    assert "--group-by '(seq'" in capsys.readouterr().err
    assert main([*arguments, "--split", "folders"]) == 2
    assert "expected folders of two splits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("copy", "photo"),
    [
        ("train/images/IMG_8_jpg.rf.8f4ff31e78de5857.jpg", "valid/images/IMG_8_jpg.rf.0011.jpg"),
        ("a_aug.jpg", "a.png"),
        ("a_augmented_3.jpg", "a.jpg"),
        ("a-aug-12.jpg", "a.jpg"),
        ("a_hflip.jpg", "a_rot90.jpg"),
        ("aug_2_photo.jpg", "photo.jpg"),
        ("dogs_original_photo.jpg_1f0c2a9d-3e4f.jpg", "photo.jpg"),
        ("augmented/a.jpg", "images/a.jpg"),
    ],
)
def test_copies_have_the_name_of_their_photo(copy: str, photo: str) -> None:
    assert photo_name(copy).common == photo_name(photo).common and photo_name(copy).is_copy


def test_other_names_are_no_copies() -> None:
    names = ("august.jpg", "daug.jpg", "augustus_2.jpg", "flip.jpg", "a (1).jpg", "a.rf.jpg", "IMG_0012.jpg")
    assert [name for name in names if photo_name(name).is_copy] == []


MARKS = st.sampled_from(["_jpg.rf.{0:08x}", "_aug_{0}", "_augmented_{0}", "-aug{0}", ".augmented.{0}", "_hflip_{0}"])
PHOTOS = st.lists(st.tuples(MARKS, st.integers(0, 4)), min_size=1, max_size=25)


def split_of(images: list[str], fraction: float, seed: int, folder: Path) -> dict[str, str]:
    """The split of each image; their contents are not compared."""
    staging = StagingDatabase(folder / "staging.sqlite", seed)
    for image in images:
        staging.add(Candidate(image, image.replace(".", "_").replace("/", "_"), ""))
    plans, _ = staging.plan_shards(SplitRules(fraction), samples_per_shard=7)
    sql = "SELECT c.image FROM positions JOIN candidates c USING (number) WHERE position BETWEEN ? AND ?"
    rows = [(plan, staging._database.execute(sql, (plan.first, plan.last - 1)).fetchall()) for plan in plans]
    staging.commit()
    staging.close()
    return {image.decode(): plan.split for plan, images_of in rows for (image,) in images_of}


@QUICK
@given(photos=PHOTOS, fraction=st.floats(0, 1), seed=st.integers(0, 9), order=st.randoms(use_true_random=False))
def test_no_group_is_in_two_splits(
    photos: list[tuple[str, int]],
    fraction: float,
    seed: int,
    order: random.Random,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    images = {
        f"{'train/' if i % 2 else 'valid/'}p{i}{mark.format(n)}.jpg": i
        for i, (mark, num_copies) in enumerate(photos)
        for n in range(num_copies)
    }
    images |= {f"p{i}.jpg": i for i in range(len(photos))}
    names = sorted(images)
    folder = tmp_path_factory.mktemp("splits")
    found = split_of(names, fraction, seed, folder)
    assert sorted(found) == names
    groups = {number: {found[name] for name in names if images[name] == number} for number in images.values()}
    assert all(len(splits) == 1 for splits in groups.values())
    sizes = [sum(number == i for number in images.values()) for i in set(images.values())]
    assert abs(list(found.values()).count("val") - fraction * len(names)) <= max(sizes)
    order.shuffle(names)
    assert split_of(names, fraction, seed, folder) == found


@QUICK
@given(contents=st.lists(st.integers(0, 6), min_size=2, max_size=14), fraction=st.floats(0.1, 0.9))
def test_identical_photos_are_in_one_split(
    contents: list[int], fraction: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("photos")
    staging = StagingDatabase(folder / "staging.sqlite", 0)
    for i, content in enumerate(contents):
        (folder / f"{i}.jpg").write_bytes(bytes([content]) * 5000 + b"the same ending" * 300)
        staging.add(Candidate(f"{i}.jpg", None, ""))
    plans, report = staging.plan_shards(SplitRules(fraction, images=folder), samples_per_shard=100)
    sql = "SELECT c.image FROM positions JOIN candidates c USING (number) WHERE position BETWEEN ? AND ?"
    splits: dict[int, set[str]] = {}
    for plan in plans:
        for (image,) in staging._database.execute(sql, (plan.first, plan.last - 1)):
            splits.setdefault(contents[int(image.decode()[:-4])], set()).add(plan.split)
    staging.close()
    assert all(len(found) == 1 for found in splits.values())
    assert report.num_identical == sum(contents.count(content) > 1 for content in contents)


def targets_of(out: Path) -> dict[str, list[tuple[str, int]]]:
    """(phrase, number of boxes) of every target, by key; all tars."""
    found = {}
    for path in out.glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    record = json.loads(tar.extractfile(member).read())  # type: ignore[union-attr]
                    found[record["key"]] = [(t["phrase"], len(t["boxes_xyxy"])) for t in record["targets"]]
    return found


def rejected(out: Path) -> list[str]:
    return [json.loads(line)["reason"] for line in (out / "rejected.jsonl").read_bytes().splitlines()]


def test_22_a_photo_without_annotations_has_absent_targets(tmp_path: Path, capsys: Any) -> None:
    found = built(tmp_path / "out", CASES / "22-background" / "in", "--negatives", "0.2", "--val-fraction", "0")
    ((phrase, num_boxes),) = targets_of(tmp_path / "out")[next(key for key in found["train"] if "images_b" in key)]
    assert phrase in ("dog", "cat") and num_boxes == 0 and rejected(tmp_path / "out") == []
    assert "1 of 1 photos without annotations are used" in capsys.readouterr().out
    built(tmp_path / "plain", CASES / "22-background" / "in", "--val-fraction", "0")
    assert rejected(tmp_path / "plain") == ["no_targets"]


@pytest.mark.parametrize("annotation_format", ["yolo", "voc", "coco"])
def test_background_of_every_detection_format(tmp_path: Path, annotation_format: str) -> None:
    photos = {"a": "dog", "b": "", "c": "cat", "d": "cat"}
    for i, name in enumerate(photos):
        write_photo(tmp_path / "in" / f"{name}.png", (60, 40), i)
    if annotation_format == "coco":
        boxes = [
            {"id": i, "image_id": i, "category_id": label, "bbox": [3, 5, 20, 10]}
            for i, label in enumerate(photos.values())
            if label
        ]
        images = [{"id": i, "file_name": f"{name}.png", "width": 60, "height": 40} for i, name in enumerate(photos)]
        labels = [{"id": name, "name": name} for name in ("dog", "cat")]
        content = {"images": images, "annotations": boxes, "categories": labels}
        (tmp_path / "in" / "i.json").write_text(json.dumps(content))
    for name, label in photos.items():
        box = f"{int(label == 'cat')} 0.5 0.5 0.25 0.5\n" if label else ""
        corners = "<bndbox><xmin>3</xmin><ymin>5</ymin><xmax>23</xmax><ymax>15</ymax></bndbox>"
        item = f"<object><name>{label}</name>{corners}</object>" if label else ""
        if annotation_format == "yolo":
            (tmp_path / "in" / f"{name}.txt").write_text(box)
            (tmp_path / "in" / "classes.txt").write_text("dog\ncat\n")
        elif annotation_format == "voc":
            text = f"<annotation><filename>{name}.png</filename>{item}</annotation>"
            (tmp_path / "in" / f"{name}.xml").write_text(text)
    built(tmp_path / "out", tmp_path / "in", "--negatives", "0.3")
    targets = targets_of(tmp_path / "out")
    assert targets["b"] and all(count == 0 for _, count in targets["b"])
    assert all(count == 1 for name in "acd" for phrase, count in targets[name] if phrase == photos[name])


def test_why_there_are_fewer_absent_targets_is_said_in_numbers(tmp_path: Path, capsys: Any) -> None:
    found = built(tmp_path / "out", yolo(tmp_path / "in", a=1, b=2, c=3, d=4), "--negatives", "0.5")
    assert found["index"]["negatives"]["share_reached"] == 0
    printed = capsys.readouterr().out
    assert "4 were needed, 0 added" in printed
    assert "4 found nothing that is certainly absent among 1 usable name" in printed


def test_31_labels_that_differ_in_blanks_are_one_target(tmp_path: Path) -> None:
    found = built(tmp_path / "out", CASES / "31-label-spelling" / "in", "--val-fraction", "0")
    (targets,) = targets_of(tmp_path / "out").values()
    assert dict(targets)["dog"] == 2 and len(targets) == len(dict(targets))
    assert [row["reason"] for row in found["notes"]] == ["labels_joined"]


LABELS = st.text(st.sampled_from("ab é 狗\u3000\u00a0"), min_size=1, max_size=6).filter(str.strip)


@QUICK
@given(counts=st.dictionaries(LABELS, st.integers(1, 3), min_size=1, max_size=6))
def test_labels_keep_all_their_boxes(counts: dict[str, int]) -> None:
    boxes: dict[str, list[Any]] = {
        label: [(0.0, 0.0, 1.0, float(i + 1)) for i in range(n)] for label, n in counts.items()
    }
    problems: list[Problem] = []
    targets = make_targets(boxes, "", problems)
    assert sum(len(target.boxes_xyxy) for target in targets) == sum(counts.values())
    assert len({" ".join(target.phrase.split()) for target in targets}) == len(targets)
    assert all(problem.is_note for problem in problems)
