"""What Python tells the reader of log lines (text/log_lines.py) and hears from it."""

from __future__ import annotations

from enum import IntEnum

import numpy as np

U = np.uint64

# A row of what was seen before: the text in front of a time stamp, or the first word of an event.
SEEN_HASH = U(0)
SEEN_AT = U(1)  # where its bytes begin among the names
SEEN_LENGTH = U(2)  # how many there are; 0: the row is free
SEEN_VALUE = U(3)  # the task, or which counts are the event's
SEEN_CODE = U(4)  # EventCode
SEEN_SHAPE = U(5)  # where the shape of its fields begins
SEEN_CALL = U(6)  # of a system call's return: which call
SEEN_WORDS = 8
HASH_SAMPLES = 8  # bytes that a name is looked up by, the first and the last among them
HASH_FACTOR = 0x100000001B3  # of FNV-1a

# What the reader is asked, and where it stopped.
C_AT = U(0)  # the first byte of a line
C_END = U(1)  # the end of the text, behind a newline
C_LINE = U(2)  # number of the line before
C_ROWS = U(3)  # rows of inputs made
C_KEPT = U(4)  # rows of outcomes made
C_OLDER = U(5)  # words of older rows
C_KEEP = U(6)  # whether outcomes are kept
C_PREFIX = U(7)  # row of the last text in front of a time stamp
C_UNMAPS = U(8)  # which kinds of unmaps were seen before
C_VALUES = U(9)  # the fields of an event
C_WORDS = 18
UNMAP_INPUT = U(1)  # one of its own,
UNMAP_OUTCOME = U(2)  # ... or of a system call

# What is known of a task.
L_CALL = U(0)  # the system call that it is in, 0: none
L_ROW = U(1)  # word where the row of that begins, NO_ROW: it has none
L_FAULT = U(2)  # word where the row of its last guest fault begins, NO_ROW: none
L_L2 = U(3)  # whether its faults are an L2 guest's
L_WORDS = 4
NO_ROW = U((1 << 64) - 1)

ROW_WORDS = 10  # of an input
KEPT_WORDS = 9  # of an outcome
ADVICES = 64  # of madvise() that can be counted
A_KNOWN = U(0)  # of an advice: whether it was seen before,
A_COUNT = U(1)  # ... and how often since
ADVICE_WORDS = 2


class EventCode(IntEnum):
    """What is done with a line of an event."""

    COUNTED = 1
    HOST_FAULT = 2
    GUEST_FAULT = 3
    UNMAP = 4
    ATTRIBUTES = 5
    MADVISE = 6
    RETURN = 7
    SET_SPTE = 8
    SPTE_CHANGED = 9


class Shape(IntEnum):
    """What the fields of an event are made of, byte by byte."""

    END = 0  # of the line
    LITERAL = 1  # a byte that says how many follow, and these
    HEXADECIMAL = 2  # with or without 0x
    DECIMAL = 3
    WORD = 4  # anything up to a blank
