"""ZeRO-3 on two ranks trains as one plain PyTorch process; stopping and resuming change nothing."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from PIL import Image
from ranks import read_metrics, run, started, wait_for_step
from reference import NUM_STEPS, VOLATILE, reference_settings
from run_states import assert_same_end
from safetensors.torch import load_file
from tiny import short_run_settings

from cogvlm_ft.build import load_quantized_base
from cogvlm_ft.checkpoints.adapters import AdapterRecord, check_same_adapters
from cogvlm_ft.checkpoints.checkpoint import list_checkpoints
from cogvlm_ft.checkpoints.choice import trained_wording
from cogvlm_ft.checkpoints.slices import WEIGHT, check_averages_kept, open_slices
from cogvlm_ft.config import load_config
from cogvlm_ft.data.index import load_index
from cogvlm_ft.data.loader import GroundingDataset, read_steps
from cogvlm_ft.data.plan import SamplePlan
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.errors import CheckpointError, ConfigError
from cogvlm_ft.evaluate.evaluate import METRICS_FILE
from cogvlm_ft.export.adapter import WEIGHTS_FILE, export_adapter
from cogvlm_ft.export.export import export_checkpoint
from cogvlm_ft.grounding.wording import load_wording
from cogvlm_ft.model import CogVLMForCausalLM, CogVLMTokenizer, load_model
from cogvlm_ft.model.adapters import FACTORS, factor_name, name_from_peft_file, name_in_peft_file, peft_config
from cogvlm_ft.model.loading import read_whole
from cogvlm_ft.model.quantized import QuantizedLinear
from cogvlm_ft.run_folder import RunFolder
from cogvlm_ft.runtime.partitions import AVERAGE
from cogvlm_ft.train.schedule import lr_at

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("shared runs")]


def train_plainly(
    settings: list[str], rate_of: Callable[[str], float] = lambda name: 1.0, num_steps: int = NUM_STEPS
) -> tuple[list[float], CogVLMForCausalLM]:
    """Train without DeepSpeed, ranks or accumulation: AdamW on the whole batch at once.

    rate_of: the factor of a parameter's learning rate; 0: frozen. A quantised base is restored once, as floats.
    """
    config = load_config(None, settings)
    model = load_model(config.model.path).train()
    if config.adapter.base:
        for name, module in load_quantized_base(config, model.config).named_modules():
            if isinstance(module, QuantizedLinear):
                model.get_submodule(name).weight.data = module.restored(torch.float32)
    if config.adapter.rank:
        model = PeftModel.from_pretrained(model, config.adapter.start, is_trainable=True).get_base_model()
    index = load_index(config.data.shards, config.data.train_split)
    dataset = GroundingDataset(
        ShardReader(index),
        load_wording(config.data.wording),
        CogVLMTokenizer.from_folder(config.model.path),
        model.config,
        config.seed,
        config.data.max_sequence_length,
    )
    plan = SamplePlan(len(index), config.train.global_batch_size, config.seed)
    groups: list[dict[str, Any]] = [
        {"params": [parameter], "weight_decay": config.train.weight_decay if parameter.ndim > 1 else 0.0, "rate": rate}
        for name, parameter in model.named_parameters()
        for rate in [rate_of(name)]
        if parameter.requires_grad_(rate > 0).requires_grad
    ]
    optimizer = torch.optim.AdamW(groups, betas=(config.train.beta1, config.train.beta2), eps=config.train.eps)
    losses: list[float] = []
    consumed = 0
    while len(losses) < num_steps:
        for [batch] in read_steps(
            dataset, plan, consumed, rank=0, world_size=1, micro_batch_size=plan.global_batch_size, num_workers=0
        ):
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * lr_at(len(losses), num_steps, config.train)
            optimizer.zero_grad()
            loss = model(
                input_ids=batch.input_ids,
                pixel_values=batch.pixel_values,
                position_ids=batch.position_ids,
                block_ids=batch.block_ids,
                labels=batch.labels,
            ).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.max_grad_norm)
            optimizer.step()
            losses.append(loss.item())
            consumed += int(batch.weight.sum())
            if len(losses) == num_steps:
                break
    return losses, model


def assert_same_curve(found: Path, expected: Path) -> None:
    """Compare every logged number but times and memory, bit for bit."""
    for kind in ("train", "val"):
        a, b = (
            [{k: v for k, v in row.items() if k not in VOLATILE} for row in read_metrics(path, kind)]
            for path in (found, expected)
        )
        assert a == b


def test_two_ranks_equal_one_plain_process(
    reference_run: Path, shards: Path, start_model: Path, tmp_path: Path
) -> None:
    losses, plain = train_plainly(reference_settings(shards, start_model, tmp_path))
    found = [row["loss"] for row in read_metrics(reference_run, "train")]
    assert len(found) == NUM_STEPS
    assert found == pytest.approx(losses, rel=1e-5)
    assert losses[-1] < 0.9 * losses[0]

    export_checkpoint(list_checkpoints(reference_run / "checkpoints")[-1], tmp_path / "exported", torch.float32)
    exported = dict(load_model(tmp_path / "exported").named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(exported[name].data, parameter.data, atol=1e-5, rtol=0, msg=lambda m, n=name: n + m)


def test_export_gives_the_same_logits_in_the_published_form(reference_run: Path, tmp_path: Path) -> None:
    checkpoint = list_checkpoints(reference_run / "checkpoints")[-1]
    export_checkpoint(checkpoint, tmp_path / "exported", torch.float32)
    loaded = CogVLMForCausalLM.from_pretrained(tmp_path / "exported").eval()
    tokenizer = CogVLMTokenizer.from_folder(tmp_path / "exported")
    inputs = loaded.build_conversation_input_ids(tokenizer, query="the red circle", images=[torch.ones(3, 56, 56)])
    batch = {k: v[None] for k, v in inputs.items() if k != "images"} | {"images": [inputs["images"]]}
    ours = load_model(tmp_path / "exported")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, ours(**batch).logits)


def test_settings_that_must_not_change_a_number(
    reference_run: Path, shards: Path, start_model: Path, tmp_path: Path
) -> None:
    """Keep activations, read in workers, save at other steps and before training continues."""
    changes = ["model.gradient_checkpointing=none", "data.num_workers=2"]
    changes += ["checkpoint.background=false", "checkpoint.every_steps=3"]
    run(["launch/train.py", *reference_settings(shards, start_model, tmp_path / "run", *changes)], 2, tmp_path)
    assert_same_curve(tmp_path / "run", reference_run)
    assert_same_end(tmp_path / "run", reference_run)


def test_a_run_that_is_stopped_and_killed_resumes_bit_identically(
    reference_run: Path, shards: Path, start_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    arguments = ["launch/train.py", *reference_settings(shards, start_model, folder)]
    for after_step in (1, 4):  # in the first epoch, and again in the second
        with started(arguments, 2, tmp_path / "logs") as ranks:
            wait_for_step(folder, after_step, ranks)
            ranks.processes[1].send_signal(signal.SIGTERM)  # one rank only: all must agree
            assert ranks.wait() == [0, 0], ranks.output()
        stopped_at = read_metrics(folder, "train")[-1]["step"]
        assert after_step <= stopped_at < NUM_STEPS
        assert list_checkpoints(folder / "checkpoints")[-1].name == f"step-{stopped_at:08d}"
    with started(arguments, 2, tmp_path / "logs") as ranks:
        wait_for_step(folder, 7, ranks)
        ranks.kill()
    output = run(arguments, 2, tmp_path / "logs")
    assert "resuming from" in output
    assert_same_curve(folder, reference_run)
    assert_same_end(folder, reference_run)
    output = run(arguments, 2, tmp_path / "logs")  # a finished run, started again, loads and repeats nothing
    assert f"finished: raise train.epochs or train.max_steps to continue. Step {NUM_STEPS} of {NUM_STEPS}" in output
    assert "resuming from" not in output
    assert_same_curve(folder, reference_run)


def test_bf16_trains_and_stays_near_fp32(reference_run: Path, bf16_run: Path) -> None:
    found, expected = ([row["loss"] for row in read_metrics(run, "train")] for run in (bf16_run, reference_run))
    assert found == pytest.approx(expected, rel=0.03)


RATES = "train.lr_scale={model.vision.*: 0.5, '*.norm*': 0.25, model.vision.linear_proj.*: 0}"


def rate_of(name: str) -> float:
    """Return the factor that RATES and a decay of 0.8 in a tower of two layers give a parameter."""
    scale = 0.5 if name.startswith("model.vision.") else 1.0
    scale = 0.25 if ".norm" in name else scale
    scale = 0.0 if name.startswith("model.vision.linear_proj.") else scale
    for part, power in (("transformer.layers.1.", 1), ("transformer.layers.0.", 2), ("patch_embedding.", 3)):
        scale *= 0.8**power if name.startswith(f"model.vision.{part}") else 1
    return 0.0 if name == "lm_head.weight" else scale


def test_parts_with_rates_of_their_own_and_frozen_parts(shards: Path, start_model: Path, tmp_path: Path) -> None:
    """Two ranks equal plain torch; a run does not resume with other rates."""
    settings = short_run_settings(
        shards,
        start_model,
        tmp_path / "run",
        RATES,
        "train.vision_layer_decay=0.8",
        "model.freeze=[lm_head.weight]",
        "train.warmup_fraction=0",
    )
    run(["launch/train.py", *settings], 2, tmp_path / "logs")
    _, plain = train_plainly(settings, rate_of, num_steps=2)
    export_checkpoint(list_checkpoints(tmp_path / "run" / "checkpoints")[-1], tmp_path / "exported", torch.float32)
    after = dict(load_model(tmp_path / "exported").named_parameters())
    expected = dict(plain.named_parameters())
    for name, before in load_model(start_model).named_parameters():
        assert torch.equal(before, after[name]) == (rate_of(name) == 0), name
        torch.testing.assert_close(after[name], expected[name], atol=1e-5, rtol=0, msg=lambda m, n=name: n + m)
    row = read_metrics(tmp_path / "run", "train")[-1]
    assert row["lr/x0.25"] == pytest.approx(0.25 * row["lr"])
    settings.remove(RATES)
    with started(["launch/train.py", *settings], 1, tmp_path / "logs") as ranks:
        assert ranks.wait() == [2], ranks.output()
        assert "train.lr_scale, train.vision_layer_decay: found [['vision_layer_decay', 0.8]]" in ranks.output()


DECAY = 0.75
NUM_ADAPTED_STEPS = 20
IS_TRAINED = re.compile(r"\.lora_|\.modules_to_save\.").search


@pytest.fixture(scope="module")
def adapted_run(shards: Path, start_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Return a run folder and its settings: 20 steps of two ranks from an adapter of peft that is not zero."""
    folder = tmp_path_factory.mktemp("adapted")
    changes = ["deepspeed=zero3", "adapter.rank=4", "adapter.alpha=8", "adapter.full=[bridge]"]
    changes += [f"adapter.start={folder / 'start'}"]
    changes += ["adapter.targets=[attention.language,attention.vision_expert,mlp.language,mlp.vision_expert,vision]"]
    changes += [f"train.max_steps={NUM_ADAPTED_STEPS}", "checkpoint.every_steps=1", "checkpoint.keep_last=99"]
    changes += [f"train.ema={DECAY}", "evaluate.every_epochs=9"]
    settings = short_run_settings(shards, start_model, folder / "run", *changes)
    torch.manual_seed(1)
    started = get_peft_model(load_model(start_model), peft_config(load_config(None, settings).adapter, ""))
    for name, parameter in started.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.05)
    started.save_pretrained(folder / "start")
    run(["launch/train.py", *settings], 2, folder / "logs")
    return folder / "run", settings


