"""Read a pickle that holds only plain lists, tuples, dicts, strings, numbers and None; refuse every other file.

A pickle is a program for a stack machine, and Python's reader executes it. Before it does, every instruction of the
file is compared with a list of those that make plain values. None of them imports, calls or rebuilds anything.
"""

from __future__ import annotations

import codecs
import pickle  # the only module that may: see _check_instructions
import pickletools
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NoReturn

from cogvlm_ft.errors import DataError
from cogvlm_ft.plain_files import read_bytes

MAX_BYTES = 2**29
MAX_MEMORY_BYTES = 2**30
"""Maximum memory for the values and for checking them. RefCOCO's files need about a third of it."""
MAX_DEPTH = 20
_MAX_NUMBER_BITS = 128
_OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
_BYTE_STRINGS = {"STRING", "BINSTRING", "SHORT_BINSTRING"}  # of Python 2
_TEXTS = {"UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"} | _BYTE_STRINGS
_PUTS, _GETS = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}, {"GET", "BINGET", "LONG_BINGET"}
_NUMBERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
_LISTS = {"EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
_DICTS = {"EMPTY_DICT", "DICT", "SETITEM", "SETITEMS"}
_OTHERS = {"NONE", "NEWTRUE", "NEWFALSE", "MARK", "POP", "POP_MARK", "DUP", "PROTO", "FRAME", "STOP"}
_INSTRUCTION_BYTES, _CONTAINER_BYTES, _GROWTH_BYTES = 64, 64, 120  # a place in the stack and in a container
_CONTAINERS = (_LISTS | _DICTS) - {"APPEND", "APPENDS", "SETITEM", "SETITEMS"}
_GROWING = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "DICT"}
_ALLOWED = _TEXTS | _PUTS | _GETS | _NUMBERS | _LISTS | _DICTS | _OTHERS


class _RefusedError(ValueError):
    """The file is damaged, or holds more than plain values."""


