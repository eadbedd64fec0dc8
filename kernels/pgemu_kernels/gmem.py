"""guest_memfd inodes: shareability, bindings, mappings, and the invalidate protocol.

What both designs share. Ranges are page numbers of the inode; `node` is where an inode's row begins.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.bits import ALL, NONE, U0, U1, U2, U3, U6, U9, U12, U18, U63, U64, U511, population
from pgemu_kernels.compile import kernel, outlined
from pgemu_kernels.events import NOTIFIER_CALL, SPTE_CLEARED, TLB_FLUSH_VM, charge, charge_one
from pgemu_kernels.layout import (
    A_END,
    A_INODE,
    A_LIVE,
    A_PGOFF,
    A_SPACE,
    A_START,
    A_WORDS,
    B_WORDS,
    I_BLOCK,
    I_LOCK,
    I_PMD,
    I_PUD,
    I_WORD,
    I_WORDS,
    LOCK_WRITER,
    M_BASE_GFN,
    M_INODE,
    M_PAGES,
    M_PGOFF,
    M_VM,
    M_WORDS,
    O_LOCKED,
    R_FLUSHES_HELD,
    R_LAST_MEMSLOT,
    R_LAST_VMA,
    R_MEMSLOTS,
    R_NOTIFIER,
    R_ORDER,
    R_VMAS,
    R_VMS,
    STATE_INODES,
    STATE_MEMSLOTS,
    STATE_VMAS,
    STATE_VMS,
    V_IN_PROGRESS,
    V_RANGE_END,
    V_RANGE_START,
    V_ROOT,
    V_SEQUENCE,
    V_SPACE,
    V_UNFLUSHED,
    V_WORDS,
)
from pgemu_kernels.paging import zap_stage2

U = np.uint64
_I_WORDS = U(I_WORDS)
_A_WORDS = U(A_WORDS)
_M_WORDS = U(M_WORDS)
_V_WORDS = U(V_WORDS)
_B_WORDS = U(B_WORDS)


@kernel
def inode_row(inode):
    return STATE_INODES + inode * _I_WORDS


@kernel
def vm_row(vm):
    return STATE_VMS + vm * _V_WORDS


@kernel
def vma_row(i):
    return STATE_VMAS + i * _A_WORDS


@kernel
def memslot_row(i):
    return STATE_MEMSLOTS + i * _M_WORDS


@kernel
def block_row(m, node, index):
    """Where the row of the block that holds page `index` begins in `state`."""
    return m.state[node + I_BLOCK] + (index >> m.state[R_ORDER]) * _B_WORDS


# --------------------------------------------------------------------------- rows


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


# --------------------------------------------------------------------------- lookups


@kernel
def find_vma(state, space, address):
    """Row of the VMA of a process that holds a virtual address, or NONE."""
    row = state[R_LAST_VMA]
    if state[row + A_START] <= address < state[row + A_END] and state[row + A_SPACE] == space:
        return row
    for i in range(state[R_VMAS]):
        row = vma_row(i)
        if state[row + A_START] <= address < state[row + A_END] and state[row + A_SPACE] == space:
            state[R_LAST_VMA] = row
            return row
    return NONE


@kernel
def find_memslot(state, vm, gfn):
    """Row of the memory slot of a VM that holds a guest frame, or NONE."""
    row = state[R_LAST_MEMSLOT]
    if gfn - state[row + M_BASE_GFN] < state[row + M_PAGES] and state[row + M_VM] == vm:
        return row
    for i in range(state[R_MEMSLOTS]):
        row = memslot_row(i)
        if gfn - state[row + M_BASE_GFN] < state[row + M_PAGES] and state[row + M_VM] == vm:
            state[R_LAST_MEMSLOT] = row
            return row
    return NONE


# --------------------------------------------------------------------------- shareability


@kernel
def is_shared(m, node, index):
    """1 if a page of the inode is shared, 0 if private."""
    return m.state[m.state[node + I_WORD] + (index >> U6)] >> (index & U63) & U1


@kernel
def shared_in_2m(m, node, index):
    return U(m.counts[m.state[node + I_PMD] + (index >> U9)])


@kernel
def shared_in_1g(m, node, index):
    return U(m.counts[m.state[node + I_PUD] + (index >> U18)])


@kernel
def shared_in_block(m, node, index):
    """Shared pages in the huge page that holds `index`, or 1 if a 4K page is shared."""
    if m.state[R_ORDER] == U9:
        return shared_in_2m(m, node, index)
    if m.state[R_ORDER] == U0:
        return is_shared(m, node, index)
    return shared_in_1g(m, node, index)


@kernel
def is_uniform(m, node, index, level):
    """Whether all pages of the aligned block of `level` around `index` have the same shareability."""
    if level == U1:
        return True
    if level == U2:
        shared = shared_in_2m(m, node, index)
        return shared == U0 or shared == U(512)
    shared = shared_in_1g(m, node, index)
    return shared == U0 or shared == U(1 << 18)


@kernel
def bits_between(first, last):
    """A word with bits [first, last) set; 0 <= first < last <= 64."""
    return (ALL << first) & (ALL >> (U64 - last))


@kernel
def shared_in_range(m, node, start, end):
    """Shared pages in [start, end). Whole 2M blocks are counted by their count."""
    total = U0
    word = m.state[node + I_WORD]
    index = start
    while index < end:
        if index & U511 == U0 and end - index >= U(512):
            total += shared_in_2m(m, node, index)
            index += U(512)
        else:
            last = min(U64, (index & U63) + end - index)
            total += population(m.state[word + (index >> U6)] & bits_between(index & U63, last))
            index += last - (index & U63)
    return total


@kernel
def store_shareability(m, node, start, end, shared):
    """Make pages [start, end) shared (1) or private (0), and keep the counts per 2M and 1G."""
    word = m.state[node + I_WORD]
    pmd = m.state[node + I_PMD]
    pud = m.state[node + I_PUD]
    index = start
    while index < end:
        last = min(U64, (index & U63) + end - index)
        mask = bits_between(index & U63, last)
        at = word + (index >> U6)
        old = m.state[at]
        new = old | mask if shared != U0 else old & ~mask
        m.state[at] = new
        gained = population(new) - population(old)
        m.counts[pmd + (index >> U9)] = np.uint32(U(m.counts[pmd + (index >> U9)]) + gained)
        m.counts[pud + (index >> U18)] = np.uint32(U(m.counts[pud + (index >> U18)]) + gained)
        index += last - (index & U63)


# --------------------------------------------------------------------------- levels


@kernel
def largest_level(state):
    """The level of the inodes' pages: 3, 2 or (4K pages) 1."""
    order = state[R_ORDER]
    if order > U9:
        return U3
    return U2 if order == U9 else U1


