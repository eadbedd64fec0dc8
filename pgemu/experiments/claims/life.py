"""Claims about the end of a file: whether folios outlive it, when huge pages are back in the pool, who merges."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pgemu.experiments.claims.claim import HVA, Claim, Evidence, Figure, Figures, Found, Setting, Switch, Verdict
from pgemu.experiments.claims.measures import PAGE, pages
from pgemu.machine.designs import Design
from pgemu_kernels.words.events import Event, Gauge

__all__ = ("CLAIMS",)

_SLIDES = "slides of 2025-08-07"
_PAGES = 4  # huge pages, in each of which a page is shared


class _End(NamedTuple):
    """What a machine has when its file is gone: huge pages in the pool, folios that live on, work that waits; then what
    was merged, and how many pages the pool has when everything is done."""

    free: int
    outlive: int
    pending: int
    merged: int
    finally_free: int


def _ended(setting: Setting, design: Design) -> _End:
    """All is used, a page of each huge page is shared; somebody holds a reference to `held` of them; the file ends."""
    scene = setting.scene(design, _PAGES, worker="queued")
    machine, gmem = scene.machine, scene.gmem
    scene.vm.touch_many(pages(scene))
    at = np.arange(_PAGES, dtype=np.uint64) * np.uint64(setting.page_size) + np.uint64(PAGE)
    gmem.convert_many(at, shared=True)
    scene.process.touch_many(at + np.uint64(HVA), write=True)
    held = [gmem.get_reference(int(offset)).detail for offset in at[: setting.what.get("held", 0)]]
    scene.process.munmap(HVA, gmem.size)
    scene.vm.unbind(0)
    gmem.close()
    pool = machine.hugetlb(setting.page_size)
    free, before = pool.free_hugepages, machine.statistics
    outlive = before.gauge(Gauge.BLOCKS_ZOMBIE)
    for pfn in held:
        gmem.put_reference(pfn)
    pending = machine.statistics.gauge(Gauge.WORK_PENDING)
    machine.work()
    merged = machine.statistics.event(Event.FOLIO_MERGED) - before.event(Event.FOLIO_MERGED)
    return _End(free, outlive, pending, merged, pool.free_hugepages)


def _measure(setting: Setting) -> dict[str, Figure]:
    trial, other = _ended(setting, setting.on_trial), _ended(setting, setting.other)
    held = setting.what.get("held", 0)
    whats = (
        f"huge pages of {_PAGES} back in the pool at once, {held} referenced",
        "huge pages of which something lives on",
        "huge pages that the worker has to see to",
        "merged after the file is gone",
        "huge pages in the pool in the end",
    )
    return {
        name: Figure(what, getattr(trial, name), getattr(other, name))
        for name, what in zip(_End._fields, whats, strict=True)
    }


def _outlive(figures: Figures) -> Found:
    outlive, free, end = (figures[name] for name in ("outlive", "free", "finally_free"))
    told = f"{outlive.trial} live on against {outlive.other}; {free.trial} of {end.trial} are back at once"
    if outlive.trial == 0 and free.trial == end.trial:
        return Found(Verdict.HOLDS, told)
    return (
        Found(Verdict.PART, f"{told}: whole huge pages, nothing to merge")
        if figures["merged"].trial == 0
        else Found(Verdict.FALSE, told)
    )


def _at_once(figures: Figures) -> Found:
    free, pending, end = (figures[name] for name in ("free", "pending", "finally_free"))
    told = f"{free.trial} of {end.trial} huge pages come back with the file against {free.other}"
    told += f", {pending.trial} wait for the worker against {pending.other}"
    if free.trial == end.trial and pending.trial == 0:
        return Found(Verdict.HOLDS, told)
    return Found(Verdict.PART if pending.trial == 0 else Verdict.FALSE, told)


def _merges(figures: Figures) -> Found:
    merged, pending = figures["merged"], figures["pending"]
    told = (
        f"{merged.trial} merged afterwards against {merged.other}, {pending.trial} by a worker against {pending.other}"
    )
    if merged.trial or pending.trial:
        return Found(Verdict.FALSE, told)
    return Found(Verdict.HOLDS if int(merged.other) or int(pending.other) else Verdict.PART, told)


_TRIED = f"{_PAGES} huge pages, a page of each shared and used, references held to some; the file is closed"
_HELD = Switch(
    "references", {"none held": {"held": 0}, "2 held": {"held": 2}}, "who holds a reference is the workload's"
)

CLAIMS = (
    Claim(
        "not-outlive-inode", "Folios do not outlive the file.", _SLIDES, _TRIED, _measure, _outlive, Evidence.SLIDES,
        Verdict.DEPENDS, (_HELD,),
    ),
    Claim(
        "cleanup-at-release", "Everything is cleaned up when the file is released, nothing later by a worker.", _SLIDES,
        _TRIED, _measure, _at_once, Evidence.SLIDES, Verdict.DEPENDS, (_HELD,),
    ),
    Claim(
        "no-merge-after-close", "Nothing is merged after the file is closed.", _SLIDES, _TRIED, _measure, _merges,
        Evidence.SLIDES, Verdict.HOLDS, setting=Setting(what={"held": 2}),
    ),
)  # fmt: skip
"""In the order in which they are printed."""
