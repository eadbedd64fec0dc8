"""Accesses to a process's memory: by its own threads, by get_user_pages(), by KVM for a guest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U12
from pgemu_kernels.engine.charge import charge_one
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.geometry import size_of
from pgemu_kernels.engine.handle import given_later
from pgemu_kernels.engine.rows import find_vma, space_root, stop
from pgemu_kernels.formats.bits import PTE_ACCESSED, PTE_DIRTY, PTE_SPECIAL, PTE_WRITE
from pgemu_kernels.process.entries import access_allowed, holds_page, leaf_pfn
from pgemu_kernels.process.guest_memfd_4k import guest_memfd_fault
from pgemu_kernels.process.huge_memory import private_fault
from pgemu_kernels.process.hugetlb import hugetlb_fault
from pgemu_kernels.process.pfn import pfn_fault
from pgemu_kernels.process.tables import lookup_address, space_row
from pgemu_kernels.process.vma import next_vma
from pgemu_kernels.words.enum_words import EVENT_HOST_FAULT, FLAG_EXEC, FLAG_WRITE
from pgemu_kernels.words.operations import (
    EAGAIN,
    EFAULT,
    EHWPOISON,
    EINVAL,
    ENOMEM,
    RET_PF_EMULATE,
    VM_FAULT_HWPOISON,
    VM_FAULT_HWPOISON_LARGE,
    VM_FAULT_OOM,
    VM_FAULT_RETRY,
    VM_FAULT_SIGBUS,
    VM_FAULT_SIGSEGV,
)
from pgemu_kernels.words.registers import R_PROTECTION_KEYS
from pgemu_kernels.words.rows import (
    A_END,
    A_FLAGS,
    A_KIND,
    A_PROT,
    A_START,
    O_ADDRESS,
    O_DETAIL,
    O_FLAGS,
    O_SPACE,
    PROT_EXEC,
    PROT_READ,
    PROT_WRITE,
    S_MINOR_FAULTS,
    VM_PFNMAP,
    VM_SHARED,
    VMA_ANONYMOUS,
    VMA_GUEST_MEMFD,
    VMA_GUEST_MEMFD_4K,
    VMA_HUGETLB,
)

U = np.uint64
_POISONED = np.int64(VM_FAULT_HWPOISON | VM_FAULT_HWPOISON_LARGE)
_ERROR = np.int64(VM_FAULT_OOM | VM_FAULT_SIGBUS | VM_FAULT_SIGSEGV) | _POISONED
_PAGE = ~U(4095)

# ->fault of a mapping of the designs (m, space, address, write): VM_FAULT_*, 0 where an entry is there. gmem/faults.py
designs_fault, give_designs_fault = given_later()


@outlined
def handle_mm_fault(m, space, row, address, write):
    """Fault in the page of a VMA that allows the access: VM_FAULT_NOPAGE or _LOCKED, or an error.

    `write` is uint64 0 or 1. Faults that succeed count as minor ones, also those of get_user_pages():
    mm/memory.c:mm_account_fault().
    """
    kind = m.state[row + A_KIND]
    page = address & _PAGE
    if kind == VMA_GUEST_MEMFD:
        return np.int64(designs_fault(m, space, address, write))
    charge_one(m, EVENT_HOST_FAULT)
    if kind == VMA_ANONYMOUS:
        status = private_fault(m, row, page, write)
    elif kind == VMA_HUGETLB:
        status = hugetlb_fault(m, row, page, write)
    elif kind == VMA_GUEST_MEMFD_4K:
        status = guest_memfd_fault(m, row, page, write)
    else:
        status = pfn_fault(m, row, page)
    if status & _ERROR == 0:
        m.state[space_row(space) + S_MINOR_FAULTS] += U1
    return status


@kernel
def fault_of_designs(m, space, row, address, write):
    """handle_mm_fault() of a mapping of the designs, for who meets no others."""
    return np.int64(designs_fault(m, space, address, write))


@kernel
def fault_error(status, tells_poison):
    """The error that GUP makes of a fault's result, 0 for a fault that succeeded: mm/gup.c:vm_fault_to_errno().

    A poisoned page is -EFAULT, or where `tells_poison` -EHWPOISON (FOLL_HWPOISON). VM_FAULT_RETRY stands for an
    invalidate_lock that another actor holds: -EAGAIN; Linux would wait for it.
    """
    if status & VM_FAULT_OOM != 0:
        return np.int64(-ENOMEM)
    if tells_poison and status & _POISONED != 0:
        return np.int64(-EHWPOISON)
    if status & _ERROR != 0:
        return np.int64(-EFAULT)
    return np.int64(-EAGAIN if status & VM_FAULT_RETRY != 0 else 0)


@kernel
def access_permitted(state, row, write, execute):
    """arch/x86/mm/fault.c:access_error(): what the VMA allows a user access, the key of execute-only ones included."""
    prot = state[row + A_PROT]
    if write == U1:
        return prot & PROT_WRITE != U0
    if execute == U1:
        return prot & PROT_EXEC != U0
    return prot != U0 and (prot != PROT_EXEC or state[R_PROTECTION_KEYS] == U0)


@outlined
def access(m, op):
    """A user access of a process, and the fault it takes if its entry is not there or does not allow it.

    0 with the leaf's level if the processor found what it needs; VM_FAULT_NOPAGE or VM_FAULT_LOCKED after a fault;
    VM_FAULT_SIGSEGV, VM_FAULT_SIGBUS, VM_FAULT_HWPOISON (_LARGE), VM_FAULT_OOM. The processor sets accessed and, on a
    write, dirty.
    """
    state = m.state
    space = state[op + O_SPACE]
    address = state[op + O_ADDRESS]
    write = U1 if state[op + O_FLAGS] & FLAG_WRITE != U0 else U0
    # An access is one thing: a record that says both is a write.
    execute = U1 if state[op + O_FLAGS] & (FLAG_WRITE | FLAG_EXEC) == FLAG_EXEC else U0
    root = space_root(state, space)
    status = np.int64(0)
    slot, level = lookup_address(m, root, address)
    if not access_allowed(m.ram[slot], write, execute):
        row = find_vma(state, space, address)
        if row == NONE or not access_permitted(state, row, write, execute):
            charge_one(m, EVENT_HOST_FAULT)
            return stop(state, op, VM_FAULT_SIGSEGV)
        status = handle_mm_fault(m, space, row, address, write)
        if status & _ERROR != 0:
            return stop(state, op, status)
        slot, level = lookup_address(m, root, address)
    m.ram[slot] |= PTE_ACCESSED | PTE_DIRTY if write == U1 else PTE_ACCESSED
    state[op + O_DETAIL] = level
    return stop(state, op, status)


@kernel
def is_there(m, space, address, write):
    """Whether a process's entry holds the page at an address, for an access that is a write or (uint64 0) is none."""
    slot, _level = lookup_address(m, space_root(m.state, space), address)
    entry = m.ram[slot]
    return holds_page(entry) and (write == U0 or entry & PTE_WRITE != U0)


