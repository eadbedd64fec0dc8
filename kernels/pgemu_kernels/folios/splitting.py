"""Split of a huge folio to 4K folios; their merge is merging.py's, what both write split_pages.py's.

Two posted forms, chosen by the register R_SPLIT_FORM. `rfc2` (May 2025; mm/guestmem_hugetlb.c, virt/kvm/guest_memfd.c)
takes the folio out of the page cache and puts its pages in one by one. The later form (from late 2025 on;
mm/hugetlb_restructuring.c) splits and merges the entry in place, with mm/huge_memory.c:__split_folio_to_order().

A restored vmemmap page is written once, in its final form: that leaves the bytes that vmemmap.restore() and a rewrite
of each struct page would leave.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U3
from pgemu_kernels.engine.charge import change, charge, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.frames import frames_left
from pgemu_kernels.folios.folio import (
    FLAGS,
    MAPPING,
    reference_count,
    struct_page,
)
from pgemu_kernels.folios.hvo import end_restore
from pgemu_kernels.folios.merging import poison_settled
from pgemu_kernels.folios.split_pages import (
    HELD,
    NO_MEMORY,
    SPLIT_BYTES,
    charge_pages,
    join_pages,
    leave_list,
    missing_pages,
    prepare_head,
    stored_at_once,
    write_pages,
)
from pgemu_kernels.folios.xarray import nodes_of, obtainable, page_without_node, put_nodes, stash, take_nodes, unstash
from pgemu_kernels.folios.zeroed import knows_flags_only
from pgemu_kernels.words.enum_words import (
    EVENT_FOLIO_FROZEN,
    EVENT_FOLIO_SPLIT,
    EVENT_FREEZE_SPIN,
    EVENT_PAGE_CACHE_STORED,
    GAUGE_BLOCKS_HUGE,
    GAUGE_BLOCKS_SPLIT,
)
from pgemu_kernels.words.registers import (
    R_ORDER,
    R_SPLIT_FORM,
)
from pgemu_kernels.words.rows import B_BITS, B_PFN, B_STATE, BLOCK_SPLIT, SPLIT_FORM_RFC2

U = np.uint64

# Bytes stored in each tail. rfc2: flags, mapping, compound_info; then its insertion in the page cache stores refcount,
# mapping and index, which PAGE_CACHE_STORED counts. Later: flags, mapping, index, compound_info, memcg_data, refcount.
# Merge: mapping, compound_info, private (prep_compound_tail()); the freeze before it is FOLIO_FROZEN.
RFC2_SPLIT_BYTES = 24


# --------------------------------------------------------------------------- split


@outlined
def split_in_place(m, head, first, order, index, cached, zeroed_word):
    """hugetlb_restructuring_split_folio(), from its entries on: 0, or -ENOMEM with nothing changed."""
    nodes = nodes_of(m.state, order) if cached else U0
    taken = take_nodes(m, nodes)
    missing = missing_pages(m, first, order)
    if taken < nodes or frames_left(m) < missing:
        put_nodes(m, taken)
        if cached:
            charge_one(m, EVENT_PAGE_CACHE_STORED)  # merge_entries() stores the folio again
        return NO_MEMORY
    write_pages(m, head, first, order, missing != U0, index, U1 << order, zeroed_word)
    if missing != U0:
        end_restore(m, first, order)
    charge_pages(m, order, SPLIT_BYTES)
    if cached:
        charge(m, EVENT_PAGE_CACHE_STORED, np.int64(U1 << order))
        stored_at_once(m, np.int64(U1 << order))  # __xa_store() of each page
    return np.int64(0)


@outlined
def split_by_page(m, head, first, order, index, references, cached, zeroed_word):
    """guestmem_hugetlb_split_folio() and kvm_gmem_split_folio_in_filemap(): 0 or -ENOMEM.

    Without memory for the stash or the vmemmap nothing has changed. Without memory for a node, the pages before the
    one that needs it have been inserted; they are removed and the folio is merged again.
    """
    pages = U1 << order
    uptodate = m.ram[first + FLAGS] >> U3 & U1
    missing = missing_pages(m, first, order)
    if cached:
        charge_one(m, EVENT_PAGE_CACHE_STORED)
    stashed = stash(m)
    if not stashed or frames_left(m) < missing:
        if stashed:
            unstash(m)
        if cached:
            charge_one(m, EVENT_PAGE_CACHE_STORED)
        return NO_MEMORY
    nodes = nodes_of(m.state, order) if cached else U0
    obtained = min(nodes, obtainable(m, missing))  # after the vmemmap's frames
    inserted = U0
    if cached:
        inserted = pages if obtained == nodes else page_without_node(m.state, order, obtained)
    write_pages(m, head, first, order, missing != U0, index, inserted, zeroed_word)
    if missing != U0:
        end_restore(m, first, order)
    charge_pages(m, order, RFC2_SPLIT_BYTES)
    take_nodes(m, obtained)
    if inserted != U0:
        charge(m, EVENT_PAGE_CACHE_STORED, np.int64(inserted))
    if obtained == nodes:
        return np.int64(0)
    put_nodes(m, obtained)
    if inserted != U0:  # frozen and removed
        charge(m, EVENT_FOLIO_FROZEN, np.int64(inserted))
        charge(m, EVENT_PAGE_CACHE_STORED, np.int64(inserted))
    join_pages(m, head, first, order)
    prepare_head(m, head, first, order, references, uptodate)
    charge_one(m, EVENT_PAGE_CACHE_STORED)
    return NO_MEMORY


@outlined
def split_folio_from(m, head, order, index, references, zeroed_word):
    """split_folio(), whose pages may be up to date one by one (see write_pages())."""
    first = struct_page(m, head)
    if reference_count(m.ram, first) != references:
        charge_one(m, EVENT_FREEZE_SPIN)
        return HELD
    cached = m.ram[first + MAPPING] != U0
    if m.state[R_SPLIT_FORM] == SPLIT_FORM_RFC2:
        status = split_by_page(m, head, first, order, index, references, cached, zeroed_word)
    else:
        status = split_in_place(m, head, first, order, index, cached, zeroed_word)
    if status == 0:
        charge_one(m, EVENT_FOLIO_FROZEN)
        charge_one(m, EVENT_FOLIO_SPLIT)
        poison_settled(m, head, U1 << order, True)
    return status


@kernel
def split_folio(m, head, order, index, references):
    """Split a huge folio that has `references` and no other: each page becomes a folio with one reference.

    Returns 0; -WOULD_SPIN with nothing changed where somebody else holds it (the posted code spins until nobody does);
    -ENOMEM with the folio huge as before. Page i gets `index` + i. A folio with a mapping is in the page cache: its
    pages take nodes there. The list of active huge pages is the caller's: leave_list(). The head's cgroup word becomes
    a tail's; rfc2 puts it back from its stash.

    Form rfc2 as posted stashed the flag vmemmap_optimized too, which kept a merge from optimising and made the next
    split hit a BUG(); here the flag is what the follow-up patch makes it. What posted code does with a
    poisoned page is a TODO there; here each piece has its own poison afterwards (folios/poison.py).
    """
    return split_folio_from(m, head, order, index, references, NONE)


@kernel
def known_bits(m, block, zeroed_word):
    """Where a folio's bits of zeroed pages begin, or NONE where the code knows none to be set."""
    return NONE if m.state[block + B_BITS] == U0 or knows_flags_only(m) else zeroed_word


@outlined
def split_block(m, block, index, zeroed_word):
    """Split the huge folio of a block into order-0 folios: 0, -WOULD_SPIN, or -ENOMEM, as split_folio().

    `index` is the block's first page, `zeroed_word` where its bits in `zeroed` begin: of a folio without the flag they
    tell which pages are up to date.
    """
    state = m.state
    order = state[R_ORDER]
    status = split_folio_from(m, state[block + B_PFN], order, index, U1 << order, known_bits(m, block, zeroed_word))
    if status != 0:
        return status
    leave_list(m, state[block + B_PFN])
    state[block + B_STATE] = BLOCK_SPLIT
    change(m.stats, GAUGE_BLOCKS_HUGE, -1)
    change(m.stats, GAUGE_BLOCKS_SPLIT, 1)
    return status
