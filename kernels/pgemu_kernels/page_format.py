"""Entry formats as data: what a walker must know about each, as one row of uint64 words (layout.F_*).

Bits and their sources: Intel SDM volume 3 ("4-Level Paging", "EPT"), AMD APM volume 2 (15.25), Arm DDI 0487
("Stage 2"), arch/x86/kvm/mmu/mmu.c:__reset_rsvds_bits_mask() and __reset_rsvds_bits_mask_ept(), and
arch/arm64/include/asm/kvm_pgtable.h. Levels are KVM's: 1 = 4K, 2 = 2M, 3 = 1G, 4 = 512G, 5 = 256T.
Plain Python: no numba here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from pgemu_kernels import formats as bits, layout as L

ALL = (1 << 64) - 1
LEVELS = (1, 2, 3, 4, 5)


def span(low: int, high: int) -> int:
    """Mask of bits `low` to `high`, both included; 0 if `high` is less than `low`."""
    return (1 << max(high + 1, low)) - (1 << low)


class Family(IntEnum):
    """How a format's faults are told."""

    X86 = 0  # page-fault error code
    NPT = 1  # EXITINFO1 of a nested page fault
    EPT = 2  # exit qualification, or EPT misconfiguration
    ARM64 = 3  # fault status code


class FlushRule(IntEnum):
    """What an edit of a tree has flushed: arch/x86/mm/tlb.c, virt/kvm/kvm_main.c, arch/arm64/kvm/hyp/pgtable.c."""

    PROCESS = 0  # page by page up to 33 pages, then everything
    WHOLE_VM = 1
    RANGE = 2


