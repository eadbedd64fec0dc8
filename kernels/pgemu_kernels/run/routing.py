"""Which entry runs an operation: `replay.run` those of the two designs, `ordinary.run_ordinary` all others.

What of the designs `run` does not know, and all of it on a machine with parameters of its own (R_FULL), is
`designs.run_designs`' to run.

Ordinary is what mainline Linux does without either design: anonymous, HugeTLB and PFN mappings of a process,
guest_memfd of 4K folios, memory slots over a process's memory. A machine that has none of it (R_ORDINARY = 0)
never asks. What one does to huge pages themselves is `pooling.run_pooling`. Several entries, because whoever only
compares the designs should not wait for the others' compilation.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U8, U12, U32, U48
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.rows import find_memslot, find_vma, ordinary_inode, vm_row
from pgemu_kernels.words.operations import Flag, Operation
from pgemu_kernels.words.registers import R_FULL, R_INODES, R_SPACES, R_VMS
from pgemu_kernels.words.rows import (
    A_KIND,
    M_KIND,
    S_ORDINARY,
    S_WORDS,
    SLOT_GUEST_MEMFD,
    STATE_SPACES,
    V_ATTRIBUTES,
    VMA_GUEST_MEMFD,
)

U = np.uint64
_BYTE = U(0xFF)
_HALF = U(0xFFFF)
_S_WORDS = U(S_WORDS)
_HOST_FAULT = U(Operation.HOST_FAULT)
_GUEST_FAULT = U(Operation.GUEST_FAULT)
_MMAP = U(Operation.MMAP)
_MUNMAP = U(Operation.MUNMAP)
_ZAP = U(Operation.ZAP)
_BIND = U(Operation.BIND)
_UNBIND = U(Operation.UNBIND)
_ALLOCATE = U(Operation.ALLOCATE)
_PIN = U(Operation.PIN)
_UNPIN = U(Operation.UNPIN)
_PREFAULT = U(Operation.PREFAULT)
_PROTECT = U(Operation.PROTECT)
_POOL_RESIZE = U(Operation.POOL_RESIZE)
_VMEMMAP_STORE = U(Operation.VMEMMAP_STORE)
_PRIVATE_OR_SHARED = U(Flag.PRIVATE | Flag.SHARED)


@kernel
def ordinary_space(state, space):
    """Whether a process has or had VMAs of ordinary kinds."""
    return space < state[R_SPACES] and state[STATE_SPACES + space * _S_WORDS + S_ORDINARY] != U0


@kernel
def has_attributes(state, vm):
    """Whether a VM has memory attributes, which tell the kind of memory outside slots, too."""
    return vm < state[R_VMS] and state[vm_row(vm) + V_ATTRIBUTES] != U0


@kernel
def is_pooling(kind):
    """Whether an operation is one on huge pages themselves, for `pooling.run_pooling`."""
    return _POOL_RESIZE <= kind <= _VMEMMAP_STORE


@kernel
def is_full(state, kind):
    """Whether an operation of the designs is one for `designs.run_designs` rather than `replay.run`."""
    new = kind > _VMEMMAP_STORE or kind == _PIN or kind == _UNPIN or kind == _ALLOCATE or kind == _PREFAULT
    return state[R_FULL] != U0 or new


@outlined
def is_ordinary(state, header, object_, address):
    """Whether an operation is one for `run_ordinary`; arguments are its columns."""
    kind = header & _BYTE
    space = header >> U48
    vm = header >> U32 & _HALF
    if kind == _HOST_FAULT:
        row = find_vma(state, space, address)
        return row != NONE and state[row + A_KIND] != VMA_GUEST_MEMFD
    if kind == _GUEST_FAULT or kind == _PREFAULT:
        slot = find_memslot(state, vm, address >> U12)
        if slot == NONE:
            return kind == _GUEST_FAULT and has_attributes(state, vm)
        return state[slot + M_KIND] != SLOT_GUEST_MEMFD
    if kind == _MMAP:
        # What names no inode at all is anonymous if it says PRIVATE or SHARED.
        named = object_ < state[R_INODES]
        return ordinary_inode(state, object_) or (not named and header >> U8 & _PRIVATE_OR_SHARED != U0)
    if kind == _MUNMAP or kind == _ZAP:
        return ordinary_space(state, space)
    if kind == _BIND:
        return ordinary_inode(state, object_)
    if kind == _UNBIND:
        slot = find_memslot(state, vm, address >> U12)
        return slot != NONE and state[slot + M_KIND] != SLOT_GUEST_MEMFD
    if kind == U(Operation.VM_EXIT):
        return vm < state[R_VMS]
    if kind >= _PROTECT:
        return kind < _POOL_RESIZE
    if kind == _PIN or kind == _UNPIN:
        return False
    return kind <= U(Operation.CLOSE) and ordinary_inode(state, object_)
