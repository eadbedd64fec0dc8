"""References and pins of folios, against counts kept in Python, and the readers' own rules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from numba import njit

from pgemu.images.folio import Folio
from pgemu.objects.machine import Config, Machine
from pgemu_kernels import words as W
from pgemu_kernels.engine.compile import OPTIONS
from pgemu_kernels.folios import counts as kernels

U = np.uint64
M2 = W.PAGE_2M
PAGE = W.PAGE_4K
VA = 0x7F00_0000_0000
HEAD = 0  # index of the struct page in the array of the tests
UPTODATE, HEAD_FLAG, PRIVATE, SWAPCACHE = 1 << 3, 1 << 6, 1 << 14, 1 << 10 | 1 << 17
HUGETLB, SLAB, UNMAPPED = 0xF400_0000, 0xF500_0000, 0xFFFF_FFFF
NAMES = (
    "try_get", "put", "try_grab", "try_pin", "unpin", "maybe_dma_pinned", "freeze", "unfreeze", "expected_count",
    "map_count", "folio_order",
)  # fmt: skip


@njit(**OPTIONS)  # type: ignore[untyped-decorator]
def run(op: int, ram: Any, page: Any, n: Any) -> int:
    """Call the kernel of NAMES[op]; True is 1."""
    if op == 0:
        return np.int64(kernels.try_get(ram, page, n))
    if op == 1:
        return np.int64(kernels.put_refs(ram, page, n))
    if op == 2:
        return np.int64(kernels.try_grab(ram, page, n))
    if op == 3:
        return np.int64(kernels.try_pin(ram, page, n))
    if op == 4:
        return np.int64(kernels.unpin(ram, page, n))
    if op == 5:
        return np.int64(kernels.maybe_dma_pinned(ram, page))
    if op == 6:
        return np.int64(kernels.freeze(ram, page, n))
    if op == 7:
        return np.int64(kernels.unfreeze(ram, page, n))
    if op == 8:
        return np.int64(kernels.expected_count(ram, page))
    if op == 9:
        return np.int64(kernels.map_count(ram, page))
    return np.int64(kernels.folio_order(ram, page))


def call(name: str, ram: Any, n: int = 0, page: int = HEAD) -> int:
    return int(run(NAMES.index(name), ram, U(page), U(n)))


def small(refcount: int = 1, mapcount: int = 0, flags: int = 0, mapping: int = 0) -> Any:
    """Struct pages of a 4K folio and of the page behind it, which nothing may touch."""
    ram = np.full(16, 0xABCD_EF01_2345_6789, U)
    ram[:8] = [flags, 0, 0, mapping, 7, 0, (refcount & UNMAPPED) << 32 | (mapcount - 1 & UNMAPPED), 0]
    return ram


def large(
    order: int, refcount: int = 1, mapcount: int = 0, word: int = UNMAPPED, mapping: int = 0, flags: int = 0
) -> Any:
    """Struct pages 0 and 1 of a large folio; the low half of its own count word is `word`."""
    ram = np.zeros(16, U)
    ram[:8] = [flags | HEAD_FLAG, 0, 0, mapping, 0, 0, (refcount & UNMAPPED) << 32 | word, 0]
    ram[8:] = [1 << 62 | order, 1, mapcount - 1 & UNMAPPED, UNMAPPED, 0, 0, UNMAPPED, 1 << order]
    return ram


def refcount(ram: Any) -> int:
    """Signed."""
    return int(np.uint32(int(ram[6]) >> 32).astype(np.int32))


# --------------------------------------------------------------------------- one rule each


def test_nothing_is_gained_from_a_frozen_folio() -> None:
    for ram in (small(0), large(9, 0, word=HUGETLB)):
        before = ram.copy()
        for name in ("try_get", "try_grab", "try_pin"):
            assert call(name, ram, 3) == 0
        assert (ram == before).all()


@pytest.mark.parametrize("count", [-1, -(1 << 31), -1024])
def test_a_count_that_overflowed_is_refused_by_gup_only(count: int) -> None:
    """try_grab_folio() wants more than zero; folio_try_get() only wants it not to be zero."""
    for ram in (small(count), large(18, count)):
        before = ram.copy()
        assert call("try_grab", ram, 1) == 0
        assert call("try_pin", ram, 1) == 0
        assert (ram == before).all()
        assert call("try_get", ram, 5) == 1
        assert refcount(ram) == count + 5


def test_the_last_reference_that_gup_takes_overflows() -> None:
    ram = small((1 << 31) - 1)
    assert call("try_grab", ram, 1) == 1
    assert refcount(ram) == -(1 << 31)
    assert call("try_grab", ram, 1) == 0
    assert call("maybe_dma_pinned", ram) == 1  # compared unsigned


def test_a_pin_of_a_small_folio_is_1024_references() -> None:
    ram = small(2)
    neighbour = ram[8:].copy()
    assert call("try_pin", ram, 3) == 1
    assert refcount(ram) == 2 + 3 * 1024
    assert call("maybe_dma_pinned", ram) == 1
    assert call("unpin", ram, 3) == 0
    assert refcount(ram) == 2
    assert call("maybe_dma_pinned", ram) == 0
    assert (ram[8:] == neighbour).all()


def test_many_references_of_a_small_folio_look_like_a_pin() -> None:
    ram = small(1)
    assert call("try_get", ram, 1022) == 1
    assert call("maybe_dma_pinned", ram) == 0
    assert call("try_get", ram, 1) == 1
    assert call("maybe_dma_pinned", ram) == 1  # false: nobody pinned it


def test_a_pin_of_a_large_folio_is_counted_apart() -> None:
    ram = large(9, 513)
    assert call("try_get", ram, 5000) == 1
    assert call("maybe_dma_pinned", ram) == 0
    assert call("try_pin", ram, 2) == 1
    assert (refcount(ram), int(ram[11]) >> 32, int(ram[11]) & UNMAPPED) == (5515, 2, UNMAPPED)
    assert call("maybe_dma_pinned", ram) == 1
    assert call("unpin", ram, 2) == 0
    assert (refcount(ram), int(ram[11])) == (5513, UNMAPPED)
    assert call("maybe_dma_pinned", ram) == 0


def test_the_last_one_to_go_is_told() -> None:
    assert [call("put", small(2), n) for n in (1, 2)] == [0, 1]
    ram = small(1024)
    assert call("unpin", ram, 1) == 1
    ram = large(9, 1)
    ram[11] |= U(1 << 32)
    assert call("unpin", ram, 1) == 1
    assert int(ram[11]) == UNMAPPED


def test_freeze_compares_and_exchanges() -> None:
    ram = large(9, 513, mapcount=1, word=HUGETLB)
    before = ram.copy()
    assert call("freeze", ram, 512) == 0
    assert call("unfreeze", ram, 513) == 0  # not frozen
    assert (ram == before).all()
    assert call("freeze", ram, 513) == 1
    assert (refcount(ram), int(ram[6]) & UNMAPPED) == (0, HUGETLB)
    assert call("unfreeze", ram, 0) == 0
    assert call("unfreeze", ram, 512) == 1
    assert (refcount(ram), int(ram[6]) & UNMAPPED) == (512, HUGETLB)


@pytest.mark.parametrize(
    ("ram", "expected"),
    [
        (small(), 0),
        (small(mapping=0xFFFF_8880_0000_1000), 1),
        (small(mapping=0xFFFF_8880_0000_1000, mapcount=3, flags=PRIVATE | UPTODATE), 5),
        (small(mapping=0xFFFF_8880_0000_1001, mapcount=3, flags=PRIVATE), 3),
        (small(mapping=0xFFFF_8880_0000_1001, mapcount=1, flags=SWAPCACHE), 2),
        (small(mapping=0xFFFF_8880_0000_1001, mapcount=1, flags=1 << 10), 1),  # not swap-backed: no swap cache
        (large(9, word=HUGETLB, mapping=0xFFFF_8880_0000_1000, mapcount=2), 514),
        (large(18, word=HUGETLB, mapping=0xFFFF_8880_0000_1000), 262144),
        (large(18, word=HUGETLB, mapping=0xFFFF_8880_0000_1001, mapcount=1), 1),
        (large(4, mapping=0xFFFF_8880_0000_1001, mapcount=9, flags=SWAPCACHE), 25),
        (large(3, word=SLAB, mapping=0xFFFF_8880_0000_1000), 0),
    ],
)
def test_expected_count(ram: Any, expected: int) -> None:
    assert call("expected_count", ram) == expected


def test_order_and_mapcount() -> None:
    assert [call("folio_order", ram) for ram in (small(), large(9), large(18))] == [0, 9, 18]
    assert [call("map_count", ram) for ram in (small(mapcount=4), large(9, mapcount=6))] == [4, 6]
    slab = small()
    slab[6] = U(1 << 32 | SLAB)
    assert call("map_count", slab) == 0


# --------------------------------------------------------------------------- any sequence

OPERATIONS = st.tuples(
    st.sampled_from(["try_get", "put", "try_grab", "try_pin", "unpin", "freeze", "unfreeze"]),
    st.one_of(st.integers(1, 4), st.sampled_from([1023, 1024, 1 << 21, (1 << 31) - 1])),
)


def signed(value: int) -> int:
    return (value + (1 << 31)) % (1 << 32) - (1 << 31)


class Counts:
    """A folio's counts as Python integers. Overflow wraps, as atomic_t does."""

    def __init__(self, is_large: bool, references: int) -> None:
        self.is_large = is_large
        self.references = references
        self.pins = 0

    def apply(self, name: str, n: int) -> int:
        result = getattr(self, name)(n)
        self.references, self.pins = signed(self.references), signed(self.pins)
        return int(result)

    def _add(self, n: int) -> bool:
        self.references += n
        return True

    def try_get(self, n: int) -> bool:
        return self.references != 0 and self._add(n)

    def try_grab(self, n: int) -> bool:
        return self.references > 0 and self._add(n)

    def try_pin(self, n: int) -> bool:
        if self.references <= 0:
            return False
        self.pins += n if self.is_large else 0
        return self._add(n if self.is_large else 1024 * n)

    def put(self, n: int) -> bool:
        self._add(-n)
        return signed(self.references) == 0

    def unpin(self, n: int) -> bool:
        self.pins -= n if self.is_large else 0
        return self.put(n if self.is_large else 1024 * n)

    def freeze(self, n: int) -> bool:
        frozen = self.references == signed(n)
        self.references = 0 if frozen else self.references
        return frozen

    def unfreeze(self, n: int) -> bool:
        return self.references == 0 and signed(n) != 0 and self._add(n)

    @property
    def looks_pinned(self) -> bool:
        return self.pins > 0 if self.is_large else self.references % (1 << 32) >= 1024


