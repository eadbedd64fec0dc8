"""Faults, conversion (order jan2026) and truncation of machines that split 1G pages to 2M pieces first.

The functions of design restructure with pieces.py in place of the split to 4K. Ranges that are invalidated and zapped
are rounded out to 2M, not to 1G: a leaf of 1G goes whole where the range touches it.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels import references, restructure, truncation
from pgemu_kernels.bits import NONE, U0, U1, U12
from pgemu_kernels.compile import kernel, outlined
from pgemu_kernels.events import DEFERRED_MERGE, charge_one
from pgemu_kernels.folio import add_references
from pgemu_kernels.gmem import block_row, inode_row, is_shared, shared_in_block, slot_allows, unlock
from pgemu_kernels.host import unmap_everywhere
from pgemu_kernels.hugetlb import free_block, release_block, take_folio
from pgemu_kernels.layout import (
    B_OUTSTANDING,
    B_PFN,
    B_STATE,
    B_WORDS,
    BLOCK_ABSENT,
    BLOCK_HUGE,
    BLOCK_PARTLY,
    BLOCK_ZOMBIE,
    EAGAIN,
    ENOMEM,
    GO,
    I_BLOCKS,
    I_PAGES,
    O_ADDRESS,
    O_DETAIL,
    O_END,
    O_INDEX,
    O_INODE,
    O_LENGTH,
    O_LEVEL,
    O_OBJECT,
    O_OFFSET,
    O_PFN,
    O_REFERENCED,
    O_ROUND_END,
    O_ROUND_START,
    O_ROW,
    O_START,
    O_STATUS,
    O_TO_PRIVATE,
    R_BLOCK_ROWS,
    R_BLOCKS,
    R_FAULT_REFERENCES,
    VM_FAULT_OOM,
    VM_FAULT_SIGBUS,
)
from pgemu_kernels.pieces import (
    BLOCK_PAGES,
    ORDER,
    PAGES,
    dissolve_block,
    first_unsplit,
    gate_block,
    is_piece_split,
    level_of,
    make_zombie,
    merge_pieces,
    note_waiting,
    revive,
    split_shared,
    split_touched,
)
from pgemu_kernels.steps import (
    convert_finish,
    convert_invalidate_begin,
    convert_invalidate_end,
    convert_prepare,
    convert_zap,
    fail_at,
    fault_begin,
    guest_begin,
    stop,
    store_attributes,
    unmap_host,
)
from pgemu_kernels.zeroing import clear_zeroed, zero_folio, zero_huge

U = np.uint64
_INSIDE = BLOCK_PAGES - U1


# --------------------------------------------------------------------------- faults


@outlined
def allocate(m, inode, index):
    """Put a 1G folio under a page, split at once down to what its shared pages need: 0 or -ENOMEM with none."""
    node = inode_row(inode)
    block = block_row(m, node, index)
    first = index & ~_INSIDE
    if take_folio(m, inode, block, first) == NONE:
        return np.int64(-ENOMEM)
    if shared_in_block(m, node, index) != U0 and split_shared(m, node, block, first) != 0:
        if m.state[block + B_STATE] == BLOCK_PARTLY:
            dissolve_block(m, node, block, first)
        free_block(m, block)
        return np.int64(-ENOMEM)
    return np.int64(0)


@kernel
def get_folio(m, inode, node, index):
    """The frame of a page, allocated if need be, or NONE without memory."""
    block = block_row(m, node, index)
    if m.state[block + B_STATE] == BLOCK_ABSENT and allocate(m, inode, index) != 0:
        return NONE
    return m.state[block + B_PFN] + (index & _INSIDE)


@kernel
def fault_folio(m, op):
    """restructure.fault_folio(): a shared page is an order-0 folio here too."""
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
    add_references(m.ram, restructure.zero_page(m, pfn), U1)
    state[R_FAULT_REFERENCES] += U1
    state[op + O_REFERENCED] = pfn + U1
    state[op + O_PFN] = pfn
    unlock(state, op, node)
    return GO


@kernel
def zero_piece(m, op, node, pfn):
    """Zero what a guest access to a block in pieces will show: the level of its leaf."""
    state = m.state
    index = state[op + O_INDEX]
    block = block_row(m, node, index)
    if is_piece_split(m, block, index) != U0:
        restructure.zero_page(m, pfn)
        return U1
    level = level_of(m, block, index)
    if not slot_allows(state, state[op + O_ROW], state[op + O_ADDRESS] >> U12, level):
        level = U1
    zero_folio(m, node, index, pfn, level, ORDER)
    return level


@kernel
def guest_folio(m, op):
    """restructure.guest_folio(): level 3 in a whole block, 2 in a whole piece, 1 in a split one."""
    state = m.state
    inode = state[op + O_INODE]
    node = inode_row(inode)
    index = state[op + O_INDEX]
    pfn = get_folio(m, inode, node, index)
    if pfn == NONE:
        unlock(state, op, node)
        return stop(state, op, -ENOMEM)
    if state[block_row(m, node, index) + B_STATE] == BLOCK_PARTLY:
        level = zero_piece(m, op, node, pfn)
    else:
        level = restructure.folio_level(state, op)
        zero_huge(m, node, index, pfn, level)
    state[op + O_LEVEL] = level
    state[op + O_PFN] = pfn
    unlock(state, op, node)
    return GO


@kernel
def host_fault(m, op):
    if fault_begin(m, op) == GO and fault_folio(m, op) == GO:
        restructure.fault_map(m, op)


@kernel
def guest_fault(m, op):
    if guest_begin(m, op) == GO and guest_folio(m, op) == GO:
        restructure.guest_map(m, op)


# --------------------------------------------------------------------------- conversion


@kernel
def prepare(m, op):
    """convert_prepare(), and the range rounded out to pieces."""
    outcome = convert_prepare(m, op, False)
    if outcome == GO:
        inside = PAGES - U1
        m.state[op + O_ROUND_START] = m.state[op + O_START] & ~inside
        m.state[op + O_ROUND_END] = (m.state[op + O_END] + inside) & ~inside
    return outcome


@kernel
def gate(m, op):
    """restructure.gate(), of the folios that the range overlaps."""
    state = m.state
    node = inode_row(state[op + O_INODE])
    first = state[op + O_START] & ~_INSIDE
    while first < state[op + O_END]:
        block = block_row(m, node, first)
        failing = NONE
        if state[block + B_STATE] != BLOCK_ABSENT:
            failing = gate_block(m, node, block, first, state[op + O_START], state[op + O_END])
        if failing != NONE:
            return fail_at(state, op, -EAGAIN, failing)
        first += BLOCK_PAGES
    return GO


@kernel
def split(m, op):
    """restructure.split(): what was split before a failure stays so."""
    state = m.state
    node = inode_row(state[op + O_INODE])
    start = state[op + O_START]
    first = start & ~_INSIDE
    while first < state[op + O_END]:
        block = block_row(m, node, first)
        if state[block + B_STATE] != BLOCK_ABSENT:
            status = split_touched(m, node, block, first, start, state[op + O_END])
            if status != 0:
                before = start & ~_INSIDE
                while before < first:
                    if state[block_row(m, node, before) + B_STATE] == BLOCK_PARTLY:
                        note_waiting(m, node, block_row(m, node, before), before)
                    before += BLOCK_PAGES
                return fail_at(state, op, status, first_unsplit(m, block, first, start))
        first += BLOCK_PAGES
    return GO


@kernel
def merge(m, op):
    """restructure.merge(), of pieces and of blocks."""
    state = m.state
    node = inode_row(state[op + O_INODE])
    first = state[op + O_START] & ~_INSIDE
    while first < state[op + O_END]:
        block = block_row(m, node, first)
        if state[block + B_STATE] == BLOCK_PARTLY:
            merge_pieces(m, node, block, first, state[op + O_START], state[op + O_END])
        first += BLOCK_PAGES
    return GO


@kernel
def convert(m, op):
    """Order jan2026."""
    if prepare(m, op) != GO:
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
    """restructure.truncate_block() of a block in pieces: 0 or -EAGAIN."""
    node = inode_row(inode)
    block = block_row(m, node, index)
    unmap_everywhere(m, inode, index, index + BLOCK_PAGES)
    status = dissolve_block(m, node, block, index)
    if status == 0:
        free_block(m, block)
        clear_zeroed(m, node, index)
    return status


@outlined
def punch(m, op):
    """truncation.punch(), then the blocks in pieces that the hole covers whole."""
    state = m.state
    truncation.punch(m, op)
    if state[op + O_STATUS] != U0:
        return
    inode = state[op + O_OBJECT]
    node = inode_row(inode)
    index = ((state[op + O_OFFSET] >> U12) + _INSIDE) & ~_INSIDE
    end = min((state[op + O_OFFSET] + state[op + O_LENGTH]) >> U12, state[node + I_PAGES])
    while index + BLOCK_PAGES <= end:
        if state[block_row(m, node, index) + B_STATE] == BLOCK_PARTLY and truncate_block(m, inode, index) != 0:
            state[op + O_DETAIL] = index << U12
            stop(state, op, -EAGAIN)
            return
        index += BLOCK_PAGES


@outlined
def close(m, op):
    """truncation.close(), then the eviction of blocks in pieces: those that somebody holds become zombies."""
    state = m.state
    truncation.close(m, op)
    if state[op + O_STATUS] != U0:
        return
    node = inode_row(state[op + O_OBJECT])
    for i in range(state[node + I_BLOCKS]):
        first = i * BLOCK_PAGES
        block = block_row(m, node, first)
        if state[block + B_STATE] != BLOCK_PARTLY:
            continue
        charge_one(m, DEFERRED_MERGE)
        if dissolve_block(m, node, block, first) != 0:
            make_zombie(m, block)
        elif state[block + B_STATE] == BLOCK_HUGE:
            release_block(m, block)
            clear_zeroed(m, node, first)


@outlined
def put(m, op):
    """references.put(); a zombie block whose last folio was put goes back to the pool."""
    references.put(m, op)
    for i in range(m.state[R_BLOCKS]):
        block = m.state[R_BLOCK_ROWS] + i * U(B_WORDS)
        if m.state[block + B_STATE] == BLOCK_ZOMBIE and m.state[block + B_OUTSTANDING] == U0:
            revive(m, U0, block)
