"""Define a check and run checks: every rank reads, rank 0 judges and prints each finding at once."""

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
from cogvlm_ft.planning.data_turns import largest_pass
from cogvlm_ft.planning.memory import Cluster, MemoryEstimate, Planner
from cogvlm_ft.planning.preflight import cluster_of, machine_facts
from cogvlm_ft.runtime.bandwidth import SideChannel
from cogvlm_ft.runtime.distributed import is_main, rank, world_size
from cogvlm_ft.settings import Config
from cogvlm_ft.terminal import plain_text

COLOURS = {"green": "\033[32m", "yellow": "\033[33m", "red": "\033[31m"}
PLAIN = "\033[0m"
INDENT = " " * 8


@dataclass(frozen=True)
class Finding:
    """One finding of a report. A red one also says what was expected and what to do, unless `found` says so itself."""

    level: str  # green | yellow | red
    found: str
    expected: str = ""
    to_do: str = ""


def green(found: str) -> Finding:
    return Finding("green", found)


def yellow(found: str, to_do: str) -> Finding:
    return Finding("yellow", found, to_do=to_do)


def red(found: str, expected: str, to_do: str) -> Finding:
    return Finding("red", found, expected, to_do)


@dataclass(frozen=True)
class Examination:
    """Settings and machines of a planned run. token: the same on all ranks of this examination, and on no others."""

    config: Config
    cluster: Cluster
    token: str
    all_shards: bool = False
    fix: bool = False

    @property
    def is_alone(self) -> bool:
        """Return whether one process examines for a run that may have many."""
        return world_size() == 1

    @cached_property
    def planner(self) -> Planner | None:
        """Return None if the model or the engine's settings cannot be read, which other checks report."""
        try:
            model_config = model_config_of(self.config)
            return Planner(self.config, model_config, self.cluster)
        except (ConfigError, CheckpointError, OSError, ValueError):
            return None

    @cached_property
    def estimate(self) -> MemoryEstimate | None:
        """Estimate the largest pass, as a training run does when it starts."""
        if self.planner is None:
            return None
        return self.planner.estimate(largest_pass(self.config, self.planner.model_config))


class Reading(NamedTuple):
    """What one rank has read. error: why it could not; by_user: the error is a user's mistake and says what to do."""

    rank: int
    host: str
    facts: Any = None
    error: str = ""
    by_user: bool = False


@dataclass(frozen=True)
class Check:
    """A check in two steps: ranks read facts, rank 0 judges them.

    who: the ranks that read: main | node (the first rank of each) | all. Only with `all` may `read` be collective.
    is_vital: if it is red, the checks after it cannot run.
    """

    title: str
    read: Callable[[Examination], Any]
    judge: Callable[[Examination, list[Reading]], list[Finding]]
    who: str = "main"
    is_vital: bool = False


def begin(config: Config, channel: SideChannel, *, all_shards: bool = False, fix: bool = False) -> Examination:
    """Exchange the facts of all machines. Collective."""
    machines = channel.from_main(channel.to_main(machine_facts()))
    token = channel.from_main(os.urandom(8).hex())
    return Examination(config, cluster_of(machines), token, all_shards, fix)


def examine(examination: Examination, channel: SideChannel, checks: Sequence[Check]) -> int:
    """Run the checks, print every finding at once; return the number of red ones on every rank. Collective."""
    num_red = 0
    for check in checks:
        readings = channel.to_main(_read(check, examination))
        findings = _judge(check, examination, [part for part in readings if part]) if readings is not None else []
        for finding in findings:
            print(as_text(check.title, finding, sys.stdout.isatty() and "NO_COLOR" not in os.environ), flush=True)
        red_here = channel.from_main(sum(finding.level == "red" for finding in findings))
        num_red += red_here
        if red_here and check.is_vital:
            break
    return num_red


def _read(check: Check, examination: Examination) -> Reading | None:
    reads = {"main": is_main(), "node": os.environ.get("LOCAL_RANK", "0") == "0", "all": True}[check.who]
    if not reads:
        return None
    reading = Reading(rank(), socket.gethostname())
    try:
        return reading._replace(facts=check.read(examination))
    except (ConfigError, DataError, CheckpointError) as error:
        return reading._replace(error=str(error), by_user=True)
    except Exception as error:  # the other checks still run
        return reading._replace(error=f"{type(error).__name__}: {error}")


def _judge(check: Check, examination: Examination, readings: list[Reading]) -> list[Finding]:
    """Return errors of ranks, once for each reason; if there are none, the findings of the check."""
    reasons = {part.error: part for part in reversed(readings) if part.error}
    if not reasons:
        try:
            return check.judge(examination, readings)
        except Exception as error:
            reasons = {"": Reading(0, socket.gethostname(), error=f"{type(error).__name__}: {error}")}
    return [
        Finding("red", part.error + (f" (seen on {part.host})" if examination.cluster.num_nodes > 1 else ""))
        if part.by_user
        else red(
            f"rank {part.rank} on {part.host} failed: {part.error}",
            "a check without an error",
            "fix this first: training would fail as well",
        )
        for part in reasons.values()
    ]


def as_text(title: str, finding: Finding, coloured: bool = False) -> str:
    """Format `red     shards: ...`, and below it what was expected and what to do."""
    level = f"{finding.level:<{len(INDENT)}}"
    first = f"{COLOURS[finding.level]}{level}{PLAIN}" if coloured else level
    lines = [f"{title}: {finding.found}"]
    lines += [f"{INDENT}expected: {finding.expected}"] if finding.expected else []
    lines += [f"{INDENT}do: {finding.to_do}"] if finding.to_do else []
    return first + plain_text("\n".join(lines))
