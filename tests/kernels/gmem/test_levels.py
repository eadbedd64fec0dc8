"""KVM's side of the designs' slots: levels, lpage_info, prefault, dirty logging, flushes; two defects."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pgemu.machine.designs import DESIGNS
from pgemu.objects.address_space import AddressSpace
from pgemu.objects.guest_memfd import GuestMemfd
from pgemu.objects.large_pages import MIXED, LargePage
from pgemu.objects.machine import Config, Machine
from pgemu.objects.vm import Vm
from pgemu_kernels import words as W
from pgemu_kernels.words.broken import Broken
from pgemu_kernels.words.events import Event, Gauge
from pgemu_kernels.words.operations import Operation

PAGE, M2, G1 = W.PAGE_4K, W.PAGE_2M, W.PAGE_1G
VA = 0x7F00_0000_0000
ACCESSED = {"npt": 0x20, "ept": 0x100}


class Scene:
    """One inode, mapped by a process and bound whole to its VM from guest address `gpa` on."""

    def __init__(
        self, design: str, *, blocks: int = 2, page_size: int = M2, shared: bool = False, gpa: int = 0, **more: Any
    ) -> None:
        self.machine = Machine(Config(design, pool=blocks * page_size, page_size=page_size, **more))  # type: ignore[arg-type]
        self.gmem: GuestMemfd = self.machine.create_guest_memfd(blocks * page_size, shared=shared)
        self.process: AddressSpace = self.machine.create_process()
        self.vm: Vm = self.machine.create_vm(self.process, protected=True)
        assert self.vm.bind(self.gmem, gpa).status == 0
        assert self.process.mmap(self.gmem, VA).status == 0

    def convert(self, first: int, pages: int, *, shared: bool) -> None:
        assert self.gmem.convert(first * PAGE, pages * PAGE, shared=shared).status == 0

    def leaf(self, gpa: int) -> int:
        """The last entry on the way to a guest address."""
        return self.vm.walk(gpa)[-1][2]

    def counted(self, event: Event) -> int:
        """How often an event was charged, all operations together."""
        return self.machine.statistics.event(event)

    def sound(self) -> None:
        assert self.machine.check() == 0, self.machine.broken

    def rules(self) -> set[Broken]:
        """The first rule that each leaf breaks; the machine's findings start over."""
        found = self.machine.check()
        kind = self.machine.broken[1]
        self.machine.arrays.state[W.R_BROKEN] = 0
        return {kind} if found else set()


# --------------------------------------------------------------------------- lpage_info


