"""The struct pages of a folio that is split or merged: words, metadata, charges."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U3, U6, U8, U9, U12, U32, U64, U511, U512, prefetch
from pgemu_kernels.engine.charge import change, charge
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.frames import take_frame
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
    struct_page,
    vmemmap_address,
)
from pgemu_kernels.folios.hstate import hstate_of_order, list_add, list_del
from pgemu_kernels.folios.hugetlb import prep_compound_head
from pgemu_kernels.folios.hvo import optimize
from pgemu_kernels.folios.vmemmap import compound_info, rewrite, rewrite_pages, vmemmap_pages, vmemmap_pte
from pgemu_kernels.folios.xarray import unstash
from pgemu_kernels.formats.bits import PTE_ADDRESS
from pgemu_kernels.words.enum_words import (
    EVENT_STRUCT_PAGE_BYTES,
    EVENT_STRUCT_PAGE_WRITTEN,
    GAUGE_STORES_IRQ_OFF,
)
from pgemu_kernels.words.operations import ENOMEM, WOULD_SPIN
from pgemu_kernels.words.registers import (
    R_FOLIO_6_12,
    R_MASK_TAILS,
    R_OPTIMIZE_VMEMMAP,
    R_RESET_STRUCT_PAGES,
    R_SPLIT_FORM,
    R_VMEMMAP_PAGE,
)
from pgemu_kernels.words.rows import H_ACTIVE, SPLIT_FORM_RFC2

U = np.uint64


NO_MEMORY = np.int64(-ENOMEM)


HELD = np.int64(-WOULD_SPIN)  # a folio cannot be frozen


SPLIT_BYTES = 44


MERGE_BYTES = 24


# The flags below PG_dropbehind (PG_mlocked before 6.14), of which a page has its own; above are hwpoison, node, zone.
PAGE_FLAGS = U((1 << 19) - 1)


# ... and those of them that __split_folio_to_order() takes from the head: locked, referenced, uptodate, dirty, active,
# workingset, swapcache, swapbacked, unevictable.
INHERITED = U(1 << 0 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 8 | 1 << 9 | 1 << 10 | 1 << 17 | 1 << 18)


@kernel
def missing_pages(m, first, order):
    """How many vmemmap pages a folio lacks."""
    if m.ram[first + PRIVATE] & HUGETLB_VMEMMAP_OPTIMIZED == U0:
        return U0
    return vmemmap_pages(order) - U1


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
    if bits != U0:
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
def stored_at_once(m, stores):
    """So many (int64) stores and freed nodes were one section under xa_lock_irq()."""
    change(m.stats, GAUGE_STORES_IRQ_OFF, stores)
    change(m.stats, GAUGE_STORES_IRQ_OFF, -stores)


@kernel
def charge_pages(m, order, size):
    """`size` bytes were stored in each tail."""
    tails = np.int64(U1 << order) - 1
    charge(m, EVENT_STRUCT_PAGE_WRITTEN, tails)
    charge(m, EVENT_STRUCT_PAGE_BYTES, size * tails)


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


@kernel
def tail_words(m, head, order):
    """What a 4K folio gets as a tail: rewrite()'s `kept` and `put`. Flags and private stay."""
    kept = (NONE, U0, NONE, U0), (NONE, NONE, U0, NONE)
    return kept, ((U0, compound_info(m.state, head, order), U0, TAIL_MAPPING), (U0, U0, NO_MAPCOUNT, U0))


@kernel
def gives_up(m):
    """Whether a folio that is merged gives up its vmemmap pages but the first, if there is memory for it."""
    return m.state[R_OPTIMIZE_VMEMMAP] != U0


@outlined
def join_pages(m, head, first, order):
    """Freeze the 4K folios of a huge page and make them tails.

    (Whether one is busy; how many are up to date, and from which page to which they lie, in steps of 64.)

    Busy is one that has another reference count than 1 or is mapped: then nothing has changed. Flags and private stay
    as they are until clean_tails(). The posted code freezes all before it prepares the first; here a vmemmap page is
    looked over and rewritten at once, and undone when a later one is busy. What lies in a vmemmap page that is to be
    given up is not rewritten: prepare_head() does it where that fails.
    """
    ram = m.ram
    link = ram[first + COMPOUND]
    mapping = ram[first + MAPPING]
    kept, tail = tail_words(m, head, order)
    folio = (U0, U0, U0, mapping), (U0, U0, ONE_CACHED, U0)
    pages = U1 << order
    stays = U64 if gives_up(m) else pages
    base = different = uptodate = end = U0
    start = pages
    following = first
    while base < pages and different == U0:
        page = following
        following = struct_page(m, head + min(base + U64, pages - U1))
        ahead = following - page
        before = uptodate
        for at in range(page, page + U512, U8):
            prefetch(ram, at + ahead)
            different |= ram[at + COUNTS] ^ ONE_CACHED
            uptodate += ram[at + FLAGS] >> U3 & U1
        if uptodate != before:
            start = min(start, base)
            end = base + U64
        if different == U0:
            if base < stays:
                rewrite(ram, page, page, U64, U512, NONE, kept, tail)
            base += U64
    if different != U0:
        rewrite_pages(m, head, head + min(base, stays), kept, folio)
    ram[first + COMPOUND] = link
    ram[first + MAPPING] = mapping
    return different != U0, uptodate, start, end


@outlined
def clean_tails(m, head, start, end):
    """Take flags and private from pages [start, end) of a folio.

    Inference as for flags: no posted version says where they go; a tail that kept PG_uptodate would be copied into
    every page of the next restore.
    """
    kept = (~PAGE_FLAGS, NONE, NONE, NONE), (NONE, U0, NONE, NONE)
    nothing = (U0, U0, U0, U0), (U0, U0, U0, U0)
    rewrite_pages(m, head + start, head + end, kept, nothing)


@kernel
def uptodate_bits(ram, page):
    """Which of 64 struct pages are up to date, a bit each."""
    bits = U0
    for i in range(U64):
        bits |= (ram[page + i * U8 + FLAGS] >> U3 & U1) << i
    return bits


@outlined
def note_uptodate(m, head, order, start, end, zeroed_word):
    """Store which 4K folios of a huge page are up to date, a bit each; none is outside pages [start, end) of it."""
    for base in range(U0, U1 << order, U64):
        inside = start <= base < end
        m.state[zeroed_word + (base >> U6)] = uptodate_bits(m.ram, struct_page(m, head + base)) if inside else U0


@outlined
def prepare_head(m, head, first, order, references, uptodate):
    """The head of joined pages, with `references`; then hugetlb_vmemmap_optimize_folio(), whose failure nobody minds.

    prep_compound_page(). `uptodate` (0 or 1): whether the folio is up to date as a whole. Vmemmap pages that are freed
    are neither rewritten nor cleaned before: nobody reads them again.
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
        if gives_up(m):
            kept, tail = tail_words(m, head, order)
            rewrite_pages(m, head + U64, head + (U1 << order), kept, tail)
        clean_tails(m, head, U64, U1 << order)
