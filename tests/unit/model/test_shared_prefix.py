"""Several turns after one image equal as many samples: losses, logits and gradients of every parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

from cogvlm_ft.data.collate import Batch, Example, collate
from cogvlm_ft.data.encode import Sequences, encode_turns
from cogvlm_ft.data.plan import Item
from cogvlm_ft.grounding.targets import Turn
from cogvlm_ft.model import CogVLMForCausalLM, CogVLMTokenizer, enable_gradient_checkpointing
from cogvlm_ft.model.prompt import build_conversation

TURNS = [
    Turn("Where is the red circle?", "[[086,540,400,760]]"),
    Turn("请指出蓝色方形的位置。", "未找到指定目标"),
    Turn("Is there a dog?", "图片中存在一只狗,所在区域为[[012,345,678,999;000,000,999,999]]"),
    Turn("dog", "no"),
]
OTHER_TURNS = [Turn("Give its box.", "[[001,002,003,004]]"), Turn("狗", "[[999,999,999,999]]")]

# Nothing depends on the image positions of the last layer, so the gradients of these are 0.
WITHOUT_INFLUENCE = ("model.layers.1.self_attn.vision_expert_dense.", "model.layers.1.mlp.vision_mlp.")

Gradients = dict[str, Tensor]


@pytest.fixture
def model(tiny_model: CogVLMForCausalLM) -> CogVLMForCausalLM:
    return tiny_model.train()


def picture(seed: int = 0) -> Tensor:
    return torch.randn(3, 56, 56, generator=torch.Generator().manual_seed(seed))


def batch_of(*examples: tuple[Tensor, Sequences], weights: Iterable[float] | None = None) -> Batch:
    weights = weights or [1.0] * len(examples)
    return collate(
        [
            Example(f"s{i}", Item(0, i, weight), pixels, sequences, weight, num_turns=1)
            for i, ((pixels, sequences), weight) in enumerate(zip(examples, weights, strict=True))
        ]
    )


def run(model: CogVLMForCausalLM, batch: Batch, return_logits: bool = False) -> tuple[Tensor, Tensor]:
    """Return the summed loss, and the logits float[B, L, V] if requested."""
    out = model(
        input_ids=batch.input_ids,
        pixel_values=batch.pixel_values,
        position_ids=batch.position_ids,
        block_ids=batch.block_ids,
        labels=batch.labels,
        num_items_in_batch=1.0,
        return_logits=return_logits,
    )
    return out.loss, out.logits


def gradients(model: CogVLMForCausalLM, loss: Tensor) -> Gradients:
    """Return the gradient of every parameter; each must have one."""
    model.zero_grad()
    loss.backward()
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
    return found


def assert_same(model: CogVLMForCausalLM, loss: Tensor, wanted_loss: Tensor) -> None:
    assert wanted_loss.item() > 10
    assert loss.item() == pytest.approx(wanted_loss.item(), rel=1e-5)
    found, wanted = gradients(model, loss), gradients(model, wanted_loss)
    for name in wanted:
        largest = wanted[name].abs().max()
        assert (largest > 0) != name.startswith(WITHOUT_INFLUENCE), name
        assert (found[name] - wanted[name]).abs().max() <= 1e-4 * largest, name


def separate_loss(model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, pixels: Tensor, turns: list[Turn]) -> Tensor:
    """The training form, one sequence per turn."""
    batches = [batch_of((pixels, encode_turns([turn], tokenizer, model.config))) for turn in turns]
    return torch.stack([run(model, batch)[0] for batch in batches]).sum()


def published_loss(model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, pixels: Tensor, turns: list[Turn]) -> Tensor:
    """The published input form, one conversation per turn."""
    losses = []
    for turn in turns:
        one = build_conversation(tokenizer, model.config, query=turn.prompt, images=[pixels], answer=turn.answer)
        rows = {name: one[name][None] for name in ("input_ids", "token_type_ids", "attention_mask", "labels")}
        losses.append(model(**rows, images=[one["images"]], num_items_in_batch=1.0).loss)
    return torch.stack(losses).sum()


@pytest.mark.slow
@pytest.mark.parametrize("template_version", ["base", "chat", "vqa"])
@pytest.mark.parametrize("apart", [separate_loss, published_loss])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_turns_of_one_image_share_its_prefix_exactly(
    model: CogVLMForCausalLM,
    tokenizer: CogVLMTokenizer,
    apart: Callable[..., Tensor],
    checkpointing: bool,
    template_version: str,
) -> None:
    model.config.template_version = template_version
    wanted = apart(model, tokenizer, picture(), TURNS)
    if checkpointing:
        enable_gradient_checkpointing(model)
    loss, _ = run(model, batch_of((picture(), encode_turns(TURNS, tokenizer, model.config))))
    assert_same(model, loss, wanted)


def test_checkpointing_runs_every_layer_a_second_time(model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer) -> None:
    """The test above depends on this."""
    enable_gradient_checkpointing(model)
    calls: list[str] = []
    for layer in [*model.model.layers, *model.model.vision.transformer.layers]:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append("mlp"))
    loss, _ = run(model, batch_of((picture(), encode_turns(TURNS, tokenizer, model.config))))
    assert len(calls) == 4
    loss.backward()
    assert len(calls) == 8


def test_logits_of_a_turn_are_those_it_has_alone(model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer) -> None:
    together = batch_of((picture(), encode_turns(TURNS, tokenizer, model.config)))
    _, logits = run(model, together, return_logits=True)
    for number, turn in enumerate(TURNS, start=1):
        alone = batch_of((picture(), encode_turns([turn], tokenizer, model.config)))
        _, wanted = run(model, alone, return_logits=True)
        found = logits[together.block_ids == number]
        torch.testing.assert_close(found, wanted[alone.block_ids == 1], atol=1e-4, rtol=0)


def test_the_order_of_the_turns_does_not_matter(model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer) -> None:
    forward, backward = (
        run(model, batch_of((picture(), encode_turns(turns, tokenizer, model.config))))[0]
        for turns in (TURNS, TURNS[::-1])
    )
    assert_same(model, backward, forward)


def test_a_batch_is_the_sum_of_its_images(model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer) -> None:
    examples = [
        (picture(1), encode_turns(TURNS, tokenizer, model.config)),
        (picture(2), encode_turns(OTHER_TURNS, tokenizer, model.config)),
    ]
    batch = batch_of(*examples)
    assert (batch.block_ids[1] == -1).sum() > 20
    wanted = run(model, batch_of(examples[0]))[0] + run(model, batch_of(examples[1]))[0]
    assert_same(model, run(model, batch)[0], wanted)


def with_pads(batch: Batch, num_pads: int, input_id: int, position_id: int) -> Batch:
    def pad(tensor: Tensor, value: int) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, num_pads), value=value)

    return Batch(
        **{
            **vars(batch),
            "input_ids": pad(batch.input_ids, input_id),
            "labels": pad(batch.labels, -100),
            "position_ids": pad(batch.position_ids, position_id),
            "block_ids": pad(batch.block_ids, -1),
        }
    )


@pytest.mark.parametrize(("input_id", "position_id"), [(0, 0), (77, 5)], ids=["collated", "anything"])
def test_pads_change_nothing(
    model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, input_id: int, position_id: int
) -> None:
    batch = batch_of((picture(), encode_turns(TURNS, tokenizer, model.config)))
    padded = with_pads(batch, 13, input_id, position_id)
    loss, logits = run(model, padded, return_logits=True)
    wanted_loss, wanted_logits = run(model, batch, return_logits=True)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[:, :-13], wanted_logits, atol=1e-4, rtol=0)
    assert_same(model, loss, wanted_loss)


def test_an_example_of_weight_0_changes_nothing(model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer) -> None:
    examples = [
        (picture(1), encode_turns(TURNS, tokenizer, model.config)),
        (picture(2), encode_turns(OTHER_TURNS, tokenizer, model.config)),
    ]
    wanted, _ = run(model, batch_of(examples[0]))
    assert_same(model, run(model, batch_of(*examples, weights=[1.0, 0.0]))[0], wanted)


def test_a_batch_of_weight_0_has_no_loss_but_a_gradient_for_every_parameter(
    model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer
) -> None:
    """Under ZeRO-3 the other ranks wait for this rank's gradients."""
    batch = batch_of((picture(), encode_turns(TURNS, tokenizer, model.config)), weights=[0.0])
    loss, _ = run(model, batch)
    assert loss.item() == 0.0
    assert all((gradient == 0).all() for gradient in gradients(model, loss).values())


