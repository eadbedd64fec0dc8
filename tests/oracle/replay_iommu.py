"""Scenarios of VFIO and iommufd on pgemu's own objects: results, process, I/O tables, accounts and counts of pins.

Beside what every replay compares: what the maps and unmaps return; of each device that is translated the domain's
levels, every I/O page with its rights and (by what it is, not by number) its frame, the leaves' sizes; VmLck, VmPin;
references and pins of the frames that the scenario named, and what devices wrote to them.

Frames of 4K memory are the allocator's choice, and which of them follow one another with it: AMD's leaves over such
memory are compared page by page, those over huge pages as they are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from oracle import iommu_domains
from oracle.capture import Capture, Checkpoint, Operation
from oracle.operations import ENTRY_LIMIT, MismatchError, NotModelledError, every, number, protection
from oracle.process_tables import Entries
from oracle.replay import ACCESSED, Replay
from oracle.replay_pfnmap import Kind, ReplayPfnmap, kind_of, machine_of
from pgemu.objects.devices import Accounts, Ioas, IoSpace, VfioContainer
from pgemu.objects.io_space import IoDevice
from pgemu.objects.machine import Config, Machine
from pgemu.objects.pins import leaves_of
from pgemu_kernels import words as W
from pgemu_kernels.formats.iommu import AMD_PAGE_SIZES

ON_LRU = 1 << 5
PAGE = 4096
ADDRESS = 0x000F_FFFF_FFFF_F000
EDU_MASK = (1 << 28) - 1  # QEMU's edu reaches 28 bits: edu_clamp_addr()

Array = np.ndarray[Any, Any]


class Pages(NamedTuple):
    """I/O pages in ascending order: page number, frame, rights (1 read, 2 write), log 2 of the leaf's 4K pages."""

    page: Array
    frame: Array
    rights: Array
    size: Array


def _expand(page: Array, frame: Array, rights: Array, pages: Array) -> Pages:
    """Leaves to pages."""
    order = np.argsort(page)
    page, frame, rights, pages = page[order], frame[order], rights[order], pages[order].astype(np.int64)
    within = np.arange(pages.sum()) - np.repeat(np.cumsum(pages) - pages, pages)
    each = within.astype(np.uint64)
    size = np.repeat(np.log2(pages).astype(np.int64), pages)
    return Pages(np.repeat(page, pages) + each, np.repeat(frame, pages) + each, np.repeat(rights, pages), size)


def pages_here(space: IoSpace) -> Pages:
    """Those of a domain of ours."""
    fmt, ram = space.table.format, space.machine.arrays.ram
    starts, pages = leaves_of(ram, fmt, space.root)
    # A leaf lies where its size has room: AMD's other powers of two, below the next level.
    level = np.log2(pages.astype(np.float64)).astype(np.int64) // 9 + 1
    table, words = np.full(len(starts), space.root >> 12, np.uint64), np.zeros(len(starts), np.uint64)
    for at in range(fmt.levels, 0, -1):
        below = at >= level
        index = (starts[below, 0] >> np.uint64(9 * (at - 1))) & np.uint64(511)
        words[below] = ram.reshape(-1, 512)[table[below], index]
        table[below] = (words[below] & np.uint64(ADDRESS)) >> np.uint64(12)
    return _expand(starts[:, 0], starts[:, 1], _rights(fmt, words), pages)


def pages_there(capture: Capture, row: dict[str, Any]) -> Pages:
    """Those of a captured domain."""
    fmt = iommu_domains.format_of(capture, row["kind"], row["levels"])
    page, words, level = [], [], []
    for va, at, entry, count, step in row["leaves"]:
        size = 1 << 9 * (at - 1)
        i = np.arange(count, dtype=np.uint64)
        page.append(np.uint64(int(va, 16) >> 12) + i * np.uint64(size))
        words.append(np.uint64(int(entry, 16)) + i * np.uint64(step))
        level.append(np.full(count, at))
    if not page:
        nothing = np.zeros(0, np.uint64)
        return Pages(nothing, nothing, nothing, nothing)
    every_page, every_word, every_level = map(np.concatenate, (page, words, level))
    sizes = np.zeros(len(every_word), np.uint64)
    for at in np.unique(every_level).tolist():
        sizes[every_level == at] = fmt.sizes_of_leaves(at, every_word[every_level == at]) >> np.uint64(12)
    first = every_page & (sizes - np.uint64(1)) == 0
    frames = ((every_word & np.uint64(ADDRESS)) >> np.uint64(12)) & ~(sizes - np.uint64(1))
    return _expand(every_page[first], frames[first], _rights(fmt, every_word[first]), sizes[first])


