"""labelme and X-AnyLabeling: one JSON file per photo; the confidence is the "score" of a shape."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cogvlm_ft.predict.writers.labelled import LabelledBox, LabelledPhoto, relative_path, write_json

_VERSION = "5.5.0"


def write_labelme(photos: Sequence[LabelledPhoto], labels: Sequence[str], folder: Path) -> None:
    """Write NAME.json for each photo, in the folders of the photos."""
    for photo in photos:
        file = folder / photo.file(".json")
        content: dict[str, object] = {
            "version": _VERSION,
            "flags": {},
            "shapes": [_shape(box) for box in photo.boxes],
            "imagePath": relative_path(photo.path, file.parent),
            "imageData": None,
            "imageHeight": photo.size_px[1],
            "imageWidth": photo.size_px[0],
        }
        write_json(file, content)


def _shape(box: LabelledBox) -> dict[str, object]:
    x0, y0, x1, y1 = box.xyxy
    shape = {"label": box.label, "points": [[x0, y0], [x1, y1]], "group_id": None, "description": ""}
    score = {} if box.confidence is None else {"score": box.confidence}
    return {**shape, "shape_type": "rectangle", "flags": {}, "mask": None, **score}
