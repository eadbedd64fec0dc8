"""One page table as a dict of leaves and a set of tables, in every format: edits the obvious way, and a plain walker.

The formats are written out here once more, from the manuals, as functions on whole entries. Addresses are those of
the tree (no sign extension). Nothing is shared with the kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

PAGE = 4096


def size_of(level: int) -> int:
    """Bytes that an entry of a level maps."""
    return PAGE << 9 * (level - 1)


@dataclass(frozen=True)
class Format:
    """x86-64 and NPT: bit 7 is the page size above 4K and PAT at 4K, where larger leaves have PAT in bit 12."""

    name: str
    levels: int
    input_bits: int
    leaf: int  # bits of a 4K leaf with every permission
    accessed: int = 1 << 5
    dirty: int = 1 << 6
    write: int = 1 << 1
    memory_type: int = 1 << 7  # a bit of it, in a 4K leaf
    software: int = 0b111 << 9
    present: int = 1
    address: int = (1 << 52) - PAGE
    process: bool = False
    arm: bool = False
    roots: int = 1

    def is_leaf(self, level: int, entry: int) -> bool:
        return level == 1 or (level < 4 and bool(entry & 1 << 7))

    def encode(self, level: int, physical: int, bits: int) -> int:
        """A leaf of a level from the bits of a 4K leaf."""
        return physical | (bits if level == 1 else self.mask(level, bits) | 1 << 7)

    def mask(self, level: int, bits: int) -> int:
        """Bits of a 4K leaf as a leaf of `level` has them."""
        return bits if level == 1 else bits & ~(1 << 7) | (bits >> 7 & 1) << 12

    def physical(self, level: int, entry: int) -> int:
        return entry & self.address & -size_of(level)

    def bits(self, level: int, entry: int) -> int:
        """The bits of a 4K leaf that maps as this leaf does."""
        rest = entry & ~(self.address & ~(1 << 12 if level > 1 else 0))
        return rest if level == 1 else rest & ~(1 << 7 | 1 << 12) | (rest >> 12 & 1) << 7

    def child(self, level: int, entry: int, index: int) -> int:
        """Child `index` of a leaf of `level`."""
        return self.encode(level - 1, self.physical(level, entry) + index * size_of(level - 1), self.bits(level, entry))

    @property
    def sticky(self) -> int:
        """Bits that the hardware sets by itself."""
        return self.accessed | self.dirty


@dataclass(frozen=True)
class Ept(Format):
    """EPT: bit 7 only above 4K; with the NX mitigation larger leaves do not execute."""

    no_huge_execute: int = 0

    def mask(self, level: int, bits: int) -> int:
        return bits if level == 1 else bits & ~self.no_huge_execute

    def bits(self, level: int, entry: int) -> int:
        rest = entry & ~self.address
        return rest if level == 1 else rest & ~(1 << 7) | self.no_huge_execute


@dataclass(frozen=True)
class Arm(Format):
    """Arm stage 2: bit 1 is set in pages and in tables, clear in blocks."""

    def is_leaf(self, level: int, entry: int) -> bool:
        return level == 1 or (level < 4 and not entry & 2)

    def encode(self, level: int, physical: int, bits: int) -> int:
        return physical | (bits | 2 if level == 1 else bits & ~2)

    def mask(self, level: int, bits: int) -> int:
        return bits

    def bits(self, level: int, entry: int) -> int:
        return entry & ~self.address | 2

    @property
    def sticky(self) -> int:
        return self.accessed


ARM = {"accessed": 1 << 10, "dirty": 1 << 7, "write": 1 << 7, "memory_type": 0b0011 << 2, "software": 0b1111 << 55,
       "address": (1 << 48) - PAGE, "arm": True}  # fmt: skip
EPT = {
    "accessed": 1 << 8,
    "dirty": 1 << 9,
    "write": 1 << 1,
    "memory_type": 1 << 6,
    "present": 7,
    "software": 0b11 << 52,
}
FORMATS = [
    Format("x86-64", 4, 48, 0x867, process=True),
    Format("x86-64-5", 5, 57, 0x867, process=True),
    Format("npt", 4, 48, 0xE67),
    Ept("ept", 4, 48, 0x80A0_0000_0000_0F77, **EPT),
    Ept("ept-5", 5, 57, 0x80A0_0000_0000_0F77, **EPT),
    Ept("ept-nx", 4, 48, 0x80A0_0000_0000_0F77, **EPT, no_huge_execute=0x404),
    Arm("arm64-s2", 3, 40, 0x7DB, **ARM, roots=2),
    Arm("arm64-s2-39", 3, 39, 0x7DB, **ARM),
    Arm("arm64-s2-43", 3, 43, 0x7DB, **ARM, roots=16),
    Arm("arm64-s2-48", 4, 48, 0x7DB, **ARM),
]


class Table(NamedTuple):
    """A table below the root: the level of its entries, its number among those of that level."""

    level: int
    number: int

    @classmethod
    def over(cls, level: int, address: int) -> Table:
        return cls(level, address // size_of(level + 1))

    @property
    def span(self) -> range:
        return range(self.number * size_of(self.level + 1), (self.number + 1) * size_of(self.level + 1))


class Leaf(NamedTuple):
    """A present leaf."""

    level: int
    entry: int


class Outcome(NamedTuple):
    """What an edit of the model returned; `changed`: ranges whose translation a TLB may hold no longer."""

    status: int
    detail: int
    changed: list[range]


def overlap(a: range, b: range) -> bool:
    return max(a.start, b.start) < min(a.stop, b.stop)


ENOENT, EBUSY, EEXIST, EINVAL, EOPNOTSUPP = -2, -16, -17, -22, -95


@dataclass
class Tree:
    """Leaves by the table that holds them and the address they begin at, and the tables there are."""

    format: Format
    leaves: dict[Table, dict[int, Leaf]] = field(default_factory=dict)
    tables: set[Table] = field(default_factory=set)
    changed: list[range] = field(default_factory=list)

    # ------------------------------------------------------------------ looking

    def over(self, where: range) -> list[tuple[int, Leaf]]:
        """The leaves that overlap a range, and where they begin."""
        found = []
        for table, leaves in self.leaves.items():
            if overlap(table.span, where):
                size = size_of(table.level)
                first, last = max(where.start, table.span.start) & -size, min(where.stop, table.span.stop)
                if (last - first) // size < 32:
                    found += [(base, leaves[base]) for base in range(first, last, size) if base in leaves]
                else:
                    found += [(base, leaf) for base, leaf in leaves.items() if first <= base < last]
        return sorted(found)

    def find(self, address: int) -> tuple[int, Leaf] | None:
        """The leaf over an address, and where it begins."""
        for level in (1, 2, 3):
            base = address & -size_of(level)
            leaf = self.leaves.get(Table.over(level, address), {}).get(base)
            if leaf is not None:
                return base, leaf
        return None

    # ------------------------------------------------------------------ steps

    def put(self, base: int, leaf: Leaf) -> None:
        self.leaves.setdefault(Table.over(leaf.level, base), {})[base] = leaf

    def take(self, base: int, leaf: Leaf) -> None:
        table = Table.over(leaf.level, base)
        del self.leaves[table][base]
        if not self.leaves[table]:
            del self.leaves[table]

    def drop(self, base: int, leaf: Leaf) -> None:
        """Take a leaf away: its translation changes."""
        self.changed.append(range(base, base + size_of(leaf.level)))
        self.take(base, leaf)

    def link(self, address: int, level: int) -> None:
        """The tables that a leaf of `level` needs."""
        self.tables |= {Table.over(above, address) for above in range(level, self.format.levels)}

    def split_one(self, base: int, leaf: Leaf) -> None:
        self.take(base, leaf)
        self.link(base, leaf.level - 1)
        for i in range(512):
            child = Leaf(leaf.level - 1, self.format.child(leaf.level, leaf.entry, i))
            self.put(base + i * size_of(leaf.level - 1), child)

    def quiet(self, old: int, new: int) -> bool:
        """Whether a TLB may go on holding `old`: only software bits changed, or the hardware's were set."""
        return not (new ^ old) & ~self.format.software & ~(new & self.format.sticky)

    def clear_way(self, address: int, level: int) -> None:
        """Make the place of one leaf free, as a fault does."""
        span = range(address, address + size_of(level))
        while (found := self.find(address)) and found[1].level > level:
            if self.format.arm:
                self.drop(*found)
            else:
                self.split_one(*found)
        for base, leaf in self.over(span):
            self.drop(base, leaf)
        self.tables -= {table for table in self.tables if table.level < level and table.span.start in span}

    def split_edges(self, where: range) -> None:
        """Split the leaves that a range covers in part."""
        for edge in (where.start, where.stop):
            while (found := self.find(edge)) and found[0] != edge:
                self.split_one(*found)

    # ------------------------------------------------------------------ edits

    def begin(self) -> None:
        self.changed = []

    def done(self, status: int, detail: int) -> Outcome:
        return Outcome(status, detail, self.changed)

    def map(self, address: int, physical: int, length: int, max_level: int, bits: int, replace: bool) -> Outcome:
        self.begin()
        offset = leaves = 0
        while offset < length:
            at, to, left = address + offset, physical + offset, length - offset
            level = max(n for n in range(1, max_level + 1) if not (at | to) % size_of(n) and left >= size_of(n))
            entry = self.format.encode(level, to, bits)
            there = self.find(at)
            if not replace and self.over(range(at, at + size_of(level))):
                return self.done(EEXIST, offset)
            while there and there[1].level > level and not self.format.arm:
                self.split_one(*there)  # exact: the child may be what is asked for
                there = self.find(at)
            if there and there[1].level == level and self.quiet(there[1].entry, entry):
                self.put(at, Leaf(level, entry))
            else:
                self.clear_way(at, level)
                self.link(at, level)
                self.put(at, Leaf(level, entry))
            offset += size_of(level)
            leaves += 1
        return self.done(0, leaves)

    def unmap(self, where: range, partial: str, tables: str) -> Outcome:
        self.begin()
        found = self.over(where)
        if partial == "split":
            self.split_edges(where)
        gone = self.over(where)
        for base, leaf in gone:
            self.drop(base, leaf)
        self.free_tables(where, tables)
        return self.done(0 if found else ENOENT, len(gone))

    def free_tables(self, where: range, policy: str) -> int:
        """Tables that hold nothing, from the last level up: how many went."""
        before = len(self.tables)
        if policy == "zap":
            return 0
        for level in range(1, 2 if policy == "madvise" else self.format.levels):
            used = set(self.leaves)
            used |= {Table.over(level, table.span.start) for table in self.tables if table.level == level - 1}
            for table in {t for t in self.tables if t.level == level} - used:
                inside = where.start <= table.span.start and table.span.stop <= where.stop
                if inside or (policy == "munmap" and overlap(table.span, where)):
                    self.tables.remove(table)
        return before - len(self.tables)

    def protect(self, where: range, set_bits: int, clear_bits: int, partial: str) -> Outcome:
        self.begin()
        if partial == "split" and self.over(where):
            self.split_edges(where)
        found = self.over(where)
        changed = 0
        for base, (level, entry) in found:
            new = entry & ~self.format.mask(level, clear_bits) | self.format.mask(level, set_bits)
            changed += new != entry
            self.put(base, Leaf(level, new))
            if not self.quiet(entry, new):
                self.changed.append(range(base, base + size_of(level)))
        return self.done(0 if found else ENOENT, changed)

    def clear(self, where: range, bit: int) -> Outcome:
        """Clear accessed or dirty."""
        self.begin()
        if not bit:
            return self.done(EOPNOTSUPP, 0)
        found = self.over(where)
        had = [(base, leaf) for base, leaf in found if leaf.entry & bit]
        for base, (level, entry) in had:
            self.put(base, Leaf(level, entry & ~bit))
            if bit == self.format.dirty:
                self.changed.append(range(base, base + size_of(level)))
        return self.done(0 if found else ENOENT, len(had))

    def split(self, where: range, level: int) -> Outcome:
        self.begin()
        if not self.over(where):
            return self.done(ENOENT, 0)
        splits = 0
        while larger := [(base, leaf) for base, leaf in self.over(where) if leaf.level > level]:
            for base, leaf in larger:
                self.split_one(base, leaf)
                splits += 1
        return self.done(0, splits)

    def collapse(self, address: int, level: int) -> Outcome:
        self.begin()
        table = Table.over(level - 1, address)
        leaf = self.find(address)
        if table not in self.tables:
            return self.done(EINVAL if leaf and leaf[1].level >= level else ENOENT, 0)
        size = size_of(level - 1)
        children = self.leaves.get(table, {})
        first = children.get(address)
        if len(children) != 512 or first is None or self.format.physical(level - 1, first.entry) % size_of(level):
            return self.done(EINVAL, 0)
        together = first.entry
        for i in range(512):
            entry = children[address + i * size].entry
            if (entry ^ (first.entry + i * size)) & ~self.format.sticky:
                return self.done(EINVAL, 0)
            together |= entry & self.format.sticky
        del self.leaves[table]
        self.tables.remove(table)
        physical = self.format.physical(level - 1, first.entry)
        self.put(address, Leaf(level, self.format.encode(level, physical, self.format.bits(level - 1, together))))
        return self.done(0, 0)

    def store(self, address: int, level: int, entry: int) -> int:
        """Store an absent value or a leaf: the status."""
        self.begin()
        base = address & -size_of(level)
        present = bool(entry & self.format.present)
        if level < self.format.levels and Table.over(level, address) not in self.tables:
            return ENOENT
        table = level > 1 and Table.over(level - 1, address) in self.tables
        old = self.leaves.get(Table.over(level, base), {}).get(base)
        if self.format.arm and present and (table or (old and self.needs_break(old.entry, entry))):
            return EINVAL
        if table:
            return EBUSY
        if old and old.entry != entry:
            self.changed.append(range(base, base + size_of(level)))
        if old:
            self.take(base, old)
        if present:
            self.put(base, Leaf(level, entry))
        return 0

    @staticmethod
    def needs_break(old: int, new: int) -> bool:
        """Arm: output address, block or page, memory attributes, shareability or contiguous change."""
        return bool((old ^ new) & ((1 << 48) - PAGE | 1 << 1 | 0b1111 << 2 | 0b11 << 8 | 1 << 52))


