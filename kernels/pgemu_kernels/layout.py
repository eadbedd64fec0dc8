"""The numbers that kernels and Python share: operations, results, events, and who owns which word.

No numba here, so that trace inspection and `--help` need no compiler. A row field `X_NAME` is the index
of a 64-bit word inside row X; rows of one kind lie one after the other. Fields are uint64 because a
kernel that adds an int to a uint64 gets an int64.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

import numpy as np

U = np.uint64

# --------------------------------------------------------------------------- pages and levels

PAGE_4K = 4096
PAGE_2M = PAGE_4K * 512
PAGE_1G = PAGE_2M * 512
ORDER_2M = 9
ORDER_1G = 18

# --------------------------------------------------------------------------- operations


class Operation(IntEnum):
    """What one trace record asks for (column `op`). Codes are part of the trace format."""

    HOST_FAULT = 1
    GUEST_FAULT = 2
    CONVERT = 3
    PUNCH_HOLE = 4
    ALLOCATE = 5
    MMAP = 6
    MUNMAP = 7
    ZAP = 8
    BIND = 9
    UNBIND = 10
    PIN = 11
    UNPIN = 12
    GET = 13
    PUT = 14
    DMA_MAP = 15
    DMA_UNMAP = 16
    DMA_ACCESS = 17
    NESTED_MAP = 18
    NESTED_UNMAP = 19
    MEMORY_FAILURE = 20
    CLOSE = 21
    VM_EXIT = 22
    GUEST_ACCESS = 23
    PROTECT = 24
    FORK = 25
    EXIT = 26
    MEMSLOT = 27
    DIRTY_LOG = 28
    ATTRIBUTES = 29
    PREFAULT = 30
    POPULATE = 31
    READ_SMAPS = 32
    REVOKE = 33
    RESTORE = 34
    GUARD_INSTALL = 35
    GUARD_REMOVE = 36
    REMAP = 37
    POOL_RESIZE = 38
    POOL_DEMOTE = 39
    FOLIO_ALLOCATE = 40
    FOLIO_FREE = 41
    VMEMMAP_OPTIMIZE = 42
    VMEMMAP_RESTORE = 43
    FOLIO_SPLIT = 44
    FOLIO_MERGE = 45
    FOLIO_REFERENCE = 46
    FOLIO_FREEZE = 47
    DISSOLVE = 48
    POISON = 49
    VMEMMAP_STORE = 50
    RELEASE = 51
    LRU_DRAIN = 52
    WORK = 53
    MEMORY_POLICY = 54
    DIRTY_LOGGING = 55


OPERATIONS = 64  # room in the tables that have a row per operation


class Flag(IntFlag):
    """Bits of the trace column `flags`; which operation reads which is told in pgemu.trace.schema."""

    WRITE = 1
    EXEC = 2
    PRIVATE = 4
    SHARED = 8
    READ_ONLY = 16
    MADVISE = 32
    POPULATE = 64
    READ = 128
    LOG_DIRTY_PAGES = 64  # of a memory slot
    NORESERVE = 16  # of MMAP, where READ_ONLY is told by READ, WRITE and EXEC
    LOCKED = 32  # of MMAP
    LONGTERM = 64  # of PIN: FOLL_LONGTERM


# --------------------------------------------------------------------------- results

# Guest faults: arch/x86/kvm/mmu/mmu_internal.h, enum of RET_PF_*.
RET_PF_CONTINUE = 0
RET_PF_RETRY = 1
RET_PF_EMULATE = 2
RET_PF_WRITE_PROTECTED = 3
RET_PF_INVALID = 4
RET_PF_FIXED = 5
RET_PF_SPURIOUS = 6

# Host faults: include/linux/mm_types.h, enum vm_fault_reason. 0 = the entry was there already.
VM_FAULT_OOM = 0x1
VM_FAULT_SIGBUS = 0x2
VM_FAULT_SIGSEGV = 0x40
VM_FAULT_NOPAGE = 0x100
VM_FAULT_LOCKED = 0x200
VM_FAULT_RETRY = 0x400

ENOENT = 2
EBADF = 9
EAGAIN = 11
ENOMEM = 12
EACCES = 13
EFAULT = 14
EBUSY = 16
EEXIST = 17
ENODEV = 19
EINVAL = 22
ENOSPC = 28
ERANGE = 34
ENOTTY = 25
EBADFD = 77
EOPNOTSUPP = 95
NEVER = 127  # status -NEVER: the kernel's function would not return (no errno; one defect does that)

# A tally row holds one counter per result: 0..15 as they are, VM_FAULT bits by their number,
# errors by their errno.
TALLY_FAULT_BIT = 16
TALLY_ERRNO = 32
TALLY_SLOTS = 160

# --------------------------------------------------------------------------- designs and their steps

RESTRUCTURE = 0
PFNMAP = 1

# Orders of steps of restructure's conversion: which patches' (R_CONVERT_ORDER).
CONVERT_RFC2 = U(0)
CONVERT_FIXUP = U(1)
CONVERT_JAN2026 = U(2)
CONVERT_NEXT4K = U(3)


class Defect(IntFlag):
    """Mistakes of posted code that a machine can be given (R_DEFECTS); without its bit the code is as fixed."""

    ROLLBACK_AT_ZERO = 1  # rfc2: the rollback loop counts an unsigned index down and never ends at page 0
    ALLOCATION_RACE = 2  # two faults in one huge page both take a page of the subpool; the loser gets -ENOMEM
    MAPPING_ORDER = 4  # Dec 2025: looks at [index, index + nr) for private pages, not at the huge page around it
    INSERT_UNLOCKED = 8  # pfnmap: the entry is inserted after the invalidate_lock was released
    PUNCH_KEEPS_ENTRIES = 16  # pfnmap: truncation leaves special entries alone, as it has no folio to find them by
    HUGE_OVER_PRIVATE = 32  # 2022: a shared fault takes its level from the host alone and maps over private 4K pages


GO = 0  # what a step returns: the next one follows,
STOP = 1  # ... the operation has ended, its result is in the record,
BLOCKED = 2  # ... or a lock is held by another actor and nothing was done


# --------------------------------------------------------------------------- events


class Event(IntEnum):
    """What `charge` counts. Prices are in pgemu.cost, one per event, each with its source."""

    HOST_FAULT = 0
    GUEST_FAULT = 1
    CONVERT_IOCTL = 2
    SYSCALL = 3
    TABLE_PAGE_ALLOCATED = 4
    TABLE_PAGE_FREED = 5
    LEAF_WRITTEN = 6
    LEAF_CLEARED = 7
    SPTE_WRITTEN = 8
    SPTE_CLEARED = 9
    RMAP_CHANGED = 10
    TLB_FLUSH_MM = 11
    TLB_FLUSH_VM = 12
    TLB_FLUSH_KERNEL = 13
    HUGE_FOLIO_ALLOCATED = 14
    HUGE_FOLIO_FREED = 15
    PAGE_ZEROED = 16
    FOLIO_ZEROED_PAGES = 17
    VMEMMAP_PAGE_RESTORED = 18
    VMEMMAP_PAGE_FREED = 19
    STRUCT_PAGE_WRITTEN = 20
    STRUCT_PAGE_BYTES = 21
    FOLIO_GATE_CHECKED = 22
    PAGE_CACHE_STORED = 23
    ATTRIBUTES_STORED = 24
    FOLIO_SPLIT = 25
    FOLIO_MERGED = 26
    FREEZE_SPIN = 27
    NOTIFIER_CALL = 28
    DEFERRED_MERGE = 29
    TLB_FLUSH_PAGE = 30
    TLB_FLUSH_RANGE = 31
    PAGE_COPIED = 32
    XARRAY_NODE_ALLOCATED = 33
    XARRAY_NODE_FREED = 34
    METADATA_STASHED = 35
    VMEMMAP_HEAD_COPIED = 36
    RCU_SYNCHRONIZED = 37
    VMEMMAP_FAULT = 38
    REFERENCE_CHANGED = 39
    PAGE_PINNED = 40
    LRU_CACHE_ADDED = 41
    LRU_CACHE_DRAINED = 42
    WORK_DONE = 43
    SPTE_SPLIT = 44


EVENTS = 48  # room in a counter row

# One price row: picoseconds. An event charged n times costs fixed + each * n; per-CPU parts are
# folded into fixed when the machine is made. Every price is a band, low and high.
PRICE_FIXED_LOW = U(0)
PRICE_FIXED_HIGH = U(1)
PRICE_EACH_LOW = U(2)
PRICE_EACH_HIGH = U(3)
PRICE_WORDS = 4

# Log-linear histogram: eight buckets per power of two of nanoseconds.
HISTOGRAM_BUCKETS = 384

# --------------------------------------------------------------------------- gauges (value, peak)


class Gauge(IntEnum):
    """Quantities that rise and fall; `gauges[2 * g]` is the value, `gauges[2 * g + 1]` the peak (where kept)."""

    FRAMES_USED = 0
    HOST_TABLES = 1
    STAGE2_TABLES = 2
    KERNEL_TABLES = 3
    VMEMMAP_PAGES = 4
    CONTENT_FRAMES = 5
    HOST_LEAVES_4K = 6
    HOST_LEAVES_2M = 7
    HOST_LEAVES_1G = 8
    STAGE2_LEAVES_4K = 9
    STAGE2_LEAVES_2M = 10
    STAGE2_LEAVES_1G = 11
    POOL_FREE = 12
    BLOCKS_HUGE = 13
    BLOCKS_SPLIT = 14
    BLOCKS_ZOMBIE = 15
    ANONYMOUS_PAGES = 16
    CACHE_NODES = 17
    OTHER_POOL_FREE = 18
    HUGETLB_PAGES = 19  # pages of the first pool that hugetlbfs files and private mappings hold
    PAGE_CACHE_PAGES = 20  # 4K pages of guest_memfd inodes of 4K folios
    XARRAY_NODES = 21  # nodes that the page cache of split folios takes, 576 bytes each
    MEMMAP_PAGES = 22  # vmemmap pages that came from the page allocator (nr_memmap_pages)
    MEMMAP_BOOT_PAGES = 23  # ... and from the boot allocator (nr_memmap_boot_pages)
    BUDDY_BLOCKS = 24  # 2M blocks of the HugeTLB zone that are in no pool
    PAGES_PINNED = 25  # pins, of 4K pages
    PAGES_LRU_CACHED = 26  # references that per-CPU batches of folios to be added to an LRU list hold
    WORK_PENDING = 27  # blocks that the worker has something to do for
    BLOCKS_PARTLY = 28  # 1G blocks split to 2M folios, some of these to 4K


GAUGES = 32

# --------------------------------------------------------------------------- rows

# regs: named scalars of the machine, uint64
R_DESIGN = U(0)
R_FRAMES = U(1)  # metadata zone: frames that exist
R_FRAMES_LIMIT = U(2)  # ... and how many of them may be in use at once
R_FRESH = U(3)  # frames handed out that were never handed out before
R_FREE = U(4)  # frames on the stack of freed ones
R_SEED_MULTIPLIER = U(5)  # order of fresh frames: (i * multiplier + offset) mod R_FRAMES
R_SEED_OFFSET = U(6)
R_POOL_BASE = U(7)  # first PFN of the HugeTLB zone
R_ORDER = U(10)  # 9 or 18: the order of a huge page of the pool; 0: guest memory is 4K pages of the page allocator
R_HVO = U(11)
R_KERNEL_ROOT = U(12)  # physical address of the kernel's top table
R_VMEMMAP = U(13)  # virtual address of struct page 0
R_HOST_FORMAT = U(15)  # row of `formats` for process page tables
R_STAGE2_FORMAT = U(16)
R_INODES = U(17)
R_VMAS = U(18)
R_MEMSLOTS = U(19)
R_SPACES = U(20)
R_VMS = U(21)
R_LAST_VMA = U(22)
R_LAST_MEMSLOT = U(23)
R_BLOCKS = U(24)  # block rows handed out
R_WORDS = U(25)  # shareability words handed out
R_COUNTER_ROW = U(26)
R_PAGE_FLAGS = U(27)  # zone and last_cpupid bits of every struct page
R_MASK_TAILS = U(28)  # 1: compound_info is a mask (7.1 and later), 0: a pointer
R_RESET_STRUCT_PAGES = U(29)  # struct pages rewritten in each restored vmemmap page, before 7.1
R_DONTNEED_FREES_TABLES = U(30)  # CONFIG_PT_RECLAIM, 6.14 and later
R_ZERO_PAGE = U(31)  # 1: zero 4K at a time, 0: the whole folio
R_ZAP_BOTH_KINDS = U(32)  # a rounded zap drops the leaves of both kinds where they share a root
R_NOTIFIER = U(33)  # unmapping host entries runs KVM's MMU notifier
R_DONTNEED_PFNMAP = U(34)  # 1: MADV_DONTNEED works on VM_PFNMAP (no kernel does)
R_BROKEN = U(35)  # rules found broken
R_BROKEN_FIRST = U(36)  # the first one: kind << 48 | page index
R_CHECK = U(37)  # 1: check the invariants an operation touches after it
R_FAULT_REFERENCES = U(38)  # references held by faults under way
R_EXTRA_REFERENCES = U(39)  # transient references, taken by GET: the sum over R_TRANSIENT
R_FRAMES_MASK = U(40)
R_FREE_STACK = U(41)  # where the freed frames lie in `state`
R_BLOCK_ROWS = U(43)
R_WORD_ROWS = U(44)
R_ZEROED_ROWS = U(45)
R_CONTENTS = U(46)  # where the guest frames' contents lie in `counts`
R_TRANSIENT = U(61)  # ... and how many transient references each of them has
R_SHARED = U(47)  # ... and the shared pages per 2M and 1G
R_SHARED_USED = U(48)
R_BOOT_FRAMES = U(49)  # frames behind the others, for the vmemmap that the boot allocator gives
R_FOLIO_6_12 = U(50)  # 1: mapcounts and page count of a folio where 6.12 has them
R_ORDINARY = U(51)  # 1: there are VMAs, memslots or inodes of ordinary kinds (routing.py)
R_FORMATS = U(52)  # rows of formats in use
R_ZERO_FRAME = U(58)  # the zero page's frame; 0 until the first read of anonymous memory
R_PTI = U(59)  # 1: page-table isolation
R_CONTIGUOUS = U(88)  # first of CONTIGUOUS_FRAMES frames from which runs are taken: roots of several tables
R_CONTIGUOUS_MAP = U(89)  # where the bits of those in use lie in `state`
R_RECOVER_HUGE = U(80)  # 1: dirty logging off puts huge leaves back in place, 0: it drops the small ones
R_GMEM_MMAP = U(81)  # 1: guest_memfd can be mapped, and serves VMs without private memory (6.18)
R_ANON_VMAS = U(64)  # anon_vmas made so far: the next one's number less one
R_GATHER_START = U(65)  # struct mmu_gather of the operation under way: lowest address cleared,
R_GATHER_END = U(66)  # ... end of the highest,
R_GATHER_SHIFT = U(67)  # ... smallest page size cleared (12, 21 or 30),
R_GATHER_TABLES = U(68)  # ... and tables freed
R_GUARDS = U(69)  # 1: MADV_GUARD_INSTALL exists (6.13)
R_HSTATE = U(70)  # row of the hstate that the designs' inodes take their huge pages from
R_NODES = U(71)  # NUMA nodes
R_GUEST_PAGES = U(72)  # 4K pages of the HugeTLB zone, all nodes, from R_POOL_BASE on
R_OPTIMIZE_VMEMMAP = U(73)  # vm.hugetlb_optimize_vmemmap: huge pages that join a pool are optimised
R_HUGETLB_CGROUP = U(74)  # 1: CONFIG_CGROUP_HUGETLB, folios in use name their cgroup
R_NODE_SHIFT = U(75)  # where the node begins in page->flags; 0: no such field
R_TAIL_FLAGS = U(76)  # flags of the struct pages of a shared tail page made at run time, node 0
R_BOOT_MARKS = U(77)  # formats.BootMarks: how the boot allocator left the vmemmap of 1G pages
R_POISONED = U(78)  # rows of poisoned pages in use
R_SERIES = U(79)  # SERIES_*: whose split and merge of folios
R_SUBPOOLS = U(82)  # subpool rows handed out
R_STASHED = U(83)  # bytes of metadata stashed (series rfc2)
R_NODE_SLOTS = U(84)  # free slots in frames of xarray nodes
R_HWPOISON = U(60)  # PG_hwpoison; 0 without CONFIG_MEMORY_FAILURE
R_NODE_FRAMES = U(85)  # the first of these frames and those of stashes, chained through their first words; 0: none
R_VMEMMAP_PAGE = U(90)  # bits of a 4K entry of the vmemmap, read-write and read-only, and of a 2M leaf
R_VMEMMAP_READ_ONLY = U(91)
R_VMEMMAP_LARGE = U(92)
R_BOOT_NEXT = U(93)  # frames of boot handed out
R_FREED_CHAIN = U(94)  # vmemmap pages to be freed after the flush of a batch, chained through their first words
R_DEFERRED_STRUCT_PAGES = U(86)  # 1: CONFIG_DEFERRED_STRUCT_PAGE_INIT
R_VIRTUAL_INDEX = U(87)  # 1: the index of a private huge page is that of its address
R_BOOT_ASCENDING = U(95)  # 1: the lowest 1G page of boot is the first in its free list
R_LRU_REFS = U(62)  # where MGLRU counts references in page->flags; 0: no MGLRU
R_MARKS_ZAPPED = U(63)  # 1: KVM also marks a page accessed when it drops or splits an accessed leaf (6.12)
R_FULL = U(96)  # 1: not all of what follows is as at first: operations of the designs go to designs.run_designs
R_CONVERT_ORDER = U(97)  # CONVERT_*
R_CONVERT_BY_BLOCK = U(98)  # 1: a conversion is done one huge page at a time, 0: all or nothing
R_SPLIT_TO_2M = U(99)  # 1: 1G -> 2M -> 4K, only the touched 2M pages to 4K (what-if)
R_MERGE_LAZY = U(100)  # 1: blocks that became all private are merged by the worker
R_FLUSH_BATCHED = U(101)  # 1: one flush of each process, VM and of the kernel per conversion
R_DEFECTS = U(102)  # Defect
R_LRU_CACHE = U(103)  # 1: folios of order 0 that join the page cache go through per-CPU batches, which hold references
R_LRU_CPUS = U(104)  # CPUs with a batch: 1 .. LRU_CPUS
R_WORK_QUEUED = U(105)  # 1: work items wait for the operation WORK, 0: they run at once
R_PUNCH_REFUSES = U(106)  # 1: a hole that is not aligned to huge pages is -EINVAL, 0: partial ones are zeroed
R_HOST_HUGE = U(107)  # 1: pfnmap inserts 2M and 1G entries where the block is all shared
R_DIRTY_LOG_GMEM = U(108)  # 1: slots of guest_memfd may have KVM_MEM_LOG_DIRTY_PAGES, which KVM refuses
R_IN_PLACE = U(109)  # 0: gmem_in_place_conversion is off: conversions are -ENOTTY
R_PINS = U(110)  # rows of pins in use
R_POLICIES = U(111)  # rows of memory policies in use
R_TASK_POLICY = U(112)  # policy of the task that faults: mode << 8 | node mask (MPOL_*); 0: default
R_KERNEL_UNFLUSHED = U(115)  # pages of the vmemmap that a flush is owed for (R_FLUSH_BATCHED)
R_FLUSHES_HELD = U(118)  # 1: a conversion with R_FLUSH_BATCHED is at work: its flushes are owed until its end
R_FOLIOS_IN_HAND = U(119)  # huge pages that faults have taken from the pool and not yet put in a page cache
R_WORK_LISTS = U(120)  # where a bit per page of the inodes lies in `state`: to be converted (order rfc2)
R_HOLDERS_OFF = U(121)  # 1: a recount is under way that has taken pins, LRU batches and faults off the references
R_WORD_COUNT = 128
CONTIGUOUS_FRAMES = 1024

# formats: uint64 rows. Words below 16 are what the operations of processes and VMs write; the others are
# what a walker needs to know, filled from pgemu_kernels.formats.PageFormat. Levels: 1 = 4K .. 5.
F_PRESENT = U(0)  # an entry is present if any of these bits is set
F_LARGE = U(1)  # above level 1, an entry with this bit is a leaf (x86 families; others: F_LEAF_MASK)
F_ADDRESS = U(2)  # bits of an entry that hold a physical address
F_TABLE = U(3)  # bits of an entry that points to a table
F_LEAF_4K = U(4)  # bits of a writable leaf, by level
F_LEAF_2M = U(5)
F_LEAF_1G = U(6)
F_EMPTY = U(7)  # value of an entry that maps nothing
F_SPECIAL_4K = U(8)  # host only: vmf_insert_pfn() into a writable VMA
F_SPECIAL_4K_RO = U(9)
F_LEAF_4K_RO = U(10)
F_TABLE_TOP = U(11)  # bits of a table entry in the top table (page-table isolation adds no-execute)
F_LEVELS = U(16)  # level of the top table: 3, 4 or 5
F_ROOT_BITS = U(17)  # index bits of the top table: 9, more where root tables are concatenated
F_INPUT_BITS = U(18)  # bits of an input address
F_SIGN_EXTENDED = U(19)  # 1: the bits above F_INPUT_BITS repeat the highest one (canonical addresses)
F_LEAF_MASK = U(20)  # at levels 2 .. F_LARGEST_LEAF a present entry is a leaf if entry & mask == value
F_LEAF_VALUE = U(21)
F_PAGE_MASK = U(22)  # at level 1 a present entry is a leaf if entry & mask == value, else reserved
F_PAGE_VALUE = U(23)
F_LARGEST_LEAF = U(24)
F_RESERVED_LEAF = U(24)  # + level (1 .. 5): bits that a leaf of this level must not have
F_RESERVED_TABLE = U(29)  # + level (2 .. 5): the same of a table entry
F_INVERT = U(35)  # rights = (entry ^ invert), ANDed over the levels
F_FOLD = U(36)  # before that, in a leaf: entry ^= entry >> 1 & fold (Arm's two-bit XN)
F_TABLE_RIGHTS = U(37)  # rights that table entries never take away (all, where only leaves have permissions)
F_BAD_LOW = U(38)  # bit n: low three bits n of a present entry are a misconfiguration
F_BAD_MEMORY_TYPE = U(39)  # bit n: bits 5:3 = n of a leaf are a misconfiguration
F_FAMILY = U(40)  # formats.Family: how faults are told
F_ACCESSED = U(41)
F_DIRTY = U(42)
F_FROZEN = U(43)  # what an entry holds while its subtree is torn down or replaced
F_BREAK_BEFORE_MAKE = U(44)  # 1: a valid entry may not be replaced by another valid one without a flush between
F_FLUSH = U(45)  # formats.FlushRule
F_KEY_SHIFT = U(46)  # where a leaf's protection key begins; 0: no keys
# Present as Linux sees it: KVM's own mark (bit 11) in stage 2, so that a cached MMIO entry is none; else F_PRESENT.
F_MMU_PRESENT = U(55)
F_WRITE = U(56)  # stage 2: the bit without which the hardware refuses a write
F_WRITABLE_MARKS = U(57)  # ... KVM's host-writable and MMU-writable bits
F_MMU_WRITABLE = U(58)  # ... the second of them
F_EXECUTE = U(59)  # ... the bits without which a fetch is refused; 0 where leaves are executable without
F_MEMORY_TYPE = U(60)  # ... the bits that are clear in a leaf over a device
F_MMIO_VALUE = U(61)  # ... what a cached MMIO access holds beside the guest frame and the generation
F_MMIO_GUARD = U(62)  # ... address bits set in it against L1TF, the guest's moved up by five
F_PAT_PAGE = U(64)  # the memory-type bit of a 4K leaf that larger leaves have elsewhere; 0: none
F_PAT_LARGE = U(65)  # ... and where they have it
F_BREAK_BITS = U(66)  # bits of a valid leaf whose change needs break-before-make
F_SOFTWARE = U(67)  # bits that the hardware ignores and Linux uses: their change needs no flush
F_RANGE_FLUSH = U(68)  # bit 0: there is an invalidation by range; bit 1: an unmap defers to one of them
F_WORDS = 80

# edits: the one row that `edits.edit` takes, uint64. Words below 16 are the request, the others the answer and scratch.
E_OP = U(0)  # Edit
E_FORMAT = U(1)  # row of formats
E_ROOT = U(2)  # physical address of the root
E_LENGTH = U(3)  # bytes, at each address
E_LEVEL = U(4)  # highest level of a leaf (map), level to split to, of the leaf (collapse), of the entry (store)
E_SET = U(5)  # bits of a 4K leaf: all of them (map), those to set (protect); the entry (store)
E_CLEAR = U(6)  # bits of a 4K leaf to clear
E_FLAGS = U(7)  # EDIT_*
E_FLUSH_START = U(16)  # what must be flushed, all told; no sign extension
E_FLUSH_END = U(17)  # 0: nothing
E_FLUSH_LEVEL = U(18)  # smallest level among it
E_FREED = U(19)  # 1: tables were freed
E_PENDING_START = U(20)  # what is not flushed yet
E_PENDING_END = U(21)
E_PENDING_LEVEL = U(22)
E_RECORDS = U(23)  # records that the log asked for
E_FREED_LIST = U(24)  # frames of tables freed, to be given back after the flush: chained through `counts`
E_WRITTEN = U(25)  # leaves written and cleared, not charged yet
E_CLEARED = U(26)
E_FOUND = U(27)  # leaves that the edit came upon, and those that it changed
E_CHANGED = U(28)
E_OFFSET = U(29)  # address up to which an edit came
E_QUICK = U(30)  # map: bits of a leaf where nothing but the addresses is left to check; 0: everything is
E_QUICK_PHYSICAL = U(31)  # ... and the bits that its physical address may have
E_CURSOR = U(32)  # + level: next slot of a table being torn down
E_CURSOR_END = U(40)
E_WORDS = 48


class Edit(IntEnum):
    """What an edit of a page table does."""

    CREATE = 1
    DESTROY = 2
    MAP = 3
    UNMAP = 4
    PROTECT = 5
    CLEAR_ACCESSED = 6
    CLEAR_DIRTY = 7
    SPLIT = 8
    COLLAPSE = 9
    FREE_TABLES = 10
    STORE = 11


EDIT_EXACT = U(1)  # map: one leaf of E_LEVEL at each address
EDIT_REPLACE = U(2)  # map: what is mapped already goes
EDIT_SPLIT = U(4)  # a leaf that the range covers in part is split; otherwise it is edited whole
EDIT_FREE = U(8)  # unmap: tables that are empty are freed
EDIT_FREE_COVERED = U(16)  # ... or only last-level tables that the range covers whole


class LogKind(IntEnum):
    """Kind of a record of an edit's log, in bits 7:0 of its first word; bits 15:8 are the level of the entry."""

    READ = 0  # address of the entry, its value
    WRITE = 1
    FLUSH = 2  # by address or range: first input address, bytes; level: stride
    FLUSH_ALL = 3  # everything of the process or VM, because of this range
    FILL = 4  # address of a new table, the value in its 512 entries
    FREE = 5  # address of a table given back


