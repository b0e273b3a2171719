"""bench/gpu_speed.py is ready for a GPU: its code runs on CPU in toy sizes, and its FLOPs are the counted ones."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

PROGRAM = Path(__file__).resolve().parents[2] / "bench" / "gpu_speed.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    sys.path.insert(0, str(PROGRAM.parent))
    spec = importlib.util.spec_from_file_location("bench_gpu", PROGRAM)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    sys.path.remove(str(PROGRAM.parent))
    return module


@pytest.mark.slow
def test_every_case_runs_on_cpu(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--precisions", "tf32", "bf16", "--image-sizes", "28"]
    bench.main(["--device", "cpu", "--tiny", "--rounds", "1", *few])
    rows = re.findall(r"(\d+) px, K = (\d), checkpointing (\w+) .* turns/s,.* estimated", capsys.readouterr().out)
    assert rows == 2 * [("28", turns, kind) for turns in ("1", "8") for kind in ("none", "all")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    bench.main([])
    assert capsys.readouterr().out == "bench/gpu_speed.py: no CUDA GPU found; nothing was measured\n"


def test_the_planner_knows_these_cases(bench: ModuleType) -> None:
    config = bench.real_config().at_image_size(980)
    planned = {
        kind: bench.planned_bytes(config, bench.Case("bf16", 980, 8, kind)) / 2**30 for kind in bench.CHECKPOINTING
    }
    assert 0.5 < planned["all"] < planned["none"] < 20


def test_flops_are_those_that_torch_counts(bench: ModuleType) -> None:
    """But for attention: torch counts the masked half too."""
    config = bench.tiny_config()
    model = bench.resized(bench.build_model(config, torch.device("cpu"), torch.float32), config.at_image_size(28))
    batch = bench.batch_of(model.config, 8)
    inputs = {key: getattr(batch, key) for key in ("input_ids", "pixel_values", "position_ids", "block_ids", "labels")}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs, return_logits=False)
    counted = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    products = sum(flops for name, flops in counted.items() if "attention" not in name and "bmm" not in name)
    dimensions = [(2, 32, 5 * 5), (2, 32, 7 * 7 / 2 + 384 * 7 + 384 * 24)]  # layers, width, pairs: vision, language
    attention = sum(4 * layers * width * pairs for layers, width, pairs in dimensions)
    assert bench.step_flops(model, batch, model.config) == pytest.approx(3 * (products + attention), rel=1e-3)
