"""What is counted and what it costs: events, gauges, prices, and where they lie in `stats`."""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from pgemu_kernels.words.operations import OPERATIONS

U = np.uint64

# A tally row holds one counter per result: 0..15 as they are, VM_FAULT bits by their number,
# errors by their errno.
TALLY_FAULT_BIT = 16
TALLY_ERRNO = 32
TALLY_SLOTS = 176


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
    FOLIO_FROZEN = 45
    SPTE_PAGES_BEYOND = 46
    ZEROED_UNREACHED = 47  # of PAGE_ZEROED and FOLIO_ZEROED_PAGES: pages that no memory slot reaches
    SPIN_ENDED = 48  # a conversion that would spin has gone on to its end
    SPIN_FAILED = 49  # ... and that was an error
    STALE_PAGE_SHOWN = 50  # a page that a new leaf shows guest or host for the first time, and that was never zeroed
    SPIN_DROPPED = 51  # a conversion that would spin, of which nothing more is done: SPINS are noted already
    IOPTE_WRITTEN = 52  # entries of an IOMMU's leaves; a leaf whose size is in its address has several
    IOPTE_CLEARED = 53
    IOTLB_FLUSH_PAGES = 54  # an invalidation of pages of a domain, a power of two of them
    IOTLB_FLUSH_DOMAIN = 55  # ... of all of it, for that would be too many
    DEVICE_TABLE_UPDATED = 56  # a domain has another root: the entries of its devices are written and flushed
    IOMMU_STALE_PRIVATE = 57  # a device reached a page through an entry that outlived its conversion to private
    IOMMU_STALE_FREED = 58  # ... or its page cache
    CONVERT_PINNED = 59  # a conversion that ended with -EAGAIN at a folio that may be pinned
    MAPPED_STALE_PRIVATE = 60  # KVM accessed a page by a mapping of its own (NESTED_MAP), and the page is private now
    MAPPED_STALE_FREED = 61  # ... or is its inode's no more, and nobody held it for KVM


EVENTS = 64  # room in a counter row

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
    HOST_LEAVES_4K = 6  # and, + level - 1, those of larger pages
    HOST_LEAVES_2M = 7
    HOST_LEAVES_1G = 8
    STAGE2_LEAVES_4K = 9  # the same
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
    SPINNING = 29  # conversions of which something is left, for a freeze would spin
    # Stores to the page cache, and nodes that one frees, under one xa_lock_irq(); the peak is the longest section that
    # split and merge have interrupts off for.
    STORES_IRQ_OFF = 30
    ANON_HUGE_PAGES = 31  # transparent huge pages that a 2M leaf maps (nr_anon_transparent_hugepages)
    IOMMU_PAGES = 32  # 4K pages that I/O page tables of VFIO and iommufd map


GAUGES = 40

CLOCK_LOW = U(0)  # int64 picoseconds, low and high end of the estimate
CLOCK_HIGH = U(1)
STATS_GAUGES = U(8)
STATS_PRICES = U(STATS_GAUGES + 2 * GAUGES)
STATS_PRICES_ONE = U(STATS_PRICES + EVENTS * PRICE_WORDS)  # [event][low, high]: fixed + each, of one event
STATS_LAST = U(STATS_PRICES_ONE + EVENTS * 2)  # cost of the last operation (low, high) and its buckets
STATS_COUNTERS = U(STATS_LAST + 4)  # [operation][event]
STATS_REPEATED = U(STATS_COUNTERS + OPERATIONS * EVENTS)  # [operation][event]: units beyond the first of a charge
STATS_TALLY = U(STATS_REPEATED + OPERATIONS * EVENTS)  # [operation][result]
STATS_COST = U(STATS_TALLY + OPERATIONS * TALLY_SLOTS)  # [operation][low, high]
STATS_HISTOGRAM = U(STATS_COST + OPERATIONS * 2)  # [operation][low, high][bucket]
STATS_WORST = U(STATS_HISTOGRAM + OPERATIONS * 2 * HISTOGRAM_BUCKETS)  # [operation][low, high, how many ended before]
STATS_SIZE = int(STATS_WORST) + OPERATIONS * 4
