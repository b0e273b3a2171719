"""Find the photo of an annotation whose stated path is not in the images folder.

Tools write other paths than the user has: of another machine, with %20, another case, Unicode form or folder, or with
the prefix of an upload. A photo is used if it is the only one that fits, and reported as a note. Otherwise the message
about the missing photo names the files that come closest.
"""

from __future__ import annotations

import os
import posixpath
import re
import tempfile
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from hashlib import blake2b
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from cogvlm_ft.data.tars import IMAGE_EXTENSIONS
from cogvlm_ft.shards.packing.candidate_json import candidate_from_json, to_json
from cogvlm_ft.shards.packing.candidates import Candidate, Problem
from cogvlm_ft.shards.packing.given_splits import split_of_path

_HALF_WIDTH = {0x3000: " ", **{code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}}
_UPLOAD_PREFIX = re.compile(r"[0-9a-f]{8}-(?=.)")
_NOT_IN_UPLOADS = re.compile(r"[^-\w.]")
_GENERAL_FOLDERS = frozenset(
    [
        "annotations",
        "data",
        "dataset",
        "default",
        "image",
        "images",
        "img",
        "imgs",
        "jpegimages",
        "media",
        "photo",
        "photos",
        "picture",
        "pictures",
        "static",
        "upload",
        "uploads",
        "图像",
        "图片",
        "数据",
        "数据集",
        "标注",
        "标签",
        "照片",
    ]
)
"""Names of folders that do not describe the photos in them."""
_MAX_NAMED = 3


def with_photos(parts: Iterable[Candidate | Problem], images: Path) -> Iterator[Candidate | Problem]:
    """Yield the same parts. Candidates whose photo is not at its path come last, with the photo that fits, if any.

    They are kept in a temporary file, so that memory does not grow with their number.
    """
    claimed = set[int]()
    missing: dict[str, None] = {}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        for part in parts:
            if isinstance(part, Candidate) and part.embedded_in is None:
                if not _is_there(images, part.image):
                    missing[part.image] = None
                    file.write(to_json(part) + "\n")
                    continue
                claimed.add(_hash(part.image))
            yield part
        if missing:
            found = _choices(missing, images, claimed)
            file.seek(0)
            for line in file:
                yield _with_choice(candidate_from_json(line), found)


class _Choice(NamedTuple):
    """The photo of a missing name, or what to say about the photos that are similar."""

    photo: str | None
    hint: str


class _Names:
    """The files of the images folder whose names are similar to a missing one, by their keys."""

    def __init__(self, images: Path, missing: Iterable[str]) -> None:
        missing_keys = {key for name in missing for key in _keys(name)}
        self._folder = images.absolute().name
        self._files: dict[str, list[str]] = defaultdict(list)
        for folder, subfolders, names in os.walk(images):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            below = Path(folder).relative_to(images).as_posix()
            for name in sorted(names):
                if name.startswith(".") or not _has_image_ending(name):
                    continue
                for key in missing_keys.intersection(_keys(name)):
                    self._files[key].append(posixpath.normpath(posixpath.join(below, name)))

    def choice(self, missing: str) -> _Choice:
        """Return the only photo that fits, or a hint about those that come close."""
        spelling, stem, upload = _keys(missing)
        keys = (spelling, upload) if _has_image_ending(missing) else (spelling, stem, upload)
        same = next((self._files[key] for key in keys if key in self._files), [])
        fitting = [name for name in same if _folders_agree(missing, name, self._folder)]
        if fitting:
            ranks = [_rank(missing, name) for name in fitting]
            best = [name for name, rank in zip(fitting, ranks, strict=True) if rank == max(ranks)]
            if len(best) == 1:
                return _Choice(best[0], "")
            return _Choice(None, f"{_named(best)} could each be it: write the folder into the annotation too.")
        if same:
            folder = posixpath.dirname(same[0]) or "."
            advice = f"if that is the photo, pass the folder {folder!r} as --images, or correct the annotation"
            return _Choice(None, f"{_named(same)} has this name in another folder: {advice}.")
        if stem in self._files:
            return _Choice(
                None, f"{_named(self._files[stem])} has another ending: rename it or correct the annotation."
            )
        return _Choice(None, "")


