"""What a domain's edits flush and count, how it grows, the faults of a device, and domains in operations' kernels."""

from __future__ import annotations

import doctest
from typing import Any

import numpy as np
import pytest

import pgemu.tables.invalidation
from pgemu.objects.machine import Config, Machine
from pgemu.tables.flush import Flush
from pgemu.tables.invalidation import Invalidation, invalidation
from pgemu.tables.page_table import EditResult, PageTable
from pgemu.tables.translation import Kind, WalkStatus
from pgemu_kernels.engine.compile import entry
from pgemu_kernels.engine.handle import open_machine
from pgemu_kernels.tables.domain import device_access, map_frames, open_domain, sync_domain, unmap_frames
from pgemu_kernels.words.events import Event
from pgemu_kernels.words.table_words import E_FORMAT, E_ROOT, E_WORDS

PAGE, M2, G1 = 4096, 2 << 20, 1 << 30


def domain(name: str = "vtd-s2", **parameters: Any) -> PageTable:
    return Machine(Config()).create_page_table(name, **parameters)


def counted(table: PageTable, call: Any) -> tuple[Any, dict[str, int]]:
    """What a call returned, and what it counted."""
    before = {event: table.machine.statistics.event(event) for event in Event}
    result = call()
    after = {event: table.machine.statistics.event(event) for event in Event}
    return result, {event.name: after[event] - before[event] for event in Event if after[event] != before[event]}


def test_the_example_of_the_documentation() -> None:
    failed, attempted = doctest.testmod(pgemu.tables.invalidation)
    assert (failed, attempted > 0) == (0, True)


@pytest.mark.parametrize(("start", "end", "freed", "vtd", "amd"), [
    (0x3000, 0x4000, False, (1, 0x3000, 0x3040), (1, 0x3000, 0x3002)),
    (0x3000, 0x5000, False, (8, 0, 0x43), (8, 0, 0x3003)),  # 3 and 4 differ in bit 2: pages 0 to 7
    (0x4000, 0x8000, True, (4, 0x4000, 0x4002), (4, 0x4000, 0x5003)),  # 4 pages: one bit of ones below half
    (0, 1 << 30, True, (1 << 18, 0, 18), (1 << 18, 0, 0x1FFF_F003)),
    (0, 1 << 31, True, (0, 0, 0), (1 << 19, 0, 0x3FFF_F003)),  # more than VT-d's mask takes
    (0, (1 << 52) + PAGE, True, (0, 0, 0), (0, 0, 0x7FFF_FFFF_FFFF_F003)),
])  # fmt: skip
def test_commands(start: int, end: int, freed: bool, vtd: Any, amd: Any) -> None:
    flush = Flush(start, end, 1, freed)
    assert invalidation(domain().format, flush) == Invalidation(*vtd)
    assert invalidation(domain("amd-v1", levels=5).format, flush) == Invalidation(*amd)


def test_a_command_for_another_format_is_refused() -> None:
    with pytest.raises(ValueError, match="ept"):
        invalidation(domain("ept").format, Flush(0, PAGE, 1, False))


def test_events() -> None:
    table = domain()
    _, events = counted(table, lambda: table.map_range(0, 0, M2 + 3 * PAGE))
    assert events == {"IOPTE_WRITTEN": 4, "TABLE_PAGE_ALLOCATED": 3}
    result, events = counted(table, lambda: table.unmap(0, 4 * M2))
    # The last-level table of the three pages goes with an unmap that covers it: [2M, 4M) is in the range.
    assert result.flush == Flush(0, 4 * M2, 1, False)
    assert (result.detail, events) == (M2 + 3 * PAGE, {"IOPTE_CLEARED": 4, "IOTLB_FLUSH_PAGES": 1})
    table.map_range(0, 0, 3 * G1)
    result, events = counted(table, lambda: table.unmap(0, 3 * G1))
    assert events == {"IOPTE_CLEARED": 3, "IOTLB_FLUSH_DOMAIN": 1}  # 2 ** 20 pages, of 2 ** 18 at most
    assert result.flush is not None


