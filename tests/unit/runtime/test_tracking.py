"""Tracking with the real wandb, offline; what it wrote is read back from its .wandb file."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cogvlm_ft.errors import ConfigError
from cogvlm_ft.runtime.tracking import Picture, Tracker

ROOT = Path(__file__).resolve().parents[3]
SECRET = "5ecre7" * 7


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No key and no setting of the person who runs the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "no-config"))


def read_lines(tracker: Tracker) -> list[dict[str, Any]]:
    return [json.loads(line) for line in tracker.metrics_path.read_text(encoding="utf-8").splitlines()]


def read_wandb_records(run_dir: Path) -> list[Any]:
    """Records of a finished run's .wandb file, whose end wandb's own process may write after `finish` returned."""
    (path,) = run_dir.glob("*.wandb")
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        records = parse_wandb_records(path.read_bytes())
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        time.sleep(0.05)
    raise AssertionError(f"{path}: wandb has not written its last record")


def parse_wandb_records(content: bytes) -> list[Any]:
    """Whole records of a .wandb file: 32 KiB blocks of chunks (crc u32, length u16, type u8: 1 whole, 2-4 parts)."""
    from wandb.proto.wandb_internal_pb2 import Record

    records, pending, position = [], b"", 7
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        pending += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4) and position <= len(content):
            records.append(Record.FromString(pending))
            pending = b""
    return records


def history_of(records: list[Any]) -> list[dict[str, Any]]:
    """Logged rows without wandb's own columns."""
    rows = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            pairs = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            rows.append({key: value for key, value in pairs.items() if not key.startswith("_")})
    return rows


# metrics.jsonl


@pytest.fixture
def tracker(tmp_path: Path) -> Tracker:
    return Tracker(tmp_path / "run", mode="disabled")


def test_every_record_is_one_line(tracker: Tracker) -> None:
    tracker.log_train(10, {"loss": 0.5, "lr": np.float32(0.25), "num_tokens": np.int64(7), "phase": "warm\u2028up\n"})
    tracker.log_val(1.0, 10, {"acc@0.5": 0.75})
    tracker.summary({"best_mean_iou": 0.5})
    assert read_lines(tracker) == [
        {"kind": "train", "step": 10, "loss": 0.5, "lr": 0.25, "num_tokens": 7, "phase": "warm\u2028up\n"},
        {"kind": "val", "epoch": 1.0, "step": 10, "acc@0.5": 0.75},
        {"kind": "summary", "best_mean_iou": 0.5},
    ]


def test_a_number_that_is_not_finite_becomes_null(tracker: Tracker) -> None:
    tracker.log_train(1, {"loss": float("nan"), "grad_norm": float("inf"), "other": np.float32("-inf")})
    assert read_lines(tracker) == [{"kind": "train", "step": 1, "loss": None, "grad_norm": None, "other": None}]


def test_a_line_is_on_disk_at_once(tracker: Tracker) -> None:
    tracker.log_train(1, {"loss": 1.0})
    assert tracker.metrics_path.read_bytes().endswith(b"}\n")


def test_a_resumed_run_drops_what_it_will_record_again(tracker: Tracker) -> None:
    for step in (1, 2, 3, 4):
        tracker.log_train(step, {"phase": "a\u2028b"})
    tracker.log_val(1, 4, {"mean_iou": 0.5})
    tracker.summary({"mean_iou": 0.5})
    tracker.truncate_after(2)
    tracker.log_train(3, {"loss": 0.5})
    assert [(line["kind"], line["step"]) for line in read_lines(tracker)] == [("train", 1), ("train", 2), ("train", 3)]
    assert [path.name for path in tracker.metrics_path.parent.iterdir()] == ["metrics.jsonl"]


