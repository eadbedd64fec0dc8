"""The profile "published": all public figures, of all machines in one band, and assumptions where there are none."""

from __future__ import annotations

from datetime import date

from pgemu.cost.prices import Band, Price, Profile
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Event

__all__ = ("CARRIED", "HEAD_COPY", "KRAVETZ", "MEASURED", "PUBLISHED")

_STRUCT_PAGES_1G = 1 << W.ORDER_1G

# One 4K page zeroed: 1 GiB at 10 GB/s is 100 ms (low); a whole 2M fault takes 233 us (high).
_ZERO_PAGE: Band = (100e6 / _STRUCT_PAGES_1G, 233e3 / 512)

# One CPU's share of a broadcast. Unbatched minus batched vmemmap changes, per 2M page: 44.6 us (optimise) and
# 46.6 us (restore) on 8 sockets, at most 288 CPUs, if there were two broadcasts (low); 272.8 and 276.4 us on 252
# vCPUs, if there was one (high).
_BROADCAST: Band = (44.6e3 / 2 / 288, 276.4e3 / 252)

# The copy of an optimised folio's first vmemmap page: 4 KiB as PAGE_COPIED, and a page from the per-CPU list.
HEAD_COPY: Band = (_ZERO_PAGE[0] + 50, 2 * _ZERO_PAGE[1] + 500)

# One atomic on a line that is cached: quartiles of several runs of `pgemu calibrate`.
_ATOMIC: Band = (6.1, 9.6)

KRAVETZ = "Mike Kravetz, batched vmemmap changes v8, 2023-10-19"
MEASURED = "measured on Linux 6.18, 2-vCPU guest on AMD EPYC"
USER_SPACE = "measured in user space by pgemu calibrate, 2-vCPU guest on an Intel Xeon, Linux 6.18"
_ENTRY = "assumption: a few stores, one of them atomic, under a lock that is held already"
CARRIED = "no price of its own: "

