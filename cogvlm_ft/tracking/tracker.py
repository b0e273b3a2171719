"""Record what a run measures: metrics.jsonl always, Weights & Biases, TensorBoard. Only rank 0 has a tracker."""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from cogvlm_ft.errors import ConfigError, DataError
from cogvlm_ft.plain_files import read_json, write_text
from cogvlm_ft.run_folder import RunFolder
from cogvlm_ft.settings import WANDB_MODES
from cogvlm_ft.tracking.auxiliary import failures_as_warnings
from cogvlm_ft.tracking.metrics_log import RowsFile, open_metrics, truncate_after
from cogvlm_ft.tracking.provenance import without_passwords
from cogvlm_ft.tracking.tensorboard_log import TensorBoardLog
from cogvlm_ft.tracking.wandb_run import WandbRun

Values = Mapping[str, Any]
METRICS = "metrics"


class Tracker:
    """Appends to metrics.jsonl in `output_dir` and mirrors to W&B, whose errors never end a training run.

    mode: as `WandbRun` describes it. In each, run.json holds what launch/wandb_sync.py needs to send the run later.
    run_id: of the run to continue; None: the one in run.json, else a new one. So an attempt that is killed before its
        first checkpoint continues the same run too.
    tensorboard: also write TensorBoard files.
    config: shown in W&B as the configuration of the run. lower_is_better: as for `WandbRun`.
    """

    def __init__(
        self,
        output_dir: str | Path,
        *,
        project: str = "cogvlm-ft",
        entity: str | None = None,
        name: str | None = None,
        mode: str = "auto",
        run_id: str | None = None,
        tensorboard: bool = False,
        config: Values | None = None,
        lower_is_better: Collection[str] = (),
    ) -> None:
        if mode not in WANDB_MODES:
            raise ConfigError(f"tracking.mode: found {mode!r}; expected one of {', '.join(WANDB_MODES)}")
        folder = Path(output_dir)
        run = RunFolder(folder)
        self.metrics_path = run.metrics_log
        self._rows = RowsFile(self.metrics_path, METRICS)
        with failures_as_warnings(METRICS):
            open_metrics(self.metrics_path)
        if run_id is None and run.run_file.exists():
            run_id = read_run_file(folder)["run_id"]
        self.run_id = run_id or secrets.token_hex(4)
        identity: dict[str, Any] = {"run_id": self.run_id, "project": project, "entity": entity, "name": name}
        identity["config"] = without_passwords(dict(config or {}))
        with failures_as_warnings("facts of the run (run.json)"):
            _write_run_file(folder, identity)
        self._tensorboard = TensorBoardLog(run.tensorboard) if tensorboard else None
        self.wandb = WandbRun(folder, mode=mode, lower_is_better=lower_is_better, **identity)

    @property
    def run_dir(self) -> Path | None:
        """Return the folder of the W&B run, for `wandb sync`; None without W&B."""
        return self.wandb.run_dir

    def log_train(self, step: int, values: Values) -> None:
        """Record training values at a step."""
        self._rows.append([{"kind": "train", "step": step, **values}])
        self.wandb.log_train(step, values)
        if self._tensorboard:
            self._tensorboard.log_train(step, values)

    def log_val(self, epoch: float, step: int, values: Values) -> None:
        """Record the values of one evaluation."""
        self._rows.append([{"kind": "val", "epoch": epoch, "step": step, **values}])
        self.wandb.log_val(epoch, step, values)
        if self._tensorboard:
            self._tensorboard.log_val(epoch, step, values)

    def summary(self, values: Values) -> None:
        """Record the final values of the run."""
        self._rows.append([{"kind": "summary", **values}])
        self.wandb.summary(values)

    def finish(self) -> None:
        """Close the W&B run and TensorBoard's file; later values go to metrics.jsonl only."""
        self.wandb.finish()
        if self._tensorboard:
            self._tensorboard.finish()

    def truncate_after(self, step: int, evaluated_step: int | None = None) -> None:
        """Drop what metrics.jsonl holds after these: a run resumed there records it again."""
        with failures_as_warnings(METRICS):
            truncate_after(self.metrics_path, step, evaluated_step)
        if self._tensorboard:
            self._tensorboard.resume_after(step)


def read_run_file(folder: Path) -> dict[str, Any]:
    """Read run_id, project, entity, name and config of run.json. Raises DataError."""
    path = RunFolder(folder).run_file
    try:
        content = read_json(path)
        return {key: content[key] for key in ("run_id", "project", "entity", "name", "config")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} cannot be read ({error!r}); expected the run.json that training writes. Without the file, "
            "training continues the W&B run of its checkpoint, or starts a new one"
        ) from None


def _write_run_file(folder: Path, content: Values) -> None:
    """Write to a temporary file and rename it: a killed run must not lose its id."""
    path = RunFolder(folder).run_file
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
