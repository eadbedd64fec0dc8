"""Asking for memory ahead: the cache misses of operations that lie scattered overlap, a batch at a time.

What leads there is read in order, so a batch goes as many times as there are misses behind one another.
"""

from __future__ import annotations

from typing import Any

from pgemu_kernels.engine.bits import LOW16, NONE, U0, U1, U2, U3, U4, U6, U8, U12, U32, U48, prefetch
from pgemu_kernels.engine.compile import kernel
from pgemu_kernels.engine.geometry import index_at
from pgemu_kernels.engine.handle import full_only
from pgemu_kernels.engine.memslots import find_memslot
from pgemu_kernels.engine.properties import splits_folios
from pgemu_kernels.engine.records import element, is_scattered
from pgemu_kernels.engine.rows import (
    block_row,
    find_vma,
    inode_row,
    overlap,
    space_root,
    vm_row,
    vma_overlap,
)
from pgemu_kernels.folios.folio import struct_page
from pgemu_kernels.stage2.regions import is_mapped
from pgemu_kernels.tables.walker import host_format, is_large, is_present, stage2_format, table_of
from pgemu_kernels.words.enum_words import FLAG_PRIVATE
from pgemu_kernels.words.registers import R_INODES, R_LAST_MEMSLOT, R_LAST_VMA, R_ORDER
from pgemu_kernels.words.rows import (
    A_INODE,
    A_PGOFF,
    A_SPACE,
    A_START,
    B_PFN,
    B_STATE,
    BLOCK_HUGE,
    BLOCK_PARTLY,
    BLOCK_SPLIT,
    I_GUEST_BITS,
    I_PAGES,
    I_WORD,
    M_BASE_GFN,
    M_INODE,
    M_PGOFF,
    M_VM,
    V_ROOT,
)


@kernel
def directory_slot(m, f, root, page):
    """Slot of the level-2 entry of a page, or NONE where the tables above end before or in a leaf."""
    ram = m.ram
    state = m.state
    entry = ram[(root >> U3) + index_at(page, U4)]
    if not is_present(state, f, entry):
        return NONE
    entry = ram[table_of(state, f, entry) + index_at(page, U3)]
    if not is_present(state, f, entry) or is_large(state, f, entry):
        return NONE
    return table_of(state, f, entry) + index_at(page, U2)


@kernel
def prefetch_leaf(m, f, root, page):
    """Ask for the line of the 4K entry of a page, if there is a table for it."""
    slot = directory_slot(m, f, root, page)
    if slot != NONE:
        entry = m.ram[slot]
        if is_present(m.state, f, entry) and not is_large(m.state, f, entry):
            prefetch(m.ram, table_of(m.state, f, entry) + index_at(page, U1))


@kernel
def have_order_0(m):
    """Whether folios are of 4K from the start: then their blocks' rows are many, which ask for a pass of their own."""
    return m.state[R_ORDER] == U0


@kernel
def never_order_0(m):
    """Default machines have huge pages."""
    return False


order_0 = full_only(have_order_0, never_order_0)


@kernel
def prefetch_bit(m, node, index):
    """Ask for a page's shareability bit."""
    prefetch(m.state, m.state[node + I_WORD] + (index >> U6))


@kernel
def prefetch_folio(m, node, index):
    """Ask for a page's struct page, where its folio may be one of 4K."""
    state = m.state
    block = block_row(m, node, index)
    kind = m.state[block + B_STATE]
    if kind == BLOCK_SPLIT or kind == BLOCK_PARTLY or (kind == BLOCK_HUGE and order_0(m)):
        prefetch(m.ram, struct_page(m, m.state[block + B_PFN] + (index & ((U1 << state[R_ORDER]) - U1))))


def ahead(page_of: Any, has_folio: Any, scattered: Any, leaves: Any) -> Any:
    """What asks for all that a batch (m, columns, first, last) will touch, if that lies scattered.

    page_of(m, columns, i): inode row and index of an operation's page, NONE twice where there is none.
    has_folio(m, columns, i): whether its folio is asked for.
    scattered(columns, first, last): whether the batch lies scattered.
    leaves(m, columns, i, node, index): asks for the entries that it will touch.
    """

    @kernel
    def ask_block(m, columns, i):
        node, index = page_of(m, columns, i)
        if node != NONE and has_folio(m, columns, i):
            prefetch(m.state, block_row(m, node, index))

    @kernel
    def ask_page(m, columns, i):
        node, index = page_of(m, columns, i)
        if node != NONE:
            prefetch_bit(m, node, index)
            if has_folio(m, columns, i):
                prefetch_folio(m, node, index)
            leaves(m, columns, i, node, index)

    @kernel
    def ask(m, columns, first, last):
        if scattered(columns, first, last):
            if order_0(m):
                for i in range(first, last):
                    ask_block(m, columns, i)
            for i in range(first, last):
                ask_page(m, columns, i)

    return ask


