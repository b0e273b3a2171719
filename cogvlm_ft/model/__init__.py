"""CogVLM v1: config, vision tower, decoder with visual experts, tokenizer, loading. torch and transformers only."""

from cogvlm_ft.model.cogvlm import CogVLMForCausalLM, enable_gradient_checkpointing
from cogvlm_ft.model.configuration import CogVLMConfig
from cogvlm_ft.model.loading import load_config, load_model, model_config_of
from cogvlm_ft.model.preprocess import preprocess_image
from cogvlm_ft.model.tokenizer import CogVLMTokenizer

__all__ = [
    "CogVLMConfig",
    "CogVLMForCausalLM",
    "CogVLMTokenizer",
    "enable_gradient_checkpointing",
    "load_config",
    "load_model",
    "model_config_of",
    "preprocess_image",
]
