"""Formats that are known but not read: refused by name, with what to export instead."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from case_files import CASES
from format_files import write_json
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvlm_ft.errors import DataError
from cogvlm_ft.shards.formats import recognise_format

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
    "VIA 3": ("a.json", {"project": {"vid_list": ["1"]}, "metadata": {}}),
    "BDD100K": ("a.json", [{"name": "a.jpg", "labels": [{"category": "car", "box2d": BOX}]}]),
    "Cityscapes": ("a_polygons.json", {"imgHeight": 9, "objects": [{"label": "car", "polygon": [[1, 2]]}]}),
    "Labelbox": ("a.ndjson", {"data_row": {"external_id": "a.jpg"}, "projects": {}}),
    "SageMaker": ("output.manifest", {"source-ref": "s3://b/a.jpg", "boxes": {"annotations": []}}),
    "V7 Darwin": ("a.json", {"dataset": "x", "annotations": [{"bounding_box": {"x": 1}}]}),
    "VoTT": ("a.json", {"asset": {"name": "a.jpg"}, "regions": []}),
    "Vertex AI's JSON": ("a.jsonl", {"imageGcsUri": "gs://b/a.jpg"}),
    "metadata of a Hugging Face": ("metadata.jsonl", {"file_name": "a.jpg", "objects": {"bbox": []}}),
    "Visual Genome": ("regions.json", [{"id": 1, "regions": [{"region_id": 7, "phrase": "a dog"}]}]),
    "dlib": ("a.xml", "<?xml version='1.0'?><dataset><images><image file='a.jpg'/></images></dataset>"),
    "MOT": ("gt/gt.txt", "1,1,912,484,97,109,0,7,1\n"),
    "TFRecord": ("dogs.tfrecord", "\0\1"),
    "TFRecord (": ("train.tfrecord-00000-of-00010", "\0\1"),
    "COCO results": ("a.json", [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]),
}


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
