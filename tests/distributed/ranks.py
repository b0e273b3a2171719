"""Run real programs on real ranks: one process each, gloo on this machine, hard timeouts, nothing left running.

    output = run(["launch/train.py", *settings], 2, tmp_path / "logs")           two ranks that must end with 0
    with started(["launch/train.py", *settings], 2, tmp_path / "logs") as ranks:  two ranks to signal, kill, wait for
        ranks.send(signal.SIGTERM)
        assert ranks.wait() == [0, 0], ranks.output()
    done = run_program(["launch/plan.py", *settings])          one process without ranks, as subprocess.run returns it

Programs are forked from one server per test session, rank_server.py, which has imported torch, DeepSpeed and
transformers; this saves 5 s of CPU time per process. A forked process has its own session, environment, log and exit
code, gets signals and ends as any Python process does. Settings that libraries read while they are imported need
`fresh=True`: a new interpreter.

Ports come from a counter that all test processes of this machine share, so that no two jobs get the same one.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
TIMEOUT_S = 240
START_TIMEOUT_S = 240  # of the server: its imports, on a busy machine
SERVER = Path(__file__).with_name("rank_server.py")
OWN_NAMESPACE = Path(__file__).with_name("own_namespace.py")  # a program that runs another one
PORTS = range(20000, 32000)  # below those that the kernel gives to outgoing connections
OF_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class ForkedProcess:
    """Control a process that the server has forked, like subprocess.Popen."""

    def __init__(self, server: ForkServer, number: int, pid: int) -> None:
        self.pid, self._server, self._number = pid, server, number
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.code_of(self._number, 0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (TIMEOUT_S if timeout is None else timeout)
        while self.returncode is None:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or TIMEOUT_S)
            self.returncode = self._server.code_of(self._number, min(left_s, 0.1))
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """Start processes through rank_server.py; any thread may use it."""

    def __init__(self) -> None:
        self._lock, self._number = threading.Lock(), 0
        self._codes: dict[int, int] = {}
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the server runs)
        self._control, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            self._process = subprocess.Popen(
                [sys.executable, str(SERVER), str(other.fileno())],
                cwd=REPOSITORY,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,
            )
        # The server ends when the last copy of this socket is closed: at the latest when this process is gone.
        os.register_at_fork(after_in_child=self._control.close)
        atexit.register(self.close)

    def start(
        self, arguments: Sequence[object], environment: Mapping[str, str], cwd: Path, stdout: Path, stderr: Path
    ) -> ForkedProcess:
        with self._lock:
            self._number += 1
            request = {"number": self._number, "argv": [str(each) for each in arguments], "cwd": str(cwd)}
            request |= {"environment": dict(environment), "stdout": str(stdout), "stderr": str(stderr)}
            self._control.send(json.dumps(request).encode())
            deadline = time.monotonic() + START_TIMEOUT_S
            while time.monotonic() < deadline:
                answer = self._receive(1)
                if answer and "pid" in answer:
                    return ForkedProcess(self, answer["number"], answer["pid"])
            raise TimeoutError(f"rank_server.py forked nothing within {START_TIMEOUT_S} s")

    def code_of(self, number: int, timeout_s: float) -> int | None:
        with self._lock:
            while number not in self._codes and self._receive(timeout_s) is not None:
                pass
            return self._codes.get(number)

    def _receive(self, timeout_s: float) -> dict[str, Any] | None:
        """Return the next answer, None after the timeout."""
        self._control.settimeout(timeout_s)
        try:
            message = self._control.recv(1 << 16)
        except (TimeoutError, BlockingIOError):
            return None
        if not message:
            self._log.seek(0)
            raise RuntimeError(f"rank_server.py has ended\n{self._log.read().decode(errors='replace')}")
        answer = json.loads(message)
        if "code" in answer:
            self._codes[answer["number"]] = answer["code"]
        return answer

    def close(self) -> None:
        self._control.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()


@functools.cache
def fork_server() -> ForkServer:
    """Return the server of this test session, started at the first call."""
    return ForkServer()


Process = ForkedProcess | subprocess.Popen


@dataclass(frozen=True)
class Ranks:
    """Running processes of one job and the files that take their output."""

    processes: list[Process]
    logs: list[Path]

    def wait(self, timeout_s: float = TIMEOUT_S) -> list[int]:
        """Return the exit codes in rank order; raise TimeoutError with every log if they take too long."""
        deadline = time.monotonic() + timeout_s
        try:
            return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            self.kill()
            raise TimeoutError(f"ranks still running after {timeout_s} s\n{self.output()}") from None

    def output(self) -> str:
        return "\n".join(f"--- rank {i}\n{log.read_text(errors='replace')}" for i, log in enumerate(self.logs))

    def send(self, number: signal.Signals) -> None:
        for process in self.processes:
            process.send_signal(number)

    def kill(self) -> None:
        for process in self.processes:
            kill_group(process)


def kill_group(process: Process) -> None:
    """Kill the process and all that it has started in its session, and wait for its end."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def free_port() -> int:
    """Return a port that no other caller on this machine gets for a long time, and that nothing listens to."""
    with Path(tempfile.gettempdir(), f"cogvlm-test-ports-{os.getuid()}").open("a+") as counter:
        fcntl.flock(counter, fcntl.LOCK_EX)
        counter.seek(0)
        port = int(counter.read() or PORTS.start)
        while True:
            port = port + 1 if port + 1 in PORTS else PORTS.start
            with socket.socket() as probe, contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                break
        counter.truncate(0)
        counter.write(str(port))
    return port


