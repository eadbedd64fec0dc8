"""The file of a guest_memfd inode that a VM has: closed, held by mappings, released. virt/kvm/guest_memfd.c

close() of the descriptor is not the end: a mapping holds its file, so .release runs after the last VMA of it is gone
(captured: faults and slots go on working until munmap).
"""

from __future__ import annotations

from pgemu_kernels.engine.bits import NONE, U0
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.rows import inode_row, memslot_row, vm_row
from pgemu_kernels.stage2.invalidate import (
    flush_vms,
    kvm_mmu_invalidate_begin,
    kvm_mmu_invalidate_end,
    zap_slot,
)
from pgemu_kernels.words.registers import R_MEMSLOTS
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
    M_HVA,
    M_INODE,
    M_KIND,
    M_LIVE,
    M_PAGES,
    M_PGOFF,
    M_VM,
    RELEASED_PGOFF,
    SLOT_CLOSED,
    SLOT_GUEST_MEMFD,
    SLOT_RELEASED,
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
    state[slot + M_PGOFF] = RELEASED_PGOFF
    state[slot + M_HVA] = NONE


@outlined
def release_file(m, vm, inode):
    """kvm_gmem_release() of a VM's file of an inode."""
    for i in range(m.state[R_MEMSLOTS]):
        if has_file(m.state, memslot_row(i), vm, inode):
            release_slot(m, memslot_row(i))


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


@outlined
def release_unmapped(m, space, inode):
    """A process's VMA of an inode is gone: files of its VMs that only it held are released."""
    state = m.state
    if is_mapped_by(state, space, inode, U0, U0):
        return
    for i in range(state[R_MEMSLOTS]):
        slot = memslot_row(i)
        if (
            is_closed(state, slot)
            and state[slot + M_INODE] == inode
            and state[vm_row(state[slot + M_VM]) + V_SPACE] == space
        ):
            release_slot(m, slot)


@outlined
def waits_for_release(state, space, start, end):
    """Whether unmapping [start, end) of a process would release a file whose invalidate_lock somebody holds."""
    for i in range(state[R_MEMSLOTS]):
        slot = memslot_row(i)
        if is_closed(state, slot) and state[vm_row(state[slot + M_VM]) + V_SPACE] == space:
            inode = state[slot + M_INODE]
            if state[inode_row(inode) + I_LOCK] != U0 and not is_mapped_by(state, space, inode, start, end):
                return True
    return False