LOG_WORDS = 3  # words of a record: kind and level, address, value

# recount: words of the scratch array `found` (int64): leaves by level, tables, then
FOUND_TABLES = U(3)
FOUND_MAPPED = U(4)  # entries that map 4K pages of memory
FOUND_MAPCOUNTS = U(5)  # ... and what the pages' own counts add up to
FOUND_HUGE_MAPPED = U(6)  # entries that map HugeTLB pages, in tables counted once
FOUND_ANONYMOUS = U(7)
FOUND_CACHED = U(8)
FOUND_NODES = U(9)
FOUND_RSS = U(10)
FOUND_WORDS = 16

# access rows: what one kind of access asks of a walk; made by pgemu.translation.Access
X_NEED = U(0)  # rights that must be there
X_FORBID = U(1)  # rights that must not be there (SMEP, SMAP)
X_KEYS_USER = U(2)  # bit k: protection key k denies the access to a user page
X_KEYS_SUPERVISOR = U(3)
X_USER = U(4)  # the right that makes a page a user page
X_ERROR = U(5)  # bits of the fault code that do not depend on the outcome
X_SET_TABLE = U(6)  # bits that the hardware sets in every table entry of a walk that succeeds
X_SET_LEAF = U(7)  # ... and in the leaf
X_FLAG = U(8)  # bits that the leaf must have, else access flag fault (Arm without hardware update)
X_DIRTY_IF = U(9)  # a leaf with this bit (Arm DBM) ...
X_DIRTY_GIVES = U(10)  # ... has this right, and gets the bit set
X_RESERVED = U(11)  # reserved bits that fault (none where hardware ignores them)
# An entry with entry & mask == value is one that this access passes without a fault, an update or a second look.
X_TABLE_MASK = U(10)  # + level (2 .. 5)
X_TABLE_VALUE = U(14)  # + level (2 .. 5)
X_LEAF_MASK = U(19)  # + level (1 .. 3)
X_LEAF_VALUE = U(22)  # + level (1 .. 3)
X_WORDS = 32
ACCESS_ROWS = 8  # rows of one stage: six kinds of access, and the reading and writing of guest tables
X_ROW_TABLE_READ = U(6)
X_ROW_TABLE_WRITE = U(7)