@outlined
def fault_in_page(m, space, row, address, write):
    """faultin_page() until the page is there: 0 or a VM_FAULT error. The processor accesses nothing."""
    if is_there(m, space, address, write):
        return np.int64(0)
    return handle_mm_fault(m, space, row, address, write) & _ERROR


@outlined
def populate_range(m, space, row, start, end, write):
    """__get_user_pages() over [start, end) of one VMA: 0 or the first VM_FAULT error, which ends it."""
    address = start
    while address < end:
        status = fault_in_page(m, space, row, address, write)
        if status != 0:
            return status
        _slot, level = lookup_address(m, space_root(m.state, space), address)
        address = (address & ~(size_of(level) - U1)) + size_of(level)
    return np.int64(0)


@outlined
def mm_populate(m, space, start, end):
    """MAP_POPULATE and VM_LOCKED: 0 or the VM_FAULT error that ended it. mm/gup.c:__mm_populate().

    PFN mappings are left out; one without rights is an error, but does not end it. Private writable memory is written
    to, so that copies are made now; all else is read.
    """
    state = m.state
    failed = np.int64(0)
    address = start
    while address < end:
        row = next_vma(state, space, address, end)
        if row == NONE:
            break
        first = max(address, state[row + A_START])
        address = min(end, state[row + A_END])
        if state[row + A_FLAGS] & VM_PFNMAP != U0:
            continue
        if state[row + A_PROT] == U0:
            failed = np.int64(VM_FAULT_SIGSEGV)
            continue
        write = state[row + A_PROT] & PROT_WRITE != U0 and state[row + A_FLAGS] & VM_SHARED == U0
        status = populate_range(m, space, row, first, address, U1 if write else U0)
        if status != 0:
            return status
    return failed


