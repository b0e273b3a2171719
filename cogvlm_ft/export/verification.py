"""Does an exported folder hold what its checkpoint holds? It is read back from the disk, and both are asked the same.

Weights are compared bit by bit. Then checkpoint and export answer the same questions, both run layer by layer in fp32
arithmetic, so that neither is ever in memory as a whole. The answers are those of teacher forcing: at each position of
the true answer the likeliest token, given the true tokens before it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from cogvlm_ft.data.collate import Batch
from cogvlm_ft.errors import CheckpointError
from cogvlm_ft.export.proof_samples import ProofSamples
from cogvlm_ft.grounding.boxes import parse_boxes
from cogvlm_ft.model import CogVLMTokenizer, load_config
from cogvlm_ft.model.cogvlm import IGNORE_INDEX
from cogvlm_ft.model.loading import READ_ELEMENTS, FileTensor, Weight, open_tensors, weight_files
from cogvlm_ft.model.streamed import streamed_logits
from cogvlm_ft.model.tokenizer import MODEL_FILE

MAX_LISTED = 20
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
# What an export states anew, or what is not of the model.
_FREE_KEYS = {"dtype", "torch_dtype", "transformers_version", "architectures", "_name_or_path"}


@dataclass(frozen=True)
class Likeness:
    """How like the answers of checkpoint and export are, over num_tokens positions.

    num_unequal: positions with other logits. largest_difference: of two logits. spread: standard deviation of the
    logits of a position, mean. equal_tokens: share of positions with the same likeliest token. num_with_boxes: answers
    in which the likeliest tokens make boxes, of either; equal_boxes: share of them with the same boxes, None without.
    """

    num_tokens: int
    num_unequal: int
    largest_difference: float
    spread: float
    equal_tokens: float
    num_with_boxes: int
    equal_boxes: float | None


@dataclass(frozen=True)
class Proof:
    """problems: what is wrong with the export; empty: it is proven. samples: what num_samples pictures are of.

    likeness: None if there is nothing to compare, because the weights already differ.
    """

    dtype: str
    num_tensors: int
    samples: str
    num_samples: int
    likeness: Likeness | None
    problems: list[str]

    def summary(self) -> str:
        """For people."""
        if self.problems or self.likeness is None:
            return "\n  ".join(["the export is not what its checkpoint is:", *self.problems])
        found = self.likeness
        boxes = "no answer has boxes"
        if found.equal_boxes is not None:
            boxes = f"same boxes in {found.equal_boxes:.1%} of {found.num_with_boxes} answers"
        return (
            f"proven: {self.num_tensors} tensors are bit for bit those of the checkpoint in {self.dtype}; "
            f"{self.num_samples} samples ({self.samples}), {found.num_tokens} tokens of true answers, each predicted "
            f"from those before it in fp32 arithmetic: largest difference of logits {found.largest_difference:.3g} "
            f"(their spread {found.spread:.3g}), same likeliest token {found.equal_tokens:.1%}, {boxes}"
        )


def prove_export(
    folder: Path,
    model_files: Path,
    contents: Mapping[str, Weight],
    dtype: torch.dtype,
    samples: ProofSamples,
) -> Proof:
    """Compare an exported folder with what it was made of: config and tokenizer in `model_files`, and all tensors."""
    problems = compare_files(folder, model_files) or compare_tensors(folder, contents, dtype)
    likeness = None
    if not problems:
        likeness = compare_answers(folder, model_files, contents, open_tensors(folder), samples)
        if not torch.isfinite(torch.tensor([likeness.largest_difference, likeness.spread])).all():
            likeness, problems = None, ["the logits are not finite numbers: training has destroyed these weights"]
        elif likeness.num_unequal and dtype == torch.float32:
            problems = [
                f"{likeness.num_unequal} of {likeness.num_tokens} positions have other logits, by up to "
                f"{likeness.largest_difference:.3g}; wanted exactly the same"
            ]
    num_samples = sum(len(batch.keys) for batch in samples.batches)
    return Proof(str(dtype).removeprefix("torch."), len(contents), samples.origin, num_samples, likeness, problems)


def compare_files(folder: Path, model_files: Path) -> list[str]:
    """What config.json and tokenizer say otherwise."""
    wanted, tokenizer = load_config(model_files).to_dict(), (model_files / MODEL_FILE).read_bytes()
    try:
        found, same_tokenizer = load_config(folder).to_dict(), (folder / MODEL_FILE).read_bytes() == tokenizer
    except (CheckpointError, OSError, ValueError) as error:
        return [f"config.json or {MODEL_FILE} cannot be read: {error}"]
    keys = sorted((found.keys() | wanted.keys()) - _FREE_KEYS)
    problems = [f"config.json: {key} differs" for key in keys if found.get(key) != wanted.get(key)]
    return problems if same_tokenizer else [*problems, f"{MODEL_FILE} differs"]


def compare_tensors(folder: Path, contents: Mapping[str, Weight], dtype: torch.dtype) -> list[str]:
    """Every tensor that is not, bit for bit, what it was made of, rounded to dtype; read from the disk, in parts."""
    try:
        for path in weight_files(folder):
            _forget(path)
        found = open_tensors(folder)
    except CheckpointError as error:
        return [str(error)]
    problems = [f"{name} is missing" for name in sorted(contents.keys() - found.keys())]
    problems += [f"{name} is too much" for name in sorted(found.keys() - contents.keys())]
    names = [name for name in contents if name in found]
    for name in tqdm(names, desc="compare weights", unit="tensor", disable=None):
        num_unequal = _count_unequal(found[name], contents[name], dtype)
        if num_unequal:
            problems.append(f"{name}: {num_unequal} of {found[name].shape.numel()} elements differ")
    more = [f"and {len(problems) - MAX_LISTED} more"] if len(problems) > MAX_LISTED else []
    return problems[:MAX_LISTED] + more


def _forget(path: Path) -> None:
    """Let the system drop its copy of a file in memory, so that it is read from the disk."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _count_unequal(found: FileTensor, wanted: Weight, dtype: torch.dtype) -> int:
    size, num_unequal = found.shape.numel(), 0
    if found.shape != wanted.shape:
        return size
    for start in range(0, size, READ_ELEMENTS):
        stop = min(start + READ_ELEMENTS, size)
        here = found.read(start, stop)
        there = wanted.reshape(-1)[start:stop] if isinstance(wanted, Tensor) else wanted.read(start, stop)
        if here.dtype != dtype:
            return size
        num_unequal += int((here.view(_BITS[dtype]) != there.to(dtype).view(_BITS[dtype])).sum())
    return num_unequal


