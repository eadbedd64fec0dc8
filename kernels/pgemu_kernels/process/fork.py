"""fork() and the end of a process: kernel/fork.c:dup_mmap(), mm/memory.c:copy_page_range(), mm/mmap.c:exit_mmap()."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U2, U12
from pgemu_kernels.engine.charge import change, change_value, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.frames import put_frame
from pgemu_kernels.engine.geometry import size_of
from pgemu_kernels.engine.rows import clear_words, inode_row, space_root, stop, vm_row, vma_row
from pgemu_kernels.folios.anonymous_folios import add_rmap_ptes, compound_head, is_large_anonymous, is_page_exclusive
from pgemu_kernels.folios.boot import process_root
from pgemu_kernels.folios.folio import add_mapping, add_references, struct_page
from pgemu_kernels.folios.huge_pages import (
    copy_huge,
    duplicate_anonymous,
    give_back_huge,
    is_anonymous,
    is_exclusive,
    level_of_order,
    map_huge,
    set_anonymous,
    take_huge,
)
from pgemu_kernels.folios.pinning import maybe_pinned
from pgemu_kernels.formats.bits import PTE_ACCESSED, PTE_DIRTY, PTE_SAVED_DIRTY, PTE_SPECIAL, PTE_WRITE
from pgemu_kernels.process.anonymous import copy_page, is_anon_exclusive, new_page
from pgemu_kernels.process.close import close_vma
from pgemu_kernels.process.entries import (
    holds_page,
    is_hwpoison,
    leaf_pfn,
    make_writable,
    mk_pte,
    protect_from_writes,
    pte_mkdirty,
    pte_pfn,
    vm_page_prot,
)
from pgemu_kernels.process.huge_memory import copy_huge_pmd, split_and_notify
from pgemu_kernels.process.huge_pmd import is_huge_anonymous, is_huge_zero
from pgemu_kernels.process.hugetlb import new_entry, vma_index
from pgemu_kernels.process.tables import (
    free_pgtables,
    gather,
    gather_begin,
    gather_flush,
    lookup_address,
    need_slot,
    space_row,
)
from pgemu_kernels.process.vma import (
    clone_anon_vma,
    copy_vma,
    holds_file,
    huge_order,
    is_shared_mapping,
    link_vma,
    next_vma,
)
from pgemu_kernels.process.zapping import UNMAP, zap_vma
from pgemu_kernels.stage2.notifier import notify_range, notify_release
from pgemu_kernels.words.enum_words import (
    EVENT_LEAF_WRITTEN,
    EVENT_PAGE_COPIED,
    EVENT_RMAP_CHANGED,
    GAUGE_HOST_LEAVES_4K,
    GAUGE_HOST_TABLES,
)
from pgemu_kernels.words.operations import EAGAIN, ENOMEM, ENOSPC
from pgemu_kernels.words.registers import R_SPACES, R_VMAS, R_VMS
from pgemu_kernels.words.rows import (
    A_ANON_VMA,
    A_END,
    A_FLAGS,
    A_INODE,
    A_KIND,
    A_LIVE,
    A_PROT,
    A_RESERVED,
    A_SPACE,
    A_START,
    I_REFERENCES,
    O_DETAIL,
    O_SPACE,
    PAGE_EXCLUSIVE,
    PROT_WRITE,
    S_DEVICES,
    S_GENERATION,
    S_HAS_PINNED,
    S_LIVE,
    S_ORDINARY,
    S_ROOT,
    S_RSS,
    S_USER_ROOT,
    SPACES,
    TASK_SIZE,
    V_LIVE,
    V_SPACE,
    VM_DONTCOPY,
    VM_LOCKED,
    VM_PFNMAP,
    VM_RESERVATION_OWNER,
    VM_SHARED,
    VMA_ANONYMOUS,
    VMA_GUEST_MEMFD,
    VMA_HUGETLB,
)

U = np.uint64


# --------------------------------------------------------------------------- a process's top table


@kernel
def is_held(state, space):
    """Whether a VM holds the mm of a process, which may have ended: virt/kvm/kvm_main.c:kvm_create_vm(), mmgrab()."""
    held = False
    for vm in range(state[R_VMS]):
        held |= state[vm_row(vm) + V_LIVE] != U0 and state[vm_row(vm) + V_SPACE] == space
    return held or state[space_row(space) + S_DEVICES] != U0


@outlined
def make_space(m):
    """A process with nothing mapped: its number, or NONE; rows of processes that ended are used again, but those that a
    VM or a device still holds."""
    state = m.state
    space = NONE
    for i in range(state[R_SPACES]):
        if state[space_row(i) + S_LIVE] == U0 and state[space_row(i) + S_ROOT] == U0 and not is_held(state, i):
            space = i
            break
    if space == NONE:
        if state[R_SPACES] >= U(SPACES):
            return NONE
        space = state[R_SPACES]
    row = space_row(space)
    clear_words(state, row, S_GENERATION)
    if process_root(m, row) != 0:
        return NONE
    state[row + S_LIVE] = U1
    if space == state[R_SPACES]:
        state[R_SPACES] = space + U1
    return space


# --------------------------------------------------------------------------- copying entries


@kernel
def _duplicate(m, frame, space):
    """folio_try_dup_anon_rmap_pte(): a process maps a page once more, which is no mapping's alone any longer."""
    if is_large_anonymous(m.state, frame):
        head = compound_head(m, frame)
        add_references(m.ram, struct_page(m, head), U1)
        add_rmap_ptes(m, head, frame, U1, space, False)
        return
    m.counts[frame] = np.uint32((U(m.counts[frame]) & ~PAGE_EXCLUSIVE) + U1)
    charge_one(m, EVENT_RMAP_CHANGED)


