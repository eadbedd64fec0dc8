"""The TDX boot with a device: every record of the boot is there, and the device has what is shared."""

from __future__ import annotations

import numpy as np
import pytest

from pgemu import workload
from pgemu.errors import InputError
from pgemu.trace import Flag, Operation, Records
from pgemu.trace.devices import of_devices
from pgemu.trace.schema import DTYPES

pytestmark = pytest.mark.same_with_checks

GIB = 1 << 30


@pytest.fixture(scope="module")
def boot() -> Records:
    return workload.open("assigned-boot", seed=1).records


def test_without_its_device_it_is_the_boot(boot: Records) -> None:
    other = workload.open("tdx-boot", seed=1).records
    rest = boot.take(np.flatnonzero(~of_devices(boot)))
    assert all(np.array_equal(getattr(rest, name), getattr(other, name)) for name in DTYPES if name != "time")
    assert np.all(np.diff(boot.time.astype(np.int64)) == 10_000)


def test_counts(boot: Records) -> None:
    """Shared at some time: 3 hot pages, 86 others, 12 rare ones, swiotlb. The host touches 1704 + 64 times, and one of
    100 of 1704 flips is late: 17."""
    counts = {Operation(op).name: int((boot.op == op).sum()) for op in set(boot.op[of_devices(boot)].tolist())}
    assert counts == {"DMA_MAP": 3 + 86 + 12 + 1, "DMA_ACCESS": 1704 + 64 + 17}


def test_what_is_mapped_is_shared_then_and_mapped_once(boot: Records) -> None:
    shared: set[int] = set()
    mapped: set[int] = set()
    late = 0
    columns = (boot.op, boot.flags, boot.address, boot.offset, boot.length)
    for op, flags, address, offset, length in zip(*(column.tolist() for column in columns), strict=True):
        gpa = offset if offset < 2 * GIB else offset + 2 * GIB
        pages = set(range(gpa >> 12, (gpa + length) >> 12))
        if op == Operation.CONVERT:
            shared = shared | pages if flags & Flag.SHARED else shared - pages
        elif op == Operation.DMA_MAP:
            pages = set(range(address >> 12, (address + length) >> 12))
            assert pages <= shared
            assert not pages & mapped
            mapped |= pages
        elif op == Operation.DMA_ACCESS:
            assert address >> 12 in mapped
            late += address >> 12 not in shared
    assert late == 17


@pytest.mark.parametrize(("late", "count"), [(0.0, 0), (1.0, 1704)])
def test_late_is_a_share(late: float, count: int) -> None:
    made = workload.open("assigned-boot", late=late)
    assert int((made.records.op == Operation.DMA_ACCESS).sum()) == 1704 + 64 + count
    assert made.accounting.balanced()


def test_what_is_no_share_is_refused() -> None:
    with pytest.raises(InputError, match=r"^workload:assigned-boot: late 2: expected a share from 0 to 1"):
        workload.open("assigned-boot", late=2)
