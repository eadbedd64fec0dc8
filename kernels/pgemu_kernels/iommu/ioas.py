"""An IOAS of iommufd: areas over io_pages, whose pages are pinned and mapped while a device is attached.

drivers/iommu/iommufd/io_pagetable.c, ioas.c. Addresses are whole pages here even without a device.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import ALL, NONE, U0, U1, U2, U12, U4095
from pgemu_kernels.engine.charge import change
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.rows import inode_row, stop
from pgemu_kernels.iommu.areas import (
    add_area,
    area_after,
    area_end,
    area_flags,
    area_from,
    area_memory,
    area_overlapping,
    area_start,
    is_usable,
    remove_area,
)
from pgemu_kernels.iommu.domain import begin_edit, domain_row, end_edit, frames_used, map_run, unmap_run
from pgemu_kernels.iommu.io_pages import (
    drop_run,
    hold_pages,
    is_mappable_file,
    make_pages,
    pages_word,
    pin_io_pages,
)
from pgemu_kernels.iommu.type1 import area_rights
from pgemu_kernels.iommu.unpinned import enter_pages, first_page_shown, is_unpinned, kind_of, remove_entries
from pgemu_kernels.words.enum_words import FLAG_COPY, FLAG_IOVA_ANY, GAUGE_IOMMU_PAGES
from pgemu_kernels.words.operations import EEXIST, EINVAL, ENODEV, ENOENT, ENOMEM, ENOSPC, EOVERFLOW, EPERM, PAGE_2M
from pgemu_kernels.words.registers import R_DOMAINS, R_FULL, R_INODES
from pgemu_kernels.words.rows import (
    AREA_WRITE,
    D_HOLES,
    D_KIND,
    D_LAST,
    D_POLICY,
    D_ROOT,
    D_TAKES_DMABUF,
    D_WORDS,
    DOMAIN_IOAS,
    I_DMA_END,
    I_DMA_FIRST,
    I_DOMAINS,
    I_FLAGS,
    I_KIND,
    I_OPEN,
    I_PAGES,
    INODE_DEVICE,
    INODE_GUEST_MEMFD,
    INODE_REVOKED,
    IP_INDEX,
    IP_OFFSET,
    IP_SOURCE,
    IP_START,
    IP_WRITABLE,
    NO_INODE,
    O_ADDRESS,
    O_DETAIL,
    O_FLAGS,
    O_LENGTH,
    O_OBJECT,
    O_OFFSET,
    O_VM,
    POLICY_LINUX,
    STATE_DOMAINS,
)

U = np.uint64
_INDEX = (U1 << IP_INDEX) - U1


@kernel
def memory_of(pages, index):
    """D_MEMORY of an area: its io_pages and the first page of them that it shows."""
    return pages << IP_INDEX | index


# --------------------------------------------------------------------------- with a domain


@outlined
def _fill_unpinned(m, d, end, pages):
    """Enter what an area shows of a guest_memfd, without pins: 0."""
    used = frames_used(m)
    e = begin_edit(m, d)
    key = (end >> U12) - U1
    start = first_page_shown(m, d, key)
    count = (end - area_start(m, d, key)) >> U12
    enter_pages(m, e, d, key, pages_word(m, pages, IP_START), start, start + count)
    end_edit(m, e, d, used)
    return np.int64(0)


@outlined
def _unfill_unpinned(m, d, start, end):
    used = frames_used(m)
    e = begin_edit(m, d)
    remove_entries(m, e, start, end)
    end_edit(m, e, d, used)


@outlined
def fill_area(m, d, iova, length, flags, memory):
    """iopt_area_fill_domain(): pins and maps an area: 0, or -errno with all undone."""
    pages = memory >> IP_INDEX
    if is_unpinned(m, pages):
        return _fill_unpinned(m, d, iova + length, pages)
    first = memory & _INDEX
    count = length >> U12
    done = U0
    status = np.int64(0)
    while done < count and status == 0:
        status, pfn, run = pin_io_pages(m, pages, first + done, count - done)
        while status == 0 and done + run < count:
            status, following, n = pin_io_pages(m, pages, first + done + run, count - done - run)
            if status == 0 and following != pfn + run:
                drop_run(m, pages, first + done + run, n)
                break
            run += n
        if status == 0:
            status = map_run(m, d, iova + (done << U12), pfn << U12, run << U12, flags)
        if status != 0:
            drop_run(m, pages, first + done, run)
            break
        change(m.stats, GAUGE_IOMMU_PAGES, np.int64(run))
        done += run
    if status != 0:
        unfill_area(m, d, iova, done << U12, memory)
    return status


@outlined
def unfill_area(m, d, iova, length, memory):
    """iopt_area_unfill_domain(): the I/O entries go, and the pins that no other area needs."""
    if is_unpinned(m, memory >> IP_INDEX):
        _unfill_unpinned(m, d, iova, iova + length)
        return
    done = U0
    while done < length:
        went = unmap_run(m, d, iova + done, length - done)
        if went == U0:
            break
        done += went
    change(m.stats, GAUGE_IOMMU_PAGES, -np.int64(done >> U12))
    drop_run(m, memory >> IP_INDEX, memory & _INDEX, length >> U12)


@outlined
def ioas_fill(m, d):
    """iopt_fill_domain(): the first device is attached: 0, or -errno with nothing mapped."""
    key = area_from(m, d, U0)
    while key != NONE:
        iova = area_start(m, d, key)
        status = fill_area(m, d, iova, area_end(key) - iova, area_flags(m, d, key), area_memory(m, d, key))
        if status != 0:
            ioas_unfill(m, d, iova)
            return status
        key = area_after(m, d, key)
    return np.int64(0)


@outlined
def ioas_unfill(m, d, end):
    """iopt_unfill_domain(): what lies below `end` is unmapped and unpinned; the areas stay."""
    key = area_from(m, d, U0)
    while key != NONE and area_start(m, d, key) < end:
        iova = area_start(m, d, key)
        unfill_area(m, d, iova, area_end(key) - iova, area_memory(m, d, key))
        key = area_after(m, d, key)


# --------------------------------------------------------------------------- areas


@outlined
def _insert(m, d, iova, length, rights, memory):
    """An area, filled where there is a domain: 0 or -errno."""
    pages = memory >> IP_INDEX
    if add_area(m, d, iova, length, rights, memory) != 0:
        hold_pages(m, pages, U0)  # new ones go
        return np.int64(-ENOMEM)
    hold_pages(m, pages, U1)
    if is_unpinned(m, pages):
        first = pages_word(m, pages, IP_OFFSET) + (memory & _INDEX)
        note_device(m.state, d, pages_word(m, pages, IP_START), first, first + (length >> U12))
    status = np.int64(0)
    if m.state[d + D_ROOT] != U0:
        status = fill_area(m, d, iova, length, rights, memory)
        if status != 0:
            remove_area(m, d, (iova + length - U1) >> U12)
            hold_pages(m, memory >> IP_INDEX, U0 - U1)
    return status


@outlined
def _remove(m, d, key):
    """iopt_area: how many bytes it was."""
    iova = area_start(m, d, key)
    length = area_end(key) - iova
    memory = area_memory(m, d, key)
    if m.state[d + D_ROOT] != U0:
        unfill_area(m, d, iova, length, memory)
    remove_area(m, d, key)
    hold_pages(m, memory >> IP_INDEX, U0 - U1)
    return length


@kernel
def _after(state, d, iova, last):
    """End of a reserved range that meets [iova, last]; iova where none does."""
    for at in (d + D_HOLES, d + D_HOLES + U2):
        if iova < state[at + U1] and last >= state[at]:
            return state[at + U1]
    return iova


@outlined
def find_iova(m, d, length, memory):
    """iopt_alloc_iova(): (0, -EOVERFLOW or -ENOSPC; the lowest free address, as aligned as memory and length)."""
    state = m.state
    if length >= U1 << U(63):
        return np.int64(-EOVERFLOW), U0
    alignment = U(PAGE_2M)
    while alignment > U(4096) and (alignment >> U1 >= length or memory & (alignment - U1) != U0):
        alignment >>= U1
    iova = max(U(4096), alignment)
    while iova + length - U1 <= state[d + D_LAST] and iova + length > iova:
        free = _after(state, d, iova, iova + length - U1)
        if free == iova:
            key = area_overlapping(m, d, iova, iova + length - U1)
            if key == NONE:
                return np.int64(0), iova
            free = area_end(key)
            if free == U0:
                break
        iova = (free + alignment - U1) & ~(alignment - U1)
    return np.int64(-ENOSPC), U0


@kernel
def check_iova(m, d, iova, length):
    """iopt_check_iova(): 0, -EINVAL, -EOVERFLOW, -EEXIST."""
    if (iova | length) & U4095 != U0 or length == U0:
        return np.int64(-EINVAL)
    last = iova + length - U1
    if last < iova:
        return np.int64(-EOVERFLOW)
    if not is_usable(m.state, d, iova, last):
        return np.int64(-EINVAL)
    return np.int64(-EEXIST if area_overlapping(m, d, iova, last) != NONE else 0)


@outlined
def _place(m, op, d, iova, length, memory):
    """Where a map goes: (0 or -errno, the address)."""
    if m.state[op + O_FLAGS] & FLAG_IOVA_ANY != U0:
        if length == U0 or length & U4095 != U0:
            return np.int64(-EINVAL), U0
        return find_iova(m, d, length, memory)
    return check_iova(m, d, iova, length), iova


@kernel
def takes_guest_memfd(state, d, inode):
    """Whether an IOAS maps a file because it is a guest_memfd of the designs: what-ifs do (POLICY_*)."""
    if state[d + D_POLICY] == POLICY_LINUX or inode >= state[R_INODES]:
        return False
    return state[inode_row(inode) + I_OPEN] != U0 and state[inode_row(inode) + I_KIND] == INODE_GUEST_MEMFD


@kernel
def takes_dmabuf(state, d, inode):
    """Whether an IOAS maps a file because it is the dma-buf of a device's memory: pages.c:iopt_map_dmabuf(), 6.19."""
    if state[d + D_TAKES_DMABUF] == U0 or inode >= state[R_INODES]:
        return False
    return state[inode_row(inode) + I_OPEN] != U0 and state[inode_row(inode) + I_KIND] == INODE_DEVICE


