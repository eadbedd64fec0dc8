"""Faults of hosts and guests on guest_memfd: begin, the folio, its entry.

A step goes on (GO), stops with the operation's result in the record (STOP), or is blocked by a lock of another actor
(BLOCKED). A whole fault is a straight line of steps; fault_steps.py takes the same ones one by one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U2, U12
from pgemu_kernels.engine.charge import charge_one, result
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.handle import full_only
from pgemu_kernels.engine.memslots import find_memslot
from pgemu_kernels.engine.properties import inserts_locked
from pgemu_kernels.engine.rows import (
    block_row,
    find_vma,
    inode_row,
    lock_shared,
    space_root,
    stop,
    unlock,
    vm_row,
)
from pgemu_kernels.engine.shareability import is_shared
from pgemu_kernels.folios.folio import FLAGS, PG_DIRTY, add_mapping, add_references, struct_page
from pgemu_kernels.folios.zeroed import keeps_shown
from pgemu_kernels.formats.bits import PTE_DIRTY, PTE_SOFT_DIRTY
from pgemu_kernels.gmem.allocation import allocate_folio, has_folio
from pgemu_kernels.gmem.host_entries import NO_ACCESS, insert_pfn, is_special, marks_of, page_slot
from pgemu_kernels.gmem.levels import defects, folio_order_at, frame_of, guest_level, page_of_slot
from pgemu_kernels.gmem.references import folio_head
from pgemu_kernels.gmem.stale_contents import count_stale
from pgemu_kernels.gmem.vm_kinds import is_over, kind_level
from pgemu_kernels.gmem.zeroing import zero_folio
from pgemu_kernels.kvm.fault import (
    access_outside,
    fetch_refused,
    fetches_small,
    find_guest_leaf,
    install_stage2,
    is_user_slot,
    load_root,
)
from pgemu_kernels.process.fault import give_designs_fault
from pgemu_kernels.process.guest_memfd_4k import map_file_page
from pgemu_kernels.process.tables import marker_fault, need_slot
from pgemu_kernels.stage2.invalidate import retry_fault
from pgemu_kernels.tables.walker import find_leaf, host_format
from pgemu_kernels.words.enum_words import (
    DEFECT_INSERT_UNLOCKED,
    EVENT_GUEST_FAULT,
    EVENT_HOST_FAULT,
    FLAG_PRIVATE,
    FLAG_SHARED,
    FLAG_WRITE,
    OP_HOST_FAULT,
)
from pgemu_kernels.words.operations import (
    BLOCKED,
    EFAULT,
    EHWPOISON,
    GO,
    RET_PF_FIXED,
    RET_PF_RETRY,
    STOP,
    VM_FAULT_HWPOISON,
    VM_FAULT_LOCKED,
    VM_FAULT_NOPAGE,
    VM_FAULT_OOM,
    VM_FAULT_RETRY,
    VM_FAULT_SIGBUS,
    VM_FAULT_SIGSEGV,
)
from pgemu_kernels.words.registers import R_HWPOISON, R_ORDER, R_POISONED_PAGES
from pgemu_kernels.words.rows import (
    A_INODE,
    A_PGOFF,
    A_PROT,
    A_READ_ONLY,
    A_START,
    ACTORS,
    I_PAGES,
    M_FLAGS,
    M_INODE,
    O_ACTOR,
    O_ADDRESS,
    O_DETAIL,
    O_FLAGS,
    O_INDEX,
    O_INODE,
    O_LEVEL,
    O_LOCKED,
    O_OP,
    O_PFN,
    O_REFERENCED,
    O_ROW,
    O_SEQUENCE,
    O_SPACE,
    O_STATUS,
    O_VM,
    O_WORDS,
    SLOT_DYING,
    SLOT_RELEASED,
    STATE_OPS,
    V_SEQUENCE,
)
from pgemu_kernels.words.table_words import F_LEAF_4K, F_LEAF_4K_RO

U = np.uint64
INSIDE = STATE_OPS + U((ACTORS + 1) * O_WORDS)  # the record of a fault inside another operation


# --------------------------------------------------------------------------- host


@kernel
def has_no_rights(m, row):
    """Whether a VMA was made PROT_NONE: access_error()."""
    return m.state[row + A_PROT] == U0


lacks_rights = full_only(has_no_rights, False)


found_marker = full_only(marker_fault, np.int64(0))


@outlined
def make_upper_tables(m, space, address):
    """__handle_mm_fault(): the tables above the last one are there by the time a fault ends in SIGBUS, if there is
    memory for them. As captured of files of 4K pages; those of huge pages have not been."""
    if m.state[R_ORDER] == U0:
        need_slot(m, space, address, U2)


leave_tables = full_only(make_upper_tables, None)  # the fast loops know no files of that kind


@kernel
def host_begin(m, op):
    """Host access: find the VMA and the entry; if there is none it is a fault, with the invalidate_lock for reading.

    mm/memory.c:handle_pte_fault() up to ->fault. An access whose entry is present returns 0 and costs
    nothing: no fault happens.
    """
    state = m.state
    address = state[op + O_ADDRESS]
    row = find_vma(state, state[op + O_SPACE], address)
    refused = row == NONE or (state[op + O_FLAGS] & FLAG_WRITE != U0 and state[row + A_READ_ONLY] != U0)
    if refused or lacks_rights(m, row):
        charge_one(m, EVENT_HOST_FAULT)
        return stop(state, op, VM_FAULT_SIGSEGV)
    slot, level = find_leaf(m, host_format(m), space_root(state, state[op + O_SPACE]), address >> U12)
    if slot != NONE:
        m.ram[slot] |= marks_of(state, op)
        state[op + O_DETAIL] = level
        return stop(state, op, 0)
    marker = found_marker(m, state[op + O_SPACE], address)
    if marker != 0:
        charge_one(m, EVENT_HOST_FAULT)
        return stop(state, op, marker)
    inode = state[row + A_INODE]
    node = inode_row(inode)
    index = state[row + A_PGOFF] + ((address - state[row + A_START]) >> U12)
    if index >= state[node + I_PAGES]:
        leave_tables(m, state[op + O_SPACE], address)
        charge_one(m, EVENT_HOST_FAULT)
        return stop(state, op, VM_FAULT_SIGBUS)
    if not lock_shared(state, op, node):
        result(state, op, np.int64(VM_FAULT_RETRY))
        return BLOCKED
    charge_one(m, EVENT_HOST_FAULT)
    state[op + O_ROW] = row
    state[op + O_INODE] = inode
    state[op + O_INDEX] = index
    return GO


@kernel
def is_refused(m, op):
    """Userspace may only use shared pages; whether this one is none: then the fault has ended in SIGBUS."""
    state = m.state
    node = inode_row(state[op + O_INODE])
    if is_shared(m, node, state[op + O_INDEX]) != U0:
        return False
    unlock(state, op, node)
    leave_tables(m, state[op + O_SPACE], state[op + O_ADDRESS])
    stop(state, op, VM_FAULT_SIGBUS)
    return True


@outlined
def is_poisoned(m, pfn):
    """folio_test_hwpoison() of the folio of a frame."""
    poisoned = m.state[R_POISONED_PAGES] != U0
    return poisoned and m.ram[struct_page(m, folio_head(m, pfn)) + FLAGS] & m.state[R_HWPOISON] != U0


poisoned = full_only(is_poisoned, False)  # a machine that has had a memory failure is none for the fast loops


@kernel
def host_page(m, op):
    """The frame, zeroed as far as an entry of 4K will show; what is to be counted gets a reference; then unlock.

    kvm_gmem_fault_user_mapping(). There a large folio is a WARN and SIGBUS: with folios that are split it is there only
    where a fault met one that another fault had not split yet (Defect.ALLOCATION_RACE). A frame that no reference
    protects is inserted with the lock held (inference; Defect.INSERT_UNLOCKED: without). A counted entry maps no
    poisoned folio (mm/memory.c:__do_fault(), of RFC v2 the handler itself); vmf_insert_pfn() does not look (captured).
    """
    state = m.state
    node = inode_row(state[op + O_INODE])
    index = state[op + O_INDEX]
    block = block_row(m, node, index)
    order = folio_order_at(m, block, index)
    counted = not is_special(m, state[op + O_ROW])
    if counted and order != U0:
        unlock(state, op, node)
        return stop(state, op, VM_FAULT_SIGBUS)
    pfn = frame_of(m, block, index)
    if counted and poisoned(m, pfn):
        unlock(state, op, node)
        return stop(state, op, VM_FAULT_HWPOISON)
    page = zero_folio(m, node, index, pfn, U1, order)
    if counted:
        add_references(m.ram, page, U1)
    state[op + O_PFN] = pfn
    if not inserts_locked(m) or defects(m) & DEFECT_INSERT_UNLOCKED != U0:
        unlock(state, op, node)
    return GO


@kernel
def map_counted(m, op):
    """Enter the folio by an ordinary entry, which keeps the reference and adds a mapcount: VM_FAULT_*.

    mm/memory.c:set_pte_range(): dirty after a write, or where the folio is dirty already, as a write makes it
    (fault_dirty_shared_page()).
    """
    state = m.state
    pfn = state[op + O_PFN]
    page = struct_page(m, pfn)
    slot = page_slot(m, state[op + O_SPACE], state[op + O_ADDRESS])
    if slot == NONE:
        add_references(m.ram, page, ~U0)
        return np.int64(VM_FAULT_OOM)
    state[op + O_DETAIL] = U1
    if m.ram[slot] != U0:
        add_references(m.ram, page, ~U0)
        return np.int64(0)
    if state[op + O_FLAGS] & FLAG_WRITE != U0:
        m.ram[page + FLAGS] |= PG_DIRTY
    leaf = F_LEAF_4K if state[state[op + O_ROW] + A_READ_ONLY] == U0 else F_LEAF_4K_RO
    entry = pfn << U12 | state[host_format(m) + leaf]
    if m.ram[page + FLAGS] & PG_DIRTY == U0:
        entry &= ~(PTE_DIRTY | PTE_SOFT_DIRTY)
    add_mapping(m.ram, page)
    map_file_page(m, state[op + O_SPACE], slot, entry)
    return np.int64(VM_FAULT_LOCKED)


@kernel
def note_shown(m, op):
    """A new leaf, of the level in the record's detail, shows its pages: count those that were never zeroed."""
    if keeps_shown(m):
        count_stale(m, inode_row(m.state[op + O_INODE]), m.state[op + O_INDEX], m.state[op + O_DETAIL])


