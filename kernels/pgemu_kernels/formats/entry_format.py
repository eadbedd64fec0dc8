"""What an entry format is: as a walker must know it, one row of uint64 words (words.F_*), and how entries are told.

Levels are KVM's: 1 = 4K, 2 = 2M, 3 = 1G, 4 = 512G, 5 = 256T, 6 = 128P. Plain Python: no numba here.
pgemu.tables.entries decodes entries; leaves.py has those that Linux writes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any

import numpy as np

from pgemu_kernels import words as W
from pgemu_kernels.formats import bits

Words = np.ndarray[Any, Any]
ALL = (1 << 64) - 1
WIDEST_ADDRESS = 52  # bits of a physical address that an entry has room for


def span(low: int, high: int) -> int:
    """Mask of bits `low` to `high`, both included; 0 if `high` is less than `low`."""
    return (1 << max(high + 1, low)) - (1 << low)


class Family(IntEnum):
    """How a format's faults are told."""

    X86 = 0  # page-fault error code
    NPT = 1  # EXITINFO1 of a nested page fault
    EPT = 2  # exit qualification, or EPT misconfiguration
    ARM64 = 3  # fault status code
    VTD = 4  # fault reason of the fault recording registers
    AMD_IOMMU = 5  # flags of the event log's IO_PAGE_FAULT


class FlushRule(IntEnum):
    """What an edit of a tree has flushed.

    arch/x86/mm/tlb.c, virt/kvm/kvm_main.c, arch/arm64/kvm/hyp/pgtable.c, drivers/iommu/intel/cache.c.
    """

    PROCESS = 0  # page by page up to 33 pages, then everything
    WHOLE_VM = 1
    RANGE = 2
    IOTLB = 3  # pages, a power of two of them, up to F_LARGEST_FLUSH, then the domain


class MapRule(IntEnum):
    """What a map does where something is mapped."""

    REFUSE = 0  # -EEXIST, unless it is to replace
    IN_USE = 1  # -EADDRINUSE: drivers/iommu/generic_pt/iommu_pt.h:clear_contig()
    CLEAR_LARGE = 2  # a large leaf replaces, a 4K leaf stays: drivers/iommu/intel/iommu.c:switch_to_super_page()
    REPLACE = 3  # all goes: drivers/iommu/amd/io_pgtable.c:alloc_pte(), free_clear_pte()


class UnmapRule(IntEnum):
    """What an unmap does at leaves that it covers in part, at holes, and with tables."""

    EVERY_LEAF = 0  # every leaf that the range touches, and what the request says of tables
    STOPS = 1  # at a hole and inside a leaf; frees covered tables: drivers/iommu/generic_pt/iommu_pt.h:__unmap_range()
    COVERED = 2  # what the range covers, with the tables: drivers/iommu/intel/iommu.c:dma_pte_clear_level()
    WHOLE = 3  # whole leaves; no table goes: drivers/iommu/amd/io_pgtable.c:iommu_v1_unmap_pages()


class Gather(IntEnum):
    """Which unmaps wait for one flush: include/linux/iommu.h:iommu_iotlb_gather_add_page(), _is_disjoint()."""

    ALL = 0
    ADJACENT = 1  # a gap flushes what was gathered so far
    LIKE = 2  # ... and so does a range of another length


@dataclass(frozen=True)
class Execute:
    """How a leaf says who may execute, by supervisor (EL1) and user (EL0).

    mask: the bits that say it; supervisor_and_user, supervisor, user, nobody: their values, None where the format
    has no way to say so.
    """

    mask: int
    supervisor_and_user: int
    nobody: int | None = None
    supervisor: int | None = None
    user: int | None = None

    def encode(self, supervisor: bool, user: bool) -> int | None:
        """Value of the bits, or None."""
        if supervisor:
            return self.supervisor_and_user if user else self.supervisor
        return self.user if user else self.nobody

    def decode(self, entry: int) -> tuple[bool, bool]:
        """Whether supervisor and user may execute."""
        value = entry & self.mask
        return value in (self.supervisor_and_user, self.supervisor), value in (self.supervisor_and_user, self.user)


