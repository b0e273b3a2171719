"""Answers to many questions at once are, id by id, those to each question alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_cases import case_dirs
from safetensors.torch import load_file
from torch import Tensor

from cogvlm_ft.errors import DataError
from cogvlm_ft.evaluate.generate import generate_answers
from cogvlm_ft.grounding.boxes import read_boxes
from cogvlm_ft.grounding.grammar import BoxGrammar
from cogvlm_ft.model import CogVLMForCausalLM, CogVLMTokenizer, load_model
from cogvlm_ft.model.prompt import build_conversation

PROMPTS = [
    ["Where is the red circle?", "dog", "请指出蓝色方形的位置。"],
    ["图片中存在一只狗,所在区域为"],
    ["a", "Is there a dog? Give its box as [[x0,y0,x1,y1]].", "狗", "0123456789 [[012,345;678,999]]"],
]
NUM_NEW = 12
GENERATE_CASES = case_dirs(
    lambda name: not name.startswith("gqa"), needs="golden.safetensors", having="out.generated_ids"
)


class IdTokenizer(CogVLMTokenizer):
    """ "Decodes" to the very ids up to eos, which may be any token: a random model hardly ever says the real one."""

    def decode(self, ids: Sequence[int]) -> str:
        ids = list(ids)
        end = ids.index(self.eos_token_id) if self.eos_token_id in ids else len(ids)
        return " ".join(str(token) for token in ids[:end])


class WrittenIds(CogVLMTokenizer):
    """A text is its ids, written down; small enough for the golden models."""

    digits = {3 + digit: digit for digit in range(10)}

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [int(word) for word in text.split()]


@pytest.fixture
def model(tiny_model: CogVLMForCausalLM) -> CogVLMForCausalLM:
    return tiny_model.eval().requires_grad_(False)


@pytest.fixture
def ids_only(tokenizer: CogVLMTokenizer) -> IdTokenizer:
    return IdTokenizer(tokenizer.model_file)


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(0))


def answer_texts(*args: Any, **kwargs: Any) -> list[list[str]]:
    return [[answer.text for answer in answers] for answers in generate_answers(*args, **kwargs)]


def published_answer(
    model: CogVLMForCausalLM,
    tokenizer: CogVLMTokenizer,
    image: Tensor,
    prompt: str,
    max_new_tokens: int,
    history: Sequence[tuple[str, str]] = (),
) -> str:
    one = build_conversation(tokenizer, model.config, query=prompt, images=[image], history=history)
    rows = {name: one[name][None] for name in ("input_ids", "token_type_ids", "attention_mask")}
    ids = model.generate(
        **rows,
        images=[one["images"]],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(ids[0, rows["input_ids"].shape[1] :].tolist())


def choose_eos(model: CogVLMForCausalLM, tokenizer: IdTokenizer, pixels: Tensor) -> None:
    """Take as eos a token that ends some answers early, at different lengths, and leaves others whole."""
    answers = [
        [int(token) for token in answer.split()]
        for answers in answer_texts(model, tokenizer, pixels, PROMPTS, NUM_NEW)
        for answer in answers
    ]
    firsts = {token: [ids.index(token) for ids in answers if token in ids] for ids in answers for token in ids}
    suited = [token for token, places in firsts.items() if len(places) < len(answers) and len(set(places)) >= 2]
    assert suited, "the tiny model says the same everywhere: give it another seed"
    tokenizer.eos_token_id = max(suited, key=lambda token: len(set(firsts[token])))


@pytest.mark.parametrize("template_version", ["base", "chat"])
@pytest.mark.parametrize("ends_early", [False, True], ids=["whole", "eos"])
def test_each_answer_is_the_one_it_gets_alone_and_the_published_one(
    model: CogVLMForCausalLM, ids_only: IdTokenizer, pixels: Tensor, template_version: str, ends_early: bool
) -> None:
    model.config.template_version = template_version
    if ends_early:
        choose_eos(model, ids_only, pixels)
    together = answer_texts(model, ids_only, pixels, PROMPTS, NUM_NEW)
    assert [len(answers) for answers in together] == [3, 1, 4]
    for image, prompts, answers in zip(pixels, PROMPTS, together, strict=True):
        for prompt, answer in zip(prompts, answers, strict=True):
            assert answer_texts(model, ids_only, image[None], [[prompt]], NUM_NEW) == [[answer]]
            assert published_answer(model, ids_only, image, prompt, NUM_NEW) == answer
    lengths = Counter(len(answer.split()) for answers in together for answer in answers)
    if ends_early:
        assert len(lengths) >= 3 and lengths[NUM_NEW]
    else:
        assert lengths == {NUM_NEW: 8}
        assert len({answer for answers in together for answer in answers}) >= 6


def test_the_answer_is_the_decoded_text(
    model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, ids_only: IdTokenizer, pixels: Tensor
) -> None:
    ids = answer_texts(model, ids_only, pixels, PROMPTS, NUM_NEW)
    texts = answer_texts(model, tokenizer, pixels, PROMPTS, NUM_NEW)
    assert texts == [[tokenizer.decode([int(token) for token in answer.split()]) for answer in row] for row in ids]


@pytest.mark.parametrize(("turns_per_pass", "num_passes"), [(1, 0), (2, 0), (3, 4)])
def test_turns_in_chunks_are_answered_as_together_and_share_the_prefix(
    model: CogVLMForCausalLM, ids_only: IdTokenizer, pixels: Tensor, turns_per_pass: int, num_passes: int
) -> None:
    """num_passes: of another rank with more turns; the passes that are not needed here ask nothing."""
    choose_eos(model, ids_only, pixels)
    together = generate_answers(model, ids_only, pixels, PROMPTS, NUM_NEW, not_found=["dog"])
    num_seen: list[int] = []
    model.model.vision.register_forward_hook(lambda *_: num_seen.append(1))
    chunks = dict(turns_per_pass=turns_per_pass, num_passes=num_passes)
    found = generate_answers(model, ids_only, pixels, PROMPTS, NUM_NEW, not_found=["dog"], **chunks)
    assert len(num_seen) == 1
    for row, others in zip(found, together, strict=True):
        for answer, other in zip(row, others, strict=True):
            assert answer.token_ids == other.token_ids
            assert answer.token_probs == pytest.approx(other.token_probs, rel=1e-4)
            assert answer.not_found_prob == pytest.approx(other.not_found_prob, rel=1e-4)
            assert answer.truncated == (answer.token_ids[-1] != ids_only.eos_token_id)


def test_the_order_of_images_and_prompts_does_not_matter(
    model: CogVLMForCausalLM, ids_only: IdTokenizer, pixels: Tensor
) -> None:
    wanted = answer_texts(model, ids_only, pixels, PROMPTS, NUM_NEW)
    turned = [prompts[::-1] for prompts in PROMPTS[::-1]]
    found = answer_texts(model, ids_only, pixels.flip(0), turned, NUM_NEW)
    assert [answers[::-1] for answers in found[::-1]] == wanted


def test_a_history_is_read_before_its_own_prompt_only(
    model: CogVLMForCausalLM, ids_only: IdTokenizer, pixels: Tensor
) -> None:
    model.config.template_version = "chat"
    past = (("Is there a dog?", "Found 1: dog."), ("Where?", "[[001,002,003,004]]"))
    histories = [[(), past, past[:1]], [past], [(), (), past, ()]]
    found = answer_texts(model, ids_only, pixels, PROMPTS, NUM_NEW, histories)
    for image, prompts, pasts, answers in zip(pixels, PROMPTS, histories, found, strict=True):
        for prompt, history, answer in zip(prompts, pasts, answers, strict=True):
            assert published_answer(model, ids_only, image, prompt, NUM_NEW, history) == answer
    assert found != answer_texts(model, ids_only, pixels, PROMPTS, NUM_NEW)


def count_passes(model: CogVLMForCausalLM) -> list[int]:
    """The number of columns of every pass from now on."""
    passes: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: passes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return passes


def test_one_pass_over_images_and_prompts_then_one_per_token(
    model: CogVLMForCausalLM, ids_only: IdTokenizer, pixels: Tensor
) -> None:
    passes = count_passes(model)
    answer_texts(model, ids_only, pixels, PROMPTS, NUM_NEW)
    longest = max(sum(len(ids_only.encode(prompt)) for prompt in prompts) for prompts in PROMPTS)
    assert passes == [model.config.num_patches + 3 + longest] + [4] * (NUM_NEW - 1)


@pytest.mark.parametrize("max_new_tokens", [1, 2, 5])
def test_no_more_than_max_new_tokens_and_the_same_first_ones(
    model: CogVLMForCausalLM, ids_only: IdTokenizer, pixels: Tensor, max_new_tokens: int
) -> None:
    long = answer_texts(model, ids_only, pixels, PROMPTS, NUM_NEW)
    short = answer_texts(model, ids_only, pixels, PROMPTS, max_new_tokens)
    assert short == [[" ".join(answer.split()[:max_new_tokens]) for answer in answers] for answers in long]


def test_decoding_ends_with_the_last_eos(model: CogVLMForCausalLM, ids_only: IdTokenizer, pixels: Tensor) -> None:
    """All rows end early: no pass is made for nothing."""
    (answer,) = answer_texts(model, ids_only, pixels[:1], [["dog"]], NUM_NEW)[0]
    tokens = answer.split()
    end = max(tokens.index(token) for token in tokens[:-1])
    assert 0 < end < NUM_NEW - 1
    ids_only.eos_token_id = int(tokens[end])
    passes = count_passes(model)
    found = answer_texts(model, ids_only, pixels[:1], [["dog", "dog"]], NUM_NEW)
    assert found == [[" ".join(tokens[:end])] * 2]
    assert len(passes) == 1 + end


def test_an_answer_may_be_empty(model: CogVLMForCausalLM, ids_only: IdTokenizer, pixels: Tensor) -> None:
    (answer,) = answer_texts(model, ids_only, pixels[:1], [["dog"]], 1)[0]
    ids_only.eos_token_id = int(answer)
    assert answer_texts(model, ids_only, pixels[:1], [["dog"]], NUM_NEW) == [[""]]


def test_a_question_without_tokens_is_refused(
    model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, pixels: Tensor
) -> None:
    with pytest.raises(DataError, match="empty prompt"):
        answer_texts(model, tokenizer, pixels[:1], [["dog", ""]], NUM_NEW)


def uncached_ids(model: CogVLMForCausalLM, prompt_ids: list[int], image: Tensor, num_new: int, eos: int) -> list[int]:
    """One question alone, the whole sequence again for every token."""
    prefix = [1] + [0] * (model.config.num_patches + 2)
    new_ids: list[int] = []
    while len(new_ids) < num_new and eos not in new_ids:
        ids = torch.tensor([prefix + prompt_ids + new_ids])
        logits = model(input_ids=ids, pixel_values=image[None], use_cache=False).logits
        new_ids.append(int(logits[0, -1].argmax()))
    return new_ids


@pytest.mark.slow
@pytest.mark.parametrize("ends_early", [False, True], ids=["whole", "eos"])
def test_ids_are_those_of_decoding_one_by_one_without_a_cache(
    model: CogVLMForCausalLM, ids_only: IdTokenizer, pixels: Tensor, ends_early: bool
) -> None:
    if ends_early:
        choose_eos(model, ids_only, pixels)
    together = generate_answers(model, ids_only, pixels, PROMPTS, NUM_NEW)
    for image, prompts, answers in zip(pixels, PROMPTS, together, strict=True):
        for prompt, answer in zip(prompts, answers, strict=True):
            wanted = uncached_ids(model, ids_only.encode(prompt), image, NUM_NEW, ids_only.eos_token_id)
            assert list(answer.token_ids) == wanted


def test_turns_far_apart_in_number_and_length(model: CogVLMForCausalLM, ids_only: IdTokenizer, pixels: Tensor) -> None:
    """13 turns behind one image, one behind the other; prompts of 1 to 80 tokens."""
    prompts = [["dog " * (1 + 3 * n) for n in range(13)], ["狗"]]
    together = generate_answers(model, ids_only, pixels[:2], prompts, 5)
    for b, row in enumerate(prompts):
        for prompt, answer in zip(row, together[b], strict=True):
            assert list(answer.token_ids) == uncached_ids(model, ids_only.encode(prompt), pixels[b], 5, 2)


@pytest.mark.parametrize("case", GENERATE_CASES, ids=lambda path: path.name)
def test_golden_ids(case: Path, tokenizer: CogVLMTokenizer) -> None:
    """The reference's own ids, with all questions of the case together."""
    model, tensors = load_model(case).eval(), load_file(case / "golden.safetensors")
    model.config.template_version = "base"
    start, wanted = model.config.num_patches + 3, tensors["out.generated_ids"].tolist()
    prompts = []
    for ids, mask in zip(tensors["in.input_ids"], tensors["in.attention_mask"], strict=True):
        prompts.append([" ".join(map(str, ids[mask.bool()][start:].tolist()))])
    with torch.no_grad():
        answers = generate_answers(model, WrittenIds(tokenizer.model_file), tensors["in.images"], prompts, 12)
        [[*twice]] = generate_answers(
            model, WrittenIds(tokenizer.model_file), tensors["in.images"][:1], [[*prompts[0], "5 6 7", *prompts[0]]], 12
        )
    assert [list(row[0].token_ids) for row in answers] == wanted
    assert list(twice[0].token_ids) == list(twice[2].token_ids) == wanted[0]


