"""Safety rules and conservation: after each operation where it touched something, or all at once.

No host leaf to a private page; no leaf to a page that was not zeroed since it is the inode's; no stage-2 leaf over
pages of both kinds, to another frame than the inode's, or (restructure) larger than its folio; a block is split exactly
while one of its pages is shared; frames and huge pages are conserved; every invalidation that began has ended.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U2, U6, U9, U12, U63
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.geometry import index_at, pages_of
from pgemu_kernels.engine.memslots import find_memslot, first_binding, next_binding
from pgemu_kernels.engine.properties import level_is_folios, splits_folios
from pgemu_kernels.engine.rows import (
    block_row,
    broken,
    find_vma,
    has_vm_property,
    inode_row,
    root_of_kind,
    space_root,
    vm_row,
    vma_overlap,
    vma_row,
)
from pgemu_kernels.engine.shareability import is_shared, is_uniform, shared_in_block
from pgemu_kernels.folios.folio import FLAGS, PG_UPTODATE, struct_page
from pgemu_kernels.folios.large_folios import head_and_order
from pgemu_kernels.folios.xarray import object_frames
from pgemu_kernels.folios.zeroed import all_zeroed, flags_lie
from pgemu_kernels.formats.bits import PTE_ADDRESS
from pgemu_kernels.gmem.conversion import zap_rounded
from pgemu_kernels.gmem.vm_kinds import largest_of_kind
from pgemu_kernels.process.entries import pte_pfn
from pgemu_kernels.stage2.regions import vms_with_leaves
from pgemu_kernels.tables.walker import find_leaf, host_format, stage2_format
from pgemu_kernels.words.enum_words import (
    BROKEN_BLOCK_STATE,
    BROKEN_COUNTS,
    BROKEN_FRAMES,
    BROKEN_HOST_PRIVATE,
    BROKEN_IN_PROGRESS,
    BROKEN_LEAF_OVER_FOLIO,
    BROKEN_MIXED_LEAF,
    BROKEN_PRIVATE_LEVEL,
    BROKEN_STALE_CONTENTS,
    BROKEN_WRONG_PFN,
    BROKEN_WRONG_ROOT,
    GAUGE_ANONYMOUS_PAGES,
    GAUGE_BLOCKS_HUGE,
    GAUGE_BLOCKS_PARTLY,
    GAUGE_BLOCKS_SPLIT,
    GAUGE_BLOCKS_ZOMBIE,
    GAUGE_CACHE_NODES,
    GAUGE_CONTENT_FRAMES,
    GAUGE_FRAMES_USED,
    GAUGE_HOST_TABLES,
    GAUGE_HUGETLB_PAGES,
    GAUGE_KERNEL_TABLES,
    GAUGE_PAGE_CACHE_PAGES,
    GAUGE_POOL_FREE,
    GAUGE_STAGE2_TABLES,
    GAUGE_VMEMMAP_PAGES,
    OP_CONVERT,
    OP_GUEST_FAULT,
    OP_HOST_FAULT,
    OP_PUNCH_HOLE,
    VM_RMP,
)
from pgemu_kernels.words.events import STATS_GAUGES
from pgemu_kernels.words.operations import RET_PF_FIXED
from pgemu_kernels.words.registers import (
    R_EDIT_FRAMES,
    R_FOLIOS_IN_HAND,
    R_HSTATE,
    R_INODES,
    R_LARGE_FOLIOS,
    R_ORDER,
    R_PINNED_ALONE,
    R_POISONED_FRAMES,
    R_STEPPED,
    R_VMAS,
    R_VMS,
    R_ZERO_FRAME,
)
from pgemu_kernels.words.rows import (
    A_INODE,
    A_PGOFF,
    A_SPACE,
    A_START,
    B_BITS,
    B_PFN,
    B_PIECES,
    B_STATE,
    B_WAITS,
    BLOCK_HUGE,
    BLOCK_PARTLY,
    BLOCK_SPLIT,
    H_PAGES,
    I_PAGES,
    I_ZEROED,
    M_BASE_GFN,
    M_FLAGS,
    M_INODE,
    M_PAGES,
    M_PGOFF,
    M_VM,
    O_ADDRESS,
    O_INODE,
    O_LENGTH,
    O_OBJECT,
    O_OFFSET,
    O_OP,
    O_ROUND_END,
    O_ROUND_START,
    O_SPACE,
    O_STATUS,
    O_VM,
    SLOT_RELEASED,
    V_IN_PROGRESS,
    V_PRIVATE_LEVEL,
    V_PRIVATE_ROOT,
    V_ROOT,
)

U = np.uint64


@kernel
def expect(m, holds, kind, index):
    if not holds:
        broken(m.state, kind, index)


@kernel
def expect_gauge(m, gauge, counted):
    """A gauge shows what was counted."""
    expect(m, m.stats[STATS_GAUGES + gauge * U2] == np.int64(counted), BROKEN_COUNTS, gauge)


@kernel
def inode_frame(m, node, index):
    """Frame that the inode has at a page, or NONE."""
    block = block_row(m, node, index)
    kind = m.state[block + B_STATE]
    if kind != BLOCK_HUGE and kind != BLOCK_SPLIT and kind != BLOCK_PARTLY:
        return NONE
    return m.state[block + B_PFN] + (index & ((U1 << m.state[R_ORDER]) - U1))


@kernel
def order_at(m, node, index):
    """Order of the folio that holds a page, 0 where none is allocated."""
    block = block_row(m, node, index)
    kind = m.state[block + B_STATE]
    if kind == BLOCK_HUGE and m.state[R_LARGE_FOLIOS] != U0:
        _, order = head_and_order(m, m.state[block + B_PFN])
        return order
    if kind != BLOCK_PARTLY:
        return m.state[R_ORDER] if kind == BLOCK_HUGE else U0
    piece = index_at(index, U2)
    return U9 - U9 * (m.state[block + B_PIECES + (piece >> U6)] >> (piece & U63) & U1)


@outlined
def is_own(m, node, index, level):
    """Whether the pages below a leaf were zeroed since they are the inode's: folio by folio, see folios/zeroed.py."""
    ram = m.ram
    word = m.state[node + I_ZEROED]
    at = index & ~(pages_of(level) - U1)
    end = at + pages_of(level)
    if flags_lie(m):
        return all_zeroed(m, word, at, end)
    while at < end:
        inside = (U1 << order_at(m, node, at)) - U1
        pfn = inode_frame(m, node, at)
        last = min(end, (at | inside) + U1)
        if pfn != NONE and ram[struct_page(m, pfn & ~inside) + FLAGS] & PG_UPTODATE == U0:
            if m.state[block_row(m, node, at) + B_BITS] == U0 or not all_zeroed(m, word, at, last):
                return False
        at = last
    return True


