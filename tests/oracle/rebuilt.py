"""Table pages rebuilt from the entries of a capture, each at its own physical address, in memory or as an ELF core."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from oracle.capture import FRAME, Run, Table

Array = np.ndarray[Any, Any]
U = np.uint64


def shift(level: int) -> Any:
    """Where the index of a level's table begins in an address."""
    return U(9 * level + 3)


def expand(runs: Iterable[Run]) -> tuple[Array, Array, Array]:
    """Level (int64), address and entry (uint64) of each leaf."""
    rows = list(runs)
    level = np.array([r.level for r in rows], np.int64)
    count = np.array([r.count for r in rows], np.int64)
    first = np.repeat(np.concatenate([[0], np.cumsum(count)[:-1]]), count) if rows else np.zeros(0, np.int64)
    nth = (np.arange(first.size) - first).astype(U)
    address, entry, step = (
        np.repeat(np.array([getattr(r, name) for r in rows], U), count) for name in ("va", "entry", "step")
    )
    level = np.repeat(level, count)
    return level, address + (nth << (level * 9 + 3).astype(U)), entry + nth * step


class Rebuilt:
    """Physical memory of nothing but table pages.

    pages: uint64[n], their addresses, ascending. contents: uint64[n, 512]. `empty` stands where the capture lists
    nothing.
    """

    def __init__(self, root: int, top: int, tables: Iterable[Table], leaves: Iterable[Run], empty: int = 0) -> None:
        rows = list(tables)
        level, va, entry = (
            np.array([row[field] for row in rows], dtype) for field, dtype in ((1, np.int64), (0, U), (2, U))
        )
        leaf_level, leaf_va, leaf_entry = expand(leaves)
        self.pages = np.unique(np.concatenate([np.array([root], U), entry & U(FRAME)]))
        self.contents = np.full((self.pages.size, 512), empty, U)
        level, va, entry = (np.concatenate(pair) for pair in ((level, leaf_level), (va, leaf_va), (entry, leaf_entry)))
        is_table = np.arange(level.size) < len(rows)
        for at in range(top, 0, -1):
            here = level == at
            if at == top:
                parent = np.full(int(here.sum()), root, U)
            else:
                above = is_table & (level == at + 1)
                keys = va[above] >> shift(at + 1)
                order = np.argsort(keys)
                found = np.searchsorted(keys[order], va[here] >> shift(at + 1))
                assert (keys[order][found] == va[here] >> shift(at + 1)).all(), "an entry without a table above it"
                parent = (entry[above] & U(FRAME))[order][found]
            index = (va[here] >> shift(at) & U(511)).astype(np.int64)
            self.contents[np.searchsorted(self.pages, parent), index] = entry[here]

    def holds(self, addresses: Array) -> Array:
        index = np.searchsorted(self.pages, addresses & ~U(4095)).clip(max=self.pages.size - 1)
        held: Array = self.pages[index] == addresses & ~U(4095)
        return held

    def load(self, addresses: Array) -> Array:
        if not self.holds(addresses).all():
            raise ValueError("not a table page")
        index = np.searchsorted(self.pages, addresses & ~U(4095))
        words: Array = self.contents[index, (addresses >> U(3) & U(511)).astype(np.int64)]
        return words

    def words(self, address: int, count: int) -> Array:
        index = int(np.searchsorted(self.pages, U(address & ~4095)))
        if index == self.pages.size or int(self.pages[index]) != address & ~4095:
            raise ValueError(f"{address:#x}: not a table page")
        first = address >> 3 & 511
        found: Array = self.contents[index, first : first + count]
        return found

    def write_elf(self, path: Path, offset_in_page: int) -> None:
        """An ELF64 core with a PT_LOAD per run of pages, the first at a file offset of this remainder."""
        breaks = np.flatnonzero(np.diff(self.pages) != 4096) + 1
        runs = np.split(np.arange(self.pages.size), breaks)
        at = 64 + 56 * len(runs)
        at += (offset_in_page - at) % 4096
        headers, offset = [], at
        for run in runs:
            size = 4096 * run.size
            headers.append(struct.pack("<IIQQQQQQ", 1, 4, offset, 0, int(self.pages[run[0]]), size, size, 0))
            offset += size
        ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
        header = struct.pack("<16sHHIQQQIHHHHHH", ident, 4, 62, 1, 0, 64, 0, 0, 64, 56, len(runs), 0, 0, 0)
        path.write_bytes((header + b"".join(headers)).ljust(at, b"\0") + self.contents.tobytes())
