"""The command of a rehearsal's training run."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

import pytest

from cogvlm_ft.config import load_config
from cogvlm_ft.launch.rehearse import commands_of_real_run, main, real_config
from cogvlm_ft.rehearsal.training import Chosen, training_command, training_settings
from cogvlm_ft.rehearsal.verdict import advice_on_size
from cogvlm_ft.runtime.distributed import check_gpus


@pytest.mark.parametrize("num_processes", [1, 2])
def test_on_the_cpu_a_gpu_of_the_machine_is_left_alone(
    num_processes: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "nvidia0").touch()
    command, environment = training_command(["a=1"], num_processes)
    assert command[-3:] == ["-m", "cogvlm_ft.launch.train", "a=1"]
    # The launcher of several processes overwrites the variable: each process unsets it again.
    visible = environment if num_processes == 1 else dict(part.split("=") for part in command if "DEVICES=" in part)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible["CUDA_VISIBLE_DEVICES"])
    check_gpus(tmp_path)


def test_what_the_real_run_says_of_the_17b_model_is_left_out(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(
        "train: {ema: 0.99, lr_scale: {'lm_head.*': 0.0}, vision_layer_decay: 0.9}\n"
        "data: {tiles: {side_px: 640}, max_sequence_length: 64, augment: {crop: 0.5}, wording: detection}\n"
        "adapter: {rank: 8}\nmodel: {freeze: ['model.vision.*']}\n",
        encoding="utf-8",
    )
    chosen = Chosen(num_photos=3, num_boxes=3, num_parameters=1)
    settings = load_config(str(config), training_settings(chosen, tmp_path, 10, 1))
    assert (settings.train.ema, settings.train.lr_scale, settings.train.vision_layer_decay) == (None, {}, 1)
    assert (settings.data.tiles.side_px, settings.data.augment.crop, settings.adapter.rank) == (None, 0, None)
    assert settings.model.freeze == [] and settings.data.max_sequence_length > 64
    assert settings.data.wording == "detection", "the user's words are rehearsed"


def test_the_folder_may_have_any_name(tmp_path: Path) -> None:
    out = tmp_path / "it's 彩排😀 a=b, #1"
    found = load_config("grounding_490", training_settings(Chosen(3, 3, 1), out, 10, 1))
    assert [each["path"] for each in found.data.shards] == [str(out / "chosen" / "shards")]
    assert (found.output_dir, found.model.path) == (str(out / "run"), str(out / "start"))


@pytest.mark.parametrize(("num_photos", "num_processes", "size"), [(1, 1, 1), (1, 2, 2), (5, 1, 4), (15, 2, 4)])
def test_any_number_of_photos_can_be_divided(num_photos: int, num_processes: int, size: int, tmp_path: Path) -> None:
    chosen = Chosen(num_photos, num_boxes=1, num_parameters=1)
    found = load_config("grounding_490", training_settings(chosen, tmp_path, 10, num_processes))
    assert found.train.global_batch_size == size
    assert size % (found.train.micro_batch_size * num_processes) == 0


def test_the_commands_of_the_real_run_can_be_pasted_and_keep_every_setting(tmp_path: Path) -> None:
    settings = ["train.lr=3e-4", "model.path=my models/cogvlm"]
    args = argparse.Namespace(config="grounding_490", settings=settings, out=tmp_path / "photos")
    config = real_config(args)
    for command in commands_of_real_run(args, config):
        program, *options = shlex.split(command)
        assert Path(program).is_file(), "found without an activated environment"
        found = load_config("grounding_490", options[options.index("grounding_490") + 1 :])
        assert found == config


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["gone"], "PHOTOS gone: found nothing; expected the folder"),
        (["photos.zip"], "PHOTOS photos.zip: found a file; expected the folder of the photos. Unpack"),
        ([".", "--annotations", "gone"], "--annotations gone: found nothing"),
        ([".", "--num-photos", "0"], "--num-photos: found 0; expected 1 or more"),
        ([".", "--steps", "-1"], "--steps: found -1; expected 1 or more"),
    ],
)
def test_a_mistake_in_the_command_is_one_line_at_once(
    arguments: list[str],
    found: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos.zip").touch()
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert found in printed.err and not printed.out


@pytest.mark.parametrize(
    ("recommended", "settings", "is_advised"),
    [
        ("model.image_size=980", ["model.image_size=490"], True),
        ("model.image_size=980", ["model.image_size=980"], False),
        ("model.image_size=490", [], False),
        ("data.tiles.side_px=490", [], True),
        ("data.tiles.side_px=490", ["data.tiles.side_px=640"], False),
        (None, [], False),
    ],
)
def test_a_real_run_that_cannot_see_the_targets_is_advised(
    recommended: str | None, settings: list[str], is_advised: bool, tmp_path: Path
) -> None:
    (tmp_path / "review.json").write_text(json.dumps({"small_targets": {"recommended": recommended}}))
    config = load_config("grounding_490", ["model.path=x", "data.shards=y", "output_dir=z", *settings])
    advice = advice_on_size(tmp_path, config)
    assert bool(advice) == is_advised and (str(recommended) in advice) == is_advised and len(advice) <= 120


@pytest.mark.parametrize(("out", "run"), [("runs/rehearsal/cats", "runs/cats"), ("runs/cats", "runs/cats-17b")])
def test_the_real_run_has_a_folder_of_its_own(out: str, run: str) -> None:
    args = argparse.Namespace(config="grounding_490", settings=[], out=Path(out))
    assert real_config(args).output_dir == run
