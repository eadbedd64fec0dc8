"""Design "restructure": folios are split to 4K while any of their pages is shared, and merged afterwards.

Order `jan2026` of the posted plan (Ackerley Tng, January 2026): prealloc; to private: unmap host and
gate; to shared: split; begin; zap (point of no return); store; end; to private: merge.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U6, U12
from pgemu_kernels.engine.charge import (
    LEAF_WRITTEN,
    PAGE_ZEROED,
    RMAP_CHANGED,
    charge_one,
)
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.frames import zero_contents
from pgemu_kernels.engine.rows import block_row, inode_row, largest_level, slot_allows, space_root, stop, unlock
from pgemu_kernels.engine.shareability import is_shared, shared_in_block
from pgemu_kernels.folios.folio import (
    FLAGS,
    PG_UPTODATE,
    add_mapping,
    add_references,
    struct_page,
)
from pgemu_kernels.folios.hugetlb import free_block, take_folio
from pgemu_kernels.folios.splitting import split_block
from pgemu_kernels.gmem.steps import (
    fault_begin,
    guest_begin,
    install_stage2,
    still_mapped,
)
from pgemu_kernels.gmem.zeroing import zero_huge
from pgemu_kernels.tables.walker import count_host_leaf, host_format, host_slot
from pgemu_kernels.words.operations import (
    ENOMEM,
    GO,
    VM_FAULT_LOCKED,
    VM_FAULT_OOM,
    VM_FAULT_RETRY,
    VM_FAULT_SIGBUS,
)
from pgemu_kernels.words.registers import R_FAULT_REFERENCES, R_ORDER
from pgemu_kernels.words.rows import (
    A_READ_ONLY,
    B_PFN,
    B_STATE,
    BLOCK_ABSENT,
    BLOCK_SPLIT,
    I_ZEROED,
    O_ADDRESS,
    O_DETAIL,
    O_INDEX,
    O_INODE,
    O_LEVEL,
    O_PFN,
    O_REFERENCED,
    O_ROW,
    O_SPACE,
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
