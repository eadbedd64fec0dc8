"""Edits by hand: values of split children, order of writes and flushes, frozen entries, charges, failures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pgemu.objects.machine import Config, Machine
from pgemu.tables.flush import Flush
from pgemu.tables.page_table import PageTable
from pgemu_kernels import words as W
from pgemu_kernels.formats.page_format import PageFormat, arm64_stage2, ept, npt, x86_64
from pgemu_kernels.words.events import Event, Gauge
from pgemu_kernels.words.operations import PAGE_1G, PAGE_2M, PAGE_4K
from pgemu_kernels.words.table_words import LogKind

READ, WRITE, FLUSH, FLUSH_ALL, FILL, FREE = LogKind
VA = 3 * PAGE_1G
PA = 1 << 36
LOCKED = 1 << 60  # Arm, 7.3
FROZEN = 0x8000_0000_0000_01A0
EMPTY = 1 << 63


class Log:
    """Records of one edit: (kind, level, address, value), entries named by (level, index within the table)."""

    def __init__(self, n: int = 8192) -> None:
        self.words = np.zeros((n, W.LOG_WORDS), np.uint64)

    def records(self, count: int, *kinds: LogKind) -> list[tuple[LogKind, int, int, int]]:
        rows = [[int(word) for word in row] for row in self.words[:count]]
        all_ = [(LogKind(kind & 0xFF), kind >> 8, address, value) for kind, address, value in rows]
        return [record for record in all_ if not kinds or record[0] in kinds]


def tree(fmt: PageFormat | str, **config: Any) -> PageTable:
    return Machine(Config(**config)).create_page_table(fmt)


def entries(table: PageTable, address: int) -> dict[int, tuple[int, int]]:
    """{level: (entry address, entry)} of a walk."""
    return {level: (at, entry) for level, at, entry in table.walk(address)}


def events(table: PageTable, action: Callable[[], Any]) -> dict[str, int]:
    """What an edit was charged, by event."""
    before = table.machine.statistics.events.sum(axis=0)
    action()
    change = table.machine.statistics.events.sum(axis=0) - before
    return {Event(i).name: int(change[i]) for i in np.flatnonzero(change)}


# ------------------------------------------------------------------ children of a split

SPLITS = [
    ("x86-64", x86_64(), 0x867, 0x8E7, 0x867),
    ("x86-64, PAT", x86_64(), 0x8E7, 0x18E7, 0x8E7),
    ("x86-64, no execute", x86_64(), 1 << 63 | 0x867, 1 << 63 | 0x8E7, 1 << 63 | 0x867),
    ("NPT", npt(), 0xE67, 0xEE7, 0xE67),
    ("EPT 6.12", ept(kernel="6.12"), 0x8600_0000_0000_0B77, 0x8600_0000_0000_0BF7, 0x8600_0000_0000_0B77),
    ("EPT 7.3", ept(), 0x80A0_0000_0000_0F77, 0x80A0_0000_0000_0FF7, 0x80A0_0000_0000_0F77),
    (
        "EPT 7.3, no huge page executes",
        ept(nx_huge_pages=True),
        0x80A0_0000_0000_0F77,
        0x80A0_0000_0000_0BF3,
        0x80A0_0000_0000_0F77,
    ),
    ("Arm, FWB", arm64_stage2(), 0x7DB, 0x7D9, 0x7DB),
    ("Arm", arm64_stage2(fwb=False), 0x7FF, 0x7FD, 0x7FF),
    ("Arm, no execute", arm64_stage2(), 1 << 54 | 0x7DB, 1 << 54 | 0x7D9, 1 << 54 | 0x7DB),
]


@pytest.mark.parametrize(("fmt", "bits", "large", "small"), [s[1:] for s in SPLITS], ids=[s[0] for s in SPLITS])
def test_split_children_and_back(fmt: PageFormat, bits: int, large: int, small: int) -> None:
    table = tree(fmt)
    assert table.map(VA, PA, level=3, attributes=bits).status == 0
    assert table.walk(VA)[-1][2] == PA | large
    assert table.split(VA, level=2).detail == 1
    second = VA + 5 * PAGE_2M
    assert table.walk(second)[-1][::2] == (2, PA + 5 * PAGE_2M | large)
    assert table.split(second, level=1).detail == 1
    leaves = [table.walk(second + i * PAGE_4K)[-1] for i in range(512)]
    assert [(level, entry) for level, _, entry in leaves] == [
        (1, PA + 5 * PAGE_2M + i * PAGE_4K | small) for i in range(512)
    ]
    assert table.collapse(second).status == 0
    assert table.walk(second)[-1][::2] == (2, PA + 5 * PAGE_2M | large)
    assert table.collapse(VA, level=3).status == 0
    assert table.walk(VA)[-1][::2] == (3, PA | large)


def test_a_gigabyte_is_split_into_pages_at_once() -> None:
    table = tree("npt")
    table.map(VA, PA, level=3)
    assert table.split(VA, PAGE_1G).detail == 513
    assert {level: len(pages) for level, pages in table.table_pages().items()} == {4: 1, 3: 1, 2: 1, 1: 512}
    assert table.walk(VA + PAGE_1G - PAGE_4K)[-1][::2] == (1, PA + PAGE_1G - PAGE_4K | 0xE67)


def test_accessed_and_dirty_bits_of_a_collapse_are_those_of_all_children() -> None:
    table = tree("x86-64")
    table.map_range(VA, PA, PAGE_2M, max_level=1, attributes=0x807)
    assert table.protect(VA + 7 * PAGE_4K, set_bits=1 << 5).flush is None
    table.protect(VA + 8 * PAGE_4K, set_bits=1 << 6)
    assert table.collapse(VA).status == 0
    assert table.walk(VA)[-1][2] == PA | 0x8E7


@pytest.mark.parametrize("odd", ["hole", "frame", "bits", "table"])
def test_what_is_not_alike_is_not_collapsed(odd: str) -> None:
    table = tree("ept")
    table.map_range(VA, PA + (PAGE_4K if odd == "frame" else 0), PAGE_2M, max_level=1)
    if odd == "hole":
        table.unmap(VA + 5 * PAGE_4K)
    elif odd == "bits":
        table.protect(VA + 511 * PAGE_4K, clear_bits=2)
    level = 3 if odd == "table" else 2
    assert table.collapse(VA & -PAGE_1G if level == 3 else VA, level=level).status == -W.EINVAL
    assert table.machine.check() == 0


# ------------------------------------------------------------------ order of reads, writes and flushes


def test_a_new_mapping_reads_down_fills_tables_and_links_them() -> None:
    table, log = tree("x86-64"), Log()
    result = table.map(VA, PA, log=log.words)
    at = entries(table, VA)
    expected = [(READ, 4, at[4][0], 0)]
    for level in (4, 3, 2):
        below = at[level][1] & ~0xFFF
        expected += [
            (FILL, 0, below, 0),
            (WRITE, level, at[level][0], below | 0x67),
            (READ, level - 1, at[level - 1][0], 0),
        ]
    assert log.records(result.records) == [*expected, (WRITE, 1, at[1][0], PA | 0x867)]
    assert result.flush is None


def test_kvm_splits_with_one_write_and_no_flush() -> None:
    table, log = tree("ept"), Log()
    table.map(VA, PA, level=2)
    leaf = table.walk(VA)[-1][2]
    result = table.split(VA, log=log.words)
    at = entries(table, VA)
    below = at[2][1] & 0xF_FFFF_FFFF_F000
    writes = [(WRITE, 1, below + 8 * i, (leaf & ~0x80) + i * PAGE_4K) for i in range(512)]
    writes.append((WRITE, 2, at[2][0], below | 0x8000_0000_0000_0D07))
    assert log.records(result.records, WRITE, FLUSH, FLUSH_ALL) == writes
    assert result.flush is None


def test_a_process_splits_through_an_absent_entry_and_a_flush() -> None:
    table, log = tree("x86-64"), Log()
    table.map(VA, PA, level=2)
    result = table.split(VA, log=log.words)
    slot, entry = entries(table, VA)[2]
    assert log.records(result.records, WRITE, FLUSH)[512:] == [
        (WRITE, 2, slot, PA | 0x8E6),  # pmd_mkinvalid()
        (FLUSH, 2, VA, PAGE_2M),
        (WRITE, 2, slot, entry),
    ]
    assert result.flush == Flush(VA, VA + PAGE_2M, 2, False)


def test_kvm_freezes_every_entry_of_a_table_that_a_leaf_replaces() -> None:
    table, log = tree("npt"), Log()
    table.map_range(VA + PAGE_4K, PA + PAGE_4K, 2 * PAGE_4K)
    below = entries(table, VA)[2][1] & 0xF_FFFF_FFFF_F000
    result = table.map(VA, PA, level=2, replace=True, log=log.words)
    slot = entries(table, VA)[2][0]
    assert log.records(result.records, WRITE, FLUSH_ALL, FREE) == [
        (WRITE, 2, slot, PA | 0xEE7),
        *((WRITE, 1, below + 8 * i, FROZEN) for i in range(512)),
        (FLUSH_ALL, 1, VA, PAGE_2M),
        (FREE, 0, below, 0),
    ]
    assert result.flush == Flush(VA, VA + PAGE_2M, 1, True)


def test_the_end_of_a_vm_freezes_what_is_present() -> None:
    table, log = tree("ept"), Log()
    table.map(VA, PA)
    table.map(VA + PAGE_2M, PA, level=2)
    at = entries(table, VA) | {0: entries(table, VA + PAGE_2M)[2]}
    result = table.destroy(log=log.words)
    assert log.records(result.records, WRITE, FLUSH, FLUSH_ALL) == [
        (WRITE, level, at[key][0], FROZEN) for level, key in ((4, 4), (3, 3), (2, 2), (1, 1), (2, 0))
    ]
    assert len(log.records(result.records, FREE)) == 4
    assert result.flush is None


def test_kvm_zaps_to_the_value_of_an_empty_entry_and_keeps_the_tables() -> None:
    table, log = tree("ept"), Log()
    table.map(VA, PA, level=2)
    result = table.unmap(VA + PAGE_4K, log=log.words)  # the large leaf goes whole
    slot = entries(table, VA)[2][0]
    assert log.records(result.records, WRITE, FLUSH_ALL) == [(WRITE, 2, slot, EMPTY), (FLUSH_ALL, 2, VA, PAGE_2M)]
    assert sum(map(len, table.table_pages().values())) == 3


def test_munmap_clears_frees_upwards_flushes_and_only_then_gives_frames_back() -> None:
    table, log = tree("x86-64"), Log()
    table.map(VA, PA)
    at = entries(table, VA)
    result = table.unmap(VA, log=log.words)
    assert log.records(result.records, WRITE, FLUSH, FREE) == [
        *((WRITE, level, at[level][0], 0) for level in (1, 2, 3, 4)),
        (FLUSH, 1, VA, PAGE_4K),
        *((FREE, 0, at[level][1] & ~0xFFF, 0) for level in (4, 3, 2)),
    ]
    assert result.flush == Flush(VA, VA + PAGE_4K, 1, True)


def arm(**options: Any) -> tuple[PageTable, Log]:
    return tree(arm64_stage2(**options)), Log()


def test_arm_replaces_a_leaf_through_the_locked_value_and_an_invalidation() -> None:
    table, log = arm()
    table.map(VA, PA)
    result = table.map(VA, PA + PAGE_4K, replace=True, log=log.words)
    slot = entries(table, VA)[1][0]
    assert log.records(result.records, WRITE, FLUSH) == [
        (WRITE, 1, slot, LOCKED),
        (FLUSH, 1, VA, PAGE_4K),
        (WRITE, 1, slot, PA + PAGE_4K | 0x7DB),
    ]


def test_the_locked_value_of_an_older_kernel_is_bit_10() -> None:
    table, log = arm(kernel="6.12")
    table.map(VA, PA)
    result = table.map(VA, PA + PAGE_4K, replace=True, log=log.words)
    assert log.records(result.records, WRITE)[0][3] == 1 << 10


@pytest.mark.parametrize(("ranges", "kind"), [(True, FLUSH), (False, FLUSH_ALL)])
def test_arm_replaces_a_table_by_a_block_and_frees_it_afterwards(ranges: bool, kind: LogKind) -> None:
    table, log = arm(range_invalidation=ranges)
    table.map(VA, PA)
    slot, old = entries(table, VA)[2]
    result = table.map(VA, PA, level=2, replace=True, log=log.words)
    assert log.records(result.records, WRITE, FLUSH, FLUSH_ALL, FREE) == [
        (WRITE, 2, slot, LOCKED),
        (kind, 1, VA, PAGE_2M),
        (WRITE, 2, slot, PA | 0x7D9),
        (FREE, 0, old & ~0xFFF, 0),
    ]


def test_arm_replaces_a_block_by_an_empty_table_on_a_fault() -> None:
    table, log = arm()
    table.map(VA, PA, level=2)
    result = table.map(VA + PAGE_4K, PA, replace=True, log=log.words)
    at = entries(table, VA + PAGE_4K)
    below = at[2][1] & ~0xFFF
    assert log.records(result.records, FILL, WRITE, FLUSH) == [
        (FILL, 0, below, 0),
        (WRITE, 2, at[2][0], LOCKED),
        (FLUSH, 2, VA, PAGE_2M),
        (WRITE, 2, at[2][0], below | 3),
        (WRITE, 1, at[1][0], PA | 0x7DB),
    ]
    assert table.walk(VA)[-1][2] == 0  # the rest is faulted in again


def test_arm_splits_a_gigabyte_off_line_before_it_breaks_the_entry() -> None:
    table, log = tree(arm64_stage2()), Log(300_000)
    table.map(VA, PA, level=3)
    result = table.split(VA, log=log.words)
    assert result.detail == 1
    slot, entry = entries(table, VA)[3]
    writes = log.records(result.records, WRITE, FLUSH)
    assert len(writes) == 512 * 513 + 3
    assert {level for _, level, _, _ in writes[:-3]} == {1, 2}
    assert writes[-3:] == [(WRITE, 3, slot, LOCKED), (FLUSH, 3, VA, PAGE_1G), (WRITE, 3, slot, entry)]
    assert table.walk(VA + PAGE_1G - PAGE_4K)[-1][::2] == (1, PA + PAGE_1G - PAGE_4K | 0x7DB)


def test_arm_splits_a_gigabyte_block_by_block_where_frames_are_few() -> None:
    machine = Machine(Config(frames=100))
    table = machine.create_page_table(arm64_stage2())
    table.map(VA, PA, level=3)
    result = table.split(VA, PAGE_1G)
    assert result.status == -W.ENOMEM
    assert 0 < result.detail < PAGE_1G
    assert table.walk(VA)[-1][0] == 1
    assert table.walk(VA + result.detail)[-1][::2] == (2, PA + result.detail | 0x7D9)
    assert machine.statistics.gauge(Gauge.FRAMES_USED) == 100
    assert machine.check() == 0


@pytest.mark.parametrize(
    ("options", "invalidations"), [({}, 1), ({"fwb": False}, 3), ({"range_invalidation": False}, 3)]
)
def test_arm_unmaps_with_one_invalidation_by_range_if_it_has_that_and_fwb(
    options: dict[str, Any], invalidations: int
) -> None:
    table, log = arm(**options)
    table.map_range(VA, PA, 3 * PAGE_4K)
    charged = events(table, lambda: table.unmap(VA, 3 * PAGE_4K, tables="zap", log=log.words))
    assert charged == {"SPTE_CLEARED": 3, "TLB_FLUSH_RANGE": invalidations}


def test_permissions_of_arm_need_no_break_but_memory_attributes_do() -> None:
    table, log = arm()
    table.map(VA, PA)
    slot = entries(table, VA)[1][0]
    result = table.protect(VA, clear_bits=1 << 7, log=log.words)
    assert log.records(result.records, WRITE, FLUSH) == [(WRITE, 1, slot, PA | 0x75B), (FLUSH, 1, VA, PAGE_4K)]
    result = table.protect(VA, clear_bits=1 << 3, log=log.words)
    assert [record[3] for record in log.records(result.records, WRITE)] == [LOCKED, PA | 0x753]


def test_a_raw_store_keeps_break_before_make() -> None:
    table = tree("arm64-s2")
    table.map(VA, PA, level=2)
    for forbidden in (PA + PAGE_2M | 0x7D9, PA | 0x7D1, PA | 0x4D9, PA | 1 << 52 | 0x7D9, PA | 3):
        assert table.store(VA, forbidden, level=2).status == -W.EINVAL
    assert table.store(VA, PA | 0x759, level=2).status == 0  # permissions
    result = table.store(VA, LOCKED, level=2)
    assert (result.status, result.detail, result.flush) == (0, PA | 0x759, Flush(VA, VA + PAGE_2M, 2, False))
    assert table.store(VA, PA + PAGE_2M | 0x7D9, level=2) == (0, LOCKED, None, 0)
    table.map(VA + PAGE_1G, PA)
    assert table.store(VA + PAGE_1G, PA | 0x7D9, level=2).status == -W.EINVAL  # a block over a table
    assert table.machine.check() == 0


def test_a_raw_store_loses_no_table() -> None:
    table = tree("npt")
    table.map(VA, PA)
    assert table.store(VA, EMPTY, level=2).status == -W.EBUSY
    assert table.store(VA, 0x1827, level=2).status == -W.EINVAL  # points to a table
    assert table.store(VA + PAGE_1G, PA | 0xE67).status == -W.ENOENT
    assert table.store(VA, 1 << 51 | 1, level=1).detail == PA | 0xE67  # MMIO: a reserved bit


@pytest.mark.parametrize(("fmt", "frozen"), [("npt", FROZEN), ("ept", FROZEN), ("arm64-s2", LOCKED)])
def test_a_frozen_entry_is_left_alone(fmt: str, frozen: int) -> None:
    table = tree(fmt)
    table.map(VA, PA)
    table.store(VA, frozen)
    assert table.map(VA, PA).status == -W.EAGAIN
    assert table.map(VA, PA, replace=True).status == -W.EAGAIN
    assert table.unmap(VA, tables="zap").status == -W.ENOENT
    assert table.walk(VA)[-1][2] == frozen


# ------------------------------------------------------------------ the log


def test_records_beyond_the_log_are_counted_and_not_written() -> None:
    table = tree("x86-64")
    whole = np.full((20, 3), 7, np.uint64)
    part = whole[:4]
    result = table.map(VA, PA, log=part)
    assert result.records == 11
    assert (whole[:4, 0] != 7).all()
    assert (whole[4:] == 7).all()


# ------------------------------------------------------------------ charges


@pytest.mark.parametrize(("pages", "single"), [(33, 33), (34, 0)])
def test_a_process_is_flushed_page_by_page_up_to_33(pages: int, single: int) -> None:
    table = tree("x86-64")
    table.map_range(VA, PA, pages * PAGE_4K)
    charged = events(table, lambda: table.unmap(VA, pages * PAGE_4K, tables="zap"))
    expected = {"LEAF_CLEARED": pages, "TLB_FLUSH_MM": 1, "TLB_FLUSH_PAGE": single}
    assert charged == {name: n for name, n in expected.items() if n}


def test_the_stride_is_the_smallest_leaf() -> None:
    table = tree("x86-64")
    table.map_range(VA, PA, 33 * PAGE_2M)
    assert events(table, lambda: table.unmap(VA, 33 * PAGE_2M, tables="zap"))["TLB_FLUSH_PAGE"] == 33
    table.map_range(VA, PA, PAGE_2M + PAGE_4K)
    charged = events(table, lambda: table.unmap(VA, PAGE_2M + PAGE_4K, tables="zap"))
    assert charged == {"LEAF_CLEARED": 2, "TLB_FLUSH_MM": 1}


def test_kvm_flushes_the_vm_once_whatever_the_batch() -> None:
    table = tree("ept")
    addresses = VA + np.arange(0, 100 * PAGE_2M, PAGE_2M, dtype=np.uint64)
    mapped = events(table, lambda: table.map_many(addresses, addresses))
    assert mapped == {"SPTE_WRITTEN": 100, "TABLE_PAGE_ALLOCATED": 102}
    zapped = events(table, lambda: table.unmap_many(addresses))
    assert zapped == {"SPTE_CLEARED": 100, "TLB_FLUSH_VM": 1}
    assert events(table, table.destroy) == {"TABLE_PAGE_FREED": 103}


def test_edits_leave_the_operations_of_traces_alone() -> None:
    machine = Machine(Config(pool=PAGE_1G))
    vm = machine.create_vm()
    vm.bind(machine.create_guest_memfd(PAGE_1G), 0)
    vm.touch(0)
    before = machine.statistics.events[1:].copy()
    table = machine.create_page_table("npt")
    table.map(VA, PA)
    assert (machine.statistics.events[1:] == before).all()
    assert machine.statistics.events[0, Event.SPTE_WRITTEN] == 1
    edited = machine.statistics.events[0].copy()
    vm.unbind(0)
    assert (machine.statistics.events[1:] != before).any()
    assert (machine.statistics.events[0] == edited).all()
    assert machine.check() == 0


# ------------------------------------------------------------------ frames


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize(("ipa_bits", "tables"), [(39, 1), (40, 2), (41, 4), (42, 8), (43, 16)])
def test_roots_of_several_tables_are_aligned_and_conserved(ipa_bits: int, tables: int, seed: int) -> None:
    machine = Machine(Config(seed=seed))
    used = machine.statistics.gauge(Gauge.FRAMES_USED)
    trees = [machine.create_page_table(arm64_stage2(ipa_bits)) for _ in range(3)]
    assert len({tree.root for tree in trees}) == 3
    for table in trees:
        assert table.root % (tables * PAGE_4K) == 0
        assert table.map((1 << ipa_bits) - PAGE_4K, PA).status == 0
        assert table.walk((1 << ipa_bits) - PAGE_4K)[0][1] == table.root + tables * PAGE_4K - 8
    assert machine.statistics.gauge(Gauge.FRAMES_USED) == used + 3 * (tables + 2)
    assert machine.check() == 0
    root = trees[1].root
    trees[1].destroy()
    assert machine.create_page_table(arm64_stage2(ipa_bits)).root == root
    for table in list(machine.page_tables):
        table.destroy()
    assert machine.statistics.gauge(Gauge.FRAMES_USED) == used
    assert machine.check() == 0


def test_roots_of_several_tables_run_out() -> None:
    machine = Machine(Config())
    for _ in range(W.CONTIGUOUS_FRAMES // 16):
        machine.create_page_table(arm64_stage2(43))
    with pytest.raises(OSError, match="16 frames in a row") as error:
        machine.create_page_table(arm64_stage2(43))
    assert error.value.errno == W.ENOMEM


@pytest.mark.parametrize("fmt", ["x86-64", "ept-5", "arm64-s2"])
def test_under_every_budget_a_failed_map_leaves_whole_leaves_and_linked_tables(fmt: str) -> None:
    """A range over a 1G boundary, unaligned at both ends, needs a known number of tables."""
    start, length = VA - PAGE_2M - PAGE_4K, 2 * PAGE_2M + 2 * PAGE_4K
    needed = None
    for budget in range(1, 20):
        machine = Machine(Config(frames=budget + 4))
        try:
            table = machine.create_page_table(fmt)
        except OSError:
            continue
        result = table.map_range(start, start, length)
        mapped = length if result.status == 0 else result.detail
        for offset in (0, PAGE_4K, PAGE_2M, length - PAGE_4K):
            _, _, entry = table.walk(start + offset)[-1]
            assert bool(entry & table.format.present) == (offset < mapped), (budget, offset)
        assert machine.check() == 0
        if result.status == 0:
            needed = budget
            break
        assert result.status == -W.ENOMEM
        assert machine.statistics.gauge(Gauge.FRAMES_USED) == budget + 4
    assert needed is not None


def test_a_split_without_memory_leaves_the_leaf() -> None:
    machine = Machine(Config(frames=6))
    table = machine.create_page_table("x86-64")
    assert table.map(VA, PA, level=2).status == 0
    while machine.statistics.gauge(Gauge.FRAMES_USED) < 6:
        machine.create_process()
    for result in (table.split(VA), table.unmap(VA + PAGE_4K), table.protect(VA, clear_bits=2)):
        assert (result.status, result.detail, result.flush) == (-W.ENOMEM, 0, None)
    assert table.walk(VA)[-1][2] == PA | 0x8E7
