"""Walks after a miss in the TLBs, and which entries they read past the paging-structure caches.

An entry of the guest's tables that is cached has the host's address of the table it leads to: the first entry below it
needs no walk of stage 2 (Intel SDM volume 3, "Information That May Be Cached": combined paging-structure-cache
entries). Guest physical addresses, of tables and of the data, are looked up in a cache of their own, then in those of
stage 2's tables (guest-physical mappings). Of several cached entries the one nearest to the leaf is used, and only it
counts as used.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U2, U3, U4, U12, U511
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.geometry import shift_of, size_of
from pgemu_kernels.guest.caches import cache_row, find_tag, put_entry, put_table, tag_of, use
from pgemu_kernels.tables.exact_walk import slot_of, walk
from pgemu_kernels.tables.nested import host_of
from pgemu_kernels.tables.translate import (
    LARGE_LEAF,
    directory,
    find_below,
    leaf_level,
    load_masks,
    passes_leaf,
    passes_table,
)
from pgemu_kernels.words.enum_words import WALK_OK
from pgemu_kernels.words.guest_words import (
    CACHE_ENTRIES,
    CACHE_HELD,
    CACHE_WAYS,
    LOOK_WORDS,
    ROW_GUEST,
    ROW_NESTED,
    ROW_STAGE2,
)
from pgemu_kernels.words.table_words import W_LEVEL, W_PHYSICAL

U = np.uint64


class Tables(NamedTuple):
    """What the walks of a batch go through."""

    guest: Any  # Tree, of which the root is another one for each space
    stage2: Any  # Tree
    private: Any  # Tree of private memory
    access: Any  # uint64: the access row of the guest's format, which asks for nothing
    stage2_access: Any
    is_nested: Any  # bool
    has_private: Any  # bool: private memory has another root
    is_direct: Any  # bool: the guest's tables lie at their guest physical addresses of the guest's memory
    scratch: Any  # uint64: from LOOK_WORDS on the record of a walk


class Found(NamedTuple):
    """What a walk found and read."""

    level: Any  # of the leaf, the smaller one of both stages; 0: none
    guest: Any  # entries of the guest's tables read
    stage2: Any  # ... of stage 2
    nested: Any  # guest physical addresses looked up
    hits: Any  # ... and found in their cache


@kernel
def leaf_in(m, access, tree, gpa, w):
    """A guest physical address in a tree of stage 2: (level of its leaf, host physical address), or (0, NONE)."""
    table = directory(m.ram, access, U0, tree, gpa)
    found = find_below(m.ram, access, U0, load_masks(access, U0), tree.address_bits, table, gpa)
    host = host_of(m, access, U0, tree, found, gpa)
    if host != NONE:
        return (U1 if found & LARGE_LEAF == U0 else leaf_level(found)), host
    return look_closer(m, access, tree, gpa, w)


@outlined
def look_closer(m, access, tree, gpa, w):
    """The same of what does not pass at one look: it is not there, or its tables lie far up in memory."""
    if walk(m, tree.f, access, U0, tree.root, gpa, w, LOOK_WORDS) != WALK_OK:
        return U0, NONE
    return w[LOOK_WORDS + W_LEVEL], w[LOOK_WORDS + W_PHYSICAL]


@outlined
def leaf_of_gpa(m, t, gpa):
    """The same in the VM's tables: those of private memory first, for where a page is mapped there it is private."""
    if t.has_private:
        level, host = leaf_in(m, t.stage2_access, t.private, gpa, t.scratch)
        if level != U0:
            return level, host
    return leaf_in(m, t.stage2_access, t.stage2, gpa, t.scratch)


