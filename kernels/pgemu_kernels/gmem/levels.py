"""KVM's side of the designs' memory slots: the level of a leaf, dirty logging.

The level is the least of what the slot allows (lpage_info), what dirty logging allows, and what the inode says: in
restructure the size of the folio, in pfnmap how far around the page all pages are of one kind.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U2, U3, U6, U9, U12, U63, U511
from pgemu_kernels.engine.charge import TLB_FLUSH_VM, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.rows import block_row, find_memslot, inode_row, slot_allows, stop, vm_row
from pgemu_kernels.engine.shareability import is_shared, is_uniform, shared_in_range
from pgemu_kernels.gmem.zeroing import zero_folio, zero_huge
from pgemu_kernels.stage2.entries import is_table, pages_of
from pgemu_kernels.stage2.regions import note_leaf
from pgemu_kernels.stage2.tdp_mmu import collapse, first_leaf, split_range
from pgemu_kernels.tables.walker import is_present, stage2_format, table_of
from pgemu_kernels.words.operations import EBADF, EINVAL, ENOENT, PFNMAP, Defect, Flag
from pgemu_kernels.words.registers import R_DEFECTS, R_DESIGN, R_DIRTY_LOG_GMEM, R_ORDER, R_RECOVER_HUGE, R_VMS
from pgemu_kernels.words.rows import (
    B_PFN,
    B_PIECES,
    B_STATE,
    BLOCK_HUGE,
    BLOCK_PARTLY,
    I_PAGES,
    M_BASE_GFN,
    M_FLAGS,
    M_INODE,
    M_KIND,
    M_PAGES,
    M_PGOFF,
    M_VM,
    O_ADDRESS,
    O_FLAGS,
    O_INDEX,
    O_ROW,
    O_VM,
    SLOT_GUEST_MEMFD,
    SLOT_LOG_DIRTY_PAGES,
    SLOT_RELEASED,
    V_ROOT,
)

U = np.uint64
_MAPPING_ORDER = U(Defect.MAPPING_ORDER)
_HUGE_OVER_PRIVATE = U(Defect.HUGE_OVER_PRIVATE)
_LOG_DIRTY_PAGES = U(Flag.LOG_DIRTY_PAGES)


# --------------------------------------------------------------------------- levels


@kernel
def allocator_level(state):
    """The level of a huge page of the pool: 1 where it has 4K pages only."""
    order = state[R_ORDER]
    if order == U0:
        return U1
    return U3 if order > U9 else U2


@kernel
def has_defect(state, defect):
    return state[R_DEFECTS] & defect != U0


@kernel
def limit_to_slot(state, slot, gfn, level):
    """lpage_info and dirty logging: the largest level up to `level` that the slot allows at a guest frame.

    arch/x86/kvm/mmu/mmu.c:kvm_mmu_max_mapping_level(), kvm_mmu_hugepage_adjust().
    """
    if state[slot + M_FLAGS] & SLOT_LOG_DIRTY_PAGES != U0:
        return U1
    while level > U1 and not slot_allows(state, slot, gfn, level):
        level -= U1
    return level


@kernel
def order_of_december(m, node, index):
    """The level of the mapping-order helper of December 2025 (Defect.MAPPING_ORDER), whatever the folio is.

    It asks whether [index, index + nr) is all private, nr the pages of a huge page, although it has the index rounded
    down at hand. An index in a private huge page before one with shared pages gets 4K; one behind the last shared page
    of its own gets the huge page's level, over a folio that is split. That the range ends with the file is inference.
    """
    state = m.state
    end = min(index + (U1 << state[R_ORDER]), state[node + I_PAGES])
    return allocator_level(state) if shared_in_range(m, node, index, end) == U0 else U1


@kernel
def piece_level(state, block, index):
    """Level of the folio of a page in a 1G block of which only touched 2M pieces are split to 4K (B_PIECES)."""
    piece = index >> U9 & U511
    return U1 if state[block + B_PIECES + (piece >> U6)] >> (piece & U63) & U1 != U0 else U2


@outlined
def folio_level(m, slot, index, gfn):
    """restructure: the level at which a guest frame of a slot, page `index` of its inode, is mapped.

    kvm_gmem_max_mapping_level(): no larger than the folio. With Defect.HUGE_OVER_PRIVATE a shared page takes the level
    of the host's memory and nobody asks about its neighbours. In 2022 shared and private pages came from different
    memory, and the host's was huge; where both come from one inode that memory is the pool's huge page (inference).
    """
    state = m.state
    node = inode_row(state[slot + M_INODE])
    block = block_row(m, node, index)
    level = U1
    if has_defect(state, _HUGE_OVER_PRIVATE) and is_shared(m, node, index) != U0:
        level = allocator_level(state)
    elif has_defect(state, _MAPPING_ORDER):
        level = order_of_december(m, node, index)
    elif state[block + B_STATE] == BLOCK_HUGE:
        level = allocator_level(state)
    elif state[block + B_STATE] == BLOCK_PARTLY:
        level = piece_level(state, block, index)
    return limit_to_slot(state, slot, gfn, level)


@outlined
def shareability_level(m, slot, index, gfn):
    """pfnmap: the level at which a guest frame of a slot, page `index` of its inode, is mapped.

    The largest whose block is all of one kind. Defect.HUGE_OVER_PRIVATE as in folio_level().
    """
    state = m.state
    node = inode_row(state[slot + M_INODE])
    level = allocator_level(state)
    if not (has_defect(state, _HUGE_OVER_PRIVATE) and is_shared(m, node, index) != U0):
        while level > U1 and not is_uniform(m, node, index, level):
            level -= U1
    return limit_to_slot(state, slot, gfn, level)


@kernel
def folio_level_full(m, op):
    """folio_level() of the guest fault in a record."""
    state = m.state
    return folio_level(m, state[op + O_ROW], state[op + O_INDEX], state[op + O_ADDRESS] >> U12)


@kernel
def shareability_level_full(m, op):
    """shareability_level() of the guest fault in a record."""
    state = m.state
    return shareability_level(m, state[op + O_ROW], state[op + O_INDEX], state[op + O_ADDRESS] >> U12)


@kernel
def stage2_level(m, slot, gfn):
    """The level at which a guest frame of a slot would be mapped now, by the machine's design."""
    state = m.state
    index = gfn - state[slot + M_BASE_GFN] + state[slot + M_PGOFF]
    if state[R_DESIGN] == U(PFNMAP):
        return shareability_level(m, slot, index, gfn)
    return folio_level(m, slot, index, gfn)


