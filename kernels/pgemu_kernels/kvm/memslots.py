"""Memory slots over a process's memory: KVM_SET_USER_MEMORY_REGION2, dirty logging, and what a VM leaves behind.

virt/kvm/kvm_main.c:kvm_set_memory_region(), arch/x86/kvm/x86.c:kvm_mmu_slot_apply_flags().
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U2, U3, U6, U9, U12, U64, U4095, pages_of, population
from pgemu_kernels.engine.charge import STAGE2_TABLES, TLB_FLUSH_VM, charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.rows import free_row, inode_row, memslot_row, overlap, space_root, vm_row
from pgemu_kernels.folios.page_cache import cache_find, cache_free, cache_next, cache_store
from pgemu_kernels.kvm.attributes import is_private
from pgemu_kernels.kvm.fault import from_guest_memfd, max_level
from pgemu_kernels.stage2.invalidate import zap_slot
from pgemu_kernels.stage2.leaves import drop_stage2_tree
from pgemu_kernels.stage2.tdp_mmu import (
    collapse,
    is_table,
    split_range,
    write_protect_page,
    write_protect_range,
)
from pgemu_kernels.tables.walker import find_leaf, free_table, host_format, is_present, stage2_format, table_of
from pgemu_kernels.words.operations import EBADF, EEXIST, EINVAL, ENOENT, ENOSPC, Flag
from pgemu_kernels.words.registers import R_GMEM_MMAP, R_INODES, R_MEMSLOTS, R_SPACES
from pgemu_kernels.words.rows import (
    I_FLAGS,
    I_KIND,
    I_OPEN,
    I_PAGES,
    INODE_GUEST_MEMFD_4K,
    INODE_MMAP,
    M_BASE_GFN,
    M_DIRTY,
    M_FLAGS,
    M_HVA,
    M_ID,
    M_INODE,
    M_KIND,
    M_LIVE,
    M_PAGES,
    M_PGOFF,
    M_VM,
    M_WORDS,
    MEMSLOTS,
    O_ADDRESS,
    O_DETAIL,
    O_FLAGS,
    O_LENGTH,
    O_OBJECT,
    O_OFFSET,
    O_VM,
    SLOT_GMEM_ONLY,
    SLOT_HAS_GUEST_MEMFD,
    SLOT_IDS,
    SLOT_LOG_DIRTY_PAGES,
    SLOT_READ_ONLY,
    SLOT_USER,
    V_ATTRIBUTES,
    V_BIND_INODE,
    V_BIND_OFFSET,
    V_GENERATION,
    V_LIVE,
    V_PROTECTED,
    V_ROOT,
    V_SEQUENCE,
    V_SPACE,
    V_UNLOADED,
)

U = np.uint64
_M_WORDS = U(M_WORDS)
_GUEST_FRAMES = U(1 << 36)  # what four levels of stage 2 reach: 48 bits
_USER_END = U((1 << 47) - 4096)
_MOST_PAGES = U((1 << 31) - 1)  # KVM_MEM_MAX_NR_PAGES
_GENERATIONS = U((1 << 19) - 1)  # MMIO_SPTE_GEN_MASK
_READ_ONLY = U(Flag.READ_ONLY)
_LOG_DIRTY = U(Flag.LOG_DIRTY_PAGES)
_PRIVATE = U(Flag.PRIVATE)
_NOTHING, _CREATE, _MOVE, _FLAGS_ONLY = 0, 1, 2, 3


# --------------------------------------------------------------------------- generation and trees


@outlined
def drop_tree(m, row):
    """mmu.c:kvm_mmu_zap_all_fast(): the VM's tree goes whole, the vCPU loads a new root before it runs again.

    The frame of the root is kept for the new one.
    """
    dropped = drop_stage2_tree(m, m.state[row + V_ROOT])
    m.state[row + V_UNLOADED] = U1
    if dropped != 0:
        charge_one(m, TLB_FLUSH_VM)


@outlined
def next_generation(m, row):
    """kvm_main.c:kvm_swap_active_memslots(): another set of slots is in force, cached MMIO entries are out of date.

    Two address spaces share the numbers (SMM), but a VM with private memory has only one. When the part that fits
    an entry wraps, everything is dropped: mmu.c:kvm_mmu_invalidate_mmio_sptes().
    """
    state = m.state
    state[row + V_GENERATION] += U1 if state[row + V_PROTECTED] != U0 else U2
    if state[row + V_GENERATION] & _GENERATIONS == U0:
        drop_tree(m, row)


@outlined
def drop_slot_leaves(m, slot):
    """kvm_arch_flush_shadow_memslot(): an ordinary VM loses its tree, one with private memory the slot's leaves."""
    state = m.state
    row = vm_row(state[slot + M_VM])
    state[row + V_SEQUENCE] += U1  # is_page_fault_stale()
    next_generation(m, row)
    if state[row + V_PROTECTED] == U0:
        drop_tree(m, row)
        return
    base = state[slot + M_BASE_GFN]
    if zap_slot(m, slot, base, base + state[slot + M_PAGES]) != 0:
        charge_one(m, TLB_FLUSH_VM)


