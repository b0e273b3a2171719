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
    """Model."""

    path: str = setting(
        MISSING,
        "Folder with `config.json`, `*.safetensors` and `tokenizer.model`, such as cogvlm-grounding-generalist. "
        "`tiny`: a random model of 2 million parameters for your shards, to try programs.",
        is_path=True,
    )
    image_size: Optional[int] = setting(
        None,
        "Side of the square input, a multiple of the patch size. Increase it for small targets. null: the model's own.",
        unit="px",
        least=1,
    )
    gradient_checkpointing: str = setting(
        "all",
        "Layers that are recomputed in the backward pass, which takes about 30 % more time and far less memory: "
        "`none`, `vision`, `language`, `all`, or a number n for every n-th layer.",
    )
    compile: bool = setting(False, "Compile each chain of elementwise operations into one kernel. No gain on CPU.")
    freeze: list[str] = setting([], 'Name patterns of parameters that are not trained, such as `["model.vision.*"]`.')

    @property
    def folder(self) -> Path:
        """`path` with the home folder in place of `~`."""
        return Path(self.path).expanduser()


@dataclass
class AugmentConfig:
    """Augmentation of training images. Off by default; useful for a few hundred images or fewer."""

    crop: float = setting(
        0.0,
        "Probability of showing only a part of the image, with every target whole. Enlarges small targets.",
        least=0,
        most=1,
    )
    min_crop: float = setting(
        0.5, "Minimum size of that part, as a fraction of the image's width and height.", least=0.05, most=1
    )
    flip: float = setting(
        0.0,
        "Probability of mirroring an image; never if a text mentions a side. Writing in the image is mirrored as well.",
        least=0,
        most=1,
    )
    brightness: float = setting(
        0.0, "Maximum change in both directions: 0.2 is a factor of 0.8 to 1.2.", least=0, most=1
    )
    contrast: float = setting(0.0, "The same for contrast.", least=0, most=1)
    saturation: float = setting(0.0, "The same for saturation.", least=0, most=1)
    hue: float = setting(
        0.0,
        "Maximum rotation of the colour circle in both directions; none if a text mentions a colour.",
        least=0,
        most=0.5,
    )


@dataclass
class DataConfig:
    """Data."""

    shards: Any = setting(
        MISSING,
        "Folder of shards, or tars: one, a list, `train-{000000..000003}.tar`, `*.tar`; on disk or at an "
        "`https://`, `s3://` or `gs://` address. To mix sources: `[{path: a, weight: 2.0}, {path: b, weight: 0.5}]`, "
        "where weight is how often each sample is used per epoch.",
        is_path=True,
    )
    val_shards: Any = setting(
        None, "Shards to evaluate on, in the same notation. null: the split `val_split` of `shards`.", is_path=True
    )
    cache_dir: Optional[str] = setting(
        None,
        "Local folder for copies of shards that cannot be read in place (compressed, or on a server without range "
        "requests), and for the results of scanning tars without `index.json`.",
        is_path=True,
    )
    cache_gib: float = setting(100.0, "Maximum size of that folder.", unit="GiB", least=0)
    retry_s: float = setting(
        600.0, "How long requests to a shard server are retried before the run ends.", unit="s", least=0
    )
    train_split: str = setting("train", "Split to train on.")
    val_split: str = setting("val", "Split to evaluate on.")
    wording: str = setting(
        "box",
        "Wording of questions and answers: `box`, `description`, `referring`, `detection`, `region`, `steps`, "
        "`conversation`, `mixed`, or a YAML file.",
        is_path=True,
    )
    max_sequence_length: int = setting(
        4096,
        "Maximum length of a sequence of an image with all its turns; longer samples count as unusable.",
        unit="tokens",
        least=1,
    )
    max_turns_per_image: Optional[int] = setting(
        None,
        "Maximum number of turns in one sequence. Further turns form further sequences with the same image, each of "
        "which counts as a sample. null: all turns in one sequence.",
        least=1,
    )
    num_workers: int = setting(2, "Loader processes per rank. 0: read in the training process.", least=0)
    max_bad_fraction: float = setting(
        0.01,
        "Maximum fraction of unusable samples per epoch; above it, the run stops. One is allowed unless this is 0.",
        least=0,
        most=1,
    )
    resize: Optional[str] = setting(
        None,
        "`squash` stretches the image to the square, as in CogVLM's training; `letterbox` keeps the aspect ratio, with "
        "grey borders. null: as the model was trained.",
        choices=RESIZES,
    )
    jpeg_draft: bool = setting(
        False,
        "Decode large training JPEGs at 1/2, 1/4 or 1/8 of their size, never below the input size. Faster; pixels "
        "differ slightly from those in evaluation.",
    )
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    tiles: TilesConfig = field(default_factory=TilesConfig)


