"""Mappings of a process: their rows, cut and merged, given an anon_vma; who is told what happens to them. mm/vma.c"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import LOW32, NONE, U0, U1, U2, U3, U4, U9, U12, U30
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.geometry import index_at, size_of
from pgemu_kernels.engine.handle import full_only
from pgemu_kernels.engine.rows import clear_words, find_vma, free_row, inode_row, space_root, vma_row
from pgemu_kernels.folios.folio import PRIVATE, struct_page
from pgemu_kernels.folios.hstate import in_zone
from pgemu_kernels.folios.huge_pages import level_of_order
from pgemu_kernels.process.entries import holds_page, leaf_pfn, points_to_table
from pgemu_kernels.process.huge_pmd import is_huge_anonymous, split_huge_pmd
from pgemu_kernels.process.tables import below, lookup_address
from pgemu_kernels.stage2.invalidate import notify_unmap
from pgemu_kernels.stage2.notifier import notify_range
from pgemu_kernels.stage2.pfn_caches import invalidate_caches
from pgemu_kernels.stage2.userspace import goes_by_address
from pgemu_kernels.words.enum_words import DEFECT_CUT_HUGE_PFN
from pgemu_kernels.words.operations import EINVAL, ENOMEM, NEVER
from pgemu_kernels.words.registers import R_ANON_VMAS, R_DEFECTS, R_MAPPINGS, R_MERGES_UNFAULTED, R_VMAS
from pgemu_kernels.words.rows import (
    A_ANON_VMA,
    A_CLONED,
    A_END,
    A_FLAGS,
    A_INODE,
    A_KIND,
    A_LIVE,
    A_NEXT,
    A_PGOFF,
    A_PROT,
    A_RESERVED,
    A_SPACE,
    A_START,
    A_WORDS,
    I_ORDER,
    I_REFERENCES,
    I_VMAS,
    VM_PFNMAP,
    VM_SHARED,
    VMA_ANONYMOUS,
    VMA_GUEST_MEMFD,
    VMA_HUGETLB,
    VMAS,
)

U = np.uint64
RESERVED = U(1)  # in a word of a hugetlbfs file's page cache: this page is reserved, or was and is allocated


@kernel
def new_vma(state):
    """A row for one more VMA, or NONE: vm.max_map_count of this machine is words.VMAS."""
    return free_row(state, R_VMAS, U(VMAS), U(A_WORDS), A_LIVE, vma_row(U0))


@kernel
def remove_row(state, row):
    """Clear the row of a VMA that no list has."""
    clear_words(state, row, U(A_WORDS))


@kernel
def copy_vma(state, row):
    """A row for one more VMA with the words of another one, in no list yet: or NONE."""
    copy = new_vma(state)
    if copy != NONE:
        for word in range(U(A_WORDS)):
            state[copy + word] = state[row + word]
    return copy


@outlined
def link_vma(state, row):
    """Enter a VMA of a file in its inode's list, which is in the order of rows. mm/vma.c:__vma_link_file()"""
    at = inode_row(state[row + A_INODE]) + I_VMAS
    while state[at] != U0 and state[at] < row:
        at = state[at] + A_NEXT
    state[row + A_NEXT] = state[at]
    state[at] = row
    state[R_MAPPINGS] += U1


@outlined
def unlink_vma(state, row):
    """Take a VMA of a file out of its inode's list. mm/vma.c:__remove_shared_vm_struct()"""
    at = inode_row(state[row + A_INODE]) + I_VMAS
    while state[at] != row:
        at = state[at] + A_NEXT
    state[at] = state[row + A_NEXT]
    state[R_MAPPINGS] += U1


@kernel
def first_vma(state, inode):
    """The first VMA of an inode, or 0; A_NEXT of each leads to the next."""
    return state[inode_row(inode) + I_VMAS]


@kernel
def next_vma(state, space, address, end):
    """The first VMA of a process that ends after `address` and begins before `end`: its row, or NONE."""
    row = find_vma(state, space, address)
    if row != NONE:
        return row
    best = NONE
    begin = end
    for i in range(state[R_VMAS]):
        row = vma_row(i)
        if state[row + A_SPACE] == space and address < state[row + A_END] and state[row + A_START] < begin:
            best = row
            begin = state[row + A_START]
    return best