@kernel
def _duplicate_file(m, row, frame):
    """folio_dup_file_rmap_pte(): a process maps a page of a file once more."""
    if m.state[row + A_KIND] == VMA_GUEST_MEMFD:
        page = struct_page(m, frame)
        add_references(m.ram, page, U1)
        add_mapping(m.ram, page)
    else:
        m.counts[frame] = np.uint32(U(m.counts[frame]) + U1)
    charge_one(m, EVENT_RMAP_CHANGED)


@kernel
def _needs_copy_now(m, row, frame):
    """folio_needs_cow_for_dma(), of a page of one mapping alone: the parent keeps what a device may write to."""
    return m.state[space_row(m.state[row + A_SPACE]) + S_HAS_PINNED] != U0 and maybe_pinned(m, frame)


@outlined
def _copy_present_page(m, child, old):
    """copy_present_page(): the child's word for a page of its own with the contents of a pinned one; NONE."""
    frame = new_page(m)
    if frame == NONE:
        return NONE
    copy_page(m, frame, old)
    charge_one(m, EVENT_PAGE_COPIED)
    charge_one(m, EVENT_RMAP_CHANGED)
    entry = pte_mkdirty(mk_pte(frame, vm_page_prot(m.state, child)))
    return make_writable(entry) if m.state[child + A_PROT] & PROT_WRITE != U0 else entry


@kernel
def _copied(m, row, child, slot):
    """The child's word for a 4K entry of the parent, which may lose its write access: copy_present_ptes(). NONE
    without memory."""
    state = m.state
    space = state[child + A_SPACE]
    entry = m.ram[slot]
    if state[row + A_FLAGS] & VM_SHARED == U0:
        frame = pte_pfn(entry)
        if entry & PTE_SPECIAL == U0 and is_anon_exclusive(m, frame) and _needs_copy_now(m, row, frame):
            return _copy_present_page(m, child, frame)
        if entry & PTE_SPECIAL == U0:
            _duplicate(m, pte_pfn(entry), space)
        if entry & U1 != U0 and entry & PTE_WRITE != U0:
            entry = protect_from_writes(entry)
            m.ram[slot] = entry
            charge_one(m, EVENT_LEAF_WRITTEN)
    else:
        if entry & PTE_SPECIAL == U0:
            _duplicate_file(m, row, pte_pfn(entry))
        entry &= ~(PTE_DIRTY | PTE_SAVED_DIRTY)
    return entry & ~PTE_ACCESSED


