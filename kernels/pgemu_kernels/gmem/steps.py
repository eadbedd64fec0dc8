"""Steps that both designs take: each does one thing, hands over through the record, and says what follows.

A step gets the machine and where the actor's record begins. It returns GO, STOP (the result is in the
record) or BLOCKED (another actor holds a lock; nothing was done). What is not stepped cannot wait: it ends
with the result in the record, a retry for faults and -EBUSY, where Linux would sleep, for conversions.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U12
from pgemu_kernels.engine.charge import (
    ATTRIBUTES_STORED,
    GUEST_FAULT,
    HOST_FAULT,
    SPTE_WRITTEN,
    TLB_FLUSH_VM,
    charge_one,
    result,
)
from pgemu_kernels.engine.compile import kernel
from pgemu_kernels.engine.frames import frames_left
from pgemu_kernels.engine.rows import (
    broken,
    find_memslot,
    find_vma,
    inode_row,
    lock_exclusive,
    lock_shared,
    range_arguments,
    space_root,
    stop,
    unlock,
    vm_row,
)
from pgemu_kernels.engine.shareability import is_shared, shared_in_range, store_shareability
from pgemu_kernels.process.zapping import unmap_mapping_range
from pgemu_kernels.stage2.invalidate import begin_range, end_range, flush_vms, retry_fault, zap_range
from pgemu_kernels.stage2.leaves import MAP_FIXED, MAP_NO_MEMORY, MAP_SPURIOUS, map_stage2
from pgemu_kernels.tables.walker import find_leaf, host_format, stage2_format
from pgemu_kernels.words.operations import (
    BLOCKED,
    EBUSY,
    EFAULT,
    EINVAL,
    ENOMEM,
    GO,
    RET_PF_EMULATE,
    RET_PF_FIXED,
    RET_PF_RETRY,
    RET_PF_SPURIOUS,
    STOP,
    VM_FAULT_RETRY,
    VM_FAULT_SIGBUS,
    VM_FAULT_SIGSEGV,
    Broken,
    Flag,
)
from pgemu_kernels.words.registers import R_ORDER, R_ZAP_BOTH_KINDS
from pgemu_kernels.words.rows import (
    A_END,
    A_INODE,
    A_PGOFF,
    A_READ_ONLY,
    A_SPACE,
    A_START,
    I_PAGES,
    M_BASE_GFN,
    M_INODE,
    M_PGOFF,
    O_ADDRESS,
    O_DETAIL,
    O_END,
    O_FLAGS,
    O_INDEX,
    O_INODE,
    O_LENGTH,
    O_OBJECT,
    O_OFFSET,
    O_PFN,
    O_ROUND_END,
    O_ROUND_START,
    O_ROW,
    O_SEQUENCE,
    O_SPACE,
    O_START,
    O_TO_PRIVATE,
    O_VM,
    V_ROOT,
    V_SEQUENCE,
)

U = np.uint64
WRITE = U(Flag.WRITE)
PRIVATE = U(Flag.PRIVATE)
SHARED = U(Flag.SHARED)
_WRONG_PFN = U(Broken.WRONG_PFN)


@kernel
def fault_begin(m, op):
    """Host access: find the VMA and the entry; if there is none it is a fault, with the invalidate_lock for reading.

    mm/memory.c:handle_pte_fault() up to ->fault. An access whose entry is present returns 0 and costs
    nothing: no fault happens.
    """
    state = m.state
    address = state[op + O_ADDRESS]
    row = find_vma(state, state[op + O_SPACE], address)
    if row == NONE or (state[op + O_FLAGS] & WRITE != U0 and state[row + A_READ_ONLY] != U0):
        charge_one(m, HOST_FAULT)
        return stop(state, op, VM_FAULT_SIGSEGV)
    slot, level = find_leaf(m, host_format(m), space_root(state, state[op + O_SPACE]), address >> U12)
    if slot != NONE:
        state[op + O_DETAIL] = level
        return stop(state, op, 0)
    inode = state[row + A_INODE]
    node = inode_row(inode)
    index = state[row + A_PGOFF] + ((address - state[row + A_START]) >> U12)
    if index >= state[node + I_PAGES]:
        charge_one(m, HOST_FAULT)
        return stop(state, op, VM_FAULT_SIGBUS)
    if not lock_shared(state, op, node):
        result(state, op, np.int64(VM_FAULT_RETRY))
        return BLOCKED
    charge_one(m, HOST_FAULT)
    state[op + O_ROW] = row
    state[op + O_INODE] = inode
    state[op + O_INDEX] = index
    return GO


@kernel
def guest_begin(m, op):
    """Guest access: slot, leaf, private or shared, invalidate sequence; then the invalidate_lock for reading.

    arch/x86/kvm/mmu/mmu.c:kvm_mmu_faultin_pfn(). An access whose leaf is present is spurious at most and
    costs nothing: the guest would not exit. Without a slot a device is emulated. An access of the wrong
    kind is a memory fault exit (-EFAULT), leaf or not (page_fault_can_be_fast()).
    """
    state = m.state
    vm = state[op + O_VM]
    gfn = state[op + O_ADDRESS] >> U12
    slot = find_memslot(state, vm, gfn)
    if slot == NONE:
        charge_one(m, GUEST_FAULT)
        return stop(state, op, RET_PF_EMULATE)
    row = vm_row(vm)
    inode = state[slot + M_INODE]
    node = inode_row(inode)
    index = gfn - state[slot + M_BASE_GFN] + state[slot + M_PGOFF]
    kind = state[op + O_FLAGS] & (PRIVATE | SHARED)
    if kind != U0 and kind != (SHARED if is_shared(m, node, index) != U0 else PRIVATE):
        charge_one(m, GUEST_FAULT)
        return stop(state, op, -EFAULT)
    leaf, level = find_leaf(m, stage2_format(m), state[row + V_ROOT], gfn)
    if leaf != NONE:
        state[op + O_DETAIL] = level
        return stop(state, op, RET_PF_SPURIOUS)
    sequence = state[row + V_SEQUENCE]
    if retry_fault(state, vm, gfn, sequence):
        charge_one(m, GUEST_FAULT)
        return stop(state, op, RET_PF_RETRY)
    if not lock_shared(state, op, node):
        result(state, op, np.int64(RET_PF_RETRY))
        return BLOCKED
    charge_one(m, GUEST_FAULT)
    state[op + O_SEQUENCE] = sequence
    state[op + O_ROW] = slot
    state[op + O_INODE] = inode
    state[op + O_INDEX] = index
    return GO


@kernel
def install_stage2(m, op, level):
    """Map the fault's frame at `level`, unless an invalidation came between: kvm_tdp_mmu_page_fault()."""
    state = m.state
    vm = state[op + O_VM]
    gfn = state[op + O_ADDRESS] >> U12
    if retry_fault(state, vm, gfn, state[op + O_SEQUENCE]):
        return stop(state, op, RET_PF_RETRY)
    inside = (U1 << (U(9) * (level - U1))) - U1
    outcome, table_replaced = map_stage2(
        m, state[vm_row(vm) + V_ROOT], gfn & ~inside, level, state[op + O_PFN] & ~inside
    )
    if outcome == MAP_NO_MEMORY:
        return stop(state, op, -ENOMEM)
    state[op + O_DETAIL] = level
    if outcome == MAP_FIXED:
        charge_one(m, SPTE_WRITTEN)
        if table_replaced:
            charge_one(m, TLB_FLUSH_VM)
        return stop(state, op, RET_PF_FIXED)
    if outcome == MAP_SPURIOUS:
        return stop(state, op, RET_PF_SPURIOUS)
    # KVM would BUG() here: a leaf of another frame was left behind by somebody.
    broken(state, _WRONG_PFN, state[op + O_INDEX])
    return stop(state, op, -EFAULT)


