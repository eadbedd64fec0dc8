"""Claims about conversions: what they wait for, what they leave mapped, at which level."""

from __future__ import annotations

from pgemu.experiments.claims.claim import HVA, Claim, Evidence, Figure, Figures, Found, Scene, Setting, Switch, Verdict
from pgemu.experiments.claims.measures import PAGE, levels, pages
from pgemu.experiments.consumers import try_all
from pgemu.experiments.scenarios import smallest_pfnmap
from pgemu.machine.designs import Design
from pgemu.machine.results import VmFault
from pgemu_kernels import words as W
from pgemu_kernels.words.operations import Operation

__all__ = ("CLAIMS",)

_SLIDES = "slides of 2025-08-07"
_HUGE = {"1G": 3, "2M": 2, "4K": 1}


def _used(scene: Scene) -> Scene:
    """The guest uses everything; a page is shared, and the host has written to it."""
    scene.vm.touch_many(pages(scene))
    scene.gmem.convert(PAGE, W.PAGE_4K, shared=True)
    scene.process.touch(HVA + PAGE, write=True)
    return scene


# --------------------------------------------------------------------------- references


def _refused(setting: Setting) -> dict[str, Figure]:
    """Every user of memory, and whether the conversion goes through while it holds the page."""
    found = try_all(page_size=setting.page_size)
    refused, failed = ({}, {})  # type: dict[Design, int], dict[Design, int]
    for design in (setting.on_trial, setting.other):
        refused[design] = sum(outcomes[design].convert != 0 for _, outcomes in found)
        failed[design] = sum(outcomes[design].status < 0 for _, outcomes in found)
    return {
        "refused": Figure(
            "users that keep a conversion from going through", refused[setting.on_trial], refused[setting.other]
        ),
        "failed": Figure(
            "users that get an error instead of the page", failed[setting.on_trial], failed[setting.other]
        ),
        "users": Figure("users tried", len(found), len(found)),
    }


def _none_refused(figures: Figures) -> Found:
    refused, failed = figures["refused"], figures["failed"]
    told = f"{refused.trial} of {figures['users'].trial} users refuse it against {refused.other}"
    if refused.trial:
        return Found(Verdict.FALSE, told)
    if int(failed.trial) > int(failed.other):
        return Found(Verdict.PRICE, f"{told}; {failed.trial} users get no page at all, against {failed.other}")
    return Found(Verdict.HOLDS, told)


def _transient(setting: Setting) -> dict[str, Figure]:
    """A reference that nobody announced, through a conversion and through the end of the file."""

    def tried(design: Design) -> tuple[int, int, int]:
        scene = _used(setting.scene(design))
        pfn = scene.gmem.get_reference(PAGE).detail
        status = scene.gmem.convert(PAGE, W.PAGE_4K, shared=False).status
        free = _closed(scene)
        scene.gmem.put_reference(pfn)
        scene.machine.work()
        return status, free, scene.machine.hugetlb(setting.page_size).free_hugepages

    trial, other = tried(setting.on_trial), tried(setting.other)
    return {
        "status": Figure("status of the conversion", trial[0], other[0]),
        "free": Figure("huge pages back in the pool of 2, reference held", trial[1], other[1]),
        "after": Figure("... once it is dropped", trial[2], other[2]),
    }


def _closed(scene: Scene) -> int:
    """End the file; the huge pages that the pool then has."""
    scene.process.munmap(HVA, scene.gmem.size)
    scene.vm.unbind(0)
    scene.gmem.close()
    return scene.machine.hugetlb(scene.machine.config.page_size).free_hugepages


def _harmless(figures: Figures) -> Found:
    """The remark holds if a transient reference is still felt somewhere."""
    status, free, after = (figures[name] for name in ("status", "free", "after"))
    convert = "goes through" if status.trial == 0 else f"returns {status.trial}"
    told = f"the conversion {convert}; {free.trial} of {after.trial} huge pages come back before the reference goes"
    felt = (status.trial != 0, free.trial != after.trial)
    return Found(Verdict.HOLDS if all(felt) else Verdict.PART if any(felt) else Verdict.FALSE, told)


# --------------------------------------------------------------------------- mappings and levels


def _stays_mapped(setting: Setting) -> dict[str, Figure]:
    def tried(design: Design) -> tuple[str, str, int]:
        scene = _used(setting.scene(design))
        scene.gmem.convert(PAGE, W.PAGE_4K, shared=False)
        private = scene.process.touch(HVA + PAGE).status
        scene.gmem.convert(PAGE, W.PAGE_4K, shared=True)
        again = scene.process.touch(HVA + PAGE).status
        calls = scene.machine.statistics.count(Operation.MMAP)
        return VmFault(private).name, VmFault(again).name, calls

    trial, other = tried(setting.on_trial), tried(setting.other)
    return {
        "private": Figure("access while private", trial[0], other[0]),
        "again": Figure("access when shared again", trial[1], other[1]),
        "mmaps": Figure("mmap calls in all", trial[2], other[2]),
    }


def _one_mmap(figures: Figures) -> Found:
    again, private, calls = (figures[name] for name in ("again", "private", "mmaps"))
    told = f"{private.trial} while private, {again.trial} when shared again, {calls.trial} mmap"
    ok = again.trial in ("NOPAGE", "LOCKED", "PRESENT") and private.trial == "SIGBUS" and calls.trial == 1
    return Found(Verdict.HOLDS if ok else Verdict.FALSE, told)


