"""The scores of an evaluation as the report shows them: tiles, and a table for each way to group the questions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from markupsafe import Markup

from cogvlm_ft.evaluate.results import Report, Results, ceiling_of
from cogvlm_ft.grounding.breakdown import size_classes, source_file
from cogvlm_ft.grounding.metrics import AnswerScore, is_lower_better, summarize
from cogvlm_ft.grounding.phrases import NOTHING, Confusion, find_confusions, metrics_by_phrase
from cogvlm_ft.grounding.prediction import Prediction
from cogvlm_ft.html_page import both
from cogvlm_ft.report.figures import mean
from cogvlm_ft.report.labels import COLUMNS, GROUPS, Words, metric_title, value_title

_TILES = (
    *("mean_iou", "acc@0.5", "f1@0.5", "not_found_acc", "false_not_found"),
    *("unreadable", "truncated", "chrf", "text_exact", "probe_same"),
)
_OF_PRESENT = ("mean_iou", "ceiling", "acc@", "f1@", "false_not_found")
"""Prefixes of metrics that need a present target; not_found_acc needs an absent one."""
MAX_PHRASES, MAX_CONFUSIONS = 300, 200
_MAX_ROOT_FILES = 5
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
    if results.about.get("tiles"):  # box text about tiles is finer than about the whole image
        return {}
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
    """Build the headline numbers and the counts; only what was counted."""
    metrics, before = _counted(report.results.metrics), report.former.metrics if report.former else {}
    tiles = []
    for name in (name for name in _TILES if name in metrics):
        change = metrics[name] - before.get(name, metrics[name])
        ceiling = ceilings.get("") if name == "mean_iou" else None
        tiles.append(
            Tile(
                number=_cell(name, metrics[name]),
                title=metric_title(name),
                change=f"{change:+.3f}" if 5e-4 <= abs(change) < math.inf else "",
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


def tables_of(results: Results, ceilings: Mapping[str, float]) -> list[Table]:
    """Build a table for each way to group the questions; only columns that have a number."""
    by_folder = _by_folder(results)
    tables = []
    for group, title in GROUPS.items():
        rows = by_folder if group == "source" and by_folder else _rows_of(group, results.metrics, ceilings)
        if rows:
            tables.append(_table(title, rows, group))
    return tables


def phrase_table(results: Results) -> Table | None:
    """Build the table of phrases, those asked for most often; None for an evaluation that does not hold phrases."""
    found = list(metrics_by_phrase(results.predictions, results.protocol).items())[:MAX_PHRASES]
    rows = {phrase: _with_count(metrics) for phrase, metrics in found}
    return _table(("By phrase", "按短语"), rows, "phrase") if rows else None


def confusions_of(results: Results) -> list[tuple[Confusion, Markup]]:
    """Return what wrong boxes show, and its name for the page."""
    nothing = both("(nothing annotated)", "（未标注的地方）")
    found = find_confusions(results.predictions)[:MAX_CONFUSIONS]
    return [(each, nothing if each.given == NOTHING else Markup.escape(each.given)) for each in found]


def _table(title: Words, rows: Mapping[str, Numbers], group: str) -> Table:
    """Build a table; a column is shown if a row has a number for it."""
    counted = {value: _counted(numbers) for value, numbers in rows.items()}
    known = [name for name in COLUMNS if any(name in numbers for numbers in counted.values())]
    columns = [name for name in known if group == "phrase" or name != "false_not_found"]  # there is room for one more
    cells = [
        (value_title(group, value), [_cell(name, numbers.get(name)) for name in columns])
        for value, numbers in counted.items()
    ]
    return Table(title, [COLUMNS[name] for name in columns], cells)


def _by_folder(results: Results) -> dict[str, Numbers]:
    """Return the metrics by the folder of the annotation, as one source may have a file per image."""
    scores: dict[str, list[AnswerScore]] = {}
    folders = _folders(results.predictions)
    for each in results.predictions:
        if each.source and each.score is not None:
            scores.setdefault(folders[each.source], []).append(each.score)
    ranked = sorted(scores, key=lambda folder: -len(scores[folder]))
    return {folder: _with_count(summarize(scores[folder], results.protocol)) for folder in ranked}


def _folders(predictions: Sequence[Prediction]) -> dict[str, str]:
    """Return the folder of each source; of files without a folder the file, or their suffix where there are many."""
    paths = {source: PurePosixPath(source_file(source)) for source in {each.source for each in predictions}}
    in_root = {path for path in paths.values() if len(path.parts) == 1}

    def name(path: PurePosixPath) -> str:
        if path not in in_root:
            return f"{path.parent}/"
        return str(path) if len(in_root) <= _MAX_ROOT_FILES else f"*{path.suffix}"

    return {source: name(path) for source, path in paths.items()}


def _with_count(metrics: Numbers) -> Numbers:
    return {**metrics, "num": sum(metrics.get(f"num_{kind}", 0.0) for kind in ("present", "absent", "text"))}


def _counted(numbers: Mapping[str, float]) -> Numbers:
    """Leave out what has no question to count, such as boxes among absent targets."""
    absent_only, present_only = numbers.get("num_present") == 0, numbers.get("num_absent") == 0
    return {
        name: number
        for name, number in numbers.items()
        if not (absent_only and name.startswith(_OF_PRESENT)) and not (present_only and name == "not_found_acc")
    }


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
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if name == "num" else f"{value:.3f}"
