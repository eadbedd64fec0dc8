"""`pgemu compare` with devices: options, workloads with parameters, what excludes each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pgemu.cli import main

SMALL = ("workload:dma-steady", "--guest-memory", "128M", "--page-size", "2M", "--flips", "5", "--accesses", "4")


def invoke(*args: str) -> Result:
    return CliRunner().invoke(main, ["compare", *args])


def devices(*args: str) -> dict[str, dict[str, Any]]:
    result = invoke(*args, "--no-sensitivity", "--format", "json")
    assert result.exit_code == 0, result.output
    return {design: run["devices"] for design, run in json.loads(result.stdout)["designs"].items()}


def test_options_say_unit_door_and_who_unmaps() -> None:
    """One of five transfers is late: it meets private memory, or nothing."""
    found = devices(*SMALL, "--late", "0.2", "--dma", "iommufd", "--iommu", "vtd", "--iommu-unmaps", "none")
    for run in found.values():
        assert (run["iommu"], run["dma"], run["iommu_unmaps"]) == ("vtd", "iommufd", "none")
        assert (run["accesses"], run["faulted"], run["stale_private"]) == (20, 0, 1)
    found = devices(*SMALL, "--late", "0.2", "--iommu-unmaps", "mirror")
    assert [(run["dma"], run["faulted"], run["stale_private"]) for run in found.values()] == [("iommufd", 1, 0)] * 2


def test_without_them_linux_pins_or_refuses() -> None:
    found = devices(*SMALL, "--late", "0")
    assert [run["faulted"] for run in found.values()] == [0, 20]
    assert [run["conversions_pinned"] for run in found.values()] == [5, 0]
    assert [(run["iommu"], run["dma"]) for run in found.values()] == [("amd", "vfio")] * 2


def test_the_screen_shows_both_ways_and_details_all_counts() -> None:
    result = invoke(*SMALL, "--details")
    assert result.exit_code == 0, result.output
    screen = " ".join(result.stdout.splitlines()[:24])
    assert "who unmaps is open (iommu-unmaps)" in screen
    assert "Devices, by who takes private pages from them (--iommu-unmaps)" in result.stdout


@pytest.mark.parametrize("unmaps", ["notifier", "revoke", "mirror"])
def test_vfio_with_a_kernel_that_revokes_is_refused(unmaps: str) -> None:
    result = invoke(*SMALL, "--dma", "vfio", "--iommu-unmaps", unmaps)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"iommu_unmaps '{unmaps}' with dma 'vfio': expected dma 'iommufd'" in result.stderr


@pytest.mark.parametrize("option", ["late", "flips", "accesses", "buffers", "mapping"])
def test_a_parameter_that_a_workload_does_not_have_is_refused(option: str) -> None:
    result = invoke("workload:tdx-boot", f"--{option}", "0" if option != "mapping" else "4K")
    assert result.exit_code == 2
    assert f"{option}: expected some of overlap" in result.stderr


def test_iova_is_how_a_log_is_read(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text(
        " vmm-9 [000] ..... 1.000001: kvm_memslot: slot=0 flags=4 gpa=0x0 size=0x400000 hva=0x7f0000000000\n"
        " CPU 0/KVM-9 [000] ..... 1.000002: kvm_page_fault: vcpu 0 rip 0x0 address 0x0000000000010000 error_code 0x2\n"
        " vmm-9 [000] ..... 1.000003: map: IOMMU: iova=0x10000 - 0x20000 paddr=0x777000 size=65536\n"
        " vmm-9 [000] ..... 1.000004: unmap: IOMMU: iova=0x10000 - 0x20000 size=65536 unmapped_size=65536\n"
    )
    text = invoke(str(log), "--page-size", "2M", "--no-sensitivity")
    assert text.exit_code == 0, text.output
    assert "left out: 2 iommu:map and unmap of an unknown device; --iova guest" in " ".join(text.stdout.split())
    found = devices(str(log), "--page-size", "2M", "--iova", "guest")
    assert [run["maps_refused"] for run in found.values()] == [0, 1]


@pytest.mark.parametrize("source", ["workload:dma-steady", "workload:assigned-boot"])
def test_workloads_run_on_both_designs(source: str) -> None:
    found = devices(source, *["--flips", "20"] * (source == "workload:dma-steady"))
    assert all(run["accesses"] > 1000 for run in found.values())
    assert found["restructure"]["conversions_pinned"] > 0
    assert found["pfnmap"]["maps_refused"] > 0
