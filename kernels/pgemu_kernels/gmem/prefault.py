"""KVM_PRE_FAULT_MEMORY on memory slots of the designs' inodes."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U9, U12, U4095
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.rows import find_memslot, inode_row, lock_shared, stop, vm_row
from pgemu_kernels.gmem import faults as faulting
from pgemu_kernels.kvm.fault import prefault_outside
from pgemu_kernels.stage2.invalidate import retry_fault
from pgemu_kernels.tables.walker import find_leaf, stage2_format
from pgemu_kernels.words.operations import (
    EBADF,
    EBUSY,
    EFAULT,
    EINVAL,
    EOPNOTSUPP,
    GO,
    RET_PF_FIXED,
    RET_PF_RETRY,
    RET_PF_SPURIOUS,
)
from pgemu_kernels.words.registers import R_VMS
from pgemu_kernels.words.rows import (
    M_BASE_GFN,
    M_FLAGS,
    M_INODE,
    M_KIND,
    M_PGOFF,
    O_ADDRESS,
    O_DETAIL,
    O_FOLIO,
    O_INDEX,
    O_INODE,
    O_LENGTH,
    O_MUTEX,
    O_ROW,
    O_SEQUENCE,
    O_STATUS,
    O_VM,
    SLOT_GUEST_MEMFD,
    SLOT_RELEASED,
    V_ROOT,
    V_SEQUENCE,
)
from pgemu_kernels.words.table_words import F_ACCESSED

U = np.uint64


@kernel
def prefault_begin(m, op):
    """As fault.guest_begin() of a page that nobody accesses: no exit, any kind of page, -ENOENT without a slot."""
    state = m.state
    vm = state[op + O_VM]
    gfn = state[op + O_ADDRESS] >> U12
    slot = find_memslot(state, vm, gfn)
    if slot == NONE:
        return stop(state, op, prefault_outside(m, vm, gfn))
    if state[slot + M_KIND] != SLOT_GUEST_MEMFD:
        return stop(state, op, -EOPNOTSUPP)
    if state[slot + M_FLAGS] & SLOT_RELEASED != U0:
        return stop(state, op, -EFAULT)
    row = vm_row(vm)
    leaf, level = find_leaf(m, stage2_format(m), state[row + V_ROOT], gfn)
    if leaf != NONE:
        state[op + O_DETAIL] = level
        return stop(state, op, RET_PF_SPURIOUS)
    node = inode_row(state[slot + M_INODE])
    if retry_fault(state, vm, gfn, state[row + V_SEQUENCE]) or not lock_shared(state, op, node):
        return stop(state, op, -EBUSY)
    state[op + O_SEQUENCE] = state[row + V_SEQUENCE]
    state[op + O_ROW] = slot
    state[op + O_INODE] = state[slot + M_INODE]
    state[op + O_INDEX] = gfn - state[slot + M_BASE_GFN] + state[slot + M_PGOFF]
    return GO


@outlined
def prefault_page(m, op):
    """Map the page at the record's address: 0 or -errno, and the level of its leaf.

    mmu.c:kvm_tdp_map_page(). A new leaf is not marked as accessed: spte.c:make_spte() with prefetch.
    """
    state = m.state
    state[op + O_FOLIO] = U0
    state[op + O_MUTEX] = U0
    if prefault_begin(m, op) == GO and faulting.allocate(m, op) == GO and faulting.guest_frame(m, op) == GO:
        faulting.guest_map(m, op)
        if np.int64(state[op + O_STATUS]) == RET_PF_FIXED:
            f = stage2_format(m)
            root = state[vm_row(state[op + O_VM]) + V_ROOT]
            leaf, _ = find_leaf(m, f, root, state[op + O_ADDRESS] >> U12)
            m.ram[leaf] &= ~state[f + F_ACCESSED]
    status = np.int64(state[op + O_STATUS])
    if status == RET_PF_RETRY:  # another fault is allocating the page: Linux would come again
        return np.int64(-EBUSY), U0
    if status == RET_PF_FIXED or status == RET_PF_SPURIOUS:
        return np.int64(0), state[op + O_DETAIL]
    return status, U0


@outlined
def prefault(m, op):
    """Map [address, address + length) without an access, at the levels that faults would get.

    0 with the bytes mapped in detail, less than `length` where a later page failed; what the first page failed with:
    -ENOENT without a slot, -EFAULT of one whose file was released, -ENOMEM; -EINVAL for what is not aligned or empty;
    -EBADF of a closed VM; -EBUSY where Linux would wait for a conversion. kvm_main.c:kvm_vcpu_pre_fault_memory().
    The processor's accesses are not followed in the designs' slots: the leaves' accessed bits stay clear.
    """
    state = m.state
    address = state[op + O_ADDRESS]
    length = state[op + O_LENGTH]
    vm = state[op + O_VM]
    if vm >= state[R_VMS] or state[vm_row(vm) + V_ROOT] == U0:
        return stop(state, op, -EBADF)
    if (address | length) & U4095 != U0 or address + length <= address:
        return stop(state, op, -EINVAL)
    end = address + length
    at = address
    status = np.int64(0)
    while at < end:
        state[op + O_ADDRESS] = at
        status, level = prefault_page(m, op)
        if status != 0:
            break
        size = U1 << (U12 + U9 * (level - U1))
        at = (at & ~(size - U1)) + size
    state[op + O_ADDRESS] = address
    state[op + O_DETAIL] = min(at, end) - address
    if at > address and status != -EBUSY:
        status = np.int64(0)
    return stop(state, op, status)
