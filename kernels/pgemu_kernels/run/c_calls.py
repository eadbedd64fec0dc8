"""What C calls: pgemu.h's table of functions, each a door to entries that stand elsewhere.

Arguments are numbers and addresses, uint64, as numba's wrapper for C's calling convention takes them. What Python
checks before it calls an entry is checked here: a number that cannot be ends in BAD_*, whatever it is. What takes long
to compile is called by its address, and loaded when it is needed first (words/call_words.py).
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.addresses import call_c, descriptor_at, signed_words_at, words_at
from pgemu_kernels.engine.bits import LOW8, LOW16, LOW32, U0, U1, U2, U3, U4, U5, U6, U7, U8, U16, U32, U48
from pgemu_kernels.engine.compile import c_function, kernel, outlined
from pgemu_kernels.engine.handle import open_machine
from pgemu_kernels.engine.numba_internals import call_address
from pgemu_kernels.engine.records import Columns
from pgemu_kernels.run.c_arguments import CALLS_SIZE, CONTEXT_SIZE, MOST_BITS, context_of, is_array, is_ready
from pgemu_kernels.run.loops import LOOP_SHIFT
from pgemu_kernels.words.call_words import (
    BAD_ARGUMENT,
    BAD_MACHINE,
    BAD_POINTER,
    CALL_LOAD,
    CALL_LOOP,
    CALL_LOOPS,
    CALL_OPERATE,
    CONTEXT_CALLS,
    CONTEXT_DETAIL,
    CONTEXT_HEADER,
    CONTEXT_OPERATION,
    CONTEXT_STATUS,
    CONTEXT_ZERO,
    NO_CODE,
)
from pgemu_kernels.words.enum_words import (
    OP_CONVERT,
    OP_DMA_ACCESS,
    OP_DMA_MAP,
    OP_DMA_UNMAP,
    OP_GUEST_FAULT,
    OP_HOST_FAULT,
    OP_MUNMAP,
    OP_PIN,
    OP_PUNCH_HOLE,
    OP_UNPIN,
    OP_ZAP,
)
from pgemu_kernels.words.events import EVENTS, GAUGES, STATS_COUNTERS, STATS_GAUGES
from pgemu_kernels.words.operations import ENTRY_SHIFT, OPERATIONS, Entry
from pgemu_kernels.words.registers import R_FULL, R_SPINS
from pgemu_kernels.words.requests import BATCH_MODE
from pgemu_kernels.words.rows import ACTORS

U = np.uint64
_FAST, _FULL, _DEVICES = U(Entry.FAST), U(Entry.FULL), U(Entry.DEVICES)
_ENTRY_SHIFT = U(ENTRY_SHIFT)
_INDEX = (U1 << _ENTRY_SHIFT) - U1
_LOOP_INDEX = (U1 << LOOP_SHIFT) - U1
_FIELDS = U(9)  # of struct pgemu_operation
_EVENTS, _GAUGES, _ACTORS = U(EVENTS), U(GAUGES), U(ACTORS)


# --------------------------------------------------------------------------- operations


@outlined
def run_by(calls, number, descriptor, columns, first):
    """Run operations by an entry that is none of the default machines': what it returns."""
    if number == _FULL:
        return U(
            call_address(
                calls[number],
                (descriptor, columns.header, columns.object, columns.address, columns.offset, columns.length,
                 columns.status, columns.detail, first, U0, np.int64(BATCH_MODE)),
            )
        )  # fmt: skip
    return U(
        call_address(
            calls[number],
            (descriptor, columns.header, columns.object, columns.address, columns.offset, columns.length,
             columns.status, columns.detail, first, _ACTORS),
        )
    )  # fmt: skip


@outlined
def run_fast(calls, descriptor, columns, first):
    """Run operations by the entry of default machines: what it returns."""
    return U(
        call_address(
            calls[_FAST],
            (descriptor, words_at(calls[CALL_LOOPS], U3), columns.header, columns.object, columns.address,
             columns.offset, columns.length, columns.status, columns.detail, first),
        )
    )  # fmt: skip


