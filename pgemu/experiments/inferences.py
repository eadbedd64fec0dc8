"""Rules that no source states, in one place: what is done, from what that follows, and what else could be.

A comparison is repeated under each alternative, to see which of its answers rest on a rule (sensitivity.py). A rule
without alternatives is one that a replay cannot show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pgemu_kernels.words.events import Event
from pgemu_kernels.words.operations import ORDER_2M, PAGE_4K, Flag, Operation

if TYPE_CHECKING:
    from pgemu.experiments.compare import Comparison, DesignRun
    from pgemu.machine.presets import Versions

__all__ = ("INFERENCES", "Alternative", "Inference", "large_host_faults", "may_touch", "unreached")


@dataclass(frozen=True)
class Alternative:
    """What a rule could be otherwise.

    Attributes:
        label: in a word, as the command line has it
        when: as a condition, for the screen
        fields: fields of Config that it changes
        designs: whose machines
        versions: fields of Versions that it changes
        trace: parameters of the workload
        unseen: the guest touches what the recorded VM may have used without a fault
        unreached: zeroing of memory that no slot reaches is charged
    """

    label: str
    when: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    designs: tuple[str, ...] = ("restructure", "pfnmap")
    versions: Mapping[str, Any] = field(default_factory=dict)
    trace: Mapping[str, float] = field(default_factory=dict)
    unseen: bool = False
    unreached: bool = False

    def changed(self, versions: Versions) -> Versions:
        """The versions under it."""
        return replace(versions, **self.versions)


_Touches = Callable[["Comparison"], str]


def may_touch(_: Comparison) -> str:
    """Every comparison may depend on a rule."""
    return ""


@dataclass(frozen=True)
class Inference:
    """A rule that no source states.

    Attributes:
        text: what is done
        source: from what it follows
        alternatives: what else could be; those that are what is done are left out of a comparison
        untouched: why a comparison cannot depend on it, "" where it may
    """

    text: str
    source: str
    alternatives: tuple[Alternative, ...] = ()
    untouched: _Touches = may_touch


def unreached(run: DesignRun) -> int:
    """4K pages that were zeroed though no memory slot reaches them."""
    return run.statistics.event(Event.ZEROED_UNREACHED)


def _run(comparison: Comparison, design: str) -> DesignRun | None:
    return next((run for run in comparison.runs if run.design == design), None)


def _has(comparison: Comparison, op: Operation) -> bool:
    return any(run.operation(op) for run in comparison.runs)


def _not_replayed(_: Comparison) -> str:
    return "a replay does not interleave: nobody comes between its steps"


def _only_statement(_: Comparison) -> str:
    return "a statement about the design, which no count depends on"


def _without(op: Operation, what: str) -> _Touches:
    return lambda comparison: "" if _has(comparison, op) else f"the trace has no {what}"


def _no_hole(comparison: Comparison) -> str:
    """Whether a hole was made: one that is refused leaves everything as it was."""
    made = any(found.outcomes.get("ok") for run in comparison.runs if (found := run.operation(Operation.PUNCH_HOLE)))
    return "" if made else "no hole is made"


def _merges(comparison: Comparison) -> str:
    run = _run(comparison, "restructure")
    if not run or not run.statistics.event(Event.FOLIO_MERGED):
        return "nothing is merged"
    lies = {"uptodate-unzeroed", "merge-keeps-flag"} & {*run.config.defects}
    return f"defect {min(lies)}: a merge does not look" if lies else ""


def _fails_without_memory(comparison: Comparison) -> str:
    """Orders do the same steps: they differ in what a failed conversion leaves, and in what others see meanwhile."""
    run = _run(comparison, "restructure")
    found = run.operation(Operation.CONVERT) if run else None
    failed = found and any(name.startswith("-") and name not in ("-EINVAL", "-ENOTTY") for name in found.outcomes)
    return "" if failed else "no conversion fails on the way, and orders differ in what a failure leaves"


def _shareability(comparison: Comparison) -> Iterator[tuple[int, slice | None, npt.NDArray[np.bool_]]]:
    """Follow the conversions of a trace: (record, what is converted, whether each page is shared before it).

    Of host faults, too; what is converted is None then, and where the conversion is refused.
    """
    lowered = comparison.lowered
    records = lowered.records
    shared = np.full(lowered.layout.inode_size // PAGE_4K, lowered.init == "shared")
    for i in np.flatnonzero((records.op == Operation.CONVERT) | (records.op == Operation.HOST_FAULT)).tolist():
        pages = None
        if records.op[i] == Operation.CONVERT:
            offset, length = int(records.offset[i]), int(records.length[i])
            whole = (
                comparison.runs[0].config.vm != "plain"
                and not (offset % PAGE_4K or length % PAGE_4K)
                and offset + length <= lowered.layout.inode_size
            )
            kind = int(records.flags[i]) & (Flag.SHARED | Flag.PRIVATE)
            if whole and kind in (Flag.SHARED, Flag.PRIVATE):
                pages = slice(offset // PAGE_4K, (offset + length) // PAGE_4K)
        yield i, pages, shared
        if pages:
            shared[pages] = kind == Flag.SHARED


def large_host_faults(comparison: Comparison) -> int:
    """Host faults in blocks of 2M that are all shared: only there could a larger entry be."""
    lowered = comparison.lowered
    records = lowered.records
    if lowered.init == "shared" and not lowered.converts:
        return int((records.op == Operation.HOST_FAULT).sum())
    found = 0
    for i, _, shared in _shareability(comparison):
        if records.op[i] == Operation.HOST_FAULT:
            address = int(records.address[i])
            region = next((one for one in lowered.layout.regions if one.address <= address < one.end), None)
            page = None if region is None else (address - region.address + region.offset) // PAGE_4K
            found += page is None or bool(shared[page >> ORDER_2M << ORDER_2M :][: 1 << ORDER_2M].all())
    return found


def _one_kind(comparison: Comparison) -> str:
    """Whether what a conversion zaps is all of the kind that is left.

    The root of the other kind maps nothing of it then: it maps only memory that is of its kind.
    """
    if comparison.runs[0].config.vm != "tdx":
        return "private memory has no root of its own"
    for run in comparison.runs:
        found = run.operation(Operation.CONVERT)
        if "convert-keeps-leaves" in run.config.defects or (found and {*found.outcomes} != {"ok"}):
            return ""
    flags = comparison.lowered.records.flags
    for i, pages, shared in _shareability(comparison):
        if pages and (shared[pages] == bool(int(flags[i]) & Flag.SHARED)).any():
            return ""
    return "no conversion finds memory that is already what it is to be"


def _host_maps_large(comparison: Comparison) -> str:
    return "" if large_host_faults(comparison) else "no host fault is in a 2M block that is all shared"


def _has_parameter(comparison: Comparison, name: str) -> bool:
    """Whether the trace is a workload's that has a parameter of that name."""
    if comparison.lowered.again is None:
        return False
    from pgemu.workload import parameters_of

    return name in parameters_of(comparison.lowered.source)


