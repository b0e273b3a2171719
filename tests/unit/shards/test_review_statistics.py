"""Numbers of a review: best IoU of box text, image sizes and their cost, counts in words."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from cogvlm_ft.grounding.targets import Target, Turn
from cogvlm_ft.shards.packing.candidates import Candidate
from cogvlm_ft.shards.reviewing.page import bars_of
from cogvlm_ft.shards.reviewing.photos import Photo
from cogvlm_ft.shards.reviewing.readings import Tally
from cogvlm_ft.shards.reviewing.small_targets import compare, count_box, count_photo, explain
from cogvlm_ft.shards.reviewing.sources import Place
from cogvlm_ft.shards.reviewing.statistics import (
    COUNT_EDGES,
    IMAGE_SIZES,
    best_iou,
    count_candidate,
    edge_labels,
    num_tokens,
    recommend,
    report_of,
)
from cogvlm_ft.shards.reviewing.suspects import Suspect, View, draw_fairly
from cogvlm_ft.shards.reviewing.text_rules import language_defect, said_count, turn_defects

PHOTO = Photo((1000, 500), b"")


def tally_of(*boxes: tuple[float, float, float, float], units: Any = "pixels") -> Tally:
    return count_candidate(Candidate("a.jpg", None, "", (Target("dog", "en", boxes),), units=units), PHOTO, None)


def test_tokens_of_a_photo() -> None:
    assert [num_tokens(size) for size in (224, 490, 756, 980)] == [258, 1227, 2918, 4902]


def test_best_iou() -> None:
    assert best_iou((0, 0, 1000, 500), (1000, 500)) == pytest.approx(0.998, abs=0.001)
    # one thousandth of each side, from edge to edge of its bin: read back it is the bins' centres, half a bin off
    assert best_iou((100, 50, 101, 50.5), (1000, 500)) == pytest.approx(0.25 / 1.75)


def test_best_iou_is_never_above_one_and_large_boxes_lose_little() -> None:
    for x in range(0, 900, 37):
        for side in (1, 3, 10, 50):
            iou = best_iou((x, x / 3, x + side, x / 3 + side), (1000, 500))
            assert 0 <= iou <= 1
            assert side < 50 or iou > 0.95


@pytest.mark.parametrize(
    ("side_px", "size", "enough"), [(70, 224, True), (40, 490, True), (20, 756, True), (15, 980, True), (5, 980, False)]
)
def test_recommended_size(side_px: float, size: int, enough: bool) -> None:
    """One patch is 14 px of the square picture: 62.5 px of 1000 at 224, 28.6 at 490, 18.5 at 756, 14.3 at 980."""
    found = recommend(tally_of((0, 0, side_px, 300)), 224)
    assert (found["image_size"], found["enough"]) == (size, enough)
    found = recommend(tally_of((0, 0, side_px, 300)))
    assert (found["image_size"], found["enough"]) == (max(size, 490), enough)  # never below that of the weights


def test_nine_of_ten_boxes_decide() -> None:
    large, small = [(0.0, 0.0, 500.0, 300.0)] * 9, [(0.0, 0.0, 20.0, 300.0)]
    assert recommend(tally_of(*large, *small), 224)["image_size"] == 224
    assert recommend(tally_of(*large[1:], *small * 2))["image_size"] == 756


def test_resolution_or_tiles() -> None:
    """In a photo of 4000 x 3000 px, 100 px are 0.9 patches at 490, 1.75 at 980, and 3.6 in tiles of 980 px."""
    tally: Tally = Counter({("photos",): 1, ("good boxes",): 10})
    count_photo(tally, (4000, 3000))
    for number in range(10):
        count_box(tally, (0, 0, 400 if number else 100, 100), (4000, 3000), IMAGE_SIZES)
    found = compare(tally, 490, IMAGE_SIZES)
    shares = {each["setting"]: (each["share"], each["tokens"]) for each in found["options"]}
    assert shares["model.image_size=490"] == (0, 1227) and shares["data.tiles.side_px=980"] == (1, 21 * 1227)
    assert shares["model.image_size=980"] == (0.9, 4902) and found["recommended"] == "model.image_size=980"
    assert not any("224" in setting for setting in shares), "not below the weights' own"
    small = compare(tally_of((0, 0, 300, 300)), 490, IMAGE_SIZES)
    assert small["recommended"] == "model.image_size=490" and explain(small, 490) == ""
    assert "if small targets matter: model.image_size=980" in explain(found, 490)
    assert "no setting" not in explain(found, 490)
    tiny = compare(tally_of(*[(0.0, 0.0, 3.0, 3.0)] * 3), 490, IMAGE_SIZES)
    assert not tiny["enough"] and "no setting gives 90% of the boxes 2 patches" in explain(tiny, 490)


def test_no_box_no_advice() -> None:
    assert recommend(Counter())["image_size"] is None
    report = report_of(Counter())
    assert report["best_iou"]["all"]["mean"] is None
    assert report["counts"]["photos"] == 0


def test_units_are_pixels_in_the_statistics() -> None:
    pixels = report_of(tally_of((100, 100, 200, 200)))
    assert report_of(tally_of((0.1, 0.2, 0.2, 0.4), units="unit")) == pixels
    assert report_of(tally_of((100, 200, 200, 400), units="thousandths")) == pixels
    assert pixels["box_side_px"]["64-128"] == 1


def test_sums_of_parts_are_the_whole() -> None:
    boxes = [(0.0, 0.0, 30.0, 300.0), (5.0, 5.0, 8.0, 8.0), (0.0, 0.0, 900.0, 400.0)]
    parts: Tally = Counter()
    for box in boxes:
        parts.update(tally_of(box))
    whole = report_of(tally_of(*boxes))
    for name in ("best_iou", "image_sizes", "box_side_px", "recommended"):
        assert report_of(parts)[name] == whole[name]
    found = whole["best_iou"]["all"]
    assert found["boxes"] == 3
    assert found["mean"] == pytest.approx(sum(best_iou(box, (1000, 500)) for box in boxes) / 3, abs=1e-3)
    assert found["percentile_5"] == pytest.approx(min(best_iou(box, (1000, 500)) for box in boxes), abs=1e-3)


def test_labels_of_counts() -> None:
    assert edge_labels(COUNT_EDGES) == ["0", "1", "2", "3", "4-5", "6-10", "11-20", ">=21"]
    assert edge_labels((8, 16)) == ["<8", "8-16", ">=16"]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Two brown dogs", 2),
        ("There are 12 cars on the road", 12),
        ("The photo shows three people", 3),
        ("图片中存在一只狗,所在区域为", 1),
        ("图中有3辆车", 3),
        ("两个人在走路", 2),
        ("十匹马", 10),
        ("a dog", None),
        ("two-story house", None),
        ("second dog", None),
        ("one of the dogs", None),
        ("three years old", None),
        ("5 o'clock", None),
        ("4k screen", None),
        ("一群羊", None),
        ("3个月大的狗", None),
        ("dogs, two of them", None),
    ],
)
def test_said_count(text: str, count: int | None) -> None:
    assert said_count(text) == count


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("the café's blue T-shirt", "en"),
        ("naïve 3000 µm", "en"),
        ("12-34", "en"),
        ("USB 接口", "zh"),
        ("红色的 T 恤", "zh"),
        ("A4 纸 (HP LaserJet)", "zh"),
        ("12", "zh"),
        ("Ω", "en"),
    ],
)
def test_no_false_alarm_about_languages(text: str, language: str) -> None:
    assert language_defect(text, language) is None


def test_good_turns() -> None:
    for answer in (
        "[[086,540,400,760]]",
        "图片中有2只狗[[086,540,400,760;000,000,998,997]]",
        "未找到指定目标",
        "yes, 2 of them",
    ):
        assert turn_defects(Turn("哪里有狗?", answer)) == []


def suspect(kind: str, number: int, num_views: int) -> Suspect:
    view = View("a.jpg", "", Place("", "a.jpg"))
    return Suspect(f"{kind}{number}", kind, "box", "", {}, (view,) * num_views)


def test_every_kind_gets_its_share_of_the_pictures() -> None:
    suspects = {"a": [suspect("a", i, 1) for i in range(50)], "b": [suspect("b", 0, 2)], "c": [suspect("c", 0, 0)]}
    chosen = draw_fairly(suspects, 5, 10)
    assert {kind: (len(found.pictured), len(found.listed)) for kind, found in chosen.items()} == {
        **{"a": (3, 9), "b": (1, 0), "c": (0, 1)},
    }
    assert draw_fairly({"a": list(reversed(suspects["a"]))}, 3, 9)["a"] == chosen["a"]


def test_bars_leave_out_empty_labels_at_both_ends() -> None:
    bars = bars_of({"<8": 0, "8-16": 2, "16-32": 0, ">=32": 6, ">=64": 0})
    assert [(bar.label, bar.count, bar.share) for bar in bars] == [
        ("8-16", 2, 0.25),
        ("16-32", 0, 0),
        (">=32", 6, 0.75),
    ]
    assert bars[0].length == pytest.approx(bars[2].length / 3) and bars[1].length == 0
    assert bars_of({}) == bars_of({"a": 0}) == []
