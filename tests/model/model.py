"""Both designs of guest_memfd with HugeTLB as Linux semantics over dicts and sets.

Everything is in pages, nothing is fast, and no code is shared with the kernels but the numbers of
results. Results are those of pgemu.machine: status and detail.
"""

from __future__ import annotations

from typing import NamedTuple

from model.inode import Inode, Window
from model.memory import Folio, Memory
from model.tables import Entry, HostTables, Stage2, common, overlap
from pgemu_kernels import layout as L

RESTRUCTURE = "restructure"
PFNMAP = "pfnmap"
PAGE = 4096
TASK_SIZE = 1 << 47


class Outcome(NamedTuple):
    """What an operation returned, as pgemu.machine.Result."""

    status: int
    detail: int = 0


OK = Outcome(0)


class Model:
    """A machine of one design. Processes, VMs and inodes are numbered in order of creation."""

    def __init__(
        self,
        design: str,
        *,
        order: int = 9,
        pool_pages: int = 4,
        kernel: str = "7.3",
        frames: int | None = None,
        hvo: bool = True,
        zero_by_page: bool = False,
        zap_both_kinds: bool = True,
        notifier: bool = True,
        series: str = "jan2026",
    ) -> None:
        self.restructure = design == RESTRUCTURE
        self.order = order
        self.block_pages = 1 << order
        self.reclaims_tables = kernel != "6.12"  # CONFIG_PT_RECLAIM came with 6.14
        self.zap_both_kinds = zap_both_kinds
        self.notifier = notifier
        self.memory = Memory(kernel, order, pool_pages, frames, hvo, zero_by_page, series)
        self.inodes: list[Inode] = []
        self.spaces: list[HostTables] = []
        self.vms: list[Stage2] = []
        self.vm_space: list[int] = []
        self.protected: list[bool] = []
        self.vmas: list[Window] = []
        self.slots: list[Window] = []

    # ------------------------------------------------------------------ making

    def create_guest_memfd(self, size: int, shared: bool) -> int | None:
        """Its number, or None when the pool cannot reserve it.

        An inode's subpool keeps its reservation until the inode and the last page that came from it are gone.
        """
        alive = [inode for inode in self.inodes if inode.open or self.taken(inode)]
        reserved = sum(inode.pages // self.block_pages - self.taken(inode) for inode in alive)
        if reserved + size // PAGE // self.block_pages > len(self.memory.free):
            return None
        pages = size // PAGE
        self.inodes.append(Inode(pages, set(range(pages)) if shared else set()))
        return len(self.inodes) - 1

    def create_process(self) -> int | None:
        """Its number, or None without a frame for the top table."""
        if not self.memory.frames.take():
            return None
        self.spaces.append(HostTables(self.memory.frames))
        return len(self.spaces) - 1

    def create_vm(self, space: int, protected: bool) -> int | None:
        """Its number, or None without a frame for the root."""
        if not self.memory.frames.take():
            return None
        self.vms.append(Stage2(self.memory.frames))
        self.vm_space.append(space)
        self.protected.append(protected)
        return len(self.vms) - 1

    # ------------------------------------------------------------------ folios

    def taken(self, inode: Inode) -> int:
        """Huge pages that came from an inode's subpool, those that left the inode included."""
        return sum(folio.owner is inode for folio in self.memory.in_use.values())

    def block_of(self, index: int) -> range:
        """Pages of the huge page around a page."""
        start = index & ~(self.block_pages - 1)
        return range(start, start + self.block_pages)

    def folio(self, inode: Inode, index: int) -> Folio | None:
        """The folio at a page, allocated if need be: restructure splits it at once where any page is shared."""
        number = index >> self.order
        if number not in inode.blocks:
            full = self.taken(inode) == inode.pages // self.block_pages  # its subpool's limit
            folio = None if full else self.memory.take()
            if folio is None:
                return None
            folio.owner = inode
            if self.restructure and not inode.shared.isdisjoint(self.block_of(index)) and not self.memory.split(folio):
                self.memory.uncache(folio)
                return None
            inode.blocks[number] = folio
        return inode.blocks[number]

    def pfn(self, inode: int, index: int) -> int | None:
        """Frame of a page, or None while nothing is allocated."""
        folio = self.inodes[inode].blocks.get(index >> self.order)
        return folio.head + index % self.block_pages if folio else None

    # ------------------------------------------------------------------ faults

    def host_fault(self, space: int, address: int, write: bool) -> Outcome:
        page = address // PAGE
        vma = next((v for v in self.vmas if v.owner == space and page in v.pages), None)
        if vma is None or (write and vma.read_only):
            return Outcome(L.VM_FAULT_SIGSEGV)
        if page in self.spaces[space].entries:
            return Outcome(0, 1)
        index = vma.file_page(page)
        inode = self.inodes[vma.inode]
        if index >= inode.pages or index not in inode.shared:
            return Outcome(L.VM_FAULT_SIGBUS)
        folio = self.folio(inode, index)
        if folio is None:
            return Outcome(L.VM_FAULT_OOM)
        pfn = folio.head + index % self.block_pages
        self.memory.first_use(folio, pfn)
        if not self.spaces[space].map(page, Entry(pfn, not self.restructure, not vma.read_only)):
            return Outcome(L.VM_FAULT_OOM)
        if not self.restructure:
            return Outcome(L.VM_FAULT_NOPAGE, 1)
        folio.mapped[folio.unit(pfn)] += 1
        return Outcome(L.VM_FAULT_LOCKED, 1)

    def guest_fault(self, vm: int, gpa: int, private: bool | None = None) -> Outcome:
        """`private`: the kind of access, where the hardware tells."""
        gfn = gpa // PAGE
        slot = next((s for s in self.slots if s.owner == vm and gfn in s.pages), None)
        if slot is None:
            return Outcome(L.RET_PF_EMULATE)
        inode = self.inodes[slot.inode]
        index = slot.file_page(gfn)
        # page_fault_can_be_fast() leaves an access of the wrong kind to the slow path, which exits.
        if private is not None and private == (index in inode.shared):
            return Outcome(-L.EFAULT)
        present = self.vms[vm].find(gfn)
        if present:
            return Outcome(L.RET_PF_SPURIOUS, present[0])
        folio = self.folio(inode, index)
        if folio is None:
            return Outcome(-L.ENOMEM)
        pfn = folio.head + index % self.block_pages
        level = self.stage2_level(slot, gfn, folio)
        self.memory.first_use(folio, pfn, 1 << 9 * (level - 1))
        if not self.vms[vm].map(gfn, level, pfn):
            return Outcome(-L.ENOMEM)
        return Outcome(L.RET_PF_FIXED, level)

    def stage2_level(self, slot: Window, gfn: int, folio: Folio) -> int:
        """The largest level that slot, alignment and folio (restructure) or shareability (pfnmap) permit."""
        shared = self.inodes[slot.inode].shared
        index = slot.file_page(gfn)
        for level in range(1 + self.order // 9, 1, -1):
            size = 1 << 9 * (level - 1)
            start = gfn // size * size
            if start not in slot.pages or start + size - 1 not in slot.pages:
                continue
            if (slot.pages.start - slot.pgoff) % size:
                continue
            block = range(index // size * size, index // size * size + size)
            fits = not folio.split if self.restructure else shared.isdisjoint(block) or shared.issuperset(block)
            if fits:
                return level
        return 1

    # ------------------------------------------------------------------ unmapping

    def clear_entries(self, vma: Window, pages: range) -> None:
        """Unmap part of a VMA: KVM's MMU notifier first, then the entries with what they hold."""
        if self.notifier:
            file = vma.file_range(pages)
            for slot in self.slots:
                if self.vm_space[slot.owner] == vma.owner:
                    self.vms[slot.owner].zap(slot.showing(vma.inode, file))
        for entry in self.spaces[vma.owner].unmap(pages):
            if not entry.special:
                folio = self.memory.folio_of(entry.pfn)
                assert folio is not None, "an entry outlived its folio"
                folio.mapped[folio.unit(entry.pfn)] -= 1

    def unmap_file(self, inode: int, pages: range) -> None:
        """unmap_mapping_pages()."""
        for vma in self.vmas:
            part = vma.showing(inode, pages)
            if part:
                self.clear_entries(vma, part)

    def zap_file(self, inode: int, pages: range) -> None:
        """Drop the stage-2 leaves over pages of an inode, in every VM that has them bound."""
        for slot in self.slots:
            self.vms[slot.owner].zap(slot.showing(inode, pages))

    def remove_vmas(self, gone: list[tuple[Window, range]]) -> None:
        """Drop parts of VMAs: entries, VMAs, then the tables that no VMA needs."""
        for vma, part in gone:
            self.clear_entries(vma, part)
            self.vmas.remove(vma)
            rest = (range(vma.pages.start, part.start), range(part.stop, vma.pages.stop))
            self.vmas += [vma.cut(pages) for pages in rest if pages]
        for space in {vma.owner for vma, _ in gone}:
            self.spaces[space].free_tables_outside([v.pages for v in self.vmas if v.owner == space])

    # ------------------------------------------------------------------ mappings and slots

    def mmap(self, space: int, address: int, inode: int, offset: int, length: int, read_only: bool) -> Outcome:
        if not self.inodes[inode].open:
            return Outcome(-L.EBADF)
        pages = range(address // PAGE, (address + length) // PAGE)
        if (address | offset | length) % PAGE or not pages:
            return Outcome(-L.EINVAL)
        if any(v.owner == space and overlap(v.pages, pages) for v in self.vmas):
            return Outcome(-L.EEXIST)
        self.vmas.append(Window(space, pages, inode, offset // PAGE, read_only))
        return OK

    def munmap(self, space: int, address: int, length: int) -> Outcome:
        pages = range(address // PAGE, (address + length) // PAGE)
        if (address | length) % PAGE or not pages:
            return Outcome(-L.EINVAL)
        parts = [(v, common(v.pages, pages)) for v in self.vmas if v.owner == space]
        self.remove_vmas([(vma, part) for vma, part in parts if part])
        return OK

    def zap(self, space: int, address: int, length: int, madvise: bool) -> Outcome:
        if (address | length) % PAGE:
            return Outcome(-L.EINVAL)
        pages = range(address // PAGE, (address + length) // PAGE)
        covered = 0
        for vma in sorted((v for v in self.vmas if v.owner == space), key=lambda v: v.pages.start):
            part = common(vma.pages, pages)
            if not part:
                continue
            if madvise and not self.restructure:
                return Outcome(-L.EINVAL)  # VM_PFNMAP
            self.clear_entries(vma, part)
            if madvise and self.reclaims_tables:
                self.spaces[space].free_last_level(part)
            covered += len(part)
        return OK if covered == len(pages) else Outcome(-L.ENOMEM)

    def bind(self, vm: int, gpa: int, inode: int, offset: int, length: int) -> Outcome:
        """kvm_set_memory_region() looks at the slots' guest frames before kvm_gmem_bind() looks at the file."""
        if (gpa | offset | length) % PAGE or not length:
            return Outcome(-L.EINVAL)
        slot = Window(vm, range(gpa // PAGE, (gpa + length) // PAGE), inode, offset // PAGE)
        if any(s.owner == vm and overlap(s.pages, slot.pages) for s in self.slots):
            return Outcome(-L.EEXIST)
        if not self.inodes[inode].open:
            return Outcome(-L.EBADF)
        if slot.file.stop > self.inodes[inode].pages:
            return Outcome(-L.EINVAL)
        if any(s.owner == vm and s.showing(inode, slot.file) for s in self.slots):
            return Outcome(-L.EINVAL)
        self.slots.append(slot)
        return OK

    def unbind(self, vm: int, gpa: int) -> Outcome:
        slot = next((s for s in self.slots if s.owner == vm and s.pages.start == gpa // PAGE), None)
        if slot is None:
            return Outcome(-L.ENOENT)
        self.delete_slot(slot)
        return OK

    def delete_slot(self, slot: Window) -> None:
        """A protected VM loses the slot's leaves, another one its whole tree."""
        if self.protected[slot.owner]:
            self.vms[slot.owner].zap(slot.pages)
        else:
            self.vms[slot.owner].drop_all()
        self.slots.remove(slot)

    # ------------------------------------------------------------------ conversion

    def convert(self, inode: int, offset: int, length: int, shared: bool) -> Outcome:
        node = self.inodes[inode]
        if not node.open:
            return Outcome(-L.EBADF)
        pages = range(offset // PAGE, (offset + length) // PAGE)
        if (offset | length) % PAGE or not pages or pages.stop > node.pages:
            return Outcome(-L.EINVAL)
        changing = set(pages) - node.shared if shared else node.shared.intersection(pages)
        if not changing:
            return OK
        if self.memory.frames.used >= self.memory.frames.limit:
            return Outcome(-L.ENOMEM, offset)  # nodes of the attribute tree
        if not shared:
            self.unmap_file(inode, pages)
        if self.restructure:
            refused = self.split_blocks(node, pages) if shared else self.gate(node, pages)
            if refused:
                return refused
        self.zap_converted(inode, pages, shared)
        if shared:
            node.shared.update(pages)
        else:
            node.shared.difference_update(pages)
            self.merge_blocks(node, pages)
        return OK

    def zap_converted(self, inode: int, pages: range, shared: bool) -> None:
        """Restructure rounds out to huge pages; whether leaves of both kinds go is a parameter."""
        node = self.inodes[inode]
        if self.restructure:
            pages = range(self.block_of(pages.start).start, min(self.block_of(pages.stop - 1).stop, node.pages))
        if self.zap_both_kinds:
            self.zap_file(inode, pages)
            return
        for index in pages:
            if (index in node.shared) != shared:
                self.zap_file(inode, range(index, index + 1))

    def gate(self, node: Inode, pages: range) -> Outcome | None:
        """To private: -EAGAIN at the first folio in the range that somebody besides the page cache holds."""
        for index in pages:
            folio = node.blocks.get(index >> self.order)
            if folio is None:
                continue
            unit = folio.unit(folio.head + index % self.block_pages)
            if folio.held[unit] or folio.mapped[unit]:
                return Outcome(-L.EAGAIN, index * PAGE)
        return None

    def split_blocks(self, node: Inode, pages: range) -> Outcome | None:
        """To shared: split what the range touches; earlier blocks stay split when a later one fails."""
        for number in range(pages.start >> self.order, (pages.stop - 1 >> self.order) + 1):
            folio = node.blocks.get(number)
            if folio is None or folio.split:
                continue
            offset = max(pages.start, number << self.order) * PAGE
            if not folio.idle:
                return Outcome(-L.EBUSY, offset)  # its refcount cannot be frozen
            if not self.memory.split(folio):
                return Outcome(-L.ENOMEM, offset)
        return None

    def merge_blocks(self, node: Inode, pages: range) -> None:
        """To private, at the end: merge what has no shared page left and is idle."""
        for number in range(pages.start >> self.order, (pages.stop - 1 >> self.order) + 1):
            folio = node.blocks.get(number)
            if folio and folio.split and folio.idle and node.shared.isdisjoint(self.block_of(number << self.order)):
                self.memory.merge(folio, keep=True)

    # ------------------------------------------------------------------ truncation, references, end of life

    def punch_hole(self, inode: int, offset: int, length: int) -> Outcome:
        node = self.inodes[inode]
        if not node.open:
            return Outcome(-L.EBADF)
        if (offset | length) % PAGE or not length:
            return Outcome(-L.EINVAL)
        pages = range(offset // PAGE, min((offset + length) // PAGE, node.pages))
        if not pages:
            return OK
        if not self.restructure:
            self.unmap_file(inode, pages)  # truncation would leave special entries alone
        self.zap_file(inode, pages)
        for number in range(pages.start >> self.order, (pages.stop - 1 >> self.order) + 1):
            block = self.block_of(number << self.order)
            folio = node.blocks.get(number)
            if folio is None:
                continue
            part = common(block, pages)
            if part != block:
                self.memory.forget({folio.head + index - block.start for index in part})
                continue
            if folio.split:
                self.unmap_file(inode, block)
                if not folio.idle:
                    return Outcome(-L.EAGAIN, block.start * PAGE)  # cannot be merged
            self.memory.uncache(node.blocks.pop(number))
        return OK

    def get(self, inode: int, offset: int) -> Outcome:
        if not self.inodes[inode].open:
            return Outcome(-L.EBADF)
        pfn = self.pfn(inode, offset // PAGE)
        if pfn is None:
            return Outcome(-L.ENOENT)
        folio = self.memory.in_use[pfn & ~(self.block_pages - 1)]
        folio.held[folio.unit(pfn)] += 1
        return Outcome(0, pfn)

    def put(self, pfn: int) -> Outcome:
        folio = self.memory.folio_of(pfn)
        if folio is None or not folio.held[folio.unit(pfn)]:
            return Outcome(-L.ENOENT)
        folio.held[folio.unit(pfn)] -= 1
        if not folio.cached:
            self.memory.uncache(folio)
        return OK

    def close(self, inode: int) -> Outcome:
        node = self.inodes[inode]
        if not node.open:
            return Outcome(-L.EBADF)
        self.remove_vmas([(v, v.pages) for v in self.vmas if v.inode == inode])
        for slot in [s for s in self.slots if s.inode == inode]:
            self.delete_slot(slot)
        for number in sorted(node.blocks):
            self.memory.uncache(node.blocks.pop(number))
        node.open = False
        return OK

    # ------------------------------------------------------------------ what is counted

    @property
    def gauges(self) -> dict[L.Gauge, int]:
        """The machine's gauges, recounted."""
        leaves = [key[0] for vm in self.vms for key in vm.leaves]
        folios = list(self.memory.in_use.values())
        return {
            L.Gauge.FRAMES_USED: self.memory.frames.used,
            L.Gauge.HOST_TABLES: sum(space.table_pages for space in self.spaces),
            L.Gauge.STAGE2_TABLES: sum(vm.table_pages for vm in self.vms),
            L.Gauge.KERNEL_TABLES: self.memory.kernel_tables,
            L.Gauge.XARRAY_NODES: self.memory.nodes,
            L.Gauge.VMEMMAP_PAGES: self.memory.vmemmap_pages,
            L.Gauge.CONTENT_FRAMES: len(self.memory.contents),
            L.Gauge.HOST_LEAVES_4K: sum(len(space.entries) for space in self.spaces),
            L.Gauge.STAGE2_LEAVES_4K: leaves.count(1),
            L.Gauge.STAGE2_LEAVES_2M: leaves.count(2),
            L.Gauge.STAGE2_LEAVES_1G: leaves.count(3),
            L.Gauge.POOL_FREE: len(self.memory.free),
            L.Gauge.BLOCKS_HUGE: sum(f.cached and not f.split for f in folios),
            L.Gauge.BLOCKS_SPLIT: sum(f.cached and f.split for f in folios),
            L.Gauge.BLOCKS_ZOMBIE: sum(not f.cached for f in folios),
        }
