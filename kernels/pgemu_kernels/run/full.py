"""The entry for the two designs in full: every parameter, whole operations and step by step.

`fast.run` is for default machines; those that differ (R_FULL), and operations that `run` does not know, go through
here. The step functions are those of the straight lines.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import U0, U1
from pgemu_kernels.engine.charge import begin_operation, charge_each, finish_operation, forget_last, pause, resume
from pgemu_kernels.engine.compile import entry, kernel, outlined
from pgemu_kernels.engine.handle import open_full_machine
from pgemu_kernels.engine.records import Columns, operation_record
from pgemu_kernels.gmem import fault_steps, orders, truncation
from pgemu_kernels.gmem.resuming import finish_spins
from pgemu_kernels.rules.blocks import check_blocks
from pgemu_kernels.rules.pieces import check_in_pieces
from pgemu_kernels.rules.references import hold_again, thaw
from pgemu_kernels.run.loops import run_kind, run_stretches
from pgemu_kernels.run.routing import entry_elsewhere, note_stepped
from pgemu_kernels.words.enum_words import (
    EVENT_CONVERT_IOCTL,
    EVENT_SYSCALL,
    OP_CONVERT,
    OP_GUEST_FAULT,
    OP_HOST_FAULT,
    OP_NESTED_MAP,
    OP_NESTED_UNMAP,
    OP_RELEASE,
)
from pgemu_kernels.words.events import EVENTS, STATS_COUNTERS
from pgemu_kernels.words.operations import BLOCKED, EBUSY, GO, OPERATIONS, STOP
from pgemu_kernels.words.registers import R_COUNTER_ROW, R_HOLDERS_OFF
from pgemu_kernels.words.requests import BATCH_MODE, BEGIN, GIVE_BACK, TAKE_AWAY
from pgemu_kernels.words.rows import O_ACTIVE, O_NEXT, O_OP, O_PHASE, O_STAGE, O_STATUS

U = np.uint64


@kernel
def begin(m, op):
    """Begin the operation in an actor's record (its request words are set): nothing of it is done yet."""
    if m.state[op + O_OP] >= U(OPERATIONS):
        m.state[op + O_OP] = U0
    m.state[op + O_ACTIVE] = U1
    m.state[op + O_STAGE] = U0
    begin_operation(m, op)
    note_stepped(m.state, op, U1)
    pause(m, op)


@kernel
def charge_call(m, kind, n):
    """Count the system call of an operation, or (`n` -1) do not yet."""
    if kind == OP_CONVERT:
        charge_each(m, EVENT_CONVERT_IOCTL, n)
    elif kind != OP_HOST_FAULT and kind != OP_GUEST_FAULT and kind != OP_NESTED_MAP and kind != OP_NESTED_UNMAP:
        charge_each(m, EVENT_SYSCALL, n)


@kernel
def step_actor(m, actor, beginning):
    """Do the next step of an actor's operation: GO (more follow), STOP (it has ended) or BLOCKED.

    `beginning`: begin it, which is no step yet: GO. What is none of the designs' when it is to do its first step is
    another entry's, for which nothing is done here: routing.entry_elsewhere().
    """
    state = m.state
    op = operation_record(actor)
    if beginning:
        begin(m, op)
        return np.int64(GO)
    if state[op + O_ACTIVE] == U0:
        return np.int64(STOP)
    kind = state[op + O_OP]
    first = state[op + O_STAGE] == U0
    elsewhere = entry_elsewhere(state, op) if first else U0
    if elsewhere != U0:
        return np.int64(elsewhere)
    state[R_COUNTER_ROW] = STATS_COUNTERS + kind * U(EVENTS)
    phase = state[op + O_PHASE]
    resume(m, op)
    if first:
        charge_call(m, kind, 1)
    outcome = next_step(m, op)
    if first and outcome == BLOCKED:
        charge_call(m, kind, -1)
    pause(m, op)
    if outcome == BLOCKED:
        return outcome
    state[op + O_PHASE] = phase + U1
    state[op + O_STAGE] = state[op + O_NEXT]
    if outcome != GO:
        state[op + O_ACTIVE] = U0
        note_stepped(state, op, U0 - U1)
        forget_last(m.stats)
        finish_operation(m, op)
    finish_spins(m)
    return outcome


@outlined
def next_step(m, op):
    """The next step of a record's operation: GO, STOP or BLOCKED. A step may choose the one behind it (O_NEXT)."""
    state = m.state
    kind = state[op + O_OP]
    stage = state[op + O_STAGE]
    state[op + O_NEXT] = stage + U1
    if kind == OP_HOST_FAULT or kind == OP_GUEST_FAULT:
        return np.int64(fault_steps.step_fault(m, op, stage))
    if kind == OP_CONVERT:
        return np.int64(orders.step_convert(m, op, stage))
    if kind == OP_RELEASE:
        return np.int64(truncation.step_release(m, op, stage))
    run_kind(m, op)
    return np.int64(BLOCKED if np.int64(state[op + O_STATUS]) == -EBUSY else STOP)


@entry
def run_designs(descriptor, header, object_, address, offset, length, status, detail, first, actor, mode):
    """Run operations from `first` on, up to one that is for another entry: routing.stopped_at().

    With `mode` BEGIN or STEP it is the operation of `actor` that is begun or does its next step: GO, STOP or BLOCKED;
    the columns are not looked at. TAKE_AWAY, GIVE_BACK: references.hold_again() of the frames in `object_`, as many
    pins of each as `address` says.
    """
    m = open_full_machine(descriptor)
    if mode >= TAKE_AWAY:
        if mode == GIVE_BACK:
            check_in_pieces(m)
        else:
            thaw(m, False)
        hold_again(m, mode == GIVE_BACK, object_, address)
        m.state[R_HOLDERS_OFF] = U1 if mode == TAKE_AWAY else U0
        if mode == GIVE_BACK:
            check_blocks(m)
            thaw(m, True)
        return np.int64(0)
    if mode != BATCH_MODE:
        return np.int64(step_actor(m, actor, mode == BEGIN))
    columns = Columns(header, object_, address, offset, length, status, detail)
    return np.int64(run_stretches(m, columns, first, (descriptor, detail)))
