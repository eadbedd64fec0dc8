"""A VM's stage-2 tree as the model has it: what an operation changed in it, as KVM would print that.

KVM prints each entry that becomes another (arch/x86/kvm/mmu/tdp_mmu.c:handle_changed_spte()). Not printed are what the
processor sets in an entry, what fast_page_fault() mends, and the entries that a split fills a new table with before it
is linked (tdp_mmu_split_huge_page()). A table that goes has its entries frozen (handle_removed_pt()): all of them where
mmu_lock is held for reading, else those that are present. A tree that goes is taken apart level by level
(tdp_mmu_zap_root()), from 4K on with CONFIG_KVM_PROVE_MMU, else from 1G on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pgemu_kernels import words as W
from pgemu_kernels.formats.bits import ADDRESS, LARGE

if TYPE_CHECKING:
    from pgemu.objects.machine import Machine

__all__ = ("Change", "Format", "Key", "Tree")

Array = np.ndarray[Any, Any]
Key = tuple[int, int, int]
"""Address space, level, first gfn of an entry."""

_TOP = 4


class Change(NamedTuple):
    """An entry that became another.

    before: what the log printed as it became what it was, None: nothing. place: the page of memory that a leaf shows.
    since: the line of the input that did it.
    """

    key: Key
    old: int
    new: int
    before: int | None = None
    place: int | None = None
    since: int = 0


@dataclass(frozen=True)
class Format:
    """What tells entries apart, and what the processor sets in them."""

    empty: int
    frozen: int
    present: int
    marks: int
    write: int
    mmu_writable: int
    accessed: int
    rights: int

    @classmethod
    def of(cls, machine: Machine) -> Format:
        """That of a machine's stage 2."""
        row = int(W.STATE_FORMATS) + machine.register(W.R_STAGE2_FORMAT) * W.F_WORDS
        word = {
            name: int(machine.arrays.state[row + int(getattr(W, f"F_{name}"))])
            for name in (
                "EMPTY",
                "FROZEN",
                "MMU_PRESENT",
                "ACCESSED",
                "DIRTY",
                "WRITE",
                "MMU_WRITABLE",
                "WRITABLE_MARKS",
            )
        }
        marks = word["ACCESSED"] | word["DIRTY"]
        bits = (word["WRITE"], word["MMU_WRITABLE"], word["ACCESSED"])
        rights = bits[0] | bits[1] | word["DIRTY"] | word["WRITABLE_MARKS"]
        return cls(word["EMPTY"], word["FROZEN"], word["MMU_PRESENT"], marks, *bits, rights)

    def is_present(self, entry: int) -> bool:
        """Whether KVM takes an entry for one that maps or points to a table."""
        return entry & self.present != 0

    def is_leaf(self, entry: int, level: int) -> bool:
        """Whether an entry maps memory."""
        return self.is_present(entry) and (level == 1 or entry & LARGE != 0)

    def is_table(self, entry: int, level: int) -> bool:
        """Whether an entry points to a table."""
        return self.is_present(entry) and level > 1 and entry & LARGE == 0


class _Node:
    """A table: where it is in `ram`, and what was in it when it was last looked at."""

    __slots__ = ("at", "seen")

    def __init__(self, at: int, seen: Array) -> None:
        self.at = at
        self.seen = seen


