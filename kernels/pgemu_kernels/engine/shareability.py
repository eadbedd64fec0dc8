"""Which pages of an inode are shared: a bit per page, with counts per 2M and 1G."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import ALL, U0, U1, U2, U6, U9, U18, U63, U64, U511, U512, population
from pgemu_kernels.engine.compile import kernel
from pgemu_kernels.words.registers import (
    R_ORDER,
)
from pgemu_kernels.words.rows import (
    I_PMD,
    I_PUD,
    I_WORD,
)

U = np.uint64


@kernel
def is_shared(m, node, index):
    """1 if a page of the inode is shared, 0 if private."""
    return m.state[m.state[node + I_WORD] + (index >> U6)] >> (index & U63) & U1


@kernel
def shared_in_2m(m, node, index):
    return U(m.counts[m.state[node + I_PMD] + (index >> U9)])


@kernel
def shared_in_1g(m, node, index):
    return U(m.counts[m.state[node + I_PUD] + (index >> U18)])


@kernel
def shared_in_block(m, node, index):
    """Shared pages in the huge page that holds `index`, or 1 if a 4K page is shared."""
    if m.state[R_ORDER] == U9:
        return shared_in_2m(m, node, index)
    if m.state[R_ORDER] == U0:
        return is_shared(m, node, index)
    return shared_in_1g(m, node, index)


@kernel
def is_uniform(m, node, index, level):
    """Whether all pages of the aligned block of `level` around `index` have the same shareability."""
    if level == U1:
        return True
    if level == U2:
        shared = shared_in_2m(m, node, index)
        return shared == U0 or shared == U512
    shared = shared_in_1g(m, node, index)
    return shared == U0 or shared == U(1 << 18)


@kernel
def bits_between(first, last):
    """A word with bits [first, last) set; 0 <= first < last <= 64."""
    return (ALL << first) & (ALL >> (U64 - last))


@kernel
def mask_at(index, end):
    """The bits of [index, end) in the word that holds `index`, of a row with a bit each."""
    return bits_between(index & U63, min(U64, (index & U63) + end - index))


@kernel
def shared_in_range(m, node, start, end):
    """Shared pages in [start, end). Whole 2M blocks are counted by their count."""
    total = U0
    word = m.state[node + I_WORD]
    index = start
    while index < end:
        if index & U511 == U0 and end - index >= U512:
            total += shared_in_2m(m, node, index)
            index += U512
        else:
            last = min(U64, (index & U63) + end - index)
            total += population(m.state[word + (index >> U6)] & bits_between(index & U63, last))
            index += last - (index & U63)
    return total


@kernel
def store_shareability(m, node, start, end, shared):
    """Make pages [start, end) shared (1) or private (0), and keep the counts per 2M and 1G."""
    word = m.state[node + I_WORD]
    pmd = m.state[node + I_PMD]
    pud = m.state[node + I_PUD]
    index = start
    while index < end:
        last = min(U64, (index & U63) + end - index)
        mask = bits_between(index & U63, last)
        at = word + (index >> U6)
        old = m.state[at]
        new = old | mask if shared != U0 else old & ~mask
        m.state[at] = new
        gained = population(new) - population(old)
        m.counts[pmd + (index >> U9)] = np.uint32(U(m.counts[pmd + (index >> U9)]) + gained)
        m.counts[pud + (index >> U18)] = np.uint32(U(m.counts[pud + (index >> U18)]) + gained)
        index += last - (index & U63)
