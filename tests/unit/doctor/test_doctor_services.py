"""The doctor on Weights & Biases: a server that answers, refuses, or is not there."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from examining import Examine

from cogvlm_ft.doctor.checks import WANDB

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict]:
    """A W&B server that knows KEY. What it got is in `asked`, what it answers instead in `status`."""
    state: dict = {"asked": [], "status": 200}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            state["asked"].append((self.path, self.headers["Authorization"]))
            viewer = {"username": "tester"} if self.headers["Authorization"] == state["login"] else None
            body = json.dumps({"data": {"viewer": viewer}}).encode()
            self.send_response(state["status"])
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    import base64

    import wandb

    wandb.teardown()
    state["login"] = "Basic " + base64.b64encode(f"api:{KEY}".encode()).decode()
    listening = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    state["address"] = f"http://127.0.0.1:{listening.server_port}"
    monkeypatch.setenv("WANDB_BASE_URL", state["address"])
    yield state
    listening.shutdown()
    thread.join()
    listening.server_close()
    wandb.teardown()


@pytest.mark.slow
def test_wandb_answers_and_knows_the_key(
    run_checks: Examine, server: dict, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", server["address"])
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    num_red, said = run_checks([WANDB], "tracking.mode=auto")
    assert num_red == 0 and f"green   W&B: online: {server['address']} answers and accepts the key (tester)" in said
    assert server["asked"] == [("/graphql", server["login"])] and KEY not in said
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1\n  login user\n  password {KEY}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert "(tester)" in run_checks([WANDB], "tracking.mode=online")[1]


def test_wandb_does_not_know_the_key(run_checks: Examine, server: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", server["address"])
    monkeypatch.setenv("WANDB_API_KEY", "f" * 40)
    num_red, said = run_checks([WANDB], "tracking.mode=auto")
    assert num_red == 0 and "yellow  W&B: " in said and "the server does not accept this key" in said
    server["status"] = 401
    num_red, said = run_checks([WANDB], "tracking.mode=online")
    assert num_red == 1 and "does not accept this key" in said and "f" * 40 not in said


def test_wandb_is_not_there(run_checks: Examine, server: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://me:pa55word@127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    num_red, said = run_checks([WANDB], "tracking.mode=auto")
    assert num_red == 0 and "http://127.0.0.1:9: ConnectionError" in said and "recorded offline" in said
    assert "pa55word" not in said and KEY not in said
    monkeypatch.setenv("WANDB_BASE_URL", server["address"])
    server["status"] = 503
    assert "HTTPError" in run_checks([WANDB], "tracking.mode=online")[1]


def test_wandb_offline(run_checks: Examine, server: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "green   W&B: offline: launch/wandb_sync.py" in run_checks([WANDB], "tracking.mode=offline")[1]
    assert "green   W&B: offline, since there is no API key" in run_checks([WANDB], "tracking.mode=auto")[1]
    assert run_checks([WANDB], "tracking.mode=online")[0] == 1
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert "green   W&B: offline: launch/wandb_sync.py" in run_checks([WANDB], "tracking.mode=auto")[1]
    assert server["asked"] == []
