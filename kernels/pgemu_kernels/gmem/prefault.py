"""KVM_PRE_FAULT_MEMORY on memory slots of the designs' inodes."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U12
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.memslots import find_memslot
from pgemu_kernels.engine.rows import inode_row, is_live_vm, stop, vm_row
from pgemu_kernels.gmem.faults import end_guest_fault, enter_fault, is_released
from pgemu_kernels.kvm.fault import page_root
from pgemu_kernels.kvm.prefault import prefault_by, prefault_outside
from pgemu_kernels.tables.walker import find_leaf, stage2_format
from pgemu_kernels.words.operations import (
    EBADF,
    EBUSY,
    EFAULT,
    EOPNOTSUPP,
    GO,
    RET_PF_FIXED,
    RET_PF_RETRY,
    RET_PF_SPURIOUS,
)
from pgemu_kernels.words.rows import (
    M_KIND,
    O_ADDRESS,
    O_DETAIL,
    O_INDEX,
    O_INODE,
    O_STATUS,
    O_VM,
    SLOT_GUEST_MEMFD,
)
from pgemu_kernels.words.table_words import F_ACCESSED


@kernel
def prefault_begin(m, op):
    """As faults.guest_begin() of a page that nobody accesses: no exit, any kind of page, -ENOENT without a slot."""
    state = m.state
    gfn = state[op + O_ADDRESS] >> U12
    slot = find_memslot(state, state[op + O_VM], gfn)
    if slot == NONE:
        return stop(state, op, prefault_outside(m, state[op + O_VM], gfn))
    if state[slot + M_KIND] != SLOT_GUEST_MEMFD:
        return stop(state, op, -EOPNOTSUPP)
    if is_released(m, slot):
        return stop(state, op, -EFAULT)
    return enter_fault(m, op, slot, gfn, False)


@outlined
def prefault_page(m, op, gfn):
    """Map the page at a guest frame: 0 or -errno, and the level of its leaf.

    mmu.c:kvm_tdp_map_page(). A new leaf is not marked as accessed: spte.c:make_spte() with prefetch.
    """
    state = m.state
    state[op + O_ADDRESS] = gfn << U12
    if prefault_begin(m, op) == GO:
        end_guest_fault(m, op)
        if np.int64(state[op + O_STATUS]) == RET_PF_FIXED:
            f = stage2_format(m)
            root = page_root(m, vm_row(state[op + O_VM]), inode_row(state[op + O_INODE]), state[op + O_INDEX])
            leaf, _ = find_leaf(m, f, root, gfn)
            m.ram[leaf] &= ~state[f + F_ACCESSED]
    status = np.int64(state[op + O_STATUS])
    if status == RET_PF_RETRY:  # an invalidation came between, or another fault is allocating the page
        return np.int64(-EBUSY), U0
    if status == RET_PF_FIXED or status == RET_PF_SPURIOUS:
        return np.int64(0), state[op + O_DETAIL]
    return status, U0


prefault_pages = prefault_by(prefault_page)


@outlined
def prefault(m, op):
    """Map [address, address + length) without an access, at the levels that faults would get.

    0 with the bytes mapped in detail, less than `length` where a later page failed; what the first page failed with:
    -ENOENT without a slot, -EFAULT of one whose file was released, -ENOMEM; -EINVAL for what is not aligned or empty;
    -EBADF of a closed VM; -EBUSY where Linux would wait for a conversion. kvm_main.c:kvm_vcpu_pre_fault_memory().
    The processor's accesses are not followed in the designs' slots: the leaves' accessed bits stay clear.
    """
    state = m.state
    if not is_live_vm(state, state[op + O_VM]):
        return stop(state, op, -EBADF)
    address = state[op + O_ADDRESS]
    status = prefault_pages(m, op)
    state[op + O_ADDRESS] = address
    return stop(state, op, status)
