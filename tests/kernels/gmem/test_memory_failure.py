"""Memory failure of guest_memfd's pages, by the path that the kernel takes for each: mm/memory-failure.c.

What 4K folios and folios of 2M of the page allocator do was captured (tests/oracle); here each path is tried alone, the
huge pages of HugeTLB among them, of which nobody has said what happens: there both outcomes are tried.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from pgemu.machine.designs import DESIGNS
from pgemu.objects.failures import MfPage, MfResult, Signal
from pgemu.objects.machine import Config, Machine
from pgemu_kernels import words as W
from pgemu_kernels.words.operations import Flag, Operation

PAGE, M2 = W.PAGE_4K, W.PAGE_2M
VA = 0x7F00_0000_0000
HWPOISON = 1 << 21  # PG_hwpoison of 7.3
A, B = 1, 2  # actors


class Scene:
    """A file, mapped by a process and bound to its VM. `shared`: all of it."""

    def __init__(self, design: str, page_size: int = PAGE, *, shared: bool = True, **parameters: Any) -> None:
        if design == "restructure" and page_size == PAGE:
            parameters.setdefault("order", "next4k")
        pages = 2 if page_size > M2 else 8
        config = Config(design, pool=pages * max(page_size, M2), page_size=page_size, **parameters)  # type: ignore[arg-type]
        self.machine = Machine(config)
        self.gmem = self.machine.create_guest_memfd(pages // 2 * max(page_size, M2), shared=shared)
        self.process = self.machine.create_process()
        self.vm = self.machine.create_vm(self.process, protected=True)
        assert self.process.mmap(self.gmem, VA).status == 0
        assert self.vm.bind(self.gmem, 0).status == 0

    def entry(self, page: int = 0) -> int:
        return self.process.walk(VA + page * PAGE)[-1][2]

    def pfn(self, page: int = 0) -> int:
        pfn = self.gmem.pfn(page * PAGE)
        assert pfn is not None
        return pfn

    def flags(self, pfn: int) -> int:
        return int(self.machine.struct_page(pfn)[0])

    def sound(self) -> None:
        assert self.machine.check() == 0, self.machine.broken


# --------------------------------------------------------------------------- 4K folios


def test_a_counted_page_is_unmapped_everywhere() -> None:
    """As captured ("plain"): -EBUSY, the entry says that the page is bad, the leaf goes, the file keeps the page."""
    s = Scene("restructure")
    s.process.touch(VA, write=True)
    s.vm.touch(0)
    pfn = s.pfn()
    assert int(s.machine.struct_page(pfn)[6]) == 2 << 32  # page cache and entry; mapcount 1
    done = s.gmem.memory_failure(0)
    assert done[:7] == (-W.EBUSY, pfn, MfResult.FAILED, MfPage.DIRTY_UNEVICTABLE_LRU, 1, 0, 1)
    # SWP_HWPOISON is 24; the offset, from bit 9 on, is the inverted frame number.
    assert s.entry() == 24 << 59 | ~(pfn << 9) & (1 << 59) - (1 << 9)
    assert int(s.machine.struct_page(pfn)[6]) == 2 << 32 | 0xFFFF_FFFF  # page cache and memory failure
    assert s.flags(pfn) & HWPOISON
    assert s.pfn() == pfn
    assert s.process.touch(VA).code.name == "HWPOISON"  # type: ignore[union-attr]
    assert s.vm.touch(0).name == "-EHWPOISON"
    assert s.process.pin(VA, PAGE, pin=0).status == -W.EFAULT
    assert s.process.touch(VA + PAGE).status == W.VM_FAULT_LOCKED  # its neighbour is good
    assert s.machine.poisoned_pages == 1
    s.sound()


def test_an_entry_that_nobody_counts_stays() -> None:
    """As captured ("pfnmap"): the process goes on with the bad page, only stage 2 loses it."""
    s = Scene("pfnmap")
    s.process.touch(VA, write=True)
    s.vm.touch(0)
    before = s.entry()
    done = s.gmem.memory_failure(0, early_kill=True)
    assert (done.status, done.replaced, done.stage2_dropped, done.signals) == (-W.EBUSY, 0, 1, ())
    assert s.entry() == before
    assert s.process.touch(VA, write=True).status == 0
    assert s.vm.touch(0).status == -W.EHWPOISON
    assert s.process.fork().touch(VA).status == 0  # the child has a copy of it
    assert s.process.munmap(VA, PAGE).status == 0
    assert s.process.mmap(s.gmem, VA, length=PAGE).status == 0
    assert s.process.touch(VA).status == W.VM_FAULT_NOPAGE  # vmf_insert_pfn() does not look
    s.sound()


@pytest.mark.parametrize("design", DESIGNS)
def test_a_hole_does_not_free_a_poisoned_page(design: str) -> None:
    """It is memory failure's, until it is unpoisoned."""
    s = Scene(design)
    s.process.touch(VA, write=True)
    pfn = s.pfn()
    s.gmem.memory_failure(0)
    assert s.machine.unpoison(pfn << 12).status == -W.EBUSY
    assert s.gmem.punch_hole(0, PAGE).status == 0
    assert int(s.machine.struct_page(pfn)[6]) == 1 << 32 | 0xFFFF_FFFF
    s.process.touch(VA)
    assert s.gmem.pfn(0) in (None, *range(pfn), *range(pfn + 1, pfn + 4096))
    assert s.machine.unpoison(pfn << 12).status == 0
    assert s.machine.unpoison(pfn << 12).status == -W.EBUSY  # it is good already
    assert s.machine.poisoned_pages == 0
    s.sound()


