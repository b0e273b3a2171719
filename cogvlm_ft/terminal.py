"""Text for terminals and logs: control characters are visible, secrets are hidden, any encoding works."""

from __future__ import annotations

import codecs
import io
import locale
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm

from cogvlm_ft.errors import ConfigError

LOG_FORMAT = "%(levelname)s %(name)s: %(message)s"

# All but tab and newline, and the signs that change the direction of what follows: either could show another text.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_PASSWORD = re.compile(r"(?<=://)[^/\s]*:[^/\s]*@")  # scheme://user:password@host
_QUERY = re.compile(r"(://[^\s'\"?]*)\?[^\s'\"]+")  # scheme://host/path?token=...
LINE_S = 30.0
_AS_LINE = "{desc}: {n_fmt}/{total_fmt}, {rate_fmt}, {elapsed} elapsed, {remaining} left"
_hidden: dict[str, str] = {}


def hide(secret: str, shown_as: str) -> None:
    """Show another text in place of this one from now on, in everything that is printed or logged."""
    _hidden[secret] = shown_as


def plain_text(text: object) -> str:
    """Return a text for people: without hidden values, passwords and queries of addresses; newlines stay.

    Control characters become escapes.
    """
    plain = str(text)
    for secret in sorted(_hidden, key=len, reverse=True):
        plain = plain.replace(secret, _hidden[secret])
    plain = _QUERY.sub(r"\1?...", _PASSWORD.sub("***@", plain))
    return _CONTROLS.sub(_escaped, plain)


def plain_line(text: object) -> str:
    """Return a text as one line."""
    return plain_text(text).replace("\n", "\\n")


def _escaped(found: re.Match[str]) -> str:
    return ascii(found[0])[1:-1]


def say(*parts: object, file: TextIO | None = None, flush: bool = False) -> None:
    """Print parts, separated by blanks, as `plain_text`. Parts from files of others belong into `plain_line` first."""
    print(plain_text(" ".join(map(str, parts))), file=file, flush=flush)


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: `1 photo`, `2 boxes`."""
    ending = "" if number == 1 else "es" if noun.endswith("x") else "s"
    return f"{number} {noun}{ending}"


def prepare_terminal() -> None:
    """Let no character end the program: where the terminal cannot show one, its escape is printed."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.excepthook = _report
    _warn_of_file_names()


def _warn_of_file_names() -> None:
    """Report an encoding of the locale in which a file with a Chinese name counts as unreadable."""
    encoding = sys.getfilesystemencoding()
    try:
        "狗".encode(encoding)
    except UnicodeEncodeError:
        if os.environ.get("RANK", "0") != "0":
            return
        expected = "expected UTF-8. Set PYTHONUTF8=1 where the program is started: export PYTHONUTF8=1"
        say(f"locale: found the encoding {encoding}, in which no file has a Chinese name; {expected}", file=sys.stderr)


def outlive_terminal() -> None:
    """Discard output that cannot be written: a long run must not end because `tee` has, or a log disk is full."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        raw = getattr(getattr(stream, "buffer", None), "raw", None)  # there is none with `python -u`
        if type(stream) is io.TextIOWrapper and stream.fileno() == number and not isinstance(raw, _Lossy):
            with suppress(OSError):
                stream.flush()
            setattr(sys, name, lossy_stream(number, stream.encoding))


def lossy_stream(descriptor: int, encoding: str) -> TextIO:
    """Return a text stream to an open file that writes line by line, and loses what cannot be written."""
    raw = _Lossy(descriptor, "w", closefd=False)
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=True)


class _Lossy(io.FileIO):
    """A file for which it is no error that a write fails, as with EPIPE, EIO or ENOSPC."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return len(memoryview(data).cast("B"))


def check_encoding() -> None:
    """Raise ConfigError where torch fails, since it reads its own UTF-8 files in the encoding of the locale."""
    encoding = locale.getpreferredencoding(False)
    try:
        bytes(range(256)).decode(encoding)  # one byte per character: wrong letters in comments harm nobody
    except UnicodeDecodeError:
        if codecs.lookup(encoding).name != "utf-8":
            raise ConfigError(
                f"locale: found the encoding {encoding}, in which torch cannot read its own files; expected UTF-8. Set "
                "PYTHONUTF8=1 where the program is started: export PYTHONUTF8=1"
            ) from None


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):  # where the program was when Ctrl-C came helps nobody
        print("\ninterrupted", file=sys.stderr)
        return
    print(plain_text("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def start_logging(level: int, form: str = LOG_FORMAT) -> None:
    """Send log lines to stderr as `LogLines`."""
    handler = logging.StreamHandler()
    handler.setFormatter(LogLines(form))
    logging.basicConfig(level=level, handlers=[handler])


def progress_bar(
    work: Iterable[Any] | None = None, *, desc: str, unit: str, total: float | None = None, is_shown: bool | None = None
) -> tqdm:
    """Show n/total, rate and remaining time of work: as a bar in a terminal, elsewhere as a line every 30 s.

    unit: "B" is shown in multiples. is_shown: on rank 0 by default, as the launcher numbers ranks.
    """
    is_shown = os.environ.get("RANK", "0") == "0" if is_shown is None else is_shown
    options: dict[str, Any] = {"unit_scale": unit == "B", "leave": False, "disable": not is_shown}
    if not sys.stderr.isatty():
        options |= {"file": _Lines(), "mininterval": LINE_S, "delay": LINE_S, "miniters": 1, "bar_format": _AS_LINE}
    return tqdm(work, desc=desc, unit=unit, total=total, **options)


class _Lines:
    """A file that makes lines of what tqdm draws in place."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(plain_line(text.strip()) + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


class LogLines(logging.Formatter):
    """Formats records as plain text; further lines of one are indented, so that none looks like another record."""

    def format(self, record: logging.LogRecord) -> str:
        return plain_text(super().format(record)).replace("\n", "\n  ")
