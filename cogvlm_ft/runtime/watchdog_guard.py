"""Abort a process whose Python cannot run; started by the process's own watchdog, with the standard library alone.

Usage: watchdog_guard.py PID TICK_S NUM_TICKS TITLE       standard input: a byte for each tick, closed at the end

The process is aborted after NUM_TICKS ticks in a row without a byte. Its faulthandler then writes its stacks. Ticks in
which it is stopped, or this guard with it, do not count.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from pathlib import Path

STDIN = 0
DUMP_S = 30.0  # for the stacks; then it is killed


def main() -> None:
    pid, tick_s, num_ticks, title = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
    num_silent = 0
    while os.getppid() == pid:
        if select.select([STDIN], [], [], tick_s)[0]:
            if not os.read(STDIN, 4096):
                return
            num_silent = 0
        elif not is_stopped(pid):
            num_silent += 1
        if num_silent >= num_ticks:
            print(title, file=sys.stderr, flush=True)
            os.kill(pid, signal.SIGABRT)
            time.sleep(DUMP_S)
            if os.getppid() == pid:
                os.kill(pid, signal.SIGKILL)
            return


def is_stopped(pid: int) -> bool:
    """Return whether the process is suspended or traced."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] in (b"T", b"t")
    except OSError:
        return False


if __name__ == "__main__":
    main()
