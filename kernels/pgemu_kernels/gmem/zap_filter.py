"""Which leaves a conversion drops: of which kinds of memory, and what has to be split before.

With one root for private and shared memory the filter says nothing: both kinds go. It chooses where there are two.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import U0
from pgemu_kernels.engine.compile import kernel, step
from pgemu_kernels.engine.handle import full_only
from pgemu_kernels.stage2.invalidate import flush_vms, kvm_gmem_split_private, zap_beyond, zap_found
from pgemu_kernels.words.registers import R_ZAP_FILTER
from pgemu_kernels.words.rows import FILTER_BOTH, FILTER_PRIVATE, FILTER_SHARED, O_INODE, O_TO_PRIVATE


@kernel
def chosen_kinds(m, op):
    """Which kinds of memory (FILTER_*) a conversion zaps: both, or only that which is left.

    kvm-x86 e088c7f86bef of in-place conversion, and the branch of December 2025: both; older forms: that which is left.
    """
    if m.state[R_ZAP_FILTER] != U0:
        return FILTER_BOTH
    return FILTER_SHARED if m.state[op + O_TO_PRIVATE] != U0 else FILTER_PRIVATE


zapped_kinds = full_only(chosen_kinds, FILTER_BOTH)  # with one root it says nothing


@step
def zap_kind(m, op, vms, start, end, first, last):
    """Drop the leaves over pages [start, end) from stage 2: from that of `vms`, a bit each, the others have none.

    first, last: the pages that are converted; what a wider zap drops beyond them is counted.
    Where private and shared pages share one root (all but TDX), kvm_tdp_mmu_unmap_gfn_range() cannot tell them apart:
    both kinds go, whatever the filter says.
    """
    dropped = zap_found(m, vms, m.state[op + O_INODE], first, last, zapped_kinds(m, op))
    if start < first or last < end:
        dropped += zap_beyond(m, vms, m.state[op + O_INODE], start, end, zapped_kinds(m, op))
    if dropped != 0:
        flush_vms(m)


@kernel
def split_crossing(m, op, vms, start, end):
    """Before the zap: split private leaves that cross its border, where firmware owns them: 0 or -ENOMEM.

    The branch does so to shared only; that a conversion to private that zaps both kinds has to is inference.
    """
    if zapped_kinds(m, op) & FILTER_PRIVATE == U0:
        return np.int64(0)
    return kvm_gmem_split_private(m, vms, m.state[op + O_INODE], start, end)


split_before_zap = full_only(split_crossing, np.int64(0))
