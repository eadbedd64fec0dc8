"""Page tables edited in every format, against the dict model; and what the interface refuses."""

from __future__ import annotations

from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from model.page_tables import FORMATS, Format, Table, Tree, all_tables, size_of, walk
from pgemu.machine import Config, Machine
from pgemu.page_table import EditResult, Flush
from pgemu_kernels import page_format
from pgemu_kernels.layout import PAGE_1G, PAGE_2M, PAGE_4K, Gauge

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
PHYSICAL = [0, 1 << 32, (1 << 32) + PAGE_2M, (1 << 32) + PAGE_4K, (1 << 36) - PAGE_1G]


def anchors(fmt: Format) -> list[int]:
    """Middles of the regions that a run edits: the 512G boundary, the middle and the end of the input addresses."""
    top = 1 << fmt.input_bits
    return [2 * PAGE_1G, min(1 << 39, top // 2), top // 2, top - 2 * PAGE_1G]


class Edits(RuleBasedStateMachine):
    """Any sequence of edits; after each the tree is the model's, and what changed is within what is flushed."""

    @initialize(fmt=st.sampled_from(FORMATS), anchor=st.integers(0, 3), seed=st.sampled_from([0, 3]))
    def start(self, fmt: Format, anchor: int, seed: int) -> None:
        self.fmt = fmt
        self.machine = Machine(Config(seed=seed))
        self.used = self.machine.statistics.gauge(Gauge.FRAMES_USED)
        self.table = self.machine.create_page_table(MAKERS[fmt.name]() if fmt.name in MAKERS else fmt.name)
        self.tree = Tree(fmt)
        self.anchor = anchors(fmt)[anchor]

    # ------------------------------------------------------------------ helpers

    def place(self, offset: int, level: int = 1) -> int:
        """An address of the region: in the tree, and as the interface takes it."""
        address = min(max(self.anchor + offset, 0), (1 << self.fmt.input_bits) - size_of(level))
        return address & -size_of(level)

    def given(self, address: int) -> int:
        bits = self.fmt.input_bits
        upper = self.table.format.sign_extended and address >> bits - 1
        return address + (1 << 64) - (1 << bits) if upper else address

    def fit(self, address: int, length: int) -> int:
        """A length that neither leaves the input addresses nor crosses the canonical hole."""
        half = 1 << self.fmt.input_bits - (1 if self.table.format.sign_extended else 0)
        return min(length, half - address % half)

    def compare(self, result: EditResult, status: int, detail: int) -> None:
        assert (result.status, result.detail) == (status, detail)
        for changed in self.tree.changed:
            assert result.flush is not None
            start = self.given(changed.start)
            assert result.flush.start <= start < start + len(changed) <= result.flush.end

    # ------------------------------------------------------------------ edits

    @rule(offset=st.sampled_from(OFFSETS), physical=st.sampled_from(PHYSICAL), level=st.integers(1, 3),
          bits=st.integers(0, 7), replace=st.booleans())  # fmt: skip
    def map(self, offset: int, physical: int, level: int, bits: int, replace: bool) -> None:
        address = self.place(offset, level)
        attributes = self.attributes(bits)
        physical &= -size_of(level)
        expected = self.tree.map(address, physical, size_of(level), level, attributes, replace)
        result = self.table.map(self.given(address), physical, level=level, attributes=attributes, replace=replace)
        self.compare(result, expected.status, expected.detail)

    @rule(offset=st.sampled_from(OFFSETS), aligned=st.booleans(), physical=st.sampled_from(PHYSICAL),
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
        result = self.table.map_range(
            self.given(address), physical, length, max_level=max_level, attributes=attributes, replace=replace
        )
        self.compare(result, expected.status, expected.detail)

    def attributes(self, bits: int) -> int:
        """A 4K leaf's bits: with or without write access, accessed and dirty bits, another memory type."""
        drop = (self.fmt.accessed | self.fmt.dirty if bits & 1 else 0) | (self.fmt.write if bits & 2 else 0)
        return self.fmt.leaf & ~drop ^ (self.fmt.memory_type if bits & 4 else 0)

    @rule(offset=st.sampled_from(OFFSETS), length=st.sampled_from(LENGTHS), partial=st.sampled_from(["split", "whole"]),
          tables=st.sampled_from(["munmap", "zap", "madvise"]))  # fmt: skip
    def unmap(self, offset: int, length: int, partial: str, tables: str) -> None:
        address = self.place(offset)
        length = self.fit(address, length)
        expected = self.tree.unmap(range(address, address + length), partial, tables)
        result = self.table.unmap(self.given(address), length, partial=partial, tables=tables)  # type: ignore[arg-type]
        self.compare(result, expected.status, expected.detail)

    @rule(
        offset=st.sampled_from(OFFSETS), length=st.sampled_from(LENGTHS), tables=st.sampled_from(["munmap", "madvise"])
    )
    def free_tables(self, offset: int, length: int, tables: str) -> None:
        address = self.place(offset)
        length = self.fit(address, length)
        freed = self.tree.free_tables(range(address, address + length), tables)
        result = self.table.free_tables(self.given(address), length, tables=tables)  # type: ignore[arg-type]
        assert (result.status, result.detail) == (0, freed)
        assert (result.flush is not None and result.flush.freed_tables) == (freed > 0)

    @rule(offset=st.sampled_from(OFFSETS), length=st.sampled_from(LENGTHS), what=st.integers(0, 15),
          partial=st.sampled_from(["split", "whole"]))  # fmt: skip
    def protect(self, offset: int, length: int, what: int, partial: str) -> None:
        address = self.place(offset)
        length = self.fit(address, length)
        parts = [self.fmt.write, self.fmt.memory_type, self.fmt.software & -self.fmt.software, self.fmt.accessed]
        bits = sum(part for i, part in enumerate(parts) if what >> i & 1)
        set_bits, clear_bits = (bits, 0) if what & 1 else (0, bits)
        expected = self.tree.protect(range(address, address + length), set_bits, clear_bits, partial)
        result = self.table.protect(
            self.given(address), length, set_bits=set_bits, clear_bits=clear_bits, partial=partial
        )  # type: ignore[arg-type]
        self.compare(result, expected.status, expected.detail)

    @rule(offset=st.sampled_from(OFFSETS), length=st.sampled_from(LENGTHS), dirty=st.booleans())
    def clear(self, offset: int, length: int, dirty: bool) -> None:
        address = self.place(offset)
        length = self.fit(address, length)
        expected = self.tree.clear(range(address, address + length), self.fmt.dirty if dirty else self.fmt.accessed)
        method = self.table.clear_dirty if dirty else self.table.clear_accessed
        self.compare(method(self.given(address), length), expected.status, expected.detail)

    @rule(offset=st.sampled_from(OFFSETS), length=st.sampled_from(LENGTHS[:3]), level=st.integers(1, 2))
    def split(self, offset: int, length: int, level: int) -> None:
        address = self.place(offset)
        length = self.fit(address, length)
        where = range(address, address + length)
        # A gigabyte in 262144 leaves is a test of its own.
        if level == 1 and any(leaf.level == 3 for _, leaf in self.tree.over(where)):
            level = 2
        expected = self.tree.split(where, level)
        result = self.table.split(self.given(address), length, level=level)
        self.compare(result, expected.status, expected.detail)
        if self.table.format.flush == page_format.FlushRule.WHOLE_VM:
            assert result.flush is None

    @rule(offset=st.sampled_from(OFFSETS), level=st.integers(2, 3))
    def collapse(self, offset: int, level: int) -> None:
        address = self.place(offset, level)
        expected = self.tree.collapse(address, level)
        result = self.table.collapse(self.given(address), level=level)
        assert result.status == expected.status
        if expected.status == 0:
            assert result.flush is not None
            start = self.given(address)
            assert result.flush == Flush(start, start + size_of(level), 1, True)

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
        self.compare(result := self.table.store(self.given(base), entry, level=level), status, result.detail)

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
        assert found == self.tree.tables
        assert self.machine.check() == 0
        self.table.destroy()
        assert self.machine.statistics.gauge(Gauge.FRAMES_USED) == self.used
        assert self.machine.check() == 0


TestEdits = Edits.TestCase
TestEdits.settings = settings(max_examples=8, stateful_step_count=20)
