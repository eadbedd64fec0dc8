"""What Python tells the reader of lines of accesses (text/access_lines.py) and hears from it."""

from __future__ import annotations

import numpy as np

U = np.uint64

A_AT = U(0)  # the first byte of a line
A_END = U(1)  # the end of the text, behind a newline
A_LINE = U(2)  # number of the line before
A_ROWS = U(3)  # accesses made
A_FOREIGN = U(4)  # lines that are none
A_READS = U(5)  # lines by kind
A_WRITES = U(6)
A_MODIFIES = U(7)
A_FETCHES = U(8)
A_WORDS = 9

FOREIGN_WORDS = 2  # of a line that is none: where it begins, its number
MOST_BYTES = 4096  # of an access; lackey/lk_main.c: MAX_DSIZE is 512
