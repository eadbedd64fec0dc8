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
