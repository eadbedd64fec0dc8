"""The whole machine recounted: every table walked, every frame given its one owner, every kept count compared."""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U2, U3, U4, U9, U12, U18, U511, U512
from pgemu_kernels.engine.compile import entry, kernel, outlined
from pgemu_kernels.engine.geometry import pages_of
from pgemu_kernels.engine.handle import open_machine
from pgemu_kernels.engine.rows import block_row, broken, find_vma, inode_row, vm_row
from pgemu_kernels.engine.shareability import is_shared
from pgemu_kernels.folios.buddy import free_area, is_buddy, pcp_list
from pgemu_kernels.folios.folio import COUNTS, INDEX, MAPPING, NO_MAPCOUNT, struct_page
from pgemu_kernels.folios.hstate import first_page, hstate_node, links_of, list_head, page_after
from pgemu_kernels.folios.hugetlb import mapping_address
from pgemu_kernels.folios.large_folios import head_and_order
from pgemu_kernels.folios.xarray import has_pieces, nodes_of, object_frames
from pgemu_kernels.formats.bits import PTE_ADDRESS, PTE_LARGE, PTE_SPECIAL, PTE_WRITE
from pgemu_kernels.rules.blocks import check_blocks
from pgemu_kernels.rules.invariants import check_block, check_host_leaf, expect, expect_gauge
from pgemu_kernels.rules.kvm import check_leaf
from pgemu_kernels.rules.processes import recount_of_process
from pgemu_kernels.rules.references import check_folio, check_outside, check_pieces
from pgemu_kernels.rules.slots import check_slots
from pgemu_kernels.stage2.leaves import leaves_below
from pgemu_kernels.tables.walker import is_large, is_present, stage2_format, table_of
from pgemu_kernels.words.enum_words import (
    BROKEN_COUNTS,
    BROKEN_FRAMES,
    BROKEN_IN_PROGRESS,
    BROKEN_REFERENCES,
    BROKEN_VMEMMAP,
    BROKEN_WRONG_PFN,
    GAUGE_BLOCKS_HUGE,
    GAUGE_BLOCKS_PARTLY,
    GAUGE_BLOCKS_SPLIT,
    GAUGE_BLOCKS_ZOMBIE,
    GAUGE_BUDDY_BLOCKS,
    GAUGE_CACHE_NODES,
    GAUGE_CONTENT_FRAMES,
    GAUGE_FRAMES_USED,
    GAUGE_HOST_LEAVES_4K,
    GAUGE_HOST_TABLES,
    GAUGE_HUGETLB_PAGES,
    GAUGE_KERNEL_TABLES,
    GAUGE_MEMMAP_BOOT_PAGES,
    GAUGE_MEMMAP_PAGES,
    GAUGE_POOL_FREE,
    GAUGE_STAGE2_LEAVES_4K,
    GAUGE_STAGE2_TABLES,
    GAUGE_VMEMMAP_PAGES,
    GAUGE_XARRAY_NODES,
)
from pgemu_kernels.words.events import GAUGES, STATS_GAUGES
from pgemu_kernels.words.registers import (
    R_BROKEN,
    R_CONTENTS,
    R_FOLIOS_IN_HAND,
    R_FREE,
    R_FREE_STACK,
    R_GUEST_PAGES,
    R_HOLDERS_OFF,
    R_HOST_HUGE,
    R_HSTATE,
    R_INODES,
    R_KERNEL_ROOT,
    R_NODE_FRAMES,
    R_NODES,
    R_ORDER,
    R_ORDINARY,
    R_SPACES,
    R_VMS,
)
from pgemu_kernels.words.rows import (
    B_PFN,
    B_STATE,
    BLOCK_HUGE,
    BLOCK_SPLIT,
    FOUND_NODES,
    FOUND_RSS,
    FOUND_TABLES,
    FREE_ORDERS,
    H_FREE,
    H_NODE_TAIL_PAGE,
    H_PAGES,
    H_WORDS,
    HSTATES,
    I_BLOCKS,
    I_KIND,
    I_OPEN,
    I_PAGES,
    I_PMD,
    I_PUD,
    INODE_GUEST_MEMFD,
    STATE_HSTATES,
    STATE_PCP_COUNTS,
    TABLE_MIRROR,
    V_IN_PROGRESS,
    V_PRIVATE_ROOT,
    V_ROOT,
)

U = np.uint64


@kernel
def own(m, owner, frame, kind):
    """Mark a frame as owned; owned twice is broken."""
    expect(m, owner[frame] == np.uint8(0), BROKEN_FRAMES, frame)
    owner[frame] = np.uint8(kind)


