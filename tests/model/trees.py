"""Builds page tables in a dict of 64-bit words, for the tests of walks; bits from the manuals, no kernel code."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from model.walks import Format

Place = Callable[[int], int]


def table_bits(kind: str) -> int:
    """A table entry with every permission, accessed."""
    return {"x86": 0x27, "npt": 0x27, "ept": 0x507, "arm": 0x3}[kind]


def leaf_bits(kind: str, level: int) -> int:
    """A leaf with every permission, accessed and dirty."""
    if kind == "arm":
        return 0x7FD | (2 if level == 1 else 0)
    base = 0x777 if kind == "ept" else 0x67
    return base | (0x80 if level > 1 else 0)


@dataclass
class Tree:
    """A tree of tables; `frames` gives the physical addresses of new ones, `place` where an address lies in memory."""

    fmt: Format
    memory: dict[int, int]
    frames: Iterator[int]
    place: Place = lambda address: address
    root: int = 0
    tables: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.root = self.new_table()
        for _ in range((1 << self.fmt.root_bits - 9) - 1):
            self.new_table()

    def new_table(self) -> int:
        table = next(self.frames)
        self.tables.append(table)
        for word in range(512):
            self.memory[self.place(table + 8 * word)] = 0
        return table

    def slot(self, table: int, address: int, level: int) -> int:
        width = self.fmt.root_bits if level == self.fmt.levels else 9
        return self.place(table + 8 * (address >> (12 + 9 * (level - 1)) & (1 << width) - 1))

    def map(self, address: int, level: int, value: int, table_value: Callable[[], int] | None = None) -> bool:
        """Put a leaf at `level`; False where another leaf is in the way."""
        table = self.root
        for above in range(self.fmt.levels, level, -1):
            slot = self.slot(table, address, above)
            entry = self.memory[slot]
            if entry == 0:
                below = self.new_table()
                self.memory[slot] = below | (table_value() if table_value else table_bits(self.fmt.kind))
                table = below
                continue
            table = entry & 0x0000_FFFF_FFFF_F000
            if table not in self.tables:
                return False
        slot = self.slot(table, address, level)
        if self.memory[slot]:
            return False
        self.memory[slot] = value
        return True


def some(rng: random.Random, bits: int, chance: float = 0.9) -> int:
    """Each of the given bits with a chance."""
    return sum(1 << n for n in range(64) if bits >> n & 1 and rng.random() < chance)


def random_table(rng: random.Random, kind: str) -> int:
    value = some(rng, table_bits(kind), 0.99)
    return value | some(rng, 1 << 63 if kind in ("x86", "npt") else 0, 0.05)


def random_leaf(rng: random.Random, kind: str, level: int, address: int) -> int:
    size = 1 << (12 + 9 * (level - 1))
    value = some(rng, leaf_bits(kind, level) & ~0x82) | leaf_bits(kind, level) & (0x82 if level > 1 else 0x2)
    if kind == "arm":
        value = some(rng, leaf_bits(kind, level) & ~0x3, 0.9) | leaf_bits(kind, level) & 0x3
        value |= some(rng, 1 << 51, 0.4) | rng.choice((0, 0, 1, 2, 3)) << 53
    elif kind == "ept":
        value |= some(rng, 1 << 63, 0.5)
    else:
        value |= some(rng, 1 << 63, 0.2) | rng.choice((0, 0, 1, 5, 15)) << 59
    return value | address & ~(size - 1)


def random_address(rng: random.Random, fmt: Format) -> int:
    """One of few upper parts, so that tables are shared; canonical for x86."""
    top = fmt.bits - 12 - 9 * (fmt.levels - 1)
    address = rng.choice((0, 1, (1 << top) - 1, (1 << top) // 2 + 1)) % (1 << top)
    for _ in range(fmt.levels - 1):
        address = address << 9 | rng.choice((0, 1, 2, 511))
    address = address << 12 | rng.randrange(4096)
    if fmt.kind == "x86" and address >> (fmt.bits - 1):
        address |= (1 << 64) - (1 << fmt.bits)
    return address


def flip(rng: random.Random, tree: Tree, times: int) -> None:
    """Flip single bits of entries that are not empty."""
    used = [slot for table in tree.tables for slot in (tree.place(table + 8 * n) for n in range(512))
            if tree.memory[slot]]  # fmt: skip
    for _ in range(times if used else 0):
        tree.memory[rng.choice(used)] ^= 1 << rng.randrange(64)