def test_only_dontneed_and_munmap_drop_the_entry_of_a_bad_page() -> None:
    """A hole leaves it, as captured: should_zap_cows()."""
    s = Scene("restructure")
    for page in range(3):
        s.process.touch(VA + page * PAGE, write=True)
        s.gmem.memory_failure(page * PAGE)
    assert s.gmem.punch_hole(0, PAGE).status == 0
    assert s.entry(0) >> 59 == 24
    assert s.process.madvise_dontneed(VA, 2 * PAGE).status == 0
    assert s.entry(0) == s.entry(1) == 0
    assert s.process.touch(VA).status == W.VM_FAULT_LOCKED  # a new page
    assert s.process.touch(VA + PAGE).status == W.VM_FAULT_HWPOISON  # the file's is the bad one
    assert s.process.munmap(VA + 2 * PAGE, PAGE).status == 0
    assert s.entry(2) == 0
    s.sound()


def test_what_was_in_use_elsewhere_is_told_early_if_the_policy_says_so() -> None:
    """collect_procs_file(): whoever has a VMA over a dirty page, whether or not it mapped it."""
    s = Scene("restructure")
    other = s.machine.create_process()
    assert other.mmap(s.gmem, VA + M2).status == 0
    s.process.touch(VA, write=True)
    assert s.gmem.memory_failure(0, early_kill=True).signals == (
        Signal(s.process.space, VA, 5, 12),
        Signal(other.space, VA + M2, 5, 12),
    )
    s.process.touch(VA + PAGE)  # clean
    assert s.gmem.memory_failure(PAGE, early_kill=True).signals == ()
    s.sound()


def test_the_process_that_meets_an_error_is_told_at_once() -> None:
    s = Scene("restructure")
    s.process.touch(VA, write=True)
    assert s.process.madvise_hwpoison(VA, PAGE).status == -W.EBUSY
    assert s.machine.last_failure.signals == (Signal(s.process.space, VA, 4, 12),)
    assert s.process.madvise_hwpoison(VA, PAGE).status == -W.EFAULT  # GUP gets no page
    assert Scene("pfnmap").process.madvise_hwpoison(VA, PAGE).status == -W.EFAULT
    assert Scene("pfnmap").process.madvise_soft_offline(VA, PAGE).status == -W.EFAULT
    assert s.process.madvise_soft_offline(VA + PAGE, PAGE).status == -W.EBUSY
    assert s.process.madvise_hwpoison(VA + 1, PAGE).status == -W.EINVAL
    assert s.process.madvise_hwpoison(0x1000, PAGE).status == -W.EFAULT


@pytest.mark.parametrize("held", [False, True])
def test_delayed_is_no_failure_from_v6_on(held: bool) -> None:
    """Unless somebody has a reference: has_extra_refcount()."""
    s = Scene("restructure", mf_delayed=True)
    s.process.touch(VA, write=True)
    if held:
        s.gmem.get_reference(0)
    done = s.gmem.memory_failure(0)
    assert (done.status, done.action) == ((-W.EBUSY, MfResult.FAILED) if held else (0, MfResult.DELAYED))
    s.sound()


