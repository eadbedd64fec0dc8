"""Transient references on folios, and what the last one sets off."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.bits import NONE, U0, U1, U12, U511
from pgemu_kernels.compile import kernel, outlined
from pgemu_kernels.events import (
    BLOCKS_ZOMBIE,
    change,
)
from pgemu_kernels.folio import (
    COMPOUND,
    FLAGS,
    MAPPING,
    PG_HEAD,
    add_references,
    folio_order,
    is_huge_page,
    mappings,
    reference_count,
    struct_page,
)
from pgemu_kernels.gmem import (
    block_row,
    inode_row,
)
from pgemu_kernels.hstate import in_zone
from pgemu_kernels.hugetlb import mapping_address, return_to_pool, subpool_of
from pgemu_kernels.layout import (
    ACTORS,
    B_OUTSTANDING,
    B_PFN,
    B_STATE,
    B_WORDS,
    BLOCK_ABSENT,
    BLOCK_ZOMBIE,
    EBADF,
    ENOENT,
    I_KIND,
    I_OPEN,
    I_PAGES,
    INODE_GUEST_MEMFD,
    O_ADDRESS,
    O_DETAIL,
    O_OBJECT,
    O_OFFSET,
    O_REFERENCED,
    O_WORDS,
    R_BLOCK_ROWS,
    R_BLOCKS,
    R_EXTRA_REFERENCES,
    R_FAULT_REFERENCES,
    R_INODES,
    R_ORDER,
    STATE_OPS,
)
from pgemu_kernels.splitting import revive
from pgemu_kernels.steps import stop
from pgemu_kernels.xarray import has_pieces

U = np.uint64


@kernel
def folio_head(m, pfn):
    """First frame of the folio that holds `pfn`: the head of an unsplit huge page, else the page itself."""
    page = struct_page(m, pfn)
    if m.ram[page + COMPOUND] & U1 != U0 or m.ram[page + FLAGS] & PG_HEAD != U0:
        if has_pieces(m.state) and is_huge_page(m, pfn & ~U511):
            return pfn & ~U511  # a piece, or the huge page itself
        return pfn & ~((U1 << m.state[R_ORDER]) - U1)
    return pfn


@outlined
def get(m, op):
    """Take a transient reference on the folio of an inode's page: 0 with the frame number, or -ENOENT."""
    state = m.state
    inode = state[op + O_OBJECT]
    if inode >= state[R_INODES] or state[inode_row(inode) + I_OPEN] == U0:
        return stop(state, op, -EBADF)
    if state[op + O_OFFSET] >> U12 >= state[inode_row(inode) + I_PAGES]:
        return stop(state, op, -ENOENT)
    index = state[op + O_OFFSET] >> U12
    block = block_row(m, inode_row(inode), index)
    kind = m.state[block + B_STATE]
    if kind == BLOCK_ABSENT or kind == BLOCK_ZOMBIE:
        return stop(state, op, -ENOENT)
    pfn = m.state[block + B_PFN] + (index & ((U1 << state[R_ORDER]) - U1))
    add_references(m.ram, struct_page(m, folio_head(m, pfn)), U1)
    state[R_EXTRA_REFERENCES] += U1
    state[op + O_DETAIL] = pfn
    return stop(state, op, 0)


@kernel
def zombie_of(m, head):
    """Row of the zombie block with this first frame, or NONE."""
    for i in range(m.state[R_BLOCKS]):
        row = m.state[R_BLOCK_ROWS] + i * U(B_WORDS)
        if m.state[row + B_STATE] == BLOCK_ZOMBIE and m.state[row + B_PFN] == head:
            return row
    return NONE


@outlined
def is_designs(m, head, page):
    """Whether a folio is one of a guest_memfd inode over huge pages, or was when it left the page cache."""
    mapping = m.ram[page + MAPPING]
    if mapping != U0:
        inode = (mapping - mapping_address(U0)) >> U12
        known = mapping & U1 == U0 and inode < m.state[R_INODES]
        return known and m.state[inode_row(inode) + I_KIND] == INODE_GUEST_MEMFD
    if m.ram[page + FLAGS] & PG_HEAD != U0 and subpool_of(m, page) != U0:
        return True
    return zombie_of(m, head >> m.state[R_ORDER] << m.state[R_ORDER]) != NONE


@kernel
def held_by_faults(state, pfn):
    """References that faults under way hold on a folio: nobody else's to drop."""
    held = U0
    if state[R_FAULT_REFERENCES] != U0:
        for actor in range(U(ACTORS)):
            if state[STATE_OPS + actor * U(O_WORDS) + O_REFERENCED] == pfn + U1:
                held += U1
    return held


@outlined
def put(m, op):
    """Drop a transient reference: 0, or -ENOENT. The page is named by inode and offset, or by its
    physical address; it is, or was, one of an inode over huge pages.

    The last reference of a folio outside the page cache sends it (a zombie block: with all its pieces)
    back to the pool.
    """
    state = m.state
    order = state[R_ORDER]
    if state[op + O_ADDRESS] != U0:
        pfn = state[op + O_ADDRESS] >> U12
        if not in_zone(state, pfn) or not is_designs(m, folio_head(m, pfn), struct_page(m, folio_head(m, pfn))):
            return stop(state, op, -ENOENT)
    else:
        inode = state[op + O_OBJECT]
        index = state[op + O_OFFSET] >> U12
        if inode >= state[R_INODES] or index >= state[inode_row(inode) + I_PAGES]:
            return stop(state, op, -EBADF)
        pfn = m.state[block_row(m, inode_row(inode), index) + B_PFN]
        if pfn == U0:
            return stop(state, op, -ENOENT)
        pfn += index & ((U1 << order) - U1)
    head = folio_head(m, pfn)
    page = struct_page(m, head)
    cached = U0
    if m.ram[page + MAPPING] != U0:
        cached = U1 << folio_order(m, head) if m.ram[page + FLAGS] & PG_HEAD != U0 else U1
    if reference_count(m.ram, page) <= cached + mappings(m.ram, page) + held_by_faults(state, head):
        return stop(state, op, -ENOENT)
    add_references(m.ram, page, ~U0)
    state[R_EXTRA_REFERENCES] -= U1
    if cached == U0 and reference_count(m.ram, page) == U0:
        last_reference(m, head, page)
    return stop(state, op, 0)


@outlined
def last_reference(m, head, page):
    """Nobody holds this folio any more, and the page cache let it go before."""
    if m.ram[page + FLAGS] & PG_HEAD != U0 and folio_order(m, head) == m.state[R_ORDER]:
        change(m.stats, BLOCKS_ZOMBIE, -1)
        return_to_pool(m, head)
        return
    block = zombie_of(m, head >> m.state[R_ORDER] << m.state[R_ORDER])
    m.state[block + B_OUTSTANDING] -= U1
    if m.state[block + B_OUTSTANDING] == U0 and not has_pieces(m.state):  # those: piece_steps.put()
        revive(m, block)
