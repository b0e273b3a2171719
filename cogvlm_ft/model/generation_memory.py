"""Memory of generation, and how many images and turns are asked in one pass so that it fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cogvlm_ft.model.configuration import CogVLMConfig

USABLE_FRACTION = 0.5
"""Fraction of free memory for keys, values and activations; gathered layers, kernels, fragmentation need the rest."""


@dataclass(frozen=True)
class Pass:
    """Most images of one pass, and most turns about each of them; further turns reuse the image's keys and values."""

    num_images: int
    num_turns: int


@dataclass(frozen=True)
class GenerationMemory:
    """Bytes that generation needs besides the weights.

    element_bytes: of a weight. prompt_tokens: of the longest prompt, its history included. max_new_tokens: of an
    answer.
    """

    config: CogVLMConfig
    element_bytes: int
    prompt_tokens: int
    max_new_tokens: int

    def cache_bytes(self, asked: Pass) -> int:
        """Return the bytes of all keys and values."""
        slots = self._prompt_length(asked) + asked.num_turns * (self.max_new_tokens - 1)
        width = self.config.hidden_size * self.config.num_hidden_layers
        return 2 * asked.num_images * slots * width * self.element_bytes

    def num_bytes(self, asked: Pass) -> int:
        """Return the bytes at the peak: keys and values, one layer at work, the mask and the logits."""
        config, length = self.config, self._prompt_length(asked)
        layer = 4 * (config.intermediate_size + config.hidden_size) * length * self.element_bytes
        mask = asked.num_turns * self.prompt_tokens * length * (1 + self.element_bytes)
        logits = 5 * 4 * asked.num_turns * config.vocab_size  # in float32: logits, masked, probabilities
        return self.cache_bytes(asked) + asked.num_images * (layer + mask + logits)

    def choose_pass(self, num_turns: Sequence[int], batch_size: int, num_free: int, num_ranks: int = 1) -> Pass:
        """Choose the pass that needs the fewest passes for all images and fits; one image with one turn if none fits.

        num_turns: of every image, in the order of the data; each rank takes every num_ranks-th image. num_free: bytes,
        the same on all ranks.
        """
        most, usable = max([1, *num_turns]), int(num_free * USABLE_FRACTION)
        best: tuple[int, Pass] | None = None
        num_images = batch_size
        while num_images:
            fitting = self._most_turns(num_images, most, usable)
            if fitting:
                size = num_images * num_ranks
                groups = [num_turns[start : start + size] for start in range(0, len(num_turns), size)]
                num_passes = sum(-(-max([1, *group]) // fitting) for group in groups)
                if best is None or num_passes < best[0]:
                    best = num_passes, Pass(num_images, fitting)
            num_images //= 2
        return best[1] if best else Pass(1, 1)

    def _most_turns(self, num_images: int, most: int, usable: int) -> int:
        """Return the largest number of turns up to `most` that fits; 0 if not even one does."""
        low, high = 0, most + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.num_bytes(Pass(num_images, middle)) <= usable else (low, middle)
        return low

    def _prompt_length(self, asked: Pass) -> int:
        return self.config.num_patches + 3 + asked.num_turns * self.prompt_tokens
