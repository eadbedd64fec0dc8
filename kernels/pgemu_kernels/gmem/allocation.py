"""Allocation of the page under a fault, step by step.

An allocation is: lookup, which misses; take a page of the subpool and of the pool; insert it in the page cache, or
lose the race and look again; split it where any of its pages is shared. A mutex per inode and huge page is held
meanwhile (hash mutex of the January 2026 rewrite, taken outside kvm_gmem_get_folio() as Michael Roth needed it);
Defect.ALLOCATION_RACE goes without. Between operations no record holds a mutex or a folio in hand.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U6, U512
from pgemu_kernels.engine.charge import result
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.handle import full_only
from pgemu_kernels.engine.properties import splits_folios
from pgemu_kernels.engine.rows import block_row, inode_row, stop, unlock
from pgemu_kernels.engine.shareability import shared_in_block
from pgemu_kernels.folios.folio import folio_order, folio_test_large, struct_page
from pgemu_kernels.folios.guest_folios import free_block, give_back_folio, insert_folio, obtain_folio
from pgemu_kernels.folios.large_folios import add_large, large_folios, take_large
from pgemu_kernels.folios.splitting import split_block
from pgemu_kernels.gmem import lru, piece_merges, piece_splits, pieces
from pgemu_kernels.gmem.conversion import in_pieces
from pgemu_kernels.gmem.levels import defects
from pgemu_kernels.gmem.split_merge import add_to_lru
from pgemu_kernels.words.enum_words import DEFECT_ALLOCATION_RACE, OP_HOST_FAULT
from pgemu_kernels.words.operations import (
    BLOCKED,
    EEXIST,
    ENOMEM,
    GO,
    RET_PF_RETRY,
    STOP,
    VM_FAULT_OOM,
    VM_FAULT_RETRY,
)
from pgemu_kernels.words.registers import R_FOLIOS_IN_HAND, R_LRU_CPUS, R_ORDER
from pgemu_kernels.words.rows import (
    B_MUTEX,
    B_PFN,
    B_STATE,
    BLOCK_ABSENT,
    BLOCK_HUGE,
    BLOCK_PARTLY,
    I_ZEROED,
    O_ACTOR,
    O_FOLIO,
    O_INDEX,
    O_INODE,
    O_MUTEX,
    O_OP,
)

# --------------------------------------------------------------------------- mutex and lookup


@kernel
def unlock_block(m, op):
    """Release the mutex of the block, if the fault holds one."""
    state = m.state
    if state[op + O_MUTEX] != U0:
        state[state[op + O_MUTEX] + B_MUTEX] = U0
        state[op + O_MUTEX] = U0


@kernel
def lock_block(m, op, block):
    """Take the block's mutex; False if another fault holds it."""
    state = m.state
    if defects(m) & DEFECT_ALLOCATION_RACE != U0 or state[op + O_MUTEX] == block:
        return True
    if state[block + B_MUTEX] != U0:
        return False
    state[block + B_MUTEX] = state[op + O_ACTOR] + U1
    state[op + O_MUTEX] = block
    return True


@outlined
def lookup(m, op):
    """Whether the page has a folio: STOP where it has one, GO where one is to be allocated (the mutex is held).

    BLOCKED: another fault is allocating it.
    """
    state = m.state
    block = block_row(m, inode_row(state[op + O_INODE]), state[op + O_INDEX])
    busy = state[block + B_MUTEX] != U0 and state[op + O_MUTEX] != block
    if state[block + B_STATE] != BLOCK_ABSENT and not busy:
        return np.int64(STOP)
    if not lock_block(m, op, block):
        result(state, op, np.int64(VM_FAULT_RETRY if state[op + O_OP] == OP_HOST_FAULT else RET_PF_RETRY))
        return np.int64(BLOCKED)
    return np.int64(GO)


# --------------------------------------------------------------------------- take, insert, split


large_taken = full_only(take_large, NONE)
large_added = full_only(add_large, False)


@kernel
def pages_in_hand(m, head):
    """What a folio that was taken counts as: 1, or the 4K pages of a large one of the page allocator."""
    if large_folios(m) != U0:
        return U1 << folio_order(m.ram, struct_page(m, head))
    return U1


@outlined
def take(m, op):
    """Take a page of the subpool and a huge page for the block: 0 or -ENOMEM."""
    state = m.state
    order = state[R_ORDER]
    head = NONE
    if large_folios(m) != U0:
        head = large_taken(m, state[op + O_INODE], state[op + O_INDEX])
    if head == NONE:
        head = obtain_folio(m, state[op + O_INODE], state[op + O_INDEX] >> order << order)
    if head == NONE:
        return np.int64(-ENOMEM)
    state[op + O_FOLIO] = head
    state[R_FOLIOS_IN_HAND] += pages_in_hand(m, head)
    return np.int64(0)


