"""A local web page: drop a photo, ask, see the boxes. Needs the extra "serve"."""

from __future__ import annotations

import asyncio
import base64
import io
import ipaddress
import re
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from cogvlm_ft.data.reader import MAX_PIXELS, decode_image
from cogvlm_ft.errors import ConfigError, DataError
from cogvlm_ft.html_page import SERVED_POLICY, load_page
from cogvlm_ft.predict.files import answer_questions, question_of, reply_fields
from cogvlm_ft.predict.predictor import Predictor, Reply, draw_replies, split_phrases
from cogvlm_ft.terminal import say

MAX_UPLOAD_BYTES = 50_000_000
MAX_WAITING = 16
"""Questions at a time, answered one after another; more are refused. Connections without a question do not count."""
MAX_CONNECTIONS = 200
HEAD_TIMEOUT_S, CHUNK_TIMEOUT_S, BODY_TIMEOUT_S = 10.0, 10.0, 120.0
"""To send the head of a request, the next part of a photo, and a whole photo; then the connection is closed."""
MODES = ("prompt", "targets")

_STEP_OF_CARD = re.compile(r"^\| step, epoch \| (\d+),", re.MULTILINE)
_STEP_OF_FOLDER = re.compile(r"^step-(\d+)$")
_HEADERS = {
    "Content-Security-Policy": SERVED_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def check_installed() -> None:
    """Raise ConfigError without the extra, before minutes are spent on loading a model."""
    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise ConfigError(f'--serve needs {", ".join(missing)}: pip install -e ".[serve]"')


def serve(
    predictor: Predictor, model: Path, *, host: str = "127.0.0.1", port: int = 8000, upright: bool = True
) -> None:
    """Serve the page until Ctrl-C. Nothing is stored or sent elsewhere. Raises ConfigError if the port is in use.

    model: the folder of the model, whose name and step are shown.
    """
    import uvicorn

    app = build_app(predictor, model, host, upright=upright)
    config = server_config(app, host, port)
    try:
        socket = config.bind_socket()
    except SystemExit:  # uvicorn has reported why
        raise ConfigError(f"--port {port}: cannot listen on {host}; the port may be in use. Choose another") from None
    shown = f"[{host}]" if ":" in host else host
    say(f"http://{shown}:{socket.getsockname()[1]}/  (press Ctrl-C to stop)", flush=True)
    if not _is_own_machine(host):
        say("Everyone who can reach this machine can use it: there is no password and no encryption.", flush=True)
    with suppress(KeyboardInterrupt):  # uvicorn has ended, and raises it again
        uvicorn.Server(config).run(sockets=[socket])


def server_config(app: Any, host: str, port: int) -> Any:
    """Return uvicorn's settings: bounded, and without a log of who asks what."""
    import uvicorn

    return uvicorn.Config(
        app,
        host=host,
        port=port,
        http=_protocol_with_timeout(),
        ws="none",
        limit_concurrency=MAX_CONNECTIONS,
        access_log=False,
        log_level="warning",
        lifespan="off",
    )


def _protocol_with_timeout() -> Any:
    """Return uvicorn's protocol with an end to connections that send no request: they would keep others out."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class TimedProtocol(H11Protocol):
        _end: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_watching()
            super().connection_lost(exc)

        def _watch(self) -> None:
            """Start the clock unless it runs or a request is being answered."""
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_watching()
            elif self._end is None:
                self._end = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.abort)

        def _stop_watching(self) -> None:
            if self._end is not None:
                self._end.cancel()
                self._end = None

    return TimedProtocol


def _is_own_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def build_app(predictor: Predictor, model: Path, host: str, *, upright: bool) -> Any:
    """Build the ASGI application. On a loopback address it answers only to that machine's names.

    This refuses pages from elsewhere whose name is made to resolve to this address.
    """
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.routing import Route

    allowed = ["127.0.0.1", "localhost", "[::1]", host] if _is_own_machine(host) else ["*"]
    page = load_page(Path(__file__).parent)
    shown = page.render_served(
        model_name=model.resolve().name,
        step=trained_step(model),
        image_size=predictor.model.config.image_size,
        wording=predictor.wording.name,
        style=predictor.wording.style or "",
    )
    files = {
        "/": (shown, "text/html"),
        "/page.css": (page.style, "text/css"),
        "/page.js": (page.script, "text/javascript"),
    }
    routes = [Route(path, _file_endpoint(*file)) for path, file in files.items()]
    routes.append(Route("/ask", _ask_endpoint(predictor, upright), methods=["POST"]))
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=allowed)])


def trained_step(model: Path) -> int | None:
    """Return the step of an exported model, from its model card, or of a checkpoint; None if neither is known."""
    card = model / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    found = _STEP_OF_CARD.search(text) or _STEP_OF_FOLDER.search(model.resolve().name)
    return int(found[1]) if found else None


def _file_endpoint(content: str, media_type: str) -> Callable[..., Any]:
    from starlette.requests import Request
    from starlette.responses import Response

    async def endpoint(request: Request) -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)

    return endpoint


def _ask_endpoint(predictor: Predictor, upright: bool) -> Callable[..., Any]:
    """Build the endpoint that answers: the photo is the body, the question is in the query.

    A content type that no plain form can send keeps out pages of other origins: browsers would have to ask first
    (a preflight request), which is not answered.
    """
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import JSONResponse

    one_at_a_time, places = threading.Lock(), threading.Semaphore(MAX_WAITING)

    def answer(photo_bytes: bytes, asked: str, mode: str) -> dict[str, Any]:
        with one_at_a_time:
            return answer_upload(predictor, photo_bytes, asked, mode, upright=upright)

    async def endpoint(request: Request) -> JSONResponse:
        if request.headers.get("content-type") != "application/octet-stream":
            return _refusal(415, "content-type: expected the photo as application/octet-stream")
        if not places.acquire(blocking=False):
            return _refusal(503, f"{MAX_WAITING} questions are waiting already. Ask again in a minute")
        try:
            photo = await asyncio.wait_for(_read_body(request), BODY_TIMEOUT_S)
            query = request.query_params
            found = await run_in_threadpool(answer, photo, query.get("asked", ""), query.get("mode", MODES[0]))
        except (TimeoutError, asyncio.TimeoutError):
            return _refusal(408, "the photo did not arrive in time. Send it again", {"Connection": "close"})
        except _TooLargeError:
            return _refusal(413, f"the photo has more than {MAX_UPLOAD_BYTES // 1_000_000} MB. Send a smaller one")
        except (DataError, ConfigError) as error:
            return _refusal(400, str(error))
        finally:
            places.release()
        return JSONResponse(found, headers=_HEADERS)

    def _refusal(status: int, why: str, more: Mapping[str, str] | None = None) -> JSONResponse:
        return JSONResponse({"error": why}, status_code=status, headers={**_HEADERS, **(more or {})})

    return endpoint


class _TooLargeError(Exception):
    """More bytes than a photo may have."""


async def _read_body(request: Any) -> bytes:
    body = bytearray()
    chunks = request.stream().__aiter__()
    while True:
        try:
            body += await asyncio.wait_for(chunks.__anext__(), CHUNK_TIMEOUT_S)
        except StopAsyncIteration:
            return bytes(body)
        except asyncio.TimeoutError:  # another class before Python 3.11
            raise TimeoutError from None
        if len(body) > MAX_UPLOAD_BYTES:
            raise _TooLargeError


def answer_upload(
    predictor: Predictor, photo_bytes: bytes, asked: str, mode: str, *, upright: bool = True
) -> dict[str, Any]:
    """Return the fields for the page: replies, size of the photo, drawn picture as a data URL. Raises DataError.

    mode: "prompt", or "targets" if `asked` is a list of phrases that the wording asks for.
    """
    if mode not in MODES:
        raise DataError(f"mode: found {mode!r:.40}; expected one of {', '.join(MODES)}")
    question = (
        question_of(targets=split_phrases(asked.replace("，", "、"))) if mode == "targets" else question_of(asked)
    )
    if question.problem:
        raise DataError(question.problem)
    photo = decode_image(photo_bytes, "the photo", MAX_PIXELS, upright=upright)
    [[replies]] = answer_questions(predictor, [photo], [[question]])
    return {
        "image_size_px": photo.size,
        "answers": [reply_fields(reply) for reply in replies],
        "picture": _data_url(photo, replies),
    }


def _data_url(photo: Image.Image, replies: list[Reply]) -> str:
    buffer = io.BytesIO()
    draw_replies(photo, replies).save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
