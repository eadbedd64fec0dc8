"""Two-dimensional walks: a guest's x86-64 tables, which lie in guest memory, through stage-2 tables.

As in `translate`, what passes at one look is walked in blocks: each step is done for all walks of a block, and the
lines of the next step are asked for meanwhile, so that their misses overlap. What does not pass is walked exactly,
in its turn.

Stage 2 sets its accessed and dirty bits whenever one of its own translations succeeds; the guest's are set if the
whole walk does (which of them a failed walk leaves set is up to the processor).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pgemu_kernels.engine.bits import ALL, NONE, U0, U1, U2, U3, U9, U12, U48, U64, U511, U4095, prefetch
from pgemu_kernels.engine.compile import entry, kernel, outlined
from pgemu_kernels.engine.geometry import shift_of, size_of
from pgemu_kernels.engine.handle import open_machine
from pgemu_kernels.tables.exact_walk import (
    fault_code,
    judge,
    list_reads,
    new_value,
    output_address,
    record,
    refused,
    slot_of,
    translates,
    update,
    walk,
)
from pgemu_kernels.tables.translate import (
    LARGE_LEAF,
    LOOK,
    can_pass,
    directory,
    find_below,
    leaf_level,
    list_passed,
    load_masks,
    open_tree,
    passes_leaf,
    passes_table,
    row_of,
)
from pgemu_kernels.words.enum_words import (
    STAGE_FINAL,
    STAGE_GUEST,
    STAGE_NONE,
    STAGE_TABLE,
    WALK_OK,
    WALK_OUTSIDE_MEMORY,
)
from pgemu_kernels.words.table_words import (
    ACCESS_ROWS,
    F_ADDRESS,
    F_LEVELS,
    NESTED_READS,
    NESTED_WRITES,
    W_COUNT,
    W_ENTRY,
    W_ERROR,
    W_LEVEL,
    W_PHYSICAL,
    W_RIGHTS,
    W_SLOT,
    W_STATUS,
    W_WORDS,
    X_NEED,
    X_ROW_TABLE_READ,
    X_ROW_TABLE_WRITE,
    X_USER,
    X_WORDS,
)

U = np.uint64
_X_WORDS = U(X_WORDS)
_STAGE2_ROWS = U(ACCESS_ROWS * X_WORDS)  # the rows of stage 2 follow those of the guest
_TABLE_READ = _STAGE2_ROWS + X_ROW_TABLE_READ * _X_WORDS
_TABLE_WRITE = _STAGE2_ROWS + X_ROW_TABLE_WRITE * _X_WORDS
_READS = U(NESTED_READS)
_WRITES = U(NESTED_WRITES)
_MARK = U(61)  # from this bit on, an address that the guest's tables gave carries the level of their leaf

# The scratch array: records of the guest's walk and of stage 2, guest physical addresses of the guest's entries,
# and for each walk of a block where it stands.
_S2 = U(W_WORDS)
_ENTRY_GPA = _S2 + U(W_WORDS)
_GPA = _ENTRY_GPA + U(8)
_FOUND = _GPA + U64
_COUNT = _FOUND + U64


class Job(NamedTuple):
    """What the walks of a batch have in common."""

    guest: Any  # Tree of the guest; its root is a guest physical address
    stage2: Any  # Tree
    kinds: Any  # uint8[n] or uint8[1]
    access: Any  # uint64: access rows of the guest, then of stage 2


class NestedOutputs(NamedTuple):
    """Where the results of a batch go; levels: 0 where a stage was not reached."""

    physical: np.ndarray[Any, Any]  # uint64[n]
    status: np.ndarray[Any, Any]  # uint8[n]: words.WalkStatus
    stage: np.ndarray[Any, Any]  # uint8[n]: words.WalkStage
    levels: np.ndarray[Any, Any]  # uint8[n * 2]: of the guest, of stage 2
    error: np.ndarray[Any, Any]  # uint64[n]
    fault: np.ndarray[Any, Any]  # uint64[n]: address that the failing stage was asked for
    reads: np.ndarray[Any, Any]  # uint64[n * 35], or of no elements
    writes: np.ndarray[Any, Any]  # uint64[n * 60]
    counts: np.ndarray[Any, Any]  # uint64[n * 2]: reads, writes


# --------------------------------------------------------------------------- one walk, exactly


@kernel
def finish_walk(out, i, stage, status, physical, error, fault, guest_level, host_level):
    out.physical[i] = physical
    out.status[i] = np.uint8(status)
    out.stage[i] = np.uint8(stage)
    out.levels[i + i] = np.uint8(guest_level)
    out.levels[i + i + U1] = np.uint8(host_level)
    out.error[i] = error
    out.fault[i] = fault


@kernel
def count_references(out, i, count, written):
    out.counts[i + i] = count
    out.counts[i + i + U1] = written


@kernel
def fail_stage2(out, i, w, stage, gpa, guest_level):
    """Stage 2 refused a guest physical address; its record says why."""
    finish_walk(out, i, stage, w[_S2 + W_STATUS], U0, w[_S2 + W_ERROR], gpa, guest_level, w[_S2 + W_LEVEL])


@outlined
def walk_guest(m, job, x, address, i, out, w, count, written):
    """The guest's tables, each entry through stage 2: (stage that failed or NONE, references, entries written)."""
    state = m.state
    f = job.guest.f
    level = state[f + F_LEVELS]
    rights = ALL
    done = U0
    leaf = denied = False
    status = WALK_OK if translates(state, f, address) else refused(state, f)
    table = job.guest.root
    value = U0
    while status == WALK_OK and not leaf:
        gpa = table + ((address >> shift_of(level) & U511) << U3)
        outcome = walk(m, job.stage2.f, job.access, _TABLE_READ, job.stage2.root, gpa, w, _S2)
        count = list_reads(w, _S2, out.reads, i * _READS, count, U2)
        host = w[_S2 + W_PHYSICAL]
        slot = slot_of(m, host)
        if outcome == WALK_OK and slot == NONE:
            record(w, _S2, WALK_OUTSIDE_MEMORY, w[_S2 + W_LEVEL], U0, w[_S2 + W_COUNT])
            outcome = WALK_OUTSIDE_MEMORY
        if outcome != WALK_OK:
            fail_stage2(out, i, w, STAGE_TABLE, gpa, level)
            return STAGE_TABLE, count, written
        written = update(m, job.access, _TABLE_READ, w, _S2, out.writes, i * _WRITES, written, U2)
        value = m.ram[slot]
        w[W_SLOT + done] = slot
        w[W_ENTRY + done] = host
        w[_ENTRY_GPA + done] = gpa
        done += U1
        if U(out.reads.size) != U0:
            out.reads[i * _READS + count] = host | U1
        count += U1
        status, leaf, rights, denied = judge(state, f, job.access, x, value, level, rights)
        if status == WALK_OK and not leaf:
            table = value & state[f + F_ADDRESS]
            level -= U1
    record(w, U0, status, level, rights, done)
    if status != WALK_OK:
        error = fault_code(state, f, job.access, x, status, level, rights, denied)
        finish_walk(out, i, STAGE_GUEST, status, U0, error, address, level, U0)
        return STAGE_GUEST, count, written
    w[W_PHYSICAL] = output_address(state, f, value, level, address)
    return STAGE_NONE, count, written


