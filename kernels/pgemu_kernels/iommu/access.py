"""What devices read and write through an I/O page table: DMA_ACCESS, one by one and in batches."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U3, U9, U12, U32, U511, U4095
from pgemu_kernels.engine.charge import charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.frames import empty_frame
from pgemu_kernels.engine.memslots import first_binding, next_binding
from pgemu_kernels.engine.rows import inode_row, is_mirrored, stop
from pgemu_kernels.engine.shareability import is_shared
from pgemu_kernels.folios.folio import COUNTS, INDEX, MAPPING, struct_page
from pgemu_kernels.folios.hstate import in_zone
from pgemu_kernels.folios.hugetlb import mapping_address
from pgemu_kernels.folios.pinning import head_in_zone
from pgemu_kernels.gmem.vm_kinds import is_assigned
from pgemu_kernels.iommu.areas import area_flags, area_from, area_memory, area_start
from pgemu_kernels.iommu.domain import allows, physical_of, walk_domain
from pgemu_kernels.iommu.io_pages import pages_word
from pgemu_kernels.iommu.unpinned import first_page_shown, is_unpinned
from pgemu_kernels.tables.walker import format_row
from pgemu_kernels.words.enum_words import (
    EVENT_IOMMU_STALE_FREED,
    EVENT_IOMMU_STALE_PRIVATE,
    FLAG_WRITE,
    GAUGE_CONTENT_FRAMES,
    VM_MIRRORED,
    VM_RMP,
)
from pgemu_kernels.words.operations import EFAULT, EINVAL
from pgemu_kernels.words.registers import R_BLOCKS, R_CONTENTS, R_INODES, R_MACHINE_CHECKS, R_POOL_BASE, R_VM_PROPERTIES
from pgemu_kernels.words.rows import (
    AREA_FILE,
    D_FORMAT,
    D_KIND,
    D_POLICY,
    D_ROOT,
    DOMAIN_IOAS,
    I_KIND,
    INODE_GUEST_MEMFD,
    IP_INDEX,
    IP_START,
    M_VM,
    O_ADDRESS,
    O_DETAIL,
    O_FLAGS,
    O_LENGTH,
    O_OFFSET,
    POLICY_LINUX,
)

U = np.uint64
NOT_STALE, STALE_PRIVATE, STALE_FREED = U0, U1, U(2)


@outlined
def owner_of(m, pfn):
    """Whose page cache a frame of the pool is in: (inode, page), or (NONE, 0)."""
    head = head_in_zone(m, pfn)
    page = struct_page(m, head)
    mapping = m.ram[page + MAPPING]
    inode = (mapping - mapping_address(U0)) >> U12
    if mapping == U0 or mapping & U1 != U0 or inode >= m.state[R_INODES]:
        return NONE, U0
    return inode, m.ram[page + INDEX] + (pfn - head)


@outlined
def left_its_file(m, d, iova, inode, index):
    """Whether what an entry without a reference names is by now page `index` of `inode`, and was another one when it
    was entered. Of type1 (POLICY_TRACKED) the file is known, of an IOAS its page, too."""
    key = area_from(m, d, iova)
    if m.state[d + D_POLICY] == POLICY_LINUX or key == NONE or iova < area_start(m, d, key):
        return False
    if m.state[d + D_KIND] != DOMAIN_IOAS:
        file = area_flags(m, d, key) >> AREA_FILE
        return file != U0 and inode != file - U1
    pages = area_memory(m, d, key) >> IP_INDEX
    if not is_unpinned(m, pages):
        return False
    page = first_page_shown(m, d, key) + (iova - area_start(m, d, key) >> U12)
    return inode != pages_word(m, pages, IP_START) or index != page


@outlined
def staleness(m, d, iova, pfn):
    """What a device reaches that still has an entry for a frame of the pool: memory that is private now, or is free or
    somebody else's. A frame that is pinned is neither: its conversion and its end wait."""
    inode, index = owner_of(m, pfn)
    if left_its_file(m, d, iova, inode, index):
        return STALE_FREED
    if inode == NONE:
        page = struct_page(m, head_in_zone(m, pfn))
        free = m.ram[page + MAPPING] == U0 and m.ram[page + COUNTS] >> U32 == U0
        return STALE_FREED if free else NOT_STALE
    node = inode_row(inode)
    if m.state[node + I_KIND] != INODE_GUEST_MEMFD:
        return NOT_STALE
    return NOT_STALE if is_shared(m, node, index) != U0 else STALE_PRIVATE


