"""The numbers of processors, as their manuals print them, and what is said of those that no manual has."""

from __future__ import annotations

from typing import Any

import pytest

from pgemu.guest import PROCESSORS, Cache, Processor, TlbCache

pytestmark = pytest.mark.same_with_checks

# (level, whose, sizes, entries, ways)
SKYLAKE = {
    (1, "data", "4K", 64, 4), (1, "data", "2M", 32, 4), (1, "data", "1G", 4, 4), (1, "fetch", "4K", 128, 8),
    (1, "fetch", "2M", 8, 8), (2, "data fetch", "4K 2M", 1536, 12), (2, "data fetch", "1G", 16, 4),
}  # fmt: skip
ZEN = {
    (1, "data", "4K 2M 1G", 64, 64), (1, "fetch", "4K 2M 1G", 64, 64), (2, "data", "4K 2M", 1536, 12),
    (2, "fetch", "4K 2M", 512, 8),
}  # fmt: skip
ZEN3 = ZEN - {(2, "data", "4K 2M", 1536, 12)} | {(2, "data", "4K 2M", 2048, 16)}
PUBLISHED = {"skylake-sp": SKYLAKE, "zen": ZEN, "zen3": ZEN3}


def table(processor: Processor) -> set[Any]:
    return {
        (level, " ".join(cache.serves), " ".join(cache.sizes), cache.entries, cache.ways)
        for level, caches in ((1, processor.first), (2, processor.second))
        for cache in caches
    }


def test_tlbs_have_the_published_sizes() -> None:
    assert {name: table(processor) for name, processor in PROCESSORS.items()} == PUBLISHED


@pytest.mark.parametrize("name", PROCESSORS)
def test_what_no_manual_states_is_said_to_be_assumed(name: str) -> None:
    processor = PROCESSORS[name]
    assumed = " ".join(processor.assumed)
    for cache in (processor.pde, processor.pdpte, processor.nested):
        assert str(cache.entries) in assumed
    assert "least recently used" in assumed
    assert all(any(word in source for word in ("Manual", "Guide", "CPUID", "SDM")) for source in processor.sources)


def test_without_caches_only_tlbs_are_left() -> None:
    bare = PROCESSORS["zen3"].without_caches()
    assert table(bare) == ZEN3
    assert {bare.pml4e, bare.pdpte, bare.pde, bare.stage2_pde, bare.nested} == {Cache()}


@pytest.mark.parametrize("wrong", [{"sizes": ("8K",)}, {"sizes": ()}, {"serves": ("store",)}, {"serves": "data"}])
def test_sizes_and_kinds_are_those_there_are(wrong: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match="expected some of"):
        TlbCache(**{"entries": 4, "ways": 4, "sizes": ("4K",), "serves": ("data",), **wrong})
