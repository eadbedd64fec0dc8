"""Operations and counters from compiled functions: what Machine.operate() and Machine.statistics do."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pgemu.kernels.handle import H_DESCRIPTOR, H_DESIGNS, H_DEVICES, H_ORDINARY, H_POOLING, H_RUN
from pgemu.kernels.native import (
    CLOSED,
    HANDLE,
    NOT_LOADED,
    NUMBER,
    REFUSED,
    called,
    compiled,
    descriptor_of,
    handle_word,
    loops_of,
    machine_of,
    stack_status,
    stack_words,
)
from pgemu_kernels.engine.numba_internals import call_address
from pgemu_kernels.words import registers, rows
from pgemu_kernels.words.events import EVENTS, STATS_COUNTERS, STATS_GAUGES, Gauge
from pgemu_kernels.words.operations import ENTRY_SHIFT, OPERATIONS, Entry, Flag, Operation
from pgemu_kernels.words.requests import BATCH_MODE

__all__ = (
    "Done", "convert", "event_count", "event_count_of", "gauge", "guest_fault", "host_fault", "munmap", "operate",
    "zap",
)  # fmt: skip

U = np.uint64
_U0, _U1, _BYTE, _U8, _U16, _U32, _U48 = U(0), U(1), U(255), U(8), U(16), U(32), U(48)
_H_DESCRIPTOR, _H_RUN, _H_DESIGNS = U(H_DESCRIPTOR), U(H_RUN), U(H_DESIGNS)
_H_ORDINARY, _H_POOLING, _H_DEVICES = U(H_ORDINARY), U(H_POOLING), U(H_DEVICES)
_SHIFT, _NOBODY, _BATCH = U(ENTRY_SHIFT), U(rows.ACTORS), np.int64(BATCH_MODE)
_FULL, _ORDINARY, _POOLING = U(Entry.FULL), U(Entry.ORDINARY), U(Entry.POOLING)
_R_FULL, _R_SPINS = U(registers.R_FULL), U(registers.R_SPINS)
_CONVERT, _HOST_FAULT, _GUEST_FAULT = U(Operation.CONVERT), U(Operation.HOST_FAULT), U(Operation.GUEST_FAULT)
_ZAP, _MUNMAP = U(Operation.ZAP), U(Operation.MUNMAP)
_SHARED, _PRIVATE = U(Flag.SHARED), U(Flag.PRIVATE)
_COUNTERS, _GAUGES, _EVENTS, _OPERATIONS = U(STATS_COUNTERS), U(STATS_GAUGES), U(EVENTS), U(OPERATIONS)
_GAUGE_COUNT = U(len(Gauge))


class Done(NamedTuple):
    """What an operation returned. status: int64, as of pgemu.Result, or one of CLOSED, ... detail: uint64."""

    status: Any
    detail: Any


@called
def _designs(handle, columns, first):
    """The entry that knows every parameter of the designs."""
    return call_address(handle_word(handle, _H_DESIGNS), (descriptor_of(handle), *columns, first, _U0, _BATCH))


@called
def _goes_on(other):
    """The word of the entry for what the first one does not run."""
    if other == _FULL:
        return _H_DESIGNS
    if other == _ORDINARY:
        return _H_ORDINARY
    return _H_POOLING if other == _POOLING else _H_DEVICES


@called
def _run(handle, columns):
    """One operation, as pgemu.machine.core.run_all() runs them: 0, or what is wrong."""
    is_full = machine_of(handle).state[_R_FULL] != _U0
    first = handle_word(handle, _H_DESIGNS if is_full else _H_RUN)
    if first == _U0:
        return NOT_LOADED
    if is_full:
        stopped = U(_designs(handle, columns, _U0))
    else:
        stopped = U(call_address(first, (descriptor_of(handle), loops_of(handle), *columns, _U0)))
    if stopped == _U1:
        return 0
    word = _goes_on(stopped >> _SHIFT)
    entry = handle_word(handle, word)
    if entry == _U0 or (word == _H_DEVICES and handle_word(handle, _H_DESIGNS) == _U0):
        return NOT_LOADED
    if word == _H_DESIGNS:
        _designs(handle, columns, _U0)
        return 0
    call_address(entry, (descriptor_of(handle), *columns, _U0, _NOBODY))
    if word == _H_DEVICES and machine_of(handle).state[_R_SPINS] != _U0:
        _designs(handle, columns, _U1)  # what was unpinned may be what a conversion awaits
    return 0


@called
def _operate(handle, op, flags, vm, space, object_, address, offset, length):
    if handle_word(handle, _H_DESCRIPTOR) == _U0:
        return Done(CLOSED, _U0)
    if (op | flags) > _BYTE or (vm | space) >> _U16 != _U0:
        return Done(REFUSED, _U0)
    header, objects, addresses = stack_words(1), stack_words(1), stack_words(1)
    offsets, lengths, details, status = stack_words(1), stack_words(1), stack_words(1), stack_status(1)
    header[0] = op | flags << _U8 | vm << _U32 | space << _U48
    objects[0], addresses[0], offsets[0], lengths[0] = object_, address, offset, length
    status[0], details[0] = 0, _U0
    problem = _run(handle, (header, objects, addresses, offsets, lengths, status, details))
    return Done(status[0] if problem == 0 else problem, details[0])


@compiled(
    handle=HANDLE, op=NUMBER, flags=NUMBER, vm=NUMBER, space=NUMBER, object_=NUMBER, address=NUMBER, offset=NUMBER,
    length=NUMBER,
)  # fmt: skip
def operate(handle, op, flags, vm, space, object_, address, offset, length):
    """operate(handle, op, flags, vm, space, object_, address, offset, length) -> Done: any operation by its code.

    The arguments are the columns of a trace (pgemu.trace.COLUMNS): op a pgemu_kernels.words.Operation, flags its Flag
    bits, vm and space numbers below 65536 of a VM and a process, object_ that of a file, a slot or a pin, the others
    bytes. See Machine.operate(). NOT_LOADED, and nothing is done, where it is for an entry that the handle has not.
    """
    return _operate(handle, U(op), U(flags), U(vm), U(space), U(object_), U(address), U(offset), U(length))


@compiled(handle=HANDLE, space=NUMBER, address=NUMBER, flags=NUMBER)
def host_fault(handle, space, address, flags):
    """host_fault(handle, space, address, flags) -> Done: an access of a process (AddressSpace.space), as its touch().

    flags: 0, or bits of words.Flag: WRITE, EXEC. detail: the level of the leaf.
    """
    return _operate(handle, _HOST_FAULT, U(flags), _U0, U(space), _U0, U(address), _U0, _U0)


@compiled(handle=HANDLE, vm=NUMBER, gpa=NUMBER, flags=NUMBER)
def guest_fault(handle, vm, gpa, flags):
    """guest_fault(handle, vm, gpa, flags) -> Done: an access of a guest (Vm.vm), as Vm.touch().

    flags: 0, or bits of words.Flag: WRITE, EXEC, ACCEPT_4K. detail: the level of the leaf.
    """
    return _operate(handle, _GUEST_FAULT, U(flags), U(vm), _U0, _U0, U(gpa), _U0, _U0)


@compiled(handle=HANDLE, inode=NUMBER, offset=NUMBER, length=NUMBER, shared=NUMBER)
def convert(handle, inode, offset, length, shared):
    """convert(handle, inode, offset, length, shared) -> Done: as GuestMemfd.convert() (inode: GuestMemfd.inode).

    shared: 1 to shared, 0 to private.
    """
    flags = _SHARED if U(shared) != _U0 else _PRIVATE
    return _operate(handle, _CONVERT, flags, _U0, _U0, U(inode), _U0, U(offset), U(length))


@compiled(handle=HANDLE, space=NUMBER, address=NUMBER, length=NUMBER)
def zap(handle, space, address, length):
    """zap(handle, space, address, length) -> Done: clear a process's entries of a range, as AddressSpace.zap()."""
    return _operate(handle, _ZAP, _U0, _U0, U(space), _U0, U(address), _U0, U(length))


