"""Operations around the faults: mappings, bindings, zapping, hole punching, references, end of life.

Each runs as one step. They differ between the designs only through the module that `design` names.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels import pfnmap, restructure
from pgemu_kernels.bits import NONE, U0, U1, U12, U4095
from pgemu_kernels.compile import kernel, outlined
from pgemu_kernels.events import (
    BLOCKS_ZOMBIE,
    PAGE_ZEROED,
    SPTE_CLEARED,
    TLB_FLUSH_VM,
    change,
    charge,
    result,
)
from pgemu_kernels.folio import (
    COMPOUND,
    FLAGS,
    MAPPING,
    PG_HEAD,
    add_references,
    mappings,
    reference_count,
    struct_page,
)
from pgemu_kernels.gmem import (
    begin_range,
    block_row,
    end_range,
    find_memslot,
    flush_vms,
    inode_row,
    lock_exclusive,
    mapping_limits,
    memslot_row,
    overlap,
    unlock,
    vm_row,
    vma_overlap,
    vma_row,
    zap_range,
)
from pgemu_kernels.host import next_vma, reclaim_tables, space_root, unmap_everywhere, unmap_vma_range
from pgemu_kernels.hugetlb import return_to_pool, revive
from pgemu_kernels.layout import (
    A_END,
    A_INODE,
    A_LIVE,
    A_PGOFF,
    A_READ_ONLY,
    A_SPACE,
    A_START,
    A_WORDS,
    B_OUTSTANDING,
    B_PFN,
    B_STATE,
    B_WORDS,
    BLOCK_ABSENT,
    BLOCK_ZOMBIE,
    EBADF,
    EBUSY,
    EEXIST,
    EINVAL,
    ENOENT,
    ENOMEM,
    ENOSPC,
    I_BLOCKS,
    I_OPEN,
    I_PAGES,
    M_BASE_GFN,
    M_INODE,
    M_LIVE,
    M_PAGES,
    M_PGOFF,
    M_VM,
    M_WORDS,
    MEMSLOTS,
    O_ADDRESS,
    O_DETAIL,
    O_FLAGS,
    O_LENGTH,
    O_OBJECT,
    O_OFFSET,
    O_SPACE,
    O_VM,
    PFNMAP,
    R_BLOCK_ROWS,
    R_BLOCKS,
    R_DESIGN,
    R_DONTNEED_FREES_TABLES,
    R_DONTNEED_PFNMAP,
    R_EXTRA_REFERENCES,
    R_INODES,
    R_MEMSLOTS,
    R_ORDER,
    R_POOL_BASE,
    R_POOL_PAGES,
    R_SPACES,
    R_VMAS,
    R_VMS,
    V_PROTECTED,
    V_ROOT,
    VMAS,
    Flag,
)
from pgemu_kernels.memory import zero_contents
from pgemu_kernels.paging import drop_stage2_tree, free_host_tables, zap_stage2
from pgemu_kernels.steps import range_arguments

U = np.uint64
MADVISE = U(Flag.MADVISE)
READ_ONLY = U(Flag.READ_ONLY)
_TASK_SIZE = U(1 << 47)


@kernel
def done(state, op, status):
    result(state, op, np.int64(status))


# --------------------------------------------------------------------------- mappings of a process


@kernel
def free_row(state, count_register, limit, words, live, first):
    """A dead row among those in use, or one more; NONE when the table is full."""
    for i in range(state[count_register]):
        row = first + i * words
        if state[row + live] == U0:
            return row
    i = state[count_register]
    if i >= limit:
        return NONE
    state[count_register] = i + U1
    return first + i * words


@outlined
def mmap(m, op):
    """mmap(MAP_SHARED | MAP_FIXED_NOREPLACE) of an inode's range: 0, -EBADF, -EINVAL, -EEXIST, -ENOMEM."""
    state = m.state
    status = range_arguments(state, op)
    space = state[op + O_SPACE]
    start = state[op + O_ADDRESS]
    end = start + state[op + O_LENGTH]
    if status != 0:
        return done(state, op, status)
    if space >= state[R_SPACES] or start & U4095 != U0 or end > _TASK_SIZE:
        return done(state, op, -EINVAL)
    for i in range(state[R_VMAS]):
        row = vma_row(i)
        if state[row + A_LIVE] != U0 and state[row + A_SPACE] == space:
            if start < state[row + A_END] and state[row + A_START] < end:
                return done(state, op, -EEXIST)
    row = free_row(state, R_VMAS, U(VMAS), U(A_WORDS), A_LIVE, vma_row(U0))
    if row == NONE:
        return done(state, op, -ENOMEM)
    state[row + A_START] = start
    state[row + A_END] = end
    state[row + A_SPACE] = space
    state[row + A_INODE] = state[op + O_OBJECT]
    state[row + A_PGOFF] = state[op + O_OFFSET] >> U12
    state[row + A_READ_ONLY] = U1 if state[op + O_FLAGS] & READ_ONLY != U0 else U0
    state[row + A_LIVE] = U1
    return done(state, op, 0)


