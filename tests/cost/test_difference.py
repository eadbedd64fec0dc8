"""Estimates and differences from counts: what kernels add up, and the sign of what two machines differ in."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, strategies as st

from pgemu import Config, Machine, cost
from pgemu.cost.difference import Counted, Estimate, bands, counts, difference, estimate
from pgemu.cost.prices import BASES
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Event
from pgemu_kernels.words.operations import Operation

Ints = npt.NDArray[np.int64]


class Made(NamedTuple):
    """Counts that no machine made."""

    events: Ints
    charges: Ints


def made(*charges: tuple[Operation, Event, int, int]) -> Made:
    """Units and charges of events, each of an operation."""
    found = Made(*(np.zeros((W.OPERATIONS, W.EVENTS), np.int64) for _ in range(2)))
    for op, event, units, times in charges:
        found.events[op, event] += units
        found.charges[op, event] += times
    return found


CONVERT, FAULT = Operation.CONVERT, Operation.GUEST_FAULT
LAB = """\
name = "lab"
machine = "a machine"
measured = 2026-11-22
host_cpus = 4

[prices.syscall]
fixed = [10, 20]
source = "s"
basis = "measured"

[prices.spte_cleared]
fixed = [100, 300]
each = [1, 2]
source = "s"
basis = "published"