@pytest.mark.parametrize("turns_per_pass", [None, 2])
def test_finished_turns_leave_the_batch(
    model: CogVLMForCausalLM, ids_only: IdTokenizer, pixels: Tensor, turns_per_pass: int | None
) -> None:
    """Every image stays while chunks follow: they need its prefix."""
    choose_eos(model, ids_only, pixels)
    shapes: list[tuple[int, ...]] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, named: shapes.append(named["input_ids"].shape), with_kwargs=True
    )
    answers = generate_answers(model, ids_only, pixels, PROMPTS, NUM_NEW, turns_per_pass=turns_per_pass)
    hook.remove()
    starts = [n for n, shape in enumerate(shapes) if shape[1] > 4]
    *first, last = [shapes[start + 1 : stop] for start, stop in zip(starts, [*starts[1:], None], strict=True)]
    assert all(rows == 3 for chunk in first for rows, _ in chunk)
    turns = [answer for row in answers for answer in row[len(first) * (turns_per_pass or 0) :]]
    for step, (rows, columns) in enumerate(last, start=1):
        assert sum(len(answer.token_ids) > step for answer in turns) <= rows * columns
    assert last[-1][0] < 3


def step_probabilities(model: CogVLMForCausalLM, prompt_ids: list[int], image: Tensor, new_ids: list[int]) -> Tensor:
    """float[len(new_ids), V]: of the next token, each time, read off one pass over the whole."""
    ids = torch.tensor([[1] + [0] * (model.config.num_patches + 2) + prompt_ids + new_ids])
    logits = model(input_ids=ids, pixel_values=image[None], use_cache=False).logits[0]
    return logits[-len(new_ids) - 1 : -1].softmax(-1)


