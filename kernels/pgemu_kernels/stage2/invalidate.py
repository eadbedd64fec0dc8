"""The invalidate protocol: what drops the stage-2 leaves of an inode's pages, and has faults in flight retried.

virt/kvm/kvm_main.c, virt/kvm/guest_memfd.c. Ranges are page numbers of the inode.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import U0, U1, U2, U4, U512, population, trailing_zeros
from pgemu_kernels.engine.charge import charge, charge_each, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.handle import full_only
from pgemu_kernels.engine.memslots import first_binding, next_binding
from pgemu_kernels.engine.rows import inode_row, is_mirrored, overlap, vm_row
from pgemu_kernels.stage2.leaves import split_cross_boundary_leafs, zap_roots
from pgemu_kernels.stage2.regions import forget_pages, forget_zapped, vms_with_leaves
from pgemu_kernels.words.enum_words import (
    EVENT_NOTIFIER_CALL,
    EVENT_SPTE_CLEARED,
    EVENT_SPTE_PAGES_BEYOND,
    EVENT_TLB_FLUSH_VM,
    GAUGE_STAGE2_LEAVES_4K,
    VM_MIRRORED,
)
from pgemu_kernels.words.events import STATS_GAUGES
from pgemu_kernels.words.registers import (
    R_FLUSHES_HELD,
    R_GUEST_FAULTS,
    R_NOTIFIER,
    R_STEPPED,
    R_UNFLUSHED_VMS,
    R_VM_PROPERTIES,
)
from pgemu_kernels.words.rows import (
    FILTER_BOTH,
    FILTER_SHARED,
    I_PAGES,
    M_VM,
    S_VMS,
    S_WORDS,
    STATE_SPACES,
    V_IN_PROGRESS,
    V_PRIVATE_ROOT,
    V_RANGE_END,
    V_RANGE_START,
    V_SEQUENCE,
    V_SPACE,
)

U = np.uint64
_S_WORDS = U(S_WORDS)


@kernel
def kvm_mmu_invalidate_begin(state, vm, gfn, end):
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
def kvm_mmu_invalidate_end(state, vm):
    """kvm_mmu_invalidate_end(): the sequence moves before the count falls, if there is a fault that remembers it."""
    row = vm_row(vm)
    if state[R_GUEST_FAULTS] != U0:
        state[row + V_SEQUENCE] += U1
    state[row + V_IN_PROGRESS] -= U1
    if state[row + V_IN_PROGRESS] == U0:
        state[row + V_RANGE_START] = U0
        state[row + V_RANGE_END] = U0


@kernel
def is_watched(state):
    """Whether anybody could notice an invalidation: where nothing goes step by step, it has ended before he comes."""
    return state[R_STEPPED] != U0


@outlined
def begin_slots(m, inode, start, end):
    """Begin an invalidation in every slot bound to pages [start, end)."""
    state = m.state
    slot = first_binding(state, inode, start, end)
    while slot != U0:
        gfn, last = overlap(state, slot, inode, start, end)
        kvm_mmu_invalidate_begin(state, state[slot + M_VM], gfn, last)
        slot = next_binding(state, slot, start, end)


@outlined
def end_slots(m, inode, start, end):
    """End it, with the bindings that `begin_slots` saw: the invalidate_lock keeps them."""
    state = m.state
    slot = first_binding(state, inode, start, end)
    while slot != U0:
        kvm_mmu_invalidate_end(state, state[slot + M_VM])
        slot = next_binding(state, slot, start, end)


@kernel
def begin_range(m, inode, start, end):
    """Begin an invalidation of pages [start, end) in every VM bound to them."""
    if is_watched(m.state):
        begin_slots(m, inode, start, end)


@kernel
def end_range(m, inode, start, end):
    """End what begin_range() began."""
    if is_watched(m.state):
        end_slots(m, inode, start, end)


@kernel
def zap_slot(m, slot, gfn, end, kinds):
    """Drop the stage-2 leaves over guest frames [gfn, end) of a memory slot, to be flushed: how many.

    kinds: FILTER_*, here and below: in a VM with a root of its own for private memory, which roots lose them.
    """
    state = m.state
    vm = state[slot + M_VM]
    dropped = zap_roots(m, vm_row(vm), gfn, end, kinds)
    if dropped != 0:
        state[R_UNFLUSHED_VMS] |= U1 << vm
        charge(m, EVENT_SPTE_CLEARED, dropped)
    return dropped


@kernel
def may_leave_some(m, vms, kinds):
    """Whether VMs, a bit each, may have leaves left where a zap has been."""
    left = False
    while kinds != FILTER_BOTH and vms != U0:
        left |= is_mirrored(m.state, trailing_zeros(vms))
        vms &= vms - U1
    return left


leaves_some = full_only(may_leave_some, False)  # the fast loops know no VM with two roots


@kernel
def zap_vm(m, vm, inode, start, end, kinds):
    """Drop a VM's leaves over pages [start, end) of an inode, to be flushed: how many."""
    state = m.state
    dropped = np.int64(0)
    slot = first_binding(state, inode, start, end)
    while slot != U0:
        if state[slot + M_VM] == vm:
            gfn, last = overlap(state, slot, inode, start, end)
            dropped += zap_slot(m, slot, gfn, last, kinds)
        slot = next_binding(state, slot, start, end)
    if not leaves_some(m, U1 << vm, kinds):
        forget_zapped(m, vm, inode, start, end, dropped)
    return dropped


