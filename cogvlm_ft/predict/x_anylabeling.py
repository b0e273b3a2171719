"""The requests of X-AnyLabeling's remote server, as X-AnyLabeling-Server documents them (docs/router.md)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from cogvlm_ft.predict.batching import Order
from cogvlm_ft.predict.bodies import RefusedError, decode_base64, decode_data_url
from cogvlm_ft.predict.files import question_of
from cogvlm_ft.predict.replies import Reply
from cogvlm_ft.predict.served import ServedModels, Settings

_BETWEEN = re.compile(r"[.,，、;；\n]")


def model_fields(name: str) -> dict[str, Any]:
    """Describe a model: the tool shows a field for the targets and a button."""
    widgets: list[dict[str, Any]] = [
        {"name": "edit_text", "value": None},
        {"name": "button_send", "value": None},
        {"name": "edit_conf", "value": 0.0},
        {"name": "toggle_preserve_existing_annotations", "value": False},
    ]
    return {"display_name": name, "widgets": widgets, "params": {}, "batch_processing_mode": "text_prompt"}


def read_request(fields: Mapping[str, Any], served: ServedModels) -> Order:
    """Read a request for the targets of its text prompt. Raises RefusedError, DataError, ConfigError."""
    adapter, params = served.adapter_of(fields.get("model")), _params(fields)
    text = params.get("text_prompt")
    targets = [part.strip() for part in _BETWEEN.split(text) if part.strip()] if isinstance(text, str) else []
    if not targets:
        raise RefusedError(400, "params.text_prompt: expected the targets, such as: red car, dog", field="params")
    image = fields.get("image")
    is_plain = isinstance(image, str) and "://" not in image[:20] and not image.startswith("data:")
    photo = decode_base64(image, "image") if is_plain else decode_data_url(image, "image")  # type: ignore[arg-type]
    return served.order(photo, [question_of(targets=targets)], Settings(adapter))


def result(replies: Sequence[Reply], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a rectangle for each box with at least the confidence that the tool asks for."""
    least = _params(fields).get("conf_threshold")
    least = least if isinstance(least, (int, float)) else 0.0
    shapes = [
        {
            "label": box.phrase or "object",
            "shape_type": "rectangle",
            "points": [[x0, y0], [x1, y0], [x1, y1], [x0, y1]],
            "score": box.confidence,
        }
        for reply in replies
        for box in reply.boxes or ()
        for x0, y0, x1, y1 in [box.xyxy]
        if box.confidence is None or box.confidence >= least
    ]
    unread = [reply.text for reply in replies if reply.boxes is None]
    return {"success": True, "data": {"shapes": shapes, "description": "\n".join(unread)}}


def _params(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    params = fields.get("params")
    return params if isinstance(params, dict) else {}


def error_fields(error: RefusedError) -> dict[str, Any]:
    return {"success": False, "error": {"code": error.code.upper(), "message": str(error)}}
