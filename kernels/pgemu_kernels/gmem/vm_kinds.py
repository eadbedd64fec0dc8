"""What a VM's kind makes of a leaf over a guest_memfd: the largest level, what the guest accepts, the RMP.

A kind is a row of data (pgemu/machine/vm_kinds.py); here are what its properties (VmProperty) mean. Of the RMP there is
only what a leaf's level depends on: a bit per page, it is assigned to a guest, and a bit per 2M, one entry assigns all
of it.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import ALL, U0, U1, U2, U6, U9, U12, U63, U511, U512
from pgemu_kernels.engine.charge import charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.handle import full_only
from pgemu_kernels.engine.rows import has_vm_property, inode_row, stop, vm_row
from pgemu_kernels.engine.shareability import is_shared, mask_at
from pgemu_kernels.stage2.invalidate import flush_vm, zap_slot
from pgemu_kernels.stage2.leaves import split_cross_boundary_leafs
from pgemu_kernels.words.enum_words import EVENT_GUEST_FAULT, FLAG_ACCEPT_4K, VM_HONORS_ACCEPT, VM_MIRRORED, VM_RMP
from pgemu_kernels.words.operations import RET_PF_SPURIOUS
from pgemu_kernels.words.registers import R_VM_PROPERTIES
from pgemu_kernels.words.rows import (
    FILTER_BOTH,
    I_ASSIGNED,
    I_ASSIGNED_2M,
    M_BASE_GFN,
    M_INODE,
    M_PGOFF,
    O_ADDRESS,
    O_DETAIL,
    O_FLAGS,
    O_VM,
    V_PRIVATE_LEVEL,
    V_PRIVATE_ROOT,
    V_PROPERTIES,
)

U = np.uint64
_WORDS_OF_2M = U(8)  # of a bit per page


# --------------------------------------------------------------------------- the RMP


@kernel
def is_assigned(state, node, index):
    """Whether the RMP assigns a page to a guest."""
    return state[state[node + I_ASSIGNED] + (index >> U6)] >> (index & U63) & U1 != U0


@kernel
def is_assigned_2m(state, node, index):
    """Whether one entry of the RMP assigns the 2M around a page."""
    block = index >> U9
    return state[state[node + I_ASSIGNED_2M] + (block >> U6)] >> (block & U63) & U1 != U0


@kernel
def psmash(state, node, index):
    """The entry of the 2M around a page, if there is one, becomes 512 of 4K."""
    block = index >> U9
    state[state[node + I_ASSIGNED_2M] + (block >> U6)] &= ~(U1 << (block & U63))


@outlined
def assign(state, node, index, level):
    """arch/x86/kvm/svm/sev.c:sev_gmem_prepare(): assign a page, with the 2M around it if a leaf of `level` could be
    there and none of it is assigned.

    Linux looks at the folio's order for that; where folios are not split the level stands for it (inference).
    """
    if is_assigned(state, node, index):
        return
    first = state[node + I_ASSIGNED] + (index >> U9) * _WORDS_OF_2M
    assigned = U0
    for word in range(first, first + _WORDS_OF_2M if level > U1 else first):
        assigned |= state[word]
    if level == U1 or assigned != U0:
        state[state[node + I_ASSIGNED] + (index >> U6)] |= U1 << (index & U63)
        return
    for word in range(first, first + _WORDS_OF_2M):
        state[word] = ALL
    block = index >> U9
    state[state[node + I_ASSIGNED_2M] + (block >> U6)] |= U1 << (block & U63)


@outlined
def unassign(state, node, start, end):
    """sev.c:sev_gmem_invalidate(), in place conversion's make_shared(): pages [start, end) are nobody's; an entry of 2M
    that reaches beyond them is split."""
    while start < end:
        psmash(state, node, start)
        state[state[node + I_ASSIGNED] + (start >> U6)] &= ~mask_at(start, end)
        start = (start | U63) + U1


@kernel
def give_back_pages(m, node, start, end):
    """unassign(), where any VM has an RMP."""
    if m.state[R_VM_PROPERTIES] & VM_RMP != U0:
        unassign(m.state, node, start, end)


make_shared = full_only(give_back_pages, None)  # the fast loops know no such VM


# --------------------------------------------------------------------------- levels


@kernel
def largest_of_kind(m, row, node, index, level):
    """The largest level up to `level` that the kind of a VM (`row` of V_*) lets a page of an inode have.

    kvm_x86_ops.gmem_max_mapping_level(). By the RMP a page that nobody has been assigned gets 4K, a shared one, too.
    """
    state = m.state
    if has_vm_property(state, row, VM_RMP):
        return min(level, U2 if is_assigned_2m(state, node, index) else U1)
    return min(level, state[row + V_PRIVATE_LEVEL]) if is_shared(m, node, index) == U0 else level


@outlined
def level_of_fault(m, op, row, node, index, level):
    """The same of a fault, which has the page prepared first, and may be an accept at 4K."""
    state = m.state
    private = is_shared(m, node, index) == U0
    accepted = private and state[op + O_FLAGS] & FLAG_ACCEPT_4K != U0
    accepted = accepted and has_vm_property(state, row, VM_HONORS_ACCEPT)
    if private and has_vm_property(state, row, VM_RMP):
        assign(state, node, index, min(level, state[row + V_PRIVATE_LEVEL]))
        if accepted:
            psmash(state, node, index)
    return U1 if accepted else largest_of_kind(m, row, node, index, level)


@kernel
def limit_to_kind(m, op, node, index, level):
    """Level of a guest's leaf over page `index` of an inode, which its slot and its design let be `level`."""
    row = vm_row(m.state[op + O_VM])
    if m.state[row + V_PROPERTIES] == U0 and level <= m.state[row + V_PRIVATE_LEVEL]:
        return level
    return level_of_fault(m, op, row, node, index, level)