@kernel
def by_address(columns, first, last):
    return is_scattered(columns.address, first, last)


@kernel
def by_offset(columns, first, last):
    return is_scattered(columns.offset, first, last)


@kernel
def splits_or_small(m, columns, i):
    """Whether a fault's folio may be one of 4K."""
    return splits_folios(m) or order_0(m)


@kernel
def page_of_host(m, columns, i):
    """Inode row and index of the page under a host's address; NONE twice where there is none."""
    state = m.state
    address = element(columns.address, i)
    row = find_vma(state, element(columns.header, i) >> U48, address)
    if row != NONE:
        node = inode_row(state[row + A_INODE])
        index = state[row + A_PGOFF] + ((address - state[row + A_START]) >> U12)
        if index < state[node + I_PAGES]:  # a mapping may reach past the end of the file
            return node, index
    return NONE, NONE


@kernel
def ask_host_leaf(m, columns, i, node, index):
    """Ask for the entry of the process."""
    root = space_root(m.state, element(columns.header, i) >> U48)
    prefetch_leaf(m, host_format(m), root, element(columns.address, i) >> U12)


@kernel
def page_of_guest(m, columns, i):
    """The same of the page under a guest's address."""
    state = m.state
    gfn = element(columns.address, i) >> U12
    slot = find_memslot(state, element(columns.header, i) >> U32 & LOW16, gfn)
    if slot == NONE:
        return NONE, NONE
    node = inode_row(state[slot + M_INODE])
    index = gfn - state[slot + M_BASE_GFN] + state[slot + M_PGOFF]
    if index >= state[node + I_PAGES]:  # a slot that was released is behind every file
        return NONE, NONE
    return node, index


@kernel
def ask_guest_leaf(m, columns, i, node, index):
    """Ask for the bit that says whether the guest has a leaf, and for the leaf."""
    prefetch(m.state, m.state[node + I_GUEST_BITS] + (index >> U6))
    root = m.state[vm_row(element(columns.header, i) >> U32 & LOW16) + V_ROOT]
    prefetch_leaf(m, stage2_format(m), root, element(columns.address, i) >> U12)


@kernel
def is_to_private(columns, i):
    """Whether a conversion is one to private."""
    return element(columns.header, i) >> U8 & FLAG_PRIVATE != U0


@kernel
def page_of_conversion(m, columns, i):
    """The same of the first page that a conversion names."""
    state = m.state
    inode = element(columns.object, i)
    index = element(columns.offset, i) >> U12
    if inode < state[R_INODES] and index < state[inode_row(inode) + I_PAGES]:
        return inode_row(inode), index
    return NONE, NONE


@kernel
def is_gated(m, columns, i):
    """Whether a conversion looks at its page's folio."""
    return splits_folios(m) and is_to_private(columns, i)


@kernel
def ask_leaves(m, columns, i, node, index):
    """Ask for the entries of the page, where the VMA and the slot last used show it.

    To shared it is no host's entry, and no folio: a private page has no such entry and is asked of nobody.
    """
    state = m.state
    inode = element(columns.object, i)
    if is_to_private(columns, i):
        vma = state[R_LAST_VMA]
        first, last = vma_overlap(state, vma, inode, index, index + U1)
        if first < last:
            prefetch_leaf(m, host_format(m), space_root(state, state[vma + A_SPACE]), first >> U12)
    slot = state[R_LAST_MEMSLOT]
    first, last = overlap(state, slot, inode, index, index + U1)
    if first < last and is_mapped(state, node, index, index + U1):
        prefetch_leaf(m, stage2_format(m), state[vm_row(state[slot + M_VM]) + V_ROOT], first)


prefetch_hosts = ahead(page_of_host, splits_or_small, by_address, ask_host_leaf)  # of faults, and of zaps of one page
prefetch_guests = ahead(page_of_guest, splits_or_small, by_address, ask_guest_leaf)
prefetch_converts = ahead(page_of_conversion, is_gated, by_offset, ask_leaves)  # of one page
