"""Score blends of a checkpoint with the model it started from, on validation images and on the probe."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from cogvlm_ft.build import load_tokenizer
from cogvlm_ft.checkpoints.adapters import HeldTensor
from cogvlm_ft.checkpoints.choice import model_files
from cogvlm_ft.checkpoints.model_folder import open_contents
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.errors import ConfigError
from cogvlm_ft.evaluate.evaluate import evaluate
from cogvlm_ft.evaluate.monitor import monitor_value
from cogvlm_ft.evaluate.probe import ask_probe, load_probe, probe_metrics
from cogvlm_ft.export.blend import BlendedTensor, pair_with_start
from cogvlm_ft.grounding.metrics import is_lower_better
from cogvlm_ft.grounding.wording import Wording
from cogvlm_ft.model.loading import Weight, allocate_model, load_config, read_whole
from cogvlm_ft.plain_files import write_text
from cogvlm_ft.runtime.distributed import device, every_rank, world_size
from cogvlm_ft.runtime.tf32 import allow_tf32
from cogvlm_ft.settings import Config

FRACTIONS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
PROBE = "probe_chrf"
HELD_FRACTION = 0.8  # of the free host memory, for both models in fp32

Pairs = Mapping[str, tuple[Weight, Weight]]


@dataclass(frozen=True)
class BlendScore:
    """What a blend scored. fraction: of the checkpoint in it; 0 is the model at the start."""

    fraction: float
    metrics: dict[str, float]


def score_blends(
    config: Config,
    checkpoint: Path,
    start: Path,
    reader: ShardReader,
    wording: Wording,
    fractions: Sequence[float] = FRACTIONS,
) -> list[BlendScore]:
    """Score blends on validation images and on `evaluate.probe`, if it is set. Collective.

    Every rank holds the whole model and asks its part of the questions. The weights of both models are read once, if
    they fit into host memory, and blended in place. A question of the probe without an answer is compared with what the
    model at the start answers.
    """
    files = model_files(checkpoint)
    model_config = load_config(files, config.model.image_size, config.data.resize)
    tokenizer = load_tokenizer(files, model_config)
    allow_tf32(config.train.tf32)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    model = allocate_model(model_config, dtype, [device()])
    pairs = held(pair_with_start(open_contents(checkpoint), start))
    questions = [] if config.evaluate.probe is None else load_probe(Path(config.evaluate.probe).expanduser())
    untouched: list[str] = []
    if questions and 0.0 not in fractions:
        fractions = [0.0, *fractions]
    scores = []
    for fraction in sorted(fractions):
        set_blend(model, pairs, fraction)
        found = evaluate(model, tokenizer, reader, wording, config.evaluate, seed=config.seed, tiles=config.data.tiles)
        metrics = dict(found.metrics)
        if questions:
            answers = ask_probe(model, tokenizer, questions, config.evaluate)
            untouched = untouched or answers
            metrics |= probe_metrics(questions, answers, untouched)
        scores.append(BlendScore(fraction, metrics))
    return scores


def held(pairs: Pairs) -> Pairs:
    """Read both models into memory if they fit on every rank; else they stay in their files. Collective."""
    needed = sum(4 * weight.shape.numel() for pair in pairs.values() for weight in pair)
    free = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    if not every_rank(needed < HELD_FRACTION * free):
        return pairs
    return {
        name: (HeldTensor(read_whole(before, torch.float32)), HeldTensor(read_whole(after, torch.float32)))
        for name, (before, after) in pairs.items()
    }


def set_blend(model: nn.Module, pairs: Pairs, fraction: float) -> None:
    """Overwrite the parameters of a whole model by a blend, computed in fp32 as an export does it."""
    for name, parameter in model.named_parameters():
        blend = BlendedTensor(*pairs[name], fraction)
        parameter.data.copy_(blend.read(0, parameter.numel()).reshape(parameter.shape))


def check_probe(config: Config, keep: float) -> None:
    """Raise ConfigError if what blends forget is to be limited, but no probe would measure it."""
    if keep and config.evaluate.probe is None:
        raise ConfigError(
            "evaluate.probe: found null; expected a JSONL of general questions, whose answers show what a blend "
            "forgets. Set evaluate.probe, or --keep 0 to choose by validation alone"
        )


def best_blend(scores: Sequence[BlendScore], monitor: Any, keep: float) -> BlendScore:
    """Return the blend with the best monitored value of those that keep that fraction of the start's probe score.

    scores: that of the start first. Raises ConfigError if no blend has a value.
    """
    least = keep * scores[0].metrics[PROBE] if keep else 0.0
    values = [(monitor_value(score.metrics, monitor), score) for score in scores]
    sign = -1 if isinstance(monitor, str) and is_lower_better(monitor) else 1
    known = [
        (sign * value, score)
        for value, score in values
        if value is not None and (keep == 0 or score.metrics[PROBE] >= least)
    ]
    if not known:
        raise ConfigError(f"train.monitor={monitor}: found no value of it in these answers; expected another metric")
    return max(known, key=lambda pair: (pair[0], -pair[1].fraction))[1]


def save_blends(scores: Sequence[BlendScore], path: Path) -> None:
    """Write the scores for the report, one entry per blend."""
    rows = [{"fraction": score.fraction, **score.metrics} for score in scores]
    write_text(path, json.dumps(rows, indent=1) + "\n")