def test_adapters_train_as_those_of_peft(
    adapted_run: tuple[Path, list[str]], shards: Path, start_model: Path, tmp_path: Path
) -> None:
    """Two ranks equal peft on plain torch, merged and alone; a checkpoint holds nothing else."""
    folder, settings = adapted_run
    losses, plain = train_plainly(settings, lambda name: float(bool(IS_TRAINED(name))), NUM_ADAPTED_STEPS)
    assert [row["loss"] for row in read_metrics(folder, "train")] == pytest.approx(losses, rel=1e-5)
    checkpoint = list_checkpoints(folder / "checkpoints")[-1]
    stored = open_slices(checkpoint)
    trained = {
        name.replace(".modules_to_save.default.", "."): value
        for name, value in plain.named_parameters()
        if value.requires_grad
    }
    assert stored.keys() == trained.keys() and "model.vision.linear_proj.linear_proj.weight" in stored
    start = load_file(folder.parent / "start" / WEIGHTS_FILE)
    still = {name for name, value in trained.items() if torch.equal(value, start[name_in_peft_file(name)])}
    assert len(still) < 0.1 * len(trained) and all(".vision_" in name for name in still), still
    for name, value in trained.items():
        torch.testing.assert_close(read_whole(stored[name], torch.float32), value.data, atol=1e-5, rtol=0)

    export_checkpoint(checkpoint, tmp_path / "merged", torch.float32)
    export_adapter(checkpoint, tmp_path / "alone")
    assert trained_wording(tmp_path / "alone") == trained_wording(checkpoint) is not None
    tokenizer = CogVLMTokenizer.from_folder(start_model)
    inputs = plain.build_conversation_input_ids(tokenizer, query="the red circle", images=[torch.ones(3, 56, 56)])
    batch = {k: v[None] for k, v in inputs.items() if k != "images"} | {"images": [inputs["images"]]}
    alone = PeftModel.from_pretrained(load_model(start_model), tmp_path / "alone")
    with torch.no_grad():
        expected = plain.eval()(**batch).logits
        assert not torch.allclose(load_model(start_model)(**batch).logits, expected, atol=1e-2)
        for found in (load_model(tmp_path / "merged"), alone):
            torch.testing.assert_close(found(**batch).logits, expected, atol=1e-5, rtol=1e-5)
    assert not (tmp_path / "merged" / "adapter.json").exists()


