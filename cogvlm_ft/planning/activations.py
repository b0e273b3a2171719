"""Measure the activations of each part of the model by running its own code on shapes without data.

All of it runs on torch's meta device, so a 17B model at 980 px takes seconds and no memory. Sizes are those of the
tensors that operations create, without an allocator's rounding and the scratch memory of kernels.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cogvlm_ft.model import CogVLMConfig, CogVLMForCausalLM, layout
from cogvlm_ft.model.attention import AttendInTurns
from cogvlm_ft.model.decoder import AttentionInputs, ExpertRouting, rope_tables
from cogvlm_ft.model.vision import PatchEmbedding


@dataclass(frozen=True)
class MicroBatchShape:
    """Shape of one pass of one rank. num_images: the micro-batch.

    turns: per image. turn_tokens: of one turn, prompt and answer. labelled_tokens: of these, those of the answer.
    image_size: px; None: the model's own. asked_turns: of an image in an evaluation; None: as in training.
    """

    num_images: int = 1
    turns: int = 4
    turn_tokens: int = 60
    labelled_tokens: int = 30
    image_size: int | None = None
    asked_turns: int | None = None

    def config_of(self, model: CogVLMConfig) -> CogVLMConfig:
        """Return the model's config at this resolution."""
        return model.at_image_size(self.image_size) if self.image_size else model

    @property
    def text_tokens(self) -> int:
        """Count the tokens after one image."""
        return self.turns * self.turn_tokens


@dataclass(frozen=True)
class Stage:
    """One part of the model in the order of the forward pass; sizes in bytes.

    kept: between its forward and its backward pass, including its output.
    peak: of its backward pass with recomputation, or of its forward pass if that is higher.
    forward: peak of a forward pass without gradients.
    output: its output.
    """

    name: str
    kept: int
    peak: int
    forward: int
    output: int


class LiveBytes(TorchDispatchMode):
    """Count the live storages that operations have created, without those of `given` tensors."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._given = [
            tensor.untyped_storage() for tensor in given
        ]  # referenced, so that their addresses are not reused
        self._known: dict[int, Any] = {storage._cdata: None for storage in self._given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._known:
            return

        def forget(_: Any) -> None:
            self.now -= size
            del self._known[address]

        self._known[address] = weakref.ref(storage, forget)
        self.now += size
        self.peak = max(self.peak, self.now)


class _Linear(torch.autograd.Function):
    """F.linear as DeepSpeed replaces it under ZeRO-3: it saves its input as it is, not a contiguous copy."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.has_bias = bias is not None
        out = hidden.matmul(weight.t())
        return out.add_(bias) if bias is not None else out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        hidden, weight = ctx.saved_tensors
        (grad,) = grads
        rows = grad.reshape(-1, grad.shape[-1])
        grad_hidden = grad.matmul(weight) if ctx.needs_input_grad[0] else None
        grad_weight = rows.t().matmul(hidden.reshape(-1, hidden.shape[-1])) if ctx.needs_input_grad[1] else None
        grad_bias = rows.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return grad_hidden, grad_weight, grad_bias


class _Attention(torch.autograd.Function):
    """Attention as in the flash and memory-efficient kernels: saves its output and one number per query, no weights."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, size = query.shape
        out = query.new_empty(batch, length, heads, size).transpose(1, 2)
        sums = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return tuple(tensor.new_empty(tensor.shape) for tensor in ctx.saved_tensors[:3])


class AsInTraining(TorchFunctionMode):
    """Use the kernels of a GPU: the meta device would, for example, save all attention weights."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return _Linear.apply(*args)
        if func is F.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])
        return func(*args, **(kwargs or {}))


