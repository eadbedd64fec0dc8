"""The what-if policy split_to="2M": 1G -> 2M -> 4K. Numbers by hand, struct pages decoded, failures, a random run.

The rules it is held against are the machine's own recount, and a model here that knows which pages are shared.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from pgemu.objects.address_space import AddressSpace
from pgemu.objects.guest_memfd import GuestMemfd
from pgemu.objects.machine import Config, Machine
from pgemu.objects.vm import Vm
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Event, Gauge

PAGE, M2, G1 = W.PAGE_4K, W.PAGE_2M, W.PAGE_1G
BASE = 1 << 40  # where the process maps the inode
TOUCHED = 3  # the piece that most tests touch
KERNELS = ["6.12", "6.18", "7.3"]
SPLIT_FORMS = ["rfc2", "jan2026"]


def make(blocks: int = 1, *, shared: bool = False, **parameters: Any) -> tuple[Machine, GuestMemfd, Vm, AddressSpace]:
    machine = Machine(Config(pool=blocks * G1, split_to="2M", **parameters))
    machine.check_each()
    gmem = machine.create_guest_memfd(blocks * G1, shared=shared)
    process = machine.create_process()
    assert process.mmap(gmem, BASE).status == 0
    vm = machine.create_vm(process, protected=True)
    assert vm.bind(gmem, 0).status == 0
    return machine, gmem, vm, process


def gauge(machine: Machine, which: Gauge) -> int:
    return machine.statistics.gauge(which)


def leave_frames(machine: Machine, frames: int) -> None:
    """So many metadata frames can be taken from now on."""
    machine.arrays.state[W.R_FRAMES_LIMIT] = gauge(machine, Gauge.FRAMES_USED) + frames


def check_folios(machine: Machine, gmem: GuestMemfd, split: set[int]) -> None:
    """Pieces of the first block, decoded: those in `split` are 4K folios, the others folios of 2M.

    The first, the last, those in `split` and beside them, and every eighth, in turn: the callers have six machines
    and one or two pieces split, with which each piece is looked at.
    """
    head = gmem.pfn(0)
    assert head is not None
    turn = len(SPLIT_FORMS) * KERNELS.index(machine.config.kernel) + SPLIT_FORMS.index(machine.config.split_form)
    others = {*range((turn + 3 * len(split)) % 8, 512, 8), 0, 511, *(piece + by for piece in split for by in (-1, 1))}
    for piece in sorted(split | others & set(range(512))):
        first = head + 512 * piece
        if piece in split:
            for page in range(0, 512, 37):
                folio = machine.folio(first + page)
                assert (folio.pfn, folio.order, folio.refcount, folio.mapcount) == (first + page, 0, 1, 0)
                assert folio.index == 512 * piece + page
                assert folio.type is None
                assert folio.inode == gmem.inode
            continue
        folio = machine.folio(first + 300)  # a tail finds its head
        assert (folio.pfn, folio.order, folio.nr_pages, folio.refcount) == (first, 9, 512, 512)
        assert (folio.type, folio.index, folio.mapcount, folio.inode) == ("hugetlb", 512 * piece, 0, gmem.inode)
        assert folio.hugetlb is not None
        assert folio.hugetlb.subpool == folio.hugetlb.cgroup == 0
        assert folio.optimized
        vmemmap = folio.vmemmap
        assert len({page.frame for page in vmemmap}) == (1 if machine.config.kernel != "7.3" else 2)
        assert [page.writable for page in vmemmap] == [True] + [False] * 7


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("split_form", SPLIT_FORMS)
def test_one_page(kernel: str, split_form: str) -> None:
    """One 4K page shared and private again: vmemmap pages, nodes, levels and struct pages."""
    machine, gmem, vm, process = make(kernel=kernel, split_form=split_form)
    assert vm.touch(0).detail == 3
    frames = gauge(machine, Gauge.FRAMES_USED) + (kernel == "7.3")  # its shared tail page of 2M pages stays
    pages = gauge(machine, Gauge.VMEMMAP_PAGES) + (kernel == "7.3")
    words = machine.folio(gmem.pfn(0)).words()  # type: ignore[arg-type]
    index = 512 * TOUCHED + 5
    assert gmem.convert(index * PAGE, PAGE, shared=True) == (0, 0)
    assert gauge(machine, Gauge.VMEMMAP_PAGES) - pages == 511 + 8 - 1  # a split of all of it: 4096 - 1
    assert gauge(machine, Gauge.XARRAY_NODES) == 1 + 64 + 8  # ... 4161
    assert gauge(machine, Gauge.BLOCKS_PARTLY) == 1
    assert gauge(machine, Gauge.BLOCKS_HUGE) == 0
    check_folios(machine, gmem, {TOUCHED})
    assert process.touch(BASE + index * PAGE) == (W.VM_FAULT_LOCKED, 1)
    assert process.touch(BASE + index * PAGE + PAGE).status == W.VM_FAULT_SIGBUS
    levels = [vm.touch(page * PAGE).detail for page in (0, index, index + 1, 512 * (TOUCHED + 1))]
    assert levels == [2, 1, 1, 2]
    assert machine.check() == 0
    tables = gauge(machine, Gauge.HOST_TABLES) + gauge(machine, Gauge.STAGE2_TABLES)
    assert gmem.convert(index * PAGE, PAGE, shared=False) == (0, 0)
    assert gauge(machine, Gauge.BLOCKS_HUGE) == 1
    assert gauge(machine, Gauge.XARRAY_NODES) == 0
    assert gauge(machine, Gauge.VMEMMAP_PAGES) == pages
    folio = machine.folio(gmem.pfn(index * PAGE))  # type: ignore[arg-type]
    assert (folio.order, folio.refcount, folio.index, folio.optimized) == (18, 1 << 18, 0, True)
    assert folio.words()[3:] == words[3:]
    assert folio.flags == ("uptodate", "head")
    assert folio.hugetlb is not None
    assert folio.hugetlb.subpool != 0
    assert tables > 0
    assert gauge(machine, Gauge.FRAMES_USED) >= frames
    assert machine.check() == 0
    assert gmem.close().status == 0
    assert gauge(machine, Gauge.POOL_FREE) == 1
    assert machine.check() == 0


def test_zap_reaches_two_megabytes() -> None:
    """Leaves of other pieces stay where a page of a block in pieces is converted."""
    machine, gmem, vm, _ = make()
    assert gmem.convert(0, PAGE, shared=True).status == 0
    assert [vm.touch(piece * M2).detail for piece in range(4)] == [1, 2, 2, 2]
    before = machine.statistics.event(Event.SPTE_CLEARED)
    assert gmem.convert(2 * M2, PAGE, shared=True).status == 0
    assert machine.statistics.event(Event.SPTE_CLEARED) - before == 1
    assert [vm.touch(piece * M2) for piece in (1, 3)] == [(W.RET_PF_SPURIOUS, 2)] * 2
    assert machine.check() == 0


def test_allocation_splits_what_is_shared() -> None:
    machine, gmem, vm, process = make()
    assert gmem.convert(M2, 2 * M2, shared=True).status == 0  # nothing is allocated
    assert gauge(machine, Gauge.BLOCKS_PARTLY) == 0
    assert vm.touch(0).detail == 2
    check_folios(machine, gmem, {1, 2})
    assert process.touch(BASE + M2 + PAGE).status == W.VM_FAULT_LOCKED
    assert machine.check() == 0


@pytest.mark.parametrize("merge_zero", ["none", "unzeroed"])
@pytest.mark.parametrize("zero", ["folio", "page"])
def test_zeroing(zero: str, merge_zero: str) -> None:
    """A piece is zeroed at its first use; split and merge neither forget nor repeat that."""
    machine, gmem, vm, process = make(zero=zero, merge_zero=merge_zero)

    def zeroed() -> int:
        events = machine.statistics.event(Event.PAGE_ZEROED), machine.statistics.event(Event.FOLIO_ZEROED_PAGES)
        return sum(events)

    assert gmem.convert(0, PAGE, shared=True).status == 0
    assert vm.touch(M2).detail == 2
    assert zeroed() == 512
    assert process.touch(BASE).status == W.VM_FAULT_LOCKED
    assert zeroed() == 513
    assert gmem.convert(M2, PAGE, shared=True).status == 0
    assert process.touch(BASE + M2).status == W.VM_FAULT_LOCKED
    assert zeroed() == 513
    assert gmem.convert(M2, PAGE, shared=False).status == 0
    assert zeroed() == 513
    assert gmem.convert(0, PAGE, shared=False).status == 0
    assert gauge(machine, Gauge.BLOCKS_HUGE) == 1
    assert zeroed() == (513 if merge_zero == "none" else 1 << 18)
    assert vm.touch(0).detail == 3
    assert zeroed() == 1 << 18
    assert machine.check() == 0


def test_gate_names_the_folio() -> None:
    machine, gmem, vm, _ = make()
    assert gmem.convert(0, PAGE, shared=True).status == 0
    assert vm.touch(0).status == W.RET_PF_FIXED
    held = gmem.get_reference(PAGE).detail
    assert gmem.convert(0, M2, shared=False) == (-W.EAGAIN, PAGE)
    assert gmem.put_reference(held).status == 0
    piece = gmem.get_reference(3 * M2 + 7 * PAGE).detail
    assert machine.folio(piece).refcount == 513
    assert gmem.convert(0, 8 * M2, shared=False) == (-W.EAGAIN, 3 * M2)
    assert gmem.convert(0, M2, shared=False) == (-W.WOULD_SPIN, 3 * M2)  # its piece could merge, the block cannot
    assert gauge(machine, Gauge.BLOCKS_PARTLY) == 1
    assert gauge(machine, Gauge.XARRAY_NODES) == 65 + 8  # order fixup: nothing is stored, or merged
    assert vm.touch(0).detail == 1
    assert gmem.convert(3 * M2 + 7 * PAGE, PAGE, shared=True) == (-W.WOULD_SPIN, 3 * M2)
    assert machine.broken[0] == 0
    assert gmem.put_reference(piece).status == 0  # both conversions are done: a merge, then a split
    assert machine.statistics.event(Event.SPIN_ENDED) == 2
    assert gmem.put_reference(piece).status == -W.ENOENT
    assert gmem.is_shared(3 * M2 + 7 * PAGE)
    assert gmem.convert(3 * M2 + 7 * PAGE, PAGE, shared=False).status == 0
    assert gmem.convert(0, PAGE, shared=True).status == gmem.convert(0, PAGE, shared=False).status == 0
    assert gauge(machine, Gauge.BLOCKS_HUGE) == 1
    assert machine.check() == 0


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("split_form", SPLIT_FORMS)
def test_without_memory(kernel: str, split_form: str) -> None:
    """1G -> 2M needs 4095 frames and the nodes', 2M -> 4K seven and two; what was split stays, and can be freed."""
    machine, gmem, vm, _ = make(kernel=kernel, split_form=split_form)
    assert vm.touch(0).detail == 3
    leave_frames(machine, 4095)
    assert gmem.convert(0, PAGE, shared=True) == (-W.ENOMEM, 0)
    assert gauge(machine, Gauge.BLOCKS_HUGE) == 1
    assert gauge(machine, Gauge.XARRAY_NODES) == 0
    leave_frames(machine, 5000)
    assert gmem.convert(0, PAGE, shared=True).status == 0
    check_folios(machine, gmem, {0})
    leave_frames(machine, 7 + 2 + 3)  # enough for one piece more
    assert gmem.convert(M2, 2 * M2, shared=True) == (-W.ENOMEM, 2 * M2)
    check_folios(machine, gmem, {0, 1})
    assert machine.check() == 0
    leave_frames(machine, 1)  # of the attributes' nodes
    assert gmem.convert(0, M2, shared=False) == (0, 0)  # all private: both pieces merge, the block waits
    assert gauge(machine, Gauge.BLOCKS_PARTLY) == 1
    assert gauge(machine, Gauge.XARRAY_NODES) == 65
    assert machine.check() == 0
    free = gauge(machine, Gauge.FRAMES_USED)
    assert gmem.punch_hole(0, G1).status == 0  # the vmemmap is folded: no frame is needed, 511 and more come back
    assert gauge(machine, Gauge.POOL_FREE) == 1
    assert free - gauge(machine, Gauge.FRAMES_USED) >= 511
    assert machine.check() == 0
    assert vm.touch(0).detail == 3
    leave_frames(machine, 6000)
    assert gmem.convert(0, PAGE, shared=True).status == 0
    check_folios(machine, gmem, {0})
    assert machine.check() == 0


