"""x86-64 entries as data.

Bits: Intel SDM volume 3 ("4-Level Paging"), arch/x86/kvm/mmu/mmu.c:__reset_rsvds_bits_mask().
"""

from __future__ import annotations

from typing import Any

from pgemu_kernels.formats import bits
from pgemu_kernels.formats.entry_format import (
    WIDEST_ADDRESS,
    Execute,
    Family,
    FlushRule,
    PageFormat,
    c_bit_mask,
    check_levels,
    check_width,
    span,
)

NO_EXECUTE = bits.NO_EXECUTE


def _pat(index: int) -> tuple[int, int, int]:
    """Bits of a PAT index by level: PAT is bit 7 of a 4K entry, bit 12 of a larger leaf."""
    low = (bits.WRITE_THROUGH if index & 1 else 0) | (bits.CACHE_DISABLE if index & 2 else 0)
    small, large = (bits.PAT_4K, bits.PAT_LARGE) if index & 4 else (0, 0)
    return low | small, low | large, low | large


# Linux's PAT MSR: arch/x86/mm/pat/memtype.c:pat_bp_init(). The first index with a name is the one that is written.
_PAT_TYPES = ("WB", "WC", "UC-", "UC", "WB", "WP", "UC-", "WT")
X86_MEMORY_TYPE_MASK = _pat(7)
X86_MEMORY_TYPES = tuple((name, _pat(index)) for index, name in enumerate(_PAT_TYPES))


def _reserved(
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


def x86_entries(levels: int, maxphyaddr: int, nx: bool, pages_1g: bool, amd: bool, c_bit: int | None) -> dict[str, Any]:
    """The fields of a PageFormat that the entries of processes and of AMD's nested tables have in common."""
    encrypted = c_bit_mask(c_bit)
    leaf, table = _reserved(maxphyaddr, nx, pages_1g, amd, encrypted)
    return {
        "levels": levels,
        "input_bits": 12 + 9 * levels,
        "present": bits.PRESENT,
        "address": bits.ADDRESS & ~encrypted,
        "leaf_mask": bits.LARGE,
        "leaf_value": bits.LARGE,
        "largest_leaf": 3 if pages_1g else 2,
        "reserved_leaf": leaf,
        "reserved_table": table,
        "invert": NO_EXECUTE,
        "accessed": bits.ACCESSED,
        "dirty": bits.DIRTY,
        "maxphyaddr": maxphyaddr,
        "leaf_bits": bits.PRESENT,
        "write": bits.WRITE,
        "user": bits.USER,
        "execute": Execute(NO_EXECUTE, 0, NO_EXECUTE) if nx else Execute(0, 0),
        "global_": bits.GLOBAL,
        "memory_type_mask": X86_MEMORY_TYPE_MASK,
        "memory_types": X86_MEMORY_TYPES,
        "c_bit": encrypted,
        "pat_page": bits.PAT_4K,
        "pat_large": bits.PAT_LARGE,
    }


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
    check_levels(levels)
    check_width(maxphyaddr)
    entries = x86_entries(levels, maxphyaddr, nx, pages_1g, amd, c_bit)
    executable = bits.FILE_LEAF & ~NO_EXECUTE | entries["c_bit"]
    table = bits.TABLE | entries["c_bit"]
    return PageFormat(
        name="x86-64" if levels == 4 else "x86-64-5",
        family=Family.X86,
        flush=FlushRule.PROCESS,
        sign_extended=True,
        table=table,
        table_top=table | NO_EXECUTE if pti else 0,
        leaf=(executable, executable | bits.LARGE, executable | bits.LARGE),
        key_shift=59,
        kernel=bits.RELEASES[kernel].release,
        protection_none=bits.PROTECTION_NONE,
        # arch/x86/include/asm/tlbflush.h:pte_flags_need_flush(); bit 58 holds the dirty bit of read-only leaves.
        software=0b111 << 9 | 0b11 << 57,
        **entries,
    )
