"""The entry for what one does to huge pages themselves: pools, their vmemmap, split and merge, references, poison."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import LOW8, NONE, U0, U1, U3, U6, U7, U9, U12, U512
from pgemu_kernels.engine.charge import charge_one
from pgemu_kernels.engine.choice import by_number
from pgemu_kernels.engine.compile import entry, kernel, outlined
from pgemu_kernels.engine.handle import open_full_machine
from pgemu_kernels.engine.records import Columns, element
from pgemu_kernels.engine.rows import stop
from pgemu_kernels.folios.boot_memory import prepare_memory
from pgemu_kernels.folios.demotion import demote, dissolve_free_hugetlb_folio
from pgemu_kernels.folios.folio import COUNTS, FLAGS, MAPPING, ONE_REFERENCE, order_of, reference_count, struct_page
from pgemu_kernels.folios.guest_folios import subpool_of
from pgemu_kernels.folios.hstate import ORDER_1G, hstate_of_order, in_zone
from pgemu_kernels.folios.huge_pages import alloc_hugetlb_folio, give_back_huge
from pgemu_kernels.folios.hugetlb import head_of, set_cgroup
from pgemu_kernels.folios.hvo import (
    is_optimized,
    next_huge_page,
    next_of_batch,
    optimize,
    optimize_batch,
    restore,
    restore_batch,
)
from pgemu_kernels.folios.merging import merge_folio
from pgemu_kernels.folios.page_allocator import is_noted_split, note_split
from pgemu_kernels.folios.poison import poison
from pgemu_kernels.folios.pools import reserve_pages, resize
from pgemu_kernels.folios.split_pages import join_list, leave_list
from pgemu_kernels.folios.splitting import split_folio
from pgemu_kernels.folios.vmemmap import store_vmemmap
from pgemu_kernels.gmem.references import may_put, note_transient
from pgemu_kernels.run.folio_operations import change_frozen, change_references, is_free
from pgemu_kernels.run.routing import as_one_step, in_order, is_of
from pgemu_kernels.words.enum_words import (
    EVENT_VMEMMAP_FAULT,
    OP_DISSOLVE,
    OP_FOLIO_ALLOCATE,
    OP_FOLIO_FREE,
    OP_FOLIO_FREEZE,
    OP_FOLIO_MERGE,
    OP_FOLIO_REFERENCE,
    OP_FOLIO_SPLIT,
    OP_POISON,
    OP_POOL_DEMOTE,
    OP_POOL_RESERVE,
    OP_POOL_RESIZE,
    OP_VMEMMAP_OPTIMIZE,
    OP_VMEMMAP_RESTORE,
    OP_VMEMMAP_STORE,
)
from pgemu_kernels.words.operations import EBUSY, EINVAL, ENOMEM, OPS_POOLING
from pgemu_kernels.words.registers import (
    R_GUEST_PAGES,
    R_HWPOISON,
    R_NODES,
    R_POOL_BASE,
    R_VMEMMAP,
)
from pgemu_kernels.words.rows import (
    ACTORS,
    CGROUP_ADDRESS,
    H_RESERVED,
    O_ADDRESS,
    O_DETAIL,
    O_LENGTH,
    O_OBJECT,
    O_OFFSET,
    O_OP,
    O_SPACE,
)

U = np.uint64


@kernel
def pool_of(m, op):
    """Row of the hstate that an operation names by its order, 0 for numbers that name none; and the node, NONE: all."""
    order = m.state[op + O_OBJECT]
    node = m.state[op + O_SPACE]
    known = (order == U9 or order == ORDER_1G) and node <= m.state[R_NODES]
    return (hstate_of_order(order) if known else U0), (NONE if node == U0 else node - U1)


# --------------------------------------------------------------------------- pools


@outlined
def change_pool(m, op):
    """POOL_RESIZE: 0 with the pages afterwards. POOL_DEMOTE: 0 with the pages demoted, -EBUSY or -ENOMEM.

    POOL_RESERVE: 0 with the pages reserved afterwards, or -ENOMEM with none more. -EINVAL.
    """
    state = m.state
    h, node = pool_of(m, op)
    if h == U0:
        return stop(state, op, -EINVAL)
    if state[op + O_OP] == OP_POOL_RESIZE:
        state[op + O_DETAIL] = resize(m, h, min(state[op + O_LENGTH], state[R_GUEST_PAGES]), node)
        return stop(state, op, 0)
    if state[op + O_OP] == OP_POOL_RESERVE:
        status = reserve_pages(m, h, min(state[op + O_LENGTH], state[R_GUEST_PAGES]))
        state[op + O_DETAIL] = state[h + H_RESERVED]
        return stop(state, op, status)
    status, done = demote(m, h, state[op + O_LENGTH], node)
    state[op + O_DETAIL] = done
    return stop(state, op, status)


@outlined
def operate_allocate(m, op):
    """FOLIO_ALLOCATE: alloc_hugetlb_folio() without a reservation: 0 with the head's frame.

    -ENOMEM without a free page that is neither reserved nor poisoned and without one to be had as surplus; -EINVAL.
    """
    state = m.state
    h, node = pool_of(m, op)
    if h == U0:
        return stop(state, op, -EINVAL)
    head = alloc_hugetlb_folio(m, state[op + O_OBJECT], U0, U0 if node == NONE else node)
    if head == NONE:
        return stop(state, op, -ENOMEM)
    note_transient(m, head, U1)  # whoever allocated it is an outsider, too
    state[op + O_DETAIL] = head
    return stop(state, op, 0)


@outlined
def free(m, op):
    """folio_put() of a page that FOLIO_ALLOCATE gave: 0, the last one frees it.

    -EINVAL if it is no page in use, or none that outsiders hold.
    """
    state = m.state
    head = state[op + O_ADDRESS] >> U12
    if head_of(m, head) != head or not is_allocated(m, head):
        return stop(state, op, -EINVAL)
    page = struct_page(m, head)
    note_transient(m, head, ~U0)
    if reference_count(m.ram, page) > U1:
        m.ram[page + COUNTS] -= ONE_REFERENCE
    else:
        give_back_huge(m, head)
    return stop(state, op, 0)


@kernel
def is_allocated(m, head):
    """Whether a HugeTLB page is in use, in no page cache or mapping, nor on its way back from an inode's, and held by
    outsiders: what only a process's or device's pin holds is not theirs."""
    page = struct_page(m, head)
    in_use = reference_count(m.ram, page) != U0 and not is_free(m, head)
    orphan = m.ram[page + MAPPING] == U0 and subpool_of(m, page) == U0
    return in_use and orphan and may_put(m, head, page, U1)


# --------------------------------------------------------------------------- vmemmap


@kernel
def all_frozen(m, first, end):
    """Whether no HugeTLB page of a range is in use: one that is must keep its vmemmap."""
    head = first
    while head != U0:
        if not is_free(m, head):
            return False
        head = next_of_batch(m, head, end)
    return True


@outlined
def change_vmemmap(m, op):
    """VMEMMAP_OPTIMIZE, VMEMMAP_RESTORE: all HugeTLB pages whose heads lie in a range, several in one batch.

    0, or -ENOMEM, with the pages done; -EBUSY with a page in use among them, -EINVAL without any page.
    """
    state = m.state
    start = state[op + O_ADDRESS] >> U12
    end = start + (state[op + O_LENGTH] >> U12)
    if not in_zone(state, start) or end - state[R_POOL_BASE] > state[R_GUEST_PAGES]:
        return stop(state, op, -EINVAL)
    first = next_huge_page(m, start, end)
    if first == U0:
        return stop(state, op, -EINVAL)
    if not all_frozen(m, first, end):
        return stop(state, op, -EBUSY)
    single = next_of_batch(m, first, end) == U0
    optimizing = state[op + O_OP] == OP_VMEMMAP_OPTIMIZE
    if single and optimizing:
        status = optimize(m, first, order_of(m, first))
        state[op + O_DETAIL] = U1 if is_optimized(m, first) else U0
    elif single:
        status = restore(m, first, order_of(m, first))
        state[op + O_DETAIL] = U1 if status == 0 else U0
    elif optimizing:
        state[op + O_DETAIL] = optimize_batch(m, first, end)
        status = np.int64(0)
    else:
        status, state[op + O_DETAIL] = restore_batch(m, first, end)
    return stop(state, op, status)


@outlined
def store_word(m, op):
    """VMEMMAP_STORE: 0, or -EFAULT through a read-only entry, with the entry's physical address; -EINVAL outside."""
    state = m.state
    address = state[op + O_ADDRESS]
    if address & U7 != U0 or (address - state[R_VMEMMAP]) >> U6 < state[R_POOL_BASE]:
        return stop(state, op, -EINVAL)
    if not in_zone(state, (address - state[R_VMEMMAP]) >> U6):
        return stop(state, op, -EINVAL)
    status, slot = store_vmemmap(m, address, state[op + O_OFFSET])
    state[op + O_DETAIL] = slot << U3
    if status != 0:
        charge_one(m, EVENT_VMEMMAP_FAULT)
    return stop(state, op, status)


