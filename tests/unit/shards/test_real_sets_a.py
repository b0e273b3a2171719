"""Data sets of other people in the formats of labelling tools: every image, box and flaw is accounted for.

The numbers are those of the README beside the data.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from PIL import Image

from cogvlm_ft.data.reader import MAX_PIXELS
from cogvlm_ft.data.record import Record
from cogvlm_ft.errors import DataError
from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.shards.formats.coco import read_coco, recognise_coco
from cogvlm_ft.shards.formats.csv_boxes import read_csv_boxes, recognise_csv_boxes
from cogvlm_ft.shards.formats.labelme import read_labelme, recognise_labelme
from cogvlm_ft.shards.formats.voc import read_voc, recognise_voc
from cogvlm_ft.shards.formats.yolo import read_yolo, recognise_yolo
from cogvlm_ft.shards.packing.candidates import Candidate, Problem
from cogvlm_ft.shards.packing.checks import check_candidate

DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data"
READ = {"coco": read_coco, "csv": read_csv_boxes, "labelme": read_labelme, "voc": read_voc, "yolo": read_yolo}
RECOGNISE = {
    "coco": recognise_coco,
    "csv": recognise_csv_boxes,
    "labelme": recognise_labelme,
    "voc": recognise_voc,
    "yolo": recognise_yolo,
}

COCO128 = DATA / "coco128_train"
RACCOONS = DATA / "voc_raccoon"
LABELME = DATA / "labelme_examples" / "examples"
CARS = DATA / "small_targets_aerial_cars"
TOLOKA = DATA / "refexp_toloka"
XFUND = DATA / "chinese_document_xfund"
XLABEL = DATA / "xlabel_phrases"

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"the real data sets are not in {DATA}")


@dataclass
class Found:
    """What is left of a set after its images were looked at. problems: what is lost."""

    records: dict[str, Record] = field(default_factory=dict)
    exts: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)

    @property
    def num_boxes(self) -> int:
        return sum(len(boxes) for boxes in self.boxes.values())

    @property
    def reasons(self) -> Counter[str]:
        return Counter(problem.reason for problem in self.problems)

    @property
    def boxes(self) -> dict[tuple[str, str], tuple[Box, ...]]:
        """By the name of the image and the phrase."""
        return {
            (Path(image).name, target.phrase): target.boxes_xyxy
            for image, record in self.records.items()
            for target in record.targets
        }

    def sources(self, reason: str) -> list[str]:
        return sorted(problem.source for problem in self.problems if problem.reason == reason)


def read(name: str, annotations: Path, images: Path) -> Found:
    """The only format that takes these annotations to be its own must be this one."""
    assert [other for other, recognise in RECOGNISE.items() if recognise(annotations)] == [name]
    found = Found()
    for part in READ[name](annotations, images):
        if isinstance(part, Candidate):
            assert part.image not in found.records
            sample, problems = check_candidate(part, "k", images, MAX_PIXELS)
            found.problems += (problem for problem in problems if not problem.is_note)
            if sample:
                found.records[part.image] = sample.record
                found.exts[sample.ext] += 1
        elif not part.is_note:
            found.problems.append(part)
    return found


def assert_same(boxes: tuple[Box, ...], others: tuple[Box, ...], tolerance_px: float) -> None:
    """In any order."""
    left = list(others)
    for box in boxes:
        distance = {other: max(abs(a - b) for a, b in zip(box, other, strict=True)) for other in left}
        nearest = min(left, key=distance.__getitem__)
        assert distance[nearest] <= tolerance_px
        left.remove(nearest)
    assert not left


def phrases(found: Found) -> Iterator[str]:
    return (target.phrase for record in found.records.values() for target in record.targets)


def test_raccoons_are_the_same_as_voc_and_as_csv() -> None:
    voc = read("voc", RACCOONS / "annotations", RACCOONS / "images")
    table = read("csv", RACCOONS / "data" / "raccoon_labels.csv", RACCOONS / "images")
    assert (len(voc.records), voc.num_boxes, voc.problems) == (200, 217, [])
    assert voc.boxes == table.boxes and not table.problems
    parts = [read("csv", RACCOONS / "data" / f"{part}_labels.csv", RACCOONS / "images") for part in ("train", "test")]
    assert [(len(part.records), part.num_boxes) for part in parts] == [(160, 173), (40, 44)]
    assert {**parts[0].boxes, **parts[1].boxes} == voc.boxes


def test_the_flaws_of_the_raccoons() -> None:
    """Greyscale photos are used; identical photos with different boxes are for the review to find."""
    found = read("voc", RACCOONS / "annotations", RACCOONS / "images")
    for number in (150, 152, 161):
        assert f"raccoon-{number}.jpg" in found.records
        with Image.open(RACCOONS / "images" / f"raccoon-{number}.jpg") as image:
            assert image.mode == "L"
    assert found.boxes["raccoon-11.jpg", "raccoon"] == ((3, 1, 461, 431),)
    assert found.boxes["raccoon-116.jpg", "raccoon"] == ((3, 1, 436, 430),)
    corners = [box for boxes in found.boxes.values() for box in boxes]
    assert min(min(box) for box in corners) == 1  # these boxes count pixels from 1: the numbers stay as they are


def test_the_whole_folder_of_the_raccoons_is_understood_too() -> None:
    found = read("voc", RACCOONS, RACCOONS)
    assert (len(found.records), found.num_boxes, found.problems) == (200, 217, [])


@pytest.fixture(scope="module")
def coco128() -> Found:
    return read("coco", COCO128 / "coco_json" / "instances_train2017.json", COCO128 / "images" / "train2017")


def test_coco128_as_coco(coco128: Found) -> None:
    assert (len(coco128.records), coco128.num_boxes) == (126, 929)
    assert coco128.reasons == {"crowd": 10, "no_targets": 2}
    assert coco128.sources("no_targets") == ["image id 250", "image id 508"]
    content = json.loads((COCO128 / "coco_json" / "instances_train2017.json").read_bytes())
    crowds = [int(source[len("annotations[") : -1]) for source in coco128.sources("crowd")]
    images = sorted(content["annotations"][i]["image_id"] for i in crowds)
    assert images == [149, 257, 315, 315, 357, 438, 540, 544, 564, 643]


@pytest.mark.parametrize(
    ("labels", "images"),
    [("object_detection/labels/train2017", "images/train2017"), ("object_detection", "images")],
)
def test_coco128_as_yolo(coco128: Found, labels: str, images: str) -> None:
    found = read("yolo", COCO128 / labels, COCO128 / images)
    assert (len(found.records), found.num_boxes) == (126, 929)
    assert [Path(source).name for source in found.sources("missing_image")] == ["000000000656.txt", "000000000659.txt"]
    assert found.reasons == {"missing_image": 2}
    assert "000000000086.jpg" in {Path(image).name for image in found.records}  # greyscale
    assert found.boxes.keys() == coco128.boxes.keys()
    for name, boxes in found.boxes.items():
        assert_same(boxes, coco128.boxes[name], tolerance_px=0.01)


def test_boxes_without_an_image_are_counted_with_their_file() -> None:
    candidates = {
        part.source: part
        for part in read_yolo(COCO128 / "object_detection" / "labels" / "train2017", COCO128 / "images" / "train2017")
        if isinstance(part, Candidate)
    }
    gone = [candidates[f"000000000{number}.txt"] for number in (656, 659)]
    assert sum(len(target.boxes_xyxy) for candidate in gone for target in candidate.targets) == 12


def test_aerial_cars() -> None:
    found = read("yolo", CARS, CARS)
    assert (len(found.records), found.num_boxes) == (42, 744)
    assert found.sources("missing_image") == ["DJI_0006.txt", "DJI_0007.txt"]
    assert found.sources("no_targets") == ["yakubava.txt"]
    assert len(found.problems) == 3
    assert set(phrases(found)) <= {"car", "truck", "bus", "minibus", "cyclist"}
    gone = [part for part in read_yolo(CARS, CARS) if isinstance(part, Candidate) and part.source.startswith("DJI_000")]
    lost = [part for part in gone if part.source in ("DJI_0006.txt", "DJI_0007.txt")]
    assert sum(len(target.boxes_xyxy) for part in lost for target in part.targets) == 37


def test_labelme_rectangles_are_the_same_as_json_and_as_voc() -> None:
    folder = LABELME / "bbox_detection"
    found = read("labelme", folder / "data_annotated", folder / "data_annotated")
    assert (len(found.records), found.num_boxes, found.problems) == (3, 9, [])
    converted = read("voc", folder / "data_dataset_voc", folder / "data_dataset_voc")
    assert converted.boxes == found.boxes and not converted.problems


def test_labelme_polygons_are_the_same_as_json_and_as_coco() -> None:
    """Of 18 polygons two are __ignore__, and four are further parts of an object that another one begins."""
    folder = LABELME / "instance_segmentation"
    found = read("labelme", folder / "data_annotated", folder / "data_annotated")
    assert (len(found.records), found.num_boxes) == (3, 12)
    assert found.reasons == {"ignored_label": 2, "joined_part": 4}
    converted = folder / "data_dataset_coco"
    coco = read("coco", converted / "annotations.json", converted)
    assert (len(coco.records), coco.num_boxes, coco.problems) == (3, 12, [])
    assert coco.boxes.keys() == found.boxes.keys()
    for name, boxes in found.boxes.items():
        assert_same(boxes, coco.boxes[name], tolerance_px=1.5)  # the conversion counts whole pixels


def test_labelme_json_that_names_itself() -> None:
    folder = LABELME / "tutorial"
    found = read("labelme", folder, folder)
    assert list(found.records) == ["apc2016_obj3.jpg"] and found.num_boxes == 4 and not found.problems


def test_labelme_photo_inside_the_json(tmp_path: Path) -> None:
    """As above, where the photo is not among the images."""
    found = read("labelme", LABELME / "tutorial", tmp_path)
    assert list(found.records) == ["apc2016_obj3.json"] and found.num_boxes == 4 and not found.problems
    assert found.exts == {"jpg": 1} and found.records["apc2016_obj3.json"].image_size_px == (1210, 907)


def test_chinese_documents() -> None:
    found = read("labelme", XFUND, XFUND)
    assert (len(found.records), found.num_boxes) == (3, 182)
    assert found.reasons == {"bad_json": 1} and found.problems[0].source.endswith("ppocr_kie.json")
    assert found.exts == {"jpg": 2, "png": 1}
    texts = [target for record in found.records.values() for target in record.targets for _ in target.boxes_xyxy]
    japanese = [target for target in texts if target.phrase == "だいビようボ。未来は元気だよ"]
    assert len(japanese) == 1
    assert sum(target.language == "zh" for target in texts) == 137 + len(japanese)  # it has Chinese characters, too
    form = next(record for image, record in found.records.items() if image.endswith("zh_train_0.jpg"))
    boxes = {target.phrase: target.boxes_xyxy for target in form.targets}
    assert boxes["汇丰晋信"] == ((104, 114, 530, 175),)


def test_phrases_of_x_anylabeling() -> None:
    found = read("labelme", XLABEL / "examples", XLABEL / "examples")
    assert (len(found.records), found.num_boxes, found.problems) == (4, 88, [])
    assert found.exts == {"jpg": 2, "jpeg": 1, "webp": 1}
    parlor = next(record for image, record in found.records.items() if image.endswith("parlor.jpeg"))
    (target,) = parlor.targets
    assert target.phrase.startswith("armchair | lamp |") and "| stool 扶手椅 | 灯" in target.phrase
    assert target.language == "zh" and target.boxes_xyxy == ((0, 0, 1124, 750),)
    assert {"car | suv", "helmet", "person", "vehicle"} <= set(phrases(found))
    assert not any("\n" in phrase for phrase in phrases(found))


def test_detections_of_a_photo_that_is_not_there() -> None:
    coco = read("coco", XLABEL / "assets" / "annotations" / "coco_detection.json", XLABEL)
    assert not coco.records and coco.reasons["no_targets"] + coco.reasons["unsupported_extension"] == 13
    with pytest.raises(DataError, match="no file of class names"):  # there is only labelme's labels.txt
        read("yolo", XLABEL / "assets" / "labels", XLABEL)


def test_toloka() -> None:
    train = read("csv", TOLOKA / "train_sample.csv", TOLOKA / "images")
    test = read("csv", TOLOKA / "test_public.csv", TOLOKA / "images")
    assert [found.reasons for found in (train, test)] == [{"missing_image": 999}, {"missing_image": 1705}]
    assert list(train.records) == ["000000002473.jpg"] and train.num_boxes == 1
    assert not test.records
    (target,) = train.records["000000002473.jpg"].targets
    assert target.language == "en" and target.phrase.endswith("?")


def test_every_question_of_toloka_has_its_box() -> None:
    parts = [
        part for name in ("train_sample", "test_public") for part in read_csv_boxes(TOLOKA / f"{name}.csv", TOLOKA)
    ]
    candidates = [part for part in parts if isinstance(part, Candidate)]
    assert len(candidates) == len(parts) == 2705
    for candidate in candidates:
        (target,) = candidate.targets
        ((x0, y0, x1, y1),) = target.boxes_xyxy
        assert candidate.stated_size_px and not candidate.problems
        assert 0 <= x0 < x1 <= candidate.stated_size_px[0] and 0 <= y0 < y1 <= candidate.stated_size_px[1]
        assert "  " not in target.phrase
