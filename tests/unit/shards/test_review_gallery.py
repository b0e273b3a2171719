"""The photos that a review shows: which ones, with which boxes and phrases, and as the model will see them."""

from __future__ import annotations

import base64
import io
import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from photo_builds import image_bytes
from PIL import Image

from cogvlm_ft.errors import ConfigError
from cogvlm_ft.grounding.boxes import boxes_from_bins, parse_boxes
from cogvlm_ft.grounding.targets import Target, Turn
from cogvlm_ft.settings import AugmentConfig
from cogvlm_ft.shards.packing.candidates import Candidate
from cogvlm_ft.shards.review import main, review
from cogvlm_ft.shards.reviewing.gallery import GALLERIES, Galleries, Measure
from cogvlm_ft.shards.reviewing.labels import Named, place_labels
from cogvlm_ft.shards.reviewing.settings import EXAMPLE_AUGMENT, ReviewSettings, parse_augment
from cogvlm_ft.shards.reviewing.shots import Layer, draw_shot
from cogvlm_ft.shards.reviewing.sources import Item, Place
from cogvlm_ft.shards.reviewing.training_view import augment_words, see_photos

REPOSITORY = Path(__file__).parents[3]
RED = (230, 20, 20)


def item_of(name: str, folder: Path, *targets: Target, turns: tuple[Turn, ...] = (), units: Any = "pixels") -> Item:
    return Item(Candidate(name, None, name, targets, turns, units=units), Place(str(folder), name))


def picture_of(layer: Layer) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(layer.uri.partition(",")[2])))


def boxes_drawn(layer: Layer) -> list[tuple[float, float, float, float]]:
    """(x0, y0, x1, y1) of all outlines, in pixels of the picture."""
    found = re.findall(r"M([-.\d]+) ([-.\d]+)H([-.\d]+)V([-.\d]+)", "".join(layer.outlines.values()))
    return [(float(x0), float(y0), float(x1), float(y1)) for x0, y0, x1, y1 in found]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.floats(0.01, 1), st.floats(0.01, 1)), max_size=120), st.randoms())
def test_the_galleries_are_the_most_extreme_whatever_the_order(
    sizes: list[tuple[int, float, float]], chance: random.Random
) -> None:
    measures = [Measure(0, f"sample-{i:016x}", n, min(a, b), max(a, b)) for i, (n, a, b) in enumerate(sizes)]
    by_name = {f"{i}.jpg": measure for i, measure in enumerate(measures)}

    def chosen(names: list[str]) -> dict[str, list[Measure]]:
        galleries = Galleries()
        for name in names:
            galleries.add(by_name[name], item_of(name, Path()))
        return {
            gallery: [by_name[item.candidate.image] for item in items] for gallery, items in galleries.chosen().items()
        }

    first = chosen(list(by_name))
    for gallery, rule in GALLERIES.items():
        expected = sorted(filter(rule.belongs, measures), key=lambda each: (rule.rank(each), each.draw))
        assert first[gallery] == expected[: rule.size]
    names = list(by_name)
    chance.shuffle(names)
    assert chosen(names) == first


def test_the_random_photos_are_spread_over_the_source() -> None:
    galleries = Galleries()
    for i in range(4000):
        galleries.add(Measure(0, f"sample-{i:016x}", 1, 0.1, 0.1), item_of(str(i), Path()))
    found = sorted(int(item.candidate.image) for item in galleries.chosen()["random"])
    assert len(found) == 24 and found[0] < 1000 and found[-1] > 3000