@kernel
def remove_vma(state, row):
    state[row + A_LIVE] = U0
    state[row + A_START] = U0
    state[row + A_END] = U0


@outlined
def split_vma(m, row, address):
    """Cut a VMA in two at `address`, which lies inside it: the row of the upper part, or NONE."""
    state = m.state
    upper = free_row(state, R_VMAS, U(VMAS), U(A_WORDS), A_LIVE, vma_row(U0))
    if upper == NONE:
        return NONE
    for word in range(U(A_WORDS)):
        state[upper + word] = state[row + word]
    state[upper + A_START] = address
    state[upper + A_PGOFF] = state[row + A_PGOFF] + ((address - state[row + A_START]) >> U12)
    state[row + A_END] = address
    return upper


@kernel
def unmap_vma(m, row):
    """Drop a whole VMA: its entries, its row, and the tables that no neighbour needs."""
    state = m.state
    space = state[row + A_SPACE]
    start = state[row + A_START]
    end = state[row + A_END]
    unmap_vma_range(m, row, start, end)
    remove_vma(state, row)
    floor, ceiling = mapping_limits(state, space, start, end)
    # A table goes only where its whole span is free of neighbours: floor rounds up, ceiling down.
    free_host_tables(m, space_root(state, space), start >> U12, end >> U12, floor >> U12, ceiling >> U12)


@outlined
def munmap(m, op):
    """munmap(): cut the mappings at the range's ends, drop what lies inside. 0, -EINVAL, -ENOMEM."""
    state = m.state
    space = state[op + O_SPACE]
    start = state[op + O_ADDRESS]
    end = start + state[op + O_LENGTH]
    if (start | state[op + O_LENGTH]) & U4095 != U0 or end <= start or end > _TASK_SIZE:
        return done(state, op, -EINVAL)
    row = next_vma(state, space, start, end)
    while row != NONE:
        if state[row + A_START] < start:
            row = split_vma(m, row, start)
            if row == NONE:
                return done(state, op, -ENOMEM)
        if state[row + A_END] > end and split_vma(m, row, end) == NONE:
            return done(state, op, -ENOMEM)
        unmap_vma(m, row)
        row = next_vma(state, space, start, end)
    return done(state, op, 0)


@kernel
def zap(m, op):
    """Clear a process's entries of a range; the mapping stays. 0, -EINVAL, or -ENOMEM over a hole.

    With MADVISE it is madvise(MADV_DONTNEED): refused with -EINVAL on VM_PFNMAP
    (mm/madvise.c:madvise_dontneed_free_valid_vma(), every version), and from 6.14 on it frees the
    last-level tables it covers whole. Without, it is the kernel's own unmapping.
    """
    state = m.state
    space = state[op + O_SPACE]
    address = state[op + O_ADDRESS]
    end = address + state[op + O_LENGTH]
    if (address | state[op + O_LENGTH]) & U4095 != U0 or end < address:
        return done(state, op, -EINVAL)
    madvise = state[op + O_FLAGS] & MADVISE != U0
    hole = False
    while address < end:
        row = next_vma(state, space, address, end)
        if row == NONE:
            hole = True
            break
        if state[row + A_START] > address:
            hole = True
            address = state[row + A_START]
        if madvise and state[R_DESIGN] == U(PFNMAP) and state[R_DONTNEED_PFNMAP] == U0:
            return done(state, op, -EINVAL)
        last = min(end, state[row + A_END])
        unmap_vma_range(m, row, address, last)
        if madvise and state[R_DONTNEED_FREES_TABLES] != U0 and last - address >= U(2 << 20):
            reclaim_tables(m, space_root(state, space), address >> U12, last >> U12)
        address = last
    return done(state, op, -ENOMEM if hole else 0)


# --------------------------------------------------------------------------- memory slots


