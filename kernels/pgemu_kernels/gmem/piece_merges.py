"""2M pieces are merged again, up to the whole 1G folio; their truncation and eviction."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U2, U3, U8, U9, U12, U21, U32, U64, U512
from pgemu_kernels.engine.charge import change, charge, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.frames import frames_left
from pgemu_kernels.engine.shareability import shared_in_2m, shared_in_block, shared_in_range
from pgemu_kernels.folios.folio import (
    COMPOUND,
    COUNTS,
    FLAGS,
    HUGETLB_VMEMMAP_OPTIMIZED,
    INDEX,
    MAPPING,
    MEMCG,
    NO_MAPCOUNT,
    ONE_CACHED,
    PG_UPTODATE,
    PGTY_HUGETLB,
    PRIVATE,
    struct_page,
    vmemmap_address,
)
from pgemu_kernels.folios.guest_folios import (
    abandon,
    become_zombie,
    free_block,
    own_merged,
    start_waiting,
    stop_waiting,
)
from pgemu_kernels.folios.hstate import hstate_node, hstate_of_order, node_of
from pgemu_kernels.folios.hugetlb import inode_at, prep_folio
from pgemu_kernels.folios.hvo import fill_tail_page, optimize, restore_batch, split_directory
from pgemu_kernels.folios.merging import merge_zeroed, poison_settled
from pgemu_kernels.folios.split_pages import (
    HELD,
    NO_MEMORY,
    PAGE_FLAGS,
    join_list,
    missing_pages,
)
from pgemu_kernels.folios.vmemmap import (
    flush_kernel_range,
    forget_vmemmap_page,
    give_up,
    vmemmap_directory,
    vmemmap_pages,
    vmemmap_pte,
)
from pgemu_kernels.folios.xarray import nodes_of, put_nodes, unstash
from pgemu_kernels.folios.zeroed import bits_in, charge_unreached, flags_lie, note_zeroed, zero_pages
from pgemu_kernels.formats.bits import PTE_ADDRESS, PTE_LARGE, PTE_WRITE
from pgemu_kernels.gmem.pieces import (
    BLOCK_PAGES,
    CACHED,
    OWN_WORDS,
    PAGES,
    PIECE_NODES,
    PIECE_ORDER,
    PIECES,
    WHOLE,
    any_piece_split,
    held_in_pieces,
    is_idle_block,
    is_piece_split,
    mark_piece,
    piece_head,
    zeroed_bits,
)
from pgemu_kernels.words.enum_words import (
    EVENT_DEFERRED_MERGE,
    EVENT_FOLIO_FROZEN,
    EVENT_FOLIO_MERGED,
    EVENT_FREEZE_SPIN,
    EVENT_PAGE_CACHE_STORED,
    EVENT_STRUCT_PAGE_BYTES,
    EVENT_STRUCT_PAGE_WRITTEN,
    EVENT_VMEMMAP_PAGE_FREED,
    GAUGE_BLOCKS_HUGE,
    GAUGE_BLOCKS_PARTLY,
    GAUGE_BLOCKS_ZOMBIE,
    GAUGE_MEMMAP_PAGES,
    GAUGE_VMEMMAP_PAGES,
)
from pgemu_kernels.words.operations import EAGAIN
from pgemu_kernels.words.registers import R_HWPOISON, R_MASK_TAILS, R_MERGE_ZEROES, R_SPLIT_FORM, R_VMEMMAP_READ_ONLY
from pgemu_kernels.words.rows import (
    B_BITS,
    B_PFN,
    B_STATE,
    B_WAITS,
    BLOCK_HUGE,
    BLOCK_PARTLY,
    H_NODE_TAIL_PAGE,
    I_ZEROED,
    SPLIT_FORM_RFC2,
)

U = np.uint64


@outlined
def merge_piece(m, node, block, index, keep):
    """Merge the 4K folios of the piece that begins at a page: 0, or -WOULD_SPIN with nothing changed.

    `keep`: note which of its pages are zeroed; the contents of a block that is being freed do not matter.
    """
    bits = zeroed_bits(m, node, index) if keep else NONE
    status = merge_zeroed(m, block, piece_head(m, block, index), PIECE_ORDER, index, bits)
    if status == 0:
        mark_piece(m, block, index, U0)
    return status


@kernel
def shared_besides(m, node, index, pages, start, end):
    """Shared pages of the piece or block of `pages` that begins at a page, those in [start, end) left out."""
    shared = shared_in_2m(m, node, index) if pages == PAGES else shared_in_block(m, node, index)
    low = max(start, index)
    high = min(end, index + pages)
    if shared != U0 and low < high:
        shared -= shared_in_range(m, node, low, high)
    return shared


@kernel
def may_merge(m, node, block, index, start, end):
    """Whether the piece that begins at a page is split and none of its pages but those in [start, end) is shared."""
    return is_piece_split(m, block, index) != U0 and shared_besides(m, node, index, PAGES, start, end) == U0


@outlined
def merge_split(m, node, block, low, high, start, end):
    """Merge what pieces of pages [low, high) may_merge(): whether one stays split because it is held."""
    stays = False
    for index in range(low & ~(PAGES - U1), high, PAGES):
        if may_merge(m, node, block, index, start, end) and merge_piece(m, node, block, index, True) != 0:
            charge_one(m, EVENT_FREEZE_SPIN)
            stays = True
    return stays


@outlined
def has_to_wait(m, node, block, first, low, high, start, end):
    """Whether no page of a block is shared, or a piece of pages [low, high) may_merge()."""
    waits = shared_besides(m, node, first, BLOCK_PAGES, start, end) == U0
    index = low & ~(PAGES - U1)
    while index < high and not waits:
        waits = may_merge(m, node, block, index, start, end)
        index += PAGES
    return waits


@outlined
def first_held(m, node, block, first, low, high, start, end):
    """Of the folios that a merge of pages [low, high) freezes, the first page of the first one that is held, or NONE.

    Where no page of the block is shared, that is all of it.
    """
    whole = shared_besides(m, node, first, BLOCK_PAGES, start, end) == U0
    index = first if whole else low & ~(PAGES - U1)
    last = first + BLOCK_PAGES if whole else high
    held = NONE
    while index < last and held == NONE:
        if whole or may_merge(m, node, block, index, start, end):
            held, _ = held_in_pieces(m, block, index, index + PAGES)
        index += PAGES
    return held


@outlined
def merge_pieces(m, node, block, first, start, end):
    """Merge what can be: the split pieces without a shared page, then the block: first_held().

    Pages [start, end) count as private: a conversion may merge before it stores (order fixup). All pieces of the block
    are looked at, those too that wait because of an earlier failure. What somebody holds, or has no memory for its
    vmemmap, stays; then the block waits.
    """
    held = first_held(m, node, block, first, first, first + BLOCK_PAGES, start, end)
    merge_split(m, node, block, first, first + BLOCK_PAGES, start, end)
    if shared_besides(m, node, first, BLOCK_PAGES, start, end) == U0 and not any_piece_split(m, block):
        merge_whole(m, node, block, first, True, False)
    if m.state[block + B_STATE] == BLOCK_PARTLY:
        note_waiting(m, node, block, first, start, end)
    return held


@outlined
def merge_touched(m, node, block, first, start, end, stored):
    """merge_pieces() after pages [start, end) of the block, and no others, became private.

    Unless the block waits no piece elsewhere can be merged: it waits as long as one can. Not `stored` as private yet:
    then nothing is merged where a folio is held, for what is merged has no shared page.
    """
    waits = m.state[block + B_WAITS] != U0
    low, high = (first, first + BLOCK_PAGES) if waits else (start, end)
    held = first_held(m, node, block, first, low, high, start, end)
    if held != NONE and not stored:
        charge_one(m, EVENT_FREEZE_SPIN)
        return held
    if waits:
        return merge_pieces(m, node, block, first, start, end)
    stays = merge_split(m, node, block, start, end, start, end)
    private = shared_besides(m, node, first, BLOCK_PAGES, start, end) == U0
    if private and not any_piece_split(m, block):
        merge_whole(m, node, block, first, True, False)
    if m.state[block + B_STATE] == BLOCK_PARTLY and (stays or private):
        start_waiting(m, block)
    return held


@outlined
def note_touched(m, node, block, first, start, end):
    """note_waiting() after pages [start, end) of the block, and no others, became private."""
    if m.state[block + B_WAITS] == U0 and has_to_wait(m, node, block, first, start, end, start, end):
        start_waiting(m, block)


@outlined
def note_waiting(m, node, block, first, start, end):
    """A block in pieces waits while a piece without a shared page is split, or none of its pages is shared.

    Pages [start, end) count as private, as for merge_pieces().
    """
    if has_to_wait(m, node, block, first, first, first + BLOCK_PAGES, start, end):
        start_waiting(m, block)
    else:
        stop_waiting(m, block)


@kernel
def missing_of_pieces(m, head):
    """Vmemmap pages that the pieces of a block lack."""
    missing = U0
    for piece in range(head, head + BLOCK_PAGES, PAGES):
        missing += missing_pages(m, struct_page(m, piece), PIECE_ORDER)
    return missing


@outlined
def join_zeroed(m, node, block, head, first):
    """PG_uptodate of the 1G folio that 512 pieces become: as merging.merged_flag()."""
    if flags_lie(m):
        return m.ram[struct_page(m, head) + FLAGS] >> U3 & U1
    word = m.state[node + I_ZEROED]
    end = first + BLOCK_PAGES
    uptodate = U0
    for index in range(first, end, PAGES):
        uptodate += m.ram[struct_page(m, head + index - first) + FLAGS] >> U3 & U1
    if uptodate == PIECES:
        return U1
    for index in range(first, end, PAGES):
        if m.ram[struct_page(m, head + index - first) + FLAGS] & PG_UPTODATE != U0:
            note_zeroed(m, word, index, index + PAGES)
            m.state[block + B_BITS] = U1
    if m.state[R_MERGE_ZEROES] == U0 or m.state[block + B_BITS] == U0 or bits_in(m, word, first, end) == U0:
        return U0
    charge_unreached(m, inode_at(m, head), word, first, end)
    zero_pages(m, word, first, end, head)
    return U1


@outlined
def clean_heads(m, head):
    """The struct pages that were more than tails while there were pieces become tails: all but the first piece's."""
    ram = m.ram
    for piece in range(head + PAGES, head + BLOCK_PAGES, PAGES):
        page = struct_page(m, piece)
        for _ in range(OWN_WORDS):
            ram[page + FLAGS] &= ~(PAGE_FLAGS | m.state[R_HWPOISON])
            ram[page + U2] = U0
            ram[page + INDEX] = U0
            ram[page + COUNTS] = NO_MAPCOUNT
            ram[page + MEMCG] = U0
            page += U8


