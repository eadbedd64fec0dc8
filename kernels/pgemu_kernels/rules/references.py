"""The recount's part of references: every one of a folio of the designs has its holder.

Holders are the page cache, page-table entries, pins, pages that KVM itself maps, LRU batches, faults under way, memory
failure, and transient ones (GET), which are counted by folio. What the third to sixth hold is taken off the counts
before recount.check() and put back after it (full.run_designs, where there is any); the rest of a folio's count must be
what the others hold, no more, no less.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import LOW32, U0, U1, U2, U8, U32, U64, U511, U512
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.folios.counts import PINCOUNT, pin_count
from pgemu_kernels.folios.folio import (
    COUNTS,
    add_references,
    folio_test_large,
    mappings,
    reference_count,
    struct_page,
)
from pgemu_kernels.folios.hstate import in_zone
from pgemu_kernels.folios.pinning import head_in_zone
from pgemu_kernels.folios.poison import is_held_by_failure
from pgemu_kernels.folios.xarray import has_pieces
from pgemu_kernels.gmem.mapped_pages import left_behind, may_be_used
from pgemu_kernels.gmem.references import folio_head, transient
from pgemu_kernels.rules.invariants import expect
from pgemu_kernels.stage2.pfn_caches import mapped_row
from pgemu_kernels.words.enum_words import (
    BROKEN_COUNTS,
    BROKEN_POISON_MAPPED,
    BROKEN_REFERENCES,
    BROKEN_STALE_MAPPING,
    GAUGE_PAGES_LRU_CACHED,
    GAUGE_PAGES_PINNED,
)
from pgemu_kernels.words.events import STATS_GAUGES
from pgemu_kernels.words.mapped_pages import (
    K_INDEX,
    K_PFN,
    K_REFERENCES,
)
from pgemu_kernels.words.registers import (
    R_BLOCK_ROWS,
    R_BLOCKS,
    R_EXTRA_REFERENCES,
    R_FAULT_REFERENCES,
    R_FROZEN,
    R_GUEST_PAGES,
    R_HUGE_ZERO_FRAME,
    R_LRU_CPUS,
    R_MAPPED,
    R_ORDER,
    R_PINNED,
    R_TRANSIENT,
    R_ZERO_FRAME,
)
from pgemu_kernels.words.rows import (
    ACTORS,
    B_PFN,
    B_STATE,
    B_WORDS,
    BLOCK_ZOMBIE,
    GUP_PIN_COUNTING_BIAS,
    LRU_WORDS,
    O_REFERENCED,
    O_WORDS,
    STATE_FROZEN,
    STATE_LRU,
    STATE_OPS,
    Z_PFN,
    Z_REFERENCES,
    Z_WORDS,
)

U = np.uint64
_TRANSIENT = U((1 << 31) - 1)


@kernel
def by_failure(m, pfn):
    """Memory failure's references of the folio whose first frame is `pfn`: one or none."""
    return U1 if is_held_by_failure(m, pfn) else U0


@outlined
def _hold(m, pfn, n, giving):
    """Give a folio of order 0 back `n` references, or take them away."""
    if not in_zone(m.state, pfn):
        expect(m, False, BROKEN_REFERENCES, pfn)
        return
    page = struct_page(m, pfn)
    expect(m, giving or reference_count(m.ram, page) >= n, BROKEN_REFERENCES, pfn)
    add_references(m.ram, page, n if giving else U0 - n)


@kernel
def _hold_pin(m, pfn, n, giving):
    """The same of `n` pins of a page: their references, and what counts them."""
    if not in_zone(m.state, pfn):
        at = m.state[R_PINNED] + pfn
        expect(m, giving or U(m.counts[at]) >= n, BROKEN_REFERENCES, pfn)
        m.counts[at] = np.uint32(U(m.counts[at]) + (n if giving else U0 - n) & LOW32)
        return
    page = struct_page(m, head_in_zone(m, pfn))
    large = folio_test_large(m.ram, page)
    references = n if large else n * GUP_PIN_COUNTING_BIAS
    if large:
        expect(m, giving or pin_count(m.ram, page) >= n, BROKEN_REFERENCES, pfn)
        m.ram[page + PINCOUNT] += (n if giving else U0 - n) << U32
    expect(m, giving or reference_count(m.ram, page) >= references, BROKEN_REFERENCES, pfn)
    add_references(m.ram, page, references if giving else U0 - references)


@kernel
def _hold_pins(m, pages, pins, giving):
    """What pins hold of `pages` (frame numbers), each as often as `pins` says: how many that are."""
    pinned = U0
    for i in range(U(pages.size)):
        pinned += pins[i]
        if pages[i] != m.state[R_ZERO_FRAME] and (pages[i] & ~U511 != m.state[R_HUGE_ZERO_FRAME] or pages[i] < U512):
            _hold_pin(m, pages[i], pins[i], giving)
    return pinned