def test_a_torn_last_line_is_dropped(tracker: Tracker) -> None:
    tracker.log_train(1, {"loss": 1.0})
    with tracker.metrics_path.open("a") as file:
        file.write('{"kind": "train", "step": 2, "lo')
    resumed = Tracker(tracker.metrics_path.parent, mode="disabled")
    resumed.truncate_after(5)
    resumed.log_train(2, {"loss": 0.5})
    assert [line["step"] for line in read_lines(resumed)] == [1, 2]


def test_a_file_that_holds_nothing_but_a_torn_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind')
    tracker = Tracker(tmp_path, mode="disabled")
    tracker.truncate_after(0)
    assert read_lines(tracker) == []


def test_without_wandb_there_is_no_run_but_an_id(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, mode="disabled")
    tracker.log_pictures(1, [])
    tracker.finish()
    assert tracker.run_dir is None
    assert len(tracker.run_id) == 8
    assert Tracker(tmp_path, mode="disabled", run_id="abc").run_id == "abc"


def test_an_unknown_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'on', wanted one of auto, online, offline, disabled"):
        Tracker(tmp_path, mode="on")


# W&B


@pytest.fixture(scope="module")
def offline_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[Any]]]:
    """The folder and records of one real offline run."""
    config = {"train": {"lr": 1e-5}, "name": "形状"}
    tracker = Tracker(tmp_path_factory.mktemp("run"), mode="offline", name="first", run_id="cafe0001", config=config)
    run_dir = tracker.run_dir
    assert run_dir is not None
    for step in range(300):
        tracker.log_train(step, {"loss": 1 / (step + 1), "grad_norm": float("nan") if step == 0 else 1.0})
    tracker.log_val(1, 300, {"mean_iou": 0.625})
    picture = Picture(
        key="scene-000001",
        image=Image.new("RGB", (56, 40), "red"),
        truth=[((1, 2, 30, 40), "1 红色圆形")],
        predicted=[((1.5, 2.5, 31, 39), "1"), ((9, 9, 3, 3), "2")],
        caption="iou 0.93",
    )
    tracker.log_pictures(1, [picture, picture])
    tracker.summary({"best_mean_iou": 0.625})
    tracker.finish()
    yield run_dir, read_wandb_records(run_dir)


def test_the_run_is_named_and_configured(offline_run: tuple[Path, list[Any]]) -> None:
    run_dir, records = offline_run
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert run_dir.name.endswith("-cafe0001")
    assert (run.run_id, run.project, run.display_name) == ("cafe0001", "cogvlm-ft", "first")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["train"] == {"lr": 1e-5}
    assert config["name"] == "形状"


def test_every_value_is_in_the_history(offline_run: tuple[Path, list[Any]]) -> None:
    rows = history_of(offline_run[1])
    assert rows[0] == {"train/step": 0, "train/loss": 1.0}
    assert rows[1:300] == [{"train/step": n, "train/loss": 1 / (n + 1), "train/grad_norm": 1.0} for n in range(1, 300)]
    assert rows[300] == {"epoch": 1, "val/step": 300, "val/mean_iou": 0.625}
    assert rows[301]["epoch"] == 1
    assert len(rows) == 302


def test_values_have_their_own_axes(offline_run: tuple[Path, list[Any]]) -> None:
    metrics = [record.metric for record in offline_run[1] if record.WhichOneof("record_type") == "metric"]
    assert {"train/step", "epoch"} <= {metric.name for metric in metrics}
    axes = {metric.glob_name: metric.step_metric for metric in metrics if metric.glob_name}
    assert axes == {"train/*": "train/step", "val/*": "epoch"}


