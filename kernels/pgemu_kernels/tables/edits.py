"""Edits of one page table of any format: map, unmap, protect, clear accessed and dirty, split, collapse, store.

Each edit is charged, notes what must be flushed, and can write down every entry it reads and writes. What Linux does
differently for processes, KVM on x86 and KVM on Arm follows from the format's data: its flush rule (F_FLUSH), its
frozen value and F_BREAK_BEFORE_MAKE. Within a tree `counts` holds the present entries of each table by its frame.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels import words
from pgemu_kernels.engine.bits import ALL, NONE, U0, U1, U2, U9, U12, U4095, prefetch
from pgemu_kernels.engine.charge import charge
from pgemu_kernels.engine.compile import entry, kernel, outlined
from pgemu_kernels.engine.frames import fill_frame, put_frame, put_run, take_frame, take_run
from pgemu_kernels.engine.geometry import index_at, size_of
from pgemu_kernels.engine.handle import open_machine
from pgemu_kernels.tables.domain_map import FAULT, RULE_CLEAR_LARGE, domain_map, grow
from pgemu_kernels.tables.domain_unmap import domain_unmap
from pgemu_kernels.tables.edit_entries import (
    input_mask,
    is_frozen,
    is_leaf,
    is_process,
    is_sized,
    is_valid,
    leaf_attributes,
    well_formed,
)
from pgemu_kernels.tables.edit_map import collapse_table, map_one
from pgemu_kernels.tables.edit_range import edit_range, free_tables, store_raw, unmap_leaf, unmap_tail
from pgemu_kernels.tables.edit_tree import (
    Tree,
    count_entry,
    descend,
    flush,
    flush_pending,
    give_back,
    has_sized,
    log_record,
    logged,
    tear_down,
)
from pgemu_kernels.tables.walker import format_row, table_of
from pgemu_kernels.words.enum_words import (
    EDIT_OP_CLEAR_ACCESSED,
    EDIT_OP_CLEAR_DIRTY,
    EDIT_OP_COLLAPSE,
    EDIT_OP_CREATE,
    EDIT_OP_DESTROY,
    EDIT_OP_FREE_TABLES,
    EDIT_OP_MAP,
    EDIT_OP_PROTECT,
    EDIT_OP_SPLIT,
    EDIT_OP_STORE,
    EDIT_OP_UNMAP,
    EVENT_IOPTE_CLEARED,
    EVENT_IOPTE_WRITTEN,
    EVENT_LEAF_CLEARED,
    EVENT_LEAF_WRITTEN,
    EVENT_SPTE_CLEARED,
    EVENT_SPTE_WRITTEN,
    EVENT_TABLE_PAGE_ALLOCATED,
    EVENT_TABLE_PAGE_FREED,
    GAUGE_FRAMES_USED,
    LOG_FILL,
    LOG_FREE,
)
from pgemu_kernels.words.events import STATS_COUNTERS, STATS_GAUGES
from pgemu_kernels.words.registers import R_COUNTER_ROW, R_EDIT_FRAMES
from pgemu_kernels.words.table_words import (
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
    EDIT_FREE_COVERED,
    F_ACCESSED,
    F_ADDRESS,
    F_DIRTY,
    F_EMPTY,
    F_GATHER,
    F_INPUT_BITS,
    F_LARGEST_LEAF,
    F_LEAF_MASK,
    F_LEVELS,
    F_MAP_FLUSHES,
    F_MAP_RULE,
    F_PAGE_MASK,
    F_PAGE_SIZES,
    F_PAT_PAGE,
    F_PRESENT,
    F_RESERVED_LEAF,
    F_ROOT_BITS,
    F_SIGN_EXTENDED,
    F_TALLER,
    F_UNMAP_RULE,
)

U = np.uint64
AHEAD = U(8)  # how many addresses of a batch the memory is given to fetch an entry
DONE = np.int64(0)
NO_ENTRY = np.int64(-words.ENOENT)
NO_MEMORY = np.int64(-words.ENOMEM)
INVALID = np.int64(-words.EINVAL)
OUT_OF_RANGE = np.int64(-words.ERANGE)
NOT_SUPPORTED = np.int64(-words.EOPNOTSUPP)


# --------------------------------------------------------------------------- the usual case, fast


@kernel
def prepare_batch(state, f, request):
    """Check once what the leaves of a batch have in common."""
    level = request[E_LEVEL]
    request[E_QUICK] = U0
    sizes = state[f + F_PAGE_SIZES]
    if (
        request[E_OP] == EDIT_OP_MAP
        and request[E_FLAGS] & EDIT_EXACT != U0
        and request[E_SET] & state[f + F_ADDRESS] == U0
        and (sizes == U0 or sizes & size_of(level) != U0)
        and state[f + F_MAP_FLUSHES] == U0
    ):
        bits = leaf_attributes(state, f, level, request[E_SET])
        if well_formed(state, f, level, bits):
            request[E_QUICK] = bits
            usable = state[f + F_ADDRESS] & ~state[f + F_RESERVED_LEAF + U1]
            request[E_QUICK_PHYSICAL] = usable & ~(size_of(level) - U1)


@kernel
def quick_detail(state, f, request):
    """What is told of a 4K leaf that quick_unmap() clears: a leaf, or bytes; 0 where each unmap takes the long way."""
    if request[E_OP] != EDIT_OP_UNMAP or request[E_LENGTH] != size_of(U1) or state[f + F_GATHER] != U0:
        return U0
    return U1 if state[f + F_UNMAP_RULE] == U0 else size_of(U1)


@kernel
def quick_map(e, f, address, physical, sized):
    """Map one leaf where the tables are there and the entry is empty: whether that was so."""
    request = e.request
    if physical & ~request[E_QUICK_PHYSICAL] != U0 or address & (request[E_LENGTH] - U1) != U0:
        return False
    slot, level, value = descend(e, f, address, request[E_LEVEL], False, sized)
    if level != request[E_LEVEL] or is_valid(e.state, f, value) or is_frozen(e.state, f, value):
        return False
    e.ram[slot] = physical | request[E_QUICK]
    count_entry(e, slot, U1)
    request[E_WRITTEN] += U1
    return True


@kernel
def quick_unmap(e, f, address, sized):
    """Clear one 4K leaf that is not the last one of its table, nor a part of one: whether that was so."""
    slot, level, value = descend(e, f, address, U1, False, sized)
    if level != U1 or not is_valid(e.state, f, value) or e.counts[slot >> U9] == np.uint32(1):
        return False
    if sized and is_sized(e.state, f, value):
        return False
    unmap_leaf(e, f, slot, U1, address)
    return True


@kernel
def look_ahead(e, f, given, sized):
    """Ask for the cache line of the last-level entry over an address that comes later in a batch."""
    address = given & input_mask(e.state, f)
    _, level, value = descend(e, f, address, U2, False, sized)
    if level == U2 and is_valid(e.state, f, value) and not is_leaf(e.state, f, level, value):
        prefetch(e.ram, table_of(e.state, f, value) + index_at(address >> U12, U1))


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
            log_record(e, LOG_FILL, U0, (frame + i) << U12, value)
        e.counts[frame + i] = np.uint32(0)
    charge(e, EVENT_TABLE_PAGE_ALLOCATED, np.int64(tables))
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
        flush(e, f, U0, input_mask(e.state, f) + U1, U1)
        e.request[E_FREED] = U1
    give_back(e)
    for i in range(tables):
        e.counts[frame + i] = np.uint32(0)
        if logged(e):
            log_record(e, LOG_FREE, U0, (frame + i) << U12, U0)
    if tables == U1:
        put_frame(e, frame)
    else:
        put_run(e, frame, tables)
    charge(e, EVENT_TABLE_PAGE_FREED, np.int64(tables))


# --------------------------------------------------------------------------- dispatch


@kernel
def check_input(state, f, address, length):
    """0; -EINVAL for what is not whole pages, -ERANGE beyond the input addresses or across the canonical hole."""
    if (address | length) & U4095 != U0 or length == U0:
        return INVALID
    last = address + length - U1
    if last < address:
        return OUT_OF_RANGE
    if state[f + F_SIGN_EXTENDED] != U0:
        high = ALL << (state[f + F_INPUT_BITS] - U1)
        if address & high != last & high or (address & high != U0 and address & high != high):
            return OUT_OF_RANGE
    elif last & ~input_mask(state, f) != U0:
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
def edits_domain(op):
    """Whether drivers/iommu has such an edit of a domain's tables, or it is one of an entry as it is."""
    return (
        op == EDIT_OP_CREATE or op == EDIT_OP_DESTROY or op == EDIT_OP_MAP or op == EDIT_OP_UNMAP or op == EDIT_OP_STORE
    )


