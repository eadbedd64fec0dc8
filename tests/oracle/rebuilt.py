"""Table pages rebuilt from the entries of a capture, each at its own physical address, in memory or as an ELF core."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from oracle.capture import FRAME, Run, Table

Array = np.ndarray[Any, Any]
U = np.uint64


def shift(level: int) -> Any:
    """Where the index of a level's table begins in an address."""
    return U(9 * level + 3)


class Leaves(NamedTuple):
    """Leaves one by one: level, address and entry of each; uint64 arrays."""

    level: Array
    address: Array
    entry: Array

    def where(self, these: Array) -> Leaves:
        return Leaves(*(column[these] for column in self))


def expand(runs: Iterable[Run]) -> Leaves:
    """Runs, leaf by leaf."""
    columns = np.array([(r.va, r.level, r.entry, r.count, r.step) for r in runs], U).reshape(-1, 5).T
    count = columns[3].astype(np.int64)
    nth = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    address, level, entry, _, step = np.repeat(columns, count, axis=1)
    return Leaves(level, address + (nth.astype(U) << shift_of(level)), entry + nth.astype(U) * step)


def shift_of(level: Array) -> Array:
    """Where the index of a level's table begins in an address, for many levels."""
    shifts: Array = level * U(9) + U(3)
    return shifts


class Rebuilt:
    """Physical memory of nothing but table pages.

    pages: uint64[n], their addresses, ascending. contents: uint64[n, 512]. `empty` stands where the capture lists
    nothing.
    """

    def __init__(self, root: int, top: int, tables: Iterable[Table], leaves: Leaves, empty: int = 0) -> None:
        va, level, entry = np.array(list(tables), U).reshape(-1, 3).T
        self.pages = np.unique(np.concatenate([np.array([root], U), entry & U(FRAME)]))
        self.contents = np.full((self.pages.size, 512), empty, U)
        is_table = np.arange(level.size + leaves.level.size) < level.size
        level = np.concatenate([level, leaves.level])
        va = np.concatenate([va, leaves.address])
        entry = np.concatenate([entry, leaves.entry])
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