@kernel
def host_map(m, op):
    """Enter what was found in the process's tables; then unlock, if that was left."""
    status = insert_pfn(m, op) if is_special(m, m.state[op + O_ROW]) else map_counted(m, op)
    if status & (VM_FAULT_LOCKED | VM_FAULT_NOPAGE) != 0:
        note_shown(m, op)
    if inserts_locked(m):
        unlock(m.state, op, inode_row(m.state[op + O_INODE]))
    return stop(m.state, op, status)


def ending(page: Any, enter: Any) -> Any:
    """The end of a fault (m, op) that has not failed so far: steps `page` and `enter`, a folio allocated where none is.

    Where a folio is there, what was read of its block is still known.
    """

    @kernel
    def end(m, op):
        if page(m, op) == GO:
            enter(m, op)

    @outlined
    def allocate(m, op):
        if allocate_folio(m, op) == GO:
            end(m, op)

    @kernel
    def finish_fault(m, op):
        if has_folio(m, op):
            end(m, op)
        else:
            allocate(m, op)

    return finish_fault


end_host_fault = ending(host_page, host_map)


@kernel
def host_fault(m, op):
    """A whole host access."""
    if host_begin(m, op) == GO and not is_refused(m, op):
        end_host_fault(m, op)


# --------------------------------------------------------------------------- guest


