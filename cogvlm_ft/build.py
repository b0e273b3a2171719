"""The composition root: builds the objects of a run from its config."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import initialization

from cogvlm_ft.checkpoints.adapters import AdapterRecord
from cogvlm_ft.checkpoints.checkpoint import TrainState
from cogvlm_ft.checkpoints.choice import is_checkpoint, model_files
from cogvlm_ft.checkpoints.consolidate import assign_merged, assign_weights
from cogvlm_ft.checkpoints.peft_files import open_peft_adapter, put_into
from cogvlm_ft.config import save_settings, written_settings
from cogvlm_ft.data.augment import draft_side
from cogvlm_ft.data.index import ShardIndex
from cogvlm_ft.data.loader import GroundingDataset, most_turns_of
from cogvlm_ft.data.plan import PhotoParts, SamplePlan, plan_samples, split_photos
from cogvlm_ft.data.reader import ShardReader, open_split
from cogvlm_ft.data.tiling import plan_tiles
from cogvlm_ft.errors import CheckpointError, ConfigError
from cogvlm_ft.grounding.wording import WORDING_FILE, Wording, load_wording, save_wording
from cogvlm_ft.model import (
    CogVLMConfig,
    CogVLMForCausalLM,
    CogVLMTokenizer,
    enable_gradient_checkpointing,
    load_config,
    model_config_of,
)
from cogvlm_ft.model.adapters import FULL, add_adapters, of_base
from cogvlm_ft.model.box_loss import build_box_loss
from cogvlm_ft.model.elementwise import compile_elementwise
from cogvlm_ft.model.loading import (
    Assign,
    allocate_model,
    load_weights,
    parameter_shapes,
    read_remote_code,
    whole_assign,
)
from cogvlm_ft.model.quantized import WEIGHT_FORMAT, float_shapes, quantizing_assign, stored_tensors
from cogvlm_ft.run_folder import RunFolder
from cogvlm_ft.runtime.distributed import (
    check_gpus,
    computed_by_main,
    device,
    first_devices,
    is_main,
    shared_errors,
    world_size,
)
from cogvlm_ft.runtime.engine import (
    build_engine,
    build_inference_engine,
    deepspeed_settings,
    inference_settings,
    partition_assign,
    partitioned,
)
from cogvlm_ft.runtime.tf32 import allow_tf32
from cogvlm_ft.settings import Config, TrainConfig
from cogvlm_ft.tracking.provenance import without_passwords

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """The objects of a training run. `dataset` reads training samples, `val_reader` held-out ones.

    remote_code: the *.py files of the model folder, by name. adapters: None where the model itself is trained.
    """

    config: Config
    engine: Any
    tokenizer: CogVLMTokenizer
    dataset: GroundingDataset
    val_reader: ShardReader
    plan: SamplePlan
    folder: RunFolder
    remote_code: dict[str, bytes]
    adapters: AdapterRecord | None = None

    @property
    def model(self) -> Any:
        """The CogVLMForCausalLM inside the engine."""
        return self.engine.module

    def last_step(self, state: TrainState) -> int:
        """Return the step with which the run ends, if it continues from `state` with this global batch size."""
        return last_step_of(self.plan, self.config.train, state)

    def is_finished(self, state: TrainState) -> bool:
        """Return whether the run has reached its last epoch's end, or `train.max_steps`."""
        return state.step >= self.last_step(state)

    def schedule_position(self, state: TrainState) -> tuple[float, int]:
        """Return (steps done, steps of the run) for the learning rate, by the samples consumed.

        The numbers are those of a run that always had this global batch size. Where `train.max_steps` ends the run, it
        is that many steps of any size.
        """
        train, max_steps = self.config.train, self.config.train.max_steps
        if max_steps and state.step + self.plan.steps_left(state.samples_consumed, train.epochs) > max_steps:
            return state.step, max_steps
        return self.plan.steps_done(state.samples_consumed), train.epochs * self.plan.steps_per_epoch

    def epochs_done(self, state: TrainState) -> float:
        """Return the epochs before a state, with the fraction of the current one."""
        return state.samples_consumed / self.plan.num_samples

    def save_settings(self) -> None:
        """Write config.yaml without passwords, because others may read the run folder. Rank 0 only."""
        self.folder.path.mkdir(parents=True, exist_ok=True)
        save_settings(without_passwords(written_settings(self.config)), self.folder.config)

    def save_model_files(self, folder: Path) -> None:
        """Write config.json, tokenizer, and what else an export needs besides the weights.

        Nothing is read from model.path, which may be gone by now.
        """
        self.model.config.architectures = [type(self.model).__name__]
        self.model.config.save_pretrained(folder)
        self.model.generation_config.save_pretrained(folder)
        self.tokenizer.save(folder)
        save_wording(self.dataset.wording, folder / WORDING_FILE)
        for name, content in self.remote_code.items():
            (folder / name).write_bytes(content)
        if self.adapters:
            self.adapters.save(folder)


@dataclass(frozen=True)
class TrainingData:
    """The training samples of a run and their order, which need no model."""

    index: ShardIndex
    wording: Wording
    parts: PhotoParts | None
    plan: SamplePlan


