"""Every setting of a run: its default, description, unit and bounds.

`config.py` checks values by these fields, and `docs/config.md` and `docs/config_zh.md` are generated from them.
Values in a model's config.json, such as its sizes, are not settings.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from omegaconf import MISSING

from cogvlm_ft.adapter_settings import AdapterConfig as AdapterConfig
from cogvlm_ft.setting_rules import Rules as Rules
from cogvlm_ft.setting_rules import setting
from cogvlm_ft.tile_settings import TilesConfig

PRECISIONS = ("fp32", "bf16")
CHECKPOINTED_LAYERS = ("none", "vision", "language", "all")
RESIZES = ("squash", "letterbox")
BOX_LOSSES = ("expected", "giou")
NUM_DIGITS = 3  # of a coordinate
GATHERS = ("auto", "once", "layerwise")
DECODINGS = ("free", "grammar")
ON_ERRORS = ("stop", "continue")
PLANS = ("refuse", "warn", "ignore")
PROTOCOLS = ("ours", "cogvlm_authors", "qwen_vl", "internvl", "shikra", "grec_official")
WANDB_MODES = ("auto", "online", "offline", "disabled")


@dataclass
class ModelConfig:
    """The model to train."""

    path: str = setting(
        MISSING,
        "Folder with `config.json`, `*.safetensors` and `tokenizer.model`, such as cogvlm-grounding-generalist. "
        "`tiny`: a random model of 2 million parameters for your shards, to try programs.",
        is_path=True,
    )
    image_size: Optional[int] = setting(
        None,
        "Side of the square input, a multiple of the patch size. Raise it for small targets. null: the model's own.",
        unit="px",
        least=1,
    )
    gradient_checkpointing: str = setting(
        "all",
        "Layers recomputed in the backward pass, for about 30 % more time and far less memory: "
        "`none`, `vision`, `language`, `all`, or a number n for every n-th layer.",
    )
    compile: bool = setting(False, "Compile chains of elementwise operations into one kernel each. No gain on CPU.")
    freeze: list[str] = setting([], 'Name patterns of parameters that are not trained, such as `["model.vision.*"]`.')

    @property
    def folder(self) -> Path:
        """`path` with the home folder in place of `~`."""
        return Path(self.path).expanduser()


@dataclass
class AugmentConfig:
    """Augmentation of training images. All off by default; useful for a few hundred images or fewer."""

    crop: float = setting(
        0.0,
        "Chance of showing a part of the image that holds every target whole. Enlarges small targets.",
        least=0,
        most=1,
    )
    min_crop: float = setting(0.5, "Smallest part, as a fraction of the image's width and height.", least=0.05, most=1)
    flip: float = setting(
        0.0,
        "Chance of mirroring an image; never if a text mentions a side. Writing in the image is mirrored too.",
        least=0,
        most=1,
    )
    brightness: float = setting(0.0, "Largest change both ways: 0.2 is a factor of 0.8 to 1.2.", least=0, most=1)
    contrast: float = setting(0.0, "As brightness.", least=0, most=1)
    saturation: float = setting(0.0, "As brightness.", least=0, most=1)
    hue: float = setting(
        0.0, "Largest turn of the colour circle, both ways; none if a text mentions a colour.", least=0, most=0.5
    )


@dataclass
class DataConfig:
    """The data to train on."""

    shards: Any = setting(
        MISSING,
        "Folder of shards; or tars: one, a list, `train-{000000..000003}.tar`, `*.tar`; on disk or at an "
        "`https://`, `s3://` or `gs://` address. Or a list to mix, `[{path: a, weight: 2.0}, {path: b, weight: 0.5}]`, "
        "where weight is the number of times per epoch.",
        is_path=True,
    )
    val_shards: Any = setting(
        None, "Shards to evaluate on, in the same forms. null: the split `val_split` of `shards`.", is_path=True
    )
    cache_dir: Optional[str] = setting(
        None,
        "Local folder for shards that cannot be read in place: compressed, or from a server without ranges; and for "
        "what scans of tars without `index.json` found.",
        is_path=True,
    )
    cache_gib: float = setting(100.0, "Size of that cache.", unit="GiB", least=0)
    retry_s: float = setting(600.0, "How long a shard server is tried again before the run ends.", unit="s", least=0)
    train_split: str = setting("train", "Split to train on.")
    val_split: str = setting("val", "Split to evaluate on.")
    wording: str = setting(
        "box",
        "Words of questions and answers: `box`, `description`, `referring`, `detection`, `region`, `steps`, "
        "`conversation`, `mixed`, or a YAML file.",
        is_path=True,
    )
    max_sequence_length: int = setting(
        4096,
        "Longest sequence of an image with all its turns; longer samples count as unusable.",
        unit="tokens",
        least=1,
    )
    max_turns_per_image: Optional[int] = setting(
        None,
        "Most turns in one sequence. An image with more is repeated in further sequences, each of which counts as a "
        "sample. null: all in one.",
        least=1,
    )
    num_workers: int = setting(2, "Loader processes per rank. 0: read in the training process.", least=0)
    max_bad_fraction: float = setting(
        0.01,
        "Fraction of unusable samples per epoch beyond which the run stops. One is always allowed unless this is 0.",
        least=0,
        most=1,
    )
    resize: Optional[str] = setting(
        None,
        "`squash` fills the square, as CogVLM was trained; `letterbox` keeps the image's shape on grey. "
        "null: as the model was trained.",
        choices=RESIZES,
    )
    jpeg_draft: bool = setting(
        False,
        "Decode large training JPEGs at 1/2, 1/4 or 1/8 of their size, never below the input size: faster, with "
        "pixels slightly different from those of evaluation.",
    )
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    tiles: TilesConfig = field(default_factory=TilesConfig)


@dataclass
class BoxLossConfig:
    """A distance between boxes, besides the cross entropy of their digits."""

    weight: float = setting(0.0, "Factor of the distance. 0: cross entropy alone.", least=0)
    kind: str = setting(
        BOX_LOSSES[0],
        "`expected`: absolute error of the expected coordinates, as a fraction of the image; `giou`: 1 - GIoU of the "
        "expected box.",
        choices=BOX_LOSSES,
    )


@dataclass
class TrainConfig:
    """Optimization."""

    epochs: int = setting(5, "Passes over the training data.", least=1)
    max_steps: Optional[int] = setting(
        None, "Stop after this many optimizer steps. null: no limit.", unit="steps", least=1
    )
    global_batch_size: int = setting(
        16, "Images per optimizer step, over all ranks. A multiple of ranks x micro_batch_size.", unit="images", least=1
    )
    micro_batch_size: int = setting(
        1, "Images per forward pass of one rank. Larger is faster and needs more memory.", unit="images", least=1
    )
    lr: float = setting(5e-5, "Peak learning rate.", least=0)
    lr_scale: dict[str, float] = setting(
        {},
        'Factors of the learning rate by name pattern, such as `{"model.vision.*": 0.1, "lm_head.*": 0.0}`. The last '
        "match counts; 0 freezes.",
        least=0,
    )
    vision_layer_decay: float = setting(
        1.0,
        "Factor of the learning rate per layer of the vision tower, from its last layer down. 1: the same in all.",
        above=0,
        most=1,
    )
    box_loss: BoxLossConfig = field(default_factory=BoxLossConfig)
    digit_weights: list[float] = setting(
        [1.0] * NUM_DIGITS,
        "Factors of the cross entropy of a coordinate's hundreds, tens and units, such as `[4, 2, 1]`; they are scaled "
        "to a mean of 1.",
        above=0,
        length=NUM_DIGITS,
    )
    min_lr_ratio: float = setting(
        0.1, "Learning rate at the end of the cosine, as a fraction of the peak.", least=0, most=1
    )
    warmup_fraction: float = setting(0.03, "Fraction of all steps with linearly rising learning rate.", least=0, most=1)
    weight_decay: float = setting(0.05, "AdamW's weight decay; not applied to norms and biases.", least=0)
    beta1: float = setting(0.9, "AdamW's beta 1.", least=0, below=1)
    beta2: float = setting(0.95, "AdamW's beta 2.", least=0, below=1)
    eps: float = setting(1e-8, "AdamW's epsilon.", above=0)
    max_grad_norm: float = setting(1.0, "Norm to which gradients are clipped. 0: no clipping.", least=0)
    ema: Optional[float] = setting(
        None,
        "Decay of a running average of the weights, such as 0.999; it is evaluated beside them, and exported by "
        "`launch/export.py --weights-of ema`. null: none.",
        above=0,
        below=1,
    )
    precision: str = setting(
        "fp32", "`fp32`, or `bf16` with fp32 master weights and optimizer states.", choices=PRECISIONS
    )
    tf32: bool = setting(
        False, "Let CUDA round fp32 inputs of matrix products to 10 mantissa bits: several times faster, less exact."
    )
    monitor: Any = setting(
        "mean_iou",
        "Validation metric that chooses the best checkpoint; or several with weights, "
        "`{mean_iou: 1.0, not_found_acc: 0.5}`. The better direction is known (docs/metrics.md).",
    )
    min_gain: float = setting(
        0.0, "A new best must exceed the last one by more than this, in the unit of the monitor.", least=0
    )
    patience: Optional[int] = setting(
        3, "Stop after this many evaluations without a new best. null: never.", unit="evaluations", least=1
    )
    log_every: int = setting(1, "Interval of log lines.", unit="steps", least=1)
    max_skipped_in_a_row: int = setting(
        3,
        "Steps with a loss or gradient that is not finite change nothing; this many in a row end the run.",
        unit="steps",
        least=1,
    )
    hang_timeout_s: Optional[float] = setting(
        1800.0,
        "After this long without progress on any rank, ranks write their stacks to `output_dir/stacks` and end the "
        "job. "
        "null: wait indefinitely.",
        unit="s",
        least=1,
    )


@dataclass
class EvaluateConfig:
    """Evaluation."""

    every_epochs: int = setting(1, "Interval of evaluations.", unit="epochs", least=1)
    before_training: bool = setting(True, "Evaluate the untouched model too, so that the gain is visible.")
    max_samples: Optional[int] = setting(500, "Images per evaluation. null: the whole split.", unit="images", least=1)
    batch_size: int = setting(8, "Most images per rank that generate together.", unit="images", least=1)
    max_new_tokens: Optional[int] = setting(
        None, "Longest answer. null: the longest true answer and a quarter more.", unit="tokens", least=1
    )
    gather: str = setting(
        "auto",
        "How ZeRO-3 parameters are gathered: `once` for the whole evaluation, `layerwise` at every token, or `auto`: "
        "once if the model fits into 60 % of the free memory of every GPU.",
        choices=GATHERS,
    )
    decoding: str = setting(
        "free",
        '`free`, or `grammar`: answers about boxes are restricted to well-formed boxes or "not found".',
        choices=DECODINGS,
    )
    min_boxes: int = setting(
        0,
        'With grammar decoding, at least this many boxes in every such answer. 0 allows "not found".',
        unit="boxes",
        least=0,
    )
    min_confidence: Optional[float] = setting(
        None,
        "With tiles, every box from this confidence on counts. null: which ones do is chosen where the validation data "
        "has the highest F1, and kept with the checkpoint, for launch/evaluate.py and launch/predict.py.",
        least=0,
        most=1,
    )
    num_pictures: int = setting(8, "Images that are drawn every time, always the same.", least=0)
    protocol: str = setting(
        "ours",
        "How answers are read and scored: `ours`, or as others do: "
        + ", ".join(f"`{name}`" for name in PROTOCOLS[1:])
        + " (docs/metrics.md).",
        choices=PROTOCOLS,
    )
    probe: Optional[str] = setting(
        None,
        'JSONL of general questions that show forgetting: `{"image": ..., "prompt": ..., "answer": ...}`. Without an '
        "answer, that of the untouched model is the reference.",
        is_path=True,
    )


@dataclass
class CheckpointConfig:
    """Checkpoints."""

    every_steps: Optional[int] = setting(
        None, "Save every this many steps, besides the end of every epoch.", unit="steps", least=1
    )
    keep_last: int = setting(2, "Newest checkpoints to keep, besides the best.", least=1)
    keep_every_steps: Optional[int] = setting(
        None, "Also keep permanently the first checkpoint of every this many steps.", unit="steps", least=1
    )
    background: bool = setting(
        True, "Continue training while a checkpoint is written. Needs 12 bytes of host memory per parameter."
    )
    on_error: str = setting(
        "stop",
        "What a full disk does to the run: `stop` or `continue`. Earlier checkpoints stay in either case.",
        choices=ON_ERRORS,
    )


@dataclass
class TrackingConfig:
    """Weights & Biases and TensorBoard, beside metrics.jsonl."""

    mode: str = setting(
        "auto", "`online`, `offline`, `disabled`, or `auto`: online with an API key, else offline.", choices=WANDB_MODES
    )
    project: str = setting("cogvlm-grounding", "W&B project.")
    entity: Optional[str] = setting(None, "W&B entity. null: your default.")
    name: Optional[str] = setting(None, "Name of the run. null: W&B chooses one.")
    tensorboard: bool = setting(
        False, "Also write TensorBoard files to `output_dir`/tensorboard; needs the extra `tensorboard`."
    )


@dataclass
class Config:
    """A run."""

    output_dir: str = setting(MISSING, "Folder of the run: checkpoints, metrics, evaluations, report.", is_path=True)
    seed: int = setting(0, "Seed of the data order, wording, augmentation and dropout.", least=0, most=2**63 - 1)
    resume: bool = setting(True, "Continue from the newest checkpoint in output_dir, if there is one.")
    deepspeed: str = setting(
        "zero3", "DeepSpeed JSON: the name of a preset in `configs/deepspeed/`, or a path.", is_path=True
    )
    plan: str = setting(
        "refuse",
        "What to do with a run that cannot fit into memory (`launch/plan.py`): `refuse` to start, `warn` or `ignore`.",
        choices=PLANS,
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    @property
    def output_path(self) -> Path:
        """`output_dir` with the home folder in place of `~`."""
        return Path(self.output_dir).expanduser()
