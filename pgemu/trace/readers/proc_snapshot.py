"""A process as /proc shows it: text of maps or smaps, or a zip file of these with its pagemap.

Members of the zip file: `maps`, or `smaps`, or both; `pagemap.u64`, entries of 64 bits, little endian, of the pages of
`pagemap.ranges`, a line "START END" in hexadecimal for each range; `about.json`.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import IO, Any

import numpy as np

from pgemu.errors import InputError, printable
from pgemu.trace.archives import opened_archive
from pgemu.trace.lowered import Lowered
from pgemu.trace.snapshot import Pages, Vma, lowered, parse_vma
from pgemu.trace.source import Match, Source
from pgemu_kernels.words.operations import PAGE_4K

__all__ = ("FORMATS", "read", "sniff")

FORMATS = {"proc-snapshot": "a process as /proc shows it (maps, smaps, or a zip file with its pagemap)"}

_ZIP = b"PK\x03\x04"
_MAPS, _SMAPS, _PAGEMAP, _RANGES, _ABOUT = "maps", "smaps", "pagemap.u64", "pagemap.ranges", "about.json"
_MEMBERS = (_MAPS, _SMAPS, _PAGEMAP, _RANGES, _ABOUT)
_HEADER = re.compile(  # of a member, with the length of its name and that: pkzip's APPNOTE.TXT, 4.3.7
    rb"PK\x03\x04.{22}(..)..(%b)" % b"|".join(re.escape(member.encode()) for member in _MEMBERS), re.DOTALL
)
_FIELD = re.compile(r"(\w+):\s+(?:(\d{1,12}) kB|(.*))")
_RANGE = re.compile(r"(?:0x)?([0-9a-f]{1,16})[ -](?:0x)?([0-9a-f]{1,16})")
_MOST_TEXT = 64 << 20  # bytes of a member that is text
_MOST_PAGES = 1 << 26  # pages that are present, swapped or markers
_CHUNK = 1 << 20  # entries read at once
_SHOWN = 3


def sniff(head: bytes) -> Match:
    """A zip file with one of these among its first members, or text that begins with a line of maps."""
    if head.startswith(_ZIP):
        whole = (int.from_bytes(one[1], "little") == len(one[2]) for one in _HEADER.finditer(head))
        return Match.SURE if any(whole) else Match.NO
    first = next((line for line in head[:4096].split(b"\n") if line.strip()), b"")
    return Match.SURE if parse_vma(first.decode("utf-8", "replace")) is not None else Match.NO


def read(source: Source, form: str | None = None) -> Lowered:
    """Read a process.

    :raises InputError: unreadable, damaged, no mapping in it, or a part that is missing
    """
    if not source.head.startswith(_ZIP):
        parser = _Text(source.name)
        for block in source.blocks():
            parser.feed(block)
        return lowered(parser.vmas(), None, source.name, parser.notes())
    with opened_archive(source) as archive:
        return _read_zip(archive, source.name)


def _read_zip(archive: zipfile.ZipFile, source: str) -> Lowered:
    names = set(archive.namelist())
    if not names & {_MAPS, _SMAPS}:
        raise InputError(f"neither maps nor smaps in it, expected some of {', '.join(_MEMBERS)}", source)
    parser = _Text(source)
    parser.feed(_text(archive, _SMAPS if _SMAPS in names else _MAPS, source))
    if _SMAPS in names and _MAPS in names:
        other = _Text(source)
        other.feed(_text(archive, _MAPS, source))
        parser.compare(other)
    pages = None
    if (_PAGEMAP in names) != (_RANGES in names):
        raise InputError(f"{_PAGEMAP} and {_RANGES}: one of them is missing", source)
    if _PAGEMAP in names:
        pages = _pages(archive, _ranges(_text(archive, _RANGES, source), source), source)
    notes = parser.notes()
    if others := sorted(names.difference(_MEMBERS)):
        shown = ", ".join(printable(name)[:80] for name in others[:_SHOWN])
        more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
        notes.append(f"not read: {shown}{more}")
    if _ABOUT in names:
        notes = [*_about(_text(archive, _ABOUT, source), source), *notes]
    return lowered(parser.vmas(), pages, source, notes)


def _text(archive: zipfile.ZipFile, name: str, source: str) -> str:
    with archive.open(name) as member:
        data = member.read(_MOST_TEXT + 1)
    if len(data) > _MOST_TEXT:
        raise InputError(f"{name}: more than {_MOST_TEXT >> 20} MiB, as no process's is", source)
    return data.decode("utf-8", "surrogateescape")


def _about(text: str, source: str) -> list[str]:
    """A note of whose process it is."""
    try:
        about: Any = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(f"{_ABOUT}: expected JSON", source) from None
    if not isinstance(about, dict):
        raise InputError(f"{_ABOUT}: expected an object", source)
    if about.get("page_size", PAGE_4K) != PAGE_4K:
        raise InputError(f"{_ABOUT}: page_size {str(about['page_size'])[:40]!r}, expected {PAGE_4K}", source)
    told = [f"{name} {printable(str(about[name]))[:60]}" for name in ("pid", "comm", "kernel", "date") if name in about]
    return [f"a snapshot of {', '.join(told)}"] if told else []


def _ranges(text: str, source: str) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        match = _RANGE.fullmatch(line.strip())
        start, end = (int(word, 16) for word in match.groups()) if match else (0, 0)
        if start >= end or (start | end) % PAGE_4K or (found and start < found[-1][1]):
            what = f"{printable(line[:80])!r}, expected START END in hexadecimal, pages, by address"
            raise InputError(f"{_RANGES}: {what}", source, number)
        found.append((start, end))
    return found


def _pages(archive: zipfile.ZipFile, ranges: list[tuple[int, int]], source: str) -> Pages:
    """Entries that are not 0."""
    addresses, entries, count = [], [], 0
    with archive.open(_PAGEMAP) as member:
        for address, words in _entries(member, ranges, source):
            some = np.flatnonzero(words)
            count += len(some)
            if count > _MOST_PAGES:
                raise InputError(f"{_PAGEMAP}: more than {_MOST_PAGES} pages", source)
            addresses.append(np.uint64(address) + some.astype(np.uint64) * np.uint64(PAGE_4K))
            entries.append(words[some])
        if member.read(1):
            raise InputError(f"{_PAGEMAP}: more entries than the ranges have pages", source)
    if not addresses:
        return Pages(np.zeros(0, np.uint64), np.zeros(0, np.uint64))
    return Pages(np.concatenate(addresses), np.concatenate(entries))


def _entries(
    member: IO[bytes], ranges: list[tuple[int, int]], source: str
) -> Iterator[tuple[int, np.ndarray[tuple[int], np.dtype[np.uint64]]]]:
    for start, end in ranges:
        while start < end:
            wanted = min((end - start) // PAGE_4K, _CHUNK)
            data = member.read(8 * wanted)
            if len(data) < 8 * wanted:
                raise InputError(f"{_PAGEMAP}: ends at the page {start + len(data) // 8 * PAGE_4K:#x}", source)
            yield start, np.frombuffer(data, "<u8").astype(np.uint64)
            start += wanted * PAGE_4K


class _Text:
    """Lines of maps or smaps."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._vmas: list[Vma] = []
        self._number = 0
        self._skipped: Counter[str] = Counter()
        self._first: list[str] = []

    def feed(self, text: str) -> None:
        """Read whole lines."""
        for line in text.removesuffix("\n").split("\n"):
            self._number += 1
            self._line(line)

    def _line(self, line: str) -> None:
        vma = parse_vma(line)
        if vma is not None:
            self._vmas.append(vma)
            return
        match = _FIELD.fullmatch(line)
        if match is not None and self._vmas:
            name, kib, words = match.groups()
            if name == "VmFlags":
                self._vmas[-1].flags = frozenset((words or "").split())
            elif kib is not None:
                self._vmas[-1].sizes[name] = int(kib) << 10
        elif line.strip():
            self._skipped["lines that are not understood"] += 1
            if len(self._first) < _SHOWN:
                self._first.append(f"line {self._number}: {printable(line[:80])}")

    def compare(self, maps: _Text) -> None:
        """Note where the other file, read at another time, has other areas."""
        ours, theirs = ({(vma.start, vma.end) for vma in text._vmas} for text in (self, maps))
        if count := len(ours ^ theirs):
            self._first.append(f"{count} areas differ between maps and smaps, smaps are taken")

    def vmas(self) -> list[Vma]:
        """Mappings by address. InputError if there is none, or some overlap."""
        if not self._vmas:
            raise InputError("no mapping in it, expected lines of /proc/PID/maps or smaps", self._source)
        found = sorted(self._vmas, key=lambda vma: vma.start)
        for vma, other in pairwise(found):
            if other.start < vma.end:
                raise InputError(f"areas overlap at {other.start:#x}, expected those of one process", self._source)
        return found

    def notes(self) -> list[str]:
        """What was not understood."""
        count = self._skipped.total()
        shown = f" ({'; '.join(self._first)})" if self._first else ""
        return [f"{count} lines are not understood{shown}"] if count else self._first
