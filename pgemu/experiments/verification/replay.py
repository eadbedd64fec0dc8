"""Replays what a log says went into KVM, and compares what it says came out with what the model did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pgemu.experiments.verification.host import GMEM, Host, Slot
from pgemu.experiments.verification.matching import Difference, Line, Matching
from pgemu.experiments.verification.tree import Change, Format, Tree
from pgemu.trace.events import Input
from pgemu.trace.guest_addresses import is_qualification
from pgemu.trace.outcomes import Kept
from pgemu_kernels import words as W
from pgemu_kernels.formats.bits import ADDRESS
from pgemu_kernels.words.operations import PAGE_2M, PAGE_4K, Flag

if TYPE_CHECKING:
    from pgemu.objects.machine import Machine
    from pgemu.objects.vm import Vm

SMM_SLOTS = 1 << 16
_LOG_DIRTY, _READ_ONLY, _GUEST_MEMFD = 1, 2, 4
_PUNCH = 2
_PRIVATE = 8
_MAPPED = W.RET_PF_FIXED, W.RET_PF_SPURIOUS
_ALL = 1 << 36


@dataclass
class Side:
    """One address space of a VM: the VM that stands for it, its tree as last seen, its slots."""

    space: int
    vm: Vm
    tree: Tree
    slots: dict[int, Slot] = field(default_factory=dict)

    def place(self, gfn: int, private: bool = False) -> int | None:
        """The page of memory behind a guest frame."""
        gpa = gfn << 12
        for slot in self.slots.values():
            if slot.gpa <= gpa < slot.gpa + slot.size:
                return GMEM + gfn - (slot.gpa >> 12) if private else (slot.hva + gpa - slot.gpa) >> 12
        return None

    def shown(self, start: int, end: int) -> Iterable[tuple[int, int]]:
        """Guest frames [first, end) that show userspace addresses [start, end)."""
        for slot in self.slots.values():
            low, high = max(start, slot.hva), min(end, slot.hva + slot.size)
            if low < high:
                yield (slot.gpa + low - slot.hva) >> 12, -(-(slot.gpa + high - slot.hva) // PAGE_4K)


class Replay:
    """A VM of a log on a machine."""

    def __init__(self, machine: Machine, host: Host, *, protected: bool, prove: bool, sets: bool, two: bool) -> None:
        self.machine = machine
        self.host = host
        self.fmt = Format.of(machine)
        self.match = Matching(self.fmt)
        self.prove = prove
        self.sets = sets
        self.protected = protected
        self.sides = [self._side(space) for space in range(2 if two else 1)]
        self.ended = False
        self.private: set[tuple[int, int]] = set()
        self.attributes: list[tuple[int, int, bool]] = []
        self.done: Counter[str] = Counter()
        self.wanted: dict[int, list[tuple[int, int, int, int]]] = {}  # task -> set_spte lines that are to come
        self.space_of: dict[int, int] = {}
        self.faulted: dict[int, int] = {}  # task -> userspace address of its last fault
        self.guessed: Counter[str] = Counter()

    def _side(self, space: int) -> Side:
        vm = self.machine.create_vm(self.host.process, kind="sw" if self.protected else "plain")
        if space:
            # include/linux/kvm_host.h: generations of address spaces begin with their number
            self.machine.arrays.state[int(W.STATE_VMS) + vm.vm * W.V_WORDS + int(W.V_GENERATION)] = space
        return Side(space, vm, Tree(self.machine, self.fmt, space, self.match.printed))

    # ------------------------------------------------------------------ what changed

    def _expect(self, side: Side, changes: list[Change]) -> None:
        placed = [
            change._replace(place=side.place(change.key[2], self._is_private(change.key[2])))
            if self.fmt.is_leaf(change.new, change.key[1])
            else change
            for change in changes
        ]
        self.match.expect(placed)

    def look(self, side: Side, gfn: int, end: int) -> list[Change]:
        changes = side.tree.changes(side.vm.root, gfn, end)
        self._expect(side, changes)
        return changes

    def look_everywhere(self, start: int, end: int) -> None:
        """What became of leaves over userspace addresses [start, end)."""
        for side in self.sides:
            for gfn, last in side.shown(start, end):
                self.look(side, gfn, last)

    def _is_private(self, gfn: int) -> bool:
        return self.protected and any(low <= gfn < high and kind for low, high, kind in reversed(self.attributes[-1:])) if False else self._kind(gfn)

    def _kind(self, gfn: int) -> bool:
        if not self.protected:
            return False
        for low, high, private in reversed(self.attributes):
            if low <= gfn < high:
                return private
        return False

    # ------------------------------------------------------------------ inputs

    def is_copy(self, row: list[int]) -> bool:
        """Whether an unmap is that of the page which its task has just faulted on: it is copied (wp_page_copy())."""
        fault = self.faulted.get(row[2], -1)
        for size in (PAGE_4K, PAGE_2M):
            if row[4] == fault & -size and row[5] == row[4] + size:
                return True
        return False

    def read_log(self, key: tuple[int, int, int]) -> None:
        """KVM_GET_DIRTY_LOG, or KVM_CLEAR_DIRTY_LOG: the dirty pages of the slot of an entry are write-protected."""
        side = self.sides[key[0]]
        for slot in side.slots.values():
            if slot.flags & _LOG_DIRTY and slot.gpa <= key[2] << 12 < slot.gpa + slot.size:
                side.vm.dirty_log(slot.number)
                self.look(side, slot.gpa >> 12, slot.gpa + slot.size >> 12)
                self.guessed["dirty log"] += 1

    def guest_fault(self, row: list[int], space: int) -> None:
        _, _, task, _, address, code, *_ = row
        side = self.sides[space]
        fetch = code >> 2 & 1 if bool(is_qualification(np.array([code], np.uint64))[0]) else code >> 4 & 1
        result = side.vm.touch(address, write=bool(code & 2), execute=bool(fetch))
        gfn = address >> 12
        block = gfn & ~511
        changes = self.look(side, block, block + 512)
        place = side.place(gfn)
        self.faulted[task] = -1 if place is None else place << 12
        if place is not None:
            hva = place << 12
            for other in self.sides:
                for low, high in other.shown(hva, hva + PAGE_4K):
                    if other is not side or low != gfn:
                        self.look(other, low & ~511, (low & ~511) + 512)
        if self.sets and result.status in _MAPPED:
            for change in changes:
                if self.fmt.is_leaf(change.new, change.key[1]) :
                    self.wanted.setdefault(task, []).append((*change.key[1:], change.new, space))

    def host_fault(self, row: list[int]) -> None:
        address, code = row[4], row[5]
        self.faulted[row[2]] = address
        if not self.host.holds(address, address + 1):
            return
        self.host.process.touch(address, write=bool(code & 2), execute=bool(code & 16))
        self.look_everywhere(address & -PAGE_2M, (address & -PAGE_2M) + PAGE_2M)

    def unmap(self, start: int, end: int, *, advised: bool = False) -> None:
        for low, high in self.host.clipped(start, end):
            self.host.process.zap(low, high - low, madvise=advised)
            self.look_everywhere(low & -PAGE_2M, -(-high // PAGE_2M) * PAGE_2M)
            self.match.pages.leave_range(low >> 12, high >> 12)

    def collapse(self, start: int, end: int) -> None:
        for low, high in self.host.clipped(start, end):
            self.host.process.madvise_collapse(low, high - low)
            self.look_everywhere(low, high)
            self.match.pages.leave_range(low >> 12, high >> 12)

    def memslot(self, row: list[int]) -> None:
        number, flags, gpa, size, hva = row[4:9]
        side = self.sides[number >= SMM_SLOTS] if len(self.sides) > 1 else self.sides[0]
        number %= SMM_SLOTS
        gmem = None
        if flags & _GUEST_MEMFD:
            gmem = self.host.gmem or self.machine.create_guest_memfd_4k(size, mmap=False, init_shared=False)
            self.host.gmem = gmem
        old = side.slots.get(number)
        result = side.vm.set_memory_region(
            number, gpa, size, hva, read_only=bool(flags & _READ_ONLY), log_dirty_pages=bool(flags & _LOG_DIRTY),
            gmem=gmem,
        )  # fmt: skip
        if result.status:
            self.done[f"memory slot refused ({result.status})"] += 1
            return
        if size == 0 or (old and old.gpa != gpa):
            side.slots.pop(number, None)
            if self.protected:
                assert old is not None
                self.look(side, old.gpa >> 12, old.gpa + old.size >> 12)
            else:
                self.drop_trees(side)
        if size:
            side.slots[number] = Slot(number, gpa, size, hva, flags)
            self.look(side, gpa >> 12, gpa + size >> 12)

    def drop_trees(self, side: Side) -> None:
        """kvm_mmu_zap_all_fast(): the trees of both address spaces go."""
        for one in self.sides:
            self.match.expect(one.tree.drop(shared=True, prove=self.prove), late=True)
            if one is not side:
                self._drop_other(one)

    def _drop_other(self, side: Side) -> None:
        state = self.machine.arrays.state
        row = int(W.STATE_VMS) + side.vm.vm * W.V_WORDS
        generation = int(state[row + int(W.V_GENERATION)])
        at = (1 << 47)
        assert side.vm.set_memory_region(32000, at, PAGE_4K, self.host.spans[0][0]).status == 0
        assert side.vm.set_memory_region(32000, at, 0, 0).status == 0
        state[row + int(W.V_GENERATION)] = generation

    def set_attributes(self, row: list[int]) -> None:
        gfn, end, attributes = row[4:7]
        private = bool(attributes & _PRIVATE)
        (side,) = self.sides
        status = side.vm.set_attributes(gfn << 12, end - gfn << 12, private=private).status
        if status:
            self.done[f"attributes refused ({status})"] += 1
            return
        self.attributes.append((gfn, end, private))
        self.look(side, gfn & ~511, end + 511 & ~511)

    def punch(self, offset: int, length: int, hva: int) -> None:
        if hva and (found := self.host.file_at(hva)):
            start, file = found
            file.punch_hole(offset, length)
            self.look_everywhere(start + offset, start + offset + length)
            self.match.pages.leave_range(start + offset >> 12, start + offset + length >> 12)
        elif self.host.gmem is not None:
            self.host.gmem.punch_hole(offset, length)
            for side in self.sides:
                for slot in side.slots.values():
                    if slot.flags & _GUEST_MEMFD:
                        self.look(side, slot.gpa + offset >> 12, slot.gpa + offset + length >> 12)
            self.match.pages.leave_range(GMEM + (offset >> 12), GMEM + (offset + length >> 12))

    def end(self) -> None:
        """The VM goes: kvm_mmu_zap_all()."""
        for side in self.sides:
            self.match.expect(side.tree.drop(shared=False, prove=self.prove), late=True)
            side.vm.close()
        self.ended = True

    # ------------------------------------------------------------------ outcomes

    def set_spte(self, row: list[int]) -> None:
        _, _, task, line, _, gfn, level, entry, at = row
        wanted = self.wanted.get(task, [])
        found = next((one for one in wanted if one[:2] == (level, gfn)), None)
        if found is not None:
            wanted.remove(found)
            model, space = found[2], found[3]
        else:
            space = self.space_of.get(task, 0)
            model = self.sides[space].tree.entry(level, gfn)
        key = (space, level, gfn)
        if model is None:
            self.match.note(Difference("not in the model", line, key, (0, entry), None, "kvm_mmu_set_spte"))
            return
        frames = self.match.pages
        flags = (entry ^ model) & ~ADDRESS
        ours = frames.ours.get((entry & ADDRESS) >> 12)
        if flags or ours != (model & ADDRESS) >> 12:
            kind = "flags" if flags else "frame"
            self.match.note(Difference(kind, line, key, (0, entry), (0, model), "kvm_mmu_set_spte"))
            return
        self.match.agreed["kvm_mmu_set_spte"] += 1
