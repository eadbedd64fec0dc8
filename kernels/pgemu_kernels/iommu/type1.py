"""VFIO type1, versions 1 and 2: memory pinned and mapped, unmapped and unpinned. drivers/vfio/vfio_iommu_type1.c

What is pinned is written down nowhere but in the I/O page table: an unmap unpins the frames that it finds there.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import ALL, NONE, U0, U1, U9, U12, U4095
from pgemu_kernels.engine.charge import change
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.geometry import pages_of
from pgemu_kernels.engine.rows import find_vma, space_root, stop
from pgemu_kernels.folios.folio import folio_order, struct_page
from pgemu_kernels.folios.hstate import in_zone
from pgemu_kernels.folios.pinning import head_in_zone
from pgemu_kernels.formats.bits import PTE_PRESENT, PTE_WRITE
from pgemu_kernels.gmem.gup import TOUCH, count_pinned, pin_run_of_any, unpin_run
from pgemu_kernels.gmem.host_entries import is_special
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
from pgemu_kernels.iommu.domain import iova_to_phys, map_run, unmap_run
from pgemu_kernels.process.entries import leaf_pfn, points_to_table
from pgemu_kernels.process.fault import fault_error, handle_mm_fault
from pgemu_kernels.process.tables import lookup_address, space_row
from pgemu_kernels.words.enum_words import FLAG_LONGTERM, FLAG_READ, FLAG_WRITE, GAUGE_IOMMU_PAGES
from pgemu_kernels.words.operations import EEXIST, EFAULT, EINVAL, ENOMEM, ENOSPC
from pgemu_kernels.words.registers import R_SPACES
from pgemu_kernels.words.rows import (
    A_FLAGS,
    A_INODE,
    A_KIND,
    A_PROT,
    AREA_FILE,
    AREA_READ,
    AREA_TRACKED,
    AREA_WRITE,
    D_COUNT,
    D_KIND,
    D_LIMIT,
    D_MEMLOCK,
    D_POLICY,
    D_ROOT,
    D_WRAP_ERROR,
    DOMAIN_TYPE1,
    O_ADDRESS,
    O_DETAIL,
    O_FLAGS,
    O_LENGTH,
    O_OFFSET,
    O_VM,
    POLICY_LINUX,
    POLICY_TRACKED,
    PROT_READ,
    PROT_WRITE,
    S_DEVICES,
    S_LOCKED_VM,
    VM_PFNMAP,
    VMA_GUEST_MEMFD,
)

U = np.uint64


# --------------------------------------------------------------------------- frames of one mapping


@kernel
def is_pfnmap(m, row):
    """Whether a mapping is VM_PFNMAP: a device's, or pfnmap's of a guest_memfd."""
    if row == NONE:
        return False
    if m.state[row + A_KIND] == VMA_GUEST_MEMFD:
        return is_special(m, row)
    return m.state[row + A_FLAGS] & VM_PFNMAP != U0


@outlined
def follow_pfnmap(m, space, row, address, write):
    """follow_fault_pfn(): (0 or -EFAULT; frame; how many 4K pages are left under its entry), faulted in if absent."""
    root = space_root(m.state, space)
    for _ in range(U(2)):
        slot, level = lookup_address(m, root, address)
        entry = m.ram[slot]
        if entry & PTE_PRESENT != U0 and (level == U1 or not points_to_table(entry)):
            if write and entry & PTE_WRITE == U0:
                return np.int64(-EFAULT), U0, U0
            inside = (address >> U12) & (pages_of(level) - U1)
            return np.int64(0), leaf_pfn(entry, level) + inside, pages_of(level) - inside
        if m.state[row + A_PROT] & (PROT_WRITE if write else PROT_READ) == U0:
            break  # mm/gup.c:vma_permits_fault()
        if fault_error(handle_mm_fault(m, space, row, address, U1 if write else U0), False) != 0:
            break
    return np.int64(-EFAULT), U0, U0


@kernel
def is_reserved(m, pfn):
    """is_invalid_reserved_pfn(): a frame that is no RAM, or none that is managed. All of a device's are."""
    return pfn << U9 >= U(m.ram.size) and not in_zone(m.state, pfn)


@kernel
def marks_of_file(m, row):
    """AREA_TRACKED and AREA_FILE of a mapping of RAM under VM_PFNMAP; 0 of another."""
    if row == NONE or m.state[row + A_KIND] != VMA_GUEST_MEMFD or not is_special(m, row):
        return U0
    return AREA_TRACKED | (m.state[row + A_INODE] + U1) << AREA_FILE


