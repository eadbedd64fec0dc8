"""Private anonymous memory: first access, the zero page, copy on write. mm/memory.c."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U2
from pgemu_kernels.engine.charge import change, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.frames import copy_frame, fill_frame, take_frame
from pgemu_kernels.folios.anonymous_folios import (
    compound_head,
    copy_from_large,
    defer_split,
    is_large_anonymous,
    is_page_exclusive,
    large_mapcount,
    maybe_mapped_shared,
    put_large,
    remove_rmap_ptes,
    set_page_exclusive,
)
from pgemu_kernels.folios.folio import reference_count, struct_page
from pgemu_kernels.folios.poison import free_unless_poisoned
from pgemu_kernels.formats.bits import PTE_ACCESSED, PTE_SOFT_DIRTY, PTE_SPECIAL, PTE_WRITE
from pgemu_kernels.process.entries import (
    holds_page,
    is_hwpoison,
    make_writable,
    mk_pte,
    pte_mkdirty,
    pte_pfn,
    vm_page_prot,
)
from pgemu_kernels.process.tables import need_slot, space_row
from pgemu_kernels.process.vma import prepare_anon_vma
from pgemu_kernels.stage2.notifier import notify_range
from pgemu_kernels.tables.walker import count_host_leaf
from pgemu_kernels.words.enum_words import (
    EVENT_LEAF_WRITTEN,
    EVENT_PAGE_COPIED,
    EVENT_PAGE_ZEROED,
    EVENT_RMAP_CHANGED,
    EVENT_TLB_FLUSH_MM,
    EVENT_TLB_FLUSH_PAGE,
    GAUGE_ANONYMOUS_PAGES,
)
from pgemu_kernels.words.operations import VM_FAULT_HWPOISON, VM_FAULT_NOPAGE, VM_FAULT_OOM, VM_FAULT_SIGSEGV
from pgemu_kernels.words.registers import R_PINNED_ALONE, R_REUSES_LARGE, R_ZERO_FRAME
from pgemu_kernels.words.rows import (
    A_PROT,
    A_SPACE,
    PAGE_CACHED,
    PAGE_EXCLUSIVE,
    PAGE_HELD,
    PAGE_MAPPINGS,
    PAGE_PINNED,
    PROT_WRITE,
    S_RSS,
)

U = np.uint64
UNSHARE = U2  # in place of 1 or 0 for a write: FAULT_FLAG_UNSHARE, a page is to be this mapping's alone


@kernel
def set_pte_at(m, slot, entry):
    """set_pte_at() where nothing was."""
    m.ram[slot] = entry
    count_host_leaf(m, 1)
    charge_one(m, EVENT_LEAF_WRITTEN)


@kernel
def new_page(m):
    """A frame for one private page that is mapped once and may be written, whatever it holds; NONE without memory."""
    frame = take_frame(m)
    if frame != NONE:
        m.counts[frame] = np.uint32(PAGE_EXCLUSIVE | U1)
        change(m.stats, GAUGE_ANONYMOUS_PAGES, 1)
    return frame


@outlined
def unmap_large(m, space, frame, n):
    """The same of `n` pages in a row of a large folio: folio_remove_rmap_ptes(), folio_put_refs()."""
    head = compound_head(m, frame)
    m.state[space_row(space) + S_RSS] -= n
    if remove_rmap_ptes(m, head, frame, n, space):
        defer_split(m, head)
    put_large(m, head, n)


@kernel
def unmap_page(m, space, frame):
    """folio_remove_rmap_pte() and put_page(): one mapping less; the page goes with its last one if no file holds it and
    no pin."""
    if is_large_anonymous(m.state, frame):
        unmap_large(m, space, frame, U1)
        return
    word = U(m.counts[frame]) - U1
    m.counts[frame] = np.uint32(word)
    m.state[space_row(space) + S_RSS] -= U1
    charge_one(m, EVENT_RMAP_CHANGED)
    if word & (PAGE_MAPPINGS | PAGE_CACHED) == U0:
        change(m.stats, GAUGE_ANONYMOUS_PAGES, -1)
        if word & PAGE_PINNED == U0:
            free_unless_poisoned(m, frame, word)
        else:
            m.state[R_PINNED_ALONE] += U1


@kernel
def zero_page(m):
    """The frame of the kernel's page of zeroes, or NONE. Linux has it from boot; here it comes with its first use."""
    frame = m.state[R_ZERO_FRAME]
    if frame == U0:
        frame = take_frame(m)
        if frame != NONE:
            fill_frame(m.ram, frame, U0)
            m.state[R_ZERO_FRAME] = frame
    return frame


@kernel
def _map_zero_page(m, row, slot):
    """do_anonymous_page() for a read."""
    frame = zero_page(m)
    if frame == NONE:
        return np.int64(VM_FAULT_OOM)
    set_pte_at(m, slot, mk_pte(frame, vm_page_prot(m.state, row) | PTE_SPECIAL))
    return np.int64(VM_FAULT_NOPAGE)


@kernel
def _fill_new_page(m, row, slot):
    """do_anonymous_page() for a write."""
    state = m.state
    prepare_anon_vma(state, row)
    frame = new_page(m)
    if frame == NONE:
        return np.int64(VM_FAULT_OOM)
    fill_frame(m.ram, frame, U0)
    charge_one(m, EVENT_PAGE_ZEROED)
    charge_one(m, EVENT_RMAP_CHANGED)
    entry = mk_pte(frame, vm_page_prot(state, row))
    if state[row + A_PROT] & PROT_WRITE != U0:
        entry = make_writable(pte_mkdirty(entry))
    set_pte_at(m, slot, entry)
    state[space_row(state[row + A_SPACE]) + S_RSS] += U1
    return np.int64(VM_FAULT_NOPAGE)


