"""Claims about folios and their struct pages: nothing is split or merged, restored or kept in reserve."""

from __future__ import annotations

from pgemu.experiments.claims.claim import Claim, Evidence, Figure, Figures, Found, Setting, Switch, Verdict
from pgemu.experiments.claims.measures import NODE_BYTES, flip, page_types
from pgemu.machine.designs import Design
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Event, Gauge
from pgemu_kernels.words.operations import Operation

__all__ = ("CLAIMS",)

_PGTY_HUGETLB = 0xF4  # include/linux/page-flags.h:enum pagetype
_SLIDES = "slides of 2025-08-07"
_FLIP = "the guest uses all of two huge pages, one 4K page becomes shared, both sides use it, and private again"
_SIZES = Switch("page size", {"1G": {"page_size": W.PAGE_1G}, "2M": {"page_size": W.PAGE_2M}})


def _events(claim: Setting, *wanted: tuple[str, str, Event, int, str]) -> dict[str, Figure]:
    flips = {design: flip(claim.scene(design, _count(claim))) for design in (claim.on_trial, claim.other)}
    trial, other = flips[claim.on_trial], flips[claim.other]
    return {
        name: Figure(what, trial.event(event) * size, other.event(event) * size, unit)
        for name, what, event, size, unit in wanted
    }


def _count(setting: Setting) -> int:
    """Huge pages: enough for the page that becomes shared."""
    return 2 if setting.page_size == W.PAGE_1G else 16


def _nothing(figures: Figures, what: str) -> Found:
    """Whether the one on trial does nothing of what the other one does."""
    done, others = ({name: getattr(figure, side) for name, figure in figures.items()} for side in ("trial", "other"))
    told = ", ".join(f"{figures[name].what} {done[name]:,} against {others[name]:,}" for name in figures)
    if any(done.values()):
        return Found(Verdict.FALSE, f"{what}: {told}")
    if not any(others.values()):
        return Found(Verdict.PART, f"neither of them does here: {told}")
    return Found(Verdict.HOLDS, told)


def _restructures(setting: Setting) -> dict[str, Figure]:
    return _events(
        setting,
        ("split", "huge folios split", Event.FOLIO_SPLIT, 1, ""),
        ("merged", "huge folios merged", Event.FOLIO_MERGED, 1, ""),
        ("stored", "page cache entries stored", Event.PAGE_CACHE_STORED, 1, ""),
    )


def _hvo(setting: Setting) -> dict[str, Figure]:
    return _events(
        setting,
        ("restored", "vmemmap restored", Event.VMEMMAP_PAGE_RESTORED, W.PAGE_4K, "bytes"),
        ("freed", "vmemmap freed again", Event.VMEMMAP_PAGE_FREED, W.PAGE_4K, "bytes"),
        ("flushes", "flushes of all CPUs' kernel mappings", Event.TLB_FLUSH_KERNEL, 1, ""),
    )


def _struct_pages(setting: Setting) -> dict[str, Figure]:
    return _events(setting, ("bytes", "written to struct pages", Event.STRUCT_PAGE_BYTES, 1, "bytes"))


def _few_bytes(figures: Figures) -> Found:
    bytes_ = figures["bytes"]
    told = f"{bytes_.trial:,} bytes against {bytes_.other:,}"
    if not bytes_.trial:
        return Found(Verdict.HOLDS, told)
    return Found(Verdict.PART if float(bytes_.trial) * 1000 < float(bytes_.other) else Verdict.FALSE, told)


def _reserve(setting: Setting) -> dict[str, Figure]:
    """What the machine's memory must have at hand for one page to become shared, beside page tables."""

    def needed(design: Design) -> int:
        flipped = flip(setting.scene(design, _count(setting)))
        gauges = ((Gauge.VMEMMAP_PAGES, W.PAGE_4K), (Gauge.XARRAY_NODES, NODE_BYTES))
        return sum((flipped.shared.gauge(gauge) - flipped.before.gauge(gauge)) * size for gauge, size in gauges)

    return {
        "reserve": Figure("metadata while the page is shared", needed(setting.on_trial), needed(setting.other), "bytes")
    }


