"""Set-associative caches with the least recently used entry as the next to go, all in one array of words.

A word for each entry is its tag, 0 for none; behind all tags of a cache is a stamp for each: the clock of its last use,
and in the two low bits the level of the leaf that it was made from.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U2, U3, U9
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.words.guest_words import (
    CACHE_BEGIN,
    CACHE_ENTRIES,
    CACHE_HELD,
    CACHE_KINDS,
    CACHE_SETS,
    CACHE_SIZES,
    CACHE_WAYS,
    CACHE_WORDS,
    TAG_LEVEL,
    TLB_AREA,
    TLB_AREA_WORDS,
    TLB_CLOCK,
    TLB_FLUSHES,
    TLB_LAST,
    TLB_ROWS,
    TLB_VCPUS,
)

U = np.uint64
_CACHE_WORDS = U(CACHE_WORDS)


@kernel
def cache_row(number):
    """Where a cache's row begins."""
    return TLB_ROWS + number * _CACHE_WORDS


@kernel
def tag_of(page, space, level):
    """Tag of the entry of a level that covers a 4K page; `space` stands where it has its place in a tag."""
    return page >> (U9 * (level - U1)) | space | level << TAG_LEVEL


@kernel
def first_way(tlb, row, area, page, level):
    """Where the set begins that an entry of a level over a page belongs to. The index is the low bits of its number."""
    number = page >> (U9 * (level - U1)) & tlb[row + CACHE_SETS]
    return area + tlb[row + CACHE_BEGIN] + number * tlb[row + CACHE_WAYS]


@kernel
def use(tlb, row, at, level):
    """Make an entry the most recently used one."""
    clock = tlb[TLB_CLOCK] + U1
    tlb[TLB_CLOCK] = clock
    tlb[at + tlb[row + CACHE_ENTRIES]] = clock << U2 | level


@kernel
def find_tag(tlb, row, area, page, level, tag):
    """Where an entry is, NONE: nowhere."""
    first = first_way(tlb, row, area, page, level)
    # A tag is in one place at most. A loop that does not end early is one of vectors.
    found = U0
    for at in range(first, first + tlb[row + CACHE_WAYS]):
        found |= at if tlb[at] == tag else U0
    return found if found != U0 else NONE


@kernel
def put_entry(tlb, row, area, page, level, tag, leaf):
    """Enter what is not there in place of the least recently used entry: where; NONE where there is no cache."""
    ways = tlb[row + CACHE_WAYS]
    if ways == U0:
        return NONE
    first = first_way(tlb, row, area, page, level)
    stamps = tlb[row + CACHE_ENTRIES]
    least = NONE
    for at in range(first + stamps, first + stamps + ways):
        least = min(least, tlb[at])
    oldest = first
    while tlb[oldest + stamps] != least:
        oldest += U1
    tlb[oldest] = tag
    tlb[row + CACHE_HELD] |= U1 << level
    use(tlb, row, oldest, leaf)
    return oldest


@kernel
def put_table(tlb, row, area, page, level, tag, table):
    """Enter an entry of a level that leads to a table, whose address stands behind the stamps."""
    at = put_entry(tlb, row, area, page, level, tag, level & U3)
    if at != NONE:
        tlb[at + tlb[row + CACHE_ENTRIES] * U2] = table


@outlined
def look_through(tlb, first, last, area, kind, page, space):
    """An entry for a page in the caches of rows first to last - 1: (its level, the level of its leaf), or zeroes."""
    for number in range(first, last):
        row = cache_row(number)
        if tlb[row + CACHE_KINDS] & kind == U0:
            continue
        sizes = tlb[row + CACHE_HELD]
        level = U1
        while level <= U3:
            if sizes >> level & U1 != U0:
                at = find_tag(tlb, row, area, page, level, tag_of(page, space, level))
                if at != NONE:
                    leaf = tlb[at + tlb[row + CACHE_ENTRIES]] & U3
                    use(tlb, row, at, leaf)
                    return level, leaf
            level += U1
    return U0, U0


@outlined
def enter_translation(tlb, first, last, area, kind, page, space, leaf):
    """Enter a translation with a leaf of a level in the cache that holds the largest part of it: the entry's level.

    What no cache holds whole is entered in the largest pieces that one does; 0: none does.
    """
    best = row = U0
    for number in range(first, last):
        at = cache_row(number)
        if tlb[at + CACHE_KINDS] & kind != U0 and tlb[at + CACHE_WAYS] != U0:
            level = leaf
            while level > best:
                if tlb[at + CACHE_SIZES] >> level & U1 != U0:
                    best = level
                    row = at
                level -= U1
    if best != U0:
        put_entry(tlb, row, area, page, best, tag_of(page, space, best), leaf)
    return best


@outlined
def flush_all(tlb):
    """Forget everything, on every vCPU: global INVEPT, or an ASID flush, after which all its entries are strange."""
    for i in range(tlb[TLB_AREA], tlb[TLB_AREA] + tlb[TLB_VCPUS] * tlb[TLB_AREA_WORDS]):
        tlb[i] = U0
    for number in range(tlb[TLB_LAST]):
        tlb[cache_row(number) + CACHE_HELD] = U0
    tlb[TLB_FLUSHES] += U1