@kernel
def row_at(state, space, address, word):
    """The VMA of a process whose start (word A_START) or end (A_END) is an address, or NONE."""
    for i in range(state[R_VMAS]):
        row = vma_row(i)
        if state[row + A_LIVE] != U0 and state[row + A_SPACE] == space and state[row + word] == address:
            return row
    return NONE


@kernel
def is_shared_mapping(state, row):
    return state[row + A_FLAGS] & VM_SHARED != U0


@kernel
def huge_order(state, row):
    """Order of the pages of a HugeTLB mapping; 0 of any other."""
    return state[inode_row(state[row + A_INODE]) + I_ORDER] if state[row + A_KIND] == VMA_HUGETLB else U0


@kernel
def page_offset(state, row, address):
    """Page of the file that a VMA shows at an address, which may lie before it; of anonymous memory its place in the
    anon_vma."""
    return state[row + A_PGOFF] + (address >> U12) - (state[row + A_START] >> U12)


@kernel
def holds_file(state, row):
    """Whether a VMA keeps its file: all but anonymous memory and, for their inodes go with the VMM, the designs'."""
    return state[row + A_KIND] != VMA_ANONYMOUS and state[row + A_KIND] != VMA_GUEST_MEMFD


# --------------------------------------------------------------------------- who is told


@kernel
def _notify_pages(m, row, start, end):
    """A mapping of the designs: slots of its process's VMs that have its addresses show, but for odd ones, its pages
    there, and the inode knows who has leaves."""
    if goes_by_address(m.state, m.state[row + A_INODE]):
        notify_range(m, m.state[row + A_SPACE], start, end)
        return
    invalidate_caches(m, m.state[row + A_SPACE], start, end)
    index = page_offset(m.state, row, start)
    notify_unmap(m, m.state[row + A_SPACE], m.state[row + A_INODE], index, index + ((end - start) >> U12))


@kernel
def _notify(m, row, start, end):
    if m.state[row + A_KIND] == VMA_GUEST_MEMFD:
        _notify_pages(m, row, start, end)
    else:
        notify_range(m, m.state[row + A_SPACE], start, end)


# mmu_notifier_invalidate_range_start(): (m, row, start, end), addresses of a VMA and its process's VMs
notify = full_only(_notify, _notify_pages)


@outlined
def _split_any(m, row, slot):
    if is_huge_anonymous(m.state, row, m.ram[slot], U2):
        split_huge_pmd(m, row, slot)


_split_huge = full_only(_split_any, None)  # the fast loops know no huge pages of anonymous memory


@outlined
def _notify_split(m, row, address):
    """A VMA is about to be cut at an address: if that lies inside a 2M block which the VMA holds whole, VMs lose what
    lies over the block, although it may hold no huge page; one that it holds is split.

    mm/huge_memory.c:split_huge_pmd_if_needed(), __split_huge_pmd(): the notifier runs before anybody looks whether
    the entry is a huge one; only a table of 2M entries must be there (captured: mprotect of two pages).
    """
    first = address & ~(size_of(U2) - U1)
    last = first + size_of(U2)
    if first == address or first < m.state[row + A_START] or last > m.state[row + A_END]:
        return
    slot, level = _slot_of_level3(m, row, address)
    if level == U3 and points_to_table(m.ram[slot]):
        notify(m, row, first, last)
        _split_huge(m, row, below(m, slot) + index_at(address >> U12, U2))


# --------------------------------------------------------------------------- anon_vma and merging


@kernel
def _continues(state, lower, upper):
    """Whether two VMAs touch and differ in nothing but permissions. mm/vma.c:anon_vma_compatible()"""
    pages = (state[lower + A_END] - state[lower + A_START]) >> U12
    return (
        state[lower + A_END] == state[upper + A_START]
        and state[lower + A_KIND] == state[upper + A_KIND]
        and (state[lower + A_KIND] == VMA_ANONYMOUS or state[lower + A_INODE] == state[upper + A_INODE])
        and state[lower + A_FLAGS] == state[upper + A_FLAGS]
        and state[lower + A_PGOFF] + pages == state[upper + A_PGOFF]
    )


@kernel
def _same_anon_vma(state, row, neighbour):
    """mm/vma.c:is_mergeable_anon_vma(): the same one, or one has none and the other was not cloned by fork."""
    own = state[row + A_ANON_VMA]
    other = state[neighbour + A_ANON_VMA]
    if own == other:
        return True
    if own == U0:
        return state[neighbour + A_CLONED] == U0
    return other == U0 and state[row + A_CLONED] == U0 and state[R_MERGES_UNFAULTED] != U0


