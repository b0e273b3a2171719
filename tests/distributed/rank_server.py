"""Fork Python programs from one process that has imported the heavy libraries. Started by ranks.py.

Usage: rank_server.py SOCKET_FD SECONDS. Each message on the socket is a JSON request: number, argv, cwd, environment,
stdout, stderr. The answers are {"number", "pid"} when the program runs and {"number", "code"} when it has ended, with a
negative code for a signal. The server ends, and every program with it, when the other end of the socket is closed.

A forked program is what `python argv...` would be: a session of its own, the given environment, ordinary signals, and
the interpreter's ordinary end. Only what libraries read while they are imported (OMP_NUM_THREADS, HF_HOME, ...) keeps
the values that the server was started with.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
from pathlib import Path
from typing import Any

IMPORTED = (
    "cogvlm_ft.train.loop",
    "cogvlm_ft.train.start",
    "cogvlm_ft.jobs.sweep",
    "cogvlm_ft.export.export",
    "cogvlm_ft.planning.preflight",
    "cogvlm_ft.planning.out_of_memory",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.tokenization_llama",
    "deepspeed.ops.adam",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "PIL.JpegImagePlugin",
    "PIL.PngImagePlugin",
    "sacrebleu",
    "setuptools",
    "torch.utils.cpp_extension",
)
MAX_MESSAGE_BYTES = 1 << 20
PR_SET_PDEATHSIG = 1


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    before = set(os.environ)
    gc.disable()
    for name in IMPORTED:
        importlib.import_module(name)
    gc.enable()
    set_by_imports = {key: value for key, value in os.environ.items() if key not in before}
    num_threads = len(os.listdir("/proc/self/task"))  # noqa: PTH208
    assert num_threads == 1, f"{num_threads} threads; expected 1, since forked processes keep only one"
    gc.freeze()  # collections in the forked processes then leave the shared pages alone
    request = serve(control)
    if request is not None:
        become(request, set_by_imports)


def serve(control: socket.socket) -> dict[str, Any] | None:
    """Fork one process per request and report each end. Return the request in a forked process, None in the server."""
    running: dict[int, tuple[int, int]] = {}  # pidfd -> (number, pid)
    with selectors.PollSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fd in running:
                    number, pid = running.pop(key.fd)
                    selector.unregister(key.fd)
                    os.close(key.fd)
                    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                    control.send(json.dumps({"number": number, "code": code}).encode())
                    continue
                message = control.recv(MAX_MESSAGE_BYTES)
                if not message:
                    return None
                request = json.loads(message)
                pid = fork(request)
                if pid == 0:
                    for descriptor in running:
                        os.close(descriptor)
                    control.close()
                    return request
                pidfd = os.pidfd_open(pid)
                running[pidfd] = request["number"], pid
                selector.register(pidfd, selectors.EVENT_READ)
                control.send(json.dumps({"number": request["number"], "pid": pid}).encode())


def fork(request: dict[str, Any]) -> int:
    """Return when the new process leads its session, so that killing its group cannot miss it."""
    server, (ready, set_ready) = os.getpid(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != server:
            os._exit(1)  # the server ended before the call above
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            file = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, descriptor)
            os.close(file)
    os.close(set_ready)
    if pid:
        os.read(ready, 1)  # ends when the other end is closed
    os.close(ready)
    return pid


def become(request: dict[str, Any], set_by_imports: dict[str, str]) -> None:
    """Run the program in this process as the interpreter would."""
    os.environ.clear()
    os.environ.update({**set_by_imports, **request["environment"]})
    os.chdir(request["cwd"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = request["argv"]
    if sys.argv[0] == "-m":
        sys.path[0] = request["cwd"]
        module = sys.argv.pop(1)
        sys.argv[0] = module
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return
    program = Path(sys.argv[0])
    sys.path[:1] = [str(program.resolve().parent), str(Path(__file__).parents[1])]  # as PYTHONPATH in ranks.py
    runpy.run_path(str(program), run_name="__main__")


if __name__ == "__main__":
    main()