def test_adapters_resume_on_another_number_of_ranks_and_on_their_base_only(
    adapted_run: tuple[Path, list[str]], start_model: Path, tmp_path: Path
) -> None:
    folder, settings = adapted_run
    whole = {
        kind: {name: read_whole(value, torch.float32) for name, value in open_slices(newest(folder), kind).items()}
        for kind in (WEIGHT, AVERAGE)
    }
    for path in list_checkpoints(folder / "checkpoints")[1:]:
        shutil.rmtree(path)
    alone = run(["launch/train.py", *settings, "deepspeed=single_gpu"], 1, tmp_path / "logs")
    assert "resuming from" in alone
    assert re.search(r"settings changed since the last start: .*deepspeed: zero3\w* -> single_gpu", alone)
    for kind, expected in whole.items():
        for name, value in open_slices(newest(folder), kind).items():
            torch.testing.assert_close(read_whole(value, torch.float32), expected[name], atol=1e-5, rtol=0)

    ours = AdapterRecord.load(newest(folder))
    assert ours is not None
    check_same_adapters(newest(folder), ours)
    for other, message in (
        (None, "found adapters; expected the whole model"),
        (dataclasses.replace(ours, base_sha256="0"), "model.path: found"),
        (dataclasses.replace(ours, alpha=3), "adapter.alpha: found 3; expected 8"),
    ):
        with pytest.raises(CheckpointError, match=message):
            check_same_adapters(newest(folder), other)


