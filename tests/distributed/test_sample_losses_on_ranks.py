"""Two ranks record the loss of every training sample, once an epoch, and the page of the run is written."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from ranks import read_metrics, run

from cogvlm_ft.data.index import load_index
from cogvlm_ft.tracking.sample_losses import read_sample_losses

pytestmark = pytest.mark.slow
STEPS_PER_EPOCH = 5  # 33 samples, 8 a step: the last step has one sample and seven fillers


def test_losses_of_single_samples(shards: Path, start_model: Path, tmp_path: Path) -> None:
    settings = [f"output_dir={tmp_path}/run", f"model.path={start_model}", f"data.shards={shards}"]
    settings += ["data.num_workers=0", "train.global_batch_size=8", "train.micro_batch_size=2", "train.lr=1e-3"]
    settings += ["evaluate.before_training=false", "evaluate.max_samples=4", "evaluate.max_new_tokens=4"]
    settings += ["train.patience=null", "tracking.mode=disabled"]
    for num_steps in (3, STEPS_PER_EPOCH + 2):  # the second goes on where the first ended
        run(["launch/train.py", *settings, f"train.max_steps={num_steps}"], 2, tmp_path)

    files = sorted((tmp_path / "run" / "sample_losses").iterdir())
    assert [file.name for file in files] == ["rank-00000.jsonl", "rank-00001.jsonl"]
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    metrics = read_metrics(tmp_path / "run", "train")
    assert [row["step"] for row in metrics] == list(range(1, STEPS_PER_EPOCH + 3))
    for row in metrics:
        of_step = [each for each in rows if each["step"] == row["step"]]
        mean = sum(each["loss"] for each in of_step) / sum(each["tokens"] for each in of_step)
        assert mean == pytest.approx(row["loss"], rel=1e-5)

    index = load_index(shards, "train")
    of_first_epoch = Counter(each["key"] for each in rows if each["epoch"] == 0)
    assert of_first_epoch == Counter(index.key(i) for i in range(len(index)))
    assert [len(of_epoch) for of_epoch in read_sample_losses(tmp_path / "run").values()] == [33, 16]

    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert 'id="curves"' in page and 'id="suspects"' in page and "data:image/jpeg;base64," in page
    last = tmp_path / "run" / "evaluations" / f"step-{STEPS_PER_EPOCH + 2:08d}"
    assert (last / "report.html").read_text(encoding="utf-8") == page
