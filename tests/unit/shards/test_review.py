"""A review finds every flaw that was put into good data, and none that was not."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from photo_builds import image_bytes
from PIL import Image

from cogvlm_ft.errors import DataError
from cogvlm_ft.grounding.targets import Target
from cogvlm_ft.shards.build import BuildSettings, build
from cogvlm_ft.shards.formats import FORMATS
from cogvlm_ft.shards.packing.candidates import Candidate
from cogvlm_ft.shards.packing.decisions import load_decisions
from cogvlm_ft.shards.review import main, review, summarize
from cogvlm_ft.shards.reviewing import photos as photo_files
from cogvlm_ft.shards.reviewing.settings import ReviewSettings
from cogvlm_ft.shards.reviewing.sources import Item, Place, annotated_items, shard_items

DATA = Path(__file__).parents[3].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the real data sets are not in {DATA}")

GOOD = [[4, 3, 30, 25]]


class Reviewed:
    """What a review wrote."""

    def __init__(self, out: Path) -> None:
        self.page = (out / "review.html").read_text(encoding="utf-8")
        self.report = json.loads((out / "review.json").read_bytes())
        self.suspects = [json.loads(line) for line in (out / "suspects.jsonl").read_bytes().splitlines()]

    def kinds(self) -> dict[str, int]:
        assert Counter(suspect["kind"] for suspect in self.suspects) == self.report["suspects"]
        return self.report["suspects"]


def review_lines(lines: list[Any], photos: Path, out: Path, **settings: Any) -> Reviewed:
    out.mkdir(exist_ok=True)
    annotations = out / "lines.jsonl"
    annotations.write_text("\n".join(json.dumps(line) for line in lines))
    review(annotated_items("jsonl", annotations, photos), "lines.jsonl", out, ReviewSettings(**settings))
    return Reviewed(out)


def line(image: str, *targets: tuple[Any, ...], **more: Any) -> dict[str, Any]:
    names = ("phrase", "boxes", "language", "description")
    return {"image": image, "targets": [dict(zip(names, target, strict=False)) for target in targets], **more}


def turn(answer: str) -> dict[str, Any]:
    return {"image": "a.jpg", "turns": [{"prompt": "Where is it?", "answer": answer}]}


def turned_photo(photos: Path, orientation: int, name: str = "turned.jpg") -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.open(io.BytesIO(image_bytes(40, 30))).save(photos / name, exif=exif)


def test_boxes_of_a_photo_that_only_tiles_take_count(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its boxes decide whether tiles are recommended; it is reported, because a build without tiles rejects it."""
    Image.new("RGB", (2400, 1600), (9, 9, 9)).save(photos / "large.png", compress_level=0)
    Image.new("RGB", (2400, 1600)).save(photos / "scans.jpg", progressive=True)
    monkeypatch.setattr(photo_files, "MAX_PIXELS", 10**6)
    lines = [line(name, ("dog", [[100, 100, 130, 130]])) for name in ("large.png", "scans.jpg")]
    found = review_lines(lines, photos, tmp_path / "out", num_workers=1)
    assert found.report["counts"]["photos"] == 1 and found.report["small_targets"]["recommended"] == (
        "data.tiles.side_px=490"
    )
    assert found.kinds()["too_many_pixels"] == 2
    texts = [str(each) for each in found.suspects if each["kind"] == "too_many_pixels"]
    assert "Build with --tiles" in texts[0] and "Save it as a baseline JPEG" in texts[1]


def test_nothing_suspicious_in_good_lines(photos: Path, tmp_path: Path) -> None:
    lines = [
        line("a.jpg", ("dog", GOOD), ("猫", [])),
        line("b.jpg", ("dog", GOOD, None, "one dog")),
        turn("[[100,100,500,600]]"),
    ]
    lines[2]["image"] = "c.jpg"
    found = review_lines(lines, photos, tmp_path / "out")
    assert found.suspects == []
    assert "Nothing suspicious" in found.page
    assert found.report["counts"] == {
        **{"samples": 3, "photos": 3, "targets": 3, "absent": 1},
        **{"described": 1, "boxes": 2, "good_boxes": 2, "turns": 1},
    }
    assert found.report["languages"] == {"en": 2, "zh": 1}
    assert found.report["phrases"] == {"different": 2, "only_once": 1, "most_frequent": [["dog", 2], ["猫", 1]]}


