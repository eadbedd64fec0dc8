"""The end of pages and inodes: holes, the release of a VM's file, closing."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import ALL, NONE, U0, U1, U6, U12, U63
from pgemu_kernels.engine.charge import charge
from pgemu_kernels.engine.compile import kernel, outlined, step
from pgemu_kernels.engine.frames import zero_contents
from pgemu_kernels.engine.handle import full_only
from pgemu_kernels.engine.memslots import first_binding, next_binding
from pgemu_kernels.engine.properties import holes_unmap
from pgemu_kernels.engine.rows import (
    block_row,
    broken,
    inode_row,
    lock_exclusive,
    range_arguments,
    stop,
    unlock,
    vm_row,
)
from pgemu_kernels.engine.telling import return_to_devices, take_from_devices
from pgemu_kernels.folios.folio import FLAGS, PG_UPTODATE, mappings, struct_page
from pgemu_kernels.folios.guest_folios import make_zombie, release_block, subpool_release, subpool_row
from pgemu_kernels.folios.large_folios import large_folios
from pgemu_kernels.folios.merging import leave_cache, merge_block
from pgemu_kernels.folios.zeroed import bits_in, flags_lie, keeps_shown, knows_flags_only, shown_bits
from pgemu_kernels.gmem import large_holes, piece_merges, spinning
from pgemu_kernels.gmem.levels import defects, folio_order_at, frame_of
from pgemu_kernels.gmem.mbind import cut
from pgemu_kernels.gmem.vm_kinds import make_shared
from pgemu_kernels.gmem.workers import note_return
from pgemu_kernels.gmem.zeroing import clear_zeroed
from pgemu_kernels.kvm.memslots import delete_slot
from pgemu_kernels.process.munmap import unmap_inode
from pgemu_kernels.process.zapping import unmap_mapping_range
from pgemu_kernels.stage2.invalidate import begin_range, end_range, flush_vms, kvm_gmem_split_private, zap_range
from pgemu_kernels.stage2.regions import vms_with_leaves
from pgemu_kernels.stage2.release import has_file, is_mapped_by, release_file
from pgemu_kernels.stage2.userspace import process_of
from pgemu_kernels.words.enum_words import (
    BROKEN_LOST_CONTENTS,
    DEFECT_HOLE_ZEROES_FROM_START,
    DEFECT_PUNCH_KEEPS_ENTRIES,
    EVENT_PAGE_ZEROED,
)
from pgemu_kernels.words.operations import BLOCKED, EAGAIN, EBADF, EBUSY, EINVAL, GO
from pgemu_kernels.words.registers import (
    R_FULL,
    R_HSTATE,
    R_INODES,
    R_ORDER,
    R_PUNCH_REFUSES,
    R_SPLIT_FORM,
)
from pgemu_kernels.words.rows import (
    B_BITS,
    B_OUTSTANDING,
    B_PFN,
    B_STATE,
    BLOCK_ABSENT,
    BLOCK_HUGE,
    BLOCK_PARTLY,
    BLOCK_SPLIT,
    FILTER_BOTH,
    I_BLOCKS,
    I_KIND,
    I_LOCK,
    I_OPEN,
    I_PAGES,
    I_SUBPOOL,
    I_ZEROED,
    INODE_GUEST_MEMFD,
    M_FLAGS,
    O_DETAIL,
    O_LENGTH,
    O_OBJECT,
    O_OFFSET,
    O_VM,
    O_WIDE_END,
    P_LIVE,
    SLOT_CLOSED,
    SLOT_DYING,
    SPLIT_FORM_RFC2,
    V_CLOSED_FILES,
)

# --------------------------------------------------------------------------- blocks


dissolve = full_only(piece_merges.dissolve_block, np.int64(0))  # default machines have no pieces
make_zombie_of_pieces = full_only(piece_merges.make_zombie_of_pieces, None)
forget_spins = full_only(spinning.forget_spins, None)
large_punched = full_only(large_holes.punch_large, None)
large_removed = full_only(large_holes.remove_whole, None)
forget_policies = full_only(cut, None)  # a default machine has none


@kernel
def is_in_parts(kind):
    """Whether a block's folio is split."""
    return kind == BLOCK_SPLIT or kind == BLOCK_PARTLY


@outlined
def make_whole(m, node, block, first):
    """Merge a split block that nobody maps, so that it can be freed: 0, -EAGAIN or -WOULD_SPIN with nothing changed."""
    if m.state[block + B_STATE] == BLOCK_PARTLY:
        return dissolve(m, node, block, first)
    return merge_block(m, block, first, NONE)


