"""What a conversion is refused with before anything is looked at: virt/kvm/guest_memfd.c:kvm_gmem_set_attributes()."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import U0, U1, U12
from pgemu_kernels.engine.compile import kernel
from pgemu_kernels.engine.handle import parameter
from pgemu_kernels.engine.memslots import first_binding, next_binding
from pgemu_kernels.engine.rows import inode_row, is_live_vm, range_arguments, vm_row
from pgemu_kernels.stage2.release import has_file
from pgemu_kernels.words.enum_words import FLAG_PRIVATE, FLAG_SHARED
from pgemu_kernels.words.operations import EBADF, EINVAL, ENOTTY
from pgemu_kernels.words.registers import R_IN_PLACE
from pgemu_kernels.words.rows import I_PAGES, O_FLAGS, O_LENGTH, O_OBJECT, O_OFFSET, O_VM, RELEASED_PGOFF, V_PROTECTED

in_place = parameter(R_IN_PLACE, U1)


@kernel
def knows_no_private(state, vm, inode):
    """Whether the file that a conversion is asked of is that of a VM without private memory: of VM `vm`, if it has
    slots of the inode. A file that no VM has bound yet may be any's.

    kvm_supported_mem_attributes(f->kvm) in virt/kvm/guest_memfd.c:kvm_gmem_set_attributes()
    """
    if not is_live_vm(state, vm) or state[vm_row(vm) + V_PROTECTED] != U0:
        return False
    slot = first_binding(state, inode, U0, RELEASED_PGOFF)
    while slot != U0:
        if has_file(state, slot, vm, inode):
            return True
        slot = next_binding(state, slot, U0, RELEASED_PGOFF)
    return False


@kernel
def arguments(m, op):
    """0, or the error that a conversion's arguments are."""
    state = m.state
    status = range_arguments(state, op)
    if status != -EBADF and in_place(m) == U0:
        return np.int64(-ENOTTY)
    kind = state[op + O_FLAGS] & (FLAG_PRIVATE | FLAG_SHARED)
    if status == 0 and (kind == U0 or kind == FLAG_PRIVATE | FLAG_SHARED):
        return np.int64(-EINVAL)
    pages = (state[op + O_OFFSET] + state[op + O_LENGTH]) >> U12
    if status == 0 and pages > state[inode_row(state[op + O_OBJECT]) + I_PAGES]:
        return np.int64(-EINVAL)
    if status == 0 and knows_no_private(state, state[op + O_VM], state[op + O_OBJECT]):
        return np.int64(-EINVAL)
    return status