@outlined
def run_through(machine, calls, columns):
    """Run operations through one entry after the other, as pgemu.machine.core.run_all() does: 0, or NO_CODE."""
    descriptor = descriptor_at(machine)
    m = open_machine(descriptor)
    count = U(columns.status.size)
    done = U0
    while done < count:
        full = m.state[R_FULL] != U0
        if not is_ready(calls, _FULL if full else _FAST):
            return np.int64(NO_CODE)
        if full:
            stopped = run_by(calls, _FULL, descriptor, columns, done)
        else:
            stopped = run_fast(calls, descriptor, columns, done)
        loop = stopped >> LOOP_SHIFT
        if loop != U0:
            if call_c(calls[CALL_LOAD], CALL_LOOP + loop - U1) != 0:
                return np.int64(NO_CODE)
            done = stopped & _LOOP_INDEX
            continue
        other = stopped >> _ENTRY_SHIFT
        done = stopped & _INDEX
        if done >= count:
            break
        if other == U0 or not is_ready(calls, other) or (other == _DEVICES and not is_ready(calls, _FULL)):
            return np.int64(NO_CODE)
        done = run_by(calls, other, descriptor, columns, done) & _INDEX
        if other == _DEVICES and m.state[R_SPINS] != U0:
            run_by(calls, _FULL, descriptor, columns, count)  # what was unpinned may be what a conversion awaits
    return np.int64(0)


@kernel
def fits_columns(o):
    """Whether an operation's fields fit the columns of a trace."""
    if (o[U0] | o[U1]) & ~LOW8 != U0 or o[U2] >= _ACTORS:
        return False
    return (o[U3] | o[U4]) & ~LOW16 == U0 and o[U5] & ~LOW32 == U0


@c_function
def c_operate(machine, operation, detail):
    """Run an operation (struct pgemu_operation): what it returns."""
    context = context_of(machine)
    if context == U0:
        return np.int64(BAD_MACHINE)
    if not is_array(operation) or detail & U7 != U0:
        return np.int64(BAD_POINTER)
    o = words_at(operation, _FIELDS)
    if not fits_columns(o):
        return np.int64(BAD_ARGUMENT)
    c = words_at(context, CONTEXT_SIZE)
    c[CONTEXT_HEADER] = o[U0] | o[U1] << U8 | o[U2] << U16 | o[U3] << U32 | o[U4] << U48
    columns = Columns(
        words_at(context + (CONTEXT_HEADER << U3), U1),
        words_at(operation + U(40), U1),
        words_at(operation + U48, U1),
        words_at(operation + U(56), U1),
        words_at(operation + U(64), U1),
        signed_words_at(context + (CONTEXT_STATUS << U3), U1),
        words_at(context + (CONTEXT_DETAIL << U3), U1),
    )
    wrong = run_through(machine, words_at(c[CONTEXT_CALLS], CALLS_SIZE), columns)
    if wrong != 0:
        return np.int64(wrong)
    if detail != U0:
        words_at(detail, U1)[U0] = c[CONTEXT_DETAIL]
    return np.int64(c[CONTEXT_STATUS])


@kernel
def place_of_column(context, columns, number, count):
    """Where a column of struct pgemu_columns lies, and how many elements it has."""
    address = columns[number]
    one = columns[U5] >> number & U1 != U0
    if address == U0:
        return context + (CONTEXT_ZERO << U3), U1
    return address, U1 if one else count


@c_function
def c_run(machine, columns, count, status, detail):
    """Run `count` operations (struct pgemu_columns): 0."""
    context = context_of(machine)
    if context == U0:
        return np.int64(BAD_MACHINE)
    if not is_array(columns):
        return np.int64(BAD_POINTER)
    if count >> MOST_BITS != U0:
        return np.int64(BAD_ARGUMENT)
    if count == U0:
        return np.int64(0)
    given = words_at(columns, U6)
    arrays = is_array(given[U0]) and is_array(status) and is_array(detail)
    if not arrays or (given[U1] | given[U2] | given[U3] | given[U4]) & U7 != U0:
        return np.int64(BAD_POINTER)
    c = words_at(context, CONTEXT_SIZE)
    header, headers = place_of_column(context, given, U0, count)
    object_, objects = place_of_column(context, given, U1, count)
    address, addresses = place_of_column(context, given, U2, count)
    offset, offsets = place_of_column(context, given, U3, count)
    length, lengths = place_of_column(context, given, U4, count)
    taken = Columns(
        words_at(header, headers), words_at(object_, objects), words_at(address, addresses), words_at(offset, offsets),
        words_at(length, lengths), signed_words_at(status, count), words_at(detail, count),
    )  # fmt: skip
    return run_through(machine, words_at(c[CONTEXT_CALLS], CALLS_SIZE), taken)