class WalkStatus(IntEnum):
    """How a walk ended."""

    OK = 0
    NOT_PRESENT = 1
    RESERVED = 2  # a reserved bit, or a reserved kind of entry, in an entry that is present
    PERMISSION = 3
    PROTECTION_KEY = 4  # nothing but a protection key denies the access
    MISCONFIGURED = 5  # EPT misconfiguration
    ACCESS_FLAG = 6  # Arm without hardware update of the access flag
    NOT_CANONICAL = 7  # general protection, no page fault
    ADDRESS_SIZE = 8  # beyond the input addresses of the format
    OUTSIDE_MEMORY = 9  # a table lies where the machine has no memory (inference: hardware says nothing)


class WalkStage(IntEnum):
    """Where a nested walk failed."""

    NONE = 0
    GUEST = 1  # in the guest's own tables
    TABLE = 2  # in stage 2, at the address of a guest table's entry
    FINAL = 3  # in stage 2, at the address that the guest's tables gave


# walk records: what one exact walk leaves in a scratch array
W_STATUS = U(0)
W_LEVEL = U(1)
W_ERROR = U(2)
W_PHYSICAL = U(3)
W_RIGHTS = U(4)
W_COUNT = U(5)  # entries read
W_SLOT = U(6)  # + n: index in `ram` of the n-th
W_ENTRY = U(11)  # + n: its physical address
W_WORDS = 16
WALK_READS = 5  # room per address in the lists of references
NESTED_READS = 35
NESTED_WRITES = 60
WALK_BLOCK = 64  # walks that go step by step together
WALK_SCRATCH = W_WORDS + 2 * WALK_BLOCK
NESTED_SCRATCH = 2 * W_WORDS + 8 + 3 * WALK_BLOCK

