"""Requests and responses of OpenAI's chat completions, in their documented form, with boxes beside the text."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cogvlm_ft.data.encode import encode_prompt
from cogvlm_ft.predict.batching import Order
from cogvlm_ft.predict.bodies import RefusedError, decode_data_url
from cogvlm_ft.predict.files import question_of, reply_fields
from cogvlm_ft.predict.predictor import Predictor
from cogvlm_ft.predict.replies import Reply
from cogvlm_ft.predict.served import MAX_NEW_TOKENS, ServedModels, Settings
from cogvlm_ft.settings import DECODINGS

MAX_MESSAGES = 33
"""Maximum number of messages: 16 earlier turns and a question."""
UNSUPPORTED = ("tools", "tool_choice", "functions", "function_call", "logprobs", "stop", "audio", "modalities")


@dataclass(frozen=True)
class Chat:
    """A request that can be answered. model: the name in it."""

    model: str
    order: Order
    is_stream: bool
    number: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))


def read_chat(fields: Mapping[str, Any], served: ServedModels) -> Chat:
    """Read a request. Raises RefusedError, DataError, ConfigError."""
    adapter = served.adapter_of(fields.get("model"))
    for name in UNSUPPORTED:
        if fields.get(name):
            raise RefusedError(400, f"{name}: not supported by this server. Omit it", "unsupported", name)
    if fields.get("n") not in (None, 1):
        raise RefusedError(400, "n: expected 1: answers are always the most probable ones", "unsupported", "n")
    if fields.get("response_format") not in (None, {"type": "text"}):
        hint = 'response_format: expected text; for well-formed boxes send "decoding": "grammar"'
        raise RefusedError(400, hint, "unsupported", "response_format")
    targets = _texts(fields.get("targets"), "targets")
    photo, said, prompt = _read_messages(fields.get("messages"), asks=not targets)
    if said and (targets or served.base.model.config.template_version == "base"):
        why = "targets begin their own conversation" if targets else "this model's template shows it no earlier turns"
        raise RefusedError(400, f"messages: found earlier turns; {why}. Send the last question alone", field="messages")
    question = question_of(targets=targets) if targets else question_of(prompt, said=said)
    settings = Settings(adapter, _max_tokens(fields), _decoding(fields), _number(fields, "min_boxes", 0, 1000))
    order = served.order(photo, [question], settings)
    return Chat(str(fields["model"]), order, fields.get("stream") is True)


def _read_messages(messages: object, *, asks: bool) -> tuple[bytes, list[tuple[str, str]], str]:
    """Return the photo, the earlier turns and the question; asks: whether the question must have words."""
    if not isinstance(messages, list) or not 1 <= len(messages) <= MAX_MESSAGES or len(messages) % 2 == 0:
        num_found = len(messages) if isinstance(messages, list) else 0
        expected = f"user and assistant in turn, at most {MAX_MESSAGES}, the last from the user"
        raise RefusedError(400, f"messages: found {num_found}; expected {expected}", field="messages")
    photos: list[bytes] = []
    texts: list[str] = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        expected_role = "assistant" if number % 2 else "user"
        role = message.get("role") if isinstance(message, dict) else None
        if role != expected_role:
            hint = " The model has no system prompt." if role == "system" else ""
            raise RefusedError(400, f"{where}.role: expected {expected_role}.{hint}", field="messages")
        text, found = _read_content(message.get("content"), f"{where}.content")
        texts.append(text)
        photos += found
        if found and number:
            raise RefusedError(400, f"{where}: found an image; expected it in the first message", field="messages")
    if len(photos) != 1:
        expected = "expected exactly one image_url, in the first message"
        raise RefusedError(400, f"messages: found {len(photos)} images; {expected}", field="messages")
    needed = texts if asks else texts[:-1]
    if not all(text.strip() for text in needed):
        raise RefusedError(400, "messages: found one without text; expected a question in words", field="messages")
    return photos[0], list(zip(texts[:-1:2], texts[1:-1:2], strict=True)), texts[-1]


def _read_content(content: object, where: str) -> tuple[str, list[bytes]]:
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise RefusedError(400, f"{where}: expected a text, or a list of parts", field="messages")
    texts, photos = list[str](), list[bytes]()
    for number, part in enumerate(content):
        kind = part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url" and isinstance(part.get("image_url"), dict):
            if photos:
                raise RefusedError(400, f"{where}: found several images; expected one", field="messages")
            photos.append(decode_data_url(part["image_url"].get("url"), f"{where}[{number}].image_url.url"))
        else:
            raise RefusedError(400, f"{where}[{number}].type: expected text or image_url", field="messages")
    return "\n".join(texts), photos


def _texts(value: object, name: str) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise RefusedError(400, f"{name}: expected a list of texts", field=name)
    return value


def _number(fields: Mapping[str, Any], name: str, least: int, most: int) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise RefusedError(400, f"{name}: expected a whole number of at least {least}", field=name)
    return min(value, most)


def _max_tokens(fields: Mapping[str, Any]) -> int | None:
    """Return the limit that the request sets; one above the server's is that of the server."""
    limits = [_number(fields, name, 1, MAX_NEW_TOKENS) for name in ("max_completion_tokens", "max_tokens")]
    return next((limit for limit in limits if limit is not None), None)


def _decoding(fields: Mapping[str, Any]) -> str | None:
    found = fields.get("decoding")
    if found not in (None, *DECODINGS):
        raise RefusedError(400, f"decoding: expected one of {', '.join(DECODINGS)}", field="decoding")
    return found


def completion(chat: Chat, replies: Sequence[Reply], predictor: Predictor) -> dict[str, Any]:
    """Return the response. grounding: boxes in pixels and confidences, as predictions.jsonl has them."""
    message = {"role": "assistant", "content": text_of(replies), "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": _finish_reason(replies), "logprobs": None}
    more = {"usage": _usage(replies, predictor), "grounding": grounding(chat, replies)}
    return {**_head(chat, "chat.completion"), "choices": [choice], **more}


def chunk(chat: Chat, delta: Mapping[str, Any], replies: Sequence[Reply] | None = None) -> dict[str, Any]:
    """Return a part of a streamed response. replies: for the last part."""
    finish = None if replies is None else _finish_reason(replies)
    choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
    more = {} if replies is None else {"grounding": grounding(chat, replies)}
    return {**_head(chat, "chat.completion.chunk"), "choices": [choice], **more}


def text_of(replies: Sequence[Reply]) -> str:
    return "\n".join(reply.text for reply in replies)


def grounding(chat: Chat, replies: Sequence[Reply]) -> dict[str, Any]:
    return {"image_size_px": chat.order.photo.size, "answers": [reply_fields(reply) for reply in replies]}


def _head(chat: Chat, kind: str) -> dict[str, Any]:
    return {"id": chat.number, "object": kind, "created": chat.created, "model": chat.model}


def _finish_reason(replies: Sequence[Reply]) -> str:
    return "length" if any(reply.truncated for reply in replies) else "stop"


def _usage(replies: Sequence[Reply], predictor: Predictor) -> dict[str, int]:
    """Count tokens: the image once, and the prompts without earlier turns."""
    config, tokenizer = predictor.model.config, predictor.tokenizer
    asked = sum(len(encode_prompt(reply.prompt, tokenizer, config.template_version)) for reply in replies)
    prompt, answer = config.num_patches + 3 + asked, sum(len(tokenizer.encode(reply.text)) for reply in replies)
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def error_fields(error: RefusedError) -> dict[str, Any]:
    """Return an error in OpenAI's form."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {"error": {"message": str(error), "type": kind, "param": error.field, "code": error.code}}
