"""What drops stage-2 leaves from outside: KVM's MMU notifier, and guest_memfd giving pages up. Tables stay."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U12, U4095
from pgemu_kernels.engine.charge import charge_one
from pgemu_kernels.engine.compile import outlined
from pgemu_kernels.engine.rows import inode_row, memslot_row, overlap, vm_row
from pgemu_kernels.stage2.invalidate import flush_vms, zap_slot
from pgemu_kernels.stage2.tdp_mmu import mark_range
from pgemu_kernels.words.enum_words import EVENT_NOTIFIER_CALL
from pgemu_kernels.words.registers import R_MEMSLOTS, R_NOTIFIER, R_VMS
from pgemu_kernels.words.rows import (
    FILTER_PRIVATE,
    FILTER_SHARED,
    I_FLAGS,
    INODE_INIT_SHARED,
    M_BASE_GFN,
    M_HVA,
    M_INODE,
    M_KIND,
    M_PAGES,
    M_VM,
    SLOT_USER,
    V_LIVE,
    V_ROOT,
    V_SEQUENCE,
    V_SPACE,
)

U = np.uint64


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
    for vm in range(state[R_VMS]):
        if state[vm_row(vm) + V_SPACE] == space and state[vm_row(vm) + V_LIVE] != U0:
            charge_one(m, EVENT_NOTIFIER_CALL)
    dropped = np.int64(0)
    for i in range(state[R_MEMSLOTS]):
        slot = memslot_row(i)
        if state[slot + M_KIND] != SLOT_USER or state[vm_row(state[slot + M_VM]) + V_SPACE] != space:
            continue
        base = state[slot + M_HVA]
        first = max(start, base)
        last = min(end, base + (state[slot + M_PAGES] << U12))
        if first < last:
            gfn = state[slot + M_BASE_GFN] + ((first - base) >> U12)
            stop = state[slot + M_BASE_GFN] + ((last - base + U4095) >> U12)
            state[vm_row(state[slot + M_VM]) + V_SEQUENCE] += U1
            mark_range(m, state[vm_row(state[slot + M_VM]) + V_ROOT], gfn, stop)
            dropped += zap_slot(m, slot, gfn, stop, FILTER_SHARED)
    if dropped != 0:
        flush_vms(m)


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
    for i in range(state[R_MEMSLOTS]):
        slot = memslot_row(i)
        gfn, last = overlap(state, slot, inode, start, end)
        if gfn < last:
            state[vm_row(state[slot + M_VM]) + V_SEQUENCE] += U1
            dropped += zap_slot(m, slot, gfn, last, kinds)
    if dropped != 0:
        flush_vms(m)


@outlined
def unbind_inode(m, inode):
    """The last reference to a guest_memfd's file goes: its slots lose their pages and their binding, and stay.

    virt/kvm/guest_memfd.c:kvm_gmem_release(). A private access to such a slot is a memory fault exit.
    """
    state = m.state
    notify_inode(m, inode, U0, U1 << U(52))
    for i in range(state[R_MEMSLOTS]):
        slot = memslot_row(i)
        if state[slot + M_KIND] == SLOT_USER and state[slot + M_INODE] == inode:
            state[slot + M_INODE] = NONE
