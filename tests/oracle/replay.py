"""Runs captured scenarios on pgemu and compares every checkpoint: the processes' tables and the VMs'.

Compared, within the address ranges that the scenario ever maps: leaves by address, level and every flag bit outside
the frame number, entries that are not present included; entries that point to tables, by address and level with their
flags, with page-table isolation both copies of the top ones; which entries have the same frame; the frames
themselves of device memory; results of the operations. What guests do is compared as guests.py says.

Frames are compared by what they are, not by number: those of all processes alive at one moment are matched one to
one, and from one checkpoint of a process to its next an address keeps its frame here if and only if it kept it there.
That a freed page comes back is the allocator's choice and is not compared, except for HugeTLB pages, whose pool
is a stack in both.

Of transparent huge pages the struct pages and what /proc/vmstat counts are compared, too: huge_folios.py.

Which operations are run goes by what they need (operations.py), not by the names of scenarios or files. Memory of a
kind that pgemu does not have is left out with all that is done to it, and checkpoints from there on count as replayed
in part: stage 2 is not compared in them. Any other operation that pgemu does not have ends the replay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from oracle import huge_folios
from oracle.capture import Capture, Checkpoint, Operation
from oracle.guests import Guests, makes_protected_vms
from oracle.operations import (
    OPTIMIZE,
    MismatchError,
    NotModelledError,
    Span,
    every,
    left_out,
    missing,
    number,
    protection,
    returned,
    span_of,
)
from oracle.process_tables import (
    Entries,
    Frames,
    captured_entries,
    entries_here,
    flags,
    frame,
    same_flags,
    snapshot,
    span_at,
    without,
)
from pgemu.objects.address_space import AddressSpace
from pgemu.objects.files import Device, HugetlbFile
from pgemu.objects.machine import Config, Machine
from pgemu.objects.vm import Vm
from pgemu_kernels import words as W

PAGE = 4096
ENOTTY = 25
ACCESSED = 1 << 5
HUGE = {"huge2m": W.PAGE_2M, "huge1g": W.PAGE_1G}
POISONED = W.VM_FAULT_HWPOISON | W.VM_FAULT_HWPOISON_LARGE
SIGNALS = W.VM_FAULT_SIGBUS | W.VM_FAULT_SIGSEGV | POISONED


@dataclass
class Done:
    """Checkpoints of a scenario that were replayed: wholly, and but for memory that is left out.

    left: how many were not, or only in part, by what pgemu would need. aged: entries whose accessed bit the kernel
    cleared without being asked. huge_pages: pages of transparent huge pages whose struct pages were compared.
    """

    whole: int = 0
    in_part: int = 0
    left: dict[str, int] = field(default_factory=dict)
    aged: int = 0
    huge_pages: int = 0


def machine_like(capture: Capture) -> Machine:
    """The captured machine, with pools that are large enough."""
    return Machine(
        Config("restructure", pool=64 * W.PAGE_2M, page_size=W.PAGE_2M, other_pool=2 * W.PAGE_1G,
               buddy=64 * W.PAGE_2M, thp="always", kernel=capture.kernel, stage2=capture.stage2, pti=capture.pti,
               nx_huge_pages=capture.haswell, l1tf=capture.haswell, protection_keys=not capture.haswell)
    )  # fmt: skip


class Replay:
    """One scenario of a capture, on a machine of its own or on the one given."""

    def __init__(self, capture: Capture, checkpoints: list[Checkpoint], machine: Machine | None = None) -> None:
        self.capture = capture
        self.checkpoints = checkpoints
        self.protected_vms = makes_protected_vms(list(capture.checkpoints))
        self.machine = machine or machine_like(capture)
        self.process = self.machine.create_process()
        self.parent: AddressSpace | None = None
        self.child: AddressSpace | None = None
        self.gmems: dict[str, Any] = {}
        self.files: dict[str, HugetlbFile] = {}
        self.bar: Device | None = None
        self.devices: list[tuple[int, int]] = []
        self.frames = Frames()
        self.left_out = left_out(checkpoints)
        self.partial = ""  # what memory the scenario has by now that is left out
        self.ranges = list(self._ranges())
        self.guests = Guests(self)
        self.done = Done()
        self.leaves_before: dict[int, Entries] = {}  # as captured at a process's last checkpoint
        self.huge_counted = huge_folios.Counted()
        self.hugetlb: list[Span] = []  # mappings of HugeTLB memory
        self.file_pages: list[Span] = []  # mappings whose pages stay when they leave the process

    def _ranges(self) -> Iterator[Span]:
        """The address ranges that the scenario maps, over its whole life, except what is left out."""
        for operation in every(self.checkpoints):
            words = operation.words
            if operation.name == "map" and (span := span_of(operation)) not in self.left_out:
                assert span is not None
                yield span
            elif operation.name == "remap" and len(words) == 5 and not self._on_left_out(operation):
                yield Span(number(words[4]), number(words[4]) + number(words[3]))

    def _on_left_out(self, operation: Operation) -> str:
        """The kind of memory that is left out which an operation is about, or ""."""
        span = span_of(operation)
        if span is None or operation.name in ("slot", "slot2"):
            return ""
        met = [(other, kind) for other, kind in self.left_out.items() if other.meets(span)]
        if not met:
            return ""
        if operation.name != "touch" and not met[0][0].holds(span):
            raise NotModelledError(f"{operation.name} over {met[0][1]} and other memory")
        return met[0][1]

    def run(self) -> Done:
        """Replay to the end, or to what pgemu does not have. MismatchError at the first checkpoint that differs."""
        done = self.done
        for i, checkpoint in enumerate(self.checkpoints):
            try:
                for operation in self.new_ones(checkpoint.ops):
                    self.operate(checkpoint, operation)
            except NotModelledError as error:
                done.left[str(error)] = len(self.checkpoints) - i
                break
            self.compare(checkpoint)
            if self.partial:
                done.in_part += 1
                done.left[self.partial] = done.left.get(self.partial, 0) + 1
            else:
                done.whole += 1
        return done

    def new_ones(self, operations: tuple[Operation, ...]) -> tuple[Operation, ...]:
        """Operations but for those that the parent did before a fork: its first checkpoint after the child's begins
        with them again."""
        names = [operation.name for operation in operations]
        again = self.child is not None and self.process is self.child and "fork" in names
        return operations[names.index("fork") :] if again else operations

    def compare(self, checkpoint: Checkpoint) -> None:
        """MismatchError unless everything is as it was captured."""
        if any(checkpoint.raw.get("smaps", ())):
            self.process.read_smaps()  # the capture was taken after it had been read
        self.compare_process(checkpoint)
        if not self.partial:
            self.guests.compare(checkpoint)
        self.compare_rules(checkpoint)

    def compare_rules(self, checkpoint: Checkpoint) -> None:
        if broken := self.machine.check():
            raise MismatchError(f"{checkpoint.name}: {broken} rules broken: {self.machine.broken}")

    # ------------------------------------------------------------------ operations

    def operate(self, checkpoint: Checkpoint, operation: Operation) -> None:
        name = operation.name
        if lacks := missing(operation):
            raise NotModelledError(lacks)
        if kind := self._on_left_out(operation):
            self.partial = kind
            return
        if self.guests.is_left_out(operation):
            return
        method = getattr(self, f"op_{name}", None) or getattr(self.guests, name, None)
        if method is None:
            raise NotModelledError(name)
        got = method(operation, *operation.words[1:])
        if got is not None and got != returned(operation):
            raise MismatchError(f"{checkpoint.name}: {operation.text}: {got}, captured {operation.result}")

    def op_trace(self, operation: Operation, *words: str) -> None:
        """Nothing to do here."""

    op_kvmcap = op_vmcap = op_pool = op_vfioopen = op_trace

    def set_gmem_slot(self, vm: Vm, slot: int, gpa: int, size: int, hva: int, gmem: str, offset: int, bits: int) -> int:
        """A memory slot over a guest_memfd: what the system call returned."""
        return vm.set_memory_region(
            slot, gpa, size, hva, gmem=self.gmems[gmem], gmem_offset=offset, log_dirty_pages=bool(bits & 1)
        ).status

    def is_of_design(self, gmem: str) -> bool:
        """Whether a guest_memfd is one of the designs', whose slots have no numbers."""
        return False

    def accessed(self, vm: str, gpa: int, stored: int | None) -> None:
        """A guest's access found memory; `stored`: the number of the store in its `gtouch`, if it was one."""

    def op_write(self, operation: Operation, path: str, value: str) -> int:
        if path != OPTIMIZE:
            raise NotModelledError(f"write {path}")
        self.machine.optimize_vmemmap = value == "1"
        return 0

    def op_poke(self, operation: Operation, address: str, data: str) -> int:
        self.process.touch(number(address), write=True)
        return 0

    def op_unlink(self, operation: Operation, path: str) -> int:
        return self.files.pop(path.rsplit("/", 1)[1]).close().status

    def op_map(self, operation: Operation, address: str, length: str, rights: str, kind: str, option: str = "") -> int:
        at, size, prot = number(address), number(length), protection(rights)
        options = {"populate": option == "populate", "noreserve": option == "noreserve", "locked": option == "locked"}
        name, *rest = kind.split(":")
        if option == "fixed":
            self.process.munmap(at, size)
        if name in ("anon", "shanon"):
            result = self.process.mmap_anonymous(at, size, prot, shared=name == "shanon", **options)
        elif name.removeprefix("s") in HUGE:
            page_size, shared = HUGE[name.removeprefix("s")], name.startswith("s")
            result = self.process.mmap_hugetlb(at, size, prot, page_size=page_size, shared=shared, **options)
        elif name in ("hfile", "phfile"):
            if rest[0] not in self.files:
                self.files[rest[0]] = self.machine.create_hugetlb_file(self.file_size(rest[0]))
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
            raise NotModelledError(f"map {name}")
        if name.removeprefix("s") in HUGE or name in ("hfile", "phfile"):
            self.hugetlb.append(Span(at, at + size))
        if name not in ("anon", "huge2m", "huge1g"):
            self.file_pages.append(Span(at, at + size))
        return at if result.status == 0 else result.status

    def file_size(self, name: str) -> int:
        """A hugetlbfs file is as long as the scenario's mappings of it need."""
        maps = [op.words for op in every(self.checkpoints) if op.name == "map"]
        parts = [(words[4].split(":"), number(words[2])) for words in maps]
        return max(number(kind[2]) + size for kind, size in parts if kind[0] in ("hfile", "phfile") and kind[1] == name)

    def op_touch(self, operation: Operation, address: str, stride: str, count: str, how: str) -> int:
        for i in range(int(count)):
            at = number(address) + i * number(stride)
            status = self.process.touch(at, write=how == "w", execute=how == "x").status
            if status & SIGNALS:
                note = f"stopped at touch {i} by signal {11 if status & W.VM_FAULT_SIGSEGV else 7}"
                note += " code 4" if status & POISONED else ""  # BUS_MCEERR_AR
                if not any(text.startswith(note) for text in operation.notes):
                    raise MismatchError(f"{operation.text}: {note}, captured {operation.notes}")
                return -W.EFAULT
        return int(count)

    def op_remap(self, operation: Operation, old: str, length: str, new_length: str, new: str = "0") -> int:
        status = self.process.remap(number(old), number(length), number(new_length), number(new)).status
        return status or number(new) or number(old)

    def op_unmap(self, operation: Operation, address: str, length: str) -> int:
        self.guests.frames.forget("host", number(address), number(length))
        return self.process.munmap(number(address), number(length)).status

    def op_prot(self, operation: Operation, address: str, length: str, rights: str) -> int:
        return self.process.protect(number(address), number(length), protection(rights)).status

    def op_adv(self, operation: Operation, address: str, length: str, advice: str) -> int | None:
        at, size = number(address), number(length)
        if advice in ("dontneed", "dontneed_locked"):
            if not any(span.meets(Span(at, at + 1)) for span in self.file_pages):
                self.guests.frames.forget("host", at, size)
            return self.process.madvise_dontneed(at, size, locked=advice == "dontneed_locked").status
        if advice in ("dontfork", "dofork"):
            act = self.process.madvise_dontfork if advice == "dontfork" else self.process.madvise_dofork
            return act(at, size).status
        if advice in ("populate_read", "populate_write"):
            return self.process.populate(at, size, write=advice == "populate_write").status
        if advice in ("guard_install", "guard_remove"):
            act = self.process.guard_install if advice == "guard_install" else self.process.guard_remove
            return act(at, size).status
        if advice == "collapse":
            return self.process.madvise_collapse(at, size).status
        if advice in ("nohugepage", "hugepage"):
            act = self.process.madvise_hugepage if advice == "hugepage" else self.process.madvise_nohugepage
            return act(at, size).status
        raise NotModelledError(f"adv {advice}")

    def op_lock(self, operation: Operation, address: str, length: str) -> int:
        return self.process.mlock(number(address), number(length)).status

    def op_lockonfault(self, operation: Operation, address: str, length: str) -> int:
        return self.process.mlock(number(address), number(length), on_fault=True).status

    def op_unlock(self, operation: Operation, address: str, length: str) -> int:
        return self.process.munlock(number(address), number(length)).status

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
            self.guests.write_own_memory(self.child)
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
        if int(bits, 0) >> 2:
            raise NotModelledError("gmem of large folios that no process maps")
        bits = str(int(bits, 0))
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
        self.guests.frames.forget(f"gmem {name}", number(offset), number(length))
        self.forget_file_pages(name, number(offset), number(length))
        return self.gmems[name].punch_hole(number(offset), number(length)).status

    def forget_file_pages(self, name: str, offset: int, length: int) -> None:
        """What a slot over a mapping of the file showed of its range is freed, too."""
        for operation in every(self.checkpoints):
            words = operation.words
            if operation.name == "map" and words[4].startswith(f"gmem:{name}:"):
                start = number(words[1]) - number(words[4].split(":")[2])
                self.guests.frames.forget("host", start + offset, length)

    def op_galloc(self, operation: Operation, name: str, offset: str, length: str) -> int:
        if name not in self.gmems:
            return -W.EBADF
        return self.gmems[name].allocate(number(offset), number(length)).status

    def op_gclose(self, operation: Operation, name: str) -> int:
        return self.gmems.pop(name).close().status if name in self.gmems else -W.EBADF

    def is_hugetlb(self, address: int) -> bool:
        return any(start <= address < end for start, end in self.hugetlb)

    def is_device(self, address: int) -> bool:
        return any(start <= address < start + size for start, size in self.devices)

    # ------------------------------------------------------------------ comparing

    def compare_process(self, checkpoint: Checkpoint) -> None:
        where = f"{self.capture.name} {checkpoint.scenario} {checkpoint.name}"
        away = list(self.left_out)
        leaves, tables = captured_entries(checkpoint, self.ranges)
        self.age(checkpoint, leaves)
        leaves_here, tables_here = entries_here(self.process, self.ranges)
        tables, tables_here = without(tables, away), without(tables_here, away)
        tables = self.without_own(checkpoint, tables, tables_here)
        same_flags(f"{where}: leaves", leaves, leaves_here)
        same_flags(f"{where}: tables", tables, tables_here)
        self.compare_frames(where, (leaves, tables), (leaves_here, tables_here))
        self.compare_user_root(where, checkpoint)
        if not away:
            self.done.huge_pages += huge_folios.compare_pages(
                where, self.machine, self.process, checkpoint, self.ranges
            )
            self.huge_counted.compare(where, self.machine, checkpoint)
        if not away and not self.guests.made:
            self.compare_counts(where, tables)

    def age(self, checkpoint: Checkpoint, leaves: Entries) -> None:
        """Clear the accessed bit where it went there though no operation was about the leaf: the kernel aged it, which
        nobody can foresee (mm/vmscan.c). How many were is in `done.aged`."""
        before = self.leaves_before.get(self.process.space, {})
        self.leaves_before[self.process.space] = leaves
        spans = [span for operation in checkpoint.ops if (span := span_of(operation)) is not None]
        for key, entry in leaves.items():
            if before.get(key) != entry | ACCESSED or entry & ACCESSED:
                continue
            level, at, ours = self.process.walk(key[0])[-1]
            own = span_at(*key)
            if (level, ours) == (key[1], ours | ACCESSED) and not any(own.meets(span) for span in spans):
                self.machine.arrays.ram[at >> 3] = ours & ~ACCESSED
                self.done.aged += 1

    def without_own(self, checkpoint: Checkpoint, tables: Entries, here: Entries) -> Entries:
        """Tables but for those that only the program's own mappings need, which are not made here."""
        only = [key for key in tables if key not in here]
        own = [Span(area.start, area.end) for area in checkpoint.areas]
        own = [span for span in own if not any(span.meets(known) for known in self.ranges)]
        spare = {key for key in only if any(span.meets(span_at(*key)) for span in own)}
        return {key: entry for key, entry in tables.items() if key not in spare}

    def compare_frames(self, where: str, there: tuple[Entries, Entries], here: tuple[Entries, Entries]) -> None:
        for (va, level), entry in there[0].items():
            ours = here[0][va, level]
            first, first_here = frame(entry, level), frame(ours, level)
            if self.is_device(va) and first != first_here:
                raise MismatchError(f"{where}: {va:#x}: device frame {first_here:#x}, captured {first:#x}")
            if level > 1 and self.is_hugetlb(va):
                self.frames.compare_huge(where, first, first_here)
        self.frames.compare(where, self.process.space, snapshot(there, here))

    def compare_user_root(self, where: str, checkpoint: Checkpoint) -> None:
        """The user's copies of the top entries that the scenario uses."""
        if not checkpoint.pti_roots:
            return
        ram = self.machine.arrays.ram
        away = {index for start, end in self.left_out for index in range(start >> 39, (end - 1 >> 39) + 1)}
        for start, end in self.ranges:
            for index in set(range(start >> 39, (end - 1 >> 39) + 1)) - away:
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