FLAWS: dict[str, tuple[dict[str, Any], str, str]] = {
    "outside": (line("a.jpg", ("dog", [[4, 3, 60, 25]])), "box_outside_image", "by 20 px"),
    "inverted": (line("a.jpg", ("dog", [[30, 3, 4, 25]])), "inverted_box", "second corner before"),
    "xywh": (line("a.jpg", ("dog", [[30, 3, 9, 25]])), "inverted_box", "would fit as x,y,w,h"),
    "swapped": (line("a.jpg", ("dog", [[1, 2, 29, 39]])), "box_outside_image", "y0,x0,y1,x1"),
    "zero area": (line("a.jpg", ("dog", [[4, 3, 4, 25]])), "zero_area", "no area"),
    "normalised": (line("a.jpg", ("dog", [[0.1, 0.1, 0.6, 0.7]])), "below_one_pixel", "x0,y0,x1,y1, 0..1"),
    "thousandths": (line("a.jpg", ("dog", [[100, 100, 600, 700]])), "box_outside_image", "0..1000"),
    "small": (line("a.jpg", ("dog", [[4, 3, 5, 25]])), "under_one_patch", "0.88 patches at 490 px"),
    "same phrase": (line("a.jpg", ("dog", GOOD), ("dog ", [[5, 5, 9, 9]])), "same_phrase", "asked twice"),
    "absent too": (line("a.jpg", ("dog", GOOD), ("dog", [])), "same_phrase", "and []"),
    "no Chinese": (line("a.jpg", ("dog", GOOD, "zh")), "wrong_language", "no Chinese character"),
    "no English": (line("a.jpg", ("狗", GOOD, "en")), "wrong_language", "has Chinese characters"),
    "Japanese": (line("a.jpg", ("いぬがいます", GOOD)), "wrong_language", "neither"),
    "Cyrillic": (line("a.jpg", ("собака", GOOD)), "wrong_language", "neither"),
    "mixed": (line("a.jpg", ("狗 dog and a small cat", GOOD)), "wrong_language", "English words"),
    "count": (line("a.jpg", ("dog", GOOD, None, "Two dogs on grass")), "count_mismatch", "states 2, but there are 1"),
    "Chinese count": (line("a.jpg", ("狗", GOOD, None, "图片中有3只狗")), "count_mismatch", "states 3"),
    "answer count": (turn("There are 3 dogs: [[100,100,500,600]]"), "count_mismatch", "states 3"),
    "asterisks": (turn("**[[100,100,500,600]]**"), "note.box_text_normalised", "*"),
    "blanks": (turn("[[100, 100, 500, 600]]"), "note.box_text_normalised", "[[100, 100, 500, 600]]"),
    "brackets": (line("a.jpg", ("dog [[1]]", GOOD)), "bad_box_text", "double brackets"),
    "nothing": (line("a.jpg"), "no_targets", ""),
    "no photo": (line("z.jpg", ("dog", GOOD)), "missing_image", "z.jpg"),
    "outside folder": (line("../z.jpg", ("dog", GOOD)), "path_outside_images", "leads out"),
    "a reader's": (line("a.jpg", ("dog", [[1, 2, 3], *GOOD])), "wrong_number_of_coordinates", "[1, 2, 3]"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FLAWS)
def test_one_flaw_is_one_suspect(name: str, photos: Path, tmp_path: Path) -> None:
    flawed, kind, words = FLAWS[name]
    good = [line(f"{photo}.jpg", ("dog", GOOD)) for photo in "bc"]
    found = review_lines([flawed, *good], photos, tmp_path / "out")
    assert found.kinds() == {kind: 1}
    (suspect,) = found.suspects
    assert words in suspect["detail"]
    assert suspect["photos"][0]["image"] == flawed["image"]
    assert f'data-kind="{kind}"' in found.page
    of_suspects = found.page[found.page.index('<h2 id="suspects">') :]
    assert ("data:image/jpeg" in of_suspects) == (kind not in ("missing_image", "path_outside_images"))


def test_a_lost_line_is_a_suspect_without_photo(photos: Path, tmp_path: Path) -> None:
    found = review_lines(["garbage", line("a.jpg", ("dog", GOOD))], photos, tmp_path / "out")
    assert [suspect["photos"] for suspect in found.suspects] == [[]]


def test_identical_photos(photos: Path, tmp_path: Path) -> None:
    (photos / "z.jpg").write_bytes((photos / "a.jpg").read_bytes())
    lines = [line("a.jpg", ("dog", GOOD)), line("b.jpg", ("dog", GOOD)), line("z.jpg", ("dog", [[4, 3, 30, 14]]))]
    found = review_lines(lines, photos, tmp_path / "out")
    assert found.kinds() == {"same_photo": 1}
    assert "a.jpg, z.jpg. Their boxes differ (IoU 0.50)" in found.suspects[0]["detail"]
    assert len({photo["part"] for photo in found.suspects[0]["photos"]}) == 2


def test_one_photo_in_two_lines_is_no_copy_but_must_not_contradict_itself(photos: Path, tmp_path: Path) -> None:
    lines = [line("a.jpg", ("dog", GOOD), key="one"), line("a.jpg", ("cat", GOOD), key="two")]
    assert review_lines(lines, photos, tmp_path / "good").suspects == []
    lines.append(line("a.jpg", ("dog", [[0, 0, 9, 9]]), key="three"))
    assert review_lines(lines, photos, tmp_path / "bad").kinds() == {"same_phrase": 1}


@pytest.mark.parametrize(
    ("orientation", "box", "kinds"),
    [
        (6, [2, 2, 28, 38], {"exif_rotated": 1}),  # the stored photo is 40 x 30
        (6, [2, 2, 38, 28], {}),
        (6, [2, 2, 28, 28], {"exif_unclear": 1}),
        (3, [2, 2, 38, 28], {"exif_unclear": 1}),
        (1, [2, 2, 38, 28], {}),
    ],
)
def test_exif(orientation: int, box: list[float], kinds: dict[str, int], photos: Path, tmp_path: Path) -> None:
    turned_photo(photos, orientation)
    assert review_lines([line("turned.jpg", ("dog", [box]))], photos, tmp_path / "out").kinds() == kinds


@pytest.mark.parametrize(
    ("size", "kinds"), [((30, 40), {"exif_rotated": 1}), ((40, 30), {}), ((80, 60), {"size_mismatch": 1})]
)
def test_stated_size(size: tuple[int, int], kinds: dict[str, int], photos: Path, tmp_path: Path) -> None:
    turned_photo(photos, 6)
    out = tmp_path / "out"
    out.mkdir()
    content = {
        "images": [{"id": 1, "file_name": "turned.jpg", "width": size[0], "height": size[1]}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [2, 2, 20, 20]}],
        "categories": [{"id": 1, "name": "dog"}],
    }
    (out / "instances.json").write_text(json.dumps(content))
    review(annotated_items("coco", out / "instances.json", photos), "instances.json", out)
    assert Reviewed(out).kinds() == kinds