@outlined
def fold_directory(m, slot, entry, first):
    """Redirect the entries of a vmemmap table from slot `first` on to the shared page: how many pages were given up."""
    freed = np.int64(0)
    for at in range(slot + first, slot + U512):
        if m.ram[at] & PTE_WRITE != U0:
            give_up(m, (m.ram[at] & PTE_ADDRESS) >> U12, False)
            freed += 1
        m.ram[at] = entry
    return freed


@outlined
def shared_tails(m, head):
    """The page that a 1G folio's tails show, without asking for memory.

    From 7.1 on the shared page of the node, made of a piece's first vmemmap page if there is none yet; before, the
    folio's own first page.
    """
    start = vmemmap_address(m.state, head)
    if m.state[R_MASK_TAILS] == U0:
        return (m.ram[vmemmap_pte(m, start)] & PTE_ADDRESS) >> U12
    node = node_of(m.state, head)
    word = hstate_node(hstate_of_order(WHOLE), node) + H_NODE_TAIL_PAGE
    frame = m.state[word]
    if frame == U0:
        piece = head + PAGES
        while m.ram[vmemmap_directory(m, vmemmap_address(m.state, piece))] & PTE_LARGE != U0:
            piece += PAGES
        slot = vmemmap_pte(m, vmemmap_address(m.state, piece))
        frame = (m.ram[slot] & PTE_ADDRESS) >> U12
        m.ram[slot] &= ~PTE_WRITE
        forget_vmemmap_page(m, frame)
        change(m.stats, GAUGE_MEMMAP_PAGES, -1)  # counted with the shared pages from now on
        fill_tail_page(m, frame, WHOLE, node)
        m.state[word] = frame
    return frame


