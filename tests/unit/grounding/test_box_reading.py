"""Confidence and expected coordinates of answered boxes, and the position at which a bin is read."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cogvlm_ft.grounding.boxes import bins_from_box, boxes_from_bins, expected_coordinate, read_boxes


def sure(digit: int, prob: float = 1.0) -> list[float]:
    return [prob if other == digit else 0.0 for other in range(10)]


def mixed(**probs: float) -> list[float]:
    """mixed(d2=0.6, d3=0.4)"""
    return [probs.get(f"d{digit}", 0.0) for digit in range(10)]


def test_the_two_readings() -> None:
    bins, size = [(0, 100, 500, 999)], (2000, 1000)
    assert boxes_from_bins(bins, size).tolist() == [pytest.approx([1.0, 100.5, 1001.0, 999.5])]
    assert boxes_from_bins(bins, size, "official").tolist() == [pytest.approx([0.0, 100.0, 1000.0, 999.0])]


def test_centres_save_small_targets() -> None:
    """Perfect answers about boxes 3/1000 wide and about as high: 41 % miss IoU 0.5 as the reference reads them."""
    chance = np.random.default_rng(0)
    num, size = 4000, (1000, 1000)
    widths, heights = 3 * np.exp(chance.uniform(-0.35, 0.35, (2, num)) * [[1], [-1]])
    corners = chance.uniform(0, 990, (num, 2))
    truth = np.concatenate([corners, corners + np.stack([widths, heights], 1)], axis=1)
    bins = [bins_from_box(tuple(box), size) for box in truth.tolist()]
    missed = {}
    for reading in ("official", "centre"):
        found = boxes_from_bins(bins, size, reading)
        low, high = np.maximum(truth[:, :2], found[:, :2]), np.minimum(truth[:, 2:], found[:, 2:])
        overlap = (high - low).clip(0).prod(1)
        areas = [(box[:, 2:] - box[:, :2]).prod(1) for box in (truth, found)]
        missed[reading] = float((overlap / (areas[0] + areas[1] - overlap) < 0.5).mean())
    assert missed["official"] == pytest.approx(0.41, abs=0.05)
    assert missed["centre"] < 0.01


def test_confidence_is_the_mean_of_the_digits() -> None:
    text = "2 dogs: [[086,540,400,760;001,002,003,004]] and [[9,8,7,6]]"
    digits = [int(character) for character in text if character.isdigit()]
    probs = [sure(digit, 0.9 if 1 <= n <= 12 else 0.5) for n, digit in enumerate(digits)]
    first, second, third = read_boxes(text, probs) or ()
    assert (first.bins, second.bins, third.bins) == ((86, 540, 400, 760), (1, 2, 3, 4), (9, 8, 7, 6))
    assert first.expected == (86, 540, 400, 760)
    assert first.confidence == pytest.approx(0.9)
    assert second.confidence == third.confidence == pytest.approx(0.5)


def test_no_confidence_without_a_distribution_for_every_digit() -> None:
    text = "[[086,540,400,760]]"
    probs = [sure(int(character)) for character in text if character.isdigit()]
    assert read_boxes(text, probs) is not None
    assert read_boxes(text, probs[1:]) is None
    assert read_boxes("[[086,540]] 123456", probs) is None


@pytest.mark.parametrize(
    ("digits", "probs", "wanted"),
    [
        ("123", [sure(1), sure(2), sure(3)], 123.0),
        ("123", [sure(1), sure(2), mixed(d3=0.5, d4=0.5)], 123.5),
        ("123", [sure(1), sure(2), mixed(d3=0.3, d4=0.3)], 123.5),  # the remaining probability is on other tokens
        ("299", [mixed(d2=0.6, d3=0.4), sure(9), sure(9)], 299.4),  # the alternative is 300, not 399
        ("300", [mixed(d2=0.4, d3=0.6), sure(0), sure(0)], 299.6),
        ("129", [sure(1), mixed(d2=0.6, d3=0.4), sure(9)], 129.4),
        ("105", [mixed(d1=0.7, d7=0.3), sure(0), sure(5)], 105.0),  # two objects, not one uncertain edge
        ("7", [mixed(d6=0.5, d7=0.5)], 6.5),
    ],
)
def test_expected_coordinate(digits: str, probs: list[list[float]], wanted: float) -> None:
    assert expected_coordinate(digits, probs) == pytest.approx(wanted)


@pytest.mark.slow
def test_a_bell_around_the_edge_is_read_between_the_bins() -> None:
    """A model whose belief about a coordinate is a bell of 2 bins around it: digits by digits, as it would write them.

    The expected coordinate is nearer than the written one on average, also across tens and hundreds.
    """
    numbers = np.arange(1000)
    errors = []
    for edge in np.random.default_rng(0).uniform(50, 950, 400):
        belief = np.array([math.exp(-(((k + 0.5 - edge) / 2) ** 2) / 2) for k in numbers])
        belief /= belief.sum()
        digits, probs = "", []
        for place in (100, 10, 1):
            within = belief[int(digits or 0) * place * 10 :][: place * 10]
            row = within.reshape(10, place).sum(1) / within.sum()
            digits += str(int(row.argmax()))
            probs.append(row.tolist())
        errors.append([abs(int(digits) + 0.5 - edge), abs(expected_coordinate(digits, probs) + 0.5 - edge)])
    written, expected = np.mean(errors, axis=0)
    assert expected < 0.75 * written
