"""What C calls: pgemu.h's table of functions, each a door to entries that stand elsewhere.

Arguments are numbers and addresses, uint64, as numba's wrapper for C's calling convention takes them. What Python
checks before it calls an entry is checked here: a number that cannot be ends in BAD_*, whatever it is. What takes long
to compile is called by its address, and loaded when it is needed first (words/call_words.py).
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.addresses import bytes_at, call_c, descriptor_at, signed_words_at, words_at
from pgemu_kernels.engine.bits import LOW8, LOW16, LOW32, U0, U1, U2, U3, U4, U5, U6, U7, U8, U9, U16, U32, U48
from pgemu_kernels.engine.compile import c_function, kernel, outlined
from pgemu_kernels.engine.handle import C_CONTEXT, open_machine
from pgemu_kernels.engine.numba_internals import call_address
from pgemu_kernels.engine.records import Columns
from pgemu_kernels.run.loops import LOOP_SHIFT
from pgemu_kernels.tables.translate import Outputs, open_tree, translate_single
from pgemu_kernels.words.call_words import (
    BAD_ARGUMENT,
    BAD_MACHINE,
    BAD_POINTER,
    CALL_LOAD,
    CALL_LOOP,
    CALL_LOOPS,
    CALL_NESTED,
    CALL_OPERATE,
    CALL_TRANSLATE,
    CALL_WORDS,
    CONTEXT_CALLS,
    CONTEXT_DETAIL,
    CONTEXT_HEADER,
    CONTEXT_KIND,
    CONTEXT_MACHINE,
    CONTEXT_MMU_COUNT,
    CONTEXT_MMUS,
    CONTEXT_OPERATION,
    CONTEXT_STATUS,
    CONTEXT_WALK,
    CONTEXT_WORDS,
    CONTEXT_ZERO,
    MMU_FORMAT,
    MMU_KINDS,
    MMU_ROWS,
    MMU_STAGE2,
    MMU_WORDS,
    NO_CODE,
    NO_STAGE2,
)
from pgemu_kernels.words.enum_words import (
    OP_CONVERT,
    OP_DMA_ACCESS,
    OP_DMA_MAP,
    OP_DMA_UNMAP,
    OP_GUEST_FAULT,
    OP_HOST_FAULT,
    OP_MUNMAP,
    OP_PIN,
    OP_PUNCH_HOLE,
    OP_UNPIN,
    OP_ZAP,
)
from pgemu_kernels.words.events import EVENTS, GAUGES, STATS_COUNTERS, STATS_GAUGES
from pgemu_kernels.words.operations import ENTRY_SHIFT, OPERATIONS, Entry
from pgemu_kernels.words.registers import R_FULL, R_SPINS
from pgemu_kernels.words.requests import BATCH_MODE
from pgemu_kernels.words.rows import ACTORS
from pgemu_kernels.words.table_words import (
    ACCESS_ROWS,
    NESTED_READS,
    NESTED_SCRATCH,
    NESTED_WRITES,
    WALK_BLOCK,
    WALK_READS,
    WALK_SCRATCH,
    X_WORDS,
)

U = np.uint64
_CALL_WORDS = U(CALL_WORDS)
_CONTEXT_WORDS = U(CONTEXT_WORDS)
_MMU_WORDS = U(MMU_WORDS)
_X_WORDS = U(X_WORDS)
_ROWS = U((ACCESS_ROWS + 1) * X_WORDS)  # of one stage, and of a plain walk
_NESTED_ROWS = U(2 * ACCESS_ROWS * X_WORDS)
_READS, _NESTED_READS, _NESTED_WRITES = U(WALK_READS), U(NESTED_READS), U(NESTED_WRITES)
_MOST = U(40)  # no array has as many elements as have this bit
_FAST, _FULL, _ORDINARY, _POOLING, _DEVICES = (
    U(one) for one in (Entry.FAST, Entry.FULL, Entry.ORDINARY, Entry.POOLING, Entry.DEVICES)
)
_ENTRY_SHIFT = U(ENTRY_SHIFT)
_INDEX = (U1 << _ENTRY_SHIFT) - U1
_LOOP_INDEX = (U1 << LOOP_SHIFT) - U1
_FIELDS = U(9)  # of struct pgemu_operation
_EVENTS, _GAUGES, _ACTORS = U(EVENTS), U(GAUGES), U(ACTORS)


# --------------------------------------------------------------------------- arguments


@kernel
def context_of(machine):
    """Address of a machine's context, 0 where it is none that pgemu.capi gave."""
    if machine == U0 or machine & U7 != U0:
        return U0
    context = U(descriptor_at(machine)[C_CONTEXT])
    if context == U0 or words_at(context, _CONTEXT_WORDS)[CONTEXT_MACHINE] != machine:
        return U0
    return context


