"""Domains of IOMMUs: maps and unmaps of all kernels against the model, and a reader of its own against translate()."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from model.domains import PAGE, Domain, size_of
from pgemu.objects.machine import Config, Machine
from pgemu.tables.page_table import PageTable
from pgemu.tables.translation import Kind, WalkStatus
from pgemu_kernels.formats.iommu import attributes_for

M2, G1, G512 = 2 << 20, 1 << 30, 1 << 39
ADDRESS = 0x000F_FFFF_FFFF_F000
KERNELS = ("6.12", "6.18", "7.3")
LENGTHS = [PAGE, 2 * PAGE, 3 * PAGE, 16 * PAGE, 1 << 20, M2 - PAGE, M2, M2 + PAGE, 16 << 20, G1, G1 + M2, 2 * G1]
STEPS = [0, PAGE, 2 * PAGE, 8 * PAGE, 1 << 20, M2 - PAGE, M2, 16 << 20, G1 - M2, G1]
MOST_PAGES = 130
RIGHTS = [(True, True), (True, False), (False, True)]


def read_words(table: PageTable) -> tuple[dict[tuple[int, int], int], dict[tuple[int, int], int]]:
    """Tables and leaves by (level, address), read word by word."""
    ram, vtd = table.machine.arrays.ram, table.format.name.startswith("vtd")
    tables: dict[tuple[int, int], int] = {}
    leaves: dict[tuple[int, int], int] = {}

    def read(where: int, level: int, base: int) -> None:
        words = ram[where // 8 : where // 8 + 512]
        for index in np.flatnonzero(words).tolist():
            entry, at = int(words[index]), base + index * size_of(level)
            leaf = level == 1 or (bool(entry & 0x80) if vtd else entry >> 9 & 7 in (0, 7))
            (leaves if leaf else tables)[level, at] = entry
            if not leaf:
                read(entry & ADDRESS, level - 1, at)

    read(table.root, table.format.levels, 0)
    return tables, leaves


class Domains(RuleBasedStateMachine):
    """Any maps and unmaps; after each the tree is the model's, word by word."""

    @initialize(
        unit=st.sampled_from(["vtd", "amd"]), kernel=st.sampled_from(KERNELS), levels=st.sampled_from([3, 4]),
        most=st.sampled_from([4, 6]), middle=st.sampled_from([4 * G1, G512 - 4 * G1, G512, 1 << 47]),
    )  # fmt: skip
    def start(self, unit: str, kernel: str, levels: int, most: int, middle: int) -> None:
        self.machine = Machine(Config())
        if unit == "vtd":
            self.table = self.machine.create_page_table("vtd-s2", kernel=kernel, levels=levels)
        else:
            self.table = self.machine.create_page_table("amd-v1", kernel=kernel, levels=levels, most_levels=most)
        self.model = Domain(unit, kernel, levels, most)
        self.middle = middle

    def place(self, up: list[int], down: list[int]) -> int:
        return self.middle + sum(up) - sum(down)

    @rule(
        up=st.lists(st.sampled_from(STEPS), max_size=3), down=st.lists(st.sampled_from(STEPS), max_size=2),
        physical=st.lists(st.sampled_from(STEPS), max_size=3), alike=st.booleans(), length=st.sampled_from(LENGTHS),
        rights=st.sampled_from(RIGHTS), logged=st.booleans(),
    )  # fmt: skip
    def map(
        self, up: list[int], down: list[int], physical: list[int], alike: bool, length: int,
        rights: tuple[bool, bool], logged: bool,
    ) -> None:  # fmt: skip
        address = self.place(up, down)
        to = 8 * G1 + (address % (4 * G1) if alike else sum(physical))
        page = (address | to) & -(address | to)
        length = min(length, MOST_PAGES * page)  # so that no run has to look at many thousand leaves
        if self.tears(address, length):
            return
        bits = attributes_for(self.table.format, read=rights[0], write=rights[1])
        log: Any = np.zeros((8, 3), np.uint64) if logged else None
        result = self.table.map_range(address, to, length, attributes=bits, log=log)
        assert result.status == self.model.map(address, to, length, *rights)

    def tears(self, address: int, length: int) -> bool:
        """Whether 6.12's AMD driver would overwrite some entries of a leaf that has several, and leave the others."""
        if self.model.generic or self.model.unit == "vtd":
            return False
        return any(
            leaf.size != size_of(leaf.level) and leaf.start < address + length and address < leaf.start + leaf.size
            for leaf in set(self.model.slots.values())
        )

    @rule(
        up=st.lists(st.sampled_from(STEPS), max_size=3), down=st.lists(st.sampled_from(STEPS), max_size=2),
        length=st.sampled_from([*LENGTHS, 8 * G1]),
    )  # fmt: skip
    def unmap(self, up: list[int], down: list[int], length: int) -> None:
        self.check_unmap(self.place(up, down), length)

    @rule(data=st.data(), inside=st.sampled_from([0, 0, 0, PAGE, M2]), length=st.sampled_from(LENGTHS))
    def unmap_some_leaf(self, data: st.DataObject, inside: int, length: int) -> None:
        leaves = sorted(set(self.model.slots.values()))
        if leaves:
            leaf = data.draw(st.sampled_from(leaves[:4] + leaves[-4:]))
            self.check_unmap(leaf.start + inside % leaf.size, data.draw(st.sampled_from([length, leaf.size])))

    def check_unmap(self, address: int, length: int) -> None:
        if address + length > self.model.limit:
            assert self.table.unmap(address, length).status == -34
            return
        expected = self.model.unmap(address, length)
        result = self.table.unmap(address, length)
        assert (result.status, result.detail) == ((-22, 0) if expected is None else (0, expected))

    @rule(offsets=st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, M2)), min_size=1, max_size=8))
    def translate(self, offsets: list[tuple[int, int]]) -> None:
        addresses = [(self.middle + step + inside) % self.model.limit for step, inside in offsets]
        for kind in (Kind.READ, Kind.WRITE):
            found = self.table.translate(addresses, kind)
            for i, address in enumerate(addresses):
                leaf = self.model.leaf_at(address)
                status = WalkStatus.NOT_PRESENT
                if leaf:
                    read = leaf.read or (self.model.unit, self.model.kernel) == ("vtd", "6.12")
                    allowed = leaf.write if kind == Kind.WRITE else read
                    status = WalkStatus.OK if allowed else WalkStatus.PERMISSION
                expected = leaf.physical + address - leaf.start if leaf and status == WalkStatus.OK else 0
                assert (found.status[i], found.physical[i]) == (status, expected)
                assert found.level[i] == (leaf.level if leaf else self.model.level_at(address))

    @invariant()
    def is_the_model(self) -> None:
        if not hasattr(self, "model"):
            return
        tables, leaves = read_words(self.table)
        assert self.table.format.levels == self.model.levels
        assert leaves == {slot: self.model.entry(slot[0], leaf) for slot, leaf in self.model.slots.items()}
        bits = {key: entry & ~ADDRESS for key, entry in tables.items()}
        assert bits == {key: self.model.table_bits(key[0]) for key in self.model.tables}
        owner = np.zeros(self.machine.arrays.ram.size // 512, np.uint8)
        assert self.table.recount(owner) == []

    def teardown(self) -> None:
        if hasattr(self, "machine"):
            assert self.machine.check() == 0
            self.table.destroy()


TestDomains = Domains.TestCase
TestDomains.settings = settings(max_examples=40, stateful_step_count=25)


# --------------------------------------------------------------------------- many mappings, every format

MAPPINGS = 100_000
FORMATS: list[tuple[str, dict[str, Any]]] = [
    ("vtd-s2", {"levels": levels, "kernel": kernel}) for levels, kernel in ((3, "7.3"), (4, "6.12"), (5, "6.18"))
]
FORMATS += [("vtd-s2", {"superpages": 0}), ("amd-v1", {}), ("amd-v1", {"kernel": "6.12"}), ("amd-v1", {"levels": 6})]


def read_physical(table: PageTable, addresses: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], Any]:
    """Physical addresses and sizes of the pages that addresses are mapped by, each walked in the words; 0 for none."""
    u = np.uint64
    ram, levels, vtd = table.machine.arrays.ram, table.format.levels, table.format.name.startswith("vtd")
    tables = np.full(addresses.size, table.root, u)
    physical, sizes = np.zeros(addresses.size, u), np.zeros(addresses.size, u)
    rest = np.arange(addresses.size)
    for level in range(levels, 0, -1):
        index = addresses[rest] >> u(12 + 9 * (level - 1)) & u(511)
        entries = ram[(tables[rest] // u(8) + index).astype(np.int64)]
        present = entries & u(3 if vtd else 1) != 0
        rest, entries = rest[present], entries[present]
        field = entries >> u(9) & u(7)
        leaf = np.full(rest.size, level == 1) | (entries & u(0x80) != 0 if vtd else (field == 0) | (field == 7))
        size = np.full(rest.size, size_of(level), u)
        if not vtd:
            for bits in range(13, 52):
                # Ones from bit 12 on below the half of the size, and a zero there.
                half = 1 << bits - 1
                coded = entries & u(half | (half - 1) & ADDRESS) == u((half - 1) & ADDRESS)
                size[(field == 7) & coded] = 1 << bits
        at = rest[leaf]
        sizes[at] = size[leaf]
        inside = size[leaf] - u(1)
        physical[at] = entries[leaf] & u(ADDRESS) & ~inside | addresses[at] & inside
        tables[rest[~leaf]] = entries[~leaf] & u(ADDRESS)
        rest = rest[~leaf]
    return physical, sizes


def test_many_mappings_translate_alike_in_every_format() -> None:
    rng = np.random.default_rng(7)
    pages = np.where(rng.random(MAPPINGS) < 0.9, rng.integers(1, 9, MAPPINGS), 1 << rng.integers(3, 11, MAPPINGS))
    gaps = rng.integers(0, 3, MAPPINGS)
    align = np.minimum(1 << rng.integers(0, 10, MAPPINGS), 512)
    starts, physical, at, to = [], [], 1, 1
    for count, gap, unit in zip(pages.tolist(), gaps.tolist(), align.tolist(), strict=True):
        at, to = -(-(at + gap) // unit) * unit, -(-to // unit) * unit
        starts.append(at * PAGE)
        physical.append(to * PAGE)
        at, to = at + count, to + count
    addresses = np.array(starts, np.uint64)
    frames = np.array(physical, np.uint64)
    lengths = pages.astype(np.uint64) * np.uint64(PAGE)
    probes = addresses + rng.integers(0, 1 << 62, MAPPINGS).astype(np.uint64) % lengths
    expected = frames + probes - addresses
    around = np.concatenate(
        [probes, addresses + lengths, rng.integers(0, int(at) * PAGE * 2, 20_000).astype(np.uint64)]
    )
    seen = []
    for name, parameters in FORMATS:
        table = Machine(Config()).create_page_table(name, **parameters)
        for length in np.unique(lengths).tolist():
            these = lengths == length
            assert not table.map_range_many(addresses[these], frames[these], length).status.any()
        found = table.translate(around, Kind.READ)
        read, sizes = read_physical(table, around)
        assert np.array_equal(found.physical[:MAPPINGS], expected), name
        assert np.array_equal(found.physical, read), name
        assert np.array_equal(found.status == WalkStatus.OK, sizes != 0), name
        levels = np.array([0, *(size_of(level) for level in range(1, 6))], np.uint64)
        assert np.array_equal(levels[found.level[sizes != 0]] <= sizes[sizes != 0], np.ones((sizes != 0).sum(), bool))
        seen.append(set(sizes.tolist()))
        plain = table.translate(around)
        assert np.array_equal(plain.physical, found.physical)
    assert [len(sizes) for sizes in seen[:4]] == [3, 3, 3, 2]  # none, 4K and 2M; without superpages 4K alone
    assert all(len(sizes) > 8 for sizes in seen[4:])
