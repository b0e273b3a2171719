"""Changes to good input that real tools, disks and attackers make, and limits of time and memory."""

from __future__ import annotations

import copy
import json
import random
import re
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PATHS = (
    "../secret.jpg",
    "sub/../../secret.jpg",
    "link.jpg",
    "linked/secret.jpg",
    "/etc/passwd",
    "C:\\photos\\a.jpg",
    "\\\\server\\a.jpg",
    "a\0.jpg",
    "x" * 300 + ".jpg",
    "sub/" * 2000 + "a.jpg",
    ".",
    "..",
    "/",
    "sub",
    "pipe.jpg",
    "http://[::1/a.jpg",
    "https://example.org/../%2e%2e/secret.jpg",
    "pipe:cat /etc/passwd",
)
"""Of images: tests put secret.jpg beside the folder, links to it and a pipe into it."""
TEXTS = (
    *PATHS,
    "",
    " \n\t",
    "nan",
    "x" * 100_000,
    "1" * 100_000,
    " " * 100_000,
    "狗" * 5_000,
    "dog " * 5_000,
    "[[000,000,999,999]]",
    "[[*]]",
    "<box>(1,2)" + " " * 100_000 + "</box>",
    "(1,2)" + " " * 100_000,
    "<img>" * 5_000,
    "[[" * 50_000,
    "<ref>",
    "<ref-object><bbox>",
    "\ud800",
    '{"ref": ["\\ud800"], "bbox": []}',
    "\N{RIGHT-TO-LEFT OVERRIDE}dog\x07\x00",
    "e\u0301",
)
NUMBERS = (0, -0.0, -1, 1, 2**31, 2**63, 2**64, 10**400, 1e308, -1e308, 5e-324, 0.5, float("nan"), float("inf"))
_RAW = ("1e400", "-1e400", "NaN", "9" * 5000, '"\xff"', "'a'", "", "{", "]", "0x10", "\\ud800", "tru")
"""JSON as text, or nearly so."""
JUNK = (
    b"",
    b"\0",
    b"\xff",
    b"\xb9\xb7",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\r",
    b"\n",
    b"\n\n\n",
    b"\t",
    b'"',
    b'""',
    b"'",
    b",",
    b";",
    b":",
    b"{",
    b"}",
    b"[",
    b"]",
    b"<",
    b">",
    b"&x;",
    b"<![CDATA[",
    b'<!DOCTYPE a [<!ENTITY x "y">]>',
    b"NaN",
    b"-",
    b"1e400",
    b"null",
    b"true",
    b"../",
    b"/",
    b"\\ud800",
    b"\xe7\x8b",
    b"9" * 400,
    b"9" * 5000,
    b"[" * 2000,
    b'{"a":' * 900,
    b"x" * 200_000,
)


class Hang(BaseException):
    """Signal that the time is over; not an Exception, so that nothing that is tested catches it."""


@contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Raise Hang after that many seconds of CPU time; waiting for other processes does not count."""

    def stop(*_: object) -> None:
        raise Hang(f"more than {seconds} s for one input")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextmanager
def memory_limit(num_bytes: int) -> Iterator[None]:
    """Allow `num_bytes` more than now; beyond that Python raises MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def mutate_json(rng: random.Random, value: Any) -> bytes:
    """Delete, double, move, rename or replace parts of the value; sometimes change its bytes, too."""
    data = _to_json(mutated_value(rng, value), ascii_only=rng.random() < 0.5)
    return mutate_bytes(rng, data) if rng.random() < 0.15 else data


def deepened(rng: random.Random, value: Any, depth: int) -> bytes:
    """Return `value` as JSON, with lists or objects nested `depth` times at one place."""
    root = [copy.deepcopy(value)]
    container, key = rng.choice(list(_places(root)))
    container[key] = f"@deep{rng.choice('[{')}{depth}@"
    return _to_json(root[0], ascii_only=True)


def _to_json(value: Any, *, ascii_only: bool) -> bytes:
    data = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    return re.sub(rb'"@(raw|deep\[|deep{)([0-9]+)@"', _as_raw, data)


def _as_raw(match: re.Match[bytes]) -> bytes:
    """Return the bytes that `odd_value` cannot express as a Python value."""
    kind, number = match[1], int(match[2])
    if kind == b"raw":
        return _RAW[number].encode("latin-1")
    return b"[" * number + b"]" * number if kind == b"deep[" else b'{"a":' * number + b"1" + b"}" * number


def mutated_value(rng: random.Random, value: Any) -> Any:
    """Return a changed copy."""
    root = [copy.deepcopy(value)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(root))
        if places:
            rng.choice(_CHANGES)(rng, *rng.choice(places))
    return root[0] if root else None


