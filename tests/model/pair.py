"""A machine and its model side by side: every operation goes to both, and what they return must be equal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from model import rules
from model.folio import Folio
from model.memory import Boot
from model.model import PAGE, Model, Outcome
from model.parameters import Parameters
from model.tables import Stage2
from pgemu.objects.address_space import AddressSpace
from pgemu.objects.guest_memfd import GuestMemfd
from pgemu.objects.machine import Config, Machine, Result
from pgemu.objects.pins import leaves_of
from pgemu.objects.vm import Vm
from pgemu_kernels import words as W

IOVA, AREA, BLOCK = 0x40_0000_0000, 1 << 31, 1 << 18  # areas of devices, as far apart as large entries need


class Pair:
    """Objects are addressed by number, in order of creation; offsets, addresses and lengths are in bytes."""

    way = ""  # how an IOAS takes guest_memfd; "": there are no devices

    def __init__(self, config: Config) -> None:
        self.machine = self.boot(config)
        parameters = Parameters.of(config)
        known = parameters.nodes == 1 and parameters.page_order > 0
        self.model = Model(parameters, None if known else self.figures())
        self.model.memory.choose = self.chosen_page
        self.inodes: list[GuestMemfd] = []
        self.spaces: list[AddressSpace] = []
        self.vms: list[Vm] = []
        self.written: dict[tuple[int, int], bytes] = {}
        self.areas: dict[int, tuple[int, int, int, int]] = {}  # of files: I/O page, inode, first page, pages

    @staticmethod
    def boot(config: Config) -> Machine:
        machine = Machine(config)
        machine.check_each()
        return machine

    def figures(self) -> Boot:
        """What boot took, where the model does not know."""
        gauges = (W.Gauge.FRAMES_USED, W.Gauge.KERNEL_TABLES, W.Gauge.VMEMMAP_PAGES)
        return Boot(
            *(int(self.machine.arrays.stats[int(W.STATS_GAUGES) + 2 * gauge]) for gauge in gauges),
            self.machine.register(W.R_FRAMES_LIMIT),
            self.machine.register(W.R_POOL_BASE),
        )

    def chosen_page(self, inode: int, index: int) -> int | None:
        """The 4K page that the machine has put at a page of an inode."""
        return self.inodes[inode].pfn(index * PAGE)

    # ------------------------------------------------------------------ making

    def create_guest_memfd(self, size: int, shared: bool) -> None:
        expected = self.model.create_guest_memfd(size, shared)
        self.create(self.inodes, expected, self.machine.create_guest_memfd, size, shared=shared)

    def create_process(self) -> None:
        self.create(self.spaces, self.model.create_process(), self.machine.create_process)

    def create_vm(self, space: int, kind: str) -> None:
        expected = self.model.create_vm(space, kind)
        self.create(self.vms, expected, self.machine.create_vm, self.spaces[space], kind=kind)

    @staticmethod
    def create(objects: list[Any], expected: int | None, make: Any, *args: Any, **kwargs: Any) -> None:
        """Make an object, or fail for want of memory, as the model did."""
        if expected is None:
            with pytest.raises(OSError) as error:
                make(*args, **kwargs)
            assert error.value.errno == W.ENOMEM
        else:
            objects[expected : expected + 1] = [make(*args, **kwargs)]

    def fork(self, space: int) -> None:
        self.create(self.spaces, self.model.fork(space), self.spaces[space].fork)

    def limit_frames(self, free: int | None) -> None:
        """Let only so many more frames of metadata be taken."""
        self.machine.limit_frames(free)
        self.model.memory.limit_frames(free)

    # ------------------------------------------------------------------ operations

    def agree(self, got: Result, expected: Outcome) -> None:
        assert tuple(got) == tuple(expected), f"the machine returned {got}, the model {expected}"

    def same(self, got: Result, expected: Outcome) -> Outcome:
        self.agree(got, expected)
        self.model.settle()
        return expected

    def host_fault(self, space: int, address: int, write: bool = False) -> Outcome:
        outcome = self.same(
            self.spaces[space].touch(address, write=write), self.model.host_fault(space, address, write)
        )
        self.compare_host(space, address)
        return outcome

    def guest_fault(self, vm: int, gpa: int, private: bool | None = None, accept: bool = False) -> Outcome:
        flags = 0 if private is None else W.Flag.PRIVATE if private else W.Flag.SHARED
        flags |= W.Flag.ACCEPT_4K if accept else 0
        got = self.machine.operate(W.Operation.GUEST_FAULT, flags=flags, vm=vm, address=gpa)
        outcome = self.same(got, self.model.guest_fault(vm, gpa, private, accept))
        self.compare_guest(vm, gpa)
        return outcome

    def prefault(self, vm: int, gpa: int, length: int) -> Outcome:
        outcome = self.same(self.vms[vm].prefault(gpa, length), self.model.prefault(vm, gpa, length))
        self.compare_guest(vm, gpa)
        return outcome

    def allocate(self, inode: int, offset: int, length: int) -> Outcome:
        got = self.machine.operate(W.Operation.ALLOCATE, object_=inode, offset=offset, length=length)
        return self.same(got, self.model.allocate(inode, offset, length))

    def set_policy(self, inode: int | None, offset: int, length: int, mode: int, nodes: int) -> Outcome:
        number = int(W.NO_INODE) if inode is None else inode
        got = self.machine.operate(
            W.Operation.MEMORY_POLICY, flags=mode, object_=number, offset=offset, length=length, address=nodes
        )
        return self.same(got, self.model.set_policy(inode, offset, length, mode, nodes))

    def log_dirty_pages(self, vm: int, gpa: int, on: bool) -> Outcome:
        flags = W.Flag.LOG_DIRTY_PAGES if on else 0
        got = self.machine.operate(W.Operation.DIRTY_LOGGING, flags=flags, vm=vm, address=gpa)
        return self.same(got, self.model.log_dirty_pages(vm, gpa, on))

    def convert(self, inode: int, offset: int, length: int, shared: bool, vm: int | None = None) -> Outcome:
        """`vm`: whose file; None: that of the first VM with private memory, if any has one."""
        if vm is None:
            vm = next((i for i, kind in enumerate(self.model.kinds) if kind != "plain"), 0)
        expected = self.model.convert(inode, offset, length, shared, vm)
        return self.same(self.inodes[inode].convert(offset, length, shared=shared, vm=vm), expected)

    def punch_hole(self, inode: int, offset: int, length: int) -> Outcome:
        before = set(self.model.inodes[inode].blocks)
        outcome = self.same(self.inodes[inode].punch_hole(offset, length), self.model.punch_hole(inode, offset, length))
        gone = before - self.model.inodes[inode].blocks.keys()
        order = self.model.order
        # A hole refused at a page has zeroed what lies before it.
        stop = {0: offset + length, -W.EAGAIN: outcome.detail}.get(outcome.status, 0)
        self.forget(inode, lambda index: index >> order in gone or offset <= index * PAGE < stop)
        return outcome

    def mmap(
        self, space: int, address: int, inode: int, offset: int, length: int, read_only: bool = False,
        counted: bool = False,
    ) -> Outcome:  # fmt: skip
        got = self.spaces[space].mmap(
            self.inodes[inode], address, offset=offset, length=length, read_only=read_only, counted=counted
        )
        return self.same(got, self.model.mmap(space, address, inode, offset, length, read_only, counted))

    def munmap(self, space: int, address: int, length: int) -> Outcome:
        return self.same(self.spaces[space].munmap(address, length), self.model.munmap(space, address, length))

    def zap(self, space: int, address: int, length: int, madvise: bool) -> Outcome:
        got = self.spaces[space].zap(address, length, madvise=madvise)
        return self.same(got, self.model.zap(space, address, length, madvise))

    def bind(self, vm: int, gpa: int, inode: int, offset: int, length: int) -> Outcome:
        got = self.vms[vm].bind(self.inodes[inode], gpa, offset=offset, length=length)
        return self.same(got, self.model.bind(vm, gpa, inode, offset, length))

    def unbind(self, vm: int, gpa: int) -> Outcome:
        return self.same(self.vms[vm].unbind(gpa), self.model.unbind(vm, gpa))

    def get(self, inode: int, offset: int) -> Outcome:
        return self.same(self.inodes[inode].get_reference(offset), self.model.get(inode, offset))

    def put(self, pfn: int) -> Outcome:
        got = self.machine.operate(W.Operation.PUT, address=pfn * PAGE)
        return self.same(got, self.model.put(pfn))

    def pin(self, space: int, address: int, length: int, pin: int, write: bool, longterm: bool = False) -> Outcome:
        flags = (W.Flag.WRITE if write else 0) | (W.Flag.LONGTERM if longterm else 0)
        got = self.machine.operate(
            W.Operation.PIN, flags=flags, space=space, object_=pin, address=address, length=length
        )
        return self.same(got, self.model.pin(space, address, length, pin, write))

    def unpin(self, pin: int) -> Outcome:
        return self.same(self.machine.operate(W.Operation.UNPIN, object_=pin), self.model.unpin(pin))

    # ------------------------------------------------------------------ devices

    def open_devices(self, way: str) -> None:
        """A VFIO container and an IOAS that takes guest_memfd in some way, each with a device."""
        self.way = way
        self.container = self.machine.create_vfio_container()
        self.container.attach()
        self.ioas = self.machine.create_iommufd().create_ioas("amd", guest_memfd=way)
        self.ioas.attach()

    def map_for_device(self, area: int, space: int, address: int, length: int, write: bool) -> Outcome:
        got = self.container.map(IOVA + area * AREA, length, self.spaces[space], address, write=write)
        expected = self.model.map_for_device(area, space, address, length, write)
        return self.same(got, expected)

    def unmap_for_device(self, area: int) -> Outcome:
        got = self.container.unmap(IOVA + area * AREA, AREA)
        return self.same(got, self.model.unmap_for_device(area))

    def map_file(self, area: int, inode: int, first: int, pages: int) -> None:
        """Aligned as the file is, so that large entries are made."""
        memfd, model = self.inodes[inode], self.model.inodes[inode]
        iova = IOVA + area * AREA + first % BLOCK * PAGE
        if area in self.areas:
            start, _, _, count = self.areas[area]
            if iova // PAGE >= start + count or start >= iova // PAGE + pages:
                return  # an area has one map
        got = self.ioas.map_file(iova, pages * PAGE, self.spaces[0], memfd, first * PAGE)
        refused = self.way == "refused" or not model.open
        expected = -W.EINVAL if refused else -W.EEXIST if area in self.areas else 0
        self.agree(Result(got.status, 0), Outcome(expected))
        if not expected:
            self.areas[area] = iova // PAGE, inode, first, pages

    def unmap_file(self, area: int) -> None:
        if area in self.areas:
            start, _, _, pages = self.areas.pop(area)
            self.agree(self.ioas.unmap(start * PAGE, pages * PAGE), Outcome(0, pages * PAGE))

    @property
    def io_frames(self) -> int:
        """Frames of I/O page tables and of trees of areas: what the model does not know of those in use."""
        if not self.way:
            return 0
        nodes = int(self.machine.arrays.stats[int(W.STATS_GAUGES) + 2 * W.Gauge.CACHE_NODES])
        own = sum(self.model.pin_nodes(len(frames)) for frames in self.model.pins.values())
        return self.machine.register(W.R_EDIT_FRAMES) + nodes - own

    def compare_devices(self) -> None:
        """What a device reaches of files that the kernel takes from it is shared, and where it says."""
        if self.way not in ("notifier", "revoke", "mirror"):
            return
        starts, sizes = leaves_of(self.machine.arrays.ram, self.ioas.table.format, self.ioas.root)
        for (iova, pfn), count in zip(starts.tolist(), sizes.tolist(), strict=True):
            start, inode, first, pages = next(a for a in self.areas.values() if a[0] <= iova < a[0] + a[3])
            assert iova + count <= start + pages
            model = self.model.inodes[inode]
            assert model.open
            assert model.shared.issuperset(range(first + iova - start, first + iova - start + count))
            for i in {0, count - 1}:
                assert self.model.pfn(inode, first + iova - start + i) == pfn + i

    # ------------------------------------------------------------------ pages that KVM itself maps

    def map_page(self, vm: int, gpa: int, number: int, write: bool) -> Outcome:
        flags = W.Flag.WRITE if write else 0
        got = self.machine.operate(W.Operation.NESTED_MAP, flags=flags, vm=vm, object_=number, address=gpa)
        return self.same(got, self.model.map_page(vm, gpa, number, write))

    def refresh(self, vm: int, gpa: int, length: int, number: int) -> Outcome:
        got = self.machine.operate(
            W.Operation.NESTED_MAP, flags=W.Flag.CACHED, vm=vm, object_=number, address=gpa, length=length
        )
        return self.same(got, self.model.refresh(vm, gpa, length, number))

    def access(self, number: int, write: bool) -> Outcome:
        flags = W.Flag.THROUGH | (W.Flag.WRITE if write else 0)
        got = self.machine.operate(W.Operation.NESTED_MAP, flags=flags, object_=number)
        return self.same(got, self.model.access(number, write))

    def unmap_page(self, number: int) -> Outcome:
        got = self.machine.operate(W.Operation.NESTED_UNMAP, object_=number)
        return self.same(got, self.model.unmap_page(number))

    def drain_lru(self) -> Outcome:
        return self.same(self.machine.operate(W.Operation.LRU_DRAIN), self.model.drain_lru())

    def work(self) -> Outcome:
        return self.same(self.machine.operate(W.Operation.WORK), self.model.work())

    def release(self, vm: int, inode: int) -> Outcome:
        got = self.machine.operate(W.Operation.RELEASE, vm=vm, object_=inode)
        return self.same(got, self.model.release(vm, inode))

    def memory_failure(self, inode: int, offset: int) -> Outcome:
        got = self.machine.operate(W.Operation.MEMORY_FAILURE, object_=inode, offset=offset)
        return self.same(got, self.model.memory_failure(inode, offset))

    def unpoison(self, pfn: int) -> Outcome:
        """What spins for the reference goes on with the next operation of the designs."""
        got, expected = self.machine.unpoison(pfn * PAGE), self.model.unpoison(pfn)
        self.agree(got, expected)
        return expected

    def exit(self, space: int) -> Outcome:
        return self.same(self.spaces[space].exit(), self.model.exit(space))

    def close(self, inode: int) -> Outcome:
        self.forget(inode, lambda _: True)
        return self.same(self.inodes[inode].close(), self.model.close(inode))

    # ------------------------------------------------------------------ contents

    def forget(self, inode: int, pages: Any) -> None:
        """Pages for which `pages(index)` holds read as zero from now on."""
        for key in [k for k in self.written if k[0] == inode and pages(k[1])]:
            del self.written[key]

    def write(self, inode: int, index: int, data: bytes) -> None:
        """Store a page that a fault has made visible."""
        pfn = self.model.pfn(inode, index)
        assert pfn is not None
        if self.model.memory.write(pfn, data):
            self.machine.write_frame(pfn, data)
            self.written[inode, index] = data
        else:
            with pytest.raises(OSError) as error:
                self.machine.write_frame(pfn, data)
            assert error.value.errno == W.ENOMEM

    def compare_contents(self, inode: int, index: int) -> None:
        """A page that a fault has made visible shows what was written last, or zeroes."""
        pfn = self.inodes[inode].pfn(index * PAGE)
        assert pfn is not None
        known = self.written.get((inode, index), bytes(PAGE))
        if self.model.parameters.keeps_shown:  # what an earlier owner wrote may show, and what was written be lost
            known = self.model.memory.contents.get(pfn, bytes(PAGE))
        assert self.machine.read_frame(pfn) == known, f"page {index}"

    # ------------------------------------------------------------------ comparing

    def check_rules(self) -> None:
        """The safety rules, on the machine's own arrays."""
        self.check_findings()
        rules.check(rules.view_of_machine(self.machine, self.model.order), self.model)

    def compare_host(self, space: int, address: int) -> None:
        """A process's entry, and its folio's counts."""
        found = self.model.spaces[space].find(address // PAGE)
        level, _, value = self.spaces[space].walk(address)[-1]
        assert value & 1 == (found is not None)
        bad = address // PAGE in self.model.spaces[space].poisoned
        assert (value != 0 and not value & 1) == bad, f"{value:#x}"
        if found is None:
            return
        wanted, entry = found
        # Bits 9 and 1; of a large entry bit 12 is PAT.
        frame = value >> 12 & (1 << 40) - 1 & ~((1 << 9 * (level - 1)) - 1)
        assert (level, frame) == (wanted, entry.pfn)
        assert (bool(value & 1 << 9), bool(value & 2)) == (entry.special, entry.writable)
        self.compare_folio(entry.pfn)

    def compare_guest(self, vm: int, gpa: int) -> None:
        """Level and frame of a guest address, below the root that it is mapped by."""
        tree = self.model.tree_at(vm, gpa // PAGE)
        self.compare_leaf(vm, gpa, tree)

    def compare_leaf(self, vm: int, gpa: int, tree: Stage2) -> None:
        found = tree.find(gpa // PAGE)
        level, _, value = self.vms[vm].walk(gpa, private=tree.mirror)[-1]
        assert value >> 11 & 1 == (found is not None)  # SPTE_MMU_PRESENT: a cached MMIO entry has it not
        if found is not None:
            assert (level, value >> 12 & (1 << 40) - 1) == found

    def compare_folio(self, pfn: int) -> None:
        """Refcount and, of a 4K folio in the page cache, mapcount of a frame in use."""
        folio = self.model.memory.folio_of(pfn)
        assert folio is not None
        unit = folio.unit(pfn)
        word = int(self.machine.struct_page(folio.head + unit)[6])
        assert word >> 32 == folio.references(pfn)
        if folio.size(unit) == 1 and folio.cached:
            assert (word + 1 & 0xFFFF_FFFF) == folio.mapped[unit]

    def compare_gauges(self) -> None:
        stats = self.machine.arrays.stats
        for gauge, expected in self.model.gauges.items():
            got = int(stats[int(W.STATS_GAUGES) + 2 * gauge])
            assert got == expected + (self.io_frames if gauge == W.Gauge.FRAMES_USED else 0), gauge.name
        self.compare_devices()
        rows = stats[int(W.STATS_COUNTERS) :][: W.OPERATIONS * W.EVENTS].reshape(W.OPERATIONS, W.EVENTS)
        for event, expected in (
            (W.Event.STALE_PAGE_SHOWN, self.model.memory.stale),
            (W.Event.MAPPED_STALE_PRIVATE, self.model.stale_private),
            (W.Event.MAPPED_STALE_FREED, self.model.stale_freed),
        ):
            assert int(rows[:, event].sum()) == expected, event.name

    def compare_everything(self) -> None:
        """Every leaf, every folio, every page's shareability, and the machine's own recount."""
        self.compare_gauges()
        for space, tables in enumerate(self.model.spaces):
            if not tables.live:
                continue
            for page in [*tables.entries, *(number << 9 * (level - 1) for level, number in tables.huge)]:
                self.compare_host(space, page * PAGE)
        for vm in range(len(self.model.vms)):
            for tree in self.model.trees(vm):
                for level, number in tree.leaves:
                    self.compare_leaf(vm, number << 12 + 9 * (level - 1), tree)
        for inode, memfd in zip(self.model.inodes, self.inodes, strict=True):
            self.compare_shareability(memfd, inode.pages, inode.shared)
        for folio in self.model.memory.in_use.values():
            for page in {0, *folio.held, *folio.pinned, *folio.kept, *folio.cached_by_cpu}:
                self.compare_folio(folio.head + page)
        for inode, memfd in zip(self.model.inodes, self.inodes, strict=True):
            if inode.open and self.model.order:
                self.compare_zeroed(memfd.inode, inode.blocks)
        self.machine.check()
        self.model.note_stale()
        self.check_findings()
        if self.model.parameters.flag_stays and rules.is_stale(rules.view_of_model(self.model), self.model):
            assert W.Broken.STALE_CONTENTS in [finding.rule for finding in self.machine.findings]

    def check_findings(self) -> None:
        """No rule is broken but by the defects that the model has, too."""
        memory = self.model.memory
        found = {finding.rule for finding in self.machine.findings}
        lost = {W.Broken.LOST_CONTENTS} if memory.lost else set()
        stale = {W.Broken.STALE_MAPPING} if self.model.was_stale else set()
        assert found - {W.Broken.STALE_CONTENTS} == lost | stale, self.machine.broken
        assert W.Broken.STALE_CONTENTS not in found or (memory.stale and self.model.parameters.flag_stays)

    def compare_zeroed(self, inode: int, blocks: dict[int, Folio]) -> None:
        """PG_uptodate of some folios of huge pages, and the bits of zeroed pages where they count."""
        state = self.machine.arrays.state
        row = int(W.STATE_INODES) + inode * W.I_WORDS
        for number, folio in blocks.items():
            for page in {0, 1, 3, 255, 511, *sorted(folio.uptodate)[:2], *sorted(folio.zeroed)[-2:]}:
                unit = folio.unit(folio.head + page)
                flag = int(self.machine.struct_page(folio.head + unit)[0]) >> 3 & 1
                assert flag == (unit in folio.uptodate), f"PG_uptodate of folio {unit:#x} of block {number}"
            noted = int(state[int(state[row + int(W.I_BLOCK)]) + number * W.B_WORDS + int(W.B_BITS)])
            word = int(state[row + int(W.I_ZEROED)]) + (number << self.model.order) // 64
            bits = state[word : word + folio.pages // 64].view(np.uint8)
            zeroed = set(np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist())
            if self.model.parameters.flag_stays:
                assert zeroed == folio.zeroed
            else:
                assert zeroed <= folio.zeroed
                assert noted or not zeroed
                assert not folio.whole or folio.uptodate or zeroed == folio.zeroed

    def compare_shareability(self, memfd: GuestMemfd, pages: int, shared: set[int]) -> None:
        state = self.machine.arrays.state
        word = int(state[int(W.STATE_INODES) + memfd.inode * W.I_WORDS + int(W.I_WORD)])
        bits = self.machine.arrays.state[word : word + -(-pages // 64)].view(np.uint8)
        assert set(np.flatnonzero(np.unpackbits(bits, bitorder="little")[:pages]).tolist()) == shared
