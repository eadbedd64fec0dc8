"""The control of every group: walk four levels, store the leaf, and nothing else."""

from __future__ import annotations

import numpy as np
from numba import njit

_ADDRESS = np.uint64(0x000F_FFFF_FFFF_F000)
_SHIFTS = tuple(np.uint64(shift) for shift in (3, 9, 18, 27))
_INDEX = np.uint64(511)


@njit(nogil=True, _nrt=False)
def walk_and_store(ram, root, pages, value):
    """Store `value` (uint64) in the level-1 entry of each page number; all tables must exist."""
    three, nine, eighteen, twenty_seven = _SHIFTS
    for i in range(pages.size):
        page = pages[i]
        entry = ram[(root >> three) + (page >> twenty_seven & _INDEX)]
        entry = ram[((entry & _ADDRESS) >> three) + (page >> eighteen & _INDEX)]
        entry = ram[((entry & _ADDRESS) >> three) + (page >> nine & _INDEX)]
        ram[((entry & _ADDRESS) >> three) + (page & _INDEX)] = value
