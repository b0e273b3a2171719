"""Compare training steps with and without tracking.

    python bench/tracking.py [--step-s 0.2] [--steps 20] [--rounds 10]

A step is torch work on all cores for about --step-s seconds. Blocks of --steps steps with tracking (metrics.jsonl and
an offline W&B run, with as many values as a training run logs) and without it alternate, so that other load slows both.
Prints the ratio of the medians, the time that logging adds to a step, and the time to log an evaluation, which happens
once per epoch.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from cogvlm_ft.report.gallery import TABLE_COLUMNS, Picture
from cogvlm_ft.report.wandb_media import MAX_TABLE_ROWS, boxed_image
from cogvlm_ft.tracking.tracker import Tracker

SIDE = 512
VALUES = {name: 0.123456789 for name in (
    "lr", "loss", "grad_norm", "images_per_s", "turns_per_s", "tokens_per_s", "step_s", "data_wait_fraction",
    "tflops", "mfu", "memory_gib", "num_bad", "num_cut_boxes", "epoch",
)}  # fmt: skip
NUM_METRICS, NUM_PHOTOS = 400, 24  # of an evaluation with all its breakdowns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step-s", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=20, help="steps per block")
    parser.add_argument("--rounds", type=int, default=10, help="blocks per side")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tracker = Tracker(folder, mode="offline", config={"seed": 0})
        if not tracker.wandb.is_recording:
            raise SystemExit("W&B did not start; nothing was measured")
        bench_steps(tracker, args.step_s, args.steps, args.rounds)
        bench_evaluation(tracker, Path(folder))


def bench_steps(tracker: Tracker, step_s: float, num_steps: int, rounds: int) -> None:
    matrix = torch.randn(SIDE, SIDE)
    repeats = max(1, round(step_s / min(timed_step(matrix, 20) / 20 for _ in range(5))))
    timed_step(matrix, repeats)
    tracker.log_train(0, VALUES)  # the first call is slower: wandb imports more modules
    plain: list[float] = []
    tracked: list[float] = []
    logging: list[float] = []
    working: list[float] = []
    for number in range(1, 2 * rounds * num_steps + 1):
        step = timed_step(matrix, repeats)
        if number // num_steps % 2:
            plain.append(step)
            continue
        start, cpu_start = time.perf_counter(), time.thread_time()
        tracker.log_train(number, VALUES)
        working.append(time.thread_time() - cpu_start)
        logging.append(time.perf_counter() - start)
        tracked.append(step + logging[-1])
    without, with_it, call = (statistics.median(times) for times in (plain, tracked, logging))
    print(f"step               {without * 1e3:.1f} ms without tracking, {with_it * 1e3:.1f} ms with it (medians)")
    print(f"ratio              {with_it / without:.4f} of medians, {sum(tracked) / sum(plain):.4f} of sums")
    print(
        f"logging            {call * 1e3:.3f} ms median, {statistics.mean(logging) * 1e3:.3f} ms mean, "
        f"{sum(logging) / sum(plain):.3%} of the step time"
    )
    print(
        f"  of that CPU time {statistics.mean(working) * 1e3:.3f} ms mean, {sum(working) / sum(plain):.3%}; "
        "the rest is waiting for a core"
    )


def timed_step(matrix: torch.Tensor, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        matrix @ matrix
    return time.perf_counter() - start


def bench_evaluation(tracker: Tracker, folder: Path) -> None:
    """Time the logging of the values, photos and predictions of one evaluation."""
    Image.effect_noise((1280, 960), 60).convert("RGB").save(folder / "photo.jpg", quality=90)
    boxes = [((10.0 * n, 10.0, 10.0 * n + 50, 90.0), "the red car on the left") for n in range(5)]
    answers = [(box, label, True) for box, label in boxes]
    picture = boxed_image(Picture("key", folder / "photo.jpg", "caption", boxes, answers))
    pictures = [picture] * NUM_PHOTOS
    rows = [["key", "question", "[[001,002,003,004]]", "truth", "present", 0.5, "right"]] * MAX_TABLE_ROWS
    start = time.perf_counter()
    tracker.log_val(1.0, 1, {f"mean_iou/source={n}": 0.5 for n in range(NUM_METRICS)})
    tracker.wandb.log_pictures(1.0, {"same": pictures[:8], "worst": pictures[8:16], "newly_lost": pictures[16:]})
    tracker.wandb.log_table(1.0, TABLE_COLUMNS, rows)
    waited = time.perf_counter() - start
    tracker.finish()
    print(
        f"an evaluation      {waited:.2f} s of waiting, {time.perf_counter() - start:.2f} s until recorded: "
        f"{NUM_METRICS} values, {NUM_PHOTOS} photos, {MAX_TABLE_ROWS} rows"
    )


if __name__ == "__main__":
    main()
