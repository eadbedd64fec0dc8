"""Design "pfnmap": the VMA is VM_PFNMAP, entries are inserted by PFN, folios stay whole for ever.

The slides of 2025-08-07 define it (VM_PFNMAP, vmf_insert_pfn(), level from shareability, conversion only
unmaps); the order of steps beside that is inference: begin, zap and end over the exact range, attributes
stored between zap and end, the entry inserted under the invalidate_lock because no reference protects a
fault in flight.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U12
from pgemu_kernels.engine.charge import LEAF_WRITTEN, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.rows import block_row, inode_row, largest_level, slot_allows, space_root, stop, unlock
from pgemu_kernels.engine.shareability import is_shared, is_uniform
from pgemu_kernels.folios.hugetlb import release_block, take_folio
from pgemu_kernels.gmem.steps import (
    convert_finish,
    convert_invalidate_begin,
    convert_invalidate_end,
    convert_prepare,
    convert_zap,
    fault_begin,
    still_mapped,
    store_attributes,
    unmap_host,
)
from pgemu_kernels.gmem.zeroing import clear_zeroed, zero_huge
from pgemu_kernels.kvm.fault import guest_begin, install_stage2
from pgemu_kernels.tables.walker import count_host_leaf, host_format, host_slot
from pgemu_kernels.words.operations import ENOMEM, GO, VM_FAULT_NOPAGE, VM_FAULT_OOM, VM_FAULT_RETRY, VM_FAULT_SIGBUS
from pgemu_kernels.words.registers import R_ORDER
from pgemu_kernels.words.rows import (
    A_READ_ONLY,
    B_PFN,
    B_STATE,
    BLOCK_ABSENT,
    BLOCK_HUGE,
    O_ADDRESS,
    O_DETAIL,
    O_INDEX,
    O_INODE,
    O_LEVEL,
    O_PFN,
    O_ROW,
    O_SPACE,
    O_TO_PRIVATE,
)
from pgemu_kernels.words.table_words import F_SPECIAL_4K, F_SPECIAL_4K_RO

U = np.uint64
ROUNDED = False


# --------------------------------------------------------------------------- folios


@outlined
def allocate(m, inode, index):
    """Put a huge folio under page `index`: 0, or -ENOMEM when the pool is empty."""
    block = block_row(m, inode_row(inode), index)
    if take_folio(m, inode, block, index & ~((U1 << m.state[R_ORDER]) - U1)) == NONE:
        return np.int64(-ENOMEM)
    return np.int64(0)


@kernel
def get_folio(m, inode, node, index):
    """The frame of page `index`, allocated if need be, or NONE without memory."""
    block = block_row(m, node, index)
    if m.state[block + B_STATE] == BLOCK_ABSENT and allocate(m, inode, index) != 0:
        return NONE
    return m.state[block + B_PFN] + (index & ((U1 << m.state[R_ORDER]) - U1))


# --------------------------------------------------------------------------- host fault


@kernel
def fault_folio(m, op):
    """The page must be shared; its frame, zeroed. The invalidate_lock stays held."""
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
    zero_huge(m, node, index, pfn, U1)
    state[op + O_PFN] = pfn
    return GO


@kernel
def fault_map(m, op):
    """mm/memory.c:vmf_insert_pfn(): a special entry, no reference, no mapcount; then unlock."""
    state = m.state
    if not still_mapped(state, op):
        unlock(state, op, inode_row(state[op + O_INODE]))
        return stop(state, op, VM_FAULT_RETRY)
    slot = host_slot(m, space_root(state, state[op + O_SPACE]), state[op + O_ADDRESS] >> U12)
    unlock(state, op, inode_row(state[op + O_INODE]))
    if slot == NONE:
        return stop(state, op, VM_FAULT_OOM)
    state[op + O_DETAIL] = U1
    if m.ram[slot] == U0:
        leaf = F_SPECIAL_4K if state[state[op + O_ROW] + A_READ_ONLY] == U0 else F_SPECIAL_4K_RO
        m.ram[slot] = state[op + O_PFN] << U12 | state[host_format(m) + leaf]
        count_host_leaf(m, 1)
        charge_one(m, LEAF_WRITTEN)
    return stop(state, op, VM_FAULT_NOPAGE)


@kernel
def host_fault(m, op):
    if fault_begin(m, op) == GO and fault_folio(m, op) == GO:
        fault_map(m, op)


# --------------------------------------------------------------------------- guest fault


@kernel
def shareability_level(m, op):
    """The largest level, up to the huge page's, whose block the slot permits and is all of one kind."""
    state = m.state
    node = inode_row(state[op + O_INODE])
    index = state[op + O_INDEX]
    gfn = state[op + O_ADDRESS] >> U12
    level = largest_level(state)
    while level > U1 and not (is_uniform(m, node, index, level) and slot_allows(state, state[op + O_ROW], gfn, level)):
        level -= U1
    return level


@kernel
def guest_folio(m, op):
    """Frame of the page, the level that shareability allows, and zeroing if need be; then unlock.

    The level is found under the invalidate_lock; `guest_map` retries if anything was converted since.
    """
    state = m.state
    inode = state[op + O_INODE]
    node = inode_row(inode)
    index = state[op + O_INDEX]
    pfn = get_folio(m, inode, node, index)
    if pfn == NONE:
        unlock(state, op, node)
        return stop(state, op, -ENOMEM)
    level = shareability_level(m, op)
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
def convert(m, op):
    """The slides' order: a conversion only unmaps."""
    if convert_prepare(m, op, ROUNDED, True) != GO:
        return
    if m.state[op + O_TO_PRIVATE] != U0:
        unmap_host(m, op)
    convert_invalidate_begin(m, op)
    convert_zap(m, op)
    store_attributes(m, op)
    convert_invalidate_end(m, op)
    convert_finish(m, op)


# --------------------------------------------------------------------------- truncation


@outlined
def truncate_block(m, inode, index):
    """Free the whole huge page that begins at page `index`: 0, it is never refused.

    With a transient reference the folio leaves the page cache, and goes to the pool with the last `put`.
    """
    node = inode_row(inode)
    block = block_row(m, node, index)
    if m.state[block + B_STATE] == BLOCK_HUGE:
        release_block(m, block)
        clear_zeroed(m, node, index)
    return np.int64(0)


@outlined
def evict_block(m, inode, index):
    """Inode eviction: like truncation, for there is nothing to merge."""
    truncate_block(m, inode, index)