def probe_stages(model: CogVLMForCausalLM, sequences: MicroBatchShape) -> list[Stage]:
    """Measure the parts of a model on the meta device in the order of its forward pass, inputs first.

    The model has its trained parameters and recomputing layers set (model.freeze, model.gradient_checkpointing).
    """
    config, dtype, inner = sequences.config_of(model.config), model.lm_head.weight.dtype, model.model
    batch, prefix = sequences.num_images, config.num_patches + 3
    length = prefix + sequences.text_tokens
    labelled = batch * sequences.turns * sequences.labelled_tokens
    with torch.device("meta"):
        pixels = torch.empty(batch, config.vision["in_channels"], config.image_size, config.image_size)
        ids = torch.empty(batch, length, dtype=torch.long)
        mask = layout.turn_mask(ids.int(), prefix)
        tables = rope_tables(ids, config.hidden_size // config.num_attention_heads, dtype)
        inputs = AttentionInputs(
            *tables, AttendInTurns(prefix, mask), ExpertRouting(span=layout.vision_expert_span(config.num_patches))
        )
        rows, targets = torch.empty(2, labelled, dtype=torch.long), torch.empty(labelled, dtype=torch.long)
        embeds = torch.empty(batch, length, config.hidden_size, dtype=dtype)

    def place(hidden: Tensor) -> Tensor:
        tokens = inner.vision.linear_proj(hidden[:, 1:])
        boi, eoi = (edge.expand(batch, -1, -1) for edge in (inner.vision.boi, inner.vision.eoi))
        image = torch.cat([boi, tokens, eoi], dim=1)
        return torch.cat([embeds[:, :1], image, embeds[:, prefix:]], dim=1)

    def score(hidden: Tensor) -> Tensor:
        chosen = inner.norm(hidden)[:, :-1][rows[0], rows[1]]
        return F.cross_entropy(model.lm_head(chosen).float(), targets, reduction="sum")

    cast = pixels.to(dtype)  # 4 tensors of i64[B, L] or i32 come with a batch
    known = [ids, mask, *tables, rows, targets, embeds, cast, *model.buffers()]
    prober = _Prober(known)
    kept = sum(tensor.nbytes for tensor in (pixels, mask, *tables)) + 28 * ids.numel()
    kept += cast.nbytes if dtype != pixels.dtype else 0
    prober.stages.append(Stage("inputs", kept, kept, kept, 0))
    prober.add("embedding", inner.embed_tokens, ids, inner.embed_tokens, keeps_output=False)
    embedding_is_trained = prober.needs_grad
    prober.needs_grad = False
    patches = _at_size(inner.vision.patch_embedding, config)
    hidden = prober.add("patches", patches, cast, patches)
    for layer in inner.vision.transformer.layers:
        hidden = prober.add("vision layer", _plain(layer), hidden, layer, recomputes=layer.gradient_checkpointing)
    edges = [inner.vision.boi, inner.vision.eoi]
    hidden = prober.add("adaptor", place, hidden, inner.vision.linear_proj, edges)
    prober.needs_grad = prober.needs_grad or embedding_is_trained
    for decoder in inner.layers:
        run = _plain(decoder, inputs)
        hidden = prober.add("language layer", run, hidden, decoder, recomputes=decoder.gradient_checkpointing)
    prober.add("logits", score, hidden, inner.norm, [model.lm_head.weight])
    return prober.stages


def _at_size(patches: PatchEmbedding, config: CogVLMConfig) -> PatchEmbedding:
    """Return the embedding with a position table for the resolution of `config`."""
    if patches.position_embedding.num_embeddings == config.vision["num_positions"]:
        return patches
    with torch.device("meta"):
        resized = nn.Module.to(PatchEmbedding(config.vision), patches.cls_embedding.dtype)
    for new, old in zip(resized.parameters(), patches.parameters(), strict=True):
        new.requires_grad_(old.requires_grad)
    return resized


def _plain(layer: nn.Module, *more: Any) -> Callable[[Tensor], Tensor]:
    """Return the layer's own forward pass, without the wrapper that recomputes."""
    return lambda hidden: layer.forward(hidden, *more)


@dataclass(frozen=True)
class _Part:
    """A part of the model to be measured. keeps_output: whether its output is kept for the backward pass."""

    name: str
    forward: Callable[[Tensor], Tensor]
    parameters: Sequence[nn.Parameter]
    recomputes: bool
    keeps_output: bool


class _TrainingPass(NamedTuple):
    """Bytes of a forward and a backward pass. kept: between the two; has_backward: whether there is one."""

    kept: int
    peak: int
    has_backward: bool


class _Prober:
    """Measure part after part; equal parts under equal conditions only once."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        self.stages: list[Stage] = []
        self.needs_grad = False  # whether something before the next part is trained
        self._known = list(known)
        self._seen: dict[Any, tuple[Stage, Tensor]] = {}

    def add(
        self,
        name: str,
        forward: Callable[[Tensor], Tensor],
        hidden: Tensor,
        module: nn.Module,
        more: Sequence[nn.Parameter] = (),
        *,
        recomputes: bool = False,
        keeps_output: bool = True,
    ) -> Tensor:
        """Measure the next part and return its output."""
        part = _Part(name, forward, [*module.parameters(), *more], recomputes, keeps_output)
        trained = tuple(parameter.requires_grad for parameter in part.parameters)
        conditions = (name, trained, recomputes, self.needs_grad)
        if conditions not in self._seen:
            given = hidden.detach()
            if given.is_floating_point():
                given.requires_grad_(self.needs_grad)
            self._seen[conditions] = self._probe(part, given)
        stage, output = self._seen[conditions]
        self.stages.append(stage)
        self.needs_grad = self.needs_grad or any(trained)
        return output

    def _probe(self, part: _Part, given: Tensor) -> tuple[Stage, Tensor]:
        known = [given, *part.parameters, *self._known]
        output, forward_peak = _run_without_gradients(part, given, known)
        training = _run_training_pass(part, given, output, [*known, output])
        kept = _kept_after_forward(part, given, output, training)
        return Stage(part.name, kept, max(training.peak, forward_peak), forward_peak, output.nbytes), output


def _run_without_gradients(part: _Part, given: Tensor, known: Sequence[Tensor]) -> tuple[Tensor, int]:
    """Return the output and the peak."""
    with torch.no_grad(), AsInTraining(), LiveBytes(known) as live:
        output = part.forward(given)
    return output, live.peak


def _run_training_pass(part: _Part, given: Tensor, output: Tensor, known: Sequence[Tensor]) -> _TrainingPass:
    """Run forward and backward. output: of a former run, for the shape of its gradient."""
    # DeepSpeed copies a complete gradient into its bucket and frees it.
    hooks = [p.register_post_accumulate_grad_hook(_drop_grad) for p in part.parameters if p.requires_grad]
    with AsInTraining(), LiveBytes(known) as live:
        # A part that recomputes runs forward when the gradient of its output has already arrived.
        gradient = torch.empty_like(output) if part.recomputes else None
        out = part.forward(given)
        kept, has_backward = live.now, out.requires_grad
        if has_backward:
            gradient = torch.empty_like(output) if gradient is None else gradient
            edge = torch.autograd.graph.get_gradient_edge(out)
            del out  # the next part has released it by now
            torch.autograd.backward([edge], [gradient])  # type: ignore[list-item]
            given.grad = None
    for hook in hooks:
        hook.remove()
    return _TrainingPass(kept, live.peak, has_backward)


def _kept_after_forward(part: _Part, given: Tensor, output: Tensor, training: _TrainingPass) -> int:
    """Return the bytes that a part keeps for its backward pass."""
    if not training.has_backward:
        return 0  # nothing before the first trained part has a backward pass
    kept = output.nbytes if part.recomputes else training.kept
    if given.is_floating_point() and not given.requires_grad:
        kept += given.nbytes  # the first trained part keeps its input, which no part before it has counted
    return kept if part.keeps_output else max(0, kept - output.nbytes)


def _drop_grad(parameter: Tensor) -> None:
    parameter.grad = None


def kept_bytes(stages: Sequence[Stage]) -> int:
    """Sum what all parts keep between the forward and the backward pass."""
    return sum(stage.kept for stage in stages)


def peak_of(stages: Sequence[Stage]) -> tuple[int, int, str]:
    """Return (bytes kept by the parts before, bytes of the running part, its name) at the peak."""
    before, worst = 0, (0, 0, "")
    for stage in stages:
        if before + stage.peak >= worst[0] + worst[1]:
            worst = (before, stage.peak, stage.name)
        before += stage.kept
    return worst


def forward_peak(stages: Sequence[Stage]) -> int:
    """Return the peak of a pass without gradients: a part and its input, in addition to the inputs of the pass."""
    return stages[0].kept + max(part.output + following.forward for part, following in pairwise(stages))
