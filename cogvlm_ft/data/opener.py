"""Open one address with webdataset's opener, or a file of the hub (hf://) with the hub's own library.

It does so in a process group that ends with the process that started it.

This is the program of a process of its own, which `whole_files.stream` starts: it reads the address from its input and
writes the content to its output.

webdataset starts curl, gsutil, ais or a command, and these may start others. Here they are all in one group, which this
process kills when its input ends: that happens too if the process that started it was killed.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import threading
from pathlib import Path

ABSENT, OFFLINE, FAILED, NO_OPENER, NO_PROGRAM = 123, 124, 125, 126, 127
"""Exit codes: the hub has no such file, cannot be reached, or fails; webdataset knows no opener for the scheme; the
program that it starts is missing."""

_HUB_ADDRESS = re.compile(
    r"hf://((?P<kind>datasets|models|spaces)/)?(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?/(?P<file>.+)"
)
_NO_CONNECTION = {"ConnectError", "ConnectTimeout", "ConnectionError", "OfflineModeIsEnabled"}
_NOT_THERE = {"FileNotFoundError", "EntryNotFoundError", "RepositoryNotFoundError", "RevisionNotFoundError"}
_CHUNK = 1 << 20


def run() -> None:
    """Run the program."""
    code = _copy(_take_over_input())
    os._exit(code)  # the thread may still wait


def _copy(address: str) -> int:
    """Write the content to the standard output; return the exit code of the program that was started."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # imported if there is one: seconds for nothing
    if address.startswith("hf://"):
        return _copy_from_hub(address)
    from webdataset.gopen import gopen, gopen_schemes

    scheme = address.partition(":")[0] if "://" in address else ""
    if scheme and scheme not in gopen_schemes:
        return NO_OPENER
    try:
        stream = gopen(address)
    except (FileNotFoundError, ImportError) as error:
        print(error, file=sys.stderr)
        return NO_PROGRAM
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return FAILED
    shutil.copyfileobj(getattr(stream, "stream", stream), sys.stdout.buffer, _CHUNK)
    sys.stdout.buffer.flush()
    process = getattr(stream, "proc", None)
    status = process.wait() if process else 0
    return status if status >= 0 else 128 - status


def _copy_from_hub(address: str) -> int:
    """Write a file of the hub, or without a connection the one in its cache, to the standard output.

    webdataset would put the token on the command line of curl.
    """
    from huggingface_hub import HfFileSystem

    try:
        with HfFileSystem().open(address, "rb", block_size=0) as stream:
            shutil.copyfileobj(stream, sys.stdout.buffer, _CHUNK)
    except Exception as error:  # of several libraries
        kinds = {kind.__name__ for kind in type(error).__mro__}
        downloaded = _downloaded(address) if kinds & _NO_CONNECTION else None
        if downloaded is None:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return OFFLINE if kinds & _NO_CONNECTION else ABSENT if kinds & _NOT_THERE else FAILED
        sys.stdout.buffer.write(downloaded.read_bytes())
    sys.stdout.buffer.flush()
    return 0


def _downloaded(address: str) -> Path | None:
    """Return the file of a hf:// address in the cache of huggingface_hub, None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    parts = _HUB_ADDRESS.fullmatch(address)
    if parts is None:
        return None
    kind = (parts["kind"] or "models").removesuffix("s")
    found = try_to_load_from_cache(parts["repo"], parts["file"], revision=parts["revision"], repo_type=kind)
    return Path(found) if isinstance(found, str) else None


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
