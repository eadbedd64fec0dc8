"""TLBs in front of tables: a stream of accesses, and the operations that happen between them.

First-level TLBs of data and fetches, then those of the second level; what is in neither is walked and entered in both.
Whenever the machine flushes a VM, everything is forgotten: stage 2 of KVM on x86 is flushed as a whole
(arch/x86/kvm/vmx/vmx.c:vmx_flush_tlb_all(), arch/x86/kvm/svm/svm.c:svm_flush_tlb_asid()).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pgemu_kernels.engine.bits import LOW8, U0, U1, U2, U12
from pgemu_kernels.engine.compile import entry, kernel, outlined
from pgemu_kernels.engine.handle import open_machine
from pgemu_kernels.engine.numba_internals import call_address
from pgemu_kernels.guest.caches import enter_translation, flush_all, look_through, tag_of
from pgemu_kernels.guest.walks import Tables, walk_after_miss
from pgemu_kernels.tables.translate import open_tree
from pgemu_kernels.words.enum_words import EVENT_TLB_FLUSH_VM, FLAG_EXEC, FLAG_WRITE
from pgemu_kernels.words.events import EVENTS, STATS_COUNTERS
from pgemu_kernels.words.guest_words import (
    AREA_LEVEL,
    AREA_PAGE,
    FOUND_FIRST,
    FOUND_NONE,
    FOUND_SECOND,
    KIND_DATA,
    KIND_FETCH,
    LOOK_AT,
    LOOK_DIRECT,
    LOOK_FULL,
    LOOK_GUEST_FORMAT,
    LOOK_PRIVATE_ROOT,
    LOOK_RECORD,
    LOOK_ROOT,
    LOOK_RUN,
    LOOK_STAGE2_FORMAT,
    N_FOUND,
    N_LEVELS,
    N_SUMS,
    ROW_TLBS,
    SUM_GUEST,
    SUM_NESTED,
    SUM_NESTED_HITS,
    SUM_STAGE2,
    SUM_WORDS,
    TAG_SPACE,
    TLB_AREA,
    TLB_AREA_WORDS,
    TLB_LAST,
    TLB_SECOND,
    TLB_SEEN,
    TLB_VCPUS,
)
from pgemu_kernels.words.operations import OPERATIONS
from pgemu_kernels.words.registers import R_FULL
from pgemu_kernels.words.requests import BATCH_MODE

U = np.uint64
_PAGES = U((1 << 45) - 1)  # page numbers of 57 bits of address
_N_FOUND, _N_LEVELS, _SUM_WORDS = U(N_FOUND), U(N_LEVELS), U(SUM_WORDS)
_OPERATIONS, _EVENTS = U(OPERATIONS), U(EVENTS)
_BATCH_MODE = np.int64(BATCH_MODE)


class Accesses(NamedTuple):
    """The accesses of a batch, and what is told of each, where anybody asked."""

    address: np.ndarray[Any, Any]  # uint64[n]
    flags: np.ndarray[Any, Any]  # uint8[n]
    actor: np.ndarray[Any, Any]  # uint16[n]
    space: np.ndarray[Any, Any]  # uint16[n]: indices of roots
    roots: np.ndarray[Any, Any]  # uint64: physical addresses of top tables
    found: np.ndarray[Any, Any]  # uint8[n] or of no elements: FOUND_*
    levels: np.ndarray[Any, Any]  # uint8[n]: of the entry, 0 without a translation
    references: np.ndarray[Any, Any]  # uint8[n]: entries that were read


class Between(NamedTuple):
    """Operations, each before the access that `at` (uint64, not descending) says; the other columns as in Columns."""

    at: np.ndarray[Any, Any]
    header: np.ndarray[Any, Any]
    object: np.ndarray[Any, Any]
    address: np.ndarray[Any, Any]
    offset: np.ndarray[Any, Any]
    length: np.ndarray[Any, Any]
    status: np.ndarray[Any, Any]
    detail: np.ndarray[Any, Any]


# --------------------------------------------------------------------------- one access


@kernel
def count(counts, what, found, level):
    counts[(what * _N_FOUND + found) * _N_LEVELS + level] += U1


@kernel
def add_up(counts, what, walk):
    """Add what a walk read to the sums."""
    first = N_SUMS + what * _SUM_WORDS
    counts[first + SUM_GUEST] += walk.guest
    counts[first + SUM_STAGE2] += walk.stage2
    counts[first + SUM_NESTED] += walk.nested
    counts[first + SUM_NESTED_HITS] += walk.hits


@kernel
def tell_lookup(a, i, found, level, references):
    if U(a.found.size) != U0:
        a.found[i] = np.uint8(found)
        a.levels[i] = np.uint8(level)
        a.references[i] = np.uint8(references)


@outlined
def miss(g, m, t, tlb, counts, a, i, area, kind, what, page, space):
    """An access that no first-level TLB has: the level of the entry that it has now, 0 without a translation."""
    level, leaf = look_through(tlb, tlb[TLB_SECOND], tlb[TLB_LAST], area, kind, page, space)
    if level != U0:
        count(counts, what, FOUND_SECOND, level)
        tell_lookup(a, i, FOUND_SECOND, level, U0)
        return enter_translation(tlb, ROW_TLBS, tlb[TLB_SECOND], area, kind, page, space, leaf)
    walk = walk_after_miss(g, m, t, tlb, area, a.roots[a.space[i]], a.address[i], page, space)
    add_up(counts, what, walk)
    count(counts, what, FOUND_NONE, walk.level)
    tell_lookup(a, i, FOUND_NONE, walk.level, walk.guest + walk.stage2)
    if walk.level == U0:
        return U0
    enter_translation(tlb, tlb[TLB_SECOND], tlb[TLB_LAST], area, kind, page, space, walk.level)
    return enter_translation(tlb, ROW_TLBS, tlb[TLB_SECOND], area, kind, page, space, walk.level)


@kernel
def look_up_access(g, m, t, tlb, counts, a, i):
    """Look one access up."""
    flags = U(a.flags[i])
    what = U2 if flags & FLAG_EXEC != U0 else (U1 if flags & FLAG_WRITE != U0 else U0)
    kind = KIND_FETCH if what == U2 else KIND_DATA
    if (a.address[i] + t.guest.half) >> t.guest.bits != U0:
        # Not canonical: a general protection fault, and no walk.
        count(counts, what, FOUND_NONE, U0)
        tell_lookup(a, i, FOUND_NONE, U0, U0)
        return
    area = tlb[TLB_AREA] + U(a.actor[i]) % tlb[TLB_VCPUS] * tlb[TLB_AREA_WORDS]
    page = a.address[i] >> U12 & _PAGES
    space = U(a.space[i]) << TAG_SPACE
    tag = tag_of(page, space, U1)
    last = area + kind - U1
    if tlb[last + AREA_PAGE] == tag:
        # The same page as the last time: its entry is the most recently used one of its set as it is.
        level = tlb[last + AREA_LEVEL]
        count(counts, what, FOUND_FIRST, level)
        tell_lookup(a, i, FOUND_FIRST, level, U0)
        return
    level, _ = look_through(tlb, ROW_TLBS, tlb[TLB_SECOND], area, kind, page, space)
    if level != U0:
        count(counts, what, FOUND_FIRST, level)
        tell_lookup(a, i, FOUND_FIRST, level, U0)
    else:
        level = miss(g, m, t, tlb, counts, a, i, area, kind, what, page, space)
    tlb[last + AREA_PAGE] = tag if level != U0 else U0
    tlb[last + AREA_LEVEL] = level


# --------------------------------------------------------------------------- operations between accesses


@outlined
def flushes_of(m):
    """How many times VMs of a machine were flushed."""
    total = U0
    for op in range(_OPERATIONS):
        total += U(m.stats[STATS_COUNTERS + op * _EVENTS + EVENT_TLB_FLUSH_VM])
    return total


@outlined
def look_for_flushes(m, tlb):
    """Flush if the machine flushed a VM since the last look."""
    flushes = flushes_of(m)
    if flushes != tlb[TLB_SEEN]:
        tlb[TLB_SEEN] = flushes
        flush_all(tlb)


@outlined
def run_record(m, tlb, b, i, control, descriptor, loops):
    """Run one operation by the entry of the designs' operations: whether it was one for that entry."""
    is_full = m.state[R_FULL] != U0
    run = control[LOOK_FULL] if is_full else control[LOOK_RUN]
    if run == U0:
        return False
    counter = STATS_COUNTERS + (b.header[i] & LOW8) * _EVENTS + EVENT_TLB_FLUSH_VM
    before = m.stats[counter]
    first, last = np.int64(i), np.int64(i + U1)
    one = (
        b.header[first:last], b.object[first:last], b.address[first:last], b.offset[first:last], b.length[first:last],
        b.status[first:last], b.detail[first:last],
    )  # fmt: skip
    if is_full:
        done = call_address(run, (descriptor, *one, U0, U0, _BATCH_MODE))
    else:
        done = call_address(run, (descriptor, loops, *one, U0))
    if m.stats[counter] != before:
        tlb[TLB_SEEN] += U(m.stats[counter] - before)
        flush_all(tlb)
    return done == 1


