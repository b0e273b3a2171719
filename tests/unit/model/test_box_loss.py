"""The loss that knows distance: it finds labelled boxes, is exact under prefix sharing, has the right gradient."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_config

from cogvlm_ft.data.encode import encode_turns
from cogvlm_ft.errors import ConfigError
from cogvlm_ft.grounding.targets import Turn
from cogvlm_ft.model import CogVLMForCausalLM, CogVLMTokenizer
from cogvlm_ft.model.box_loss import BoxLoss, build_box_loss, token_types
from cogvlm_ft.settings import BOX_LOSSES, BoxLossConfig, TrainConfig

ANSWERS = {
    "图片中存在一只狗,所在区域为[[086,540,400,760]]": [(86, 540, 400, 760)],
    "[[000,001,999,100;012,345,678,999]]": [(0, 1, 999, 100), (12, 345, 678, 999)],
    "未找到指定目标": [],
    "2024,123,456,789 and 123,456,789,1000, 12,34,56,78": [],
}


def labels_of(tokenizer: CogVLMTokenizer, answers: list[str]) -> torch.Tensor:
    """Labels as of a batch: prompts, which hold boxes too, and padding are not labelled."""
    rows = [[-100, -100, *tokenizer.encode(answer), tokenizer.eos_token_id] for answer in answers]
    longest = max(map(len, rows))
    return torch.tensor([row + [-100] * (longest - len(row)) for row in rows])


def test_every_labelled_box_is_found_and_nothing_else(tokenizer: CogVLMTokenizer) -> None:
    labels = labels_of(tokenizer, list(ANSWERS))
    loss = BoxLoss(token_types(tokenizer))
    found: dict[int, list[tuple[int, ...]]] = {row: [] for row in range(len(ANSWERS))}
    places = loss.places(labels)
    for row, first in zip(places.rows[:, 0, 0].tolist(), places.columns[:, 0, 0].tolist(), strict=True):
        text = tokenizer.decode(labels[row, first : first + 15].tolist())
        found[row].append(tuple(map(int, text.split(","))))
    assert list(found.values()) == list(ANSWERS.values())
    assert not len(loss.places(torch.full_like(labels, -100)).rows)


def scores_of(tokenizer: CogVLMTokenizer, labels: torch.Tensor, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(int((labels >= 0).sum()), len(tokenizer), dtype=torch.float64)


@pytest.mark.parametrize("kind", BOX_LOSSES)
def test_the_gradient_is_that_of_finite_differences(kind: str, tokenizer: CogVLMTokenizer) -> None:
    labels = labels_of(tokenizer, ["[[086,540,400,760]]"])
    loss = BoxLoss(token_types(tokenizer), 0.7, kind)
    tokens = torch.tensor(list(tokenizer.digits))
    base = scores_of(tokenizer, labels)

    def of_digits(digits: torch.Tensor) -> torch.Tensor:
        return loss.distance(base.index_copy(1, tokens, digits), labels, loss.places(labels))

    assert torch.autograd.gradcheck(of_digits, base[:, tokens].clone().requires_grad_(), atol=1e-6)


def test_the_distance_is_that_of_the_expected_coordinates(tokenizer: CogVLMTokenizer) -> None:
    labels = labels_of(tokenizer, ["[[100,200,300,400]]"])
    answer = tokenizer.encode("[[103,200,300,400]]")
    scores = torch.full((int((labels >= 0).sum()), len(tokenizer)), -50.0)
    for position, token in enumerate(answer):
        scores[position, token] = 50.0
    expected, giou = BoxLoss(token_types(tokenizer), 2.0), BoxLoss(token_types(tokenizer), 1.0, "giou")
    places = expected.places(labels)
    assert expected.distance(scores, labels, places).item() == pytest.approx(2 * 0.003)
    assert giou.distance(scores, labels, places).item() == pytest.approx(1 - 197 / 200, abs=1e-5)


def test_turns_of_one_image_have_the_loss_that_they_have_apart(
    tokenizer: CogVLMTokenizer, tiny_model: CogVLMForCausalLM
) -> None:
    settings = TrainConfig(box_loss=BoxLossConfig(0.5, "giou"), digit_weights=[4.0, 2.0, 1.0])
    tiny_model.box_loss = build_box_loss(settings, tokenizer)
    turns = [Turn(f"Where is shape {n}?", answer) for n, answer in enumerate(ANSWERS)]
    together = loss_sum(tiny_model, tokenizer, turns)
    apart = [loss_sum(tiny_model, tokenizer, [turn]) for turn in turns]
    assert together == pytest.approx(sum(apart), rel=1e-5)
    tiny_model.box_loss = None
    assert loss_sum(tiny_model, tokenizer, turns) != pytest.approx(together, rel=1e-4)


def loss_sum(model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, turns: list[Turn]) -> float:
    config = tiny_config(vocab_size=len(tokenizer))
    sequences = encode_turns(turns, tokenizer, config)
    torch.manual_seed(0)
    side = model.config.image_size
    with torch.no_grad():
        out = model(
            input_ids=sequences.input_ids[None],
            pixel_values=torch.rand(1, 3, side, side),
            position_ids=sequences.position_ids[None],
            block_ids=sequences.block_ids[None],
            labels=sequences.labels[None],
            num_items_in_batch=1.0,
            return_logits=False,
        )
    return float(out.loss)


def test_weights_of_digits_have_a_mean_of_1(tokenizer: CogVLMTokenizer) -> None:
    labels = labels_of(tokenizer, list(ANSWERS))
    loss = build_box_loss(TrainConfig(digit_weights=[4.0, 2.0, 1.0]), tokenizer)
    assert loss is not None
    weights = loss.token_weights(labels, loss.places(labels))
    changed = weights[weights != 1]
    assert len(changed) == 3 * 4 * 3 and float(changed.mean()) == pytest.approx(1)
    assert changed[:3].tolist() == pytest.approx([12 / 7, 6 / 7, 3 / 7])


def test_nothing_is_added_by_default_and_three_weights_are_expected(tokenizer: CogVLMTokenizer) -> None:
    assert build_box_loss(TrainConfig(), tokenizer) is None
    assert build_box_loss(TrainConfig(digit_weights=[2.0, 2.0, 2.0]), tokenizer) is None
    with pytest.raises(ConfigError, match=r"train\.digit_weights: found 2 numbers; expected 3"):
        build_box_loss(TrainConfig(digit_weights=[4.0, 2.0]), tokenizer)
