"""Named scenarios, and the command that runs them."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from pgemu.cli import main
from pgemu.experiments.scenarios import KERNEL_IMAGE, KVMTOOL_HVA, SmallestPfnmap, smallest_pfnmap
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Event, Gauge
from pgemu_kernels.words.operations import Operation

SMALL = {"guest_memory": 32 << 20, "kernel_image": 2 << 20, "initrd": 1 << 20}


@pytest.fixture(scope="module", params=["npt", "ept"])
def boot(request: pytest.FixtureRequest) -> SmallestPfnmap:
    return smallest_pfnmap(**SMALL, stage2=request.param)


def test_the_host_gets_special_entries_and_nopage(boot: SmallestPfnmap) -> None:
    host = [phase for phase in boot.phases if phase.operation is Operation.HOST_FAULT]
    assert [phase.results for phase in host] == [{"VM_FAULT_NOPAGE": phase.pages} for phase in host]
    assert [phase.name for phase in host][:2] == ["kernel image", "setup code"]
    assert host[0].pages == 512
    assert boot.host_entry & 0x8000_0000_0000_0FFF == 0x8000_0000_0000_0267  # written
    assert boot.machine.statistics.event(Event.RMAP_CHANGED) == 0
    assert (boot.references, boot.mapcount) == (1, 0)


def test_the_guest_runs_over_the_same_memory(boot: SmallestPfnmap) -> None:
    guest = [phase for phase in boot.phases if phase.operation is Operation.GUEST_FAULT]
    assert all(phase.levels == {1: phase.pages} for phase in guest)
    assert all(phase.results == {"RET_PF_FIXED": phase.pages} for phase in guest)
    assert boot.sees_host_data
    assert boot.sees_guest_data
    assert boot.host_entry & 0xF_FFFF_F000 == boot.guest_entry & 0xF_FFFF_F000
    touched = {boot.gmem.pfn(gpa) for gpa in range(0, boot.gmem.size, W.PAGE_4K)} - {None}
    assert len(touched) == boot.machine.statistics.gauge(Gauge.BLOCKS_HUGE)


def test_what_follows_from_vm_pfnmap(boot: SmallestPfnmap) -> None:
    assert boot.dontneed == -W.EINVAL
    assert boot.broken == 0
    # kvmtool's VM is a plain one, which knows no private memory (kvm_arch_has_private_mem()).
    assert boot.gmem.convert(KERNEL_IMAGE, W.PAGE_4K, shared=False).status == -W.EINVAL
    assert boot.process.touch(KVMTOOL_HVA + KERNEL_IMAGE).status == 0  # present as before
    assert boot.machine.check() == 0, boot.machine.broken


def test_memory_must_hold_what_is_loaded() -> None:
    with pytest.raises(ValueError, match="expected room"):
        smallest_pfnmap(guest_memory=32 << 20)


def test_the_command_prints_text_and_json() -> None:
    text = CliRunner().invoke(main, ["scenario", "smallest-pfnmap"])
    assert text.exit_code == 0
    assert "rules broken: 0" in text.output
    assert "VM_FAULT_NOPAGE 3072" in text.output
    found = CliRunner().invoke(main, ["scenario", "smallest-pfnmap", "--json"])
    document = json.loads(found.output)
    assert document["host_leaves"] == sum(p["pages"] for p in document["phases"] if p["operation"] == "host fault")
    assert document["broken"] == 0


@pytest.mark.parametrize(("memory", "said"), [("16M", "expected room"), ("1T", "expected at most 68719476736, which")])
def test_the_command_refuses_what_does_not_fit(memory: str, said: str) -> None:
    refused = CliRunner().invoke(main, ["scenario", "smallest-pfnmap", "--guest-memory", memory])
    assert (refused.exit_code, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
    assert said in refused.stderr
