"""Formats that are known but not read: refused by name, with what to export instead."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from case_files import CASES
from format_files import read_all, write_json
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvlm_ft.errors import DataError
from cogvlm_ft.shards.formats import recognise_format
from cogvlm_ft.shards.formats.csv_boxes import read_csv_boxes

LAYOUTS = {
    "x-datumaro": "Datumaro",
    "y-via": "VIA",
    "z-createml": "CreateML",
    "za-supervisely": "Supervisely",
    "zc-dota": "DOTA",
    "zd-kitti": "KITTI",
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_30_layouts_of_formats_that_are_not_read(name: str) -> None:
    with pytest.raises(DataError, match=rf"found {LAYOUTS[name]}.*; expected a format of docs/formats\.md\. .*COCO"):
        recognise_format(CASES / "30-layouts" / name)


BOX = {"x1": 1, "y1": 2, "x2": 3, "y2": 4}
FILES: dict[str, tuple[str, Any]] = {
    "VIA's CSV": ("a.csv", "filename,file_size,region_shape_attributes\n"),
    "Label Studio's CSV": ("a.csv", "image,id,label,annotator,annotation_id,created_at,lead_time\n"),
    "VIA 3": ("a.json", {"project": {"vid_list": ["1"]}, "metadata": {}}),
    "Cityscapes": ("a_polygons.json", {"imgHeight": 9, "objects": [{"label": "car", "polygon": [[1, 2]]}]}),
    "V7 Darwin": ("a.json", {"dataset": "x", "annotations": [{"bounding_box": {"x": 1}}]}),
    "VoTT": ("a.json", {"asset": {"name": "a.jpg"}, "regions": []}),
    "Vertex AI's JSON": ("a.jsonl", {"imageGcsUri": "gs://b/a.jpg"}),
    "metadata of a Hugging Face": ("metadata.jsonl", {"file_name": "a.jpg", "objects": {"bbox": []}}),
    "MOT": ("gt/gt.txt", "1,1,912,484,97,109,0,7,1\n"),
    "TFRecord": ("dogs.tfrecord", "\0\1"),
    "TFRecord (": ("train.tfrecord-00000-of-00010", "\0\1"),
    "COCO results": ("a.json", [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]),
}


_RECT = {"name": "rect", "x": 1, "y": 2, "width": 20, "height": 10}
_SIDES = {"top": 2, "left": 1, "height": 10, "width": 20}
_LABEL = {"annotations": {"objects": [{"name": "dog", "bounding_box": _SIDES}]}}
_CORNERS = {"exterior": [[1, 2], [21, 12]], "interior": []}
_DETECTION = {"_id": {"$oid": "1"}, "_cls": "Detection", "label": "dog", "bounding_box": [0.1, 0.2, 0.3, 0.4]}
_GROUND_TRUTH = {"_cls": "Detections", "detections": [_DETECTION]}
_REGION = {"region_id": 7, "image_id": 1, "phrase": "a dog", "x": 1, "y": 2, "width": 20, "height": 10}
EXPORTS: dict[str, tuple[str, Any, str]] = {
    "VIA's JSON": (
        "a.json",
        {"a.jpg99": {"filename": "a.jpg", "size": 99, "regions": [{"shape_attributes": _RECT}], "file_attributes": {}}},
        r"Export Annotations \(COCO format\)",
    ),
    "CreateML's JSON": (
        "a.json",
        [{"image": "a.jpg", "annotations": [{"label": "dog", "coordinates": {"x": 11, "y": 7, "width": 20}}]}],
        "COCO or Pascal VOC.* centre",
    ),
    "Supervisely's JSON": (
        "a.jpg.json",
        {"size": {"height": 40, "width": 60}, "objects": [{"classTitle": "dog", "points": _CORNERS}]},
        "Export to COCO",
    ),
    "BDD100K's JSON": (
        "a.json",
        [{"name": "a.jpg", "timestamp": 1, "labels": [{"id": "0", "category": "car", "box2d": BOX}]}],
        "python -m bdd100k.label.to_coco -m det",
    ),
    "Labelbox's export": (
        "a.ndjson",
        {"data_row": {"id": "c", "external_id": "a.jpg"}, "projects": {"p": {"labels": [_LABEL]}}},
        "left, top, width, height .* CSV",
    ),
    "SageMaker Ground Truth's manifest": (
        "output.manifest",
        {"source-ref": "s3://b/a.jpg", "boxes": {"image_size": [{"width": 60}], "annotations": [{"class_id": 0}]}},
        "left, top, width, height .* CSV",
    ),
    "FiftyOne's own data set": (
        "samples.json",
        {"samples": [{"filepath": "data/a.jpg", "ground_truth": _GROUND_TRUTH}]},
        r"dataset\.export\(export_dir=.*COCODetectionDataset",
    ),
    "dlib imglab's XML": (
        "a.xml",
        "<?xml version='1.0'?>\n<dataset>\n<name>x</name>\n<images>\n<image file='a.jpg'>"
        "<box top='2' left='1' width='20' height='10'><label>dog</label></box></image></images></dataset>",
        "left, top, width, height .* CSV",
    ),
    "Visual Genome's JSON": ("regions.json", [{"id": 1, "regions": [_REGION]}], "x, y, width, height, phrase .* CSV"),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_exports_are_named_with_the_way_to_a_format_that_is_read(name: str, tmp_path: Path) -> None:
    """The columns that are named can be read."""
    file, content, advice = EXPORTS[name]
    path = tmp_path / file
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DataError, match=rf"found {name} \({file}\); expected .*{advice}") as error:
        recognise_format(tmp_path)
    columns = re.search(r"with the columns ([a-z, ]+) \(", str(error.value))
    if columns:
        (tmp_path / "x.csv").write_text(f"{columns[1].replace(' ', '')}\na.jpg,1,2,20,10,dog\n")
        assert read_all(read_csv_boxes, tmp_path / "x.csv").boxes == {"a.jpg": {"dog": ((1, 2, 21, 12),)}}


@pytest.mark.parametrize("name", FILES)
def test_other_formats_alone_and_in_a_folder(name: str, tmp_path: Path) -> None:
    file, content = FILES[name]
    path = tmp_path / "x" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    (tmp_path / "x" / "a.jpg").touch()
    for place in (path, tmp_path / "x"):
        with pytest.raises(DataError) as error:
            recognise_format(place)
        assert f"found {name}" in str(error.value) and file in str(error.value)
        assert "expected a format of docs/formats.md. " in str(error.value)


@settings(max_examples=30, deadline=None)
@given(
    corners=st.lists(st.floats(0, 4000, width=32), min_size=8, max_size=8),
    label=st.sampled_from(["plane", "small-vehicle", "ship"]),
    has_head=st.booleans(),
)
def test_numbers_of_dota_do_not_matter(corners: list[float], label: str, has_head: bool) -> None:
    line = f"{' '.join(f'{corner:.1f}' for corner in corners)} {label} 0\n"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "labelTxt", "a.txt")
        path.parent.mkdir()
        path.write_text(("imagesource:GoogleEarth\ngsd:null\n" if has_head else "") + line)
        with pytest.raises(DataError, match="DOTA"):
            recognise_format(Path(folder))


def test_formats_that_are_read_come_first(tmp_path: Path) -> None:
    """A folder of labelme files is read even if something else is beside them."""
    write_json(tmp_path / "a.json", {"imagePath": "a.jpg", "shapes": []})
    write_json(tmp_path / "via.json", {"a": {"shape_attributes": {}}})
    assert recognise_format(tmp_path)[0] == "labelme"