# --------------------------------------------------------------------------- dirty logging


@kernel
def zero_below(m, slot, gfn, level):
    """Zero what a large leaf is about to show, where zeroing goes by page: see zero_huge()."""
    state = m.state
    node = inode_row(state[slot + M_INODE])
    index = gfn - state[slot + M_BASE_GFN] + state[slot + M_PGOFF]
    block = block_row(m, node, index)
    pfn = state[block + B_PFN] + (index & ((U1 << state[R_ORDER]) - U1))
    if state[block + B_STATE] == BLOCK_HUGE:
        zero_huge(m, node, index, pfn, level)
    elif state[block + B_STATE] == BLOCK_PARTLY and piece_level(state, block, index) == U2:
        zero_folio(m, node, index, pfn, level, U9)


@kernel
def recover_below(m, f, slot, spte, gfn):
    """Replace the largest table over a guest frame that can be: the level at which the walk ended.

    `spte`: the slot of the frame's level-3 entry.
    """
    state = m.state
    level = U3
    while level > U1:
        entry = m.ram[spte]
        if not is_table(state, f, entry, level):
            break
        if gfn & (pages_of(level) - U1) == U0 and stage2_level(m, slot, gfn) >= level:
            if state[R_RECOVER_HUGE] != U0 and first_leaf(m, f, entry, level) != U0:
                zero_below(m, slot, gfn, level)
            if collapse(m, f, spte, level) != 0:
                index = gfn - state[slot + M_BASE_GFN] + state[slot + M_PGOFF]
                note_leaf(state, inode_row(state[slot + M_INODE]), index, level, state[slot + M_VM])
            break
        level -= U1
        if level > U1:
            spte = table_of(state, f, entry) + (gfn >> U9 & U511)
    return level


@outlined
def recover_slot(m, slot):
    """Dirty logging is off: put large leaves back where slot and inode allow them, or (6.12) drop the small ones.

    mmu.c:kvm_mmu_recover_huge_pages(), 6.12: kvm_mmu_zap_collapsible_sptes(); as kvm_memslots.recover_huge_pages().
    """
    state = m.state
    f = stage2_format(m)
    root = state[vm_row(state[slot + M_VM]) + V_ROOT]
    gfn = state[slot + M_BASE_GFN]
    end = gfn + state[slot + M_PAGES]
    while gfn < end:
        top = m.ram[(root >> U3) + (gfn >> (U9 * U3))]
        level = U3
        if is_present(state, f, top):
            level = recover_below(m, f, slot, table_of(state, f, top) + (gfn >> (U9 * U2) & U511), gfn)
        step = pages_of(max(level, U2))
        gfn = (gfn & ~(step - U1)) + step


@outlined
def set_dirty_logging(m, op):
    """KVM_SET_USER_MEMORY_REGION2 with other KVM_MEM_LOG_DIRTY_PAGES for the slot at a guest address.

    0; -EBADF of a closed VM; -EINVAL as KVM answers, which refuses that flag beside KVM_MEM_GUEST_MEMFD
    (kvm_main.c:check_memory_region_flags()); with Config.dirty_log_guest_memfd only -ENOENT where no slot of a
    guest_memfd is. On: large leaves are split, and faults map 4K; off: large leaves come back. Left out: the bitmap and
    the write protection that fills it, so a guest's write is not noted; its one flush is charged.
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
    on = state[op + O_FLAGS] & _LOG_DIRTY_PAGES != U0
    if on == (state[slot + M_FLAGS] & SLOT_LOG_DIRTY_PAGES != U0):
        return stop(state, op, 0)
    state[slot + M_FLAGS] ^= SLOT_LOG_DIRTY_PAGES
    if state[slot + M_FLAGS] & SLOT_RELEASED != U0:
        return stop(state, op, 0)  # no leaf is left, and no page stands behind it
    if on:
        base = state[slot + M_BASE_GFN]
        # mmu.c:kvm_mmu_slot_try_split_huge_pages(): without memory the rest stays large.
        split_range(m, state[vm_row(vm) + V_ROOT], base, base + state[slot + M_PAGES])
        charge_one(m, TLB_FLUSH_VM)  # x86.c:kvm_mmu_slot_apply_flags(): whether anything changed or not
    else:
        recover_slot(m, slot)
    return stop(state, op, 0)
