"""Poison of HugeTLB folios: which pages it was found on. mm/hugetlb.c, mm/memory-failure.c"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import U0, U1, U8, U16
from pgemu_kernels.engine.compile import outlined
from pgemu_kernels.folios.folio import (
    FLAGS,
    HWPOISON,
    HWPOISON_6_12,
    struct_page,
)
from pgemu_kernels.words.operations import EBUSY, ENOMEM, EOPNOTSUPP
from pgemu_kernels.words.registers import R_FOLIO_6_12, R_HWPOISON, R_POISONED
from pgemu_kernels.words.rows import (
    POISONED,
    POISONED_ADDRESS,
    STATE_POISONED,
)

U = np.uint64


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
    row = U0
    while row < state[R_POISONED] and state[STATE_POISONED + row] != U0:
        row += U1
    if row == U(POISONED):
        return np.int64(-ENOMEM)
    state[R_POISONED] = max(state[R_POISONED], row + U1)
    state[STATE_POISONED + row] = pfn
    page = struct_page(m, head)
    m.ram[page + FLAGS] |= state[R_HWPOISON]
    word = U8 + (HWPOISON_6_12 if state[R_FOLIO_6_12] != U0 else HWPOISON)
    m.ram[page + word] = U(POISONED_ADDRESS) + row * U16
    return np.int64(0)


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
