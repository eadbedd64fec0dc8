"""The synthetic TDX boot has the published counts."""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest

from pgemu import workload
from pgemu.errors import InputError
from pgemu.trace import Flag, LoweringOptions, Operation, Records, load
from pgemu.trace.schema import DTYPES

pytestmark = pytest.mark.same_with_checks

PAGE = 4096


@pytest.fixture(scope="module")
def boot() -> Records:
    return workload.open("tdx-boot", seed=1).records


def gfns(records: Records, op: Operation, flag: Flag) -> npt.NDArray[np.uint64]:
    chosen = (records.op == op) & ((records.flags & np.uint8(flag)) != 0)
    pages: npt.NDArray[np.uint64] = records.address[chosen] >> np.uint64(12)
    return pages


def test_totals(boot: Records) -> None:
    assert Counter(Operation(op).name for op in boot.op.tolist()) == {
        "MMAP": 2,
        "BIND": 3,
        "CONVERT": 2 * (1606 + 86 + 12) + 1,
        "HOST_FAULT": 1606 + 86 + 12 + 64,
        "GUEST_FAULT": 1024 + 2710 + 12 + 64 + 1144,
    }


def test_accepts_follow_the_published_histogram(boot: Records) -> None:
    accepts = Counter(gfns(boot, Operation.GUEST_FAULT, Flag.PRIVATE).tolist())
    assert (accepts[0x7D9D7], accepts[0x7D9DA], accepts[0x7D9D9]) == (974, 476, 156)
    assert [accepts[gfn] for gfn in range(0x806, 0xA00)] == [1] * 506
    assert [accepts[gfn] for gfn in range(0x7E800, 0x7EA00)] == [1] * 512
    assert sum(accepts[gfn] for gfn in range(0x7D3FF, 0x7E7FF)) == 1606 + 86
    assert sum(accepts[gfn] for gfn in range(0xFFC00, 0x100000)) == 1024


def test_first_touches_are_1144_blocks_of_2m_that_nothing_else_touches(boot: Records) -> None:
    touched = gfns(boot, Operation.GUEST_FAULT, Flag.PRIVATE)
    small = np.concatenate([np.arange(*bounds) for bounds in ((0x806, 0xA00), (0x7D3FF, 0x7EA00), (0xFFC00, 0x100000))])
    first = touched[~np.isin(touched, small)]
    blocks = Counter((first // np.uint64(512)).tolist())
    assert len(blocks) == 1144
    assert sum(blocks.values()) == 1144 + 12
    assert not set(blocks) & set(range(0x70000 // 512, 0x74000 // 512))


def test_swiotlb_is_one_conversion_of_64_mib(boot: Records) -> None:
    large = np.flatnonzero((boot.op == Operation.CONVERT) & (boot.length > PAGE))
    assert len(large) == 1
    assert (int(boot.offset[large[0]]), int(boot.length[large[0]])) == (0x70000 * PAGE, 64 << 20)
    assert len(gfns(boot, Operation.GUEST_FAULT, Flag.SHARED)) == 64


def test_pages_that_flip_end_private(boot: Records) -> None:
    state: dict[int, int] = {}
    flips = (boot.op == Operation.CONVERT) & (boot.length == PAGE)
    for offset, flags in zip(boot.offset[flips].tolist(), boot.flags[flips].tolist(), strict=True):
        assert flags != state.get(offset, Flag.PRIVATE), "a conversion that changes nothing"
        state[offset] = flags
    assert set(state.values()) == {Flag.PRIVATE}


def test_boot_runs_on_vcpu_0_and_first_touches_on_all(boot: Records) -> None:
    guest = boot.op == Operation.GUEST_FAULT
    assert set(boot.actor[guest][: 1024 + 2710].tolist()) == {0}
    assert set(boot.actor[guest].tolist()) == set(range(8))


def test_equal_seeds_make_equal_traces() -> None:
    one, same, other = (workload.open("tdx-boot", seed) for seed in (5, 5, 6))
    assert all(np.array_equal(getattr(one.records, name), getattr(same.records, name)) for name in DTYPES)
    assert not np.array_equal(one.records.offset, other.records.offset)
    one.records.check("tdx-boot")
    assert one.accounting.balanced()


def test_load_by_name_and_page_size() -> None:
    lowered = load("workload:tdx-boot", LoweringOptions(page_size=1 << 21), seed=5)
    assert (lowered.init, lowered.converts, lowered.source) == ("private", True, "workload:tdx-boot")
    assert (lowered.layout.page_size, lowered.layout.inode_size) == (1 << 21, 5 << 30)
    assert all((slot.offset - slot.gpa) % (1 << 30) == 0 for slot in lowered.layout.slots)


def test_unknown_workload_lists_those_there_are() -> None:
    known = ", ".join(f"workload:{name}" for name in sorted(workload.WORKLOADS))
    with pytest.raises(InputError, match=rf"^workload:tdx: no such workload, there is {known}$"):
        load("workload:tdx")


# --------------------------------------------------------------------------- overlap


@pytest.mark.parametrize("overlap", [0.0, 0.25, 1.0])
def test_counts_are_the_same_for_every_overlap(boot: Records, overlap: float) -> None:
    other = workload.open("tdx-boot", seed=1, overlap=overlap).records
    assert len(other) == len(boot)
    for name in ("op", "flags", "address", "offset", "length"):
        found, expected = (Counter(getattr(records, name).tolist()) for records in (other, boot))
        assert found == expected, name


def test_without_an_overlap_no_page_stays_shared_while_another_flips(boot: Records) -> None:
    assert all(
        np.array_equal(getattr(workload.open("tdx-boot", seed=1, overlap=0.0).records, name), getattr(boot, name))
        for name in DTYPES
    )
    assert most_shared(boot) == 1


def most_shared(records: Records) -> int:
    """How many pages of the hot range are shared at once, at most."""
    shared: set[int] = set()
    most = 0
    flips = (records.op == Operation.CONVERT) & (records.length == PAGE)
    for offset, flags in zip(records.offset[flips].tolist(), records.flags[flips].tolist(), strict=True):
        shared = shared | {offset} if flags & Flag.SHARED else shared - {offset}
        most = max(most, len(shared))
    return most


@pytest.mark.parametrize(("overlap", "flips"), [(0.25, 423), (1.0, 1691)])
def test_a_share_of_the_flips_happens_under_a_page_that_stays_shared(overlap: float, flips: int) -> None:
    """1,692 hot flips, one of them the page that stays: the others are 1,691."""
    records = workload.open("tdx-boot", seed=1, overlap=overlap).records
    converts = np.flatnonzero((records.op == Operation.CONVERT) & (records.length == PAGE))
    first = int(records.offset[converts[0]])
    again = next(i for i in converts[1:] if int(records.offset[i]) == first)
    inside = [i for i in converts if converts[0] < i < again]
    assert len(inside) == 2 * flips
    assert most_shared(records) == 2


@pytest.mark.parametrize("overlap", [-0.1, 1.5])
def test_a_share_that_is_none_is_refused(overlap: float) -> None:
    with pytest.raises(InputError, match=f"workload:tdx-boot: overlap {overlap}: expected a share from 0 to 1"):
        workload.open("tdx-boot", overlap=overlap)


def test_the_workload_brings_its_machine() -> None:
    found = load("workload:tdx-boot", LoweringOptions(), 0, overlap=0.5)
    assert dict(found.machine) == {"vm": "tdx", "stage2": "ept", "vcpus": 8}
    assert found.again
    assert len(found.again(overlap=1.0).records) == len(found.records)