def walk(ram: Sequence[int], root: int, fmt: Format, address: int) -> list[tuple[int, int, int]]:
    """[(level, physical address of the entry, entry)] down to a leaf or a hole."""
    steps = []
    table = root
    for level in range(fmt.levels, 0, -1):
        index = address // size_of(level)
        if level < fmt.levels:
            index %= 512
        entry = int(ram[table // 8 + index])
        steps.append((level, table + index * 8, entry))
        if not entry & fmt.present or fmt.is_leaf(level, entry):
            break
        table = entry & fmt.address
    return steps


def all_tables(ram: Sequence[int], root: int, fmt: Format) -> Iterator[tuple[Table | None, int, int]]:
    """Every table of a tree: which it is (None for a root page), its physical address, its present entries."""
    level = fmt.levels
    pending: list[tuple[int, int, int]] = [(level, i, root + i * PAGE) for i in range(fmt.roots)]
    while pending:
        level, number, at = pending.pop()
        entries = [(i, int(e)) for i, e in enumerate(ram[at // 8 : at // 8 + 512]) if int(e) & fmt.present]
        yield (None if level == fmt.levels else Table(level, number)), at, len(entries)
        if level > 1:
            pending += [
                (level - 1, number * 512 + i, entry & fmt.address)
                for i, entry in entries
                if not fmt.is_leaf(level, entry)
            ]
