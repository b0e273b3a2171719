"""The pinned tensors of a run, and how much more host memory they take because torch rounds it up to powers of two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cogvlm_ft.pinned_memory import allocated_bytes
from cogvlm_ft.planning.zero_settings import ZeroSettings


@dataclass(frozen=True)
class PinnedTensors:
    """Bytes of one rank's pinned tensors. kept: as long as the run. freed: before training; torch keeps rounded ones.

    copies: of a checkpoint.
    """

    kept: Sequence[int]
    freed: Sequence[int]
    copies: Sequence[int]

    def excess_of_offloaded(self, rounded_up_to: float) -> int:
        """Return the bytes beyond the tensors' own that offloading takes."""
        cached = [size for size in self.freed if size <= rounded_up_to]
        return allocated_bytes(self.kept, rounded_up_to) - sum(self.kept) + allocated_bytes(cached, rounded_up_to)

    def excess_of_copies(self, rounded_up_to: float) -> int:
        """Return the bytes beyond the tensors' own that the copies of a checkpoint take."""
        return allocated_bytes(self.copies, rounded_up_to) - sum(self.copies)


def pinned_tensors(
    zero: ZeroSettings,
    element: int,
    parts: Sequence[tuple[int, bool]],
    groups: Sequence[Sequence[int]],
    *,
    copies: int,
) -> PinnedTensors:
    """List a rank's pinned tensors, as DeepSpeed's stage3.py and checkpoints/saver.py allocate them.

    element: bytes of a weight. parts: elements of each parameter's partition, and whether it is trained. groups: those
    of each sub-group of each parameter group. copies: tensors of a trained parameter that are copied for a checkpoint;
    0 if none is.
    """
    kept: list[int] = []
    freed: list[int] = []
    if zero.offload_optimizer and zero.pin_optimizer:
        kept.append(zero.grad_bytes * sum(map(sum, groups)))
        kept += [4 * numel for group in groups for numel in group]  # gradients in fp32, for the update
    if zero.offload_param:
        kept += [element * sum(group) for group in groups]  # DeepSpeed pins these whatever pin_memory is
    if zero.offload_param and zero.pin_param:
        # Every partition at first; those of trained parameters then move into the tensors above.
        kept += [element * numel for numel, trained in parts if not trained]
        freed += [element * numel for numel, trained in parts if trained]
    on_gpu = copies and not zero.offload_optimizer  # what is in host memory already is copied into plain memory
    copied = [4 * numel for numel, trained in parts for _ in range(copies if trained else 1)] if on_gpu else []
    return PinnedTensors(kept, freed, copied)