@outlined
def fold_vmemmap(m, head):
    """Optimise the vmemmap of 512 pieces as that of one 1G folio, without restoring it first.

    No kernel does this. It takes no memory: the first piece's own page stays the head's. Tables where the vmemmap is
    mapped by 2M leaves still (pieces that could not be optimised) come last, when pages have been given up.
    """
    state = m.state
    start = vmemmap_address(state, head)
    entry = shared_tails(m, head) << U12 | state[R_VMEMMAP_READ_ONLY]
    freed = np.int64(0)
    for leaves in range(U2):
        for i in range(BLOCK_PAGES >> U(15)):
            address = start + (i << U21)
            large = m.ram[vmemmap_directory(m, address)] & PTE_LARGE != U0
            if large == (leaves == U1):
                split_directory(m, address, True)
                freed += fold_directory(m, vmemmap_pte(m, address), entry, U1 if i == U0 else U0)
    m.ram[struct_page(m, head) + PRIVATE] |= HUGETLB_VMEMMAP_OPTIMIZED
    change(m.stats, GAUGE_VMEMMAP_PAGES, -freed)
    change(m.stats, GAUGE_MEMMAP_PAGES, -freed)
    charge(m, EVENT_VMEMMAP_PAGE_FREED, freed)
    flush_kernel_range(m, vmemmap_pages(WHOLE))


