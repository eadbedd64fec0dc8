"""Memory failure as operations: of a page by its address or its place in a file, of what a process maps, and back."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U12, U4095
from pgemu_kernels.engine.charge import charge_one
from pgemu_kernels.engine.choice import by_number
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.geometry import size_of
from pgemu_kernels.engine.rows import block_row, find_vma, inode_row, space_root, stop
from pgemu_kernels.folios.folio import FLAGS, INDEX, MAPPING, PG_DIRTY, mappings, reference_count, struct_page
from pgemu_kernels.folios.hstate import in_zone
from pgemu_kernels.folios.hugetlb import head_of, inode_at
from pgemu_kernels.folios.large_folios import head_and_order
from pgemu_kernels.folios.page_cache import cache_find
from pgemu_kernels.folios.poison import is_folio_poisoned
from pgemu_kernels.formats.bits import PTE_ADDRESS
from pgemu_kernels.gmem.gup import check_vma
from pgemu_kernels.gmem.memory_failure import NOBODY, cached_at, memory_failure
from pgemu_kernels.gmem.references import is_designs
from pgemu_kernels.gmem.unpoison import unpoison_memory
from pgemu_kernels.process.entries import holds_page, leaf_pfn
from pgemu_kernels.process.fault import fault_in_page
from pgemu_kernels.process.memory_failure import try_to_migrate
from pgemu_kernels.process.record import has_ended
from pgemu_kernels.process.tables import lookup_address
from pgemu_kernels.words.enum_words import (
    EVENT_SYSCALL,
    FLAG_EARLY_KILL,
    FLAG_HARDWARE,
    FLAG_SOFT,
    OP_INJECT,
    OP_MEMORY_FAILURE,
    OP_UNPOISON,
)
from pgemu_kernels.words.operations import EBADF, EBUSY, EFAULT, EINVAL, ENOENT, ENOMEM, ENXIO, EOPNOTSUPP, VM_FAULT_OOM
from pgemu_kernels.words.registers import R_FAILURE_HUGE, R_FRAMES, R_HW_FAILURE, R_HWPOISON, R_INODES, R_ORDER
from pgemu_kernels.words.rows import (
    B_PFN,
    B_STATE,
    BLOCK_ABSENT,
    BLOCK_ZOMBIE,
    I_CACHE,
    I_KIND,
    I_OPEN,
    I_ORDER,
    I_PAGES,
    INODE_DEVICE,
    INODE_GUEST_MEMFD,
    INODE_HUGETLB,
    MF_ACTION,
    O_ADDRESS,
    O_DETAIL,
    O_FLAGS,
    O_LENGTH,
    O_OBJECT,
    O_OFFSET,
    O_SPACE,
    PAGE_DIRTY,
    PAGE_MAPPINGS,
    PAGE_POISONED,
    STATE_FAILURE,
)

U = np.uint64


@outlined
def page_of_file(m, inode, index):
    """The frame that a file has at a page: (0, frame), -EBADF, -EINVAL past its end or of a device, -ENOENT without."""
    state = m.state
    node = inode_row(inode)
    if inode >= state[R_INODES] or state[node + I_OPEN] == U0:
        return np.int64(-EBADF), U0
    kind = state[node + I_KIND]
    if index >= state[node + I_PAGES] or kind == INODE_DEVICE:
        return np.int64(-EINVAL), U0
    if kind == INODE_GUEST_MEMFD:
        block = block_row(m, node, index)
        absent = state[block + B_STATE] == BLOCK_ABSENT or state[block + B_STATE] == BLOCK_ZOMBIE
        pfn = state[block + B_PFN] + (index & ((U(1) << state[R_ORDER]) - U(1)))
        return np.int64(-ENOENT if absent else 0), U0 if absent else pfn
    order = state[node + I_ORDER]
    word = cache_find(m, state[node + I_CACHE], index >> order)
    if kind == INODE_HUGETLB:
        head = (word & PTE_ADDRESS) >> U12
        return np.int64(0 if head != U0 else -ENOENT), head + (index & ((U(1) << order) - U(1))) if head != U0 else U0
    return np.int64(0 if word != U0 else -ENOENT), word


# --------------------------------------------------------------------------- soft offline


@outlined
def offline_designs(m, pfn, mine):
    """Of a 4K page of the designs' files: it cannot be migrated (kvm_gmem_migrate_folio()), and leaves the file
    only if it is clean, unmapped and nobody's; one that is mapped leaves the tables for as long as that is tried
    (captured). `mine`: whoever asks has a reference."""
    head, order = head_and_order(m, pfn) if m.state[R_ORDER] == U0 else (pfn, U0)
    page = struct_page(m, head)
    idle = mappings(m.ram, page) == U0 and reference_count(m.ram, page) == U(1) << order
    if m.ram[page + FLAGS] & PG_DIRTY == U0 and idle and not mine:
        return np.int64(-EOPNOTSUPP)
    on_list = m.state[R_ORDER] == U0 or m.state[R_FAILURE_HUGE] != U0
    if mappings(m.ram, page) != U0 and on_list:
        try_to_migrate(m, inode_at(m, head), m.ram[page + INDEX], pfn)
    return np.int64(-EBUSY)


@outlined
def soft_offline(m, pfn, mapped):
    """soft_offline_page(): 0 of a page that is poisoned already, -EBUSY of guest_memfd, whose pages cannot be migrated.

    -ENXIO without a struct page. -EOPNOTSUPP of what would be: migration is not modelled, nor that a clean page which
    nobody maps is dropped from its file. `mapped`: a process maps it, and whoever asks has a reference.
    """
    state = m.state
    if state[R_HWPOISON] == U0:
        return np.int64(-EOPNOTSUPP)
    if not in_zone(state, pfn):
        if pfn >= state[R_FRAMES]:
            return np.int64(-ENXIO)  # pfn_valid()
        inode, index = cached_at(m, pfn)
        if inode == NONE:
            return np.int64(-EOPNOTSUPP)
        word = U(m.counts[pfn])
        if word & PAGE_POISONED != U0:
            return np.int64(0)
        if word & PAGE_MAPPINGS != U0:
            try_to_migrate(m, inode, index, pfn)
        held = mapped or word & (PAGE_DIRTY | PAGE_MAPPINGS) != U0
        return np.int64(-EBUSY if held else -EOPNOTSUPP)
    head = head_of(m, pfn)
    first = pfn if head == NONE else head
    if is_folio_poisoned(m, first):
        return np.int64(0)
    page = struct_page(m, first)
    if m.ram[page + MAPPING] == U0 or not is_designs(m, first, page):
        return np.int64(-EOPNOTSUPP)
    return np.int64(-EBUSY) if head != NONE else offline_designs(m, pfn, mapped)


# --------------------------------------------------------------------------- operations


@outlined
def fail_page(m, op):
    """MEMORY_FAILURE: memory_failure() or soft_offline_page() of the page at a physical address, or of a file;
    detail is the MfResult. -EBADF, -EINVAL and -ENOENT of a file without such a page.

    hw_memory_failure is set by one that was not injected: nothing is unpoisoned after it.
    """
    state = m.state
    flags = state[op + O_FLAGS]
    status = np.int64(0)
    pfn = state[op + O_ADDRESS] >> U12
    if pfn == U0:
        status, pfn = page_of_file(m, state[op + O_OBJECT], state[op + O_OFFSET] >> U12)
    if status != 0:
        return stop(state, op, status)
    if flags & FLAG_SOFT != U0:
        return stop(state, op, soft_offline(m, pfn, False))
    if flags & FLAG_HARDWARE != U0:
        state[R_HW_FAILURE] = U(1)
    status = memory_failure(m, pfn, NOBODY, flags & FLAG_EARLY_KILL != U0, False)
    state[op + O_DETAIL] = state[STATE_FAILURE + MF_ACTION]
    return stop(state, op, status)


@outlined
def got_page(m, space, address):
    """get_user_pages_fast() of one page: (0, -EFAULT or -ENOMEM; its frame; bytes of its entry)."""
    state = m.state
    row = find_vma(state, space, address)
    if check_vma(m, row, False) != 0:
        return np.int64(-EFAULT), U0, U0
    status = fault_in_page(m, space, row, address, U0)
    slot, level = lookup_address(m, space_root(state, space), address)
    if status == VM_FAULT_OOM:
        return np.int64(-ENOMEM), U0, U0
    if status != 0 or not holds_page(m.ram[slot]):
        return np.int64(-EFAULT), U0, U0
    size = size_of(level)
    return np.int64(0), leaf_pfn(m.ram[slot], level) + ((address & (size - U(1))) >> U12), size


@outlined
def inject(m, op):
    """INJECT: madvise(MADV_HWPOISON or MADV_SOFT_OFFLINE) of each page of a range, up to the first that fails.

    0, what memory_failure() or soft_offline_page() returned, -EFAULT where GUP gets no page (VM_PFNMAP, or
    no right to read), -ENOMEM,
    -EINVAL. detail is the MfResult of the last page. mm/madvise.c:madvise_inject_error()
    """
    state = m.state
    space = state[op + O_SPACE]
    address = state[op + O_ADDRESS]
    end = address + (state[op + O_LENGTH] + U4095 & ~U4095)
    charge_one(m, EVENT_SYSCALL)
    if has_ended(state, space) or address & U4095 != U0 or end < address:
        return stop(state, op, -EINVAL)
    while address < end:
        status, pfn, size = got_page(m, space, address)
        if status == 0 and state[op + O_FLAGS] & FLAG_SOFT != U0:
            status = soft_offline(m, pfn, True)
        elif status == 0:
            status = memory_failure(m, pfn, space, False, True)
            state[op + O_DETAIL] = state[STATE_FAILURE + MF_ACTION]
            if status == -EOPNOTSUPP:
                return stop(state, op, status)  # Linux says 0, of what its filter left out; here it is not modelled
        if status != 0:
            return stop(state, op, status)
        address = (address & ~(size - U(1))) + size
    return stop(state, op, 0)


@outlined
def unpoison(m, op):
    """UNPOISON: unpoison_memory() of the page at a physical address."""
    charge_one(m, EVENT_SYSCALL)
    return stop(m.state, op, unpoison_memory(m, m.state[op + O_ADDRESS] >> U12))


@kernel
def refuse_failing(m, op, kind):
    return stop(m.state, op, -EOPNOTSUPP)


operate_failure = by_number(
    ((OP_MEMORY_FAILURE, fail_page), (OP_INJECT, inject), (OP_UNPOISON, unpoison)), refuse_failing
)