@outlined
def delete_user_slot(m, slot):
    """KVM_MR_DELETE: leaves, dirty bitmap and row."""
    state = m.state
    row = vm_row(state[slot + M_VM])
    drop_slot_leaves(m, slot)
    next_generation(m, row)
    cache_free(m, slot + M_DIRTY)
    for word in range(_M_WORDS):
        state[slot + word] = U0


# --------------------------------------------------------------------------- checks


@kernel
def find_slot_id(state, vm, number):
    """The row of a VM's slot by userspace's number, or NONE."""
    for i in range(state[R_MEMSLOTS]):
        slot = memslot_row(i)
        if state[slot + M_LIVE] != U0 and state[slot + M_VM] == vm and state[slot + M_KIND] == SLOT_USER:
            if state[slot + M_ID] == number:
                return slot
    return NONE


@kernel
def slot_flags(flags):
    """Slot flags of an operation's flags."""
    value = SLOT_LOG_DIRTY_PAGES if flags & _LOG_DIRTY != U0 else U0
    if flags & _READ_ONLY != U0:
        value |= SLOT_READ_ONLY
    if flags & _PRIVATE != U0:
        value |= SLOT_HAS_GUEST_MEMFD
    return value


@outlined
def check_region(state, op, row, flags):
    """The sanity checks of kvm_set_memory_region(), check_memory_region_flags() and access_ok(): 0 or -EINVAL."""
    address = state[op + O_ADDRESS]
    length = state[op + O_LENGTH]
    hva = state[op + O_OFFSET]
    if flags & SLOT_HAS_GUEST_MEMFD != U0:
        if flags & (SLOT_LOG_DIRTY_PAGES | SLOT_READ_ONLY) != U0:
            return np.int64(-EINVAL)
        if state[row + V_PROTECTED] == U0 and state[R_GMEM_MMAP] == U0:
            return np.int64(-EINVAL)
    if (address | length | hva) & U4095 != U0 or address + length < address:
        return np.int64(-EINVAL)
    if hva > _USER_END or length > _USER_END - hva or length >> U12 > _MOST_PAGES:
        return np.int64(-EINVAL)
    if state[row + V_SPACE] >= state[R_SPACES]:
        return np.int64(-EINVAL)  # a VM of no process has no userspace addresses
    return np.int64(0 if state[op + O_OBJECT] < U(SLOT_IDS) else -EINVAL)


