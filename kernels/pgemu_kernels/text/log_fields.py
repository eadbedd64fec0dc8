"""Bytes of a line: names that were seen before, time stamps, and the fields of events by their shape."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U2, U4, U9, U16, U32
from pgemu_kernels.engine.compile import kernel
from pgemu_kernels.words.log_words import (
    C_VALUES,
    HASH_FACTOR,
    HASH_SAMPLES,
    SEEN_AT,
    SEEN_HASH,
    SEEN_LENGTH,
    SEEN_WORDS,
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
_K_WORDS = U(SEEN_WORDS)
_U6, _U10 = U(6), U(10)
_END, _LITERAL, _HEXADECIMAL, _DECIMAL = (
    B(part) for part in (Shape.END, Shape.LITERAL, Shape.HEXADECIMAL, Shape.DECIMAL)
)
_BILLION, _THOUSAND = U(10**9), U(1000)


class Reading(NamedTuple):
    """What a log is read with; see words/log_words.py."""

    text: Any  # uint8[n]
    control: Any  # uint64[C_WORDS]
    prefixes: Any  # uint64[a power of two * SEEN_WORDS]
    tokens: Any  # the same
    names: Any  # uint8[n]
    shapes: Any  # uint8[n]
    counts: Any  # uint64[n * 2]: lines by event, and those of unmaps that are an outcome
    advices: Any  # uint64[ADVICES * ADVICE_WORDS]
    tasks: Any  # uint64[n * L_WORDS]
    older: Any  # uint64[n]: rows of inputs that were there before
    rows: Any  # uint64[n * ROW_WORDS]
    kept: Any  # uint64[n * KEPT_WORDS]


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
def find_name(r, table, at, end):
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
        length = table[row + SEEN_LENGTH]
        if length == U0:
            return NONE
        if table[row + SEEN_HASH] == hashed and length == end - at and is_same(r, at, table[row + SEEN_AT], length):
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
