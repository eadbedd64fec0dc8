"""What all parts of the model share: its objects, and how host entries and stage-2 leaves go."""

from __future__ import annotations

from collections import Counter
from typing import Any

from model.folio import Folio
from model.inode import Inode, Window
from model.memory import Boot, Memory
from model.parameters import Parameters
from model.tables import HostTables, Stage2, Table, common

TASK_PAGES = (1 << 35) - 1  # TASK_SIZE_MAX: the last page below 2^47 is nobody's


class State:
    """Processes, VMs and inodes are numbered in order of creation; a process that ended leaves its number."""

    def __init__(self, parameters: Parameters, boot: Boot | None = None) -> None:
        self.parameters = parameters
        self.restructure = parameters.restructure
        self.order = parameters.page_order
        self.block_pages = 1 << self.order
        self.reclaims_tables = parameters.kernel != "6.12"  # CONFIG_PT_RECLAIM came with 6.14
        self.memory = Memory(parameters, boot)
        self.inodes: list[Inode] = []
        self.spaces: list[HostTables] = []
        self.vms: list[Stage2] = []
        self.vm_space: list[int] = []
        self.mirrors: dict[int, Stage2] = {}  # of private memory, by VM: of those that have a root of its own for it
        self.kinds: list[str] = []
        self.vmas: list[Window] = []
        self.slots: list[Window] = []
        self.pins: dict[int, list[tuple[Folio, int]]] = {}
        self.device_pins: dict[int, list[tuple[Folio, int]]] = {}  # by area
        self.mapped: dict[int, Any] = {}  # pages that KVM itself maps, by number
        self.slot_changes: Counter[int] = Counter()  # by VM
        self.task_policy = (0, 0)  # mode, nodes
        self.spins: list[Any] = []  # conversions that would spin, in the order in which they began

    def block_of(self, index: int) -> range:
        """Pages of the huge page around a page."""
        start = index & ~(self.block_pages - 1)
        return range(start, start + self.block_pages)

    def blocks_of(self, pages: range) -> range:
        """Numbers of the huge pages that a range touches."""
        return range(pages.start >> self.order, (pages.stop - 1 >> self.order) + 1)

    def rounded(self, pages: range, node: Inode, size: int | None = None) -> range:
        """A range rounded out to huge pages, or to `size` pages."""
        size = size or self.block_pages
        return range(pages.start // size * size, min(-(-pages.stop // size) * size, node.pages))

    def is_special(self, vma: Window) -> bool:
        """Whether a VMA is VM_PFNMAP: its entries hold no reference and count nowhere."""
        return not self.restructure and not vma.counted

    def pfn(self, inode: int, index: int) -> int | None:
        """Frame of a page, or None while nothing is allocated."""
        folio = self.inodes[inode].blocks.get(index >> self.order)
        return folio.head + index % self.block_pages if folio else None

    # ------------------------------------------------------------------ VMs

    def trees(self, vm: int, kinds: str = "both") -> list[Stage2]:
        """Where a VM maps memory of some kind: "shared", "private" or "both". With one root the kind says nothing."""
        if vm not in self.mirrors:
            return [self.vms[vm]]
        return [self.vms[vm]] * (kinds != "private") + [self.mirrors[vm]] * (kinds != "shared")

    def tree_of(self, vm: int, private: bool) -> Stage2:
        return self.trees(vm, "private" if private else "shared")[0]

    def tree_at(self, vm: int, gfn: int) -> Stage2:
        """Where a guest frame of a slot is mapped, if it is."""
        slot = next((s for s in self.slots if s.owner == vm and gfn in s.pages and not s.released), None)
        return self.tree_of(vm, slot is not None and slot.file_page(gfn) not in self.inodes[slot.inode].shared)

    def split_private(self, inode: int, pages: range) -> bool:
        """kvm_gmem_split_private(): what firmware owns cannot be dropped in part. False without memory."""
        for vm, mirror in sorted(self.mirrors.items()):
            for slot in reversed([s for s in self.slots if s.owner == vm]):
                part = slot.showing(inode, pages)
                if part and not (mirror.split_boundary(part.start) and mirror.split_boundary(part.stop)):
                    return False
        return True

    # ------------------------------------------------------------------ unmapping

    def clear_entries(self, vma: Window, pages: range, truncates: bool = False) -> None:
        """Unmap part of a VMA: KVM's MMU notifier first, then the entries with what they hold. Those of bad pages stay
        where a file `truncates`.

        A large entry goes whole: __split_huge_pmd() tells the notifier about all of it.
        """
        host = self.spaces[vma.owner]
        spans = [Table(level - 1, number).span for level, number in host.huge_over(pages)]
        for span in [pages, *spans]:
            self.notify(vma, span)
        if not truncates:
            host.poisoned.difference_update(pages)
        for entry in host.unmap(pages):
            if not entry.special:
                folio = self.memory.folio_of(entry.pfn)
                assert folio is not None, "an entry outlived its folio"
                folio.mapped[folio.unit(entry.pfn)] -= 1
                self.memory.dropped(folio)

    def notify(self, vma: Window, pages: range) -> None:
        """The VMs of the VMA's process drop what their slots show at these addresses, whatever the VMA shows there; not
        what is private by its root."""
        if not self.parameters.notifier:
            return
        for mapped in self.mapped.values():
            if mapped.cache and self.vm_space[mapped.vm] == vma.owner and mapped.place in pages:
                mapped.valid = False
        for slot in self.slots:
            if self.vm_space[slot.owner] == vma.owner and slot.place is not None:
                part = common(range(slot.place, slot.place + len(slot.pages)), pages)
                shift = slot.pages.start - slot.place
                self.vms[slot.owner].zap(range(part.start + shift, part.stop + shift))

    def place_of(self, slot: Window, vmas: list[Window]) -> int | None:
        """Where the VM's process shows what a slot shows: the lowest address for its first page."""
        mine = [v for v in vmas if v.owner == self.vm_space[slot.owner] and slot.showing(v.inode, v.file)]
        places = [v.pages.start + slot.pgoff - v.pgoff for v in mine]
        return min((place for place in places if 0 <= place < TASK_PAGES), default=None)

    def unmap_file(self, inode: int, pages: range) -> None:
        """unmap_mapping_pages()."""
        for vma in self.vmas:
            part = vma.showing(inode, pages)
            if part:
                self.clear_entries(vma, part, truncates=True)

    def zap_file(self, inode: int, pages: range, kinds: str = "both") -> None:
        """Drop the stage-2 leaves over pages of an inode, in every VM that has them bound."""
        for slot in self.slots:
            part = slot.showing(inode, pages)
            if part:
                for tree in self.trees(slot.owner, kinds):
                    tree.zap(part)

    def remove_vmas(self, gone: list[tuple[Window, range]]) -> None:
        """Drop parts of VMAs: entries, VMAs, then the tables that no VMA needs."""
        for vma, part in gone:
            self.clear_entries(vma, part)
            self.vmas.remove(vma)
            rest = (range(vma.pages.start, part.start), range(part.stop, vma.pages.stop))
            self.vmas += [vma.cut(pages) for pages in rest if pages]
        for space in {vma.owner for vma, _ in gone}:
            self.spaces[space].free_tables_outside([v.pages for v in self.vmas if v.owner == space])
        for slot in self.slots:
            if slot.closed and not self.is_mapped(slot):
                self.release_slot(slot)

    def is_mapped(self, slot: Window) -> bool:
        """Whether the process of a slot's VM holds the slot's file by a mapping."""
        return any(v.owner == self.vm_space[slot.owner] and v.inode == slot.inode for v in self.vmas)

    def release_slot(self, slot: Window) -> None:
        """kvm_gmem_release(): the slot has no memory any more."""
        for tree in self.trees(slot.owner):
            tree.zap(slot.pages)
        slot.released, slot.closed, slot.place = True, False, None

    def delete_slot(self, slot: Window) -> None:
        """A VM with private memory loses the slot's leaves, another one its whole tree."""
        if self.kinds[slot.owner] != "plain":
            for tree in self.trees(slot.owner):
                tree.zap(slot.pages)
        else:
            self.vms[slot.owner].drop_all()
        self.slots.remove(slot)
        self.slot_changes[slot.owner] += 1