@kernel
def changes(m, job, x, w, n):
    """Whether the hardware sets a bit in the n-th entry of the guest's walk."""
    value = m.ram[w[W_SLOT + n]]
    return new_value(job.access, x, value, n == w[W_COUNT] - U1) != value


@outlined
def check_guest_updates(m, job, x, i, out, w):
    """Whether stage 2 lets the hardware write the guest's entries, where reading them did not ask for that."""
    if job.access[_TABLE_READ + X_NEED] == job.access[_TABLE_WRITE + X_NEED]:
        return True
    for n in range(w[W_COUNT]):
        if changes(m, job, x, w, n):
            gpa = w[_ENTRY_GPA + n]
            if walk(m, job.stage2.f, job.access, _TABLE_WRITE, job.stage2.root, gpa, w, _S2) != WALK_OK:
                level = job.guest.levels - n
                fail_stage2(out, i, w, STAGE_TABLE, gpa, level)
                return False
    return True


@outlined
def update_guest(m, job, x, i, out, w, written):
    """Set accessed and dirty bits in the guest's entries, and in stage 2 for these writes: entries written by now."""
    twice = job.access[_TABLE_READ + X_NEED] != job.access[_TABLE_WRITE + X_NEED]
    for n in range(w[W_COUNT]):
        if twice and changes(m, job, x, w, n):
            walk(m, job.stage2.f, job.access, _TABLE_WRITE, job.stage2.root, w[_ENTRY_GPA + n], w, _S2)
            written = update(m, job.access, _TABLE_WRITE, w, _S2, out.writes, i * _WRITES, written, U2)
    return update(m, job.access, x, w, U0, out.writes, i * _WRITES, written, U1)


