"""The web server: a page to drop a photo, ask and see the boxes, and endpoints for programs.

Needs the extra "serve".
"""

from __future__ import annotations

import asyncio
import base64
import io
import ipaddress
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from cogvlm_ft.errors import ConfigError, DataError
from cogvlm_ft.html_page import SERVED_POLICY, load_page
from cogvlm_ft.plain_files import real_path
from cogvlm_ft.predict.access import KEY_VARIABLE, KeyRequired
from cogvlm_ft.predict.api import Api, endpoint
from cogvlm_ft.predict.batching import AnswerQueue
from cogvlm_ft.predict.bodies import Places, RefusedError, read_body
from cogvlm_ft.predict.files import Question, question_of, reply_fields
from cogvlm_ft.predict.predictor import draw_replies, split_phrases
from cogvlm_ft.predict.replies import Reply
from cogvlm_ft.predict.served import ServedModels, Settings
from cogvlm_ft.terminal import say

MAX_CONNECTIONS = 200
HEAD_TIMEOUT_S = 10.0
"""Seconds in which a client must send the head of a request, before the connection is closed."""
MIN_KEY_LENGTH = 16
MODES = ("prompt", "targets")

_STEP_OF_CARD = re.compile(r"^\| step, epoch \| (\d+),", re.MULTILINE)
_STEP_OF_FOLDER = re.compile(r"^step-(\d+)$")
_HEADERS = {
    "Content-Security-Policy": SERVED_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Endpoints:
    """The endpoints besides the page. for_programs: /v1 and the labelling tools. key: required from everyone.

    photos: the root of Label Studio's local storage.
    """

    for_programs: bool = False
    key: str | None = None
    photos: Path | None = None


def check_installed(option: str) -> None:
    """Raise ConfigError without the extra, before minutes are spent on loading a model."""
    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise ConfigError(f'{option} needs {", ".join(missing)}: pip install -e ".[serve]"')


def check_key(host: str, key: str | None) -> None:
    """Raise ConfigError if other machines could use the server without a key."""
    if key is None and not _is_own_machine(host):
        raise ConfigError(
            f"--host {host}: others can reach this address, and there is no key; expected {KEY_VARIABLE} in the "
            "environment. Set it, or omit --host"
        )
    if key is not None and (len(key) < MIN_KEY_LENGTH or not key.isascii() or key != key.strip()):
        raise ConfigError(
            f"{KEY_VARIABLE}: found a key of {len(key)} characters; expected at least {MIN_KEY_LENGTH}, ASCII, no "
            "blanks around it. Make one with: openssl rand -hex 32"
        )


def serve(
    served: ServedModels, *, host: str = "127.0.0.1", port: int = 8000, endpoints: Endpoints = Endpoints()
) -> None:
    """Serve until Ctrl-C. Nothing is stored or sent elsewhere. Raises ConfigError if the port is in use."""
    import uvicorn

    answers = AnswerQueue(served.answer)
    config = server_config(build_app(served, answers, host, endpoints), host, port)
    try:
        socket = config.bind_socket()
    except SystemExit:  # uvicorn has reported why
        raise ConfigError(f"--port {port}: cannot listen on {host}; the port may be in use. Choose another") from None
    shown = f"[{host}]" if ":" in host else host
    say(f"http://{shown}:{socket.getsockname()[1]}/  (press Ctrl-C to stop)", flush=True)
    if not _is_own_machine(host):
        protection = "there is no encryption" if endpoints.key else "there is no password and no encryption"
        say(f"Everyone who can reach this machine can use it: {protection}.", flush=True)
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


def build_app(served: ServedModels, answers: AnswerQueue, host: str, endpoints: Endpoints = Endpoints()) -> Any:
    """Build the ASGI application. On a loopback address it answers only to that machine's names.

    This refuses pages from elsewhere whose name is made to resolve to this address.
    """
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.routing import Route

    allowed = ["127.0.0.1", "localhost", "[::1]", host] if _is_own_machine(host) else ["*"]
    places = Places()
    routes = [Route(path, _file_endpoint(*file)) for path, file in _page_files(served).items()]
    routes.append(Route("/ask", _ask_endpoint(served, answers, places), methods=["POST"]))
    if endpoints.for_programs:
        routes += Api(served, answers, places, endpoints.photos).routes()
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=allowed)]
    if endpoints.key is not None:
        middleware.append(Middleware(KeyRequired, key=endpoints.key))
    return Starlette(routes=routes, middleware=middleware)


def _page_files(served: ServedModels) -> dict[str, tuple[str, str]]:
    """Return the text and the media type of each file of the page."""
    predictor = served.base
    page = load_page(Path(__file__).parent)
    shown = page.render_served(
        model_name=real_path(predictor.weights).name,
        step=trained_step(predictor.weights),
        image_size=predictor.model.config.image_size,
        wording=predictor.wording.name,
        style=predictor.wording.style or "",
    )
    return {
        "/": (shown, "text/html"),
        "/page.css": (page.style, "text/css"),
        "/page.js": (page.script, "text/javascript"),
    }


def trained_step(model: Path) -> int | None:
    """Return the step of an exported model, from its model card, or of a checkpoint; None if neither is known."""
    card = model / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    found = _STEP_OF_CARD.search(text) or _STEP_OF_FOLDER.search(real_path(model).name)
    return int(found[1]) if found else None


def _file_endpoint(content: str, media_type: str) -> Callable[..., Any]:
    from starlette.requests import Request
    from starlette.responses import Response

    async def file(request: Request) -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)

    return file


def _ask_endpoint(served: ServedModels, answers: AnswerQueue, places: Places) -> Callable[..., Any]:
    """Build the endpoint that answers: the photo is the body, the question is in the query.

    A content type that no plain form can send keeps out pages of other origins: browsers would have to ask first
    (a preflight request), which is not answered.
    """
    from starlette.concurrency import run_in_threadpool

    async def answer(request: Any) -> dict[str, Any]:
        if request.headers.get("content-type") != "application/octet-stream":
            raise RefusedError(415, "content-type: expected the photo as application/octet-stream")
        with places.taken():
            photo, query = await read_body(request), request.query_params
            question = question_on_page(query.get("asked", ""), query.get("mode", MODES[0]))
            order = await run_in_threadpool(served.order, photo, [question], Settings())
            found = answers.submit(order)
        [replies] = await asyncio.wrap_future(found)
        return await run_in_threadpool(_fields_of, order.photo, replies)

    return endpoint(answer, lambda refused: {"error": str(refused)}, _HEADERS)


def question_on_page(asked: str, mode: str) -> Question:
    """Return the question of the page. mode: "prompt", or "targets" if `asked` is a list of phrases."""
    if mode not in MODES:
        raise DataError(f"mode: found {mode!r:.40}; expected one of {', '.join(MODES)}")
    if mode == "targets":
        return question_of(targets=split_phrases(re.sub(r"[，\n]", "、", asked)))
    return question_of(asked)


def _fields_of(photo: Image.Image, replies: list[Reply]) -> dict[str, Any]:
    """Return the fields for the page: replies, size of the photo, drawn picture as a data URL."""
    return {
        "image_size_px": photo.size,
        "answers": [reply_fields(reply) for reply in replies],
        "picture": _data_url(photo, replies),
    }


def _data_url(photo: Image.Image, replies: list[Reply]) -> str:
    buffer = io.BytesIO()
    draw_replies(photo, replies).save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
