"""Checkpoints of the official repository (SwissArmyTransformer, SAT): their names, read and written in parts.

The names are those of the official model classes (THUDM/CogVLM: utils/models/cogvlm_model.py, mixin.py and
eva_clip_model.py). Query, key and value have the same layout on both sides, and so has every other tensor but the cls
embedding, which is a row of an embedding there, of the same shape.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogvlm_ft.errors import CheckpointError
from cogvlm_ft.model.loading import READ_ELEMENTS, StoredTensor, check_keys
from cogvlm_ft.plain_files import read_bytes, sync
from cogvlm_ft.terminal import progress_bar

FILE_NAME = "mp_rank_00_model_states.pt"
LATEST = "latest"
"""File with the name of the folder that holds the weights."""
RELEASE = "1"
MAX_NAME = 100

_LAYER, _VIT = r"model\.layers\.(\d+)\.", r"model\.vision\.transformer\.layers\.(\d+)\."
_SAT_VIT = "mixins.eva.vit_model"
_NAMES = [
    (r"model\.embed_tokens\.weight", r"transformer.word_embeddings.weight"),
    (r"model\.norm\.weight", r"transformer.final_layernorm.weight"),
    (r"lm_head\.weight", r"mixins.lm.lm_head.weight"),
    (_LAYER + r"((?:input|post_attention)_layernorm\.weight)", r"transformer.layers.\1.\2"),
    (
        _LAYER + r"self_attn\.language_expert_(query_key_value|dense)\.weight",
        r"transformer.layers.\1.attention.\2.weight",
    ),
    (_LAYER + r"self_attn\.vision_expert_(query_key_value|dense)\.weight", r"mixins.rotary.vision_\2_list.\1.weight"),
    (_LAYER + r"mlp\.language_mlp\.gate_proj\.weight", r"mixins.mlp.gate_proj.\1.weight"),
    (_LAYER + r"mlp\.language_mlp\.up_proj\.weight", r"transformer.layers.\1.mlp.dense_h_to_4h.weight"),
    (_LAYER + r"mlp\.language_mlp\.down_proj\.weight", r"transformer.layers.\1.mlp.dense_4h_to_h.weight"),
    (_LAYER + r"mlp\.vision_mlp\.gate_proj\.weight", r"mixins.mlp.vision_gate_proj.\1.weight"),
    (_LAYER + r"mlp\.vision_mlp\.up_proj\.weight", r"mixins.mlp.vision_dense_h_to_4h_list.\1.weight"),
    (_LAYER + r"mlp\.vision_mlp\.down_proj\.weight", r"mixins.mlp.vision_dense_4h_to_h_list.\1.weight"),
    (r"model\.vision\.(boi|eoi)", r"mixins.eva.\1"),
    (r"model\.vision\.linear_proj\.(.+)", r"mixins.eva.linear_proj.\1"),
    (r"model\.vision\.patch_embedding\.cls_embedding", rf"{_SAT_VIT}.transformer.word_embeddings.weight"),
    (
        r"model\.vision\.patch_embedding\.position_embedding\.weight",
        rf"{_SAT_VIT}.transformer.position_embeddings.weight",
    ),
    (r"model\.vision\.patch_embedding\.(proj\..+)", rf"{_SAT_VIT}.mixins.patch_embedding.\1"),
    (_VIT + r"mlp\.fc1\.(.+)", rf"{_SAT_VIT}.transformer.layers.\1.mlp.dense_h_to_4h.\2"),
    (_VIT + r"mlp\.fc2\.(.+)", rf"{_SAT_VIT}.transformer.layers.\1.mlp.dense_4h_to_h.\2"),
    (_VIT + r"((?:attention|input_layernorm|post_attention_layernorm)\..+)", rf"{_SAT_VIT}.transformer.layers.\1.\2"),
]
_NOT_WEIGHTS = re.compile(r"\.inv_freq$|^transformer\.position_embeddings\.weight$")
"""Ignored entries: buffers that are recomputed here, and a table that is unused with rotary positions."""
_LORA = re.compile(r"\.(matrix_[AB]|lora_)")


def sat_name(name: str) -> str:
    """Return SAT's name of a parameter of this package."""
    for pattern, theirs in _NAMES:
        found = re.fullmatch(pattern, name)
        if found:
            return found.expand(theirs)
    raise KeyError(name)


