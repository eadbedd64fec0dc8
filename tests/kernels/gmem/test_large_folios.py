"""Large folios of the page allocator under 4K guest_memfd (Config.large_folios); mappings as merged beside pfnmap's."""

from __future__ import annotations

import random
from typing import Any

import pytest

from pgemu.machine.presets import PFNMAP
from pgemu.objects.machine import Config, Machine, Result
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Gauge
from pgemu_kernels.words.operations import Operation

PAGE, M2 = W.PAGE_4K, W.PAGE_2M
VA, OTHER = 0x7F00_0000_0000, 0x7F80_0000_0000
GPA = 1 << 32
NOPAGE = W.VM_FAULT_NOPAGE


class Scene:
    """One shared inode of 2M and more, mapped by a process and bound to its VM."""

    def __init__(self, pages: int = 4 * 512, preset: str = "corrected", **more: Any) -> None:
        fields: dict[str, Any] = {"pool": 8 * M2, "large_folios": True, "host_huge": True, **more}
        self.machine = Machine(Config("pfnmap", page_size=PAGE, defects=PFNMAP[preset].defects, **fields))
        self.gmem = self.machine.create_guest_memfd(pages * PAGE, shared=True)
        self.process = self.machine.create_process()
        self.vm = self.machine.create_vm(self.process, protected=True)
        assert self.vm.bind(self.gmem, GPA).status == 0
        assert self.process.mmap(self.gmem, VA).status == 0

    def touch(self, page: int, *, write: bool = False, at: int = VA) -> Result:
        return self.process.touch(at + page * PAGE, write=write)

    def entry(self, page: int, at: int = VA) -> tuple[int, int]:
        """Level and flags of an entry; (level, 0) for none."""
        level, _, entry = self.process.walk(at + page * PAGE)[-1]
        return level, entry & ~0xF_FFFF_FFFF_F000

    def orders(self, pages: range) -> list[tuple[int, int]]:
        """(first page, order) of each folio in a range of pages of the inode, read off the struct pages."""
        found: list[tuple[int, int]] = []
        page = pages.start
        while page < pages.stop:
            pfn = self.gmem.pfn(page * PAGE)
            if pfn is None:
                page += 1
                continue
            words = [int(word) for word in self.machine.struct_page(pfn)]
            order = int(self.machine.struct_page(pfn + 1)[0]) & 0xFF if words[0] & 1 << 6 else 0
            assert words[3:7] == [0xFFFF_8880_0000_1000, page, 0, 1 << order + 32 | 0xFFFF_FFFF]
            for tail in range(1, 1 << order):
                link = int(self.machine.struct_page(pfn + tail)[1])
                assert link == (1 << 64) - (64 << order) | 1
                assert self.gmem.pfn((page + tail) * PAGE) == pfn + tail
            found.append((page, order))
            page += 1 << order
        return found

    def sound(self) -> None:
        assert self.machine.check() == 0, self.machine.broken


# --------------------------------------------------------------------------- allocation and levels


def test_a_fault_takes_2m_and_maps_it_whole() -> None:
    s = Scene()
    assert s.touch(700, write=True) == (NOPAGE, 2)
    assert s.entry(512) == (2, 0x8000_0000_0000_0AE7)  # as captured
    assert s.touch(0) == (NOPAGE, 2)
    assert s.entry(0) == (2, 0x8000_0000_0000_02A7)
    assert s.orders(range(2048)) == [(0, 9), (512, 9)]
    assert s.vm.touch(GPA + 3 * PAGE) == (W.RET_PF_FIXED, 2)
    assert s.machine.statistics.gauge(Gauge.POOL_FREE) == 6 * 512
    s.sound()


def test_without_large_entries_of_processes_a_large_folio_is_mapped_by_4k() -> None:
    s = Scene(host_huge=False)
    assert s.touch(5) == (NOPAGE, 1)
    assert s.orders(range(2048)) == [(0, 9)]
    assert s.vm.touch(GPA) == (W.RET_PF_FIXED, 2)
    s.sound()


def test_the_end_of_the_file_and_what_is_in_the_way_are_4k() -> None:
    s = Scene(pages=512 + 300)
    assert s.touch(600) == (NOPAGE, 1)
    assert s.orders(range(812)) == [(600, 0)]
    assert s.touch(0) == (NOPAGE, 2)
    assert s.gmem.punch_hole(PAGE, PAGE).status == 0  # the folio is split now
    assert s.touch(1) == (NOPAGE, 1)
    assert (1, 0) in s.orders(range(512))
    s.sound()


