"""EVA2-CLIP vision tower and the adaptor to the language model. Names are the checkpoint's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from cogvlm_ft.model import elementwise
from cogvlm_ft.model.configuration import CogVLMConfig


class PatchEmbedding(nn.Module):
    """float[B, 3, S, S] -> float[B, 1 + N, H]: cls first, then the patches row by row, plus the position table."""

    def __init__(self, vision: dict) -> None:
        super().__init__()
        size, patch_size = vision["hidden_size"], vision["patch_size"]
        self.proj = nn.Conv2d(vision["in_channels"], size, kernel_size=patch_size, stride=patch_size)
        self.cls_embedding = nn.Parameter(torch.zeros(1, size))
        self.position_embedding = nn.Embedding(vision["num_positions"], size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.proj(pixel_values).flatten(2).transpose(1, 2)
        cls = self.cls_embedding.expand(len(patches), 1, -1)
        # Call the table's module instead of reading its weight: ZeRO-3 gathers a parameter when its module runs.
        positions = torch.arange(self.position_embedding.num_embeddings, device=patches.device)
        return torch.cat([cls, patches], dim=1) + self.position_embedding(positions)


class VisionAttention(nn.Module):
    """Full self-attention over one image's tokens; the fused projection is laid out [q | k | v], head-major."""

    def __init__(self, vision: dict) -> None:
        super().__init__()
        self.num_heads = vision["num_heads"]
        self.query_key_value = nn.Linear(vision["hidden_size"], 3 * vision["hidden_size"])
        self.dense = nn.Linear(vision["hidden_size"], vision["hidden_size"])
        self.output_dropout = nn.Dropout(vision["dropout_prob"])

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, size = hidden.shape
        qkv = self.query_key_value(hidden).view(batch, length, 3, self.num_heads, size // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query, key, value)
        return self.output_dropout(self.dense(out.transpose(1, 2).reshape(batch, length, size)))


class VisionMLP(nn.Module):
    def __init__(self, vision: dict) -> None:
        super().__init__()
        self.activation_fn = ACT2FN[vision["hidden_act"]]
        self.fc1 = nn.Linear(vision["hidden_size"], vision["intermediate_size"])
        self.fc2 = nn.Linear(vision["intermediate_size"], vision["hidden_size"])

    def forward(self, hidden: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden)))


class VisionLayer(GradientCheckpointingLayer):
    """Post-norm on the branches: despite its name, `input_layernorm` follows the attention."""

    def __init__(self, vision: dict) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(vision["hidden_size"], eps=vision["layer_norm_eps"])
        self.attention = VisionAttention(vision)
        self.mlp = VisionMLP(vision)
        self.post_attention_layernorm = nn.LayerNorm(vision["hidden_size"], eps=vision["layer_norm_eps"])

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.input_layernorm(self.attention(hidden))
        return hidden + self.post_attention_layernorm(self.mlp(hidden))


class VisionTransformer(nn.Module):
    def __init__(self, vision: dict) -> None:
        super().__init__()
        self.layers = nn.ModuleList([VisionLayer(vision) for _ in range(vision["num_hidden_layers"])])

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class Adaptor(nn.Module):
    """float[B, N, H_vision] -> float[B, N, H]; LayerNorm eps is torch's 1e-5, not the tower's."""

    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        self.linear_proj = nn.Linear(config.vision["hidden_size"], size, bias=False)
        self.norm1 = nn.LayerNorm(size)
        self.dense_h_to_4h = nn.Linear(size, inner, bias=False)
        self.gate_proj = nn.Linear(size, inner, bias=False)
        self.dense_4h_to_h = nn.Linear(inner, size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = F.gelu(self.norm1(self.linear_proj(hidden)))
        return self.dense_4h_to_h(elementwise.gated(F.silu, self.gate_proj(hidden), self.dense_h_to_4h(hidden)))


class VisionModel(nn.Module):
    """float[B, 3, S, S] -> float[B, N + 2, H]: boi, the image's tokens without cls, eoi."""

    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__()
        self.patch_embedding = PatchEmbedding(config.vision)
        self.transformer = VisionTransformer(config.vision)
        self.linear_proj = Adaptor(config)
        self.boi = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.eoi = nn.Parameter(torch.zeros(1, 1, config.hidden_size))

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden = self.transformer(self.patch_embedding(pixel_values))
        tokens = self.linear_proj(hidden[:, 1:])
        boi, eoi = (edge.expand(len(tokens), -1, -1) for edge in (self.boi, self.eoi))
        return torch.cat([boi, tokens, eoi], dim=1)
