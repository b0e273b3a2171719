"""The page of a review: one HTML file that needs nothing else, in two languages."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from hashlib import sha256
from html import escape
from importlib import resources
from typing import Any

from tqdm import tqdm

from cogvlm_ft.shards.reviewing.charts import bar_chart
from cogvlm_ft.shards.reviewing.pictures import draw_view
from cogvlm_ft.shards.reviewing.survey import Survey
from cogvlm_ft.shards.reviewing.suspect_texts import KINDS, UNKNOWN_KIND, title_of
from cogvlm_ft.shards.reviewing.suspects import Suspect, View

_UNIT_WORDS = {"pixels": "px", "unit": "0..1", "thousandths": "0..1000"}


def render_page(survey: Survey, source: str) -> str:
    """The whole page. All that comes from the data is escaped, and the page's own rules let nothing else run.

    source: what was reviewed, in the user's own words.
    """
    style, script = _resource("page.css"), _resource("page.js")
    hashes = f"style-src {_hash_source(style)}; script-src {_hash_source(script)}"
    return _fill(
        _resource("page.html"),
        {
            "policy": f"default-src 'none'; img-src data:; {hashes}; base-uri 'none'; form-action 'none'",
            "title": escape(_printable(f"Review of {source}")),
            "style": style,
            "script": script,
            "memory": sha256(source.encode("utf-8", "surrogatepass")).hexdigest()[:16],
            "source": escape(_printable(source)),
            "overview": _overview(survey.report),
            "suspects": _suspects(survey),
        },
    )


def both(en: str, zh: str) -> str:
    """Plain text in both languages; the page shows one of them."""
    return f'<span lang="en">{escape(_printable(en))}</span><span lang="zh">{escape(_printable(zh))}</span>'


def _resource(name: str) -> str:
    return (resources.files("cogvlm_ft.shards.reviewing") / name).read_text(encoding="utf-8")


def _fill(template: str, values: dict[str, str]) -> str:
    """In one pass: double braces inside a value stay as they are."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)


def _hash_source(text: str) -> str:
    return f"'sha256-{base64.b64encode(sha256(text.encode()).digest()).decode()}'"