@outlined
def join_lru(m, op, head):
    """A folio of order 0 joined the page cache: into the batch of its CPU."""
    if m.state[R_ORDER] == U0:
        lru.lru_add(m, head, m.state[op + O_ACTOR] % m.state[R_LRU_CPUS])


joins_lru = full_only(join_lru, None)  # huge pages join no LRU list


@outlined
def insert(m, op):
    """Put what was taken in the page cache: 0, or -EEXIST where somebody was faster, who keeps his: ours goes back."""
    state = m.state
    inode = state[op + O_INODE]
    order = state[R_ORDER]
    block = block_row(m, inode_row(inode), state[op + O_INDEX])
    head = state[op + O_FOLIO]
    state[op + O_FOLIO] = U0
    state[R_FOLIOS_IN_HAND] -= pages_in_hand(m, head)
    if large_folios(m) != U0 and folio_test_large(m.ram, struct_page(m, head)):
        return np.int64(0 if large_added(m, inode, state[op + O_INDEX], head) else -EEXIST)
    if state[block + B_STATE] != BLOCK_ABSENT:
        give_back_folio(m, inode, head)
        return np.int64(-EEXIST)
    insert_folio(m, inode, block, state[op + O_INDEX] >> order << order, head)
    joins_lru(m, op, head)
    return np.int64(0)


@outlined
def split_to_pieces(m, op, node, block, first):
    """split_new() of a 1G folio, down to what its shared pages need; without memory for that the folio is removed."""
    status = piece_splits.split_shared(m, node, block, first)
    if status == 0:
        for index in range(first, first + pieces.BLOCK_PAGES, U512):
            if pieces.is_split_at(m, block, index):
                add_to_lru(m, op, pieces.piece_head(m, block, index), U512)
    elif status == -ENOMEM:
        if m.state[block + B_STATE] == BLOCK_PARTLY:
            piece_merges.dissolve_block(m, node, block, first)
        free_block(m, block)
    return status


pieces_split = full_only(split_to_pieces, np.int64(0))  # machines without parameters split to 4K


@outlined
def split_new(m, op):
    """Split a new folio if any of its pages is shared: 0, -WOULD_SPIN, or -ENOMEM with the folio removed.

    kvm_gmem_get_folio() of the posted series: shared memory is order-0 before anybody uses it.
    """
    state = m.state
    node = inode_row(state[op + O_INODE])
    index = state[op + O_INDEX]
    order = state[R_ORDER]
    block = block_row(m, node, index)
    if not splits_folios(m) or order == U0 or shared_in_block(m, node, index) == U0:
        return np.int64(0)
    if state[block + B_STATE] != BLOCK_HUGE:
        return np.int64(0)  # somebody else did, without the mutex
    first = index >> order << order
    if in_pieces(m):
        return pieces_split(m, op, node, block, first)
    status = split_block(m, block, first, state[node + I_ZEROED] + (first >> U6))
    if status == 0:
        add_to_lru(m, op, state[block + B_PFN], U1 << order)
    elif status == -ENOMEM:
        free_block(m, block)
    return status


# --------------------------------------------------------------------------- all of it


@outlined
def fail_fault(m, op):
    """End a fault for want of memory."""
    state = m.state
    unlock_block(m, op)
    unlock(state, op, inode_row(state[op + O_INODE]))
    return stop(state, op, VM_FAULT_OOM if state[op + O_OP] == OP_HOST_FAULT else -ENOMEM)


@outlined
def allocate_folio(m, op):
    """Allocate the page under a fault with nobody in between: GO; BLOCKED; STOP where -ENOMEM has ended the fault."""
    state = m.state
    if lookup(m, op) == BLOCKED:
        unlock(state, op, inode_row(state[op + O_INODE]))
        return np.int64(BLOCKED)
    if take(m, op) != 0:
        return np.int64(fail_fault(m, op))
    insert(m, op)
    if split_new(m, op) != 0:
        return np.int64(fail_fault(m, op))
    unlock_block(m, op)
    return np.int64(GO)


@kernel
def has_folio(m, op):
    """Whether there is a folio under the record's page that nobody is still allocating."""
    state = m.state
    block = block_row(m, inode_row(state[op + O_INODE]), state[op + O_INDEX])
    return state[block + B_STATE] != BLOCK_ABSENT and state[block + B_MUTEX] == U0
