"""What operations return, and its names as kernel sources spell them. Needs no compiler."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pgemu_kernels import words as W
from pgemu_kernels.words.operations import Operation

__all__ = ("Result", "Results", "errno_name", "operation_name", "result_name")

Array = np.ndarray[Any, Any]

_RET_PF = {value: name for name, value in vars(W).items() if name.startswith("RET_PF_")}
_VM_FAULT = {value: name for name, value in vars(W).items() if name.startswith("VM_FAULT_")}
# The standard library's errno would be that of the system pgemu runs on; these are Linux's.
_ERRNO = {
    getattr(W, name): name
    for name in (
        "ENOENT",
        "EBADF",
        "EBADFD",
        "EAGAIN",
        "ENOMEM",
        "EACCES",
        "EFAULT",
        "EBUSY",
        "EEXIST",
        "ENODEV",
        "EINVAL",
        "ENOSPC",
        "ERANGE",
        "ENOTTY",
        "EOVERFLOW",
        "EOPNOTSUPP",
    )
}


class Results(NamedTuple):
    """What operations returned.

    status: int64[n], 0, a VM_FAULT_* or RET_PF_* code, or -errno, as the kernel's function returns it.
    detail: uint64[n], the leaf level of a fault (1 = 4K, 2 = 2M, 3 = 1G), the failing offset of a refused
    conversion or hole, the frame number of a reference.
    """

    status: Array
    detail: Array


class Result(NamedTuple):
    """The same of one operation."""

    status: int
    detail: int


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
