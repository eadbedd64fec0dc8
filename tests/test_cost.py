"""Cost profiles: complete, ordered, and in line with the figures they are built from."""

from __future__ import annotations

import pytest

from pgemu import cost
from pgemu_kernels import layout as L
from pgemu_kernels.layout import Event

PUBLISHED = cost.profile("published")


def band(*charges: tuple[Event, int], vcpus: int = 1, host_cpus: int = 1) -> tuple[float, float]:
    """Nanoseconds of charges, from the table that kernels read."""
    table = cost.price_table("published", vcpus, host_cpus)
    low = sum(int(table[event, L.PRICE_FIXED_LOW]) + int(table[event, L.PRICE_EACH_LOW]) * n for event, n in charges)
    high = sum(int(table[event, L.PRICE_FIXED_HIGH]) + int(table[event, L.PRICE_EACH_HIGH]) * n for event, n in charges)
    return low / 1000, high / 1000


def test_every_event_has_a_price_with_a_source() -> None:
    assert set(PUBLISHED) == set(Event)
    assert all(price.source for price in PUBLISHED.values())


@pytest.mark.parametrize("event", Event)
def test_bands_are_ordered(event: Event) -> None:
    price = PUBLISHED[event]
    for low, high in (price.fixed, price.each, price.per_cpu):
        assert 0 <= low <= high


@pytest.mark.parametrize("event", Event)
def test_a_free_event_says_who_carries_its_price(event: Event) -> None:
    price = PUBLISHED[event]
    assert (price.total(1, 1) == (0, 0)) == price.source.startswith("no price of its own: ")


@pytest.mark.parametrize("host_cpus", [1, 256])
def test_one_1g_split_lies_in_the_published_band(host_cpus: int) -> None:
    low, high = band(
        (Event.VMEMMAP_PAGE_RESTORED, 4095),
        (Event.TLB_FLUSH_KERNEL, 1),
        (Event.STRUCT_PAGE_WRITTEN, 262143),
        (Event.PAGE_CACHE_STORED, 262144),
        host_cpus=host_cpus,
    )
    assert 5e6 <= low < high <= 30e6


def test_a_refault_takes_what_was_measured() -> None:
    low, high = band((Event.HOST_FAULT, 1), (Event.LEAF_WRITTEN, 1), (Event.RMAP_CHANGED, 1))
    assert low == pytest.approx(1e9 / 730e3, rel=1e-4)
    assert high == pytest.approx(1e9 / 690e3, rel=1e-4)


def test_a_zapped_page_takes_what_was_measured() -> None:
    low, high = band((Event.LEAF_CLEARED, 1000), (Event.RMAP_CHANGED, 1000))
    assert low / 1000 == pytest.approx(1e9 / 7.1e6, rel=1e-3)
    assert high / 1000 == pytest.approx(1e9 / 6.0e6, rel=1e-3)


def test_zeroing_1g_takes_a_tenth_of_a_second() -> None:
    low, high = band((Event.FOLIO_ZEROED_PAGES, 262144))
    assert 99e6 < low < 101e6
    assert 119e6 < high < 120e6


@pytest.mark.parametrize(
    ("event", "vcpus", "host_cpus", "cpus"),
    [
        (Event.TLB_FLUSH_KERNEL, 4, 64, 64),
        (Event.TLB_FLUSH_VM, 4, 64, 4),
        (Event.TLB_FLUSH_MM, 4, 64, 4),
        (Event.TLB_FLUSH_MM, 64, 4, 4),
    ],
)
def test_a_flush_is_priced_by_the_cpus_that_answer(event: Event, vcpus: int, host_cpus: int, cpus: int) -> None:
    one = PUBLISHED[event].per_cpu
    low, high = band((event, 1), vcpus=vcpus, host_cpus=host_cpus)
    assert low == pytest.approx(cpus * one[0], abs=0.001)
    assert high == pytest.approx(cpus * one[1], abs=0.001)


def test_the_table_is_in_whole_picoseconds() -> None:
    table = cost.price_table("published", 1, 1)
    assert table.shape == (L.EVENTS, L.PRICE_WORDS)
    assert str(table.dtype) == "int64"
    words = (L.PRICE_FIXED_LOW, L.PRICE_FIXED_HIGH, L.PRICE_EACH_LOW, L.PRICE_EACH_HIGH)
    assert [int(table[Event.LEAF_WRITTEN, word]) for word in words] == [0, 0, 20_000, 40_000]


def test_an_unknown_profile_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'mine': expected one of published"):
        cost.price_table("mine", 1, 1)
