"""Which pages of an inode's huge pages were zeroed since they are its own.

A huge page comes from the pool with what its last owner left in it, and so it does at boot: HugeTLB clears pages when
they are used, not when they are freed (mm/hugetlb.c:free_huge_folio()). PG_uptodate says of all pages of a folio that
they were zeroed. A bit per page says it of those of a folio without the flag, where zeroing goes by page or a merge has
left some; and, on machines with a defect by which the flag lies, what happened to any page (rules/invariants.py).

Another bit per page says that guest or host were shown the page since then. It is kept where a defect may show them
what was never zeroed, to count such pages once each, or zero what they have, to tell what is lost.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import ALL, U0, U1, U2, U6, U63, U64, population
from pgemu_kernels.engine.charge import charge
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.frames import drop_contents
from pgemu_kernels.engine.handle import full_only
from pgemu_kernels.engine.memslots import first_binding, next_binding
from pgemu_kernels.engine.properties import splits_folios
from pgemu_kernels.engine.shareability import mask_at
from pgemu_kernels.words.enum_words import (
    DEFECT_HOLE_ZEROES_FROM_START,
    DEFECT_HUGE_OVER_PRIVATE,
    DEFECT_MAPPING_ORDER,
    DEFECT_MERGE_KEEPS_FLAG,
    DEFECT_UPTODATE_UNZEROED,
    EVENT_PAGE_ZEROED,
    EVENT_ZEROED_UNREACHED,
    GAUGE_CONTENT_FRAMES,
)
from pgemu_kernels.words.events import STATS_GAUGES
from pgemu_kernels.words.registers import R_DEFECTS, R_ORDER, R_SHOWN_ROWS, R_WORD_ROWS, R_ZERO_PAGE
from pgemu_kernels.words.rows import I_WORD, M_PAGES, M_PGOFF

U = np.uint64

# --------------------------------------------------------------------------- flags that lie


@kernel
def flags_lie(m):
    """Whether the machine has a defect by which PG_uptodate lies; the bits are kept of every page then."""
    return (
        m.state[R_DEFECTS] & (DEFECT_UPTODATE_UNZEROED | DEFECT_MERGE_KEEPS_FLAG) != U0
        and splits_folios(m)
        and m.state[R_ORDER] != U0
    )


@kernel
def knows_flags_only(m):
    """Whether PG_uptodate is all that is known, so that a folio without it counts as never zeroed."""
    return flags_lie(m) and (m.state[R_DEFECTS] & DEFECT_UPTODATE_UNZEROED != U0 or m.state[R_ZERO_PAGE] == U0)


@kernel
def mistakes_zeroing(m):
    """Whether a flag lies, a leaf may be larger than the folio that its fault has zeroed, or a hole zeroes too much."""
    others = DEFECT_MAPPING_ORDER | DEFECT_HUGE_OVER_PRIVATE | DEFECT_HOLE_ZEROES_FROM_START
    return m.state[R_ORDER] != U0 and (flags_lie(m) or m.state[R_DEFECTS] & others != U0)


keeps_shown = full_only(mistakes_zeroing, flags_lie)  # default machines have none of the others


# --------------------------------------------------------------------------- bits


@kernel
def shown_bits(state, node):
    """Where an inode's bits of pages begin that guest or host were shown. Only where keeps_shown()."""
    return state[R_SHOWN_ROWS] + state[node + I_WORD] - state[R_WORD_ROWS]


@kernel
def all_zeroed(m, word, first, end):
    """Whether all pages [first, end) of an inode are zeroed; `word`: where its bits begin. Looks from the end on."""
    at = end
    while at > first:
        low = max(first, (at - U1) & ~U63)
        mask = mask_at(low, at)
        if m.state[word + (low >> U6)] & mask != mask:
            return False
        at = low
    return True


@kernel
def word_mask(index, end):
    """mask_at(), without the arithmetic where the whole word lies in [index, end)."""
    return ALL if index & U63 == U0 and end - index >= U64 else mask_at(index, end)


@outlined
def bits_in(m, word, first, end):
    """How many of pages [first, end) have their bit set; `word`: where the inode's begin."""
    found = U0
    index = first
    while index < end:
        found += population(m.state[word + (index >> U6)] & word_mask(index, end))
        index = (index | U63) + U1
    return found


@outlined
def note_zeroed(m, word, first, end):
    """Pages [first, end) were zeroed."""
    index = first
    while index < end:
        m.state[word + (index >> U6)] |= word_mask(index, end)
        index = (index | U63) + U1


@outlined
def drop_each(m, missing, pfn):
    """Zero the guest frames of a word's pages whose bit is set; `pfn`: frame of its first page."""
    for i in range(U64):
        if missing >> i & U1 != U0:
            drop_contents(m, pfn + i, U1)


@outlined
def zero_pages(m, word, first, end, pfn):
    """Zero those of pages [first, end) of an inode that never were, 4K at a time; `pfn`: frame of `first`."""
    state = m.state
    contents = m.stats[STATS_GAUGES + GAUGE_CONTENT_FRAMES * U2] != 0
    zeroed = U0
    index = first
    while index < end:
        at = word + (index >> U6)
        missing = word_mask(index, end) & ~state[at]
        if missing != U0:
            state[at] |= missing
            zeroed += population(missing)
            if contents:
                drop_each(m, missing, pfn + (index & ~U63) - first)
        index = (index | U63) + U1
    if zeroed != U0:
        charge(m, EVENT_PAGE_ZEROED, np.int64(zeroed))


# --------------------------------------------------------------------------- reach


@outlined
def slots_from(m, inode, at, end):
    """(up to where memory slots of an inode reach from page `at` on, `at` if none does; where the next slot begins)."""
    state = m.state
    reach = at
    slot = first_binding(state, inode, at, end)
    while slot != U0 and state[slot + M_PGOFF] <= at:
        reach = max(reach, state[slot + M_PGOFF] + state[slot + M_PAGES])
        slot = next_binding(state, slot, at, end)
    return min(reach, end), state[slot + M_PGOFF] if slot != U0 else end


@outlined
def charge_unreached(m, inode, word, first, end):
    """Pages [first, end) are about to be zeroed, those that never were: count the ones that no memory slot reaches.

    Slots as they are now: memory that a slot reaches later only was zeroed for nobody yet.
    """
    unreached = U0
    at = first
    while at < end:
        reach, following = slots_from(m, inode, at, end)
        if reach == at:
            unreached += following - at - bits_in(m, word, at, following)
            at = following
        else:
            at = reach
    if unreached != U0:
        charge(m, EVENT_ZEROED_UNREACHED, np.int64(unreached))