@kernel
def note_device(state, d, inode, first, end):
    """An address space may map pages [first, end) of a file without holding them: its conversions, holes and end have
    to know."""
    node = inode_row(inode)
    if state[node + I_DOMAINS] == U0:
        state[node + I_DMA_FIRST] = first
        state[node + I_DMA_END] = end
    state[node + I_DMA_FIRST] = min(state[node + I_DMA_FIRST], first)
    state[node + I_DMA_END] = max(state[node + I_DMA_END], end)
    state[node + I_DOMAINS] |= U1 << (d - STATE_DOMAINS) // U(D_WORDS)
    if state[node + I_KIND] == INODE_GUEST_MEMFD:
        state[R_FULL] = U1


@outlined
def _map_new(m, op, d):
    """IOMMU_IOAS_MAP, IOMMU_IOAS_MAP_FILE."""
    state = m.state
    length = state[op + O_LENGTH]
    start = state[op + O_OFFSET]
    inode = state[op + O_OBJECT]
    of_file = inode != NO_INODE
    rights = area_rights(state[op + O_FLAGS])
    if rights == U0 or length == U0 or start & U4095 != U0 or length >> U12 > _INDEX:
        return stop(state, op, -EINVAL)
    if start + length < start:
        return stop(state, op, -EOVERFLOW)
    if of_file:
        dmabuf = takes_dmabuf(state, d, inode)
        mappable = is_mappable_file(state, inode) or takes_guest_memfd(state, d, inode) or dmabuf
        pages_there = state[inode_row(inode) + I_PAGES] if mappable else U0
        if (start + length + U4095) >> U12 > pages_there:
            return stop(state, op, -EINVAL)
        if not is_mappable_file(state, inode) and state[op + O_ADDRESS] + length == U0:
            return stop(state, op, -EINVAL)  # what-ifs end before the last address
        if dmabuf and state[inode_row(inode) + I_FLAGS] & INODE_REVOKED != U0:
            return stop(state, op, -ENODEV)
    status, iova = _place(m, op, d, state[op + O_ADDRESS], length, start)
    if status != 0:
        return stop(state, op, status)
    process = state[op + O_VM] + U1
    writable = rights & AREA_WRITE != U0
    if of_file:
        status, pages = make_pages(m, U0, inode, start >> U12, length >> U12, writable, process)
    else:
        status, pages = make_pages(m, process, start, U0, length >> U12, writable, process)
    if status == 0:
        status = _insert(m, d, iova, length, rights, memory_of(pages, U0))
    state[op + O_DETAIL] = iova if status == 0 else U0
    return stop(state, op, status)


