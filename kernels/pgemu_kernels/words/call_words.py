"""What calls from C (run/c_calls.py) find behind a machine's descriptor, laid out by pgemu.capi."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.words.table_words import NESTED_SCRATCH

U = np.uint64

PLAIN_KIND = 8  # a kind of access beside pgemu.tables.access.Kind: nothing is checked, nothing set

# The table of entries that are called by address: one of a process, uint64. At the codes of `Entry` what runs
# operations; 0 while it was not loaded.
CALL_LOAD = U(0)  # a C function (number of a word) that sees to it that the word holds an address: 0, or -1
CALL_TRANSLATE = U(6)
CALL_NESTED = U(7)
CALL_OPERATE = U(8)
CALL_LOOPS = U(9)  # address of what fast.run() takes as `loops`
CALL_LOOP = U(16)  # + number of a loop: for CALL_LOAD only
CALL_WORDS = 16

# A machine as C sees it, uint64; the descriptor's word handle.C_CONTEXT has its address.
CONTEXT_MACHINE = U(0)  # address of the descriptor itself
CONTEXT_CALLS = U(1)  # address of the table of entries
CONTEXT_MMUS = U(2)  # address of the rows of MMUs
CONTEXT_MMU_COUNT = U(3)
CONTEXT_OPERATION = U(4)  # one operation: struct pgemu_operation
CONTEXT_HEADER = U(13)  # the same as a header; then its status and detail
CONTEXT_STATUS = U(14)
CONTEXT_DETAIL = U(15)
CONTEXT_ZERO = U(16)  # 0, of columns that are not given
CONTEXT_KIND = U(17)  # a kind of access, in its first byte
CONTEXT_WALK = U(18)  # scratch of walks
CONTEXT_WORDS = int(CONTEXT_WALK) + NESTED_SCRATCH

MMU_FORMAT = U(0)  # row of formats
MMU_STAGE2 = U(1)  # row of formats of stage 2; NO_STAGE2: none
MMU_KINDS = U(2)  # a bit for each kind of access that may be asked for
MMU_ROWS = U(3)  # address of the access rows; of one stage, words.ACCESS_ROWS of them and that of PLAIN_KIND
MMU_WORDS = 4
MMUS = 256  # of a machine
NO_STAGE2 = U(0xFFFF_FFFF_FFFF_FFFF)

# What is returned where nothing was done: below every -errno.
BAD_MACHINE = -5001
BAD_ARGUMENT = -5002
BAD_POINTER = -5003
NO_CODE = -5004
