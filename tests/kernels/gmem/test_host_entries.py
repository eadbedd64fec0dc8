"""pfnmap with 2M and 1G entries in processes: where they come, what drops them, and that nothing else changes."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from pgemu.objects.address_space import AddressSpace
from pgemu.objects.guest_memfd import GuestMemfd
from pgemu.objects.machine import Config, Machine
from pgemu.objects.vm import Vm
from pgemu_kernels import words as W
from pgemu_kernels.formats.leaves import ProcessLeaves
from pgemu_kernels.words.events import Event, Gauge
from pgemu_kernels.words.operations import Flag, Operation

PAGE, M2, G1 = W.PAGE_4K, W.PAGE_2M, W.PAGE_1G
VA = 0x7F00_0000_0000
EXAMPLES = int(os.environ.get("PGEMU_EXAMPLES", "0")) or 40


class Scene:
    """One inode, all shared, mapped by a process at `address` and bound to its VM at 0."""

    def __init__(
        self, *, blocks: int = 2, page_size: int = M2, address: int = VA, shared: bool = True, **more: Any
    ) -> None:
        given = {"host_huge": True, **more}
        self.machine = Machine(Config("pfnmap", pool=blocks * page_size, page_size=page_size, **given))
        self.gmem: GuestMemfd = self.machine.create_guest_memfd(blocks * page_size, shared=shared)
        self.process: AddressSpace = self.machine.create_process()
        self.vm: Vm = self.machine.create_vm(self.process, protected=True)
        assert self.vm.bind(self.gmem, 0).status == 0
        if address:
            assert self.process.mmap(self.gmem, address).status == 0

    def touch(self, address: int) -> int:
        """The level at which the process has a page after its access; it must be allowed."""
        result = self.process.touch(address)
        assert result.status in (0, W.VM_FAULT_NOPAGE), result
        return result.detail

    @property
    def leaves(self) -> tuple[int, int, int]:
        """Entries of 4K, 2M and 1G of all processes."""
        statistics = self.machine.statistics
        levels = (Gauge.HOST_LEAVES_4K, Gauge.HOST_LEAVES_2M, Gauge.HOST_LEAVES_1G)
        return statistics.gauge(levels[0]), statistics.gauge(levels[1]), statistics.gauge(levels[2])

    def sound(self) -> None:
        assert self.machine.check() == 0, self.machine.broken


@pytest.mark.parametrize(("page_size", "level"), [(M2, 2), (G1, 3)])
@pytest.mark.parametrize("read_only", [False, True])
def test_entries_are_those_of_vmf_insert_pfn_pmd_and_pud(page_size: int, level: int, read_only: bool) -> None:
    s = Scene(page_size=page_size, address=0)
    assert s.process.mmap(s.gmem, VA, read_only=read_only).status == 0
    result = s.process.touch(VA + page_size + 5 * PAGE)
    assert result == (W.VM_FAULT_NOPAGE, level)
    pfn = s.gmem.pfn(page_size)
    assert pfn is not None
    steps = s.process.walk(VA + page_size)
    assert steps[-1][0] == level
    assert steps[-1][2] == ProcessLeaves("7.3").special_pfn(level, pfn, write=not read_only)
    assert s.process.touch(VA + page_size) == (0, level)
    assert s.touch(VA) == level
    assert s.leaves == ((0, 2, 0) if level == 2 else (0, 0, 2))
    s.sound()


def test_without_the_parameter_entries_are_small() -> None:
    s = Scene(host_huge=False)
    assert s.touch(VA) == 1
    assert s.leaves == (1, 0, 0)


def test_restructure_has_no_large_entries() -> None:
    machine = Machine(Config("restructure", pool=M2, page_size=M2, host_huge=True))
    gmem = machine.create_guest_memfd(M2, shared=True)
    process = machine.create_process()
    assert process.mmap(gmem, VA).status == 0
    assert process.touch(VA) == (W.VM_FAULT_LOCKED, 1)
    assert machine.check() == 0


@pytest.mark.parametrize(
    ("address", "offset", "length", "touched", "level"),
    [
        (VA, 0, G1, 3, 3),
        (VA + M2, 0, G1, 3, 2),  # congruent modulo 2M only
        (VA + PAGE, 0, G1, 3, 1),  # address and frame disagree
        (VA, 0, G1 - PAGE, 3, 2),  # the VMA is short of 1G
        (VA, 0, M2 - PAGE, 3, 1),  # ... of 2M
        (VA + M2, M2, G1, 3, 2),  # congruent, and the VMA begins inside the 1G page
        (VA + M2, M2, 2 * G1 - M2, G1 // PAGE, 3),
        (VA + PAGE, PAGE, M2, 3, 1),  # ... inside the 2M page
        (VA + PAGE, PAGE, 2 * M2, 520, 2),
    ],
)
def test_level_goes_by_address_frame_and_mapping(
    address: int, offset: int, length: int, touched: int, level: int
) -> None:
    s = Scene(page_size=G1, address=0)
    assert s.process.mmap(s.gmem, address, offset=offset, length=length).status == 0
    assert s.touch(address + touched * PAGE) == level
    s.sound()


def test_level_goes_by_shareability() -> None:
    s = Scene(page_size=G1)
    assert s.gmem.convert(5 * PAGE, PAGE, shared=False).status == 0
    assert s.touch(VA) == 1
    assert s.process.touch(VA + 5 * PAGE).status == W.VM_FAULT_SIGBUS
    assert s.touch(VA + M2) == 2
    assert s.touch(VA + G1) == 3
    s.sound()


def test_a_conversion_of_a_part_drops_a_large_entry_whole() -> None:
    s = Scene(page_size=G1)
    assert s.touch(VA) == 3
    assert s.gmem.convert(M2 + 7 * PAGE, PAGE, shared=False).status == 0
    assert s.leaves == (0, 0, 0)
    assert s.touch(VA) == 2
    assert s.touch(VA + M2) == 1
    assert s.process.touch(VA + M2 + 7 * PAGE).status == W.VM_FAULT_SIGBUS
    s.sound()
    # Back: a table of 4K entries is in the way of the 2M entry, and one of 2M entries in that of the 1G entry.
    assert s.gmem.convert(M2 + 7 * PAGE, PAGE, shared=True).status == 0
    assert s.touch(VA + M2 + 7 * PAGE) == 1
    assert s.touch(VA + 2 * M2) == 2
    s.sound()
    # Its tables go with the mapping; then it is 1G again.
    assert s.process.munmap(VA, 2 * G1).status == 0
    assert s.leaves == (0, 0, 0)
    assert s.process.mmap(s.gmem, VA).status == 0
    assert s.touch(VA) == 3
    s.sound()


def test_the_notifier_is_told_of_all_of_an_entry_that_is_partly_zapped() -> None:
    """__split_huge_pmd(): the VM loses the leaf over the whole 2M, where a small entry costs it one page's leaf."""
    for huge in (True, False):
        s = Scene(blocks=2, host_huge=huge, dirty_log_guest_memfd=True)
        assert s.vm.dirty_logging(0, True).status == 0  # for 4K leaves
        s.vm.touch_many(range(M2, 2 * M2, PAGE))
        assert s.vm.leaves() == (512, 0, 0)
        assert s.touch(VA + M2) == (2 if huge else 1)
        assert s.process.zap(VA + M2, PAGE).status == 0
        assert s.vm.leaves()[0] == (0 if huge else 511)
        assert s.leaves == (0, 0, 0)
        s.sound()


