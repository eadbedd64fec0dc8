"""munmap() and mremap(): mm/vma.c:do_vmi_align_munmap(), mm/mremap.c."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U12, U4095
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.handle import full_only
from pgemu_kernels.engine.rows import find_vma, inode_row, mapping_limits, stop
from pgemu_kernels.process.close import close_vma
from pgemu_kernels.process.record import has_ended, rounded
from pgemu_kernels.process.remap import move_page_tables
from pgemu_kernels.process.tables import free_pgtables, gather_begin, gather_flush
from pgemu_kernels.process.vma import copy_vma, first_vma, holds_file, link_vma, next_vma, notify, vma_merge
from pgemu_kernels.process.zapping import UNMAP, clear_vma, cut_vma
from pgemu_kernels.stage2.notifier import notify_range
from pgemu_kernels.stage2.release import waits_for_release
from pgemu_kernels.words.operations import EBUSY, EFAULT, EINVAL, ENOMEM, EOPNOTSUPP
from pgemu_kernels.words.registers import R_MAPPINGS, R_MOVES_MANY
from pgemu_kernels.words.rows import (
    A_ANON_VMA,
    A_END,
    A_FLAGS,
    A_INODE,
    A_KIND,
    A_PGOFF,
    A_SPACE,
    A_START,
    I_REFERENCES,
    O_ADDRESS,
    O_LENGTH,
    O_OBJECT,
    O_OFFSET,
    O_SPACE,
    TASK_SIZE,
    VM_PFNMAP,
    VM_SHARED,
    VMA_ANONYMOUS,
    VMA_HUGETLB,
)

U = np.uint64


@outlined
def _notify_all(m, space, start, end):
    """unmap_vmas(): the process's VMs are told once, of the whole range, holes too, however many VMAs there are."""
    state = m.state
    row = next_vma(state, space, start, end)
    if row == NONE:
        return
    if state[row + A_START] == start and state[row + A_END] == end:
        notify(m, row, start, end)
    else:
        notify_range(m, space, start, end)


@outlined
def remove_vmas(m, space, start, end):
    """Unmap every VMA of [start, end), which none crosses: entries, rows, tables that nobody needs; and flush.

    If one is VM_PFNMAP all is flushed before the tables go, for no page's count holds its frames:
    include/asm-generic/tlb.h:tlb_free_vmas(), since 6.16.
    """
    state = m.state
    first = NONE
    last = U0
    flags = U0
    _notify_all(m, space, start, end)
    address = start
    while address < end:
        row = next_vma(state, space, address, end)
        if row == NONE:
            break
        first = min(first, state[row + A_START])
        last = state[row + A_END]
        flags |= state[row + A_FLAGS]
        address = last
        clear_vma(m, row, state[row + A_START], last, UNMAP)
        close_vma(m, row)
    if first != NONE:
        if flags & VM_PFNMAP != U0:
            gather_flush(m, space)
        floor, ceiling = mapping_limits(state, space, first, last)
        free_pgtables(m, space, first, last, floor, ceiling)
    gather_flush(m, space)


@outlined
def unmap_inode(m, inode):
    """Every VMA of an inode goes, with the processes that had it."""
    state = m.state
    row = first_vma(state, inode)
    while row != U0:
        gather_begin(m)
        remove_vmas(m, state[row + A_SPACE], state[row + A_START], state[row + A_END])
        row = first_vma(state, inode)


@outlined
def _cut_ends(m, space, start, end):
    """Cut the VMAs that reach into [start, end) from outside: 0, -EINVAL, -ENOMEM. vms_gather_munmap_vmas()."""
    state = m.state
    row = next_vma(state, space, start, end)
    if row != NONE and state[row + A_START] < start:
        status, _ = cut_vma(m, row, start)
        if status != 0:
            return status
    row = next_vma(state, space, end - U1, end)
    if row != NONE and state[row + A_END] > end:
        status, _upper = cut_vma(m, row, end)
        if status != 0:
            return status
    return np.int64(0)


@outlined
def _unmap_range(m, space, start, end):
    """do_munmap() of an aligned range: 0, -EINVAL, -ENOMEM."""
    gather_begin(m)
    status = _cut_ends(m, space, start, end)
    if status == 0:
        remove_vmas(m, space, start, end)
    else:
        gather_flush(m, space)
    return status


@kernel
def _would_wait(m, space, start, end):
    return waits_for_release(m.state, space, start, end)


_must_wait = full_only(_would_wait, False)  # the fast loops know no closed files


@outlined
def munmap(m, op):
    """munmap(): 0, -EINVAL for bad arguments or a cut through a HugeTLB page, -ENOMEM for one mapping too many.

    The length is rounded up to pages: mm/vma.c:do_vmi_munmap(). -EINVAL, too, for a process that has ended; -EBUSY
    where Linux would wait to release the file that was mapped (before it returns to user space; here nothing is done).
    """
    state = m.state
    space = state[op + O_SPACE]
    start = state[op + O_ADDRESS]
    length = rounded(state, op, U(4096))
    if has_ended(state, space) or start & U4095 != U0 or length == U0:
        return stop(state, op, -EINVAL)
    if start > TASK_SIZE or length > TASK_SIZE - start:
        return stop(state, op, -EINVAL)
    if _must_wait(m, space, start, start + length):
        return stop(state, op, -EBUSY)
    return stop(state, op, _unmap_range(m, space, start, start + length))


# --------------------------------------------------------------------------- mremap


