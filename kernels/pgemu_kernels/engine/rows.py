"""Rows of the machine's objects: where they lie, which one holds an address, their locks; how an operation stops."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U2, U3, U9, U12, U48, U4095
from pgemu_kernels.engine.charge import (
    result,
)
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.geometry import pages_of
from pgemu_kernels.words.enum_words import VM_MIRRORED
from pgemu_kernels.words.operations import (
    EBADF,
    EINVAL,
    STOP,
)
from pgemu_kernels.words.registers import (
    R_BROKEN,
    R_BROKEN_FIRST,
    R_INODES,
    R_LAST_VMA,
    R_ORDER,
    R_VMAS,
    R_VMS,
)
from pgemu_kernels.words.rows import (
    A_END,
    A_INODE,
    A_LIVE,
    A_PGOFF,
    A_SPACE,
    A_START,
    A_WORDS,
    B_WORDS,
    FINDING_COUNT,
    FINDING_INDEX,
    FINDING_WORDS,
    I_BLOCK,
    I_KIND,
    I_LOCK,
    I_OPEN,
    I_WORDS,
    INODE_GUEST_MEMFD,
    LOCK_WRITER,
    M_BASE_GFN,
    M_INODE,
    M_PAGES,
    M_PGOFF,
    M_WORDS,
    O_LENGTH,
    O_LOCKED,
    O_OBJECT,
    O_OFFSET,
    S_ROOT,
    S_WORDS,
    STATE_FINDINGS,
    STATE_INODES,
    STATE_MEMSLOTS,
    STATE_SPACES,
    STATE_VMAS,
    STATE_VMS,
    V_LIVE,
    V_PRIVATE_ROOT,
    V_PROPERTIES,
    V_ROOT,
    V_WORDS,
)

U = np.uint64
_S_WORDS = U(S_WORDS)
_I_WORDS = U(I_WORDS)

_A_WORDS = U(A_WORDS)

_M_WORDS = U(M_WORDS)

_V_WORDS = U(V_WORDS)

_B_WORDS = U(B_WORDS)

_FINDING_WORDS = U(FINDING_WORDS)


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


@kernel
def clear_words(state, row, words):
    """An object's row holds nothing any more."""
    for word in range(row, row + words):
        state[word] = U0


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
def largest_level(state):
    """The level of the inodes' pages: 3, 2 or (4K pages) 1."""
    order = state[R_ORDER]
    if order > U9:
        return U3
    return U2 if order == U9 else U1


@kernel
def slot_allows(state, slot, gfn, level, backing):
    """Whether a memory slot permits a leaf of `level` 2 or 3 at `gfn`: lpage_info, attributes apart.

    The aligned block must lie inside the slot, and guest frames must agree modulo its size with the pages that back
    them, of which `backing` is the slot's first: arch/x86/kvm/x86.c:kvm_alloc_memslot_metadata(), where those are
    userspace's; of the posted 1G series the file's.
    """
    pages = pages_of(level)
    base = state[slot + M_BASE_GFN]
    first = gfn & ~(pages - U1)
    if (base ^ backing) & (pages - U1) != U0:
        return False
    return first >= base and first + pages <= base + state[slot + M_PAGES]


@kernel
def is_live_vm(state, vm):
    """Whether a VM exists and is not closed."""
    return vm < state[R_VMS] and state[vm_row(vm) + V_LIVE] != U0


@kernel
def has_vm_property(state, row, which):
    """Whether a VM (`row` of V_*) is of a kind with one of the properties VmProperty `which`."""
    return state[row + V_PROPERTIES] & which != U0


@kernel
def is_mirrored(state, vm):
    """Whether a VM has a root of its own for private memory."""
    return has_vm_property(state, vm_row(vm), VM_MIRRORED)


@kernel
def root_of_kind(state, row, private):
    """The stage-2 root of a VM for private or shared memory: one and the same where they share it."""
    return state[row + (V_PRIVATE_ROOT if private else V_ROOT)]


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


_LOW_48 = U((1 << 48) - 1)


@kernel
def stop(state, op, status):
    """End the operation with `status` (int64)."""
    result(state, op, np.int64(status))
    return STOP


@kernel
def broken(state, kind, index):
    """Record that an invariant does not hold."""
    if state[R_BROKEN] == U0:
        state[R_BROKEN_FIRST] = kind << U48 | index & _LOW_48
    state[R_BROKEN] += U1
    row = STATE_FINDINGS + kind * _FINDING_WORDS
    if state[row + FINDING_COUNT] == U0:
        state[row + FINDING_INDEX] = index
    state[row + FINDING_COUNT] += U1


@kernel
def range_arguments(state, op):
    """Check offset and length of an operation on an inode's range: 0, -EBADF or -EINVAL."""
    inode = state[op + O_OBJECT]
    if inode >= state[R_INODES] or state[inode_row(inode) + I_OPEN] == U0:
        return np.int64(-EBADF)
    offset = state[op + O_OFFSET]
    length = state[op + O_LENGTH]
    if (offset | length) & U4095 != U0 or length == U0 or offset + length < offset:
        return np.int64(-EINVAL)
    return np.int64(0)


@kernel
def space_root(state, space):
    """Physical address of a process's top table."""
    return state[STATE_SPACES + space * _S_WORDS + S_ROOT]


@kernel
def ordinary_inode(state, inode):
    return inode < state[R_INODES] and state[inode_row(inode) + I_KIND] != INODE_GUEST_MEMFD