# inodes: uint64 rows
I_PAGES = U(0)
I_BLOCK = U(1)  # where its first block row begins in `state`
I_BLOCKS = U(2)
I_WORD = U(3)  # where its shareability bits begin in `state`
I_PMD = U(4)  # where its shared pages per 2M begin in `counts`
I_PUD = U(5)  # ... and per 1G
I_OPEN = U(6)
I_LOCK = U(7)  # invalidate_lock: readers, or LOCK_WRITER
I_ZEROED = U(8)  # where its bits of zeroed pages begin in `state`, where zeroing goes by page
I_KIND = U(9)  # INODE_*
I_CACHE = U(10)  # ordinary kinds: root of the page cache, physical address; 0 = empty
I_BASE = U(11)  # device: first PFN of the region
I_ORDER = U(12)  # HugeTLB: 9 or 18
I_FLAGS = U(13)
I_REFERENCES = U(14)  # ordinary kinds: descriptors (0 or 1) and VMAs that keep it
I_SUBPOOL = U(16)  # row of its subpool + 1; 0 = none
I_CACHE_BITS = U(15)  # device: memory type bits of its entries
I_WORDS = 24
INODE_GUEST_MEMFD = U(0)  # over HugeTLB pages, what the two designs are about
INODE_HUGETLB = U(1)  # a file of hugetlbfs, or what mmap(MAP_HUGETLB) makes
INODE_GUEST_MEMFD_4K = U(2)  # guest_memfd as merged: order-0 folios
INODE_DEVICE = U(3)  # a region of PFNs without struct pages
INODE_REVOKED = U(1)  # I_FLAGS: the device's memory is off, faults end in SIGBUS
INODE_REMAP = U(2)  # its driver maps everything at mmap, by remap_pfn_range()
INODE_MMAP = U(4)  # guest_memfd: GUEST_MEMFD_FLAG_MMAP
INODE_INIT_SHARED = U(8)  # guest_memfd: GUEST_MEMFD_FLAG_INIT_SHARED
INODE_WHOLE_MAPPINGS = U(16)  # guest_memfd as in RFC v2 with HugeTLB: its mmap wants whole huge pages
INODE_BIND_COMMITS = U(32)  # guest_memfd as in linux-next: an overlapping binding is found by the commit
LOCK_WRITER = U(1 << 32)

