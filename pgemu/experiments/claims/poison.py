"""Claims about memory failure: what races with it, who is told, and how much of a huge page one bad 4K page costs."""

from __future__ import annotations

import numpy as np

from pgemu.experiments.claims.claim import HVA, Claim, Evidence, Figure, Figures, Found, Scene, Setting, Switch, Verdict
from pgemu.experiments.claims.measures import PAGE, pages
from pgemu.machine.designs import Design
from pgemu.machine.results import Errno, VmFault
from pgemu_kernels import words as W

__all__ = ("CLAIMS",)

_SLIDES = "slides of 2025-08-07"
_POISONED = -int(Errno.EHWPOISON)


def _scene(setting: Setting, design: Design, *, shared: bool) -> Scene:
    """Both sides have used all that they may; the page is shared and mapped by a process, or private."""
    scene = setting.scene(design)
    scene.vm.touch_many(pages(scene))
    if shared:
        scene.gmem.convert(PAGE, W.PAGE_4K, shared=True)
        scene.process.touch(HVA + PAGE, write=True)
        scene.vm.touch(PAGE, write=True)
    return scene


def _meets(setting: Setting) -> dict[str, Figure]:
    """A shared page fails while a process uses it, then it is converted back."""

    def tried(design: Design) -> tuple[int, int, str, str]:
        scene = _scene(setting, design, shared=True)
        failure = scene.gmem.memory_failure(PAGE, early_kill=True)
        host = scene.process.touch(HVA + PAGE).status
        told = failure.signals_sent + (host == int(VmFault.HWPOISON))
        converted = scene.gmem.convert(PAGE, W.PAGE_4K, shared=False)
        return failure.replaced, told, VmFault(host).name, converted.name

    trial, other = tried(setting.on_trial), tried(setting.other)
    whats = (
        ("replaced", "entries of processes that became hwpoison entries"),
        ("told", "signals to the process that uses the page"),
        ("access", "the process's next access"),
        ("converted", "conversion of the page back to private"),
    )
    return {name: Figure(what, trial[i], other[i]) for i, (name, what) in enumerate(whats)}


def _no_race(figures: Figures) -> Found:
    """Nothing that a conversion does may meet poison; a process that goes on with a bad page is the price."""
    converted, told = figures["converted"], figures["told"]
    why = f"a conversion is {converted.trial} against {converted.other}"
    if converted.trial != "ok":
        return Found(Verdict.FALSE, why)
    if int(told.trial) < int(told.other):
        access = figures["access"]
        return Found(Verdict.PRICE, f"{why}; {told.trial} signals against {told.other}, the access is {access.trial}")
    return Found(Verdict.HOLDS, why)


def _lost(setting: Setting) -> dict[str, Figure]:
    """How many 4K pages the guest can no longer use when one fails."""

    def tried(design: Design) -> int:
        scene = _scene(setting, design, shared=setting.what.get("shared", False))
        scene.gmem.memory_failure(PAGE)
        return int(np.count_nonzero(scene.vm.touch_many(pages(scene)).status == _POISONED))

    what = "4K pages of 1G that the guest loses with one"
    return {"lost": Figure(what, tried(setting.on_trial), tried(setting.other))}


def _one_page(figures: Figures) -> Found:
    lost = figures["lost"]
    told = f"{lost.trial:,} lost against {lost.other:,}"
    if lost.trial == 1:
        return Found(Verdict.HOLDS, told)
    return Found(Verdict.PART if 1 < int(lost.trial) <= 512 else Verdict.FALSE, told)


_HANDLED = Switch(
    "memory_failure",
    {"handled": {}, "marked": {"fields": {"memory_failure": "marked"}}},
    "no posted code says what memory_failure() makes of guest_memfd's huge folios",
)
_BLOCKS = Switch(
    "poisoned_blocks",
    {"refuse": {}, "move": {"fields": {"poisoned_blocks": "move"}}},
    "no posted code says what a split or merge makes of poison",
)
_SHARED = Switch("the page", {"private, in a whole huge page": {"shared": False}, "shared": {"shared": True}})

CLAIMS = (
    Claim(
        "no-memory-failure-race", "There is no restructuring for memory failure to race with.", _SLIDES,
        "a shared page that a process uses fails (early kill), and is converted back", _meets, _no_race,
        Evidence.INFERENCE, Verdict.DEPENDS, (_HANDLED, _BLOCKS),
        note="captured with 4K folios: the entry of the VM_PFNMAP mapping stays, loads and stores succeed, nobody gets "
        "SIGBUS; of huge folios nobody has code",
    ),
    Claim(
        "poison-inside-1g", "One bad 4K page inside 1G costs the guest that page alone.", "asked in mails of 2026",
        "a page of a 1G page fails; the guest uses everything", _lost, _one_page, Evidence.INFERENCE, Verdict.FALSE,
        (_SHARED,), kind="question",
    ),
)  # fmt: skip
"""In the order in which they are printed."""
