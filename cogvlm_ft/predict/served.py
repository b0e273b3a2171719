"""The models that one process serves: a base model, and adapters of peft on it, chosen by name."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from cogvlm_ft.checkpoints.choice import trained_wording
from cogvlm_ft.checkpoints.peft_files import open_peft_adapter, put_beside
from cogvlm_ft.data.reader import MAX_PIXELS, decode_image
from cogvlm_ft.errors import ConfigError
from cogvlm_ft.model.adapters import choose_adapter
from cogvlm_ft.model.quantized import float_shapes
from cogvlm_ft.predict.batching import Order, Replies
from cogvlm_ft.predict.bodies import RefusedError
from cogvlm_ft.predict.files import Question, answer_questions
from cogvlm_ft.predict.predictor import Predictor, choose_wording
from cogvlm_ft.terminal import plain_line

MAX_NEW_TOKENS = 2048
"""Largest limit that a request can set."""
MAX_SETTINGS = 32
"""Number of different request settings whose grammars are kept."""


@dataclass(frozen=True)
class Settings:
    """How a request is answered.

    adapter: None for the base. The rest: as in Asking; None: as the server was started.
    """

    adapter: str | None = None
    max_new_tokens: int | None = None
    decoding: str | None = None
    min_boxes: int | None = None


class ServedModels:
    """A base model and adapters on it. Not for several threads at once."""

    def __init__(
        self, predictor: Predictor, name: str, adapters: Mapping[str, Path] | None = None, *, upright: bool = True
    ) -> None:
        """Load the adapters. name: of the base. upright: photos are rotated by their EXIF orientation."""
        self.base, self.upright = predictor, upright
        self.name = name
        self.adapters = dict(adapters or {})
        if name in self.adapters:
            raise ConfigError(f"--adapter {name}: found the name of the base model; expected another. Choose one")
        shapes = float_shapes(predictor.model)
        for each, folder in self.adapters.items():
            put_beside(predictor.model, open_peft_adapter(folder, predictor.weights, shapes), each)
        if self.adapters:
            choose_adapter(predictor.model, None)
        self._chosen: str | None = None
        self._predictor_of = lru_cache(MAX_SETTINGS)(self._build_predictor)

    @property
    def names(self) -> tuple[str, ...]:
        return self.name, *self.adapters

    def adapter_of(self, name: object) -> str | None:
        """Return the adapter of a model name, None for the base. Raises RefusedError."""
        if name not in self.names:
            shown = plain_line(str(name)[:60]).encode("utf-8", "backslashreplace").decode()
            known = ", ".join(self.names)
            raise RefusedError(404, f"model: found '{shown}'; expected one of {known}", "model_not_found", "model")
        return None if name == self.name else str(name)

    def order(self, photo_bytes: bytes, questions: Sequence[Question], settings: Settings) -> Order:
        """Prepare questions about a photo. Raises RefusedError, DataError, ConfigError."""
        for question in questions:
            if question.problem:
                raise RefusedError(400, question.problem, "bad_question")
        photo = decode_image(photo_bytes, "the photo", MAX_PIXELS, upright=self.upright)
        return Order(photo, hashlib.sha256(photo_bytes).hexdigest(), questions, settings)

    def answer(
        self, settings: Hashable, photos: Sequence[Image.Image], questions: Sequence[Sequence[Question]]
    ) -> list[Replies]:
        """Answer questions with equal settings, for AnswerQueue."""
        assert isinstance(settings, Settings)
        if settings.adapter != self._chosen:
            choose_adapter(self.base.model, settings.adapter)
            self._chosen = settings.adapter
        return answer_questions(self._predictor_of(settings), photos, questions)

    def _build_predictor(self, settings: Settings) -> Predictor:
        """Prepare to ask; an adapter has its own wording and choice of boxes, where they are known."""
        base, adapter = self.base, self.adapters.get(settings.adapter or "")
        changes: dict[str, Any] = {
            name: value
            for name in ("max_new_tokens", "decoding", "min_boxes")
            if (value := getattr(settings, name)) is not None
        }
        if not changes and not adapter:
            return base
        asking = replace(base.asking, **changes, adapter=adapter or base.asking.adapter)
        if asking.min_boxes and asking.decoding == "free":
            raise ConfigError(f"min_boxes: found {asking.min_boxes} with free decoding; expected decoding grammar")
        trained = trained_wording(adapter) if adapter else None
        wording = choose_wording(asking, trained) if trained else base.wording
        return Predictor(base.model, base.tokenizer, asking, wording, base.weights)