@dataclass(frozen=True)
class PageFormat:
    """One entry format. Masks are of 64 bits; a tuple "by level" has an element for each of levels 1 to 5.

    levels: level of the top table. root_tables: concatenated top tables. input_bits: bits of an input address.
    present: an entry is present if any of these bits is set. address: bits that hold a physical address.
    leaf_mask, leaf_value: what makes a present entry above level 1 a leaf; page_mask, page_value: at level 1.
    largest_leaf: highest level that may hold one. reserved_leaf, reserved_table: by level, bits that must be 0.
    invert, fold, table_rights: see layout.F_INVERT. bad_low, bad_memory_type: misconfigurations (EPT).
    accessed, dirty: the hardware's bits, 0 without hardware updates. table: bits of a table entry as Linux
    writes it; leaf: by level (1 to 3), of a leaf with every permission. empty, frozen: KVM's non-present values.
    key_shift: where a protection key begins, 0 for none. pat_page, pat_large: the memory-type bit of a 4K leaf that
    larger ones have elsewhere. break_bits: bits of a valid leaf that change only by break-before-make. software: bits
    that the hardware ignores and Linux uses, whose change needs no flush. range_invalidation: the TLB is invalidated
    by range where more than one entry changes; defers_unmap: an unmap, too, invalidates once, by range.
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
    empty: int = 0
    frozen: int = 0
    break_before_make: bool = False
    key_shift: int = 0
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

    def row(self) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        """The format as kernels read it: uint64[F_WORDS]."""
        words = {
            L.F_PRESENT: self.present,
            L.F_LARGE: self.leaf_mask if self.leaf_value else 0,
            L.F_ADDRESS: self.address,
            L.F_TABLE: self.table,
            L.F_TABLE_TOP: self.table,
            L.F_LEAF_4K: self.leaf[0],
            L.F_LEAF_2M: self.leaf[1],
            L.F_LEAF_1G: self.leaf[2],
            L.F_EMPTY: self.empty,
            L.F_LEVELS: self.levels,
            L.F_ROOT_BITS: self.root_bits,
            L.F_INPUT_BITS: self.input_bits,
            L.F_SIGN_EXTENDED: self.sign_extended,
            L.F_LEAF_MASK: self.leaf_mask,
            L.F_LEAF_VALUE: self.leaf_value,
            L.F_PAGE_MASK: self.page_mask,
            L.F_PAGE_VALUE: self.page_value,
            L.F_LARGEST_LEAF: self.largest_leaf,
            L.F_INVERT: self.invert,
            L.F_FOLD: self.fold,
            L.F_TABLE_RIGHTS: self.table_rights,
            L.F_BAD_LOW: self.bad_low,
            L.F_BAD_MEMORY_TYPE: self.bad_memory_type,
            L.F_FAMILY: self.family,
            L.F_ACCESSED: self.accessed,
            L.F_DIRTY: self.dirty,
            L.F_FROZEN: self.frozen,
            L.F_BREAK_BEFORE_MAKE: self.break_before_make,
            L.F_FLUSH: self.flush,
            L.F_KEY_SHIFT: self.key_shift,
            L.F_PAT_PAGE: self.pat_page,
            L.F_PAT_LARGE: self.pat_large,
            L.F_BREAK_BITS: self.break_bits,
            L.F_SOFTWARE: self.software,
            L.F_RANGE_FLUSH: self.range_invalidation | self.defers_unmap << 1,
        }
        row = np.zeros(L.F_WORDS, np.uint64)
        for word, value in words.items():
            row[int(word)] = value
        for level in LEVELS:
            row[int(L.F_RESERVED_LEAF) + level] = self.reserved_leaf[level - 1]
            if level > 1:
                row[int(L.F_RESERVED_TABLE) + level] = self.reserved_table[level - 1]
        return row


NO_EXECUTE = bits.NO_EXECUTE
PAGE_OFFSETS = (span(12, 11), span(12, 20), span(12, 29))  # low address bits of a leaf, by level


def _x86_reserved(maxphyaddr: int, nx: bool, pages_1g: bool, amd: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Reserved bits of x86-64 entries: (leaf by level, table by level)."""
    high = span(maxphyaddr, 51) | (0 if nx else NO_EXECUTE)
    one_gigabyte = high | (span(13, 29) if pages_1g else bits.LARGE)
    leaf = (high, high | span(13, 20), one_gigabyte, high, high)
    top = high | bits.LARGE | (1 << 8 if amd else 0)
    # Without 1G pages bit 7 of a level-3 entry is reserved whatever else it holds.
    level_3 = high | (1 << 8 if amd else 0) | (0 if pages_1g else bits.LARGE)
    return leaf, (0, high, level_3, top, top)


def x86_64(
    levels: int = 4, *, maxphyaddr: int = 52, nx: bool = True, pages_1g: bool = True, amd: bool = False
) -> PageFormat:
    """x86-64 paging of 4 or 5 levels, entries as Linux writes them for a process.

    maxphyaddr: bits from there to 51 are reserved. nx: EFER.NXE. pages_1g: CPUID Page1GB.
    amd: bit 8 of entries at level 3 and above is reserved.
    """
    leaf, table = _x86_reserved(maxphyaddr, nx, pages_1g, amd)
    return PageFormat(
        name="x86-64" if levels == 4 else "x86-64-5",
        family=Family.X86,
        flush=FlushRule.PROCESS,
        levels=levels,
        input_bits=12 + 9 * levels,
        sign_extended=True,
        present=bits.PRESENT,
        address=bits.ADDRESS,
        leaf_mask=bits.LARGE,
        leaf_value=bits.LARGE,
        largest_leaf=3 if pages_1g else 2,
        reserved_leaf=leaf,
        reserved_table=table,
        invert=NO_EXECUTE,
        accessed=bits.ACCESSED,
        dirty=bits.DIRTY,
        table=bits.TABLE,
        leaf=(bits.FILE_LEAF & ~NO_EXECUTE, bits.FILE_LEAF & ~NO_EXECUTE | bits.LARGE,
              bits.FILE_LEAF & ~NO_EXECUTE | bits.LARGE),
        key_shift=59,
        pat_page=PAT_PAGE,
        pat_large=PAT_LARGE,
        # arch/x86/include/asm/tlbflush.h:pte_flags_need_flush(); bit 58 holds the dirty bit of read-only leaves.
        software=0b111 << 9 | 0b11 << 57,
    )  # fmt: skip


