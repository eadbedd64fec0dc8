"""A virtual machine: its memory slots, stage-2 tables and accesses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from pgemu.machine.arguments import OfMachine, guards_creation, plain
from pgemu.machine.arrays import U64, Integers
from pgemu.machine.columns import as_column
from pgemu.machine.core import run_one
from pgemu.machine.field_rules import number_of
from pgemu.machine.results import Result, Results
from pgemu.machine.rows import memslot_rows, next_row
from pgemu.machine.vm_kinds import PRIVATE_LEVELS, Kind as VmKind, kind_row
from pgemu.tables.translating import translator
from pgemu_kernels import words as W
from pgemu_kernels.formats.bits import HOST_X86_64
from pgemu_kernels.words.operations import Flag, Operation

if TYPE_CHECKING:
    from pgemu.machine.core import Core
    from pgemu.objects.address_space import AddressSpace
    from pgemu.objects.files import GuestMemfd4K
    from pgemu.objects.guest_memfd import GuestMemfd
    from pgemu.objects.large_pages import LargePage
    from pgemu.objects.mapped_pages import MappedPage, PfnCache
    from pgemu.objects.stage2 import Stage2
    from pgemu.tables.translation import Access, Kind, NestedTranslation, Translation
    from pgemu.tables.walked import Walk

# Flag's own "|" would take as long as the rest of a call.
_WRITE, _EXEC, _ACCEPT_4K = int(Flag.WRITE), int(Flag.EXEC), int(Flag.ACCEPT_4K)
_GUEST_FAULT = Operation.GUEST_FAULT
_VMS, _VM_WORDS, _ROOT, _PRIVATE_ROOT = int(W.STATE_VMS), int(W.V_WORDS), int(W.V_ROOT), int(W.V_PRIVATE_ROOT)
_STAGE2_FORMAT = int(W.R_STAGE2_FORMAT)
_MOST = (1 << 64) - 1


@guards_creation(vm=number_of("a VM", W.VMS))
@dataclass(frozen=True)
class Vm(OfMachine, but=("touch", "translate")):
    """A virtual machine: its stage-2 tables and its memory slots.

    >>> machine = Machine(Config("restructure", pool=4 << 20, page_size=2 << 20, buddy=4 << 20))
    >>> gmem, process = machine.create_guest_memfd(4 << 20, shared=True), machine.create_process()
    >>> vm = machine.create_vm(process, protected=True)
    >>> process.mmap(gmem, 0x4000_0000).name, vm.bind(gmem, gpa=0, userspace_addr=0x4000_0000).name
    ('ok', 'ok')
    >>> vm.touch(0x1000), vm.touch(0x1000)
    (Result(status=RET_PF_FIXED, detail=1), Result(status=RET_PF_SPURIOUS, detail=1))
    """

    machine: Core = field(repr=False)
    vm: int

    @classmethod
    def create(cls, machine: Core, process: AddressSpace | None, kind: VmKind) -> Vm:
        """See Machine.create_vm.

        >>> Vm.create(machine, process, "sw").vm
        1
        """
        from pgemu_kernels.run.entries import provide
        from pgemu_kernels.words.requests import STAGE2_ROOT

        if process is not None and process.ended:
            raise ValueError(f"process {process.space}: it has ended, expected one whose memory the VM can show")
        state, config = machine.arrays.state, machine.config
        kind_of_vm = kind_row(kind, config.stage2, "kind")
        level = kind_of_vm.private_level
        if kind_of_vm.private and config.private_level is not None:
            level = PRIVATE_LEVELS[config.private_level]
        vm = next_row(machine, W.R_VMS, W.VMS, "VMs")
        row = int(W.STATE_VMS) + vm * W.V_WORDS
        state[row + int(W.V_PROPERTIES)] = kind_of_vm.properties
        state[row + int(W.V_PRIVATE_LEVEL)] = level
        if provide(machine.descriptor, STAGE2_ROOT, np.uint64(row)) != 0:
            raise OSError(W.ENOMEM, "no frame for a stage-2 root")
        state[W.R_VM_PROPERTIES] |= np.uint64(kind_of_vm.properties)
        if kind_of_vm.properties or level < PRIVATE_LEVELS["1G"]:
            state[W.R_FULL] = 1  # the fast loops know no kind that does anything otherwise
        # Without a process no mapping of the inode is the VM's own: none of them notifies it.
        machine.arrays.state[row + int(W.V_SPACE)] = process.space if process else (1 << 64) - 1
        machine.arrays.state[row + int(W.V_PROTECTED)] = kind_of_vm.private
        machine.arrays.state[row + int(W.V_LIVE)] = 1
        machine.arrays.state[row + int(W.V_UNLOADED)] = 1
        if process:
            machine.arrays.state[int(W.STATE_SPACES) + process.space * W.S_WORDS + int(W.S_VMS)] |= np.uint64(1 << vm)
            machine.arrays.state[W.R_MAPPINGS] += np.uint64(1)
        machine.arrays.state[W.R_VMS] += np.uint64(1)
        return cls(machine, vm)

    def _field(self, name: np.uint64) -> int:
        """A word of the VM's row."""
        return int(self.machine.arrays.state[int(W.STATE_VMS) + self.vm * W.V_WORDS + int(name)])

    @property
    def root(self) -> int:
        """Physical address of the stage-2 root; 0 once the VM is closed."""
        return self._field(W.V_ROOT)

    @property
    def private_root(self) -> int:
        """The same of private memory: `root`, or that of the mirror of a VM that has one."""
        return self._field(W.V_PRIVATE_ROOT)

    def _check_open(self) -> None:
        if not self.root:
            raise ValueError(f"VM {self.vm}: it is closed, expected one that is not")

    def _root(self, private: bool) -> int:
        return self.private_root if private else self.root

    # ------------------------------------------------------------------ memory slots

    def set_memory_region(
        self,
        slot: int,
        gpa: int,
        size: int,
        userspace_addr: int = 0,
        *,
        read_only: bool = False,
        log_dirty_pages: bool = False,
        gmem: GuestMemfd4K | None = None,
        gmem_offset: int = 0,
    ) -> Result:
        """KVM_SET_USER_MEMORY_REGION2: create, move, change or (size 0) delete memory slot number `slot`.

        The slot shows the process's memory from `userspace_addr` on; with `gmem`, private pages (or all, if the file
        can be mapped) come from there. 0; -EINVAL for what is not aligned, too large, past 48 bits of guest address
        or the process's addresses, for a change of size, userspace address or read-only, for deleting what is not
        there, for a VM without a process; -EEXIST over another slot; -EBADF for a closed file or VM; -EINVAL for a
        number from words.SLOT_IDS on; -ENOSPC past words.MEMSLOTS of all VMs, which KVM does not know. Deleting or
        moving one drops the whole stage-2 tree, of a protected VM only the slot's leaves. Dirty logging switched on
        splits large leaves to 4K and write-protects; switched off, large leaves come back (6.12: at the next access).
        virt/kvm/kvm_main.c:kvm_set_memory_region()

        >>> process.mmap_anonymous(0x80_0000, 1 << 20).name
        'ok'
        >>> vm.set_memory_region(5, 1 << 30, 1 << 20, 0x80_0000).name, vm.touch(1 << 30).name
        ('ok', 'RET_PF_FIXED')
        """
        flags = Flag.READ_ONLY if read_only else 0
        flags |= Flag.LOG_DIRTY_PAGES if log_dirty_pages else 0
        if gmem is not None:
            flags |= Flag.PRIVATE
            named = self.machine.operate(Operation.BIND, vm=self.vm, object_=gmem.number, offset=gmem_offset)
            if named.status != 0:
                return named
        return self.machine.operate(
            Operation.MEMSLOT,
            flags=flags,
            vm=self.vm,
            object_=slot,
            address=gpa,
            offset=userspace_addr,
            length=size,
        )

    def set_attributes(self, gpa: int, size: int, *, private: bool) -> Result:
        """KVM_SET_MEMORY_ATTRIBUTES: make guest memory private or shared.

        0; -EINVAL if not aligned, empty, or private in a VM that is not protected; -ENOMEM with nothing changed.
        If anything changes the whole range loses its leaves. virt/kvm/kvm_main.c:kvm_vm_set_mem_attributes()

        >>> vm.set_attributes(1 << 30, 4096, private=True).name
        'ok'
        """
        flags = Flag.PRIVATE if private else Flag.SHARED
        return self.machine.operate(Operation.ATTRIBUTES, flags=flags, vm=self.vm, address=gpa, length=size)

    def prefault(self, gpa: int, size: int) -> Result:
        """KVM_PRE_FAULT_MEMORY: map [gpa, gpa + size) without an access; accessed stays clear.

        0 with the bytes populated in `detail`, less than `size` where a later page failed; -ENOENT if the first page
        has no slot, -EFAULT, -ENOMEM, -EINVAL; in the designs' slots -EBUSY where Linux would wait for a conversion,
        and the range ends with the slots of that kind. virt/kvm/kvm_main.c:kvm_vcpu_pre_fault_memory()

        >>> vm.prefault(2 << 20, 4096).name, vm.touch(2 << 20).name
        ('ok', 'RET_PF_SPURIOUS')
        """
        return self.machine.operate(Operation.PREFAULT, vm=self.vm, address=gpa, length=size)

    def dirty_log(self, slot: int) -> tuple[int, U64]:
        """KVM_GET_DIRTY_LOG: (0, -ENOENT or -EINVAL; uint64[n], guest physical addresses written since the last call).

        The pages are write-protected again. virt/kvm/kvm_main.c:kvm_get_dirty_log_protect()

        >>> process.mmap_anonymous(0x80_0000, 1 << 20).name
        'ok'
        >>> vm.set_memory_region(5, 1 << 30, 1 << 20, 0x80_0000, log_dirty_pages=True).name
        'ok'
        >>> vm.touch((1 << 30) + 0x3000, write=True).name
        'RET_PF_FIXED'
        >>> [hex(gpa) for gpa in vm.dirty_log(5)[1].tolist()]
        ['0x40003000']
        """
        pages = self._dirty_pages(slot)
        result = self.machine.operate(Operation.DIRTY_LOG, vm=self.vm, object_=slot)
        return result.status, pages if result.status == 0 else pages[:0]

    def _dirty_pages(self, slot: int) -> U64:
        """Guest physical addresses in a slot's dirty bitmap."""
        from pgemu.objects.stage2 import radix_tree

        rows = memslot_rows(self.machine)
        kind = (rows[:, W.M_LIVE] != 0) & (rows[:, W.M_KIND] == W.SLOT_USER)
        found = np.flatnonzero(kind & (rows[:, W.M_VM] == self.vm) & (rows[:, W.M_ID] == slot))
        if found.size == 0:
            return np.empty(0, np.uint64)
        row = rows[found[0]]
        index, words = radix_tree(self.machine.arrays.ram, int(row[W.M_DIRTY]))
        bits = np.unpackbits(words.astype("<u8").view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")
        word, bit = np.nonzero(bits)
        page = index[word] * np.uint64(64) + bit.astype(np.uint64)
        return np.asarray((row[W.M_BASE_GFN] + page) << np.uint64(12))

    def close(self) -> Result:
        """Drop the last reference: slots, tables and attributes go. 0, or -EBADF if it was closed before.

        virt/kvm/kvm_main.c:kvm_destroy_vm()

        >>> vm.close().name, machine.vms
        ('ok', [])
        """
        return self.machine.operate(Operation.VM_EXIT, vm=self.vm)

    # ------------------------------------------------------------------ the designs' slots

    def bind(
        self,
        gmem: GuestMemfd,
        gpa: int,
        *,
        offset: int = 0,
        length: int | None = None,
        userspace_addr: int | None = None,
    ) -> Result:
        """Make a memory slot of the inode's range: 0, -EEXIST, -EINVAL, -EBADF (a closed VM or file), -ENOSPC.

        userspace_addr: what KVM's MMU notifier goes by: -EINVAL if it is no address of a process. Without one it is
        where the VM's process shows the range, now or as soon as it does (pgemu_kernels.stage2.userspace). A file of
        form "rfc2" is refused (-EINVAL) where the VM's process does not have the same file and offset mapped there;
        others do not look.

        >>> other = machine.create_vm(process, protected=True)
        >>> other.bind(gmem, gpa=1 << 30, offset=2 << 20, length=2 << 20).name
        'ok'
        """
        if gmem.form == "rfc2" and userspace_addr is not None and not self._shows(gmem, offset, userspace_addr):
            return Result(-W.EINVAL, 0)
        if userspace_addr is not None:
            row = int(W.STATE_VMS) + self.vm * W.V_WORDS
            # The last one there is is as little aligned as the one before it.
            self.machine.arrays.state[row + int(W.V_BIND_HVA)] = min(userspace_addr, _MOST - 1) + 1
        return self.machine.operate(
            Operation.BIND,
            vm=self.vm,
            object_=gmem.inode,
            address=gpa,
            offset=offset,
            length=gmem.size - offset if length is None else length,
        )

    def dirty_logging(self, gpa: int, on: bool) -> Result:
        """Switch KVM_MEM_LOG_DIRTY_PAGES of the designs' slot at `gpa`: -EINVAL, as KVM refuses it for guest_memfd.

        With Config.dirty_log_guest_memfd 0, -ENOENT without such a slot, -EBADF of a closed VM: on, large leaves are
        split to 4K and faults map 4K; off, large leaves come back (6.12: at the next access). There is no bitmap: the
        guest's writes are not noted. arch/x86/kvm/x86.c:kvm_mmu_slot_apply_flags()

        >>> vm.dirty_logging(0, True).name
        '-EINVAL'
        """
        flags = Flag.LOG_DIRTY_PAGES if on else 0
        return self.machine.operate(Operation.DIRTY_LOGGING, flags=flags, vm=self.vm, address=gpa)

    def _shows(self, gmem: GuestMemfd, offset: int, address: int) -> bool:
        """Whether the VM's process has `offset` of an inode mapped at an address."""
        state = self.machine.arrays.state
        rows = state[int(W.STATE_VMAS) :][: W.VMAS * W.A_WORDS].reshape(-1, W.A_WORDS)
        for row in rows[: self.machine.register(W.R_VMAS)]:
            start, end, space, inode, pgoff = (
                int(row[word]) for word in (W.A_START, W.A_END, W.A_SPACE, W.A_INODE, W.A_PGOFF)
            )
            if start <= address < end and space == self._field(W.V_SPACE):
                return inode == gmem.inode and pgoff * W.PAGE_4K + address - start == offset
        return False

    def unbind(self, gpa: int) -> Result:
        """Delete the slot that begins at `gpa`: 0, -ENOENT, -EINVAL if not aligned, -EBADF of a closed VM.

        >>> vm.unbind(0).name, vm.leaves()
        ('ok', (0, 0, 0))
        """
        return self.machine.operate(Operation.UNBIND, vm=self.vm, address=gpa)

    def release(self, gmem: GuestMemfd) -> Result:
        """The VM's guest_memfd file of an inode is closed: 0, -EBADF if it has no slot of it or closed it, -EBUSY.

        While the VM's process maps the inode nothing changes; it is released with the last mapping. Then its slots
        stay where they are, without memory: a guest access there is -EFAULT until `unbind`. The memory is
        the inode's and stays; `bind` at other guest addresses opens a new file. virt/kvm/guest_memfd.c:
        kvm_gmem_release(), pgemu_kernels.gmem.truncation.release()

        >>> vm.release(gmem).name
        'ok'
        """
        return self.machine.operate(Operation.RELEASE, vm=self.vm, object_=gmem.inode)

    def touch(
        self, gpa: int, *, write: bool = False, execute: bool = False, accept_4k: bool = False, actor: int = 0
    ) -> Result:
        """Guest access: RET_PF_FIXED or RET_PF_SPURIOUS with the leaf level, RETRY, EMULATE, -EFAULT, -ENOMEM.

        EMULATE is an exit to userspace as MMIO: no slot, which a 4K entry caches (detail is its level), or a write to a
        read-only one. -EFAULT is a memory fault exit: nothing in the process's memory that the access may use, memory
        of the other kind, or a slot whose guest_memfd file was released (Vm.release). -EBADF: the VM is closed.
        accept_4k: the guest accepts the page, 4K of it, which kinds of VM that know accepting map at 4K.

        >>> vm.touch(2 << 20, write=True), vm.touch(1 << 40).name  # no slot there: MMIO
        (Result(status=RET_PF_FIXED, detail=1), 'RET_PF_EMULATE')
        """
        if (
            type(gpa) is not int or gpa >> 64 or type(actor) is not int or actor
            or type(write) is not bool or type(execute) is not bool or type(accept_4k) is not bool
        ):  # fmt: skip
            given = {"gpa": gpa, "write": write, "execute": execute, "accept_4k": accept_4k, "actor": actor}
            gpa, write, execute, accept_4k, actor = plain(Vm.touch, self, **given)
        flags = (_WRITE if write else 0) | (_EXEC if execute else 0) | (_ACCEPT_4K if accept_4k else 0)
        return run_one(self.machine, _GUEST_FAULT, flags, actor, self.vm, 0, 0, gpa, 0, 0)

    def touch_many(self, gpas: Integers, *, write: bool = False) -> Results:
        """Guest accesses to `gpas` (uint64[n]), in order.

        >>> vm.touch_many([0, 4096, 2 << 20]).names
        ['RET_PF_FIXED', 'RET_PF_SPURIOUS', 'RET_PF_FIXED']
        """
        header = np.uint64(Operation.GUEST_FAULT | (Flag.WRITE if write else 0) << 8 | self.vm << 32)
        return self.machine.run_columns(header, 0, gpas, count=len(gpas))

    def walk(self, gpa: int, *, private: bool = False) -> Walk:
        """[(level, entry address, entry)] of a guest physical address.

        private: here and in what follows, below the root of private memory, where that is one of its own. ValueError
        once the VM is closed.

        >>> vm.walk(0x1000)[-1].level
        1
        """
        from pgemu.tables.walk import walk_page

        self._check_open()
        return walk_page(self.machine, self.machine.stage2_format, self._root(private), gpa >> 12)

    def translate(
        self,
        gpas: Integers,
        kinds: Kind | Integers | None = None,
        access: Access | None = None,
        *,
        private: bool = False,
    ) -> Translation:
        """Translate guest physical addresses (uint64[n]) through stage 2; see pgemu.tables.translation.translate.

        >>> vm.translate([0x1000, 2 << 20]).status.tolist()
        [0, 1]
        """
        column = as_column(gpas)
        if column is None or kinds is not None or access is not None or type(private) is not bool:
            given = {"gpas": gpas, "kinds": kinds, "access": access, "private": private}
            column, kinds, access, private = plain(Vm.translate, self, **given)
        state = self.machine.arrays.state
        root = state[_VMS + self.vm * _VM_WORDS + (_PRIVATE_ROOT if private else _ROOT)]
        if not root:
            self._check_open()
        return translator()(self.machine, state[_STAGE2_FORMAT], root, column, kinds, access)

    def translate_virtual(
        self,
        guest_root: int,
        addresses: Integers,
        kinds: Kind | Integers,
        access: Access | None = None,
        *,
        references: bool = False,
    ) -> NestedTranslation:
        """Translate a guest's virtual addresses (uint64[n]) through its x86-64 tables and stage 2.

        guest_root: guest physical address of its top table. references: also list every entry read and written; see
        pgemu.translate_nested.

        >>> found = vm.translate_virtual(0x40_0000, [0x7F00_0000_0000], Kind.READ)
        >>> WalkStatus(found.status[0]).name, WalkStage(found.stage[0]).name  # no memory where its top table would lie
        ('NOT_PRESENT', 'TABLE')
        """
        from pgemu.tables.translation import translate_nested

        self._check_open()
        stage2 = self.machine.register(W.R_STAGE2_FORMAT)
        return translate_nested(
            self.machine, HOST_X86_64, guest_root, stage2, self.root, addresses, kinds, access, references=references
        )

    # ------------------------------------------------------------------ what KVM itself maps

    def map_page(self, gpa: int, *, write: bool = True) -> MappedPage:
        """kvm_vcpu_map() of the page at `gpa`, as nested virtualisation does it: pinned until it is unmapped.

        It goes by the slot's userspace address, also of a slot over a guest_memfd, and faults the page in there.
        OSError EINVAL: no slot or no mapping there, a page that userspace may not have (a private one), `write` where
        nothing may be written, and VM_PFNMAP (design pfnmap) but for Config.allow_unsafe_mappings: then the frame is
        taken as it is, without a reference, and no notifier takes it away. Linux 6.12 takes one reference in place of
        a pin, of VM_PFNMAP only on a folio's first page. EBADF of a closed VM, ENOSPC past words.MAPPED_PAGES, EBUSY
        where Linux would wait for a conversion, EOPNOTSUPP over memory of other kinds than the designs' guest_memfd.
        virt/kvm/kvm_main.c:__kvm_vcpu_map(), arch/x86/kvm/vmx/nested.c:nested_get_vmcs12_pages()

        >>> page = vm.map_page(0)
        >>> page.write(b"hello"), page.read(0, 5), page.unmap().name
        (None, b'hello', 'ok')
        """
        from pgemu.objects.mapped_pages import MappedPage

        return MappedPage.create(self.machine, self.vm, gpa, write)

    def pfn_cache(self, gpa: int, length: int) -> PfnCache:
        """Activate a gfn_to_pfn_cache of `length` bytes at `gpa`: no reference, and the MMU notifier invalidates it.

        Always for writing. Where no frame can be had (kvm_gpc_activate(): -EFAULT) it is active and not valid
        (PfnCache.check), until a refresh finds one; of VM_PFNMAP it takes the entry's frame. OSError: EINVAL for what
        reaches past the page, EBADF, ENOSPC, EBUSY, EOPNOTSUPP as map_page. virt/kvm/pfncache.c

        >>> cache = vm.pfn_cache(8, 8)
        >>> cache.write(b"hi"), cache.read(0, 2)
        (None, b'hi')
        """
        from pgemu.objects.mapped_pages import PfnCache

        return PfnCache.create(self.machine, self.vm, gpa, length)

    # ------------------------------------------------------------------ looking

    def lpage_info(self, gpa: int, level: Literal[2, 3]) -> LargePage | None:
        """What forbids a leaf of `level` 2 or 3 at `gpa`; None without a slot. See pgemu.objects.large_pages.

        >>> vm.lpage_info(0, 2)
        LargePage(disallow_lpage=0, mixed=False)
        """
        from pgemu.objects.large_pages import lpage_info

        return lpage_info(self.machine, self.vm, gpa, level)

    def stage2(self, *, private: bool = False) -> Stage2:
        """The stage-2 tree as it stands, read from the tables; no root before the first run, or after a drop of it.

        >>> vm.stage2().leaf_counts()
        (1, 0, 0)
        """
        from pgemu.objects.stage2 import read_stage2

        tree = read_stage2(self.machine, self._root(private))
        if self._field(W.V_UNLOADED) and not len(tree.tables):
            return read_stage2(self.machine, 0)
        return tree

    def _trees(self) -> list[Stage2]:
        """The tree, or both."""
        mirror = [self.stage2(private=True)] if self.private_root != self.root else []
        return [self.stage2(), *mirror]

    def leaves(self) -> tuple[int, int, int]:
        """Leaves of 4K, 2M and 1G, shared and private: KVM's pages_4k, pages_2m, pages_1g.

        >>> vm.leaves()
        (1, 0, 0)
        """
        small, middle, large = (sum(counts) for counts in zip(*(t.leaf_counts() for t in self._trees()), strict=True))
        return small, middle, large

    @property
    def table_pages(self) -> int:
        """Stage-2 table pages but the roots, shared and private: KVM's part of nr_sec_page_table_pages."""
        return sum(len(tree.tables) for tree in self._trees())
