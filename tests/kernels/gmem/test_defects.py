"""Mistakes of posted code, each shown to happen, and what removes it.

Where it is a race, two actors take turns through step(). Sources: RFC v2 is "1G page support for guest_memfd" of May
2025 (virt/kvm/guest_memfd.c, mm/guestmem_hugetlb.c); the branch of December 2025 is its rewrite
(mm/hugetlb_restructuring.c); pfnmap, which nobody posted, has the mistakes that its parts invite.
"""

from __future__ import annotations

from typing import Any

import pytest

from pgemu.machine.designs import DESIGNS
from pgemu.machine.findings import explained_by
from pgemu.objects.machine import Config, Machine
from pgemu_kernels import words as W
from pgemu_kernels.words.broken import Broken
from pgemu_kernels.words.operations import Flag, Operation

PAGE, M2 = W.PAGE_4K, W.PAGE_2M
VA = 0x7F00_0000_0000
A, B = 1, 2  # actors


class Scene:
    """An inode of 2M pages (or of 4K ones), mapped by a process and bound to its VM."""

    def __init__(self, design: str, *, shared: bool, size: int = 4 * M2, page_size: int = M2, **parameters: Any):
        parameters.setdefault("pool", max(size, M2))
        config = Config(design, page_size=page_size, **parameters)  # type: ignore[arg-type]
        self.machine = Machine(config)
        self.gmem = self.machine.create_guest_memfd(size, shared=shared)
        self.process = self.machine.create_process()
        self.vm = self.machine.create_vm(self.process, protected=True)
        assert self.process.mmap(self.gmem, VA).status == 0
        assert self.vm.bind(self.gmem, 0).status == 0

    def alternate(self, *actors: int) -> list[tuple[int, int]]:
        """Let the actors take turns, a step each, until all have ended: their results. Who is blocked waits."""
        running = list(actors)
        for _ in range(100):
            for actor in list(running):
                if self.machine.step(actor) == W.STOP:
                    running.remove(actor)
            if not running:
                return [tuple(self.machine.result(actor)) for actor in actors]
        raise AssertionError(f"actors {running} do not end")

    def begin_convert(self, actor: int, page: int, pages: int, *, shared: bool) -> None:
        flags = Flag.SHARED if shared else Flag.PRIVATE
        self.machine.begin(
            actor, Operation.CONVERT, flags=flags, object_=self.gmem.inode, offset=page * PAGE, length=pages * PAGE
        )

    def finish(self, actor: int) -> tuple[int, int]:
        return self.alternate(actor)[0]

    def sound(self) -> None:
        assert self.machine.check() == 0, self.machine.broken


def without_memory(order: str, page: int, **parameters: Any) -> Scene:
    """Private 2M pages that the guest has mapped; in one a page becomes shared without memory for the vmemmap."""
    s = Scene("restructure", shared=False, order=order, **parameters)
    for block in range(4):
        assert s.vm.touch(block * M2) == (W.RET_PF_FIXED, 2)
    s.machine.limit_frames(3)  # seven vmemmap pages are wanted
    s.result = s.gmem.convert(page * PAGE, PAGE, shared=True)  # type: ignore[attr-defined]
    s.machine.limit_frames(None)
    return s


@pytest.mark.parametrize("order", ["rfc2", "fixup"])
def test_no_memory_after_the_zap(order: str) -> None:
    """The restore of the vmemmap comes after stage 2 was zapped: what TDX has dropped then is lost.

    RFC v2 splits after the zap, the fix-ups of January 2026 after invalidate-end, too. That nothing may fail after the
    zap was the demand of the ordering debate, October 2025 to January 2026.
    """
    s = without_memory(order, 600)
    expected = M2 if order == "rfc2" else 600 * PAGE  # rfc2 names the folio's first page
    assert s.result == (-W.ENOMEM, expected)  # type: ignore[attr-defined]
    assert not s.gmem.is_shared(600 * PAGE)
    assert s.vm.walk(M2)[-1][2] & 1 == 0  # the leaf is gone, though nothing was converted
    assert s.vm.touch(M2) == (W.RET_PF_FIXED, 2)
    s.sound()


def test_no_memory_before_the_zap_with_the_agreed_order() -> None:
    """The plan of January 2026 splits before invalidate-begin."""
    s = without_memory("jan2026", 600)
    assert s.result == (-W.ENOMEM, 600 * PAGE)  # type: ignore[attr-defined]
    assert s.vm.touch(M2) == (W.RET_PF_SPURIOUS, 2)  # still mapped
    s.sound()


def test_rollback_never_ends_at_index_zero() -> None:
    """RFC v2 counts an unsigned index down while it is not below the start: with start 0 for ever.

    The rollback loop of its restructuring; found by reading, not reported (inference).
    """
    s = without_memory("rfc2", 5, defects=("rollback-at-zero",))
    assert s.result.status == -W.NEVER  # type: ignore[attr-defined]
    # The invalidate_lock stays taken and the invalidation in progress: nobody gets on.
    assert s.gmem.convert(2 * M2, PAGE, shared=True).status == -W.EBUSY
    assert s.gmem.punch_hole(2 * M2, M2).status == -W.EBUSY
    stepped = Scene("restructure", shared=False, order="rfc2", defects=("rollback-at-zero",))
    stepped.vm.touch(0)
    stepped.machine.limit_frames(3)
    stepped.begin_convert(A, 5, 1, shared=True)
    assert all(stepped.machine.step(A) == W.GO for _ in range(200))