@pytest.mark.parametrize("split_form", SPLIT_FORMS)
def test_end_of_life(split_form: str) -> None:
    """A hole over a held piece is refused; a closed inode's block is a zombie until its last folio is put."""
    machine, gmem, vm, process = make(2, split_form=split_form)
    assert vm.touch(0).detail == vm.touch(G1).detail == 3
    assert gmem.convert(G1, PAGE, shared=True).status == 0
    assert process.touch(BASE + G1).status == W.VM_FAULT_LOCKED
    piece = gmem.get_reference(G1 + M2).detail
    assert gmem.punch_hole(0, 2 * G1) == (-W.EAGAIN, G1)
    assert gauge(machine, Gauge.POOL_FREE) == 1
    assert gauge(machine, Gauge.BLOCKS_PARTLY) == 1
    page = gmem.get_reference(G1).detail
    assert machine.check() == 0
    assert gmem.close().status == 0
    assert gauge(machine, Gauge.BLOCKS_ZOMBIE) == 1
    assert machine.check() == 0
    assert gmem.put_reference(page).status == 0
    assert gauge(machine, Gauge.BLOCKS_ZOMBIE) == 1
    assert gmem.put_reference(piece).status == 0
    assert gauge(machine, Gauge.BLOCKS_ZOMBIE) == 0
    assert gauge(machine, Gauge.POOL_FREE) == 2
    assert gauge(machine, Gauge.XARRAY_NODES) == 0
    assert machine.check() == 0


