"""The rows of memory slots, and the trees in which a VM or an inode finds its own.

include/linux/kvm_host.h:struct kvm_memslots has a tree by guest frame, an interval tree by userspace address and a hash
of numbers; virt/kvm/guest_memfd.c keeps the bindings of a file by page. Here all four are interval trees, so that a
slot is found, made and deleted in a time that hardly grows with their number.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U12
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.interval_tree import first_below, first_range, link_range, next_range, unlink_range
from pgemu_kernels.engine.rows import clear_words, inode_row, memslot_row, vm_row
from pgemu_kernels.words.registers import R_FREE_MEMSLOT, R_LAST_MEMSLOT, R_MEMSLOTS, R_VMS
from pgemu_kernels.words.rows import (
    I_SLOTS,
    M_BASE_GFN,
    M_HVA,
    M_ID,
    M_INODE,
    M_KIND,
    M_LIVE,
    M_NEXT_FREE,
    M_PAGES,
    M_PGOFF,
    M_VM,
    M_WORDS,
    MEMSLOTS,
    SLOT_IDS,
    SLOT_USER,
    STATE_BY_GFN,
    STATE_BY_HVA,
    STATE_BY_ID,
    STATE_BY_INODE,
    STATE_MEMSLOTS,
    T_WORDS,
    V_SLOT_COUNT,
    V_SLOT_IDS,
    V_SLOTS,
    V_SLOTS_BY_HVA,
)

U = np.uint64
_M_WORDS = U(M_WORDS)
_ROW_PER_NODE = U(M_WORDS // T_WORDS)
_MEMSLOTS = U(MEMSLOTS)
_SLOT_IDS = U(SLOT_IDS)


# --------------------------------------------------------------------------- finding


@kernel
def tree_node(slot, nodes):
    """The node of a slot in the trees whose nodes begin at word `nodes`."""
    return nodes + (slot - STATE_MEMSLOTS) // _ROW_PER_NODE


@kernel
def slot_at_node(node, nodes):
    """The slot of a node, or 0 of none."""
    return STATE_MEMSLOTS + (node - nodes) * _ROW_PER_NODE if node != U0 else U0


@kernel
def first_slot(state, vm, gfn, end):
    """The first slot of a VM over some of guest frames [gfn, end), or 0: kvm_for_each_memslot_in_gfn_range()."""
    if vm >= state[R_VMS]:
        return U0
    return slot_at_node(first_range(state, vm_row(vm) + V_SLOTS, gfn, end), STATE_BY_GFN)


@kernel
def next_slot(state, slot, gfn, end):
    """The one after it, or 0."""
    return slot_at_node(next_range(state, tree_node(slot, STATE_BY_GFN), gfn, end), STATE_BY_GFN)


@kernel
def first_shown(state, vm, start, end):
    """The first slot of a VM with some of userspace addresses [start, end), or 0: kvm_main.c:kvm_handle_hva_range()."""
    return slot_at_node(first_range(state, vm_row(vm) + V_SLOTS_BY_HVA, start, end), STATE_BY_HVA)


@kernel
def next_shown(state, slot, start, end):
    """The one after it, or 0."""
    return slot_at_node(next_range(state, tree_node(slot, STATE_BY_HVA), start, end), STATE_BY_HVA)


@kernel
def first_binding(state, inode, start, end):
    """The first slot, of whatever VM, over some of pages [start, end) of an inode, or 0."""
    return slot_at_node(first_range(state, inode_row(inode) + I_SLOTS, start, end), STATE_BY_INODE)


@kernel
def next_binding(state, slot, start, end):
    """The one after it, or 0."""
    return slot_at_node(next_range(state, tree_node(slot, STATE_BY_INODE), start, end), STATE_BY_INODE)


@outlined
def find_slot_id(state, vm, number):
    """The row of a VM's slot by userspace's number, or NONE. kvm_host.h:id_to_memslot()"""
    node = first_below(state, state[vm_row(vm) + V_SLOT_IDS], number, number + U1) if vm < state[R_VMS] else U0
    return slot_at_node(node, STATE_BY_ID) if node != U0 else NONE


@outlined
def _search_memslots(state, vm, gfn):
    """find_memslot() where it is not the slot of before."""
    row = first_slot(state, vm, gfn, gfn + U1)
    if row == U0:
        return NONE
    state[R_LAST_MEMSLOT] = row
    return row


@kernel
def find_memslot(state, vm, gfn):
    """Row of the memory slot of a VM that holds a guest frame, or NONE; the last one found is tried first, as in
    kvm_main.c:kvm_vcpu_gfn_to_memslot()."""
    row = state[R_LAST_MEMSLOT]
    if gfn - state[row + M_BASE_GFN] < state[row + M_PAGES] and state[row + M_VM] == vm:
        return row
    return _search_memslots(state, vm, gfn)


# --------------------------------------------------------------------------- making, moving, deleting


@kernel
def has_slot_left(state, row):
    """Whether a VM (`row` of V_*) has a number left for one more slot: KVM_USER_MEM_SLOTS."""
    return state[row + V_SLOT_COUNT] < _SLOT_IDS


@kernel
def _take_row(state):
    """A row for one more slot, the one given back last; NONE where the machine has none left."""
    slot = state[R_FREE_MEMSLOT]
    if slot != U0:
        state[R_FREE_MEMSLOT] = state[slot + M_NEXT_FREE]
        state[slot + M_NEXT_FREE] = U0
        return slot
    i = state[R_MEMSLOTS]
    if i >= _MEMSLOTS:
        return NONE
    state[R_MEMSLOTS] = i + U1
    return memslot_row(i)


@kernel
def _link_gfn(state, slot):
    base = state[slot + M_BASE_GFN]
    root = vm_row(state[slot + M_VM]) + V_SLOTS
    link_range(state, root, tree_node(slot, STATE_BY_GFN), base, base + state[slot + M_PAGES])


@kernel
def _link_binding(state, slot):
    pgoff = state[slot + M_PGOFF]
    root = inode_row(state[slot + M_INODE]) + I_SLOTS
    link_range(state, root, tree_node(slot, STATE_BY_INODE), pgoff, pgoff + state[slot + M_PAGES])


@outlined
def new_memslot(state, vm, gfn, pages, kind, inode, pgoff):
    """A slot of a VM over guest frames [gfn, gfn + pages), without number and userspace address; of an inode, or NONE,
    it shows pages from `pgoff` on. Its row, or NONE where the machine has none left."""
    slot = _take_row(state)
    if slot == NONE:
        return NONE
    state[slot + M_KIND] = kind
    state[slot + M_VM] = vm
    state[slot + M_BASE_GFN] = gfn
    state[slot + M_PAGES] = pages
    state[slot + M_INODE] = inode
    state[slot + M_PGOFF] = pgoff
    state[slot + M_HVA] = NONE
    state[slot + M_LIVE] = U1
    state[vm_row(vm) + V_SLOT_COUNT] += U1
    _link_gfn(state, slot)
    if inode != NONE:
        _link_binding(state, slot)
    return slot


@outlined
def number_slot(state, slot, number):
    """Userspace gives a new slot its number."""
    state[slot + M_ID] = number
    link_range(state, vm_row(state[slot + M_VM]) + V_SLOT_IDS, tree_node(slot, STATE_BY_ID), number, number + U1)


@outlined
def place_slot(state, slot, hva):
    """A slot gets a userspace address, or none (NONE)."""
    root = vm_row(state[slot + M_VM]) + V_SLOTS_BY_HVA
    if state[slot + M_HVA] != NONE:
        unlink_range(state, root, tree_node(slot, STATE_BY_HVA))
    state[slot + M_HVA] = hva
    if hva != NONE:
        link_range(state, root, tree_node(slot, STATE_BY_HVA), hva, hva + (state[slot + M_PAGES] << U12))


@outlined
def move_slot(state, slot, gfn):
    """A slot's pages are at other guest frames."""
    unlink_range(state, vm_row(state[slot + M_VM]) + V_SLOTS, tree_node(slot, STATE_BY_GFN))
    state[slot + M_BASE_GFN] = gfn
    _link_gfn(state, slot)


