"""A device that keeps using shared buffers: what the workload asks for follows from its parameters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pgemu import workload
from pgemu.errors import InputError
from pgemu.trace import Flag, LoweringOptions, Operation, Records, load
from pgemu.trace.memory_layout import SYNTHETIC_HVA
from pgemu.trace.schema import DTYPES
from pgemu_kernels.words.rows import NO_INODE

pytestmark = pytest.mark.same_with_checks

PAGE, M2, GIB = 4096, 2 << 20, 1 << 30


def of(records: Records, op: Operation) -> Records:
    return records.take(np.flatnonzero(records.op == op))


def private_pages(records: Records) -> list[tuple[int, bool]]:
    """Of each access its address, and whether that page is private then."""
    private: set[int] = set()
    found = []
    columns = zip(*(getattr(records, name).tolist() for name in ("op", "flags", "address", "offset")), strict=True)
    for op, flags, address, offset in columns:
        if op == Operation.CONVERT:
            private = private | {offset} if flags & Flag.PRIVATE else private - {offset}
        elif op == Operation.DMA_ACCESS:
            found.append((address, address in private))
    return found


def test_buffers_are_swiotlb_of_sev_guests() -> None:
    """6 % of memory, at least 64 MiB and at most 1 GiB, in whole 2 MiB: of 4 GiB 245.76 MiB."""
    for memory, size in ((GIB, 64 << 20), (4 * GIB, 246 << 20), (32 * GIB, GIB)):
        records = workload.open("dma-steady", guest_memory=memory, flips=0).records
        whole = of(records, Operation.CONVERT)
        assert whole.length.tolist() == [size]
        assert int(whole.offset[0]) + size == 2 * GIB if memory > 2 * GIB else memory


def test_counts_of_a_small_one() -> None:
    """64 MiB of 256 at their end: 96 other blocks of 2M, 16,384 buffers, 32 maps; 10 flips of 4 records and 6 accesses,
    one of them late."""
    made = workload.open("dma-steady", guest_memory=256 << 20, flips=10, accesses=6, late=0.1)
    records = made.records
    counts = {Operation(op).name: int((records.op == op).sum()) for op in set(records.op.tolist())}
    assert counts == {
        "MMAP": 1, "BIND": 1, "CONVERT": 21, "GUEST_FAULT": 96 + 16384 + 20, "DMA_MAP": 32, "DMA_ACCESS": 60,
    }  # fmt: skip
    maps = of(records, Operation.DMA_MAP)
    assert maps.address.tolist() == [192 * (1 << 20) + i * M2 for i in range(32)]
    assert (maps.offset - maps.address).tolist() == [SYNTHETIC_HVA] * 32
    assert set(maps.object.tolist()) == {NO_INODE}
    assert sum(private for _, private in private_pages(records)) == 1
    assert made.accounting.balanced()
    assert np.all(np.diff(records.time.astype(np.int64)) == 10_000)


@settings(max_examples=25)
@given(
    st.integers(0, 5), st.integers(0, 40), st.integers(0, 9), st.floats(0, 1), st.floats(0, 0.9),
    st.sampled_from([PAGE, 3 * PAGE, M2, GIB]),
)  # fmt: skip
def test_whatever_the_parameters(
    seed: int, flips: int, accesses: int, late: float, buffers: float, mapping: int
) -> None:
    """Late are as many accesses as asked for; the maps cover the buffers and each page is back at the end."""
    parameters: dict[str, Any] = {
        "guest_memory": 32 << 20, "flips": flips, "accesses": accesses, "late": late, "buffers": buffers,
        "mapping": mapping,
    }  # fmt: skip
    made = workload.open("dma-steady", seed, **parameters)
    again = workload.open("dma-steady", seed, **parameters)
    assert all(np.array_equal(getattr(made.records, name), getattr(again.records, name)) for name in DTYPES)
    whole, *others = of(made.records, Operation.CONVERT).offset.tolist()
    size = int(of(made.records, Operation.CONVERT).length[0])
    maps = of(made.records, Operation.DMA_MAP)
    assert maps.address.tolist() == list(range(whole, whole + size, mapping))
    assert int(maps.length.sum()) == size
    assert len(others) == 2 * flips
    assert others[::2] == others[1::2]
    used = private_pages(made.records)
    assert len(used) == flips * accesses
    assert all(whole <= address < whole + size for address, _ in used)
    assert sum(private for _, private in used) == (round(late * flips) if accesses else 0)


def test_other_seeds_are_other_orders() -> None:
    one, other = (workload.open("dma-steady", seed, guest_memory=256 << 20, flips=50).records for seed in (0, 1))
    assert len(one) == len(other)
    assert not np.array_equal(one.offset, other.offset)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("guest_memory", 3 << 20, "a multiple of 2097152 from 4194304 to"),
        ("guest_memory", float("nan"), "a multiple of 2097152 from 4194304 to"),
        ("flips", -1, "a whole number from 0 to"),
        ("flips", 1.5, "a whole number from 0 to"),
        ("accesses", True, "a whole number from 0 to"),
        ("buffers", 1.5, "a share from 0 to 1"),
        ("buffers", 1, "2 MiB beside them"),
        ("late", float("nan"), "a share from 0 to 1"),
        ("late", "0.5", "a share from 0 to 1"),
        ("mapping", 100, "a multiple of 4096 from 4096 to"),
    ],
)
def test_what_is_no_parameter_is_refused(name: str, value: Any, expected: str) -> None:
    with pytest.raises(InputError, match=f"^workload:dma-steady: {name}.*: expected {expected}"):
        workload.open("dma-steady", **{name: value})


def test_guest_memory_of_the_trace_is_the_workload_s() -> None:
    made = load("workload:dma-steady", LoweringOptions(guest_memory=2 * GIB), flips=1)
    assert made.layout.inode_size == 2 * GIB
    assert int(of(made.records, Operation.BIND).length[0]) == 2 * GIB
    assert load("workload:dma-steady", flips=1).layout.inode_size == GIB