@outlined
def check_designs_leaf(m, space, address, level, entry, owner, found):
    """An entry of a process that maps inodes of the designs only."""
    found[level - U1] += 1
    row = find_vma(m.state, space, address)
    if row == NONE:
        broken(m.state, BROKEN_WRONG_PFN, address >> U12)
        return
    check_host_leaf(m, row, address, level, entry)
    found[FOUND_RSS] += np.int64(entry & PTE_SPECIAL == U0)


check_space = recount_of_process(check_designs_leaf)


@kernel
def check_below(m, root, table, leaves, gfn):
    """What a table page keeps: how many leaves are below, and whether it is of the mirror."""
    expect(m, leaves_below(m, table) == leaves, BROKEN_COUNTS, gfn)
    expect(m, (m.counts[table >> U9] ^ m.counts[root >> U12]) & np.uint32(TABLE_MIRROR) == U0, BROKEN_COUNTS, gfn)


@kernel
def no_table(m, vm, root, gfn, table, owner, leaves):
    """Below level 1."""
    return np.int64(0), U0


def recount_of_stage2(level: np.uint64, lower: Any) -> Any:
    """A walk of a stage-2 table of a level, by the words of its frame, and (`lower`) of those below it.

    (m, vm, root, gfn, table, owner, leaves): (int64: how many tables, uint64: how many leaves); leaves by level are
    added to `leaves` (int64[3]).
    """

    @outlined
    def walk_stage2(m, vm, root, gfn, table, owner, leaves):
        state = m.state
        f = stage2_format(m)
        own(m, owner, table >> U9, 2)
        tables = np.int64(1)
        found = U0
        for i in range(U512):
            entry = m.ram[table + i]
            at = gfn | i * pages_of(level)
            if not is_present(state, f, entry):
                continue
            if level == U1 or (level < U4 and is_large(state, f, entry)):
                leaves[level - U1] += 1
                found += U1
                check_leaf(m, vm, root, at, level, entry)
            else:
                more_tables, more = lower(m, vm, root, at, table_of(state, f, entry), owner, leaves)
                tables += more_tables
                found += more
        if level < U3:
            check_below(m, root, table, found, gfn)
        return tables, found

    return walk_stage2


check_tree = reduce(lambda lower, level: recount_of_stage2(level, lower), (U1, U2, U3, U4), no_table)


@kernel
def check_vm(m, vm, owner, leaves):
    """Walk a VM's stage-2 tables: how many tables; leaves by level are added to `leaves` (int64[3])."""
    root = m.state[vm_row(vm) + V_ROOT]
    private = m.state[vm_row(vm) + V_PRIVATE_ROOT]
    tables = np.int64(0)
    if root != U0:  # else it is closed
        tables, _ = check_tree(m, vm, root, U0, root >> U3, owner, leaves)
    if private != root:
        more, _ = check_tree(m, vm, private, U0, private >> U3, owner, leaves)
        tables += more
    return tables


@outlined
def check_vmemmap(m, owner):
    """Walk the kernel's table: (tables, vmemmap pages); a read-write page has one owner, shared ones are read-only."""
    state = m.state
    ram = m.ram
    root = state[R_KERNEL_ROOT]
    own(m, owner, root >> U12, 3)
    tables = np.int64(1)
    pages = np.int64(0)
    last = U0
    made = m.stats[STATS_GAUGES + GAUGE_MEMMAP_PAGES * U2] + m.stats[STATS_GAUGES + GAUGE_MEMMAP_BOOT_PAGES * U2]
    for i in range(U(HSTATES)):
        for node in range(state[R_NODES]):
            tail = state[hstate_node(STATE_HSTATES + i * U(H_WORDS), node) + H_NODE_TAIL_PAGE]
            if tail != U0:
                own(m, owner, tail, 4)
                pages += 1
                made += 1
    for i4 in range(U512):
        e4 = ram[(root >> U3) + i4]
        if e4 & U1 == U0:
            continue
        own(m, owner, (e4 & PTE_ADDRESS) >> U12, 3)
        tables += 1
        for i3 in range(U512):
            e3 = ram[((e4 & PTE_ADDRESS) >> U3) + i3]
            if e3 & U1 == U0:
                continue
            own(m, owner, (e3 & PTE_ADDRESS) >> U12, 3)
            tables += 1
            for i2 in range(U512):
                e2 = ram[((e3 & PTE_ADDRESS) >> U3) + i2]
                if e2 & U1 == U0:
                    continue
                if e2 & PTE_LARGE != U0:
                    pages += 512
                    for k in range(U512):
                        own(m, owner, ((e2 & PTE_ADDRESS) >> U12) + k, 4)
                    continue
                own(m, owner, (e2 & PTE_ADDRESS) >> U12, 3)
                tables += 1
                for i1 in range(U512):
                    e1 = ram[((e2 & PTE_ADDRESS) >> U3) + i1]
                    # 6.18 maps a boot 1G page's own page read-write 4033 times: they follow one another.
                    if e1 & U1 != U0 and e1 & PTE_WRITE != U0 and e1 & PTE_ADDRESS != last:
                        last = e1 & PTE_ADDRESS
                        own(m, owner, last >> U12, 4)
                        pages += 1
    expect(m, made == pages, BROKEN_VMEMMAP, U(made))
    return tables, pages


