"""Tracking with the real wandb, offline; what it wrote is read back from its .wandb file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ranks import run_program
from wandb_files import config_of, history_of, read_wandb_records, records_of, summary_of

from cogvlm_ft.errors import ConfigError, DataError
from cogvlm_ft.tracking.metrics_log import read_rows
from cogvlm_ft.tracking.tensorboard_log import check_tensorboard
from cogvlm_ft.tracking.tracker import Tracker, read_run_file
from cogvlm_ft.tracking.wandb_run import BoxedImage, val_key

SECRET = "5ecre7" * 7


def read_lines(tracker: Tracker) -> list[dict[str, Any]]:
    return [json.loads(line) for line in tracker.metrics_path.read_text(encoding="utf-8").splitlines()]


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
    assert sorted(path.name for path in tracker.metrics_path.parent.iterdir()) == ["metrics.jsonl", "run.json"]


@pytest.mark.parametrize(("evaluated_step", "kept"), [(-1, []), (0, [0]), (4, [0, 4])])
def test_what_will_be_evaluated_again_is_dropped(tracker: Tracker, evaluated_step: int, kept: list[int]) -> None:
    """A run that was killed between an evaluation and the checkpoint after it, or before its first checkpoint."""
    for step in (0, 4):
        tracker.log_val(step / 4, step, {"mean_iou": 0.5})
    tracker.truncate_after(4, evaluated_step)
    assert [line["step"] for line in read_lines(tracker)] == kept


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
    tracker.wandb.log_pictures(1, {})
    tracker.finish()
    assert tracker.run_dir is None
    assert len(tracker.run_id) == 8
    assert Tracker(tmp_path / "b", mode="disabled", run_id="abc").run_id == "abc"


def test_an_unknown_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'on'; expected one of auto, online, offline, disabled"):
        Tracker(tmp_path, mode="on")


def test_a_run_killed_before_its_first_checkpoint_keeps_its_id(tmp_path: Path) -> None:
    first = Tracker(tmp_path, mode="disabled", project="p", config={"seed": 1})
    again = Tracker(tmp_path, mode="disabled", project="p", config={"seed": 2})
    assert again.run_id == first.run_id
    assert read_run_file(tmp_path) == {
        "run_id": first.run_id, "project": "p", "entity": None, "name": None, "config": {"seed": 2}
    }  # fmt: skip
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(DataError, match=r"run\.json cannot be read \(KeyError"):
        Tracker(tmp_path, mode="disabled")


def test_rows_of_several_attempts_are_those_of_one_training(tmp_path: Path) -> None:
    rows = [
        {"kind": "val", "epoch": 0.0, "step": 0, "mean_iou": 0.0},
        *({"kind": "train", "step": step, "attempt": 1} for step in (1, 2, 3)),
        {"kind": "val", "epoch": 1.0, "step": 3, "mean_iou": 0.1},
        {"kind": "summary", "best_step": 3},
        *({"kind": "train", "step": step, "attempt": 2} for step in (2, 3, 4)),
        {"kind": "val", "epoch": 1.0, "step": 3, "mean_iou": 0.2},
        {"kind": "summary", "best_step": 4},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "train", "st')
    found = [(row["kind"], row.get("step"), row.get("attempt")) for row in read_rows(path)]
    assert found == [
        ("val", 0, None), ("train", 1, 1), ("train", 2, 2), ("train", 3, 2), ("val", 3, None), ("train", 4, 2),
        ("summary", None, None),
    ]  # fmt: skip
    assert read_rows(path)[-1]["best_step"] == 4
    assert read_rows(path)[4]["mean_iou"] == 0.2
    path.write_text("[1]\n")
    with pytest.raises(DataError, match=r"line 1: found '\[1\]'"):
        read_rows(path)
    with pytest.raises(DataError, match=r"expected the metrics\.jsonl of a run"):
        read_rows(tmp_path / "none.jsonl")


# W&B


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("mean_iou", "val/mean_iou"),
        ("acc@0.5", "val/acc_at_0_5"),
        ("acc@0.5/size=small", "val_by_size/acc_at_0_5/small"),
        ("mean_iou/source=街景 2", "val_by_source/mean_iou/街景_2"),
        ("mean_iou/share=<1%", "val_by_share/mean_iou/lt_1pct"),
        ("mean_iou/share=>10%", "val_by_share/mean_iou/gt_10pct"),
        ("mean_iou/targets=2+", "val_by_targets/mean_iou/2_plus"),
        ("acc@0.5/size=small/language=zh", "val_by_size_language/acc_at_0_5/small/zh"),
        ("probe/score", "val_probe/score"),
    ],
)
def test_a_metric_has_a_section_and_a_name_that_wandb_can_sort_by(name: str, key: str) -> None:
    assert val_key(name) == key


@pytest.fixture(scope="module")
def offline_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[Any]]]:
    """The folder and records of one real offline run."""
    config = {"train": {"lr": 1e-5}, "name": "形状", "data": {"shards": ["https://me:pass@host/a"]}}
    folder = tmp_path_factory.mktemp("run")
    tracker = Tracker(
        folder, mode="offline", name="first", run_id="cafe0001", config=config, lower_is_better={"unreadable"}
    )
    run_dir = tracker.run_dir
    assert run_dir is not None
    for step in range(300):
        loss, speed = 1 / (step + 1), {"images_per_s": 2.0, "data_wait_fraction": 0.01}
        tracker.log_train(step, {"loss": loss, "grad_norm": float("nan") if step == 0 else 1.0, **speed})
    for epoch, iou in ((1, 0.625), (2, 0.5)):
        tracker.log_val(epoch, 300, {"mean_iou": iou, "acc@0.5/size=small": iou, "unreadable": iou, "num_absent": iou})
    Image.new("RGB", (56, 40), "red").save(folder / "photo.jpg")
    boxes = {
        "truth": [((1, 2, 30, 40), "1 红色圆形", 0)],
        "answers": [((1.5, 2.5, 31, 39), "1", 1), ((9, 9, 3, 3), "2", 2)],
    }
    classes = {0: "truth", 1: "right answer", 2: "wrong answer"}
    picture = BoxedImage(folder / "photo.jpg", "scene-000001: iou 0.93", boxes, classes)
    tracker.wandb.log_pictures(1, {"same": [picture, picture], "worst": [picture], "newly_lost": []})
    tracker.wandb.log_table(1, ["question", "iou"], [["红色的圆?", 0.5], ["?", None]])
    tracker.summary({"best_mean_iou": 0.625})
    tracker.finish()
    yield run_dir, read_wandb_records(run_dir)


@pytest.mark.slow
def test_the_run_is_named_and_configured(offline_run: tuple[Path, list[Any]]) -> None:
    run_dir, records = offline_run
    (run,) = records_of("run", records)
    assert run_dir.name.endswith("-cafe0001")
    assert (run.run_id, run.project, run.display_name) == ("cafe0001", "cogvlm-ft", "first")
    config = config_of(records)
    assert config["train"] == {"lr": 1e-5}
    assert config["name"] == "形状"
    assert config["data"] == {"shards": ["https://host/a"]}


def test_every_value_is_in_the_history(offline_run: tuple[Path, list[Any]]) -> None:
    rows = history_of(offline_run[1])
    speed = {"speed/images_per_s": 2.0, "speed/data_wait_fraction": 0.01}
    assert rows[0] == {"train/step": 0, "train/loss": 1.0, **speed}
    assert rows[1:300] == [
        {"train/step": n, "train/loss": 1 / (n + 1), "train/grad_norm": 1.0, **speed} for n in range(1, 300)
    ]
    values = ("val/mean_iou", "val_by_size/acc_at_0_5/small", "val/unreadable", "val/num_absent")
    assert rows[300] == {"epoch": 1, "val/step": 300, **dict.fromkeys(values, 0.625)}
    assert [row["epoch"] for row in rows[300:]] == [1, 2, 1, 1]


def test_values_have_their_own_axes_and_the_best_of_each_is_kept(offline_run: tuple[Path, list[Any]]) -> None:
    metrics = records_of("metric", offline_run[1])
    assert {"train/step", "epoch"} <= {metric.name for metric in metrics}
    axes = {metric.glob_name: metric.step_metric for metric in metrics if metric.glob_name}
    on_steps, on_epochs = ("train/*", "speed/*"), ("val/*", "pictures/*", "predictions/*")
    assert axes == dict.fromkeys(on_steps, "train/step") | dict.fromkeys(on_epochs, "epoch")
    split = [metric.step_metric for metric in metrics if metric.name == "val_by_size/acc_at_0_5/small"]
    assert split == ["epoch"]
    summary = summary_of(offline_run[1])
    assert summary["val/mean_iou"] == {"max": 0.625, "last": 0.5}
    assert summary["val_by_size/acc_at_0_5/small"] == {"max": 0.625, "last": 0.5}
    assert summary["val/unreadable"] == {"min": 0.5, "last": 0.5}
    assert summary["val/num_absent"] == 0.5
    assert summary["best_mean_iou"] == 0.625


def test_pictures_have_boxes_of_three_classes(offline_run: tuple[Path, list[Any]]) -> None:
    run_dir, records = offline_run
    shown = history_of(records)[302]
    assert {key.split("/")[1] for key in shown if key.startswith("pictures/")} == {"same", "worst"}
    assert shown["pictures/same/captions"] == ["scene-000001: iou 0.93"] * 2
    boxes = shown["pictures/same/all_boxes"][0]
    contents = {kind: json.loads((run_dir / "files" / boxes[kind]["path"]).read_text("utf-8")) for kind in boxes}
    assert set(contents) == {"truth", "answers"}
    (truth,) = contents["truth"]["box_data"]
    assert truth["position"] == {"minX": 1.0, "minY": 2.0, "maxX": 30.0, "maxY": 40.0}
    assert (truth["domain"], truth["box_caption"], truth["class_id"]) == ("pixel", "1 红色圆形", 0)
    assert [box["class_id"] for box in contents["answers"]["box_data"]] == [1, 2]
    assert contents["answers"]["class_labels"] == {"0": "truth", "1": "right answer", "2": "wrong answer"}
    photos = list((run_dir / "files/media/images/pictures").glob("same*.jpg"))
    assert photos and all(Image.open(photo).size == (56, 40) for photo in photos)


def test_predictions_are_a_table(offline_run: tuple[Path, list[Any]]) -> None:
    run_dir, records = offline_run
    path = history_of(records)[303]["predictions/table/path"]
    table = json.loads((run_dir / "files" / path).read_text("utf-8"))
    assert table == {"columns": ["question", "iou"], "data": [["红色的圆?", 0.5], ["?", None]]}
    assert (run_dir.parent / "data" / "artifacts" / "staging").is_dir()  # not in the home folder


def test_a_resumed_run_keeps_its_id(offline_run: tuple[Path, list[Any]], tmp_path: Path) -> None:
    resumed = Tracker(tmp_path, mode="offline", run_id="cafe0001")
    resumed.log_train(301, {"loss": 0.5})
    run_dir = resumed.run_dir
    resumed.finish()
    assert run_dir is not None and run_dir.name.endswith("-cafe0001")
    assert history_of(read_wandb_records(run_dir)) == [{"train/step": 301, "train/loss": 0.5}]


TRAIN_SHORTLY = """
import logging, os, pathlib, signal, time
from cogvlm_ft.tracking import provenance, tracker, wandb_run

