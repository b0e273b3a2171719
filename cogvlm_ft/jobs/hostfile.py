"""Start a training run on the nodes of a hostfile, over pdsh and ssh.

ssh starts a shell with an environment of its own on every node, and whatever stands on its command line is read by that
shell and by everybody who lists processes. So one file, for the owner alone, brings environment and command to the
nodes, and only its path is on the command line. It is in output_dir, which all nodes see, and is deleted at the end.

    pdsh -R ssh -w node1,node2 'bash OUTPUT_DIR/.deepspeed_env-k2jx4q.sh %n'      %n: number of the node
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from cogvlm_ft.errors import ConfigError
from cogvlm_ft.plain_files import read_bytes, real_path
from cogvlm_ft.runtime.stop_signals import STOP_SIGNALS, is_ignored
from cogvlm_ft.terminal import say

MAX_NODES = 1024  # that pdsh starts at the same time
MAX_HOSTFILE_BYTES = 2**20
ENVIRONMENT_FILE = ".deepspeed_env"
OF_A_SESSION = re.compile(
    r"HOME|USER|LOGNAME|SHELL|MAIL|PWD|OLDPWD|SHLVL|_|HOSTNAME|TERM|DISPLAY|XAUTHORITY|KRB5CCNAME|BASHOPTS|SHELLOPTS|"
    r"E?UID|PPID|DBUS_SESSION_BUS_ADDRESS|XDG_(SESSION|RUNTIME)_.*|(SSH|PDSH)_.*|(LOCAL_)?RANK|WORLD_SIZE|MASTER_.*"
)
VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)
STOP_SUFFIX = ".stop"
SCRIPT = """\
# Environment and command of one start by launch/submit.py --hostfile; it may hold keys. $1: number of the node.
run() {{
local asked= launcher
{exports}
cd {folder} || return 2
{command} &
launcher=$!
while kill -0 "$launcher" 2>/dev/null; do
    if [ -z "$asked" ] && [ -e "$0{stop}" ]; then
        asked=yes
        pkill -USR1 -P "$launcher" # the ranks save and end; the launcher would kill them after 30 s
    fi
    sleep 1
done
wait "$launcher"
}}
run "$1"
exit
"""


@dataclass(frozen=True)
class HostfileStart:
    """A start over ssh. nodes: name -> number of GPUs; arguments: of launch/train.py.

    environment: of the shell that starts it; None: that of this process.
    """

    nodes: dict[str, int]
    master_addr: str
    master_port: int
    output_dir: Path
    arguments: list[str]
    environment: Mapping[str, str] | None = None

    def command(self, file: Path | str) -> list[str]:
        """Return the command that runs the file on every node; pdsh replaces %n, and %% by %."""
        path = shlex.quote(str(file)).replace("%", "%%")
        return ["pdsh", "-S", "-R", "ssh", "-f", str(MAX_NODES), "-w", ",".join(self.nodes), f"bash {path} %n"]


def read_hostfile(path: Path) -> dict[str, int]:
    """Read lines such as `node1 slots=8`; raise ConfigError with the number of an invalid line."""
    try:
        lines = read_bytes(path, MAX_HOSTFILE_BYTES).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--hostfile {path}: {error}; expected lines such as: node1 slots=8") from error
    nodes: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        slots = re.fullmatch(r"slots=([1-9]\d*)", words[1]) if len(words) == 2 else None
        if slots is None or words[0] in nodes or not re.fullmatch(r"[\w.:@-]+", words[0], re.ASCII):
            what = "a node that is listed twice" if words[0] in nodes else repr(line)
            raise ConfigError(f"--hostfile {path}, line {number}: found {what}; expected a line such as: node1 slots=8")
        nodes[words[0]] = int(slots[1])
    if not nodes:
        raise ConfigError(f"--hostfile {path}: found no node; expected lines such as: node1 slots=8")
    if len(set(nodes.values())) > 1:
        raise ConfigError(f"--hostfile {path}: found nodes with different slots; expected as many GPUs on every node")
    return nodes


def check_start(start: HostfileStart) -> None:
    """Raise ConfigError if the address of rank 0 is not known, or a program is missing."""
    for program in ("pdsh", "ssh"):
        if shutil.which(program) is None:
            raise ConfigError(
                f"--hostfile: {program} not found; expected it on this node. Install it, or start one command on each "
                "node: docs/slurm.md"
            )
    try:
        socket.getaddrinfo(start.master_addr, start.master_port)
    except OSError as error:
        raise ConfigError(
            f"--hostfile: {start.master_addr}, the first node: {error}; expected a name that all nodes can reach. Give "
            "its address with --master-addr"
        ) from error


def environment_of_nodes(environment: Mapping[str, str], folders: Sequence[Path]) -> dict[str, str]:
    """Return the variables that the ranks get: all but those of this login session, as with torchrun or srun.

    folders: where DeepSpeed looks for a file .deepspeed_env with lines NAME=VALUE, which replace others.
    """
    found = {
        name: value
        for name, value in environment.items()
        if VARIABLE.fullmatch(name) and not OF_A_SESSION.fullmatch(name)
    }
    for file in (folder / ENVIRONMENT_FILE for folder in folders):
        with contextlib.suppress(FileNotFoundError):
            for line in file.read_text(encoding="utf-8").splitlines():
                name, equals, value = line.partition("=")
                if equals and VARIABLE.fullmatch(name.strip()):
                    found[name.strip()] = value.strip()
    return found


def script_of(start: HostfileStart, environment: Mapping[str, str], folder: Path) -> str:
    """Return the file that bash runs on every node, with the number of the node."""
    gpus = {node: list(range(slots)) for node, slots in start.nodes.items()}
    world = base64.urlsafe_b64encode(json.dumps(gpus).encode()).decode()  # as DeepSpeed's launcher takes it
    launcher = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}"]
    launcher += [f"--master_addr={start.master_addr}", f"--master_port={start.master_port}"]
    program = ["--module", "cogvlm_ft.launch.train", *start.arguments]
    exports = "\n".join(f"export {name}={shlex.quote(value)}" for name, value in environment.items())
    command = f'{shlex.join(launcher)} --node_rank="$1" {shlex.join(program)}'
    return SCRIPT.format(exports=exports, folder=shlex.quote(str(folder)), command=command, stop=STOP_SUFFIX)


def run_on_nodes(start: HostfileStart) -> int:
    """Run the training on all nodes and return the exit code. A signal to stop is passed on: all ranks save and end."""
    given = os.environ if start.environment is None else start.environment
    environment = environment_of_nodes(given, [Path.home(), Path.cwd()])
    with environment_file(start.output_dir, script_of(start, environment, Path.cwd())) as file:
        command = start.command(file)
        say(shlex.join(command), flush=True)
        pdsh = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        with stop_passed_on(file, pdsh):
            code = pdsh.wait()
    if code == 127:
        say(f"output_dir={start.output_dir} must be on a file system that all nodes see", file=sys.stderr)
    return code


@contextlib.contextmanager
def environment_file(folder: Path, text: str) -> Iterator[Path]:
    """Write the file, which only its owner can read, and delete it at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(".sh", f"{ENVIRONMENT_FILE}-", real_path(folder))  # mode 0600
    path = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
        yield path
    finally:
        path.unlink(missing_ok=True)
        stop_file(path).unlink(missing_ok=True)


def stop_file(path: Path) -> Path:
    """Return the file that asks the ranks of a start to stop once it exists."""
    return path.with_name(path.name + STOP_SUFFIX)


def starts_in(folder: Path) -> list[Path]:
    """Return the environment files of the starts that write into this output_dir."""
    return sorted(folder.glob(f"{ENVIRONMENT_FILE}-*.sh"))


@contextlib.contextmanager
def stop_passed_on(file: Path, pdsh: subprocess.Popen[bytes]) -> Iterator[None]:
    """Pass a signal to stop to the ranks; the second Ctrl-C leaves them."""

    def pass_on(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and stop_file(file).exists():
            pdsh.terminate()
            return
        stop_file(file).touch()
        os.write(2, b"stopping: the ranks save after the current step and end (Ctrl-C again leaves them alone)\n")

    numbers = [number for number in (signal.SIGINT, *STOP_SIGNALS) if not is_ignored(number)]
    former = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