def test_without_a_block_of_2m_pages_come_one_by_one() -> None:
    s = Scene(pages=1024, pool=2 * M2)
    other = s.machine.create_guest_memfd(600 * PAGE, shared=True)
    assert s.process.mmap(other, OTHER).status == 0
    assert s.touch(0, at=OTHER) == (NOPAGE, 2)
    assert s.touch(599, at=OTHER) == (NOPAGE, 1)
    assert s.touch(0) == (NOPAGE, 1)
    s.sound()


def test_fallocate_and_private_pages() -> None:
    s = Scene()
    assert s.gmem.allocate(0, 2 * M2).status == 0
    assert s.orders(range(2048)) == [(0, 9), (512, 9)]
    assert s.touch(0) == (NOPAGE, 2)
    assert s.gmem.convert(7 * PAGE, PAGE, shared=False).status == 0
    assert s.entry(7)[1] == 0  # the large entry is gone
    assert s.touch(8) == (NOPAGE, 1)
    assert s.touch(7).status == W.VM_FAULT_SIGBUS
    assert s.vm.touch(GPA + 8 * PAGE) == (W.RET_PF_FIXED, 1)  # both kinds in the block
    assert s.orders(range(512)) == [(0, 9)]  # the folio stays whole
    s.sound()


def test_who_comes_second_in_a_block_finds_the_first_ones_folio() -> None:
    s = Scene()
    for actor, page in ((1, 3), (2, 400)):
        s.machine.begin(actor, Operation.HOST_FAULT, address=VA + page * PAGE)
        assert [s.machine.step(actor) for _ in range(3)] == [W.GO] * 3  # begin, look up, take
    for actor in (1, 2):
        while s.machine.step(actor) == W.GO:
            pass
        assert s.machine.result(actor) == (NOPAGE, 2)
    assert s.orders(range(2048)) == [(0, 9)]
    assert s.machine.statistics.gauge(Gauge.POOL_FREE) == 7 * 512
    s.sound()


# --------------------------------------------------------------------------- holes


def halves(first: int, order: int, at: int) -> list[tuple[int, int]]:
    """What is left of a folio that is split at a page: halves, quarters, ... as far as that page."""
    if order == 0:
        return [(first, 0)]
    middle = first + (1 << order - 1)
    low, high = [(first, order - 1)], [(middle, order - 1)]
    return halves(first, order - 1, at) + high if at < middle else low + halves(middle, order - 1, at)


