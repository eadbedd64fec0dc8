"""Lines of a log as bytes: those that look like one before are read here, at any other one the reader stops.

What a line means is what pgemu.trace.readers.ftrace says, which reads the lines at which this stops and tells what it
has seen. A line is read if the text in front of its time stamp and the first word of its event were seen before, and
if its fields have exactly the shape that the kernel prints.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U2, U3, U4, U8, U9, U12, U16, U32
from pgemu_kernels.engine.compile import entry, kernel
from pgemu_kernels.words.log_words import (
    A_COUNT,
    A_KNOWN,
    A_WORDS,
    ADVICES,
    C_AT,
    C_END,
    C_KEEP,
    C_KEPT,
    C_LINE,
    C_OLDER,
    C_PREFIX,
    C_ROWS,
    C_UNMAPS,
    C_VALUES,
    HASH_FACTOR,
    HASH_SAMPLES,
    K_AT,
    K_CALL,
    K_CODE,
    K_HASH,
    K_LENGTH,
    K_SHAPE,
    K_VALUE,
    K_WORDS,
    KEPT_WORDS,
    L_CALL,
    L_FAULT,
    L_L2,
    L_ROW,
    L_WORDS,
    NO_ROW,
    ROW_WORDS,
    UNMAP_INPUT,
    UNMAP_OUTCOME,
    EventCode,
    Shape,
)

U = np.uint64
B = np.uint8
_NEWLINE, _COLON, _BLANK, _DOT = B(ord("\n")), B(ord(":")), B(ord(" ")), B(ord("."))
_0, _9, _A, _F, _X = B(ord("0")), B(ord("9")), B(ord("a")), B(ord("f")), B(ord("x"))
_LOWER = B(0x20)  # what tells small letters from capital ones
_LAST = B(126)  # of the visible characters
_SAMPLES = U(HASH_SAMPLES)
_HASH_FACTOR = U(HASH_FACTOR)
_K_WORDS, _L_WORDS, _A_WORDS = U(K_WORDS), U(L_WORDS), U(A_WORDS)
_ROW_WORDS, _KEPT_WORDS = U(ROW_WORDS), U(KEPT_WORDS)
_ADVICES = U(ADVICES)
_U5, _U6, _U7, _U10, _U52 = U(5), U(6), U(7), U(10), U(52)

_COUNTED, _HOST_FAULT, _GUEST_FAULT, _UNMAP = (
    U(code) for code in (EventCode.COUNTED, EventCode.HOST_FAULT, EventCode.GUEST_FAULT, EventCode.UNMAP)
)
_ATTRIBUTES, _MADVISE, _RETURN, _SET, _CHANGED = (
    U(code)
    for code in (
        EventCode.ATTRIBUTES,
        EventCode.MADVISE,
        EventCode.RETURN,
        EventCode.SET_SPTE,
        EventCode.SPTE_CHANGED,
    )
)
_END, _LITERAL, _HEXADECIMAL, _DECIMAL = (
    B(part) for part in (Shape.END, Shape.LITERAL, Shape.HEXADECIMAL, Shape.DECIMAL)
)

# Kinds of rows, system calls and what else pgemu.trace has numbers for: events.py, outcomes.py, task_calls.py.
_ROW_HOST_FAULT, _ROW_GUEST_FAULT, _ROW_ATTRIBUTES, _ROW_UNMAP, _ROW_MADVISE = U(1), U(2), U(3), U(4), U(6)
_KEPT_CHANGED, _KEPT_SET = U(1), U(2)
_CALL_MADVISE, _CALL_MMAP, _CALL_FALLOCATE = U(1), U(3), U(6)
_D, _STATE, _ADDRESS, _HVA = U(7), U(9), U(4), U(8)  # words of rows
_DISCARDING = U(1 << 4 | 1 << 9 | 1 << 24)  # MADV_DONTNEED, MADV_REMOVE, MADV_DONTNEED_LOCKED
_FIRST_ERROR = U((1 << 64) - 4095)  # IS_ERR_VALUE()
_SHARED_BITS = U(1 << 47 | 1 << 51)  # TDX_SHARED_BIT_PWL_4, TDX_SHARED_BIT_PWL_5
_SPTE_PRESENT, _SPTE_LARGE = U(1 << 11), U(1 << 7)
_BILLION, _THOUSAND = U(10**9), U(1000)


class Reading(NamedTuple):
    """What a log is read with; see words/log_words.py."""

    text: Any  # uint8[n]
    control: Any  # uint64[C_WORDS]
    prefixes: Any  # uint64[a power of two * K_WORDS]
    tokens: Any  # the same
    names: Any  # uint8[n]
    shapes: Any  # uint8[n]
    counts: Any  # uint64[n * 2]: lines by event, and those of unmaps that are an outcome
    advices: Any  # uint64[ADVICES * A_WORDS]
    tasks: Any  # uint64[n * L_WORDS]
    older: Any  # uint64[n]: rows of inputs that were there before
    rows: Any  # uint64[n * ROW_WORDS]
    kept: Any  # uint64[n * KEPT_WORDS]


# --------------------------------------------------------------------------- text


@kernel
def end_of_line(text, at):
    while text[at] != _NEWLINE:
        at += U1
    return at


@kernel
def is_same(r, at, where, length):
    """Whether bytes of the text are a name's."""
    for i in range(length):  # noqa: SIM110 (no generators here)
        if r.text[at + i] != r.names[where + i]:
            return False
    return True


