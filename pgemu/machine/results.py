"""What operations return, and its names as kernel sources spell them. Needs no compiler."""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np

from pgemu.machine.arrays import I64, U64
from pgemu.machine.short import column, counted, html_table
from pgemu_kernels import words as W
from pgemu_kernels.words.operations import Operation

__all__ = (
    "RESULTS_OF", "RESULT_OF", "Errno", "Result", "Results", "RetPf", "VmFault", "errno_name", "operation_name",
    "result_name", "status_name",
)  # fmt: skip


class RetPf(IntEnum):
    """What a guest fault returns: arch/x86/kvm/mmu/mmu_internal.h, RET_PF_*."""

    CONTINUE = W.RET_PF_CONTINUE
    RETRY = W.RET_PF_RETRY
    EMULATE = W.RET_PF_EMULATE
    WRITE_PROTECTED = W.RET_PF_WRITE_PROTECTED
    INVALID = W.RET_PF_INVALID
    FIXED = W.RET_PF_FIXED
    SPURIOUS = W.RET_PF_SPURIOUS


class VmFault(IntEnum):
    """What a host fault returns: include/linux/mm_types.h, VM_FAULT_*. PRESENT is none of them: there was no fault."""

    PRESENT = 0
    OOM = W.VM_FAULT_OOM
    SIGBUS = W.VM_FAULT_SIGBUS
    HWPOISON = W.VM_FAULT_HWPOISON
    HWPOISON_LARGE = W.VM_FAULT_HWPOISON_LARGE
    SIGSEGV = W.VM_FAULT_SIGSEGV
    NOPAGE = W.VM_FAULT_NOPAGE
    LOCKED = W.VM_FAULT_LOCKED
    RETRY = W.VM_FAULT_RETRY


class Errno(IntEnum):
    """Errors as Linux numbers them, whatever system pgemu runs on: a status is `-Errno.EAGAIN`."""

    EPERM = W.EPERM
    ENOENT = W.ENOENT
    EINTR = W.EINTR
    EIO = W.EIO
    ENXIO = W.ENXIO
    EBADF = W.EBADF
    EAGAIN = W.EAGAIN
    ENOMEM = W.ENOMEM
    EACCES = W.EACCES
    EFAULT = W.EFAULT
    EBUSY = W.EBUSY
    EEXIST = W.EEXIST
    ENODEV = W.ENODEV
    EINVAL = W.EINVAL
    ENOTTY = W.ENOTTY
    ENOSPC = W.ENOSPC
    ERANGE = W.ERANGE
    EOVERFLOW = W.EOVERFLOW
    EBADFD = W.EBADFD
    EOPNOTSUPP = W.EOPNOTSUPP
    EADDRINUSE = W.EADDRINUSE
    EHWPOISON = W.EHWPOISON


def _names(kind: type[IntEnum], prefix: str) -> dict[int, str]:
    """Names as kernel sources spell them, by value."""
    return {int(member): f"{prefix}{member.name}" for member in kind}


_RET_PF, _VM_FAULT, _ERRNO = _names(RetPf, "RET_PF_"), _names(VmFault, "VM_FAULT_"), _names(Errno, "")


class Results(NamedTuple):
    """What operations returned.

    status: int64[n], 0, a VM_FAULT_* or RET_PF_* code, or -errno, as the kernel's function returns it.
    detail: uint64[n], the leaf level of a fault (1 = 4K, 2 = 2M, 3 = 1G), the failing offset of a refused
    conversion or hole, the frame number of a reference.
    """

    status: I64
    detail: U64

    @property
    def operation(self) -> Operation | None:
        """What was run, if it was of one kind: it decides how a status is called."""
        return None

    @property
    def names(self) -> list[str]:
        """What each returned, by name, in their order: ["RET_PF_FIXED", "-EAGAIN"]."""
        values, of = np.unique(self.status, return_inverse=True)
        named = [status_name(self.operation, status) for status in values.tolist()]
        return [named[i] for i in of.tolist()]

    @property
    def outcomes(self) -> dict[str, int]:
        """How many returned what, by name, the smallest status first: {"-EAGAIN": 1, "ok": 3}."""
        values, counts = np.unique(self.status, return_counts=True)
        named = zip(values.tolist(), counts.tolist(), strict=True)
        return {status_name(self.operation, status): n for status, n in named}

    def __repr__(self) -> str:
        return f"Results({self.status.size:,}: {counted(self.outcomes)}; detail={column(self.detail)})"

    def _repr_html_(self) -> str:
        return html_table(("status", "how many"), self.outcomes.items(), len(self.outcomes))