@pytest.mark.parametrize(("page", "defects"), [(5, ()), (600, ("rollback-at-zero",))])
def test_rollback_ends_elsewhere_or_when_mended(page: int, defects: tuple[str, ...]) -> None:
    s = without_memory("rfc2", page, defects=defects)
    assert s.result == (-W.ENOMEM, page // 512 * M2)  # type: ignore[attr-defined]
    assert s.gmem.convert(page * PAGE, PAGE, shared=True) == (0, 0)
    s.sound()


def race_for_a_huge_page(design: str, **parameters: Any) -> tuple[Scene, list[tuple[int, int]]]:
    """Two vCPUs fault on two pages of the only huge page that the inode may have."""
    s = Scene(design, shared=False, size=M2, **parameters)
    for actor, page in ((A, 3), (B, 400)):
        s.machine.begin(actor, Operation.GUEST_FAULT, address=page * PAGE)
    return s, s.alternate(A, B)


@pytest.mark.parametrize("design", DESIGNS)
def test_allocation_race_inside_one_huge_page(design: str) -> None:
    """Both take a page of the subpool; there is only one, so that the loser has no memory though there is enough.

    A TODO of RFC v2's cover letter; raised by M. Roth in the call of January 2026.
    """
    s, results = race_for_a_huge_page(design, defects=("allocation-race",))
    assert sorted(status for status, _ in results) == [-W.ENOMEM, W.RET_PF_FIXED]
    assert s.vm.touch(400 * PAGE).status == W.RET_PF_SPURIOUS
    s.sound()


@pytest.mark.parametrize("design", DESIGNS)
def test_allocation_under_a_mutex(design: str) -> None:
    """The fix: a mutex by mapping and huge page, held until the new huge page is split."""
    s, results = race_for_a_huge_page(design)
    assert sorted(status for status, _ in results) == [W.RET_PF_FIXED, W.RET_PF_SPURIOUS]
    s.sound()


def mapped_before_a_shared_block(page: int, **parameters: Any) -> Scene:
    """Block 0 is private, block 1 has a shared page, block 2 is private; the guest touches `page`."""
    s = Scene("restructure", shared=False, **parameters)
    for block in range(4):
        assert s.gmem.allocate(block * M2, M2).status == 0
    assert s.gmem.convert(700 * PAGE, PAGE, shared=True) == (0, 0)
    s.level = s.vm.touch(page * PAGE).detail  # type: ignore[attr-defined]
    return s


def test_mapping_order_that_does_not_round_down() -> None:
    """From a page in the middle on, the helper of the branch of December 2025 looks into the next block.

    It looks at [index, index + nr) though it computes the rounded value, too (inference: a slip).
    """
    small = mapped_before_a_shared_block(300, defects=("mapping-order",))
    assert small.level == 1  # type: ignore[attr-defined]  # pages 300 to 811: one of them is shared, in the next block
    small.sound()
    huge = mapped_before_a_shared_block(701, defects=("mapping-order",))
    assert huge.level == 2  # type: ignore[attr-defined]  # 701 to 1212 are private: a 2M leaf over a mixed, split block
    assert huge.machine.check() > 0
    assert huge.machine.broken[1] in (Broken.MIXED_LEAF, Broken.LEAF_OVER_FOLIO)
    assert stale_pages(small) == 0
    assert stale_pages(huge) == 511  # only the folio of 4K was zeroed


def test_mapping_order_rounded_down() -> None:
    for page, level in ((300, 2), (701, 1)):
        s = mapped_before_a_shared_block(page)
        assert s.level == level  # type: ignore[attr-defined]
        s.sound()


def shared_page_in_a_batch(order: str, **parameters: Any) -> tuple[int, int]:
    """A shared 4K page that was just faulted becomes private."""
    s = Scene("restructure", shared=True, size=M2, page_size=PAGE, order=order, **parameters)
    s.process.touch(VA + 5 * PAGE, write=True)
    result = tuple(s.gmem.convert(0, 16 * PAGE, shared=False))
    s.sound()
    return result  # type: ignore[return-value]


def test_lru_references_block_conversion() -> None:
    """A per-CPU batch of folios to be added to an LRU list holds a reference, which looks like anybody's.

    mm/swap.c:folio_add_lru(): why RFC v2 keeps guest_memfd off the LRU.
    """
    assert shared_page_in_a_batch("rfc2", lru_cache=True) == (-W.EAGAIN, 5 * PAGE)


def test_lru_caches_are_drained_or_avoided() -> None:
    assert shared_page_in_a_batch("next4k", lru_cache=True) == (0, 0)  # lru_add_drain_all() at the first mismatch
    assert shared_page_in_a_batch("rfc2", lru_cache=False) == (0, 0)  # RFC v2 keeps its folios off the LRU
    s = Scene("pfnmap", shared=True, size=M2, page_size=PAGE, lru_cache=True)
    s.process.touch(VA + 5 * PAGE)
    assert s.gmem.convert(0, 16 * PAGE, shared=False) == (0, 0)  # nobody looks at references


def test_lru_references_after_a_split_page_by_page() -> None:
    """RFC v2 would insert 512 pages with folio_add_lru(): the last 16 (512 = 16 * 31 + 16) stay in the batch."""
    s = Scene("restructure", shared=True, size=M2, split_form="rfc2", order="rfc2", lru_cache=True)
    s.process.touch(VA)
    assert s.gmem.convert(0, 16 * PAGE, shared=False) == (0, 0)
    assert s.gmem.convert(490 * PAGE, 22 * PAGE, shared=False) == (-W.EAGAIN, 496 * PAGE)
    assert s.machine.drain_lru().detail == 16
    assert s.gmem.convert(490 * PAGE, 22 * PAGE, shared=False) == (0, 0)
    s.sound()


def fault_in_flight(design: str, **parameters: Any) -> tuple[Scene, list[int]]:
    """A host fault has found its page, and a conversion to private begins: (scene, results of fault and conversion)."""
    s = Scene(design, shared=True, **parameters)
    s.process.touch(VA)
    s.machine.begin(A, Operation.HOST_FAULT, address=VA + 20 * PAGE)
    for _ in range(2):
        assert s.machine.step(A) == W.GO
    s.begin_convert(B, 20, 1, shared=False)
    while s.machine.step(B) == W.GO:
        pass
    results = [s.machine.result(B).status]
    results.append(s.finish(A)[0])
    return s, results


def test_fault_in_flight_against_conversion() -> None:
    """Restructure: the fault's reference refuses it. pfnmap: the fault holds the invalidate_lock until it is done.

    gmem_convert_fault_race.c provokes the former; the latter is inference.
    """
    s, results = fault_in_flight("restructure")
    assert results == [-W.EAGAIN, W.VM_FAULT_LOCKED]
    s.sound()
    s, results = fault_in_flight("pfnmap")
    assert results == [-W.EBUSY, W.VM_FAULT_NOPAGE]  # blocked: it waits for the lock
    assert s.finish(B) == (0, 0)
    s.sound()


def test_entry_inserted_after_the_lock_was_released() -> None:
    """Without a gate and without the lock a conversion passes, and the entry comes after it: the host sees private."""
    s, results = fault_in_flight("pfnmap", defects=("insert-unlocked",))
    assert results == [0, W.VM_FAULT_NOPAGE]
    assert not s.gmem.is_shared(20 * PAGE)
    assert s.process.touch(VA + 20 * PAGE) == (0, 1)
    assert s.machine.check() > 0
    assert s.machine.broken[1] == Broken.HOST_PRIVATE


def punched(**parameters: Any) -> Scene:
    s = Scene("pfnmap", shared=True, size=M2, pool=2 * M2, **parameters)
    s.process.touch(VA + 7 * PAGE, write=True)
    assert s.gmem.punch_hole(0, M2) == (0, 0)
    return s


def test_stale_entries_after_a_hole() -> None:
    """Truncation unmaps folios that are mapped; special entries do not count, so it leaves them to the next owner.

    mm/truncate.c:truncate_cleanup_folio() asks folio_mapped().
    """
    s = punched(defects=("punch-keeps-entries",))
    assert s.process.touch(VA + 7 * PAGE) == (0, 1)  # no fault
    assert s.machine.check() > 0
    assert s.machine.broken[1] == Broken.WRONG_PFN
    other = s.machine.create_guest_memfd(M2)
    assert other.allocate(0, M2) == (0, 0)
    stale = s.gmem.stale_entries()
    assert [(entry.address, entry.pfn, entry.owner) for entry in stale] == [
        (VA + 7 * PAGE, other.pfn(7 * PAGE), other.inode)
    ]


def test_no_stale_entries_when_the_hole_is_unmapped() -> None:
    s = punched()
    assert s.gmem.stale_entries() == []
    assert s.process.touch(VA + 7 * PAGE) == (W.VM_FAULT_NOPAGE, 1)
    s.sound()


def faulted_beside_shared_pages(design: str, **parameters: Any) -> Scene:
    """Guest frames 0x800 to 0x9ff are private and mapped by 4K, 0x84d to 0x86d become shared, 0x84d is touched."""
    s = Scene(design, shared=False, size=8 * M2, **parameters)
    assert s.gmem.convert(0x84D * PAGE, PAGE, shared=True) == (0, 0)  # small leaves from here on
    for gfn in range(0x800, 0xA00):
        s.vm.touch(gfn * PAGE)
    assert s.gmem.convert(0x84D * PAGE, 0x21 * PAGE, shared=True) == (0, 0)
    for gfn in (*range(0x800, 0x84D), *range(0x86E, 0xA00)):
        s.vm.touch(gfn * PAGE)
    s.vm.touch(0x84D * PAGE)
    return s


@pytest.mark.parametrize("design", DESIGNS)
def test_large_leaf_over_private_pages(design: str) -> None:
    """The level of a shared fault came from the host's mapping alone, and replaced the private 4K leaves.

    Reported by V. Annapurve in June 2022 on the private-memory series of the time, with these frame numbers.
    """
    s = faulted_beside_shared_pages(design, defects=("huge-over-private",))
    level, _, entry = s.vm.walk(0x84D * PAGE)[-1]
    assert (level, entry & 1) == (2, 1)
    assert s.machine.check() > 0
    assert s.machine.broken[1] in (Broken.MIXED_LEAF, Broken.LEAF_OVER_FOLIO)


@pytest.mark.parametrize("design", DESIGNS)
def test_no_large_leaf_over_private_pages(design: str) -> None:
    s = faulted_beside_shared_pages(design)
    for gfn in (*range(0x800, 0x84D), 0x84D, *range(0x86E, 0xA00)):
        level, _, entry = s.vm.walk(gfn * PAGE)[-1]
        assert (level, entry & 1) == (1, 1)
    s.sound()


def unbound_while_dying(**parameters: Any) -> tuple[Scene, Any, int]:
    """A conversion is between begin and end of its invalidation when a second VM's file of the inode dies, and before
    it is released the VM deletes its slot: (scene, the VM, result of that)."""
    s = Scene("restructure", shared=False, order="fixup", **parameters)
    second = s.machine.create_vm(protected=True)
    assert second.bind(s.gmem, 0).status == 0
    for block in range(4):
        s.vm.touch(block * M2)
    s.begin_convert(A, 5, 1, shared=True)
    assert [s.machine.step(A) for _ in range(2)] == [W.GO, W.GO]  # prepare, invalidate_begin
    s.machine.begin(B, Operation.RELEASE, vm=second.vm, object_=s.gmem.inode)
    assert s.machine.step(B) == W.GO  # the last fput()
    assert second.touch(0).status == -W.EFAULT
    status = second.unbind(0).status
    while s.machine.step(A) == W.GO:
        pass
    assert s.machine.result(A) == (0, 0)
    while s.machine.step(B) == W.GO:
        pass
    return s, second, status


def test_unbinding_a_dying_file_leaves_an_invalidation_in_progress() -> None:
    """kvm_gmem_unbind() took the invalidate_lock only of a file that is alive. Fixed by kvm-x86 0ee2c883b62d."""
    s, vm, status = unbound_while_dying(defects=("unbind-dying",))
    assert status == 0
    assert vm.bind(s.gmem, 0).status == 0
    assert vm.touch(0).status == W.RET_PF_RETRY  # for ever: mmu_invalidate_in_progress is never 0 again
    assert vm.touch(3 * M2).status == W.RET_PF_FIXED  # outside the range that it began over
    assert s.machine.operate(Operation.GET, object_=s.gmem.inode, offset=0).status == 0
    s.machine.check_each()
    s.vm.touch(0)
    assert s.machine.broken[1] == Broken.IN_PROGRESS


def test_unbinding_waits_for_the_lock() -> None:
    s, vm, status = unbound_while_dying()
    assert status == -W.EBUSY
    assert vm.unbind(0).status == 0
    assert vm.bind(s.gmem, 0).status == 0
    assert vm.touch(0).status == W.RET_PF_FIXED
    s.sound()


# --------------------------------------------------------------------------- zeroing

UPTODATE = 1 << 3


def flags_of(s: Scene, page: int, pages: int = 1) -> list[bool]:
    """PG_uptodate of the struct pages behind some pages of the inode's first huge page."""
    head = s.gmem.pfn(0)
    assert head is not None
    return [bool(int(s.machine.struct_page(head + page + i)[0]) & UPTODATE) for i in range(pages)]


def found(s: Scene) -> dict[str, tuple[str, ...]]:
    """Rules that are broken, and the defects that explain them."""
    s.machine.check()
    return {finding.rule.name: finding.explained_by for finding in s.machine.findings}


def stale_pages(s: Scene, op: Operation | None = None) -> int:
    """Pages that guest or host were shown though they were never zeroed."""
    return s.machine.statistics.event(W.Event.STALE_PAGE_SHOWN, op)


def after_another_owner(**parameters: Any) -> tuple[Scene, bytes]:
    """A huge page comes back to the pool with what its owner wrote to page 7; a guest touches page 5 of it."""
    machine = Machine(Config("restructure", pool=M2, page_size=M2, **parameters))
    before = machine.create_guest_memfd(M2, shared=True)
    process = machine.create_process()
    process.mmap(before, VA)
    process.touch(VA + 7 * PAGE, write=True)
    secret = b"secret".ljust(PAGE, b"!")
    machine.write_frame(before.pfn(7 * PAGE) or 0, secret)
    assert before.close().status == 0
    s = Scene.__new__(Scene)
    s.machine, s.process = machine, process
    s.gmem = machine.create_guest_memfd(M2)
    s.vm = machine.create_vm(process, protected=True)
    assert process.mmap(s.gmem, VA).status == 0
    assert s.vm.bind(s.gmem, 0).status == 0
    assert s.vm.touch(5 * PAGE) == (W.RET_PF_FIXED, 2)
    return s, secret


def test_a_folio_counts_as_up_to_date_when_its_first_page_is_zeroed() -> None:
    """The branch of December 2025: clear_highpage(folio_page(folio, 0)), then folio_mark_uptodate().

    The guest gets what the last owner left; a split hands the flag to every 4K folio, so that the host gets it as well.
    """
    s, secret = after_another_owner(defects=("uptodate-unzeroed",))
    assert s.machine.statistics.event(W.Event.PAGE_ZEROED) == 2  # the first owner's page, and page 0
    assert s.machine.statistics.event(W.Event.FOLIO_ZEROED_PAGES) == 0
    assert s.machine.read_frame(s.gmem.pfn(7 * PAGE) or 0) == secret
    assert flags_of(s, 0) == [True]
    assert found(s) == {"STALE_CONTENTS": ("uptodate-unzeroed",)}
    assert s.gmem.convert(7 * PAGE, PAGE, shared=True).status == 0
    assert flags_of(s, 0, 512) == [True] * 512
    assert s.process.touch(VA + 7 * PAGE) == (W.VM_FAULT_LOCKED, 1)
    assert s.machine.statistics.event(W.Event.PAGE_ZEROED) == 2  # nothing more
    assert s.machine.read_frame(s.gmem.pfn(7 * PAGE) or 0) == secret
    assert s.gmem.convert(7 * PAGE, PAGE, shared=False).status == 0
    assert flags_of(s, 0) == [True]


def test_stale_pages_are_counted_when_they_are_shown() -> None:
    """Once each, whoever is shown them, and whether or not the leaf is there yet when the rule is checked."""
    s, _ = after_another_owner(defects=("uptodate-unzeroed",))
    assert stale_pages(s) == stale_pages(s, Operation.GUEST_FAULT) == 511
    assert s.gmem.convert(7 * PAGE, PAGE, shared=True).status == 0
    assert s.process.touch(VA + 7 * PAGE) == (W.VM_FAULT_LOCKED, 1)
    assert s.vm.touch(5 * PAGE) == (W.RET_PF_FIXED, 1)
    assert stale_pages(s) == 511
    assert s.process.munmap(VA, M2).status == s.vm.unbind(0).status == 0
    assert found(s) == {}  # no leaf is left
    assert stale_pages(s) == 511
    assert s.gmem.punch_hole(0, M2) == (0, 0)
    assert s.vm.bind(s.gmem, 0).status == 0
    assert s.vm.touch(5 * PAGE) == (W.RET_PF_FIXED, 1)  # allocated anew, split, for page 7 is shared
    assert stale_pages(s) == 511
    assert found(s) == {}


def test_stale_pages_come_with_a_large_leaf_that_comes_back() -> None:
    s = Scene("restructure", shared=False, size=M2, defects=("uptodate-unzeroed",), dirty_log_guest_memfd=True)
    assert s.vm.dirty_logging(0, on=True).status == 0
    assert s.vm.touch(5 * PAGE) == (W.RET_PF_FIXED, 1)
    assert stale_pages(s) == 1
    assert s.vm.dirty_logging(0, on=False).status == 0
    assert s.vm.touch(9 * PAGE) == (W.RET_PF_SPURIOUS, 2)
    assert (stale_pages(s), stale_pages(s, Operation.DIRTY_LOGGING)) == (511, 510)  # all but page 0


def test_stale_pages_come_by_prefault() -> None:
    s = Scene("restructure", shared=False, size=M2, defects=("uptodate-unzeroed",))
    assert s.vm.prefault(0, M2).status == 0
    assert stale_pages(s, Operation.PREFAULT) == 511


@pytest.mark.parametrize("parameters", [{}, {"merge_zero": "unzeroed"}, {"zero": "page"}])
def test_without_the_defects_no_page_is_stale(parameters: dict[str, Any]) -> None:
    s, _ = merged(9, **parameters)
    assert stale_pages(s) == 0


def test_the_whole_folio_is_zeroed() -> None:
    """RFC v2: folio_zero_user() of the folio, whatever page is asked for."""
    s, _ = after_another_owner()
    assert s.machine.statistics.event(W.Event.FOLIO_ZEROED_PAGES) == 512
    assert s.machine.read_frame(s.gmem.pfn(7 * PAGE) or 0) == bytes(PAGE)
    assert flags_of(s, 0) == [True]
    assert found(s) == {}


def merged(page: int, **parameters: Any) -> tuple[Scene, bytes]:
    """A shared block of which the host has used one page becomes private, and the guest touches page 5."""
    s = Scene("restructure", shared=True, size=M2, **parameters)
    s.process.touch(VA + page * PAGE, write=True)
    data = b"data".ljust(PAGE, b".")
    s.machine.write_frame(s.gmem.pfn(page * PAGE) or 0, data)
    assert s.gmem.convert(0, M2, shared=False).status == 0
    assert s.vm.touch(5 * PAGE) == (W.RET_PF_FIXED, 2)
    return s, data


def test_a_merge_loses_the_flags_of_all_pages_but_the_first() -> None:
    """RFC v2: prep_compound_page() of the first page, whose flags stay; the next guest fault zeroes what is in use.

    Found by reading (inference): nobody has reported it.
    """
    s, _ = merged(9, defects=("merge-keeps-flag",))
    assert s.machine.read_frame(s.gmem.pfn(9 * PAGE) or 0) == bytes(PAGE)
    assert s.machine.statistics.event(W.Event.FOLIO_ZEROED_PAGES) == 512
    assert found(s) == {"LOST_CONTENTS": ("merge-keeps-flag",)}
    assert s.machine.findings[0].count == 1


def test_a_merge_says_of_all_pages_what_was_so_of_the_first() -> None:
    """The same where the first page was used: the folio counts as up to date, and 511 pages were never zeroed."""
    s, data = merged(0, defects=("merge-keeps-flag",))
    assert s.machine.read_frame(s.gmem.pfn(0) or 0) == data
    assert s.machine.statistics.event(W.Event.FOLIO_ZEROED_PAGES) == 0
    assert s.machine.statistics.event(W.Event.PAGE_ZEROED) == 1
    assert found(s) == {"STALE_CONTENTS": ("merge-keeps-flag",)}
    assert stale_pages(s) == 511


def test_a_merge_in_december_2025() -> None:
    """Its merge leaves the flags alone, too; the first use clears page 0 again, which was not in use."""
    s, data = merged(9, defects=("uptodate-unzeroed",))
    assert s.machine.read_frame(s.gmem.pfn(9 * PAGE) or 0) == data
    assert s.machine.statistics.event(W.Event.PAGE_ZEROED) == 2
    assert found(s) == {"STALE_CONTENTS": ("uptodate-unzeroed",)}


@pytest.mark.parametrize("merge_zero", ["none", "unzeroed"])
@pytest.mark.parametrize("page", [0, 9])
def test_a_merge_that_knows_what_was_zeroed(page: int, merge_zero: str) -> None:
    s, data = merged(page, merge_zero=merge_zero)
    assert s.machine.read_frame(s.gmem.pfn(page * PAGE) or 0) == data
    assert s.machine.statistics.event(W.Event.PAGE_ZEROED) == 512
    assert flags_of(s, 0) == [True]
    assert found(s) == {}


def test_a_hole_in_what_a_merge_forgot_is_no_loss() -> None:
    """Contents that a hole has zeroed are not lost by the next first use."""
    s = Scene("restructure", shared=True, size=M2, punch="zero", defects=("merge-keeps-flag",))
    s.process.touch(VA + 9 * PAGE, write=True)
    assert s.gmem.convert(0, M2, shared=False).status == 0
    assert s.gmem.punch_hole(9 * PAGE, PAGE) == (0, 0)
    assert s.vm.touch(5 * PAGE) == (W.RET_PF_FIXED, 2)
    assert found(s) == {}


def test_a_hole_zeroes_what_was_never_zeroed() -> None:
    """A page that was stale is not any more."""
    s = Scene("restructure", shared=False, size=M2, punch="zero", defects=("uptodate-unzeroed",))
    s.vm.touch(0)
    assert s.gmem.punch_hole(0, M2 - PAGE) == (0, 0)
    assert s.gmem.punch_hole(M2 - PAGE, PAGE) == (0, 0)
    assert s.vm.touch(0) == (W.RET_PF_FIXED, 2)
    assert found(s) == {}
    assert stale_pages(s) == 511  # at the first touch


def test_a_hole_before_the_first_use_zeroes_as_well() -> None:
    """Pages 1 to 510; the first use zeroes page 0 and marks the folio: only page 511 is stale."""
    s = Scene("restructure", shared=False, size=M2, punch="zero", defects=("uptodate-unzeroed",))
    assert s.gmem.allocate(0, M2) == (0, 0)
    assert s.gmem.punch_hole(PAGE, 510 * PAGE) == (0, 0)
    assert s.vm.touch(0) == (W.RET_PF_FIXED, 2)
    assert stale_pages(s) == 1
    assert s.gmem.punch_hole(511 * PAGE, PAGE) == (0, 0)
    assert s.vm.touch(0) == (W.RET_PF_FIXED, 2)
    assert found(s) == {}


def test_a_merge_does_not_make_stale_what_a_hole_has_zeroed() -> None:
    """Page 9 is zeroed while its folio of 4K has no flag; the merged folio has that of page 0, which was used."""
    s = Scene("restructure", shared=True, size=M2, punch="zero", defects=("merge-keeps-flag",))
    s.process.touch(VA, write=True)
    assert s.gmem.punch_hole(9 * PAGE, PAGE) == (0, 0)
    assert s.gmem.convert(0, M2, shared=False).status == 0
    assert s.vm.touch(5 * PAGE) == (W.RET_PF_FIXED, 2)
    assert stale_pages(s) == 510


def holed(page: int, *, split: bool = False, **parameters: Any) -> tuple[Scene, bytes]:
    """The guest uses a 2M folio, something is written to page 3, and a hole is punched at a page behind it."""
    s = Scene("restructure", shared=False, size=M2, punch="zero", **parameters)
    assert s.vm.touch(5 * PAGE) == (W.RET_PF_FIXED, 2)
    data = b"data".ljust(PAGE, b".")
    for written in (3, page):
        s.machine.write_frame(s.gmem.pfn(written * PAGE) or 0, data)
    if split:
        assert s.gmem.convert(500 * PAGE, PAGE, shared=True) == (0, 0)
    assert s.gmem.punch_hole(page * PAGE, PAGE) == (0, 0)
    assert s.machine.read_frame(s.gmem.pfn(page * PAGE) or 0) == bytes(PAGE)
    return s, data


def test_a_hole_zeroes_a_huge_folio_from_its_first_page() -> None:
    """RFC v2, kvm_gmem_zero_range(): folio_zero_segment(f, 0, nr_bytes), whatever page the hole begins with.

    Found by reading (inference): nobody has reported it.
    """
    s, _ = holed(9, defects=("hole-zeroes-from-start",))
    assert s.machine.read_frame(s.gmem.pfn(3 * PAGE) or 0) == bytes(PAGE)
    assert s.machine.statistics.event(W.Event.PAGE_ZEROED, Operation.PUNCH_HOLE) == 10
    assert found(s) == {"LOST_CONTENTS": ("hole-zeroes-from-start",)}
    assert (s.machine.findings[0].count, s.machine.findings[0].index) == (1, 0)


@pytest.mark.parametrize(("split", "defects"), [(False, ()), (True, ()), (True, ("hole-zeroes-from-start",))])
def test_a_hole_zeroes_what_it_covers(split: bool, defects: tuple[str, ...]) -> None:
    """The fix: from the hole's first page on. Of folios of 4K each is zeroed from its first page either way."""
    s, data = holed(9, split=split, defects=defects)
    assert s.machine.read_frame(s.gmem.pfn(3 * PAGE) or 0) == data
    assert s.machine.statistics.event(W.Event.PAGE_ZEROED, Operation.PUNCH_HOLE) == 1
    assert found(s) == {}


def test_a_hole_from_the_start_of_a_folio_that_nobody_was_shown_loses_nothing() -> None:
    s = Scene("restructure", shared=False, size=M2, punch="zero", defects=("hole-zeroes-from-start",))
    assert s.gmem.allocate(0, M2) == s.gmem.punch_hole(9 * PAGE, PAGE) == (0, 0)
    assert found(s) == {}


def test_the_branch_of_december_2025_refuses_such_a_hole() -> None:
    s = Scene("restructure", shared=False, size=M2, punch="refuse", defects=("hole-zeroes-from-start",))
    s.vm.touch(0)
    assert s.gmem.punch_hole(9 * PAGE, PAGE).status == -W.EINVAL
    assert found(s) == {}


def test_a_hole_from_the_start_zeroes_what_was_stale_before_it() -> None:
    """A merge left 511 pages marked that were never zeroed; the hole at page 9 zeroes 1 to 9, before anybody sees."""
    defects = ("hole-zeroes-from-start", "merge-keeps-flag")
    s = Scene("restructure", shared=True, size=M2, punch="zero", defects=defects)
    s.process.touch(VA, write=True)
    assert s.gmem.convert(0, M2, shared=False).status == s.gmem.punch_hole(9 * PAGE, PAGE).status == 0
    assert s.vm.touch(5 * PAGE) == (W.RET_PF_FIXED, 2)
    assert stale_pages(s) == 502
    assert found(s) == {"STALE_CONTENTS": ("merge-keeps-flag",), "LOST_CONTENTS": defects}  # page 0 was in use


def test_the_defects_are_none_of_pfnmap() -> None:
    s = Scene("pfnmap", shared=False, size=M2, defects=("uptodate-unzeroed", "merge-keeps-flag"))
    assert s.vm.touch(5 * PAGE) == (W.RET_PF_FIXED, 2)
    assert s.machine.statistics.event(W.Event.PAGE_ZEROED) == 512
    assert found(s) == {}


def converted(kind: str, *, mapped: bool, **parameters: Any) -> Scene:
    """A guest has used a shared 4K page, and asks for it to become private; the slot's addresses may be unmapped."""
    s = Scene.__new__(Scene)
    s.machine = Machine(Config("restructure", pool=2 * M2, page_size=M2, vm=kind, stage2="ept", **parameters))
    s.gmem = s.machine.create_guest_memfd(M2, shared=True)
    s.process = s.machine.create_process()
    s.vm = s.machine.create_vm(s.process)
    assert s.process.mmap(s.gmem, VA).status == 0
    assert s.vm.bind(s.gmem, 0, userspace_addr=VA).status == 0
    assert mapped or s.process.munmap(VA, M2).status == 0
    assert s.vm.touch(5 * PAGE) == (W.RET_PF_FIXED, 1)
    assert s.gmem.convert(0, M2, shared=False).status == 0
    return s


@pytest.mark.parametrize("kind", ["tdx", "sw"])
@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "unmapped"])
@pytest.mark.parametrize("defects", [(), ("convert-keeps-leaves",)], ids=["fixed", "posted"])
def test_to_private_stage_2_loses_what_a_notifier_reaches(kind: str, mapped: bool, defects: tuple[str, ...]) -> None:
    """RFC v2: kvm_gmem_convert_should_proceed() of a range to private only unmaps it from user page tables, and KVM
    hears of that through the MMU notifier of the slot's addresses. Where no VMA maps them, the guest's leaf stays:
    with TDX below the root of shared memory. The fix zaps as a conversion to shared does (inference)."""
    s = converted(kind, mapped=mapped, order="rfc2", defects=defects)
    stays = bool(defects) and not mapped
    assert s.vm.leaves() == ((1, 0, 0) if stays else (0, 0, 0))
    assert found(s) == ({"WRONG_ROOT": defects} if stays and kind == "tdx" else {})