@pytest.mark.parametrize("design", DESIGNS)
def test_a_page_that_is_bad_already(design: str) -> None:
    s = Scene(design)
    s.process.touch(VA)
    s.gmem.memory_failure(0)
    again = s.gmem.memory_failure(0)
    assert (again.status, again.action, again.page) == (-W.EHWPOISON, MfResult.NONE, None)
    assert s.gmem.memory_failure(PAGE).status == -W.ENOENT
    assert s.gmem.memory_failure(4 * M2).status == -W.EINVAL
    s.gmem.close()
    assert s.gmem.memory_failure(0).status == -W.EBADF


def test_the_file_of_a_bad_page_closes() -> None:
    s = Scene("restructure")
    s.process.touch(VA)
    pfn = s.pfn()
    s.gmem.memory_failure(0)
    s.gmem.close()
    s.sound()
    assert s.machine.memory_failure(pfn << 12).status == -W.EHWPOISON
    assert s.machine.unpoison(pfn << 12).status == 0
    s.sound()


def test_free_pages_are_taken_out() -> None:
    """take_page_off_buddy(): of every order, those around stay free."""
    s = Scene("restructure")
    s.process.touch(VA)
    first = s.pfn()
    free = s.machine.statistics.gauge(W.Gauge.POOL_FREE)
    bad = [first + 1, first + 2, first + 300, first + 512 * 3 + 77]
    for n, pfn in enumerate(bad, 1):
        done = s.machine.memory_failure(pfn << 12)
        assert (done.status, done.page) == (0, MfPage.BUDDY)
        assert s.machine.statistics.gauge(W.Gauge.POOL_FREE) == free - n
        s.sound()
    assert s.gmem.allocate(0, 4 * M2).status == 0
    assert {s.pfn(page) for page in range(4 * 512)}.isdisjoint(bad)
    for pfn in bad:
        assert s.machine.unpoison(pfn << 12).status == 0
    s.sound()
    assert s.machine.statistics.gauge(W.Gauge.POOL_FREE) == free - (4 * 512 - 1)


def test_a_hardware_error_is_for_good() -> None:
    s = Scene("restructure")
    s.process.touch(VA)
    pfn = s.pfn()
    s.gmem.memory_failure(0, hardware=True)
    s.gmem.punch_hole(0, PAGE)
    assert s.machine.unpoison(pfn << 12).status == -W.EOPNOTSUPP


@pytest.mark.parametrize(("kernel", "status"), [("6.12", -W.ENXIO), ("6.18", -W.ENXIO), ("7.3", -W.EBUSY)])
def test_where_no_memory_is(kernel: str, status: int) -> None:
    s = Scene("restructure", kernel=kernel)
    done = s.machine.memory_failure(1 << 50)
    assert (done.status, done.page) == (status, MfPage.PFN_MAP if kernel == "7.3" else None)
    assert s.machine.unpoison(1 << 50).status == -W.ENXIO


def test_without_the_configuration_nothing_fails() -> None:
    s = Scene("restructure", configuration="small")
    s.process.touch(VA)
    assert s.gmem.memory_failure(0).status == -W.EOPNOTSUPP
    assert s.process.touch(VA).status == 0


# --------------------------------------------------------------------------- folios of 2M of the page allocator


def large() -> Scene:
    s = Scene("pfnmap", large_folios=True, host_huge=True)
    assert s.process.touch(VA, write=True).detail == 2
    assert s.vm.touch(0).detail == 2
    return s


def test_a_large_folio_is_split_first() -> None:
    """As captured: the 2M entry goes, one page is poisoned, and the next load maps it again."""
    s = large()
    pfn = s.pfn(7)
    done = s.gmem.memory_failure(7 * PAGE)
    assert (done.status, done.page, done.dropped, done.stage2_dropped) == (
        -W.EBUSY, MfPage.CLEAN_UNEVICTABLE_LRU if not s.flags(pfn) >> 4 & 1 else MfPage.DIRTY_UNEVICTABLE_LRU, 1, 1,
    )  # fmt: skip
    assert [page for page in range(512) if s.flags(s.pfn(page)) & HWPOISON] == [7]
    assert s.process.touch(VA + 7 * PAGE) == (W.VM_FAULT_NOPAGE, 1)
    assert s.vm.touch(7 * PAGE).status == -W.EHWPOISON
    assert s.vm.touch(8 * PAGE) == (W.RET_PF_FIXED, 1)
    s.sound()


