"""The operation loops of the designs, of default machines and of all others.

Operations come as columns; a column of one element stands for all of them. Stretches of the same
operation run through a loop of their own, which spares the switch inside and leaves room to prefetch.
Each loop is compiled for both types of machine: for default ones what others have is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pgemu_kernels.engine.bits import (
    LOW8,
    U0,
    U1,
)
from pgemu_kernels.engine.charge import charge_one, finish_operation, forget_last, result
from pgemu_kernels.engine.choice import by_number
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.handle import full_only
from pgemu_kernels.engine.numba_internals import call_address
from pgemu_kernels.engine.records import BATCH, element, load, save_result
from pgemu_kernels.gmem import dirty_logging, fallocate, lru, orders, pins, prefault, references, truncation, workers
from pgemu_kernels.gmem.faults import guest_fault, host_fault
from pgemu_kernels.gmem.mbind import operate_policy
from pgemu_kernels.gmem.resuming import finish_spins
from pgemu_kernels.kvm import binding
from pgemu_kernels.process.madvise import zap_mappings
from pgemu_kernels.process.mmap import mmap
from pgemu_kernels.process.munmap import munmap
from pgemu_kernels.rules.invariants import check_operation
from pgemu_kernels.run.prefetching import prefetch_converts, prefetch_guests, prefetch_hosts
from pgemu_kernels.run.routing import has_own_entry, is_full, is_of, is_ordinary, stopped_at
from pgemu_kernels.words.enum_words import (
    EVENT_CONVERT_IOCTL,
    EVENT_SYSCALL,
    OP_ALLOCATE,
    OP_BIND,
    OP_CLOSE,
    OP_CONVERT,
    OP_DIRTY_LOGGING,
    OP_GET,
    OP_GUEST_FAULT,
    OP_HOST_FAULT,
    OP_LRU_DRAIN,
    OP_MEMORY_POLICY,
    OP_MMAP,
    OP_MUNMAP,
    OP_PIN,
    OP_PREFAULT,
    OP_PUNCH_HOLE,
    OP_PUT,
    OP_RELEASE,
    OP_UNBIND,
    OP_UNPIN,
    OP_WORK,
    OP_ZAP,
)
from pgemu_kernels.words.operations import EOPNOTSUPP, OPS_FOUNDING
from pgemu_kernels.words.registers import R_CHECK, R_ORDINARY
from pgemu_kernels.words.rows import (
    O_OP,
)

U = np.uint64

LOOP_FAULTS = U0  # entries that run stretches on default machines, by their place in entries.py
LOOP_CONVERTS = U1
LOOP_OTHERS = U(2)
LOOP_SHIFT = U(60)  # above routing.stopped_at()'s


@kernel
def save(m, op, columns, i):
    """Finish the operation, check it if asked to, hand out its result, and go on with what spun for a reference."""
    finish_operation(m, op)
    if m.state[R_CHECK] != U0:
        check_operation(m, op)
    save_result(m.state, op, columns, i)
    finish_spins(m)


# --------------------------------------------------------------------------- one loop per operation


def in_batches(prefetch: Callable[..., Any], operate: Callable[..., Any]) -> Callable[..., Any]:
    """A loop (m, columns, first, last) over operations, what each batch of them will touch asked for before."""

    @outlined
    def run_batches(m, columns, first, last):
        while first < last:
            stop = min(last, first + BATCH)
            prefetch(m, columns, first, stop)
            for i in range(first, stop):
                op = load(m, columns, i)
                operate(m, op)
                save(m, op, columns, i)
            first = stop

    return run_batches


@kernel
def operate_convert(m, op):
    charge_one(m, EVENT_CONVERT_IOCTL)
    orders.convert(m, op)


@kernel
def operate_zap(m, op):
    charge_one(m, EVENT_SYSCALL)
    zap_mappings(m, op)


host_faults = in_batches(prefetch_hosts, host_fault)
guest_faults = in_batches(prefetch_guests, guest_fault)
converts = in_batches(prefetch_converts, operate_convert)
zaps = in_batches(prefetch_hosts, operate_zap)


@kernel
def refuse(m, op, kind):
    """An operation that the designs do not know."""
    return result(m.state, op, np.int64(-EOPNOTSUPP))


# Operations that default machines leave to others.
run_beyond = full_only(
    by_number(
        (
            (OP_RELEASE, truncation.release),
            (OP_WORK, workers.operate_work),
            (OP_PIN, pins.operate_pin),
            (OP_UNPIN, pins.operate_unpin),
            (OP_LRU_DRAIN, lru.operate_drain),
            (OP_PREFAULT, prefault.prefault),
            (OP_DIRTY_LOGGING, dirty_logging.set_dirty_logging),
            (OP_ALLOCATE, fallocate.allocate),
            (OP_MEMORY_POLICY, operate_policy),
        ),
        refuse,
    ),
    refuse,
)
run_any = by_number(
    (
        (OP_ZAP, zap_mappings),
        (OP_PUNCH_HOLE, truncation.punch),
        (OP_MMAP, mmap),
        (OP_MUNMAP, munmap),
        (OP_BIND, binding.bind),
        (OP_UNBIND, binding.unbind),
        (OP_GET, references.get),
        (OP_PUT, references.put),
        (OP_CLOSE, truncation.close),
    ),
    run_beyond,
)


@outlined
def run_kind(m, op):
    """Run an operation that is one step; its system call is charged already."""
    run_any(m, op, m.state[op + O_OP])


@outlined
def others(m, columns, first, last):
    for i in range(first, last):
        op = load(m, columns, i)
        charge_one(m, EVENT_SYSCALL)
        run_kind(m, op)
        save(m, op, columns, i)


# --------------------------------------------------------------------------- stretches


@kernel
def last_of_kind(header, kind, first, count):
    """The end of a stretch of operations of one kind."""
    last = first + U1
    while last < count and header[last] & LOW8 == kind:
        last += U1
    return last


@kernel
def is_others(m, header):
    """Whether a default machine leaves an operation to the loops that know every parameter, and is none any more."""
    return is_full(m.state, header)


@kernel
def is_nobodys(m, header):
    """Those loops are the last ones."""
    return False


leaves = full_only(is_nobodys, is_others)


@kernel
def end_of_stretch(m, columns, kind, first, count):
    """The end of a stretch of operations of one kind that are the designs': `first` where there is none."""
    header = columns.header
    if m.state[R_ORDINARY] == U0 and not is_of(OPS_FOUNDING, kind):
        return count if U(header.size) <= U1 else last_of_kind(header, kind, first, count)
    last = first
    while last < count and element(header, last) & LOW8 == kind:
        word = element(header, last)
        if leaves(m, word) or is_ordinary(m.state, word, element(columns.object, last), element(columns.address, last)):
            break
        last += U1
    return last