@kernel
def is_released(m, slot):
    """Whether the slot's guest_memfd file was released, or is about to be: kvm_gmem_get_file()."""
    return m.state[slot + M_FLAGS] & (SLOT_RELEASED | SLOT_DYING) != U0


released = full_only(is_released, False)  # a machine whose files were released is none for the fast loops


@kernel
def enter_fault(m, op, slot, gfn, exits):
    """The leaf, the invalidate sequence, then the invalidate_lock for reading: kvm_mmu_faultin_pfn().

    `exits`: the guest is there, and exits if there is no leaf; a prefault comes from the VMM.
    """
    state = m.state
    vm = state[op + O_VM]
    row = vm_row(vm)
    leaf, level = find_guest_leaf(m, op, slot)
    if leaf != NONE and not fetch_refused(m, op, leaf) and is_over(m, op, slot, level):
        return STOP
    load_root(state, row)
    sequence = state[row + V_SEQUENCE]
    if retry_fault(state, vm, gfn, sequence):
        if exits:
            charge_one(m, EVENT_GUEST_FAULT)
        return stop(state, op, RET_PF_RETRY)
    inode = state[slot + M_INODE]
    if not lock_shared(state, op, inode_row(inode)):
        result(state, op, np.int64(RET_PF_RETRY))
        return BLOCKED
    if exits:
        charge_one(m, EVENT_GUEST_FAULT)
    state[op + O_SEQUENCE] = sequence
    state[op + O_ROW] = slot
    state[op + O_INODE] = inode
    state[op + O_INDEX] = page_of_slot(state, slot, gfn)
    return GO