@pytest.mark.slow
@pytest.mark.parametrize(("upright", "kinds"), [(True, {}), (False, {"exif_rotated": 1})])
def test_shards_say_which_way_up_their_boxes_are(
    upright: bool, kinds: dict[str, int], photos: Path, tmp_path: Path
) -> None:
    turned_photo(photos, 6)
    target = Target("dog", "en", ((2.0, 2.0, 28.0, 38.0),))
    place = Place(str(photos), "turned.jpg")
    review(iter([Item(Candidate("turned.jpg", "k", "", (target,)), place, "train", upright)]), "shards", tmp_path)
    found = Reviewed(tmp_path)
    assert found.kinds() == kinds
    assert found.report["counts"]["good_boxes"] == 1
    target = Target("dog", "en", ((2.0, 2.0, 28.0, 28.0),))
    review(iter([Item(Candidate("turned.jpg", "k", "", (target,)), place, "train", upright)]), "shards", tmp_path)
    assert Reviewed(tmp_path).kinds() == {}


def test_photo_in_train_and_val(photos: Path, tmp_path: Path) -> None:
    (photos / "z.jpg").write_bytes((photos / "a.jpg").read_bytes())
    shards = tmp_path / "shards"
    shards.mkdir()
    for name, split in (("a", "train"), ("z", "val")):  # one build would keep them together
        annotations = tmp_path / f"{split}.jsonl"
        annotations.write_text(json.dumps(line(f"{name}.jpg", ("dog", GOOD))))
        build(BuildSettings("jsonl", photos, annotations, split=split), tmp_path / split, num_workers=1)
        for file in (tmp_path / split).glob(f"{split}-*"):
            file.rename(shards / file.name)
    out = tmp_path / "out"
    review(shard_items(shards), "shards", out)
    found = Reviewed(out)
    assert found.kinds() == {"train_and_val": 1}
    assert found.report["splits"] == {"train": 1, "val": 1}
    assert "boxes are the same" in found.suspects[0]["detail"]