def find_file(path: Path) -> Path:
    """Return the file of the weights: `path`, or that of the folder whose `latest` names the release."""
    if path.is_file():
        return path
    latest = path / LATEST
    release = read_bytes(latest).decode("utf-8", "replace").strip()[:MAX_NAME] if latest.is_file() else RELEASE
    for file in (path / release / FILE_NAME, path / FILE_NAME):
        if Path(release).name == release and file.is_file():
            return file
    raise CheckpointError(f"{path}: found no {FILE_NAME}; expected it, or a folder with {LATEST} and it below")


def open_sat(path: Path, expected: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return the tensors of a SAT checkpoint by the names of this package, mapped from the file.

    expected: names and shapes. Raises CheckpointError for another model, one in several model-parallel parts, or one
    whose LoRA is not merged.
    """
    file = find_file(path)
    if list(file.parent.glob("mp_rank_01_*")):
        raise CheckpointError(f"{file.parent}: found several parts; expected model-parallel 1. Merge them with SAT")
    module = _load(file)
    lora = next((key for key in module if _LORA.search(key)), None)
    if lora:
        raise CheckpointError(f"{file}: found {lora}; expected merged weights. Merge LoRA with SAT's merge_model.py")
    names = {sat_name(name): name for name in expected}
    tensors = {names.get(key, key): value for key, value in module.items() if not _NOT_WEIGHTS.search(key)}
    check_keys(file, dict(expected), {name: tuple(value.shape) for name, value in tensors.items()})
    return {name: tensors[name] for name in expected}


def _load(file: Path) -> dict[str, Tensor]:
    try:
        found: Any = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # of many kinds: a zip archive, a pickle
        raise CheckpointError(f"{file}: {error!r:.200}; expected a checkpoint of SAT with tensors only") from error
    module: Any = found.get("module") if isinstance(found, dict) else None
    texts_to_tensors = isinstance(module, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in module.items()
    )
    if not texts_to_tensors:
        raise CheckpointError(f"{file}: found no tensors under 'module'; expected a checkpoint of SAT")
    return module


def write_sat(folder: Path, weights: Mapping[str, StoredTensor], dtype: torch.dtype) -> None:
    """Write a new folder with the weights in SAT's layout, one tensor in memory at a time."""
    (folder / RELEASE).mkdir(parents=True)
    file = folder / RELEASE / FILE_NAME
    empty = {sat_name(name): torch.empty(weight.shape, dtype=dtype) for name, weight in weights.items()}
    with torch.serialization.skip_data():  # memory that is never touched is never used
        torch.save({"module": empty}, file)
    del empty
    with file.open("r+b") as written:  # all of it, now: writing to a mapped part for which there is no room is SIGBUS
        os.posix_fallocate(written.fileno(), 0, file.stat().st_size)
    with torch.serialization.set_default_mmap_options(_MAP_SHARED), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.load(file, mmap=True, weights_only=True)["module"]
    for name, weight in progress_bar(weights.items(), desc="write weights", unit="tensor"):
        flat = module.pop(sat_name(name)).view(-1)
        for start in range(0, len(flat), READ_ELEMENTS):
            stop = min(start + READ_ELEMENTS, len(flat))
            flat[start:stop] = weight.read(start, stop)
    del module, flat
    sync(file)
    (folder / LATEST).write_text(RELEASE, encoding="utf-8")


_MAP_SHARED = 1
"""mmap.MAP_SHARED: what is written to a tensor is written to its file."""
