"""What Python tells the kernels of a guest's address stream (pgemu_kernels.guest) and hears from them."""

from __future__ import annotations

import numpy as np

U = np.uint64

# --------------------------------------------------------------------------- the words of a TLB

# A cache of translations or entries: sets of ways, least recently used first to go.
G_SETS = U(0)  # how many, less 1: a mask
G_WAYS = U(1)  # 0: there is none
G_BEGIN = U(2)  # word of a vCPU's area where the tags begin; a stamp for each follows, of tables then their addresses
G_ENTRIES = U(3)  # sets * ways
G_SIZES = U(4)  # a bit for each level of the leaves that it holds
G_KINDS = U(5)  # KIND_DATA, KIND_FETCH: whose it is
G_HELD = U(6)  # a bit for each level that entries were made of since the last flush
G_WORDS = 7

KIND_DATA = U(1)
KIND_FETCH = U(2)

# The rows: paging-structure caches by the level of the entries that they hold, of the guest and of stage 2; guest
# physical addresses; then first-level TLBs, then second-level ones.
ROW_GUEST = U(0)  # + level - 2
ROW_STAGE2 = U(3)  # + level - 2
ROW_NESTED = U(6)
ROW_TLBS = U(7)

H_CLOCK = U(0)  # of the last use of anything
H_SECOND = U(1)  # row of the first second-level TLB
H_LAST = U(2)  # how many rows
H_VCPUS = U(3)  # how many have an area
H_AREA = U(4)  # where that of vCPU 0 begins,
H_AREA_WORDS = U(5)  # ... and how long each is
H_FLUSHES = U(6)  # flushes of all there is
H_SEEN = U(7)  # flushes of the machine's VMs that were seen
H_ROWS = U(8)  # where the rows begin

# An area begins with what was used last, of data and of fetches: a second use finds it most recently used.
A_PAGE = U(0)  # + kind - 1: tag of the 4K page
A_LEVEL = U(2)  # + kind - 1: of the entry
A_CACHES = 4  # where the caches begin

TAG_SPACE = U(45)  # bits of a tag below: the page number in units of the entry; the space from here on,
TAG_LEVEL = U(61)  # ... and the level from here on

# Counts: by what was accessed (read, write, fetch), by what was found, by level (0: no translation).
FOUND_FIRST = U(0)  # a first-level TLB,
FOUND_SECOND = U(1)  # ... a second-level one,
FOUND_NONE = U(2)  # ... or neither
N_FOUND = 3
N_LEVELS = 4
N_KINDS = 3
N_SUMS = U(N_KINDS * N_FOUND * N_LEVELS)  # then by what was accessed: the sums below
S_GUEST = U(0)  # entries of the guest's tables read by walks,
S_STAGE2 = U(1)  # ... of stage 2,
S_NESTED_HITS = U(2)  # guest physical addresses found in their cache,
S_NESTED = U(3)  # ... of so many
S_WORDS = 4
COUNT_WORDS = int(N_SUMS) + N_KINDS * S_WORDS

# --------------------------------------------------------------------------- looking up a batch

L_AT = U(0)  # the access to go on with
L_RECORD = U(1)  # the operation to go on with
L_GUEST_FORMAT = U(2)  # rows of formats
L_STAGE2_FORMAT = U(3)
L_ROOT = U(4)  # of stage 2; 0: there is no stage 2
L_PRIVATE_ROOT = U(5)  # of private memory, where that is another one
L_DIRECT = U(6)  # the guest's tables lie at guest physical addresses of a memory of their own
L_RUN = U(7)  # where the entry that runs operations of default machines begins; 0: Python runs them
L_FULL = U(8)  # ... and the one for others
L_WORDS = U(9)  # the record of a walk follows (table_words.W_*)

# --------------------------------------------------------------------------- which accesses to run

K_AT = U(0)  # the access to go on with
K_OUT = U(1)  # operations written
K_FORMAT = U(2)  # row of the guest's format
K_EPOCH = U(3)  # conversions by now
K_RATE = U(4)  # of I/O, in 2**-32 for each access
K_DUE = U(5)  # ... how much of the next one is due
K_MODE = U(6)  # IO_*
K_BOUNCE = U(7)  # frame of the first bounce buffer
K_BUFFERS = U(8)  # how many pages of them
K_NEXT = U(9)  # the one that is used next
K_FLAGS = U(10)  # of the guest's faults: PRIVATE, or none
K_HVA = U(11)  # host address of guest physical address 0
K_IO = U(12)  # I/O by now
K_TOUCHES = U(13)  # accesses that were written as operations,
K_TABLES = U(14)  # ... table pages,
K_BUFFER = U(15)  # ... bounce buffers, and pages that are accepted again
K_CONVERSIONS = U(16)
K_HOST = U(17)  # accesses of the host
K_WORDS = 18

IO_BOUNCE = U(0)  # through buffers that stay shared
IO_CONVERT = U(1)  # the page itself becomes shared, and private again
IO_DIRECT = U(2)  # the host uses the page as it is

# What a page of guest memory was used for since its GiB was converted last.
USED = U(1)
WRITTEN = U(2)
EXECUTED = U(4)
USED_BY_HOST = U(8)
USES = U(4)  # bits of them; the epoch of the GiB is above

MEMO = U(1 << 12)  # 2M regions of guest virtual addresses whose tables are known to be touched: a tag and an epoch each
MOST_AN_ACCESS = U(16)  # operations that one access can make, rounded up
