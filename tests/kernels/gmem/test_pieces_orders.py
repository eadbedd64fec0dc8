"""split_to="2M" with every order: step by step, interleaved, merged lazily, by the worker, with LRU batches."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from machines import assert_same
from pgemu.objects.guest_memfd import GuestMemfd
from pgemu.objects.machine import Config, Machine
from pgemu.objects.vm import Vm
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Event, Gauge
from pgemu_kernels.words.operations import Flag, Operation

PAGE, M2, G1 = W.PAGE_4K, W.PAGE_2M, W.PAGE_1G
PAGES = 1 << 18  # of a 1G page
BASE = 1 << 40  # where the process maps the inode
ORDERS = ("rfc2", "fixup", "jan2026")
SPOTS = (0, 3, 511, 512, 600, 1023, 1024, PAGES - 1, PAGES, PAGES + 1, PAGES + 700)

Arguments = dict[str, Any]
VARIANTS: dict[str, Arguments] = {
    **{order: {"order": order} for order in ORDERS},
    **{f"{order}, by block": {"order": order, "batch": "block", "hvo": False} for order in ORDERS},
    **{f"{order}, lazily": {"order": order, "merge": "lazy", "worker": "queued"} for order in ORDERS},
    "rfc2, split form rfc2": {"order": "rfc2", "split_form": "rfc2", "kernel": "6.12", "lru_cache": True},
    "fixup, split form rfc2": {"order": "fixup", "split_form": "rfc2", "worker": "queued", "zero": "page"},
    "jan2026, 6.12": {"kernel": "6.12", "merge": "lazy", "batch": "block", "flush": "batched"},
}


class Scene:
    """Two 1G pages of one inode, mapped by a process and bound to its VM."""

    def __init__(self, *, shared: bool = False, **parameters: Any) -> None:
        self.machine = Machine(Config(pool=2 * G1, split_to="2M", **parameters))
        self.gmem: GuestMemfd = self.machine.create_guest_memfd(2 * G1, shared=shared)
        self.process = self.machine.create_process()
        assert self.process.mmap(self.gmem, BASE).status == 0
        self.vm: Vm = self.machine.create_vm(self.process, protected=True)
        assert self.vm.bind(self.gmem, 0).status == 0

    def convert(self, first: int, pages: int, *, shared: bool) -> tuple[int, int]:
        """Status, and the failing page where it failed (else 0)."""
        result = self.gmem.convert(first * PAGE, pages * PAGE, shared=shared)
        return result.status, result.detail // PAGE

    def gauge(self, gauge: Gauge) -> int:
        return self.machine.statistics.gauge(gauge)

    def split(self) -> int:
        """2M folios that are split, as the nodes of the page cache tell."""
        return (self.gauge(Gauge.XARRAY_NODES) - 65 * self.gauge(Gauge.BLOCKS_PARTLY)) // 8

    def leave_frames(self, n: int | None) -> None:
        limit = self.machine.register(W.R_FRAMES) - 1 if n is None else self.gauge(Gauge.FRAMES_USED) + n
        self.machine.arrays.state[W.R_FRAMES_LIMIT] = limit

    def sound(self) -> None:
        assert self.machine.check() == 0, self.machine.broken

    def finish(self, actor: int) -> tuple[int, int]:
        for _ in range(60):
            outcome = self.machine.step(actor)
            assert outcome != W.BLOCKED
            if outcome == W.STOP:
                return tuple(self.machine.result(actor))
        raise AssertionError("an operation of more than 60 steps")


def host(page: int) -> Arguments:
    return {"op": Operation.HOST_FAULT, "address": BASE + page * PAGE}


def guest(page: int) -> Arguments:
    return {"op": Operation.GUEST_FAULT, "address": page * PAGE}


def converting(first: int, pages: int, *, shared: bool) -> Arguments:
    flags = Flag.SHARED if shared else Flag.PRIVATE
    return {"op": Operation.CONVERT, "flags": flags, "offset": first * PAGE, "length": pages * PAGE}


def mixed(scene: Scene) -> None:
    """Both huge pages are there; of the first, pieces 0 and 2 have shared pages that everybody uses."""
    assert scene.vm.touch(PAGES * PAGE).detail == scene.vm.touch(0).detail == 3
    for page in (3, 1024):
        assert scene.convert(page, 7, shared=True) == (0, 0)
        assert scene.process.touch(BASE + page * PAGE).status == W.VM_FAULT_LOCKED
        assert scene.vm.touch(page * PAGE).detail == 1
    assert scene.vm.touch(600 * PAGE).detail == 2


def held(scene: Scene) -> None:
    """As that; somebody holds a page of piece 2 and all of piece 1."""
    mixed(scene)
    assert scene.gmem.get_reference(1025 * PAGE).status == scene.gmem.get_reference(700 * PAGE).status == 0


def short(scene: Scene) -> None:
    """As mixed; memory for two pieces more."""
    mixed(scene)
    scene.leave_frames(20)


def untouched(scene: Scene) -> None:
    """Nothing is allocated; some of what will be is shared."""
    assert scene.convert(700, 400, shared=True) == (0, 0)


CASES = [
    (mixed, converting(500, 1200, shared=True)),
    (mixed, converting(0, 600, shared=False)),
    (mixed, converting(0, 2 * PAGES, shared=False)),
    (mixed, converting(PAGES - 3, 6, shared=True)),
    (held, converting(500, 1200, shared=True)),
    (held, converting(0, 1200, shared=False)),
    (short, converting(500, 2000, shared=True)),
    (short, converting(0, 1200, shared=False)),
    (mixed, host(1026)),
    (mixed, guest(5)),
    (untouched, host(701)),
    (untouched, guest(1)),
    (held, {"op": Operation.PUNCH_HOLE, "offset": 0, "length": 2 * G1}),
    (held, {"op": Operation.CLOSE}),
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_do_what_the_whole_operation_does(variant: str) -> None:
    for number, (prepare, arguments) in enumerate(CASES):
        whole, stepped = (Scene(**VARIANTS[variant]) for _ in range(2))
        prepare(whole)
        prepare(stepped)
        expected = whole.machine.operate(**arguments, object_=0, actor=1)
        stepped.machine.begin(1, **arguments, object_=0)
        if expected.status == -W.WOULD_SPIN:  # a step is blocked where the freeze would spin
            while (outcome := stepped.machine.step(1)) == W.GO:
                pass
            assert outcome == W.BLOCKED
            continue
        assert stepped.finish(1) == tuple(expected), number
        assert_same(whole.machine, stepped.machine)
        whole.leave_frames(None)
        whole.sound()


def run_actors(scene: Scene, seed: int, operations: int) -> list[tuple[int, int]]:
    """Operations of three actors, one step at a time, in an order that a seed decides: the results.

    Whoever splits a folio that somebody holds spins, with the lock held: then those who hold folios let them go.
    """
    chance = random.Random(seed)
    busy: list[int] = []
    results: list[tuple[int, int]] = []
    blocked = 0
    while operations or busy:
        idle = [actor for actor in (1, 2, 3) if actor not in busy]
        if operations and idle and (not busy or chance.random() < 0.3):
            scene.machine.begin(idle[0], **drawn(chance), object_=0)
            busy.append(idle[0])
            operations -= 1
        actor = chance.choice(busy)
        outcome = scene.machine.step(actor)
        blocked = blocked + 1 if outcome == W.BLOCKED else 0
        assert blocked < 500, "a deadlock"
        if blocked == 100:
            drop_references(scene)
        if outcome == W.STOP:
            busy.remove(actor)
            results.append(tuple(scene.machine.result(actor)))
    return results


def drawn(chance: random.Random) -> Arguments:
    page = chance.choice(SPOTS)
    pages = min(chance.choice((1, 1, 5, 512, 1100)), 2 * PAGES - page)
    rows = [
        host(page),
        guest(page),
        converting(page, pages, shared=chance.random() < 0.5),
        {"op": Operation.GET, "offset": page * PAGE},
        {"op": Operation.PUT, "offset": page * PAGE},
        {"op": Operation.PUNCH_HOLE, "offset": page // PAGES * G1, "length": G1},
        {"op": chance.choice((Operation.WORK, Operation.LRU_DRAIN))},
    ]
    return chance.choices(rows, (7, 7, 9, 1, 4, 1, 2))[0]


def held_frames(machine: Machine) -> list[int]:
    """Frames of folios with transient references."""
    first = machine.register(W.R_TRANSIENT)
    counts = machine.arrays.counts[first : first + machine.register(W.R_GUEST_PAGES)]
    return (np.flatnonzero(counts) + machine.register(W.R_POOL_BASE)).tolist()


def drop_references(scene: Scene) -> None:
    for pfn in held_frames(scene.machine):
        while scene.gmem.put_reference(pfn).status == 0:
            pass


@pytest.mark.parametrize("variant", VARIANTS)
def test_many_actors_leave_a_sound_machine(variant: str) -> None:
    """Any interleaving of steps, with and without memory; at the end everything can be freed."""
    scene = Scene(**VARIANTS[variant])
    results = []
    for round_ in range(5):
        scene.leave_frames(600 if round_ % 3 == 1 else 25 if round_ % 3 == 2 else None)
        results += run_actors(scene, len(variant) + round_, 30)
        scene.sound()
    assert len({status for status, _ in results}) > 4
    scene.leave_frames(None)
    assert scene.gmem.close().status == 0
    scene.machine.operate(Operation.LRU_DRAIN)
    drop_references(scene)
    scene.machine.operate(Operation.WORK)
    assert scene.gauge(Gauge.POOL_FREE) == 2
    assert scene.gauge(Gauge.BLOCKS_ZOMBIE) == scene.gauge(Gauge.WORK_PENDING) == 0
    scene.sound()


@pytest.mark.parametrize("order", ORDERS)
def test_the_last_page_merges_the_piece_and_the_block(order: str) -> None:
    """fixup merges before it stores, and looks at what will be."""
    scene = Scene(order=order)
    mixed(scene)
    assert (scene.gauge(Gauge.BLOCKS_PARTLY), scene.split()) == (1, 2)
    assert scene.convert(3, 6, shared=False) == (0, 0)  # all but the last
    assert (scene.gauge(Gauge.BLOCKS_PARTLY), scene.split()) == (1, 2)
    assert scene.convert(0, 512, shared=False) == (0, 0)
    assert (scene.gauge(Gauge.BLOCKS_PARTLY), scene.split()) == (1, 1)
    assert scene.convert(1024, 10, shared=False) == (0, 0)
    assert (scene.gauge(Gauge.BLOCKS_PARTLY), scene.gauge(Gauge.BLOCKS_HUGE), scene.split()) == (0, 2, 0)
    scene.sound()


@pytest.mark.parametrize("order", ORDERS)
def test_lazily(order: str) -> None:
    """A private piece waits for the worker though its block has shared pages; the block counts once."""
    scene = Scene(order=order, merge="lazy")
    mixed(scene)
    assert scene.convert(0, 512, shared=False) == (0, 0)
    assert (scene.gauge(Gauge.WORK_PENDING), scene.split()) == (1, 2)
    assert scene.convert(1024, 512, shared=False) == (0, 0)
    assert (scene.gauge(Gauge.WORK_PENDING), scene.split()) == (1, 2)
    assert scene.convert(1, 1, shared=True) == (0, 0)
    assert scene.gauge(Gauge.WORK_PENDING) == 1  # piece 2
    scene.sound()
    assert scene.machine.work() == (0, 1)
    assert (scene.gauge(Gauge.WORK_PENDING), scene.split()) == (0, 1)
    assert scene.convert(1, 1, shared=False) == (0, 0)
    page = scene.gmem.get_reference(PAGE).detail
    assert scene.machine.work() == (0, 0)
    assert (scene.gauge(Gauge.WORK_PENDING), scene.split()) == (1, 1)
    assert scene.gmem.put_reference(page).status == 0
    assert scene.convert(2, 1, shared=True) == (0, 0)  # off the list
    assert scene.gauge(Gauge.WORK_PENDING) == 0
    assert scene.convert(2, 1, shared=False) == (0, 0)
    assert scene.machine.work() == (0, 1)
    assert scene.gauge(Gauge.BLOCKS_HUGE) == 2
    scene.sound()


@pytest.mark.parametrize("order", ORDERS)
def test_failing_folio(order: str) -> None:
    """-ENOMEM names the 2M piece, and so does a freeze that would spin; rfc2 merges again what it split."""
    scene = Scene(order=order)
    held(scene)
    assert scene.convert(300, 500, shared=True) == (-W.WOULD_SPIN, 512)
    assert scene.split() == 2
    scene = Scene(order=order)
    mixed(scene)
    scene.leave_frames(7 + 2 + 1)
    assert scene.convert(2048, 1024, shared=True) == (-W.ENOMEM, 2048 + 512)
    assert scene.split() == (2 if order == "rfc2" else 3)
    scene.leave_frames(None)
    scene.sound()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("held", "first"), [(1100, 1100), (700, 512)], ids=["in the piece", "a whole piece beside it"])
def test_a_merge_that_meets_a_reference_would_spin(order: str, held: int, first: int) -> None:
    """The last shared pages of the block become private. fixup stores last of all, so that nothing is merged yet."""
    scene = Scene(order=order)
    mixed(scene)
    assert scene.convert(3, 7, shared=False) == (0, 0)
    assert scene.split() == 1
    pfn = scene.gmem.get_reference(held * PAGE).detail
    assert scene.convert(1024, 7, shared=False) == (-W.WOULD_SPIN, first)
    assert scene.gmem.is_shared(1030 * PAGE) == (order == "fixup")
    assert scene.split() == (1 if order == "fixup" or held == 1100 else 0)
    [left] = scene.machine.spinning()
    assert left.holders == ("transient references",)
    scene.sound()
    assert scene.gmem.put_reference(pfn).status == 0
    assert not scene.gmem.is_shared(1030 * PAGE)
    assert (scene.gauge(Gauge.BLOCKS_HUGE), scene.machine.spinning()) == (2, [])
    scene.sound()


@pytest.mark.parametrize("order", ORDERS)
def test_a_lazy_merge_that_meets_a_reference_waits(order: str) -> None:
    """The conversion is done; the worker finds the piece held each time, and that counts."""
    scene = Scene(order=order, merge="lazy", worker="queued")
    mixed(scene)
    pfn = scene.gmem.get_reference(1100 * PAGE).detail
    assert scene.convert(1024, 7, shared=False) == (0, 0)
    assert scene.machine.spinning() == []
    spins = scene.machine.statistics.event(Event.FREEZE_SPIN)
    assert scene.machine.work() == (0, 0)
    assert (scene.gauge(Gauge.WORK_PENDING), scene.split()) == (1, 2)
    assert scene.machine.statistics.event(Event.FREEZE_SPIN) > spins
    assert scene.gmem.put_reference(pfn).status == 0
    assert scene.machine.work() == (0, 1)
    assert (scene.gauge(Gauge.WORK_PENDING), scene.split()) == (0, 1)
    scene.sound()


def test_batches_hold_the_pages_of_a_split_piece() -> None:
    """Split form rfc2: 512 pages go through the batches of 31; what the last one holds keeps the piece from merging."""
    scene = Scene(order="rfc2", split_form="rfc2", kernel="6.12", lru_cache=True)
    assert scene.vm.touch(0).detail == 3
    assert scene.convert(0, 1, shared=True) == (0, 0)
    assert scene.gauge(Gauge.PAGES_LRU_CACHED) == 512 % 31
    assert scene.convert(512, 1, shared=True) == (0, 0)
    assert scene.gauge(Gauge.PAGES_LRU_CACHED) == 1024 % 31
    spins = -W.WOULD_SPIN, 1023
    assert scene.convert(512, 1, shared=False) == spins  # the page is in no batch, another one of its piece is
    assert scene.split() == 2
    scene.sound()
    assert scene.machine.operate(Operation.LRU_DRAIN).detail == 1024 % 31
    assert scene.split() == 1
    assert scene.convert(0, 1, shared=False) == (0, 0)
    assert scene.gauge(Gauge.BLOCKS_PARTLY) == 0
    scene.sound()
    assert scene.convert(G1 // PAGE, 1, shared=True) == (0, 0)
    assert scene.process.touch(BASE + G1).status == W.VM_FAULT_LOCKED  # allocated in pieces, with its batch
    assert scene.gauge(Gauge.PAGES_LRU_CACHED) == 512 % 31
    scene.sound()


@pytest.mark.parametrize("split_form", ["rfc2", "jan2026"])
def test_end_of_a_block_with_held_folios(split_form: str) -> None:
    """A held 2M folio counts 512 pages; pins hold pages; the worker takes the block when it runs."""
    scene = Scene(split_form=split_form, worker="queued")
    mixed(scene)
    assert scene.process.pin(BASE + 3 * PAGE, 2 * PAGE, pin=7) == (0, 2)
    piece = scene.gmem.get_reference(600 * PAGE).detail
    scene.sound()
    assert scene.gmem.punch_hole(0, G1) == (-W.EAGAIN, 0)
    assert scene.gmem.close().status == 0
    row = int(scene.machine.register(W.R_BLOCK_ROWS))
    outstanding = scene.machine.arrays.state[row + int(W.B_OUTSTANDING)]
    assert outstanding == 512 + 2
    scene.sound()
    assert scene.machine.unpin(7).status == 0
    assert scene.gauge(Gauge.WORK_PENDING) == 0
    assert scene.gmem.put_reference(piece).status == 0
    assert (scene.gauge(Gauge.WORK_PENDING), scene.gauge(Gauge.BLOCKS_ZOMBIE)) == (1, 1)
    scene.sound()
    assert scene.machine.work() == (0, 1)
    assert (scene.gauge(Gauge.POOL_FREE), scene.gauge(Gauge.BLOCKS_ZOMBIE)) == (2, 0)
    scene.sound()