@kernel
def copy_page(m, frame, old):
    """The contents of a page of anonymous memory into a frame of ordinary memory."""
    if is_large_anonymous(m.state, old):
        copy_from_large(m, frame, old)
    else:
        copy_frame(m.ram, frame, old)


@kernel
def _copy_on_write(m, row, address, slot, unshare):
    """wp_page_copy(): a new page with the contents of the old one, or of zeroes for the zero page.

    `unshare`: FAULT_FLAG_UNSHARE, the page is only to be this mapping's alone: its entry is neither writable nor dirty.
    """
    state = m.state
    space = state[row + A_SPACE]
    old = m.ram[slot]
    prepare_anon_vma(state, row)
    frame = new_page(m)
    if frame == NONE:
        return np.int64(VM_FAULT_OOM)
    if old & PTE_SPECIAL != U0:
        fill_frame(m.ram, frame, U0)
        charge_one(m, EVENT_PAGE_ZEROED)
    else:
        copy_page(m, frame, pte_pfn(old))
        charge_one(m, EVENT_PAGE_COPIED)
    notify_range(m, space, address, address + U(4096))
    if old & PTE_SPECIAL == U0:
        unmap_page(m, space, pte_pfn(old))
    state[space_row(space) + S_RSS] += U1
    entry = mk_pte(frame, vm_page_prot(state, row))
    m.ram[slot] = entry | old & PTE_SOFT_DIRTY if unshare else make_writable(pte_mkdirty(entry))
    charge_one(m, EVENT_LEAF_WRITTEN)
    charge_one(m, EVENT_RMAP_CHANGED)
    charge_one(m, EVENT_TLB_FLUSH_MM)
    charge_one(m, EVENT_TLB_FLUSH_PAGE)
    return np.int64(VM_FAULT_NOPAGE)


@kernel
def is_anon_exclusive(m, frame):
    """PageAnonExclusive(): whether a page of anonymous memory, or the head of a 2M leaf's, is one mapping's alone."""
    if is_large_anonymous(m.state, frame):
        return is_page_exclusive(m, frame)
    return U(m.counts[frame]) & PAGE_EXCLUSIVE != U0


@outlined
def _can_reuse_large(m, frame):
    """wp_can_reuse_anon_folio() of a page of a large folio: all its mappings are one process's, and nobody else has a
    reference: __wp_can_reuse_large_anon_folio(), 6.15. Before none is, so that the folio may go sooner."""
    if is_page_exclusive(m, frame):
        return True
    head = compound_head(m, frame)
    page = struct_page(m, head)
    mapped = large_mapcount(m.ram, page)
    if m.state[R_REUSES_LARGE] == U0 or mapped <= U1 or maybe_mapped_shared(m.ram, page):
        return False
    if reference_count(m.ram, page) != mapped:
        return False
    set_page_exclusive(m, frame, True)
    return True


@kernel
def _can_reuse(m, frame):
    """wp_can_reuse_anon_folio(), after which the page is this mapping's alone."""
    if is_large_anonymous(m.state, frame):
        return _can_reuse_large(m, frame)
    word = U(m.counts[frame])
    if word & PAGE_EXCLUSIVE == U0 and word & PAGE_HELD != U1:
        return False
    m.counts[frame] = np.uint32(word | PAGE_EXCLUSIVE)
    return True


@kernel
def _write_protected(m, row, address, slot, unshare):
    """do_wp_page(): a page of this mapping alone is made writable, any other is copied."""
    entry = m.ram[slot]
    if entry & PTE_SPECIAL == U0:
        if _can_reuse(m, pte_pfn(entry)):
            if unshare:
                return np.int64(VM_FAULT_NOPAGE)
            m.ram[slot] = make_writable(pte_mkdirty(entry | PTE_ACCESSED))
            charge_one(m, EVENT_LEAF_WRITTEN)
            return np.int64(VM_FAULT_NOPAGE)
    return _copy_on_write(m, row, address, slot, unshare)


@outlined
def anonymous_fault(m, row, address, write):
    """handle_pte_fault() of a private anonymous VMA: VM_FAULT_NOPAGE, OOM, SIGSEGV at a guard, or HWPOISON.

    Linux returns 0 where this returns VM_FAULT_NOPAGE; 0 stands for an access that was no fault. `address` is
    that of the page, `write` uint64 0 or 1, or UNSHARE; the VMA allows the access.
    """
    slot = need_slot(m, m.state[row + A_SPACE], address, U1)
    if slot == NONE:
        return np.int64(VM_FAULT_OOM)
    entry = m.ram[slot]
    if entry == U0:
        if write != U1:
            return _map_zero_page(m, row, slot)
        return _fill_new_page(m, row, slot)
    if not holds_page(entry):
        return np.int64(VM_FAULT_HWPOISON if is_hwpoison(m.state, entry) else VM_FAULT_SIGSEGV)
    if write != U0 and entry & PTE_WRITE == U0:
        return _write_protected(m, row, address, slot, write == UNSHARE)
    return np.int64(VM_FAULT_NOPAGE)
