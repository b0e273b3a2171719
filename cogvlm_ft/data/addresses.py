"""Addresses of shards: which may be opened, their parts, and how they are shown without secrets."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit, urlunsplit

from cogvlm_ft.errors import DataError

SCHEMES = ("http", "https", "gs", "s3", "hf", "ais")
COMMAND = "pipe:"

_LOST_SLASH = re.compile(rf"({'|'.join(SCHEMES)}):/?[^/].*", re.IGNORECASE)
_USER = re.compile(r"//[^/@\s]*@")
_QUERY = re.compile(r"\?[^\s'\")]+")
_PACKED = r"tgz|tbz2?|txz|tzst|tar\.(gz|bz2?|xz|lzma|lz4?|lzo|zst|br|z|sz)"
_TAR = re.compile(rf".*\.(tar|{_PACKED})", re.IGNORECASE)
_COMPRESSED = re.compile(rf".*\.({_PACKED})", re.IGNORECASE)


def is_command(path: str) -> bool:
    """Return True for `pipe:` and a command, whose output is a tar."""
    return path.startswith(COMMAND)


def is_url(path: str) -> bool:
    """Return True for the address of something on a server, False for a local path or a command."""
    return "://" in path and not is_command(path)


def scheme_of(url: str) -> str:
    """Return what stands before the colon."""
    return url.partition(":")[0].lower()


def check_url(url: str) -> None:
    """Raise DataError unless this is an address that may be opened."""
    check_host(url)
    if re.search(r"[\s#\[\]{}*\\]", url):
        hint = "Name every tar, such as train-{000000..000003}.tar" if "*" in url else "Write others as %20, %23, ..."
        raise DataError(f"{shown(url)}: expected an address without blanks and # [ ] {{ }} * \\. {hint}")


def check_host(url: str) -> None:
    """Raise DataError unless scheme, host and port, or bucket, may be asked for. `url` may hold a pattern."""
    scheme = scheme_of(url)
    if scheme not in SCHEMES:
        expected = ", ".join(f"{name}://" for name in SCHEMES)
        raise DataError(f"{shown(url)}: found scheme {scheme!r}; expected a local path or one of {expected}")
    is_store = scheme in ("s3", "gs")
    expected = f"{scheme}://bucket/folder" if is_store else f"{scheme}://host/folder"
    try:
        parts = urlsplit(url)
        is_good = bool(parts.hostname) and (parts.port is None or not is_store)
    except ValueError:  # its text may hold a part of a password
        is_good = False
    if not is_good:
        what = "a bucket" if is_store else "a host with a port of 1 to 65535"
        without_user = re.sub(r"//.*@", "//", url)  # of which a slash may be a part, that ends the host
        raise DataError(f"{shown(without_user)}: found no name of {what}; expected {expected}. Correct the address")
    if is_store and "@" in parts.netloc:
        raise DataError(
            f"{shown(url)}: found a user or password; expected {expected}. Give them in the variables or files of "
            "the store's own tools"
        )


def check_slashes(location: str) -> None:
    """Raise DataError for an address that lost a slash, such as s3:/bucket; it would be taken for a path."""
    if _LOST_SLASH.fullmatch(location):
        raise DataError(
            f"{shown(location)}: found an address without //; expected {scheme_of(location)}://... Correct the address"
        )


def shown(text: str) -> str:
    """Return an address, or a text with addresses, without user names, passwords, queries and commands."""
    if is_command(text):
        return f"{COMMAND}{text[len(COMMAND) :].split(maxsplit=1)[0]} ..." if text[len(COMMAND) :].strip() else text
    return _QUERY.sub("?...", _USER.sub("//", text))


def joined(folder: str, name: str) -> str:
    """Return the address of a file in a folder; a query stays at the end."""
    parts = urlsplit(folder)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def beside(url: str, name: str) -> str:
    """Return the address of a file in the folder of another file."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rpartition('/')[0]}/{name}"))


def name_of(location: str) -> str:
    """Return the last part of a path or address, for people and for keys; without a query."""
    if is_command(location):
        return "pipe"
    if is_url(location):
        location = re.split(r"[?#]", re.sub(r"^[^:]*://[^/?#]*", "", location), maxsplit=1)[0]
    return PurePosixPath(location).name


def is_tar(location: str) -> bool:
    """Return whether this names one tar, compressed or not, rather than a folder."""
    return is_command(location) or _TAR.fullmatch(name_of(location)) is not None


def is_compressed(location: str) -> bool:
    """Return whether the name is that of a compressed tar."""
    return _COMPRESSED.fullmatch(name_of(location)) is not None


def unpacked_name(location: str) -> str:
    """Return a path or address without what compression adds to it: a.tgz and a.tar.gz become a.tar."""
    return re.sub(rf"\.({_PACKED})$", ".tar", location, flags=re.IGNORECASE)


def local_path(location: str) -> str:
    """Return the path in a `file:` address; other addresses with their scheme in small letters."""
    scheme, colon, rest = location.partition(":")
    if not colon or scheme.lower() not in ("file", *SCHEMES):
        return location
    location = f"{scheme.lower()}:{rest}"
    if scheme.lower() != "file":
        return location
    parts = urlsplit(location)
    host = "" if parts.netloc == "localhost" else parts.netloc
    return unquote(host + parts.path)