def npt(levels: int = 4, *, maxphyaddr: int = 51, nx: bool = True, pages_1g: bool = True) -> PageFormat:
    """AMD nested paging, entries as KVM writes them. APM 15.25."""
    leaf, table = _x86_reserved(maxphyaddr, nx, pages_1g, amd=True)
    return PageFormat(
        name="npt" if levels == 4 else "npt-5",
        family=Family.NPT,
        flush=FlushRule.WHOLE_VM,
        levels=levels,
        input_bits=12 + 9 * levels,
        present=bits.PRESENT,
        address=bits.ADDRESS,
        leaf_mask=bits.LARGE,
        leaf_value=bits.LARGE,
        largest_leaf=3 if pages_1g else 2,
        reserved_leaf=leaf,
        reserved_table=table,
        invert=NO_EXECUTE,
        accessed=bits.ACCESSED,
        dirty=bits.DIRTY,
        table=bits.NPT_TABLE,
        leaf=(bits.NPT_LEAF, bits.NPT_LEAF | bits.LARGE, bits.NPT_LEAF | bits.LARGE),
        pat_page=PAT_PAGE,
        pat_large=PAT_LARGE,
        software=0b111 << 9 | span(52, 58),
        empty=bits.EMPTY_SPTE,
        frozen=bits.FROZEN_SPTE,
    )


def ept(
    levels: int = 4,
    *,
    maxphyaddr: int = 52,
    kernel: str = "7.3",
    accessed_dirty: bool = True,
    execute_only: bool = True,
    mode_based_execute: bool = False,
    ignore_pat: bool = True,
    nx_huge_pages: bool = False,
) -> PageFormat:
    """Intel EPT of 4 or 5 levels, entries as KVM of `kernel` writes them.

    accessed_dirty: EPTP bit 6. execute_only: execute without read is allowed. mode_based_execute: bit 10 alone
    makes an entry present, too. ignore_pat: leaves carry IPAT. nx_huge_pages: the iTLB-multihit mitigation.
    KeyError for a kernel that is not in formats.KERNELS.
    """
    parameters = bits.KERNELS[kernel]
    high = span(maxphyaddr, 51)
    base = bits.EPT_RWX | 6 << 3 | bits.MMU_PRESENT | bits.SUPPRESS_VE | parameters.ept_writable | parameters.ept_extra
    if accessed_dirty:
        base |= bits.EPT_ACCESSED | bits.EPT_DIRTY
    if ignore_pat:
        base |= 1 << 6
    large = base | bits.LARGE
    if nx_huge_pages:
        large &= ~(0b100 | bits.EPT_USER_EXECUTE)
    return PageFormat(
        name="ept" if levels == 4 else "ept-5",
        family=Family.EPT,
        flush=FlushRule.WHOLE_VM,
        levels=levels,
        input_bits=12 + 9 * levels,
        present=bits.EPT_RWX | (bits.EPT_USER_EXECUTE if mode_based_execute else 0),
        address=bits.ADDRESS,
        leaf_mask=bits.LARGE,
        leaf_value=bits.LARGE,
        reserved_leaf=(high, high | span(12, 20), high | span(12, 29), high, high),
        reserved_table=(0, high | span(3, 6), high | span(3, 6), high | span(3, 7), high | span(3, 7)),
        bad_low=1 << 0b010 | 1 << 0b110 | (0 if execute_only else 1 << 0b100),
        bad_memory_type=1 << 2 | 1 << 3 | 1 << 7,
        accessed=bits.EPT_ACCESSED if accessed_dirty else 0,
        dirty=bits.EPT_DIRTY if accessed_dirty else 0,
        table=bits.EPT_RWX | bits.MMU_PRESENT | bits.SUPPRESS_VE | parameters.ept_extra
        | (bits.EPT_ACCESSED if accessed_dirty else 0),
        leaf=(base, large, large),
        software=bits.MMU_PRESENT | span(52, 56) | parameters.ept_writable,
        empty=bits.EMPTY_SPTE,
        frozen=bits.FROZEN_SPTE,
    )  # fmt: skip


