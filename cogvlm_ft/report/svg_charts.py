"""Charts as inline SVG. They hold numbers only; labels are HTML around them, colours come from the page's style."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

Point = tuple[float, float]

MAX_LINE_POINTS, MAX_DOTS = 240, 800
WIDTH, HEIGHT = 360, 220  # as wide as a phone: nothing becomes too small to read
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 8, 22
Y_LOG_FROM = 5.0
MAX_SERIES = 6
"""Maximum number of series: the style sheet has this many colours."""


@dataclass(frozen=True)
class Series:
    """label: for the legend; empty = not in it. points: by rising x. style: line, dashed, or dots (a scatter plot)."""

    label: Markup | str
    points: Sequence[Point]
    style: str = "line"


@dataclass(frozen=True)
class Axes:
    """The range that is shown. x_log, y_log: on a logarithmic scale."""

    x: Point
    y: Point
    x_log: bool = False
    y_log: bool = False

    def place(self, point: Point) -> Point:
        """Convert a point to units of the drawing."""
        low, value, high = (math.log10(x) if self.x_log else x for x in (self.x[0], point[0], self.x[1]))
        across = (value - low) / (high - low)
        bottom, height, top = (math.log10(y) if self.y_log else y for y in (self.y[0], point[1], self.y[1]))
        up = (height - bottom) / (top - bottom)
        return _LEFT + across * (WIDTH - _LEFT - _RIGHT), HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM)


def chart(
    series: Sequence[Series], title: str, *, y_range: Point | None = None, x_log: bool = False, y_log: bool = False
) -> Markup:
    """Draw all series over the same axes; empty if none has a point that can be drawn.

    title: plain text, for screen readers. y_range: by default what the series need. y_log: only where all values are
    above 0 and the largest is at least Y_LOG_FROM times the smallest.
    """
    shown = [_drawable(each, x_log) for each in series[:MAX_SERIES]]
    xs, ys = ([point[i] for each in shown for point in each.points] for i in (0, 1))
    if not xs:
        return Markup()
    y_log = y_log and min(ys) > 0 and max(ys) >= Y_LOG_FROM * min(ys)
    y_range = y_range or (_widened(min(ys), max(ys), True) if y_log else _rounded(min(ys), max(ys)))
    axes = Axes(_widened(min(xs), max(xs), x_log), y_range, x_log, y_log)
    parts = [_x_grid(axes), _y_grid(axes)]
    parts += [_draw(each, number, axes) for number, each in enumerate(shown)]
    area = f'data-left="{_LEFT}" data-right="{WIDTH - _RIGHT}" data-top="{_TOP}" data-bottom="{HEIGHT - _BOTTOM}"'
    values = f'data-x="{axes.x[0]:.9g} {axes.x[1]:.9g}" data-y="{axes.y[0]:.9g} {axes.y[1]:.9g}"'
    logs = f'data-logs="{"x" * axes.x_log}{"y" * axes.y_log}"'
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}"'
    svg = f'<svg class="chart" {box} role="img" aria-label="{escape(title)}" {area} {values} {logs}>'
    return Markup(f"{_legend(shown)}{svg}{''.join(parts)}</svg>")


def _drawable(series: Series, x_log: bool) -> Series:
    good = [(x, y) for x, y in series.points if math.isfinite(x) and math.isfinite(y) and (x > 0 or not x_log)]
    if series.style == "dots":
        return Series(series.label, good[:: -(-len(good) // MAX_DOTS) or 1], "dots")
    return Series(series.label, _thinned(good), series.style)


def _thinned(points: Sequence[Point]) -> list[Point]:
    """Average neighbours where there are more points than can be told apart."""
    size = -(-len(points) // MAX_LINE_POINTS) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _draw(series: Series, number: int, axes: Axes) -> str:
    places = [axes.place(point) for point in series.points]
    if series.style == "dots":
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2"/>' for x, y in places)
        return f'<g class="dots c{number}">{dots}</g>'
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    marks = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5"><title>{_number(point[0])}: {_number(point[1])}</title></circle>'
        for (x, y), point in zip(places, series.points, strict=True)
        if len(places) <= 30 and series.style == "line"
    )
    return f'<g class="{series.style} c{number}"><polyline points="{line}"/>{marks}</g>'


def _legend(series: Sequence[Series]) -> str:
    """Return the legend, without the series that have no label."""
    keys = "".join(
        f'<span><i class="key {each.style} c{number}"></i>{escape(each.label)}</span>'
        for number, each in enumerate(series)
        if each.points and each.label
    )
    return f'<p class="legend">{keys}</p>' if keys else ""


def _x_grid(axes: Axes) -> str:
    ticks = _log_ticks(*axes.x) if axes.x_log else _ticks(*axes.x)
    parts = []
    for tick in ticks:
        x, _ = axes.place((tick, axes.y[0]))
        place = f'x="{WIDTH - 2}" text-anchor="end"' if x > WIDTH - 30 else f'x="{x:.1f}" text-anchor="middle"'
        parts.append(f'<text {place} y="{HEIGHT - 6}">{_number(tick)}</text>')
    return "".join(parts)


def _y_grid(axes: Axes) -> str:
    parts = []
    for tick in _log_ticks(*axes.y) if axes.y_log else _ticks(*axes.y):
        _, y = axes.place((axes.x[0], tick))
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>'
        )
    return "".join(parts)


def _widened(low: float, high: float, is_log: bool) -> Point:
    """Return a range that is not empty."""
    if is_log:
        return (low / 1.2, high * 1.2)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _rounded(low: float, high: float) -> Point:
    """Extend the range to whole steps."""
    step = _step(low, high)
    start, stop = math.floor(low / step) * step, math.ceil(high / step) * step
    return (start, stop) if stop > start else (start - step, stop + step)


def _step(low: float, high: float) -> float:
    """Return a round number: about four steps from low to high."""
    rough = (high - low) / 4 or abs(high) / 4 or 0.25
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if rough <= factor * power * 1.0001)


def _ticks(low: float, high: float) -> list[float]:
    step = _step(low, high)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    if len(ticks) < 2:
        return [low, high]
    return ticks if len(ticks) <= 7 else [tick for tick in ticks if abs(math.log10(tick) % 1) < 1e-9]


def _number(value: float) -> str:
    """Format a number in few characters: 0.25, 12.5k, 2e-4."""
    if abs(value) < 1e-12:
        return "0"
    if abs(value) < 0.01:
        digits, _, power = f"{value:.1e}".partition("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value / 1000:.4g}k" if 10_000 <= abs(value) < 1e7 else f"{value:.3g}" if value < 1000 else f"{value:.0f}"
