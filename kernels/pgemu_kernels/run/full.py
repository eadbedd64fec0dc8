"""The entry for the two designs in full: every parameter, whole operations and step by step.

`replay.run` has the loops of machines whose parameters are as at first; what differs from that (R_FULL), and what
`run` does not know, goes through here. The step functions are the ones that the straight-line orders call. Which
step follows which is told once more, as a switch on the number of the step; the tests run every order both ways.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import U0, U1
from pgemu_kernels.engine.charge import (
    CONVERT_IOCTL,
    SYSCALL,
    begin_operation,
    charge_one,
    finish_operation,
    pause,
    resume,
)
from pgemu_kernels.engine.compile import entry, kernel, outlined
from pgemu_kernels.engine.handle import open_full_machine
from pgemu_kernels.engine.records import Columns, element, load, operation_record
from pgemu_kernels.gmem import (
    fallocate,
    faults as faulting,
    levels as gmem_kvm,
    lifetime,
    lru,
    orders,
    pins,
    prefault as gmem_prefault,
    workers,
)
from pgemu_kernels.gmem.mbind import operate_policy
from pgemu_kernels.rules.blocks import check_blocks
from pgemu_kernels.rules.pieces import check_in_pieces
from pgemu_kernels.rules.references import hold_again
from pgemu_kernels.run.fast import OP_CLOSE, OP_CONVERT, OP_GUEST_FAULT, OP_HOST_FAULT, OP_PUNCH_HOLE, run_kind, save
from pgemu_kernels.run.routing import is_ordinary, is_pooling
from pgemu_kernels.words.events import EVENTS, STATS_COUNTERS
from pgemu_kernels.words.operations import BLOCKED, EBUSY, GO, OPERATIONS, STOP, Operation
from pgemu_kernels.words.registers import R_COUNTER_ROW, R_GUEST_FAULTS, R_HOLDERS_OFF, R_STEPPED
from pgemu_kernels.words.rows import O_ACTIVE, O_NEXT, O_OP, O_PHASE, O_STAGE, O_STATUS

U = np.uint64
OP_WORK = U(Operation.WORK)
OP_RELEASE = U(Operation.RELEASE)
OP_ALLOCATE = U(Operation.ALLOCATE)
OP_MEMORY_POLICY = U(Operation.MEMORY_POLICY)
OP_PREFAULT = U(Operation.PREFAULT)
OP_DIRTY_LOGGING = U(Operation.DIRTY_LOGGING)
_BYTE = U(0xFF)
OP_PIN = U(Operation.PIN)
OP_UNPIN = U(Operation.UNPIN)
OP_LRU_DRAIN = U(Operation.LRU_DRAIN)

BATCH_MODE = 0  # what `run_designs` is asked to do: operations in columns,
BEGIN = 1  # ... the beginning of an actor's operation
STEP = 2  # ... or its next step,
TAKE_AWAY = 3  # ... or, around recount.check(), that what pins, LRU batches and faults hold is taken off the references
GIVE_BACK = 4  # ... and put back


@kernel
def begin(m, op):
    """Begin the operation in an actor's record (its request words are set): nothing of it is done yet."""
    if m.state[op + O_OP] >= U(OPERATIONS):
        m.state[op + O_OP] = U0
    m.state[op + O_ACTIVE] = U1
    m.state[op + O_STAGE] = U0
    begin_operation(m, op)
    kind = m.state[op + O_OP]
    m.state[R_STEPPED] += U1
    if kind == OP_GUEST_FAULT:
        m.state[R_GUEST_FAULTS] += U1
    if kind == OP_CONVERT:
        charge_one(m, CONVERT_IOCTL)
    elif kind != OP_HOST_FAULT and kind != OP_GUEST_FAULT:
        charge_one(m, SYSCALL)
    pause(m, op)


@kernel
def step(m, actor, beginning):
    """Do the next step of an actor's operation: GO (more follow), STOP (it has ended) or BLOCKED.

    `beginning`: begin it, which is no step yet: GO.
    """
    state = m.state
    op = operation_record(actor)
    if beginning:
        begin(m, op)
        return np.int64(GO)
    if state[op + O_ACTIVE] == U0:
        return np.int64(STOP)
    kind = state[op + O_OP]
    state[R_COUNTER_ROW] = STATS_COUNTERS + kind * U(EVENTS)
    phase = state[op + O_PHASE]
    resume(m, op)
    outcome = next_step(m, op)
    pause(m, op)
    if outcome == BLOCKED:
        return outcome
    state[op + O_PHASE] = phase + U1
    state[op + O_STAGE] = state[op + O_NEXT]
    if outcome != GO:
        state[op + O_ACTIVE] = U0
        state[R_STEPPED] -= U1
        if kind == OP_GUEST_FAULT:
            state[R_GUEST_FAULTS] -= U1
        finish_operation(m, op)
    return outcome


