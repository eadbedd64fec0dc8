"""KVM_PRE_FAULT_MEMORY: guest memory is mapped without an access. virt/kvm/kvm_main.c, arch/x86/kvm/mmu/mmu.c"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U12, U4095
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.geometry import pages_of
from pgemu_kernels.engine.memslots import find_memslot
from pgemu_kernels.engine.rows import vm_row
from pgemu_kernels.kvm.attributes import is_private
from pgemu_kernels.kvm.fault import ATTEMPTS, frame_is_private, load_root, no_slot, page_fault
from pgemu_kernels.words.operations import (
    EBUSY,
    EINVAL,
    ENOENT,
    RET_PF_EMULATE,
    RET_PF_FIXED,
    RET_PF_RETRY,
    RET_PF_SPURIOUS,
)
from pgemu_kernels.words.rows import O_ADDRESS, O_DETAIL, O_LENGTH, O_VM


@outlined
def prefault_outside(m, vm, gfn):
    """Where no slot is: -ENOENT, once the MMIO entry is cached, or what kept it from that."""
    row = vm_row(vm)
    load_root(m.state, row)
    status, _ = no_slot(m, row, gfn, frame_is_private(m, row, gfn))
    return np.int64(-ENOENT) if status == RET_PF_EMULATE else status


@kernel
def tdp_map_page(m, op, gfn):
    """x86/kvm/mmu/mmu.c:kvm_tdp_map_page() with prefetch: (0 or -errno, level). -EBUSY: Linux goes on trying."""
    vm = m.state[op + O_VM]
    if find_memslot(m.state, vm, gfn) == NONE:
        return prefault_outside(m, vm, gfn), U0
    status = np.int64(RET_PF_RETRY)
    level = U0
    private = is_private(m, vm_row(vm), gfn)
    for _ in range(ATTEMPTS):
        status, level = page_fault(m, vm, gfn, U0, True, private)
        if status != RET_PF_RETRY:
            break
    if status == RET_PF_FIXED or status == RET_PF_SPURIOUS:
        return np.int64(0), level
    if status == RET_PF_RETRY:
        return np.int64(-EBUSY), level
    return np.int64(-ENOENT) if status == RET_PF_EMULATE else status, level


def prefault_by(map_page: Callable[..., Any]) -> Callable[..., Any]:
    """KVM_PRE_FAULT_MEMORY (m, op): 0, -EINVAL, or what the first page failed with (-ENOENT, -EFAULT, ...).

    detail is how many bytes were populated. It stops at the first page that fails; if any page came before, that is
    success, but for a lock that Linux would wait for (-EBUSY). kvm_main.c:kvm_vcpu_pre_fault_memory().
    """

    @outlined
    def map_pages(m, op):
        state = m.state
        address = state[op + O_ADDRESS]
        length = state[op + O_LENGTH]
        if (address | length) & U4095 != U0 or address + length <= address:
            return np.int64(-EINVAL)
        load_root(state, vm_row(state[op + O_VM]))
        gfn = address >> U12
        end = gfn + (length >> U12)
        status = np.int64(0)
        while gfn < end:
            status, level = map_page(m, op, gfn)
            if status != 0:
                break
            gfn = (gfn & ~(pages_of(level) - U1)) + pages_of(level)
        done = (min(gfn, end) << U12) - address
        state[op + O_DETAIL] = done
        return np.int64(0) if done != U0 and status != -EBUSY else status

    return map_pages


pre_fault_memory = prefault_by(tdp_map_page)
