"""The file of a guest_memfd inode that a VM has: closed, held by mappings, released. virt/kvm/guest_memfd.c

close() of the descriptor is not the end: a mapping holds its file, so .release runs after the last VMA of it is gone
(captured: faults and slots go on working until munmap).
"""

from __future__ import annotations

from pgemu_kernels.engine.bits import NONE, U0, U1, trailing_zeros
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.memslots import (
    first_binding,
    first_slot,
    next_binding,
    next_slot,
    place_slot,
    rebind_slot,
)
from pgemu_kernels.engine.rows import inode_row, vm_row
from pgemu_kernels.stage2.invalidate import (
    flush_vms,
    kvm_mmu_invalidate_begin,
    kvm_mmu_invalidate_end,
    zap_slot,
)
from pgemu_kernels.words.registers import R_VMS
from pgemu_kernels.words.rows import (
    A_END,
    A_NEXT,
    A_SPACE,
    A_START,
    FILTER_BOTH,
    I_LOCK,
    I_VMAS,
    M_BASE_GFN,
    M_FLAGS,
    M_INODE,
    M_KIND,
    M_LIVE,
    M_PAGES,
    M_VM,
    RELEASED_PGOFF,
    SLOT_CLOSED,
    SLOT_GUEST_MEMFD,
    SLOT_RELEASED,
    V_CLOSED_FILES,
    V_SPACE,
)


@kernel
def has_file(state, slot, vm, inode):
    """Whether a slot is one of a VM's over an inode whose file it has not released."""
    ours = state[slot + M_LIVE] != U0 and state[slot + M_VM] == vm and state[slot + M_INODE] == inode
    return ours and state[slot + M_FLAGS] & SLOT_RELEASED == U0


@kernel
def is_closed(state, slot):
    """Whether a slot's file was closed and is held by mappings alone."""
    flags = state[slot + M_FLAGS]
    kind = state[slot + M_LIVE] != U0 and state[slot + M_KIND] == SLOT_GUEST_MEMFD
    return kind and flags & SLOT_CLOSED != U0 and flags & SLOT_RELEASED == U0


@kernel
def release_slot(m, slot):
    """The slot's guest_memfd file goes: no leaf is left, and the slot stands for no page any more."""
    state = m.state
    vm = state[slot + M_VM]
    gfn = state[slot + M_BASE_GFN]
    last = gfn + state[slot + M_PAGES]
    kvm_mmu_invalidate_begin(state, vm, gfn, last)
    zap_slot(m, slot, gfn, last, FILTER_BOTH)
    flush_vms(m)
    kvm_mmu_invalidate_end(state, vm)
    state[slot + M_FLAGS] |= SLOT_RELEASED
    rebind_slot(state, slot, state[slot + M_INODE], RELEASED_PGOFF)
    place_slot(state, slot, NONE)


@outlined
def release_file(m, vm, inode):
    """kvm_gmem_release() of a VM's file of an inode."""
    slot = first_binding(m.state, inode, U0, RELEASED_PGOFF)
    while slot != U0:
        following = next_binding(m.state, slot, U0, RELEASED_PGOFF)
        if has_file(m.state, slot, vm, inode):
            release_slot(m, slot)
        slot = following


@outlined
def is_mapped_by(state, space, inode, start, end):
    """Whether a process has a VMA of an inode that does not lie whole in [start, end)."""
    row = state[inode_row(inode) + I_VMAS]
    while row != U0:
        inside = start <= state[row + A_START] and state[row + A_END] <= end
        if state[row + A_SPACE] == space and not inside:
            return True
        row = state[row + A_NEXT]
    return False


@kernel
def closed_by(state, space):
    """The VMs of a process, a bit each, that closed a file while mappings held it."""
    vms = U0
    for vm in range(state[R_VMS]):
        if state[vm_row(vm) + V_CLOSED_FILES] != U0 and state[vm_row(vm) + V_SPACE] == space:
            vms |= U1 << vm
    return vms


@outlined
def release_unmapped(m, space, inode):
    """A process's VMA of an inode is gone: files of its VMs that only it held are released."""
    state = m.state
    vms = closed_by(state, space)
    if vms == U0 or is_mapped_by(state, space, inode, U0, U0):
        return
    slot = first_binding(state, inode, U0, RELEASED_PGOFF)
    while slot != U0:
        following = next_binding(state, slot, U0, RELEASED_PGOFF)
        if vms >> state[slot + M_VM] & U1 != U0 and is_closed(state, slot):
            release_slot(m, slot)
        slot = following


@outlined
def waits_for_release(state, space, start, end):
    """Whether unmapping [start, end) of a process would release a file whose invalidate_lock somebody holds."""
    vms = closed_by(state, space)
    while vms != U0:
        slot = first_slot(state, trailing_zeros(vms), U0, NONE)
        while slot != U0:
            inode = state[slot + M_INODE]
            locked = is_closed(state, slot) and state[inode_row(inode) + I_LOCK] != U0
            if locked and not is_mapped_by(state, space, inode, start, end):
                return True
            slot = next_slot(state, slot, U0, NONE)
        vms &= vms - U1
    return False
