"""Which entry runs an operation: `fast.run` those of the two designs, `ordinary.run_ordinary` all others.

What of the designs `run` does not know, and all of it on a machine with parameters of its own (R_FULL), is
`full.run_designs`' to run.

Ordinary is what mainline Linux does without either design: anonymous, HugeTLB and PFN mappings of a process,
guest_memfd of 4K folios, memory slots over a process's memory. A machine that has none of it (R_ORDINARY = 0)
never asks. What one does to huge pages themselves is `pooling.run_pooling`. Several entries, because whoever only
compares the designs should not wait for the others' compilation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pgemu_kernels.engine.bits import LOW8, LOW16, NONE, U0, U1, U8, U12, U32, U48
from pgemu_kernels.engine.charge import begin_operation, charge_each, finish_operation, forget_last
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.memslots import find_memslot
from pgemu_kernels.engine.records import element, load, operation_record, save_result
from pgemu_kernels.engine.rows import find_vma, ordinary_inode, vm_row
from pgemu_kernels.rules.invariants import check_conserved
from pgemu_kernels.words.enum_words import (
    EVENT_SYSCALL,
    FLAG_LOCKED,
    FLAG_POPULATE,
    FLAG_PRIVATE,
    FLAG_SHARED,
    OP_GUEST_FAULT,
    OP_MMAP,
)
from pgemu_kernels.words.operations import (
    BLOCKED,
    EBUSY,
    ENTRY_SHIFT,
    OPERATIONS,
    OPS_ALWAYS_ORDINARY,
    OPS_BY_FILE,
    OPS_BY_MAPPING,
    OPS_BY_MMAP,
    OPS_BY_PROCESS,
    OPS_BY_SLOT,
    OPS_DEVICES,
    OPS_FULL,
    OPS_POOLING,
    OPS_TRYING,
    STOP,
    Entry,
)
from pgemu_kernels.words.registers import (
    R_CHECK,
    R_FULL,
    R_GUEST_FAULTS,
    R_INODES,
    R_ORDINARY,
    R_SPACES,
    R_STEPPED,
    R_VMS,
)
from pgemu_kernels.words.rows import (
    A_KIND,
    M_KIND,
    O_ACTIVE,
    O_ADDRESS,
    O_FLAGS,
    O_OBJECT,
    O_OP,
    O_SPACE,
    O_STATUS,
    O_VM,
    S_ORDINARY,
    S_WORDS,
    SLOT_GUEST_MEMFD,
    STATE_SPACES,
    V_ATTRIBUTES,
    VMA_GUEST_MEMFD,
)

U = np.uint64
_FULL = U(Entry.FULL << ENTRY_SHIFT)
_ORDINARY = U(Entry.ORDINARY << ENTRY_SHIFT)
_POOLING = U(Entry.POOLING << ENTRY_SHIFT)
_DEVICES = U(Entry.DEVICES << ENTRY_SHIFT)
_S_WORDS = U(S_WORDS)
_OPERATIONS = U(OPERATIONS)
_PRIVATE_OR_SHARED = FLAG_PRIVATE | FLAG_SHARED
_POPULATE_OR_LOCKED = FLAG_POPULATE | FLAG_LOCKED


def in_order(is_ours: Callable[..., Any], operate: Callable[..., Any]) -> Callable[..., Any]:
    """A loop (m, columns, first) over operations up to one that is not `is_ours`: its index, or how many there are.

    is_ours: (m, columns, i). operate: (m, op, kind) as engine.choice makes them.
    """

    @kernel
    def run_in_order(m, columns, first):
        count = U(columns.status.size)
        i = first
        while i < count and is_ours(m, columns, i):
            m.state[R_ORDINARY] = U1
            op = load(m, columns, i)
            operate(m, op, m.state[op + O_OP])
            finish_other(m, op)
            save_result(m.state, op, columns, i)
            i += U1
        return i

    return run_in_order


@kernel
def finish_other(m, op):
    """Book an operation that is none of the designs', and check it if asked to."""
    forget_last(m.stats)
    finish_operation(m, op)
    if m.state[R_CHECK] != U0:
        check_conserved(m, m.state[op + O_OP])


@kernel
def note_stepped(state, op, n):
    """An actor's operation is under way (`n` 1), or no more (`n` 0 - 1)."""
    state[R_STEPPED] += n
    if state[op + O_OP] == OP_GUEST_FAULT:
        state[R_GUEST_FAULTS] += n


