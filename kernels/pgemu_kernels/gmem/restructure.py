"""Design "restructure": folios are split to 4K while any of their pages is shared, and merged afterwards.

Order `jan2026` of the posted plan (Ackerley Tng, January 2026): prealloc; to private: unmap host and
gate; to shared: split; begin; zap (point of no return); store; end; to private: merge.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U6, U12
from pgemu_kernels.engine.charge import (
    FOLIO_GATE_CHECKED,
    FREEZE_SPIN,
    LEAF_WRITTEN,
    PAGE_ZEROED,
    RMAP_CHANGED,
    charge,
    charge_one,
)
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.frames import zero_contents
from pgemu_kernels.engine.rows import block_row, inode_row, largest_level, slot_allows, space_root, stop, unlock
from pgemu_kernels.engine.shareability import is_shared, shared_in_block
from pgemu_kernels.folios.folio import (
    COUNTS,
    FLAGS,
    ONE_CACHED,
    PG_UPTODATE,
    add_mapping,
    add_references,
    mappings,
    reference_count,
    struct_page,
)
from pgemu_kernels.folios.hugetlb import free_block, make_zombie, release_block, take_folio
from pgemu_kernels.folios.splitting import leave_cache, merge_block, split_block
from pgemu_kernels.gmem.steps import (
    convert_finish,
    convert_invalidate_begin,
    convert_invalidate_end,
    convert_prepare,
    convert_zap,
    fail_at,
    fault_begin,
    guest_begin,
    install_stage2,
    still_mapped,
    store_attributes,
    unmap_host,
)
from pgemu_kernels.gmem.workers import note_return
from pgemu_kernels.gmem.zeroing import clear_zeroed, zero_huge
from pgemu_kernels.process.zapping import unmap_mapping_range
from pgemu_kernels.tables.walker import count_host_leaf, host_format, host_slot
from pgemu_kernels.words.operations import (
    EAGAIN,
    ENOMEM,
    GO,
    VM_FAULT_LOCKED,
    VM_FAULT_OOM,
    VM_FAULT_RETRY,
    VM_FAULT_SIGBUS,
)
from pgemu_kernels.words.registers import R_FAULT_REFERENCES, R_ORDER, R_SERIES
from pgemu_kernels.words.rows import (
    A_READ_ONLY,
    B_OUTSTANDING,
    B_PFN,
    B_STATE,
    B_WAITS,
    BLOCK_ABSENT,
    BLOCK_HUGE,
    BLOCK_SPLIT,
    I_ZEROED,
    O_ADDRESS,
    O_DETAIL,
    O_END,
    O_INDEX,
    O_INODE,
    O_LEVEL,
    O_PFN,
    O_REFERENCED,
    O_ROW,
    O_SPACE,
    O_START,
    O_TO_PRIVATE,
    SERIES_RFC2,
)
from pgemu_kernels.words.table_words import F_LEAF_4K, F_LEAF_4K_RO

U = np.uint64
ROUNDED = True  # ranges of the invalidate protocol are rounded out to huge pages


# --------------------------------------------------------------------------- folios


@outlined
def allocate(m, inode, index):
    """Put a huge folio under page `index`, split at once if any of its pages is shared: 0 or -ENOMEM.

    kvm_gmem_get_folio() of the posted series: shared memory is order-0 before anybody uses it.
    """
    node = inode_row(inode)
    block = block_row(m, node, index)
    first = index & ~((U1 << m.state[R_ORDER]) - U1)
    if take_folio(m, inode, block, first) == NONE:
        return np.int64(-ENOMEM)
    if m.state[R_ORDER] != U0 and shared_in_block(m, node, index) != U0:
        status = split_block(m, block, first, m.state[node + I_ZEROED] + (first >> U6))
        if status != 0:
            free_block(m, block)
            return status
    return np.int64(0)


@kernel
def get_folio(m, inode, node, index):
    """The frame of page `index`, allocated if need be, or NONE without memory."""
    block = block_row(m, node, index)
    if m.state[block + B_STATE] == BLOCK_ABSENT and allocate(m, inode, index) != 0:
        return NONE
    return m.state[block + B_PFN] + (index & ((U1 << m.state[R_ORDER]) - U1))


@kernel
def zero_page(m, pfn):
    """Zero an order-0 folio that is not up to date: its index in `ram`."""
    page = struct_page(m, pfn)
    flags = m.ram[page + FLAGS]
    if flags & PG_UPTODATE == U0:
        m.ram[page + FLAGS] = flags | PG_UPTODATE
        charge_one(m, PAGE_ZEROED)
        zero_contents(m, pfn, U1)
    return page


# --------------------------------------------------------------------------- host fault


@kernel
def fault_folio(m, op):
    """kvm_gmem_fault_user_mapping(): the page must be shared; a reference and 4K zeroed, then unlock."""
    state = m.state
    inode = state[op + O_INODE]
    node = inode_row(inode)
    index = state[op + O_INDEX]
    if is_shared(m, node, index) == U0:
        unlock(state, op, node)
        return stop(state, op, VM_FAULT_SIGBUS)
    pfn = get_folio(m, inode, node, index)
    if pfn == NONE:
        unlock(state, op, node)
        return stop(state, op, VM_FAULT_OOM)
    page = zero_page(m, pfn)
    add_references(m.ram, page, U1)
    state[R_FAULT_REFERENCES] += U1
    state[op + O_REFERENCED] = pfn + U1
    state[op + O_PFN] = pfn
    unlock(state, op, node)
    return GO


@kernel
def fault_map(m, op):
    """mm/memory.c:set_pte_range(): an ordinary entry, which keeps the reference and adds a mapcount.

    As captured, a read and a write fault on guest_memfd both leave 8..867.
    """
    state = m.state
    pfn = state[op + O_PFN]
    state[R_FAULT_REFERENCES] -= U1
    state[op + O_REFERENCED] = U0
    page = struct_page(m, pfn)
    if not still_mapped(state, op):
        add_references(m.ram, page, ~U0)
        return stop(state, op, VM_FAULT_RETRY)
    slot = host_slot(m, space_root(state, state[op + O_SPACE]), state[op + O_ADDRESS] >> U12)
    if slot == NONE:
        add_references(m.ram, page, ~U0)
        return stop(state, op, VM_FAULT_OOM)
    state[op + O_DETAIL] = U1
    if m.ram[slot] != U0:
        add_references(m.ram, page, ~U0)
        return stop(state, op, 0)
    leaf = F_LEAF_4K if state[state[op + O_ROW] + A_READ_ONLY] == U0 else F_LEAF_4K_RO
    m.ram[slot] = pfn << U12 | state[host_format(m) + leaf]
    add_mapping(m.ram, page)
    count_host_leaf(m, 1)
    charge_one(m, LEAF_WRITTEN)
    charge_one(m, RMAP_CHANGED)
    return stop(state, op, VM_FAULT_LOCKED)


@kernel
def host_fault(m, op):
    if fault_begin(m, op) == GO and fault_folio(m, op) == GO:
        fault_map(m, op)


# --------------------------------------------------------------------------- guest fault


@kernel
def folio_level(state, op):
    """The level of an unsplit folio, as far as the slot permits: kvm_gmem_max_mapping_level()."""
    level = largest_level(state)
    gfn = state[op + O_ADDRESS] >> U12
    while level > U1 and not slot_allows(state, state[op + O_ROW], gfn, level):
        level -= U1
    return level


@kernel
def guest_folio(m, op):
    """kvm_gmem_get_pfn(): the frame, its folio zeroed if it is not up to date, and the level; then unlock.

    KVM finds the level later, under its mmu_lock; the invalidate sequence that `guest_map` checks makes
    that the same.
    """
    state = m.state
    inode = state[op + O_INODE]
    node = inode_row(inode)
    index = state[op + O_INDEX]
    pfn = get_folio(m, inode, node, index)
    if pfn == NONE:
        unlock(state, op, node)
        return stop(state, op, -ENOMEM)
    level = U1
    if state[block_row(m, node, index) + B_STATE] == BLOCK_SPLIT:
        zero_page(m, pfn)
    else:
        level = folio_level(state, op)
        zero_huge(m, node, index, pfn, level)
    state[op + O_LEVEL] = level
    state[op + O_PFN] = pfn
    unlock(state, op, node)
    return GO


@kernel
def guest_map(m, op):
    return install_stage2(m, op, m.state[op + O_LEVEL])


@kernel
def guest_fault(m, op):
    if guest_begin(m, op) == GO and guest_folio(m, op) == GO:
        guest_map(m, op)


# --------------------------------------------------------------------------- conversion


@kernel
def gate(m, op):
    """To private: every folio in the range must be idle, else -EAGAIN with the failing offset.

    Expected are the page cache's references only, one per base page:
    virt/kvm/guest_memfd.c:__kvm_gmem_set_attributes() of the in-place series.
    """
    state = m.state
    node = inode_row(state[op + O_INODE])
    ram = m.ram
    order = state[R_ORDER]
    index = state[op + O_START]
    end = state[op + O_END]
    checked = np.int64(0)
    while index < end:
        block = block_row(m, node, index)
        head_index = index >> order << order
        stop_at = min(end, head_index + (U1 << order))
        kind = m.state[block + B_STATE]
        head = m.state[block + B_PFN]
        if kind == BLOCK_SPLIT:
            while index < stop_at:
                checked += 1
                if ram[struct_page(m, head + index - head_index) + COUNTS] != ONE_CACHED:
                    charge(m, FOLIO_GATE_CHECKED, checked)
                    return fail_at(state, op, -EAGAIN, index)
                index += U1
        elif kind == BLOCK_HUGE:
            checked += 1
            if reference_count(ram, struct_page(m, head)) != U1 << order:
                charge(m, FOLIO_GATE_CHECKED, checked)
                return fail_at(state, op, -EAGAIN, head_index)
        index = stop_at
    charge(m, FOLIO_GATE_CHECKED, checked)
    return GO


@outlined
def leave_split(m, node, first, end):
    """Note that a conversion failed and leaves the blocks of pages [first, end) split, some of them all private."""
    while first < end:
        block = block_row(m, node, first)
        if m.state[block + B_STATE] == BLOCK_SPLIT and shared_in_block(m, node, first) == U0:
            m.state[block + B_WAITS] = U1
        first += U1 << m.state[R_ORDER]


@kernel
def split(m, op):
    """To shared: split every huge folio that the range touches, else -ENOMEM with the failing offset.

    Blocks split before the failing one stay split: the plan knows no unwinding. A folio with a foreign
    reference cannot be frozen; the posted code spins until it can, here it is -EBUSY. 4K folios are never split.
    """
    state = m.state
    node = inode_row(state[op + O_INODE])
    order = state[R_ORDER]
    if order == U0:
        return GO
    first = state[op + O_START] >> order << order
    while first < state[op + O_END]:
        block = block_row(m, node, first)
        if state[block + B_STATE] == BLOCK_HUGE:
            status = split_block(m, block, first, state[node + I_ZEROED] + (first >> U6))
            if status != 0:
                leave_split(m, node, state[op + O_START] >> order << order, first)
                return fail_at(state, op, status, first)
        first += U1 << order
    return GO


@kernel
def merge(m, op):
    """To private, at the very end: merge every touched block that holds no shared page any more.

    A folio that somebody holds makes the posted code spin; here the block stays split until the next
    conversion that changes it and leaves it all private (inference).
    """
    state = m.state
    node = inode_row(state[op + O_INODE])
    order = state[R_ORDER]
    first = state[op + O_START] >> order << order
    while first < state[op + O_END]:
        block = block_row(m, node, first)
        if m.state[block + B_STATE] == BLOCK_SPLIT and shared_in_block(m, node, first) == U0:
            if merge_block(m, block, first, state[node + I_ZEROED] + (first >> U6)) != 0:
                charge_one(m, FREEZE_SPIN)
                state[block + B_WAITS] = U1
        first += U1 << order
    return GO


@kernel
def convert(m, op):
    """Order jan2026."""
    if convert_prepare(m, op, ROUNDED, True) != GO:
        return
    if m.state[op + O_TO_PRIVATE] != U0:
        unmap_host(m, op)
        if gate(m, op) != GO:
            return
    elif split(m, op) != GO:
        return
    convert_invalidate_begin(m, op)
    convert_zap(m, op)
    store_attributes(m, op)
    convert_invalidate_end(m, op)
    if m.state[op + O_TO_PRIVATE] != U0:
        merge(m, op)
    convert_finish(m, op)


# --------------------------------------------------------------------------- truncation


@outlined
def truncate_block(m, inode, index):
    """Free the whole huge page that begins at page `index`: 0, or -EAGAIN with nothing freed.

    A 4K folio is unmapped and leaves the inode, whoever holds it, and is free with its last reference.
    Split, its pages are unmapped from the host and must be idle, so that it can be merged first. Whole,
    it is truncated at once, and goes to the pool with its last reference.
    """
    state = m.state
    node = inode_row(inode)
    block = block_row(m, node, index)
    kind = m.state[block + B_STATE]
    small = kind == BLOCK_HUGE and state[R_ORDER] == U0
    if kind == BLOCK_SPLIT or (small and mappings(m.ram, struct_page(m, m.state[block + B_PFN])) != U0):
        unmap_mapping_range(m, inode, index, index + (U1 << state[R_ORDER]))
    if kind == BLOCK_SPLIT and merge_block(m, block, index, NONE) != 0:
        return np.int64(-EAGAIN)
    if m.state[block + B_STATE] == BLOCK_HUGE:
        release_block(m, block)
        clear_zeroed(m, node, index)
    return np.int64(0)


@outlined
def evict_block(m, inode, index):
    """Inode eviction: whole folios are truncated, split blocks merged first where nobody holds a piece.

    Series rfc2 merges nothing here: every piece is truncated by itself and the worker merges the block afterwards. A
    piece that somebody still holds keeps its whole block from the pool until the last `put`: the
    zombie state of the posted series (page type PGTY_guestmem_hugetlb, nr_pages_waiting_to_be_merged).
    """
    node = inode_row(inode)
    block = block_row(m, node, index)
    if m.state[block + B_STATE] == BLOCK_SPLIT:
        if m.state[R_SERIES] == SERIES_RFC2 or merge_block(m, block, index, NONE) != 0:
            leave_cache(m, m.state[R_ORDER])
            make_zombie(m, block)
            clear_zeroed(m, node, index)
            if m.state[block + B_OUTSTANDING] == U0:
                note_return(m, block)
            return
    if m.state[block + B_STATE] == BLOCK_HUGE:
        release_block(m, block)
        clear_zeroed(m, node, index)