@outlined
def madvise_populate(m, op, start, end, write):
    """MADV_POPULATE_READ or _WRITE: 0, -ENOMEM over a hole or without memory, -EINVAL where not allowed, -EFAULT,
    -EHWPOISON.

    mm/madvise.c:madvise_populate(), mm/gup.c:faultin_page_range().
    """
    state = m.state
    space = state[op + O_SPACE]
    needed = PROT_WRITE if write == U1 else PROT_READ
    address = start
    while address < end:
        row = find_vma(state, space, address)
        if row == NONE:
            return stop(state, op, -ENOMEM)
        if state[row + A_FLAGS] & VM_PFNMAP != U0 or state[row + A_PROT] & needed == U0:
            return stop(state, op, -EINVAL)
        last = min(end, state[row + A_END])
        status = populate_range(m, space, row, address, last, write)
        if status == VM_FAULT_OOM:
            return stop(state, op, -ENOMEM)
        if status != 0:
            return stop(state, op, -EHWPOISON if status & _POISONED != 0 else -EFAULT)
        address = last
    return stop(state, op, 0)


@kernel
def _followed(m, space, address):
    """What KVM reads of an entry that holds a page: (0, frame, level, whether it may be written, whether a folio's).

    mm/memory.c:follow_pfnmap_start(), mm/gup.c:follow_page_pte(); mmu.c:host_pfn_mapping_level().
    """
    slot, level = lookup_address(m, space_root(m.state, space), address)
    entry = m.ram[slot]
    if not holds_page(entry):
        return np.int64(-EFAULT), U0, U0, False, False
    inside = (address & (size_of(level) - U1)) >> U12
    special = entry & PTE_SPECIAL != U0
    return np.int64(0), leaf_pfn(entry, level) + inside, level, entry & PTE_WRITE != U0, not special


def following(fault: Callable[..., Any]) -> Any:
    """A step (m, space, address, write) that finds what KVM asks of a process's memory: (0, frame, level of the host's
    leaf, whether it may be written, whether the entry is a folio's). No reference is held.

    -EFAULT where no mapping allows the access or the fault ends in a signal, -EHWPOISON where that tells of a poisoned
    page, -ENOMEM without memory, -EAGAIN where Linux would wait for the invalidate_lock, RET_PF_EMULATE for a write
    that a PFN mapping's entry does not allow; then the rest is 0. `write` is a boolean (an execute needs no more than a
    read: KVM asks for no other). fault: as handle_mm_fault(), of the kinds of mappings there are.
    virt/kvm/kvm_main.c:hva_to_pfn()
    """

    @outlined
    def remapped(m, space, row, address, write):
        """kvm_main.c:hva_to_pfn_remapped(): the entry as it stands, whatever the mapping allows; if there is none a
        fault, -EFAULT where the mapping does not allow it (fixup_user_fault()). A write to an entry that may not be
        written is emulated: KVM_PFN_ERR_RO_FAULT, here RET_PF_EMULATE."""
        found = _followed(m, space, address)
        if found[0] != 0:
            needed = PROT_WRITE if write else PROT_READ
            if m.state[row + A_PROT] & needed == U0:
                return found
            status = fault_error(fault(m, space, row, address, U1 if write else U0), False)
            if status != 0:
                return status, U0, U0, False, False
            found = _followed(m, space, address)
        if found[0] == 0 and write and not found[3]:
            return np.int64(RET_PF_EMULATE), U0, U0, False, False
        return found

    @outlined
    def follow(m, space, address, write):
        state = m.state
        row = find_vma(state, space, address)
        if row == NONE:
            return np.int64(-EFAULT), U0, U0, False, False
        if state[row + A_FLAGS] & VM_PFNMAP != U0:
            return remapped(m, space, row, address, write)
        needed = PROT_WRITE if write else PROT_READ
        if state[row + A_PROT] & needed == U0:
            return np.int64(-EFAULT), U0, U0, False, False
        access = U1 if write else U0
        if not is_there(m, space, address, access):
            status = fault_error(fault(m, space, row, address, access), True)
            if status != 0:
                return status, U0, U0, False, False
        return _followed(m, space, address)

    return follow


follow_designs = following(fault_of_designs)
follow_any = following(handle_mm_fault)
