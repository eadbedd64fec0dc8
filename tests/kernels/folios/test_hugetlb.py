"""The pool, the optimised vmemmap, and splitting and merging folios."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pgemu.machine.designs import DESIGNS
from pgemu.objects.guest_memfd import GuestMemfd
from pgemu.objects.machine import Config, Machine
from pgemu.objects.vm import Vm
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Event, Gauge
from pgemu_kernels.words.operations import Flag, Operation

M2 = W.PAGE_2M
G1 = W.PAGE_1G
PAGE = W.PAGE_4K
VA = 0x7F00_0000_0000
FRAME = 0x000F_FFFF_FFFF_F000
READ_WRITE = 0x8000_0000_0000_0163
READ_ONLY = 0x8000_0000_0000_0121
LARGE = 0x8000_0000_0000_01E3
TAIL_MAPPING = 0xDEAD_0000_0000_0400


def make(design: str = "restructure", page_size: int = M2, pages: int = 1, **parameters: Any) -> tuple[
    Machine, GuestMemfd, Vm
]:  # fmt: skip
    """An inode over the whole pool, all private and touched by the guest."""
    parameters = {"order": "jan2026", "batch": "range"} | parameters  # a split comes before the zap
    machine = Machine(Config(design, pool=pages * page_size, page_size=page_size, **parameters))  # type: ignore[arg-type]
    gmem = machine.create_guest_memfd(pages * page_size)
    vm = machine.create_vm(protected=True)
    assert vm.bind(gmem, 0).status == 0
    for block in range(pages):
        vm.touch(block * page_size)
    return machine, gmem, vm


def vmemmap(machine: Machine, pfn: int) -> list[tuple[int, int, int]]:
    """Walk of the address of a struct page."""
    address = machine.register(W.R_VMEMMAP) + 64 * pfn
    return machine.walk(machine.register(W.R_KERNEL_ROOT), (address & (1 << 48) - 1) >> 12)


def vmemmap_ptes(machine: Machine, head: int, order: int) -> list[int]:
    """The entries of a folio's vmemmap pages."""
    return [vmemmap(machine, head + i * 64)[-1][2] for i in range(1 << order - 6)]


def struct_pages(machine: Machine, head: int, pages: int) -> list[list[int]]:
    """Their words; from page 2 on without `index`, which prep_compound_tail() leaves as the page cache had it."""
    words = [machine.struct_page(head + i).tolist() for i in range(pages)]
    return words[:2] + [word[:4] + word[5:] for word in words[2:]]


# --------------------------------------------------------------------------- vmemmap entries


@pytest.mark.parametrize("kernel", ["6.12", "6.18", "7.3"])
@pytest.mark.parametrize(("page_size", "order"), [(M2, 9), (G1, 18)])
def test_optimized_vmemmap(kernel: str, page_size: int, order: int) -> None:
    """The head's page read-write; the others read-only to the shared tail page (7.3) or to the head's (before)."""
    machine = Machine(Config("restructure", pool=2 * page_size, page_size=page_size, kernel=kernel))
    base = machine.register(W.R_POOL_BASE)
    tails = set()
    heads = set()
    # Where the boot allocator did it (1G pages, since 6.18), bit 58 is set; 6.18 did it to 63 entries only.
    boot = order == 18 and kernel != "6.12"
    marked = READ_ONLY | (1 << 58 if boot else 0)
    for head in (base, base + (1 << order)):
        first, *others = vmemmap_ptes(machine, head, order)
        assert first & ~FRAME == READ_WRITE
        if boot and kernel == "6.18":
            assert {entry & ~FRAME for entry in others[63:]} == {READ_WRITE}
            assert {entry & FRAME for entry in others[63:]} == {first & FRAME}
            others = others[:63]
        assert {entry & ~FRAME for entry in others} == {marked}
        heads.add(first & FRAME)
        tails |= {entry & FRAME for entry in others}
    assert len(heads) == 2
    assert len(tails | heads) == 3 if kernel == "7.3" else tails == heads
    assert [entry & ~FRAME for _, _, entry in vmemmap(machine, base)[:-1]] == [0x67] * 3
    assert machine.statistics.gauge(Gauge.VMEMMAP_PAGES) == 2 + (kernel == "7.3")