@pytest.mark.parametrize("order", ["fixup", "jan2026"])
def test_other_orders_zap_whatever_is_mapped(order: str) -> None:
    s = converted("tdx", mapped=False, order=order, defects=("convert-keeps-leaves",))
    assert s.vm.leaves() == (0, 0, 0)
    assert found(s) == {}


# --------------------------------------------------------------------------- what explains a broken rule


def test_numbers_are_no_aliases() -> None:
    """Two members of one value would be one."""
    for enum in (W.Broken, W.Event, W.Gauge, W.Operation):
        assert len(enum.__members__) == len(enum)
    assert len(W.Defect.__members__) == len(list(W.Defect))
    assert max(W.Broken) < W.BROKEN_RULES


def test_every_defect_but_two_explains_a_broken_rule() -> None:
    explained = W.Defect(0)
    for defects in W.RULE_EXPLAINED_BY.values():
        explained |= defects
    assert {defect.name for defect in W.Defect if not defect & explained} == {"ALLOCATION_RACE", "CUT_HUGE_PFN"}


def test_a_finding_that_no_active_defect_explains() -> None:
    """A leaf to a page that was never zeroed, on a machine whose defect has nothing to do with it."""
    s = Scene("pfnmap", shared=False, size=M2, defects=("allocation-race",))
    assert s.gmem.convert(PAGE, PAGE, shared=True).status == 0
    assert s.vm.touch(0) == (W.RET_PF_FIXED, 1)
    assert found(s) == {}
    s.machine.arrays.state[s.machine.register(W.R_ZEROED_ROWS)] = 0  # made up
    assert found(s) == {"STALE_CONTENTS": ()}
    assert s.machine.findings[0].index == 0
    assert explained_by(Broken.WRONG_PFN, ["insert-unlocked", "mapping-order"]) == ("insert-unlocked",)
    assert explained_by(Broken.COUNTS, ["insert-unlocked"]) == ()


