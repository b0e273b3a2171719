"""Estimate the memory of a run: of one GPU by kind, of the host and of the disk, from settings and tensor shapes.

Persistent memory (weights, gradients, master weights, Adam) is exact. Transient memory (gathered layers, activations,
...) follows the code of the model and the rules of DeepSpeed, and is within 15 % of measurements on CPU
(docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from cogvlm_ft.model import CogVLMConfig, CogVLMForCausalLM, enable_gradient_checkpointing
from cogvlm_ft.model.adapters import FULL, add_adapters
from cogvlm_ft.model.generation_memory import GenerationMemory, Pass
from cogvlm_ft.model.quantized import QuantizedLinear, held_bytes, quantized_bytes, replace_linears
from cogvlm_ft.pinned_memory import HOW_NOT_TO_ROUND
from cogvlm_ft.planning.activations import MicroBatchShape, Stage, forward_peak, kept_bytes, peak_of, probe_stages
from cogvlm_ft.planning.data_turns import longest_answer
from cogvlm_ft.planning.evaluation_memory import Holding, asked_pass, plan_passes
from cogvlm_ft.planning.host_memory import PinnedTensors, pinned_tensors
from cogvlm_ft.planning.zero3_coordinator import Gathered, module_order, simulate
from cogvlm_ft.planning.zero_settings import element_bytes, read_zero_settings
from cogvlm_ft.runtime.trained_parameters import freeze, parameter_groups
from cogvlm_ft.settings import Config

GIB = 2**30
ROUNDING_WORTH_REPORTING = 0.05  # of the host memory
PHASES = ("training", "evaluation")
ADAM_BYTES, MASTER_BYTES, AVERAGE_BYTES = 8, 4, 4  # fp32 moments; fp32 weights; their running averages
CUDA_BYTES = int(1.5 * GIB)  # the CUDA context, cuBLAS and NCCL of a process; an estimate
PROCESS_BYTES, WORKER_BYTES = 3 * GIB, GIB // 2  # host memory of a rank and of a loader process; estimates
FRAGMENTED_FRACTION = 0.05  # of a GPU's memory, that the caching allocator cannot use; an estimate
UNCERTAINTY = 1.15  # factor by which the estimate of transient memory may be off


@dataclass(frozen=True)
class Cluster:
    """Machines of a run. gpu_gib: memory of one GPU; host_gib: memory of one node, not judged if None.

    reserved_bytes: GPU memory of a process besides its tensors. rounded_up_to: bytes up to which torch rounds an
    allocation of pinned host memory, see pinned_memory.rounded_up_to.
    """

    num_nodes: int = 1
    gpus_per_node: int = 8
    gpu_gib: float = 79.0
    host_gib: float | None = None
    reserved_bytes: int = CUDA_BYTES
    on_cpu: bool = False
    rounded_up_to: float = 0.0

    @property
    def num_gpus(self) -> int:
        return self.num_nodes * self.gpus_per_node


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes. persistent, transient, evaluation: of one GPU, by kind; host: of one node, by kind; disk: of a checkpoint.
    rounding: of a node, what the kinds of `host` hold only because torch rounds pinned memory up.

    transient: in forward and backward, at the peak, which is at the module `moment`. update: in addition to persistent
    memory during the optimizer step. asked_together: images and turns in a pass of the evaluation. logits: of the loss
    alone, in the peak only if that is where it occurs.
    """

    persistent: dict[str, int]
    transient: dict[str, int]
    moment: str
    logits: int
    update: int
    evaluation: dict[str, int]
    asked_together: Pass
    host: dict[str, int]
    rounding: int
    disk: int
    num_parameters: int
    gathered: Gathered

    @property
    def persistent_bytes(self) -> int:
        return sum(self.persistent.values())

    @property
    def peaks(self) -> dict[str, int]:
        """Return the peak of tensors on a GPU for each phase."""
        transient = {"training": max(sum(self.transient.values()), self.update), "evaluation": self.evaluation_bytes}
        return {phase: self.persistent_bytes + size for phase, size in transient.items()}

    @property
    def host_peak(self) -> int:
        """Return the peak of a node: persistent parts, and the weights at the start or copies of a checkpoint."""
        host = self.host
        return host["programs"] + host["offloaded"] + max(host["start"], host["saving"])

    @property
    def evaluation_bytes(self) -> int:
        return sum(self.evaluation.values())