PAT_PAGE = 1 << 7  # arch/x86/include/asm/pgtable_types.h:_PAGE_PAT
PAT_LARGE = 1 << 12  # _PAGE_PAT_LARGE
ARM_VALID = 1 << 0
ARM_TABLE = 1 << 1  # a table at levels 2 and above, a page at level 1
ARM_READ = 1 << 6
ARM_WRITE = 1 << 7
ARM_INNER_SHAREABLE = 0b11 << 8
ARM_ACCESSED = 1 << 10
ARM_LOCKED = 1 << 10  # of an invalid entry: a change is under way (6.12; a type nibble in 7.1)
ARM_DIRTY_MODIFIER = 1 << 51
ARM_NO_EXECUTE = 0b10 << 53  # XN[1:0] = 10: nobody executes


def arm64_stage2(
    ipa_bits: int = 40,
    *,
    fwb: bool = True,
    hardware_access_flag: bool = True,
    range_invalidation: bool = True,
    kernel: str = "7.3",
) -> PageFormat:
    """Arm64 stage 2, 4K granule; 48-bit output addresses.

    ipa_bits: 32 to 48; up to 43 three levels, then four, with up to 16 concatenated root tables
    (arch/arm64/include/asm/stage2_pgtable.h:stage2_pgtable_levels()). fwb: FEAT_S2FWB memory attributes.
    hardware_access_flag: VTCR_EL2.HA. range_invalidation: FEAT_TLBIRANGE. ValueError for another size.
    """
    if not 32 <= ipa_bits <= 48:
        raise ValueError(f"{ipa_bits} bits of intermediate physical address: expected 32 to 48")
    levels = -(-(ipa_bits - 4 - 12) // 9)
    base = ARM_VALID | ARM_READ | ARM_WRITE | ARM_INNER_SHAREABLE | ARM_ACCESSED | (0b0110 if fwb else 0b1111) << 2
    locked = ARM_LOCKED if kernel == "6.12" else 1 << 60
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
        reserved_leaf=(0, span(12, 20), span(12, 29), 0, 0),
        reserved_table=(0, 0, 0, 0, 0),
        # Bit 53 becomes "EL1 executes", bit 54 "EL0 executes": XN is 00 both, 01 not EL1, 10 none, 11 not EL0.
        fold=1 << 53,
        invert=0b11 << 53,
        table_rights=ALL,
        accessed=ARM_ACCESSED if hardware_access_flag else 0,
        dirty=ARM_WRITE,
        table=ARM_VALID | ARM_TABLE,
        leaf=(base | ARM_TABLE, base, base),
        frozen=locked,
        break_before_make=True,
        # Output address, block or page, memory attributes, shareability, contiguous: Arm DDI 0487, "Break-before-make".
        break_bits=span(12, 47) | ARM_TABLE | span(2, 5) | span(8, 9) | 1 << 52,
        software=span(55, 58),
        range_invalidation=range_invalidation,
        # arch/arm64/kvm/hyp/pgtable.c:stage2_unmap_defer_tlb_flush()
        defers_unmap=range_invalidation and fwb,
    )


FORMATS: dict[str, Callable[[], PageFormat]] = {
    "x86-64": x86_64,
    "x86-64-5": lambda: x86_64(5),
    "ept": ept,
    "ept-5": lambda: ept(5),
    "npt": npt,
    "npt-5": lambda: npt(5),
    "arm64-s2": arm64_stage2,
    "arm64-s2-48": lambda: arm64_stage2(48),
}
"""Makers of the formats by the name that --format takes, with default parameters."""