@kernel
def _hold_mapped(m, giving):
    """What KVM itself holds of pages that it has mapped, but for pins. No mapping that it may use shows a page that is
    private, or its inode's no more."""
    state = m.state
    for i in range(state[R_MAPPED]):
        row = mapped_row(i)
        held = state[row + K_REFERENCES]
        if held != U0 and held != GUP_PIN_COUNTING_BIAS:
            _hold(m, folio_head(m, state[row + K_PFN]), held, giving)
        if not giving and may_be_used(state, row):
            private, freed = left_behind(m, row)
            expect(m, not (private or freed), BROKEN_STALE_MAPPING, state[row + K_INDEX])


@kernel
def _hold_batches(m, giving):
    """What the LRU batches hold: how many folios."""
    state = m.state
    cached = U0
    for cpu in range(state[R_LRU_CPUS]):
        row = STATE_LRU + cpu * U(LRU_WORDS)
        for at in range(row + U1, row + U1 + state[row]):
            _hold(m, state[at], U1, giving)
        cached += state[row]
    return cached


@kernel
def _hold_faults(m, giving):
    """What faults under way hold: how many references."""
    state = m.state
    faults = U0
    for actor in range(U(ACTORS)):
        referenced = state[STATE_OPS + actor * U(O_WORDS) + O_REFERENCED]
        if referenced != U0:
            _hold(m, referenced - U1, U1, giving)
            faults += U1
    return faults


@outlined
def thaw(m, frozen):
    """Give the folios that FOLIO_FREEZE froze the references that it took, or (`frozen`) take them again."""
    state = m.state
    for i in range(state[R_FROZEN]):
        row = STATE_FROZEN + i * U(Z_WORDS)
        n = state[row + Z_REFERENCES]
        if n != U0:
            add_references(m.ram, struct_page(m, state[row + Z_PFN]), U0 - n if frozen else n)


@outlined
def hold_again(m, giving, pages, pins):
    """Give back, or take away, the references of pins, KVM's mappings, LRU batches and faults; compare with what is
    kept."""
    pinned = _hold_pins(m, pages, pins, giving)
    _hold_mapped(m, giving)
    cached = _hold_batches(m, giving)
    faults = _hold_faults(m, giving)
    if not giving:
        expect(m, m.stats[STATS_GAUGES + GAUGE_PAGES_PINNED * U2] == np.int64(pinned), BROKEN_COUNTS, pinned)
        expect(m, m.stats[STATS_GAUGES + GAUGE_PAGES_LRU_CACHED * U2] == np.int64(cached), BROKEN_COUNTS, cached)
        expect(m, m.state[R_FAULT_REFERENCES] == faults, BROKEN_REFERENCES, faults)


@outlined
def check_folio(m, head, cached):
    """A folio's references, less what was taken off: `cached` of the page cache's, its mappings', transient ones."""
    page = struct_page(m, head)
    held = cached + mappings(m.ram, page) + transient(m, head) + by_failure(m, head)
    expect(m, reference_count(m.ram, page) == held, BROKEN_REFERENCES, head)
    expect(m, by_failure(m, head) == U0 or mappings(m.ram, page) == U0, BROKEN_POISON_MAPPED, head)


@outlined
def check_pieces(m, head, pages, cached):
    """The same of the 4K folios from `head` on: a multiple of 64."""
    for base in range(U0, pages, U64):
        page = struct_page(m, head + base)
        for pfn in range(head + base, head + base + U64):
            held = cached + mappings(m.ram, page) + transient(m, pfn) + by_failure(m, pfn)
            expect(m, m.ram[page + COUNTS] >> U32 == held, BROKEN_REFERENCES, pfn)
            expect(m, by_failure(m, pfn) == U0 or mappings(m.ram, page) == U0, BROKEN_POISON_MAPPED, pfn)
            page += U8


@outlined
def check_outside(m):
    """Pieces of zombie blocks, and the sum of transient references: of folios outside of inodes as well."""
    state = m.state
    for i in range(state[R_BLOCKS]):
        row = state[R_BLOCK_ROWS] + i * U(B_WORDS)
        if state[row + B_STATE] == BLOCK_ZOMBIE and not has_pieces(state):  # else in piece_recount.py
            check_pieces(m, state[row + B_PFN], U1 << state[R_ORDER], U0)
    if state[R_EXTRA_REFERENCES] != U0:
        total = U0
        for at in range(state[R_TRANSIENT], state[R_TRANSIENT] + state[R_GUEST_PAGES]):
            total += (U(m.counts[at]) & _TRANSIENT) + (U(m.counts[at]) >> U(31))
        expect(m, total == state[R_EXTRA_REFERENCES], BROKEN_REFERENCES, total)