@kernel
def check_small_page(m, inode, index, pfn):
    """A 4K page of an inode: its folio's struct page names its place. References, where it is the folio's first."""
    head, order = head_and_order(m, pfn)
    page = struct_page(m, head)
    place = m.ram[page + INDEX] + (pfn - head)
    expect(m, m.ram[page + MAPPING] == mapping_address(inode) and place == index, BROKEN_REFERENCES, index)
    if head == pfn:
        check_folio(m, head, U1 << order)


@outlined
def check_inode(m, inode):
    """Block states and the kept counts of an inode against its bits, and its folios' references."""
    state = m.state
    node = inode_row(inode)
    pages = state[node + I_PAGES]
    for first in range(U0, pages, U512):
        shared = U0
        for index in range(first, min(first + U512, pages)):
            shared += is_shared(m, node, index)
        expect(m, U(m.counts[state[node + I_PMD] + (first >> U9)]) == shared, BROKEN_COUNTS, first)
    for first in range(U0, pages, U1 << U18):
        shared = U0
        for pmd in range(first >> U9, min((first >> U9) + U512, (pages + U511) >> U9)):
            shared += U(m.counts[state[node + I_PMD] + pmd])
        expect(m, U(m.counts[state[node + I_PUD] + (first >> U18)]) == shared, BROKEN_COUNTS, first)
    order = state[R_ORDER]
    for block in range(state[node + I_BLOCKS]):
        row = block_row(m, node, block << order)
        kind = m.state[row + B_STATE]
        check_block(m, node, block << order)
        head = m.state[row + B_PFN]
        if kind == BLOCK_HUGE and order == U0:
            check_small_page(m, inode, block, head)
        elif kind == BLOCK_HUGE:
            check_folio(m, head, U1 << order)
        elif kind == BLOCK_SPLIT:
            check_pieces(m, head, U1 << order, U1)


@outlined
def check_free_areas(m):
    """The lists of free blocks and pages: links, marks, and as many pages as are free (page_size 4096)."""
    state = m.state
    free = U(m.stats[STATS_GAUGES + GAUGE_BUDDY_BLOCKS * U2]) << U9
    for node in range(state[R_NODES]):
        for order in range(U(FREE_ORDERS)):
            row = free_area(node, order)
            before = list_head(row)
            pfn = first_page(state, row)
            while pfn != U0:
                expect(m, is_buddy(m, pfn, order) and pfn & ((U1 << order) - U1) == U0, BROKEN_FRAMES, pfn)
                expect(m, not is_buddy(m, pfn ^ (U1 << order), order), BROKEN_FRAMES, pfn)
                expect(m, m.ram[struct_page(m, pfn) + U2] == before, BROKEN_COUNTS, pfn)
                before = links_of(m, pfn)
                free += U1 << order
                pfn = page_after(m, pfn)
            expect(m, state[row + U1] == before, BROKEN_COUNTS, order)
        waiting = U0
        pfn = first_page(state, pcp_list(node))
        while pfn != U0:
            expect(m, m.ram[struct_page(m, pfn) + COUNTS] == NO_MAPCOUNT, BROKEN_FRAMES, pfn)
            waiting += U1
            pfn = page_after(m, pfn)
        expect(m, state[STATE_PCP_COUNTS + node] == waiting, BROKEN_COUNTS, node)
        free += waiting
    expect(m, U(m.stats[STATS_GAUGES + GAUGE_POOL_FREE * U2]) == free, BROKEN_FRAMES, free)


