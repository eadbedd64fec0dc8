"""What KVM's MMU notifier does to pages that KVM itself has mapped by a gfn_to_pfn_cache.

A kvm_host_map of kvm_vcpu_map() is not told: nothing takes its frame away. Rows are made in gmem/mapped_pages.py.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import U0
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.handle import full_only
from pgemu_kernels.words.mapped_pages import K_HVA, K_KIND, K_SPACE, K_VALID, K_WORDS, MAPPED_CACHE
from pgemu_kernels.words.registers import R_MAPPED, R_NOTIFIER
from pgemu_kernels.words.rows import STATE_MAPPED

U = np.uint64
_WORDS = U(K_WORDS)


@kernel
def mapped_row(i):
    return STATE_MAPPED + i * _WORDS


@outlined
def _invalidate(state, space, start, end):
    """virt/kvm/pfncache.c:gfn_to_pfn_cache_invalidate_start() of every VM of a process."""
    for i in range(state[R_MAPPED]):
        row = mapped_row(i)
        if state[row + K_KIND] == MAPPED_CACHE and state[row + K_SPACE] == space and start <= state[row + K_HVA] < end:
            state[row + K_VALID] = U0


@kernel
def _invalidate_any(m, space, start, end):
    if m.state[R_MAPPED] != U0 and m.state[R_NOTIFIER] != U0:
        _invalidate(m.state, space, start, end)


# Userspace addresses [start, end) of a process (m, space, start, end) are about to change; the fast loops know no such
# cache.
invalidate_caches = full_only(_invalidate_any, None)