@kernel
def _mergeable(state, lower, upper, row, neighbour):
    """Whether a VMA can be one with a neighbour, the lower or the upper. can_vma_merge_before(), _after()"""
    if lower == NONE or upper == NONE or not _continues(state, lower, upper):
        return False
    return state[lower + A_PROT] == state[upper + A_PROT] and _same_anon_vma(state, row, neighbour)


@kernel
def _join(state, lower, upper):
    """One VMA out of two; the lower one's row stays."""
    state[lower + A_END] = state[upper + A_END]
    if state[lower + A_ANON_VMA] == U0:
        state[lower + A_ANON_VMA] = state[upper + A_ANON_VMA]
        state[lower + A_CLONED] = state[upper + A_CLONED]
    if state[upper + A_KIND] != VMA_ANONYMOUS:
        unlink_vma(state, upper)
        if holds_file(state, upper):
            state[inode_row(state[upper + A_INODE]) + I_REFERENCES] -= U1
    remove_row(state, upper)


@outlined
def vma_merge(state, row):
    """Merge a VMA with its neighbours where Linux does: the row of the result. mm/vma.c:vma_merge_new_range().

    HugeTLB and PFN mappings are VM_SPECIAL and are not merged. Where both neighbours would do but have different
    anon_vmas, the lower one wins.
    """
    if state[row + A_KIND] == VMA_HUGETLB or state[row + A_FLAGS] & VM_PFNMAP != U0:
        return row
    space = state[row + A_SPACE]
    lower = row_at(state, space, state[row + A_START], A_END)
    upper = row_at(state, space, state[row + A_END], A_START)
    left = _mergeable(state, lower, row, row, lower)
    right = _mergeable(state, row, upper, row, upper)
    if left and right and state[lower + A_ANON_VMA] != U0 and state[upper + A_ANON_VMA] != U0:
        right = state[lower + A_ANON_VMA] == state[upper + A_ANON_VMA]  # can_vma_merge_right()
    if right:
        _join(state, row, upper)
    if left:
        _join(state, lower, row)
        return lower
    return row


@kernel
def _new_anon_vma(state):
    state[R_ANON_VMAS] += U1
    return state[R_ANON_VMAS]


@outlined
def prepare_anon_vma(state, row):
    """__anon_vma_prepare(): take the anon_vma of a neighbour that could be merged but for its rights, or a new one."""
    if state[row + A_ANON_VMA] != U0:
        return
    space = state[row + A_SPACE]
    upper = row_at(state, space, state[row + A_END], A_START)
    lower = row_at(state, space, state[row + A_START], A_END)
    for neighbour, first, second in ((upper, row, upper), (lower, lower, row)):
        if neighbour != NONE and state[neighbour + A_ANON_VMA] != U0 and state[neighbour + A_CLONED] == U0:
            if _continues(state, first, second):
                state[row + A_ANON_VMA] = state[neighbour + A_ANON_VMA]
                return
    state[row + A_ANON_VMA] = _new_anon_vma(state)


@kernel
def clone_anon_vma(state, row):
    """anon_vma_fork(): the child's VMA gets an anon_vma of its own that has a parent."""
    if state[row + A_ANON_VMA] != U0:
        state[row + A_ANON_VMA] = _new_anon_vma(state)
        state[row + A_CLONED] = U1


# --------------------------------------------------------------------------- cutting


@outlined
def unshare_table(m, slot):
    """If the level-2 table at a level-3 slot is shared with other mappings, let go of it. huge_pmd_unshare()."""
    frame = below(m, slot) >> U9
    if m.ram[slot] & U1 == U0 or m.counts[frame] == np.uint32(0):
        return False
    m.counts[frame] = np.uint32(U(m.counts[frame]) - U1)
    m.ram[slot] = U0
    return True


@outlined
def mapped_huge_pages(m, row, start, end):
    """Entries of a private HugeTLB mapping that hold a page."""
    order = huge_order(m.state, row)
    level = level_of_order(order)
    found = U0
    address = start
    while address < end:
        slot, at = lookup_address(m, space_root(m.state, m.state[row + A_SPACE]), address)
        if at <= level and holds_page(m.ram[slot]):
            found += U1
        address += size_of(level)
    return found


