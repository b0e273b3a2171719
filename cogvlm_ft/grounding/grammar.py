"""Constrained decoding: which tokens may come next, so that the answer contains complete, upright boxes.

Between `[[` and `]]` only `ddd,ddd,ddd,ddd`, joined by `;`, with x1 >= x0 and y1 >= y0; around it any text. An answer
ends with at least `min_boxes` boxes or, if one box is enough, as a not-found sentence. It always keeps as many of the
remaining tokens as its boxes still need, so it is readable even when it reaches the token limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cogvlm_ft.errors import CheckpointError, ConfigError

_OPEN, _CLOSE, _NEXT, _COMMA = b"[];,"
_DIGITS = b"0123456789"
_BOX, _BOX_AND_NEXT = len("ddd,ddd,ddd,ddd"), len("ddd,ddd,ddd,ddd;")
_COMMAS = (3, 7, 11)
_LOW_EDGE = 8  # digit 8 + i of a box belongs to x1 and is compared with digit i, of x0; likewise y1 and y0


@dataclass(frozen=True)
class GrammarState:
    """The state of an answer.

    sentence: the text so far while it is a prefix of a not-found sentence, then None.
    num_open: 1 directly after a `[` outside of boxes, else 0.
    box: the text of the current box so far, `]` included; None outside.
    num_boxes: complete boxes.
    """

    sentence: bytes | None = b""
    num_open: int = 0
    box: bytes | None = None
    num_boxes: int = 0


@dataclass(frozen=True)
class Admitted:
    """only: `tokens` are the only ones that may come next; otherwise all but these may."""

    tokens: tuple[int, ...]
    only: bool


class BoxGrammar:
    """Shared by all answers of a tokenizer; an answer's own state is a `GrammarState`."""

    def __init__(
        self, piece_bytes: Sequence[bytes], eos_token_id: int, not_found: Sequence[str] = (), min_boxes: int = 0
    ) -> None:
        """Index the tokens by their bytes.

        piece_bytes: the text that each id adds. min_boxes: 0 admits a not-found sentence instead of a box.
        """
        self._pieces, self._eos = piece_bytes, eos_token_id
        self._sentences = [] if min_boxes else [sentence.strip().encode() for sentence in not_found]
        self._min_boxes = max(1, min_boxes)
        self._opening = [token for token, piece in enumerate(piece_bytes) if _OPEN in piece]
        self._by_first: dict[int, list[int]] = {byte: [] for byte in (*_DIGITS, _CLOSE, _NEXT, _COMMA)}
        for token, piece in enumerate(piece_bytes):
            if piece and piece[0] in self._by_first:
                self._by_first[piece[0]].append(token)
        single = {piece for piece in piece_bytes if len(piece) == 1}
        lacking = [chr(byte) for byte in (*_DIGITS, _OPEN, _CLOSE, _NEXT, _COMMA) if bytes([byte]) not in single]
        if lacking:
            raise CheckpointError(
                f"tokenizer.model: no piece for {' '.join(lacking)}; expected one for every character of box text. "
                "Use Vicuna's tokenizer.model, or decoding=free"
            )
        self._outside: dict[tuple[int, int, int], tuple[bool, tuple[int, ...]]] = {}

    @property
    def least_tokens(self) -> int:
        """The tokens that always suffice for the shortest answer with boxes."""
        return self._needed(GrammarState())

    def start(self, max_new_tokens: int) -> GrammarState:
        """Return the state before the first token; raise ConfigError if no answer fits."""
        needed = self.least_tokens
        if max_new_tokens < needed:
            raise ConfigError(
                f"max_new_tokens={max_new_tokens}: {self._min_boxes} box(es) need up to {needed} tokens. Raise it"
            )
        return GrammarState()

    def advance(self, state: GrammarState, token: int) -> GrammarState:
        """Return the state after an admitted token."""
        following = self._after(state, token)
        assert following is not None, f"token {token} is not admitted in {state}"
        return following

    def admitted(self, state: GrammarState, num_left: int) -> Admitted:
        """Return the tokens that may come next if `num_left` tokens may be written, the next one included."""
        if state.box is None:
            return self._admitted_outside(state, num_left)
        tokens = [token for byte in _bytes_in_box(state.box) for token in self._by_first[byte]]
        return Admitted(tuple(token for token in tokens if self._fits(state, token, num_left)), only=True)

    def _admitted_outside(self, state: GrammarState, num_left: int) -> Admitted:
        may_end = self._needed(state) == 0
        # Whether a piece with "[" is admitted depends on these values only; beyond a limit, more tokens change nothing.
        key = (
            state.num_open,
            min(state.num_boxes, self._min_boxes),
            min(num_left, 2 * _BOX_AND_NEXT * (self._min_boxes + 1)),
        )
        if key not in self._outside:
            plain = replace(state, sentence=None)
            talks = self._needed(replace(plain, num_open=0)) <= num_left - 1
            opening = [token for token in self._opening if self._fits(plain, token, num_left) != talks]
            self._outside[key] = talks, tuple(opening)
        talks, listed = self._outside[key]
        return Admitted(listed if may_end == talks else (*listed, self._eos), only=not talks)

    def _fits(self, state: GrammarState, token: int, num_left: int) -> bool:
        following = self._after(state, token)
        return following is not None and self._needed(following) <= num_left - 1

    def _after(self, state: GrammarState, token: int) -> GrammarState | None:
        for byte in self._pieces[token]:
            following = self._read(state, byte)
            if following is None:
                return None
            state = following
        return state

    def _read(self, state: GrammarState, byte: int) -> GrammarState | None:
        """Return the state after one more byte; None if the byte is not admitted."""
        if state.box is None:
            if byte == _OPEN and state.num_open:
                return GrammarState(None, 0, b"", state.num_boxes)
            return GrammarState(self._sentence(state, byte), int(byte == _OPEN), None, state.num_boxes)
        if byte not in _bytes_in_box(state.box):
            return None
        length = len(state.box)
        if length > _BOX:
            return GrammarState(None, 0, None, state.num_boxes)
        box = b"" if byte == _NEXT else state.box + bytes([byte])
        return GrammarState(None, 0, box, state.num_boxes + (length == _BOX))

    def _sentence(self, state: GrammarState, byte: int) -> bytes | None:
        if state.sentence is None:
            return None
        text = (state.sentence + bytes([byte])).lstrip(b" ")
        return text if any(sentence.startswith(text) for sentence in self._sentences) else None

    def _needed(self, state: GrammarState) -> int:
        """Return how many tokens always suffice for a readable answer: one per byte."""
        if state.box is None:
            missing = max(0, self._min_boxes - state.num_boxes)
            if missing == 0 or state.sentence in self._sentences:
                return 0
            return 2 - state.num_open + missing * _BOX_AND_NEXT + 1  # the last box has "]]" instead of ";"
        if len(state.box) > _BOX:
            outside = GrammarState(None, 0, None, state.num_boxes)
            return 1 + self._needed(outside)
        further = max(0, self._min_boxes - state.num_boxes - 1)
        return _BOX - len(state.box) + further * _BOX_AND_NEXT + 2


def _bytes_in_box(box: bytes) -> bytes:
    """Return the bytes that may come next in a box with the text `box` so far."""
    length = len(box)
    if length >= _BOX:
        return b";]" if length == _BOX else b"]"
    if length in _COMMAS:
        return b","
    low = length - _LOW_EDGE
    on_edge = low >= 0 and box[low - low % 4 : low] == box[length - low % 4 : length]
    return _DIGITS[box[low] - _DIGITS[0] :] if on_edge else _DIGITS
