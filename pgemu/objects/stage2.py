"""A VM's stage-2 tables, read from `ram` as they stand, a level at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pgemu.machine.short import counted, html_table
from pgemu_kernels import words as W
from pgemu_kernels.formats import bits as formats

if TYPE_CHECKING:
    from pgemu.machine.core import Core

Array = np.ndarray[Any, Any]
Entries = npt.NDArray[np.void]
"""Of dtype ENTRY."""

ENTRY = np.dtype([("gpa", np.uint64), ("level", np.uint8), ("entry", np.uint64)])
"""An entry: the first guest physical address it covers, its level (1 = 4K .. 4 = 512G), its value."""


class Stage2(NamedTuple):
    """A stage-2 tree; each array is sorted by address, then from the top level down.

    root: physical address of the top table, 0 if there is none. tables: ENTRY[n], entries that point to a table.
    leaves: ENTRY[n]. others: ENTRY[n], entries that are neither present nor empty (cached MMIO accesses).
    empty: how many entries have the empty value.
    """

    root: int
    tables: Entries
    leaves: Entries
    others: Entries
    empty: int

    def __repr__(self) -> str:
        sizes = dict(zip(("4K", "2M", "1G"), self.leaf_counts(), strict=True))
        leaves = counted({f"of {size}": n for size, n in sizes.items() if n})
        about = f"{len(self.tables):,} tables, leaves: {leaves}, {len(self.others):,} others, {self.empty:,} empty"
        return f"Stage2(root={self.root:#x}, {about})"

    def _repr_html_(self) -> str:
        rows = ((hex(one["gpa"]), one["level"], hex(one["entry"])) for one in self.leaves)
        return html_table(("gpa", "level", "entry"), rows, len(self.leaves))

    def leaf_counts(self) -> tuple[int, int, int]:
        """Leaves of 4K, 2M and 1G.

        >>> machine = Machine(Config("pfnmap", pool=2 << 20, page_size=2 << 20))
        >>> machine.create_vm().stage2().leaf_counts()
        (0, 0, 0)
        """
        counts = np.bincount(self.leaves["level"], minlength=4)
        return int(counts[1]), int(counts[2]), int(counts[3])


def _entries(gpa: Array, level: int, values: Array) -> Array:
    found = np.empty(len(gpa), ENTRY)
    found["gpa"], found["level"], found["entry"] = gpa, level, values
    return found


def _sorted(pieces: list[Array]) -> Array:
    every = np.concatenate([np.empty(0, ENTRY), *pieces])
    return every[np.lexsort((-every["level"].astype(np.int64), every["gpa"]))]


def read_stage2(machine: Core, root: int) -> Stage2:
    """Read the tree below physical address `root`; 0 is a tree without tables."""
    ram = machine.arrays.ram
    row = int(W.STATE_FORMATS) + machine.register(W.R_STAGE2_FORMAT) * W.F_WORDS
    empty_value, present_mask = (machine.arrays.state[row + int(word)] for word in (W.F_EMPTY, W.F_MMU_PRESENT))
    frames = np.array([root >> 12] if root else [], np.uint64)
    bases = np.zeros(len(frames), np.uint64)
    tables: list[Array] = []
    leaves: list[Array] = []
    others: list[Array] = []
    empty = 0
    for level in (4, 3, 2, 1):
        shift = np.uint64(12 + 9 * (level - 1))
        values = ram[(frames[:, None] << np.uint64(9)) + np.arange(512, dtype=np.uint64)].reshape(-1)
        gpa = (bases[:, None] + (np.arange(512, dtype=np.uint64) << shift)).reshape(-1)
        present = values & present_mask != 0
        leaf = present & ((level == 1) | ((level < 4) & (values & np.uint64(formats.LARGE) != 0)))
        other = ~present & (values != empty_value)
        empty += int(np.count_nonzero(values == empty_value))
        below = present & ~leaf
        leaves.append(_entries(gpa[leaf], level, values[leaf]))
        others.append(_entries(gpa[other], level, values[other]))
        tables.append(_entries(gpa[below], level, values[below]))
        frames = (values[below] & np.uint64(formats.ADDRESS)) >> np.uint64(12)
        bases = gpa[below]
    return Stage2(root, _sorted(tables), _sorted(leaves), _sorted(others), empty)


def radix_tree(ram: Array, root: int) -> tuple[Array, Array]:
    """Indices and values (uint64[n] each, by index) of a radix tree of folios/page_cache.py, by its root word."""
    height = root & 7
    nodes = np.array([root & formats.ADDRESS] if height else [], np.uint64)
    first = np.zeros(len(nodes), np.uint64)
    for _ in range(max(height, 1)):
        words = ram[(nodes[:, None] >> np.uint64(3)) + np.arange(512, dtype=np.uint64)].reshape(-1)
        index = (first[:, None] * np.uint64(512) + np.arange(512, dtype=np.uint64)).reshape(-1)
        used = words != 0
        nodes, first = words[used], index[used]
    return first, nodes
