"""A freeze that posted code would spin on: its result, what stands in between, what happens when the reference goes.

hugetlb_restructuring_freeze_folio() of the branch of December 2025 loops while anybody else has a reference, as RFC v2.
"""

from __future__ import annotations

from typing import Any

import pytest

from pgemu.machine.results import result_name
from pgemu.objects.machine import Config, Machine
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Event, Gauge
from pgemu_kernels.words.operations import Flag, Operation

PAGE, M2, G1 = W.PAGE_4K, W.PAGE_2M, W.PAGE_1G
VA = 0x7F00_0000_0000
ORDERS = ("rfc2", "fixup", "jan2026")
SPINS = -W.WOULD_SPIN


class Scene:
    """Four 2M pages of an inode, mapped by a process and bound to its VM, all of it allocated."""

    def __init__(self, *, shared: bool = False, **parameters: Any) -> None:
        self.machine = Machine(Config(**{"pool": 4 * M2, "page_size": M2, "batch": "block"} | parameters))
        self.gmem = self.machine.create_guest_memfd(4 * M2, shared=shared)
        self.process = self.machine.create_process()
        self.vm = self.machine.create_vm(self.process, protected=True)
        assert self.process.mmap(self.gmem, VA).status == 0
        assert self.vm.bind(self.gmem, 0).status == 0
        self.vm.touch_many(range(0, 4 * M2, PAGE))

    def convert(self, first: int, pages: int, *, shared: bool) -> tuple[int, int]:
        """Status, and the page that it is about."""
        result = self.gmem.convert(first * PAGE, pages * PAGE, shared=shared)
        return result.status, result.detail // PAGE

    def shared(self, *pages: int) -> list[bool]:
        return [self.gmem.is_shared(page * PAGE) for page in pages]

    def split(self) -> list[bool]:
        return [self.gmem.is_split(block * M2) for block in range(4)]

    def hold(self, page: int) -> int:
        return self.gmem.get_reference(page * PAGE).detail

    def event(self, event: Event) -> int:
        return self.machine.statistics.event(event, Operation.CONVERT)

    def sound(self) -> None:
        assert self.machine.check() == 0, self.machine.broken


def test_its_name_is_no_errno() -> None:
    assert result_name(Operation.CONVERT, SPINS) == "would spin"
    assert W.WOULD_SPIN > 133  # EHWPOISON is the highest of include/uapi/asm-generic/errno.h


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("split_form", ["rfc2", "jan2026"])
def test_a_split_that_meets_a_reference(order: str, split_form: str) -> None:
    """Pages 500 to 1099 become shared: block 0 does, block 1 is held (at page 700, so by its head), block 2 waits."""
    scene = Scene(order=order, split_form=split_form)
    pfn = scene.hold(700)
    assert scene.convert(500, 600, shared=True) == (SPINS, 512)
    # Huge page by huge page: what came before is converted, of this one nothing is stored, in RFC v2 neither.
    assert scene.shared(499, 500, 511, 512, 1023, 1024) == [False, True, True, False, False, False]
    assert scene.split() == [True, False, False, False]
    [left] = scene.machine.spinning()
    assert left == (scene.gmem.inode, 512 * PAGE, 588 * PAGE, True, 512 * PAGE, pfn - 188, ("transient references",))
    assert scene.machine.statistics.results(Operation.CONVERT) == {SPINS: 1}
    assert scene.machine.statistics.gauge(Gauge.SPINNING) == scene.event(Event.FREEZE_SPIN) == 1
    # Stage 2 of it is zapped where the order zaps before it splits.
    zapped = order != "jan2026"
    assert scene.vm.touch(600 * PAGE) == (W.RET_PF_FIXED if zapped else W.RET_PF_SPURIOUS, 2)
    scene.sound()
    # The lock is free, so that others go on. What concerns the same huge page waits behind.
    assert scene.convert(1536, 1, shared=True) == (0, 0)
    assert scene.convert(520, 1, shared=False) == (SPINS, 512)
    assert len(scene.machine.spinning()) == 2
    assert scene.machine.operate(Operation.PUT, address=pfn * PAGE).status == 0
    assert scene.machine.spinning() == []
    assert scene.shared(500, 512, 519, 520, 521, 1023, 1024, 1099, 1100) == [True] * 3 + [False] + [True] * 4 + [False]
    assert scene.split() == [True] * 4
    assert scene.event(Event.SPIN_ENDED) == 2
    assert scene.machine.statistics.gauge(Gauge.SPINNING) == 0
    assert scene.machine.statistics.peak(Gauge.SPINNING) == 2
    scene.sound()


