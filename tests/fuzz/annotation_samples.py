"""Annotations of every format, real ones where there are some, to be changed; and how much is given in them."""

from __future__ import annotations

import io
import json
import pickle
import random
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from mutate import mutate_bytes, mutate_json, mutate_text, mutated_value

from cogvlm_ft.shards.packing.candidates import Candidate, Problem

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
LABELME = DATA / "labelme_examples" / "examples"
XLABEL = DATA / "xlabel_phrases"
WITNESS = "witness"
"""Stem of an image whose annotation is not changed: it must never be lost."""
SIZE = (400, 300)

Parts = list[Candidate | Problem]
Given = Callable[[bytes], int | None]
Found = Callable[[Parts], int | None]


@dataclass(frozen=True)
class Sample:
    """files: by path; values are written as JSON, lists in .jsonl as lines. changed: the one that is mutated.

    annotations: what the reader is given. images: width and height by path.
    given, found: how many boxes, rows or sentences there are in the changed file, and how many of them came out or were
        reported; None where that cannot be told.
    num_images: how many images it is about.
    """

    format: str
    files: dict[str, Any]
    changed: str
    annotations: str = ""
    images: dict[str, tuple[int, int]] = field(default_factory=dict)
    given: Given = lambda data: None
    found: Found = lambda parts: None
    has_witness: bool = True
    num_images: Given = lambda data: None

    def mutated(self, rng: random.Random) -> dict[str, bytes]:
        """The files, one of them changed."""
        files = {path: _to_bytes(path, value) for path, value in self.files.items()}
        value, data = self.files[self.changed], files[self.changed]
        if self.changed.endswith(".jsonl"):
            files[self.changed] = _mutated_lines(rng, value)
        elif self.changed.endswith(".csv"):
            head, *lines = data.split(b"\n")
            last = lines.pop()
            changed = mutate_text(rng, b"\n".join(lines)) if rng.random() < 0.9 else b""
            files[self.changed] = b"\n".join((head, changed, last))
        elif isinstance(value, bytes):
            files[self.changed] = mutate_text(rng, data)
        elif self.changed.endswith(".p"):
            files[self.changed] = mutate_bytes(rng, data) if rng.random() < 0.4 else _pickle(mutated_value(rng, value))
        else:
            files[self.changed] = mutate_json(rng, value)
        return files


def samples() -> dict[str, Callable[[], Sample]]:
    """By name. A real one skips its test if its file is not there."""
    return {
        "coco": _coco,
        "voc": _voc,
        "cvat": _cvat,
        "cvat tracks": _cvat_tracks,
        "label studio": _label_studio,
        "label studio min": _label_studio_min,
        "yolo": _yolo,
        "labelme": _labelme,
        "x-anylabeling": _x_anylabeling,
        "csv": _csv,
        "csv of questions": _csv_of_questions,
        "csv of retinanet": _csv_of_retinanet,
        "csv of openimages": _csv_of_openimages,
        "refcoco refs": lambda: _refcoco("refs(unc).p"),
        "refcoco instances": lambda: _refcoco("instances.json"),
        "grefcoco": _grefcoco,
        "mdetr": _mdetr,
        "odvg": _odvg,
        "odvg of a tool": _odvg_of_a_tool,
        "cogvlm-sft": _cogvlm_sft,
        "swift": _swift,
        "qwen": _qwen,
        "internvl": _internvl,
        "boxes in JSON": _boxes_in_json,
        "jsonl": _jsonl,
        "jsonl pairs": _jsonl_pairs,
        "jsonl pairs of other box text": _jsonl_pairs_of_other_box_text,
        "jsonl array": _jsonl_array,
    }


def real(path: Path) -> bytes:
    """Skips the test if this part of the shared data is not there."""
    if not path.is_file():
        pytest.skip(f"no {path.relative_to(DATA)} in ../shared/data")
    return path.read_bytes()