def _page_type(setting: Setting) -> dict[str, Figure]:
    """The types of a huge page's struct pages while somebody holds a piece of it and the file is gone."""

    def strange(design: Design) -> str:
        scene = setting.scene(design, _count(setting))
        scene.vm.touch_many([0])
        scene.gmem.convert(0, W.PAGE_4K, shared=True)
        scene.process.touch(0x7F00_0000_0000, write=True)
        pfn = scene.gmem.get_reference(0).detail
        first = scene.gmem.pfn(0)
        scene.process.munmap(0x7F00_0000_0000, scene.gmem.size)
        scene.vm.unbind(0)
        scene.gmem.close()
        found = page_types(scene, pfn if first is None else first) - {_PGTY_HUGETLB}
        return ", ".join(f"{kind:#x}" for kind in sorted(found)) or "none"

    return {"types": Figure("page types beside HugeTLB's", strange(setting.on_trial), strange(setting.other))}


def _no_type(figures: Figures) -> Found:
    types = figures["types"]
    told = f"{types.trial} against {types.other}"
    if types.trial != "none":
        return Found(Verdict.FALSE, told)
    return Found(Verdict.HOLDS if types.other != "none" else Verdict.PART, told)


def _runtime(setting: Setting) -> dict[str, Figure]:
    """What conversions cost, and the faults that follow them."""
    flips = {design: flip(setting.scene(design, _count(setting))) for design in (setting.on_trial, setting.other)}
    figures = {}
    for name, what, operations in (
        ("convert", "both conversions", (Operation.CONVERT,)),
        ("faults", "faults while shared and afterwards", (Operation.GUEST_FAULT, Operation.HOST_FAULT)),
    ):
        for end, word in ((0, "least"), (1, "most")):
            costs = [flips[design].cost(*operations)[end] for design in (setting.on_trial, setting.other)]
            figures[f"{name}_{word}"] = Figure(f"{what}, at {word}", round(costs[0]), round(costs[1]), "ns")
    return figures


def _cheaper(figures: Figures) -> Found:
    """Whether conversions lose their cost, and whether the faults take it over."""
    most, least = float(figures["convert_most"].trial), float(figures["convert_least"].other)
    faults = figures["faults_most"]
    ratio = least / most if most else float("inf")
    told = f"a conversion there and back {most:,.0f} ns at most against {least:,.0f} at least: {ratio:,.0f} times less"
    if most * 10 > least:
        return Found(Verdict.FALSE, told)
    if float(faults.trial) > float(faults.other):
        return Found(Verdict.PRICE, f"{told}; but faults {faults.trial:,} ns against {faults.other:,}")
    return Found(Verdict.HOLDS, told)


CLAIMS = (
    Claim(
        "no-restructuring", "Folios are neither split nor merged when memory is converted.", _SLIDES, _FLIP,
        _restructures, lambda figures: _nothing(figures, "it restructures"), Evidence.SLIDES, Verdict.HOLDS, (_SIZES,),
    ),
    Claim(
        "no-hvo-churn", "The vmemmap is not restored and optimised again at run time.", _SLIDES, _FLIP, _hvo,
        lambda figures: _nothing(figures, "it churns"), Evidence.SLIDES, Verdict.HOLDS, (_SIZES,),
    ),
    Claim(
        "no-reserve", "No memory has to be kept in reserve to undo HVO.", _SLIDES, _FLIP, _reserve,
        lambda figures: _nothing(figures, "it needs some"), Evidence.SLIDES, Verdict.HOLDS, (_SIZES,),
    ),
    Claim(
        "no-page-type", "No page type of its own is needed for folios that outlive the file.", _SLIDES,
        "a page is shared and referenced, the file is closed; the struct pages are read", _page_type, _no_type,
        Evidence.SLIDES, Verdict.DEPENDS,
        (Switch("version of restructure", {"rfc2": {"like": "rfc2"}, "dec2025": {"like": "dec2025"}}),),
        Setting(page_size=W.PAGE_2M),
    ),
    Claim(
        "runtime-cost", "What restructuring costs at run time is gone.", _SLIDES, _FLIP, _runtime, _cheaper,
        Evidence.SLIDES, Verdict.HOLDS, (_SIZES,),
        note="prices are estimates: those ends of the bands count that are nearest to each other",
    ),
    Claim(
        "struct-page-bytes", "A conversion does not write struct pages.", "what the slides' claims add up to", _FLIP,
        _struct_pages, _few_bytes, Evidence.SLIDES, Verdict.HOLDS, (_SIZES,), kind="remark",
    ),
)  # fmt: skip
"""In the order in which they are printed."""