def mutate_text(rng: random.Random, data: bytes) -> bytes:
    """Change numbers, words and lines of XML, CSV or other text, and then perhaps bytes."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        kind = rng.random()
        if kind < 0.35:
            data = _replace_match(rng, rb"-?[0-9.]+", data, _odd_text(rng, numbers=True))
        elif kind < 0.6:
            data = _replace_match(rng, rb"[A-Za-z_][\w./-]*", data, _odd_text(rng, numbers=False))
        elif kind < 0.85:
            lines = data.split(b"\n")
            i = rng.randrange(len(lines))
            lines[i : i + rng.randrange(3)] = rng.choices(lines, k=rng.randrange(3))
            data = b"\n".join(lines)
        else:
            data = mutate_bytes(rng, data)
    return data


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flip bits, insert junk, lose, double or zero stretches, cut off the end, or encode the whole differently."""
    kind = rng.random()
    if kind < 0.05:
        return rng.choice((b"", b"\0" * len(data), b"\xef\xbb\xbf" + data, data.replace(b"\n", b"\r\n"), data * 2))
    if kind < 0.08:
        return data.decode("utf-8", "replace").encode("utf-16")
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        start = rng.randrange(len(changed) + 1)
        end = min(len(changed), start + rng.choice((0, 1, 2, 8, 64, 512)))
        kind = rng.random()
        if kind < 0.3 and start < len(changed):
            changed[start] ^= 1 << rng.randrange(8)
        elif kind < 0.6:
            changed[start:end] = rng.choice(JUNK)
        elif kind < 0.7:
            del changed[start:end]
        elif kind < 0.8:
            changed[start:start] = changed[start:end] * 3
        elif kind < 0.9:
            changed[start:end] = bytes(end - start)
        else:
            del changed[start:]
    return bytes(changed)


def odd_value(rng: random.Random) -> Any:
    """Return what a JSON value may be instead of the right one."""
    kind = rng.random()
    if kind < 0.3:
        return rng.choice(NUMBERS)
    if kind < 0.6:
        return rng.choice(TEXTS)
    if kind < 0.7:
        return f"@raw{rng.randrange(len(_RAW))}@"
    if kind < 0.8:
        return f"@deep{rng.choice('[{')}{rng.choice((3, 60, 300, 3000))}@"
    return rng.choice((None, True, False, [], {}, [[]], [{}], {"": None}, [1, 2, 3, 4], [None] * 1000))


def _places(root: list[Any]) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key or index) of everything below."""
    waiting: list[Any] = [root]
    while waiting:
        container = waiting.pop()
        items = list(container.items()) if isinstance(container, dict) else list(enumerate(container))
        for key, value in items:
            yield container, key
            if isinstance(value, (dict, list)):
                waiting.append(value)


def _replace(rng: random.Random, container: Any, key: Any) -> None:
    container[key] = odd_value(rng)


def _delete(rng: random.Random, container: Any, key: Any) -> None:
    del container[key]


def _rename(rng: random.Random, container: Any, key: Any) -> None:
    value = container[key]
    if isinstance(container, dict):
        del container[key]
        container[rng.choice((str(key).upper(), f"{key} ", "", *container, "\ud800"))] = value
    else:
        container[key] = {"value": value}


def _double(rng: random.Random, container: Any, key: Any) -> None:
    if isinstance(container, list):
        container[key:key] = [copy.deepcopy(container[key])] * rng.choice((1, 2, 50))
    else:
        container[f"{key}2"] = copy.deepcopy(container[key])


def _swap(rng: random.Random, container: Any, key: Any) -> None:
    other = rng.choice(list(container) if isinstance(container, dict) else range(len(container)))
    container[key], container[other] = container[other], container[key]


def _wrap(rng: random.Random, container: Any, key: Any) -> None:
    value = container[key]
    container[key] = rng.choice(([value], {"a": value}, str(value), [value] * 4))


def _nudge(rng: random.Random, container: Any, key: Any) -> None:
    """Replace a number or text by one that is nearly right."""
    value = container[key]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        container[key] = rng.choice((-value, value * 1000, value // 7, value + 1, str(value)))
    elif isinstance(value, str):
        container[key] = rng.choice((value + " ", value.upper(), value[:-1], value * 2, f"./{value}", value[::-1]))
    else:
        container[key] = odd_value(rng)


_CHANGES: tuple[Callable[[random.Random, Any, Any], None], ...] = (
    _replace,
    _replace,
    _replace,
    _delete,
    _rename,
    _double,
    _swap,
    _wrap,
    _nudge,
    _nudge,
)


def _replace_match(rng: random.Random, pattern: bytes, data: bytes, new: bytes) -> bytes:
    found = list(re.finditer(pattern, data))
    if not found:
        return data + new
    match = rng.choice(found)
    return data[: match.start()] + new + data[match.end() :]


def _odd_text(rng: random.Random, *, numbers: bool) -> bytes:
    if numbers and rng.random() < 0.8:
        return str(rng.choice((*NUMBERS[:7], "1e400", "nan", "inf", "", "1,5", "1 2", "9" * 400, "0x1", "１"))).encode()
    return rng.choice(TEXTS).encode("utf-8", "surrogatepass")
