"""A local web page: drop a photo, ask, see the boxes. Needs the extra "serve"."""

from __future__ import annotations

import base64
import io
import ipaddress
import threading
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from cogvlm_ft.data.reader import MAX_PIXELS, decode_image
from cogvlm_ft.errors import ConfigError, DataError
from cogvlm_ft.html_page import SERVED_POLICY, HtmlPage
from cogvlm_ft.predict.files import answer_questions, question_of, reply_fields
from cogvlm_ft.predict.predictor import Predictor, Reply, draw_replies, split_phrases

MAX_UPLOAD_BYTES = 50_000_000
MAX_WAITING = 16
"""Requests at a time, answered one after another; more are refused."""
MODES = ("prompt", "targets")

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


def serve(predictor: Predictor, *, host: str = "127.0.0.1", port: int = 8000, upright: bool = True) -> None:
    """Serve the page until Ctrl-C. Nothing is stored or sent elsewhere. Raises ConfigError if the port is in use."""
    import uvicorn

    app = build_app(predictor, host, upright=upright)
    config = uvicorn.Config(
        app, host=host, port=port, limit_concurrency=MAX_WAITING, access_log=False, log_level="warning", lifespan="off"
    )
    try:
        socket = config.bind_socket()
    except SystemExit:  # uvicorn has reported why
        raise ConfigError(f"--port {port}: cannot listen on {host}; the port may be in use. Choose another") from None
    shown = f"[{host}]" if ":" in host else host
    print(f"http://{shown}:{socket.getsockname()[1]}/  (press Ctrl-C to stop)", flush=True)
    if not _is_own_machine(host):
        print("Everyone who can reach this machine can use it: there is no password and no encryption.", flush=True)
    with suppress(KeyboardInterrupt):  # uvicorn has ended, and raises it again
        uvicorn.Server(config).run(sockets=[socket])


def _is_own_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def build_app(predictor: Predictor, host: str, *, upright: bool) -> Any:
    """Build the ASGI application. On a loopback address it answers only to that machine's names.

    This refuses pages from elsewhere whose name is made to resolve to this address.
    """
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.routing import Route

    allowed = ["127.0.0.1", "localhost", "[::1]", host] if _is_own_machine(host) else ["*"]
    page = HtmlPage(Path(__file__).parent)
    files = {
        "/": (page.render_served(), "text/html"),
        "/page.css": (page.style, "text/css"),
        "/page.js": (page.script, "text/javascript"),
    }
    routes = [Route(path, _file_endpoint(*file)) for path, file in files.items()]
    routes.append(Route("/ask", _ask_endpoint(predictor, upright), methods=["POST"]))
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=allowed)])


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

    one_at_a_time = threading.Lock()

    def answer(photo_bytes: bytes, asked: str, mode: str) -> dict[str, Any]:
        with one_at_a_time:
            return answer_upload(predictor, photo_bytes, asked, mode, upright=upright)

    async def endpoint(request: Request) -> JSONResponse:
        if request.headers.get("content-type") != "application/octet-stream":
            return _refusal(415, "content-type: expected the photo as application/octet-stream")
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_UPLOAD_BYTES:
                return _refusal(413, f"the photo has more than {MAX_UPLOAD_BYTES // 1_000_000} MB. Send a smaller one")
        query = request.query_params
        try:
            found = await run_in_threadpool(answer, bytes(body), query.get("asked", ""), query.get("mode", MODES[0]))
        except (DataError, ConfigError) as error:
            return _refusal(400, str(error))
        return JSONResponse(found, headers=_HEADERS)

    def _refusal(status: int, why: str) -> JSONResponse:
        return JSONResponse({"error": why}, status_code=status, headers=_HEADERS)

    return endpoint


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
