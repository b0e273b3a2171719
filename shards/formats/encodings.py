"""Decode annotation files: as they state, as UTF-8, or as GB18030, which contains GBK and GB2312."""

from __future__ import annotations

import codecs
import re
import unicodedata
from typing import NamedTuple

from cogvlm_ft.shards.packing.candidates import Problem, Rejected

_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
_STATED = re.compile(rb"""<\?xml[^>]{0,200}?\bencoding\s*=\s*["']([A-Za-z0-9._:-]{1,40})["']""")
_KNOWN = re.compile("utf_8|utf_16|gb|hz|big5|shift_jis|cp[0-9]|euc_|iso8859|latin|koi8|ascii|johab|mac_")
_GUESS = "gb18030"
_CERTAIN = re.compile("[\u0800-\U0010ffff]")
"""Three or more bytes of UTF-8 are not valid by chance."""
_PRIVATE = re.compile("[\ue000-\uf8ff]")
_KANA = re.compile("[\u3041-\u30fe]")
_BETWEEN_LETTERS = re.compile(r"(?:[A-Za-z]+[^\x00-\x7f])+[A-Za-z]+")
_BETWEEN_WORDS = re.compile(r"""[\r\n\t,;:\[\]{}()'"<>|=/#-]+""")


class Decoded(NamedTuple):
    """The text of a file. guess: the encoding, if neither the file nor the rule (UTF-8) states it."""

    text: str
    guess: str | None = None

    def notes(self, source: str) -> tuple[Problem, ...]:
        """Return the note about a guess, if any."""
        if self.guess is None:
            return ()
        detail = f"read as {self.guess}; expected UTF-8 or a correct statement. Convert it to UTF-8 if names are wrong."
        return (Problem("note", "encoding_guessed", detail, source),)


def decode_text(data: bytes, stated: str | None = None) -> Decoded:
    """Decode the bytes. Raises Rejected if they are in no known encoding.

    stated: the encoding that the file names itself. Text that can only be UTF-8 is read as such in any case.
    """
    for bom, name in _BOMS:
        if data.startswith(bom):
            return Decoded(_decoded(data[len(bom) :], name) or "")
    utf8 = _decoded(data, "utf-8")
    if utf8 is not None and (utf8.isascii() or _CERTAIN.search(utf8)):
        differs = stated is not None and not utf8.isascii() and _codec(stated) != "utf-8"
        return Decoded(utf8, "utf-8" if differs else None)
    codec = _codec(stated) if stated else None
    as_stated = _decoded(data, codec) if codec else None
    if as_stated is not None:
        return Decoded(as_stated)
    if utf8 is not None and not _is_doubtful(utf8):
        return Decoded(utf8)
    guessed = _decoded(data, _GUESS)
    if guessed is not None and _is_latin(guessed):
        raise Rejected(
            "sample", "not_utf8", f"{_first_foreign(guessed)!r:.80} in GBK, perhaps Latin-1. Convert the file to UTF-8."
        )
    if guessed is not None and _is_other_asian(data, guessed):
        found = f"{_first_foreign(guessed)!r:.80} in GBK, perhaps Shift-JIS or Big5"
        raise Rejected("sample", "not_utf8", f"{found}. Convert the file to UTF-8.")
    if guessed is not None:
        return Decoded(guessed, _GUESS)
    if utf8 is not None:
        return Decoded(utf8)
    raise Rejected("sample", "not_utf8", "neither UTF-8 nor GBK. Convert the file to UTF-8.")


def decode_xml(data: bytes) -> Decoded:
    """Decode XML by its declaration. Raises Rejected."""
    for start, name in ((b"<\0", "utf-16-le"), (b"\0<", "utf-16-be")):
        if data.startswith(start):
            return Decoded(_decoded(data, name) or "")
    stated = _STATED.match(data.removeprefix(codecs.BOM_UTF8).lstrip())
    return decode_text(data, stated[1].decode() if stated else None)


def _codec(stated: str) -> str | None:
    """Return Python's name of a character encoding, or None. The GB encodings are all read as the largest one."""
    try:
        name = codecs.lookup(stated).name.replace("-", "_")
    except (LookupError, ValueError):
        return None
    if not _KNOWN.match(name):  # not a character encoding, or one that nobody writes
        return None
    return _GUESS if name.startswith("gb") else name.replace("_", "-")


def _decoded(data: bytes, codec: str) -> str | None:
    try:
        return data.decode(codec)
    except (UnicodeError, LookupError):
        return None


def _words(text: str) -> list[str]:
    """Return the words that are not ASCII."""
    return [word for part in _BETWEEN_WORDS.split(text) for word in part.split() if not word.isascii()]


def _is_latin(text: str) -> bool:
    """Return whether text read as GBK is more likely Latin-1: Mädchen becomes M鋎chen, with rare characters.

    All its Chinese is inside words of ASCII letters, and most of it is outside GB2312 or one character between letters.
    """
    words = _words(text)
    foreign = [char for word in words for char in word if not char.isascii()]
    num_common = sum(_encodes(char, "gb2312") for char in foreign)
    has_letters = all(any(char.isascii() and char.isalpha() for char in word) for word in words)
    return has_letters and (2 * num_common < len(foreign) or all(map(_BETWEEN_LETTERS.fullmatch, words)))


def _is_other_asian(data: bytes, text: str) -> bool:
    """Return whether text read as GBK is surely something else: private characters, or rare ones for Japanese kana."""
    if _PRIVATE.search(text):
        return True
    foreign = [char for char in text if not char.isascii()]
    is_rare = len(foreign) > 1 and not any(_encodes(char, "gb2312") for char in foreign)
    return is_rare and _KANA.search(_decoded(data, "cp932") or "") is not None


def _first_foreign(text: str) -> str:
    return next(iter(_words(text)), "")


def _encodes(char: str, codec: str) -> bool:
    try:
        return bool(char.encode(codec))
    except UnicodeError:
        return False


def _is_doubtful(text: str) -> bool:
    """Return whether valid UTF-8 is more likely GBK, where the bytes of 猫 are those of è in UTF-8."""
    words = [word for word in _BETWEEN_WORDS.split(text) if not word.isascii()]
    foreign = "".join(char for word in words for char in word if not char.isascii())
    hanzi = _decoded(foreign.encode(), "gb2312")
    if hanzi is None or not all("\u4e00" <= char <= "\u9fff" for char in hanzi):
        return False
    return not all(map(_is_word, words))


def _is_word(text: str) -> bool:
    """Return whether a name with letters beyond ASCII, but none beyond U+07FF, may be written like this.

    Words in Latin script have ASCII letters too; other words are in one script.
    """
    if any(char.isascii() and char.isalpha() for char in text):
        return True
    foreign = [char for char in text if not char.isascii()]
    if any(char.isdigit() for char in text) and not any(map(str.isalpha, foreign)):
        return True  # 90°
    scripts = {unicodedata.name(char, "").partition(" ")[0] for char in foreign}
    return len(scripts) == 1 and scripts <= {"GREEK", "CYRILLIC", "ARMENIAN", "HEBREW", "ARABIC"}