def test_a_large_folio_that_somebody_holds_is_not_split() -> None:
    """kill_procs_now() and -EHWPOISON, since 6.11."""
    s = large()
    s.gmem.get_reference(0)
    done = s.gmem.memory_failure(7 * PAGE)
    assert (done.status, done.action, done.page) == (-W.EHWPOISON, MfResult.FAILED, MfPage.UNSPLIT_THP)
    assert s.vm.touch(7 * PAGE).status == W.RET_PF_SPURIOUS  # the leaf stays
    s.sound()


# --------------------------------------------------------------------------- huge pages


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("handled", [True, False])
def test_one_bad_page_of_a_whole_huge_page(design: str, handled: bool) -> None:
    """All of it is poisoned. Handled, stage 2 loses all of it; only marked, a leaf that is there stays."""
    s = Scene(design, M2, shared=False, memory_failure="handled" if handled else "marked")
    assert s.vm.touch(0).detail == 2
    done = s.gmem.memory_failure(5 * PAGE)
    assert (done.status, done.action, done.page, done.stage2_dropped) == (
        (-W.EBUSY, MfResult.FAILED, MfPage.HUGE, 1) if handled else (-W.EBUSY, MfResult.IGNORED, MfPage.GET_HWPOISON, 0)
    )
    assert s.machine.folio(s.pfn()).poisoned_pages == [s.pfn(5)]
    assert s.vm.touch(9 * PAGE).status == (-W.EHWPOISON if handled else W.RET_PF_SPURIOUS)
    again = s.gmem.memory_failure(6 * PAGE)
    assert again.status == -W.EHWPOISON
    assert s.machine.folio(s.pfn()).poisoned_pages == [s.pfn(5), s.pfn(6)]
    assert s.vm.unbind(0).status == 0
    assert s.vm.bind(s.gmem, 0).status == 0
    assert s.vm.touch(9 * PAGE).status == -W.EHWPOISON
    assert s.vm.touch(M2).detail == 2
    s.sound()


def test_the_host_goes_on_in_a_poisoned_huge_page() -> None:
    """pfnmap: 512 pages are lost to the guest, none to the process."""
    s = Scene("pfnmap", M2, host_huge=True)
    assert s.process.touch(VA, write=True).detail == 2
    s.gmem.memory_failure(5 * PAGE)
    assert s.process.touch(VA + 5 * PAGE, write=True) == (0, 2)
    assert s.vm.touch(0).status == -W.EHWPOISON
    s.sound()


@pytest.mark.parametrize("handled", [True, False])
def test_a_bad_piece_of_a_split_huge_page(handled: bool) -> None:
    """A piece is a 4K folio. RFC v2 keeps pieces off the LRU lists, and what is in none is only marked."""
    s = Scene("restructure", M2, memory_failure="handled" if handled else "marked")
    for page in (0, 1):
        s.process.touch(VA + page * PAGE, write=True)
        s.vm.touch(page * PAGE)
    done = s.gmem.memory_failure(PAGE)
    if handled:
        assert (done.status, done.action, done.replaced, done.stage2_dropped) == (-W.EBUSY, MfResult.FAILED, 1, 1)
        assert s.process.touch(VA + PAGE).status == W.VM_FAULT_HWPOISON
        assert s.vm.touch(PAGE).status == -W.EHWPOISON
    else:
        assert (done.status, done.action, done.page) == (-W.EBUSY, MfResult.IGNORED, MfPage.GET_HWPOISON)
        assert (done.replaced, done.stage2_dropped) == (0, 0)
        assert s.process.touch(VA + PAGE).status == 0
        assert s.vm.touch(PAGE).status == W.RET_PF_SPURIOUS
        s.process.madvise_dontneed(VA + PAGE, PAGE)  # which KVM hears of
        assert s.process.touch(VA + PAGE).status == W.VM_FAULT_HWPOISON
        assert s.vm.touch(PAGE).status == -W.EHWPOISON
    assert s.process.touch(VA).status == 0
    assert s.vm.touch(0).status == W.RET_PF_SPURIOUS
    s.sound()


def test_a_bad_piece_cannot_become_private() -> None:
    """The gate meets memory failure's reference like any other; until the page is unpoisoned, which it cannot be."""
    s = Scene("restructure", M2)
    s.process.touch(VA + PAGE, write=True)
    s.gmem.memory_failure(PAGE)
    assert s.gmem.convert(PAGE, PAGE, shared=False) == (-W.EAGAIN, PAGE)
    assert s.gmem.convert(2 * PAGE, PAGE, shared=False).status == 0
    assert s.gmem.punch_hole(0, M2).status == -W.EAGAIN  # the block cannot be merged
    assert s.machine.unpoison(s.pfn(1) << 12).status == -W.EBUSY
    s.sound()


