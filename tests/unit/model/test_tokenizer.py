"""Ids equal sentencepiece's own, and text never becomes a special token."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece

from cogvlm_ft.errors import CheckpointError
from cogvlm_ft.model import CogVLMTokenizer

TEXTS = [
    "Where is the red circle?",
    "图片中存在一只狗,所在区域为[[086,540,400,760]]",
    "未找到指定目标",
    "  two leading blanks, and trailing  ",
    "line one\nline two\n\ttabbed",
    "[[000,000,999,999;012,345,678,901]]",
    "a </s> inside, and <s> and <unk>",
    "emoji 🐕 and ünïcödé",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_sentencepiece(tokenizer: CogVLMTokenizer, text: str) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.model_file))
    assert tokenizer.encode(text) == reference.encode(text)
    assert tokenizer.encode(text, add_special_tokens=True) == [1, *reference.encode(text)]
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(tokenizer.encode(text))
    assert tokenizer.decode([1, *tokenizer.encode(text), 2, 5, 6]) == text


def test_digits_are_single_pieces(tokenizer: CogVLMTokenizer) -> None:
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode("[[086,540,400,760]]")]
    assert [piece for piece in pieces if piece.isdigit()] == list("086540400760")


def test_save_and_load(tokenizer: CogVLMTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    assert CogVLMTokenizer.from_folder(tmp_path).encode("a dog") == tokenizer.encode("a dog")
    assert '"LlamaTokenizer"' in (tmp_path / "tokenizer_config.json").read_text()


def test_missing_file_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="vicuna"):
        CogVLMTokenizer.from_folder(tmp_path)
