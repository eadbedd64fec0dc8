"""Memory slots of VMs: over a process's memory, and over guest_memfd, whose slots are a kind among them.

virt/kvm/kvm_main.c:kvm_set_memory_region(), virt/kvm/guest_memfd.c:kvm_gmem_bind(). The designs' inodes are bound by
BIND and UNBIND, without a number; slots with a number (KVM_SET_USER_MEMORY_REGION2) show a process's memory, and their
private pages may come from a guest_memfd of 4K folios.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U2, U12, U4095
from pgemu_kernels.engine.charge import charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.handle import full_only, given_later
from pgemu_kernels.engine.memslots import (
    find_slot_id,
    first_binding,
    first_slot,
    free_memslot,
    has_slot_left,
    move_slot,
    new_memslot,
    next_binding,
    next_slot,
    number_slot,
    place_slot,
)
from pgemu_kernels.engine.rows import inode_row, vm_row
from pgemu_kernels.folios.page_cache import cache_free
from pgemu_kernels.kvm.dirty_log import apply_flags
from pgemu_kernels.stage2.invalidate import flush_vm, zap_slot
from pgemu_kernels.stage2.leaves import drop_stage2_tree
from pgemu_kernels.stage2.tdp_mmu import mark_range
from pgemu_kernels.stage2.userspace import survey_slot
from pgemu_kernels.tables.walker import free_table
from pgemu_kernels.words.enum_words import (
    EVENT_TLB_FLUSH_VM,
    FLAG_LOG_DIRTY_PAGES,
    FLAG_PRIVATE,
    FLAG_READ_ONLY,
    GAUGE_STAGE2_TABLES,
)
from pgemu_kernels.words.operations import EBADF, EEXIST, EINVAL, ENOSPC
from pgemu_kernels.words.registers import R_GMEM_MMAP, R_INODES, R_MAPPINGS, R_SPACES
from pgemu_kernels.words.rows import (
    FILTER_BOTH,
    I_FLAGS,
    I_KIND,
    I_OPEN,
    I_PAGES,
    INODE_BIND_COMMITS,
    INODE_GUEST_MEMFD,
    INODE_GUEST_MEMFD_4K,
    INODE_MMAP,
    M_BASE_GFN,
    M_DIRTY,
    M_FLAGS,
    M_HVA,
    M_PAGES,
    M_VM,
    O_ADDRESS,
    O_FLAGS,
    O_LENGTH,
    O_OBJECT,
    O_OFFSET,
    O_VM,
    S_VMS,
    S_WORDS,
    SLOT_GMEM_ONLY,
    SLOT_HAS_GUEST_MEMFD,
    SLOT_IDS,
    SLOT_LOG_DIRTY_PAGES,
    SLOT_READ_ONLY,
    SLOT_USER,
    STATE_SPACES,
    V_ATTRIBUTES,
    V_BIND_INODE,
    V_BIND_OFFSET,
    V_GENERATION,
    V_LIVE,
    V_PRIVATE_ROOT,
    V_PROTECTED,
    V_ROOT,
    V_SEQUENCE,
    V_SPACE,
    V_UNLOADED,
)

U = np.uint64
_S_WORDS = U(S_WORDS)
_GUEST_FRAMES = U(1 << 36)  # what four levels of stage 2 reach: 48 bits
USER_END = U((1 << 47) - 4096)
_MOST_PAGES = U((1 << 31) - 1)  # KVM_MEM_MAX_NR_PAGES
_ALL_GFNS = U(1 << 36)  # four levels reach 48 bits
_GENERATIONS = U((1 << 19) - 1)  # MMIO_SPTE_GEN_MASK
_NOTHING, _CREATE, _MOVE, _FLAGS_ONLY = 0, 1, 2, 3


# --------------------------------------------------------------------------- generation and trees


@outlined
def drop_tree(m, row):
    """mmu.c:kvm_mmu_zap_all_fast(): the VM's tree goes whole, the vCPU loads a new root before it runs again.

    The frame of the root is kept for the new one. A mirror stays (KVM_DIRECT_ROOTS): only its leaves can be dropped.
    """
    mark_range(m, m.state[row + V_ROOT], U0, _ALL_GFNS)
    dropped = drop_stage2_tree(m, m.state[row + V_ROOT])
    m.state[row + V_UNLOADED] = U1
    if dropped != 0:
        charge_one(m, EVENT_TLB_FLUSH_VM)


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
    """kvm_arch_flush_shadow_memslot(): an ordinary VM loses its tree, one with private memory the slot's leaves.

    The slot is invalid meanwhile, which is a generation of its own: kvm_invalidate_memslot().
    """
    state = m.state
    row = vm_row(state[slot + M_VM])
    state[row + V_SEQUENCE] += U1  # is_page_fault_stale()
    next_generation(m, row)
    if state[row + V_PROTECTED] == U0:
        drop_tree(m, row)
        return
    base = state[slot + M_BASE_GFN]
    mark_range(m, state[row + V_ROOT], base, base + state[slot + M_PAGES])
    zap_slot(m, slot, base, base + state[slot + M_PAGES], FILTER_BOTH)
    flush_vm(m, state[slot + M_VM])


@kernel
def free_bitmap(m, slot):
    """The dirty bitmap goes with its slot."""
    cache_free(m, slot + M_DIRTY)


bitmap_freed = full_only(free_bitmap, None)  # the designs' slots have none


@outlined
def delete_slot(m, slot):
    """KVM_MR_DELETE: leaves, dirty bitmap and row. kvm_main.c:kvm_set_memslot()"""
    state = m.state
    row = vm_row(state[slot + M_VM])
    drop_slot_leaves(m, slot)
    next_generation(m, row)
    bitmap_freed(m, slot)
    free_memslot(state, slot)


# --------------------------------------------------------------------------- checks


@kernel
def check_addresses(state, op):
    """What kvm_set_memory_region() asks of every slot's addresses: the guest's, and those of what it shows."""
    address = state[op + O_ADDRESS]
    offset = state[op + O_OFFSET]
    length = state[op + O_LENGTH]
    if (address | offset | length) & U4095 != U0 or address + length < address or offset + length < offset:
        return np.int64(-EINVAL)
    return np.int64(-EINVAL if length >> U12 > _MOST_PAGES else 0)


@kernel
def overlaps_other(state, vm, old, gfn, end):
    """kvm_main.c:kvm_check_memslot_overlap(): whether another slot of the VM has some of the guest frames."""
    slot = first_slot(state, vm, gfn, end)
    if slot != U0 and slot == old:
        slot = next_slot(state, slot, gfn, end)
    return slot != U0


@kernel
def check_binding(state, op, kind, inode, offset):
    """virt/kvm/guest_memfd.c:kvm_gmem_bind() of a new slot's pages, which begin at byte `offset`: 0, -EBADF, or -EINVAL
    for a file of another kind, past the file's end, or over another binding of the same file.

    One inode of the designs has a file for each VM, a guest_memfd of 4K folios is one file. linux-next finds pages that
    are bound already when the slot is committed: -EEXIST.
    """
    node = inode_row(inode)
    if inode >= state[R_INODES] or state[node + I_OPEN] == U0:
        return np.int64(-EBADF)
    start = offset >> U12
    end = start + (state[op + O_LENGTH] >> U12)
    if state[node + I_KIND] != kind or offset & U4095 != U0 or end > state[node + I_PAGES]:
        return np.int64(-EINVAL)
    slot = first_binding(state, inode, start, end)
    while slot != U0:
        if kind != INODE_GUEST_MEMFD or state[slot + M_VM] == state[op + O_VM]:
            return np.int64(-EEXIST if state[node + I_FLAGS] & INODE_BIND_COMMITS != U0 else -EINVAL)
        slot = next_binding(state, slot, start, end)
    return np.int64(0)


@kernel
def check_reach(state, op):
    """x86.c:kvm_arch_prepare_memory_region(): what no table reaches is -EINVAL, found after everything else."""
    end = (state[op + O_ADDRESS] >> U12) + (state[op + O_LENGTH] >> U12)
    return np.int64(-EINVAL if end > _GUEST_FRAMES else 0)


@kernel
def create_slot(m, op, kind, inode, offset):
    """KVM_MR_CREATE: the row of a slot that shows an inode's pages from byte `offset` on, or NONE where the machine's
    table of slots is full. Its userspace address is yet to come."""
    state = m.state
    vm = state[op + O_VM]
    gfn = state[op + O_ADDRESS] >> U12
    slot = new_memslot(state, vm, gfn, state[op + O_LENGTH] >> U12, kind, inode, offset >> U12)
    if slot != NONE:
        next_generation(m, vm_row(vm))
    return slot


# --------------------------------------------------------------------------- KVM_SET_USER_MEMORY_REGION2


@kernel
def slot_flags(flags):
    """Slot flags of an operation's flags."""
    value = SLOT_LOG_DIRTY_PAGES if flags & FLAG_LOG_DIRTY_PAGES != U0 else U0
    if flags & FLAG_READ_ONLY != U0:
        value |= SLOT_READ_ONLY
    if flags & FLAG_PRIVATE != U0:
        value |= SLOT_HAS_GUEST_MEMFD
    return value


