"""Per-CPU batches of folios on their way to an LRU list: mm/swap.c:folio_add_lru(), lru_add_drain_all().

A batch holds a reference on each of its folios until it is full or drained. Where the machine has the batches
(R_LRU_CACHE), a folio of order 0 that joins the page cache goes through one: so mainline's guest_memfd, which puts its
folios on the unevictable list, and the pieces of a split in form rfc2 before guest_memfd was taken off the LRU.
What a batch holds counts like any other reference: it makes a conversion to private fail and a merge wait.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import U0, U1
from pgemu_kernels.engine.charge import change, charge, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.rows import stop
from pgemu_kernels.folios.folio import add_references, struct_page
from pgemu_kernels.gmem.references import drop
from pgemu_kernels.words.enum_words import EVENT_LRU_CACHE_ADDED, EVENT_LRU_CACHE_DRAINED, GAUGE_PAGES_LRU_CACHED
from pgemu_kernels.words.registers import R_LRU_CACHE, R_LRU_CPUS
from pgemu_kernels.words.rows import LRU_BATCH, LRU_WORDS, O_DETAIL, STATE_LRU

U = np.uint64
_WORDS = U(LRU_WORDS)


@kernel
def batch_row(cpu):
    """Where a CPU's batch begins in `state`: how many folios, then their frames."""
    return STATE_LRU + cpu * _WORDS


@outlined
def release_batch(m, row):
    """mm/swap.c:folio_batch_move_lru(): the folios join their list, the batch's references go. How many (int64)."""
    state = m.state
    count = state[row]
    state[row] = U0
    for at in range(row + U1, row + U1 + count):
        pfn = state[at]
        state[at] = U0
        change(m.stats, GAUGE_PAGES_LRU_CACHED, -1)
        drop(m, pfn, U1)
    return np.int64(count)


@outlined
def lru_add(m, pfn, cpu):
    """A folio of order 0 joined the page cache: into the batch of `cpu` (modulo the CPUs), which takes a reference.

    The 31st folio fills the batch: all 31 are released at once. Nothing on a machine without the batches.
    """
    state = m.state
    if state[R_LRU_CACHE] == U0:
        return
    row = batch_row(cpu % state[R_LRU_CPUS])
    add_references(m.ram, struct_page(m, pfn), U1)
    state[row] += U1
    state[row + state[row]] = pfn
    change(m.stats, GAUGE_PAGES_LRU_CACHED, 1)
    charge_one(m, EVENT_LRU_CACHE_ADDED)
    if state[row] == LRU_BATCH:
        release_batch(m, row)


@outlined
def lru_add_pieces(m, head, pages, cpu):
    """lru_add() of `pages` folios from `head` on, ascending: the pieces of a split, when all are in the page cache.

    Inference: a split that fails halfway leaves none of its pieces in a batch; in Linux those would keep the merge
    back spinning.
    """
    if m.state[R_LRU_CACHE] != U0:
        for pfn in range(head, head + pages):
            lru_add(m, pfn, cpu)


@outlined
def lru_drain_all(m):
    """mm/swap.c:lru_add_drain_all(): release the batches of all CPUs, ascending. How many folios (int64)."""
    drained = np.int64(0)
    for cpu in range(m.state[R_LRU_CPUS]):
        drained += release_batch(m, batch_row(cpu))
    charge(m, EVENT_LRU_CACHE_DRAINED, drained)
    return drained


@kernel
def operate_drain(m, op):
    """LRU_DRAIN: 0 with the folios drained."""
    m.state[op + O_DETAIL] = U(lru_drain_all(m))
    return stop(m.state, op, 0)