def test_maps_are_flushed_in_caching_mode() -> None:
    for name in ("vtd-s2", "amd-v1"):
        table = domain(name, caching_mode=True)
        assert table.map(0x3000, 0).flush == Flush(0x3000, 0x4000, 1, False)
        assert domain(name).map(0x3000, 0).flush is None


@pytest.mark.parametrize(("name", "kernel", "parameters", "flushes"), [
    ("vtd-s2", "7.3", {}, (1, 1, 1)),
    ("vtd-s2", "6.12", {}, (1, 4, 2)),
    ("amd-v1", "6.12", {}, (1, 1, 1)),
    ("amd-v1", "7.3", {"caching_mode": True}, (1, 4, 1)),
])  # fmt: skip
def test_which_unmaps_wait_for_one_flush(
    name: str, kernel: str, parameters: dict[str, Any], flushes: tuple[int, int, int]
) -> None:
    """Four pages side by side, four apart, and ranges of one page and of two side by side."""
    table = domain(name, kernel=kernel, **parameters)
    assert table.map_range(PAGE, PAGE << 8, 64 * PAGE).status == 0
    pages = np.arange(1, 5, dtype=np.uint64) * np.uint64(PAGE)
    assert table.unmap_many(pages[:1]).status[0] == 0  # AMD's first leaf is one page
    for page in range(40):
        table.unmap((page + 1) * PAGE)
        table.map((page + 1) * PAGE, page * 5 * PAGE)
    found = []
    for addresses in (pages, pages * np.uint64(2) + np.uint64(8 * PAGE)):
        _, events = counted(table, lambda addresses=addresses: table.unmap_many(addresses))  # type: ignore[misc]
        found.append(events["IOTLB_FLUSH_PAGES"])
    if name == "vtd-s2":
        table.map_range(G1, G1, M2 + PAGE)
        _, events = counted(table, lambda: table.unmap(G1, M2 + PAGE))
        found.append(events["IOTLB_FLUSH_PAGES"])
    assert tuple(found) == flushes[: len(found)]


# --------------------------------------------------------------------------- growing


def test_a_domain_grows_at_the_top() -> None:
    table = domain("amd-v1")
    root = table.root
    assert table.map(0x3000, 0x7000).status == 0
    result, events = counted(table, lambda: table.map(1 << 63, 0x9000))
    assert (result.status, result.flush, table.format.levels) == (0, None, 6)
    assert (table.format.name, events["DEVICE_TABLE_UPDATED"], events["TABLE_PAGE_ALLOCATED"]) == ("amd-v1-6", 1, 8)
    assert root in table.table_pages()[3].tolist()
    found = table.translate([0x3000, 1 << 63, (1 << 64) - 1], Kind.READ, references=True)
    assert found.physical.tolist() == [0x7000, 0x9000, 0]
    assert found.references is not None
    assert found.references.read_counts.tolist() == [6, 6, 1]
    assert [step[0] for step in table.walk(0x3000)] == [6, 5, 4, 3, 2, 1]
    assert table.unmap(1 << 63).detail == PAGE
    assert table.machine.check() == 0
    table.destroy()


def test_a_domain_that_cannot_grow_is_as_it_was() -> None:
    table = domain("amd-v1", most_levels=4)
    assert table.map(1 << 48, 0).status == -34
    assert table.format.levels == 3
    assert domain(kernel="6.18").map(1 << 48, 0).status == -14
    assert domain().map(1 << 48, 0).status == -34


