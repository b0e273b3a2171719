"""Reads a pickle that holds plain lists, tuples, dicts, strings, numbers and None. It cannot do anything else.

A pickle is a program for a small stack machine, and Python's own reader runs whatever it says. Here only those of its
instructions exist that make plain values: there is none to name, import, call, fetch or rebuild anything, so a file
that asks for it is refused before anything happens.
"""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cogvlm_ft.errors import DataError

MAX_BYTES = 2**29
MAX_DEPTH = 20
_MAX_NUMBER_CHARS = 40
_ONE_CHAR_PUSHES: dict[int, Any] = {ord("N"): None, 0x88: True, 0x89: False}
_REFUSED = {
    **dict.fromkeys(b"ci\x93", "it names Python code to import"),
    **dict.fromkeys(b"Ro\x81\x92b", "it calls or rebuilds a Python object"),
    **dict.fromkeys(b"PQ", "it refers to something outside the file"),
    **dict.fromkeys(b"\x82\x83\x84", "it refers to the extension registry of Python"),
    **dict.fromkeys(b"BC\x8e\x96\x97\x98", "it holds raw bytes"),
    **dict.fromkeys(b"\x8f\x90\x91", "it holds a set"),
}


class _Refused(ValueError):
    """The file is damaged, or asks for more than plain values."""


def load_plain_pickle(path: Path) -> Any:
    """The value that the file holds; strings of Python 2 are read as UTF-8, else Latin-1.

    Raises DataError for anything but plain values, and for values that would be endless or far larger than the file.
    """
    try:
        num_bytes = path.stat().st_size
        if num_bytes > MAX_BYTES:
            raise _Refused(f"{num_bytes} bytes, at most {MAX_BYTES} are read")
        machine = _Machine(path.read_bytes())
        value = machine.run()
        _check_extent(value, machine.num_steps)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, OverflowError) as error:
        wanted = "wanted a pickle of plain lists, dicts, strings and numbers, as RefCOCO publishes it"
        raise DataError(f"{path} is refused: {error}; {wanted}") from None
    return value


