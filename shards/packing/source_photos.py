"""Which photo an image file is a copy of, by its name: augmented copies belong into one split with their photo.

IMG_8_jpg.rf.8f4ff31e.jpg (Roboflow), IMG_8_aug.jpg, IMG_8_augmented_3.png, IMG_8_hflip.jpg, IMG_8_blur.jpg and
aug_3_IMG_8.jpg are copies of IMG_8. Copies with another name are found by their content (`packing/split_plan.py`).
"""

from __future__ import annotations

import posixpath
import re
from typing import NamedTuple

from cogvlm_ft.errors import DataError
from cogvlm_ft.shards.packing.given_splits import split_of_folder

_ENDINGS = "jpe?g|png|webp|bmp|tiff?"
_COPY = (
    re.compile(rf"(?P<name>.+?)(?:[._](?:{_ENDINGS}))?\.rf\.[0-9A-Za-z_-]{{4,}}", re.IGNORECASE),  # Roboflow
    re.compile(rf".+_original_(?P<name>.+?)\.(?:{_ENDINGS})_[0-9a-f-]{{8,}}", re.IGNORECASE),  # Augmentor
    re.compile(r"(?P<name>.+?)(?:[-_. ]aug(?:ment(?:ed|ation)?)?(?:[-_. ]?[0-9a-z]+)*)", re.IGNORECASE),
    re.compile(
        r"(?P<name>.+?)(?:[-_. ](?:[hv]?flip(?:ped)?|mirror(?:ed)?|rotated|rot(?:ate)?[-_]?(?:90|180|270)"
        r"|bright(?:ness|er|ened)?|dark(?:er|ened)?|contrast|blur(?:red)?|noise|noisy|gaussian|jitter))"
        r"(?:[-_. ]?[0-9]+)?",
        re.IGNORECASE,
    ),
    re.compile(r"aug(?:mented)?[-_. ]?[0-9]*[-_. ](?P<name>.*[^-_. 0-9].*)", re.IGNORECASE),
)
_FOLDER_OF_COPIES = re.compile("aug(?:ment(?:ed|ation|ations)?)?(?:[-_](?:images|photos))?", re.IGNORECASE)
_FOLDERS_OF_PHOTOS = frozenset(["images", "image", "img", "imgs", "jpegimages", "photos", "original", "originals"])


class PhotoName(NamedTuple):
    """Names of the photo that an image shows: `own` in its folder, `common` without the folders of splits."""

    own: str
    common: str
    is_copy: bool


class GroupBy:
    """The rule of --group-by: "photo" (copies of one photo), "folder", "none", or a regular expression.

    The expression is searched in the path of the image: the images with an equal match, or equal groups of it, are a
    series. An image that it does not match is grouped as by "photo".
    """

    def __init__(self, rule: str) -> None:
        self._rule = rule
        self._pattern: re.Pattern[str] | None = None
        if rule not in ("photo", "folder", "none"):
            try:
                self._pattern = re.compile(rule)
            except re.error as error:
                expected = "expected photo, folder, none or a regular expression, such as 'seq[0-9]+'"
                raise DataError(f"--group-by {rule!r}: {error}; {expected}") from None
        self.num_matches = 0

    @property
    def is_pattern(self) -> bool:
        """Return whether the rule is a regular expression."""
        return self._pattern is not None

    def name(self, image: str) -> PhotoName:
        """Return the names of the group of an image."""
        if self._rule == "none":
            return PhotoName(f"={image}", image, is_copy=False)
        if self._rule == "folder":
            folder = posixpath.dirname(image)
            return PhotoName(f"/{folder}", folder, is_copy=False)
        found = self._pattern.search(image) if self._pattern else None
        if found:
            self.num_matches += 1
            series = "\0".join(text or "" for text in found.groups() or [found[0]])
            return PhotoName(f":{series}", series, is_copy=False)
        return photo_name(image)


def photo_name(image: str) -> PhotoName:
    """Return the names of the photo that the image is, or is a copy of."""
    folder, file = posixpath.split(image)
    stem = posixpath.splitext(file)[0]
    name, is_copy = _without_copy_marks(stem)
    folders = folder.split("/") if folder else []
    kept = [part for part in folders if not (split_of_folder(part) or part.lower() in _FOLDERS_OF_PHOTOS)]
    plain = [part for part in kept if not _FOLDER_OF_COPIES.fullmatch(part)]
    common = posixpath.join(*plain, name)
    return PhotoName(posixpath.join(folder, name), common, is_copy or len(plain) < len(kept))


def _without_copy_marks(stem: str) -> tuple[str, bool]:
    """Return the name of the photo and whether the name had marks of a copy; a copy may be copied again."""
    for pattern in _COPY:
        found = pattern.fullmatch(stem)
        if found:
            return _without_copy_marks(found["name"])[0], True
    return stem, False
