"""Open CSV files of any encoding that spreadsheets write, and the class names of OpenImages."""

from __future__ import annotations

import codecs
import csv
import re
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import BinaryIO

from cogvlm_ft.errors import DataError
from cogvlm_ft.plain_files import open_regular, read_file
from cogvlm_ft.shards.formats.encodings import decode_text
from cogvlm_ft.shards.packing.candidates import Problem, Rejected

MAX_LINE_BYTES = 2**20
_HEAD_BYTES = 2**16
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_COMMON = 0.9
"""Minimum fraction of characters in GB2312 for a text to count as Chinese."""


def first_line(path: Path) -> str:
    """Return the first line of the file, empty if there is none. UTF-16 is known by its byte order mark."""
    with suppress(OSError):
        if path.is_file():
            with path.open("rb") as file:
                head = file.read(_HEAD_BYTES)
            is_utf16 = head[:2] in _UTF16
            text = head.decode("utf-16", "replace") if is_utf16 else head.decode("utf-8-sig", "surrogateescape")
            return re.split("[\r\n]", text, maxsplit=1)[0]
    return ""


def open_utf8(path: Path, stack: ExitStack) -> tuple[BinaryIO, tuple[Problem, ...]]:
    """Return the file in UTF-8, after a byte order mark, with notes; as a temporary copy if it is in another encoding.

    Raises DataError if it is in none.
    """
    file: BinaryIO = stack.enter_context(open_regular(path))
    notes: tuple[Problem, ...] = ()
    if _may_be_other(file):
        file.seek(0)
        try:
            decoded = decode_text(file.read())
        except Rejected as rejected:
            raise DataError(f"{path}: {rejected.detail}") from None
        file = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        file.write(decoded.text.encode())
        notes = decoded.notes(path.name)
    file = _with_line_feeds(file, stack)
    file.seek(0)
    if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
        file.seek(0)
    return file, notes


def _with_line_feeds(file: BinaryIO, stack: ExitStack) -> BinaryIO:
    """Return the file, or a temporary copy if its lines end with carriage returns only, as spreadsheets offer."""
    file.seek(0)
    head = file.read(_HEAD_BYTES)
    if b"\n" in head or b"\r" not in head:
        return file
    copy = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
    copy.write(head.replace(b"\r", b"\n"))
    while data := file.read(_HEAD_BYTES):
        copy.write(data.replace(b"\r", b"\n"))
    return copy


def class_names(folder: Path) -> dict[str, str]:
    """Return the names of OpenImages' codes from the files of descriptions in the folder. Raises DataError."""
    names: dict[str, str] = {}
    for path in sorted(folder.glob("*class-descriptions*.csv")):
        text = read_file(path).decode("utf-8-sig", "replace") if path.is_file() else ""
        rows = csv.reader(text.splitlines())
        names.update((row[0], row[1]) for row in rows if len(row) == 2 and row[1].strip())
    if not names:
        expected = "OpenImages' class-descriptions-boxable.csv in the same folder"
        raise DataError(f"{folder}: LabelName has codes such as /m/01g317; expected {expected}. Put it there.")
    return names


def _may_be_other(file: BinaryIO) -> bool:
    """Return whether it is UTF-16, or the lines beyond ASCII may be in GBK.

    One line that can only be UTF-8, or that is neither, means that the others are damaged.
    """
    if file.read(2) in _UTF16:
        return True
    file.seek(0)
    is_possible = False
    while line := file.readline(MAX_LINE_BYTES):
        if line.isascii():
            continue
        try:
            text = line.decode("utf-8-sig")
        except UnicodeDecodeError:
            if not _is_gbk(line):
                return False
        else:
            if max(text, default="") >= "\u0800":
                return False
        is_possible = True
    return is_possible


def _is_gbk(line: bytes) -> bool:
    """Return whether the text is common Chinese, which text of another encoding hardly ever is in GBK."""
    try:
        foreign = "".join(char for char in line.decode("gbk") if not char.isascii())
    except UnicodeDecodeError:
        return False
    return len(foreign.encode("gb2312", "ignore").decode("gb2312")) >= _COMMON * len(foreign)
