"""Asking for memory ahead: the cache misses of operations that lie scattered overlap, a batch at a time.

What leads there is read in order, so a batch goes as many times as there are misses behind one another.
"""

from __future__ import annotations

from pgemu_kernels.engine.bits import LOW16, NONE, U0, U1, U2, U3, U4, U6, U8, U12, U32, U48, prefetch
from pgemu_kernels.engine.compile import kernel
from pgemu_kernels.engine.geometry import index_at
from pgemu_kernels.engine.handle import full_only
from pgemu_kernels.engine.properties import splits_folios
from pgemu_kernels.engine.records import element, is_scattered
from pgemu_kernels.engine.rows import (
    block_row,
    find_memslot,
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
def prefetch_host(m, columns, i):
    """Ask for what a host fault or a zap of one page will touch."""
    node, index = page_of_host(m, columns, i)
    if node != NONE:
        prefetch_bit(m, node, index)
        if splits_folios(m) or order_0(m):
            prefetch_folio(m, node, index)
        root = space_root(m.state, element(columns.header, i) >> U48)
        prefetch_leaf(m, host_format(m), root, element(columns.address, i) >> U12)


@kernel
def prefetch_host_block(m, columns, i):
    """Ask for where prefetch_host() will find the folio."""
    node, index = page_of_host(m, columns, i)
    if node != NONE:
        prefetch(m.state, block_row(m, node, index))


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
def prefetch_guest(m, columns, i):
    """Ask for what a guest fault will touch."""
    node, index = page_of_guest(m, columns, i)
    if node != NONE:
        prefetch_bit(m, node, index)
        prefetch(m.state, m.state[node + I_GUEST_BITS] + (index >> U6))
        if splits_folios(m) or order_0(m):
            prefetch_folio(m, node, index)
        root = m.state[vm_row(element(columns.header, i) >> U32 & LOW16) + V_ROOT]
        prefetch_leaf(m, stage2_format(m), root, element(columns.address, i) >> U12)


@kernel
def prefetch_guest_block(m, columns, i):
    """Ask for where prefetch_guest() will find the folio."""
    node, index = page_of_guest(m, columns, i)
    if node != NONE:
        prefetch(m.state, block_row(m, node, index))


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
def prefetch_convert(m, columns, i):
    """Ask for what the conversion of one page will touch, where the VMA and the slot last used show it.

    To shared it is no host's entry, and no folio: a private page has no such entry and is asked of nobody.
    """
    state = m.state
    node, index = page_of_conversion(m, columns, i)
    if node == NONE:
        return
    inode = element(columns.object, i)
    prefetch_bit(m, node, index)
    if is_to_private(columns, i):
        if splits_folios(m):
            prefetch_folio(m, node, index)
        vma = state[R_LAST_VMA]
        first, last = vma_overlap(state, vma, inode, index, index + U1)
        if first < last:
            prefetch_leaf(m, host_format(m), space_root(state, state[vma + A_SPACE]), first >> U12)
    slot = state[R_LAST_MEMSLOT]
    first, last = overlap(state, slot, inode, index, index + U1)
    if first < last and is_mapped(state, node, index, index + U1):
        prefetch_leaf(m, stage2_format(m), state[vm_row(state[slot + M_VM]) + V_ROOT], first)


@kernel
def prefetch_convert_block(m, columns, i):
    """Ask for where prefetch_convert() will find the folio."""
    node, index = page_of_conversion(m, columns, i)
    if node != NONE and splits_folios(m) and is_to_private(columns, i):
        prefetch(m.state, block_row(m, node, index))


@kernel
def prefetch_hosts(m, columns, first, last):
    """Ask for what a batch of host faults or zaps will touch, if that lies scattered."""
    if is_scattered(columns.address, first, last):
        if order_0(m):
            for i in range(first, last):
                prefetch_host_block(m, columns, i)
        for i in range(first, last):
            prefetch_host(m, columns, i)


@kernel
def prefetch_guests(m, columns, first, last):
    """Ask for what a batch of guest faults will touch, if that lies scattered."""
    if is_scattered(columns.address, first, last):
        if order_0(m):
            for i in range(first, last):
                prefetch_guest_block(m, columns, i)
        for i in range(first, last):
            prefetch_guest(m, columns, i)


@kernel
def prefetch_converts(m, columns, first, last):
    """Ask for what a batch of conversions of one page will touch, if that lies scattered."""
    if is_scattered(columns.offset, first, last):
        if order_0(m):
            for i in range(first, last):
                prefetch_convert_block(m, columns, i)
        for i in range(first, last):
            prefetch_convert(m, columns, i)