@kernel
def slot_allows(state, slot, gfn, level):
    """Whether a memory slot permits a leaf of `level` 2 or 3 at `gfn`.

    The aligned block must lie inside the slot, and guest frame and file offset must agree modulo its
    size: the disallow_lpage counts of arch/x86/kvm/x86.c:kvm_alloc_memslot_metadata().
    """
    pages = U1 << (U9 * (level - U1))
    base = state[slot + M_BASE_GFN]
    first = gfn & ~(pages - U1)
    if (base - state[slot + M_PGOFF]) & (pages - U1) != U0:
        return False
    return first >= base and first + pages <= base + state[slot + M_PAGES]


# --------------------------------------------------------------------------- invalidate_lock


@kernel
def lock_shared(state, op, node):
    """Take the inode's invalidate_lock for reading; False if a writer holds it."""
    if state[node + I_LOCK] >= LOCK_WRITER:
        return False
    state[node + I_LOCK] += U1
    state[op + O_LOCKED] = U1
    return True


@kernel
def lock_exclusive(state, op, node):
    """Take it for writing; False if anybody else holds it."""
    if state[node + I_LOCK] != U0:
        return False
    state[node + I_LOCK] = LOCK_WRITER
    state[op + O_LOCKED] = U2
    return True


@kernel
def unlock(state, op, node):
    """Release what the operation holds of the lock, if anything."""
    held = state[op + O_LOCKED]
    if held == U1:
        state[node + I_LOCK] -= U1
    elif held == U2:
        state[node + I_LOCK] = U0
    state[op + O_LOCKED] = U0


# --------------------------------------------------------------------------- invalidate protocol


@kernel
def overlap(state, slot, inode, start, end):
    """Guest frames of a memory slot that stand for pages [start, end) of an inode: (first, last), or (0, 0).

    A deleted slot has no pages.
    """
    if state[slot + M_INODE] != inode:
        return U0, U0
    pgoff = state[slot + M_PGOFF]
    low = max(start, pgoff)
    high = min(end, pgoff + state[slot + M_PAGES])
    if low >= high:
        return U0, U0
    shift = state[slot + M_BASE_GFN] - pgoff
    return low + shift, high + shift


@kernel
def invalidate_begin(state, vm, gfn, end):
    """virt/kvm/kvm_main.c:kvm_mmu_invalidate_begin(), kvm_mmu_invalidate_range_add()."""
    row = vm_row(vm)
    if state[row + V_IN_PROGRESS] == U0:
        state[row + V_RANGE_START] = gfn
        state[row + V_RANGE_END] = end
    else:
        state[row + V_RANGE_START] = min(state[row + V_RANGE_START], gfn)
        state[row + V_RANGE_END] = max(state[row + V_RANGE_END], end)
    state[row + V_IN_PROGRESS] += U1


@kernel
def invalidate_end(state, vm):
    """kvm_mmu_invalidate_end(): the sequence moves before the count falls."""
    row = vm_row(vm)
    state[row + V_SEQUENCE] += U1
    state[row + V_IN_PROGRESS] -= U1