@outlined
def _may_cut_any(m, row, address):
    """hugetlb_vm_op_split(): a HugeTLB mapping is cut between its pages only."""
    return address & ((U1 << (U12 + huge_order(m.state, row))) - U1) == U0


_may_split = full_only(_may_cut_any, True)


@outlined
def _divide(m, row, upper):
    """vm_ops->open() of the upper part: a hold on the file, and its share of what is reserved.

    Where a HugeTLB mapping is cut inside an aligned 1G whose table it shares, it lets go of the table: hugetlb_split().
    """
    state = m.state
    address = state[upper + A_START]
    order = huge_order(state, row)
    region = address >> U30 << U30
    if order == U9 and region != address and region >= state[row + A_START]:
        if region + size_of(U3) <= state[upper + A_END]:
            slot, level = _slot_of_level3(m, row, address)
            if level == U3:
                unshare_table(m, slot)
    if holds_file(state, row):
        state[inode_row(state[row + A_INODE]) + I_REFERENCES] += U1
    if order != U0:
        _divide_reservation(m, row, upper, order)


_open_upper = full_only(_divide, None)  # a mapping of the designs holds nothing of its own


@outlined
def locks_of_no_table(m, row, address):
    """Defect.CUT_HUGE_PFN: whether cutting a VMA at an address inside a 1G PFN entry, off 2M, never ends.

    mm/huge_memory.c:split_huge_pmd_address() takes what mm_find_pmd() returns for a table of 2M entries, which under a
    leaf of 1G is the page's memory, and its lock for one that lies in the struct page. A device's memory has none: a
    crash (captured of 6.12, 6.18 and 7.3). Of RAM the word holds page->private, from which flags of a HugeTLB page look
    like a lock that is held; where it is 0 the lock is taken and given back (inference from pmd_lockptr()).
    """
    if m.state[R_DEFECTS] & DEFECT_CUT_HUGE_PFN == U0 or m.state[row + A_FLAGS] & VM_PFNMAP == U0:
        return False
    first = address & ~(size_of(U2) - U1)
    if first == address or first < m.state[row + A_START] or first + size_of(U2) > m.state[row + A_END]:
        return False
    slot, level = _slot_of_level3(m, row, address)
    entry = m.ram[slot]
    if level != U3 or points_to_table(entry) or not holds_page(entry):
        return False
    pfn = leaf_pfn(entry, U3)
    return not in_zone(m.state, pfn) or m.ram[struct_page(m, pfn) + PRIVATE] & LOW32 != U0


cut_never_ends = full_only(locks_of_no_table, False)  # the fast loops know no large entries of processes


@outlined
def split_vma(m, row, address):
    """Cut a VMA in two at an address inside it: 0 and the row of the upper part, or -EINVAL, -ENOMEM, -NEVER and NONE.

    mm/vma.c:__split_vma()
    """
    state = m.state
    if not _may_split(m, row, address):
        return np.int64(-EINVAL), NONE
    if cut_never_ends(m, row, address):
        return np.int64(-NEVER), NONE
    upper = copy_vma(state, row)
    if upper == NONE:
        return np.int64(-ENOMEM), NONE
    _notify_split(m, row, address)
    state[upper + A_START] = address
    state[upper + A_PGOFF] = page_offset(state, row, address)
    state[row + A_END] = address
    if state[row + A_KIND] != VMA_ANONYMOUS:
        link_vma(state, upper)
    _open_upper(m, row, upper)
    return np.int64(0), upper


@kernel
def _slot_of_level3(m, row, address):
    """Slot of level 3 for an address of a VMA and 3, or another level where there is no such table."""
    root = space_root(m.state, m.state[row + A_SPACE])
    slot = (root >> U3) + index_at(address >> U12, U4)
    if m.ram[slot] & U1 == U0:
        return slot, U4
    return below(m, slot) + index_at(address >> U12, U3), U3


@kernel
def _divide_reservation(m, row, upper, order):
    """Each part of a private mapping keeps the reservation of its pages that are not allocated."""
    state = m.state
    if state[row + A_RESERVED] == U0:
        return
    start = state[upper + A_START]
    end = state[upper + A_END]
    pages = (end - start) >> (U12 + order)
    keep = min(pages - mapped_huge_pages(m, upper, start, end), state[row + A_RESERVED])
    state[upper + A_RESERVED] = keep
    state[row + A_RESERVED] -= keep
