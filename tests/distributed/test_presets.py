"""Every engine preset states its use, starts on real ranks, and trains the same model."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from preset_steps import NUM_STEPS, SAVED_STEP, WITH_CPU_ADAM
from ranks import REPOSITORY, run
from scaling import SCALE

from cogvlm_ft.config import load_config
from cogvlm_ft.errors import ConfigError
from cogvlm_ft.runtime.engine import deepspeed_settings

PROGRAM = Path(__file__).with_name("preset_steps.py")
FOLDER = REPOSITORY / "configs" / "deepspeed"
PRESETS = sorted(FOLDER.glob("*.json"))
COMPILED_TIMEOUT_S = 600  # DeepSpeed compiles its Adam where that has not been done
# hpZ keeps groups of ranks for the life of a process, so it comes last.
RUNS = ["zero3", "zero3_tiny", "zero3=bf16", "zero3_bf16=bf16", "zero3_offload_optimizer", "zero3_offload_all"]
RUNS += ["zero3_offload_all=bf16", "zero3_multinode"]
# All of them in `make soak`. Others resume in test_training.py (zero3, zero3_tiny) and on four ranks (zero3_multinode).
RESUMED = RUNS if SCALE >= 1 else RUNS[3:-1]


def settings_for(preset: Path, *settings: str) -> dict:
    config = load_config(None, ["output_dir=o", "model.path=m", "data.shards=s", f"deepspeed={preset}", *settings])
    return deepspeed_settings(config)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_states_its_use(preset: Path) -> None:
    written = json.loads(preset.read_text(encoding="utf-8"))
    assert next(iter(written)) == "//" and len(" ".join(written["//"])) > 100
    precision = "bf16" if "bf16" in written else "fp32"
    settings = settings_for(preset, f"train.precision={precision}")
    assert "//" not in settings and settings["bf16"]["enabled"] == (precision == "bf16")


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"bf16": {"enabled": True}}, r"bf16: found .*True.*; expected .*False.*, as set by train\.precision"),
        ({"train_batch_size": 5}, r"train_batch_size: found 5; expected 16, as set by train\.global_batch_size"),
        ({"gradient_clipping": 0.5}, r"as set by train\.max_grad_norm"),
        ({"fp16": {"enabled": True}}, r"fp16, which is set by train\.precision"),
        ({"optimizer": {"type": "Adam"}}, r"optimizer, which is set by train\.lr"),
        ({"zero_optimization": {"stage": 2}}, r"stage: found 2; expected 3"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            r"device: found 'nvme'; expected cpu",
        ),
    ],
)
def test_one_owner_per_number(written: dict, message: str, tmp_path: Path) -> None:
    preset = tmp_path / "preset.json"
    preset.write_text(json.dumps({**json.loads((FOLDER / "zero3.json").read_text()), **written}))
    with pytest.raises(ConfigError, match=message):
        settings_for(preset)


def test_the_bf16_preset_expects_bf16() -> None:
    with pytest.raises(ConfigError, match=r"zero3_bf16\.json: bf16: found .*, as set by train\.precision"):
        settings_for(FOLDER / "zero3_bf16.json", "train.precision=fp32")


def test_adapters_refuse_layers_that_are_gathered_as_a_whole() -> None:
    settings_for(FOLDER / "zero3_tiny.json")
    with pytest.raises(ConfigError, match=r"leaf_module: found modules .*; expected none with adapter\.rank"):
        settings_for(FOLDER / "zero3_tiny.json", "adapter.rank=4")


def steps_of(output: str) -> dict[str, list[float]]:
    rows = [json.loads(line) for line in output.splitlines() if line.startswith('{"preset"')]
    return {row["preset"]: row["losses"] for row in rows}


@pytest.mark.slow
def test_every_preset_trains_the_same_model_and_resumes(
    shards: Path, start_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all inputs of `make soak`, updates with offloading in fp32 are DeepSpeed's Adam on the CPU.

    DeepSpeed compiles it once per machine, which takes minutes.
    """
    if SCALE >= 1:
        monkeypatch.setenv(WITH_CPU_ADAM, "1")
    of_one_rank = {"single_gpu"}  # test_training.py trains adapters with it
    assert {name.partition("=")[0] for name in RUNS} | of_one_rank == {preset.stem for preset in PRESETS}
    program = [PROGRAM, start_model, shards, tmp_path / "run"]
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # ninja
    names = [each for name in RUNS for each in (name, f"{name}+resumed") if each in RUNS or name in RESUMED]
    alone = [f"{RUNS[-1]}+resumed"] if RUNS[-1] in RESUMED else []
    found = steps_of(run([*program, *(n for n in names if n not in alone)], 2, tmp_path / "logs", COMPILED_TIMEOUT_S))
    found |= steps_of(run([*program, *alone], 2, tmp_path / "logs")) if alone else {}
    resumed = {name: found.pop(f"{name}+resumed") for name in RESUMED}
    assert list(found) == RUNS
    assert resumed == {name: found[name][SAVED_STEP:] for name in RESUMED}, "bit for bit"
    reference = found["zero3"]
    assert len(reference) == NUM_STEPS and reference[-1] < reference[0]
    for name, losses in found.items():
        assert losses == pytest.approx(reference, rel=0.02 if name.endswith("=bf16") else 1e-5), name

    # Four ranks as two nodes of two: hpZ's second copies are gathered within a node, also of the smallest tensors, and
    # evaluations between the steps leave none behind that is out of date.
    preset = tmp_path / "two_nodes.json"
    settings = json.loads((FOLDER / "zero3_multinode.json").read_text())
    settings["zero_optimization"] |= {"zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 0}
    preset.write_text(json.dumps(settings))
    name = f"{preset}+evaluated"
    found = steps_of(run([*program, name], 4, tmp_path / "logs"))
    assert found[name] == pytest.approx(reference, rel=1e-5)
    resumed = steps_of(run([*program, f"{name}+resumed"], 4, tmp_path / "logs"))
    assert resumed[f"{name}+resumed"] == found[name][SAVED_STEP:]
