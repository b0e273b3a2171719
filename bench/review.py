"""Time a review of many records, for a fifth of them and for all.

    python bench/review.py [--records 100000] [--photos 5000] [--workers 2]

Four boxes per record; several records share a photo of 640 x 480 px. Prints wall time, and the CPU time and the peak
memory of the main process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--photos", type=int, default=5000)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        draw_photos(folder, args.photos)
        for num_records in (args.records // 5, args.records):
            write_records(folder / "x.jsonl", num_records, args.photos)
            bench_review(folder, num_records, args.workers)


def draw_photos(folder: Path, num_photos: int) -> None:
    noise = np.random.default_rng(0)
    for number in range(num_photos):
        coarse = Image.fromarray(noise.integers(0, 255, (6, 8, 3), dtype=np.uint8))
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")


def write_records(path: Path, num_records: int, num_photos: int) -> None:
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(num_records):
            corners = [(draw.randrange(500), draw.randrange(400)) for _ in range(4)]
            targets = [
                {"phrase": f"object {draw.randrange(200)}", "boxes": [[x, y, x + 90, y + 60]]} for x, y in corners
            ]
            image = f"{number * num_photos // num_records}.jpg"
            file.write(json.dumps({"image": image, "key": f"k{number}", "targets": targets}) + "\n")


def bench_review(folder: Path, num_records: int, num_workers: int) -> None:
    command = [sys.executable, "-m", "cogvlm_ft.shards.review", "--format", "jsonl", "--images", str(folder)]
    command += [
        "--annotations",
        str(folder / "x.jsonl"),
        "--out",
        str(folder / "review"),
        "--workers",
        str(num_workers),
    ]
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    seconds = time.perf_counter() - start
    print(
        f"{num_records} records: {seconds:.0f} s, main process: {cpu_s:.0f} s of CPU, {after.ru_maxrss >> 10} MiB",
        flush=True,
    )


if __name__ == "__main__":
    main()
