"""The key of the server; requests without it are refused."""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Mapping
from typing import Any

KEY_VARIABLE = "COGVLM_API_KEY"
OPEN_PATHS = frozenset({"/health", "/x-anylabeling/health", "/label-studio/health"})
"""Paths answered without the key: they only show that the server is running."""


class KeyRequired:
    """An ASGI application that passes on requests with the key, and refuses all others.

    The key is a bearer token, as OpenAI's client sends it; the header Token, as X-AnyLabeling sends it; or a password
    of any user, for browsers and Label Studio. It is compared in constant time and never logged.
    """

    def __init__(self, app: Any, key: str) -> None:
        self._app = app
        self._key = key.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.datastructures import Headers

        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._has_key(Headers(scope=scope)):
            await self._app(scope, receive, send)
        else:
            await _refuse(scope, receive, send)

    def _has_key(self, headers: Mapping[str, str]) -> bool:
        found = sent_key(headers)
        return found is not None and hmac.compare_digest(found.encode("utf-8", "surrogateescape"), self._key)


def sent_key(headers: Mapping[str, str]) -> str | None:
    """Return the key that a request has, None without one."""
    scheme, _, rest = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(rest.strip(), validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError, ValueError):
            return None
    return headers.get("token")


async def _refuse(scope: Any, receive: Any, send: Any) -> None:
    from starlette.responses import JSONResponse

    message = f"found no key, or a wrong one; expected the value of {KEY_VARIABLE} as `Authorization: Bearer`"
    error = {"message": message, "type": "authentication_error", "param": None, "code": "invalid_api_key"}
    headers = {"WWW-Authenticate": 'Basic realm="cogvlm"', "Cache-Control": "no-store", "Connection": "close"}
    await JSONResponse({"error": error}, status_code=401, headers=headers)(scope, receive, send)