@dataclass
class BoxLossConfig:
    """Box loss. A distance between boxes, in addition to the cross entropy of their digits."""

    weight: float = setting(0.0, "Factor of the distance. 0: cross entropy only.", least=0)
    kind: str = setting(
        BOX_LOSSES[0],
        "`expected`: absolute error of the expected coordinates, as a fraction of the image; `giou`: 1 - GIoU of the "
        "expected box.",
        choices=BOX_LOSSES,
    )


@dataclass
class TrainConfig:
    """Training."""

    epochs: int = setting(5, "Passes over the training data.", least=1)
    max_steps: Optional[int] = setting(
        None, "Stop after this many optimizer steps. null: no limit.", unit="steps", least=1
    )
    global_batch_size: int = setting(
        16, "Images per optimizer step, over all ranks; a multiple of ranks x micro_batch_size.", unit="images", least=1
    )
    micro_batch_size: int = setting(
        1, "Images per forward pass of one rank. Larger values are faster and need more memory.", unit="images", least=1
    )
    lr: float = setting(5e-5, "Peak learning rate.", least=0)
    lr_scale: dict[str, float] = setting(
        {},
        'Factors of the learning rate by name pattern, such as `{"model.vision.*": 0.1, "lm_head.*": 0.0}`. The last '
        "match applies; 0 freezes.",
        least=0,
    )
    vision_layer_decay: float = setting(
        1.0,
        "Factor of the learning rate from each layer of the vision tower to the one below. 1: the same in all layers.",
        above=0,
        most=1,
    )
    box_loss: BoxLossConfig = field(default_factory=BoxLossConfig)
    digit_weights: list[float] = setting(
        [1.0] * NUM_DIGITS,
        "Factors of the cross entropy of a coordinate's hundreds, tens and units digits, such as `[4, 2, 1]`, scaled "
        "to a mean of 1.",
        above=0,
        length=NUM_DIGITS,
    )
    min_lr_ratio: float = setting(
        0.1, "Learning rate at the end of the cosine decay, as a fraction of the peak.", least=0, most=1
    )
    warmup_fraction: float = setting(
        0.03, "Fraction of all steps in which the learning rate rises linearly.", least=0, most=1
    )
    weight_decay: float = setting(0.05, "AdamW's weight decay; not applied to norms and biases.", least=0)
    beta1: float = setting(0.9, "AdamW's beta 1.", least=0, below=1)
    beta2: float = setting(0.95, "AdamW's beta 2.", least=0, below=1)
    eps: float = setting(1e-8, "AdamW's epsilon.", above=0)
    max_grad_norm: float = setting(1.0, "Norm to which gradients are clipped. 0: no clipping.", least=0)
    ema: Optional[float] = setting(
        None,
        "Decay of a running average of the weights, such as 0.999. The average is also evaluated, and exported with "
        "`launch/export.py --weights-of ema`. null: none.",
        above=0,
        below=1,
    )
    precision: str = setting(
        "fp32", "`fp32`, or `bf16` with fp32 master weights and optimizer states.", choices=PRECISIONS
    )
    tf32: bool = setting(
        False, "Let CUDA round fp32 inputs of matrix products to 10 mantissa bits: several times faster, less precise."
    )
    monitor: Any = setting(
        "mean_iou",
        "Validation metric that selects the best checkpoint, or several with weights: "
        "`{mean_iou: 1.0, not_found_acc: 0.5}`. Whether higher or lower is better is known for each metric "
        "(docs/metrics.md).",
    )
    min_gain: float = setting(
        0.0, "A new best value must exceed the last one by more than this, in the unit of the monitor.", least=0
    )
    patience: Optional[int] = setting(
        3, "Stop after this many evaluations without a new best value. null: never.", unit="evaluations", least=1
    )
    log_every: int = setting(1, "Interval between log lines.", unit="steps", least=1)
    max_skipped_in_a_row: int = setting(
        3,
        "Steps with a loss or gradient that is not finite are skipped; this many in a row end the run.",
        unit="steps",
        least=1,
    )
    hang_timeout_s: Optional[float] = setting(
        1800.0,
        "If no rank makes progress for this long, the ranks write their stacks to `output_dir/stacks` and end the job. "
        "null: wait indefinitely.",
        unit="s",
        least=1,
    )


