"""Ids and labels of one image with its turns, counted out by hand."""

from __future__ import annotations

import pytest
import torch

from cogvlm_ft.data.encode import Sequences, encode_prompt, encode_turns
from cogvlm_ft.errors import DataError
from cogvlm_ft.grounding.targets import Turn
from cogvlm_ft.model import CogVLMConfig, CogVLMTokenizer

TURNS = [
    Turn("Where is the red circle?", "[[086,540,400,760]]"),
    Turn("请指出蓝色方形的位置。", "未找到指定目标"),
    Turn("dog", ""),
]
IGNORED = -100


class CharacterTokenizer:
    """One id per character; bos 1, eos 2."""

    bos_token_id, eos_token_id = 1, 2

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [ord(character) for character in text]


def config_for(template_version: str = "base", image_size: int = 14, pad_token_id: int | None = 0) -> CogVLMConfig:
    num_positions = (image_size // 14) ** 2 + 1
    vision = {"image_size": image_size, "num_positions": num_positions}
    return CogVLMConfig(template_version=template_version, pad_token_id=pad_token_id, vision_config=vision)


def text_of(sequences: Sequences, block: int) -> list[int]:
    return sequences.input_ids[sequences.block_ids == block].tolist()


def test_two_turns_by_hand() -> None:
    a, b, c, d, e = (ord(character) for character in "abcde")
    found = encode_turns([Turn("ab", "c"), Turn("d", "ee")], CharacterTokenizer(), config_for())
    assert found.input_ids.tolist() == [1, 0, 0, 0, a, b, c, 2, d, e, e, 2]
    assert found.labels.tolist() == [IGNORED] * 6 + [c, 2, IGNORED, e, e, 2]
    assert found.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]
    assert found.block_ids.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert found.input_ids.dtype == found.labels.dtype == found.position_ids.dtype == torch.int64
    assert found.block_ids.dtype == torch.int32


def test_only_answers_and_their_eos_are_labelled(tokenizer: CogVLMTokenizer) -> None:
    found = encode_turns(TURNS, tokenizer, config_for(image_size=56))
    assert found.labels[found.block_ids == 0].tolist() == [IGNORED] * 19
    for block, turn in enumerate(TURNS, start=1):
        labels = found.labels[found.block_ids == block]
        answer = [*tokenizer.encode(turn.answer), tokenizer.eos_token_id]
        prompt = tokenizer.encode(turn.prompt)
        assert labels.tolist() == [IGNORED] * len(prompt) + answer
    labelled = found.labels != IGNORED
    assert torch.equal(found.labels[labelled], found.input_ids[labelled])


@pytest.mark.parametrize("template_version", ["base", "chat", "vqa"])
def test_prompt_and_answer_are_encoded_apart_and_nothing_comes_between(
    tokenizer: CogVLMTokenizer, template_version: str
) -> None:
    prompts = {
        "base": "Where is the red circle?",
        "chat": "Question: Where is the red circle? Answer:",
        "vqa": "Question: Where is the red circle? Short answer:",
    }
    prompt = tokenizer.encode(prompts[template_version])
    assert encode_prompt(TURNS[0].prompt, tokenizer, template_version) == prompt
    answer = [*tokenizer.encode(TURNS[0].answer), tokenizer.eos_token_id]
    assert text_of(encode_turns(TURNS[:1], tokenizer, config_for(template_version)), block=1) == prompt + answer


HISTORY = (("Is there a dog?", "Found 1: dog."), ("Where?", "[[001,002,003,004]]"))


@pytest.mark.parametrize(
    ("template_version", "past"),
    [
        ("base", ""),
        ("chat", "Question: Is there a dog? Answer: Found 1: dog.\nQuestion: Where? Answer: [[001,002,003,004]]\n"),
    ],
)
def test_the_history_of_a_turn_stands_before_its_prompt_without_labels(template_version: str, past: str) -> None:
    tokenizer, config = CharacterTokenizer(), config_for(template_version)
    plain, later = Turn("dog?", "no"), Turn("dog?", "no", history=HISTORY)
    found = encode_turns([plain, later, plain], tokenizer, config)
    expected = tokenizer.encode(past) + text_of(encode_turns([plain], tokenizer, config), block=1)
    assert text_of(found, block=2) == expected
    assert text_of(found, block=1) == text_of(found, block=3) == expected[len(past) :]
    labels = found.labels[found.block_ids == 2].tolist()
    assert labels == [IGNORED] * (len(expected) - 3) + [*tokenizer.encode("no"), 2]
    starts = [found.position_ids[found.block_ids == block][0].item() for block in (1, 2, 3)]
    assert starts == [4, 4, 4]


def test_one_image_even_without_turns() -> None:
    found = encode_turns([], CharacterTokenizer(), config_for(image_size=28))
    assert found.input_ids.tolist() == [1, 0, 0, 0, 0, 0, 0]
    assert set(found.labels.tolist()) == {IGNORED}


@pytest.mark.parametrize(("pad_token_id", "placeholder"), [(0, 0), (7, 7), (None, 0)])
def test_image_positions_hold_the_config_s_pad(pad_token_id: int | None, placeholder: int) -> None:
    found = encode_turns([Turn("a", "b")], CharacterTokenizer(), config_for(pad_token_id=pad_token_id))
    assert found.input_ids[:4].tolist() == [1, placeholder, placeholder, placeholder]


def test_a_prompt_without_tokens_is_refused() -> None:
    """Require a token that predicts the first one of the answer."""
    with pytest.raises(DataError, match="empty prompt"):
        encode_turns([Turn("ab", "c"), Turn("", "c")], CharacterTokenizer(), config_for())
    assert encode_prompt("", CharacterTokenizer(), "chat") == [ord(character) for character in "Question:  Answer:"]
