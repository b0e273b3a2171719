"""Estimate the memory of an evaluation: during training, and of launch/evaluate.py, which has weights only."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cogvlm_ft.model.generation_memory import GenerationMemory, Pass
from cogvlm_ft.planning.activations import MicroBatchShape
from cogvlm_ft.runtime.param_gathering import FREE_FRACTION
from cogvlm_ft.settings import EvaluateConfig


@dataclass(frozen=True)
class Holding:
    """What a rank holds while it evaluates, in bytes.

    free: of its memory, for everything below. whole: all weights. layerwise: of gathered layers. gathers: whether the
    weights are partitioned.
    """

    free: int
    whole: int
    layerwise: int
    gathers: bool


def gathers_once(settings: EvaluateConfig, holding: Holding) -> bool:
    """Return whether the weights are gathered once for the whole evaluation, as runtime/param_gathering.py decides."""
    fits = holding.whole <= FREE_FRACTION * holding.free
    return holding.gathers and (settings.gather == "once" or (settings.gather == "auto" and fits))


def plan_passes(
    memory: GenerationMemory, settings: EvaluateConfig, sequences: MicroBatchShape, holding: Holding
) -> tuple[Pass, dict[str, int]]:
    """Return the pass that an evaluation chooses, and its bytes by kind without the current layer."""
    once = gathers_once(settings, holding)
    batch_size = min(settings.batch_size, settings.max_samples or settings.batch_size)
    turns = [sequences.asked_turns or sequences.turns] * batch_size
    size = memory.choose_pass(turns, batch_size, holding.free - (holding.whole if once else 0))
    kinds = {"all weights": holding.whole} if once else {"gathered layers": holding.layerwise}
    return size, kinds | {"keys and values": memory.cache_bytes(size)}


def asked_pass(sequences: MicroBatchShape, size: Pass, prompt_tokens: int) -> MicroBatchShape:
    """Return the shape of the first pass over images and prompts."""
    return replace(
        sequences,
        num_images=size.num_images,
        turns=size.num_turns,
        turn_tokens=prompt_tokens,
        labelled_tokens=1,
        asked_turns=None,
    )
