"""KVM as mainline Linux has it: memory slots over a process's memory, guest faults, attributes, dirty logging.

The one switch over a VM's operations. What they do stands in kvm_memslots, kvm_fault, kvm_attributes and tdp_mmu.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U12
from pgemu_kernels.engine.charge import SYSCALL, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.rows import find_memslot, ordinary_inode, stop, vm_row
from pgemu_kernels.kvm import gmem_slots as memslots
from pgemu_kernels.kvm.attributes import set_attributes
from pgemu_kernels.kvm.fault import guest_access, prefault
from pgemu_kernels.kvm.memslots import (
    close_vm,
    delete_user_slot,
    get_dirty_log,
    next_generation,
    set_memory_region,
    stage_guest_memfd,
)
from pgemu_kernels.words.operations import EBADF, EOPNOTSUPP, Operation
from pgemu_kernels.words.registers import R_VMS
from pgemu_kernels.words.rows import M_BASE_GFN, M_KIND, O_ADDRESS, O_OBJECT, O_OP, O_STATUS, O_VM, SLOT_USER, V_LIVE

U = np.uint64
_GUEST_FAULT = U(Operation.GUEST_FAULT)
_BIND = U(Operation.BIND)
_UNBIND = U(Operation.UNBIND)
_MEMSLOT = U(Operation.MEMSLOT)
_DIRTY_LOG = U(Operation.DIRTY_LOG)
_ATTRIBUTES = U(Operation.ATTRIBUTES)
_PREFAULT = U(Operation.PREFAULT)
_VM_EXIT = U(Operation.VM_EXIT)


@kernel
def bind(m, op):
    """BIND: of a 4K guest_memfd it names what the next slot takes; of the designs' inodes it makes a slot."""
    if ordinary_inode(m.state, m.state[op + O_OBJECT]):
        return stage_guest_memfd(m, op)
    memslots.bind(m, op)
    return slots_changed(m, op)


@kernel
def unbind(m, op):
    """UNBIND: delete the slot that begins at a guest address, of whichever kind."""
    state = m.state
    gfn = state[op + O_ADDRESS] >> U12
    slot = find_memslot(state, state[op + O_VM], gfn)
    if slot != NONE and state[slot + M_KIND] == SLOT_USER and state[slot + M_BASE_GFN] == gfn:
        delete_user_slot(m, slot)
        return np.int64(0)
    memslots.unbind(m, op)
    return slots_changed(m, op)


@kernel
def slots_changed(m, op):
    """A slot of the designs came or went: the result, and another generation of the slots."""
    status = np.int64(m.state[op + O_STATUS])
    if status == 0:
        next_generation(m, vm_row(m.state[op + O_VM]))
    return status


@outlined
def operate(m, op):
    """Run one operation of a VM; -EBADF for one that is closed."""
    state = m.state
    kind = state[op + O_OP]
    vm = state[op + O_VM]
    if kind != _GUEST_FAULT:
        charge_one(m, SYSCALL)
    if vm >= state[R_VMS] or state[vm_row(vm) + V_LIVE] == U0:
        return stop(state, op, np.int64(-EBADF))
    status = np.int64(-EOPNOTSUPP)
    if kind == _GUEST_FAULT:
        status = guest_access(m, op)
    elif kind == _MEMSLOT:
        status = set_memory_region(m, op)
    elif kind == _ATTRIBUTES:
        status = set_attributes(m, op)
    elif kind == _PREFAULT:
        status = prefault(m, op)
    elif kind == _DIRTY_LOG:
        status = get_dirty_log(m, op)
    elif kind == _BIND:
        status = bind(m, op)
    elif kind == _UNBIND:
        status = unbind(m, op)
    elif kind == _VM_EXIT:
        status = close_vm(m, op)
    return stop(state, op, status)
