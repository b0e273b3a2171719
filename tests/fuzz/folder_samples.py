"""Annotations with one file per image, as more tools write them: rotated, grouped, predicted, in other encodings."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from typing import Any

from annotation_samples import SIZE, Sample, _boxes_and_problems, _in_json

WITNESS_XML = (
    b"<annotation><filename>witness.jpg</filename><object><name>dog</name><bndbox><xmin>1</xmin><ymin>2</ymin>"
    b"<xmax>30</xmax><ymax>20</ymax></bndbox></object></annotation>"
)
IMAGES = {"images/a.jpg": SIZE, "images/b.jpg": SIZE, "images/witness.jpg": SIZE}


def folder_samples() -> dict[str, Callable[[], Sample]]:
    """By name."""
    return {
        "voc of roLabelImg in GBK": _rolabelimg,
        "yolo poses": _yolo_poses,
        "yolo predictions": _yolo_predictions,
        "yolo names": _yolo_names,
        "labelme of all shapes": _labelme_of_all_shapes,
    }


def _rolabelimg() -> Sample:
    rotated = "<cx>200.5</cx><cy>150</cy><w>90</w><h>40.25</h><angle>{}</angle>"
    box = "<xmin>1</xmin><ymin>2</ymin><xmax>30</xmax><ymax>20</ymax>"
    things = [
        f"<object><type>robndbox</type><name>船</name><robndbox>{rotated.format(angle)}</robndbox></object>"
        for angle in (0.3, 3.1, 1.57)
    ]
    things.append(f"<object><type>bndbox</type><name>飞机</name><bndbox>{box}</bndbox></object>")
    text = '<?xml version="1.0" encoding="GBK"?>\n<annotation><filename>b</filename>{}\n{}</annotation>'
    size = "<size><width>400.0</width><height>300</height></size>"

    def given(data: bytes) -> int | None:
        try:
            found = re.sub(r"^\s*<\?xml.*?\?>", "", data.decode("gb18030"), flags=re.S)
            return 1 + len(ET.fromstring(found).findall("object"))
        except (ET.ParseError, ValueError):
            return None

    files = {"xmls/a.xml": text.format(size, "\n".join(things)).encode("gbk"), "xmls/witness.xml": WITNESS_XML}
    found = _boxes_and_problems("empty_phrase")
    return Sample("voc", files, "xmls/a.xml", "", IMAGES, given, found, num_images=lambda data: 2)


def _yolo(lines: str, settings: str, changed: str = "labels/a.txt", *, has_witness: bool = True) -> Sample:
    files: dict[str, Any] = {
        "labels/a.txt": lines.encode(),
        "labels/b.txt": b"",
        "labels/witness.txt": b"0 0.5 0.5 0.2 0.1\n",
        "data.yaml": settings.encode("gbk"),
        "labels/classes.txt": b"dog\ncat\n",
        "README.txt": b"made by a tool",
    }

    def given(data: bytes) -> int | None:
        if changed != "labels/a.txt":
            return None
        text = data.decode("utf-8-sig", "surrogateescape").replace("\r", "\n")
        return 1 + sum(bool(line.strip()) for line in text.split("\n"))

    return Sample("yolo", files, changed, "", IMAGES, given, _boxes_and_problems(), has_witness, lambda data: 3)


def _yolo_poses() -> Sample:
    lines = [
        "0 0.35 0.5 0.5 0.6 0.2 0.3 2 0.5 0.4 1 0 0 0",
        "1 0.3 0.5 0.2 0.6 0.2 0.3 2 0.5 0.4 1 0 0 0 0.97",
        "0 0.35 0.5 0.5 0.6 0.2 0.3 2 0.5 0.4 1 0 0 0 0.4 12",
        "0 0.5 0.5 1 1",
    ]
    return _yolo("\n".join(lines), "train: images\nkpt_shape: [3, 3]\nnames:\n  0: 狗\n  1: cat\n")


def _yolo_predictions() -> Sample:
    lines = [
        "0 0.35 0.5 0.5 0.6 0.91",
        "0 0.3 0.5 0.2 0.6 1",
        "1 0.35 0.5 0.5 0.6 0.9 12",
        "1 0.1 0.2 0.6 0.2 0.6 0.8 0.1 0.8",
        "0 0.1 0.2 0.6 0.2 0.6 0.8 0.1 0.8 0.91",
        "0 0.1 0.2 0.6 0.2 0.6 0.8 0.1 0.8 0.91 3",
        "1 0.35 0.5 0.5 0.6 1.57",
        "0 0.5 0.5 1 1",
    ]
    return _yolo("\n".join(lines), "names: [狗, cat]\n")


def _yolo_names() -> Sample:
    settings = 'path: .\ntrain: images\n# 名称\nkpt_shape: [1, 2]\nnames:\n  0: 狗\n  1: "cat"\n  2: the red car\n'
    return _yolo("0 0.3 0.5 0.2 0.6\n1 0.3 0.5 0.2 0.6 0.3 0.4\n", settings, "data.yaml", has_witness=False)


def _labelme_of_all_shapes() -> Sample:
    four, eight = [[30, 10], [60, 30], [40, 50], [10, 30]], [[1, 1], [20, 1], [20, 20], [1, 20]] * 2
    kinds = [
        ("rotation", four, {"direction": 0.6}),
        ("oriented_rectangle", four, {}),
        ("cuboid", eight, {}),
        ("circle", [[10, 10], [40, 10]], {}),
        ("quadrilateral", four, {}),
        ("mask", [[5, 5], [20, 20]], {"mask": "iVBORw0KGgo=", "group_id": 1}),
        ("mask", [[40, 25], [60, 40]], {"mask": "iVBORw0KGgo=", "group_id": 1}),
        ("rectangle", [[5, 5], [20, 20]], {"group_id": "", "description": "左边的狗"}),
        ("polygon", four, {"group_id": "7", "description": None}),
        ("point", [[1, 2]], {"group_id": 7}),
    ]
    shapes = [
        {"label": f"thing {i % 3}", "points": points, "shape_type": kind, "flags": {}, "group_id": None, **more}
        for i, (kind, points, more) in enumerate(kinds)
    ]
    sides = {"imageWidth": "400.0", "imageHeight": 300.0}
    content = {"version": "5.10.1", "shapes": shapes, "imagePath": "..\\images\\b.jpg", "imageData": None, **sides}
    witness = {"imagePath": "b.jpg", "shapes": [{"label": "dog", "points": [[1, 2], [30, 2], [30, 20]]}]}
    files = {"json/a.json": content, "json/witness.json": witness}
    given = _in_json(lambda value: 1 + len(value["shapes"]))
    found = _boxes_and_problems("empty_phrase")
    return Sample("labelme", files, "json/a.json", "", IMAGES, given, found, num_images=lambda data: 2)
