"""A real training whose first attempt is killed, sent to W&B afterwards as one run."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from ranks import run, run_program, started
from wandb_files import config_of, history_of, read_wandb_records, records_of, summary_of

from cogvlm_ft.errors import DataError
from cogvlm_ft.launch.wandb_sync import main
from cogvlm_ft.report.wandb_media import note_export, replay
from cogvlm_ft.tracking.metrics_log import read_rows

KEY = "p1anted" * 6


def wandb_folders(folder: Path) -> list[Path]:
    return sorted((folder / "wandb").glob("offline-run-*"))


def replayed(folder: Path, **arguments: Any) -> list[Any]:
    before = set(wandb_folders(folder))
    sent = replay(folder, mode="offline", **arguments)
    (new,) = set(wandb_folders(folder)) - before
    assert Path(sent.place).resolve() == new.resolve()
    return read_wandb_records(new)


# A made run folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of two attempts whose metrics somebody put one behind the other; without evaluations."""
    folder = tmp_path / "run"
    folder.mkdir()
    identity = {"run_id": "cafe0002", "project": "shapes", "entity": None, "name": "first", "config": {"seed": 1}}
    (folder / "run.json").write_text(json.dumps(identity))
    rows = [
        {"kind": "val", "epoch": 0.0, "step": 0, "mean_iou": 0.0},
        *({"kind": "train", "step": step, "loss": 10.0 + step, "step_s": 0.5} for step in (1, 2, 3)),
        *({"kind": "train", "step": step, "loss": float(step), "step_s": None} for step in (2, 3, 4)),
        {"kind": "val", "epoch": 1.0, "step": 4, "mean_iou": 0.5},
        {"kind": "summary", "best_step": 4},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.slow
def test_attempts_are_merged_and_every_step_is_sent_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = replayed(folder)
    (sent,) = records_of("run", records)
    assert (sent.run_id, sent.project, sent.display_name) == ("cafe0002", "shapes", "first")
    assert config_of(records)["seed"] == 1
    assert history_of(records) == [
        {"epoch": 0.0, "val/step": 0, "val/mean_iou": 0.0},
        {"train/step": 1, "train/loss": 11.0, "speed/step_s": 0.5},
        *({"train/step": step, "train/loss": float(step)} for step in (2, 3, 4)),
        {"epoch": 1.0, "val/step": 4, "val/mean_iou": 0.5},
    ]
    assert summary_of(records)["val/mean_iou"] == {"max": 0.5, "last": 0.5}
    assert summary_of(records)["best_step"] == 4
    assert caplog.text.count("sent without images and predictions") == 2


def test_a_run_can_be_sent_elsewhere(folder: Path) -> None:
    (sent,) = records_of("run", replayed(folder, project="others", new_run=True))
    assert sent.project == "others"
    assert sent.run_id != "cafe0002"


def test_an_export_is_noted_and_not_uploaded(folder: Path, tmp_path: Path) -> None:
    exported = tmp_path / "exported"
    exported.mkdir()
    (exported / "config.json").write_text("{}")
    (exported / "model.safetensors").write_bytes(bytes(1000))
    noted = note_export(folder, exported, "step-00000004", mode="offline")
    records = read_wandb_records(Path(noted.place))
    (run_record,) = records_of("run", records)
    assert run_record.run_id == "cafe0002"
    (artifact,) = records_of("artifact", records)
    assert (artifact.name, artifact.type) == ("model-cafe0002", "model")
    assert set(artifact.aliases) == {"latest", "step-00000004"}
    assert json.loads(artifact.metadata)["num_bytes"] == 1002
    entries = {entry.path: (entry.ref, entry.local_path) for entry in artifact.manifest.contents}
    assert entries["model.safetensors"] == (f"{exported.as_uri()}/model.safetensors", "")
    with pytest.raises(DataError, match="expected a model folder"):
        note_export(folder, tmp_path, "best", mode="offline")


def test_the_program_says_what_is_wrong(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "run.json cannot be read" in capsys.readouterr().err
    assert main([str(folder), "--mode", "disabled"]) == 2
    assert "--mode: found 'disabled'" in capsys.readouterr().err
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert main([str(folder)]) == 2
    assert "W&B is switched off" in capsys.readouterr().err


def test_without_a_key_nothing_is_sent_nor_recorded(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr("wandb.login", lambda **_: False)
    assert main([str(folder)]) == 2
    assert "nothing sent: run wandb login" in capsys.readouterr().err
    assert not (folder / "wandb").exists()


SEND = """
import pathlib, sys
from cogvlm_ft.tracking import wandb_run
from cogvlm_ft.launch.wandb_sync import main

wandb_run.INIT_TIMEOUT_S = 2
sys.exit(main([sys.argv[1]]))
"""


@pytest.mark.slow
def test_a_server_that_cannot_be_reached_is_an_error_here(folder: Path) -> None:
    """A training would go on offline; here sending is all there is to do. In a process of its own, as wandb needs."""
    environment = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    program = folder.with_name("send.py")
    program.write_text(SEND)
    done = run_program([program, folder], environment={**os.environ, **environment}, timeout_s=120)
    assert done.returncode == 2, done.stderr
    assert "ConfigError: W&B refused the run" in done.stderr
    assert "connection refused" in done.stderr
    assert "--mode offline" in done.stderr
    assert not wandb_folders(folder)


# A real one

TRACKED = """
import os, runpy, sys

for name in ("WANDB_MODE", "WANDB_SERVICE"):  # ranks of other tests have no W&B; this process has its own
    os.environ.pop(name, None)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def trained(shards: Path, start_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of two steps on one rank; a first attempt was killed before its first checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    program = folder / "tracked.py"
    program.write_text(TRACKED)
    arguments = [
        program, "launch/train.py", f"output_dir={folder / 'run'}", f"model.path={start_model}",
        f"data.shards={shards}",
        "data.num_workers=0", "train.epochs=2", "train.global_batch_size=17", "train.micro_batch_size=17",
        "train.patience=null", "evaluate.max_new_tokens=8", "evaluate.num_pictures=3", "tracking.mode=offline",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_API_KEY", KEY)
        with started([*arguments, "train.log_every=1"], 1, folder / "logs") as ranks:
            metrics = folder / "run" / "metrics.jsonl"
            deadline = time.monotonic() + 120
            while not (metrics.exists() and '"kind": "train"' in metrics.read_text()):
                assert time.monotonic() < deadline, ranks.output()
                time.sleep(0.02)
            ranks.kill()
        run(arguments, 1, folder / "logs")
    return folder / "run"


@pytest.mark.slow
def test_attempts_share_one_run_and_no_file_holds_the_key(trained: Path) -> None:
    folders = wandb_folders(trained)
    assert len(folders) == 2
    assert len({path.name.rpartition("-")[2] for path in folders}) == 1
    files = [path for path in trained.rglob("*") if path.is_file()]
    assert len(files) > 30
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


def without_random_names(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """W&B calls the artifact of a table something else every time."""
    return [{key: value for key, value in row.items() if not key.endswith("artifact_path")} for row in rows]


@pytest.mark.slow
def test_what_a_training_shows_is_what_its_replay_shows(trained: Path, tmp_path: Path) -> None:
    live = read_wandb_records(wandb_folders(trained)[-1])
    shutil.copytree(trained, tmp_path / "moved", ignore=shutil.ignore_patterns("wandb", "checkpoints"))
    sent = replayed(tmp_path / "moved")
    assert without_random_names(history_of(sent)) == without_random_names(history_of(live))
    assert config_of(sent).keys() == config_of(live).keys()
    config = {key: value for key, value in config_of(live).items() if key != "_wandb"}
    assert {key: config_of(sent)[key] for key in config} == config
    assert config["world_size"] == 1
    assert len(config["data_sha256"]) == len(config["val_data_sha256"]) == 64
    assert config["data_sha256"] != config["val_data_sha256"]
    assert config["command"].startswith("launch/train.py output_dir=")
    assert config["train"]["epochs"] == 2


@pytest.mark.slow
def test_a_training_shows_curves_pictures_and_predictions(trained: Path) -> None:
    run_dir = wandb_folders(trained)[-1]
    records = read_wandb_records(run_dir)
    history = history_of(records)
    assert [row["train/step"] for row in history if "train/loss" in row] == [1, 2, 3, 4]
    logged = {key for row in history for key in row}
    assert {"train/lr", "speed/images_per_s", "speed/data_wait_fraction", "speed/memory_gib"} <= logged
    assert {"val_by_size/acc_at_0_5/small", "val_by_language/mean_iou/zh", "val_by_targets/n_acc/0"} <= logged
    assert not [key for key in logged if re.search(r"[^\w/]", key)]
    assert [row["epoch"] for row in history if "val/mean_iou" in row] == [0, 1, 2]
    evaluations = [row for row in history if "pictures/same/captions" in row]
    keys = [[caption.partition(":")[0] for caption in row["pictures/same/captions"]] for row in evaluations]
    assert len(keys) == 3 and keys[0] == keys[1] == keys[2] and len(keys[0]) == 3
    assert all("pictures/worst/captions" in row for row in evaluations)
    tables = [row for row in history if "predictions/table/path" in row]
    assert [row["epoch"] for row in tables] == [0, 1, 2]
    table = json.loads((run_dir / "files" / tables[-1]["predictions/table/path"]).read_text("utf-8"))
    assert len(table["data"]) == len((trained / "evaluations/step-00000004/predictions.jsonl").read_text().splitlines())
    assert records_of("stats", records), "system metrics"
    assert summary_of(records)["val/mean_iou"].keys() == {"max", "last"}
    assert summary_of(records)["best_step"] == read_rows(trained / "metrics.jsonl")[-1]["best_step"]