class Tree:
    """The tree of one address space of a VM.

    :param printed: what the log printed last of an entry, of which the caller keeps account
    """

    def __init__(self, machine: Machine, fmt: Format, space: int, printed: dict[Key, int | None]) -> None:
        self._ram = machine.arrays.ram
        self._fmt = fmt
        self._space = space
        self._nodes: dict[tuple[int, int], _Node] = {}
        self._printed = printed
        self._found: list[Change] = []

    @property
    def stands(self) -> bool:
        """Whether there is one."""
        return bool(self._nodes)

    def entry(self, level: int, gfn: int) -> int | None:
        """What an entry was when it was last looked at, None where its table is not there."""
        node = self._nodes.get((level, _first(gfn, level + 1)))
        return None if node is None else int(node.seen[gfn >> 9 * (level - 1) & 511])

    def changes(self, root: int, gfn: int, end: int) -> list[Change]:
        """What became other over guest frames [gfn, end), below physical address `root`, since the last look."""
        if not root:
            return []
        if (_TOP, 0) not in self._nodes:
            self._nodes[_TOP, 0] = _Node(root >> 3, self._empty())
        self._found = []
        self._look(_TOP, 0, gfn, end)
        return self._found

    def _empty(self) -> Array:
        return np.full(512, self._fmt.empty, np.uint64)

    def _look(self, level: int, base: int, gfn: int, end: int) -> None:
        """Compare the table of a level whose first gfn is `base` with what was seen."""
        node = self._nodes[level, base]
        shift = 9 * (level - 1)
        low = max(gfn - base, 0) >> shift
        high = min((end - 1 - base) >> shift, 511) + 1
        if high - low == 1:
            old, new = node.seen.item(low), self._ram.item(node.at + low)
            if old != new:
                node.seen[low] = new
                self._changed(level, base + (low << shift), old, new)
            if self._fmt.is_table(new, level):
                self._look(level - 1, base + (low << shift), gfn, end)
            return
        now = self._ram[node.at + low : node.at + high]
        for i in (now != node.seen[low:high]).nonzero()[0].tolist():
            old, new = int(node.seen[low + i]), int(now[i])
            node.seen[low + i] = new
            self._changed(level, base + (low + i << shift), old, new)
        if level > 1:
            entries = node.seen[low:high]
            tables = (entries & np.uint64(self._fmt.present) != 0) & (entries & np.uint64(LARGE) == 0)
            for i in tables.nonzero()[0].tolist():
                self._look(level - 1, base + (low + i << shift), gfn, end)

    def _changed(self, level: int, gfn: int, old: int, new: int) -> None:
        fmt = self._fmt
        if fmt.is_leaf(old, level) and fmt.is_leaf(new, level):
            differ = (old ^ new) & ~fmt.marks
            if differ == 0:
                return  # what the processor sets
            if differ == fmt.write and new & fmt.write and old & fmt.mmu_writable:
                return  # fast_page_fault()
            if differ & ADDRESS:  # no leaf becomes one of another frame: it was dropped, and mapped anew
                self._add(level, gfn, old, fmt.empty)
                old = fmt.empty
        at = (new & ADDRESS) >> 3
        split = fmt.is_leaf(old, level) and fmt.is_table(new, level)
        if split and not self._is_split(old, at):
            self._add(level, gfn, old, fmt.empty)
            old, split = fmt.empty, False
        self._add(level, gfn, old, new)
        if fmt.is_table(old, level):
            self._removed(level - 1, gfn, shared=True)
        if fmt.is_table(new, level):
            self._nodes[level - 1, gfn] = _Node(at, self._pieces(old, at) if split else self._empty())

    def _pieces(self, leaf: int, at: int) -> Array:
        """What a leaf was split to: the table's entries now, writable as it was (write protection comes after it)."""
        return self._ram[at : at + 512] | np.uint64(leaf & self._fmt.write)

    def _is_split(self, leaf: int, at: int) -> bool:
        """Whether the table at an index of `ram` is full of what a leaf was split to, but for rights."""
        entries = self._ram[at : at + 512]
        step = int(entries[1] - entries[0]) & ADDRESS if bool((entries & np.uint64(self._fmt.present)).all()) else 0
        frames = np.uint64(leaf & ADDRESS) + np.arange(512, dtype=np.uint64) * np.uint64(step)
        return step >= W.PAGE_4K and bool(((entries & np.uint64(ADDRESS)) == frames).all())

    def _add(self, level: int, gfn: int, old: int, new: int) -> None:
        key = self._space, level, gfn
        self._found.append(Change(key, old, new, self._printed.pop(key, None)))

    def _removed(self, level: int, base: int, *, shared: bool) -> None:
        """The table of a level goes: handle_removed_pt()."""
        node = self._nodes.pop((level, base))
        for i, old in enumerate(node.seen.tolist()):
            gfn = base + (i << 9 * (level - 1))
            if not shared and not self._fmt.is_present(old):
                continue
            if self._fmt.is_table(old, level):
                self._removed(level - 1, gfn, shared=shared)
            self._add(level, gfn, old, self._fmt.frozen)

    def drop(self, *, shared: bool, prove: bool) -> list[Change]:
        """The whole tree goes: what KVM prints as it takes it apart.

        :param shared: whether mmu_lock is held for reading: a memory slot went; else the VM goes
        :param prove: CONFIG_KVM_PROVE_MMU
        """
        self._found = []
        for zapped in (1, 2, 3, _TOP) if prove else (3, _TOP):
            for level, base in self._tables(zapped):
                node = self._nodes.get((level, base))
                if node is not None:
                    self._zap(node, level, base, shared=shared)
        self._nodes.clear()
        return self._found

    def _tables(self, level: int) -> Iterator[tuple[int, int]]:
        yield from sorted(where for where in self._nodes if where[0] == level)

    def _zap(self, node: _Node, level: int, base: int, *, shared: bool) -> None:
        """__tdp_mmu_zap_root() of one table."""
        present = np.flatnonzero(node.seen & np.uint64(self._fmt.present)).tolist()
        for i in present:
            old, gfn = int(node.seen[i]), base + (i << 9 * (level - 1))
            node.seen[i] = self._fmt.empty
            if self._fmt.is_table(old, level):
                self._removed(level - 1, gfn, shared=shared)
            self._add(level, gfn, old, self._fmt.empty)


def _first(gfn: int, level: int) -> int:
    """First gfn of the entry of a level that covers a gfn."""
    return gfn >> 9 * (level - 1) << 9 * (level - 1)