@kernel
def is_array(address):
    """Whether words can lie at an address."""
    return address != U0 and address & U7 == U0


@kernel
def is_root(root):
    """Whether a table can lie there: pgemu.tables.translation._checked_root()."""
    return root >> U(52) == U0 and root & U(4095) == U0


@kernel
def mmu_row(c, mmu, nested):
    """Address of an MMU's row, 0 of a number that none has, or one of the other sort."""
    if mmu >= c[CONTEXT_MMU_COUNT]:
        return U0
    row = c[CONTEXT_MMUS] + (mmu * _MMU_WORDS << U3)
    return row if (words_at(row, _MMU_WORDS)[MMU_STAGE2] != NO_STAGE2) == nested else U0


@kernel
def may_ask(kinds, kind):
    """Whether a kind of access is one of an MMU's."""
    return kind <= U8 and kinds >> kind & U1 != U0


@outlined
def may_ask_all(kinds, codes):
    """The same of many."""
    wrong = U0
    for i in range(U(codes.size)):
        kind = U(codes[i])
        wrong |= U1 ^ (kinds >> min(kind, U9) & U1)
    return wrong == U0


@outlined
def check_walks(c, mmu, nested, root, stage2_root, kind, kinds, count):
    """What is wrong with the arguments of a batch of walks: 0, or BAD_*."""
    row = mmu_row(c, mmu, nested)
    if row == U0 or not is_root(root) or not is_root(stage2_root) or count >> _MOST != U0:
        return np.int64(BAD_ARGUMENT)
    allowed = words_at(row, _MMU_WORDS)[MMU_KINDS]
    fine = may_ask_all(allowed, bytes_at(kinds, count)) if kinds != U0 else may_ask(allowed, kind)
    return np.int64(0 if fine else BAD_ARGUMENT)


@kernel
def place_of_kinds(context, kind, kinds, count):
    """Where the kinds of a batch lie, and how many: one for all, if there is no array."""
    if kinds != U0:
        return kinds, count
    place = context + (CONTEXT_KIND << U3)
    bytes_at(place, U1)[U0] = np.uint8(kind)
    return place, U1


@outlined
def is_ready(calls, number):
    """Whether the entry of a word of the table of calls is there, loaded now if it was not."""
    return calls[number] != U0 or call_c(calls[CALL_LOAD], number) == 0


# --------------------------------------------------------------------------- walks


@c_function
def c_translate(machine, mmu, root, kind, address, found):
    """Translate one address: its status, the rest in `found` (struct pgemu_translation)."""
    context = context_of(machine)
    if context == U0:
        return np.int64(BAD_MACHINE)
    c = words_at(context, _CONTEXT_WORDS)
    at = mmu_row(c, mmu, False)
    if at == U0 or not is_root(root):
        return np.int64(BAD_ARGUMENT)
    row = words_at(at, _MMU_WORDS)
    if not may_ask(row[MMU_KINDS], kind):
        return np.int64(BAD_ARGUMENT)
    if not is_array(found):
        return np.int64(BAD_POINTER)
    m = open_machine(descriptor_at(machine))
    status = bytes_at(found + U16, U1)
    none = words_at(found, U0)
    outputs = Outputs(
        words_at(found, U1), status, bytes_at(found + U(17), U1), words_at(found + U8, U1), none, none, none
    )
    access = words_at(row[MMU_ROWS], _ROWS)
    w = words_at(context + (CONTEXT_WALK << U3), U(WALK_SCRATCH))
    translate_single(m, access, kind * _X_WORDS, open_tree(m, row[MMU_FORMAT], root), address, outputs, w)
    return np.int64(status[U0])