@kernel
def kind_of_change(state, op, old, flags):
    """What a call asks of a slot that may exist: a change, or -EINVAL. Size, userspace address, and whether it is
    read-only or has a guest_memfd cannot change."""
    if old == NONE:
        return np.int64(_CREATE)
    fixed = SLOT_READ_ONLY | SLOT_HAS_GUEST_MEMFD
    if flags & SLOT_HAS_GUEST_MEMFD != U0 or (flags ^ state[old + M_FLAGS]) & fixed != U0:
        return np.int64(-EINVAL)
    if state[op + O_OFFSET] != state[old + M_HVA] or state[op + O_LENGTH] >> U12 != state[old + M_PAGES]:
        return np.int64(-EINVAL)
    if state[op + O_ADDRESS] >> U12 != state[old + M_BASE_GFN]:
        return np.int64(_MOVE)
    return np.int64(_NOTHING if flags == state[old + M_FLAGS] else _FLAGS_ONLY)


@kernel
def overlaps_other(state, vm, old, gfn, end):
    """kvm_main.c:kvm_check_memslot_overlap(): whether another slot of the VM has some of the guest frames."""
    for i in range(state[R_MEMSLOTS]):
        slot = memslot_row(i)
        if state[slot + M_LIVE] != U0 and state[slot + M_VM] == vm and slot != old:
            if gfn < state[slot + M_BASE_GFN] + state[slot + M_PAGES] and state[slot + M_BASE_GFN] < end:
                return True
    return False


# --------------------------------------------------------------------------- guest_memfd of a slot


@outlined
def stage_guest_memfd(m, op):
    """Name the guest_memfd and the offset that the VM's next slot takes its private pages from: 0 or -EBADF.

    One system call in Linux; its arguments are more than an operation has columns.
    """
    state = m.state
    row = vm_row(state[op + O_VM])
    inode = state[op + O_OBJECT]
    if inode >= state[R_INODES] or state[inode_row(inode) + I_OPEN] == U0:
        return np.int64(-EBADF)
    state[row + V_BIND_INODE] = inode + U1
    state[row + V_BIND_OFFSET] = state[op + O_OFFSET]
    return np.int64(0)


@kernel
def check_binding(state, inode, start, pages):
    """virt/kvm/guest_memfd.c:kvm_gmem_bind(): 0, -EBADF, or -EINVAL past the file's end or over another binding."""
    if inode >= state[R_INODES] or state[inode_row(inode) + I_OPEN] == U0:
        return np.int64(-EBADF)
    if state[inode_row(inode) + I_KIND] != INODE_GUEST_MEMFD_4K or start + pages > state[inode_row(inode) + I_PAGES]:
        return np.int64(-EINVAL)
    for i in range(state[R_MEMSLOTS]):
        first, last = overlap(state, memslot_row(i), inode, start, start + pages)
        if first < last:
            return np.int64(-EINVAL)
    return np.int64(0)


@kernel
def bind_guest_memfd(state, row, slot):
    """Bind a new slot to what was named before: 0, -EBADF or -EINVAL."""
    offset = state[row + V_BIND_OFFSET]
    inode = state[row + V_BIND_INODE] - U1
    state[row + V_BIND_INODE] = U0
    if offset & U4095 != U0:
        return np.int64(-EINVAL)
    status = check_binding(state, inode, offset >> U12, state[slot + M_PAGES])
    if status == 0:
        state[slot + M_INODE] = inode
        state[slot + M_PGOFF] = offset >> U12
        if state[inode_row(inode) + I_FLAGS] & INODE_MMAP != U0:
            state[slot + M_FLAGS] |= SLOT_GMEM_ONLY
    return status


# --------------------------------------------------------------------------- dirty logging