@pytest.mark.parametrize("seed", range(2))
def test_random(seed: int) -> None:
    """Conversions of 4K to 4M and faults: the pieces split are those with shared pages, the levels follow."""
    chance = random.Random(seed)
    machine, gmem, vm, process = make(
        split_form=SPLIT_FORMS[seed], kernel=KERNELS[seed + 1], zero=("folio", "page")[seed]
    )
    shared: set[int] = set()
    assert vm.touch(0).detail == 3
    pages = [piece * 512 + page for piece in (0, 1, 2, 511) for page in (0, 1, 77, 511)]
    for step in range(150):
        first = chance.choice(pages)
        if chance.random() < 0.4:
            length = min(chance.choice([1, 1, 3, 512, 1024]), (1 << 18) - first)
            share = chance.random() < 0.4
            assert gmem.convert(first * PAGE, length * PAGE, shared=share) == (0, 0)
            pages_of = range(first, first + length)
            shared = shared.union(pages_of) if share else shared.difference(pages_of)
        elif chance.random() < 0.5:
            status = process.touch(BASE + first * PAGE).status
            assert status in ((0, W.VM_FAULT_LOCKED) if first in shared else (W.VM_FAULT_SIGBUS,))
        else:
            found = vm.touch(first * PAGE)
            split = {page >> 9 for page in shared}
            level = 3 if not shared else 1 if first >> 9 in split else 2
            assert found.detail == level if found.status == W.RET_PF_FIXED else found.detail <= level
        split = {page >> 9 for page in shared}
        assert gauge(machine, Gauge.BLOCKS_PARTLY) == (1 if shared else 0)
        assert gauge(machine, Gauge.XARRAY_NODES) == (65 + 8 * len(split) if shared else 0)
        assert machine.broken[0] == 0, (step, machine.broken)
        if step % 25 == 0:
            assert machine.check() == 0, machine.broken
    if shared:
        assert gmem.convert(0, G1, shared=False) == (0, 0)
    assert gauge(machine, Gauge.BLOCKS_HUGE) == 1
    assert machine.check() == 0


def test_determinism() -> None:
    """The same operations leave the same memory."""
    images = []
    for _ in range(2):
        machine, gmem, vm, _ = make()
        for index in (0, 5, 700):
            assert vm.touch(index * PAGE).status >= 0
            assert gmem.convert(index * PAGE, PAGE, shared=True).status == 0
        images.append(machine.arrays.state.copy())
    assert np.array_equal(*images)
