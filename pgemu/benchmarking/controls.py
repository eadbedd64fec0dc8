"""Controls: the least that anything which edits or reads the same pages would do, timed in the same run.

They know no rule of Linux: a ratio to them says what pgemu's counting, checking and pricing take.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from pgemu.machine.arguments import guards
from pgemu.machine.arrays import U64

if TYPE_CHECKING:
    from pgemu.tables.page_table import PageTable


__all__ = ("Control", "gather", "walk_and_store")

_ADDRESS = np.uint64(0x000F_FFFF_FFFF_F000)
_INDEX, _ZERO = np.uint64(511), np.uint64(0)
_SHIFTS = tuple(np.uint64(shift) for shift in (3, 9, 18, 27))
_PAGE_SHIFT = np.uint64(12)
_SMALLEST_MEMORY, _MEMORY_STEP = 64 << 20, 2 << 20
_OTHER_FRAMES = 1024  # of a machine, beside the tables


class Control:
    """A call to be timed as a control. what: in a few words. operations: how many it does."""

    def __init__(self, call: Callable[[], object], what: str, operations: int) -> None:
        self._call = call
        self.what = what
        self.operations = operations

    def __call__(self) -> object:
        """Do it once."""
        return self._call()

    def __repr__(self) -> str:
        return f"Control({self.what!r}, {self.operations:,} operations)"


@guards()
def walk_and_store(addresses: U64) -> Control:
    """Return the control of edits: down four levels and a store in the last, for one 4K page after the other.

    The tables are x86-64's, of a machine of its own, linked everywhere and otherwise empty.

    :param addresses: uint64[n], virtual or guest physical, in the order of the walks
    :raises ValueError: no address, or one that is not canonical
    """
    if not addresses.size:
        raise ValueError("addresses of shape (0,): expected one or more")
    table = _linked(addresses)
    ram, root, pages = table.machine.arrays.ram, np.uint64(table.root), addresses >> _PAGE_SHIFT
    walk = _compiled()[0]
    return Control(lambda: walk(ram, root, pages, _ZERO), "walk and store", addresses.size)


@guards()
def gather(array: U64, indices: U64) -> Control:
    """Return the control of walks: the words of an array at indices that are known beforehand, one after the other.

    :param array: uint64[n], for instance the level-1 entries that the walks end at
    :param indices: uint64[m], in the order of the walks
    :raises ValueError: an index outside the array, or none
    """
    if not indices.size or int(indices.max()) >= array.size:
        raise ValueError(f"indices of shape {indices.shape}: expected one or more, each below {array.size}")
    found = np.empty(indices.size, np.uint64)
    load = _compiled()[1]
    return Control(lambda: load(array, indices, found), "gather", indices.size)


def _linked(addresses: U64) -> PageTable:
    """A page table whose last level is there for each address, with nothing mapped."""
    from pgemu.machine.config import Config
    from pgemu.objects.machine import Machine

    pages = np.unique(addresses >> _PAGE_SHIFT)
    frames = _OTHER_FRAMES + sum(np.unique(pages >> shift).size for shift in _SHIFTS[1:])
    memory = max(_SMALLEST_MEMORY, -(-frames * 4096 // _MEMORY_STEP) * _MEMORY_STEP)
    table = Machine(Config(memory=memory)).create_page_table("x86-64")
    table_pages = np.unique(pages >> _SHIFTS[1]) << _SHIFTS[1] + _PAGE_SHIFT
    status = table.map_many(table_pages, np.zeros_like(table_pages)).status
    if status.any():
        worst = int(np.flatnonzero(status)[0])
        raise ValueError(f"addresses around {int(table_pages[worst]):#x}: expected canonical addresses of 48 bits")
    table.unmap_many(table_pages, tables="zap")
    return table


@cache
def _compiled() -> tuple[Any, Any]:
    """The loops, compiled at their first call: no cache, for they are small."""
    from numba import njit

    return njit(nogil=True, _nrt=False)(_walk_and_store), njit(nogil=True, _nrt=False)(_gather)


def _walk_and_store(ram: Any, root: Any, pages: Any, value: Any) -> None:
    """Store `value` (uint64) in the level-1 entry of each page number; all tables must exist."""
    three, nine, eighteen, twenty_seven = _SHIFTS
    for i in range(pages.size):
        page = pages[i]
        entry = ram[(root >> three) + (page >> twenty_seven & _INDEX)]
        entry = ram[((entry & _ADDRESS) >> three) + (page >> eighteen & _INDEX)]
        entry = ram[((entry & _ADDRESS) >> three) + (page >> nine & _INDEX)]
        ram[((entry & _ADDRESS) >> three) + (page & _INDEX)] = value


def _gather(array: Any, indices: Any, found: Any) -> None:
    """found[i] = array[indices[i]]."""
    for i in range(indices.size):
        found[i] = array[indices[i]]
