"""Devices in a trace: both designs, every door and everybody who could unmap, on numbers worked out by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from comparisons import HVA, converts_nothing, lowered, one, setup
from pgemu.errors import InputError
from pgemu.experiments.compare import Comparison, compare, explained
from pgemu.experiments.devices import COUNTS, arranged
from pgemu.experiments.inferences import INFERENCES
from pgemu.experiments.sensitivity import sensitivity
from pgemu.experiments.verdict import verdict
from pgemu.machine.config import Config
from pgemu.machine.presets import Versions
from pgemu.report import document
from pgemu.trace import Flag, Lowered, Operation, Records
from pgemu_kernels.words.operations import PAGE_2M, PAGE_4K
from pgemu_kernels.words.rows import NO_INODE

IOVA = 0x10_0000_0000
RIGHTS = int(Flag.READ | Flag.WRITE)


def access(page: int, space: int = 0) -> Records:
    return one(Operation.DMA_ACCESS, Flag.WRITE, address=IOVA + page * PAGE_4K, length=512, space=space)


def dma_map(page: int, pages: int, **columns: Any) -> Records:
    by_address = {"object": NO_INODE, "offset": HVA + page * PAGE_4K}
    return one(
        Operation.DMA_MAP, RIGHTS, address=IOVA + page * PAGE_4K, length=pages * PAGE_4K, **{**by_address, **columns}
    )


def convert(kind: Flag, page: int, pages: int = 1) -> Records:
    return one(Operation.CONVERT, kind, offset=page * PAGE_4K, length=pages * PAGE_4K)


def records() -> list[Records]:
    """A device has two shared pages; one of them is private for the second and third of its five accesses."""
    return [
        *setup(),
        convert(Flag.SHARED, 0, 2),
        one(Operation.HOST_FAULT, Flag.WRITE, address=HVA),
        dma_map(0, 2),
        access(0),
        convert(Flag.PRIVATE, 0),
        access(0),
        access(1),
        convert(Flag.SHARED, 0),
        access(0),
        access(1),
    ]


def ran(trace: Lowered, **given: Any) -> Comparison:
    comparison = compare(trace, check="every", **given)
    found = {rule.explained_by for run in comparison.runs if run.finding for rule in run.finding.rules}
    assert found <= {("uptodate-unzeroed",)}
    return comparison


def counts(comparison: Comparison) -> list[dict[str, int]]:
    """Of each design what is not 0."""
    found = []
    for run in comparison.runs:
        assert run.devices
        found.append({name: n for name in COUNTS if (n := getattr(run.devices, name))})
    return found


# Restructure pins what a process maps, and so does not convert; pfnmap's entries cannot be pinned.
PINNED = {"accesses": 5, "conversions_pinned": 1}
REFUSED = {"accesses": 5, "faulted": 5, "maps_refused": 1}
STALE = {"accesses": 5, "stale_private": 1}
# One access meets a page that is private and not mapped. User space unmaps both pages, maps the other one again, and
# the first one once it is shared.
UNMAPPED = {"accesses": 5, "faulted": 1}
VMM = {**UNMAPPED, "vmm_unmaps": 1, "vmm_maps": 2}

EXPECTED: dict[tuple[str | None, str], list[dict[str, int]]] = {
    (None, "refused"): [PINNED, REFUSED],
    ("vfio", "refused"): [PINNED, REFUSED],
    ("vfio", "none"): [PINNED, STALE],
    ("vfio", "vmm"): [VMM, VMM],
    ("vfio", "vmm-late"): [{**VMM, "conversions_pinned": 1}, VMM],
    ("iommufd", "refused"): [PINNED, REFUSED],
    ("iommufd", "none"): [STALE, STALE],
    ("iommufd", "vmm"): [VMM, VMM],
    ("iommufd", "vmm-late"): [VMM, VMM],
    (None, "notifier"): [{**VMM, "revoked": 1}] * 2,
    (None, "revoke"): [{**UNMAPPED, "revoked": 1, "returned": 1}] * 2,
    ("iommufd", "mirror"): [{**UNMAPPED, "revoked": 1, "returned": 1}] * 2,
}
# Both pages are one entry of 8K of AMD's, which goes whole, or is cut and put together again.
OF_AMD: dict[str, dict[str, int]] = {
    "notifier": {"revoked": 2, "widened": 1},
    "revoke": {"revoked": 2, "widened": 1, "returned": 2, "windows": 1},
    "mirror": {"cut": 1, "joined": 1},
}


@pytest.mark.parametrize(("dma", "unmaps"), EXPECTED)
@pytest.mark.parametrize("iommu", ["vtd", "amd"])
def test_every_door_and_who_unmaps(dma: Any, unmaps: Any, iommu: Any) -> None:
    comparison = ran(lowered(records()), dma=dma, iommu_unmaps=unmaps, iommu=iommu)
    more = OF_AMD.get(unmaps, {}) if iommu == "amd" else {}
    assert counts(comparison) == [{**expected, **more} for expected in EXPECTED[dma, unmaps]]
    for run in comparison.runs:
        assert run.devices
        assert run.devices.to_json()["iommu"] == iommu
        assert run.count == 12 + run.devices.vmm_unmaps + run.devices.vmm_maps
        assert run.end_of_life.pool_free == run.end_of_life.pool  # what devices held went with them


def test_a_large_entry_goes_whole_and_its_rest_comes_back() -> None:
    """All of a 2M page is shared, one entry of either unit. A conversion takes one page of 512, and with it the rest:
    a window. Cut first, it takes that one."""
    trace = lowered(
        [
            *setup(),
            convert(Flag.SHARED, 0, 512),
            one(Operation.HOST_FAULT, Flag.WRITE, address=HVA),
            dma_map(0, 512),
            convert(Flag.PRIVATE, 7),
            access(8),
            convert(Flag.SHARED, 7),
            access(7),
        ]
    )
    revoked = {"accesses": 2, "revoked": 512, "widened": 511, "returned": 512, "windows": 1}
    assert counts(ran(trace, iommu_unmaps="revoke")) == [revoked] * 2
    # pages 0-6 and 8-511, and then page 7: put together again
    mirrored = {"accesses": 2, "revoked": 1, "returned": 1, "cut": 1, "joined": 1}
    assert counts(ran(trace, iommu_unmaps="mirror")) == [mirrored] * 2


@pytest.mark.parametrize("as_posted", [False, True])
@pytest.mark.parametrize("like", ["rfc2", "dec2025", "jan2026"])
@pytest.mark.parametrize("unmaps", ["notifier", "revoke", "mirror"])
def test_conversions_take_from_devices_in_every_version(like: Any, as_posted: bool, unmaps: Any) -> None:
    """Whatever the order of its steps, and what posted code forgets of KVM's leaves."""
    versions = Versions(like, as_posted=as_posted)
    comparison = compare(lowered(records()), versions=versions, iommu_unmaps=unmaps, iommu="vtd")
    assert counts(comparison) == EXPECTED["iommufd" if unmaps == "mirror" else None, unmaps]


