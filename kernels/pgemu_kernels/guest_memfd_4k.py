"""guest_memfd as merged: a page cache of 4K folios, whose frames are ordinary ones."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.bits import NONE, U0
from pgemu_kernels.compile import outlined
from pgemu_kernels.events import ANONYMOUS_PAGES, PAGE_ZEROED, change, charge_one
from pgemu_kernels.layout import EFAULT, ENOMEM, I_CACHE, I_OPEN, I_PAGES
from pgemu_kernels.memory import fill_frame, put_frame, take_frame
from pgemu_kernels.page_cache import cache_find, cache_store

U = np.uint64


@outlined
def find_or_add_folio(m, node, index):
    """virt/kvm/guest_memfd.c:kvm_gmem_get_folio(): (0, -EFAULT past the end, -ENOMEM; pfn), zeroed at its first use."""
    state = m.state
    if state[node + I_OPEN] == U0 or index >= state[node + I_PAGES]:
        return np.int64(-EFAULT), U0
    pfn = cache_find(m, state[node + I_CACHE], index)
    if pfn != U0:
        return np.int64(0), pfn
    pfn = take_frame(m)
    if pfn == NONE:
        return np.int64(-ENOMEM), U0
    if cache_store(m, node + I_CACHE, index, pfn) != 0:
        put_frame(m, pfn)
        return np.int64(-ENOMEM), U0
    fill_frame(m.ram, pfn, U0)
    change(m.stats, ANONYMOUS_PAGES, 1)
    charge_one(m, PAGE_ZEROED)
    return np.int64(0), pfn