@outlined
def _resize(m, row, start, length, wanted):
    """mremap() in place: the tail goes, or the mapping grows into a hole behind it. 0, -ENOMEM."""
    state = m.state
    space = state[row + A_SPACE]
    if wanted <= length:
        return _unmap_range(m, space, start + wanted, start + length) if wanted < length else np.int64(0)
    end = start + wanted
    if state[row + A_END] != start + length or end > TASK_SIZE:
        return np.int64(-ENOMEM)
    if next_vma(state, space, start + length, end) != NONE:
        return np.int64(-ENOMEM)
    state[row + A_END] = end
    state[R_MAPPINGS] += U1
    vma_merge(state, row)
    return np.int64(0)


@outlined
def _move_vma(m, row, start, length, to, wanted):
    """move_vma(): a copy of the VMA at its new place, the tables moved there, the old range unmapped. 0, -ENOMEM.

    `wanted` bytes are mapped there, more than `length` only where nothing moves: a shared mapping is doubled.

    Without memory on the way Linux moves back what it has moved; so does this, which needs no memory for it but for
    tables that are there.
    """
    state = m.state
    space = state[row + A_SPACE]
    copy = copy_vma(state, row)
    if copy == NONE:
        return np.int64(-ENOMEM)
    state[copy + A_START] = to
    state[copy + A_END] = to + wanted
    state[copy + A_PGOFF] = state[row + A_PGOFF] + ((start - state[row + A_START]) >> U12)
    if state[row + A_KIND] != VMA_ANONYMOUS:
        link_vma(state, copy)
        if holds_file(state, row):
            state[inode_row(state[row + A_INODE]) + I_REFERENCES] += U1
    elif state[row + A_ANON_VMA] == U0:
        state[copy + A_PGOFF] = to >> U12  # copy_vma(): nothing was ever written, the place is not yet fixed
    vma_merge(state, copy)
    gather_begin(m)
    status = move_page_tables(m, space, start, to, length)
    if status != 0:
        move_page_tables(m, space, to, start, length)
    gather_flush(m, space)
    if status != 0:
        _unmap_range(m, space, to, to + length)
        return status
    return _unmap_range(m, space, start, start + length) if length != U0 else np.int64(0)


@kernel
def _check_remap(state, row, start, length, wanted):
    """mm/mremap.c:check_prep_vma(): 0, -EINVAL to double a private mapping, -EFAULT without a mapping over all of the
    old range or where a VM_PFNMAP one would grow. -EOPNOTSUPP of HugeTLB memory: not modelled."""
    if row == NONE:
        return np.int64(-EFAULT)
    if length == U0 and state[row + A_FLAGS] & VM_SHARED == U0:
        return np.int64(-EINVAL)
    if length > state[row + A_END] - start or (wanted > length and state[row + A_FLAGS] & VM_PFNMAP != U0):
        return np.int64(-EFAULT)
    return np.int64(-EOPNOTSUPP if state[row + A_KIND] == VMA_HUGETLB else 0)


@outlined
def _move_each(m, space, start, length, to):
    """remap_move(): every mapping in [start, start + length) moves by as much, gaps behind the first stay gaps.

    0; -EFAULT where none begins at or before `start`; at the first that fails what it fails with, those before moved.
    """
    state = m.state
    end = start + length
    address = start
    status = np.int64(-EFAULT)
    while address < end:
        row = next_vma(state, space, address, end)
        if row == NONE or (address == start and state[row + A_START] > start):
            break
        first = max(address, state[row + A_START])
        address = min(end, state[row + A_END])
        target = to + (first - start)
        status = _check_remap(state, row, first, address - first, address - first)
        if status == 0:
            status = _unmap_range(m, space, target, target + (address - first))
        if status == 0:
            status = _move_vma(m, find_vma(state, space, first), first, address - first, target, address - first)
        if status != 0:
            break
    return status


@outlined
def mremap(m, op):
    """mremap(): length and object, in pages, are the old and the new size; offset is the new address, 0 to stay.

    0, -EINVAL for bad arguments or ranges that overlap, -EFAULT without a mapping over the whole old range, or of a
    VM_PFNMAP one that would grow, -ENOMEM. Length 0 maps what a shared mapping shows once more, at a new address. Of
    HugeTLB memory -EOPNOTSUPP: not modelled. What is mapped at the new address goes first, unless it is refused.
    """
    state = m.state
    space = state[op + O_SPACE]
    start = state[op + O_ADDRESS]
    to = state[op + O_OFFSET]
    length = rounded(state, op, U(4096))
    wanted = state[op + O_OBJECT] << U12
    if (start | to) & U4095 != U0 or wanted == U0 or (length == U0 and (to == U0 or state[op + O_LENGTH] != U0)):
        return stop(state, op, -EINVAL)
    if to != U0 and (wanted > TASK_SIZE or to > TASK_SIZE - wanted or (start < to + wanted and to < start + length)):
        return stop(state, op, -EINVAL)
    if to != U0 and length == wanted and state[R_MOVES_MANY] != U0:
        return stop(state, op, _move_each(m, space, start, length, to))
    status = _check_remap(state, find_vma(state, space, start), start, length, wanted)
    if status == 0 and to != U0:
        status = _unmap_range(m, space, to, to + wanted)
    if status != 0:
        return stop(state, op, status)
    row = find_vma(state, space, start)
    if row == NONE:  # what was to be shown once more stood where it is to be
        return stop(state, op, -EFAULT)
    if to == U0:
        return stop(state, op, _resize(m, row, start, length, wanted))
    if wanted < length:
        status = _unmap_range(m, space, start + wanted, start + length)
        if status != 0:
            return stop(state, op, status)
        length = wanted
        row = find_vma(state, space, start)
    status = _move_vma(m, row, start, length, to, wanted if length == U0 else length)
    if status == 0 and wanted > length and length != U0:
        status = _resize(m, find_vma(state, space, to), to, length, wanted)
    return stop(state, op, status)
