"""Pages that KVM itself maps: what it keeps of an L1 hypervisor's memory while it runs the L2 guest.

Two ways, whatever the slot's pages come from: both go by the slot's userspace address and the process's mapping there,
also where the slot is over a guest_memfd, and neither asks whether the page is private to the guest.

kvm_vcpu_map() (struct kvm_host_map): vmcs12's MSR bitmap, APIC access page, virtual APIC page and posted interrupt
descriptor (arch/x86/kvm/vmx/nested.c:nested_get_vmcs12_pages()), vmcb12 and its MSR bitmap (svm/nested.c). It is pinned
until kvm_vcpu_unmap(). VM_PFNMAP cannot be: that is -EINVAL, or with kvm.allow_unsafe_mappings the frame as it is,
which nothing holds and no notifier takes away. Before 6.13 it was one reference, also on a frame of VM_PFNMAP, if the
page itself counts any, which a tail page does not: virt/kvm/kvm_main.c:kvm_try_get_pfn().

struct gfn_to_pfn_cache: shared info, vCPU info and runstate of Xen guests, pvclock. Its reference is dropped as soon as
it is looked up; the MMU notifier makes it invalid. Whoever uses it checks it, and has it looked up again.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U12, U4095
from pgemu_kernels.engine.charge import charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.memslots import find_memslot
from pgemu_kernels.engine.rows import block_row, clear_words, find_vma, inode_row, is_live_vm, stop, vm_row
from pgemu_kernels.engine.shareability import is_shared
from pgemu_kernels.folios.counts import try_grab
from pgemu_kernels.folios.folio import FLAGS, PG_DIRTY, struct_page
from pgemu_kernels.gmem.gup import count_pinned, pin_run_of_designs, unpin_run
from pgemu_kernels.gmem.levels import frame_of
from pgemu_kernels.gmem.references import drop, folio_head
from pgemu_kernels.kvm.fault import mark_dirty
from pgemu_kernels.kvm.memslots import give_mapped_pages_end
from pgemu_kernels.process.fault import follow_designs
from pgemu_kernels.stage2.pfn_caches import mapped_row
from pgemu_kernels.words.enum_words import (
    EVENT_MAPPED_STALE_FREED,
    EVENT_MAPPED_STALE_PRIVATE,
    FLAG_CACHED,
    FLAG_THROUGH,
    FLAG_WRITE,
)
from pgemu_kernels.words.mapped_pages import (
    K_GPA,
    K_HVA,
    K_INDEX,
    K_INODE,
    K_KIND,
    K_LENGTH,
    K_LIVES,
    K_PFN,
    K_REFERENCES,
    K_SLOTS,
    K_SPACE,
    K_VALID,
    K_VM,
    K_WRITE,
    MAPPED_CACHE,
    MAPPED_MAP,
    MAPPED_PAGES,
)
from pgemu_kernels.words.operations import EAGAIN, EBADF, EBUSY, EEXIST, EFAULT, EINVAL, ENOENT, EOPNOTSUPP
from pgemu_kernels.words.registers import R_FULL, R_MAPPED, R_PINS_MAPPED, R_SPACES, R_UNSAFE_MAPPINGS
from pgemu_kernels.words.rows import (
    A_FLAGS,
    A_INODE,
    A_KIND,
    A_PGOFF,
    A_START,
    B_STATE,
    BLOCK_ABSENT,
    BLOCK_ZOMBIE,
    GUP_PIN_COUNTING_BIAS,
    M_BASE_GFN,
    M_FLAGS,
    M_HVA,
    M_KIND,
    O_ADDRESS,
    O_DETAIL,
    O_FLAGS,
    O_LENGTH,
    O_OBJECT,
    O_SPACE,
    O_VM,
    SLOT_READ_ONLY,
    SLOT_USER,
    V_GENERATION,
    V_SPACE,
    VM_PFNMAP,
    VMA_GUEST_MEMFD,
)

U = np.uint64


# --------------------------------------------------------------------------- from a guest frame to the process's


@kernel
def host_address(state, vm, gfn, write):
    """kvm_main.c:__gfn_to_hva_many(): the userspace address of a guest frame; NONE without a slot, and for a write to a
    read-only one."""
    slot = find_memslot(state, vm, gfn)
    if slot == NONE or (write and state[slot + M_FLAGS] & SLOT_READ_ONLY != U0) or state[slot + M_HVA] == NONE:
        return NONE
    return state[slot + M_HVA] + ((gfn - state[slot + M_BASE_GFN]) << U12)


@kernel
def _as_error(status):
    """KVM_PFN_ERR_FAULT, KVM_PFN_ERR_HWPOISON, KVM_PFN_ERR_RO_FAULT: -EFAULT; -EBUSY where Linux would wait."""
    return np.int64(-EBUSY if status == -EAGAIN else -EFAULT)


@outlined
def _follow(m, space, address, write, keeping):
    """The page without a pin: (0 or -errno, frame, references that are held), one if it is `keeping`.

    What is no folio's has none. Before 6.13 the frame of a VM_PFNMAP entry gets one as well, if the page itself counts
    any, and is refused if not: kvm_try_get_pfn().
    """
    status, pfn, _level, _writable, counted = follow_designs(m, space, address, write)
    if status != 0:
        return _as_error(status), U0, U0
    if not counted and m.state[R_PINS_MAPPED] != U0:
        return status, pfn, U0
    head = folio_head(m, pfn)
    if not counted and head != pfn:
        return np.int64(-EFAULT), U0, U0
    if not keeping:  # it is dropped as soon as it was looked up
        return status, pfn, U0
    if not try_grab(m.ram, struct_page(m, head), U1):
        return np.int64(-EFAULT), U0, U0
    return status, pfn, U1


@outlined
def find_page(m, space, address, write, keeping):
    """kvm_main.c:hva_to_pfn(): (0 or -errno, frame, references on its folio that are held), for a map that is `keeping`
    the page, or for a cache, which does not.

    A map pins, and refuses VM_PFNMAP before any fault, but for kvm.allow_unsafe_mappings (hva_to_pfn_remapped());
    before 6.13 it takes a reference. -EBUSY where Linux would wait for the invalidate_lock; -EOPNOTSUPP over memory of
    other kinds.
    """
    state = m.state
    row = find_vma(state, space, address)
    if row == NONE:
        return np.int64(-EFAULT), U0, U0
    if state[row + A_KIND] != VMA_GUEST_MEMFD:
        return np.int64(-EOPNOTSUPP), U0, U0
    if not keeping or state[R_PINS_MAPPED] == U0:
        return _follow(m, space, address, write, keeping)
    status, pfn, _n = pin_run_of_designs(m, space, address, U1, FLAG_WRITE if write else U0)
    if status == 0:
        return status, pfn, GUP_PIN_COUNTING_BIAS
    if state[row + A_FLAGS] & VM_PFNMAP == U0 or state[R_UNSAFE_MAPPINGS] == U0:
        return _as_error(status), U0, U0
    return _follow(m, space, address, write, True)


@outlined
def note_page(m, op, row, address, pfn):
    """Which page of which inode a mapping shows."""
    state = m.state
    vma = find_vma(state, state[op + O_SPACE], address)
    state[row + K_PFN] = pfn
    state[row + K_INODE] = state[vma + A_INODE]
    state[row + K_INDEX] = state[vma + A_PGOFF] + ((address - state[vma + A_START]) >> U12)


@kernel
def begin_row(m, op, row, kind, number):
    """A row is in use. From now on the machine is none for the fast loops, which know no such mapping."""
    state = m.state
    state[row + K_KIND] = kind
    state[row + K_VM] = state[op + O_VM]
    state[row + K_SPACE] = state[op + O_SPACE]
    state[row + K_HVA] = NONE
    state[R_MAPPED] = max(state[R_MAPPED], number + U1)
    state[R_FULL] = U1


# --------------------------------------------------------------------------- kvm_vcpu_map()


@outlined
def map_page(m, op, row, number):
    """kvm_main.c:__kvm_vcpu_map(): 0 with the frame, or -EINVAL for whatever is no frame."""
    state = m.state
    write = state[op + O_FLAGS] & FLAG_WRITE != U0
    address = host_address(state, state[op + O_VM], state[op + O_ADDRESS] >> U12, write)
    if address == NONE or state[op + O_SPACE] >= state[R_SPACES]:
        return stop(state, op, -EINVAL)
    status, pfn, held = find_page(m, state[op + O_SPACE], address, write, True)
    if status != 0:
        return stop(state, op, -EINVAL if status == -EFAULT else status)
    begin_row(m, op, row, MAPPED_MAP, number)
    note_page(m, op, row, address, pfn)
    state[row + K_GPA] = state[op + O_ADDRESS]
    state[row + K_HVA] = address
    state[row + K_WRITE] = U1 if write else U0
    state[row + K_REFERENCES] = held
    state[op + O_DETAIL] = pfn
    return stop(state, op, 0)


@outlined
def write_noted(m, row):
    """kvm_main.c:mark_page_dirty_in_slot() of what was written by a mapping."""
    state = m.state
    gfn = state[row + K_GPA] >> U12
    slot = find_memslot(state, state[row + K_VM], gfn)
    if slot != NONE and state[slot + M_KIND] == SLOT_USER:
        mark_dirty(m, slot, gfn)


@outlined
def end_mapping(m, row):
    """kvm_vcpu_unmap(), kvm_gpc_deactivate(): what was held is given back, the row is free."""
    state = m.state
    held = state[row + K_REFERENCES]
    pfn = state[row + K_PFN]
    written = state[row + K_KIND] == MAPPED_MAP and state[row + K_WRITE] != U0
    if written:
        write_noted(m, row)
    clear_words(state, row, K_LIVES)
    state[row + K_LIVES] += U1
    if held == GUP_PIN_COUNTING_BIAS:
        unpin_run(m, pfn, U1, written)
        count_pinned(m, np.int64(-1))
    elif held != U0:
        head = folio_head(m, pfn)
        if written:
            m.ram[struct_page(m, head) + FLAGS] |= PG_DIRTY
        drop(m, head, held)


@outlined
def unmap_pages(m, vm):
    """A VM ends, and its vCPUs before it: kvm_destroy_vcpus()."""
    for i in range(m.state[R_MAPPED]):
        row = mapped_row(i)
        if m.state[row + K_KIND] != U0 and m.state[row + K_VM] == vm:
            end_mapping(m, row)


give_mapped_pages_end(unmap_pages)


# --------------------------------------------------------------------------- gfn_to_pfn_cache


@kernel
def cache_holds(state, row):
    """virt/kvm/pfncache.c:kvm_gpc_check()"""
    return state[row + K_VALID] != U0 and state[row + K_SLOTS] == state[vm_row(state[row + K_VM]) + V_GENERATION]


@kernel
def may_be_used(state, row):
    """Whether KVM may access the page of a mapping: of a cache, if it finds it valid."""
    kind = state[row + K_KIND]
    return kind == MAPPED_MAP or (kind == MAPPED_CACHE and cache_holds(state, row))


@outlined
def refresh(m, op, row):
    """virt/kvm/pfncache.c:__kvm_gpc_refresh(): 0 with the frame, or -EFAULT, and then the cache is invalid.

    What is still valid for the same userspace address is not looked up again.
    """
    state = m.state
    vm = state[op + O_VM]
    address = host_address(state, vm, state[op + O_ADDRESS] >> U12, True)
    state[row + K_GPA] = state[op + O_ADDRESS]
    state[row + K_LENGTH] = state[op + O_LENGTH]
    state[row + K_SLOTS] = state[vm_row(vm) + V_GENERATION]
    keeps = state[row + K_VALID] != U0 and state[row + K_HVA] == address
    state[row + K_HVA] = address
    if not keeps:
        state[row + K_VALID] = U0
        state[row + K_PFN] = U0
        if address == NONE or state[op + O_SPACE] >= state[R_SPACES]:
            return stop(state, op, -EFAULT)
        status, pfn, _held = find_page(m, state[op + O_SPACE], address, True, False)
        if status != 0:
            return stop(state, op, status)
        note_page(m, op, row, address, pfn)
        state[row + K_VALID] = U1
    state[op + O_DETAIL] = state[row + K_PFN]
    return stop(state, op, 0)


@outlined
def activate(m, op, row, number):
    """kvm_gpc_activate() and, of a cache that is active, kvm_gpc_refresh(): 0, -EINVAL past the page, -EFAULT."""
    state = m.state
    if (state[op + O_ADDRESS] & U4095) + state[op + O_LENGTH] > U4095 + U1 or state[op + O_LENGTH] > U4095 + U1:
        return stop(state, op, -EINVAL)
    kind = state[row + K_KIND]
    if kind == MAPPED_MAP or (kind == MAPPED_CACHE and state[row + K_VM] != state[op + O_VM]):
        return stop(state, op, -EEXIST)
    if kind == U0:
        begin_row(m, op, row, MAPPED_CACHE, number)
        state[row + K_WRITE] = U1
    return refresh(m, op, row)


# --------------------------------------------------------------------------- an access


@outlined
def left_behind(m, row):
    """What became of a mapping's page: (it is private now, it is its inode's no more and nobody holds it for KVM)."""
    state = m.state
    node = inode_row(state[row + K_INODE])
    index = state[row + K_INDEX]
    block = block_row(m, node, index)
    kind = state[block + B_STATE]
    if kind == BLOCK_ABSENT or kind == BLOCK_ZOMBIE or frame_of(m, block, index) != state[row + K_PFN]:
        return False, state[row + K_REFERENCES] == U0
    return is_shared(m, node, index) == U0, False


@outlined
def access_by(m, op, row):
    """KVM reads or writes by a mapping: 0 with the frame; -ENOENT without one; -EFAULT where a cache has to be looked
    up again; -EINVAL for a write by a mapping that is not for writing."""
    state = m.state
    kind = state[row + K_KIND]
    if kind == U0:
        return stop(state, op, -ENOENT)
    if not may_be_used(state, row):
        return stop(state, op, -EFAULT)
    write = state[op + O_FLAGS] & FLAG_WRITE != U0
    if write and state[row + K_WRITE] == U0:
        return stop(state, op, -EINVAL)
    private, freed = left_behind(m, row)
    if private:
        charge_one(m, EVENT_MAPPED_STALE_PRIVATE)
    if freed:
        charge_one(m, EVENT_MAPPED_STALE_FREED)
    if write and kind == MAPPED_CACHE:
        write_noted(m, row)
    state[op + O_DETAIL] = state[row + K_PFN]
    return stop(state, op, 0)


# --------------------------------------------------------------------------- operations


@outlined
def operate_map(m, op):
    """NESTED_MAP: a page of a VM is mapped for KVM itself as mapping `object`; with CACHED by a cache, with THROUGH it
    is accessed by the mapping that is there.

    0 with the frame; what map_page(), activate() and access_by() say; -EBADF of a closed VM, -EINVAL for a number past
    words.MAPPED_PAGES, -EEXIST for one in use; -EBUSY where Linux would wait for a conversion; -EOPNOTSUPP over memory
    of other kinds than the designs' guest_memfd.
    """
    state = m.state
    number = state[op + O_OBJECT]
    if number >= U(MAPPED_PAGES):
        return stop(state, op, -EINVAL)
    if not is_live_vm(state, state[op + O_VM]):
        return stop(state, op, -EBADF)
    row = mapped_row(number)
    flags = state[op + O_FLAGS]
    if flags & FLAG_THROUGH != U0:
        return access_by(m, op, row)
    state[op + O_SPACE] = state[vm_row(state[op + O_VM]) + V_SPACE]
    if flags & FLAG_CACHED != U0:
        return activate(m, op, row, number)
    if state[row + K_KIND] != U0:
        return stop(state, op, -EEXIST)
    return map_page(m, op, row, number)


@outlined
def operate_unmap(m, op):
    """NESTED_UNMAP: 0, or -ENOENT."""
    state = m.state
    number = state[op + O_OBJECT]
    if number >= U(MAPPED_PAGES) or state[mapped_row(number) + K_KIND] == U0:
        return stop(state, op, -ENOENT)
    end_mapping(m, mapped_row(number))
    return stop(state, op, 0)