@kernel
def guest_begin(m, op):
    """Guest access: slot, private or shared, leaf, invalidate sequence; then the invalidate_lock for reading.

    arch/x86/kvm/mmu/mmu.c:kvm_mmu_faultin_pfn(). An access whose leaf is present is spurious at most and
    costs nothing: the guest would not exit. Outside every slot it is a device's. A slot whose file was released
    (kvm_gmem_get_pfn() without a file) and an access of the wrong kind are memory fault exits (-EFAULT), leaf or not
    (page_fault_can_be_fast()).
    """
    state = m.state
    gfn = state[op + O_ADDRESS] >> U12
    slot = find_memslot(state, state[op + O_VM], gfn)
    if slot == NONE:
        access_outside(m, op)
        return STOP
    if is_user_slot(m, op, slot):
        return STOP
    kind = state[op + O_FLAGS] & (FLAG_PRIVATE | FLAG_SHARED)
    wrong = released(m, slot)
    if kind != U0 and not wrong:
        node = inode_row(state[slot + M_INODE])
        wrong = kind != (FLAG_SHARED if is_shared(m, node, page_of_slot(state, slot, gfn)) != U0 else FLAG_PRIVATE)
    if wrong:
        load_root(state, vm_row(state[op + O_VM]))
        charge_one(m, EVENT_GUEST_FAULT)
        return stop(state, op, -EFAULT)
    return enter_fault(m, op, slot, gfn, True)


@kernel
def guest_page(m, op):
    """kvm_gmem_get_pfn(): the frame, what its leaf will show zeroed, and the level; then unlock. -EHWPOISON of a
    poisoned folio: a memory fault exit.

    KVM finds the level later, under its mmu_lock; the invalidate sequence that `guest_map` checks makes that the same.
    """
    state = m.state
    node = inode_row(state[op + O_INODE])
    index = state[op + O_INDEX]
    block = block_row(m, node, index)
    pfn = frame_of(m, block, index)
    if poisoned(m, pfn):
        unlock(state, op, node)
        return stop(state, op, -EHWPOISON)
    level = guest_level(m, state[op + O_ROW], node, index, state[op + O_ADDRESS] >> U12)
    level = U1 if fetches_small(m, op) else kind_level(m, op, node, index, level)
    zero_folio(m, node, index, pfn, level, folio_order_at(m, block, index))
    state[op + O_PFN] = pfn
    state[op + O_LEVEL] = level
    unlock(state, op, node)
    return GO


@kernel
def set_dirty(m, op):
    """mmu.c:kvm_release_faultin_page(): memory that the guest may write is dirty once it is mapped, read or written.

    Of pages of the page allocator; of huge pages, which merged code does not have, nobody has said so.
    """
    if m.state[R_ORDER] == U0:
        m.ram[struct_page(m, folio_head(m, m.state[op + O_PFN])) + FLAGS] |= PG_DIRTY


mark_mapped = full_only(set_dirty, None)  # the fast loops know no pages of that kind


@kernel
def guest_map(m, op):
    """Install the leaf, unless an invalidation came between: kvm_tdp_mmu_page_fault()."""
    outcome = install_stage2(m, op, m.state[op + O_LEVEL])
    if np.int64(m.state[op + O_STATUS]) == RET_PF_FIXED:
        mark_mapped(m, op)
        note_shown(m, op)
    return outcome


end_guest_fault = ending(guest_page, guest_map)


@kernel
def guest_fault(m, op):
    """A whole guest access."""
    if guest_begin(m, op) == GO:
        end_guest_fault(m, op)


# --------------------------------------------------------------------------- either, and inside another operation


@outlined
def fault(m, op):
    """A whole access of either kind."""
    if m.state[op + O_OP] == OP_HOST_FAULT:
        host_fault(m, op)
    else:
        guest_fault(m, op)


@outlined
def host_fault_page(m, op, address, write):
    """A fault of the process of another operation's record, in a record of its own: its status.

    Events go to the operation around it.
    """
    state = m.state
    for word in (O_STATUS, O_DETAIL, O_LOCKED, O_REFERENCED):
        state[INSIDE + word] = U0
    for word in (O_ACTOR, O_SPACE):
        state[INSIDE + word] = state[op + word]
    state[INSIDE + O_OP] = OP_HOST_FAULT
    state[INSIDE + O_FLAGS] = U1 if write else U0
    state[INSIDE + O_ADDRESS] = address
    fault(m, INSIDE)
    return np.int64(state[INSIDE + O_STATUS])


@outlined
def fault_in(m, space, address, write):
    """->fault of a mapping of the designs when the kernel itself asks for the page: no access follows it, which would
    mark the entry. VM_FAULT_*, 0 where an entry is there; one of the batches' kind, as whoever asks runs in batches.
    """
    state = m.state
    for word in (O_STATUS, O_DETAIL, O_LOCKED, O_REFERENCED, O_ACTOR):
        state[INSIDE + word] = U0
    state[INSIDE + O_SPACE] = space
    state[INSIDE + O_OP] = OP_HOST_FAULT
    state[INSIDE + O_FLAGS] = (U1 if write != U0 else U0) | NO_ACCESS
    state[INSIDE + O_ADDRESS] = address
    host_fault(m, INSIDE)
    return np.int64(state[INSIDE + O_STATUS])


give_designs_fault(fault_in)