@kernel
def _copy_level1(m, row, child, address, stop_, slot):
    """Copy the 4K entries of [address, stop_) of one table, the first at `slot`: 0 or -ENOMEM."""
    space = m.state[child + A_SPACE]
    target = need_slot(m, space, address, U1)
    if target == NONE:
        return np.int64(-ENOMEM)
    while address < stop_:
        entry = m.ram[slot]
        if entry != U0:
            if holds_page(entry):
                copied = _copied(m, row, child, slot)
                if copied == NONE:
                    return np.int64(-ENOMEM)
                m.ram[target] = copied
                change_value(m.stats, GAUGE_HOST_LEAVES_4K, 1)
                charge_one(m, EVENT_LEAF_WRITTEN)
                gather(m, address, U1)
                if entry & PTE_SPECIAL == U0:
                    m.state[space_row(space) + S_RSS] += U1
            else:
                m.ram[target] = entry
        slot += U1
        target += U1
        address += U(4096)
    return np.int64(0)


@kernel
def _is_huge_to_copy(m, row, entry):
    """folio_try_dup_anon_rmap_pmd() of a 2M leaf: whether it refuses."""
    if is_huge_zero(m.state, entry):
        return False
    head = leaf_pfn(entry, U2)
    return is_page_exclusive(m, head) and _needs_copy_now(m, row, head)


@outlined
def _copy_small(m, row, child):
    """copy_page_range() of a VMA that is not HugeTLB: the child gets each table that the parent has. 0 or -ENOMEM."""
    state = m.state
    root = space_root(state, state[row + A_SPACE])
    address = state[row + A_START]
    end = state[row + A_END]
    while address < end:
        slot, level = lookup_address(m, root, address)
        if level == U1:
            stop_ = min(end, (address & ~(size_of(U2) - U1)) + size_of(U2))
            if _copy_level1(m, row, child, address, stop_, slot) != 0:
                return np.int64(-ENOMEM)
            address = stop_
            continue
        target = need_slot(m, state[child + A_SPACE], address, level)
        if target == NONE:
            return np.int64(-ENOMEM)
        if is_huge_anonymous(state, row, m.ram[slot], level):
            if _is_huge_to_copy(m, row, m.ram[slot]):
                split_and_notify(m, row, slot, address)  # then page by page
                continue
            if copy_huge_pmd(m, row, child, slot, target) != 0:
                return np.int64(-ENOMEM)
            gather(m, address, level)
        elif holds_page(m.ram[slot]):
            m.ram[target] = m.ram[slot] & ~PTE_ACCESSED  # special: copy_huge_pmd(), copy_huge_pud()
            change_value(m.stats, GAUGE_HOST_LEAVES_4K + level - U1, 1)
            charge_one(m, EVENT_LEAF_WRITTEN)
        address = (address & ~(size_of(level) - U1)) + size_of(level)
    return np.int64(0)


@outlined
def _install_copy(m, row, child, address, head):
    """hugetlb_install_folio(): the child's word for a huge page of its own with the contents of a pinned one; NONE."""
    state = m.state
    order = huge_order(state, row)
    own = take_huge(m, order, U0)
    if own == NONE:
        return NONE
    if copy_huge(m, own, head, order) != 0:
        give_back_huge(m, own)
        return NONE
    set_anonymous(m, own, state[child + A_ANON_VMA], vma_index(state, child, address))
    map_huge(m, own)
    return new_entry(state, child, own, state[child + A_PROT] & PROT_WRITE != U0)