def test_shards_have_the_ids_of_their_source(photos: Path, tmp_path: Path) -> None:
    lines = [line("a.jpg", ("dog", [[4, 3, 5, 25]]), ("cat", GOOD, "zh")), line("b.jpg", ("dog", GOOD))]
    from_source = review_lines(lines, photos, tmp_path / "source")
    shards = tmp_path / "shards"
    annotations = tmp_path / "source" / "lines.jsonl"
    build(BuildSettings("jsonl", photos, annotations, val_fraction=0.0), shards, num_workers=1)
    review(shard_items(shards), "shards", tmp_path / "out")
    from_shards = Reviewed(tmp_path / "out")
    assert {suspect["id"] for suspect in from_source.suspects} == {suspect["id"] for suspect in from_shards.suspects}
    assert from_source.kinds() == {"under_one_patch": 1, "wrong_language": 1}


def test_decisions_by_the_ids_of_a_review_empty_it(photos: Path, tmp_path: Path) -> None:
    lines = [line("a.jpg", ("dog", [[4, 3, 60, 25], *GOOD]), ("cat", GOOD, "zh")), line("b.jpg", ("dog", GOOD))]
    found = review_lines(lines, photos, tmp_path / "first")
    rows = [{"id": suspect["id"], "decision": "drop"} for suspect in found.suspects]
    path = tmp_path / "review_decisions.json"
    path.write_text(json.dumps({"decisions": rows}))
    decisions = load_decisions(path)
    parts = FORMATS["jsonl"].read(tmp_path / "first" / "lines.jsonl", photos)
    kept = [decisions.apply(part)[0] for part in parts]  # type: ignore[arg-type]
    assert [[(target.phrase, len(target.boxes_xyxy)) for target in part.targets] for part in kept if part] == [
        [("dog", 1)],
        [("dog", 1)],
    ]
    assert decisions.unmet() == []


def test_the_page_is_safe_and_needs_nothing_else(photos: Path, tmp_path: Path) -> None:
    evil = '"><script>alert(1)</script><img src=http://x.test/>{{style}}'
    lines = [line("a.jpg", (evil, [[4, 3, 60, 25], *GOOD]), (evil, GOOD)), turn(f"[[1, 2]] {evil}")]
    page = review_lines(lines, photos, tmp_path / "out").page
    assert page.count("<script") == page.count("</script>") == 1
    assert "&lt;script&gt;alert(1)" in page
    assert "{{style}}" in page
    assert not re.search(r'(?:src|href)="(?!data:image/jpeg;base64,|#)', page)
    assert str(photos) not in page and str(tmp_path) not in page
    assert "default-src 'none'" in page and "unsafe-inline" not in page


def test_both_languages_everywhere(photos: Path, tmp_path: Path) -> None:
    page = review_lines([line("a.jpg", ("dog", [[4, 3, 60, 25]]))], photos, tmp_path / "out").page
    english, chinese = (re.findall(rf'<span lang="{language}">(.*?)</span>', page) for language in ("en", "zh"))
    assert len(english) == len(chinese) > 40
    assert all(re.search("[\u4e00-\u9fff]", text) for text in chinese if text not in ("English", ""))


def test_all_suspects_can_be_reached_and_the_page_is_bounded(photos: Path, tmp_path: Path) -> None:
    """Those without a picture are listed; 40 at once are shown, the others are in templates."""
    lines = [line("a.jpg", ("dog", [[4 + i / 4, 3, 5 + i / 4, 25] for i in range(100)]), ("cat", [[4, 3, 60, 25]]))]
    found = review_lines(lines, photos, tmp_path / "out", max_pictures=15, max_listed=50)
    assert found.kinds() == {"box_outside_image": 1, "under_one_patch": 100}
    assert found.report["suspects_shown"] == {"box_outside_image": 1, "under_one_patch": 14}
    assert found.report["suspects_listed"] == {"box_outside_image": 0, "under_one_patch": 50}
    assert "Of 100, 14 have pictures" in found.page and "64 are on this page" in found.page
    shown = re.sub(r"<template class=.later.*?</template>", "", found.page, flags=re.DOTALL)
    assert (shown.count('<article class="card'), found.page.count('<article class="card')) == (41, 65)
    assert 'data-left="24"' in found.page
    without = review_lines(lines, photos, tmp_path / "none", max_pictures=0).page
    assert "data:image/jpeg" not in without and without.count('<article class="card') == 101