# --------------------------------------------------------------------------- split and merge


@outlined
def folio_split(m, op):
    """FOLIO_SPLIT of an allocated huge page, whose owner has the only reference: 0, -WOULD_SPIN while somebody has
    another, -ENOMEM, -EINVAL, or -EBUSY of a poisoned one.

    Each 4K page is a folio with one reference afterwards. Pages of inodes are split by conversion.
    """
    state = m.state
    head = state[op + O_ADDRESS] >> U12
    if head_of(m, head) != head or not is_allocated(m, head):
        return stop(state, op, -EINVAL)
    order = order_of(m, head)
    if m.ram[struct_page(m, head) + FLAGS] & state[R_HWPOISON] != U0:
        return stop(state, op, -EBUSY)  # a poisoned page is not split: the posted code says TODO
    status = split_folio(m, head, order, U0, U1)
    if status == 0:
        note_split(state, head, order, True)
        leave_list(m, head)
    return stop(state, op, status)


@outlined
def folio_merge(m, op):
    """FOLIO_MERGE of the 4K folios that FOLIO_SPLIT made: 0, -WOULD_SPIN while one has another reference, -EINVAL."""
    state = m.state
    head = state[op + O_ADDRESS] >> U12
    pages = state[op + O_LENGTH] >> U12
    order = U9 if pages == U512 else ORDER_1G
    if pages != U1 << order or head & (pages - U1) != U0 or not in_zone(state, head):
        return stop(state, op, -EINVAL)
    if not is_noted_split(state, head, order):
        return stop(state, op, -EINVAL)
    status = merge_folio(m, head, order, U0, U1)
    if status == 0:
        note_split(state, head, order, False)
        set_cgroup(m.ram, state, struct_page(m, head), U(CGROUP_ADDRESS))
        join_list(m, head, order)
    return stop(state, op, status)


