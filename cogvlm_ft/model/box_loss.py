"""A loss that depends on distance; for cross entropy, 499 instead of 500 is as wrong as 999.

A box is written as `ddd,ddd,ddd,ddd` inside `[[` and `]]`, a token per digit. The model's probabilities of the ten
digits in a place, renormalized over the digits, give an expected digit; three of them, with the true digits before each
as input, give the expected coordinate E = 100 E[hundreds] + 10 E[tens] + E[units].
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cogvlm_ft.errors import CheckpointError
from cogvlm_ft.model.tokenizer import CogVLMTokenizer
from cogvlm_ft.settings import BOX_LOSSES, NUM_DIGITS, TrainConfig

_BOX = rb"[0-9]{3}(?:,[0-9]{3}){3}"
_BOXES = re.compile(rb"\[\[%b(?:;%b)*\]\]" % (_BOX, _BOX))
_DIGIT = re.compile(rb"[0-9]")
_UNLABELLED = b"\0"  # ends a list of boxes
_NUM_COORDINATES, _NUM_DIGITS_OF_BOX = 4, 4 * NUM_DIGITS
_VALUES = (100.0, 10.0, 1.0)
_EDGE = 1000.0  # coordinates are thousandths of the image


class Places(NamedTuple):
    """Where the digits of N boxes are. rows, columns: i64[N, 4, 3], of coordinates and their digits."""

    rows: Tensor
    columns: Tensor


@dataclass(frozen=True)
class BoxLoss:
    """Cross entropy with what is added to it for labelled boxes.

    piece_bytes, digits: of the tokenizer. weight, kind: of the distance, `expected` = the sum of |E - x| / 1000 over
    the coordinates, `giou` = the sum of 1 - GIoU over the boxes. digit_weights: factors of the cross entropy of
    hundreds, tens and units; their mean is 1.
    """

    piece_bytes: Sequence[bytes]
    digits: dict[int, int]
    weight: float = 0.0
    kind: str = BOX_LOSSES[0]
    digit_weights: tuple[float, ...] = (1.0,) * NUM_DIGITS

    def loss_sum(self, log_probs: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of the weighted cross entropy and of the distance.

        log_probs: float[M, V] of the labelled positions of labels i64[B, L], in their order.
        """
        places, is_labelled = self.places(labels), labels >= 0
        true, digits = labels[is_labelled], torch.tensor(list(self.digits), device=labels.device)
        numbers = torch.full_like(labels, -1)
        numbers[is_labelled] = torch.arange(len(true), device=labels.device)
        of_digits = numbers[places]
        # In one lookup: each would allocate a gradient of all log_probs.
        rows = torch.cat([numbers[is_labelled], of_digits.flatten().repeat_interleave(len(digits))])
        picked = log_probs[rows, torch.cat([true, digits.repeat(of_digits.numel())])]
        of_labels, of_boxes = picked[: len(true)], picked[len(true) :].view(*of_digits.shape, len(digits))
        loss_sum = -(of_labels * self.token_weights(labels, places)[is_labelled]).sum()
        return loss_sum + self.distance(of_boxes, labels[places]) if self.weight else loss_sum

    def places(self, labels: Tensor) -> Places:
        """Find the digits of every box in labels i64[B, L]; labels below 0 belong to no answer."""
        found = [(row, column) for row, ids in enumerate(labels.tolist()) for column in self._columns(ids)]
        shape = (-1, _NUM_COORDINATES, NUM_DIGITS, 2)
        pairs = torch.tensor(found, dtype=torch.long, device=labels.device).reshape(shape)
        return Places(pairs[..., 0], pairs[..., 1])

    def _columns(self, ids: Sequence[int]) -> list[int]:
        """Return the positions of the digits of all boxes in one row of labels."""
        pieces = [self.piece_bytes[token] if token >= 0 else _UNLABELLED for token in ids]
        text, columns = b"".join(pieces), [column for column, piece in enumerate(pieces) for _ in piece]
        lists = [found.span() for found in _BOXES.finditer(text)]
        return [columns[digit.start()] for start, end in lists for digit in _DIGIT.finditer(text, start, end)]

    def token_weights(self, labels: Tensor, places: Places) -> Tensor:
        """Return float32[B, L], the factor of each token's cross entropy."""
        weights = torch.ones(labels.shape, device=labels.device)
        weights[places] = weights.new_tensor(self.digit_weights).expand(places.rows.shape)
        return weights

    def distance(self, log_probs: Tensor, labels: Tensor) -> Tensor:
        """Return the weighted sum over N boxes.

        log_probs: float[N, 4, 3, D] of the tokens in `digits`. labels: i64[N, 4, 3], the true tokens.
        """
        values = log_probs.new_tensor(list(self.digits.values()))
        is_true = labels[..., None] == torch.tensor(list(self.digits), device=labels.device)
        expected, true = (
            probs @ values @ values.new_tensor(_VALUES) for probs in (log_probs.softmax(-1), is_true.to(values.dtype))
        )
        if self.kind == "giou":
            return self.weight * (1 - _giou(_with_area(expected), _with_area(true))).sum()
        return self.weight * (expected - true).abs().sum() / _EDGE


def build_box_loss(train: TrainConfig, tokenizer: CogVLMTokenizer) -> BoxLoss | None:
    """Return what the settings add to the cross entropy, None for nothing. Raises CheckpointError."""
    weights = train.digit_weights
    if not train.box_loss.weight and len(set(weights)) == 1:
        return None
    scaled = tuple(weight * len(weights) / sum(weights) for weight in weights)
    loss = BoxLoss(tokenizer.piece_bytes, tokenizer.digits, train.box_loss.weight, train.box_loss.kind, scaled)
    _check_digits(loss, tokenizer)
    return loss


def _check_digits(loss: BoxLoss, tokenizer: CogVLMTokenizer) -> None:
    """Raise CheckpointError unless each digit of every coordinate is a token of its own."""
    for first in range(0, 1000, _NUM_COORDINATES):
        text = f"[[{','.join(f'{first + i:03d}' for i in range(_NUM_COORDINATES))}]]"
        ids = tokenizer.encode(text)
        columns = loss._columns(ids)
        if len(columns) != _NUM_DIGITS_OF_BOX or not all(ids[column] in loss.digits for column in columns):
            pieces = " ".join(tokenizer.piece_bytes[token].decode(errors="replace") or "<unk>" for token in ids)
            raise CheckpointError(
                f"{tokenizer.model_file}: {text} is written as {pieces}; expected a token for each digit, for "
                "train.box_loss and train.digit_weights. Use Vicuna's tokenizer.model, or leave both at their defaults"
            )


def _with_area(boxes: Tensor) -> Tensor:
    """Return the far edges of the bins that corners name, so that a box within one bin has an area."""
    return boxes + boxes.new_tensor([0.0, 0.0, 1.0, 1.0])


def _giou(first: Tensor, second: Tensor) -> Tensor:
    """Return the generalized IoU [N] of boxes [N, 4] in x0, y0, x1, y1; corners in the wrong order have no area."""
    low, high = torch.maximum(first[:, :2], second[:, :2]), torch.minimum(first[:, 2:], second[:, 2:])
    overlap = (high - low).clamp(min=0).prod(-1)
    union = _area(first) + _area(second) - overlap
    hull = _area(torch.cat([torch.minimum(first, second)[:, :2], torch.maximum(first, second)[:, 2:]], -1))
    return overlap / union.clamp(min=1e-6) - (hull - union) / hull.clamp(min=1e-6)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(-1)
