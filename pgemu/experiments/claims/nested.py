"""Claims about nested virtualisation: what KVM itself maps of an L1 hypervisor's memory while L2 guests run."""

from __future__ import annotations

from typing import NamedTuple

from pgemu.experiments.claims.claim import Claim, Evidence, Figure, Figures, Found, Scene, Setting, Switch, Verdict
from pgemu.machine.designs import Design
from pgemu.objects.mapped_pages import MappedPage, PfnCache
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Event

__all__ = ("CLAIMS",)

_PAGES = 4  # of as many huge pages: the first page of two, another one of the others
_REMARK = "S. Christopherson, as noted on the slides of 2025-08-07"
_SOURCES = "virt/kvm/kvm_main.c:__kvm_vcpu_map(), hva_to_pfn_remapped()"


class _Tried(NamedTuple):
    """Of _PAGES shared pages: how many KVM gets, references on them that are held, conversions to private that are
    refused meanwhile, pages that KVM can look up while they are private, uses that reach private memory, and
    conversions that go through when KVM has let go."""

    mapped: int
    held: int
    refused: int
    looked_up: int
    stale: int
    converted: int


_WHATS = {
    "mapped": f"of {_PAGES} shared pages KVM maps",
    "held": "references held on them (a pin counts 1,024)",
    "refused": "conversions to private refused meanwhile",
    "looked_up": "caches that find a page again while it is private",
    "stale": "uses that reach private memory",
    "converted": "conversions that go through afterwards",
}


def _map(scene: Scene, gpa: int, cached: bool) -> MappedPage | PfnCache | None:
    """What KVM gets at a guest address: a mapping, or a cache that is valid."""
    if cached:
        cache = scene.vm.pfn_cache(gpa, 64)
        return cache if cache.check() else None
    try:
        return scene.vm.map_page(gpa)
    except OSError:
        return None


def _use(one: MappedPage | PfnCache) -> None:
    """KVM writes, by a cache if it is valid."""
    if isinstance(one, MappedPage) or one.check():
        one.write(b"L1")


def _tried(setting: Setting, design: Design) -> _Tried:
    """KVM maps shared pages, all become private, KVM goes on using them, and lets go."""
    scene = setting.scene(design, _PAGES, shared=True)
    offsets = [i * setting.page_size + i % 2 * W.PAGE_4K for i in range(_PAGES)]
    found = [_map(scene, offset, bool(setting.what.get("cached"))) for offset in offsets]
    mapped = [one for one in found if one is not None]
    held = sum(one.references for one in mapped)
    refused = sum(scene.gmem.convert(at, W.PAGE_4K, shared=False).status != 0 for at in offsets)
    looked_up = sum(isinstance(one, PfnCache) and not one.check() and one.refresh().status == 0 for one in mapped)
    for one in mapped:
        _use(one)
    statistics = scene.machine.statistics
    stale = statistics.event(Event.MAPPED_STALE_PRIVATE) + statistics.event(Event.MAPPED_STALE_FREED)
    for one in mapped:
        if isinstance(one, MappedPage):
            one.unmap()
        else:
            one.deactivate()
    converted = sum(scene.gmem.convert(at, W.PAGE_4K, shared=False).status == 0 for at in offsets)
    return _Tried(len(mapped), held, refused, looked_up, stale, converted)


def _measure(setting: Setting) -> dict[str, Figure]:
    trial, other = _tried(setting, setting.on_trial), _tried(setting, setting.other)
    return {name: Figure(what, getattr(trial, name), getattr(other, name)) for name, what in _WHATS.items()}


def _told(figures: Figures) -> str:
    held, refused, mapped, stale = (figures[name] for name in ("held", "refused", "mapped", "stale"))
    return (
        f"{held.trial} references held against {held.other}, {refused.trial} of {_PAGES} conversions refused against "
        f"{refused.other}; KVM maps {mapped.trial} pages against {mapped.other}, {stale.trial} uses reach private "
        f"memory against {stale.other}"
    )


def _come_back(figures: Figures) -> Found:
    """Whether references are held, and conversions wait for them."""
    held, refused = (int(figures[name].trial) > 0 for name in ("held", "refused"))
    verdict = Verdict.HOLDS if held and refused else Verdict.PART if held or refused else Verdict.FALSE
    return Found(verdict, _told(figures))


def _can_be_used(figures: Figures) -> Found:
    """Whether KVM gets all pages, and never uses one that is private."""
    mapped, stale = (figures[name].trial for name in ("mapped", "stale"))
    if mapped != _PAGES:
        return Found(Verdict.PART if mapped else Verdict.FALSE, _told(figures))
    return Found(Verdict.PRICE if stale else Verdict.HOLDS, _told(figures))


def _are_told(figures: Figures) -> Found:
    """The same of what holds nothing: it is taken away in time, and conversions are not refused."""
    free = all(figures[name].trial == 0 for name in ("held", "refused", "looked_up", "stale"))
    if figures["mapped"].trial == _PAGES and free:
        return Found(Verdict.HOLDS, _told(figures))
    return Found(Verdict.PART if figures["mapped"].trial else Verdict.FALSE, _told(figures))


_UNSAFE = Switch(
    "kvm.allow_unsafe_mappings",
    {"off": {"fields": {"allow_unsafe_mappings": False}}, "on": {"fields": {"allow_unsafe_mappings": True}}},
    _SOURCES,
)
_SMALL = Setting(page_size=W.PAGE_2M)

CLAIMS = (
    Claim(
        "nested-references", "Nested virtualisation brings the references back, and conversions wait for them.",
        _REMARK, "kvm_vcpu_map() of shared pages, which become private while KVM has them", _measure, _come_back,
        Evidence.MAIN, Verdict.FALSE, switches=(_UNSAFE,), setting=_SMALL, kind="remark",
        note="What comes back is no reference: since 6.13 KVM refuses VM_PFNMAP there, or takes a frame that nothing "
        "holds. 6.12 takes one reference, of a huge page's first 4K only; it delays no conversion.",
    ),
    Claim(
        "nested-structures", "An L1 hypervisor can keep what it gives KVM (MSR bitmap, APIC pages, vmcb12) in this "
        "memory.", "what follows from the remark on nested virtualisation",
        "the same; KVM goes on writing to its mappings", _measure, _can_be_used,
        Evidence.MAIN, Verdict.DEPENDS, switches=(_UNSAFE,), setting=_SMALL, kind="question",
        note="Off: L2 does not run from there. On: it does, and KVM writes to pages that have become private.",
    ),
    Claim(
        "nested-caches", "What KVM keeps by a gfn_to_pfn_cache (Xen's shared info, pvclock) holds nothing, and is "
        "taken away in time.", "what follows from the remark on nested virtualisation",
        "caches of shared pages, which become private; each is checked and looked up again", _measure, _are_told,
        Evidence.MAIN, Verdict.HOLDS, setting=_SMALL.changed({"cached": True}), kind="question",
    ),
)  # fmt: skip
"""In the order in which they are printed."""