@pytest.mark.parametrize("split_form", ["rfc2", "jan2026"])
@pytest.mark.parametrize("moves", [False, True])
def test_a_poisoned_huge_page_that_is_to_be_split(moves: bool, split_form: str) -> None:
    """Refused, before anything is done; or the poison goes with its page."""
    blocks = "move" if moves else "refuse"
    s = Scene("restructure", M2, shared=False, memory_failure="marked", poisoned_blocks=blocks, split_form=split_form)
    s.vm.touch(0)
    s.gmem.memory_failure(5 * PAGE)
    result = s.gmem.convert(0, PAGE, shared=True)
    if not moves:
        assert (result.status, result.detail) == (-W.EHWPOISON, 0)
        assert s.vm.touch(0).status == W.RET_PF_SPURIOUS
    else:
        assert result.status == 0
        assert [page for page in range(512) if s.flags(s.pfn(page)) & HWPOISON] == [5]
        assert s.vm.touch(4 * PAGE).status == W.RET_PF_FIXED
        assert s.vm.touch(5 * PAGE).status == -W.EHWPOISON
        assert s.gmem.convert(0, PAGE, shared=False).status == 0  # and back
        assert s.machine.folio(s.pfn()).poisoned_pages == [s.pfn(5)]
        assert s.vm.touch(9 * PAGE).status in (-W.EHWPOISON, W.RET_PF_SPURIOUS)
    s.sound()


def order_at(s: Scene, index: int) -> int:
    """The order of the folio of a page, by the levels that exist of its block."""
    for order in (18, 9):
        if s.machine.folio(s.pfn(index >> order << order)).order == order:
            return order
    return 0


@pytest.mark.parametrize("split_form", ["rfc2", "jan2026"])
@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(bad=st.sets(st.sampled_from((0, 3, 511, 600, 1024, 262143)), min_size=1, max_size=3), data=st.data())
def test_poison_stays_where_it_was_through_pieces(split_form: str, bad: set[int], data: st.DataObject) -> None:
    """A 1G page goes to 2M and 4K and back: what is bad is what is noted, and what has it."""
    s = Scene(
        "restructure", 1 << 30, shared=False, memory_failure="marked", poisoned_blocks="move",
        split_form=split_form, split_to="2M",
    )  # fmt: skip
    s.vm.touch(0)
    for page in bad:
        s.gmem.memory_failure(page * PAGE)
    for _ in range(4):
        page = data.draw(st.sampled_from((1, 512, 700, 2000, 262100)))
        pages = data.draw(st.sampled_from((1, 3, 512, 1500)))
        shared = data.draw(st.booleans())
        s.gmem.convert(page * PAGE, min(pages, 262144 - page) * PAGE, shared=shared)
        for index in (0, 3, 4, 511, 512, 600, 601, 1024, 1536, 262143, 262100):
            order = order_at(s, index)
            head = index >> order << order
            assert bool(s.flags(s.pfn(head)) & HWPOISON) == bool(bad & {*range(head, head + (1 << order))}), index
    s.gmem.convert(0, 1 << 30, shared=False)
    assert sorted(s.machine.folio(s.pfn()).poisoned_pages) == sorted(s.pfn() + page for page in bad)
    s.sound()


def test_what_there_is_no_room_to_note_is_not_counted_either() -> None:
    """More bad pages than rows in a 2M page that is merged: what is forgotten is no poisoned page any more."""
    s = Scene("restructure", M2, memory_failure="marked", poisoned_blocks="move")
    s.gmem.allocate(0, M2)
    for page in range(W.POISONED + 16):
        s.gmem.memory_failure(page * PAGE)
    assert s.gmem.convert(0, M2, shared=False).status == 0
    assert s.gmem.convert(0, PAGE, shared=True).status == 0
    flagged = sum(bool(s.flags(s.pfn(page)) & HWPOISON) for page in range(512))
    assert flagged == s.machine.poisoned_pages == W.POISONED
    s.sound()