class _Machine:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self.num_steps = 0

    def run(self) -> Any:
        """Raises ValueError at the first instruction that is not known here, or that does not fit."""
        while True:
            code = self.take(1)[0]
            self.num_steps += 1
            if code == ord("."):
                return self._pop()
            if code in _ONE_CHAR_PUSHES:
                self._stack.append(_ONE_CHAR_PUSHES[code])
            elif code in _INSTRUCTIONS:
                _INSTRUCTIONS[code](self)
            else:
                why = _REFUSED.get(code, "that is no instruction for plain values")
                raise _Refused(f"byte {self._at - 1} is {bytes([code])!r}: {why}")

    def push_text(self, data: bytes) -> None:
        """A string of Python 2, which does not say what encoding it has."""
        try:
            self._stack.append(data.decode("utf-8"))
        except UnicodeDecodeError:
            self._stack.append(data.decode("latin-1"))

    def push_quoted(self) -> None:
        line = self._line()
        if len(line) < 2 or line[:1] not in b"'\"" or line[:1] != line[-1:]:
            raise _Refused(f"the string before byte {self._at} has no quotes")
        self.push_text(codecs.escape_decode(line[1:-1])[0])  # type: ignore[attr-defined]

    def push_counted(self, num_count_bytes: int) -> None:
        self._stack.append(self.take(self.number(num_count_bytes)).decode("utf-8", "surrogatepass"))

    def push_int(self, num_bytes: int, signed: bool = False) -> None:
        self._stack.append(self.number(num_bytes, signed))

    def push_long(self, num_count_bytes: int) -> None:
        count = self.number(num_count_bytes)
        if count > 16:
            raise _Refused(f"the number before byte {self._at} has {count} bytes")
        self._stack.append(self.number(count, signed=True))

    def push_decimal(self, kind: Callable[[str], Any]) -> None:
        line = self._line()
        if len(line) > _MAX_NUMBER_CHARS:
            raise _Refused(f"the number before byte {self._at} has {len(line)} characters")
        if kind is int and line in (b"00", b"01"):  # how Python 2 writes False and True
            self._stack.append(line == b"01")
        else:
            self._stack.append(kind(line.decode("ascii").removesuffix("L")))

    def push_double(self) -> None:
        self._stack.append(struct.unpack(">d", self.take(8))[0])

    def push_unicode_line(self) -> None:
        self._stack.append(self._line().decode("raw-unicode-escape"))

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def drop(self) -> None:
        self._pop()

    def repeat(self) -> None:
        self._stack.append(self._top())

    def take_tuple(self, count: int) -> None:
        values = [self._pop() for _ in range(count)]
        self._stack.append(tuple(reversed(values)))

    def append(self) -> None:
        value = self._pop()
        self._top_of(list).append(value)

    def extend(self) -> None:
        values = self.since_mark()
        self._top_of(list).extend(values)

    def set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._fill([key, value])

    def set_items(self) -> None:
        self._fill(self.since_mark())

    def new_dict(self) -> None:
        values = self.since_mark()
        self._stack.append({})
        self._fill(values)

    def remember(self, place: int | None = None) -> None:
        self._memo[len(self._memo) if place is None else place] = self._top()

    def recall(self, place: int) -> None:
        if place not in self._memo:
            raise _Refused(f"byte {self._at} refers to value {place}, which was never stored")
        self._stack.append(self._memo[place])

    def since_mark(self) -> list[Any]:
        if not self._marks:
            raise _Refused(f"byte {self._at} closes something that was not opened")
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def skip(self, num_bytes: int) -> None:
        self.take(num_bytes)

    def place(self, num_bytes: int | None) -> int:
        """A place of the memo: a number of so many bytes, or decimal digits on a line."""
        if num_bytes is not None:
            return self.number(num_bytes)
        line = self._line()
        if not line.isdigit() or len(line) > 10:
            raise _Refused(f"byte {self._at} refers to {line[:20]!r}, wanted a number of at most 10 digits")
        return int(line)

    def _fill(self, values: list[Any]) -> None:
        target = self._top_of(dict)
        if len(values) % 2:
            raise _Refused(f"a key without a value before byte {self._at}")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, str):  # numbers can be chosen so that filling the dict takes for ever
                raise _Refused(f"a dict key before byte {self._at} is a {type(key).__name__}, wanted a string")
            target[key] = value

    def take(self, num_bytes: int) -> bytes:
        part = self._data[self._at : self._at + num_bytes]
        if len(part) != num_bytes:
            raise _Refused(f"it ends after {len(self._data)} bytes, in the middle of an instruction")
        self._at += num_bytes
        return part

    def _line(self) -> bytes:
        end = self._data.find(b"\n", self._at)
        if end < 0:
            raise _Refused(f"it ends after {len(self._data)} bytes, in the middle of a line")
        line = self._data[self._at : end]
        self._at = end + 1
        return line.removesuffix(b"\r")

    def number(self, num_bytes: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(num_bytes), "little", signed=signed)

    def _pop(self) -> Any:
        self._top()
        return self._stack.pop()

    def _top(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise _Refused(f"byte {self._at} wants a value and there is none")
        return self._stack[-1]

    def _top_of(self, kind: type) -> Any:
        value = self._top()
        if not isinstance(value, kind):
            raise _Refused(f"byte {self._at} adds to a {type(value).__name__}, wanted a {kind.__name__}")
        return value


_INSTRUCTIONS: dict[int, Callable[[_Machine], None]] = {
    0x80: lambda m: m.skip(1),  # protocol
    0x95: lambda m: m.skip(8),  # frame
    ord("("): _Machine.mark,
    ord("0"): _Machine.drop,
    ord("1"): lambda m: m.since_mark().clear(),
    ord("2"): _Machine.repeat,
    ord("I"): lambda m: m.push_decimal(int),
    ord("L"): lambda m: m.push_decimal(int),
    ord("F"): lambda m: m.push_decimal(float),
    ord("G"): _Machine.push_double,
    ord("J"): lambda m: m.push_int(4, signed=True),
    ord("K"): lambda m: m.push_int(1),
    ord("M"): lambda m: m.push_int(2),
    0x8A: lambda m: m.push_long(1),
    0x8B: lambda m: m.push_long(4),
    ord("S"): _Machine.push_quoted,
    ord("U"): lambda m: m.push_text(m.take(m.number(1))),
    ord("T"): lambda m: m.push_text(m.take(m.number(4))),
    ord("V"): _Machine.push_unicode_line,
    0x8C: lambda m: m.push_counted(1),
    ord("X"): lambda m: m.push_counted(4),
    0x8D: lambda m: m.push_counted(8),
    ord("]"): lambda m: m.push([]),
    ord("}"): lambda m: m.push({}),
    ord(")"): lambda m: m.push(()),
    ord("l"): lambda m: m.push(m.since_mark()),
    ord("t"): lambda m: m.push(tuple(m.since_mark())),
    ord("d"): _Machine.new_dict,
    0x85: lambda m: m.take_tuple(1),
    0x86: lambda m: m.take_tuple(2),
    0x87: lambda m: m.take_tuple(3),
    ord("a"): _Machine.append,
    ord("e"): _Machine.extend,
    ord("s"): _Machine.set_item,
    ord("u"): _Machine.set_items,
    ord("p"): lambda m: m.remember(m.place(None)),
    ord("q"): lambda m: m.remember(m.place(1)),
    ord("r"): lambda m: m.remember(m.place(4)),
    0x94: _Machine.remember,
    ord("g"): lambda m: m.recall(m.place(None)),
    ord("h"): lambda m: m.recall(m.place(1)),
    ord("j"): lambda m: m.recall(m.place(4)),
}


def _check_extent(value: Any, num_steps: int) -> None:
    """A value may hold another one twice, so a short file can stand for an endless value: refuse that."""
    level, num_values = [value], 1
    for _ in range(MAX_DEPTH):
        containers = [each for each in level if isinstance(each, (list, tuple, dict))]
        if not containers:
            return
        num_values += sum(map(len, containers))
        if num_values > 4 * num_steps:
            raise _Refused("its values hold each other over and over")
        level = [part for each in containers for part in (each.values() if isinstance(each, dict) else each)]
    raise _Refused(f"its values are nested more than {MAX_DEPTH} deep")
