"""A model eleven times as large as its largest tensor: memory of its export, and an interruption half-way."""

from __future__ import annotations

import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from ranks import run_program
from run_folder import write_run
from torch import Tensor

from cogvlm_ft.checkpoints.model_folder import build_meta_model
from cogvlm_ft.errors import CheckpointError
from cogvlm_ft.export.export import export_checkpoint
from cogvlm_ft.model import CogVLMConfig, CogVLMTokenizer, load_model
from cogvlm_ft.model.loading import SINGLE_FILE

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).with_name("export_peak.py")
CONSTANT = 40 << 20  # parts that are being read and compared, headers, names
TIMEOUT_S = 240


@dataclass(frozen=True)
class Constant:
    """As large as it says, and made in parts."""

    shape: torch.Size
    value: float

    def read(self, start: int, stop: int) -> Tensor:
        return torch.full((stop - start,), self.value)


@dataclass(frozen=True)
class Made:
    checkpoint: Path
    largest_bytes: int
    total_bytes: int


@pytest.fixture(scope="module")
def large(tokenizer: CogVLMTokenizer, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The three tensors of each MLP stand side by side, each as large as any other of the model."""
    vision = dict(
        hidden_size=24, num_heads=3, intermediate_size=48, num_hidden_layers=1, image_size=56, num_positions=17
    )
    config = CogVLMConfig(
        vocab_size=16384,
        hidden_size=512,
        intermediate_size=16384,
        num_hidden_layers=1,
        num_attention_heads=8,
        template_version="base",
        vision_config=vision,
    )
    parameters = dict(build_meta_model(config).named_parameters())
    weights = ((name, Constant(value.shape, 1e-3 * len(name))) for name, value in parameters.items())
    run = tmp_path_factory.mktemp("large") / "run"
    settings = {"output_dir": run, "model.path": "start", "data.shards": shards}
    checkpoint = write_run(run, config, tokenizer, weights, settings)
    sizes = [value.nbytes for value in parameters.values()]
    assert sum(sizes) > 3 * (2 * max(sizes) + CONSTANT)
    return Made(checkpoint, max(sizes), sum(sizes))


@pytest.fixture
def small(start_model: Path, tokenizer: CogVLMTokenizer, shards: Path, tmp_path: Path) -> Path:
    model = load_model(start_model)
    settings = {"output_dir": "run", "model.path": "start", "data.shards": shards}
    return write_run(tmp_path / "run", model.config, tokenizer, model.named_parameters(), settings)


def measure(small: Path, large: Made, out: Path, dtype: str, verify: int) -> int:
    """Return by how many bytes the memory of an exporting process rises."""
    done = run_program([PROGRAM, small, large.checkpoint, out, dtype, verify])
    assert done.returncode == 0, done.stderr
    written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert written > large.total_bytes * (1.0 if dtype == "float32" else 0.5)
    rose = int(done.stdout.rpartition("rose by ")[2])
    print(f"rose by {rose / large.largest_bytes:.2f} of the largest tensor, {rose / large.total_bytes:.2f} of all")
    return rose


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_holds_two_tensors_at_most(small: Path, large: Made, tmp_path: Path, dtype: str) -> None:
    """In one of three runs: now and then the kernel maps tens of MiB more of the files that are read."""
    rises = (measure(small, large, tmp_path / f"exported{run}", dtype, 0) for run in range(3))
    assert any(rise < 2 * large.largest_bytes + CONSTANT for rise in rises)


def test_a_verification_never_holds_the_model(small: Path, large: Made, tmp_path: Path) -> None:
    """It compares in parts of 16 MiB, several of which are in memory at a time."""
    assert measure(small, large, tmp_path / "exported", "float32", 1) < 0.5 * large.total_bytes


def test_a_checkpoint_that_is_pruned_meanwhile(large: Made, tmp_path: Path) -> None:
    """Its run continues and has newer ones by now."""
    checkpoint, out = large.checkpoint, tmp_path / "exported"
    doomed = checkpoint.with_name(f".tmp-old-{checkpoint.name}")
    newer = checkpoint.with_name("step-00000009")
    newer.mkdir()
    shutil.copy(checkpoint / "manifest.json", newer)

    def prune() -> None:
        file = out.with_name(f".tmp-{out.name}") / SINGLE_FILE
        deadline = time.monotonic() + TIMEOUT_S
        while not (file.exists() and file.stat().st_size > large.largest_bytes) and time.monotonic() < deadline:
            time.sleep(0.001)
        checkpoint.rename(doomed)

    pruning = threading.Thread(target=prune)
    pruning.start()
    try:
        with pytest.raises(CheckpointError, match=r"was deleted while it was exported.*Available: step-00000009"):
            export_checkpoint(checkpoint, out, torch.float32)
        assert list(tmp_path.iterdir()) == []
    finally:
        pruning.join()
        doomed.rename(checkpoint)
        shutil.rmtree(newer)