@c_function
def c_translate_batch(machine, mmu, root, kind, kinds, count, addresses, found):
    """Translate `count` addresses, by tables/translate.py: 0. found: struct pgemu_translations."""
    context = context_of(machine)
    if context == U0:
        return np.int64(BAD_MACHINE)
    c = words_at(context, _CONTEXT_WORDS)
    if not is_array(found):
        return np.int64(BAD_POINTER)
    wrong = check_walks(c, mmu, False, root, U0, kind, kinds, count)
    if wrong != 0 or count == U0:
        return np.int64(wrong)
    to = words_at(found, U7)
    lists = to[U4] | to[U5] | to[U6]
    arrays = is_array(addresses) and is_array(to[U0]) and is_array(to[U1]) and to[U2] != U0 and to[U3] != U0
    if not arrays or (lists != U0 and not (is_array(to[U4]) and is_array(to[U5]) and is_array(to[U6]))):
        return np.int64(BAD_POINTER)
    calls = words_at(c[CONTEXT_CALLS], _CALL_WORDS)
    if not is_ready(calls, CALL_TRANSLATE):
        return np.int64(NO_CODE)
    row = words_at(mmu_row(c, mmu, False), _MMU_WORDS)
    listed = U0 if lists == U0 else count
    codes, many = place_of_kinds(context, kind, kinds, count)
    return np.int64(
        call_address(
            calls[CALL_TRANSLATE],
            (
                descriptor_at(machine), row[MMU_FORMAT], root, words_at(addresses, count),
                bytes_at(codes, many), words_at(row[MMU_ROWS], _ROWS), words_at(to[U0], count),
                bytes_at(to[U2], count), bytes_at(to[U3], count), words_at(to[U1], count),
                words_at(to[U4], listed * _READS), words_at(to[U5], listed * _READS), words_at(to[U6], listed * U2),
                words_at(context + (CONTEXT_WALK << U3), U(WALK_SCRATCH)),
            ),
        )
    )  # fmt: skip


@outlined
def walk_nested_batch(machine, context, mmu, guest_root, stage2_root, kind, kinds, count, addresses, to):
    """Nested walks by tables/nested.py: 0. to: the words of struct pgemu_nested_translations."""
    c = words_at(context, _CONTEXT_WORDS)
    wrong = check_walks(c, mmu, True, guest_root, stage2_root, kind, kinds, count)
    if wrong != 0 or count == U0:
        return np.int64(wrong)
    arrays = is_array(addresses) and is_array(to[U0]) and is_array(to[U1]) and is_array(to[U2]) and is_array(to[U8])
    arrays = arrays and to[U3] != U0 and to[U4] != U0 and to[U5] != U0 and (to[U6] | to[U7]) & U7 == U0
    if not arrays:
        return np.int64(BAD_POINTER)
    calls = words_at(c[CONTEXT_CALLS], _CALL_WORDS)
    if not is_ready(calls, CALL_NESTED):
        return np.int64(NO_CODE)
    row = words_at(mmu_row(c, mmu, True), _MMU_WORDS)
    codes, many = place_of_kinds(context, kind, kinds, count)
    reads = U0 if to[U6] == U0 else count * _NESTED_READS
    writes = U0 if to[U7] == U0 else count * _NESTED_WRITES
    return np.int64(
        call_address(
            calls[CALL_NESTED],
            (
                descriptor_at(machine), row[MMU_FORMAT], guest_root, row[MMU_STAGE2], stage2_root,
                words_at(addresses, count), bytes_at(codes, many),
                words_at(row[MMU_ROWS], _NESTED_ROWS), words_at(to[U0], count), bytes_at(to[U3], count),
                bytes_at(to[U4], count), bytes_at(to[U5], count * U2), words_at(to[U1], count), words_at(to[U2], count),
                words_at(to[U6], reads), words_at(to[U7], writes), words_at(to[U8], count * U2),
                words_at(context + (CONTEXT_WALK << U3), U(NESTED_SCRATCH)), U(WALK_BLOCK),
            ),
        )
    )  # fmt: skip


