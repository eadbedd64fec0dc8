"""The entry for devices: DMA_MAP, DMA_UNMAP, DMA_ACCESS, and devices that come and go.

An entry of its own, so that whoever has no devices compiles none of this.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import ALL, LOW8, NONE, U0, U1
from pgemu_kernels.engine.charge import charge_one, finish_operation
from pgemu_kernels.engine.compile import entry, kernel, outlined
from pgemu_kernels.engine.handle import open_full_machine
from pgemu_kernels.engine.records import Columns, element, load, operation_record, save_result
from pgemu_kernels.engine.rows import clear_words, inode_row, stop
from pgemu_kernels.gmem import faults as _gives_process_fault  # noqa: F401
from pgemu_kernels.iommu.access import operate_access
from pgemu_kernels.iommu.domain import domain_row, free_table_of, make_table
from pgemu_kernels.iommu.ioas import ioas_fill, ioas_map, ioas_unfill, ioas_unmap, remove_range
from pgemu_kernels.iommu.type1 import try_domain, type1_clear, type1_map, type1_replay, type1_unmap
from pgemu_kernels.run.routing import finish_other, note_stepped
from pgemu_kernels.words.enum_words import EVENT_SYSCALL, OP_DMA_ACCESS, OP_DMA_MAP, OP_DMA_UNMAP
from pgemu_kernels.words.events import STATS_COUNTERS
from pgemu_kernels.words.operations import EBUSY, EINVAL, ENODEV, EOPNOTSUPP, STOP
from pgemu_kernels.words.registers import R_CHECK, R_COUNTER_ROW, R_DOMAINS, R_INODES, R_SPACES, R_SPINS
from pgemu_kernels.words.requests import ATTACH, CLOSE_DOMAIN, DETACH
from pgemu_kernels.words.rows import (
    ACTORS,
    D_DEVICES,
    D_KIND,
    D_ROOT,
    D_TRIAL,
    D_WORDS,
    DOMAIN_IOAS,
    I_DOMAINS,
    NO_INODE,
    O_ACTIVE,
    O_OBJECT,
    O_OP,
    O_SPACE,
    O_VM,
    STATE_DOMAINS,
)

U = np.uint64


@kernel
def named_domain(m, op):
    """Row of the address space that an operation names, or NONE."""
    number = m.state[op + O_SPACE]
    if number >= m.state[R_DOMAINS] or m.state[domain_row(number) + D_KIND] == U0:
        return NONE
    return domain_row(number)


@outlined
def _map(m, op, d):
    """DMA_MAP: 0 (of an IOAS with the address). Errors are those of the ioctl, of type1 or of iommufd.

    type1: -EINVAL for what is not aligned, empty, without rights, beyond the unit or reserved; -EOVERFLOW (6.12:
    -EINVAL) for a range that wraps; -EEXIST over a mapping; -ENOSPC past dma_entry_limit; -EFAULT where there is no
    memory, none that may be written, or RAM under VM_PFNMAP; -ENOMEM without memory or above RLIMIT_MEMLOCK.
    """
    state = m.state
    if state[op + O_VM] >= state[R_SPACES]:
        return stop(state, op, -EINVAL)
    if state[d + D_KIND] == DOMAIN_IOAS:
        return np.int64(ioas_map(m, op, d))
    if state[op + O_OBJECT] != NO_INODE:
        return stop(state, op, -EOPNOTSUPP)
    return np.int64(type1_map(m, op, d))


@outlined
def _unmap(m, op, d):
    """DMA_UNMAP: 0 with how many bytes went; length all ones: everything.

    type1: -EINVAL for what is not aligned or empty, or would cut a mapping (version 1 removes whole what begins there,
    else nothing). iommufd: -ENOENT where an area would be cut, or nothing is; -EINVAL, -EOVERFLOW.
    """
    if m.state[d + D_KIND] == DOMAIN_IOAS:
        return np.int64(ioas_unmap(m, op, d))
    return np.int64(type1_unmap(m, op, d))


@kernel
def operate_device(m, op):
    """Run one operation of a device or on what it may reach: -ENODEV for an address space that there is not."""
    d = named_domain(m, op)
    kind = m.state[op + O_OP]
    if d == NONE:
        return stop(m.state, op, -ENODEV)
    if kind == OP_DMA_ACCESS:
        return np.int64(operate_access(m, op, d))
    charge_one(m, EVENT_SYSCALL)
    return np.int64(_map(m, op, d)) if kind == OP_DMA_MAP else np.int64(_unmap(m, op, d))


@kernel
def is_of_devices(kind):
    return kind == OP_DMA_MAP or kind == OP_DMA_UNMAP or kind == OP_DMA_ACCESS


@outlined
def step_device(m, actor):
    """All of an actor's operation in one step."""
    op = operation_record(actor)
    note_stepped(m.state, op, U0 - U1)
    operate_device(m, op)
    m.state[op + O_ACTIVE] = U0
    finish_other(m, op)
    return np.int64(STOP)


