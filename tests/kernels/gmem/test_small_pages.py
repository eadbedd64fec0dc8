"""guest_memfd of 4K folios (page_size 4096) in both designs: allocator, faults, conversion, truncation, policies."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from machines import assert_same
from pgemu.machine.designs import DESIGNS
from pgemu.objects.guest_memfd import GuestMemfd
from pgemu.objects.machine import Config, Machine, Result
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Event, Gauge
from pgemu_kernels.words.operations import Operation

PAGE, M2 = W.PAGE_4K, W.PAGE_2M
VA = 0x7F00_0000_0000
GPA = 1 << 32
POISON = [0xDEAD_0000_0000_0100, 0xDEAD_0000_0000_0122]


class Scene:
    """One inode, mapped by a process and bound to its VM."""

    def __init__(
        self, design: str = "restructure", *, pages: int = 64, shared: bool = True, pool: int = 2 * M2, **more: Any
    ) -> None:
        self.machine = Machine(Config(design, pool=pool, page_size=PAGE, **more))  # type: ignore[arg-type]
        self.machine.check_each()
        self.gmem = self.machine.create_guest_memfd(pages * PAGE, shared=shared)
        self.process = self.machine.create_process()
        self.vm = self.machine.create_vm(self.process, protected=True)
        assert self.vm.bind(self.gmem, GPA).status == 0
        assert self.process.mmap(self.gmem, VA).status == 0

    def host(self, page: int) -> int:
        return self.process.touch(VA + page * PAGE, write=True).status

    def guest(self, page: int) -> Result:
        return self.vm.touch(GPA + page * PAGE)

    def gauge(self, gauge: Gauge) -> int:
        return self.machine.statistics.gauge(gauge)

    def words(self, pfn: int) -> list[int]:
        return [int(word) for word in self.machine.struct_page(pfn)]

    def sound(self) -> None:
        assert self.machine.check() == 0, self.machine.broken


class Buddies:
    """A buddy allocator of whole 2M blocks as mm/page_alloc.c's: sets of first pages by order, last in first out.

    In front of it a list of single pages, last in first out, too, from whose other end 63 leave when 252 are in it.
    """

    def __init__(self, base: int, blocks: int) -> None:
        self.blocks = sorted(base + 512 * i for i in range(blocks))
        self.free: list[list[int]] = [[] for _ in range(9)]
        self.waiting: list[int] = []

    def take(self) -> int | None:
        if self.waiting:
            return self.waiting.pop()
        order = next((order for order, pages in enumerate(self.free) if pages), None)
        if order is None:
            if not self.blocks:
                return None
            page, order = self.blocks.pop(0), 9
        else:
            page = self.free[order].pop()
        for lower in reversed(range(order)):
            self.free[lower].append(page + (1 << lower))
        return page

    def put(self, page: int) -> None:
        self.waiting.append(page)
        if len(self.waiting) == 252:
            for oldest in self.waiting[:63]:
                self.join(oldest)
            del self.waiting[:63]

    def join(self, page: int) -> None:
        order = 0
        while order < 9 and page ^ 1 << order in self.free[order]:
            self.free[order].remove(page ^ 1 << order)
            page &= ~(1 << order)
            order += 1
        if order < 9:
            self.free[order].append(page)
        else:
            self.blocks = sorted([*self.blocks, page])


# --------------------------------------------------------------------------- boot and the page allocator


@pytest.mark.parametrize("kernel", ["6.12", "6.18", "7.3"])
@pytest.mark.parametrize("hvo", [True, False])
def test_boot_leaves_whole_free_blocks(kernel: str, hvo: bool) -> None:
    machine = Machine(Config("pfnmap", pool=3 * M2, page_size=PAGE, kernel=kernel, hvo=hvo))
    base = machine.register(W.R_POOL_BASE)
    assert machine.statistics.gauge(Gauge.POOL_FREE) == 3 * 512
    assert machine.statistics.gauge(Gauge.BUDDY_BLOCKS) == 3
    for block in range(3):
        words = [int(word) for word in machine.struct_page(base + 512 * block)]
        assert words[5] == 9
        assert words[6] == 0xF000_0000
    assert [int(word) for word in machine.struct_page(base + 1)][5:7] == [0, 0xFFFF_FFFF]
    assert machine.meminfo()["HugePages_Total"] == 0
    assert machine.check() == 0, machine.broken


@pytest.mark.parametrize("kernel", ["6.12", "6.18", "7.3"])
def test_struct_pages_of_a_folio_and_of_what_is_free_beside_it(kernel: str) -> None:
    scene = Scene("restructure", kernel=kernel)
    assert scene.guest(3).status == W.RET_PF_FIXED
    pfn = scene.gmem.pfn(3 * PAGE)
    assert pfn == scene.machine.register(W.R_POOL_BASE)  # the lowest page of the lowest block
    words = scene.words(pfn)
    assert words[0] & 0xFF == 1 << 3 | 1 << 4  # up to date, and dirty: the guest may write it
    assert words[1:3] == POISON
    assert words[3:7] == [0xFFFF_8880_0000_1000, 3, 0, 1 << 32 | 0xFFFF_FFFF]  # mapping, index, private, one reference
    for order in range(9):  # the rest of the block, halved and halved again
        words = scene.words(pfn + (1 << order))
        assert words[5:7] == [order, 0xF000_0000]
        assert words[1] == words[2] >= W.HSTATES_ADDRESS  # alone in its list
    assert scene.host(3) == W.VM_FAULT_LOCKED
    assert scene.words(pfn)[6] == 2 << 32  # the mapping's reference and mapcount
    assert scene.gmem.punch_hole(3 * PAGE, PAGE).status == 0
    words = scene.words(pfn)
    assert (words[0] & 0xFF, words[3], *words[5:7]) == (0, 0, 0, 0xFFFF_FFFF)  # in a per-CPU list
    scene.sound()


@pytest.mark.parametrize("design", DESIGNS)
def test_frames_are_those_of_a_buddy_allocator(design: str) -> None:
    scene = Scene(design, pages=1400, pool=3 * M2)
    model = Buddies(scene.machine.register(W.R_POOL_BASE), 3)
    scene.machine.check_each(False)
    owned: dict[int, int] = {}
    choose = random.Random(4)
    for step in range(3000):
        page = choose.randrange(1400)
        if page in owned and (step // 700) % 2:
            assert scene.gmem.punch_hole(page * PAGE, PAGE).status == 0
            model.put(owned.pop(page))
        elif page not in owned:
            assert scene.guest(page).status == W.RET_PF_FIXED
            taken = model.take()
            assert taken is not None
            assert scene.gmem.pfn(page * PAGE) == taken
            owned[page] = taken
        if step % 500 == 0:
            scene.sound()
    assert scene.gauge(Gauge.BLOCKS_HUGE) == len(owned) > 300
    assert scene.gauge(Gauge.POOL_FREE) == 3 * 512 - len(owned)
    assert scene.gauge(Gauge.BUDDY_BLOCKS) == len(model.blocks)
    assert scene.gmem.close().status == 0
    assert scene.gauge(Gauge.POOL_FREE) == 3 * 512
    scene.sound()
    assert scene.machine.hugetlb(M2).resize(3).status == 0  # which asks for the pages of the per-CPU list
    assert (scene.machine.hugetlb(M2).nr_hugepages, scene.gauge(Gauge.POOL_FREE)) == (3, 0)
    scene.sound()


@pytest.mark.parametrize("design", DESIGNS)
def test_without_memory_faults_say_so(design: str) -> None:
    scene = Scene(design, pages=1024, pool=2 * M2)
    other = scene.machine.create_guest_memfd(2 * PAGE)
    assert scene.vm.bind(other, 0).status == 0
    assert {scene.guest(page).status for page in range(1024)} == {W.RET_PF_FIXED}
    assert scene.gauge(Gauge.POOL_FREE) == 0
    assert scene.vm.touch(0).status == -W.ENOMEM
    assert scene.gmem.punch_hole(7 * PAGE, PAGE).status == 0
    assert scene.vm.touch(0).status == W.RET_PF_FIXED  # the page that was freed
    assert scene.host(7) == W.VM_FAULT_OOM
    scene.sound()


def test_blocks_go_to_huge_pages_and_come_back() -> None:
    scene = Scene("restructure", pool=3 * M2)
    assert scene.guest(0).status == W.RET_PF_FIXED
    pool = scene.machine.hugetlb(M2)
    assert pool.resize(5).status == 0
    assert (pool.nr_hugepages, scene.gauge(Gauge.POOL_FREE)) == (2, 511)  # a block in use cannot be one
    scene.sound()
    assert pool.resize(0).status == 0
    assert scene.gauge(Gauge.POOL_FREE) == 3 * 512 - 1
    scene.sound()


# --------------------------------------------------------------------------- the designs


def test_levels_are_4k_and_nothing_is_split() -> None:
    for design in DESIGNS:
        scene = Scene(design, pages=512, shared=False)
        assert [scene.guest(page).detail for page in (0, 1, 511)] == [1, 1, 1]
        assert scene.gmem.convert(0, 512 * PAGE, shared=True).status == 0
        assert scene.guest(0) == Result(W.RET_PF_FIXED, 1)
        assert scene.gauge(Gauge.BLOCKS_SPLIT) == 0
        assert not scene.gmem.is_split(0)
        assert scene.machine.statistics.event(Event.FOLIO_SPLIT) == 0
        scene.sound()


def test_entries_and_references_tell_the_designs_apart() -> None:
    folios, pfns = Scene("restructure"), Scene("pfnmap")
    assert (folios.host(0), pfns.host(0)) == (W.VM_FAULT_LOCKED, W.VM_FAULT_NOPAGE)
    assert folios.process.walk(VA)[-1][2] & 0xFFF == 0x867
    assert pfns.process.walk(VA)[-1][2] & 0xFFF == 0x267  # special; the processor made it dirty
    counts = [scene.words(scene.gmem.pfn(0) or 0)[6] for scene in (folios, pfns)]
    assert counts == [2 << 32, 1 << 32 | 0xFFFF_FFFF]


@pytest.mark.parametrize("design", DESIGNS)
def test_conversion_takes_the_host_off_one_page(design: str) -> None:
    scene = Scene(design)
    for page in range(4):
        scene.host(page)
        scene.guest(page)
    assert scene.gmem.convert(PAGE, PAGE, shared=False).status == 0
    assert [scene.host(page) for page in range(4)] == [0, W.VM_FAULT_SIGBUS, 0, 0]
    assert [scene.guest(page).status for page in range(4)] == [6, 5, 6, 6]
    assert scene.gmem.convert(PAGE, PAGE, shared=True).status == 0
    assert scene.host(1) in (W.VM_FAULT_LOCKED, W.VM_FAULT_NOPAGE)
    scene.sound()


@pytest.mark.parametrize(("design", "status"), [("restructure", -W.EAGAIN), ("pfnmap", 0)])
def test_a_reference_blocks_conversion_of_its_page_in_restructure(design: str, status: int) -> None:
    scene = Scene(design)
    assert {scene.host(page) for page in range(4)} <= {W.VM_FAULT_LOCKED, W.VM_FAULT_NOPAGE}
    pfn = scene.gmem.get_reference(2 * PAGE).detail
    assert scene.gmem.convert(0, 4 * PAGE, shared=False) == Result(status, 2 * PAGE if status else 0)
    assert scene.gmem.put_reference(pfn).status == 0
    assert scene.gmem.put_reference(pfn).status == -W.ENOENT
    assert scene.gmem.convert(0, 4 * PAGE, shared=False).status == 0
    scene.sound()


@pytest.mark.parametrize("design", DESIGNS)
def test_punch_frees_a_held_page_from_the_inode_at_once(design: str) -> None:
    scene = Scene(design)
    for page in range(4):
        scene.host(page)
    pfn = scene.gmem.get_reference(PAGE).detail
    assert scene.gmem.punch_hole(0, 4 * PAGE).status == 0
    assert scene.gmem.pfn(PAGE) is None
    assert scene.gauge(Gauge.POOL_FREE) == 1024 - 1  # all but the held one
    assert scene.words(pfn)[3:7:3] == [0, 1 << 32 | 0xFFFF_FFFF]  # no mapping, the holder's reference
    assert scene.host(1) in (W.VM_FAULT_LOCKED, W.VM_FAULT_NOPAGE)
    assert scene.gmem.pfn(PAGE) != pfn
    assert scene.gmem.put_reference(pfn).status == 0
    assert scene.gauge(Gauge.POOL_FREE) == 1024 - 1
    assert scene.gmem.put_reference(pfn).status == -W.ENOENT
    scene.sound()


def test_only_pages_of_inodes_are_put() -> None:
    scene = Scene("restructure", reserved=M2)
    base = scene.machine.register(W.R_POOL_BASE)
    assert scene.gmem.put_reference(base).status == -W.ENOENT  # the kernel's own
    assert scene.gmem.put_reference(base + 512).status == -W.ENOENT  # free
    scene.sound()


@pytest.mark.parametrize("design", DESIGNS)
def test_closing_with_a_held_page(design: str) -> None:
    scene = Scene(design)
    scene.host(0)
    pfn = scene.gmem.get_reference(0).detail
    assert scene.gmem.close().status == 0
    assert scene.gauge(Gauge.POOL_FREE) == 1023
    assert scene.gmem.put_reference(pfn).status == 0
    assert scene.gauge(Gauge.POOL_FREE) == 1024
    scene.sound()


@pytest.mark.parametrize("zero", ["folio", "page"])
@pytest.mark.parametrize("design", DESIGNS)
def test_a_page_is_zeroed_at_its_first_use(design: str, zero: str) -> None:
    scene = Scene(design, zero=zero)
    assert scene.guest(0).status == W.RET_PF_FIXED
    pfn = scene.gmem.pfn(0) or 0
    scene.machine.write_frame(pfn, b"secret")
    assert scene.gmem.punch_hole(0, PAGE).status == 0
    scene.host(5)
    assert scene.gmem.pfn(5 * PAGE) == pfn
    assert scene.machine.read_frame(pfn) == bytes(PAGE)
    statistics = scene.machine.statistics
    assert (statistics.event(Event.PAGE_ZEROED), statistics.event(Event.FOLIO_ZEROED_PAGES)) == (2, 0)


def test_inodes_of_odd_sizes_share_no_bits() -> None:
    machine = Machine(Config("restructure", pool=2 * M2, page_size=PAGE))
    sizes = (1, 3, 65, 513, 130)
    inodes = [machine.create_guest_memfd(size * PAGE, shared=i % 2 == 0) for i, size in enumerate(sizes)]
    assert machine.check() == 0, machine.broken
    for i, (gmem, size) in enumerate(zip(inodes, sizes, strict=True)):
        assert {gmem.is_shared(page * PAGE) for page in range(size)} == {i % 2 == 0}
        assert gmem.convert(0, size * PAGE, shared=i % 2 == 1).status == 0
        assert gmem.convert(0, (size + 1) * PAGE, shared=True).status == -W.EINVAL
    assert [gmem.is_shared(0) for gmem in inodes] == [False, True, False, True, False]
    assert machine.check() == 0, machine.broken


def operations(seed: int, count: int) -> list[dict[str, Any]]:
    """Random operations on two inodes (numbers 0 and 1, of 96 and 40 pages), a process and a VM."""
    choose = random.Random(seed)
    made: list[dict[str, Any]] = []
    for _ in range(count):
        inode = choose.randrange(2)
        page = choose.randrange(96 if inode == 0 else 40)
        length = choose.choice([1, 1, 1, 2, 7]) * PAGE
        where = {"object_": inode, "offset": page * PAGE}
        va, gpa = (base + inode * M2 + page * PAGE for base in (VA, GPA))
        made.append(
            choose.choice(
                [
                    {"op": Operation.HOST_FAULT, "flags": 1, "address": va},
                    {"op": Operation.HOST_FAULT, "address": va},
                    {"op": Operation.GUEST_FAULT, "address": gpa},
                    {"op": Operation.GUEST_FAULT, "address": gpa, "flags": choose.choice([4, 8])},
                    {"op": Operation.CONVERT, "flags": choose.choice([4, 8]), "length": length, **where},
                    {"op": Operation.PUNCH_HOLE, "length": length, **where},
                    {"op": Operation.ZAP, "address": va, "length": length},
                    {"op": Operation.GET, **where},
                    {"op": Operation.PUT, **where},
                    {"op": Operation.ALLOCATE, "length": length, **where},
                ]
            )
        )
    return made


@pytest.mark.parametrize("design", DESIGNS)
def test_the_entry_for_every_parameter_makes_the_same_machine(design: str) -> None:
    scenes = [Scene(design, pages=96, pool=M2) for _ in range(2)]
    scenes[1].machine.arrays.state[W.R_FULL] = 1
    for scene in scenes:
        other = scene.machine.create_guest_memfd(40 * PAGE)
        assert scene.process.mmap(other, VA + M2).status == 0
        assert scene.vm.bind(other, GPA + M2).status == 0
    seen = set()
    for arguments in operations(11, 1500):
        results = [scene.machine.operate(**arguments) for scene in scenes]
        assert results[0] == results[1], arguments
        seen.add((arguments["op"], results[0].status))
    for scene in scenes:
        scene.sound()
        scene.machine.arrays.state[W.R_FULL] = 0
    assert_same(scenes[0].machine, scenes[1].machine)
    refusal = (Operation.CONVERT, -W.EAGAIN)
    assert (refusal in seen) == (design == "restructure")
    assert {(Operation.PUT, 0), (Operation.PUNCH_HOLE, 0), (Operation.ALLOCATE, 0)} <= seen


@pytest.mark.parametrize("design", DESIGNS)
def test_steps_make_the_same_machine(design: str) -> None:
    whole, stepped = Scene(design), Scene(design)
    for arguments in (
        {"op": Operation.HOST_FAULT, "flags": 1, "address": VA},
        {"op": Operation.GUEST_FAULT, "address": GPA + PAGE},
        {"op": Operation.CONVERT, "flags": 4, "offset": 0, "length": 3 * PAGE},
        {"op": Operation.CONVERT, "flags": 8, "offset": PAGE, "length": PAGE},
        {"op": Operation.PUNCH_HOLE, "offset": 0, "length": 2 * PAGE},
    ):
        result = whole.machine.operate(**arguments)  # type: ignore[arg-type]
        stepped.machine.begin(1, **arguments)  # type: ignore[arg-type]
        while stepped.machine.step(1) == W.GO:
            pass
        assert stepped.machine.result(1) == result
    assert np.array_equal(whole.machine.arrays.ram, stepped.machine.arrays.ram)
    stepped.sound()


# --------------------------------------------------------------------------- allocation ahead, and policies


@pytest.mark.parametrize("page_size", [PAGE, M2])
@pytest.mark.parametrize("design", DESIGNS)
def test_allocate(design: str, page_size: int) -> None:
    machine = Machine(Config(design, pool=4 * M2, page_size=page_size))
    gmem = machine.create_guest_memfd(4 * M2 if page_size == PAGE else 3 * M2, shared=True)
    assert gmem.allocate(0, 0).status == gmem.allocate(0, 100).status == gmem.allocate(1, PAGE).status == -W.EINVAL
    assert gmem.allocate(gmem.size, PAGE).status == gmem.allocate(0, gmem.size + PAGE).status == -W.EINVAL
    assert gmem.allocate(M2 + 5 * PAGE, M2).status == 0
    start, end = (M2, 2 * M2) if page_size == M2 else (M2 + 5 * PAGE, 2 * M2 + 5 * PAGE)  # rounded down, both
    assert [gmem.pfn(offset) is None for offset in (start - PAGE, start, end - PAGE, end)] == [True, False, False, True]
    assert gmem.is_split(M2) == (design == "restructure" and page_size == M2)
    assert machine.statistics.event(Event.PAGE_ZEROED) == 0
    assert machine.check() == 0, machine.broken
    assert gmem.close().status == 0
    assert gmem.allocate(0, PAGE).status == -W.EBADF


@pytest.mark.parametrize("design", DESIGNS)
def test_allocate_until_there_is_no_memory(design: str) -> None:
    machine = Machine(Config(design, pool=M2, page_size=PAGE))
    gmem = machine.create_guest_memfd(M2 + 2 * PAGE)
    assert gmem.allocate(0, gmem.size) == Result(-W.ENOMEM, M2)
    assert machine.statistics.gauge(Gauge.BLOCKS_HUGE) == 512
    assert gmem.pfn(M2 - PAGE) is not None
    assert gmem.pfn(M2) is None


def nodes_of(machine: Machine, gmem: GuestMemfd, offsets: list[int]) -> list[int]:
    second = int(machine.arrays.state[int(W.STATE_NODES) + W.N_WORDS + int(W.N_BASE)])
    return [int((gmem.pfn(offset) or 0) >= second) for offset in offsets]


@pytest.mark.parametrize("page_size", [PAGE, M2])
def test_policies_choose_the_node(page_size: int) -> None:
    machine = Machine(Config("pfnmap", pool=16 * M2, page_size=page_size, nodes=2))
    gmem = machine.create_guest_memfd(12 * page_size)
    unit = page_size
    assert gmem.mbind(2 * unit, 2 * unit, "bind", [1]).status == 0
    assert gmem.mbind(4 * unit, 4 * unit, "interleave", [0, 1]).status == 0
    assert gmem.mbind(8 * unit, 2 * unit, "preferred", [1]).status == 0
    assert gmem.mbind(9 * unit, unit, "default").status == 0
    assert gmem.allocate(0, 10 * unit).status == 0
    assert nodes_of(machine, gmem, [i * unit for i in range(10)]) == [0, 0, 1, 1, 0, 1, 0, 1, 1, 0]
    assert machine.set_mempolicy("bind", [1]).status == 0
    assert gmem.allocate(10 * unit, 2 * unit).status == 0
    assert nodes_of(machine, gmem, [10 * unit]) == [1]
    assert machine.check() == 0, machine.broken


def test_series_rfc2_asks_the_task_only_and_ignores_interleaving() -> None:
    machine = Machine(Config("restructure", pool=8 * M2, page_size=M2, nodes=2, split_form="rfc2"))
    gmem = machine.create_guest_memfd(4 * M2)
    assert gmem.mbind(0, 4 * M2, "bind", [1]).status == 0
    assert machine.set_mempolicy("interleave", [0, 1]).status == 0
    assert gmem.allocate(0, 2 * M2).status == 0
    assert machine.set_mempolicy("preferred", [1]).status == 0
    assert gmem.allocate(2 * M2, 2 * M2).status == 0
    assert nodes_of(machine, gmem, [i * M2 for i in range(4)]) == [0, 0, 1, 1]


@pytest.mark.parametrize("page_size", [PAGE, M2])
def test_bind_is_strict_and_preferred_is_not(page_size: int) -> None:
    each = 512 if page_size == PAGE else 1  # pages of a node
    machine = Machine(Config("pfnmap", pool=2 * M2, page_size=page_size, nodes=2))
    gmem = machine.create_guest_memfd(2 * M2)
    assert gmem.mbind(0, 2 * M2, "bind", [1]).status == 0
    assert gmem.allocate(0, 2 * M2) == Result(-W.ENOMEM, each * page_size)
    assert gmem.mbind(0, 2 * M2, "preferred", [1]).status == 0
    assert gmem.allocate(0, 2 * M2).status == 0
    assert nodes_of(machine, gmem, [0, M2]) == [1, 0]


def test_policies_that_are_refused() -> None:
    machine = Machine(Config("pfnmap", pool=M2, page_size=PAGE))
    gmem = machine.create_guest_memfd(M2)
    bad: list[tuple[str | int, list[int]]] = [
        (4, [0]), ("bind", [1]), ("interleave", [0, 1]), ("default", [0]), ("bind", []), ("interleave", []),
    ]  # fmt: skip
    for mode, nodes in bad:
        assert gmem.mbind(0, M2, mode, nodes).status == -W.EINVAL
        assert machine.set_mempolicy(mode, nodes).status == -W.EINVAL
    assert gmem.mbind(0, M2, "preferred").status == 0  # MPOL_LOCAL
    assert gmem.mbind(1, PAGE, "bind", [0]).status == -W.EINVAL
    with pytest.raises(ValueError, match="expected one of default"):
        gmem.mbind(0, M2, "local")
    with pytest.raises(ValueError, match=r"nodes .64.: expected node numbers, each from 0 to 63"):
        gmem.mbind(0, M2, "bind", [64])
    assert gmem.mbind(0, M2, "default").status == 0
    for page in range(W.POLICIES - 1):
        assert gmem.mbind(page * PAGE, PAGE, "bind", [0]).status == 0
    assert gmem.mbind(0, PAGE, "interleave", [0]).status == -W.ENOMEM  # shared_policy_replace() wants a spare node
    assert gmem.close().status == 0
    assert gmem.mbind(0, M2, "bind", [0]).status == -W.EBADF


def test_a_policy_in_the_middle_of_another() -> None:
    machine = Machine(Config("pfnmap", pool=M2, page_size=PAGE, nodes=2))
    gmem = machine.create_guest_memfd(10 * PAGE)
    assert gmem.mbind(0, 10 * PAGE, "bind", [0]).status == 0
    assert gmem.mbind(3 * PAGE, 4 * PAGE, "default").status == 0
    assert gmem.mbind(2 * PAGE, 2 * PAGE, "interleave", [0, 1]).status == 0
    rows = machine.arrays.state[int(W.STATE_POLICIES) :][: W.POLICIES * W.MP_WORDS].reshape(-1, W.MP_WORDS)
    live = rows[rows[:, W.MP_LIVE] == 1]
    found = {(int(row[W.MP_START]), int(row[W.MP_END]), int(row[W.MP_MODE])) for row in live}
    assert found == {(0, 2, W.MPOL_BIND), (2, 4, W.MPOL_INTERLEAVE), (7, 10, W.MPOL_BIND)}


# --------------------------------------------------------------------------- configuration


def test_configurations_that_are_refused() -> None:
    for more in ({"other_pool": M2}, {"buddy": M2}, {"pool": 3 * PAGE}, {"split_to": "2M"}):
        with pytest.raises(ValueError, match="expected"):
            Config("pfnmap", page_size=PAGE, **{"pool": M2, **more})  # type: ignore[arg-type]
