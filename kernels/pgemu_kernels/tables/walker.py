"""Page tables: one walker for every format, over 512-entry tables in `ram`.

Levels are KVM's: 1 = 4K, 2 = 2M, 3 = 1G, 4 = 512G. A "table" is the index in `ram` of a table's first
word; the "table of level n" holds entries of level n. Formats are data: nothing here knows a name.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U2, U3, U4, U9, U12
from pgemu_kernels.engine.charge import change, change_value, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.frames import empty_frame, put_frame
from pgemu_kernels.engine.geometry import index_at
from pgemu_kernels.words.enum_words import EVENT_TABLE_PAGE_ALLOCATED, EVENT_TABLE_PAGE_FREED, GAUGE_HOST_LEAVES_4K
from pgemu_kernels.words.registers import R_HOST_FORMAT, R_STAGE2_FORMAT
from pgemu_kernels.words.rows import STATE_FORMATS
from pgemu_kernels.words.table_words import F_ADDRESS, F_EMPTY, F_LARGE, F_MMU_PRESENT, F_TABLE, F_WORDS

U = np.uint64
_F_WORDS = U(F_WORDS)


@kernel
def format_row(state, index):
    """Where a format's fields begin in `state`."""
    return STATE_FORMATS + index * _F_WORDS


@kernel
def host_format(m):
    return format_row(m.state, m.state[R_HOST_FORMAT])


@kernel
def stage2_format(m):
    return format_row(m.state, m.state[R_STAGE2_FORMAT])


@kernel
def table_of(state, f, entry):
    """The table a table entry points to."""
    return (entry & state[f + F_ADDRESS]) >> U3


@kernel
def is_present(state, f, entry):
    """Whether an entry is present to Linux; to the hardware a cached MMIO entry of KVM is, too."""
    return entry & state[f + F_MMU_PRESENT] != U0


@kernel
def is_large(state, f, entry):
    """Whether a present entry above level 1 is a leaf."""
    return entry & state[f + F_LARGE] != U0


@kernel
def find_entry(m, f, root, page):
    """find_leaf(), then of a hole of 4K its slot, and that of the level-2 entry above; NONE, NONE of what is none.

    Four, three or two loads for a leaf of 4K, 2M or 1G.
    """
    ram = m.ram
    state = m.state
    entry = ram[(root >> U3) + index_at(page, U4)]
    if not is_present(state, f, entry):
        return NONE, U4, NONE, NONE
    slot = table_of(state, f, entry) + index_at(page, U3)
    entry = ram[slot]
    if not is_present(state, f, entry):
        return NONE, U3, NONE, NONE
    if is_large(state, f, entry):
        return slot, U3, NONE, NONE
    middle = table_of(state, f, entry) + index_at(page, U2)
    entry = ram[middle]
    if not is_present(state, f, entry):
        return NONE, U2, NONE, NONE
    if is_large(state, f, entry):
        return middle, U2, NONE, NONE
    slot = table_of(state, f, entry) + index_at(page, U1)
    if not is_present(state, f, ram[slot]):
        return NONE, U1, slot, middle
    return slot, U1, NONE, NONE


@kernel
def find_leaf(m, f, root, page):
    """Walk to the leaf that maps `page` (a page number): its slot and level, or (NONE, level of the hole)."""
    slot, level, _, _ = find_entry(m, f, root, page)
    return slot, level


@outlined
def new_table(m, f, slot, gauge):
    """Allocate an empty table page and link it at `slot`: its table, or NONE without memory.

    mm/memory.c:__pte_alloc() and arch/x86/kvm/mmu/tdp_mmu.c:tdp_mmu_link_sp().
    """
    frame = empty_frame(m, m.state[f + F_EMPTY], gauge)
    if frame == NONE:
        return NONE
    m.ram[slot] = frame << U12 | m.state[f + F_TABLE]
    charge_one(m, EVENT_TABLE_PAGE_ALLOCATED)
    return frame << U9


@kernel
def free_table(m, frame, gauge):
    put_frame(m, frame)
    change(m.stats, gauge, -1)
    charge_one(m, EVENT_TABLE_PAGE_FREED)


@kernel
def count_host_leaf(m, n):
    change_value(m.stats, GAUGE_HOST_LEAVES_4K, n)
