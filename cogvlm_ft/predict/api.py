"""The endpoints for programs: OpenAI's /v1, and those of labelling tools. Needs the extra "serve"."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cogvlm_ft.errors import ConfigError, DataError
from cogvlm_ft.predict import chat, label_studio, x_anylabeling
from cogvlm_ft.predict.batching import AnswerQueue, BusyError
from cogvlm_ft.predict.bodies import Places, RefusedError, read_json
from cogvlm_ft.predict.served import ServedModels

HEARTBEAT_S = 5.0
"""Seconds between the comments that keep a stream open while its answer is generated."""

logger = logging.getLogger(__name__)

Answer = Callable[[Any], Awaitable[Any]]
ErrorFields = Callable[[RefusedError], dict[str, Any]]


class Api:
    """The endpoints of models that answer through a queue. photos: where the paths of Label Studio begin."""

    def __init__(self, served: ServedModels, answers: AnswerQueue, places: Places, photos: Path | None = None) -> None:
        self._served, self._answers, self._places, self._photos = served, answers, places, photos

    def routes(self) -> list[Any]:
        from starlette.routing import Route

        def get(path: str, work: Answer, errors: ErrorFields = chat.error_fields) -> Route:
            return Route(path, endpoint(work, errors), methods=["GET"])

        def post(path: str, work: Answer, errors: ErrorFields = chat.error_fields) -> Route:
            return Route(path, endpoint(work, errors), methods=["POST"])

        labelling = x_anylabeling.error_fields
        return [
            get("/health", self._health),
            get("/v1/models", self._models),
            get("/v1/models/{name:path}", self._model),
            post("/v1/chat/completions", self._chat),
            get("/label-studio/health", self._label_studio_health),
            post("/label-studio/setup", self._label_studio_setup),
            post("/label-studio/predict", self._label_studio_predict),
            get("/x-anylabeling/health", self._health),
            get("/x-anylabeling/v1/models", self._x_anylabeling_models, labelling),
            post("/x-anylabeling/v1/predict", self._x_anylabeling_predict, labelling),
        ]

    async def _health(self, request: Any) -> dict[str, Any]:
        return {"status": "healthy", "models_loaded": len(self._served.names)}

    async def _models(self, request: Any) -> dict[str, Any]:
        return {"object": "list", "data": [_model_fields(name) for name in self._served.names]}

    async def _model(self, request: Any) -> dict[str, Any]:
        name = request.path_params["name"]
        self._served.adapter_of(name)
        return _model_fields(name)

    async def _chat(self, request: Any) -> Any:
        from starlette.concurrency import run_in_threadpool
        from starlette.responses import StreamingResponse

        with self._places.taken():
            fields = await read_json(request)
            asked = await run_in_threadpool(chat.read_chat, fields, self._served)
            found = self._answers.submit(asked.order)
        if asked.is_stream:
            return StreamingResponse(self._events(asked), media_type="text/event-stream")
        [replies] = await asyncio.wrap_future(found)
        return chat.completion(asked, replies, self._served.base)

    async def _events(self, asked: chat.Chat) -> AsyncIterator[str]:
        """Yield the parts of a stream: the whole text comes at once, after its boxes are complete."""
        found = asyncio.wrap_future(asked.order.found)
        try:
            yield _event(chat.chunk(asked, {"role": "assistant", "content": ""}))
            while not (await asyncio.wait({found}, timeout=HEARTBEAT_S))[0]:
                yield ": waiting\n\n"
            try:
                [replies] = found.result()
            except Exception as error:
                yield _event(chat.error_fields(as_refusal(error)))
                return
            yield _event(chat.chunk(asked, {"content": chat.text_of(replies)}))
            yield _event(chat.chunk(asked, {}, replies))
            yield "data: [DONE]\n\n"
        finally:
            found.cancel()  # of a client that has gone: not answered if it still waits

    async def _label_studio_health(self, request: Any) -> dict[str, Any]:
        return {"status": "UP", "model_class": "cogvlm-ft"}

    async def _label_studio_setup(self, request: Any) -> dict[str, Any]:
        return {"model_version": self._served.name}

    async def _label_studio_predict(self, request: Any) -> dict[str, Any]:
        from starlette.concurrency import run_in_threadpool

        with self._places.taken():
            fields = await read_json(request)
            asked = await run_in_threadpool(label_studio.read_tasks, fields, self._served, self._photos)
            found = [self._answers.submit(order) for order in asked.orders]
        replies = [(await asyncio.wrap_future(each))[0] for each in found]
        return label_studio.results(asked, replies, self._served.name)

    async def _x_anylabeling_models(self, request: Any) -> dict[str, Any]:
        return {"success": True, "data": {name: x_anylabeling.model_fields(name) for name in self._served.names}}

    async def _x_anylabeling_predict(self, request: Any) -> dict[str, Any]:
        from starlette.concurrency import run_in_threadpool

        with self._places.taken():
            fields = await read_json(request)
            order = await run_in_threadpool(x_anylabeling.read_request, fields, self._served)
            found = self._answers.submit(order)
        [replies] = await asyncio.wrap_future(found)
        return x_anylabeling.result(replies, fields)


def endpoint(
    work: Answer, errors: ErrorFields, headers: Mapping[str, str] = MappingProxyType({"Cache-Control": "no-store"})
) -> Callable[..., Any]:
    """Build an endpoint from a function that returns JSON or a response, the form of errors, and headers of JSON."""
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response

    async def answered(request: Request) -> Response:
        try:
            found = await work(request)
        except Exception as error:
            refused = as_refusal(error)
            closing = {"Connection": "close"} if refused.status == 408 else {}
            return JSONResponse(errors(refused), refused.status, headers={**headers, **closing})
        return found if isinstance(found, Response) else JSONResponse(found, headers=dict(headers))

    return answered


def as_refusal(error: Exception) -> RefusedError:
    """Return the refusal for a client; it names an internal error by its type only, and the log has the rest."""
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, BusyError):
        return RefusedError(503, str(error), "busy")
    if isinstance(error, (DataError, ConfigError)):
        return RefusedError(400, str(error), "bad_request")
    logger.error("a request failed", exc_info=error)
    return RefusedError(500, f"{type(error).__name__}; the server's log has the reason", "server_error")


def _model_fields(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "cogvlm-ft"}


def _event(fields: dict[str, Any]) -> str:
    return f"data: {json.dumps(fields, ensure_ascii=False)}\n\n"
