"""Lines of Lackey as bytes: what each access does, where, and of how many bytes; where the lines are that are none.

What a line looks like is what pgemu.trace.readers.lackey says, which reads short files without this.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import NONE, U0, U1, U2, U3, U4, U16
from pgemu_kernels.engine.compile import entry, kernel
from pgemu_kernels.text.log_fields import end_of_line, hex_digit
from pgemu_kernels.words.access_words import (
    FOREIGN_WORDS,
    MOST_BYTES,
    Y_AT,
    Y_END,
    Y_FETCHES,
    Y_FOREIGN,
    Y_LINE,
    Y_MODIFIES,
    Y_READS,
    Y_ROWS,
    Y_WRITES,
)
from pgemu_kernels.words.operations import Flag

U = np.uint64
B = np.uint8
_BLANK, _COMMA, _NEWLINE = B(ord(" ")), B(ord(",")), B(ord("\n"))
_I, _L, _M, _S = B(ord("I")), B(ord("L")), B(ord("M")), B(ord("S"))
_0, _9, _10 = U(ord("0")), U(9), U(10)
_MOST = U(MOST_BYTES)
_FOREIGN_WORDS = U(FOREIGN_WORDS)
_READ, _WRITE, _EXEC = B(0), B(Flag.WRITE), B(Flag.EXEC)


@kernel
def access_kind(text, at, end):
    """Which count is that of the line that begins here, or NONE if its first three bytes are no access's."""
    if at + U3 >= end or text[at + U2] != _BLANK:
        return NONE
    kind = text[at + U1]
    if kind == _BLANK:
        return Y_FETCHES if text[at] == _I else NONE
    if text[at] != _BLANK:
        return NONE
    return Y_READS if kind == _L else Y_WRITES if kind == _S else Y_MODIFIES if kind == _M else NONE


@entry
def read_accesses(text, control, address, size, flags, foreign):
    """Read lines from control[Y_AT] on to control[Y_END], or until there is no room for more.

    control[Y_AT] is then where the next line begins, control[Y_LINE] the number of the line before it.
    """
    end = control[Y_END]
    at = control[Y_AT]
    line = control[Y_LINE]
    row = control[Y_ROWS]
    others = control[Y_FOREIGN]
    while at < end and row + U1 < U(flags.size) and others < U(foreign.size):
        line += U1
        kind = access_kind(text, at, end)
        here = at
        if kind != NONE:
            i = at + U3
            where = U0
            digit = hex_digit(text[i])
            while digit < U16:
                where = where << U4 | digit
                i += U1
                digit = hex_digit(text[i])
            digits = i - at - U3
            if digits != U0 and digits <= U16 and text[i] == _COMMA:
                i += U1
                first = i
                length = U0
                digit = U(text[i]) - _0
                while digit <= _9:
                    length = length * _10 + digit
                    i += U1
                    digit = U(text[i]) - _0
                if text[i] == _NEWLINE and i - first <= U4 and length != U0 and length <= _MOST:
                    control[kind] += U1
                    address[row] = where
                    size[row] = length
                    flags[row] = _EXEC if kind == Y_FETCHES else _WRITE if kind == Y_WRITES else _READ
                    row += U1
                    if kind == Y_MODIFIES:
                        address[row] = where
                        size[row] = length
                        flags[row] = _WRITE
                        row += U1
                    at = i + U1
                    continue
            at = i
        foreign[others] = here
        foreign[others + U1] = line
        others += _FOREIGN_WORDS
        at = end_of_line(text, at) + U1
    control[Y_AT] = at
    control[Y_LINE] = line
    control[Y_ROWS] = row
    control[Y_FOREIGN] = others
