"""The page of a review: one HTML file that needs nothing else, in two languages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cogvlm_ft.html_page import HtmlPage
from cogvlm_ft.shards.reviewing.pictures import Picture, draw_view
from cogvlm_ft.shards.reviewing.survey import Survey
from cogvlm_ft.shards.reviewing.suspect_texts import texts_of, title_of
from cogvlm_ft.shards.reviewing.suspects import Suspect, View

Words = tuple[str, str]
"""English, Chinese."""

_UNITS = {"pixels": "px", "unit": "0..1", "thousandths": "0..1000"}
_MAX_DETAIL, _MAX_PHRASE, _MAX_FREQUENT_PHRASE = 600, 200, 60  # characters
_BAR_LENGTH = 140


@dataclass(frozen=True)
class Bar:
    """length: in units of the drawing. share: of all counts."""

    label: str
    length: float
    count: int
    share: float


@dataclass(frozen=True)
class Figure:
    """An image of a suspect. data: what the script reads, by attribute. level: of what a decision decides."""

    view: View
    phrase: str
    picture: Picture | None
    data: dict[str, str]
    level: str


@dataclass(frozen=True)
class Card:
    """A suspect."""

    detail: Words
    source: str
    figures: list[Figure]


@dataclass(frozen=True)
class Section:
    """Suspects of one kind. count: all of them, of which `cards` are shown."""

    kind: str
    title: Words
    advice: Words
    count: int
    cards: list[Card]


def render_page(survey: Survey, source: str) -> str:
    """Return the whole page. All that comes from the data is escaped, and the page's policy lets nothing else run.

    source: what was reviewed, as the user named it.
    """
    report = survey.report
    frequent = [(_cut(phrase, _MAX_FREQUENT_PHRASE), count) for phrase, count in report["phrases"]["most_frequent"]]
    return HtmlPage(Path(__file__).parent).render_file(
        report=report,
        source=source,
        memory=sha256(source.encode("utf-8", "surrogatepass")).hexdigest()[:16],
        num_suspects=sum(report["suspects"].values()),
        frequent_phrases=frequent,
        charts=_charts_of(report),
        sections=_sections_of(survey),
        bars_of=bars_of,
    )


def bars_of(counts: Mapping[str, int]) -> list[Bar]:
    """Return a bar for each label; empty ones at both ends are left out."""
    filled = [number for number, count in enumerate(counts.values()) if count]
    total, most = sum(counts.values()), max(counts.values(), default=0)
    shown = list(counts.items())[filled[0] : filled[-1] + 1] if filled else []
    return [
        Bar(label, max(_BAR_LENGTH * count / most, 1.0 if count else 0.0), count, count / total)
        for label, count in shown
    ]


def _charts_of(report: Mapping[str, Any]) -> list[tuple[Words, dict[str, int]]]:
    charts: list[tuple[Words, dict[str, int]]] = [
        (("Box side in pixels (square root of the area)", "框边长（像素，面积的平方根）"), report["box_side_px"]),
        (("Box side / image side", "框边长 / 图边长"), report["box_share_of_side"]),
        (("Longer side of the images in pixels", "图片长边（像素）"), report["photo_longer_side_px"]),
        (("Boxes per target", "每个目标的框数"), report["boxes_per_target"]),
        (("Targets per image", "每张图的目标数"), report["targets_per_sample"]),
        (("Words per English phrase", "英文短语的词数"), report["phrase_length"]["en"]),
        (("Characters per Chinese phrase", "中文短语的字数"), report["phrase_length"]["zh"]),
    ]
    return [(title, counts) for title, counts in charts if any(counts.values())]


def _sections_of(survey: Survey) -> list[Section]:
    sections = []
    with tqdm(total=sum(map(len, survey.shown.values())), unit="", desc="images") as progress:
        for kind, count in survey.report["suspects"].items():
            cards = []
            for suspect in survey.shown.get(kind, []):
                cards.append(_card(suspect))
                progress.update()
            advice = texts_of(kind).advice
            title = (title_of(kind, "en"), title_of(kind, "zh"))
            sections.append(Section(kind, title, (advice["en"], advice["zh"]), count, cards))
    return sections


def _card(suspect: Suspect) -> Card:
    detail = (_cut(suspect.detail("en"), _MAX_DETAIL), _cut(suspect.detail("zh"), _MAX_DETAIL))
    figures = [_figure(view, suspect.kind) for view in suspect.views]
    return Card(detail, "" if figures else suspect.source, figures)


def _figure(view: View, kind: str) -> Figure:
    level = (view.part or "").partition("-")[0]
    data = {
        "part": view.part or "",
        "level": level,
        "image": view.image,
        "kind": kind,
        "units": _UNITS[view.units],
        "phrase": view.phrase or "",
        "language": view.language or "",
        "boxes": json.dumps(view.as_read),
    }
    return Figure(view, _cut(view.phrase or "", _MAX_PHRASE), draw_view(view), data, level)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