def as_one_step(operate: Callable[..., Any], waits: bool) -> Callable[..., Any]:
    """A step (m, actor) that is all of an actor's operation: STOP, or where `waits` BLOCKED for what returns -EBUSY.

    operate: as for in_order(). A lock that is waited for is looked at before anything is done.
    """

    @kernel
    def step_whole(m, actor):
        state = m.state
        op = operation_record(actor)
        state[R_ORDINARY] = U1
        note_stepped(state, op, U0 - U1)
        begin_operation(m, op)
        operate(m, op, state[op + O_OP])
        busy = waits and np.int64(state[op + O_STATUS]) == -EBUSY
        if busy and not is_of(OPS_TRYING, state[op + O_OP]):
            charge_each(m, EVENT_SYSCALL, -1)  # it is counted once, when the operation goes on
            note_stepped(state, op, U1)
            return np.int64(BLOCKED)
        state[op + O_ACTIVE] = U0
        finish_other(m, op)
        return np.int64(STOP)

    return step_whole


@kernel
def ordinary_space(state, space):
    """Whether a process has or had VMAs of ordinary kinds."""
    return space < state[R_SPACES] and state[STATE_SPACES + space * _S_WORDS + S_ORDINARY] != U0


@kernel
def has_attributes(state, vm):
    """Whether a VM has memory attributes, which tell the kind of memory outside slots, too."""
    return vm < state[R_VMS] and state[vm_row(vm) + V_ATTRIBUTES] != U0


@kernel
def is_of(operations, kind):
    """Whether an operation is one of a class (words.operations.OPS_*)."""
    return kind < _OPERATIONS and operations >> kind & U1 != U0


@kernel
def has_own_entry(kind):
    """Whether an operation is for `pooling.run_pooling`, one on huge pages themselves, or for `devices.run_devices`."""
    return is_of(OPS_POOLING | OPS_DEVICES, kind)


@kernel
def entry_of(kind):
    """The entry of such an operation, as stopped_at() returns it."""
    return _DEVICES if is_of(OPS_DEVICES, kind) else _POOLING


@kernel
def is_full(state, header):
    """Whether an operation of the designs is one for `full.run_designs` rather than `fast.run`."""
    kind = header & LOW8
    if kind == OP_MMAP and header >> U8 & _POPULATE_OR_LOCKED != U0:
        return True
    return state[R_FULL] != U0 or is_of(OPS_FULL, kind)


@outlined
def is_ordinary(state, header, object_, address):
    """Whether an operation is one for `run_ordinary`, as its row says (By); arguments are its columns."""
    kind = header & LOW8
    space = header >> U48
    vm = header >> U32 & LOW16
    if is_of(OPS_BY_MAPPING, kind):
        row = find_vma(state, space, address)
        return row != NONE and state[row + A_KIND] != VMA_GUEST_MEMFD
    if is_of(OPS_BY_SLOT, kind):
        slot = find_memslot(state, vm, address >> U12)
        if slot == NONE:
            return kind == OP_GUEST_FAULT and has_attributes(state, vm)
        return state[slot + M_KIND] != SLOT_GUEST_MEMFD
    if is_of(OPS_BY_MMAP, kind):
        # What names no inode at all is anonymous if it says PRIVATE or SHARED.
        named = object_ < state[R_INODES]
        return ordinary_inode(state, object_) or (not named and header >> U8 & _PRIVATE_OR_SHARED != U0)
    if is_of(OPS_BY_PROCESS, kind):
        return ordinary_space(state, space)
    if is_of(OPS_BY_FILE, kind):
        return ordinary_inode(state, object_)
    return is_of(OPS_ALWAYS_ORDINARY, kind)


@kernel
def entry_elsewhere(state, op):
    """The entry for the operation in a record, as stopped_at() returns it; 0 where it is the designs'."""
    kind = state[op + O_OP]
    if has_own_entry(kind):
        return entry_of(kind)
    header = kind | state[op + O_FLAGS] << U8 | state[op + O_VM] << U32 | state[op + O_SPACE] << U48
    return _ORDINARY if is_ordinary(state, header, state[op + O_OBJECT], state[op + O_ADDRESS]) else U0


@outlined
def stopped_at(state, columns, i):
    """What an entry of the designs returns that ran operations up to `i`: that index, and in bits 63:56 the `Entry` for
    operation `i`; the number of operations alone, if there is no `i`.
    """
    if i >= U(columns.status.size):
        return i
    kind = element(columns.header, i) & LOW8
    if has_own_entry(kind):
        return i | entry_of(kind)
    if is_ordinary(state, element(columns.header, i), element(columns.object, i), element(columns.address, i)):
        return i | _ORDINARY
    return i | _FULL
