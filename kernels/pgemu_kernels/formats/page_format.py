"""Entry formats as data: what a walker must know about each, as one row of uint64 words (words.F_*).

Bits and their sources: Intel SDM volume 3 ("4-Level Paging", "EPT"), AMD APM volume 2 (15.25), Arm DDI 0487
("Stage 2"), arch/x86/kvm/mmu/mmu.c:__reset_rsvds_bits_mask() and __reset_rsvds_bits_mask_ept(), and
arch/arm64/include/asm/kvm_pgtable.h. Levels are KVM's: 1 = 4K, 2 = 2M, 3 = 1G, 4 = 512G, 5 = 256T.
Plain Python: no numba here. pgemu.entries decodes entries; leaves.py has those that Linux writes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import partial

import numpy as np

from pgemu_kernels import words as W
from pgemu_kernels.formats import bits

ALL = (1 << 64) - 1
LEVELS = (1, 2, 3, 4, 5)
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
    VTD = 4  # fault recording registers: not modelled
    AMD_IOMMU = 5  # event log: not modelled


class FlushRule(IntEnum):
    """What an edit of a tree has flushed: arch/x86/mm/tlb.c, virt/kvm/kvm_main.c, arch/arm64/kvm/hyp/pgtable.c."""

    PROCESS = 0  # page by page up to 33 pages, then everything
    WHOLE_VM = 1
    RANGE = 2


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

    @property
    def root_bits(self) -> int:
        """Index bits of the top table."""
        return 9 + (self.root_tables - 1).bit_length()

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
                return values[level - 1]
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
            rights | kind | self.memory_type_mask[level - 1] | self.accessed | self.dirty | self.c_bit
            | self.frame(level) | self.reserved_leaf[level - 1] | self.leaf_bits
        )  # fmt: skip

    def row(self) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        """The format as kernels read it: uint64[F_WORDS]."""
        words = {
            W.F_PRESENT: self.present,
            W.F_LARGE: self.leaf_mask if self.leaf_value else 0,
            W.F_ADDRESS: self.address,
            W.F_TABLE: self.table,
            W.F_TABLE_TOP: self.table_top or self.table,
            W.F_LEAF_4K: self.leaf[0],
            W.F_LEAF_2M: self.leaf[1],
            W.F_LEAF_1G: self.leaf[2],
            W.F_EMPTY: self.empty,
            W.F_LEVELS: self.levels,
            W.F_ROOT_BITS: self.root_bits,
            W.F_INPUT_BITS: self.input_bits,
            W.F_SIGN_EXTENDED: self.sign_extended,
            W.F_LEAF_MASK: self.leaf_mask,
            W.F_LEAF_VALUE: self.leaf_value,
            W.F_PAGE_MASK: self.page_mask,
            W.F_PAGE_VALUE: self.page_value,
            W.F_LARGEST_LEAF: self.largest_leaf,
            W.F_INVERT: self.invert,
            W.F_FOLD: self.fold,
            W.F_TABLE_RIGHTS: self.table_rights,
            W.F_BAD_LOW: self.bad_low,
            W.F_BAD_MEMORY_TYPE: self.bad_memory_type,
            W.F_FAMILY: self.family,
            W.F_ACCESSED: self.accessed,
            W.F_DIRTY: self.dirty,
            W.F_FROZEN: self.frozen,
            W.F_BREAK_BEFORE_MAKE: self.break_before_make,
            W.F_FLUSH: self.flush,
            W.F_KEY_SHIFT: self.key_shift,
            W.F_PAT_PAGE: self.pat_page,
            W.F_PAT_LARGE: self.pat_large,
            W.F_BREAK_BITS: self.break_bits,
            W.F_SOFTWARE: self.software,
            W.F_RANGE_FLUSH: self.range_invalidation | self.defers_unmap << 1,
            W.F_MMU_PRESENT: self.kvm_leaf & bits.MMU_PRESENT or self.present,
            W.F_WRITE: self.write,
            W.F_WRITABLE_MARKS: self.host_writable | self.mmu_writable,
            W.F_MMU_WRITABLE: self.mmu_writable,
            W.F_EXECUTE: self.execute.supervisor_and_user | self.kvm_execute,
            W.F_MEMORY_TYPE: self.leaf[0] & (self.memory_type_mask[0] | self.ignore_pat),
            W.F_MMIO_VALUE: self.mmio_value | self.mmio_rights,
            W.F_MMIO_GUARD: self.mmio_moved,
        }
        row = np.zeros(W.F_WORDS, np.uint64)
        for word, value in words.items():
            row[int(word)] = value
        for level in LEVELS:
            row[int(W.F_RESERVED_LEAF) + level] = self.reserved_leaf[level - 1]
            if level > 1:
                row[int(W.F_RESERVED_TABLE) + level] = self.reserved_table[level - 1]
        return row


def check_width(maxphyaddr: int, widest: int = WIDEST_ADDRESS) -> None:
    """ValueError unless a physical address can have that many bits."""
    if not 12 < maxphyaddr <= widest:
        raise ValueError(f"{maxphyaddr} bits of physical address: expected 13 to {widest}")


def _check_levels(levels: int) -> None:
    if levels not in (4, 5):
        raise ValueError(f"{levels} levels: expected 4 or 5")


def _c_bit(position: int | None) -> int:
    if position is not None and not 32 <= position < WIDEST_ADDRESS:
        raise ValueError(f"encryption bit {position}: expected 32 to {WIDEST_ADDRESS - 1}")
    return 0 if position is None else 1 << position


# --------------------------------------------------------------------------- x86-64 and NPT

NO_EXECUTE = bits.NO_EXECUTE


def _x86_execute(nx: bool) -> Execute:
    return Execute(NO_EXECUTE, 0, NO_EXECUTE) if nx else Execute(0, 0)


def _pat(index: int) -> tuple[int, int, int]:
    """Bits of a PAT index by level: PAT is bit 7 of a 4K entry, bit 12 of a larger leaf."""
    low = (bits.WRITE_THROUGH if index & 1 else 0) | (bits.CACHE_DISABLE if index & 2 else 0)
    small, large = (bits.PAT_4K, bits.PAT_LARGE) if index & 4 else (0, 0)
    return low | small, low | large, low | large


# Linux's PAT MSR: arch/x86/mm/pat/memtype.c:pat_bp_init(). The first index with a name is the one that is written.
_PAT_TYPES = ("WB", "WC", "UC-", "UC", "WB", "WP", "UC-", "WT")
_PAT_MASK = _pat(7)
X86_MEMORY_TYPES = tuple((name, _pat(index)) for index, name in enumerate(_PAT_TYPES))


def _x86_reserved(
    maxphyaddr: int, nx: bool, pages_1g: bool, amd: bool, c_bit: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Reserved bits of x86-64 entries: (leaf by level, table by level).

    Bit 8 of a table entry is reserved at levels 4 and 5 on AMD. page-tables.md 1.3 says so of level 3, too, which is
    what KVM did until 5.9; commit 5ecad245de2a corrected it (AMD ignores it there).
    """
    high = (span(maxphyaddr, 51) | (0 if nx else NO_EXECUTE)) & ~c_bit
    one_gigabyte = high | (span(13, 29) if pages_1g else bits.LARGE)
    leaf = (high, high | span(13, 20), one_gigabyte, high, high)
    top = high | bits.LARGE | (1 << 8 if amd else 0)
    # Without 1G pages bit 7 of a level-3 entry is reserved whatever else it holds.
    level_3 = high | (0 if pages_1g else bits.LARGE)
    return leaf, (0, high, level_3, top, top)


