"""fork() of processes that map inodes of the designs: what the child has, and who is told of what."""

from __future__ import annotations

from typing import Any

import pytest

from pgemu.images.folio import Folio
from pgemu.machine.designs import DESIGNS
from pgemu.objects.address_space import AddressSpace
from pgemu.objects.guest_memfd import GuestMemfd
from pgemu.objects.machine import Config, Machine
from pgemu.objects.vm import Vm
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Event, Gauge
from pgemu_kernels.words.operations import Flag, Operation

PAGE, M2 = W.PAGE_4K, W.PAGE_2M
VA = 0x7F00_0000_0000
WRITE, ACCESSED, DIRTY, PRESENT = 2, 0x20, 0x40, 1
MAPPED = {"restructure": W.VM_FAULT_LOCKED, "pfnmap": W.VM_FAULT_NOPAGE}


class Family:
    """A process with a VM, its child and its grandchild; the first has pages 0, 1 and 512 of a shared inode."""

    def __init__(self, design: str, **more: Any) -> None:
        self.machine = Machine(Config(design, pool=3 * M2, page_size=M2, **more))  # type: ignore[arg-type]
        self.gmem: GuestMemfd = self.machine.create_guest_memfd(3 * M2, shared=True)
        self.parent: AddressSpace = self.machine.create_process()
        self.vm: Vm = self.machine.create_vm(self.parent, protected=True)
        assert self.vm.bind(self.gmem, 0).status == 0
        assert self.parent.mmap(self.gmem, VA).status == 0
        self.touched = [0, 1, 512]
        for page in self.touched:
            self.parent.touch(VA + page * PAGE, write=True)
        self.child = self.parent.fork()
        self.grandchild = self.child.fork()
        self.everybody = [self.parent, self.child, self.grandchild]

    def entry(self, process: AddressSpace, page: int) -> int:
        """The 4K or larger entry of a page; 0 without."""
        entry = process.walk(VA + page * PAGE)[-1][2]
        return entry if entry & PRESENT else 0

    def folio(self, page: int) -> Folio:
        pfn = self.gmem.pfn(page * PAGE)
        assert pfn is not None
        return self.machine.folio(pfn)

    def counted(self, event: Event) -> int:
        return self.machine.statistics.event(event)

    def sound(self) -> None:
        assert self.machine.check() == 0, self.machine.broken


def test_pfnmap_copies_its_entries_writable_and_not_accessed() -> None:
    """copy_present_ptes(): a shared mapping's entry is made clean and old, and keeps its write access."""
    f = Family("pfnmap")
    for page in f.touched:
        entry = f.entry(f.parent, page)
        assert entry & WRITE
        assert entry & ACCESSED
        assert entry & DIRTY
        for process in (f.child, f.grandchild):
            assert f.entry(process, page) == entry & ~(ACCESSED | DIRTY)
            assert process.touch(VA + page * PAGE, write=True) == (0, 1)  # no fault
    assert f.machine.statistics.gauge(Gauge.HOST_LEAVES_4K) == 9
    f.sound()


def test_restructure_leaves_the_child_to_its_faults() -> None:
    """vma_needs_copy(): a shared file mapping without an anon_vma is not copied; the tables are not there either."""
    f = Family("restructure")
    for process in (f.child, f.grandchild):
        assert process.table_pages == (0, 0, 0)
    assert f.folio(0).mapcount == 1
    for n, process in enumerate((f.child, f.grandchild), 2):
        assert process.touch(VA) == (W.VM_FAULT_LOCKED, 1)
        assert f.folio(0).mapcount == n
        assert f.folio(0).refcount == n + 1
    assert f.entry(f.child, 0) == f.entry(f.parent, 0)
    f.sound()


