"""Estimate the time of a step, an epoch and a checkpoint from multiplications, messages, bytes to disk, and speeds.

Multiplications are counted as the model needs them: each token by its own expert, the vision tower once per image,
causal attention by half of its square, the loss on labelled tokens, and three times the forward pass for a step.
Recomputation is not counted, as is usual for MFU: the given fraction includes its cost.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from cogvlm_ft.config import num_accum_steps
from cogvlm_ft.model import CogVLMForCausalLM
from cogvlm_ft.planning.activations import MicroBatchShape
from cogvlm_ft.planning.memory import MemoryEstimate, Planner
from cogvlm_ft.planning.zero_settings import element_bytes
from cogvlm_ft.settings import Config

GIGA = 1e9
# Dense matrix products of one H100 SXM by number format, in TFLOP/s; NVIDIA's data sheet.
H100_TFLOPS = {"bf16": 989.0, "tf32": 494.0, "fp32": 67.0}
UPDATE_BYTES = 28  # per weight: Adam reads weight, gradient and two moments, and writes three of them


@dataclass(frozen=True)
class Speeds:
    """Speeds of the machines. tflops: peak of a GPU; mfu: the fraction of it that training reaches.

    In GB/s: link_gb_s of a GPU to the others of its node, network_gb_s of a node to the others, pcie_gb_s of a GPU to
    its host, host_gb_s of a node's memory, gpu_gb_s of a GPU's memory, disk_gb_s of the file system for all nodes.
    """

    tflops: float
    mfu: float = 0.4
    link_gb_s: float = 300.0
    network_gb_s: float = 50.0
    pcie_gb_s: float = 20.0
    host_gb_s: float = 200.0
    gpu_gb_s: float = 2000.0
    disk_gb_s: float = 2.0


@dataclass(frozen=True)
class StepTime:
    """Estimate of one optimizer step, over all GPUs: seconds, floating point operations, bytes per GPU.

    num_tokens: of all images, with patches. flops: without recomputation; recomputed_flops: of recomputation.
    messages_bytes: received by each GPU. Seconds are those of the whole step.
    """

    num_images: int
    num_tokens: int
    num_micro_batches: int
    flops: float
    recomputed_flops: float
    messages_bytes: float
    compute_s: float
    messages_s: float
    update_s: float
    step_s: float
    checkpoint_s: float

    def epoch_s(self, num_images: int, saves: int = 1) -> float:
        """Return the seconds of training and saving, without evaluation."""
        return -(-num_images // self.num_images) * self.step_s + saves * self.checkpoint_s


def number_format(config: Config) -> str:
    return "bf16" if config.train.precision == "bf16" else "tf32" if config.train.tf32 else "fp32"


def time_step(planner: Planner, estimate: MemoryEstimate, sequences: MicroBatchShape, speeds: Speeds) -> StepTime:
    """Estimate a step. Messages overlap with computation under overlap_comm; copies to the host never do."""
    config, zero, cluster = planner.config, planner.zero, planner.cluster
    images, ranks = config.train.global_batch_size, cluster.num_gpus
    num_micro_batches = num_accum_steps(images, config.train.micro_batch_size, ranks)
    forward, recomputed = count_flops(planner.model, sequences)
    per_image = forward / sequences.num_images
    compute_s = 3 * per_image * images / (ranks * speeds.tflops * 1e12 * speeds.mfu)
    element = element_bytes(config)
    trained = planner.num_trained
    gathered = estimate.gathered.total * element
    reduced = trained * element
    volume = (gathered + reduced) * num_micro_batches * (ranks - 1) / ranks
    # With a second copy in the node (hpZ), gathering in the backward pass, half of the volume, stays in the node.
    crossing = gathered * (0.5 if zero.secondary_ranks > 1 else 1.0) + reduced
    nodes = cluster.num_nodes
    between_nodes = crossing * num_micro_batches * (nodes - 1) / nodes
    messages_s = max(volume / speeds.link_gb_s, between_nodes / speeds.network_gb_s) / GIGA
    update_s = _update_s(planner, estimate, trained, num_micro_batches, speeds)
    together = max(compute_s, messages_s) if zero.overlap_comm else compute_s + messages_s
    length = sequences.config_of(planner.model_config).num_patches + 3 + sequences.text_tokens
    return StepTime(
        num_images=images,
        num_tokens=images * length,
        num_micro_batches=num_micro_batches,
        flops=3 * per_image * images,
        recomputed_flops=recomputed / sequences.num_images * images,
        messages_bytes=volume,
        compute_s=compute_s,
        messages_s=messages_s,
        update_s=update_s,
        step_s=together + update_s,
        checkpoint_s=estimate.disk / speeds.disk_gb_s / GIGA,
    )


def _update_s(
    planner: Planner, estimate: MemoryEstimate, trained: int, num_micro_batches: int, speeds: Speeds
) -> float:
    """Return the seconds of the optimizer step, and of copies between GPU and host if either is offloaded."""
    zero, cluster, element = planner.zero, planner.cluster, element_bytes(planner.config)
    per_rank = trained / cluster.num_gpus
    copied = 0.0
    if zero.offload_optimizer:
        copied += per_rank * (zero.grad_bytes * num_micro_batches + element)
        update = per_rank * cluster.gpus_per_node * UPDATE_BYTES / speeds.host_gb_s
    else:
        update = per_rank * UPDATE_BYTES / speeds.gpu_gb_s
    if zero.offload_param:
        copied += estimate.gathered.total / cluster.num_gpus * element * num_micro_batches
    return (update + copied / speeds.pcie_gb_s) / GIGA


def count_flops(model: CogVLMForCausalLM, sequences: MicroBatchShape) -> tuple[float, float]:
    """Return the FLOPs of (forward pass, recomputation in the backward pass)."""
    config, recomputed = sequences.config_of(model.config), 0.0
    total = 0.0
    recomputing = [name for name, module in model.named_modules() if getattr(module, "gradient_checkpointing", False)]
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            numel = module.weight.numel()
            if isinstance(module, nn.Linear):  # a quantised one holds two weights in an element
                numel = module.in_features * module.out_features
            flops = 2.0 * numel * _tokens_through(name, config.num_patches, sequences)
            total += flops
            recomputed += flops if any(name.startswith(f"{layer}.") for layer in recomputing) else 0.0
    vision, prefix = config.vision, config.num_patches + 3
    turns = sequences.turns * (sequences.turn_tokens * prefix + sequences.turn_tokens**2 / 2)
    for layers, size, pairs in (
        (model.model.vision.transformer.layers, vision["hidden_size"], float(config.num_patches + 1) ** 2),
        (model.model.layers, config.hidden_size, prefix**2 / 2 + turns),
    ):
        per_layer = 4.0 * size * pairs
        total += per_layer * len(layers)
        recomputed += per_layer * sum(layer.gradient_checkpointing for layer in layers)
    return total * sequences.num_images, recomputed * sequences.num_images


def _tokens_through(name: str, num_patches: int, sequences: MicroBatchShape) -> int:
    """Count the tokens of one image with its turns that pass the linear layer of this name."""
    if name == "lm_head":
        return sequences.turns * sequences.labelled_tokens
    if name.startswith(("model.vision.linear_proj.", "model.vision.patch_embedding.")):
        return num_patches
    if name.startswith("model.vision.") or ".vision_expert_" in name or ".vision_mlp." in name:
        return num_patches + 1  # with cls; with boi
    return 2 + sequences.text_tokens  # with bos and eoi