@contextlib.contextmanager
def started(
    arguments: Sequence[object], world_size: int, logs: Path, *, cwd: Path = REPOSITORY, fresh: bool = False
) -> Iterator[Ranks]:
    """Start the Python program `arguments` on `world_size` ranks, one thread each; kill what still runs at the end.

    fresh: in new interpreters instead of forked processes.
    """
    logs.mkdir(parents=True, exist_ok=True)
    port, processes, files = free_port(), [], []
    try:
        for rank in range(world_size):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "WANDB_MODE": "disabled",
            }
            files.append(logs / f"rank-{rank}-{time.monotonic_ns()}.log")
            files[-1].touch()
            processes.append(_start(arguments, environment, cwd, files[-1], files[-1], fresh))
        yield Ranks(processes, files)
    finally:
        for process in processes:
            kill_group(process)


def _start(
    arguments: Sequence[object], environment: Mapping[str, str], cwd: Path, stdout: Path, stderr: Path, fresh: bool
) -> Process:
    if not fresh:
        return fork_server().start(arguments, environment, cwd, stdout, stderr)
    command = [sys.executable, *map(str, arguments)]
    paths = os.pathsep.join(filter(None, [str(REPOSITORY / "tests"), environment.get("PYTHONPATH")]))
    own = {**environment, "PYTHONPATH": paths}
    with stdout.open("a") as out, stderr.open("a") as err:
        return subprocess.Popen(command, cwd=cwd, env=own, stdout=out, stderr=err, start_new_session=True)


def run(
    arguments: Sequence[object],
    world_size: int,
    logs: Path,
    timeout_s: float = TIMEOUT_S,
    *,
    cwd: Path = REPOSITORY,
    fresh: bool = False,
) -> str:
    """Run to the end and return the output; every rank must end with 0."""
    with started(arguments, world_size, logs, cwd=cwd, fresh=fresh) as ranks:
        codes = ranks.wait(timeout_s)
        assert codes == [0] * world_size, f"exit codes {codes}\n{ranks.output()}"
        return ranks.output()


def run_program(
    arguments: Sequence[object],
    *,
    cwd: Path = REPOSITORY,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> subprocess.CompletedProcess[str]:
    """Run a Python program (a path, or -m and a module, and arguments) in one forked process, as started from a shell.

    environment: of the process; without it this one's, without what launchers set.
    """
    if environment is None:
        environment = {key: value for key, value in os.environ.items() if key not in OF_LAUNCHERS}
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder, "stdout"), Path(folder, "stderr")
        process = _start(arguments, environment, cwd, stdout, stderr, fresh=False)
        try:
            code = process.wait(timeout_s)
        finally:
            kill_group(process)
        texts = [file.read_text(encoding="utf-8", errors="replace") for file in (stdout, stderr)]
    return subprocess.CompletedProcess([str(each) for each in arguments], code, *texts)


def read_metrics(run: Path, kind: str) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["kind"] == kind]


def wait_for_step(run: Path, step: int, ranks: Ranks, timeout_s: float = 120) -> None:
    """Return when the run has logged that step."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists():
            rows = read_metrics(run, "train")
            if rows and rows[-1]["step"] >= step:
                return
        time.sleep(0.02)
    raise TimeoutError(f"step {step} was not reached\n{ranks.output()}")