@outlined
def recover_huge_pages(m, slot):
    """Dirty logging is off: put large leaves back where host and slot allow them: how many tables went.

    mmu.c:kvm_mmu_recover_huge_pages() (6.12: kvm_mmu_zap_collapsible_sptes()). The host's own leaf decides, and
    nothing is faulted in.
    """
    state = m.state
    f = stage2_format(m)
    row = vm_row(state[slot + M_VM])
    gfn = state[slot + M_BASE_GFN]
    end = gfn + state[slot + M_PAGES]
    replaced = np.int64(0)
    while gfn < end:
        entry = m.ram[(state[row + V_ROOT] >> U3) + (gfn >> (U9 * U3))]
        level = U3
        gone = np.int64(0)
        if is_present(state, f, entry):
            while level > U1:
                spte = table_of(state, f, entry) + (gfn >> (U9 * (level - U1)) & U(511))
                entry = m.ram[spte]
                if not is_table(state, f, entry, level):
                    break
                if gfn & (pages_of(level) - U1) == U0 and recoverable_level(m, row, slot, gfn) >= level:
                    gone = collapse(m, f, spte, level)
                    break
                level -= U1
        replaced += gone
        step = pages_of(max(level, U2))
        gfn = (gfn & ~(step - U1)) + step
    return replaced


@kernel
def recoverable_level(m, row, slot, gfn):
    """mmu.c:kvm_mmu_max_mapping_level() for a page that is mapped: the host's leaf as it stands."""
    state = m.state
    if from_guest_memfd(state, slot, is_private(m, row, gfn)):
        return U1
    address = state[slot + M_HVA] + ((gfn - state[slot + M_BASE_GFN]) << U12)
    host, level = host_leaf(m, state[row + V_SPACE], address >> U12)
    return max_level(m, row, slot, gfn, level) if host != NONE else U1


@kernel
def host_leaf(m, space, page):
    """A process's leaf of a page: its slot or NONE, and its level."""
    return find_leaf(m, host_format(m), space_root(m.state, space), page)


@outlined
def apply_flags(m, slot, flags):
    """x86.c:kvm_mmu_slot_apply_flags(): only dirty logging can change, and a read-only slot cannot get dirty."""
    state = m.state
    row = vm_row(state[slot + M_VM])
    root = state[row + V_ROOT]
    gfn = state[slot + M_BASE_GFN]
    end = gfn + state[slot + M_PAGES]
    state[slot + M_FLAGS] = flags
    if flags & SLOT_LOG_DIRTY_PAGES == U0:
        cache_free(m, slot + M_DIRTY)
    if flags & SLOT_READ_ONLY != U0:
        return
    if flags & SLOT_LOG_DIRTY_PAGES != U0:
        split_range(m, root, gfn, end)  # without memory the rest stays large, and write-protected
        write_protect_range(m, root, gfn, end)
        charge_one(m, TLB_FLUSH_VM)  # whether anything changed or not
    else:
        recover_huge_pages(m, slot)


@outlined
def get_dirty_log(m, op):
    """KVM_GET_DIRTY_LOG: 0, -EINVAL or -ENOENT; detail is how many pages were dirty.

    The bitmap is cleared, and the pages are write-protected again, with one flush.
    kvm_main.c:kvm_get_dirty_log_protect().
    """
    state = m.state
    if state[op + O_OBJECT] >= U(SLOT_IDS):
        return np.int64(-EINVAL)
    slot = find_slot_id(state, state[op + O_VM], state[op + O_OBJECT])
    if slot == NONE or state[slot + M_FLAGS] & SLOT_LOG_DIRTY_PAGES == U0:
        return np.int64(-ENOENT)
    f = stage2_format(m)
    root = state[vm_row(state[op + O_VM]) + V_ROOT]
    index = cache_next(m, state[slot + M_DIRTY], U0)
    while index != NONE:
        word = cache_find(m, state[slot + M_DIRTY], index)
        state[op + O_DETAIL] += population(word)
        for bit in range(U64):
            if word >> bit & U1 != U0:
                write_protect_page(m, f, root, state[slot + M_BASE_GFN] + (index << U6) + bit)
        cache_store(m, slot + M_DIRTY, index, U0)
        index = cache_next(m, state[slot + M_DIRTY], index + U1)
    if state[op + O_DETAIL] != U0:
        charge_one(m, TLB_FLUSH_VM)
    return np.int64(0)