@kernel
def still_mapped(state, op):
    """Whether the VMA that a host fault found is still there: mmap_lock would have kept it."""
    row = state[op + O_ROW]
    address = state[op + O_ADDRESS]
    here = state[row + A_START] <= address < state[row + A_END]
    return here and state[row + A_SPACE] == state[op + O_SPACE] and state[row + A_INODE] == state[op + O_INODE]


# --------------------------------------------------------------------------- conversion


@kernel
def convert_prepare(m, op, rounded, preallocates):
    """Check the arguments, take the invalidate_lock for writing, see whether anything is to be done.

    virt/kvm/guest_memfd.c, the attribute ioctl of the in-place series. `rounded` rounds the range that
    is invalidated and zapped out to huge pages. `preallocates`: Linux preallocates the nodes of its attribute
    tree here, and without a frame that fails, at the range's start (inference: they come from a slab page). A bit
    per page needs none.
    """
    state = m.state
    status = range_arguments(state, op)
    if status != 0:
        return stop(state, op, status)
    inode = state[op + O_OBJECT]
    node = inode_row(inode)
    start = state[op + O_OFFSET] >> U12
    end = start + (state[op + O_LENGTH] >> U12)
    kind = state[op + O_FLAGS] & (PRIVATE | SHARED)
    if end > state[node + I_PAGES] or kind == U0 or kind == PRIVATE | SHARED:
        return stop(state, op, -EINVAL)
    if not lock_exclusive(state, op, node):
        result(state, op, np.int64(-EBUSY))
        return BLOCKED
    shared = shared_in_range(m, node, start, end)
    to_private = kind == PRIVATE
    if (to_private and shared == U0) or (not to_private and shared == end - start):
        unlock(state, op, node)
        return stop(state, op, 0)
    if preallocates and frames_left(m) == U0:
        unlock(state, op, node)
        state[op + O_DETAIL] = start << U12
        return stop(state, op, -ENOMEM)
    result(state, op, np.int64(0))
    state[op + O_INODE] = inode
    state[op + O_TO_PRIVATE] = U1 if to_private else U0
    state[op + O_START] = start
    state[op + O_END] = end
    inside = (U1 << state[R_ORDER]) - U1 if rounded else U0
    state[op + O_ROUND_START] = start & ~inside
    state[op + O_ROUND_END] = min((end + inside) & ~inside, state[node + I_PAGES])
    return GO


