"""fallocate(0) of the designs' inodes."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import U12
from pgemu_kernels.engine.compile import outlined
from pgemu_kernels.engine.rows import block_row, inode_row, lock_shared, range_arguments, stop, unlock
from pgemu_kernels.gmem.allocation import allocate_folio
from pgemu_kernels.words.operations import BLOCKED, EBUSY, EINVAL, ENOMEM, GO
from pgemu_kernels.words.registers import R_ORDER
from pgemu_kernels.words.rows import (
    B_STATE,
    BLOCK_ABSENT,
    I_PAGES,
    O_DETAIL,
    O_INDEX,
    O_INODE,
    O_LENGTH,
    O_OBJECT,
    O_OFFSET,
)

U = np.uint64


@outlined
def allocate(m, op):
    """ALLOCATE: have memory under pages of an inode; nothing is zeroed or mapped. 0, -EBADF, -EINVAL, -ENOMEM with the
    offset of the huge page that failed, what came before it stays; -EBUSY where Linux would wait for the lock.

    Start and end are rounded down to huge pages; those with a shared page are split (restructure).
    virt/kvm/guest_memfd.c:kvm_gmem_allocate() and its form of RFC v2. A signal (-EINTR) cannot come.
    """
    state = m.state
    status = range_arguments(state, op)
    if status != 0:
        return stop(state, op, status)
    inode = state[op + O_OBJECT]
    node = inode_row(inode)
    order = state[R_ORDER]
    end = (state[op + O_OFFSET] + state[op + O_LENGTH]) >> U12
    if end > state[node + I_PAGES]:
        return stop(state, op, -EINVAL)
    if not lock_shared(state, op, node):
        return stop(state, op, -EBUSY)
    state[op + O_INODE] = inode
    for number in range(state[op + O_OFFSET] >> U12 >> order, end >> order):
        index = number << order
        state[op + O_INDEX] = index
        if state[block_row(m, node, index) + B_STATE] == BLOCK_ABSENT:
            found = allocate_folio(m, op)
            if found != GO:
                state[op + O_DETAIL] = index << U12
                return stop(state, op, -EBUSY if found == BLOCKED else -ENOMEM)
    unlock(state, op, node)
    return stop(state, op, 0)