@outlined
def whole_folio(m, head, folded, index, uptodate):
    """The struct pages of the 1G folio that 512 pieces become: prep_compound_page(), and what the page cache needs.

    `folded`: only the first vmemmap page is its own.
    """
    ram = m.ram
    first = struct_page(m, head)
    mapping = ram[first + MAPPING]
    link = ram[first + COMPOUND]
    private = ram[first + PRIVATE]
    if not folded:
        clean_heads(m, head)
    pages = U64 if folded else BLOCK_PAGES
    prep_folio(m, head, WHOLE, pages)
    ram[first + FLAGS] = (ram[first + FLAGS] & ~PG_UPTODATE) | uptodate << U3
    ram[first + COMPOUND] = link
    ram[first + MAPPING] = mapping
    ram[first + INDEX] = index
    ram[first + PRIVATE] = private
    ram[first + COUNTS] = PGTY_HUGETLB | BLOCK_PAGES << U32
    charge(m, EVENT_STRUCT_PAGE_WRITTEN, np.int64(pages) - 1)
    charge(m, EVENT_STRUCT_PAGE_BYTES, 24 * (np.int64(pages) - 1))


@outlined
def merge_whole(m, node, block, first, keep, must):
    """Merge 512 whole pieces into the 1G folio: 0, -WOULD_SPIN or (unless it `must`) -ENOMEM, nothing changed.

    `keep`: as merge_piece(). Pieces in the page cache give their nodes back.
    """
    head = m.state[block + B_PFN]
    if any_piece_split(m, block) or not is_idle_block(m, block):
        charge_one(m, EVENT_FREEZE_SPIN)
        return HELD
    charge(m, EVENT_FOLIO_FROZEN, np.int64(PIECES))
    folded = frames_left(m) < missing_of_pieces(m, head)
    if folded and not must:
        return NO_MEMORY
    uptodate = join_zeroed(m, node, block, head, first) if keep else U0
    if folded:
        fold_vmemmap(m, head)
    else:
        restore_batch(m, head, head + BLOCK_PAGES)
    if m.ram[struct_page(m, head) + MAPPING] != U0:
        rfc2 = m.state[R_SPLIT_FORM] == SPLIT_FORM_RFC2
        charge(m, EVENT_PAGE_CACHE_STORED, np.int64(PIECES) + 1 if rfc2 else np.int64(1))
        put_nodes(m, PIECE_NODES)
    whole_folio(m, head, folded, first, uptodate)
    if m.state[R_SPLIT_FORM] == SPLIT_FORM_RFC2:
        unstash(m)
    optimize(m, head, WHOLE)
    poison_settled(m, head, BLOCK_PAGES, True)
    join_list(m, head, WHOLE)
    own_merged(m, block, struct_page(m, head))
    m.state[block + B_STATE] = BLOCK_HUGE
    stop_waiting(m, block)
    change(m.stats, GAUGE_BLOCKS_PARTLY, -1)
    change(m.stats, GAUGE_BLOCKS_HUGE, 1)
    charge_one(m, EVENT_FOLIO_MERGED)
    return np.int64(0)


