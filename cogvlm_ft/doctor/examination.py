"""What a check is, and how all of them are made: every rank looks, rank 0 judges and says it at once."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from cogvlm_ft.errors import CheckpointError, ConfigError, DataError
from cogvlm_ft.model import model_config_of
from cogvlm_ft.planning.memory import Cluster, MemoryEstimate, Planner
from cogvlm_ft.planning.preflight import cluster_of, machine_facts, smallest_pass
from cogvlm_ft.runtime.bandwidth import SideChannel
from cogvlm_ft.runtime.distributed import is_main, rank, world_size
from cogvlm_ft.settings import Config

COLOURS = {"green": "\033[32m", "yellow": "\033[33m", "red": "\033[31m"}
PLAIN = "\033[0m"
INDENT = " " * 8


@dataclass(frozen=True)
class Finding:
    """One line of the report. What is red says what was wanted and what to do, where `found` does not say it itself."""

    level: str  # green | yellow | red
    found: str
    wanted: str = ""
    to_do: str = ""


def green(found: str) -> Finding:
    return Finding("green", found)


def yellow(found: str, to_do: str) -> Finding:
    return Finding("yellow", found, to_do=to_do)


def red(found: str, wanted: str, to_do: str) -> Finding:
    return Finding("red", found, wanted, to_do)


@dataclass(frozen=True)
class Examination:
    """Of one run-to-be, on these machines. token: the same on all ranks, of nobody else."""

    config: Config
    cluster: Cluster
    token: str
    all_shards: bool = False
    fix: bool = False

    @property
    def is_alone(self) -> bool:
        """Whether one process looks for a training that may have many."""
        return world_size() == 1

    @cached_property
    def planner(self) -> Planner | None:
        """None where the model or the engine's settings cannot be read, which is a finding elsewhere."""
        try:
            model_config = model_config_of(self.config)
            return Planner(self.config, model_config, self.cluster)
        except (ConfigError, CheckpointError, OSError, ValueError):
            return None

    @cached_property
    def estimate(self) -> MemoryEstimate | None:
        """Of the smallest pass, as a training judges itself when it starts."""
        return self.planner.estimate(smallest_pass(self.config)) if self.planner else None


class Seen(NamedTuple):
    """What one rank saw. error: why it saw nothing; by_user: in which case it is a mistake that says what to do."""

    rank: int
    host: str
    facts: Any = None
    error: str = ""
    by_user: bool = False


@dataclass(frozen=True)
class Check:
    """`look` runs where `who` says (main | node: the first rank of each | all) and talks to no other rank unless all
    take part; `judge` runs on rank 0. is_vital: if it is red, nothing after it can be looked at."""

    title: str
    look: Callable[[Examination], Any]
    judge: Callable[[Examination, list[Seen]], list[Finding]]
    who: str = "main"
    is_vital: bool = False


def begin(config: Config, channel: SideChannel, *, all_shards: bool = False, fix: bool = False) -> Examination:
    """Collective."""
    machines = channel.from_main(channel.to_main(machine_facts()))
    token = channel.from_main(os.urandom(8).hex())
    return Examination(config, cluster_of(machines), token, all_shards, fix)


def examine(examination: Examination, channel: SideChannel, checks: Sequence[Check]) -> int:
    """Collective. Make the checks, print a line for each finding as it is made; the number of red ones, everywhere."""
    num_red = 0
    for check in checks:
        seen = channel.to_main(_look(check, examination))
        findings = _judge(check, examination, [part for part in seen if part]) if seen is not None else []
        for finding in findings:
            print(as_text(check.title, finding, sys.stdout.isatty() and "NO_COLOR" not in os.environ), flush=True)
        red_here = channel.from_main(sum(finding.level == "red" for finding in findings))
        num_red += red_here
        if red_here and check.is_vital:
            break
    return num_red


def _look(check: Check, examination: Examination) -> Seen | None:
    takes_part = {"main": is_main(), "node": os.environ.get("LOCAL_RANK", "0") == "0", "all": True}[check.who]
    if not takes_part:
        return None
    seen = Seen(rank(), socket.gethostname())
    try:
        return seen._replace(facts=check.look(examination))
    except (ConfigError, DataError, CheckpointError) as error:
        return seen._replace(error=str(error), by_user=True)
    except Exception as error:  # whatever it is, the other checks are still worth making
        return seen._replace(error=f"{type(error).__name__}: {error}")


def _judge(check: Check, examination: Examination, seen: list[Seen]) -> list[Finding]:
    """What ranks could not look at, once for each reason; else what the check makes of it."""
    reasons = {part.error: part for part in reversed(seen) if part.error}
    if not reasons:
        try:
            return check.judge(examination, seen)
        except Exception as error:
            reasons = {"": Seen(0, socket.gethostname(), error=f"{type(error).__name__}: {error}")}
    return [
        Finding("red", part.error + (f" (seen on {part.host})" if examination.cluster.num_nodes > 1 else ""))
        if part.by_user
        else red(
            f"rank {part.rank} on {part.host} could not look: {part.error}",
            "a machine on which this can be looked at",
            "mend that first: a training would meet it too",
        )
        for part in reasons.values()
    ]


def as_text(title: str, finding: Finding, coloured: bool = False) -> str:
    """`red     shards: ...`, and below it what was wanted and what to do."""
    level = f"{finding.level:<{len(INDENT)}}"
    first = f"{COLOURS[finding.level]}{level}{PLAIN}" if coloured else level
    lines = [f"{first}{title}: {finding.found}"]
    lines += [f"{INDENT}wanted: {finding.wanted}"] if finding.wanted else []
    lines += [f"{INDENT}do: {finding.to_do}"] if finding.to_do else []
    return "\n".join(lines)
