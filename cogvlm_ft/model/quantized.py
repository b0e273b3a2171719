"""Weight-only quantisation of the linear layers: less memory, the same names, computed in the model's own dtype.

int8: symmetric, one scale for each row. int4: NF4, the quantiles of a normal distribution, one scale for each 64
weights of a row. Embeddings, norms, biases and lm_head stay as they are. A layer's weights are restored for each call,
one layer at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import ndtri
from torch import Tensor, nn

BLOCK = 64
ROWS_AT_A_TIME = 1024
SCALE = "weight_scale"
WEIGHT_FORMAT = "weight_format"
"""Key of config.json that names the format of quantised weights."""
_PARTS = ("model.layers.", "model.vision.transformer.layers.", "model.vision.linear_proj.")

Rows = Callable[[int, int], Tensor]


class _RestoredLinear(torch.autograd.Function):
    """F.linear of a quantised layer, whose weights are restored in both passes and kept in neither."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(hidden, layer.restored(hidden.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        return grad @ ctx.layer.restored(grad.dtype), None


class QuantizedLinear(nn.Linear, ABC):
    """A linear layer that passes gradients on and has none itself. weight: integers; weight_scale: float32."""

    weight_scale: Tensor

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)  # not that of Linear, which would allocate the weights
        self.in_features, self.out_features = in_features, out_features
        shapes = self._shapes()
        self.register_buffer("weight", torch.empty(shapes[0], dtype=self._dtype, device="meta"))
        self.register_buffer(SCALE, torch.empty(shapes[1], device="meta"))
        self.bias = bias  # type: ignore[assignment]

    _dtype: ClassVar[torch.dtype]

    @abstractmethod
    def _shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of weight and weight_scale."""

    @abstractmethod
    def _pack(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return weight and weight_scale of float32[n, in_features]."""

    @abstractmethod
    def restored(self, dtype: torch.dtype) -> Tensor:
        """Return the weights as floats, [out_features, in_features]."""

    def read(self, rows: Rows) -> None:
        """Quantise the weights while reading them: rows(start, stop) -> float[stop - start, in_features]."""
        for start in range(0, self.out_features, ROWS_AT_A_TIME):
            stop = min(start + ROWS_AT_A_TIME, self.out_features)
            packed = self._pack(rows(start, stop).to(self.weight.device, torch.float32))
            self.weight[start:stop], self.weight_scale[start:stop] = packed

    def forward(self, input: Tensor) -> Tensor:
        return _RestoredLinear.apply(input, self)


class Int8Linear(QuantizedLinear):
    _dtype = torch.int8

    def _shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (self.out_features, self.in_features), (self.out_features, 1)

    def _pack(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        scale = rows.abs().amax(dim=1, keepdim=True) / 127
        return (rows / scale.clamp(min=torch.finfo(torch.float32).tiny)).round().to(torch.int8), scale

    def restored(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype) * self.weight_scale.to(dtype)


def normal_levels() -> Tensor:
    """Return float32[16], from -1 to 1 with 0: the quantiles of a normal distribution (QLoRA, section 3)."""
    highest = 1 - 0.5 * (1 / 32 + 1 / 30)
    below = -ndtri(np.linspace(highest, 0.5, 8)[:-1])
    above = ndtri(np.linspace(highest, 0.5, 9)[:-1])
    levels = np.sort(np.concatenate([below, [0.0], above]))
    return torch.tensor(levels / levels.max(), dtype=torch.float32)


@cache
def _levels_of_bytes(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the two levels that each of the 256 bytes stands for, [256, 2]."""
    levels = normal_levels().to(device, dtype)
    return torch.cartesian_prod(levels, levels)


class Int4Linear(QuantizedLinear):
    """Two weights in a byte. Rows are filled up to whole blocks."""

    _dtype = torch.uint8

    def _num_blocks(self) -> int:
        return -(-self.in_features // BLOCK)

    def _shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        blocks = self._num_blocks()
        return (self.out_features, blocks * BLOCK // 2), (self.out_features, blocks)

    def _pack(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        blocks = F.pad(rows, (0, self._num_blocks() * BLOCK - self.in_features)).view(len(rows), -1, BLOCK)
        scale = blocks.abs().amax(dim=2)
        levels = normal_levels().to(rows.device)
        scaled = blocks / scale.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
        codes = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2).to(torch.uint8).view(len(rows), -1)
        return codes[:, ::2] * 16 + codes[:, 1::2], scale

    def restored(self, dtype: torch.dtype) -> Tensor:
        pairs = F.embedding(self.weight.int(), _levels_of_bytes(self.weight.device, dtype))
        pairs.view(self.out_features, -1, BLOCK).mul_(self.weight_scale.to(dtype)[..., None])
        return pairs.view(self.out_features, -1)[:, : self.in_features]


KINDS: dict[str, type[QuantizedLinear]] = {"int8": Int8Linear, "int4": Int4Linear}


def _is_quantizable(name: str, module: nn.Module) -> bool:
    return type(module) is nn.Linear and name.startswith(_PARTS)


def held_bytes(layer: QuantizedLinear) -> int:
    """Return the bytes of a layer's weights and scales."""
    return sum(buffer.numel() * buffer.element_size() for buffer in layer.buffers())


def quantized_bytes(model: nn.Module, kind: str, element_bytes: int) -> int:
    """Return the bytes of a model's weights after quantisation. element_bytes: of those that stay floats."""
    total = sum(parameter.numel() for parameter in model.parameters()) * element_bytes
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and _is_quantizable(name, module):
            total += held_bytes(KINDS[kind](module.in_features, module.out_features, None))
            total -= module.in_features * module.out_features * element_bytes
    return total


def replace_linears(model: nn.Module, kind: str, kept: Iterable[str] = ()) -> None:
    """Replace the linear layers of a model on the meta device by quantised ones, whose weights are not there yet.

    kept: modules whose layers stay as they are.
    """
    as_they_are = tuple(f"{name}." for name in kept)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and _is_quantizable(name, module) and not name.startswith(as_they_are):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, KINDS[kind](module.in_features, module.out_features, module.bias))


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model folder by name: parameters, and weights and scales of quantised layers."""
    buffers = {name: buffer for name, buffer in model.named_buffers() if not name.endswith(".inv_freq")}
    return {**dict(model.named_parameters()), **buffers}


def float_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the model before it was quantised, by name."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            shapes[f"{name}.weight"] = module.out_features, module.in_features
    return shapes


def quantizing_assign(model: nn.Module) -> Callable[[str, Rows, int], Any]:
    """Return a function that reads whole tensors into parameters, and quantises those of quantised layers."""
    parameters = dict(model.named_parameters())

    def assign(name: str, fetch: Rows, num_rows: int) -> None:
        if name in parameters:
            parameters[name].data.copy_(fetch(0, num_rows))
            return
        module = model.get_submodule(name.rpartition(".")[0])
        assert isinstance(module, QuantizedLinear)
        module.read(fetch)

    return assign
