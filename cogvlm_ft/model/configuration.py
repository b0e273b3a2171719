"""The published `config.json` of CogVLM as a `transformers` config."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

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

# The remote code that the published folders name. This package never runs it; other programs read it from here.
PUBLISHED_AUTO_MAP = {
    "AutoConfig": "configuration_cogvlm.CogVLMConfig",
    "AutoModelForCausalLM": "modeling_cogvlm.CogVLMForCausalLM",
}


_LARGEST = {
    "vocab_size": 2**24,
    "hidden_size": 2**17,
    "intermediate_size": 2**19,
    "num_hidden_layers": 1000,
    "num_attention_heads": 2**12,
    "num_heads": 2**12,
    "num_positions": 2**20,
    "image_size": 2**16,
    "patch_size": 2**12,
    "in_channels": 2**8,
}


class CogVLMConfig(PreTrainedConfig):
    """Sizes of a CogVLM v1; the defaults are the 17B model at 490 px.

    Key names are those of the published checkpoints. The default of `rms_norm_eps` is the published class's 1e-6, which
    applies to a config.json without the key; the published 17B files have 1e-5.
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

    def check_sizes(self) -> None:
        """Raise ValueError for a size that is not a number, or that no model has."""
        for name, most in _LARGEST.items():
            for where in (vars(self), self.vision):
                value = where.get(name, 1)
                if type(value) is not int or not 1 <= value <= most:
                    raise ValueError(f"{name}: found {value!r:.40}; expected a whole number from 1 to {most}")
        for act in (self.hidden_act, self.vision["hidden_act"]):
            if act not in ACT2FN:
                raise ValueError(f"hidden_act: found {act!r:.40}; expected an activation, such as silu or gelu")
        for eps in (self.rms_norm_eps, self.vision["layer_norm_eps"]):
            if not isinstance(eps, float) or not 0 <= eps < 1:
                raise ValueError(f"rms_norm_eps, layer_norm_eps: found {eps!r:.40}; expected a number, such as 1e-5")
        if self.hidden_size % self.num_attention_heads or self.vision["hidden_size"] % self.vision["num_heads"]:
            raise ValueError("hidden_size: expected a multiple of the number of heads")

    def at_image_size(self, image_size: int) -> CogVLMConfig:
        """Return a copy for square inputs of `image_size` pixels, a multiple of the patch size."""
        if image_size % self.vision["patch_size"]:
            raise ValueError(f"image_size={image_size} is not a multiple of the patch size {self.vision['patch_size']}")
        config = CogVLMConfig.from_dict(self.to_dict())
        num_positions = (image_size // self.vision["patch_size"]) ** 2 + 1
        config.vision_config = {**self.vision, "image_size": image_size, "num_positions": num_positions}
        return config

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what `save_pretrained` writes, with `torch_dtype`: transformers 4 and servers read that name."""
        out = super().to_diff_dict()
        if "dtype" in out:
            out["torch_dtype"] = out["dtype"]
        return out
