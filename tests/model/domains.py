"""An IOMMU's domain the obvious way: leaves by their slots, tables as a set, and Linux's rules of map and unmap.

Written from drivers/iommu/iommu.c and the drivers, once more; nothing is shared with the kernels. A slot is (level,
address); all slots of a leaf hold the same `Leaf`. A table is (level of the entry that points to it, address).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

PAGE = 4096
EFAULT, EINVAL, ERANGE, EADDRINUSE = 14, 22, 34, 98


def size_of(level: int) -> int:
    """Bytes that an entry of a level covers."""
    return PAGE << 9 * (level - 1)


class Leaf(NamedTuple):
    start: int
    size: int
    physical: int
    read: bool
    write: bool

    @property
    def level(self) -> int:
        return (self.size.bit_length() - 13) // 9 + 1


class RefusedError(Exception):
    """What a map returns, as a positive errno."""


@dataclass
class Domain:
    """unit: "vtd" or "amd"; kernel: "6.12", "6.18" or "7.3"."""

    unit: str
    kernel: str
    levels: int
    most: int
    slots: dict[tuple[int, int], Leaf] = field(default_factory=dict)
    tables: set[tuple[int, int]] = field(default_factory=set)

    @property
    def generic(self) -> bool:
        return self.kernel == "7.3"

    @property
    def sizes(self) -> list[int]:
        """Sizes of leaves, the largest first."""
        if self.unit == "vtd":
            return [1 << 30, 2 << 20, PAGE]
        return [1 << bits for bits in range(51, 11, -1) if bits != 39]

    @property
    def limit(self) -> int:
        return 1 << min(12 + 9 * self.levels, 64)

    # ------------------------------------------------------------------ looking

    def leaf_at(self, address: int) -> Leaf | None:
        for level in range(1, 6):
            if leaf := self.slots.get((level, address & -size_of(level))):
                return leaf
        return None

    def level_at(self, address: int) -> int:
        """Level of the leaf or of the hole at an address."""
        level = self.levels
        while (level, address & -size_of(level)) in self.tables:
            level -= 1
        return level

    def entry(self, level: int, leaf: Leaf) -> int:
        """The word in a leaf's slots."""
        if self.unit == "vtd":
            read = leaf.read or self.kernel == "6.12"
            return leaf.physical | read | leaf.write << 1 | (0x80 if level > 1 else 0)
        word = leaf.physical | 1 | 1 << 60 | leaf.read << 61 | leaf.write << 62
        return word if leaf.size == size_of(level) else word | 0xE00 | (leaf.size // 2 - 1) & -PAGE

    def table_bits(self, level: int) -> int:
        if self.unit == "vtd":
            return 0x403 if self.generic else 3
        return 1 | (level - 1) << 9 | 3 << 61

    def within(self, address: int, size: int) -> list[tuple[int, int]]:
        """Slots below [address, address + size)."""
        if size == PAGE:
            return [(1, address)] if (1, address) in self.slots else []
        return [slot for slot in self.slots if address <= slot[1] and slot[1] + size_of(slot[0]) <= address + size]

    def drop_tables(self, address: int, size: int) -> None:
        """Forget the tables of entries within a range."""
        self.tables = {
            (level, base)
            for level, base in self.tables
            if not (address <= base and base + size_of(level) <= address + size)
        }

    def remove(self, leaf: Leaf) -> None:
        for base in range(leaf.start, leaf.start + leaf.size, size_of(leaf.level)):
            del self.slots[leaf.level, base]

    # ------------------------------------------------------------------ map

    def map(self, address: int, physical: int, length: int, read: bool, write: bool) -> int:
        """0 or -errno."""
        while self.unit == "amd" and address + length > self.limit and self.levels < self.most:
            self.levels += 1
            self.tables.add((self.levels, 0))
        if address + length > self.limit:
            return -EFAULT if self.unit == "vtd" and not self.generic else -ERANGE
        done = 0
        try:
            while done < length:
                at, to = address + done, physical + done
                size = next(size for size in self.sizes if not (at | to) % size and size <= length - done)
                self._leaf(Leaf(at, size, to, read, write))
                done += size
        except RefusedError as failed:
            self.unmap(address, done)
            return -int(failed.args[0])
        return 0

    def _leaf(self, leaf: Leaf) -> None:
        level = leaf.level
        for above in range(self.levels, level, -1):
            key = above, leaf.start & -size_of(above)
            if (large := self.slots.get(key)) is not None:
                if self.unit == "vtd" or self.generic:
                    raise RefusedError(EADDRINUSE if self.generic else EINVAL)
                self.remove(large)
            self.tables.add(key)
        stays = False
        for base in range(leaf.start, leaf.start + leaf.size, size_of(level)):
            below = self.within(base, size_of(level))
            if self.generic and below:
                raise RefusedError(EADDRINUSE)
            if self.unit == "vtd" and level == 1 and below:
                stays = True
                continue
            for slot in below:
                del self.slots[slot]
            self.drop_tables(base, size_of(level))
        if not stays:
            for base in range(leaf.start, leaf.start + leaf.size, size_of(level)):
                self.slots[level, base] = leaf

    # ------------------------------------------------------------------ unmap

    def unmap(self, address: int, length: int) -> int | None:
        """Bytes that went; None for what would take a page for a table."""
        done = 0
        while done < length:
            at = address + done
            went = self._piece(at, self._one_call(at, length - done))
            if went is None:
                return None
            if went == 0:
                break
            done += went
        return done

    def _one_call(self, address: int, length: int) -> int:
        """How much of a range one call of the driver gets."""
        size = next(size for size in self.sizes if not address % size and size <= length)
        larger = [one for one in self.sizes if one > size]
        if larger:
            offset = larger[-1] - address % larger[-1]
            if offset + larger[-1] <= length:
                length = offset
        return length // size * size

    def _piece(self, address: int, length: int) -> int | None:
        if address + length > self.limit:
            return 0
        if self.generic:
            return self._until_hole(address, length)
        return self._covered(address, length) if self.unit == "vtd" else self._whole(address, length)

    def _until_hole(self, address: int, length: int) -> int:
        went = 0
        while went < length and (leaf := self.leaf_at(address + went)) and leaf.start == address + went:
            self.remove(leaf)
            went += leaf.size
        self.drop_tables(address, min(went, length))
        return went

    def _covered(self, address: int, length: int) -> int | None:
        length = max(length, size_of(self.level_at(address)))
        if address + length > self.limit:
            return length
        for edge in (address, address + length - 1):
            leaf = self.leaf_at(edge)
            if leaf and (leaf.start < address or leaf.start + leaf.size > address + length):
                return None
        for slot in self.within(address, length):
            del self.slots[slot]
        self.drop_tables(address, length)
        return length

    def _whole(self, address: int, length: int) -> int:
        went, at = 0, address
        while went < length and at < self.limit:
            leaf = self.leaf_at(at)
            if leaf:
                self.remove(leaf)
                went, at = went + leaf.size, leaf.start + leaf.size
            elif self.level_at(at) == 1:
                went, at = went + PAGE, at + PAGE
            else:
                break
        return went
