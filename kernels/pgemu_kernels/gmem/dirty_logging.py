"""Dirty logging of the designs' memory slots, which KVM refuses: the large leaves go, and come back."""

from __future__ import annotations

from pgemu_kernels.engine.bits import NONE, U0, U12
from pgemu_kernels.engine.charge import charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.memslots import find_memslot
from pgemu_kernels.engine.rows import block_row, inode_row, stop, vm_row
from pgemu_kernels.folios.zeroed import keeps_shown
from pgemu_kernels.gmem.levels import folio_order_at, frame_of, level_now, page_of_slot
from pgemu_kernels.gmem.stale_contents import count_stale
from pgemu_kernels.gmem.zeroing import zero_folio
from pgemu_kernels.kvm.dirty_log import recover_huge_pages
from pgemu_kernels.stage2.regions import note_leaf
from pgemu_kernels.stage2.tdp_mmu import collapse, first_leaf, split_range
from pgemu_kernels.words.enum_words import EVENT_TLB_FLUSH_VM, FLAG_LOG_DIRTY_PAGES
from pgemu_kernels.words.operations import EBADF, EINVAL, ENOENT
from pgemu_kernels.words.registers import R_DIRTY_LOG_GMEM, R_RECOVER_HUGE, R_VMS
from pgemu_kernels.words.rows import (
    B_STATE,
    BLOCK_HUGE,
    BLOCK_PARTLY,
    M_BASE_GFN,
    M_FLAGS,
    M_INODE,
    M_KIND,
    M_PAGES,
    M_VM,
    O_ADDRESS,
    O_FLAGS,
    O_VM,
    SLOT_GUEST_MEMFD,
    SLOT_LOG_DIRTY_PAGES,
    SLOT_RELEASED,
    V_PRIVATE_ROOT,
    V_ROOT,
)


@kernel
def zero_below(m, slot, gfn, level):
    """Zero what a large leaf is about to show, where zeroing goes by page: see zero_folio()."""
    state = m.state
    node = inode_row(state[slot + M_INODE])
    index = page_of_slot(state, slot, gfn)
    block = block_row(m, node, index)
    kind = state[block + B_STATE]
    order = folio_order_at(m, block, index)
    if kind == BLOCK_HUGE or (kind == BLOCK_PARTLY and order != U0):
        zero_folio(m, node, index, frame_of(m, block, index), level, order)


@kernel
def zero_and_collapse(m, f, slot, gfn, spte, level):
    """A large leaf in place of a table, or (6.12) none: 1 if the table went, else 0."""
    state = m.state
    recovers = state[R_RECOVER_HUGE] != U0
    if recovers and first_leaf(m, f, m.ram[spte], level) != U0:
        zero_below(m, slot, gfn, level)
    went = collapse(m, f, spte, level)
    if went != 0:
        node, index = inode_row(state[slot + M_INODE]), page_of_slot(state, slot, gfn)
        note_leaf(state, node, index, level, state[slot + M_VM])
        if recovers and keeps_shown(m):
            count_stale(m, node, index, level)
    return went


recover_slot = recover_huge_pages(level_now, zero_and_collapse)


@outlined
def set_dirty_logging(m, op):
    """KVM_SET_USER_MEMORY_REGION2 with other KVM_MEM_LOG_DIRTY_PAGES for the slot at a guest address.

    0; -EBADF of a closed VM; -EINVAL as KVM answers, which refuses that flag beside KVM_MEM_GUEST_MEMFD
    (kvm_main.c:check_memory_region_flags()); with Config.dirty_log_guest_memfd only -ENOENT where no slot of a
    guest_memfd is. On: large leaves are split, and faults map 4K; off: large leaves come back. Left out: the bitmap and
    the write protection that fills it, so a guest's write is not noted; its one flush is charged. In a mirror large
    leaves do not come back.
    """
    state = m.state
    vm = state[op + O_VM]
    if vm >= state[R_VMS] or state[vm_row(vm) + V_ROOT] == U0:
        return stop(state, op, -EBADF)
    if state[R_DIRTY_LOG_GMEM] == U0:
        return stop(state, op, -EINVAL)
    slot = find_memslot(state, vm, state[op + O_ADDRESS] >> U12)
    if slot == NONE or state[slot + M_KIND] != SLOT_GUEST_MEMFD:
        return stop(state, op, -ENOENT)
    on = state[op + O_FLAGS] & FLAG_LOG_DIRTY_PAGES != U0
    if on == (state[slot + M_FLAGS] & SLOT_LOG_DIRTY_PAGES != U0):
        return stop(state, op, 0)
    state[slot + M_FLAGS] ^= SLOT_LOG_DIRTY_PAGES
    if state[slot + M_FLAGS] & SLOT_RELEASED != U0:
        return stop(state, op, 0)  # no leaf is left, and no page stands behind it
    if on:
        base = state[slot + M_BASE_GFN]
        # mmu.c:kvm_mmu_slot_try_split_huge_pages(): without memory the rest stays large.
        root, private = state[vm_row(vm) + V_ROOT], state[vm_row(vm) + V_PRIVATE_ROOT]
        split_range(m, root, base, base + state[slot + M_PAGES])
        if private != root:
            split_range(m, private, base, base + state[slot + M_PAGES])
        charge_one(m, EVENT_TLB_FLUSH_VM)  # x86.c:kvm_mmu_slot_apply_flags(): whether anything changed or not
    else:
        recover_slot(m, slot)
    return stop(state, op, 0)
