"""Faults on guest_memfd with every parameter, and the allocation of a huge page under one, step by step.

An allocation is: lookup, which misses; take a page of the subpool and of the pool; insert it in the page cache, or
lose the race and look again; split it where any of its pages is shared. A mutex per inode and huge page is held
meanwhile (hash mutex of the January 2026 rewrite, taken outside kvm_gmem_get_folio() as Michael Roth needed it);
Defect.ALLOCATION_RACE goes without.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U6, U9, U12, U512
from pgemu_kernels.engine.charge import result
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.engine.rows import block_row, inode_row, stop, unlock
from pgemu_kernels.engine.shareability import is_shared, shared_in_block
from pgemu_kernels.folios.folio import MAPPING, add_references, struct_page
from pgemu_kernels.folios.hugetlb import free_block, give_back_folio, insert_folio, obtain_folio
from pgemu_kernels.folios.splitting import split_block
from pgemu_kernels.folios.xarray import has_pieces
from pgemu_kernels.gmem import host_entries as huge_host, levels as gmem_kvm, lru, pfnmap, pieces, restructure
from pgemu_kernels.gmem.conversion import add_to_lru
from pgemu_kernels.gmem.lifetime import refuse_released
from pgemu_kernels.gmem.references import drop
from pgemu_kernels.gmem.steps import fault_begin, still_mapped
from pgemu_kernels.gmem.zeroing import zero_folio, zero_huge
from pgemu_kernels.kvm.fault import guest_begin, install_stage2
from pgemu_kernels.words.operations import (
    BLOCKED,
    CONVERT_FIXUP,
    CONVERT_RFC2,
    EBUSY,
    EEXIST,
    ENOMEM,
    GO,
    PFNMAP,
    RET_PF_RETRY,
    STOP,
    VM_FAULT_OOM,
    VM_FAULT_RETRY,
    VM_FAULT_SIGBUS,
    Defect,
    Operation,
)
from pgemu_kernels.words.registers import (
    R_CONVERT_ORDER,
    R_DEFECTS,
    R_DESIGN,
    R_FAULT_REFERENCES,
    R_FOLIOS_IN_HAND,
    R_HOST_HUGE,
    R_LRU_CPUS,
    R_ORDER,
)
from pgemu_kernels.words.rows import (
    A_PGOFF,
    A_START,
    ACTORS,
    B_MUTEX,
    B_PFN,
    B_STATE,
    BLOCK_ABSENT,
    BLOCK_HUGE,
    BLOCK_PARTLY,
    BLOCK_SPLIT,
    I_ZEROED,
    M_FLAGS,
    O_ACTOR,
    O_ADDRESS,
    O_DETAIL,
    O_FLAGS,
    O_FOLIO,
    O_INDEX,
    O_INODE,
    O_LEVEL,
    O_LOCKED,
    O_MUTEX,
    O_NEXT,
    O_OP,
    O_PFN,
    O_REFERENCED,
    O_ROW,
    O_SPACE,
    O_STATUS,
    O_WORDS,
    SLOT_LOG_DIRTY_PAGES,
    STATE_OPS,
)

U = np.uint64
_PFNMAP = U(PFNMAP)
_HOST_FAULT = U(Operation.HOST_FAULT)
_ALLOCATION_RACE = U(Defect.ALLOCATION_RACE)
_INSERT_UNLOCKED = U(Defect.INSERT_UNLOCKED)
INSIDE = STATE_OPS + U((ACTORS + 1) * O_WORDS)  # the record of a fault inside another operation

# Steps of a fault.
FOLIO = U(1)
MAP = U(2)
TAKE = U(3)
INSERT = U(4)
SPLIT = U(5)
PUT = U(6)


# --------------------------------------------------------------------------- allocation


@kernel
def unlock_block(m, op):
    """Release the mutex of the block, if the fault holds one."""
    state = m.state
    if state[op + O_MUTEX] != U0:
        m.state[state[op + O_MUTEX] + B_MUTEX] = U0
        state[op + O_MUTEX] = U0


@kernel
def lock_block(m, op, block):
    """Take the block's mutex; False if another fault holds it."""
    state = m.state
    if state[R_DEFECTS] & _ALLOCATION_RACE != U0 or state[op + O_MUTEX] == block:
        return True
    if m.state[block + B_MUTEX] != U0:
        return False
    m.state[block + B_MUTEX] = state[op + O_ACTOR] + U1
    state[op + O_MUTEX] = block
    return True