class Planner:
    """Estimates for one model under one DeepSpeed JSON; slow parts are computed once."""

    def __init__(self, config: Config, model_config: CogVLMConfig, cluster: Cluster) -> None:
        self.config, self.model_config, self.cluster = config, model_config, cluster
        self.zero = read_zero_settings(config, cluster.gpus_per_node)
        self._stages: dict[MicroBatchShape, list[Stage]] = {}

    def changed(self, config: Config | None = None, cluster: Cluster | None = None) -> Planner:
        """Return a planner for other settings or another cluster that reuses what they do not change."""
        other = Planner(config or self.config, self.model_config, cluster or self.cluster)
        ours, theirs = self.config, other.config
        if _has_same_model(ours, theirs):
            other.model, other._stages, other._numels = self.model, self._stages, self._numels
        if (theirs.model, theirs.adapter) == (ours.model, ours.adapter) and other.zero.rules == self.zero.rules:
            other.gathered = self.gathered
        return other

    @cached_property
    def model(self) -> CogVLMForCausalLM:
        """Build the model without data."""
        return build_on_meta(self.config, self.model_config)

    @cached_property
    def _quantized(self) -> list[QuantizedLinear]:
        """List the quantised layers of `adapter.base`."""
        return [module for module in self.model.modules() if isinstance(module, QuantizedLinear)]

    @cached_property
    def _numels(self) -> list[tuple[int, bool]]:
        """List (elements, whether it is trained) of every parameter and of every quantised weight."""
        numels = [(parameter.numel(), parameter.requires_grad) for parameter in self.model.parameters()]
        return numels + [(layer.in_features * layer.out_features, False) for layer in self._quantized]

    def _weights_bytes(self) -> int:
        """Return the bytes of a rank's part of the weights, as they are held in training."""
        element = element_bytes(self.config)
        total = self._partition_numel(self.cluster.num_gpus, trained_only=False) * element
        return total + sum(held_bytes(e) - e.in_features * e.out_features * element for e in self._quantized)

    @property
    def num_parameters(self) -> int:
        return sum(numel for numel, _ in self._numels)

    @property
    def num_trained(self) -> int:
        return sum(numel for numel, trained in self._numels if trained)

    @cached_property
    def gathered(self) -> Gathered:
        return simulate(module_order(self.model, self.zero.rules), self.zero.rules)

    def estimate(self, sequences: MicroBatchShape, *, evaluation: bool = True) -> MemoryEstimate:
        """Estimate the memory of a run. evaluation: whether to include it; if not, it counts as 0."""
        zero, cluster = self.zero, self.cluster
        stages = self.stages(sequences)
        kept, working, moment = self._peak(stages)
        transient = {"gathered layers": self._gathered_bytes(), "buckets": self._bucket_bytes()}
        transient |= {"activations": kept, "current layer": working}
        persistent = self._persistent()
        on_gpu = {kind: size for kind, (size, on_host) in persistent.items() if not on_host}
        on_host = {kind: size for kind, (size, on_host) in persistent.items() if on_host}
        size, asked = self._evaluation(sequences, sum(on_gpu.values())) if evaluation else (Pass(0, 0), {})
        host, rounding = self._host(sum(on_host.values()), cluster.gpus_per_node)
        return MemoryEstimate(
            persistent=dict.fromkeys(persistent, 0) | on_gpu,
            transient=transient,
            moment=moment,
            logits=next(stage.peak for stage in stages if stage.name == "logits"),
            update=0 if zero.offload_optimizer else self._update_bytes(),
            evaluation=asked,
            asked_together=size,
            host=host,
            rounding=rounding,
            disk=self._slices_bytes(num_ranks=1),
            num_parameters=self.num_parameters,
            gathered=self.gathered,
        )

    def stages(self, sequences: MicroBatchShape) -> list[Stage]:
        if sequences not in self._stages:
            self._stages[sequences] = probe_stages(self.model, sequences)
        return self._stages[sequences]

    def _partition_numel(self, num_ranks: int, *, trained_only: bool) -> int:
        """Return the elements of a rank: its padded partition of each tensor."""
        return sum(-(-numel // num_ranks) for numel, trained in self._numels if trained or not trained_only)

    def _persistent(self) -> dict[str, tuple[int, bool]]:
        """Return kind -> (bytes of a rank, whether they are in host memory)."""
        zero, num_ranks, element = self.zero, self.cluster.num_gpus, element_bytes(self.config)
        trained = self._partition_numel(num_ranks, trained_only=True)
        second = (
            self._partition_numel(zero.secondary_ranks, trained_only=False) * element if zero.secondary_ranks > 1 else 0
        )
        has_master = element == 2 or zero.offload_optimizer or zero.offload_param  # runtime.engine.share_fp32_weights
        # Offloaded gradients are in host memory twice: as they are accumulated, and in fp32 for the update.
        gradients = trained * (zero.grad_bytes + (4 if zero.offload_optimizer else 0))
        # A rank on CPU has no other memory to offload to.
        optimizer_away = zero.offload_optimizer and not self.cluster.on_cpu
        return {
            "weights": (self._weights_bytes(), zero.offload_param and not self.cluster.on_cpu),
            "second copy (hpZ)": (second, False),
            "gradients": (gradients, optimizer_away),
            "master weights": (trained * MASTER_BYTES if has_master else 0, optimizer_away),
            "Adam": (trained * ADAM_BYTES, optimizer_away),
            "averages": (trained * AVERAGE_BYTES if self.config.train.ema else 0, optimizer_away),
        }

    def _gathered_bytes(self) -> int:
        """Return the bytes of gathered parameters. A single rank always has all weights."""
        gathered, element = self.gathered, element_bytes(self.config)
        if self.cluster.num_gpus == 1:
            return (gathered.peak + gathered.persistent) * element if self.zero.offload_param else 0
        return (gathered.peak + gathered.persistent + gathered.largest_fetch) * element

    def _bucket_bytes(self) -> int:
        """Return the bytes of the gradient bucket, its copy sorted by rank, and one gradient larger than the bucket.

        Such a gradient is kept until the next one is complete. The two largest, of the embedding and of lm_head, are
        not: only small ones follow them, or none.
        """
        inner = self.model.model
        ends = {inner.embed_tokens.weight, self.model.lm_head.weight}
        sizes = [p.numel() for p in self.model.parameters() if p.requires_grad and p not in ends]
        bucket = min(self.zero.reduce_bucket, self._partition_numel(1, trained_only=True))
        waiting = max((size for size in sizes if size > self.zero.reduce_bucket), default=0)
        return (2 * bucket + waiting) * element_bytes(self.config)

    def _peak(self, stages: list[Stage]) -> tuple[int, int, str]:
        """Return peak_of, or, on CPU, the moment when gloo copies the gradient of lm_head to send it."""
        usual = peak_of(stages)
        head = self.model.lm_head.weight
        if not self.cluster.on_cpu or not head.requires_grad:
            return usual
        before = kept_bytes(stages[:-1])
        message = 2 * head.numel() * element_bytes(self.config)
        return max(usual, (before, message, "message"), key=lambda moment: moment[0] + moment[1])

    def _update_bytes(self) -> int:
        """Return the bytes of a sub-group's gradients in fp32, of its fused update, and those left from the pass."""
        zero = self.zero
        largest = max(max(group) for group in self._sub_groups())
        temporary = 8 if self.cluster.on_cpu else 0  # two more fp32 tensors: torch's AdamW on CPU is not fused
        per_element = 4 + (zero.grad_bytes if zero.grad_bytes != 4 else 0) + temporary
        bucket = min(zero.reduce_bucket, self._partition_numel(1, trained_only=True)) * element_bytes(self.config)
        is_whole = self.cluster.num_gpus == 1 and not zero.offload_param  # then nothing is gathered
        kept = 0 if is_whole else self.gathered.persistent * element_bytes(self.config)
        return largest * per_element + bucket + kept

    def _evaluation(self, sequences: MicroBatchShape, persistent: int) -> tuple[Pass, dict[str, int]]:
        """Estimate an evaluation within a training run: the pass that it chooses, and bytes by kind."""
        element = element_bytes(self.config)
        buckets = min(self.zero.reduce_bucket, self._partition_numel(1, trained_only=True)) * element
        size, kinds = self._asked(sequences, persistent + buckets, gathers=self.cluster.num_gpus > 1)
        return size, kinds | {"buckets": buckets}

    def _asked(self, sequences: MicroBatchShape, held: int, *, gathers: bool) -> tuple[Pass, dict[str, int]]:
        """Estimate an evaluation by a rank that holds that many bytes. gathers: whether its weights are partitioned."""
        element, cluster = element_bytes(self.config), self.cluster
        model = sequences.config_of(self.model_config)
        prompt = max(1, sequences.turn_tokens - sequences.labelled_tokens)
        memory = GenerationMemory(model, element, prompt, longest_answer(self.config, model))
        free = max(0, int(cluster.gpu_gib * GIB) - cluster.reserved_bytes - held)
        layerwise = self._gathered_bytes() if gathers or self.zero.offload_param else 0
        holding = Holding(free, self.num_parameters * element, layerwise, gathers)
        size, kinds = plan_passes(memory, self.config.evaluate, sequences, holding)
        return size, kinds | {"current layer": forward_peak(self.stages(asked_pass(sequences, size, prompt)))}

    def scoring(self, sequences: MicroBatchShape, quantized: str | None = None) -> dict[str, int]:
        """Estimate launch/evaluate.py on these GPUs, bytes of each: its part of the weights, and a pass.

        quantized: the kind of the linear layers' weights, on one GPU.
        """
        num_ranks = self.cluster.num_gpus
        weights = self._partition_numel(num_ranks, trained_only=False) * element_bytes(self.config)
        if quantized:
            weights = quantized_bytes(self.model, quantized, element_bytes(self.config))
        _, kinds = self._asked(sequences, weights, gathers=num_ranks > 1)
        return {"weights": weights, **kinds}

    def _slices_bytes(self, num_ranks: int) -> int:
        """Return the bytes that a rank writes to a checkpoint: fp32 weights; of trained ones, moments and averages.

        With adapters, these are all that it holds.
        """
        weights = self._partition_numel(num_ranks, trained_only=bool(self.config.adapter.rank)) * MASTER_BYTES
        per_trained = ADAM_BYTES + (AVERAGE_BYTES if self.config.train.ema else 0)
        return weights + self._partition_numel(num_ranks, trained_only=True) * per_trained

    def _sub_groups(self) -> Iterator[list[int]]:
        """Yield for each parameter group the elements of a rank in each of its sub-groups, as DeepSpeed forms them."""
        for group in parameter_groups(self.model, self.config.train):
            sizes = [0]
            for parameter in group["params"]:
                if sizes[-1] >= self.zero.sub_group:
                    sizes.append(0)
                sizes[-1] += -(-parameter.numel() // self.cluster.num_gpus)
            yield sizes

    def _host(self, offloaded: int, ranks: int) -> tuple[dict[str, int], int]:
        """Estimate host memory of a node: by kind, and how much of it is due to the rounding of pinned memory.

        A checkpoint saved in the background is copied into host memory first.
        """
        pinned, limit = self._pinned(), self.cluster.rounded_up_to
        rounding = {"offloaded": pinned.excess_of_offloaded(limit), "saving": pinned.excess_of_copies(limit)}
        per_rank = {
            "programs": PROCESS_BYTES + self.config.data.num_workers * WORKER_BYTES,
            "offloaded": offloaded + rounding["offloaded"],
            "start": self._weights_bytes(),
            "saving": self._slices_bytes(self.cluster.num_gpus) if self.config.checkpoint.background else 0,
        }
        per_rank["saving"] += rounding["saving"]
        return {kind: size * ranks for kind, size in per_rank.items()}, sum(rounding.values()) * ranks

    def _pinned(self) -> PinnedTensors:
        if self.cluster.on_cpu:
            return PinnedTensors([], [], [])
        parts = [(-(-numel // self.cluster.num_gpus), trained) for numel, trained in self._numels]
        num_copies = (4 if self.config.train.ema else 3) if self.config.checkpoint.background else 0
        return pinned_tensors(self.zero, element_bytes(self.config), parts, list(self._sub_groups()), copies=num_copies)


def _has_same_model(ours: Config, theirs: Config) -> bool:
    """Return whether two configs have the same tensors, and train the same of them."""
    first, second = (
        (config.model, config.adapter, config.train.precision, config.train.lr_scale) for config in (ours, theirs)
    )
    return first == second


def build_on_meta(config: Config, model_config: CogVLMConfig) -> CogVLMForCausalLM:
    """Build the model without data, set up as for a run."""
    with torch.device("meta"):
        model = CogVLMForCausalLM(model_config)
    nn.Module.to(model, torch.bfloat16 if config.train.precision == "bf16" else torch.float32)
    dtype = model.dtype
    if config.adapter.base:
        replace_linears(model, config.adapter.base, [FULL[part] for part in config.adapter.full])
    if config.adapter.rank:
        add_adapters(model, config.adapter, config.seed)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)  # adapters of quantised layers are made in fp32
    freeze(model, config)
    enable_gradient_checkpointing(model, config.model.gradient_checkpointing)
    return model.train()


@dataclass(frozen=True)
class Verdict:
    """status: fits | tight | too much. why: the arithmetic, in one line."""

    status: str
    why: str


def judge(estimate: MemoryEstimate, cluster: Cluster, phases: Sequence[str] = PHASES) -> Verdict:
    """Return too much if not even 15 % less transient memory fits, fits if 15 % more does, else tight."""
    phase = max(phases, key=estimate.peaks.__getitem__)
    persistent, peak = estimate.persistent_bytes, estimate.peaks[phase]
    capacity = int(cluster.gpu_gib * GIB)
    least = persistent + int((peak - persistent) / UNCERTAINTY)
    most = persistent + int((peak - persistent) * UNCERTAINTY) + cluster.reserved_bytes
    kinds = [f"{size / GIB:.1f} {kind}" for kind, size in estimate.persistent.items() if size]
    why = (
        f"{phase} takes {peak / GIB:.1f} GiB of a {'rank' if cluster.on_cpu else 'GPU'} ("
        + " + ".join([*kinds, f"{(peak - persistent) / GIB:.1f} transient"])
        + f"), plus {cluster.reserved_bytes / GIB:.1f} for the process; available are {cluster.gpu_gib:.1f}"
    )
    usable = capacity * (1.0 if cluster.on_cpu else 1 - FRAGMENTED_FRACTION)
    status = "too much" if least > capacity else "tight" if most > usable else "fits"
    if cluster.host_gib is None or cluster.on_cpu:
        return Verdict(status, why)
    needed, host = estimate.host_peak, int(cluster.host_gib * GIB)
    why += f". A node needs {needed / GIB:.0f} GiB of host memory; available are {cluster.host_gib:.0f}"
    if needed > host and estimate.rounding > ROUNDING_WORTH_REPORTING * needed:
        why += f", and {estimate.rounding / GIB:.0f} are due to torch's rounding of pinned memory. {HOW_NOT_TO_ROUND}"
    if estimate.host["offloaded"] > host:
        status = "too much"
    elif needed > host and status == "fits":
        status = "tight"
    return Verdict(status, why)
