"""Bar charts as inline SVG; colours come from the page's own style."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

_ROW, _LABELS, _BARS, _NUMBERS = 20, 74, 140, 90


def bar_chart(counts: Mapping[str, int], title: str) -> str:
    """One bar per label, from top to bottom; empty labels at both ends are left out."""
    rows = list(counts.items())
    while rows and not rows[0][1]:
        rows.pop(0)
    while rows and not rows[-1][1]:
        rows.pop()
    total, most = sum(counts.values()), max(counts.values(), default=0)
    width = _LABELS + _BARS + _NUMBERS
    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {_ROW * len(rows) + 4}" role="img" aria-label="{escape(title)}">'
    ]
    for number, (label, count) in enumerate(rows):
        y = number * _ROW
        length = max(_BARS * count / most, 1.0 if count else 0.0)
        share = f"{count:,} · {count / total:.0%}"
        parts.append(
            f'<text class="label" x="{_LABELS - 8}" y="{y + 14}" text-anchor="end">{escape(label)}</text>'
            f'<rect class="bar" x="{_LABELS}" y="{y + 4}" width="{length:.1f}" height="12" rx="2"/>'
            f'<text class="number" x="{_LABELS + length + 6:.1f}" y="{y + 14}">{share}</text>'
        )
    return "".join([*parts, "</svg>"])
