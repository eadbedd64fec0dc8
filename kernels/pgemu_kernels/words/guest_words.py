"""What Python tells the kernels of a guest's address stream (pgemu_kernels.guest) and hears from them."""

from __future__ import annotations

import numpy as np

U = np.uint64

# --------------------------------------------------------------------------- the words of a TLB

# A cache of translations or entries: sets of ways, least recently used first to go.
CACHE_SETS = U(0)  # how many, less 1: a mask
CACHE_WAYS = U(1)  # 0: there is none
CACHE_BEGIN = U(2)  # word of a vCPU's area where the tags begin; stamps follow, and addresses of tables, if there are
CACHE_ENTRIES = U(3)  # sets * ways
CACHE_SIZES = U(4)  # a bit for each level of the leaves that it holds
CACHE_KINDS = U(5)  # KIND_DATA, KIND_FETCH: whose it is
CACHE_HELD = U(6)  # a bit for each level that entries were made of since the last flush
CACHE_WORDS = 7

KIND_DATA = U(1)
KIND_FETCH = U(2)

# The rows: paging-structure caches by the level of the entries that they hold, of the guest and of stage 2; guest
# physical addresses; then first-level TLBs, then second-level ones.
ROW_GUEST = U(0)  # + level - 2
ROW_STAGE2 = U(3)  # + level - 2
ROW_NESTED = U(6)
ROW_TLBS = U(7)

TLB_CLOCK = U(0)  # of the last use of anything
TLB_SECOND = U(1)  # row of the first second-level TLB
TLB_LAST = U(2)  # how many rows
TLB_VCPUS = U(3)  # how many have an area
TLB_AREA = U(4)  # where that of vCPU 0 begins,
TLB_AREA_WORDS = U(5)  # ... and how long each is
TLB_FLUSHES = U(6)  # flushes of all there is
TLB_SEEN = U(7)  # flushes of the machine's VMs that were seen
TLB_ROWS = U(8)  # where the rows begin

# An area begins with what was used last, of data and of fetches: a second use finds it most recently used.
AREA_PAGE = U(0)  # + kind - 1: tag of the 4K page
AREA_LEVEL = U(2)  # + kind - 1: of the entry
AREA_CACHES = 4  # where the caches begin

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
SUM_GUEST = U(0)  # entries of the guest's tables read by walks,
SUM_STAGE2 = U(1)  # ... of stage 2,
SUM_NESTED_HITS = U(2)  # guest physical addresses found in their cache,
SUM_NESTED = U(3)  # ... of so many
SUM_WORDS = 4
COUNT_WORDS = int(N_SUMS) + N_KINDS * SUM_WORDS

# --------------------------------------------------------------------------- looking up a batch

LOOK_AT = U(0)  # the access to go on with
LOOK_RECORD = U(1)  # the operation to go on with
LOOK_GUEST_FORMAT = U(2)  # rows of formats
LOOK_STAGE2_FORMAT = U(3)
LOOK_ROOT = U(4)  # of stage 2; 0: there is no stage 2
LOOK_PRIVATE_ROOT = U(5)  # of private memory, where that is another one
LOOK_DIRECT = U(6)  # the guest's tables lie at guest physical addresses of a memory of their own
LOOK_RUN = U(7)  # where the entry that runs operations of default machines begins; 0: Python runs them
LOOK_FULL = U(8)  # ... and the one for others
LOOK_WORDS = U(9)  # the record of a walk follows (table_words.W_*)

# --------------------------------------------------------------------------- which accesses to run

STREAM_AT = U(0)  # the access to go on with
STREAM_OUT = U(1)  # operations written
STREAM_FORMAT = U(2)  # row of the guest's format
STREAM_EPOCH = U(3)  # conversions by now
STREAM_RATE = U(4)  # of I/O, in 2**-32 for each access
STREAM_DUE = U(5)  # ... how much of the next one is due
STREAM_MODE = U(6)  # IO_*
STREAM_BOUNCE = U(7)  # frame of the first bounce buffer
STREAM_BUFFERS = U(8)  # how many pages of them
STREAM_NEXT = U(9)  # the one that is used next
STREAM_FLAGS = U(10)  # of the guest's faults: PRIVATE, or none
STREAM_HVA = U(11)  # host address of guest physical address 0
STREAM_IO = U(12)  # I/O by now
STREAM_TOUCHES = U(13)  # accesses that were written as operations,
STREAM_TABLES = U(14)  # ... table pages,
STREAM_BUFFER = U(15)  # ... bounce buffers, and pages that are accepted again
STREAM_CONVERSIONS = U(16)
STREAM_HOST = U(17)  # accesses of the host
STREAM_WORDS = 18

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