@kernel
def of_any_kind(m, op, node, index, level):
    """The fast loops know only kinds that limit nothing."""
    return level


kind_level = full_only(limit_to_kind, of_any_kind)


# --------------------------------------------------------------------------- a leaf that is there


@kernel
def ends_spurious(m, op, slot, level):
    """A guest's access of a page that has a leaf is over: True."""
    m.state[op + O_DETAIL] = level
    stop(m.state, op, RET_PF_SPURIOUS)
    return True


@outlined
def accept_part(m, op, slot, level):
    """The guest accepts 4K of a larger private leaf: whether the access is over.

    Mirrored: the leaf is split; -ENOMEM if that fails (posted, TDX huge pages v3: vmx/tdx.c:
    tdx_honor_guest_accept_level(), which flushes nothing more). RMP: its entry is split and the leaf goes, and the
    access faults again (main, svm/sev.c:sev_handle_rmp_fault()).
    """
    state = m.state
    vm = state[op + O_VM]
    row = vm_row(vm)
    gfn = state[op + O_ADDRESS] >> U12
    node = inode_row(state[slot + M_INODE])
    index = gfn - state[slot + M_BASE_GFN] + state[slot + M_PGOFF]
    if not has_vm_property(state, row, VM_HONORS_ACCEPT) or is_shared(m, node, index) != U0:
        return ends_spurious(m, op, slot, level)
    if not has_vm_property(state, row, VM_MIRRORED):
        psmash(state, node, index)
        first = gfn & ~U511
        zap_slot(m, slot, first, first + U512, FILTER_BOTH)
        flush_vm(m, vm)
        return False
    charge_one(m, EVENT_GUEST_FAULT)
    status = split_cross_boundary_leafs(m, state[row + V_PRIVATE_ROOT], gfn, gfn + U1)
    if status == 0:
        return ends_spurious(m, op, slot, U1)
    stop(state, op, status)
    return True


@kernel
def finds_leaf(m, op, slot, level):
    """A guest's access meets a leaf: whether it is over."""
    if level == U1 or m.state[op + O_FLAGS] & FLAG_ACCEPT_4K == U0:
        return ends_spurious(m, op, slot, level)
    return accept_part(m, op, slot, level)


is_over = full_only(finds_leaf, ends_spurious)
