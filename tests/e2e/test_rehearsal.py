"""`launch/rehearse.py` at a small size: every step runs on a user's photos, and every path that it prints exists."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from cogvlm_ft.config import load_config
from cogvlm_ft.launch.rehearse import main
from cogvlm_ft.model import model_config_of
from cogvlm_ft.rehearsal.stand_in import with_model

pytestmark = pytest.mark.slow


def labelled_photos(folder: Path) -> Path:
    """Draw four photos with COCO annotations of two classes."""
    folder.mkdir()
    images, annotations = [], []
    for number in range(4):
        with Image.new("RGB", (80, 60), (20 * number, 90, 60)) as image:
            box = (5 + number, 10, 45 + number, 50)
            ImageDraw.Draw(image).rectangle(box, fill=(200, 30 * number, 40))
            image.save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 80, "height": 60})
        position = {"bbox": [box[0], 10, 40, 40], "area": 1600, "iscrowd": 0}
        annotations.append({"id": number + 1, "image_id": number, "category_id": 1 + number % 2, **position})
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "bus"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_rehearsal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    photos, out = labelled_photos(tmp_path / "photos"), tmp_path / "out"
    options = ["--num-photos", "3", "--steps", "3", "--out", str(out)]
    code = main([str(photos), *options, "evaluate.max_new_tokens=4"])
    printed, errors = capfd.readouterr()
    assert code == 0, printed + errors
    shown = dict(line.split(maxsplit=1) for line in printed.splitlines() if line.startswith(("report ", "pictures ")))
    assert Path(shown["report"]).is_file() and any(Path(shown["pictures"]).iterdir())
    assert "mean IoU" in printed and "has not learned the photos" in printed
    assert "val is empty: building again with --val-fraction 0.2" in printed, "a tenth of four photos is none"
    assert json.loads((out / "shards" / "index.json").read_bytes())["splits"]["val"]["num_samples"] == 1
    for num_nodes in (1, 2, 4):
        (verdict,) = [line for line in printed.splitlines() if line.startswith(f"  {num_nodes} x 8 GPUs of 80 GB: ")]
        assert "train.global_batch_size=" in verdict and len(verdict) <= 100
    commands = printed.partition("Its commands:")[2]
    assert f"data.shards={out / 'shards'}" in commands
    assert commands.count("hf download ") == commands.count(" --local-dir models/cogvlm-grounding-generalist\n") == 2
    evaluations = list((out / "run" / "evaluations").glob("*/predictions.jsonl"))
    keys = {json.loads(line)["key"] for line in evaluations[-1].read_text(encoding="utf-8").splitlines()}
    assert len(keys) == 3
    assert_any_program_has_a_tiny_model(out / "shards", tmp_path / "other")


def assert_any_program_has_a_tiny_model(shards: Path, run: Path) -> None:
    settings = ["model.path=tiny", "model.image_size=490", f"data.shards={shards}", f"output_dir={run}"]
    first, second = (with_model(load_config(None, settings)) for _ in range(2))
    assert first == second and first.model.folder.parent == run.parent
    assert model_config_of(first).image_size == 64
    assert [path.name for path in run.parent.glob(".*")] == [], "nothing is left of an attempt"