@kernel
def check_host_leaf(m, row, address, level, entry):
    """A process's entry: to shared pages of the inode, to its frames, and where folios are split to a 4K folio."""
    state = m.state
    node = inode_row(state[row + A_INODE])
    index = state[row + A_PGOFF] + ((address - state[row + A_START]) >> U12)
    index &= ~(pages_of(level) - U1)
    expect(m, is_shared(m, node, index) != U0 and is_uniform(m, node, index, level), BROKEN_HOST_PRIVATE, index)
    expect(m, inode_frame(m, node, index) == pte_pfn(entry), BROKEN_WRONG_PFN, index)
    if splits_folios(m):
        expect(m, order_at(m, node, index) == U0, BROKEN_LEAF_OVER_FOLIO, index)
    expect(m, is_own(m, node, index, level), BROKEN_STALE_CONTENTS, index)


@kernel
def check_kind(m, vm, root, private, gfn, level):
    """A stage-2 leaf over private or shared memory: below the root of that kind, and of private memory no larger than
    the VM's kind maps it."""
    row = vm_row(vm)
    expect(m, root == root_of_kind(m.state, row, private), BROKEN_WRONG_ROOT, gfn)
    expect(m, not private or level <= m.state[row + V_PRIVATE_LEVEL], BROKEN_PRIVATE_LEVEL, gfn)


