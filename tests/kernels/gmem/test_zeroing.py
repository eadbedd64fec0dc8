"""What a first use zeroes: alike in both designs where nothing is converted, and for whom it is done."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pgemu.machine.designs import DESIGNS
from pgemu.objects.machine import Config, Machine
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Event

PAGE, M2, G1 = W.PAGE_4K, W.PAGE_2M, W.PAGE_1G
VA = 0x7F00_0000_0000
BLOCKS = 3
Touch = tuple[bool, int]  # whether it is the guest's, page


class Scene:
    """An inode of 2M pages, mapped by a process and bound to its VM, at a guest address of `gpa`."""

    def __init__(self, design: str, shared: bool, gpa: int = 0, **parameters: Any) -> None:
        self.machine = Machine(Config(design, pool=BLOCKS * M2, page_size=M2, **parameters))  # type: ignore[arg-type]
        self.gmem = self.machine.create_guest_memfd(BLOCKS * M2, shared=shared)
        self.process = self.machine.create_process()
        self.vm = self.machine.create_vm(self.process, protected=not shared)
        self.gpa = gpa
        assert self.process.mmap(self.gmem, VA).status == 0
        assert self.vm.bind(self.gmem, gpa).status == 0

    def touch(self, touches: list[Touch]) -> None:
        for guest, page in touches:
            if guest:
                self.vm.touch(self.gpa + page * PAGE)
            else:
                self.process.touch(VA + page * PAGE)

    @property
    def zeroed(self) -> int:
        """Pages."""
        statistics = self.machine.statistics
        return statistics.event(Event.PAGE_ZEROED) + statistics.event(Event.FOLIO_ZEROED_PAGES)


traces = st.lists(st.tuples(st.booleans(), st.integers(0, BLOCKS * 512 - 1)), max_size=20)


@settings(derandomize=True, database=None, deadline=None, max_examples=60)
@given(traces, st.booleans(), st.sampled_from(("folio", "page")))
def test_private_memory_is_zeroed_alike(touches: list[Touch], odd: bool, zero: str) -> None:
    """Both designs, whatever the level of the leaves: `odd` guest frames make them all 4K."""
    zeroed = set()
    for design in DESIGNS:
        scene = Scene(design, False, PAGE if odd else 0, zero=zero)
        scene.touch(touches)
        zeroed.add(scene.zeroed)
    guest = {page for is_guest, page in touches if is_guest}
    whole = not odd or zero == "folio"
    assert zeroed == {512 * len({page // 512 for page in guest}) if whole else len(guest)}


@settings(derandomize=True, database=None, deadline=None, max_examples=60)
@given(traces)
def test_shared_memory_is_zeroed_alike_page_by_page(touches: list[Touch]) -> None:
    """Where leaves are of 4K in both designs, each page is zeroed once, at its first use."""
    for design in DESIGNS:
        scene = Scene(design, True, PAGE, zero="page")
        scene.touch(touches)
        assert scene.zeroed == len({page for _, page in touches})


@settings(derandomize=True, database=None, deadline=None, max_examples=60)
@given(traces, st.sampled_from(("folio", "page")))
def test_what_larger_leaves_and_folios_of_shared_memory_cost(touches: list[Touch], zero: str) -> None:
    """restructure zeroes the 4K folios that are touched. pfnmap zeroes what its guest's 2M leaves show, or its folios.

    Once every page of what it zeroed is touched, both have zeroed the same.
    """
    split, whole = (Scene(design, True, zero=zero) for design in DESIGNS)
    shown = {page // 512 for guest, page in touches if guest or zero == "folio"}
    pages = {page for _, page in touches}
    for scene in (split, whole):
        scene.touch(touches)
    assert split.zeroed == len(pages)
    assert whole.zeroed == 512 * len(shown) + len({page for page in pages if page // 512 not in shown})
    for scene in (split, whole):
        scene.touch([(True, page) for block in shown for page in range(block * 512, block * 512 + 512)])
    assert split.zeroed == whole.zeroed


@pytest.mark.parametrize("zero", [None, "folio", "page"])
def test_default(zero: str | None) -> None:
    """By folio in restructure, as in RFC v2; by page in pfnmap, whose folios stay whole."""
    found = [Config(design, zero=zero).zero for design in DESIGNS]  # type: ignore[arg-type]
    assert found == (["folio", "page"] if zero is None else [zero, zero])


def reached(design: str, slots: list[tuple[int, int, int]], zero: str = "folio") -> list[int]:
    """(vm, offset, length) slots of a 1G inode, whose page at 256M is touched: pages zeroed, of them unreached."""
    machine = Machine(Config(design, pool=G1, zero=zero))  # type: ignore[arg-type]
    gmem = machine.create_guest_memfd(G1)
    process = machine.create_process()
    vms = [machine.create_vm(process, protected=True) for _ in range(2)]
    for number, offset, length in slots:
        assert vms[number].bind(gmem, offset, offset=offset, length=length).status == 0
    assert vms[0].touch(G1 // 4).status == W.RET_PF_FIXED
    statistics = machine.statistics
    assert statistics.event(Event.PAGE_ZEROED) == 0 or zero == "page"
    return [
        statistics.event(Event.PAGE_ZEROED) + statistics.event(Event.FOLIO_ZEROED_PAGES),
        statistics.event(Event.ZEROED_UNREACHED),
    ]


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize(
    ("slots", "unreached"),
    [
        ([(0, 0, G1)], 0),
        ([(0, 0, G1 // 2)], 1 << 17),
        ([(0, M2, G1 // 2)], 1 << 17),
        ([(0, 0, G1 // 2), (0, G1 // 2 + M2, G1 // 2 - M2)], 512),
        ([(0, 0, G1 // 2), (1, G1 // 4, G1 // 2)], 1 << 16),  # overlapping, of two VMs
        ([(0, G1 // 4, PAGE)], (1 << 18) - 1),
    ],
)
def test_pages_that_no_slot_reaches(design: str, slots: list[tuple[int, int, int]], unreached: int) -> None:
    assert reached(design, slots) == [1 << 18, unreached]


@pytest.mark.parametrize("design", DESIGNS)
def test_page_by_page_reaches_all_that_is_zeroed(design: str) -> None:
    """A leaf of 2M at most where the slot is of 512M; restructure's level is that of its folio, 2M for the slot."""
    pages, unreached = reached(design, [(0, 0, G1 // 2)], "page")
    assert (pages, unreached) == (512, 0)


def test_a_merge_that_zeroes_counts_what_no_slot_reaches() -> None:
    machine = Machine(Config("restructure", pool=M2, page_size=M2, merge_zero="unzeroed"))
    gmem = machine.create_guest_memfd(M2, shared=True)
    process = machine.create_process()
    vm = machine.create_vm(process, protected=True)
    assert process.mmap(gmem, VA).status == 0
    assert vm.bind(gmem, 0, length=M2 // 2).status == 0
    process.touch(VA + 400 * PAGE)
    assert gmem.convert(0, M2, shared=False).status == 0
    assert machine.statistics.event(Event.PAGE_ZEROED) == 512
    assert machine.statistics.event(Event.ZEROED_UNREACHED) == 255  # of 256 one was zeroed by its first use


def test_flags_and_bits_page_by_page() -> None:
    """PG_uptodate when all pages are zeroed, whether a large leaf did it or 512 small ones."""
    for stride in (1, 512):
        scene = Scene("pfnmap", True, PAGE if stride == 1 else 0)
        scene.touch([(True, page) for page in range(0, 511, stride)])
        head = scene.gmem.pfn(0)
        assert head is not None
        assert bool(int(scene.machine.struct_page(head)[0]) & 1 << 3) == (stride == 512)
        scene.touch([(True, 511)])
        assert int(scene.machine.struct_page(head)[0]) & 1 << 3
        assert scene.zeroed == 512
        assert scene.gmem.punch_hole(0, M2).status == 0
        scene.touch([(False, 3)])
        assert scene.zeroed == 513  # nothing of what was is left
        bits = scene.machine.register(W.R_ZEROED_ROWS)
        assert scene.machine.arrays.state[bits : bits + 8].tolist() == [8] + [0] * 7
        assert scene.machine.check() == 0
        assert np.count_nonzero(scene.machine.arrays.state[bits : bits + 24]) == 1
