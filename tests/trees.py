"""Page tables made by hand, in a memory of single pages, and ELF cores made by hand. Shares no code with pgemu."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from pgemu_kernels.formats.page_format import PageFormat

Array = np.ndarray[Any, Any]
PAGE = 4096


class Pages:
    """Physical memory of a few pages: address -> uint64[512]."""

    def __init__(self) -> None:
        self.pages: dict[int, Array] = {}

    def add(self, address: int, fill: int = 0) -> int:
        self.pages[address] = np.full(512, fill, np.uint64)
        return address

    def store(self, address: int, value: int) -> None:
        self.pages[address & ~4095][address >> 3 & 511] = value

    def word(self, address: int) -> int:
        return int(self.pages[address & ~4095][address >> 3 & 511])

    def words(self, address: int, count: int) -> Array:
        if address & ~4095 not in self.pages:
            raise ValueError(f"{address:#x}")
        first = address >> 3 & 511
        return self.pages[address & ~4095][first : first + count]

    def holds(self, addresses: Array) -> Array:
        return np.array([a & ~4095 in self.pages for a in addresses.tolist()], np.bool_)

    def load(self, addresses: Array) -> Array:
        if not self.holds(addresses).all():
            raise ValueError("no memory")
        return np.array([self.word(a) for a in addresses.tolist()], np.uint64)


class Tree:
    """Tables of a format below a root at 0x1000000; frames for tables come upwards from there."""

    def __init__(self, fmt: PageFormat, root: int = 0x100_0000) -> None:
        self.fmt = fmt
        self.memory = Pages()
        self.root = root
        self._next = root
        for _ in range(fmt.root_tables):
            self._table()

    def _table(self) -> int:
        self._next += PAGE
        return self.memory.add(self._next - PAGE, self.fmt.empty)

    def slot(self, address: int, level: int) -> int:
        """Physical address of the entry of a level, tables made on the way."""
        table = self.root
        for at in range(self.fmt.levels, 0, -1):
            bits = self.fmt.root_bits if at == self.fmt.levels else 9
            where = table + (address >> 12 + 9 * (at - 1)) % (1 << bits) * 8
            if at == level:
                return where
            entry = self.memory.word(where)
            if not entry & self.fmt.present:
                entry = self.fmt.table_entry(self._table(), at)
                self.memory.store(where, entry)
            table = entry & self.fmt.address
        raise AssertionError(level)

    def map(self, address: int, physical: int, level: int, flags: int | None = None) -> None:
        leaf = self.fmt.leaf[level - 1] if flags is None else flags
        self.memory.store(self.slot(address, level), physical | leaf)


def core(
    segments: list[tuple[int, bytes, int]],
    *,
    ident: bytes = b"\x7fELF\x02\x01\x01",
    kind: int = 4,
    first: int = 0,
    note: bytes = b"",
    count: int | None = None,
    many: bool = False,
) -> bytes:
    """An ELF64 core. segments: (physical address, bytes in the file, bytes in memory), one after another in the file.

    first: file offset of the first one, if not right behind the headers. count: what the header says instead of the
    number of program headers. many: that number stands in a section header, as where it does not fit.
    """
    number = len(segments) + bool(note)
    at = max(first, 64 + 56 * number + 64 * many + len(note))
    headers = [struct.pack("<IIQQQQQQ", 4, 0, 64 + 56 * number + 64 * many, 0, 0, len(note), 0, 4)] if note else []
    offset = at
    for address, data, size in segments:
        where = offset if data else (1 << 64) - 1
        headers.append(struct.pack("<IIQQQQQQ", 1, 7, where, 0, address, len(data), size, 0))
        offset += len(data)
    stated = 0xFFFF if many else number if count is None else count
    sections = 64 + 56 * number if many else 0
    sizes = (64, 56, stated, 0, 0, 0)
    header = struct.pack("<16sHHIQQQIHHHHHH", ident.ljust(16, b"\0"), kind, 62, 1, 0, 64, sections, 0, *sizes)
    section = struct.pack("<IIQQQQIIQQ", 0, 0, 0, 0, 0, 0, 0, number, 0, 0) if many else b""
    body = header + b"".join(headers) + section + note
    return body.ljust(at, b"\xee") + b"".join(data for _, data, _ in segments)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
