"""YOLO: one text file per photo and the class names. Its five columns have no place for the confidence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from cogvlm_ft.predict.writers.labelled import LabelledPhoto, write_text


def write_yolo(photos: Sequence[LabelledPhoto], labels: Sequence[str], folder: Path) -> None:
    """Write labels/NAME.txt, empty for a photo without boxes, data.yaml for training, and classes.txt for labelImg."""
    numbers = {label: number for number, label in enumerate(labels)}
    for photo in photos:
        width, height = photo.size_px
        lines = []
        for box in photo.boxes:
            x0, y0, x1, y1 = box.xyxy
            place = (x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height
            lines.append(f"{numbers[box.label]} {' '.join(f'{value:.6f}' for value in place)}\n")
        write_text(folder / "labels" / photo.file(".txt"), "".join(lines))
    names = {"path": ".", "train": "images", "val": "images", "names": dict(enumerate(labels))}
    write_text(folder / "data.yaml", yaml.safe_dump(names, allow_unicode=True, sort_keys=False))
    write_text(folder / "labels" / "classes.txt", "".join(f"{label}\n" for label in labels))
