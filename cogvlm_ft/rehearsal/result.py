"""Describe the result of a finished rehearsal: its scores, and the paths of pages and pictures."""

from __future__ import annotations

import math

from cogvlm_ft.evaluate.results import find_evaluation, load_results
from cogvlm_ft.run_folder import RunFolder
from cogvlm_ft.terminal import counted

LEARNED_IOU = 0.5
LEARNED_TEXTS = 0.5  # of answers without boxes


def result_lines(run: RunFolder, num_steps: int) -> list[str]:
    """Return the scores of the last evaluation and what they mean, then the paths of report and pictures."""
    folder = find_evaluation(run.path)
    metrics = load_results(folder).metrics
    lines = _scores(metrics)
    if is_learned(metrics):
        lines += [
            "This shows that photos, labels and wording fit together;",
            "it does not show how well the 17B model will answer on photos that it has not seen.",
        ]
    else:
        expected = f"more than {LEARNED_IOU}" if "mean_iou" in metrics else f"more than {LEARNED_TEXTS:.0%}"
        advice = f"add --steps {2 * num_steps} and another --out to train for longer; else check the review"
        lines.append(f"The tiny model has not learned the photos: expected {expected}. To go further, {advice}")
    return [*lines, f"report    {run.report}", f"pictures  {folder / 'pictures'}"]


def is_learned(metrics: dict[str, float]) -> bool:
    """Return whether the tiny model has memorized the photos, as it does if everything fits together."""
    if "mean_iou" in metrics:
        return metrics["mean_iou"] > LEARNED_IOU
    return metrics.get("text_exact", 0.0) > LEARNED_TEXTS


def _scores(metrics: dict[str, float]) -> list[str]:
    photos = counted(round(metrics["num_images"]), "photo")
    lines = []
    if "mean_iou" in metrics:
        asked = f"every target of the {photos} was asked; unreadable answers count as 0"
        lines.append(f"mean IoU {metrics['mean_iou']:.3f}; {asked}")
        absent = metrics.get("not_found_acc", math.nan)
        known = f"absent targets recognised: {absent:.0%}"
        lines.append("absent targets: none among these photos" if math.isnan(absent) else known)
    if "text_exact" in metrics:
        lines.append(f"answers without boxes repeated word for word: {metrics['text_exact']:.0%} of the {photos}")
    return lines
