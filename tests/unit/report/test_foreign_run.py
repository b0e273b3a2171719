"""The report of somebody else's run folder: it calls no server, reads no environment and no file outside of the run."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from report_run import write_run

from cogvlm_ft.launch.report import address_in, main
from cogvlm_ft.report.gallery import photo_inside


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """Yield the address of a server, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}", asked
        listening.shutdown()


def test_a_foreign_run_calls_no_server_and_reads_no_environment(
    server: tuple[str, list[str]], shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, asked = server
    monkeypatch.setenv("WANDB_API_KEY", "5ecr3t" * 7)
    write_run(tmp_path / "run", shards)
    config = tmp_path / "run" / "config.yaml"
    hostile = f"{address}/${{oc.env:WANDB_API_KEY}}"
    others = [f"[{{path: '{hostile}'}}]", f"'{address}/x'", f"'{{{address.partition(':')[0]},x}}:{{//,//}}y/z'"]
    for written in (f"'{hostile}'", *others):
        config.write_text(f"output_dir: o\nmodel: {{path: m}}\ndata: {{shards: {written}}}\n")
        for more in ([], ["--config", str(config)]):
            assert main([str(tmp_path / "run"), *more]) == 0
    assert asked == []
    assert "5ecr3t" not in (tmp_path / "run" / "report.html").read_text()
    assert main([str(tmp_path / "run"), f"data.shards={address}/mine"]) == 0  # named on the command line
    assert asked and all(path.startswith("/mine/") for path in asked)
    assert address_in(str(shards)) is None and address_in([{"path": str(shards), "weight": 1.0}]) is None


def test_a_gallery_shows_photos_of_its_run_only(tmp_path: Path) -> None:
    evaluations = tmp_path / "run" / "evaluations"
    (evaluations / "photos").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "private.png")
    Image.new("RGB", (8, 8)).save(evaluations / "photos" / "a.jpg")
    (evaluations / "photos" / "link.jpg").symlink_to(tmp_path / "private.png")
    assert photo_inside(evaluations, "photos/a.jpg") == (evaluations / "photos" / "a.jpg").resolve()
    for file in ("../../private.png", str(tmp_path / "private.png"), "photos/link.jpg", ["x"], "photos"):
        assert photo_inside(evaluations, file) is None, json.dumps(file)
