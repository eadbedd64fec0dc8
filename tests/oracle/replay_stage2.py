"""Runs the operation lists of captured KVM scenarios on pgemu and compares the stage-2 trees at every checkpoint.

Compared: results of the operations (how many accesses succeeded, which ended in a memory fault or as MMIO), then the
whole tree of every VM: entries that point to tables and leaves, by address and level with every bit outside the frame
number, cached MMIO entries with every bit, the number of empty entries, and which entries have the same frame.
Guest physical 0 to 0x3fff is the vCPU's own code and page tables, made here by a slot like the capture's.

Not compared: how often a leaf was accessed, which the capture cannot show.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from oracle.capture import FRAME, Capture, Checkpoint, Operation, Run, Table, Tree
from pgemu.objects.machine import Config, Machine
from pgemu.objects.stage2 import ENTRY, Stage2
from pgemu.objects.vm import Vm
from pgemu_kernels import words as W
from pgemu_kernels.words.operations import Flag

Array = np.ndarray[Any, Any]

PAGE = 4096
FRAMES = 1 << 23  # frames of either side are below
LEAF_GAUGES = (W.Gauge.STAGE2_LEAVES_4K, W.Gauge.STAGE2_LEAVES_2M, W.Gauge.STAGE2_LEAVES_1G)
BOOT_PAGES = 4
BOOT_SLOT = 32763
MMU_PRESENT = 1 << 11
ENOSYS, ENOTTY = 38, 25
PROT = {"r": 1, "w": 2, "x": 4}
SUFFIX = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class MismatchError(AssertionError):
    """What differs, at which operation or checkpoint."""


def number(text: str) -> int:
    """A number of the operation list: "64M", "0x1000+2M"."""
    total = 0
    for part in text.split("+"):
        total += int(part[:-1], 0) * SUFFIX[part[-1]] if part[-1] in SUFFIX else int(part, 0)
    return total


def expected_result(operation: Operation) -> int:
    """The number an operation returned: "0x4" or "-22 (EINVAL)"."""
    return int(operation.result.split()[0], 0)


@dataclass
class Slot:
    """A memory slot as the list made it: what its guest frames stand for."""

    gpa: int
    size: int
    hva: int
    gmem: int | None = None
    offset: int = 0

    def sources(self, gpas: Array) -> list[tuple[str, Array, Array]]:
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

    def sources(self, gpas: Array) -> list[tuple[str, Array, Array]]:
        return [source for slot in self.slots.values() for source in slot.sources(gpas)]


class Frames:
    """Which frame here is which frame of the capture, as long as neither is freed. Arrays are uint64[n] or int64[n]."""

    def __init__(self) -> None:
        self.ours = np.full(FRAMES, -1)
        self.theirs = np.full(FRAMES, -1)
        self.seen: list[tuple[str, Array, Array]] = []

    def match(self, captured: Array, here: Array, sources: list[tuple[str, Array, Array]]) -> Array:
        """Note that frames are the same pages: the positions of those known to be others.

        sources: (kind of memory, positions, addresses in it).
        """
        fresh = self.ours[captured] < 0
        self.ours[captured[fresh]] = here[fresh]
        unknown = self.theirs[here] < 0
        self.theirs[here[unknown]] = captured[unknown]
        for kind, positions, addresses in sources:
            chosen = fresh[positions]
            self.seen.append((kind, addresses[chosen], captured[positions[chosen]]))
        return np.flatnonzero((self.ours[captured] != here) | (self.theirs[here] != captured))

    def forget(self, kind: str, start: int, length: int) -> None:
        """The memory of a range is freed: its frames may come back as anything."""
        for name, addresses, captured in self.seen:
            if name == kind:
                gone = captured[(addresses >= start) & (addresses < start + length)]
                gone = gone[self.ours[gone] >= 0]
                self.theirs[self.ours[gone]] = -1
                self.ours[gone] = -1


class Replay:
    """One scenario of a capture on a machine of its own."""

    def __init__(self, capture: Capture, checkpoints: list[Checkpoint]) -> None:
        self.capture = capture
        self.protected_vms = any(
            op.text.split()[0] == "vm" and op.words[2] == "1" and op.result == "0x0"
            for checkpoint in capture.checkpoints
            for op in checkpoint.ops
        )
        self.checkpoints = checkpoints
        self.machine = Machine(
            Config(
                "restructure",
                pool=64 * W.PAGE_2M,
                page_size=W.PAGE_2M,
                other_pool=2 * W.PAGE_1G,
                kernel=capture.kernel,
                stage2=capture.stage2,
                pti=capture.pti,
                nx_huge_pages=capture.nx_huge_pages,
                l1tf=capture.nx_huge_pages,
            )
        )
        self.process = self.machine.create_process()
        self.guests: dict[int, Guest] = {}
        self.gmems: dict[int, object] = {}
        self.hugetlb: list[tuple[int, int]] = []
        self.frames = Frames()
        self.dropped_trees = 0
        self.trees = 0  # compared so far

    def run(self) -> int:
        """Replay to the end: how many checkpoints were equal. MismatchError at the first that is not."""
        done = 0
        for checkpoint in self.checkpoints:
            for operation in checkpoint.ops:
                self.operate(checkpoint, operation)
            for vm in checkpoint.stage2:
                self.compare(checkpoint, self.guests[vm.number], vm.trees)
            if self.guests:
                self.compare_counters(checkpoint)
            if broken := self.machine.check():
                raise MismatchError(f"{checkpoint.name}: {broken} rules broken: {self.machine.broken}")
            done += 1
        return done

    # ------------------------------------------------------------------ operations

    def operate(self, checkpoint: Checkpoint, operation: Operation) -> None:
        method = getattr(self, f"op_{operation.name}")
        got = method(operation, *operation.words[1:])
        expected = expected_result(operation)
        if got is not None and got != expected:
            raise MismatchError(f"{checkpoint.name}: {operation.text}: {got}, captured {operation.result}")

    def op_trace(self, operation: Operation, *words: str) -> None:
        pass

    op_kvmcap = op_vmcap = op_pool = op_vfioopen = op_trace

    def op_vm(self, operation: Operation, name: str, kind: str) -> int:
        if kind == "1" and not self.protected_vms:
            return -W.EINVAL  # the configuration lacks KVM_SW_PROTECTED_VM
        guest = Guest(self.machine.create_vm(self.process, protected=kind == "1"), int(name))
        self.guests[int(name)] = guest
        boot = self.checkpoints[0].stage2 or next(c.stage2 for c in self.checkpoints if c.stage2)
        hva = next(vm.boot_hva for vm in boot if vm.number == int(name))
        self.process.mmap_anonymous(hva, BOOT_PAGES * PAGE)
        for page in range(BOOT_PAGES):
            self.process.touch(hva + page * PAGE, write=True)
        guest.vm.set_memory_region(BOOT_SLOT, 0, BOOT_PAGES * PAGE, hva)
        guest.slots[BOOT_SLOT] = Slot(0, BOOT_PAGES * PAGE, hva)
        return 0

    def op_vmclose(self, operation: Operation, name: str) -> int:
        if int(name) not in self.guests:
            return -ENOSYS
        return self.guests.pop(int(name)).vm.close().status

    def op_slot(
        self, operation: Operation, name: str, slot: str, gpa: str, size: str, hva: str, flags: str = "0"
    ) -> int:
        if int(name) not in self.guests:
            return -ENOSYS
        guest = self.guests[int(name)]
        leaves = sum(guest.vm.leaves())
        status = guest.vm.set_memory_region(
            int(slot),
            number(gpa),
            number(size),
            number(hva),
            log_dirty_pages=bool(int(flags) & 1),
            read_only=bool(int(flags) & 2),
        ).status
        if status == 0:
            guest.slots.pop(int(slot), None)
            if not number(size) and leaves and not guest.vm.stage2().root:
                self.dropped_trees += 1
            if number(size):
                guest.slots[int(slot)] = Slot(number(gpa), number(size), number(hva))
        return status

    def op_slot2(
        self, operation: Operation, name: str, slot: str, gpa: str, size: str, hva: str, gmem: str, offset: str
    ) -> int:
        if int(name) not in self.guests:
            return -ENOSYS
        guest = self.guests[int(name)]
        if int(gmem) not in self.gmems:  # the file was refused: the call names no file
            return self.machine.operate(
                W.Operation.MEMSLOT,
                flags=Flag.PRIVATE,
                vm=guest.vm.vm,
                object_=int(slot),
                address=number(gpa),
                offset=number(hva),
                length=number(size),
            ).status
        status = guest.vm.set_memory_region(
            int(slot), number(gpa), number(size), number(hva), gmem=self.gmems[int(gmem)], gmem_offset=number(offset)
        ).status
        if status == 0:
            guest.slots[int(slot)] = Slot(number(gpa), number(size), number(hva), int(gmem), number(offset))
        return status

    def op_gtouch(self, operation: Operation, name: str, gpa: str, stride: str, count: str, how: str) -> int:
        if int(name) not in self.guests:
            return -ENOSYS
        guest = self.guests[int(name)].vm
        done = 0
        notes = []
        for i in range(int(count)):
            # Code runs in page 0 (not when the access is a call), page tables lie in pages 1 and 2.
            for page in (1, 2) if how == "x" else (0, 1, 2):
                if guest.touch(page * PAGE).status not in (W.RET_PF_FIXED, W.RET_PF_SPURIOUS):
                    raise MismatchError(f"{operation.text}: the vCPU's own page {page}")
            at = number(gpa) + i * number(stride)
            status = guest.touch(at, write=how == "w", execute=how == "x").status
            if status == W.RET_PF_EMULATE:
                notes.append(f"gpa {at:#x}: run => 0 exit 6 mmio phys {at:#x} len 8 write {int(how == 'w')}")
            elif status < 0:
                notes.append(f"gpa {at:#x}: run => {status}")
            else:
                done += 1
        captured = [re.sub(r"(run => -\d+) exit .*", r"\1", note) for note in operation.notes]
        if notes != captured:
            raise MismatchError(f"{operation.text}: exits {notes}, captured {captured}")
        return done

    def op_attr(self, operation: Operation, name: str, gpa: str, size: str, kind: str) -> int:
        if int(name) not in self.guests:
            return -ENOSYS
        return self.guests[int(name)].vm.set_attributes(number(gpa), number(size), private=kind == "private").status

    def op_prefault(self, operation: Operation, name: str, gpa: str, size: str) -> int:
        if int(name) not in self.guests:
            return -ENOSYS
        result = self.guests[int(name)].vm.prefault(number(gpa), number(size))
        return result.status if result.detail in (0, number(size)) else -W.EAGAIN

    def op_dirtylog(self, operation: Operation, name: str, slot: str) -> int:
        status, pages = self.guests[int(name)].vm.dirty_log(int(slot))
        return status or len(pages)

    # ------------------------------------------------------------------ the process's memory

    def op_gmem(self, operation: Operation, name: str, vm: str, size: str, flags: str) -> int | None:
        if int(vm) not in self.guests:
            return -ENOTTY
        try:
            self.gmems[int(name)] = self.machine.create_guest_memfd_4k(
                number(size), mmap=bool(int(flags) & 1), init_shared=bool(int(flags) & 2)
            )
        except OSError as error:
            return -int(error.errno or 0)
        return None  # a descriptor

    def op_gpunch(self, operation: Operation, name: str, offset: str, length: str) -> int:
        if int(name) not in self.gmems:
            return -W.EBADF
        self.frames.forget(f"gmem {name}", number(offset), number(length))
        return int(self.gmems[int(name)].punch_hole(number(offset), number(length)).status)

    def op_galloc(self, operation: Operation, name: str, offset: str, length: str) -> int:
        if int(name) not in self.gmems:
            return -W.EBADF
        return int(self.gmems[int(name)].allocate(number(offset), number(length)).status)

    def op_gclose(self, operation: Operation, name: str) -> int:
        if int(name) not in self.gmems:
            return -W.EBADF
        return int(self.gmems.pop(int(name)).close().status)

    def op_pcibar(self, operation: Operation, device: str, bar: str) -> None:
        base = expected_result(operation)
        self.bar = self.machine.create_device(base >> 12, 4 << 30 >> 12)

    def op_vfiomem(self, operation: Operation, state: str) -> None:
        pass  # on, before anything is mapped

    def op_map(self, operation: Operation, address: str, length: str, rights: str, kind: str) -> int:
        at, size = number(address), number(length)
        prot = sum(PROT[letter] for letter in rights)
        name, *rest = kind.split(":")
        if name == "anon":
            result = self.process.mmap_anonymous(at, size, prot=prot)
        elif name in ("shuge2m", "shuge1g"):
            page_size = W.PAGE_2M if name == "shuge2m" else W.PAGE_1G
            result = self.process.mmap_hugetlb(at, size, page_size=page_size, prot=prot)
            self.hugetlb.append((at, size))
        elif name == "vfio":
            result = self.process.mmap_device(self.bar, at, size, offset=number(rest[1]), prot=prot)
        elif name == "gmem":
            if int(rest[0]) not in self.gmems:
                return -W.EBADF
            result = self.process.mmap(self.gmems[int(rest[0])], at, offset=number(rest[1]), length=size)
        else:
            raise NotImplementedError(kind)
        return at if result.status == 0 else result.status

    def op_unmap(self, operation: Operation, address: str, length: str) -> int:
        self.frames.forget("host", number(address), number(length))
        return self.process.munmap(number(address), number(length)).status

    def op_prot(self, operation: Operation, address: str, length: str, rights: str) -> int:
        prot = 0 if rights == "none" else sum(PROT[letter] for letter in rights)
        return self.process.protect(number(address), number(length), prot).status

    def op_adv(self, operation: Operation, address: str, length: str, advice: str) -> int | None:
        if advice != "dontneed":
            return None  # nohugepage: there are no transparent huge pages here
        at = number(address)
        if not any(start <= at < start + size for start, size in self.hugetlb):  # a file keeps its pages
            self.frames.forget("host", at, number(length))
        return self.process.madvise_dontneed(at, number(length)).status

    def op_touch(self, operation: Operation, address: str, stride: str, count: str, how: str) -> int:
        done = 0
        for i in range(int(count)):
            status = self.process.touch(number(address) + i * number(stride), write=how == "w").status
            if status & (W.VM_FAULT_SIGBUS | W.VM_FAULT_SIGSEGV):
                return -W.EFAULT
            done += 1
        return done

    def op_poke(self, operation: Operation, address: str, data: str) -> int:
        self.process.touch(number(address), write=True)
        return 0

    # ------------------------------------------------------------------ comparing

    def compare(self, checkpoint: Checkpoint, guest: Guest, trees: tuple[Tree, ...]) -> None:
        """Compare a VM's tree. Before its first run, and after all of it was dropped, there is none."""
        here = guest.vm.stage2()
        counted = kvm_counters(checkpoint, "pages_4k", "pages_2m", "pages_1g")
        if here.leaf_counts() != counted:
            raise MismatchError(f"{checkpoint.name}: {here.leaf_counts()} leaves, KVM counted {counted}")
        if not trees:
            # Where KVM counts leaves (26-kvm-exec of 6.12 and 6.18) the root was missed when the tables were read out.
            if here.root and not sum(counted):
                raise MismatchError(f"{checkpoint.name}: a tree, captured none")
            return
        (tree,) = trees
        self.trees += 1
        where = f"{checkpoint.name}, VM {guest.number}"
        captured = entries([run_entries(run) for run in tree.leaves])
        mmio = captured["entry"] & np.uint64(MMU_PRESENT) == 0  # NPT's have bit 0
        leaves = captured[~mmio]
        others = entries([captured[mmio], plain_entries(tree.other_nonpresent)])
        same(where, "tables", without_frames(here.tables), without_frames(entries([plain_entries(tree.tables)])))
        same(where, "leaves", without_frames(here.leaves), without_frames(leaves))
        same(where, "MMIO entries", here.others, others)
        empty = sum(tree.nonpresent_values.values()) - len(tree.other_nonpresent)
        if here.empty != empty or tree.nonpresent_values.get(self.empty_value(), 0) != empty:
            raise MismatchError(f"{where}: {here.empty} empty entries, captured {tree.nonpresent_values}")
        self.compare_frames(where, guest, here.leaves, leaves)
        self.compare_counts(where, guest, here)

    def compare_counters(self, checkpoint: Checkpoint) -> None:
        """KVM's own counters since the VM was made: faults taken and fixed, MMIO exits, flushes of the whole VM.

        An access to a cached MMIO entry is an exit here and no fault there. Where a whole tree goes with a slot the
        vCPU flushes as it loads a new root, which KVM does not count.
        """
        taken, fixed, emulated, mmio, flushes = kvm_counters(
            checkpoint, "pf_taken", "pf_fixed", "pf_emulate", "mmio_exits", "remote_tlb_flush_requests"
        )
        statistics = self.machine.statistics
        results = statistics.results(W.Operation.GUEST_FAULT)
        here = {
            "faults": statistics.event(W.Event.GUEST_FAULT) - (mmio - emulated),
            "faults fixed": results.get(W.RET_PF_FIXED, 0),
            "MMIO exits": results.get(W.RET_PF_EMULATE, 0),
            "flushes": statistics.event(W.Event.TLB_FLUSH_VM) - self.dropped_trees,
        }
        captured = {"faults": taken, "faults fixed": fixed, "MMIO exits": mmio, "flushes": flushes}
        if here != captured:
            raise MismatchError(f"{checkpoint.name}: counted {here}, KVM {captured}")

    def empty_value(self) -> int:
        row = int(W.STATE_FORMATS) + self.machine.register(W.R_STAGE2_FORMAT) * W.F_WORDS
        return int(self.machine.arrays.state[row + int(W.F_EMPTY)])

    def compare_frames(self, where: str, guest: Guest, here: Array, captured: Array) -> None:
        """The same frames at the same places as ever since the scenario began."""
        theirs = (captured["entry"] & np.uint64(FRAME)) >> np.uint64(12)
        ours = (here["entry"] & np.uint64(FRAME)) >> np.uint64(12)
        wrong = self.frames.match(theirs.astype(np.int64), ours.astype(np.int64), guest.sources(captured["gpa"]))
        if wrong.size:
            i = wrong[0]
            raise MismatchError(
                f"{where}: {captured['gpa'][i]:#x}: frame {ours[i]:#x} stands for another page than {theirs[i]:#x}"
            )

    def compare_counts(self, where: str, guest: Guest, here: Stage2) -> None:
        """What the VM and the machine's gauges count, against the tree."""
        counted = here.leaf_counts()
        if guest.vm.leaves() != counted or guest.vm.table_pages != len(here.tables):
            raise MismatchError(f"{where}: {guest.vm.leaves()} leaves, in the tree {counted}")
        gauges = self.machine.statistics
        kept = tuple(gauges.gauge(gauge) for gauge in LEAF_GAUGES)
        if len(self.guests) == 1 and (kept != counted or gauges.gauge(W.Gauge.STAGE2_TABLES) != len(here.tables) + 1):
            raise MismatchError(f"{where}: gauges {kept}, in the tree {counted}")