def _to_bytes(path: str, value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if path.endswith(".p"):
        return _pickle(value)
    if path.endswith(".jsonl"):
        return b"\n".join(json.dumps(row, ensure_ascii=False).encode() for row in value)
    return json.dumps(value, ensure_ascii=False).encode()


def _pickle(value: Any) -> bytes:
    buffer = io.BytesIO()
    pickle.Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue()


def _mutated_lines(rng: random.Random, rows: list[Any]) -> bytes:
    """All but the last row are changed or left; at times the bytes, too."""
    lines = [mutate_json(rng, row) if rng.random() < 0.7 else _to_bytes("", row) for row in rows[:-1]]
    return b"\n".join([*lines, _to_bytes("", rows[-1])])


def _boxes_and_problems(*one_each: str, ignored: str = "\0") -> Found:
    """Boxes and lost boxes. one_each: reasons of targets that stand for one box. ignored: start of sources."""
    none_each = ("no_boxes_left", "no_boxes")  # each box that they had has a problem of its own

    def found(parts: Parts) -> int | None:
        num_boxes = sum(len(target.boxes_xyxy) for part in candidates_of(parts) for target in part.targets)
        for problem in problems_of(parts):
            if problem.source.startswith(ignored) or problem.reason in none_each:
                continue
            if problem.level != "box" and problem.reason not in one_each:
                return None
            num_boxes += 1
        return num_boxes

    return found


def candidates_of(parts: Parts) -> list[Candidate]:
    return [part for part in parts if isinstance(part, Candidate)]


def problems_of(parts: Parts) -> list[Problem]:
    """What is lost, also those of candidates."""
    return [problem for problem in _all_problems(parts) if not problem.is_note]


def notes_of(parts: Parts) -> list[Problem]:
    return [problem for problem in _all_problems(parts) if problem.is_note]


def _all_problems(parts: Parts) -> list[Problem]:
    lists = [part.problems if isinstance(part, Candidate) else (part,) for part in parts]
    return [problem for problems in lists for problem in problems]


def _in_json(count: Callable[[Any], int | None]) -> Given:
    def given(data: bytes) -> int | None:
        try:
            return count(json.loads(data.removeprefix(b"\xef\xbb\xbf")))
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            return None

    return given


def _coco() -> Sample:
    content = json.loads(real(LABELME / "instance_segmentation/data_dataset_coco/annotations.json"))
    images = {image["file_name"]: (image["width"], image["height"]) for image in content["images"]}
    found = _boxes_and_problems(ignored="categories[")
    given = _in_json(lambda value: len(value["annotations"]))
    num_images = _in_json(lambda value: len(value["images"]))
    return Sample("coco", {"a.json": content}, "a.json", "a.json", images, given, found, False, num_images)


def _voc() -> Sample:
    xml = real(DATA / "voc_raccoon/annotations/raccoon-63.xml")
    witness = (
        b"<annotation><filename>witness.jpg</filename><object><name>dog</name><bndbox><xmin>1</xmin><ymin>2</ymin>"
        b"<xmax>30</xmax><ymax>20</ymax></bndbox></object></annotation>"
    )

    def given(data: bytes) -> int | None:
        try:
            return 1 + len(ET.fromstring(data).findall("object"))
        except (ET.ParseError, ValueError, LookupError):
            return None

    files = {"raccoon-63.xml": xml, "witness.xml": witness}
    images = {"raccoon-63.jpg": (600, 400), "witness.jpg": SIZE}
    found = _boxes_and_problems("empty_phrase")
    return Sample("voc", files, "raccoon-63.xml", "", images, given, found, num_images=lambda data: 2)


def _cvat() -> Sample:
    witness = '<image name="witness.jpg" width="400" height="300"><box label="dog" xtl="1" ytl="2" xbr="30" ybr="20"/>'
    xml = """<?xml version="1.0" encoding="utf-8"?><annotations>
<version>1.1</version>
<image id="0" name="sub/a.jpg" subset="train" width="400" height="300">
<box label="dog" source="manual" occluded="0" xtl="1.5" ytl="2.5" xbr="210" ybr="120" rotation="30.0" z_order="0">
<attribute name="colour">red</attribute></box>
<polygon label="猫" points="10.0,20.0;110,20;110.5,200" group_id="1"/>
<polygon label="猫" points="1,2;11,2;11,20" group_id="1"/><polyline label="lane" points="1,2;11,2"/>
<points label="eye" points="1,2"/><ellipse label="ball" cx="50" cy="60" rx="20" ry="10" rotation="45"/>
<mask label="grass" rle="3, 4, 5" left="10" top="20" width="4" height="3"/><tag label="night"/>
<cuboid label="box" xtl1="1" ytl1="2" xbl1="1" ybl1="30" xtr1="20" ytr1="3" xbr1="20" ybr1="33" xtl2="5" ytl2="6"
 xbl2="7" ybl2="8" xtr2="25" ytr2="3" xbr2="25" ybr2="30"/>
<skeleton label="person"><points label="head" points="5,5"/></skeleton></image>"""
    return _cvat_like(f"{xml}{witness}</image></annotations>", {"sub/a.jpg": SIZE, "witness.jpg": SIZE})


def _cvat_tracks() -> Sample:
    xml = """<annotations>
<meta><task><original_size><width>400</width><height>300</height></original_size></task></meta>
<track id="0" label="dog"><box frame="7" outside="0" xtl="1" ytl="2" xbr="30" ybr="20"/></track>
<track id="1" label="car" source="manual">
<box frame="0" keyframe="1" outside="0" occluded="0" xtl="1" ytl="2" xbr="30" ybr="40"/>
<box frame="1" keyframe="0" outside="1" occluded="0" xtl="2" ytl="2" xbr="31" ybr="40"/></track>
<track id="2" label="人"><polygon frame="0" outside="0" points="1,2;30,2;30,50"/>
<points frame="1" outside="0" points="1,2"/><box frame="1" outside="0" xtl="2" ytl="2" xbr="31" ybr="40"/></track>
</annotations>"""
    return _cvat_like(
        xml, dict.fromkeys(("images/frame_000000.PNG", "frame_000001.jpg", "images/frame_000007.jpg"), SIZE)
    )


def _cvat_like(xml: str, images: dict[str, tuple[int, int]]) -> Sample:
    def given(data: bytes) -> int | None:
        try:
            tree = ET.fromstring(data)
        except (ET.ParseError, ValueError, LookupError):
            return None
        shapes = [shape for name in ("image", "track") for one in tree.findall(name) for shape in one]
        return len(shapes)

    def found(parts: Parts) -> int | None:
        num_boxes = _boxes_and_problems()(parts)
        num_outside = sum(problem.reason == "outside" for problem in notes_of(parts))
        return None if num_boxes is None else num_boxes + num_outside

    files = {"a.xml": xml.encode()}
    return Sample("cvat", files, "a.xml", "a.xml", images, given, found, has_witness=False)


def _label_studio() -> Sample:
    def result(kind: str, number: str, **value: Any) -> dict[str, Any]:
        size = {"original_width": 400, "original_height": 300, "image_rotation": 0}
        return {"id": number, "type": kind, "from_name": "label", "to_name": "image", **size, "value": value}

    box = {"x": 10.5, "y": 20, "width": 30, "height": 40.25, "rotation": 0}
    shapes = [
        result("rectanglelabels", "a", **box, rectanglelabels=["dog"]),
        result("rectanglelabels", "b", **{**box, "rotation": 15}, rectanglelabels=["狗"]),
        result("polygonlabels", "c", points=[[1, 2], [30, 2.5], [30, 40]], polygonlabels=["cat"], closed=True),
        result("ellipselabels", "d", x=50, y=50, radiusX=10, radiusY=20, rotation=0, ellipselabels=["ball"]),
        result("keypointlabels", "e", x=50, y=50, width=1, keypointlabels=["eye"]),
    ]
    text = [
        result("rectangle", "f", **box),
        result("labels", "f", **box, labels=["Text"]),
        result("textarea", "f", **box, text=["出口"]),
    ]
    whole = [result("choices", "g", choices=["night"]), {"type": "relation", "from_id": "a", "to_id": "b"}]
    annotations = [
        {"id": 5, "result": shapes, "was_cancelled": False, "updated_at": "2026-01-02T00:00:00Z"},
        {"id": 6, "result": text[:1], "was_cancelled": False, "updated_at": "2026-01-01T00:00:00Z"},
        {"id": 7, "result": [], "was_cancelled": True},
    ]
    tasks = [
        {"id": 1, "data": {"image": "/data/upload/1/0a1b2c3d-a.jpg"}, "annotations": annotations, "predictions": []},
        {
            "id": 2,
            "data": {"image": "https://example.org/b.jpg"},
            "annotations": [{"id": 8, "result": [*text, *whole]}],
        },
    ]
    return _label_studio_like(tasks, lambda task: [result for one in task["annotations"] for result in one["result"]])


def _label_studio_min() -> Sample:
    size = {"original_width": 400, "original_height": 300}
    box = {"x": 10, "y": 20, "width": 30, "height": 40, "rotation": 0, **size}
    tasks = [
        {
            "image": "/data/local-files/?d=a.jpg",
            "id": 1,
            "label": [{**box, "rectanglelabels": ["dog"]}],
            "annotator": 1,
        },
        {"image": "b.jpg", "id": 2, "label": [{**box, "rectanglelabels": ["猫"]}, box], "annotation_id": 7},
        {"image": "b.jpg", "id": 2, "shape": [{"points": [[1, 2], [3, 4], [5, 1]], "polygonlabels": ["a"], **size}]},
    ]
    return _label_studio_like(
        tasks,
        lambda task: [
            region
            for regions in task.values()
            for region in (regions if isinstance(regions, list) else ())
            if isinstance(region, dict)
        ],
    )


def _label_studio_like(tasks: list[Any], regions_of: Callable[[Any], list[Any]]) -> Sample:
    def num_regions(content: Any) -> int | None:
        regions = [region for task in content for region in regions_of(task)]
        values = [region.get("value", region) for region in regions]
        labels = [value[name] for value in values for name in value if name.endswith("labels")]
        return len(regions) if all(isinstance(one, list) and len(one) == 1 for one in labels) else None

    def found(parts: Parts) -> int | None:
        num_boxes = _boxes_and_problems()(parts)
        num_others = sum(problem.reason == "not_a_target" for problem in notes_of(parts))
        return None if num_boxes is None else num_boxes + num_others

    images = {"0a1b2c3d-a.jpg": SIZE, "a.jpg": SIZE, "b.jpg": SIZE}
    given = _in_json(num_regions)
    return Sample("label-studio", {"a.json": tasks}, "a.json", "a.json", images, given, found, has_witness=False)


def _yolo() -> Sample:
    lines = real(DATA / "coco128_train/object_detection/labels/train2017/000000000009.txt")
    names = b"\n".join(b"class %d" % number for number in range(80))
    files = {"9.txt": lines, "witness.txt": b"0 0.5 0.5 0.2 0.1\n", "classes.txt": names}

    def given(data: bytes) -> int:
        text = data.decode("utf-8-sig", "surrogateescape").replace("\r", "\n")
        return 1 + sum(bool(line.strip()) for line in text.split("\n"))

    images = {"9.jpg": (640, 480), "witness.jpg": SIZE}
    return Sample("yolo", files, "9.txt", "", images, given, _boxes_and_problems(), num_images=lambda data: 2)


def _labelme_like(path: Path) -> Sample:
    content = json.loads(real(path))
    witness = {"imagePath": "witness.jpg", "shapes": [{"label": "dog", "points": [[1, 2], [30, 2], [30, 20]]}]}
    images = {content["imagePath"]: (content["imageWidth"], content["imageHeight"]), "witness.jpg": SIZE}
    given = _in_json(lambda value: 1 + len(value["shapes"]))
    found = _boxes_and_problems("empty_phrase")
    files = {"a.json": content, "witness.json": witness}
    return Sample("labelme", files, "a.json", "", images, given, found, num_images=lambda data: 2)


def _labelme() -> Sample:
    return _labelme_like(LABELME / "bbox_detection/data_annotated/2011_000006.json")


def _x_anylabeling() -> Sample:
    return _labelme_like(XLABEL / "examples/description/tagging/sources/shape-level/parlor.json")


def _given_rows(data: bytes) -> int | None:
    """Lines of a CSV without its head, where every line is a row."""
    if b'"' in data or b"\r" in data or max(map(len, data.split(b"\n"))) > 1000:
        return None
    return sum(bool(line.strip(b", \t\f\v")) for line in data.split(b"\n")[1:])


def _found_rows(parts: Parts) -> int:
    boxes = [box for part in candidates_of(parts) for target in part.targets for box in target.boxes_xyxy]
    return len(boxes) + sum(problem.reason != "no_boxes_left" for problem in problems_of(parts))


def _csv() -> Sample:
    rows = [line.rstrip() for line in real(DATA / "voc_raccoon/data/test_labels.csv").split(b"\n")][:8]
    images = {row.split(b",")[0].decode(): tuple(map(int, row.split(b",")[1:3])) for row in rows[1:]}
    data = b"\n".join([*rows, b"witness.jpg,400,300,raccoon,1,2,30,20"])
    return Sample("csv", {"a.csv": data}, "a.csv", "a.csv", {**images, "witness.jpg": SIZE}, _given_rows, _found_rows)


def _csv_of_questions() -> Sample:
    rows = real(DATA / "refexp_toloka/train_sample.csv").split(b"\n")[:6]
    names = [row.split(b",")[0].decode().rpartition("/")[2] for row in rows[1:]]
    images: dict[str, tuple[int, int]] = {
        name: tuple(map(int, row.split(b",")[1:3])) for name, row in zip(names, rows[1:], strict=True)
    }
    data = b"\n".join([*rows, b"https://example.org/witness.jpg,400,300,1,2,30,20,Where is the dog?"])
    return Sample("csv", {"a.csv": data}, "a.csv", "a.csv", {**images, "witness.jpg": SIZE}, _given_rows, _found_rows)


def _csv_of_retinanet() -> Sample:
    rows = ["first.jpg,1,2,3,4,dog", "sub/a.jpg,1,2,30,40,狗", "sub/a.jpg,5.5,6,70,80,cat", "b.jpg,,,,,"]
    data = "\n".join([*rows, "witness.jpg,1,2,30,20,dog"]).encode()
    images = dict.fromkeys(("first.jpg", "sub/a.jpg", "b.jpg", "witness.jpg"), SIZE)
    return Sample("csv", {"a.csv": data}, "a.csv", "a.csv", images)


def _csv_of_openimages() -> Sample:
    head = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsGroupOf"
    rows = ["a,x,/m/01,1,0.01,0.21,0.02,0.14,0,0", "a,x,/m/02,1,0.5,0.75,0.5,0.8,0,1", "b,x,/m/02,1,0,1,0,0.5,0,0"]
    data = "\n".join([head, *rows, "witness,x,/m/01,1,0.1,0.9,0.2,0.8,0,0"]).encode()
    images = dict.fromkeys(("a.jpg", "images/b.jpg", "witness.jpg"), SIZE)
    files = {"a.csv": data, "class-descriptions-boxable.csv": b"/m/01,Dog\n/m/02,Cat\n"}
    return Sample("csv", files, "a.csv", "a.csv", images, _given_rows, _found_rows)


def _refcoco(changed: str) -> Sample:
    def ref(number: int, image: int, *sentences: str) -> dict[str, Any]:
        texts = [{"tokens": text.split(), "raw": text, "sent_id": number, "sent": text} for text in sentences]
        name = f"COCO_train2014_{image:012d}_{number}.jpg"
        fields = {"ref_id": number, "ann_id": 10 + number, "image_id": image, "file_name": name, "split": "train"}
        return {**fields, "sentences": texts, "category_id": 1}

    refs = [ref(0, 5, "the red car", "red car on the left"), ref(1, 5, "狗"), ref(2, 9, "café")]
    names = {image: f"COCO_train2014_{image:012d}.jpg" for image in (5, 9)}
    entries = [{"id": image, "file_name": name, "width": 400, "height": 300} for image, name in names.items()]
    boxes = [{"id": 10 + i, "image_id": refs[i]["image_id"], "bbox": [5.5 * i, 2, 30, 40]} for i in range(3)]

    def given(data: bytes) -> int | None:
        if changed != "refs(unc).p":
            return 4
        try:
            found = pickle.loads(data)  # written by this test
            lists = [one.get("sentences") if isinstance(one, dict) else None for one in found]
            return sum(len(one) if isinstance(one, list) and one else 1 for one in lists)
        except Exception:
            return None

    def found(parts: Parts) -> int:
        targets = sum(len(part.targets) for part in candidates_of(parts))
        return targets + sum(problem.level == "target" for problem in problems_of(parts))

    files = {"refs(unc).p": refs, "instances.json": {"images": entries, "annotations": boxes}}
    images = dict.fromkeys(names.values(), SIZE)
    return Sample("refcoco", files, changed, "", images, given, found, has_witness=False)


def _grefcoco() -> Sample:
    def ref(number: int, ann_id: Any, *sentences: str) -> dict[str, Any]:
        texts = [{"raw": text, "sent_id": number, "sent": text} for text in sentences]
        fields = {"ref_id": number, "ann_id": ann_id, "image_id": 5, "file_name": "a.jpg", "split": "train"}
        return {**fields, "no_target": ann_id == [-1], "sentences": texts}

    refs = [
        ref(0, [7, 8], "both dogs", "the dogs"),
        ref(1, [-1], "猫"),
        ref(2, [8], "the right"),
        ref(3, 7, "left"),
    ]
    entries = [{"id": 5, "file_name": "a.jpg", "width": 400, "height": 300}]
    boxes = [{"id": 7, "image_id": 5, "bbox": [1, 2, 20, 10]}, {"id": 8, "image_id": 5, "bbox": [50, 2, 20, 10]}]

    def num_sentences(content: Any) -> int:
        lists = [one.get("sentences") if isinstance(one, dict) else None for one in content]
        return sum(len(one) if isinstance(one, list) and one else 1 for one in lists)

    def found(parts: Parts) -> int:
        targets = sum(len(part.targets) for part in candidates_of(parts))
        return targets + sum(problem.level == "target" for problem in problems_of(parts))

    files = {"grefs(unc).json": refs, "instances.json": {"images": entries, "annotations": boxes}}
    given = _in_json(num_sentences)
    return Sample("refcoco", files, "grefs(unc).json", "", {"a.jpg": SIZE}, given, found, has_witness=False)


def _mdetr() -> Sample:
    def entry(number: int, name: str, caption: str) -> dict[str, Any]:
        return {"id": number, "file_name": name, "width": 400, "height": 300, "caption": caption}

    boxes = [([1, 2, 8, 7], [[0, 11]]), ([5, 6, 100, 50], [[0, 3]]), ([10, 10, 9, 9], [[8, 13]]), ([0, 0, 9, 9], [])]
    content = {
        "images": [entry(0, "a.jpg", "the red car"), entry(1, "b.jpg", "dog and horse"), entry(2, "a.jpg", "the sky")],
        "annotations": [
            {"image_id": number, "bbox": box, "tokens_positive": tokens}
            for number, (box, tokens) in zip((0, 1, 1, 2), boxes, strict=True)
        ],
    }
    content["annotations"][3]["tokens_positive"] = [[0, 7]]
    images = {"a.jpg": SIZE, "b.jpg": SIZE}
    given = _in_json(lambda value: len(value["annotations"]))
    return Sample("mdetr", {"a.json": content}, "a.json", "a.json", images, given, _boxes_and_problems(), False)


def _rows(format_name: str, rows: list[Any], given: Given = lambda data: None, found: Found = lambda _: None) -> Sample:
    images = {name: SIZE for name in ("a.jpg", "b.jpg", "witness.jpg")}
    return Sample(format_name, {"a.jsonl": rows}, "a.jsonl", "a.jsonl", images, given, found)


def _odvg() -> Sample:
    regions = [
        {"bbox": [1, 2, 30, 40], "phrase": "a red car"},
        {"bbox": [[5, 5, 9, 9], [50, 5, 90, 9]], "phrase": "狗"},
    ]
    instances = [{"bbox": [1, 2, 90, 90], "label": 1, "category": "dog"}, {"bbox": [3, 3, 5, 5], "label": 2}]
    rows = [
        {"filename": "a.jpg", "width": 400, "height": 300, "grounding": {"caption": "a red car", "regions": regions}},
        {"filename": "b.jpg", "width": 400, "height": 300, "detection": {"instances": instances}},
        {"filename": "witness.jpg", "grounding": {"regions": [{"bbox": [1, 2, 30, 20], "phrase": "dog"}]}},
    ]
    return _rows("odvg", rows)


def _odvg_of_a_tool() -> Sample:
    def num_boxes(value: Any) -> int:
        return len(value) if isinstance(value, list) and value and isinstance(value[0], list) else 1

    content = json.loads(real(XLABEL / "assets/ODVG/od.json"))
    images = {content["filename"]: (content["width"], content["height"])}
    given = _in_json(lambda value: sum(num_boxes(entry["bbox"]) for entry in value["detection"]["instance"]))
    found = _boxes_and_problems()
    return Sample("odvg", {"od.json": content}, "od.json", "od.json", images, given, found, has_witness=False)


def _cogvlm_sft() -> Sample:
    def spoken(*texts: str) -> dict[str, Any]:
        roles = ("user", "assistant")
        return {"conversations": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}

    files = {
        "data/labels_zh/a.json": spoken("图中有什么?", "一只狗。", "狗在哪里?", "[[086,540,400,760]]"),
        "data/labels_en/a.json": {"captions": [{"role": "caption", "content": "A dog lies on the grass."}]},
        "data/labels_zh/witness.json": spoken("?", "是。"),
    }
    images = {"a.jpg": SIZE, "witness.jpg": SIZE}
    return Sample("cogvlm-sft", files, "data/labels_zh/a.json", "data", images, num_images=lambda data: 2)


def _swift() -> Sample:
    def talk(*texts: str) -> list[dict[str, str]]:
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]

    objects = {"ref": ["羊"], "bbox": [[90.9, 160.8, 135, 212.8], [30.9, 20.8, 49, 53.8]], "bbox_type": "real"}
    pair = [{"caption": "the dog", "bbox": [1, 2, 30, 20], "bbox_type": "norm1000", "image": 0}]
    rows = [
        {"messages": talk("<image>找到<ref-object>", "<bbox><bbox>"), "images": ["a.jpg"], "objects": objects},
        {"query": "Find <ref-object>", "response": "<bbox>", "images": "b.jpg", "objects": json.dumps(pair)},
        {"messages": talk("<image>Look at <ref-object>", "Yes."), "images": ["a.jpg"], "objects": {"ref": ["it"]}},
        {"messages": talk("<image>What is it?", "A dog."), "images": ["witness.jpg"]},
    ]
    return _rows("swift", rows)


