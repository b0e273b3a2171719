"""Compiled elementwise operations equal uncompiled ones, gradients included, for any length."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cogvlm_ft.model import elementwise

NAMES = ("rms_norm", "rotate", "gated")


@pytest.mark.slow  # the compiler takes half a minute
def test_compiled_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = {name: getattr(elementwise, name) for name in NAMES}
    for name in NAMES:
        monkeypatch.setattr(elementwise, name, eager[name])  # restored afterwards
    elementwise.compile_elementwise()
    for length in (5, 9):
        torch.manual_seed(length)
        x, weight, table = torch.randn(2, 3, length, 8), torch.randn(8), torch.randn(2, 1, length, 8)
        for name, arguments in {
            "rms_norm": (x, weight, 1e-5),
            "rotate": (x, table, table + 1),
            "gated": (F.silu, x, x + 1),
        }.items():
            compiled = getattr(elementwise, name)
            assert compiled is not eager[name]
            results = []
            for function in (compiled, eager[name]):
                fresh = [a.clone().requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments]
                out = function(*fresh)
                inputs = [a for a in fresh if isinstance(a, torch.Tensor)]
                results.append([out, *torch.autograd.grad(out.pow(2).sum(), inputs)])
            for found, wanted in zip(*results, strict=True):
                torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