@outlined
def truncate_block(m, inode, index):
    """Free the whole huge page that begins at page `index`: 0, or -EAGAIN with nothing freed.

    Split, its pages are unmapped from the host and must be idle, so that it can be merged first. Whole, it is
    truncated at once, and goes to the pool with its last reference. A 4K folio is unmapped and leaves the inode,
    whoever holds it. Truncation looks for host entries by the folio's mapcount: special ones have none.
    """
    state = m.state
    node = inode_row(inode)
    block = block_row(m, node, index)
    kind = m.state[block + B_STATE]
    small = kind == BLOCK_HUGE and state[R_ORDER] == U0
    if is_in_parts(kind) or (small and mappings(m.ram, struct_page(m, m.state[block + B_PFN])) != U0):
        unmap_mapping_range(m, inode, index, index + (U1 << state[R_ORDER]))
    if is_in_parts(kind) and make_whole(m, node, block, index) != 0:
        return np.int64(-EAGAIN)
    if m.state[block + B_STATE] == BLOCK_HUGE:
        release_block(m, block)
        clear_zeroed(m, node, index)
        make_shared(m, node, index, index + (U1 << state[R_ORDER]))
    return np.int64(0)


@outlined
def evict_block(m, inode, index):
    """Inode eviction: whole folios are truncated, split blocks merged first where nobody holds a piece.

    Form rfc2 merges nothing here: every piece is truncated by itself and the worker merges the block afterwards. A
    piece that somebody still holds keeps its whole block from the pool until the last `put`: the
    zombie state of the posted series (page type PGTY_guestmem_hugetlb, nr_pages_waiting_to_be_merged).
    """
    node = inode_row(inode)
    block = block_row(m, node, index)
    kind = m.state[block + B_STATE]
    if is_in_parts(kind) and (m.state[R_SPLIT_FORM] == SPLIT_FORM_RFC2 or make_whole(m, node, block, index) != 0):
        if kind == BLOCK_PARTLY:
            make_zombie_of_pieces(m, block)
        else:
            leave_cache(m, m.state[R_ORDER])
            make_zombie(m, block)
        clear_zeroed(m, node, index)
        make_shared(m, node, index, index + (U1 << m.state[R_ORDER]))
        if m.state[block + B_OUTSTANDING] == U0:
            note_return(m, block)
    elif m.state[block + B_STATE] == BLOCK_HUGE:
        release_block(m, block)
        clear_zeroed(m, node, index)
        make_shared(m, node, index, index + (U1 << m.state[R_ORDER]))


# --------------------------------------------------------------------------- hole


@kernel
def hole_arguments(m, op):
    """0, -EBADF, or -EINVAL: for what is not aligned to 4K, of the branches from late 2025 on to the huge page."""
    status = range_arguments(m.state, op)
    inside = (U1 << (m.state[R_ORDER] + U12)) - U1
    unaligned = (m.state[op + O_OFFSET] | m.state[op + O_LENGTH]) & inside != U0
    if status == 0 and m.state[R_PUNCH_REFUSES] != U0 and unaligned:
        return np.int64(-EINVAL)
    return status


@outlined
def start_of_folio(m, node, index):
    """With Defect.HOLE_ZEROES_FROM_START the first page of the folio that holds page `index`, else the page.

    kvm_gmem_zero_range() of RFC v2 calls folio_zero_segment() of each folio with 0 for the start.
    """
    if defects(m) & DEFECT_HOLE_ZEROES_FROM_START == U0:
        return index
    return index & ~((U1 << folio_order_at(m, block_row(m, node, index), index)) - U1)


@kernel
def same_page(m, node, index):
    return index


zeroed_from = full_only(start_of_folio, same_page)  # default machines have no such defect


@outlined
def note_hole(m, node, first, index, end):
    """A hole in pages [index, end) of a huge page zeroes [first, end): what guest or host have before it is lost.

    Nothing of the hole's own is lost by zeroing it again. Where flags lie all of it counts as zeroed, but for a folio
    without the flag where the code knows which pages are: it zeroes those at their next use.
    """
    block = block_row(m, node, index)
    shown = shown_bits(m.state, node)
    if bits_in(m, shown, first, index) != U0:
        broken(m.state, BROKEN_LOST_CONTENTS, first)
    for at in range(first, end):
        head = frame_of(m, block, at) & ~((U1 << folio_order_at(m, block, at)) - U1)
        bit = U1 << (at & U63)
        if at >= index:
            m.state[shown + (at >> U6)] &= ~bit
        if flags_lie(m):
            m.state[block + B_BITS] = U1
            if knows_flags_only(m) or m.ram[struct_page(m, head) + FLAGS] & PG_UPTODATE != U0:
                m.state[m.state[node + I_ZEROED] + (at >> U6)] |= bit


