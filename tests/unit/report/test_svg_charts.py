"""Charts: every point where it belongs, and nothing that a browser cannot draw."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from cogvlm_ft.report.svg_charts import HEIGHT, MAX_DOTS, MAX_LINE_POINTS, WIDTH, Axes, Series, chart


def drawn(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text[text.index("<svg") :])


def line_of(text: str) -> list[tuple[float, float]]:
    points = re.findall(r'<polyline points="([^"]*)"', text)[0].split()
    return [(float(x), float(y)) for x, y in (point.split(",") for point in points)]


def test_corners_of_the_axes() -> None:
    axes = Axes((0, 10), (0, 1))
    left, bottom = axes.place((0, 0))
    right, top = axes.place((10, 1))
    assert 0 < left < right < WIDTH and 0 < top < bottom < HEIGHT
    assert axes.place((5, 0.5)) == pytest.approx(((left + right) / 2, (top + bottom) / 2))
    assert Axes((1, 100), (0, 1), x_log=True).place((10, 0))[0] == pytest.approx((left + right) / 2)


def test_a_line_goes_through_its_points_and_larger_values_lie_higher() -> None:
    text = chart([Series("a", [(0, 0.0), (1, 0.5), (4, 1.0)])], "title", y_range=(0, 1))
    (x0, y0), (x1, y1), (x2, y2) = line_of(text)
    assert (x1 - x0) / (x2 - x0) == pytest.approx(0.25, abs=1e-3) and (y0 - y1) == pytest.approx(y1 - y2, abs=0.11)
    assert y0 > y1 > y2
    svg = drawn(text)
    assert svg.attrib["aria-label"] == "title"
    labels = [each.text for each in svg.iter("text")]
    assert {"0", "1", "0.5"} <= set(labels) and len(labels) < 14


@pytest.mark.parametrize("points", [[], [(math.nan, 1.0)], [(1.0, math.inf)]], ids=["none", "nan", "infinite"])
def test_nothing_to_draw_is_no_chart(points: list[tuple[float, float]]) -> None:
    assert chart([Series("a", points)], "t") == ""


@pytest.mark.parametrize(
    "points", [[(3.0, 7.0)], [(0.0, 0.0), (1.0, 0.0)], [(1.0, 1e-9), (2.0, 3e-9)], [(1.0, -5e6), (2.0, 5e6)]]
)
def test_flat_tiny_and_huge_values_stay_in_the_drawing(points: list[tuple[float, float]]) -> None:
    text = chart([Series("a", points)], "t")
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in line_of(text))
    assert len([each for each in drawn(text).iter("text")]) >= 3


def test_long_series_are_thinned_without_moving_their_mean() -> None:
    points = [(float(i), float(i % 7)) for i in range(10_000)]
    assert len(line_of(chart([Series("a", points)], "t"))) <= MAX_LINE_POINTS
    cloud = drawn(chart([Series("a", points, "dots")], "t"))
    assert MAX_DOTS / 2 < len(list(cloud.iter("circle"))) <= MAX_DOTS


def test_a_logarithmic_axis_leaves_out_what_it_cannot_show() -> None:
    text = chart([Series("a", [(0.0, 1.0), (0.01, 0.2), (1.0, 0.4)])], "t", x_log=True)
    assert len(line_of(text)) == 2
    assert {"0.01", "0.1", "1"} <= {each.text for each in drawn(text).iter("text")}


def test_only_labelled_series_have_a_legend() -> None:
    points = [(0.0, 0.0), (1.0, 1.0)]
    assert chart([Series("", points)], "t").startswith("<svg")
    text = chart([Series("one", points), Series("two", []), Series("three", points, "dashed")], "t")
    assert re.findall(r"</i>(\w+)</span>", text) == ["one", "three"]
