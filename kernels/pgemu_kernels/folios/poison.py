"""Poison of HugeTLB folios: which pages it was found on. mm/hugetlb.c, mm/memory-failure.c"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import U0, U1, U8, U16, U511
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.frames import put_frame
from pgemu_kernels.folios.folio import (
    FLAGS,
    HWPOISON,
    HWPOISON_6_12,
    is_huge_page,
    order_of,
    struct_page,
)
from pgemu_kernels.words.operations import EBUSY, ENOMEM, EOPNOTSUPP
from pgemu_kernels.words.registers import (
    R_EXTRA_REFERENCES,
    R_FOLIO_6_12,
    R_FULL,
    R_HWPOISON,
    R_POISONED,
    R_POISONED_FRAMES,
    R_POISONED_PAGES,
    R_POOL_BASE,
    R_TRANSIENT,
)
from pgemu_kernels.words.rows import (
    MF_SIGNAL,
    MF_SIGNAL_WORDS,
    MF_SIGNALS,
    PAGE_POISONED,
    POISONED,
    POISONED_ADDRESS,
    SIGNALS,
    STATE_FAILURE,
    STATE_POISONED,
)

U = np.uint64
_HELD = U(1 << 31)  # in a frame's transient references: memory failure has one


# --------------------------------------------------------------------------- pages


@kernel
def is_folio_poisoned(m, head):
    """folio_test_hwpoison() of the folio with this first frame, or PageHWPoison() of a page."""
    return m.ram[struct_page(m, head) + FLAGS] & m.state[R_HWPOISON] != U0


@kernel
def count_poisoned(state, n):
    """num_poisoned_pages changes by `n` (uint64). Faults look for poison from now on, which the fast loops do not."""
    state[R_POISONED_PAGES] += n
    state[R_FULL] = U1


@kernel
def free_unless_poisoned(m, frame, word):
    """The last reference of a page of ordinary memory is gone, but for memory failure's, if that has one: then the page
    stays out. `word`: its counts.
    """
    if word & PAGE_POISONED != U0:
        m.counts[frame] = np.uint32(PAGE_POISONED)
        m.state[R_POISONED_FRAMES] += U1
    else:
        put_frame(m, frame)


@kernel
def is_held_by_failure(m, pfn):
    """Whether memory failure keeps a reference of the designs' folio with this first frame."""
    return U(m.counts[m.state[R_TRANSIENT] + pfn - m.state[R_POOL_BASE]]) & _HELD != U0


@kernel
def hold_by_failure(m, pfn, holds):
    """Note that it does (1, uint64) or does not any more (0)."""
    at = m.state[R_TRANSIENT] + pfn - m.state[R_POOL_BASE]
    m.counts[at] = np.uint32(U(m.counts[at]) & ~_HELD | (_HELD if holds != U0 else U0))
    m.state[R_EXTRA_REFERENCES] += U1 if holds != U0 else ~U0


@kernel
def note_signal(state, space, address, code, shift):
    """kill_proc(), force_sig_mceerr(): a process gets SIGBUS of a page of 2^shift bytes."""
    i = state[STATE_FAILURE + MF_SIGNALS]
    state[STATE_FAILURE + MF_SIGNALS] = i + U1
    if i < U(SIGNALS):
        row = STATE_FAILURE + MF_SIGNAL + i * U(MF_SIGNAL_WORDS)
        state[row] = space
        state[row + U1] = address
        state[row + U(2)] = U(code) | shift << U8


# --------------------------------------------------------------------------- folios of HugeTLB


@kernel
def _note(m, head, row):
    """A folio is poisoned, and names the row of a page that is."""
    page = struct_page(m, head)
    m.ram[page + FLAGS] |= m.state[R_HWPOISON]
    word = U8 + (HWPOISON_6_12 if m.state[R_FOLIO_6_12] != U0 else HWPOISON)
    m.ram[page + word] = U(POISONED_ADDRESS) + row * U16


@kernel
def _new_row(state):
    """A row for one more poisoned page, or POISONED."""
    row = U0
    while row < state[R_POISONED] and state[STATE_POISONED + row] != U0:
        row += U1
    if row != U(POISONED):
        state[R_POISONED] = max(state[R_POISONED], row + U1)
    return row


@outlined
def collect_poison(m, head, pages):
    """The 4K folios from `head` on are about to be one: those that are poisoned are noted, and lose their flag.

    How many there was no room to note is returned (a limit of this model): they keep it, and see forget_unnoted().
    """
    state = m.state
    lost = U0
    if state[R_POISONED_PAGES] == U0:
        return lost
    for pfn in range(head, head + pages):
        if is_folio_poisoned(m, pfn):
            row = _new_row(state)
            if row != U(POISONED):
                state[STATE_POISONED + row] = pfn
                m.ram[struct_page(m, pfn) + FLAGS] &= ~state[R_HWPOISON]
            else:
                lost += U1
    return lost


