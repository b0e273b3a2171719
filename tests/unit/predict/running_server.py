"""A real server on a free port of this machine, in a thread."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cogvlm_ft.predict.serve import server_config


@contextmanager
def running(app: Any) -> Iterator[int]:
    """Yield the port of the running application."""
    import uvicorn

    server = uvicorn.Server(server_config(app, "127.0.0.1", 0))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield listening.getsockname()[1]
        server.should_exit = True
        thread.join(10)
