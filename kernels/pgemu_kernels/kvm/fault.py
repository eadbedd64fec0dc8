"""A guest's access to its physical memory: the leaf that is there, the fast fix, or the fault of the TDP MMU.

arch/x86/kvm/mmu/mmu.c:kvm_mmu_page_fault() and what it calls.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U6, U12, U63
from pgemu_kernels.engine.charge import charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.handle import full_only
from pgemu_kernels.engine.memslots import find_memslot
from pgemu_kernels.engine.rows import (
    inode_row,
    is_live_vm,
    root_of_kind,
    slot_allows,
    stop,
    vm_row,
)
from pgemu_kernels.engine.shareability import is_shared
from pgemu_kernels.folios.anonymous_folios import is_of_anonymous_folio, set_large_dirty
from pgemu_kernels.folios.folio import FLAGS, PG_DIRTY, mark_accessed, struct_page
from pgemu_kernels.folios.page_cache import cache_find, cache_store
from pgemu_kernels.folios.poison import note_signal
from pgemu_kernels.kvm.attributes import is_mixed, is_private
from pgemu_kernels.process.fault import follow_any
from pgemu_kernels.process.guest_memfd_4k import find_or_add_folio, set_folio_dirty
from pgemu_kernels.stage2.entries import LARGEST, is_access_allowed, last_spte, make_mmio_spte, nx_huge_pages
from pgemu_kernels.stage2.invalidate import retry_fault
from pgemu_kernels.stage2.leaves import map_leaf, map_mmio, map_target_level, slot_for
from pgemu_kernels.stage2.regions import note_leaf
from pgemu_kernels.stage2.tdp_mmu import set_accessed_dirty
from pgemu_kernels.tables.walker import find_entry, is_present, stage2_format
from pgemu_kernels.words.enum_words import EVENT_GUEST_FAULT, FLAG_EXEC, FLAG_PRIVATE, FLAG_SHARED, FLAG_WRITE
from pgemu_kernels.words.failures import BUS_MCEERR_AR
from pgemu_kernels.words.operations import (
    EAGAIN,
    EBADF,
    EFAULT,
    EHWPOISON,
    EINTR,
    ENOMEM,
    EOPNOTSUPP,
    RET_PF_EMULATE,
    RET_PF_FIXED,
    RET_PF_RETRY,
    RET_PF_SPURIOUS,
)
from pgemu_kernels.words.registers import R_BOOT_FRAMES, R_FRAMES, R_GUEST_PAGES, R_MARKS_ZAPPED, R_POOL_BASE
from pgemu_kernels.words.rows import (
    M_BASE_GFN,
    M_DIRTY,
    M_FLAGS,
    M_HVA,
    M_INODE,
    M_KIND,
    M_PGOFF,
    O_ADDRESS,
    O_DETAIL,
    O_FLAGS,
    O_HOLE,
    O_HOLE_MIDDLE,
    O_INDEX,
    O_INODE,
    O_PFN,
    O_SEQUENCE,
    O_VM,
    PAGE_POISONED,
    SLOT_GMEM_ONLY,
    SLOT_GUEST_MEMFD,
    SLOT_HAS_GUEST_MEMFD,
    SLOT_LOG_DIRTY_PAGES,
    SLOT_READ_ONLY,
    SLOT_USER,
    V_GENERATION,
    V_PRIVATE_ROOT,
    V_ROOT,
    V_SEQUENCE,
    V_SPACE,
    V_UNLOADED,
)
from pgemu_kernels.words.table_words import F_EMPTY, F_MMU_WRITABLE, F_WRITE

U = np.uint64
ATTEMPTS = 4  # an access ends at the second: the first one breaks a copy on write, which drops the leaf
_MAX_GFN = U(1 << 36)  # four levels reach 48 bits


@kernel
def load_root(state, row):
    """The vCPU runs: after its tree went with a slot it has a new root."""
    state[row + V_UNLOADED] = U0


@outlined
def mark_dirty(m, slot, gfn):
    """kvm_main.c:mark_page_dirty_in_slot(): 0, or -ENOMEM (Linux allocates the whole bitmap beforehand)."""
    state = m.state
    if state[slot + M_FLAGS] & SLOT_LOG_DIRTY_PAGES == U0:
        return np.int64(0)
    page = gfn - state[slot + M_BASE_GFN]
    old = cache_find(m, state[slot + M_DIRTY], page >> U6)
    return cache_store(m, slot + M_DIRTY, page >> U6, old | U1 << (page & U63))


@kernel
def is_device(state, pfn):
    """kvm_is_mmio_pfn(): whether a frame is no RAM: neither of the metadata zone nor of the HugeTLB zone."""
    if pfn < state[R_FRAMES] + state[R_BOOT_FRAMES]:
        return False
    return pfn - state[R_POOL_BASE] >= state[R_GUEST_PAGES]


@kernel
def max_level(m, row, slot, gfn, host_level):
    """mmu.c:kvm_mmu_max_mapping_level(), dirty logging apart."""
    level = min(host_level, LARGEST)
    source = m.state[slot + M_HVA] >> U12
    while level > U1 and not (slot_allows(m.state, slot, gfn, level, source) and not is_mixed(m, row, gfn, level)):
        level -= U1
    return level


@kernel
def from_guest_memfd(state, slot, private):
    """Whether the page of an access comes from the slot's guest_memfd."""
    return private or state[slot + M_FLAGS] & SLOT_GMEM_ONLY != U0


