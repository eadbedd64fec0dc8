"""Rows of every object: a field `X_NAME` is the index of a 64-bit word inside row X; where the rows lie."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.words.broken import BROKEN_RULES
from pgemu_kernels.words.io_rows import *  # noqa: F403
from pgemu_kernels.words.io_rows import D_WORDS, DOMAINS
from pgemu_kernels.words.mapped_pages import K_WORDS, MAPPED_PAGES
from pgemu_kernels.words.registers import R_WORD_COUNT
from pgemu_kernels.words.table_words import E_WORDS, F_WORDS

U = np.uint64

# recount: words of the scratch array `found` (int64): leaves by level, tables, then
FOUND_TABLES = U(3)
FOUND_MAPPED = U(4)  # entries that map 4K pages of memory
FOUND_MAPCOUNTS = U(5)  # ... and what the pages' own counts add up to
FOUND_HUGE_MAPPED = U(6)  # entries that map HugeTLB pages, in tables counted once
FOUND_ANONYMOUS = U(7)
FOUND_CACHED = U(8)
FOUND_NODES = U(9)
FOUND_RSS = U(10)
FOUND_RESERVED = U(11)  # of the pool of 2M pages
FOUND_RESERVED_1G = U(12)
FOUND_HUGE_ANONYMOUS = U(13)  # 2M leaves of anonymous memory, the huge zero page's too
FOUND_LARGE_MAPPED = U(14)  # entries that map anonymous memory's large folios, 4K or 2M
FOUND_WORDS = 16

# inodes: uint64 rows
I_PAGES = U(0)
I_BLOCK = U(1)  # where its first block row begins in `state`
I_BLOCKS = U(2)
I_WORD = U(3)  # where its shareability bits begin in `state`
I_PMD = U(4)  # where its shared pages per 2M begin in `counts`
I_PUD = U(5)  # ... and per 1G
I_OPEN = U(6)
I_LOCK = U(7)  # invalidate_lock: readers, or LOCK_WRITER
I_ZEROED = U(8)  # where its bits of zeroed pages begin in `state`: folios/zeroed.py
I_KIND = U(9)  # INODE_*
I_CACHE = U(10)  # ordinary kinds: root of the page cache, physical address; 0 = empty
I_BASE = U(11)  # device: first PFN of the region
I_ORDER = U(12)  # HugeTLB: 9 or 18
I_FLAGS = U(13)
I_REFERENCES = U(14)  # ordinary kinds: descriptors (0 or 1) and VMAs that keep it
I_CACHE_BITS = U(15)  # device: memory type bits of its entries
I_SUBPOOL = U(16)  # row of its subpool + 1; 0 = none
I_REGIONS = U(17)  # where a word for each 2M begins in `state`: a bit per VM that may have a stage-2 leaf there
I_GIGABYTES = U(18)  # ... and for each 1G: a VM without a bit there has none that counts below
I_GUEST_BITS = U(19)  # ... and a bit per page over which any VM may have one
I_VMAS = U(20)  # row of the first of its VMAs, 0 = none; A_NEXT leads on
I_SURVEYED = U(21)  # R_MAPPINGS when the next five were found:
I_ALL_FROM = U(22)  # pages that all of its VMAs show,
I_ALL_END = U(23)
I_TOLD = U(24)  # a bit per VM of their processes,
I_CALLS = U(25)  # how many notifier calls it is that all of them leave the processes,
I_ELSEWHERE = U(28)  # and 1 where a slot of these VMs shows other pages at a VMA's addresses, or its pages elsewhere
I_ASSIGNED = U(26)  # where its bits of pages that the RMP assigns to a guest begin in `state`,
I_ASSIGNED_2M = U(27)  # ... and of the 2M that one entry assigns
I_DOMAINS = U(31)  # a bit per address space of devices that may map its pages without holding them,
I_DMA_FIRST = U(32)  # ... the first of these pages,
I_DMA_END = U(33)  # ... and the one behind the last
I_GENERATION = U(29)  # ordinary files: how many files this row was before
I_SLOTS = U(30)  # memory slots bound to its pages, by these: a tree (engine/memslots.py)
I_WORDS = 40
INODE_GUEST_MEMFD = U(0)  # over HugeTLB pages, what the two designs are about
INODE_HUGETLB = U(1)  # a file of hugetlbfs, or what mmap(MAP_HUGETLB) makes
INODE_GUEST_MEMFD_4K = U(2)  # guest_memfd as merged: order-0 folios
INODE_DEVICE = U(3)  # a region of PFNs without struct pages
INODE_REVOKED = U(1)  # I_FLAGS: the device's memory is off, faults end in SIGBUS
INODE_REMAP = U(2)  # its driver maps everything at mmap, by remap_pfn_range()
INODE_MMAP = U(4)  # guest_memfd: GUEST_MEMFD_FLAG_MMAP
INODE_INIT_SHARED = U(8)  # guest_memfd: GUEST_MEMFD_FLAG_INIT_SHARED
INODE_WHOLE_MAPPINGS = U(16)  # guest_memfd as in RFC v2 with HugeTLB: its mmap wants whole huge pages
INODE_SHMEM = U(64)  # INODE_GUEST_MEMFD_4K: no guest_memfd but a file of shmem, whose faults map what lies around
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
# A per-CPU list and how many go back at once: mm/page_alloc.c:zone_batchsize(), and the four batches that are the
# least that zone_set_pageset_high_and_batch() allows (inference: Linux lets it grow with the zone).
PCP_BATCH = U(63)
PCP_HIGH = U(4 * 63)
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

# what the last memory failure did: mm/memory-failure.c:action_result() and what led to it
MF_PFN = U(0)
MF_ACTION = U(1)  # MfResult
MF_TYPE = U(2)  # MfPage
MF_REPLACED = U(3)  # entries that became hwpoison entries
MF_DROPPED = U(4)  # large entries that a split dropped, and shared tables that were let go of
MF_STAGE2 = U(5)  # stage-2 leaves dropped
MF_SIGNALS = U(6)  # SIGBUS sent,
MF_STATUS = U(7)  # what memory_failure() returned
MF_SIGNAL = U(8)  # ... and of each: process, address, code | log2 of the size << 8
MF_SIGNAL_WORDS = 3
SIGNALS = 64  # of the others only the number is known
MF_WORDS = 8 + MF_SIGNAL_WORDS * SIGNALS

SPLIT_FORM_RFC2 = U(0)
SPLIT_FORM_LATER = U(1)

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

# conversions that would spin: what is left of them (gmem/spinning.py)
Q_LIVE = U(0)
Q_INODE = U(1)
Q_START = U(2)  # in pages
Q_END = U(3)
Q_TO_PRIVATE = U(4)
Q_VM = U(5)  # that asked
Q_PFN = U(6)  # first frame of the folio that cannot be frozen,
Q_REFERENCES = U(7)  # how many references it may have,
Q_INDEX = U(8)  # and its page of the inode
Q_WORDS = 16
SPINS = 4096  # noted at once; of more than that what is left is not done

# folios that FOLIO_FREEZE froze, or FOLIO_REFERENCE pinned; free where both words are 0
Z_PFN = U(0)  # first frame of the folio
Z_REFERENCES = U(1)  # that FOLIO_FREEZE took
Z_PINS = U(2)  # that FOLIO_REFERENCE took, each a reference of a large folio, GUP_PIN_COUNTING_BIAS of a 4K one
Z_WORDS = 4
FROZEN = 64

VMEMMAP_BOOT = 1  # counts[frame] of a vmemmap page that the boot allocator gave

# blocks: uint64 rows, one per huge page of an inode
B_PFN = U(0)
B_STATE = U(1)
B_OUTSTANDING = U(2)  # zombie: base pages of folios that somebody still references
B_WAITS = U(3)  # 1: a failure left it split though all private
B_METADATA = U(4)  # what a split folio cannot hold itself: its subpool's row + 1, 0 = none
B_PENDING = U(5)  # zombie: base pages of folios whose last reference is gone: the posted nr_pages_waiting_to_be_merged
B_MUTEX = U(6)  # actor + 1 of the fault that is allocating it; 0: nobody
B_BITS = U(7)  # 1: bits of zeroed pages may be set (I_ZEROED)
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
S_RSS = U(6)  # 4K pages of memory that are mapped, folios of guest_memfd too; HugeTLB and special ones not counted
S_VMS = U(7)  # a bit per VM of this process
S_DEPOSITED = U(8)  # frame of the last table kept for the split of a 2M leaf of anonymous memory, 0: none; chained
S_HAS_PINNED = U(9)  # MMF_HAS_PINNED: a page was pinned through it, ever
S_GENERATION = U(12)  # the last word that goes with the process: how many this row was before
# Behind it what devices keep of an mm whose process has ended:
S_DEVICES = U(13)  # VFIO's mappings and io_pages that hold it; until there is none the row is nobody else's
S_PINNED_VM = U(14)  # mm->pinned_vm: VmPin, pages
S_LOCKED_VM = U(15)  # mm->locked_vm: of VmLck what devices have locked, pages
S_WORDS = 16

# vmas
A_START = U(0)
A_END = U(1)
A_SPACE = U(2)
A_INODE = U(3)
A_PGOFF = U(4)  # in pages
A_READ_ONLY = U(5)
A_LIVE = U(6)
A_KIND = U(7)  # VMA_*
A_PROT = U(8)  # PROT_READ 1, PROT_WRITE 2, PROT_EXEC 4
A_FLAGS = U(9)  # VM_*
A_CACHE_BITS = U(10)  # PFN mappings: memory type bits of their entries
A_ANON_VMA = U(11)  # number of its anon_vma, 0 = none yet
A_CLONED = U(12)  # 1: fork made it, its anon_vma has a parent
A_RESERVED = U(13)  # private HugeTLB: huge pages reserved and not yet allocated
A_NEXT = U(14)  # row of the next VMA of its inode, 0 = none: in the order of rows
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
VM_COUNTED = U(64)  # designs: mapped as merged, by entries of folios, whatever the design is
VM_DONTCOPY = U(128)  # MADV_DONTFORK: a child does not get it
VM_HUGEPAGE = U(256)  # MADV_HUGEPAGE
VM_NOHUGEPAGE = U(512)  # MADV_NOHUGEPAGE
VM_ACCOUNT = U(32)  # counted against the commit limit, which is not modelled: VMAs that differ in it do not merge
PROT_READ = U(1)
PROT_WRITE = U(2)
PROT_EXEC = U(4)
TASK_SIZE = U((1 << 47) - 4096)
NO_INODE = U(0xFFFFFFFF)  # object of an anonymous mapping

# counts[frame] of a 4K page of memory: mappings, and
PAGE_EXCLUSIVE = U(1 << 31)  # PageAnonExclusive: of this mapping alone, it may be written without asking
PAGE_CACHED = U(1 << 30)  # a page cache holds it
PAGE_DIRTY = U(1 << 29)  # PG_dirty of a page of guest_memfd: entries made by later faults are dirty, too
PAGE_POISONED = U(1 << 28)  # PG_hwpoison, with the reference that memory failure keeps
PAGE_PINNED = U(1 << 27)  # it has pins: how many is in the row of R_PINNED
PAGE_MAPPINGS = U((1 << 27) - 1)
PAGE_HELD = PAGE_MAPPINGS | PAGE_CACHED | PAGE_PINNED  # it is nobody's without any of these

# vms
V_ROOT = U(0)
V_SPACE = U(1)  # process whose mm the VM belongs to, or all ones
V_SEQUENCE = U(2)  # mmu_invalidate_seq
V_IN_PROGRESS = U(3)  # mmu_invalidate_in_progress
V_RANGE_START = U(4)  # gfn
V_RANGE_END = U(5)
V_SLOTS = U(6)  # its slots by guest frame: a tree (engine/memslots.py)
V_PROTECTED = U(7)  # 1: the VM has private memory: deleting a slot drops its leaves only
V_BIND_HVA = U(8)  # userspace address + 1 of the slot that the next BIND makes; 0: see stage2/userspace.py
V_ATTRIBUTES = U(9)  # root of the memory attributes, a radix tree by guest frame; 0 = none
V_LIVE = U(10)
V_GENERATION = U(11)  # of the memory slots; cached MMIO entries carry it
V_UNLOADED = U(12)  # 1: the vCPU has to load a new root before it runs: the tree went with a slot
V_BIND_INODE = U(13)  # guest_memfd and offset that the next slot takes its private pages from
V_BIND_OFFSET = U(14)
# By kind (pgemu/machine/vm_kinds.py):
V_PRIVATE_ROOT = U(16)  # root of private memory: V_ROOT, or that of the mirror (VmProperty.MIRRORED)
V_PROPERTIES = U(17)  # VmProperty
V_PRIVATE_LEVEL = U(18)  # of the largest leaf over private memory
V_SLOTS_BY_HVA = U(19)  # its slots that have a userspace address, by that: a tree
V_SLOT_IDS = U(20)  # its slots that have a number, by that: a tree
V_SLOT_COUNT = U(21)
V_CLOSED_FILES = U(22)  # 1: a file of its was closed while mappings held it: stage2/release.py
V_WORDS = 32

# counts[frame] of a stage-2 table, beside how many leaves are below: bits of what KVM keeps in kvm_mmu_page
TABLE_NX_DISALLOWED = U(1 << 31)  # nx_huge_page_disallowed: made for a fetch under the NX-hugepage mitigation
TABLE_MIRROR = U(1 << 30)  # role.is_mirror: the mirror root, or below it
TABLE_LEAVES = U((1 << 30) - 1)

# Which roots a zap goes to: enum kvm_gfn_range_filter
FILTER_SHARED = U(1)
FILTER_PRIVATE = U(2)
FILTER_BOTH = U(3)

# nodes of interval trees: engine/interval_tree.py
T_START = U(0)
T_END = U(1)
T_MOST = U(2)  # the farthest T_END at the node and below
T_LEFT = U(3)  # nodes, 0 = none
T_RIGHT = U(4)
T_PARENT = U(5)
T_MOST_LEFT = U(6)  # T_MOST of the left one, 0 = none: so that a search looks at one cache line for each node
T_WORDS = 8

# memslots
M_BASE_GFN = U(0)
M_PAGES = U(1)
M_VM = U(2)
M_INODE = U(3)
M_PGOFF = U(4)  # in pages
M_LIVE = U(5)
M_KIND = U(6)  # SLOT_*
M_HVA = U(7)  # userspace address of the first page; SLOT_GUEST_MEMFD: for the notifier alone, all ones: none yet
M_FLAGS = U(8)  # SLOT_LOG_DIRTY_PAGES, SLOT_READ_ONLY, SLOT_HAS_GUEST_MEMFD
M_DIRTY = U(9)  # root of the dirty bitmap, a radix tree by page of the slot; 0 = none
M_ID = U(10)  # SLOT_USER: userspace's number of the slot
M_NEXT_FREE = U(11)  # of a row that is no slot's: the next such row, 0 = none (R_FREE_MEMSLOT)
M_WORDS = 16
SLOT_GUEST_MEMFD = U(0)  # over an inode of the two designs
SLOT_USER = U(1)  # a process's memory; with SLOT_HAS_GUEST_MEMFD private pages come from M_INODE
SLOT_LOG_DIRTY_PAGES = U(1)
SLOT_READ_ONLY = U(2)
SLOT_HAS_GUEST_MEMFD = U(4)
SLOT_GMEM_ONLY = U(8)  # every page, shared or private, comes from the guest_memfd
SLOT_RELEASED = U(16)  # its guest_memfd file was released: the slot is there, but has no memory
SLOT_CLOSED = U(32)  # its guest_memfd file was closed: it is released with the last mapping that holds it
SLOT_DYING = U(64)  # the last reference to its guest_memfd file is gone, and .release has not run yet
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
# What a fault that nobody interrupts still knows:
O_HOLE = U(38)  # the 4K entry where its walk ended, empty; NONE: it ended above
O_HOLE_MIDDLE = U(39)  # ... and the entry of the table around it
O_WIDE_START = U(40)  # pages that devices lost to it and get back at its end; O_WIDE_END 0: none
O_WIDE_END = U(41)
O_WIDE_LOW = U(42)  # clock when they lost them
O_WIDE_HIGH = U(43)
O_WORDS = 48


# findings, a row for each rule
FINDING_COUNT = U(0)
FINDING_INDEX = U(1)
FINDING_WORDS = 2

# --------------------------------------------------------------------------- where the rows lie

# Everything but `ram` stands in one array each of uint64 (`state`), int64 (`stats`) and uint32 (`counts`):
# numba passes an array as seven words, and a kernel that is handed four of them compiles in half the
# time of one that is handed eleven. What has no fixed number of rows follows STATE_SIZE; registers tell where.
FORMATS = 32
ACTORS = 1024
INODES = 64
SPACES = 64
VMS = 64  # a bit each in a word of I_REGIONS
VMAS = 1024
MEMSLOTS = SLOT_IDS + 1024  # all that KVM has for one VM, and some for others; rows that nobody uses take no memory

STATE_FORMATS = U(R_WORD_COUNT)
STATE_OPS = U(STATE_FORMATS + FORMATS * F_WORDS)
STATE_INODES = U(
    STATE_OPS + (ACTORS + 3) * O_WORDS
)  # behind those of actors: of batches, of faults inside others, of what spun
STATE_SPACES = U(STATE_INODES + INODES * I_WORDS)
STATE_VMS = U(STATE_SPACES + SPACES * S_WORDS)
STATE_VMAS = U(STATE_VMS + VMS * V_WORDS)
STATE_HSTATES = U(STATE_VMAS + VMAS * A_WORDS)
STATE_SMALL = U(STATE_HSTATES + HSTATES * H_WORDS)
STATE_FREE_AREAS = U(STATE_SMALL + H_WORDS)  # [node][order]: next, prev of zone->free_area[order].free_list
STATE_PCP = U(STATE_FREE_AREAS + NODES * FREE_ORDERS * 2)  # [node]: next, prev of a zone's per_cpu_pages list
STATE_PCP_COUNTS = U(STATE_PCP + NODES * 2)  # [node]: pages in it
STATE_NODES = U(STATE_PCP_COUNTS + NODES)
STATE_SUBPOOLS = U(STATE_NODES + NODES * N_WORDS)
STATE_POISONED = U(STATE_SUBPOOLS + SUBPOOLS * P_WORDS)
STATE_PINS = U(STATE_POISONED + POISONED)
STATE_LRU = U(STATE_PINS + PINS * PIN_WORDS)
STATE_POLICIES = U(STATE_LRU + LRU_CPUS * LRU_WORDS)
STATE_FINDINGS = U(STATE_POLICIES + POLICIES * MP_WORDS)  # [Broken]: how many, what the first one is about
STATE_SPINS = U(STATE_FINDINGS + BROKEN_RULES * FINDING_WORDS)
STATE_FROZEN = U(STATE_SPINS + SPINS * Q_WORDS)
STATE_FAILURE = U(STATE_FROZEN + FROZEN * Z_WORDS)
STATE_DOMAINS = U(STATE_FAILURE + MF_WORDS)
STATE_IO_REQUEST = U(STATE_DOMAINS + DOMAINS * D_WORDS)  # the request of an edit of an I/O page table
STATE_MAPPED = U(STATE_IO_REQUEST + E_WORDS)
STATE_MEMSLOTS = U(-(-(int(STATE_MAPPED) + MAPPED_PAGES * K_WORDS) // 8) * 8)  # a cache line for each node
# Nodes (T_*) of every slot's row in the trees of its VM and of its inode: engine/memslots.py. Those of one kind of tree
# lie close to each other, as a search goes through many.
STATE_BY_GFN = U(int(STATE_MEMSLOTS) + MEMSLOTS * M_WORDS)
STATE_BY_INODE = U(int(STATE_BY_GFN) + MEMSLOTS * T_WORDS)
STATE_BY_HVA = U(int(STATE_BY_INODE) + MEMSLOTS * T_WORDS)
STATE_BY_ID = U(int(STATE_BY_HVA) + MEMSLOTS * T_WORDS)
STATE_SIZE = int(STATE_BY_ID) + MEMSLOTS * T_WORDS
