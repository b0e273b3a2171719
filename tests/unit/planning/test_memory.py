"""Memory of a run: against anchors of the 17B model and real tensors; suggestions and limits."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch import Tensor, nn

from cogvlm_ft.config import load_config
from cogvlm_ft.data.index import load_index
from cogvlm_ft.data.reader import ShardReader
from cogvlm_ft.errors import ConfigError
from cogvlm_ft.model import CogVLMConfig, CogVLMForCausalLM
from cogvlm_ft.model.adapters import FULL
from cogvlm_ft.model.layout import build_layout
from cogvlm_ft.model.loading import allocate_model
from cogvlm_ft.model.quantized import float_shapes, stored_tensors
from cogvlm_ft.planning.activations import MicroBatchShape, kept_bytes, peak_of, probe_stages
from cogvlm_ft.planning.data_turns import largest_pass, most_turns_of
from cogvlm_ft.planning.memory import GIB, Cluster, Planner, Verdict, judge
from cogvlm_ft.planning.preflight import check_fits, whole_planner
from cogvlm_ft.planning.step_time import count_flops
from cogvlm_ft.planning.suggestions import (
    cheaper_settings,
    fewest_gpus_to_score,
    find_limits,
    fits_to_score,
    suggest_changes,
)
from cogvlm_ft.planning.zero3_coordinator import Gathered, GatherRules, simulate
from cogvlm_ft.planning.zero_settings import read_zero_settings
from cogvlm_ft.settings import Config

REPOSITORY = Path(__file__).resolve().parents[3]
PARAMETERS_17B = 17_639_685_376
OFFLOAD = "deepspeed=zero3_offload_optimizer"
SMALL = CogVLMConfig(
    vocab_size=400,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    vision_config=dict(
        hidden_size=48, num_heads=3, intermediate_size=96, num_hidden_layers=2, image_size=56, num_positions=17
    ),
)


def config(*settings: str) -> Config:
    return load_config(None, ["model.path=m", "data.shards=s", "output_dir=o", *settings])


@pytest.fixture(scope="module")
def planner_17b() -> Planner:
    return Planner(config(), CogVLMConfig(), Cluster(1, 8))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "bytes_on_gpus", "bytes_on_host"),
    [
        (["train.precision=bf16"], 16, 0),  # 2 weight + 2 gradient + 4 master + 8 Adam: 282 GB
        (["train.precision=fp32"], 16, 0),  # 4 + 4 + 8
        (["train.precision=bf16", OFFLOAD], 2, 18),
        (["train.precision=fp32", OFFLOAD], 4, 20),
        (["deepspeed=configs/deepspeed/zero3_offload_all.json"], 0, 24),
    ],
)
def test_bytes_per_parameter_of_17b(
    settings: list[str], bytes_on_gpus: int, bytes_on_host: int, planner_17b: Planner
) -> None:
    estimate = planner_17b.changed(config(*settings)).estimate(MicroBatchShape(), evaluation=False)
    assert estimate.num_parameters == PARAMETERS_17B
    assert estimate.persistent_bytes * 8 == bytes_on_gpus * PARAMETERS_17B
    assert estimate.host["offloaded"] == bytes_on_host * PARAMETERS_17B
    assert estimate.disk == 12 * PARAMETERS_17B  # 212 GB


@pytest.mark.parametrize(
    ("settings", "kind", "exact", "rounded"),
    [
        ([], "saving", 211_676_224_512, 291_476_717_568),
        (["deepspeed=zero3_offload_all"], "offloaded", 423_352_449_024, 661_056_003_072),
        # of the 20 bytes per parameter, gradients (4) and their fp32 copy (4) are pinned
        ([OFFLOAD], "offloaded", 352_793_707_520, 426_441_366_528),
        (["checkpoint.background=false"], "saving", 0, 0),
    ],
)
def test_host_memory_with_and_without_rounding(
    settings: list[str], kind: str, exact: int, rounded: int, planner_17b: Planner
) -> None:
    """Of 17B on 8 GPUs, in fp32. What torch rounds up to powers of two is every tensor that DeepSpeed or we pin."""

    planner = planner_17b.changed(config(*settings))
    assert planner.gathered.total  # computed once for all three

    def host(rounded_up_to: float) -> tuple[int, int]:
        changed = planner.changed(cluster=replace(planner.cluster, rounded_up_to=rounded_up_to))
        found = changed.estimate(MicroBatchShape(), evaluation=False)
        return found.host[kind], found.rounding

    assert host(0.0)[0] == exact and host(math.inf)[0] == rounded
    assert host(math.inf)[1] >= rounded - exact
    assert host(2**20)[0] == pytest.approx(exact, rel=1e-3), "small tensors only"


def test_the_verdict_names_the_remedy_for_rounding(planner_17b: Planner) -> None:
    planner = planner_17b.changed(config(OFFLOAD), Cluster(1, 8, 79, 350, rounded_up_to=math.inf))
    verdict = judge(planner.estimate(MicroBatchShape(), evaluation=False), planner.cluster)
    assert re.search(r"available are 350, and \d+ are due to torch's rounding.* add pinned_max_round", verdict.why)


@pytest.mark.slow
def test_a_second_copy_per_node_and_frozen_parts(planner_17b: Planner) -> None:
    multinode = planner_17b.changed(config("deepspeed=configs/deepspeed/zero3_multinode.json"), Cluster(2, 8))
    assert (
        multinode.estimate(MicroBatchShape(), evaluation=False).persistent["second copy (hpZ)"]
        == 4 * PARAMETERS_17B // 8
    )
    frozen = planner_17b.changed(config('model.freeze=["model.*"]')).estimate(MicroBatchShape(), evaluation=False)
    assert (
        frozen.persistent["Adam"] == 8 * 32000 * 4096 // 8 and frozen.persistent["weights"] == 4 * PARAMETERS_17B // 8
    )
    assert frozen.transient["activations"] < GIB // 20, "nothing before lm_head has a backward pass"


def test_two_layers_at_real_width_for_8_ranks(planner_17b: Planner) -> None:
    """By hand: the other 30 language and 61 vision layers of the 17B model are equal to these."""
    two = Planner(config(), CogVLMConfig(num_hidden_layers=2, vision_config={"num_hidden_layers": 2}), Cluster(1, 8))
    h, i, v, w = 4096, 11008, 1792, 15360
    language = 2 * (4 * h * h + 3 * h * i) + 2 * h  # two experts of attention and MLP, two norms
    vision = (4 * v * v + 4 * v) + (2 * v * w + w + v) + 4 * v
    assert two.num_parameters == PARAMETERS_17B - 30 * language - 61 * vision
    small, large = (each.estimate(MicroBatchShape(), evaluation=False) for each in (two, planner_17b))
    assert small.persistent_bytes == pytest.approx(16 * two.num_parameters / 8, rel=1e-6)
    assert small.moment == large.moment


@pytest.mark.parametrize("num_images", [1, 2])
def test_activations_are_the_tensors_that_autograd_saves(num_images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real pass on CPU: all storages that are kept for the backward pass, without the parameters'."""
    monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)  # as in a process with an engine
    sequences = MicroBatchShape(num_images=num_images, turns=3, turn_tokens=10, labelled_tokens=4)
    planner = Planner(config("model.gradient_checkpointing=none"), SMALL, Cluster(1, 1))
    stages = probe_stages(planner.model, sequences)
    model = CogVLMForCausalLM(SMALL).train()
    batch = small_batch(sequences)
    ignored = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in ignored:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**batch, return_logits=False).loss
    assert loss.requires_grad
    assert kept_bytes(stages) == pytest.approx(sum(t.untyped_storage().nbytes() for t in saved.values()), rel=0.05)