# hstates: one row per size of huge page: 2M, 1G. include/linux/hugetlb.h:struct hstate
H_ORDER = U(0)
H_PAGES = U(1)  # nr_huge_pages
H_FREE = U(2)  # free_huge_pages
H_RESERVED = U(3)  # resv_huge_pages
H_SURPLUS = U(4)  # surplus_huge_pages
H_OVERCOMMIT = U(5)  # nr_overcommit_huge_pages
H_NEXT_ALLOCATE = U(6)  # node that the next page is allocated on, round robin
H_NEXT_FREE = U(7)  # ... and freed from
H_ACTIVE = U(8)  # hugepage_activelist: next, prev
H_LIST = U(10)  # a list of pages on their way from one place to another: next, prev
H_NODE = U(12)  # + node * H_NODE_WORDS
H_NODE_FREE_LIST = U(0)  # hugepage_freelists[node]: next, prev
H_NODE_PAGES = U(2)  # nr_huge_pages_node[node]
H_NODE_FREE = U(3)
H_NODE_SURPLUS = U(4)
H_NODE_TAIL_PAGE = U(5)  # PFN of the shared vmemmap tail page, kernels from 7.1 on; 0: none yet
H_NODE_WORDS = 6
H_WORDS = 24
HSTATES = 2  # a third row, with H_PAGES and H_FREE, counts the page allocator's 4K pages where R_ORDER is 0
FREE_ORDERS = 9  # orders 0 to 8: blocks of order 9 have a bit (N_BLOCKS)
HSTATES_ADDRESS = 0xFFFF_FFFF_8200_0000  # a model address: where the words of these rows lie in the kernel's image