def test_a_token_influences_its_own_turn_only(model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer) -> None:
    batch = batch_of((picture(), encode_turns(TURNS, tokenizer, model.config)))
    _, before = run(model, batch, return_logits=True)
    in_turn_2 = batch.block_ids == 2
    batch.input_ids[in_turn_2] = batch.input_ids[in_turn_2] % 200 + 100
    _, after = run(model, batch, return_logits=True)
    change = (after - before).abs().amax(dim=-1)
    assert change[~in_turn_2].max() < 1e-5
    assert change[in_turn_2].min() > 1e-2


def test_a_later_token_of_a_turn_does_not_influence_an_earlier_one(
    model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer
) -> None:
    batch = batch_of((picture(), encode_turns(TURNS, tokenizer, model.config)))
    _, before = run(model, batch, return_logits=True)
    last_of_turn_3 = int((batch.block_ids[0] == 3).nonzero()[-1])
    batch.input_ids[0, last_of_turn_3] = 150
    _, after = run(model, batch, return_logits=True)
    change = (after - before).abs().amax(dim=-1)[0]
    assert change[last_of_turn_3] > 1e-2
    change[last_of_turn_3] = 0
    assert change.max() < 1e-5


def test_the_image_influences_every_turn(model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer) -> None:
    batch = batch_of((picture(), encode_turns(TURNS, tokenizer, model.config)))
    _, before = run(model, batch, return_logits=True)
    batch.pixel_values[0, :, 20:30, 20:30] += 3.0
    _, after = run(model, batch, return_logits=True)
    change = (after - before).abs().amax(dim=-1)
    assert change[batch.block_ids > 0].min() > 1e-3
    assert change[0, :2].max() < 1e-5  # bos and boi precede the patches
