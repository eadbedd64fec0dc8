"""The invalidate protocol: what drops the stage-2 leaves of an inode's pages, and has faults in flight retried.

virt/kvm/kvm_main.c, virt/kvm/guest_memfd.c. Ranges are page numbers of the inode.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import U0, U1
from pgemu_kernels.engine.charge import NOTIFIER_CALL, SPTE_CLEARED, TLB_FLUSH_VM, charge, charge_one
from pgemu_kernels.engine.compile import kernel
from pgemu_kernels.engine.rows import memslot_row, overlap, vm_row
from pgemu_kernels.stage2.leaves import zap_stage2
from pgemu_kernels.words.registers import (
    R_FLUSHES_HELD,
    R_MEMSLOTS,
    R_NOTIFIER,
    R_VMS,
)
from pgemu_kernels.words.rows import (
    M_VM,
    V_IN_PROGRESS,
    V_LIVE,
    V_RANGE_END,
    V_RANGE_START,
    V_ROOT,
    V_SEQUENCE,
    V_SPACE,
    V_UNFLUSHED,
)

U = np.uint64


@kernel
def invalidate_begin(state, vm, gfn, end):
    """virt/kvm/kvm_main.c:kvm_mmu_invalidate_begin(), kvm_mmu_invalidate_range_add()."""
    row = vm_row(vm)
    if state[row + V_IN_PROGRESS] == U0:
        state[row + V_RANGE_START] = gfn
        state[row + V_RANGE_END] = end
    else:
        state[row + V_RANGE_START] = min(state[row + V_RANGE_START], gfn)
        state[row + V_RANGE_END] = max(state[row + V_RANGE_END], end)
    state[row + V_IN_PROGRESS] += U1


@kernel
def invalidate_end(state, vm):
    """kvm_mmu_invalidate_end(): the sequence moves before the count falls."""
    row = vm_row(vm)
    state[row + V_SEQUENCE] += U1
    state[row + V_IN_PROGRESS] -= U1


@kernel
def begin_range(m, inode, start, end):
    """Begin an invalidation of pages [start, end) in every VM bound to them."""
    state = m.state
    for i in range(state[R_MEMSLOTS]):
        slot = memslot_row(i)
        gfn, last = overlap(state, slot, inode, start, end)
        if gfn < last:
            invalidate_begin(state, state[slot + M_VM], gfn, last)


@kernel
def end_range(m, inode, start, end):
    """End it, with the bindings that `begin_range` saw: the invalidate_lock keeps them."""
    state = m.state
    for i in range(state[R_MEMSLOTS]):
        slot = memslot_row(i)
        gfn, last = overlap(state, slot, inode, start, end)
        if gfn < last:
            invalidate_end(state, state[slot + M_VM])


@kernel
def zap_slot(m, slot, gfn, end):
    """Drop the stage-2 leaves over guest frames [gfn, end) of a memory slot, to be flushed: how many."""
    row = vm_row(m.state[slot + M_VM])
    dropped = zap_stage2(m, m.state[row + V_ROOT], gfn, end)
    if dropped != 0:
        m.state[row + V_UNFLUSHED] += U(dropped)
        charge(m, SPTE_CLEARED, dropped)
    return dropped


@kernel
def zap_range(m, inode, start, end):
    """Drop the stage-2 leaves over pages [start, end) in every VM bound to them, to be flushed: how many."""
    state = m.state
    total = np.int64(0)
    for i in range(state[R_MEMSLOTS]):
        slot = memslot_row(i)
        gfn, last = overlap(state, slot, inode, start, end)
        if gfn < last:
            total += zap_slot(m, slot, gfn, last)
    return total


@kernel
def flush_vm(m, row):
    """kvm_flush_remote_tlbs() of one VM (`row` of V_*), if it lost leaves since its last flush."""
    if m.state[row + V_UNFLUSHED] != U0:
        m.state[row + V_UNFLUSHED] = U0
        charge_one(m, TLB_FLUSH_VM)


@kernel
def flush_vms(m):
    """kvm_flush_remote_tlbs() for every VM that lost leaves since its last flush.

    On x86 a flush is always of the whole VM: there is no range to pass on.
    """
    state = m.state
    if state[R_FLUSHES_HELD] != U0:
        return
    for vm in range(state[R_VMS]):
        flush_vm(m, vm_row(vm))


@kernel
def notify_unmap(m, space, inode, start, end):
    """KVM's MMU notifier: the process unmapped pages [start, end), so its VMs drop them from stage 2.

    virt/kvm/kvm_main.c:kvm_mmu_notifier_invalidate_range_start(). As captured for a guest_memfd mapped
    by its VMM: MADV_DONTNEED drops the stage-2 leaves too.
    """
    state = m.state
    if state[R_NOTIFIER] == U0:
        return
    for vm in range(state[R_VMS]):
        if state[vm_row(vm) + V_SPACE] == space and state[vm_row(vm) + V_LIVE] != U0:
            charge_one(m, NOTIFIER_CALL)
    dropped = np.int64(0)
    for i in range(state[R_MEMSLOTS]):
        slot = memslot_row(i)
        gfn, last = overlap(state, slot, inode, start, end)
        if gfn < last and state[vm_row(state[slot + M_VM]) + V_SPACE] == space:
            # The invalidation begins and ends here: nothing runs in between.
            state[vm_row(state[slot + M_VM]) + V_SEQUENCE] += U1
            dropped += zap_slot(m, slot, gfn, last)
    if dropped != 0:
        flush_vms(m)


@kernel
def retry_fault(state, vm, gfn, sequence):
    """include/linux/kvm_host.h:mmu_invalidate_retry_gfn()."""
    row = vm_row(vm)
    if state[row + V_IN_PROGRESS] != U0 and state[row + V_RANGE_START] <= gfn < state[row + V_RANGE_END]:
        return True
    return state[row + V_SEQUENCE] != sequence