@given(is_large=st.booleans(), references=st.integers(0, 3), operations=st.lists(OPERATIONS, max_size=12))
@settings(max_examples=300, deadline=None)
def test_any_sequence(is_large: bool, references: int, operations: list[tuple[str, int]]) -> None:
    ram = large(9, references, word=HUGETLB) if is_large else small(references)
    before = ram.copy()
    counts = Counts(is_large, references)
    for name, n in operations:
        assert call(name, ram, n) == counts.apply(name, n)
        assert (refcount(ram), call("maybe_dma_pinned", ram)) == (counts.references, counts.looks_pinned)
    before[6] = U((counts.references & UNMAPPED) << 32 | int(before[6]) & UNMAPPED)
    if is_large:
        before[11] = U((counts.pins & UNMAPPED) << 32 | int(before[11]) & UNMAPPED)
    assert (ram == before).all()  # nothing else changed


# --------------------------------------------------------------------------- on a machine


def agree(machine: Machine, folio: Folio) -> int:
    """What kernels and readers make of a folio; its expected references."""
    ram, page = machine.arrays.ram, folio.physical() // 8
    assert call("expected_count", ram, page=page) == folio.expected_references
    assert call("map_count", ram, page=page) == folio.mapcount
    assert call("folio_order", ram, page=page) == folio.order
    assert call("maybe_dma_pinned", ram, page=page) == folio.maybe_dma_pinned
    return folio.expected_references


