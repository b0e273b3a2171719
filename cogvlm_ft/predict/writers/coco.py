"""COCO: one JSON file; the confidence is the "score" of an annotation, as in COCO's results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cogvlm_ft.evaluate.coco import coco_box, coco_categories
from cogvlm_ft.predict.writers.labelled import LabelledPhoto, write_json


def write_coco(photos: Sequence[LabelledPhoto], labels: Sequence[str], folder: Path) -> None:
    """Write annotations/instances_default.json, a name as CVAT gives it, with the images in the order of the photos."""
    ids = {label: number for number, label in enumerate(labels, 1)}
    boxes = [(number, box) for number, photo in enumerate(photos, 1) for box in photo.boxes]
    images = [
        {"id": number, "file_name": photo.name, "width": photo.size_px[0], "height": photo.size_px[1]}
        for number, photo in enumerate(photos, 1)
    ]
    annotations = [
        {"id": number, "image_id": image, "category_id": ids[box.label], **coco_box(box.xyxy), "segmentation": []}
        | ({} if box.confidence is None else {"score": box.confidence})
        for number, (image, box) in enumerate(boxes, 1)
    ]
    write_json(
        folder / "annotations" / "instances_default.json",
        {"images": images, "categories": coco_categories(ids), "annotations": annotations},
    )