@outlined
def frames_at(m, d, space, address, pages, flags, marks):
    """vaddr_get_pfns(): (0 or -errno; first frame; how many follow one another; 1 where no reference was taken).

    POLICY_TRACKED: an unmap must know what it finds, so all of a mapping is of the file of `marks`, or nothing is.
    """
    status, pfn, n = pin_run_of_any(m, space, address, pages, flags | FLAG_LONGTERM | TOUCH)
    if status == 0 and marks != U0:
        unpin_range(m, pfn, n, False)
        return np.int64(-EFAULT), U0, U0, U0
    if status == 0:
        return status, pfn, n, U0
    row = find_vma(m.state, space, address)
    if not is_pfnmap(m, row):
        return status, U0, U0, U0
    status, pfn, n = follow_pfnmap(m, space, row, address, flags & FLAG_WRITE != U0)
    if status != 0:
        return status, U0, U0, U0
    policy = m.state[d + D_POLICY]
    refused = policy == POLICY_LINUX or (policy == POLICY_TRACKED and marks_of_file(m, row) != marks)
    if refused and not is_reserved(m, pfn):
        return np.int64(-EFAULT), U0, U0, U0
    return status, pfn, min(n, pages), U1


# --------------------------------------------------------------------------- accounts


@kernel
def account(m, space, pages):
    """vfio_lock_acct(): `pages` (uint64, two's complement to take away) more of a process are locked: VmLck."""
    if space < m.state[R_SPACES]:
        m.state[space_row(space) + S_LOCKED_VM] += pages


@kernel
def exceeds(m, d, space, pages):
    """Whether so many pages more are above RLIMIT_MEMLOCK, which who has CAP_IPC_LOCK does not have."""
    limit = m.state[d + D_MEMLOCK]
    return limit != NONE and m.state[space_row(space) + S_LOCKED_VM] + pages > limit


# --------------------------------------------------------------------------- pinned, unpinned


@outlined
def unpin_range(m, pfn, n, dirty):
    """vfio_unpin_pages_remote(): `n` frames from `pfn` on, folio by folio; those that are no RAM have no reference."""
    done = U0
    while done < n:
        at = pfn + done
        step = U1
        if in_zone(m.state, at):
            head = head_in_zone(m, at)
            end = head + (U1 << folio_order(m.ram, struct_page(m, head)))
            step = min(n - done, end - at)
        unpin_run(m, at, step, dirty)
        done += step
    count_pinned(m, -np.int64(n))


@kernel
def is_counted(m, d, pfn, flags):
    """put_pfn(): whether an unmap unpins a frame that it finds, and takes it off the account."""
    if flags & AREA_TRACKED != U0:
        return False
    return not is_reserved(m, pfn)


@outlined
def map_area(m, d, iova, length, flags, space, address):
    """vfio_pin_map_dma(): 0, or -errno with all undone. What follows one another is mapped at once."""
    access = FLAG_WRITE if flags & AREA_WRITE != U0 else U0
    marks = flags & ~(AREA_READ | AREA_WRITE)
    pages = length >> U12
    done = U0
    locked = U0
    status = np.int64(0)
    while done < pages and status == 0:
        first = U0
        run = U0
        free = U0
        while done + run < pages and status == 0:
            at = address + ((done + run) << U12)
            status, pfn, n, without = frames_at(m, d, space, at, pages - done - run, access, marks)
            if status != 0:
                break
            if run != U0 and (pfn != first + run or without != free):
                if without == U0:  # it is pinned again by the next run
                    unpin_range(m, pfn, n, False)
                break
            if without == U0 and exceeds(m, d, space, locked + n):
                unpin_range(m, pfn, n, False)
                status = np.int64(-ENOMEM)
                break
            if run == U0:
                first = pfn
                free = without
            run += n
            locked += n if without == U0 else U0
        if run != U0 and status == 0:
            status = map_run(m, d, iova + (done << U12), first << U12, run << U12, flags)
        if status != 0:
            if run != U0 and free == U0:
                unpin_range(m, first, run, False)
                locked -= run
            break
        change(m.stats, GAUGE_IOMMU_PAGES, np.int64(run))
        done += run
    account(m, space, locked)
    if status != 0:
        unmap_area(m, d, iova, done << U12, flags, space)
    return status


@outlined
def unmap_area(m, d, iova, length, flags, space):
    """vfio_unmap_unpin(): the I/O entries of a range, and the pins of what they named."""
    end = iova + length
    unlocked = U0
    while iova != end:
        physical, left = iova_to_phys(m, d, iova)
        if left == U0:
            iova += U(4096)
            continue
        size = min(left, end - iova)
        while iova + size != end:  # as far as it follows one another
            following, left = iova_to_phys(m, d, iova + size)
            if left == U0 or following != physical + size:
                break
            size = min(size + left, end - iova)
        went = unmap_run(m, d, iova, size)
        if went == U0:
            break
        pfn = physical >> U12
        change(m.stats, GAUGE_IOMMU_PAGES, -np.int64(went >> U12))
        if is_counted(m, d, pfn, flags):
            unpin_range(m, pfn, went >> U12, flags & AREA_WRITE != U0)
            unlocked += went >> U12
        iova += went
    account(m, space, U0 - unlocked)


# --------------------------------------------------------------------------- the operations