_PUBLISHED = (
    Price(
        Event.HOST_FAULT,
        f"{MEASURED}: guest_memfd refault 690-730 k/s = 1.37-1.45 us, less LEAF_WRITTEN and RMAP_CHANGED",
        fixed=(1e9 / 730e3 - 50, 1e9 / 690e3 - 85),
        basis="measured",
    ),
    Price(
        Event.GUEST_FAULT,
        "assumption: VM exit and entry plus a lookup like a host fault's; no figure is published",
        fixed=(1000, 5000),
        basis="assumption",
    ),
    Price(
        Event.CONVERT_IOCTL,
        "assumption: system call, invalidate_lock, maple tree nodes; no figure is published",
        fixed=(500, 5000),
        basis="assumption",
    ),
    Price(
        Event.SYSCALL,
        "assumption: entry, exit, and argument checks of a system call",
        fixed=(100, 1000),
        basis="assumption",
    ),
    Price(
        Event.TABLE_PAGE_ALLOCATED,
        "zeroing of 4 KiB as PAGE_ZEROED; assumption: 0.1-1 us for the buddy allocator and locks",
        each=(_ZERO_PAGE[0] + 100, _ZERO_PAGE[1] + 1000),
        basis="assumption",
    ),
    Price(
        Event.TABLE_PAGE_FREED,
        "assumption: back to the per-CPU list, by RCU",
        each=(100, 1000),
        basis="assumption",
    ),
    Price(
        Event.LEAF_WRITTEN,
        _ENTRY,
        each=(20, 40),
        basis="assumption",
    ),
    Price(
        Event.LEAF_CLEARED,
        f"{MEASURED}: zap of memfd 7.1 and of guest_memfd 6.0 M pages/s = 141-167 ns, less RMAP_CHANGED",
        each=(1e9 / 7.1e6 - 30, 1e9 / 6.0e6 - 45),
        basis="measured",
    ),
    Price(
        Event.SPTE_WRITTEN,
        _ENTRY + " (mmu_lock)",
        each=(20, 100),
        basis="assumption",
    ),
    Price(
        Event.SPTE_CLEARED,
        "assumption: at most what a zapped host page takes, 167 ns",
        each=(5, 167),
        basis="assumption",
    ),
    Price(
        Event.RMAP_CHANGED,
        "assumption: mapcount, reference and statistics of one folio",
        each=(30, 45),
        basis="assumption",
    ),
    Price(
        Event.TLB_FLUSH_MM,
        "assumption: per CPU as TLB_FLUSH_KERNEL, on the CPUs that run the process (min of vCPUs, host CPUs)",
        per_cpu=_BROADCAST,
        basis="assumption",
    ),
    Price(
        Event.TLB_FLUSH_VM,
        "assumption: per vCPU as TLB_FLUSH_KERNEL, high end doubled because a running vCPU must leave the guest",
        per_cpu=(_BROADCAST[0], 2 * _BROADCAST[1]),
        basis="assumption",
    ),
    Price(
        Event.TLB_FLUSH_KERNEL,
        f"{KRAVETZ}: unbatched less batched, per 2M page: 44.6 us / (2 broadcasts x 288 CPUs, the most that 8 "
        "sockets had) = 77 ns; 276.4 us / 252 vCPUs = 1.1 us",
        per_cpu=_BROADCAST,
        basis="published",
    ),
    Price(
        Event.TLB_FLUSH_PAGE,
        "assumption: one INVLPG each on the CPUs that the flush reaches anyway; the broadcast is TLB_FLUSH_MM",
        each=(50, 250),
        basis="assumption",
    ),
    Price(
        Event.TLB_FLUSH_RANGE,
        "assumption: TLBI by range and DSB, broadcast by hardware; per CPU at most a quarter of an IPI",
        each=(100, 1000),
        basis="assumption",
    ),
    Price(
        Event.PAGE_COPIED,
        "4 KiB read and written: twice PAGE_ZEROED at most",
        each=(_ZERO_PAGE[0], 2 * _ZERO_PAGE[1]),
        basis="assumption",
    ),
    Price(
        Event.HUGE_FOLIO_ALLOCATED,
        f"{MEASURED}: pool grown without HVO, 4 us; {KRAVETZ}: the same, 4.72 s / 500,000 pages = 9.4 us",
        each=(4e3, 4.719e9 / 500000),
        basis="published",
    ),
    Price(
        Event.HUGE_FOLIO_FREED,
        f"{MEASURED}: PUNCH_HOLE 0.84 M pages/s less zap = 1.0 us; {KRAVETZ}: pool shrunk without HVO, 4.48 s / "
        "500,000 pages = 9.0 us",
        each=(1e9 / 0.84e6 - 1e9 / 6.0e6, 4.477e9 / 500000),
        basis="published",
    ),
    Price(
        Event.PAGE_ZEROED,
        f"10 GB/s = 0.38 us; {MEASURED}: HugeTLB 2M fault with zeroing 233 us / 512 = 0.46 us",
        each=_ZERO_PAGE,
        basis="measured",
    ),
    Price(
        Event.FOLIO_ZEROED_PAGES,
        "per 4K page as PAGE_ZEROED: a 1G folio is 100-120 ms",
        each=_ZERO_PAGE,
        basis="measured",
    ),
    Price(
        Event.ZEROED_UNREACHED,
        CARRIED + "PAGE_ZEROED and FOLIO_ZEROED_PAGES count these pages",
        basis="assumption",
    ),
    Price(
        Event.STALE_PAGE_SHOWN,
        CARRIED + "the fault that shows it is events of its own",
        basis="assumption",
    ),
    Price(
        Event.VMEMMAP_PAGE_RESTORED,
        f"{KRAVETZ}: batched less off, per 2M page 4.0 us (VM) and 17.9 us (metal), / 7 vmemmap pages",
        each=(4.0e3 / 7, 17.9e3 / 7),
        basis="published",
    ),
    Price(
        Event.VMEMMAP_PAGE_FREED,
        f"{KRAVETZ}: batched less off, per 2M page 4.0 us (VM) and 5.1 us (metal); {MEASURED}: at most 7.5 us; less "
        "VMEMMAP_HEAD_COPIED, / 7 vmemmap pages",
        each=((4.0e3 - HEAD_COPY[1]) / 7, (7.5e3 - HEAD_COPY[0]) / 7),
        basis="published",
    ),
    Price(
        Event.STRUCT_PAGE_WRITTEN,
        f"{MEASURED}: demotion of 1G without HVO 1.43-2.5 ms / 262,144 struct pages",
        each=(1.43e6 / _STRUCT_PAGES_1G, 2.5e6 / _STRUCT_PAGES_1G),
        basis="measured",
    ),
    Price(
        Event.STRUCT_PAGE_BYTES,
        CARRIED + "STRUCT_PAGE_WRITTEN counts the same stores",
        basis="assumption",
    ),
    Price(
        Event.FOLIO_GATE_CHECKED,
        "assumption: filemap_get_folios() takes a reference and folio_batch_release() drops it, two atomics as "
        "FOLIO_FROZEN; between them the count is read, from cached (as STRUCT_PAGE_WRITTEN) to a miss of 100 ns",
        each=(2 * _ATOMIC[0] + 1.43e6 / _STRUCT_PAGES_1G, 2 * _ATOMIC[1] + 100),
        basis="assumption",
    ),
    Price(
        Event.FOLIO_FROZEN,
        f"{USER_SPACE}: an atomic on a cached line 6.1-9.6 ns. A merge writes the struct pages that it has frozen: "
        "what their lines take from memory is in STRUCT_PAGE_WRITTEN, as is the store that unfreezes a page after a "
        "split",
        each=_ATOMIC,
        basis="measured",
    ),
    Price(
        Event.PAGE_CACHE_STORED,
        f"{USER_SPACE}: a slot of a tree of three levels with nodes of 64 slots, 2.3-3.9 ns in sequence and cached "
        "(low), 7.2-24 ns in random order and not cached, and there the atomic of a lock (high). The kernel's own "
        "checks and statistics are not in it",
        each=(2.3, 24 + _ATOMIC[1]),
        basis="measured",
    ),
    Price(
        Event.ATTRIBUTES_STORED,
        "assumption: one range stored in a maple tree, nodes at hand",
        each=(200, 2000),
        basis="assumption",
    ),
    Price(
        Event.FOLIO_SPLIT,
        CARRIED + "vmemmap, struct pages and page cache are events of their own",
        basis="assumption",
    ),
    Price(
        Event.FOLIO_MERGED,
        CARRIED + "vmemmap, struct pages and page cache are events of their own",
        basis="assumption",
    ),
    Price(
        Event.FREEZE_SPIN,
        CARRIED + "the wait lasts as long as somebody else holds the folio",
        basis="assumption",
    ),
    Price(
        Event.SPIN_ENDED,
        CARRIED + "what was left of the conversion is events of its own",
        basis="assumption",
    ),
    Price(
        Event.SPIN_FAILED,
        CARRIED + "what was left of the conversion is events of its own",
        basis="assumption",
    ),
    Price(
        Event.SPIN_DROPPED,
        CARRIED + "nothing more is done",
        basis="assumption",
    ),
    Price(
        Event.IOPTE_WRITTEN,
        "assumption: as LEAF_WRITTEN",
        each=(20, 40),
        basis="assumption",
    ),
    Price(
        Event.IOPTE_CLEARED,
        "assumption: as LEAF_WRITTEN",
        each=(20, 40),
        basis="assumption",
    ),
    Price(
        Event.IOTLB_FLUSH_PAGES,
        "assumption: a command in the IOMMU's queue and the wait for it: some hundred ns to a few us",
        each=(300, 3000),
        basis="assumption",
    ),
    Price(
        Event.IOTLB_FLUSH_DOMAIN,
        "assumption: as IOTLB_FLUSH_PAGES",
        each=(300, 3000),
        basis="assumption",
    ),
    Price(
        Event.DEVICE_TABLE_UPDATED,
        "assumption: the entry of one device written, and a command and its wait as IOTLB_FLUSH_PAGES",
        each=(300, 3000),
        basis="assumption",
    ),
    Price(
        Event.IOMMU_STALE_PRIVATE,
        CARRIED + "the access is a device's",
        basis="assumption",
    ),
    Price(
        Event.IOMMU_STALE_FREED,
        CARRIED + "the access is a device's",
        basis="assumption",
    ),
    Price(
        Event.CONVERT_PINNED,
        CARRIED + "what the conversion did until then is events of its own",
        basis="assumption",
    ),
    Price(
        Event.MAPPED_STALE_PRIVATE,
        CARRIED + "the access goes through a mapping that is there",
        basis="assumption",
    ),
    Price(
        Event.MAPPED_STALE_FREED,
        CARRIED + "the access goes through a mapping that is there",
        basis="assumption",
    ),
    Price(
        Event.NOTIFIER_CALL,
        "assumption: SRCU, an interval tree lookup, mmu_lock",
        each=(100, 1000),
        basis="assumption",
    ),
    Price(
        Event.DEFERRED_MERGE,
        "assumption: a work item queued; the merge is events of its own",
        each=(500, 5000),
        basis="assumption",
    ),
    Price(
        Event.XARRAY_NODE_ALLOCATED,
        "assumption: a slab object of 576 bytes from the per-CPU list, nine cache lines cleared or filled",
        each=(30, 300),
        basis="assumption",
    ),
    Price(
        Event.XARRAY_NODE_FREED,
        "assumption: back to the slab, by RCU; at least two atomics",
        each=(15, 300),
        basis="assumption",
    ),
    Price(
        Event.METADATA_STASHED,
        "assumption: a small allocation filled from the folio, and stored where the merge finds it",
        each=(50, 1000),
        basis="assumption",
    ),
    Price(
        Event.VMEMMAP_HEAD_COPIED,
        "4 KiB as PAGE_COPIED; assumption: 50-500 ns for a page from the per-CPU list",
        each=HEAD_COPY,
        basis="assumption",
    ),
    Price(
        Event.RCU_SYNCHRONIZED,
        "Joel Fernandes, rcu_normal_wake_from_gp: 4 ms with it and 9.5 ms without, 36 CPUs; low end as fitted on a "
        "2-vCPU guest (profile guest-2vcpu). The caller sleeps",
        each=(3.0e6, 9.5e6),
        basis="published",
    ),
    Price(
        Event.VMEMMAP_FAULT,
        CARRIED + "a store through a read-only vmemmap entry is an oops",
        basis="assumption",
    ),
    Price(
        Event.REFERENCE_CHANGED,
        "assumption: one atomic, on a line that is cached (low) or another CPU's (high)",
        each=(5, 100),
        basis="assumption",
    ),
    Price(
        Event.PAGE_PINNED,
        "assumption: a walk without locks and one atomic (GUP-fast), or a lookup under mmap_lock; or the release of it",
        each=(20, 300),
        basis="assumption",
    ),
    Price(
        Event.LRU_CACHE_ADDED,
        "assumption: one atomic and a store in a per-CPU batch",
        each=(5, 50),
        basis="assumption",
    ),
    Price(
        Event.LRU_CACHE_DRAINED,
        "assumption: lru_add_drain_all(), a work item on every CPU, waited for; each folio then joins its list",
        fixed=(5000, 100000),
        each=(20, 200),
        basis="assumption",
    ),
    Price(
        Event.WORK_DONE,
        "assumption: a work item queued and run, two context switches",
        each=(1000, 10000),
        basis="assumption",
    ),
    Price(
        Event.SPTE_SPLIT,
        "assumption: a table of 512 entries written, and the entry that points to it",
        each=(300, 1500),
        basis="assumption",
    ),
    Price(
        Event.SPTE_PAGES_BEYOND,
        CARRIED + "SPTE_CLEARED counts the leaves",
        basis="assumption",
    ),
)

PUBLISHED = Profile.of("published", "no one machine: all that is published", date(2026, 11, 22), None, _PUBLISHED, None)
"""What other profiles stand on."""
