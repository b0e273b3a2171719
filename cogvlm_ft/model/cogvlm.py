"""CogVLM v1 as `transformers` classes: the published names and arguments, torch SDPA, no remote code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from cogvlm_ft.model import layout
from cogvlm_ft.model.attention import Attend, AttendInTurns, AttendMasked, attend_causally
from cogvlm_ft.model.box_loss import BoxLoss
from cogvlm_ft.model.cache import TurnCache
from cogvlm_ft.model.configuration import CogVLMConfig
from cogvlm_ft.model.decoder import (
    AttentionInputs,
    DecoderLayer,
    ExpertRouting,
    RMSNorm,
    RotaryEmbedding,
    inverse_frequencies,
    rope_tables,
)
from cogvlm_ft.model.inputs import PublishedInputs, TurnInputs, choose_form
from cogvlm_ft.model.prompt import build_conversation
from cogvlm_ft.model.vision import PatchEmbedding, VisionModel

IGNORE_INDEX = -100


class CogVLMPreTrainedModel(PreTrainedModel):
    config: CogVLMConfig
    config_class = CogVLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer", "VisionLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _keys_to_ignore_on_load_missing = [r"rotary_emb\.inv_freq"]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, VisionModel):
            init.normal_(module.boi, std=std)
            init.normal_(module.eoi, std=std)
        elif isinstance(module, PatchEmbedding):
            init.normal_(module.cls_embedding, std=std)
        elif isinstance(module, RotaryEmbedding):
            init.copy_(module.inv_freq, inverse_frequencies(2 * len(module.inv_freq)))


class CogVLMModel(CogVLMPreTrainedModel):
    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.layers = nn.ModuleList([DecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.vision = VisionModel(config)
        self.post_init()

    def forward(
        self,
        inputs: PublishedInputs | TurnInputs,
        past_key_values: Cache | TurnCache | None = None,
        output_hidden_states: bool = False,
    ) -> BaseModelOutputWithPast:
        """Run the layers on inputs of either form; the cache, if any, is filled."""
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        if isinstance(inputs, PublishedInputs):
            hidden, shared = self._prepare_published(inputs, past_length)
        elif past_length == 0:
            hidden, shared = self._prepare_turns(inputs)
        else:
            raise ValueError("pixel_values: found with a filled past_key_values; expected at the first step only")
        all_hidden = [hidden]
        for layer in self.layers:
            hidden = layer(hidden, shared, past_key_values=past_key_values)
            all_hidden.append(hidden)
        hidden = self.norm(hidden)
        all_hidden[-1] = hidden
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values,  # type: ignore[arg-type]
            hidden_states=tuple(all_hidden) if output_hidden_states else None,
        )

    def _prepare_turns(self, inputs: TurnInputs) -> tuple[Tensor, AttentionInputs]:
        """Return float[B, L, H] with the image in place, and what all layers share."""
        num_patches = self.config.num_patches
        start, stop = layout.image_span(num_patches)
        embeds = self.embed_tokens(inputs.input_ids)
        features = self.vision(inputs.pixel_values.to(self.dtype)).to(embeds.dtype)
        position_ids = inputs.position_ids
        if position_ids is None:
            batch, length = inputs.input_ids.shape
            one_turn = layout.build_layout(num_patches, [length - stop])
            position_ids = one_turn.position_ids.to(embeds.device).expand(batch, -1)
        attend: Attend = attend_causally
        if inputs.block_ids is not None:
            attend = AttendInTurns(stop, layout.turn_mask(inputs.block_ids, stop))
        hidden = torch.cat([embeds[:, :start], features, embeds[:, stop:]], dim=1)
        routing = ExpertRouting(span=layout.vision_expert_span(num_patches))
        return hidden, self._shared_inputs(hidden, position_ids, attend, routing)

    def _prepare_published(self, inputs: PublishedInputs, past_length: int) -> tuple[Tensor, AttentionInputs]:
        """Return float[B, L, H] with the images in place, and what all layers share."""
        if (inputs.input_ids is None) == (inputs.inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: found both or neither; expected exactly one")
        hidden = self.embed_tokens(inputs.input_ids) if inputs.inputs_embeds is None else inputs.inputs_embeds
        token_types, routing = inputs.token_type_ids, ExpertRouting()
        if past_length == 0:
            if token_types is None:
                token_types = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
            hidden = self._place_images(hidden, inputs.images, token_types)
            routing = ExpertRouting(mask=layout.vision_expert_mask(token_types))
        position_ids = inputs.position_ids
        if position_ids is None:
            if token_types is None or (past_length and token_types.shape[1] != past_length + hidden.shape[1]):
                raise ValueError(
                    "position_ids: not found; expected with past_key_values, or token_type_ids of the whole sequence"
                )
            position_ids = layout.build_position_ids(token_types, inputs.attention_mask)[:, past_length:]
        attend = _attend_published(hidden, inputs.attention_mask, past_length)
        return hidden, self._shared_inputs(hidden, position_ids, attend, routing)

    def _shared_inputs(
        self, hidden: Tensor, position_ids: Tensor, attend: Attend, routing: ExpertRouting
    ) -> AttentionInputs:
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        return AttentionInputs(*rope_tables(position_ids, head_dim, hidden.dtype), attend=attend, routing=routing)

    def _place_images(self, embeds: Tensor, images: list[list[Tensor]] | None, token_type_ids: Tensor) -> Tensor:
        """Return float[B, L, H] with the image positions replaced by the vision tower's output."""
        flat = [image for row in images or [] for image in row or [] if image is not None]
        if flat:
            features = self.vision(torch.stack(flat).to(self.device, self.dtype)).to(embeds.dtype).flatten(0, 1)
            where = token_type_ids == layout.VISION
            if where.sum() != len(features):
                raise ValueError(
                    f"token_type_ids: found {int(where.sum())} image positions; expected {len(features)} for "
                    f"{len(flat)} images (patches, boi and eoi each)"
                )
            return embeds.masked_scatter(where[:, :, None], features)
        # Partitioned by ZeRO-3: every rank must run the tower, images or not. Checked by iteration, because DeepSpeed
        # gathers a parameter that is read as an attribute outside its module, and here on this rank alone.
        if hasattr(next(self.vision.parameters()), "ds_id"):
            size = self.config.image_size
            blank = torch.zeros(1, self.config.vision["in_channels"], size, size, device=self.device, dtype=self.dtype)
            return embeds + 0.0 * self.vision(blank).sum().to(embeds.dtype)
        return embeds


