"""The machine: arrays, their boot, and the ways to run operations on them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from pgemu.machine.boot import allocate, node_word, set_registers
from pgemu.machine.config import Config as Config
from pgemu.machine.statistics import Statistics
from pgemu_kernels import words as W
from pgemu_kernels.engine.handle import Machine as Arrays, describe
from pgemu_kernels.formats import bits as formats, page_format
from pgemu_kernels.formats.page_format import PageFormat
from pgemu_kernels.words.operations import Operation

if TYPE_CHECKING:
    from pgemu.images.folio import Folio
    from pgemu.images.image import Root
    from pgemu.machine.physical import PhysicalMemory
    from pgemu.trace.schema import Records

Array = np.ndarray[Any, Any]
NONE = np.uint64(0xFFFF_FFFF_FFFF_FFFF)  # "no operation" of run_pooling()


class Results(NamedTuple):
    """What operations returned.

    status: int64[n], 0, a VM_FAULT_* or RET_PF_* code, or -errno, as the kernel's function returns it.
    detail: uint64[n], the leaf level of a fault (1 = 4K, 2 = 2M, 3 = 1G), the failing offset of a refused
    conversion or hole, the frame number of a reference.
    """

    status: Array
    detail: Array


class Result(NamedTuple):
    """The same of one operation."""

    status: int
    detail: int


@dataclass
class Machine:
    """A machine of one design: physical memory, page tables, folios, guest_memfd inodes, processes, VMs.

    >>> machine = Machine(Config("pfnmap", pool=4 << 30))
    >>> gmem = machine.create_guest_memfd(4 << 30, shared=False)
    >>> vm = machine.create_vm(protected=True)
    >>> vm.bind(gmem, gpa=0).status
    0
    >>> vm.touch(0x1234000).detail  # level 3: a 1G leaf
    3

    Not thread-safe; two machines may run on two threads, kernels release the GIL.
    Errors that a kernel returns are results. OSError (ENOMEM, EINVAL, ENOSPC) comes only from creating
    something, ValueError from misuse.
    """

    config: Config
    arrays: Arrays = field(init=False, repr=False)
    descriptor: Array = field(init=False, repr=False)
    page_tables: list[PageTable] = field(init=False, repr=False, default_factory=list)
    _frames_limit: int = field(init=False, repr=False, default=0)

    def __post_init__(self) -> None:
        self.arrays = allocate(self.config)
        self.descriptor = describe(self.arrays)
        set_registers(self.config, self.arrays)
        from pgemu_kernels.folios.boot import MACHINE, provide

        if provide(self.descriptor, MACHINE, np.uint64(0)) != 0 or not self._prepare_memory():
            raise _os_error(W.ENOMEM, f"the vmemmap of {self.config.pool_pages} pages needs more frames")
        self._frames_limit = self.register(W.R_FRAMES_LIMIT)

    # ------------------------------------------------------------------ making

    def _prepare_memory(self) -> bool:
        """The second part of boot, of memory whose struct pages are all there, if any: whether the frames sufficed."""
        small = self.config.order == 0 and self.config.pool
        if self.config.hvo and not (self.config.buddy or self.config.reserved or small):
            return True
        from pgemu_kernels.run.pooling import run_pooling

        nothing = np.zeros(1, np.uint64)
        columns = (nothing,) * 5
        return int(run_pooling(self.descriptor, *columns, nothing.view(np.int64), nothing, NONE)) == 0

    def register(self, index: Any) -> int:
        """A named scalar of the machine (words.R_*)."""
        return int(self.arrays.state[index])

    # ------------------------------------------------------------------ formats

    def format_row(self, index: int) -> Array:
        """uint64[F_WORDS]: row `index` of the machine's formats (a view). ValueError for a row that is not in use.

        Rows 0 to 2 are the host's x86-64, NPT and EPT (formats.HOST_X86_64, STAGE2_NPT, STAGE2_EPT).
        """
        if not 0 <= index < self.register(W.R_FORMATS):
            raise ValueError(f"format row {index}: expected 0 to {self.register(W.R_FORMATS) - 1}")
        begin = int(W.STATE_FORMATS) + index * W.F_WORDS
        return self.arrays.state[begin : begin + W.F_WORDS]

    def add_format(self, fmt: PageFormat) -> int:
        """The row of an entry format, added if the machine has none that is equal. ValueError past words.FORMATS."""
        row = fmt.row()
        used = self.register(W.R_FORMATS)
        for index in range(used):
            if np.array_equal(self.format_row(index), row):
                return index
        if used == W.FORMATS:
            raise ValueError(f"format {fmt.name}: the machine has {W.FORMATS} formats already")
        self.arrays.state[W.R_FORMATS] = used + 1
        self.format_row(used)[:] = row
        return used

    # ------------------------------------------------------------------ objects

    def create_guest_memfd(
        self, size: int, *, shared: bool = False, flags: int | None = None, form: Form = "main", page_order: int = 0
    ) -> GuestMemfd:
        """Create a guest_memfd inode over the machine's guest memory, all private or (`shared`) all shared.

        flags: those of KVM_CREATE_GUEST_MEMFD instead, guest_memfd.CreateFlags or (form "rfc2") Rfc2Flags; without
        them the file can be mapped. form: whose checks of creation, mmap and bind: "main", "next" (linux-next: bind is
        prepared, then committed), "rfc2" (May 2025), "wip" (December 2025, with `page_order`). In "main" and "next",
        which know no huge pages, the machine's are used all the same.
        OSError: EINVAL as guest_memfd.check_creation() tells, ENOMEM when the pool cannot reserve the huge pages,
        ENOSPC past words.INODES inodes. ValueError for another form, or huge pages other than the machine's.
        """
        from pgemu.objects.guest_memfd import GuestMemfd

        return GuestMemfd.create(self, size, shared, flags, form, page_order)

    def set_mempolicy(self, mode: str | int, nodes: Iterable[int] = ()) -> Result:
        """set_mempolicy() of the tasks that fault memory in, where the inode has no policy; see GuestMemfd.mbind."""
        from pgemu.objects.guest_memfd import node_mask, policy_mode

        return self.operate(
            Operation.MEMORY_POLICY, flags=policy_mode(mode), object_=int(W.NO_INODE), address=node_mask(nodes)
        )

    def create_hugetlb_file(self, size: int, page_size: int = W.PAGE_2M) -> HugetlbFile:
        """Create a file of hugetlbfs with pages of 2 MiB or 1 GiB, all absent.

        ValueError for another page size; OSError: EINVAL for a size that is no positive multiple of it, ENOSPC.
        """
        from pgemu.objects.files import HugetlbFile

        return HugetlbFile.create(self, size, page_size)

    def create_device(
        self, pfn: int, pages: int, *, remap: bool = False, memory_type: str = "uncached-minus"
    ) -> Device:
        """Create a device's region of `pages` 4K frames from `pfn` on, without struct pages.

        remap: its mmap enters everything at once (remap_pfn_range()), else pages come at their fault.
        memory_type: "write-back", "write-combining", "uncached-minus" or "uncached".
        ValueError for another memory type or a region beyond 2^52; OSError ENOSPC.
        """
        from pgemu.objects.files import Device

        return Device.create(self, pfn, pages, remap, memory_type)

    def create_guest_memfd_4k(self, size: int, *, mmap: bool = True, init_shared: bool = True) -> GuestMemfd4K:
        """Create a guest_memfd as merged in Linux 6.8, of 4K folios; the flags are those of 6.18.

        mmap: GUEST_MEMFD_FLAG_MMAP. init_shared: GUEST_MEMFD_FLAG_INIT_SHARED, without which host faults end in
        SIGBUS; before 6.18 there are none. OSError: EINVAL for a size that is no positive multiple of 4096 or for a
        flag that the kernel lacks, ENOSPC.
        """
        from pgemu.objects.files import GuestMemfd4K

        return GuestMemfd4K.create(self, size, mmap, init_shared)

    def create_process(self) -> AddressSpace:
        """Create a process: an empty page table. OSError ENOMEM or ENOSPC."""
        from pgemu.objects.address_space import AddressSpace

        return AddressSpace.create(self)

    def create_vm(self, process: AddressSpace | None = None, *, protected: bool = False) -> Vm:
        """Create a VM of a process; `protected` is KVM_X86_SW_PROTECTED_VM. OSError ENOMEM or ENOSPC."""
        from pgemu.objects.vm import Vm

        return Vm.create(self, process, protected)

    def create_page_table(self, fmt: PageFormat | str) -> PageTable:
        """Create an empty page table of a format, or of the format of a name (page_format.FORMATS).

        OSError ENOMEM. ValueError for another name, past words.FORMATS formats, or for AMD's IOMMU format, whose
        tables this does not edit.
        """
        from pgemu.tables.page_table import PageTable

        return PageTable.create(self, fmt)

    # ------------------------------------------------------------------ huge pages

    def hugetlb(self, page_size: int = W.PAGE_2M) -> HugetlbPool:
        """The pool of huge pages of 2 MiB or 1 GiB. ValueError for another size."""
        from pgemu.objects.hugetlb import HugetlbPool

        if page_size not in (W.PAGE_2M, W.PAGE_1G):
            raise ValueError(f"page size {page_size}: expected {W.PAGE_2M} or {W.PAGE_1G}")
        return HugetlbPool(self, W.ORDER_2M if page_size == W.PAGE_2M else W.ORDER_1G)

    @property
    def optimize_vmemmap(self) -> bool:
        """vm.hugetlb_optimize_vmemmap: whether pages that join a pool are optimised; can be set."""
        return bool(self.register(W.R_OPTIMIZE_VMEMMAP))

    @optimize_vmemmap.setter
    def optimize_vmemmap(self, on: bool) -> None:
        self.arrays.state[W.R_OPTIMIZE_VMEMMAP] = on

    def free_folio(self, pfn: int) -> Result:
        """Drop a reference of a page that HugetlbPool.allocate() gave; the last one frees it. 0 or -EINVAL."""
        return self.operate(Operation.FOLIO_FREE, address=pfn << 12)

    def dissolve(self, pfn: int) -> Result:
        """Give a free huge page back to the page allocator: 0, -EBUSY in use or reserved, -ENOMEM, -EINVAL.

        mm/hugetlb.c:dissolve_free_hugetlb_folio()
        """
        return self.operate(Operation.DISSOLVE, address=pfn << 12)

    def poison(self, pfn: int) -> Result:
        """Mark a 4K page of a huge page as poisoned: 0, -EBUSY if it is, -EINVAL. folio_set_hugetlb_hwpoison()

        A poisoned free page is not handed out; when it leaves its pool, the 2M block of the bad page stays out.
        """
        return self.operate(Operation.POISON, address=pfn << 12)

    def store_vmemmap(self, address: int, value: int) -> Result:
        """Store a word at a virtual address of the vmemmap: 0, or -EFAULT through a read-only entry (in Linux an oops);
        and the entry's physical address. Words other than memcg_data stay as they are: the machine follows them.
        """
        return self.operate(Operation.VMEMMAP_STORE, address=address, offset=value)

    def meminfo(self) -> dict[str, int]:
        """/proc/meminfo, as far as it is modelled: see pgemu.hugetlb.meminfo()."""
        from pgemu.objects.hugetlb import meminfo

        return meminfo(self)

    def vmstat(self) -> dict[str, int]:
        """/proc/vmstat, as far as it is modelled: see pgemu.hugetlb.vmstat()."""
        from pgemu.objects.hugetlb import vmstat

        return vmstat(self)

    # ------------------------------------------------------------------ references

    def unpin(self, pin: int) -> Result:
        """unpin_user_pages() of what AddressSpace.pin() holds as number `pin`: 0 with the pages, or -ENOENT.

        Pages that left their inode meanwhile are released, too, and go back to the pool.
        """
        return self.operate(Operation.UNPIN, object_=pin)

    def unpin_many(self, pins: Array) -> Results:
        """Unpin each of the numbers `pins` (uint64[n]), in order."""
        return self.run_columns(np.uint64(Operation.UNPIN), pins, count=len(pins))

    def pinned_frames(self, pin: int) -> Array:
        """uint64[n]: frame numbers that a pin holds, by page of the pin; none of a pin that is not live.

        ValueError past words.PINS.
        """
        from pgemu.objects.pins import frames

        return frames(self, pin)

    def drain_lru(self) -> Result:
        """lru_add_drain_all(): 0 with the folios whose per-CPU batches held a reference (Config.lru_cache)."""
        return self.operate(Operation.LRU_DRAIN)

    # ------------------------------------------------------------------ the worker

    def work(self) -> Result:
        """Let the worker run: 0 with the blocks merged, or merged and given back to the pool.

        Zombie blocks that nobody holds any more wait for it with Config.worker "queued", blocks that became all
        private with Config.merge "lazy". One of which somebody holds a piece goes on waiting. workers.operate_work()
        """
        return self.operate(Operation.WORK)

    # ------------------------------------------------------------------ running

    def run(self, records: Records) -> Results:
        """Run trace records in order. ValueError for actors beyond words.ACTORS."""
        if len(records) and int(records.actor.max()) >= W.ACTORS:
            raise ValueError(f"actor {int(records.actor.max())}: expected less than {W.ACTORS}")
        columns = (records.object, records.address, records.offset, records.length)
        return self.run_columns(records.header(), *columns, count=len(records))

    def run_columns(
        self, header: Any, object_: Any = 0, address: Any = 0, offset: Any = 0, length: Any = 0, *, count: int
    ) -> Results:
        """Run `count` operations given as columns: uint64 arrays of `count` elements, or of one for all.

        header: op | flags << 8 | actor << 16 | vm << 32 | space << 48.
        """
        columns = [_column(c, count) for c in (header, object_, address, offset, length)]
        status = np.empty(count, np.int64)
        detail = np.empty(count, np.uint64)
        done = 0
        while done < count:
            stopped = self._designs_entry()(self.descriptor, *columns, status, detail, np.uint64(done))
            done = int(stopped)
            if done < count:
                done = int(self._entry(columns, done)(self.descriptor, *columns, status, detail, np.uint64(done)))
        return Results(status, detail)

    def _designs_entry(self) -> Any:
        """The entry that runs the designs' operations: the fast loops, or what knows every parameter."""
        if self.register(W.R_FULL):
            return _run_designs
        from pgemu_kernels.run.fast import run

        return run

    def _entry(self, columns: list[Array], i: int) -> Any:
        """The entry for operation `i`, at which that of the designs stopped; as pgemu_kernels.run.routing has it."""
        header, object_ = (int(column[i if column.size > 1 else 0]) for column in columns[:2])
        kind = header & 0xFF
        if Operation.POOL_RESIZE <= kind <= Operation.VMEMMAP_STORE:
            from pgemu_kernels.run.pooling import run_pooling

            return run_pooling
        ordinary = kind <= Operation.REMAP and kind not in (Operation.PIN, Operation.UNPIN)
        if kind == Operation.ALLOCATE and object_ < self.register(W.R_INODES):
            row = int(W.STATE_INODES) + object_ * W.I_WORDS
            ordinary = int(self.arrays.state[row + int(W.I_KIND)]) != int(W.INODE_GUEST_MEMFD)
        elif kind == Operation.ALLOCATE:
            ordinary = False
        elif kind == Operation.PREFAULT:
            address = int(columns[2][i if columns[2].size > 1 else 0])
            ordinary = self._is_ordinary_frame(header >> 32 & 0xFFFF, address >> 12)
        if not ordinary:
            return _run_designs
        from pgemu_kernels.run.ordinary import run_ordinary

        return run_ordinary

    def _is_ordinary_frame(self, vm: int, gfn: int) -> bool:
        """Whether a guest frame is of a slot of a process's memory."""
        rows = self.arrays.state[int(W.STATE_MEMSLOTS) :][: W.MEMSLOTS * W.M_WORDS].reshape(-1, W.M_WORDS)
        inside = np.uint64(gfn) - rows[:, W.M_BASE_GFN] < rows[:, W.M_PAGES]
        found = np.flatnonzero(inside & (rows[:, W.M_VM] == vm))
        return bool(found.size) and int(rows[found[0], W.M_KIND]) != int(W.SLOT_GUEST_MEMFD)

    def operate(
        self,
        op: W.Operation,
        *,
        flags: int = 0,
        actor: int = 0,
        vm: int = 0,
        space: int = 0,
        object_: int = 0,
        address: int = 0,
        offset: int = 0,
        length: int = 0,
    ) -> Result:
        """Run one operation; the arguments are the columns of the trace schema. ValueError where one does not fit."""
        _check_fields(op, flags, actor, vm, space, object_, address, offset, length)
        header = op | flags << 8 | actor << 16 | vm << 32 | space << 48
        one = (np.array([word], np.uint64) for word in (header, object_, address, offset, length))
        head, *columns = one
        status, detail = self.run_columns(head, *columns, count=1)
        return Result(int(status[0]), int(detail[0]))

    # ------------------------------------------------------------------ step by step

    def begin(
        self,
        actor: int,
        op: W.Operation,
        *,
        flags: int = 0,
        vm: int = 0,
        space: int = 0,
        object_: int = 0,
        address: int = 0,
        offset: int = 0,
        length: int = 0,
    ) -> None:
        """Begin an operation of an actor, to be advanced by `step`.

        ValueError where an argument does not fit its column, or while an operation of the actor is under way.
        """
        _check_fields(op, flags, actor, vm, space, object_, address, offset, length)
        if self._record(actor, W.O_ACTIVE):
            raise ValueError(f"actor {actor} is in the middle of an operation")
        words = {
            W.O_OP: op, W.O_FLAGS: flags, W.O_ACTOR: actor, W.O_VM: vm, W.O_SPACE: space, W.O_OBJECT: object_,
            W.O_ADDRESS: address, W.O_OFFSET: offset, W.O_LENGTH: length,
        }  # fmt: skip
        row = int(W.STATE_OPS) + actor * W.O_WORDS
        for word, value in words.items():
            self.arrays.state[row + int(word)] = value
        self._step(actor, beginning=True)

    def step(self, actor: int) -> int:
        """Do the next step of an actor's operation: words.GO, STOP (it ended, see `result`) or BLOCKED.

        ValueError if the actor has no operation under way.
        """
        if not self._record(actor, W.O_ACTIVE):
            raise ValueError(f"actor {actor} has no operation under way")
        return self._step(actor, beginning=False)

    def _step(self, actor: int, *, beginning: bool) -> int:
        from pgemu_kernels.run.full import BEGIN, STEP

        return self._call_designs(actor, BEGIN if beginning else STEP)

    def _call_designs(self, actor: int, mode: int) -> int:
        """designs.run_designs() without columns."""
        from pgemu_kernels.run.full import run_designs

        nothing = np.zeros(1, np.uint64)
        columns = (nothing,) * 5
        return int(
            run_designs(
                self.descriptor, *columns, nothing.view(np.int64), nothing, np.uint64(0), np.uint64(actor), mode
            )
        )

    def result(self, actor: int) -> Result:
        """What the operation in an actor's record returned."""
        status = np.uint64(self._record(actor, W.O_STATUS)).astype(np.int64)
        return Result(int(status), self._record(actor, W.O_DETAIL))

    def _record(self, actor: int, word: np.uint64) -> int:
        if not 0 <= actor < W.ACTORS:
            raise ValueError(f"actor {actor}: expected 0 to {W.ACTORS - 1}")
        return int(self.arrays.state[int(W.STATE_OPS) + actor * W.O_WORDS + int(word)])

    # ------------------------------------------------------------------ looking

    @property
    def statistics(self) -> Statistics:
        """Counters, gauges, results and costs as they stand (a copy)."""
        return Statistics(self.arrays.stats.copy())

    def check(self) -> int:
        """Recount everything and compare: how many rules of pgemu_kernels.rules.invariants are broken, ever."""

        from pgemu_kernels.rules.recount import check

        owner = np.zeros(self.arrays.ram.size // 512, np.uint8)
        for kind, frame in [finding for table in self.page_tables for finding in table.recount(owner)]:
            if self.register(W.R_BROKEN) == 0:
                self.arrays.state[W.R_BROKEN_FIRST] = kind << 48 | frame
            self.arrays.state[W.R_BROKEN] += np.uint64(1)
        found = np.zeros(W.FOUND_WORDS, np.int64)
        if self.register(W.R_PINS):
            from pgemu.objects.pins import own_nodes

            found[W.FOUND_NODES] += len(list(own_nodes(self, owner)))
        if self.register(W.R_ORDINARY) or self.register(W.R_HOST_HUGE):
            from pgemu_kernels.rules.ordinary import check_ordinary

            check_ordinary(self.descriptor, owner, found)
        held = any(self.register(word) for word in (W.R_PINS, W.R_LRU_CACHE, W.R_FAULT_REFERENCES, W.R_SPLIT_TO_2M))
        if held:
            self._hold_again(giving=False)
        check(self.descriptor, owner, np.zeros(3, np.int64), found)
        if held:
            self._hold_again(giving=True)
        return self.register(W.R_BROKEN)

    def _hold_again(self, *, giving: bool) -> None:
        """Give back or take away the references that pins, LRU batches and faults under way hold."""
        from pgemu_kernels.run.full import GIVE_BACK, TAKE_AWAY

        self._call_designs(0, GIVE_BACK if giving else TAKE_AWAY)

    def check_each(self, on: bool = True) -> None:
        """Check after every operation what it touched; `broken` tells what was found."""
        self.arrays.state[W.R_CHECK] = on

    @property
    def broken(self) -> tuple[int, W.Broken, int]:
        """(findings, kind of the first one, the page or count it is about)."""
        first = self.register(W.R_BROKEN_FIRST)
        return self.register(W.R_BROKEN), W.Broken(first >> 48), first & (1 << 48) - 1

    def walk(self, root: int, page: int) -> list[tuple[int, int, int]]:
        """Walk a page table from physical address `root` to a page number: [(level, entry address, entry)].

        Ends at the leaf or at the entry that is neither leaf nor table; reads `ram` and nothing else. A VM's root is
        walked in the stage-2 format, any other in the host's.
        """
        from pgemu.tables.walk import walk

        first = int(W.STATE_VMS) + int(W.V_ROOT)
        stage2 = root in self.arrays.state[first : first + self.register(W.R_VMS) * W.V_WORDS : W.V_WORDS].tolist()
        fmt = self.stage2_format if stage2 else self.host_format
        address = page << 12
        if fmt.sign_extended and address >> fmt.input_bits - 1 & 1:
            address |= (1 << 64) - (1 << fmt.input_bits)
        return [step[:3] for step in walk(self, fmt, root, address)]

    @cached_property
    def host_format(self) -> PageFormat:
        """The format of process and kernel page tables."""
        return self._formats[formats.HOST_X86_64]

    @cached_property
    def stage2_format(self) -> PageFormat:
        """The format of VMs' page tables."""
        return self._formats[self.register(W.R_STAGE2_FORMAT)]

    @property
    def _formats(self) -> tuple[PageFormat, PageFormat, PageFormat]:
        return page_format.machine_formats(self.config.kernel, **self.config.format_parameters)

    def struct_page(self, pfn: int) -> Array:
        """uint64[8]: a struct page of the HugeTLB zone, read through the kernel's page table (a copy).

        ValueError outside the zone.
        """
        self._guest_frame(pfn)
        address = self.register(W.R_VMEMMAP) + pfn * 64
        level, _, entry = self.walk(self.register(W.R_KERNEL_ROOT), (address & (1 << 48) - 1) >> 12)[-1]
        inside = (1 << 12 + 9 * (level - 1)) - 1
        word = ((entry & formats.ADDRESS & ~inside) + (address & inside)) // 8
        return self.arrays.ram[word : word + 8].copy()

    def folio(self, pfn: int) -> Folio:
        """The folio that holds a PFN of the HugeTLB zone, a tail's as well as a head's. ValueError outside the zone."""
        from pgemu.images.folio import Folio

        self._guest_frame(pfn)
        return Folio.of_machine(self, pfn)

    # ------------------------------------------------------------------ physical memory

    @cached_property
    def memory(self) -> PhysicalMemory:
        """What lies at physical addresses, and which frames are in use."""
        from pgemu.machine.physical import PhysicalMemory

        return PhysicalMemory(self)

    def words(self, address: int, count: int) -> Array:
        """uint64[count] at a physical address, read-only: of the metadata zone a view, of HugeTLB frames a copy.

        ValueError for an unaligned address or where there is no memory.
        """
        return self.memory.words(address, count)

    def load(self, addresses: Array) -> Array:
        """uint64[n]: the words at physical addresses (uint64[n]). ValueError if unaligned or where no memory is."""
        return self.memory.load(addresses)

    def holds(self, addresses: Array) -> Array:
        """bool[n]: whether there is memory at each physical address (uint64[n], multiples of 8)."""
        return self.memory.holds(addresses)

    def roots(self) -> list[Root]:
        """The top tables: the kernel's, of processes ("process:0"), of VMs ("vm:0"), of other page tables ("table:0").

        With page-table isolation that of a process is the kernel's copy. The name of a format leaves its parameters
        out: input bits of Arm64 stage 2 other than 40, or kernels other than 7.3, are for the reader to give.
        """
        from pgemu.images.image import Root

        state = self.arrays.state
        found = [Root("kernel", self.host_format.name, self.register(W.R_KERNEL_ROOT))]
        for name, fmt, rows, count, words, word in (
            ("process", self.host_format, W.STATE_SPACES, W.R_SPACES, W.S_WORDS, W.S_ROOT),
            ("vm", self.stage2_format, W.STATE_VMS, W.R_VMS, W.V_WORDS, W.V_ROOT),
        ):
            for i in range(self.register(count)):
                root = int(state[int(rows) + i * words + int(word)])
                if root:
                    found.append(Root(f"{name}:{i}", fmt.name, root))
        return found + [Root(f"table:{i}", table.format.name, table.root) for i, table in enumerate(self.page_tables)]

    def write_image(self, path: str | os.PathLike[str], format: Literal["elf", "raw"] = "elf") -> None:
        """Write physical memory to a sparse file: every metadata frame ever used, and HugeTLB frames with contents.

        "elf" is an ELF64 core with a PT_LOAD per range (p_paddr; p_vaddr in Linux's direct map) and a note that names
        the roots; where use is scattered, ranges also cover frames never used. In "raw" the offset in the file is the
        physical address. The file appears whole or not at all. OSError where it cannot be written.
        """
        from pgemu.images.image import write_image

        write_image(self, path, format)

    def limit_frames(self, free: int | None) -> None:
        """Let only `free` more metadata frames be taken before -ENOMEM; frames given back meanwhile add to them.

        None: as configured (Config.frames). A number beyond what was configured changes nothing. ValueError for a
        negative one. Injection of failures, as fail_page_alloc of mm/fail_page_alloc.c does it.
        """
        if free is not None and free < 0:
            raise ValueError(f"{free} free frames: expected no negative number")
        limit = self._frames_limit
        if free is not None:
            limit = min(limit, int(self.arrays.stats[int(W.STATS_GAUGES) + 2 * W.Gauge.FRAMES_USED]) + free)
        self.arrays.state[W.R_FRAMES_LIMIT] = limit

    # ------------------------------------------------------------------ contents of guest frames

    def read_frame(self, pfn: int) -> bytes:
        """The 4096 bytes of a guest frame; frames never written read as zero. ValueError outside the pool."""
        frame = int(self.arrays.counts[self.register(W.R_CONTENTS) + self._guest_frame(pfn)])
        return self.arrays.ram[frame * 512 : (frame + 1) * 512].tobytes() if frame else bytes(W.PAGE_4K)

    def write_frame(self, pfn: int, data: bytes, offset: int = 0) -> None:
        """Store bytes in a guest frame. ValueError outside the frame or the pool, OSError ENOMEM."""
        from pgemu_kernels.folios.boot import CONTENTS, provide

        if offset < 0 or offset + len(data) > W.PAGE_4K:
            raise ValueError(f"{len(data)} bytes at {offset}: expected to lie within {W.PAGE_4K}")
        self._guest_frame(pfn)
        frame = int(provide(self.descriptor, CONTENTS, np.uint64(pfn)))
        if frame < 0:
            raise _os_error(-frame, "no frame for the contents")
        memory = self.arrays.ram[frame * 512 : (frame + 1) * 512].view(np.uint8)
        memory[offset : offset + len(data)] = np.frombuffer(data, np.uint8)

    def _guest_frame(self, pfn: int) -> int:
        for number in range(self.config.nodes):
            base = int(self.arrays.state[node_word(number, W.N_BASE)])
            if base <= pfn < base + int(self.arrays.state[node_word(number, W.N_PAGES)]):
                return pfn - self.register(W.R_POOL_BASE)
        raise ValueError(f"frame {pfn:#x}: expected a frame of the HugeTLB zone")


def _run_designs(*arguments: Any) -> int:
    """designs.run_designs() of columns, called as the other entries are."""
    from pgemu_kernels.run.full import BATCH_MODE, run_designs

    return int(run_designs(*arguments, np.uint64(0), BATCH_MODE))


def _check_fields(
    op: int, flags: int, actor: int, vm: int, space: int, object_: int, address: int, offset: int, length: int
) -> None:
    """ValueError where a value does not fit its column of the trace schema."""
    limits = {"operation": (op, 256), "flags": (flags, 256), "actor": (actor, W.ACTORS), "vm": (vm, 1 << 16),
              "space": (space, 1 << 16), "object": (object_, 1 << 32), "address": (address, 1 << 64),
              "offset": (offset, 1 << 64), "length": (length, 1 << 64)}  # fmt: skip
    for name, (value, limit) in limits.items():
        if not 0 <= value < limit:
            raise ValueError(f"{name} {value}: expected 0 to {limit - 1}")


def integers(values: Any) -> Array:
    """`values` as an array. NumPy makes float64 of a list with numbers below and above 2^63: it becomes uint64 here."""
    given = np.asarray(values)
    if given.dtype.kind == "f" and not isinstance(values, np.ndarray):
        exact = np.asarray(values, dtype=np.object_)
        if all(isinstance(value, int) and 0 <= value < 1 << 64 for value in exact.flat):
            return exact.astype(np.uint64)
    return given


def _column(values: Any, count: int) -> Array:
    given = integers(values)
    if given.size and (given.dtype.kind not in "ui" or (given.dtype.kind == "i" and given.min() < 0)):
        raise ValueError(f"column of {given.dtype}: expected integers that are not negative")
    column = np.ascontiguousarray(given, dtype=np.uint64).reshape(-1)
    if column.size not in (1, count):
        raise ValueError(f"column of {column.size} elements: expected {count} or 1")
    return column if column.flags.writeable else column.copy()


def _os_error(number: int, text: str) -> OSError:
    return OSError(number, text)


if TYPE_CHECKING:
    from pgemu.objects.address_space import AddressSpace
    from pgemu.objects.files import Device, GuestMemfd4K, HugetlbFile
    from pgemu.objects.guest_memfd import Form, GuestMemfd
    from pgemu.objects.hugetlb import HugetlbPool
    from pgemu.objects.vm import Vm
    from pgemu.tables.page_table import PageTable
