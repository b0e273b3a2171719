"""Every path inside a run's output_dir: who writes a file there, and who reads it, find it by the same name."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass
from pathlib import Path

NO_FOLDER = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


def step_name(step: int) -> str:
    """Return the name of a checkpoint's or an evaluation's folder; names sort as steps do."""
    return f"step-{step:08d}"


def step_folders(folder: Path) -> list[Path]:
    """Return the folders with a name by `step_name`, oldest first. Raises OSError as `entries` does.

    Others, such as step-00000100.bak and step-00000100-good, are copies of the user's own.
    """
    return sorted(path for path in entries(folder) if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir())


def entries(folder: Path) -> list[Path]:
    """Return what is in a folder, nothing if there is no such folder. Raises OSError if it cannot be listed.

    Path.glob is silent then, for permissions or, from Python 3.13 on, for any error: a run would begin again.
    """
    try:
        return list(folder.iterdir())
    except OSError as error:
        if error.errno in NO_FOLDER:
            return []
        raise


def is_in_run_folder(file: Path) -> bool:
    """Check whether a file is in the folder of a run, by way of a link too."""
    names = ("run.json", "metrics.jsonl", "checkpoints", "evaluations")
    folders = {file.parent, Path(os.path.realpath(file)).parent}
    return any((folder / name).exists() for folder in folders for name in names)


@dataclass(frozen=True)
class RunFolder:
    """The output_dir of a run, and the paths in it. Nothing is created, nothing is checked."""

    path: Path

    @classmethod
    def containing(cls, path: Path) -> RunFolder:
        """Return the run folder that a checkpoint, an evaluation or a skipped step is in."""
        return cls(Path(os.path.realpath(path)).parents[1])

    @property
    def title(self) -> str:
        """The name for people: that of the folder, after that of the one above if it is just `run`."""
        whole = Path(os.path.realpath(self.path))
        return f"{whole.parent.name}/{whole.name}" if whole.name == "run" else whole.name

    @property
    def config(self) -> Path:
        """The settings, complete."""
        return self.path / "config.yaml"

    @property
    def run_file(self) -> Path:
        """The W&B id, commit, command and hashes."""
        return self.path / "run.json"

    @property
    def metrics_log(self) -> Path:
        """Every step and every evaluation, one JSON object per line."""
        return self.path / "metrics.jsonl"

    @property
    def report(self) -> Path:
        """The page about the run."""
        return self.path / "report.html"

    @property
    def preview(self) -> Path:
        """The page about the first inputs of the model."""
        return self.path / "preview.html"

    @property
    def checkpoints(self) -> Path:
        """One folder per checkpoint, named by `step_name`."""
        return self.path / "checkpoints"

    @property
    def evaluations(self) -> Path:
        """One folder per evaluation, named by `step_name`, and the images they share."""
        return self.path / "evaluations"

    @property
    def blends(self) -> Path:
        """Scores of blends with the model at the start, by `launch/blend.py`."""
        return self.path / "blends.json"

    @property
    def sample_losses(self) -> Path:
        """One file per rank: the loss of every training sample."""
        return self.path / "sample_losses"

    @property
    def stacks(self) -> Path:
        """One file per rank that hung: where its threads were."""
        return self.path / "stacks"

    @property
    def progress(self) -> Path:
        """An empty file; its time says when a rank of the running job last made progress."""
        return self.path / ".progress"

    @property
    def skipped_steps(self) -> Path:
        """One file per step that was skipped, as its loss or gradient was not finite."""
        return self.path / "nonfinite"

    @property
    def untouched_probe(self) -> Path:
        """Answers of the model before its first step to the questions of `evaluate.probe`."""
        return self.path / "probe_untouched.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's files, one per attempt."""
        return self.path / "tensorboard"

    @property
    def wandb(self) -> Path:
        """The offline and online runs of W&B."""
        return self.path / "wandb"

    def checkpoint(self, step: int) -> Path:
        """Return the folder of the checkpoint at a step."""
        return self.checkpoints / step_name(step)

    def evaluation(self, step: int) -> Path:
        """Return the folder of the evaluation at a step."""
        return self.evaluations / step_name(step)

    def averaged_evaluation(self, step: int) -> Path:
        """Return the folder of the evaluation of the averaged weights (`train.ema`) at a step."""
        return self.evaluation(step) / "ema"

    def skipped_step(self, step: int) -> Path:
        """Return the file of a skipped step."""
        return self.skipped_steps / f"{step_name(step)}.json"
