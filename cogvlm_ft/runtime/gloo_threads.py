"""Let gloo's threads come to rest before the interpreter exits.

Gloo runs collectives in its own threads. Such a thread reports a collective as done before it releases the
tensors, and releasing the last reference to a tensor takes the interpreter's lock. If the interpreter exits in between,
CPython before 3.14 ends the thread inside a C++ destructor: "terminate called without an active exception", and the
process aborts (exit code -6) although its work is done. `destroy_process_group` does not end these threads as long as
anything, such as DeepSpeed, refers to the group.
"""

from __future__ import annotations

import time
from pathlib import Path

THREAD_NAME = "pt_gloo_runloop"
TIMEOUT_S = 10.0
CHECK_EVERY_S = 0.01


def wait_until_at_rest(timeout_s: float = TIMEOUT_S) -> bool:
    """Wait until gloo's threads hold no tensor; False after the timeout.

    Between two checks this thread releases the interpreter's lock, which wakes any thread that waits for it. So a
    thread that sleeps at both checks and was not woken in between does not wait for the lock, but for its next
    collective.
    """
    deadline = time.monotonic() + timeout_s
    before = _threads()
    while before:
        time.sleep(CHECK_EVERY_S)
        now = _threads()
        if now == before and all(state == "S" for state, _ in now.values()):
            return True
        if time.monotonic() > deadline:
            return False
        before = now
    return True


def _threads() -> dict[str, tuple[str, str]]:
    """Return the state and the number of sleeps of gloo's threads by their ids; empty where there is no /proc."""
    found = {}
    for task in Path("/proc/self/task").glob("*"):
        try:
            text = (task / "status").read_text(encoding="utf-8")
        except OSError:  # it has ended
            continue
        fields = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
        if fields["Name"] == THREAD_NAME:
            found[task.name] = fields["State"][0], fields["voluntary_ctxt_switches"]
    return found
