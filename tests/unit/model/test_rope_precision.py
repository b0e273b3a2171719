"""Why the rotary angles are computed in float32 in a bfloat16 model too (docs/architecture.md)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cogvlm_ft.model.decoder import inverse_frequencies, rope_tables

HEAD_DIM = 128  # of the 17B model


def exact_cosines(num_positions: int) -> Tensor:
    exponents = torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM
    angles = torch.arange(num_positions, dtype=torch.float64)[:, None] * 10000.0**-exponents
    return torch.cat([angles, angles], dim=1).cos()


def rounded_cosines(num_positions: int) -> Tensor:
    """The published code in bfloat16: positions, frequencies and their product are rounded before the cosine."""
    frequencies = inverse_frequencies(HEAD_DIM).bfloat16()
    angles = torch.arange(num_positions).bfloat16()[:, None] * frequencies
    return torch.cat([angles, angles], dim=1).cos().double()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 2.1e-3)])
def test_tables_are_as_good_as_their_dtype(dtype: torch.dtype, tolerance: float) -> None:
    cos, sin = rope_tables(torch.arange(2048)[None], HEAD_DIM, dtype)
    assert cos.dtype == sin.dtype == dtype
    assert (cos[0, 0].double() - exact_cosines(2048)).abs().max() < tolerance


def test_angles_in_bfloat16_would_be_far_off() -> None:
    errors = (rounded_cosines(600) - exact_cosines(600)).abs().amax(dim=1)
    assert errors[:21].max() > 0.05
    assert errors[:151].max() > 0.3
    assert torch.equal(rounded_cosines(600)[257], rounded_cosines(600)[256])  # odd positions are lost
