"""Count the floating point operations of training steps, for TFLOP/s and MFU.

Recomputation does not count, as is usual for MFU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cogvlm_ft.model import CogVLMConfig
from cogvlm_ft.planning.activations import MicroBatchShape
from cogvlm_ft.planning.memory import build_on_meta
from cogvlm_ft.planning.step_time import count_flops, number_format
from cogvlm_ft.runtime.distributed import device, world_size
from cogvlm_ft.settings import Config

BACKWARD = 2  # times the forward pass
# Dense TFLOP/s of the data sheets, SXM versions; the first name that is part of the GPU's.
PEAK_TFLOPS: dict[str, dict[str, float]] = {
    "B200": {"fp32": 75, "tf32": 1125, "bf16": 2250},
    "H200": {"fp32": 67, "tf32": 495, "bf16": 989},
    "H100": {"fp32": 67, "tf32": 495, "bf16": 989},
    "A100": {"fp32": 19.5, "tf32": 156, "bf16": 312},
    "L40S": {"fp32": 91.6, "tf32": 183, "bf16": 362},
}


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of a step, forward and backward, per image, text token, labelled token, and pair of attending tokens.

    prefix: tokens before the text. peak: FLOP/s of one GPU, None if not known.
    """

    image: float
    text_token: float
    labelled_token: float
    pair: float
    prefix: int
    peak: float | None

    def of(self, num_images: float, num_turns: float, num_tokens: float, num_target_tokens: float) -> float:
        """Return the FLOPs for these images and tokens, as if all turns were equally long."""
        text = max(0.0, num_tokens - num_images * self.prefix)
        pairs = text * self.prefix + text**2 / (2 * max(1.0, num_turns))
        parts = (self.image * num_images, self.text_token * text, self.labelled_token * num_target_tokens)
        return sum(parts) + self.pair * pairs

    def rates(self, flops: float, seconds: float) -> dict[str, float]:
        """Return TFLOP/s of one rank, and MFU if the peak is known."""
        per_rank = flops / seconds / world_size()
        return {"tflops": per_rank / 1e12} | ({"mfu": per_rank / self.peak} if self.peak else {})


def step_flops(config: Config, model_config: CogVLMConfig) -> StepFlops:
    """Derive the four costs from counts of the model's forward pass, which is a sum of them."""
    model = build_on_meta(config, model_config)

    def count(turn_tokens: int, labelled_tokens: int = 0) -> float:
        sequence = MicroBatchShape(num_images=1, turns=1, turn_tokens=turn_tokens, labelled_tokens=labelled_tokens)
        return (1 + BACKWARD) * count_flops(model, sequence)[0]

    prefix = model_config.num_patches + 3
    image, one, two = count(0), count(1), count(2)
    pair = two - 2 * one + image  # the pairs of one turn: t * prefix + t^2 / 2
    return StepFlops(
        image=image,
        text_token=one - image - pair * (prefix + 0.5),
        labelled_token=count(0, 1) - image,
        pair=pair,
        prefix=prefix,
        peak=_peak(number_format(config)),
    )


def _peak(number_format: str) -> float | None:
    if device().type != "cuda":
        return None
    name = torch.cuda.get_device_name()
    return next((peaks[number_format] * 1e12 for gpu, peaks in PEAK_TFLOPS.items() if gpu in name), None)