def holed(folios: list[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    """mm/truncate.c:truncate_inode_pages_range() on a list of folios: those at the ends of it are split, and all that
    lies within goes.
    """
    found: list[tuple[int, int]] = []
    for first, order in folios:
        last = first + (1 << order)
        low, high = max(start, first), min(end, last)
        if low >= high or (low, high) == (first, last):
            found.append((first, order))
            continue
        for piece, smaller in halves(first, order, low):
            there = piece <= high < piece + (1 << smaller)
            found += halves(piece, smaller, high) if there else [(piece, smaller)]
    return [(first, order) for first, order in found if first < start or first + (1 << order) > end]


HOLES = [(0, 16), (256, 512), (0, 256), (100, 101), (511, 512), (3, 509), (300, 700)]


@pytest.mark.parametrize(("start", "end"), HOLES)
def test_a_hole_splits_by_halves(start: int, end: int) -> None:
    s = Scene()
    s.touch(0)
    s.touch(512)
    assert s.gmem.punch_hole(start * PAGE, (end - start) * PAGE).status == 0
    assert s.orders(range(1024)) == holed([(0, 9), (512, 9)], start, end)
    s.sound()


def test_random_holes_lose_nothing() -> None:
    s = Scene(pool=100 * M2)  # pieces that were freed seldom become a block again
    choose = random.Random(7)
    folios: list[tuple[int, int]] = []
    for step in range(120):
        page = choose.randrange(2048)
        if choose.random() < 0.6:
            present = {p for f, o in folios for p in range(f, f + (1 << o))}
            block = set(range(page & ~511, (page & ~511) + 512))
            if page not in present:
                folios = sorted([*folios, (page, 0) if block & present else (page & ~511, 9)])
            assert s.touch(page).status in (0, NOPAGE)
        else:
            end = min(2048, page + choose.choice([1, 8, 100, 512, 700]))
            assert s.gmem.punch_hole(page * PAGE, (end - page) * PAGE).status == 0
            folios = holed(folios, page, end)
        assert s.orders(range(2048)) == folios
        if step % 10 == 0:
            s.sound()
    assert s.gmem.close().status == 0
    assert s.machine.statistics.gauge(Gauge.POOL_FREE) == 100 * 512
    s.sound()


def test_a_held_folio_is_not_split_and_goes_with_its_last_reference() -> None:
    s = Scene()
    s.touch(0)
    held = s.gmem.get_reference(9 * PAGE)
    assert held.status == 0
    assert s.gmem.punch_hole(4 * PAGE, 8 * PAGE).status == 0
    assert s.gmem.pfn(5 * PAGE) is not None  # can_split_folio()
    assert s.gmem.punch_hole(0, M2).status == 0
    assert s.gmem.pfn(5 * PAGE) is None
    assert s.machine.statistics.gauge(Gauge.POOL_FREE) == 7 * 512
    assert s.gmem.put_reference(held.detail).status == 0
    assert s.machine.statistics.gauge(Gauge.POOL_FREE) == 8 * 512
    s.sound()


def test_a_split_drops_the_entry_of_one_mapping_of_slides2025() -> None:
    s = Scene(preset="slides2025")
    assert s.process.mmap(s.gmem, OTHER).status == 0
    for at in (VA, OTHER):
        assert s.touch(0, write=True, at=at) == (NOPAGE, 2)
    assert s.gmem.punch_hole(0, PAGE).status == 0
    assert sorted([s.entry(1, VA)[1], s.entry(1, OTHER)[1]]) == [0, 0x8000_0000_0000_0AE7]
    s = Scene()
    assert s.process.mmap(s.gmem, OTHER).status == 0
    for at in (VA, OTHER):
        assert s.touch(0, write=True, at=at) == (NOPAGE, 2)
    assert s.gmem.punch_hole(0, PAGE).status == 0
    assert [s.entry(1, VA)[1], s.entry(1, OTHER)[1]] == [0, 0]
    s.sound()


def test_what_is_refused() -> None:
    for fields in ({"page_size": M2}, {"design": "restructure"}):
        given: dict[str, Any] = {"design": "pfnmap", "page_size": PAGE, "pool": M2, "large_folios": True, **fields}
        with pytest.raises(ValueError, match="large_folios"):
            Config(**given)


# --------------------------------------------------------------------------- mapped as merged, beside pfnmap


@pytest.mark.parametrize("preset", ["corrected", "slides2025"])
def test_one_file_mapped_both_ways(preset: str) -> None:
    s = Scene(pages=64, preset=preset, large_folios=False, host_huge=False)
    assert s.process.mmap(s.gmem, OTHER, counted=True).status == 0
    assert s.touch(0) == (NOPAGE, 1)
    assert s.touch(0, write=True, at=OTHER) == (W.VM_FAULT_LOCKED, 1)
    assert [s.entry(0), s.entry(0, OTHER)] == [(1, 0x8000_0000_0000_0227), (1, 0x8000_0000_0000_0867)]
    pfn = s.gmem.pfn(0)
    assert pfn is not None
    assert int(s.machine.struct_page(pfn)[6]) == 2 << 32  # the page cache, one entry; mapcount 0 + 1
    assert s.process.rss == 1
    assert s.process.pin(VA, PAGE, pin=0).status == -W.EFAULT
    assert s.process.pin(OTHER, PAGE, pin=0) == (0, 1)
    assert s.machine.unpin(0).status == 0
    s.sound()
    assert s.gmem.punch_hole(0, PAGE).status == 0  # mapped, so that truncation walks the file's mappings
    assert [s.entry(0)[1], s.entry(0, OTHER)[1]] == [0, 0]
    s.sound()
    assert s.touch(1).status == NOPAGE
    assert s.gmem.punch_hole(PAGE, PAGE).status == 0
    assert (s.entry(1)[1] != 0) == (preset == "slides2025")


def test_an_ordinary_mapping_is_asked_for_in_either_design() -> None:
    machine = Machine(Config("restructure", pool=M2, page_size=PAGE))
    gmem, process = machine.create_guest_memfd(4 * PAGE, shared=True), machine.create_process()
    assert process.mmap(gmem, VA, counted=True).status == 0
    assert process.touch(VA) == (W.VM_FAULT_LOCKED, 1)
    assert machine.check() == 0
