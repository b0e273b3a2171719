"""The report as HTML: one file that needs nothing else, in two languages."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from hashlib import sha256
from html import escape
from importlib import resources
from typing import Any

from cogvlm_ft.evaluate.results import Gallery, Report, Results, ceiling_of, choose_answers, score_of
from cogvlm_ft.grounding.breakdown import size_classes
from cogvlm_ft.grounding.metrics import ABSENT, HIT, is_lower_better
from cogvlm_ft.grounding.prediction import Prediction
from cogvlm_ft.grounding.targets import Box
from cogvlm_ft.report.figures import curve_panels, evaluation_panels, mean
from cogvlm_ft.report.labels import COLUMNS, GROUPS, SECTIONS, both, metric_title, printable, value_title
from cogvlm_ft.report.thumbnails import Photos, Thumbnails
from cogvlm_ft.tracking.sample_losses import HighLoss

_TILES = (
    "mean_iou",
    "acc@0.5",
    "f1@0.5",
    "not_found_acc",
    "false_not_found",
    "unreadable",
    "chrf",
    "text_exact",
    "probe_same",
)
_MAX_TEXT, _MAX_FACT = 240, 400  # characters
_GALLERY_BYTES, _SUSPECTS_BYTES = 2_500_000, 1_000_000
"""Of their pictures; nearly all of the page, which stays below 5 MB for phones and mail."""


def render_page(report: Report, photos: Photos, train_photos: Photos, num_photos: int) -> str:
    """The whole page. All that comes from data is escaped, and the page's own rules let nothing else run."""
    style, script = _resource("page.css"), _resource("page.js")
    ceilings = ceilings_of(report.results)
    former = report.former.predictions if report.former else []
    gallery = choose_answers(report.results.predictions, former, num_photos)
    content = {
        "overview": _overview(report, ceilings),
        "curves": curve_panels(report.rows, ceilings.get("")),
        "groups": _breakdown(report.results.metrics, ceilings),
        "charts": evaluation_panels(report.results),
        "gallery": _gallery(gallery, photos, bool(former)),
        "suspects": _suspects(report, train_photos),
        "about": _about(report),
    }
    return _fill(
        _resource("page.html"),
        {
            "policy": "default-src 'none'; img-src data:; "
            f"style-src {_hash_source(style)}; script-src {_hash_source(script)}; base-uri 'none'; form-action 'none'",
            "title": escape(printable(f"Report: {report.name}")),
            "style": style,
            "script": script,
            "name": escape(printable(report.name)),
            "jump": _jump([name for name, html in content.items() if html]),
            **{name: _section(name, html) for name, html in content.items()},
        },
    )


def _resource(name: str) -> str:
    return (resources.files("cogvlm_ft.report") / name).read_text(encoding="utf-8")


