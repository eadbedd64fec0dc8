"""Edits of one page table of any format: map, unmap, protect, clear accessed and dirty, split, collapse, store.

Each edit is charged, notes what must be flushed, and can write down every entry it reads and writes. What Linux does
differently for processes, KVM on x86 and KVM on Arm follows from the format's data: its flush rule (F_FLUSH), its
frozen value and F_BREAK_BEFORE_MAKE. Within a tree `counts` holds the present entries of each table by its frame.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels import layout
from pgemu_kernels.bits import ALL, NONE, U0, U1, U2, U3, U9, U12, U511, U512, U4095, prefetch
from pgemu_kernels.compile import entry, kernel, outlined
from pgemu_kernels.edit_tree import (
    FILL,
    FREE,
    WHOLE_VM,
    Tree,
    attributes,
    breaks,
    child_attributes,
    count_entry,
    descend,
    empty_table,
    find,
    flush,
    flush_pending,
    give_back,
    holds_leaf,
    is_frozen,
    is_leaf,
    is_present,
    is_process,
    leaf_address,
    leaf_attributes,
    load,
    logged,
    moved_mask,
    needs_flush,
    new_table,
    owe_flush,
    record,
    release,
    size_of,
    sticky_bits,
    store,
    swap,
    table_entry,
    tear_down,
    well_formed,
)
from pgemu_kernels.events import (
    LEAF_CLEARED,
    LEAF_WRITTEN,
    SPTE_CLEARED,
    SPTE_WRITTEN,
    TABLE_PAGE_ALLOCATED,
    TABLE_PAGE_FREED,
    charge,
)
from pgemu_kernels.handle import open_machine
from pgemu_kernels.layout import (
    E_CHANGED,
    E_CLEAR,
    E_CLEARED,
    E_FLAGS,
    E_FORMAT,
    E_FOUND,
    E_FREED,
    E_LENGTH,
    E_LEVEL,
    E_OFFSET,
    E_OP,
    E_QUICK,
    E_QUICK_PHYSICAL,
    E_ROOT,
    E_SET,
    E_WRITTEN,
    EDIT_EXACT,
    EDIT_FREE,
    EDIT_FREE_COVERED,
    EDIT_REPLACE,
    EDIT_SPLIT,
    F_ACCESSED,
    F_ADDRESS,
    F_BREAK_BITS,
    F_DIRTY,
    F_EMPTY,
    F_FLUSH,
    F_INPUT_BITS,
    F_LARGEST_LEAF,
    F_LEAF_MASK,
    F_LEVELS,
    F_PAGE_MASK,
    F_PAT_PAGE,
    F_PRESENT,
    F_RANGE_FLUSH,
    F_RESERVED_LEAF,
    F_ROOT_BITS,
    F_SIGN_EXTENDED,
    R_COUNTER_ROW,
    STATS_COUNTERS,
)
from pgemu_kernels.memory import fill_frame, frames_left, put_frame, put_run, take_frame, take_run
from pgemu_kernels.paging import format_row, table_of

U = np.uint64
U7 = U(7)
AHEAD = U(8)  # how many addresses of a batch the memory is given to fetch an entry

CREATE = U(layout.Edit.CREATE)
DESTROY = U(layout.Edit.DESTROY)
MAP = U(layout.Edit.MAP)
UNMAP = U(layout.Edit.UNMAP)
PROTECT = U(layout.Edit.PROTECT)
CLEAR_ACCESSED = U(layout.Edit.CLEAR_ACCESSED)
CLEAR_DIRTY = U(layout.Edit.CLEAR_DIRTY)
SPLIT = U(layout.Edit.SPLIT)
COLLAPSE = U(layout.Edit.COLLAPSE)
FREE_TABLES = U(layout.Edit.FREE_TABLES)
STORE = U(layout.Edit.STORE)

DONE = np.int64(0)
NO_ENTRY = np.int64(-layout.ENOENT)
TRY_AGAIN = np.int64(-layout.EAGAIN)
NO_MEMORY = np.int64(-layout.ENOMEM)
BUSY = np.int64(-layout.EBUSY)
EXISTS = np.int64(-layout.EEXIST)
INVALID = np.int64(-layout.EINVAL)
OUT_OF_RANGE = np.int64(-layout.ERANGE)
NOT_SUPPORTED = np.int64(-layout.EOPNOTSUPP)


# --------------------------------------------------------------------------- split and collapse


@kernel
def fill_children(e, table, level, first):
    """Fill a table of `level` with leaves that follow one another from `first` on."""
    size = size_of(level)
    for i in range(U512):
        store(e, table + i, level, first + i * size)
    e.counts[table >> U9] = np.uint32(512)
    e.request[E_WRITTEN] += U512


@outlined
def build_pages(e, f, table, value):
    """Fill a level-2 table with tables of 4K leaves, off line; 512 frames are at hand. `value`: the 1G leaf."""
    state = e.state
    page = leaf_address(state, f, U3, value) | child_attributes(state, f, U1, attributes(state, f, U3, value))
    for i in range(U512):
        below = new_table(e)
        fill_children(e, below, U1, page + i * size_of(U2))
        store(e, table + i, U2, table_entry(state, f, U2, below))
    e.counts[table >> U9] = np.uint32(512)


@outlined
def split_leaf(e, f, slot, level, value, base, target):
    """Put a table of 512 smaller leaves in the place of a leaf: 0 or -ENOMEM.

    arch/x86/kvm/mmu/tdp_mmu.c:tdp_mmu_split_huge_page(): no flush. mm/huge_memory.c:__split_huge_pmd_locked(): the
    leaf becomes not present and is flushed first. Arm's stage2_split_walker() builds the children off line, down to
    `target` where the memory suffices.
    """
    state = e.state
    deep = breaks(state, f) and level == U3 and target == U1 and frames_left(e) >= U512 + U1
    table = new_table(e)
    if table == NONE:
        return NO_MEMORY
    if deep:
        build_pages(e, f, table, value)
    else:
        child = child_attributes(state, f, level - U1, attributes(state, f, level, value))
        fill_children(e, table, level - U1, leaf_address(state, f, level, value) | child)
    new = table_entry(state, f, level, table)
    if state[f + F_FLUSH] == WHOLE_VM:
        store(e, slot, level, new)
    else:
        swap(e, f, slot, level, new, value & ~state[f + F_PRESENT], base, True)
    return DONE


@kernel
def uniform_children(e, f, table, level):
    """The leaf that 512 leaves of `level` add up to, as an entry of theirs, or NONE.

    They must lie one after the other, aligned, and be alike but for the bits that the hardware sets, which are
    OR-ed so that none is lost. (KVM's make_huge_spte() takes those of the first child.)
    """
    state = e.state
    sticky = sticky_bits(state, f)
    first = load(e, table, level)
    merged = first
    if leaf_address(state, f, level, first) & (size_of(level + U1) - U1) != U0:
        return NONE
    for i in range(U512):
        value = first if i == U0 else load(e, table + i, level)
        if not is_present(state, f, value) or not is_leaf(state, f, level, value):
            return NONE
        if (value ^ (first + i * size_of(level))) & ~sticky != U0:
            return NONE
        merged |= value & sticky
    return merged


@outlined
def collapse(e, f, address, level):
    """Put one leaf in the place of the table of 512 at `address`: 0, -ENOENT (no table), or -EINVAL (not alike)."""
    state = e.state
    slot, at, old = find(e, f, address, level)
    if not is_present(state, f, old):
        return NO_ENTRY
    if at != level or is_leaf(state, f, at, old):
        return INVALID
    table = table_of(state, f, old)
    if e.counts[table >> U9] != np.uint32(512):
        return INVALID
    merged = uniform_children(e, f, table, level - U1)
    if merged == NONE:
        return INVALID
    bits = attributes(state, f, level - U1, merged)
    if level == U2:
        bits = leaf_attributes(state, f, level, bits)
    new = leaf_address(state, f, level - U1, merged) | bits
    if not well_formed(state, f, level, new):
        return INVALID
    replace_table(e, f, slot, level, old, new, address)
    return DONE


@outlined
def replace_table(e, f, slot, level, old, new, base):
    """Put a leaf in the place of a table: kvm_tdp_mmu_map(), stage2_map_walk_table_pre(). The old tables are freed."""
    swap(e, f, slot, level, new, e.state[f + F_EMPTY], base, True)
    table = table_of(e.state, f, old)
    tear_down(e, f, table, level - U1, True)
    release(e, table)
    e.request[E_WRITTEN] += U1


# --------------------------------------------------------------------------- map


@outlined
def displace(e, f, slot, level, new, base):
    """Write the leaf `new` where an entry is: 0, -EEXIST, or -EAGAIN for a frozen one.

    Tables without leaves are no obstacle: drivers/iommu/generic_pt/iommu_pt.h drops them, too; for processes and
    Arm that is inference.
    """
    state = e.state
    old = e.ram[slot]
    if is_frozen(state, f, old):
        return TRY_AGAIN
    if is_leaf(state, f, level, old):
        if e.request[E_FLAGS] & EDIT_REPLACE == U0:
            return EXISTS
        if old != new:
            swap(e, f, slot, level, new, state[f + F_EMPTY], base, False)
            e.request[E_WRITTEN] += U1
        return DONE
    if e.request[E_FLAGS] & EDIT_REPLACE == U0 and holds_leaf(e, f, table_of(state, f, old), level - U1):
        return EXISTS
    replace_table(e, f, slot, level, old, new, base)
    return DONE


@outlined
def open_leaf(e, f, slot, level, value, base):
    """Make room for smaller leaves where a larger one is: 0 or -ENOMEM.

    Arm puts an empty table there and lets the rest be faulted in again (stage2_map_walk_leaf()).
    """
    if not breaks(e.state, f):
        return split_leaf(e, f, slot, level, value, base, level - U1)
    table = empty_table(e, f)
    if table == NONE:
        return NO_MEMORY
    swap(e, f, slot, level, table_entry(e.state, f, level, table), U0, base, True)
    e.request[E_CLEARED] += U1
    return DONE


@outlined
def link_down(e, f, address, slot, level, value, target):
    """Make the tables from the entry at `slot` down to those of level `target`: status and slot there."""
    state = e.state
    while level > target:
        if is_present(state, f, value):
            if is_leaf(state, f, level, value):
                if e.request[E_FLAGS] & EDIT_REPLACE == U0:
                    return EXISTS, slot
                status = open_leaf(e, f, slot, level, value, address & ~(size_of(level) - U1))
                if status != DONE:
                    return status, slot
        elif is_frozen(state, f, value):
            return TRY_AGAIN, slot
        else:
            table = empty_table(e, f)
            if table == NONE:
                return NO_MEMORY, slot
            store(e, slot, level, table_entry(state, f, level, table))
            count_entry(e, slot, U1)
        table = table_of(state, f, e.ram[slot])
        level -= U1
        slot = table + (address >> (U3 + U9 * level) & U511)
        value = load(e, slot, level)
    return DONE, slot


@kernel
def leaf_level(e, address, physical, length):
    """The largest level that both addresses' alignment and the length allow, up to the request's."""
    level = e.request[E_LEVEL]
    while level > U1 and ((address | physical) & (size_of(level) - U1) != U0 or length < size_of(level)):
        level -= U1
    return level


@outlined
def map_range(e, f, address, end, physical):
    """Map [address, end) to `physical` with the largest leaves: 0 or the first failure."""
    state = e.state
    request = e.request
    while address < end:
        request[E_OFFSET] = address
        level = leaf_level(e, address, physical, end - address)
        size = size_of(level)
        new = physical | leaf_attributes(state, f, level, request[E_SET])
        if not well_formed(state, f, level, new):
            return INVALID
        slot, at, value = find(e, f, address, level)
        if at != level:
            status, slot = link_down(e, f, address, slot, at, value, level)
            if status != DONE:
                return status
            value = e.ram[slot]
        run = min((end - address) >> (U3 + U9 * level), U512 - (slot & U511))
        while True:
            if is_present(state, f, value) or is_frozen(state, f, value):
                status = displace(e, f, slot, level, new, address)
                if status != DONE:
                    return status
            else:
                store(e, slot, level, new)
                count_entry(e, slot, U1)
                request[E_WRITTEN] += U1
            request[E_CHANGED] += U1
            address += size
            request[E_OFFSET] = address
            physical += size
            run -= U1
            if run == U0:
                break
            new += size
            slot += U1
            value = load(e, slot, level)
    return DONE


@kernel
def map_one(e, f, address, physical):
    """Check a request to map, and map: 0 or -errno."""
    state = e.state
    request = e.request
    length = request[E_LENGTH]
    level = request[E_LEVEL]
    if request[E_FLAGS] & EDIT_EXACT != U0 and (address | physical) & (size_of(level) - U1) != U0:
        return INVALID
    last = physical + length - U1
    # Bits that a leaf may not have end where the physical addresses of this machine end.
    if (physical | last) & (~(state[f + F_ADDRESS] | U4095) | state[f + F_RESERVED_LEAF + U1]) != U0:
        return INVALID
    if physical & U4095 != U0 or last < physical or request[E_SET] & state[f + F_ADDRESS] != U0:
        return INVALID
    return map_range(e, f, address, address + length, physical)


# --------------------------------------------------------------------------- leaves of a range


@kernel
def unmap_leaf(e, f, slot, level, base):
    """Clear a leaf. Arm without deferred unmaps invalidates it at once: stage2_unmap_put_pte()."""
    state = e.state
    store(e, slot, level, state[f + F_EMPTY])
    count_entry(e, slot, ALL)
    e.request[E_CLEARED] += U1
    e.request[E_CHANGED] += U1
    if breaks(state, f) and state[f + F_RANGE_FLUSH] & U2 == U0:
        flush(e, f, base, base + size_of(level), level)
    else:
        owe_flush(e, base, base + size_of(level), level)


@outlined
def protect_leaf(e, f, slot, level, value, base):
    """Set and clear bits of a leaf: 0, or -EINVAL if that gives none that a walk would take."""
    state = e.state
    request = e.request
    new = value & ~moved_mask(state, f, level, request[E_CLEAR]) | moved_mask(state, f, level, request[E_SET])
    if new == value:
        return DONE
    if not well_formed(state, f, level, new):
        return INVALID
    interim = state[f + F_EMPTY] if level == U1 else value & ~state[f + F_PRESENT]
    swap(e, f, slot, level, new, interim, base, False)
    request[E_WRITTEN] += U1
    request[E_CHANGED] += U1
    return DONE


@kernel
def clear_bit(e, f, slot, level, value, base, bit, flushed):
    """Clear the accessed or the dirty bit of a leaf and count that it was set."""
    if value & bit != U0:
        store(e, slot, level, value & ~bit)
        e.request[E_WRITTEN] += U1
        e.request[E_CHANGED] += U1
        if flushed:
            owe_flush(e, base, base + size_of(level), level)


@kernel
def edit_leaf(e, f, op, slot, level, value, base):
    """Do an edit to one leaf that it covers, or may change whole: 0 or -errno."""
    if op == UNMAP:
        unmap_leaf(e, f, slot, level, base)
    elif op == PROTECT:
        return protect_leaf(e, f, slot, level, value, base)
    elif op == CLEAR_ACCESSED:
        # No flush: ptep_clear_flush_young() on x86, kvm_pgtable_stage2_test_clear_young().
        clear_bit(e, f, slot, level, value, base, e.state[f + F_ACCESSED], False)
    elif op == CLEAR_DIRTY:
        clear_bit(e, f, slot, level, value, base, e.state[f + F_DIRTY], True)
    return DONE


@kernel
def must_split(e, op, level, base, address, end):
    """Whether a leaf has to be split before the edit goes on."""
    if op == SPLIT:
        return level > e.request[E_LEVEL]
    partial = base < address or end - base < size_of(level)
    return partial and e.request[E_FLAGS] & EDIT_SPLIT != U0


@outlined
def edit_range(e, f, op, address, end):
    """Edit every leaf that overlaps [address, end): 0, or the first failure."""
    state = e.state
    request = e.request
    while address < end:
        slot, level, value = find(e, f, address, U1)
        size = size_of(level)
        while True:
            base = address & ~(size - U1)
            request[E_OFFSET] = address
            if is_present(state, f, value):
                if not is_leaf(state, f, level, value):
                    break  # a table beside what was edited so far: walk down to its entries
                request[E_FOUND] += U1
                if must_split(e, op, level, base, address, end):
                    status = split_leaf(e, f, slot, level, value, base, request[E_LEVEL] if op == SPLIT else level - U1)
                    if status != DONE:
                        return status
                    if op == SPLIT:
                        request[E_CHANGED] += U1
                    break
                status = edit_leaf(e, f, op, slot, level, value, base)
                if status != DONE:
                    return status
            address = base + size
            slot += U1
            if address >= end or slot & U511 == U0:
                break
            value = load(e, slot, level)
    return DONE


@kernel
def unlink_if_empty(e, f, slot, level, value, address, start):
    """Free the table below `slot`, whose entry is `value`, if it has no entries: whether it went."""
    state = e.state
    table = table_of(state, f, value)
    if e.counts[table >> U9] != np.uint32(0):
        return False
    store(e, slot, level, state[f + F_EMPTY])
    count_entry(e, slot, ALL)
    release(e, table)
    e.request[E_CHANGED] += U1
    # mm/mmu_gather.h:pte_free_tlb() notes one page, and the level above as the stride.
    first = max(address & ~(size_of(level) - U1), start)
    if breaks(state, f):
        flush(e, f, first, first + size_of(U1), U1)
    elif is_process(state, f):
        owe_flush(e, first, first + size_of(U1), min(level, U3))
    else:
        owe_flush(e, first, first + size_of(U1), U1)
    return True


@outlined
def free_tables(e, f, start, end, covered):
    """Free the tables of [start, end) that have become empty, from the last level up; the root stays.

    mm/memory.c:free_pgd_range(), arch/arm64/kvm/hyp/pgtable.c:stage2_unmap_walker(). `covered`: last-level tables
    that the range covers whole and no others, mm/pt_reclaim.c:try_to_free_pte().
    """
    state = e.state
    address = start
    while address < end:
        slot, level, value = find(e, f, address, U2)
        size = size_of(level)
        following = (address | (size - U1)) + U1
        whole = address & (size - U1) == U0 and following <= end
        if level == U2 and is_present(state, f, value) and not is_leaf(state, f, level, value):
            if whole or not covered:
                unlink_if_empty(e, f, slot, level, value, address, start)
        if not covered:
            free_above(e, f, address, following, end, level + U1, start)
        address = following


@kernel
def free_above(e, f, address, following, end, level, start):
    """Free the empty tables above `address` that the range has no more of behind `following`; `level`: of the entry."""
    while level <= e.state[f + F_LEVELS] and (following >= end or following & (size_of(level) - U1) == U0):
        slot, at, value = find(e, f, address, level)
        if at != level or not unlink_if_empty(e, f, slot, level, value, address, start):
            return
        level += U1


@outlined
def unmap_tail(e, f, address, end):
    """What follows the clearing of a range: tables, by the request's policy."""
    flags = e.request[E_FLAGS]
    if flags & (EDIT_FREE | EDIT_FREE_COVERED) != U0:
        changed = e.request[E_CHANGED]
        free_tables(e, f, address, end, flags & EDIT_FREE_COVERED != U0)
        e.request[E_CHANGED] = changed


# --------------------------------------------------------------------------- one entry


@outlined
def store_raw(e, f, address, level, new):
    """Store any value in the entry of `level` over `address`: status and what was there.

    -ENOENT without such an entry, -EBUSY over a table, -EINVAL for a table entry and for a change that the
    architecture forbids without an invalid entry and a flush in between.
    """
    state = e.state
    slot, at, old = find(e, f, address, level)
    if at != level:
        return NO_ENTRY, old
    was = is_present(state, f, old)
    present = is_present(state, f, new)
    linked = was and not is_leaf(state, f, level, old)
    if present and not is_leaf(state, f, level, new):
        return INVALID, old
    if breaks(state, f) and was and present and (linked or (old ^ new) & state[f + F_BREAK_BITS] != U0):
        return INVALID, old
    if linked:
        return BUSY, old
    store(e, slot, level, new)
    if present and not was:
        count_entry(e, slot, U1)
    elif was and not present:
        count_entry(e, slot, ALL)
    if present:
        e.request[E_WRITTEN] += U1
    elif was:
        e.request[E_CLEARED] += U1
    if was and needs_flush(state, f, old, new):
        base = address & ~(size_of(level) - U1)
        owe_flush(e, base, base + size_of(level), level)
    return DONE, old


# --------------------------------------------------------------------------- the usual case, fast


@kernel
def prepare(state, f, request):
    """Check once what the leaves of a batch have in common."""
    level = request[E_LEVEL]
    request[E_QUICK] = U0
    if request[E_OP] == MAP and request[E_FLAGS] & EDIT_EXACT != U0 and request[E_SET] & state[f + F_ADDRESS] == U0:
        bits = leaf_attributes(state, f, level, request[E_SET])
        if well_formed(state, f, level, bits):
            request[E_QUICK] = bits
            usable = state[f + F_ADDRESS] & ~state[f + F_RESERVED_LEAF + U1]
            request[E_QUICK_PHYSICAL] = usable & ~(size_of(level) - U1)


@kernel
def quick_map(e, f, address, physical):
    """Map one leaf where the tables are there and the entry is empty: whether that was so."""
    request = e.request
    if physical & ~request[E_QUICK_PHYSICAL] != U0 or address & (request[E_LENGTH] - U1) != U0:
        return False
    slot, level, value = descend(e, f, address, request[E_LEVEL], False)
    if level != request[E_LEVEL] or is_present(e.state, f, value) or is_frozen(e.state, f, value):
        return False
    e.ram[slot] = physical | request[E_QUICK]
    count_entry(e, slot, U1)
    request[E_WRITTEN] += U1
    return True


@kernel
def quick_unmap(e, f, address):
    """Clear one 4K leaf that is not the last one of its table: whether that was so."""
    slot, level, value = descend(e, f, address, U1, False)
    if level != U1 or not is_present(e.state, f, value) or e.counts[slot >> U9] == np.uint32(1):
        return False
    unmap_leaf(e, f, slot, U1, address)
    return True


@kernel
def look_ahead(e, f, given):
    """Ask for the cache line of the last-level entry over an address that comes later in a batch."""
    address = given & ((U1 << e.state[f + F_INPUT_BITS]) - U1)
    _, level, value = descend(e, f, address, U2, False)
    if level == U2 and is_present(e.state, f, value) and not is_leaf(e.state, f, level, value):
        prefetch(e.ram, table_of(e.state, f, value) + (address >> U12 & U511))


# --------------------------------------------------------------------------- roots


@outlined
def create(e, f):
    """Make an empty root, its address into the request: 0 or -ENOMEM."""
    tables = U1 << (e.state[f + F_ROOT_BITS] - U9)
    frame = take_frame(e) if tables == U1 else take_run(e, tables)
    if frame == NONE:
        return NO_MEMORY
    value = e.state[f + F_EMPTY]
    for i in range(tables):
        fill_frame(e.ram, frame + i, value)
        if logged(e):
            record(e, FILL, U0, (frame + i) << U12, value)
        e.counts[frame + i] = np.uint32(0)
    charge(e, TABLE_PAGE_ALLOCATED, np.int64(tables))
    e.request[E_ROOT] = frame << U12
    return DONE


@outlined
def destroy(e, f):
    """Free a whole tree. A process's is flushed once (exit_mmap()); a VM's is not, its CPUs are gone."""
    frame = e.request[E_ROOT] >> U12
    tables = U1 << (e.state[f + F_ROOT_BITS] - U9)
    for i in range(tables):
        tear_down(e, f, (frame + i) << U9, e.state[f + F_LEVELS], False)
    if is_process(e.state, f):
        flush(e, f, U0, U1 << e.state[f + F_INPUT_BITS], U1)
        e.request[E_FREED] = U1
    give_back(e)
    for i in range(tables):
        e.counts[frame + i] = np.uint32(0)
        if logged(e):
            record(e, FREE, U0, (frame + i) << U12, U0)
    if tables == U1:
        put_frame(e, frame)
    else:
        put_run(e, frame, tables)
    charge(e, TABLE_PAGE_FREED, np.int64(tables))


# --------------------------------------------------------------------------- dispatch


@kernel
def check_range(state, f, address, length):
    """0; -EINVAL for what is not whole pages, -ERANGE beyond the input addresses or across the canonical hole."""
    if (address | length) & U4095 != U0 or length == U0:
        return INVALID
    last = address + length - U1
    bits = state[f + F_INPUT_BITS]
    if last < address:
        return OUT_OF_RANGE
    if state[f + F_SIGN_EXTENDED] != U0:
        high = ALL << (bits - U1)
        if address & high != last & high or (address & high != U0 and address & high != high):
            return OUT_OF_RANGE
    elif last >> bits != U0:
        return OUT_OF_RANGE
    return DONE


@kernel
def check_bits(state, f, request):
    """0, or -EINVAL for bits of a protect that are not for it: the address, the type, or no presence left."""
    fixed = state[f + F_ADDRESS] | state[f + F_PAGE_MASK] | state[f + F_LEAF_MASK] & ~state[f + F_PAT_PAGE]
    present = state[f + F_PRESENT]
    if (request[E_SET] | request[E_CLEAR]) & fixed != U0:
        return INVALID
    if request[E_CLEAR] & ~request[E_SET] & present == present:
        return INVALID
    return DONE


@kernel
def check_request(state, f, request):
    """What does not depend on the address: 0, -EINVAL, -EOPNOTSUPP."""
    op = request[E_OP]
    level = request[E_LEVEL]
    largest = state[f + F_LARGEST_LEAF]
    if op == MAP and (level == U0 or level > largest):
        return INVALID
    if op == SPLIT and (level == U0 or level >= largest):
        return INVALID
    if op == COLLAPSE and (level < U2 or level > largest):
        return INVALID
    if op == STORE and (level == U0 or level > state[f + F_LEVELS]):
        return INVALID
    if op == PROTECT:
        return check_bits(state, f, request)
    if (op == CLEAR_ACCESSED and state[f + F_ACCESSED] == U0) or (op == CLEAR_DIRTY and state[f + F_DIRTY] == U0):
        return NOT_SUPPORTED
    return DONE


@kernel
def edit_one(e, f, op, given, physical):
    """One edit at one address: status, and what is told beside it."""
    state = e.state
    request = e.request
    length = request[E_LENGTH]
    status = check_range(state, f, given, length)
    if status != DONE:
        return status, U0
    address = given & ((U1 << state[f + F_INPUT_BITS]) - U1)
    end = address + length
    if not logged(e):
        if request[E_QUICK] != U0 and quick_map(e, f, address, physical):
            return DONE, U1
        if op == UNMAP and length == size_of(U1) and quick_unmap(e, f, address):
            return DONE, U1
    request[E_FOUND] = U0
    request[E_CHANGED] = U0
    request[E_OFFSET] = address
    if op == MAP:
        status = map_one(e, f, address, physical)
    elif op == COLLAPSE:
        status = INVALID if address & (length - U1) != U0 else collapse(e, f, address, request[E_LEVEL])
    elif op == STORE:
        return store_raw(e, f, address, request[E_LEVEL], request[E_SET])
    elif op == FREE_TABLES:
        free_tables(e, f, address, end, request[E_FLAGS] & EDIT_FREE_COVERED != U0)
    else:
        status = edit_range(e, f, op, address, end)
        if op == UNMAP:
            unmap_tail(e, f, address, request[E_OFFSET] if status != DONE else end)
        if status == DONE and request[E_FOUND] == U0:
            return NO_ENTRY, U0
    if status != DONE:
        return status, request[E_OFFSET] - address
    return status, request[E_CHANGED]


@kernel
def finish(e, f):
    """The flush that is owed, the frames of freed tables, and the price of the leaves."""
    flush_pending(e, f)
    give_back(e)
    request = e.request
    if is_process(e.state, f):
        charge(e, LEAF_WRITTEN, np.int64(request[E_WRITTEN]))
        charge(e, LEAF_CLEARED, np.int64(request[E_CLEARED]))
    else:
        charge(e, SPTE_WRITTEN, np.int64(request[E_WRITTEN]))
        charge(e, SPTE_CLEARED, np.int64(request[E_CLEARED]))


@entry
def edit(descriptor, request, addresses, physical, status, detail, log):
    """Do the edit that `request` (uint64[layout.E_WORDS]) tells at each of `addresses`, in order; one flush at the end.

    addresses uint64[n], bytes; physical uint64[n] or [1]; status int64[n]: 0 or -errno. detail uint64[n]: how many
    leaves or tables changed, the old entry (store), or, after a failure, the offset of the first byte not done.
    log: uint64, layout.LOG_WORDS a record, or empty. Charged to counter row 0, which no operation of a trace has.
    """
    m = open_machine(descriptor)
    e = Tree(m.ram, m.state, m.stats, m.counts, request, log)
    state = m.state
    f = format_row(state, request[E_FORMAT])
    op = request[E_OP]
    row = state[R_COUNTER_ROW]
    state[R_COUNTER_ROW] = STATS_COUNTERS
    failure = check_request(state, f, request)
    if failure == DONE:
        prepare(state, f, request)
    several = physical.size > 1
    count = U(addresses.size)
    looks_ahead = not logged(e) and (op == UNMAP or request[E_QUICK] != U0)
    for i in range(count):
        later = i + AHEAD
        # Neighbours are in the same line, or the processor has seen to them.
        if looks_ahead and later < count and addresses[later] - addresses[later - U1] != size_of(U1):
            look_ahead(e, f, addresses[later])
        if failure != DONE:
            status[i] = failure
            detail[i] = U0
        elif op == CREATE:
            status[i] = create(e, f)
        elif op == DESTROY:
            destroy(e, f)
            status[i] = DONE
        else:
            status[i], detail[i] = edit_one(e, f, op, addresses[i], physical[i if several else U0])
    finish(e, f)
    state[R_COUNTER_ROW] = row