@pytest.mark.parametrize("order", ORDERS)
def test_a_merge_that_meets_a_reference(order: str) -> None:
    """The last shared page of block 0 becomes private, page 9 beside it is held: the gate does not look there."""
    scene = Scene(order=order)
    assert scene.convert(0, 1, shared=True) == scene.convert(600, 1, shared=True) == (0, 0)
    pfn = scene.hold(9)
    assert scene.convert(0, 9, shared=False) == (SPINS, 9)
    # fixup, also that of the branch of December 2025, stores last of all; the others before they merge.
    assert scene.shared(0, 600) == [order == "fixup", True]
    assert scene.split() == [True, True, False, False]
    assert scene.machine.spinning()[0].page == 9 * PAGE
    scene.sound()
    assert scene.machine.operate(Operation.PUT, address=pfn * PAGE).status == 0
    assert scene.shared(0, 600) == [False, True]
    assert scene.split() == [False, True, False, False]
    assert scene.machine.spinning() == []
    scene.sound()


def test_who_holds_it() -> None:
    """Two references of one page: the conversion is done with the last one. The holders are named."""
    scene = Scene(shared=True)
    assert scene.process.pin(VA + 5 * PAGE, PAGE, pin=3).status == 0
    pfn = scene.hold(5)
    assert scene.convert(0, 5, shared=False) == scene.convert(6, 506, shared=False) == (0, 0)
    assert scene.convert(5, 1, shared=False) == (-W.EAGAIN, 5)  # in its own range the gate sees it
    scene.machine.operate(Operation.UNPIN, object_=3)
    assert scene.convert(5, 1, shared=False) == (-W.EAGAIN, 5)
    scene.machine.operate(Operation.PUT, address=pfn * PAGE)
    assert scene.convert(5, 1, shared=False) == (0, 0)
    assert scene.split()[0] is False
    head = [scene.hold(7), scene.hold(300)][0] - 7
    assert scene.convert(5, 1, shared=True) == (SPINS, 0)
    for page, left in ((7, 1), (300, 0)):
        assert [spin.holders for spin in scene.machine.spinning()] == [("transient references",)]
        assert scene.machine.operate(Operation.PUT, address=(head + page) * PAGE).status == 0
        assert len(scene.machine.spinning()) == left
    assert scene.shared(5) == [True]
    scene.sound()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shared", [True, False])
def test_step_by_step_it_is_blocked_until_the_holder_lets_go(order: str, shared: bool) -> None:
    scene = Scene(order=order)
    if not shared:
        assert scene.convert(0, 1, shared=True) == (0, 0)
    pfn = scene.hold(9)
    flags = Flag.SHARED if shared else Flag.PRIVATE
    scene.machine.begin(1, Operation.CONVERT, flags=flags, object_=scene.gmem.inode, offset=0, length=PAGE)
    while (outcome := scene.machine.step(1)) == W.GO:
        pass
    assert outcome == W.BLOCKED
    assert scene.machine.result(1) == (SPINS, 0 if shared else 9 * PAGE)
    assert scene.machine.step(1) == W.BLOCKED
    assert scene.machine.spinning() == []  # it is not over
    assert scene.convert(1000, 1, shared=True) == (-W.EBUSY, 0)  # and has the lock
    assert scene.machine.operate(Operation.PUT, address=pfn * PAGE).status == 0
    while (outcome := scene.machine.step(1)) == W.GO:
        pass
    assert outcome == W.STOP
    assert scene.machine.result(1) == (0, 0)
    assert scene.shared(0) == [shared]
    assert scene.split()[0] is shared
    scene.sound()


def test_what_goes_meanwhile_is_not_waited_for() -> None:
    """A hole takes the held huge page out of the inode: the conversion has nothing to split, and is done. With the
    inode goes what is left of it."""
    scene = Scene()
    scene.hold(9)
    scene.hold(600)
    assert scene.convert(0, 1, shared=True) == (SPINS, 0)
    assert scene.convert(512, 1, shared=True) == (SPINS, 512)
    assert scene.gmem.punch_hole(0, M2).status == 0
    assert [spin.offset for spin in scene.machine.spinning()] == [M2]
    assert scene.shared(0, 512) == [True, False]
    scene.sound()
    assert scene.gmem.close().status == 0
    assert scene.machine.spinning() == []
    scene.sound()


