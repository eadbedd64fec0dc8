"""Transient references on folios, and what the last one sets off."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import LOW32, NONE, U0, U1, U9, U12, U18, U32, U511, U512
from pgemu_kernels.engine.charge import change
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.handle import full_only
from pgemu_kernels.engine.rows import block_row, inode_row, stop
from pgemu_kernels.folios.folio import (
    COMPOUND,
    COUNTS,
    FLAGS,
    MAPPING,
    NO_MAPCOUNT,
    PG_HEAD,
    add_references,
    folio_order,
    folio_test_large,
    is_huge_page,
    reference_count,
    struct_page,
)
from pgemu_kernels.folios.guest_folios import return_to_pool, subpool_of
from pgemu_kernels.folios.hstate import in_zone, node_of, node_row
from pgemu_kernels.folios.hugetlb import mapping_address
from pgemu_kernels.folios.large_folios import head_and_order, large_folios
from pgemu_kernels.folios.page_allocator import is_noted_split
from pgemu_kernels.folios.xarray import has_pieces
from pgemu_kernels.gmem.workers import note_return
from pgemu_kernels.words.enum_words import GAUGE_BLOCKS_ZOMBIE
from pgemu_kernels.words.operations import EBADF, ENOENT
from pgemu_kernels.words.registers import (
    R_BLOCK_ROWS,
    R_BLOCKS,
    R_EXTRA_REFERENCES,
    R_FROZEN,
    R_INODES,
    R_ORDER,
    R_POOL_BASE,
    R_TRANSIENT,
)
from pgemu_kernels.words.rows import (
    B_OUTSTANDING,
    B_PENDING,
    B_PFN,
    B_STATE,
    B_WORDS,
    BLOCK_ABSENT,
    BLOCK_ZOMBIE,
    GUP_PIN_COUNTING_BIAS,
    I_KIND,
    I_OPEN,
    I_PAGES,
    INODE_GUEST_MEMFD,
    N_BASE,
    N_GIGANTIC,
    N_RESERVED,
    O_ADDRESS,
    O_DETAIL,
    O_OBJECT,
    O_OFFSET,
    STATE_FROZEN,
    Z_PFN,
    Z_PINS,
    Z_REFERENCES,
    Z_WORDS,
)

U = np.uint64
_TRANSIENT = U((1 << 31) - 1)  # the bit above is memory failure's reference: folios/poison.py


@kernel
def head_of_large(m, pfn):
    head, _ = head_and_order(m, pfn)
    return head


large_head = full_only(head_of_large, U0)


@kernel
def folio_head(m, pfn):
    """First frame of the folio that holds `pfn`: the head of an unsplit huge page, else the page itself."""
    page = struct_page(m, pfn)
    if m.ram[page + COMPOUND] & U1 != U0 or m.ram[page + FLAGS] & PG_HEAD != U0:
        if has_pieces(m.state) and is_huge_page(m, pfn & ~U511):
            return pfn & ~U511  # a 2M piece, or the 1G page itself
        if large_folios(m) != U0:
            return large_head(m, pfn)
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
    head = folio_head(m, pfn)
    add_references(m.ram, struct_page(m, head), U1)
    note_transient(m, head, U1)
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
def is_small_page(m, pfn):
    """Whether a frame is a 4K page that left an inode while somebody held it: nobody else has such pages."""
    state = m.state
    row = node_row(node_of(state, pfn))
    kept = state[row + N_BASE] + (state[row + N_GIGANTIC] << U18)
    if kept <= pfn < kept + state[row + N_RESERVED]:
        return False  # the kernel's own
    if is_noted_split(state, pfn & ~U511, U9) or is_noted_split(state, pfn >> U18 << U18, U18):
        return False
    word = m.ram[struct_page(m, pfn) + COUNTS]
    return word & NO_MAPCOUNT == NO_MAPCOUNT and word >> U32 != U0


left_over = full_only(is_small_page, False)  # the fast loops know no 4K guest memory


@outlined
def is_designs(m, head, page):
    """Whether a folio is one of a guest_memfd inode over huge pages, or was when it left the page cache."""
    mapping = m.ram[page + MAPPING]
    if mapping != U0:
        inode = (mapping - mapping_address(U0)) >> U12
        known = mapping & U1 == U0 and inode < m.state[R_INODES]
        return known and m.state[inode_row(inode) + I_KIND] == INODE_GUEST_MEMFD
    if m.ram[page + FLAGS] & PG_HEAD != U0 and (not has_pieces(m.state) or subpool_of(m, page) != U0):
        return subpool_of(m, page) != U0
    if m.state[R_ORDER] == U0:
        return left_over(m, head)
    return zombie_of(m, head >> m.state[R_ORDER] << m.state[R_ORDER]) != NONE


@kernel
def transient(m, pfn):
    """Transient references on the folio whose first frame is `pfn`."""
    return U(m.counts[m.state[R_TRANSIENT] + pfn - m.state[R_POOL_BASE]]) & _TRANSIENT


@kernel
def outsiders_row(state, pfn):
    """Row of what outsiders froze or pinned of the folio whose first frame is `pfn`, or NONE."""
    for i in range(state[R_FROZEN]):
        row = STATE_FROZEN + i * U(Z_WORDS)
        if state[row + Z_PFN] == pfn and (state[row + Z_REFERENCES] | state[row + Z_PINS]) != U0:
            return row
    return NONE


@kernel
def outsiders_pins(m, pfn, page):
    """(How often outsiders pinned a folio, how many of its transient references that is)."""
    row = outsiders_row(m.state, pfn)
    pins = U0 if row == NONE else m.state[row + Z_PINS]
    return pins, pins if folio_test_large(m.ram, page) else pins * GUP_PIN_COUNTING_BIAS


@kernel
def may_put(m, pfn, page, n):
    """Whether outsiders hold `n` references of a folio beside those of their pins. Of a frozen one nobody does."""
    _, pinned = outsiders_pins(m, pfn, page)
    return transient(m, pfn) >= pinned + n and reference_count(m.ram, page) >= n


@kernel
def note_transient(m, pfn, n):
    """Note `n` (uint64, two's complement to take away) transient references on a folio of the zone.

    Linux notes nothing; here it keeps whoever drops one from dropping what a pin, an LRU batch or a fault holds.
    """
    at = m.state[R_TRANSIENT] + pfn - m.state[R_POOL_BASE]
    m.counts[at] = np.uint32(U(m.counts[at]) + n & LOW32)
    m.state[R_EXTRA_REFERENCES] += n


@outlined
def drop(m, pfn, n):
    """Drop `n` references of the folio whose first frame is `pfn`; the last one outside the page cache frees it."""
    page = struct_page(m, pfn)
    add_references(m.ram, page, U0 - n)
    if m.ram[page + MAPPING] == U0 and reference_count(m.ram, page) == U0:
        last_reference(m, pfn, page)


@outlined
def put(m, op):
    """Drop a transient reference: 0, or -ENOENT. The page is named by inode and offset, or by its
    physical address; it is, or was, one of an inode over huge pages.

    Only what `get` took: references of pins, LRU batches and faults under way are not here to drop.
    The last reference of a folio outside the page cache sends it (a zombie block: with all its pieces)
    back to the pool.
    """
    state = m.state
    if state[op + O_ADDRESS] != U0:
        pfn = state[op + O_ADDRESS] >> U12
        if not in_zone(state, pfn):
            return stop(state, op, -ENOENT)
    else:
        inode = state[op + O_OBJECT]
        index = state[op + O_OFFSET] >> U12
        if inode >= state[R_INODES] or index >= state[inode_row(inode) + I_PAGES]:
            return stop(state, op, -EBADF)
        pfn = m.state[block_row(m, inode_row(inode), index) + B_PFN]
        if pfn == U0:
            return stop(state, op, -ENOENT)
        pfn += index & ((U1 << state[R_ORDER]) - U1)
    head = folio_head(m, pfn)
    page = struct_page(m, head)
    if not may_put(m, head, page, U1) or not is_designs(m, head, page):
        return stop(state, op, -ENOENT)
    note_transient(m, head, ~U0)
    drop(m, head, U1)
    return stop(state, op, 0)


@outlined
def last_reference(m, head, page):
    """Nobody holds this folio any more, and the page cache let it go before.

    A whole huge page goes back to its pool. A piece loses its page type and waits with the others of its zombie block;
    the last one calls the worker. mm/guestmem_hugetlb.c:guestmem_hugetlb_handle_folio_put() of the posted series
    """
    large = m.ram[page + FLAGS] & PG_HEAD != U0
    if m.state[R_ORDER] == U0 or (large and not has_pieces(m.state)):
        pages = U1 << folio_order(m.ram, page) if m.state[R_ORDER] == U0 else U1
        change(m.stats, GAUGE_BLOCKS_ZOMBIE, -np.int64(pages))
        return_to_pool(m, head)
        return
    block = zombie_of(m, head >> m.state[R_ORDER] << m.state[R_ORDER])
    if block == NONE:  # 1G, split to 2M nowhere
        change(m.stats, GAUGE_BLOCKS_ZOMBIE, -1)
        return_to_pool(m, head)
        return
    pages = U1
    if large:
        pages = U512
    else:
        m.ram[page + COUNTS] = NO_MAPCOUNT
    m.state[block + B_OUTSTANDING] -= pages
    m.state[block + B_PENDING] += pages
    if m.state[block + B_OUTSTANDING] == U0:
        note_return(m, block)