# --------------------------------------------------------------------------- mainline: a leaf of 1G taken for a table

G1 = W.PAGE_1G


@pytest.mark.parametrize("kernel", ["6.12", "6.18", "7.3"])
@pytest.mark.parametrize("has", [True, False])
@pytest.mark.parametrize("aligned", [True, False])
def test_a_cut_inside_a_1g_entry_of_a_device(kernel: str, has: bool, aligned: bool) -> None:
    """split_huge_pmd_address() off 2M: a crash, as captured of each kernel; a cut at a multiple of 2M is fine."""
    machine = Machine(Config(kernel=kernel, defects=("cut-huge-pfn",) if has else ()))
    device = machine.create_device(4 << 18, 2 << 18)
    process = machine.create_process()
    va = 0x7F00_0000_0000
    assert process.mmap_device(device, va).status == 0
    assert process.touch(va).detail == process.touch(va + G1).detail == 3
    at = va + (M2 if aligned else M2 + PAGE)
    never = has and not aligned
    for cut in (process.munmap(at, M2), process.protect(at, M2, 1)):
        assert cut.status in ((-W.NEVER,) if never else (0, -W.ENOMEM))  # what was unmapped is a hole
    assert process.walk(va)[-1][2] & 1 == never  # a large entry that is cut goes whole
    assert process.touch(va).detail == (3 if never else 2)
    assert machine.check() == 0, machine.broken


