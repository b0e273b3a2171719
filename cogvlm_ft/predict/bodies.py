"""The bodies of requests: read within limits of size and time, JSON and images in it. Needs the extra "serve"."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cogvlm_ft.plain_files import parse_json

MAX_UPLOAD_BYTES = 50_000_000
MAX_JSON_BYTES = MAX_UPLOAD_BYTES * 4 // 3 + 1_000_000
"""Maximum size of a JSON body: a photo in base64, and the rest of the request."""
CHUNK_TIMEOUT_S, BODY_TIMEOUT_S = 10.0, 120.0
"""Seconds in which a client must send the next part of a body, and the whole body, before the connection is closed."""
MAX_READING = 16
"""Maximum number of requests that are read and prepared at a time; more are refused."""

_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII)


class RefusedError(Exception):
    """A request that is not answered. code: a short name of the reason; field: of the request's JSON."""

    def __init__(self, status: int, message: str, code: str = "invalid_request", field: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.field = status, code, field


class Places:
    """Bounds how many requests are read at a time. Connections without a request do not count."""

    def __init__(self) -> None:
        self._free = threading.Semaphore(MAX_READING)

    @contextmanager
    def taken(self) -> Iterator[None]:
        if not self._free.acquire(blocking=False):
            raise RefusedError(503, f"{MAX_READING} requests are being read already. Ask again in a minute", "busy")
        try:
            yield
        finally:
            self._free.release()


async def read_body(request: Any, max_bytes: int = MAX_UPLOAD_BYTES) -> bytes:
    """Read the body of a request. Raises RefusedError if it is too large or too slow."""
    try:
        return await asyncio.wait_for(_read(request, max_bytes), BODY_TIMEOUT_S)
    except (TimeoutError, asyncio.TimeoutError):  # another class before Python 3.11
        raise RefusedError(408, "the photo did not arrive in time. Send it again", "timeout") from None


async def _read(request: Any, max_bytes: int) -> bytes:
    body = bytearray()
    chunks = request.stream().__aiter__()
    while True:
        try:
            body += await asyncio.wait_for(chunks.__anext__(), CHUNK_TIMEOUT_S)
        except StopAsyncIteration:
            return bytes(body)
        if len(body) > max_bytes:
            limit = f"the request has more than {max_bytes // 1_000_000} MB. Send a smaller photo"
            raise RefusedError(413, limit, "too_large")


async def read_json(request: Any) -> dict[str, Any]:
    """Read a JSON object.

    A content type that no plain form can send keeps out pages of other origins: browsers would have to ask first (a
    preflight request), which is not answered.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RefusedError(415, "content-type: expected application/json", "content_type")
    try:
        fields = parse_json(await read_body(request, MAX_JSON_BYTES))
    except ValueError as error:
        raise RefusedError(400, f"the body is not valid JSON ({error})", "invalid_json") from None
    if not isinstance(fields, dict):
        raise RefusedError(400, "the body: expected a JSON object", "invalid_json")
    return fields


def decode_data_url(address: object, field: str) -> bytes:
    """Return the bytes of an image in a data URL. Other addresses are refused: nothing is fetched for a client."""
    if not isinstance(address, str):
        raise RefusedError(400, f"{field}: expected a text, data:image/jpeg;base64,...", "invalid_image_url", field)
    head = _DATA_URL.match(address)
    if head is None:
        shown = address[:60].encode("unicode_escape").decode()
        raise RefusedError(
            400,
            f"{field}: found {shown!r}; expected data:image/jpeg;base64,... Addresses are not fetched: send the image",
            "invalid_image_url",
            field,
        )
    return decode_base64(address[head.end() :], field)


def decode_base64(text: str, field: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise RefusedError(400, f"{field}: expected base64", "invalid_image_url", field) from None
    if len(data) > MAX_UPLOAD_BYTES:
        limit = f"{field}: the photo has more than {MAX_UPLOAD_BYTES // 1_000_000} MB. Send a smaller one"
        raise RefusedError(413, limit, "too_large", field)
    return data