def test_adapters_on_a_quantised_base(adapted_run: tuple[Path, list[str]], start_model: Path, tmp_path: Path) -> None:
    """One rank equals peft on plain torch with the same int4 weights as floats, and resumes bit for bit."""
    folder, settings = tmp_path / "run", [*adapted_run[1], "adapter.base=int4", "deepspeed=single_gpu"]
    settings += [f"output_dir={folder}", "train.max_steps=2", "train.ema=null"]
    settings += ["evaluate.before_training=false"]
    run(["launch/train.py", *settings], 1, tmp_path / "logs")
    losses, plain = train_plainly(settings, lambda name: float(bool(IS_TRAINED(name))), 2)
    assert [row["loss"] for row in read_metrics(folder, "train")] == pytest.approx(losses, rel=1e-5)
    whole = {name: read_whole(value, torch.float32) for name, value in open_slices(newest(folder)).items()}
    for name, value in plain.named_parameters():
        if value.requires_grad:
            found = whole[name.replace(".modules_to_save.default.", ".")]
            torch.testing.assert_close(found, value.data, atol=1e-5, rtol=0)
    shutil.rmtree(newest(folder))
    assert "resuming from" in run(["launch/train.py", *settings], 1, tmp_path / "logs")
    again = open_slices(newest(folder))
    assert all(torch.equal(read_whole(again[name], torch.float32), value) for name, value in whole.items())

    ours = AdapterRecord.load(newest(folder))
    assert ours is not None and ours.base_weights == "int4"
    with pytest.raises(CheckpointError, match=r"adapter\.base: found null; expected int4, with which"):
        check_same_adapters(newest(folder), dataclasses.replace(ours, base_weights=None))
    with pytest.raises(CheckpointError, match=r"adapter\.base: found int4; expected null"):
        check_same_adapters(newest(adapted_run[0]), ours)

    export_checkpoint(newest(folder), tmp_path / "merged", torch.float32)
    name = "model.layers.0.self_attn.language_expert_dense.weight"
    inner, outer = (whole[factor_name(name, factor)] for factor in FACTORS)
    merged, base = (dict(load_model(path).named_parameters())[name] for path in (tmp_path / "merged", start_model))
    torch.testing.assert_close(merged - base, 8 / 4 * outer @ inner, atol=1e-6, rtol=0)  # the base's own weights


