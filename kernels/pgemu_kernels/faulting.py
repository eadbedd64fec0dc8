"""Faults of the designs with every parameter: their steps, and the straight line."""

from __future__ import annotations

import numpy as np

from pgemu_kernels import pfnmap, restructure
from pgemu_kernels.bits import NONE, U1
from pgemu_kernels.compile import kernel, outlined
from pgemu_kernels.gmem import block_row, inode_row, unlock
from pgemu_kernels.gmem_kvm import folio_level_full, shareability_level_full
from pgemu_kernels.huge_host import host_level, insert
from pgemu_kernels.layout import (
    B_STATE,
    BLOCK_SPLIT,
    ENOMEM,
    GO,
    O_INDEX,
    O_INODE,
    O_LEVEL,
    O_PFN,
    PFNMAP,
    R_DESIGN,
    R_HOST_HUGE,
    VM_FAULT_RETRY,
)
from pgemu_kernels.steps import fault_begin, guest_begin, still_mapped, stop
from pgemu_kernels.zeroing import zero_huge

U = np.uint64
_PFNMAP = U(PFNMAP)


@outlined
def fault_folio(m, op):
    if m.state[R_DESIGN] == _PFNMAP:
        return pfnmap.fault_folio(m, op)
    return restructure.fault_folio(m, op)


@outlined
def fault_map(m, op):
    state = m.state
    if state[R_DESIGN] != _PFNMAP:
        return restructure.fault_map(m, op)
    level = host_level(m, op)
    if level == U1 and state[R_HOST_HUGE] == U(0):
        return pfnmap.fault_map(m, op)
    node = inode_row(state[op + O_INODE])
    status = np.int64(VM_FAULT_RETRY)
    if still_mapped(state, op):
        status = insert(m, op, level)
    unlock(state, op, node)
    return stop(state, op, status)


@outlined
def guest_folio(m, op):
    """Frame of the page, zeroed, and the level of its leaf; then unlock."""
    state = m.state
    inode = state[op + O_INODE]
    node = inode_row(inode)
    index = state[op + O_INDEX]
    is_pfnmap = state[R_DESIGN] == _PFNMAP
    pfn = pfnmap.get_folio(m, inode, node, index) if is_pfnmap else restructure.get_folio(m, inode, node, index)
    if pfn == NONE:
        unlock(state, op, node)
        return stop(state, op, -ENOMEM)
    level = shareability_level_full(m, op) if is_pfnmap else folio_level_full(m, op)
    if state[block_row(m, node, index) + B_STATE] == BLOCK_SPLIT:
        restructure.zero_page(m, pfn)
    else:
        zero_huge(m, node, index, pfn, level)
    state[op + O_LEVEL] = level
    state[op + O_PFN] = pfn
    unlock(state, op, node)
    return GO


@kernel
def guest_map(m, op):
    return restructure.guest_map(m, op)


@outlined
def host_fault(m, op):
    if fault_begin(m, op) == GO and fault_folio(m, op) == GO:
        fault_map(m, op)


@outlined
def guest_fault(m, op):
    if guest_begin(m, op) == GO and guest_folio(m, op) == GO:
        guest_map(m, op)
