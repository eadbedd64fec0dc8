"""A process's memory as mainline Linux has it: mmap, faults, munmap, mprotect, MADV_DONTNEED, fork, exit."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.compile import outlined
from pgemu_kernels.layout import EOPNOTSUPP
from pgemu_kernels.steps import stop


@outlined
def operate(m, op):
    """Run one operation of a process."""
    return stop(m.state, op, np.int64(-EOPNOTSUPP))
