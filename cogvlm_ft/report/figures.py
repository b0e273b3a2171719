"""The charts of the report: curves of a run, thresholds and sizes of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from cogvlm_ft.evaluate.results import Results, ceiling_of
from cogvlm_ft.grounding.metrics import PRESENT
from cogvlm_ft.html_page import both
from cogvlm_ft.report.labels import Words, metric_title, value_title
from cogvlm_ft.report.svg_charts import Point, Series, chart
from cogvlm_ft.tracking.metrics_log import Row

UNIT = (0.0, 1.0)
SHARE_VALUES = ("under_1", "1_to_3", "3_to_10", "over_10")
LOG_CURVES = ("loss", "grad_norm")
_BINS_PER_DECADE = 5
_LEAST_THRESHOLD = 1e-4  # of the not-found curve; the axis is logarithmic


@dataclass(frozen=True)
class Panel:
    """A chart and the note below it."""

    title: Words
    chart: Markup
    note: Markup


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def curve_panels(rows: Sequence[Row], ceiling: float | None) -> list[Panel]:
    """Draw validation values over epochs and training values over steps, where there are any.

    ceiling: the best mean IoU that is possible; None = not known.
    """
    train, val = ([row for row in rows if row["kind"] == kind] for kind in ("train", "val"))
    epochs = [float(row["epoch"]) for row in val if row.get("epoch") is not None]
    boxes = _metrics(val, "mean_iou", "acc@0.5", "acc@0.75")
    if ceiling is not None and epochs:
        boxes.append(Series(both("possible", "上限"), [(min(epochs), ceiling), (max(epochs), ceiling)], "dashed"))
    shares = [
        Series(value_title("share", value), _points(val, "epoch", f"acc@0.5/share={value}")) for value in SHARE_VALUES
    ]
    by_epoch, by_step = both("by epoch", "横轴：轮次"), both("by step", "横轴：步")
    not_found = _metrics(val, "not_found_acc", "false_not_found", "unreadable")
    panels = [
        Panel(("Boxes", "框"), chart(boxes, "boxes by epoch", y_range=UNIT), by_epoch),
        Panel(
            ("Acc@0.5 by side of the target", "不同目标边长的 Acc@0.5"),
            chart([each for each in shares if each.points], "Acc@0.5 by size and epoch", y_range=UNIT),
            by_epoch,
        ),
        Panel(
            ("“Not found” and unreadable answers", "“未找到”与无法解析的回答"),
            chart(not_found, "not found", y_range=UNIT),
            by_epoch,
        ),
        Panel(
            ("Forgetting", "遗忘"),
            chart(_metrics(val, "probe_same"), "general questions", y_range=UNIT),
            by_epoch,
        ),
        *(
            Panel((en, zh), chart([Series("", _points(train, "step", name))], en, y_log=name in LOG_CURVES), by_step)
            for name, en, zh in (
                ("loss", "Training loss", "训练损失"),
                ("grad_norm", "Gradient norm", "梯度范数"),
                ("lr", "Learning rate", "学习率"),
                ("images_per_s", "Images per second", "每秒图片数"),
            )
        ),
    ]
    return [panel for panel in panels if panel.chart]


def blend_panels(blends: Sequence[Row]) -> list[Panel]:
    """Draw what blends of the model at the start and the fine-tuned one scored, if they were scored."""
    series = [
        Series(metric_title(name), [(x, value / scale) for x, value in _points(blends, "fraction", name)])
        for name, scale in (("mean_iou", 1), ("acc@0.5", 1), ("probe_chrf", 100))
    ]
    drawn = chart([each for each in series if each.points], "scores of blends", y_range=UNIT)
    note = both("0: start model; 1: fine-tuned model", "横轴：0 为训练起点的模型，1 为微调后的模型")
    return [Panel(("Blends with the start", "与训练起点的融合"), drawn, note)] if drawn else []


def _points(rows: Sequence[Row], x: str, y: str) -> list[Point]:
    return [(float(row[x]), float(row[y])) for row in rows if row.get(x) is not None and row.get(y) is not None]


def _metrics(rows: Sequence[Row], *names: str) -> list[Series]:
    series = [Series(metric_title(name), _points(rows, "epoch", name)) for name in names]
    return [each for each in series if each.points]


def evaluation_panels(results: Results) -> list[Panel]:
    """Draw precision and recall, the thresholds, and IoU by size, where they are known."""
    panels = [_precision_recall(results), _confidence(results), _not_found(results), _iou_by_size(results)]
    return [panel for panel in panels if panel.chart]


def _precision_recall(results: Results) -> Panel:
    points = [(recall, precision) for recall, precision in results.curves.get("precision_recall", [])]
    area = f" · AP50 {results.metrics['ap50']:.3f}" if "ap50" in results.metrics else ""
    series = [Series(both("precision", "精确率") + area, points)] if any(precision for _, precision in points) else []
    note = both(
        "Precision by recall at IoU 0.5; boxes are ranked by the mean probability of their digits.",
        "IoU 0.5 时精确率随召回率的变化；框按数字的平均概率排序。",
    )
    return Panel(("Precision and recall", "精确率与召回率"), chart(series, "precision by recall", y_range=UNIT), note)


def _confidence(results: Results) -> Panel:
    points = results.curves.get("confidence", [])
    titles = (("precision", "精确率"), ("recall", "召回率"), ("F1", "F1"))
    series = [Series(both(*title), [(row[0], row[i]) for row in points]) for i, title in enumerate(titles, 1)]
    least = f"{results.metrics.get('tile_min_confidence', 0.0):.2g}"
    note = both(
        f"Boxes from tiles with at least this confidence. They count from {least}, where F1 is highest.",
        f"切块中不低于该置信度的框。达到 {least} 的框计入结果，此处 F1 最高。",
    )
    title = ("Boxes from tiles by confidence", "切块中框的置信度")
    return Panel(title, chart(series, "boxes by confidence", y_range=UNIT), note)


def _not_found(results: Results) -> Panel:
    points = results.curves.get("not_found", [])
    floored = [(min(max(threshold, _LEAST_THRESHOLD), 1.0), n_acc, t_acc) for threshold, n_acc, t_acc in points]
    series = [
        Series(
            both("absent targets recognised", "目标不存在时回答“未找到”的比例"), [(x, n_acc) for x, n_acc, _ in floored]
        ),
        Series(both("present targets kept", "存在的目标仍给出框的比例"), [(x, t_acc) for x, _, t_acc in floored]),
    ]
    drawn = chart(series, "not found by threshold", y_range=UNIT, x_log=True)
    threshold = results.metrics.get("not_found_threshold")
    best = Markup()
    if threshold is not None:
        right = results.metrics.get("not_found_balanced_acc", 0.0)
        best = both(
            f" At {threshold:.2g} both are equal: {100 * right:.1f} %.",
            f"阈值为 {threshold:.2g} 时两者相等：{100 * right:.1f} %。",
        )
    note = both(
        "Accuracy if “not found” is reported whenever its probability is at least the value on the horizontal axis.",
        "当“未找到”概率达到横轴值即判为未找到时的准确率。",
    )
    return Panel(("“Not found” by threshold", "“未找到”的阈值"), drawn, note + best)


def _iou_by_size(results: Results) -> Panel:
    """Draw every question about present targets; of several boxes, the mean side counts."""
    dots: list[Point] = []
    ceilings: list[Point] = []
    for each in results.predictions:
        if each.score is None or each.score.kind != PRESENT or not each.truth_boxes_xyxy:
            continue
        image_px = each.image_size_px[0] * each.image_size_px[1]
        areas = [max(x1 - x0, 0.0) * max(y1 - y0, 0.0) for x0, y0, x1, y1 in each.truth_boxes_xyxy]
        ceiling = ceiling_of(each, results.protocol)
        if ceiling is not None and min(areas) > 0:
            side = 100 * mean([math.sqrt(area / image_px) for area in areas])
            dots.append((side, each.score.iou))
            ceilings.append((side, ceiling))
    series = [Series(both("answers", "回答"), dots, "dots"), Series(both("mean", "平均"), _binned(dots))]
    if not results.about.get("tiles"):  # box text about tiles is finer than about the whole image
        series.append(Series(both("possible", "上限"), _binned(ceilings), "dashed"))
    note = both("IoU by side of the target, in % of the image side.", "IoU 随目标边长（占图片边长的百分比）的变化。")
    return Panel(("Size and IoU", "尺寸与 IoU"), chart(series, "IoU by size", y_range=UNIT, x_log=True), note)


def _binned(points: Sequence[Point]) -> list[Point]:
    """Average points with similar x."""
    bins: dict[int, list[Point]] = {}
    for point in points:
        bins.setdefault(math.floor(math.log10(point[0]) * _BINS_PER_DECADE), []).append(point)
    return [(mean([x for x, _ in each]), mean([y for _, y in each])) for _, each in sorted(bins.items())]
