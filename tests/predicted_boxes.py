"""Predictions about small photos of several shapes, written for labelling tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.predict.files import PREDICTIONS_FILE, Question
from cogvlm_ft.predict.writers.write import write_predictions

SIZES = {"a.jpg": (90, 60), "sub/狗 1.JPG": (61, 130), "sub/b.c.png": (300, 20), "empty.png": (50, 40)}
Boxes = dict[str, list[tuple[str, Box, float]]]
"""By photo: (label, xyxy, confidence)."""

BOXES: Boxes = {
    "a.jpg": [
        ("red car", (10.25, 5.5, 70.75, 20.33), 0.9),
        ("red car", (80.0, 3.0, 90.0, 60.0), 0.55),
        ("狗", (1.0, 50.0, 9.4, 59.0), 0.8),
    ],
    "sub/狗 1.JPG": [("狗", (3.5, 70.0, 20.0, 126.9), 0.3)],
    "sub/b.c.png": [('a "b" & <c>', (150.0, 2.0, 299.0, 5.0), 0.97)],
    "empty.png": [],
}


def write_photos(folder: Path) -> Path:
    for name, size in SIZES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise(size, 60).convert("RGB").save(folder / name, "PNG" if name.endswith("png") else "JPEG")
    return folder


def questions_about(photos: Path, boxes: Boxes) -> list[Question]:
    labels = tuple(dict.fromkeys(label for found in boxes.values() for label, _, _ in found))
    return [Question(photos / name, name, targets=labels or ("nothing",)) for name in boxes]


def line_of(name: str, found: list[tuple[str, Box, float]], not_found_prob: float | None = 0.1) -> dict[str, Any]:
    boxes = [{"xyxy": list(box), "confidence": confidence, "phrase": label} for label, box, confidence in found]
    answer = {"prompt": "?", "answer": "", "boxes": boxes, "not_found": not boxes, "not_found_prob": not_found_prob}
    return {"image": name, "image_size_px": list(SIZES[name]), "answers": [answer]}


def write_boxes(out: Path, tool: str, photos: Path, boxes: Boxes = BOXES, *, doubtful_first: bool = False) -> Path:
    """Write predictions.jsonl and the files of the tool; return the folder of these."""
    out.mkdir(parents=True, exist_ok=True)
    lines = [line_of(name, found) for name, found in boxes.items()]
    (out / PREDICTIONS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    write_predictions(questions_about(photos, boxes), out, tool, doubtful_first=doubtful_first)
    return out / tool


def accept_all(folder: Path) -> None:
    """Do what a person does who submits every prediction unchanged: Label Studio exports it as an annotation."""
    file = folder / "tasks.json"
    if file.exists():
        tasks = json.loads(file.read_text(encoding="utf-8"))
        for number, task in enumerate(tasks, 1):
            [prediction] = task["predictions"]
            task |= {"id": number, "annotations": [{"id": number, "result": prediction["result"]}]}
        file.write_text(json.dumps(tasks), encoding="utf-8")
