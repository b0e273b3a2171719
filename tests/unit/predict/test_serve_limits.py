"""Connections to the page that send nothing, or a photo that never ends: others are answered meanwhile."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from running_server import running

from cogvlm_ft.predict import bodies, serve
from cogvlm_ft.predict.batching import AnswerQueue
from cogvlm_ft.predict.predictor import Asking, load_predictor
from cogvlm_ft.predict.served import ServedModels

pytest.importorskip("uvicorn")
TIMEOUT_S = 0.3


@pytest.fixture
def port(start_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(serve, "HEAD_TIMEOUT_S", TIMEOUT_S)
    monkeypatch.setattr(bodies, "CHUNK_TIMEOUT_S", TIMEOUT_S)
    served = ServedModels(load_predictor(start_model, Asking()), "start")
    app = serve.build_app(served, AnswerQueue(served.answer), "127.0.0.1")
    with running(app) as number:
        yield number


def test_connections_that_send_nothing_are_ended_and_keep_nobody_out(port: int) -> None:
    with ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection(("127.0.0.1", port), 10)) for _ in range(30)]
        idle[0].sendall(b"GET / HTT")
        page = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        page.request("GET", "/")
        assert page.getresponse().read() and page.sock is not None
        slow = stack.enter_context(socket.create_connection(("127.0.0.1", port), 10))
        head = "POST /ask?asked=x HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\n"
        slow.sendall(f"{head}Content-Length: 100\r\n\r\nabc".encode())
        assert b" 408 " in slow.recv(100)
        for each in idle:
            with suppress(ConnectionResetError):
                assert each.recv(1) == b""