@outlined
def rebind_slot(state, slot, inode, pgoff):
    """A slot stands for other pages, of the same inode or of none (NONE) any more."""
    unlink_range(state, inode_row(state[slot + M_INODE]) + I_SLOTS, tree_node(slot, STATE_BY_INODE))
    state[slot + M_INODE] = inode
    state[slot + M_PGOFF] = pgoff
    if inode != NONE:
        _link_binding(state, slot)


@outlined
def free_memslot(state, slot):
    """A slot is no more, and its row may be another's."""
    row = vm_row(state[slot + M_VM])
    unlink_range(state, row + V_SLOTS, tree_node(slot, STATE_BY_GFN))
    if state[slot + M_INODE] != NONE:
        unlink_range(state, inode_row(state[slot + M_INODE]) + I_SLOTS, tree_node(slot, STATE_BY_INODE))
    if state[slot + M_KIND] == SLOT_USER:
        unlink_range(state, row + V_SLOT_IDS, tree_node(slot, STATE_BY_ID))
    place_slot(state, slot, NONE)
    state[row + V_SLOT_COUNT] -= U1
    clear_words(state, slot, _M_WORDS)
    state[slot + M_NEXT_FREE] = state[R_FREE_MEMSLOT]
    state[R_FREE_MEMSLOT] = slot