@outlined
def next_step(m, op):
    """The next step of a record's operation: GO, STOP or BLOCKED. A step may choose the one behind it (O_NEXT)."""
    state = m.state
    kind = state[op + O_OP]
    stage = state[op + O_STAGE]
    state[op + O_NEXT] = stage + U1
    if kind == OP_HOST_FAULT or kind == OP_GUEST_FAULT:
        return np.int64(faulting.step_fault(m, op, stage))
    if kind == OP_CONVERT:
        return np.int64(orders.step_convert(m, op, stage))
    run_single(m, op)
    return np.int64(BLOCKED if np.int64(state[op + O_STATUS]) == -EBUSY else STOP)


@kernel
def end_of_life(m, op, kind):
    """Holes, closing, release, and the worker."""
    if kind == OP_PUNCH_HOLE:
        lifetime.punch(m, op)
    elif kind == OP_CLOSE:
        lifetime.close(m, op)
    elif kind == OP_RELEASE:
        lifetime.release(m, op)
    else:
        workers.operate_work(m, op)


@kernel
def run_single(m, op):
    """Run an operation that is one step: those of `replay.run`, and those that it does not know.

    Its system call was charged when it began: a blocked actor may come here more than once.
    """
    kind = m.state[op + O_OP]
    if kind == OP_PUNCH_HOLE or kind == OP_CLOSE or kind == OP_RELEASE or kind == OP_WORK:
        end_of_life(m, op, kind)
    elif kind == OP_PIN:
        pins.operate_pin(m, op)
    elif kind == OP_UNPIN:
        pins.operate_unpin(m, op)
    elif kind == OP_LRU_DRAIN:
        lru.operate_drain(m, op)
    elif kind == OP_PREFAULT:
        gmem_prefault.prefault(m, op)
    elif kind == OP_DIRTY_LOGGING:
        gmem_kvm.set_dirty_logging(m, op)
    elif kind == OP_ALLOCATE:
        fallocate.allocate(m, op)
    elif kind == OP_MEMORY_POLICY:
        operate_policy(m, op)
    else:
        run_kind(m, op)


@outlined
def operate(m, op):
    """Run a whole operation."""
    kind = m.state[op + O_OP]
    if kind == OP_HOST_FAULT or kind == OP_GUEST_FAULT:
        faulting.fault(m, op)
    elif kind == OP_CONVERT:
        charge_one(m, CONVERT_IOCTL)
        orders.convert(m, op)
    else:
        charge_one(m, SYSCALL)
        run_single(m, op)


@entry
def run_designs(descriptor, header, object_, address, offset, length, status, detail, first, actor, mode):
    """Run operations from `first` on, up to one that is for another entry: its index, or how many there are.

    With `mode` BEGIN or STEP it is the operation of `actor` that is begun or does its next step: GO, STOP or BLOCKED;
    the columns are not looked at. Nor are they with TAKE_AWAY and GIVE_BACK: reference_recount.hold_again().
    """
    m = open_full_machine(descriptor)
    if mode >= TAKE_AWAY:
        if mode == GIVE_BACK:
            check_in_pieces(m)
        hold_again(m, mode == GIVE_BACK)
        m.state[R_HOLDERS_OFF] = U1 if mode == TAKE_AWAY else U0
        if mode == GIVE_BACK:
            check_blocks(m)
        return np.int64(0)
    if mode != BATCH_MODE:
        return np.int64(step(m, actor, mode == BEGIN))
    columns = Columns(header, object_, address, offset, length, status, detail)
    state = m.state
    count = U(status.size)
    i = first
    while i < count:
        kind = element(header, i) & _BYTE
        if is_pooling(kind):
            break
        if is_ordinary(state, element(header, i), element(object_, i), element(address, i)):
            break
        op = load(m, columns, i)
        operate(m, op)
        save(m, op, columns, i)
        i += U1
    return np.int64(i)
