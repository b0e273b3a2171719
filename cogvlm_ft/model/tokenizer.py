"""Vicuna's sentencepiece tokenizer, loaded from `tokenizer.model`.

sentencepiece itself is used instead of a `transformers` tokenizer: those drop a leading blank and read "</s>" inside a
user's text as the end token. Here text is never read as a special token; callers add bos and eos.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import sentencepiece

from cogvlm_ft.errors import CheckpointError
from cogvlm_ft.plain_files import read_bytes

MODEL_FILE = "tokenizer.model"
# Files of a `transformers` tokenizer, copied with tokenizer.model for other programs.
COMPANION_FILES = ("tokenizer_config.json", "special_tokens_map.json", "tokenizer.json", "added_tokens.json")
LLAMA_TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<unk>",
    "clean_up_tokenization_spaces": False,
    "legacy": True,
    "sp_model_kwargs": {},
}


class CogVLMTokenizer:
    """Text <-> ids. `pad_token_id` is sentencepiece's <unk> (0), as in published checkpoints."""

    def __init__(self, model_file: str | Path) -> None:
        self.model_file = Path(model_file)
        if not self.model_file.is_file():
            raise CheckpointError(
                f"{self.model_file}: not found. Copy Vicuna's tokenizer.model (lmsys/vicuna-7b-v1.5) into the folder"
            )
        self._files = _read_files(self.model_file)
        try:
            if not self._files[MODEL_FILE]:
                raise RuntimeError("no bytes")
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=self._files[MODEL_FILE])
        except RuntimeError:
            raise CheckpointError(
                f"{self.model_file}: found no model of SentencePiece; expected Vicuna's. Download it again"
            ) from None
        self.bos_token_id: int = self._pieces.bos_id()
        self.eos_token_id: int = self._pieces.eos_id()
        self.pad_token_id: int = self._pieces.unk_id()

    @classmethod
    def from_folder(cls, folder: str | Path) -> CogVLMTokenizer:
        return cls(Path(folder) / MODEL_FILE)

    def __len__(self) -> int:
        return self._pieces.vocab_size()

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Return the ids of the text; with `add_special_tokens`, bos first."""
        ids = self._pieces.encode(text)
        return [self.bos_token_id, *ids] if add_special_tokens else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Decode the ids before the first eos; other special ids are dropped."""
        kept: list[int] = []
        for token in ids:
            if token == self.eos_token_id:
                break
            if token not in (self.bos_token_id, self.pad_token_id):
                kept.append(int(token))
        return self._pieces.decode(kept)

    @cached_property
    def piece_bytes(self) -> list[bytes]:
        """The text that each id adds, in UTF-8; empty for bos, eos, unk and unused ids."""
        sp = self._pieces
        ids = range(sp.vocab_size())
        texts = [sp.id_to_piece(i).replace("▁", " ").encode() for i in ids]
        return [
            bytes([int(text[3:-1], 16)]) if sp.is_byte(i) else b"" if _is_special(sp, i) else text
            for i, text in zip(ids, texts, strict=True)
        ]

    @cached_property
    def digits(self) -> dict[int, int]:
        """The ids of single digits and their values: Vicuna's tokenizer writes numbers digit by digit."""
        return {i: int(piece) for i, piece in enumerate(self.piece_bytes) if len(piece) == 1 and piece.isdigit()}

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.model and the files that other programs need to load it as a LlamaTokenizer.

        The files are those that were there when it was loaded, even if they are gone.
        """
        config = json.dumps(LLAMA_TOKENIZER_CONFIG, indent=2) + "\n"
        for name, content in ({"tokenizer_config.json": config.encode()} | self._files).items():
            (Path(folder) / name).write_bytes(content)


def _read_files(model_file: Path) -> dict[str, bytes]:
    """Read tokenizer.model and its companions, by their names."""
    companions = [model_file.parent / name for name in COMPANION_FILES]
    return {MODEL_FILE: read_bytes(model_file)} | {path.name: read_bytes(path) for path in companions if path.is_file()}


def _is_special(pieces: sentencepiece.SentencePieceProcessor, token: int) -> bool:
    return pieces.is_control(token) or pieces.is_unknown(token) or pieces.is_unused(token)


def train_tokenizer(texts: Iterable[str], model_file: str | Path, vocab_size: int) -> None:
    """Train a small tokenizer of Vicuna's kind (BPE, byte fallback, single digits) for tests and the demo."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        hard_vocab_limit=False,
        character_coverage=1.0,
        minloglevel=2,
    )
    Path(model_file).write_bytes(model.getvalue())