@kernel
def begin_range(m, inode, start, end):
    """Begin an invalidation of pages [start, end) in every VM bound to them."""
    state = m.state
    for i in range(state[R_MEMSLOTS]):
        slot = memslot_row(i)
        gfn, last = overlap(state, slot, inode, start, end)
        if gfn < last:
            invalidate_begin(state, state[slot + M_VM], gfn, last)


@kernel
def end_range(m, inode, start, end):
    """End it, with the bindings that `begin_range` saw: the invalidate_lock keeps them."""
    state = m.state
    for i in range(state[R_MEMSLOTS]):
        slot = memslot_row(i)
        gfn, last = overlap(state, slot, inode, start, end)
        if gfn < last:
            invalidate_end(state, state[slot + M_VM])


@kernel
def zap_slot(m, slot, gfn, end):
    """Drop the stage-2 leaves over guest frames [gfn, end) of a memory slot, to be flushed: how many."""
    row = vm_row(m.state[slot + M_VM])
    dropped = zap_stage2(m, m.state[row + V_ROOT], gfn, end)
    if dropped != 0:
        m.state[row + V_UNFLUSHED] += U(dropped)
        charge(m, SPTE_CLEARED, dropped)
    return dropped


@kernel
def zap_range(m, inode, start, end):
    """Drop the stage-2 leaves over pages [start, end) in every VM bound to them, to be flushed: how many."""
    state = m.state
    total = np.int64(0)
    for i in range(state[R_MEMSLOTS]):
        slot = memslot_row(i)
        gfn, last = overlap(state, slot, inode, start, end)
        if gfn < last:
            total += zap_slot(m, slot, gfn, last)
    return total


@kernel
def flush_vms(m):
    """kvm_flush_remote_tlbs() for every VM that lost leaves since its last flush.

    On x86 a flush is always of the whole VM: there is no range to pass on.
    """
    state = m.state
    if state[R_FLUSHES_HELD] != U0:
        return
    for vm in range(state[R_VMS]):
        row = vm_row(vm)
        if state[row + V_UNFLUSHED] != U0:
            state[row + V_UNFLUSHED] = U0
            charge_one(m, TLB_FLUSH_VM)


@kernel
def notify_unmap(m, space, inode, start, end):
    """KVM's MMU notifier: the process unmapped pages [start, end), so its VMs drop them from stage 2.

    virt/kvm/kvm_main.c:kvm_mmu_notifier_invalidate_range_start(). As captured for a guest_memfd mapped
    by its VMM: MADV_DONTNEED drops the stage-2 leaves too.
    """
    state = m.state
    if state[R_NOTIFIER] == U0:
        return
    for vm in range(state[R_VMS]):
        if state[vm_row(vm) + V_SPACE] == space:
            charge_one(m, NOTIFIER_CALL)
    dropped = np.int64(0)
    for i in range(state[R_MEMSLOTS]):
        slot = memslot_row(i)
        gfn, last = overlap(state, slot, inode, start, end)
        if gfn < last and state[vm_row(state[slot + M_VM]) + V_SPACE] == space:
            # The invalidation begins and ends here: nothing runs in between.
            state[vm_row(state[slot + M_VM]) + V_SEQUENCE] += U1
            dropped += zap_slot(m, slot, gfn, last)
    if dropped != 0:
        flush_vms(m)


@kernel
def retry_fault(state, vm, gfn, sequence):
    """include/linux/kvm_host.h:mmu_invalidate_retry_gfn()."""
    row = vm_row(vm)
    if state[row + V_IN_PROGRESS] != U0 and state[row + V_RANGE_START] <= gfn < state[row + V_RANGE_END]:
        return True
    return state[row + V_SEQUENCE] != sequence


# --------------------------------------------------------------------------- other mappings of a process


@outlined
def mapping_limits(state, space, start, end):
    """Where the neighbours of [start, end) end and begin in a process, as virtual addresses.

    They are the floor and ceiling of free_pgtables().
    """
    floor = U0
    ceiling = U1 << U(47)
    for i in range(state[R_VMAS]):
        row = vma_row(i)
        if state[row + A_LIVE] != U0 and state[row + A_SPACE] == space:
            if state[row + A_END] <= start:
                floor = max(floor, state[row + A_END])
            elif state[row + A_START] >= end:
                ceiling = min(ceiling, state[row + A_START])
    return floor, ceiling


@kernel
def vma_overlap(state, row, inode, start, end):
    """Virtual addresses at which a VMA shows pages [start, end) of an inode: (first, last), or (0, 0).

    A removed VMA is empty.
    """
    if state[row + A_INODE] != inode:
        return U0, U0
    pgoff = state[row + A_PGOFF]
    low = max(start, pgoff)
    high = min(end, pgoff + ((state[row + A_END] - state[row + A_START]) >> U12))
    if low >= high:
        return U0, U0
    base = state[row + A_START]
    return base + ((low - pgoff) << U12), base + ((high - pgoff) << U12)