@outlined
def find_pfn(m, row, slot, gfn, write, private):
    """mmu.c:__kvm_mmu_faultin_pfn(): (status, pfn, host's level, writable, refcounted). The status is 0, -EFAULT,
    -ENOMEM, RET_PF_EMULATE, or RET_PF_RETRY while a conversion holds the invalidate_lock.

    A write to a read-only slot is emulated. Private memory without a guest_memfd is a memory fault exit. A poisoned
    page of guest_memfd is -EHWPOISON, a memory fault exit (kvm_gmem_get_pfn()); of a process's memory the vCPU's task
    gets SIGBUS and KVM_RUN is interrupted, -EINTR (mmu.c:kvm_send_hwpoison_signal()).
    """
    state = m.state
    read_only = state[slot + M_FLAGS] & SLOT_READ_ONLY != U0
    page = gfn - state[slot + M_BASE_GFN]
    if from_guest_memfd(state, slot, private):
        if state[slot + M_FLAGS] & SLOT_HAS_GUEST_MEMFD == U0 or state[slot + M_INODE] == NONE:
            return np.int64(-EFAULT), U0, U1, False, False
        status, pfn = find_or_add_folio(m, inode_row(state[slot + M_INODE]), state[slot + M_PGOFF] + page)
        if status == 0 and U(m.counts[pfn]) & PAGE_POISONED != U0:
            status = np.int64(-EHWPOISON)
        return status, pfn, U1, True, True
    if write and read_only:
        return np.int64(RET_PF_EMULATE), U0, U1, False, False
    address = state[slot + M_HVA] + (page << U12)
    status, pfn, level, writable, counted = follow_any(m, state[row + V_SPACE], address, write)
    if status == -EHWPOISON:
        note_signal(state, state[row + V_SPACE], address, BUS_MCEERR_AR, U12)
        status = np.int64(-EINTR)
    if status == -EAGAIN:  # a conversion is under way
        status = np.int64(RET_PF_RETRY)
    return status, pfn, level, writable and not read_only, counted


# --------------------------------------------------------------------------- outside every slot


frame_is_private = full_only(is_private, False)  # the fast loops know no VM with attributes (routing.py)


@outlined
def no_slot(m, row, gfn, private):
    """mmu.c:kvm_handle_noslot_fault(): (RET_PF_EMULATE, -EFAULT or -ENOMEM; level of the entry that caches it, or 0).

    The access is emulated as a device's, which is cached; of private memory it is an exit. A cached one does not fault
    again: handle_mmio_page_fault(). A mirror has none.
    """
    state = m.state
    f = stage2_format(m)
    root = root_of_kind(state, row, private)
    if gfn < _MAX_GFN:
        _, _, entry = last_spte(m, f, root, gfn)
        if entry != state[f + F_EMPTY] and entry == make_mmio_spte(state, f, gfn, state[row + V_GENERATION]):
            return np.int64(RET_PF_EMULATE), U1
    if private:
        return np.int64(-EFAULT), U0
    if gfn >= _MAX_GFN:
        return np.int64(RET_PF_EMULATE), U0
    status = map_mmio(m, root, gfn, state[row + V_GENERATION])
    return status, U1 if status > 0 else U0