@outlined
def lookup(m, op):
    """Whether the page has a folio: STOP where it has one, GO where one is to be allocated (the mutex is held).

    BLOCKED: another fault is allocating it.
    """
    state = m.state
    block = block_row(m, inode_row(state[op + O_INODE]), state[op + O_INDEX])
    busy = m.state[block + B_MUTEX] != U0 and state[op + O_MUTEX] != block
    if m.state[block + B_STATE] != BLOCK_ABSENT and not busy:
        return np.int64(STOP)
    if not lock_block(m, op, block):
        result(state, op, np.int64(VM_FAULT_RETRY if state[op + O_OP] == _HOST_FAULT else RET_PF_RETRY))
        return np.int64(BLOCKED)
    return np.int64(GO)


@outlined
def take(m, op):
    """Take a page of the subpool and a huge page for the block: 0 or -ENOMEM."""
    state = m.state
    order = state[R_ORDER]
    head = obtain_folio(m, state[op + O_INODE], state[op + O_INDEX] >> order << order)
    if head == NONE:
        return np.int64(-ENOMEM)
    state[op + O_FOLIO] = head
    state[R_FOLIOS_IN_HAND] += U1
    return np.int64(0)


@outlined
def insert(m, op):
    """Put what was taken in the page cache: 0, or -EEXIST where somebody was faster, who keeps his: ours goes back."""
    state = m.state
    inode = state[op + O_INODE]
    order = state[R_ORDER]
    block = block_row(m, inode_row(inode), state[op + O_INDEX])
    head = state[op + O_FOLIO]
    state[op + O_FOLIO] = U0
    state[R_FOLIOS_IN_HAND] -= U1
    if m.state[block + B_STATE] != BLOCK_ABSENT:
        give_back_folio(m, inode, head)
        return np.int64(-EEXIST)
    insert_folio(m, inode, block, state[op + O_INDEX] >> order << order, head)
    if order == U0:
        lru.lru_add(m, head, state[op + O_ACTOR] % state[R_LRU_CPUS])
    return np.int64(0)


@outlined
def split_to_pieces(m, op, node, block, first):
    """split_new() of a 1G folio, down to what its shared pages need; without memory for that the folio is removed."""
    status = pieces.split_shared(m, node, block, first)
    if status == 0:
        for index in range(first, first + pieces.BLOCK_PAGES, U512):
            if pieces.is_split_at(m, block, index):
                add_to_lru(m, op, pieces.piece_head(m, block, index), U512)
    elif status == -ENOMEM:
        if m.state[block + B_STATE] == BLOCK_PARTLY:
            pieces.dissolve_block(m, node, block, first)
        free_block(m, block)
    return status


@outlined
def split_new(m, op):
    """Restructure: split a new folio if any of its pages is shared: 0, -EBUSY, or -ENOMEM with the folio removed.

    kvm_gmem_get_folio() of the posted series: shared memory is order-0 before anybody uses it.
    """
    state = m.state
    node = inode_row(state[op + O_INODE])
    index = state[op + O_INDEX]
    order = state[R_ORDER]
    block = block_row(m, node, index)
    if state[R_DESIGN] == _PFNMAP or order == U0 or shared_in_block(m, node, index) == U0:
        return np.int64(0)
    if m.state[block + B_STATE] != BLOCK_HUGE:
        return np.int64(0)  # somebody else did, without the mutex
    first = index >> order << order
    if has_pieces(state):
        return split_to_pieces(m, op, node, block, first)
    status = split_block(m, block, first, state[node + I_ZEROED] + (first >> U6))
    if status == 0:
        add_to_lru(m, op, m.state[block + B_PFN], U1 << order)
    elif status == -ENOMEM:
        free_block(m, block)
    return status


@outlined
def fail_fault(m, op):
    """End a fault for want of memory."""
    state = m.state
    unlock_block(m, op)
    unlock(state, op, inode_row(state[op + O_INODE]))
    return stop(state, op, VM_FAULT_OOM if state[op + O_OP] == _HOST_FAULT else -ENOMEM)


@outlined
def allocate(m, op):
    """Allocate the huge page under the record's page, if there is none: GO, or what the lookup said.

    With nobody in between; -ENOMEM ends the fault (STOP).
    """
    state = m.state
    found = lookup(m, op)
    if found == STOP:
        return np.int64(GO)
    if found == BLOCKED:
        unlock(state, op, inode_row(state[op + O_INODE]))
        return found
    if take(m, op) != 0:
        return np.int64(fail_fault(m, op))
    insert(m, op)
    if split_new(m, op) != 0:
        return np.int64(fail_fault(m, op))
    unlock_block(m, op)
    return np.int64(GO)


# --------------------------------------------------------------------------- with the folio there


@kernel
def frame_of(m, node, index):
    """The frame of an allocated page."""
    return m.state[block_row(m, node, index) + B_PFN] + (index & ((U1 << m.state[R_ORDER]) - U1))


