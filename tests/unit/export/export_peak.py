"""Exports in a process of its own, and prints by how many bytes its memory rose at most, mapped files included.

python export_peak.py SMALL_CHECKPOINT CHECKPOINT OUT DTYPE NUM_SAMPLES    the small one first, for the imports
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

from cogvlm_ft.export.export import export_checkpoint


def memory(name: str) -> int:
    """Bytes of /proc/self/status: VmRSS now, VmHWM at most."""
    status = Path("/proc/self/status").read_text()
    [kib] = re.findall(rf"^{name}:\s+(\d+) kB$", status, re.MULTILINE)
    return int(kib) * 1024


def main(small: str, checkpoint: str, out: str, dtype: str, num_samples: str) -> None:
    torch.set_num_threads(1)
    export_checkpoint(Path(small), Path(f"{out}-small"), getattr(torch, dtype), num_samples=int(num_samples))
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    export_checkpoint(Path(checkpoint), Path(out), getattr(torch, dtype), num_samples=int(num_samples))
    print("rose by", memory("VmHWM") - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