def test_vmemmap_without_hvo_is_mapped_by_2m_leaves() -> None:
    machine = Machine(Config("restructure", pool=G1, hvo=False))
    base = machine.register(W.R_POOL_BASE)
    for pfn in (base, base + 40000, base + (1 << 18) - 1):
        level, _, entry = vmemmap(machine, pfn)[-1]
        assert (level, entry & ~FRAME) == (2, LARGE)
    assert machine.statistics.gauge(Gauge.VMEMMAP_PAGES) == 4096
    assert machine.check() == 0


# --------------------------------------------------------------------------- split and merge


@pytest.mark.parametrize("kernel", ["6.12", "6.18", "7.3"])
@pytest.mark.parametrize(("page_size", "order", "restored"), [(M2, 9, 7), (G1, 18, 4095)])
@pytest.mark.parametrize("hvo", [True, False])
def test_split_and_merge_leave_no_trace(kernel: str, page_size: int, order: int, restored: int, hvo: bool) -> None:
    """Converted to shared and back: struct pages, vmemmap entries' bits and frames in use are as before."""
    machine, gmem, _ = make(page_size=page_size, kernel=kernel, hvo=hvo)
    head = gmem.pfn(0)
    assert head is not None
    pages = 1 << order
    sampled = min(pages, 4096)
    used = machine.statistics.gauge(Gauge.FRAMES_USED)
    before = struct_pages(machine, head, sampled)
    # The marks of the boot allocator do not come back.
    entries = [READ_WRITE] + [READ_ONLY if hvo else READ_WRITE] * (pages // 64 - 1)

    assert gmem.convert(9 * PAGE, PAGE, shared=True).status == 0
    assert gmem.is_split(0)
    statistics = machine.statistics
    restored = restored if hvo else 0
    nodes = {9: 2, 18: 595}[order]  # frames of 8 and 4161 xarray nodes, seven to a frame
    assert statistics.event(Event.VMEMMAP_PAGE_RESTORED) == restored
    assert statistics.gauge(Gauge.FRAMES_USED) == used + restored + nodes
    assert statistics.event(Event.STRUCT_PAGE_WRITTEN) == pages - 1
    if hvo:
        assert {entry & ~FRAME for entry in vmemmap_ptes(machine, head, order)} == {READ_WRITE}
        assert len({entry & FRAME for entry in vmemmap_ptes(machine, head, order)}) == pages // 64

    assert gmem.convert(9 * PAGE, PAGE, shared=False).status == 0
    assert not gmem.is_split(0)
    statistics = machine.statistics
    assert statistics.event(Event.VMEMMAP_PAGE_FREED) == restored
    assert statistics.gauge(Gauge.FRAMES_USED) == used
    # The cgroup's word, which a merge makes a tail's; before 7.1 the head's page shows in the place of the others.
    for page in range(2 if kernel == "6.12" else 3, sampled if hvo and kernel != "7.3" else 64, 64):
        before[page][3] = TAIL_MAPPING
    assert struct_pages(machine, head, sampled) == before
    assert not hvo or [entry & ~FRAME for entry in vmemmap_ptes(machine, head, order)] == entries
    assert machine.check() == 0


@pytest.mark.parametrize("kernel", ["6.12", "7.3"])
def test_split_makes_every_page_a_folio(kernel: str) -> None:
    machine, gmem, _ = make(kernel=kernel)
    head = gmem.pfn(0)
    assert head is not None
    mapping = int(machine.struct_page(head)[3])
    gmem.convert(0, PAGE, shared=True)
    flags = 0x0017_FFFF_C000_0000 | 1 << 3  # up to date
    for page in range(512):
        words = machine.struct_page(head + page).tolist()
        # In 7.3 a restored page is a copy of the shared tail page, whose last_cpupid is 0.
        assert words[0] == (flags if kernel == "6.12" or page < 64 else 1 << 52 | 1 << 3), page
        assert words[3:7] == [mapping, page, 0, 1 << 32 | 0xFFFF_FFFF], page
        assert words[1] & 1 == 0, page  # no tail


def test_pfnmap_never_splits() -> None:
    machine, gmem, _ = make("pfnmap")
    head = gmem.pfn(0)
    assert head is not None
    before = struct_pages(machine, head, 512)
    gmem.convert(9 * PAGE, PAGE, shared=True)
    gmem.convert(9 * PAGE, PAGE, shared=False)
    assert struct_pages(machine, head, 512) == before
    assert machine.statistics.event(Event.STRUCT_PAGE_WRITTEN) == 0
    assert machine.statistics.event(Event.VMEMMAP_PAGE_RESTORED) == 0


def test_a_split_without_frames_fails_at_its_block_and_keeps_the_earlier_ones() -> None:
    """Two 2M pages, frames for one restore and its 8 nodes: -ENOMEM at the second, which leaves the first one split.

    All stay private.
    """
    machine, _, _ = make(pages=2)
    used = machine.statistics.gauge(Gauge.FRAMES_USED)
    machine, gmem, vm = make(pages=2, frames=used + 7 + 2)
    assert gmem.convert(5 * PAGE, 2 * M2 - 5 * PAGE, shared=True) == (-W.ENOMEM, M2)
    assert [gmem.is_split(block) for block in (0, M2)] == [True, False]
    assert not gmem.is_shared(5 * PAGE)
    assert [vm.walk(block)[-1][0] for block in (0, M2)] == [2, 2]  # nothing was zapped
    assert machine.check() == 0


def test_a_merge_without_a_frame_leaves_the_vmemmap_whole() -> None:
    """7.1 and later need a new head page to optimise; the folio is merged all the same."""
    machine, _, _ = make()
    used = machine.statistics.gauge(Gauge.FRAMES_USED)
    machine, gmem, _ = make(frames=used + 7 + 2 + 1)
    gmem.convert(0, PAGE, shared=True)
    actor = 1
    machine.begin(actor, Operation.CONVERT, flags=Flag.PRIVATE, length=PAGE)
    for _ in range(7):  # prepare (which wants a frame), unmap, gate, begin, zap, store, end
        assert machine.step(actor) == W.GO
    machine.arrays.state[W.R_FRAMES_LIMIT] = used + 7  # what the nodes leave behind is taken by others
    assert [machine.step(actor), machine.step(actor)] == [W.GO, W.STOP]
    assert machine.result(actor).status == 0
    assert not gmem.is_split(0)
    assert machine.statistics.gauge(Gauge.FRAMES_USED) == used + 7
    machine.arrays.state[W.R_FRAMES_LIMIT] = used + 7 + 2
    assert gmem.convert(0, PAGE, shared=True).status == 0  # nothing to restore this time
    assert machine.statistics.event(Event.VMEMMAP_PAGE_RESTORED) == 7
    assert machine.check() == 0


# --------------------------------------------------------------------------- references and the pool


def test_a_held_folio_cannot_be_split() -> None:
    """Posted code spins in its freeze; the conversion is done when the reference goes."""
    machine, gmem, _ = make(pages=2)
    pfn = gmem.get_reference(M2 + 3 * PAGE).detail
    assert gmem.convert(0, 2 * M2, shared=True) == (-W.WOULD_SPIN, M2)
    assert gmem.is_split(0)
    assert not gmem.is_split(M2)
    gmem.put_reference(pfn)
    assert gmem.is_split(M2)
    assert gmem.is_shared(M2)
    assert machine.check() == 0


def test_a_held_page_puts_its_blocks_merge_off() -> None:
    """The freeze of the merge would spin: the block stays split until the page is let go."""
    machine, gmem, vm = make()
    gmem.convert(0, PAGE, shared=True)
    pfn = gmem.get_reference(9 * PAGE).detail
    assert gmem.convert(0, PAGE, shared=False) == (-W.WOULD_SPIN, 9 * PAGE)
    assert gmem.is_split(0)
    gmem.put_reference(pfn)
    assert not gmem.is_split(0)
    assert vm.touch(0).detail == 2
    assert machine.check() == 0


@pytest.mark.parametrize("design", DESIGNS)
def test_a_held_folio_outlives_the_hole_and_returns_with_the_last_reference(design: str) -> None:
    """An unsplit folio is truncated whoever holds it; until it is put the pool lacks a page."""
    machine, gmem, vm = make(design)
    pfn = gmem.get_reference(3 * PAGE).detail
    assert gmem.punch_hole(0, M2).status == 0
    assert machine.statistics.gauge(Gauge.BLOCKS_ZOMBIE) == 1
    assert vm.touch(0).status == -W.ENOMEM
    assert gmem.put_reference(pfn).status == 0
    assert machine.statistics.gauge(Gauge.POOL_FREE) == 1
    assert vm.touch(0).detail == 2
    assert machine.check() == 0


def test_a_hole_over_a_held_split_page_is_refused_until_it_is_put() -> None:
    """The block cannot be merged (-EAGAIN); its host entries are gone by then, its pages stay."""
    machine, gmem, _ = make(pages=2)
    process = machine.create_process()
    process.mmap(gmem, VA)
    gmem.convert(M2, PAGE, shared=True)
    process.touch(VA + M2)
    pfn = gmem.get_reference(M2).detail
    assert gmem.punch_hole(0, 2 * M2) == (-W.EAGAIN, M2)
    assert gmem.pfn(0) is None  # what lies before it is freed
    assert gmem.pfn(M2) == pfn
    assert machine.statistics.gauge(Gauge.HOST_LEAVES_4K) == 0
    gmem.put_reference(pfn)
    assert gmem.punch_hole(M2, M2).status == 0
    assert gmem.is_shared(M2)  # truncation never changes shareability
    assert machine.statistics.gauge(Gauge.POOL_FREE) == 2
    assert machine.check() == 0


def test_pieces_held_past_the_end_keep_their_block_from_the_pool() -> None:
    """Two pieces of a split block held when the inode goes: merged and freed with the last of them."""
    machine, gmem, _ = make(pages=2)
    gmem.convert(0, PAGE, shared=True)
    held = [gmem.get_reference(page * PAGE).detail for page in (0, 300)]
    assert gmem.close().status == 0
    gauge = machine.statistics.gauge
    assert (gauge(Gauge.BLOCKS_ZOMBIE), gauge(Gauge.POOL_FREE)) == (1, 1)
    with pytest.raises(OSError, match="reserve"):
        machine.create_guest_memfd(2 * M2)
    assert gmem.put_reference(held[0]).status == 0
    assert machine.statistics.gauge(Gauge.POOL_FREE) == 1
    assert gmem.put_reference(held[1]).status == 0
    gauge = machine.statistics.gauge
    assert (gauge(Gauge.BLOCKS_ZOMBIE), gauge(Gauge.POOL_FREE)) == (0, 2)
    assert gauge(Gauge.VMEMMAP_PAGES) == 1 + 2  # optimised again
    assert machine.check() == 0
    machine.create_guest_memfd(2 * M2)


def test_the_pool_hands_out_the_lowest_page_first_and_the_last_freed_next() -> None:
    machine, gmem, vm = make(pages=3)
    base = machine.register(W.R_POOL_BASE)
    assert [gmem.pfn(i * M2) for i in range(3)] == [base, base + 512, base + 1024]
    gmem.punch_hole(0, M2)
    gmem.punch_hole(2 * M2, M2)
    vm.touch(0)
    assert gmem.pfn(0) == base + 1024


@pytest.mark.parametrize("merge_zero", ["none", "unzeroed"])
@pytest.mark.parametrize(("zero", "host", "guest"), [("folio", 1, 511), ("page", 1, 511)])
def test_merging_speaks_for_every_page(zero: str, host: int, guest: int, merge_zero: str) -> None:
    """One page of a shared block was used: after the merge the guest sees zeroes everywhere else, zeroed once."""
    machine = Machine(Config("restructure", pool=M2, page_size=M2, zero=zero, merge_zero=merge_zero))  # type: ignore[arg-type]
    gmem = machine.create_guest_memfd(M2, shared=True)
    process = machine.create_process()
    vm = machine.create_vm(protected=True)
    process.mmap(gmem, VA)
    vm.bind(gmem, 0)
    process.touch(VA + 9 * PAGE)
    assert machine.statistics.event(Event.PAGE_ZEROED) == host
    gmem.convert(0, M2, shared=False)
    head = gmem.pfn(0)
    assert head is not None
    assert machine.statistics.event(Event.PAGE_ZEROED) == (host if merge_zero == "none" else host + guest)
    assert int(machine.struct_page(head)[0]) >> 3 & 1 == (merge_zero == "unzeroed")  # PG_uptodate
    vm.touch(0)
    assert int(machine.struct_page(head)[0]) >> 3 & 1 == 1
    assert machine.statistics.event(Event.PAGE_ZEROED) == host + guest
    assert machine.statistics.event(Event.FOLIO_ZEROED_PAGES) == 0
    vm.touch_many(np.arange(0, M2, PAGE))
    assert machine.statistics.event(Event.PAGE_ZEROED) == host + guest
    assert machine.check() == 0