@kernel
def zero_part(m, node, index, pages):
    """Zero the part of a huge page that a hole covers: guest_memfd frees only whole huge pages."""
    block = block_row(m, node, index)
    if m.state[block + B_STATE] != BLOCK_ABSENT:
        inside = (U1 << m.state[R_ORDER]) - U1
        first = zeroed_from(m, node, index)
        if keeps_shown(m):
            note_hole(m, node, first, index, index + pages)
        pages += index - first
        zero_contents(m, m.state[block + B_PFN] + (first & inside), pages)
        charge(m, EVENT_PAGE_ZEROED, np.int64(pages))


@step
def punch_blocks(m, op, inode, start, end):
    """Free or zero the huge pages of [start, end): 0, or -EAGAIN with those before the failing one gone."""
    state = m.state
    pages = U1 << state[R_ORDER]
    index = start
    while index < end:
        last = min(end, (index & ~(pages - U1)) + pages)
        if last - index == pages:
            status = truncate_block(m, inode, index)
            if status != 0:
                state[op + O_DETAIL] = index << U12
                return status
        else:
            zero_part(m, inode_row(inode), index, last - index)
        index = last
    return np.int64(0)


@kernel
def split_crossing_hole(m, inode, start, end):
    """kvm_gmem_split_private() of a hole: 0 or -ENOMEM."""
    return kvm_gmem_split_private(m, vms_with_leaves(m.state, inode_row(inode), start, end), inode, start, end)


split_before_hole = full_only(split_crossing_hole, np.int64(0))  # the fast loops know no mirror


@kernel
def unmap_whole(m, inode, start, end):
    """Unmap the huge pages that lie whole in pages [start, end) from every process: those that a hole frees."""
    inside = (U1 << m.state[R_ORDER]) - U1
    first = (start + inside) & ~inside
    last = end & ~inside
    if first < last:
        unmap_mapping_range(m, inode, first, last)


@outlined
def punch(m, op):
    """fallocate(PUNCH_HOLE): 0; -EBADF; -EINVAL when unaligned; -EAGAIN when a merge is impossible; -ENOMEM when a leaf
    that crosses its border has to be split and cannot be; -EBUSY where Linux would wait for the lock.

    Whole huge pages are freed, parts only zeroed; shareability does not change; a hole past the end is
    no error. virt/kvm/guest_memfd.c:kvm_gmem_punch_hole() as in the posted 1G series. R_PUNCH_REFUSES: a hole that is
    not aligned to huge pages is -EINVAL, even past the end. What is only zeroed stays mapped by processes, in either
    design: their entries show the zeroes. Processes lose the rest when the VMs have (captured: one flush of the VM,
    however many mappings there are). With Defect.PUNCH_KEEPS_ENTRIES the hole is not unmapped
    here, and special entries stay: their frames go back to the pool while processes still reach them.
    """
    state = m.state
    status = hole_arguments(m, op)
    if status != 0:
        return stop(state, op, status)
    inode = state[op + O_OBJECT]
    node = inode_row(inode)
    start = state[op + O_OFFSET] >> U12
    end = min(start + (state[op + O_LENGTH] >> U12), state[node + I_PAGES])
    if start >= end:
        return stop(state, op, 0)
    if not lock_exclusive(state, op, node):
        return stop(state, op, -EBUSY)
    begin_range(m, inode, start, end)
    status = split_before_hole(m, inode, start, end)
    if status == 0:
        take_from_devices(m, op, inode, start, end)
        zap_range(m, inode, start, end, FILTER_BOTH)
        flush_vms(m)
        if holes_unmap(m) and defects(m) & DEFECT_PUNCH_KEEPS_ENTRIES == U0:
            unmap_whole(m, inode, start, end)
        if large_folios(m) != U0:
            large_punched(m, inode, start, end)
        else:
            status = punch_blocks(m, op, inode, start, end)
    return_to_devices(m, op, inode, start, end)
    end_range(m, inode, start, end)
    unlock(state, op, node)
    return stop(state, op, status)


# --------------------------------------------------------------------------- release


