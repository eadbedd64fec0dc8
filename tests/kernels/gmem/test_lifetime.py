"""Holes, released files, closed inodes, zombie blocks and the worker: numbers by hand, in pools of two 2M pages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from machines import assert_same
from pgemu.machine.designs import DESIGNS
from pgemu.objects.guest_memfd import GuestMemfd
from pgemu.objects.machine import Config, Machine
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Gauge
from pgemu_kernels.words.operations import Flag, Operation

M2 = W.PAGE_2M
PAGE = W.PAGE_4K
VA = 0x7F00_0000_0000
SPLIT_FORMS = ("jan2026", "rfc2")
GUESTMEM_HUGETLB = 0xF900_0000
NO_MAPCOUNT = 0xFFFF_FFFF


class Scene:
    """An inode of `pages` 2M pages, which a process maps at VA and its VM has at guest address 0.

    The pool has no more pages than that and `spare` ones.
    """

    def __init__(self, design: str, *, pages: int = 2, spare: int = 0, shared: bool = False, **parameters: Any) -> None:
        self.machine = Machine(Config(design, pool=(pages + spare) * M2, page_size=M2, **parameters))  # type: ignore[arg-type]
        self.gmem: GuestMemfd = self.machine.create_guest_memfd(pages * M2, shared=shared)
        self.process = self.machine.create_process()
        self.vm = self.machine.create_vm(self.process, protected=True)
        assert self.process.mmap(self.gmem, VA).status == 0
        assert self.vm.bind(self.gmem, 0).status == 0

    def pool(self) -> tuple[int, int]:
        """HugePages_Free and HugePages_Rsvd."""
        meminfo = self.machine.meminfo()
        return meminfo["HugePages_Free"], meminfo["HugePages_Rsvd"]

    def gauge(self, gauge: Gauge) -> int:
        return self.machine.statistics.gauge(gauge)

    def counts(self, pfn: int) -> tuple[int, int]:
        """A struct page's refcount, and the word that holds its mapcount or its type."""
        word = _counts(self.machine, pfn)
        return word >> 32, word & 0xFFFF_FFFF

    def sound(self) -> None:
        assert self.machine.check() == 0, self.machine.broken


