"""The requests of Label Studio to a machine learning backend: /health, /setup and /predict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree

from cogvlm_ft.plain_files import real_path
from cogvlm_ft.predict.batching import Order
from cogvlm_ft.predict.bodies import MAX_UPLOAD_BYTES, RefusedError, decode_data_url
from cogvlm_ft.predict.files import question_of
from cogvlm_ft.predict.replies import Reply
from cogvlm_ft.predict.served import ServedModels, Settings
from cogvlm_ft.predict.steps import MAX_PHRASES

MAX_TASKS = 16
_LOCAL_FILES = "/data/local-files/"


@dataclass(frozen=True)
class Labelling:
    """What the labelling interface of a project has. from_name, to_name: of its rectangles and its image."""

    from_name: str
    to_name: str
    data_key: str
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Tasks:
    labelling: Labelling
    orders: list[Order]


def read_labelling(xml: object) -> Labelling:
    """Read the labelling interface: RectangleLabels on an Image."""
    expected = "expected RectangleLabels with labels, on an Image"
    if not isinstance(xml, str) or len(xml) > 1_000_000 or "<!DOCTYPE" in xml.upper():
        raise RefusedError(400, f"label_config: {expected}", field="label_config")
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        raise RefusedError(400, f"label_config: not valid XML ({error}); {expected}", field="label_config") from None
    rectangles, image = root.find(".//RectangleLabels"), root.find(".//Image")
    labels = [] if rectangles is None else [each.get("value") or "" for each in rectangles.iter("Label")]
    if rectangles is None or image is None or not labels or not all(labels):
        raise RefusedError(400, f"label_config: {expected}", field="label_config")
    if len(labels) > MAX_PHRASES:
        raise RefusedError(400, f"label_config: found {len(labels)} labels; expected at most {MAX_PHRASES}")
    key = (image.get("value") or "").removeprefix("$")
    return Labelling(rectangles.get("name") or "", rectangles.get("toName") or "", key, tuple(labels))


def read_tasks(fields: Mapping[str, Any], served: ServedModels, photos: Path | None) -> Tasks:
    """Read the tasks of a request: each asks for all labels. Raises RefusedError, DataError, ConfigError."""
    labelling, tasks = read_labelling(fields.get("label_config")), fields.get("tasks")
    if not isinstance(tasks, list) or not 1 <= len(tasks) <= MAX_TASKS:
        raise RefusedError(400, f"tasks: expected a list of 1 to {MAX_TASKS}", field="tasks")
    orders = []
    for number, task in enumerate(tasks):
        data = task.get("data") if isinstance(task, dict) else None
        address = data.get(labelling.data_key) if isinstance(data, dict) else None
        photo = _load(address, f"tasks[{number}].data.{labelling.data_key}", photos)
        orders.append(served.order(photo, [question_of(targets=labelling.labels)], Settings()))
    return Tasks(labelling, orders)


def _load(address: object, field: str, photos: Path | None) -> bytes:
    """Return the bytes of a task's image: a data URL, or a file of local storage below `photos`."""
    parts = urlsplit(address) if isinstance(address, str) and len(address) < 4096 else None
    if parts is None or parts.path != _LOCAL_FILES:
        return decode_data_url(address, field)
    name = unquote(parse_qs(parts.query).get("d", [""])[0])
    if photos is None:
        raise RefusedError(400, f"{field}: found a file of local storage; expected --photos FOLDER at the server")
    path, root = real_path(photos / name.replace("\0", "")), real_path(photos)
    if not path.is_relative_to(root) or not path.is_file():
        raise RefusedError(400, f"{field}: no such file below --photos. Start the server with the storage's root")
    if path.stat().st_size > MAX_UPLOAD_BYTES:
        raise RefusedError(400, f"{field}: the file has more than {MAX_UPLOAD_BYTES // 1_000_000} MB")
    return path.read_bytes()


def results(tasks: Tasks, replies: Sequence[Sequence[Reply]], version: str) -> dict[str, Any]:
    """Return a prediction for each task: rectangles in per cent of the photo."""
    found = []
    for order, row in zip(tasks.orders, replies, strict=True):
        boxes = [
            (box.xyxy, box.phrase, box.confidence)
            for reply in row
            for box in reply.boxes or ()
            if box.phrase is not None
        ]
        rectangles = [_rectangle(tasks.labelling, order.photo.size, *box) for box in boxes]
        known = [confidence for _, _, confidence in boxes if confidence is not None]
        score = sum(known) / len(known) if known else 0.0
        found.append({"result": rectangles, "score": score, "model_version": version})
    return {"results": found, "model_version": version}


def _rectangle(
    labelling: Labelling, size: tuple[int, int], xyxy: Sequence[float], phrase: str, confidence: float | None
) -> dict[str, Any]:
    (width, height), (x0, y0, x1, y1) = size, xyxy
    value = {
        "x": 100 * x0 / width,
        "y": 100 * y0 / height,
        "width": 100 * (x1 - x0) / width,
        "height": 100 * (y1 - y0) / height,
        "rotation": 0,
        "rectanglelabels": [phrase],
    }
    return {
        "from_name": labelling.from_name,
        "to_name": labelling.to_name,
        "type": "rectanglelabels",
        "original_width": width,
        "original_height": height,
        "image_rotation": 0,
        "value": value,
        **({} if confidence is None else {"score": confidence}),
    }
