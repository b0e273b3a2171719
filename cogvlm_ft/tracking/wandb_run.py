"""Record a run in Weights & Biases. Problems with W&B are warnings, never errors."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from typing import Any, Literal

from PIL import Image

from cogvlm_ft.errors import ConfigError
from cogvlm_ft.plain_files import real_path
from cogvlm_ft.run_folder import RunFolder
from cogvlm_ft.tracking.metrics_log import json_value
from cogvlm_ft.tracking.provenance import git_state, has_password, without_passwords

logger = logging.getLogger(__name__)

INIT_TIMEOUT_S = 20
FINISH_TIMEOUT_S = 120
MAX_WAITING = 1000  # rows and images that are not recorded yet
STEP, EPOCH = "train/step", "epoch"  # the axes: the step that wandb counts starts again at 0 in a resumed offline run
PICTURES, TABLE = "pictures", "predictions/table"
SLOWEST = ("slowest_rank", "slowest_rank_ratio", "slowest_rank_data_wait_s")
RATES = ("images_per_s", "turns_per_s", "tokens_per_s", "step_s", "data_wait_fraction", "tflops", "mfu")
SPEED = frozenset((*RATES, *SLOWEST, "memory_gib"))
WORDS = {"@": "_at_", "<": "lt_", ">": "gt_", "+": "_plus", "%": "pct"}  # distinct: <1% and >1% are two metrics

_MAX_SHOWN = 300  # characters
_set_here: set[str] = set()

Box = tuple[float, float, float, float]
Values = Mapping[str, Any]
Action = Callable[[Any], object]


@dataclass(frozen=True)
class BoxedImage:
    """A JPEG or PNG with boxes in pixels of the file, xyxy.

    boxes: by the name of their group, (box, label, number of its class). classes: name by number.
    """

    path: Path
    caption: str
    boxes: Mapping[str, Sequence[tuple[Box, str, int]]]
    classes: Mapping[int, str]


class WandbRun:
    """A training run in W&B, however many attempts it takes: the same `run_id` continues it.

    A separate thread records in order: wandb passes every row to another process and waits for it, which takes
    milliseconds where all cores are busy. `finish` waits for the thread; before that `stopped_by` may be set late.

    mode: "auto" is WANDB_MODE if set, else online when a W&B key is found, else offline; "online" becomes offline when
    the server cannot be reached, unless `is_new`; "disabled" records nothing.
    lower_is_better: names of validation metrics whose best value is the lowest.
    is_new: the server must not know this run id yet.
    place: the address of its page, or offline its folder; empty without W&B. stopped_by: what ended recording early.
    """

    def __init__(
        self,
        folder: Path,
        *,
        mode: str,
        project: str,
        entity: str | None,
        name: str | None,
        run_id: str,
        config: Values,
        lower_is_better: Collection[str] = (),
        is_new: bool = False,
    ) -> None:
        self.stopped_by: Exception | None = None
        self.place = ""
        self._run: Any = None
        self._defined: set[str] = set()
        self._lower_is_better = lower_is_better
        identity = {"project": project, "entity": entity, "name": name, "id": run_id, "dir": str(folder)}
        try:
            self._run = _start_run(mode, is_new, **identity, config=without_passwords(dict(config)))
            if self._run is not None:
                self.place = str(self._run.settings.sync_dir if self._run.offline else self._run.url)
                logger.info("W&B: %s", self.place)
        except Exception as error:
            self._give_up(error)
        self._waiting: Queue[Action | None] = Queue(MAX_WAITING)
        self._recorder = Thread(target=self._record, name="wandb-recorder", daemon=True)
        self._recorder.start()

    @property
    def is_recording(self) -> bool:
        return self._run is not None

    @property
    def run_dir(self) -> Path | None:
        """Return the folder of the W&B run, for `wandb sync`; None without W&B."""
        return None if self._run is None else Path(self._run.settings.sync_dir)

    def log_train(self, step: int, values: Values) -> None:
        """Log training values over the step: `train/<name>`, and `speed/<name>` for rates and times."""
        named = {train_key(name): value for name, value in values.items()}
        self._with_run(lambda run: run.log({STEP: step, **_without_nulls(named)}))

    def log_val(self, epoch: float, step: int, values: Values) -> None:
        """Log the values of one evaluation over the epoch, named by `val_key`; W&B keeps the best of each."""

        def log(run: Any) -> None:
            named = {val_key(name): value for name, value in _without_nulls(values).items()}
            for name in values:
                self._define(run, name)
            run.log({EPOCH: epoch, "val/step": step, **named})

        self._with_run(log)

    def log_pictures(self, epoch: float, images: Mapping[str, Sequence[BoxedImage]]) -> None:
        """Log images whose boxes can be toggled by class, as `pictures/<group>`; empty groups are left out."""

        def log(run: Any) -> None:
            shown = {f"{PICTURES}/{group}": _images(of) for group, of in images.items() if of}
            if shown:
                run.log({EPOCH: epoch, **shown})

        self._with_run(log)

    def log_table(self, epoch: float, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log predictions as a table, `predictions/table`."""

        def log(run: Any) -> None:
            import wandb

            run.log({EPOCH: epoch, TABLE: wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

        self._with_run(log)

    def log_export(self, folder: Path, alias: str, facts: Values) -> None:
        """Record a model folder as an artifact of this run: its path and size. Nothing is uploaded."""

        def log(run: Any) -> None:
            import wandb

            artifact = wandb.Artifact(f"model-{run.id}", type="model", metadata=dict(facts))
            artifact.add_reference(real_path(folder).as_uri(), checksum=False)
            run.log_artifact(artifact, aliases=["latest", alias])

        self._with_run(log)

    def summary(self, values: Values) -> None:
        self._with_run(lambda run: run.summary.update(_without_nulls(values)))

    def finish(self) -> None:
        """Close the run, waiting at most two minutes for what is not recorded yet and two for its upload."""
        self._with_run(lambda run: run.finish())
        self._with_run(None)
        self._recorder.join(2 * FINISH_TIMEOUT_S)
        if self._recorder.is_alive():
            self._give_up(TimeoutError("it did not finish in time"))
        self._run = None

    def _define(self, run: Any, name: str) -> None:
        """Define the axis of a metric, once, and keep its best value; a count has none."""
        if name in self._defined:
            return
        self._defined.add(name)
        metric = name.partition("/")[0]
        best = "min" if metric in self._lower_is_better else "max"
        kept = None if metric.startswith("num_") else f"{best},last"
        run.define_metric(val_key(name), step_metric=EPOCH, summary=kept)

    def _with_run(self, action: Action | None) -> None:
        """Queue an action on the run; None ends the queue."""
        if self._run is None:
            return
        try:
            self._waiting.put(action, timeout=FINISH_TIMEOUT_S)
        except Full:
            self._give_up(TimeoutError("it does not take what is recorded"))

    def _record(self) -> None:
        """Run the queued actions in the thread. An error ends W&B, not the training run."""
        run = self._run
        while run is not None and (action := self._waiting.get()) is not None:
            try:
                action(run)
            except Exception as error:
                self._give_up(error)
                return

    def _give_up(self, error: Exception) -> None:
        logger.warning("W&B stopped (%s); continuing without it", _in_one_line(error))
        self.stopped_by = error
        self._run = None
        if isinstance(error, ConnectionError):  # wandb's process was killed, perhaps by a launcher that stops
            _forget_ended_process()


def _in_one_line(error: Exception) -> str:
    """Shorten an error of wandb, which may list every setting with its address, to one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:_MAX_SHOWN]}"


def _forget_ended_process() -> None:
    """Tear down wandb, which would otherwise print a traceback at exit because its process has ended."""
    import wandb

    with suppress(Exception):
        wandb.teardown()


def train_key(name: str) -> str:
    return f"{'speed' if name in SPEED else 'train'}/{_plain(name)}"


def val_key(name: str) -> str:
    """Return the name of a validation metric in W&B, whose sections are the part before the first slash.

    acc@0.5 -> val/acc_at_0_5; acc@0.5/size=small -> val_by_size/acc_at_0_5/small; probe/score -> val_probe/score.
    """
    metric, *splits = name.split("/")
    if not splits:
        return f"val/{_plain(metric)}"
    if "=" not in name:
        return "/".join([f"val_{_plain(metric)}", *map(_plain, splits)])
    groups, values = zip(*(split.partition("=")[::2] for split in splits), strict=True)
    return "/".join([f"val_by_{_plain('_'.join(groups))}", _plain(metric), *map(_plain, values)])


def _plain(name: str) -> str:
    """Replace the characters of a name that W&B cannot sort, filter or define by, such as a dot (nesting)."""
    spelled = "".join(WORDS.get(sign, sign) for sign in name)
    return re.sub(r"\W", "_", spelled)


def stated_mode(mode: str) -> str:
    """Return WANDB_MODE for "auto" where it is set, else `mode`.

    W&B refuses variables that are empty, as after `export WANDB_MODE=`: they are deleted; and keys with blanks or the
    line end of the file that they were read from: these are removed.
    """
    for name, value in list(os.environ.items()):
        if name.startswith("WANDB_"):
            os.environ[name] = value.strip()
            if not value.strip():
                del os.environ[name]
    return os.environ.get("WANDB_MODE", "auto") if mode == "auto" else mode


def check_key(mode: str) -> None:
    """Raise ConfigError if a run is to be uploaded and there is no API key."""
    mode = stated_mode(mode)
    if mode not in ("auto", "online"):
        return
    import wandb

    if not wandb.login(prompt=False, verify=False):
        raise ConfigError(
            "nothing sent: run wandb login, or set WANDB_API_KEY. --mode offline records the run in its folder instead"
        )


def _start_run(mode: str, is_new: bool, **arguments: Any) -> Any:
    """Start a W&B run as `WandbRun` describes its mode; None if it is disabled. Raises whatever wandb raises."""
    mode = stated_mode(mode)
    if mode == "disabled":
        return None
    _keep_files_in(Path(arguments["dir"]))
    import wandb  # slow to import

    if mode in ("auto", "online"):
        try:
            # First, because wandb.init would ask for a missing key on a terminal and wait.
            if wandb.login(prompt=False, verify=False):
                return _init_run("online", resume="never" if is_new else "allow", **arguments)
            reason = "no API key found"
        except Exception as error:
            wandb.teardown()  # the failed attempt holds the run id in wandb's process until that ends
            if is_new:
                raise
            reason = _in_one_line(error)
        logger.warning("W&B: recording offline (%s); send the run later with launch/wandb_sync.py", reason)
    return _init_run("offline", **arguments)


def _keep_files_in(folder: Path) -> None:
    """Make wandb stage and cache files in output_dir unless the environment sets folders: the home folder may be full.

    Its settings and keys are still those of the home folder.
    """
    for variable, name in (("WANDB_DATA_DIR", "data"), ("WANDB_CACHE_DIR", "cache")):
        if variable not in os.environ or variable in _set_here:
            _set_here.add(variable)
            os.environ[variable] = str((RunFolder(folder).wandb / name).absolute())


def _init_run(mode: Literal["online", "offline"], **arguments: Any) -> Any:
    import wandb

    code = git_state()
    settings = wandb.Settings(
        console="off",
        silent=True,
        save_code=False,
        reinit="create_new",
        init_timeout=INIT_TIMEOUT_S,
        finish_timeout=FINISH_TIMEOUT_S,
        disable_git=code is None,  # else wandb uses the repository around the working folder, which may be another one
        git_commit=code.commit if code else None,
        git_remote_url=code.remote_url or "" if code else None,
        x_disable_meta=has_password(),  # wandb records the command line unchanged
    )
    run = wandb.init(mode=mode, settings=settings, **arguments)
    for axis, sections in ((STEP, ("train/*", "speed/*")), (EPOCH, ("val/*", f"{PICTURES}/*", "predictions/*"))):
        run.define_metric(axis)
        for section in sections:
            run.define_metric(section, step_metric=axis)
    return run


def _images(group: Sequence[BoxedImage]) -> list[Any]:
    """Return the images of a group at one size, which W&B takes from the first: smaller ones are padded with grey."""
    sizes = []
    for each in group:
        with Image.open(each.path, formats=("JPEG", "PNG")) as image:
            sizes.append(image.size)
    canvas = (max(width for width, _ in sizes), max(height for _, height in sizes))
    return [_image(each, None if size == canvas else canvas) for each, size in zip(group, sizes, strict=True)]


def _image(image: BoxedImage, canvas: tuple[int, int] | None) -> Any:
    """Convert an image; canvas: the size to pad it to, right and below, where its boxes stay what they are."""
    import wandb

    boxes = {group: _boxes(labelled, image.classes) for group, labelled in image.boxes.items()}
    if canvas is None:
        return wandb.Image(str(image.path), caption=image.caption, boxes=boxes)
    with Image.open(image.path, formats=("JPEG", "PNG")) as photo:
        padded = Image.new("RGB", canvas, (128, 128, 128))
        padded.paste(photo.convert("RGB"))
    return wandb.Image(padded, caption=image.caption, boxes=boxes, file_type="jpg")


def _boxes(labelled: Sequence[tuple[Box, str, int]], classes: Mapping[int, str]) -> dict[str, Any]:
    """Convert boxes to what `wandb.Image` expects."""
    box_data = []
    for (x0, y0, x1, y1), label, class_id in labelled:
        position = {"minX": float(x0), "minY": float(y0), "maxX": float(x1), "maxY": float(y1)}
        box_data.append({"position": position, "domain": "pixel", "class_id": class_id, "box_caption": label})
    return {"box_data": box_data, "class_labels": dict(classes)}


def _without_nulls(values: Values) -> dict[str, Any]:
    """Leave out the values that metrics.jsonl holds as null."""
    cleaned = {key: json_value(value) for key, value in values.items()}
    return {key: value for key, value in cleaned.items() if value is not None}
