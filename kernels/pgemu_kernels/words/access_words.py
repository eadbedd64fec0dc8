"""What Python tells the reader of lines of accesses (text/access_lines.py) and hears from it."""

from __future__ import annotations

import numpy as np

U = np.uint64

Y_AT = U(0)  # the first byte of a line
Y_END = U(1)  # the end of the text, behind a newline
Y_LINE = U(2)  # number of the line before
Y_ROWS = U(3)  # accesses made
Y_FOREIGN = U(4)  # lines that are none
Y_READS = U(5)  # lines by kind
Y_WRITES = U(6)
Y_MODIFIES = U(7)
Y_FETCHES = U(8)
Y_WORDS = 9

FOREIGN_WORDS = 2  # of a line that is none: where it begins, its number
MOST_BYTES = 4096  # of an access; lackey/lk_main.c: MAX_DSIZE is 512