@outlined
def access_outside(m, op):
    """A guest's access outside every slot of its VM: RET_PF_EMULATE, an MMIO exit, or -EFAULT, -ENOMEM; -EBADF of a
    closed VM. detail is the level of the entry that caches it.

    Memory outside slots is not private, so an access that says it is exits: mmu.c:kvm_mmu_faultin_pfn(), which
    compares the kinds before it looks at the slot.
    """
    state = m.state
    vm = state[op + O_VM]
    gfn = state[op + O_ADDRESS] >> U12
    if not is_live_vm(state, vm):
        return stop(state, op, -EBADF)
    row = vm_row(vm)
    load_root(state, row)
    charge_one(m, EVENT_GUEST_FAULT)
    private = frame_is_private(m, row, gfn)
    kind = state[op + O_FLAGS] & (FLAG_PRIVATE | FLAG_SHARED)
    if kind != U0 and kind != (FLAG_PRIVATE if private else FLAG_SHARED):
        return stop(state, op, -EFAULT)
    status, level = no_slot(m, row, gfn, private)
    state[op + O_DETAIL] = level
    return stop(state, op, status)


# --------------------------------------------------------------------------- in a slot of guest_memfd


@kernel
def refuse_user_slot(m, op, slot):
    """Step by step there are only accesses to the designs' slots: -EOPNOTSUPP, and True."""
    if m.state[slot + M_KIND] == SLOT_GUEST_MEMFD:
        return False
    stop(m.state, op, -EOPNOTSUPP)
    return True


is_user_slot = full_only(refuse_user_slot, False)  # the fast loops meet no other slots (routing.py)


@kernel
def root_of_page(m, row, node, index):
    """The root of a VM (`row` of V_*) below which page `index` of an inode is mapped, by the page's kind.

    tdp_mmu.h:tdp_mmu_get_root_for_fault(). No address in our tables has the bit that TDX shows shared memory by: Linux
    has it in the index of the top table only (tdp_iter.c:tdp_iter_start(), gfn_bits).
    """
    root = m.state[row + V_ROOT]
    private = m.state[row + V_PRIVATE_ROOT]
    return private if private != root and is_shared(m, node, index) == U0 else root


@kernel
def only_root(m, row, node, index):
    return m.state[row + V_ROOT]


page_root = full_only(root_of_page, only_root)  # the fast loops know no VM with two


@kernel
def find_guest_leaf(m, op, slot):
    """The leaf of a guest's access in a slot: find_leaf(). A hole of 4K is remembered."""
    state = m.state
    gfn = state[op + O_ADDRESS] >> U12
    index = gfn - state[slot + M_BASE_GFN] + state[slot + M_PGOFF]
    root = page_root(m, vm_row(state[op + O_VM]), inode_row(state[slot + M_INODE]), index)
    leaf, level, hole, middle = find_entry(m, stage2_format(m), root, gfn)
    state[op + O_HOLE] = hole
    state[op + O_HOLE_MIDDLE] = middle
    return leaf, level


@kernel
def is_fetch_of_small(m, op):
    """mmu_internal.h:kvm_mmu_do_page_fault(): whether a fault is a fetch under the NX-hugepage mitigation, which maps
    4K (huge_page_disallowed)."""
    return m.state[op + O_FLAGS] & FLAG_EXEC != U0 and nx_huge_pages(m.state, stage2_format(m))


fetches_small = full_only(is_fetch_of_small, False)


@kernel
def is_fetch_refused(m, op, leaf):
    """Whether a fetch meets a leaf, at index `leaf`, that is not executable: a large one, which is split."""
    state = m.state
    fetch = state[op + O_FLAGS] & FLAG_EXEC
    return fetch != U0 and not is_access_allowed(state, stage2_format(m), m.ram[leaf], fetch)