def _rights(fmt: Any, words: Array) -> Array:
    read, write = (words & np.uint64(bit) != 0 for bit in (fmt.read, fmt.write))
    return read.astype(np.uint64) | write.astype(np.uint64) << np.uint64(1)


def determines(frames: Array, others: Array) -> bool:
    """Whether equal frames stand beside equal ones of the others."""
    low = frames < np.uint64(1 << 24)  # others are a device's memory, few of them
    place = np.zeros(1 << 24, np.uint64)
    place[frames[low]] = others[low]
    fine = bool((place[frames[low]] == others[low]).all())
    high = {*zip(frames[~low].tolist(), others[~low].tolist(), strict=True)}
    return fine and len({frame for frame, _ in high}) == len(high)


def machine_like(capture: Capture, checkpoints: list[Checkpoint], kind: Kind) -> Machine:
    """The captured machine; 4K frames come in no order, so that few follow one another."""
    if any(op.name == "gmem" for op in every(checkpoints)):
        return machine_of(kind, capture)
    return Machine(
        Config("restructure", pool=64 * W.PAGE_2M, page_size=W.PAGE_2M, other_pool=2 * W.PAGE_1G, seed=1,
               buddy=64 * W.PAGE_2M, thp="always", kernel=capture.kernel, stage2=capture.stage2, pti=capture.pti)
    )  # fmt: skip