@outlined
def forget_unnoted(m, head, lost):
    """A merge is done of 4K folios of which `lost` are poisoned and not noted: they are no poisoned pages any more."""
    if lost != U0:
        m.state[R_POISONED_PAGES] -= lost
        m.ram[struct_page(m, head) + FLAGS] &= ~m.state[R_HWPOISON]


@kernel
def _is_noted(state, head, pages):
    """Whether a page of frames [head, head + pages) is noted to be poisoned."""
    for row in range(state[R_POISONED]):
        pfn = state[STATE_POISONED + row]
        if pfn != U0 and pfn - head < pages:
            return True
    return False


@kernel
def _huge_page_of(m, head, pfn):
    """The huge page with a frame, of what was one huge page from `head` on: that, or a 2M piece; else the frame."""
    if is_huge_page(m, head) and pfn - head < U1 << order_of(m, head):
        return head
    piece = pfn & ~U511
    return piece if piece - head <= pfn - head and is_huge_page(m, piece) else pfn


@outlined
def settle_poison(m, head, pages, rewritten):
    """The poison noted of frames [head, head + pages), which a split or a merge has `rewritten`, or left as it was: of
    a huge page it is that page's, of 4K folios each one's own.
    """
    state = m.state
    if state[R_POISONED_PAGES] == U0 or not _is_noted(state, head, pages):
        return
    frame = head
    while rewritten and frame - head < pages:  # a split page by page hands the huge page's flag to every piece
        m.ram[struct_page(m, frame) + FLAGS] &= ~state[R_HWPOISON]
        frame += U1 << order_of(m, frame)
    for row in range(state[R_POISONED]):
        pfn = state[STATE_POISONED + row]
        if pfn == U0 or pfn - head >= pages:
            continue
        folio = _huge_page_of(m, head, pfn)
        if is_huge_page(m, folio):
            _note(m, folio, row)
        else:
            m.ram[struct_page(m, pfn) + FLAGS] |= state[R_HWPOISON]
            state[STATE_POISONED + row] = U0


@outlined
def poison(m, head, pfn):
    """folio_set_hugetlb_hwpoison(): the folio is poisoned, the base page noted: 0, -EBUSY if it was, -ENOMEM.

    -EOPNOTSUPP without CONFIG_MEMORY_FAILURE.
    """
    state = m.state
    if state[R_HWPOISON] == U0:
        return np.int64(-EOPNOTSUPP)
    for i in range(state[R_POISONED]):
        if state[STATE_POISONED + i] == pfn:
            return np.int64(-EBUSY)
    row = _new_row(state)
    if row == U(POISONED):
        return np.int64(-ENOMEM)
    state[STATE_POISONED + row] = pfn
    _note(m, head, row)
    count_poisoned(state, U1)
    return np.int64(0)


@outlined
def forget_poison(m, head, pages):
    """folio_free_raw_hwp() and folio_clear_hwpoison(): the folio is poisoned no more, its pages' notes are freed."""
    state = m.state
    page = struct_page(m, head)
    m.ram[page + FLAGS] &= ~state[R_HWPOISON]
    m.ram[page + U8 + (HWPOISON_6_12 if state[R_FOLIO_6_12] != U0 else HWPOISON)] = U0
    for row in range(state[R_POISONED]):
        pfn = state[STATE_POISONED + row]
        if pfn != U0 and pfn - head < pages:
            state[STATE_POISONED + row] = U0
            count_poisoned(state, ~U0)


@outlined
def move_poison(m, head, order):
    """folio_clear_hugetlb_hwpoison(): the poison moves to the base pages noted, and the notes are freed.

    Inference: the page allocator keeps the 2M blocks of poisoned pages out, in place of the 4K pages alone.
    """
    state = m.state
    page = struct_page(m, head)
    m.ram[page + FLAGS] &= ~state[R_HWPOISON]
    m.ram[page + U8 + (HWPOISON_6_12 if state[R_FOLIO_6_12] != U0 else HWPOISON)] = U0
    for i in range(state[R_POISONED]):
        pfn = state[STATE_POISONED + i]
        if pfn - head < U1 << order:
            m.ram[struct_page(m, pfn) + FLAGS] |= state[R_HWPOISON]
            state[STATE_POISONED + i] = U0