def _counts(machine: Machine, pfn: int) -> int:
    """Word 6 of a frame's struct page, through the kernel's page table."""
    address = machine.register(W.R_VMEMMAP) + pfn * 64
    level, _, entry = machine.walk(machine.register(W.R_KERNEL_ROOT), address >> 12)[-1]
    base = entry & 0x000F_FFFF_FFFF_F000
    inside = address & (PAGE - 1 if level == 1 else M2 - 1)
    return int(machine.arrays.ram[(base + inside) // 8 + 6])


# --------------------------------------------------------------------------- the pool's counts


@pytest.mark.parametrize("design", DESIGNS)
def test_the_pool_by_hand(design: str) -> None:
    """Created: all reserved. First use of a block: one free and one reserved page less. A split takes nothing. A whole
    block punched: one more of both. Closed: everything as before the inode."""
    machine = Machine(Config(design, pool=3 * M2, page_size=M2, punch="refuse"))  # type: ignore[arg-type]

    def pool() -> tuple[int, int]:
        meminfo = machine.meminfo()
        return meminfo["HugePages_Free"], meminfo["HugePages_Rsvd"]

    assert pool() == (3, 0)
    gmem = machine.create_guest_memfd(2 * M2)
    vm = machine.create_vm(protected=True)
    assert vm.bind(gmem, 0).status == 0
    assert pool() == (3, 2)
    vm.touch(0)
    assert pool() == (2, 1)
    vm.touch(5 * PAGE)
    vm.touch(M2)
    assert pool() == (1, 0)
    assert gmem.convert(0, PAGE, shared=True).status == 0
    assert pool() == (1, 0)
    assert gmem.punch_hole(0, M2).status == 0  # in two 4K pieces and more, with restructure
    assert pool() == (2, 1)
    assert gmem.is_shared(0)  # truncation does not change shareability
    assert gmem.close().status == 0
    assert pool() == (3, 0)
    assert machine.meminfo()["HugePages_Total"] == 3
    assert machine.check() == 0


# --------------------------------------------------------------------------- holes


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize(("punch", "part"), [("zero", 0), ("refuse", -W.EINVAL)])
def test_part_of_a_huge_page(design: str, punch: str, part: int) -> None:
    """rfc2 zeroes the part and frees nothing; the branches from late 2025 on refuse it, past the end too."""
    scene = Scene(design, punch=punch)
    scene.vm.touch(0)
    pfn = scene.gmem.pfn(0)
    assert pfn is not None
    for page in (0, 1, 2):
        scene.machine.write_frame(pfn + page, b"data")
    assert scene.gmem.punch_hole(PAGE, PAGE).status == part
    assert scene.machine.read_frame(pfn + 1)[:4] == (b"data" if part else bytes(4))
    assert scene.machine.read_frame(pfn)[:4] == scene.machine.read_frame(pfn + 2)[:4] == b"data"
    assert scene.gmem.pfn(0) == pfn
    assert scene.gmem.punch_hole(8 * M2 + PAGE, M2).status == part
    assert scene.gmem.punch_hole(8 * M2, M2).status == 0
    assert scene.gmem.punch_hole(0, 100 * M2).status == 0
    assert scene.pool() == (2, 2)
    for offset, length in ((1, M2), (0, 1), (0, 4097), (0, 0), (M2, (1 << 64) - M2)):
        assert scene.gmem.punch_hole(offset, length).status == -W.EINVAL
    scene.gmem.close()
    assert scene.gmem.punch_hole(PAGE, PAGE).status == -W.EBADF
    scene.sound()


def test_a_hole_ends_at_the_piece_that_somebody_holds() -> None:
    """Blocks 0 and 1 are split, a page of 1 is held: 0 is freed, 1 and 2 stay."""
    scene = Scene("restructure", pages=3, punch="refuse")
    for block in range(3):
        scene.vm.touch(block * M2)
    scene.gmem.convert(0, PAGE, shared=True)
    scene.gmem.convert(M2, PAGE, shared=True)
    scene.process.touch(VA + M2)
    pfn = scene.gmem.get_reference(M2 + 7 * PAGE).detail
    assert scene.gmem.punch_hole(0, 3 * M2) == (-W.EAGAIN, M2)
    assert [scene.gmem.pfn(block * M2) is None for block in range(3)] == [True, False, False]
    assert scene.gauge(Gauge.HOST_LEAVES_4K) == 0  # unmapped before the gate, and not mapped again
    assert scene.pool() == (1, 1)
    assert scene.gmem.put_reference(pfn).status == 0
    statuses = scene.gmem.punch_hole_many(np.arange(3, dtype=np.uint64) * np.uint64(M2), M2).status
    assert statuses.tolist() == [0, 0, 0]
    assert scene.pool() == (3, 3)
    scene.sound()


@pytest.mark.parametrize("design", DESIGNS)
def test_a_reference_delays_a_whole_folio(design: str) -> None:
    """Truncated whoever holds it: the block can be used again at once, the 2M page is nobody's until it is put."""
    scene = Scene(design, pages=2, punch="refuse")
    scene.vm.touch(0)
    pfn = scene.gmem.get_reference(9 * PAGE).detail
    assert scene.gmem.punch_hole(0, M2).status == 0
    assert scene.gauge(Gauge.BLOCKS_ZOMBIE) == 1
    assert scene.pool() == (1, 1)
    scene.sound()
    assert scene.vm.touch(M2).status == W.RET_PF_FIXED
    assert scene.vm.touch(0).status == -W.ENOMEM  # the subpool counts the page that is held
    assert scene.machine.work().detail == 0  # no worker: the last put frees it
    assert scene.gmem.put_reference(pfn).status == 0
    assert scene.pool() == (1, 1)
    assert scene.vm.touch(0).status == W.RET_PF_FIXED
    assert scene.gmem.pfn(0) == pfn - 9
    scene.sound()


# --------------------------------------------------------------------------- stale entries


@pytest.mark.parametrize("keeps", [False, True])
def test_a_hole_that_leaves_pfnmaps_entries(keeps: bool) -> None:
    """The frame of the hole goes to another inode, and a process that mapped it reaches the other's data."""
    defects = ("punch-keeps-entries",) if keeps else ()
    scene = Scene("pfnmap", pages=2, spare=1, shared=True, defects=defects, punch="refuse")
    for page in (0, 3, 512):
        assert scene.process.touch(VA + page * PAGE).status == W.VM_FAULT_NOPAGE
    frames = [scene.gmem.pfn(page * PAGE) for page in (0, 3, 512)]
    assert scene.gmem.stale_entries() == []
    assert scene.gmem.punch_hole(0, M2).status == 0
    found = scene.gmem.stale_entries()
    assert [(e.space, e.address, e.pfn, e.owner) for e in found] == (
        [(scene.process.space, VA + page * PAGE, frames[i], None) for i, page in enumerate((0, 3))] if keeps else []
    )
    assert scene.gauge(Gauge.HOST_LEAVES_4K) == (3 if keeps else 1)
    if not keeps:
        scene.sound()
        return
    assert scene.machine.check() > 0
    assert scene.machine.broken[1] == W.Broken.WRONG_PFN
    # The page that was freed last is the first to be taken.
    other = scene.machine.create_guest_memfd(M2)
    vm = scene.machine.create_vm()
    assert vm.bind(other, 0).status == 0
    assert vm.touch(0).status == W.RET_PF_FIXED
    assert other.pfn(0) == frames[0]
    scene.machine.write_frame(found[0].pfn, b"secret")
    assert scene.process.touch(VA).status == 0  # no fault: the stale entry is there
    assert scene.process.walk(VA)[-1][2] >> 12 & 0xFFFF_FFFF == other.pfn(0)
    assert [entry.owner for entry in scene.gmem.stale_entries()] == [other.inode, other.inode]
    scene.process.munmap(VA, 2 * M2)
    assert scene.gmem.stale_entries() == []


# --------------------------------------------------------------------------- zombies


@pytest.mark.parametrize("split_form", SPLIT_FORMS)
@pytest.mark.parametrize("worker", ["immediate", "queued"])
def test_close_with_pinning(split_form: str, worker: str) -> None:
    """A page is pinned when the inode goes and unpinned later: the 2M page is back after the worker ran."""
    scene = Scene("restructure", pages=2, shared=True, split_form=split_form, worker=worker)
    assert scene.process.touch(VA + M2 + 5 * PAGE).status == W.VM_FAULT_LOCKED
    assert scene.process.pin(VA + M2 + 5 * PAGE, PAGE, pin=3) == (0, 1)
    pfn = scene.gmem.pfn(M2 + 5 * PAGE)
    assert pfn is not None
    assert scene.gmem.close().status == 0
    assert scene.gauge(Gauge.BLOCKS_ZOMBIE) == 1
    assert scene.gmem.outstanding(M2) == 1
    assert scene.pool() == (1, 1)  # the page that is out is the subpool's: its reservation stays for it
    assert scene.counts(pfn) == (1024, GUESTMEM_HUGETLB if split_form == "rfc2" else NO_MAPCOUNT)
    with pytest.raises(OSError, match="reserve"):
        scene.machine.create_guest_memfd(2 * M2)
    scene.sound()
    assert scene.machine.work().detail == 0
    assert scene.machine.unpin(3).status == 0
    if worker == "queued":
        assert scene.counts(pfn) == (0, NO_MAPCOUNT)
        assert scene.gauge(Gauge.WORK_PENDING) == 1
        assert scene.pool() == (1, 1)
        scene.sound()
        assert scene.machine.work() == (0, 1)
    assert scene.pool() == (2, 0)
    assert (scene.gauge(Gauge.BLOCKS_ZOMBIE), scene.gauge(Gauge.WORK_PENDING)) == (0, 0)
    assert scene.machine.work() == (0, 0)
    scene.machine.create_guest_memfd(2 * M2)
    scene.sound()


@pytest.mark.parametrize(("split_form", "deferred"), [("jan2026", 0), ("rfc2", 1)])
def test_eviction_of_a_split_block_that_nobody_holds(split_form: str, deferred: int) -> None:
    """rfc2 truncates every piece by itself and has the worker merge them; later series merge at once."""
    scene = Scene("restructure", split_form=split_form, worker="queued")
    scene.vm.touch(0)
    scene.vm.touch(M2)
    scene.gmem.convert(0, PAGE, shared=True)
    nodes = scene.gauge(Gauge.XARRAY_NODES)
    assert nodes > 0
    assert scene.gmem.close().status == 0
    assert scene.gauge(Gauge.XARRAY_NODES) == 0
    assert scene.gauge(Gauge.BLOCKS_ZOMBIE) == scene.gauge(Gauge.WORK_PENDING) == deferred
    assert scene.pool() == (2 - deferred, deferred)
    scene.sound()
    assert scene.machine.work() == (0, deferred)
    assert scene.pool() == (2, 0)
    assert scene.gauge(Gauge.VMEMMAP_PAGES) == 1 + 2  # optimised again
    scene.sound()


@pytest.mark.parametrize("split_form", SPLIT_FORMS)
@pytest.mark.parametrize("worker", ["immediate", "queued"])
def test_pieces_put_one_by_one(split_form: str, worker: str) -> None:
    """All 512 pieces are held past the end, page 8 twice: the block is back with the 513th put, and the worker."""
    scene = Scene("restructure", pages=1, shared=True, split_form=split_form, worker=worker)
    scene.process.touch(VA)
    offsets = np.append(np.arange(512, dtype=np.uint64), np.uint64(8)) << np.uint64(12)
    held = scene.gmem.get_reference_many(offsets)
    assert not held.status.any()
    assert scene.gmem.close().status == 0
    assert scene.gmem.outstanding(0) == 512
    order = np.random.default_rng(1).permutation(held.detail)
    for done, pfn in enumerate(order[:3], 1):
        assert scene.gmem.put_reference(int(pfn)).status == 0
        assert scene.gmem.outstanding(0) == 512 - len(set(order[:done]) - set(order[done:]))
    assert not scene.gmem.put_reference_many(order[3:512]).status.any()
    assert scene.gmem.outstanding(0) == 1
    assert scene.gauge(Gauge.BLOCKS_ZOMBIE) == 1
    assert scene.pool() == (0, 0)
    scene.sound()
    assert scene.gmem.put_reference(int(order[512])).status == 0
    assert scene.gmem.put_reference(int(order[512])).status == -W.ENOENT
    assert scene.machine.work().detail == (1 if worker == "queued" else 0)
    assert scene.pool() == (1, 0)
    scene.sound()


def test_a_zombies_frame_is_no_one_elses() -> None:
    """While a piece is held, another inode never gets the zombie's frame; and the dead inode keeps its reservation of
    the block that it never used: a subpool goes with its last page (mm/hugetlb.c:unlock_or_release_subpool())."""
    scene = Scene("restructure", pages=2, spare=1, split_form="rfc2")
    scene.gmem.convert(0, PAGE, shared=True)
    scene.process.touch(VA)
    pfn = scene.gmem.get_reference(0).detail
    scene.gmem.close()
    assert scene.pool() == (2, 1)
    with pytest.raises(OSError, match="reserve"):
        scene.machine.create_guest_memfd(2 * M2)
    other = scene.machine.create_guest_memfd(M2)
    vm = scene.machine.create_vm()
    vm.bind(other, 0)
    vm.touch(0)
    assert other.pfn(0) != pfn
    assert scene.pool() == (1, 1)
    scene.gmem.put_reference(pfn)
    assert scene.pool() == (2, 0)
    scene.sound()


# --------------------------------------------------------------------------- lazy merges


def _private_by_hand(scene: Scene, block: int) -> None:
    """What a conversion to private with a lazy merge leaves: no page shared, split, noted for the worker."""
    state, counts = scene.machine.arrays.state, scene.machine.arrays.counts
    row = int(W.STATE_INODES) + scene.gmem.inode * W.I_WORDS
    word, pmd, pud, first = (int(state[row + int(name)]) for name in (W.I_WORD, W.I_PMD, W.I_PUD, W.I_BLOCK))
    state[word + block * 8 : word + block * 8 + 8] = 0
    counts[pud] -= counts[pmd + block]
    counts[pmd + block] = 0
    state[first + block * W.B_WORDS + int(W.B_WAITS)] = 1
    scene.machine.arrays.stats[int(W.STATS_GAUGES) + 2 * Gauge.WORK_PENDING] += 1


def test_the_worker_merges_what_is_idle_and_private() -> None:
    """Three split blocks: one waits and is idle, one waits and is held, one has a shared page."""
    scene = Scene("restructure", pages=3, merge="lazy")
    for block in range(3):
        scene.vm.touch(block * M2)
        scene.gmem.convert(block * M2, PAGE, shared=True)
    for block in (0, 1):
        _private_by_hand(scene, block)
    pfn = scene.gmem.get_reference(M2).detail
    scene.sound()
    assert scene.machine.work() == (0, 1)
    assert [scene.gmem.is_split(block * M2) for block in range(3)] == [False, True, True]
    assert scene.gauge(Gauge.WORK_PENDING) == 1
    scene.gmem.put_reference(pfn)
    assert scene.machine.work() == (0, 1)
    assert scene.machine.work() == (0, 0)
    assert [scene.gmem.is_split(block * M2) for block in range(3)] == [False, False, True]
    assert scene.vm.touch(M2).detail == 2
    scene.sound()


@pytest.mark.parametrize("how", ["punch", "close"])
def test_a_block_that_waits_leaves_the_workers_list_when_it_goes(how: str) -> None:
    scene = Scene("restructure", merge="lazy")
    scene.gmem.convert(0, PAGE, shared=True)
    scene.process.touch(VA)
    scene.process.zap(VA, PAGE)
    _private_by_hand(scene, 0)
    scene.sound()
    assert (scene.gmem.punch_hole(0, M2) if how == "punch" else scene.gmem.close()).status == 0
    assert scene.gauge(Gauge.WORK_PENDING) == 0
    assert scene.machine.work() == (0, 0)
    assert scene.pool()[0] == 2
    scene.sound()


# --------------------------------------------------------------------------- release


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("punch", ["zero", "refuse"])  # a default machine, and one with a parameter of its own
def test_a_released_file(design: str, punch: str) -> None:
    """Guest faults are -EFAULT, the guest frames stay taken, the memory stays; another VM does not notice."""
    scene = Scene(design, punch=punch)
    machine, gmem, vm = scene.machine, scene.gmem, scene.vm
    assert scene.process.munmap(VA, 2 * M2).status == 0  # nothing else holds the file
    second = machine.create_vm(protected=True)
    assert second.bind(gmem, 0).status == 0
    for address in (0, M2):
        assert vm.touch(address).detail == second.touch(address).detail == 2
    pfn = gmem.pfn(0)
    assert vm.release(gmem).status == 0
    assert (vm.leaves()[1], second.leaves()[1]) == (0, 2)
    for flags in (0, Flag.PRIVATE, Flag.SHARED, Flag.WRITE):
        status = machine.operate(Operation.GUEST_FAULT, flags=flags, vm=vm.vm, address=PAGE).status
        assert status == -W.EFAULT
    assert second.touch(0).status == W.RET_PF_SPURIOUS
    assert gmem.pfn(0) == pfn
    assert vm.bind(gmem, M2, length=M2).status == -W.EEXIST  # the slot has these guest frames
    assert vm.release(gmem).status == -W.EBADF
    assert vm.bind(gmem, 1 << 30).status == 0  # a new file
    assert vm.touch(1 << 30).status == W.RET_PF_FIXED
    assert gmem.convert(0, PAGE, shared=True).status == 0
    assert vm.touch(0).status == -W.EFAULT
    assert vm.unbind(0).status == 0
    assert vm.touch(0).status == W.RET_PF_EMULATE
    assert vm.unbind(1 << 30).status == 0
    assert vm.bind(gmem, 0).status == 0  # in a row that a released slot had
    assert vm.touch(M2).status == W.RET_PF_FIXED
    scene.sound()
    assert vm.release(gmem).status == second.release(gmem).status == 0
    assert gmem.close().status == 0
    assert scene.pool() == (2, 0)
    assert vm.touch(0).status == W.RET_PF_EMULATE  # the slots went with the VMM
    assert vm.release(gmem).status == -W.EBADF
    scene.sound()


@pytest.mark.parametrize("design", DESIGNS)
def test_what_a_hole_only_zeroes_stays_mapped(design: str) -> None:
    """Pages 500 to 1535: 500 to 511 are zeroed, the huge page behind them goes, and 1024 to 1535 with it."""
    scene = Scene(design, pages=4, shared=True, punch="zero")
    for page in (500, 600, 1024, 1536):
        assert scene.process.touch(VA + page * PAGE).detail == 1
    assert scene.gmem.punch_hole(500 * PAGE, 1036 * PAGE).status == 0
    mapped = [scene.process.walk(VA + page * PAGE)[-1][2] & 1 for page in (500, 600, 1024, 1536)]
    assert mapped == [1, 0, 0, 1]
    scene.sound()


@pytest.mark.parametrize("design", DESIGNS)
def test_a_mapping_holds_the_file(design: str) -> None:
    """.release runs after the last VMA is gone: until then faults, slots and conversions go on working (captured)."""
    machine = Machine(Config(design, pool=2 * M2, page_size=M2))  # type: ignore[arg-type]
    gmem = machine.create_guest_memfd(2 * M2, shared=True)
    process = machine.create_process()
    vm = machine.create_vm(process, protected=True)
    assert process.mmap(gmem, VA).status == process.mmap(gmem, VA + (1 << 30)).status == 0
    assert vm.bind(gmem, 0).status == 0
    assert vm.touch(0).status == W.RET_PF_FIXED
    assert vm.release(gmem).status == 0
    assert vm.touch(0).status == W.RET_PF_SPURIOUS
    assert process.touch(VA).detail == 1
    assert gmem.convert(PAGE, PAGE, shared=False).status == 0
    assert vm.release(gmem).status == -W.EBADF  # the descriptor is gone
    assert process.munmap(VA + (1 << 30), 2 * M2).status == 0
    assert process.munmap(VA, M2).status == 0
    assert vm.touch(M2).status == W.RET_PF_FIXED
    # The rest of the last mapping waits for a conversion's lock, where Linux would: in the release behind it.
    machine.begin(1, Operation.CONVERT, flags=Flag.SHARED, object_=gmem.inode, offset=PAGE, length=PAGE)
    assert machine.step(1) == W.GO
    assert process.munmap(VA + M2, M2).status == -W.EBUSY
    while machine.step(1) == W.GO:
        pass
    assert process.munmap(VA + M2, M2).status == 0
    assert vm.leaves() == (0, 0, 0)
    assert vm.touch(0).status == -W.EFAULT
    assert gmem.pfn(0) is not None
    assert machine.check() == 0, machine.broken
    other = machine.create_vm(process, protected=True)
    assert other.bind(gmem, 0).status == 0
    assert process.mmap(gmem, VA).status == 0
    assert other.touch(0).status == W.RET_PF_FIXED
    assert other.release(gmem).status == 0
    assert process.exit().status == 0
    assert other.touch(0).status == -W.EFAULT
    assert machine.check() == 0, machine.broken


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("shared", [False, True])
def test_a_vm_without_private_memory_converts_nothing(design: str, shared: bool) -> None:
    """kvm_supported_mem_attributes() of the VM whose file is asked; the file of another VM may do it."""
    machine = Machine(Config(design, pool=2 * M2, page_size=M2))  # type: ignore[arg-type]
    gmem = machine.create_guest_memfd(2 * M2, shared=not shared)
    plain, protected = machine.create_vm(), machine.create_vm(protected=True)
    assert gmem.convert(0, PAGE, shared=shared).status == 0  # nobody's yet
    for vm in (plain, protected):
        assert vm.bind(gmem, 0).status == 0
    assert gmem.convert(PAGE, PAGE, shared=shared, vm=plain.vm).status == -W.EINVAL
    assert gmem.convert(PAGE, PAGE, shared=shared, vm=protected.vm).status == 0
    assert plain.unbind(0).status == 0
    assert gmem.convert(2 * PAGE, PAGE, shared=shared, vm=plain.vm).status == 0
    assert machine.check() == 0, machine.broken


def test_release_of_what_is_not_there() -> None:
    scene = Scene("restructure")
    release = Operation.RELEASE
    assert scene.machine.operate(release, vm=7, object_=scene.gmem.inode).status == -W.EBADF
    assert scene.machine.operate(release, vm=scene.vm.vm, object_=9).status == -W.EBADF
    ordinary = scene.machine.create_guest_memfd_4k(M2)
    assert scene.machine.operate(release, vm=scene.vm.vm, object_=ordinary.inode).status == -W.EBADF


@pytest.mark.parametrize("design", DESIGNS)
def test_release_against_a_fault_and_a_conversion(design: str) -> None:
    """A fault that has its frame retries and then finds no file; a release waits for a conversion's lock."""
    scene = Scene(design, order="jan2026")
    machine = scene.machine
    assert scene.process.munmap(VA, 2 * M2).status == 0
    assert scene.gmem.allocate(0, M2).status == 0
    machine.begin(1, Operation.GUEST_FAULT, vm=scene.vm.vm, address=0)
    for _ in range(3 if design == "restructure" else 2):  # lock, folio (, put)
        assert machine.step(1) == W.GO
    assert scene.vm.release(scene.gmem).status == 0
    assert machine.step(1) == W.STOP
    assert machine.result(1).status == W.RET_PF_RETRY
    assert scene.vm.touch(0).status == -W.EFAULT
    assert scene.vm.bind(scene.gmem, 1 << 30).status == 0
    machine.begin(2, Operation.CONVERT, flags=Flag.SHARED, object_=scene.gmem.inode, offset=0, length=PAGE)
    assert machine.step(2) == W.GO
    requests: dict[Operation, dict[str, int]] = {
        Operation.RELEASE: {"vm": scene.vm.vm}, Operation.PUNCH_HOLE: {"length": M2}, Operation.CLOSE: {},
    }  # fmt: skip
    for operation, columns in requests.items():
        assert machine.operate(operation, object_=scene.gmem.inode, **columns).status == -W.EBUSY
    machine.begin(1, Operation.RELEASE, vm=scene.vm.vm, object_=scene.gmem.inode)
    assert machine.step(1) == W.GO  # the last fput()
    assert machine.step(1) == W.BLOCKED
    while machine.step(2) != W.STOP:
        pass
    assert machine.step(1) == W.STOP
    assert machine.result(1).status == 0
    scene.sound()


# --------------------------------------------------------------------------- one machine, two ways


@pytest.mark.parametrize("design", DESIGNS)
def test_the_full_entry_gives_the_machine_that_the_fast_loops_give(design: str) -> None:
    """Random faults, conversions, holes and references, then the close: every array is equal, word for word."""
    fast, full = (Scene(design, pages=3) for _ in range(2))
    full.machine.arrays.state[W.R_FULL] = 1
    random = np.random.default_rng(7)
    inode = {"object_": fast.gmem.inode}
    held: list[int] = []
    for _ in range(150):
        page = int(random.integers(3 * 512)) * PAGE
        block = page // M2 * M2
        flags = int(random.choice([Flag.SHARED, Flag.PRIVATE]))
        length = int(random.choice([PAGE, M2]))
        kind, columns = [
            (Operation.HOST_FAULT, {"space": fast.process.space, "address": VA + page}),
            (Operation.GUEST_FAULT, {"vm": fast.vm.vm, "address": page}),
            (Operation.CONVERT, {**inode, "flags": flags, "offset": block, "length": length}),
            (Operation.PUNCH_HOLE, {**inode, "offset": block if length == M2 else page, "length": length}),
            (Operation.GET, {**inode, "offset": page}),
            (Operation.PUT, {**inode, "address": held[0] << 12 if held else 0}),
        ][int(random.integers(6))]
        results = [scene.machine.operate(kind, **columns) for scene in (fast, full)]
        assert results[0] == results[1]
        if kind == Operation.GET and results[0].status == 0:
            held.append(results[0].detail)
        if kind == Operation.PUT and held and results[0].status == 0:
            held.pop(0)
        if len(held) > 2:
            held_out = held.pop(0)
            assert [s.machine.operate(Operation.PUT, address=held_out << 12).status for s in (fast, full)] == [0, 0]
    assert [scene.gmem.close().status for scene in (fast, full)] == [0, 0]
    for pfn in held:
        assert [scene.gmem.put_reference(pfn).status for scene in (fast, full)] == [0, 0]
    assert fast.pool() == full.pool() == (3, 0)
    fast.sound()
    full.sound()
    full.machine.arrays.state[W.R_FULL] = 0
    assert_same(fast.machine, full.machine)


def test_a_page_that_leaves_under_a_host_fault_is_not_mapped() -> None:
    """At 4K a hole is not refused: the fault that holds the page finds it gone, retries, and the page goes."""
    machine = Machine(Config("restructure", pool=M2, page_size=PAGE))
    gmem = machine.create_guest_memfd(M2, shared=True)
    process = machine.create_process()
    assert process.mmap(gmem, VA).status == 0
    assert gmem.allocate(0, M2).status == 0
    free = machine.statistics.gauge(Gauge.POOL_FREE)
    machine.begin(1, Operation.HOST_FAULT, space=process.space, address=VA + 5 * PAGE)
    for _ in range(2):
        assert machine.step(1) == W.GO
    assert gmem.punch_hole(5 * PAGE, PAGE).status == 0
    assert machine.step(1) == W.STOP
    assert machine.result(1).status == W.VM_FAULT_RETRY
    assert machine.statistics.gauge(Gauge.POOL_FREE) == free + 1
    assert machine.check() == 0, machine.broken


def test_policies_go_with_their_inode() -> None:
    """mpol_free_shared_policy(): many inodes with policies, one after the other, never run out of room."""
    machine = Machine(Config("restructure", pool=2 * M2, page_size=M2, nodes=2))
    for _ in range(6):
        gmem = machine.create_guest_memfd(M2)
        for page in range(12):
            assert gmem.mbind(2 * page * PAGE, PAGE, "bind", [1]).status == 0
        assert gmem.close().status == 0