def _qwen() -> Sample:
    rows = [
        {
            "query": "<img>a.jpg</img>框出图中<ref>击掌</ref>的位置",
            "response": "<ref>击掌</ref><box>(536,509),(588,602)</box>",
            "history": [["what is <ref>this</ref>?", "<box>(1,2),(3,4)</box>"]],
        },
        {
            "id": "identity_0",
            "conversations": [
                {"from": "user", "value": "Picture 1: <img>b.jpg</img>\n<|object_ref_start|>狗<|object_ref_end|>?"},
                {"from": "assistant", "value": "<|box_start|>(536, 509),(588, 602)<|box_end|>"},
                {"from": "user", "value": "What is in <box>(1,2),(30,40)</box>?"},
                {"from": "assistant", "value": "<ref>a cat</ref>"},
            ],
        },
        {"query": "<img>witness.jpg</img>?", "response": "A dog."},
    ]
    return _rows("swift", rows)


def _internvl() -> Sample:
    def row(image: str, question: str, answer: str) -> dict[str, Any]:
        talk = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        return {"id": 0, "image": image, "width": SIZE[0], "height": SIZE[1], "conversations": talk}

    rows = [
        row("a.jpg", "Where is <ref>the dog</ref>?", "<ref>the dog</ref><box>[[100, 200, 500, 600]]</box>"),
        row(
            "b.jpg",
            "找到它们",
            "<ref>狗</ref><box>[[1, 2, 3, 4], [5, 6, 7, 8]]</box>和<ref>猫</ref><box>[[9,9,20,20]]</box>",
        ),
        row("a.jpg", "<ref>车</ref>呢?", "<box>［［１，２，３０，４０］］</box>"),
        row("witness.jpg", "?", "A dog."),
    ]
    return _rows("swift", rows)