@outlined
def bind(m, op):
    """Bind an inode's range to guest frames of a VM: a memory slot with guest_memfd.

    0; -EBADF; -EINVAL for bad alignment, a range past the end, or pages that the VM has bound already;
    -EEXIST for guest frames that a slot holds; -ENOSPC. virt/kvm/guest_memfd.c:kvm_gmem_bind().
    """
    state = m.state
    status = range_arguments(state, op)
    if status != 0:
        return done(state, op, status)
    inode = state[op + O_OBJECT]
    vm = state[op + O_VM]
    pages = state[op + O_LENGTH] >> U12
    pgoff = state[op + O_OFFSET] >> U12
    gfn = state[op + O_ADDRESS] >> U12
    if vm >= state[R_VMS] or state[op + O_ADDRESS] & U4095 != U0:
        return done(state, op, -EINVAL)
    if pgoff + pages > state[inode_row(inode) + I_PAGES]:
        return done(state, op, -EINVAL)
    for i in range(state[R_MEMSLOTS]):
        slot = memslot_row(i)
        if state[slot + M_LIVE] != U0 and state[slot + M_VM] == vm:
            if gfn < state[slot + M_BASE_GFN] + state[slot + M_PAGES] and state[slot + M_BASE_GFN] < gfn + pages:
                return done(state, op, -EEXIST)
            low, high = overlap(state, slot, inode, pgoff, pgoff + pages)
            if low < high:
                return done(state, op, -EINVAL)
    slot = free_row(state, R_MEMSLOTS, U(MEMSLOTS), U(M_WORDS), M_LIVE, memslot_row(U0))
    if slot == NONE:
        return done(state, op, -ENOSPC)
    state[slot + M_BASE_GFN] = gfn
    state[slot + M_PAGES] = pages
    state[slot + M_VM] = vm
    state[slot + M_INODE] = inode
    state[slot + M_PGOFF] = pgoff
    state[slot + M_LIVE] = U1
    return done(state, op, 0)


@outlined
def delete_slot(m, slot):
    """Delete a memory slot. An ordinary VM loses its whole tree (kvm_mmu_zap_all_fast()), a protected one
    only the slot's leaves, as captured."""
    state = m.state
    row = vm_row(state[slot + M_VM])
    if state[row + V_PROTECTED] == U0:
        # The vCPUs reload their root, which flushes.
        if drop_stage2_tree(m, state[row + V_ROOT]) != 0:
            charge(m, TLB_FLUSH_VM, 1)
    else:
        base = state[slot + M_BASE_GFN]
        dropped = zap_stage2(m, state[row + V_ROOT], base, base + state[slot + M_PAGES])
        charge(m, SPTE_CLEARED, dropped)
        if dropped != 0:
            charge(m, TLB_FLUSH_VM, 1)
    state[slot + M_LIVE] = U0
    state[slot + M_PAGES] = U0


@outlined
def unbind(m, op):
    """Delete the memory slot that begins at a guest address: 0 or -ENOENT."""
    state = m.state
    gfn = state[op + O_ADDRESS] >> U12
    slot = find_memslot(state, state[op + O_VM], gfn)
    if slot == NONE or state[slot + M_BASE_GFN] != gfn:
        return done(state, op, -ENOENT)
    delete_slot(m, slot)
    return done(state, op, 0)


# --------------------------------------------------------------------------- hole punching


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
    """fallocate(PUNCH_HOLE): 0; -EBADF; -EINVAL when unaligned; -EAGAIN (restructure) when a merge is impossible.

    Whole huge pages are freed, parts only zeroed; shareability does not change; a hole past the end is
    no error. virt/kvm/guest_memfd.c:kvm_gmem_punch_hole() as in the posted 1G series. Truncation unmaps
    host entries only of folios with a mapcount, so pfnmap unmaps the range itself first.
    """
    state = m.state
    status = range_arguments(state, op)
    if status != 0:
        return done(state, op, status)
    inode = state[op + O_OBJECT]
    node = inode_row(inode)
    start = state[op + O_OFFSET] >> U12
    end = min(start + (state[op + O_LENGTH] >> U12), state[node + I_PAGES])
    if start >= end:
        return done(state, op, 0)
    if not lock_exclusive(state, op, node):
        return done(state, op, -EBUSY)
    if state[R_DESIGN] == U(PFNMAP):
        unmap_everywhere(m, inode, start, end)
    begin_range(m, inode, start, end)
    zap_range(m, inode, start, end, NONE)
    flush_vms(m)
    status = punch_blocks(m, op, inode, start, end)
    end_range(m, inode, start, end)
    unlock(state, op, node)
    return done(state, op, status)


# --------------------------------------------------------------------------- references


@kernel
def folio_head(m, pfn):
    """First frame of the folio that holds `pfn`: the head of an unsplit huge page, else the page itself."""
    page = struct_page(m, pfn)
    if m.ram[page + COMPOUND] & U1 != U0 or m.ram[page + FLAGS] & PG_HEAD != U0:
        return pfn & ~((U1 << m.state[R_ORDER]) - U1)
    return pfn