def _fill(template: str, values: Mapping[str, str]) -> str:
    """In one pass: double braces inside a value stay as they are."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)


def _hash_source(text: str) -> str:
    return f"'sha256-{base64.b64encode(sha256(text.encode()).digest()).decode()}'"


def _section(name: str, html: str) -> str:
    return f'<section id="{name}">{html}</section>' if html else ""


def _jump(names: Sequence[str]) -> str:
    """Links to the parts that there are."""
    links = "".join(f'<a href="#{name}">{both(*SECTIONS[name])}</a>' for name in names if name in SECTIONS)
    return f'<div class="jump">{links}</div>'


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{column}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def ceilings_of(results: Results) -> dict[str, float]:
    """The best mean IoU that box text allows: of all questions ("") and of each class of size ("size=small")."""
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


def _overview(report: Report, ceilings: Mapping[str, float]) -> str:
    metrics, before = report.results.metrics, report.former.metrics if report.former else {}
    tiles = []
    for name in (name for name in _TILES if name in metrics):
        notes = [_change(name, metrics[name], before.get(name))]
        if name == "mean_iou" and "" in ceilings:
            notes.append(both(f"of {ceilings['']:.3f} possible", f"上限 {ceilings['']:.3f}"))
        note = f"<small>{' '.join(filter(None, notes))}</small>"
        tiles.append(f"<div><b>{metrics[name]:.3f}</b>{metric_title(name)}{note}</div>")
    questions = sum(metrics.get(f"num_{kind}", 0.0) for kind in ("present", "absent", "text"))
    for count, title in (
        (metrics.get("num_images"), both("photos asked about", "张提问的图片")),
        (questions, both("questions scored", "个计分的问题")),
    ):
        tiles.append(f"<div><b>{count:,.0f}</b>{title}</div>" if count else "")
    return f"<p>{_when(report)}</p><div class='numbers'>{''.join(tiles)}</div>{_ceiling_note(ceilings)}"


def _when(report: Report) -> str:
    """Which evaluation this is, and of which run."""
    about = report.results.about
    step = about.get("step")
    row = next((row for row in report.rows if row["kind"] == "val" and row.get("step") == step), {})
    parts = []
    if step is not None:
        parts.append(both(f"Evaluation at step {step}", f"第 {step} 步的评估"))
    if row.get("epoch") is not None:
        parts.append(both(f"epoch {row['epoch']:.3g}", f"第 {row['epoch']:.3g} 轮"))
    if report.former is not None:
        name = escape(printable(report.former.folder.name))
        parts.append(both("changes since", "变化对比") + f" {name}")
    if about.get("split"):
        parts.append(both("split", "数据划分") + f" {escape(printable(str(about['split'])))}")
    if about.get("protocol"):
        parts.append(both("protocol", "评估协议") + f" {escape(printable(str(about['protocol'])))}")
    return '<span class="soft">' + " · ".join(parts) + "</span>" if parts else ""


def _change(name: str, value: float, before: float | None) -> str:
    if before is None or abs(value - before) < 5e-4:
        return ""
    better = (value < before) == is_lower_better(name)
    return f'<span class="{"good" if better else "bad"}">{value - before:+.3f}</span>'


def _ceiling_note(ceilings: Mapping[str, float]) -> str:
    if "" not in ceilings:
        return ""
    text = both(
        "“Possible” is the mean IoU of an answer without a mistake: box text has a thousand steps a side, so small"
        " boxes cannot be exact.",
        "“上限”是完全正确的回答能得到的平均 IoU:框文本每边只有一千级,小框不可能完全精确。",
    )
    return f'<p class="soft">{text}</p>'


def _breakdown(metrics: Mapping[str, float], ceilings: Mapping[str, float]) -> str:
    """A table for every way to split the questions; only columns that have a number."""
    by_group: dict[str, dict[str, dict[str, float]]] = {}
    for name, number in metrics.items():
        measure, _, group = name.partition("/")
        kind, _, value = group.partition("=")
        if kind in GROUPS:
            by_group.setdefault(kind, {}).setdefault(value, {})[measure] = number
    panels = []
    for kind, title in GROUPS.items():
        rows = _in_order(kind, by_group.get(kind, {}))
        for value, measures in rows.items():
            measures["num"] = measures.get("num_present", 0) + measures.get("num_absent", 0)
            if f"{kind}={value}" in ceilings:
                measures["ceiling"] = ceilings[f"{kind}={value}"]
        shown = [name for name in COLUMNS if any(name in measures for measures in rows.values())]
        if rows:
            cells = [
                [value_title(kind, value), *(_cell(name, measures.get(name)) for name in shown)]
                for value, measures in rows.items()
            ]
            table = _table(["", *(both(*COLUMNS[name]) for name in shown)], cells)
            panels.append(f'<div class="panel"><h3>{both(*title)}</h3>{table}</div>')
    if not panels:
        return ""
    heading = both("Where it is right, and where not", "哪里答对,哪里答错")
    return f'<h2>{heading}</h2><div class="panels wide-panels">{"".join(panels)}</div>'


def _in_order(kind: str, rows: Mapping[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Sizes from small to large, everything else by its number of questions."""
    sizes = ["small", "medium", "large", "under_1", "1_to_3", "1_to_4", "3_to_10", "over_4", "over_10", "0", "1", "2+"]

    def place(value: str) -> tuple[float, str]:
        if value in sizes:
            return sizes.index(value), value
        return -rows[value].get("num_present", 0) - rows[value].get("num_absent", 0), value

    return {value: rows[value] for value in sorted(rows, key=place)}


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if name == "num" else f"{value:.3f}"


