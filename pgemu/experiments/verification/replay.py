"""A recorded VM on a machine: what went into KVM is done to the model, and what changed is what the log should have.

One process has the memory behind the slots, and each address space of KVM is a VM of it, since both have trees of their
own over the same memory (x86: system management mode). What KVM does to both at once is done to both here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from pgemu.experiments.verification.host import GMEM, Host, Slot
from pgemu.experiments.verification.matching import Difference, Matching
from pgemu.experiments.verification.tree import Change, Format, Key, Tree
from pgemu.trace.guest_addresses import is_qualification
from pgemu_kernels import words as W
from pgemu_kernels.formats.bits import ADDRESS
from pgemu_kernels.words.operations import PAGE_2M, PAGE_4K

if TYPE_CHECKING:
    from pgemu.objects.machine import Machine
    from pgemu.objects.vm import Vm

__all__ = ("SMM_SLOTS", "Replay", "Side")

SMM_SLOTS = 1 << 16
"""Slots from this number on are those of the second address space: as_id in the upper half of the number."""

_LOG_DIRTY, _READ_ONLY, _GUEST_MEMFD = 1, 2, 4  # KVM_MEM_*, include/uapi/linux/kvm.h
_PRIVATE = 8  # KVM_MEMORY_ATTRIBUTE_PRIVATE
_MAPPED = W.RET_PF_FIXED, W.RET_PF_SPURIOUS
_TOP_GPA = 1 << 48
_MOST_BYTES = 1 << 52
_LEVELS = 4
_BLOCK = 512  # pages of 2M


@dataclass
class Side:
    """An address space: the VM that stands for it, its tree as last seen, its slots."""

    vm: Vm
    tree: Tree
    slots: dict[int, Slot] = field(default_factory=dict)

    def slot_at(self, gpa: int) -> Slot | None:
        """The slot that has a guest address."""
        return next((slot for slot in self.slots.values() if slot.gpa <= gpa < slot.gpa + slot.size), None)

    def shown(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Guest frames [first, end) that show userspace addresses [start, end)."""
        for slot in self.slots.values():
            low, high = max(start, slot.hva), min(end, slot.hva + slot.size)
            if low < high:
                yield (slot.gpa + low - slot.hva) >> 12, -(-(slot.gpa + high - slot.hva) // PAGE_4K)


class Replay:
    """A VM of a log on a machine.

    :param host: the memory behind its slots
    :param sides: how many address spaces it has
    :param prove: CONFIG_KVM_PROVE_MMU
    :param sets: whether the log has kvm_mmu_set_spte
    """

    def __init__(
        self, machine: Machine, host: Host, matching: Matching, *, sides: int, protected: bool, prove: bool, sets: bool
    ) -> None:
        self.machine = machine
        self.host = host
        self.matching = matching
        self.ended = False
        self.refused: Counter[str] = Counter()
        self._fmt = Format.of(machine)
        self._prove = prove
        self._sets = sets
        self._protected = protected
        self.sides = [self._side(space) for space in range(sides)]
        self._attributes: list[tuple[int, int, bool]] = []
        self._wanted: dict[int, list[tuple[Key, int, int]]] = {}  # task -> leaves whose kvm_mmu_set_spte is to come
        self._space_of: dict[int, int] = {}  # task -> address space of its last fault
        self._faulted: dict[int, int] = {}  # task -> userspace address of its last fault, -1: none

    def _side(self, space: int) -> Side:
        vm = self.machine.create_vm(self.host.process, kind="sw" if self._protected else "plain")
        if space:  # generations of address spaces begin with their number: kvm_main.c:kvm_create_vm()
            self.machine.arrays.state[self._generation(vm)] = space
        return Side(vm, Tree(self.machine, self._fmt, space, self.matching.printed))

    @staticmethod
    def _generation(vm: Vm) -> int:
        return int(W.STATE_VMS) + vm.vm * W.V_WORDS + int(W.V_GENERATION)

    # ------------------------------------------------------------------ what changed

    def _look(self, side: Side, gfn: int, end: int) -> list[Change]:
        """What became other over guest frames [gfn, end): expected in the log from now on."""
        changes = side.tree.changes(side.vm.root, gfn, end)
        placed = [
            change._replace(place=self._place(side, change.key[2]))
            if self._fmt.is_leaf(change.new, change.key[1])
            else change
            for change in changes
        ]
        self.matching.expect(placed)
        return changes

    def _look_everywhere(self, start: int, end: int) -> None:
        """The same of whatever shows userspace addresses [start, end); of huge pages, which may be split, all of it."""
        unit = _BLOCK if self.host.is_thp(start) else 1
        for side in self.sides:
            for gfn, last in side.shown(start, end):
                self._look(side, gfn & -unit, -(-last // unit) * unit)

    def _place(self, side: Side, gfn: int) -> int | None:
        """The page of memory that a guest frame shows."""
        slot = side.slot_at(gfn << 12)
        if slot is None:
            return None
        page = gfn - (slot.gpa >> 12)
        return GMEM + page if self._is_private(gfn) else (slot.hva >> 12) + page

    def _is_private(self, gfn: int) -> bool:
        changes = reversed(self._attributes)
        return next((private for start, end, private in changes if start <= gfn < end), False)

    # ------------------------------------------------------------------ accesses

    def guest_fault(self, row: list[int], space: int) -> None:
        """kvm_page_fault, in an address space."""
        task, address, code = row[2], row[4], row[5]
        side = self.sides[space]
        self._space_of[task] = space
        fetch = code >> (2 if bool(is_qualification(np.array([code], np.uint64))[0]) else 4) & 1
        result = side.vm.touch(address, write=bool(code & 2), execute=bool(fetch))
        gfn = address >> 12
        changes = self._look(side, gfn & -_BLOCK, (gfn & -_BLOCK) + _BLOCK)
        slot = side.slot_at(address)
        self._faulted[task] = -1
        if slot is not None:
            self._faulted[task] = hva = (slot.hva + address - slot.gpa) & -PAGE_4K
            if changes:  # a page that was copied goes wherever else it is shown
                self._look_everywhere(hva, hva + PAGE_4K)
        if self._sets and result.status in _MAPPED:
            leaves = (change for change in changes if self._fmt.is_leaf(change.new, change.key[1]))
            made = [(change.key, change.new, row[3]) for change in leaves]
            self._wanted.setdefault(task, []).extend(made)

    def host_fault(self, row: list[int]) -> None:
        """page_fault_user."""
        task, address, code = row[2], row[4], row[5]
        self._faulted[task] = address & -PAGE_4K
        if self.host.holds(address, address + 1):
            self.host.process.touch(address, write=bool(code & 2), execute=bool(code & 16))
            self._look_everywhere(address & -PAGE_2M, (address & -PAGE_2M) + PAGE_2M)

    def is_copy(self, row: list[int]) -> bool:
        """Whether an unmap is that of the page on which its task has just faulted: it is copied, wp_page_copy()."""
        fault = self._faulted.get(row[2], -1)
        sizes = (PAGE_4K, PAGE_2M) if self.host.is_thp(fault) else (PAGE_4K,)
        return any(row[4] == fault & -size and row[5] == row[4] + size for size in sizes)

    # ------------------------------------------------------------------ memory that goes

    def unmap(self, start: int, end: int, *, advised: bool = False) -> None:
        """Userspace addresses [start, end) are unmapped: by a system call, or kvm_unmap_hva_range says so."""
        for low, high in self.host.clipped(start, end):
            self.host.process.zap(low, high - low, madvise=advised)
            self._unmapped(low, high)

    def collapse(self, start: int, end: int) -> None:
        """khugepaged puts a huge page in the place of small ones: mm/khugepaged.c:collapse_huge_page()."""
        for low, high in self.host.clipped(start, end):
            self.host.process.madvise_collapse(low, high - low)
            self._unmapped(low, high)

    def punch(self, offset: int, length: int, hva: int) -> None:
        """A hole in the file that is mapped at `hva`, or (0) in the guest_memfd."""
        if not 0 < length <= _MOST_BYTES or offset > _MOST_BYTES:
            self.refused[f"hole, errno {W.EINVAL}"] += 1
            return
        found = self.host.file_at(hva) if hva else None
        if found is not None:
            start, file = found
            file.punch_hole(offset, length)
            self._unmapped(start + offset, start + offset + length)
        elif not hva and self.host.gmem is not None:
            self.host.gmem.punch_hole(offset, length)
            for side in self.sides:
                for slot in side.slots.values():
                    if slot.flags & _GUEST_MEMFD:
                        first = slot.gpa + offset
                        self._look(side, first >> 12, first + length >> 12)
            self.matching.pages.leave_range(GMEM + (offset >> 12), GMEM + (offset + length >> 12))

    def _unmapped(self, start: int, end: int) -> None:
        self._look_everywhere(start, end)
        self.matching.pages.leave_range(start >> 12, end >> 12)

    # ------------------------------------------------------------------ what userspace asks of KVM

    def log_dirty(self, key: Key, on: bool) -> bool:
        """Dirty logging of the slot over an entry is switched on or off."""
        side = self.sides[key[0]]
        slot = side.slot_at(key[2] << 12)
        if slot is None or bool(slot.flags & _LOG_DIRTY) == on:
            return False
        self.memslot(slot._replace(flags=slot.flags ^ _LOG_DIRTY))
        return True

    def write(self, space: int, address: int) -> bool:
        """A guest page is written by the kernel, or was before the log began: whether that makes a difference."""
        slot = self.sides[space].slot_at(address)
        if slot is None:
            return False
        hva = (slot.hva + address - slot.gpa) & -PAGE_4K
        done = self.host.process.touch(hva, write=True).status
        self._look_everywhere(hva, hva + PAGE_4K)
        return done >= 0

    def is_writable(self, space: int, address: int) -> bool:
        """Whether the process has a page behind a guest address that can be written."""
        slot = self.sides[space].slot_at(address)
        if slot is None:
            return False
        return self.host.is_writable((slot.hva + address - slot.gpa) & -PAGE_4K)

    def memslot(self, slot: Slot) -> None:
        """KVM_SET_USER_MEMORY_REGION2."""
        if slot.number // SMM_SLOTS >= len(self.sides):
            self.refused[f"memory slot, errno {W.EINVAL}"] += 1
            return
        side = self.sides[slot.number // SMM_SLOTS]
        number = slot.number % SMM_SLOTS
        gmem = None
        if slot.flags & _GUEST_MEMFD and slot.size:
            size = slot.size
            gmem = self.host.gmem or self.machine.create_guest_memfd_4k(size, mmap=False, init_shared=False)
            self.host.gmem = gmem
        old = side.slots.get(number)
        status = side.vm.set_memory_region(
            number, slot.gpa, slot.size, slot.hva, read_only=bool(slot.flags & _READ_ONLY),
            log_dirty_pages=bool(slot.flags & _LOG_DIRTY), gmem=gmem,
        ).status  # fmt: skip
        if status:
            self.refused[f"memory slot, errno {-status}"] += 1
            return
        if old is not None and (slot.size == 0 or old.gpa != slot.gpa):
            del side.slots[number]
            if self._protected:
                self._look(side, old.gpa >> 12, old.gpa + old.size >> 12)
            else:
                self.drop_trees(side)
        if slot.size:
            if slot.flags & _LOG_DIRTY:
                self.matching.may_wait()
            side.slots[number] = slot
            self._look(side, slot.gpa >> 12, slot.gpa + slot.size >> 12)

    def drop_trees(self, done: Side | None = None) -> None:
        """kvm_mmu_zap_all_fast(): the trees of all address spaces go; of `done` the model has dropped it by now."""
        for side in self.sides:
            self.matching.expect(side.tree.drop(shared=True, prove=self._prove), late=True)
            if side is not done:
                self._drop(side)

    def _drop(self, side: Side) -> None:
        """Drop a tree: a slot comes and goes, which is not to count as a change of slots."""
        generation = self._generation(side.vm)
        state = self.machine.arrays.state
        kept = int(state[generation])
        number = next(number for number in range(int(W.SLOT_IDS) - 1, -1, -1) if number not in side.slots)
        gpas = range(_TOP_GPA - PAGE_4K, 0, -PAGE_4K)
        gpa = next(gpa for gpa in gpas if side.slot_at(gpa) is None)
        for size in (PAGE_4K, 0):
            status = side.vm.set_memory_region(number, gpa, size, self.host.spans[0].start).status
            assert status == 0, status
        state[generation] = kept

    def set_attributes(self, gfn: int, end: int, attributes: int) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES."""
        private = bool(attributes & _PRIVATE)
        if not gfn < end <= _TOP_GPA // PAGE_4K:
            self.refused[f"memory attributes, errno {W.EINVAL}"] += 1
            return
        for side in self.sides:
            status = side.vm.set_attributes(gfn << 12, end - gfn << 12, private=private).status
            if status:
                self.refused[f"memory attributes, errno {-status}"] += 1
            self._look(side, gfn & -_BLOCK, -(-end // _BLOCK) * _BLOCK)
        self._attributes.append((gfn, end, private))

    def read_dirty_log(self, key: Key) -> bool:
        """KVM_GET_DIRTY_LOG, KVM_CLEAR_DIRTY_LOG: dirty pages of the slot over an entry are write-protected again."""
        side = self.sides[key[0]]
        slot = side.slot_at(key[2] << 12)
        if slot is None or not slot.flags & _LOG_DIRTY:
            return False
        side.vm.dirty_log(slot.number % SMM_SLOTS)
        self._look(side, slot.gpa >> 12, slot.gpa + slot.size >> 12)
        return True

    def prefault(self, key: Key) -> bool:
        """KVM_PRE_FAULT_MEMORY of a page."""
        side = self.sides[key[0]]
        gpa = key[2] << 12
        if side.slot_at(gpa) is None:
            return False
        side.vm.prefault(gpa, PAGE_4K)
        self._look(side, key[2] & -_BLOCK, (key[2] & -_BLOCK) + _BLOCK)
        return True

    def end(self) -> None:
        """The VM goes: kvm_mmu_zap_all()."""
        for side in self.sides:
            self.matching.expect(side.tree.drop(shared=False, prove=self._prove), late=True)
            side.vm.close()
        self.ended = True

    # ------------------------------------------------------------------ what the log says of a fault's end

    def set_spte(self, row: list[int]) -> None:
        """Compare a kvm_mmu_set_spte: the leaf that the task's fault ended at."""
        task, line, gfn, level, entry = row[2], row[3], row[5], row[6], row[7]
        wanted = self._wanted.get(task, [])
        position = next((i for i, (key, _, _) in enumerate(wanted) if key[1:] == (level, gfn)), -1)
        if position >= 0:
            key, model, _ = wanted.pop(position)
        else:  # nothing had to change
            key = (self._space_of.get(task, 0), level, gfn)
            there = self.sides[key[0]].tree.entry(level, gfn) if 1 <= level <= _LEVELS else None
            model = there if there is not None and self._fmt.is_leaf(there, level) else 0
        kind = self._how(key, entry, model, row[8])
        if kind:
            found = Difference(kind, line, key, (0, entry), (0, model) if model else None, event="kvm_mmu_set_spte")
            self.matching.note(found)
        else:
            self.matching.agreed["kvm_mmu_set_spte"] += 1

    def _how(self, key: Key, entry: int, model: int, at: int) -> str:
        """How what kvm_mmu_set_spte says differs from a leaf of the model, "" if it does not; `at`: where it stands."""
        if not model:
            return "not in the model"
        if (entry ^ model) & ~(ADDRESS | self._fmt.marks):
            return "flags"
        if self.matching.pages.ours.get((entry & ADDRESS) >> 12) != (model & ADDRESS) >> 12:
            return "frame"
        space, level, gfn = key
        shift = 9 * level
        table = self.matching.printed.get((space, level + 1, gfn >> shift << shift))
        index = gfn >> shift - 9 & 511
        return "" if table is None or at == (table & ADDRESS) + 8 * index else "address"

    def finish(self, unanswered: Collection[int]) -> None:
        """The log has ended: which leaves no kvm_mmu_set_spte named; `unanswered`: as in matching."""
        for wanted in self._wanted.values():
            for key, model, since in wanted:
                if since in unanswered or self.matching.is_last(since):
                    continue
                self.matching.note(Difference("not in the log", since, key, None, (0, model), event="kvm_mmu_set_spte"))
