"""Lines of a log as bytes: those that look like one before are read here, at any other one the reader stops.

What a line means is what pgemu.trace.readers.ftrace says, which reads the lines at which this stops and tells what it
has seen. A line is read if the text in front of its time stamp and the first word of its event were seen before, and
if its fields have exactly the shape that the kernel prints.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U2, U3, U4, U8, U9, U12
from pgemu_kernels.engine.compile import entry, kernel
from pgemu_kernels.text.log_fields import Reading, end_of_line, find_name, has_shape, is_same, separator, time_of
from pgemu_kernels.words.log_words import (
    A_COUNT,
    A_KNOWN,
    ADVICE_WORDS,
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
    KEPT_WORDS,
    L_CALL,
    L_FAULT,
    L_L2,
    L_ROW,
    L_WORDS,
    NO_ROW,
    ROW_WORDS,
    SEEN_AT,
    SEEN_CALL,
    SEEN_CODE,
    SEEN_LENGTH,
    SEEN_SHAPE,
    SEEN_VALUE,
    SEEN_WORDS,
    UNMAP_INPUT,
    UNMAP_OUTCOME,
    EventCode,
)

U = np.uint64
_BLANK = np.uint8(ord(" "))
_K_WORDS, _L_WORDS, _A_WORDS = U(SEEN_WORDS), U(L_WORDS), U(ADVICE_WORDS)
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

# Kinds of rows, system calls and what else pgemu.trace has numbers for: events.py, outcomes.py, task_calls.py.
_ROW_HOST_FAULT, _ROW_GUEST_FAULT, _ROW_ATTRIBUTES, _ROW_UNMAP, _ROW_MADVISE = U(1), U(2), U(3), U(4), U(6)
_KEPT_CHANGED, _KEPT_SET = U(1), U(2)
_CALL_MADVISE, _CALL_MMAP, _CALL_FALLOCATE = U(1), U(3), U(6)
_D, _STATE, _ADDRESS, _HVA = U(7), U(9), U(4), U(8)  # words of rows
_DISCARDING = U(1 << 4 | 1 << 9 | 1 << 24)  # MADV_DONTNEED, MADV_REMOVE, MADV_DONTNEED_LOCKED
_FIRST_ERROR = U((1 << 64) - 4095)  # IS_ERR_VALUE()
_SHARED_BITS = U(1 << 47 | 1 << 51)  # TDX_SHARED_BIT_PWL_4, TDX_SHARED_BIT_PWL_5
_SPTE_PRESENT, _SPTE_LARGE = U(1 << 11), U(1 << 7)


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
    count = r.tokens[known + SEEN_VALUE] * U2
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
        r.counts[r.tokens[known + SEEN_VALUE] * U2] += U1
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
    r.counts[r.tokens[known + SEEN_VALUE] * U2] += U1
    r.tasks[own + L_CALL] = U0
    if call == U0 or row == NO_ROW or call != r.tokens[known + SEEN_CALL]:
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
    code = r.tokens[known + SEEN_CODE]
    if code == _UNMAP:
        return do_unmap(r, known, time, task, line)
    if code == _MADVISE:
        return do_madvise(r, known, time, task, line)
    if code == _RETURN:
        do_return(r, known, task)
        return True
    r.counts[r.tokens[known + SEEN_VALUE] * U2] += U1
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
    length = r.prefixes[last + SEEN_LENGTH]
    if length == end - at and length != U0 and is_same(r, at, r.prefixes[last + SEEN_AT], length):
        return r.prefixes[last + SEEN_VALUE]
    row = find_name(r, r.prefixes, at, end)
    if row == NONE:
        return NONE
    r.control[C_PREFIX] = row
    return r.prefixes[row + SEEN_VALUE]


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
    known = find_name(r, r.tokens, event, end)
    if known == NONE:
        return False
    if r.tokens[known + SEEN_CODE] == _COUNTED:
        r.counts[r.tokens[known + SEEN_VALUE] * U2] += U1
        return True
    return has_shape(r, end, stop, r.tokens[known + SEEN_SHAPE]) and do_event(r, known, time, task, line)


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