@kernel
def check_request(state, f, request):
    """What does not depend on the address: 0, -EINVAL, -EOPNOTSUPP."""
    op = request[E_OP]
    level = request[E_LEVEL]
    largest = state[f + F_LARGEST_LEAF]
    if op == EDIT_OP_MAP and (level == U0 or level > largest):
        return INVALID
    if op == EDIT_OP_SPLIT and (level == U0 or level >= largest):
        return INVALID
    if op == EDIT_OP_COLLAPSE and (level < U2 or level > largest):
        return INVALID
    if op == EDIT_OP_STORE and (level == U0 or level > state[f + F_LEVELS]):
        return INVALID
    if state[f + F_MAP_RULE] != U0 and not edits_domain(op):
        return NOT_SUPPORTED
    if op == EDIT_OP_PROTECT:
        return check_bits(state, f, request)
    if (op == EDIT_OP_CLEAR_ACCESSED and state[f + F_ACCESSED] == U0) or (
        op == EDIT_OP_CLEAR_DIRTY and state[f + F_DIRTY] == U0
    ):
        return NOT_SUPPORTED
    return DONE


@kernel
def refusal(state, f, op, status):
    """What an edit of a range returns that is refused: intel/iommu.c:intel_iommu_map() has -EFAULT for -ERANGE."""
    if status == OUT_OF_RANGE and op == EDIT_OP_MAP and state[f + F_MAP_RULE] == RULE_CLEAR_LARGE:
        return FAULT
    return status


