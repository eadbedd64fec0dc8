"""What is merged, twice: guest_memfd of 4K pages of the designs (restructure) and the ordinary kind do the same.

Faults, mprotect, mremap, MADV_DONTNEED, mlock, populate, guards, holes and guests through a slot by host address: after
each the results, the process's entries but for frames, and the leaves of stage 2 are equal.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pgemu.objects.machine import Config, Machine
from pgemu_kernels import words as W
from pgemu_kernels.formats import bits

PAGE, M2 = W.PAGE_4K, W.PAGE_2M
VA, FREE, GPA = 0x7C00_0000_0000, 0x7C00_1000_0000, 0x1_0000_0000
PAGES = 32
FRAME = bits.ADDRESS


def entries(process: Any) -> dict[int, int]:
    """4K entries of a process's mappings by address, without frame numbers."""
    found: dict[int, int] = {}
    ram = process.machine.arrays.ram

    def walk(table: int, level: int, base: int) -> None:
        words = ram[table >> 3 : (table >> 3) + 512]
        for index in np.flatnonzero(words).tolist():
            word, va = int(words[index]), base + (index << 12 + 9 * (level - 1))
            if level == 1:
                shown = word if word & 1 else ~word  # protection-none inverts the frame
                found[va] = word & ~FRAME if shown & FRAME else word
            elif word & 1:
                walk(word & FRAME, level - 1, va)

    walk(process.root, 4, 0)
    return found


class Twin:
    """A process that maps a file, and a VM with a slot by host address over the mapping."""

    def __init__(self, designs: bool) -> None:
        self.machine = Machine(Config("restructure", pool=8 * M2, page_size=PAGE, order="next4k"))
        self.process = self.machine.create_process()
        size = PAGES * PAGE
        self.file: Any = (
            self.machine.create_guest_memfd(size, shared=True)
            if designs
            else self.machine.create_guest_memfd_4k(size, mmap=True, init_shared=True)
        )
        assert self.process.mmap(self.file, VA).status == 0
        self.vm = self.machine.create_vm(self.process)
        assert self.vm.set_memory_region(0, GPA, size, VA).status == 0

    def do(self, what: str, page: int, count: int, flag: bool) -> Any:
        process, at, length = self.process, VA + page * PAGE, count * PAGE
        if what == "touch":
            status = process.touch(at, write=flag).status
            return 0 if status in (0, W.VM_FAULT_NOPAGE, W.VM_FAULT_LOCKED) else status
        if what == "guest":
            return self.vm.touch(GPA + page * PAGE, write=flag).status
        if what == "prot":
            return process.protect(at, length, 1 if flag else 3).status
        if what == "none":
            return process.protect(at, length, 0).status
        if what == "move":
            return process.remap(at, length, length, FREE + page * PAGE).status
        if what == "back":
            return process.remap(FREE + page * PAGE, length, length, at).status
        if what == "dontneed":
            return process.madvise_dontneed(at, length, locked=flag).status
        if what == "lock":
            return process.mlock(at, length, on_fault=flag).status
        if what == "unlock":
            return process.munlock(at, length).status
        if what == "populate":
            return process.populate(at, length, write=flag).status
        if what == "guard":
            return (process.guard_install if flag else process.guard_remove)(at, length).status
        return self.file.punch_hole(page * PAGE, min(count, PAGES - page) * PAGE).status


WHAT = ("touch", "guest", "prot", "none", "move", "back", "dontneed", "lock", "unlock", "populate", "guard", "punch")
STEP = st.tuples(st.sampled_from(WHAT), st.integers(0, PAGES - 1), st.integers(1, 8), st.booleans())


@settings(max_examples=40, deadline=None)
@given(st.lists(STEP, max_size=30))
def test_both_kinds_of_what_is_merged_do_the_same(steps: list[tuple[str, int, int, bool]]) -> None:
    twins = Twin(True), Twin(False)
    for step in steps:
        results = [twin.do(*step) for twin in twins]
        assert results[0] == results[1], step
        assert entries(twins[0].process) == entries(twins[1].process), step
        assert twins[0].vm.leaves() == twins[1].vm.leaves(), step
        assert twins[0].process.table_pages == twins[1].process.table_pages, step
        for twin in twins:
            assert twin.machine.check() == 0, (step, twin.machine.broken)


