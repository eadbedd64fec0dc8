"""Who holds a page: pins, LRU batches, transient references; and what that keeps from happening."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pgemu.objects.address_space import AddressSpace
from pgemu.objects.guest_memfd import GuestMemfd
from pgemu.objects.machine import Config, Machine
from pgemu.trace.schema import Records
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Event, Gauge
from pgemu_kernels.words.operations import Flag, Operation

M2 = W.PAGE_2M
GIB = W.PAGE_1G
PAGE = W.PAGE_4K
VA = 0x7F00_0000_0000
OK = (0, 0)
BIAS = 1024
BATCH = 31  # PAGEVEC_SIZE


class Scene:
    """Two huge pages of one inode, all shared unless asked otherwise, mapped by a process."""

    def __init__(self, design: str = "restructure", *, shared: bool = True, size: int = M2, **parameters: Any) -> None:
        self.machine = Machine(Config(design, pool=2 * size, page_size=size, **parameters))  # type: ignore[arg-type]
        self.gmem: GuestMemfd = self.machine.create_guest_memfd(2 * size, shared=shared)
        self.process: AddressSpace = self.machine.create_process()
        assert self.process.mmap(self.gmem, VA).status == 0

    def references(self, offset: int) -> int:
        pfn = self.gmem.pfn(offset)
        assert pfn is not None
        return int(self.machine.struct_page(pfn)[6]) >> 32

    def gauge(self, gauge: Gauge) -> int:
        return self.machine.statistics.gauge(gauge)

    def sound(self) -> None:
        assert self.machine.check() == 0, self.machine.broken


# --------------------------------------------------------------------------- pins


@pytest.mark.parametrize("size", [M2, GIB])
def test_pin_faults_pages_in_and_holds_1024_references_of_each(size: int) -> None:
    s = Scene(size=size)
    assert s.process.touch(VA + PAGE).status == W.VM_FAULT_LOCKED
    assert s.process.pin(VA, 3 * PAGE, pin=7, write=True) == (0, 3)
    first = s.gmem.pfn(0)
    assert first is not None
    assert s.machine.pinned_frames(7).tolist() == [first, first + 1, first + 2]
    # The page cache's, the entry's, the pin's.
    assert [s.references(i * PAGE) for i in range(4)] == [2 + BIAS] * 3 + [1]
    assert s.machine.folio(first).maybe_dma_pinned
    assert s.gauge(Gauge.PAGES_PINNED) == 3
    assert s.machine.statistics.event(Event.PAGE_PINNED) == 3
    assert s.machine.statistics.event(Event.HOST_FAULT) == 3  # page 1 was there
    s.sound()
    assert s.machine.unpin(7) == (0, 3)
    assert [s.references(i * PAGE) for i in range(4)] == [2, 2, 2, 1]
    assert s.gauge(Gauge.PAGES_PINNED) == 0
    assert s.gauge(Gauge.CACHE_NODES) == 0
    assert s.machine.unpin(7) == (-W.ENOENT, 0)
    s.sound()


@pytest.mark.parametrize(
    ("address", "length", "pin", "expected"),
    [
        (VA + 1, PAGE, 0, -W.EINVAL),
        (VA, PAGE + 8, 0, -W.EINVAL),
        (VA, 0, 0, -W.EINVAL),
        ((1 << 64) - PAGE, 2 * PAGE, 0, -W.EINVAL),
        (VA, PAGE, W.PINS, -W.EINVAL),
        (VA, PAGE, 3, -W.EEXIST),
        (VA - PAGE, PAGE, 0, -W.EFAULT),
        (VA + 2 * M2, PAGE, 0, -W.EFAULT),
    ],
)
def test_pin_refuses(address: int, length: int, pin: int, expected: int) -> None:
    s = Scene()
    assert s.process.pin(VA, PAGE, pin=3).status == 0
    assert s.process.pin(address, length, pin=pin) == (expected, 0)
    assert s.gauge(Gauge.PAGES_PINNED) == 1
    s.sound()


def test_pin_for_writing_needs_a_mapping_that_may_be_written() -> None:
    s = Scene()
    assert s.process.mmap(s.gmem, VA + GIB, read_only=True).status == 0
    assert s.process.pin(VA + GIB, PAGE, pin=0, write=True).status == -W.EFAULT
    assert s.process.pin(VA + GIB, PAGE, pin=0) == (0, 1)
    s.sound()


@pytest.mark.parametrize("longterm", [False, True])
def test_pin_ends_short_at_the_first_private_page(longterm: bool) -> None:
    s = Scene()
    assert s.gmem.convert(2 * PAGE, PAGE, shared=False) == OK
    assert s.process.pin(VA, 4 * PAGE, pin=0, longterm=longterm) == (0, 2)
    assert s.machine.pinned_frames(0).size == 2
    assert s.process.pin(VA + 2 * PAGE, PAGE, pin=1, longterm=longterm) == (-W.EFAULT, 0)  # SIGBUS
    s.sound()


def test_pin_without_memory() -> None:
    s = Scene()
    s.machine.arrays.state[W.R_FRAMES_LIMIT] = s.gauge(Gauge.FRAMES_USED)
    assert s.process.pin(VA, PAGE, pin=0) == (-W.ENOMEM, 0)
    # Enough for the split, the tables and one node of the pin's list: it holds 512 pages.
    s.machine.arrays.state[W.R_FRAMES_LIMIT] = 1 << 30
    assert s.process.pin(VA, PAGE, pin=0) == (0, 1)
    s.process.touch_many(np.arange(VA, VA + 2 * M2, PAGE, dtype=np.uint64))
    assert s.machine.unpin(0).status == 0
    s.machine.arrays.state[W.R_FRAMES_LIMIT] = s.gauge(Gauge.FRAMES_USED) + 1
    assert s.process.pin(VA, 600 * PAGE, pin=0) == (0, 512)
    s.sound()
    assert s.machine.unpin(0) == (0, 512)
    s.sound()


@pytest.mark.parametrize("longterm", [False, True])
def test_gup_refuses_pfnmap(longterm: bool) -> None:
    """VM_PFNMAP: -EFAULT whether the page is mapped or not, and no fault is attempted."""
    s = Scene("pfnmap")
    assert s.process.pin(VA, PAGE, pin=0, longterm=longterm) == (-W.EFAULT, 0)
    assert s.gmem.pfn(0) is None
    assert s.process.touch(VA).status == W.VM_FAULT_NOPAGE
    assert s.process.pin(VA, PAGE, pin=0, longterm=longterm) == (-W.EFAULT, 0)
    assert s.gmem.convert(0, 2 * M2, shared=False) == OK
    s.sound()


@pytest.mark.parametrize("order", ["rfc2", "fixup", "jan2026"])
@pytest.mark.parametrize("longterm", [False, True])
def test_pinned_page_refuses_the_conversion_at_its_offset(order: str, longterm: bool) -> None:
    s = Scene(order=order)
    assert s.process.pin(VA + 700 * PAGE, 2 * PAGE, pin=0, longterm=longterm) == (0, 2)
    assert s.gmem.convert(M2 // 2, M2, shared=False) == (-W.EAGAIN, 700 * PAGE)
    assert s.gmem.is_shared(700 * PAGE)
    # What is not pinned converts, its block stays split beside the shared ones.
    assert s.gmem.convert(M2, 100 * PAGE, shared=False) == OK
    assert s.machine.unpin(0).status == 0
    assert s.gmem.convert(0, 2 * M2, shared=False) == OK
    assert not s.gmem.is_split(700 * PAGE)
    s.sound()


def test_unpin_of_a_page_that_left_the_inode_returns_its_block() -> None:
    s = Scene()
    assert s.process.pin(VA + 5 * PAGE, 2 * PAGE, pin=0) == (0, 2)
    assert s.process.pin(VA + 6 * PAGE, PAGE, pin=1, write=True) == (0, 1)
    assert s.gmem.punch_hole(0, M2) == (-W.EAGAIN, 0)  # the block cannot be merged
    s.sound()
    assert s.gmem.close() == OK
    assert (s.gauge(Gauge.BLOCKS_ZOMBIE), s.gauge(Gauge.POOL_FREE)) == (1, 1)
    s.sound()
    assert s.machine.unpin(0) == (0, 2)
    assert (s.gauge(Gauge.BLOCKS_ZOMBIE), s.gauge(Gauge.POOL_FREE)) == (1, 1)  # page 6 is held by pin 1
    s.sound()
    assert s.machine.unpin(1) == (0, 1)
    assert (s.gauge(Gauge.BLOCKS_ZOMBIE), s.gauge(Gauge.POOL_FREE)) == (0, 2)
    s.sound()


def test_pin_that_meets_a_conversion_under_way() -> None:
    """A page that is still mapped is pinned without a lock; one that must fault meets the invalidate_lock."""
    s = Scene()
    s.process.touch(VA)
    s.machine.begin(1, Operation.CONVERT, flags=Flag.PRIVATE, offset=0, length=M2)
    assert s.machine.step(1) == W.GO  # the lock is held, nothing is unmapped
    assert s.process.pin(VA, 2 * PAGE, pin=0) == (0, 1)
    assert s.process.pin(VA + PAGE, PAGE, pin=1) == (-W.EAGAIN, 0)
    while s.machine.step(1) != W.STOP:
        pass
    assert s.machine.result(1) == (-W.EAGAIN, 0)
    s.sound()


# --------------------------------------------------------------------------- transient references


def test_put_drops_only_what_get_took() -> None:
    s = Scene()
    assert s.process.pin(VA, PAGE, pin=0).status == 0
    pfn = s.gmem.pfn(0)
    assert pfn is not None
    assert s.gmem.put_reference(pfn).status == -W.ENOENT
    assert s.gmem.get_reference(0) == (0, pfn)
    assert s.gmem.get_reference(0) == (0, pfn)
    s.sound()
    assert [s.gmem.put_reference(pfn).status for _ in range(3)] == [0, 0, -W.ENOENT]
    assert s.references(0) == 2 + BIAS
    s.sound()


def test_put_leaves_the_reference_of_a_fault_under_way() -> None:
    s = Scene()
    assert s.gmem.allocate(0, M2).status == 0
    s.machine.begin(1, Operation.HOST_FAULT, address=VA)
    assert [s.machine.step(1), s.machine.step(1)] == [W.GO, W.GO]
    pfn = s.gmem.pfn(0)
    assert pfn is not None
    s.sound()
    assert s.gmem.put_reference(pfn).status == -W.ENOENT
    assert s.references(0) == 2
    assert s.machine.step(1) == W.STOP
    s.sound()


@pytest.mark.parametrize("design", ["restructure", "pfnmap"])
def test_references_of_many(design: str) -> None:
    """Batches give what single calls give, in results and in the machine."""
    offsets = np.array([0, PAGE, 0, 700 * PAGE, 4 * M2], np.uint64)
    one, many = Scene(design, shared=True), Scene(design, shared=True)
    for s in (one, many):
        s.process.touch_many(np.arange(VA, VA + 2 * M2, 64 * PAGE, dtype=np.uint64))
    taken = many.gmem.get_reference_many(offsets)
    singles = [one.gmem.get_reference(int(offset)) for offset in offsets]
    assert list(zip(taken.status.tolist(), taken.detail.tolist(), strict=True)) == [tuple(r) for r in singles]
    assert taken.status.tolist() == [0, 0, 0, 0, -W.ENOENT]
    one.sound()
    assert same_machine(one.machine, many.machine)
    dropped = many.gmem.put_reference_many(np.repeat(taken.detail[:4], 2))
    for pfn in np.repeat(taken.detail[:4], 2):
        one.gmem.put_reference(int(pfn))
    assert np.count_nonzero(dropped.status == 0) == 4
    assert same_machine(one.machine, many.machine)
    many.sound()


def same_machine(one: Machine, other: Machine) -> bool:
    """Whether all words are equal, records of operations aside."""
    for a, b in zip(one.arrays, other.arrays, strict=True):
        a, b = a.copy(), b.copy()
        if a.dtype == np.uint64 and a.size == one.arrays.state.size:
            a[int(W.STATE_OPS) : int(W.STATE_INODES)] = b[int(W.STATE_OPS) : int(W.STATE_INODES)] = 0
        if not np.array_equal(a, b):
            return False
    return True


def test_pins_of_many() -> None:
    one, many = Scene(), Scene()
    addresses = VA + np.array([0, 3, 3, 2000, 600], np.uint64) * np.uint64(PAGE)
    pins = np.array([0, 1, 2, 3, 0], np.uint64)
    taken = many.process.pin_many(addresses, 2 * PAGE, pins=pins, write=True)
    singles = [one.process.pin(int(a), 2 * PAGE, pin=int(p), write=True) for a, p in zip(addresses, pins, strict=True)]
    assert list(zip(taken.status.tolist(), taken.detail.tolist(), strict=True)) == [tuple(r) for r in singles]
    assert taken.status.tolist() == [0, 0, 0, -W.EFAULT, -W.EEXIST]
    assert same_machine(one.machine, many.machine)
    many.sound()
    released = many.machine.unpin_many(np.array([2, 3, 0, 1], np.uint64))
    for pin in (2, 3, 0, 1):
        one.machine.unpin(pin)
    assert released.status.tolist() == [0, -W.ENOENT, 0, 0]
    assert same_machine(one.machine, many.machine)
    many.sound()


# --------------------------------------------------------------------------- LRU batches


def test_pieces_of_a_split_wait_in_a_batch_of_31() -> None:
    """512 pieces fill 16 batches; the last 16 pieces stay referenced until somebody drains."""
    s = Scene(shared=False, split_form="rfc2", lru_cache=True)
    assert s.process.touch(VA).status == W.VM_FAULT_SIGBUS
    vm = s.machine.create_vm(s.process, protected=True)
    assert vm.bind(s.gmem, 0).status == 0
    assert vm.touch(0).detail == 2
    assert s.gmem.convert(0, PAGE, shared=True) == OK
    left = 512 % BATCH
    assert [s.references(i * PAGE) for i in (0, 511 - left, 512 - left, 511)] == [1, 1, 2, 2]
    assert s.gauge(Gauge.PAGES_LRU_CACHED) == left
    assert s.machine.statistics.event(Event.LRU_CACHE_ADDED) == 512
    s.sound()
    pfn = s.gmem.pfn(511 * PAGE)
    assert pfn is not None
    assert s.gmem.put_reference(pfn).status == -W.ENOENT
    # Page 0 is idle, so the gate lets it through; the freeze of the merge would spin while pieces are in a batch.
    assert s.gmem.convert(0, PAGE, shared=False) == (-W.WOULD_SPIN, (512 - left) * PAGE)
    assert s.gmem.is_split(0)
    s.sound()
    assert s.machine.drain_lru() == (0, left)
    assert not s.gmem.is_split(0)
    assert s.gmem.convert(0, M2, shared=True) == OK
    assert s.gauge(Gauge.PAGES_LRU_CACHED) == left
    assert s.gmem.convert(0, M2, shared=False) == (-W.EAGAIN, (512 - left) * PAGE)
    assert s.machine.drain_lru() == (0, left)
    assert s.machine.drain_lru() == (0, 0)
    assert s.gauge(Gauge.PAGES_LRU_CACHED) == 0
    assert s.gmem.convert(0, M2, shared=False) == OK
    assert not s.gmem.is_split(0)
    s.sound()


def test_batches_are_per_cpu() -> None:
    s = Scene(shared=False, split_form="rfc2", lru_cache=True, host_cpus=2)
    vm = s.machine.create_vm(s.process, protected=True)
    assert vm.bind(s.gmem, 0).status == 0
    vm.touch_many(np.array([0, M2], np.uint64))
    assert s.gmem.convert(0, PAGE, shared=True, actor=4) == OK
    assert s.gmem.convert(M2, PAGE, shared=True, actor=5) == OK
    assert s.gauge(Gauge.PAGES_LRU_CACHED) == 2 * (512 % BATCH)
    # The next of CPU 1 fills its batch, that of CPU 0 stays.
    s.sound()
    assert s.machine.drain_lru() == (0, 2 * (512 % BATCH))
    s.sound()


def test_a_batch_keeps_a_closed_inode_s_block_from_the_pool() -> None:
    s = Scene(shared=False, split_form="rfc2", lru_cache=True)
    vm = s.machine.create_vm(s.process, protected=True)
    assert vm.bind(s.gmem, 0).status == 0
    vm.touch(0)
    assert s.gmem.convert(0, PAGE, shared=True) == OK
    assert s.gmem.close() == OK
    assert (s.gauge(Gauge.BLOCKS_ZOMBIE), s.gauge(Gauge.POOL_FREE)) == (1, 1)
    s.sound()
    assert s.machine.drain_lru() == (0, 512 % BATCH)
    assert (s.gauge(Gauge.BLOCKS_ZOMBIE), s.gauge(Gauge.POOL_FREE)) == (0, 2)
    s.sound()


# --------------------------------------------------------------------------- the recount


@pytest.mark.parametrize("what", ["reference", "pin", "batch", "transient", "gauge"])
def test_recount_finds_a_holder_that_is_not(what: str) -> None:
    s = Scene()
    assert s.process.pin(VA, 2 * PAGE, pin=0).status == 0
    assert s.gmem.get_reference(9 * PAGE).status == 0
    s.sound()
    state, arrays = s.machine.arrays.state, s.machine.arrays
    if what == "reference":
        s.gmem.get_reference(0)
        arrays.counts[s.machine.register(W.R_TRANSIENT)] = 0
        state[W.R_EXTRA_REFERENCES] -= np.uint64(1)
    elif what == "pin":
        state[int(W.STATE_PINS) + int(W.PIN_PAGES)] = 1
    elif what == "batch":
        state[int(W.STATE_LRU) : int(W.STATE_LRU) + 2] = 1, s.gmem.pfn(0)
    elif what == "transient":
        arrays.counts[s.machine.register(W.R_TRANSIENT) + 9] = 2
    else:
        arrays.stats[int(W.STATS_GAUGES) + 2 * Gauge.PAGES_PINNED] += 1
    assert s.machine.check() > 0
    assert s.machine.broken[1] in (W.Broken.REFERENCES, W.Broken.COUNTS)


# --------------------------------------------------------------------------- others


def test_outsiders_cannot_drop_a_pin() -> None:
    """FOLIO_REFERENCE takes and drops transient references of the designs' folios only."""
    s = Scene()
    assert s.process.pin(VA, PAGE, pin=0).status == 0
    pfn = s.gmem.pfn(0)
    assert pfn is not None

    def change(flags: int, n: int) -> int:
        return s.machine.operate(Operation.FOLIO_REFERENCE, flags=flags, address=pfn << 12, length=n).status

    assert change(Flag.READ, 1) == -W.EINVAL
    assert change(Flag.WRITE | Flag.READ, 1) == -W.EINVAL
    assert change(Flag.WRITE | Flag.SHARED, 1) == 0
    s.sound()
    assert change(Flag.WRITE | Flag.READ, 1) == 0
    assert change(Flag.SHARED, 2) == 0
    assert [s.gmem.put_reference(pfn).status for _ in range(3)] == [0, 0, -W.ENOENT]
    assert s.references(0) == 2 + BIAS
    s.sound()


