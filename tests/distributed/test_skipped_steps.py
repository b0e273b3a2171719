"""A loss or gradient that is not finite on one rank of two: all skip the step, and its samples are kept."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from ranks import read_metrics, run, started
from safetensors.torch import load_file, save_file
from skipped_steps import NUM_STEPS
from tiny import run_settings

from cogvlm_ft.build import build_dataset
from cogvlm_ft.checkpoints.checkpoint import list_checkpoints
from cogvlm_ft.config import load_config
from cogvlm_ft.data.index import load_index
from cogvlm_ft.data.loader import GroundingDataset, Item
from cogvlm_ft.data.plan import plan_samples
from cogvlm_ft.grounding.wording import load_wording
from cogvlm_ft.model import CogVLMTokenizer, load_model
from cogvlm_ft.model import load_config as load_model_config
from cogvlm_ft.runtime.trained_parameters import freeze
from cogvlm_ft.train.replay_step import run_sample

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).with_name("skipped_steps.py")
BATCH = 8
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def settings_of(shards: Path, model: Path, output_dir: Path, *more: str) -> list[str]:
    changes = ["evaluate.before_training=false", "evaluate.max_samples=2", "evaluate.max_new_tokens=2"]
    return run_settings(shards, model, output_dir, *changes, *more)


def training_samples(shards: Path, model: Path) -> GroundingDataset:
    config = load_config(None, settings_of(shards, model, Path("none")))
    tokenizer = CogVLMTokenizer.from_folder(model)
    wording = load_wording(config.data.wording)
    return build_dataset(config, load_index(shards, "train"), wording, None, tokenizer, load_model_config(model))


def with_weights(model: Path, folder: Path, name: str, row: int, value: float) -> Path:
    """Copy the model folder with one row of a matrix set to `value`."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    weights[name][row] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def rare(shards: Path, start_model: Path) -> tuple[int, int, str]:
    """Return (token, step from 0, key) of the only sample in the first epoch with that token, in a middle step."""
    dataset = training_samples(shards, start_model)
    order = plan_samples([len(dataset.reader)], [1.0], global_batch_size=BATCH, seed=0).order(0).tolist()
    examples = [dataset[Item(0, index, 1.0)] for index in order]
    found = [set(example.sequences.input_ids.tolist()) for example in examples]
    counts = Counter(token for tokens in found for token in tokens)
    for place in range(BATCH, (NUM_STEPS - 1) * BATCH):
        alone = [token for token in sorted(found[place]) if counts[token] == 1]
        if alone:
            return alone[0], place // BATCH, examples[place].key
    raise AssertionError("no sample has a token of its own")