@outlined
def check_region(state, op, row, flags):
    """The sanity checks of kvm_set_memory_region(), check_memory_region_flags() and access_ok(): 0 or -EINVAL."""
    length = state[op + O_LENGTH]
    hva = state[op + O_OFFSET]
    if flags & SLOT_HAS_GUEST_MEMFD != U0:
        if flags & (SLOT_LOG_DIRTY_PAGES | SLOT_READ_ONLY) != U0:
            return np.int64(-EINVAL)
        if state[row + V_PROTECTED] == U0 and state[R_GMEM_MMAP] == U0:
            return np.int64(-EINVAL)
    if hva > USER_END or length > USER_END - hva:
        return np.int64(-EINVAL)
    if state[row + V_SPACE] >= state[R_SPACES] or state[op + O_OBJECT] >= U(SLOT_IDS):
        return np.int64(-EINVAL)  # a VM of no process has no userspace addresses
    return check_addresses(state, op)


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


@outlined
def check_change(state, op, old, change, inode, offset):
    """What creating or moving a slot is refused with: -EEXIST, what its guest_memfd is, -EINVAL; or 0."""
    gfn = state[op + O_ADDRESS] >> U12
    if overlaps_other(state, state[op + O_VM], old, gfn, gfn + (state[op + O_LENGTH] >> U12)):
        return np.int64(-EEXIST)
    if change == _CREATE and state[op + O_FLAGS] & FLAG_PRIVATE != U0:
        status = check_binding(state, op, INODE_GUEST_MEMFD_4K, inode, offset)
        if status != 0:
            return status
    return check_reach(state, op)