def test_pins_of_ordinary_memory() -> None:
    """A device's mapping is VM_PFNMAP; a range may go from one kind of memory to another: test_pins_of_memory.py."""
    s = Scene()
    assert s.process.mmap_anonymous(VA + GIB, PAGE).status == 0
    device = s.machine.create_device(0x100000000, 2, remap=True)
    assert s.process.mmap_device(device, VA + 2 * GIB).status == 0
    assert s.process.pin(VA + GIB, PAGE, pin=1) == (0, 1)
    assert s.process.pin(VA + 2 * GIB, PAGE, pin=0).status == -W.EFAULT
    assert s.process.pin(VA + 8 * PAGE, 2 * PAGE, pin=0) == (0, 2)
    s.sound()  # with the pin's list among the nodes of ordinary memory


def test_records_of_a_trace() -> None:
    """The same through the trace schema."""
    s = Scene()
    ops = [Operation.PIN, Operation.GET, Operation.PUT, Operation.PUT, Operation.UNPIN, Operation.LRU_DRAIN]
    records = Records.build(
        6,
        op=ops,
        flags=[Flag.WRITE | Flag.LONGTERM, 0, 0, 0, 0, 0],
        object=[9, 0, 0, 0, 9, 0],
        address=[VA + PAGE, 0, 0, 0, 0, 0],
        offset=[0, PAGE, PAGE, PAGE, 0, 0],
        length=[2 * PAGE, 0, 0, 0, 0, 0],
    )
    results = s.machine.run(records)
    assert results.status.tolist() == [0, 0, 0, -W.ENOENT, 0, 0]
    assert results.detail.tolist() == [2, s.gmem.pfn(PAGE), 0, 0, 2, 0]
    s.sound()


