"""References, pins and freezes of folios of the HugeTLB zone, as operations: whoever asks is an outsider."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U12, U32
from pgemu_kernels.engine.charge import charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.rows import stop
from pgemu_kernels.folios.counts import (
    GUP_PIN_COUNTING_BIAS,
    folio_test_large,
    freeze,
    put_refs,
    try_grab,
    try_pin,
    unfreeze,
    unpin,
)
from pgemu_kernels.folios.folio import HUGETLB_FREED, PRIVATE, is_huge_page, reference_count, struct_page
from pgemu_kernels.folios.guest_folios import subpool_of
from pgemu_kernels.folios.hstate import in_zone
from pgemu_kernels.folios.huge_pages import give_back_huge
from pgemu_kernels.folios.hugetlb import head_of
from pgemu_kernels.folios.page_allocator import is_block_free
from pgemu_kernels.gmem.references import (
    is_designs,
    last_reference,
    may_put,
    note_transient,
    outsiders_pins,
    outsiders_row,
    transient,
)
from pgemu_kernels.words.enum_words import EVENT_REFERENCE_CHANGED, FLAG_READ, FLAG_WRITE
from pgemu_kernels.words.operations import EINVAL, ENOMEM, ENOSPC
from pgemu_kernels.words.registers import R_FROZEN
from pgemu_kernels.words.rows import (
    FROZEN,
    O_ADDRESS,
    O_DETAIL,
    O_FLAGS,
    O_LENGTH,
    STATE_FROZEN,
    Z_PFN,
    Z_PINS,
    Z_REFERENCES,
    Z_WORDS,
)

U = np.uint64
MOST = U(1 << 20)  # references in one operation: the counts are 32 bits wide


@kernel
def folio_of(m, pfn):
    """First frame of the folio of a frame: a HugeTLB page's head, else the 4K page itself; NONE outside the zone."""
    if not in_zone(m.state, pfn):
        return NONE
    head = head_of(m, pfn)
    return pfn if head == NONE else head


@kernel
def is_free(m, head):
    """Whether a folio is free in its pool or with the page allocator, whatever its count says.

    Struct pages made from the tail page that 7.3 leaves at boot have a count of 1 (boot.fill_boot_tail_page()).
    """
    if is_block_free(m.state, head):
        return True
    return is_huge_page(m, head) and m.ram[struct_page(m, head) + PRIVATE] & HUGETLB_FREED != U0


@kernel
def may_unpin(m, head, page, n):
    """Whether outsiders pinned a folio so often: pins of processes and devices are theirs."""
    pins, pinned = outsiders_pins(m, head, page)
    return pins >= n and transient(m, head) >= pinned and reference_count(m.ram, page) >= pinned


@kernel
def row_of_outsiders(state, head):
    """Row for what outsiders freeze or pin of a folio, one that is free where there is none; NONE when all are used."""
    row = outsiders_row(state, head)
    for i in range(U(FROZEN)):
        free = STATE_FROZEN + i * U(Z_WORDS)
        if row == NONE and (state[free + Z_REFERENCES] | state[free + Z_PINS]) == U0:
            row = free
            state[row + Z_PFN] = head
            state[R_FROZEN] = max(state[R_FROZEN], i + U1)
    return row


@kernel
def drop_last(m, head, page, last):
    """After references went: the last one of a folio outside the page cache frees it."""
    if last:
        if is_huge_page(m, head) and subpool_of(m, page) == U0:
            give_back_huge(m, head)
        else:
            last_reference(m, head, page)


@outlined
def change_references(m, op):
    """FOLIO_REFERENCE: 0 with the refcount afterwards (0: freed).

    get and pin: -ENOMEM where the count is 0 or negative (try_grab_folio()), or the folio is free; -ENOSPC to pin past
    words.FROZEN folios. put and unpin: -EINVAL for references or pins that outsiders did not take (caches, mappings,
    pins of processes and devices hold the others), and for the last one of a 4K piece whose huge page must be merged
    first.
    """
    state = m.state
    ram = m.ram
    head = folio_of(m, state[op + O_ADDRESS] >> U12)
    n = state[op + O_LENGTH]
    if head == NONE or n == U0 or n > MOST:
        return stop(state, op, -EINVAL)
    page = struct_page(m, head)
    pinning = state[op + O_FLAGS] & FLAG_WRITE != U0
    count = n if folio_test_large(ram, page) or not pinning else n * GUP_PIN_COUNTING_BIAS
    ours = is_designs(m, head, page)
    charge_one(m, EVENT_REFERENCE_CHANGED)
    if state[op + O_FLAGS] & FLAG_READ == U0:
        taken = False
        row = row_of_outsiders(state, head) if pinning else U0
        if row == NONE:
            return stop(state, op, -ENOSPC)
        if not is_free(m, head):
            taken = try_pin(ram, page, n) if pinning else try_grab(ram, page, n)
        if taken:
            note_transient(m, head, count)
        if taken and pinning:
            state[row + Z_PINS] += n
        state[op + O_DETAIL] = reference_count(ram, page)
        return stop(state, op, 0 if taken else -ENOMEM)
    there = may_unpin(m, head, page, n) if pinning else may_put(m, head, page, count)
    whole = ours or folio_test_large(ram, page) or reference_count(ram, page) > count
    if is_free(m, head) or not there or not whole:
        return stop(state, op, -EINVAL)
    last = unpin(ram, page, n) if pinning else put_refs(ram, page, n)
    state[op + O_DETAIL] = reference_count(ram, page)
    note_transient(m, head, U0 - count)
    if pinning:
        state[outsiders_row(state, head) + Z_PINS] -= n
    drop_last(m, head, page, last)
    return stop(state, op, 0)


@outlined
def change_frozen(m, op):
    """FOLIO_FREEZE: 1 if the refcount was what was expected (unfreeze: 0) and is 0 (what was asked for) now, else 0.

    An unfreeze gives back fewer references than the freeze took, or more, only by those that outsiders hold.
    Whose references it took is noted, so that Machine.check() can count them: -ENOSPC past words.FROZEN folios.
    """
    state = m.state
    head = folio_of(m, state[op + O_ADDRESS] >> U12)
    if head == NONE or state[op + O_LENGTH] >> U32 != U0 or is_free(m, head):
        return stop(state, op, -EINVAL)
    page = struct_page(m, head)
    thawing = state[op + O_FLAGS] & FLAG_READ != U0
    row = outsiders_row(state, head) if thawing else row_of_outsiders(state, head)
    if row == NONE and not thawing:
        return stop(state, op, -ENOSPC)
    charge_one(m, EVENT_REFERENCE_CHANGED)
    if thawing:
        n = state[op + O_LENGTH]
        frozen = U0 if row == NONE else state[row + Z_REFERENCES]
        _, pinned = outsiders_pins(m, head, page)
        done = frozen != U0 and transient(m, head) + n >= pinned + frozen and unfreeze(m.ram, page, n)
        if done:
            note_transient(m, head, n - frozen)
            state[row + Z_REFERENCES] = U0
    else:
        done = freeze(m.ram, page, state[op + O_LENGTH])
        if done and state[op + O_LENGTH] != U0:
            state[row + Z_REFERENCES] = state[op + O_LENGTH]
    state[op + O_DETAIL] = reference_count(m.ram, page)
    return stop(state, op, 1 if done else 0)
