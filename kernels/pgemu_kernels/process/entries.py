"""Words of a process's page tables as Linux x86-64 reads and rewrites them: arch/x86/include/asm/pgtable.h.

An entry that is not present can still hold a page (protection-none: bit 8, frame bits inverted) or be a marker.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import U0, U1, U9, U12
from pgemu_kernels.engine.compile import kernel
from pgemu_kernels.engine.geometry import size_of
from pgemu_kernels.formats.bits import (
    ACCESSED,
    ADDRESS,
    DIRTY,
    GLOBAL,
    PRESENT,
    PTE_ADDRESS,
    PTE_DIRTY,
    PTE_EXECUTE_ONLY_KEY,
    PTE_LARGE,
    PTE_NO_EXECUTE,
    PTE_PRESENT,
    PTE_PROTECTION_KEY,
    PTE_PROTECTION_NONE,
    PTE_SAVED_DIRTY,
    PTE_SOFT_DIRTY,
    PTE_WRITE,
    SOFT_DIRTY,
    SPECIAL,
    USER,
)
from pgemu_kernels.words.registers import R_HWPOISON_ENTRY, R_PROTECTION_KEYS
from pgemu_kernels.words.rows import A_CACHE_BITS, A_FLAGS, A_PROT, PROT_EXEC, PROT_WRITE, VM_SHARED

U = np.uint64
GUARD = U(0xFFFF_FFFF_FFFF_F600)  # make_pte_marker(PTE_MARKER_GUARD), 6.13 and later, as captured
_TYPE = U(59)  # where the type of a swap entry begins
_READABLE = U(PRESENT | USER | ACCESSED)
_NONE = U(GLOBAL | ACCESSED)  # PAGE_NONE
# What pte_modify() keeps, _PAGE_CHG_MASK: frame, cache bits, special, accessed, dirty (three kinds), uffd-wp.
_KEPT = U(ADDRESS | 1 << 3 | 1 << 4 | SPECIAL | ACCESSED | DIRTY | SOFT_DIRTY | 1 << 10 | 1 << 58)


@kernel
def hwpoison_entry(state, pfn):
    """make_hwpoison_entry() of a frame: a swap entry, whose offset is inverted. include/linux/swapops.h"""
    return state[R_HWPOISON_ENTRY] ^ pfn << U9


@kernel
def is_hwpoison(state, entry):
    """Whether an entry of any level stands for a poisoned page: is_hwpoison_entry()."""
    same_type = (entry ^ state[R_HWPOISON_ENTRY]) >> _TYPE == U0
    return same_type and entry & (PTE_PRESENT | PTE_PROTECTION_NONE) == U0


@kernel
def points_to_table(entry):
    """Whether an entry above level 1 points to a table."""
    return entry & (PTE_PRESENT | PTE_LARGE) == PTE_PRESENT


@kernel
def is_protnone(entry):
    return entry & (PTE_PRESENT | PTE_PROTECTION_NONE) == PTE_PROTECTION_NONE


@kernel
def holds_page(entry):
    """pte_present(): a page is mapped, be it without any access."""
    return entry & PTE_PRESENT != U0 or (is_protnone(entry) and entry != GUARD)


@kernel
def pte_pfn(entry):
    """Frame number of an entry that holds a page."""
    word = entry if entry & PTE_PRESENT != U0 else ~entry
    return (word & PTE_ADDRESS) >> U12


@kernel
def leaf_pfn(entry, level):
    """The same of a leaf of any level: pmd_pfn(), pud_pfn(). Only the bits of the frame's own number are inverted."""
    return pte_pfn(entry) & ~((size_of(level) >> U12) - U1)


@kernel
def vm_page_prot(state, row):
    """vm_page_prot: the permission and cache bits of a VMA's entries. mm/mmap.c:protection_map, PAGE_*.

    Private writable pages are mapped without write access; the fault adds it. Execute-only ones have a protection key
    that lets no data access through, where the processor has keys: arch/x86/mm/pkeys.c:__arch_override_mprotect_pkey().
    """
    prot = state[row + A_PROT]
    if prot == U0:
        return _NONE | state[row + A_CACHE_BITS]
    bits = _READABLE | state[row + A_CACHE_BITS]
    if prot & PROT_WRITE != U0 and state[row + A_FLAGS] & VM_SHARED != U0:
        bits |= PTE_WRITE
    if prot & PROT_EXEC == U0:
        bits |= PTE_NO_EXECUTE
    elif prot == PROT_EXEC and state[R_PROTECTION_KEYS] != U0:
        bits |= PTE_EXECUTE_ONLY_KEY
    return bits


@kernel
def mk_pte(pfn, bits):
    """mk_pte(), mk_huge_pte(): the entry of a frame with `bits`, vm_page_prot().

    The frame's bits are inverted where nobody may access it: arch/x86/include/asm/pgtable.h:pfn_pte(),
    pgtable-invert.h. Huge pages of a THP have pfn_pmd(), which inverts fewer (huge_memory.py).
    """
    return pfn << U12 ^ (PTE_ADDRESS if is_protnone(bits) else U0) | bits


@kernel
def pte_mkdirty(entry):
    """pte_mkdirty(): bit 6, or the saved one where writing is not allowed; soft-dirty always."""
    if entry & PTE_WRITE != U0:
        return entry | PTE_DIRTY | PTE_SOFT_DIRTY
    return entry | PTE_SAVED_DIRTY | PTE_SOFT_DIRTY


@kernel
def make_writable(entry):
    """pte_mkwrite(): the saved dirty bit becomes the real one."""
    if entry & PTE_SAVED_DIRTY != U0:
        entry = (entry & ~PTE_SAVED_DIRTY) | PTE_DIRTY
    return entry | PTE_WRITE


@kernel
def protect_from_writes(entry):
    """pte_wrprotect(): the dirty bit is saved in bit 58."""
    if entry & PTE_DIRTY != U0:
        entry = (entry & ~PTE_DIRTY) | PTE_SAVED_DIRTY
    return entry & ~PTE_WRITE


@kernel
def modify(entry, bits, large, inverted):
    """pte_modify(), pmd_modify(): other permissions for an entry that holds a page. `large`: bit 7 or 0.

    `inverted`: the address bits that are inverted where nobody may access the page.
    """
    value = (entry & _KEPT) | (bits & ~_KEPT) | large
    if is_protnone(entry) != is_protnone(value):
        value ^= inverted
    if entry & PTE_WRITE != U0 and entry & PTE_PRESENT != U0:
        if value & PTE_WRITE == U0 and value & PTE_DIRTY != U0:
            return (value & ~PTE_DIRTY) | PTE_SAVED_DIRTY
    elif value & PTE_WRITE != U0 and value & PTE_SAVED_DIRTY != U0:
        return (value & ~PTE_SAVED_DIRTY) | PTE_DIRTY
    return value


@kernel
def access_allowed(entry, write, execute):
    """Whether the processor lets a user access through; `write`, `execute` are uint64 0 or 1."""
    if entry & PTE_PRESENT == U0 or (write == U1 and entry & PTE_WRITE == U0):
        return False
    if execute != U1 and entry & PTE_PROTECTION_KEY != U0:
        return False  # the only key there is lets no data through
    return execute != U1 or entry & PTE_NO_EXECUTE == U0