@outlined
def check_objects(m, owner):
    """Frames of xarray nodes and stashes: as many as their counts ask for, and nodes for every split block."""
    state = m.state
    frames = U0
    frame = state[R_NODE_FRAMES]
    while frame != U0 and owner[frame] == np.uint8(0):
        own(m, owner, frame, 7)
        frames += U1
        frame = m.ram[frame << U9]
    expect(m, frame == U0, BROKEN_FRAMES, frame)
    nodes = U(m.stats[STATS_GAUGES + GAUGE_XARRAY_NODES * U2])
    blocks = U(m.stats[STATS_GAUGES + GAUGE_BLOCKS_SPLIT * U2])
    expect(m, object_frames(m) == frames, BROKEN_FRAMES, frames)
    if not has_pieces(state):  # else in piece_recount.py
        each = nodes_of(state, state[R_ORDER]) if state[R_ORDER] != U0 else U0
        expect(m, nodes == blocks * each, BROKEN_COUNTS, nodes)


@entry
def check(descriptor, owner, leaves, found):
    """Recount the whole machine and compare with what it keeps: how many rules are broken.

    `owner` uint8, one per frame of `ram`, `leaves` int64[3] and `found` int64[FOUND_WORDS] are scratch, zeroed by the
    caller. Where there is ordinary memory, or a process may have large leaves, ordinary_recount.check_ordinary() was
    there before. The first finding is in the register R_BROKEN_FIRST.
    """
    m = open_machine(descriptor)
    state = m.state
    gauges = m.stats[STATS_GAUGES : STATS_GAUGES + U(2 * GAUGES)]
    if state[R_ORDINARY] == U0 and state[R_HOST_HUGE] == U0:
        for space in range(state[R_SPACES]):
            check_space(m, space, owner, found)
        expect_gauge(m, GAUGE_CACHE_NODES, found[FOUND_NODES])
    check_slots(m)
    stage2_tables = np.int64(0)
    for vm in range(state[R_VMS]):
        stage2_tables += check_vm(m, vm, owner, leaves)
        expect(m, state[vm_row(vm) + V_IN_PROGRESS] == U0, BROKEN_IN_PROGRESS, vm)
    kernel_tables, pages = check_vmemmap(m, owner)
    for inode in range(state[R_INODES]):
        if state[inode_row(inode) + I_OPEN] != U0 and state[inode_row(inode) + I_KIND] == INODE_GUEST_MEMFD:
            check_inode(m, inode)
    check_outside(m)
    if state[R_HOLDERS_OFF] == U0:  # else references are counted again when they are back
        check_blocks(m)
    expect_gauge(m, GAUGE_HOST_TABLES, found[FOUND_TABLES])
    expect_gauge(m, GAUGE_HOST_LEAVES_4K, found[U0])
    expect_gauge(m, GAUGE_STAGE2_TABLES, stage2_tables)
    for level in range(U3):
        expect_gauge(m, GAUGE_STAGE2_LEAVES_4K + level, leaves[level])
    expect_gauge(m, GAUGE_KERNEL_TABLES, kernel_tables)
    expect(m, gauges[GAUGE_VMEMMAP_PAGES * U2] == pages, BROKEN_VMEMMAP, U(pages))
    if gauges[GAUGE_CONTENT_FRAMES * U2] != 0:
        for i in range(state[R_CONTENTS], state[R_CONTENTS] + state[R_GUEST_PAGES]):
            if m.counts[i] != np.uint32(0):
                own(m, owner, U(m.counts[i]), 5)
    check_objects(m, owner)
    for i in range(state[R_FREE]):
        own(m, owner, m.state[state[R_FREE_STACK] + i], 6)
    used = np.int64(0)
    for frame in range(U(owner.size)):
        if owner[frame] != np.uint8(0) and owner[frame] != np.uint8(6):
            used += 1
    expect(m, gauges[GAUGE_FRAMES_USED * U2] == used, BROKEN_FRAMES, U(used))
    blocks = gauges[GAUGE_BLOCKS_HUGE * U2] + gauges[GAUGE_BLOCKS_SPLIT * U2] + gauges[GAUGE_BLOCKS_ZOMBIE * U2]
    blocks += gauges[GAUGE_BLOCKS_PARTLY * U2] + gauges[GAUGE_HUGETLB_PAGES * U2]
    if state[R_ORDER] == U0:
        check_free_areas(m)
    h = state[R_HSTATE]
    held = state[h + H_FREE] + state[R_FOLIOS_IN_HAND]
    expect(m, U(blocks) + held == state[h + H_PAGES], BROKEN_FRAMES, U(blocks))
    return np.int64(state[R_BROKEN])