def test_averages_are_those_of_the_weights_and_are_evaluated_and_exported(
    adapted_run: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """They equal the plain running average to the bit; a run that has them does not resume without."""
    folder, _ = adapted_run
    start = load_file(folder.parent / "start" / WEIGHTS_FILE)
    averages = {name_from_peft_file(name): value for name, value in start.items()}
    for checkpoint in list_checkpoints(folder / "checkpoints"):
        stored = open_slices(checkpoint, AVERAGE)
        for name, weight in open_slices(checkpoint).items():
            averages[name].mul_(DECAY).add_(read_whole(weight, torch.float32), alpha=1 - DECAY)
            assert torch.equal(read_whole(stored[name], torch.float32), averages[name]), name

    rows = read_metrics(folder, "val")
    measured = json.loads((RunFolder(folder).averaged_evaluation(rows[-1]["step"]) / METRICS_FILE).read_text())
    assert rows[-1]["ema_mean_iou"] == measured["mean_iou"] and rows[0]["ema_mean_iou"] == rows[0]["mean_iou"]

    assert export_adapter(newest(folder), tmp_path / "alone", averaged=True) == len(averages)
    alone = load_file(tmp_path / "alone" / WEIGHTS_FILE)
    assert all(torch.equal(alone[name_in_peft_file(name)], values) for name, values in averages.items())
    check_averages_kept(newest(folder), DECAY)
    with pytest.raises(ConfigError, match=r"train\.ema: found null; expected a decay"):
        check_averages_kept(newest(folder), None)


def test_blends_with_the_start_are_scored_in_memory_and_drawn(
    adapted_run: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """The model at the start is the reference of the probe; the best blend is named, and the report has the curve."""
    folder, _ = adapted_run
    Image.new("RGB", (60, 40), (90, 40, 200)).save(tmp_path / "0.png")
    probe = tmp_path / "probe.jsonl"
    probe.write_text(json.dumps({"image": "0.png", "prompt": "what?"}) + "\n")
    arguments = ["launch/blend.py", "--config", folder / "config.yaml", f"evaluate.probe={probe}"]
    output = run(arguments, 1, tmp_path / "logs")
    rows = json.loads(RunFolder(folder).blends.read_text())
    assert [row["fraction"] for row in rows] == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0] and rows[0]["probe_same"] == 1
    measured = [row for row in read_metrics(folder, "val") if row["step"] in (0, NUM_ADAPTED_STEPS)]
    for row, expected in zip((rows[0], rows[-1]), measured, strict=True):
        assert row["mean_iou"] == pytest.approx(expected["mean_iou"], abs=1e-6)
    assert "best of those that keep 0.98 of the start's probe score: blend 0." in output
    assert "Blends with the start" in RunFolder(folder).report.read_text(encoding="utf-8")


def newest(folder: Path) -> Path:
    return list_checkpoints(folder / "checkpoints")[-1]


def test_a_second_training_in_one_folder_is_refused(shards: Path, start_model: Path, tmp_path: Path) -> None:
    """It changes nothing there, and the first goes on."""
    changes = ["train.max_steps=500", "train.epochs=100", "checkpoint.every_steps=2", "evaluate.before_training=false"]
    arguments = ["launch/train.py", *short_run_settings(shards, start_model, tmp_path / "run", *changes)]
    with started(arguments, 2, tmp_path / "logs") as first:
        wait_for_step(tmp_path / "run", 3, first)
        written = (tmp_path / "run" / "config.yaml").read_bytes()
        with started([*arguments, "seed=7"], 2, tmp_path / "second") as second:
            assert second.wait() == [2, 2], second.output()
            assert (
                second.output().count(f"another training run is writing there: process {first.processes[0].pid} on ")
                == 2
            )
        assert (tmp_path / "run" / "config.yaml").read_bytes() == written
        first.send(signal.SIGUSR1)
        assert first.wait() == [0, 0], first.output()
    steps = [row["step"] for row in read_metrics(tmp_path / "run", "train")]
    assert steps == list(range(1, len(steps) + 1))