@outlined
def walk_nested(m, job, i, address, out, w):
    """Walk one address exactly, with its updates and its references."""
    row = row_of(job.kinds, i)
    stage, count, written = walk_guest(m, job, row, address, i, out, w, U0, U0)
    if stage == STAGE_NONE and check_guest_updates(m, job, row, i, out, w):
        gpa = w[W_PHYSICAL]
        level = w[W_LEVEL]
        user = w[W_RIGHTS] & job.access[row + X_USER] != U0
        kind = row % (U3 * _X_WORDS)
        final = _STAGE2_ROWS + kind + (U3 * _X_WORDS if user else U0)
        status = walk(m, job.stage2.f, job.access, final, job.stage2.root, gpa, w, _S2)
        count = list_reads(w, _S2, out.reads, i * _READS, count, U2)
        if status != WALK_OK:
            fail_stage2(out, i, w, STAGE_FINAL, gpa, level)
        else:
            finish_walk(out, i, STAGE_NONE, WALK_OK, w[_S2 + W_PHYSICAL], U0, U0, level, w[_S2 + W_LEVEL])
            written = update(m, job.access, final, w, _S2, out.writes, i * _WRITES, written, U2)
            written = update_guest(m, job, row, i, out, w, written)
    count_references(out, i, count, written)


# --------------------------------------------------------------------------- blocks of walks that pass


@kernel
def host_of(m, access, x, tree, found, gpa):
    """Where the stage-2 entry at `found` maps a guest physical address to; NONE if it does not pass."""
    if found & LARGE_LEAF == U0:
        value = m.ram[found]
        return value & tree.address_bits | gpa & U4095 if passes_leaf(access, x, U1, value) else NONE
    if found == LOOK:
        return NONE
    inside = (U1 << (U12 + U9 * (leaf_level(found) - U1))) - U1
    return m.ram[found & ~LARGE_LEAF] & tree.address_bits & ~inside | gpa & inside


@kernel
def ask_stage2(m, job, w, count, final, first):
    """For all walks: down stage 2 to its last entry, whose line is asked for.

    Of the addresses of the guest's entries, or (`final`) of those that the guest's tables gave.
    """
    ram = m.ram
    tree = job.stage2
    last = NONE
    table = U0
    x = _STAGE2_ROWS + row_of(job.kinds, first) if final else _TABLE_READ
    masks = load_masks(job.access, x)
    for k in range(count):
        gpa = w[_GPA + k]
        if (gpa & LARGE_LEAF != U0) != final or gpa == LOOK:
            continue
        gpa &= ~LARGE_LEAF
        if final and U(job.kinds.size) > U1:
            x = _STAGE2_ROWS + row_of(job.kinds, first + k)
            masks = load_masks(job.access, x)
        region = gpa >> tree.region_shift | x << U48
        if region != last:
            table = directory(ram, job.access, x, tree, gpa)
            last = region
        found = find_below(ram, job.access, x, masks, tree.address_bits, table, gpa)
        w[_FOUND + k] = found
        prefetch(ram, found)


@kernel
def ask_entries(m, job, w, count):
    """For all walks: the guest's entry in the host's memory, whose line is asked for."""
    for k in range(count):
        gpa = w[_GPA + k]
        if gpa & LARGE_LEAF != U0:
            continue
        found = w[_FOUND + k]
        host = host_of(m, job.access, _TABLE_READ, job.stage2, found, gpa)
        slot = slot_of(m, host)
        if host == NONE or slot == NONE:
            w[_GPA + k] = LOOK
            continue
        w[_FOUND + k] = slot
        w[_COUNT + k] += U2 + job.stage2.levels - leaf_level(found)
        prefetch(m.ram, slot)


@kernel
def read_entries(m, job, w, addresses, first, count, level):
    """For all walks: read the guest's entry of `level`; where it leads to is the next address for stage 2."""
    for k in range(count):
        if w[_GPA + k] & LARGE_LEAF != U0:
            continue
        x = row_of(job.kinds, first + k)
        value = m.ram[w[_FOUND + k]]
        address = addresses[first + k]
        at = value & job.guest.address_bits
        if level > U1 and passes_table(job.access, x, level, value):
            w[_GPA + k] = at + ((address >> (U9 * level - U9 - U9 + U12) & U511) << U3)
        elif level <= U3 and passes_leaf(job.access, x, level, value):
            inside = size_of(level) - U1
            w[_GPA + k] = at & ~inside | address & inside | level << _MARK
        else:
            w[_GPA + k] = LOOK