@kernel
def _covered(m, d, iova, last):
    """Whether areas without a gap show [iova, last]: iopt_get_pages()."""
    while True:
        key = area_overlapping(m, d, iova, iova)
        if key == NONE:
            return False
        if key << U12 | U4095 >= last:
            return True
        iova = area_end(key)


@kernel
def _may_write(m, d, iova, last):
    """Whether the memory of [iova, last], which is covered, may be written."""
    while True:
        key = area_overlapping(m, d, iova, iova)
        if pages_word(m, area_memory(m, d, key) >> IP_INDEX, IP_WRITABLE) == U0:
            return False
        if key << U12 | U4095 >= last:
            return True
        iova = area_end(key)


@outlined
def _may_show(m, d, s, at, length, to_the_end):
    """Whether an IOAS may have what another one has from an address on, `to_the_end` of its own addresses."""
    done = U0
    while done < length:
        key = area_overlapping(m, s, at + done, at + done)
        pages = area_memory(m, s, key) >> IP_INDEX
        if is_unpinned(m, pages) and to_the_end:
            return False
        if kind_of(m, pages) == INODE_GUEST_MEMFD and m.state[d + D_POLICY] == POLICY_LINUX:
            return False
        done += area_end(key) - (at + done)
    return True


@outlined
def _copy(m, op, d):
    """IOMMU_IOAS_COPY: areas over the same pages, which are pinned once."""
    state = m.state
    source = state[op + O_OBJECT]
    length = state[op + O_LENGTH]
    at = state[op + O_OFFSET]
    rights = area_rights(state[op + O_FLAGS])
    if source >= state[R_DOMAINS] or state[domain_row(source) + D_KIND] != DOMAIN_IOAS:
        return stop(state, op, -ENOENT)
    s = domain_row(source)
    if rights == U0 or length == U0 or (at | length) & U4095 != U0:
        return stop(state, op, -EINVAL)
    if at + length - U1 < at:
        return stop(state, op, -EOVERFLOW)
    if not _covered(m, s, at, at + length - U1):
        return stop(state, op, -ENOENT)
    key = area_overlapping(m, s, at, at)
    memory = area_memory(m, s, key)
    pages = memory >> IP_INDEX
    where = (
        pages_word(m, pages, IP_START)
        if pages_word(m, pages, IP_SOURCE) != U0
        else pages_word(m, pages, IP_OFFSET) << U12
    )
    where += ((memory & _INDEX) << U12) + (at - area_start(m, s, key))
    status, iova = _place(m, op, d, state[op + O_ADDRESS], length, where)
    if status == 0 and not _may_show(m, d, s, at, length, iova + length == U0):
        status = np.int64(-EINVAL)
    if status == 0 and rights & AREA_WRITE != U0 and not _may_write(m, s, at, at + length - U1):
        status = np.int64(-EPERM)
    done = U0
    while status == 0 and done < length:
        key = area_overlapping(m, s, at + done, at + done)
        memory = area_memory(m, s, key) + (at + done - area_start(m, s, key) >> U12)
        piece = min(length - done, area_end(key) - (at + done))
        status = _insert(m, d, iova + done, piece, rights, memory)
        if status == 0:
            done += piece
    if status != 0 and done != U0:
        remove_range(m, d, iova, iova + done - U1)
    state[op + O_DETAIL] = iova if status == 0 else U0
    return stop(state, op, status)


