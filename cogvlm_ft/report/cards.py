"""Cards of the report: an image with its boxes and a description."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from cogvlm_ft.data.stored_photo import whole_image
from cogvlm_ft.evaluate.results import Gallery
from cogvlm_ft.grounding.metrics import ABSENT, HIT
from cogvlm_ft.grounding.overlap import pairwise_iou
from cogvlm_ft.grounding.prediction import Prediction, score_of
from cogvlm_ft.html_page import both
from cogvlm_ft.report.labels import GALLERY_GROUPS, Words
from cogvlm_ft.report.thumbnails import DrawnBox, Photos, Thumbnails
from cogvlm_ft.tracking.sample_losses import HighLoss

_GALLERY_BYTES, _SUSPECTS_BYTES = 2_500_000, 1_000_000
"""Maximum bytes of pictures. They are nearly all of the page, which stays below 5 MB for phones and mail."""


@dataclass(frozen=True)
class AnswerCard:
    """An answer. number: of its turn. verdict: the score in words; remarks: what else is known of the answer."""

    key: str
    number: int
    picture: Markup
    question: str
    answer: str
    truth: str
    is_right: bool
    verdict: Markup
    remarks: list[Markup]


@dataclass(frozen=True)
class AnswerGroup:
    """Answers of one kind, such as the worst ones."""

    name: str
    title: Words
    cards: list[AnswerCard]


@dataclass(frozen=True)
class SuspectCard:
    """A training sample whose loss stays high."""

    key: str
    picture: Markup
    targets: str
    ratio: float
    losses: str


def gallery_cards(gallery: Gallery, photos: Photos, has_former: bool) -> tuple[list[AnswerGroup], int]:
    """Draw the answers of a gallery, and count the pictures without room. Without a former one there are no changes."""
    groups: dict[str, list[Prediction]] = {name: getattr(gallery, name) for name in GALLERY_GROUPS}
    thumbnails = Thumbnails(_GALLERY_BYTES)
    photos.look_up(each.key for answers in groups.values() for each in answers)
    drawn = [
        AnswerGroup(name, GALLERY_GROUPS[name], [_answer_card(each, photos, thumbnails) for each in answers])
        for name, answers in groups.items()
        if answers or has_former or not name.startswith("newly")
    ]
    return drawn, thumbnails.num_left_out


def suspect_cards(high_losses: Sequence[HighLoss], photos: Photos) -> tuple[list[SuspectCard], int]:
    """Draw the training samples whose loss stays high, and count the pictures without room."""
    photos.look_up(high.key for high in high_losses)
    thumbnails = Thumbnails(_SUSPECTS_BYTES)
    cards = [_suspect_card(high, photos, thumbnails) for high in high_losses]
    return cards, thumbnails.num_left_out


def _answer_card(each: Prediction, photos: Photos, thumbnails: Thumbnails) -> AnswerCard:
    size = (int(each.image_size_px[0]), int(each.image_size_px[1]))
    score = score_of(each) or 0.0
    return AnswerCard(
        key=each.key,
        number=each.turn,
        picture=thumbnails.draw(photos.image(each.key), size, list(_boxes(each)), each.prompt),
        question=each.prompt,
        answer=each.answer,
        truth=each.truth,
        is_right=score >= HIT,
        verdict=_verdict(each, score),
        remarks=list(_remarks(each)),
    )


def _boxes(each: Prediction) -> Iterator[DrawnBox]:
    """Yield the true boxes with the phrase, then the answered ones with their IoU, in the colour of the turn."""
    truth, answered = each.truth_boxes_xyxy or [], each.boxes_xyxy or []
    for box in truth:
        yield DrawnBox(box, "truth", each.turn, each.phrase)
    overlaps = pairwise_iou(answered, truth).max(axis=1) if answered and truth else None
    for place, box in enumerate(answered):
        yield DrawnBox(box, "answer", each.turn, each.phrase if overlaps is None else f"IoU {overlaps[place]:.2f}")


def _verdict(each: Prediction, score: float) -> Markup:
    if each.score is None or each.score.kind != ABSENT:
        return Markup.escape(f"IoU {score:.2f}")
    if score:
        return both("absent, correctly reported", "目标不存在，回答正确")
    return both("false detection: the object is absent", "误检：目标不存在")


def _remarks(each: Prediction) -> Iterable[Markup]:
    if each.score is not None and not each.score.readable:
        yield both("unreadable", "无法解析")
    if each.confidences:
        shown = ", ".join(f"{100 * confidence:.0f} %" for confidence in each.confidences[:4])
        yield both(f"box confidence {shown}", f"框置信度 {shown}")
    if each.not_found_prob is not None and each.not_found_prob >= 0.005:
        shown = f"{100 * each.not_found_prob:.0f} %"
        yield both(f"“not found” probability {shown}", f"“未找到”概率 {shown}")


def _suspect_card(high: HighLoss, photos: Photos, thumbnails: Thumbnails) -> SuspectCard:
    sample = photos.sample(high.key)
    picture: Markup = Markup()
    targets: list[str] = []
    if sample is not None:
        named = enumerate(sample.record.targets)
        boxes = [DrawnBox(box, "truth", n, target.phrase) for n, target in named for box in target.boxes_xyxy]
        targets = [f"{target.phrase} ({len(target.boxes_xyxy)})" for target in sample.record.targets]
        targets += [f"{turn.prompt} → {turn.answer}" for turn in sample.record.turns]
        size = sample.record.image_size_px or sample.image.size  # a training image may be decoded smaller
        picture = thumbnails.draw(whole_image(sample.image), size, boxes, high.key)
    losses = ", ".join(f"{loss:.2f}" for _, loss in high.per_token)
    return SuspectCard(high.key, picture, "; ".join(targets), high.ratio, losses)