@kernel
def zap_vms(m, vms, inode, start, end, kinds):
    """The same of several VMs, a bit each."""
    dropped = np.int64(0)
    while vms != U0:
        dropped += zap_vm(m, trailing_zeros(vms), inode, start, end, kinds)
        vms &= vms - U1
    return dropped


@kernel
def forget_few(state, node, start, end):
    """No VM has a leaf over pages [start, end) any more. Of many pages the bits are not looked at."""
    if end - start < U512:
        forget_pages(state, node, start, end)


@kernel
def zap_found(m, vms, inode, start, end, kinds):
    """zap_range() of those VMs that vms_with_leaves() found."""
    dropped = zap_vms(m, vms, inode, start, end, kinds)
    if vms != U0 and not leaves_some(m, vms, kinds):
        forget_few(m.state, inode_row(inode), start, end)
    return dropped


@kernel
def stage2_pages(stats):
    """4K pages that stage 2 maps, of all VMs."""
    gauge = STATS_GAUGES + GAUGE_STAGE2_LEAVES_4K * U2
    return stats[gauge] + 512 * stats[gauge + U2] + 262_144 * stats[gauge + U4]


@outlined
def zap_beyond(m, vms, inode, start, end, kinds):
    """zap_found() where the pages that were asked for are gone already: what it drops is beyond them, and counted."""
    mapped = stage2_pages(m.stats)
    dropped = zap_found(m, vms, inode, start, end, kinds)
    charge(m, EVENT_SPTE_PAGES_BEYOND, mapped - stage2_pages(m.stats))
    return dropped


@kernel
def zap_range(m, inode, start, end, kinds):
    """Drop the stage-2 leaves over pages [start, end) in every VM bound to them, to be flushed: how many."""
    return zap_found(m, vms_with_leaves(m.state, inode_row(inode), start, end), inode, start, end, kinds)