@kernel
def create_user_slot(m, op, flags, inode, offset):
    """A slot over a process's memory, and over a guest_memfd if the flags say so: 0 or -ENOSPC."""
    state = m.state
    private = flags & SLOT_HAS_GUEST_MEMFD != U0
    slot = create_slot(m, op, SLOT_USER, inode if private else NONE, offset if private else U0)
    if slot == NONE:
        return np.int64(-ENOSPC)
    number_slot(state, slot, state[op + O_OBJECT])
    place_slot(state, slot, state[op + O_OFFSET])
    survey_slot(state, slot)
    state[slot + M_FLAGS] = flags
    if private and state[inode_row(inode) + I_FLAGS] & INODE_MMAP != U0:
        state[slot + M_FLAGS] |= SLOT_GMEM_ONLY
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
    inode = state[row + V_BIND_INODE] - U1  # of this call, whatever becomes of it
    state[row + V_BIND_INODE] = U0
    status = check_region(state, op, row, flags)
    if status != 0:
        return status
    old = find_slot_id(state, vm, state[op + O_OBJECT])
    if state[op + O_LENGTH] == U0:
        if old == NONE:
            return np.int64(-EINVAL)
        delete_slot(m, old)
        return np.int64(0)
    change = kind_of_change(state, op, old, flags)
    if change == _CREATE or change == _MOVE:
        status = check_change(state, op, old, change, inode, state[row + V_BIND_OFFSET])
        if status != 0:
            return status
    if change == _CREATE:
        if not has_slot_left(state, row):
            return np.int64(-EINVAL)  # all numbers are taken, by slots of the designs' inodes
        return create_user_slot(m, op, flags, inode, state[row + V_BIND_OFFSET])
    if change == _MOVE:
        drop_slot_leaves(m, old)
        move_slot(state, old, state[op + O_ADDRESS] >> U12)
        state[old + M_FLAGS] = flags
        if flags & SLOT_LOG_DIRTY_PAGES == U0:
            cache_free(m, old + M_DIRTY)
        next_generation(m, row)
    elif change == _FLAGS_ONLY:
        next_generation(m, row)
        apply_flags(m, old, flags)
    return min(change, np.int64(0))


# --------------------------------------------------------------------------- the end of a VM


@kernel
def free_tree(m, root):
    """A stage-2 root goes with all below it."""
    mark_range(m, root, U0, _ALL_GFNS)
    drop_stage2_tree(m, root)
    free_table(m, root >> U12, GAUGE_STAGE2_TABLES)


# What KVM itself has mapped of a VM's pages (m, vm) goes with its vCPUs: gmem/mapped_pages.py
mapped_pages_end, give_mapped_pages_end = given_later()


@outlined
def close_vm(m, op):
    """The last reference to a VM goes: its slots, its tables, its attributes, what KVM has mapped. 0.
    kvm_main.c:kvm_destroy_vm()"""
    state = m.state
    vm = state[op + O_VM]
    mapped_pages_end(m, vm)
    row = vm_row(vm)
    free_tree(m, state[row + V_ROOT])
    if state[row + V_PRIVATE_ROOT] != state[row + V_ROOT]:
        free_tree(m, state[row + V_PRIVATE_ROOT])
    slot = first_slot(state, vm, U0, NONE)
    while slot != U0:
        cache_free(m, slot + M_DIRTY)
        free_memslot(state, slot)
        slot = first_slot(state, vm, U0, NONE)
    cache_free(m, row + V_ATTRIBUTES)
    space = state[row + V_SPACE]
    if space < state[R_SPACES]:
        state[STATE_SPACES + space * _S_WORDS + S_VMS] &= ~(U1 << vm)
        state[R_MAPPINGS] += U1
    state[row + V_ROOT] = U0
    state[row + V_PRIVATE_ROOT] = U0
    state[row + V_LIVE] = U0
    return np.int64(0)
