"""Which way up were the boxes of a source drawn? Real photos, stored as cameras held in eight ways store them."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from cogvlm_ft.data.reader import ORIENTATION_TAG, decode_image
from cogvlm_ft.data.record import record_from_json, record_to_json
from cogvlm_ft.grounding.targets import Box, Target
from cogvlm_ft.shards.packing import photo_headers
from cogvlm_ft.shards.packing.candidates import Candidate
from cogvlm_ft.shards.packing.checks import check_candidate
from cogvlm_ft.shards.packing.exif import decide_exif
from cogvlm_ft.shards.packing.photo_headers import MAX_PHOTOS, PhotoHeaders
from cogvlm_ft.shards.packing.shrink import shrink_sample

PHOTOS = Path(__file__).resolve().parents[4] / "shared" / "data" / "voc_raccoon" / "images"
UNDO = dict(zip((2, 3, 4, 5, 6, 7, 8), (0, 3, 1, 5, 2, 6, 4), strict=True))  # EXIF orientation -> Image.Transpose

pytestmark = pytest.mark.skipif(not PHOTOS.is_dir(), reason="the real photos of ../shared/data are not there")


def save_held(name: str, orientation: int, folder: Path) -> tuple[str, tuple[int, int]]:
    """A real photo as a camera stores it that was held so: (file, upright size)."""
    with Image.open(PHOTOS / name) as photo:
        upright = photo.convert("RGB").reduce(4)
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(UNDO[orientation]))
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    file = f"{Path(name).stem}-{orientation}.jpg"
    stored.save(folder / file, exif=exif, quality=95)
    return file, upright.size


def candidate(image: str, *boxes: Box, size: tuple[int, int] | None = None, **fields: str) -> Candidate:
    return Candidate(image, None, "s", (Target("x", "en", boxes),), stated_size_px=size, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_photos_are_what_they_claim(tmp_path: Path, orientation: int) -> None:
    file, size = save_held("raccoon-1.jpg", orientation, tmp_path)
    image = decode_image((tmp_path / file).read_bytes(), "k", 10**7, upright=True)
    with Image.open(PHOTOS / "raccoon-1.jpg") as photo:
        expected = photo.convert("RGB").reduce(4)
    assert image.size == size and size[0] != size[1]
    small, wanted = (picture.resize((8, 8), Image.Resampling.BOX).tobytes() for picture in (image, expected))
    assert max(abs(a - b) for a, b in zip(small, wanted, strict=True)) <= 4


def test_boxes_that_fit_the_upright_photo_only_decide(tmp_path: Path) -> None:
    held = [save_held(f"raccoon-{n}.jpg", orientation, tmp_path) for n, orientation in ((1, 6), (2, 8), (3, 1), (4, 3))]
    candidates = [candidate(file, (1, 1, size[0] - 1, size[1] - 1)) for file, size in held]
    decision = decide_exif(candidates, PhotoHeaders(tmp_path), "auto")
    assert decision.apply
    assert decision.explanation == (
        "EXIF: 3 of 4 photos have an EXIF rotation: 2 fit only the upright photo, 0 the stored one;"
        " 0 state the size of the upright photo, 0 the stored one: photos are turned upright with their boxes"
    )


def test_boxes_that_fit_the_stored_photo_only_decide_against_a_stated_size(tmp_path: Path) -> None:
    held = [save_held(f"raccoon-{n}.jpg", 6, tmp_path) for n in (1, 2)]
    candidates = [candidate(file, (1, 1, size[1] - 1, size[0] - 1), size=size) for file, size in held]
    decision = decide_exif(candidates, PhotoHeaders(tmp_path), "auto")
    assert not decision.apply
    assert "0 fit only the upright photo, 2 the stored one; 2 state the size of the upright" in decision.explanation
    assert decision.explanation.endswith("taken as stored")


@pytest.mark.parametrize("upright", [True, False])
@pytest.mark.parametrize("units", ["pixels", "unit"])
def test_without_telling_boxes_the_stated_size_decides(tmp_path: Path, upright: bool, units: str) -> None:
    file, size = save_held("raccoon-1.jpg", 5, tmp_path)
    stated = size if upright else size[::-1]
    decision = decide_exif(
        [candidate(file, (0, 0, 0.5, 0.5), size=stated, units=units)], PhotoHeaders(tmp_path), "auto"
    )
    assert decision.apply == upright


def test_the_majority_wins(tmp_path: Path) -> None:
    held = [save_held(f"raccoon-{n}.jpg", 6, tmp_path) for n in (1, 2, 4)]
    assert all(size[0] > size[1] for _, size in held)
    swapped = candidate(held[0][0], (1, 1, held[0][1][1], held[0][1][0]))  # one of them has its axes swapped
    candidates = [swapped, *(candidate(file, (1, 1, *size)) for file, size in held[1:])]
    assert decide_exif(candidates, PhotoHeaders(tmp_path), "auto").apply


def test_when_nothing_tells_it_says_so(tmp_path: Path) -> None:
    file, _ = save_held("raccoon-1.jpg", 6, tmp_path)
    decision = decide_exif([candidate(file, (1, 1, 5, 5))], PhotoHeaders(tmp_path), "auto")
    assert decision.apply and "no evidence" in decision.explanation and "--exif ignore" in decision.explanation


def test_photos_without_a_turn(tmp_path: Path) -> None:
    file, size = save_held("raccoon-1.jpg", 1, tmp_path)
    decision = decide_exif([candidate(file, (1, 1, *size))] * 3, PhotoHeaders(tmp_path), "auto")
    assert decision.apply and decision.explanation.startswith("EXIF: 0 of 3 photos have an EXIF rotation")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("stated", ["upright", "stored", "nothing"])
def test_a_sample_is_made_of_the_upright_photo_and_its_untouched_bytes(
    tmp_path: Path, orientation: int, stated: str
) -> None:
    file, size = save_held("raccoon-1.jpg", orientation, tmp_path)
    stored = size if orientation < 5 else size[::-1]
    box = (1.0, 2.0, float(size[0]), size[1] / 2)
    annotation = candidate(file, box, size={"upright": size, "stored": stored}.get(stated))
    sample, problems = check_candidate(annotation, "k", tmp_path, 10**7, apply_exif=True)
    assert sample and not problems
    assert sample.image == (tmp_path / file).read_bytes()
    assert sample.record.image_size_px == size and sample.record.upright == (orientation != 1)
    assert sample.record.targets[0].boxes_xyxy == (box,)


def test_ignored_exif_data_leave_all_as_it_was(tmp_path: Path) -> None:
    file, size = save_held("raccoon-1.jpg", 6, tmp_path)
    sample, _ = check_candidate(candidate(file, (1, 2, 3, 4)), "k", tmp_path, 10**7)
    assert sample and sample.record.image_size_px == size[::-1] and not sample.record.upright
    sample, [problem] = check_candidate(candidate(file, (1, 2, 3, 4), size=size), "k", tmp_path, 10**7)
    assert sample is None and problem.reason == "size_mismatch"


def test_another_size_is_refused_in_either_case(tmp_path: Path) -> None:
    file, size = save_held("raccoon-1.jpg", 6, tmp_path)
    annotation = candidate(file, (1, 2, 3, 4), size=(size[0] * 2, size[1] * 2))
    sample, [problem] = check_candidate(annotation, "k", tmp_path, 10**7, apply_exif=True)
    assert sample is None and problem.reason == "size_mismatch"


def test_from_the_photo_to_the_reader(tmp_path: Path) -> None:
    """Turned, shrunken and drafted photos come back as people see them."""
    file, size = save_held("raccoon-1.jpg", 6, tmp_path)
    sample, _ = check_candidate(candidate(file, (1, 2, 30, 40)), "k", tmp_path, 10**7, apply_exif=True)
    assert sample
    for shard in (sample, shrink_sample(sample, 100)):
        record = record_from_json(record_to_json(shard.record), "k")
        image = decode_image(shard.image, "k", 10**7, upright=record.upright)
        assert (
            image.size == record.image_size_px == (size if shard is sample else (100, round(100 * size[1] / size[0])))
        )


def test_images_that_cannot_be_read_are_passed_over(tmp_path: Path) -> None:
    file, size = save_held("raccoon-1.jpg", 6, tmp_path)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    names = ["missing.jpg", "../../etc/passwd", "broken.jpg", "x.txt", "a\0b.jpg"]
    candidates = [candidate(name, (1, 1, 2, 2)) for name in names] + [candidate(file, (1, 1, *size))]
    decision = decide_exif(candidates, PhotoHeaders(tmp_path), "auto")
    assert decision.apply and decision.explanation.startswith("EXIF: 1 of 2 photos")


def test_no_more_than_a_sample_is_looked_at(tmp_path: Path) -> None:
    decision = decide_exif((candidate("missing.jpg") for _ in iter(int, 1)), PhotoHeaders(tmp_path), "auto")  # endless
    assert decision.apply and MAX_PHOTOS < 10_000


@pytest.mark.parametrize(("mode", "apply"), [("apply", True), ("ignore", False)])
def test_the_user_has_the_last_word(tmp_path: Path, mode: str, apply: bool) -> None:
    decision = decide_exif(iter(()), PhotoHeaders(tmp_path), mode)
    assert decision.apply == apply and f"--exif {mode}" in decision.explanation


def test_a_picture_without_exif_data_is_no_turned_photo(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 5)).save(buffer, "PNG")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    assert "0 of 1 photos" in decide_exif([candidate("a.png")], PhotoHeaders(tmp_path), "auto").explanation


def test_a_header_is_read_from_the_beginning_of_a_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, upright = save_held("raccoon-1.jpg", 6, tmp_path)
    with (tmp_path / file).open("ab") as photo:
        photo.write(bytes(2**18))
    large = Image.new("RGB", (400, 300))
    large.frombytes(bytes(range(250)) * 1440)
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = 8
    large.save(tmp_path / "late.jpg", exif=exif, comment=b"-" * 60_000 + b"\0", icc_profile=b"p" * 90_000)
    large.save(tmp_path / "whole.webp", exif=exif, quality=100, lossless=True)
    (tmp_path / "none.jpg").write_bytes(b"\xff\xd8\xff" + bytes(2**17))
    lengths = []
    read = photo_headers.read_image
    monkeypatch.setattr(
        photo_headers,
        "read_image",
        lambda *given, **options: lengths.append(options.get("num_first")) or read(*given, **options),
    )
    headers = PhotoHeaders(tmp_path)
    assert headers.read(candidate(file)) == headers.read(candidate(file)) == (upright[::-1], 6)
    assert lengths == [2**16]
    assert headers.read(candidate("late.jpg")) == ((400, 300), 8) and lengths[1:] == [2**16, None]
    assert headers.read(candidate("whole.webp")) == ((400, 300), 8)
    assert headers.read(candidate("none.jpg")) == (None, 1) and headers.read(candidate("missing.jpg")) is None