def _levels(setting: Setting) -> dict[str, Figure]:
    def tried(design: Design) -> tuple[dict[int, int], bool]:
        scene = _used(setting.scene(design))
        return levels(scene), scene.gmem.is_split(PAGE)

    trial, other = tried(setting.on_trial), tried(setting.other)
    figures = {
        name: Figure(f"4K pages that the guest reaches by {name} leaves", trial[0][level], other[0][level])
        for name, level in _HUGE.items()
    }
    return figures | {"split": Figure("huge page split", str(trial[1]), str(other[1]))}


def _keeps_levels(figures: Figures) -> Found:
    """Only the leaf around the shared page becomes smaller, and no folio is split."""
    small, split = figures["4K"], figures["split"]
    told = f"{small.trial:,} pages by 4K leaves against {small.other:,}; huge page split: {split.trial}"
    if split.trial != "False":
        return Found(Verdict.FALSE, told)
    return Found(Verdict.HOLDS if 0 < int(small.trial) <= 512 else Verdict.PART, told)


def _host_levels(setting: Setting) -> dict[str, Figure]:
    def largest(design: Design) -> int:
        scene = setting.scene(design, shared=True)
        return int(scene.process.touch(HVA, write=True).detail)

    return {
        "level": Figure("level of a process's entry, all shared", largest(setting.on_trial), largest(setting.other))
    }


def _one_gigabyte(figures: Figures) -> Found:
    level = figures["level"]
    told = f"level {level.trial} against {level.other} (1: 4K, 2: 2M, 3: 1G)"
    return Found(Verdict.HOLDS if level.trial == 3 else Verdict.PART if level.trial == 2 else Verdict.FALSE, told)


def _boots(setting: Setting) -> dict[str, Figure]:
    """The scenario of the slides' test, its own machine; nothing to set beside it."""
    boot = smallest_pfnmap(**setting.what)
    special = int(boot.host_entry >> 9 & 1)
    return {
        "broken": Figure("rules broken", boot.broken, "-"),
        "special": Figure("the process's entry is special", special, "-"),
        "sees": Figure(
            "guest and host see each other's writes", str(boot.sees_host_data and boot.sees_guest_data), "-"
        ),
        "mapcount": Figure("mapcount", boot.mapcount, "-"),
    }


def _booted(figures: Figures) -> Found:
    told = ", ".join(f"{figure.what}: {figure.trial}" for figure in figures.values())
    fine = figures["broken"].trial == 0 and figures["sees"].trial == "True"
    special = figures["special"].trial == 1 and figures["mapcount"].trial == 0
    return Found(Verdict.HOLDS if fine and special else Verdict.FALSE, told)


_ENTRIES = Switch(
    "host_huge",
    {"as tested: 4K entries": {}, "with a huge_fault handler": {"own": {"pfnmap": {"host_huge": True}}}},
    "the slides name vmf_insert_pfn_pud() as possible; what was tested inserts 4K entries",
)
_RULES = Switch(
    "level_rule",
    {rule: {"own": {"pfnmap": {"level_rule": rule}}} for rule in ("uniform", "private", "whole")},
    "the slides say that the level follows from shareability, not how",
)

CLAIMS = (
    Claim(
        "conversion-not-refused", "No conversion fails because somebody holds a reference.", _SLIDES,
        "each of the users of `pgemu consumers` gets a page, and its huge page is converted meanwhile", _refused,
        _none_refused, Evidence.POSTED, Verdict.PRICE, setting=Setting(page_size=W.PAGE_2M),
    ),
    Claim(
        "transient-references", "Transient references remain.", "D. Hildenbrand, remark on the slides",
        "a reference is taken on a shared page; it is converted, the file is closed, the reference dropped", _transient,
        _harmless, Evidence.SLIDES, Verdict.PART, kind="remark",
    ),
    Claim(
        "stays-mapped", "Memory stays mapped: a page that is shared again is used without another mmap.",
        "LPC 2025, CoCo microconference", "a mapped page becomes private, shared, and is used", _stays_mapped,
        _one_mmap, Evidence.SLIDES, Verdict.HOLDS,
    ),
    Claim(
        "level-from-shareability", "The stage-2 level follows from shareability, and no folio is split for it.",
        _SLIDES,
        "one 4K page of 1G is shared; the guest uses all of both huge pages", _levels, _keeps_levels, Evidence.SLIDES,
        Verdict.DEPENDS, (_RULES,),
    ),
    Claim(
        "user-mappings-1g", "Huge mappings in user space are possible, up to 1G.", _SLIDES,
        "two 1G pages are all shared; the host writes to the first", _host_levels, _one_gigabyte, Evidence.SLIDES,
        Verdict.DEPENDS, (_ENTRIES,),
    ),
    Claim(
        "smallest-change-boots", "The smallest change (VM_PFNMAP and vmf_insert_pfn()) boots a VM.", _SLIDES,
        "kvmtool loads and starts a VM in 64 MiB of 4K folios, all shared", _boots, _booted, Evidence.CAPTURED,
        Verdict.HOLDS,
    ),
)  # fmt: skip
"""In the order in which they are printed."""
