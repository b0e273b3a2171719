"""Checkpoints of adapters, with the folder and fingerprint of the base model instead of its weights.

model/adapter.json    the base's folder and fingerprint; rank, alpha, dropout, targets, parts in full
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from cogvlm_ft.checkpoints.reading import read_again
from cogvlm_ft.errors import CheckpointError
from cogvlm_ft.model.adapters import FACTORS, factor_name
from cogvlm_ft.model.configuration import CogVLMConfig
from cogvlm_ft.model.fingerprint import fingerprint
from cogvlm_ft.model.loading import (
    POSITION_TABLE,
    StoredTensor,
    interpolate_position_embedding,
    load_config,
    open_tensors,
    read_whole,
)
from cogvlm_ft.plain_files import read_json, real_path, write_text
from cogvlm_ft.settings import AdapterConfig

ADAPTER_FILE = "model/adapter.json"


@dataclass(frozen=True)
class AdapterRecord:
    """The base model and the settings that adapters were trained with.

    base: a model folder; base_sha256: its fingerprint.
    base_weights: the kind of its frozen linear layers in training, as `adapter.base`.
    """

    base: str
    base_sha256: str
    rank: int
    alpha: float
    dropout: float
    targets: list[str]
    full: list[str] = field(default_factory=list)
    base_weights: str | None = None

    @classmethod
    def of_run(cls, folder: Path, adapter: AdapterConfig) -> AdapterRecord:
        settings = adapter.rank or 0, adapter.alpha, adapter.dropout, adapter.targets, adapter.full, adapter.base
        return cls(str(real_path(folder)), fingerprint(folder), *settings)

    @property
    def settings(self) -> AdapterConfig:
        return AdapterConfig(self.rank, self.alpha, self.dropout, self.targets, self.full, base=self.base_weights)

    @classmethod
    def load(cls, checkpoint: Path) -> AdapterRecord | None:
        """Read the record of a checkpoint; None for a checkpoint of a whole model."""
        path = checkpoint / ADAPTER_FILE
        if not path.is_file():
            return None
        try:
            record = cls(**read_again(lambda: read_json(path)))
            texts = (record.base, record.base_sha256, *record.targets, *record.full)
            if not (all(isinstance(text, str) for text in texts) and type(record.rank) is int and record.rank > 0):
                raise ValueError("expected texts, and a rank of 1 or more")
            if not math.isfinite(record.alpha):
                raise ValueError(f"alpha={record.alpha}; expected a number")
            return record
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error!r}") from error

    def save(self, model_files: Path) -> None:
        write_text(model_files / Path(ADAPTER_FILE).name, json.dumps(asdict(self), indent=2) + "\n")


def check_same_adapters(checkpoint: Path, ours: AdapterRecord | None) -> None:
    """Raise CheckpointError if a run with other adapters, or on another base, would resume from the checkpoint."""
    stored = AdapterRecord.load(checkpoint)
    if stored is None or ours is None:
        if stored is not ours:
            kinds = {True: "the whole model", False: "adapters"}
            raise CheckpointError(
                f"{checkpoint}: found {kinds[stored is None]}; expected {kinds[ours is None]}, according to "
                "adapter.rank. Set adapter.rank as before, or use another output_dir"
            )
        return
    if stored.base_sha256 != ours.base_sha256:
        raise CheckpointError(
            f"model.path: found {ours.base} with fingerprint {ours.base_sha256[:12]}; expected {stored.base} with "
            f"{stored.base_sha256[:12]}, on which the adapters of {checkpoint} were trained. Set model.path to it, or "
            "take another output_dir"
        )
    for name in ("rank", "alpha", "targets", "full", "base"):
        found, expected = getattr(ours.settings, name), getattr(stored.settings, name)
        if found != expected:
            found, expected = ("null" if value is None else value for value in (found, expected))
            raise CheckpointError(
                f"adapter.{name}: found {found}; expected {expected}, with which {checkpoint} was trained. Set the "
                "same, or use another output_dir"
            )


@dataclass(frozen=True)
class MergedTensor:
    """base + alpha / rank * B A in fp32, computed where it is read. outer: B, float[rows, rank]; inner: A."""

    base: StoredTensor
    inner: StoredTensor
    outer: StoredTensor
    scale: float

    @property
    def shape(self) -> torch.Size:
        return self.base.shape

    def read(self, start: int, stop: int) -> Tensor:
        width, rank = math.prod(self.shape[1:]), self.inner.shape[0]
        first, last = start // width, -(-stop // width)
        outer = self.outer.read(first * rank, last * rank).reshape(-1, rank).float()
        change = (outer @ read_whole(self.inner, torch.float32)).reshape(-1)
        return self.base.read(start, stop).float() + self.scale * change[start - first * width : stop - first * width]


@dataclass(frozen=True)
class HeldTensor:
    """A tensor in memory."""

    values: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def read(self, start: int, stop: int) -> Tensor:
        return self.values.reshape(-1)[start:stop]


def merge_adapters(
    checkpoint: Path, record: AdapterRecord, factors: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Return every parameter of the model with its adapters merged, read when accessed.

    factors: what the checkpoint holds. Raises CheckpointError if the base is not where it was, or is another model now.
    """
    base = Path(record.base)
    found = fingerprint(base) if base.is_dir() else "no such folder"
    if found != record.base_sha256:
        raise CheckpointError(
            f"{checkpoint}: its base {base}: found {found[:14]}; expected the model with fingerprint "
            f"{record.base_sha256[:12]}. Restore it there, or create a link to it"
        )
    return merged_with_base(base, factors, record.alpha / record.rank, load_config(checkpoint / "model"))


def merged_with_base(
    base: Path, factors: Mapping[str, StoredTensor], scale: float, config: CogVLMConfig
) -> dict[str, StoredTensor]:
    """Return every parameter of a model folder with adapters merged, and with the parts that were trained in full."""
    weights: dict[str, StoredTensor] = {
        name: tensor for name, tensor in open_tensors(base).items() if not name.endswith(".inv_freq")
    }
    num_positions = config.vision["num_positions"]
    if weights[POSITION_TABLE].shape[0] != num_positions:
        table = read_whole(weights[POSITION_TABLE], torch.float32)
        weights[POSITION_TABLE] = HeldTensor(interpolate_position_embedding(table, num_positions))
    return merged(weights, factors, scale)


def merged(
    weights: Mapping[str, StoredTensor], factors: Mapping[str, StoredTensor], scale: float
) -> dict[str, StoredTensor]:
    """Return the weights of a model with adapters merged, and with the parts that were trained in full."""
    found: dict[str, StoredTensor] = {}
    for name, weight in weights.items():
        inner, outer = (factors.get(factor_name(name, factor)) for factor in FACTORS)
        adapted = MergedTensor(weight, inner, outer, scale) if inner is not None and outer is not None else weight
        found[name] = factors.get(name, adapted)
    return found
