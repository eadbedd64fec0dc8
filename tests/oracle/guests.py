"""What a captured scenario asks of KVM: virtual machines over a process's memory, done and compared.

Compared: results of the operations (how many accesses succeeded, which ended in a memory fault or as MMIO), then the
whole tree of every VM: entries that point to tables and leaves, by address and level with every bit outside the frame
number, cached MMIO entries with every bit, the number of empty entries, and which entries have the same frame; KVM's
counters. Guest physical 0 to 0x3fff is the vCPU's own code and page tables, made here by a slot like the capture's.

Not compared: how often a leaf was accessed, which the capture cannot show.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from oracle.capture import Checkpoint, Operation, Tree
from oracle.operations import MismatchError, NotModelledError, Span, every, number, span_of
from oracle.stage2_trees import GuestFrames, Sources, compare_tree, frames_of, kvm_counters
from pgemu.objects.address_space import AddressSpace
from pgemu.objects.stage2 import Stage2
from pgemu.objects.vm import Vm
from pgemu_kernels import words as W
from pgemu_kernels.words.operations import Flag

if TYPE_CHECKING:
    from oracle.replay import Replay

Array = np.ndarray[Any, Any]

PAGE = 4096
LEAF_GAUGES = (W.Gauge.STAGE2_LEAVES_4K, W.Gauge.STAGE2_LEAVES_2M, W.Gauge.STAGE2_LEAVES_1G)
BOOT_PAGES = 4
BOOT_SLOT = 32763
ENOSYS, EBADFD = 38, 77


@dataclass
class Slot:
    """A memory slot as the list made it: what its guest frames stand for."""

    gpa: int
    size: int
    hva: int
    gmem: str | None = None
    offset: int = 0
    of_design: bool = False

    def sources(self, gpas: Array) -> Sources:
        """The memory that guest pages may show: (the process or a guest_memfd, positions in `gpas`, addresses)."""
        positions = np.flatnonzero((gpas >= self.gpa) & (gpas < self.gpa + self.size))
        inside = gpas[positions] - np.uint64(self.gpa)
        found = [("host", positions, inside + np.uint64(self.hva))]
        if self.gmem is not None:
            found.append((f"gmem {self.gmem}", positions, inside + np.uint64(self.offset)))
        return found


@dataclass
class Guest:
    vm: Vm
    number: int
    slots: dict[int, Slot] = field(default_factory=dict)

    def sources(self, gpas: Array) -> Sources:
        return [source for slot in self.slots.values() for source in slot.sources(gpas)]


def makes_protected_vms(checkpoints: list[Checkpoint]) -> bool:
    """Whether a capture's kernel was built with KVM_SW_PROTECTED_VM."""
    return any(op.words[2] == "1" and op.result == "0x0" for op in every(checkpoints) if op.name == "vm")


