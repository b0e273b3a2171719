"""Language layers with visual experts: every projection exists twice, and each position uses one of the two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from cogvlm_ft.model import elementwise
from cogvlm_ft.model.attention import Attend
from cogvlm_ft.model.cache import TurnCache
from cogvlm_ft.model.configuration import CogVLMConfig

ROPE_BASE = 10000.0  # not a config key of CogVLM v1: the published rotary class's default


@dataclass(frozen=True)
class ExpertRouting:
    """The positions of float[B, L, D] that use the vision expert; all others use the language expert.

    span: (start, stop), the same in every row: a slice, with static shapes.
    mask: bool[B, L], for rows that differ. Both experts run even for no positions, so that under ZeRO-3 all ranks
        call the same modules.
    Neither: language expert only, for decoding.
    """

    span: tuple[int, int] | None = None
    mask: Tensor | None = None

    def apply(self, hidden: Tensor, language: Callable[[Tensor], Tensor], vision: Callable[[Tensor], Tensor]) -> Tensor:
        if self.span is not None:
            start, stop = self.span
            text = language(torch.cat([hidden[:, :start], hidden[:, stop:]], dim=1))
            return torch.cat([text[:, :start], vision(hidden[:, start:stop]), text[:, start:]], dim=1)
        if self.mask is not None:
            text, image = language(hidden[~self.mask]), vision(hidden[self.mask])
            out = text.new_empty(*hidden.shape[:-1], text.shape[-1])
            out[~self.mask], out[self.mask] = text, image
            return out
        return language(hidden)


class RMSNorm(nn.Module):
    """Normalizes the last dimension, in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        return elementwise.rms_norm(hidden, self.weight, self.eps)


def inverse_frequencies(head_dim: int, device: torch.device | None = None) -> Tensor:
    """Return float32[head_dim / 2]: ROPE_BASE^(-2j / head_dim)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    return 1.0 / ROPE_BASE**exponents


def rope_tables(position_ids: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin [B, 1, L, head_dim] for i64[B, L]: computed in float32 for any model dtype, then rounded."""
    angles = position_ids[:, :, None].float() * inverse_frequencies(head_dim, position_ids.device)
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


class RotaryEmbedding(nn.Module):
    """Holds `inv_freq` because published checkpoints contain it.

    The angles are computed again in float32 (rope_tables), because a bfloat16 model rounds this buffer.
    """

    inv_freq: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", inverse_frequencies(head_dim), persistent=True)


@dataclass(frozen=True)
class AttentionInputs:
    """The inputs that all layers share in one pass: rotary tables, attention pattern, routing."""

    cos: Tensor
    sin: Tensor
    attend: Attend
    routing: ExpertRouting


class VisionExpertAttention(nn.Module):
    def __init__(self, config: CogVLMConfig, layer_idx: int) -> None:
        super().__init__()
        size = config.hidden_size
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.head_dim = size // config.num_attention_heads
        self.rotary_emb = RotaryEmbedding(self.head_dim)
        self.vision_expert_query_key_value = nn.Linear(size, 3 * size, bias=False)
        self.vision_expert_dense = nn.Linear(size, size, bias=False)
        self.language_expert_query_key_value = nn.Linear(size, 3 * size, bias=False)
        self.language_expert_dense = nn.Linear(size, size, bias=False)

    def forward(self, hidden: Tensor, inputs: AttentionInputs, cache: Cache | TurnCache | None = None) -> Tensor:
        batch, length, size = hidden.shape
        experts = self.language_expert_query_key_value, self.vision_expert_query_key_value
        qkv = inputs.routing.apply(hidden, *experts).view(batch, length, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        query, key = (elementwise.rotate(x, inputs.cos, inputs.sin) for x in (query, key))
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        out = inputs.attend(query, key, value).transpose(1, 2).reshape(batch, length, size)
        return inputs.routing.apply(out, self.language_expert_dense, self.vision_expert_dense)


class MLP(nn.Module):
    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(elementwise.gated(self.act_fn, self.gate_proj(hidden), self.up_proj(hidden)))


class VisionExpertMLP(nn.Module):
    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__()
        self.language_mlp = MLP(config)
        self.vision_mlp = MLP(config)

    def forward(self, hidden: Tensor, routing: ExpertRouting) -> Tensor:
        return routing.apply(hidden, self.language_mlp, self.vision_mlp)


class DecoderLayer(GradientCheckpointingLayer):
    """Pre-norm residual layer, float[B, L, H] -> float[B, L, H]."""

    def __init__(self, config: CogVLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = VisionExpertAttention(config, layer_idx)
        self.mlp = VisionExpertMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, hidden: Tensor, inputs: AttentionInputs, past_key_values: Cache | TurnCache | None = None
    ) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), inputs, past_key_values)
        return hidden + self.mlp(self.post_attention_layernorm(hidden), inputs.routing)