@kernel
def run_here(m, columns, kind, first, last, loops):
    """Run a stretch of operations of one kind: 0."""
    if kind == OP_HOST_FAULT:
        host_faults(m, columns, first, last)
    elif kind == OP_GUEST_FAULT:
        guest_faults(m, columns, first, last)
    elif kind == OP_CONVERT:
        converts(m, columns, first, last)
    elif kind == OP_ZAP:
        zaps(m, columns, first, last)
    else:
        others(m, columns, first, last)
    return U0


@kernel
def run_elsewhere(m, columns, kind, first, last, loops):
    """The same by an entry of its own: 0, or 1 + which one it is, where its address is not there yet."""
    loop = LOOP_OTHERS
    if kind == OP_HOST_FAULT or kind == OP_GUEST_FAULT:
        loop = LOOP_FAULTS
    elif kind == OP_CONVERT:
        loop = LOOP_CONVERTS
    descriptor, addresses = loops
    if addresses[loop] == U0:
        return loop + U1
    call_address(addresses[loop], (descriptor, columns.header, columns.object, columns.address, columns.offset,
                                   columns.length, columns.status, columns.detail, first, last))  # fmt: skip
    return U0


run_stretch = full_only(run_here, run_elsewhere)


@kernel
def run_stretches(m, columns, first, loops):
    """Run operations from `first` on, in order, up to one that is for another entry: stopped_at().

    See Columns for the arrays, and routing.py for the entries. `loops`: the descriptor and, of default machines, the
    addresses of the entries that run stretches. Where one is missing: the index and 1 + its number << LOOP_SHIFT.
    """
    count = U(columns.status.size)
    finish_spins(m)  # a device may have let go of what one waits for
    while first < count:
        kind = element(columns.header, first) & LOW8
        if has_own_entry(kind) or leaves(m, element(columns.header, first)):
            break
        last = end_of_stretch(m, columns, kind, first, count)
        if last == first:
            break
        forget_last(m.stats)
        missing = run_stretch(m, columns, kind, first, last, loops)
        if missing != U0:
            return first | missing << LOOP_SHIFT
        first = last
    return stopped_at(m.state, columns, first)
