"""Everything that a page table maps, in ranges as long as can be, and what was come across on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from pgemu.tables.walk import Kind, Memory, kinds_of, permissions, root_table
from pgemu_kernels.formats.page_format import PageFormat

__all__ = ("MappedRange", "Problem", "Summary", "mapped_ranges", "range_arrays")

Array = np.ndarray[Any, Any]

_TABLES = 128  # looked at in one go: 65536 leaves, which with all that is made of them take some 20 MB
_REPEATS = 512  # how often mapped_ranges() goes through one table
_PROBLEMS = 1000  # that a summary lists; all are counted
_U64 = (1 << 64) - 1


class MappedRange(NamedTuple):
    """Leaves of one level, one after another, equal in flags and rights, that map successive pages or all the same one.

    step: from one leaf's physical address to the next one's: the page size, or 0 for the same page again and again.
    flags: bits of each leaf outside the address. rights: what every level grants, for `rights_of`.
    """

    address: int
    length: int
    physical: int
    level: int
    flags: int
    rights: int
    step: int


class Problem(NamedTuple):
    """An entry that `mapped_ranges` did not follow.

    what: "loop" (it points to a table that it is itself below), "unreadable" (the table lies outside the memory) or
    "repeated" (its table was gone through 512 times). level and entry are the entry's; of a root that lies outside,
    the level is one more than the top's. address: first input address below the entry.
    """

    what: str
    address: int
    level: int
    entry: int


@dataclass
class Summary:
    """What `mapped_ranges` came across, by level: distinct table pages, leaves, entries that are no table and no leaf.

    not_present: entries that are not present but hold something (swap, protection-none, MMIO on EPT, ...).
    reserved: present entries that the hardware refuses. problems: the first thousand; problem_counts: all, by `what`.
    """

    tables: Counter[int] = field(default_factory=Counter)
    leaves: Counter[int] = field(default_factory=Counter)
    not_present: Counter[int] = field(default_factory=Counter)
    reserved: Counter[int] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    problem_counts: Counter[str] = field(default_factory=Counter)

    def note(self, problem: Problem) -> None:
        """Count a problem, and list it while there is room."""
        self.problem_counts[problem.what] += 1
        if len(self.problems) < _PROBLEMS:
            self.problems.append(problem)


# --------------------------------------------------------------------------- everything


class _Tables(NamedTuple):
    """Tables of one level, ascending by input address; arrays of n."""

    where: Array  # uint64, physical address
    base: Array  # uint64, input address of the first entry
    rights: Array  # uint64, what the levels above grant
    above: Array  # uint64[n, levels above]: the tables on the way there


def mapped_ranges(
    memory: Memory, fmt: PageFormat, root: int, summary: Summary | None = None, *, ignore: int = 0
) -> Iterator[MappedRange]:
    """Yield everything that the table at `root` maps, ascending by address, in ranges as long as can be.

    summary: filled on the way. ignore: bits of leaves that are taken as 0 (accessed and dirty, say), so that
    ranges that differ only in them are one. What leads into a loop, out of the memory, or again and again through
    the same table is noted in the summary and not followed: the work is bounded by the number of distinct tables.
    """
    for ranges in range_arrays(memory, fmt, root, summary, ignore=ignore):
        yield from map(MappedRange._make, zip(*ranges.tolist(), strict=True))


def range_arrays(
    memory: Memory, fmt: PageFormat, root: int, summary: Summary | None = None, *, ignore: int = 0
) -> Iterator[Array]:
    """The same many at a time: uint64[7, n], n ranges with the fields of a MappedRange as rows."""
    run = np.zeros((7, 0), np.uint64)
    for leaves in _Survey(memory, fmt, ignore, Summary() if summary is None else summary).run(root):
        # The last range of some leaves may go on in the next ones.
        ranges = _merge(leaves, run)
        run = ranges[:, -1:]
        if ranges.shape[1] > 1:
            yield ranges[:, :-1]
    if run.size:
        yield run


# Leaves travel as uint64[5, n]: address, physical, level, flags, rights; ranges with the fields of MappedRange.
_ADDRESS, _PHYSICAL, _LEVEL = 0, 1, 2
_LENGTH, _STEP = 1, 6
_OF_LEAVES = (0, 2, 3, 4, 5)
_APART, _NEXT_FRAME, _SAME_FRAME = 0, 1, 2


def _sizes(levels: Array) -> Array:
    """uint64[n]: bytes of a page of each level."""
    sizes: Array = np.uint64(1) << levels * np.uint64(9) + np.uint64(3)
    return sizes


def _merge(leaves: Array, run: Array) -> Array:
    """Ranges of ascending leaves that come after `run` (a range or none): it is the first, longer if they continue it.

    The last leaf of `run` stands for it among them.
    """
    way, before = _APART, np.uint64(0)  # bytes of `run` before that leaf
    if run.size:
        size = _sizes(run[3])
        before = run[_LENGTH, 0] - size[0]
        last = run[_OF_LEAVES, :]
        last[_ADDRESS] += before
        if before:
            way = _NEXT_FRAME if run[_STEP, 0] else _SAME_FRAME
            last[_PHYSICAL] += before if run[_STEP, 0] else np.uint64(0)
        leaves = np.concatenate([last, leaves], axis=1)
    joins = _joins(leaves, way)
    begins = np.flatnonzero(np.concatenate([[True], _breaks(joins)[1:]]))
    counts = np.diff(begins, append=leaves.shape[1])
    found = leaves[:, begins]
    size = _sizes(found[_LEVEL])
    same = (counts > 1) & (joins[np.minimum(begins + 1, joins.size - 1)] == _SAME_FRAME)
    ranges = np.stack([found[0], size * counts.astype(np.uint64), *found[1:], np.where(same, np.uint64(0), size)])
    if before:
        ranges[:_LEVEL, 0] = run[_ADDRESS, 0], ranges[_LENGTH, 0] + before
        ranges[[2, _STEP], 0] = run[[2, _STEP], 0]
    return ranges


def _joins(leaves: Array, way: int) -> Array:
    """int8[n]: how each leaf goes on from the one before; `way` is that of the first one."""
    joins = np.full(leaves.shape[1], _APART, np.int8)
    joins[0] = way
    size = _sizes(leaves[_LEVEL, :-1])
    like = (leaves[_LEVEL:, 1:] == leaves[_LEVEL:, :-1]).all(axis=0)
    like &= leaves[_ADDRESS, :-1] + size == leaves[_ADDRESS, 1:]
    moved = leaves[_PHYSICAL, 1:] - leaves[_PHYSICAL, :-1]
    joins[1:][like & (moved == size)] = _NEXT_FRAME
    joins[1:][like & (moved == 0)] = _SAME_FRAME
    return joins


def _breaks(joins: Array) -> Array:
    """bool[n]: whether a range begins at each leaf, so that each range is as long as can be from where it begins.

    A leaf that joins the one before in another way than that one joined its own begins a range, unless the one before
    began one and so has no way yet. Where the way changes at leaf after leaf, therefore, every other leaf begins one.
    """
    before = np.concatenate([joins[:1], joins[:-1]])
    breaks: Array = joins == _APART
    changes = np.flatnonzero((joins != before) & ~breaks)
    if changes.size:
        alone = np.concatenate([[True], np.diff(changes) != 1])
        first = changes[alone][np.cumsum(alone) - 1]
        breaks[changes] = (changes - first) % 2 == breaks[first - 1]
    return breaks


class _Survey:
    """One pass over a tree, table by table of a level in chunks, so that memory stays bounded."""

    def __init__(self, memory: Memory, fmt: PageFormat, ignore: int, summary: Summary) -> None:
        self._memory = memory
        self._fmt = fmt
        self._kept = np.uint64(_U64 & ~ignore)
        self._summary = summary
        self._visits: dict[tuple[int, int], int] = {}  # by level of the entry, and table
        self._permissions = np.uint64(permissions(fmt))

    def run(self, root: int) -> Iterator[Array]:
        """Leaves, ascending, some at a time."""
        fmt = self._fmt
        table = root_table(fmt, root)
        where = np.uint64(table) + np.arange(fmt.root_tables, dtype=np.uint64) * np.uint64(4096)
        if not self._readable(where).all():
            self._summary.note(Problem("unreadable", 0, fmt.levels + 1, root))
            return
        base = np.arange(fmt.root_tables, dtype=np.uint64) << np.uint64(9 * fmt.levels + 12)
        rights = np.full(where.size, _U64, np.uint64)
        # Every table of the root is above every entry: a loop may lead back into any of them.
        above = np.tile(where, (where.size, 1))
        self._summary.tables[fmt.levels] += where.size
        yield from self._level(fmt.levels, _Tables(where, base, rights, above))

    def _level(self, level: int, tables: _Tables) -> Iterator[Array]:
        """Leaves below tables of a level."""
        for first in range(0, tables.where.size, _TABLES):
            some = _Tables(*(column[first : first + _TABLES] for column in tables))
            leaves, below = self._entries(level, some)
            if below is None:
                if leaves.shape[1]:
                    yield leaves
            else:
                yield from _interleave(leaves, self._level(level - 1, below))

    def _entries(self, level: int, tables: _Tables) -> tuple[Array, _Tables | None]:
        """The leaves and the tables that tables of a level point to."""
        fmt, summary = self._fmt, self._summary
        words = np.concatenate(
            [self._words(level, *table) for table in zip(tables.where.tolist(), tables.base.tolist(), strict=True)]
        )
        at = np.flatnonzero((words != 0) & (words != np.uint64(fmt.empty)))
        entries = words[at]
        kinds = kinds_of(fmt, level, entries)
        counts = np.bincount(kinds, minlength=len(Kind)).tolist()
        for counter, count in (
            (summary.leaves, counts[Kind.LEAF]),
            (summary.not_present, counts[Kind.ABSENT]),
            (summary.reserved, counts[Kind.RESERVED] + counts[Kind.MISCONFIGURED]),
        ):
            if count:
                counter[level] += count
        leaf, table = kinds == Kind.LEAF, kinds == Kind.TABLE
        leaves = self._leaves(level, tables, at[leaf], entries[leaf])
        return leaves, self._below(level, tables, at[table], entries[table]) if level > 1 else None

    def _words(self, level: int, where: int, base: int) -> Array:
        """The 512 words of a table."""
        try:
            return self._memory.words(where, 512)
        except ValueError:  # it begins and ends in the memory, with a hole between
            self._summary.note(Problem("unreadable", base, level + 1, where))
            return np.zeros(512, np.uint64)

    def _place(self, level: int, tables: _Tables, at: Array) -> tuple[Array, Array]:
        """(index of the table, input address) of entries by their index in all the tables."""
        fmt = self._fmt
        table, index = at >> 9, (at & 511).astype(np.uint64)
        address = tables.base[table] + (index << np.uint64(9 * level + 3))
        if level == fmt.levels and fmt.sign_extended:
            negative = address >> np.uint64(fmt.input_bits - 1) != 0
            address[negative] |= np.uint64(_U64 << fmt.input_bits & _U64)
        return table, address

    def _leaves(self, level: int, tables: _Tables, at: Array, entries: Array) -> Array:
        """uint64[5, n]: leaves as they travel."""
        fmt = self._fmt
        table, address = self._place(level, tables, at)
        size = np.uint64(4096 << 9 * (level - 1))
        sizes = fmt.sizes_of_leaves(level, entries)
        inside = sizes - np.uint64(1)
        frame = np.where(sizes == size, np.uint64(fmt.frame(level)), np.uint64(fmt.address))
        # Of a leaf whose size is in its address each entry maps the part at its own place.
        physical = entries & np.uint64(fmt.address) & ~inside | address & inside & ~(size - np.uint64(1))
        folded = entries ^ (entries >> np.uint64(1) & np.uint64(fmt.fold))
        rights = tables.rights[table] & (folded ^ np.uint64(fmt.invert)) & self._permissions
        flags = entries & ~frame & self._kept
        return np.stack([address, physical, np.full(at.size, level, np.uint64), flags, rights])

    def _below(self, level: int, tables: _Tables, at: Array, entries: Array) -> _Tables:
        """Tables of the next level, without those that are not to be followed."""
        fmt = self._fmt
        table, address = self._place(level, tables, at)
        where = entries & np.uint64(fmt.address)
        above = tables.above[table]
        loops = (above == where[:, None]).any(axis=1)
        readable = self._readable(where)
        follow = readable & ~loops
        for i in np.flatnonzero(~follow).tolist():
            what = "loop" if loops[i] else "unreadable"
            self._summary.note(Problem(what, int(address[i]), level, int(entries[i])))
        for i, one in zip(np.flatnonzero(follow).tolist(), where[follow].tolist(), strict=True):
            visits = self._visits[level, one] = self._visits.get((level, one), 0) + 1
            if visits > _REPEATS:
                follow[i] = False
            if visits == _REPEATS + 1:
                self._summary.note(Problem("repeated", int(address[i]), level, int(entries[i])))
            elif visits == 1:
                self._summary.tables[level - 1] += 1
        rights = tables.rights[table] & (entries ^ np.uint64(fmt.invert) | np.uint64(fmt.table_rights))
        above = np.concatenate([above, where[:, None]], axis=1)
        return _Tables(where[follow], address[follow], rights[follow], above[follow])

    def _readable(self, where: Array) -> Array:
        """bool[n]: whether the memory holds the first and the last word of each table."""
        readable: Array = self._memory.holds(where) & self._memory.holds(where + np.uint64(4088))
        return readable


def _interleave(leaves: Array, batches: Iterator[Array]) -> Iterator[Array]:
    """Batches of smaller leaves, each with the larger leaves that come before its end; ascending."""
    done = 0
    for batch in batches:
        upto = int(np.searchsorted(leaves[_ADDRESS], batch[_ADDRESS, -1]))
        if upto > done:
            both = np.concatenate([leaves[:, done:upto], batch], axis=1)
            batch = both[:, np.argsort(both[_ADDRESS], kind="stable")]
            done = upto
        yield batch
    if done < leaves.shape[1]:
        yield leaves[:, done:]
