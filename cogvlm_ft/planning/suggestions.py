"""Suggest changes when a run does not fit, and find the largest sizes that fit; each suggestion is estimated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from cogvlm_ft.adapter_settings import QUANTIZED_BASES
from cogvlm_ft.model.generation_memory import Pass
from cogvlm_ft.planning.activations import MicroBatchShape
from cogvlm_ft.planning.memory import FRAGMENTED_FRACTION, GIB, UNCERTAINTY, Planner, judge
from cogvlm_ft.settings import Config

LARGEST_IMAGE_PX, LARGEST_BATCH, MOST_NODES = 2240, 256, 64
FEW_TURNS = 4
OFFLOADS = ("zero3_offload_optimizer", "zero3_offload_all")


@dataclass(frozen=True)
class Limits:
    """Largest values that fit, each alone; 0: not even the smallest. evaluate_batch_size: without chunks of turns."""

    micro_batch_size: int
    image_size: int
    evaluate_batch_size: int


def find_limits(planner: Planner, sequences: MicroBatchShape) -> Limits:
    patch = planner.model_config.vision["patch_size"]

    def trains(shown: MicroBatchShape) -> bool:
        estimate = planner.estimate(shown, evaluation=False)
        return judge(estimate, planner.cluster, ("training",)).status == "fits"

    def evaluates(batch_size: int) -> bool:
        evaluate = replace(planner.config.evaluate, batch_size=batch_size)
        estimate = planner.changed(replace(planner.config, evaluate=evaluate)).estimate(sequences)
        fits = judge(estimate, planner.cluster, ("evaluation",)).status == "fits"
        return fits and estimate.asked_together == Pass(batch_size, sequences.asked_turns or sequences.turns)

    return Limits(
        micro_batch_size=_largest(lambda n: trains(replace(sequences, num_images=n)), LARGEST_BATCH),
        image_size=patch
        * _largest(lambda n: trains(replace(sequences, image_size=n * patch)), LARGEST_IMAGE_PX // patch),
        evaluate_batch_size=_largest(evaluates, LARGEST_BATCH),
    )


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest n up to `most` with fits(n), if fits is true up to some n; 0 if fits(1) is false."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def suggest_changes(planner: Planner, sequences: MicroBatchShape) -> list[str]:
    """Return changes each of which makes the run fit; if none does, all savings together if they do."""
    config, cluster = planner.config, planner.cluster
    savings = _savings(config, cluster.num_gpus)
    found = [text for text, change in savings if _fits(planner.changed(change), sequences)]
    for nodes in range(cluster.num_nodes + 1, 1 if config.adapter.base else MOST_NODES + 1):
        more = replace(cluster, num_nodes=nodes)
        if _fits(planner.changed(cluster=more), sequences):
            found.append(f"{more.num_gpus} GPUs ({nodes} nodes of {cluster.gpus_per_node})")
            break
    if not found:
        texts, changed = _all_savings(config, cluster.num_gpus)
        if texts and _fits(planner.changed(changed), sequences):
            found.append(" together with ".join(texts))
    return found


def cheaper_settings(planner: Planner, sequences: MicroBatchShape) -> list[tuple[str, int]]:
    """Return (setting, bytes at the peak with it) for each saving that helps, the best one first."""
    peak = max(planner.estimate(sequences).peaks.values())
    found = []
    for text, change in _savings(planner.config, planner.cluster.num_gpus):
        estimate = planner.changed(change).estimate(_shown(change, sequences))
        found.append((text, max(estimate.peaks.values())))
    return sorted([each for each in found if each[1] < peak], key=lambda each: each[1])


def _fits(planner: Planner, sequences: MicroBatchShape) -> bool:
    return judge(planner.estimate(_shown(planner.config, sequences)), planner.cluster).status == "fits"


def _shown(config: Config, sequences: MicroBatchShape) -> MicroBatchShape:
    """Return the passes of a run with this config."""
    turns = min(sequences.turns, config.data.max_turns_per_image or sequences.turns)
    return replace(sequences, num_images=config.train.micro_batch_size, turns=turns)


def fewest_gpus_to_score(planner: Planner, sequences: MicroBatchShape) -> int:
    """Return the fewest GPUs, up to those of the cluster, on which launch/evaluate.py fits; 0 if it does on none."""
    for num_gpus in range(1, planner.cluster.num_gpus + 1):
        cluster = replace(planner.cluster, num_nodes=1, gpus_per_node=num_gpus)
        if fits_to_score(planner.changed(cluster=cluster), sequences):
            return num_gpus
    return 0


def fits_to_score(planner: Planner, sequences: MicroBatchShape) -> bool:
    """Return whether the weights and 15 % more than the rest of launch/evaluate.py fit on a GPU."""
    kinds = planner.scoring(sequences)
    rest = sum(kinds.values()) - kinds["weights"]
    available = planner.cluster.gpu_gib * GIB * (1 - FRAGMENTED_FRACTION) - planner.cluster.reserved_bytes
    return kinds["weights"] + UNCERTAINTY * rest <= available


def _savings(config: Config, num_gpus: int) -> list[tuple[str, Config]]:
    """Return (setting, config with it) for each saving that is not in use yet."""
    train, evaluate, model = config.train, config.evaluate, config.model
    found = []
    if evaluate.batch_size > 1:
        small = replace(evaluate, batch_size=1)
        found.append(("evaluate.batch_size=1", replace(config, evaluate=small)))
    if train.micro_batch_size > 1:
        one = replace(train, micro_batch_size=1)
        found.append(("train.micro_batch_size=1", replace(config, train=one)))
    if (config.data.max_turns_per_image or FEW_TURNS + 1) > FEW_TURNS:
        few = replace(config.data, max_turns_per_image=FEW_TURNS)
        found.append((f"data.max_turns_per_image={FEW_TURNS}", replace(config, data=few)))
    if model.gradient_checkpointing not in ("all", "1"):
        everything = replace(model, gradient_checkpointing="all")
        found.append(("model.gradient_checkpointing=all", replace(config, model=everything)))
    if train.precision != "bf16":
        coarse = replace(train, precision="bf16")
        found.append(("train.precision=bf16", replace(config, train=coarse)))
    if config.adapter.rank and not config.adapter.base and num_gpus == 1:
        quantized = replace(config.adapter, base=QUANTIZED_BASES[0])
        found.append((f"adapter.base={quantized.base}", replace(config, adapter=quantized)))
    if config.adapter.base:
        return found
    for preset in OFFLOADS:
        if Path(config.deepspeed).stem != preset and "offload_all" not in config.deepspeed:
            found.append((f"deepspeed={preset}", replace(config, deepspeed=preset)))
    return found


def _all_savings(config: Config, num_gpus: int) -> tuple[list[str], Config]:
    """Return every saving, one after the other, and the config with all of them."""
    texts = []
    while rest := _savings(config, num_gpus):
        text, config = rest[0]
        texts.append(text)
    return texts, config