@c_function
def c_translate_nested_batch(machine, mmu, guest_root, stage2_root, kind, kinds, count, addresses, found):
    """Translate `count` addresses of a guest: 0. found: struct pgemu_nested_translations."""
    context = context_of(machine)
    if context == U0:
        return np.int64(BAD_MACHINE)
    if not is_array(found):
        return np.int64(BAD_POINTER)
    to = words_at(found, U9)
    return walk_nested_batch(
        machine, context, mmu, guest_root, stage2_root, kind, kinds, count, addresses, to
    )  # fmt: skip


@c_function
def c_translate_nested(machine, mmu, guest_root, stage2_root, kind, address, found, reads, writes):
    """One nested walk: its status, the rest in `found` (struct pgemu_nested_translation)."""
    context = context_of(machine)
    if context == U0:
        return np.int64(BAD_MACHINE)
    if not is_array(found):
        return np.int64(BAD_POINTER)
    # Where the results of a batch of one go, and the address: where an operation would stand.
    operation = context + (CONTEXT_OPERATION << U3)
    to = words_at(operation, U9)
    to[U0] = found
    to[U1] = found + U8
    to[U2] = found + U16
    to[U3] = found + U(40)
    to[U4] = found + U(41)
    to[U5] = found + U(42)
    to[U6] = reads
    to[U7] = writes
    to[U8] = found + U(24)
    place = context + (CONTEXT_HEADER << U3)
    words_at(place, U1)[U0] = address
    wrong = walk_nested_batch(machine, context, mmu, guest_root, stage2_root, kind, U0, U1, place, to)
    return wrong if wrong != 0 else np.int64(bytes_at(found + U(40), U1)[U0])


# --------------------------------------------------------------------------- operations


@outlined
def run_by(calls, number, descriptor, columns, first):
    """Run operations by an entry that is none of the default machines': what it returns."""
    if number == _FULL:
        return U(
            call_address(
                calls[number],
                (descriptor, columns.header, columns.object, columns.address, columns.offset, columns.length,
                 columns.status, columns.detail, first, U0, np.int64(BATCH_MODE)),
            )
        )  # fmt: skip
    return U(
        call_address(
            calls[number],
            (descriptor, columns.header, columns.object, columns.address, columns.offset, columns.length,
             columns.status, columns.detail, first, _ACTORS),
        )
    )  # fmt: skip


@outlined
def run_fast(calls, descriptor, columns, first):
    """Run operations by the entry of default machines: what it returns."""
    return U(
        call_address(
            calls[_FAST],
            (descriptor, words_at(calls[CALL_LOOPS], U3), columns.header, columns.object, columns.address,
             columns.offset, columns.length, columns.status, columns.detail, first),
        )
    )  # fmt: skip