@dataclass
class EvaluateConfig:
    """Evaluation."""

    every_epochs: int = setting(1, "Interval between evaluations.", unit="epochs", least=1)
    before_training: bool = setting(True, "Also evaluate the model before training, to show the gain.")
    max_samples: Optional[int] = setting(500, "Images per evaluation. null: the whole split.", unit="images", least=1)
    batch_size: int = setting(
        8, "Maximum number of images per rank for which answers are generated together.", unit="images", least=1
    )
    max_new_tokens: Optional[int] = setting(
        None,
        "Maximum length of an answer. null: that of the longest true answer plus a quarter.",
        unit="tokens",
        least=1,
    )
    gather: str = setting(
        "auto",
        "How ZeRO-3 parameters are gathered: `once` for the whole evaluation, `layerwise` for every token, or `auto`: "
        "once if the model fits into 60 % of the free memory of every GPU, otherwise layerwise.",
        choices=GATHERS,
    )
    decoding: str = setting(
        "free",
        '`free`, or `grammar`: answers about boxes are restricted to well-formed boxes or "not found".',
        choices=DECODINGS,
    )
    min_boxes: int = setting(
        0,
        'With grammar decoding, minimum number of boxes in every such answer. 0 allows "not found".',
        unit="boxes",
        least=0,
    )
    min_confidence: Optional[float] = setting(
        None,
        "With tiles, every box with at least this confidence counts. null: the threshold with the highest F1 on the "
        "validation data, which is saved with the checkpoint (docs/metrics.md).",
        least=0,
        most=1,
    )
    num_pictures: int = setting(8, "Number of images drawn in every evaluation, always the same ones.", least=0)
    protocol: str = setting(
        "ours",
        "How answers are read and scored: `ours`, or as in other projects: "
        + ", ".join(f"`{name}`" for name in PROTOCOLS[1:])
        + " (docs/metrics.md).",
        choices=PROTOCOLS,
    )
    probe: Optional[str] = setting(
        None,
        'JSONL file of general questions that show forgetting: `{"image": ..., "prompt": ..., "answer": ...}`. Without '
        "an answer, that of the model before training is the reference.",
        is_path=True,
    )


@dataclass
class CheckpointConfig:
    """Checkpoints."""

    every_steps: Optional[int] = setting(
        None, "Interval between checkpoints, in addition to those at the end of every epoch.", unit="steps", least=1
    )
    keep_last: int = setting(2, "Number of newest checkpoints to keep, in addition to the best.", least=1)
    keep_every_steps: Optional[int] = setting(
        None, "Also keep the first checkpoint of each interval of this many steps permanently.", unit="steps", least=1
    )
    background: bool = setting(
        True, "Continue training while a checkpoint is written. Needs 12 bytes of host memory per parameter."
    )
    on_error: str = setting(
        "stop",
        "What the run does if a checkpoint cannot be saved, as on a full disk: `stop` or `continue`. Earlier "
        "checkpoints are kept in both cases.",
        choices=ON_ERRORS,
    )


@dataclass
class TrackingConfig:
    """Weights & Biases and TensorBoard."""

    mode: str = setting(
        "auto",
        "`online`, `offline`, `disabled`, or `auto`: online with an API key, otherwise offline.",
        choices=WANDB_MODES,
    )
    project: str = setting("cogvlm-grounding", "W&B project.")
    entity: Optional[str] = setting(None, "W&B entity. null: your default.")
    name: Optional[str] = setting(None, "Name of the run. null: W&B chooses one.")
    tensorboard: bool = setting(
        False, "Also write TensorBoard files to `output_dir`/tensorboard. Needs the extra `tensorboard`."
    )


@dataclass
class Config:
    """Run."""

    output_dir: str = setting(MISSING, "Folder of the run: checkpoints, metrics, evaluations, report.", is_path=True)
    seed: int = setting(0, "Seed of the data order, wording, augmentation and dropout.", least=0, most=2**63 - 1)
    resume: bool = setting(True, "Continue from the newest checkpoint in output_dir, if there is one.")
    deepspeed: str = setting(
        "zero3", "DeepSpeed JSON: the name of a preset in `configs/deepspeed/`, or a path.", is_path=True
    )
    plan: str = setting(
        "refuse",
        "What to do if the run cannot fit into memory (`launch/plan.py`): `refuse` to start it, `warn` or `ignore`.",
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
