"""Images of an evaluation to look at: the same ones every time, the worst, and those newly lost.

evaluations/photos/<hash of the key>.jpg             the images, once for all evaluations, large ones shrunk
evaluations/step-00000120/gallery.json               keys by group, and the file of each
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from scipy.optimize import linear_sum_assignment

from cogvlm_ft.data.pixels import open_image
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.data.stored_photo import whole_image
from cogvlm_ft.errors import DataError, ServerError
from cogvlm_ft.grounding.metrics import ABSENT, PRESENT, pairwise_iou
from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.plain_files import json_lines, read_json, real_path, replaced_file, write_text

logger = logging.getLogger(__name__)

GALLERY_FILE, PHOTOS_FOLDER = "gallery.json", "photos"
RIGHT_IOU = 0.5
LONGER_SIDE_PX, JPEG_QUALITY = 1280, 90  # small targets must stay visible
TABLE_COLUMNS = ("photo", "question", "answer", "truth", "kind", "iou", "right")


@dataclass(frozen=True)
class Answered:
    """A line of predictions.jsonl. score: from 0 to 1, the IoU or whether "not found" was said; None for free text."""

    key: str
    turn: int
    prompt: str
    answer: str
    truth: str
    boxes_xyxy: tuple[Box, ...]
    truth_boxes_xyxy: tuple[Box, ...]
    image_size_px: tuple[int, int]
    kind: str
    score: float | None

    @property
    def is_right(self) -> bool:
        return self.score is not None and self.score >= RIGHT_IOU

    @property
    def is_wrong(self) -> bool:
        return self.score is not None and self.score < RIGHT_IOU


@dataclass(frozen=True)
class Picture:
    """An image of the gallery, with boxes in pixels of its file, xyxy.

    photo: JPEG or PNG. truth: (box, its label). answers: (box, its label, whether it is right).
    """

    key: str
    photo: Path
    caption: str
    truth: Sequence[tuple[Box, str]] = ()
    answers: Sequence[tuple[Box, str, bool]] = ()


@dataclass(frozen=True)
class Gallery:
    """Keys of the images to show."""

    same: list[str]
    worst: list[str]
    newly_lost: list[str]


def read_predictions(path: Path) -> list[Answered]:
    """Read the predictions of an evaluation. Raises DataError."""
    try:
        return [_answered(row) for row in json_lines(path)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} cannot be read ({error!r}); expected the predictions.jsonl of an evaluation") from None


def _answered(row: dict[str, Any]) -> Answered:
    width, height = row["image_size_px"]
    score = row["score"] or {}
    kind = score.get("kind", "")
    measure = {PRESENT: "iou", ABSENT: "said_not_found"}.get(kind)
    return Answered(
        key=row["key"],
        turn=row["turn"],
        prompt=row["prompt"],
        answer=row["answer"],
        truth=row["truth"],
        boxes_xyxy=_boxes(row["boxes_xyxy"]),
        truth_boxes_xyxy=_boxes(row["truth_boxes_xyxy"]),
        image_size_px=(width, height),
        kind=kind,
        score=float(score[measure]) if measure else None,
    )


def _boxes(boxes: Sequence[Sequence[float]] | None) -> tuple[Box, ...]:
    return tuple((x0, y0, x1, y1) for x0, y0, x1, y1 in boxes or ())


def choose(predictions: Sequence[Answered], former: Sequence[Answered], num_photos: int) -> Gallery:
    """Choose at most `num_photos` images of each group; an image may be in several.

    former: of the evaluation before this one. worst: lowest mean score of an image's answers, none that are perfect.
    newly_lost: images with most answers that were right before and are wrong now.
    """
    scores: dict[str, list[float]] = {}
    num_lost: dict[str, int] = {}
    was_right = {(each.key, each.turn, each.prompt) for each in former if each.is_right}
    for each in predictions:
        scores.setdefault(each.key, [])
        if each.score is not None:
            scores[each.key].append(each.score)
        if each.is_wrong and (each.key, each.turn, each.prompt) in was_right:
            num_lost[each.key] = num_lost.get(each.key, 0) + 1
    means = {key: sum(of) / len(of) for key, of in scores.items() if of and sum(of) < len(of)}
    return Gallery(
        same=list(scores)[:num_photos],
        worst=sorted(means, key=means.__getitem__)[:num_photos],  # ties stay in the order of the data
        newly_lost=sorted(num_lost, key=num_lost.__getitem__, reverse=True)[:num_photos],
    )


def save_gallery(gallery: Gallery, folder: Path, reader: ShardReader) -> None:
    """Write gallery.json into the evaluation's folder, and the images that are not saved yet next to the folder.

    An image that can no longer be read is left out with a warning: it must not end the training run.
    """
    groups = {"same": gallery.same, "worst": gallery.worst, "newly_lost": gallery.newly_lost}
    photos = _save_photos({key for keys in groups.values() for key in keys}, folder.parent, reader)
    content = {"groups": groups, "photos": photos}
    write_text(folder / GALLERY_FILE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _save_photos(keys: Iterable[str], evaluations: Path, reader: ShardReader) -> dict[str, str]:
    """Save the images that are not saved yet; return all files by key, relative to `evaluations`."""
    files = {key: f"{PHOTOS_FOLDER}/{hashlib.sha256(key.encode()).hexdigest()[:16]}.jpg" for key in keys}
    missing = {key for key, file in files.items() if not (evaluations / file).exists()}
    (evaluations / PHOTOS_FOLDER).mkdir(exist_ok=True)
    for i in range(len(reader)):
        if not missing:
            break
        key = reader.index.key(i)
        if key in missing:
            missing.remove(key)
            try:
                _save_photo(whole_image(reader.read(i).image), evaluations / files[key])
            except (DataError, ServerError) as error:
                logger.warning("an image of the gallery cannot be shown: %s", error)
    return {key: file for key, file in files.items() if (evaluations / file).exists()}


def _save_photo(image: Image.Image, path: Path) -> None:
    shown = image.convert("RGB")
    shown.thumbnail((LONGER_SIDE_PX, LONGER_SIDE_PX))
    with replaced_file(path) as file:
        shown.save(file, "JPEG", quality=JPEG_QUALITY)


def load_pictures(folder: Path, predictions: Sequence[Answered]) -> dict[str, list[Picture]]:
    """Load the gallery of an evaluation's folder by group, boxes in pixels of the files. Raises DataError.

    Without a gallery.json these are the images into which boxes are drawn.
    """
    if not (folder / GALLERY_FILE).exists():
        drawn = sorted((folder / "pictures").glob("*.png"))
        return {"same": [Picture(path.stem, path, "solid: truth, dashed: answer") for path in drawn]}
    try:
        content = read_json(folder / GALLERY_FILE)
        groups, photos = dict(content["groups"]), dict(content["photos"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder / GALLERY_FILE} cannot be read ({error!r}); expected the gallery.json of an evaluation"
        ) from None
    answers: dict[str, list[Answered]] = {}
    for each in predictions:
        answers.setdefault(each.key, []).append(each)
    kept = {key: photo_inside(folder.parent, file) for key, file in photos.items() if key in answers}
    shown = {key: _picture(key, photo, answers[key]) for key, photo in kept.items() if photo}
    return {group: [picture for key in keys if (picture := shown.get(key))] for group, keys in groups.items()}


def photo_inside(evaluations: Path, file: object) -> Path | None:
    """Return the file of an image that a gallery names; None, with a warning, for one outside of the run's folder."""
    folder = real_path(evaluations)
    path = real_path(folder / str(file))
    if folder not in path.parents:
        logger.warning("an image of the gallery cannot be shown: %s is outside of %s", file, evaluations)
        return None
    return path if path.is_file() else None