def small_batch(sequences: MicroBatchShape) -> dict[str, Tensor]:
    layout = build_layout(SMALL.num_patches, [sequences.turn_tokens] * sequences.turns)
    shape = (sequences.num_images, len(layout.block_ids))
    labels = torch.full(shape, -100)
    for turn in range(sequences.turns):
        stop = SMALL.num_patches + 3 + (turn + 1) * sequences.turn_tokens
        labels[:, stop - sequences.labelled_tokens : stop] = 5
    return dict(
        input_ids=torch.full(shape, 5),
        pixel_values=torch.randn(sequences.num_images, 3, SMALL.image_size, SMALL.image_size),
        position_ids=layout.position_ids.expand(shape),
        block_ids=layout.block_ids.expand(shape),
        labels=labels,
    )


@pytest.mark.slow
def test_recomputing_keeps_less_and_takes_no_more_at_work() -> None:
    kept = {}
    for which in ("none", "vision", "language", "2", "all"):
        model = Planner(config(f"model.gradient_checkpointing={which}"), SMALL, Cluster(1, 1)).model
        kept[which] = kept_bytes(probe_stages(model, MicroBatchShape()))
    assert kept["none"] > kept["vision"] > kept["2"] > kept["all"]
    assert kept["none"] - kept["all"] == (kept["none"] - kept["vision"]) + (kept["none"] - kept["language"])


