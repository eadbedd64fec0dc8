"""The end of pages and inodes in full: holes, the release of a VM's file, closing, for every parameter.

What default machines do is truncation.py's, and what is equal is called there. Here is added: holes that are refused,
the truncation that leaves special entries alone, 1G pages split to 2M, and the file of one VM that goes while the inode
stays.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import ALL, NONE, U0, U1, U12
from pgemu_kernels.engine.charge import GUEST_FAULT, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.rows import (
    block_row,
    find_memslot,
    inode_row,
    lock_exclusive,
    memslot_row,
    range_arguments,
    stop,
    unlock,
)
from pgemu_kernels.folios.hugetlb import release_block
from pgemu_kernels.gmem import pfnmap, pieces, restructure
from pgemu_kernels.gmem.mbind import cut
from pgemu_kernels.gmem.truncation import close_inode, leave_inode, zero_part
from pgemu_kernels.gmem.workers import note_return
from pgemu_kernels.gmem.zeroing import clear_zeroed
from pgemu_kernels.process.zapping import unmap_mapping_range
from pgemu_kernels.stage2.invalidate import (
    begin_range,
    end_range,
    flush_vms,
    invalidate_begin,
    invalidate_end,
    zap_range,
    zap_slot,
)
from pgemu_kernels.words.operations import EAGAIN, EBADF, EBUSY, EFAULT, EINVAL, PFNMAP, Defect
from pgemu_kernels.words.registers import (
    R_DEFECTS,
    R_DESIGN,
    R_FULL,
    R_INODES,
    R_MEMSLOTS,
    R_ORDER,
    R_PUNCH_REFUSES,
    R_SERIES,
)
from pgemu_kernels.words.rows import (
    B_OUTSTANDING,
    B_STATE,
    BLOCK_HUGE,
    BLOCK_PARTLY,
    I_BLOCKS,
    I_KIND,
    I_OPEN,
    I_PAGES,
    INODE_GUEST_MEMFD,
    M_BASE_GFN,
    M_FLAGS,
    M_INODE,
    M_LIVE,
    M_PAGES,
    M_PGOFF,
    M_VM,
    O_ADDRESS,
    O_DETAIL,
    O_LENGTH,
    O_OBJECT,
    O_OFFSET,
    O_VM,
    RELEASED_PGOFF,
    SERIES_RFC2,
    SLOT_RELEASED,
)

U = np.uint64
_PFNMAP = U(PFNMAP)
_KEEPS_ENTRIES = U(Defect.PUNCH_KEEPS_ENTRIES)


# --------------------------------------------------------------------------- blocks


@outlined
def truncate_block(m, inode, index):
    """Free the whole huge page that begins at page `index`: 0, or -EAGAIN with nothing freed.

    As the designs' own functions of the name; a 1G page split to 2M folios is made whole first.
    """
    state = m.state
    node = inode_row(inode)
    block = block_row(m, node, index)
    if state[R_DESIGN] == _PFNMAP:
        return pfnmap.truncate_block(m, inode, index)
    if state[block + B_STATE] != BLOCK_PARTLY:
        return restructure.truncate_block(m, inode, index)
    unmap_mapping_range(m, inode, index, index + (U1 << state[R_ORDER]))
    if pieces.dissolve_block(m, node, block, index) != 0:
        return np.int64(-EAGAIN)
    release_block(m, block)
    clear_zeroed(m, node, index)
    return np.int64(0)


@outlined
def evict_block(m, inode, index):
    """Inode eviction, of one huge page."""
    state = m.state
    node = inode_row(inode)
    block = block_row(m, node, index)
    if state[R_DESIGN] == _PFNMAP:
        pfnmap.evict_block(m, inode, index)
        return
    if state[block + B_STATE] != BLOCK_PARTLY:
        restructure.evict_block(m, inode, index)
        return
    if state[R_SERIES] == SERIES_RFC2 or pieces.dissolve_block(m, node, block, index) != 0:
        pieces.make_zombie(m, block)
        if state[block + B_OUTSTANDING] == U0:
            note_return(m, block)
    if state[block + B_STATE] == BLOCK_HUGE:
        release_block(m, block)
    clear_zeroed(m, node, index)


# --------------------------------------------------------------------------- hole


@kernel
def hole_arguments(m, op):
    """0, -EBADF, or -EINVAL: for what is not aligned to 4K, of the branches from late 2025 on to the huge page."""
    status = range_arguments(m.state, op)
    inside = (U1 << (m.state[R_ORDER] + U12)) - U1
    if status == 0 and m.state[R_PUNCH_REFUSES] != U0 and (m.state[op + O_OFFSET] | m.state[op + O_LENGTH]) & inside:
        return np.int64(-EINVAL)
    return status


@outlined
def punch_blocks(m, op, inode, start, end):
    """Free or zero the huge pages of [start, end): 0, or -EAGAIN with those before the failing one gone."""
    state = m.state
    pages = U1 << state[R_ORDER]
    index = start
    while index < end:
        last = min(end, (index & ~(pages - U1)) + pages)
        if last - index == pages:
            status = truncate_block(m, inode, index)
            if status != 0:
                state[op + O_DETAIL] = index << U12
                return status
        else:
            zero_part(m, inode_row(inode), index, last - index)
        index = last
    return np.int64(0)


@outlined
def punch(m, op):
    """fallocate(PUNCH_HOLE) as truncation.punch(), with two parameters more.

    R_PUNCH_REFUSES: a hole that is not aligned to huge pages is -EINVAL, even past the end. With
    Defect.PUNCH_KEEPS_ENTRIES pfnmap does not unmap the hole: truncation looks for entries by the folio's mapcount, and
    special ones have none. Their frames go back to the pool while processes still reach them.
    """
    state = m.state
    status = hole_arguments(m, op)
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
    if state[R_DESIGN] == _PFNMAP and state[R_DEFECTS] & _KEEPS_ENTRIES == U0:
        unmap_mapping_range(m, inode, start, end)
    begin_range(m, inode, start, end)
    zap_range(m, inode, start, end)
    flush_vms(m)
    status = punch_blocks(m, op, inode, start, end)
    end_range(m, inode, start, end)
    unlock(state, op, node)
    return stop(state, op, status)


# --------------------------------------------------------------------------- release and close


@kernel
def is_bound(state, slot, vm, inode):
    """Whether a slot is one of a VM's over an inode whose file it has not released."""
    ours = state[slot + M_LIVE] != U0 and state[slot + M_VM] == vm and state[slot + M_INODE] == inode
    return ours and state[slot + M_FLAGS] & SLOT_RELEASED == U0