class Holders:
    """Who holds what, kept beside the machine; states of blocks and pages are the machine's own."""

    def __init__(self, design: str) -> None:
        self.scene = Scene(design)
        self.pfnmap = design == "pfnmap"
        self.transient: Counter[int] = Counter()  # by first frame of the folio
        self.pins: dict[int, list[int]] = {}

    def folio(self, page: int) -> int | None:
        """First frame of the folio of a page of the inode, or None."""
        pfn = self.scene.gmem.pfn(page * PAGE)
        if pfn is None:
            return None
        return pfn if self.scene.gmem.is_split(page * PAGE) else pfn & ~511

    def held(self, page: int) -> bool:
        folio = self.folio(page)
        return bool(self.transient[folio or 0]) or any(folio in frames for frames in self.pins.values())

    def run(self, kind: str, page: int, n: int) -> None:
        getattr(self, kind)(page, n)
        self.scene.sound()

    def touch(self, page: int, _n: int) -> None:
        self.scene.process.touch(VA + page * PAGE, write=True)

    def pin(self, page: int, n: int) -> None:
        number, pages = page % 4, 1 + n % 3
        shared = [page + i < 1024 and self.scene.gmem.is_shared((page + i) * PAGE) for i in range(pages)]
        allowed = [*shared, False].index(False)
        result = self.scene.process.pin(VA + page * PAGE, pages * PAGE, pin=number)
        if number in self.pins:
            assert result == (-W.EEXIST, 0)
        elif self.pfnmap or allowed == 0:
            assert result == (-W.EFAULT, 0)
        else:
            assert result == (0, allowed)
            self.pins[number] = self.scene.machine.pinned_frames(number).tolist()
            assert self.pins[number] == [self.folio(page + i) for i in range(allowed)]

    def unpin(self, page: int, _n: int) -> None:
        frames = self.pins.pop(page % 4, None)
        expected = (-W.ENOENT, 0) if frames is None else (0, len(frames))
        assert self.scene.machine.unpin(page % 4) == expected

    def get(self, page: int, _n: int) -> None:
        result = self.scene.gmem.get_reference(page * PAGE)
        if self.folio(page) is None:
            assert result.status == -W.ENOENT
        else:
            assert result == (0, self.scene.gmem.pfn(page * PAGE))
            self.transient[self.folio(page) or 0] += 1

    def put(self, page: int, _n: int) -> None:
        folio = self.folio(page)
        pfn = self.scene.gmem.pfn(page * PAGE)
        if folio is None or pfn is None:
            return
        assert self.scene.gmem.put_reference(pfn).status == (0 if self.transient[folio] else -W.ENOENT)
        self.transient[folio] -= self.transient[folio] > 0

    def private(self, page: int, n: int) -> None:
        end = min(page + n, 1024)
        changes = {i >> 9 for i in range(page, end) if self.scene.gmem.is_shared(i * PAGE)}  # huge pages, one by one
        busy = [i for i in range(page, end) if i >> 9 in changes and self.folio(i) is not None and self.held(i)]
        result = self.scene.gmem.convert(page * PAGE, (end - page) * PAGE, shared=False)
        expected = (-W.EAGAIN, busy[0] * PAGE) if busy and not self.pfnmap else (0, 0)
        assert result == expected

    def shared(self, page: int, n: int) -> None:
        end = min(page + n, 1024)
        differs = not all(self.scene.gmem.is_shared(i * PAGE) for i in range(page, end))
        huge = [i for i in range(page, end) if not self.scene.gmem.is_split(i * PAGE) and self.held(i)]
        result = self.scene.gmem.convert(page * PAGE, (end - page) * PAGE, shared=True)
        assert result.status == (-W.WOULD_SPIN if huge and differs and not self.pfnmap else 0)

    def let_go(self) -> None:
        """The inode goes, then everybody who holds something."""
        assert self.scene.gmem.close() == OK
        self.scene.sound()
        for folio, n in self.transient.items():
            for _ in range(n):
                assert self.scene.gmem.put_reference(folio).status == 0
                self.scene.sound()
        for number in list(self.pins):
            self.unpin(number, 0)
            self.scene.sound()
        assert self.scene.gauge(Gauge.POOL_FREE) == 2


@pytest.mark.parametrize("design", ["restructure", "pfnmap"])
@settings(max_examples=40)
@given(
    operations=st.lists(
        st.tuples(
            st.sampled_from(["touch", "pin", "pin", "unpin", "get", "put", "private", "private", "shared"]),
            st.sampled_from([0, 1, 2, 509, 510, 511, 512, 513, 1023]),
            st.sampled_from([1, 2, 3, 512, 1024]),
        ),
        max_size=25,
    )
)
def test_whatever_is_held(design: str, operations: list[tuple[str, int, int]]) -> None:
    holders = Holders(design)
    for operation in operations:
        holders.run(*operation)
    holders.let_go()
