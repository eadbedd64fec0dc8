"""Which VMs the MMU notifier reaches: those of the mm, while both are alive, by every slot that shows the pages."""

from __future__ import annotations

import pytest

from pgemu.machine.config import Config
from pgemu.machine.designs import DESIGNS
from pgemu.objects.address_space import AddressSpace
from pgemu.objects.machine import Machine
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Event

PAGE, M2 = W.PAGE_4K, W.PAGE_2M
VA = 0x7F00_0000_0000
COUNTED = (Event.NOTIFIER_CALL, Event.SPTE_CLEARED, Event.TLB_FLUSH_VM)


class Scene:
    """One shared inode that two processes map."""

    def __init__(self, design: str) -> None:
        self.machine = Machine(Config(design, pool=4 * M2, page_size=M2))  # type: ignore[arg-type]
        self.gmem = self.machine.create_guest_memfd(2 * M2, shared=True)
        self.processes = [self.machine.create_process() for _ in range(2)]
        for process in self.processes:
            assert process.mmap(self.gmem, VA).status == 0

    def zapped(self, process: AddressSpace, page: int = 0) -> tuple[int, ...]:
        """What the notifier does when a process unmaps a page."""
        before = self.machine.statistics
        assert process.zap(VA + page * PAGE, PAGE).status == 0
        after = self.machine.statistics
        assert self.machine.check() == 0
        return tuple(after.event(event) - before.event(event) for event in COUNTED)


@pytest.mark.parametrize("design", DESIGNS)
def test_all_vms_of_the_process_and_no_others(design: str) -> None:
    scene = Scene(design)
    mine, other = scene.processes
    vms = [scene.machine.create_vm(process) for process in (mine, other, mine)]
    for vm in vms:
        assert vm.bind(scene.gmem, 0).status == 0
        vm.touch(0)
    assert scene.zapped(mine) == (2, 2, 2)
    assert scene.zapped(mine) == (2, 0, 0)
    assert scene.zapped(other) == (1, 1, 1)
    vms[0].touch(0)
    assert vms[2].close().status == 0  # kvm_destroy_vm(): mmu_notifier_unregister()
    assert scene.zapped(mine) == (1, 1, 1)
    assert vms[0].close().status == 0
    assert scene.zapped(mine) == (0, 0, 0)


def test_a_vm_outlives_its_process_and_hears_of_no_other() -> None:
    """__mmput(), mmu_notifier_release(): the VM holds the mm of the process that ended, so nobody else gets its row."""
    scene = Scene("restructure")
    vm = scene.machine.create_vm(scene.processes[1])
    assert vm.bind(scene.gmem, 0).status == 0
    assert scene.processes[1].exit().status == 0
    assert vm.touch(0).status == W.RET_PF_FIXED
    heir = scene.machine.create_process()
    assert heir.space not in [process.space for process in scene.processes]
    assert heir.mmap(scene.gmem, VA).status == 0
    assert scene.zapped(heir) == (0, 0, 0)
    assert vm.touch(0).status == W.RET_PF_SPURIOUS


def test_every_slot_of_a_vm_until_it_is_deleted() -> None:
    """Slots over the same pages of different inodes are different slots; their list is cut anywhere."""
    scene = Scene("restructure")
    process = scene.processes[0]
    vm = scene.machine.create_vm(process, protected=True)
    for gpa, offset in ((0, 0), (16 * M2, PAGE), (32 * M2, 2 * PAGE), (48 * M2, 3 * PAGE)):
        assert vm.bind(scene.gmem, gpa, offset=offset, length=PAGE).status == 0
        vm.touch(gpa)
    assert vm.unbind(16 * M2).status == 0
    assert [scene.zapped(process, page) for page in range(4)] == [(1, 1, 1), (1, 0, 0), (1, 1, 1), (1, 1, 1)]
    assert vm.unbind(48 * M2).status == 0
    assert vm.unbind(0).status == 0
    vm.touch(32 * M2)
    assert vm.bind(scene.gmem, 64 * M2, offset=0, length=PAGE).status == 0
    vm.touch(64 * M2)
    assert [scene.zapped(process, page) for page in range(4)] == [(1, 1, 1), (1, 0, 0), (1, 1, 1), (1, 0, 0)]