@kernel
def begin_block(job, w, addresses, first, count):
    """Every walk stands at its entry in the guest's top table."""
    guest = job.guest
    for k in range(count):
        address = addresses[first + k]
        gpa = guest.root + ((address >> guest.shift & U511) << U3)
        w[_GPA + k] = gpa if (address + guest.half) >> guest.bits == U0 else LOOK
        w[_COUNT + k] = U0


@outlined
def list_nested(m, job, i, address, guest_level, host_level, out):
    """The list of references of a walk that passed."""
    guest = job.guest
    first = i * _READS
    count = U0
    level = guest.levels
    gpa = guest.root + ((address >> guest.shift & U511) << U3)
    masks = load_masks(job.access, _TABLE_READ)
    bits = job.stage2.address_bits
    while True:
        table = directory(m.ram, job.access, _TABLE_READ, job.stage2, gpa)
        found = find_below(m.ram, job.access, _TABLE_READ, masks, bits, table, gpa)
        count = list_passed(m.ram, job.stage2, gpa, leaf_level(found), out.reads, first, count, U2)
        host = host_of(m, job.access, _TABLE_READ, job.stage2, found, gpa)
        out.reads[first + count] = host | U1
        count += U1
        value = m.ram[slot_of(m, host)]
        if level == guest_level:
            break
        level -= U1
        gpa = (value & guest.address_bits) + ((address >> shift_of(level) & U511) << U3)
    gpa = output_address(m.state, guest.f, value, level, address)
    list_passed(m.ram, job.stage2, gpa, host_level, out.reads, first, count, U2)


@outlined
def walk_block(m, job, addresses, first, count, out, w):
    """At most 64 walks, step by step; those that do not pass are walked exactly, in their turn."""
    begin_block(job, w, addresses, first, count)
    level = job.guest.levels
    while level >= U1:
        ask_stage2(m, job, w, count, False, first)
        ask_entries(m, job, w, count)
        read_entries(m, job, w, addresses, first, count, level)
        level -= U1
    ask_stage2(m, job, w, count, True, first)
    for k in range(count):
        i = first + k
        gpa = w[_GPA + k]
        host = NONE
        found = LOOK
        if gpa != LOOK:
            x = _STAGE2_ROWS + row_of(job.kinds, i)
            found = w[_FOUND + k]
            host = host_of(m, job.access, x, job.stage2, found, gpa & ~LARGE_LEAF)
        if host == NONE:
            walk_nested(m, job, i, addresses[i], out, w)
        else:
            level = leaf_level(found)
            finish_walk(out, i, STAGE_NONE, WALK_OK, host, U0, U0, gpa >> _MARK, level)
            count_references(out, i, w[_COUNT + k] + U1 + job.stage2.levels - level, U0)
            if U(out.reads.size) != U0:
                list_nested(m, job, i, addresses[i], gpa >> _MARK, level, out)


@entry
def translate_nested(
    descriptor, guest_format, guest_root, stage2_format, stage2_root, addresses, kinds, access, physical, status, stage,
    levels, error, fault, reads, writes, counts, w, block
):  # fmt: skip
    """Translate `addresses` (uint64[n]) of a guest, in order.

    guest_root: guest physical address of the guest's top table. kinds: uint8[n] or uint8[1]. access: access rows
    of the guest, then of stage 2. The next nine arrays are NestedOutputs. w: uint64[NESTED_SCRATCH]. block: how
    many walks go step by step together, 1 to 64; 0 walks each exactly. Returns 0.
    """
    m = open_machine(descriptor)
    job = Job(open_tree(m, guest_format, guest_root), open_tree(m, stage2_format, stage2_root), kinds, access)
    out = NestedOutputs(physical, status, stage, levels, error, fault, reads, writes, counts)
    count = U(addresses.size)
    if block == U0 or not can_pass(m, job.stage2) or job.guest.levels < U3:
        for i in range(count):
            walk_nested(m, job, i, addresses[i], out, w)
        return np.int64(0)
    first = U0
    while first < count:
        together = min(count - first, block)
        walk_block(m, job, addresses, first, together, out, w)
        first += together
    return np.int64(0)
