"""Photos whose annotation states another path: found where one photo is certain, named in the message otherwise."""

from __future__ import annotations

import re
import tempfile
import unicodedata
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cogvlm_ft.grounding.targets import Target
from cogvlm_ft.shards.packing.candidates import Candidate, Problem
from cogvlm_ft.shards.packing.photo_names import with_photos

NAMES = st.text("abAB1é一只狗 _-", min_size=1, max_size=8).map(str.strip).filter(lambda name: name.strip(" .-_"))


def placed(images: Path, *stated: str) -> list[Candidate]:
    """The candidates for these stated paths, each with a target of its own, in the order given."""
    parts = [Candidate(name, None, f"line {i}", (Target(f"t{i}", "en", ()),)) for i, name in enumerate(stated)]
    found = list(with_photos([Problem("box", "x", "y", "z"), *parts], images))
    assert found[0] == Problem("box", "x", "y", "z") and len(found) == len(parts) + 1
    candidates = [part for part in found if isinstance(part, Candidate)]
    return sorted(candidates, key=lambda part: part.source)


def folder_of(root: Path, *files: str) -> Path:
    for name in files:
        path = root / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root / "photos"


CERTAIN = {
    "case": ("IMG_1.jpg", "IMG_1.JPG"),
    "decomposed on disk": ("café.jpg", unicodedata.normalize("NFD", "café.jpg")),
    "composed on disk": (unicodedata.normalize("NFD", "sub/é.png"), "sub/é.png"),
    "percent": ("two%20words.jpg", "two words.jpg"),
    "percent on disk": ("二.jpg", f"{quote('二')}.jpg"),
    "drive": ("D:/data/set/d4.jpg", "d4.jpg"),
    "home of another machine": ("/home/someone/set/d4.jpg", "d4.jpg"),
    "full width": ("a\uff081\uff09.jpg", "a(1).jpg"),
    "blanks": ("a\u3000b.jpg", "a b.jpg"),
    "a folder that everyone has": ("images/1/90fb-a.jpg", "images/90fb-a.jpg"),
    "fewer folders": ("0001.jpg", "default/sub/0001.jpg"),
    "the same last folder": ("D:/all/train/1.jpg", "train/1.jpg"),
    "upload": ("upload/1/0a1b2c3d-a.jpg", "a.jpg"),
    "upload of a name with blanks": ("upload/1/0a1b2c3d-a_1b.jpg", "a (1b).jpg"),
    "no ending": ("0001", "0001.png"),
}


@pytest.mark.parametrize("name", CERTAIN)
def test_a_certain_photo_is_used_and_noted(name: str, tmp_path: Path) -> None:
    stated, file = CERTAIN[name]
    (found,) = placed(folder_of(tmp_path, file, "other/z.jpg", ".hidden/a.jpg"), stated)
    assert found.image == file and found.targets[0].phrase == "t0"
    (note,) = found.problems
    assert (note.level, note.reason, note.source) == ("note", "image_name_matched", "line 0")
    assert repr(stated)[1:-1] in note.detail and repr(file)[1:-1] in note.detail


DOUBTFUL = {
    "two folders": (("1.jpg",), ("a/1.jpg", "b/1.jpg"), "'a/1.jpg' and 'b/1.jpg' could each be it"),
    "another folder": (("seq2/1.jpg",), ("seq1/1.jpg",), "'seq1/1.jpg' has this name in another folder.*as --images"),
    "another split": (("val/1.jpg",), ("train/1.jpg",), "in another folder"),
    "another ending": (("a.jpg",), ("a.png",), "'a.png' has another ending: rename it"),
    "one photo for two": (("x/1.jpg", "y/1.jpg"), ("1.jpg",), "so it is to 'x/1.jpg' and 'y/1.jpg'"),
    "a photo with its own": (("IMG.jpg", "img.jpg"), ("IMG.jpg",), "'IMG.jpg' is similar, but has an annotation"),
    "nothing": (("a.jpg",), ("z.jpg",), "^$"),
}


@pytest.mark.parametrize("name", DOUBTFUL)
def test_a_doubtful_photo_is_named_and_not_used(name: str, tmp_path: Path) -> None:
    stated, files, hint = DOUBTFUL[name]
    found = placed(folder_of(tmp_path, *files), *stated)
    assert [part.image for part in found] == list(stated) and not any(part.problems for part in found)
    assert re.search(hint, found[-1].image_hint)


def test_the_split_is_also_that_of_the_images_folder(tmp_path: Path) -> None:
    folder_of(tmp_path, "train/1.jpg")
    assert placed(tmp_path / "photos" / "train", "valid/1.jpg")[0].image == "valid/1.jpg"
    assert placed(tmp_path / "photos" / "train", "train/1.jpg")[0].image == "1.jpg"


@settings(max_examples=40, deadline=None)
@given(names=st.lists(NAMES, min_size=1, max_size=6, unique_by=str.casefold), data=st.data())
def test_no_photo_is_given_to_two_names(names: list[str], data: st.DataObject) -> None:
    """Whatever was done to names on the way: a name has its own photo, or none."""
    assume(len({unicodedata.normalize("NFC", name).casefold().replace(" ", "_") for name in names}) == len(names))
    change = data.draw(
        st.sampled_from(
            (
                str.upper,
                quote,
                lambda name: unicodedata.normalize("NFD", name),
                lambda name: f"C:/x y/{name}",
                lambda name: f"images/{name}",
                lambda name: name,
            )
        )
    )
    with tempfile.TemporaryDirectory() as root:
        images = folder_of(Path(root), *(f"{name}.jpg" for name in names))
        found = placed(images, *(f"{change(name)}.jpg" for name in names))
    assert [part.image for part in found] == [f"{name}.jpg" for name in names]
    assert [part.targets[0].phrase for part in found] == [f"t{i}" for i in range(len(names))]
