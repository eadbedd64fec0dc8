"""The entry that conversions and holes call where devices map a guest_memfd without holding its pages.

It is called inside another entry's operation, by its address in the descriptor: see gmem/revocation.py.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.compile import entry
from pgemu_kernels.engine.handle import open_full_machine
from pgemu_kernels.iommu.revocation import give_to_domains, take_from_domains
from pgemu_kernels.words.requests import TAKE_PAGES


@entry
def tell_devices(descriptor, what, op, inode, start, end):
    """TAKE_PAGES, RETURN_PAGES: of an operation's record, pages [start, end) of an inode. 0."""
    m = open_full_machine(descriptor)
    if what == np.uint64(TAKE_PAGES):
        take_from_domains(m, op, inode, start, end)
    else:
        give_to_domains(m, op, inode, start, end)
    return np.int64(0)