@outlined
def edit_domain(e, f, op, address, physical):
    """Map or unmap in an IOMMU's domain: status, and leaves mapped, how far a map came, or bytes unmapped."""
    request = e.request
    length = request[E_LENGTH]
    if op == EDIT_OP_UNMAP:
        went = domain_unmap(e, f, address, length)
        return (INVALID, U0) if went == NONE else (DONE, went)
    if physical & U4095 != U0:
        return INVALID, U0
    if request[E_FLAGS] & EDIT_EXACT != U0 and (address | physical) & (length - U1) != U0:
        return INVALID, U0
    status = domain_map(e, f, address, physical, length)
    return status, request[E_CHANGED] if status == DONE else request[E_OFFSET] - address


@kernel
def edit_one(e, f, op, given, physical, sized, told):
    """One edit at one address: status, and what is told beside it. sized, told: has_sized(), quick_detail()."""
    state = e.state
    request = e.request
    length = request[E_LENGTH]
    status = check_input(state, f, given, length)
    if status != DONE:
        return refusal(state, f, op, status), U0
    address = given & input_mask(state, f)
    end = address + length
    if not logged(e):
        if request[E_QUICK] != U0 and quick_map(e, f, address, physical, sized):
            return DONE, U1
        if told != U0 and quick_unmap(e, f, address, sized):
            return DONE, told
    request[E_FOUND] = U0
    request[E_CHANGED] = U0
    request[E_OFFSET] = address
    if state[f + F_MAP_RULE] != U0 and op != EDIT_OP_STORE:
        return edit_domain(e, f, op, address, physical)
    if op == EDIT_OP_MAP:
        status = map_one(e, f, address, physical)
    elif op == EDIT_OP_COLLAPSE:
        status = INVALID if address & (length - U1) != U0 else collapse_table(e, f, address, request[E_LEVEL])
    elif op == EDIT_OP_STORE:
        return store_raw(e, f, address, request[E_LEVEL], request[E_SET])
    elif op == EDIT_OP_FREE_TABLES:
        free_tables(e, f, address, end, request[E_FLAGS] & EDIT_FREE_COVERED != U0)
    else:
        status = edit_range(e, f, op, address, end)
        if op == EDIT_OP_UNMAP:
            unmap_tail(e, f, address, request[E_OFFSET] if status != DONE else end)
        if status == DONE and request[E_FOUND] == U0:
            return NO_ENTRY, U0
    if status != DONE:
        return status, request[E_OFFSET] - address
    return status, request[E_CHANGED]


