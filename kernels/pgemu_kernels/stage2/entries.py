"""Entries of KVM's stage-2 tables: what a leaf holds, what it allows, and the walk to the last one.

arch/x86/kvm/mmu/spte.c. Levels: 1 = 4K, 2 = 2M, 3 = 1G, 4 = 512G. What the formats differ in (which bit allows a
write, which marks an entry writable, which lets it be fetched from) stands in the format's row.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import U0, U1, U3, U4, U5, U12
from pgemu_kernels.engine.compile import kernel
from pgemu_kernels.engine.geometry import index_at, pages_of
from pgemu_kernels.tables.edit_entries import leaf_attributes
from pgemu_kernels.tables.walker import is_large, is_present, table_of
from pgemu_kernels.words.enum_words import FLAG_EXEC, FLAG_WRITE
from pgemu_kernels.words.table_words import (
    F_ACCESSED,
    F_DIRTY,
    F_EXECUTE,
    F_LEAF_2M,
    F_LEAF_4K,
    F_MEMORY_TYPE,
    F_MMIO_GUARD,
    F_MMIO_VALUE,
    F_WRITABLE_MARKS,
    F_WRITE,
)

U = np.uint64
TOP = U4
LARGEST = U3

_GENERATION_LOW = U(0xFF << 3)  # MMIO_SPTE_GEN_LOW_MASK
_GENERATION_HIGH = U(0x7FF << 52)


@kernel
def is_last_spte(state, f, entry, level):
    """Whether a present entry is a leaf."""
    return level == U1 or (level <= LARGEST and is_large(state, f, entry))


@kernel
def is_table(state, f, entry, level):
    return is_present(state, f, entry) and not is_last_spte(state, f, entry, level)


@kernel
def nx_huge_pages(state, f):
    """Whether the iTLB-multihit mitigation is on: large leaves are not executable, small ones are."""
    need = state[f + F_EXECUTE]
    return state[f + F_LEAF_2M] & need != need


@kernel
def is_access_allowed(state, f, entry, access):
    """spte.h:is_access_allowed() of a present leaf; `access` has Flag.WRITE and Flag.EXEC, reads always are."""
    if access & FLAG_WRITE != U0:
        return entry & state[f + F_WRITE] != U0
    need = state[f + F_EXECUTE]
    return access & FLAG_EXEC == U0 or entry & need == need


@kernel
def make_spte(state, f, level, pfn, writable, prefetch, device):
    """spte.c:make_spte(): a leaf; dirty goes with writable, accessed is clear if nobody has used it yet."""
    value = state[f + F_LEAF_4K + level - U1]
    if not writable:
        value &= ~(state[f + F_WRITE] | state[f + F_WRITABLE_MARKS] | state[f + F_DIRTY])
    if prefetch:
        value &= ~state[f + F_ACCESSED]
    if device:
        value &= ~state[f + F_MEMORY_TYPE]
    return value | (pfn & ~(pages_of(level) - U1)) << U12


@kernel
def make_mmio_spte(state, f, gfn, generation):
    """spte.c:make_mmio_spte(): guest frame and generation of the slots, in an entry that no hardware accepts."""
    address = gfn << U12
    guard = state[f + F_MMIO_GUARD]
    low = generation << U3 & _GENERATION_LOW
    high = generation << U(44) & _GENERATION_HIGH
    return state[f + F_MMIO_VALUE] | low | high | address | guard | (address & guard) << U5


@kernel
def make_huge_spte(state, f, entry, level):
    """spte.c:make_huge_spte(): a leaf with the flags and the address of a small one; never executable if mitigated."""
    return leaf_attributes(state, f, level, entry) & ~((pages_of(level) - U1) << U12)


@kernel
def last_spte(m, f, root, gfn):
    """Walk to the last entry on the way to a guest frame: (its slot, its level, the entry), present or not."""
    slot = (root >> U3) + index_at(gfn, U4)
    level = TOP
    entry = m.ram[slot]
    while is_table(m.state, f, entry, level):
        level -= U1
        slot = table_of(m.state, f, entry) + index_at(gfn, level)
        entry = m.ram[slot]
    return slot, level, entry
