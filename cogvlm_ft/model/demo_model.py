"""A CogVLM of the published architecture that trains in minutes on two CPU cores."""

from __future__ import annotations

from typing import Any

import torch

from cogvlm_ft.model.cogvlm import CogVLMForCausalLM
from cogvlm_ft.model.configuration import CogVLMConfig

SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 336, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION_SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_heads": 4,
    "patch_size": 8,
}
# Half the tower's width and layers: enough to learn a few images by heart, in less time.
SMALL_VISION_SIZES: dict[str, Any] = {
    **VISION_SIZES,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
}


def build_demo_model(
    vocab_size: int, image_size: int, max_positions: int = 256, *, small: bool = False
) -> CogVLMForCausalLM:
    """Build a model with 1.7 million random parameters, 1 million if small; torch.manual_seed decides their values."""
    vision_sizes = SMALL_VISION_SIZES if small else VISION_SIZES
    num_positions = (image_size // vision_sizes["patch_size"]) ** 2 + 1
    vision = {**vision_sizes, "image_size": image_size, "num_positions": num_positions}
    model_config = CogVLMConfig(
        **SIZES,
        vocab_size=vocab_size,
        max_position_embeddings=max_positions,
        rms_norm_eps=1e-5,
        initializer_range=0.09,
        template_version="base",
        vision_config=vision,
    )
    model = CogVLMForCausalLM(model_config)
    # All patches have one position id in the language model: only this table encodes where a patch is.
    torch.nn.init.normal_(model.model.vision.patch_embedding.position_embedding.weight)
    # The tower normalizes the output of each layer. At full scale, random layers would hide the patches they are added
    # to, and the model would learn nothing from thousands of images.
    for layer in model.model.vision.transformer.layers:
        torch.nn.init.constant_(layer.input_layernorm.weight, 0.2)
        torch.nn.init.constant_(layer.post_attention_layernorm.weight, 0.2)
    return model
