"""Split of a huge folio to 4K folios, and merge of these: design restructure.

Two posted forms, chosen by the register R_SPLIT_FORM. `rfc2` (May 2025; mm/guestmem_hugetlb.c, virt/kvm/guest_memfd.c)
takes the folio out of the page cache and puts its pages in one by one. The later form (from late 2025 on;
mm/hugetlb_restructuring.c) splits and merges the entry in place, with mm/huge_memory.c:__split_folio_to_order().

A restored vmemmap page is written once, in its final form: that leaves the bytes that vmemmap.restore() and a rewrite
of each struct page would leave.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U3, U6, U8, U9, U12, U32, U64, U511, U512, merge_words, prefetch
from pgemu_kernels.engine.charge import change, charge, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.frames import frames_left, take_frame, zero_contents
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
    PG_HEAD,
    PG_UPTODATE,
    PGTY_HUGETLB,
    PRIVATE,
    TAIL_MAPPING,
    reference_count,
    struct_page,
    vmemmap_address,
)
from pgemu_kernels.folios.hstate import hstate_of_order, list_add, list_del
from pgemu_kernels.folios.hugetlb import free_block, own_merged, prep_compound_head, stop_waiting
from pgemu_kernels.folios.vmemmap import compound_info, end_restore, optimize, vmemmap_pages, vmemmap_pte
from pgemu_kernels.folios.xarray import nodes_of, obtainable, page_without_node, put_nodes, stash, take_nodes, unstash
from pgemu_kernels.formats.bits import PTE_ADDRESS
from pgemu_kernels.words.enum_words import (
    EVENT_DEFERRED_MERGE,
    EVENT_FOLIO_GATE_CHECKED,
    EVENT_FOLIO_MERGED,
    EVENT_FOLIO_SPLIT,
    EVENT_FREEZE_SPIN,
    EVENT_PAGE_CACHE_STORED,
    EVENT_PAGE_ZEROED,
    EVENT_STRUCT_PAGE_BYTES,
    EVENT_STRUCT_PAGE_WRITTEN,
    GAUGE_BLOCKS_HUGE,
    GAUGE_BLOCKS_SPLIT,
    GAUGE_BLOCKS_ZOMBIE,
)
from pgemu_kernels.words.operations import EBUSY, ENOMEM
from pgemu_kernels.words.registers import (
    R_FOLIO_6_12,
    R_MASK_TAILS,
    R_ORDER,
    R_RESET_STRUCT_PAGES,
    R_SPLIT_FORM,
    R_VMEMMAP_PAGE,
    R_ZERO_PAGE,
)
from pgemu_kernels.words.rows import B_PFN, B_STATE, BLOCK_HUGE, BLOCK_SPLIT, H_ACTIVE, SPLIT_FORM_RFC2

U = np.uint64
NO_MEMORY = np.int64(-ENOMEM)
BUSY = np.int64(-EBUSY)

# Bytes stored in each tail. rfc2: flags, mapping, compound_info; then its insertion in the page cache stores refcount,
# mapping and index, which PAGE_CACHE_STORED counts. Later: flags, mapping, index, compound_info, memcg_data, refcount.
# Merge: mapping, compound_info, private (prep_compound_tail()); the freeze before it is FOLIO_GATE_CHECKED.
RFC2_SPLIT_BYTES = 24
SPLIT_BYTES = 44
MERGE_BYTES = 24

# The flags below PG_dropbehind (PG_mlocked before 6.14), of which a page has its own; above are hwpoison, node, zone.
PAGE_FLAGS = U((1 << 19) - 1)
# ... and those of them that __split_folio_to_order() takes from the head: locked, referenced, uptodate, dirty, active,
# workingset, swapcache, swapbacked, unevictable.
INHERITED = U(1 << 0 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 8 | 1 << 9 | 1 << 10 | 1 << 17 | 1 << 18)


# --------------------------------------------------------------------------- split


@kernel
def missing_pages(m, first, order):
    """How many vmemmap pages a folio lacks."""
    if m.ram[first + PRIVATE] & HUGETLB_VMEMMAP_OPTIMIZED == U0:
        return U0
    return vmemmap_pages(order) - U1


@outlined
def rewrite(ram, page, source, count, ahead, index, kept, put):
    """Write `count` struct pages from `page` on: what those from `source` on have, changed.

    `kept`, `put`: of words 0 to 3 and of words 4 to 7, which bits stay and which are set. `index` is or-ed into the
    index of the first page, index + 1 into that of the next, unless it is NONE. `ahead`: words to what is prefetched.
    """
    step = U1
    if index == NONE:
        index = step = U0
    for _ in range(count):
        prefetch(ram, page + ahead)
        merge_words(ram, page, source, kept[0], put[0], U0)
        merge_words(ram, page + INDEX, source + INDEX, kept[1], put[1], index)
        index += step
        page += U8
        source += U8


@kernel
def final_words(m, first):
    """What a page gets from the head of its folio: rewrite()'s `kept` and `put`, index aside.

    rfc2 copies the flags and leaves memcg_data alone; the later form mixes the flags and copies memcg_data.
    """
    ram = m.ram
    flags = ram[first + FLAGS] & ~PG_HEAD
    mapping = ram[first + MAPPING]
    if m.state[R_SPLIT_FORM] == SPLIT_FORM_RFC2:
        return ((U0, U0, NONE, U0), (U0, NONE, U0, NONE)), ((flags, U0, U0, mapping), (U0, U0, ONE_CACHED, U0))
    put = (flags & INHERITED, U0, U0, mapping), (U0, U0, ONE_CACHED, ram[first + MEMCG])
    return ((~PAGE_FLAGS, U0, NONE, U0), (U0, NONE, U0, U0)), put


@kernel
def mark_uptodate(ram, page, bits):
    """Set PG_uptodate of those of 64 struct pages whose bit is set."""
    for i in range(U64):
        ram[page + i * U8 + FLAGS] |= (bits >> i & U1) << U3


@outlined
def write_pages(m, head, first, order, restored, index, indexed, zeroed_word):
    """Make every page of a folio a folio of its own, referenced once.

    `restored`: its vmemmap pages but the first are mapped here, to new frames. Page i gets `index` + i if i <
    `indexed`, a multiple of 64. `zeroed_word`: where the folio is not up to date as a whole, its pages' bits (NONE:
    they are not). The first vmemmap page comes last: the others are made from it.
    """
    ram = m.ram
    state = m.state
    flags = ram[first + FLAGS] & ~PG_HEAD
    link = ram[first + COMPOUND]
    kept, put = final_words(m, first)
    index_too = (NONE, kept[1][1], kept[1][2], kept[1][3])
    by_page = flags & PG_UPTODATE == U0 and zeroed_word != NONE
    ram[first + U8 + (INDEX if state[R_FOLIO_6_12] != U0 else MEMCG)] = U0  # rfc2: folio->_nr_pages
    masks = state[R_MASK_TAILS] != U0
    reset = U0 if masks else state[R_RESET_STRUCT_PAGES]
    start = vmemmap_address(state, head)
    source = (ram[vmemmap_pte(m, start + U(4096))] & PTE_ADDRESS) >> U3 if restored and masks else first
    count = vmemmap_pages(order)
    slot = U0
    following = first >> U9
    for n in range(count + U1):
        frame = following
        if restored and n < count - U1:
            following = take_frame(m)
        if n == U0:
            continue
        base = n << U6 if n < count else U0
        number = index + base if base < indexed else NONE
        keep = (kept[0], kept[1] if base < indexed else index_too)
        if base == U0 or not restored:
            page = struct_page(m, head + base)
            rewrite(ram, page, page, U64, U512, number, keep, put)
        else:
            slot = vmemmap_pte(m, start + (n << U12)) if n == U1 or n & U511 == U0 else slot + U1
            ahead = (following - frame) << U9
            page = frame << U9
            ram[slot] = frame << U12 | state[R_VMEMMAP_PAGE]
            rewrite(ram, page, source, U64, ahead, number, keep, put)
            rewrite(ram, page, source + reset * U8, reset, ahead, number, keep, put)
        if by_page:
            mark_uptodate(ram, page, state[zeroed_word + (base >> U6)])
    # The head keeps the flags that no tail inherits, and the words of its list.
    ram[first + COMPOUND] = link
    ram[first + FLAGS] = flags | (ram[first + FLAGS] & PG_UPTODATE)


@kernel
def charge_pages(m, order, size):
    """`size` bytes were stored in each tail."""
    tails = np.int64(U1 << order) - 1
    charge(m, EVENT_STRUCT_PAGE_WRITTEN, tails)
    charge(m, EVENT_STRUCT_PAGE_BYTES, size * tails)


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
        charge(m, EVENT_FOLIO_GATE_CHECKED, np.int64(inserted))
        charge(m, EVENT_PAGE_CACHE_STORED, np.int64(inserted))
    join_pages(m, head, first, order)
    prepare(m, head, first, order, references, uptodate)
    charge_one(m, EVENT_PAGE_CACHE_STORED)
    return NO_MEMORY


@outlined
def split_folio_from(m, head, order, index, references, zeroed_word):
    """split_folio(), whose pages may be up to date one by one (see write_pages())."""
    first = struct_page(m, head)
    if reference_count(m.ram, first) != references:
        charge_one(m, EVENT_FREEZE_SPIN)
        return BUSY
    cached = m.ram[first + MAPPING] != U0
    if m.state[R_SPLIT_FORM] == SPLIT_FORM_RFC2:
        status = split_by_page(m, head, first, order, index, references, cached, zeroed_word)
    else:
        status = split_in_place(m, head, first, order, index, cached, zeroed_word)
    if status == 0:
        charge_one(m, EVENT_FOLIO_SPLIT)
    return status


@kernel
def split_folio(m, head, order, index, references):
    """Split a huge folio that has `references` and no other: each page becomes a folio with one reference.

    Returns 0; -EBUSY with nothing changed where somebody else holds it (the posted code spins until nobody does);
    -ENOMEM with the folio huge as before. Page i gets `index` + i. A folio with a mapping is in the page cache: its
    pages take nodes there. The list of active huge pages is the caller's: leave_list(). The head's cgroup word becomes
    a tail's; rfc2 puts it back from its stash.

    Form rfc2 as posted stashed the flag vmemmap_optimized too, which kept a merge from optimising and made the next
    split hit a BUG(); here the flag is what the follow-up patch makes it. No posted page is HWPoison (a TODO there).
    """
    return split_folio_from(m, head, order, index, references, NONE)


@outlined
def split_block(m, block, index, zeroed_word):
    """Split the huge folio of a block into order-0 folios: 0, -EBUSY, or -ENOMEM, as split_folio().

    `index` is the block's first page, `zeroed_word` where its bits in `zeroed` begin (they tell which
    pages are up to date where zeroing goes by page).
    """
    state = m.state
    order = state[R_ORDER]
    status = split_folio_from(m, state[block + B_PFN], order, index, U1 << order, zeroed_word)
    if status != 0:
        return status
    leave_list(m, state[block + B_PFN])
    state[block + B_STATE] = BLOCK_SPLIT
    change(m.stats, GAUGE_BLOCKS_HUGE, -1)
    change(m.stats, GAUGE_BLOCKS_SPLIT, 1)
    return status


@kernel
def leave_list(m, head):
    """In rfc2 a split folio leaves the list of active huge pages; the later form leaves its first page there."""
    if m.state[R_SPLIT_FORM] == SPLIT_FORM_RFC2:
        list_del(m, head)


@kernel
def join_list(m, head, order):
    """... and a merged one joins it again."""
    if m.state[R_SPLIT_FORM] == SPLIT_FORM_RFC2:
        list_add(m, hstate_of_order(order) + H_ACTIVE, head)


# --------------------------------------------------------------------------- merge


@outlined
def join_pages(m, head, first, order):
    """Freeze the 4K folios of a huge page and make them tails: (whether one is busy, how many are up to date).

    Busy is one that has another reference count than 1 or is mapped: then nothing has changed. Flags and private stay
    as they are until clean_tails(). The posted code freezes all before it prepares the first; here a vmemmap page is
    looked over and rewritten at once, and undone when a later one is busy.
    """
    ram = m.ram
    link = ram[first + COMPOUND]
    mapping = ram[first + MAPPING]
    kept = (NONE, U0, NONE, U0), (NONE, NONE, U0, NONE)
    tail = (U0, compound_info(m.state, head, order), U0, TAIL_MAPPING), (U0, U0, NO_MAPCOUNT, U0)
    folio = (U0, U0, U0, mapping), (U0, U0, ONE_CACHED, U0)
    pages = U1 << order
    base = different = uptodate = U0
    following = first
    while base < pages and different == U0:
        page = following
        following = struct_page(m, head + min(base + U64, pages - U1))
        ahead = following - page
        for at in range(page, page + U512, U8):
            prefetch(ram, at + ahead)
            different |= ram[at + COUNTS] ^ ONE_CACHED
            uptodate += ram[at + FLAGS] >> U3 & U1
        if different == U0:
            rewrite(ram, page, page, U64, U512, NONE, kept, tail)
            base += U64
    if different != U0:
        for back in range(U0, base, U64):
            page = struct_page(m, head + back)
            rewrite(ram, page, page, U64, U512, NONE, kept, folio)
    ram[first + COMPOUND] = link
    ram[first + MAPPING] = mapping
    return different != U0, uptodate


@outlined
def clean_tails(m, head, start, end):
    """Take flags and private from pages [start, end) of a folio.

    Inference as for flags: no posted version says where they go; a tail that kept PG_uptodate would be copied into
    every page of the next restore.
    """
    kept = (~PAGE_FLAGS, NONE, NONE, NONE), (NONE, U0, NONE, NONE)
    nothing = (U0, U0, U0, U0), (U0, U0, U0, U0)
    for base in range(start, end, U64):
        page = struct_page(m, head + base)
        rewrite(m.ram, page, page, U64, U512, NONE, kept, nothing)


@outlined
def note_uptodate(m, head, order, zeroed_word):
    """Store which pages are up to date, a bit each."""
    for base in range(U0, U1 << order, U64):
        page = struct_page(m, head + base)
        bits = U0
        for i in range(U64):
            bits |= (m.ram[page + i * U8 + FLAGS] >> U3 & U1) << i
        m.state[zeroed_word + (base >> U6)] = bits


@kernel
def zero_the_rest(m, head, pages):
    """Zero the 4K folios of a block that are not up to date."""
    for i in range(pages):
        if m.ram[struct_page(m, head + i) + FLAGS] & PG_UPTODATE == U0:
            zero_contents(m, head + i, U1)


@outlined
def prepare(m, head, first, order, references, uptodate):
    """The head of joined pages, with `references`; then hugetlb_vmemmap_optimize_folio(), whose failure nobody minds.

    prep_compound_page(). `uptodate` (0 or 1): whether the folio is up to date as a whole. Vmemmap pages that are freed
    are not cleaned before.
    """
    ram = m.ram
    state = m.state
    flags = ram[first + FLAGS]
    private = ram[first + PRIVATE]
    clean_tails(m, head, U0, U64)
    ram[first + FLAGS] = (flags & ~PG_UPTODATE) | PG_HEAD | uptodate << U3
    ram[first + PRIVATE] = private
    ram[first + COUNTS] = PGTY_HUGETLB | references << U32
    prep_compound_head(ram, state, head, first, order)
    charge_pages(m, order, MERGE_BYTES)
    if state[R_SPLIT_FORM] == SPLIT_FORM_RFC2:
        unstash(m)
    optimize(m, head, order)
    if ram[struct_page(m, head) + PRIVATE] & HUGETLB_VMEMMAP_OPTIMIZED == U0:
        clean_tails(m, head, U64, U1 << order)


@outlined
def merge_pages(m, head, first, order, index, references, uptodate):
    """merge_folio(), when the pages have been joined."""
    pages = np.int64(U1 << order)
    cached = m.ram[first + MAPPING] != U0
    rfc2 = m.state[R_SPLIT_FORM] == SPLIT_FORM_RFC2
    charge(m, EVENT_FOLIO_GATE_CHECKED, pages)  # each is frozen
    if cached:
        charge(m, EVENT_PAGE_CACHE_STORED, pages + 1 if rfc2 else np.int64(1))
        put_nodes(m, nodes_of(m.state, order))
        m.ram[first + INDEX] = index
    prepare(m, head, first, order, references, uptodate)
    charge_one(m, EVENT_FOLIO_MERGED)
    return np.int64(0)


@outlined
def merge_folio(m, head, order, index, references):
    """Merge the 4K folios of a huge page, one reference each, into one with `references`: 0, or -EBUSY.

    -EBUSY: a page is referenced by somebody else; the posted code spins in its freeze loop until that is gone, a
    caller here has to come again. No memory is needed: without a frame for the new head page the folio merely stays
    unoptimised. rfc2 inserts the folio in the page cache again, for which it may want nodes that the removal of the
    pages freed (inference: it gets them).
    """
    first = struct_page(m, head)
    busy, _ = join_pages(m, head, first, order)
    if busy:
        charge_one(m, EVENT_FREEZE_SPIN)
        return BUSY
    uptodate = m.ram[first + FLAGS] >> U3 & U1
    return merge_pages(m, head, first, order, index, references, uptodate)


@outlined
def merge_block(m, block, index, zeroed_word):
    """Merge a block's order-0 folios into one huge folio and optimise its vmemmap: 0, or -EBUSY as merge_folio().

    Inference: where the folio's flag must speak for all pages and only some were zeroed, the others are
    zeroed here; where zeroing goes by page, their bits go to `zeroed` from `zeroed_word` on (NONE: the
    folio is about to be freed). No posted version says.
    """
    state = m.state
    head = state[block + B_PFN]
    order = state[R_ORDER]
    if merge_zeroed(m, head, order, index, zeroed_word) != 0:
        return BUSY
    join_list(m, head, order)
    if state[R_SPLIT_FORM] == SPLIT_FORM_RFC2:
        own_merged(m, block, struct_page(m, head))  # from the stash
    state[block + B_STATE] = BLOCK_HUGE
    stop_waiting(m, block)
    change(m.stats, GAUGE_BLOCKS_SPLIT, -1)
    change(m.stats, GAUGE_BLOCKS_HUGE, 1)
    return np.int64(0)


@outlined
def merge_zeroed(m, head, order, index, zeroed_word):
    """merge_folio() with a reference per page, for a folio of which some pages may be zeroed: see merge_block()."""
    state = m.state
    pages = U1 << order
    first = struct_page(m, head)
    busy, uptodate = join_pages(m, head, first, order)
    if busy:
        return BUSY
    by_page = state[R_ZERO_PAGE] != U0
    if zeroed_word == NONE:
        uptodate = U0  # the folio is on its way to the pool
    elif not by_page and U0 < uptodate < pages:
        zero_the_rest(m, head, pages)
        charge(m, EVENT_PAGE_ZEROED, np.int64(pages - uptodate))
        uptodate = pages
    if by_page and zeroed_word != NONE:
        note_uptodate(m, head, order, zeroed_word)
    return merge_pages(m, head, first, order, index, pages, U1 if uptodate == pages else U0)


@kernel
def leave_cache(m, order):
    """The pages of a split folio have left the page cache: their nodes are free."""
    put_nodes(m, nodes_of(m.state, order))


@outlined
def revive(m, block):
    """The last piece of a zombie block was put: the worker merges it and gives it back to the pool."""
    head = m.state[block + B_PFN]
    for i in range(U1 << m.state[R_ORDER]):
        m.ram[struct_page(m, head + i) + COUNTS] = ONE_CACHED  # as merge_block() expects them
    m.state[block + B_STATE] = BLOCK_SPLIT
    change(m.stats, GAUGE_BLOCKS_ZOMBIE, -1)
    change(m.stats, GAUGE_BLOCKS_SPLIT, 1)
    charge_one(m, EVENT_DEFERRED_MERGE)
    merge_block(m, block, U0, NONE)
    free_block(m, block)