# --------------------------------------------------------------------------- the loop


@outlined
def take_out(m, op):
    """DISSOLVE: the free page that holds a frame leaves its pool. POISON: the frame is poisoned. -EINVAL of others."""
    state = m.state
    pfn = state[op + O_ADDRESS] >> U12
    head = head_of(m, pfn)
    if head == NONE:
        return stop(state, op, -EINVAL)
    if state[op + O_OP] == OP_POISON:
        return stop(state, op, poison(m, head, pfn))
    return stop(state, op, dissolve_free_hugetlb_folio(m, hstate_of_order(order_of(m, head)), head))


@kernel
def refuse_pooling(m, op, kind):
    """An operation that is none on huge pages."""
    return stop(m.state, op, -EINVAL)


operate_pool = by_number(
    (
        (OP_POOL_RESIZE, change_pool),
        (OP_POOL_DEMOTE, change_pool),
        (OP_POOL_RESERVE, change_pool),
        (OP_FOLIO_ALLOCATE, operate_allocate),
        (OP_FOLIO_FREE, free),
        (OP_VMEMMAP_OPTIMIZE, change_vmemmap),
        (OP_VMEMMAP_RESTORE, change_vmemmap),
        (OP_FOLIO_SPLIT, folio_split),
        (OP_FOLIO_MERGE, folio_merge),
        (OP_FOLIO_REFERENCE, change_references),
        (OP_FOLIO_FREEZE, change_frozen),
        (OP_VMEMMAP_STORE, store_word),
        (OP_DISSOLVE, take_out),
        (OP_POISON, take_out),
    ),
    refuse_pooling,
)


@kernel
def is_ours(m, columns, i):
    """Whether an operation is one on huge pages."""
    return is_of(OPS_POOLING, element(columns.header, i) & LOW8)


run_in_order = in_order(is_ours, operate_pool)
step_pool = as_one_step(operate_pool, False)  # -EBUSY is a result here: a page is in use


@entry
def run_pooling(descriptor, header, object_, address, offset, length, status, detail, first, actor):
    """Run operations on huge pages from `first` on, up to one of another kind: its index, or how many there are.

    `first` NONE: nothing but boot_memory.prepare_memory(), 0 or -ENOMEM. It stands here because machines without such
    memory should not wait for its compilation. `actor` below words.ACTORS: the operation that he began, as one step:
    STOP.
    """
    columns = Columns(header, object_, address, offset, length, status, detail)
    m = open_full_machine(descriptor)
    if first == NONE:
        return U(prepare_memory(m))
    if actor < U(ACTORS):
        return U(step_pool(m, actor))
    return run_in_order(m, columns, first)
