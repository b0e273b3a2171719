"""Ports for rank 0 to listen on, outside the range from which the kernel takes the ports of outgoing connections."""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections.abc import Mapping

from cogvlm_ft.errors import ConfigError

PORTS = range(20000, 32000)
"""Range of ports. Linux uses 32768 to 60999 for outgoing connections. slurm/ranks.sh uses the same range as here."""


def free_port() -> int:
    """Return a port that nothing on this machine listens on, at random, so that two starts differ."""
    first = secrets.randbelow(len(PORTS))
    for number in range(len(PORTS)):
        port = PORTS[(first + number) % len(PORTS)]
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise ConfigError(
        f"MASTER_PORT: found {PORTS.start} to {PORTS[-1]} in use; expected a free one. Set it to a free port"
    )


def check_address(environment: Mapping[str, str]) -> None:
    """Raise ConfigError if rank 0 cannot be at MASTER_ADDR and MASTER_PORT: torch would wait there for half an hour."""
    port, host = environment["MASTER_PORT"], environment["MASTER_ADDR"]
    if not port.strip().isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(
            f"MASTER_PORT={port!r}: found no port; expected a number of 1 to 65535, the same on all ranks. Set it to a "
            "free port, such as 29500"
        )
    try:
        socket.getaddrinfo(host, int(port))
    except (socket.gaierror, UnicodeError) as error:
        if isinstance(error, socket.gaierror) and error.errno != socket.EAI_NONAME:
            return  # a name server that does not answer at the moment
        raise ConfigError(
            f"MASTER_ADDR={host!r}: found no host of this name; expected the name or address of rank 0's node. Of "
            'several Slurm nodes: MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
        ) from None
