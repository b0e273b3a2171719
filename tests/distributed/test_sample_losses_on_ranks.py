"""Two ranks record the loss of every training sample once an epoch, and the run's page is written."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from ranks import read_metrics
from reference import NUM_SAMPLES, NUM_STEPS

from cogvlm_ft.data.index import load_index
from cogvlm_ft.tracking.sample_losses import read_sample_losses

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("shared runs")]


def test_losses_of_single_samples(reference_run: Path, shards: Path) -> None:
    files = sorted((reference_run / "sample_losses").iterdir())
    assert [file.name for file in files] == ["rank-00000.jsonl", "rank-00001.jsonl"]
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    metrics = read_metrics(reference_run, "train")
    assert [row["step"] for row in metrics] == list(range(1, NUM_STEPS + 1))
    for row in metrics:
        of_step = [each for each in rows if each["step"] == row["step"]]
        mean = sum(each["loss"] for each in of_step) / sum(each["tokens"] for each in of_step)
        assert mean == pytest.approx(row["loss"], rel=1e-5)

    index = load_index(shards, "train")
    of_first_epoch = Counter(each["key"] for each in rows if each["epoch"] == 0)
    assert of_first_epoch == Counter(index.key(i) for i in range(len(index)))
    epochs = [len(of_epoch) for of_epoch in read_sample_losses(reference_run).values()]
    assert epochs == [NUM_SAMPLES, NUM_SAMPLES, NUM_SAMPLES, 12]

    assert (reference_run / "preview.html").read_text(encoding="utf-8").count("<figure") == 16
    page = (reference_run / "report.html").read_text(encoding="utf-8")
    assert 'id="curves"' in page and 'id="suspects"' in page and "data:image/jpeg;base64," in page
    last = reference_run / "evaluations" / f"step-{NUM_STEPS:08d}"
    assert (last / "report.html").read_text(encoding="utf-8") == page
