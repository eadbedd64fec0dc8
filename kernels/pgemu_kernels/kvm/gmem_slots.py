"""Memory slots: bindings of an inode's range to guest frames of a VM."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U12, U4095
from pgemu_kernels.engine.charge import SPTE_CLEARED, TLB_FLUSH_VM, charge, charge_one
from pgemu_kernels.engine.compile import outlined
from pgemu_kernels.engine.rows import (
    find_memslot,
    free_row,
    inode_row,
    lock_exclusive,
    memslot_row,
    overlap,
    range_arguments,
    stop,
    unlock,
    vm_row,
)
from pgemu_kernels.stage2.leaves import drop_stage2_tree, zap_stage2
from pgemu_kernels.words.operations import EBADF, EBUSY, EEXIST, EINVAL, ENOENT, ENOSPC
from pgemu_kernels.words.registers import R_MEMSLOTS, R_VMS
from pgemu_kernels.words.rows import (
    I_FLAGS,
    I_PAGES,
    INODE_BIND_COMMITS,
    M_BASE_GFN,
    M_FLAGS,
    M_INODE,
    M_LIVE,
    M_PAGES,
    M_PGOFF,
    M_VM,
    M_WORDS,
    MEMSLOTS,
    O_ADDRESS,
    O_LENGTH,
    O_OBJECT,
    O_OFFSET,
    O_VM,
    V_PROTECTED,
    V_ROOT,
    V_SEQUENCE,
)

U = np.uint64
_GUEST_FRAMES = U(1 << 36)  # what four levels of stage 2 reach: 48 bits


@outlined
def bind(m, op):
    """Bind an inode's range to guest frames of a VM: a memory slot with guest_memfd.

    0; -EBADF; -EINVAL for bad alignment, a range past the file's end or past 48 bits of guest address,
    or pages that the VM has bound already;
    -EEXIST for guest frames that a slot holds, and in linux-next (prepare, then commit) for pages bound already;
    -ENOSPC; -EBUSY where Linux would wait for the lock.
    virt/kvm/guest_memfd.c:kvm_gmem_bind().
    """
    state = m.state
    status = range_arguments(state, op)
    inode = state[op + O_OBJECT]
    vm = state[op + O_VM]
    pages = state[op + O_LENGTH] >> U12
    pgoff = state[op + O_OFFSET] >> U12
    gfn = state[op + O_ADDRESS] >> U12
    if vm >= state[R_VMS] or state[op + O_ADDRESS] & U4095 != U0:
        return stop(state, op, -EINVAL)
    if state[vm_row(vm) + V_ROOT] == U0:
        return stop(state, op, -EBADF)  # the VM was closed
    if gfn >= _GUEST_FRAMES or pages > _GUEST_FRAMES - gfn:
        return stop(state, op, -EINVAL)
    if status == -EINVAL:
        return stop(state, op, status)
    # kvm_set_memory_region() looks at guest frames before kvm_gmem_bind() looks at the file.
    bound = False
    for i in range(state[R_MEMSLOTS]):
        slot = memslot_row(i)
        if state[slot + M_LIVE] != U0 and state[slot + M_VM] == vm:
            if gfn < state[slot + M_BASE_GFN] + state[slot + M_PAGES] and state[slot + M_BASE_GFN] < gfn + pages:
                return stop(state, op, -EEXIST)
            low, high = overlap(state, slot, inode, pgoff, pgoff + pages)
            bound |= low < high
    if status != 0:
        return stop(state, op, status)
    if bound and state[inode_row(inode) + I_FLAGS] & INODE_BIND_COMMITS != U0:
        return stop(state, op, -EEXIST)
    if bound or pgoff + pages > state[inode_row(inode) + I_PAGES]:
        return stop(state, op, -EINVAL)
    if not lock_exclusive(state, op, inode_row(inode)):
        return stop(state, op, -EBUSY)
    unlock(state, op, inode_row(inode))  # held while the binding is stored: nothing runs in between
    slot = free_row(state, R_MEMSLOTS, U(MEMSLOTS), U(M_WORDS), M_LIVE, memslot_row(U0))
    if slot == NONE:
        return stop(state, op, -ENOSPC)
    state[slot + M_BASE_GFN] = gfn
    state[slot + M_PAGES] = pages
    state[slot + M_VM] = vm
    state[slot + M_INODE] = inode
    state[slot + M_PGOFF] = pgoff
    state[slot + M_LIVE] = U1
    return stop(state, op, 0)


@outlined
def delete_slot(m, slot):
    """Delete a memory slot. An ordinary VM loses its whole tree (kvm_mmu_zap_all_fast()), a protected one
    only the slot's leaves, as captured."""
    state = m.state
    row = vm_row(state[slot + M_VM])
    # A fault under way must not install what it looked up: is_page_fault_stale().
    state[row + V_SEQUENCE] += U1
    if state[row + V_PROTECTED] == U0:
        # The vCPUs reload their root, which flushes.
        if drop_stage2_tree(m, state[row + V_ROOT]) != 0:
            charge_one(m, TLB_FLUSH_VM)
    else:
        base = state[slot + M_BASE_GFN]
        dropped = zap_stage2(m, state[row + V_ROOT], base, base + state[slot + M_PAGES])
        charge(m, SPTE_CLEARED, dropped)
        if dropped != 0:
            charge_one(m, TLB_FLUSH_VM)
    state[slot + M_LIVE] = U0
    state[slot + M_PAGES] = U0
    state[slot + M_FLAGS] = U0


@outlined
def unbind(m, op):
    """Delete the memory slot that begins at a guest address: 0, -ENOENT, or -EBUSY where Linux would wait."""
    state = m.state
    gfn = state[op + O_ADDRESS] >> U12
    slot = find_memslot(state, state[op + O_VM], gfn)
    if slot == NONE or state[slot + M_BASE_GFN] != gfn:
        return stop(state, op, -ENOENT)
    node = inode_row(state[slot + M_INODE])
    if not lock_exclusive(state, op, node):
        return stop(state, op, -EBUSY)
    delete_slot(m, slot)
    unlock(state, op, node)
    return stop(state, op, 0)