def _gallery(gallery: Gallery, photos: Photos, has_former: bool) -> str:
    """Changes first: they are what one looks for after an epoch."""
    groups = [
        ("newly_wrong", gallery.newly_wrong, "Newly wrong", "新答错的"),
        ("newly_right", gallery.newly_right, "Newly right", "新答对的"),
        ("worst", gallery.worst, "Worst", "最差的"),
        ("best", gallery.best, "Best", "最好的"),
    ]
    thumbnails = Thumbnails(_GALLERY_BYTES)
    photos.look_up(each.key for _, answers, _, _ in groups for each in answers)
    parts = []
    for name, answers, title, title_zh in groups:
        cards = "".join(_card(each, photos, thumbnails) for each in answers)
        is_change = name.startswith("newly")
        if not cards and is_change and not has_former:
            continue
        nothing = f'<p class="soft">{both("None.", "无。")}</p>'
        content = f'<div class="cards">{cards}</div>' if cards else nothing
        parts.append(f'<div data-group="{name}"><h3>{both(title, title_zh)}</h3>{content}</div>')
    legend = (
        f'<p class="legend"><label><input type="checkbox" id="truth" checked><i class="key truth"></i>'
        f'{both("truth", "标注")}</label><label><input type="checkbox" id="answer" checked>'
        f'<i class="key answer"></i>{both("answer", "回答")}</label></p>'
    )
    heading = both("Photos", "图片")
    return f"<h2>{heading}</h2>{legend}{''.join(parts)}{_left_out(thumbnails)}"


def _left_out(thumbnails: Thumbnails) -> str:
    if not thumbnails.num_left_out:
        return ""
    text = both(
        f"{thumbnails.num_left_out} pictures were left out to keep this page small.",
        f"为控制页面大小,省略了 {thumbnails.num_left_out} 张图片。",
    )
    return f'<p class="soft">{text}</p>'


def _card(each: Prediction, photos: Photos, thumbnails: Thumbnails) -> str:
    boxes: dict[str, Sequence[Box]] = {"truth": each.truth_boxes_xyxy or (), "answer": each.boxes_xyxy or ()}
    size = (int(each.image_size_px[0]), int(each.image_size_px[1]))
    picture = thumbnails.draw(photos.image(each.key), size, boxes, each.prompt)
    lines = [f'<p class="question">{_text(each.prompt)}</p>', f"<p>{_verdict(each)}</p>"]
    lines.append(
        f'<p class="said"><i class="key answer"></i><span>{_text(each.answer) or both("(empty)", "（空）")}</span></p>'
    )
    lines.append(f'<p class="said"><i class="key truth"></i><span>{_text(each.truth)}</span></p>')
    return _figure(picture, "".join(lines), each.key)


def _figure(picture: str, caption: str, key: str) -> str:
    shown = picture or f'<div class="blank">{both("no picture", "无图片")}</div>'
    return f'<figure class="card">{shown}<figcaption>{caption}<small>{_text(key)}</small></figcaption></figure>'


