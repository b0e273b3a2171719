"""How an attempt at a training ended, in one word, for the program that may start it again (slurm/train.sbatch).

    progress   a checkpoint was published in this attempt, and the run goes on
    stopped    a stop signal was answered: all is saved, more is to be done
    finished   nothing is left to be done
    refused    a user's mistake, which another attempt would only repeat

No word at all: it died before its first checkpoint. Exit codes cannot say this: where a rank dies, srun kills the
others and reports what its own signal did to them.
"""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path
from typing import Literal

OUTCOME_VARIABLE = "COGVLM_OUTCOME_FILE"

logger = logging.getLogger(__name__)


def write_outcome(outcome: Literal["progress", "stopped", "finished", "refused"]) -> None:
    """Replace the word in the file that the environment names; nothing if it names none. The last word counts."""
    named = os.environ.get(OUTCOME_VARIABLE)
    if not named:
        return
    path = Path(named)
    partial = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}")  # every rank may refuse at once
    try:
        partial.write_text(f"{outcome}\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:  # the attempt then counts as one that died, and is made again
        logger.warning("%s=%s cannot be written: %s", OUTCOME_VARIABLE, path, error)
