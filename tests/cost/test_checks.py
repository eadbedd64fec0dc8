"""Sums of prices beside what is known of whole operations, and the counts that they are made of."""

from __future__ import annotations

import pytest

from pgemu import Config, Machine, cost
from pgemu.cost.checks import NODE_BYTES, NODES_1G, PARTS, cross_checks
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Event, Gauge

SPLIT, MERGED = "1G folio split to 4K", "4K folios merged to 1G"


@pytest.mark.parametrize("host_cpus", [1, 256])
@pytest.mark.parametrize("profile", cost.PROFILES)
def test_what_is_known_agrees(profile: str, host_cpus: int) -> None:
    checks = {check.what: check for check in cross_checks(profile, host_cpus=host_cpus)}
    assert [what for what, check in checks.items() if check.agrees is None] == [
        "... its vmemmap",
        "... its struct pages",
        "... its page cache",
        MERGED,
    ]
    assert all(check.agrees in (True, None) for check in checks.values())
    for end in (0, 1):
        parts = sum(check.band[end] for what, check in checks.items() if what.startswith("..."))
        assert parts == pytest.approx(checks[SPLIT].band[end])


def test_a_price_that_is_ten_times_too_high_disagrees() -> None:
    high = cost.Price(Event.PAGE_CACHE_STORED, "s", each=(500, 600), basis="measured")
    published = cost.profile("published")
    profile = cost.Profile.of("n", "m", published.measured, 1, [high], published)
    assert next(check for check in cross_checks(profile) if check.what == SPLIT).verdict == "DISAGREES"


def test_split_and_merge_charge_what_is_added_up() -> None:
    machine = Machine(Config("restructure", pool=W.PAGE_1G, page_size=W.PAGE_1G, split_form="jan2026", kernel="7.3"))
    gmem, vm = machine.create_guest_memfd(W.PAGE_1G), machine.create_vm(protected=True)
    vm.bind(gmem, gpa=0)
    vm.touch(0)
    for what, shared in ((SPLIT, True), (MERGED, False)):
        before = machine.statistics
        assert gmem.convert(0, W.PAGE_4K, shared=shared).status == 0
        after = machine.statistics
        counted = {event: after.event(event) - before.event(event) for event in PARTS[what]}
        assert counted == dict(PARTS[what])
        charged = (after.charges - before.charges).sum(axis=0)
        assert {int(charged[event]) for event in PARTS[what]} == {1}


def test_the_page_cache_of_a_split_1g_folio_takes_the_published_bytes() -> None:
    """Ackerley Tng, 2025-12-04: 4,161 xa_nodes of 576 bytes, 2,396,736 bytes."""
    assert NODES_1G * NODE_BYTES == 2_396_736
    for form in ("rfc2", "jan2026"):
        machine = Machine(Config("restructure", pool=W.PAGE_1G, page_size=W.PAGE_1G, split_form=form))
        gmem, vm = machine.create_guest_memfd(W.PAGE_1G), machine.create_vm(protected=True)
        vm.bind(gmem, gpa=0)
        vm.touch(0)
        assert gmem.convert(0, W.PAGE_4K, shared=True).status == 0
        assert machine.statistics.gauge(Gauge.XARRAY_NODES) * NODE_BYTES == 2_396_736
        assert machine.statistics.event(Event.XARRAY_NODE_ALLOCATED) == 4161
