"""Walks that C calls: pgemu.h's translate functions, each a door to entries of tables/.

Arguments are numbers and addresses, uint64, as in c_calls.py.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.addresses import bytes_at, descriptor_at, words_at
from pgemu_kernels.engine.bits import U0, U1, U2, U3, U4, U5, U6, U7, U8, U9, U16
from pgemu_kernels.engine.compile import c_function, kernel, outlined
from pgemu_kernels.engine.handle import open_machine
from pgemu_kernels.engine.numba_internals import call_address
from pgemu_kernels.run.c_arguments import CALLS_SIZE, CONTEXT_SIZE, MOST_BITS, context_of, is_array, is_ready
from pgemu_kernels.tables.translate import Outputs, open_tree, translate_single
from pgemu_kernels.words.call_words import (
    BAD_ARGUMENT,
    BAD_MACHINE,
    BAD_POINTER,
    CALL_NESTED,
    CALL_TRANSLATE,
    CONTEXT_CALLS,
    CONTEXT_HEADER,
    CONTEXT_KIND,
    CONTEXT_MMU_COUNT,
    CONTEXT_MMUS,
    CONTEXT_OPERATION,
    CONTEXT_WALK,
    MMU_FORMAT,
    MMU_KINDS,
    MMU_ROWS,
    MMU_STAGE2,
    MMU_WORDS,
    NO_CODE,
    NO_STAGE2,
)
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
_MMU_WORDS = U(MMU_WORDS)
_X_WORDS = U(X_WORDS)
_ROWS = U((ACCESS_ROWS + 1) * X_WORDS)  # of one stage, and of a plain walk
_NESTED_ROWS = U(2 * ACCESS_ROWS * X_WORDS)
_READS, _NESTED_READS, _NESTED_WRITES = U(WALK_READS), U(NESTED_READS), U(NESTED_WRITES)


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
    if row == U0 or not is_root(root) or not is_root(stage2_root) or count >> MOST_BITS != U0:
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


# --------------------------------------------------------------------------- walks


@c_function
def c_translate(machine, mmu, root, kind, address, found):
    """Translate one address: its status, the rest in `found` (struct pgemu_translation)."""
    context = context_of(machine)
    if context == U0:
        return np.int64(BAD_MACHINE)
    c = words_at(context, CONTEXT_SIZE)
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
    c = words_at(context, CONTEXT_SIZE)
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
    calls = words_at(c[CONTEXT_CALLS], CALLS_SIZE)
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
    c = words_at(context, CONTEXT_SIZE)
    wrong = check_walks(c, mmu, True, guest_root, stage2_root, kind, kinds, count)
    if wrong != 0 or count == U0:
        return np.int64(wrong)
    arrays = is_array(addresses) and is_array(to[U0]) and is_array(to[U1]) and is_array(to[U2]) and is_array(to[U8])
    arrays = arrays and to[U3] != U0 and to[U4] != U0 and to[U5] != U0 and (to[U6] | to[U7]) & U7 == U0
    if not arrays:
        return np.int64(BAD_POINTER)
    calls = words_at(c[CONTEXT_CALLS], CALLS_SIZE)
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
