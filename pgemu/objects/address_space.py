"""A process: its page tables, mappings and accesses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pgemu.machine.arguments import guards_creation, plain
from pgemu.machine.arrays import Integers
from pgemu.machine.columns import as_column
from pgemu.machine.core import run_one
from pgemu.machine.field_rules import number_of
from pgemu.machine.results import Result, Results, errno_name
from pgemu.machine.rows import next_row
from pgemu.objects.mappings import Mappings
from pgemu.tables.translating import translator
from pgemu_kernels import words as W
from pgemu_kernels.formats.bits import ADDRESS, HOST_X86_64, LARGE, PRESENT
from pgemu_kernels.words.operations import Flag, Operation

if TYPE_CHECKING:
    from pgemu.machine.core import Core
    from pgemu.tables.translation import Access, Kind, Translation
    from pgemu.tables.walked import Walk

_WRITE, _EXEC = int(Flag.WRITE), int(Flag.EXEC)  # Flag's own "|" would take as long as the rest of a call
_HOST_FAULT = Operation.HOST_FAULT
_SPACES, _SPACE_WORDS, _ROOT = int(W.STATE_SPACES), int(W.S_WORDS), int(W.S_ROOT)


class TablePages(NamedTuple):
    """Table pages of a process below its top one, by the kernel's names; shared ones count in each process."""

    pud: int
    pmd: int
    pte: int

    @property
    def kib(self) -> int:
        """VmPTE of /proc/PID/status without transparent huge pages, in KiB: mm->pgtables_bytes."""
        return 4 * sum(self)


_NO_PROCESS = 0xFFFF


def _pin_flags(write: bool, longterm: bool) -> int:
    """Flags of a record for FOLL_WRITE and FOLL_LONGTERM."""
    return (Flag.WRITE if write else 0) | (Flag.LONGTERM if longterm else 0)