@outlined
def begin_release(m, op):
    """The first step of release(): the VM's last reference to its file but those of mappings goes; STOP where these
    hold it, or nothing is to be released."""
    state = m.state
    inode = state[op + O_OBJECT]
    if inode >= state[R_INODES] or state[inode_row(inode) + I_OPEN] == U0:
        return np.int64(stop(state, op, -EBADF))
    vm = state[op + O_VM]
    bound = False
    slot = first_binding(state, inode, U0, NONE)
    while slot != U0 and not bound:
        bound = has_file(state, slot, vm, inode) and state[slot + M_FLAGS] & (SLOT_CLOSED | SLOT_DYING) == U0
        slot = next_binding(state, slot, U0, NONE)
    if not bound or state[inode_row(inode) + I_KIND] != INODE_GUEST_MEMFD:
        return np.int64(stop(state, op, -EBADF))
    state[R_FULL] = U1
    held = is_mapped_by(state, process_of(state, vm), inode, U0, U0)
    if held:
        state[vm_row(vm) + V_CLOSED_FILES] = U1
    slot = first_binding(state, inode, U0, NONE)
    while slot != U0:
        if has_file(state, slot, vm, inode):
            state[slot + M_FLAGS] |= SLOT_CLOSED if held else SLOT_DYING
        slot = next_binding(state, slot, U0, NONE)
    return np.int64(stop(state, op, 0) if held else GO)


@outlined
def end_release(m, op):
    """The second one: kvm_gmem_release() of a file that nobody refers to; BLOCKED (-EBUSY) where the lock is held."""
    state = m.state
    inode = state[op + O_OBJECT]
    node = inode_row(inode)
    if not lock_exclusive(state, op, node):
        stop(state, op, -EBUSY)
        return np.int64(BLOCKED)
    release_file(m, state[op + O_VM], inode)
    unlock(state, op, node)
    return np.int64(stop(state, op, 0))


@outlined
def release(m, op):
    """RELEASE: a VM's descriptor of a guest_memfd inode is closed. 0; -EBADF if the VM has no slot of it, or closed it
    before; -EBUSY where Linux would wait for the lock.

    A mapping of the VM's process holds the file, so that nothing changes until the last one is gone: then, or at once
    where there is none, virt/kvm/guest_memfd.c:kvm_gmem_release(): the file's slots lose it, their stage-2 leaves go,
    and guest faults there are -EFAULT from then on. A slot stays, over its guest frames, until it is deleted. Memory is
    the inode's and stays. Loops of default machines know no closed files: from here on the machine is none.
    """
    state = m.state
    inode = state[op + O_OBJECT]
    locked = inode < state[R_INODES] and state[inode_row(inode) + I_LOCK] != U0
    if locked and not is_mapped_by(state, process_of(state, state[op + O_VM]), inode, U0, U0):
        return np.int64(stop(state, op, -EBUSY))
    outcome = np.int64(begin_release(m, op))
    return np.int64(end_release(m, op)) if outcome == GO else outcome


@kernel
def step_release(m, op, stage):
    """Step `stage` of it: between the two the file is dying, and slots may be unbound."""
    return np.int64(begin_release(m, op)) if stage == U0 else np.int64(end_release(m, op))


# --------------------------------------------------------------------------- close


@kernel
def leave_inode(m, inode):
    """exit_mmap() of the inode's mappings, and its memory slots, released ones too."""
    state = m.state
    unmap_inode(m, inode)
    slot = first_binding(state, inode, U0, NONE)
    while slot != U0:
        delete_slot(m, slot)
        slot = first_binding(state, inode, U0, NONE)


@kernel
def close_inode(m, node):
    """The inode is gone, and with it its hold on the subpool."""
    state = m.state
    state[node + I_OPEN] = U0
    if state[node + I_SUBPOOL] != U0:
        state[subpool_row(state[node + I_SUBPOOL] - U1) + P_LIVE] = U0
        subpool_release(m, state[R_HSTATE], state[node + I_SUBPOOL] - U1)


@outlined
def close(m, op):
    """The VMM goes: mappings of the inode, its memory slots, then the inode itself. 0, -EBADF, or -EBUSY
    where Linux would wait for the lock.

    exit_mmap(), then virt/kvm/guest_memfd.c:kvm_gmem_release() and the inode's eviction, which frees its memory
    policies too: mm/mempolicy.c:mpol_free_shared_policy().
    """
    state = m.state
    inode = state[op + O_OBJECT]
    if inode >= state[R_INODES] or state[inode_row(inode) + I_OPEN] == U0:
        return stop(state, op, -EBADF)
    node = inode_row(inode)
    if not lock_exclusive(state, op, node):
        return stop(state, op, -EBUSY)
    leave_inode(m, inode)
    take_from_devices(m, op, inode, U0, state[node + I_PAGES])
    state[op + O_WIDE_END] = U0
    forget_spins(m, inode)
    forget_policies(m, inode, U0, ALL)
    if large_folios(m) != U0:
        large_removed(m, inode, U0, state[node + I_PAGES])
    for block in range(state[node + I_BLOCKS]):
        evict_block(m, inode, block << state[R_ORDER])
    unlock(state, op, node)
    close_inode(m, node)
    return stop(state, op, 0)