def test_pictures_carry_both_kinds_of_boxes(offline_run: tuple[Path, list[Any]]) -> None:
    run_dir, records = offline_run
    shown = history_of(records)[301]
    assert shown["val/pictures/captions"] == ["scene-000001: iou 0.93"] * 2
    boxes = shown["val/pictures/all_boxes"][0]
    contents = {kind: json.loads((run_dir / "files" / boxes[kind]["path"]).read_text("utf-8")) for kind in boxes}
    assert set(contents) == {"ground_truth", "predictions"}
    (truth,) = contents["ground_truth"]["box_data"]
    assert truth["position"] == {"minX": 1.0, "minY": 2.0, "maxX": 30.0, "maxY": 40.0}
    assert (truth["domain"], truth["box_caption"]) == ("pixel", "1 红色圆形")
    assert [box["class_id"] for box in contents["predictions"]["box_data"]] == [1, 1]
    (image,) = (run_dir / "files/media/images/val").glob("*.png")
    assert Image.open(image).size == (56, 40)


def test_the_summary_is_recorded(offline_run: tuple[Path, list[Any]]) -> None:
    updates = [record.summary.update for record in offline_run[1] if record.WhichOneof("record_type") == "summary"]
    assert {item.key: item.value_json for update in updates for item in update}["best_mean_iou"] == "0.625"


def test_a_resumed_run_keeps_its_id(offline_run: tuple[Path, list[Any]], tmp_path: Path) -> None:
    resumed = Tracker(tmp_path, mode="offline", run_id="cafe0001")
    resumed.log_train(301, {"loss": 0.5})
    run_dir = resumed.run_dir
    resumed.finish()
    assert run_dir is not None and run_dir.name.endswith("-cafe0001")
    assert history_of(read_wandb_records(run_dir)) == [{"train/step": 301, "train/loss": 0.5}]


TRAIN_SHORTLY = """
import logging, os, pathlib, signal, time
from cogvlm_ft.runtime import tracking

logging.basicConfig()
tracking.INIT_TIMEOUT_S = 2
tracker = tracking.Tracker(".", mode="{mode}")
print(tracker.run_dir.name.split("-")[0] if tracker.run_dir else None)
{trouble}
for step in range(3):
    tracker.log_train(step, dict(loss=1.0))
tracker.summary(dict(loss=1.0))
tracker.finish()
"""

KILL_WANDB = """
for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
    pid, name, _, parent = stat.read_text().split()[:4]
    if parent == str(os.getpid()) and "wandb" in name:
        os.kill(int(pid), signal.SIGKILL)
        print("killed")
time.sleep(0.5)
"""


def train_shortly(folder: Path, mode: str, trouble: str = "", **env: str) -> tuple[str, str]:
    """Standard output and error of a short run in `folder`, which must end well and leave its metrics.

    A process of its own, because wandb reads its environment once and a broken wandb stays broken.
    """
    done = subprocess.run(
        [sys.executable, "-c", TRAIN_SHORTLY.format(mode=mode, trouble=trouble)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 4
    return done.stdout.strip(), done.stderr


@pytest.mark.parametrize("mode", ["online", "auto"])
def test_without_a_key_the_run_is_recorded_offline(tmp_path: Path, mode: str) -> None:
    started, log = train_shortly(tmp_path, mode, WANDB_BASE_URL="http://127.0.0.1:9")
    assert started == "offline"
    assert log.count("WARNING:cogvlm_ft") == 1
    assert "no API key found" in log


@pytest.mark.slow
def test_without_a_network_the_run_is_recorded_offline_and_the_key_nowhere(tmp_path: Path) -> None:
    started, log = train_shortly(tmp_path, "auto", WANDB_API_KEY=SECRET, WANDB_BASE_URL="http://127.0.0.1:9")
    assert started == "offline"
    assert log.count("WARNING:cogvlm_ft") == 1
    assert "connection refused" in log
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_the_environment_can_switch_wandb_off(tmp_path: Path) -> None:
    started, _ = train_shortly(tmp_path, "auto", WANDB_MODE="disabled")
    assert started == "None"
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the process of wandb through /proc")
def test_training_survives_the_death_of_wandb(tmp_path: Path) -> None:
    started, log = train_shortly(tmp_path, "offline", trouble=KILL_WANDB)
    assert started == "offline\nkilled"
    assert log.count("W&B stopped") == 1
