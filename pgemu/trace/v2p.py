"""Translations that were recorded beside a program's accesses: DynamoRIO's v2p.textproto."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pgemu.errors import InputError
from pgemu.trace.source import open_source

__all__ = ("NAME", "beside", "merged", "read_v2p", "table")

NAME = "v2p.textproto"

Translations = npt.NDArray[np.uint64]

_FOLDERS = (".", "aux", "../aux", "../raw")
"""Where drmemtrace and the public traces have it, seen from a trace's folder."""
_TOKEN = re.compile(r"""\s+|\#.*|(?P<name>[A-Za-z_]\w*)|(?P<number>0[xX][0-9A-Fa-f]+|[0-9]+)
    |(?P<sign>[:{}<>;,])|(?P<text>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')|(?P<other>.)""", re.VERBOSE)  # fmt: skip
_OPENS, _CLOSES = {"{": "}", "<": ">"}, {"}", ">"}
_GROUP, _MAPPING, _SIZE = "address_mapping_group", "address_mapping", "page_size"
_VIRTUAL, _PHYSICAL = "virtual_address", "physical_address"
_FIELDS = {(_GROUP,): (_SIZE,), (_GROUP, _MAPPING): (_VIRTUAL, _PHYSICAL)}
_LEAST, _MOST = 1 << 12, 1 << 30  # bytes of a page
_DEEPEST = 16
_EXPECTED = f"{_GROUP} {{ {_SIZE}: ... {_MAPPING} {{ {_VIRTUAL}: ... {_PHYSICAL}: ... }} }}"


def read_v2p(path: str | os.PathLike[str]) -> Translations:
    """Read the translations of a text file of protobuf; it may be compressed, and have groups of several page sizes.

    :returns: uint64[n, 3], first virtual address, first physical one, bytes of the page; by virtual address
    :raises InputError: unreadable, no translations, or a line that is none of them, with its number
    """
    name = os.fspath(path)
    rows: list[tuple[int, int, int]] = []
    for line, size, pages in _groups(_tokens(name), name):
        if size is None:
            raise InputError(f"a group without {_SIZE}, expected {_EXPECTED}", name, line)
        if size & size - 1 or not _LEAST <= size <= _MOST:
            raise InputError(f"{_SIZE} {size}, expected a power of two from {_LEAST} to {_MOST}", name, line)
        for at, virtual, physical in pages:
            if (virtual | physical) % size:
                what = f"{virtual:#x} at {physical:#x}, expected multiples of {_SIZE} {size:#x}"
                raise InputError(what, name, at)
            rows.append((virtual, physical, size))
    if not rows:
        raise InputError(f"no translation in it, expected {_EXPECTED}", name)
    return table(rows, name)


def table(rows: Iterable[tuple[int, int, int]], name: str) -> Translations:
    """The rows as an array, by virtual address, each once.

    :raises InputError: two that translate the same address to different ones
    """
    found = np.array(sorted(set(rows)), np.uint64).reshape(-1, 3)
    overlaps = np.flatnonzero(found[:-1, 0] + (found[:-1, 2] - np.uint64(1)) >= found[1:, 0])
    if overlaps.size:
        virtual = int(found[overlaps[0] + 1, 0])
        raise InputError(f"virtual address {virtual:#x} is translated twice, expected once", name)
    return found


def merged(first: Translations | None, more: Translations) -> Translations:
    """Both, without those of `more` that reach what `first` has."""
    if first is None or not len(first):
        return more
    one = np.uint64(1)
    last = first[:, 0] + (first[:, 2] - one)
    place = np.searchsorted(last, more[:, 0])  # the first translation that ends at or behind it
    begins = first[np.minimum(place, len(first) - 1), 0]
    free = (place == len(first)) | (begins > more[:, 0] + (more[:, 2] - one))
    both = np.concatenate([first, more[free]])
    found: Translations = both[np.argsort(both[:, 0])]
    return found


def beside(trace: str) -> str | None:
    """The file of translations that lies beside a trace, if one does."""
    folder = Path(trace).parent
    return next((str(path) for other in _FOLDERS if (path := folder / other / NAME).is_file()), None)


def _tokens(name: str) -> Iterator[tuple[int, str, str]]:
    """Line, kind and text of each token."""
    line = 0
    for block in open_source(name, _EXPECTED).blocks():
        for text in block.split("\n")[: None if not block.endswith("\n") else -1]:
            line += 1
            for found in _TOKEN.finditer(text):
                if found.lastgroup == "other":
                    raise InputError(f"{text[:80]!r}, expected {_EXPECTED}", name, line)
                if found.lastgroup:
                    yield line, found.lastgroup, found.group()


def _groups(
    tokens: Iterator[tuple[int, str, str]], name: str
) -> Iterator[tuple[int, int | None, list[tuple[int, int, int]]]]:
    """Line of the end, page size and (line, virtual, physical) of the mappings of each group."""
    ends: list[str] = []  # what ends each message that is open
    within: tuple[str, ...] = ()  # their names
    field = ""
    size: int | None = None
    pages: list[tuple[int, int, int]] = []
    values: dict[str, int] = {}
    line = 0
    for line, kind, text in tokens:
        if kind == "sign" and text in _OPENS:
            if not field or len(ends) == _DEEPEST:
                raise InputError(f"{text!r} without a name, or too deep, expected {_EXPECTED}", name, line)
            ends.append(_OPENS[text])
            within, field, values = (*within, field), "", {}
        elif text in _CLOSES:
            if not ends or ends.pop() != text or field:
                raise InputError(f"{text!r} where nothing ends, expected {_EXPECTED}", name, line)
            if within == (_GROUP, _MAPPING):  # a field of protobuf that is not there is 0
                pages.append((line, values.get(_VIRTUAL, 0), values.get(_PHYSICAL, 0)))
            elif within == (_GROUP,):
                yield line, size, pages
                size, pages = None, []
            within = within[:-1]
        elif kind == "name" and not field:
            field = text
        elif kind in ("number", "text", "name"):
            if not field:
                raise InputError(f"{text[:80]!r} without a name, expected {_EXPECTED}", name, line)
            if field in _FIELDS.get(within, ()):
                value = _number(text, kind, field, name, line)
                size, values[field] = (value, 0) if field == _SIZE else (size, value)
            field = ""
    if within or field:
        raise InputError(f"truncated: {within[-1] if within else field} does not end", name, line)


def _number(text: str, kind: str, field: str, name: str, line: int) -> int:
    base = 16 if text[:2] in ("0x", "0X") else 8 if text.startswith("0") else 10
    if kind == "number" and len(text) <= 24 and not (base == 8 and set(text) & {"8", "9"}):
        value = int(text, base)
        if value < 1 << 64:
            return value
    raise InputError(f"{field} {text[:80]!r}, expected a number of at most 64 bits", name, line)
