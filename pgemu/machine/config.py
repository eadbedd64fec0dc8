"""What a machine is made of."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any, Literal, NamedTuple

from pgemu import cost
from pgemu.machine.arguments import guards
from pgemu.machine.designs import DEFAULTS, ROWS, Design
from pgemu.machine.field_rules import DEFECTS, LEVEL_RULES, RULES, SPLIT_FORMS, THP, checked
from pgemu.machine.vm_kinds import Kind, kind_row
from pgemu_kernels import words as W
from pgemu_kernels.formats import bits as formats
from pgemu_kernels.words.properties import Property

__all__ = ("BY_KERNEL", "DEFECTS", "LEVEL_RULES", "PARAMETERS", "SPLIT_FORMS", "THP", "Config", "Node")

_RENAMED = {"convert_order": "order", "convert_batch": "batch", "series": "split_form",
            "rounded_zap_drops_both_kinds": "zap_filter"}  # fmt: skip

_FOR_FULL = (
    "nx_huge_pages",
    "split_to", "merge", "flush", "lru_cache", "worker", "host_huge", "large_folios", "dirty_log_guest_memfd",
    "in_place_conversion",
)  # fmt: skip
_BYTES = ("pool", "page_size", "memory", "other_pool", "buddy", "reserved")
_OF_DESIGN: Any = None  # the default of a field that the design's row or `DEFAULTS` has

BY_KERNEL = ("notifier", "revoke", "mirror")
"""Of `iommu_unmaps` those in which conversions themselves unmap what an IOAS has."""

PARAMETERS = ("order", "batch", "punch", "zap", "invalidate", "merge_zero", "level_rule", "defects", *_FOR_FULL)
"""Fields that say how the designs do what they do. Another value than the default of `order` or of one of the last
ones is known by `full.run_designs` only."""


@dataclass(frozen=True)
class Config:
    """What a machine is made of. Any other type or value of a field is a TypeError or a ValueError that names it.

    Config(design) alone is no version that was posted, but the branch of December 2025 on the newest kernel and mended;
    those that were are in pgemu.machine.presets, and `Versions().configuration(design)` is what `pgemu compare` runs.

    design: "restructure" or "pfnmap", which matters to guest_memfd inodes only. What the other one alone reads is taken
    and changes nothing: pfnmap, which splits no folio, reads neither `order`, `split_form`, `split_to`, `merge`,
    `merge_zero` and `poisoned_blocks` nor `zap` and `invalidate`; restructure neither `level_rule` nor `host_huge`, and
    has no VM_PFNMAP of guest_memfd that `dontneed_on_pfnmap` would be for.
    pool: bytes of HugeTLB memory, a multiple of `page_size` (2 MiB or 1 GiB); 0 for page tables alone. With a
    `page_size` of 4 KiB bytes of guest memory with the page allocator, a multiple of 2 MiB: guest_memfd as merged,
    of 4K folios, in either design; without `other_pool` and `buddy`, and `hvo` concerns huge pages only.
    memory: bytes of ordinary memory (tables, anonymous pages), beside what the pool's metadata takes.
    kernel: "6.12", "6.18" or "7.3": what Linux writes (formats.KERNELS). stage2: "npt" or "ept".
    hvo: whether the pool's vmemmap is optimised.
    vcpus, host_cpus: for the price of flushes; the default, one of each, makes them as cheap as
    can be.
    zero: "folio": the first guest fault of a folio that is not up to date zeroes all of it (rfc2), a host fault its
    4K; "page": 4K at a time, each at its first use, which is tracked. Not given: "folio" of restructure, "page" of
    pfnmap, whose folios stay whole (inference: pfnmap-zeroing).
    seed: order of never used frames; 0 is ascending.
    frames: how many metadata frames may be in use at once; a small number makes -ENOMEM happen. None is
    enough for every struct page and for the page tables of one process and one VM, all at 4K at once.
    zap_filter: which leaves a conversion drops where private memory has a root of its own: "both" (kvm-x86
    e088c7f86bef of in-place conversion, and the branch of December 2025), "target": only the kind that is left (older
    forms). With one root both kinds go, whatever it says: kvm_gfn_range_filter_to_root_types().
    vm: kind of the VMs that are created without one: "plain", "sw" (KVM_X86_SW_PROTECTED_VM), "snp", "tdx"
    (pgemu.machine.vm_kinds); snp has stage 2 "npt", tdx "ept".
    private_level: the largest leaf over private memory, "4K", "2M" or "1G"; None: that of the VM's kind, 2M of snp and
    tdx. "4K" is what mainline maps for tdx.
    notifier: unmapping host entries drops stage-2 leaves through KVM's MMU notifier (as captured).
    dontneed_on_pfnmap: let MADV_DONTNEED work on VM_PFNMAP, which no kernel does.
    nx_huge_pages: KVM's iTLB-multihit mitigation on EPT.
    l1tf: the processor has that bug, so that EPT's MMIO entries carry address bits 43:39.
    protection_keys: the processor has them (PKU), so that execute-only mappings get one (as captured).
    profile: a cost profile (pgemu.cost): its name, or the path of a TOML file. Its prices per CPU are multiplied
    by `vcpus` or `host_cpus`, whatever machine they were taken on. InputError for a bad file.
    other_pool: bytes of a second pool, of the huge page size that `page_size` is not, for HugeTLB mappings.
    nodes: NUMA nodes, 1 or 2; pools, `reserved` and `buddy` memory are spread over them, node 0 first.
    buddy: bytes beside the pools that the page allocator has, in blocks of 2 MiB: pools grow from them.
    reserved: bytes of each node behind its 1G pages that the kernel itself uses; they shift the 2M pages.
    configuration: "debian" or "small", the kernel configurations captured (formats.CONFIGURATIONS).
    pti: page-table isolation: processes have two top tables and the kernel's copy of an entry is no-execute.
    split_form: whose split and merge of folios: "rfc2" (page by page), "jan2026" (in place; folios/splitting.py).
    order: whose order of steps a conversion of restructure has: "rfc2", "fixup" (also of the branch of December 2025),
    "jan2026", "next4k".
    batch: "range": a conversion does all of its range or nothing; "block": one huge page after the other. The default
    of restructure is "block", of pfnmap "range".
    split_to: "4K", or the what-if "2M": a 1G folio is split to 2M folios, of these the touched ones to 4K.
    merge: "now": a conversion to private ends with the merge; "lazy": the worker does it.
    merge_zero: "none": a merge zeroes nothing, the next use what was never zeroed (inference); "unzeroed": the merge
    does, if anything was in use, so that the folio is up to date. With defect merge-keeps-flag neither is asked.
    flush: "each": flushes as posted; "batched": one of each process, VM and of the kernel per conversion (a what-if, of
    counts only: a kernel has to flush before the gate and before the invalidation ends).
    defects: mistakes of posted code that the machine has (DEFECTS); without them it is as fixed.
    lru_cache: folios of order 0 that join the page cache wait in per-CPU batches, which hold references.
    worker: "immediate": work items run at once; "queued": they wait for Machine.work().
    punch: "zero": partial huge pages of a hole are zeroed (rfc2); "refuse": -EINVAL (late 2025).
    level_rule: where the level of a guest's leaf follows from shareability (pfnmap): "uniform": the largest block that
    is all of one kind; "whole": a huge page that is, else 4K; "private": the largest that is all private, else 4K.
    host_huge: pfnmap enters 2M and 1G entries where all of the block is shared.
    large_folios: with a `page_size` of 4 KiB and special entries guest_memfd takes folios of 2M from the page allocator
    where nothing smaller is in the way, KVM maps them as such, and a hole in a part splits them: as captured.
    dirty_log_guest_memfd: slots of guest_memfd may log dirty pages, which KVM refuses.
    in_place_conversion: the module parameter gmem_in_place_conversion; without it conversions are -ENOTTY.
    zap: "exact": a conversion drops the stage-2 leaves over its range, as every posted version does; "rounded": over
    the range rounded out to huge pages (a what-if, of the orders that round anything).
    invalidate: "rounded": the orders of restructure begin and end an invalidation over the range rounded out to huge
    pages, as RFC v2 and the branch of December 2025 do; "exact": over the range, as in-place conversion of 4K does.
    allow_unsafe_mappings: KVM's module parameter (since 6.13): kvm_vcpu_map() takes frames of VM_PFNMAP, without a
    reference and without a notifier (Vm.map_page); without it it refuses them.
    thp: /sys/kernel/mm/transparent_hugepage/enabled, of anonymous memory: faults get 2M where they fit, "always" or
    where MADV_HUGEPAGE said so. Huge pages come from `buddy` memory (with a `page_size` of 4 KiB from the pool), and
    where there is none left faults get 4K.
    memory_failure: what memory_failure() makes of guest_memfd's huge folios and of the pieces of a split one: "handled"
    as a page of hugetlbfs and as merged 4K folios are; "marked": the flag is set and nothing else done, as of a HugeTLB
    page that is not migratable and of a folio that is in no LRU list (RFC v2 keeps its pieces off them).
    poisoned_blocks: a conversion that would split or merge a poisoned huge page: "refuse": -EHWPOISON; "move": the
    poison goes with its 4K page.
    mf_delayed: memory_failure() takes guest_memfd's MF_DELAYED for success, as v6 of "Fix MF_DELAYED handling on
    truncation during failure" (October 2026) does; kernels up to 7.3 take it for a failure (captured).
    iommu, dma, iommu_unmaps: of the devices that a trace names (experiments/devices.py); objects have such parameters
    of their own. iommu: the unit, "vtd" or "amd"; None: Intel's with EPT, AMD's with NPT. dma: "vfio": a container of
    type1; "iommufd": an IOAS; None: what the trace's maps and `iommu_unmaps` are for.
    iommu_unmaps: who takes pages from devices that become private. "refused": nobody, as Linux is: what a device maps
    is pinned, and what has no references is refused. What-ifs, in which that is mapped without: "none"; "vmm",
    "vmm-late": user space, before or after the conversion; of an IOAS "notifier", "revoke", "mirror": the kernel, by
    itself, with what stays shared entered again, or cut out exactly (Iommufd.create_ioas()).

    >>> Config("pfnmap", pool=2 << 30)
    Config('pfnmap', pool=2 << 30)
    """

    design: Design = "restructure"
    pool: int = 0
    page_size: int = W.PAGE_1G
    kernel: str = "7.3"
    stage2: Literal["npt", "ept"] = "npt"
    hvo: bool = True
    vcpus: int = 1
    host_cpus: int = 1
    zero: Literal["folio", "page"] = _OF_DESIGN
    seed: int = 0
    frames: int | None = None
    zap_filter: Literal["both", "target"] = "both"
    vm: Kind = "plain"
    private_level: Literal["4K", "2M", "1G"] | None = None
    notifier: bool = True
    dontneed_on_pfnmap: bool = False
    nx_huge_pages: bool = False
    l1tf: bool = False
    protection_keys: bool = True
    profile: str | os.PathLike[str] = "published"
    memory: int = 64 << 20
    other_pool: int = 0
    pti: bool = False
    nodes: int = 1
    buddy: int = 0
    reserved: int = 0
    configuration: Literal["debian", "small"] = "debian"
    split_form: Literal["rfc2", "jan2026"] = "jan2026"
    order: Literal["rfc2", "fixup", "jan2026", "next4k"] = "fixup"
    batch: Literal["range", "block"] = _OF_DESIGN
    split_to: Literal["4K", "2M"] = "4K"
    merge: Literal["now", "lazy"] = "now"
    merge_zero: Literal["none", "unzeroed"] = "none"
    flush: Literal["each", "batched"] = "each"
    defects: tuple[str, ...] = ()
    lru_cache: bool = False
    worker: Literal["immediate", "queued"] = "immediate"
    punch: Literal["zero", "refuse"] = "refuse"
    level_rule: Literal["uniform", "whole", "private"] = "uniform"
    host_huge: bool = False
    large_folios: bool = False
    dirty_log_guest_memfd: bool = False
    in_place_conversion: bool = True
    zap: Literal["exact", "rounded"] = "exact"
    invalidate: Literal["rounded", "exact"] = "rounded"
    thp: Literal["never", "madvise", "always"] = "never"
    memory_failure: Literal["handled", "marked"] = "handled"
    poisoned_blocks: Literal["refuse", "move"] = "refuse"
    mf_delayed: bool = False
    allow_unsafe_mappings: bool = False
    iommu: Literal["vtd", "amd"] | None = None
    dma: Literal["vfio", "iommufd"] | None = None
    iommu_unmaps: Literal["refused", "none", "vmm", "vmm-late", "notifier", "revoke", "mirror"] = "refused"

    def __new__(cls, *values: Any, **fields: Any) -> Config:
        """Make one. TypeError for a name that a field had once, with the one that it has now."""
        for old in fields.keys() & _RENAMED.keys():
            raise TypeError(f"Config has no field {old!r}: it is called {_RENAMED[old]!r}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """TypeError or ValueError for a field that is none (field_rules.py), ValueError for two that do not fit."""
        row = ROWS[checked("design", self.design)]
        for name in RULES:
            given = getattr(self, name)
            value = row.default(name) if given is None and name in DEFAULTS else checked(name, given)
            object.__setattr__(self, name, value)
        for holds, complaint in chain(self._of_pages(), self._together(), self._of_thp(), self._amounts()):
            if not holds:
                raise ValueError(complaint)
        kind_row(self.vm, self.stage2)  # ValueError for what is none
        cost.profile(self.profile)  # ValueError or InputError for what is none
        if not isinstance(self.profile, str):  # a path remains one, "./published" too
            object.__setattr__(self, "profile", os.path.join(os.curdir, self.profile))

    def __repr__(self) -> str:
        """The design and what differs from the defaults, as it can be written: Config('pfnmap', pool=2 << 30)."""
        plain = (
            (field.name, getattr(self, field.name), self._default(field.name))
            for field in fields(self)
            if field.name != "design"
        )
        changed = [f"{name}={_written(name, value)}" for name, value, default in plain if value != default]
        return f"{type(self).__name__}({', '.join([repr(self.design), *changed])})"

    def _default(self, name: str) -> Any:
        """What a field is where it is not given."""
        return ROWS[self.design].default(name) if name in DEFAULTS else getattr(type(self), name)

    def _of_pages(self) -> Iterator[tuple[bool, str]]:
        """Whether each field fits the size of a page, and what to say if not."""
        small = self.page_size == W.PAGE_4K
        for name in ("other_pool", "buddy"):
            size = getattr(self, name)
            yield (
                not small or not size,
                f"{name} {size} with page_size 4096: expected 0, for the page allocator has the pool",
            )
        yield (
            not small or self.split_to == "4K",
            f"split_to {self.split_to!r} with page_size 4096: expected '4K', for no folio is larger",
        )
        special = bool(ROWS[self.design].properties & Property.SPECIAL_ENTRIES)
        yield (
            not self.large_folios or (small and special),
            f"large_folios True with design {self.design!r} and page_size {self.page_size}: expected a design with "
            "special entries, and page_size 4096",
        )

    def _together(self) -> Iterator[tuple[bool, str]]:
        """The same of other fields."""
        yield from (
            (
                self.nodes == 1 or self.configuration != "small",
                f"nodes {self.nodes} with configuration 'small': expected 1, for that has no NUMA",
            ),
            (
                self.order != "next4k" or self.design != "restructure" or self.page_size == W.PAGE_4K,
                f"order 'next4k' with page_size {self.page_size}: expected page_size 4096, which it is for",
            ),
            (
                not self.allow_unsafe_mappings or formats.KERNELS[self.kernel].pins_mapped_pages,
                f"allow_unsafe_mappings True with kernel {self.kernel!r}: expected one that has the parameter, 6.13 or "
                "later",
            ),
            (
                self.zap == "exact" or self.invalidate == "rounded",
                "zap 'rounded' with invalidate 'exact': expected invalidate 'rounded', for nobody drops what is not "
                "being invalidated",
            ),
            (
                self.dma != "vfio" or self.iommu_unmaps not in BY_KERNEL,
                f"iommu_unmaps {self.iommu_unmaps!r} with dma 'vfio': expected dma 'iommufd', for nobody tells VFIO of "
                "conversions",
            ),
        )

    def _of_thp(self) -> Iterator[tuple[bool, str]]:
        """Whether transparent huge pages could come from anywhere."""
        source = self.pool if self.page_size == W.PAGE_4K else self.buddy
        yield (
            self.thp == "never" or source > 0,
            f"thp {self.thp!r} with no memory for huge pages: expected buddy memory, or a pool of page_size 4096",
        )

    def _amounts(self) -> Iterator[tuple[bool, str]]:
        """Whether each amount of memory is one of whole pages of its size."""
        for name, size, unit in (
            ("pool", self.pool, max(self.page_size, W.PAGE_2M)),
            ("memory", self.memory, W.PAGE_4K),
            ("other_pool", self.other_pool, self.other_page_size),
            ("buddy", self.buddy, W.PAGE_2M),
            ("reserved", self.reserved, W.PAGE_2M),
        ):
            yield size % unit == 0, f"{name} of {size} bytes: expected a multiple of {unit}, or 0"

    @property
    def full(self) -> bool:
        """Whether a parameter of the designs differs from what `fast.run` has loops for."""
        own_order = ROWS[self.design].order is None
        names = ("order",) * own_order + _FOR_FULL
        changed = any(getattr(self, name) != getattr(type(self), name) for name in names)
        return (
            self.page_size == W.PAGE_4K or changed or not set(self.defects) <= {"merge-keeps-flag", "uptodate-unzeroed"}
        )

    @property
    def page_order(self) -> int:
        """Order of the inodes' pages: 9 or 18, those of the pool, or 0."""
        return {W.PAGE_4K: 0, W.PAGE_2M: W.ORDER_2M, W.PAGE_1G: W.ORDER_1G}[self.page_size]

    @property
    def pool_pages(self) -> int:
        """Huge pages in the pool, or 4K pages of guest memory."""
        return self.pool // self.page_size

    @property
    def other_page_size(self) -> int:
        """Size of the huge pages of the second pool: the one of 2 MiB and 1 GiB that the first has not."""
        return W.PAGE_1G if self.page_size == W.PAGE_2M else W.PAGE_2M

    @property
    def other_pool_pages(self) -> int:
        """Huge pages in the second pool."""
        return self.other_pool // self.other_page_size

    @guards()
    def node(self, number: int) -> Node:
        """What lies on a NUMA node. Its part of the HugeTLB zone begins at a multiple of 1 GiB.

        ValueError for one that the machine has not.

        >>> Config(pool=4 << 30, nodes=2).node(1)
        Node(gigantic=2, reserved=0, huge=0, free=0)
        """
        if number >= self.nodes:
            raise ValueError(f"number {number}: expected a node of the machine, 0 to {self.nodes - 1}")
        small = self.pool if self.page_order == 0 else 0
        sizes = {W.ORDER_2M: self.other_pool_pages, W.ORDER_1G: self.other_pool_pages, self.page_order: self.pool_pages}

        def share(count: int) -> int:
            return (count + self.nodes - 1 - number) // self.nodes

        return Node(
            share(sizes[W.ORDER_1G]),
            self.reserved >> 12,
            share(sizes[W.ORDER_2M]),
            share((self.buddy + small) // W.PAGE_2M),
        )

    @property
    def format_parameters(self) -> dict[str, bool]:
        """What of it changes the entries that a kernel writes: arguments of page_format.format_table()."""
        return {"nx_huge_pages": self.nx_huge_pages, "l1tf": self.l1tf, "pti": self.pti}

    @property
    def guest_pages(self) -> int:
        """4K pages from the start of the HugeTLB zone to its end."""
        *others, last = (self.node(number) for number in range(self.nodes))
        return sum(node.span for node in others) + last.pages


def _written(name: str, value: Any) -> str:
    """A field's value as it can be written; bytes with the largest unit that leaves no fraction."""
    if name not in _BYTES:
        return repr(value)
    shift = next((shift for shift in (30, 20, 10) if value and value % (1 << shift) == 0), 0)
    return f"{value >> shift} << {shift}" if shift else repr(value)


class Node(NamedTuple):
    """A NUMA node's part of the HugeTLB zone, in the order in which it lies there.

    gigantic: 1G pages of boot. reserved: 4K pages that the kernel uses. huge: 2M pages of boot. free: 2M blocks that
    the page allocator has.
    """

    gigantic: int
    reserved: int
    huge: int
    free: int

    @property
    def pages(self) -> int:
        """4K pages in all."""
        return (self.gigantic << 18) + self.reserved + (self.huge + self.free << 9)

    @property
    def span(self) -> int:
        """4K pages up to the next node."""
        return -(-self.pages >> 18) << 18

    @guards()
    def boot_frames(self, hvo: bool) -> int:
        """Frames of the boot allocator at most: 512 for 128 MiB not all optimised, one for a 1G page that is.

        Each 512 begin at a multiple of 512.

        >>> Config(pool=4 << 30).node(0).boot_frames(hvo=True)
        512
        """
        if not hvo:
            return -(-self.pages >> 15) * 512
        start = self.gigantic << 18
        optimized = range(start + self.reserved, start + self.reserved + (self.huge << 9))
        sections = -(-(self.pages - start) >> 15) - len(range(-(-optimized.start >> 15), optimized.stop >> 15))
        return sections * 512 + -(-(self.gigantic + 1) // 512) * 512
