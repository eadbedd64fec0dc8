"""Transparent huge pages of anonymous memory: against dictionaries (tests/model/huge_memory.py), and by hand.

After each step every entry is where the model has one, of its level, as writable, of the same page; what was written is
still there; and the recount finds each count and reference of the folios' struct pages right.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings, strategies as st

from model.huge_memory import BLOCK, HUGE_ZERO, ZERO, Area, Memory, Owner, Page, Space
from pgemu.objects.address_space import AddressSpace
from pgemu.objects.machine import Config, Machine
from pgemu_kernels import words as W
from pgemu_kernels.formats import bits

PAGE, M2 = W.PAGE_4K, W.PAGE_2M
BASE = 0x7100_0000_0000  # page 0 of the model
LEAD, BLOCKS, REST = 3, 3, 5  # pages before the first whole block, whole blocks, pages behind the last
SIZE = LEAD + BLOCKS * BLOCK + REST
MOVED = 1 << 14  # first page of where mremap() moves to
HUGE_PAGES = 4
KERNELS = ("6.12", "6.18", "7.3")

edges = st.sampled_from(sorted({-LEAD, -1, *(b * BLOCK + d for b in range(BLOCKS + 1) for d in (-1, 0, 1, 200))}))
lengths = st.sampled_from([1, 2, 60, 256, BLOCK, BLOCK + 1, 2 * BLOCK])
steps = st.one_of(
    st.tuples(st.just("touch"), edges, st.booleans(), st.booleans()),
    st.tuples(st.just("protect"), edges, lengths, st.sampled_from([0, 1, 3, 3])),
    st.tuples(st.just("advise"), edges, lengths, st.sampled_from(["yes", "no"])),
    st.tuples(st.sampled_from(["dontneed", "unmap", "collapse"]), edges, lengths),
    st.tuples(st.just("remap"), edges, lengths, st.sampled_from([0, BLOCK, 200, BLOCK + 1])),
    st.tuples(st.sampled_from(["fork", "switch", "exit"])),
)


class Pair:
    """A machine and the model of it. `now` is the process that the next step is about."""

    def __init__(self, kernel: str, thp: str) -> None:
        self.machine = Machine(Config("restructure", buddy=HUGE_PAGES * M2, thp=thp, kernel=kernel))  # type: ignore[arg-type]
        self.model = Memory(HUGE_PAGES, thp == "always", kernel == "6.12", kernel != "7.3")
        self.processes = [self.machine.create_process()]
        self.model.spaces = [Space()]
        self.now = 0
        self.written = 0
        assert self.process.mmap_anonymous(BASE - LEAD * PAGE, SIZE * PAGE).status == 0
        area = Area(3, "none", object(), 0)
        self.space.areas = dict.fromkeys(range(-LEAD, SIZE - LEAD), area)
        self.touch(-LEAD, True)

    @property
    def process(self) -> AddressSpace:
        return self.processes[self.now]

    @property
    def space(self) -> Space:
        return self.model.spaces[self.now]

    # ------------------------------------------------------------------ steps

    def touch(self, page: int, write: bool, moved: bool = False) -> None:
        page += MOVED if moved else 0
        self.written += 1
        status = self.process.touch(BASE + page * PAGE, write=write).status
        assert status == self.model.touch(self.space, page, write, self.written)
        if write and status != W.VM_FAULT_SIGSEGV:
            self.store(self.pfn_of(page), self.written)

    def on_range(self, call: Callable[..., Any], model: Callable[..., int], first: int, count: int, *more: Any) -> None:
        status = call(BASE + first * PAGE, count * PAGE, *more[:1]).status
        assert status == model(self.space, first, count, *more[1:])

    def step(self, name: str, *words: Any) -> None:
        process, model = self.process, self.model
        if name == "touch":
            self.touch(*words)
        elif name == "protect":
            self.on_range(process.protect, model.protect, *words, words[-1])
        elif name == "advise":
            call = process.madvise_hugepage if words[-1] == "yes" else process.madvise_nohugepage
            status = call(BASE + words[0] * PAGE, words[1] * PAGE).status
            assert status == model.advise(self.space, *words)
        elif name == "dontneed":
            self.on_range(process.madvise_dontneed, model.dontneed, *words)
        elif name == "unmap":
            self.on_range(process.munmap, model.unmap, *words)
        elif name == "collapse":
            self.on_range(process.madvise_collapse, model.collapse, *words)
        elif name == "remap":
            self.remap(*words)
        else:
            getattr(self, name)()

    def remap(self, first: int, count: int, to: int) -> None:
        """Where one VMA has all of it; other ranges are for test_shmem.py."""
        if len(list(self.space.pieces(first, count))) != 1 or self.space.has_hole(first, count):
            return
        target = MOVED + to
        status = self.process.remap(BASE + first * PAGE, count * PAGE, count * PAGE, BASE + target * PAGE).status
        assert status == self.model.remap(self.space, first, count, target)

    def fork(self) -> None:
        if len(self.processes) == 1:
            self.processes.append(self.process.fork())
            self.model.fork(self.space)

    def switch(self) -> None:
        self.now = len(self.processes) - 1 - self.now

    def exit(self) -> None:
        if len(self.processes) == 2:
            assert self.processes.pop().exit().status == 0
            self.model.spaces.pop()
            self.now = 0

    # ------------------------------------------------------------------ frames

    def store(self, pfn: int, value: int) -> None:
        if pfn < self.machine.register(W.R_FRAMES):
            self.machine.arrays.ram[pfn * 512] = value
        else:
            self.machine.write_frame(pfn, struct.pack("<Q", value))

    def load(self, pfn: int) -> int:
        if pfn < self.machine.register(W.R_FRAMES):
            return int(self.machine.arrays.ram[pfn * 512])
        return int(struct.unpack("<Q", self.machine.read_frame(pfn)[:8])[0])

    def pfn_of(self, page: int) -> int:
        level, _, entry = self.process.walk(BASE + page * PAGE)[-1]
        return pfn(entry, level) + (page % BLOCK if level == 2 else 0)

    # ------------------------------------------------------------------ comparing

    def compare(self) -> None:
        firsts: dict[Owner, int] = {
            ZERO: self.machine.register(W.R_ZERO_FRAME), HUGE_ZERO: self.machine.register(W.R_HUGE_ZERO_FRAME)
        }  # fmt: skip
        for process, space in zip(self.processes, self.model.spaces, strict=True):
            here, tables = walk(process)
            assert tables == space.tables
            leaves = {(key, 1): leaf for key, leaf in space.entries.items()}
            leaves |= {(key * BLOCK, 2): leaf for key, leaf in space.huge.items()}
            assert here.keys() == leaves.keys()
            for (page, level), leaf in leaves.items():
                entry = here[page, level]
                prot = space.areas[page].prot
                assert bool(entry & bits.PRESENT) == bool(prot), (page, hex(entry))
                assert bool(entry & bits.WRITE) == leaf.writable, (page, hex(entry))
                first = pfn(entry, level) - leaf.page.number
                assert firsts.setdefault(leaf.page.owner, first) == first, page
            rss = sum(leaf.page.owner is not ZERO for leaf in space.entries.values())
            rss += BLOCK * sum(leaf.page.owner is not HUGE_ZERO for leaf in space.huge.values())
            assert process.rss == rss
        assert len(set(firsts.values()) - {0}) == len(firsts) - list(firsts.values()).count(0)
        mapped = {
            Page(leaf.page.owner, leaf.page.number) for space in self.model.spaces for leaf in space.entries.values()
        }
        for shown, value in self.model.contents.items():
            whole = any(leaf.page.owner is shown.owner for space in self.model.spaces for leaf in space.huge.values())
            if whole or shown in mapped:
                assert self.load(firsts[shown.owner] + shown.number) == value
        assert self.machine.check() == 0, self.machine.broken


def pfn(entry: int, level: int) -> int:
    """First frame of a leaf."""
    word = entry if entry & bits.PRESENT else ~entry
    return ((word & bits.ADDRESS) >> 12) & (-BLOCK if level == 2 else -1)


def walk(process: AddressSpace) -> tuple[dict[tuple[int, int], int], set[int]]:
    """Leaves by (page, level), and the blocks that have a table."""
    leaves: dict[tuple[int, int], int] = {}
    tables: set[int] = set()
    ram = process.machine.arrays.ram

    def visit(table: int, level: int, base: int) -> None:
        words = ram[table >> 3 : (table >> 3) + 512]
        for index in words.nonzero()[0].tolist():
            address, entry = base + (index << 12 + 9 * (level - 1)), int(words[index])
            if level > 1 and entry & (bits.PRESENT | bits.LARGE) == bits.PRESENT:
                if level == 2:
                    tables.add((address - BASE) // M2)
                visit(entry & bits.ADDRESS, level - 1, address)
            else:
                leaves[(address - BASE) // PAGE, level] = entry

    visit(process.root, 4, 0)
    return leaves, tables


@settings(max_examples=60, deadline=None)
@example("7.3", "always", [("touch", 0, True, False), ("unmap", 1, 1), ("fork",), ("touch", 5, True, False), ("exit",)])
@example("6.12", "always", [("touch", 0, False, False), ("touch", 1, True, False), ("collapse", 0, BLOCK)])
@given(st.sampled_from(KERNELS), st.sampled_from(["always", "madvise"]), st.lists(steps, max_size=14))
def test_every_entry_and_count_is_the_model_s(kernel: str, thp: str, operations: list[tuple[Any, ...]]) -> None:
    pair = Pair(kernel, thp)
    for name, *words in operations:
        pair.step(name, *words)
        pair.compare()


# --------------------------------------------------------------------------- by hand


def made(**more: Any) -> tuple[Machine, AddressSpace]:
    machine = Machine(Config("restructure", **{"buddy": 4 * M2, "thp": "always", **more}))
    process = machine.create_process()
    assert process.mmap_anonymous(BASE, 4 * M2).status == 0
    return machine, process


def test_never_is_the_default_and_faults_4k() -> None:
    machine = Machine(Config("restructure", buddy=4 * M2))
    process = machine.create_process()
    process.mmap_anonymous(BASE, M2)
    assert process.touch(BASE, write=True).detail == 1
    assert machine.vmstat()["thp_fault_alloc"] == machine.vmstat()["thp_fault_fallback"] == 0


@pytest.mark.parametrize("thp", ["madvise", "always"])
def test_huge_pages_need_memory_that_they_can_come_from(thp: str) -> None:
    with pytest.raises(ValueError, match=rf"^thp '{thp}' with no memory for huge pages: expected buddy memory"):
        Config("restructure", pool=M2, page_size=M2, thp=thp)  # type: ignore[arg-type]
    assert Config("restructure", pool=M2, page_size=PAGE, thp=thp).thp == thp  # type: ignore[arg-type]


def test_without_a_huge_page_left_faults_get_4k_and_are_counted() -> None:
    machine, process = made(buddy=2 * M2)
    levels = [process.touch(BASE + i * M2, write=True).detail for i in range(4)]
    assert levels == [2, 2, 1, 1]
    counted = machine.vmstat()
    assert (counted["thp_fault_alloc"], counted["thp_fault_fallback"]) == (2, 2)
    assert counted["nr_anon_pages"] == 2 * 512 + 2
    assert machine.meminfo()["AnonHugePages"] == 2 * 2048
    assert process.munmap(BASE, M2).status == 0
    assert machine.vmstat()["nr_anon_transparent_hugepages"] == 1
    assert machine.check() == 0


def test_a_part_that_is_unmapped_keeps_the_folio_and_waits_for_its_split() -> None:
    """mm/rmap.c:__folio_remove_rmap(): the flag of the second struct page, counted once."""
    machine, process = made()
    process.touch(BASE, write=True)
    head = pfn(process.walk(BASE)[-1][2], 2)
    free = machine.statistics.gauge(W.Gauge.BUDDY_BLOCKS)
    for page in (1, 2):
        assert process.madvise_dontneed(BASE + page * PAGE, PAGE).status == 0
    assert int(machine.struct_page(head + 1)[0]) & 1 << 16
    assert machine.vmstat()["thp_deferred_split_page"] == machine.vmstat()["thp_split_pmd"] == 1
    assert int(machine.struct_page(head)[6]) >> 32 == 510  # a reference for each page that is mapped
    assert process.munmap(BASE, M2).status == 0
    assert machine.statistics.gauge(W.Gauge.BUDDY_BLOCKS) == free + 1


def test_a_whole_folio_of_4k_entries_that_goes_at_once_waits_for_nothing() -> None:
    """mm/memory.c:zap_present_folio_ptes(): a batch is of one VMA, so two of them are two."""
    for vmas, waited in ((1, 0), (2, 1)):
        machine, process = made()
        process.touch(BASE, write=True)
        process.protect(BASE, PAGE, 1)
        process.protect(BASE, PAGE, 3 if vmas == 1 else 1)
        assert process.munmap(BASE, M2).status == 0
        assert machine.vmstat()["thp_deferred_split_page"] == waited
    assert machine.check() == 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_level_of_stage_2_follows_the_host_s_leaf(kernel: str) -> None:
    """A slot over 2M leaves, congruent to them: 2M until the leaf is split, then 4K."""
    machine, process = made(kernel=kernel)
    vm = machine.create_vm(process)
    assert vm.set_memory_region(0, 0, 4 * M2, BASE).status == 0
    assert vm.touch(5 * PAGE, write=True).detail == 2
    assert vm.touch(M2 + PAGE).detail == 2  # the huge zero page
    assert process.madvise_dontneed(BASE, PAGE).status == 0
    assert vm.leaves() == (0, 1, 0)
    assert vm.touch(5 * PAGE).detail == 1
    assert machine.check() == 0


def test_collapse_works_whatever_faults_get_and_says_why_not() -> None:
    machine = Machine(Config("restructure", buddy=M2))
    process = machine.create_process()
    assert process.mmap_anonymous(BASE, 2 * M2).status == 0
    assert process.madvise_collapse(BASE, M2).status == -W.EINVAL  # never written
    process.touch(BASE + 7 * PAGE, write=True)
    assert process.madvise_collapse(BASE, M2).status == 0
    assert process.walk(BASE)[-1][0] == 2
    assert process.rss == 512
    process.touch(BASE + M2, write=True)
    assert process.madvise_collapse(BASE + M2, M2).status == -W.ENOMEM
    assert process.madvise_collapse(BASE + 4 * M2, M2).status == -W.ENOMEM  # no mapping
    assert process.madvise_nohugepage(BASE, M2).status == 0
    assert process.madvise_collapse(BASE, M2).status == -W.EINVAL
    assert machine.check() == 0


def test_a_split_finds_a_broken_count() -> None:
    """The recount looks at each page's own mapcount."""
    machine, process = made()
    process.touch(BASE, write=True)
    process.protect(BASE, PAGE, 1)
    head = pfn(process.walk(BASE)[-1][2], 1)
    page = machine.struct_page(head + 9)
    assert machine.check() == 0
    machine.arrays.ram[np_index(machine, head + 9) + 6] = int(page[6]) + 1
    assert machine.check() != 0


def np_index(machine: Machine, frame: int) -> int:
    """Index in `ram` of a struct page, through the kernel's table."""
    from pgemu.tables.walk import walk_page

    address = int(machine.register(W.R_VMEMMAP)) + frame * 64
    level, _, entry = walk_page(machine, machine.host_format, machine.register(W.R_KERNEL_ROOT), address >> 12)[-1]
    size = PAGE << 9 * (level - 1)
    return ((entry & bits.ADDRESS & -size) + address % size) >> 3
