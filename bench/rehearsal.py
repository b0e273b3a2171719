"""Rehearse on sets of labelled photos, one line of results per set and seed.

    python bench/rehearsal.py [PHOTOS or PHOTOS=ANNOTATIONS ...] [--seeds 0 1] [--processes 1] [--steps N]

Without sets, it draws scenes of coloured shapes. Minutes are of the whole rehearsal, from the review to the report;
CPU minutes are of all its processes. Unreadable answers count as IoU 0.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cogvlm_ft.evaluate.results import find_evaluation, load_results
from cogvlm_ft.shards.demo_scenes import write_scenes

REPOSITORY = Path(__file__).resolve().parents[1]
NUM_SCENES, SCENE_PX, MINUTE_S = 24, 64, 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", help="folder of photos, or folder=annotations")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1)
    parser.add_argument("--steps", type=int, help="default: that of launch/rehearse.py")
    args = parser.parse_args()
    options = ["--processes", str(args.processes)] + (["--steps", str(args.steps)] if args.steps else [])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for number, name in enumerate(args.sets or [draw_set(folder / "scenes")]):
            for seed in args.seeds:
                print(rehearse(name, seed, options, folder / f"{number}-{seed}"), flush=True)


def draw_set(folder: Path) -> str:
    return f"{folder}={write_scenes(folder, NUM_SCENES, SCENE_PX, seed=0)}"


def rehearse(name: str, seed: int, options: list[str], out: Path) -> str:
    """Run launch/rehearse.py; return its line of results, or its last words if it fails."""
    photos, _, annotations = name.partition("=")
    command = [sys.executable, str(REPOSITORY / "launch" / "rehearse.py"), photos, "--out", str(out)]
    command += ["--annotations", annotations] if annotations else []
    start, cpu_start = time.monotonic(), cpu_s()
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [*command, "--seed", str(seed), *options], env=environment, capture_output=True, text=True, check=False
    )
    minutes, cpu_minutes = (time.monotonic() - start) / MINUTE_S, (cpu_s() - cpu_start) / MINUTE_S
    if done.returncode:
        return f"{Path(photos).name} seed {seed}: exit code {done.returncode}: {(done.stdout + done.stderr)[-2000:]}"
    results = load_results(find_evaluation(out / "run"))
    scores = {name: results.metrics.get(name, float("nan")) for name in ("mean_iou", "not_found_acc", "unreadable")}
    return (
        f"{Path(photos).name} seed {seed}: {minutes:.1f} min, {cpu_minutes:.1f} CPU min, "
        f"{results.metrics['num_images']:.0f} photos, {len(results.predictions)} questions, "
        + ", ".join(f"{name} {score:.3f}" for name, score in scores.items())
    )


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
