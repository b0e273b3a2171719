"""Write any text into a picture: with the font of this package, else with an installed one.

fonts/NotoSansSC.ttf is Noto Sans SC Regular without what is not common: it holds GB 2312 (6763 Chinese characters),
Latin, Greek, Cyrillic, kana, punctuation, full-width forms, arrows and box drawing. Its licence is fonts/OFL.txt.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from functools import cache
from itertools import chain, groupby
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from cogvlm_ft.colours import Rgb

logger = logging.getLogger(__name__)

SHIPPED_FONT = Path(__file__).parent / "fonts" / "NotoSansSC.ttf"
FONT_FOLDERS = (Path("/usr/share/fonts"), Path("/usr/local/share/fonts"), Path("/System/Library/Fonts"))
CHINESE_FONTS = ("NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "wqy-zenhei.ttc", "uming.ttc", "PingFang.ttc")
"""Fonts that are tried first, if installed."""
MAX_INSTALLED = 300
NO_CHARACTER = "\U0010ffff"
"""A character without a glyph in any font: shows how a font draws missing characters."""

Face = ImageFont.FreeTypeFont | ImageFont.ImageFont
_reported: set[str] = set()


class TextFont:
    """Measures and writes text in one size; every character in the first font that has it.

    shipped: the font of this package; installed: fonts to ask for what it lacks, the most likely first.
    """

    def __init__(self, size_px: int, shipped: Path = SHIPPED_FONT, installed: Iterator[Path] | None = None) -> None:
        self._size_px = size_px
        found = self._load(shipped)
        self._faces: list[Face] = [found] if found else []
        self._installed = installed_fonts() if installed is None else installed
        self._face_of: dict[str, Face] = {}
        self._lacking: set[str] = set()
        self._missing_of: dict[int, bytes] = {}

    def length(self, text: str) -> float:
        """Return the width of a text in pixels."""
        return sum(face.getlength(part) for face, part in self._runs(text))

    def write(self, pen: ImageDraw.ImageDraw, place: tuple[float, float], text: str, colour: Rgb | str) -> None:
        """Write a line with the left end of its middle at `place`."""
        x, y = place
        for face, part in self._runs(text):
            pen.text((x, y), part, fill=colour, font=face, anchor="lm" if self._is_scalable(face) else None)
            x += face.getlength(part)

    def report_missing(self, text: str) -> None:
        """Warn once if no font has all characters of a text of the user; answers of a model may hold any."""
        self._runs(text)
        for char in text:
            if char in self._lacking:
                _report_missing(char)

    def _runs(self, text: str) -> list[tuple[Face, str]]:
        """Divide a text where the font changes."""
        shown = [char if char.isprintable() else " " for char in text]
        faces = [self._find(char) for char in shown]
        numbered = groupby(range(len(shown)), key=lambda place: id(faces[place]))
        runs = [list(places) for _, places in numbered]
        return [(faces[places[0]], "".join(shown[place] for place in places)) for places in runs]

    def _find(self, char: str) -> Face:
        """Return the first font with a glyph for a character, else the first font."""
        if char not in self._face_of:
            face = next((face for face in chain(self._faces, self._more_faces()) if self._has(face, char)), None)
            if face is None:
                self._lacking.add(char)
            self._face_of[char] = face or self._first()
        return self._face_of[char]

    def _more_faces(self) -> Iterator[Face]:
        """Load installed fonts one by one, and keep them."""
        for path in self._installed:
            face = self._load(path)
            if face is not None:
                self._faces.append(face)
                yield face

    def _first(self) -> Face:
        if not self._faces:
            self._faces.append(ImageFont.load_default(self._size_px))
        return self._faces[0]

    def _load(self, path: Path) -> Face | None:
        with contextlib.suppress(OSError):  # not installed, damaged, or no memory to map it
            return ImageFont.truetype(str(path), self._size_px, layout_engine=ImageFont.Layout.BASIC)
        return None

    def _has(self, face: Face, char: str) -> bool:
        """Compare with what the font draws for a missing character; a blank needs no glyph."""
        if char.isspace():
            return True
        if id(face) not in self._missing_of:
            self._missing_of[id(face)] = glyph(face, NO_CHARACTER)
        return glyph(face, char) != self._missing_of[id(face)]

    @staticmethod
    def _is_scalable(face: Face) -> bool:
        return isinstance(face, ImageFont.FreeTypeFont)


def glyph(face: Face, char: str) -> bytes:
    """Return the pixels of a character, drawn on a small square."""
    square = Image.new("L", (64, 64))
    ImageDraw.Draw(square).text((8, 8), char, fill=255, font=face)
    return square.tobytes()


def installed_fonts() -> Iterator[Path]:
    """Yield installed fonts: those with Chinese, then the regular style of others. Reads folders when it is asked."""
    files = [path for folder in FONT_FOLDERS if folder.is_dir() for path in sorted(folder.rglob("*.[to]t[fc]"))]
    yield from (path for name in CHINESE_FONTS for path in files if path.name == name)
    others = [path for path in files if path.name not in CHINESE_FONTS and "Regular" in path.name]
    others += [path for path in files if path.stem in ("DejaVuSans", "Symbola", "FreeSans", "unifont")]
    yield from others[:MAX_INSTALLED]


@cache
def text_font(size_px: int) -> TextFont:
    """Return the font of a size, loaded once."""
    return TextFont(size_px)


def _report_missing(char: str) -> None:
    """Warn once, and name the package that has such characters."""
    if _reported:
        return
    _reported.add(char)
    is_chinese = 0x2E80 <= ord(char) < 0xE000 or 0xF900 <= ord(char) < 0xFB00 or 0x20000 <= ord(char) < 0x40000
    packages = "fonts-noto-cjk" if is_chinese else "fonts-noto-core fonts-noto-cjk"
    logger.warning(
        "images: no font has %r (U+%04X); expected one that has all characters of your texts. A box is drawn instead."
        " Install %s (Debian, Ubuntu), or the Noto fonts of your system",
        char,
        ord(char),
        packages,
    )
