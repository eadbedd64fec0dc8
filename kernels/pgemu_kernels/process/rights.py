"""Entries of a process given other rights: mm/mprotect.c:change_protection()."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import U0, U1, U2
from pgemu_kernels.engine.charge import charge, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.geometry import size_of
from pgemu_kernels.engine.rows import space_root
from pgemu_kernels.formats.bits import PTE_ADDRESS, PTE_LARGE, PTE_SPECIAL
from pgemu_kernels.process.anonymous import is_anon_exclusive
from pgemu_kernels.process.entries import holds_page, make_writable, modify, pte_pfn, vm_page_prot
from pgemu_kernels.process.huge_memory import change_huge_pmd, split_and_notify
from pgemu_kernels.process.huge_pmd import is_huge_anonymous
from pgemu_kernels.process.tables import (
    gather,
    lookup_address,
)
from pgemu_kernels.process.zapping import drop_large_pfn, over_huge_pages
from pgemu_kernels.stage2.notifier import notify_range
from pgemu_kernels.words.enum_words import (
    EVENT_LEAF_WRITTEN,
)
from pgemu_kernels.words.rows import (
    A_FLAGS,
    A_KIND,
    A_PROT,
    A_SPACE,
    PROT_WRITE,
    VM_SHARED,
    VMA_HUGETLB,
)

U = np.uint64


@kernel
def _changed(m, row, entry, bits, level):
    """An entry with the VMA's new rights; a private page of this mapping alone becomes writable at once.

    mm/mprotect.c:change_pte_range(), can_change_pte_writable().
    """
    value = modify(entry, bits, PTE_LARGE if level > U1 else U0, PTE_ADDRESS & ~(size_of(level) - U1))
    state = m.state
    if state[row + A_FLAGS] & VM_SHARED == U0 and state[row + A_PROT] & PROT_WRITE != U0 and level == U1:
        if value & PTE_SPECIAL == U0 and is_anon_exclusive(m, pte_pfn(value)):
            return make_writable(value)
    return value


@outlined
def _protect_small(m, row, start, end):
    """change_protection_range() of a VMA that is not HugeTLB; a large entry of which only a part changes is dropped,
    one of anonymous memory split."""
    root = space_root(m.state, m.state[row + A_SPACE])
    bits = vm_page_prot(m.state, row)
    changed = np.int64(0)
    address = start
    while address < end:
        slot, level = lookup_address(m, root, address)
        if level > U1:
            size = size_of(level)
            first = address & ~(size - U1)
            if holds_page(m.ram[slot]):
                part = address != first or first + size > end
                if is_huge_anonymous(m.state, row, m.ram[slot], level):
                    if part:
                        split_and_notify(m, row, slot, address)
                        continue
                    change_huge_pmd(m, row, slot)
                    gather(m, address, level)
                elif part:
                    drop_large_pfn(m, row, address, level)
                else:
                    m.ram[slot] = _changed(m, row, m.ram[slot], bits, level)
                    changed += 1
                    gather(m, address, level)
            address = first + size
            continue
        stop = min(end, (address & ~(size_of(U2) - U1)) + size_of(U2))
        while address < stop:
            entry = m.ram[slot]
            if entry != U0 and holds_page(entry):
                m.ram[slot] = _changed(m, row, entry, bits, U1)
                changed += 1
                gather(m, address, U1)
            slot += U1
            address += U(4096)
    charge(m, EVENT_LEAF_WRITTEN, changed)


@kernel
def _leave_poison(m, slot):
    """hugetlb_change_protection() changes nothing of it."""


@kernel
def _protect_huge_entry(m, row, slot, level):
    m.ram[slot] = modify(m.ram[slot], vm_page_prot(m.state, row), PTE_LARGE, PTE_ADDRESS)
    charge_one(m, EVENT_LEAF_WRITTEN)


# hugetlb_change_protection(): where a table was shared the next access builds one with the new rights.
_protect_huge = over_huge_pages(_protect_huge_entry, _leave_poison)


@outlined
def change_protection(m, row, start, end):
    """Give the entries of [start, end) of a VMA the rights that its row has by now, after KVM was told."""
    notify_range(m, m.state[row + A_SPACE], start, end)
    if m.state[row + A_KIND] == VMA_HUGETLB:
        _protect_huge(m, row, start, end)
    else:
        _protect_small(m, row, start, end)