def _choices(missing: Iterable[str], images: Path, claimed: set[int]) -> dict[str, _Choice]:
    """Return the choice for every missing name; two names never share a photo, nor does one with its own annotation."""
    names = _Names(images, missing)
    choices = {name: names.choice(name) for name in missing}
    users: dict[str, list[str]] = defaultdict(list)
    for name, choice in choices.items():
        if choice.photo:
            users[choice.photo].append(name)
    for photo, stated in users.items():
        if _hash(photo) in claimed:
            hint = f"{photo!r} is similar, but has an annotation of its own: correct the name or remove one of the two."
        elif len(stated) > 1:
            hint = f"{photo!r} is similar, but so it is to {_named(stated)}: correct the names in the annotations."
        else:
            continue
        choices.update(dict.fromkeys(stated, _Choice(None, hint)))
    return choices


def _with_choice(candidate: Candidate, choices: dict[str, _Choice]) -> Candidate:
    photo, hint = choices[candidate.image]
    if photo is None:
        return replace(candidate, image_hint=hint or candidate.image_hint)
    detail = f"{candidate.image!r:.200} is not in the images folder; used {photo!r:.200}, the only photo that fits"
    note = Problem("note", "image_name_matched", detail, candidate.source)
    return replace(candidate, image=photo, problems=(*candidate.problems, note))


def _is_there(images: Path, name: str) -> bool:
    """Return whether anything is at this path. What it is, and whether it may be read, is checked when it is read."""
    try:
        os.lstat(os.path.join(images, name))  # noqa: PTH118
    except OSError:
        return False
    except ValueError:  # a NUL
        return True
    return True


def _keys(path: str) -> tuple[str, str, str]:
    """Return what names of one photo have in common: as spelled, without ending, and as uploaded to Label Studio."""
    name = _folded(posixpath.basename(path))
    stem = name.rpartition(".")[0] if _has_image_ending(name) else name
    upload = _NOT_IN_UPLOADS.sub("", _UPLOAD_PREFIX.sub("", name).replace(" ", "_"))
    return f"name {name}", f"stem {stem}", f"upload {upload}"


def _folded(text: str) -> str:
    """Return the text without differences of case, Unicode form, width, blanks and percent escapes."""
    text = unicodedata.normalize("NFC", unquote(text).translate(_HALF_WIDTH)).casefold()
    return " ".join(text.split())


def _folders_of(path: str) -> list[str]:
    """Return the folders that may say which photo it is: no drive, and none that tools always write."""
    parts = (_folded(part) for part in posixpath.dirname(path).split("/"))
    return [part for part in parts if part.strip(".") and not part.endswith(":") and part not in _GENERAL_FOLDERS]


def _folders_agree(missing: str, found: str, images_name: str) -> bool:
    """Return whether one path only has more folders than the other, rather than other ones or another split."""
    splits = [split_of_path(posixpath.dirname(path)) for path in (missing, posixpath.join(images_name, found))]
    if all(splits) and splits[0] != splits[1]:
        return False
    few, many = sorted((_folders_of(missing), _folders_of(found)), key=len)
    rest = iter(many)
    return all(part in rest for part in few)


def _rank(missing: str, found: str) -> tuple[int, bool]:
    """Return how many folders before the name are equal, then whether the name is spelled alike."""
    pairs = zip(reversed(_folders_of(missing)), reversed(_folders_of(found)), strict=False)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return same, posixpath.basename(missing) == posixpath.basename(found)


def _named(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return " and ".join(f"{name!r:.200}" for name in names[:_MAX_NAMED]) + more


def _has_image_ending(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def _hash(image: str) -> int:
    return int.from_bytes(blake2b(image.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")
