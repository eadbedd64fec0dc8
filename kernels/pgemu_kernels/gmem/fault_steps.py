"""Faults step by step, with other actors between the steps.

The steps are those of faults.py. Here a fault holds what it found until its next step, and looks again before it
enters it.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import U0, U1, U12
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.properties import entries_are_special, keeps_reference, splits_folios
from pgemu_kernels.engine.rows import (
    block_row,
    inode_row,
    stop,
    unlock,
)
from pgemu_kernels.folios.folio import MAPPING, add_references, struct_page
from pgemu_kernels.gmem.allocation import (
    fail_fault,
    insert,
    lookup,
    split_new,
    take,
    unlock_block,
)
from pgemu_kernels.gmem.faults import (
    guest_begin,
    guest_map,
    guest_page,
    host_begin,
    host_map,
    host_page,
    is_poisoned,
    is_refused,
)
from pgemu_kernels.gmem.host_entries import is_special
from pgemu_kernels.gmem.levels import folio_order_at, is_logged
from pgemu_kernels.gmem.references import drop
from pgemu_kernels.words.enum_words import OP_HOST_FAULT
from pgemu_kernels.words.operations import (
    BLOCKED,
    GO,
    STOP,
    VM_FAULT_RETRY,
    WOULD_SPIN,
)
from pgemu_kernels.words.registers import R_FAULT_REFERENCES
from pgemu_kernels.words.rows import (
    A_END,
    A_INODE,
    A_PGOFF,
    A_SPACE,
    A_START,
    O_ADDRESS,
    O_FOLIO,
    O_INDEX,
    O_INODE,
    O_LEVEL,
    O_MUTEX,
    O_NEXT,
    O_OP,
    O_PFN,
    O_REFERENCED,
    O_ROW,
    O_SPACE,
)

U = np.uint64

# Steps of a fault.
FOLIO = U(1)
MAP = U(2)
TAKE = U(3)
INSERT = U(4)
SPLIT = U(5)
PUT = U(6)


@kernel
def hold(state, op, head):
    """The record says whose reference the fault holds until its next step."""
    state[R_FAULT_REFERENCES] += U1
    state[op + O_REFERENCED] = head + U1


@kernel
def let_go(state, op):
    """It holds none any more, or the entry will keep it."""
    state[R_FAULT_REFERENCES] -= U1
    state[op + O_REFERENCED] = U0


@outlined
def step_page(m, op, host):
    """The step that finds the frame, which is there, and keeps its folio from going until the entry is there."""
    state = m.state
    if host:
        outcome = np.int64(host_page(m, op))
        if outcome == GO and not is_special(m, state[op + O_ROW]):
            hold(state, op, state[op + O_PFN])
        return outcome
    if guest_page(m, op) != GO:
        return np.int64(STOP)
    if not entries_are_special(m):
        index = state[op + O_INDEX]
        order = folio_order_at(m, block_row(m, inode_row(state[op + O_INODE]), index), index)
        head = state[op + O_PFN] & ~((U1 << order) - U1)
        add_references(m.ram, struct_page(m, head), U1)
        hold(state, op, head)
        if not keeps_reference(m):
            state[op + O_NEXT] = PUT
    return np.int64(GO)


@kernel
def shows_page(state, op):
    """Whether the VMA that a host fault found still shows its page there: the VMA's lock would have kept it."""
    row = state[op + O_ROW]
    address = state[op + O_ADDRESS]
    here = state[row + A_START] <= address < state[row + A_END]
    same = state[row + A_SPACE] == state[op + O_SPACE] and state[row + A_INODE] == state[op + O_INODE]
    return here and same and state[row + A_PGOFF] + ((address - state[row + A_START]) >> U12) == state[op + O_INDEX]


@outlined
def step_host_map(m, op):
    """host_map(), unless the VMA changed, the folio left its inode or went bad: Linux keeps it locked, so that
    truncation and memory failure wait and unmap it. The fault may have held the last reference.
    """
    state = m.state
    pfn = state[op + O_PFN]
    page = struct_page(m, pfn)
    held = state[op + O_REFERENCED] != U0
    gone = not shows_page(state, op) or (held and (m.ram[page + MAPPING] == U0 or is_poisoned(m, pfn)))
    if held:
        let_go(state, op)
    if gone:
        unlock(state, op, inode_row(state[op + O_INODE]))
        outcome = stop(state, op, VM_FAULT_RETRY)
        if held:
            add_references(m.ram, page, ~U0)
    else:
        outcome = host_map(m, op)
    if held:
        drop(m, pfn, U0)
    return np.int64(outcome)


@outlined
def guest_put(m, op):
    """The end of kvm_gmem_get_pfn(), the lock released: until here a conversion meets the fault's reference."""
    state = m.state
    referenced = state[op + O_REFERENCED]
    if referenced != U0:
        let_go(state, op)
        drop(m, referenced - U1, U1)
    state[op + O_NEXT] = MAP
    return np.int64(GO)


@outlined
def step_map(m, op, host):
    """Enter it in the process's tables, or in the VM's."""
    state = m.state
    if host:
        return step_host_map(m, op)
    guest_put(m, op)
    if is_logged(m, state[op + O_ROW]):
        state[op + O_LEVEL] = U1  # switched on meanwhile: KVM finds the level under its mmu_lock
    return np.int64(guest_map(m, op))


@kernel
def step_allocation(m, op, stage):
    """Step TAKE, INSERT or SPLIT; then the lookup once more."""
    state = m.state
    if stage == TAKE:
        return np.int64(GO) if take(m, op) == 0 else np.int64(fail_fault(m, op))
    if stage == INSERT:
        lost = insert(m, op) != 0
        if lost or not splits_folios(m):
            unlock_block(m, op)
            state[op + O_NEXT] = FOLIO
        return np.int64(GO)
    status = split_new(m, op)
    if status == -WOULD_SPIN:
        return np.int64(BLOCKED)  # the posted code spins
    if status != 0:
        return np.int64(fail_fault(m, op))
    unlock_block(m, op)
    state[op + O_NEXT] = FOLIO
    return np.int64(GO)


@outlined
def step_fault(m, op, stage):
    """Step `stage` of a host or a guest fault: 0 begins, 1 looks up, 2 maps, 3 to 5 allocate, 6 puts the folio."""
    state = m.state
    host = state[op + O_OP] == OP_HOST_FAULT
    if stage == U0:
        state[op + O_FOLIO] = U0
        state[op + O_MUTEX] = U0
        return np.int64(host_begin(m, op) if host else guest_begin(m, op))
    if stage == FOLIO:
        if host and is_refused(m, op):
            return np.int64(STOP)
        found = lookup(m, op)
        if found == STOP:
            return step_page(m, op, host)
        state[op + O_NEXT] = TAKE
        return found
    if stage == PUT:
        return guest_put(m, op)
    if stage == MAP:
        return step_map(m, op, host)
    return step_allocation(m, op, stage)