@entry
def look_up(
    guest_descriptor, descriptor, tlb, control, counts, access_row, stage2_access, roots, addresses, flags, actors,
    spaces, found, levels, references, at, header, object_, address, offset, length, status, detail, loops,
):  # fmt: skip
    """Look up accesses from control[LOOK_AT] on, and run the operations from control[LOOK_RECORD] on between them.

    0 at the end; 1 where the operation at control[LOOK_RECORD] is for another entry: who calls runs it, and goes on.
    guest_descriptor: the memory that the guest's tables lie in (LOOK_DIRECT), or the machine itself.
    """
    g = open_machine(guest_descriptor)
    m = open_machine(descriptor)
    a = Accesses(addresses, flags, actors, spaces, roots, found, levels, references)
    b = Between(at, header, object_, address, offset, length, status, detail)
    guest = open_tree(g, control[LOOK_GUEST_FORMAT], U0)
    stage2 = open_tree(m, control[LOOK_STAGE2_FORMAT], control[LOOK_ROOT])
    private = open_tree(m, control[LOOK_STAGE2_FORMAT], control[LOOK_PRIVATE_ROOT])
    is_nested = control[LOOK_ROOT] != U0
    has_private = control[LOOK_PRIVATE_ROOT] != control[LOOK_ROOT]
    is_direct = control[LOOK_DIRECT] != U0
    t = Tables(guest, stage2, private, access_row, stage2_access, is_nested, has_private, is_direct, control)
    look_for_flushes(m, tlb)
    i = control[LOOK_AT]
    record = control[LOOK_RECORD]
    while True:
        while record < U(b.at.size) and b.at[record] <= i:
            if not run_record(m, tlb, b, record, control, descriptor, loops):
                control[LOOK_AT] = i
                control[LOOK_RECORD] = record
                return np.int64(1)
            record += U1
        last = min(b.at[record], U(addresses.size)) if record < U(b.at.size) else U(addresses.size)
        if i >= last and record >= U(b.at.size):
            break
        if i >= U(addresses.size):
            # Operations behind the last access.
            i = b.at[record]
            continue
        while i < last:
            look_up_access(g, m, t, tlb, counts, a, i)
            i += U1
    control[LOOK_AT] = i
    control[LOOK_RECORD] = record
    return np.int64(0)