def scene(design: str) -> tuple[Machine, Any, Any, Any]:
    order = {"order": "next4k"} if design == "restructure" else {}
    machine = Machine(Config(design, pool=8 * M2, page_size=PAGE, **order))  # type: ignore[arg-type]
    process = machine.create_process()
    file = machine.create_guest_memfd(PAGES * PAGE, shared=True)
    assert process.mmap(file, VA).status == 0
    vm = machine.create_vm(process)
    assert vm.set_memory_region(0, GPA, PAGES * PAGE, VA).status == 0
    return machine, process, file, vm


def test_a_write_through_a_read_only_mapping_is_an_error_or_emulated() -> None:
    """kvm_main.c:hva_to_pfn_remapped(): KVM_PFN_ERR_RO_FAULT is for mmu.c:kvm_handle_error_pfn() to emulate."""
    for design, status in (("restructure", -W.EFAULT), ("pfnmap", W.RET_PF_EMULATE)):
        _, process, _, vm = scene(design)
        process.touch(VA, write=True)
        assert process.protect(VA, PAGE, 1).status == 0
        assert vm.touch(GPA, write=True).status == status
        assert vm.touch(GPA).status == W.RET_PF_FIXED
        assert process.munmap(VA, PAGE).status == 0
        assert vm.touch(GPA).status == -W.EFAULT


def test_kvm_enters_a_clean_entry_and_a_process_a_dirty_one() -> None:
    """insert_pfn() with write = false; who stores through the entry sets dirty, and KVM does not."""
    _, process, _, vm = scene("pfnmap")
    vm.touch(GPA, write=True)
    process.touch(VA + PAGE, write=True)
    dirty = [bool(process.walk(VA + page * PAGE)[-1][2] & bits.DIRTY) for page in (0, 1)]
    assert dirty == [False, True]


@pytest.mark.parametrize("design", ["restructure", "pfnmap"])
def test_what_a_pfn_mapping_refuses(design: str) -> None:
    """VM_PFNMAP is VM_SPECIAL: advice is -EINVAL, what would grow or be doubled -EFAULT; locks do nothing."""
    special = design == "pfnmap"
    _, process, file, _ = scene(design)
    assert process.mlock(VA, 4 * PAGE).status == 0
    assert len(entries(process)) == (0 if special else 4)
    assert process.madvise_dontneed(VA, PAGE).status == -W.EINVAL  # locked, or VM_PFNMAP
    assert process.madvise_dontneed(VA, PAGE, locked=True).status == (-W.EINVAL if special else 0)
    assert process.munlock(VA, 4 * PAGE).status == 0
    refused = -W.EINVAL if special else 0
    assert process.populate(VA, PAGE).status == refused
    assert process.guard_install(VA + 8 * PAGE, PAGE).status == refused
    assert process.guard_remove(VA + 8 * PAGE, PAGE).status == refused
    assert process.madvise_dontfork(VA, PAGE).status == 0
    assert process.madvise_dofork(VA, PAGE).status == refused
    assert process.remap(VA + 16 * PAGE, 4 * PAGE, 2 * PAGE).status == 0
    assert process.remap(VA + 16 * PAGE, 2 * PAGE, 3 * PAGE).status == (-W.EFAULT if special else 0)
    assert process.remap(VA, 0, PAGE, FREE).status == (-W.EFAULT if special else 0)
    assert process.mmap(file, FREE + M2, populate=True, locked=True).status == 0
    mapped = {va for va in entries(process) if va >= FREE + M2}
    assert len(mapped) == (0 if special else PAGES)


def test_a_child_gets_no_mapping_that_fork_was_told_to_leave_out() -> None:
    _, process, _, _ = scene("pfnmap")
    for page in range(4):
        process.touch(VA + page * PAGE, write=True)
    assert process.madvise_dontfork(VA + PAGE, 2 * PAGE).status == 0
    child = process.fork()
    assert sorted(entries(child)) == [VA, VA + 3 * PAGE]
    assert child.touch(VA + PAGE).status == W.VM_FAULT_SIGSEGV