@dataclass(frozen=True)
class PageFormat:
    """One entry format. Masks are of 64 bits; a tuple "by level" has an element for each of levels 1 to 5.

    levels: level of the top table. root_tables: concatenated top tables. input_bits: bits of an input address.
    present: an entry is present if any of these bits is set. address: bits that hold a physical address.
    leaf_mask, leaf_value: what makes a present entry above level 1 a leaf; page_mask, page_value: at level 1.
    largest_leaf: highest level that may hold one. reserved_leaf, reserved_table: by level, bits that must be 0.
    invert, fold, table_rights: see words.F_INVERT. bad_low, bad_memory_type: misconfigurations (EPT).
    accessed, dirty: the hardware's bits, 0 without hardware updates. table: bits of a table entry as Linux
    writes it, table_top: the same in the top table, 0 where there is no difference; leaf: by level (1 to 3), of a
    leaf with every permission. empty, frozen: KVM's non-present values. key_shift: where a protection key begins,
    0 for none.

    For encode() and pgemu.entries:
    kernel: release whose software bits these are. maxphyaddr: bits of a physical address.
    leaf_bits: what every leaf has whatever its rights. read, write, user: bits of these rights, 0 where a leaf always
    has the right. execute: who may execute. global_: the global bit.
    memory_type_mask: by level (1 to 3); memory_types: name, and value of these bits by level (1 to 3).
    kvm_leaf: bits that KVM adds to what encode() writes, and kvm_execute to what may be executed. host_writable,
    mmu_writable: KVM's marks. saved_rights: how far up R and X are kept while an entry without an accessed bit is
    watched for accesses (spte.h:SHADOW_ACC_TRACK_SAVED_BITS_SHIFT).
    ignore_pat: the bit that has the guest's PAT ignored, where leaves carry it.
    mmio_mask, mmio_value: what makes an entry a cached MMIO access, 0 for none; mmio_rights: bits of it that keep
    rights; mmio_moved: bits of the guest frame that are set, and kept five bits higher (L1TF).
    protection_none: in an entry that is not present, what makes it one of a process's PROT_NONE pages.
    sized_leaf: a second value of these bits that makes a leaf, whose size is in its address; table_level_shift:
    where a table entry holds the level of the table it points to (AMD IOMMU), 0 for none.
    nx_huge_pages: KVM's iTLB-multihit mitigation. c_bit: the memory encryption bit (SME), 0 without.

    For edits: pat_page, pat_large: the memory-type bit of a 4K leaf that larger ones have elsewhere. break_bits: bits
    of a valid leaf that change only by break-before-make. software: bits that the hardware ignores and Linux uses,
    whose change needs no flush. range_invalidation: the TLB is invalidated by range where more than one entry
    changes; defers_unmap: an unmap, too, invalidates once, by range.

    For edits of an IOMMU's domain: page_sizes: bitmap of sizes that a map chooses from (iommu_pgsize()), 0 where every
    level has one. most_levels: up to which tables are put on top for higher addresses, 0: never. map_rule,
    unmap_rule: what Linux does with what is in the way. largest_flush: an invalidation by pages covers 2 ** this pages
    at most. map_flushes: what is not present is cached, too, so that a map is flushed. gather: which unmaps wait for
    one flush.
    """

    name: str
    family: Family
    flush: FlushRule
    levels: int
    input_bits: int
    present: int
    address: int
    leaf_mask: int
    leaf_value: int
    reserved_leaf: tuple[int, ...]
    reserved_table: tuple[int, ...]
    table: int
    leaf: tuple[int, int, int]
    execute: Execute
    memory_type_mask: tuple[int, int, int]
    memory_types: tuple[tuple[str, tuple[int, int, int]], ...]
    root_tables: int = 1
    sign_extended: bool = False
    page_mask: int = 0
    page_value: int = 0
    largest_leaf: int = 3
    invert: int = 0
    fold: int = 0
    table_rights: int = 0
    bad_low: int = 0
    bad_memory_type: int = 0
    accessed: int = 0
    dirty: int = 0
    table_top: int = 0
    empty: int = 0
    frozen: int = 0
    break_before_make: bool = False
    key_shift: int = 0
    kernel: str = "7.3"
    maxphyaddr: int = WIDEST_ADDRESS
    leaf_bits: int = 0
    read: int = 0
    write: int = 0
    user: int = 0
    global_: int = 0
    kvm_leaf: int = 0
    kvm_execute: int = 0
    saved_rights: int = 0
    ignore_pat: int = 0
    host_writable: int = 0
    mmu_writable: int = 0
    mmio_mask: int = 0
    mmio_value: int = 0
    mmio_rights: int = 0
    mmio_moved: int = 0
    protection_none: int = 0
    sized_leaf: int = 0
    table_level_shift: int = 0
    nx_huge_pages: bool = False
    c_bit: int = 0
    pat_page: int = 0
    pat_large: int = 0
    break_bits: int = 0
    software: int = 0
    range_invalidation: bool = False
    defers_unmap: bool = False
    page_sizes: int = 0
    most_levels: int = 0
    map_rule: MapRule = MapRule.REFUSE
    unmap_rule: UnmapRule = UnmapRule.EVERY_LEAF
    largest_flush: int = 0
    map_flushes: bool = False
    gather: Gather = Gather.ALL

    @property
    def root_bits(self) -> int:
        """Index bits of the top table."""
        return 9 + (self.root_tables - 1).bit_length()

    def has_leaf_form(self, level: int, entry: int) -> bool:
        """Whether a present entry of `level` looks like a leaf, wherever leaves may be; at level 1 like a page."""
        if self.is_sized(entry):
            return True
        mask, value = (self.page_mask, self.page_value) if level == 1 else (self.leaf_mask, self.leaf_value)
        return entry & mask == value

    def have_leaf_form(self, level: int, entries: Words) -> Any:
        """bool[n]: the same of each entry (uint64[n])."""
        mask, value = (self.page_mask, self.page_value) if level == 1 else (self.leaf_mask, self.leaf_value)
        leaf = entries & np.uint64(mask) == np.uint64(value)
        return leaf | (entries & np.uint64(mask) == np.uint64(self.sized_leaf)) if self.sized_leaf else leaf

    def is_sized(self, entry: int) -> bool:
        """Whether the size of a leaf is in its address, so that entries beside it are equal to it."""
        return bool(self.sized_leaf) and entry & self.leaf_mask == self.sized_leaf

    def size_of_leaf(self, level: int, entry: int) -> int:
        """Bytes that a leaf in a table of `level` maps; a sized leaf has ones in its address below half of them."""
        if not self.is_sized(entry):
            return 4096 << 9 * (level - 1)
        zero = ~(entry & self.address) >> 12
        return 2 << 12 + (zero & -zero).bit_length() - 1

    def sizes_of_leaves(self, level: int, entries: Words) -> Any:
        """uint64[n]: size_of_leaf() of each entry (uint64[n])."""
        sizes = np.full(entries.size, 4096 << 9 * (level - 1), np.uint64)
        if self.sized_leaf:
            sized = entries & np.uint64(self.leaf_mask) == np.uint64(self.sized_leaf)
            # Adding one to ones carries to the zero above them; the size is twice that.
            ones = (entries[sized] & np.uint64(self.address)) + np.uint64(4096)
            sizes[sized] = (ones & ~(ones - np.uint64(1))) << np.uint64(1)
        return sizes

    def leaf_address(self, level: int, entry: int) -> int:
        """Physical address that a leaf begins at."""
        return entry & self.address & -self.size_of_leaf(level, entry)

    def reserved_in(self, level: int, entry: int) -> int:
        """Reserved bits that a present entry has, as a leaf or as a table entry."""
        if self.has_leaf_form(level, entry):
            # Address bits below its level's size are no reserved ones of a leaf that has its size there.
            return entry & self.reserved_leaf[0 if self.is_sized(entry) else min(level, len(self.reserved_leaf)) - 1]
        return entry & self.reserved_table[level - 1]

    def skips_level(self, level: int, entry: int) -> bool:
        """Whether a table entry says that the table below is of another level than the next: Linux makes none."""
        return bool(self.table_level_shift) and entry >> self.table_level_shift & 7 != level - 1

    def frame(self, level: int) -> int:
        """Bits of a leaf of `level` that hold its physical address."""
        return self.address & -(4096 << 9 * (level - 1))

    def encode(
        self,
        level: int,
        address: int,
        *,
        read: bool = True,
        write: bool = True,
        execute: bool = True,
        execute_user: bool | None = None,
        user: bool = True,
        accessed: bool = True,
        dirty: bool | None = None,
        global_: bool = False,
        memory_type: str = "WB",
        key: int = 0,
        extra: int = 0,
    ) -> int:
        """A leaf of `level` at physical `address`, with these rights and states.

        execute_user: the same as `execute` unless given (EPT with mode-based execute, Arm FEAT_XNX). dirty: as
        `write` unless given; where hardware has no such bit, `accessed` and `dirty` change nothing. memory_type: a
        name of `memory_types`. key: protection key. extra: bits to add as they are (software bits, IPAT, DBM).
        ValueError for what the format cannot say: a level without leaves, an address that is not aligned or too
        wide, a right that cannot be withheld, an unknown memory type, a bit that has a meaning of its own.
        """
        if not 1 <= level <= min(self.largest_leaf, self.levels):
            raise ValueError(f"{self.name}: no leaf at level {level}: expected 1 to {self.largest_leaf}")
        fields = (
            self._frame_of(level, address)
            | (self.page_value if level == 1 else self.leaf_value)
            | self._rights(read, write, user)
            | self._execute(execute, execute if execute_user is None else execute_user)
            | self._memory_type(level, memory_type)
            | self._optional("global", self.global_, global_)
            | (self.accessed if accessed else 0)
            | (self.dirty & ~self.write if (write if dirty is None else dirty) else 0)
            | self._key(key)
        )
        if taken := extra & self._meaning(level):
            raise ValueError(f"{self.name}: bits {taken:#x} are reserved or have arguments of their own")
        return fields | self.leaf_bits | self.c_bit | extra

    def table_entry(self, address: int, level: int = 2) -> int:
        """An entry of `level` that points to the table at physical `address`, as Linux writes it.

        ValueError if the address is not a multiple of 4096 or too wide, or `level` is not one of 2 to `levels`.
        """
        if not 2 <= level <= self.levels:
            raise ValueError(f"{self.name}: no tables below level {level}: expected 2 to {self.levels}")
        if address & ~self.address or address >> self.maxphyaddr:
            raise ValueError(f"{self.name}: {address:#x} is not a table's address of {self.maxphyaddr} bits")
        below = level - 1 << self.table_level_shift if self.table_level_shift else 0
        return address | below | (self.table_top if level == self.levels and self.table_top else self.table)

    def _frame_of(self, level: int, address: int) -> int:
        if address & ~self.frame(level) or address >> self.maxphyaddr:
            size = 4096 << 9 * (level - 1)
            raise ValueError(
                f"{self.name}: {address:#x} is not a multiple of {size:#x} with at most {self.maxphyaddr} bits"
            )
        return address

    def _rights(self, read: bool, write: bool, user: bool) -> int:
        found = 0
        for name, mask, granted in (("read", self.read, read), ("user", self.user, user)):
            if not granted and not mask:
                raise ValueError(f"{self.name}: a leaf cannot withhold {name}")
            found |= mask if granted else 0
        return found | (self.write if write else 0)

    def _execute(self, supervisor: bool, user: bool) -> int:
        value = self.execute.encode(supervisor, user)
        if value is None:
            raise ValueError(f"{self.name}: supervisor and user execute together or not at all")
        return value

    def _memory_type(self, level: int, name: str) -> int:
        for known, values in self.memory_types:
            if known == name:
                return values[min(level, 3) - 1]
        known_names = ", ".join(dict.fromkeys(known for known, _ in self.memory_types))
        raise ValueError(f"{self.name}: memory type {name!r}: expected one of {known_names}")

    def _optional(self, name: str, mask: int, wanted: bool) -> int:
        if wanted and not mask:
            raise ValueError(f"{self.name}: a leaf has no {name} bit")
        return mask if wanted else 0

    def _key(self, key: int) -> int:
        if (key and not self.key_shift) or not 0 <= key < 16:
            raise ValueError(f"{self.name}: protection key {key}: expected {'0 to 15' if self.key_shift else '0'}")
        return key << self.key_shift

    def _meaning(self, level: int) -> int:
        """Bits of a leaf that the arguments of encode() speak of."""
        key = 0xF << self.key_shift if self.key_shift else 0
        rights = self.read | self.write | self.user | self.execute.mask | self.present | self.global_ | key
        kind = self.page_mask if level == 1 else self.leaf_mask
        return (
            rights | kind | self.memory_type_mask[min(level, 3) - 1] | self.accessed | self.dirty | self.c_bit
            | self.frame(level) | self.reserved_leaf[level - 1] | self.leaf_bits
        )  # fmt: skip

    def row(self) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        """The format as kernels read it: uint64[F_WORDS]."""
        words = {word: getattr(self, name) for name, word in WORDS_OF_FIELDS.items()} | {
            W.F_LARGE: self.leaf_mask if self.leaf_value else 0,
            W.F_TABLE_TOP: self.table_top or self.table,
            W.F_LEAF_4K: self.leaf[0],
            W.F_LEAF_2M: self.leaf[1],
            W.F_LEAF_1G: self.leaf[2],
            W.F_ROOT_BITS: self.root_bits,
            W.F_RANGE_FLUSH: self.range_invalidation | self.defers_unmap << 1,
            W.F_MMU_PRESENT: self.kvm_leaf & bits.MMU_PRESENT or self.present,
            W.F_WRITABLE_MARKS: self.host_writable | self.mmu_writable,
            W.F_EXECUTE: self.execute.supervisor_and_user | self.kvm_execute,
            W.F_MEMORY_TYPE: self.leaf[0] & (self.memory_type_mask[0] | self.ignore_pat),
            W.F_MMIO_VALUE: self.mmio_value | self.mmio_rights,
            W.F_MMIO_GUARD: self.mmio_moved,
            W.F_TABLE_LEVEL: self.table_level_shift,
            W.F_SIZED_MASK: self.leaf_mask if self.sized_leaf else 0,
        }
        row = np.zeros(W.F_WORDS, np.uint64)
        for word, value in words.items():
            row[int(word)] = value
        for level, mask in enumerate(self.reserved_leaf, 1):
            row[int(W.F_RESERVED_LEAF) + level] = mask
        for level, mask in enumerate(self.reserved_table[1:], 2):
            row[int(W.F_RESERVED_TABLE) + level] = mask
        return row


_NUMBERS = ("int", "bool", "Family", "FlushRule", "MapRule", "UnmapRule", "Gather")
# Words that hold what the field of their name says: F_PRESENT is `present`. row() makes the others.
WORDS_OF_FIELDS = {
    field.name: vars(W)[f"F_{field.name.upper()}"]
    for field in fields(PageFormat)
    if f"F_{field.name.upper()}" in vars(W) and field.type in _NUMBERS
}


def check_width(maxphyaddr: int, widest: int = WIDEST_ADDRESS) -> None:
    """ValueError unless a physical address can have that many bits."""
    if not 12 < maxphyaddr <= widest:
        raise ValueError(f"{maxphyaddr} bits of physical address: expected 13 to {widest}")


def check_levels(levels: int) -> None:
    """ValueError unless Intel and AMD have tables of that many levels."""
    if levels not in (4, 5):
        raise ValueError(f"{levels} levels: expected 4 or 5")


def c_bit_mask(position: int | None) -> int:
    """The encryption bit. ValueError where it cannot be."""
    if position is not None and not 32 <= position < WIDEST_ADDRESS:
        raise ValueError(f"encryption bit {position}: expected 32 to {WIDEST_ADDRESS - 1}")
    return 0 if position is None else 1 << position
