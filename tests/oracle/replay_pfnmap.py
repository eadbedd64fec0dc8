"""Runs captured scenarios of guest_memfd mapped three ways: as merged, as VM_PFNMAP, as that with holes that unmap.

The designs' machines run them: "plain" is restructure with 4K pages, which is what is merged, "pfnmap" is the preset
slides2025 of pfnmap, "unmap" is corrected. A scenario named "both" maps one file both ways on a machine of slides2025.
"plain" is also run by the ordinary kind of guest_memfd, on the machine that replays the other captures.

Compared: what replay_process compares; the frames that the scenario named, by what else has the same frame; their
struct pages (references, mapcount, uptodate, dirty, poison, mapping, index) and first words; what loads return.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

from oracle.capture import FRAME, Capture, Checkpoint, Operation
from oracle.consumers import Consumers
from oracle.operations import PARAMETER, MismatchError, NotModelledError, every, number, protection, returned
from oracle.process_tables import Entries, frame, size_of
from oracle.replay import Replay
from pgemu.machine.presets import PFNMAP
from pgemu.objects.files import GuestMemfd4K
from pgemu.objects.machine import Config, Machine
from pgemu.objects.vm import Vm
from pgemu_kernels import words as W

FLAG_PFNMAP, FLAG_UNMAP, FLAG_HUGE = 1 << 16, 1 << 17, 1 << 18  # of creation, in the kernel that was captured
ESTALE, EPERM, EIO = 116, 1, 5
VMEMMAP = 0xFFFF_EA00_0000_0000
UPTODATE, DIRTY, ON_LRU, HWPOISON = 1 << 3, 1 << 4, 1 << 5, 1 << 21
COMPARED = UPTODATE | DIRTY | HWPOISON
BUDDY = 0xF000_0000
TOUCHED, GUEST_TOUCHED = 0x5A5A_0000_0000_0000, 0xA5A5_0000_0000_0000  # what the i-th store writes, plus i


class Named(NamedTuple):
    """A frame that the scenario named: there, and here."""

    there: int
    here: int


class Kind(NamedTuple):
    """What a scenario's guest_memfd is, by its creation flags and by the module parameter that mmap() looks at.

    pfnmap: mapped as VM_PFNMAP. unmaps: punching a hole unmaps first. huge: folios of 2 MiB.
    """

    pfnmap: bool = False
    unmaps: bool = False
    huge: bool = False


def kind_of(checkpoints: list[Checkpoint]) -> Kind:
    """The kind of a scenario's files."""
    bits = 0
    pfnmap = False
    for operation in every(checkpoints):
        if operation.name == "gmem":
            bits |= int(operation.words[4], 0)
        pfnmap |= operation.words[:2] == ["write", PARAMETER] and operation.words[2] == "Y"
    return Kind(pfnmap or bool(bits & FLAG_PFNMAP), bool(bits & FLAG_UNMAP), bool(bits & FLAG_HUGE))


def is_for_designs(capture: Capture, checkpoints: list[Checkpoint]) -> bool:
    """Whether a scenario maps a guest_memfd of a kernel that the designs are of; "plain" ones are, too."""
    maps = any(op.name == "map" and op.words[4].startswith("gmem:") for op in every(checkpoints))
    protected = any(op.name == "vm" and op.words[2] == "1" for op in every(checkpoints))
    return capture.kernel == "7.3" and (any(kind_of(checkpoints)) or maps) and (maps or not protected)


def machine_of(kind: Kind, capture: Capture) -> Machine:
    """The machine that is like a kind of the captured kernel.

    Folios of 2 MiB are the page allocator's there, not HugeTLB pages, and so they are here.
    """
    common: dict[str, Any] = {
        "pool": 32 * W.PAGE_2M, "page_size": W.PAGE_4K, "kernel": capture.kernel, "stage2": capture.stage2,
        "pti": capture.pti, "nx_huge_pages": capture.haswell, "l1tf": capture.haswell,
        "protection_keys": not capture.haswell, "large_folios": kind.huge, "thp": "always",
    }  # fmt: skip
    if not kind.pfnmap and kind.huge:
        raise NotModelledError("large folios of the page allocator that entries count")
    if not kind.pfnmap:
        return Machine(Config("restructure", order="next4k", **common))
    preset = "corrected" if kind.unmaps else "slides2025"
    return Machine(Config("pfnmap", defects=PFNMAP[preset].defects, host_huge=kind.huge, **common))