@pytest.mark.parametrize("design", DESIGNS)
def test_read_only_mappings_stay_read_only(design: str) -> None:
    f = Family(design)
    assert f.child.mmap(f.gmem, VA + 64 * M2, read_only=True).status == 0
    assert f.child.touch(VA + 64 * M2).status == MAPPED[design]
    last = f.child.fork()
    if design == "restructure":
        assert last.touch(VA + 64 * M2).status == W.VM_FAULT_LOCKED
    assert last.walk(VA + 64 * M2)[-1][2] & (PRESENT | WRITE) == PRESENT
    assert last.touch(VA + 64 * M2, write=True).status == W.VM_FAULT_SIGSEGV
    f.sound()


@pytest.mark.parametrize("design", DESIGNS)
def test_a_conversion_unmaps_all_processes(design: str) -> None:
    """forked_accesses of guest_memfd_conversions_test: after to-private every process gets SIGBUS."""
    f = Family(design)
    for process in f.everybody:
        process.touch(VA)
    flushes = f.counted(Event.TLB_FLUSH_MM)
    calls = f.counted(Event.NOTIFIER_CALL)
    assert f.gmem.convert(0, PAGE, shared=False).status == 0
    assert f.counted(Event.TLB_FLUSH_MM) == flushes + 3
    assert f.counted(Event.NOTIFIER_CALL) == calls + 1  # the VM is of the first one's mm alone
    for process in f.everybody:
        assert f.entry(process, 0) == 0
        assert process.touch(VA).status == W.VM_FAULT_SIGBUS
        assert process.touch(VA + PAGE).status in (0, MAPPED[design])
    f.sound()
    assert f.gmem.convert(0, PAGE, shared=True).status == 0
    assert [p.touch(VA, write=True).status for p in f.everybody] == [MAPPED[design]] * 3
    f.sound()


@pytest.mark.parametrize("design", DESIGNS)
def test_only_the_first_process_s_unmapping_reaches_the_vm(design: str) -> None:
    f = Family(design)
    f.child.touch(VA)
    assert f.vm.touch(0).status == W.RET_PF_FIXED
    leaves = f.vm.leaves()
    calls = f.counted(Event.NOTIFIER_CALL)
    assert f.child.zap(VA, PAGE).status == 0
    assert f.child.munmap(VA, M2).status == 0
    assert f.grandchild.exit().status == 0
    assert f.vm.leaves() == leaves
    assert f.counted(Event.NOTIFIER_CALL) == calls
    assert f.parent.zap(VA, PAGE).status == 0
    assert f.vm.leaves() == (0, 0, 0)
    assert f.counted(Event.NOTIFIER_CALL) == calls + 1
    f.sound()


@pytest.mark.parametrize("design", DESIGNS)
def test_the_child_unmaps_as_the_parent_does(design: str) -> None:
    """munmap(): the same flushes, the same tables; a page inside, then the rest."""
    f = Family(design)
    for page in f.touched:
        f.child.touch(VA + page * PAGE)
    assert f.child.table_pages == f.parent.table_pages
    spent = []
    for process in (f.parent, f.child):
        before = f.counted(Event.TLB_FLUSH_MM), f.counted(Event.LEAF_CLEARED), f.counted(Event.TABLE_PAGE_FREED)
        assert process.munmap(VA + PAGE, PAGE).status == 0
        assert process.touch(VA + PAGE).status == W.VM_FAULT_SIGSEGV
        assert process.touch(VA).status == 0
        assert process.munmap(VA, 3 * M2).status == 0
        assert process.table_pages == (0, 0, 0)
        after = f.counted(Event.TLB_FLUSH_MM), f.counted(Event.LEAF_CLEARED), f.counted(Event.TABLE_PAGE_FREED)
        spent.append([new - old for old, new in zip(before, after, strict=True)])
    assert spent[0] == spent[1]
    f.sound()