@kernel
def unmap_host(m, op):
    """Unmap the range from every process: mm/memory.c:unmap_mapping_pages()."""
    state = m.state
    unmap_mapping_range(m, state[op + O_INODE], state[op + O_START], state[op + O_END])
    return GO


@kernel
def convert_invalidate_begin(m, op):
    state = m.state
    begin_range(m, state[op + O_INODE], state[op + O_ROUND_START], state[op + O_ROUND_END])
    return GO


@kernel
def convert_zap(m, op):
    """Drop the leaves of the range, rounded as the design has it, from stage 2; the point of no return."""
    zap_kind(m, op, m.state[op + O_ROUND_START], m.state[op + O_ROUND_END])
    return GO


@kernel
def zap_kind(m, op, start, end):
    """Drop the leaves over pages [start, end) from stage 2.

    Where private and shared pages share one root (all but TDX), kvm_tdp_mmu_unmap_gfn_range() cannot
    tell them apart, so a rounded zap drops both kinds. That the rounding reaches the zap at all, and
    not only begin and end, is inference; R_ZAP_BOTH_KINDS = 0 drops only pages of the kind being left.
    """
    state = m.state
    inode = state[op + O_INODE]
    dropped = np.int64(0)
    if state[R_ZAP_BOTH_KINDS] != U0:
        dropped = zap_range(m, inode, start, end)
    else:
        node = inode_row(inode)
        leaving = state[op + O_TO_PRIVATE]
        first = start
        while first < end:
            last = first
            while last < end and is_shared(m, node, last) == leaving:
                last += U1
            if first < last:
                dropped += zap_range(m, inode, first, last)
            first = last + U1
    if dropped != 0:
        flush_vms(m)


@kernel
def store_attributes(m, op):
    """Record the new shareability; cannot fail."""
    state = m.state
    shared = U1 - state[op + O_TO_PRIVATE]
    store_shareability(m, inode_row(state[op + O_INODE]), state[op + O_START], state[op + O_END], shared)
    charge_one(m, ATTRIBUTES_STORED)
    return GO


@kernel
def convert_invalidate_end(m, op):
    state = m.state
    end_range(m, state[op + O_INODE], state[op + O_ROUND_START], state[op + O_ROUND_END])
    return GO


@kernel
def convert_finish(m, op):
    """Unlock and return what the record says."""
    unlock(m.state, op, inode_row(m.state[op + O_INODE]))
    return STOP


@kernel
def fail_at(state, op, status, index):
    """End a conversion with an error at a page: its offset is max(start, page), as the ioctl writes it back."""
    state[op + O_DETAIL] = max(index, state[op + O_START]) << U12
    result(state, op, np.int64(status))
    unlock(state, op, inode_row(state[op + O_INODE]))
    return STOP
