"""Run steps that are all-reduces on every rank, under the watchdog.

Usage: hanging.py OUT TIMEOUT_S NUM_STEPS STEP_S [gil|alone]

gil: rank 0 holds the interpreter's lock at the end indefinitely, in C. alone: rank 0 works at the start for three times
the timeout, while the others wait for it.
"""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path

from cogvlm_ft.runtime.distributed import all_reduce_sum, init_distributed, rank, shut_down
from cogvlm_ft.runtime.watchdog import progress, watched


def main() -> None:
    out, timeout_s, num_steps, step_s = sys.argv[1:5]
    init_distributed()
    with watched(Path(out), rank(), float(timeout_s)):
        if sys.argv[5:] == ["alone"] and rank() == 0:
            for _ in range(30):
                time.sleep(float(timeout_s) / 10)
                progress()
        for step in range(int(num_steps)):
            time.sleep(float(step_s))
            all_reduce_sum([1.0])
            progress()
            print(f"step {step} done", flush=True)
        if sys.argv[5:] == ["gil"] and rank() == 0:
            ctypes.PyDLL(None).sleep(600)
    shut_down()
    time.sleep(2 * float(timeout_s))  # it is not watched any more
    print("end", flush=True)


if __name__ == "__main__":
    main()