def _boxes_in_json() -> Sample:
    def row(image: str, answer: str, **more: Any) -> dict[str, Any]:
        talk = [{"role": "user", "content": "<image>Locate all"}, {"role": "assistant", "content": answer}]
        return {"messages": talk, "images": [image], **more}

    entries = [{"bbox_2d": [900, 20, 990, 940], "label": "dog"}, {"bbox_2d": [15, 250, 300, 990], "label": "一只猫"}]
    slots = '[{"bbox_2d": <bbox>, "label": "<ref-object>"}, {"bbox_2d": <bbox>, "label": "<ref-object>"}]'
    objects = {"ref": ["羊", "牛"], "bbox": [[10, 8, 30, 24], [50, 8, 80, 24]]}
    rows = [
        row("a.jpg", f"```json\n{json.dumps(entries, ensure_ascii=False)}\n```"),
        row("b.jpg", slots, objects=objects),
        row("a.jpg", json.dumps(entries[0])),
        row("witness.jpg", "A dog."),
    ]
    return _rows("swift", rows)


def _jsonl() -> Sample:
    targets = [
        {"phrase": "the red car", "boxes": [[1, 2, 30, 40], [5, 5, 90, 80.5]], "description": "it is red"},
        {"phrase": "狗", "language": "zh", "boxes_xyxy": [[0, 0, 400, 300]]},
        {"phrase": "a cat", "boxes": []},
    ]
    turns = [{"prompt": "?", "answer": "[[001,002,003,004]]", "history": [["a", "b"]]}]
    rows = [
        {"image": "a.jpg", "targets": targets, "turns": turns},
        {"image": "b.jpg", "key": "my key", "targets": targets[:2]},
        {"image": "witness.jpg", "targets": targets[:1]},
    ]

    def given(data: bytes) -> int | None:
        """Targets and turns of the lines that hold an object."""
        num_parts = 0
        for line in data.split(b"\n"):
            try:
                row = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
                num_parts += len(row["targets"]) + len(row.get("turns", []))
            except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
                return None
        return num_parts

    def found(parts: Parts) -> int | None:
        problems = problems_of(parts)
        if any(problem.level == "sample" for problem in problems):
            return None
        kept = sum(len(part.targets) + len(part.turns) for part in candidates_of(parts))
        return kept + sum(problem.level != "box" for problem in problems)

    return _rows("jsonl", rows, given, found)