@outlined
def _attach(m, d):
    """The first device brings the domain, which gets what is mapped."""
    state = m.state
    status = np.int64(0)
    if state[d + D_ROOT] == U0:
        status = make_table(m, d)
        if status == 0:
            if state[d + D_TRIAL] != U0:
                try_domain(m, d)
            status = ioas_fill(m, d) if state[d + D_KIND] == DOMAIN_IOAS else type1_replay(m, d)
            if status != 0 and state[d + D_KIND] == DOMAIN_IOAS:
                free_table_of(m, d)  # ioas_fill() has undone the rest
            elif status != 0:
                _empty(m, d)
    if status == 0:
        state[d + D_DEVICES] += U1
    return status


@outlined
def _empty(m, d):
    """The domain goes: an IOAS keeps its areas, a container has no mappings then."""
    if m.state[d + D_ROOT] != U0:
        if m.state[d + D_KIND] == DOMAIN_IOAS:
            ioas_unfill(m, d, NONE)
        else:
            type1_clear(m, d)
        free_table_of(m, d)


@outlined
def _close(m, d):
    """An IOAS without devices, or a container, goes: 0 or -EBUSY."""
    state = m.state
    if state[d + D_KIND] == DOMAIN_IOAS:
        if state[d + D_DEVICES] != U0:
            return np.int64(-EBUSY)
        remove_range(m, d, U0, ALL)
    else:
        type1_clear(m, d)
        _empty(m, d)
    bit = U1 << (d - STATE_DOMAINS) // U(D_WORDS)
    for inode in range(state[R_INODES]):
        state[inode_row(inode) + I_DOMAINS] &= ~bit
    clear_words(state, d, U(D_WORDS))
    return np.int64(0)


@outlined
def _arrange(m, what, d):
    if what == U(ATTACH):
        return np.int64(_attach(m, d))
    if what == U(CLOSE_DOMAIN):
        return np.int64(_close(m, d))
    if what != U(DETACH) or m.state[d + D_DEVICES] == U0:
        return np.int64(-EINVAL)
    m.state[d + D_DEVICES] -= U1
    if m.state[d + D_DEVICES] == U0:
        _empty(m, d)
    return np.int64(0)


@outlined
def arrange(m, what, number):
    """Attach a device to an address space, detach one, close it (requests.ATTACH, ...): 0 or -errno.

    Charged to counter row 0, which no operation of a trace has.
    """
    d = domain_row(number)
    if number >= m.state[R_DOMAINS] or m.state[d + D_KIND] == U0:
        return np.int64(-ENODEV)
    row = m.state[R_COUNTER_ROW]
    m.state[R_COUNTER_ROW] = STATS_COUNTERS
    status = _arrange(m, what, d)
    m.state[R_COUNTER_ROW] = row
    return np.int64(status)


@entry
def run_devices(descriptor, header, object_, address, offset, length, status, detail, first, actor):
    """Run operations from `first` on, up to one that is for another entry, or after one that released what a conversion
    spins for: its index, or how many there are.

    `actor` below words.ACTORS: do the operation that he began, as one step: STOP. Above: arrange() the address space
    `first`, where words.ACTORS + 1 is requests.ATTACH: what that returns, two's complement.
    """
    m = open_full_machine(descriptor)
    if actor > U(ACTORS):
        return U(arrange(m, actor - U(ACTORS + 1), first))
    if actor < U(ACTORS):
        return U(step_device(m, actor))
    columns = Columns(header, object_, address, offset, length, status, detail)
    count = U(status.size)
    i = first
    last = ALL
    while i < count and is_of_devices(element(header, i) & LOW8):
        op = load(m, columns, i)
        operate_device(m, op)
        kind = m.state[op + O_OP]
        if kind != last or m.state[R_CHECK] != U0:
            finish_other(m, op)
        else:  # what cost the last one of its kind need not be told again
            finish_operation(m, op)
        last = kind
        save_result(m.state, op, columns, i)
        i += U1
        if m.state[R_SPINS] != U0:
            break
    return i
