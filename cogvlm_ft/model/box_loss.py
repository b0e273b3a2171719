"""A loss that knows distance: for cross entropy alone, 499 instead of 500 is as wrong as 999.

A box is written as `ddd,ddd,ddd,ddd`, a token per character. The model's probabilities of the ten digits in a place,
renormalized over the digits, give an expected digit; three of them, with the true digits before each as input, give the
expected coordinate E = 100 E[hundreds] + 10 E[tens] + E[units].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cogvlm_ft.errors import ConfigError
from cogvlm_ft.model.tokenizer import CogVLMTokenizer
from cogvlm_ft.settings import BOX_LOSSES, TrainConfig

_DIGIT, _COMMA = 1, 2
_BOX = [_DIGIT, _DIGIT, _DIGIT, _COMMA] * 3 + [_DIGIT] * 3
_PLACES = [[4 * coordinate + place for place in range(3)] for coordinate in range(4)]
_VALUES = (100.0, 10.0, 1.0)
_EDGE = 1000.0  # coordinates are thousandths of the image


class TokenTypes(NamedTuple):
    """digits: i64[V], the digit that a token writes, else -1. is_comma: bool[V]."""

    digits: Tensor
    is_comma: Tensor


class Places(NamedTuple):
    """Where the digits of N boxes are. rows, columns: i64[N, 4, 3], of coordinates and their places."""

    rows: Tensor
    columns: Tensor


def token_types(tokenizer: CogVLMTokenizer) -> TokenTypes:
    """Return which tokens are digits and commas."""
    digits = torch.full((len(tokenizer),), -1)
    for token, digit in tokenizer.digits.items():
        digits[token] = digit
    return TokenTypes(digits, torch.tensor([piece == b"," for piece in tokenizer.piece_bytes]))


@dataclass(frozen=True)
class BoxLoss:
    """What is added to the cross entropy of labelled boxes.

    weight, kind: of the distance, `expected` = the sum of |E - x| / 1000 over the coordinates, `giou` = the sum of
    1 - GIoU over the boxes. place_weights: factors of the cross entropy of hundreds, tens and units; their mean is 1.
    """

    types: TokenTypes
    weight: float = 0.0
    kind: str = BOX_LOSSES[0]
    place_weights: tuple[float, ...] = (1.0, 1.0, 1.0)

    def loss_sum(self, scores: Tensor, log_probs: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of the weighted cross entropy and of the distance.

        scores, log_probs: float[M, V] of the labelled positions of labels i64[B, L], in their order.
        """
        places = self.places(labels)
        is_labelled = labels >= 0
        token_losses = F.nll_loss(log_probs, labels[is_labelled], reduction="none")
        loss_sum = (token_losses * self.token_weights(labels, places)[is_labelled]).sum()
        return loss_sum + self.distance(scores, labels, places) if self.weight else loss_sum

    def places(self, labels: Tensor) -> Places:
        """Find the digits of every box in labels i64[B, L]; labels below 0 are of no answer."""
        digits, is_comma = (each.to(labels.device) for each in self.types)
        known, is_labelled = labels.clamp(min=0), labels >= 0
        kinds = torch.zeros_like(labels)
        kinds[is_labelled & (digits[known] >= 0)] = _DIGIT
        kinds[is_labelled & is_comma[known]] = _COMMA
        kinds = F.pad(kinds, (1, len(_BOX)))  # so that each position has a window, and one beside it
        windows = kinds.unfold(1, len(_BOX) + 2, 1)
        is_box = (windows[..., 1:-1] == torch.tensor(_BOX, device=labels.device)).all(-1)
        is_longer = (windows[..., 0] == _DIGIT) | (windows[..., -1] == _DIGIT)
        rows, firsts = (is_box & ~is_longer).nonzero(as_tuple=True)
        columns = firsts[:, None, None] + torch.tensor(_PLACES, device=labels.device)
        return Places(rows[:, None, None].expand_as(columns), columns)

    def token_weights(self, labels: Tensor, places: Places) -> Tensor:
        """Return float32[B, L], the factor of each token's cross entropy."""
        weights = torch.ones(labels.shape, device=labels.device)
        weights[places] = weights.new_tensor(self.place_weights).expand(places.rows.shape)
        return weights

    def distance(self, scores: Tensor, labels: Tensor, places: Places) -> Tensor:
        """Return the weighted sum over the boxes. scores: as of `loss_sum`."""
        numbers = torch.full_like(labels, -1)
        numbers[labels >= 0] = torch.arange(len(scores), device=labels.device)
        expected = self._expected(scores[numbers[places]])
        true = self.types.digits.to(labels.device)[labels[places]].to(expected.dtype) @ expected.new_tensor(_VALUES)
        if self.kind == "giou":
            return self.weight * (1 - _giou(expected, true)).sum()
        return self.weight * (expected - true).abs().sum() / _EDGE

    def _expected(self, scores: Tensor) -> Tensor:
        """Return the expected coordinates [N, 4] for scores [N, 4, 3, V]."""
        digits = self.types.digits.to(scores.device)
        tokens = (digits >= 0).nonzero()[:, 0]
        probs = scores[..., tokens].softmax(-1)
        means = (probs * digits[tokens].to(probs.dtype)).sum(-1)
        return means @ means.new_tensor(_VALUES)


def build_box_loss(train: TrainConfig, tokenizer: CogVLMTokenizer) -> BoxLoss | None:
    """Return what the settings add to the cross entropy, None for nothing. Raises ConfigError."""
    weights = train.digit_weights
    if len(weights) != len(_PLACES[0]):
        raise ConfigError(f"train.digit_weights: found {len(weights)} numbers; expected 3: hundreds, tens, units")
    if not train.box_loss.weight and len(set(weights)) == 1:
        return None
    scaled = tuple(weight * len(weights) / sum(weights) for weight in weights)
    return BoxLoss(token_types(tokenizer), train.box_loss.weight, train.box_loss.kind, scaled)


def _giou(first: Tensor, second: Tensor) -> Tensor:
    """Return the generalized IoU [N] of boxes [N, 4] in x0, y0, x1, y1; corners in the wrong order have no area."""
    low, high = torch.maximum(first[:, :2], second[:, :2]), torch.minimum(first[:, 2:], second[:, 2:])
    overlap = (high - low).clamp(min=0).prod(-1)
    union = _area(first) + _area(second) - overlap
    hull = _area(torch.cat([torch.minimum(first, second)[:, :2], torch.maximum(first, second)[:, 2:]], -1))
    return overlap / union.clamp(min=1e-6) - (hull - union) / hull.clamp(min=1e-6)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(-1)
