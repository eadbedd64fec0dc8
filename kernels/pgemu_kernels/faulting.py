"""A host fault of one page inside another operation."""

from __future__ import annotations

import numpy as np

from pgemu_kernels import restructure
from pgemu_kernels.compile import outlined
from pgemu_kernels.layout import O_ADDRESS, O_DETAIL, O_FLAGS, O_STATUS, Flag

U = np.uint64
_WRITE = U(Flag.WRITE)


@outlined
def host_fault_page(m, op, address, write):
    """Fault a page of design restructure in, as its process would: VM_FAULT_* or 0 (int64). The request stays."""
    state = m.state
    asked = state[op + O_ADDRESS]
    flags = state[op + O_FLAGS]
    detail = state[op + O_DETAIL]
    state[op + O_ADDRESS] = address
    state[op + O_FLAGS] = _WRITE if write else U(0)
    restructure.host_fault(m, op)
    status = np.int64(state[op + O_STATUS])
    state[op + O_ADDRESS] = asked
    state[op + O_FLAGS] = flags
    state[op + O_DETAIL] = detail
    return status
