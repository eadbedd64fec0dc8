"""Claims about devices: what VFIO takes, who unmaps them, what they write through an entry that outlived its page."""

from __future__ import annotations

from collections.abc import Callable

from pgemu.experiments.claims.claim import HVA, Claim, Evidence, Figures, Found, Setting, Switch, Verdict
from pgemu.experiments.claims.measures import pages
from pgemu.experiments.claims.reach import IOVA, MAILS, OFFSET, UNITS, Measured, Reach, both
from pgemu.machine.designs import Design
from pgemu.machine.results import Result, status_name
from pgemu.objects.devices import Accounts, VfioContainer
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Gauge

__all__ = ("CLAIMS",)

_SLIDES = "slides of 2025-08-07"
_SMALL = Setting(page_size=W.PAGE_2M)
_BAR, _BAR_PFN = HVA - (1 << 40), 1 << 30
_READ_WRITE = 3
_SECRET = b"\x11" * 8


# --------------------------------------------------------------------------- VFIO and VM_PFNMAP


def _vfio(setting: Setting, design: Design) -> Measured:
    """A BAR and shared RAM, both mapped by the process, are given to one device."""
    reach = Reach.through(setting.changed({"door": "vfio linux"}), design, 1)
    machine, process = reach.scene.machine, reach.scene.process
    pinned = Accounts.of(process).locked
    bar = machine.create_device(_BAR_PFN, W.PAGE_2M // W.PAGE_4K)
    process.mmap_device(bar, _BAR, W.PAGE_2M, _READ_WRITE)
    assert isinstance(reach.space, VfioContainer)
    status = reach.space.map(2 * IOVA, W.PAGE_2M, process, _BAR).status
    return {
        "bar": status_name(None, status),
        "bar_pins": Accounts.of(process).locked - pinned,
        "ram": status_name(None, reach.status),
        "ram_pins": pinned,
        "convert": reach.scene.gmem.convert(OFFSET, W.PAGE_4K, shared=False).name,
    }


_VFIO = {
    "bar": ("map of a BAR", ""), "bar_pins": ("4K pages of it pinned", ""), "ram": ("map of shared RAM", ""),
    "ram_pins": ("4K pages of it pinned", ""), "convert": ("conversion of a page of it meanwhile", ""),
}  # fmt: skip


def _bar_only(figures: Figures) -> Found:
    bar, pins, ram, convert = (figures[name] for name in ("bar", "bar_pins", "ram", "convert"))
    told = f"a BAR is {bar.trial} with {pins.trial} pins, RAM {ram.trial} against {ram.other}"
    told += f"; a conversion meanwhile is {convert.trial} against {convert.other}"
    if ram.trial == "ok":
        return Found(Verdict.FALSE, told)
    return Found(Verdict.HOLDS if bar.trial == "ok" and pins.trial == 0 else Verdict.PART, told)


def _without_check(setting: Setting, design: Design) -> Measured:
    """RAM is mapped, a page of it converted and written to; all is unmapped, and the struct pages are looked at."""
    reach = Reach.through(setting, design, 1)
    machine, gmem = reach.scene.machine, reach.scene.gmem

    def references() -> int:
        """Of the folios of the huge page, over what its page cache and its mappings have."""
        first, found, at = gmem.pfn(0), 0, 0
        while first is not None and at < setting.page_size >> 12:
            folio = machine.folio(first + at)
            found, at = found + folio.refcount - folio.expected_references, at + (1 << folio.order)
        return found

    pinned = machine.statistics.gauge(Gauge.PAGES_PINNED)
    held = references()
    converted = gmem.convert(OFFSET, W.PAGE_4K, shared=False).status
    stale = reach.reaches_wrongly(OFFSET)
    reach.space.unmap_all()
    return {
        "map": status_name(None, reach.status),
        "pinned": pinned,
        "held": held,
        "left": references(),
        "findings": machine.check(),
        "convert": status_name(None, converted),
        "stale": int(stale),
    }


_UNCHECKED = {
    "map": ("map of shared RAM", ""), "pinned": ("4K pages that are pinned", ""),
    "held": ("references beyond page cache and mappings: mapped", ""), "left": ("... unmapped", ""),
    "findings": ("rules broken afterwards", ""), "convert": ("conversion of a page of it meanwhile", ""),
    "stale": ("writes of the device that land in the private page", ""),
}  # fmt: skip


def _underflows(figures: Figures) -> Found:
    left, findings, stale = (figures[name] for name in ("left", "findings", "stale"))
    if int(left.trial) < 0:
        told = f"an unmap takes {-int(left.trial):,} references of a folio in use, {findings.trial} rules are broken"
        return Found(Verdict.HOLDS, f"{told}; against {left.other:,} and {findings.other}")
    if stale.trial:
        return Found(Verdict.PART, f"no reference is taken, but {stale.trial} write lands in a private page")
    convert = figures["convert"]
    return Found(
        Verdict.FALSE, f"{figures['held'].trial:,} references are taken and put; a conversion: {convert.trial}"
    )


# --------------------------------------------------------------------------- who must unmap


_OPERATIONS = {
    "conversion": "a conversion to private", "hole": "a hole", "end": "the end of the file",
    "munmap": "munmap", "slot": "deletion of the memory slot", "shared": "a conversion to shared",
}  # fmt: skip


def _after_each(setting: Setting, design: Design) -> Measured:
    """A huge page for each operation; which writes of the device land afterwards where nothing is shared.

    Those that take nothing from the device come first: one that does may take more of a large I/O entry.
    """
    reach = Reach.through(setting, design, len(_OPERATIONS) + 1)
    scene, size = reach.scene, setting.page_size
    gmem = scene.gmem
    at = {name: i * size + OFFSET for i, name in enumerate((*_OPERATIONS, "failed"))}
    scene.vm.touch_many(pages(scene))
    operations: dict[str, Callable[[], Result]] = {
        "munmap": lambda: scene.process.munmap(HVA, gmem.size),
        "slot": lambda: scene.vm.unbind(0),
        "shared": lambda: gmem.convert(at["shared"], size - OFFSET, shared=True),
        "failed": lambda: Result(min(gmem.memory_failure(at["failed"]).status, 0), 0),
        "conversion": lambda: gmem.convert(at["conversion"], W.PAGE_4K, shared=False),
        "hole": lambda: gmem.punch_hole(at["hole"] - OFFSET, size),
        "end": gmem.close,
    }
    found = {}
    for name, operation in operations.items():
        done = operation()
        if done.status not in (0, -W.EBUSY if name == "failed" else 0):
            raise RuntimeError(f"{name}, which nothing is in the way of: {done.name}")
        found[name] = int(reach.writes(at[name]) if name == "failed" else reach.reaches_wrongly(at[name]))
    return found


_AFTER = {name: (f"stale writes after {what}", "") for name, what in _OPERATIONS.items()}
_AFTER["failed"] = ("writes to a page that failed (memory failure)", "")


def _nothing_stale(figures: Figures) -> Found:
    stale = [name for name in _OPERATIONS if figures[name].trial]
    harmless = [what for name, what in _OPERATIONS.items() if name not in stale]
    if not stale:
        return Found(Verdict.HOLDS, "no write of a device lands where nothing is shared any more")
    told = f"must unmap: {', '.join(_OPERATIONS[name] for name in stale)}; need not: {', '.join(harmless)}"
    return Found(Verdict.FALSE if len(stale) > 2 else Verdict.PART, told)


# --------------------------------------------------------------------------- stale entries


def _changed(reach: Reach, offset: int, pfn: int | None) -> Measured:
    """What a device's write at an offset makes of a frame: changed bytes, and who notices."""
    machine = reach.scene.machine
    if pfn is None:
        return {"changed": 0, "faults": int(not reach.writes(offset)), "checks": machine.machine_checks}
    machine.write_frame(pfn, _SECRET)
    landed = reach.writes(offset)
    now = machine.read_frame(pfn)[: len(_SECRET)]
    changed = sum(a != b for a, b in zip(now, _SECRET, strict=True))
    return {"changed": changed, "faults": int(not landed), "checks": machine.machine_checks}


def _into_private(setting: Setting, design: Design) -> Measured:
    """A page is converted and the guest writes to it; then the device does."""
    reach = Reach.through(setting, design, 1)
    gmem = reach.scene.gmem
    status = gmem.convert(OFFSET, W.PAGE_4K, shared=False).name
    reach.scene.vm.touch(OFFSET, write=True)
    return {"convert": status} | _changed(reach, OFFSET, None if gmem.is_shared(OFFSET) else gmem.pfn(OFFSET))


def _into_another(setting: Setting, design: Design) -> Measured:
    """A hole; another file takes the frame and shares it with its process; then the device writes."""
    reach = Reach.through(setting, design, 1, pool=4 * setting.page_size)
    gmem, machine = reach.scene.gmem, reach.scene.machine
    pfn = gmem.pfn(0)
    hole = gmem.punch_hole(0, setting.page_size)
    other = machine.create_guest_memfd(2 * setting.page_size, shared=True)
    other.allocate(0, other.size)
    taken = any(other.pfn(at) == pfn for at in range(0, other.size, setting.page_size))
    return {"hole": hole.name} | _changed(reach, 0, pfn if taken else None)


_EFFECTS = {
    "changed": ("of it that the device changes", "bytes"), "faults": ("writes that the IOMMU refuses", ""),
    "checks": ("machine checks", ""),
}  # fmt: skip
_PRIVATE = {"convert": ("conversion to private", "")} | _EFFECTS
_FREED = {"hole": ("the hole", "")} | _EFFECTS


def _corrupts(figures: Figures) -> Found:
    changed, faults, checks = (figures[name] for name in ("changed", "faults", "checks"))
    first = next(iter(figures.values()))
    told = f"{first.what} is {first.trial} against {first.other}; {changed.trial} bytes change against {changed.other}"
    if not changed.trial:
        refused = "the IOMMU refuses the write" if faults.trial else "nothing that it has is private or free"
        return Found(Verdict.FALSE, f"{told}: {refused}")
    if checks.trial:
        return Found(Verdict.PART, f"{told}, and a machine check follows when the guest reads them")
    return Found(Verdict.HOLDS, f"{told}, and nobody notices")


def _unmapped_by_nobody(setting: Setting, design: Design) -> Measured:
    private, freed = _into_private(setting, design), _into_another(setting, design)
    return {
        "private": private["changed"],
        "freed": freed["changed"],
        "faults": private["faults"] + freed["faults"],
        "checks": private["checks"] + freed["checks"],
    }


_NOBODY = {
    "private": ("of a private page that a device changes", "bytes"),
    "freed": ("of another file's page, after a hole", "bytes"),
    "faults": ("writes that the IOMMU refuses", ""),
    "checks": ("machine checks: the host restarts", ""),
}


def _contained(figures: Figures) -> Found:
    private, freed, faults, checks = (figures[name] for name in ("private", "freed", "faults", "checks"))
    told = f"{private.trial} bytes of a private page change, {freed.trial} of another file's"
    told += f"; faults of the IOMMU: {faults.trial}, machine checks: {checks.trial}"
    bad = (bool(private.trial), bool(freed.trial))
    return Found(Verdict.FALSE if bad[0] else Verdict.PART if bad[1] else Verdict.HOLDS, told)


# --------------------------------------------------------------------------- the claims


def _kind(vm: str) -> Measured:
    """A VM of a kind, and the IOMMU that its processors have."""
    amd = vm == "snp"
    return {"fields": {"vm": vm, "stage2": "npt" if amd else "ept"}, "unit": "amd" if amd else "vtd"}


_POLICY = Switch(
    "the check",
    {"removed": {"door": "vfio naive"}, "replaced by a memory": {"door": "vfio tracked"}},
    "a patch can only remove it, or also remember what it did not pin",
)
_WHO = Switch(
    "unmapped by",
    {
        "user space": {"door": "iommufd none"}, "the kernel": {"door": "iommufd notifier"},
        "the kernel, which maps again": {"door": "iommufd revoke"},
        "the kernel, which cuts": {"door": "iommufd mirror"},
    },
    "posted: none (rejected), revoke (RFCs of 2026); cutting was asked for",
)  # fmt: skip
_DOORS = Switch(
    "entry of",
    {
        "VFIO without its check": {"door": "vfio tracked"}, "VFIO": {"door": "vfio linux"},
        "iommufd, not unmapped": {"door": "iommufd none"}, "iommufd, unmapped": {"door": "iommufd notifier"},
    },
)  # fmt: skip
_KINDS = Switch("VM", {vm: _kind(vm) for vm in ("sw", "plain", "tdx", "snp")})
_ARM = "of Arm CCA it was said that a GPT fault contains it: not modelled"

CLAIMS = (
    Claim(
        "vfio-bar-not-ram", "VFIO type1 maps what is VM_PFNMAP if it is a BAR, and refuses RAM.",
        "what the slides' claim is of; drivers/vfio/vfio_iommu_type1.c:is_invalid_reserved_pfn()",
        "a process's mappings of a BAR and of shared RAM are given to a device; a page of the RAM is converted",
        lambda setting: both(setting, _vfio, _VFIO), _bar_only, Evidence.CAPTURED, Verdict.HOLDS, (UNITS,), _SMALL,
        kind="remark",
    ),
    Claim(
        "vfio-unchecked-unpins", "With that check removed, an unmap unpins what was never pinned.",
        "J. Gunthorpe, on a series of 2021",
        "VFIO maps shared RAM, a page is converted, the device writes, all is unmapped; struct pages are read",
        lambda setting: both(setting, _without_check, _UNCHECKED), _underflows, Evidence.INFERENCE, Verdict.DEPENDS,
        (_POLICY, UNITS), _SMALL, kind="remark",
        note="Linux frees a folio whose last reference goes, whoever shows it; here it stays, and is counted",
    ),
    Claim(
        "devices-need-no-kernel", "After no operation a device reaches what is not shared.",
        f"S. Christopherson asked which must unmap by force; {MAILS}",
        "a device has all of it; for each operation of guest_memfd, its write to a page that was there",
        lambda setting: both(setting, _after_each, _AFTER), _nothing_stale, Evidence.INFERENCE, Verdict.DEPENDS,
        (_WHO, UNITS), _SMALL, kind="question",
        note="a page that failed stays a device's in every mode: nobody has said otherwise",
    ),
    Claim(
        "stale-entry-private", "Possible data corruption in VFIO: a device writes to a page that became private.",
        f"{_SLIDES}, not discussed in the call",
        "a device has a page, it becomes private, the guest and the device write",
        lambda setting: both(setting, _into_private, _PRIVATE), _corrupts, Evidence.INFERENCE, Verdict.DEPENDS,
        (_DOORS, _KINDS), _SMALL, kind="remark", note=_ARM,
    ),
    Claim(
        "stale-entry-freed", "A device writes to memory that a hole freed and another file has.",
        f"J. Gunthorpe: truncation and holes must revoke; {MAILS}",
        "a device has a huge page, a hole frees it, another file takes and shares it, the device writes",
        lambda setting: both(setting, _into_another, _FREED), _corrupts, Evidence.INFERENCE, Verdict.DEPENDS,
        (_DOORS, _KINDS), _SMALL, kind="remark", note=_ARM,
    ),
    Claim(
        "not-unmapping-is-a-policy", "Not to unmap devices can be a policy: the hardware contains what they do.",
        f"Xu and A. Kardashevskiy; {MAILS}",
        "nobody unmaps; a page becomes private and a hole frees another, the device writes to both",
        lambda setting: both(setting, _unmapped_by_nobody, _NOBODY), _contained, Evidence.INFERENCE, Verdict.DEPENDS,
        (_KINDS,), _SMALL, kind="question", note=_ARM,
    ),
)  # fmt: skip
"""In the order in which they are printed."""
