"""Page tables edited in every format, against the dict model; and what the interface refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from model.page_tables import FORMATS, Format, Table, Tree, all_tables, size_of, walk
from pgemu.objects.machine import Config, Machine
from pgemu.tables.flush import Flush
from pgemu.tables.page_table import EditResult, PageTable
from pgemu_kernels import words as W
from pgemu_kernels.formats import page_format
from pgemu_kernels.formats.page_format import FORMATS as FORMATS_BY_NAME
from pgemu_kernels.words.events import Gauge
from pgemu_kernels.words.operations import PAGE_1G, PAGE_2M, PAGE_4K

MAKERS = {
    "ept-nx": lambda: page_format.ept(nx_huge_pages=True),
    "arm64-s2-39": lambda: page_format.arm64_stage2(39),
    "arm64-s2-43": lambda: page_format.arm64_stage2(43),
}
LENGTHS = [PAGE_4K, 3 * PAGE_4K, PAGE_2M, PAGE_2M + PAGE_4K, 2 * PAGE_2M, PAGE_1G, PAGE_1G + PAGE_2M - PAGE_4K]
OFFSETS = sorted(
    {
        side * (gigabytes * PAGE_1G + megabytes * PAGE_2M + pages * PAGE_4K)
        for side in (-1, 1)
        for gigabytes in (0, 1)
        for megabytes in (0, 1, 2)
        for pages in (0, 1, 511)
    }
)


class Near(int):
    """Not an offset but a leaf: the first or the last one of some table, whichever there are then."""


PLACES = st.one_of(st.integers(0, 15).map(Near), st.sampled_from(OFFSETS))
PHYSICAL = [0, 1 << 32, (1 << 32) + PAGE_2M, (1 << 32) + PAGE_4K, (1 << 36) - PAGE_1G]


def anchors(fmt: Format) -> list[int]:
    """Middles of the regions that a run edits: the 512G boundary, the middle and the end of the input addresses."""
    top = 1 << fmt.input_bits
    return [2 * PAGE_1G, min(1 << 39, top // 2), top // 2, top - 2 * PAGE_1G]


class Edits(RuleBasedStateMachine):
    """Any sequence of edits; after each the tree is the model's, and what changed is within what is flushed."""

    @initialize(
        fmt=st.sampled_from(FORMATS), anchor=st.integers(0, 3), seed=st.sampled_from([0, 3]), logged=st.booleans()
    )
    def start(self, fmt: Format, anchor: int, seed: int, logged: bool) -> None:
        self.fmt = fmt
        self.machine = Machine(Config(seed=seed))
        self.used = self.machine.statistics.gauge(Gauge.FRAMES_USED)
        self.table = self.machine.create_page_table(MAKERS[fmt.name]() if fmt.name in MAKERS else fmt.name)
        self.tree = Tree(fmt)
        self.log = np.zeros((40_000, W.LOG_WORDS), np.uint64) if logged else None
        pages = self.table.root + np.arange(fmt.roots) * PAGE_4K
        self.written = {int(page): np.full(512, self.table.format.empty, np.uint64) for page in pages}
        self.anchor = anchors(fmt)[anchor]
        length = 2 * PAGE_2M + 3 * PAGE_4K
        self.map_range(-2 * PAGE_2M - PAGE_4K, True, 1 << 32, length, 3, 0, False)
        self.map(PAGE_1G, 0, 3, 0, False)

    # ------------------------------------------------------------------ helpers

    def place(self, offset: int, level: int = 1) -> int:
        """An address of the region: in the tree, and as the interface takes it."""
        address = self.anchor + offset
        if isinstance(offset, Near) and self.tree.leaves:
            leaves = self.tree.leaves[sorted(self.tree.leaves)[offset // 2 % len(self.tree.leaves)]]
            address = max(leaves) if offset % 2 else min(leaves)
        return min(max(address, 0), (1 << self.fmt.input_bits) - size_of(level)) & -size_of(level)

    def given(self, address: int) -> int:
        bits = self.fmt.input_bits
        upper = self.table.format.sign_extended and address >> bits - 1
        return address + (1 << 64) - (1 << bits) if upper else address

    def fit(self, address: int, length: int) -> int:
        """A length that neither leaves the input addresses nor crosses the canonical hole."""
        half = 1 << self.fmt.input_bits - (1 if self.table.format.sign_extended else 0)
        return min(length, half - address % half)

    def edit(self, method: str, *arguments: Any, **options: Any) -> EditResult:
        """Call a method of the table, and write what its log says into tables of our own."""
        result: EditResult = getattr(self.table, method)(*arguments, log=self.log, **options)
        if self.log is not None:
            assert result.records <= len(self.log)
            for kind, address, value in self.log[: result.records].tolist():
                if kind & 0xFF == W.LogKind.FILL:
                    self.written[address] = np.full(512, value, np.uint64)
                elif kind & 0xFF == W.LogKind.WRITE:
                    page = self.written.setdefault(address & -PAGE_4K, np.zeros(512, np.uint64))
                    page[address % PAGE_4K // 8] = value
        else:
            assert result.records == 0
        return result

    def compare(self, result: EditResult, status: int, detail: int) -> None:
        assert (result.status, result.detail) == (status, detail)
        for changed in self.tree.changed:
            assert result.flush is not None
            start = self.given(changed.start)
            assert result.flush.start <= start < start + len(changed) <= result.flush.end

    # ------------------------------------------------------------------ edits

    @rule(offset=PLACES, physical=st.sampled_from(PHYSICAL), level=st.integers(1, 3),
          bits=st.integers(0, 7), replace=st.booleans())  # fmt: skip
    def map(self, offset: int, physical: int, level: int, bits: int, replace: bool) -> None:
        address = self.place(offset, level)
        attributes = self.attributes(bits)
        physical &= -size_of(level)
        expected = self.tree.map(address, physical, size_of(level), level, attributes, replace)
        result = self.edit("map", self.given(address), physical, level=level, attributes=attributes, replace=replace)
        self.compare(result, expected.status, expected.detail)

    @rule(offset=PLACES, aligned=st.booleans(), physical=st.sampled_from(PHYSICAL),
          length=st.sampled_from(LENGTHS), max_level=st.integers(2, 3), bits=st.integers(0, 7),
          replace=st.booleans())  # fmt: skip
    def map_range(
        self, offset: int, aligned: bool, physical: int, length: int, max_level: int, bits: int, replace: bool
    ) -> None:
        address = self.place(offset)
        length = self.fit(address, length)
        if aligned:  # to each other, so that large leaves come to be
            physical += address % PAGE_1G
        if (physical - address) % PAGE_2M:
            length = min(length, PAGE_2M + PAGE_4K)
        attributes = self.attributes(bits)
        expected = self.tree.map(address, physical, length, max_level, attributes, replace)
        result = self.edit(
            "map_range",
            self.given(address),
            physical,
            length,
            max_level=max_level,
            attributes=attributes,
            replace=replace,
        )
        self.compare(result, expected.status, expected.detail)

    def attributes(self, bits: int) -> int:
        """A 4K leaf's bits: with or without write access, accessed and dirty bits, another memory type."""
        drop = (self.fmt.accessed | self.fmt.dirty if bits & 1 else 0) | (self.fmt.write if bits & 2 else 0)
        return self.fmt.leaf & ~drop ^ (self.fmt.memory_type if bits & 4 else 0)

    @rule(offset=PLACES, length=st.sampled_from(LENGTHS), partial=st.sampled_from(["split", "whole"]),
          tables=st.sampled_from(["munmap", "zap", "madvise"]))  # fmt: skip
    def unmap(self, offset: int, length: int, partial: str, tables: str) -> None:
        address = self.place(offset)
        length = self.fit(address, length)
        expected = self.tree.unmap(range(address, address + length), partial, tables)
        result = self.edit("unmap", self.given(address), length, partial=partial, tables=tables)
        self.compare(result, expected.status, expected.detail)

    @rule(offset=PLACES, length=st.sampled_from(LENGTHS), tables=st.sampled_from(["munmap", "madvise"]))
    def free_tables(self, offset: int, length: int, tables: str) -> None:
        address = self.place(offset)
        length = self.fit(address, length)
        freed = self.tree.free_tables(range(address, address + length), tables)
        result = self.edit("free_tables", self.given(address), length, tables=tables)
        assert (result.status, result.detail) == (0, freed)
        assert (result.flush is not None and result.flush.freed_tables) == (freed > 0)

    @rule(offset=PLACES, length=st.sampled_from(LENGTHS), what=st.integers(0, 15),
          partial=st.sampled_from(["split", "whole"]))  # fmt: skip
    def protect(self, offset: int, length: int, what: int, partial: str) -> None:
        address = self.place(offset)
        length = self.fit(address, length)
        parts = [self.fmt.write, self.fmt.memory_type, self.fmt.software & -self.fmt.software, self.fmt.accessed]
        bits = sum(part for i, part in enumerate(parts) if what >> i & 1)
        set_bits, clear_bits = (bits, 0) if what & 1 else (0, bits)
        expected = self.tree.protect(range(address, address + length), set_bits, clear_bits, partial)
        result = self.edit(
            "protect", self.given(address), length, set_bits=set_bits, clear_bits=clear_bits, partial=partial
        )
        self.compare(result, expected.status, expected.detail)

    @rule(offset=PLACES, length=st.sampled_from(LENGTHS), dirty=st.booleans())
    def clear(self, offset: int, length: int, dirty: bool) -> None:
        address = self.place(offset)
        length = self.fit(address, length)
        expected = self.tree.clear(range(address, address + length), self.fmt.dirty if dirty else self.fmt.accessed)
        result = self.edit("clear_dirty" if dirty else "clear_accessed", self.given(address), length)
        self.compare(result, expected.status, expected.detail)

    @rule(offset=PLACES, length=st.sampled_from(LENGTHS[:3]), level=st.integers(1, 2))
    def split(self, offset: int, length: int, level: int) -> None:
        address = self.place(offset)
        length = self.fit(address, length)
        where = range(address, address + length)
        # A gigabyte in 262144 leaves is a test of its own.
        if level == 1 and any(leaf.level == 3 for _, leaf in self.tree.over(where)):
            level = 2
        expected = self.tree.split(where, level)
        result = self.edit("split", self.given(address), length, level=level)
        self.compare(result, expected.status, expected.detail)
        if self.table.format.flush == page_format.FlushRule.WHOLE_VM:
            assert result.flush is None

    @rule(offset=PLACES, level=st.integers(2, 3))
    def collapse(self, offset: int, level: int) -> None:
        self.collapse_at(self.place(offset, level), level)

    @precondition(lambda self: any(len(leaves) == 512 for leaves in self.tree.leaves.values()))
    @rule(which=st.integers(0, 7))
    def collapse_full_table(self, which: int) -> None:
        full = sorted(table for table, leaves in self.tree.leaves.items() if len(leaves) == 512 and table.level < 3)
        if full:
            table = full[which % len(full)]
            self.collapse_at(table.span.start, table.level + 1)

    def collapse_at(self, address: int, level: int) -> None:
        expected = self.tree.collapse(address, level)
        result = self.edit("collapse", self.given(address), level=level)
        assert result.status == expected.status
        if expected.status == 0:
            assert result.flush is not None
            start = self.given(address)
            assert result.flush == Flush(start, start + size_of(level), 1, True)
            assert result.detail == 1

    @precondition(lambda self: self.tree.leaves)
    @rule(data=st.data(), what=st.sampled_from(["absent", "same", "moved", "other level"]))
    def store(self, data: st.DataObject, what: str) -> None:
        leaves = self.tree.leaves[data.draw(st.sampled_from(sorted(self.tree.leaves)))]
        base = data.draw(st.sampled_from([min(leaves), max(leaves)]))
        level, entry = leaves[base]
        if what == "absent":
            entry = 0x123 << 12 & ~self.fmt.present
        elif what == "moved":
            entry ^= 1 << 35
        elif what == "other level":
            level = level % 3 + 1
            entry = self.fmt.encode(level, 0, self.fmt.leaf)
        status = self.tree.store(base, level, entry)
        self.compare(result := self.edit("store", self.given(base), entry, level=level), status, result.detail)

    # ------------------------------------------------------------------ invariants

    @invariant()
    def same_translations(self) -> None:
        if not hasattr(self, "tree"):
            return
        ram = self.machine.arrays.ram
        for offset in OFFSETS:
            address = self.place(offset)
            steps = walk(ram, self.table.root, self.fmt, address)
            assert steps == self.table.walk(self.given(address))
            level, _, entry = steps[-1]
            found = self.tree.find(address)
            if found is None:
                assert not entry & self.fmt.present
            else:
                assert (level, entry) == found[1]

    @invariant()
    def same_tables(self) -> None:
        if not hasattr(self, "tree"):
            return
        pages = self.table.table_pages()
        for level in range(1, self.fmt.levels):
            assert len(pages[level]) == sum(table.level == level for table in self.tree.tables)
        used = self.machine.statistics.gauge(Gauge.FRAMES_USED) - self.used
        assert used == sum(map(len, pages.values())) == len(self.tree.tables) + self.fmt.roots

    def teardown(self) -> None:
        if not hasattr(self, "tree"):
            return
        found: set[Table] = set()
        for table, at, entries in all_tables(self.machine.arrays.ram, self.table.root, self.fmt):
            assert entries == self.machine.arrays.counts[at >> 12]
            found |= {table} if table else set()
            if self.log is not None:
                assert (self.machine.arrays.ram[at // 8 : at // 8 + 512] == self.written[at]).all()
        assert found == self.tree.tables
        assert self.machine.check() == 0
        self.table.destroy()
        assert self.machine.statistics.gauge(Gauge.FRAMES_USED) == self.used
        assert self.machine.check() == 0


TestEdits = Edits.TestCase
TestEdits.settings = settings(max_examples=60, stateful_step_count=20)


# ------------------------------------------------------------------ batches


VA = 5 * PAGE_1G


def tree(fmt: str = "x86-64") -> PageTable:
    return Machine(Config()).create_page_table(fmt)


@pytest.mark.parametrize("logged", [False, True])
def test_a_batch_keeps_order_and_tells_each_address_its_own(logged: bool) -> None:
    log = np.zeros((2000, 3), np.uint64) if logged else None
    table = tree()
    addresses = np.array([VA, VA + PAGE_4K, VA, VA + 1, 1 << 47, VA + PAGE_1G], np.uint64)
    physical = np.array([PAGE_4K, 2 * PAGE_4K, 3 * PAGE_4K, 0, 0, 1 << 52], np.uint64)
    result = table.map_many(addresses, physical, log=log)
    assert result.status.tolist() == [0, 0, -W.EEXIST, -W.EINVAL, -W.ERANGE, -W.EINVAL]
    assert result.detail[:2].tolist() == [1, 1]
    assert table.clear_dirty_many(addresses[:3], log=log).detail.tolist() == [1, 1, 0]
    assert table.clear_accessed_many(addresses[:2], log=log)[2:] == (None, 10 if logged else 0)
    assert table.protect_many(addresses[:2], clear_bits=2, log=log).detail.tolist() == [1, 1]
    result = table.unmap_many(addresses[:3], log=log)
    assert result.status.tolist() == [0, 0, -W.ENOENT]
    assert result.flush == Flush(VA, VA + 2 * PAGE_4K, 1, True)
    assert [len(pages) for pages in table.table_pages().values()] == [1, 0, 0, 0]
    assert table.machine.check() == 0


def test_a_flush_of_both_halves_covers_what_lies_between() -> None:
    table = tree()
    kernel = (1 << 64) - PAGE_2M
    addresses = np.array([VA, kernel], np.uint64)
    assert table.map_many(addresses, addresses & np.uint64((1 << 40) - 1)).status.tolist() == [0, 0]
    assert table.unmap(kernel, tables="zap").flush == Flush(kernel, kernel + PAGE_4K, 1, False)
    table.map(kernel, 0)
    assert table.unmap_many(addresses, tables="zap").flush == Flush(VA, kernel + PAGE_4K, 1, False)
    assert table.destroy().flush == Flush(0, 1 << 64, 1, True)


def test_batches_of_ranges_splits_and_collapses() -> None:
    table = tree("ept")
    addresses = VA + np.arange(4, dtype=np.uint64) * np.uint64(PAGE_2M)
    assert table.map_range_many(addresses, addresses, PAGE_2M).detail.tolist() == [1] * 4
    assert table.split_many(addresses).detail.tolist() == [1] * 4
    assert table.collapse_many(addresses).status.tolist() == [0] * 4
    assert table.unmap_many(addresses, PAGE_2M).flush == Flush(VA, VA + 4 * PAGE_2M, 2, False)


def test_a_batch_equals_single_edits() -> None:
    """Random addresses, physical addresses and levels, each mapped alone in one tree and together in the other."""
    random = np.random.default_rng(3)
    addresses = VA + random.integers(0, 2048, 500).astype(np.uint64) * np.uint64(PAGE_4K)
    physical = random.integers(0, 1 << 30, 500).astype(np.uint64) * np.uint64(PAGE_4K)
    one, many = tree("npt"), tree("npt")
    single = [one.map(int(a), int(p)).status for a, p in zip(addresses, physical, strict=True)]
    assert many.map_many(addresses, physical).status.tolist() == single
    single = [one.unmap(int(a)).status for a in addresses[::2]]
    assert many.unmap_many(addresses[::2]).status.tolist() == single
    ram = [table.machine.arrays.ram[: 64 * 512] for table in (one, many)]
    assert (ram[0] == ram[1]).all()


@pytest.mark.parametrize("fmt", ["x86-64", "ept-5", "arm64-s2"])
def test_no_address_harms_a_batch(fmt: str) -> None:
    """Any 64-bit words, among them some that lie within the tables: each as refused alone."""
    random = np.random.default_rng(7)
    addresses = random.integers(0, 1 << 64, 400, dtype=np.uint64) >> random.integers(0, 52, 400).astype(np.uint64)
    addresses[::2] &= ~np.uint64(PAGE_4K - 1)
    physical = addresses[::-1] & np.uint64((1 << 40) - PAGE_4K)
    one, many = tree(fmt), tree(fmt)
    single = [one.map(int(a), int(p)).status for a, p in zip(addresses, physical, strict=True)]
    assert many.map_many(addresses, physical).status.tolist() == single
    assert {0, -W.EINVAL, -W.ERANGE} <= set(single)
    for method in ("unmap", "protect", "clear_accessed", "split", "collapse"):
        single = [getattr(one, method)(int(a)).status for a in addresses]
        assert getattr(many, method + "_many")(addresses).status.tolist() == single
    assert one.machine.check() == many.machine.check() == 0


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ({"level": 0}, -W.EINVAL),
        ({"level": 4}, -W.EINVAL),
        ({"level": 99}, -W.EINVAL),
        ({"level": 2, "physical": PAGE_4K}, -W.EINVAL),
        ({"level": 2, "address": VA + PAGE_4K}, -W.EINVAL),
        ({"attributes": 0}, -W.EINVAL),  # not present
        ({"attributes": 0x1867}, -W.EINVAL),  # an address bit
        ({"physical": 1 << 40}, -W.EINVAL),  # beyond MAXPHYADDR
        ({"address": (1 << 47)}, -W.ERANGE),
        ({"address": (1 << 64) - (1 << 47) - PAGE_4K}, -W.ERANGE),
        ({"address": (1 << 64) - PAGE_4K}, 0),
        ({"physical": (1 << 40) - PAGE_4K}, 0),
    ],
)
def test_map_refuses_what_hardware_would(arguments: dict[str, int], status: int) -> None:
    table = Machine(Config()).create_page_table(page_format.x86_64(maxphyaddr=40))
    assert table.map(**{"address": VA, "physical": 0, **arguments}).status == status


def test_sizes_without_1g_pages_have_none() -> None:
    table = Machine(Config()).create_page_table(page_format.x86_64(pages_1g=False))
    assert table.map(VA, 0, level=3).status == -W.EINVAL
    assert table.map_range(VA, 0, PAGE_1G).detail == 512


@pytest.mark.parametrize(
    ("bits", "status"), [({"clear_bits": 1}, -W.EINVAL), ({"set_bits": 1 << 20}, -W.EINVAL), ({"set_bits": 1 << 63}, 0)]
)
def test_protect_keeps_address_and_presence(bits: dict[str, int], status: int) -> None:
    table = tree()
    table.map(VA, 0)
    assert table.protect(VA, **bits).status == status


def test_ept_leaves_are_never_made_a_misconfiguration() -> None:
    table = tree("ept")
    table.map(VA, 0, attributes=1 << 11 | 0b001 | 6 << 3)
    assert table.protect(VA, set_bits=0b010, clear_bits=0b001).status == -W.EINVAL  # writable, not readable
    assert table.protect(VA, clear_bits=0b001).status == -W.EINVAL  # absent
    assert table.map(VA + PAGE_4K, 0, attributes=0b111 | 7 << 3).status == -W.EINVAL  # memory type 7


def test_formats_without_hardware_bits_have_none_to_clear() -> None:
    table = Machine(Config()).create_page_table(page_format.ept(accessed_dirty=False))
    table.map(VA, 0)
    assert table.clear_accessed(VA).status == table.clear_dirty(VA).status == -W.EOPNOTSUPP


@pytest.mark.parametrize("fmt", ["x86-64", "ept", "arm64-s2"])
def test_ranges_end_where_the_input_addresses_do(fmt: str) -> None:
    table = tree(fmt)
    bits = table.format.input_bits - (1 if table.format.sign_extended else 0)
    assert table.map_range((1 << bits) - PAGE_4K, 0, 2 * PAGE_4K).status == -W.ERANGE
    assert table.map_range((1 << 64) - PAGE_4K, 0, 2 * PAGE_4K).status == -W.ERANGE
    assert table.unmap(VA, 0).status == table.unmap(VA, 100).status == -W.EINVAL
    assert table.map((1 << bits) - PAGE_4K, 0).status == 0


def test_misuse_is_a_value_error() -> None:
    machine = Machine(Config())
    with pytest.raises(ValueError, match="expected one of x86-64"):
        machine.create_page_table("sparc")
    table = machine.create_page_table("x86-64")
    for log in (np.zeros((4, 2), np.uint64), np.zeros((4, 3), np.int64), np.zeros((0, 3), np.uint64)):
        with pytest.raises(ValueError, match="log"):
            table.map(VA, 0, log=log)
    with pytest.raises(ValueError, match="physical of 2 elements: expected 3 or 1"):
        table.map_many(np.zeros(3, np.uint64), np.zeros(2, np.uint64))
    with pytest.raises(ValueError, match="each from 0"):
        table.unmap_many(np.array([-1]))
    with pytest.raises(ValueError, match=r"2\*\*64 - 1"):
        table.map(-1, 0)
    with pytest.raises(ValueError, match="48 bits"):
        table.walk(1 << 47)
    table.destroy()
    with pytest.raises(ValueError, match="destroyed"):
        table.map(VA, 0)


def test_two_trees_of_one_machine_do_not_touch_each_other() -> None:
    machine = Machine(Config())
    one, other = machine.create_page_table("x86-64"), machine.create_page_table("arm64-s2")
    one.map(VA, PAGE_4K)
    other.map(VA, 2 * PAGE_4K)
    one.destroy()
    assert other.walk(VA)[-1][2] == 2 * PAGE_4K | 0x7DB
    assert machine.check() == 0


def test_the_recount_finds_a_table_that_two_entries_point_to() -> None:
    machine = Machine(Config())
    table = machine.create_page_table("x86-64")
    table.map(VA, 0)
    _, at, entry = table.walk(VA)[1]
    machine.arrays.ram[at // 8 + 1] = entry  # a second gigabyte through the same table
    assert machine.check() > 0


def test_what_cannot_be_asked_is_refused() -> None:
    machine = Machine(Config())
    with pytest.raises(ValueError, match="levels"):
        machine.create_page_table(FORMATS_BY_NAME["ept"](), levels=4)
    table = machine.create_page_table("vtd-s2", levels=3, kernel="6.18")
    assert table.format.levels == 3
    assert table.map(0, PAGE_4K).status == 0
    assert table.translate([5]).physical.tolist() == [PAGE_4K + 5]
    with pytest.raises(ValueError, match="READ and WRITE"):
        table.translate([5], 2)
    with pytest.raises(ValueError, match="tables 'zap': expected None"):
        table.unmap(0, tables="zap")
    with pytest.raises(ValueError, match="partial 'whole': expected None"):
        table.unmap(0, partial="whole")
    table = machine.create_page_table("x86-64")
    wrong: Any = "some"
    with pytest.raises(ValueError, match="partial 'some'"):
        table.unmap(0, partial=wrong)
    with pytest.raises(ValueError, match="tables 'some'"):
        table.free_tables(0, PAGE_4K, tables=wrong)
    assert machine.check() == 0
    table.destroy()
    for look in (lambda: table.walk(0), lambda: table.translate([0]), table.table_pages):
        with pytest.raises(ValueError, match="destroyed"):
            look()
