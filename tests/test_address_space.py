"""Address spaces of processes: random sequences on every kind of memory against nested dictionaries, and some rules."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from model import process as model
from model.process import G1, M2, PAGE
from pgemu.files import Device, GuestMemfd4K, HugetlbFile
from pgemu.machine import Config, Machine
from pgemu.memory import AddressSpace
from pgemu_kernels import formats, layout as L

BASE = 0x7000_0000_0000
BAR = (8 << 30) + 2 * M2  # of no larger alignment than 2M, so that level 3 needs an offset
PRESENT, WRITE, LARGE, PROTNONE = 1, 2, 1 << 7, 1 << 8

# Around boundaries of every level.
starts = st.sampled_from((0, PAGE, M2, 2 * M2, 4 * M2 - PAGE, G1 - M2, G1 - PAGE, G1, G1 + M2, 2 * G1 - 2 * M2, 2 * G1))
lengths = st.sampled_from((PAGE, PAGE, 3 * PAGE, M2 - PAGE, M2, M2, M2 + PAGE, 2 * M2, 4 * M2, G1, 2 * G1))
insides = st.sampled_from((0, 0, PAGE, 2 * PAGE, 511 * PAGE, M2, M2 + PAGE, G1 - M2, G1))
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
        self.pairs = [(self.machine.create_process(), model.Process(self.models, self.pools, self.reclaims))]
        self.files: list[tuple[Any, model.File]] = [
            (self.machine.create_hugetlb_file(G1), model.File("huge", G1 // PAGE, M2)),
            (self.machine.create_hugetlb_file(8 * M2), model.File("huge", 8 * 512, M2)),
            (self.machine.create_hugetlb_file(2 * G1, G1), model.File("huge", 2 * G1 // PAGE, G1)),
            (self.machine.create_device(BAR >> 12, 3 * G1 >> 12), model.File("device", 3 * G1 >> 12, base=BAR >> 12)),
        ]
        if kernel != "6.12":
            self.files.append((self.machine.create_guest_memfd_4k(M2), model.File("gmem", 512)))
        self.steps = 0

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

    @rule(who=numbers, start=starts, inside=insides, write=st.booleans())
    def touch(self, who: int, start: int, inside: int, write: bool) -> None:
        here, there = self.pick(who)
        self.same(here.touch(BASE + start + inside, write=write).status, there.touch(BASE + start + inside, write))

    @rule(who=numbers, start=starts, count=st.integers(1, 6), write=st.booleans())
    def touch_pages(self, who: int, start: int, count: int, write: bool) -> None:
        here, there = self.pick(who)
        for i in range(count):
            at = BASE + start + i * PAGE
            self.same(here.touch(at, write=write).status, there.touch(at, write), check=i == count - 1)

    @rule(who=numbers, start=starts, inside=insides, length=lengths)
    def munmap(self, who: int, start: int, inside: int, length: int) -> None:
        here, there = self.pick(who)
        self.same(here.munmap(BASE + start + inside, length).status, there.munmap(BASE + start + inside, length))

    @rule(who=numbers, start=starts, inside=insides, length=lengths, prot=rights)
    def protect(self, who: int, start: int, inside: int, length: int, prot: int) -> None:
        here, there = self.pick(who)
        at = BASE + start + inside
        self.same(here.protect(at, length, prot).status, there.mprotect(at, length, prot))

    @rule(who=numbers, start=starts, inside=insides, length=lengths)
    def dontneed(self, who: int, start: int, inside: int, length: int) -> None:
        here, there = self.pick(who)
        at = BASE + start + inside
        self.same(here.madvise_dontneed(at, length).status, there.dontneed(at, length))

    @precondition(lambda self: len(self.pairs) < 4)
    @rule(who=numbers)
    def fork(self, who: int) -> None:
        here, there = self.pick(who)
        self.pairs.append((here.fork(), there.fork()))
        self.same(0, 0)

    @precondition(lambda self: len(self.pairs) > 1)
    @rule(who=numbers)
    def exit(self, who: int) -> None:
        here, there = self.pairs.pop(who % len(self.pairs))
        there.exit()
        self.same(here.exit().status, 0)

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
        assert gauge(L.Gauge.HOST_TABLES) == len(tables_of) + tops
        assert gauge(L.Gauge.POOL_FREE) == self.pools[M2].free
        assert gauge(L.Gauge.OTHER_POOL_FREE) == self.pools[G1].free

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
        assert gauge(L.Gauge.HOST_TABLES) == gauge(L.Gauge.ANONYMOUS_PAGES) == gauge(L.Gauge.CACHE_NODES) == 0
        assert gauge(L.Gauge.POOL_FREE) == 6
        assert gauge(L.Gauge.OTHER_POOL_FREE) == 2
        assert self.machine.check() == 0, self.machine.broken


EXAMPLES = os.environ.get("PGEMU_EXAMPLES")
TestProcesses = Processes.TestCase
TestProcesses.settings = settings(
    max_examples=int(EXAMPLES or 80), stateful_step_count=40, deadline=None, derandomize=EXAMPLES is None
)