def bulk_parts(page: str, kind: str) -> list[str]:
    """The ids that a decision about the whole kind decides about, as the page's script reads them."""
    section = page[page.index(f'<section class="kind" data-kind="{kind}"') :]
    match = re.search(r'data-parts="(.*?)"', section)
    assert match
    ids = []
    for part in match[1].split():
        level, text = part.split(":")
        data = base64.b64decode(text)
        ids += [f"{level}-{data[i : i + 8].hex()}" for i in range(0, len(data), 8)]
    return ids


def test_one_decision_about_a_whole_kind_has_all_its_parts(photos: Path, tmp_path: Path) -> None:
    (photos / "z.jpg").write_bytes((photos / "a.jpg").read_bytes())
    boxes = [[4 + i / 4, 3, 5 + i / 4, 25] for i in range(100)]
    lines = [line("a.jpg", ("dog", boxes)), line("z.jpg", ("dog", GOOD)), line("b.jpg", ("cat", GOOD, "zh"))]
    found = review_lines(lines, photos, tmp_path / "out", max_pictures=3, max_listed=5)
    by_kind = {kind: [row for row in found.suspects if row["kind"] == kind] for kind in found.kinds()}
    small = {row["id"].partition(".")[0] for row in by_kind["under_one_patch"]}
    assert set(bulk_parts(found.page, "under_one_patch")) == small and len(small) == 100
    assert "Drop all (100 boxes)" in found.page and "Drop all (1 target)" in found.page
    # of the copies one stays
    (copies,) = by_kind["same_photo"]
    assert bulk_parts(found.page, "same_photo") == [copies["photos"][1]["part"]]
    assert "Drop all copies (1 image)" in found.page
    rows = [{"id": part, "decision": "drop"} for kind in by_kind for part in bulk_parts(found.page, kind)]
    (tmp_path / "decisions.json").write_text(json.dumps({"decisions": rows}))
    decisions = load_decisions(tmp_path / "decisions.json")
    parts = FORMATS["jsonl"].read(tmp_path / "out" / "lines.jsonl", photos)
    assert [decisions.apply(part)[0] for part in parts] == [None, None, None]  # type: ignore[arg-type]
    assert decisions.unmet() == []


def test_the_terminal_and_the_page_have_the_same_numbers(photos: Path, tmp_path: Path) -> None:
    lines = ["garbage", *(flaw for flaw, _, _ in FLAWS.values()), line("b.jpg", ("dog", GOOD), ("cat", []))]
    annotations = tmp_path / "lines.jsonl"
    annotations.write_text("\n".join(json.dumps(line) for line in lines))
    found = review(annotated_items("jsonl", annotations, photos), "lines.jsonl", tmp_path)
    printed = summarize(found, tmp_path)
    page = Reviewed(tmp_path).page
    tiles = {
        name: int(count.replace(",", "")) for count, name in re.findall(r"<b>([\d,]+)</b><span lang=.en.>(.*?)<", page)
    }
    first = dict((name, int(count)) for count, name in re.findall(r"(\d+) ([a-z ]+)", printed.splitlines()[0]))
    for here, there in (
        ("images", "photos"),
        ("targets", "targets"),
        ("boxes", "boxes"),
        ("absent targets", "absent targets"),
        ("verbatim turns", "verbatim turns"),
    ):
        assert tiles[here] == first[there], here
    assert f"suspects: {tiles['suspects']}\n" in printed
    sections = re.findall(
        r'<section class="kind".*?<h3><span lang="en">(.*?)</span>.*? · ([\d,]+)</h3>', page, re.DOTALL
    )
    assert {f"{int(count):>9} {html.unescape(title)}" for title, count in sections} == {
        row for row in printed.splitlines() if re.match(r" +\d", row)
    }
    assert tiles["suspects"] + tiles.get("notes", 0) == sum(int(count) for _, count in sections)


def test_the_size_of_training_decides_what_is_under_a_patch(photos: Path, tmp_path: Path) -> None:
    lines = [line("a.jpg", ("dog", [[4, 3, 5, 25]]))]
    assert review_lines(lines, photos, tmp_path / "980", image_size=980).kinds() == {}