PHRASES = st.sampled_from(("dog", "一只很大的棕色的狗", "a very long phrase about something in the photo", "x"))


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_labels_never_cover_each_other_and_start_in_the_picture(data: st.DataObject) -> None:
    width, height = data.draw(st.integers(100, 900)), data.draw(st.integers(100, 900))
    scale = max(width / 290, height / 218)
    corners = st.tuples(st.floats(-4, width + 4), st.floats(-4, height + 4), st.floats(1, 300), st.floats(1, 300))
    boxes = data.draw(st.lists(st.tuples(corners, PHRASES)))
    named = [Named((x, y, x + w, y + h), phrase, 0) for (x, y, w, h), phrase in boxes]
    labels = [label for label in place_labels(named, (width, height), scale) if not label.only_large]
    areas = [
        (x, y, x + label.width * scale, y + 17 * scale)
        for label in labels
        for x, y in [(label.x + label.dx * scale, label.y + label.dy * scale)]
    ]
    for i, a in enumerate(areas):
        assert a[0] >= -scale and a[1] >= -1e-6 and a[1] <= height
        assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in areas[:i])
    assert bool(labels) == bool(named)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_boxes_are_drawn_where_they_are(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A block of colour on a photo of any shape, with its box in any unit."""
    width, height = data.draw(st.integers(300, 900)), data.draw(st.integers(300, 900))
    x0, y0 = data.draw(st.integers(0, width - 70)), data.draw(st.integers(0, height - 70))
    x1, y1 = data.draw(st.integers(x0 + 60, width)), data.draw(st.integers(y0 + 60, height))
    units = data.draw(st.sampled_from(("pixels", "unit")))
    folder = tmp_path_factory.mktemp("photo")
    photo = Image.new("RGB", (width, height), (20, 20, 120))
    photo.paste(RED, (x0, y0, x1, y1))
    photo.save(folder / "a.png")
    scale = (1, 1) if units == "pixels" else (width, height)
    box = (x0 / scale[0], y0 / scale[1], x1 / scale[0], y1 / scale[1])
    target = Target("block", "en", (box,))
    shot = draw_shot(item_of("a.png", folder, target, Target("cat", "en", ()), units=units), "random", 490)
    assert shot is not None and shot.size_px == (width, height)
    assert [(entry.text, entry.num_boxes) for entry in shot.legend] == [("block", 1)] and shot.absent == ["cat"]
    (layer,) = shot.layers
    red = np.argwhere(np.asarray(picture_of(layer), dtype=int)[:, :, 0] > 120)
    (drawn,) = boxes_drawn(layer)
    found = (*red.min(axis=0)[::-1], *(red.max(axis=0)[::-1] + 1))
    assert max(layer.size_px) <= 720 and np.abs(np.array(drawn) - found).max() <= 2

    seen = see_photos([item_of("a.png", folder, target, units=units)], ReviewSettings(image_size=196))[0]
    for each in (seen.plain, seen.augmented):
        assert each.layer is not None and each.layer.size_px == (196, 196)
        red = np.argwhere(np.asarray(picture_of(each.layer), dtype=int)[:, :, 0] > 110)
        (drawn,) = boxes_drawn(each.layer)
        found = (*red.min(axis=0)[::-1], *(red.max(axis=0)[::-1] + 1))
        assert np.abs(np.array(drawn) - found).max() <= 3
        (exchange,) = each.exchanges
        answered = boxes_from_bins(parse_boxes(exchange.answer) or [], (196, 196))
        assert np.abs(answered[0] - drawn).max() <= 0.1 and "block" in exchange.prompt
    assert seen.plain.changes == []


def test_a_small_box_is_also_shown_enlarged(photos: Path) -> None:
    Image.new("RGB", (800, 600)).save(photos / "large.png")
    item = item_of("large.png", photos, Target("dog", "en", ((100.0, 100.0, 110.0, 112.0), (0.0, 0.0, 700.0, 500.0))))
    smallest, largest = (draw_shot(item, name, 490) for name in ("smallest", "largest"))
    assert smallest and largest
    assert [len(smallest.layers), len(largest.layers)] == [2, 1]
    assert smallest.note[0] == "10 × 12 px, 0.4 patches at 490 px" and largest.note[0] == "88% × 83% of the photo"


def test_turns_of_the_user_are_shown_and_are_not_cropped(photos: Path) -> None:
    turn = Turn("Where is it?", "There: [[100,100,500,600]]")
    item = item_of("a.jpg", photos, turns=(turn,))
    shot = draw_shot(item, "random", 490)
    assert shot and [entry.text for entry in shot.legend] == ["Where is it?"] and len(boxes_drawn(shot.layers[0])) == 1
    (seen,) = see_photos([item], ReviewSettings())
    assert [(each.prompt, each.answer) for each in seen.augmented.exchanges] == [(turn.prompt, turn.answer)]
    assert not any("crop" in change or "flip" in change for change in seen.augmented.changes)


def test_what_cannot_be_asked_says_why(photos: Path, tmp_path: Path) -> None:
    """Letterboxing moves the boxes of a turn that is written as text."""
    item = item_of("a.jpg", photos, turns=(Turn("Where?", "[[100,100,500,600]]"),))
    (seen,) = see_photos([item], ReviewSettings(resize="letterbox"))
    assert seen.plain.layer is None and "data.resize=squash" in seen.plain.problem
    review(iter([item]), "x", tmp_path, ReviewSettings(resize="letterbox"))
    assert "data.resize=squash" in (tmp_path / "review.html").read_text(encoding="utf-8")


def test_photos_of_val_are_not_augmented_so_not_shown(photos: Path) -> None:
    target = Target("dog", "en", ((4.0, 3.0, 30.0, 25.0),))
    candidate, place = Candidate("a.jpg", "k", "", (target,)), Place(str(photos), "a.jpg")
    assert len(see_photos([Item(candidate, place, split) for split in ("val", "train")], ReviewSettings())) == 1


def test_the_plain_picture_is_the_squashed_photo(photos: Path) -> None:
    """It has passed through JPEG, hence the tolerance."""
    target = Target("dog", "en", ((4.0, 3.0, 30.0, 25.0),))
    (seen,) = see_photos([item_of("a.jpg", photos, target)], ReviewSettings(image_size=98))
    assert seen.plain.layer and seen.augmented.layer
    direct = Image.open(photos / "a.jpg").convert("RGB").resize((98, 98), Image.Resampling.BICUBIC)
    difference = np.abs(np.asarray(picture_of(seen.plain.layer), dtype=int) - np.asarray(direct, dtype=int))
    assert difference.mean() < 8


@pytest.mark.parametrize(
    ("stated", "words"),
    [(["crop"], "found ''"), (["crop=2"], "0 to 1"), (["zoom=1"], "unknown name"), (["hue=nan"], "found 'nan'")],
)
def test_mistakes_in_augment(stated: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_augment(stated)


def test_augment_is_read_and_written() -> None:
    assert parse_augment(["crop=0.5", "data.augment.flip=0.25"]) == AugmentConfig(crop=0.5, flip=0.25)
    assert parse_augment(augment_words(EXAMPLE_AUGMENT).split()) == EXAMPLE_AUGMENT
    assert augment_words(AugmentConfig()) == ""


def test_a_wording_that_does_not_exist_is_one_line(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lines.jsonl").write_text(json.dumps({"image": "a.jpg", "targets": []}))
    arguments = ["--images", str(photos), "--annotations", str(tmp_path / "lines.jsonl"), "--out", str(tmp_path / "o")]
    assert main([*arguments, "--wording", "none.yaml"]) == 2
    assert capsys.readouterr().err.startswith("ConfigError: wording none.yaml")
    assert main([*arguments, "--augment", "zoom=1"]) == 2
    assert "--augment zoom=1" in capsys.readouterr().err


@pytest.mark.slow
def test_a_review_needs_no_torch(tmp_path: Path) -> None:
    """At run time either: pictures, augmented inputs and all."""
    (tmp_path / "a.jpg").write_bytes(image_bytes())
    (tmp_path / "lines.jsonl").write_text(
        json.dumps({"image": "a.jpg", "targets": [{"phrase": "dog", "boxes": [[4, 3, 30, 25]]}]})
    )
    code = (
        "import sys; from cogvlm_ft.shards.review import main;"
        f"assert main(['--images', {str(tmp_path)!r}, '--annotations', {str(tmp_path / 'lines.jsonl')!r},"
        f" '--out', {str(tmp_path / 'out')!r}, '--workers', '1']) == 0;"
        "print([name for name in ('torch', 'transformers', 'webdataset') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert (tmp_path / "out" / "review.html").read_text(encoding="utf-8").count('class="seen"') == 2


def test_measures_are_finite_for_strange_boxes(photos: Path, tmp_path: Path) -> None:
    huge = ((-1e308, -1e308, 1e308, 1e308), (math.inf, 0.0, 1.0, 1.0), (0.0, 0.0, 0.0, 0.0))
    item = item_of("a.jpg", photos, Target("dog", "en", huge))
    review(iter([item]), "x", tmp_path)
    page = (tmp_path / "review.html").read_text(encoding="utf-8")
    assert not re.search(r'(?:d|transform|width|x|y)="[^"]*(?:nan|inf)', page)
