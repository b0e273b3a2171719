"""Write TensorBoard files beside metrics.jsonl. Problems with them are warnings, never errors."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cogvlm_ft.errors import ConfigError
from cogvlm_ft.tracking.metrics_log import json_value
from cogvlm_ft.tracking.wandb_run import train_key, val_key

logger = logging.getLogger(__name__)

FLUSH_S = 10


def check_tensorboard() -> None:
    """Raise ConfigError if the package is missing, before minutes are spent on loading a model."""
    if find_spec("tensorboard") is None:
        raise ConfigError(
            "tracking.tensorboard: found true without the package tensorboard; expected it to be installed."
            ' Run pip install -e ".[tensorboard]"'
        )


class TensorBoardLog:
    """Scalars of a run under the names they have in W&B, over the step; opened with the first of them.

    A run that is resumed hides what an earlier attempt wrote after its checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None
        self._resumed_after: int | None = None
        self._has_failed = False

    def resume_after(self, step: int) -> None:
        """Hide the steps after this one that earlier attempts wrote."""
        self._resumed_after = step

    def log_train(self, step: int, values: Mapping[str, Any]) -> None:
        self._log(step, {train_key(name): value for name, value in values.items()})

    def log_val(self, epoch: float, step: int, values: Mapping[str, Any]) -> None:
        self._log(step, {"val/epoch": epoch, **{val_key(name): value for name, value in values.items()}})

    def finish(self) -> None:
        """Write what is not written yet; later values are left out."""
        try:
            if self._writer is not None:
                self._writer.close()
        except Exception as error:
            self._give_up(error)
        self._has_failed = True

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        if self._has_failed:
            return
        try:
            if self._writer is None:
                self._writer = self._open()
            for name, value in values.items():
                number = json_value(value)
                if isinstance(number, (int, float)):
                    self._writer.add_scalar(name, number, step)
        except Exception as error:
            self._give_up(error)

    def _open(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        purge_step = None if self._resumed_after is None else self._resumed_after + 1
        return SummaryWriter(str(self._folder), purge_step=purge_step, flush_secs=FLUSH_S)  # type: ignore[no-untyped-call]

    def _give_up(self, error: Exception) -> None:
        logger.warning("TensorBoard stopped (%s: %s); continuing without it", type(error).__name__, error)
        self._has_failed = True