@kernel
def area_rights(flags):
    """AREA_* of a record's READ and WRITE."""
    rights = AREA_READ if flags & FLAG_READ != U0 else U0
    return rights | AREA_WRITE if flags & FLAG_WRITE != U0 else rights


@kernel
def wraps(m, d, address, length):
    """-EINVAL of 6.12, -EOVERFLOW of 6.18 and later, for a range that wraps; 0."""
    if address + length - U1 >= address:
        return np.int64(0)
    return -np.int64(m.state[d + D_WRAP_ERROR])


@outlined
def type1_map(m, op, d):
    """vfio_dma_do_map(): see DMA_MAP."""
    state = m.state
    iova = state[op + O_ADDRESS]
    length = state[op + O_LENGTH]
    address = state[op + O_OFFSET]
    space = state[op + O_VM]
    rights = area_rights(state[op + O_FLAGS])
    if rights == U0 or length == U0 or (iova | length | address) & U4095 != U0:
        return stop(state, op, -EINVAL)
    for start in (iova, address):
        status = wraps(m, d, start, length)
        if status != 0:
            return stop(state, op, status)
    if area_overlapping(m, d, iova, iova + length - U1) != NONE:
        return stop(state, op, -EEXIST)
    if state[d + D_COUNT] >= state[d + D_LIMIT]:
        return stop(state, op, -ENOSPC)
    if not is_usable(state, d, iova, iova + length - U1):
        return stop(state, op, -EINVAL)
    tracked = U0
    if state[d + D_POLICY] == POLICY_TRACKED:
        tracked = marks_of_file(m, find_vma(state, space, address))
    if add_area(m, d, iova, length, rights | tracked, address | space) != 0:
        return stop(state, op, -ENOMEM)
    state[space_row(space) + S_DEVICES] += U1  # mmgrab()
    status = np.int64(0)
    if state[d + D_ROOT] != U0:
        status = map_area(m, d, iova, length, rights | tracked, space, address)
        if status != 0:
            remove_area(m, d, (iova + length - U1) >> U12)
            state[space_row(space) + S_DEVICES] -= U1
    return stop(state, op, status)


@outlined
def drop_area(m, d, key):
    """vfio_remove_dma(): how many bytes it was."""
    iova = area_start(m, d, key)
    length = area_end(key) - iova
    if m.state[d + D_ROOT] != U0:
        unmap_area(m, d, iova, length, area_flags(m, d, key), area_memory(m, d, key) & U4095)
    m.state[space_row(area_memory(m, d, key) & U4095) + S_DEVICES] -= U1
    remove_area(m, d, key)
    return length


@outlined
def type1_unmap(m, op, d):
    """vfio_dma_do_unmap(): see DMA_UNMAP."""
    state = m.state
    iova = state[op + O_ADDRESS]
    length = state[op + O_LENGTH]
    everything = length == ALL
    last = iova + length - U1
    if everything:
        if iova != U0:
            return stop(state, op, -EINVAL)
        last = ALL
    elif (iova | length) & U4095 != U0 or length == U0:
        return stop(state, op, -EINVAL)
    else:
        status = wraps(m, d, iova, length)
        if status != 0:
            return stop(state, op, status)
    first = area_overlapping(m, d, iova, last)
    version1 = state[d + D_KIND] == DOMAIN_TYPE1
    if not everything and not version1:
        for at in (iova, last):
            key = area_overlapping(m, d, at, at)
            if key != NONE and (
                (at == iova and area_start(m, d, key) != iova) or (at == last and (key << U12 | U4095) != last)
            ):
                return stop(state, op, -EINVAL)
    gone = U0
    key = first
    while key != NONE:
        if version1 and iova > area_start(m, d, key):
            break
        gone += drop_area(m, d, key)
        key = area_overlapping(m, d, iova, last)
    state[op + O_DETAIL] = gone
    return stop(state, op, 0)


@outlined
def type1_replay(m, d):
    """vfio_iommu_replay(): a domain is there now, what was mapped before is entered: 0 or -errno, as far as it came."""
    key = area_from(m, d, U0)
    status = np.int64(0)
    while key != NONE and status == 0:
        iova = area_start(m, d, key)
        memory = area_memory(m, d, key)
        flags = area_flags(m, d, key)
        status = map_area(m, d, iova, area_end(key) - iova, flags, memory & U4095, memory & ~U4095)
        key = area_after(m, d, key)
    return status


@outlined
def try_domain(m, d):
    """vfio_test_domain_fgsp(): two pages are mapped together and unmapped one by one, in each new domain up to 6.12."""
    if map_run(m, d, U0, U0, U(8192), AREA_READ | AREA_WRITE) == 0 and unmap_run(m, d, U0, U(4096)) == U(4096):
        unmap_run(m, d, U(4096), U(4096))


@outlined
def type1_clear(m, d):
    """vfio_iommu_unmap_unpin_all(): every mapping goes."""
    key = area_from(m, d, U0)
    while key != NONE:
        drop_area(m, d, key)
        key = area_from(m, d, U0)
