"""All checks of the doctor, in the order in which they run.

To add a check, write two functions and list them here:

    read_X(examination) -> facts               runs on the ranks of `who`; picklable facts of this rank
    judge_X(examination, readings) -> findings runs on rank 0 with the facts of all these ranks; green, yellow or red
"""

from __future__ import annotations

from cogvlm_ft.doctor.build_locks import judge_locks, read_locks
from cogvlm_ft.doctor.examination import Check, Examination
from cogvlm_ft.doctor.inputs import (
    judge_model,
    judge_monitor,
    judge_plan,
    judge_shards,
    judge_wording,
    read_model,
    read_monitor,
    read_shards,
    read_wording,
)
from cogvlm_ft.doctor.links import judge_engine, judge_links, read_engine, read_links
from cogvlm_ft.doctor.machine import (
    judge_clocks,
    judge_gpus,
    judge_host,
    judge_ranks,
    judge_versions,
    read_clock,
    read_gpu,
    read_host,
    read_versions,
)
from cogvlm_ft.doctor.services import judge_wandb, read_wandb
from cogvlm_ft.doctor.storage import (
    judge_disk,
    judge_folder,
    judge_leftovers,
    judge_sharing,
    read_disk,
    read_folder,
    read_leftovers,
    read_token,
)


def read_nothing(_: Examination) -> None:
    """Read nothing, for checks of the ranks or the settings themselves."""


VERSIONS = Check("versions", read_versions, judge_versions, who="all")
RANKS = Check("ranks", read_nothing, judge_ranks, who="all")
GPUS = Check("GPUs", read_gpu, judge_gpus, who="all")
HOST = Check("host", read_host, judge_host, who="node")
CLOCKS = Check("clocks", read_clock, judge_clocks, who="all")
LOCKS = Check("build locks", read_locks, judge_locks, who="node")
MODEL = Check("model", read_model, judge_model, who="node")
WORDING = Check("wording", read_wording, judge_wording, who="node")
SHARDS = Check("shards", read_shards, judge_shards, who="all")
MONITOR = Check("monitor", read_monitor, judge_monitor)
PLAN = Check("plan", read_nothing, judge_plan)
FOLDER = Check("output folder", read_folder, judge_folder)
SHARING = Check("output folder", read_token, judge_sharing, who="node")
DISK = Check("disk", read_disk, judge_disk, who="node")
LEFTOVERS = Check("leftovers", read_leftovers, judge_leftovers)
WANDB = Check("W&B", read_wandb, judge_wandb)
LINKS = Check("links", read_links, judge_links, who="all", is_vital=True)
ENGINE = Check("engine", read_engine, judge_engine, who="all")

# The links last: a message that never arrives may end the process.
CHECKS: tuple[Check, ...] = (
    *(VERSIONS, RANKS, GPUS, HOST, CLOCKS, LOCKS),
    *(MODEL, WORDING, SHARDS, MONITOR, PLAN),
    *(FOLDER, SHARING, DISK, LEFTOVERS, WANDB),
    *(LINKS, ENGINE),
)