def test_activations_grow_with_photos_and_resolution(planner_17b: Planner) -> None:
    one, two = (kept_bytes(planner_17b.stages(MicroBatchShape(num_images=n))) for n in (1, 2))
    assert two == pytest.approx(2 * one, rel=0.01)
    small, large = (kept_bytes(planner_17b.stages(MicroBatchShape(image_size=px))) for px in (490, 980))
    assert 3.2 < large / small < 4.0  # four times the patches, the same text
    assert one == small, "490 px is the model's own size"
    assert peak_of(planner_17b.stages(MicroBatchShape()))[2] in ("language layer", "logits")


def test_gathering_by_hand() -> None:
    """Three layers of 10, 20 and 30 elements and a norm of 1 that stays."""
    a, b, c, norm = (nn.Parameter(torch.empty(n, device="meta")) for n in (10, 20, 30, 1))
    once = [[a], [norm], [b], [c]]
    one_by_one = GatherRules(prefetch=0, max_live=1000, max_reuse=0, persistence=1)
    assert simulate(once, one_by_one) == Gathered(peak=30, persistent=1, largest_fetch=30, total=60)
    assert simulate(once, replace(one_by_one, prefetch=1)).peak == 50  # b and c; each fetches the whole next one
    assert simulate(once, replace(one_by_one, prefetch=1000)).peak == 60  # all three from the start
    there_and_back = [*once, *once[::-1]]
    assert simulate(there_and_back, one_by_one).total == 120
    assert simulate(there_and_back, replace(one_by_one, max_reuse=1)).total == 90  # c is still there
    assert simulate(there_and_back, replace(one_by_one, max_reuse=1000)) == Gathered(60, 1, 30, 60)


def test_the_verdict_leaves_room_for_doubt(planner_17b: Planner) -> None:
    estimate = planner_17b.estimate(MicroBatchShape())
    peak, persistent = max(estimate.peaks.values()) / GIB, estimate.persistent_bytes / GIB

    def status(gpu_gib: float, host_gib: float | None = None) -> str:
        return judge(estimate, Cluster(1, 8, gpu_gib, host_gib)).status

    assert status(peak - 0.01) == status(peak + 1) == "tight", "an estimate just above or below proves nothing"
    assert status(persistent) == "too much" and status(2 * peak) == "fits"
    assert status(2 * peak, host_gib=100) == "tight", "copies of checkpoints need more host memory"
    offloaded = planner_17b.changed(config(OFFLOAD)).estimate(MicroBatchShape())
    assert judge(offloaded, Cluster(1, 8, 79, host_gib=300)).status == "too much"


@pytest.mark.slow
def test_every_suggestion_fits(planner_17b: Planner) -> None:
    planner = planner_17b.changed(cluster=Cluster(1, 4, gpu_gib=65))
    assert judge(planner.estimate(MicroBatchShape()), planner.cluster).status == "too much"
    changes = suggest_changes(planner, MicroBatchShape())
    assert OFFLOAD in changes and changes[-1].startswith("8 GPUs")
    for change in changes[:-1]:
        other = planner.changed(config(change))
        assert judge(other.estimate(MicroBatchShape()), other.cluster).status == "fits"


def test_a_quantised_base_holds_its_bytes_and_is_for_one_gpu() -> None:
    lora = config("adapter.rank=4", "adapter.full=[bridge]", "train.precision=bf16")
    qlora = replace(lora, adapter=replace(lora.adapter, base="int4"))
    planner, floats = whole_planner(qlora, SMALL, Cluster(1, 1)), Planner(lora, SMALL, Cluster(1, 1))
    assert (planner.num_parameters, planner.num_trained) == (floats.num_parameters, floats.num_trained)
    base = allocate_model(SMALL, torch.bfloat16, [torch.device("meta")], "int4", [FULL["bridge"]])
    held = sum(tensor.nbytes for tensor in stored_tensors(base).values())
    adapters = floats.num_parameters - sum(math.prod(shape) for shape in float_shapes(base).values())
    weights = planner.estimate(MicroBatchShape(), evaluation=False).persistent["weights"]
    assert (
        weights
        == held + 2 * adapters
        < 0.8 * floats.estimate(MicroBatchShape(), evaluation=False).persistent["weights"]
    )
    assert "adapter.base=int4" in dict(cheaper_settings(floats, MicroBatchShape()))
    assert count_flops(planner.model, MicroBatchShape()) == count_flops(floats.model, MicroBatchShape())
    with pytest.raises(ConfigError, match=r"adapter\.base=int4: found 2 GPUs; expected one GPU"):
        whole_planner(qlora, SMALL, Cluster(1, 2))
    with pytest.raises(ConfigError, match="found offload_param"):
        whole_planner(replace(qlora, deepspeed="zero3_offload_all"), SMALL, Cluster(1, 1))


