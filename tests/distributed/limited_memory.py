"""Train with GIB more address space than the libraries take. Usage: limited_memory.py GIB key=value..."""

from __future__ import annotations

import resource
import sys

import psutil

import cogvlm_ft.train.loop  # noqa: F401  (libraries take most of the address space)
from cogvlm_ft.launch.train import main

if __name__ == "__main__":
    limit = psutil.Process().memory_info().vms + int(float(sys.argv[1]) * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sys.exit(main(sys.argv[2:]))
