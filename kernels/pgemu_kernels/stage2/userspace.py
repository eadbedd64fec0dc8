"""Userspace addresses of memory slots over guest_memfd: what KVM's MMU notifier goes by, and nothing else does.

virt/kvm/kvm_main.c:kvm_handle_hva_range() matches a slot's userspace_addr, whatever lies there: unmapping another
mapping of the same file tells stage 2 nothing. A slot that was given no address has the one at which the VM's process
shows its pages, when it is made or as soon as they are mapped there: what a VMM passes.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U12, population, trailing_zeros
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.memslots import first_binding, first_shown, next_binding, next_shown, place_slot
from pgemu_kernels.engine.rows import inode_row, vm_row, vma_overlap, vma_row
from pgemu_kernels.words.registers import R_INODES, R_MAPPINGS, R_SPACES, R_VMAS
from pgemu_kernels.words.rows import (
    A_END,
    A_INODE,
    A_LIVE,
    A_NEXT,
    A_PGOFF,
    A_SPACE,
    A_START,
    I_ALL_END,
    I_ALL_FROM,
    I_CALLS,
    I_ELSEWHERE,
    I_SURVEYED,
    I_TOLD,
    I_VMAS,
    M_HVA,
    M_INODE,
    M_KIND,
    M_PAGES,
    M_PGOFF,
    M_VM,
    S_VMS,
    S_WORDS,
    SLOT_GUEST_MEMFD,
    STATE_SPACES,
    TASK_SIZE,
    V_SPACE,
)

_S_WORDS = np.uint64(S_WORDS)


@kernel
def first_page_at(state, row, slot):
    """The address that a VMA has, or would have, for the first page of a slot of its inode."""
    return state[row + A_START] + ((state[slot + M_PGOFF] - state[row + A_PGOFF]) << U12)


@kernel
def place_in(state, row, slot):
    """The userspace address of a slot whose pages a VMA shows: NONE where it shows none, or that is no address."""
    pgoff = state[slot + M_PGOFF]
    start, end = vma_overlap(state, row, state[slot + M_INODE], pgoff, pgoff + state[slot + M_PAGES])
    address = first_page_at(state, row, slot)
    return address if start < end and address < TASK_SIZE else NONE


@kernel
def pages_shown(state, row):
    """Pages of its file that a VMA shows: (first, the one behind the last)."""
    first = state[row + A_PGOFF]
    return first, first + ((state[row + A_END] - state[row + A_START]) >> U12)


@kernel
def process_of(state, vm):
    """The process whose mm a VM watches, while both are alive; else NONE."""
    space = state[vm_row(vm) + V_SPACE]
    alive = space < state[R_SPACES] and state[STATE_SPACES + space * _S_WORDS + S_VMS] >> vm & U1 != U0
    return space if alive else NONE


@outlined
def find_place(state, slot):
    """The lowest address at which the VM's process shows the pages of a new slot, or NONE."""
    space = process_of(state, state[slot + M_VM])
    found = NONE
    row = state[inode_row(state[slot + M_INODE]) + I_VMAS]
    while row != U0:
        if state[row + A_SPACE] == space:
            found = min(found, place_in(state, row, slot))
        row = state[row + A_NEXT]
    return found


@outlined
def give_places(state, row):
    """A process maps pages of an inode: slots of its VMs over them that have no userspace address yet get theirs."""
    start, end = pages_shown(state, row)
    slot = first_binding(state, state[row + A_INODE], start, end)
    while slot != U0:
        ours = process_of(state, state[slot + M_VM]) == state[row + A_SPACE]
        if ours and state[slot + M_KIND] == SLOT_GUEST_MEMFD and state[slot + M_HVA] == NONE:
            place_slot(state, slot, place_in(state, row, slot))
        slot = next_binding(state, slot, start, end)


# --------------------------------------------------------------------------- whom unmapping concerns


@kernel
def shows_other_pages(state, row, slot):
    """Whether a slot of a VM of a VMA's process shows other pages at the VMA's addresses than the VMA does, or pages of
    the VMA at other addresses."""
    base = state[slot + M_HVA]
    pages = state[slot + M_PAGES]
    beside = max(base, state[row + A_START]) < min(base + (pages << U12), state[row + A_END])
    same = state[slot + M_INODE] == state[row + A_INODE]
    if same:
        start, end = vma_overlap(
            state, row, state[slot + M_INODE], state[slot + M_PGOFF], state[slot + M_PGOFF] + pages
        )
        beside |= start < end
        same = base == first_page_at(state, row, slot)
    return beside and not same


@kernel
def shows_elsewhere(state, row, vms):
    """The same of any slot of some VMs, a bit each: of those at its addresses, and of those of its pages."""
    start, end = pages_shown(state, row)
    slot = first_binding(state, state[row + A_INODE], start, end)
    while slot != U0:
        if vms >> state[slot + M_VM] & U1 != U0 and shows_other_pages(state, row, slot):
            return True
        slot = next_binding(state, slot, start, end)
    while vms != U0:
        vm = trailing_zeros(vms)
        slot = first_shown(state, vm, state[row + A_START], state[row + A_END])
        while slot != U0:
            if shows_other_pages(state, row, slot):
                return True
            slot = next_shown(state, slot, state[row + A_START], state[row + A_END])
        vms &= vms - U1
    return False


@outlined
def survey_slot(state, slot):
    """A slot came, with its userspace address: surveys made before hear of it."""
    space = process_of(state, state[slot + M_VM])
    for i in range(state[R_VMAS] if space != NONE else U0):
        row = vma_row(i)
        of_file = state[row + A_LIVE] != U0 and state[row + A_INODE] < state[R_INODES]
        if of_file and state[row + A_SPACE] == space and shows_other_pages(state, row, slot):
            state[inode_row(state[row + A_INODE]) + I_ELSEWHERE] = U1


@outlined
def survey(state, inode):
    """Find out anew whom it concerns that pages leave every process: VMAs or VMs are not those of before."""
    node = inode_row(inode)
    first = U0
    last = NONE
    told = U0
    calls = U0
    elsewhere = False
    row = state[node + I_VMAS]
    while row != U0:
        start, end = pages_shown(state, row)
        first = max(first, start)
        last = min(last, end)
        vms = state[STATE_SPACES + state[row + A_SPACE] * _S_WORDS + S_VMS]
        elsewhere = elsewhere or shows_elsewhere(state, row, vms)
        told |= vms
        calls += population(vms)
        row = state[row + A_NEXT]
    state[node + I_ALL_FROM] = first
    state[node + I_ALL_END] = last
    state[node + I_TOLD] = told
    state[node + I_CALLS] = calls
    state[node + I_ELSEWHERE] = U1 if elsewhere else U0
    state[node + I_SURVEYED] = state[R_MAPPINGS]


@kernel
def goes_by_address(state, inode):
    """Whether what stage 2 loses with a mapping of the inode has to be looked for by address: a slot shows its pages
    elsewhere. Else the inode's pages tell."""
    node = inode_row(inode)
    if state[node + I_SURVEYED] != state[R_MAPPINGS]:
        survey(state, inode)
    return state[node + I_ELSEWHERE] != U0