@pytest.mark.slow
def test_limits_are_the_last_that_fit() -> None:
    planner = Planner(config(), SMALL, Cluster(1, 1, gpu_gib=0.02, reserved_bytes=0))
    limits = find_limits(planner, MicroBatchShape())

    def verdict(sequences: MicroBatchShape) -> Verdict:
        return judge(planner.estimate(sequences, evaluation=False), planner.cluster, ("training",))

    assert 1 < limits.micro_batch_size < 256 and 56 < limits.image_size < 2240
    assert verdict(MicroBatchShape(num_images=limits.micro_batch_size)).status == "fits"
    assert verdict(MicroBatchShape(num_images=limits.micro_batch_size + 1)).status != "fits"
    assert verdict(MicroBatchShape(image_size=limits.image_size)).status == "fits"
    assert verdict(MicroBatchShape(image_size=limits.image_size + 14)).status != "fits"


@pytest.mark.slow
def test_an_impossible_run_is_refused_with_the_arithmetic(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The largest vocabulary, and wide: no machine has the memory, and on CPU offloading would not move it."""
    giant = CogVLMConfig.from_dict({**SMALL.to_dict(), "vocab_size": 1 << 24, "hidden_size": 4096})
    giant.save_pretrained(tmp_path)
    settings = [f"model.path={tmp_path}", OFFLOAD]
    with pytest.raises(
        ConfigError, match=r"cannot fit on 1 ranks: too much: .*51\d\.\d weights .*102\d\.\d Adam.*plan=warn"
    ):
        check_fits(config(*settings))
    check_fits(config(*settings, "plan=ignore"))
    assert not caplog.records
    check_fits(config(*settings, "plan=warn"))
    assert "too much" in caplog.text
    with pytest.raises(ConfigError, match="plan='maybe': expected one of refuse, warn, ignore"):
        config("plan=maybe")


def test_defaults_and_mistakes_in_the_deepspeed_json(tmp_path: Path) -> None:
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    zero = read_zero_settings(config(f"deepspeed={path}"), 8)
    assert zero.rules == GatherRules() and zero.reduce_bucket == 500_000_000 and not zero.offload_optimizer
    path.write_text("[]")
    for wrong in (path, tmp_path / "absent.json"):
        with pytest.raises(ConfigError, match=str(wrong)):
            read_zero_settings(config(f"deepspeed={wrong}"), 8)


def test_an_evaluation_of_many_turns_is_cut_into_chunks_that_fit(planner_17b: Planner) -> None:
    few, many = (planner_17b.estimate(MicroBatchShape(asked_turns=turns)) for turns in (4, 60))
    assert few.asked_together.num_turns <= 4 and many.asked_together.num_turns < 60
    assert judge(many, planner_17b.cluster, ("evaluation",)).status == "fits"
    assert many.transient == few.transient, "training has its own turns"


def test_one_gpu_scores_17b(planner_17b: Planner) -> None:
    """launch/evaluate.py has weights and a pass, no gradients and no optimizer."""
    asked = MicroBatchShape(asked_turns=30)
    coarse = planner_17b.changed(config("train.precision=bf16"), Cluster(1, 1))
    assert coarse.scoring(asked)["weights"] == 2 * PARAMETERS_17B and fits_to_score(coarse, asked)
    assert fewest_gpus_to_score(planner_17b, asked) == 1
    assert not fits_to_score(planner_17b.changed(cluster=Cluster(1, 1, gpu_gib=66)), asked)


def test_passes_have_the_turns_of_the_data(shards: Path) -> None:
    given = config(f"data.shards={shards}", "train.micro_batch_size=2", "data.wording=conversation")
    found = largest_pass(given, SMALL)
    targets = ShardReader(load_index(shards, "train")).index.num_targets.max()
    assert found.num_images == 2 and targets < found.turns == most_turns_of(given, "train")
    assert found.asked_turns == most_turns_of(given, "val")
    split = config(f"data.shards={shards}", "data.max_turns_per_image=2")
    assert largest_pass(split, SMALL).turns == 2 < (largest_pass(split, SMALL).asked_turns or 0)
    short = config(f"data.shards={shards}", "data.max_sequence_length=145")
    assert largest_pass(short, SMALL).turns == 2, "a longer sequence is not trained on"
    assert largest_pass(config(), SMALL).turns == 1 and most_turns_of(config(), "train") is None
