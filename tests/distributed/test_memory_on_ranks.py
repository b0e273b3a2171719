"""Estimated memory against real engines: persistent memory to the byte, transient memory within 15 %."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from memory_peaks import SIZES, settings
from ranks import REPOSITORY, run

from cogvlm_ft.planning.activations import MicroBatchShape, kept_bytes, probe_stages
from cogvlm_ft.planning.memory import Cluster, Planner

PROGRAM = Path(__file__).with_name("memory_peaks.py")
TOLERANCE = 0.15
PERSISTENT = ("weights", "gradients", "master weights", "Adam")


def preset(folder: Path, **changes: object) -> Path:
    """Write zero3.json with limits that matter for small models."""
    written = json.loads((REPOSITORY / "configs/deepspeed/zero3.json").read_text(encoding="utf-8"))
    written["zero_optimization"] |= changes
    path = folder / "preset.json"
    path.write_text(json.dumps(written), encoding="utf-8")
    return path


def both(
    size: str, num_images: int, precision: str, checkpointing: str, deepspeed: Path, num_ranks: int, logs: Path
) -> tuple[dict[str, int], Planner]:
    """Return what rank 0 measured and the planner that estimates it."""
    output = run([PROGRAM, size, num_images, precision, checkpointing, deepspeed], num_ranks, logs)
    measured = json.loads(next(line for line in output.splitlines() if line.startswith('{"measured"')))["measured"]
    config = settings(num_images, precision, checkpointing, str(deepspeed), num_ranks)
    return measured, Planner(config, SIZES[size], Cluster(1, num_ranks, on_cpu=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "checkpointing", "limits"),
    [
        ("fp32", "all", {"stage3_prefetch_bucket_size": 4000, "stage3_max_reuse_distance": 30_000}),
        ("bf16", "2", {"stage3_prefetch_bucket_size": 9000, "stage3_max_live_parameters": 40_000}),
    ],
)
def test_what_lasts_and_what_is_gathered_on_two_ranks(
    precision: str, checkpointing: str, limits: dict[str, int], tmp_path: Path
) -> None:
    """Compare at odd sizes, so that the ranks' parts are padded."""
    deepspeed = preset(tmp_path, stage3_param_persistence_threshold=100, reduce_bucket_size=10_000, **limits)
    measured, planner = both("tiny", 2, precision, checkpointing, deepspeed, 2, tmp_path / "logs")
    estimate = planner.estimate(MicroBatchShape(num_images=2))
    assert {kind: estimate.persistent[kind] for kind in PERSISTENT} == {kind: measured[kind] for kind in PERSISTENT}
    assert (measured["master weights"] > 0) == (precision == "bf16")
    assert estimate.gathered.peak == pytest.approx(measured["gathered"], rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "all"])
def test_activations_of_a_middle_sized_model(checkpointing: str, tmp_path: Path) -> None:
    """Compare with resident memory; the gradient bucket exists before and so is not in what was measured."""
    deepspeed = preset(tmp_path, reduce_bucket_size=1_000_000)
    measured, planner = both("middle", 1, "fp32", checkpointing, deepspeed, 1, tmp_path / "logs")
    estimate = planner.estimate(MicroBatchShape())
    assert {kind: estimate.persistent[kind] for kind in PERSISTENT} == {kind: measured[kind] for kind in PERSISTENT}
    transient = estimate.transient["activations"] + estimate.transient["current layer"]
    assert transient == pytest.approx(measured["peak"], rel=TOLERANCE)
    kept = kept_bytes(probe_stages(planner.model, MicroBatchShape()))
    assert kept == pytest.approx(measured["kept"], rel=TOLERANCE)
    assert measured["peak"] > 50 * 2**20, "too little to distinguish from noise"