def _picture(key: str, photo: Path, answers: Sequence[Answered]) -> Picture | None:
    """Build one picture, every box labelled with its question; None with a warning if the file is missing."""
    try:
        with open_image(photo.read_bytes()) as image:
            scale_x, scale_y = (shown / full for shown, full in zip(image.size, answers[0].image_size_px, strict=True))
    except OSError as error:
        logger.warning("an image of the gallery cannot be shown: %s", error)
        return None

    def scaled(box: Box) -> Box:
        return box[0] * scale_x, box[1] * scale_y, box[2] * scale_x, box[3] * scale_y

    truth = [(scaled(box), each.prompt) for each in answers for box in each.truth_boxes_xyxy]
    answered = [
        (scaled(box), each.prompt, is_right)
        for each in answers
        for box, is_right in zip(each.boxes_xyxy, right_boxes(each), strict=True)
    ]
    caption = " | ".join(f"{each.prompt} -> {each.answer}" for each in answers)
    return Picture(key, photo, caption, truth, answered)


def right_boxes(answered: Answered) -> list[bool]:
    """Decide for each box of an answer whether it matches a true box of its own with IoU 0.5 or more."""
    iou = pairwise_iou(answered.boxes_xyxy, answered.truth_boxes_xyxy)
    matches = zip(*linear_sum_assignment(iou, maximize=True), strict=True)
    right = {int(row) for row, column in matches if iou[row, column] >= RIGHT_IOU}
    return [number in right for number in range(len(answered.boxes_xyxy))]


def table_rows(predictions: Sequence[Answered], limit: int) -> list[list[Any]]:
    """Return up to `limit` rows of `TABLE_COLUMNS`: half the same every time, the others the worst of the rest."""
    same, rest = predictions[: limit - limit // 2], predictions[limit - limit // 2 :]
    worst = sorted((each for each in rest if each.score is not None), key=lambda each: each.score or 0.0)
    return [
        [each.key, each.prompt, each.answer, each.truth, each.kind or "text", each.score, _verdict(each)]
        for each in [*same, *worst[: limit - len(same)]]
    ]


def _verdict(each: Answered) -> str:
    return "right" if each.is_right else "wrong" if each.is_wrong else "not scored"