logging.basicConfig()
wandb_run.INIT_TIMEOUT_S = {timeout_s}
tracker = tracker.Tracker(".", mode="{mode}", config=provenance.provenance())
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


def train_shortly(folder: Path, mode: str, trouble: str = "", argument: str = "", **env: str) -> tuple[str, str]:
    """Standard output and error of a short run in `folder`, which must end well and leave its metrics.

    A process of its own, because wandb reads its environment once and a broken wandb stays broken.
    """
    program = folder.with_name(f"{folder.name}.py")
    program.write_text(TRAIN_SHORTLY.format(mode=mode, trouble=trouble, timeout_s=60 if mode == "offline" else 10))
    # Not the W&B service of this test process, which outlives the run and writes its files later.
    inherited = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}
    done = run_program([program, argument], cwd=folder, environment={**inherited, **env}, timeout_s=120)
    assert done.returncode == 0, done.stderr
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 4
    return done.stdout.strip(), done.stderr


@pytest.mark.parametrize("mode", ["online", "auto"])
def test_without_a_key_the_run_is_recorded_offline(tmp_path: Path, mode: str) -> None:
    """The home folder cannot be written, as with an arbitrary user in a container, or when its quota is used up."""
    table, home = 'tracker.wandb.log_table(1, ["a"], [["b"]])', {"HOME": "/proc/none", "XDG_DATA_HOME": ""}
    empty = {"WANDB_MODE": "", "WANDB_ENTITY": "", "WANDB_API_KEY": "\r\n"}
    started, log = train_shortly(tmp_path, mode, table, WANDB_BASE_URL="http://127.0.0.1:9", **home, **empty)
    assert started == "offline"
    assert log.count("WARNING:cogvlm_ft") == 1
    assert "no API key found" in log


