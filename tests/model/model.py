"""Both designs of guest_memfd with HugeTLB as Linux semantics over dicts and sets.

Everything is in pages, nothing is fast, and no code is shared with the kernels but the numbers of
results. Results are those of pgemu.Result: status and detail.
"""

from __future__ import annotations

from model.conversion import Conversions
from model.devices import Devices
from model.failures import Failures
from model.inode import Inode, Window
from model.lifetime import Lifetime
from model.machine import TASK_PAGES
from model.mapped import Mappings
from model.outcome import OK, Outcome
from model.parameters import PAGE
from model.tables import HostTables, Stage2, Table, common, overlap
from pgemu_kernels import words as W

__all__ = ("OK", "PAGE", "PFNMAP", "RESTRUCTURE", "Model", "Outcome")

RESTRUCTURE = "restructure"
PFNMAP = "pfnmap"


class Model(Conversions, Devices, Mappings, Lifetime, Failures):
    """A machine of one design. Processes, VMs and inodes are numbered in order of creation."""

    # ------------------------------------------------------------------ making

    def create_guest_memfd(self, size: int, shared: bool) -> int | None:
        """Its number, or None when the pool cannot reserve it.

        An inode's subpool keeps its reservation until the inode and the last page that came from it are gone.
        Pages of 4K are not reserved.
        """
        alive = [inode for inode in self.inodes if inode.open or self.taken(inode)]
        reserved = sum(inode.pages // self.block_pages - self.taken(inode) for inode in alive)
        if self.order and reserved + size // PAGE // self.block_pages > self.memory.count_free:
            return None
        pages = size // PAGE
        self.inodes.append(Inode(pages, set(range(pages)) if shared else set()))
        return len(self.inodes) - 1

    def create_process(self) -> int | None:
        """Its number, that of one that ended if there is any, or None without a frame for the top table."""
        if not self.memory.frames.take():
            return None
        number = next((i for i, space in enumerate(self.spaces) if not space.live), len(self.spaces))
        self.spaces[number : number + 1] = [HostTables(self.memory.frames)]
        return number

    def create_vm(self, space: int, kind: str) -> int | None:
        """Its number, or None without a frame for each root."""
        if not self.memory.frames.take(1 + (kind == "tdx")):
            return None
        if kind == "tdx":
            self.mirrors[len(self.vms)] = Stage2(self.memory.frames, mirror=True)
        self.vms.append(Stage2(self.memory.frames))
        self.vm_space.append(space)
        self.kinds.append(kind)
        return len(self.vms) - 1

    def fork(self, space: int) -> int | None:
        """The child, or None without memory. It gets the tables and the entries of VM_PFNMAP mappings only."""
        parent = self.spaces[space]
        number = self.create_process()
        if number is None:
            return None
        child = self.spaces[number]
        vmas = [vma for vma in self.vmas if vma.owner == space]
        special = [vma for vma in vmas if self.is_special(vma)]
        if special:
            needed = {table for table in parent.tables if any(overlap(table.span, vma.pages) for vma in special)}
            if not self.memory.frames.take(len(needed)):
                self.end_process(number)
                return None
            child.tables |= needed
            child.entries |= {page: entry for page, entry in parent.entries.items() if entry.special}
            child.huge |= parent.huge
        for vma in vmas:
            self.vmas.append(Window(number, vma.pages, vma.inode, vma.pgoff, vma.read_only, vma.counted))
        return number

    def exit(self, space: int) -> Outcome:
        """exit_mmap(): the process's VMs lose all that they map."""
        if self.parameters.notifier:
            for slot in self.slots:
                for tree in self.trees(slot.owner) if self.vm_space[slot.owner] == space else ():
                    tree.zap(slot.pages)
        self.remove_vmas([(vma, vma.pages) for vma in self.vmas if vma.owner == space])
        self.end_process(space)
        return OK

    def end_process(self, space: int) -> None:
        tables = self.spaces[space]
        assert not tables.entries
        assert not tables.huge
        self.memory.frames.put(tables.table_pages)
        tables.tables.clear()
        tables.live = False

    # ------------------------------------------------------------------ mappings and slots

    def mmap(
        self, space: int, address: int, inode: int, offset: int, length: int, read_only: bool, counted: bool = False
    ) -> Outcome:
        """do_mmap(), in its order."""
        pages = range(address // PAGE, address // PAGE + -(-length // PAGE))
        mine = [v.pages for v in self.vmas if v.owner == space]
        refusals = (
            (offset % PAGE != 0, W.EINVAL),
            (not self.inodes[inode].open, W.EBADF),
            (not pages, W.EINVAL),
            (pages.stop > TASK_PAGES, W.ENOMEM),
            (address % PAGE != 0, W.EINVAL),
            (any(overlap(other, pages) for other in mine), W.EEXIST),
            (offset // PAGE + len(pages) >= 1 << 51, W.EOVERFLOW),
        )
        for refused, error in refusals:
            if refused:
                return Outcome(-error)
        self.vmas.append(Window(space, pages, inode, offset // PAGE, read_only, counted))
        for slot in self.slots:
            if slot.place is None:
                slot.place = self.place_of(slot, self.vmas[-1:])
        return OK

    def munmap(self, space: int, address: int, length: int) -> Outcome:
        """do_vmi_munmap()."""
        pages = range(address // PAGE, address // PAGE + -(-length // PAGE))
        if address % PAGE or not pages or pages.stop > TASK_PAGES:
            return Outcome(-W.EINVAL)
        for page in (pages.start, pages.stop):
            for vma in [v for v in self.vmas if v.owner == space and v.pages.start < page < v.pages.stop]:
                self.split_vma(vma, page)
        gone = [(v, v.pages) for v in self.vmas if v.owner == space and overlap(v.pages, pages)]
        if gone:
            self.notify(gone[0][0], pages)  # unmap_vmas(): once, of the whole range, holes too
        self.remove_vmas(gone)
        return OK

    def split_vma(self, vma: Window, page: int) -> None:
        """__split_vma(): VMs lose a 2M block that the VMA held whole, if there is a table for its entry, whatever that
        is: split_huge_pmd_if_needed()."""
        block = range(page // 512 * 512, page // 512 * 512 + 512)
        inside = vma.pages.start <= block.start < page and block.stop <= vma.pages.stop
        if inside and Table.over(2, page) in self.spaces[vma.owner].tables:
            self.notify(vma, block)
        self.vmas.remove(vma)
        self.vmas += [vma.cut(range(vma.pages.start, page)), vma.cut(range(page, vma.pages.stop))]

    def zap(self, space: int, address: int, length: int, madvise: bool) -> Outcome:
        """madvise_walk_vmas()."""
        if address % PAGE:
            return Outcome(-W.EINVAL)
        pages = range(address // PAGE, address // PAGE + -(-length // PAGE))
        covered = 0
        for vma in sorted((v for v in self.vmas if v.owner == space), key=lambda v: v.pages.start):
            part = common(vma.pages, pages)
            if not part:
                continue
            if madvise and self.is_special(vma):
                return Outcome(-W.EINVAL)  # VM_PFNMAP
            self.clear_entries(vma, part)
            if madvise and self.reclaims_tables:
                self.spaces[space].free_last_level(part)
            covered += len(part)
        return OK if covered == len(pages) else Outcome(-W.ENOMEM)

    def bind(self, vm: int, gpa: int, inode: int, offset: int, length: int) -> Outcome:
        """kvm_set_memory_region() looks at the slots' guest frames before kvm_gmem_bind() looks at the file."""
        if (gpa | offset | length) % PAGE or not length:
            return Outcome(-W.EINVAL)
        slot = Window(vm, range(gpa // PAGE, (gpa + length) // PAGE), inode, offset // PAGE)
        if any(s.owner == vm and overlap(s.pages, slot.pages) for s in self.slots):
            return Outcome(-W.EEXIST)
        if not self.inodes[inode].open:
            return Outcome(-W.EBADF)
        if slot.file.stop > self.inodes[inode].pages:
            return Outcome(-W.EINVAL)
        if any(s.owner == vm and s.showing(inode, slot.file) for s in self.slots):
            return Outcome(-W.EINVAL)
        slot.place = self.place_of(slot, self.vmas)
        self.slots.append(slot)
        self.slot_changes[vm] += 1
        return OK

    def unbind(self, vm: int, gpa: int) -> Outcome:
        slot = next((s for s in self.slots if s.owner == vm and s.pages.start == gpa // PAGE), None)
        if slot is None:
            return Outcome(-W.ENOENT)
        self.delete_slot(slot)
        return OK

    # ------------------------------------------------------------------ what is counted

    @property
    def gauges(self) -> dict[W.Gauge, int]:
        """The machine's gauges, recounted."""
        trees = [*self.vms, *self.mirrors.values()]
        leaves = [key[0] for tree in trees for key in tree.leaves]
        large = [key[0] for space in self.spaces for key in space.huge]
        folios = list(self.memory.in_use.values())
        cached = [folio for folio in folios if folio.cached]
        lazy = self.parameters.merge == "lazy"
        return {
            W.Gauge.FRAMES_USED: self.memory.frames.used,
            W.Gauge.HOST_TABLES: sum(space.table_pages for space in self.spaces if space.live),
            W.Gauge.STAGE2_TABLES: sum(tree.table_pages for tree in trees),
            W.Gauge.KERNEL_TABLES: self.memory.kernel_tables,
            W.Gauge.XARRAY_NODES: self.memory.nodes,
            W.Gauge.VMEMMAP_PAGES: self.memory.vmemmap_pages,
            W.Gauge.CONTENT_FRAMES: len(self.memory.contents),
            W.Gauge.HOST_LEAVES_4K: sum(len(space.entries) for space in self.spaces),
            W.Gauge.HOST_LEAVES_2M: large.count(2),
            W.Gauge.HOST_LEAVES_1G: large.count(3),
            W.Gauge.STAGE2_LEAVES_4K: leaves.count(1),
            W.Gauge.STAGE2_LEAVES_2M: leaves.count(2),
            W.Gauge.STAGE2_LEAVES_1G: leaves.count(3),
            W.Gauge.POOL_FREE: self.memory.count_free,
            W.Gauge.BLOCKS_HUGE: sum(folio.whole for folio in cached),
            W.Gauge.BLOCKS_SPLIT: sum(folio.split for folio in cached),
            W.Gauge.BLOCKS_PARTLY: sum(folio.pieces is not None for folio in cached),
            W.Gauge.BLOCKS_ZOMBIE: len(folios) - len(cached),
            W.Gauge.PAGES_PINNED: sum(len(frames) for frames in (*self.pins.values(), *self.device_pins.values()))
            + sum(mapped.held == "pin" for mapped in self.mapped.values()),
            W.Gauge.PAGES_LRU_CACHED: len(self.memory.batch),
            W.Gauge.SPINNING: len(self.spins),
            W.Gauge.WORK_PENDING: sum((folio.waits and lazy) or folio.ready for folio in folios),
        }