def _verdict(each: Prediction) -> str:
    """The score, and how sure the model was."""
    score, parts = score_of(each) or 0.0, []
    kind = "good" if score >= HIT else "bad"
    if each.score is not None and each.score.kind == ABSENT:
        word = (
            both("not in the photo, as it says", "不存在,回答正确") if score else both("not in the photo", "实际不存在")
        )
    else:
        word = f"IoU {score:.2f}"
    parts.append(f'<b class="{kind}">{word}</b>')
    if each.score is not None and not each.score.readable:
        parts.append(both("unreadable", "无法解析"))
    if each.confidences:
        sure = ", ".join(f"{confidence:.0%}" for confidence in each.confidences[:4])
        parts.append(both(f"sure of its boxes: {sure}", f"框的置信度:{sure}"))
    if each.not_found_prob is not None and each.not_found_prob >= 0.005:
        parts.append(both(f"“not found” {each.not_found_prob:.0%}", f"“未找到”概率 {each.not_found_prob:.0%}"))
    return " · ".join(parts)


def _text(text: str) -> str:
    return escape(printable(text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 1]}…"))


def _suspects(report: Report, photos: Photos) -> str:
    """Training samples that the model does not learn."""
    if report.high_losses is None:
        return ""
    heading = both("Training photos whose loss stays high", "损失居高不下的训练图片")
    advice = both(
        "Their loss was above the median in each of the last epochs, up to three. Look for wrong boxes and wrong words"
        " first; what is left is hard.",
        "这些样本的损失在最近(至多三)轮中每轮都高于中位数。先检查框和文字是否有误;其余的则是真正的难例。",
    )
    photos.look_up(high.key for high in report.high_losses)
    thumbnails = Thumbnails(_SUSPECTS_BYTES)
    cards = "".join(_suspect(high, photos, thumbnails) for high in report.high_losses)
    content = f'<div class="cards">{cards}</div>' if cards else f"<p>{both('None.', '无。')}</p>"
    return f'<h2>{heading}</h2><p class="soft">{advice}</p>{content}{_left_out(thumbnails)}'


def _suspect(high: HighLoss, photos: Photos, thumbnails: Thumbnails) -> str:
    sample, boxes, phrases = photos.sample(high.key), [], []
    picture = ""
    if sample is not None:
        boxes = [box for target in sample.record.targets for box in target.boxes_xyxy]
        phrases = [f"{target.phrase} ({len(target.boxes_xyxy)})" for target in sample.record.targets]
        phrases += [f"{turn.prompt} → {turn.answer}" for turn in sample.record.turns]
        size = sample.record.image_size_px or sample.image.size  # a training photo may be decoded smaller
        picture = thumbnails.draw(sample.image, size, {"truth": boxes}, high.key)
    losses = ", ".join(f"{loss:.2f}" for _, loss in high.per_token)
    ratio = both(f"at least {high.ratio:.1f} × the median", f"至少为中位数的 {high.ratio:.1f} 倍")
    per_token = both(f"loss per token by epoch: {losses}", f"各轮每 token 损失:{losses}")
    words = f'<p class="question">{_text("; ".join(phrases))}</p>' if phrases else ""
    return _figure(picture, f'{words}<p><b class="bad">{ratio}</b></p><p>{per_token}</p>', high.key)


def _about(report: Report) -> str:
    """Settings and hashes: what must be the same for two numbers to be compared."""
    facts: dict[str, Any] = {**report.facts, **report.results.about}
    rows = "".join(
        f"<tr><td>{escape(printable(name))}</td><td>{escape(printable(str(value)[:_MAX_FACT]))}</td></tr>"
        for name, value in facts.items()
    )
    table = f'<div class="panel scroll"><table class="facts"><tbody>{rows}</tbody></table></div>' if rows else ""
    config = ""
    if report.config:
        summary = f"<summary>{both('All settings', '全部设置')} (config.yaml)</summary>"
        config = f'<details class="panel">{summary}<pre>{escape(printable(report.config))}</pre></details>'
    return f"<h2>{both('Settings and hashes', '设置与哈希')}</h2>{table}{config}" if table or config else ""