fetch_refused = full_only(is_fetch_refused, False)  # the fast loops know no such mitigation


@kernel
def was_invalidated(m, op, gfn):
    """Whether an invalidation came since the fault began."""
    return retry_fault(m.state, m.state[op + O_VM], gfn, m.state[op + O_SEQUENCE])


@kernel
def walk_again(m, op, gfn, goal):
    """Where the leaf goes: slot_for()."""
    state = m.state
    root = page_root(m, vm_row(state[op + O_VM]), inode_row(state[op + O_INODE]), state[op + O_INDEX])
    return slot_for(m, stage2_format(m), root, gfn, goal, fetches_small(m, op))


@kernel
def go_on(m, op, gfn, goal):
    """In the fast loops a hole of 4K is where the fault found it."""
    state = m.state
    if goal == U1 and state[op + O_HOLE] != NONE:
        return state[op + O_HOLE], U1, state[op + O_HOLE_MIDDLE]
    return walk_again(m, op, gfn, goal)


invalidated = full_only(was_invalidated, False)  # in the fast loops nobody comes between
leaf_slot = full_only(walk_again, go_on)


@kernel
def install_stage2(m, op, goal):
    """Map the fault's frame at level `goal`, unless an invalidation came between: kvm_tdp_mmu_page_fault()."""
    state = m.state
    gfn = state[op + O_ADDRESS] >> U12
    if invalidated(m, op, gfn):
        return stop(state, op, RET_PF_RETRY)
    slot, level, middle = leaf_slot(m, op, gfn, goal)
    if slot == NONE:
        return stop(state, op, -ENOMEM)
    status = map_target_level(m, slot, level, middle, gfn, state[op + O_PFN], True, U0, False, False)
    state[op + O_DETAIL] = level
    note_leaf(state, inode_row(state[op + O_INODE]), state[op + O_INDEX], level, state[op + O_VM])
    return stop(state, op, status)


# --------------------------------------------------------------------------- in a slot of a process's memory


@kernel
def _release_page(m, pfn, host_level, writable):
    """mmu.c:kvm_release_faultin_page() of a page that was mapped: dirty if it may be written, a HugeTLB one accessed.

    A PFN mapping's page has no reference that would be released.
    """
    if pfn < m.state[R_FRAMES]:
        if writable:
            set_folio_dirty(m, pfn)
    elif is_of_anonymous_folio(m, pfn):
        if writable and m.state[R_MARKS_ZAPPED] == U0:  # 6.12 marks it when the leaf goes
            set_large_dirty(m, pfn)
    elif host_level > U1:
        mark_accessed(m, pfn)
    elif writable:
        m.ram[struct_page(m, pfn) + FLAGS] |= PG_DIRTY


@outlined
def page_fault(m, vm, gfn, access, prefetch, private):
    """mmu.c:kvm_tdp_mmu_page_fault() in a slot, from kvm_mmu_faultin_pfn() on: (RET_PF_* or -errno, level of the leaf).

    RET_PF_RETRY: an invalidation came between, often one that the fault's own copy on write set off. A HugeTLB page
    that was mapped counts as accessed, one of guest_memfd that may be written as dirty: kvm_release_faultin_page(),
    6.12: kvm_release_pfn_clean().
    """
    state = m.state
    row = vm_row(vm)
    slot = find_memslot(state, vm, gfn)
    if state[slot + M_KIND] != SLOT_USER:
        return np.int64(-EOPNOTSUPP), U0
    sequence = state[row + V_SEQUENCE]
    if retry_fault(state, vm, gfn, sequence):
        return np.int64(RET_PF_RETRY), U0
    write = access & FLAG_WRITE != U0
    status, pfn, host_level, writable, counted = find_pfn(m, row, slot, gfn, write, private)
    if status != 0:
        return status, U0
    if retry_fault(state, vm, gfn, sequence):
        return np.int64(RET_PF_RETRY), U0
    logged = state[slot + M_FLAGS] & SLOT_LOG_DIRTY_PAGES != U0
    fetched = access & FLAG_EXEC != U0 and nx_huge_pages(state, stage2_format(m))
    level = U1
    if host_level > U1 and not logged and not fetched:
        level = max_level(m, row, slot, gfn, host_level)
    if logged and writable:
        status = mark_dirty(m, slot, gfn)
        if status != 0:
            return status, U0
    device = is_device(state, pfn)
    root = root_of_kind(state, row, private)
    status, level = map_leaf(m, root, gfn, level, pfn, writable, access, prefetch, device)
    if status > 0 and counted:
        _release_page(m, pfn, host_level, writable)
    return status, level