# nodes: one row per NUMA node
N_BASE = U(0)  # first PFN of its part of the HugeTLB zone, a multiple of 1 GiB
N_PAGES = U(1)  # 4K pages
# Where three rows of a bit per 2M block begin in `state`: those free, with the page allocator; those of 2M pages that
# FOLIO_SPLIT split; the first ones of such 1G pages.
N_BLOCKS = U(2)
N_HINT = U(3)  # no block below this one is free
N_GIGANTIC = U(4)  # 1G pages that the boot allocator set aside
N_RESERVED = U(5)  # 4K pages behind them that the kernel itself uses
N_HUGE = U(6)  # 2M pages behind these, in their pool from boot on
N_WORDS = 8
NODES = 2

# subpools: mm/hugetlb.c:struct hugepage_subpool
P_LIVE = U(0)
P_HSTATE = U(1)
P_MAX = U(2)  # all ones: no limit
P_USED = U(3)
P_MIN = U(4)  # all ones: no minimum
P_RESERVED = U(5)
P_WORDS = 8
SUBPOOLS = 64

SUBPOOLS_ADDRESS = 0xFFFF_8880_0020_0000  # a model address, 64 bytes each
CGROUP_ADDRESS = 0xFFFF_8880_0030_0000  # a model address: the root hugetlb cgroup, of which every folio in use is
POISONED_ADDRESS = 0xFFFF_8880_0031_0000  # a model address: raw_hwp_page objects, 16 bytes each

# poisoned pages: raw_hwp_page of mm/hugetlb.c
POISONED = 64

SERIES_RFC2 = U(0)
SERIES_LATER = U(1)

# pins: what pin_user_pages() holds until UNPIN
PIN_LIVE = U(0)
PIN_PAGES = U(1)
PIN_FLAGS = U(2)
PIN_FRAMES = U(3)  # root of a radix tree by page of the pin: PFN (page_cache.py)
PIN_SPACE = U(4)
PIN_ADDRESS = U(5)
PIN_WORDS = 8
PINS = 256
GUP_PIN_COUNTING_BIAS = U(1024)  # include/linux/mm.h: references that a pin of an order-0 folio is

# per-CPU batches of folios on their way to an LRU list: word 0 how many, then PFNs. include/linux/pagevec.h
LRU_BATCH = U(31)  # PAGEVEC_SIZE
LRU_WORDS = 32
LRU_CPUS = 64