def digit_probs(probs: Tensor, tokenizer: CogVLMTokenizer) -> list[float]:
    """By the text of the pieces: "7" and the byte of it are both a 7."""
    pieces = tokenizer.piece_bytes
    return [sum(float(p) for p, piece in zip(probs, pieces, strict=True) if piece == b"%d" % d) for d in range(10)]


def test_probabilities_are_the_model_s(model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, pixels: Tensor) -> None:
    answers = generate_answers(model, tokenizer, pixels, PROMPTS, NUM_NEW)
    for image, prompts, row in zip(pixels, PROMPTS, answers, strict=True):
        for prompt, answer in zip(prompts, row, strict=True):
            ids = list(answer.token_ids)
            probs = step_probabilities(model, tokenizer.encode(prompt), image, ids)
            wanted = probs[torch.arange(len(ids)), ids]
            torch.testing.assert_close(torch.tensor(answer.token_probs), wanted, atol=1e-5, rtol=1e-3)
            digits = [
                digit_probs(row, tokenizer) for row, token in zip(probs, ids, strict=True) if token in tokenizer.digits
            ]
            assert len(answer.digit_probs) == len(digits)
            for found, row_wanted in zip(answer.digit_probs, digits, strict=True):
                assert found == pytest.approx(row_wanted, rel=1e-3, abs=1e-5)
            assert answer.not_found_prob is None