@pytest.mark.parametrize("order", ORDERS)
def test_a_range_is_done_up_to_the_huge_page_that_is_held(order: str) -> None:
    """Blocks 0 and 2 can be merged, block 1 is held beside the range. fixup, which stores last of all, has stored what
    it merged; the others have stored all of it, and merged the rest."""
    scene = Scene(order=order, batch="range")
    for page in (0, 600, 1024):
        assert scene.convert(page, 1, shared=True) == (0, 0)
    pfn = scene.hold(1000)
    assert scene.convert(0, 601, shared=False) == (SPINS, 1000)
    assert scene.shared(0, 600, 1024) == [False, order == "fixup", True]
    assert scene.split() == [False, True, True, False]
    assert scene.machine.spinning()[0].offset == {"fixup": M2, "jan2026": 0, "rfc2": 600 * PAGE}[order]  # range, item
    scene.sound()
    assert scene.machine.operate(Operation.PUT, address=pfn * PAGE).status == 0
    assert scene.shared(0, 600, 1024) == [False, False, True]
    assert scene.split() == [False, False, True, False]
    scene.sound()


def test_what_there_is_no_room_for_is_dropped_and_counted() -> None:
    """A limit of the model: the conversion would spin as the others, and what is left of it is never done."""
    scene = Scene()
    pfn = scene.hold(9)
    for number in range(W.SPINS):
        assert scene.convert(number % 500, 1, shared=True) == (SPINS, 0)
    assert scene.event(Event.SPIN_DROPPED) == 0
    assert scene.convert(511, 1, shared=True) == (SPINS, 0)
    assert scene.event(Event.SPIN_DROPPED) == 1
    assert scene.machine.statistics.results(Operation.CONVERT) == {SPINS: W.SPINS + 1}
    assert len(scene.machine.spinning()) == W.SPINS
    assert scene.machine.operate(Operation.PUT, address=pfn * PAGE).status == 0
    assert scene.event(Event.SPIN_ENDED) == W.SPINS
    assert scene.shared(0, 499, 511) == [True, True, False]
    scene.sound()


def test_what_has_ended_makes_room() -> None:
    scene = Scene()
    held = [scene.hold(9), scene.hold(600)]
    for number in range(W.SPINS):
        assert scene.convert(512 * (number % 2) + number % 500, 1, shared=True) == (SPINS, 512 * (number % 2))
    assert scene.machine.operate(Operation.PUT, address=held[0] * PAGE).status == 0
    left = scene.machine.spinning()
    assert len(left) == W.SPINS // 2
    assert scene.convert(1023, 1, shared=True) == (SPINS, 512)
    assert scene.event(Event.SPIN_DROPPED) == 0
    found = scene.machine.spinning()
    assert (found[:-1], found[-1].offset) == (left, 1023 * PAGE)
    assert scene.machine.operate(Operation.PUT, address=held[1] * PAGE).status == 0
    assert scene.event(Event.SPIN_ENDED) == W.SPINS + 1
    scene.sound()


@pytest.mark.parametrize(("split_form", "stores", "merged"), [("jan2026", 262_144, 4162), ("rfc2", 0, 1)])
def test_interrupts_are_off_for_all_stores_of_a_split(split_form: str, stores: int, merged: int) -> None:
    """The branch of December 2025 stores each of 262,144 pages under one xa_lock_irq(); its merge is one store, which
    frees 4,161 nodes: 1 + 64 + 4096. RFC v2 takes the lock page by page."""
    machine = Machine(Config(pool=G1, split_form=split_form))  # type: ignore[arg-type]
    gmem = machine.create_guest_memfd(G1)
    assert gmem.allocate(0, G1).status == 0
    assert gmem.convert(0, PAGE, shared=True).status == 0
    assert machine.statistics.peak(Gauge.STORES_IRQ_OFF) == stores
    machine.arrays.stats[int(W.STATS_GAUGES) + 2 * Gauge.STORES_IRQ_OFF + 1] = 0
    assert gmem.convert(0, PAGE, shared=False).status == 0
    assert machine.statistics.peak(Gauge.STORES_IRQ_OFF) == merged
    assert machine.statistics.gauge(Gauge.STORES_IRQ_OFF) == 0