def x86_64(
    levels: int = 4,
    *,
    maxphyaddr: int = WIDEST_ADDRESS,
    nx: bool = True,
    pages_1g: bool = True,
    amd: bool = False,
    pti: bool = False,
    c_bit: int | None = None,
    kernel: str = "7.3",
) -> PageFormat:
    """x86-64 paging of 4 or 5 levels, entries as Linux writes them for a process.

    maxphyaddr: bits from there to 51 are reserved. nx: EFER.NXE. pages_1g: CPUID Page1GB.
    amd: bit 8 of table entries at level 4 and above is reserved. pti: page-table isolation; entries of the top table
    are those of the kernel's copy, which cannot be executed by the user (arch/x86/mm/pti.c:__pti_set_user_pgtbl()).
    c_bit: position of the SME encryption bit. KeyError for a kernel that is not in formats.RELEASES.
    """
    _check_levels(levels)
    check_width(maxphyaddr)
    encrypted = _c_bit(c_bit)
    leaf, table = _x86_reserved(maxphyaddr, nx, pages_1g, amd, encrypted)
    executable = bits.FILE_LEAF & ~NO_EXECUTE | encrypted
    return PageFormat(
        name="x86-64" if levels == 4 else "x86-64-5",
        family=Family.X86,
        flush=FlushRule.PROCESS,
        levels=levels,
        input_bits=12 + 9 * levels,
        sign_extended=True,
        present=bits.PRESENT,
        address=bits.ADDRESS & ~encrypted,
        leaf_mask=bits.LARGE,
        leaf_value=bits.LARGE,
        largest_leaf=3 if pages_1g else 2,
        reserved_leaf=leaf,
        reserved_table=table,
        invert=NO_EXECUTE,
        accessed=bits.ACCESSED,
        dirty=bits.DIRTY,
        table=bits.TABLE | encrypted,
        table_top=bits.TABLE | encrypted | NO_EXECUTE if pti else 0,
        leaf=(executable, executable | bits.LARGE, executable | bits.LARGE),
        key_shift=59,
        kernel=bits.RELEASES[kernel].release,
        maxphyaddr=maxphyaddr,
        leaf_bits=bits.PRESENT,
        write=bits.WRITE,
        user=bits.USER,
        execute=_x86_execute(nx),
        global_=bits.GLOBAL,
        memory_type_mask=_PAT_MASK,
        memory_types=X86_MEMORY_TYPES,
        protection_none=bits.PROTECTION_NONE,
        c_bit=encrypted,
        pat_page=bits.PAT_4K,
        pat_large=bits.PAT_LARGE,
        # arch/x86/include/asm/tlbflush.h:pte_flags_need_flush(); bit 58 holds the dirty bit of read-only leaves.
        software=0b111 << 9 | 0b11 << 57,
    )  # fmt: skip


