"""An HTTP server for a folder on a free port, with or without ranges; it records all requests."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Server:
    """ranges: whether it supports ranges; failures: number of range requests answered by 503; cut: ends files early;
    etag, modified: headers; pause_s: after every num_bytes_at_once."""

    folder: Path
    ranges: bool = True
    failures: int = 0
    cut: bool = False
    etag: str = ""
    modified: str = "Thu, 01 Jan 2025 00:00:00 GMT"
    pause_s: float = 0.0
    num_bytes_at_once: int = 100
    url: str = ""
    asked: list[str] = field(default_factory=list)


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 20

    def __init__(self, *args: object, server_settings: Server, **options: object) -> None:
        self.settings = server_settings
        super().__init__(*args, directory=str(server_settings.folder), **options)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        byte_range = self.headers.get("Range")
        self.settings.asked.append(f"{self.path} {byte_range}" if byte_range else self.path)
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        if byte_range and self.settings.failures:
            self.settings.failures -= 1
            self.send_error(503)
        elif byte_range and self.settings.ranges:
            first, last = (int(number) for number in byte_range.removeprefix("bytes=").split("-"))
            self._answer(206, data[first : last + 1], f"bytes {first}-{last}/{len(data)}")
        else:
            self._answer(200, data, None)

    def _answer(self, status: int, body: bytes, content_range: str | None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if content_range:
            self.send_header("Content-Range", content_range)
        if self.settings.etag:
            self.send_header("ETag", f'"{self.settings.etag}"')
            self.send_header("Last-Modified", self.settings.modified)
        if self.settings.cut:
            self.send_header("Connection", "close")
            body, self.close_connection = body[: len(body) // 2], True
        self.end_headers()
        step = self.settings.num_bytes_at_once if self.settings.pause_s else max(1, len(body))
        for start in range(0, len(body), step):
            with contextlib.suppress(ConnectionError):  # the client has given up
                self.wfile.write(body[start : start + step])
            time.sleep(self.settings.pause_s)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serve(settings: Server) -> Iterator[Server]:
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, server_settings=settings)) as server:
        server.daemon_threads = True
        server.block_on_close = False
        settings.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield settings
        finally:
            server.shutdown()
            thread.join()