@outlined
def _copy_huge(m, row, child):
    """copy_hugetlb_page_range() of a private mapping: both lose write access. 0, -ENOMEM, or -ENOSPC without a huge
    page for the copy of one that is pinned."""
    state = m.state
    root = space_root(state, state[row + A_SPACE])
    level = level_of_order(huge_order(state, row))
    address = state[row + A_START]
    while address < state[row + A_END]:
        slot, at = lookup_address(m, root, address)
        if at == level:
            target = need_slot(m, state[child + A_SPACE], address, level)
            if target == NONE:
                return np.int64(-ENOMEM)
            if holds_page(m.ram[slot]):
                entry = m.ram[slot]
                head = pte_pfn(entry)
                if is_anonymous(m, head) and is_exclusive(m, head) and _needs_copy_now(m, row, head):
                    entry = _install_copy(m, row, child, address, head)
                    if entry == NONE:
                        return np.int64(-ENOSPC)
                else:
                    if entry & U1 != U0 and entry & PTE_WRITE != U0:
                        entry = protect_from_writes(entry)
                        m.ram[slot] = entry
                    duplicate_anonymous(m, head)
                m.ram[target] = entry
                change_value(m.stats, GAUGE_HOST_LEAVES_4K + level - U1, 1)
                charge_one(m, EVENT_LEAF_WRITTEN)
                gather(m, address, level)
            elif is_hwpoison(m.state, m.ram[slot]):
                m.ram[target] = m.ram[slot]
        address = (address & ~(size_of(at) - U1)) + size_of(at)
    return np.int64(0)


@kernel
def _needs_copy(state, row):
    """mm/memory.c:vma_needs_copy(): what the child could not fault in for itself."""
    return state[row + A_FLAGS] & VM_PFNMAP != U0 or state[row + A_ANON_VMA] != U0


@outlined
def _copy_vma(m, row, space):
    """Give a new process a copy of a VMA and of its entries: 0, -ENOMEM, -ENOSPC."""
    state = m.state
    child = copy_vma(state, row)
    if child == NONE:
        return np.int64(-ENOMEM)
    state[child + A_SPACE] = space
    state[child + A_FLAGS] &= ~(VM_LOCKED | VM_RESERVATION_OWNER)
    state[child + A_RESERVED] = U0
    if holds_file(state, row):
        state[inode_row(state[row + A_INODE]) + I_REFERENCES] += U1
    if state[row + A_KIND] != VMA_ANONYMOUS:
        link_vma(state, child)
    clone_anon_vma(state, child)
    if not _needs_copy(state, row):
        return np.int64(0)
    if not is_shared_mapping(state, row):
        notify_range(m, state[row + A_SPACE], state[row + A_START], state[row + A_END])
    if state[row + A_KIND] == VMA_HUGETLB:
        return _copy_huge(m, row, child)
    return _copy_small(m, row, child)


@outlined
def fork(m, op):
    """fork(): 0 with the number of the new process; -EAGAIN past words.SPACES processes, -ENOMEM; -ENOSPC where a
    pinned huge page cannot be copied."""
    state = m.state
    parent = state[op + O_SPACE]
    space = make_space(m)
    if space == NONE:
        return stop(state, op, -EAGAIN if state[R_SPACES] >= U(SPACES) else -ENOMEM)
    state[space_row(space) + S_ORDINARY] = U1
    gather_begin(m)
    address = U0
    while True:
        row = next_vma(state, parent, address, TASK_SIZE)
        if row == NONE:
            break
        if state[row + A_FLAGS] & VM_DONTCOPY != U0:
            address = state[row + A_END]
            continue
        status = _copy_vma(m, row, space)
        if status != 0:
            gather_flush(m, parent)
            end_process(m, space)
            return stop(state, op, status)
        address = state[row + A_END]
    gather_flush(m, parent)
    state[op + O_DETAIL] = space
    return stop(state, op, 0)


@outlined
def end_process(m, space):
    """exit_mmap(): every mapping, every table, the top ones too. The row is free for another process."""
    state = m.state
    row = space_row(space)
    gather_begin(m)
    notify_release(m, space)
    for i in range(state[R_VMAS]):
        vma = vma_row(i)
        if state[vma + A_LIVE] != U0 and state[vma + A_SPACE] == space:
            zap_vma(m, vma, state[vma + A_START], state[vma + A_END], UNMAP)
            close_vma(m, vma)
    free_pgtables(m, space, U0, TASK_SIZE, U0, U1 << U(47))
    gather_flush(m, space)
    put_frame(m, state[row + S_ROOT] >> U12)
    change(m.stats, GAUGE_HOST_TABLES, -1)
    if state[row + S_USER_ROOT] != U0:
        put_frame(m, state[row + S_USER_ROOT] >> U12)
        change(m.stats, GAUGE_HOST_TABLES, -1)
    clear_words(state, row, S_GENERATION)
    state[row + S_GENERATION] += U1
