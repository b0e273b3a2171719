"""The page of a review: one HTML file that needs nothing else, in two languages."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cogvlm_ft.html_page import load_page
from cogvlm_ft.shards.reviewing.pictures import Picture, draw_view
from cogvlm_ft.shards.reviewing.settings import EXAMPLE_AUGMENT, ReviewSettings
from cogvlm_ft.shards.reviewing.shots import Shot, Words, draw_shot
from cogvlm_ft.shards.reviewing.survey import Survey
from cogvlm_ft.shards.reviewing.suspect_texts import NOTE, texts_of, title_of
from cogvlm_ft.shards.reviewing.suspects import Suspect, View
from cogvlm_ft.shards.reviewing.training_view import augment_words, see_photos

_UNITS = {"pixels": "px", "unit": "0..1", "thousandths": "0..1000"}
_MAX_DETAIL, _MAX_PHRASE, _MAX_FREQUENT_PHRASE = 600, 200, 60  # characters
_BAR_LENGTH = 140
_CARDS_AT_ONCE = 40
_GALLERY_TITLES: dict[str, Words] = {
    "random": ("At random", "随机"),
    "crowded": ("Most boxes", "框最多"),
    "smallest": ("Smallest boxes", "最小的框"),
    "largest": ("Largest boxes", "最大的框"),
}
_NOUNS: dict[str, tuple[str, str, str]] = {
    "sample": ("image", "images", "张图片"),
    "target": ("target", "targets", "个目标"),
    "box": ("box", "boxes", "个框"),
    "turn": ("turn", "turns", "个对话轮"),
}
_OTHER_NOUN = ("part", "parts", "处")
_COPIES = ("same_photo", "train_and_val")


@dataclass(frozen=True)
class Bar:
    """length: in units of the drawing. share: of all counts."""

    label: str
    length: float
    count: int
    share: float


@dataclass(frozen=True)
class Figure:
    """An image of a suspect. data: values for the script, by attribute. level: to what a decision applies."""

    view: View
    phrase: str
    picture: Picture | None
    data: dict[str, str]
    level: str


@dataclass(frozen=True)
class Card:
    """A suspect. listed: shown without pictures, because there are too many."""

    detail: Words
    source: str
    figures: list[Figure]
    listed: bool


@dataclass(frozen=True)
class Bulk:
    """A decision about all suspects of a kind. parts: base64 by level; num_left_out: not on the page."""

    parts: str
    drop: Words
    keep: Words
    num_left_out: int


@dataclass(frozen=True)
class Section:
    """Suspects of one kind. count: all of them, of which `pages` show `num_shown`, a few at once."""

    kind: str
    title: Words
    advice: Words
    count: int
    num_shown: int
    num_pictured: int
    pages: list[list[Card]]
    bulk: Bulk | None

    @property
    def is_note(self) -> bool:
        """Return whether the kind is a note, which means that no data is lost."""
        return self.kind.startswith(NOTE)


@dataclass(frozen=True)
class GalleryTab:
    """A gallery of photos."""

    name: str
    title: Words
    shots: list[Shot]


def render_page(survey: Survey, source: str, settings: ReviewSettings) -> str:
    """Return the whole page. All that comes from the data is escaped, and the page's policy lets nothing else run.

    source: what was reviewed, as the user named it.
    """
    report = survey.report
    frequent = [(_cut(phrase, _MAX_FREQUENT_PHRASE), count) for phrase, count in report["phrases"]["most_frequent"]]
    return load_page(Path(__file__).parent).render_file(
        report=report,
        source=source,
        memory=sha256(source.encode("utf-8", "surrogatepass")).hexdigest()[:16],
        frequent_phrases=frequent,
        charts=_charts_of(report),
        galleries=_galleries_of(survey, settings) if settings.max_pictures else [],
        seen=see_photos(survey.galleries["random"], settings) if settings.max_pictures else [],
        settings=settings,
        augment=augment_words(settings.augment or EXAMPLE_AUGMENT),
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


def _galleries_of(survey: Survey, settings: ReviewSettings) -> list[GalleryTab]:
    tabs = []
    for name, items in survey.galleries.items():
        shots = [draw_shot(item, name, settings.image_size) for item in items]
        tabs.append(GalleryTab(name, _GALLERY_TITLES[name], [shot for shot in shots if shot]))
    return [tab for tab in tabs if tab.shots]


def _sections_of(survey: Survey) -> list[Section]:
    sections = []
    with tqdm(total=sum(len(chosen.pictured) for chosen in survey.shown.values()), unit="", desc="images") as progress:
        for kind, count in survey.report["suspects"].items():
            chosen = survey.shown[kind]
            cards = []
            for suspect in chosen.pictured:
                cards.append(_card(suspect, listed=False))
                progress.update()
            cards += [_card(suspect, listed=True) for suspect in chosen.listed]
            advice = texts_of(kind).advice
            sections.append(
                Section(
                    kind=kind,
                    title=(title_of(kind, "en"), title_of(kind, "zh")),
                    advice=(advice["en"], advice["zh"]),
                    count=count,
                    num_shown=len(cards),
                    num_pictured=len(chosen.pictured),
                    pages=[cards[i : i + _CARDS_AT_ONCE] for i in range(0, len(cards), _CARDS_AT_ONCE)],
                    bulk=_bulk_of(kind, survey),
                )
            )
    return sections


def _bulk_of(kind: str, survey: Survey) -> Bulk | None:
    """Describe the decision about all suspects of a kind; None if there is nothing to decide."""
    by_level = {level: _distinct(digests) for level, digests in survey.parts.get(kind, {}).items()}
    count = sum(map(len, by_level.values()))
    if not count:
        return None
    noun = _NOUNS.get(next(iter(by_level)), _OTHER_NOUN) if len(by_level) == 1 else _OTHER_NOUN
    english = f"{count:,} {noun[0] if count == 1 else noun[1]}"
    drop = (f"Drop all ({english})", f"全部去掉（{count:,} {noun[2]}）")
    if kind in _COPIES:
        drop = (f"Drop all copies ({english})", f"去掉所有副本（{count:,} {noun[2]}）")
    parts = " ".join(f"{level}:{base64.b64encode(b''.join(found)).decode()}" for level, found in by_level.items())
    return Bulk(parts, drop, ("Keep all", "全部保留"), survey.num_parts_left_out[kind])


def _distinct(digests: bytearray) -> list[bytes]:
    return list(dict.fromkeys(bytes(digests[i : i + 8]) for i in range(0, len(digests), 8)))


def _card(suspect: Suspect, *, listed: bool) -> Card:
    detail = (_cut(suspect.detail("en"), _MAX_DETAIL), _cut(suspect.detail("zh"), _MAX_DETAIL))
    figures = [_figure(view, suspect, listed=listed) for view in suspect.views]
    return Card(detail, "" if figures else suspect.source, figures, listed)


def _figure(view: View, suspect: Suspect, *, listed: bool) -> Figure:
    level = (view.part or "").partition("-")[0]
    data = {
        "part": view.part or "",
        "level": level,
        "image": view.image,
        "kind": suspect.kind,
        "bulk": "yes" if view.part in suspect.parts else "",
        "units": _UNITS[view.units],
        "phrase": view.phrase or "",
        "language": view.language or "",
        "boxes": json.dumps(view.as_read),
    }
    return Figure(view, _cut(view.phrase or "", _MAX_PHRASE), None if listed else draw_view(view), data, level)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