@kernel
def folio_order_at(m, node, index):
    """Order of the folio that holds an allocated page: restructure splits them."""
    block = block_row(m, node, index)
    kind = m.state[block + B_STATE]
    if kind == BLOCK_SPLIT:
        return U0
    if kind == BLOCK_PARTLY:
        return (pieces.level_of(m, block, index) - U1) * U9
    return m.state[R_ORDER]


@kernel
def refuse_private(m, op):
    """Userspace may only use shared pages; whether this one is none: then the fault has ended in SIGBUS."""
    state = m.state
    node = inode_row(state[op + O_INODE])
    if is_shared(m, node, state[op + O_INDEX]) != U0:
        return False
    unlock(state, op, node)
    stop(state, op, VM_FAULT_SIGBUS)
    return True


@outlined
def host_folio(m, op):
    """Restructure: a reference on the 4K folio, zeroed; then unlock. A large folio is a WARN and SIGBUS: it is there
    only where a fault met a folio that another fault had not split yet (Defect.ALLOCATION_RACE).
    """
    state = m.state
    node = inode_row(state[op + O_INODE])
    index = state[op + O_INDEX]
    if folio_order_at(m, node, index) != U0:
        unlock(state, op, node)
        return stop(state, op, VM_FAULT_SIGBUS)
    pfn = frame_of(m, node, index)
    add_references(m.ram, restructure.zero_page(m, pfn), U1)
    state[R_FAULT_REFERENCES] += U1
    state[op + O_REFERENCED] = pfn + U1
    state[op + O_PFN] = pfn
    unlock(state, op, node)
    return np.int64(GO)


@outlined
def host_frame(m, op):
    """Pfnmap: the frame, zeroed as far as the entry will show. The lock stays held (Defect.INSERT_UNLOCKED: not)."""
    state = m.state
    node = inode_row(state[op + O_INODE])
    index = state[op + O_INDEX]
    pfn = frame_of(m, node, index)
    state[op + O_PFN] = pfn
    zero_huge(m, node, index, pfn, U1)
    if state[R_DEFECTS] & _INSERT_UNLOCKED != U0:
        unlock(state, op, node)
    return np.int64(GO)


@kernel
def is_still_there(m, op):
    """Whether the fault's folio is the inode's yet, and its VMA still shows that page at the address.

    Linux keeps the folio locked, so that truncation waits and unmaps it, and holds the VMA's lock.
    """
    state = m.state
    row = state[op + O_ROW]
    shown = state[row + A_PGOFF] + ((state[op + O_ADDRESS] - state[row + A_START]) >> U12)
    return m.ram[struct_page(m, state[op + O_PFN]) + MAPPING] != U0 and shown == state[op + O_INDEX]


@outlined
def host_map(m, op):
    """Enter it in the process's tables."""
    state = m.state
    if state[R_DESIGN] != _PFNMAP:
        if not is_still_there(m, op):
            guest_put(m, op)
            return np.int64(stop(state, op, VM_FAULT_RETRY))
        outcome = np.int64(restructure.fault_map(m, op))
        drop(m, state[op + O_PFN], U0)  # a fault that failed may have held the last reference
        return outcome
    if state[R_HOST_HUGE] == U0:
        return np.int64(pfnmap.fault_map(m, op))
    status = np.int64(VM_FAULT_RETRY)
    if still_mapped(state, op):
        status = huge_host.insert(m, op, huge_host.host_level(m, op))
    unlock(state, op, inode_row(state[op + O_INODE]))
    return np.int64(stop(state, op, status))


@outlined
def guest_frame(m, op):
    """kvm_gmem_get_pfn(): the frame, its folio zeroed if it is not up to date, and the level; then unlock."""
    state = m.state
    node = inode_row(state[op + O_INODE])
    index = state[op + O_INDEX]
    pfn = frame_of(m, node, index)
    state[op + O_PFN] = pfn
    if state[R_DESIGN] == _PFNMAP:
        level = gmem_kvm.shareability_level_full(m, op)
    else:
        level = gmem_kvm.folio_level_full(m, op)
    order = folio_order_at(m, node, index)
    if state[R_DESIGN] != _PFNMAP and order == U0:
        restructure.zero_page(m, pfn)
    else:
        zero_folio(m, node, index, pfn, level, order)
    state[op + O_LEVEL] = level
    if state[R_DESIGN] != _PFNMAP:
        head = pfn & ~((U1 << order) - U1)
        add_references(m.ram, struct_page(m, head), U1)
        state[R_FAULT_REFERENCES] += U1
        state[op + O_REFERENCED] = head + U1
        if not puts_after_mapping(state):
            state[op + O_NEXT] = PUT
    unlock(state, op, node)
    return np.int64(GO)


