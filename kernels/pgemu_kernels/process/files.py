"""Files of ordinary kinds: holes, allocation, close, a device's memory switched off and on."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U12, U4095
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.rows import inode_row, stop
from pgemu_kernels.engine.telling import invalidate_mappings
from pgemu_kernels.folios.huge_pages import add_to_file, give_back_huge, take_huge
from pgemu_kernels.folios.page_cache import cache_find, cache_next, cache_store
from pgemu_kernels.formats.bits import PTE_ADDRESS
from pgemu_kernels.process.close import drop_page, release_inode
from pgemu_kernels.process.guest_memfd_4k import find_or_add_folio
from pgemu_kernels.process.vma import RESERVED
from pgemu_kernels.process.zapping import unmap_mapping_range
from pgemu_kernels.stage2.notifier import notify_inode
from pgemu_kernels.words.enum_words import OP_REVOKE
from pgemu_kernels.words.operations import EINVAL, ENOMEM, ENOSPC, EOPNOTSUPP
from pgemu_kernels.words.rows import (
    I_CACHE,
    I_FLAGS,
    I_KIND,
    I_OPEN,
    I_ORDER,
    I_PAGES,
    INODE_DEVICE,
    INODE_GUEST_MEMFD_4K,
    INODE_REVOKED,
    O_LENGTH,
    O_OBJECT,
    O_OFFSET,
    O_OP,
    PAGE_MAPPINGS,
)

U = np.uint64


@kernel
def _pages_of(state, node, op, inner):
    """Pages [first, last) of a byte range of a file in units of its pages, rounded inwards (`inner`) or outwards."""
    offset = state[op + O_OFFSET]
    end = offset + state[op + O_LENGTH]
    unit = U1 << (U12 + state[node + I_ORDER])
    if inner:
        first = (offset + unit - U1) & ~(unit - U1)
        last = end & ~(unit - U1)
    else:
        first = offset & ~(unit - U1)
        last = (end + unit - U1) & ~(unit - U1)
    return first >> U12, max(first, last) >> U12


@outlined
def punch_hole(m, op):
    """fallocate(FALLOC_FL_PUNCH_HOLE): 0, -EBADF, -EINVAL, -EOPNOTSUPP for a device.

    Pages that lie whole in the range leave every process and the file. fs/hugetlbfs/inode.c:hugetlbfs_punch_hole(),
    virt/kvm/guest_memfd.c:kvm_gmem_punch_hole().
    """
    state = m.state
    inode = state[op + O_OBJECT]
    node = inode_row(inode)
    kind = state[node + I_KIND]
    if kind == INODE_DEVICE:
        return stop(state, op, -EOPNOTSUPP)
    if kind == INODE_GUEST_MEMFD_4K and (state[op + O_OFFSET] | state[op + O_LENGTH]) & U4095 != U0:
        return stop(state, op, -EINVAL)
    first, last = _pages_of(state, node, op, True)
    last = min(last, state[node + I_PAGES])
    if first >= last:
        return stop(state, op, 0)
    small = kind == INODE_GUEST_MEMFD_4K
    if small:
        notify_inode(m, inode, first, last)
    else:
        unmap_mapping_range(m, inode, first, last)
    order = state[node + I_ORDER]
    index = cache_next(m, state[node + I_CACHE], first >> order)
    while index < last >> order:  # NONE is beyond
        word = cache_find(m, state[node + I_CACHE], index)
        if word & ~RESERVED != U0:
            if small and U(m.counts[word]) & PAGE_MAPPINGS != U0:
                unmap_mapping_range(m, inode, index, index + U1)  # each: mm/truncate.c:truncate_cleanup_folio()
            drop_page(m, inode, index, word)
        index = cache_next(m, state[node + I_CACHE], index + U1)
    return stop(state, op, 0)


@outlined
def fallocate(m, op):
    """fallocate(): pages of the range now, zeroed. 0, -EINVAL, -ENOSPC or -ENOMEM with what was done until then."""
    state = m.state
    inode = state[op + O_OBJECT]
    node = inode_row(inode)
    kind = state[node + I_KIND]
    if kind == INODE_DEVICE:
        return stop(state, op, -EOPNOTSUPP)
    first, last = _pages_of(state, node, op, False)
    if kind == INODE_GUEST_MEMFD_4K:
        if (state[op + O_OFFSET] | state[op + O_LENGTH]) & U4095 != U0 or last > state[node + I_PAGES]:
            return stop(state, op, -EINVAL)
        for index in range(first, last):
            status, _ = find_or_add_folio(m, node, index)
            if status != 0:
                return stop(state, op, status)
        return stop(state, op, 0)
    order = state[node + I_ORDER]
    if last > state[node + I_PAGES]:
        return stop(state, op, -EINVAL)  # this file does not grow
    for index in range(first >> order, last >> order):
        word = cache_find(m, state[node + I_CACHE], index)
        if word & PTE_ADDRESS != U0:
            continue
        head = take_huge(m, order, word & RESERVED)
        if head == NONE:
            return stop(state, op, -ENOSPC)
        if cache_store(m, node + I_CACHE, index, head << U12 | RESERVED) != 0:
            give_back_huge(m, head)
            return stop(state, op, -ENOMEM)
        add_to_file(m, head, inode, index << order, order)
    return stop(state, op, 0)


@outlined
def close_file(m, op):
    """close() of the last descriptor: the file lives on while it is mapped. 0."""
    state = m.state
    inode = state[op + O_OBJECT]
    state[inode_row(inode) + I_OPEN] = U0
    release_inode(m, inode)
    return stop(state, op, 0)


@outlined
def set_revoked(m, op):
    """A device's memory goes off, and its entries from every process, or comes back on. 0 or -EINVAL.

    drivers/vfio/pci/vfio_pci_core.c:vfio_pci_zap_and_down_write_memory_lock(), vfio_pci_dma_buf_move().
    """
    state = m.state
    node = inode_row(state[op + O_OBJECT])
    if state[node + I_KIND] != INODE_DEVICE:
        return stop(state, op, -EINVAL)
    if state[op + O_OP] == OP_REVOKE:
        state[node + I_FLAGS] |= INODE_REVOKED
        unmap_mapping_range(m, state[op + O_OBJECT], U0, state[node + I_PAGES])
        invalidate_mappings(m, op, state[op + O_OBJECT])
    else:
        state[node + I_FLAGS] &= ~INODE_REVOKED
    return stop(state, op, 0)