@kernel
def release_slot(m, slot):
    """The slot's guest_memfd file goes: no leaf is left, and the slot stands for no page any more."""
    state = m.state
    vm = state[slot + M_VM]
    gfn = state[slot + M_BASE_GFN]
    last = gfn + state[slot + M_PAGES]
    invalidate_begin(state, vm, gfn, last)
    zap_slot(m, slot, gfn, last)
    flush_vms(m)
    invalidate_end(state, vm)
    state[slot + M_FLAGS] |= SLOT_RELEASED
    state[slot + M_PGOFF] = RELEASED_PGOFF


@outlined
def release(m, op):
    """RELEASE: a VM's guest_memfd file of an inode is closed. 0; -EBADF if the VM has no slot of it; -EBUSY where Linux
    would wait for the lock.

    virt/kvm/guest_memfd.c:kvm_gmem_release(): the file's slots lose it, their stage-2 leaves go, and guest faults there
    are -EFAULT from then on. A slot stays, over its guest frames, until it is deleted. Memory is the inode's and stays.
    The fast loops know no released slots: from here on the machine is one for `run_designs`.
    """
    state = m.state
    inode = state[op + O_OBJECT]
    if inode >= state[R_INODES] or state[inode_row(inode) + I_OPEN] == U0:
        return stop(state, op, -EBADF)
    node = inode_row(inode)
    bound = False
    for i in range(state[R_MEMSLOTS]):
        bound |= is_bound(state, memslot_row(i), state[op + O_VM], inode)
    if not bound or state[node + I_KIND] != INODE_GUEST_MEMFD:
        return stop(state, op, -EBADF)
    if not lock_exclusive(state, op, node):
        return stop(state, op, -EBUSY)
    for i in range(state[R_MEMSLOTS]):
        if is_bound(state, memslot_row(i), state[op + O_VM], inode):
            release_slot(m, memslot_row(i))
    state[R_FULL] = U1
    unlock(state, op, node)
    return stop(state, op, 0)


@kernel
def refuse_released(m, op):
    """A guest's access to a slot whose file was released: -EFAULT, and True. kvm_gmem_get_pfn() without a file"""
    state = m.state
    slot = find_memslot(state, state[op + O_VM], state[op + O_ADDRESS] >> U12)
    if slot == NONE or state[slot + M_FLAGS] & SLOT_RELEASED == U0:
        return False
    charge_one(m, GUEST_FAULT)
    stop(state, op, -EFAULT)
    return True


@outlined
def close(m, op):
    """The VMM goes, as truncation.close(): 0, -EBADF, or -EBUSY where Linux would wait for the lock."""
    state = m.state
    inode = state[op + O_OBJECT]
    if inode >= state[R_INODES] or state[inode_row(inode) + I_OPEN] == U0:
        return stop(state, op, -EBADF)
    node = inode_row(inode)
    if not lock_exclusive(state, op, node):
        return stop(state, op, -EBUSY)
    leave_inode(m, inode)
    cut(m, inode, U0, ALL)  # mpol_free_shared_policy()
    for block in range(state[node + I_BLOCKS]):
        evict_block(m, inode, block << state[R_ORDER])
    unlock(state, op, node)
    close_inode(m, node)
    return stop(state, op, 0)