@pytest.mark.parametrize(("hvo", "has"), [(True, True), (False, True), (True, False)])
def test_a_cut_inside_a_1g_entry_of_guest_memory(hvo: bool, has: bool) -> None:
    """Over RAM the lock is a word of a struct page: of an optimised huge page page->private is not 0, which looks like
    a lock that is held; where it is 0 the lock is taken and given back, and nothing is to be seen."""
    defects = ("cut-huge-pfn",) if has else ()
    machine = Machine(Config("pfnmap", pool=2 * G1, host_huge=True, hvo=hvo, defects=defects))
    gmem = machine.create_guest_memfd(G1, shared=True)
    process = machine.create_process()
    va = 0x7F00_0000_0000
    assert process.mmap(gmem, va).status == 0
    assert process.touch(va).detail == 3
    pfn = gmem.pfn(0)
    assert pfn is not None
    word = int(machine.struct_page(pfn)[5])
    assert (word & 0xFFFF_FFFF != 0) == hvo
    cut = process.munmap(va + PAGE, PAGE)
    assert cut.status == (-W.NEVER if hvo and has else 0)
    assert process.touch(va).detail == (3 if hvo and has else 1)
    assert int(machine.struct_page(pfn)[5]) == word
    assert machine.check() == 0, machine.broken


def test_mappings_of_folios_are_cut_anywhere() -> None:
    machine = Machine(Config("restructure", pool=2 * G1, buddy=4 * M2, thp="always", defects=("cut-huge-pfn",)))
    process = machine.create_process()
    va = 0x7F00_0000_0000
    assert process.mmap_anonymous(va, 2 * M2).status == 0
    assert process.touch(va, write=True).detail == 2
    assert process.munmap(va + PAGE, PAGE).status == 0
    assert process.touch(va).detail == 1
    assert machine.check() == 0, machine.broken