@outlined
def dissolve_block(m, node, block, first):
    """Make a block in pieces one 1G folio again, shared pages or not, so that it can be freed: 0, or -EAGAIN.

    Its pages are mapped by nobody. -EAGAIN, with nothing changed: somebody holds a folio. It needs no memory.
    """
    if not is_idle_block(m, block):
        charge_one(m, EVENT_FREEZE_SPIN)
        return np.int64(-EAGAIN)
    for index in range(first, first + BLOCK_PAGES, PAGES):
        if is_piece_split(m, block, index) != U0:
            merge_piece(m, node, block, index, False)
    merge_whole(m, node, block, first, False, True)
    return np.int64(0)


@kernel
def nodes_of_block(m, block):
    """Nodes that a block in pieces takes in the page cache: 65, and 8 for each piece that is split."""
    split = U0
    for piece in range(PIECES):
        split += is_piece_split(m, block, piece << U9)
    return PIECE_NODES + split * nodes_of(m.state, PIECE_ORDER)


@outlined
def make_zombie_of_pieces(m, block):
    """Take a block in pieces out of the page cache though some folios are held: as hugetlb.make_zombie().

    What is outstanding is counted in pages: a 2M folio that somebody holds is 512.
    """
    state = m.state
    held = U0
    stored = np.int64(0)
    put_nodes(m, nodes_of_block(m, block))
    for index in range(U0, BLOCK_PAGES, PAGES):
        head = piece_head(m, block, index)
        stored += 1
        if is_piece_split(m, block, index) == U0:
            held += PAGES if abandon(m.ram, struct_page(m, head), PAGES, state[R_SPLIT_FORM]) else U0
            continue
        stored += 511
        for pfn in range(head, head + PAGES):
            held += U1 if abandon(m.ram, struct_page(m, pfn), U1, state[R_SPLIT_FORM]) else U0
    become_zombie(m, block, GAUGE_BLOCKS_PARTLY, held, BLOCK_PAGES - held)
    charge(m, EVENT_PAGE_CACHE_STORED, stored)


@outlined
def revive_block(m, block):
    """splitting.revive() of a block in pieces: the worker makes one folio of it and gives it to the pool."""
    for index in range(U0, BLOCK_PAGES, PAGES):
        head = piece_head(m, block, index)
        if is_piece_split(m, block, index) == U0:
            m.ram[struct_page(m, head) + COUNTS] = CACHED
            continue
        for pfn in range(head, head + PAGES):
            m.ram[struct_page(m, pfn) + COUNTS] = ONE_CACHED
    m.state[block + B_STATE] = BLOCK_PARTLY
    change(m.stats, GAUGE_BLOCKS_ZOMBIE, -1)
    change(m.stats, GAUGE_BLOCKS_PARTLY, 1)
    charge_one(m, EVENT_DEFERRED_MERGE)
    dissolve_block(m, U0, block, U0)  # of no inode: what is zeroed is not asked
    free_block(m, block)
