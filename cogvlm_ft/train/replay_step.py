"""Runs the samples of a skipped step again, one by one in one process, to find the one that is not finite."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import initialization

from cogvlm_ft.build import build_dataset, split_index
from cogvlm_ft.checkpoints.checkpoint import MODEL_FOLDER, list_checkpoints, read_state
from cogvlm_ft.checkpoints.consolidate import open_weights
from cogvlm_ft.config import load_config
from cogvlm_ft.data.collate import Example, collate
from cogvlm_ft.data.loader import GroundingDataset, Item
from cogvlm_ft.data.reader import open_split
from cogvlm_ft.grounding.wording import load_wording
from cogvlm_ft.model import CogVLMForCausalLM, CogVLMTokenizer, enable_gradient_checkpointing, load_model
from cogvlm_ft.model import load_config as load_model_config
from cogvlm_ft.model.cogvlm import IGNORE_INDEX
from cogvlm_ft.model.loading import check_keys, parameter_shapes, read_whole
from cogvlm_ft.model.preprocess import MEAN, STD
from cogvlm_ft.run_folder import RunFolder
from cogvlm_ft.runtime.distributed import device
from cogvlm_ft.runtime.trained_parameters import freeze
from cogvlm_ft.settings import Config
from cogvlm_ft.train.skipped_steps import Row, SkippedStep


@dataclass(frozen=True)
class Replayed:
    """The result of one sample.

    row: what was recorded. key: as read now. loss: per labelled token. grad_norm: of that loss, over all trained
    parameters. turns: (prompt, answer) as the model reads them. picture: file of the image as the model sees it.
    """

    row: Row
    key: str
    loss: float
    grad_norm: float
    turns: list[tuple[str, str]]
    picture: Path

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass(frozen=True)
class Replay:
    """A model and the samples to run. weights: where they come from."""

    weights: Path
    model: CogVLMForCausalLM
    dataset: GroundingDataset
    tokenizer: CogVLMTokenizer
    step: SkippedStep
    out: Path

    def run(self) -> Iterator[Replayed]:
        """Yield the result of each sample, read with the epoch, wording and augmentation of the step."""
        self.out.mkdir(parents=True, exist_ok=True)
        for number, row in enumerate(self.step.rows):
            example = self.dataset[Item(row.epoch, row.index, row.weight)]
            loss, grad_norm = run_sample(self.model, example)
            picture = self.out / f"{number:03d}-{example.key.replace('/', '-')}.png"
            to_image(example.pixel_values).save(picture)
            yield Replayed(row, example.key, loss, grad_norm, turns_of_example(example, self.tokenizer), picture)


def open_replay(file: Path, model_folder: Path | None = None, out: Path | None = None) -> Replay:
    """Open a file in the nonfinite/ folder of a run, with the run's settings and newest checkpoint before that step.

    model_folder: weights to use instead. Without a checkpoint, the model that the run started with.
    """
    step = SkippedStep.load(file)
    run_folder = RunFolder.containing(file)
    config = load_config(run_folder.config)
    weights = model_folder or weights_before(run_folder, step.step) or config.model.folder
    model = load_weights_of(weights, config)
    files = weights / MODEL_FOLDER if (weights / MODEL_FOLDER).is_dir() else weights
    tokenizer = CogVLMTokenizer.from_folder(files)
    data = config.data
    index = open_split(config, data.train_split).index
    wording = load_wording(data.wording)
    parts = split_index(index, wording, config)
    dataset = build_dataset(config, index, wording, parts, tokenizer, model.config)
    return Replay(weights, model, dataset, tokenizer, step, out or file.with_suffix(""))


def weights_before(run_folder: RunFolder, step: int) -> Path | None:
    """Return the newest checkpoint that the step may have started from, or None."""
    found = [path for path in list_checkpoints(run_folder.checkpoints) if read_state(path).step < step]
    return found[-1] if found else None


def load_weights_of(source: Path, config: Config) -> CogVLMForCausalLM:
    """Load a checkpoint or a model folder in the precision and set-up of the training run."""
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    if (source / MODEL_FOLDER).is_dir():
        model = load_checkpoint_model(source, dtype)
    else:
        model = load_model(source, config.model.image_size, dtype, config.data.resize)
    freeze(model, config)
    enable_gradient_checkpointing(model, config.model.gradient_checkpointing)
    nn.Module.to(model, device())
    return model.train()


def load_checkpoint_model(checkpoint: Path, dtype: torch.dtype) -> CogVLMForCausalLM:
    """Load a whole checkpoint into this process, tensor by tensor; CheckpointError if it is not intact."""
    weights = open_weights(checkpoint)
    with initialization.no_init_weights():
        model = CogVLMForCausalLM(load_model_config(checkpoint / MODEL_FOLDER))
    nn.Module.to(model, dtype)
    parameters = list(model.named_parameters())
    check_keys(checkpoint, parameter_shapes(parameters), {name: tuple(w.shape) for name, w in weights.items()})
    for name, parameter in parameters:
        parameter.data.copy_(read_whole(weights[name], dtype))
    return model


def run_sample(model: CogVLMForCausalLM, example: Example) -> tuple[float, float]:
    """Return (loss per token, norm of its gradient) of one sample; gradients are freed as they are computed."""
    batch = collate([example]).to(device())
    squares: list[Tensor] = []

    def take(parameter: Tensor) -> None:
        assert parameter.grad is not None
        squares.append(parameter.grad.double().square().sum())
        parameter.grad = None

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(take) for parameter in trained]
    try:
        loss = model(
            input_ids=batch.input_ids,
            pixel_values=batch.pixel_values,
            position_ids=batch.position_ids,
            block_ids=batch.block_ids,
            labels=batch.labels,
            return_logits=False,
        ).loss
        loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    return loss.item(), torch.stack(squares).sum().sqrt().item()


def turns_of_example(example: Example, tokenizer: CogVLMTokenizer) -> list[tuple[str, str]]:
    """Decode the (prompt, answer) texts from the ids that the model reads."""
    ids, labels, blocks = example.sequences.input_ids, example.sequences.labels, example.sequences.block_ids
    turns = []
    for block in range(1, int(blocks.max()) + 1):
        is_answer = (blocks == block) & (labels != IGNORE_INDEX)
        is_prompt = (blocks == block) & (labels == IGNORE_INDEX)
        turns.append((tokenizer.decode(ids[is_prompt].tolist()), tokenizer.decode(ids[is_answer].tolist())))
    return turns


def to_image(pixels: Tensor) -> Image.Image:
    """Convert float32[3, S, S] back to the image it was before normalisation."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    values = (pixels * std + mean).mul(255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).numpy())