def test_holes_and_cuts_drop_large_entries() -> None:
    s = Scene(blocks=4, punch="zero")
    for i in range(4):
        assert s.touch(VA + i * M2) == 2
    assert s.gmem.punch_hole(0, M2).status == 0  # the whole page: freed
    assert s.leaves == (0, 3, 0)
    assert s.gmem.punch_hole(M2 + PAGE, PAGE).status == 0  # a part: zeroed, which unmaps nothing
    assert s.leaves == (0, 3, 0)
    assert s.process.munmap(VA + 2 * M2 + PAGE, PAGE).status == 0  # a mapping cut in two
    assert s.leaves == (0, 2, 0)
    assert s.touch(VA + 2 * M2) == 1
    assert s.process.touch(VA + 2 * M2 + PAGE).status == W.VM_FAULT_SIGSEGV
    assert s.touch(VA + M2) == 2
    s.sound()
    assert s.gmem.close().status == 0
    assert s.leaves == (0, 0, 0)
    s.sound()


def test_madvise_dontneed_drops_the_entry_where_it_is_let() -> None:
    s = Scene(dontneed_on_pfnmap=True)
    assert s.touch(VA) == 2
    assert s.process.madvise_dontneed(VA + 5 * PAGE, PAGE).status == 0
    assert s.leaves == (0, 0, 0)
    assert s.touch(VA) == 2
    assert Scene().process.madvise_dontneed(VA, PAGE).status == -W.EINVAL
    s.sound()


def test_a_large_entry_shows_no_page_that_was_never_zeroed() -> None:
    s = Scene(zero="page")
    assert s.vm.touch(3 * PAGE).status == W.RET_PF_FIXED
    assert s.touch(VA + M2) == 2
    assert s.machine.statistics.event(Event.PAGE_ZEROED, Operation.HOST_FAULT) == 512
    s.sound()


def test_reading_smaps_drops_1g_entries() -> None:
    """As captured of devices: the walk "splits" them, and the notifier tells the VM."""
    s = Scene(page_size=G1)
    assert s.gmem.convert(G1, PAGE, shared=False).status == 0
    assert (s.touch(VA), s.touch(VA + G1 + M2)) == (3, 2)
    assert s.vm.touch(5 * PAGE).detail == 3
    assert s.process.read_smaps().status == 0
    assert s.leaves == (0, 1, 0)
    assert s.vm.leaves() == (0, 0, 0)
    s.sound()


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_without_memory_for_a_table(missing: int) -> None:
    """A 2M entry takes two tables below the top one; those that were made stay."""
    s = Scene()
    s.machine.arrays.state[W.R_FRAMES_LIMIT] = s.machine.statistics.gauge(Gauge.FRAMES_USED) + 2 - missing
    result = s.process.touch(VA)
    assert result == ((W.VM_FAULT_OOM, 0) if missing else (W.VM_FAULT_NOPAGE, 2))
    s.sound()


