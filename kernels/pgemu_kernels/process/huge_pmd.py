"""2M leaves of anonymous memory as entries: the table kept for a split, the split, the end. mm/huge_memory.c

Each leaf has a table deposited, the huge zero page's leaves too. Linux keeps them in a list per table of 2M entries, or
per process; here it is per process, chained through `counts`: which of them a split takes is all that differs.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U2, U9, U12, U512
from pgemu_kernels.engine.charge import change_value, charge, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.frames import empty_frame
from pgemu_kernels.engine.geometry import size_of
from pgemu_kernels.folios.anonymous_folios import (
    add_rmap_ptes,
    is_page_exclusive,
    put_large,
    remove_rmap_pmd,
    set_large_dirty,
)
from pgemu_kernels.folios.folio import add_references, struct_page
from pgemu_kernels.formats.bits import (
    PTE_ACCESSED,
    PTE_DIRTY,
    PTE_PRESENT,
    PTE_SAVED_DIRTY,
    PTE_SOFT_DIRTY,
    PTE_SPECIAL,
    PTE_WRITE,
)
from pgemu_kernels.process.entries import (
    leaf_pfn,
    make_writable,
    mk_pte,
    points_to_table,
    pte_mkdirty,
    vm_page_prot,
)
from pgemu_kernels.process.tables import gather, space_row
from pgemu_kernels.tables.walker import free_table, host_format
from pgemu_kernels.words.enum_words import (
    EVENT_LEAF_CLEARED,
    EVENT_LEAF_WRITTEN,
    EVENT_TABLE_PAGE_ALLOCATED,
    EVENT_TLB_FLUSH_MM,
    EVENT_TLB_FLUSH_PAGE,
    GAUGE_HOST_LEAVES_2M,
    GAUGE_HOST_LEAVES_4K,
    GAUGE_HOST_TABLES,
)
from pgemu_kernels.words.registers import R_HUGE_ZERO_FRAME, R_THP_SPLIT_PMD, R_ZERO_FRAME
from pgemu_kernels.words.rows import A_KIND, A_SPACE, S_DEPOSITED, S_RSS, VMA_ANONYMOUS
from pgemu_kernels.words.table_words import F_EMPTY, F_TABLE

U = np.uint64


@kernel
def is_huge_anonymous(state, row, entry, level):
    """Whether an entry of a VMA is a 2M leaf of anonymous memory: pmd_trans_huge()."""
    return level == U2 and state[row + A_KIND] == VMA_ANONYMOUS and entry != U0 and not points_to_table(entry)


@kernel
def is_huge_zero(state, entry):
    """is_huge_zero_pmd()"""
    return leaf_pfn(entry, U2) == state[R_HUGE_ZERO_FRAME]


# --------------------------------------------------------------------------- the table kept for a split


@outlined
def deposit_table(m, space, frame):
    """pgtable_trans_huge_deposit(): keep an empty table, by its frame."""
    row = space_row(space)
    m.counts[frame] = np.uint32(m.state[row + S_DEPOSITED])
    m.state[row + S_DEPOSITED] = frame


@outlined
def deposit_new_table(m, space):
    """pte_alloc_one() and the deposit: False without memory."""
    frame = empty_frame(m, m.state[host_format(m) + F_EMPTY], GAUGE_HOST_TABLES)
    if frame == NONE:
        return False
    charge_one(m, EVENT_TABLE_PAGE_ALLOCATED)
    deposit_table(m, space, frame)
    return True


@outlined
def withdraw_table(m, space):
    """pgtable_trans_huge_withdraw(): the frame of the table deposited last."""
    row = space_row(space)
    frame = m.state[row + S_DEPOSITED]
    m.state[row + S_DEPOSITED] = U(m.counts[frame])
    m.counts[frame] = np.uint32(0)
    return frame


# --------------------------------------------------------------------------- split


@kernel
def _split_entry(entry, bits):
    """The 4K entry, but for its frame, of each page of a 2M leaf: mk_pte() with the VMA's bits, then what it was."""
    value = bits
    if entry & PTE_PRESENT != U0 and entry & PTE_WRITE != U0:
        value = make_writable(value)
    if entry & PTE_ACCESSED == U0:
        value &= ~PTE_ACCESSED
    if entry & (PTE_DIRTY | PTE_SAVED_DIRTY) != U0:
        value = pte_mkdirty(value)
    return value | entry & PTE_SOFT_DIRTY


@kernel
def _count_split(m, head, space, exclusive):
    """512 mappings of pages in place of one of the folio, and as many references."""
    add_references(m.ram, struct_page(m, head), U512 - U1)
    add_rmap_ptes(m, head, head, U512, space, exclusive)
    remove_rmap_pmd(m, head, space)


@outlined
def split_huge_pmd(m, row, slot):
    """__split_huge_pmd_locked(): the 2M leaf at a slot becomes a table of 4K entries. Its folio stays whole.

    VMs have been told by then. The huge zero page gives entries of the zero page. The leaf is flushed at once.
    """
    state = m.state
    ram = m.ram
    space = state[row + A_SPACE]
    entry = ram[slot]
    bits = vm_page_prot(state, row)
    frame = withdraw_table(m, space)
    first = frame << U9
    if is_huge_zero(state, entry):
        bits |= PTE_SPECIAL
        pfn = state[R_ZERO_FRAME]
        following = U0
    else:
        pfn = leaf_pfn(entry, U2)
        following = U1
        bits = _split_entry(entry, bits)
        if entry & (PTE_DIRTY | PTE_SAVED_DIRTY) != U0:
            set_large_dirty(m, pfn)
        _count_split(m, pfn, space, is_page_exclusive(m, pfn))
    for i in range(U512):
        ram[first + i] = mk_pte(pfn + i * following, bits)
    ram[slot] = frame << U12 | state[host_format(m) + F_TABLE]
    state[R_THP_SPLIT_PMD] += U1
    change_value(m.stats, GAUGE_HOST_LEAVES_2M, -1)
    change_value(m.stats, GAUGE_HOST_LEAVES_4K, 512)
    charge(m, EVENT_LEAF_WRITTEN, 513)
    charge_one(m, EVENT_TLB_FLUSH_MM)
    charge_one(m, EVENT_TLB_FLUSH_PAGE)


# --------------------------------------------------------------------------- the end


@outlined
def zap_huge_pmd(m, row, slot, address):
    """zap_huge_pmd(): the 2M leaf at a slot goes, its deposited table, its mapping and reference; to be flushed."""
    state = m.state
    space = state[row + A_SPACE]
    entry = m.ram[slot]
    m.ram[slot] = U0
    free_table(m, withdraw_table(m, space), GAUGE_HOST_TABLES)
    if not is_huge_zero(state, entry):
        remove_rmap_pmd(m, leaf_pfn(entry, U2), space)
        put_large(m, leaf_pfn(entry, U2), U1)
        state[space_row(space) + S_RSS] -= U512
    change_value(m.stats, GAUGE_HOST_LEAVES_2M, -1)
    charge_one(m, EVENT_LEAF_CLEARED)
    gather(m, address & ~(size_of(U2) - U1), U2)
