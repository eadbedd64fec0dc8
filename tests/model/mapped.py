"""Pages that KVM itself maps: kvm_vcpu_map(), which holds them, and gfn_to_pfn_cache, which notifiers invalidate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from model.faults import Faults
from model.folio import Folio
from model.outcome import OK, Outcome
from model.parameters import PAGE
from pgemu_kernels import words as W

MOST = 256


class Found(NamedTuple):
    """A page of a process, as KVM finds it."""

    folio: Folio
    pfn: int
    inode: int
    index: int
    special: bool


@dataclass
class Mapped:
    """One of them. `place`: page of the process; `slots`: how often the VM's slots had changed at the look-up."""

    vm: int
    write: bool
    cache: bool
    place: int | None = None
    found: Found | None = None
    valid: bool = True
    slots: int = 0
    held: str = ""  # "pin", "reference", or nothing


class Mappings(Faults):
    """NESTED_MAP and NESTED_UNMAP."""

    stale_private = 0  # accesses to pages that are private,
    stale_freed = 0  # ... or nobody's for KVM any more
    was_stale = False  # whether a recount met a mapping that shows either

    def place_in(self, vm: int, gpa: int) -> int | None:
        """Page of the VM's process behind a guest address."""
        slot = next((s for s in self.slots if s.owner == vm and gpa // PAGE in s.pages), None)
        if slot is None or slot.place is None:
            return None
        return slot.place + gpa // PAGE - slot.pages.start

    def follow(self, vm: int, page: int, write: bool, pin: bool = False) -> Found | None:
        """hva_to_pfn(), hva_to_pfn_remapped(): what cannot be pinned is not faulted in for a `pin`."""
        space = self.vm_space[vm]
        vma = next((v for v in self.vmas if v.owner == space and page in v.pages), None)
        if vma is None:
            return None
        special = self.is_special(vma)
        if (pin and not self.parameters.allow_unsafe_mappings) if special else (write and vma.read_only):
            return None
        host = self.spaces[space]
        if host.find(page) is None:
            status = self.host_fault(space, page * PAGE, write).status
            if status & (W.VM_FAULT_OOM | W.VM_FAULT_SIGBUS | W.VM_FAULT_SIGSEGV | W.VM_FAULT_HWPOISON):
                return None
        there = host.find(page)
        assert there is not None
        level, entry = there
        if special and write and not entry.writable:
            return None
        pfn = entry.pfn + page % (1 << 9 * (level - 1))
        folio = self.memory.folio_of(pfn)
        assert folio is not None
        if special and not self.parameters.pins_mapped and pfn != folio.head + folio.unit(pfn):
            return None  # the refcount of a tail page is zero
        return Found(folio, pfn, vma.inode, vma.file_page(page), special)

    # ------------------------------------------------------------------ kvm_vcpu_map()

    def map_page(self, vm: int, gpa: int, number: int, write: bool) -> Outcome:
        if number >= MOST:
            return Outcome(-W.EINVAL)
        if number in self.mapped:
            return Outcome(-W.EEXIST)
        place = self.place_in(vm, gpa)
        pins = self.parameters.pins_mapped
        found = None if place is None else self.follow(vm, place, write, pins)
        if found is None:
            return Outcome(-W.EINVAL)
        held = "" if found.special and pins else "pin" if pins else "reference"
        self.mapped[number] = Mapped(vm, write, False, place, found, held=held)
        self.hold(self.mapped[number], 1)
        return Outcome(0, found.pfn)

    def hold(self, mapped: Mapped, n: int) -> None:
        """What it holds comes, or goes again."""
        if mapped.held:
            assert mapped.found is not None
            folio, pfn = mapped.found[:2]
            counts = folio.pinned if mapped.held == "pin" else folio.kept
            counts[folio.unit(pfn)] += n
            if n < 0:
                self.memory.dropped(folio)

    def unmap_page(self, number: int) -> Outcome:
        mapped = self.mapped.pop(number, None)
        if mapped is None:
            return Outcome(-W.ENOENT)
        self.hold(mapped, -1)
        return OK

    # ------------------------------------------------------------------ gfn_to_pfn_cache

    def refresh(self, vm: int, gpa: int, length: int, number: int) -> Outcome:
        """kvm_gpc_activate(), kvm_gpc_refresh()."""
        if number >= MOST or gpa % PAGE + length > PAGE:
            return Outcome(-W.EINVAL)
        mapped = self.mapped.get(number)
        if mapped is not None and (not mapped.cache or mapped.vm != vm):
            return Outcome(-W.EEXIST)
        if mapped is None:
            mapped = self.mapped[number] = Mapped(vm, True, True, valid=False)
        place = self.place_in(vm, gpa)
        mapped.slots = self.slot_changes[vm]
        if not (mapped.valid and mapped.place == place):
            mapped.place = place
            mapped.found = None if place is None else self.follow(vm, place, True)
            mapped.valid = mapped.found is not None
        return Outcome(0, mapped.found.pfn) if mapped.found else Outcome(-W.EFAULT)

    def usable(self, mapped: Mapped) -> bool:
        """kvm_gpc_check()"""
        return not mapped.cache or (mapped.valid and mapped.slots == self.slot_changes[mapped.vm])

    def access(self, number: int, write: bool) -> Outcome:
        """KVM reads or writes by a mapping."""
        if number >= MOST:
            return Outcome(-W.EINVAL)
        mapped = self.mapped.get(number)
        if mapped is None:
            return Outcome(-W.ENOENT)
        if not self.usable(mapped):
            return Outcome(-W.EFAULT)
        if write and not mapped.write:
            return Outcome(-W.EINVAL)
        private, freed = self.left_behind(mapped)
        self.stale_private += private
        self.stale_freed += freed
        assert mapped.found is not None
        return Outcome(0, mapped.found.pfn)

    def left_behind(self, mapped: Mapped) -> tuple[bool, bool]:
        """Whether its page is private now, or not the inode's any more and held by nobody."""
        assert mapped.found is not None
        _, pfn, inode, index, _ = mapped.found
        if self.pfn(inode, index) != pfn:
            return False, not mapped.held
        return index not in self.inodes[inode].shared, False

    def note_stale(self) -> None:
        """The recount looks at every mapping."""
        usable = [mapped for mapped in self.mapped.values() if self.usable(mapped)]
        self.was_stale |= any(any(self.left_behind(mapped)) for mapped in usable)
