"""A guest's acceptance: units, faults and who comes between, as published."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from pgemu import workload
from pgemu.errors import InputError
from pgemu.trace import Flag, Operation, Records

pytestmark = pytest.mark.same_with_checks

PAGE, M2, M4, GIB = 4096, 2 << 20, 4 << 20, 1 << 30


def of(records: Records, op: Operation, flag: Flag) -> Records:
    return records.take(np.flatnonzero((records.op == op) & (records.flags & np.uint8(int(flag)) != 0)))


def test_counts_of_the_published_guest() -> None:
    """16 GiB: 4096 units, 8192 faults of 2M; 220 GHCBs; swiotlb is 6 % = 983.04 MiB, in whole 2 MiB 984."""
    made = workload.open("snp-accept")
    records = made.records
    assert dict(made.machine) == {"vm": "snp", "stage2": "npt", "vcpus": 220}
    assert made.init == "shared"
    asked = of(records, Operation.CONVERT, Flag.PRIVATE)
    assert sorted(asked.offset.tolist()) == list(range(0, 16 * GIB, M4))
    assert set(asked.length.tolist()) == {M4}
    shared = of(records, Operation.CONVERT, Flag.SHARED)
    assert Counter(shared.length.tolist()) == {984 << 20: 1, PAGE: 220}
    touched = of(records, Operation.GUEST_FAULT, Flag.PRIVATE).address
    assert len(touched) == 8192 + 220
    assert Counter((touched[touched % M2 == 0] // M4).tolist()) == dict.fromkeys(range(4096), 2)


def test_no_page_is_touched_before_it_is_accepted_or_while_it_is_shared() -> None:
    records = workload.open("snp-accept", seed=3, guest_memory=GIB, concurrent=20).records
    private: set[int] = set()
    columns = (records.op, records.flags, records.address, records.offset, records.length)
    for op, flags, address, offset, length in zip(*(column.tolist() for column in columns), strict=True):
        if op == Operation.CONVERT:
            pages = set(range(offset // PAGE, (offset + length) // PAGE))
            private = private | pages if flags & Flag.PRIVATE else private - pages
        elif op == Operation.GUEST_FAULT:
            assert bool(flags & Flag.PRIVATE) == (address // PAGE in private)
    assert len(private) == (GIB - (64 << 20)) // PAGE - 220


def test_requests_of_others_come_between_a_unit_and_its_faults() -> None:
    def between(concurrent: float) -> int:
        records = workload.open("snp-accept", guest_memory=GIB, vcpus=4, concurrent=concurrent).records
        asked: list[int] = []
        most = 0
        for op, flags, address, offset in zip(
            *(getattr(records, name).tolist() for name in ("op", "flags", "address", "offset")), strict=True
        ):
            if op == Operation.CONVERT and flags & Flag.PRIVATE:
                asked.append(offset)
            elif op == Operation.GUEST_FAULT and flags & Flag.PRIVATE and address % M2 == 0:
                most = max(most, len(asked) - 1 - asked.index(address // M4 * M4))
        return most

    assert between(1) == 0
    assert between(8) == 7


def test_a_guest_that_validates_page_by_page() -> None:
    records = workload.open("snp-accept", guest_memory=256 << 20, fault=PAGE, vcpus=1).records
    accepted = of(records, Operation.GUEST_FAULT, Flag.ACCEPT_4K)
    assert sorted(accepted.address.tolist()) == list(range(0, 256 << 20, PAGE))


def test_other_sizes_of_faults_are_refused() -> None:
    with pytest.raises(InputError, match=r"^workload:snp-accept: fault 8192: expected 4096 or 2097152$"):
        workload.open("snp-accept", fault=8192)