# memory policies of ranges of inodes: struct shared_policy
MP_LIVE = U(0)
MP_INODE = U(1)
MP_START = U(2)  # in pages
MP_END = U(3)
MP_MODE = U(4)  # MPOL_*
MP_NODES = U(5)  # a bit per node
MP_WORDS = 8
POLICIES = 64
MPOL_DEFAULT = 0  # include/uapi/linux/mempolicy.h
MPOL_PREFERRED = 1
MPOL_BIND = 2
MPOL_INTERLEAVE = 3

VMEMMAP_BOOT = 1  # counts[frame] of a vmemmap page that the boot allocator gave

# blocks: uint64 rows, one per huge page of an inode
B_PFN = U(0)
B_STATE = U(1)
B_OUTSTANDING = U(2)  # zombie: base pages of folios that somebody still references
B_WAITS = U(3)  # 1: a failure left it split though all private
B_METADATA = U(4)  # what a split folio cannot hold itself: its subpool's row + 1, 0 = none
B_PENDING = U(5)  # zombie: base pages of folios whose last reference is gone: the posted nr_pages_waiting_to_be_merged
B_MUTEX = U(6)  # actor + 1 of the fault that is allocating it; 0: nobody
B_PIECES = U(8)  # + n: a bit per 2M piece that is split to 4K (BLOCK_PARTLY)
B_WORDS = 16
BLOCK_ABSENT = U(0)
BLOCK_HUGE = U(1)
BLOCK_SPLIT = U(2)
BLOCK_PARTLY = U(4)  # split to 2M folios, some of these to 4K
BLOCK_ZOMBIE = U(3)  # removed from the page cache, some of its pages still referenced

# spaces: a process's page tables
S_ROOT = U(0)
S_UNFLUSHED = U(1)  # entries cleared and tables freed since the last flush of the process
S_ORDINARY = U(2)  # 1: it has or had VMAs of ordinary kinds
S_LIVE = U(3)
S_USER_ROOT = U(4)  # page-table isolation: the user half's top table
S_MINOR_FAULTS = U(5)
S_RSS = U(6)  # 4K pages of memory that are mapped, HugeTLB and special ones not counted
S_WORDS = 8

# vmas
A_START = U(0)
A_END = U(1)
A_SPACE = U(2)
A_INODE = U(3)
A_PGOFF = U(4)  # in pages
A_READ_ONLY = U(5)
A_LIVE = U(6)
A_KIND = U(7)  # VMA_*
A_PROT = U(8)  # PROT_READ 1, PROT_WRITE 2, PROT_EXEC 4 (ordinary kinds)
A_FLAGS = U(9)  # VM_*
A_CACHE_BITS = U(10)  # PFN mappings: memory type bits of their entries
A_ANON_VMA = U(11)  # number of its anon_vma, 0 = none yet
A_CLONED = U(12)  # 1: fork made it, its anon_vma has a parent
A_RESERVED = U(13)  # private HugeTLB: huge pages reserved and not yet allocated
A_WORDS = 16
VMA_GUEST_MEMFD = U(0)
VMA_ANONYMOUS = U(1)
VMA_HUGETLB = U(2)
VMA_PFN_REMAP = U(3)  # remap_pfn_range(): all entries at mmap
VMA_PFN_FAULT = U(4)  # vmf_insert_pfn(), _pmd(), _pud(): entries at the fault
VMA_GUEST_MEMFD_4K = U(5)
VM_SHARED = U(1)
VM_LOCKED = U(2)
VM_PFNMAP = U(4)
VM_NORESERVE = U(8)
VM_RESERVATION_OWNER = U(16)  # HPAGE_RESV_OWNER: the process that reserved, not its children
PROT_READ = U(1)
PROT_WRITE = U(2)
PROT_EXEC = U(4)
TASK_SIZE = U((1 << 47) - 4096)
NO_INODE = U(0xFFFFFFFF)  # object of an anonymous mapping

# counts[frame] of a 4K page of memory: mappings, and
PAGE_EXCLUSIVE = U(1 << 31)  # PageAnonExclusive: of this mapping alone, it may be written without asking
PAGE_CACHED = U(1 << 30)  # a page cache holds it
PAGE_MAPPINGS = U((1 << 30) - 1)

# vms
V_ROOT = U(0)
V_SPACE = U(1)  # process whose mm the VM belongs to, or all ones
V_SEQUENCE = U(2)  # mmu_invalidate_seq
V_IN_PROGRESS = U(3)  # mmu_invalidate_in_progress
V_RANGE_START = U(4)  # gfn
V_RANGE_END = U(5)
V_UNFLUSHED = U(6)  # leaves dropped since the last flush of the VM
V_PROTECTED = U(7)  # KVM_X86_SW_PROTECTED_VM: deleting a slot drops its leaves only
V_ORDINARY = U(8)  # 1: it has or had slots of a process's memory
V_ATTRIBUTES = U(9)  # root of the memory attributes, a radix tree by guest frame; 0 = none
V_LIVE = U(10)
V_GENERATION = U(11)  # of the memory slots; cached MMIO entries carry it
V_UNLOADED = U(12)  # 1: the vCPU has to load a new root before it runs: the tree went with a slot
V_BIND_INODE = U(13)  # guest_memfd and offset that the next slot takes its private pages from
V_BIND_OFFSET = U(14)
V_WORDS = 16

# memslots
M_BASE_GFN = U(0)
M_PAGES = U(1)
M_VM = U(2)
M_INODE = U(3)
M_PGOFF = U(4)  # in pages
M_LIVE = U(5)
M_KIND = U(6)  # SLOT_*
M_HVA = U(7)  # SLOT_USER: userspace address of the first page
M_FLAGS = U(8)  # SLOT_LOG_DIRTY_PAGES, SLOT_READ_ONLY, SLOT_HAS_GUEST_MEMFD
M_DIRTY = U(9)  # root of the dirty bitmap, a radix tree by page of the slot; 0 = none
M_ID = U(10)  # SLOT_USER: userspace's number of the slot
M_WORDS = 16
SLOT_GUEST_MEMFD = U(0)  # over an inode of the two designs
SLOT_USER = U(1)  # a process's memory; with SLOT_HAS_GUEST_MEMFD private pages come from M_INODE
SLOT_LOG_DIRTY_PAGES = U(1)
SLOT_READ_ONLY = U(2)
SLOT_HAS_GUEST_MEMFD = U(4)
SLOT_GMEM_ONLY = U(8)  # every page, shared or private, comes from the guest_memfd
SLOT_RELEASED = U(16)  # its guest_memfd file was released: the slot is there, but has no memory
RELEASED_PGOFF = U(1 << 60)  # M_PGOFF of such a slot: no page of a file
SLOT_IDS = 32764  # KVM_USER_MEM_SLOTS