def _jsonl_pairs() -> Sample:
    rows = [
        {"image": "a.jpg", "Prompt": "狗在哪里?", "Label": "图片中存在一只狗,所在区域为[[086,540,400,760]]"},
        {"Image_Path": "a.jpg", "prompt": "What is it?", "label": "A dog."},
        {"image": "b.jpg", "Prompt": "Find all dogs.", "Label": "[[086,540,400,760;001,002,003,004]]"},
        {"image": "witness.jpg", "Prompt": "?", "Label": "!"},
    ]

    return _rows("jsonl", rows, _given_pairs, _found_pairs)


def _jsonl_pairs_of_other_box_text() -> Sample:
    rows = [
        {"image": "a.jpg", "Prompt": "狗在哪里?", "Label": "所在区域为【【０８６，５４０，４００，７６０】】"},
        {"image": "a.jpg", "Prompt": "用【【x0，y0，x1，y1】】回答", "Label": "**[[086, 540, 400, 760]]**"},
        {"image": "b.jpg", "Prompt": "Find all dogs.", "Label": "(086,540),(400,760)"},
        {"image": "b.jpg", "Prompt": "猫呢?", "Label": "[[086,540,400,760]，坐标001、002、003、004"},
        {"image": "witness.jpg", "Prompt": "?", "Label": "!"},
    ]
    return _rows("jsonl", rows, _given_pairs, _found_pairs)


def _given_pairs(data: bytes) -> int:
    return sum(bool(line.strip()) for line in data.split(b"\n"))


def _found_pairs(parts: Parts) -> int:
    """A row that is neither a pair nor anything else is a candidate without anything, which is lost later."""
    candidates = candidates_of(parts)
    empty = sum(not (part.targets or part.turns or part.problems) for part in candidates)
    return sum(len(part.turns) for part in candidates) + len(problems_of(parts)) + empty


def _jsonl_array() -> Sample:
    targets = [{"phrase": "the red car", "boxes": [[1, 2, 30, 40], [5, 5, 90, 80.5]]}]
    rows = [{"image": f"{name}.jpg", "key": name, "targets": targets} for name in ("a", "b", "witness")]
    images = dict.fromkeys(("a.jpg", "b.jpg", "witness.jpg"), SIZE)
    given = _in_json(lambda rows: len(rows) if isinstance(rows, list) else 0)

    def found(parts: Parts) -> int:
        return len(candidates_of(parts)) + sum(problem.level == "sample" for problem in problems_of(parts))

    return Sample("jsonl", {"a.json": rows}, "a.json", "a.json", images, given, found, has_witness=False)
