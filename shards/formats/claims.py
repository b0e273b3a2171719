"""Decide which image an annotation file belongs to, by its own name and by the one it states.

A stated name is stale after files were renamed or copied, so an image of the file's own name comes first. No image
belongs to two annotation files.
"""

from __future__ import annotations

import posixpath
import unicodedata
from array import array
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from cogvlm_ft.shards.formats.folders import AnnotationFiles, Photos
from cogvlm_ft.shards.packing.candidates import Problem, Rejected


@dataclass(frozen=True)
class Stated:
    """The statement of an annotation file about its image.

    name: without folders, or "". found: the image that it leads to, if any. embedded: the file contains the image.
    """

    name: str = ""
    found: str | None = None
    embedded: bool = False


class OwnImage(NamedTuple):
    """The image of an annotation file. notes: how a stale name was resolved."""

    image: str
    notes: tuple[Problem, ...] = ()


_Hashes = np.ndarray[tuple[int], np.dtype[np.uint64]]


class _Claim(NamedTuple):
    """The only image that a file without one of its own may belong to. by_stem: it has the file's own name."""

    source: str
    by_stem: bool


class ImageClaims:
    """The claims of all annotation files of a folder.

    Read the files in the order of `sources`, and ask `image_of` for each. Where it returns None, other files must be
    read first; such files come again.
    """

    def __init__(self, files: AnnotationFiles, photos: Photos) -> None:
        self._files = files
        self._photos = photos
        self._owned = _sorted_hashes(image for source in files if (image := self._own_image(source)))
        self._claims: dict[str, list[_Claim]] = defaultdict(list)
        self._waiting: dict[str, str] = {}
        self._settled = False

    def sources(self) -> Iterator[str]:
        """Yield every file, then again those whose image could not be decided yet."""
        yield from self._files
        self._settled = True
        yield from self._waiting

    def image_of(self, source: str, stated: Stated) -> OwnImage | None:
        """Return the image, or None for a file that comes again. Raises Rejected if it cannot be decided."""
        if self._settled:
            image = self._settled_image(source, stated)
            return OwnImage(image, self._stale(source, stated, image) if stated.found else ())
        own = self._of_stem(source, stated)
        if own is not None:
            rivals = [other for other in self._contested.get(own, ()) if other != source]
            if rivals:
                raise _claimed_twice(own, rivals)
            return OwnImage(own, self._stale(source, stated, own))
        image = self._claimed_image(source, stated)
        self._claims[image].append(_Claim(source, self._has_own_name(source, image)))
        self._waiting[source] = image
        return None

    def _of_stem(self, source: str, stated: Stated) -> str | None:
        """Return the image of the file's own name. Raises Rejected if there are several, and none of them is stated."""
        images = self._images_of_stem(source)
        if stated.found in images:
            return stated.found
        if len(images) > 1:
            detail = f"{' and '.join(images)} could both belong to it; name or remove one"
            raise Rejected("sample", "ambiguous_image", detail)
        return images[0] if images else None

    def _images_of_stem(self, source: str) -> list[str]:
        folder, stem = posixpath.split(self._files.stem(source))
        return self._photos.of_stem(folder, stem)

    def _own_image(self, source: str) -> str | None:
        images = self._images_of_stem(source)
        return images[0] if len(images) == 1 else None

    def _claimed_image(self, source: str, stated: Stated) -> str:
        """Return the image beside the stated one that has the file's own name, else the stated one, even if missing."""
        folder, stem = posixpath.split(self._files.stem(source))
        if stated.found is None:
            own_name = stem + (posixpath.splitext(stated.name)[1] or ".jpg")
            return posixpath.join(folder, own_name if stated.embedded else stated.name or own_name)
        beside = self._photos.in_folder(posixpath.dirname(stated.found), stem)
        return beside[0] if len(beside) == 1 else stated.found

    def _settled_image(self, source: str, stated: Stated) -> str:
        """Return the claimed image if nobody has a better claim, else the embedded one. Raises Rejected."""
        image = self._waiting[source]
        claims = self._claims[image]
        rivals = [claim.source for claim in claims if claim.source != source]
        if image in self._owners_of_claimed:
            rivals = self._owners_of_claimed[image]
        elif self._has_own_name(source, image):
            rivals = [claim.source for claim in claims if claim.source != source and claim.by_stem]
        if not rivals:
            return image
        if stated.embedded:
            folder, stem = posixpath.split(self._files.stem(source))
            return posixpath.join(folder, stem + (posixpath.splitext(image)[1] or ".jpg"))
        raise _claimed_twice(image, rivals)

    def _has_own_name(self, source: str, image: str) -> bool:
        return _same_name(posixpath.basename(image), posixpath.basename(self._files.stem(source)))

    def _stale(self, source: str, stated: Stated, image: str) -> tuple[Problem, ...]:
        """Return the note that the file states another name than its own image has."""
        own = posixpath.basename(self._files.stem(source))
        other_file = stated.found is not None and stated.found != image and _same_name(stated.name, own)
        if not stated.name or not self._has_own_name(source, image):
            return ()
        if _same_name(stated.name, own) and not other_file:
            return ()
        found = stated.found if other_file else stated.name
        detail = f"the stated image is {found!r:.200}; used {image!r:.200}, which has the name of the annotation file"
        return (Problem("note", "stale_image_name", f"{detail}. Rename one of them if this is wrong.", source),)

    @cached_property
    def _contested(self) -> dict[str, list[str]]:
        """Return the files of the images that several files have as the only one of their own name."""
        return self._owners(self._owned[1:][self._owned[1:] == self._owned[:-1]])

    @cached_property
    def _owners_of_claimed(self) -> dict[str, list[str]]:
        """Return the files that own an image which files of another name claim too."""
        return self._owners(_sorted_hashes(image for image in self._claims if _is_in(self._owned, image)))

    def _owners(self, hashes: _Hashes) -> dict[str, list[str]]:
        found: dict[str, list[str]] = defaultdict(list)
        for source in self._files if len(hashes) else ():
            image = self._own_image(source)
            if image is not None and _is_in(hashes, image):
                found[image].append(source)
        return dict(found)


def _claimed_twice(image: str, rivals: list[str]) -> Rejected:
    names = " and ".join(f"{name!r:.200}" for name in rivals[:3])
    detail = (
        f"{image!r:.200} is also the image of {names}; expected one annotation file per image. Remove or rename one."
    )
    return Rejected("sample", "image_claimed_twice", detail)


def _same_name(name: str, stem: str) -> bool:
    """Return whether a file name is the stem with or without an ending; case and Unicode form do not count."""
    texts = {_folded(name), _folded(posixpath.splitext(name)[0])}
    return _folded(stem) in texts


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold()


def _hash(image: str) -> np.uint64:
    return np.uint64(int.from_bytes(blake2b(image.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little"))


def _is_in(hashes: _Hashes, image: str) -> bool:
    place = np.searchsorted(hashes, _hash(image))
    return bool(place < len(hashes) and hashes[place] == _hash(image))


def _sorted_hashes(images: Iterator[str]) -> _Hashes:
    """Return 8 bytes per image instead of its name."""
    hashes = array("Q", (int(_hash(image)) for image in images))
    return np.sort(np.frombuffer(hashes, dtype=np.uint64)) if hashes else np.empty(0, dtype=np.uint64)