def test_digits_of_the_text_have_their_distributions(
    model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, pixels: Tensor
) -> None:
    grammar = BoxGrammar(tokenizer.piece_bytes, tokenizer.eos_token_id, min_boxes=2)
    [[answer]] = generate_answers(model, tokenizer, pixels[:1], [["dog"]], 60, grammars=[[grammar]])
    boxes = read_boxes(answer.text, answer.digit_probs)
    assert boxes is not None and len(boxes) >= 2
    probs = step_probabilities(model, tokenizer.encode("dog"), pixels[0], list(answer.token_ids))
    written = [
        (row, tokenizer.digits[t]) for row, t in zip(probs, answer.token_ids, strict=True) if t in tokenizer.digits
    ]
    first = answer.text[: answer.text.index("[[")]
    of_box = written[sum(character in "0123456789" for character in first) :][:12]
    assert [digit for _, digit in of_box] == [int(c) for k in boxes[0].bins for c in f"{k:03d}"]
    wanted = sum(digit_probs(row, tokenizer)[digit] for row, digit in of_box) / 12
    assert boxes[0].confidence == pytest.approx(wanted, rel=1e-3)


def test_the_probability_of_not_found_goes_up_to_the_token_that_differs(
    model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, pixels: Tensor
) -> None:
    """Of two sentences the likelier: one leaves the answer at its third token, one at its first."""
    [[plain]] = generate_answers(model, tokenizer, pixels[:1], [["dog"]], NUM_NEW)
    sentences = {"near": [*plain.token_ids[:2], 77, 78], "far": [88, 89]}

    class Sentences(CogVLMTokenizer):
        def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
            return sentences.get(text) or super().encode(text, add_special_tokens)

    probs = step_probabilities(model, tokenizer.encode("dog"), pixels[0], list(plain.token_ids))
    near = float(probs[0, plain.token_ids[0]] * probs[1, plain.token_ids[1]] * probs[2, 77])
    far = float(probs[0, 88])
    for names, wanted in ((["near"], near), (["far"], far), (["far", "near"], max(near, far))):
        [[found]] = generate_answers(
            model, Sentences(tokenizer.model_file), pixels[:1], [["dog"]], NUM_NEW, not_found=names
        )
        assert found.not_found_prob == pytest.approx(wanted, rel=1e-3)
        assert found.token_ids == plain.token_ids
