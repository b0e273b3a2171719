"""Verify an exported folder: read it back from the disk and compare every weight with the checkpoint, bit by bit.

Equal weights, config and tokenizer give equal answers, since both run the same code. What rounding to bf16 changes in
the answers is measured by launch/evaluate.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from cogvlm_ft.errors import CheckpointError
from cogvlm_ft.model import load_config
from cogvlm_ft.model.loading import READ_ELEMENTS, FileTensor, Weight, open_tensors, weight_files
from cogvlm_ft.model.tokenizer import MODEL_FILE
from cogvlm_ft.plain_files import read_json, write_text
from cogvlm_ft.terminal import progress_bar

PROOF_FILE = "proof.json"
MAX_LISTED = 20
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
# Keys that an export writes itself, or that do not describe the model.
_FREE_KEYS = {
    "dtype",
    "torch_dtype",
    "transformers_version",
    "architectures",
    "_name_or_path",
    "num_key_value_heads",
    "auto_map",
}


@dataclass(frozen=True)
class Verification:
    """Result of a verification. problems: all that differs; empty: the export equals its checkpoint."""

    dtype: str
    num_tensors: int
    problems: list[str]

    def summary(self, source: str = "checkpoint") -> str:
        """Return the result in a sentence, with one line for each problem. source: what was exported."""
        if self.problems:
            return "\n  ".join([f"the export differs from its {source}:", *self.problems])
        return f"verified: {self.num_tensors} tensors equal those of the {source} bit for bit in {self.dtype}"

    def save(self, folder: Path) -> None:
        """Write proof.json."""
        write_text(folder / PROOF_FILE, json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Verification | None:
        """Read proof.json, also one with the comparison of answers that former versions made; None without one."""
        try:
            found = read_json(folder / PROOF_FILE)
            return cls(str(found["dtype"]), int(found["num_tensors"]), list(found["problems"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None


def verify_export(folder: Path, model_files: Path, contents: Mapping[str, Weight], dtype: torch.dtype) -> Verification:
    """Compare an exported folder with its source: config and tokenizer in `model_files`, and all tensors."""
    problems = compare_files(folder, model_files) or compare_tensors(folder, contents, dtype)
    return Verification(str(dtype).removeprefix("torch."), len(contents), problems)


def compare_files(folder: Path, model_files: Path) -> list[str]:
    """Return what differs in config.json and the tokenizer."""
    expected, tokenizer = load_config(model_files).to_dict(), (model_files / MODEL_FILE).read_bytes()
    try:
        found, same_tokenizer = load_config(folder).to_dict(), (folder / MODEL_FILE).read_bytes() == tokenizer
    except (CheckpointError, OSError, ValueError) as error:
        return [f"config.json or {MODEL_FILE} cannot be read: {error}"]
    keys = sorted((found.keys() | expected.keys()) - _FREE_KEYS)
    problems = [f"config.json: {key} differs" for key in keys if found.get(key) != expected.get(key)]
    return problems if same_tokenizer else [*problems, f"{MODEL_FILE} differs"]


def compare_tensors(folder: Path, contents: Mapping[str, Weight], dtype: torch.dtype) -> list[str]:
    """Return every tensor that is not its source rounded to `dtype`, bit for bit, or not finite; read in parts."""
    try:
        for path in weight_files(folder):
            _drop_from_page_cache(path)
        found = open_tensors(folder)
    except CheckpointError as error:
        return [str(error)]
    problems = [f"{name} is missing" for name in sorted(contents.keys() - found.keys())]
    problems += [f"{name} is unexpected" for name in sorted(found.keys() - contents.keys())]
    names = [name for name in contents if name in found]
    for name in progress_bar(names, desc="compare weights", unit="tensor"):
        problem = _compare_tensor(found[name], contents[name], dtype)
        problems += [f"{name}: {problem}"] if problem else []
    more = [f"and {len(problems) - MAX_LISTED} more"] if len(problems) > MAX_LISTED else []
    return problems[:MAX_LISTED] + more


def _drop_from_page_cache(path: Path) -> None:
    """Let the system drop its copy of a file in memory, so that it is read from the disk."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _compare_tensor(found: FileTensor, expected: Weight, dtype: torch.dtype) -> str:
    """Return what is wrong with a tensor, empty if nothing is."""
    size, num_unequal, num_not_finite = found.shape.numel(), 0, 0
    if found.shape != expected.shape:
        return f"found shape {list(found.shape)}, expected {list(expected.shape)}"
    for start in range(0, size, READ_ELEMENTS):
        stop = min(start + READ_ELEMENTS, size)
        here = found.read(start, stop)
        there = expected.reshape(-1)[start:stop] if isinstance(expected, Tensor) else expected.read(start, stop)
        if here.dtype != dtype:
            return f"found {here.dtype}, expected {dtype}"
        num_unequal += int((here.view(_BITS[dtype]) != there.to(dtype).view(_BITS[dtype])).sum())
        num_not_finite += int((~here.isfinite()).sum())
    if num_unequal:
        return f"{num_unequal} of {size} elements differ"
    if num_not_finite:
        return f"{num_not_finite} of {size} elements are not finite: training has destroyed these weights"
    return ""
