"""Pins: what pin_user_pages() takes through a process's mapping and holds until UNPIN. mm/gup.c.

A pin of a folio of order 0 is 1024 references, and only such folios are ever mapped by design restructure. Mappings of
pfnmap are VM_PFNMAP, which GUP refuses. FOLL_LONGTERM asks for nothing more here: guest_memfd's folios are not
movable, so that they may be pinned where they are (mm/gup.c:check_and_migrate_movable_folios()).
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U12, U4095
from pgemu_kernels.engine.charge import change, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.geometry import size_of
from pgemu_kernels.engine.properties import gup_works
from pgemu_kernels.engine.rows import clear_words, find_vma, space_root, stop
from pgemu_kernels.folios.folio import add_references, struct_page
from pgemu_kernels.folios.page_cache import cache_find, cache_store
from pgemu_kernels.gmem.faults import host_fault_page
from pgemu_kernels.gmem.host_entries import counted_view
from pgemu_kernels.gmem.references import drop
from pgemu_kernels.process.entries import leaf_pfn
from pgemu_kernels.tables.walker import find_leaf, host_format
from pgemu_kernels.words.enum_words import EVENT_PAGE_PINNED, FLAG_WRITE, GAUGE_PAGES_PINNED
from pgemu_kernels.words.operations import (
    EAGAIN,
    EEXIST,
    EFAULT,
    EINVAL,
    ENOENT,
    ENOMEM,
    EOPNOTSUPP,
    VM_FAULT_OOM,
    VM_FAULT_RETRY,
    VM_FAULT_SIGBUS,
    VM_FAULT_SIGSEGV,
)
from pgemu_kernels.words.registers import R_PINS
from pgemu_kernels.words.rows import (
    A_KIND,
    A_READ_ONLY,
    GUP_PIN_COUNTING_BIAS,
    O_ADDRESS,
    O_DETAIL,
    O_FLAGS,
    O_LENGTH,
    O_OBJECT,
    O_SPACE,
    PIN_ADDRESS,
    PIN_FLAGS,
    PIN_FRAMES,
    PIN_LIVE,
    PIN_PAGES,
    PIN_SPACE,
    PIN_WORDS,
    PINS,
    STATE_PINS,
    VMA_GUEST_MEMFD,
    VMA_PFN_FAULT,
    VMA_PFN_REMAP,
)

U = np.uint64
_WORDS = U(PIN_WORDS)


@kernel
def pin_row(pin):
    return STATE_PINS + pin * _WORDS


# --------------------------------------------------------------------------- pin


@kernel
def check_vma(m, row, write):
    """mm/gup.c:check_vma_flags(): 0 or -EFAULT; -EOPNOTSUPP for ordinary memory, whose pins are not modelled."""
    state = m.state
    if row == NONE:
        return np.int64(-EFAULT)
    kind = state[row + A_KIND]
    special = kind == VMA_GUEST_MEMFD and not (gup_works(m) or counted_view(m, row))
    if kind == VMA_PFN_REMAP or kind == VMA_PFN_FAULT or special:
        return np.int64(-EFAULT)  # VM_PFNMAP: no fault is attempted
    if kind != VMA_GUEST_MEMFD:
        return np.int64(-EOPNOTSUPP)
    return np.int64(-EFAULT if write and state[row + A_READ_ONLY] != U0 else 0)


@kernel
def fault_error(status):
    """The error that GUP makes of a fault's result, 0 for a fault that succeeded: mm/gup.c:vm_fault_to_errno().

    VM_FAULT_RETRY stands for an invalidate_lock that another actor holds; Linux would wait for it.
    """
    if status == VM_FAULT_OOM:
        return np.int64(-ENOMEM)
    if status == VM_FAULT_SIGBUS or status == VM_FAULT_SIGSEGV:
        return np.int64(-EFAULT)
    return np.int64(-EAGAIN if status == VM_FAULT_RETRY else 0)


@kernel
def mapped_page(m, space, address):
    """The frame that a process maps at an address and the entry, or NONE and 0."""
    slot, level = find_leaf(m, host_format(m), space_root(m.state, space), address >> U12)
    if slot == NONE:
        return NONE, U0
    inside = (address & (size_of(level) - U1)) >> U12
    return leaf_pfn(m.ram[slot], level) + inside, m.ram[slot]


@outlined
def faulted_page(m, op, address, write):
    """(0 or -errno, frame, entry) of what the process of a record maps at an address, faulted in if it is absent."""
    space = m.state[op + O_SPACE]
    pfn, entry = mapped_page(m, space, address)
    if pfn != NONE:
        return np.int64(0), pfn, entry
    status = fault_error(host_fault_page(m, op, address, write))
    if status != 0:
        return status, U0, U0
    pfn, entry = mapped_page(m, space, address)
    return np.int64(0), pfn, entry


@outlined
def pin_page(m, op, row, index):
    """Pin page `index` of a pin, faulted in if it is absent: 0 or -errno with nothing taken.

    A frame for the pin's own list is taken after the fault; in Linux the list is the caller's.
    """
    state = m.state
    space = state[op + O_SPACE]
    address = state[op + O_ADDRESS] + (index << U12)
    write = state[op + O_FLAGS] & FLAG_WRITE != U0
    status = check_vma(m, find_vma(state, space, address), write)
    if status != 0:
        return status
    status, pfn, _ = faulted_page(m, op, address, write)
    if status != 0:
        return status
    if cache_store(m, row + PIN_FRAMES, index, pfn) != 0:
        return np.int64(-ENOMEM)
    add_references(m.ram, struct_page(m, pfn), GUP_PIN_COUNTING_BIAS)
    charge_one(m, EVENT_PAGE_PINNED)
    change(m.stats, GAUGE_PAGES_PINNED, 1)
    return np.int64(0)


@outlined
def operate_pin(m, op):
    """PIN: 0 with the pages pinned, fewer than asked for where a later one failed; else the first page's error.

    -EINVAL for a pin number past words.PINS, an address or length that is not aligned, no length; -EEXIST for a pin
    that is live; -EFAULT without a mapping, for VM_PFNMAP, for writing to a read-only mapping and where the fault ends
    in SIGBUS; -ENOMEM; -EAGAIN where Linux would wait for the invalidate_lock.
    mm/gup.c:__get_user_pages(), try_grab_folio().
    """
    state = m.state
    pin = state[op + O_OBJECT]
    address = state[op + O_ADDRESS]
    length = state[op + O_LENGTH]
    if pin >= U(PINS) or (address | length) & U4095 != U0 or length == U0 or address + length < address:
        return stop(state, op, -EINVAL)
    row = pin_row(pin)
    if state[row + PIN_LIVE] != U0:
        return stop(state, op, -EEXIST)
    pages = length >> U12
    pinned = U0
    status = np.int64(0)
    while pinned < pages and status == 0:
        status = pin_page(m, op, row, pinned)
        if status == 0:
            pinned += U1
    state[op + O_DETAIL] = pinned
    if pinned == U0:
        return stop(state, op, status)
    state[row + PIN_LIVE] = U1
    state[row + PIN_PAGES] = pinned
    state[row + PIN_FLAGS] = state[op + O_FLAGS]
    state[row + PIN_SPACE] = state[op + O_SPACE]
    state[row + PIN_ADDRESS] = address
    state[R_PINS] = max(state[R_PINS], pin + U1)
    return stop(state, op, 0)


# --------------------------------------------------------------------------- unpin


@outlined
def operate_unpin(m, op):
    """UNPIN: 0 with the pages released, or -ENOENT. mm/gup.c:unpin_user_pages().

    Pages that left their inode since are released too: the last reference sends them back to the pool.
    """
    state = m.state
    pin = state[op + O_OBJECT]
    if pin >= U(PINS) or state[pin_row(pin) + PIN_LIVE] == U0:
        return stop(state, op, -ENOENT)
    row = pin_row(pin)
    pages = state[row + PIN_PAGES]
    for index in range(pages):
        pfn = cache_find(m, state[row + PIN_FRAMES], index)
        cache_store(m, row + PIN_FRAMES, index, U0)
        charge_one(m, EVENT_PAGE_PINNED)
        change(m.stats, GAUGE_PAGES_PINNED, -1)
        drop(m, pfn, GUP_PIN_COUNTING_BIAS)
    clear_words(state, row, _WORDS)
    state[op + O_DETAIL] = pages
    return stop(state, op, 0)