def _npt_mmio(maxphyaddr: int, c_bit: int | None, reduced: int) -> int:
    """Bits of a cached MMIO access, 0 where there is no reserved address bit to tell it by.

    arch/x86/kvm/mmu/spte.c:kvm_mmu_reset_all_pte_masks(); with SME arch/x86/kvm/svm/svm.c:svm_adjust_mmio_mask().
    """
    if c_bit is None:
        return 1 << 51 | bits.PRESENT if maxphyaddr < WIDEST_ADDRESS else 0
    lowest = reduced + 1 if reduced == c_bit else reduced
    return span(lowest, 51) | bits.PRESENT if lowest < WIDEST_ADDRESS else 0


def npt(
    levels: int = 4,
    *,
    maxphyaddr: int = 51,
    nx: bool = True,
    pages_1g: bool = True,
    c_bit: int | None = None,
    reduced: int | None = None,
    kernel: str = "7.3",
) -> PageFormat:
    """AMD nested paging of 4 or 5 levels, entries as KVM of `kernel` writes them. APM 15.25.

    maxphyaddr: CPUID 80000008H EAX[7:0]. c_bit: position of the encryption bit while the host uses SME (CPUID
    8000001FH EBX[5:0]); entries carry it, and `reduced` (default: c_bit) is what remains of the address bits.
    A CPU with 52 bits has no reserved bit: KVM caches no MMIO accesses then. KeyError for an unknown kernel.
    """
    _check_levels(levels)
    check_width(maxphyaddr)
    encrypted = _c_bit(c_bit)
    if c_bit is not None:
        maxphyaddr = c_bit if reduced is None else reduced
    leaf, table = _x86_reserved(maxphyaddr, nx, pages_1g, True, encrypted)
    mmio = _npt_mmio(maxphyaddr, c_bit, maxphyaddr)
    parameters = bits.RELEASES[kernel]
    small = bits.NPT_LEAF | encrypted
    return PageFormat(
        name="npt" if levels == 4 else "npt-5",
        family=Family.NPT,
        flush=FlushRule.WHOLE_VM,
        levels=levels,
        input_bits=12 + 9 * levels,
        present=bits.PRESENT,
        address=bits.ADDRESS & ~encrypted,
        leaf_mask=bits.LARGE,
        leaf_value=bits.LARGE,
        largest_leaf=3 if pages_1g else 2,
        reserved_leaf=leaf,
        reserved_table=table,
        invert=NO_EXECUTE,
        accessed=bits.ACCESSED,
        dirty=bits.DIRTY,
        table=bits.NPT_TABLE | encrypted,
        leaf=(small, small | bits.LARGE, small | bits.LARGE),
        empty=parameters.empty_spte,
        frozen=parameters.empty_spte | bits.FROZEN_LOW,
        kernel=parameters.release,
        maxphyaddr=maxphyaddr,
        leaf_bits=bits.PRESENT,
        write=bits.WRITE,
        user=bits.USER,
        execute=_x86_execute(nx),
        global_=bits.GLOBAL,
        memory_type_mask=_PAT_MASK,
        memory_types=X86_MEMORY_TYPES,
        kvm_leaf=bits.MMU_PRESENT,
        host_writable=bits.HOST_WRITABLE,
        mmu_writable=bits.MMU_WRITABLE,
        mmio_mask=mmio,
        mmio_value=mmio,
        mmio_rights=bits.WRITE | bits.USER,
        c_bit=encrypted,
        pat_page=bits.PAT_4K,
        pat_large=bits.PAT_LARGE,
        software=0b111 << 9 | span(52, 58),
    )


