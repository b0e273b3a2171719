"""The published `config.json` of CogVLM as a `transformers` config."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

# vision_config of the published 490 px checkpoints: EVA2-CLIP-E without its last layer, 35 x 35 patches + cls.
EVA2_CLIP_E_490: dict[str, Any] = {
    "dropout_prob": 0.0,
    "hidden_act": "gelu",
    "hidden_size": 1792,
    "image_size": 490,
    "in_channels": 3,
    "intermediate_size": 15360,
    "layer_norm_eps": 1e-6,
    "num_heads": 16,
    "num_hidden_layers": 63,
    "num_positions": 1226,
    "patch_size": 14,
}

# What the published folders name as their remote code. Ours never runs it; other readers look it up here.
PUBLISHED_AUTO_MAP = {
    "AutoConfig": "configuration_cogvlm.CogVLMConfig",
    "AutoModelForCausalLM": "modeling_cogvlm.CogVLMForCausalLM",
}


class CogVLMConfig(PreTrainedConfig):
    """Sizes of a CogVLM v1; the defaults are the 17B model at 490 px.

    Key names are those of the published checkpoints. `rms_norm_eps` defaults to the published class's 1e-6, which is
    what a config.json without the key means; the published 17B files say 1e-5.
    """

    model_type = "cogvlm"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    template_version: str = "chat"
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    vision_config: dict[str, Any] | None = None
    auto_map: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.vision_config = {**EVA2_CLIP_E_490, **(self.vision_config or {})}
        self.auto_map = self.auto_map or dict(PUBLISHED_AUTO_MAP)
        super().__post_init__(**kwargs)

    @property
    def image_size(self) -> int:
        """Side of the square input, pixels."""
        return self.vision["image_size"]

    @property
    def num_patches(self) -> int:
        """N: patches of one image, without cls, boi and eoi."""
        return (self.vision["image_size"] // self.vision["patch_size"]) ** 2

    @property
    def vision(self) -> dict[str, Any]:
        """`vision_config`, never None."""
        assert self.vision_config is not None
        return self.vision_config

    def at_image_size(self, image_size: int) -> CogVLMConfig:
        """A copy for another square input of `image_size` pixels, a multiple of the patch size."""
        if image_size % self.vision["patch_size"]:
            raise ValueError(f"image_size={image_size} is not a multiple of the patch size {self.vision['patch_size']}")
        config = CogVLMConfig.from_dict(self.to_dict())
        num_positions = (image_size // self.vision["patch_size"]) ** 2 + 1
        config.vision_config = {**self.vision, "image_size": image_size, "num_positions": num_positions}
        return config

    def to_diff_dict(self) -> dict[str, Any]:
        """What `save_pretrained` writes; with `torch_dtype`, the name that transformers 4 and servers read."""
        out = super().to_diff_dict()
        if "dtype" in out:
            out["torch_dtype"] = out["dtype"]
        return out
