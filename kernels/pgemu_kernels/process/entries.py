"""Words of a process's page tables as Linux x86-64 reads and rewrites them: arch/x86/include/asm/pgtable.h.

An entry that is not present can still hold a page (protection-none: bit 8, frame bits inverted) or be a marker.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import U0, U1, U12
from pgemu_kernels.engine.compile import kernel
from pgemu_kernels.formats.bits import (
    ACCESSED,
    ADDRESS,
    DIRTY,
    GLOBAL,
    LARGE,
    NO_EXECUTE,
    PRESENT,
    SOFT_DIRTY,
    SPECIAL,
    USER,
    WRITE,
)
from pgemu_kernels.words.rows import A_CACHE_BITS, A_FLAGS, A_PROT, PROT_EXEC, PROT_WRITE, VM_SHARED

U = np.uint64
E_PRESENT = U(PRESENT)
E_WRITE = U(WRITE)
E_ACCESSED = U(ACCESSED)
E_DIRTY = U(DIRTY)
E_LARGE = U(LARGE)
E_SPECIAL = U(SPECIAL)
E_SOFT_DIRTY = U(SOFT_DIRTY)
E_NO_EXECUTE = U(NO_EXECUTE)
E_ADDRESS = U(ADDRESS)
E_PROTNONE = U(GLOBAL)  # of an entry without bit 0: _PAGE_PROTNONE
E_SAVED_DIRTY = U(1 << 58)  # _PAGE_SAVED_DIRTY: bit 6 of a page that may not be written (it would be a shadow stack's)
GUARD = U(0xFFFF_FFFF_FFFF_F600)  # make_pte_marker(PTE_MARKER_GUARD), 6.13 and later, as captured
_READABLE = U(PRESENT | USER | ACCESSED)
_NONE = U(GLOBAL | ACCESSED)  # PAGE_NONE
# What pte_modify() keeps, _PAGE_CHG_MASK: frame, cache bits, special, accessed, dirty (three kinds), uffd-wp.
_KEPT = U(ADDRESS | 1 << 3 | 1 << 4 | SPECIAL | ACCESSED | DIRTY | SOFT_DIRTY | 1 << 10 | 1 << 58)


@kernel
def is_table(entry):
    """Whether an entry above level 1 points to a table."""
    return entry & (E_PRESENT | E_LARGE) == E_PRESENT


@kernel
def is_protnone(entry):
    return entry & (E_PRESENT | E_PROTNONE) == E_PROTNONE


@kernel
def holds_page(entry):
    """pte_present(): a page is mapped, be it without any access."""
    return entry & E_PRESENT != U0 or (is_protnone(entry) and entry != GUARD)


@kernel
def frame_of(entry):
    """Frame number of an entry that holds a page."""
    word = entry if entry & E_PRESENT != U0 else ~entry
    return (word & E_ADDRESS) >> U12


@kernel
def protection(state, row):
    """vm_page_prot: the permission and cache bits of a VMA's entries. mm/mmap.c:protection_map, PAGE_*.

    Private writable pages are mapped without write access; the fault adds it.
    """
    prot = state[row + A_PROT]
    if prot == U0:
        return _NONE | state[row + A_CACHE_BITS]
    bits = _READABLE | state[row + A_CACHE_BITS]
    if prot & PROT_WRITE != U0 and state[row + A_FLAGS] & VM_SHARED != U0:
        bits |= E_WRITE
    if prot & PROT_EXEC == U0:
        bits |= E_NO_EXECUTE
    return bits


@kernel
def mark_dirty(entry):
    """pte_mkdirty(): bit 6, or the saved one where writing is not allowed; soft-dirty always."""
    if entry & E_WRITE != U0:
        return entry | E_DIRTY | E_SOFT_DIRTY
    return entry | E_SAVED_DIRTY | E_SOFT_DIRTY


@kernel
def make_writable(entry):
    """pte_mkwrite(): the saved dirty bit becomes the real one."""
    if entry & E_SAVED_DIRTY != U0:
        entry = (entry & ~E_SAVED_DIRTY) | E_DIRTY
    return entry | E_WRITE


@kernel
def protect_from_writes(entry):
    """pte_wrprotect(): the dirty bit is saved in bit 58."""
    if entry & E_DIRTY != U0:
        entry = (entry & ~E_DIRTY) | E_SAVED_DIRTY
    return entry & ~E_WRITE


@kernel
def modify(entry, bits, large):
    """pte_modify(): other permissions for an entry that holds a page. `large`: bit 7 or 0."""
    value = (entry & _KEPT) | (bits & ~_KEPT) | large
    if is_protnone(entry) != is_protnone(value):
        value ^= E_ADDRESS
    if entry & E_WRITE != U0 and entry & E_PRESENT != U0:
        if value & E_WRITE == U0 and value & E_DIRTY != U0:
            return (value & ~E_DIRTY) | E_SAVED_DIRTY
    elif value & E_WRITE != U0 and value & E_SAVED_DIRTY != U0:
        return (value & ~E_SAVED_DIRTY) | E_DIRTY
    return value


@kernel
def access_allowed(entry, write, execute):
    """Whether the processor lets a user access through; `write`, `execute` are uint64 0 or 1."""
    if entry & E_PRESENT == U0 or (write == U1 and entry & E_WRITE == U0):
        return False
    return execute != U1 or entry & E_NO_EXECUTE == U0
