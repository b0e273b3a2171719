"""Write the predictions of a folder in the format of a tool, and put the most doubtful photos first."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from cogvlm_ft.errors import ConfigError
from cogvlm_ft.predict.files import PREDICTIONS_FILE, Question
from cogvlm_ft.predict.writers.coco import write_coco
from cogvlm_ft.predict.writers.cvat import write_cvat
from cogvlm_ft.predict.writers.label_studio import write_label_studio
from cogvlm_ft.predict.writers.labelled import (
    LabelledPhoto,
    check_names,
    file_of,
    labels_of,
    read_labelled,
    write_text,
)
from cogvlm_ft.predict.writers.labelme import write_labelme
from cogvlm_ft.predict.writers.voc import write_voc
from cogvlm_ft.predict.writers.yolo import write_yolo

ORDER_FILE = "order.txt"

WRITERS: dict[str, Callable[[Sequence[LabelledPhoto], Sequence[str], Path], None]] = {
    "coco": write_coco,
    "labelme": write_labelme,
    "voc": write_voc,
    "yolo": write_yolo,
    "cvat": write_cvat,
    "label-studio": write_label_studio,
}
"""Writers by the value of --format: (photos, labels, folder)."""
_FILE_EACH = ("labelme", "voc", "yolo")


def check_questions(questions: Sequence[Question], name: str) -> None:
    """Raise ConfigError if no answer can be written in this format, before anything is predicted."""
    asked = [question for question in questions if not question.problem]
    if asked and not any(question.targets or question.in_steps for question in asked):
        raise ConfigError(f"--format {name}: no box would have a name; expected targets. Ask with --targets.")
    paths = {question.name: question.path for question in asked}
    check_names(paths, file_each=name in _FILE_EACH)


def write_predictions(questions: Sequence[Question], out: Path, name: str | None, *, doubtful_first: bool) -> str:
    """Write predictions.jsonl of `out` in the format into `out`/`name`; return what was done, for people.

    doubtful_first: put the least certain photos first, in predictions.jsonl too, and list them in order.txt.
    """
    lines = [json.loads(line) for line in (out / PREDICTIONS_FILE).read_text(encoding="utf-8").splitlines()]
    photos, left_out = read_labelled(lines, {question.name: question.path for question in questions})
    done = []
    if doubtful_first:
        photos.sort(key=lambda photo: -photo.doubt)
        ranks = {file_of(photo.path): rank for rank, photo in enumerate(photos)}
        names = {question.name: file_of(question.path) for question in questions}
        lines.sort(key=lambda line: ranks.get(names.get(line["image"], ""), len(ranks)))
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_text(out / PREDICTIONS_FILE, text)
        write_text(out / ORDER_FILE, "".join(f"{photo.name}\n" for photo in photos))
        done.append(f"the least certain photos first, as listed in {out / ORDER_FILE}")
    if name is not None:
        labels = labels_of(photos, (target for question in questions for target in question.targets))
        WRITERS[name](photos, labels, out / name)
        num_boxes = sum(len(photo.boxes) for photo in photos)
        done.append(f"{name}: {num_boxes} boxes of {len(photos)} photos in {out / name}/{left_out}")
    return "\n".join(done)
