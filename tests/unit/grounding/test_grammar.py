"""Any choice of admitted tokens is readable, and well-formed answers are admitted unchanged."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from cogvlm_ft.errors import CheckpointError, ConfigError
from cogvlm_ft.grounding.boxes import parse_boxes
from cogvlm_ft.grounding.grammar import BoxGrammar, GrammarState
from cogvlm_ft.grounding.wording import load_wording
from cogvlm_ft.model import CogVLMTokenizer

NOT_FOUND = load_wording("box").not_found_sentences
Choose = Callable[[list[int]], int]
ONE_BOX = len("[[ddd,ddd,ddd,ddd]]")


def grammar_of(tokenizer: CogVLMTokenizer, min_boxes: int = 0) -> BoxGrammar:
    return BoxGrammar(tokenizer.piece_bytes, tokenizer.eos_token_id, NOT_FOUND, min_boxes)


def tokens_of(grammar: BoxGrammar, state: GrammarState, num_left: int, size: int) -> list[int]:
    admitted = grammar.admitted(state, num_left)
    if admitted.only:
        return list(admitted.tokens)
    return [token for token in range(size) if token not in set(admitted.tokens)]


def walk(tokenizer: CogVLMTokenizer, grammar: BoxGrammar, max_new_tokens: int, choose: Choose) -> str:
    """Return the text of an answer of admitted tokens."""
    state, ids = grammar.start(max_new_tokens), []
    for num_left in range(max_new_tokens, 0, -1):
        ids.append(choose(tokens_of(grammar, state, num_left, len(tokenizer))))
        if ids[-1] == tokenizer.eos_token_id:
            break
        state = grammar.advance(state, ids[-1])
    return tokenizer.decode(ids)


def assert_upright(text: str, min_boxes: int) -> None:
    boxes = parse_boxes(text)
    if boxes is None:
        assert min_boxes == 0 and text.strip() in NOT_FOUND, text
    else:
        assert len(boxes) >= min_boxes
        assert all(x0 <= x1 and y0 <= y1 for x0, y0, x1, y1 in boxes), text


def lover_of_brackets(tokenizer: CogVLMTokenizer, seed: int) -> Choose:
    """Choose randomly, preferring the pieces of box text, so that boxes open, close and continue in all ways."""
    chance, pieces = random.Random(seed), tokenizer.piece_bytes
    liked = {token for token, piece in enumerate(pieces) if any(byte in b"[];," for byte in piece)}

    def choose(tokens: list[int]) -> int:
        among = [token for token in tokens if token in liked]
        return chance.choice(among if among and chance.random() < 0.6 else tokens)

    return choose


@pytest.mark.slow
@pytest.mark.parametrize("min_boxes", [0, 1, 3])
@pytest.mark.parametrize("room", [0, 1, 7, 60])
def test_every_walk_can_be_read(tokenizer: CogVLMTokenizer, min_boxes: int, room: int) -> None:
    """Include answers cut off by the token limit, and answers with just enough tokens."""
    grammar = grammar_of(tokenizer, min_boxes)
    max_new_tokens = ONE_BOX + 16 * max(0, min_boxes - 1) + room
    numbers = set()
    for seed in range(40):
        text = walk(tokenizer, grammar, max_new_tokens, lover_of_brackets(tokenizer, seed))
        assert_upright(text, min_boxes)
        numbers.add(len(parse_boxes(text) or ()))
    if room == 60:
        assert len(numbers) > 1  # it does not always write the same


def test_a_walk_that_avoids_boxes_is_made_to_write_them(tokenizer: CogVLMTokenizer) -> None:
    letter = next(t for t, piece in enumerate(tokenizer.piece_bytes) if piece == b"a")
    for min_boxes in (0, 2):
        choose: Choose = lambda tokens: letter if letter in tokens else min(tokens)  # noqa: E731
        text = walk(tokenizer, grammar_of(tokenizer, min_boxes), 50, choose)
        assert text.startswith("aaa")
        assert len(parse_boxes(text) or ()) == max(1, min_boxes)


def test_an_open_bracket_is_not_left_behind_when_tokens_are_short(tokenizer: CogVLMTokenizer) -> None:
    """After "[" with 19 tokens left a box fits, but not another text and then a box."""
    grammar, bracket = grammar_of(tokenizer), tokenizer.piece_bytes.index(b"[")
    state = grammar.advance(grammar.start(20), bracket)
    letter = tokenizer.piece_bytes.index(b"a")
    assert letter in tokens_of(grammar, state, 20, len(tokenizer))
    admitted = tokens_of(grammar, state, 19, len(tokenizer))
    assert letter not in admitted and bracket in admitted


@pytest.mark.parametrize(
    ("text", "min_boxes"),
    [
        ("图片中存在一只狗,所在区域为[[086,540,400,760]]", 0),
        ("[[000,000,000,000]]", 1),
        ("[[012,345,678,999;086,540,400,760]]", 2),
        ("Found [[012,345,678,999]] and [[086,540,086,540]]. That [1] is a[0][1].", 2),
        (NOT_FOUND[0], 0),
        (NOT_FOUND[1], 0),
    ],
)
def test_good_answers_are_admitted_as_they_are(tokenizer: CogVLMTokenizer, text: str, min_boxes: int) -> None:
    grammar, ids = grammar_of(tokenizer, min_boxes), [*tokenizer.encode(text), tokenizer.eos_token_id]
    state = grammar.start(128)
    for num_left, token in zip(range(128, 0, -1), ids, strict=False):
        assert token in tokens_of(grammar, state, num_left, len(tokenizer)), tokenizer.decode([token])
        state = grammar.advance(state, token)


@pytest.mark.parametrize(
    ("text", "min_boxes", "place"),
    [
        ("No.", 0, 3),  # an end without a box
        ("[[012,345,678,999]]", 2, 19),  # an end with too few
        (NOT_FOUND[0], 1, len(NOT_FOUND[0])),  # "not found" where a box is required
        (NOT_FOUND[1] + " Or", 0, len(NOT_FOUND[1]) + 3),  # more than the sentence
        ("[[500,100,499,200]]", 0, 10),  # x1 < x0
        ("[[500,100,600,020]]", 0, 14),  # y1 < y0
        ("[[50,100,600,200]]", 0, 4),  # two digits
        ("[[500, 100,600,200]]", 0, 6),  # a blank
        ("[[500,100,600]]", 0, 13),  # three numbers
        ("[[500,100,600,200;]]", 0, 18),  # nothing after the ;
        ("[[[500,100,600,200]]", 0, 2),
    ],
)
def test_bad_answers_are_stopped_where_they_go_wrong(
    tokenizer: CogVLMTokenizer, text: str, min_boxes: int, place: int
) -> None:
    """Byte by byte, so that no piece has two meanings."""
    grammar = grammar_of(tokenizer, min_boxes)
    state, raw, written = grammar.start(128), text.encode(), 0
    of_byte = {piece: token for token, piece in enumerate(tokenizer.piece_bytes) if len(piece) == 1}
    for num_left, byte in zip(range(128, 0, -1), raw, strict=False):
        token = of_byte[bytes([byte])]
        if token not in tokens_of(grammar, state, num_left, len(tokenizer)):
            break
        state, written = grammar.advance(state, token), written + 1
    else:
        assert tokenizer.eos_token_id not in tokens_of(grammar, state, 50, len(tokenizer))
    assert len(raw[:written].decode()) == place


def test_too_few_tokens_for_the_boxes_are_refused(tokenizer: CogVLMTokenizer) -> None:
    with pytest.raises(ConfigError, match=r"max_new_tokens=50: 3 box\(es\) need up to 51 tokens"):
        grammar_of(tokenizer, 3).start(50)
    grammar_of(tokenizer, 3).start(51)


def test_a_tokenizer_that_cannot_write_boxes_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no piece for 8 ;"):
        BoxGrammar([b"", *(bytes([byte]) for byte in b"012345679[],"), b"[[", b"8;"], 0)