@compiled(handle=HANDLE, space=NUMBER, address=NUMBER, length=NUMBER)
def munmap(handle, space, address, length):
    """munmap(handle, space, address, length) -> Done: as AddressSpace.munmap()."""
    return _operate(handle, _MUNMAP, _U0, _U0, U(space), _U0, U(address), _U0, U(length))


@compiled(handle=HANDLE, event=NUMBER)
def event_count(handle, event):
    """event_count(handle, event) -> int64: how often a words.Event was counted, for all operations and edits.

    Or CLOSED, or REFUSED for another number. TLB_FLUSH_VM: if it has grown since the last look, VMs were flushed.
    """
    if handle_word(handle, _H_DESCRIPTOR) == _U0:
        return np.int64(CLOSED)
    if U(event) >= _EVENTS:
        return np.int64(REFUSED)
    stats = machine_of(handle).stats
    total = np.int64(0)
    for op in range(_OPERATIONS):
        total += stats[_COUNTERS + op * _EVENTS + U(event)]
    return total


@compiled(handle=HANDLE, op=NUMBER, event=NUMBER)
def event_count_of(handle, op, event):
    """event_count_of(handle, op, event) -> int64: the same for one words.Operation (0: edits of page tables)."""
    if handle_word(handle, _H_DESCRIPTOR) == _U0:
        return np.int64(CLOSED)
    if U(op) >= _OPERATIONS or U(event) >= _EVENTS:
        return np.int64(REFUSED)
    return machine_of(handle).stats[_COUNTERS + U(op) * _EVENTS + U(event)]


@compiled(handle=HANDLE, gauge=NUMBER)
def gauge(handle, gauge):
    """gauge(handle, gauge) -> int64: a words.Gauge now (FRAMES_USED: frames); or CLOSED, REFUSED."""
    if handle_word(handle, _H_DESCRIPTOR) == _U0:
        return np.int64(CLOSED)
    if U(gauge) >= _GAUGE_COUNT:
        return np.int64(REFUSED)
    return machine_of(handle).stats[_GAUGES + U(gauge) * U(2)]