def _attend_published(hidden: Tensor, attention_mask: Tensor | None, past_length: int) -> Attend:
    length = hidden.shape[1]
    if attention_mask is not None and attention_mask.dim() == 4:
        return AttendMasked(attention_mask)
    if attention_mask is not None:
        # Under ZeRO-3 `generate()` still calls a finished rank without extending its mask: new keys are visible.
        num_missing = past_length + length - attention_mask.shape[1]
        return AttendMasked(layout.padding_mask(F.pad(attention_mask, (0, num_missing), value=1), length))
    if past_length and length > 1:
        return AttendMasked(layout.causal_mask(length, past_length + length, hidden.device))
    return attend_causally


@dataclass
class OutputWithRowLosses(CausalLMOutputWithPast):
    """row_losses: float32[B], the sum over the labelled tokens of each row, without a gradient; None with logits."""

    row_losses: Tensor | None = None


class CogVLMForCausalLM(CogVLMPreTrainedModel, GenerationMixin):
    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__(config)
        self.model = CogVLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.box_loss: BoxLoss | None = None  # of training; not saved
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        images: list[list[Tensor]] | None = None,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | TurnCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        labels: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        block_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: float | Tensor | None = None,
        return_logits: bool = True,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Return logits and loss for a call in the published form or, with `pixel_values`, in the training form.

        Positional arguments are those of the published remote code. See inputs.py for the shapes of both forms: the
        training form takes input_ids, pixel_values, position_ids and block_ids.

        labels: i64[B, L]; the loss shifts them by one and ignores -100.
        logits_to_keep: logits of the last n positions only (0 = all), or of the positions i64[B, n] of every row.
        num_items_in_batch: divides the sum of the loss over the labelled tokens; None = their number here (mean).
        return_logits: False with labels computes lm_head on labelled positions only: no logits, but row_losses.

        Logits are float32[B, L, V].
        """
        if output_attentions:
            raise ValueError("output_attentions: not available, because CogVLM runs on torch SDPA")
        if labels is None and not return_logits:
            raise ValueError("return_logits=False: found no labels; expected them")
        published = PublishedInputs(input_ids, images, token_type_ids, attention_mask, position_ids, inputs_embeds)
        inputs = choose_form(published, pixel_values, block_ids)
        out = self.model(inputs, self._cache(past_key_values, use_cache), bool(output_hidden_states))
        hidden, logits, loss, row_losses = out.last_hidden_state, None, None, None
        if return_logits:
            logits = self.lm_head(_keep(hidden, logits_to_keep)).float()
        if labels is not None:
            loss, row_losses = self._loss(hidden, logits, labels, num_items_in_batch)
            row_losses = None if return_logits else row_losses
        result = OutputWithRowLosses(loss, logits, out.past_key_values, out.hidden_states, row_losses=row_losses)
        return result.to_tuple() if return_dict is False else result

    def _cache(self, past_key_values: Cache | TurnCache | None, use_cache: bool | None) -> Cache | TurnCache | None:
        """Return the cache of the call, a new one if it is to be used and there is none."""
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        return DynamicCache(config=self.config) if use_cache and past_key_values is None else past_key_values

    def _loss(
        self, hidden: Tensor, logits: Tensor | None, labels: Tensor, num_items_in_batch: float | Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the loss float32[] and the summed cross entropy of the rows float32[B].

        Cross entropy of each labelled token, from the position before it, and what `box_loss` adds. Without logits,
        lm_head runs on those only.
        """
        targets = labels[:, 1:]
        is_labelled = targets != IGNORE_INDEX
        scores = self.lm_head(hidden[:, :-1][is_labelled]).float() if logits is None else logits[:, :-1][is_labelled]
        log_probs, expected = F.log_softmax(scores, dim=-1), targets[is_labelled]
        if self.box_loss is None:
            loss_sum = F.nll_loss(log_probs, expected, reduction="sum")
        else:
            loss_sum = self.box_loss.loss_sum(log_probs, targets)
        token_losses = torch.zeros_like(targets, dtype=log_probs.dtype)
        token_losses[is_labelled] = -log_probs.detach().gather(1, expected[:, None])[:, 0]
        loss = loss_sum / (is_labelled.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
        return loss, token_losses.sum(dim=1)

    def build_conversation_input_ids(
        self,
        tokenizer: Any,
        *,
        query: str,
        history: list[tuple[str, str]] | None = None,
        images: list | None = None,
        template_version: str | None = None,
        answer: str | None = None,
    ) -> dict[str, Any]:
        """Build the inputs of one conversation, unbatched, as the published method does (prompt.build_conversation)."""
        return build_conversation(
            tokenizer,
            self.config,
            query=query,
            history=history,
            images=images,
            template_version=template_version,
            answer=answer,
        )

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        """Return the position ids of the prompt; `generate()` then adds one per new token."""
        token_type_ids = model_kwargs.get("token_type_ids")
        if token_type_ids is None:
            token_type_ids = torch.zeros(inputs_tensor.shape[:2], dtype=torch.long, device=inputs_tensor.device)
        return layout.build_position_ids(token_type_ids, model_kwargs.get("attention_mask"))

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        token_type_ids = model_kwargs.get("token_type_ids")
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if token_type_ids is not None:  # the library repeats the last type; new tokens are always language
            model_kwargs["token_type_ids"][:, token_type_ids.shape[1] :] = layout.LANGUAGE
        return model_kwargs


def _keep(hidden: Tensor, positions: int | Tensor) -> Tensor:
    """Return float[B, n, H]: the last n positions of float[B, L, H] (0 = all), or the positions i64[B, n]."""
    if isinstance(positions, int):
        return hidden[:, -positions:]
    return hidden.gather(1, positions[:, :, None].expand(-1, -1, hidden.shape[-1]))


def enable_gradient_checkpointing(model: CogVLMForCausalLM, which: str = "all") -> None:
    """Recompute layers in the backward pass; non-reentrant, so that it works under ZeRO-3.

    which: "none", "vision", "language", "all", or a number n: every n-th layer of each tower ("1" = all).
    """
    if which == "none":
        return
    towers = {"vision": model.model.vision.transformer.layers, "language": model.model.layers}
    # transformers renamed it in 5.21; the last release for Python 3.10 is 5.20.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    every = int(which) if which.isdecimal() else 1
    for name, layers in towers.items():
        for number, layer in enumerate(layers):
            is_chosen = which == name or which not in towers
            layer.gradient_checkpointing = is_chosen and number % every == 0


AutoConfig.register(CogVLMConfig.model_type, CogVLMConfig, exist_ok=True)
AutoModelForCausalLM.register(CogVLMConfig, CogVLMForCausalLM, exist_ok=True)
