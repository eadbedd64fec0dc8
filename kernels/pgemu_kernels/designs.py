"""The entry for the two designs in full: every parameter, whole operations and step by step.

`replay.run` has the loops of machines whose parameters are as at first; what differs from that (R_FULL), and what
`run` does not know, goes through here. The step functions are the ones that the straight-line orders call. Which
step follows which is told once more, as a switch on the number of steps done; the tests run every order both ways.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels import pfnmap, piece_steps, restructure
from pgemu_kernels.bits import U0, U1
from pgemu_kernels.compile import entry, kernel, outlined
from pgemu_kernels.events import CONVERT_IOCTL, SYSCALL, begin_operation, charge_one, finish_operation, pause, resume
from pgemu_kernels.handle import open_machine
from pgemu_kernels.layout import (
    BLOCKED,
    EBUSY,
    EVENTS,
    GO,
    O_ACTIVE,
    O_OP,
    O_PHASE,
    O_STATUS,
    O_TO_PRIVATE,
    OPERATIONS,
    PFNMAP,
    R_COUNTER_ROW,
    R_DESIGN,
    STATS_COUNTERS,
    STOP,
)
from pgemu_kernels.records import Columns, element, load, operation_record
from pgemu_kernels.replay import (
    OP_CLOSE,
    OP_CONVERT,
    OP_GUEST_FAULT,
    OP_HOST_FAULT,
    OP_PUNCH_HOLE,
    OP_PUT,
    guest_fault,
    host_fault,
    run_whole,
    save,
)
from pgemu_kernels.routing import is_ordinary, is_pooling
from pgemu_kernels.steps import (
    convert_finish,
    convert_invalidate_begin,
    convert_invalidate_end,
    convert_prepare,
    convert_zap,
    fault_begin,
    guest_begin,
    store_attributes,
    unmap_host,
)
from pgemu_kernels.xarray import has_pieces

U = np.uint64
_PFNMAP = U(PFNMAP)
_BYTE = U(0xFF)

BATCH_MODE = 0  # what `run_designs` is asked to do: operations in columns,
BEGIN = 1  # ... the beginning of an actor's operation
STEP = 2  # ... or its next step


@kernel
def invalidate_steps(m, op, number):
    """The four steps that every order has in this sequence."""
    if number == U0:
        return convert_invalidate_begin(m, op)
    if number == U1:
        return convert_zap(m, op)
    if number == U(2):
        return store_attributes(m, op)
    return convert_invalidate_end(m, op)


@outlined
def step_restructure(m, op, phase):
    """Step number `phase` of the record's operation, order jan2026."""
    kind = m.state[op + O_OP]
    to_private = m.state[op + O_TO_PRIVATE] != U0
    if kind == OP_HOST_FAULT:
        if phase == U0:
            return fault_begin(m, op)
        if phase == U1:
            return restructure.fault_folio(m, op)
        return restructure.fault_map(m, op)
    if kind == OP_GUEST_FAULT:
        if phase == U0:
            return guest_begin(m, op)
        if phase == U1:
            return restructure.guest_folio(m, op)
        return restructure.guest_map(m, op)
    if phase == U0:
        return convert_prepare(m, op, restructure.ROUNDED)
    if to_private:
        if phase == U1:
            return unmap_host(m, op)
        if phase == U(2):
            return restructure.gate(m, op)
        if phase < U(7):
            return invalidate_steps(m, op, phase - U(3))
        if phase == U(7):
            return restructure.merge(m, op)
        return convert_finish(m, op)
    if phase == U1:
        return restructure.split(m, op)
    if phase < U(6):
        return invalidate_steps(m, op, phase - U(2))
    return convert_finish(m, op)


@outlined
def step_pfnmap(m, op, phase):
    """Step number `phase` of the record's operation, the slides' order."""
    kind = m.state[op + O_OP]
    if kind == OP_HOST_FAULT:
        if phase == U0:
            return fault_begin(m, op)
        if phase == U1:
            return pfnmap.fault_folio(m, op)
        return pfnmap.fault_map(m, op)
    if kind == OP_GUEST_FAULT:
        if phase == U0:
            return guest_begin(m, op)
        if phase == U1:
            return pfnmap.guest_folio(m, op)
        return pfnmap.guest_map(m, op)
    if phase == U0:
        return convert_prepare(m, op, pfnmap.ROUNDED)
    if m.state[op + O_TO_PRIVATE] != U0:
        if phase == U1:
            return unmap_host(m, op)
        phase -= U1
    if phase < U(5):
        return invalidate_steps(m, op, phase - U1)
    return convert_finish(m, op)


@kernel
def begin(m, op):
    """Begin the operation in an actor's record (its request words are set): nothing of it is done yet."""
    if m.state[op + O_OP] >= U(OPERATIONS):
        m.state[op + O_OP] = U0
    m.state[op + O_ACTIVE] = U1
    begin_operation(m, op)
    if m.state[op + O_OP] == OP_CONVERT:
        charge_one(m, CONVERT_IOCTL)
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
    outcome = np.int64(STOP)
    if kind != OP_HOST_FAULT and kind != OP_GUEST_FAULT and kind != OP_CONVERT:
        run_whole(m, op)
        if np.int64(state[op + O_STATUS]) == -EBUSY:
            outcome = np.int64(BLOCKED)
    elif state[R_DESIGN] == _PFNMAP:
        outcome = np.int64(step_pfnmap(m, op, phase))
    else:
        outcome = np.int64(step_restructure(m, op, phase))
    pause(m, op)
    if outcome == BLOCKED:
        return outcome
    state[op + O_PHASE] = phase + U1
    if outcome != GO:
        state[op + O_ACTIVE] = U0
        finish_operation(m, op)
    return outcome


@outlined
def operate_pieces(m, op, kind):
    """Run a whole operation of a machine that splits 1G pages to 2M pieces: whether it is one that minds."""
    if kind == OP_HOST_FAULT:
        piece_steps.host_fault(m, op)
    elif kind == OP_GUEST_FAULT:
        piece_steps.guest_fault(m, op)
    elif kind == OP_CONVERT:
        charge_one(m, CONVERT_IOCTL)
        piece_steps.convert(m, op)
    elif kind == OP_PUNCH_HOLE or kind == OP_CLOSE or kind == OP_PUT:
        charge_one(m, SYSCALL)
        if kind == OP_PUNCH_HOLE:
            piece_steps.punch(m, op)
        elif kind == OP_CLOSE:
            piece_steps.close(m, op)
        else:
            piece_steps.put(m, op)
    else:
        return False
    return True


@outlined
def operate(m, op):
    """Run a whole operation."""
    kind = m.state[op + O_OP]
    if has_pieces(m.state) and m.state[R_DESIGN] != _PFNMAP and operate_pieces(m, op, kind):
        return
    if kind == OP_HOST_FAULT:
        host_fault(m, op)
    elif kind == OP_GUEST_FAULT:
        guest_fault(m, op)
    elif kind == OP_CONVERT:
        charge_one(m, CONVERT_IOCTL)
        if m.state[R_DESIGN] == _PFNMAP:
            pfnmap.convert(m, op)
        else:
            restructure.convert(m, op)
    else:
        run_whole(m, op)


@entry
def run_designs(descriptor, header, object_, address, offset, length, status, detail, first, actor, mode):
    """Run operations from `first` on, up to one that is for another entry: its index, or how many there are.

    With `mode` BEGIN or STEP it is the operation of `actor` that is begun or does its next step: GO, STOP or BLOCKED;
    the columns are not looked at.
    """
    m = open_machine(descriptor)
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
