"""KVM as mainline Linux has it: memory slots over a process's memory, guest faults, attributes, dirty logging.

The one switch over a VM's operations. What they do stands in memslots, fault, attributes and dirty_log.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.charge import charge_one
from pgemu_kernels.engine.choice import by_number
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.rows import is_live_vm, stop
from pgemu_kernels.kvm.attributes import set_attributes
from pgemu_kernels.kvm.binding import bind, unbind
from pgemu_kernels.kvm.dirty_log import get_dirty_log
from pgemu_kernels.kvm.fault import guest_access
from pgemu_kernels.kvm.memslots import close_vm, set_memory_region
from pgemu_kernels.kvm.prefault import pre_fault_memory
from pgemu_kernels.words.enum_words import (
    EVENT_SYSCALL,
    OP_ATTRIBUTES,
    OP_BIND,
    OP_DIRTY_LOG,
    OP_GUEST_FAULT,
    OP_MEMSLOT,
    OP_PREFAULT,
    OP_UNBIND,
    OP_VM_EXIT,
)
from pgemu_kernels.words.operations import EBADF, EOPNOTSUPP, STOP
from pgemu_kernels.words.rows import O_OP, O_VM


@kernel
def _has_none(m, op, kind):
    return np.int64(-EOPNOTSUPP)


# The operations that only such VMs have: their status.
numbered = by_number(
    (
        (OP_MEMSLOT, set_memory_region),
        (OP_ATTRIBUTES, set_attributes),
        (OP_PREFAULT, pre_fault_memory),
        (OP_DIRTY_LOG, get_dirty_log),
        (OP_VM_EXIT, close_vm),
    ),
    _has_none,
)


@outlined
def operate_vm(m, op):
    """Run one operation of a VM; -EBADF for one that is closed."""
    state = m.state
    kind = state[op + O_OP]
    if kind != OP_GUEST_FAULT:
        charge_one(m, EVENT_SYSCALL)
    if not is_live_vm(state, state[op + O_VM]):
        return stop(state, op, np.int64(-EBADF))
    if kind == OP_GUEST_FAULT:
        guest_access(m, op)
    elif kind == OP_BIND:
        bind(m, op)
    elif kind == OP_UNBIND:
        unbind(m, op)
    else:
        stop(state, op, numbered(m, op, kind))
    return STOP
