"""Evaluation, export and sweeps on a real Slurm, queued by launch/submit.py and by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from cluster import Cluster
from jobs import NUM_STEPS, PLACE, Job
from ranks import read_metrics
from safetensors import safe_open

pytestmark = [pytest.mark.slow, pytest.mark.slurm]


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_evaluate(cluster: Cluster, reference: Job, tmp_path: Path) -> None:
    """Two nodes score the last checkpoint as the training itself did."""
    run, last = reference.output_dir, f"step-{NUM_STEPS:08d}"
    script = ["slurm/evaluate.sbatch", "--config", run / "config.yaml", "--out", tmp_path / "scores"]
    number = cluster.run("sbatch", "--parsable", *PLACE, *script, "--checkpoint", run / "checkpoints" / last)
    Job(cluster, number, run).wait_for_end()
    found = read_json(tmp_path / "scores" / "metrics.json")
    wanted = read_json(run / "evaluations" / last / "metrics.json")
    for scores in (found, wanted):
        assert scores.pop("about")
    assert found == wanted


def test_submitted_sweep_with_what_comes_after(cluster: Cluster, settings: tuple[str, ...], tmp_path: Path) -> None:
    """An array of two trainings, and for each an evaluation and an export."""
    sweep = [{"name": "slow", "settings": ["train.lr=1e-4"]}, {"name": "fast", "settings": ["train.lr=2e-3"]}]
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    (tmp_path / "cluster.yaml").write_text("{partition: main, gpus_per_node: 1, cpus_per_task: 1, time: '10'}\n")
    command = [sys.executable, "launch/submit.py", "--cluster", tmp_path / "cluster.yaml", "--sweep"]
    command += [tmp_path / "sweep.yaml", "--after", *settings, "train.max_steps=3", f"output_dir={tmp_path / 'runs'}"]
    *_, train, after = cluster.run(*command).splitlines()
    assert "slurm/train.sbatch" in train and "--array=0-1" in train and "--partition=main" in train
    number = after.partition("aftercorr:")[2].split()[0]
    cluster.wait_until(lambda: not cluster.run("squeue", "--noheader"), "nothing is queued any more", 300)
    log = "\n".join(path.read_text(errors="replace") for path in cluster.checkout.glob(f"slurm-{number}*.log"))
    for task in (0, 1):
        assert cluster.job(f"{number}_{task}")["JobState"] == "COMPLETED", log
    for name, lr in (("slow", 1e-4), ("fast", 2e-3)):
        run = tmp_path / "runs" / name
        rows = read_metrics(run, "train")
        assert len(rows) == 3 and max(row["lr"] for row in rows) == lr
        assert read_json(run / "scores" / "step-00000003" / "metrics.json")["num_images"] == 9, log
        with safe_open(next((run / "exported" / "step-00000003").glob("*.safetensors")), "numpy") as file:
            assert file.keys()