class Result(NamedTuple):
    """The same of one operation.

    >>> Result(-11, 4096)
    Result(status=-EAGAIN, detail=4096)
    """

    status: int
    detail: int

    @property
    def operation(self) -> Operation | None:
        """What was run, if that is known: it decides how a status is called."""
        return None

    @property
    def name(self) -> str:
        """What it returned, by name: "RET_PF_FIXED", "VM_FAULT_SIGBUS", "-EAGAIN", "ok"."""
        return status_name(self.operation, self.status)

    @property
    def code(self) -> RetPf | VmFault | Errno | None:
        """What it returned, as a member: RetPf of a guest fault, VmFault of a host fault, Errno (positive) of an error.

        None where there is none: success of other operations, "would spin".
        """
        if self.status < 0:
            return Errno(-self.status) if -self.status in _ERRNO else None
        return _CODES.get(self.operation, {}).get(self.status)

    def __repr__(self) -> str:
        return f"Result(status={self.name if self.status else 0}, detail={self.detail})"

    def _repr_html_(self) -> str:
        return html_table(("status", "detail"), [(self.name, self.detail)])


_CODES: dict[Operation | None, dict[int, RetPf | VmFault]] = {
    Operation.GUEST_FAULT: {int(member): member for member in RetPf},
    Operation.HOST_FAULT: {int(member): member for member in VmFault},
}


def _again(kind: type[Result] | type[Results], op: Operation | None, values: tuple[Any, ...]) -> Any:
    """Make a result of an operation: what pickle and copy call."""
    known: tuple[Any, ...] = RESULT_OF if kind is Result else RESULTS_OF
    return (kind if op is None else known[op])._make(values)


def _reduce(self: Any) -> Any:
    kind = Result if isinstance(self, Result) else Results
    return _again, (kind, self.operation, tuple(self))


def _of(kind: Any) -> tuple[Any, ...]:
    """The results of each operation: tuples as all are, which know how their statuses are called."""
    found = [kind] * 256
    for op in Operation:
        found[op] = type(kind.__name__, (kind,), {"__slots__": (), "operation": op, "__reduce__": _reduce})
    return tuple(found)


def operation_name(op: Operation) -> str:
    """Return how tables and JSON call an operation: "guest fault"."""
    return op.name.lower().replace("_", " ")


def errno_name(number: int) -> str:
    """Return "EAGAIN" for 11; "errno 999" where there is no name."""
    return _ERRNO.get(number, f"errno {number}")


def result_name(op: Operation, status: int) -> str:
    """Return the name of a status: "RET_PF_FIXED", "VM_FAULT_NOPAGE", "present", "ok", "-EAGAIN", "would spin".

    A host fault that finds its entry in place returns 0, which is "present".
    """
    if status == -W.WOULD_SPIN:
        return "would spin"
    if status < 0:
        return f"-{errno_name(-status)}"
    if op is Operation.GUEST_FAULT:
        return _RET_PF.get(status, f"RET_PF {status}")
    if status == 0:
        return "present" if op is Operation.HOST_FAULT else "ok"
    return _VM_FAULT.get(status, f"status {status:#x}")


def status_name(op: Operation | None, status: int) -> str:
    """The same of an operation that may not be known: codes that are no errors are then numbers."""
    if op is None and status > 0:
        return f"status {status:#x}"
    return result_name(Operation.CONVERT if op is None else op, status)


RESULT_OF: tuple[type[Result], ...] = _of(Result)
RESULTS_OF: tuple[type[Results], ...] = _of(Results)
"""By number of the operation, a byte; those of a number that is none are plain."""