class Guests:
    """The virtual machines of a replay. Methods are named as the operations."""

    def __init__(self, replay: Replay) -> None:
        self.replay = replay
        self.vms: dict[str, Guest] = {}
        self.frames = GuestFrames()
        self.gone: list[tuple[str, Span]] = []  # guest memory of slots over memory that is left out
        self.dropped_trees = 0
        self.protected: set[str] = set()
        self.made = 0  # VMs; the memory of their own stays when they go
        self.recovered = 0  # tables that large leaves came back for, but for one each time
        self.trees = 0  # compared so far

    # ------------------------------------------------------------------ operations

    def vm(self, operation: Operation, name: str, kind: str) -> int:
        if kind == "1" and not self.replay.protected_vms:
            return -W.EINVAL  # the configuration lacks KVM_SW_PROTECTED_VM
        process = self.replay.process
        guest = Guest(self.replay.machine.create_vm(process, protected=kind == "1"), int(name))
        self.vms[name] = guest
        if kind == "1":
            self.protected.add(name)
        self.made += 1
        hva = next(
            (vm.boot_hva for point in self.replay.checkpoints for vm in point.stage2 if vm.number == int(name)), None
        )
        if hva is None:
            raise MismatchError(f"{operation.text}: no checkpoint shows where its own memory lies")
        process.mmap_anonymous(hva, BOOT_PAGES * PAGE)
        for page in range(BOOT_PAGES):
            process.touch(hva + page * PAGE, write=True)
        guest.vm.set_memory_region(BOOT_SLOT, 0, BOOT_PAGES * PAGE, hva)
        guest.slots[BOOT_SLOT] = Slot(0, BOOT_PAGES * PAGE, hva)
        return 0

    def write_own_memory(self, child: AddressSpace) -> None:
        """The program writes to its copies of the vCPUs' memory when it is a forked child (captured: `boot_pa`)."""
        for guest in self.vms.values():
            for page in range(BOOT_PAGES):
                child.touch(guest.slots[BOOT_SLOT].hva + page * PAGE, write=True)

    def vmclose(self, operation: Operation, name: str) -> int:
        return self.vms.pop(name).vm.close().status if name in self.vms else -ENOSYS

    def slot(self, operation: Operation, name: str, slot: str, gpa: str, size: str, hva: str, bits: str = "0") -> int:
        if name not in self.vms:
            return -ENOSYS
        guest = self.vms[name]
        leaves = sum(guest.vm.leaves())
        tables = len(guest.vm.stage2().tables)
        logs, read_only = bool(int(bits) & 1), bool(int(bits) & 2)
        at, length, host = number(gpa), number(size), number(hva)
        known = guest.slots.get(int(slot))
        if known is not None and known.of_design:
            return self.change_design_slot(guest, int(slot), length)
        status = guest.vm.set_memory_region(
            int(slot), at, length, host, log_dirty_pages=logs, read_only=read_only
        ).status
        if status == 0:
            if int(slot) in guest.slots and length and not logs:
                self.recovered += max(0, tables - len(guest.vm.stage2().tables) - 1)
            guest.slots.pop(int(slot), None)
            if not length:
                self.note_drop(guest, leaves)
            else:
                guest.slots[int(slot)] = Slot(at, length, host)
        return status

    def change_design_slot(self, guest: Guest, slot: int, length: int) -> int:
        """A slot of a guest_memfd can only be deleted: kvm_main.c:kvm_set_memory_region(). It has no number here."""
        if length:
            return -W.EINVAL
        leaves = sum(guest.vm.leaves())
        status = guest.vm.unbind(guest.slots.pop(slot).gpa).status
        self.note_drop(guest, leaves)
        return status

    def note_drop(self, guest: Guest, leaves: int) -> None:
        """A slot was deleted: whether the whole tree, which had leaves, went with it."""
        if leaves and not guest.vm.stage2().root:
            self.dropped_trees += 1

    def slot2(
        self, operation: Operation, name: str, slot: str, gpa: str, size: str, hva: str, gmem: str, offset: str,
        bits: str = "0",
    ) -> int:  # fmt: skip
        if name not in self.vms:
            return -ENOSYS
        guest = self.vms[name]
        at, length, host, begin = map(number, (gpa, size, hva, offset))
        if gmem not in self.replay.gmems:  # the file was refused: the call names no file
            return self.replay.machine.operate(
                W.Operation.MEMSLOT, flags=Flag.PRIVATE, vm=guest.vm.vm, object_=int(slot), address=at, offset=host,
                length=length,
            ).status  # fmt: skip
        status = self.replay.set_gmem_slot(guest.vm, int(slot), at, length, host, gmem, begin, int(bits))
        if status == 0:
            guest.slots[int(slot)] = Slot(at, length, host, gmem, begin, self.replay.is_of_design(gmem))
        return status

    def attr(self, operation: Operation, name: str, gpa: str, size: str, kind: str) -> int:
        if name not in self.vms:
            return -ENOSYS
        return self.vms[name].vm.set_attributes(number(gpa), number(size), private=kind == "private").status

    def gtouch(self, operation: Operation, name: str, gpa: str, stride: str, count: str, how: str) -> int:
        """Accesses by the guest: how many found memory. The others ended as MMIO."""
        if name not in self.vms:
            return -ENOSYS
        guest = self.vms[name].vm
        done = 0
        notes = []
        for i in range(int(count)):
            # Code runs in page 0 (not when the access is a call), page tables lie in pages 1 and 2: a walk may mark
            # entries there as accessed, so that it needs to write.
            for page in (1, 2) if how == "x" else (0, 1, 2):
                if guest.touch(page * PAGE, write=page > 0).status not in (W.RET_PF_FIXED, W.RET_PF_SPURIOUS):
                    raise MismatchError(f"{operation.text}: the vCPU's own page {page}")
            at = number(gpa) + i * number(stride)
            status = guest.touch(at, write=how == "w", execute=how == "x").status
            if status == W.RET_PF_EMULATE:
                notes.append(f"gpa {at:#x}: run => 0 exit 6 mmio phys {at:#x} len 8 write {int(how == 'w')}")
            elif status < 0:
                notes.append(f"gpa {at:#x}: run => {status}")
            else:
                done += 1
                self.replay.accessed(name, at, i if how == "w" else None)
        captured = [re.sub(r"(run => -\d+) exit .*", r"\1", note) for note in operation.notes if "gpa" in note]
        if notes != captured:
            raise MismatchError(f"{operation.text}: exits {notes}, captured {captured}")
        return done

    def prefault(self, operation: Operation, name: str, gpa: str, size: str) -> int:
        if name not in self.vms:
            return -ENOSYS
        result = self.vms[name].vm.prefault(number(gpa), number(size))
        return result.status if result.detail in (0, number(size)) else -W.EAGAIN

    def dirtylog(self, operation: Operation, name: str, slot: str) -> int:
        if name not in self.vms:
            return -ENOSYS
        status, pages = self.vms[name].vm.dirty_log(int(slot))
        return status or len(pages)

    # ------------------------------------------------------------------ what is left out

    def is_left_out(self, operation: Operation) -> bool:
        """Whether an operation is about a slot over memory that is left out: noted, or not done."""
        words = operation.words
        span = span_of(operation)
        if operation.name in ("slot", "slot2") and span and any(span.meets(other) for other in self.replay.left_out):
            self.gone.append((words[1], Span(number(words[3]), number(words[3]) + number(words[4]))))
            return True
        if operation.name == "gtouch":
            first = number(words[2])
            touched = Span(first, first + (int(words[4]) - 1) * number(words[3]) + 1)
            gone = [there for vm, there in self.gone if vm == words[1] and there.meets(touched)]
            if gone and not gone[0].holds(touched):
                raise NotModelledError(f"{operation.name} over memory that is left out and other memory")
            return bool(gone)
        return False

    # ------------------------------------------------------------------ comparing

    def compare(self, checkpoint: Checkpoint) -> None:
        for vm in checkpoint.stage2:
            self.compare_vm(checkpoint, self.vms[str(vm.number)], vm.trees)
        if self.vms and len(self.vms) == self.made:  # what one that is closed had counted is gone
            self.compare_counters(checkpoint)

    def compare_vm(self, checkpoint: Checkpoint, guest: Guest, trees: tuple[Tree, ...]) -> None:
        """Compare a VM's tree. Before its first run, and after all of it was dropped, there is none."""
        here = guest.vm.stage2()
        where = f"{checkpoint.name}, VM {guest.number}"
        counted = kvm_counters(checkpoint, "pages_4k", "pages_2m", "pages_1g")
        if self.made == 1 and here.leaf_counts() != counted:
            raise MismatchError(f"{where}: {here.leaf_counts()} leaves, KVM counted {counted}")
        if not trees:
            # Where KVM counts leaves (an execution test of 6.12 and 6.18) the root was missed as the tables were read,
            # and so was that of a tree without any, whose tables are counted all the same.
            if here.root and not sum(counted) and not checkpoint.raw.get("vmstat", {}).get("nr_sec_page_table_pages"):
                raise MismatchError(f"{where}: a tree, captured none")
            return
        (tree,) = trees
        self.trees += 1
        ours, theirs = compare_tree(where, here, tree, self.empty_value())
        there, mine = frames_of(theirs), frames_of(ours)
        wrong = self.frames.match(there, mine, guest.sources(theirs["gpa"]))
        if wrong.size:
            i = wrong[0]
            raise MismatchError(
                f"{where}: {theirs['gpa'][i]:#x}: frame {mine[i]:#x} stands for another page than {there[i]:#x}"
            )
        self.compare_counts(where, guest, here)

    def compare_counters(self, checkpoint: Checkpoint) -> None:
        """KVM's own counters since the VM was made: faults taken and fixed, MMIO exits, flushes of the whole VM.

        An access to a cached MMIO entry is an exit here and no fault there. Where a whole tree goes with a slot the
        vCPU flushes as it loads a new root, which KVM does not count. Where large leaves come back the kernel flushes
        before it lets others run, which a slow machine does after each (tdp_mmu.c:tdp_mmu_iter_cond_resched()).
        """
        taken, fixed, emulated, mmio, flushes = kvm_counters(
            checkpoint, "pf_taken", "pf_fixed", "pf_emulate", "mmio_exits", "remote_tlb_flush_requests"
        )
        statistics = self.replay.machine.statistics
        results = statistics.results(W.Operation.GUEST_FAULT)
        here = {
            "faults": statistics.event(W.Event.GUEST_FAULT) - (mmio - emulated),
            "faults fixed": results.get(W.RET_PF_FIXED, 0),
            "MMIO exits": results.get(W.RET_PF_EMULATE, 0),
            "flushes": statistics.event(W.Event.TLB_FLUSH_VM) - self.dropped_trees,
        }
        here["flushes"] += min(max(flushes - here["flushes"], 0), self.recovered)
        captured = {"faults": taken, "faults fixed": fixed, "MMIO exits": mmio, "flushes": flushes}
        if here != captured:
            raise MismatchError(f"{checkpoint.name}: counted {here}, KVM {captured}")

    def empty_value(self) -> int:
        machine = self.replay.machine
        row = int(W.STATE_FORMATS) + machine.register(W.R_STAGE2_FORMAT) * W.F_WORDS
        return int(machine.arrays.state[row + int(W.F_EMPTY)])

    def compare_counts(self, where: str, guest: Guest, here: Stage2) -> None:
        """What the VM and the machine's gauges count, against the tree."""
        counted = here.leaf_counts()
        if guest.vm.leaves() != counted or guest.vm.table_pages != len(here.tables):
            raise MismatchError(f"{where}: {guest.vm.leaves()} leaves, in the tree {counted}")
        gauges = self.replay.machine.statistics
        kept = tuple(gauges.gauge(gauge) for gauge in LEAF_GAUGES)
        if len(self.vms) == 1 and (kept != counted or gauges.gauge(W.Gauge.STAGE2_TABLES) != len(here.tables) + 1):
            raise MismatchError(f"{where}: gauges {kept}, in the tree {counted}")
