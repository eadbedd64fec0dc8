"""What /proc tells of a process's memory, in one zip file.

Members, deflated:

    maps              /proc/PID/maps, as the kernel printed it
    smaps             /proc/PID/smaps, too
    pagemap.ranges    a line for each range of addresses that pagemap.u64 has, in its order: "START END", hexadecimal
    pagemap.u64       entries of /proc/PID/pagemap, uint64, little endian, one for each page of those ranges
    about.json        pid, comm, kernel, date (ISO 8601, UTC), page_size (bytes), pfns (whether any entry has its page
                      frame number), mappings, present (pages), and skipped: mappings that could not be scanned

The ranges are the mappings of maps in their order, empty pages included; of a mapping above 64 GiB they are what is
populated (PAGEMAP_SCAN, Linux 6.7 and later; before that it is skipped, unless smaps says that nothing is there). The
vsyscall page is nobody's memory and has no entries. Entries: Documentation/admin-guide/mm/pagemap.rst.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import platform
import re
import time
import zipfile
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pgemu.errors import InputError
from pgemu.whole_file import whole_file

__all__ = ("Snapshot", "take")

_MANY = 64 << 30  # bytes of a mapping whose empty pages are stored, too
_PIECE = 1 << 17  # entries read at once
_PRESENT, _PFN = np.uint64(1 << 63), np.uint64((1 << 55) - 1)
_MAPPING = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+ *(.*)")
_SOME = re.compile(rb"(?:Rss|Swap|Shared_Hugetlb|Private_Hugetlb):\s+(\d+) kB")

# include/uapi/linux/fs.h: PAGEMAP_SCAN is _IOWR('f', 16, struct pm_scan_arg), which has 12 words.
_PAGEMAP_SCAN = 0xC0606610
_POPULATED = 1 << 3 | 1 << 4  # PAGE_IS_PRESENT, PAGE_IS_SWAPPED
_REGIONS = 1 << 12


class Snapshot(NamedTuple):
    """What was stored: its about.json, and how many bytes of memory its entries are of."""

    about: dict[str, Any]
    bytes: int


class _Mapping(NamedTuple):
    start: int
    end: int
    populated: bool


def take(pid: int, path: str) -> Snapshot:
    """Store a snapshot of a process, which goes on meanwhile; the file appears whole or not at all.

    :raises InputError: no such process, no permission to read it, no memory of its own, it ends meanwhile, or the file
        cannot be written
    """
    page = os.sysconf("SC_PAGE_SIZE")
    maps, smaps = _read(pid, "maps"), _read(pid, "smaps")
    if not maps:
        raise InputError("it has no memory of its own (a kernel's thread, or it has ended)", f"process {pid}")
    about: dict[str, Any] = {
        "pid": pid,
        "comm": _read(pid, "comm").decode(errors="replace").rstrip("\n"),
        "kernel": platform.release(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "page_size": page,
    }
    try:
        with whole_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("maps", maps)
            archive.writestr("smaps", smaps)
            with _opened(pid, "pagemap") as pagemap:
                found = _ranges(pagemap, list(_mappings(maps, smaps)), page)
                archive.writestr("pagemap.ranges", "".join(f"{start:x} {end:x}\n" for start, end in found.ranges))
                info = zipfile.ZipInfo("pagemap.u64", time.localtime()[:6])
                info.compress_type = zipfile.ZIP_DEFLATED
                with archive.open(info, "w", force_zip64=True) as member:
                    present, pfns = _copy(pagemap, found.ranges, page, member)
            about |= {"pfns": pfns, "mappings": found.mappings, "present": present, "skipped": found.skipped}
            archive.writestr("about.json", json.dumps(about, indent=2) + "\n")
    except OSError as error:
        if error.filename != path:
            raise
        raise InputError(f"cannot be written: {error.strerror}", path) from None
    return Snapshot(about, sum(end - start for start, end in found.ranges))


def _opened(pid: int, name: str) -> IO[bytes]:
    try:
        return open(f"/proc/{pid}/{name}", "rb", buffering=0)
    except (FileNotFoundError, ProcessLookupError):
        raise InputError("no such process", f"process {pid}") from None
    except PermissionError:
        raise InputError(f"no permission to read its {name}: run it as its user, or root", f"process {pid}") from None


def _read(pid: int, name: str) -> bytes:
    with _opened(pid, name) as file:
        try:
            return b"".join(iter(lambda: file.read(1 << 20), b""))
        except OSError as error:
            raise InputError(f"its {name} cannot be read: {error.strerror}", f"process {pid}") from None


def _mappings(maps: bytes, smaps: bytes) -> Iterator[_Mapping]:
    """Mappings of maps but the vsyscall page; whether anything of one is in memory or swapped is what smaps says."""
    populated: set[bytes] = set()
    head = b""
    for line in smaps.splitlines():
        if match := _MAPPING.fullmatch(line):
            head = match[1]
        elif (match := _SOME.match(line)) and int(match[1]):
            populated.add(head)
    for line in maps.splitlines():
        match = _MAPPING.fullmatch(line)
        if match and match[3] != b"[vsyscall]":
            yield _Mapping(int(match[1], 16), int(match[2], 16), match[1] in populated)


class _Ranges(NamedTuple):
    ranges: list[tuple[int, int]]
    mappings: int
    skipped: list[str]


def _ranges(pagemap: IO[bytes], mappings: list[_Mapping], page: int) -> _Ranges:
    """The ranges whose entries are stored."""
    ranges: list[tuple[int, int]] = []
    skipped = []
    for one in mappings:
        if one.end - one.start <= _MANY:
            ranges.append((one.start, one.end))
        elif one.populated:
            found = _scan(pagemap, one, page)
            if found is None:
                skipped.append(f"{one.start:x}-{one.end:x}")
            ranges += found or []
    return _Ranges(ranges, len(mappings), skipped)


def _scan(pagemap: IO[bytes], mapping: _Mapping, page: int) -> list[tuple[int, int]] | None:
    """What is populated of a mapping, neighbours joined; None where the kernel cannot say."""
    regions = np.zeros((_REGIONS, 3), np.uint64)  # struct page_region: start, end, categories
    begin, found = mapping.start, list[tuple[int, int]]()
    while begin < mapping.end:
        words = (96, 0, begin, mapping.end, 0, regions.ctypes.data, _REGIONS, 0, 0, 0, _POPULATED, _POPULATED)
        asked = (ctypes.c_uint64 * 12)(*words)
        try:
            count = fcntl.ioctl(pagemap.fileno(), _PAGEMAP_SCAN, asked, True)
        except OSError as error:
            if error.errno in (errno.ENOTTY, errno.EINVAL):
                return None
            raise InputError(f"pagemap cannot be scanned: {error.strerror}", pagemap.name) from None
        for start, end, _ in regions[:count].tolist():
            if found and found[-1][1] == start:
                found[-1] = found[-1][0], end
            else:
                found.append((start, end))
        begin = max(int(asked[4]), begin + page)  # walk_end
    return found


def _copy(pagemap: IO[bytes], ranges: list[tuple[int, int]], page: int, member: IO[bytes]) -> tuple[int, bool]:
    """Copy entries; how many pages are present, and whether any has its frame number."""
    present, pfns = 0, False
    for start, end in ranges:
        for first in range(start // page, end // page, _PIECE):
            count = min(_PIECE, end // page - first)
            entries = _entries(pagemap, first, count)
            there = entries[(entries & _PRESENT) != 0]
            present += len(there)
            pfns = pfns or bool((there & _PFN).any())
            member.write(entries.tobytes())
    return present, pfns


def _entries(pagemap: IO[bytes], first: int, count: int) -> npt.NDArray[np.uint64]:
    """Entries from a page number on. InputError if there are less: the process has ended."""
    data = b""
    while len(data) < 8 * count:
        try:
            piece = os.pread(pagemap.fileno(), 8 * count - len(data), 8 * first + len(data))
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}", pagemap.name) from None
        if not piece:
            raise InputError("the process has ended meanwhile", pagemap.name)
        data += piece
    return np.frombuffer(data, np.dtype("=u8")).astype("<u8")
