"""HugeTLB pools, HVO and the vmemmap: by random sequences against the model, and case by case.

PGEMU_EXAMPLES sets how many sequences are tried and makes them random; without it they are the same at every run.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from model.hugetlb import STRUCT_PAGES, VMEMMAP, Model, Outcome
from pgemu.machine import Config, Machine, Result
from pgemu_kernels import layout as L
from pgemu_kernels.layout import Event, Gauge

M2, G1 = L.PAGE_2M, L.PAGE_1G
FRAME = 0x000F_FFFF_FFFF_F000
SIZES = {9: M2, 18: G1}
EVENTS = (
    Event.VMEMMAP_PAGE_RESTORED,
    Event.VMEMMAP_PAGE_FREED,
    Event.VMEMMAP_HEAD_COPIED,
    Event.TLB_FLUSH_KERNEL,
    Event.TLB_FLUSH_PAGE,
    Event.RCU_SYNCHRONIZED,
    Event.STRUCT_PAGE_WRITTEN,
    Event.STRUCT_PAGE_BYTES,
    Event.HUGE_FOLIO_ALLOCATED,
    Event.HUGE_FOLIO_FREED,
    Event.VMEMMAP_FAULT,
)


class Pair:
    """A machine and its model; `spare`: frames that are left after boot, None for plenty."""

    def __init__(
        self,
        kernel: str,
        *,
        huge: int = 0,
        gigantic: int = 0,
        buddy: int = 0,
        nodes: int = 1,
        hvo: bool = True,
        configuration: str = "debian",
        spare: int | None = None,
    ) -> None:
        sizes: dict[str, Any] = {"huge": huge, "gigantic": gigantic, "buddy": buddy, "nodes": nodes, "hvo": hvo}
        frames = None
        if spare is not None:
            booted = Model(kernel, 1 << 20, configuration=configuration, **sizes)
            frames = booted.used - booted.boot_pages + spare
        parameters: dict[str, Any] = {"configuration": configuration, "hvo": hvo, "nodes": nodes}
        self.machine = Machine(
            Config(
                pool=huge * M2, page_size=M2, other_pool=gigantic * G1, buddy=buddy * M2, kernel=kernel, frames=frames,
                **parameters,
            )
        )  # fmt: skip
        base = self.machine.register(L.R_POOL_BASE)
        self.model = Model(kernel, base, configuration=configuration, frames=frames, **sizes)
        self.booted = self.machine.statistics.events.sum(axis=0)

    # ------------------------------------------------------------------ operations

    @staticmethod
    def same(got: Result, expected: Outcome) -> Outcome:
        assert tuple(got) == tuple(expected)
        return expected

    def pool(self, order: int) -> Any:
        return self.machine.hugetlb(SIZES[order])

    def resize(self, order: int, count: int, node: int | None = None) -> Outcome:
        return self.same(self.pool(order).resize(count, node), self.model.resize(order, count, node))

    def demote(self, count: int, node: int | None = None) -> Outcome:
        return self.same(self.pool(18).demote(count, node), self.model.demote(count, node))

    def allocate(self, order: int, node: int | None = None) -> Outcome:
        return self.same(self.pool(order).allocate(node), self.model.allocate(order, node))

    def free(self, head: int) -> Outcome:
        return self.same(self.machine.free_folio(head), self.model.free(head))

    def dissolve(self, pfn: int) -> Outcome:
        return self.same(self.machine.dissolve(pfn), self.model.dissolve(pfn))

    def poison(self, pfn: int) -> Outcome:
        return self.same(self.machine.poison(pfn), self.model.poison(pfn))

    def change_vmemmap(self, start: int, end: int, optimize: bool) -> Outcome:
        op = L.Operation.VMEMMAP_OPTIMIZE if optimize else L.Operation.VMEMMAP_RESTORE
        got = self.machine.operate(op, address=start << 12, length=end - start << 12)
        return self.same(got, self.model.change_vmemmap(start, end, optimize))

    def store(self, pfn: int, word: int, value: int) -> int:
        entry = self.walk(pfn // STRUCT_PAGES)[-1][1]
        expected = Outcome(self.model.store(pfn, word, value), entry)
        return self.same(self.machine.store_vmemmap(VMEMMAP + 64 * pfn + 8 * word, value), expected).status

    def optimizing(self, on: bool) -> None:
        self.machine.optimize_vmemmap = self.model.optimizing = on

    def overcommit(self, count: int) -> None:
        self.pool(9).nr_overcommit_hugepages = self.model.pools[9].overcommit = count

    # ------------------------------------------------------------------ comparing

    def walk(self, number: int) -> list[tuple[int, int, int]]:
        """The kernel's entries for a vmemmap page: (level, address, entry)."""
        address = VMEMMAP + number * L.PAGE_4K
        return self.machine.walk(self.machine.register(L.R_KERNEL_ROOT), (address & (1 << 48) - 1) >> 12)

    def entries(self) -> dict[int, int]:
        """The 4K entry of every vmemmap page of the zone, or the 2M leaf's as if it were 512 of them."""
        ram = self.machine.arrays.ram
        found = {}
        nodes = [range(node.base // STRUCT_PAGES, node.end // STRUCT_PAGES) for node in self.model.nodes]
        for numbers in [nodes[n][i : i + 512] for n in range(len(nodes)) for i in range(0, len(nodes[n]), 512)]:
            level, address, entry = self.walk(numbers[0])[-1]
            if level == 1:
                table = ram[address // 8 & ~511 : (address // 8 & ~511) + 512].tolist()
                found |= {n: table[n & 511] for n in numbers}
            else:
                assert level == 2
                found |= {n: entry + ((n & 511) << 12) for n in numbers}
        return found

    def compare_vmemmap(self) -> None:
        """Every entry's bits, which entries share a page, and every word of every struct page."""
        ram = self.machine.arrays.ram
        pages: dict[int, int] = {}
        for number, entry in self.entries().items():
            if number >> 9 in self.model.large:
                expected, bits = self.model.large[number >> 9][number & 511], 0x8000_0000_0000_01E3
            else:
                expected, bits = self.model.entries[number]
            assert entry & ~FRAME == bits, f"vmemmap page {number:#x}"
            frame = (entry & FRAME) >> 12
            if frame in pages:
                assert pages[frame] == id(expected), f"vmemmap page {number:#x} shares another's frame"
                continue
            pages[frame] = id(expected)
            got = ram[frame * 512 : frame * 512 + 512].reshape(STRUCT_PAGES, 8)
            if not np.array_equal(got, expected.words):
                i, word = np.argwhere(got != expected.words)[0]
                pfn = number * STRUCT_PAGES + int(i)
                raise AssertionError(
                    f"struct page {pfn:#x} word {word}: {got[i, word]:#x}, not {expected.words[i, word]:#x}"
                )
        assert len(set(pages.values())) == len(pages), "one page in two frames"

    def compare_pools(self) -> None:
        for order, pool in self.model.pools.items():
            got = self.pool(order)
            counts = (got.nr_hugepages, got.free_hugepages, got.surplus_hugepages, got.resv_hugepages)
            assert counts == (sum(pool.pages), pool.count_free, sum(pool.surplus), 0)
            for n in range(pool.nodes):
                assert got.free_list(n) == pool.free[n]
                assert tuple(got.node(n)) == (pool.pages[n], len(pool.free[n]), pool.surplus[n])

    def compare_counts(self) -> None:
        statistics = self.machine.statistics
        got = statistics.events.sum(axis=0) - self.booted
        assert {e.name: int(got[e]) for e in EVENTS} == {e.name: self.model.events[e] for e in EVENTS}
        assert statistics.gauge(Gauge.FRAMES_USED) == self.model.used
        assert statistics.gauge(Gauge.KERNEL_TABLES) == len(self.model.tables)
        assert statistics.gauge(Gauge.BUDDY_BLOCKS) == len(self.model.blocks)
        small, large = self.model.pools[9], self.model.pools[18]
        vmstat = self.machine.vmstat()
        in_use = len(small.active) * 512 + (len(large.active) << 18)
        assert vmstat["nr_hugetlb"] == in_use
        assert (vmstat["nr_memmap_pages"], vmstat["nr_memmap_boot_pages"]) == (
            self.model.memmap,
            self.model.memmap_boot,
        )
        meminfo = self.machine.meminfo()
        assert meminfo["HugePages_Total"] == sum(small.pages)
        assert meminfo["HugePages_Free"] == small.count_free
        assert meminfo["HugePages_Surp"] == sum(small.surplus)
        assert meminfo["Hugetlb"] == sum(small.pages) * 2048 + sum(large.pages) * 1048576

    def compare(self) -> None:
        self.compare_pools()
        self.compare_counts()
        self.compare_vmemmap()
        assert self.machine.check() == 0, self.machine.broken


# --------------------------------------------------------------------------- sequences

numbers = st.integers(0, 7)
pages = st.integers(0, 511) | st.sampled_from([0, 1, 3, 63, 64, 511])
kernels = st.sampled_from(["6.12", "6.18", "7.3"])
# Frames left after boot: around what heads, tables, shared pages and one or two restores of 7 need.
spares = st.none() | st.integers(0, 24)


class Pools(RuleBasedStateMachine):
    """A pool of 2M pages and memory to grow it from, on one or two nodes."""

    pair: Pair

    @initialize(data=st.data())
    def boot(self, data: st.DataObject) -> None:
        nodes = data.draw(st.integers(1, 2), "nodes")
        self.pair = Pair(
            data.draw(kernels, "kernel"),
            huge=data.draw(st.integers(0, 6), "huge"),
            buddy=data.draw(st.integers(1, 8), "buddy"),
            nodes=nodes,
            hvo=data.draw(st.booleans(), "hvo"),
            configuration="debian" if nodes == 2 else data.draw(st.sampled_from(["debian", "small"]), "configuration"),
            spare=data.draw(spares, "spare"),
        )

    @property
    def model(self) -> Model:
        return self.pair.model

    def block(self, number: int) -> int:
        """First frame of a 2M block."""
        blocks = [block for node in self.model.nodes for block in range(node.base, node.end, 512)]
        return blocks[number % len(blocks)]

    def node(self, number: int) -> int | None:
        """A node or (more often) all."""
        return number if number < len(self.model.nodes) else None

    @rule(count=numbers, node=st.integers(0, 3))
    def resize(self, count: int, node: int) -> None:
        self.pair.resize(9, count, self.node(node))

    @rule(node=st.integers(0, 2))
    def allocate(self, node: int) -> None:
        self.pair.allocate(9, self.node(node))

    @precondition(lambda self: self.model.references)
    @rule(number=numbers)
    def free(self, number: int) -> None:
        self.pair.free(list(self.model.references)[number % len(self.model.references)])

    @rule(number=st.integers(0, 15), page=pages)
    def free_any(self, number: int, page: int) -> None:
        self.pair.free(self.block(number) + page)

    @rule(count=st.integers(0, 3))
    def overcommit(self, count: int) -> None:
        self.pair.overcommit(count)

    @rule(number=st.integers(0, 15), page=pages)
    def dissolve(self, number: int, page: int) -> None:
        self.pair.dissolve(self.block(number) + page)

    @rule(number=st.integers(0, 15), page=pages)
    def poison(self, number: int, page: int) -> None:
        self.pair.poison(self.block(number) + page)

    @rule(number=st.integers(0, 15), count=st.integers(1, 6), optimize=st.booleans())
    def change_vmemmap(self, number: int, count: int, optimize: bool) -> None:
        start = self.block(number)
        end = min(start + 512 * count, self.model.nodes[self.model.node_of(start)].end)
        self.pair.change_vmemmap(start, end, optimize)

    @rule(on=st.booleans())
    def optimizing(self, on: bool) -> None:
        self.pair.optimizing(on)

    @rule(number=st.integers(0, 15), page=st.integers(4, 511), value=st.integers(0, (1 << 64) - 1))
    def store(self, number: int, page: int, value: int) -> None:
        """To memcg_data, which nothing of this reads."""
        self.pair.store(self.block(number) + page, 7, value)

    @invariant()
    def equal(self) -> None:
        if hasattr(self, "pair"):
            self.pair.compare()


class GiganticPools(Pools):
    """The same with one or two 1G pages, which can be demoted, and perhaps memory for one more."""

    @initialize(data=st.data())
    def boot(self, data: st.DataObject) -> None:
        nodes = data.draw(st.integers(1, 2), "nodes")
        gigantic = data.draw(st.integers(0, 2), "gigantic")
        self.pair = Pair(
            data.draw(kernels, "kernel"),
            gigantic=gigantic,
            buddy=512 if gigantic == 0 else data.draw(st.sampled_from([0, 4, 512]), "buddy"),
            nodes=1 if gigantic < 2 else nodes,
            hvo=data.draw(st.booleans(), "hvo"),
            spare=data.draw(st.none() | st.sampled_from([0, 8, 9, 512, 4094, 4095, 5000]), "spare"),
        )

    def block(self, number: int) -> int:
        """1G pages first, then blocks inside them."""
        node = self.model.nodes[number % len(self.model.nodes)]
        return min(node.base + (number // 4 << 18) + number % 4 * 512, node.end - 512)

    @rule(count=st.integers(0, 2), node=st.integers(0, 3))
    def resize_gigantic(self, count: int, node: int) -> None:
        self.pair.resize(18, count, self.node(node))

    @rule(count=st.integers(0, 3), node=st.integers(0, 3))
    def demote(self, count: int, node: int) -> None:
        self.pair.demote(count, self.node(node))

    @rule(node=st.integers(0, 2))
    def allocate_gigantic(self, node: int) -> None:
        self.pair.allocate(18, self.node(node))

    @rule(number=st.integers(0, 7), optimize=st.booleans())
    def change_gigantic(self, number: int, optimize: bool) -> None:
        start = self.block(number)
        self.pair.change_vmemmap(start, min(start + (1 << 18), self.model.nodes[-1].end), optimize)


def configured(examples: int, steps: int) -> settings:
    """Few and always the same, or as many as PGEMU_EXAMPLES says."""
    asked = os.environ.get("PGEMU_EXAMPLES")
    return settings(
        max_examples=int(asked) if asked else examples,
        stateful_step_count=steps,
        derandomize=asked is None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


TestPools = Pools.TestCase
TestPools.settings = configured(100, 20)
TestGiganticPools = GiganticPools.TestCase
TestGiganticPools.settings = configured(12, 8)
