"""Open one address with webdataset's opener, in a process group that ends with the process that started it.

This is the program of a process of its own, which `whole_files.stream` starts: it reads the address from its input and
writes the content to its output.

webdataset starts curl, gsutil, ais or a command, and these may start others. Here they are all in one group, which this
process kills when its input ends: that happens too if the process that started it was killed.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading

OFFLINE, FAILED, NO_OPENER, NO_PROGRAM = 124, 125, 126, 127
"""Exit codes: the hub cannot be reached, or fails; webdataset knows no opener for the scheme; the program that it
starts is missing."""

_NO_CONNECTION = {"ConnectError", "ConnectTimeout", "ConnectionError", "OfflineModeIsEnabled"}

_CHUNK = 1 << 20


def run() -> None:
    """Be the program."""
    code = _copy(_take_over_input())
    os._exit(code)  # the thread may still wait


def _copy(address: str) -> int:
    """Write the content to the standard output; return the exit code of the program that was started."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # webdataset imports it if there is one: seconds for nothing
    from webdataset.gopen import gopen, gopen_schemes

    scheme = address.partition(":")[0] if "://" in address else ""
    if scheme and scheme not in gopen_schemes:
        return NO_OPENER
    try:
        stream = gopen(address)
    except (FileNotFoundError, ImportError) as error:
        print(error, file=sys.stderr)
        return NO_PROGRAM
    except Exception as error:  # of the libraries that read hf://
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return OFFLINE if {kind.__name__ for kind in type(error).__mro__} & _NO_CONNECTION else FAILED
    shutil.copyfileobj(getattr(stream, "stream", stream), sys.stdout.buffer, _CHUNK)
    sys.stdout.buffer.flush()
    process = getattr(stream, "proc", None)
    status = process.wait() if process else 0
    return status if status >= 0 else 128 - status


def _take_over_input() -> str:
    """Read the address; from then on the end of the input ends this group, and programs started here have none."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            sys.exit(1)
        line += byte
    kept = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)

    def watch() -> None:
        os.read(kept, 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    return line.decode("utf-8", "surrogateescape").rstrip("\n")
