"""All checks, in the order in which they are made."""

from __future__ import annotations

from cogvlm_ft.doctor.build_locks import LOCKS
from cogvlm_ft.doctor.examination import Check
from cogvlm_ft.doctor.inputs import MODEL, PLAN, SHARDS, WORDING
from cogvlm_ft.doctor.links import ENGINE, LINKS
from cogvlm_ft.doctor.machine import CLOCKS, GPUS, HOST, RANKS, VERSIONS
from cogvlm_ft.doctor.services import WANDB
from cogvlm_ft.doctor.storage import DISK, FOLDER, LEFTOVERS, SHARING

# The links last: a message that never arrives may end the process.
CHECKS: tuple[Check, ...] = (
    *(VERSIONS, RANKS, GPUS, HOST, CLOCKS, LOCKS),
    *(MODEL, WORDING, SHARDS, PLAN),
    *(FOLDER, SHARING, DISK, LEFTOVERS, WANDB),
    *(LINKS, ENGINE),
)