class ReplayIommu(ReplayPfnmap):
    """One scenario."""

    def __init__(self, capture: Capture, checkpoints: list[Checkpoint]) -> None:
        kind = kind_of(checkpoints)
        self.prepared = machine_like(capture, checkpoints, kind)
        super().__init__(capture, checkpoints, like=kind, machine=self.prepared)
        self.unit: Any = "amd" if capture.raw["machine"]["iommu"] == "amd" else "vtd"
        self.parameters: dict[str, Any] = {}
        if self.unit == "amd":
            self.parameters["most_levels"] = iommu_domains.QEMU_AMD_LEVELS if capture.kernel == "7.3" else 6
            if capture.kernel == "7.3":  # those that four levels have room for
                self.parameters["page_sizes"] = AMD_PAGE_SIZES & (1 << 47) - 1
        self.container: VfioContainer | None = None
        self.iommufd = self.machine.create_iommufd()
        self.ioases: dict[str, Ioas] = {}
        self.bound: dict[str, str] = {}
        self.attached: dict[str, tuple[IoSpace, IoDevice]] = {}  # by PCI address
        self.users: dict[str, str] = {}  # index of VFIO's device: its PCI address
        self.limit = 65535
        self.buffers: dict[str, bytes] = {}
        self.pages = 0  # I/O pages compared
        # What is unmapped at once, and so which tables go with it, depends on which frames follow one another.
        self.scattered = any(op.name == "adv" and op.words[3] == "nohugepage" for op in every(checkpoints))

    # ------------------------------------------------------------------ VFIO type1

    def op_vfioopen(self, operation: Operation, device: str, kind: str, index: str = "0") -> int:
        self.find_bar()
        if self.container is None:
            self.container = self.machine.create_vfio_container(
                self.unit, version=1 if kind == "1" else 2, dma_entry_limit=self.limit, **self.parameters
            )
        self.attached[device] = self.container, self.container.attach()
        self.users[index] = device
        return 0

    def find_bar(self) -> None:
        if self.bar is None:
            self.bar = self.machine.create_device(self.bar_frame(), self.capture.raw["machine"]["bar_bytes"] >> 12)

    def bar_frame(self) -> int:
        """First frame of the device's memory: what its first map in any scenario entered."""
        for checkpoint in self.capture.checkpoints:
            for op in checkpoint.ops:
                if op.name == "dmamap" and checkpoint.scenario == "04-bar" and checkpoint.name == "map_64K":
                    leaves = checkpoint.raw["iommu"][0]["leaves"]
                    at = hex(number(op.words[1]))
                    return (
                        next(int(entry, 16) & ADDRESS & -(64 << 10) for va, _, entry, _, _ in leaves if va == at) >> 12
                    )
        return 1 << 24

    def op_vfioclose(self, operation: Operation) -> int:
        if self.container is not None:
            self.container.close()
        else:
            for _, device in self.attached.values():
                device.detach()
        self.container, self.attached, self.users = None, {}, {}
        return 0

    def op_vfiomaster(self, operation: Operation, *words: str) -> None:
        """Bus mastering of the device."""

    op_vfiomem_of = ReplayPfnmap.op_vfiomem

    def op_vfiomem(self, operation: Operation, state: str) -> int:
        return self.op_vfiomem_of(operation, state)

    def op_map(self, operation: Operation, address: str, length: str, rights: str, kind: str, option: str = "") -> int:
        """Reserved RAM is mapped write-back: arch/x86/mm/pat/memtype.c:lookup_memtype()."""
        name, *rest = kind.split(":")
        if name != "devmem" or number(rest[0]) >= self.capture.raw["machine"]["ram_below_4g"]:
            return super().op_map(operation, address, length, rights, kind, option)
        at, size = number(address), number(length)
        device = self.machine.create_device(number(rest[0]) >> 12, size >> 12, remap=True, memory_type="write-back")
        self.devices.append((at, size))
        return self.process.mmap_device(device, at, size, protection(rights)).status or at

    def op_dmainfo(self, operation: Operation) -> None:
        assert self.container
        info = self.container.info()
        ours = [f"flags 0x3 pgsizes {info.page_sizes:#x}", "capability 2", f"dma avail {info.available}"]
        ours += [f"iova range {start:#x} {last:#x}" for start, last in info.ranges]
        if tuple(ours) != operation.notes:
            raise MismatchError(f"dmainfo: {ours}, captured {operation.notes}")

    def op_write(self, operation: Operation, path: str, value: str) -> None:
        if path == ENTRY_LIMIT:
            self.limit = int(value)
        else:
            super().op_write(operation, path, value)

    def op_dmamap(self, operation: Operation, iova: str, size: str, vaddr: str, rights: str) -> int:
        assert self.container
        return self.container.map(
            number(iova), number(size), self.process, number(vaddr), read="r" in rights, write="w" in rights
        ).status

    def op_dmaunmap(self, operation: Operation, iova: str, size: str) -> int:
        assert self.container
        done = self.container.unmap_all() if size == "all" else self.container.unmap(number(iova), number(size))
        return done.status or done.detail

    # ------------------------------------------------------------------ iommufd

    def op_iommufd(self, operation: Operation, *words: str) -> None:
        """Opens /dev/iommu."""

    op_ioranges = op_iommufd

    def op_iommufdclose(self, operation: Operation) -> int:
        for _, device in self.attached.values():
            device.detach()
        for ioas in self.ioases.values():
            ioas.unmap_all()
            ioas.destroy()
        self.attached, self.ioases = {}, {}
        return 0

    def op_ioas(self, operation: Operation, name: str) -> None:
        self.ioases[name] = self.iommufd.create_ioas(self.unit, **self.parameters)

    def op_iobind(self, operation: Operation, device: str, index: str) -> None:
        self.find_bar()
        self.bound[index] = self.users[index] = device

    def op_ioattach(self, operation: Operation, index: str, name: str) -> None:
        self.attached[self.bound[index]] = self.ioases[name], self.ioases[name].attach()

    def op_iodetach(self, operation: Operation, index: str) -> int:
        self.attached.pop(self.bound[index])[1].detach()
        return 0

    def op_iodestroy(self, operation: Operation, name: str) -> int:
        return self.ioases[name].destroy().status

    def op_iomap(self, operation: Operation, name: str, iova: str, size: str, vaddr: str, rights: str) -> int:
        at = None if iova == "any" else number(iova)
        done = self.ioases[name].map(
            at, number(size), self.process, number(vaddr), read="r" in rights, write="w" in rights
        )
        return done.status or done.detail

    def op_iounmap(self, operation: Operation, name: str, iova: str, size: str) -> int:
        ioas = self.ioases[name]
        done = ioas.unmap_all() if size == "all" else ioas.unmap(number(iova), number(size))
        return done.status or done.detail

    def op_iocopy(
        self, operation: Operation, name: str, iova: str, size: str, source: str, there: str, rights: str
    ) -> int:
        at = None if iova == "any" else number(iova)
        done = self.ioases[name].copy(
            at, number(size), self.ioases[source], number(there), read="r" in rights, write="w" in rights
        )
        return done.status or done.detail

    def op_iomapfile(
        self, operation: Operation, name: str, iova: str, size: str, file: str, offset: str, rights: str
    ) -> int:
        if not file.startswith("gmem:"):
            raise NotModelledError("iomapfile of a file by its name")
        done = self.ioases[name].map_file(
            number(iova), number(size), self.process, self.gmems[file[5:]], number(offset), write="w" in rights
        )
        return done.status or done.detail

    # ------------------------------------------------------------------ what devices do

    def op_edu(self, operation: Operation, index: str, iova: str, size: str, how: str) -> int:
        """QEMU's edu copies from or to its buffer; what the unit refuses leaves it as it is."""
        device = self.attached[self.users[index]][1]
        try:
            if how == "get":
                self.buffers[index] = device.read(number(iova) & EDU_MASK, number(size))
            else:
                device.write(number(iova) & EDU_MASK, self.buffers.get(index, bytes(4096))[: number(size)])
        except OSError as error:
            if error.errno != W.EFAULT:
                raise
        return 0

    def op_pfnset(self, operation: Operation, name: str, pfn: str) -> None:
        """Names a frame that no mapping has."""

    def op_selfmem(self, operation: Operation, address: str, length: str, how: str) -> int:
        """/proc/self/mem and ptrace reach a device's memory by vm_ops->access: generic_access_phys()."""
        return (
            number(length) if self.is_device(number(address)) else super().op_selfmem(operation, address, length, how)
        )

    def op_ptpeek(self, operation: Operation, address: str) -> int:
        return 0 if self.is_device(number(address)) else super().op_ptpeek(operation, address)

    # ------------------------------------------------------------------ comparing

    def compare(self, checkpoint: Checkpoint) -> None:
        super().compare(checkpoint)
        if self.child is not None and self.process is self.child:
            return  # the domains are the parent's, which has not gone on
        self.compare_accounts(checkpoint)
        for row in iommu_domains.translated(checkpoint):
            space, _ = self.attached.get(row["device"], (None, None))
            if space is not None:
                self.compare_domain(f"{checkpoint.scenario} {checkpoint.name} {row['device']}", row, space)

    def compare_process(self, checkpoint: Checkpoint) -> None:
        if any(op.name == "gmem" for op in every(self.checkpoints)):
            super().compare_process(checkpoint)
            return
        Replay.compare_process(self, checkpoint)
        for row in checkpoint.raw.get("frames", []):
            if str(row["name"]) in self.named:
                self.compare_frame(f"{checkpoint.scenario} {checkpoint.name}", row, self.named[str(row["name"])].here)

    def age(self, checkpoint: Checkpoint, leaves: Entries) -> None:
        """Entries may be aged between two checkpoints, and what is made of them then, and before the first one."""
        super().age(checkpoint, leaves)
        for key, entry in leaves.items():
            if entry & ACCESSED:
                continue
            level, at, ours = self.process.walk(key[0])[-1]
            if key[1] == level and ours & ACCESSED:
                self.machine.arrays.ram[at >> 3] = ours & ~ACCESSED
                self.done.aged += 1

    def compare_accounts(self, checkpoint: Checkpoint) -> None:
        status = checkpoint.raw["status"]
        ours = Accounts.of(self.process)
        if (status["VmLck"], status["VmPin"]) != (4 * ours.locked, 4 * ours.pinned):
            raise MismatchError(f"{checkpoint.name}: {ours}, captured {status['VmLck']} and {status['VmPin']} KiB")

    def compare_domain(self, where: str, row: dict[str, Any], space: IoSpace) -> None:
        there, here = pages_there(self.capture, row), pages_here(space)
        if len(there.page) != len(here.page) or (there.page != here.page).any():
            missing = sorted({*there.page.tolist()} ^ {*here.page.tolist()})
            raise MismatchError(f"{where}: {len(here.page)} I/O pages, captured {len(there.page)}: {missing[:3]}")
        self.pages += len(there.page)
        if space.table.format.levels != row["levels"]:
            raise MismatchError(f"{where}: {space.table.format.levels} levels, captured {row['levels']}")
        if (there.rights != here.rights).any():
            raise MismatchError(f"{where}: rights {here.rights[there.rights != here.rights][:3]}")
        if not (determines(there.frame, here.frame) and determines(here.frame, there.frame)):
            raise MismatchError(f"{where}: frames stand for other pages than captured")
        joined = self.joined(here)
        ours, theirs = np.minimum(here.size, joined), np.minimum(there.size, joined)
        different = ours != theirs
        if different.any():
            i = int(np.flatnonzero(different)[0])
            raise MismatchError(
                f"{where}: page {int(here.page[i]):#x} in a leaf of 2^{here.size[i]}, captured 2^{there.size[i]}"
            )
        if self.unit == "vtd" and not self.scattered:
            tables = sum(len(pages) for pages in space.table.table_pages().values()) - 1
            if tables != len(row["tables"]):
                raise MismatchError(f"{where}: {tables} tables, captured {len(row['tables'])}")

    def joined(self, pages: Pages) -> Array:
        """Up to which size (log 2 of 4K pages) the leaf over each page is not the allocator's choice: which small
        pages, or huge ones, follow one another is. Only AMD's leaves join them."""
        if self.unit == "vtd":
            return np.full(len(pages.page), 64)
        heads, inverse = np.unique(pages.frame >> np.uint64(9), return_inverse=True)
        found = [self.joined_at(int(head) << 9) for head in heads]
        return np.array(found, np.int64)[inverse]

    def joined_at(self, pfn: int) -> int:
        """The same of 2M of frames."""
        if self.is_ordinary(pfn):
            return 0
        if not self.machine.memory.holds(np.array([pfn << 12], np.uint64))[0]:
            return 64
        return int(self.machine.folio(pfn).order)

    def compare_frame(self, where: str, row: dict[str, Any], pfn: int) -> None:
        """References and pins of a frame that was named; of guest_memfd its struct page, too."""
        if not self.is_ordinary(pfn) and any(op.name == "gmem" for op in every(self.checkpoints)):
            super().compare_frame(where, row, pfn)
            return
        if not self.is_ordinary(pfn) and not self.machine.memory.holds(np.array([pfn << 12], np.uint64))[0]:
            return
        if row["refcount"] < 512 or int(row["mapcount_word"], 16) >> 31:
            return  # not pinned: the process's entries tell, or it is free or something else by now
        ours = self.references(pfn)
        waits = not int(row["words"][0], 16) & ON_LRU  # for an LRU list, in a batch that holds a reference
        if row["refcount"] not in (ours, ours + waits):
            raise MismatchError(f"{where}: frame {row['name']}: {ours} references, captured {row['refcount']}")

    def references(self, pfn: int) -> int:
        """folio_ref_count() of the folio's head; of 4K pages of memory as it would be."""
        machine = self.machine
        if not self.is_ordinary(pfn):
            return int(machine.struct_page(pfn)[6]) >> 32
        word, pins = int(machine.arrays.counts[pfn]), int(machine.arrays.counts[machine.register(W.R_PINNED) + pfn])
        return (word & int(W.PAGE_MAPPINGS)) + bool(word & int(W.PAGE_CACHED)) + 1024 * pins