def test_a_merge_that_fails_forgets_nothing() -> None:
    """More bad pages than rows, and a page that somebody holds when the worker merges."""
    s = Scene("restructure", M2, memory_failure="marked", poisoned_blocks="move", merge="lazy", worker="queued")
    s.gmem.allocate(0, M2)
    for page in range(W.POISONED + 16):
        s.gmem.memory_failure(page * PAGE)
    assert s.gmem.convert(0, M2, shared=False).status == 0
    held = 511 * PAGE
    assert s.gmem.get_reference(held).status == 0
    s.machine.work()
    assert s.gmem.is_split(0)
    flagged = sum(bool(s.flags(s.pfn(page)) & HWPOISON) for page in range(512))
    assert flagged == s.machine.poisoned_pages == W.POISONED + 16
    assert s.gmem.put_reference(s.pfn(511)).status == 0
    s.machine.work()
    assert not s.gmem.is_split(0)
    assert s.machine.poisoned_pages == len(s.machine.folio(s.pfn()).poisoned_pages) == W.POISONED
    s.sound()


def test_a_poisoned_piece_is_neither_split_nor_merged_where_that_is_refused() -> None:
    s = Scene("restructure", 1 << 30, shared=False, memory_failure="marked", split_to="2M")
    s.vm.touch(0)
    s.gmem.convert(1000 * PAGE, PAGE, shared=True)  # in pieces, the second at 4K
    s.gmem.memory_failure(5 * PAGE)
    s.gmem.memory_failure(1010 * PAGE)
    assert s.gmem.convert(9 * PAGE, PAGE, shared=True) == (-W.EHWPOISON, 9 * PAGE)
    assert s.gmem.convert(1500 * PAGE, PAGE, shared=True).status == 0  # the third is whole and good
    assert s.gmem.convert(1000 * PAGE, PAGE, shared=False) == (-W.EHWPOISON, 1010 * PAGE)
    assert s.gmem.convert(1500 * PAGE, PAGE, shared=False).status == 0
    s.sound()


@pytest.mark.parametrize("moves", [False, True])
def test_a_split_huge_page_with_a_bad_piece_that_is_to_be_merged(moves: bool) -> None:
    s = Scene("restructure", M2, memory_failure="marked", poisoned_blocks="move" if moves else "refuse")
    s.vm.touch(7 * PAGE)
    s.gmem.memory_failure(7 * PAGE)
    assert s.gmem.convert(0, 100 * PAGE, shared=False).status == 0  # others are shared still
    result = s.gmem.convert(0, M2, shared=False)
    assert (result.status, result.detail) == ((0, 0) if moves else (-W.EHWPOISON, 7 * PAGE))
    assert s.gmem.is_split(0) != moves
    if moves:
        assert s.machine.folio(s.pfn()).poisoned_pages == [s.pfn(7)]
    s.sound()


def test_a_poisoned_huge_page_goes_back_to_its_pool_and_to_nobody() -> None:
    s = Scene("restructure", M2, shared=False, memory_failure="marked")
    s.vm.touch(0)
    head = s.pfn()
    s.gmem.memory_failure(5 * PAGE)
    assert s.gmem.punch_hole(0, M2).status == 0
    s.sound()
    assert s.gmem.allocate(0, 4 * M2).status == 0
    assert head not in {s.pfn(page) for page in range(0, 4 * 512, 512)}
    assert s.machine.unpoison(head << 12).status == 0
    assert s.machine.folio(head).poisoned_pages == []
    s.sound()


@pytest.mark.parametrize("hvo", [True, False])
def test_a_free_huge_page_leaves_its_pool(hvo: bool) -> None:
    """__page_handle_poison(): the 2M block with the bad page stays out of the page allocator, too."""
    machine = Machine(Config("restructure", pool=4 * M2, page_size=M2, hvo=hvo))
    pool = machine.hugetlb()
    base = machine.register(W.R_POOL_BASE)
    done = machine.memory_failure(base + 5 << 12)
    assert (done.status, done.action, done.page) == (0, MfResult.RECOVERED, MfPage.FREE_HUGE)
    assert (pool.nr_hugepages, machine.statistics.gauge(W.Gauge.BUDDY_BLOCKS)) == (3, 0)
    assert machine.unpoison(base + 5 << 12).status == 0
    assert machine.statistics.gauge(W.Gauge.BUDDY_BLOCKS) == 1
    assert machine.check() == 0, machine.broken
    assert machine.memory_failure(base + 6 << 12).page is MfPage.BUDDY
    assert machine.statistics.gauge(W.Gauge.BUDDY_BLOCKS) == 0
    assert machine.check() == 0, machine.broken


