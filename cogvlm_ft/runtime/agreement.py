"""Check that all ranks have the same settings and read the same files, which may be copies on the disk of each node.

Ranks that disagree would wait for each other in different places, or train on other samples than planned, in silence.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from cogvlm_ft.errors import ConfigError
from cogvlm_ft.runtime.distributed import from_main, gather_to_main
from cogvlm_ft.settings import Config

MAY_DIFFER = (
    "tracking",
    "output_dir",
    "model.path",
    "data.cache_dir",
    "data.num_workers",
    "data.shards",
    "data.val_shards",
)
"""Settings that only rank 0 uses, or paths to the same content."""


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Raise ConfigError on every rank if the ranks do not agree on all facts. Collective.

    facts: the same names on every rank; None where a rank does not know.
    """
    rows = gather_to_main((socket.gethostname(), dict(facts)))
    problem = from_main(None if rows is None else _disagreement(rows))
    if problem:
        raise ConfigError(problem)


def comparable_settings(config: Config) -> dict[str, Any]:
    """Return the settings on which ranks must agree, by their full names."""
    found = _flat("", asdict(config))
    return {name: value for name, value in found.items() if name not in MAY_DIFFER and _group(name) not in MAY_DIFFER}


def _disagreement(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Return what two ranks disagree on, "" if nothing."""
    for name in rows[0][1]:
        known = [(number, host, facts[name]) for number, (host, facts) in enumerate(rows) if facts[name] is not None]
        other = next((each for each in known if each[2] != known[0][2]), None)
        if other is not None:
            return (
                f"{name}: found {other[2]!r:.80} on rank {other[0]} ({other[1]}), {known[0][2]!r:.80} on rank "
                f"{known[0][0]} ({known[0][1]}); expected the same on all ranks. Give all ranks the same settings, and "
                "copy the same files to all nodes"
            )
    return ""


def _flat(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(f"{prefix}{name}.", value) if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def _group(name: str) -> str:
    return name.partition(".")[0]