@outlined
def run_through(machine, calls, columns):
    """Run operations through one entry after the other, as pgemu.machine.core.run_all() does: 0, or NO_CODE."""
    descriptor = descriptor_at(machine)
    m = open_machine(descriptor)
    count = U(columns.status.size)
    done = U0
    while done < count:
        full = m.state[R_FULL] != U0
        if not is_ready(calls, _FULL if full else _FAST):
            return np.int64(NO_CODE)
        if full:
            stopped = run_by(calls, _FULL, descriptor, columns, done)
        else:
            stopped = run_fast(calls, descriptor, columns, done)
        loop = stopped >> LOOP_SHIFT
        if loop != U0:
            if call_c(calls[CALL_LOAD], CALL_LOOP + loop - U1) != 0:
                return np.int64(NO_CODE)
            done = stopped & _LOOP_INDEX
            continue
        other = stopped >> _ENTRY_SHIFT
        done = stopped & _INDEX
        if done >= count:
            break
        if other == U0 or not is_ready(calls, other) or (other == _DEVICES and not is_ready(calls, _FULL)):
            return np.int64(NO_CODE)
        done = run_by(calls, other, descriptor, columns, done) & _INDEX
        if other == _DEVICES and m.state[R_SPINS] != U0:
            run_by(calls, _FULL, descriptor, columns, count)  # what was unpinned may be what a conversion awaits
    return np.int64(0)


@kernel
def fits_columns(o):
    """Whether an operation's fields fit the columns of a trace."""
    if (o[U0] | o[U1]) & ~LOW8 != U0 or o[U2] >= _ACTORS:
        return False
    return (o[U3] | o[U4]) & ~LOW16 == U0 and o[U5] & ~LOW32 == U0


@c_function
def c_operate(machine, operation, detail):
    """Run an operation (struct pgemu_operation): what it returns."""
    context = context_of(machine)
    if context == U0:
        return np.int64(BAD_MACHINE)
    if not is_array(operation) or detail & U7 != U0:
        return np.int64(BAD_POINTER)
    o = words_at(operation, _FIELDS)
    if not fits_columns(o):
        return np.int64(BAD_ARGUMENT)
    c = words_at(context, _CONTEXT_WORDS)
    c[CONTEXT_HEADER] = o[U0] | o[U1] << U8 | o[U2] << U16 | o[U3] << U32 | o[U4] << U48
    columns = Columns(
        words_at(context + (CONTEXT_HEADER << U3), U1),
        words_at(operation + U(40), U1),
        words_at(operation + U48, U1),
        words_at(operation + U(56), U1),
        words_at(operation + U(64), U1),
        signed_words_at(context + (CONTEXT_STATUS << U3), U1),
        words_at(context + (CONTEXT_DETAIL << U3), U1),
    )
    wrong = run_through(machine, words_at(c[CONTEXT_CALLS], _CALL_WORDS), columns)
    if wrong != 0:
        return np.int64(wrong)
    if detail != U0:
        words_at(detail, U1)[U0] = c[CONTEXT_DETAIL]
    return np.int64(c[CONTEXT_STATUS])


@kernel
def place_of_column(context, columns, number, count):
    """Where a column of struct pgemu_columns lies, and how many elements it has."""
    address = columns[number]
    one = columns[U5] >> number & U1 != U0
    if address == U0:
        return context + (CONTEXT_ZERO << U3), U1
    return address, U1 if one else count


@c_function
def c_run(machine, columns, count, status, detail):
    """Run `count` operations (struct pgemu_columns): 0."""
    context = context_of(machine)
    if context == U0:
        return np.int64(BAD_MACHINE)
    if not is_array(columns):
        return np.int64(BAD_POINTER)
    if count >> _MOST != U0:
        return np.int64(BAD_ARGUMENT)
    if count == U0:
        return np.int64(0)
    given = words_at(columns, U6)
    arrays = is_array(given[U0]) and is_array(status) and is_array(detail)
    if not arrays or (given[U1] | given[U2] | given[U3] | given[U4]) & U7 != U0:
        return np.int64(BAD_POINTER)
    c = words_at(context, _CONTEXT_WORDS)
    header, headers = place_of_column(context, given, U0, count)
    object_, objects = place_of_column(context, given, U1, count)
    address, addresses = place_of_column(context, given, U2, count)
    offset, offsets = place_of_column(context, given, U3, count)
    length, lengths = place_of_column(context, given, U4, count)
    taken = Columns(
        words_at(header, headers), words_at(object_, objects), words_at(address, addresses), words_at(offset, offsets),
        words_at(length, lengths), signed_words_at(status, count), words_at(detail, count),
    )  # fmt: skip
    return run_through(machine, words_at(c[CONTEXT_CALLS], _CALL_WORDS), taken)


