"""Names of what operations return, as kernel sources spell them. Needs no compiler."""

from __future__ import annotations

from pgemu_kernels import words as W
from pgemu_kernels.words.operations import Operation

__all__ = ("errno_name", "operation_name", "result_name")

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


def operation_name(op: Operation) -> str:
    """Return how tables and JSON call an operation: "guest fault"."""
    return op.name.lower().replace("_", " ")


def errno_name(number: int) -> str:
    """Return "EAGAIN" for 11; "errno 999" where there is no name."""
    return _ERRNO.get(number, f"errno {number}")


def result_name(op: Operation, status: int) -> str:
    """Return the name of a status: "RET_PF_FIXED", "VM_FAULT_NOPAGE", "present", "ok", "-EAGAIN".

    A host fault that finds its entry in place returns 0, which is "present".
    """
    if status < 0:
        return f"-{errno_name(-status)}"
    if op is Operation.GUEST_FAULT:
        return _RET_PF.get(status, f"RET_PF {status}")
    if status == 0:
        return "present" if op is Operation.HOST_FAULT else "ok"
    return _VM_FAULT.get(status, f"status {status:#x}")
