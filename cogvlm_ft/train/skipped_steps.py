"""Steps that changed nothing because their loss or gradient was not finite.

nonfinite/step-00000120.json    what `launch/replay_step.py` needs to run these samples again, one by one
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cogvlm_ft.checkpoints.checkpoint import list_checkpoints, read_state
from cogvlm_ft.errors import CheckpointError, DataError
from cogvlm_ft.plain_files import read_json, write_text
from cogvlm_ft.run_folder import RunFolder
from cogvlm_ft.runtime.distributed import gather_to_main, world_size
from cogvlm_ft.train.step import RowLoss

logger = logging.getLogger(__name__)

MAX_NAMED = 8


class DivergedError(CheckpointError):
    """Too many steps in a row were skipped: the weights themselves are probably broken."""


@dataclass(frozen=True)
class Row:
    """One sequence of a step.

    index, epoch, weight: as in `data.plan.Item`. loss: the sum over its labelled tokens; "nan", "inf" or "-inf" where
    it is not finite.
    """

    rank: int
    key: str
    index: int
    epoch: int
    weight: float
    loss: float | str
    tokens: int

    @property
    def is_finite(self) -> bool:
        return math.isfinite(float(self.loss))


@dataclass(frozen=True)
class SkippedStep:
    """The samples of a skipped step. step: as in metrics.jsonl, from 1."""

    step: int
    lr: float
    world_size: int
    rows: list[Row]

    def save(self, path: Path) -> None:
        """Write the step as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> SkippedStep:
        """Read a saved step; DataError if it cannot be read."""
        try:
            fields = read_json(path)
            return cls(**{**fields, "rows": [Row(**row) for row in fields["rows"]]})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} cannot be read ({error!r}); expected a file that a training run writes, such as "
                "runs/x/nonfinite/step-00000120.json"
            ) from None


class SkippedSteps:
    """Records the samples of skipped steps, and ends the run after `max_in_a_row` of them."""

    def __init__(self, run_folder: RunFolder, model_path: str, max_in_a_row: int) -> None:
        self._run_folder = run_folder
        self._model_path = model_path
        self._max_in_a_row = max_in_a_row
        self._in_a_row: list[int] = []

    @property
    def hold_checkpoints(self) -> bool:
        """Whether the last step was skipped: the weights may be broken, and would push out the last good checkpoint."""
        return bool(self._in_a_row)

    def add(self, step: int, is_skipped: bool, losses: Sequence[RowLoss], lr: float) -> None:
        """Record a step; a skipped one is collective, and all ranks know of it. losses: of this rank's rows.

        Raises DivergedError on every rank after too many skipped steps in a row.
        """
        if not is_skipped:
            self._in_a_row = []
            return
        self._in_a_row.append(step)
        gathered = gather_to_main(losses)
        if gathered is not None:
            rows = [_row(rank, loss) for rank, found in enumerate(gathered) for loss in found]
            self._write(SkippedStep(step, lr, world_size(), rows))
        if len(self._in_a_row) >= self._max_in_a_row:
            raise DivergedError(self._describe())

    def _write(self, skipped: SkippedStep) -> None:
        """Save the samples and log which are not finite. Rank 0 only."""
        path = self._run_folder.skipped_step(skipped.step)
        try:
            skipped.save(path)
        except OSError as error:
            logger.warning("%s cannot be written: %s", path, error)
        broken = [row.key for row in skipped.rows if not row.is_finite]
        named = ", ".join(broken[:MAX_NAMED]) + (", ..." if len(broken) > MAX_NAMED else "")
        what = f"the loss of {named} is not finite" if broken else "all losses are finite, their gradient is not"
        logger.warning(
            "step %d is skipped on all ranks; weights and optimizer are unchanged: %s. Its %d samples are in %s; "
            "inspect them with: python launch/replay_step.py %s",
            skipped.step, what, len(skipped.rows), path, path,
        )  # fmt: skip

    def _describe(self) -> str:
        first, last = self._in_a_row[0], self._in_a_row[-1]
        files = [str(self._run_folder.skipped_step(step)) for step in self._in_a_row]
        good, doubtful = sort_checkpoints(self._run_folder.checkpoints, first)
        start = f"Last good checkpoint: {good}" if good else f"No checkpoint is known to be good, {self._model_path} is"
        aside = f", move {', '.join(path.name for path in doubtful)} aside" if doubtful else ""
        return (
            f"steps {first} to {last} had no finite loss or gradient, and {self._max_in_a_row} in a row end the run "
            f"(train.max_skipped_in_a_row): weights or samples are broken. {start}. To continue{aside}, lower "
            f"train.lr and start again. Samples: {', '.join(files)}; run them one by one: "
            f"python launch/replay_step.py {files[0]}"
        )


def sort_checkpoints(folder: Path, first_skipped: int) -> tuple[Path | None, list[Path]]:
    """Return (the newest checkpoint known to be good, those that may be broken).

    The last step that was not skipped, `first_skipped` - 1, found the weights before it good; its update may have
    broken them.
    """
    checkpoints = list_checkpoints(folder)
    good = [path for path in checkpoints if read_state(path).step <= first_skipped - 2]
    return (good[-1] if good else None), [path for path in checkpoints if path not in good]


def _row(rank: int, found: RowLoss) -> Row:
    item = found.item
    loss = found.loss if math.isfinite(found.loss) else str(found.loss)
    return Row(rank, found.key, item.index, item.epoch, item.weight, loss, found.num_target_tokens)