@pytest.mark.parametrize("kernel", ["6.12", "6.18", "7.3"])
def test_kernels_and_readers_agree(kernel: str) -> None:
    machine = Machine(Config("restructure", pool=3 * M2, page_size=M2, kernel=kernel))
    gmem = machine.create_guest_memfd(2 * M2)
    vm = machine.create_vm(protected=True)
    vm.bind(gmem, 0)
    gmem.convert(0, PAGE, shared=True)
    for offset in (0, M2):
        vm.touch(offset)
    process = machine.create_process()
    process.mmap(gmem, VA)
    process.touch(VA)
    split, whole = gmem.pfn(0) or 0, gmem.pfn(M2) or 0
    assert agree(machine, machine.folio(split)) == 2 == machine.folio(split).refcount
    assert agree(machine, machine.folio(split + 3)) == 1 == machine.folio(split + 3).refcount
    assert agree(machine, machine.folio(whole + 3)) == 512 == machine.folio(whole).refcount
    free = next(pfn for pfn in range(machine.register(W.R_POOL_BASE), whole + 2 * M2, 512) if pfn not in (split, whole))
    assert agree(machine, machine.folio(free)) == 0 == machine.folio(free).refcount
    folio = machine.folio(whole)
    ram, page = machine.arrays.ram, folio.physical() // 8
    assert call("try_pin", ram, 2, page) == 1
    assert (folio.pincount, folio.refcount, agree(machine, folio)) == (2, 514, 512)
    assert call("freeze", ram, 512, page) == 0
    assert call("unpin", ram, 2, page) == 0
    assert call("freeze", ram, 512, page) == 1
    assert folio.refcount == 0
    assert call("unfreeze", ram, 512, page) == 1
    assert machine.check() == 0