# --------------------------------------------------------------------------- by address


@pytest.mark.parametrize("design", DESIGNS)
def test_another_mapping_of_the_file_is_nobodys_business(design: str) -> None:
    """kvm_handle_hva_range() goes by a slot's userspace_addr: the second mapping of the same pages has other ones."""
    scene = Scene(design)
    process = scene.processes[0]
    vm = scene.machine.create_vm(process, protected=True)
    assert vm.bind(scene.gmem, 0).status == 0
    assert process.mmap(scene.gmem, VA + (1 << 30)).status == 0
    vm.touch(0)
    before = scene.machine.statistics
    assert process.munmap(VA + (1 << 30), 2 * M2).status == 0
    after = scene.machine.statistics
    assert [after.event(event) - before.event(event) for event in COUNTED] == [1, 0, 0]  # KVM is asked all the same
    assert vm.touch(0).status == W.RET_PF_SPURIOUS
    assert scene.zapped(process) == (1, 1, 1)
    assert vm.touch(0).status == W.RET_PF_FIXED


@pytest.mark.parametrize("design", DESIGNS)
def test_whatever_lies_at_the_slots_address(design: str) -> None:
    """A slot over pages 512 to 1023 whose userspace_addr shows pages 0 to 511, and no slot at the other addresses."""
    scene = Scene(design)
    process = scene.processes[0]
    vm = scene.machine.create_vm(process, protected=True)
    assert vm.bind(scene.gmem, 0, offset=M2, length=M2, userspace_addr=VA).status == 0
    vm.touch(3 * PAGE)
    assert scene.zapped(process, 512 + 3) == (1, 0, 0)
    assert scene.zapped(process, 3) == (1, 1, 1)
    vm.touch(3 * PAGE)
    assert process.munmap(VA, M2).status == 0
    assert vm.touch(3 * PAGE).status == W.RET_PF_FIXED


@pytest.mark.parametrize("design", DESIGNS)
def test_the_first_mapping_gives_a_slot_its_address(design: str) -> None:
    """A slot that names none: where its process first maps its pages, also when that is later, and for good."""
    scene = Scene(design)
    process = scene.processes[0]
    assert process.munmap(VA, 2 * M2).status == 0
    vm = scene.machine.create_vm(process, protected=True)
    assert vm.bind(scene.gmem, 0).status == 0
    assert process.mmap(scene.gmem, VA + M2, offset=M2, length=M2).status == 0  # so page 0 would be at VA
    vm.touch(600 * PAGE)
    assert scene.zapped(process, 600) == (1, 1, 1)
    assert process.munmap(VA + M2, M2).status == 0
    assert process.mmap(scene.gmem, VA + (1 << 30)).status == 0
    vm.touch(600 * PAGE)
    assert scene.zapped(process, (1 << 18) + 600) == (1, 0, 0)
    assert process.mmap(scene.gmem, VA).status == 0
    assert scene.zapped(process, 600) == (1, 1, 1)


@pytest.mark.parametrize("address", [VA + 1, 1 << 47, (1 << 47) - M2])
def test_a_userspace_address_is_checked(address: int) -> None:
    """kvm_set_memory_region(): aligned, and access_ok() up to the slot's end. What lies there nobody checks."""
    scene = Scene("restructure")
    vm = scene.machine.create_vm(scene.processes[0], protected=True)
    assert vm.bind(scene.gmem, 0, userspace_addr=address).status == -W.EINVAL
    assert vm.bind(scene.gmem, 0, userspace_addr=PAGE).status == 0


def test_a_process_that_ends_takes_all_that_its_vms_map() -> None:
    """mmu_notifier_release(): also where a slot has no address, or one that nothing is mapped at."""
    scene = Scene("restructure")
    vm = scene.machine.create_vm(scene.processes[1], protected=True)
    assert vm.bind(scene.gmem, 0, length=M2, userspace_addr=PAGE).status == 0
    vm.touch(0)
    assert scene.processes[1].exit().status == 0
    assert vm.leaves() == (0, 0, 0)
    assert scene.machine.check() == 0
