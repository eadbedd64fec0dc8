"""Claims about large I/O entries: whether they follow conversions, and how much a device loses with one page."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pgemu.experiments.claims.claim import HVA, Claim, Evidence, Figures, Found, Setting, Switch, Verdict
from pgemu.experiments.claims.measures import pages
from pgemu.experiments.claims.reach import IOVA, MAILS, OFFSET, Measured, Reach, both
from pgemu.machine.designs import Design
from pgemu.machine.results import RetPf, VmFault
from pgemu.objects.devices import Ioas, IoSpace
from pgemu.objects.pins import leaves_of
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Event
from pgemu_kernels.words.operations import Flag, Operation

__all__ = ("CLAIMS",)

Array = np.ndarray[Any, Any]


class _Tree(NamedTuple):
    """An I/O page table: leaves over what a device has, and tables below the root."""

    leaves: int
    tables: int

    @classmethod
    def of(cls, space: IoSpace) -> _Tree:
        starts, _ = leaves_of(space.machine.arrays.ram, space.table.format, space.root)
        return cls(len(starts), sum(len(found) for found in space.table.table_pages().values()) - 1)


def _used(setting: Setting, design: Design) -> Reach:
    """A device has huge pages whose frames follow one another, of which guest and process use all."""
    reach = Reach.through(setting, design, setting.what.get("pages", 2))
    reach.scene.vm.touch_many(_beside(reach))
    reach.scene.process.touch_many(_beside(reach) + np.uint64(HVA), write=True)
    return reach


def _beside(reach: Reach) -> Array:
    """uint64[n]: all that the device has but the page that is converted."""
    every = pages(reach.scene)
    size = reach.scene.gmem.size - reach.scene.machine.config.page_size
    return np.asarray(every[(every != np.uint64(OFFSET)) & (every < np.uint64(size))])


def _there_and_back(setting: Setting, design: Design) -> Measured:
    """A 4K page becomes private and shared again."""
    reach = _used(setting, design)
    assert isinstance(reach.space, Ioas)
    gmem, machine = reach.scene.gmem, reach.scene.machine
    before, counted = _Tree.of(reach.space), machine.statistics
    gmem.convert(OFFSET, W.PAGE_4K, shared=False)
    middle, went = _Tree.of(reach.space), reach.space.revocations
    guest = reach.scene.vm.touch_many(_beside(reach)).status != int(RetPf.SPURIOUS)
    host = reach.scene.process.touch_many(_beside(reach) + np.uint64(HVA)).status != int(VmFault.PRESENT)
    gmem.convert(OFFSET, W.PAGE_4K, shared=True)
    after, counts, last = _Tree.of(reach.space), machine.statistics, reach.space.revocations
    events = {
        name: sum(counts.event(event) - counted.event(event) for event in which)
        for name, which in (
            ("written", (Event.IOPTE_WRITTEN, Event.IOPTE_CLEARED)),
            ("flushes", (Event.IOTLB_FLUSH_PAGES, Event.IOTLB_FLUSH_DOMAIN)),
        )
    }
    return {
        "before": before.leaves, "private": middle.leaves, "after": after.leaves,
        "tables": middle.tables - before.tables, "kept": after.tables - before.tables, **events,
        "cut": last.cut, "joined": last.joined, "taken": went.revoked, "widened": went.widened,
        "returned": went.returned, "least": round(went.window_ns[0]), "most": round(went.window_ns[1]),
        "guest": int(np.count_nonzero(guest)), "host": int(np.count_nonzero(host)),
    }  # fmt: skip


_LARGE = {
    "before": ("I/O leaves before", ""), "private": ("... while 4K of it are private", ""),
    "after": ("... when all is shared again", ""), "cut": ("leaves cut", ""), "joined": ("leaves put together", ""),
    "tables": ("tables more while private", ""), "kept": ("tables more afterwards", ""),
    "written": ("I/O entries written and cleared", ""), "flushes": ("flushes of the IOTLB", ""),
}  # fmt: skip


def _whole_again(figures: Figures) -> Found:
    before, private, after, kept = (figures[name] for name in ("before", "private", "after", "kept"))
    told = f"leaves: {before.trial:,}, {private.trial:,} while 4K are private, {after.trial:,} when shared again"
    if before.trial != after.trial or kept.trial:
        verdict = Verdict.PART if int(private.trial) > int(before.trial) else Verdict.FALSE
        return Found(verdict, f"{told}; {kept.trial} tables stay")
    tables, written, flushes = (figures[name].trial for name in ("tables", "written", "flushes"))
    told += f"; {tables} tables, {written:,} entries written or cleared and {flushes} flushes there and back"
    return Found(Verdict.PRICE if written else Verdict.HOLDS, told)


def _step_by_step(setting: Setting, design: Design) -> Measured:
    """What each side loses beside the page that is converted; all three try a page there between any two steps."""
    reach = _used(setting, design)
    scene, machine = reach.scene, reach.scene.machine
    near = OFFSET + W.PAGE_4K
    what = {"object_": scene.gmem.inode, "offset": OFFSET, "length": W.PAGE_4K}
    machine.begin(1, Operation.CONVERT, flags=int(Flag.PRIVATE), **what)
    faults = guest = host = 0
    while machine.step(1) == int(W.GO):
        faults += reach.device.access(IOVA + near).status != 0
        guest += scene.vm.touch(near).status not in (int(RetPf.SPURIOUS), int(RetPf.FIXED))
        host += scene.process.touch(HVA + near).status not in (int(VmFault.PRESENT), int(VmFault.NOPAGE))
    over = int(reach.device.access(IOVA + near).status != 0)
    between = {"between": faults, "guest_between": guest, "host_between": host, "afterwards": over}
    return _there_and_back(setting, design) | between


_WIDTH = {
    "taken": ("4K pages that the device loses with one", ""), "widened": ("... of them shared all along", ""),
    "returned": ("... that it has again at the end", ""),
    "least": ("between unmapped and mapped again, at least", "ns"), "most": ("... at most", "ns"),
    "between": ("steps at whose end the device faults beside", ""),
    "guest_between": ("... at whose end the guest waits there", ""),
    "host_between": ("... at whose end the process waits there", ""),
    "afterwards": ("faults of the device beside when it is over", ""),
    "guest": ("faults of the guest until it has all beside it", ""),
    "host": ("faults of the process until it has", ""),
}  # fmt: skip


def _exact(figures: Figures) -> Found:
    taken, widened, returned, between = (figures[name].trial for name in ("taken", "widened", "returned", "between"))
    least, most, guest = (figures[name].trial for name in ("least", "most", "guest"))
    told = f"with one page the device loses {taken:,}, {widened:,} of them for nothing"
    if not taken:
        return Found(Verdict.FALSE, "the device loses nothing, what is private neither")
    if not widened:
        return Found(Verdict.HOLDS, f"{told}; beside it the guest takes {guest:,} faults")
    if widened != returned:
        return Found(Verdict.FALSE, f"{told}, and has {returned:,} again")
    told += f", for {least:,} to {most:,} ns ({between} steps), and faults there"
    return Found(Verdict.PART, f"{told}; beside it the guest takes {guest:,} faults")


def _by(mode: str, unit: str = "vtd") -> dict[str, str]:
    return {"door": f"iommufd {mode}", "unit": unit}


_AGAIN = Switch(
    "kernel",
    {
        "maps again (VT-d)": _by("revoke"), "maps again (AMD)": _by("revoke", "amd"),
        "cuts large entries": _by("mirror"), "only unmaps": _by("notifier"),
    },
    "posted: mapping again (RFCs of 2026); cutting was asked for",
)  # fmt: skip
_CUT = Switch(
    "kernel",
    {
        "cuts and joins (VT-d)": _by("mirror"), "cuts and joins (AMD)": _by("mirror", "amd"),
        "maps again (VT-d)": _by("revoke"), "maps again (AMD)": _by("revoke", "amd"),
    },
    "no posted code cuts them for a guest_memfd",
)  # fmt: skip

CLAIMS = (
    Claim(
        "large-entries-follow", "Large I/O entries are cut at a conversion and put together again after it.",
        f"J. Gunthorpe: not trivial; {MAILS}",
        "a device has two 1G pages in a row; 4K become private, and shared again",
        lambda setting: both(setting, _there_and_back, _LARGE), _whole_again, Evidence.INFERENCE, Verdict.DEPENDS,
        (_CUT,), kind="question",
    ),
    Claim(
        "revoke-is-exact", "A conversion takes from a device what is converted, and nothing beside it.",
        "F. Griffoul: a revoke widens to the large entry; revocable providers v2, 2026",
        "guest, process and a device have two 1G pages in a row; 4K become private, step by step",
        lambda setting: both(setting, _step_by_step, _WIDTH), _exact, Evidence.INFERENCE, Verdict.DEPENDS,
        (_AGAIN, Switch("page size", {"1G": {"page_size": W.PAGE_1G}, "2M": {"page_size": W.PAGE_2M}})),
        kind="question",
    ),
)  # fmt: skip
"""In the order in which they are printed."""
