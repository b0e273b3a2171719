"""Labelling tools themselves read what launch/predict.py --format writes.

Their packages are installed into .tools/ on the first run (half a minute), apart from each other and from ours, because
their requirements clash.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from predicted_boxes import BOXES, SIZES, write_boxes, write_photos

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.xdist_group("annotation_tools")]

TOOLS = Path(__file__).parents[2] / ".tools"
PACKAGES = {
    "labelme": "labelme==6.3.1 loguru==0.7.3 tifffile imgviz==2.1.0 cmap==0.8.0 onnxruntime PyQt5==5.15.11"
    " PyQt5-Qt5 PyQt5_sip",
    "datumaro": "datumaro==1.13.12 attrs cachetools defusedxml imagesize json-stream==2.5.1"
    " json-stream-rs-tokenizer==0.5.4 opencv-python-headless==4.14.0.94 orjson pandas==2.3.3 pyarrow pycocotools"
    " python-dateutil pytz ruamel.yaml shapely tzdata",
    "label-studio-sdk": "label-studio-sdk==2.1.2 appdirs faker httpx jsf==0.11.2 jsonschema jsonschema-specifications"
    " pydantic==2.14.4 pydantic_core==2.50.5 annotated-types typing-inspection pyjwt referencing rpds-py rstr"
    " smart_open xmljson",
}
"""What each imports to read files, without the rest of its requirements."""

READ_LABELME = """
import json, sys
from labelme import LabelFile
found = {}
for name, file in json.loads(sys.argv[1]).items():
    label_file = LabelFile(file)
    assert label_file.image_data, name
    found[name] = [[shape["label"], shape["points"][0] + shape["points"][1], shape["other_data"]["score"]]
                   for shape in label_file.shapes if shape["shape_type"] == "rectangle"]
print(json.dumps(found))
"""
READ_DATUMARO = """
import json, sys
import datumaro
from datumaro import AnnotationType, Dataset
found = {}
for name, folder in json.loads(sys.argv[1]).items():
    data = Dataset.import_from(folder, name)
    labels = data.categories()[AnnotationType.label]
    found[name] = {}
    for item in data:
        boxes = [each for each in item.annotations if each.type == AnnotationType.bbox]
        found[name][item.id] = [
            [labels[box.label].name, [box.x, box.y, box.x + box.w, box.y + box.h],
             float(box.attributes.get("confidence", box.attributes.get("score", -1)))]
            for box in boxes
        ]
print(json.dumps(found))
"""
READ_LABEL_STUDIO = """
import json, sys
from label_studio_sdk.label_interface import LabelInterface
config, tasks = (open(name, encoding="utf-8").read() for name in json.loads(sys.argv[1]))
interface = LabelInterface(config)
found = {}
for task in json.loads(tasks):
    [prediction] = task["predictions"]
    assert interface.validate_prediction(prediction, return_errors=True) == []
    broken = json.loads(json.dumps(prediction).replace('"rectanglelabels": ["', '"rectanglelabels": ["not '))
    assert not prediction["result"] or interface.validate_prediction(broken, return_errors=True)
    found[task["data"]["image"]] = len(prediction["result"])
print(json.dumps(found))
"""


def run_with(tool: str, code: str, argument: Any) -> Any:
    """Run the code in a process that finds the tool's packages first; skip if they cannot be installed."""
    folder = TOOLS / f"{tool}-{sys.version_info.major}.{sys.version_info.minor}"
    if not folder.is_dir():
        partial = TOOLS / f"{folder.name}.{os.getpid()}"
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--target", str(partial)]
        done = subprocess.run([*install, *PACKAGES[tool].split()], capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(partial, ignore_errors=True)
            pytest.skip(f"{tool} cannot be installed: {done.stderr.strip().splitlines()[-1:]}")
        partial.replace(folder)
    environment = {**os.environ, "PYTHONPATH": str(folder), "QT_QPA_PLATFORM": "offscreen"}
    command = [sys.executable, "-c", code, json.dumps(argument)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def assert_same(found: list[Any], name: str, *, with_confidence: bool = True) -> None:
    found, expected = sorted(found), sorted(BOXES[name])  # datumaro changes the order
    assert [label for label, _, _ in found] == [label for label, _, _ in expected], name
    for (_, box, confidence), (_, expected_box, expected_confidence) in zip(found, expected, strict=True):
        np.testing.assert_allclose(box, expected_box, atol=1)
        assert not with_confidence or confidence == pytest.approx(expected_confidence)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos")


def test_labelme(photos: Path, tmp_path: Path) -> None:
    folder = write_boxes(tmp_path / "out", "labelme", photos)
    files = {name: str((folder / name).with_suffix(".json")) for name in SIZES}
    found = run_with("labelme", READ_LABELME, files)
    for name in SIZES:
        assert_same(found[name], name)


def test_datumaro(photos: Path, tmp_path: Path) -> None:
    folders = {tool: write_boxes(tmp_path / "out", tool, photos) for tool in ("coco", "voc", "yolo", "cvat")}
    for tool in ("coco", "yolo", "cvat"):  # it reads them beside their photos only
        shutil.copytree(photos, folders[tool] / "images")
    found = run_with("datumaro", READ_DATUMARO, {tool: str(folder) for tool, folder in folders.items()})
    for tool, items in found.items():
        by_stem = {Path(item).name: boxes for item, boxes in items.items()}
        assert len(by_stem) == len(SIZES), tool
        for name in SIZES:
            assert_same(by_stem[Path(name).stem], name, with_confidence=tool != "yolo")


def test_label_studio(photos: Path, tmp_path: Path) -> None:
    folder = write_boxes(tmp_path / "out", "label-studio", photos)
    files = [str(folder / "label_config.xml"), str(folder / "tasks.json")]
    found = run_with("label-studio-sdk", READ_LABEL_STUDIO, files)
    assert sorted(found.values()) == sorted(len(boxes) for boxes in BOXES.values())
