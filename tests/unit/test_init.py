"""`launch/init.py`: what it writes is loaded by the settings loader, and its commands name it."""

from __future__ import annotations

import io
import shlex
import sys
from pathlib import Path

import pytest

from cogvlm_ft.config import load_config
from cogvlm_ft.launch.init import main

NEEDED = ("model.path", "data.shards", "output_dir")


@pytest.mark.parametrize(
    ("nodes", "engine", "command"), [(1, "zero3", "launch.train"), (2, "zero3_multinode", "launch.submit")]
)
def test_the_config_is_loaded(
    nodes: int, engine: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "my run.yaml"
    options = ["--shards", "shards: 猫 #1", "--model", "0123", "--nodes", str(nodes), "--targets", "small"]
    assert main([*options, "--out", str(out)]) == 0
    config = load_config(str(out))
    assert (config.data.shards, config.model.path, config.model.image_size) == ("shards: 猫 #1", "0123", 756)
    assert config.deepspeed == engine and config.train.global_batch_size % (8 * nodes) == 0
    printed = capsys.readouterr().out
    assert printed.count("found nothing; expected the") == 2, "neither the shards nor the model are there yet"
    pasted = [shlex.split(line) for line in printed.splitlines() if line.startswith("  ")]
    assert all(Path(program).is_file() for program, *_ in pasted), "found without an activated environment"
    assert command in printed and f"'{out}'" in printed
    assert main([*options, "--out", str(out)]) == 2, "an existing file is kept"


@pytest.mark.parametrize("targets", ["large", "small", "tiny"])
def test_an_image_leaves_room_for_its_texts(targets: str, tmp_path: Path) -> None:
    options = ["--shards", "s", "--model", "m", "--targets", targets, "--out", str(tmp_path / "run.yaml")]
    assert main(options) == 0
    config = load_config(str(tmp_path / "run.yaml"))
    assert config.model.image_size is not None
    num_patches = (config.model.image_size // 14) ** 2
    assert config.data.max_sequence_length - num_patches > 1000
    preset = load_config("grounding_980" if targets == "tiny" else "grounding_490", [f"{key}=x" for key in NEEDED])
    assert config.data.max_sequence_length == preset.data.max_sequence_length
    assert config.evaluate.batch_size == preset.evaluate.batch_size


def test_little_memory_means_offload(tmp_path: Path) -> None:
    options = ["--shards", "s", "--model", "m", "--gpu-memory-gib", "23.5", "--out", str(tmp_path / "run.yaml")]
    assert main(options) == 0
    assert load_config(str(tmp_path / "run.yaml")).deepspeed == "zero3_offload_optimizer"


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["--model", "m"], "--shards: found nothing"),
        (["--shards", "s", "--model", "m", "--nodes", "two"], "--nodes: found 'two'; expected a number"),
        (["--shards", "s", "--model", "m", "--gpu-memory-gib", "nan"], "--gpu-memory-gib: found nan"),
        (
            ["--shards", "s", "--model", "m", "--targets", "huge"],
            "--targets: found 'huge'; expected large, small, tiny",
        ),
    ],
)
def test_a_wrong_answer_is_one_line(
    options: list[str], found: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*options, "--out", str(tmp_path / "run.yaml")]) == 2
    assert found in capsys.readouterr().err and not (tmp_path / "run.yaml").exists()


def test_the_end_of_the_input_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = io.StringIO("my_shards\n")
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", terminal)
    assert main(["--out", str(tmp_path / "run.yaml")]) == 2
    assert "found no answer; expected one" in capsys.readouterr().err and not (tmp_path / "run.yaml").exists()
