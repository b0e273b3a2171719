"""Evaluation, export and sweeps on a real Slurm, queued by launch/submit.py and by hand."""

from __future__ import annotations

import json
from concurrent.futures import Future
from pathlib import Path

import pytest
from cluster import Cluster
from jobs import NUM_STEPS, PLACE, Job
from ranks import read_metrics
from safetensors import safe_open
from situations import SWEEP

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.xdist_group("slurm"), pytest.mark.timeout(1200)]


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_evaluate(cluster: Cluster, reference: Job, tmp_path: Path) -> None:
    """Two nodes score the last checkpoint as the training job did."""
    run, last = reference.output_dir, f"step-{NUM_STEPS:08d}"
    script = ["slurm/evaluate.sbatch", "--config", run / "config.yaml", "--out", tmp_path / "scores"]
    number = cluster.run("sbatch", "--parsable", *PLACE, *script, "--checkpoint", run / "checkpoints" / last)
    Job(cluster, number, run).wait_for_end()
    found = read_json(tmp_path / "scores" / "metrics.json")
    expected = read_json(run / "evaluations" / last / "metrics.json")
    for scores in (found, expected):
        assert scores.pop("about")
    assert found == expected


def test_submitted_sweep_with_what_comes_after(cluster: Cluster, sweep_and_after: Future[tuple[Path, str]]) -> None:
    """Check an array of two training jobs, and for each an evaluation and an export."""
    runs, printed = sweep_and_after.result()
    *_, train, train_job, after, _ = printed.splitlines()
    assert "slurm/train.sbatch" in train and "--array=0-1" in train and "--partition=main" in train
    number = after.partition("aftercorr:")[2].split()[0]
    assert train_job == f"job {number}"
    log = "\n".join(path.read_text(errors="replace") for path in cluster.checkout.glob(f"slurm-{number}*.log"))
    for task in (0, 1):
        assert cluster.job(f"{number}_{task}")["JobState"] == "COMPLETED", log
    for name, lr in SWEEP.items():
        rows = read_metrics(runs / name, "train")
        assert len(rows) == 3 and max(row["lr"] for row in rows) == lr
        assert read_json(runs / name / "scores" / "step-00000003" / "metrics.json")["num_images"] == 9, log
        with safe_open(next((runs / name / "exported" / "step-00000003").glob("*.safetensors")), "numpy") as file:
            assert file.keys()