def compare_answers(
    folder: Path,
    model_files: Path,
    weights: Mapping[str, Weight],
    exported: Mapping[str, Weight],
    samples: ProofSamples,
) -> Likeness:
    """Ask the checkpoint (model_files and weights) and the export the samples' questions."""
    tokenizer = CogVLMTokenizer.from_folder(folder)
    differences, spreads, same_tokens, boxes = [], [], [], []
    num_unequal = 0
    for batch in samples.batches:
        here = _logits(model_files, weights, batch, "ask the checkpoint")
        there = _logits(folder, exported, batch, "ask the export")
        num_unequal += int((here != there).any(dim=1).sum())
        differences.append((here - there).abs().amax(dim=1))
        spreads.append(here.std(dim=1))
        chosen = here.argmax(dim=1), there.argmax(dim=1)
        same_tokens.append(chosen[0] == chosen[1])
        boxes += [[parse_boxes(tokenizer.decode(ids)) for ids in pair] for pair in _by_turn(batch, *chosen)]
    with_boxes = [pair for pair in boxes if pair != [None, None]]
    return Likeness(
        num_tokens=sum(map(len, differences)),
        num_unequal=num_unequal,
        largest_difference=torch.cat(differences).max().item(),
        spread=torch.cat(spreads).mean().item(),
        equal_tokens=torch.cat(same_tokens).float().mean().item(),
        num_with_boxes=len(with_boxes),
        equal_boxes=sum(here == there for here, there in with_boxes) / len(with_boxes) if with_boxes else None,
    )


def _logits(folder: Path, weights: Mapping[str, Weight], batch: Batch, label: str) -> Tensor:
    inputs = {name: getattr(batch, name) for name in ("input_ids", "pixel_values", "position_ids", "block_ids")}
    return streamed_logits(load_config(folder), weights, inputs, batch.labels, label)


def _by_turn(batch: Batch, *tokens: Tensor) -> Iterator[list[list[int]]]:
    """i64[n] of the labelled positions -> for every answer, its part of each."""
    is_labelled = batch.labels[:, 1:] != IGNORE_INDEX
    turns = (batch.block_ids[:, 1:] + batch.block_ids.amax() * torch.arange(len(batch.keys))[:, None])[is_labelled]
    lengths = torch.unique_consecutive(turns, return_counts=True)[1].tolist()
    for parts in zip(*(part.split(lengths) for part in tokens), strict=True):
        yield [part.tolist() for part in parts]
