"""What drops stage-2 leaves from outside: KVM's MMU notifier, and guest_memfd giving pages up. Tables stay."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U12, U4095, population, trailing_zeros
from pgemu_kernels.engine.charge import charge_each, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.memslots import (
    first_binding,
    first_shown,
    first_slot,
    next_binding,
    next_shown,
    next_slot,
    rebind_slot,
)
from pgemu_kernels.engine.rows import inode_row, overlap, vm_row
from pgemu_kernels.stage2.invalidate import flush_vms, leaves_some, zap_slot
from pgemu_kernels.stage2.pfn_caches import invalidate_caches
from pgemu_kernels.stage2.regions import forget_zapped, vms_with_leaves
from pgemu_kernels.stage2.tdp_mmu import mark_range
from pgemu_kernels.words.enum_words import EVENT_NOTIFIER_CALL
from pgemu_kernels.words.registers import R_GUEST_FAULTS, R_MAPPINGS, R_NOTIFIER
from pgemu_kernels.words.rows import (
    FILTER_BOTH,
    FILTER_PRIVATE,
    FILTER_SHARED,
    I_FLAGS,
    INODE_INIT_SHARED,
    M_BASE_GFN,
    M_HVA,
    M_INODE,
    M_KIND,
    M_PAGES,
    M_PGOFF,
    M_VM,
    S_VMS,
    S_WORDS,
    SLOT_USER,
    STATE_SPACES,
    V_ROOT,
    V_SEQUENCE,
)

U = np.uint64
_S_WORDS = U(S_WORDS)


@outlined
def leave_pages(m, slot, gfn, end):
    """Drop what a slot of an inode of the designs has over guest frames [gfn, end), to be flushed: how many leaves.
    Faults in flight come again."""
    state = m.state
    vm = state[slot + M_VM]
    if state[R_GUEST_FAULTS] != U0:
        state[vm_row(vm) + V_SEQUENCE] += U1
    shift = state[slot + M_PGOFF] - state[slot + M_BASE_GFN]
    inode = state[slot + M_INODE]
    if vms_with_leaves(state, inode_row(inode), gfn + shift, end + shift) >> vm & U1 == U0:
        return np.int64(0)
    dropped = zap_slot(m, slot, gfn, end, FILTER_SHARED)
    if not leaves_some(m, U1 << vm, FILTER_SHARED):
        forget_zapped(m, vm, inode, gfn + shift, end + shift, dropped)
    return dropped


@kernel
def leave_addresses(m, slot, start, end):
    """Drop what a slot has over userspace addresses [start, end), to be flushed: how many leaves."""
    state = m.state
    base = state[slot + M_HVA]
    first = max(start, base)
    last = min(end, base + (state[slot + M_PAGES] << U12))
    gfn = state[slot + M_BASE_GFN] + ((first - base) >> U12)
    stop = state[slot + M_BASE_GFN] + ((last - base + U4095) >> U12)
    if state[slot + M_KIND] != SLOT_USER:
        return leave_pages(m, slot, gfn, stop)
    row = vm_row(state[slot + M_VM])
    state[row + V_SEQUENCE] += U1
    mark_range(m, state[row + V_ROOT], gfn, stop)
    return zap_slot(m, slot, gfn, stop, FILTER_SHARED)


@outlined
def notify_range(m, space, start, end):
    """A process is about to change its mapping of virtual addresses [start, end): its VMs drop what lies over them.

    virt/kvm/kvm_main.c:kvm_mmu_notifier_invalidate_range_start(). Every slot whose userspace range overlaps is
    zapped, private pages of it included (captured: MADV_DONTNEED of the shared view drops them) but in a mirror. One
    flush for each VM that lost a leaf. The invalidation begins and ends here: nothing runs in between.
    """
    state = m.state
    if state[R_NOTIFIER] == U0:
        return
    invalidate_caches(m, space, start, end)
    vms = state[STATE_SPACES + space * _S_WORDS + S_VMS]
    charge_each(m, EVENT_NOTIFIER_CALL, np.int64(population(vms)))
    dropped = np.int64(0)
    while vms != U0:
        vm = trailing_zeros(vms)
        slot = first_shown(state, vm, start, end)
        while slot != U0:
            dropped += leave_addresses(m, slot, start, end)
            slot = next_shown(state, slot, start, end)
        vms &= vms - U1
    if dropped != 0:
        flush_vms(m)


@outlined
def notify_release(m, space):
    """exit_mmap() begins: the process's VMs lose all that they map, and hear of it no more.

    mm/mmu_notifier.c:__mmu_notifier_release(), virt/kvm/kvm_main.c:kvm_mmu_notifier_release()
    """
    state = m.state
    if state[R_NOTIFIER] == U0:
        return
    vms = state[STATE_SPACES + space * _S_WORDS + S_VMS]
    while vms != U0:
        charge_one(m, EVENT_NOTIFIER_CALL)
        slot = first_slot(state, trailing_zeros(vms), U0, NONE)
        while slot != U0:
            gfn = state[slot + M_BASE_GFN]
            zap_slot(m, slot, gfn, gfn + state[slot + M_PAGES], FILTER_BOTH)
            slot = next_slot(state, slot, U0, NONE)
        vms &= vms - U1
    flush_vms(m)
    state[STATE_SPACES + space * _S_WORDS + S_VMS] = U0
    state[R_MAPPINGS] += U1


@outlined
def notify_inode(m, inode, start, end):
    """A guest_memfd gives up pages [start, end): every slot bound to them drops the guest frames, shared ones too.

    virt/kvm/guest_memfd.c:kvm_gmem_invalidate_begin(): the range goes by the slot's offset, and x86 without a root
    of its own for private memory cannot tell the two kinds apart (captured). With one, the file's first kind of memory
    is what it drops: kvm_gmem_get_invalidate_filter().
    """
    state = m.state
    kinds = FILTER_SHARED if state[inode_row(inode) + I_FLAGS] & INODE_INIT_SHARED != U0 else FILTER_PRIVATE
    dropped = np.int64(0)
    slot = first_binding(state, inode, start, end)
    while slot != U0:
        gfn, last = overlap(state, slot, inode, start, end)
        state[vm_row(state[slot + M_VM]) + V_SEQUENCE] += U1
        dropped += zap_slot(m, slot, gfn, last, kinds)
        slot = next_binding(state, slot, start, end)
    if dropped != 0:
        flush_vms(m)


@outlined
def unbind_inode(m, inode):
    """The last reference to a guest_memfd's file goes: its slots lose their pages and their binding, and stay.

    virt/kvm/guest_memfd.c:kvm_gmem_release(). A private access to such a slot is a memory fault exit.
    """
    state = m.state
    notify_inode(m, inode, U0, U1 << U(52))
    slot = first_binding(state, inode, U0, NONE)
    while slot != U0:
        rebind_slot(state, slot, NONE, U0)
        slot = first_binding(state, inode, U0, NONE)
