"""The model card of an export: what readers and the hub look for is in it, and nothing that is not theirs to know."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path, PurePosixPath

import pytest
import yaml
from PIL import Image
from ranks import run_program
from run_folder import STEP, write_run

from cogvlm_ft.config import load_config as load_settings
from cogvlm_ft.export.model_card import SHOWN_METRICS, find_hub_name
from cogvlm_ft.launch.export import main
from cogvlm_ft.model import CogVLMTokenizer, load_model
from cogvlm_ft.model.fingerprint import fingerprint
from cogvlm_ft.run_folder import step_name

BASE = "models/THUDM/cogvlm-grounding-generalist-hf"
SECRET = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture
def checkpoint(start_model: Path, tokenizer: CogVLMTokenizer, shards: Path, tmp_path: Path) -> Path:
    model, run = load_model(start_model), tmp_path / "run"
    settings = {
        "output_dir": run,
        "model.path": tmp_path / BASE,
        "data.shards": shards,
        "data.wording": REPOSITORY / "cogvlm_ft/grounding/wordings/box.yaml",
        "train.precision": "bf16",
        "tracking.entity": SECRET,
    }
    return write_run(run, model.config, tokenizer, model.named_parameters(), settings)


def card(checkpoint: Path, out: Path, *more: object) -> tuple[dict, str]:
    """Front matter and text."""
    arguments = ("--checkpoint", checkpoint, "--out", out, *more)
    assert main([str(argument) for argument in arguments]) == 0
    _, front, text = (out / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


def row(text: str, name: str) -> str:
    [found] = re.findall(rf"^\| {re.escape(name)} \| (.*) \|$", text, re.MULTILINE)
    return found


def test_what_it_says(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    metrics = {"mean_iou": 0.61234, "acc@0.5": 0.75, "mean_iou/language=zh": 0.123, "num_images": 9.0, "bleu": 1.0}
    facts = {"num_samples": 33, "code": {"commit": "fed321", "dirty": False}}
    identity = {"run_id": "a", "project": "p", "entity": SECRET, "name": None, "config": facts}
    (checkpoint.parents[1] / "run.json").write_text(json.dumps(identity))
    evaluation = checkpoint.parents[1] / "evaluations" / step_name(STEP)
    evaluation.mkdir(parents=True)
    (evaluation / "metrics.json").write_text(json.dumps({**metrics, "about": {"split": "val"}}))
    out = tmp_path / "exported"
    front, text = card(checkpoint, out, "--dtype", "bf16")
    assert front["pipeline_tag"] == "image-text-to-text"
    assert front["language"] == ["zh", "en"]
    assert front["base_model"] == "THUDM/cogvlm-grounding-generalist-hf"
    assert {"cogvlm", "visual-grounding"} <= set(front["tags"])
    assert row(text, "step, epoch") == f"{STEP}, 1"
    assert row(text, "samples in an epoch") == "33 (split train)"
    assert row(text, "sha256 of the training data") == f"`{'ab' * 32}`"
    assert row(text, "precision of training; of these weights") == "bf16; bfloat16"
    assert row(text, "input").startswith("56 x 56 px (16 patches of 14 px), photos squashed")
    assert row(text, "prompt template") == "`base`: `...`"
    assert row(text, "wording of questions and answers") == "box.yaml"
    assert row(text, "fingerprint of this folder") == f"`{fingerprint(out)}`"
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    code = row(text, "code of the training; of this export")
    assert code.startswith(f"commit fed321; commit {commit.stdout.strip()}")
    assert row(text, "`mean_iou`") == "0.6123" and row(text, "`acc@0.5`") == "0.75" and row(text, "`num_images`") == "9"
    assert "language=zh" not in text and "bleu" not in text
    assert "verified: " in text and "licence of the base model" in text and "许可证" in text
    assert "$" not in text


def test_nothing_of_this_machine_or_its_user(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    card(checkpoint, tmp_path / "exported")
    for path in (tmp_path / "exported").rglob("*"):
        content = path.read_bytes()
        for private in (SECRET, str(tmp_path), str(REPOSITORY), str(Path.home())):
            assert private.encode() not in content, f"{private} in {path.name}"


def test_a_hostile_value_is_text_in_the_card_and_a_link_is_not_copied(checkpoint: Path, tmp_path: Path) -> None:
    config = checkpoint.parents[1] / "config.yaml"
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    settings["model"]["path"] = "models/THUDM/x](http://evil) <script>\n---\nlicense: mit"
    settings["data"]["train_split"] = "a | b\x1b[2J `<img src=x>`"
    settings["data"]["wording"] = "${oc.env:HOME}/w.yaml"
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    (checkpoint / "model" / "planted.json").symlink_to(config)
    front, text = card(checkpoint, tmp_path / "exported", "--prove", 0)
    assert "base_model" not in front and front["license"] == "other"
    assert "<script>" not in text and "<img" not in text and "\x1b" not in text and "](http://evil" not in text
    assert row(text, "samples in an epoch").count("|") == 0
    assert row(text, "wording of questions and answers") == "w.yaml"
    assert not (tmp_path / "exported" / "planted.json").exists()


def test_what_is_not_known_is_said_so(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint.parents[1] / "config.yaml").unlink()
    front, text = card(checkpoint, tmp_path / "exported", "--prove", 0)
    assert "base_model" not in front
    assert row(text, "base model") == "not known"
    assert row(text, "samples in an epoch") == "not known (split not known)"
    assert "None at this step." in text and "They were not compared." in text


@pytest.mark.slow
def test_its_code_runs(checkpoint: Path, tmp_path: Path) -> None:
    """As a reader would: in a file of their own, beside the folder and a photo."""
    _, text = card(checkpoint, tmp_path / "exported", "--prove", 0)
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    Image.new("RGB", (80, 60), "red").save(tmp_path / "photo.jpg")
    (tmp_path / "ask.py").write_text(code + '\nprint("ids:", ids.shape[1] - len(inputs["input_ids"]))\n')
    done = run_program(["ask.py"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 1 <= int(done.stdout.rpartition("ids: ")[2]) <= 128


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/data/models--THUDM--cogvlm-chat-hf/snapshots/abc", "THUDM/cogvlm-chat-hf"),
        ("models/zai-org/cogvlm-base-490-hf", "zai-org/cogvlm-base-490-hf"),
        ("models/mine/cogvlm-base-490-hf", None),
        ("cogvlm-base-490-hf", None),
        ("", None),
    ],
)
def test_the_name_on_the_hub_is_never_guessed(path: str, name: str | None) -> None:
    assert find_hub_name(PurePosixPath(path)) == name


def test_the_metrics_it_shows_are_documented() -> None:
    documented = (REPOSITORY / "docs/metrics.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in documented for name in SHOWN_METRICS)
    assert load_settings(None, ["output_dir=o", "model.path=m", "data.shards=s"]).train.monitor in SHOWN_METRICS