@guards_creation(space=number_of("a process", W.SPACES))
@dataclass(frozen=True)
class AddressSpace(Mappings, but=("touch", "translate")):
    """A process: its page tables and its mappings.

    Addresses and lengths are bytes; `prot` is a sum of PROT_READ, PROT_WRITE and PROT_EXEC. Mappings go where they are
    asked for and never over others (MAP_FIXED_NOREPLACE). Results are those of the system calls: 0 or -errno.
    Another process may get the number once this one has ended: to operations this one has still ended (-EINVAL).

    >>> machine = Machine(Config("restructure", pool=4 << 20, page_size=2 << 20, buddy=4 << 20))
    >>> process, gmem = machine.create_process(), machine.create_guest_memfd(2 << 20, shared=True)
    >>> process.mmap(gmem, 0x4000_0000).name, process.touch(0x4000_0000, write=True).name
    ('ok', 'VM_FAULT_LOCKED')
    >>> process.mmap_anonymous(0x80_0000, 1 << 20).name
    'ok'
    >>> process.touch_many([0x80_0000, 0x80_1000], write=True).outcomes
    {'VM_FAULT_NOPAGE': 2}
    """

    machine: Core = field(repr=False)
    space: int
    generation: int = field(default=-1, repr=False)
    _now: Any = field(init=False, repr=False, compare=False)  # the generation that its row is in by now

    def __post_init__(self) -> None:
        """A process is the one that has its number now."""
        at = int(W.STATE_SPACES) + self.space * W.S_WORDS + int(W.S_GENERATION)
        object.__setattr__(self, "_now", self.machine.arrays.state[at : at + 1].data)
        if self.generation < 0:
            object.__setattr__(self, "generation", self._now[0])

    @property
    def number(self) -> int:
        """Its number in operations: `space`, or one that no process has, once it has ended and another has that."""
        return self.space if self._now[0] == self.generation else _NO_PROCESS

    @property
    def ended(self) -> bool:
        """Whether the process has ended."""
        return not self.root

    def _check_alive(self) -> None:
        if self.ended:
            raise ValueError(f"process {self.space}: it has ended, expected one that has not")

    @classmethod
    def create(cls, machine: Core) -> AddressSpace:
        """See Machine.create_process.

        >>> AddressSpace.create(machine)
        AddressSpace(space=1)
        """
        from pgemu_kernels.run.entries import provide
        from pgemu_kernels.words.requests import PROCESS_ROOT

        space = cls._free_row(machine)
        row = int(W.STATE_SPACES) + space * W.S_WORDS
        if provide(machine.descriptor, PROCESS_ROOT, np.uint64(row)) != 0:
            raise OSError(W.ENOMEM, "no frame for a top table")
        machine.arrays.state[row + int(W.S_LIVE)] = 1
        if space == machine.register(W.R_SPACES):
            machine.arrays.state[W.R_SPACES] += np.uint64(1)
        return cls(machine, space)

    @staticmethod
    def _free_row(machine: Core) -> int:
        """The row of a process that ended and whose mm no VM and no device holds, or the next unused one."""
        vms = machine.arrays.state[int(W.STATE_VMS) :][: W.VMS * W.V_WORDS].reshape(-1, W.V_WORDS)
        held = set(vms[vms[:, W.V_LIVE] != 0, W.V_SPACE].tolist())  # virt/kvm/kvm_main.c:kvm_create_vm(), mmgrab()
        for space in range(machine.register(W.R_SPACES)):
            row = int(W.STATE_SPACES) + space * W.S_WORDS
            words = machine.arrays.state[row : row + W.S_WORDS]
            if not words[W.S_ROOT] and not words[W.S_DEVICES] and space not in held:
                return space
        return next_row(machine, W.R_SPACES, W.SPACES, "processes")

    def _word(self, name: np.uint64) -> int:
        """A word of the process's row; 0 of one that ended, which every word is then."""
        if self.number != self.space:
            return 0
        return int(self.machine.arrays.state[int(W.STATE_SPACES) + self.space * W.S_WORDS + int(name)])

    def _operate(
        self, op: Operation, address: int = 0, length: int = 0, flags: int = 0, *, object_: int = 0, offset: int = 0
    ) -> Result:
        return self.machine.operate(
            op, flags=flags, space=self.number, object_=object_, address=address, offset=offset, length=length
        )

    @property
    def root(self) -> int:
        """Physical address of the top table; with page-table isolation that of the kernel's copy. 0 after `exit`."""
        return self._word(W.S_ROOT)

    @property
    def user_root(self) -> int:
        """Physical address of the top table in user mode; the same as `root` without page-table isolation."""
        return self._word(W.S_USER_ROOT) or self.root

    @property
    def minor_faults(self) -> int:
        """Faults that succeeded, those of populating included: min_flt of mm/memory.c:mm_account_fault()."""
        return self._word(W.S_MINOR_FAULTS)

    @property
    def rss(self) -> int:
        """4K pages of anonymous and guest_memfd memory mapped; the zero page, HugeTLB and devices do not count."""
        return self._word(W.S_RSS)

    @property
    def table_pages(self) -> TablePages:
        """Table pages below the top one."""
        ram = self.machine.arrays.ram
        tables = np.array([self.root >> 3], dtype=np.int64)
        counts = []
        for _ in range(3):
            entries = ram[(tables[:, None] + np.arange(512)).reshape(-1)]
            entries = entries[(entries & np.uint64(PRESENT | LARGE)) == np.uint64(PRESENT)]
            tables = ((entries & np.uint64(ADDRESS)) >> np.uint64(3)).astype(np.int64)
            counts.append(len(tables))
        return TablePages(*counts)

    def read_smaps(self) -> Result:
        """What reading /proc/PID/smaps does: 1G entries of PFN mappings are dropped, as captured. fs/proc/task_mmu.c

        >>> process.read_smaps().name
        'ok'
        """
        return self._operate(Operation.READ_SMAPS)

    def fork(self) -> AddressSpace:
        """fork(): the child. Private pages are shared until written; shared memory is faulted in anew, but entries of
        VM_PFNMAP are copied: those of pfnmap's guest_memfd too, writable as they are.

        OSError: EAGAIN past words.SPACES processes, ENOMEM, EINVAL once it has ended. kernel/fork.c:dup_mmap(),
        mm/memory.c:copy_page_range()

        >>> child = process.fork()
        >>> child.touch(0x80_0000).name, child.touch(0x80_0000, write=True).name  # a write copies the page
        ('present', 'VM_FAULT_NOPAGE')
        >>> child.translate([0x80_0000]).physical == process.translate([0x80_0000]).physical
        array([False])
        """
        result = self._operate(Operation.FORK)
        if result.status:
            why = "it has ended" if self.ended else errno_name(-result.status)
            raise OSError(-result.status, f"fork() of process {self.space}: {why}")
        return AddressSpace(self.machine, result.detail)

    def exit(self) -> Result:
        """The process ends: its mappings, its tables. 0. mm/mmap.c:exit_mmap()

        >>> process.exit().name, process.ended, process.touch(0x80_0000).name
        ('ok', True, 'VM_FAULT_SIGSEGV')
        """
        return self._operate(Operation.EXIT)

    def zap(self, address: int, length: int, *, madvise: bool = False) -> Result:
        """Clear the entries of a range; with `madvise` as MADV_DONTNEED, which VM_PFNMAP refuses (-EINVAL).

        >>> process.rss, process.zap(0x80_0000, 4096).name, process.rss
        (3, 'ok', 2)
        >>> process.zap(0x70_0000, 4096, madvise=True).name  # nothing is mapped there
        '-ENOMEM'
        """
        return self._operate(Operation.ZAP, address, length, Flag.MADVISE if madvise else 0)

    def zap_many(self, addresses: Integers, length: int = W.PAGE_4K) -> Results:
        """Zap `length` bytes at each of `addresses` (uint64[n]), in order.

        >>> process.zap_many([0x80_0000, 0x80_1000]).outcomes, process.rss
        ({'ok': 2}, 1)
        """
        header = np.uint64(Operation.ZAP | self.number << 48)
        return self.machine.run_columns(header, 0, addresses, 0, length, count=len(addresses))

    # ------------------------------------------------------------------ accesses

    def touch(self, address: int, *, write: bool = False, execute: bool = False) -> Result:
        """Access a byte from user mode: 0 if its entry allowed it, else the fault's result; detail is the leaf's level.

        VM_FAULT_NOPAGE or _LOCKED after a fault that succeeded; VM_FAULT_SIGSEGV (once it ended, too), SIGBUS, OOM.
        The processor sets the accessed and, on a write, the dirty bit. (Anonymous and HugeTLB faults return 0 in
        Linux; here 0 stands for "no fault".) mm/memory.c:handle_mm_fault(), mm/hugetlb.c:hugetlb_fault()

        >>> process.touch(0x80_2000), process.touch(0x80_2000)  # the zero page, by a leaf of level 1
        (Result(status=VM_FAULT_NOPAGE, detail=1), Result(status=0, detail=1))
        >>> process.touch(0x80_2000, write=True).name  # a page of its own
        'VM_FAULT_NOPAGE'
        >>> process.touch(0x70_0000).name  # nothing is mapped there
        'VM_FAULT_SIGSEGV'
        """
        if type(address) is not int or address >> 64 or type(write) is not bool or type(execute) is not bool:
            given = {"address": address, "write": write, "execute": execute}
            address, write, execute = plain(AddressSpace.touch, self, **given)
        flags = (_WRITE if write else 0) | (_EXEC if execute else 0)
        return run_one(self.machine, _HOST_FAULT, flags, 0, 0, self.number, 0, address, 0, 0)

    def touch_many(self, addresses: Integers, *, write: bool = False, execute: bool = False) -> Results:
        """Access the bytes at `addresses` (uint64[n]), in order.

        >>> process.touch_many(range(0x80_0000, 0x80_4000, 4096)).names
        ['present', 'present', 'VM_FAULT_NOPAGE', 'VM_FAULT_NOPAGE']
        """
        flags = (Flag.WRITE if write else 0) | (Flag.EXEC if execute else 0)
        header = np.uint64(Operation.HOST_FAULT | flags << 8 | self.number << 48)
        return self.machine.run_columns(header, 0, addresses, count=len(addresses))

    # ------------------------------------------------------------------ pins

    def pin(
        self, address: int, length: int, *, pin: int, write: bool = False, longterm: bool = False, actor: int = 0
    ) -> Result:
        """pin_user_pages() of [address, address + length), held as number `pin` until Machine.unpin(pin).

        0 with the pages pinned in `detail`, fewer than asked for where a later one failed; else the first page's
        error: -EFAULT without a mapping, for VM_PFNMAP (design pfnmap), for `write` to a read-only mapping and where
        the page is private; -EINVAL for what is not aligned, empty or a number past words.PINS; -EEXIST for a number
        in use; -ENOMEM; -EAGAIN where Linux would wait for a lock. Absent pages are faulted in, shared ones
        copied; a pin outlives the mapping. longterm: FOLL_LONGTERM, for which the zero page is replaced. mm/gup.c

        >>> process.pin(0x4000_0000, 8192, pin=1).detail
        2
        >>> gmem.convert(0, 4096, shared=False).name, machine.unpin(1).name, gmem.convert(0, 4096, shared=False).name
        ('-EAGAIN', 'ok', 'ok')
        """
        flags = _pin_flags(write, longterm)
        return self.machine.operate(
            Operation.PIN, flags=flags, actor=actor, space=self.number, object_=pin, address=address, length=length
        )

    def pin_many(
        self,
        addresses: Integers,
        length: int = W.PAGE_4K,
        *,
        pins: Integers,
        write: bool = False,
        longterm: bool = False,
    ) -> Results:
        """Pin `length` bytes at each of `addresses` (uint64[n]) as number `pins` (uint64[n]), in order.

        >>> process.pin_many([0x4000_0000, 0x4000_1000, 0x70_0000], pins=[1, 2, 3]).names
        ['ok', 'ok', '-EFAULT']
        >>> machine.pinned_frames(2).tolist() == [gmem.pfn(0x1000)]
        True
        """
        if len(pins) not in (1, len(addresses)):
            raise ValueError(f"pins of {len(pins)} elements: expected {len(addresses)} or 1, as of addresses")
        header = np.uint64(Operation.PIN | _pin_flags(write, longterm) << 8 | self.number << 48)
        return self.machine.run_columns(header, pins, addresses, 0, length, count=len(addresses))

    def walk(self, address: int) -> Walk:
        """[(level, entry address, entry)] of a virtual address. ValueError once the process has ended.

        >>> [level for level, address, entry in process.walk(0x80_0000)]
        [4, 3, 2, 1]
        >>> process.walk(1 << 46)
        [(4, 0x8400, 0x0) absent]
        """
        from pgemu.tables.walk import walk_page

        self._check_alive()
        return walk_page(self.machine, self.machine.host_format, self.root, address >> 12)

    def translate(
        self, addresses: Integers, kinds: Kind | Integers | None = None, access: Access | None = None
    ) -> Translation:
        """Translate virtual addresses (uint64[n]) through the tables as they are; see pgemu.translate.

        ValueError once the process has ended.

        >>> process.translate([0x4000_0123, 0x80_F000])
        Translation(2: 1 OK, 1 NOT_PRESENT; physical=[0x100000123 0x0])
        >>> process.translate([0x4000_0123], Kind.USER_FETCH).error.tolist()  # present, from user mode, a fetch
        [21]
        """
        column = as_column(addresses)
        if column is None or kinds is not None or access is not None:
            column, kinds, access = plain(AddressSpace.translate, self, addresses=addresses, kinds=kinds, access=access)
        root = self.machine.arrays.state[_SPACES + self.space * _SPACE_WORDS + _ROOT]
        if not root or self._now[0] != self.generation:
            self._check_alive()
        return translator()(self.machine, HOST_X86_64, root, column, kinds, access)