@pytest.fixture(scope="module")
def poisoned_model(start_model: Path, rare: tuple[int, int, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model in which whatever reads the rare token becomes NaN."""
    return with_weights(start_model, tmp_path_factory.mktemp("poisoned") / "model", EMBEDDINGS, rare[0], torch.inf)


def test_a_skipped_step_changes_nothing(
    poisoned_model: Path, shards: Path, rare: tuple[int, int, str], tmp_path: Path
) -> None:
    """Compare weights, moments and step count bit for bit with a run that never saw the step."""
    cases = [f"{precision};train.precision={precision};deepspeed=zero3_tiny" for precision in ("fp32", "bf16")]
    cases += ["offload;deepspeed=configs/deepspeed/zero3_offload_optimizer.json"]
    cases += ["offload bf16;deepspeed=configs/deepspeed/zero3_offload_all.json;train.precision=bf16"]
    output = run([PROGRAM, poisoned_model, shards, tmp_path / "run", rare[1], *cases], 2, tmp_path / "logs")
    rows = [json.loads(line) for line in output.splitlines() if line.startswith('{"case"')]
    assert [row["case"] for row in rows] == [case.partition(";")[0] for case in cases]
    for row in rows:
        for number, reported in enumerate(zip(*(of_rank["reported"] for of_rank in row["ranks"]), strict=True)):
            is_bad = number == rare[1]
            assert [each["skipped"] for each in reported] == [is_bad] * 2, row
            assert [each["norm"] == float("inf") for each in reported] == [is_bad] * 2
            assert sum(finite for each in reported for finite in each["finite"]) == BATCH - is_bad
        assert [of_rank["unequal"] for of_rank in row["ranks"]] == [[], []]
        assert all(of_rank["keys"] > 100 for of_rank in row["ranks"])


def test_a_loss_without_limits_but_with_a_gradient_is_skipped_too(
    shards: Path, start_model: Path, tmp_path: Path
) -> None:
    """Freeze all but lm_head, so that no gradient passes through its huge row and the norm stays finite."""
    dataset = training_samples(shards, start_model)
    order = plan_samples([len(dataset.reader)], [1.0], global_batch_size=BATCH, seed=0).order(0).tolist()
    example = dataset[Item(0, order[0], 1.0)]
    labels = example.sequences.labels
    huge = with_weights(start_model, tmp_path / "huge", HEAD, int(labels[labels >= 0][0]), 1e37)
    arguments = settings_of(shards, huge, tmp_path / "run", "model.freeze=[model.*]", "train.max_steps=3")
    model = load_model(huge)
    freeze(model, load_config(None, arguments))
    loss, grad_norm = run_sample(model, example)
    assert math.isinf(loss) and math.isfinite(grad_norm)

    with started(["launch/train.py", *arguments], 2, tmp_path / "logs") as ranks:
        assert ranks.wait() == [2, 2], ranks.output()
        assert "steps 1 to 3 had no finite loss or gradient" in ranks.output()
        assert f"No checkpoint is known to be good, {huge} is" in ranks.output()


def test_the_samples_of_a_skipped_step_are_kept_and_replayed(
    poisoned_model: Path, start_model: Path, shards: Path, rare: tuple[int, int, str], tmp_path: Path
) -> None:
    _, step, key = rare
    folder = tmp_path / "run"
    arguments = settings_of(shards, poisoned_model, folder, f"train.max_steps={NUM_STEPS}", "checkpoint.every_steps=1")
    output = run(["launch/train.py", *arguments, "data.augment.crop=0.9"], 2, tmp_path / "logs")
    file = folder / "nonfinite" / f"step-{step + 1:08d}.json"
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert f"step {step + 1} is skipped on all ranks" in output
    assert f"the loss of {key} is not finite" in output and f"launch/replay_step.py {file}" in output
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert len(rows) == BATCH and {row["rank"] for row in rows} == {0, 1}
    assert [row["key"] for row in rows if row["loss"] == "nan"] == [key]
    metrics = read_metrics(folder, "train")
    assert [row["num_skipped"] for row in metrics] == [float(number >= step) for number in range(NUM_STEPS)]
    assert [row["loss"] is None for row in metrics] == [number == step for number in range(NUM_STEPS)]
    assert "skipped 1" in output
    assert list_checkpoints(folder / "checkpoints")[-1].name == f"step-{NUM_STEPS:08d}"

    output = run(["launch/replay_step.py", file], 1, tmp_path / "logs")
    assert f"step {step + 1} with {folder}/checkpoints/step-" in output or f"with {poisoned_model}" in output
    broken = [line for line in output.splitlines() if "NOT FINITE" in line]
    assert len(broken) == 1 and broken[0].startswith(f"{key} (rank ")
    assert f"1 of {BATCH} samples are not finite by themselves" in output
    assert len(list(file.with_suffix("").glob("*.png"))) == BATCH
    finite = [line for line in output.splitlines() if ": finite, loss" in line]
    assert len(finite) == BATCH - 1

    output = run(
        ["launch/replay_step.py", file, "--model", start_model, "--out", tmp_path / "out"], 1, tmp_path / "logs"
    )
    assert f"0 of {BATCH} samples are not finite" in output  # without the broken row they are all fine
    assert len(list((tmp_path / "out").iterdir())) == BATCH


def test_a_run_that_diverges_ends_and_names_the_last_good_checkpoint(
    shards: Path, start_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    arguments = settings_of(shards, start_model, folder, "checkpoint.every_steps=1", "train.warmup_fraction=0")
    run(["launch/train.py", *arguments, "train.max_steps=3"], 2, tmp_path / "logs")
    with started(["launch/train.py", *arguments, "train.max_steps=9", "train.lr=1e37"], 2, tmp_path / "logs") as ranks:
        assert ranks.wait() == [2, 2], ranks.output()
        output = ranks.output()
    # Step 4 was computed with good weights and broke them.
    assert "steps 5 to 7 had no finite loss or gradient, and 3 in a row end the run" in output
    assert f"Last good checkpoint: {folder}/checkpoints/step-00000003." in output
    assert "move step-00000004 aside, lower train.lr" in output
    assert [path.name for path in list_checkpoints(folder / "checkpoints")] == ["step-00000003", "step-00000004"]
    assert len(list((folder / "nonfinite").iterdir())) == 3
    assert read_metrics(folder, "train")[-1]["num_skipped"] == 2
