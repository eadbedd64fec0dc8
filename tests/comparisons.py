"""A small trace that exercises every simulated operation, and what both designs make of it."""

from __future__ import annotations

from collections import Counter
from functools import cache

from pgemu.experiments.compare import Comparison, compare
from pgemu.trace import Flag, Layout, Lowered, Operation, Records, Region, Slot
from pgemu.trace.lowered import Accounting, Init
from pgemu_kernels.words.operations import PAGE_2M, PAGE_4K

HVA = 0x7F00_0000_0000
INODE = 4 * PAGE_2M
SIZE = {"length": INODE}


def lowered(records: list[Records], init: Init = "private", source: str = "made by hand") -> Lowered:
    """Records as a trace over an inode of four 2M pages at GPA 0."""
    joined = Records.concatenate(records)
    events = Counter({"record": len(joined)})
    return Lowered(
        joined,
        Layout(INODE, PAGE_2M, (Region(HVA, 0, INODE),), (Slot(0, 0, INODE, HVA),), (), "given"),
        init,
        bool((joined.op == Operation.CONVERT).any()),
        Accounting(events=len(joined), inputs=events, operations=len(joined)),
        source,
    )


def setup() -> list[Records]:
    """Map and bind the inode."""
    return [
        Records.build(1, op=Operation.MMAP, address=HVA, length=INODE),
        Records.build(1, op=Operation.BIND, address=0, length=INODE),
    ]


def one(op: Operation, flags: int = 0, **columns: int) -> Records:
    """One record."""
    return Records.build(1, op=op, flags=flags, **columns)


def mixed_records() -> list[Records]:
    """Eighteen operations; comments say what each returns, restructure first where the designs differ."""
    return [
        *setup(),  # ok, ok
        one(Operation.GUEST_FAULT, address=0),  # RET_PF_FIXED at 2M
        one(Operation.GUEST_FAULT, address=PAGE_4K),  # RET_PF_SPURIOUS
        one(Operation.HOST_FAULT, address=HVA),  # VM_FAULT_SIGBUS: private
        one(Operation.CONVERT, Flag.SHARED, offset=0, length=PAGE_4K),  # ok: a split, or only a zap
        one(Operation.HOST_FAULT, address=HVA),  # VM_FAULT_LOCKED or VM_FAULT_NOPAGE
        one(Operation.HOST_FAULT, address=HVA),  # present
        one(Operation.GET, offset=0),  # ok
        one(Operation.CONVERT, Flag.PRIVATE, offset=0, length=PAGE_4K),  # -EAGAIN, or ok
        one(Operation.PUT, offset=0),  # ok
        one(Operation.CONVERT, Flag.PRIVATE, offset=0, length=PAGE_4K),  # ok: a merge, or nothing left to do
        one(Operation.CONVERT, Flag.SHARED, offset=0, length=100 * INODE),  # -EINVAL: past the end
        one(Operation.ZAP, Flag.MADVISE, address=HVA, length=PAGE_4K),  # ok, or -EINVAL: VM_PFNMAP
        one(Operation.PUNCH_HOLE, offset=PAGE_2M, length=PAGE_2M),  # ok
        one(Operation.MUNMAP, address=HVA, length=PAGE_2M),  # ok
        one(Operation.UNBIND, address=0),  # ok
        one(Operation.GUEST_ACCESS, address=0),  # -EOPNOTSUPP: not simulated
    ]


@cache
def mixed() -> Comparison:
    """The mixed trace on both designs, checked after every operation."""
    return compare(lowered(mixed_records()), check="every")


@cache
def converts_nothing() -> Comparison:
    """One host fault and one guest fault on shared memory."""
    faults = [one(Operation.HOST_FAULT, address=HVA), one(Operation.GUEST_FAULT, address=PAGE_2M)]
    return compare(lowered([*setup(), *faults], "shared"))