def last_step_of(plan: SamplePlan, train: TrainConfig, state: TrainState) -> int:
    """Return the step with which a run ends, if it continues from `state` in the order of `plan`."""
    last_step = state.step + plan.steps_left(state.samples_consumed, train.epochs)
    return min(last_step, train.max_steps or last_step)


def build_run(config: Config, val_reader: ShardReader | None = None, data: TrainingData | None = None) -> Run:
    """Build everything; data and wording first, so that mistakes in them are reported before weights are loaded.

    val_reader, data: if they are open already. Collective.
    """
    val_reader = open_split(config, config.data.val_split) if val_reader is None else val_reader
    data = open_training_data(config, val_reader) if data is None else data
    engine, tokenizer = build_model_engine(config)
    dataset = build_dataset(config, data.index, data.wording, data.parts, tokenizer, engine.module.config)
    remote_code = read_remote_code(config.model.folder)
    folder, adapters = RunFolder(config.output_path), None
    if config.adapter.rank:
        adapters = computed_by_main(lambda: AdapterRecord.of_run(config.model.folder, config.adapter))
    return Run(config, engine, tokenizer, dataset, val_reader, data.plan, folder, remote_code, adapters)


def open_training_data(config: Config, val_reader: ShardReader) -> TrainingData:
    """Open the training split, and plan its order. Collective. Raises DataError and ConfigError."""
    with shared_errors():
        train_index = open_split(config, config.data.train_split).index
        wording = load_wording(config.data.wording)
    if config.data.val_shards is not None:
        _report_shared_shards(train_index, val_reader.index)
    parts = split_index(train_index, wording, config)
    if parts is not None:  # a position in these sequences means nothing in others
        train_index = replace(train_index, data_sha256=f"{train_index.data_sha256}-{parts.sha256}")
    plan = plan_samples(
        train_index.source_sizes if parts is None else parts.source_sizes(train_index.source_sizes),
        train_index.source_weights,
        global_batch_size=config.train.global_batch_size,
        seed=config.seed,
    )
    return TrainingData(train_index, wording, parts, plan)


def _report_shared_shards(train: ShardIndex, val: ShardIndex) -> None:
    shared = [str(path) for path in val.shard_paths if path in set(train.shard_paths)]
    if shared and is_main():
        logger.warning(
            "data.val_shards: %d of %d tars are in data.shards too, such as %s; expected none: the model is trained on "
            "what it is evaluated on",
            len(shared),
            len(val.shard_paths),
            shared[0],
        )


def build_dataset(
    config: Config,
    index: ShardIndex,
    wording: Wording,
    parts: PhotoParts | None,
    tokenizer: CogVLMTokenizer,
    model_config: CogVLMConfig,
) -> GroundingDataset:
    """Build the dataset of training samples as the model sees them."""
    return GroundingDataset(
        reader=ShardReader(index, draft_side=draft_side(config.data, model_config.image_size)),
        wording=wording,
        tokenizer=tokenizer,
        config=model_config,
        seed=config.seed,
        max_sequence_length=config.data.max_sequence_length,
        augment=config.data.augment,
        parts=parts,
        tiles=config.data.tiles,
    )


def split_index(index: ShardIndex, wording: Wording, config: Config) -> PhotoParts | None:
    """Return which images are split into several sequences or shown in tiles, or None if no image is. Collective."""
    max_turns, tiles = config.data.max_turns_per_image, config.data.tiles
    if tiles.side_px is not None:
        return computed_by_main(lambda: plan_tiles(ShardReader(index), wording, tiles, max_turns, config.seed))
    if max_turns is None:
        return None
    most_turns = computed_by_main(lambda: most_turns_of(ShardReader(index), wording))
    parts = split_photos(most_turns, max_turns)
    return parts if len(parts) > len(index) else None


def build_model_engine(config: Config) -> tuple[Any, CogVLMTokenizer]:
    """Load the model folder into a ZeRO-3 engine; each rank reads only the slices it owns. Collective."""
    settings = deepspeed_settings(config)
    model_config = model_config_of(config)
    tokenizer = load_tokenizer(config.model.folder, model_config)
    box_loss = build_box_loss(config.train, tokenizer)
    if config.adapter.base:
        model = load_quantized_base(config, model_config)
    else:
        with initialization.no_init_weights(), partitioned(settings):
            model = CogVLMForCausalLM(model_config)
        parameters = list(model.named_parameters())
        load_weights(config.model.folder, parameter_shapes(parameters), partition_assign(parameters))
    if config.adapter.rank:
        add_adapters(model, config.adapter, config.seed)
        if config.adapter.start:
            start_adapters(model, config)
    enable_gradient_checkpointing(model, config.model.gradient_checkpointing)
    model.box_loss = box_loss
    if config.model.compile:
        compile_elementwise()
    return build_engine(model, config, settings), tokenizer


