"""Which pass is chosen for the memory that is free, at the sizes of the 17B model."""

from __future__ import annotations

from cogvlm_ft.model import CogVLMConfig
from cogvlm_ft.model.generation_memory import USABLE_FRACTION, GenerationMemory, Pass

GIB = 2**30
MEMORY = GenerationMemory(CogVLMConfig(), 4, prompt_tokens=30, max_new_tokens=128)


def test_bytes_of_keys_and_values_by_hand() -> None:
    slots = 1228 + 60 * 30 + 60 * 127
    assert MEMORY.cache_bytes(Pass(8, 60)) == 8 * slots * 2 * 4096 * 32 * 4
    assert MEMORY.num_bytes(Pass(8, 60)) > 80 * GIB


def test_a_photo_with_60_turns_is_asked_in_chunks_that_fit() -> None:
    num_turns = [4] * 400 + [60] + [4] * 99
    chosen = MEMORY.choose_pass(num_turns, 8, 43 * GIB, num_ranks=8)
    assert MEMORY.num_bytes(chosen) <= 43 * GIB * USABLE_FRACTION
    assert chosen.num_images == 8 and 4 <= chosen.num_turns < 60, "the other images are asked together, as before"
    assert MEMORY.choose_pass([4] * 500, 8, 43 * GIB) == Pass(8, 4)
    assert MEMORY.choose_pass([60] * 500, 8, 400 * GIB) == Pass(8, 60)


def test_fewer_images_where_not_even_one_turn_of_each_fits() -> None:
    chosen = MEMORY.choose_pass([4] * 10, 8, 6 * GIB)
    assert chosen.num_images < 8 and MEMORY.num_bytes(chosen) <= 3 * GIB
    assert MEMORY.choose_pass([4] * 10, 8, 0) == MEMORY.choose_pass([], 8, 0) == Pass(1, 1)
