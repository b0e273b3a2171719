"""What a run measured: metrics.jsonl always (the truth), Weights & Biases beside it. Only rank 0 has a tracker."""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from cogvlm_ft.config import WANDB_MODES
from cogvlm_ft.errors import ConfigError

logger = logging.getLogger(__name__)

INIT_TIMEOUT_S = 20
FINISH_TIMEOUT_S = 120

Box = tuple[float, float, float, float]
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Picture:
    """An evaluated picture for the dashboard.

    truth, predicted: (box in pixels xyxy, its label).
    """

    key: str
    image: Image.Image
    truth: Sequence[tuple[Box, str]]
    predicted: Sequence[tuple[Box, str]]
    caption: str


class Tracker:
    """Appends to metrics.jsonl in `output_dir` and mirrors to W&B; trouble with W&B is a warning, never an error.

    mode: "auto" is WANDB_MODE if set, else online when a W&B key is found, else offline; "online" becomes offline when
    the server cannot be reached; "disabled" writes metrics.jsonl only.
    run_id: of the run to go on with, None for a new one.
    config: shown in W&B as the configuration of the run.
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
        config: Values | None = None,
    ) -> None:
        if mode not in WANDB_MODES:
            raise ConfigError(f"tracking mode: found {mode!r}, wanted one of {', '.join(WANDB_MODES)}")
        self.run_id = run_id or secrets.token_hex(4)
        self.metrics_path = Path(output_dir) / "metrics.jsonl"
        self.metrics_path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(self.metrics_path)
        self._run: Any = None
        if mode != "disabled":
            identity = {"project": project, "entity": entity, "name": name, "id": self.run_id}
            try:
                self._run = _start_run(mode, **identity, config=dict(config or {}), dir=str(output_dir))
            except Exception as error:
                self._give_up(error)

    @property
    def run_dir(self) -> Path | None:
        """Folder of the W&B run, for `wandb sync`; None without W&B."""
        return None if self._run is None else Path(self._run.settings.sync_dir)

    def log_train(self, step: int, values: Values) -> None:
        """Record training values at a step; in W&B they are `train/<name>` over `train/step`."""
        self._append({"kind": "train", "step": step, **values})
        self._mirror({"train/step": step} | {f"train/{name}": value for name, value in values.items()})

    def log_val(self, epoch: float, step: int, values: Values) -> None:
        """Record the values of one evaluation; in W&B they are `val/<name>` over `epoch`."""
        self._append({"kind": "val", "epoch": epoch, "step": step, **values})
        self._mirror({"epoch": epoch, "val/step": step} | {f"val/{name}": value for name, value in values.items()})

    def log_pictures(self, epoch: float, pictures: Sequence[Picture]) -> None:
        """Show pictures with true and predicted boxes in W&B (`val/pictures`); metrics.jsonl does not hold them."""
        self._with_run(
            lambda run: run.log({"epoch": epoch, "val/pictures": [_wandb_image(picture) for picture in pictures]})
        )

    def summary(self, values: Values) -> None:
        """Record the final values of the run."""
        self._append({"kind": "summary", **values})
        self._with_run(lambda run: run.summary.update(_without_nulls(values)))

    def finish(self) -> None:
        """Close the W&B run, waiting at most two minutes for its upload; later values go to metrics.jsonl only."""
        self._with_run(lambda run: run.finish())
        self._run = None

    def truncate_after(self, step: int) -> None:
        """Drop what metrics.jsonl holds after `step`, and summaries: a run resumed there records them again."""
        with self.metrics_path.open(encoding="utf-8") as lines:
            kept = [line for line in lines if json.loads(line).get("step", math.inf) <= step]
        rewritten = self.metrics_path.with_suffix(".jsonl.tmp")
        rewritten.write_text("".join(kept), encoding="utf-8")
        rewritten.replace(self.metrics_path)

    def _append(self, entry: Values) -> None:
        line = json.dumps({key: _json_value(value) for key, value in entry.items()}, allow_nan=False)
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _mirror(self, values: Values) -> None:
        self._with_run(lambda run: run.log(_without_nulls(values)))

    def _with_run(self, action: Callable[[Any], None]) -> None:
        """Do something with the W&B run; whatever goes wrong there ends W&B, not the training."""
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        logger.warning("W&B stopped (%s: %s); going on with %s only", type(error).__name__, error, self.metrics_path)
        self._run = None


def _start_run(mode: str, **arguments: Any) -> Any:
    """A W&B run as `Tracker` describes its mode, or None if WANDB_MODE disables it; raises whatever wandb raises."""
    import wandb  # slow to import: only who uses it pays

    wanted = os.environ.get("WANDB_MODE", "auto") if mode == "auto" else mode
    if wanted == "disabled":
        return None
    if wanted in ("auto", "online"):
        try:
            # Looked up first, because wandb.init would ask for a missing key on a terminal and wait.
            if wandb.login(prompt=False, verify=False):
                return _init_run("online", resume="allow", **arguments)
            reason = "no API key found"
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            wandb.teardown()  # the failed attempt holds the run id in wandb's process until that ends
        logger.warning("W&B: recording offline (%s); send the run later with `wandb sync`", reason)
    return _init_run("offline", **arguments)


def _init_run(mode: Literal["online", "offline"], **arguments: Any) -> Any:
    import wandb

    settings = wandb.Settings(
        console="off",
        silent=True,
        save_code=False,
        reinit="create_new",
        init_timeout=INIT_TIMEOUT_S,
        finish_timeout=FINISH_TIMEOUT_S,
    )
    run = wandb.init(mode=mode, settings=settings, **arguments)
    # Own axes: the step that wandb counts starts again at 0 in a resumed offline run.
    run.define_metric("train/step")
    run.define_metric("train/*", step_metric="train/step")
    run.define_metric("epoch")
    run.define_metric("val/*", step_metric="epoch")
    logger.info("W&B: %s", run.url if mode == "online" else run.settings.sync_dir)
    return run


def _wandb_image(picture: Picture) -> Any:
    import wandb

    boxes = {"ground_truth": _wandb_boxes(picture.truth, 0), "predictions": _wandb_boxes(picture.predicted, 1)}
    return wandb.Image(picture.image, caption=f"{picture.key}: {picture.caption}", boxes=boxes)


def _wandb_boxes(labelled_boxes: Sequence[tuple[Box, str]], class_id: int) -> dict[str, Any]:
    """Boxes the way `wandb.Image` wants them, in pixels; the class only gives truth and answer different colours."""
    box_data = []
    for (x0, y0, x1, y1), label in labelled_boxes:
        position = {"minX": float(x0), "minY": float(y0), "maxX": float(x1), "maxY": float(y1)}
        box_data.append({"position": position, "domain": "pixel", "class_id": class_id, "box_caption": label})
    return {"box_data": box_data, "class_labels": {0: "truth", 1: "answer"}}


def _without_nulls(values: Values) -> dict[str, Any]:
    """Values for W&B: what metrics.jsonl holds as null is left out."""
    cleaned = {key: _json_value(value) for key, value in values.items()}
    return {key: value for key, value in cleaned.items() if value is not None}


def _json_value(value: Any) -> bool | int | float | str | None:
    """A value as JSON can hold it: any number type becomes a float, NaN and infinity become null."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _drop_torn_line(path: Path) -> None:
    """Cut off a last line that a killed run left unfinished, so that the next one starts on its own line."""
    path.touch()
    content = path.read_bytes()
    num_whole = content.rfind(b"\n") + 1
    if num_whole < len(content):
        logger.warning("%s: dropping its unfinished last line", path)
        os.truncate(path, num_whole)
