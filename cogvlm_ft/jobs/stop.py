"""Stop a training run: find its process through the lock of its folder, and ask it to save and end."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

from cogvlm_ft.checkpoints.checkpoint import list_checkpoints
from cogvlm_ft.errors import ConfigError
from cogvlm_ft.jobs.hostfile import starts_in, stop_file
from cogvlm_ft.run_folder import RunFolder
from cogvlm_ft.runtime.run_lock import Owner, current_owner, is_on_this_machine

POLL_S = 0.5


def find_owner(folder: Path) -> Owner:
    """Return the process that trains there; ConfigError if none does."""
    owner = current_owner(folder)
    if owner is None:
        raise ConfigError(f"{folder}: no training runs there; expected the output_dir of a running one")
    return owner


def wait_for_end(folder: Path, owner: Owner) -> str:
    """Wait until this process no longer writes there, and return what it has left."""
    while current_owner(folder) == owner:
        time.sleep(POLL_S)
    checkpoints = list_checkpoints(RunFolder(folder).checkpoints)
    return f"ended; the newest checkpoint is {checkpoints[-1]}" if checkpoints else "ended before its first checkpoint"


def ask_to_stop(folder: Path, owner: Owner) -> str:
    """Ask in the way that suits how the run was started, and return that way; ConfigError if it fails."""
    starts = starts_in(folder)
    if starts:
        for start in starts:
            stop_file(start).touch()
        return "on all nodes of the hostfile"
    if owner.batch:  # its script would queue it again if the ranks alone stopped
        command = ["scancel", "--batch", "--signal=TERM", owner.batch]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or error
            raise ConfigError(
                f"{folder}: {owner}: {str(reason).strip()}. Run where Slurm is: {shlex.join(command)}"
            ) from error
        return shlex.join(command)
    if not is_on_this_machine(owner):
        raise ConfigError(
            f"{folder}: {owner}, which is another machine or container than this; expected the same. "
            f"Run there: kill -s USR1 {owner.pid}"
        )
    os.kill(owner.pid, signal.SIGUSR1)
    return f"kill -s USR1 {owner.pid}"