class _PlainUnpickler(pickle.Unpickler):
    """A second barrier: the instructions that would call these methods are refused before."""

    def find_class(self, module_name: str, global_name: str) -> NoReturn:
        raise _RefusedError(f"it imports {module_name}.{global_name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise _RefusedError("it refers to an object outside the file")


def load_plain_pickle(path: Path) -> Any:
    """Return the value in the file; strings of Python 2 are decoded as UTF-8, their other bytes as Latin-1.

    Raises DataError for anything but plain values, and for values that are endless or far larger than the file.
    """
    codecs.register_error(f"{__name__}.latin-1", _decode_latin_1)
    try:
        num_bytes = path.stat().st_size
        if num_bytes > MAX_BYTES:
            raise _RefusedError(f"{num_bytes} bytes; expected at most {MAX_BYTES}")
        data = read_bytes(path, MAX_BYTES)
        num_steps = _check_instructions(data)
        value = _PlainUnpickler(BytesIO(data), encoding="utf-8", errors=f"{__name__}.latin-1").load()
        _check_extent(value, num_steps)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # a damaged pickle raises nearly any kind
        expected = "expected a pickle of plain lists, dicts, strings and numbers, as RefCOCO publishes it"
        raise DataError(f"{path} is refused: {error}; {expected}") from None
    return value


def _decode_latin_1(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return error.object[error.start : error.end].decode("latin-1"), error.end


def _instructions(data: bytes) -> Iterator[tuple[pickletools.OpcodeInfo, Any]]:
    """Yield the allowed instructions up to STOP with their arguments; raises ValueError at any other.

    Like pickletools.genops, which cannot be used: it fails on strings of Python 2 that are not ASCII.
    """
    stream, opcode = BytesIO(data), None
    while opcode is None or opcode.name != "STOP":
        code = stream.read(1)
        opcode = _OPCODES.get(code)
        if opcode is None or opcode.name not in _ALLOWED:
            name = opcode.name if opcode else repr(code)
            found = f"instruction {name} at byte {stream.tell() - 1}; plain values do not need it"
            raise _RefusedError(found if code else "it ends without STOP")
        if opcode.name == "STRING":
            yield opcode, stream.readline()
        else:
            yield opcode, opcode.arg.reader(stream) if opcode.arg else None


def _check_instructions(data: bytes) -> int:
    """Return the number of instructions; raises ValueError if it is not safe to execute them.

    Besides the list of instructions, four things are checked that would exhaust memory, time or the C stack: the bytes
    of all values, large memo positions (the memo is an array), large numbers, and dict keys that are not strings
    (hashing deep tuples recurses, and numbers can be chosen to collide). For the keys the stack is followed: True is a
    string, None a mark.
    """
    stack: list[bool | None] = []
    memo: dict[int, bool] = {}
    num_steps = num_bytes = 0
    for opcode, argument in _instructions(data):
        num_steps += 1
        num_bytes += _most_bytes(opcode.name, argument)
        if num_bytes > MAX_MEMORY_BYTES:
            raise _RefusedError(f"its values need more than {MAX_MEMORY_BYTES} bytes of memory")
        if opcode.name in _PUTS:
            position = len(memo) if argument is None else argument
            if not 0 <= position <= num_steps:
                raise _RefusedError(f"memo position {position}; expected at most {num_steps}")
            memo[position] = _top(stack)
        elif opcode.name in _GETS:
            if argument not in memo:
                raise _RefusedError(f"it refers to value {argument}, which was never stored")
            stack.append(memo[argument])
        else:
            if isinstance(argument, int) and opcode.name in _NUMBERS and argument.bit_length() > _MAX_NUMBER_BITS:
                raise _RefusedError(f"a number of {argument.bit_length()} bits; expected at most {_MAX_NUMBER_BITS}")
            if not all(_pop_arguments(opcode, stack)):
                raise _RefusedError("a dict key is not a string")
            pushed = None if opcode.name == "MARK" else opcode.name in _TEXTS
            stack += [pushed] * len(opcode.stack_after)
    return num_steps


def _most_bytes(name: str, argument: Any) -> int:
    """Return the most memory that an instruction takes, here and in the reader."""
    num_bytes = _INSTRUCTION_BYTES
    if name in _TEXTS:  # a character of a byte string may become one of four bytes
        num_bytes += 4 * len(argument) if name in _BYTE_STRINGS else sys.getsizeof(argument)
    elif name in _CONTAINERS:
        num_bytes += _CONTAINER_BYTES
    elif name in _PUTS:
        num_bytes += _GROWTH_BYTES  # of the memo
    return num_bytes + (_GROWTH_BYTES if name in _GROWING else 0)


def _pop_arguments(opcode: pickletools.OpcodeInfo, stack: list[bool | None]) -> list[bool]:
    """Remove the values that the instruction takes; return those that become dict keys."""
    values, num_values = list[bool](), len(opcode.stack_before)
    if pickletools.markobject in opcode.stack_before:
        num_values = opcode.stack_before.index(pickletools.markobject)
        while stack and stack[-1] is not None:
            values.append(_top(stack))
            stack.pop()
        if not stack:
            raise _RefusedError(f"{opcode.name} without MARK")
        stack.pop()
    keys = values[1::2] if opcode.name in ("SETITEMS", "DICT") else []
    for _ in range(num_values):
        values.append(_top(stack))
        stack.pop()
    return values[1:2] if opcode.name == "SETITEM" else keys


def _top(stack: list[bool | None]) -> bool:
    if not stack or stack[-1] is None:
        raise _RefusedError("an instruction takes a value and there is none")
    return stack[-1]


def _check_extent(value: Any, num_steps: int) -> None:
    """Refuse a value that contains others many times over: a short file can describe an endless value."""
    level, num_values = [value], 1
    for _ in range(MAX_DEPTH):
        containers = [each for each in level if isinstance(each, (list, tuple, dict))]
        if not containers:
            return
        num_values += sum(map(len, containers))
        if num_values > 4 * num_steps:
            raise _RefusedError("its values contain each other over and over")
        level = [part for each in containers for part in (each.values() if isinstance(each, dict) else each)]
    raise _RefusedError(f"its values are nested more than {MAX_DEPTH} deep")
