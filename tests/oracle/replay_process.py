"""Runs the operation lists of captured scenarios on pgemu and compares the processes' tables at every checkpoint.

Compared, within the address ranges that the scenario ever maps: leaves by address, level and every flag bit outside
the frame number, entries that are not present included; entries that point to tables, by address and level with their
flags, with page-table isolation both copies of the top ones; which entries have the same frame; the frames
themselves of device memory; results of the operations.

Frames are compared by what they are, not by number: those of all processes alive at one moment are matched one to
one, and from one checkpoint of a process to its next an address keeps its frame here if and only if it kept it there.
That a freed page comes back is the allocator's choice and is not compared, except for HugeTLB pages, whose pool
is a stack in both.

What a scenario asks of KVM is done by VMs, so that the host's tables show what guests fault in; their own trees are
compared in replay_stage2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from oracle.capture import FRAME, Capture, Checkpoint, Operation
from pgemu.objects.address_space import AddressSpace
from pgemu.objects.files import Device, GuestMemfd4K, HugetlbFile
from pgemu.objects.machine import Config, Machine
from pgemu.objects.vm import Vm
from pgemu_kernels import words as W

PAGE = 4096
PRESENT, LARGE, PROTNONE, SPECIAL = 1, 1 << 7, 1 << 8, 1 << 9
ENOSYS, ENOTTY = 38, 25
SUFFIX = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
RIGHTS = {"r": 1, "w": 2, "x": 4}
HUGE = {"huge2m": W.PAGE_2M, "huge1g": W.PAGE_1G}
SIGNALS = W.VM_FAULT_SIGBUS | W.VM_FAULT_SIGSEGV
Entries = dict[tuple[int, int], int]  # (address, level): entry


class MismatchError(AssertionError):
    """What differs, at which operation or checkpoint."""


def number(text: str) -> int:
    """A number of the operation list: "64M", "0x1000+2M"."""
    return sum(int(part[:-1], 0) * SUFFIX[part[-1]] if part[-1] in SUFFIX else int(part, 0) for part in text.split("+"))


def protection(text: str) -> int:
    return 0 if text == "none" else sum(RIGHTS[letter] for letter in text)


def returned(operation: Operation) -> int:
    """The number an operation returned: "0x4" or "-22 (EINVAL)"."""
    return int(operation.result.split()[0], 0)


def frame(entry: int) -> int:
    """Frame number of a leaf; its bits are inverted where it is protection-none."""
    word = entry if entry & PRESENT or not entry & PROTNONE else ~entry
    return (word & FRAME) >> 12


def flags(entry: int) -> int:
    return entry & ~FRAME


def size_of(level: int) -> int:
    return PAGE << 9 * (level - 1)


# --------------------------------------------------------------------------- reading tables


def captured_entries(checkpoint: Checkpoint, ranges: list[tuple[int, int]]) -> tuple[Entries, Entries]:
    """Leaves and table entries of a checkpoint within address ranges."""
    leaves = {}
    for run in checkpoint.leaves:
        if any(run.va < end and run.va + run.count * size_of(run.level) > start for start, end in ranges):
            leaves.update({(va, run.level): entry for va, entry in run.entries() if within(va, run.level, ranges)})
    tables = {(va, level): entry for va, level, entry in checkpoint.tables if within(va, level, ranges)}
    return leaves, tables


def within(va: int, level: int, ranges: list[tuple[int, int]]) -> bool:
    return any(va < end and va + size_of(level) > start for start, end in ranges)


def entries_here(process: AddressSpace, ranges: list[tuple[int, int]]) -> tuple[Entries, Entries]:
    """The same of a process of pgemu, read from its tables."""
    leaves: Entries = {}
    tables: Entries = {}
    ram = process.machine.arrays.ram

    def walk(table: int, level: int, base: int) -> None:
        words = ram[table >> 3 : (table >> 3) + 512]
        for index in words.nonzero()[0].tolist():
            va = base + index * size_of(level)
            entry = int(words[index])
            if not within(va, level, ranges):
                continue
            if level > 1 and entry & PRESENT and not entry & LARGE:
                tables[va, level] = entry
                walk(entry & FRAME, level - 1, va)
            else:
                leaves[va, level] = entry

    walk(process.root, 4, 0)
    return leaves, tables


# --------------------------------------------------------------------------- frames


@dataclass
class Snapshot:
    """Frames of a process at its last checkpoint, there and here, by (address, level, whether a table)."""

    there: dict[tuple[int, int, bool], int]
    here: dict[tuple[int, int, bool], int]


@dataclass
class Frames:
    """Which frame of the capture is which frame here."""

    snapshots: dict[int, Snapshot] = field(default_factory=dict)
    huge: dict[int, int] = field(default_factory=dict)  # HugeTLB pages, which keep their partner for good

    def forget(self, process: int) -> None:
        self.snapshots.pop(process, None)

    def compare(self, where: str, process: int, snapshot: Snapshot) -> None:
        previous = self.snapshots.get(process)
        if previous is not None:
            for key in snapshot.there.keys() & previous.there.keys():
                kept = snapshot.there[key] == previous.there[key]
                table = key[2]  # one that was freed and made anew may have its old frame here and not there
                if kept != (snapshot.here[key] == previous.here[key]) and (kept or not table):
                    raise MismatchError(
                        f"{where}: {key[0]:#x} level {key[1]}: frame {'kept' if kept else 'changed'} there"
                    )
        self.snapshots[process] = snapshot
        pairs = {(other.there[key], other.here[key]) for other in self.snapshots.values() for key in other.there}
        if len({there for there, _ in pairs}) != len(pairs) or len({here for _, here in pairs}) != len(pairs):
            raise MismatchError(f"{where}: entries that share a frame there do not here, or the other way round")

    def compare_huge(self, where: str, there: int, here: int) -> None:
        if self.huge.setdefault(there, here) != here or len(set(self.huge.values())) != len(self.huge):
            raise MismatchError(f"{where}: HugeTLB frame {there:#x} was {self.huge[there]:#x} here, now {here:#x}")


# --------------------------------------------------------------------------- KVM


@dataclass
class Guests:
    """What a scenario asks of KVM: virtual machines over the process's memory."""

    replay: Replay
    vms: dict[str, Vm] = field(default_factory=dict)

    def vm(self, operation: Operation, name: str, kind: str) -> int:
        if kind == "1" and not self.replay.has_protected_vms:
            return -W.EINVAL  # the configuration lacks KVM_SW_PROTECTED_VM
        self.vms[name] = self.replay.machine.create_vm(self.replay.process, protected=kind == "1")
        return 0

    def vmclose(self, operation: Operation, name: str) -> int:
        return self.vms.pop(name).close().status if name in self.vms else -ENOSYS

    def slot(self, operation: Operation, name: str, slot: str, gpa: str, size: str, hva: str, bits: str = "0") -> int:
        if name not in self.vms:
            return -ENOSYS
        logs, read_only = bool(int(bits) & 1), bool(int(bits) & 2)
        return (
            self.vms[name]
            .set_memory_region(
                int(slot), number(gpa), number(size), number(hva), log_dirty_pages=logs, read_only=read_only
            )
            .status
        )

    def slot2(
        self, operation: Operation, name: str, slot: str, gpa: str, size: str, hva: str, gmem: str, offset: str
    ) -> int:
        if name not in self.vms:
            return -ENOSYS
        if gmem not in self.replay.gmems:
            return -W.EINVAL  # no such file
        file = self.replay.gmems[gmem]
        return (
            self.vms[name]
            .set_memory_region(int(slot), number(gpa), number(size), number(hva), gmem=file, gmem_offset=number(offset))
            .status
        )

    def attr(self, operation: Operation, name: str, gpa: str, size: str, kind: str) -> int:
        if name not in self.vms:
            return -ENOSYS
        return self.vms[name].set_attributes(number(gpa), number(size), private=kind == "private").status

    def gtouch(self, operation: Operation, name: str, gpa: str, stride: str, count: str, how: str) -> int:
        """Accesses by the guest: how many found memory. The others ended as MMIO."""
        if name not in self.vms:
            return -ENOSYS
        done = 0
        for i in range(int(count)):
            status = self.vms[name].touch(number(gpa) + i * number(stride), write=how == "w", execute=how == "x").status
            done += status in (W.RET_PF_FIXED, W.RET_PF_SPURIOUS)
        return done

    def prefault(self, operation: Operation, name: str, gpa: str, size: str) -> int:
        return self.vms[name].prefault(number(gpa), number(size)).status if name in self.vms else -ENOSYS


