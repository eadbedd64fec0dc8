"""Conversions that posted code would still be at: a freeze meets a reference that somebody holds, and spins.

hugetlb_restructuring_freeze_folio() of the branch of December 2025 loops with cond_resched() and the invalidate_lock
held, RFC v2 likewise, however long the reference stays. Step by step the conversion is blocked until it is gone. In a
batch nobody else would ever run: the operation ends with -WOULD_SPIN, detail is the page of the folio, and what is left
of it is noted here and done as soon as the reference is gone; EVENT_SPIN_ENDED counts that.

In between things stand as the posted order has them there, as far as one can go on: units before are converted; of this
one is zapped, unmapped and merged what the order does before the freeze; its pages are stored as converted if the order
stores them before it merges, else they are as before, also where RFC v2 stores before it splits, for no fault could see
that. The lock is released, which posted code does not do: operations that it would keep waiting go on, but a conversion
of the same huge pages, which waits behind.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U2, U12, U512
from pgemu_kernels.engine.charge import change, charge_one, result
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.handle import full_only
from pgemu_kernels.folios.folio import reference_count, struct_page
from pgemu_kernels.gmem import pieces
from pgemu_kernels.words.enum_words import EVENT_SPIN_DROPPED, GAUGE_SPINNING
from pgemu_kernels.words.events import STATS_GAUGES
from pgemu_kernels.words.operations import BLOCKED, WOULD_SPIN
from pgemu_kernels.words.registers import R_FULL, R_ORDER, R_RESUMING, R_SPINS
from pgemu_kernels.words.rows import (
    B_PFN,
    B_STATE,
    BLOCK_PARTLY,
    BLOCK_SPLIT,
    O_ACTIVE,
    O_DETAIL,
    O_INODE,
    O_RANGE_END,
    O_STATUS,
    O_TO_PRIVATE,
    O_VM,
    Q_END,
    Q_INDEX,
    Q_INODE,
    Q_LIVE,
    Q_PFN,
    Q_REFERENCES,
    Q_START,
    Q_TO_PRIVATE,
    Q_VM,
    Q_WORDS,
    SPINS,
    STATE_SPINS,
)

U = np.uint64


@kernel
def spin_row(i):
    return STATE_SPINS + i * U(Q_WORDS)


@kernel
def is_spinning(m):
    """Whether anything is noted."""
    return m.stats[STATS_GAUGES + GAUGE_SPINNING * U2] != 0


@kernel
def any_piece(m, block, i):
    """Pages of the folio that holds page `i` of a split block."""
    return U1


@kernel
def piece_or_page(m, block, i):
    whole = m.state[block + B_STATE] == BLOCK_PARTLY and pieces.is_piece_split(m, block, i) == U0
    return U512 if whole else U1


folio_pages = full_only(piece_or_page, any_piece)


@outlined
def held_folio(m, block, start):
    """(first frame of the first folio from page `start` of a block on that has a foreign reference, how many references
    it may have)."""
    head = m.state[block + B_PFN]
    pages = U1 << m.state[R_ORDER]
    kind = m.state[block + B_STATE]
    if kind == BLOCK_SPLIT or kind == BLOCK_PARTLY:
        i = start
        while i < pages:
            own = folio_pages(m, block, i)
            if reference_count(m.ram, struct_page(m, head + i)) != own:
                return head + i, own
            i += own
    return head, pages


@kernel
def is_stepped(state, op):
    """Whether a record's operation is done step by step."""
    return state[op + O_ACTIVE] != U0


@outlined
def blocked(m, op, block, start):
    """Step by step: the freeze of a folio of a block, from page `start` of the inode on, is tried again at the next
    step."""
    inside = (U1 << m.state[R_ORDER]) - U1
    pfn, _own = held_folio(m, block, start & inside)
    m.state[op + O_DETAIL] = ((start & ~inside) + pfn - m.state[block + B_PFN]) << U12
    result(m.state, op, np.int64(-WOULD_SPIN))
    return BLOCKED


@kernel
def freeze_succeeded(m, op):
    """Step by step: what was blocked goes on."""
    if m.state[op + O_STATUS] != U0:
        m.state[op + O_DETAIL] = U0
        result(m.state, op, np.int64(0))