@pytest.mark.slow
def test_processes_do_not_change_the_result(photos: Path, tmp_path: Path) -> None:
    lines = [flaw for flaw, _, _ in FLAWS.values()] * 8
    one = review_lines(lines, photos, tmp_path / "one")
    two = review_lines(lines, photos, tmp_path / "two", num_workers=2)
    assert (one.suspects, one.report, one.page) == (two.suspects, two.report, two.page)


def test_strange_numbers_and_files_do_not_stop_it(photos: Path, tmp_path: Path) -> None:
    (photos / "broken.jpg").write_bytes(image_bytes()[:300])
    (photos / "text.jpg").write_text("no image")
    (photos / "folder.jpg").mkdir()
    os.mkfifo(photos / "pipe.jpg")
    huge = [[-1e308, -1e308, 1e308, 1e308], [1e308, 0, -1e308, 1e-308], [0, 0, 0, 0]]
    (photos / "z.jpg").write_bytes((photos / "a.jpg").read_bytes())
    names = ["a", "z", "broken", "text", "folder", "pipe", "nul\0"]
    lines = [line(f"{name}.jpg", ("dog", huge), ("cat", [])) for name in names]
    found = review_lines(lines, photos, tmp_path / "out")
    assert found.kinds() == {
        **{"same_photo": 1, "box_outside_image": 2, "inverted_box": 2, "zero_area": 2},
        **{"missing_image": 2, "broken_image": 2, "unreadable_image": 1},
    }


def test_command_line(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations = tmp_path / "lines.jsonl"
    annotations.write_text(json.dumps(line("a.jpg", ("dog", [[4, 3, 60, 25]]))))
    arguments = ["--images", str(photos), "--annotations", str(annotations), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--workers", "1"]) == 0
    output = capsys.readouterr().out
    assert "--format jsonl" in output
    assert "1 Outside the image" in output
    assert str(annotations) in (tmp_path / "out" / "review.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shards", "none"], "none"),
        (["--images", "none", "--annotations", "none"], "--annotations none"),
        (["--images", "file", "--annotations", "file"], "--images file: not a folder"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("{}")
    assert main([*arguments, "--out", "out"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("DataError: ") and words in error


def test_out_that_is_a_file(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="a file; expected a folder"):
        review(iter(()), "nothing", tmp_path / "file")


@pytest.mark.slow
@needs_data
def test_raccoons(tmp_path: Path) -> None:
    """Four pairs of identical photos with different boxes, and nothing else."""
    root = DATA / "voc_raccoon"
    review(
        annotated_items("voc", root / "annotations", root / "images"),
        "raccoons",
        tmp_path,
        ReviewSettings(max_pictures=40),
    )
    found = Reviewed(tmp_path)
    assert found.kinds() == {"same_photo": 4}
    pairs = {tuple(sorted(int(re.sub(r"\D", "", photo["image"])) for photo in row["photos"])) for row in found.suspects}
    assert pairs == {(11, 116), (83, 120), (52, 74), (65, 98)}
    assert found.report["counts"]["boxes"] == 217
    assert found.report["recommended"]["image_size"] == 490
    assert "weights' own size is enough" in html.unescape(found.page)
    assert found.page.count('<figure class="shot"') == 24 + 3 * 8 and found.page.count('<figure class="seen"') == 12
    assert found.page.count("<figure data-") == 8


@needs_data
def test_coco128(tmp_path: Path) -> None:
    root = DATA / "coco128_train"
    source = annotated_items("coco", root / "coco_json" / "instances_train2017.json", root / "images" / "train2017")
    review(source, "coco128", tmp_path, ReviewSettings(max_pictures=0))
    found = Reviewed(tmp_path)
    kinds = found.kinds()
    assert (kinds["crowd"], kinds["no_targets"]) == (10, 2)
    assert set(kinds) == {"crowd", "no_targets", "under_one_patch"}
    assert kinds["under_one_patch"] / 929 == pytest.approx(0.25, abs=0.01)  # the data's README: thin at 490 px
    assert found.report["recommended"] == {
        **{"image_size": 980, "share": pytest.approx(0.912, abs=0.001)},
        **{"wanted_share": 0.9, "enough": True, "weights_size": 490},
    }
    assert found.report["image_sizes"]["490"]["tokens"] == 1227