def expected_count(base: int, pages: int, backing: int, gfn: int, level: int) -> int:
    """kvm_alloc_memslot_metadata(), as the loop over a slot's blocks that it is."""
    size = 1 << 9 * (level - 1)
    first = base // size
    blocks = (base + pages - 1) // size - first + 1
    counts = [0] * blocks
    if base % size:
        counts[0] = 1
    if (base + pages) % size:
        counts[-1] = 1
    if (base ^ backing) % size:
        counts = [1] * blocks
    return counts[gfn // size - first]


def uniform(shared: np.ndarray[Any, Any], gfn: int, base: int, pgoff: int, size: int, pages: int) -> bool | None:
    """Whether the block of `size` around a guest frame is all of one kind; None where the slot does not hold it all."""
    first = gfn // size * size
    if first < base or first + size > base + pages:
        return None
    part = shared[first - base + pgoff : first - base + pgoff + size]
    return bool(part.all() or not part.any())


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("seed", range(6))
def test_levels_of_faults_follow_lpage_info(design: str, seed: int) -> None:
    """Random slots over an inode of 2M or 1G pages, some of it shared: the fault's level is the largest allowed."""
    random = np.random.default_rng(seed)
    page_size = (M2, G1)[seed % 2]
    blocks = 8 if page_size == M2 else 2
    s = Scene(design, blocks=blocks, page_size=page_size, memory=128 << 20)
    total = blocks * page_size // PAGE
    shared = np.zeros(total, bool)
    for _ in range(int(random.integers(1, 4))):
        first = int(random.integers(total))
        count = min(int(random.integers(1, 700)), total - first)
        s.convert(first, count, shared=True)
        shared[first : first + count] = True
    assert s.vm.unbind(0).status == 0
    aligned = bool(random.integers(2))
    pgoff = int(random.integers(total // 2)) & (-512 if aligned else -1)
    pages = int(random.integers(total // 4, total - pgoff))
    base = (4 << 18) + (pgoff if aligned else pgoff + int(random.integers(3)) * 512 + int(random.integers(2)))
    assert s.vm.bind(s.gmem, base * PAGE, offset=pgoff * PAGE, length=pages * PAGE).status == 0
    order = {M2: 2, G1: 3}[page_size]
    for gfn in {base, base + pages - 1, *(base + int(i) for i in random.integers(pages, size=25))}:
        allowed = [1]
        for level in (2, 3):
            info = s.vm.lpage_info(gfn * PAGE, level)
            assert info is not None
            same = uniform(shared, gfn, base, pgoff, 1 << 9 * (level - 1), pages)
            assert info == (expected_count(base, pages, pgoff, gfn, level), same is False)
            assert info.word == info.disallow_lpage + (MIXED if same is False else 0)
            if info.allows:
                allowed.append(level)
        index = gfn - base + pgoff
        block = page_size // PAGE
        split = design == "restructure" and shared[index // block * block :][:block].any()
        level = 1 if split else max(at for at in allowed if at <= order)
        result = s.vm.touch(gfn * PAGE)
        assert result.status in (W.RET_PF_FIXED, W.RET_PF_SPURIOUS)
        assert result.detail == level, (hex(gfn), allowed)
    s.sound()


def test_lpage_info_of_ordinary_slots_counts_userspace_addresses_and_attributes() -> None:
    machine = Machine(Config(memory=64 << 20, pool=8 * M2, page_size=M2))
    process = machine.create_process()
    vm = machine.create_vm(process, protected=True)
    base, hva = 4 * M2 + 5 * PAGE, VA + 5 * PAGE
    assert process.mmap_hugetlb(VA, 8 * M2).status == 0
    assert vm.set_memory_region(0, base, 6 * M2, hva).status == 0
    for gpa in range(base, base + 6 * M2, 37 * PAGE):
        info = vm.lpage_info(gpa, 2)
        assert info == (expected_count(base // PAGE, 6 * 512, hva // PAGE, gpa // PAGE, 2), False)
        level = vm.touch(gpa).detail
        assert level == (2 if info is not None and info.allows else 1)
    assert vm.set_attributes(5 * M2 + PAGE, PAGE, private=True).status == 0
    assert vm.lpage_info(5 * M2, 2) == LargePage(0, True)
    assert vm.lpage_info(6 * M2, 2) == LargePage(0, False)
    assert vm.set_attributes(4 * M2 + 8 * PAGE, PAGE, private=True).status == 0
    assert vm.lpage_info(4 * M2 + 8 * PAGE, 2) == LargePage(1, False)  # the flag is kept for whole blocks only
    assert vm.lpage_info(0, 2) is None
    # Another offset within 2M: every block of the slot, the ones inside too.
    assert vm.set_memory_region(1, 64 * M2, 3 * M2, VA + PAGE).status == 0
    assert [vm.lpage_info(64 * M2 + i * M2, 2) for i in range(3)] == [LargePage(1, False)] * 3
    with pytest.raises(ValueError, match="level 1: expected 2 or 3"):
        vm.lpage_info(base, 1)


# --------------------------------------------------------------------------- defects


def test_mapping_order_without_the_defect() -> None:
    s = Scene("restructure")
    s.convert(512, 1, shared=True)
    assert s.vm.touch(7 * PAGE) == (W.RET_PF_FIXED, 2)
    s = Scene("restructure")
    s.convert(0, 1, shared=True)
    assert s.vm.touch(9 * PAGE) == (W.RET_PF_FIXED, 1)
    s.sound()


def test_mapping_order_that_does_not_round_down_maps_a_private_block_small() -> None:
    """[7, 7 + 512) reaches into the second block, which has a shared page: 4K, in a block that is all private."""
    s = Scene("restructure", defects=("mapping-order",))
    s.convert(512, 1, shared=True)
    assert s.vm.touch(7 * PAGE) == (W.RET_PF_FIXED, 1)
    assert s.vm.touch(0) == (W.RET_PF_FIXED, 2)  # from the first index on the question is the right one
    s.sound()


def test_mapping_order_that_does_not_round_down_maps_a_split_block_large() -> None:
    """[9, 9 + 512) is all private although page 0 is shared: a 2M leaf over 4K folios of both kinds."""
    s = Scene("restructure", defects=("mapping-order",))
    s.convert(0, 1, shared=True)
    assert s.vm.touch(9 * PAGE) == (W.RET_PF_FIXED, 2)
    assert s.gmem.is_split(0)
    assert s.vm.walk(0)[-1][0] == 2  # the shared page is under it
    assert s.rules() == {Broken.MIXED_LEAF}
    # In a split 1G page, at an address that allows 2M only: no shared page under the leaf, but it is over 4K folios.
    s = Scene("restructure", page_size=G1, gpa=M2, order="jan2026", defects=("mapping-order",), memory=128 << 20)
    s.convert(0, 1, shared=True)
    s.machine.check_each()
    assert s.vm.touch(M2 + 600 * PAGE) == (W.RET_PF_FIXED, 2)
    found = {finding.rule: (finding.count, finding.index) for finding in s.machine.findings}
    assert found[Broken.LEAF_OVER_FOLIO] == (1, 600)
    assert found.keys() <= {Broken.LEAF_OVER_FOLIO, Broken.STALE_CONTENTS}  # 511 of its folios were never zeroed


GFN = 0x800


@pytest.mark.parametrize("design", DESIGNS)
def test_2022_shared_fault_in_a_private_2m_range(design: str) -> None:
    """gfn 0x800-0x9ff private, 0x84d-0x86d become shared, the guest faults at 0x84d (V. Annapurve, June 2022)."""
    s = Scene(design, gpa=GFN * PAGE)
    s.vm.touch_many(range(GFN * PAGE, (GFN + 0x200) * PAGE, PAGE))
    s.convert(0x4D, 0x21, shared=True)
    private = [gfn for gfn in range(GFN, GFN + 0x200) if not GFN + 0x4D <= gfn < GFN + 0x6E]
    s.vm.touch_many([gfn * PAGE for gfn in private])
    assert s.vm.touch((GFN + 0x4D) * PAGE) == (W.RET_PF_FIXED, 1)
    assert s.vm.leaves()[1] == 0
    block = s.gmem.pfn(0)
    assert block is not None
    found = s.vm.translate(np.array(private, np.uint64) * np.uint64(PAGE))
    assert found.physical.tolist() == [(block + gfn - GFN) * PAGE for gfn in private]
    s.sound()


@pytest.mark.parametrize("design", DESIGNS)
def test_2022_bug_puts_a_2m_leaf_over_private_4k_pages(design: str) -> None:
    s = Scene(design, gpa=GFN * PAGE, defects=("huge-over-private",))
    s.convert(0x4D, 0x21, shared=True)
    for gfn in (0x800, 0x84C, 0x86E, 0x9FF):  # private faults are not touched by it
        assert s.vm.touch(gfn * PAGE) == (W.RET_PF_FIXED, 1)
    tables = s.vm.table_pages
    flushes = s.counted(Event.TLB_FLUSH_VM)
    assert s.vm.touch(0x84D * PAGE) == (W.RET_PF_FIXED, 2)
    assert s.vm.leaves() == (0, 1, 0)  # the private leaves are gone, with their table
    assert s.vm.table_pages == tables - 1
    assert s.counted(Event.TLB_FLUSH_VM) == flushes + 1
    assert s.rules() == {Broken.MIXED_LEAF}


# --------------------------------------------------------------------------- prefault


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("stage2", ["npt", "ept"])
def test_prefault_maps_at_the_levels_of_faults(design: str, stage2: str) -> None:
    s = Scene(design, blocks=3, stage2=stage2)
    s.convert(512 + 3, 1, shared=True)
    assert s.vm.prefault(PAGE, 3 * M2 - PAGE) == (0, 3 * M2 - PAGE)
    assert s.vm.leaves() == (512, 2, 0)
    assert s.counted(Event.GUEST_FAULT) == 0  # nobody exits
    assert s.leaf(0) & ACCESSED[stage2] == 0
    assert s.vm.touch(0) == (W.RET_PF_SPURIOUS, 2)
    assert s.vm.prefault(0, 3 * M2) == (0, 3 * M2)  # what is there is there
    s.sound()


@pytest.mark.parametrize("design", DESIGNS)
def test_prefault_results(design: str) -> None:
    s = Scene(design)
    assert s.vm.prefault(8 * M2, PAGE) == (-W.ENOENT, 0)
    assert s.vm.prefault(2 * M2 - PAGE, 2 * PAGE) == (0, PAGE)  # the slot ends there; the page came with a 2M leaf
    for gpa, size in ((1, PAGE), (0, 0), (0, 100)):
        assert s.vm.prefault(gpa, size).status == -W.EINVAL
    for tables in (1, 2):  # a 2M leaf takes two below the root
        s = Scene(design)
        s.machine.arrays.state[W.R_FRAMES_LIMIT] = s.machine.statistics.gauge(Gauge.FRAMES_USED) + tables
        assert s.vm.prefault(0, M2) == ((-W.ENOMEM, 0) if tables == 1 else (0, M2))
        s.sound()
    s.vm.close()
    assert s.vm.prefault(0, PAGE).status == -W.EBADF


@pytest.mark.parametrize("design", DESIGNS)
def test_prefault_waits_for_a_conversion(design: str) -> None:
    s = Scene(design)
    s.vm.touch(0)
    s.machine.begin(1, Operation.CONVERT, flags=W.Flag.SHARED, object_=0, offset=0, length=PAGE)
    assert s.machine.step(1) == W.GO
    s.machine.begin(2, Operation.PREFAULT, address=M2, length=M2)
    assert s.machine.step(2) == W.BLOCKED
    while s.machine.step(1) == W.GO:
        pass
    assert s.machine.step(2) == W.STOP
    assert s.machine.result(2) == (0, M2)
    s.sound()


def test_prefault_in_a_vm_with_slots_of_both_kinds() -> None:
    s = Scene("restructure")
    assert s.process.mmap_anonymous(VA + (1 << 32), M2).status == 0
    assert s.vm.set_memory_region(0, 16 * M2, M2, VA + (1 << 32)).status == 0
    assert s.vm.prefault(0, M2) == (0, M2)
    assert s.vm.prefault(16 * M2, M2) == (0, M2)
    assert s.vm.prefault(2 * M2, PAGE).status == -W.ENOENT
    assert s.vm.leaves() == (512, 1, 0)
    s.sound()


# --------------------------------------------------------------------------- dirty logging


@pytest.mark.parametrize("design", DESIGNS)
def test_kvm_refuses_dirty_logging_of_guest_memfd(design: str) -> None:
    s = Scene(design)
    s.vm.touch(0)
    assert s.vm.dirty_logging(0, True).status == -W.EINVAL
    assert s.vm.leaves() == (0, 1, 0)


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("kernel", ["6.12", "7.3"])
@pytest.mark.parametrize("page_size", [M2, G1])
def test_dirty_logging_is_4k_while_it_lasts(design: str, kernel: str, page_size: int) -> None:
    s = Scene(design, page_size=page_size, kernel=kernel, dirty_log_guest_memfd=True, memory=128 << 20)
    level, pages = (2, 512) if page_size == M2 else (3, 512 * 512)
    assert s.vm.touch(0) == (W.RET_PF_FIXED, level)
    flushes = s.counted(Event.TLB_FLUSH_VM)
    assert s.vm.dirty_logging(0, True) == (0, 0)
    assert s.counted(Event.SPTE_SPLIT) == (1 if level == 2 else 513)
    assert s.counted(Event.TLB_FLUSH_VM) == flushes + 1
    assert s.vm.leaves() == (pages, 0, 0)
    assert s.vm.dirty_logging(PAGE, True) == (0, 0)  # it is on
    assert s.counted(Event.TLB_FLUSH_VM) == flushes + 1
    assert s.vm.touch(page_size + 5 * PAGE) == (W.RET_PF_FIXED, 1)
    s.sound()
    assert s.vm.dirty_logging(0, False) == (0, 0)
    if kernel == "6.12":
        assert s.vm.leaves() == (0, 0, 0)
        assert s.vm.touch(page_size + 5 * PAGE) == (W.RET_PF_FIXED, level)
    else:
        assert sum(s.vm.leaves()) == s.vm.leaves()[level - 1] == 2
        assert s.vm.touch(page_size + 6 * PAGE) == (W.RET_PF_SPURIOUS, level)
    s.sound()


def test_large_leaves_come_back_only_where_a_fault_would_get_them() -> None:
    for design in DESIGNS:
        s = Scene(design, blocks=3, dirty_log_guest_memfd=True)
        s.convert(512, 1, shared=True)
        assert s.vm.dirty_logging(0, True).status == 0
        s.vm.touch_many(range(0, 3 * M2, PAGE))
        assert s.vm.leaves() == (3 * 512, 0, 0)
        assert s.vm.dirty_logging(0, False).status == 0
        assert s.vm.leaves() == (512, 2, 0)
        s.sound()


def test_recovered_leaves_show_no_page_that_was_never_zeroed() -> None:
    s = Scene("pfnmap", zero="page", dirty_log_guest_memfd=True)
    assert s.vm.dirty_logging(0, True).status == 0
    assert s.vm.touch(3 * PAGE) == (W.RET_PF_FIXED, 1)
    assert s.counted(Event.PAGE_ZEROED) == 1
    assert s.vm.dirty_logging(0, False).status == 0
    assert s.vm.leaves() == (0, 1, 0)
    assert s.counted(Event.PAGE_ZEROED) == 512
    s.sound()


def test_a_new_slot_logs_nothing_and_what_has_no_slot_cannot_log() -> None:
    s = Scene("restructure", dirty_log_guest_memfd=True)
    assert s.vm.dirty_logging(0, True).status == 0
    assert s.vm.unbind(0).status == 0
    assert s.vm.dirty_logging(0, True).status == -W.ENOENT
    assert s.vm.bind(s.gmem, 0).status == 0
    assert s.vm.touch(0) == (W.RET_PF_FIXED, 2)
    s.vm.close()
    assert s.vm.dirty_logging(0, True).status == -W.EBADF


@pytest.mark.parametrize("frames", [0, 1])
def test_dirty_logging_without_memory_leaves_leaves_large(frames: int) -> None:
    """The error is dropped: mmu.c:kvm_mmu_slot_try_split_huge_pages()."""
    s = Scene("restructure", dirty_log_guest_memfd=True)
    s.vm.touch_many([0, M2])
    s.machine.arrays.state[W.R_FRAMES_LIMIT] = s.machine.statistics.gauge(Gauge.FRAMES_USED) + frames
    assert s.vm.dirty_logging(0, True) == (0, 0)
    assert s.vm.leaves() == (512 * frames, 2 - frames, 0)
    assert s.counted(Event.SPTE_SPLIT) == frames
    s.sound()


# --------------------------------------------------------------------------- flush accounting


@pytest.mark.parametrize("design", DESIGNS)
def test_flushes_and_notifier_calls_by_hand(design: str) -> None:
    """Each operation's VM flushes, notifier calls and process flushes, for one process, its VM and a VM of nobody."""
    s = Scene(design)
    other = s.machine.create_vm(protected=True)
    assert other.bind(s.gmem, 64 * M2).status == 0
    pfnmap = design == "pfnmap"

    def cost(run: Any) -> tuple[int, int, int]:
        events = (Event.TLB_FLUSH_VM, Event.NOTIFIER_CALL, Event.TLB_FLUSH_MM)
        before = [s.counted(event) for event in events]
        run()
        vm, notifier, mm = (s.counted(event) - old for event, old in zip(events, before, strict=True))
        return vm, notifier, mm

    assert cost(lambda: s.vm.touch(0)) == (0, 0, 0)
    assert cost(lambda: other.touch(64 * M2)) == (0, 0, 0)
    # To shared: a zap in both VMs, one flush of each; no process maps a private page.
    assert cost(lambda: s.convert(0, 1, shared=True)) == (2, 0, 0)
    assert cost(lambda: s.vm.touch(0)) == (0, 0, 0)
    assert cost(lambda: s.process.touch(VA)) == (0, 0, 0)
    # To private: the process's entry (flushed), its notifier, which drops its own VM's leaf (flushed); then the zap,
    # which finds nothing left in it, and the other VM never came back.
    assert cost(lambda: s.convert(0, 1, shared=False)) == (1, 1, 1)
    s.convert(0, 512, shared=True)
    s.process.touch(VA)
    s.vm.touch(0)
    other.touch(64 * M2)
    # The kernel's own zap of the process: its VM's leaf goes through the notifier, the other VM keeps its own.
    assert cost(lambda: s.process.zap(VA, PAGE)) == (1, 1, 1)
    assert other.leaves() != (0, 0, 0)
    # Nothing there: the notifier is called all the same.
    assert cost(lambda: s.process.zap(VA, PAGE)) == (0, 1, 0)
    # A hole: pfnmap unmaps the range first; restructure unmaps to merge, after the zap.
    s.vm.touch(0)
    s.process.touch(VA)
    assert cost(lambda: s.gmem.punch_hole(0, M2)) == (2, 1, 1)
    s.process.touch(VA)
    # munmap: entries and tables in one flush; VM_PFNMAP is flushed before its VMA goes, then the tables.
    assert cost(lambda: s.process.munmap(VA, 2 * M2)) == (0, 1, 2 if pfnmap else 1)
    s.vm.touch(0)
    assert cost(lambda: s.vm.unbind(0)) == (1, 0, 0)
    assert cost(lambda: other.unbind(64 * M2)) == (0, 0, 0)  # the hole took its leaf
    s.sound()


def test_dirty_logging_of_a_released_slot_changes_nothing() -> None:
    """No page stands behind a slot whose file was released: there is nothing to split or to put back."""
    machine = Machine(Config("pfnmap", pool=2 * W.PAGE_2M, page_size=W.PAGE_2M, dirty_log_guest_memfd=True))
    gmem = machine.create_guest_memfd(2 * W.PAGE_2M)
    vm = machine.create_vm(protected=True)
    assert vm.bind(gmem, 0).status == 0
    assert vm.dirty_logging(0, True).status == 0
    assert vm.touch(0).detail == 1
    assert vm.release(gmem).status == 0
    assert [vm.dirty_logging(0, on).status for on in (False, True, False)] == [0, 0, 0]
    assert machine.check() == 0, machine.broken


def test_dirty_logging_between_the_steps_of_a_fault() -> None:
    """The leaf is of 4K though the level was looked up before."""
    machine = Machine(Config("pfnmap", pool=2 * W.PAGE_2M, page_size=W.PAGE_2M, dirty_log_guest_memfd=True))
    gmem = machine.create_guest_memfd(2 * W.PAGE_2M)
    vm = machine.create_vm(protected=True)
    assert vm.bind(gmem, 0).status == 0
    assert gmem.allocate(0, W.PAGE_2M).status == 0
    machine.begin(1, Operation.GUEST_FAULT, vm=vm.vm, address=7 * W.PAGE_4K)
    for _ in range(2):
        assert machine.step(1) == W.GO
    assert vm.dirty_logging(0, True).status == 0
    assert machine.step(1) == W.STOP
    assert machine.result(1) == (W.RET_PF_FIXED, 1)
    assert machine.check() == 0, machine.broken


# --------------------------------------------------------------------------- NX huge pages


@pytest.mark.parametrize("design", DESIGNS)
def test_a_fetch_through_a_large_leaf_installs_a_small_one(design: str) -> None:
    """KVM's iTLB-multihit mitigation on EPT: large leaves are not executable. A fetch splits one and leaves 4K; no
    large leaf comes back there (disallowed_hugepage_adjust()). As in slots over a process's memory."""
    s = Scene(design, stage2="ept", nx_huge_pages=True)
    assert s.vm.touch(0) == (W.RET_PF_FIXED, 2)
    assert s.leaf(0) & 4 == 0
    exits = s.counted(Event.GUEST_FAULT)
    assert s.vm.touch(PAGE, execute=True).detail == 1
    assert s.counted(Event.GUEST_FAULT) == exits + 1
    assert s.leaf(PAGE) & 4 != 0
    assert s.vm.touch(PAGE, execute=True) == (W.RET_PF_SPURIOUS, 1)
    assert s.counted(Event.GUEST_FAULT) == exits + 1
    assert s.vm.leaves() == (512, 0, 0)
    s.sound()
    # Where nothing is mapped the fetch maps 4K at once, and a read beside it does not get 2M.
    assert s.vm.touch(M2, execute=True) == (W.RET_PF_FIXED, 1)
    assert s.vm.touch(M2 + PAGE) == (W.RET_PF_FIXED, 1)
    assert s.leaf(M2) & 4 != 0
    s.sound()


@pytest.mark.parametrize("design", DESIGNS)
def test_without_the_mitigation_a_fetch_is_an_access_like_others(design: str) -> None:
    s = Scene(design, stage2="ept")
    assert s.vm.touch(0, execute=True) == (W.RET_PF_FIXED, 2)
    assert s.vm.touch(PAGE, execute=True) == (W.RET_PF_SPURIOUS, 2)
    s.sound()


# --------------------------------------------------------------------------- rules of levels


@pytest.mark.parametrize(
    ("rule", "levels"),
    [
        # Pages of: a private 2M block in a 1G page that has a shared one; the mixed block, a private and its shared
        # page; a 2M block that is all shared; a 1G page that is all private; one that is all shared.
        ("uniform", [2, 1, 1, 2, 3, 3]),
        ("whole", [1, 1, 1, 1, 3, 3]),
        ("private", [2, 1, 1, 1, 3, 1]),
    ],
)
def test_how_large_leaves_are_after_conversions(rule: str, levels: list[int]) -> None:
    s = Scene("pfnmap", blocks=3, page_size=G1, level_rule=rule, memory=128 << 20)
    s.convert(512 + 5, 1, shared=True)
    s.convert(4 * 512, 512, shared=True)
    s.convert(2 << 18, 1 << 18, shared=True)
    touched = [7, 512 + 4, 512 + 5, 4 * 512 + 9, (1 << 18) + 3, (2 << 18) + 3]
    assert [s.vm.touch(page * PAGE).detail for page in touched] == levels
    s.sound()


@pytest.mark.parametrize(("rule", "level"), [("uniform", 2), ("whole", 2), ("private", 2)])
def test_a_large_leaf_is_back_when_all_is_private_again(rule: str, level: int) -> None:
    s = Scene("pfnmap", level_rule=rule)
    s.convert(3, 1, shared=True)
    assert s.vm.touch(0).detail == 1
    s.convert(3, 1, shared=False)
    assert s.vm.touch(4 * PAGE).detail == level
    s.sound()


def test_a_level_rule_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="level_rule 'large': expected one of uniform, whole, private"):
        Config("pfnmap", pool=M2, page_size=M2, level_rule="large")  # type: ignore[arg-type]
