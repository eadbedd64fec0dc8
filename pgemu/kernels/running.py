"""Operations and counters from compiled functions: what Machine.operate() and Machine.statistics do."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pgemu.kernels.handle import H_DESCRIPTOR, H_OPERATE
from pgemu.kernels.native import (
    CLOSED,
    FLAGS,
    HANDLE,
    NOT_LOADED,
    NUMBER,
    REFUSED,
    TRUTH,
    address_of,
    called,
    compiled,
    flag_bits,
    handle_word,
    machine_of,
    stack_words,
)
from pgemu_kernels.engine.numba_internals import call_address
from pgemu_kernels.words.events import EVENTS, STATS_COUNTERS, STATS_GAUGES, Gauge
from pgemu_kernels.words.operations import OPERATIONS, Flag, Operation

__all__ = (
    "Done", "convert", "event_count", "event_count_of", "gauge", "guest_fault", "host_fault", "munmap", "operate",
    "zap",
)  # fmt: skip

U = np.uint64
_U0, _U2 = U(0), U(2)
_H_DESCRIPTOR, _H_OPERATE = U(H_DESCRIPTOR), U(H_OPERATE)
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
def _operate(handle, op, flags, vm, space, object_, address, offset, length):
    """One operation as C asks for it, struct pgemu_operation: pgemu_kernels/run/c_calls.py:c_operate()."""
    machine, entry = handle_word(handle, _H_DESCRIPTOR), handle_word(handle, _H_OPERATE)
    if machine == _U0:
        return Done(CLOSED, _U0)
    if entry == _U0:
        return Done(NOT_LOADED, _U0)
    o, detail = stack_words(9), stack_words(1)
    o[0], o[1], o[2], o[3], o[4], o[5] = op, flags, _U0, vm, space, object_
    o[6], o[7], o[8], detail[0] = address, offset, length, _U0
    status = call_address(entry, (machine, address_of(o), address_of(detail)))
    return Done(status, detail[0])


@compiled(
    handle=HANDLE, op=NUMBER, flags=FLAGS, vm=NUMBER, space=NUMBER, object_=NUMBER, address=NUMBER, offset=NUMBER,
    length=NUMBER,
)  # fmt: skip
def operate(handle, op, flags, vm, space, object_, address, offset, length):
    """operate(handle, op, flags, vm, space, object_, address, offset, length) -> Done: any operation by its code.

    The arguments are the columns of a trace (pgemu.trace.COLUMNS): op a pgemu.Operation, flags pgemu.Flag bits,
    vm and space numbers below 65536 of a VM and a process, object_ that of a file, a slot or a pin (below 2**32),
    the others bytes. See Machine.operate(). REFUSED for what fits no column. Machine code that the handle was not made
    with is loaded when it is needed first, which takes Python and time.
    """
    return _operate(handle, U(op), flag_bits(flags), U(vm), U(space), U(object_), U(address), U(offset), U(length))


@compiled(handle=HANDLE, space=NUMBER, address=NUMBER, flags=FLAGS)
def host_fault(handle, space, address, flags):
    """host_fault(handle, space, address, flags) -> Done: an access of a process (AddressSpace.space), as its touch().

    flags: 0, or bits of pgemu.Flag: WRITE, EXEC. detail: the level of the leaf. status of a process that does not
    exist: VmFault.SIGSEGV, as of an address where it has nothing.
    """
    return _operate(handle, _HOST_FAULT, flag_bits(flags), _U0, U(space), _U0, U(address), _U0, _U0)


@compiled(handle=HANDLE, vm=NUMBER, gpa=NUMBER, flags=FLAGS)
def guest_fault(handle, vm, gpa, flags):
    """guest_fault(handle, vm, gpa, flags) -> Done: an access of a guest (Vm.vm), as Vm.touch().

    flags: 0, or bits of pgemu.Flag: WRITE, EXEC, PRIVATE or SHARED, ACCEPT_4K. detail: the level of the leaf. status of
    a VM that does not exist: -EBADF. A fault may replace leaves that a TLB has, see convert().
    """
    return _operate(handle, _GUEST_FAULT, flag_bits(flags), U(vm), _U0, _U0, U(gpa), _U0, _U0)


@compiled(handle=HANDLE, inode=NUMBER, offset=NUMBER, length=NUMBER, shared=TRUTH)
def convert(handle, inode, offset, length, shared):
    """convert(handle, inode, offset, length, shared) -> Done: as GuestMemfd.convert() (inode: GuestMemfd.inode).

    shared: True (1) to shared, False (0) to private. status of an inode that does not exist: -EBADF.

    It does not say what TLBs must forget, and that is more than the range: a leaf of 2M or 1G goes as a whole. Compare
    event_count(handle, Event.TLB_FLUSH_VM) with what it was when the TLB was last empty or right: if it has grown, all
    that the TLB has of VMs is to be forgotten; Event.TLB_FLUSH_MM tells the same of processes (`kernels`, "TLBs").
    """
    flags = _SHARED if U(shared) != _U0 else _PRIVATE
    return _operate(handle, _CONVERT, flags, _U0, _U0, U(inode), _U0, U(offset), U(length))


@compiled(handle=HANDLE, space=NUMBER, address=NUMBER, length=NUMBER)
def zap(handle, space, address, length):
    """zap(handle, space, address, length) -> Done: clear a process's entries of a range, as AddressSpace.zap().

    What TLBs must forget is told by Event.TLB_FLUSH_MM, and of the process's VMs by TLB_FLUSH_VM: see convert(). status
    of a process that does not exist: -EINVAL.
    """
    return _operate(handle, _ZAP, _U0, _U0, U(space), _U0, U(address), _U0, U(length))


@compiled(handle=HANDLE, space=NUMBER, address=NUMBER, length=NUMBER)
def munmap(handle, space, address, length):
    """munmap(handle, space, address, length) -> Done: as AddressSpace.munmap(). TLBs, no process: as zap()."""
    return _operate(handle, _MUNMAP, _U0, _U0, U(space), _U0, U(address), _U0, U(length))


@compiled(handle=HANDLE, event=NUMBER)
def event_count(handle, event):
    """event_count(handle, event) -> int64: how often a pgemu.Event was counted, for all operations and edits.

    Or CLOSED, or REFUSED for another number. If TLB_FLUSH_VM has grown since the last look, VMs were flushed, it does
    not say which; TLB_FLUSH_MM: processes; TLB_FLUSH_KERNEL: kernel addresses. help(pgemu.Event) has a line on each.
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
    """event_count_of(handle, op, event) -> int64: the same for one pgemu.Operation (0: edits of page tables)."""
    if handle_word(handle, _H_DESCRIPTOR) == _U0:
        return np.int64(CLOSED)
    if U(op) >= _OPERATIONS or U(event) >= _EVENTS:
        return np.int64(REFUSED)
    return machine_of(handle).stats[_COUNTERS + U(op) * _EVENTS + U(event)]


@compiled(handle=HANDLE, gauge=NUMBER)
def gauge(handle, gauge):
    """gauge(handle, gauge) -> int64: a pgemu.Gauge now (FRAMES_USED: frames); or CLOSED, REFUSED."""
    if handle_word(handle, _H_DESCRIPTOR) == _U0:
        return np.int64(CLOSED)
    if U(gauge) >= _GAUGE_COUNT:
        return np.int64(REFUSED)
    return machine_of(handle).stats[_GAUGES + U(gauge) * _U2]
