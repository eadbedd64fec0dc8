"""The machine: what people hold in their hands of it, and what they create on it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

import numpy as np

from pgemu.machine.arrays import U64, Integers
from pgemu.machine.config import Config as Config
from pgemu.machine.findings import note_broken
from pgemu.machine.results import Result as Result, Results as Results
from pgemu.objects.creating import Creating
from pgemu_kernels import words as W
from pgemu_kernels.words.operations import Flag, Operation

if TYPE_CHECKING:
    from pgemu.images.folio import Folio
    from pgemu.images.image import Root
    from pgemu.objects.address_space import AddressSpace
    from pgemu.objects.devices import Ioas, VfioContainer
    from pgemu.objects.failures import MemoryFailure
    from pgemu.objects.files import Device, GuestMemfd4K, HugetlbFile, ShmemFile
    from pgemu.objects.guest_memfd import GuestMemfd
    from pgemu.objects.hugetlb import HugetlbPool
    from pgemu.objects.spinning import Spinning
    from pgemu.objects.vm import Vm
    from pgemu.tables.page_table import PageTable
    from pgemu.tables.walked import Walk

# What the references of folios are not counted without: see pgemu_kernels.rules.references.
_HOLDERS = (W.R_PINS, W.R_MAPPED, W.R_DOMAINS, W.R_LRU_CACHE, W.R_FAULT_REFERENCES, W.R_SPLIT_TO_2M, W.R_FROZEN)


@dataclass(eq=False)
class Machine(Creating):
    """A machine of one design: physical memory, page tables, folios, guest_memfd inodes, processes, VMs.

    >>> machine = Machine(Config("restructure", pool=8 << 20, page_size=2 << 20, buddy=8 << 20))
    >>> gmem = machine.create_guest_memfd(4 << 20)
    >>> vm = machine.create_vm(protected=True)
    >>> vm.bind(gmem, gpa=0).name
    'ok'
    >>> vm.touch(0x1234).detail  # level 2: a 2M leaf
    2

    Not thread-safe; two machines may run on two threads, kernels release the GIL.
    Errors that a kernel returns are results. OSError (ENOMEM, EINVAL, ENOSPC) comes only from creating
    something, ValueError from misuse.
    """

    @property
    def page_tables(self) -> list[PageTable]:
        """Those of create_page_table() that were not destroyed, in the order of their creation."""
        self.tables_made[:] = [table for table in self.tables_made if table.root]
        return list(self.tables_made)

    @property
    def processes(self) -> list[AddressSpace]:
        """The processes that have not ended, by number, whoever made them: handles of a loaded machine, too."""
        from pgemu.objects.saved import processes

        return processes(self)

    @property
    def vms(self) -> list[Vm]:
        """The VMs that are not closed, by number."""
        from pgemu.objects.saved import vms

        return vms(self)

    @property
    def inodes(self) -> list[GuestMemfd | GuestMemfd4K | HugetlbFile | ShmemFile | Device]:
        """Every file that has a number, closed ones too, by number. Which `form` a GuestMemfd was made in is not kept,
        but for what the kernel does by it."""
        from pgemu.objects.saved import inodes

        return inodes(self)

    @property
    def io_spaces(self) -> list[VfioContainer | Ioas]:
        """The address spaces of devices, by number."""
        from pgemu.objects.saved import io_spaces

        return io_spaces(self)

    # ------------------------------------------------------------------ huge pages

    def hugetlb(self, page_size: int = W.PAGE_2M) -> HugetlbPool:
        """The pool of huge pages of 2 MiB or 1 GiB. ValueError for another size.

        >>> machine.hugetlb(2 << 20).nr_hugepages
        4
        """
        from pgemu.objects.hugetlb import HugetlbPool

        return HugetlbPool.of_size(self, page_size)

    @property
    def optimize_vmemmap(self) -> bool:
        """vm.hugetlb_optimize_vmemmap: whether pages that join a pool are optimised; can be set."""
        return bool(self.register(W.R_OPTIMIZE_VMEMMAP))

    @optimize_vmemmap.setter
    def optimize_vmemmap(self, on: bool) -> None:
        self.arrays.state[W.R_OPTIMIZE_VMEMMAP] = on

    def free_folio(self, pfn: int) -> Result:
        """Drop a reference of a page that HugetlbPool.allocate() gave; the last one frees it. 0 or -EINVAL.

        >>> pfn = machine.hugetlb().allocate().detail
        >>> machine.free_folio(pfn).name, machine.free_folio(pfn).name
        ('ok', '-EINVAL')
        """
        return self.operate(Operation.FOLIO_FREE, address=pfn << 12)

    def dissolve(self, pfn: int) -> Result:
        """Give a free huge page back to the page allocator: 0, -EBUSY in use or reserved, -ENOMEM, -EINVAL.

        mm/hugetlb.c:dissolve_free_hugetlb_folio()

        >>> machine.dissolve(machine.hugetlb().free_list()[0]).name, machine.hugetlb().nr_hugepages
        ('ok', 3)
        """
        return self.operate(Operation.DISSOLVE, address=pfn << 12)

    def poison(self, pfn: int) -> Result:
        """Mark a 4K page of a huge page as poisoned: 0, -EBUSY if it is, -EINVAL. folio_set_hugetlb_hwpoison()

        A poisoned free page is not handed out; when it leaves its pool, the 2M block of the bad page stays out.

        >>> machine.poison(machine.hugetlb().free_list()[0]).name, machine.poisoned_pages
        ('ok', 1)
        """
        return self.operate(Operation.POISON, address=pfn << 12)

    def memory_failure(self, address: int, *, hardware: bool = False, early_kill: bool = False) -> MemoryFailure:
        """memory_failure() of the page at a physical address, by the path that the kernel takes for its kind.

        hardware: an error that the machine reports; without it one is injected (MF_SW_SIMULATED, as debugfs's
        corrupt-pfn does), and unpoison() works. early_kill: vm.memory_failure_early_kill: processes that map a dirty
        page get SIGBUS at once (BUS_MCEERR_AO), else as they touch it (touch() is then VM_FAULT_HWPOISON).
        status: 0 of what was recovered or delayed; -EBUSY: failed or ignored; -EHWPOISON: poisoned before, or a large
        folio that cannot be split; -ENXIO where no memory is, before 6.19; -EOPNOTSUPP without CONFIG_MEMORY_FAILURE,
        of transparent huge pages of anonymous memory, and of frames of ordinary memory that are no process's or file's;
        -ENOMEM past words.POISONED pages of huge pages. ValueError for address 0.

        >>> machine.memory_failure(gmem.pfn(0) << 12).status  # a folio that is guest_memfd's: -EBUSY
        -16
        """
        if address >> 12 == 0:
            raise ValueError(f"address {address:#x}: expected one of a page that can be in use, above 4095")
        flags = (Flag.HARDWARE if hardware else 0) | (Flag.EARLY_KILL if early_kill else 0)
        self.operate(Operation.MEMORY_FAILURE, flags=flags, address=address)
        return self.last_failure

    @property
    def machine_checks(self) -> int:
        """Writes of devices to private memory of a TDX VM, through I/O entries that outlived its conversion: the first
        of these pages that the guest uses ends the host. Of an SNP VM they are faults of the IOMMU (-EFAULT)."""
        return self.register(W.R_MACHINE_CHECKS)

    @property
    def last_failure(self) -> MemoryFailure:
        """What the last memory failure did, AddressSpace.madvise_hwpoison()'s, too; and the signals of guests' accesses
        that ended in -EINTR since."""
        from pgemu.objects.failures import last_failure

        return last_failure(self)

    def soft_offline(self, address: int) -> Result:
        """soft_offline_page() of the page at a physical address: 0 if it is poisoned, -EBUSY of guest_memfd, whose
        pages cannot be migrated; -ENXIO without a struct page; -EOPNOTSUPP of others: migration is not modelled.
        ValueError for address 0.

        >>> machine.soft_offline(gmem.pfn(0) << 12).name
        '-EBUSY'
        """
        if address >> 12 == 0:
            raise ValueError(f"address {address:#x}: expected one of a page that can be in use, above 4095")
        return self.operate(Operation.MEMORY_FAILURE, flags=Flag.SOFT, address=address)

    def unpoison(self, address: int) -> Result:
        """unpoison_memory() of the page at a physical address: 0, -EBUSY if it is not poisoned or somebody has it,
        -EOPNOTSUPP after a failure that was not injected, -ENXIO without a struct page.

        >>> machine.unpoison(gmem.pfn(0) << 12).name  # it is not poisoned
        '-EBUSY'
        """
        return self.operate(Operation.UNPOISON, address=address)

    @property
    def poisoned_pages(self) -> int:
        """num_poisoned_pages, HardwareCorrupted of /proc/meminfo in 4K pages."""
        return self.register(W.R_POISONED_PAGES)

    def store_vmemmap(self, address: int, value: int) -> Result:
        """Store a word at a virtual address of the vmemmap: 0, or -EFAULT through a read-only entry (in Linux an oops);
        and the entry's physical address. Words other than memcg_data stay as they are: the machine follows them.

        >>> machine.store_vmemmap(0xFFFF_EA00_0000_0000, 0).name
        '-EINVAL'
        """
        return self.operate(Operation.VMEMMAP_STORE, address=address, offset=value)

    def meminfo(self) -> dict[str, int]:
        """/proc/meminfo, as far as it is modelled: see pgemu.objects.hugetlb.meminfo().

        >>> machine.meminfo()["HugePages_Total"], machine.meminfo()["HugePages_Rsvd"]
        (4, 1)
        """
        from pgemu.objects.hugetlb import meminfo

        return meminfo(self)

    def vmstat(self) -> dict[str, int]:
        """/proc/vmstat, as far as it is modelled: see pgemu.objects.hugetlb.vmstat().

        >>> machine.vmstat()["nr_hugetlb"]
        512
        """
        from pgemu.objects.hugetlb import vmstat

        return vmstat(self)

    # ------------------------------------------------------------------ references

    def unpin(self, pin: int) -> Result:
        """unpin_user_pages() of what AddressSpace.pin() holds as number `pin`: 0 with the pages, or -ENOENT.

        Pages that left their inode meanwhile are released, too, and go back to the pool.

        >>> process, shared = machine.create_process(), machine.create_guest_memfd(2 << 20, shared=True)
        >>> process.mmap(shared, 0x4000_0000).name, process.pin(0x4000_0000, 8192, pin=3).name
        ('ok', 'ok')
        >>> machine.unpin(3), machine.unpin(3).name
        (Result(status=0, detail=2), '-ENOENT')
        """
        return self.operate(Operation.UNPIN, object_=pin)

    def unpin_many(self, pins: Integers) -> Results:
        """Unpin each of the numbers `pins` (uint64[n]), in order.

        >>> machine.unpin_many([3, 4]).names
        ['-ENOENT', '-ENOENT']
        """
        return self.run_columns(np.uint64(Operation.UNPIN), pins, count=len(pins))

    def pinned_frames(self, pin: int) -> U64:
        """uint64[n]: frame numbers that a pin holds, by page of the pin; none of a pin that is not live.

        ValueError past words.PINS.

        >>> process, shared = machine.create_process(), machine.create_guest_memfd(2 << 20, shared=True)
        >>> process.mmap(shared, 0x4000_0000).name, process.pin(0x4000_0000, 8192, pin=3).name
        ('ok', 'ok')
        >>> machine.pinned_frames(3).size
        2
        """
        from pgemu.objects.pins import frames

        return frames(self, pin)

    def drain_lru(self) -> Result:
        """lru_add_drain_all(): 0 with the folios whose per-CPU batches held a reference (Config.lru_cache).

        >>> machine.drain_lru()
        Result(status=0, detail=0)
        """
        return self.operate(Operation.LRU_DRAIN)

    # ------------------------------------------------------------------ the worker

    def work(self) -> Result:
        """Let the worker run: 0 with the blocks merged, or merged and given back to the pool.

        Zombie blocks that nobody holds any more wait for it with Config.worker "queued", blocks that became all
        private with Config.merge "lazy". One of which somebody holds a piece goes on waiting. workers.operate_work()

        >>> machine.work()
        Result(status=0, detail=0)
        """
        return self.operate(Operation.WORK)

    # ------------------------------------------------------------------ looking

    def spinning(self) -> list[Spinning]:
        """The conversions that posted code would still be at, and who holds the folio that each waits for.

        One that meets a reference where it freezes a folio ends with -WOULD_SPIN; what is left of it is done when the
        reference is gone. pgemu_kernels.gmem.spinning

        >>> machine.spinning()
        []
        """
        from pgemu.objects.spinning import spinning

        return spinning(self)

    def check(self) -> int:
        """Recount everything and compare: how many rules of pgemu_kernels.rules.invariants are broken, ever.

        >>> machine.check(), machine.broken[0], machine.findings
        (0, 0, ())
        """

        from pgemu_kernels.run.entries import check

        owner = np.zeros(self.arrays.ram.size // 512, np.uint8)
        for kind, frame in [finding for table in self.page_tables for finding in table.recount(owner)]:
            note_broken(self.arrays.state, kind, frame)
        found = np.zeros(W.FOUND_WORDS, np.int64)
        pages = pins = np.zeros(0, np.uint64)
        if self.register(W.R_PINS) or self.register(W.R_MAPPED) or self.register(W.R_DOMAINS):
            from pgemu.objects.pins import own_nodes, pinned

            found[W.FOUND_NODES] += len(list(own_nodes(self, owner)))
            pages, pins = pinned(self)
        held = any(self.register(word) for word in _HOLDERS)
        if held:
            self._hold_again(pages, pins, giving=False)
        if self.register(W.R_ORDINARY) or self.register(W.R_HOST_HUGE):
            from pgemu.objects.pins import own_pages
            from pgemu_kernels.run.entries import check_ordinary

            check_ordinary(self.descriptor, owner, found)
            own_pages(self, pages, owner)
        check(self.descriptor, owner, np.zeros(3, np.int64), found)
        if held:
            self._hold_again(pages, pins, giving=True)
        return self.register(W.R_BROKEN)

    def _hold_again(self, pages: U64, pins: U64, *, giving: bool) -> None:
        """Give back or take away the references that pins, KVM's mappings, LRU batches and faults under way hold, and
        frozen folios do not. pages, pins: of pins.pinned()."""
        from pgemu_kernels.words.requests import GIVE_BACK, TAKE_AWAY

        self._call_designs(0, GIVE_BACK if giving else TAKE_AWAY, (pages, pages, pins))

    def walk(self, root: int, page: int) -> Walk:
        """Walk a page table from physical address `root` to a page number: [(level, entry address, entry)].

        Ends at the leaf or at the entry that is neither leaf nor table; reads `ram` and nothing else. A VM's root is
        walked in the stage-2 format, that of a table of `page_tables` in its own, any other in the host's.

        >>> machine.walk(vm.root, 1)[-1]
        (2, 0xc000, 0x100000ee7)
        """
        from pgemu.tables.walk import walk_page

        for table in self.page_tables:
            if table.root == root:
                return walk_page(self, table.format, root, page)
        first, count = int(W.STATE_VMS), self.register(W.R_VMS)
        vms = self.arrays.state[first : first + count * W.V_WORDS].reshape(count, W.V_WORDS)
        stage2 = root in vms[:, [int(W.V_ROOT), int(W.V_PRIVATE_ROOT)]]
        return walk_page(self, self.stage2_format if stage2 else self.host_format, root, page)

    def struct_page(self, pfn: int) -> U64:
        """uint64[8]: a struct page of the HugeTLB zone, read through the kernel's page table (a copy).

        ValueError outside the zone.

        >>> hex(machine.struct_page(gmem.pfn(0))[6])  # _refcount above, _mapcount below
        '0x200f4000000'
        """
        from pgemu.images.folio import struct_page

        return struct_page(self, pfn)

    def folio(self, pfn: int) -> Folio:
        """The folio that holds a PFN of the HugeTLB zone, a tail's as well as a head's. ValueError outside the zone.

        >>> machine.folio(gmem.pfn(0x5000)).index  # of a tail
        0
        """
        from pgemu.images.folio import Folio

        self.guest_frame(pfn)
        return Folio.of_machine(self, pfn)

    # ------------------------------------------------------------------ images

    def roots(self) -> list[Root]:
        """The top tables: the kernel's, of processes ("process:0"), of VMs ("vm:0"), of other page tables ("table:0").

        Where a VM's private memory has a root of its own that is "private:0", and "vm:0" is of shared memory.
        With page-table isolation that of a process is the kernel's copy. The name of a format leaves its parameters
        out: input bits of Arm64 stage 2 other than 40, or kernels other than 7.3, are for the reader to give.

        >>> [(root.name, root.format) for root in machine.roots()]
        [('kernel', 'x86-64'), ('vm:0', 'npt')]
        """
        from pgemu.images.image import Root

        state = self.arrays.state
        found = [Root("kernel", self.host_format.name, self.register(W.R_KERNEL_ROOT))]
        for name, fmt, rows, count, words, word in (
            ("process", self.host_format, W.STATE_SPACES, W.R_SPACES, W.S_WORDS, W.S_ROOT),
            ("vm", self.stage2_format, W.STATE_VMS, W.R_VMS, W.V_WORDS, W.V_ROOT),
            ("private", self.stage2_format, W.STATE_VMS, W.R_VMS, W.V_WORDS, W.V_PRIVATE_ROOT),
        ):
            for i in range(self.register(count)):
                root = int(state[int(rows) + i * words + int(word)])
                if root and root not in {known.address for known in found}:
                    found.append(Root(f"{name}:{i}", fmt.name, root))
        return found + [Root(f"table:{i}", table.format.name, table.root) for i, table in enumerate(self.page_tables)]

    def write_image(self, path: str | os.PathLike[str], format: Literal["elf", "raw"] = "elf") -> None:
        """Write physical memory to a sparse file: every metadata frame ever used, and HugeTLB frames with contents.

        "elf" is an ELF64 core with a PT_LOAD per range (p_paddr; p_vaddr in Linux's direct map) and a note that names
        the roots; where use is scattered, ranges also cover frames never used. In "raw" the offset in the file is the
        physical address. The file appears whole or not at all. OSError where it cannot be written.

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     machine.write_image(f"{folder}/m.elf")
        ...     image = open_image(f"{folder}/m.elf")
        >>> [root.name for root in image.roots]
        ['kernel', 'vm:0']
        """
        from pgemu.images.image import write_image

        write_image(self, self.roots(), path, format)

    # ------------------------------------------------------------------ states

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the machine to a file, from which open() makes one that goes on as this one: pgemu.machine.snapshot.

        Of memory it has the frames that were ever in use. The file appears whole or not at all. OSError where it cannot
        be written.

        >>> import os, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     machine.save(f"{folder}/m")
        ...     os.listdir(folder)
        ['m']
        """
        from pgemu.machine.snapshot import write
        from pgemu.objects.saved import KEY, beside

        write(path, self.config, self.arrays, {KEY: beside(self)})

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Machine:
        """The machine of a file that save() wrote, in any process; its objects: `processes`, `vms`, `inodes`, ...

        InputError: it cannot be read, is none that pgemu wrote, is damaged, or of another version; or this computer
        cannot hold the machine.

        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     machine.save(file.name)
        ...     again = Machine.open(file.name)
        >>> again.vms[0].touch(0x1234).name, again.check()
        ('RET_PF_SPURIOUS', 0)
        """
        from pgemu.machine.snapshot import read
        from pgemu.objects.saved import restored

        return cast("Machine", restored(cls, read(path), os.fspath(path)))

    def copy(self) -> Machine:
        """Another machine, which is as this one and goes on by itself. OSError ENOMEM where there is no memory.

        >>> other = machine.copy()
        >>> other.vms[0].touch(0x20_0000).name, vm.leaves(), other.vms[0].leaves()
        ('RET_PF_FIXED', (0, 1, 0), (0, 2, 0))
        """
        from pgemu.machine.snapshot import copied
        from pgemu.objects.saved import beside, made_of

        return cast("Machine", made_of(type(self), self.config, copied(self.config, self.arrays), beside(self)))