@kernel
def check_stage2_leaf(m, vm, root, gfn, level, entry):
    """A stage-2 leaf below a root: in a slot, over pages of one kind, to the inode's frames, not larger than the folio.

    The last rule is suspended for private blocks that a failure left split: order jan2026 splits before
    it zaps, so a conversion that fails in between leaves a huge leaf over 4K folios. A zap is of no more than the
    range: a private leaf beside it stays, and may be larger than 4K where the slot kept it from the folio's size.
    """
    state = m.state
    slot = find_memslot(state, vm, gfn)
    if slot == NONE:
        broken(state, BROKEN_WRONG_PFN, gfn)
        return
    if state[slot + M_FLAGS] & SLOT_RELEASED != U0:
        broken(state, BROKEN_WRONG_PFN, gfn)
        return
    node = inode_row(state[slot + M_INODE])
    index = gfn - state[slot + M_BASE_GFN] + state[slot + M_PGOFF]
    expect(m, is_uniform(m, node, index, level), BROKEN_MIXED_LEAF, index)
    check_kind(m, vm, root, is_shared(m, node, index) == U0, gfn, level)
    fits = not has_vm_property(state, vm_row(vm), VM_RMP) or level <= largest_of_kind(m, vm_row(vm), node, index, level)
    expect(m, fits, BROKEN_PRIVATE_LEVEL, index)
    expect(m, inode_frame(m, node, index) == (entry & PTE_ADDRESS) >> U12, BROKEN_WRONG_PFN, index)
    last = index + pages_of(level) - U1
    noted = vms_with_leaves(state, node, index, index + U1) & vms_with_leaves(state, node, last, last + U1)
    expect(m, noted >> vm & U1 != U0, BROKEN_COUNTS, index)
    if level_is_folios(m) and level != U1:
        block = block_row(m, node, index)
        private = is_shared(m, node, index) == U0  # and so all pages below the leaf
        alone = private if state[block + B_STATE] == BLOCK_PARTLY else shared_in_block(m, node, index) == U0
        kept = (alone and state[block + B_WAITS] != U0) or (private and not zap_rounded(m))
        expect(m, kept or U9 * (level - U1) <= order_at(m, node, index), BROKEN_LEAF_OVER_FOLIO, index)
    expect(m, is_own(m, node, index, level), BROKEN_STALE_CONTENTS, index)


@outlined
def check_new_leaf(m, vm, gfn, level):
    """A leaf that a fault has just installed is no larger than its folio, whatever leaves of before may be."""
    slot = find_memslot(m.state, vm, gfn)
    index = gfn - m.state[slot + M_BASE_GFN] + m.state[slot + M_PGOFF]
    fits = U9 * (level - U1) <= order_at(m, inode_row(m.state[slot + M_INODE]), index)
    expect(m, fits, BROKEN_LEAF_OVER_FOLIO, index)


@kernel
def check_block(m, node, index):
    """Where folios are split, an allocated block is huge if and only if none of its pages is shared. 4K folios are as
    they are.
    """
    kind = m.state[block_row(m, node, index) + B_STATE]
    if m.state[R_ORDER] == U0:
        expect(m, kind != BLOCK_SPLIT, BROKEN_BLOCK_STATE, index)
        return
    if not splits_folios(m):
        return
    shared = shared_in_block(m, node, index)
    if kind == BLOCK_HUGE:
        expect(m, shared == U0, BROKEN_BLOCK_STATE, index)
    elif kind == BLOCK_SPLIT or kind == BLOCK_PARTLY:
        waits = m.state[block_row(m, node, index) + B_WAITS] != U0
        expect(m, shared != U0 or waits, BROKEN_BLOCK_STATE, index)


@kernel
def check_range(m, inode, start, end):
    """After a conversion or a hole: its blocks, the host entries and the stage-2 leaves over pages [start, end)."""
    state = m.state
    node = inode_row(inode)
    pages = U1 << state[R_ORDER]
    index = start & ~(pages - U1)
    while index < end:
        check_block(m, node, index)
        index += pages
    for i in range(state[R_VMAS]):
        row = vma_row(i)
        first, last = vma_overlap(state, row, inode, start, end)
        root = space_root(state, state[row + A_SPACE])
        for address in range(first, last, U(4096)):
            slot, level = find_leaf(m, host_format(m), root, address >> U12)
            if slot != NONE:
                check_host_leaf(m, row, address, level, m.ram[slot])
    slot = first_binding(state, inode, start, end)
    while slot != U0:
        check_slot_range(m, slot, start, end)
        slot = next_binding(state, slot, start, end)


@kernel
def check_slot_range(m, slot, start, end):
    """The stage-2 leaves of one slot over pages [start, end)."""
    state = m.state
    low = max(start, state[slot + M_PGOFF])
    high = min(end, state[slot + M_PGOFF] + state[slot + M_PAGES])
    if low >= high:
        return
    row = vm_row(state[slot + M_VM])
    check_slot_tree(m, slot, state[row + V_ROOT], low, high)
    if state[row + V_PRIVATE_ROOT] != state[row + V_ROOT]:
        check_slot_tree(m, slot, state[row + V_PRIVATE_ROOT], low, high)


@kernel
def check_slot_tree(m, slot, root, low, high):
    """The same below one root, of pages [low, high) of the slot."""
    state = m.state
    vm = state[slot + M_VM]
    gfn = low - state[slot + M_PGOFF] + state[slot + M_BASE_GFN]
    last = high - state[slot + M_PGOFF] + state[slot + M_BASE_GFN]
    f = stage2_format(m)
    while gfn < last:
        leaf, level = find_leaf(m, f, root, gfn)
        size = pages_of(level)
        if leaf != NONE:
            check_stage2_leaf(m, vm, root, gfn & ~(size - U1), level, m.ram[leaf])
        elif level == U1:
            size = U1
        gfn = (gfn & ~(size - U1)) + size


