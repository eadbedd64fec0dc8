"""A design of one row: existing properties and steps, combined anew.

"frames" enters frames, as pfnmap does, but under a VMA that is not VM_PFNMAP, so that MADV_DONTNEED works; it
invalidates whole huge pages, here with a zap of all of them, and a hole leaves it to truncation to unmap, which finds
no special entry.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from comparisons import HVA, INODE, lowered, mixed_records, one
from machines import assert_same
from pgemu.cli import main
from pgemu.experiments.compare import DesignRun, compare
from pgemu.machine import designs
from pgemu.machine.designs import Row
from pgemu.objects.machine import Config, Machine
from pgemu_kernels import words as W
from pgemu_kernels.words.operations import Flag, Operation
from pgemu_kernels.words.properties import Property

M2, PAGE = W.PAGE_2M, W.PAGE_4K
FRAMES: Any = "frames"


@pytest.fixture(autouse=True)
def frames(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row(Property.SPECIAL_ENTRIES | Property.INSERTS_LOCKED | Property.ROUNDS_RANGES, designs.SLIDES)
    monkeypatch.setitem(designs.ROWS, "frames", row)


def scene(**parameters: Any) -> tuple[Machine, Any, Any, Any]:
    """Two pages of 2M, all shared, mapped and bound, both used by host and guest."""
    machine = Machine(Config(FRAMES, pool=2 * M2, page_size=M2, zap="rounded", **parameters))
    gmem = machine.create_guest_memfd(2 * M2, shared=True)
    process = machine.create_process()
    vm = machine.create_vm(process, protected=True)
    assert process.mmap(gmem, HVA).status == 0
    assert vm.bind(gmem, 0).status == 0
    for page in (0, 3, 600):
        assert process.touch(HVA + page * PAGE) == (W.VM_FAULT_NOPAGE, 1)
        vm.touch(page * PAGE)
    return machine, gmem, process, vm


def outcomes(run: DesignRun, op: Operation) -> dict[str, int]:
    found = run.operation(op)
    return found.outcomes if found else {}


def test_it_is_compared_with_the_others() -> None:
    """What the trace does not do to frames as it does to pfnmap: MADV_DONTNEED is 0 there, and -EINVAL on VM_PFNMAP."""
    found = compare(lowered(mixed_records()), designs=("pfnmap", FRAMES), check="every")
    pfnmap, frames = found.runs
    assert [run.design for run in found.runs] == ["pfnmap", "frames"]
    assert frames.finding is None
    assert outcomes(pfnmap, Operation.ZAP) == {"-EINVAL": 1}
    assert outcomes(frames, Operation.ZAP) == {"ok": 1}
    for op in Operation:
        assert op == Operation.ZAP or outcomes(frames, op) == outcomes(pfnmap, op)


@pytest.mark.parametrize("form", [("--details",), ("--details", "--sources"), ("--format", "json", "--sources")])
def test_the_command_line_knows_it_by_its_row(form: tuple[str, ...], tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "vmm-9 [000] ..... 1.000001: kvm_memslot: slot=0 flags=4 gpa=0x0 size=0x200000 hva=0x7f0000000000\n"
        "vmm-9 [000] ..... 1.000002: kvm_page_fault: vcpu 0 rip 0x1000 address 0x0000000000001000 error_code 0x4\n"
    )
    arguments = ["compare", str(log), "--page-size", "2M", "--design", "pfnmap", "--design", FRAMES, *form]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert "frames" in done.output
    assert "nobody has listed any" in done.output
    assert "no source is named" in done.output or "--sources" not in form


def test_conversions_zap_whole_huge_pages_and_split_none() -> None:
    machine, gmem, _, vm = scene()
    assert vm.touch(0) == (W.RET_PF_SPURIOUS, 2)
    assert gmem.convert(3 * PAGE, PAGE, shared=False).status == 0
    assert vm.touch(5 * PAGE) == (W.RET_PF_FIXED, 1)  # the leaf of 2M went as a whole; its block is mixed now
    assert vm.touch(600 * PAGE) == (W.RET_PF_SPURIOUS, 2)  # the other one stays
    assert gmem.convert(3 * PAGE, PAGE, shared=True).status == 0
    assert vm.touch(5 * PAGE) == (W.RET_PF_FIXED, 2)  # the zap was rounded: no 4K leaf is left in the way
    assert machine.check() == 0, machine.broken


def test_gup_fails_and_madvise_works() -> None:
    machine, _, process, _ = scene()
    assert process.pin(HVA, PAGE, pin=1).status == -W.EFAULT
    assert process.zap(HVA, PAGE, madvise=True).status == 0
    assert machine.check() == 0, machine.broken


def test_truncation_finds_no_special_entries() -> None:
    """The hole's frame goes back to the pool with a process's entry to it: a broken rule, and seen."""
    machine, gmem, process, _ = scene()
    assert gmem.punch_hole(0, M2).status == 0
    assert process.touch(HVA) == (0, 1)  # the entry is there yet
    assert machine.check() != 0


@pytest.mark.parametrize("batch", ["range", "block"])
def test_step_by_step_it_does_the_same(batch: str) -> None:
    parameters = {"batch": batch}
    straight, stepped = scene(**parameters), scene(**parameters)
    for first, pages, shared in ((3, 1, False), (500, 100, False), (0, 1024, True), (9, 600, False)):
        flags = Flag.SHARED if shared else Flag.PRIVATE
        result = straight[1].convert(first * PAGE, pages * PAGE, shared=shared)
        columns = {"object_": stepped[1].inode, "offset": first * PAGE, "length": pages * PAGE}
        stepped[0].begin(1, Operation.CONVERT, flags=flags, **columns)
        while stepped[0].step(1) == W.GO:
            pass
        assert stepped[0].result(1) == result
        assert_same(straight[0], stepped[0])
        for machine, _, process, vm in (straight, stepped):
            assert machine.check() == 0, machine.broken
            process.touch(HVA + 7 * PAGE)
            vm.touch(7 * PAGE)


def test_default_loops_and_full_ones_do_the_same() -> None:
    records = [*mixed_records()[:-5], one(Operation.HOST_FAULT, address=HVA + INODE - PAGE)]
    default, full = (
        compare(lowered(records), designs=(FRAMES,), check="every", **options) for options in ({}, {"worker": "queued"})
    )
    assert default.runs[0].operations == full.runs[0].operations