@kernel
def puts_after_mapping(state):
    """Whether KVM keeps the folio's reference until the leaf is there: kvm_release_faultin_page() of rfc2 and fixup.

    Later orders return no struct page: kvm_gmem_get_pfn() puts the folio, after it released the lock.
    """
    return state[R_CONVERT_ORDER] == CONVERT_RFC2 or state[R_CONVERT_ORDER] == CONVERT_FIXUP


@outlined
def guest_put(m, op):
    """The end of kvm_gmem_get_pfn(), the lock released: until here a conversion meets the fault's reference."""
    state = m.state
    referenced = state[op + O_REFERENCED]
    if referenced != U0:
        state[R_FAULT_REFERENCES] -= U1
        state[op + O_REFERENCED] = U0
        drop(m, referenced - U1, U1)
    state[op + O_NEXT] = MAP
    return np.int64(GO)


@outlined
def guest_map(m, op):
    """Install the leaf, unless an invalidation came between."""
    guest_put(m, op)
    state = m.state
    level = state[op + O_LEVEL]
    if state[state[op + O_ROW] + M_FLAGS] & SLOT_LOG_DIRTY_PAGES != U0:
        level = U1  # switched on meanwhile: KVM finds the level under its mmu_lock
    return np.int64(install_stage2(m, op, level))


@outlined
def begin_fault(m, op):
    """The first step of either kind of fault."""
    m.state[op + O_FOLIO] = U0
    m.state[op + O_MUTEX] = U0
    if m.state[op + O_OP] == _HOST_FAULT:
        return np.int64(fault_begin(m, op))
    if refuse_released(m, op):
        return np.int64(STOP)
    return np.int64(guest_begin(m, op))


@kernel
def folio(m, op):
    """The step that finds the frame, which is there."""
    if m.state[op + O_OP] != _HOST_FAULT:
        return guest_frame(m, op)
    if m.state[R_DESIGN] == _PFNMAP:
        return host_frame(m, op)
    return np.int64(host_folio(m, op))


# --------------------------------------------------------------------------- whole faults


@outlined
def fault(m, op):
    """A host or a guest fault: begin, folio, map."""
    host = m.state[op + O_OP] == _HOST_FAULT
    if begin_fault(m, op) != GO or (host and refuse_private(m, op)):
        return
    if allocate(m, op) != GO or folio(m, op) != GO:
        return
    if host:
        host_map(m, op)
    else:
        guest_map(m, op)


@outlined
def host_fault_page(m, op, address, write):
    """A fault of the process of another operation's record, in a record of its own: its status.

    Events go to the operation around it.
    """
    state = m.state
    for word in (O_ACTOR, O_SPACE):
        state[INSIDE + word] = state[op + word]
    state[INSIDE + O_OP] = _HOST_FAULT
    state[INSIDE + O_FLAGS] = U1 if write else U0
    state[INSIDE + O_ADDRESS] = address
    return run_inside(m)


@kernel
def run_inside(m):
    for word in (O_STATUS, O_DETAIL, O_LOCKED, O_REFERENCED):
        m.state[INSIDE + word] = U0
    fault(m, INSIDE)
    return np.int64(m.state[INSIDE + O_STATUS])


# --------------------------------------------------------------------------- step by step


@kernel
def step_allocation(m, op, stage):
    """Step TAKE, INSERT or SPLIT; then the lookup once more."""
    state = m.state
    if stage == TAKE:
        return np.int64(GO) if take(m, op) == 0 else np.int64(fail_fault(m, op))
    if stage == INSERT:
        lost = insert(m, op) != 0
        if lost or state[R_DESIGN] == _PFNMAP:
            unlock_block(m, op)
            state[op + O_NEXT] = FOLIO
        return np.int64(GO)
    status = split_new(m, op)
    if status == -EBUSY:
        return np.int64(BLOCKED)  # the posted code spins
    if status != 0:
        return np.int64(fail_fault(m, op))
    unlock_block(m, op)
    state[op + O_NEXT] = FOLIO
    return np.int64(GO)


@outlined
def step_fault(m, op, stage):
    """Step `stage` of a host or a guest fault: 0 begins, 1 looks up, 2 maps, 3 to 5 allocate, 6 puts the folio."""
    host = m.state[op + O_OP] == _HOST_FAULT
    if stage == U0:
        return begin_fault(m, op)
    if stage == FOLIO:
        if host and refuse_private(m, op):
            return np.int64(STOP)
        found = lookup(m, op)
        if found == STOP:
            return folio(m, op)
        m.state[op + O_NEXT] = TAKE
        return found
    if stage == PUT:
        return guest_put(m, op)
    if stage == MAP:
        return host_map(m, op) if host else guest_map(m, op)
    return step_allocation(m, op, stage)
