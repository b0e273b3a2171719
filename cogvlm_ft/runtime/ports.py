"""Ports for rank 0 to listen on, outside the range from which the kernel takes the ports of outgoing connections."""

from __future__ import annotations

import contextlib
import secrets
import socket

from cogvlm_ft.errors import ConfigError

PORTS = range(20000, 32000)
"""Linux takes 32768 to 60999 for connections; slurm/ranks.sh uses this range too."""


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