def load_quantized_base(config: Config, model_config: CogVLMConfig) -> CogVLMForCausalLM:
    """Load the model under the adapters, its linear layers quantised while they are read; parts in full stay floats.

    On this rank's device, never whole before it is quantised. The engine takes over its parameters later.
    """
    kept = [FULL[part] for part in config.adapter.full]
    model = allocate_model(model_config, dtype_of(config), [device()], config.adapter.base, kept)
    load_weights(config.model.folder, float_shapes(model), quantizing_assign(model))
    return model.train()


def dtype_of(config: Config) -> torch.dtype:
    """Return the dtype of the weights in passes of a run."""
    return torch.bfloat16 if config.train.precision == "bf16" else torch.float32


def start_adapters(model: CogVLMForCausalLM, config: Config) -> None:
    """Overwrite new adapters by those in the folder `adapter.start`. Raises CheckpointError if they do not fit."""
    folder, parameters = Path(config.adapter.start or "").expanduser(), list(model.named_parameters())
    is_whole = config.adapter.base is not None
    shapes = float_shapes(model) if is_whole else parameter_shapes(parameters)
    adapter = open_peft_adapter(folder, config.model.folder, of_base(shapes.items()))
    put_into(model, adapter, config.adapter, (whole_assign if is_whole else partition_assign)(parameters))


def load_tokenizer(folder: Path, model_config: CogVLMConfig) -> CogVLMTokenizer:
    """Load the tokenizer of a model folder; CheckpointError if its number of pieces is not the model's vocab_size."""
    tokenizer = CogVLMTokenizer.from_folder(folder)
    if len(tokenizer) != model_config.vocab_size:
        raise CheckpointError(
            f"{folder}: tokenizer.model has {len(tokenizer)} pieces, config.json says vocab_size="
            f"{model_config.vocab_size}; take both from the same model"
        )
    return tokenizer


def load_whole_model(
    weights: Path,
    dtype: torch.dtype,
    image_size: int | None = None,
    resize: str | None = None,
    quantized: str | None = None,
    adapter: Path | None = None,
    num_devices: int = 1,
) -> CogVLMForCausalLM:
    """Load a model folder, or the weights of a checkpoint, onto this rank's device for passes without gradients.

    quantized: "int8" or "int4": linear layers are quantised tensor by tensor while they are read. A folder that was
    exported so is loaded as it is. adapter: a folder in the files of peft, merged while the weights are read.
    num_devices: GPUs over which the layers are split. Raises ConfigError where there are fewer, or torch does not see
    the machine's.
    """
    check_gpus()
    config = load_config(model_files(weights), image_size, resize)
    stored = getattr(config, WEIGHT_FORMAT, None)
    if stored not in (None, quantized) and quantized is not None:
        raise ConfigError(f"--weights {quantized}: {weights} has {stored} weights. Omit --weights")
    if stored and adapter is not None:
        raise ConfigError(
            f"--adapter: {weights} has {stored} weights; expected floats to merge it into. launch/serve.py puts "
            "adapters beside quantised weights"
        )
    model = allocate_model(config, dtype, first_devices(num_devices), stored or quantized)
    tensors = stored_tensors(model) if stored else dict(model.named_parameters())
    shapes = parameter_shapes(tensors.items())
    assign = whole_assign(tensors.items())
    if quantized and not stored:
        shapes, assign = float_shapes(model), quantizing_assign(model)
    if adapter is None:
        _read_weights(weights, shapes, assign)
    else:
        assign_merged(adapter, weights, config, shapes, assign)
    return model


def build_scored_model(
    config: Config, weights: Path, quantized: str | None = None, num_devices: int = 1
) -> tuple[Any, CogVLMTokenizer]:
    """Load a model folder or the weights of a checkpoint for passes without gradients. Collective.

    2 or 4 bytes per parameter: on a single rank a plain module; on several, or with offloaded parameters, an engine
    that partitions them. A checkpoint has its own config.json and tokenizer, so that model.path may be gone.
    quantized, num_devices: as in `load_whole_model`, on a single rank only.
    """
    files, image_size, resize = model_files(weights), config.model.image_size, config.data.resize
    model_config = load_config(files, image_size, resize)
    tokenizer = load_tokenizer(files, model_config)
    allow_tf32(config.train.tf32)
    settings = inference_settings(config)
    if world_size() == 1 and settings["zero_optimization"].get("offload_param", {}).get("device", "none") == "none":
        dtype = dtype_of(config)
        return load_whole_model(weights, dtype, image_size, resize, quantized, num_devices=num_devices), tokenizer
    if quantized or num_devices > 1:
        option = f"--weights {quantized}" if quantized else f"--devices {num_devices}"
        raise ConfigError(
            f"{option}: found {world_size()} ranks or offloaded parameters; expected one process. Start it "
            "with python instead of deepspeed, without offload_param"
        )
    with initialization.no_init_weights(), partitioned(settings):
        model = CogVLMForCausalLM(model_config)
    parameters = list(model.named_parameters())
    _read_weights(weights, parameter_shapes(parameters), partition_assign(parameters))
    return build_inference_engine(model, settings).module, tokenizer


def _read_weights(weights: Path, shapes: dict[str, tuple[int, ...]], assign: Assign) -> None:
    (assign_weights if is_checkpoint(weights) else load_weights)(weights, shapes, assign)