# ops: one record per actor and one for batches, uint64; status is two's complement
O_OP = U(0)
O_FLAGS = U(1)
O_ACTOR = U(2)
O_VM = U(3)
O_SPACE = U(4)
O_OBJECT = U(5)
O_ADDRESS = U(6)
O_OFFSET = U(7)
O_LENGTH = U(8)
O_PHASE = U(9)  # steps done
O_STATUS = U(10)
O_DETAIL = U(11)  # leaf level, or the failing offset
O_START = U(12)  # range in pages of the inode
O_END = U(13)
O_ROUND_START = U(14)  # the same rounded out to huge pages
O_ROUND_END = U(15)
O_INODE = U(16)  # rows resolved by the first step
O_ROW = U(17)  # VMA or memslot
O_INDEX = U(18)  # page index in the inode
O_PFN = U(19)
O_SEQUENCE = U(20)  # mmu_invalidate_seq sampled before the pfn lookup
O_LOCKED = U(21)  # 0, 1 reader, 2 writer of the inode's invalidate_lock
O_TO_PRIVATE = U(22)
O_CLOCK_LOW = U(23)  # clock at the start
O_CLOCK_HIGH = U(24)
O_LEVEL = U(25)  # level that the guest's fault will be mapped at
O_REFERENCED = U(26)  # PFN + 1 of a folio whose reference the operation holds
O_PAUSED_LOW = U(27)  # clock at the end of the last step
O_PAUSED_HIGH = U(28)
O_ACTIVE = U(29)  # 1: begun and not ended, so that `step` has something to do
# Step by step, and what one step of a conversion or a fault hands to the next:
O_STAGE = U(30)  # number of the next step in the list of its kind of operation
O_NEXT = U(31)  # ... and of the one behind that
O_RANGE_START = U(32)  # the range of the whole conversion; O_START and O_END are those of its present unit
O_RANGE_END = U(33)
O_ITEM_START = U(34)  # the present item of rfc2's work list
O_ITEM_END = U(35)
O_FOLIO = U(36)  # first PFN of a huge page taken and not yet in the page cache; 0: none
O_MUTEX = U(37)  # row of the block whose mutex the fault holds; 0: none
O_WORDS = 48

# --------------------------------------------------------------------------- invariants


class Broken(IntEnum):
    """Which rule was found broken."""

    NONE = 0
    FRAMES = 1  # a frame is lost, owned twice, or counted wrongly
    HOST_PRIVATE = 2  # a host leaf to a private page
    MIXED_LEAF = 3  # a stage-2 leaf over mixed shareability
    LEAF_OVER_FOLIO = 4  # restructure: a leaf larger than its folio
    BLOCK_STATE = 5  # restructure: huge and shared, or split and all private
    WRONG_PFN = 6  # a leaf names another page than the inode does
    COUNTS = 7  # a kept count differs from the recount
    VMEMMAP = 8  # vmemmap pages do not match the folios' state
    IN_PROGRESS = 9  # an invalidation was begun and never ended
    REFERENCES = 10  # restructure: refcount or mapcount differs from the mappings


# --------------------------------------------------------------------------- where the rows lie

# Everything but `ram` stands in one array each of uint64 (`state`), int64 (`stats`) and uint32 (`counts`):
# numba passes an array as seven words, and a kernel that is handed four of them compiles in half the
# time of one that is handed eleven. What has no fixed number of rows follows STATE_SIZE; registers tell where.
FORMATS = 32
ACTORS = 1024
INODES = 64
SPACES = 64
VMS = 64
VMAS = 1024
MEMSLOTS = 1024

STATE_FORMATS = U(R_WORD_COUNT)
STATE_OPS = U(STATE_FORMATS + FORMATS * F_WORDS)
STATE_INODES = U(STATE_OPS + (ACTORS + 2) * O_WORDS)  # behind those of actors: of batches, of faults inside others
STATE_SPACES = U(STATE_INODES + INODES * I_WORDS)
STATE_VMS = U(STATE_SPACES + SPACES * S_WORDS)
STATE_VMAS = U(STATE_VMS + VMS * V_WORDS)
STATE_MEMSLOTS = U(STATE_VMAS + VMAS * A_WORDS)
STATE_HSTATES = U(STATE_MEMSLOTS + MEMSLOTS * M_WORDS)
STATE_SMALL = U(STATE_HSTATES + HSTATES * H_WORDS)
STATE_FREE_AREAS = U(STATE_SMALL + H_WORDS)  # [node][order]: next, prev of zone->free_area[order].free_list
STATE_NODES = U(STATE_FREE_AREAS + NODES * FREE_ORDERS * 2)
STATE_SUBPOOLS = U(STATE_NODES + NODES * N_WORDS)
STATE_POISONED = U(STATE_SUBPOOLS + SUBPOOLS * P_WORDS)
STATE_PINS = U(STATE_POISONED + POISONED)
STATE_LRU = U(STATE_PINS + PINS * PIN_WORDS)
STATE_POLICIES = U(STATE_LRU + LRU_CPUS * LRU_WORDS)
STATE_SIZE = int(STATE_POLICIES) + POLICIES * MP_WORDS

CLOCK_LOW = U(0)  # int64 picoseconds, low and high end of the estimate
CLOCK_HIGH = U(1)
STATS_GAUGES = U(8)
STATS_PRICES = U(STATS_GAUGES + 2 * GAUGES)
STATS_PRICES_ONE = U(STATS_PRICES + EVENTS * PRICE_WORDS)  # [event][low, high]: fixed + each, of one event
STATS_LAST = U(STATS_PRICES_ONE + EVENTS * 2)  # cost of the last operation (low, high) and its buckets
STATS_COUNTERS = U(STATS_LAST + 4)  # [operation][event]
STATS_TALLY = U(STATS_COUNTERS + OPERATIONS * EVENTS)  # [operation][result]
STATS_COST = U(STATS_TALLY + OPERATIONS * TALLY_SLOTS)  # [operation][low, high]
STATS_HISTOGRAM = U(STATS_COST + OPERATIONS * 2)  # [operation][low, high][bucket]
STATS_SIZE = int(STATS_HISTOGRAM) + OPERATIONS * 2 * HISTOGRAM_BUCKETS