@pytest.mark.slow
def test_without_a_network_the_run_is_recorded_offline_and_the_key_nowhere(tmp_path: Path) -> None:
    started, log = train_shortly(tmp_path, "auto", WANDB_API_KEY=SECRET, WANDB_BASE_URL="http://127.0.0.1:9")
    assert started == "offline"
    assert log.count("WARNING:cogvlm_ft") == 1
    assert "connection refused" in log
    assert_nowhere(SECRET, tmp_path)


def assert_nowhere(secret: str, folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not [path for path in files if secret.encode() in path.read_bytes()]


def test_keys_and_passwords_are_written_nowhere(tmp_path: Path) -> None:
    started, _ = train_shortly(
        tmp_path, "offline", argument=f"data.shards=https://me:{SECRET}@host/shards", WANDB_API_KEY=SECRET[::-1]
    )
    assert started == "offline"
    assert_nowhere(SECRET, tmp_path)
    assert_nowhere(SECRET[::-1], tmp_path)
    command = read_run_file(tmp_path)["config"]["command"]
    assert command.endswith("data.shards=https://host/shards")


def test_the_environment_can_switch_wandb_off(tmp_path: Path) -> None:
    started, _ = train_shortly(tmp_path, "auto", WANDB_MODE="disabled")
    assert started == "None"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "run.json"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the process of wandb through /proc")
def test_training_survives_the_death_of_wandb(tmp_path: Path) -> None:
    started, log = train_shortly(tmp_path, "offline", trouble=KILL_WANDB)
    assert started == "offline\nkilled"
    assert log.count("W&B stopped") == 1
    assert "Traceback" not in log


# TensorBoard


def test_tensorboard_holds_the_same_values_and_hides_what_was_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = tmp_path / "run"
    for attempt, last in ((0, 3), (1, 4)):  # the first attempt dies after step 3, its checkpoint is of step 2
        tracker = Tracker(run, mode="disabled", tensorboard=True)
        tracker.truncate_after(2 * attempt)
        for step in range(2 * attempt + 1, last + 1):
            tracker.log_train(step, {"loss": attempt + step / 4, "images_per_s": 8, "lr": None, "note": "warm-up"})
        tracker.log_val(1.0, last, {"acc@0.5": 0.75, "acc@0.5/size=small": 0.5})
        tracker.finish()
    tracker.log_train(9, {"loss": 1.0})  # after the end: metrics.jsonl only
    found = accumulator.EventAccumulator(str(run / "tensorboard")).Reload()
    scalars = {tag: [(each.step, each.value) for each in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    assert scalars["train/loss"] == [(1, 0.25), (2, 0.5), (3, 1.75), (4, 2.0)]
    assert scalars["val/acc_at_0_5"] == [(4, 0.75)] and scalars["val_by_size/acc_at_0_5/small"] == [(4, 0.5)]
    assert scalars["val/epoch"] == [(4, 1.0)] and "train/lr" not in scalars and "train/note" not in scalars
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tensorboard").write_text("a file in its place")
    blocked = Tracker(tmp_path / "other", mode="disabled", tensorboard=True)
    for step in (1, 2):
        blocked.log_train(step, {"loss": 0.5})
    assert caplog.text.count("TensorBoard stopped") == 1 and len(read_lines(blocked)) == 2
    monkeypatch.setattr("cogvlm_ft.tracking.tensorboard_log.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"tracking\.tensorboard: found true without the package"):
        check_tensorboard()