[prices.tlb_flush_vm]
per_cpu = [5, 7]
source = "s"
"""


@pytest.fixture
def lab(tmp_path: Path) -> str:
    (tmp_path / "lab.toml").write_text(LAB)
    return str(tmp_path / "lab.toml")


def test_an_event_is_priced_by_charge_and_by_unit(lab: str) -> None:
    first = made((CONVERT, Event.SPTE_CLEARED, 1000, 3), (CONVERT, Event.SYSCALL, 2, 2), (FAULT, Event.SYSCALL, 1, 1))
    whole = estimate(first, lab, vcpus=8)
    assert whole.total == (3 * 100 + 1000 * 1 + 3 * 10, 3 * 300 + 1000 * 2 + 3 * 20)
    assert [(part.event, part.units, part.charges, part.band) for part in whole.events] == [
        (Event.SPTE_CLEARED, 1000, 3, (1300, 2900)),
        (Event.SYSCALL, 3, 3, (30, 60)),
    ]
    assert whole.by_basis == {"measured": (30, 60), "published": (1300, 2900), "assumption": (0, 0)}
    assert whole.shares == {"measured": 45 / 2145, "published": 2100 / 2145, "assumption": 0}
    assert estimate(first, lab, op=FAULT).total == (10, 20)
    assert estimate(first, lab, op=Operation.ZAP) == Estimate((0, 0), ())
    assert sum(estimate(first, lab, op=Operation.ZAP).shares.values()) == 0


def test_what_both_do_alike_leaves_nothing_of_its_uncertainty(lab: str) -> None:
    first = made((CONVERT, Event.SPTE_CLEARED, 10**6, 10**6), (CONVERT, Event.TLB_FLUSH_VM, 1, 1))
    second = made((CONVERT, Event.SPTE_CLEARED, 10**6, 10**6), (CONVERT, Event.TLB_FLUSH_VM, 3, 3))
    found = difference(first, second, lab, vcpus=8)
    assert found.first.total[1] > found.second.total[0]  # the totals overlap
    assert found.total == (2 * 8 * 5, 2 * 8 * 7)
    assert found.cheaper == "first"
    assert [part.event for part in found.events] == [Event.TLB_FLUSH_VM]
    assert found.shares == {"measured": 0, "published": 0, "assumption": 1}
    back = difference(second, first, lab, vcpus=8)
    assert back.total == (-2 * 8 * 7, -2 * 8 * 5)
    assert back.cheaper == "second"


def test_fewer_charges_of_more_units_are_two_unknowns(lab: str) -> None:
    first = made((CONVERT, Event.SPTE_CLEARED, 500, 4))
    second = made((CONVERT, Event.SPTE_CLEARED, 900, 1))
    found = difference(first, second, lab)
    assert found.total == (-3 * 300 + 400 * 1, -3 * 100 + 400 * 2)
    assert found.cheaper is None
    assert difference(first, first, lab).cheaper is None
    assert difference(first, first, lab).total == (0, 0)


ZEROED = (Event.PAGE_ZEROED, Event.FOLIO_ZEROED_PAGES)


def zeroing(pages: int, by_folio: int) -> Made:
    """Pages zeroed one by one, and in folios of 512."""
    return made((FAULT, ZEROED[0], pages, pages), (FAULT, ZEROED[1], by_folio, by_folio // 512))


def test_the_same_work_at_one_price_is_one_unknown() -> None:
    """600 pages one by one, or 512 of a folio: it is 88 pages more, however uncertain what a page takes is."""
    low, high = cost.profile("published")[Event.PAGE_ZEROED].each
    found = difference(zeroing(0, 512), zeroing(600, 0))
    assert found.total == pytest.approx((88 * low, 88 * high))
    assert found.cheaper == "first"
    assert [(part.event, part.units) for part in found.events] == [(Event.PAGE_ZEROED, 88)]
    assert (found.first.total[1], found.second.total[0]) == pytest.approx((512 * high, 600 * low))
    assert difference(zeroing(512, 0), zeroing(0, 512)).total == (0, 0)
    by_folio = difference(zeroing(0, 0), zeroing(1, 1024)).events
    assert [(part.event, part.units) for part in by_folio] == [(Event.FOLIO_ZEROED_PAGES, 1025)]


def test_prices_that_a_profile_tells_apart_are_two_unknowns(tmp_path: Path) -> None:
    """A machine that clears whole folios faster, without going through the cache."""
    (tmp_path / "apart.toml").write_text(
        LAB + '\n[prices.folio_zeroed_pages]\neach = [100, 200]\nsource = "s"\nbasis = "measured"\n'
    )
    low, high = cost.profile("published")[Event.PAGE_ZEROED].each
    found = difference(zeroing(0, 512), zeroing(600, 0), str(tmp_path / "apart.toml"))
    assert found.total == pytest.approx((600 * low - 512 * 200, 600 * high - 512 * 100), rel=1e-5)


@given(*(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)) for _ in range(2)))
def test_zeroing_is_decided_by_who_zeroes_more(a: tuple[int, int], b: tuple[int, int]) -> None:
    found = difference(zeroing(*a), zeroing(*b))
    more = sum(b) - sum(a)
    assert found.cheaper == (None if more == 0 else "first" if more > 0 else "second")
    back = difference(zeroing(*b), zeroing(*a)).total
    assert back == pytest.approx((-found.total[1], -found.total[0]))


EVENTS = (Event.SYSCALL, Event.SPTE_CLEARED, Event.TLB_FLUSH_VM)
NUMBERS = st.lists(st.integers(0, 1000), min_size=6, max_size=6)


@given(NUMBERS, NUMBERS)
def test_the_band_is_what_some_prices_reach_and_none_exceed(a: list[int], b: list[int]) -> None:
    first, second = (
        made(*((CONVERT, event, n[2 * i], n[2 * i + 1]) for i, event in enumerate(EVENTS))) for n in (a, b)
    )
    table = np.zeros((W.EVENTS, W.PRICE_WORDS), np.int64)
    table[list(EVENTS)] = [[1000, 5000, 0, 0], [0, 3000, 7000, 9000], [2000, 2000, 1000, 8000]]
    (units, charges), (more_units, more_charges) = counts(first), counts(second)
    found = bands(more_units - units, more_charges - charges, table).sum(axis=0)
    reached = [
        sum(
            int(table[event, fixed]) * (more_charges - charges)[event]
            + int(table[event, each]) * (more_units - units)[event]
            for event, (fixed, each) in zip(EVENTS, chosen, strict=True)
        )
        / 1000
        for chosen in product(product((0, 1), (2, 3)), repeat=len(EVENTS))
    ]
    assert (min(reached), max(reached)) == tuple(found)


def test_many_profiles_at_once() -> None:
    tables = np.stack([cost.price_table(name, 4, 16) for name in cost.PROFILES])
    first = made((CONVERT, Event.VMEMMAP_PAGE_RESTORED, 4095, 1), (CONVERT, Event.TLB_FLUSH_KERNEL, 2, 2))
    found = bands(*counts(first), tables).sum(axis=1)
    assert found.shape == (len(cost.PROFILES), 2)
    for row, name in zip(found, cost.PROFILES, strict=True):
        assert tuple(row) == estimate(first, name, 4, 16).total


# --------------------------------------------------------------------------- counts of machines


def operated(profile: str) -> Machine:
    """A machine that has done a little of everything that is charged in batches."""
    machine = Machine(
        Config("restructure", pool=4 * W.PAGE_2M, page_size=W.PAGE_2M, profile=profile, vcpus=3, host_cpus=5)
    )
    gmem, vm = machine.create_guest_memfd(4 * W.PAGE_2M), machine.create_vm(protected=True)
    vm.bind(gmem, gpa=0)
    host = machine.create_process()
    address = 1 << 40
    host.mmap(gmem, address)
    vm.touch_many(np.arange(0, 4 * W.PAGE_2M, W.PAGE_4K, dtype=np.uint64))
    for shared in (True, False, True):
        assert gmem.convert(W.PAGE_2M, W.PAGE_2M + W.PAGE_4K, shared=shared).status == 0
        if shared:
            host.touch_many(np.arange(address + W.PAGE_2M, address + 2 * W.PAGE_2M, W.PAGE_4K, dtype=np.uint64))
        vm.touch_many(np.arange(0, 4 * W.PAGE_2M, W.PAGE_4K, dtype=np.uint64))
    host.madvise_dontneed(address, 4 * W.PAGE_2M)
    gmem.punch_hole(0, W.PAGE_2M)
    gmem.close()
    return machine


@pytest.mark.parametrize("name", [*cost.PROFILES, "lab"])
def test_counts_priced_later_are_what_kernels_added_up(name: str, lab: str) -> None:
    """Also where a profile has a fixed part for what is charged by the thousand, and for profiles of another run."""
    profile = lab if name == "lab" else name
    machine = operated(profile)
    other = operated("published").statistics
    kinds = [op for op in Operation if machine.statistics.count(op)]
    assert {Operation.CONVERT, Operation.GUEST_FAULT, Operation.HOST_FAULT, Operation.PUNCH_HOLE} <= {*kinds}
    assert machine.statistics.charges.sum() < machine.statistics.events.sum()
    for op in kinds:
        expected = machine.statistics.cost(op)
        assert expected[1] > 0
        for statistics in (machine.statistics, other):
            assert estimate(statistics, profile, 3, 5, op).total == pytest.approx(expected, abs=1e-6)


def test_shares_are_parts_of_a_whole() -> None:
    statistics: Counted = operated("published").statistics
    whole = estimate(statistics, vcpus=3, host_cpus=5)
    assert sum(whole.shares.values()) == pytest.approx(1)
    assert all(whole.shares[basis] > 0 for basis in BASES)
    for end in (0, 1):
        assert sum(part[end] for part in whole.by_basis.values()) == pytest.approx(whole.total[end])
    assert [part.size for part in whole.events] == sorted((part.size for part in whole.events), reverse=True)
