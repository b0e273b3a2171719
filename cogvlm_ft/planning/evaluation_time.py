"""Estimate the time of an evaluation: one pass over the images and questions, then one small pass for every token."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from cogvlm_ft.planning.activations import MicroBatchShape
from cogvlm_ft.planning.data_turns import longest_answer, mean_looks
from cogvlm_ft.planning.memory import MemoryEstimate, Planner, element_bytes
from cogvlm_ft.planning.step_time import GIGA, Speeds, count_flops


@dataclass(frozen=True)
class EvaluationTime:
    """Estimate of one evaluation. A request to stop waits for the batch that is running.

    num_looks: images and tiles, on all GPUs together. num_batches: of each GPU.
    """

    num_looks: int
    num_batches: int
    batch_s: float

    @property
    def whole_s(self) -> float:
        return self.num_batches * self.batch_s


def time_evaluation(
    planner: Planner,
    estimate: MemoryEstimate,
    sequences: MicroBatchShape,
    speeds: Speeds,
    num_images: int | None = None,
) -> EvaluationTime:
    """Estimate an evaluation whose longest answers reach the limit. num_images: of the split, if it is known.

    Each pass needs all weights: from the GPU's memory if they are gathered once, else from the other ranks.
    """
    settings, cluster, element = planner.config.evaluate, planner.cluster, element_bytes(planner.config)
    together, turns = estimate.asked_together, sequences.asked_turns or sequences.turns
    asked = [number for number in (settings.max_samples, num_images) if number is not None]
    num_looks = math.ceil(min(asked, default=together.num_images * cluster.num_gpus) * mean_looks(planner.config))
    per_rank = -(-num_looks // cluster.num_gpus)
    batch_size = max(1, min(together.num_images, per_rank))
    num_passes = -(-turns // max(1, together.num_turns))
    forward, _ = count_flops(planner.model, replace(sequences, num_images=batch_size))
    gathered_bytes = estimate.gathered.total / 2 * element  # of a forward pass; a step gathers for backward too
    messages_s = gathered_bytes * (cluster.num_gpus - 1) / cluster.num_gpus / speeds.link_gb_s / GIGA
    if cluster.num_nodes > 1:
        between = gathered_bytes * (cluster.num_nodes - 1) / cluster.num_nodes
        messages_s = max(messages_s, between / speeds.network_gb_s / GIGA)
    weights_s = planner.num_parameters * element / speeds.gpu_gb_s / GIGA
    token_s = weights_s if "all weights" in estimate.evaluation else max(weights_s, messages_s)
    num_tokens = num_passes * longest_answer(planner.config, planner.model_config)
    batch_s = forward / (speeds.tflops * 1e12 * speeds.mfu) + num_tokens * token_s
    return EvaluationTime(num_looks=num_looks, num_batches=-(-per_rank // batch_size), batch_s=batch_s)