def kvm_counters(checkpoint: Checkpoint, *names: str) -> tuple[int, ...]:
    """KVM's statistics, summed over VMs."""
    return tuple(checkpoint.raw["kvm_counters"][name] for name in names)


def run_entries(run: Run) -> Array:
    """A run of the capture as ENTRY[count]."""
    found = np.empty(run.count, ENTRY)
    i = np.arange(run.count, dtype=np.uint64)
    found["gpa"] = np.uint64(run.va) + i * np.uint64(PAGE << 9 * (run.level - 1))
    found["level"] = run.level
    found["entry"] = np.uint64(run.entry) + i * np.uint64(run.step)
    return found


def plain_entries(rows: tuple[Table, ...]) -> Array:
    return np.array(list(rows), ENTRY)


def entries(pieces: list[Array]) -> Array:
    """Pieces as one ENTRY[n], sorted as Stage2 is."""
    every = np.concatenate([np.empty(0, ENTRY), *pieces])
    return every[np.lexsort((-every["level"].astype(np.int64), every["gpa"]))]


def without_frames(rows: Array) -> Array:
    found = rows.copy()
    found["entry"] &= np.uint64(~FRAME & (1 << 64) - 1)
    return found


def same(where: str, what: str, here: Array, captured: Array) -> None:
    """MismatchError with the first few entries that differ."""
    if np.array_equal(here, captured):
        return
    ours, theirs = ({(gpa, level): entry for gpa, level, entry in rows.tolist()} for rows in (here, captured))
    keys = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    lines = [
        f"{gpa:#x} level {level}: {shown(ours.get((gpa, level)))}, captured {shown(theirs.get((gpa, level)))}"
        for gpa, level in keys[:6]
    ]
    raise MismatchError(f"{where}: {len(keys)} {what} differ: " + "; ".join(lines))


def shown(entry: int | None) -> str:
    return "none" if entry is None else f"{entry:#x}"
