"""Claims about who can use the memory: GUP, KVM, VFIO and iommufd."""

from __future__ import annotations

from collections.abc import Iterable

from pgemu.experiments.claims.claim import Claim, Evidence, Figure, Figures, Found, Setting, Verdict
from pgemu.experiments.consumers import CONSUMERS, Access, Consumer, error, try_consumer
from pgemu_kernels import words as W

__all__ = ("CLAIMS",)

_SLIDES = "slides of 2025-08-07"
_SMALL = Setting(page_size=W.PAGE_2M)
_GUP = {Access.PIN, Access.LONGTERM, Access.REFERENCE, Access.PEEK, Access.IOMMUFD}


def _named(*names: str) -> list[Consumer]:
    return [consumer for consumer in CONSUMERS if consumer.name in names]


def _statuses(setting: Setting, consumers: Iterable[Consumer]) -> dict[str, Figure]:
    """What each of them gets."""
    return {
        consumer.name: Figure(
            consumer.name,
            *(error(try_consumer(consumer, design, page_size=setting.page_size).status)
              for design in (setting.on_trial, setting.other)),
        )
        for consumer in consumers
    }  # fmt: skip


def _gup(setting: Setting) -> dict[str, Figure]:
    return _statuses(setting, [consumer for consumer in CONSUMERS if consumer.access in _GUP])


def _all_fail(figures: Figures) -> Found:
    """Whether none of them gets the memory."""
    failed = [figure for figure in figures.values() if figure.trial != "ok"]
    others = sum(figure.other != "ok" for figure in figures.values())
    kinds = ", ".join(sorted({str(figure.trial) for figure in failed}))
    told = f"{len(failed)} of {len(figures)} fail ({kinds or 'none'}) against {others}"
    if len(failed) == len(figures):
        return Found(Verdict.HOLDS, told)
    return Found(Verdict.PART if failed else Verdict.FALSE, told)


def _works(figures: Figures) -> Found:
    """Whether all of them get it."""
    told = ", ".join(f"{figure.what} {figure.trial} against {figure.other}" for figure in figures.values())
    good = sum(figure.trial == "ok" for figure in figures.values())
    return Found(Verdict.HOLDS if good == len(figures) else Verdict.PART if good else Verdict.FALSE, told)


def _vfio(setting: Setting) -> dict[str, Figure]:
    return _statuses(setting, _named("VFIO type1"))


def _iommufd(setting: Setting) -> dict[str, Figure]:
    return _statuses(setting, _named("iommufd"))


def _copies(setting: Setting) -> dict[str, Figure]:
    return _statuses(setting, [one for one in CONSUMERS if one.access in (Access.COPY, Access.KVM, Access.KVM_CACHE)])


CLAIMS = (
    Claim(
        "cannot-gup", "Nobody can take references or pins of the memory through its mapping (GUP).", _SLIDES,
        "each user of `pgemu consumers` that pins or references gets at a shared page", _gup, _all_fail,
        Evidence.MAIN, Verdict.HOLDS, setting=_SMALL,
    ),
    Claim(
        "copies-work", "Whoever copies through the process's entries, and KVM, go on as before.",
        "what follows from the slides",
        "copy_{to,from}_user(), KVM slots and caches over the mapping get at a shared page", _copies, _works,
        Evidence.MAIN, Verdict.HOLDS, setting=_SMALL, kind="remark",
    ),
    Claim(
        "vfio-maps-ram", "VFIO type1 can map it already.", _SLIDES, "VFIO type1 maps a shared page of RAM", _vfio,
        _works, Evidence.CAPTURED, Verdict.FALSE, setting=_SMALL,
    ),
    Claim(
        "iommufd-cannot", "iommufd cannot map it.", _SLIDES, "IOMMU_IOAS_MAP of a shared page", _iommufd, _all_fail,
        Evidence.CAPTURED, Verdict.HOLDS, setting=_SMALL,
    ),
)  # fmt: skip
"""In the order in which they are printed."""
