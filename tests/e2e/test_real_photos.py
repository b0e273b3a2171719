"""Real photos through every program: pack, train 20 steps on two ranks, stop, resume, evaluate, export, predict."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image
from ranks import REPOSITORY, read_metrics, run, run_program

from cogvlm_ft.checkpoints.checkpoint import list_checkpoints

DATA = REPOSITORY.parent / "shared" / "data"
COCO = DATA / "coco128_train"
RACCOONS = DATA / "voc_raccoon"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is missing"),
]


def program(*command: object) -> str:
    """Run a program to its end, which must be exit code 0, and return what it printed."""
    result = run_program(command)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def pack_coco(out: Path) -> Path:
    annotations = next(path for path in sorted(COCO.rglob("*.json")) if is_coco_instances(path))
    images = next(path.parent for path in sorted(COCO.rglob("*.jpg")))
    program("shards/build.py", "--format", "coco", "--images", images, "--annotations", annotations, "--out", out)
    return out


def is_coco_instances(path: Path) -> bool:
    content = json.loads(path.read_text(encoding="utf-8"))
    return isinstance(content, dict) and any("bbox" in a for a in content.get("annotations", []))


def pack_raccoons(folder: Path, out: Path) -> Path:
    """Pack Pascal VOC files, rewritten as the JSON lines that a user would write."""
    images = next(path.parent for path in sorted(RACCOONS.rglob("*.jpg")))
    lines = []
    for file in sorted(RACCOONS.rglob("*.xml")):
        boxes = [
            [float(box.findtext(side, "")) for side in ("xmin", "ymin", "xmax", "ymax")]
            for box in ET.parse(file).getroot().iter("bndbox")
        ]
        target = {"phrase": "浣熊", "language": "zh", "boxes": boxes}
        absent = {"phrase": "a fire engine", "language": "en", "boxes": []}
        lines.append(json.dumps({"image": f"{file.stem}.jpg", "targets": [target, absent]}, ensure_ascii=False))
    annotations = folder / "raccoons.jsonl"
    annotations.write_text("\n".join(lines) + "\n", encoding="utf-8")
    program("shards/build.py", "--format", "jsonl", "--images", images, "--annotations", annotations, "--out", out)
    return out


def settings(shards: Path, start_model: Path, output_dir: Path) -> list[str]:
    return [
        f"output_dir={output_dir}",
        f"model.path={start_model}",
        f"data.shards={shards}",
        "data.wording=description",
        "train.max_steps=12",
        "train.epochs=10",
        "train.global_batch_size=8",
        "train.micro_batch_size=4",
        "train.lr=1e-3",
        "train.log_every=2",
        "checkpoint.every_steps=6",
        "evaluate.max_samples=6",
        "evaluate.max_new_tokens=24",
        "tracking.mode=offline",
    ]


def test_from_photos_to_an_answer(start_model: Path, tmp_path: Path) -> None:
    shards = pack_coco(tmp_path / "shards")
    assert num_samples(shards) == 126
    run_dir = tmp_path / "run"
    common: Sequence[str] = settings(shards, start_model, run_dir)
    run(["launch/train.py", *common, "train.max_steps=6"], 2, tmp_path / "logs")
    resumed = run(["launch/train.py", *common], 2, tmp_path / "logs")
    assert "resuming from" in resumed
    losses = [row["loss"] for row in read_metrics(run_dir, "train")]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    checkpoint = list_checkpoints(run_dir / "checkpoints")[-1]
    assert checkpoint.name == "step-00000012"

    arguments = ["--config", run_dir / "config.yaml", "--checkpoint", checkpoint, "--out", tmp_path / "scores"]
    run(["launch/evaluate.py", *arguments], 2, tmp_path / "logs")
    scores = json.loads((tmp_path / "scores" / "metrics.json").read_text(encoding="utf-8"))
    assert scores["num_images"] == 6
    last = read_metrics(run_dir, "val")[-1]
    about = scores.pop("about")
    assert (about["protocol"], about["checkpoint"]) == ("ours", str(checkpoint))
    assert scores == {key: last[key] for key in scores}  # the same as the training's own last evaluation
    assert_answers(checkpoint, next(iter(sorted(COCO.rglob("*.jpg")))), tmp_path)


def test_from_own_lines_in_chinese_to_an_answer(start_model: Path, tmp_path: Path) -> None:
    """One rank, four steps: the other source, and phrases of two languages in one photo."""
    shards = pack_raccoons(tmp_path, tmp_path / "shards")
    assert num_samples(shards) == 200
    few = [
        "train.max_steps=4",
        "train.global_batch_size=2",
        "train.micro_batch_size=2",
        "train.log_every=1",
        "evaluate.before_training=false",
    ]
    program("launch/train.py", *settings(shards, start_model, tmp_path / "run"), *few)
    assert [row["step"] for row in read_metrics(tmp_path / "run", "train")] == [1, 2, 3, 4]
    (checkpoint,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert_answers(checkpoint, next(iter(sorted(RACCOONS.rglob("*.jpg")))), tmp_path)


def num_samples(shards: Path) -> int:
    index = json.loads((shards / "index.json").read_text(encoding="utf-8"))
    return sum(split["num_samples"] for split in index["splits"].values())


def assert_answers(checkpoint: Path, photo: Path, folder: Path) -> None:
    """Export the checkpoint, ask about the photo, and check that the answer is drawn on it."""
    program("launch/export.py", "--checkpoint", checkpoint, "--out", folder / "exported", "--dtype", "bf16")
    answer = program(
        *("launch/predict.py", "--model", folder / "exported", "--image", photo),
        *("--prompt", "浣熊在哪里?", "--out", folder / "answer.png", "--max-new-tokens", 16),
    )
    assert "drawn:" in answer
    assert Image.open(folder / "answer.png").width >= Image.open(photo).width