went_on = full_only(freeze_succeeded, None)  # the fast loops go no steps


# --------------------------------------------------------------------------- noting what is left


@outlined
def forget_ended(state):
    """Rows of conversions that have ended make room; the others stay in their order."""
    kept = U0
    for i in range(state[R_SPINS]):
        if state[spin_row(i) + Q_LIVE] != U0:
            for word in range(Q_WORDS):
                state[spin_row(kept) + U(word)] = state[spin_row(i) + U(word)]
            kept += U1
    state[R_SPINS] = kept


@outlined
def note_spin(m, op, start, pfn, references, index):
    """Note that a conversion, or one that is tried again, has pages [start, its end) left to do: its status.

    SPINS at a time, a limit of this model: of one more nothing more is done, and EVENT_SPIN_DROPPED counts it.
    """
    state = m.state
    state[op + O_DETAIL] = index << U12
    i = state[R_RESUMING] - U1
    if state[R_RESUMING] == U0:
        if state[R_SPINS] >= U(SPINS):
            forget_ended(state)
        i = state[R_SPINS]
        if i >= U(SPINS):
            charge_one(m, EVENT_SPIN_DROPPED)
            return np.int64(-WOULD_SPIN)
        state[R_SPINS] = i + U1
        state[R_FULL] = U1  # the fast loops do not look after it
        change(m.stats, GAUGE_SPINNING, 1)
    row = spin_row(i)
    state[row + Q_LIVE] = U1
    state[row + Q_INODE] = state[op + O_INODE]
    state[row + Q_START] = start
    state[row + Q_END] = state[op + O_RANGE_END]
    state[row + Q_TO_PRIVATE] = state[op + O_TO_PRIVATE]
    state[row + Q_VM] = state[op + O_VM]
    state[row + Q_PFN] = pfn
    state[row + Q_REFERENCES] = references
    state[row + Q_INDEX] = index
    return np.int64(-WOULD_SPIN)


@outlined
def note_block(m, op, start, block, index):
    """note_spin() of a conversion that cannot freeze a folio of a block, from page `index` of the inode on."""
    inside = (U1 << m.state[R_ORDER]) - U1
    pfn, references = held_folio(m, block, index & inside)
    return note_spin(m, op, start, pfn, references, (index & ~inside) + pfn - m.state[block + B_PFN])


@kernel
def meets(state, row, inode, start, end):
    """Whether a noted conversion has some of the huge pages that pages [start, end) of an inode lie in."""
    order = state[R_ORDER]
    ours = state[row + Q_LIVE] != U0 and state[row + Q_INODE] == inode
    return (
        ours
        and start >> order <= state[row + Q_END] - U1 >> order
        and state[row + Q_START] >> order <= end - U1 >> order
    )


@outlined
def row_before(state, inode, start, end, last):
    """The first of the noted conversions below number `last` that has some of these huge pages, or NONE."""
    for i in range(last):
        if meets(state, spin_row(i), inode, start, end):
            return spin_row(i)
    return NONE


@outlined
def waits_behind(m, op, inode, start, end):
    """Whether a conversion waits for one that spins: then it is noted behind that, and has its result."""
    state = m.state
    row = row_before(state, inode, start, end, state[R_SPINS])
    if state[R_RESUMING] != U0 or row == NONE:
        return False
    if is_stepped(state, op):
        state[op + O_DETAIL] = state[row + Q_INDEX] << U12
        result(state, op, np.int64(-WOULD_SPIN))
        return True
    state[op + O_INODE] = inode
    state[op + O_RANGE_END] = end
    index = state[row + Q_INDEX]
    status = note_spin(m, op, start, state[row + Q_PFN], state[row + Q_REFERENCES], index)
    result(state, op, status)
    return True


@outlined
def forget_spins(m, inode):
    """An inode goes, and with it what is left to be converted."""
    for i in range(m.state[R_SPINS]):
        row = spin_row(i)
        if m.state[row + Q_LIVE] != U0 and m.state[row + Q_INODE] == inode:
            m.state[row + Q_LIVE] = U0
            change(m.stats, GAUGE_SPINNING, -1)
