"""The recount's part of large folios of anonymous memory: what their struct pages count."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import LOW32, U0, U1, U8, U64, U512
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.folios.anonymous_folios import (
    ENTIRELY_MAPPED,
    entire_mapcount,
    is_of_anonymous_folio,
    large_mapcount,
    mapped_by_one,
    maybe_mapped_shared,
    pages_mapped,
)
from pgemu_kernels.folios.folio import COUNTS, FLAGS, PG_ANON_EXCLUSIVE, reference_count, struct_page
from pgemu_kernels.folios.hstate import node_row
from pgemu_kernels.folios.page_allocator import is_block_free
from pgemu_kernels.rules.invariants import expect, expect_gauge
from pgemu_kernels.words.enum_words import BROKEN_COUNTS, BROKEN_REFERENCES, GAUGE_ANON_HUGE_PAGES
from pgemu_kernels.words.registers import (
    R_FOLIO_6_12,
    R_HOLDERS_OFF,
    R_HUGE_ANONYMOUS,
    R_HUGE_ZERO_FRAME,
    R_LARGE_MAPPED,
    R_NODES,
)
from pgemu_kernels.words.rows import N_BASE, N_PAGES

U = np.uint64


@kernel
def _count_pages(m, head, entire):
    """(sum of the pages' own mapcounts, how many of them are mapped by 4K entries) of a large folio.

    A page that is one mapping's alone is mapped once; the flag stays when that mapping goes.
    """
    total = U0
    mapped = U0
    for base in range(head, head + U512, U64):
        page = struct_page(m, base)
        for pfn in range(base, base + U64):
            count = m.ram[page + COUNTS] + U1 & LOW32
            exclusive = m.ram[page + FLAGS] & PG_ANON_EXCLUSIVE != U0
            expect(m, not exclusive or count + entire <= U1, BROKEN_COUNTS, pfn)
            total += count
            mapped += U1 if count != U0 else U0
            page += U8
    return total, mapped


@outlined
def _check_folio(m, head):
    """One folio: (entries that map it, pages that are mapped, whether a 2M leaf does)."""
    ram = m.ram
    page = struct_page(m, head)
    entire = entire_mapcount(m, page)
    mappings = large_mapcount(ram, page)
    total, mapped = _count_pages(m, head, entire)
    expect(m, mappings == total + entire, BROKEN_COUNTS, head)
    # What pins alone hold has no references while those are taken off.
    expect(m, mappings != U0 or m.state[R_HOLDERS_OFF] != U0, BROKEN_COUNTS, head)
    whole = ENTIRELY_MAPPED if entire != U0 else U0
    expect(m, pages_mapped(m, page) == mapped + whole, BROKEN_COUNTS, head)
    expect(m, reference_count(ram, page) == mappings, BROKEN_REFERENCES, head)
    if m.state[R_FOLIO_6_12] == U0 and not maybe_mapped_shared(ram, page):
        expect(m, mapped_by_one(ram, page) == mappings, BROKEN_COUNTS, head)
    return mappings, U512 if entire != U0 else mapped, entire != U0


@outlined
def check_anonymous_folios(m, found):
    """All of them against what was found of entries that map them (int64), and what the machine keeps."""
    state = m.state
    if state[R_HUGE_ANONYMOUS] == U0:
        return
    mappings = U0
    pages = U0
    huge = np.int64(0)
    for node in range(state[R_NODES]):
        base = state[node_row(node) + N_BASE]
        for pfn in range(base, base + state[node_row(node) + N_PAGES], U512):
            if is_block_free(state, pfn) or not is_of_anonymous_folio(m, pfn):
                continue
            if pfn == state[R_HUGE_ZERO_FRAME]:
                expect(m, reference_count(m.ram, struct_page(m, pfn)) == U1, BROKEN_REFERENCES, pfn)
                continue
            of_folio, of_pages, is_huge = _check_folio(m, pfn)
            mappings += of_folio
            pages += of_pages
            huge += 1 if is_huge else 0
    expect(m, np.int64(mappings) == found, BROKEN_COUNTS, mappings)
    expect(m, pages == state[R_LARGE_MAPPED], BROKEN_COUNTS, pages)
    expect_gauge(m, GAUGE_ANON_HUGE_PAGES, huge)
