"""Train a tiny model on a few photos of a shard set, in a process of its own, as a user would."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from cogvlm_ft.errors import ConfigError
from cogvlm_ft.grounding.wording import load_wording
from cogvlm_ft.jobs.stop import ask_to_stop, find_owner
from cogvlm_ft.plain_files import read_bytes, real_path
from cogvlm_ft.rehearsal.photos import LINES, MAX_LINES_BYTES, draw_photos, lines_of, write_chosen
from cogvlm_ft.rehearsal.tiny_model import IMAGE_SIZE, save_tiny_model, texts_of
from cogvlm_ft.runtime.outcome import OUTCOME_VARIABLE
from cogvlm_ft.runtime.ports import free_port
from cogvlm_ft.runtime.stop_signals import STOP_SIGNALS
from cogvlm_ft.settings import AugmentConfig, Config

BATCH_SIZE = 4  # photos per step: many small steps learn by heart in less time than few large ones
LEAST_STEPS, MOST_STEPS = 320, 800
MAX_SEQUENCE_LENGTH = 1 << 16  # the tiny tokenizer needs more tokens than that of the real model
NUM_EPOCHS = 2  # in each, every photo is seen many times; each ends with an evaluation
NO_GPUS = ("CUDA_VISIBLE_DEVICES", "")
SCHEDULE: dict[str, Any] = {  # of a tiny model that learns a few photos by heart
    "train.lr": 2e-3,
    "train.beta2": 0.98,
    "train.weight_decay": 0.0,
    "train.warmup_fraction": 0.05,
    "train.min_lr_ratio": 0.02,
    "train.log_every": 10,
    "train.patience": "null",
}


@dataclass(frozen=True)
class Chosen:
    """What a rehearsal trains on."""

    num_photos: int
    num_boxes: int
    num_parameters: int

    @property
    def num_steps(self) -> int:
        """The steps in which a model learns the photos: every box is a list of digits to be remembered."""
        return min(MOST_STEPS, LEAST_STEPS + self.num_boxes)


def prepare(shards: Path, out: Path, config: Config, num_photos: int, seed: int) -> Chosen:
    """Write `out`/chosen and `out`/start: shards of drawn photos, and a random model.

    Raises ConfigError where `out` holds a rehearsal of other photos.
    """
    drawn = draw_photos(shards, num_photos, seed)
    records, former = [sample.record for sample in drawn], out / "chosen" / LINES
    if former.exists() and read_bytes(former, MAX_LINES_BYTES).decode() != lines_of(records):
        raise ConfigError(f"--out {out}: found a rehearsal of other photos; expected a new folder, or the same photos")
    write_chosen(drawn, IMAGE_SIZE, out / "chosen")
    texts = texts_of(records, load_wording(config.data.wording), config.seed)
    num_boxes = sum(len(target.boxes_xyxy) for record in records for target in record.targets)
    return Chosen(len(records), num_boxes, save_tiny_model(out / "start", texts, small=True))


class Ended(NamedTuple):
    """How an attempt at a training run ended: its exit code, and whether nothing is left to be done."""

    code: int
    is_finished: bool


def train(chosen: Chosen, out: Path, num_steps: int, num_processes: int, arguments: Sequence[str]) -> Ended:
    """Run launch/train.py on the CPU. arguments: of the real run."""
    settings = training_settings(chosen, out, num_steps, num_processes)
    return start_training(out / "run", [*arguments, *settings], num_processes)


def training_settings(chosen: Chosen, out: Path, num_steps: int, num_processes: int) -> list[str]:
    """Return the settings of the rehearsal, which override those of the real run."""
    micro_batch_size = min(BATCH_SIZE, chosen.num_photos + num_processes - 1) // num_processes
    batch_size = micro_batch_size * num_processes
    num_passes = -(-num_steps * batch_size // (NUM_EPOCHS * chosen.num_photos))
    shards = [{"path": str(real_path(out / "chosen" / "shards")), "weight": float(num_passes)}]
    settings: dict[str, Any] = {
        **SCHEDULE,
        "train.monitor": "mean_iou" if chosen.num_boxes else "text_exact",
        "output_dir": out / "run",
        "deepspeed": "zero3_tiny",
        "model.path": out / "start",
        "model.image_size": IMAGE_SIZE,
        "model.freeze": "[]",
        "model.gradient_checkpointing": "none",
        "model.compile": "false",
        "adapter.rank": "null",
        "adapter.start": "null",
        "adapter.base": "null",
        **dict.fromkeys((f"data.augment.{each.name}" for each in fields(AugmentConfig) if each.name != "min_crop"), 0),
        "data.shards": json.dumps(shards, ensure_ascii=False),  # YAML joins no halves of an escaped emoji
        "data.val_shards": "null",
        "data.train_split": "train",
        "data.val_split": "train",
        "data.num_workers": 0,
        "data.max_sequence_length": MAX_SEQUENCE_LENGTH,
        "data.tiles.side_px": "null",
        "train.precision": "fp32",
        "train.lr_scale": "{}",
        "train.vision_layer_decay": 1,
        "train.ema": "null",
        "train.epochs": NUM_EPOCHS,
        "train.max_steps": num_steps,
        "train.global_batch_size": batch_size,
        "train.micro_batch_size": micro_batch_size,
        "evaluate.before_training": "false",
        "evaluate.every_epochs": 1,
        "evaluate.max_samples": "null",
        "evaluate.batch_size": chosen.num_photos,
        "evaluate.num_pictures": chosen.num_photos,
        "evaluate.probe": "null",
        "tracking.mode": "disabled",
    }
    return [f"{key}={value}" for key, value in settings.items()]


def start_training(run: Path, arguments: Sequence[str], num_processes: int, *, on_cpu: bool = True) -> Ended:
    """Run launch/train.py in a process of its own, or in several of this machine. run: its output_dir.

    A signal to stop, Ctrl-C among them, stops it properly: it saves, and the same arguments resume it.
    on_cpu: leave the machine's GPUs alone.
    """
    command, environment = training_command(arguments, num_processes, on_cpu=on_cpu)
    with tempfile.TemporaryDirectory() as folder:
        outcome = Path(folder, "outcome")
        environment[OUTCOME_VARIABLE] = str(outcome)
        # Its own session: a Ctrl-C of the terminal would end it unsaved.
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        with process, _stops_passed_on(process, run):
            code = process.wait()
        is_finished = outcome.is_file() and outcome.read_text(encoding="utf-8").strip() == "finished"
    return Ended(code if code in (0, 2) else 1, is_finished)


def training_command(
    arguments: Sequence[str], num_processes: int, *, on_cpu: bool = True
) -> tuple[list[str], dict[str, str]]:
    """Return the command that runs launch/train.py in that many processes of this machine, and its environment."""
    environment, program = dict(os.environ), [sys.executable, "-m", "cogvlm_ft.launch.train"]
    if on_cpu:
        environment |= {"DS_ACCELERATOR": "cpu", NO_GPUS[0]: NO_GPUS[1]}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // num_processes)))
    if num_processes == 1:
        return [*program, *arguments], environment
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(num_processes)]
    command += ["--master_port", str(free_port()), "--no_python", "--no_local_rank", "--log_level", "error"]
    # The launcher gives each process a GPU of its own, in CUDA_VISIBLE_DEVICES, on the CPU too.
    command += [*(["env", "=".join(NO_GPUS)] if on_cpu else []), *program]
    return [*command, *arguments], environment


@contextlib.contextmanager
def _stops_passed_on(process: subprocess.Popen[bytes], run: Path) -> Iterator[None]:
    """Stop the training run at a signal; end it unsaved at the second one."""
    is_asked = False

    def pass_on(number: int, _frame: FrameType | None) -> None:
        nonlocal is_asked
        if is_asked:
            os.killpg(process.pid, signal.SIGKILL)
            return
        is_asked = True
        os.write(2, b"\nstopping: training saves after the current step and ends (again: it ends unsaved)\n")
        try:
            ask_to_stop(run, find_owner(run))
        except ConfigError:  # it has not begun
            os.killpg(process.pid, signal.SIGTERM)

    former = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, *STOP_SIGNALS)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
