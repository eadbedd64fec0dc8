"""Faults in a slot over a process's mapping of a guest_memfd while a conversion holds the invalidate_lock."""

from __future__ import annotations

import pytest

from pgemu.machine.designs import DESIGNS, Design
from pgemu.objects.machine import Config, Machine
from pgemu_kernels import words as W
from pgemu_kernels.words.operations import Flag, Operation

M2, PAGE, VA, GPA = W.PAGE_2M, W.PAGE_4K, 0x7F00_0000_0000, 5 * W.PAGE_4K


@pytest.mark.parametrize("design", DESIGNS)
def test_a_fault_waits_for_the_conversion(design: Design) -> None:
    """hva_to_pfn() sleeps in ->fault: the access comes again, a prefault is -EBUSY. Afterwards the page is private,
    and userspace's fault ends in SIGBUS."""
    machine = Machine(Config(design, pool=M2, page_size=M2))
    gmem, process = machine.create_guest_memfd(M2, shared=True), machine.create_process()
    vm = machine.create_vm(process)
    assert process.mmap(gmem, VA).status == vm.set_memory_region(0, 0, M2, VA).status == 0
    machine.begin(0, Operation.CONVERT, flags=Flag.PRIVATE, offset=GPA, length=PAGE)
    lock = int(W.STATE_INODES) + gmem.inode * W.I_WORDS + int(W.I_LOCK)
    while machine.arrays.state[lock] < W.LOCK_WRITER:
        assert machine.step(0) == W.GO
    assert vm.touch(GPA) == (W.RET_PF_RETRY, 0)
    assert vm.prefault(GPA, PAGE) == (-W.EBUSY, 0)
    while machine.step(0) != W.STOP:
        pass
    assert vm.touch(GPA) == vm.prefault(GPA, PAGE) == (-W.EFAULT, 0)
    assert vm.touch(0) == (W.RET_PF_FIXED, 1)
    assert machine.check() == 0, machine.broken
