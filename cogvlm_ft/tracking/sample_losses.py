"""The loss of every training sample in every epoch, one file per rank: samples that stay high are often mislabelled.

sample_losses/rank-00000.jsonl      {"step": 7, "epoch": 0, "key": "photo-12", "loss": 31.4, "tokens": 25}
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from cogvlm_ft.errors import DataError
from cogvlm_ft.plain_files import parse_json
from cogvlm_ft.run_folder import RunFolder
from cogvlm_ft.tracking.auxiliary import failures_as_warnings
from cogvlm_ft.tracking.metrics_log import RowsFile, open_metrics, truncate_after

KIND = "sample losses"
NUM_EPOCHS = 3
"""Number of last epochs in which a sample's loss must be high."""


@dataclass(frozen=True)
class HighLoss:
    """A training sample whose loss stays high.

    ratio: the lowest of its losses per token, each as a multiple of the median of its epoch.
    per_token: [(epoch from 0, loss per token)], oldest first.
    """

    key: str
    ratio: float
    per_token: tuple[tuple[int, float], ...]


class SampleLosses:
    """Appends the losses of this rank. No rank waits for another."""

    def __init__(self, run_folder: Path, rank: int, world_size: int, step: int) -> None:
        """Drop what an earlier attempt recorded after `step`, where the run resumes: it will be recorded again.

        That attempt may have had more ranks: each rank cleans every world_size-th file.
        """
        self.path = RunFolder(run_folder).sample_losses / f"rank-{rank:05d}.jsonl"
        self._file = RowsFile(self.path, KIND)
        with failures_as_warnings(KIND):
            open_metrics(self.path)
            for path in sorted(self.path.parent.glob("rank-*.jsonl")):
                if int(path.stem.removeprefix("rank-")) % world_size == rank:
                    open_metrics(path)
                    truncate_after(path, step)

    def add(self, step: int, epoch: int, keys: Sequence[str], losses: Sequence[float], tokens: Sequence[int]) -> None:
        """Append the sums over the answers' tokens in one step. Samples without tokens (padding) are left out."""
        self._file.append(
            {"step": step, "epoch": epoch, "key": key, "loss": loss, "tokens": num}
            for key, loss, num in zip(keys, losses, tokens, strict=True)
            if num
        )


def read_sample_losses(run_folder: Path) -> dict[int, dict[str, float]]:
    """Read the loss per token by epoch and key; an image in several sequences of an epoch has one for all of them.

    Empty if nothing was recorded. Raises DataError.
    """
    sums: dict[int, dict[str, tuple[float, int]]] = {}
    for row in _rows(run_folder):
        of_epoch = sums.setdefault(row["epoch"], {})
        loss, tokens = of_epoch.get(row["key"], (0.0, 0))
        of_epoch[row["key"]] = (loss + row["loss"], tokens + row["tokens"])
    return {
        epoch: {key: loss / tokens for key, (loss, tokens) in of_epoch.items()}
        for epoch, of_epoch in sorted(sums.items())
    }


def _rows(run_folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows with a finite loss, without the unfinished last line of a running job."""
    for path in sorted(RunFolder(run_folder).sample_losses.glob("rank-*.jsonl")):
        try:
            with path.open(encoding="utf-8") as lines:
                for line in lines:
                    row = parse_json(line) if line.endswith("\n") else {"loss": None}
                    if row["loss"] is not None:
                        yield row
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} cannot be read ({error!r}); expected the losses that training records") from None


def find_high_losses(losses: dict[int, dict[str, float]], num_samples: int) -> list[HighLoss]:
    """Find the samples that were above the median in each of the last NUM_EPOCHS epochs they occurred in, worst first.

    losses: from `read_sample_losses`. A high loss after one epoch says little, so two are needed.
    """
    medians = {epoch: median(of_epoch.values()) for epoch, of_epoch in losses.items()}
    seen: dict[str, list[tuple[int, float]]] = {}
    for epoch in sorted(losses, reverse=True):
        for key, loss in losses[epoch].items():
            of_key = seen.setdefault(key, [])
            if len(of_key) < NUM_EPOCHS:
                of_key.append((epoch, loss))
    ratios = {
        key: min(loss / max(medians[epoch], 1e-9) for epoch, loss in of_key)
        for key, of_key in seen.items()
        if len(of_key) > 1
    }
    worst = sorted((key for key, ratio in ratios.items() if ratio > 1), key=lambda key: (-ratios[key], key))
    return [HighLoss(key, ratios[key], tuple(reversed(seen[key]))) for key in worst[:num_samples]]