@outlined
def ioas_map(m, op, d):
    """DMA_MAP of an IOAS: 0 with the address, or -errno."""
    if m.state[op + O_FLAGS] & FLAG_COPY != U0:
        return _copy(m, op, d)
    return _map_new(m, op, d)


@outlined
def remove_range(m, d, iova, last):
    """iopt_unmap_iova_range(): (0, or -ENOENT at an area that would be cut; bytes of those before it)."""
    gone = U0
    key = area_overlapping(m, d, iova, last)
    while key != NONE:
        if area_start(m, d, key) < iova or (key << U12 | U4095) > last:
            return np.int64(-ENOENT), gone
        gone += _remove(m, d, key)
        key = area_overlapping(m, d, iova, last)
    return np.int64(0), gone


@outlined
def ioas_unmap(m, op, d):
    """IOMMU_IOAS_UNMAP: see DMA_UNMAP."""
    state = m.state
    iova = state[op + O_ADDRESS]
    length = state[op + O_LENGTH]
    if iova == U0 and length == ALL:
        _, gone = remove_range(m, d, U0, ALL)
        state[op + O_DETAIL] = gone
        return stop(state, op, 0)
    if length == U0:
        return stop(state, op, -EINVAL)
    if iova + length - U1 < iova:
        return stop(state, op, -EOVERFLOW)
    status, gone = remove_range(m, d, iova, iova + length - U1)
    if status == 0 and gone == U0:
        status = np.int64(-ENOENT)
    state[op + O_DETAIL] = gone if status == 0 else U0
    return stop(state, op, status)