# --------------------------------------------------------------------------- among others


def begin_fault(s: Scene, actor: int, page: int, guest: bool) -> None:
    if guest:
        s.machine.begin(actor, Operation.GUEST_FAULT, vm=s.vm.vm, address=page * PAGE)
    else:
        s.machine.begin(actor, Operation.HOST_FAULT, flags=Flag.WRITE, space=s.process.space, address=VA + page * PAGE)


def finish(s: Scene, actor: int) -> int:
    while s.machine.step(actor) == W.GO:
        pass
    return s.machine.result(actor).status


@pytest.mark.parametrize("guest", [False, True])
@pytest.mark.parametrize("page_size", [PAGE, M2])
def test_a_fault_that_has_found_the_page_does_not_enter_it(guest: bool, page_size: int) -> None:
    """In Linux the folio's lock lets one wait for the other; here the fault comes again, and then meets the poison."""
    s = Scene("restructure", page_size)
    s.gmem.allocate(0, page_size)
    s.process.touch(VA + PAGE)
    begin_fault(s, A, 1 if guest else 2, guest)
    s.process.touch(VA + 2 * PAGE) if guest else None
    index = 1 if guest else 2
    if not guest and s.gmem.pfn(2 * PAGE) is None:
        s.gmem.allocate(2 * PAGE, PAGE)
    for _ in range(2):  # begin, and find the page
        assert s.machine.step(A) == W.GO
    s.machine.begin(B, Operation.MEMORY_FAILURE, object_=s.gmem.inode, offset=index * PAGE)
    assert s.machine.step(B) == W.STOP
    assert s.machine.result(B).name == "-EBUSY"
    assert finish(s, A) == (W.RET_PF_RETRY if guest else W.VM_FAULT_RETRY)
    begin_fault(s, A, index, guest)
    assert finish(s, A) == (-W.EHWPOISON if guest else W.VM_FAULT_HWPOISON)
    s.sound()


def test_a_conversion_that_holds_the_lock_keeps_stage_2_as_it_is() -> None:
    """kvm-x86 ad06cf5338bc: error_remove_folio only tries the invalidate_lock. The process loses the page, too."""
    s = Scene("restructure", M2)
    for page in (0, 1):
        s.process.touch(VA + page * PAGE, write=True)
        s.vm.touch(page * PAGE)
    s.machine.begin(A, Operation.CONVERT, flags=Flag.PRIVATE, object_=s.gmem.inode, offset=64 * PAGE, length=64 * PAGE)
    assert s.machine.step(A) == W.GO  # the lock is held
    done = s.gmem.memory_failure(PAGE)
    assert (done.status, done.action, done.replaced) == (-W.EBUSY, MfResult.FAILED, 1)
    assert done.stage2_dropped == 1  # by the notifier of the entry; with an entry elsewhere it would stay
    assert finish(s, A) == 0
    s.sound()
    s.process.munmap(VA, M2)
    assert s.vm.touch(2 * PAGE).status == W.RET_PF_FIXED
    s.machine.begin(A, Operation.CONVERT, flags=Flag.PRIVATE, object_=s.gmem.inode, offset=128 * PAGE, length=64 * PAGE)
    assert s.machine.step(A) == W.GO
    done = s.gmem.memory_failure(2 * PAGE)
    assert (done.status, done.stage2_dropped) == (-W.EBUSY, 0)
    assert s.vm.touch(2 * PAGE).status == W.RET_PF_SPURIOUS  # the guest goes on with the bad page
    assert finish(s, A) == 0
    s.sound()


def test_a_page_that_fails_between_gate_and_merge() -> None:
    """The conversion is past its gate when memory failure takes its reference: the freeze waits, as for any other."""
    s = Scene("restructure", M2, order="jan2026", batch="range")
    s.vm.touch(PAGE)
    s.machine.begin(A, Operation.CONVERT, flags=Flag.PRIVATE, object_=s.gmem.inode, length=M2)
    outcomes = []
    while W.STOP not in outcomes and W.BLOCKED not in outcomes:
        outcomes.append(s.machine.step(A))
        if len(outcomes) == 4:  # prepared, unmapped, past the gate, begun
            assert s.gmem.memory_failure(PAGE).status == -W.EBUSY
    assert outcomes[-1] == W.BLOCKED
    assert s.machine.result(A).name == "would spin"