@kernel
def check_guest_leaf(m, op, root):
    """The leaf of a guest's access below a root, if it has one there."""
    vm = m.state[op + O_VM]
    gfn = m.state[op + O_ADDRESS] >> U12
    slot, level = find_leaf(m, stage2_format(m), root, gfn)
    if slot != NONE:
        check_stage2_leaf(m, vm, root, gfn & ~(pages_of(level) - U1), level, m.ram[slot])
        if np.int64(m.state[op + O_STATUS]) == RET_PF_FIXED and level_is_folios(m):
            check_new_leaf(m, vm, gfn, level)


@outlined
def check_conserved(m, kind):
    """After an operation of any kind: no frame and no huge page was lost, and every invalidation has ended."""
    state = m.state
    frames = m.stats[STATS_GAUGES + GAUGE_FRAMES_USED * U2]
    owned = (
        m.stats[STATS_GAUGES + GAUGE_HOST_TABLES * U2]
        + m.stats[STATS_GAUGES + GAUGE_STAGE2_TABLES * U2]
        + m.stats[STATS_GAUGES + GAUGE_KERNEL_TABLES * U2]
        + m.stats[STATS_GAUGES + GAUGE_VMEMMAP_PAGES * U2]
        + m.stats[STATS_GAUGES + GAUGE_CONTENT_FRAMES * U2]
        + m.stats[STATS_GAUGES + GAUGE_CACHE_NODES * U2]
        + m.stats[STATS_GAUGES + GAUGE_ANONYMOUS_PAGES * U2]
        + m.stats[STATS_GAUGES + GAUGE_PAGE_CACHE_PAGES * U2]
    )
    others = object_frames(m) + state[R_EDIT_FRAMES] + (U1 if state[R_ZERO_FRAME] != U0 else U0)
    others += state[R_POISONED_FRAMES] + state[R_PINNED_ALONE]
    expect(m, frames == owned + np.int64(others), BROKEN_FRAMES, kind)
    blocks = (
        m.stats[STATS_GAUGES + GAUGE_BLOCKS_HUGE * U2]
        + m.stats[STATS_GAUGES + GAUGE_BLOCKS_SPLIT * U2]
        + m.stats[STATS_GAUGES + GAUGE_BLOCKS_PARTLY * U2]
        + m.stats[STATS_GAUGES + GAUGE_BLOCKS_ZOMBIE * U2]
        + m.stats[STATS_GAUGES + GAUGE_POOL_FREE * U2]
        + m.stats[STATS_GAUGES + GAUGE_HUGETLB_PAGES * U2]
    )
    expect(m, U(blocks) + state[R_FOLIOS_IN_HAND] == state[state[R_HSTATE] + H_PAGES], BROKEN_FRAMES, kind)
    if state[R_STEPPED] == U0:  # else one may be under way
        for vm in range(state[R_VMS]):
            expect(m, state[vm_row(vm) + V_IN_PROGRESS] == U0, BROKEN_IN_PROGRESS, vm)


@outlined
def check_operation(m, op):
    """The rules for what one operation of the designs touched. Broken ones are counted in the registers."""
    state = m.state
    kind = state[op + O_OP]
    check_conserved(m, kind)
    if kind == OP_HOST_FAULT:
        address = state[op + O_ADDRESS]
        row = find_vma(state, state[op + O_SPACE], address)
        if row != NONE:
            slot, level = find_leaf(m, host_format(m), space_root(state, state[op + O_SPACE]), address >> U12)
            if slot != NONE:
                check_host_leaf(m, row, address, level, m.ram[slot])
    elif kind == OP_GUEST_FAULT and find_memslot(state, state[op + O_VM], state[op + O_ADDRESS] >> U12) != NONE:
        row = vm_row(state[op + O_VM])
        check_guest_leaf(m, op, state[row + V_ROOT])
        if state[row + V_PRIVATE_ROOT] != state[row + V_ROOT]:
            check_guest_leaf(m, op, state[row + V_PRIVATE_ROOT])
    elif kind == OP_CONVERT and state[op + O_ROUND_END] > U0:
        check_range(m, state[op + O_INODE], state[op + O_ROUND_START], state[op + O_ROUND_END])
    elif kind == OP_PUNCH_HOLE and state[op + O_OBJECT] < state[R_INODES]:
        pages = state[inode_row(state[op + O_OBJECT]) + I_PAGES]
        start = state[op + O_OFFSET] >> U12
        length = state[op + O_LENGTH] >> U12
        if start < pages:
            check_range(m, state[op + O_OBJECT], start, min(start + length, pages))