# --------------------------------------------------------------------------- EPT

EPT_EXECUTE = 1 << 2
EPT_IGNORE_PAT = 1 << 6
EPT_MISCONFIGURED = 0b110  # VMX_EPT_MISCONFIG_WX_VALUE: KVM's cached MMIO access
EPT_MEMORY_TYPES = ((0, "UC"), (1, "WC"), (4, "WT"), (5, "WP"), (6, "WB"))


def ept(
    levels: int = 4,
    *,
    maxphyaddr: int = WIDEST_ADDRESS,
    kernel: str = "7.3",
    accessed_dirty: bool = True,
    execute_only: bool = True,
    mode_based_execute: bool = False,
    ignore_pat: bool = True,
    nx_huge_pages: bool = False,
    pages_1g: bool = True,
    l1tf_cache_bits: int | None = None,
) -> PageFormat:
    """Intel EPT of 4 or 5 levels, entries as KVM of `kernel` writes them.

    accessed_dirty: EPTP bit 6. execute_only: execute without read is allowed. mode_based_execute: bit 10 alone
    makes an entry present, too. ignore_pat: leaves carry IPAT. nx_huge_pages: the iTLB-multihit mitigation.
    pages_1g: 1G leaves exist (IA32_VMX_EPT_VPID_CAP bit 17). l1tf_cache_bits: on a CPU with L1TF, physical address
    bits of its L1 cache (x86_cache_bits, 44 on Haswell): cached MMIO accesses then set the highest five of them.
    Of 7.3 only what was captured is known: which of bits 53 and 55 is which, and where marks of entries without
    accessed and dirty bits lie (as in 7.1 here), is inference.
    KeyError for a kernel that is not in formats.RELEASES.
    """
    _check_levels(levels)
    check_width(maxphyaddr)
    if l1tf_cache_bits is not None and not 32 <= l1tf_cache_bits < WIDEST_ADDRESS - 5:
        raise ValueError(f"{l1tf_cache_bits} bits of L1 cache address: expected 32 to {WIDEST_ADDRESS - 6}")
    parameters = bits.RELEASES[kernel]
    high = span(maxphyaddr, 51)
    suppress = bits.SUPPRESS_VE if parameters.empty_spte else 0
    kvm = bits.MMU_PRESENT | suppress | (0 if accessed_dirty else bits.EPT_AD_DISABLED)
    base = bits.EPT_RWX | 6 << 3 | kvm | parameters.ept_writable | parameters.ept_extra
    if accessed_dirty:
        base |= bits.EPT_ACCESSED | bits.EPT_DIRTY
    if ignore_pat:
        base |= EPT_IGNORE_PAT
    user_execute = bits.EPT_USER_EXECUTE if mode_based_execute else 0
    large = base | bits.LARGE
    if nx_huge_pages:
        large &= ~(EPT_EXECUTE | bits.EPT_USER_EXECUTE)
    one_gigabyte = 0 if pages_1g else bits.LARGE
    host_writable = parameters.ept_writable & -parameters.ept_writable
    return PageFormat(
        name="ept" if levels == 4 else "ept-5",
        family=Family.EPT,
        flush=FlushRule.WHOLE_VM,
        levels=levels,
        input_bits=12 + 9 * levels,
        present=bits.EPT_RWX | user_execute,
        address=bits.ADDRESS,
        leaf_mask=bits.LARGE,
        leaf_value=bits.LARGE,
        largest_leaf=3 if pages_1g else 2,
        reserved_leaf=(high, high | span(12, 20), high | span(12, 29) | one_gigabyte, high, high),
        reserved_table=(
            0, high | span(3, 6), high | span(3, 6) | one_gigabyte, high | span(3, 7), high | span(3, 7)
        ),
        # Without execute-only every entry that executes must be readable, by bit 10 alone, too.
        bad_low=1 << 0b010 | 1 << 0b110 | (0 if execute_only else 1 << 0b100 | (1 if mode_based_execute else 0)),
        bad_memory_type=1 << 2 | 1 << 3 | 1 << 7,
        accessed=bits.EPT_ACCESSED if accessed_dirty else 0,
        dirty=bits.EPT_DIRTY if accessed_dirty else 0,
        table=bits.EPT_RWX | kvm | parameters.ept_extra | (bits.EPT_ACCESSED if accessed_dirty else 0),
        leaf=(base, large, large),
        empty=parameters.empty_spte,
        frozen=parameters.empty_spte | bits.FROZEN_LOW,
        kernel=parameters.release,
        maxphyaddr=maxphyaddr,
        read=1 << 0,
        write=1 << 1,
        execute=Execute(
            mask=EPT_EXECUTE | user_execute,
            supervisor_and_user=EPT_EXECUTE | user_execute,
            nobody=0,
            supervisor=EPT_EXECUTE if mode_based_execute else None,
            user=user_execute or None,
        ),
        memory_type_mask=(7 << 3, 7 << 3, 7 << 3),
        memory_types=tuple((name, (code << 3, code << 3, code << 3)) for code, name in EPT_MEMORY_TYPES),
        kvm_leaf=kvm | (EPT_IGNORE_PAT if ignore_pat else 0),
        ignore_pat=EPT_IGNORE_PAT if ignore_pat else 0,
        kvm_execute=parameters.ept_extra & ~user_execute,
        saved_rights=0 if accessed_dirty else 54,
        host_writable=host_writable,
        mmu_writable=parameters.ept_writable & ~host_writable,
        mmio_mask=bits.EPT_RWX | suppress,
        mmio_value=EPT_MISCONFIGURED,
        mmio_moved=0 if l1tf_cache_bits is None else span(l1tf_cache_bits - 5, l1tf_cache_bits - 1),
        nx_huge_pages=nx_huge_pages,
        software=bits.MMU_PRESENT | span(52, 56) | parameters.ept_writable,
    )  # fmt: skip