def test_address_spaces_are_those_that_the_records_name() -> None:
    trace = lowered([*records(), dma_map(0, 1, space=3), access(0, 3), access(1, 3), access(0, 2)])
    comparison = ran(trace, designs=("restructure",))
    assert comparison.runs[0].devices
    assert comparison.runs[0].devices.faulted == 2  # nothing is at page 1 of the one, nothing in the other
    with pytest.raises(InputError, match="row 2: space 64 of a device, expected the number of an address space below"):
        compare(lowered([*setup(), access(0, 64)]))


def test_maps_that_name_the_file_are_iommufd_s() -> None:
    trace = lowered([*setup(), convert(Flag.SHARED, 0), dma_map(0, 1, object=0, offset=0)])
    comparison = ran(trace)
    assert [run.devices.how.dma for run in comparison.runs if run.devices] == ["iommufd"] * 2
    assert [run.operation(Operation.DMA_MAP).outcomes for run in comparison.runs] == [{"-EINVAL": 1}] * 2  # type: ignore[union-attr]
    # By VFIO they are of the process's memory.
    assert counts(ran(trace, dma="vfio")) == [{}, {"maps_refused": 1}]


def test_what_linux_does_leaves_the_trace_as_it_is() -> None:
    trace = lowered(records())
    config = Config(pool=4 * PAGE_2M, page_size=PAGE_2M)
    assert arranged(trace, config)[0] is trace
    plain = lowered(setup())
    assert arranged(plain, Config(iommu_unmaps="vmm"))[0] is plain


