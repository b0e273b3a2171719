"""Export and verify in a separate process, and print by how many bytes its memory rose at most, with mapped files.

python export_peak.py SMALL_CHECKPOINT CHECKPOINT OUT DTYPE VERIFY(0|1)    the small one first, for the imports
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

from cogvlm_ft.export.export import export_checkpoint


def memory(name: str) -> int:
    """Return bytes of /proc/self/status: VmRSS now, VmHWM at most."""
    status = Path("/proc/self/status").read_text()
    [kib] = re.findall(rf"^{name}:\s+(\d+) kB$", status, re.MULTILINE)
    return int(kib) * 1024


def main(small: str, checkpoint: str, out: str, dtype: str, verify: str) -> None:
    torch.set_num_threads(1)
    export_checkpoint(Path(small), Path(f"{out}-small"), getattr(torch, dtype), verify=verify == "1")
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    export_checkpoint(Path(checkpoint), Path(out), getattr(torch, dtype), verify=verify == "1")
    print("rose by", memory("VmHWM") - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