_LARGE = (Alternative("huge", "if pfnmap mapped processes by 2M and 1G", {"host_huge": True}, ("pfnmap",)),)

INFERENCES: Mapping[str, Inference] = MappingProxyType(
    {
        "zap": Inference(
            "a conversion drops the stage-2 leaves of exactly its range",
            "every posted and public version; that a later one rounds out is a what-if",
            (Alternative("rounded", "if conversions zapped whole huge pages", {"zap": "rounded"}, ("restructure",)),),
            _without(Operation.CONVERT, "conversion"),
        ),
        "invalidate": Inference(
            "begin and end of an invalidation are rounded out to huge pages",
            "RFC v2 and the branch of December 2025; linux-next has no huge pages",
            (Alternative("exact", "if invalidations were of the range", {"invalidate": "exact"}, ("restructure",)),),
            _not_replayed,
        ),
        "zero": Inference(
            "what restructure zeroes at first use: as the version does",
            "rfc2: the whole folio; dec2025: 4K of it, and all counts as up to date (uptodate-unzeroed)",
            (
                Alternative("folio", "if restructure zeroed whole folios", {"zero": "folio"}, ("restructure",)),
                Alternative("page", "if restructure zeroed page by page", {"zero": "page"}, ("restructure",)),
            ),
        ),
        "merge-zero": Inference(
            "a merge zeroes nothing",
            "no version says what happens to pages that were never zeroed",
            (
                Alternative(
                    "unzeroed", "if a merge zeroed what never was", {"merge_zero": "unzeroed"}, ("restructure",)
                ),
            ),
            _merges,
        ),
        "pfnmap-zeroing": Inference(
            "pfnmap zeroes page by page",
            "PG_uptodate is one bit, and the folio stays whole for ever",
            (Alternative("folio", "if pfnmap zeroed whole folios", {"zero": "folio"}, ("pfnmap",)),),
        ),
        "pfnmap-level": Inference(
            "pfnmap maps the guest at the largest level whose block is all private or all shared",
            "slides: the level follows from shareability, clamped as the rest of KVM does",
            (
                Alternative(
                    "whole",
                    "if pfnmap mapped whole huge pages or 4K, no level between",
                    {"level_rule": "whole"},
                    ("pfnmap",),
                ),
                Alternative("private", "if pfnmap mapped shared memory by 4K", {"level_rule": "private"}, ("pfnmap",)),
            ),
        ),
        "host-huge": Inference(
            "pfnmap maps processes by 4K only",
            "the change that was tested inserts by vmf_insert_pfn()",
            _LARGE,
            _host_maps_large,
        ),
        "dec2025-order": Inference(
            "order of steps of dec2025: zap, end, restructure, store",
            "read in a tree that carries the branch and adds splits of leaves; the branch alone was not read",
            (
                Alternative("fixup", "in the order of the fix-ups", {"order": "fixup"}, ("restructure",)),
                Alternative("jan2026", "in the order of jan2026", {"order": "jan2026"}, ("restructure",)),
            ),
            _fails_without_memory,
        ),
        "pfnmap-order": Inference(
            "pfnmap converts its range at once: unmap, begin, zap, store, end",
            "the steps of linux-next without the gate",
            (Alternative("block", "if pfnmap converted huge page by huge page", {"batch": "block"}, ("pfnmap",)),),
            _without(Operation.CONVERT, "conversion"),
        ),
        "pfnmap-insert-locked": Inference(
            "pfnmap inserts entries under the invalidate_lock",
            "no reference protects a fault under way; the slides' change does not",
            (
                Alternative(
                    "slides2025",
                    "as the slides' change does it",
                    versions={"pfnmap": "slides2025"},
                    designs=("pfnmap",),
                ),
            ),
            _not_replayed,
        ),
        "pfnmap-holes-unmap": Inference(
            "pfnmap unmaps a hole's range before it truncates",
            "truncation finds no special entry; the slides' change leaves them",
            (
                Alternative(
                    "slides2025",
                    "as the slides' change does it",
                    versions={"pfnmap": "slides2025"},
                    designs=("pfnmap",),
                ),
            ),
            _no_hole,
        ),
        "holes": Inference(
            "holes smaller than a huge page: as the version of restructure does, in both designs",
            "rfc2 zeroes parts of huge pages, dec2025 refuses them (-EINVAL); of pfnmap nobody has said",
            (
                Alternative("zero", "if holes below a huge page were zeroed", {"punch": "zero"}),
                Alternative("refuse", "if holes below a huge page were refused", {"punch": "refuse"}),
            ),
            _without(Operation.PUNCH_HOLE, "hole"),
        ),
        "private-level": Inference(
            "private memory of a TDX VM is mapped by leaves of up to 2M",
            "TDX huge pages v3, posted; mainline maps 4K",
            (Alternative("4K", "if private memory were mapped by 4K", {"private_level": "4K"}),),
            lambda comparison: "" if comparison.runs[0].config.vm == "tdx" else "not a TDX VM",
        ),
        "kernel": Inference(
            "the kernel of a version: the release before it, 6.18, or for next 7.3",
            "their bases are between releases",
            (
                Alternative("7.3", "on Linux 7.3", {"kernel": "7.3"}),
                Alternative("6.18", "on Linux 6.18", {"kernel": "6.18"}),
            ),
        ),
        "zap-filter": Inference(
            "a conversion of a TDX VM zaps both kinds of memory",
            "in-place conversion (kvm-x86 e088c7f86bef) and dec2025; of rfc2 the kind that is left",
            (Alternative("target", "if only the kind that is left were zapped", {"zap_filter": "target"}),),
            _one_kind,
        ),
        "tdx-split-to-private": Inference(
            "leaves over the border of a zapped range are split before every conversion of a TDX VM",
            "the fix-ups split to shared; a zap of both kinds to private would drop such a leaf whole",
            (),
            _only_statement,
        ),
        "snp-large-by-level": Inference(
            "where folios stay whole the level of the leaf is the size of its RMP entry",
            "sev_gmem_prepare() takes the folio's order",
            (),
            _only_statement,
        ),
        "overlap": Inference(
            "flips of the workload do not overlap with a page that stays shared",
            "the published counters have no times",
            (Alternative("1", "if another page of the GiB stayed shared all the time", trace={"overlap": 1.0}),),
            lambda comparison: "" if _has_parameter(comparison, "overlap") else "no workload with that parameter",
        ),
        "memory-failure-huge": Inference(
            "memory failure handles huge folios of guest_memfd, and the pieces of split ones",
            "mainline's code for pages that are migratable and in an LRU list; RFC v2 says of it: not implemented",
            (
                Alternative("handled", "if they were handled", {"memory_failure": "handled"}),
                Alternative("marked", "if they were only marked", {"memory_failure": "marked"}),
            ),
            _without(Operation.MEMORY_FAILURE, "memory failure"),
        ),
        "poisoned-blocks": Inference(
            "a conversion that would split or merge a poisoned huge page is refused with -EHWPOISON",
            "drafts of the conversion have that error; posted split and merge say TODO",
            (
                Alternative("refuse", "if it were refused", {"poisoned_blocks": "refuse"}, ("restructure",)),
                Alternative("move", "if the poison went with its page", {"poisoned_blocks": "move"}, ("restructure",)),
            ),
            _without(Operation.MEMORY_FAILURE, "memory failure"),
        ),
        "iommu-unmaps": Inference(
            "devices map guest memory as Linux lets them: pinned, or refused, and nobody unmaps for a conversion",
            "VFIO type1 and iommufd take no guest_memfd; who unmaps it is an open question of 2026",
            (
                Alternative("none", "if devices mapped without pins and nobody unmapped", {"iommu_unmaps": "none"}),
                Alternative("vmm", "if user space unmapped before a conversion", {"iommu_unmaps": "vmm"}),
                Alternative("vmm-late", "if user space unmapped after a conversion", {"iommu_unmaps": "vmm-late"}),
                Alternative("revoke", "if conversions revoked pages of devices", {"iommu_unmaps": "revoke"}),
                Alternative("mirror", "if I/O entries mirrored what is shared", {"iommu_unmaps": "mirror"}),
                Alternative("refused", "if devices pinned, or were refused", {"iommu_unmaps": "refused"}),
            ),
            _without(Operation.DMA_MAP, "map for devices"),
        ),
        "slot-reach": Inference(
            "zeroing of memory that no slot reaches is charged to no design",
            "a guest_memfd is as large as its huge pages, the VM's memory may be smaller",
            (Alternative("charged", "if zeroing that no slot reaches counted", unreached=True),),
            lambda comparison: "" if any(map(unreached, comparison.runs)) else "slots reach all that is zeroed",
        ),
        "recorded-levels": Inference(
            "a guest touches again what it lost as often as the log shows",
            "a VM with larger leaves faulted less than the design would have",
            (Alternative("all touched", "if the guest used all that the recorded VM had mapped", unseen=True),),
            lambda comparison: "not a log, but all accesses" if comparison.lowered.accesses else "",
        ),
        "lazy-merge": Inference(
            "what became all private is merged by the conversion itself",
            "every posted version; a worker is a what-if",
            (Alternative("lazy", "if a worker merged", {"merge": "lazy"}, ("restructure",)),),
            lambda comparison: "a what-if that no version has",
        ),
        "dirty-log": Inference("slots of guest_memfd log no dirty pages", "KVM refuses it", (), _only_statement),
        "own-design": Inference("a design of a row has what its properties say", "the row", (), _only_statement),
    }
)
"""By name, as the report and Source.rule have it."""
