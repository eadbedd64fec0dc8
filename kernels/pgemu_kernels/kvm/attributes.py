"""Memory attributes of a VM: which guest frames are private, a bit each in a radix tree (Linux: an xarray).

arch/x86/kvm/mmu/mmu.c, virt/kvm/kvm_main.c. Plain VMs have no private memory.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import ALL, U0, U1, U6, U9, U12, U63, U4095
from pgemu_kernels.engine.charge import charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.frames import frames_left
from pgemu_kernels.engine.geometry import pages_of
from pgemu_kernels.engine.memslots import first_slot, next_slot
from pgemu_kernels.engine.rows import vm_row
from pgemu_kernels.engine.shareability import mask_at
from pgemu_kernels.folios.page_cache import cache_find, cache_store
from pgemu_kernels.stage2.invalidate import flush_vms, zap_slot
from pgemu_kernels.words.enum_words import EVENT_ATTRIBUTES_STORED, FLAG_PRIVATE, FLAG_SHARED
from pgemu_kernels.words.operations import EINVAL, ENOMEM
from pgemu_kernels.words.rows import (
    FILTER_PRIVATE,
    FILTER_SHARED,
    M_BASE_GFN,
    M_PAGES,
    O_ADDRESS,
    O_FLAGS,
    O_LENGTH,
    O_VM,
    V_ATTRIBUTES,
    V_PROTECTED,
    V_SEQUENCE,
)

U = np.uint64
_GUEST_ADDRESSES = U(1 << 48)  # what four levels of stage 2 reach
_MOST_NODES = U(8)  # nodes that one store may need beside the lowest one


@kernel
def is_private(m, row, gfn):
    """Whether the attributes of a VM (`row` of V_*) make a guest frame private."""
    root = m.state[row + V_ATTRIBUTES]
    return root != U0 and cache_find(m, root, gfn >> U6) >> (gfn & U63) & U1 != U0


@outlined
def is_mixed(m, row, gfn, level):
    """Whether the aligned block of `level` 2 or 3 around a guest frame has private and shared pages.

    mmu.c:hugepage_has_attrs(). Linux keeps the answer in lpage_info; here it is read off the bits.
    """
    root = m.state[row + V_ATTRIBUTES]
    if root == U0:
        return False
    index = (gfn & ~(pages_of(level) - U1)) >> U6
    first = cache_find(m, root, index)
    if first != U0 and first != ALL:
        return True
    last = index + (pages_of(level) >> U6)
    while index < last and cache_find(m, root, index) == first:
        index += U1
    return index < last


@outlined
def all_have(m, row, gfn, end, private):
    """kvm_main.c:kvm_range_has_memory_attributes(): whether nothing is to be done."""
    root = m.state[row + V_ATTRIBUTES]
    while gfn < end:
        mask = mask_at(gfn, end)
        if cache_find(m, root, gfn >> U6) & mask != (mask if private else U0):
            return False
        gfn = (gfn | U63) + U1
    return True


@outlined
def store_attributes(m, row, gfn, end, private):
    """Set or clear the bits of guest frames [gfn, end); memory was seen to suffice."""
    root = m.state[row + V_ATTRIBUTES]
    while gfn < end:
        mask = mask_at(gfn, end)
        old = cache_find(m, root, gfn >> U6)
        value = old | mask if private else old & ~mask
        if value != old:
            cache_store(m, row + V_ATTRIBUTES, gfn >> U6, value)
            root = m.state[row + V_ATTRIBUTES]
        gfn = (gfn | U63) + U1


@outlined
def drop_range(m, vm, gfn, end, kinds):
    """Drop the leaves of every slot over guest frames [gfn, end) of a VM, and flush it if there were any.

    kinds: FILTER_*, those that are left: mmu.c:kvm_arch_pre_set_memory_attributes().
    """
    state = m.state
    dropped = np.int64(0)
    slot = first_slot(state, vm, gfn, end)
    while slot != U0:
        first = max(gfn, state[slot + M_BASE_GFN])
        last = min(end, state[slot + M_BASE_GFN] + state[slot + M_PAGES])
        dropped += zap_slot(m, slot, first, last, kinds)
        slot = next_slot(state, slot, gfn, end)
    state[vm_row(vm) + V_SEQUENCE] += U1
    if dropped != 0:
        flush_vms(m)


@outlined
def set_attributes(m, op):
    """KVM_SET_MEMORY_ATTRIBUTES: 0, -EINVAL, or -ENOMEM with nothing changed.

    kvm_main.c:kvm_vm_set_mem_attributes(). Where anything changes, the whole range loses its leaves first, whichever
    way it goes; where private memory has a root of its own, only those of the kind that is left. The lowest nodes are
    reserved before, by a count that may ask for a few frames too many.
    """
    state = m.state
    vm = state[op + O_VM]
    row = vm_row(vm)
    address = state[op + O_ADDRESS]
    length = state[op + O_LENGTH]
    kind = state[op + O_FLAGS] & (FLAG_PRIVATE | FLAG_SHARED)
    private = kind == FLAG_PRIVATE
    if kind == U0 or kind == FLAG_PRIVATE | FLAG_SHARED or (private and state[row + V_PROTECTED] == U0):
        return np.int64(-EINVAL)
    if length == U0 or address + length < address or (address | length) & U4095 != U0:
        return np.int64(-EINVAL)
    if address + length > _GUEST_ADDRESSES:
        return np.int64(-EINVAL)  # inference: Linux stores attributes of frames that no slot can have, too
    gfn = address >> U12
    end = (address + length) >> U12
    if all_have(m, row, gfn, end, private):
        return np.int64(0)
    if private and frames_left(m) < ((end - gfn) >> (U6 + U9)) + _MOST_NODES:
        return np.int64(-ENOMEM)
    drop_range(m, vm, gfn, end, FILTER_SHARED if private else FILTER_PRIVATE)
    store_attributes(m, row, gfn, end, private)
    charge_one(m, EVENT_ATTRIBUTES_STORED)
    return np.int64(0)
