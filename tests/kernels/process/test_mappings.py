"""mmap, munmap and MADV_DONTNEED of the designs' inodes: what they return and count, whichever entry runs them.

The same on a machine by default, in a process that maps ordinary memory too, on a machine with a parameter of its own,
and step by step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pgemu.machine.designs import DESIGNS
from pgemu.objects.machine import Config, Machine
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Event, Gauge
from pgemu_kernels.words.operations import Flag, Operation

PAGE, M2 = W.PAGE_4K, W.PAGE_2M
VA = 0x7F00_0000_0000
FREE = VA + 32 * M2
ORDINARY = 0x1000_0000
END = 0x7FFF_FFFF_F000  # TASK_SIZE_MAX of 4-level x86-64: a page below 2^47
ALL = (1 << 64) - 1
WAYS = ("default", "beside anonymous memory", "in full", "step by step")


class Scene:
    """A process with two shared 2M pages of an inode at VA, the first four 4K pages touched, and a VM."""

    def __init__(self, design: str, way: str, **more: Any) -> None:
        if way == "in full":
            more["punch"] = "refuse"
        self.machine = Machine(Config(design, pool=4 * M2, page_size=M2, **more))  # type: ignore[arg-type]
        self.way = way
        self.gmem = self.machine.create_guest_memfd(2 * M2, shared=True)
        self.process = self.machine.create_process()
        self.vm = self.machine.create_vm(self.process, protected=True)
        assert self.vm.bind(self.gmem, 0).status == 0
        assert self.process.mmap(self.gmem, VA).status == 0
        if way == "beside anonymous memory":
            assert self.process.mmap_anonymous(ORDINARY, PAGE).status == 0
        for page in range(4):
            self.process.touch(VA + page * PAGE)
        self.before = self.machine.statistics

    def operate(self, op: Operation, **arguments: Any) -> int:
        """The status of an operation of the process."""
        arguments = {"space": self.process.space, **arguments}
        if self.way != "step by step":
            return self.machine.operate(op, **arguments).status
        self.machine.begin(0, op, **arguments)
        assert self.machine.step(0) == W.STOP
        return self.machine.result(0).status

    def mmap(self, address: int, offset: int, length: int, **arguments: Any) -> int:
        found = {"object_": self.gmem.inode, **arguments}
        return self.operate(Operation.MMAP, address=address, offset=offset, length=length, **found)

    def munmap(self, address: int, length: int) -> int:
        return self.operate(Operation.MUNMAP, address=address, length=length)

    def dontneed(self, address: int, length: int) -> int:
        return self.operate(Operation.ZAP, address=address, length=length, flags=Flag.MADVISE)

    def counted(self, *events: Event) -> tuple[int, ...]:
        """Events since the last look."""
        now = self.machine.statistics
        found = tuple(now.event(event) - self.before.event(event) for event in events)
        self.before = now
        return found

    def sound(self) -> None:
        assert self.machine.check() == 0, self.machine.broken


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# --------------------------------------------------------------------------- arguments

MMAP = [
    # address, offset, length, status
    (FREE, 0, PAGE, 0),
    (FREE, 0, 100, 0),  # do_mmap(): PAGE_ALIGN(len)
    (FREE, 0, 0, -W.EINVAL),
    (FREE, 100, PAGE, -W.EINVAL),  # arch/x86/kernel/sys_x86_64.c
    (FREE + 1, 0, PAGE, -W.EINVAL),  # __get_unmapped_area()
    (FREE, 0, ALL, -W.ENOMEM),  # PAGE_ALIGN() wraps
    (FREE, 0, ALL - PAGE + 1, -W.ENOMEM),
    (END - PAGE, 0, PAGE, 0),
    (END - PAGE, 0, PAGE + 1, -W.ENOMEM),
    (END, 0, PAGE, -W.ENOMEM),
    (END + 1, 0, PAGE, -W.ENOMEM),  # asked before the address's alignment
    (1 << 47, 0, PAGE, -W.ENOMEM),
    (ALL - PAGE + 1, 0, PAGE, -W.ENOMEM),
    (VA, 0, PAGE, -W.EEXIST),
    (VA - PAGE, 0, PAGE + 1, -W.EEXIST),
    (VA - PAGE, 0, PAGE, 0),
    (VA + 2 * M2 - PAGE, 0, 1, -W.EEXIST),
    (FREE, (1 << 63) - 2 * PAGE, PAGE, 0),
    (FREE, (1 << 63) - PAGE, PAGE, -W.EOVERFLOW),  # file_mmap_ok(): MAX_LFS_FILESIZE
    (FREE, ALL - PAGE + 1, PAGE, -W.EOVERFLOW),
    (VA, (1 << 63) - PAGE, PAGE, -W.EEXIST),  # asked before
]

MUNMAP = [
    # address, length, status: mm/vma.c:do_vmi_munmap()
    (VA, 100, 0),
    (VA, PAGE, 0),
    (VA + M2 - PAGE, 2 * PAGE, 0),
    (VA - PAGE, 8 * M2, 0),
    (VA, 0, -W.EINVAL),
    (VA + 1, PAGE, -W.EINVAL),
    (VA, ALL, -W.EINVAL),
    (VA, ALL - PAGE + 1, -W.EINVAL),
    (FREE, PAGE, 0),  # nothing there
    (END - PAGE, PAGE, 0),
    (END - PAGE, PAGE + 1, -W.EINVAL),
    (END, 0, -W.EINVAL),
    (END, 1, -W.EINVAL),
    (1 << 47, PAGE, -W.EINVAL),
    (ALL - PAGE + 1, PAGE, -W.EINVAL),
]

DONTNEED = [
    # address, length, status, pfnmap's: mm/madvise.c:is_madvise_valid(), madvise_walk_vmas()
    (VA, 100, 0, -W.EINVAL),
    (VA, 2 * M2, 0, -W.EINVAL),
    (VA, 0, 0, 0),
    (FREE, 0, 0, 0),
    (VA + 1, PAGE, -W.EINVAL, -W.EINVAL),
    (VA + 1, 0, -W.EINVAL, -W.EINVAL),
    (VA, ALL, -W.EINVAL, -W.EINVAL),
    (VA, ALL - PAGE + 1, -W.EINVAL, -W.EINVAL),
    (FREE, PAGE, -W.ENOMEM, -W.ENOMEM),
    (1 << 47, PAGE, -W.ENOMEM, -W.ENOMEM),
    (VA - PAGE, 2 * PAGE, -W.ENOMEM, -W.EINVAL),  # a refusal ends it, a hole does not
    (VA + 2 * M2 - PAGE, PAGE + 1, -W.ENOMEM, -W.EINVAL),
]


@pytest.mark.parametrize("design", DESIGNS)
def test_mmap_checks_its_arguments(design: str, way: str) -> None:
    for address, offset, length, status in MMAP:
        scene = Scene(design, way)
        assert scene.mmap(address, offset, length) == status, (hex(address), offset, length)
        pages = -(-length // PAGE) * PAGE
        if status == 0:
            assert scene.mmap(address + pages - PAGE, 0, PAGE) == -W.EEXIST
            assert scene.mmap(address + pages, 0, PAGE) == (
                0 if address not in (VA - PAGE, END - PAGE) else -W.EEXIST if address < VA else -W.ENOMEM
            )
        scene.sound()


def test_mmap_asks_for_the_file_first(way: str) -> None:
    """ksys_mmap_pgoff(): -EBADF before what do_mmap() refuses; sys_mmap() looks at the offset before either."""
    scene = Scene("restructure", way)
    assert scene.mmap(FREE, 0, PAGE, object_=7) == -W.EBADF
    assert scene.mmap(VA + 1, 0, 0, object_=7) == -W.EBADF
    assert scene.mmap(FREE, 1, PAGE, object_=7) == -W.EINVAL
    assert scene.mmap(FREE, 0, PAGE, flags=Flag.PRIVATE) == -W.EINVAL
    assert scene.mmap(VA, 0, PAGE, flags=Flag.PRIVATE) == -W.EEXIST
    assert scene.mmap(FREE, 0, PAGE, object_=int(W.NO_INODE)) == -W.EBADF
    assert scene.gmem.close().status == 0
    assert scene.mmap(FREE, 0, PAGE) == -W.EBADF
    scene.sound()


@pytest.mark.parametrize("design", DESIGNS)
def test_munmap_checks_its_arguments(design: str, way: str) -> None:
    for address, length, status in MUNMAP:
        scene = Scene(design, way)
        assert scene.munmap(address, length) == status, (hex(address), length)
        scene.sound()


@pytest.mark.parametrize("design", DESIGNS)
def test_dontneed_checks_its_arguments(design: str, way: str) -> None:
    for address, length, *status in DONTNEED:
        scene = Scene(design, way)
        assert scene.dontneed(address, length) == status[design == "pfnmap"], (hex(address), length)
        scene.sound()


def test_methods_return_the_same() -> None:
    scene = Scene("restructure", "default")
    process, gmem = scene.process, scene.gmem
    assert process.mmap(gmem, END - PAGE, length=PAGE).status == 0
    assert process.mmap(gmem, END, length=PAGE).status == -W.ENOMEM
    assert process.munmap(VA, 100).status == 0
    assert process.mmap(gmem, VA, length=100).status == 0
    assert process.madvise_dontneed(VA + PAGE, 100).status == 0
    assert process.zap(VA + 2 * PAGE, 1, madvise=True).status == 0
    assert process.zap(VA + 3 * PAGE, 1).status == 0
    assert process.zap_many(np.array([VA, VA + M2], np.uint64), 100).status.tolist() == [0, 0]
    assert scene.machine.statistics.gauge(Gauge.HOST_LEAVES_4K) == 0
    scene.sound()


def test_an_ended_process_has_no_mappings_to_change(way: str) -> None:
    scene = Scene("pfnmap", way)
    assert scene.process.exit().status == 0
    for space in (scene.process.space, 9):
        assert scene.mmap(FREE, 0, PAGE, space=space) == -W.EINVAL
        for op in (Operation.MUNMAP, Operation.ZAP):
            assert scene.operate(op, address=VA, length=PAGE, space=space) == -W.EINVAL
    scene.sound()


# --------------------------------------------------------------------------- what is counted

CLEARED = (Event.LEAF_CLEARED, Event.RMAP_CHANGED, Event.TLB_FLUSH_MM, Event.TABLE_PAGE_FREED)


@pytest.mark.parametrize(("design", "counted"), [("restructure", 1), ("pfnmap", 0)])
def test_a_length_in_bytes_unmaps_whole_pages(design: str, counted: int, way: str) -> None:
    scene = Scene(design, way)
    assert scene.munmap(VA + 2 * PAGE, 100) == 0
    assert scene.counted(*CLEARED) == (1, counted, 1, 0)
    assert scene.operate(Operation.ZAP, address=VA, length=PAGE + 1) == 0
    assert scene.counted(*CLEARED) == (2, 2 * counted, 1, 0)
    assert scene.machine.statistics.gauge(Gauge.HOST_LEAVES_4K) == 1
    scene.sound()


@pytest.mark.parametrize(("design", "flushes"), [("restructure", 1), ("pfnmap", 2)])
@pytest.mark.parametrize("cut", [False, True])
def test_munmap_is_one_gather(design: str, flushes: int, cut: bool, way: str) -> None:
    """unmap_vmas() of all VMAs, then free_pgtables() of all: VM_PFNMAP is flushed once in between, tlb_free_vmas().

    Three tables go: nothing else is below the 512G.
    """
    scene = Scene(design, way)
    if cut:
        assert scene.munmap(VA + M2, PAGE) == 0  # two VMAs
        scene.process.touch(VA + M2 + PAGE)
        scene.counted()
    assert scene.munmap(VA, 2 * M2) == 0
    cleared = 5 if cut else 4
    normal = cleared if design == "restructure" else 0
    assert scene.counted(*CLEARED) == (cleared, normal, flushes, 4 if cut else 3)
    scene.sound()


def test_munmap_of_device_memory_is_flushed_before_its_tables_go() -> None:
    """VM_PFNMAP of an ordinary kind: the 16 pages go one by one, then the tables with a flush of their own."""
    scene = Scene("restructure", "default")
    device = scene.machine.create_device(8 << 18, 16, remap=True)
    assert scene.process.mmap_device(device, ORDINARY).status == 0
    scene.counted()
    assert scene.munmap(ORDINARY, 16 * PAGE) == 0
    assert scene.counted(*CLEARED, Event.TLB_FLUSH_PAGE) == (16, 0, 2, 3, 16)
    scene.sound()


def test_exit_is_one_flush(way: str) -> None:
    """exit_mmap(): tlb_gather_mmu_fullmm(), which tlb_free_vmas() leaves alone."""
    scene = Scene("pfnmap", way)
    assert scene.mmap(FREE, 0, PAGE) == 0
    scene.process.touch(FREE)
    scene.counted()
    assert scene.process.exit().status == 0
    assert scene.counted(Event.LEAF_CLEARED, Event.TLB_FLUSH_MM) == (5, 1)
    scene.sound()


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("touched", [False, True])
def test_a_cut_inside_a_2m_block_tells_vms_of_the_block(design: str, touched: bool, way: str) -> None:
    """mm/huge_memory.c:split_huge_pmd_if_needed(), __split_huge_pmd(): where there is a table of 2M entries.

    The first cut, at page 5, finds the block whole; the second one, at page 6, does not.
    """
    scene = Scene(design, way)
    if not touched:
        assert scene.process.munmap(VA, 2 * M2).status == 0
        assert scene.process.mmap(scene.gmem, VA).status == 0
    scene.vm.touch_many(np.arange(0, 1024 * PAGE, PAGE))
    scene.counted()
    assert scene.munmap(VA + 5 * PAGE, PAGE) == 0
    whole = 512 if design == "restructure" else 1  # pfnmap's guest has leaves of 2M
    assert scene.counted(Event.NOTIFIER_CALL, Event.SPTE_CLEARED) == ((2, whole) if touched else (1, 1))
    assert scene.munmap(VA + M2, PAGE) == 0  # at its start there is no block to split, at its end there is
    assert scene.counted(Event.NOTIFIER_CALL, Event.SPTE_CLEARED) == ((2, whole) if touched else (1, 1))
    scene.sound()


@pytest.mark.parametrize("kernel", ["6.12", "6.18"])
def test_dontneed_over_a_table(kernel: str, way: str) -> None:
    """CONFIG_PT_RECLAIM, 6.14: the table goes with the same flush as its entries."""
    scene = Scene("restructure", way, kernel=kernel)
    assert scene.dontneed(VA, M2 - PAGE + 1) == 0
    assert scene.counted(*CLEARED) == (4, 4, 1, 0 if kernel == "6.12" else 1)
    scene.sound()


# --------------------------------------------------------------------------- whoever runs it

pages = st.one_of(st.integers(-2, 8), st.integers(508, 516), st.integers(1020, 1026))
spans = st.one_of(st.integers(0, 9), st.integers(0, 9).map(lambda n: n * PAGE), st.integers(1, 5 * M2), st.just(ALL))
steps = st.lists(
    st.tuples(
        st.sampled_from(("mmap", "munmap", "dontneed", "zap", "touch", "touch", "guest", "convert")),
        pages,
        st.sampled_from((0, 0, 0, 0, 0, 1, 4095)),
        spans,
    ),
    min_size=1,
    max_size=16,
)


def play(scene: Scene, action: str, page: int, more: int, length: int) -> int:
    address = VA + page * PAGE + more
    if action == "mmap":
        return scene.mmap(address, abs(page) * PAGE + more % 2, length)
    if action == "munmap":
        return scene.munmap(address, length)
    if action == "dontneed":
        return scene.dontneed(address, length)
    if action == "zap":
        return scene.operate(Operation.ZAP, address=address, length=length)
    if action == "touch":
        return scene.process.touch(address).status
    if action == "guest":
        return scene.vm.touch(abs(page) * PAGE).status
    return scene.gmem.convert(abs(page) * PAGE, PAGE, shared=more > 0).status


@settings(max_examples=60, deadline=None, derandomize=True)
@given(design=st.sampled_from(DESIGNS), kernel=st.sampled_from(("6.12", "7.3")), actions=steps)
def test_the_answer_does_not_depend_on_who_runs_it(design: str, kernel: str, actions: list[Any]) -> None:
    scenes = [Scene(design, way, kernel=kernel) for way in WAYS]
    for action in actions:
        results = [play(scene, *action) for scene in scenes]
        assert len(set(results)) == 1, (action, results)
    first, *others = scenes
    events = first.counted(*Event)
    gauges = [first.machine.statistics.gauge(gauge) for gauge in Gauge]
    for scene in others:
        assert scene.counted(*Event) == events, scene.way
        assert [scene.machine.statistics.gauge(gauge) for gauge in Gauge] == gauges, scene.way
    for scene in scenes:
        scene.sound()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(actions=st.lists(st.tuples(st.sampled_from(("map", "unmap", "close")), st.integers(0, 5), st.integers(0, 12))))
def test_an_inode_s_list_has_its_vmas(actions: list[tuple[str, int, int]]) -> None:
    """I_VMAS and A_NEXT: every live VMA of the inode once, in the order of rows, whoever maps it."""
    machine = Machine(Config("pfnmap", pool=4 * M2, page_size=M2))
    inodes = [machine.create_guest_memfd(M2, shared=True) for _ in range(2)]
    processes = [machine.create_process() for _ in range(2)]
    for action, which, page in actions:
        process, inode = processes[which % 2], inodes[which // 2 % 2]
        if action == "map":
            process.mmap(inode, VA + page * PAGE, length=3 * PAGE, offset=0)
        elif action == "unmap":
            process.munmap(VA + page * PAGE, PAGE)
        elif page == 0:
            inode.close()
        state = machine.arrays.state
        for inode in inodes:
            rows = [int(W.STATE_VMAS) + i * W.A_WORDS for i in range(machine.register(W.R_VMAS))]
            live = [row for row in rows if state[row + int(W.A_LIVE)] and state[row + int(W.A_INODE)] == inode.inode]
            found = []
            row = int(state[int(W.STATE_INODES) + inode.inode * W.I_WORDS + int(W.I_VMAS)])
            while row:
                found.append(row)
                row = int(state[row + int(W.A_NEXT)])
            assert found == live
