"""What each part of the model keeps for its backward pass and works with: its own code, run on shapes without data.

Everything happens on torch's meta device, so a 17B model at 980 px takes seconds and no memory. Sizes are those of the
tensors that operations make; an allocator's rounding and a kernel's own scratch memory are not in them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

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
    """What one pass of one rank looks at. num_images: photos together (the micro-batch).

    turns: per photo. turn_tokens: of one turn, prompt and answer. labelled_tokens: of these, the answer's.
    image_size: px; None: the model's own.
    """

    num_images: int = 1
    turns: int = 4
    turn_tokens: int = 60
    labelled_tokens: int = 30
    image_size: int | None = None

    def config_of(self, model: CogVLMConfig) -> CogVLMConfig:
        """The model's sizes at this resolution."""
        return model.at_image_size(self.image_size) if self.image_size else model

    @property
    def text_tokens(self) -> int:
        """Behind one image."""
        return self.turns * self.turn_tokens


@dataclass(frozen=True)
class Stage:
    """One part of the model in the order of the forward pass; sizes in bytes.

    kept: between its forward and its backward pass, its output included.
    peak: while its backward pass runs, with what is recomputed for it, or its forward pass if that takes more.
    forward: while it runs without gradients.
    output: what the next part gets.
    """

    name: str
    kept: int
    peak: int
    forward: int
    output: int


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations have made and that are alive; those of `given` tensors do not count."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._given = [tensor.untyped_storage() for tensor in given]  # held, so that their addresses stay theirs
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
    """As DeepSpeed replaces it under ZeRO-3: the input is saved as it came, not as a contiguous copy."""

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
    """As the flash and memory-efficient kernels do it: the output and one number per query are saved, no weights."""

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
    """The meta device would take other ways than a GPU: attention with all its weights, for one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return _Linear.apply(*args)
        if func is F.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])
        return func(*args, **(kwargs or {}))


def probe_stages(model: CogVLMForCausalLM, sequences: MicroBatchShape) -> list[Stage]:
    """The parts of a model on the meta device in the order of its forward pass, the inputs of the pass first.

    Reads which parameters are trained and which layers recompute (model.freeze, model.gradient_checkpointing).
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
    known = [ids, mask, *tables, rows, targets, embeds, cast]
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
    """With a position table for the resolution of `config`."""
    if patches.position_embedding.num_embeddings == config.vision["num_positions"]:
        return patches
    with torch.device("meta"):
        resized = nn.Module.to(PatchEmbedding(config.vision), patches.cls_embedding.dtype)
    for new, old in zip(resized.parameters(), patches.parameters(), strict=True):
        new.requires_grad_(old.requires_grad)
    return resized


def _plain(layer: nn.Module, *more: Any) -> Callable[[Tensor], Tensor]:
    """The layer's own forward pass, without the wrapper that recomputes."""
    return lambda hidden: layer.forward(hidden, *more)


class _Prober:
    """Runs part after part; equal parts in equal circumstances only once."""

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
        """Returns what the next part gets."""
        parameters = [*module.parameters(), *more]
        trained = tuple(parameter.requires_grad for parameter in parameters)
        circumstances = (name, trained, recomputes, self.needs_grad)
        if circumstances not in self._seen:
            given = hidden.detach()
            if given.is_floating_point():
                given.requires_grad_(self.needs_grad)
            self._seen[circumstances] = self._probe(name, forward, given, parameters, recomputes, keeps_output)
        stage, out = self._seen[circumstances]
        self.stages.append(stage)
        self.needs_grad = self.needs_grad or any(trained)
        return out

    def _probe(
        self,
        name: str,
        forward: Callable[[Tensor], Tensor],
        given: Tensor,
        parameters: Sequence[nn.Parameter],
        recomputes: bool,
        keeps_output: bool,
    ) -> tuple[Stage, Tensor]:
        known = [given, *parameters, *self._known]
        with torch.no_grad(), AsInTraining(), LiveBytes(known) as live:
            shape = forward(given)
        without = live.peak
        # A gradient leaves as soon as it is whole: DeepSpeed copies it into its bucket.
        hooks = [p.register_post_accumulate_grad_hook(_drop_grad) for p in parameters if p.requires_grad]
        with AsInTraining(), LiveBytes([*known, shape]) as live:
            arriving = torch.empty_like(shape) if recomputes else None
            out = forward(given)
            kept = live.now
            is_trained = out.requires_grad
            if is_trained:
                arriving = torch.empty_like(shape) if arriving is None else arriving
                edge = torch.autograd.graph.get_gradient_edge(out)
                del out  # the next part is done with it by now
                torch.autograd.backward([edge], [arriving])  # type: ignore[list-item]
                given.grad = None
        for hook in hooks:
            hook.remove()
        if not is_trained:
            kept = 0  # nothing before the first trained part has a backward pass
        elif recomputes:
            kept = shape.nbytes
        if is_trained and given.is_floating_point() and not given.requires_grad:
            kept += given.nbytes  # which that first part keeps, and nobody before it has counted
        if not keeps_output:
            kept = max(0, kept - shape.nbytes)
        return Stage(name, kept, max(live.peak, without), without, shape.nbytes), shape


def _drop_grad(parameter: Tensor) -> None:
    parameter.grad = None


def kept_bytes(stages: Sequence[Stage]) -> int:
    """Of all parts, between the forward and the backward pass."""
    return sum(stage.kept for stage in stages)


def peak_of(stages: Sequence[Stage]) -> tuple[int, int, str]:
    """(kept by the parts before, bytes of the part at work, its name) at the moment when they take most."""
    before, worst = 0, (0, 0, "")
    for stage in stages:
        if before + stage.peak >= worst[0] + worst[1]:
            worst = (before, stage.peak, stage.name)
        before += stage.kept
    return worst


def forward_peak(stages: Sequence[Stage]) -> int:
    """Of a pass without gradients: each part with its input, beside the inputs of the pass."""
    return stages[0].kept + max(part.output + following.forward for part, following in pairwise(stages))