@outlined
def split_of_vms(m, vms, inode, start, end):
    """Split the private leaves that cross the border of pages [start, end) in those of `vms` that have a mirror: 0 or
    -ENOMEM.

    virt/kvm/guest_memfd.c:kvm_gmem_split_private() of the huge page branch: firmware cannot drop a part of a leaf, and
    dropping all of it would lose what the guest has there.
    """
    state = m.state
    while vms != U0:
        vm = trailing_zeros(vms)
        slot = first_binding(state, inode, start, end) if is_mirrored(state, vm) else U0
        while slot != U0:
            if state[slot + M_VM] == vm:
                gfn, last = overlap(state, slot, inode, start, end)
                status = split_cross_boundary_leafs(m, state[vm_row(vm) + V_PRIVATE_ROOT], gfn, last)
                if status != 0:
                    return status
            slot = next_binding(state, slot, start, end)
        vms &= vms - U1
    return np.int64(0)


@kernel
def split_if_mirrored(m, vms, inode, start, end):
    """The same, where any VM has a mirror."""
    if m.state[R_VM_PROPERTIES] & VM_MIRRORED == U0:
        return np.int64(0)
    return split_of_vms(m, vms, inode, start, end)


kvm_gmem_split_private = full_only(split_if_mirrored, np.int64(0))  # the fast loops know no mirror


@kernel
def flush_vms(m):
    """kvm_flush_remote_tlbs() for every VM that lost leaves since its last flush.

    On x86 a flush is always of the whole VM: there is no range to pass on.
    """
    state = m.state
    if state[R_FLUSHES_HELD] != U0:
        return
    charge_each(m, EVENT_TLB_FLUSH_VM, np.int64(population(state[R_UNFLUSHED_VMS])))
    state[R_UNFLUSHED_VMS] = U0


@kernel
def flush_vm(m, vm):
    """The same of one VM."""
    if m.state[R_UNFLUSHED_VMS] >> vm & U1 != U0:
        m.state[R_UNFLUSHED_VMS] &= ~(U1 << vm)
        charge_one(m, EVENT_TLB_FLUSH_VM)


@outlined
def retry_faults(m, space, inode, start, end):
    """An invalidation of pages [start, end) in a process's VMs begins and ends: faults in flight come again."""
    state = m.state
    slot = first_binding(state, inode, start, end)
    while slot != U0:
        row = vm_row(state[slot + M_VM])
        if state[row + V_SPACE] == space:
            state[row + V_SEQUENCE] += U1
        slot = next_binding(state, slot, start, end)


@kernel
def notify_unmap(m, space, inode, start, end):
    """KVM's MMU notifier: the process unmapped pages [start, end), so its VMs drop them from stage 2.

    virt/kvm/kvm_main.c:kvm_mmu_notifier_invalidate_range_start(). As captured for a guest_memfd mapped
    by its VMM: MADV_DONTNEED drops the stage-2 leaves too; those of a mirror stay, for private memory is in no
    process's mapping (kvm_handle_hva_range(): KVM_FILTER_SHARED). The invalidation begins and ends here: nothing runs
    in between. The pages may reach past the end of the file.
    """
    state = m.state
    vms = state[STATE_SPACES + space * _S_WORDS + S_VMS]
    if state[R_NOTIFIER] == U0 or vms == U0:
        return
    charge_each(m, EVENT_NOTIFIER_CALL, np.int64(population(vms)))
    if state[R_GUEST_FAULTS] != U0:
        retry_faults(m, space, inode, start, end)
    node = inode_row(inode)
    end = min(end, state[node + I_PAGES])
    if start >= end:
        return
    found = vms_with_leaves(state, node, start, end)
    vms &= found
    if zap_vms(m, vms, inode, start, end, FILTER_SHARED) != 0:
        flush_vms(m)
    if vms == found and found != U0 and not leaves_some(m, vms, FILTER_SHARED):
        forget_few(state, node, start, end)


@kernel
def retry_fault(state, vm, gfn, sequence):
    """include/linux/kvm_host.h:mmu_invalidate_retry_gfn()."""
    row = vm_row(vm)
    if state[row + V_IN_PROGRESS] != U0 and state[row + V_RANGE_START] <= gfn < state[row + V_RANGE_END]:
        return True
    return state[row + V_SEQUENCE] != sequence