@outlined
def read_stage2(tlb, area, levels, leaf, gpa):
    """How many entries of stage 2 a walk to a leaf reads; those that lead to tables are cached."""
    page = gpa >> U12
    top = levels
    level = leaf + U1
    while level <= U4:
        row = cache_row(ROW_STAGE2 + level - U2)
        at = find_tag(tlb, row, area, page, level, tag_of(page, U0, level))
        if at != NONE:
            use(tlb, row, at, level & U3)
            top = level - U1
            break
        level += U1
    for level in range(leaf + U1, min(top, U4) + U1):
        put_entry(tlb, cache_row(ROW_STAGE2 + level - U2), area, page, level, tag_of(page, U0, level), level & U3)
    return top - leaf + U1


@outlined
def translate_gpa(m, t, tlb, area, gpa):
    """Translate a guest physical address: (level of its leaf, 0: none; entries read; whether it was cached)."""
    row = cache_row(ROW_NESTED)
    page = gpa >> U12
    if tlb[row + CACHE_WAYS] != U0:
        held = tlb[row + CACHE_HELD]
        leaf = U1
        while leaf <= U3:
            if held >> leaf & U1 != U0:
                at = find_tag(tlb, row, area, page, leaf, tag_of(page, U0, leaf))
                if at != NONE:
                    use(tlb, row, at, leaf)
                    return leaf, U0, U1
            leaf += U1
    leaf, _ = leaf_of_gpa(m, t, gpa)
    if leaf == U0:
        return U0, U0, U0
    read = read_stage2(tlb, area, t.stage2.levels, leaf, gpa)
    put_entry(tlb, row, area, page, leaf, tag_of(page, U0, leaf), leaf)
    return leaf, read, U0


@kernel
def guest_entry(g, m, t, gpa):
    """An entry of the guest's tables; 0 where there is no memory."""
    if t.is_direct:
        slot = slot_of(g, gpa)
        return U0 if slot == NONE else g.ram[slot]
    _, host = leaf_of_gpa(m, t, gpa)
    slot = NONE if host == NONE else slot_of(m, host)
    return U0 if slot == NONE else m.ram[slot]


@outlined
def lowest_cached(tlb, area, page, space):
    """The lowest cached entry of the guest's tables over a page: (its level, the table it leads to), or zeroes."""
    level = U2
    while level <= U4:
        row = cache_row(ROW_GUEST + level - U2)
        if tlb[row + CACHE_WAYS] != U0:
            at = find_tag(tlb, row, area, page, level, tag_of(page, space, level))
            if at != NONE:
                use(tlb, row, at, level & U3)
                return level, tlb[at + tlb[row + CACHE_ENTRIES] * U2]
        level += U1
    return U0, U0


@outlined
def walk_after_miss(g, m, t, tlb, area, root, address, page, space):
    """Walk one address: Found."""
    cached, table = lowest_cached(tlb, area, page, space)
    level = cached - U1
    if cached == U0:
        level = t.guest.levels
        table = root
    # The table's address as the host has it comes with a cached entry; else it is the first to be translated.
    is_known = cached != U0 or not t.is_nested
    guest = stage2 = nested = hits = U0
    while True:
        gpa = table + ((address >> shift_of(level) & U511) << U3)
        if not is_known:
            leaf, read, hit = translate_gpa(m, t, tlb, area, gpa)
            stage2 += read
            nested += U1
            hits += hit
            if leaf == U0:
                return Found(U0, guest, stage2, nested, hits)
        is_known = not t.is_nested
        guest += U1
        value = guest_entry(g, m, t, gpa)
        if level == U1 or not passes_table(t.access, U0, level, value):
            break
        table = value & t.guest.address_bits
        if level <= U4:
            put_table(tlb, cache_row(ROW_GUEST + level - U2), area, page, level, tag_of(page, space, level), table)
        level -= U1
    if level > U3 or not passes_leaf(t.access, U0, level, value):
        return Found(U0, guest, stage2, nested, hits)
    if t.is_nested:
        inside = size_of(level) - U1
        gpa = value & t.guest.address_bits & ~inside | address & inside
        leaf, read, hit = translate_gpa(m, t, tlb, area, gpa)
        return Found(min(level, leaf), guest, stage2 + read, nested + U1, hits + hit)
    return Found(level, guest, stage2, nested, hits)