# --------------------------------------------------------------------------- the replay


class Replay:
    """One scenario of a capture, on a machine of its own or on the one given."""

    def __init__(self, capture: Capture, checkpoints: list[Checkpoint], machine: Machine | None = None) -> None:
        self.capture = capture
        self.checkpoints = checkpoints
        self.has_protected_vms = any(
            op.words[:1] == ["vm"] and op.words[2] == "1" and op.result == "0x0"
            for checkpoint in capture.checkpoints
            for op in checkpoint.ops
        )
        self.machine = machine or Machine(
            Config("restructure", pool=64 * W.PAGE_2M, page_size=W.PAGE_2M, other_pool=2 * W.PAGE_1G,
                   kernel=capture.kernel, stage2=capture.stage2, pti=capture.pti)  # type: ignore[arg-type]
        )  # fmt: skip
        self.process = self.machine.create_process()
        self.parent: AddressSpace | None = None
        self.child: AddressSpace | None = None
        self.gmems: dict[str, GuestMemfd4K] = {}
        self.files: dict[str, HugetlbFile] = {}
        self.bar: Device | None = None
        self.devices: list[tuple[int, int]] = []
        self.frames = Frames()
        self.left_out = self._left_out()
        self.ranges = list(self._ranges())
        self.guests = Guests(self)

    def _ranges(self) -> Iterator[tuple[int, int]]:
        """The address ranges that the scenario maps, over its whole life, except what is not modelled."""
        for checkpoint in self.checkpoints:
            for operation in checkpoint.ops:
                words = operation.words
                if operation.name == "map" and words[1] not in self.left_out:
                    yield number(words[1]), number(words[1]) + number(words[2])
                elif operation.name == "remap" and len(words) == 5:
                    yield number(words[4]), number(words[4]) + number(words[3])

    def _left_out(self) -> set[str]:
        """Addresses of mappings that pgemu does not model: shared anonymous memory, huge pages, DONTFORK."""
        every = [operation for checkpoint in self.checkpoints for operation in checkpoint.ops]
        shared = {
            operation.words[1] for operation in every if operation.name == "map" and operation.words[4] == "shanon"
        }
        advised = {
            operation.words[1] for operation in every
            if operation.name == "adv" and operation.words[3] in ("hugepage", "dontfork")
        }  # fmt: skip
        return shared | advised

    def is_left_out(self, operation: Operation) -> bool:
        """Whether an operation is on such a mapping."""
        if not self.left_out or len(operation.words) < 2 or not operation.words[1].startswith("0x"):
            return False
        # In these scenarios each of them lies in a 1G of its own.
        return number(operation.words[1]) >> 30 in {number(address) >> 30 for address in self.left_out}

    def run(self) -> int:
        """Replay to the end: how many checkpoints were equal. MismatchError at the first that is not."""
        for checkpoint in self.checkpoints:
            for operation in checkpoint.ops:
                self.operate(checkpoint, operation)
            if any(checkpoint.raw["smaps"]):
                self.process.read_smaps()  # the capture was taken after it had been read
            self.compare(checkpoint)
            if broken := self.machine.check():
                raise MismatchError(f"{checkpoint.name}: {broken} rules broken: {self.machine.broken}")
        return len(self.checkpoints)

    # ------------------------------------------------------------------ operations

    def operate(self, checkpoint: Checkpoint, operation: Operation) -> None:
        name = operation.name
        if self.is_left_out(operation):
            return
        method = getattr(self, f"op_{name}", None) or getattr(self.guests, name)
        got = method(operation, *operation.words[1:])
        if got is not None and got != returned(operation):
            raise MismatchError(f"{checkpoint.name}: {operation.text}: {got}, captured {operation.result}")

    def op_trace(self, operation: Operation, *words: str) -> None:
        """Nothing to do here."""

    op_kvmcap = op_vmcap = op_pool = op_vfioopen = op_trace

    def op_map(self, operation: Operation, address: str, length: str, rights: str, kind: str, option: str = "") -> int:
        at, size, prot = number(address), number(length), protection(rights)
        options = {"populate": option == "populate", "noreserve": option == "noreserve", "locked": option == "locked"}
        name, *rest = kind.split(":")
        if name == "anon":
            result = self.process.mmap_anonymous(at, size, prot, **options)
        elif name.removeprefix("s") in HUGE:
            page_size, shared = HUGE[name.removeprefix("s")], name.startswith("s")
            result = self.process.mmap_hugetlb(at, size, prot, page_size=page_size, shared=shared, **options)
        elif name in ("hfile", "phfile"):
            if rest[0] not in self.files:
                self.files[rest[0]] = self.machine.create_hugetlb_file(number(rest[1]) + size)
            file, offset = self.files[rest[0]], number(rest[1])
            result = self.process.mmap_hugetlb(
                at, size, prot, file=file, offset=offset, shared=name == "hfile", **options
            )
        elif name == "devmem":
            device = self.machine.create_device(number(rest[0]) >> 12, size >> 12, remap=True)
            result = self.process.mmap_device(device, at, size, prot)
            self.devices.append((at, size))
        elif name == "vfio":
            assert self.bar is not None
            result = self.process.mmap_device(self.bar, at, size, prot, offset=number(rest[1]))
            self.devices.append((at, size))
        elif name == "gmem":
            if rest[0] not in self.gmems:
                return -W.EBADF
            result = self.process.mmap(self.gmems[rest[0]], at, offset=number(rest[1]), length=size)
        else:
            raise NotImplementedError(kind)
        return at if result.status == 0 else result.status

    def op_touch(self, operation: Operation, address: str, stride: str, count: str, how: str) -> int:
        for i in range(int(count)):
            at = number(address) + i * number(stride)
            status = self.process.touch(at, write=how == "w", execute=how == "x").status
            if status & SIGNALS:
                note = f"stopped at touch {i} by signal {11 if status & W.VM_FAULT_SIGSEGV else 7}"
                if not any(text.startswith(note) for text in operation.notes):
                    raise MismatchError(f"{operation.text}: {note}, captured {operation.notes}")
                return -W.EFAULT
        return int(count)

    def op_remap(self, operation: Operation, old: str, length: str, new_length: str, new: str = "0") -> int:
        status = self.process.remap(number(old), number(length), number(new_length), number(new)).status
        return status or number(new) or number(old)

    def op_unmap(self, operation: Operation, address: str, length: str) -> int:
        return self.process.munmap(number(address), number(length)).status

    def op_prot(self, operation: Operation, address: str, length: str, rights: str) -> int:
        return self.process.protect(number(address), number(length), protection(rights)).status

    def op_adv(self, operation: Operation, address: str, length: str, advice: str) -> int | None:
        at, size = number(address), number(length)
        if advice == "dontneed":
            return self.process.madvise_dontneed(at, size).status
        if advice in ("populate_read", "populate_write"):
            return self.process.populate(at, size, write=advice == "populate_write").status
        if advice in ("guard_install", "guard_remove"):
            act = self.process.guard_install if advice == "guard_install" else self.process.guard_remove
            return act(at, size).status
        if advice == "nohugepage":
            return None  # there are no transparent huge pages here
        raise NotImplementedError(advice)

    def op_pcibar(self, operation: Operation, device: str, bar: str) -> None:
        size = self.capture.raw["machine"]["bar_bytes"]
        self.bar = self.machine.create_device(returned(operation) >> 12, size >> 12)

    def op_vfiomem(self, operation: Operation, state: str) -> int:
        assert self.bar is not None
        return (self.bar.restore() if state == "on" else self.bar.revoke()).status

    # The child's checkpoints come first, from "fork" on; the parent's begin with the same "fork", then "childwait".

    def op_fork(self, operation: Operation) -> None:
        if self.child is None:
            self.parent, self.child = self.process, self.process.fork()
            self.process = self.child
        else:
            self.op_childwait(operation)

    def op_childwait(self, operation: Operation) -> None:
        assert self.parent is not None
        self.process = self.parent

    def op_childend(self, operation: Operation) -> None:
        assert self.child is not None
        self.frames.forget(self.child.space)
        self.child.exit()
        self.child = None

    def op_gmem(self, operation: Operation, name: str, vm: str, size: str, bits: str) -> int | None:
        if vm not in self.guests.vms:
            return -ENOTTY
        try:
            self.gmems[name] = self.machine.create_guest_memfd_4k(
                number(size), mmap=bool(int(bits) & 1), init_shared=bool(int(bits) & 2)
            )
        except OSError as error:
            return -int(error.errno or 0)
        return None  # a descriptor

    def op_gpunch(self, operation: Operation, name: str, offset: str, length: str) -> int:
        if name not in self.gmems:
            return -W.EBADF
        return self.gmems[name].punch_hole(number(offset), number(length)).status

    def op_galloc(self, operation: Operation, name: str, offset: str, length: str) -> int:
        if name not in self.gmems:
            return -W.EBADF
        return self.gmems[name].allocate(number(offset), number(length)).status

    def op_gclose(self, operation: Operation, name: str) -> int:
        return self.gmems.pop(name).close().status if name in self.gmems else -W.EBADF

    def is_device(self, address: int) -> bool:
        return any(start <= address < start + size for start, size in self.devices)

    # ------------------------------------------------------------------ comparing

    def compare(self, checkpoint: Checkpoint) -> None:
        where = f"{self.capture.name} {checkpoint.scenario} {checkpoint.name}"
        leaves, tables = captured_entries(checkpoint, self.ranges)
        leaves_here, tables_here = entries_here(self.process, self.ranges)
        same_flags(f"{where}: leaves", leaves, leaves_here)
        same_flags(f"{where}: tables", tables, tables_here)
        self.compare_frames(where, (leaves, tables), (leaves_here, tables_here))
        self.compare_user_root(where, checkpoint)
        self.compare_counts(where, tables)

    def compare_frames(self, where: str, there: tuple[Entries, Entries], here: tuple[Entries, Entries]) -> None:
        for (va, level), entry in there[0].items():
            ours = here[0][va, level]
            if self.is_device(va) and frame(entry) != frame(ours):
                raise MismatchError(f"{where}: {va:#x}: device frame {frame(ours):#x}, captured {frame(entry):#x}")
            if level > 1 and not self.is_device(va):
                self.frames.compare_huge(where, frame(entry), frame(ours))
        snapshot = Snapshot(
            *(
                {
                    (va, level, table): frame(entry)
                    for table in (False, True)
                    for (va, level), entry in side[table].items()
                }
                for side in (there, here)
            )
        )
        self.frames.compare(where, self.process.space, snapshot)

    def compare_user_root(self, where: str, checkpoint: Checkpoint) -> None:
        """The user's copies of the top entries that the scenario uses."""
        if not checkpoint.pti_roots:
            return
        ram = self.machine.arrays.ram
        for start, end in self.ranges:
            for index in range(start >> 39, (end - 1 >> 39) + 1):
                for root, half in ((self.process.root, "kernel"), (self.process.user_root, "user")):
                    there = checkpoint.pti_roots[half].get(index, 0)
                    ours = int(ram[(root >> 3) + index])
                    if flags(there) != flags(ours) or (frame(ours) == 0) != (frame(there) == 0):
                        raise MismatchError(f"{where}: {half} top entry {index}: {ours:#x}, captured {there:#x}")

    def compare_counts(self, where: str, tables: Entries) -> None:
        """Table pages per level, as the process counts them: nothing else is mapped here."""
        counted = tuple(sum(level == at for _, level in tables) for at in (4, 3, 2))
        if self.process.table_pages != counted:
            raise MismatchError(f"{where}: {self.process.table_pages}, captured {counted}")


def same_flags(what: str, there: Entries, here: Entries) -> None:
    """MismatchError with the first few entries that differ outside the frame number."""
    if not there.keys() ^ here.keys() and all(flags(there[key]) == flags(here[key]) for key in there):
        return
    lines = []
    for key in sorted(there.keys() | here.keys()):
        ours, theirs = (side.get(key) for side in (here, there))
        if ours is None or theirs is None or flags(ours) != flags(theirs):
            shown = ("none" if entry is None else f"{entry:#x}" for entry in (ours, theirs))
            lines.append(f"{key[0]:#x} level {key[1]}: {', captured '.join(shown)}")
    raise MismatchError(f"{what}: {len(lines)} differ: " + "; ".join(lines[:6]))
