"""Every knob of a run: dataclasses <- YAML file <- `key=value` on the command line.

Sizes of the model are not knobs: they come from the model folder's config.json.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cogvlm_ft.errors import ConfigError

PACKAGE = Path(__file__).resolve().parent  # holds configs/ and slurm/, in a checkout by links
RUN_PRESETS, ENGINE_PRESETS = "configs/*.yaml", "configs/deepspeed/*.json"
PRECISIONS = ("fp32", "bf16")
CHECKPOINTED_LAYERS = ("none", "vision", "language", "all")
RESIZES = ("squash", "letterbox")
GATHERS = ("auto", "once", "layerwise")
DECODINGS = ("free", "grammar")
ON_ERRORS = ("stop", "continue")
PLANS = ("refuse", "warn", "ignore")
PROTOCOLS = ("ours", "cogvlm_authors", "qwen_vl", "internvl", "shikra", "grec_official")
WANDB_MODES = ("auto", "online", "offline", "disabled")


@dataclass
class ModelConfig:
    """What is trained."""

    path: str = (
        MISSING  # folder with config.json, *.safetensors and tokenizer.model, such as cogvlm-grounding-generalist
    )
    image_size: Optional[int] = (
        None  # px, a multiple of the patch size; null: the checkpoint's own. Raise for small targets
    )
    gradient_checkpointing: str = "all"  # layers recomputed in the backward pass, for 30 % more time and far less
    # memory: none | vision | language | all | a number n: every n-th layer
    compile: bool = False  # one kernel for each chain of elementwise operations; no gain on CPU, so only with CUDA
    freeze: list[str] = field(
        default_factory=list
    )  # parameter name patterns that stay as they are, e.g. "model.vision.*"


@dataclass
class AugmentConfig:
    """Training photos that never look the same twice. All off by default; good for a few hundred photos or less."""

    crop: float = 0.0  # chance of showing a part of the photo, with every target whole; enlarges small targets
    min_crop: float = 0.5  # smallest part, as a share of the photo's width and of its height
    flip: float = 0.0  # chance of a mirrored photo; never if a text mentions a side. Writing in photos is mirrored too
    brightness: float = 0.0  # largest change as a share, both ways: 0.2 is a factor of 0.8 to 1.2
    contrast: float = 0.0  # likewise
    saturation: float = 0.0  # likewise
    hue: float = 0.0  # largest turn of the colour circle, both ways, at most 0.5; never if a text mentions a colour


@dataclass
class DataConfig:
    """What it is trained on."""

    shards: Any = (
        MISSING  # folder (or its http(s) address) written by shards/build.py, or any folder of WebDataset tars;
    )
    # or a list of them that are mixed: [{path: a, weight: 2.0}, {path: b, weight: 0.5}], weight = times per epoch
    cache_dir: Optional[str] = None  # local folder for shards whose server gives no parts of a file
    cache_gib: float = 100.0  # how much of them
    train_split: str = "train"
    val_split: str = "val"
    wording: str = "box"  # built-in wording (box, description, referring, detection, region, steps, conversation,
    # mixed) or the path of a YAML file
    max_sequence_length: int = 4096  # tokens of one image with all its turns; longer samples count as bad
    max_turns_per_image: Optional[int] = None  # most turns in one sequence: an image with more is shown again with the
    # others, in further sequences, each of which counts as an image; null: all in one
    num_workers: int = 2  # loader processes per rank; 0 reads in the training process
    max_bad_fraction: float = 0.01  # unusable samples tolerated in an epoch, as a share of all
    resize: Optional[str] = None  # squash: the photo fills the square, as CogVLM was trained | letterbox: it keeps its
    # shape, with grey beside it | null: as the checkpoint was trained
    jpeg_draft: bool = False  # decode large training JPEGs at 1/2, 1/4 or 1/8, never below the input size: faster, and
    # pixels differ a little from those of evaluation
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass
class TrainConfig:
    """How it is trained."""

    epochs: int = 5
    max_steps: Optional[int] = None  # optimizer steps; ends the run before `epochs` do
    global_batch_size: int = 16  # images per optimizer step, over all ranks and accumulation
    micro_batch_size: int = 1  # images per forward pass of one rank
    lr: float = 5e-5  # peak
    min_lr_ratio: float = 0.1  # lr at the end of the cosine, as a share of the peak
    warmup_fraction: float = 0.03  # share of all steps with linearly rising lr
    weight_decay: float = 0.05  # not on norms and biases
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    precision: str = "fp32"  # fp32, or bf16 with fp32 master weights
    tf32: bool = False  # let CUDA matmuls round fp32 inputs to 10 mantissa bits: several times faster, less exact
    monitor: Any = "mean_iou"  # validation metric that chooses the best checkpoint, or several with weights:
    # {mean_iou: 1.0, not_found_acc: 0.5}. Which direction is better is known (docs/metrics.md)
    min_gain: float = 0.0  # a new best is better than the last one by more than this, in the unit of the monitor
    patience: Optional[int] = 3  # stop after this many evaluations without a new best; null: never
    log_every: int = 1  # steps
    max_skipped_in_a_row: int = 3  # steps whose loss or gradient is not finite change nothing; so many of them
    # one after another end the run
    hang_timeout_s: Optional[float] = 1800.0  # a rank without progress for so long (micro-batches, decoded tokens,
    # files read or written) writes its stacks to output_dir/stacks and ends the job; null: waits for ever


@dataclass
class EvaluateConfig:
    """How it is measured."""

    every_epochs: int = 1
    before_training: bool = True  # score the untouched model too, so that the gain is visible
    max_samples: Optional[int] = 500  # images per evaluation; null: the whole split
    batch_size: int = 8  # images per rank that generate together
    max_new_tokens: int = 128
    gather: str = "auto"  # parameters of all GPUs: once for the whole evaluation, which then needs no other rank |
    # layerwise, at every token | auto: once if the model fits into 60 % of the free memory of every GPU
    decoding: str = "free"  # free | grammar: answers about boxes are held to well-formed boxes or "not found"
    min_boxes: int = 0  # with grammar: at least so many boxes in every such answer; 0 admits "not found"
    num_pictures: int = 8  # photos drawn every time, always the same
    protocol: str = "ours"  # how answers are read and scored: ours, or as others did it: cogvlm_authors, qwen_vl,
    # internvl, shikra, grec_official (docs/metrics.md)
    probe: Optional[str] = None  # JSONL of general questions that show what is forgotten: {"image": ..., "prompt": ...,
    # "answer": ...}; without an answer, that of the untouched model is right


@dataclass
class CheckpointConfig:
    """What is kept."""

    every_steps: Optional[int] = None  # besides the end of every epoch
    keep_last: int = 2  # besides the best
    keep_every_steps: Optional[int] = None  # besides these, for good: the first one of every so many steps
    background: bool = True  # training goes on while they are written; takes host memory of 12 bytes per parameter
    on_error: str = "stop"  # stop | continue: what a full disk does to the run; former checkpoints stay either way


@dataclass
class TrackingConfig:
    """Weights & Biases, beside metrics.jsonl."""

    mode: str = "auto"  # auto: online with a key, else offline | online | offline | disabled
    project: str = "cogvlm-grounding"
    entity: Optional[str] = None
    name: Optional[str] = None


@dataclass
class Config:
    output_dir: str = MISSING
    seed: int = 0
    resume: bool = True  # go on from the newest checkpoint in output_dir, if there is one
    deepspeed: str = "zero3"  # DeepSpeed JSON: a path, or the name of a preset in configs/deepspeed/
    plan: str = "refuse"  # a run whose memory cannot suffice (launch/plan.py): refuse to start it | warn | ignore
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def find_preset(given: str | Path, presets: str, key: str) -> Path:
    """Return the file at a path if it exists, else the packaged preset of that name or relative path.

    presets: a glob within the package. key: the setting or option, for the ConfigError that lists the names.
    """
    if Path(given).is_file():
        return Path(given)
    packaged = sorted(PACKAGE.glob(presets))
    for file in packaged:
        if str(given) in (file.stem, file.relative_to(PACKAGE).as_posix()):
            return file
    names = ", ".join(file.stem for file in packaged)
    raise ConfigError(f"{key}{given}: no such file or preset; expected a path or one of {names}")


def num_accum_steps(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Return the micro-batches per optimizer step of one rank; ConfigError where the sizes do not divide."""
    per_pass = world_size * micro_batch_size
    if global_batch_size % per_pass:
        below = global_batch_size // per_pass * per_pass
        nearest = " or ".join(str(size) for size in (below, below + per_pass) if size)
        raise ConfigError(
            f"train.global_batch_size: {global_batch_size} is not a multiple of {world_size} ranks x "
            f"train.micro_batch_size={micro_batch_size}; expected {nearest}"
        )
    return global_batch_size // per_pass


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Merge defaults, YAML (a path or the name of a preset) and overrides.

    A ConfigError names the source and the key and suggests the nearest.
    """
    merged = OmegaConf.structured(Config)
    if path is not None:
        file = find_preset(path, RUN_PRESETS, "--config ")
        merged = _merge(merged, lambda: OmegaConf.load(file), f"--config {path}")
    for override in overrides:
        if "=" not in override:
            raise ConfigError(
                f"{override!r} on the command line: settings are written key=value, such as train.lr=1e-5"
            )
        merged = _merge(
            merged, lambda override=override: OmegaConf.from_dotlist([override]), f"command line {override}"
        )
    try:
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(f"no value for {', '.join(missing)}: set it in the YAML file or as {missing[0]}=...")
        config: Config = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    _check(config)
    return config


def _merge(base: Any, load: Any, source: str) -> Any:
    try:
        return OmegaConf.merge(base, load())
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        key = getattr(error, "full_key", None)
        first_line = str(error).splitlines()[0]
        raise ConfigError(f"{source}: {f'{key}: ' if key else ''}{first_line}") from error
    except Exception as error:
        if type(error).__module__.startswith("yaml"):
            raise ConfigError(f"{source} is no valid YAML: {error}") from error
        raise


def _check(config: Config) -> None:
    train, data, evaluate = config.train, config.data, config.evaluate
    _check_shares(data.augment)
    for key, value, allowed in (
        ("plan", config.plan, PLANS),
        ("train.precision", train.precision, PRECISIONS),
        ("tracking.mode", config.tracking.mode, WANDB_MODES),
        ("data.resize", data.resize, (*RESIZES, None)),
        ("checkpoint.on_error", config.checkpoint.on_error, ON_ERRORS),
        ("evaluate.gather", evaluate.gather, GATHERS),
        ("evaluate.decoding", evaluate.decoding, DECODINGS),
        ("evaluate.protocol", evaluate.protocol, PROTOCOLS),
    ):
        if value not in allowed:
            raise ConfigError(f"{key}={value!r}: wanted one of {', '.join(map(str, allowed))}")
    layers = config.model.gradient_checkpointing
    if layers not in CHECKPOINTED_LAYERS and not (layers.isdecimal() and int(layers) > 0):
        wanted = ", ".join(CHECKPOINTED_LAYERS)
        raise ConfigError(f"model.gradient_checkpointing={layers}: wanted {wanted}, or n for every n-th layer")
    _check_monitor(train.monitor)
    if evaluate.min_boxes > 0 and evaluate.decoding == "free":
        raise ConfigError(f"evaluate.min_boxes={evaluate.min_boxes} needs evaluate.decoding=grammar")
    for key, number, minimum in (
        ("train.epochs", train.epochs, 1),
        ("train.global_batch_size", train.global_batch_size, 1),
        ("train.micro_batch_size", train.micro_batch_size, 1),
        ("train.max_steps", train.max_steps, 1),
        ("train.log_every", train.log_every, 1),
        ("train.max_skipped_in_a_row", train.max_skipped_in_a_row, 1),
        ("train.hang_timeout_s", train.hang_timeout_s, 1),
        ("train.patience", train.patience, 1),
        ("train.min_gain", train.min_gain, 0),
        ("train.lr", train.lr, 0),
        ("train.max_grad_norm", train.max_grad_norm, 0),
        ("train.warmup_fraction", train.warmup_fraction, 0),
        ("train.min_lr_ratio", train.min_lr_ratio, 0),
        ("train.weight_decay", train.weight_decay, 0),
        ("data.max_bad_fraction", data.max_bad_fraction, 0),
        ("evaluate.num_pictures", evaluate.num_pictures, 0),
        ("data.num_workers", data.num_workers, 0),
        ("data.max_turns_per_image", data.max_turns_per_image, 1),
        ("data.cache_gib", data.cache_gib, 0),
        ("evaluate.every_epochs", evaluate.every_epochs, 1),
        ("evaluate.batch_size", evaluate.batch_size, 1),
        ("evaluate.max_samples", evaluate.max_samples, 1),
        ("evaluate.max_new_tokens", evaluate.max_new_tokens, 1),
        ("evaluate.min_boxes", evaluate.min_boxes, 0),
        ("checkpoint.every_steps", config.checkpoint.every_steps, 1),
        ("checkpoint.keep_last", config.checkpoint.keep_last, 1),
        ("checkpoint.keep_every_steps", config.checkpoint.keep_every_steps, 1),
    ):
        if number is not None and not number >= minimum:  # not(>=) catches NaN too
            raise ConfigError(f"{key}={number}: wanted at least {minimum}")


def _check_monitor(monitor: Any) -> None:
    good = isinstance(monitor, str) and bool(monitor)
    if isinstance(monitor, dict) and monitor:
        good = all(
            isinstance(weight, (int, float)) and not isinstance(weight, bool) and 0 < weight < float("inf")
            for weight in monitor.values()
        )
    if not good:
        raise ConfigError(
            f"train.monitor={monitor!r}: wanted the name of a metric, or names with weights above 0, such as "
            "{mean_iou: 1.0, not_found_acc: 0.5}"
        )


def _check_shares(augment: AugmentConfig) -> None:
    for name, value in vars(augment).items():
        low, high = {"hue": (0.0, 0.5), "min_crop": (0.05, 1.0)}.get(name, (0.0, 1.0))
        if not low <= value <= high:
            raise ConfigError(f"data.augment.{name}={value}: wanted {low} to {high}")


def save_config(config: Config, path: str | Path) -> None:
    OmegaConf.save(OmegaConf.structured(config), path)


def config_sha256(config: Config) -> str:
    """Identifies the resolved settings."""
    return hashlib.sha256(OmegaConf.to_yaml(OmegaConf.structured(config)).encode()).hexdigest()
