"""KVM's side of the designs' memory slots: the level of a leaf.

It is the least of what the slot allows (lpage_info), what dirty logging allows, and what the inode says: in
restructure the size of the folio, in pfnmap how far around the page all pages are of one kind.
"""

from __future__ import annotations

from pgemu_kernels.engine.bits import U0, U1, U2, U9
from pgemu_kernels.engine.compile import kernel, outlined, step
from pgemu_kernels.engine.handle import full_only, parameter
from pgemu_kernels.engine.properties import level_is_folios
from pgemu_kernels.engine.rows import block_row, inode_row, largest_level, slot_allows, vm_row
from pgemu_kernels.engine.shareability import is_shared, is_uniform, shared_in_range
from pgemu_kernels.folios.large_folios import large_folios, order_in_row
from pgemu_kernels.gmem import pieces
from pgemu_kernels.gmem.conversion import in_pieces
from pgemu_kernels.gmem.vm_kinds import largest_of_kind
from pgemu_kernels.words.enum_words import (
    DEFECT_HUGE_OVER_PRIVATE,
    DEFECT_MAPPING_ORDER,
)
from pgemu_kernels.words.registers import (
    LEVEL_PRIVATE,
    LEVEL_WHOLE,
    R_DEFECTS,
    R_DIRTY_LOG_GMEM,
    R_LEVEL_RULE,
    R_ORDER,
)
from pgemu_kernels.words.rows import (
    B_PFN,
    B_STATE,
    BLOCK_HUGE,
    BLOCK_PARTLY,
    BLOCK_SPLIT,
    I_PAGES,
    M_BASE_GFN,
    M_FLAGS,
    M_INODE,
    M_PGOFF,
    M_VM,
    SLOT_LOG_DIRTY_PAGES,
)

# What a machine may have otherwise, and what it is at first: constants in the fast loops.
defects = parameter(R_DEFECTS, U0)
dirty_logging = parameter(R_DIRTY_LOG_GMEM, U0)


# --------------------------------------------------------------------------- levels


@kernel
def page_of_slot(state, slot, gfn):
    """Page of the inode that a guest frame of a slot stands for."""
    return gfn - state[slot + M_BASE_GFN] + state[slot + M_PGOFF]


@kernel
def frame_of(m, block, index):
    """The frame of a page of an allocated block."""
    return m.state[block + B_PFN] + (index & ((U1 << m.state[R_ORDER]) - U1))


@kernel
def limit_to_slot(m, slot, gfn, level):
    """lpage_info and dirty logging: the largest level up to `level` that the slot allows at a guest frame.

    arch/x86/kvm/mmu/mmu.c:kvm_mmu_max_mapping_level(), kvm_mmu_hugepage_adjust().
    """
    state = m.state
    if is_logged(m, slot):
        return U1
    backing = state[slot + M_PGOFF]
    while level > U1 and not slot_allows(state, slot, gfn, level, backing):
        level -= U1
    return level


@kernel
def is_logged(m, slot):
    """Whether dirty logging is on for a slot, so that only leaves of 4K may be there."""
    return dirty_logging(m) != U0 and m.state[slot + M_FLAGS] & SLOT_LOG_DIRTY_PAGES != U0


@kernel
def folio_order_at(m, block, index):
    """Order of the folio that holds an allocated page of a block: restructure splits them."""
    kind = m.state[block + B_STATE]
    if kind == BLOCK_SPLIT:
        return U0
    if in_pieces(m) and kind == BLOCK_PARTLY:
        return (pieces.level_of(m, block, index) - U1) * U9
    return order_in_row(m, block) if large_folios(m) != U0 else m.state[R_ORDER]


@kernel
def most_level(m, node, index):
    """The largest level that the folio of an allocated page may have: where 4K pages come in folios of 2M, theirs."""
    if large_folios(m) != U0:
        return U2 if order_in_row(m, block_row(m, node, index)) == U9 else U1
    return largest_level(m.state)


@outlined
def order_of_december(m, node, index):
    """The level of the mapping-order helper of December 2025 (Defect.MAPPING_ORDER), whatever the folio is.

    It asks whether [index, index + nr) is all private, nr the pages of a huge page, although it has the index rounded
    down at hand. An index in a private huge page before one with shared pages gets 4K; one behind the last shared page
    of its own gets the huge page's level, over a folio that is split. That the range ends with the file is inference.
    """
    state = m.state
    end = min(index + (U1 << state[R_ORDER]), state[node + I_PAGES])
    return largest_level(state) if shared_in_range(m, node, index, end) == U0 else U1


december_level = full_only(order_of_december, U1)  # machines without parameters have no defects


@step
def folio_level(m, slot, node, index, gfn):
    """By the folio: the level at which a guest frame of a slot, page `index` of its inode, is mapped.

    kvm_gmem_max_mapping_level(): no larger than the folio. With Defect.HUGE_OVER_PRIVATE a shared page takes the level
    of the host's memory and nobody asks about its neighbours. In 2022 shared and private pages came from different
    memory, and the host's was huge; where both come from one inode that memory is the pool's huge page (inference).
    """
    state = m.state
    block = block_row(m, node, index)
    level = U1
    if defects(m) & DEFECT_HUGE_OVER_PRIVATE != U0 and is_shared(m, node, index) != U0:
        level = largest_level(state)
    elif defects(m) & DEFECT_MAPPING_ORDER != U0:
        level = december_level(m, node, index)
    elif state[block + B_STATE] == BLOCK_HUGE:
        level = largest_level(state)
    elif in_pieces(m) and state[block + B_STATE] == BLOCK_PARTLY:
        level = pieces.level_of(m, block, index)
    return limit_to_slot(m, slot, gfn, level)


@step
def shareability_level(m, slot, node, index, gfn):
    """By shareability: the level at which a guest frame of a slot, page `index` of its inode, is mapped.

    The largest whose block is all of one kind (R_LEVEL_RULE has what else it could be). Defect.HUGE_OVER_PRIVATE as in
    folio_level().
    """
    state = m.state
    level = most_level(m, node, index)
    if not (defects(m) & DEFECT_HUGE_OVER_PRIVATE != U0 and is_shared(m, node, index) != U0):
        while level > U1 and not is_uniform(m, node, index, level):
            level = U1 if state[R_LEVEL_RULE] == LEVEL_WHOLE else level - U1
        if state[R_LEVEL_RULE] == LEVEL_PRIVATE and is_shared(m, node, index) != U0:
            level = U1
    return limit_to_slot(m, slot, gfn, level)


@kernel
def guest_level(m, slot, node, index, gfn):
    """The level at which a guest frame of a slot, page `index` of its inode, is mapped now."""
    if level_is_folios(m):
        return folio_level(m, slot, node, index, gfn)
    return shareability_level(m, slot, node, index, gfn)


@kernel
def level_now(m, slot, gfn):
    """The same of a guest frame of a slot, which is mapped: what its VM's kind allows, too."""
    state = m.state
    node = inode_row(state[slot + M_INODE])
    index = page_of_slot(state, slot, gfn)
    return largest_of_kind(m, vm_row(state[slot + M_VM]), node, index, guest_level(m, slot, node, index, gfn))
