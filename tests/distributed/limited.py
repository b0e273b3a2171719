"""Train under a limit. Usage: limited.py AS|FSIZE BYTES key=value...

AS: address space beyond what this process has when training starts. FSIZE: the size of each file.
"""

from __future__ import annotations

import resource
import sys

import psutil

import cogvlm_ft.train.loop  # noqa: F401  (libraries take most of the address space)
from cogvlm_ft.launch.train import main

if __name__ == "__main__":
    name, limit = sys.argv[1], int(sys.argv[2])
    if name == "AS":
        limit += psutil.Process().memory_info().vms
    resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    sys.exit(main(sys.argv[3:]))