class ReplayPfnmap(Consumers, Replay):
    """One scenario of guest_memfd, as the designs' kinds. like: the kind whose machine it is, if not its own."""

    def __init__(
        self, capture: Capture, checkpoints: list[Checkpoint], *, like: Kind | None = None,
        machine: Machine | None = None,
    ) -> None:  # fmt: skip
        self.kind = like or kind_of(checkpoints)
        super().__init__(capture, checkpoints, machine or machine_of(self.kind, capture))
        self.named: dict[str, Named] = {}
        self.pfnmap: set[str] = set()  # files that are mapped as VM_PFNMAP
        self.closed: dict[str, Any] = {}  # files without a descriptor that are still mapped
        self.gmem_pfnmap = False  # kvm.gmem_pfnmap
        self.elsewhere: set[int] = set()  # frames that served as something else there, as a page table

    # ------------------------------------------------------------------ operations

    def set_gmem_slot(self, vm: Vm, slot: int, gpa: int, size: int, hva: int, gmem: str, offset: int, bits: int) -> int:
        if isinstance(self.gmems[gmem], GuestMemfd4K):
            return super().set_gmem_slot(vm, slot, gpa, size, hva, gmem, offset, bits)
        if bits & 1:
            return -W.EINVAL  # check_memory_region_flags(): no dirty logging of guest_memfd
        if self.kind.huge and (gpa ^ hva) & (W.PAGE_2M - 1):
            raise NotModelledError("slot2 of large folios whose userspace address is not congruent to the guest's")
        return vm.bind(self.gmems[gmem], gpa, offset=offset, length=size, userspace_addr=hva).status

    def is_of_design(self, gmem: str) -> bool:
        return not isinstance(self.gmems[gmem], GuestMemfd4K)

    def op_gmem(self, operation: Operation, name: str, vm: str, size: str, bits: str) -> int | None:
        if not int(bits, 0) & 1:  # a VM's private memory, which nobody maps: of neither design
            return super().op_gmem(operation, name, vm, size, bits)
        if int(bits, 0) & 2 and vm in self.guests.protected:
            return -W.EINVAL  # kvm_gmem_get_valid_flags(): memory of such a VM starts out private
        made: Any = self.machine.create_guest_memfd(number(size), flags=int(bits, 0) & 3, form="next")
        self.gmems[name] = made
        if int(bits, 0) & FLAG_PFNMAP:
            self.pfnmap.add(name)
        return None

    def op_write(self, operation: Operation, path: str, value: str) -> None:
        if path == PARAMETER:
            self.gmem_pfnmap = value == "Y"
        elif not self.kind.pfnmap:  # which it does nothing to, as captured
            raise NotModelledError(f"write {path}")

    def op_map(self, operation: Operation, address: str, length: str, rights: str, kind: str, option: str = "") -> int:
        if not kind.startswith("gmem:"):
            return super().op_map(operation, address, length, rights, kind, option)
        at, size, prot = number(address), number(length), protection(rights)
        _, name, offset = kind.split(":")
        if prot & 4:
            return -EPERM  # the file system is mounted noexec: mm/mmap.c:do_mmap(), which pgemu is not asked
        counted = not (self.gmem_pfnmap or name in self.pfnmap)
        file: Any = self.gmems[name]
        result = self.process.mmap(
            file,
            at,
            offset=number(offset),
            length=size,
            read_only=not prot & 2,
            private=option == "private",
            counted=counted,
            populate=option == "populate",
            locked=option == "locked",
        )
        return at if result.status == 0 else result.status

    def op_touch(self, operation: Operation, address: str, stride: str, count: str, how: str) -> int:
        done = super().op_touch(operation, address, stride, count, how)
        if how == "w" and done >= 0:
            for i in range(int(count)):
                self.put(number(address) + i * number(stride), TOUCHED + i)
        return done

    def op_prot(self, operation: Operation, address: str, length: str, rights: str) -> int:
        status = super().op_prot(operation, address, length, rights)
        if status == -W.EOPNOTSUPP:
            raise NotModelledError("prot of a mapping of the designs' guest_memfd")
        return status

    # close() of the descriptor leaves the file to its mappings; a slot works on while one holds it.

    def op_gclose(self, operation: Operation, name: str) -> int:
        if name not in self.gmems or isinstance(self.gmems[name], GuestMemfd4K):
            return super().op_gclose(operation, name)
        self.closed[name] = self.gmems.pop(name)
        self.end_unmapped()
        return 0

    def op_unmap(self, operation: Operation, address: str, length: str) -> int:
        status = super().op_unmap(operation, address, length)
        self.end_unmapped()
        return status

    def end_unmapped(self) -> None:
        """Closed files that no process maps any more are gone."""
        rows = self.machine.arrays.state[int(W.STATE_VMAS) :][: W.VMAS * W.A_WORDS].reshape(-1, W.A_WORDS)
        mapped = rows[(rows[:, W.A_LIVE] != 0) & (rows[:, W.A_KIND] == W.VMA_GUEST_MEMFD)][:, W.A_INODE]
        for name, file in list(self.closed.items()):
            if file.inode in mapped:
                continue
            slots = [slot for guest in self.guests.vms.values() for slot in guest.slots.values()]
            for guest in self.guests.vms.values():
                guest.vm.release(file)  # its slots stay, without memory
            if not any(slot.gmem == name for slot in slots):
                self.closed.pop(name).close()

    def op_store(self, operation: Operation, address: str, value: str) -> int:
        status = self.process.touch(number(address), write=True).status
        self.put(number(address), int(value, 0))
        return 0 if status in (0, W.VM_FAULT_NOPAGE, W.VM_FAULT_LOCKED) else -W.EFAULT

    def op_storeif(self, operation: Operation, address: str, value: str, one: str, other: str) -> int:
        if self.named[one].here != self.named[other].here:
            return -ESTALE
        return self.op_store(operation, address, value)

    def op_peek(self, operation: Operation, address: str) -> int:
        self.process.touch(number(address))
        return self.word(self.pfn_at(number(address)))

    def op_pfnof(self, operation: Operation, name: str, address: str) -> None:
        self.named[name] = Named(returned(operation), self.pfn_at(number(address)))

    def op_gpfnof(self, operation: Operation, name: str, vm: str, gpa: str) -> None:
        self.named[name] = Named(returned(operation), self.guest_pfn(vm, number(gpa)))

    def op_gpeek(self, operation: Operation, vm: str, gpa: str) -> int:
        self.guests.vms[vm].vm.touch(number(gpa))
        return self.word(self.guest_pfn(vm, number(gpa)))

    def accessed(self, vm: str, gpa: int, stored: int | None) -> None:
        if stored is not None:
            self.write_word(self.guest_pfn(vm, gpa), GUEST_TOUCHED + stored)

    # ------------------------------------------------------------------ memory failure

    def op_hwpoison(self, operation: Operation, name: str) -> int:
        return self.machine.memory_failure(self.named[name].here << 12).status

    def op_unpoison(self, operation: Operation, name: str) -> int:
        return self.machine.unpoison(self.named[name].here << 12).status

    def op_softoffline(self, operation: Operation, name: str) -> int:
        return self.machine.soft_offline(self.named[name].here << 12).status

    def op_adv(self, operation: Operation, address: str, length: str, advice: str) -> int | None:
        at, size = number(address), number(length)
        if advice == "soft_offline":
            return self.process.madvise_soft_offline(at, size).status
        if advice != "hwpoison":
            return super().op_adv(operation, address, length, advice)
        status = self.process.madvise_hwpoison(at, size).status
        self.signals_told(operation)
        return status

    def signals_told(self, operation: Operation) -> None:
        """The program wrote down the signals that came while it did not touch memory."""
        signals = self.machine.last_failure.signals
        here = [f"signal 7 code {one.code} address {one.address:#x} while not touching" for one in signals]
        if here != [note for note in operation.notes if note.startswith("signal ")]:
            raise MismatchError(f"{operation.text}: {here}, captured {operation.notes}")

    def op_mincore(self, operation: Operation, *words: str) -> None:
        """Not an operation of pgemu: it changes nothing."""

    # ------------------------------------------------------------------ contents

    def pfn_at(self, address: int) -> int:
        level, _, entry = self.process.walk(address)[-1]
        return frame(entry, level) + ((address & size_of(level) - 1) >> 12)

    def guest_pfn(self, vm: str, gpa: int) -> int:
        """The frame behind a guest physical address, as stage 2 has it."""
        level, _, entry = self.guests.vms[vm].vm.walk(gpa)[-1]
        return ((entry & FRAME) >> 12) + ((gpa & size_of(level) - 1) >> 12)

    def put(self, address: int, value: int) -> None:
        """Store a word at the beginning of the page of an address."""
        self.write_word(self.pfn_at(address), value)

    def is_ordinary(self, pfn: int) -> bool:
        """Whether a frame is one of those that anonymous memory has, whose contents lie at their place."""
        return pfn < self.machine.register(W.R_FRAMES)

    def write_word(self, pfn: int, value: int) -> None:
        if self.is_ordinary(pfn):
            self.machine.arrays.ram[pfn * 512] = value
        else:
            self.machine.write_frame(pfn, struct.pack("<Q", value))

    def word(self, pfn: int) -> int:
        """The first word of a page."""
        if self.is_ordinary(pfn):
            return int(self.machine.arrays.ram[pfn * 512])
        return int(struct.unpack("<Q", self.machine.read_frame(pfn)[:8])[0])

    # ------------------------------------------------------------------ comparing

    def compare_frames(self, where: str, there: tuple[Entries, Entries], here: tuple[Entries, Entries]) -> None:
        """Of leaves: a frame that was named may serve as a table later."""
        super().compare_frames(where, (there[0], {}), (here[0], {}))

    def compare_process(self, checkpoint: Checkpoint) -> None:
        super().compare_process(checkpoint)
        where = f"{self.capture.name} {checkpoint.scenario} {checkpoint.name}"
        rows = checkpoint.raw.get("frames", [])
        if rows:
            known = self.frames.snapshots[self.process.space]
            for row in rows:
                key = row["name"], 0, False
                known.there[key], known.here[key] = self.named[str(row["name"])]
            self.frames.compare(where, self.process.space, known)
        for row in rows:
            self.compare_frame(where, row, self.named[str(row["name"])].here)

    def compare_frame(self, where: str, row: dict[str, Any], pfn: int) -> None:
        """The struct page of a frame that was named and is the file's or free, and what the page holds."""
        words = [relative(int(word, 16), row["pfn"]) for word in row["words"]]
        free = words[3] == 0
        if free and row["refcount"]:
            self.elsewhere.add(row["name"])
            return  # it serves as something else there
        if not free:
            self.elsewhere.discard(row["name"])
        told = words[0] & UPTODATE or (free and row["name"] not in self.elsewhere)
        if told and self.word(pfn) != int(row["first_word"], 16):
            raise MismatchError(f"{where}: frame {row['name']} holds {self.word(pfn):#x}, captured {row['first_word']}")
        ours = [relative(int(word), pfn) for word in self.machine.struct_page(pfn)]
        if words[1] & 1 or ours[1] & 1:  # a tail
            theirs, found = [words[1], *words[3:7]], [ours[1], *ours[3:7]]
            if theirs != found:
                raise MismatchError(f"{where}: tail {row['name']}: {found}, captured {theirs}")
            return
        # For the LRU list, in a batch that holds a reference; a poisoned page was taken off it.
        waits = not free and not words[0] & (ON_LRU | HWPOISON)
        theirs = [
            words[0] & COMPARED, words[3] != 0, words[4], words[5], words[6] - ((1 << 32) if waits else 0),
        ]  # fmt: skip
        found = [ours[0] & COMPARED, ours[3] != 0, ours[4], ours[5], ours[6]]
        in_buddy = any(word & 0xFFFF_FFFF == BUDDY for word in (words[6], ours[6]))
        if free and in_buddy:  # in which list a free page waits, and joined to how many, is the allocator's choice
            theirs, found = theirs[:3], found[:3]
        if theirs != found:
            raise MismatchError(
                f"{where}: frame {row['name']}: {list(map(hex, found))}, captured {list(map(hex, theirs))}"
            )

    def compare_rules(self, checkpoint: Checkpoint) -> None:
        """No rule is broken but by entries that a hole left, where the preset has that defect."""
        if self.machine.check() == 0:
            return
        first = self.machine.register(W.R_BROKEN_FIRST) >> 48
        defects = self.machine.config.defects
        if "punch-keeps-entries" not in defects or first != W.Broken.WRONG_PFN:
            raise MismatchError(f"{checkpoint.name}: rules broken: {self.machine.broken}")


def relative(word: int, pfn: int) -> int:
    """A word of a frame's struct page, the address of a struct page as its distance."""
    return word - VMEMMAP - 64 * pfn if word >> 40 == VMEMMAP >> 40 else word
