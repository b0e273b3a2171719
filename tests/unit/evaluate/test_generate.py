"""Answers to many questions at once are, id by id, those to each question alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from cogvlm_ft.errors import DataError
from cogvlm_ft.evaluate.generate import generate_answers
from cogvlm_ft.model import CogVLMForCausalLM, CogVLMTokenizer
from cogvlm_ft.model.prompt import build_conversation

PROMPTS = [
    ["Where is the red circle?", "dog", "请指出蓝色方形的位置。"],
    ["图片中存在一只狗,所在区域为"],
    ["a", "Is there a dog? Give its box as [[x0,y0,x1,y1]].", "狗", "0123456789 [[012,345;678,999]]"],
]
NUM_NEW = 12


class IdTokenizer(CogVLMTokenizer):
    """ "Decodes" to the very ids up to eos, which may be any token: a random model hardly ever says the real one."""

    def decode(self, ids: Sequence[int]) -> str:
        ids = list(ids)
        end = ids.index(self.eos_token_id) if self.eos_token_id in ids else len(ids)
        return " ".join(str(token) for token in ids[:end])


@pytest.fixture
def model(tiny_model: CogVLMForCausalLM) -> CogVLMForCausalLM:
    return tiny_model.eval().requires_grad_(False)


@pytest.fixture
def ids_only(tokenizer: CogVLMTokenizer) -> IdTokenizer:
    return IdTokenizer(tokenizer.model_file)


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(0))


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
        for answers in generate_answers(model, tokenizer, pixels, PROMPTS, NUM_NEW)
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
    together = generate_answers(model, ids_only, pixels, PROMPTS, NUM_NEW)
    assert [len(answers) for answers in together] == [3, 1, 4]
    for image, prompts, answers in zip(pixels, PROMPTS, together, strict=True):
        for prompt, answer in zip(prompts, answers, strict=True):
            assert generate_answers(model, ids_only, image[None], [[prompt]], NUM_NEW) == [[answer]]
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
    ids = generate_answers(model, ids_only, pixels, PROMPTS, NUM_NEW)
    texts = generate_answers(model, tokenizer, pixels, PROMPTS, NUM_NEW)
    assert texts == [[tokenizer.decode([int(token) for token in answer.split()]) for answer in row] for row in ids]


def test_the_order_of_images_and_prompts_does_not_matter(
    model: CogVLMForCausalLM, ids_only: IdTokenizer, pixels: Tensor
) -> None:
    wanted = generate_answers(model, ids_only, pixels, PROMPTS, NUM_NEW)
    turned = [prompts[::-1] for prompts in PROMPTS[::-1]]
    found = generate_answers(model, ids_only, pixels.flip(0), turned, NUM_NEW)
    assert [answers[::-1] for answers in found[::-1]] == wanted


def test_a_history_is_read_before_its_own_prompt_only(
    model: CogVLMForCausalLM, ids_only: IdTokenizer, pixels: Tensor
) -> None:
    model.config.template_version = "chat"
    past = (("Is there a dog?", "Found 1: dog."), ("Where?", "[[001,002,003,004]]"))
    histories = [[(), past, past[:1]], [past], [(), (), past, ()]]
    found = generate_answers(model, ids_only, pixels, PROMPTS, NUM_NEW, histories)
    for image, prompts, pasts, answers in zip(pixels, PROMPTS, histories, found, strict=True):
        for prompt, history, answer in zip(prompts, pasts, answers, strict=True):
            assert published_answer(model, ids_only, image, prompt, NUM_NEW, history) == answer
    assert found != generate_answers(model, ids_only, pixels, PROMPTS, NUM_NEW)


def count_passes(model: CogVLMForCausalLM) -> list[int]:
    """The number of columns of every pass from now on."""
    passes: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: passes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return passes


def test_one_pass_over_the_images_one_over_the_prompts_then_one_per_token(
    model: CogVLMForCausalLM, ids_only: IdTokenizer, pixels: Tensor
) -> None:
    passes = count_passes(model)
    generate_answers(model, ids_only, pixels, PROMPTS, NUM_NEW)
    longest = max(len(ids_only.encode(prompt)) for prompts in PROMPTS for prompt in prompts)
    assert passes == [model.config.num_patches + 3, longest] + [1] * (NUM_NEW - 1)


@pytest.mark.parametrize("max_new_tokens", [1, 2, 5])
def test_no_more_than_max_new_tokens_and_the_same_first_ones(
    model: CogVLMForCausalLM, ids_only: IdTokenizer, pixels: Tensor, max_new_tokens: int
) -> None:
    long = generate_answers(model, ids_only, pixels, PROMPTS, NUM_NEW)
    short = generate_answers(model, ids_only, pixels, PROMPTS, max_new_tokens)
    assert short == [[" ".join(answer.split()[:max_new_tokens]) for answer in answers] for answers in long]


def test_decoding_ends_with_the_last_eos(model: CogVLMForCausalLM, ids_only: IdTokenizer, pixels: Tensor) -> None:
    """All rows end early: no pass is made for nothing."""
    (answer,) = generate_answers(model, ids_only, pixels[:1], [["dog"]], NUM_NEW)[0]
    tokens = answer.split()
    end = max(tokens.index(token) for token in tokens[:-1])
    assert 0 < end < NUM_NEW - 1
    ids_only.eos_token_id = int(tokens[end])
    passes = count_passes(model)
    found = generate_answers(model, ids_only, pixels[:1], [["dog", "dog"]], NUM_NEW)
    assert found == [[" ".join(tokens[:end])] * 2]
    assert len(passes) == 2 + end


def test_an_answer_may_be_empty(model: CogVLMForCausalLM, ids_only: IdTokenizer, pixels: Tensor) -> None:
    (answer,) = generate_answers(model, ids_only, pixels[:1], [["dog"]], 1)[0]
    ids_only.eos_token_id = int(answer)
    assert generate_answers(model, ids_only, pixels[:1], [["dog"]], NUM_NEW) == [[""]]


def test_a_question_without_tokens_is_refused(
    model: CogVLMForCausalLM, tokenizer: CogVLMTokenizer, pixels: Tensor
) -> None:
    with pytest.raises(DataError, match="empty prompt"):
        generate_answers(model, tokenizer, pixels[:1], [["dog", ""]], NUM_NEW)
