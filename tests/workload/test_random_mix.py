"""Random operations: as many of each as its weight says, and everything held is given back."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pgemu import workload
from pgemu.errors import InputError
from pgemu.trace import Operation, Records
from pgemu.trace.memory_layout import SYNTHETIC_HVA

pytestmark = pytest.mark.same_with_checks

PAGE, M2, MIB = 4096, 2 << 20, 1 << 20
WEIGHTS = {
    "guest_fault": "GUEST_FAULT", "host_fault": "HOST_FAULT", "convert": "CONVERT", "punch_hole": "PUNCH_HOLE",
    "zap": "ZAP", "prefault": "PREFAULT", "remap": "MUNMAP", "get": "GET", "pin": "PIN", "nested_map": "NESTED_MAP",
    "dma_map": "DMA_MAP",
}  # fmt: skip


def counts(records: Records) -> Counter[str]:
    return Counter(Operation(op).name for op in records.op.tolist())


def alone(weight: str, value: float = 1, **others: Any) -> Records:
    given = {**dict.fromkeys(WEIGHTS, 0), weight: value}
    return workload.open("random", 1, **{"guest_memory": 64 * MIB, "operations": 500, **given, **others}).records


@pytest.mark.parametrize(("weight", "operation"), WEIGHTS.items())
def test_a_weight_is_of_its_operation(weight: str, operation: str) -> None:
    found = counts(alone(weight))
    assert found[operation] == 500
    ends = {
        "MUNMAP": ("MMAP",), "GET": ("PUT",), "PIN": ("UNPIN",), "NESTED_MAP": ("NESTED_UNMAP",),
        "DMA_MAP": ("DMA_UNMAP", "DMA_ACCESS"),
    }.get(operation, ())  # fmt: skip
    setup = Counter({"MMAP": 1, "BIND": 1})
    assert found == Counter({operation: 500, **dict.fromkeys(ends, 500)}) + setup


def test_shares_are_those_of_the_weights() -> None:
    """50 of 100 are guest faults: of 40,000 draws 20,000, and 5 standard deviations are 500."""
    found = counts(workload.open("random", operations=40_000).records)
    for weight, value in workload.defaults_of("random").items():
        if weight in WEIGHTS:
            assert abs(found[WEIGHTS[weight]] - 400 * value) <= 500 * (value > 0), weight


@settings(max_examples=15)
@given(st.integers(0, 9), st.sampled_from([0.0, 0.5, 1.5]), st.floats(0, 1))
def test_everything_lies_in_memory_and_what_is_held_is_given_back(seed: int, zipf: float, large: float) -> None:
    weights = dict.fromkeys(WEIGHTS, 1)
    made = workload.open("random", seed, guest_memory=4 * MIB, operations=400, zipf=zipf, large=large, **weights)
    held: Counter[tuple[int, ...]] = Counter()
    begins = {Operation.PIN: Operation.UNPIN, Operation.NESTED_MAP: Operation.NESTED_UNMAP}
    ends = {end: begin for begin, end in begins.items()}
    columns = ("op", "object", "address", "offset", "length")
    for op, handle, address, offset, length in zip(*(getattr(made.records, n).tolist() for n in columns), strict=True):
        if op in (Operation.MMAP, Operation.MUNMAP, Operation.HOST_FAULT, Operation.ZAP, Operation.PIN):
            assert SYNTHETIC_HVA <= address <= SYNTHETIC_HVA + 4 * MIB - max(length, PAGE)
        elif op in (Operation.GUEST_FAULT, Operation.PREFAULT, Operation.DMA_MAP, Operation.DMA_ACCESS):
            assert address <= 4 * MIB - max(length, PAGE)
        elif op in (Operation.CONVERT, Operation.PUNCH_HOLE, Operation.GET, Operation.PUT):
            assert offset <= 4 * MIB - max(length, PAGE)
        if op in begins:
            held[op, handle] += 1
            assert held[op, handle] == 1
        elif op in ends:
            held[ends[op], handle] -= 1
    assert not +held


def test_zipf_prefers_few_pages() -> None:
    def most(zipf: float) -> int:
        faults = alone("guest_fault", zipf=zipf, operations=4000)
        return Counter(faults.address.tolist()).most_common(1)[0][1]

    # Of 16,384 pages the first has 1 / H(16384) = 9.7 % with s = 1: 389 of 4000.
    assert most(0) <= 6
    assert 300 <= most(1.0) <= 480


def test_large_is_the_share_of_ranges_of_2m() -> None:
    records = alone("convert", large=1)
    converts = records.op == Operation.CONVERT
    assert set(records.length[converts].tolist()) == {M2}
    assert not np.any(records.offset[converts] % np.uint64(M2))
    assert set(alone("convert", large=0).length.tolist()[2:]) == {PAGE}


def test_no_weight_at_all_is_refused() -> None:
    with pytest.raises(InputError, match=r"^workload:random: guest_fault, .*: all are 0, expected a weight$"):
        alone("zap", 0)
