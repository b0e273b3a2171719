"""Label Studio: tasks with predictions; boxes in percent of the photo, the confidence as "score"."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote
from xml.etree import ElementTree

from cogvlm_ft.predict.writers.labelled import LabelledBox, LabelledPhoto, rounded, write_json, write_text

_CONTROL, _OBJECT = "label", "image"
LOCAL_FILES = "/data/local-files/?d="


def write_label_studio(photos: Sequence[LabelledPhoto], labels: Sequence[str], folder: Path) -> None:
    """Write tasks.json in the order of the photos, and the labeling configuration of the project."""
    tasks = [
        {
            "data": {_OBJECT: LOCAL_FILES + quote(photo.name)},
            "predictions": [
                {
                    "model_version": "cogvlm-ft",
                    "score": round(1 - photo.doubt, 4),
                    "result": [_region(f"box{i}", box, photo.size_px) for i, box in enumerate(photo.boxes)],
                }
            ],
        }
        for photo in photos
    ]
    write_json(folder / "tasks.json", tasks)
    view = ElementTree.Element("View")
    ElementTree.SubElement(view, "Image", {"name": _OBJECT, "value": f"${_OBJECT}"})
    control = ElementTree.SubElement(view, "RectangleLabels", {"name": _CONTROL, "toName": _OBJECT})
    for label in labels:
        ElementTree.SubElement(control, "Label", {"value": label})
    ElementTree.indent(view)
    write_text(folder / "label_config.xml", ElementTree.tostring(view, encoding="unicode") + "\n")


def _region(number: str, box: LabelledBox, size_px: tuple[int, int]) -> dict[str, object]:
    width, height = size_px
    x0, y0, x1, y1 = box.xyxy
    percent = rounded([x0 / width * 100, y0 / height * 100, (x1 - x0) / width * 100, (y1 - y0) / height * 100], 6)
    place = dict(zip(("x", "y", "width", "height"), percent, strict=True))
    return {
        "id": number,
        "type": "rectanglelabels",
        "from_name": _CONTROL,
        "to_name": _OBJECT,
        "original_width": width,
        "original_height": height,
        "image_rotation": 0,
        "value": {**place, "rotation": 0, "rectanglelabels": [box.label]},
        **({} if box.confidence is None else {"score": box.confidence}),
    }