@kernel
def find(r, table, at, end):
    """The row of the text [at, end) in a table of what was seen before, or NONE."""
    if at == end:
        return NONE
    hashed = end - at
    for i in range(_SAMPLES):  # what differs is found by comparing
        hashed = (hashed ^ U(r.text[at + (end - at - U1) * i // (_SAMPLES - U1)])) * _HASH_FACTOR
    hashed ^= hashed >> U32
    mask = U(table.size) // _K_WORDS - U1
    place = hashed & mask
    while True:
        row = place * _K_WORDS
        length = table[row + K_LENGTH]
        if length == U0:
            return NONE
        if table[row + K_HASH] == hashed and length == end - at and is_same(r, at, table[row + K_AT], length):
            return row
        place = (place + U1) & mask


@kernel
def is_digit(byte):
    return byte >= _0 and byte <= _9


@kernel
def separator(text, at, stop):
    """Where the first colon with a blank behind it stands in a line, or its end."""
    i = at
    while i + U1 < stop:
        if text[i] == _COLON and text[i + U1] == _BLANK:
            return i
        i += U1
    return stop


@kernel
def time_of(text, at, end):
    """Nanoseconds of a time stamp, seconds with six or nine decimals, or NONE."""
    whole = U0
    i = at
    while i < end and is_digit(text[i]):
        whole = whole * _U10 + U(text[i] - _0)
        i += U1
    if i == at or i - at > U9 or i == end or text[i] != _DOT:
        return NONE
    i += U1
    decimals = end - i
    part = U0
    while i < end and is_digit(text[i]):
        part = part * _U10 + U(text[i] - _0)
        i += U1
    if i != end or (decimals != _U6 and decimals != U9):
        return NONE
    return whole * _BILLION + (part * _THOUSAND if decimals == _U6 else part)


@kernel
def hex_digit(byte):
    """The value of a hexadecimal digit, 16 for any other byte."""
    if is_digit(byte):
        return U(byte - _0)
    small = byte | _LOWER
    if small >= _A and small <= _F:
        return U(small - _A) + _U10
    return U16


@kernel
def hexadecimal(r, at, stop, field):
    """Read a number with or without 0x to a field: where it ends, or NONE."""
    if at + U1 < stop and r.text[at] == _0 and r.text[at + U1] == _X:
        at += U2
    value = U0
    i = at
    while i < stop and i - at < U16:
        digit = hex_digit(r.text[i])
        if digit == U16:
            break
        value = value << U4 | digit
        i += U1
    r.control[C_VALUES + field] = value
    return i if i > at else NONE


@kernel
def decimal(r, at, stop, field):
    value = U0
    i = at
    while i < stop and i - at < U16 and is_digit(r.text[i]):
        value = value * _U10 + U(r.text[i] - _0)
        i += U1
    r.control[C_VALUES + field] = value
    return i if i > at else NONE


@kernel
def word(text, at, stop):
    i = at
    while i < stop and text[i] > _BLANK and text[i] <= _LAST:
        i += U1
    return i if i > at else NONE


@kernel
def literal(r, at, stop, shape, length):
    """Where the bytes of a shape end in the text, or NONE if others stand there."""
    if stop - at < length:
        return NONE
    for i in range(length):
        if r.text[at + i] != r.shapes[shape + i]:
            return NONE
    return at + length


@kernel
def has_shape(r, at, stop, shape):
    """Read the fields of an event, in [at, stop): whether they are as a shape says."""
    field = U0
    while at != NONE:
        part = r.shapes[shape]
        shape += U1
        if part == _END:
            return at == stop
        if part == _LITERAL:
            length = U(r.shapes[shape])
            at = literal(r, at, stop, shape + U1, length)
            shape += U1 + length
        elif part == _HEXADECIMAL:
            at = hexadecimal(r, at, stop, field)
            field += U1
        elif part == _DECIMAL:
            at = decimal(r, at, stop, field)
            field += U1
        else:
            at = word(r.text, at, stop)
    return False


# --------------------------------------------------------------------------- rows


@kernel
def row_word(r, at):
    """A word of the rows of inputs, by where it stands among all of them."""
    older = r.control[C_OLDER]
    return r.older[at] if at < older else r.rows[at - older]


@kernel
def set_row_word(r, at, value):
    older = r.control[C_OLDER]
    if at < older:
        r.older[at] = value
    else:
        r.rows[at - older] = value


@kernel
def add_row(r, kind, time, task, line, fields):
    """Append a row of an input with the first fields of the line: the word where it begins."""
    first = r.control[C_ROWS] * _ROW_WORDS
    r.control[C_ROWS] += U1
    r.rows[first] = kind
    r.rows[first + U1] = time
    r.rows[first + U2] = task
    r.rows[first + U3] = line
    for i in range(_U6):
        r.rows[first + U4 + i] = r.control[C_VALUES + i] if i < fields else U0
    return r.control[C_OLDER] + first


@kernel
def keep(r, kind, time, task, line, space, gfn, level, old, new):
    """Append a row of an outcome, if they are kept."""
    if r.control[C_KEEP] == U0:
        return
    first = r.control[C_KEPT] * _KEPT_WORDS
    r.control[C_KEPT] += U1
    r.kept[first] = kind
    r.kept[first + U1] = time
    r.kept[first + U2] = task
    r.kept[first + U3] = line
    r.kept[first + U4] = space
    r.kept[first + _U5] = gfn
    r.kept[first + _U6] = level
    r.kept[first + _U7] = old
    r.kept[first + U8] = new


@kernel
def note_level(r, task, gfn, level):
    """outcomes.py:_mapped(): the leaf of the task's guest fault, if it is the fault's."""
    row = r.tasks[task * _L_WORDS + L_FAULT]
    if row == NO_ROW or level < U1 or level > U3 or gfn >> _U52 != U0:
        return
    differ = (row_word(r, row + _ADDRESS) ^ gfn << U12) & ~_SHARED_BITS
    if differ >> (U12 + U9 * (level - U1)) == U0:
        set_row_word(r, row + _D, level)


# --------------------------------------------------------------------------- events


@kernel
def do_unmap(r, known, time, task, line):
    """An unmap: whether there was one before that was an input, or an outcome, as this one is."""
    count = r.tokens[known + K_VALUE] * U2
    own = task * _L_WORDS
    call = r.tasks[own + L_CALL]
    seen = r.control[C_UNMAPS]
    if call == U0:
        if seen & UNMAP_INPUT == U0:
            return False
        add_row(r, _ROW_UNMAP, time, task, line, U2)
        r.counts[count] += U1
        return True
    if seen & UNMAP_OUTCOME == U0:
        return False
    r.counts[count + U1] += U1
    row = r.tasks[own + L_ROW]
    if call == _CALL_FALLOCATE and row_word(r, row + _HVA) == U0:
        set_row_word(r, row + _HVA, r.control[C_VALUES])
    return True


@kernel
def do_madvise(r, known, time, task, line):
    """A call of madvise(): whether its advice was seen before."""
    advice = r.control[C_VALUES + U2]
    if advice >= _ADVICES or r.advices[advice * _A_WORDS + A_KNOWN] == U0:
        return False
    row = NO_ROW
    if advice <= U(24) and (_DISCARDING >> advice) & U1 != U0:
        row = add_row(r, _ROW_MADVISE, time, task, line, U3)
        r.counts[r.tokens[known + K_VALUE] * U2] += U1
    else:
        r.advices[advice * _A_WORDS + A_COUNT] += U1
    r.tasks[task * _L_WORDS + L_CALL] = _CALL_MADVISE
    r.tasks[task * _L_WORDS + L_ROW] = row
    return True


@kernel
def do_return(r, known, task):
    own = task * _L_WORDS
    call = r.tasks[own + L_CALL]
    row = r.tasks[own + L_ROW]
    r.counts[r.tokens[known + K_VALUE] * U2] += U1
    r.tasks[own + L_CALL] = U0
    if call == U0 or row == NO_ROW or call != r.tokens[known + K_CALL]:
        return
    result = r.control[C_VALUES]
    if result >= _FIRST_ERROR:
        set_row_word(r, row + _STATE, U1)
    elif call == _CALL_MMAP:
        set_row_word(r, row + _ADDRESS, result)


@kernel
def do_fault(r, code, time, task, line):
    """page_fault_user, kvm_page_fault, kvm_vm_set_mem_attributes: what also says that the task is in no call."""
    own = task * _L_WORDS
    r.tasks[own + L_CALL] = U0
    if code == _HOST_FAULT:
        add_row(r, _ROW_HOST_FAULT, time, task, line, U2)
    elif code == _ATTRIBUTES:
        add_row(r, _ROW_ATTRIBUTES, time, task, line, U3)
    else:
        vcpu, address, error = r.control[C_VALUES], r.control[C_VALUES + U1], r.control[C_VALUES + U2]
        r.control[C_VALUES], r.control[C_VALUES + U1], r.control[C_VALUES + U2] = address, error, vcpu
        r.control[C_VALUES + U3], r.control[C_VALUES + U4] = U0, r.tasks[own + L_L2]
        r.tasks[own + L_FAULT] = add_row(r, _ROW_GUEST_FAULT, time, task, line, _U5)


@kernel
def do_outcome(r, code, time, task, line):
    """kvm_mmu_set_spte, kvm_tdp_mmu_spte_changed."""
    values = C_VALUES
    if code == _SET:
        gfn, value, level = r.control[values], r.control[values + U1], r.control[values + U2]
        note_level(r, task, gfn, level)
        keep(r, _KEPT_SET, time, task, line, U0, gfn, level, value, r.control[values + U3])
        return
    space, gfn, level = r.control[values], r.control[values + U1], r.control[values + U2]
    old, new = r.control[values + U3], r.control[values + U4]
    if new & _SPTE_PRESENT != U0 and (level == U1 or new & _SPTE_LARGE != U0):
        note_level(r, task, gfn, level)
    keep(r, _KEPT_CHANGED, time, task, line, space, gfn, level, old, new)


@kernel
def do_event(r, known, time, task, line):
    """What an event with its fields means: whether it could be done."""
    code = r.tokens[known + K_CODE]
    if code == _UNMAP:
        return do_unmap(r, known, time, task, line)
    if code == _MADVISE:
        return do_madvise(r, known, time, task, line)
    if code == _RETURN:
        do_return(r, known, task)
        return True
    r.counts[r.tokens[known + K_VALUE] * U2] += U1
    if code == _SET or code == _CHANGED:
        do_outcome(r, code, time, task, line)
    else:
        do_fault(r, code, time, task, line)
    return True


# --------------------------------------------------------------------------- lines


@kernel
def task_of(r, at, end):
    """The task of the text in front of a time stamp, or NONE if it was not seen before."""
    last = r.control[C_PREFIX]
    length = r.prefixes[last + K_LENGTH]
    if length == end - at and length != U0 and is_same(r, at, r.prefixes[last + K_AT], length):
        return r.prefixes[last + K_VALUE]
    row = find(r, r.prefixes, at, end)
    if row == NONE:
        return NONE
    r.control[C_PREFIX] = row
    return r.prefixes[row + K_VALUE]


@kernel
def read_line(r, at, stop, line):
    """Read the line in [at, stop): whether it could be read."""
    colon = separator(r.text, at, stop)
    stamp = colon
    while stamp > at and r.text[stamp - U1] != _BLANK:
        stamp -= U1
    if colon == stop or stamp == at:
        return False
    time = time_of(r.text, stamp, colon)
    if time == NONE:
        return False
    task = task_of(r, at, stamp - U1)
    if task == NONE:
        return False
    event = colon + U2
    end = event
    while end < stop and r.text[end] != _BLANK:
        end += U1
    known = find(r, r.tokens, event, end)
    if known == NONE:
        return False
    if r.tokens[known + K_CODE] == _COUNTED:
        r.counts[r.tokens[known + K_VALUE] * U2] += U1
        return True
    return has_shape(r, end, stop, r.tokens[known + K_SHAPE]) and do_event(r, known, time, task, line)


@entry
def read_lines(
    text, control, prefixes, tokens, names, shapes, counts, advices, tasks, older, rows, kept
):  # fmt: skip
    """Read lines from control[C_AT] on, up to one that has to be looked at, or until there is no room for more rows.

    control[C_AT] is then where that line begins, control[C_LINE] the number of the line before it.
    """
    r = Reading(text, control, prefixes, tokens, names, shapes, counts, advices, tasks, older, rows, kept)
    end = control[C_END]
    at = control[C_AT]
    line = control[C_LINE]
    most = min(U(rows.size) // _ROW_WORDS, U(kept.size) // _KEPT_WORDS)
    while at < end and control[C_ROWS] < most and control[C_KEPT] < most:
        stop = end_of_line(text, at)
        if not read_line(r, at, stop, line + U1):
            break
        at = stop + U1
        line += U1
    control[C_AT] = at
    control[C_LINE] = line