# --------------------------------------------------------------------------- KVM_SET_USER_MEMORY_REGION2


@outlined
def create_slot(m, op, row, flags):
    """KVM_MR_CREATE: 0, -EBADF, -EINVAL, or -ENOSPC where the machine's table of slots is full."""
    state = m.state
    slot = free_row(state, R_MEMSLOTS, U(MEMSLOTS), _M_WORDS, M_LIVE, memslot_row(U0))
    if slot == NONE:
        return np.int64(-ENOSPC)
    state[slot + M_KIND] = SLOT_USER
    state[slot + M_VM] = state[op + O_VM]
    state[slot + M_ID] = state[op + O_OBJECT]
    state[slot + M_HVA] = state[op + O_OFFSET]
    state[slot + M_FLAGS] = flags
    state[slot + M_INODE] = NONE
    state[slot + M_PAGES] = state[op + O_LENGTH] >> U12
    if flags & SLOT_HAS_GUEST_MEMFD != U0:
        status = bind_guest_memfd(state, row, slot)
        if status != 0:
            for word in range(_M_WORDS):
                state[slot + word] = U0
            return status
    state[slot + M_BASE_GFN] = state[op + O_ADDRESS] >> U12
    state[slot + M_LIVE] = U1
    next_generation(m, row)
    return np.int64(0)


@outlined
def set_memory_region(m, op):
    """KVM_SET_USER_MEMORY_REGION2: create, delete (length 0), move a slot, or switch its dirty logging.

    object: the slot's number; address, length: guest physical; offset: userspace address. 0, -EINVAL, -EEXIST,
    -EBADF, -ENOSPC.
    """
    state = m.state
    vm = state[op + O_VM]
    row = vm_row(vm)
    flags = slot_flags(state[op + O_FLAGS])
    status = check_region(state, op, row, flags)
    if status != 0:
        return status
    old = find_slot_id(state, vm, state[op + O_OBJECT])
    if state[op + O_LENGTH] == U0:
        if old == NONE:
            return np.int64(-EINVAL)
        delete_user_slot(m, old)
        return np.int64(0)
    change = kind_of_change(state, op, old, flags)
    gfn = state[op + O_ADDRESS] >> U12
    end = gfn + (state[op + O_LENGTH] >> U12)
    if change == _CREATE or change == _MOVE:
        if overlaps_other(state, vm, old, gfn, end):
            return np.int64(-EEXIST)
        if end > _GUEST_FRAMES:
            return np.int64(-EINVAL)
    if change == _CREATE:
        return create_slot(m, op, row, flags)
    if change == _MOVE:
        drop_slot_leaves(m, old)
        state[old + M_BASE_GFN] = gfn
        state[old + M_FLAGS] = flags
        if flags & SLOT_LOG_DIRTY_PAGES == U0:
            cache_free(m, old + M_DIRTY)
        next_generation(m, row)
    elif change == _FLAGS_ONLY:
        next_generation(m, row)
        apply_flags(m, old, flags)
    return min(change, np.int64(0))


# --------------------------------------------------------------------------- the end of a VM


@outlined
def close_vm(m, op):
    """The last reference to a VM goes: its slots, its tables, its attributes. 0. kvm_main.c:kvm_destroy_vm()."""
    state = m.state
    vm = state[op + O_VM]
    row = vm_row(vm)
    drop_stage2_tree(m, state[row + V_ROOT])
    free_table(m, state[row + V_ROOT] >> U12, STAGE2_TABLES)
    for i in range(state[R_MEMSLOTS]):
        slot = memslot_row(i)
        if state[slot + M_LIVE] != U0 and state[slot + M_VM] == vm:
            cache_free(m, slot + M_DIRTY)
            for word in range(_M_WORDS):
                state[slot + word] = U0
    cache_free(m, row + V_ATTRIBUTES)
    state[row + V_ROOT] = U0
    state[row + V_LIVE] = U0
    return np.int64(0)