@kernel
def fast_page_fault(m, f, vm, gfn, spte, level, access):
    """mmu.c:fast_page_fault() of a write to a leaf marked writable: RET_PF_FIXED, or 0 where the slow path follows."""
    state = m.state
    entry = m.ram[spte]
    if access & FLAG_WRITE == U0 or entry & state[f + F_MMU_WRITABLE] == U0:
        return np.int64(0)
    slot = find_memslot(state, vm, gfn)
    if slot == NONE or (level > U1 and state[slot + M_FLAGS] & SLOT_LOG_DIRTY_PAGES != U0):
        return np.int64(0)
    status = mark_dirty(m, slot, gfn)
    if status != 0:
        return status
    set_accessed_dirty(m, f, spte, entry | state[f + F_WRITE], access)
    return np.int64(RET_PF_FIXED)


@outlined
def access_once(m, vm, gfn, access, private):
    """One try of a guest's access: (RET_PF_* or -errno, level). Without a fault it is RET_PF_SPURIOUS and free."""
    state = m.state
    f = stage2_format(m)
    root = root_of_kind(state, vm_row(vm), private)
    spte, level, entry = last_spte(m, f, root, gfn)
    if is_present(state, f, entry):
        if is_access_allowed(state, f, entry, access):
            set_accessed_dirty(m, f, spte, entry, access)
            return np.int64(RET_PF_SPURIOUS), level
        charge_one(m, EVENT_GUEST_FAULT)
        status = fast_page_fault(m, f, vm, gfn, spte, level, access)
        if status != 0:
            return status, level
    else:
        charge_one(m, EVENT_GUEST_FAULT)  # a cached MMIO entry is out of date, as the slot came later
    status, level = page_fault(m, vm, gfn, access, False, private)
    if status == RET_PF_FIXED or status == RET_PF_SPURIOUS:
        # The access runs again, and the processor marks the leaf.
        spte, level, entry = last_spte(m, f, root, gfn)
        set_accessed_dirty(m, f, spte, entry, access)
    return status, level


@outlined
def guest_access(m, op):
    """A vCPU accesses guest physical memory: RET_PF_FIXED, RET_PF_SPURIOUS, RET_PF_EMULATE (MMIO exit), or -errno.

    detail is the leaf's level. An access that names a kind (PRIVATE, SHARED) which the attributes do not agree with
    is a memory fault exit, -EFAULT, leaf or not. A retried fault is one more exit of the same access.
    """
    state = m.state
    vm = state[op + O_VM]
    row = vm_row(vm)
    gfn = state[op + O_ADDRESS] >> U12
    if find_memslot(state, vm, gfn) == NONE:
        access_outside(m, op)
        return
    access = state[op + O_FLAGS] & (FLAG_WRITE | FLAG_EXEC)
    private = is_private(m, row, gfn)
    kind = state[op + O_FLAGS] & (FLAG_PRIVATE | FLAG_SHARED)
    load_root(state, row)
    if kind != U0 and kind != (FLAG_PRIVATE if private else FLAG_SHARED):
        charge_one(m, EVENT_GUEST_FAULT)
        stop(state, op, -EFAULT)
        return
    status = np.int64(RET_PF_RETRY)
    level = U0
    for _ in range(ATTEMPTS):
        status, level = access_once(m, vm, gfn, access, private)
        if status != RET_PF_RETRY:
            break
    state[op + O_DETAIL] = level if status > 0 else U0
    stop(state, op, status)