def test_two_faults_in_one_block_leave_one_entry() -> None:
    """Both found nothing there; the second one to insert finds the first one's entry and leaves it."""
    s = Scene()
    assert s.gmem.allocate(0, M2).status == 0
    for actor in (1, 2):
        s.machine.begin(actor, Operation.HOST_FAULT, address=VA + actor * PAGE)
    for actor in (1, 2):
        for _ in range(2):
            assert s.machine.step(actor) == W.GO
    for actor in (1, 2):
        assert s.machine.step(actor) == W.STOP
        assert s.machine.result(actor) == (W.VM_FAULT_NOPAGE, 2)
    assert s.leaves == (0, 1, 0)
    s.sound()


def test_a_conversion_waits_for_the_entry() -> None:
    s = Scene()
    assert s.gmem.allocate(0, M2).status == 0
    s.machine.begin(1, Operation.HOST_FAULT, address=VA)
    assert [s.machine.step(1) for _ in range(2)] == [W.GO] * 2
    s.machine.begin(2, Operation.CONVERT, flags=Flag.PRIVATE, object_=0, offset=9 * PAGE, length=PAGE)
    assert s.machine.step(2) == W.BLOCKED
    assert s.machine.step(1) == W.STOP
    while s.machine.step(2) == W.GO:
        pass
    assert s.leaves == (0, 0, 0)
    s.sound()


# --------------------------------------------------------------------------- against small entries

PAGES = 2 * 1024
STEPS = st.tuples(
    st.sampled_from(
        ["touch", "touch", "convert", "convert", "zap", "punch", "munmap", "mmap", "guest", "fork", "exit"]
    ),
    st.integers(0, 2),  # process
    st.one_of(st.sampled_from([0, 1, 511, 512, 513, 1023, 1024]), st.integers(0, PAGES - 1)),
    st.one_of(st.sampled_from([1, 2, 511, 512, 513, 1024]), st.integers(1, 600)),
    st.booleans(),
)


class Twin:
    """The same operations with large entries and without."""

    def __init__(self) -> None:
        self.scenes = [Scene(blocks=PAGES // 512, host_huge=huge) for huge in (True, False)]
        self.spaces = [[s.process, s.machine.create_process()] for s in self.scenes]
        for s, spaces in zip(self.scenes, self.spaces, strict=True):
            assert spaces[1].mmap(s.gmem, VA + M2 + PAGE, length=PAGES // 2 * PAGE).status == 0

    def both(self, run: Any) -> None:
        """Run on both machines; the status must be the same."""
        huge, small = (run(s, spaces) for s, spaces in zip(self.scenes, self.spaces, strict=True))
        # What is there already on one may be a fault on the other.
        fine = (0, W.VM_FAULT_NOPAGE)
        assert huge == small or (huge in fine and small in fine), (huge, small)

    def step(self, what: str, who: int, first: int, count: int, flag: bool) -> None:
        who %= len(self.spaces[0])
        address = VA + first * PAGE
        count = min(count, PAGES - first)
        size = count * PAGE
        if what == "touch":
            self.both(lambda s, spaces: spaces[who].touch(address).status)
        elif what == "guest":
            self.both(lambda s, spaces: s.vm.touch(first * PAGE).status > 0)
        elif what == "convert":
            self.both(lambda s, spaces: s.gmem.convert(first * PAGE, size, shared=flag).status)
        elif what == "zap":
            self.both(lambda s, spaces: spaces[who].zap(address, size).status)
        elif what == "punch":
            self.both(lambda s, spaces: s.gmem.punch_hole(first * PAGE, size).status)
        elif what == "munmap":
            self.both(lambda s, spaces: spaces[who].munmap(address, size).status)
        elif what == "mmap":
            self.both(lambda s, spaces: spaces[who].mmap(s.gmem, address, offset=first * PAGE, length=size).status)
        elif what == "fork" and len(self.spaces[0]) < 4:
            for spaces in self.spaces:
                spaces.append(spaces[who].fork())
        elif what == "exit" and who > 0 and len(self.spaces[0]) > 2:
            self.both(lambda s, spaces: spaces.pop(who).exit().status)


@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(STEPS, min_size=5, max_size=25))
def test_large_entries_change_no_result(steps: list[tuple[str, int, int, int, bool]]) -> None:
    """Every page is allowed or refused alike, and every entry is to shared pages, to the inode's own frames."""
    twin = Twin()
    for step in steps:
        twin.step(*step)
        twin.scenes[0].sound()
    twin.scenes[1].sound()
    assert twin.scenes[1].leaves[1:] == (0, 0)
