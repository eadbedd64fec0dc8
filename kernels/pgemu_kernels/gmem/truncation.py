"""Hole punching and the end of an inode: what the two designs do through `truncate_block` and `evict_block`."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import U0, U1, U12
from pgemu_kernels.engine.charge import PAGE_ZEROED, charge
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.frames import zero_contents
from pgemu_kernels.engine.rows import (
    block_row,
    inode_row,
    lock_exclusive,
    memslot_row,
    range_arguments,
    stop,
    unlock,
)
from pgemu_kernels.folios.hugetlb import subpool_release, subpool_row
from pgemu_kernels.gmem import pfnmap, restructure
from pgemu_kernels.kvm.gmem_slots import delete_slot
from pgemu_kernels.process.munmap import unmap_inode
from pgemu_kernels.process.zapping import unmap_mapping_range
from pgemu_kernels.stage2.invalidate import begin_range, end_range, flush_vms, zap_range
from pgemu_kernels.words.operations import EBADF, EBUSY, PFNMAP
from pgemu_kernels.words.registers import R_DESIGN, R_HSTATE, R_INODES, R_MEMSLOTS, R_ORDER
from pgemu_kernels.words.rows import (
    B_PFN,
    B_STATE,
    BLOCK_ABSENT,
    I_BLOCKS,
    I_OPEN,
    I_PAGES,
    I_SUBPOOL,
    M_INODE,
    M_LIVE,
    O_DETAIL,
    O_LENGTH,
    O_OBJECT,
    O_OFFSET,
    P_LIVE,
)

U = np.uint64


@kernel
def zero_part(m, node, index, pages):
    """Zero the part of a huge page that a hole covers: guest_memfd frees only whole huge pages."""
    block = block_row(m, node, index)
    if m.state[block + B_STATE] != BLOCK_ABSENT:
        inside = (U1 << m.state[R_ORDER]) - U1
        zero_contents(m, m.state[block + B_PFN] + (index & inside), pages)
        charge(m, PAGE_ZEROED, np.int64(pages))


@kernel
def punch_blocks(m, op, inode, start, end):
    """Free or zero the huge pages of [start, end): 0, or -EAGAIN with those before the failing one gone."""
    state = m.state
    node = inode_row(inode)
    pages = U1 << state[R_ORDER]
    index = start
    while index < end:
        last = min(end, (index & ~(pages - U1)) + pages)
        if last - index == pages:
            if state[R_DESIGN] == U(PFNMAP):
                status = pfnmap.truncate_block(m, inode, index)
            else:
                status = restructure.truncate_block(m, inode, index)
            if status != 0:
                state[op + O_DETAIL] = index << U12
                return status
        else:
            zero_part(m, node, index, last - index)
        index = last
    return np.int64(0)


@outlined
def punch(m, op):
    """fallocate(PUNCH_HOLE): 0; -EBADF; -EINVAL when unaligned; -EAGAIN (restructure) when a merge is impossible;
    -EBUSY where Linux would wait for the lock.

    Whole huge pages are freed, parts only zeroed; shareability does not change; a hole past the end is
    no error. virt/kvm/guest_memfd.c:kvm_gmem_punch_hole() as in the posted 1G series. Truncation unmaps
    host entries only of folios with a mapcount, so pfnmap unmaps the range itself first.
    """
    state = m.state
    status = range_arguments(state, op)
    if status != 0:
        return stop(state, op, status)
    inode = state[op + O_OBJECT]
    node = inode_row(inode)
    start = state[op + O_OFFSET] >> U12
    end = min(start + (state[op + O_LENGTH] >> U12), state[node + I_PAGES])
    if start >= end:
        return stop(state, op, 0)
    if not lock_exclusive(state, op, node):
        return stop(state, op, -EBUSY)
    if state[R_DESIGN] == U(PFNMAP):
        unmap_mapping_range(m, inode, start, end)
    begin_range(m, inode, start, end)
    zap_range(m, inode, start, end)
    flush_vms(m)
    status = punch_blocks(m, op, inode, start, end)
    end_range(m, inode, start, end)
    unlock(state, op, node)
    return stop(state, op, status)


@kernel
def leave_inode(m, inode):
    """exit_mmap() of the inode's mappings, and its memory slots, released ones too."""
    state = m.state
    unmap_inode(m, inode)
    for i in range(state[R_MEMSLOTS]):
        slot = memslot_row(i)
        if state[slot + M_LIVE] != U0 and state[slot + M_INODE] == inode:
            delete_slot(m, slot)


@kernel
def close_inode(m, node):
    """The inode is gone, and with it its hold on the subpool."""
    state = m.state
    state[node + I_OPEN] = U0
    if state[node + I_SUBPOOL] != U0:
        state[subpool_row(state[node + I_SUBPOOL] - U1) + P_LIVE] = U0
        subpool_release(m, state[R_HSTATE], state[node + I_SUBPOOL] - U1)


@outlined
def close(m, op):
    """The VMM goes: mappings of the inode, its memory slots, then the inode itself. 0, -EBADF, or -EBUSY
    where Linux would wait for the lock.

    exit_mmap(), then virt/kvm/guest_memfd.c:kvm_gmem_release() and the inode's eviction.
    """
    state = m.state
    inode = state[op + O_OBJECT]
    if inode >= state[R_INODES] or state[inode_row(inode) + I_OPEN] == U0:
        return stop(state, op, -EBADF)
    node = inode_row(inode)
    if not lock_exclusive(state, op, node):
        return stop(state, op, -EBUSY)
    leave_inode(m, inode)
    for block in range(state[node + I_BLOCKS]):
        if state[R_DESIGN] == U(PFNMAP):
            pfnmap.evict_block(m, inode, block << state[R_ORDER])
        else:
            restructure.evict_block(m, inode, block << state[R_ORDER])
    unlock(state, op, node)
    close_inode(m, node)
    return stop(state, op, 0)
