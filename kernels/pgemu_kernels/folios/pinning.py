"""Pins of frames of any kind: what try_grab_folio() takes and gup_put_folio() gives back. mm/gup.c

A 4K page of ordinary memory has no struct page here: its references are its mappings, its page cache's, and 1024 for
each of its pins, which are counted by frame (R_PINNED). Frames of the HugeTLB zone have theirs in their struct pages.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import LOW32, U0, U1, U32, U511
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.folios.anonymous_folios import is_of_anonymous_folio, put_large
from pgemu_kernels.folios.counts import NEGATIVE, PINCOUNT, maybe_dma_pinned, pin_count, try_pin, unpin
from pgemu_kernels.folios.folio import ORDER_1G, is_huge_page, order_of, struct_page
from pgemu_kernels.folios.hstate import in_zone
from pgemu_kernels.folios.large_folios import head_and_order
from pgemu_kernels.folios.poison import free_unless_poisoned
from pgemu_kernels.words.registers import R_PINNED, R_PINNED_ALONE
from pgemu_kernels.words.rows import (
    GUP_PIN_COUNTING_BIAS,
    PAGE_CACHED,
    PAGE_DIRTY,
    PAGE_HELD,
    PAGE_MAPPINGS,
    PAGE_PINNED,
)

U = np.uint64
_INSIDE_1G = U((1 << 18) - 1)


@outlined
def head_in_zone(m, pfn):
    """compound_head() of a frame of the zone; of optimised huge pages some tails look like their heads."""
    head = pfn & ~U511
    if is_huge_page(m, head):
        return head
    head = pfn & ~_INSIDE_1G
    if in_zone(m.state, head) and is_huge_page(m, head) and order_of(m, head) == ORDER_1G:
        return head
    head, _order = head_and_order(m, pfn)
    return head


@kernel
def frame_references(m, frame):
    """What folio_ref_count() of a 4K page of ordinary memory would be."""
    word = U(m.counts[frame])
    cached = U1 if word & PAGE_CACHED != U0 else U0
    pins = U(m.counts[m.state[R_PINNED] + frame])
    return (word & PAGE_MAPPINGS) + cached + pins * GUP_PIN_COUNTING_BIAS & LOW32


@kernel
def _count_pins(m, frame, n):
    """A frame gets `n` pins more (uint64, two's complement to take away): its word, afterwards."""
    at = m.state[R_PINNED] + frame
    pins = U(m.counts[at]) + n & LOW32
    m.counts[at] = np.uint32(pins)
    word = U(m.counts[frame]) & ~PAGE_PINNED
    if pins != U0:
        word |= PAGE_PINNED
    m.counts[frame] = np.uint32(word)
    return word


@kernel
def _pin_frame(m, frame):
    if not U0 < frame_references(m, frame) < NEGATIVE:
        return False
    _count_pins(m, frame, U1)
    return True


@outlined
def pin_pages(m, pfn, n):
    """Pin `n` pages of one folio, from frame `pfn` on, which is mapped: whether its count allowed it."""
    if not in_zone(m.state, pfn):
        return _pin_frame(m, pfn)
    return try_pin(m.ram, struct_page(m, head_in_zone(m, pfn)), n)


@outlined
def unpin_frame(m, frame, dirty):
    """Give back a pin of a 4K page of ordinary memory, which goes if nobody has it any more.

    `dirty`: unpin_user_page_range_dirty_lock() with make_dirty, of what a file has.
    """
    word = _count_pins(m, frame, U0 - U1)
    if dirty and word & PAGE_CACHED != U0:
        m.counts[frame] = np.uint32(word | PAGE_DIRTY)
    if word & PAGE_HELD == U0:
        free_unless_poisoned(m, frame, word)
        m.state[R_PINNED_ALONE] -= U1


@outlined
def unpin_large_anonymous(m, head, n):
    """Give back `n` pins of a transparent huge page."""
    m.ram[struct_page(m, head) + PINCOUNT] -= n << U32
    put_large(m, head, n)


@outlined
def unpin_struct_page(m, head, n):
    """Give back `n` pins of a folio that its struct page counts alone: whether the last reference went with them."""
    return unpin(m.ram, struct_page(m, head), n)


@outlined
def is_transparent(m, head):
    """Whether a folio of the zone is one of anonymous memory."""
    return is_of_anonymous_folio(m, head)


@outlined
def has_pins(m, pfn):
    """Whether the folio of a frame of anonymous memory has pins: references that are no mappings'."""
    if not in_zone(m.state, pfn):
        return U(m.counts[pfn]) & PAGE_PINNED != U0
    return pin_count(m.ram, struct_page(m, head_in_zone(m, pfn))) != U0


@outlined
def maybe_pinned(m, pfn):
    """folio_maybe_dma_pinned() of the folio of a frame: 1024 references of any kind make a small one look pinned."""
    if not in_zone(m.state, pfn):
        return frame_references(m, pfn) >= GUP_PIN_COUNTING_BIAS
    return maybe_dma_pinned(m.ram, struct_page(m, head_in_zone(m, pfn)))