# --------------------------------------------------------------------------- operations, one function each


@kernel
def ask(machine, op, flags, vm, space, object_, address, offset, length, detail):
    """c_operate() of an operation that is written down here."""
    context = context_of(machine)
    if context == U0:
        return np.int64(BAD_MACHINE)
    place = context + (CONTEXT_OPERATION << U3)
    o = words_at(place, _FIELDS)
    o[U0] = op
    o[U1] = flags
    o[U2] = U0
    o[U3] = vm
    o[U4] = space
    o[U5] = object_
    o[U6] = address
    o[U7] = offset
    o[U8] = length
    calls = words_at(words_at(context, CONTEXT_SIZE)[CONTEXT_CALLS], CALLS_SIZE)
    return np.int64(call_address(calls[CALL_OPERATE], (machine, place, detail)))


@c_function
def c_host_fault(machine, space, address, flags, detail):
    return ask(machine, OP_HOST_FAULT, flags, U0, space, U0, address, U0, U0, detail)


@c_function
def c_guest_fault(machine, vm, address, flags, detail):
    return ask(machine, OP_GUEST_FAULT, flags, vm, U0, U0, address, U0, U0, detail)


@c_function
def c_convert(machine, vm, inode, offset, length, flags, detail):
    return ask(machine, OP_CONVERT, flags, vm, U0, inode, U0, offset, length, detail)


@c_function
def c_zap(machine, space, address, length, flags, detail):
    return ask(machine, OP_ZAP, flags, U0, space, U0, address, U0, length, detail)


@c_function
def c_munmap(machine, space, address, length, detail):
    return ask(machine, OP_MUNMAP, U0, U0, space, U0, address, U0, length, detail)


@c_function
def c_punch_hole(machine, inode, offset, length, detail):
    return ask(machine, OP_PUNCH_HOLE, U0, U0, U0, inode, U0, offset, length, detail)


@c_function
def c_pin(machine, space, number, address, length, flags, detail):
    return ask(machine, OP_PIN, flags, U0, space, number, address, U0, length, detail)


@c_function
def c_unpin(machine, number, detail):
    return ask(machine, OP_UNPIN, U0, U0, U0, number, U0, U0, U0, detail)


@c_function
def c_dma_map(machine, domain, space, iova, length, inode, offset, flags, detail):
    return ask(machine, OP_DMA_MAP, flags, space, domain, inode, iova, offset, length, detail)


@c_function
def c_dma_unmap(machine, domain, iova, length, detail):
    return ask(machine, OP_DMA_UNMAP, U0, U0, domain, U0, iova, U0, length, detail)


@c_function
def c_dma_access(machine, domain, device, iova, length, word, flags, detail):
    return ask(machine, OP_DMA_ACCESS, flags, U0, domain, device, iova, word, length, detail)


# --------------------------------------------------------------------------- counters


@c_function
def c_event_count(machine, event):
    """How often an event was counted, of all operations."""
    if context_of(machine) == U0:
        return np.int64(BAD_MACHINE)
    if event >= _EVENTS:
        return np.int64(BAD_ARGUMENT)
    stats = open_machine(descriptor_at(machine)).stats
    total = np.int64(0)
    for operation in range(U(OPERATIONS)):
        total += stats[STATS_COUNTERS + operation * _EVENTS + event]
    return np.int64(total)


@c_function
def c_gauge_value(machine, gauge):
    """The value of a gauge."""
    if context_of(machine) == U0:
        return np.int64(BAD_MACHINE)
    if gauge >= _GAUGES:
        return np.int64(BAD_ARGUMENT)
    return np.int64(open_machine(descriptor_at(machine)).stats[STATS_GAUGES + U2 * gauge])