def test_without_memory_nothing_is_left_mapped() -> None:
    table = domain(superpages=0)
    length = (table.machine.arrays.ram.size // 512 + 1) * M2
    result = table.map_range(0, 0, length)
    assert result.status == -12
    assert 0 < result.detail < length
    assert not any(table.translate(np.arange(0, length, M2, dtype=np.uint64)).physical)


# --------------------------------------------------------------------------- faults


def test_faults_of_a_device() -> None:
    table = domain(levels=3)
    table.map(0x1000, 0x5000, attributes=1)
    table.map(0x2000, 0x6000, attributes=2)
    table.store(0x3000, 1 << 51 | 3)
    asked = [0x1000, 0x1000, 0x2000, 0x2000, 0x9000, 0x9000, 1 << 39]
    kinds = [0, 1, 0, 1, 0, 1, 0]
    found = table.translate(asked, kinds)
    ok, denied, absent = WalkStatus.OK, WalkStatus.PERMISSION, WalkStatus.NOT_PRESENT
    assert found.status.tolist() == [ok, denied, denied, ok, absent, absent, WalkStatus.ADDRESS_SIZE]
    assert found.error.tolist() == [0, 5, 6, 0, 6, 5, 4]
    narrow = domain(maxphyaddr=40)
    narrow.map(0x1000, 0)
    narrow.store(0x1000, 1 << 45 | 3)
    found = narrow.translate([0x1000], Kind.READ)
    assert (found.status[0], found.error[0], found.level[0]) == (WalkStatus.RESERVED, 12, 1)


def test_events_of_amds_iommu() -> None:
    table = domain("amd-v1", maxphyaddr=40)
    table.map(0x1000, 0x5000, attributes=1 | 1 << 61)
    table.store(0x2000, 1 << 45 | 1 | 3 << 61)
    found = table.translate([0x1000, 0x1000, 0x2000, 0x3000, 0x3000], [0, 1, 0, 0, 1])
    assert found.error.tolist() == [0, 0x70, 0x90, 0, 0x20]
    table.map_range(M2, M2, M2)
    table.store(M2, M2 | 2 << 9 | 1 | 3 << 61, level=2)  # a table that would skip a level
    assert table.translate([M2], Kind.READ).status[0] == WalkStatus.OK  # the store was refused


# --------------------------------------------------------------------------- in kernels

_U0, _WORDS = np.uint64(0), np.uint64(E_WORDS)


@entry
def map_unmap_access(descriptor, row, root, request, numbers, found):  # type: ignore[no-untyped-def]
    """numbers: uint64: iova, physical, length, bytes to unmap, address to access. found: uint64[9]."""
    m = open_machine(descriptor)
    e = open_domain(m, request[_U0:_WORDS], row, root)
    found[0] = np.uint64(map_frames(e, numbers[0], numbers[1], numbers[2], True, False))
    found[1] = unmap_frames(e, numbers[0], numbers[3])
    sync_domain(e)
    row, root = e.request[E_FORMAT], e.request[E_ROOT]
    found[2], found[3], found[4], found[5] = device_access(m, row, root, numbers[4], False)
    found[6], _, _, found[7] = device_access(m, row, root, numbers[4], True)
    found[8] = root


@pytest.mark.parametrize(("name", "code"), [("vtd-s2", 5), ("amd-v1", 0x70)])
def test_domains_in_kernels(name: str, code: int) -> None:
    table = domain(name, levels=4)
    row = table.machine.add_format(table.format, int(table.machine.format_row(table._row)[74]))
    assert row == table._row
    numbers = np.array([G1, 4 * G1, 4 * M2, M2, G1 + 3 * M2 + 5], np.uint64)
    found = np.zeros(9, np.uint64)
    root = np.uint64(table.root)
    map_unmap_access(table.machine.descriptor, np.uint64(row), root, np.zeros(E_WORDS, np.uint64), numbers, found)
    gone = M2 if name == "vtd-s2" else 4 * M2  # AMD's leaf of 8M goes whole
    assert found[:2].tolist() == [0, gone]
    if name == "vtd-s2":
        assert found[2:].tolist() == [WalkStatus.OK, 4 * G1 + 3 * M2 + 5, 2, 0, WalkStatus.PERMISSION, code, root]
    else:
        assert found[2:].tolist() == [WalkStatus.NOT_PRESENT, 0, 2, 0, WalkStatus.NOT_PRESENT, 0x20, root]
    same: EditResult = table.unmap(G1 + M2, 3 * M2)
    assert same.detail == (3 * M2 if name == "vtd-s2" else 0)
