"""Address spaces of processes: random sequences on every kind of memory against nested dictionaries, and some rules."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from model import process as model
from model.process import G1, M2, PAGE
from pgemu.objects.address_space import AddressSpace
from pgemu.objects.files import Device, GuestMemfd4K, HugetlbFile
from pgemu.objects.machine import Config, Machine
from pgemu_kernels import words as W
from pgemu_kernels.formats import bits as formats

BASE = 0x7000_0000_0000
BAR = (8 << 30) + 2 * M2  # of no larger alignment than 2M, so that level 3 needs an offset
PRESENT, WRITE, LARGE, PROTNONE = 1, 2, 1 << 7, 1 << 8

# Around boundaries of every level.
starts = st.sampled_from((PAGE, M2, 4 * M2, 5 * M2, 6 * M2 - PAGE, G1 - M2, G1, G1 + M2, 2 * G1, 4 * G1, 5 * G1))
lengths = st.sampled_from((PAGE, PAGE, 3 * PAGE, M2 - PAGE, M2, M2, M2, M2 + PAGE, 2 * M2, 2 * M2, G1))
insides = st.sampled_from((0, 0, 0, PAGE, 2 * PAGE, 511 * PAGE, M2, M2, M2 + PAGE, 2 * M2, G1))
rights = st.sampled_from((0, 1, 3, 3, 3))
numbers = st.integers(0, 7)


def entries(process: AddressSpace) -> tuple[dict[tuple[int, int], int], set[tuple[int, int]]]:
    """Leaves by (address, level), and tables by (address, level of the entry that points to them)."""
    ram = process.machine.arrays.ram
    leaves: dict[tuple[int, int], int] = {}
    tables: set[tuple[int, int]] = set()

    def walk(table: int, level: int, base: int) -> None:
        words = ram[table // 8 : table // 8 + 512]
        for index in words.nonzero()[0].tolist():
            at, entry = base + index * model.SPAN[level], int(words[index])
            if level > 1 and entry & PRESENT and not entry & LARGE:
                tables.add((at, level))
                walk(entry & formats.ADDRESS, level - 1, at)
            else:
                leaves[at, level] = entry

    walk(process.root, 4, 0)
    return leaves, tables


def frame_of(entry: int) -> int:
    word = entry if entry & PRESENT else ~entry
    return (word & formats.ADDRESS) >> 12


class Processes(RuleBasedStateMachine):
    """Up to four processes over two small pools, a device and a guest_memfd of 4K folios."""

    @initialize(kernel=st.sampled_from(("6.12", "6.18", "7.3")), pti=st.booleans(), hvo=st.booleans())
    def boot(self, kernel: str, pti: bool, hvo: bool) -> None:
        self.machine = Machine(
            Config("restructure", pool=6 * M2, page_size=M2, other_pool=2 * G1, kernel=kernel, pti=pti, hvo=hvo)
        )
        self.reclaims = formats.KERNELS[kernel].dontneed_frees_tables
        self.models: list[model.Process] = []
        self.pools = {M2: model.Pool(6), G1: model.Pool(2)}
        first = model.Process(self.models, self.pools, self.reclaims, formats.KERNELS[kernel].merges_unfaulted)
        self.pairs = [(self.machine.create_process(), first)]
        self.files: list[tuple[Any, model.File]] = [
            (self.machine.create_hugetlb_file(G1), model.File("huge", G1 // PAGE, M2)),
            (self.machine.create_hugetlb_file(8 * M2), model.File("huge", 8 * 512, M2)),
            (self.machine.create_hugetlb_file(2 * G1, G1), model.File("huge", 2 * G1 // PAGE, G1)),
            (self.machine.create_device(BAR >> 12, 3 * G1 >> 12), model.File("device", 3 * G1 >> 12, base=BAR >> 12)),
        ]
        if kernel != "6.12":
            self.files.append((self.machine.create_guest_memfd_4k(M2), model.File("gmem", 512)))
        self.steps = 0
        for shared in (True, False):
            self.mmap_file(0, 0 if shared else 1, 4 * G1 if shared else 6 * G1, G1 if shared else 8 * M2, 0, 3, shared)
        self.mmap_anonymous(0, 0, 4 * M2, 3)

    def place(self, who: int, which: int, inside: int) -> tuple[AddressSpace, model.Process, int]:
        """A process, its model, and an address in one of its areas, or where none is."""
        here, there = self.pick(who)
        if not there.areas:
            return here, there, BASE + inside
        area = there.areas[which % len(there.areas)]
        return here, there, area.start + min(inside, area.end - area.start)

    def pick(self, number: int) -> tuple[AddressSpace, model.Process]:
        return self.pairs[number % len(self.pairs)]

    # ------------------------------------------------------------------ rules

    @rule(who=numbers, start=starts, length=lengths, prot=rights)
    def mmap_anonymous(self, who: int, start: int, length: int, prot: int) -> None:
        here, there = self.pick(who)
        expected = there.mmap(BASE + start, length, prot, "anon", False, None, 0)
        self.same(here.mmap_anonymous(BASE + start, length, prot).status, expected)

    @rule(who=numbers, which=numbers, start=starts, length=lengths, offset=insides, prot=rights, shared=st.booleans())
    def mmap_file(self, who: int, which: int, start: int, length: int, offset: int, prot: int, shared: bool) -> None:
        here, there = self.pick(who)
        file, twin = self.files[which % len(self.files)]
        at = BASE + start
        if isinstance(file, HugetlbFile):
            expected = there.mmap(at, length, prot, "huge", shared, twin, offset)
            result = here.mmap_hugetlb(at, length, prot, file=file, offset=offset, shared=shared, noreserve=True)
        elif isinstance(file, Device):
            expected = there.mmap(at, length, prot, "device", True, twin, offset)
            result = here.mmap_device(file, at, length, prot, offset=offset)
        else:
            assert isinstance(file, GuestMemfd4K)
            prot = 1 if prot < 3 else 3
            expected = there.mmap(at, length, prot, "gmem", True, twin, offset)
            result = here.mmap(file, at, offset=offset, length=length, read_only=prot == 1)
        self.same(result.status, expected)

    @rule(who=numbers, which=numbers, inside=insides, write=st.booleans())
    def touch(self, who: int, which: int, inside: int, write: bool) -> None:
        here, there, at = self.place(who, which, inside)
        self.same(here.touch(at, write=write).status, there.touch(at, write))

    @rule(who=numbers, which=numbers, inside=insides, stride=st.sampled_from((PAGE, M2)), write=st.booleans())
    def touch_three(self, who: int, which: int, inside: int, stride: int, write: bool) -> None:
        here, there, at = self.place(who, which, inside)
        for i in range(3):
            status, expected = here.touch(at + i * stride, write=write).status, there.touch(at + i * stride, write)
            self.same(status, expected, check=i == 2)

    @rule(who=numbers, which=numbers, inside=insides, length=lengths)
    def munmap(self, who: int, which: int, inside: int, length: int) -> None:
        here, there, at = self.place(who, which, inside)
        self.same(here.munmap(at, length).status, there.munmap(at, length))

    @rule(who=numbers, which=numbers, inside=insides, length=lengths, prot=rights)
    def protect(self, who: int, which: int, inside: int, length: int, prot: int) -> None:
        here, there, at = self.place(who, which, inside)
        self.same(here.protect(at, length, prot).status, there.mprotect(at, length, prot))

    @rule(who=numbers, which=numbers, inside=insides, length=lengths)
    def dontneed(self, who: int, which: int, inside: int, length: int) -> None:
        here, there, at = self.place(who, which, inside)
        self.same(here.madvise_dontneed(at, length).status, there.dontneed(at, length))

    @precondition(lambda self: len(self.pairs) < 4 and self.steps % 2 == 0)
    @rule(who=numbers)
    def fork(self, who: int) -> None:
        here, there = self.pick(who)
        self.pairs.append((here.fork(), there.fork()))
        self.same(0, 0)

    @precondition(lambda self: len(self.pairs) > 1 and self.steps % 4 == 0)
    @rule(who=numbers)
    def exit(self, who: int) -> None:
        here, there = self.pairs.pop(who % len(self.pairs))
        there.exit()
        self.same(here.exit().status, 0)

    @precondition(lambda self: self.steps % 4 == 0)
    @rule(which=numbers, offset=insides, length=lengths)
    def punch_hole(self, which: int, offset: int, length: int) -> None:
        file, twin = self.files[which % len(self.files)]
        if isinstance(file, Device):
            self.same(file.revoke().status if twin.alive else file.restore().status, 0, check=False)
            if twin.alive:
                model.punch(self.models, twin, 0, twin.pages * PAGE)
            twin.alive = not twin.alive
        else:
            model.punch(self.models, twin, offset, min(offset + length, twin.pages * PAGE))
            self.same(file.punch_hole(offset, length).status, 0, check=False)
        self.same(0, 0)

    # ------------------------------------------------------------------ comparing

    def same(self, status: int, expected: int, check: bool = True) -> None:
        assert status == expected
        self.steps += 1
        if check:
            self.compare()
        if self.steps % 8 == 0:
            assert self.machine.check() == 0, self.machine.broken

    def compare(self) -> None:
        frames: dict[model.Page, int] = {}
        tables_of: dict[int, int] = {}
        for here, there in self.pairs:
            leaves, tables = entries(here)
            seen = set()
            for at, level, entry in there.walk():
                if isinstance(entry, model.Table):
                    assert (at, level) in tables
                    tables.remove((at, level))
                    continue
                seen.add((at, level))
                word = leaves[at, level]
                assert bool(word & PRESENT) != entry.none
                assert bool(word & PROTNONE) == entry.none
                assert bool(word & WRITE) == (entry.writable and not entry.none)
                assert (level > 1) == bool(word & LARGE)
                if entry.page.frame is not None:
                    assert frame_of(word) == entry.page.frame
                assert frames.setdefault(entry.page, frame_of(word)) == frame_of(word)
            assert seen == leaves.keys()
            assert not tables
            for table in (t for _, _, t in there.walk() if isinstance(t, model.Table)):
                tables_of[id(table)] = table.sharers
        memory = [frame for page, frame in frames.items() if page.frame is None]
        assert len(set(memory)) == len(memory)
        tops = len(self.pairs) * (2 if self.machine.config.pti else 1)
        gauge = self.machine.statistics.gauge
        assert gauge(W.Gauge.HOST_TABLES) == len(tables_of) + tops
        assert gauge(W.Gauge.POOL_FREE) == self.pools[M2].free
        assert gauge(W.Gauge.OTHER_POOL_FREE) == self.pools[G1].free

    def teardown(self) -> None:
        if not hasattr(self, "machine"):
            return
        assert self.machine.check() == 0, self.machine.broken
        for here, there in self.pairs:
            there.exit()
            here.exit()
        for file, _ in self.files:
            file.close()
        gauge = self.machine.statistics.gauge
        assert gauge(W.Gauge.HOST_TABLES) == gauge(W.Gauge.ANONYMOUS_PAGES) == gauge(W.Gauge.CACHE_NODES) == 0
        assert gauge(W.Gauge.POOL_FREE) == 6
        assert gauge(W.Gauge.OTHER_POOL_FREE) == 2
        assert self.machine.check() == 0, self.machine.broken


EXAMPLES = os.environ.get("PGEMU_EXAMPLES")
TestProcesses = Processes.TestCase
TestProcesses.settings = settings(
    max_examples=int(EXAMPLES or 80), stateful_step_count=40, deadline=None, derandomize=EXAMPLES is None
)


# --------------------------------------------------------------------------- single rules

RW = 3


def make(**options: Any) -> tuple[Machine, AddressSpace]:
    config = Config("restructure", pool=6 * M2, page_size=M2, other_pool=2 * G1, **options)
    machine = Machine(config)
    return machine, machine.create_process()


def leaf(process: AddressSpace, address: int) -> int:
    """The entry that maps an address, whatever it is."""
    return process.walk(address)[-1][2]


@pytest.mark.parametrize(
    ("address", "length", "status"),
    [
        (BASE + 1, PAGE, -W.EINVAL),
        (BASE, 0, -W.EINVAL),
        (W.TASK_SIZE - PAGE, PAGE, 0),
        (W.TASK_SIZE - PAGE, 2 * PAGE, -W.ENOMEM),
        (W.TASK_SIZE, PAGE, -W.ENOMEM),
        (BASE, (1 << 64) - 1, -W.ENOMEM),
        (BASE, 1, 0),
    ],
)
def test_mmap_checks_its_arguments(address: int, length: int, status: int) -> None:
    _, process = make()
    assert process.mmap_anonymous(int(address), length).status == status


def test_lengths_are_rounded_up_to_pages() -> None:
    _, process = make()
    process.mmap_anonymous(BASE, 3 * PAGE + 1)
    assert process.mmap_anonymous(BASE + 3 * PAGE, PAGE).status == -W.EEXIST
    assert process.munmap(BASE + 3 * PAGE, 1).status == 0
    assert process.mmap_anonymous(BASE + 3 * PAGE, PAGE).status == 0
    assert process.munmap(BASE + 1, PAGE).status == -W.EINVAL
    assert process.munmap(BASE, 0).status == -W.EINVAL
    assert process.munmap(int(W.TASK_SIZE), PAGE).status == -W.EINVAL
    assert process.protect(BASE + 1, PAGE, RW).status == -W.EINVAL
    assert process.protect(BASE + 8 * PAGE, PAGE, RW).status == -W.ENOMEM
    assert process.madvise_dontneed(BASE, 8 * PAGE).status == -W.ENOMEM


def test_neighbours_merge_and_fork_copies_what_the_whole_mapping_has() -> None:
    """A page that was only read is copied by fork if anything in its mapping was written: VMAs merge at mmap."""
    machine, process = make()
    process.mmap_anonymous(BASE, PAGE)
    process.mmap_anonymous(BASE + PAGE, PAGE)
    process.touch(BASE, write=True)
    process.touch(BASE + PAGE)
    child = process.fork()
    assert leaf(child, BASE + PAGE) == leaf(process, BASE + PAGE) & ~(1 << 5)
    process.mmap_anonymous(BASE + 4 * M2, PAGE)  # alone, and only read
    process.touch(BASE + 4 * M2)
    assert process.fork().touch(BASE + 4 * M2).status == W.VM_FAULT_NOPAGE
    assert machine.check() == 0


def test_protection_that_comes_back_merges_what_it_cut() -> None:
    """One MADV_DONTNEED frees a table that lies in one mapping, not one that two mappings share."""
    _, process = make(kernel="6.18")
    process.mmap_anonymous(BASE, 2 * M2)
    process.touch(BASE + M2 + PAGE, write=True)
    process.protect(BASE + M2, PAGE, 1)
    before = process.table_pages
    process.madvise_dontneed(BASE + M2, M2)
    assert process.table_pages == before
    process.touch(BASE + M2 + PAGE, write=True)
    process.protect(BASE + M2, PAGE, RW)
    process.madvise_dontneed(BASE + M2, M2)
    assert process.table_pages.pte == before.pte - 1


def test_after_fork_mprotect_gives_no_write_access_until_a_fault_does() -> None:
    machine, process = make()
    process.mmap_anonymous(BASE, PAGE)
    process.touch(BASE, write=True)
    own = leaf(process, BASE)
    child = process.fork()
    assert leaf(process, BASE) == own & ~(WRITE | 1 << 6) | 1 << 58
    child.exit()
    process.protect(BASE, PAGE, 1)
    process.protect(BASE, PAGE, RW)
    assert not leaf(process, BASE) & WRITE
    assert process.touch(BASE, write=True).status == W.VM_FAULT_NOPAGE
    assert leaf(process, BASE) == own
    process.protect(BASE, PAGE, 1)
    process.protect(BASE, PAGE, RW)
    assert leaf(process, BASE) == own
    assert machine.check() == 0


def test_contents_are_copied_on_write() -> None:
    machine, process = make()
    process.mmap_anonymous(BASE, 2 * PAGE)
    process.touch(BASE, write=True)
    word = frame_of(leaf(process, BASE)) * 512
    machine.arrays.ram[word] = 0x1234
    child = process.fork()
    child.touch(BASE, write=True)
    copy = frame_of(leaf(child, BASE)) * 512
    assert copy != word
    assert machine.arrays.ram[copy] == 0x1234
    process.touch(BASE + PAGE)
    process.touch(BASE + PAGE, write=True)
    fresh = frame_of(leaf(process, BASE + PAGE)) * 512
    assert not machine.arrays.ram[fresh : fresh + 512].any()


def test_hugetlb_contents_are_copied_on_write() -> None:
    machine, process = make()
    process.mmap_hugetlb(BASE, M2, shared=False)
    process.touch(BASE, write=True)
    old = frame_of(leaf(process, BASE))
    machine.write_frame(old + 7, b"hello")
    child = process.fork()
    child.touch(BASE, write=True)
    new = frame_of(leaf(child, BASE))
    assert new != old
    assert machine.read_frame(new + 7)[:5] == b"hello"
    assert machine.read_frame(new + 8) == bytes(PAGE)


def test_reservations_are_kept() -> None:
    """mm/hugetlb.c: a mapping has its pages set aside, and gives back what it did not use."""
    machine, process = make()
    assert process.mmap_hugetlb(BASE, 4 * M2, shared=False).status == 0
    assert process.mmap_hugetlb(BASE + G1, 3 * M2).status == -W.ENOMEM
    assert process.mmap_hugetlb(BASE + G1, 3 * M2, noreserve=True).status == 0
    statuses = [process.touch(BASE + G1 + i * M2, write=True).status for i in range(3)]
    assert statuses == [W.VM_FAULT_NOPAGE, W.VM_FAULT_NOPAGE, W.VM_FAULT_SIGBUS]
    assert [process.touch(BASE + i * M2, write=True).status for i in range(4)] == [W.VM_FAULT_NOPAGE] * 4
    assert machine.check() == 0
    process.munmap(BASE, 4 * M2)
    assert process.touch(BASE + G1 + 2 * M2).status == W.VM_FAULT_NOPAGE
    assert machine.hugetlb(M2).resv_hugepages == 0
    assert machine.check() == 0


def test_a_file_reserves_each_page_once() -> None:
    machine, process = make()
    file = machine.create_hugetlb_file(6 * M2)
    assert process.mmap_hugetlb(BASE, file=file).status == 0
    assert process.mmap_hugetlb(BASE + G1, file=file).status == 0
    assert machine.hugetlb(M2).resv_hugepages == 6
    assert process.touch(BASE, write=True).status == W.VM_FAULT_NOPAGE
    assert machine.hugetlb(M2).resv_hugepages == 5
    assert machine.create_process().mmap_hugetlb(BASE, M2).status == -W.ENOMEM
    file.punch_hole(0, M2)
    assert machine.check() == 0
    process.exit()
    file.close()
    assert machine.hugetlb(M2).resv_hugepages == 0
    assert machine.statistics.gauge(W.Gauge.POOL_FREE) == 6
    assert machine.check() == 0


def test_processes_share_a_table_of_a_file() -> None:
    machine, process = make()
    file = machine.create_hugetlb_file(G1)
    other = machine.create_process()
    for each in (process, other):
        each.mmap_hugetlb(BASE, file=file, noreserve=True)
    tables = machine.statistics.gauge(W.Gauge.HOST_TABLES)
    process.touch(BASE, write=True)
    assert other.touch(BASE + M2, write=True).status == W.VM_FAULT_NOPAGE
    assert other.touch(BASE).status == 0  # came with the table
    assert process.walk(BASE)[1][2] == other.walk(BASE)[1][2]
    assert machine.statistics.gauge(W.Gauge.HOST_TABLES) == tables + 3
    assert process.table_pages == other.table_pages == (1, 1, 0)
    other.munmap(BASE, M2)
    assert other.table_pages == (1, 0, 0)
    assert process.touch(BASE + M2).status == 0
    assert machine.check() == 0


def test_reading_smaps_drops_1g_entries_of_devices() -> None:
    machine, process = make()
    device = machine.create_device(8 << 18, 2 << 18)
    process.mmap_device(device, BASE)
    process.mmap_device(device, BASE + 8 * G1 + M2, offset=M2, length=M2)
    assert process.touch(BASE + G1).detail == 3
    assert process.touch(BASE + 8 * G1 + M2).detail == 2
    process.read_smaps()
    assert process.touch(BASE + G1).status == W.VM_FAULT_NOPAGE
    assert process.touch(BASE + 8 * G1 + M2).status == 0
    assert machine.check() == 0


def test_user_and_kernel_copies_of_the_top_entries() -> None:
    machine, process = make(pti=True)
    process.mmap_anonymous(BASE, PAGE)
    process.touch(BASE, write=True)
    at = (BASE >> 39) * 8
    kernel, user = (int(machine.arrays.ram[(root + at) // 8]) for root in (process.root, process.user_root))
    assert kernel == user | 1 << 63
    process.munmap(BASE, PAGE)
    assert not any(machine.arrays.ram[(root + at) // 8] for root in (process.root, process.user_root))


def test_guest_memfd_flags() -> None:
    machine, process = make()
    plain = machine.create_guest_memfd_4k(M2, mmap=False, init_shared=False)
    assert process.mmap(plain, BASE).status == -W.ENODEV
    private = machine.create_guest_memfd_4k(M2, init_shared=False)
    assert process.mmap(private, BASE).status == 0
    assert process.touch(BASE).status == W.VM_FAULT_SIGBUS
    assert process.table_pages == (1, 1, 0)
    with pytest.raises(OSError, match="has no flags"):
        make(kernel="6.12")[0].create_guest_memfd_4k(M2)


def everything(machine: Machine, process: AddressSpace) -> None:
    """A little of each kind of memory, whatever fails on the way."""
    process.mmap_anonymous(BASE, 4 * M2)
    for i in range(6):
        process.touch(BASE + i * M2 // 2, write=i % 2 == 0)
    process.mmap_hugetlb(BASE + G1, 2 * M2, shared=False)
    process.touch(BASE + G1, write=True)
    process.mmap_hugetlb(BASE + 2 * G1, 2 * M2)
    process.touch(BASE + 2 * G1)
    process.mmap(machine.create_guest_memfd_4k(M2), BASE + 3 * G1)
    process.touch(BASE + 3 * G1, write=True)
    process.mmap_device(machine.create_device(1 << 20, 512, remap=True), BASE + 4 * G1)
    process.mmap_device(machine.create_device((1 << 20) + 1, 512), BASE + 512 * G1)
    process.touch(BASE + 512 * G1)
    process.remap(BASE + M2 // 2, M2, M2, BASE + 600 * G1 + PAGE)
    process.remap(BASE, M2 // 2, M2 // 2, BASE + 1200 * G1)
    try:
        child = process.fork()
    except OSError:
        return
    child.touch(BASE, write=True)
    child.touch(BASE + G1, write=True)
    process.protect(BASE, M2, 1)
    process.munmap(BASE + M2, M2)


def test_memory_may_run_out_anywhere() -> None:
    """At every number of frames: no rule broken, and nothing lost once all is over."""
    needed = make()[0].statistics.gauge(W.Gauge.FRAMES_USED)
    for limit in range(needed + 1, needed + 70):
        machine, process = make(frames=limit)
        everything(machine, process)
        assert machine.check() == 0, (limit, machine.broken)
        for space in range(machine.register(W.R_SPACES)):
            AddressSpace(machine, space).exit()
        gauge = machine.statistics.gauge
        assert gauge(W.Gauge.HOST_TABLES) == gauge(W.Gauge.ANONYMOUS_PAGES) == 0
        assert machine.check() == 0, (limit, machine.broken)


def test_mremap_moves_pages_and_tables() -> None:
    machine, process = make()
    process.mmap_anonymous(BASE, 2 * M2)
    process.touch(BASE + PAGE, write=True)
    process.touch(BASE + M2, write=True)
    entries_before = leaf(process, BASE + PAGE), leaf(process, BASE + M2)
    tables = process.table_pages
    assert process.remap(BASE, 2 * M2, 2 * M2, BASE + 4 * M2).status == 0
    assert (leaf(process, BASE + 4 * M2 + PAGE), leaf(process, BASE + 5 * M2)) == entries_before
    assert process.table_pages == tables
    assert process.touch(BASE).status == W.VM_FAULT_SIGSEGV
    assert process.remap(BASE + 4 * M2, M2, M2, BASE + PAGE).status == 0
    assert leaf(process, BASE + 2 * PAGE) == entries_before[0]
    assert process.remap(BASE + 5 * M2, M2, PAGE).status == 0
    assert process.remap(BASE + 5 * M2, PAGE, 2 * M2).status == 0
    assert process.touch(BASE + 7 * M2 - PAGE, write=True).status == W.VM_FAULT_NOPAGE
    assert process.remap(BASE + 5 * M2, M2, M2, BASE + 5 * M2 + PAGE).status == -W.EINVAL
    assert process.remap(BASE + 50 * M2, M2, M2).status == -W.EFAULT
    process.mmap_hugetlb(BASE + G1, M2)
    assert process.remap(BASE + G1, M2, 2 * M2).status == -W.EOPNOTSUPP
    assert machine.check() == 0
    process.munmap(BASE, 2 * G1)
    assert process.table_pages == (0, 0, 0)
    assert machine.check() == 0


def test_guards_stay_until_they_are_removed_or_unmapped() -> None:
    machine, process = make()
    process.mmap_anonymous(BASE, 4 * PAGE)
    process.touch(BASE, write=True)
    assert process.guard_install(BASE, 2 * PAGE).status == 0
    assert process.rss == 0
    assert process.touch(BASE).status == W.VM_FAULT_SIGSEGV
    process.madvise_dontneed(BASE, 4 * PAGE)
    assert process.touch(BASE + PAGE, write=True).status == W.VM_FAULT_SIGSEGV
    assert process.fork().touch(BASE).status == W.VM_FAULT_SIGSEGV
    assert process.populate(BASE, PAGE).status == -W.EFAULT
    assert process.guard_remove(BASE, PAGE).status == 0
    assert process.touch(BASE).status == W.VM_FAULT_NOPAGE
    assert process.guard_install(BASE, 5 * PAGE).status == -W.ENOMEM
    process.munmap(BASE, 4 * PAGE)
    assert process.table_pages == (0, 0, 0)
    assert machine.check() == 0
    _, older = make(kernel="6.12")
    older.mmap_anonymous(BASE, PAGE)
    assert older.guard_install(BASE, PAGE).status == -W.EINVAL


@pytest.mark.parametrize("design", ["restructure", "pfnmap"])
def test_mappings_of_the_designs_beside_ordinary_ones(design: Any) -> None:
    machine = Machine(Config(design, pool=4 * M2, page_size=M2))
    process, gmem = machine.create_process(), machine.create_guest_memfd(2 * M2, shared=True)
    # The row of the mapping that went is used again.
    process.mmap_anonymous(BASE, PAGE)
    process.munmap(BASE, PAGE)
    assert process.mmap(gmem, BASE).status == 0
    process.touch(BASE, write=True)
    first = gmem.pfn(0)
    assert first is not None
    assert leaf(process, BASE) & formats.ADDRESS == first << 12
    # A folio of a file counts, mm/memory.c:set_pte_range(); a special entry does not, insert_pfn().
    assert process.rss == (0 if design == "pfnmap" else 1)
    before = leaf(process, BASE)
    assert process.protect(BASE, PAGE, 1).status == 0
    assert leaf(process, BASE) & formats.WRITE == 0
    assert process.protect(BASE, PAGE, 3).status == 0
    assert leaf(process, BASE) == before
    expected = -W.EINVAL if design == "pfnmap" else 0  # VM_PFNMAP refuses it, whatever else the process maps
    assert process.madvise_dontneed(BASE, 2 * M2).status == expected
    assert (leaf(process, BASE) == before) == (design == "pfnmap")
    assert process.touch(BASE + PAGE).status != 0
    assert machine.check() == 0
    assert process.munmap(BASE, 2 * M2).status == 0
    assert process.table_pages == (0, 0, 0)
    assert machine.check() == 0


def test_arguments_that_no_system_call_takes() -> None:
    machine, process = make()
    assert process.mmap_hugetlb(BASE, 0).status == -W.EINVAL
    device = machine.create_device(8 << 18, 2)
    assert process.mmap_device(device, BASE, offset=3 * PAGE).status == -W.EINVAL
    file = machine.create_hugetlb_file(M2)
    assert process.mmap_hugetlb(BASE, file=file, offset=2 * M2).status == -W.EINVAL
    for address in (-1, 1 << 64):
        with pytest.raises(ValueError, match="address"):
            process.touch(address)
    assert process.touch_many([]).status.tolist() == []
    assert process.touch_many([PAGE, 0xFFFF_8000_0000_0000]).status.tolist() == [W.VM_FAULT_SIGSEGV] * 2
    vm = machine.create_vm(process)
    for gpas in ([1.5], [-1]):
        with pytest.raises(ValueError, match="expected a sequence or array of integers"):
            vm.touch_many(gpas)
    assert vm.touch_many(gpa for gpa in (0, PAGE)).status.tolist() == [W.RET_PF_EMULATE] * 2


def test_a_record_of_a_write_and_a_fetch_is_a_write() -> None:
    machine = Machine(Config())
    process = machine.create_process()
    assert process.mmap_anonymous(0x1000_0000, W.PAGE_4K).status == 0
    both = int(W.Flag.WRITE | W.Flag.EXEC)
    faults = [
        machine.operate(W.Operation.HOST_FAULT, flags=both, space=process.space, address=0x1000_0000).status
        for _ in range(2)
    ]
    assert faults == [W.VM_FAULT_NOPAGE, 0]  # the entry that the first one made serves the second
    assert process.rss == 1
    assert machine.check() == 0


def test_an_ended_process_maps_nothing() -> None:
    machine = Machine(Config("pfnmap", pool=2 * M2, page_size=M2))
    gmem = machine.create_guest_memfd(M2, shared=True)
    process = machine.create_process()
    assert process.exit().status == 0
    assert process.mmap(gmem, 0x4000_0000).status == -W.EINVAL
    child = machine.create_process()  # takes the row of the one that ended
    assert child.mmap(gmem, 0x4000_0000).status == 0
    assert machine.check() == 0


def test_a_closed_vm_binds_nothing() -> None:
    machine = Machine(Config("pfnmap", pool=2 * M2, page_size=M2))
    gmem = machine.create_guest_memfd(M2)
    vm = machine.create_vm(machine.create_process())
    assert vm.close().status == 0
    assert vm.bind(gmem, 0).status == -W.EBADF
    assert vm.touch(0).detail == 0
    assert machine.check() == 0


def test_a_mapping_is_private_or_shared_not_both() -> None:
    machine = Machine(Config())
    process = machine.create_process()
    both = int(W.Flag.PRIVATE | W.Flag.SHARED | W.Flag.READ)
    refused = machine.operate(
        W.Operation.MMAP, flags=both, space=process.space, object_=int(W.NO_INODE), address=0x1000_0000, length=PAGE
    )
    assert refused.status == -W.EINVAL


def test_a_record_maps_anonymous_memory_on_a_machine_that_had_none() -> None:
    machine = Machine(Config())
    process = machine.create_process()
    flags = int(W.Flag.PRIVATE | W.Flag.READ | W.Flag.WRITE)
    mapped = machine.operate(
        W.Operation.MMAP, flags=flags, space=process.space, object_=int(W.NO_INODE), address=0x1000_0000, length=PAGE
    )
    assert mapped.status == 0
    assert process.touch(0x1000_0000, write=True).status == W.VM_FAULT_NOPAGE
    assert machine.check() == 0


@pytest.mark.parametrize("design", ["restructure", "pfnmap"])
def test_mremap_of_nothing_onto_itself_has_no_mapping_to_show(design: Any) -> None:
    """mremap_to() unmaps the new place before it looks for what is to be shown once more: vma_lookup(), -EFAULT."""
    machine = Machine(Config(design, pool=M2, page_size=M2))
    process, gmem = machine.create_process(), machine.create_guest_memfd(M2, shared=True)
    for anonymous in (False, True):
        if anonymous:
            assert process.mmap_anonymous(BASE, M2, shared=True).status == 0
        else:
            assert process.mmap(gmem, BASE).status == 0
        process.touch(BASE)
        assert process.remap(BASE + PAGE, 0, new_length=2 * PAGE, new_address=BASE + PAGE).status == -W.EFAULT
        assert machine.check() == 0
        process.munmap(BASE, M2)