# --------------------------------------------------------------------------- Arm64 stage 2

ARM_VALID = 1 << 0
ARM_TABLE = 1 << 1  # a table at levels 2 and above, a page at level 1
ARM_READ = 1 << 6
ARM_WRITE = 1 << 7
ARM_INNER_SHAREABLE = 0b11 << 8
ARM_ACCESSED = 1 << 10
ARM_LOCKED = 1 << 10  # of an invalid entry: a change is under way (a type nibble from 7.1 on)
ARM_DIRTY_MODIFIER = 1 << 51
ARM_NO_EXECUTE = 0b10 << 53  # XN[1:0] = 10: nobody executes
_ARM_MEMORY_TYPES = (("WB", 0b1111), ("NC", 0b0101), ("nGnRE", 0b0001))  # arm64/include/asm/memory.h:MT_S2_*
_ARM_MEMORY_TYPES_FWB = (("WB", 0b0110), ("NC", 0b0101), ("nGnRE", 0b0001))


def arm64_stage2(
    ipa_bits: int = 40,
    *,
    fwb: bool = True,
    hardware_access_flag: bool = True,
    kernel: str = "7.3",
    maxphyaddr: int = 48,
    range_invalidation: bool = True,
) -> PageFormat:
    """Arm64 stage 2, 4K granule, as KVM of `kernel` writes it.

    ipa_bits: 32 to 48; up to 34 two levels, up to 43 three, then four, with up to 16 concatenated root tables
    (arch/arm64/include/asm/stage2_pgtable.h:stage2_pgtable_levels()). fwb: FEAT_S2FWB memory attributes.
    hardware_access_flag: VTCR_EL2.HA. maxphyaddr: output address bits; an entry with a higher one is an address size
    fault. Kernels up to 6.18 write XN as one bit, 54, and bit 53 is reserved; later ones write both bits of FEAT_XNX.
    Reserved bits are those beyond the output address and those that are RES0 without FEAT_LPA2 (in a block also the
    address bits below its size): hardware may ignore the latter, KVM leaves them clear.
    range_invalidation: FEAT_TLBIRANGE.
    ValueError for another size; KeyError for a kernel that is not in formats.RELEASES.
    """
    if not 32 <= ipa_bits <= 48:
        raise ValueError(f"{ipa_bits} bits of intermediate physical address: expected 32 to 48")
    check_width(maxphyaddr, 48)
    parameters = bits.RELEASES[kernel]
    levels = -(-(ipa_bits - 4 - 12) // 9)
    types = _ARM_MEMORY_TYPES_FWB if fwb else _ARM_MEMORY_TYPES
    base = ARM_VALID | ARM_READ | ARM_WRITE | ARM_INNER_SHAREABLE | ARM_ACCESSED | types[0][1] << 2
    high = span(maxphyaddr, 50)
    one_bit = 0 if parameters.arm_two_bit_xn else 1 << 53
    leaf = high | one_bit
    return PageFormat(
        name="arm64-s2",
        family=Family.ARM64,
        flush=FlushRule.RANGE,
        levels=levels,
        input_bits=ipa_bits,
        root_tables=1 << max(0, ipa_bits - 12 - 9 * levels),
        present=ARM_VALID,
        address=span(12, 47),
        leaf_mask=ARM_TABLE,
        leaf_value=0,
        page_mask=ARM_TABLE,
        page_value=ARM_TABLE,
        largest_leaf=min(3, levels),
        reserved_leaf=(leaf, leaf | span(12, 20), leaf | span(12, 29), 0, 0),
        reserved_table=(0, high, high, high, high),
        # Bit 53 becomes "EL1 executes", bit 54 "EL0 executes": XN is 00 both, 01 not EL1, 10 none, 11 not EL0.
        fold=1 << 53,
        invert=0b11 << 53,
        table_rights=ALL,
        accessed=ARM_ACCESSED if hardware_access_flag else 0,
        dirty=ARM_WRITE,
        table=ARM_VALID | ARM_TABLE,
        leaf=(base | ARM_TABLE, base, base),
        frozen=parameters.arm_locked,
        break_before_make=True,
        kernel=parameters.release,
        maxphyaddr=maxphyaddr,
        # Without hardware updates KVM sets the access flag itself: stage2_set_prot_attr().
        leaf_bits=ARM_VALID | ARM_INNER_SHAREABLE | (0 if hardware_access_flag else ARM_ACCESSED),
        read=ARM_READ,
        write=ARM_WRITE,
        execute=Execute(
            mask=0b11 << 53 if parameters.arm_two_bit_xn else 1 << 54,
            supervisor_and_user=0,
            nobody=ARM_NO_EXECUTE,
            supervisor=0b11 << 53 if parameters.arm_two_bit_xn else None,
            user=0b01 << 53 if parameters.arm_two_bit_xn else None,
        ),
        memory_type_mask=(0b1111 << 2,) * 3,
        memory_types=tuple((name, (code << 2,) * 3) for name, code in types),
        # Output address, block or page, memory attributes, shareability, contiguous: Arm DDI 0487, "Break-before-make".
        break_bits=span(12, 47) | ARM_TABLE | span(2, 5) | span(8, 9) | 1 << 52,
        software=span(55, 58),
        range_invalidation=range_invalidation,
        # arch/arm64/kvm/hyp/pgtable.c:stage2_unmap_defer_tlb_flush()
        defers_unmap=range_invalidation and fwb,
    )


def machine_formats(
    kernel: str, *, nx_huge_pages: bool = False, l1tf: bool = False, pti: bool = False
) -> tuple[PageFormat, PageFormat, PageFormat]:
    """The formats that every machine has, as `kernel` writes them: of processes, NPT, EPT.

    `l1tf`: a processor with that bug and 44 bits of cache address, as captured. KeyError for an unknown kernel.
    """
    cache_bits = 44 if l1tf else None
    return (
        x86_64(kernel=kernel, pti=pti),
        npt(kernel=kernel),
        ept(kernel=kernel, nx_huge_pages=nx_huge_pages, l1tf_cache_bits=cache_bits),
    )


def format_table(
    kernel: str, *, nx_huge_pages: bool = False, l1tf: bool = False, pti: bool = False
) -> np.ndarray[tuple[int, int], np.dtype[np.uint64]]:
    """`machine_formats` as kernels read them: uint64[3, F_WORDS].

    Rows formats.HOST_X86_64, with the leaves of the designs' mappings, STAGE2_NPT and STAGE2_EPT.
    """
    every = machine_formats(kernel, nx_huge_pages=nx_huge_pages, l1tf=l1tf, pti=pti)
    table = np.array([fmt.row() for fmt in every], np.uint64)
    leaves = {
        W.F_LEAF_4K: bits.FILE_LEAF,
        W.F_LEAF_2M: bits.FILE_LEAF | bits.LARGE,
        W.F_LEAF_1G: bits.FILE_LEAF | bits.LARGE,
        W.F_LEAF_4K_RO: bits.FILE_LEAF_READ_ONLY,
        W.F_SPECIAL_4K: bits.PFN_LEAF,
        W.F_SPECIAL_4K_RO: bits.PFN_LEAF_READ_ONLY,
    }
    for word, value in leaves.items():
        table[bits.HOST_X86_64, int(word)] = value
    return table


FORMATS: dict[str, Callable[..., PageFormat]] = {
    "x86-64": x86_64,
    "x86-64-5": partial(x86_64, 5),
    "ept": ept,
    "ept-5": partial(ept, 5),
    "npt": npt,
    "npt-5": partial(npt, 5),
    "arm64-s2": arm64_stage2,
    "arm64-s2-48": partial(arm64_stage2, 48),
}
"""Makers of the formats by the name that --format takes; parameters are the maker's keywords."""