@outlined
def _refuses_private(m, pfn, write):
    """What a VM's kind makes of a device that reaches private memory: whether the unit refuses it.

    SNP: the IOMMU looks in the RMP, and the page is a guest's: a fault. TDX: a page that is written without its
    key is poisoned, and whoever uses it gets a machine check, which ends the host (R_MACHINE_CHECKS); a read shows
    nothing and marks nothing. Others: nothing notices.
    """
    state = m.state
    inode, index = owner_of(m, pfn)
    if state[R_VM_PROPERTIES] & (VM_RMP | VM_MIRRORED) == U0 or inode == NONE:
        return False
    node = inode_row(inode)
    if state[node + I_KIND] != INODE_GUEST_MEMFD or is_shared(m, node, index) != U0:
        return False
    if state[R_VM_PROPERTIES] & VM_RMP != U0 and is_assigned(state, node, index):
        return True
    if not write:
        return False
    slot = first_binding(state, inode, index, index + U1)
    while slot != U0:
        if is_mirrored(state, state[slot + M_VM]):
            state[R_MACHINE_CHECKS] += U1
            break
        slot = next_binding(state, slot, index, index + U1)
    return False


@kernel
def _refuses_stale(m, d, iova, pfn, write):
    """Count a stale access: whether the unit refuses it, for whose memory it is by now."""
    if m.state[R_BLOCKS] == U0 or not in_zone(m.state, pfn):  # there was no guest_memfd
        return False
    stale = staleness(m, d, iova, pfn)
    if stale == NOT_STALE:
        return False
    charge_one(m, EVENT_IOMMU_STALE_FREED if stale == STALE_FREED else EVENT_IOMMU_STALE_PRIVATE)
    return _refuses_private(m, pfn, write)


@outlined
def _store(m, physical, value):
    """A device writes a word: into the frame that the entry names, whoever has it by now."""
    pfn = physical >> U12
    if not in_zone(m.state, pfn):
        if pfn << U9 < U(m.ram.size):
            m.ram[physical >> U3] = value
        return
    at = m.state[R_CONTENTS] + pfn - m.state[R_POOL_BASE]
    frame = U(m.counts[at])
    if frame == U0:
        if value == U0:
            return
        frame = empty_frame(m, U0, GAUGE_CONTENT_FRAMES)
        if frame == NONE:
            return
        m.counts[at] = np.uint32(frame)
    m.ram[frame << U9 | physical >> U3 & U511] = value


@kernel
def operate_access(m, op, d):
    """DMA_ACCESS: 0 with the physical address of the first byte; -EFAULT where the unit refuses, with how many bytes
    came before; -EINVAL for a word that is not aligned. A write stores the word of `offset` at the address, if not 0.
    """
    state = m.state
    iova = state[op + O_ADDRESS]
    write = state[op + O_FLAGS] & FLAG_WRITE != U0
    root = state[d + D_ROOT]
    last = iova + (max(state[op + O_LENGTH], U1) - U1)
    f = format_row(state, state[d + D_FORMAT])
    first = NONE
    at = iova
    while True:
        entry, shift = walk_domain(m, root, f, at) if root != U0 else (U0, U12)
        if entry == U0 or not allows(state, f, entry, write):
            state[op + O_DETAIL] = at - iova
            return stop(state, op, -EFAULT)
        physical = physical_of(state, f, entry, shift, at)
        if _refuses_stale(m, d, at, physical >> U12, write):
            state[op + O_DETAIL] = at - iova
            return stop(state, op, -EFAULT)
        if first == NONE:
            first = physical
        at = (at | U4095) + U1
        if at > last or at == U0:
            break
    if write and state[op + O_OFFSET] != U0:
        if first & U(7) != U0:
            return stop(state, op, -EINVAL)
        _store(m, first, state[op + O_OFFSET])
    state[op + O_DETAIL] = first
    return stop(state, op, 0)
