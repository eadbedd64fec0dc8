"""What each event and each gauge counts: read by help(pgemu.Event), help(pgemu.Gauge) and pgemu_words.h."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from types import MappingProxyType
from typing import Any

from pgemu_kernels.words.events import Event as Event, Gauge as Gauge

__all__ = ("EVENTS", "GAUGES", "Event", "Gauge")

EVENTS: Mapping[Event, str] = MappingProxyType(
    {
        Event.HOST_FAULT: "a fault of a process",
        Event.GUEST_FAULT: "a fault of a guest that KVM handles: a violation of stage 2",
        Event.CONVERT_IOCTL: "a conversion ioctl",
        Event.SYSCALL: "any other system call",
        Event.TABLE_PAGE_ALLOCATED: "a page of a page table, of processes, VMs, the kernel or a table of its own",
        Event.TABLE_PAGE_FREED: "... freed",
        Event.LEAF_WRITTEN: "a leaf of a process's or the kernel's page table, any level",
        Event.LEAF_CLEARED: "... cleared",
        Event.SPTE_WRITTEN: "a leaf of stage 2, any level",
        Event.SPTE_CLEARED: "... cleared",
        Event.RMAP_CHANGED: "a mapcount of a folio raised or lowered, by a leaf",
        Event.TLB_FLUSH_MM: "a flush of a process's TLB entries on its CPUs: one broadcast, of all or of some pages",
        Event.TLB_FLUSH_VM: "a flush of all of a VM's TLB entries (kvm_flush_remote_tlbs()), whatever range changed",
        Event.TLB_FLUSH_KERNEL: "a flush of kernel addresses on all CPUs: one broadcast, of all or of some pages",
        Event.HUGE_FOLIO_ALLOCATED: "a HugeTLB folio taken from its pool, or made for it",
        Event.HUGE_FOLIO_FREED: "... given back",
        Event.PAGE_ZEROED: "a 4K page zeroed by itself",
        Event.FOLIO_ZEROED_PAGES: "4K pages zeroed because all of their folio was",
        Event.VMEMMAP_PAGE_RESTORED: "a vmemmap page allocated and mapped again (HVO undone), 64 struct pages",
        Event.VMEMMAP_PAGE_FREED: "a vmemmap page freed (HVO)",
        Event.STRUCT_PAGE_WRITTEN: "a struct page written: split, merge, a new compound page",
        Event.STRUCT_PAGE_BYTES: "bytes of struct pages stored to",
        Event.FOLIO_GATE_CHECKED: "a folio whose reference count a conversion compared with what is expected",
        Event.PAGE_CACHE_STORED: "a store to a slot of the page cache (xarray)",
        Event.ATTRIBUTES_STORED: "a range of memory attributes stored (private or shared)",
        Event.FOLIO_SPLIT: "a huge folio split",
        Event.FOLIO_MERGED: "a huge folio merged",
        Event.FREEZE_SPIN: "a freeze of a folio that failed, because somebody holds it, and would be tried again",
        Event.NOTIFIER_CALL: "a call of a VM's MMU notifier, or its counterpart of guest_memfd",
        Event.DEFERRED_MERGE: "a merge left to the worker",
        Event.TLB_FLUSH_PAGE: "pages invalidated one by one (INVLPG) by a TLB_FLUSH_MM or TLB_FLUSH_KERNEL; no VM's",
        Event.TLB_FLUSH_RANGE: "a flush of stage 2 by range (Arm64), of edits of a PageTable; no machine's VM has any",
        Event.PAGE_COPIED: "4K pages copied",
        Event.XARRAY_NODE_ALLOCATED: "a node of the page cache, 576 bytes",
        Event.XARRAY_NODE_FREED: "... freed",
        Event.METADATA_STASHED: "what a split has to keep of a HugeTLB folio until the merge, stored beside it",
        Event.VMEMMAP_HEAD_COPIED: "a head page of struct pages copied to a page of its own (HVO)",
        Event.RCU_SYNCHRONIZED: "a wait for an RCU grace period",
        Event.VMEMMAP_FAULT: "a store through a read-only vmemmap entry: an oops",
        Event.REFERENCE_CHANGED: "a reference of a folio taken or dropped by FOLIO_REFERENCE and what is like it",
        Event.PAGE_PINNED: "4K pages pinned or unpinned (GUP)",
        Event.LRU_CACHE_ADDED: "a folio that waits in a per-CPU batch to join an LRU list",
        Event.LRU_CACHE_DRAINED: "folios that left these batches for their lists",
        Event.WORK_DONE: "a work item of guest_memfd's worker run",
        Event.SPTE_SPLIT: "a large leaf of stage 2 replaced by a table of smaller ones",
        Event.FOLIO_FROZEN: "a folio whose references were frozen for a split or a merge",
        Event.SPTE_PAGES_BEYOND: "4K pages of stage 2 that were unmapped beyond the range that was asked for",
        Event.ZEROED_UNREACHED: "of PAGE_ZEROED and FOLIO_ZEROED_PAGES: pages that no memory slot reaches",
        Event.SPIN_ENDED: "a conversion that would spin has gone on to its end",
        Event.SPIN_FAILED: "... and that was an error",
        Event.STALE_PAGE_SHOWN: "a page that a new leaf shows for the first time, and that was never zeroed",
        Event.SPIN_DROPPED: "a conversion that would spin, of which nothing more is done",
        Event.IOPTE_WRITTEN: "an entry of a leaf of an IOMMU's table; one with its size in its address has several",
        Event.IOPTE_CLEARED: "... cleared",
        Event.IOTLB_FLUSH_PAGES: "an invalidation of a domain's pages, a power of two of them",
        Event.IOTLB_FLUSH_DOMAIN: "... of all of a domain, for that would be too many",
        Event.DEVICE_TABLE_UPDATED: "a domain has another root: entries of its devices are written and flushed",
        Event.IOMMU_STALE_PRIVATE: "a device reached a page through an entry that outlived its conversion to private",
        Event.IOMMU_STALE_FREED: "... or that had left its page cache",
        Event.CONVERT_PINNED: "a conversion that ended with -EAGAIN at a folio that may be pinned",
        Event.MAPPED_STALE_PRIVATE: "KVM accessed a page by a mapping of its own (NESTED_MAP), and it is private now",
        Event.MAPPED_STALE_FREED: "... or is its inode's no more, and nobody held it for KVM",
    }
)
"""What is counted, one each time, or the unit where it is many at once."""

GAUGES: Mapping[Gauge, str] = MappingProxyType(
    {
        Gauge.FRAMES_USED: "frames of ordinary memory in use",
        Gauge.HOST_TABLES: "pages of processes' page tables",
        Gauge.STAGE2_TABLES: "pages of VMs' page tables",
        Gauge.KERNEL_TABLES: "pages of the kernel's page tables",
        Gauge.VMEMMAP_PAGES: "vmemmap pages of the pools",
        Gauge.CONTENT_FRAMES: "frames that hold contents of guest memory (the emulator's own: what is not zero)",
        Gauge.HOST_LEAVES_4K: "leaves of processes, of 4K",
        Gauge.HOST_LEAVES_2M: "... of 2M",
        Gauge.HOST_LEAVES_1G: "... of 1G",
        Gauge.STAGE2_LEAVES_4K: "leaves of VMs, of 4K",
        Gauge.STAGE2_LEAVES_2M: "... of 2M",
        Gauge.STAGE2_LEAVES_1G: "... of 1G",
        Gauge.POOL_FREE: "free huge pages of the first pool",
        Gauge.BLOCKS_HUGE: "huge pages of guest_memfd that are whole",
        Gauge.BLOCKS_SPLIT: "huge pages of guest_memfd that are split",
        Gauge.BLOCKS_ZOMBIE: "split huge pages that have left their inode and cannot be merged yet",
        Gauge.ANONYMOUS_PAGES: "4K pages of anonymous memory",
        Gauge.CACHE_NODES: "frames that hold nodes of the page cache of guest_memfd inodes",
        Gauge.OTHER_POOL_FREE: "free huge pages of the second pool",
        Gauge.HUGETLB_PAGES: "huge pages of the first pool that hugetlbfs files and private mappings hold",
        Gauge.PAGE_CACHE_PAGES: "4K pages of guest_memfd inodes of 4K folios",
        Gauge.XARRAY_NODES: "nodes that the page cache of split folios takes, 576 bytes each",
        Gauge.MEMMAP_PAGES: "vmemmap pages that came from the page allocator (nr_memmap_pages)",
        Gauge.MEMMAP_BOOT_PAGES: "... and from the boot allocator (nr_memmap_boot_pages)",
        Gauge.BUDDY_BLOCKS: "2M blocks of the HugeTLB zone that are in no pool",
        Gauge.PAGES_PINNED: "pins, of 4K pages",
        Gauge.PAGES_LRU_CACHED: "references held by per-CPU batches of folios to be added to an LRU list",
        Gauge.WORK_PENDING: "huge pages that the worker has something to do for",
        Gauge.BLOCKS_PARTLY: "1G pages split to 2M folios, some of these to 4K",
        Gauge.SPINNING: "conversions of which something is left, for a freeze would spin",
        Gauge.STORES_IRQ_OFF: "stores to the page cache under one xa_lock_irq(); the peak is the longest such section",
        Gauge.ANON_HUGE_PAGES: "transparent huge pages that a 2M leaf maps (nr_anon_transparent_hugepages)",
        Gauge.IOMMU_PAGES: "4K pages that I/O page tables of VFIO and iommufd map",
    }
)
"""What rises and falls, with its unit."""


def _tell(members: type[IntEnum], meanings: Mapping[Any, str], text: str) -> None:
    """Put meanings where help() finds them: the enum's text, and each member's."""
    members.__doc__ = text + "\n\n" + "\n".join(f"{member.name}: {told}" for member, told in meanings.items())
    for member, told in meanings.items():
        member.__doc__ = told


_tell(
    Event, EVENTS,
    "What is counted (Statistics.event(), kernels.event_count(), event_count() of pgemu.h); prices: pgemu.cost.\n\n"
    "Of TLBs: TLB_FLUSH_MM is of a process, TLB_FLUSH_VM of a VM, TLB_FLUSH_KERNEL of the kernel, IOTLB_FLUSH_* of an\n"
    "IOMMU's domain. One that has grown does not say whose, or which addresses.",
)  # fmt: skip
_tell(
    Gauge, GAUGES,
    "Quantities that rise and fall (Statistics.gauge() and peak(), kernels.gauge(), gauge_value() of pgemu.h).",
)  # fmt: skip
