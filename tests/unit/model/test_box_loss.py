"""The loss that knows distance: it finds labelled boxes, is exact under prefix sharing, has the right gradient."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from tiny import tiny_config

from cogvlm_ft.data.encode import encode_turns
from cogvlm_ft.errors import CheckpointError
from cogvlm_ft.grounding.targets import Turn
from cogvlm_ft.model import CogVLMForCausalLM, CogVLMTokenizer
from cogvlm_ft.model.box_loss import BoxLoss, build_box_loss
from cogvlm_ft.settings import BOX_LOSSES, BoxLossConfig, TrainConfig

DOG = "图片中存在一只狗,所在区域为[[086,540,400,760]]"
ANSWERS = {
    DOG: [(86, 540, 400, 760)],
    "[[000,001,999,100;012,345,678,999]] and [[500,500,500,500]]": [
        (0, 1, 999, 100),
        (12, 345, 678, 999),
        (500, 500, 500, 500),
    ],
    "未找到指定目标": [],
    "[[2024,123,456,789]] and [[123,456,789,1000]], [[12,34,56,78]], [[123,456,789]]": [],
    "编号 100,200,300,400 [[001,002,003,004]] 120,220,320,420;130,230,330,430]] [[140,240,340,440": [(1, 2, 3, 4)],
}


def labels_of(tokenizer: CogVLMTokenizer, answers: list[str]) -> torch.Tensor:
    """Labels as of a batch: prompts, which hold boxes too, and padding are not labelled."""
    rows = [[-100, -100, *tokenizer.encode(answer), tokenizer.eos_token_id] for answer in answers]
    longest = max(map(len, rows))
    return torch.tensor([row + [-100] * (longest - len(row)) for row in rows])


def loss_of(tokenizer: CogVLMTokenizer, weight: float = 0.0, kind: str = "expected", *weights: float) -> BoxLoss:
    return BoxLoss(tokenizer.piece_bytes, tokenizer.digits, weight, kind, weights or (1.0, 1.0, 1.0))


def found_boxes(loss: BoxLoss, labels: torch.Tensor) -> list[list[tuple[int, ...]]]:
    found: list[list[tuple[int, ...]]] = [[] for _ in labels]
    places = loss.places(labels)
    for row, tokens in zip(places.rows[:, 0, 0].tolist(), labels[places].tolist(), strict=True):
        digits = [[loss.digits[token] for token in coordinate] for coordinate in tokens]
        found[row].append(tuple(100 * a + 10 * b + c for a, b, c in digits))
    return found


def test_every_labelled_box_in_brackets_is_found_and_nothing_else(tokenizer: CogVLMTokenizer) -> None:
    labels, loss = labels_of(tokenizer, list(ANSWERS)), loss_of(tokenizer)
    assert found_boxes(loss, labels) == list(ANSWERS.values())
    assert not len(loss.places(torch.full_like(labels, -100)).rows)
    half = labels_of(tokenizer, [DOG])
    half[half == tokenizer.encode("086")[-3]] = -100  # a box of which a part is not labelled
    assert found_boxes(loss, half) == [[]]


def scores_of(tokenizer: CogVLMTokenizer, labels: torch.Tensor, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(int((labels >= 0).sum()), len(tokenizer), dtype=torch.float64)


@pytest.mark.parametrize("kind", BOX_LOSSES)
def test_the_gradient_is_that_of_finite_differences(kind: str, tokenizer: CogVLMTokenizer) -> None:
    labels = labels_of(tokenizer, ["[[086,540,400,760;300,100,300,200]]", "未找到指定目标"])
    loss = loss_of(tokenizer, 0.7, kind, 1.5, 1.0, 0.5)
    tokens = torch.tensor(list(tokenizer.digits))
    base = scores_of(tokenizer, labels)

    def of_digits(digits: torch.Tensor) -> torch.Tensor:
        return loss.loss_sum(base.index_copy(1, tokens, digits).log_softmax(-1), labels)

    assert torch.autograd.gradcheck(of_digits, base[:, tokens].clone().requires_grad_(), atol=1e-6)


def certain(tokenizer: CogVLMTokenizer, answer: str, others: float = 0.0) -> torch.Tensor:
    """Return log-probabilities of each token of an answer; `others`: the fraction of tokens that are no digits."""
    ids = [*tokenizer.encode(answer), tokenizer.eos_token_id]
    log_probs = torch.full((len(ids), len(tokenizer)), -100.0)
    log_probs[range(len(ids)), ids] = float(np.log(1 - others))
    log_probs[:, tokenizer.encode("x")[-1]] = float(np.log(others or 1e-40))
    return log_probs


@pytest.mark.parametrize("others", [0.0, 0.9])
def test_the_distance_is_that_of_the_expected_coordinates(others: float, tokenizer: CogVLMTokenizer) -> None:
    """Probability that is not on digits does not count."""
    labels = labels_of(tokenizer, ["[[100,200,300,400]]"])
    log_probs = certain(tokenizer, "[[103,200,300,400]]", others)
    entropy = -float(log_probs[torch.arange(len(log_probs)), labels[labels >= 0]].sum())
    expected = loss_of(tokenizer, 2.0).loss_sum(log_probs, labels).item() - entropy
    giou = loss_of(tokenizer, 1.0, "giou").loss_sum(log_probs, labels).item() - entropy
    assert expected == pytest.approx(2 * 0.003, abs=1e-4)
    assert giou == pytest.approx(1 - 198 / 201, abs=1e-4)


@pytest.mark.parametrize("kind", BOX_LOSSES)
def test_a_box_within_one_bin_has_a_distance_too(kind: str, tokenizer: CogVLMTokenizer) -> None:
    loss, labels = loss_of(tokenizer, 1.0, kind), labels_of(tokenizer, ["[[300,100,300,100]]"])
    distances = [
        float(
            loss.loss_sum(certain(tokenizer, answer, 0.5), labels)
            - loss_of(tokenizer).loss_sum(certain(tokenizer, answer, 0.5), labels)
        )
        for answer in ("[[300,100,300,100]]", "[[300,100,301,100]]", "[[300,100,305,100]]", "[[310,100,312,100]]")
    ]
    assert distances == sorted(distances) and distances[0] == pytest.approx(0, abs=1e-4) and distances[1] > 1e-4


@pytest.mark.parametrize("answers", [["未找到指定目标"], ["100,200,300,400"], []])
def test_without_a_box_it_is_cross_entropy(answers: list[str], tokenizer: CogVLMTokenizer) -> None:
    """As on a rank that has no box, or none but padding."""
    labels = labels_of(tokenizer, answers) if answers else torch.full((2, 9), -100)
    log_probs = scores_of(tokenizer, labels).log_softmax(-1).requires_grad_()
    for kind in BOX_LOSSES:
        loss = loss_of(tokenizer, 1.0, kind, 2.0, 0.5, 0.5).loss_sum(log_probs, labels)
        loss.backward()
        torch.testing.assert_close(loss, F.nll_loss(log_probs, labels[labels >= 0], reduction="sum"))
    assert log_probs.grad is not None and bool(log_probs.grad.isfinite().all())


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
    assert len(changed) == 5 * 4 * 3 and float(changed.mean()) == pytest.approx(1)
    assert changed[:3].tolist() == pytest.approx([12 / 7, 6 / 7, 3 / 7])


def test_nothing_is_added_by_default(tokenizer: CogVLMTokenizer) -> None:
    assert build_box_loss(TrainConfig(), tokenizer) is None
    assert build_box_loss(TrainConfig(digit_weights=[2.0, 2.0, 2.0]), tokenizer) is None


@pytest.mark.parametrize("options", [{"split_digits": False}, {"byte_fallback": False, "split_digits": True}])
def test_a_tokenizer_without_a_token_per_digit_is_refused(options: dict[str, bool], tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    texts = ["[[086,540,400,760]] 086 540 400 760"] * 20  # of digits that do not occur there is no piece
    options = {"model_type": "bpe", "hard_vocab_limit": False, "minloglevel": 2, **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(file.with_suffix("")), vocab_size=24, **options
    )
    expected = r"tokenizer\.model: \[\[.* is written as .*; expected a token for each digit.*\. Use Vicuna's"
    with pytest.raises(CheckpointError, match=expected):
        build_box_loss(TrainConfig(digit_weights=[4.0, 2.0, 1.0]), CogVLMTokenizer(file))
