"""BIND and UNBIND: memory slots of the designs' inodes, which have no number."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U12, U4095
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.handle import full_only
from pgemu_kernels.engine.memslots import find_memslot, has_slot_left, place_slot
from pgemu_kernels.engine.rows import (
    inode_row,
    is_live_vm,
    lock_exclusive,
    ordinary_inode,
    stop,
    unlock,
    vm_row,
)
from pgemu_kernels.kvm.memslots import (
    USER_END,
    check_addresses,
    check_binding,
    check_reach,
    create_slot,
    delete_slot,
    overlaps_other,
)
from pgemu_kernels.stage2.userspace import find_place, survey_slot
from pgemu_kernels.words.enum_words import DEFECT_UNBIND_DYING
from pgemu_kernels.words.operations import EBADF, EBUSY, EEXIST, EINVAL, ENOENT, ENOSPC, EOPNOTSUPP
from pgemu_kernels.words.registers import R_DEFECTS
from pgemu_kernels.words.rows import (
    I_OPEN,
    INODE_GUEST_MEMFD,
    M_BASE_GFN,
    M_FLAGS,
    M_INODE,
    M_KIND,
    O_ADDRESS,
    O_LENGTH,
    O_OBJECT,
    O_OFFSET,
    O_VM,
    SLOT_DYING,
    SLOT_GUEST_MEMFD,
    V_BIND_HVA,
    V_BIND_INODE,
    V_BIND_OFFSET,
)


@kernel
def stage_guest_memfd(m, op):
    """Name the guest_memfd and the offset that the VM's next slot takes its private pages from: 0 or -EBADF.

    One system call in Linux; its arguments are more than an operation has columns.
    """
    state = m.state
    row = vm_row(state[op + O_VM])
    inode = state[op + O_OBJECT]
    if state[inode_row(inode) + I_OPEN] == U0:
        return np.int64(-EBADF)
    state[row + V_BIND_INODE] = inode + U1
    state[row + V_BIND_OFFSET] = state[op + O_OFFSET]
    return np.int64(0)


staged = full_only(stage_guest_memfd, np.int64(-EOPNOTSUPP))  # the fast loops know no other files (routing.py)


@kernel
def check_bind(state, op, named):
    """0, or what the slot of an inode of the designs is refused with, in kvm_set_memory_region()'s order.

    named: V_BIND_HVA.
    """
    status = check_addresses(state, op)
    if status != 0 or state[op + O_LENGTH] == U0 or not has_slot_left(state, vm_row(state[op + O_VM])):
        return np.int64(-EINVAL)  # no length: there is no such slot to delete; no number left: none is valid
    hva = named - U1
    if named != U0 and (hva & U4095 != U0 or hva > USER_END or state[op + O_LENGTH] > USER_END - hva):
        return np.int64(-EINVAL)
    gfn = state[op + O_ADDRESS] >> U12
    if overlaps_other(state, state[op + O_VM], NONE, gfn, gfn + (state[op + O_LENGTH] >> U12)):
        return np.int64(-EEXIST)
    status = check_binding(state, op, INODE_GUEST_MEMFD, state[op + O_OBJECT], state[op + O_OFFSET])
    return status if status != 0 else check_reach(state, op)


@outlined
def bind(m, op):
    """BIND: show an inode's range to guest frames of a VM, a memory slot with guest_memfd.

    0; -EINVAL for bad alignment, no length, a wrap, a range past the file's end or past 48 bits of guest address,
    pages that the VM has bound already, or a VM that has SLOT_IDS slots; -EEXIST for guest frames that a slot holds,
    and in linux-next for pages bound already; -EBADF of a closed VM or inode; -ENOSPC past MEMSLOTS of all VMs; -EBUSY
    where Linux would wait for the lock.
    The slot's userspace address is V_BIND_HVA's, else see stage2/userspace.py; what lies there nobody checks.
    Of files of other kinds it only names what the next slot of a process's memory takes its private pages from.
    """
    state = m.state
    if not is_live_vm(state, state[op + O_VM]):
        return stop(state, op, -EBADF)
    inode = state[op + O_OBJECT]
    if ordinary_inode(state, inode):
        return stop(state, op, staged(m, op))
    named = state[vm_row(state[op + O_VM]) + V_BIND_HVA]
    state[vm_row(state[op + O_VM]) + V_BIND_HVA] = U0
    status = check_bind(state, op, named)
    if status != 0:
        return stop(state, op, status)
    if not lock_exclusive(state, op, inode_row(inode)):
        return stop(state, op, -EBUSY)
    unlock(state, op, inode_row(inode))  # held while the binding is stored: nothing runs in between
    slot = create_slot(m, op, SLOT_GUEST_MEMFD, inode, state[op + O_OFFSET])
    if slot == NONE:
        return stop(state, op, -ENOSPC)
    place_slot(state, slot, find_place(state, slot) if named == U0 else named - U1)
    survey_slot(state, slot)
    return stop(state, op, 0)


@kernel
def is_unbound_unlocked(m, slot):
    """Defect.UNBIND_DYING: kvm_gmem_unbind() of a file that nobody refers to any more went without the lock, so that an
    invalidation under way ends without the slot that it began with, and stays in progress for ever."""
    return m.state[R_DEFECTS] & DEFECT_UNBIND_DYING != U0 and m.state[slot + M_FLAGS] & SLOT_DYING != U0


unbinds_dying = full_only(is_unbound_unlocked, False)


@outlined
def unbind(m, op):
    """UNBIND: delete the memory slot that begins at a guest address: 0; -EBADF of a closed VM; -EINVAL for bad
    alignment; -ENOENT; -EBUSY where Linux would wait for the lock."""
    state = m.state
    if not is_live_vm(state, state[op + O_VM]):
        return stop(state, op, -EBADF)
    if state[op + O_ADDRESS] & U4095 != U0:
        return stop(state, op, -EINVAL)
    gfn = state[op + O_ADDRESS] >> U12
    slot = find_memslot(state, state[op + O_VM], gfn)
    if slot == NONE or state[slot + M_BASE_GFN] != gfn:
        return stop(state, op, -ENOENT)
    if state[slot + M_KIND] != SLOT_GUEST_MEMFD:
        delete_slot(m, slot)
        return stop(state, op, 0)
    if unbinds_dying(m, slot):
        delete_slot(m, slot)
        return stop(state, op, 0)
    node = inode_row(state[slot + M_INODE])
    if not lock_exclusive(state, op, node):
        return stop(state, op, -EBUSY)
    delete_slot(m, slot)
    unlock(state, op, node)
    return stop(state, op, 0)