@pytest.mark.parametrize("design", DESIGNS)
def test_the_parent_ends_first(design: str) -> None:
    f = Family(design)
    assert f.parent.exit().status == 0
    assert f.child.touch(VA, write=True).status in (0, MAPPED[design])
    assert f.gmem.convert(0, 3 * M2, shared=False).status == 0
    assert f.child.touch(VA).status == W.VM_FAULT_SIGBUS
    assert f.gmem.convert(0, 3 * M2, shared=True).status == 0
    assert f.grandchild.touch(VA).status == MAPPED[design]
    f.sound()
    assert f.gmem.close().status == 0
    assert f.child.touch(VA).status == W.VM_FAULT_SIGSEGV
    assert f.machine.statistics.gauge(Gauge.POOL_FREE) == 3
    assert f.child.exit().status == 0
    assert f.grandchild.exit().status == 0
    assert f.machine.statistics.gauge(Gauge.HOST_TABLES) == 0
    f.sound()


@pytest.mark.parametrize("design", DESIGNS)
def test_holes_reach_every_process(design: str) -> None:
    f = Family(design)
    for process in f.everybody:
        process.touch(VA)
    assert f.gmem.punch_hole(0, M2).status == 0
    assert [f.entry(p, 0) for p in f.everybody] == [0, 0, 0]
    assert [f.entry(f.parent, 512) != 0, f.entry(f.child, 512) != 0] == [True, design == "pfnmap"]
    f.sound()


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("steps", range(1, 7))
def test_fork_in_the_middle_of_a_conversion(design: str, steps: int) -> None:
    """Whichever step it comes after, the conversion ends with no entry to a private page in any process."""
    f = Family(design)
    f.machine.begin(1, Operation.CONVERT, flags=Flag.PRIVATE, object_=0, offset=0, length=2 * PAGE)
    for _ in range(steps):
        outcome = f.machine.step(1)
    last = f.child.fork()
    while outcome == W.GO:
        outcome = f.machine.step(1)
    assert f.machine.result(1).status == 0
    for process in (*f.everybody, last):
        assert f.entry(process, 0) == 0
        assert process.touch(VA + PAGE).status == W.VM_FAULT_SIGBUS
    f.sound()


def test_fork_copies_large_entries() -> None:
    f = Family("pfnmap", host_huge=True)
    assert f.gmem.convert(5 * PAGE, PAGE, shared=False).status == 0
    f.parent.touch(VA)
    last = f.parent.fork()
    assert [last.walk(VA + i * M2)[-1][0] for i in range(2)] == [1, 2]
    assert f.entry(last, 512) == f.entry(f.parent, 512) & ~ACCESSED
    statistics = f.machine.statistics
    assert (statistics.gauge(Gauge.HOST_LEAVES_4K), statistics.gauge(Gauge.HOST_LEAVES_2M)) == (2, 4)
    f.sound()
    assert last.munmap(VA + M2 + PAGE, PAGE).status == 0  # cut through the entry: it goes, in this process
    assert f.entry(last, 512) == 0
    assert last.touch(VA + M2) == (W.VM_FAULT_NOPAGE, 1)
    assert f.gmem.convert(M2, PAGE, shared=False).status == 0
    assert [f.entry(p, 513) for p in (*f.everybody, last)] == [0] * 4
    assert last.exit().status == 0
    assert f.child.exit().status == 0
    f.sound()


@pytest.mark.parametrize("frames", range(1, 6))
def test_fork_without_memory_leaves_nothing(frames: int) -> None:
    """pfnmap copies tables: the top one, two above, and one for each 2M with 4K entries."""
    f = Family("pfnmap")
    used = f.machine.statistics.gauge(Gauge.FRAMES_USED)
    f.machine.arrays.state[W.R_FRAMES_LIMIT] = used + frames
    if frames < 5:
        with pytest.raises(OSError, match="fork") as raised:
            f.parent.fork()
        assert raised.value.errno == W.ENOMEM
        assert f.machine.statistics.gauge(Gauge.FRAMES_USED) == used
    else:
        assert f.entry(f.parent.fork(), 512) != 0
    f.sound()
