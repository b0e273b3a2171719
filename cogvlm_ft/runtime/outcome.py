"""Report in one word how an attempt at a run ended, for the program that may start it again (slurm/train.sbatch).

    progress   a checkpoint was published in this attempt, and the run continues
    stopped    a stop signal was answered: everything is saved, more is to be done
    finished   nothing is left to be done
    refused    a user's mistake, which another attempt would only repeat

No word: it died before its first checkpoint. Exit codes cannot tell these apart: when a rank dies, srun kills the
others and reports the effect of its own signal.
"""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path
from typing import Literal

from cogvlm_ft.plain_files import open_new

OUTCOME_VARIABLE = "COGVLM_OUTCOME_FILE"

logger = logging.getLogger(__name__)


def write_outcome(outcome: Literal["progress", "stopped", "finished", "refused"]) -> None:
    """Replace the word in the file that the environment names, if it names one. The last word counts."""
    named = os.environ.get(OUTCOME_VARIABLE)
    if not named:
        return
    path = Path(named)
    partial = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}")  # every rank may refuse at once
    try:
        with open_new(partial, "w") as file:
            file.write(f"{outcome}\n")
        partial.replace(path)
    except OSError as error:  # the attempt then counts as one that died, and is repeated
        logger.warning("%s=%s: cannot be written: %s", OUTCOME_VARIABLE, path, error)
