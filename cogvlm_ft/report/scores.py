"""The scores of an evaluation as the report shows them: tiles, and a table for each way to group the questions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from markupsafe import Markup

from cogvlm_ft.evaluate.results import Report, Results, ceiling_of
from cogvlm_ft.grounding.breakdown import size_classes
from cogvlm_ft.grounding.metrics import is_lower_better
from cogvlm_ft.html_page import both
from cogvlm_ft.report.figures import mean
from cogvlm_ft.report.labels import COLUMNS, GROUPS, Words, metric_title, value_title

_TILES = (
    *("mean_iou", "acc@0.5", "f1@0.5", "not_found_acc", "false_not_found"),
    *("unreadable", "truncated", "chrf", "text_exact", "probe_same"),
)
_SIZES = ("small", "medium", "large", "under_1", "1_to_3", "1_to_4", "3_to_10", "over_4", "over_10", "0", "1", "2+")

Numbers = dict[str, float]


@dataclass(frozen=True)
class Tile:
    """change: against the evaluation before, or empty; is_better: whether it is an improvement. note: what it means."""

    number: str
    title: Markup
    change: str = ""
    is_better: bool = False
    note: Markup | str = ""


@dataclass(frozen=True)
class Table:
    """columns: titles of the numbers. rows: (title, numbers)."""

    title: Words
    columns: list[Words]
    rows: list[tuple[Markup, list[str]]]


def ceilings_of(results: Results) -> Numbers:
    """Return the best mean IoU that box text allows: of all questions ("") and of each size class ("size=small")."""
    num_patches = int(results.about.get("num_patches") or 0)
    found: dict[str, list[float]] = {}
    for each in results.predictions:
        ceiling = ceiling_of(each, results.protocol) if each.score else None
        if ceiling is None or not each.truth_boxes_xyxy:
            continue
        classes = size_classes(each.truth_boxes_xyxy, each.image_size_px, each.frame_px, num_patches)
        for group in ("", *(f"{name}={value}" for name, value in classes)):
            found.setdefault(group, []).append(ceiling)
    return {group: mean(values) for group, values in found.items()}


def tiles_of(report: Report, ceilings: Mapping[str, float]) -> list[Tile]:
    """Build the headline numbers and the counts."""
    metrics, before = report.results.metrics, report.former.metrics if report.former else {}
    tiles = []
    for name in (name for name in _TILES if name in metrics):
        change = metrics[name] - before.get(name, metrics[name])
        ceiling = ceilings.get("") if name == "mean_iou" else None
        tiles.append(
            Tile(
                number=f"{metrics[name]:.3f}",
                title=metric_title(name),
                change="" if abs(change) < 5e-4 else f"{change:+.3f}",
                is_better=(change < 0) == is_lower_better(name),
                note="" if ceiling is None else both(f"of {ceiling:.3f} possible", f"上限 {ceiling:.3f}"),
            )
        )
    num_questions = sum(metrics.get(f"num_{kind}", 0.0) for kind in ("present", "absent", "text"))
    counts = [
        (metrics.get("num_images"), both("images evaluated", "张图片参与评估")),
        (num_questions, both("questions scored", "个计分的问题")),
    ]
    return tiles + [Tile(f"{count:,.0f}", title) for count, title in counts if count]


def tables_of(metrics: Mapping[str, float], ceilings: Mapping[str, float]) -> list[Table]:
    """Build a table for each way to group the questions; only columns that have a number."""
    tables = []
    for group, title in GROUPS.items():
        rows = _rows_of(group, metrics, ceilings)
        columns = [name for name in COLUMNS if any(name in numbers for numbers in rows.values())]
        cells = [
            (value_title(group, value), [_cell(name, numbers.get(name)) for name in columns])
            for value, numbers in rows.items()
        ]
        if rows:
            tables.append(Table(title, [COLUMNS[name] for name in columns], cells))
    return tables


def _rows_of(group: str, metrics: Mapping[str, float], ceilings: Mapping[str, float]) -> dict[str, Numbers]:
    """Return the numbers of each value of a group: sizes from small to large, others by their number of questions."""
    rows: dict[str, Numbers] = {}
    for name, number in metrics.items():
        metric, _, place = name.partition("/")
        kind, _, value = place.partition("=")
        if kind == group:
            rows.setdefault(value, {})[metric] = number
    for value, numbers in rows.items():
        numbers["num"] = numbers.get("num_present", 0) + numbers.get("num_absent", 0)
        if f"{group}={value}" in ceilings:
            numbers["ceiling"] = ceilings[f"{group}={value}"]

    def place_of(value: str) -> tuple[float, str]:
        return _SIZES.index(value) if value in _SIZES else -rows[value]["num"], value

    return {value: rows[value] for value in sorted(rows, key=place_of)}


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if name == "num" else f"{value:.3f}"
