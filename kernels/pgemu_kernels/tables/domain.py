"""An IOMMU's domain as operations of a machine use it: map a run of frames, unmap, flush, a device's access.

e = open_domain(m, m.state[at : at + E_WORDS], row, root)  # words of the caller's, for the request and its answer
status = map_frames(e, iova, physical, length, read, write)
gone = unmap_frames(e, iova, length)  # once or several times: iommu_unmap_fast()
sync_domain(e)  # iommu_iotlb_sync(): the flush, the frames of tables that went, the price of the entries
row, root = e.request[E_FORMAT], e.request[E_ROOT]  # others than before if the domain grew
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import ALL, NONE, U0, U1, U3, U511
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.geometry import shift_of
from pgemu_kernels.tables.domain_entries import device_rights
from pgemu_kernels.tables.domain_map import DONE, domain_map, grow
from pgemu_kernels.tables.domain_unmap import domain_unmap
from pgemu_kernels.tables.edit_tree import Tree
from pgemu_kernels.tables.edits import finish_edit
from pgemu_kernels.tables.exact_walk import (
    amd_flags,
    has_leaf_form,
    is_vtd,
    judge_entry,
    output_address,
    rights_of,
    slot_of,
    translates,
    vtd_reason,
)
from pgemu_kernels.tables.walker import format_row, table_of
from pgemu_kernels.words.enum_words import WALK_ADDRESS_SIZE, WALK_OK, WALK_OUTSIDE_MEMORY, WALK_PERMISSION
from pgemu_kernels.words.table_words import (
    E_CHANGED,
    E_CLEARED,
    E_FLUSH_END,
    E_FORMAT,
    E_FREED,
    E_FREED_LIST,
    E_LEVEL,
    E_PENDING_END,
    E_ROOT,
    E_SET,
    E_WRITTEN,
    F_LARGEST_LEAF,
    F_LEVELS,
    F_READ,
    F_TALLER,
    F_WRITE,
)

VTD_NO_WRITE, VTD_NO_READ = np.uint64(5), np.uint64(6)  # drivers/iommu/intel/dmar.c:dma_remap_fault_reasons[]
AMD_RW = np.uint64(1 << 5)  # drivers/iommu/amd/amd_iommu_types.h:EVENT_FLAG_RW


@kernel
def open_domain(m, request, row, root):
    """The tree of a domain whose format is `row` of the machine's, with `root` its top table's physical address."""
    e = Tree(m.ram, m.state, m.stats, m.counts, request, m.state[U0:U0])
    request[E_FORMAT] = row
    request[E_ROOT] = root
    for word in (E_CHANGED, E_CLEARED, E_FLUSH_END, E_FREED, E_FREED_LIST, E_PENDING_END, E_WRITTEN):
        request[word] = U0
    return e


@outlined
def map_frames(e, iova, physical, length, read, write):
    """iommu_map() of frames that follow one another, multiples of 4096 all: 0, or -errno and none is mapped.

    -EADDRINUSE, -ENOMEM, -ERANGE (or -EFAULT, -EINVAL) as the format's kernel has them.
    """
    request = e.request
    f = format_row(e.state, request[E_FORMAT])
    if e.state[f + F_TALLER] != U0:
        status = grow(e, iova + length - U1)
        if status != DONE:
            return status
        f = format_row(e.state, request[E_FORMAT])
    request[E_SET] = device_rights(e.state, f, read, write)
    request[E_LEVEL] = e.state[f + F_LARGEST_LEAF]
    return domain_map(e, f, iova, physical, length)


@outlined
def unmap_frames(e, iova, length):
    """iommu_unmap_fast(): how many bytes went, which may be more or less; NONE for what domain_unmap() refuses."""
    return domain_unmap(e, format_row(e.state, e.request[E_FORMAT]), iova, length)


@outlined
def sync_domain(e):
    """iommu_iotlb_sync(): flush what is owed, then give the frames of tables back; charge the entries."""
    finish_edit(e, format_row(e.state, e.request[E_FORMAT]))
    e.request[E_WRITTEN] = U0
    e.request[E_CLEARED] = U0


@outlined
def device_access(m, row, root, iova, write):
    """A device reads or writes: status (WALK_*), physical address, level of the leaf or of the entry at fault, code.

    The code of a fault is VT-d's reason or the flags of AMD's event, as pgemu.tables.translation has them. Accessed
    and dirty bits are left as they are.
    """
    state = m.state
    f = format_row(state, row)
    level = state[f + F_LEVELS]
    need = state[f + F_WRITE] if write else state[f + F_READ]
    rights = ALL
    table = root >> U3
    entry = U0
    leaf = False
    status = WALK_OK if translates(state, f, iova) else WALK_ADDRESS_SIZE
    while status == WALK_OK and not leaf:
        slot = slot_of(m, (table + (iova >> shift_of(level) & U511)) << U3)
        if slot == NONE:
            return WALK_OUTSIDE_MEMORY, U0, level, U0
        entry = m.ram[slot]
        status = judge_entry(state, f, entry, level, ALL)
        leaf = has_leaf_form(state, f, entry, level)
        rights &= rights_of(state, f, entry, leaf)
        if status == WALK_OK and not leaf:
            table = table_of(state, f, entry)
            level -= U1
    if status == WALK_OK:
        if rights & need == need:
            return status, output_address(state, f, entry, level, iova), level, U0
        status = WALK_PERMISSION
    if is_vtd(state, f):
        return status, U0, level, vtd_reason(status, VTD_NO_WRITE if write else VTD_NO_READ)
    return status, U0, level, (AMD_RW if write else U0) | amd_flags(status)