# --------------------------------------------------------------------------- operations, one function each


@kernel
def ask(machine, op, flags, vm, space, object_, address, offset, length, detail):
    """c_operate() of an operation that is written down here."""
    context = context_of(machine)
    if context == U0:
        return np.int64(BAD_MACHINE)
    place = context + (CONTEXT_OPERATION << U3)
    o = words_at(place, _FIELDS)
    o[U0] = op
    o[U1] = flags
    o[U2] = U0
    o[U3] = vm
    o[U4] = space
    o[U5] = object_
    o[U6] = address
    o[U7] = offset
    o[U8] = length
    calls = words_at(words_at(context, _CONTEXT_WORDS)[CONTEXT_CALLS], _CALL_WORDS)
    return np.int64(call_address(calls[CALL_OPERATE], (machine, place, detail)))


@c_function
def c_host_fault(machine, space, address, flags, detail):
    return ask(machine, OP_HOST_FAULT, flags, U0, space, U0, address, U0, U0, detail)


@c_function
def c_guest_fault(machine, vm, address, flags, detail):
    return ask(machine, OP_GUEST_FAULT, flags, vm, U0, U0, address, U0, U0, detail)


@c_function
def c_convert(machine, vm, inode, offset, length, flags, detail):
    return ask(machine, OP_CONVERT, flags, vm, U0, inode, U0, offset, length, detail)


@c_function
def c_zap(machine, space, address, length, flags, detail):
    return ask(machine, OP_ZAP, flags, U0, space, U0, address, U0, length, detail)


@c_function
def c_munmap(machine, space, address, length, detail):
    return ask(machine, OP_MUNMAP, U0, U0, space, U0, address, U0, length, detail)


@c_function
def c_punch_hole(machine, inode, offset, length, detail):
    return ask(machine, OP_PUNCH_HOLE, U0, U0, U0, inode, U0, offset, length, detail)


@c_function
def c_pin(machine, space, number, address, length, flags, detail):
    return ask(machine, OP_PIN, flags, U0, space, number, address, U0, length, detail)


@c_function
def c_unpin(machine, number, detail):
    return ask(machine, OP_UNPIN, U0, U0, U0, number, U0, U0, U0, detail)


@c_function
def c_dma_map(machine, domain, space, iova, length, inode, offset, flags, detail):
    return ask(machine, OP_DMA_MAP, flags, space, domain, inode, iova, offset, length, detail)


@c_function
def c_dma_unmap(machine, domain, iova, length, detail):
    return ask(machine, OP_DMA_UNMAP, U0, U0, domain, U0, iova, U0, length, detail)


@c_function
def c_dma_access(machine, domain, device, iova, length, word, flags, detail):
    return ask(machine, OP_DMA_ACCESS, flags, U0, domain, device, iova, word, length, detail)


# --------------------------------------------------------------------------- counters


@c_function
def c_event_count(machine, event):
    """How often an event was counted, of all operations."""
    if context_of(machine) == U0:
        return np.int64(BAD_MACHINE)
    if event >= _EVENTS:
        return np.int64(BAD_ARGUMENT)
    stats = open_machine(descriptor_at(machine)).stats
    total = np.int64(0)
    for operation in range(U(OPERATIONS)):
        total += stats[STATS_COUNTERS + operation * _EVENTS + event]
    return np.int64(total)


@c_function
def c_gauge_value(machine, gauge):
    """The value of a gauge."""
    if context_of(machine) == U0:
        return np.int64(BAD_MACHINE)
    if gauge >= _GAUGES:
        return np.int64(BAD_ARGUMENT)
    return np.int64(open_machine(descriptor_at(machine)).stats[STATS_GAUGES + U2 * gauge])
