"""What a recorded VM's guest used unseen: bounds of faults, of what is mapped, and of what was dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pgemu import Config, Machine, workload
from pgemu.experiments.recorded import RecordedBounds, bounds, replay_unseen
from pgemu.machine.designs import Design
from pgemu.trace import Lowered, LoweringOptions, load
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Event
from pgemu_kernels.words.operations import Operation

M, PAGE = 1 << 20, 4096
HVA = 0x7F00_0000_0000
SIZE = 8 * M
HEAD = "CPU 0/KVM-11 [000] ..... 1.000000: "
SLOT = f"{HEAD}kvm_memslot: slot=0 flags=0x0 gpa=0x0 size={SIZE:#x} hva={HVA:#x}\n"


def fault(gpa: int, level: int) -> str:
    """A guest fault, and the leaf that answers it; level 0: the log has none."""
    line = f"{HEAD}kvm_page_fault: vcpu 0 rip 0x0 address {gpa:#x} error_code 0x100000006\n"
    gfn = gpa // PAGE >> 9 * (level - 1) << 9 * (level - 1) if level else 0
    return line + (f"{HEAD}kvm_mmu_set_spte: gfn {gfn:x} spte 114800ee7 (rwxu) level {level} at 1\n" if level else "")


def convert(first: int, end: int, private: bool) -> str:
    return f"{HEAD}kvm_vm_set_mem_attributes: {first:#x} -- {end:#x} [{8 * private:#x}]\n"


def small(first: int, end: int) -> str:
    """4K faults on pages [first, end)."""
    return "".join(fault(page * PAGE, 1) for page in range(first, end))


def lowered(folder: Path, text: str, **options: Any) -> Lowered:
    path = folder / "log"
    path.write_text(SLOT + text)
    return load(path, LoweringOptions(page_size=W.PAGE_2M, **options))


def bounded(trace: Lowered, design: Design, **parameters: Any) -> RecordedBounds:
    def boot() -> Machine:
        layout = trace.layout
        machine = Machine(Config(design, pool=layout.inode_size, page_size=layout.page_size, **parameters))
        machine.create_vm(machine.create_process(), protected=trace.init == "private")
        machine.create_guest_memfd(layout.inode_size, shared=trace.init == "shared")
        return machine

    machine = boot()
    machine.run(trace.records)
    found = bounds(trace, machine.statistics, boot)
    if not trace.accesses:
        again = boot()
        statistics, unseen = replay_unseen(trace, again)
        assert unseen == found.unseen
        assert np.array_equal(statistics.words, found.upper.words)
        assert again.check() == 0
    return found


def test_a_design_with_smaller_leaves_faults_once_a_page_of_the_recorded_leaf(tmp_path: Path) -> None:
    """The recorded VM mapped 2M with one fault; restructure has split that page, and maps its 512 pages one by one."""
    text = convert(5, 6, False) + fault(0, 2) + fault(4 * M, 2)
    trace = lowered(tmp_path, text)
    found = bounded(trace, "restructure")
    assert found.levels == "recorded"
    assert found.faults == (2, 512 + 1)
    assert found.mapped == (PAGE + 2 * M, 2 * M + 2 * M)
    assert found.mapped_at == {PAGE: (PAGE, 2 * M), 2 * M: (2 * M, 2 * M), W.PAGE_1G: (0, 0)}
    # Of pfnmap one page stands apart, and whoever splits the leaf for it splits it for all.
    assert bounded(trace, "pfnmap").faults == (2, 512 + 1)


def test_larger_leaves_than_the_recorded_ones_hide_nothing(tmp_path: Path) -> None:
    trace = lowered(tmp_path, convert(2048 - 1, 2048, False) + small(0, 512))
    for design in ("restructure", "pfnmap"):
        found = bounded(trace, design)
        assert found.faults == (1, 1)
        assert found.mapped == (2 * M, 2 * M)
        assert found.beyond == (0, 0)
        assert found.unseen == 0


@pytest.mark.parametrize("design", ["restructure", "pfnmap"])
def test_what_was_dropped_beyond_and_kept_in_use_is_touched_again(tmp_path: Path, design: Design) -> None:
    """The recorded VM had 4K leaves: a conversion took one, and the guest went on with 511 that the log never shows."""
    trace = lowered(tmp_path, small(0, 512) + convert(7, 8, False))
    found = bounded(trace, design)
    assert found.beyond == (511 * PAGE, 511 * PAGE)
    assert found.faults == (1, 1 + 511)
    assert found.mapped == (0, 511 * PAGE)
    assert found.unseen == 511
    # Had the recorded VM mapped 2M, it would have dropped them, too, and its faults are in the log.
    found = bounded(lowered(tmp_path, fault(0, 2) + convert(7, 8, False) + fault(0, 1)), design)
    assert found.beyond == (511 * PAGE, 511 * PAGE)
    assert found.faults == (2, 2)


def test_a_zap_that_is_rounded_out_is_beyond_as_well(tmp_path: Path) -> None:
    """The what-if: 4K leaves around the converted page go with it, though no leaf reaches over the border."""
    text = convert(7, 8, False) + small(0, 100) + convert(50, 51, False)
    exact = bounded(lowered(tmp_path, text), "restructure")
    assert (exact.beyond, exact.faults) == ((0, 0), (100, 100))
    rounded = bounded(lowered(tmp_path, text), "restructure", zap="rounded")
    assert rounded.beyond == (99 * PAGE, 99 * PAGE)
    assert rounded.faults == (100, 199)


def test_without_levels_the_bounds_are_wide_and_say_so(tmp_path: Path) -> None:
    trace = lowered(tmp_path, convert(5, 6, False) + fault(0, 0) + fault(PAGE, 0))
    found = bounded(trace, "restructure")
    assert found.levels == "unknown"
    assert found.faults == (2, 512)
    assert found.mapped == (2 * PAGE, 2 * M)


def test_a_workload_has_all_accesses() -> None:
    trace = workload.open("tdx-boot")
    assert trace.accesses
    machine = Machine(Config("pfnmap", pool=trace.layout.inode_size, page_size=trace.layout.page_size))
    found = bounds(trace, machine.statistics, lambda: pytest.fail("nothing is to be run"))
    assert (found.levels, found.unseen) == ("accesses", 0)
    assert found.faults[0] == found.faults[1]


def test_memory_that_went_with_its_slot_is_not_touched(tmp_path: Path) -> None:
    gone = f"{HEAD}kvm_memslot: slot=0 flags=0x0 gpa=0x0 size=0x0 hva={HVA:#x}\n"
    found = bounded(lowered(tmp_path, convert(5, 6, False) + small(0, 10) + gone + SLOT), "restructure")
    assert found.faults == (10, 10)
    assert found.unseen == 0


def test_an_access_to_what_is_mapped_costs_nothing(tmp_path: Path) -> None:
    """Accesses are added where the machine may lack a page: where it does not, nothing is counted but the access."""
    trace = lowered(tmp_path, convert(2048 - 1, 2048, False) + fault(0, 2))
    found = bounded(trace, "pfnmap")
    assert found.unseen == 512
    assert found.faults == (1, 1)
    results = found.upper.results(Operation.GUEST_FAULT)
    assert results == {W.RET_PF_FIXED: 1, W.RET_PF_SPURIOUS: 512}
    assert found.upper.event(Event.GUEST_FAULT) == 1
