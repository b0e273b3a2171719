"""Which unit are the boxes of a source in? Decided over all of them, or asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from format_files import write_json, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st
from photo_builds import Build, image_bytes

from cogvlm_ft.errors import DataError
from cogvlm_ft.grounding.targets import Box, Target
from cogvlm_ft.shards.build import BuildSettings, build
from cogvlm_ft.shards.packing.box_units import BOX_UNITS, UnitSurvey, survey_units
from cogvlm_ft.shards.packing.candidates import Candidate, Problem, UnitBasis, Units, box_in_pixels
from cogvlm_ft.shards.packing.photo_headers import MAX_PHOTOS, PhotoHeaders
from cogvlm_ft.shards.review import annotated_items

SOURCE = Path("lines.jsonl")
SIZES = st.tuples(st.integers(120, 900), st.integers(120, 900)).filter(lambda size: abs(size[0] - size[1]) > 20)
LARGE = st.tuples(st.integers(1300, 4000), st.integers(1100, 3000))


def candidate(
    *boxes: Box, size: tuple[int, int] | None = (640, 480), units: Units = "pixels", basis: UnitBasis = "documented"
) -> Candidate:
    return Candidate("a.jpg", None, "s", (Target("dog", "en", boxes),), (), size, units, basis)


def decided(*candidates: Candidate, box_unit: str = "auto") -> Units:
    box_units = survey_units(candidates, Path("/nowhere")).decide(box_unit, SOURCE)
    return box_units.settle(candidates[0]).units


def in_units(box: Box, units: Units, size: tuple[int, int]) -> Box:
    """A box in pixels, written in a unit, as tools round it."""
    if units == "pixels":
        return box
    whole, places = (1, 5) if units == "unit" else (1000, 0)
    x0, y0, x1, y1 = (round(v * whole / side, places) for v, side in zip(box, (*size, *size), strict=True))
    return float(x0), float(y0), float(x1), float(y1)


@st.composite
def boxes_in(draw: st.DrawFn, size: tuple[int, int]) -> Box:
    x0, y0 = draw(st.integers(1, size[0] - 40)), draw(st.integers(1, size[1] - 40))
    x1, y1 = draw(st.integers(x0 + 20, size[0] - 1)), draw(st.integers(y0 + 20, size[1] - 1))
    return float(x0), float(y0), float(x1), float(y1)


@st.composite
def sources(draw: st.DrawFn, sizes: st.SearchStrategy[tuple[int, int]], units: Units) -> list[tuple[Any, Box, Box]]:
    """(size, box in pixels, box as written)."""
    found = []
    for size in draw(st.lists(sizes, min_size=1, max_size=12)):
        box = draw(boxes_in(size))
        found.append((size, box, in_units(box, units, size)))
    return found


@settings(max_examples=30)
@given(st.data(), st.sampled_from(list(BOX_UNITS.values())), st.sampled_from(["pixels", "thousandths"]))
def test_a_box_of_unknown_unit_is_right_or_asked_for(data: st.DataObject, units: Units, assumed: Units) -> None:
    """Whatever the unit is: never another place in silence."""
    written = data.draw(sources(SIZES | LARGE, units))
    candidates = [candidate(box, size=size, units=assumed, basis="unknown") for size, _, box in written]
    try:
        found = decided(*candidates)
    except DataError as error:
        assert "two units" in str(error) and f"--box-unit {option_of(units)}" in str(error)
        assert decided(*candidates, box_unit=option_of(units)) == units
        return
    for size, box, as_written in written:
        read = box_in_pixels(as_written, found, size)
        assert all(abs(a - b) <= side / 1000 + 0.01 for a, b, side in zip(read, box, (*size, *size), strict=True)), (
            f"{as_written} in {size} was read as {found}"
        )


def option_of(units: Units) -> str:
    return next(option for option, known in BOX_UNITS.items() if known == units)


@settings(max_examples=30)
@given(st.data())
def test_fractions_in_a_format_of_pixels_are_fractions(data: st.DataObject) -> None:
    written = data.draw(sources(SIZES | LARGE, "unit"))
    assert decided(*(candidate(box, size=size) for size, _, box in written)) == "unit"


@settings(max_examples=30)
@given(st.data())
def test_boxes_of_the_documented_unit_stay(data: st.DataObject) -> None:
    pixels = data.draw(sources(SIZES, "pixels"))
    assert decided(*(candidate(box, size=size) for size, _, box in pixels)) == "pixels"


@settings(max_examples=30)
@given(st.data())
def test_one_value_above_1000_is_enough(data: st.DataObject) -> None:
    size = (1600, 900)
    many = [candidate(data.draw(boxes_in((900, 700))), size=size, units="thousandths") for _ in range(5)]
    one = candidate((200, 100, data.draw(st.integers(1001, 1599)), 300), size=size, units="thousandths")
    place = data.draw(st.integers(0, 5))
    assert decided(*many[:place], one, *many[place:]) == "pixels"
    unknown = [replace(part, unit_basis="unknown") for part in (*many[:place], one, *many[place:])]
    assert decided(*unknown) == "pixels"


def corner_boxes(width: int, height: int) -> list[Box]:
    """Boxes from edge to edge of a field of numbers."""
    return [(1, 2, width / 3, height / 3), (width / 2, height / 2, width - 2, height - 1), (9, 9, 99, 80)]


@pytest.mark.parametrize(
    ("field", "size", "units"),
    [
        ((640, 480), (640, 480), "pixels"),
        ((1000, 1000), (640, 480), "thousandths"),
        ((1000, 1000), (3000, 2000), "thousandths"),
        ((3000, 2000), (3000, 2000), "pixels"),
    ],
)
def test_many_photos_tell_the_unit(field: tuple[int, int], size: tuple[int, int], units: Units) -> None:
    many = [candidate(*corner_boxes(*field), size=size, units="thousandths", basis="unknown") for _ in range(8)]
    assert decided(*many) == units


def test_a_corner_of_the_field_tells_nothing() -> None:
    """As of a fixed camera, whose object is always at the same place."""
    many = [candidate((400, 300, 630, 475), units="thousandths", basis="unknown") for _ in range(50)]
    with pytest.raises(DataError, match="the boxes fit two units"):
        decided(*many)


@pytest.mark.parametrize(
    ("units", "field", "size"),
    [
        ("pixels", (1000, 1000), (3000, 2000)),
        ("thousandths", (640, 480), (640, 480)),
        ("pixels", (990, 995), (640, 480)),
    ],
)
def test_a_documented_unit_that_the_boxes_speak_against_is_asked_for(
    units: Units, field: tuple[int, int], size: tuple[int, int]
) -> None:
    many = [candidate(*corner_boxes(*field), size=size, units=units) for _ in range(8)]
    with pytest.raises(
        DataError, match=r"two units.*--box-unit pixel or --box-unit thousandth|two units.*--box-unit th"
    ):
        decided(*many)
    assert decided(*many, box_unit="pixel") == "pixels" and decided(*many, box_unit="thousandth") == "thousandths"


def test_a_few_wrong_boxes_do_not_change_the_unit() -> None:
    good = [candidate((10, 20, 300, 400)) for _ in range(30)]
    assert decided(*good, candidate((10, 20, 700, 400))) == "pixels"
    assert decided(*good, candidate((0.1, 0.2, 0.3, 0.4))) == "pixels"
    assert decided(candidate((10, 20, 700, 400))) == "pixels"
    assert decided(candidate((20, 10, 3, 4))) == "pixels"


def test_a_few_boxes_outside_do_not_make_thousandths() -> None:
    """Nine photos in pixels and one slightly wrong box, as rounding leaves them."""
    inside = [candidate((10 + i, 20, 300, 400), units="thousandths", basis="unknown") for i in range(9)]
    outside = candidate((500, 300, 645, 470), units="thousandths", basis="unknown")
    with pytest.raises(DataError, match="two units: 9 of 10 boxes are inside their photos in pixels"):
        decided(*inside, outside)
    assert decided(*[outside] * 3) == "thousandths"


def test_no_unit_fits() -> None:
    with pytest.raises(DataError, match=r"no unit: .* one is above 1000: \(1, 2, 1700, 400\) of 'dog' \(s\)"):
        decided(candidate((1, 2, 1700, 400), units="thousandths"))


def test_the_message_has_both_readings() -> None:
    with pytest.raises(DataError) as error:
        decided(candidate((86, 54, 400, 376), units="thousandths", basis="unknown"))
    assert str(error.value) == (
        "lines.jsonl: the boxes fit two units: 1 of 1 boxes are inside their photos in pixels; no value is above 1000;"
        " 'dog' in a.jpg is (86, 54, 400, 376) px as pixels, (55.04, 25.92, 256, 180.48) px as thousandths;"
        " expected one unit for all boxes. Add --box-unit pixel or --box-unit thousandth."
    )


def test_whole_numbers_0_and_1_are_asked_for() -> None:
    with pytest.raises(DataError, match="--box-unit unit or --box-unit pixel"):
        decided(candidate((0, 0, 1, 1)))


def test_a_stated_unit_is_never_questioned() -> None:
    survey = UnitSurvey(PhotoHeaders(Path()))
    survey.add(candidate((0.1, 0.2, 0.3, 0.4), basis="stated"))
    assert survey.decide("auto", SOURCE).explanation == "" and survey.decide("auto", SOURCE).is_as_read
    assert survey.decide("pixel", SOURCE).is_as_read
    with pytest.raises(DataError, match="states that its boxes are pixels; expected that unit"):
        survey.decide("thousandth", SOURCE)


def test_the_size_comes_from_the_photo(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(image_bytes(640, 480))
    outside = candidate((600, 300, 900, 470), size=None, units="thousandths", basis="unknown")
    assert survey_units([outside], tmp_path).decide("auto", SOURCE).settle(outside).units == "thousandths"
    lost = replace(outside, image="missing.jpg")
    assert survey_units([lost] * (MAX_PHOTOS + 2), tmp_path).decide("auto", SOURCE).settle(lost) == lost


def lines(*boxes: list[float], name: str = "a.jpg") -> list[Any]:
    return [{"image": name, "targets": [{"phrase": "dog", "boxes": list(boxes)}]}]


def test_a_build_in_fractions_says_so(build_jsonl: Build) -> None:
    built = build_jsonl(lines([0.1, 0.2, 0.5, 0.6]))
    assert built["records"]["a"]["targets"][0]["boxes_xyxy"] == [[4, 6, 20, 18]]
    [note] = built["notes"]
    assert note["reason"] == "box_unit_inferred" and "fractions 0..1" in note["detail"]
    assert built["index"]["build"]["box_units"] == [["pixels", "documented", "unit"]]


def test_a_fraction_among_pixels_is_reported(build_jsonl: Build) -> None:
    built = build_jsonl(lines([10, 5, 30, 20], [0.1, 0.2, 0.5, 0.6]))
    assert [row["reason"] for row in built["rejected"]] == ["normalised_box"]
    assert built["records"]["a"]["targets"][0]["boxes_xyxy"] == [[10, 5, 30, 20]]


@pytest.mark.parametrize(("box_unit", "box"), [("pixel", [1, 2, 30, 20]), ("thousandth", [0.04, 0.06, 1.2, 0.6])])
def test_the_user_has_the_last_word(build_jsonl: Build, box_unit: str, box: list[float]) -> None:
    [found] = build_jsonl(lines([1, 2, 30, 20]), box_unit=box_unit)["records"]["a"]["targets"][0]["boxes_xyxy"]
    assert found == pytest.approx(box)


def test_the_unit_is_printed(photos: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", lines([1, 2, 30, 20]))
    text = build(BuildSettings("jsonl", photos, path, 0.0), tmp_path / "out", num_workers=1)
    assert text.startswith("box unit: pixels: 1 of 1 boxes are inside their photos in pixels; no value is above 1000\n")


def test_the_review_reads_as_the_build_does(photos: Path, tmp_path: Path) -> None:
    path = write_json(
        tmp_path / "c.json",
        {
            "images": [{"id": 1, "file_name": "a.jpg", "width": 40, "height": 30}],
            "categories": [{"id": 1, "name": "dog"}],
            "annotations": [{"image_id": 1, "category_id": 1, "bbox": [0.1, 0.2, 0.3, 0.4]}],
        },
    )
    *_, item = annotated_items("coco", path, photos)
    assert item.candidate.units == "unit"  # type: ignore[union-attr]
    *_, item = annotated_items("coco", path, photos, "pixel")
    assert item.candidate.units == "pixels"  # type: ignore[union-attr]


def test_the_review_reports_another_form_where_the_unit_is_stated(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "classes.txt").write_text("dog")
    (tmp_path / "labels" / "a.txt").write_text("0 0.3 0.1 0.5 0.5\n0 0.75 0.6 0.85 0.8\n0 0.2 0.3 0.25 0.4\n")
    for box_unit in ("auto", "pixel"):
        *_, problem = annotated_items("yolo", tmp_path / "labels", photos, box_unit)
        assert isinstance(problem, Problem) and problem.reason == "box_unit_unclear" and "centre" in problem.detail


def pair(label: str) -> dict[str, str]:
    return {"image": "a.jpg", "Prompt": "?", "Label": label}


@pytest.mark.parametrize("other", ["[[86,540,400,760]]", "[[1086, 540, 1400, 760]]"])
def test_box_text_in_pixels_condemns_that_of_three_digits(build_jsonl: Build, other: str) -> None:
    lines_of_pixels = [pair("狗[[540,640,700,760]]"), pair(f"猫{other}")]
    for box_unit in ("auto", "pixel"):
        with pytest.raises(DataError, match=r"could be pixels: none of 1 has a leading zero.*--box-unit thousandth"):
            build_jsonl(lines_of_pixels, box_unit=box_unit)
    told = build_jsonl(lines_of_pixels, box_unit="thousandth")
    assert len(told["records"]["a"]["turns"]) == 1
    assert [row["reason"] for row in told["rejected"]] == ["bad_box_text"]


def test_padded_box_text_beside_other_text_is_kept(build_jsonl: Build) -> None:
    lines_of_both = [pair("狗[[540,640,700,760]]"), pair("[[86,540,400,760]]"), pair("[[086,540,400,760]]")]
    built = build_jsonl(lines_of_both)
    assert len(built["records"]["a"]["turns"]) == 2
    assert [row["reason"] for row in built["rejected"]] == ["bad_box_text"]


_INSIDE: list[Box] = [(60, 10, 100, 50), (150, 60, 170, 80), (120, 20, 190, 90)]
_FORMS: dict[str, tuple[Any, str, Units]] = {
    "sizes as corners": (lambda a, b, c, d: (a, b, c - a, d - b), "corners", "pixels"),
    "corners as sizes": (lambda a, b, c, d: (a, b, a + c, b + d), "sizes", "pixels"),
    "corners as centres": (
        lambda a, b, c, d: ((a - c / 2) / 200, (b - d / 2) / 100, (a + c / 2) / 200, (b + d / 2) / 100),
        "centres",
        "unit",
    ),
    "upper left corners as centres": (
        lambda a, b, c, d: ((3 * a - c) / 400, (3 * b - d) / 200, (a + c) / 400, (b + d) / 200),
        "centres",
        "unit",
    ),
    "x and y exchanged": (lambda a, b, c, d: (b, a, d, c), "corners", "pixels"),
}
"""By what is written as what: from the right corners to those that a reader makes of it."""


@pytest.mark.parametrize("form", _FORMS)
def test_boxes_of_another_form_are_refused(form: str) -> None:
    """Most leave their photos and would be rejected, but the others would be wrong boxes in silence."""
    box_of, written_as, units = _FORMS[form]
    on_the_left: list[Box] = [(1, 1, 40, 30), (5, 70, 60, 95), (2, 50, 50, 99)]
    boxes = [*_INSIDE, *on_the_left] if form.startswith("upper") else _INSIDE
    basis: UnitBasis = "stated" if units == "unit" else "documented"
    wrong, right = (
        replace(candidate(*boxes, size=(200, 100), units=units, basis=basis), written_as=written_as)
        for boxes in ([box_of(*box) for box in boxes], [in_units(box, units, (200, 100)) for box in boxes])
    )
    with pytest.raises(DataError, match=f"the boxes seem to be .* of .* are not possible as {written_as}"):
        decided(wrong)
    assert decided(right) == units


@settings(max_examples=30)
@given(st.lists(LARGE, min_size=3, max_size=6), st.data())
def test_percent_is_no_pixel(sizes: list[tuple[int, int]], data: st.DataObject) -> None:
    starts = data.draw(st.lists(st.integers(15, 59), min_size=3, max_size=6, unique=True))
    boxes = [(float(x), 5.0, x + 40.0, 90.0) for x in starts]
    percent = [candidate(box, size=size) for box, size in zip(boxes, sizes, strict=False)]
    with pytest.raises(DataError, match="percent"):
        decided(*percent)
    assert decided(*percent, box_unit="pixel") == "pixels"
    others = [candidate(in_percent(box, size), size=size) for box, size in zip(boxes, sizes, strict=False)]
    assert decided(*others) == "pixels"
    logos = [candidate(boxes[0], size=size) for size in sizes]
    assert decided(*logos) == "pixels", "the same place in every photo says no more than one photo"


def in_percent(box: Box, size: tuple[int, int]) -> Box:
    """A box in percent of the photo, in pixels."""
    x0, y0, x1, y1 = (v * side / 100 for v, side in zip(box, (*size, *size), strict=True))
    return x0, y0, x1, y1
