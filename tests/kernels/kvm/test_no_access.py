"""A slot by host address over a VM_PFNMAP mapping without any access: KVM takes its entries all the same.

virt/kvm/kvm_main.c:hva_to_pfn_remapped() looks at no rights where an entry is there, and pte_present() is true of a
PROT_NONE one on x86.
"""

from __future__ import annotations

import pytest

from pgemu.objects.machine import Config, Machine
from pgemu_kernels import words as W

HVA, M2 = 0x7F00_0020_0000, W.PAGE_2M


@pytest.mark.parametrize("kernel", ["6.12", "6.18", "7.3"])
@pytest.mark.parametrize(("pages", "remap", "level"), [(4, False, 1), (512, False, 2), (4, True, 1)])
def test_a_device(kernel: str, pages: int, remap: bool, level: int) -> None:
    machine = Machine(Config(kernel=kernel))
    process = machine.create_process()
    vm = machine.create_vm(process)
    process.mmap_device(machine.create_device(1 << 20, pages, remap=remap), HVA)
    process.touch(HVA)
    vm.set_memory_region(0, 0, pages * W.PAGE_4K, HVA)
    assert process.protect(HVA, pages * W.PAGE_4K, 0).status == 0
    assert vm.touch(0) == (W.RET_PF_FIXED, level)
    assert machine.check() == 0, machine.findings


def test_guest_memfd_of_pfnmap() -> None:
    machine = Machine(Config("pfnmap", pool=8 * M2, page_size=M2))
    process = machine.create_process()
    vm = machine.create_vm(process)
    process.mmap(machine.create_guest_memfd(M2, shared=True), HVA)
    process.touch(HVA)
    vm.set_memory_region(0, 0, M2, HVA)
    vm.touch(0, write=True)
    assert process.protect(HVA, M2, 0).status == 0
    assert vm.touch(0).status == W.RET_PF_FIXED
    assert machine.check() == 0, machine.findings