def test_nobody_tells_vfio_of_conversions() -> None:
    for unmaps in ("notifier", "revoke", "mirror"):
        with pytest.raises(InputError, match=f"iommu_unmaps '{unmaps}' with dma 'vfio': expected dma 'iommufd'"):
            compare(lowered(records()), dma="vfio", iommu_unmaps=unmaps)


def test_the_operation_that_takes_the_most_is_found_among_those_that_were_added() -> None:
    comparison = ran(lowered(records()), iommu_unmaps="vmm")
    for run in comparison.runs:
        worst = explained(comparison)[run.design][Operation.DMA_UNMAP]
        assert worst.record == run.worst[Operation.DMA_UNMAP].record == 6  # in front of the conversion
        assert worst.largest


def test_who_unmaps_is_tried_the_other_ways_and_both_are_shown() -> None:
    comparison = compare(lowered(records()))
    found = sensitivity(comparison)
    tried = {trial.label: trial for trial in found.trials if trial.rule == "iommu-unmaps"}
    assert {*tried} == {"none", "vmm", "vmm-late", "revoke", "mirror"}
    text = document(comparison, found)
    assert "devices: AMD's IOMMU, VFIO: pinned or refused (--iommu-unmaps refused)" in text
    assert "- device accesses that fault, of 5: restructure 0, pfnmap 5" in text
    assert "- conversions that end in -EAGAIN for pins: restructure 1, pfnmap 0" in text
    flat = " ".join(text.split())
    assert "who unmaps is open (iommu-unmaps), restructure/pfnmap with none: stale 0/1, -EAGAIN 1/0;" in flat
    assert "vmm, revoke, mirror: faulted 1/1" in flat
    assert any(rule == "iommu-unmaps" for rule, *_ in verdict(comparison, found)["refused"].basis.rules)
    data = json.loads(document(comparison, found, "json"))
    assert data["designs"]["pfnmap"]["devices"]["faulted"] == 5
    assert data["sensitivity"]["iommu_unmaps"]["none"]["pfnmap"]["stale_private"] == 1
    csv = document(comparison, found, "csv")
    assert "devices.faulted,Devices,of them faulted,count,0,5,5" in csv


def test_a_device_that_reaches_private_memory_breaks_a_rule() -> None:
    comparison = compare(lowered(records()), dma="iommufd", iommu_unmaps="none", defects=())
    lines = verdict(comparison)
    assert lines["broken"].measure[1:3] == (1, 1)
    assert "stale device accesses, to private memory: restructure 1, pfnmap 1" in document(comparison, None)
    machine_checks = compare(lowered(records()), iommu_unmaps="none", vm="tdx", defects=())
    assert [run.devices.machine_checks for run in machine_checks.runs if run.devices] == [0, 1]


def test_without_devices_nothing_is_said_of_them() -> None:
    comparison = converts_nothing()
    assert [run.devices for run in comparison.runs] == [None, None]
    assert INFERENCES["iommu-unmaps"].untouched(comparison) == "the trace has no map for devices"
    assert "device" not in document(comparison, None)
    assert '"devices": null' in document(comparison, None, "json")