@kernel
def taller_row(e, f, address):
    """Where the format begins of a domain that was made to take a map at an address; where it cannot, as it was.

    The map then says what is wrong.
    """
    last = address + e.request[E_LENGTH] - U1
    if last & ~input_mask(e.state, f) == U0 or check_input(e.state, f, address, e.request[E_LENGTH]) == INVALID:
        return f
    if last < address or grow(e, last) != DONE:
        return f
    return format_row(e.state, e.request[E_FORMAT])


@kernel
def finish_edit(e, f):
    """The flush that is owed, the frames of freed tables, and the price of the leaves."""
    flush_pending(e, f)
    give_back(e)
    request = e.request
    if is_process(e.state, f):
        charge(e, EVENT_LEAF_WRITTEN, np.int64(request[E_WRITTEN]))
        charge(e, EVENT_LEAF_CLEARED, np.int64(request[E_CLEARED]))
    elif e.state[f + F_MAP_RULE] != U0:
        charge(e, EVENT_IOPTE_WRITTEN, np.int64(request[E_WRITTEN]))
        charge(e, EVENT_IOPTE_CLEARED, np.int64(request[E_CLEARED]))
    else:
        charge(e, EVENT_SPTE_WRITTEN, np.int64(request[E_WRITTEN]))
        charge(e, EVENT_SPTE_CLEARED, np.int64(request[E_CLEARED]))


@entry
def edit(descriptor, request, addresses, physical, status, detail, log):
    """Do the edit that `request` (uint64[words.E_WORDS]) tells at each of `addresses`, in order; one flush at the end.

    addresses uint64[n], bytes; physical uint64[n] or [1]; status int64[n]: 0 or -errno. detail uint64[n]: how many
    leaves or tables changed, the old entry (store), or, after a failure, the offset of the first byte not done.
    log: uint64, words.LOG_WORDS a record, or empty. Charged to counter row 0, which no operation of a trace has.
    Returns 0.
    """
    m = open_machine(descriptor)
    e = Tree(m.ram, m.state, m.stats, m.counts, request, log)
    state = m.state
    f = format_row(state, request[E_FORMAT])
    op = request[E_OP]
    row = state[R_COUNTER_ROW]
    used = m.stats[STATS_GAUGES + GAUGE_FRAMES_USED * U2]
    state[R_COUNTER_ROW] = STATS_COUNTERS
    failure = check_request(state, f, request)
    if failure == DONE:
        prepare_batch(state, f, request)
    several = physical.size > 1
    sized = has_sized(state, f)
    told = quick_detail(state, f, request)
    grows = op == EDIT_OP_MAP and state[f + F_TALLER] != U0
    count = U(addresses.size)
    looks_ahead = not logged(e) and (op == EDIT_OP_UNMAP or request[E_QUICK] != U0)
    for i in range(count):
        later = i + AHEAD
        # Neighbours are in the same line, or the processor has seen to them.
        if looks_ahead and later < count and addresses[later] - addresses[later - U1] != size_of(U1):
            look_ahead(e, f, addresses[later], sized)
        if failure != DONE:
            status[i] = failure
            detail[i] = U0
        elif op == EDIT_OP_CREATE:
            status[i] = create(e, f)
        elif op == EDIT_OP_DESTROY:
            destroy(e, f)
            status[i] = DONE
        else:
            if grows:
                f = taller_row(e, f, addresses[i])
            status[i], detail[i] = edit_one(e, f, op, addresses[i], physical[i if several else U0], sized, told)
    finish_edit(e, f)
    state[R_EDIT_FRAMES] += U(m.stats[STATS_GAUGES + GAUGE_FRAMES_USED * U2] - used)
    state[R_COUNTER_ROW] = row
    return np.int64(0)
