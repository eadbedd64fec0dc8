"""What KVM asks of a process's memory (stand-in: an anonymous page behind every address)."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.bits import NONE, U0, U1, U12
from pgemu_kernels.compile import outlined
from pgemu_kernels.events import ANONYMOUS_PAGES, change
from pgemu_kernels.formats import ADDRESS, FILE_LEAF
from pgemu_kernels.host import space_root
from pgemu_kernels.layout import ENOMEM
from pgemu_kernels.memory import take_frame
from pgemu_kernels.paging import count_host_leaf, host_slot

U = np.uint64


@outlined
def host_fault_in(m, space, address, write, execute):
    slot = host_slot(m, space_root(m.state, space), address >> U12)
    if slot == NONE:
        return np.int64(-ENOMEM), U0, U1, False
    if m.ram[slot] == U0:
        frame = take_frame(m)
        if frame == NONE:
            return np.int64(-ENOMEM), U0, U1, False
        m.ram[slot] = frame << U12 | U(FILE_LEAF)
        change(m.stats, ANONYMOUS_PAGES, 1)
        count_host_leaf(m, 1)
    return np.int64(0), (m.ram[slot] & U(ADDRESS)) >> U12, U1, True