@outlined
def get(m, op):
    """Take a transient reference on the folio of an inode's page: 0 with the frame number, or -ENOENT."""
    state = m.state
    inode = state[op + O_OBJECT]
    if inode >= state[R_INODES] or state[op + O_OFFSET] >> U12 >= state[inode_row(inode) + I_PAGES]:
        return done(state, op, -EBADF)
    index = state[op + O_OFFSET] >> U12
    block = block_row(m, inode_row(inode), index)
    kind = m.state[block + B_STATE]
    if kind == BLOCK_ABSENT or kind == BLOCK_ZOMBIE:
        return done(state, op, -ENOENT)
    pfn = m.state[block + B_PFN] + (index & ((U1 << state[R_ORDER]) - U1))
    add_references(m.ram, struct_page(m, folio_head(m, pfn)), U1)
    state[R_EXTRA_REFERENCES] += U1
    state[op + O_DETAIL] = pfn
    return done(state, op, 0)


@kernel
def zombie_of(m, head):
    """Row of the zombie block with this first frame, or NONE."""
    for i in range(m.state[R_BLOCKS]):
        row = m.state[R_BLOCK_ROWS] + i * U(B_WORDS)
        if m.state[row + B_STATE] == BLOCK_ZOMBIE and m.state[row + B_PFN] == head:
            return row
    return NONE


@outlined
def put(m, op):
    """Drop a transient reference: 0, or -ENOENT. The page is named by inode and offset, or by address << 12.

    The last reference of a folio outside the page cache sends it (a zombie block: with all its pieces)
    back to the pool.
    """
    state = m.state
    order = state[R_ORDER]
    if state[op + O_ADDRESS] != U0:
        pfn = state[op + O_ADDRESS] >> U12
        if pfn - state[R_POOL_BASE] >= state[R_POOL_PAGES] << order:
            return done(state, op, -ENOENT)
    else:
        inode = state[op + O_OBJECT]
        index = state[op + O_OFFSET] >> U12
        if inode >= state[R_INODES] or index >= state[inode_row(inode) + I_PAGES]:
            return done(state, op, -EBADF)
        pfn = m.state[block_row(m, inode_row(inode), index) + B_PFN]
        if pfn == U0:
            return done(state, op, -ENOENT)
        pfn += index & ((U1 << order) - U1)
    head = folio_head(m, pfn)
    page = struct_page(m, head)
    cached = U0
    if m.ram[page + MAPPING] != U0:
        cached = U1 << order if m.ram[page + FLAGS] & PG_HEAD != U0 else U1
    if reference_count(m.ram, page) <= cached + mappings(m.ram, page):
        return done(state, op, -ENOENT)
    add_references(m.ram, page, ~U0)
    state[R_EXTRA_REFERENCES] -= U1
    if cached == U0 and reference_count(m.ram, page) == U0:
        last_reference(m, head, page)
    return done(state, op, 0)


@outlined
def last_reference(m, head, page):
    """Nobody holds this folio any more, and the page cache let it go before."""
    if m.ram[page + FLAGS] & PG_HEAD != U0:
        change(m.stats, BLOCKS_ZOMBIE, -1)
        return_to_pool(m, head)
        return
    block = zombie_of(m, head >> m.state[R_ORDER] << m.state[R_ORDER])
    m.state[block + B_OUTSTANDING] -= U1
    if m.state[block + B_OUTSTANDING] == U0:
        revive(m, block)


# --------------------------------------------------------------------------- end of life


@outlined
def close(m, op):
    """The VMM goes: mappings of the inode, its memory slots, then the inode itself. 0 or -EBADF.

    exit_mmap(), then virt/kvm/guest_memfd.c:kvm_gmem_release() and the inode's eviction.
    """
    state = m.state
    inode = state[op + O_OBJECT]
    if inode >= state[R_INODES] or state[inode_row(inode) + I_OPEN] == U0:
        return done(state, op, -EBADF)
    node = inode_row(inode)
    if not lock_exclusive(state, op, node):
        return done(state, op, -EBUSY)
    for i in range(state[R_VMAS]):
        row = vma_row(i)
        first, last = vma_overlap(state, row, inode, U0, state[node + I_PAGES])
        if first < last:
            unmap_vma(m, row)
    for i in range(state[R_MEMSLOTS]):
        slot = memslot_row(i)
        if state[slot + M_LIVE] != U0 and state[slot + M_INODE] == inode:
            delete_slot(m, slot)
    for block in range(state[node + I_BLOCKS]):
        if state[R_DESIGN] == U(PFNMAP):
            pfnmap.evict_block(m, inode, block << state[R_ORDER])
        else:
            restructure.evict_block(m, inode, block << state[R_ORDER])
    unlock(state, op, node)
    state[node + I_OPEN] = U0
    return done(state, op, 0)