def _printable(text: str) -> str:
    """Bytes that are no UTF-8 as escapes: the page must be UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def _overview(report: dict[str, Any]) -> str:
    counts, languages = report["counts"], report["languages"]
    numbers = [
        (counts["photos"], "photos", "图片"),
        (counts["targets"], "targets", "目标"),
        (counts["boxes"], "boxes", "框"),
        (counts["absent"], "absent targets", "不存在的目标"),
        (counts["turns"], "verbatim turns", "原文对话"),
        (languages.get("zh", 0), "Chinese phrases", "中文短语"),
        (languages.get("en", 0), "English phrases", "英文短语"),
    ]
    tiles = "".join(f"<div><b>{count:,}</b>{both(en, zh)}</div>" for count, en, zh in numbers)
    num_suspects = sum(report["suspects"].values())
    tiles += f'<a href="#suspects"><b>{num_suspects:,}</b>{both("suspects", "可疑之处")}</a>'
    splits = ", ".join(f"{name} {count:,}" for name, count in report["splits"].items())
    note = f'<p class="soft">{escape(splits)}</p>' if splits else ""
    return f'<div class="numbers">{tiles}</div>{note}{_sizes(report)}{_best_iou(report)}{_charts(report)}'


def _sizes(report: dict[str, Any]) -> str:
    """What each image size shows of the boxes, and what it costs."""
    best = report["recommended"]["image_size"]
    rows = []
    for size, found in report["image_sizes"].items():
        share = found["share_of_boxes_at_least_one_patch"]
        chosen = ' class="chosen"' if int(size) == best else ""
        ratio = found["tokens"] / report["image_sizes"]["490"]["tokens"]
        cells = f"<td>{size} px</td><td>{_percent(share)}</td><td>{found['tokens']:,}</td><td>{ratio:.2f}</td>"
        rows.append(f"<tr{chosen}>{cells}</tr>")
    columns = [
        both("image size", "图像尺寸"),
        both("boxes of a patch or more", "不小于一个块的框"),
        both("tokens per photo", "每图 token"),
        both("x 490 px", "相对 490"),
    ]
    charts = "".join(
        _panel(f"Patches at {size} px", f"{size} 像素下的块数", found["shorter_side_patches"])
        for size, found in report["image_sizes"].items()
    )
    heading, table = f"<h2>{both('Image size', '图像尺寸')}</h2>", _table(columns, rows)
    note = both(
        "How many patches the shorter side of the boxes has, by image size:", "不同图像尺寸下,框的短边相当于多少个块:"
    )
    return (
        f'{heading}<div class="two-panels">{_advice(report["recommended"])}<div class="panel">{table}</div></div>'
        f'<p class="soft">{note}</p><div class="panels four">{charts}</div>'
    )


def _advice(recommended: dict[str, Any]) -> str:
    size, share, wanted = recommended["image_size"], recommended["share"], recommended["wanted_share"]
    if size is None:
        nothing = both("No usable box, so no advice.", "没有可用的框,无法给出建议。")
        return f'<div class="panel advice"><p>{nothing}</p></div>'
    first = both(f"Recommended: {size} px.", f"建议:{size} 像素。")
    if recommended["enough"]:
        why = both(
            f" The smallest size at which {wanted:.0%} of the boxes are one patch (14 px) or more on their shorter"
            f" side; here {share:.1%} are.",
            f"这是使 {wanted:.0%} 的框短边不小于一个块（14 像素）的最小尺寸;此处为 {share:.1%}。",
        )
    else:
        why = both(
            f" Even there only {share:.1%} of the boxes are one patch (14 px) or more on their shorter side, wanted are"
            f" {wanted:.0%}: train on crops as well.",
            f"即使如此,也只有 {share:.1%} 的框短边不小于一个块（14 像素）,期望为 {wanted:.0%}:请同时用裁剪训练。",
        )
    note = both(
        "The published grounding weights are for 490 px; at another size the position table of the vision tower is"
        " interpolated and needs training. Small details that phrases ask for may want more than the boxes do.",
        "公开的定位权重为 490 像素;其他尺寸需要对视觉塔的位置表插值并训练。短语涉及的细节可能需要比框更高的分辨率。",
    )
    return f'<div class="panel advice"><p><b>{first}</b>{why}</p><p class="soft">{note}</p></div>'


def _best_iou(report: dict[str, Any]) -> str:
    rows = []
    for label, found in report["best_iou"].items():
        if found["boxes"]:
            name = both("all", "全部") if label == "all" else escape(label)
            mean, low = f"{found['mean']:.3f}", f"{found['percentile_5']:.3f}"
            shares = f"<td>{_percent(found['share_0.5'])}</td><td>{_percent(found['share_0.75'])}</td>"
            rows.append(f"<tr><td>{name}</td><td>{found['boxes']:,}</td><td>{mean}</td><td>{low}</td>{shares}</tr>")
    columns = [
        both("box side / image side", "框边长 / 图边长"),
        both("boxes", "框"),
        both("mean IoU", "平均 IoU"),
        both("5th percentile", "第 5 百分位"),
        "&ge; 0.5",
        "&ge; 0.75",
    ]
    text = both(
        "What a model without a mistake would score: box text has 1000 steps per side, so small boxes lose accuracy.",
        "完美模型能得到的分数:框文本每边只有 1000 级,小框会损失精度。",
    )
    heading = f"<h2>{both('Best IoU that box text can reach', '框文本可达到的最高 IoU')}</h2>"
    return f'{heading}<p class="soft">{text}</p><div class="panel">{_table(columns, rows)}</div>'


def _charts(report: dict[str, Any]) -> str:
    charts = [
        ("Box side in pixels (root of the area)", "框边长（像素,面积的平方根）", report["box_side_px"]),
        ("Box side / image side", "框边长 / 图边长", report["box_share_of_side"]),
        ("Longer side of photos in pixels", "图片长边（像素）", report["photo_longer_side_px"]),
        ("Boxes per target", "每个目标的框数", report["boxes_per_target"]),
        ("Targets per photo", "每张图的目标数", report["targets_per_sample"]),
        ("Words per English phrase", "英文短语的词数", report["phrase_length"]["en"]),
        ("Characters per Chinese phrase", "中文短语的字数", report["phrase_length"]["zh"]),
    ]
    panels = [_panel(en, zh, counts) for en, zh, counts in charts if sum(counts.values())]
    phrases = report["phrases"]
    words = "".join(
        f"<li>{escape(_cut(phrase, 60))} <b>{count:,}</b></li>" for phrase, count in phrases["most_frequent"]
    )
    title = both(f"Phrases: {phrases['different']:,} different", f"短语:{phrases['different']:,} 种")
    panels.append(f'<div class="panel"><h3>{title}</h3><ul class="words">{words}</ul></div>')
    return f'<h2>{both("What is in it", "内容统计")}</h2><div class="columns">{"".join(panels)}</div>'


def _table(columns: list[str], rows: list[str]) -> str:
    head = "".join(f"<th>{column}</th>" for column in columns)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _panel(title: str, title_zh: str, counts: dict[str, int]) -> str:
    return f'<div class="panel"><h3>{both(title, title_zh)}</h3>{bar_chart(counts, title)}</div>'


def _suspects(survey: Survey) -> str:
    counts = survey.report["suspects"]
    heading = f'<h2 id="suspects">{both("Suspects", "可疑之处")}</h2>'
    if not counts:
        return f"{heading}<p>{both('Nothing suspicious was found.', '没有发现可疑之处。')}</p>"
    chips = "".join(
        f'<button type="button" data-filter="{escape(kind)}" aria-pressed="false">'
        f"{both(title_of(kind, 'en'), title_of(kind, 'zh'))} <b>{count:,}</b></button>"
        for kind, count in counts.items()
    )
    everything = f'<button type="button" data-filter="" aria-pressed="true">{both("All", "全部")}</button>'
    legend = (
        f'<p class="soft"><span class="key marked"></span>{both("suspicious", "可疑")}'
        f'<span class="key instead"></span>{both("if read otherwise", "若按另一方式解读")}'
        f'<span class="key other"></span>{both("other boxes", "其他框")}</p>'
    )
    shown = sum(map(len, survey.shown.values()))
    bar_parts = tqdm(total=shown, unit="", desc="pictures")
    sections = []
    for kind, count in counts.items():
        cards = []
        for suspect in survey.shown.get(kind, []):
            cards.append(_card(suspect))
            bar_parts.update()
        sections.append(_section(kind, count, cards))
    bar_parts.close()
    return f'{heading}<div class="filters">{everything}{chips}</div>{legend}{"".join(sections)}'


def _section(kind: str, count: int, cards: Sequence[str]) -> str:
    words = KINDS.get(kind, UNKNOWN_KIND)
    heading = f"<h3>{both(title_of(kind, 'en'), title_of(kind, 'zh'))} · {count:,}</h3>"
    advice = both(words.advice["en"], words.advice["zh"])
    left_out = ""
    if len(cards) < count:
        left_out = both(
            f" Shown are {len(cards)} of {count:,}, chosen evenly; all are in suspects.jsonl.",
            f"此处显示 {count:,} 个中的 {len(cards)} 个（均匀抽取）;全部见 suspects.jsonl。",
        )
    return (
        f'<section class="kind" data-kind="{escape(kind)}">{heading}<p class="soft">{advice}{left_out}</p>'
        f'<div class="cards">{"".join(cards)}</div></section>'
    )


def _card(suspect: Suspect) -> str:
    many = " many" if len(suspect.views) > 1 else ""
    detail = both(_cut(suspect.detail("en"), 600), _cut(suspect.detail("zh"), 600))
    views = "".join(_figure(view, suspect) for view in suspect.views)
    source = "" if suspect.views else f'<p class="soft">{escape(_printable(suspect.source))}</p>'
    return (
        f'<article class="card{many}"><p class="detail">{detail}</p>{source}<div class="views">{views}</div></article>'
    )


def _figure(view: View, suspect: Suspect) -> str:
    name = escape(_printable(view.image))
    phrase = f" · {escape(_printable(_cut(view.phrase, 200)))}" if view.phrase else ""
    turned = f" · {both('turned upright', '转正后')}" if view.upright else ""
    level = (view.part or "").partition("-")[0]
    facts = {
        "part": view.part or "",
        "level": level,
        "image": _printable(view.image),
        "kind": suspect.kind,
        "units": _UNIT_WORDS[view.units],
        "phrase": _printable(view.phrase or ""),
        "language": view.language or "",
        "boxes": json.dumps(view.as_read),
    }
    data = " ".join(f'data-{field}="{escape(value)}"' for field, value in facts.items())
    caption = f"<figcaption>{name}{phrase}{turned}<small>{escape(_printable(view.source))}</small></figcaption>"
    return f"<figure {data}>{_pictures(view, name)}{caption}{_buttons(level)}</figure>"


def _pictures(view: View, name: str) -> str:
    picture = draw_view(view)
    if picture is None:
        return f'<div class="blank">{both("no picture", "无图片")}</div>'
    images = f'<img src="{picture.uri}" alt="{name}">'
    if picture.zoom is None:
        return f'<div class="pictures">{images}</div>'
    return f'<div class="pictures two">{images}<img src="{picture.zoom}" alt=""></div>'


def _buttons(level: str) -> str:
    if not level:
        return ""
    names = [("accept", "Accept", "保留"), ("drop", "Drop", "去掉"), ("edit", "Edit", "修改")]
    if level == "sample":  # a whole photo cannot be rewritten here
        names = [("accept", "Accept", "保留"), ("drop", "Drop photo", "去掉此图")]
    buttons = "".join(
        f'<button type="button" data-decision="{decision}" aria-pressed="false">{both(en, zh)}</button>'
        for decision, en, zh in names
    )
    return f'<div class="actions">{buttons}</div>'


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
