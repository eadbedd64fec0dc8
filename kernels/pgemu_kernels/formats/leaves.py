"""The entries that Linux writes, by what they map: of a process, and of KVM's stage 2.

Each is built the way the kernel builds it, from the same small steps under the same names, so that differences
between versions stand in formats.KernelParameters alone. `pfn` is a frame number; 0 gives the bits without a frame.
Plain Python: no numba here.
"""

from __future__ import annotations

from dataclasses import dataclass

from pgemu_kernels.formats import bits
from pgemu_kernels.formats.page_format import X86_MEMORY_TYPES, PageFormat, span

PAGE_NONE = bits.PROTECTION_NONE | bits.ACCESSED
SWAP_PTE_MARKER = 31  # the last swap type: include/linux/swap.h:SWP_PTE_MARKER
MARKER_UFFD_WP = 1 << 0
MARKER_POISONED = 1 << 1
MARKER_GUARD = 1 << 2
_SWAP_OFFSET = 9, 58  # first and last bit
# What mprotect keeps beside the frame: asm/pgtable_types.h:_PAGE_CHG_MASK. Bit 7 is PAT, or says that a leaf is large.
_KEPT = (
    bits.LARGE | bits.CACHE_DISABLE | bits.WRITE_THROUGH | bits.SPECIAL | bits.ACCESSED | bits.DIRTY
    | bits.SAVED_DIRTY | bits.SOFT_DIRTY | bits.UFFD_WP
)  # fmt: skip


def inverted(entry: int) -> bool:
    """Whether an entry's frame bits are inverted: asm/pgtable-invert.h:__pte_needs_invert()."""
    return bool(entry) and not entry & bits.PRESENT


def swap_entry(
    kind: int, offset: int, *, exclusive: bool = False, uffd_wp: bool = False, soft_dirty: bool = False
) -> int:
    """An entry that is not present and names a swap type and offset: asm/pgtable_64.h:__swp_entry().

    ValueError for a type above 31 or an offset above 2^50 - 1.
    """
    low, high = _SWAP_OFFSET
    if not 0 <= kind < 32 or not 0 <= offset <= span(low, high) >> low:
        raise ValueError(f"swap type {kind}, offset {offset}: expected at most 31 and 2^50 - 1")
    marks = (1 << 3 if exclusive else 0) | (1 << 2 if uffd_wp else 0) | (1 << 1 if soft_dirty else 0)
    return kind << 59 | ~(offset << low) & span(low, high) | marks


@dataclass(frozen=True)
class ProcessLeaves:
    """Leaves of a process and of the kernel's vmemmap, as `kernel` ("6.1" to "7.3") writes them on x86-64.

    soft_dirty: CONFIG_MEM_SOFT_DIRTY. pti: page-table isolation; leaves of the kernel are not global then.
    KeyError for a kernel that is not in formats.RELEASES.
    """

    kernel: str = "7.3"
    soft_dirty: bool = True
    pti: bool = False

    def __post_init__(self) -> None:
        _ = bits.RELEASES[self.kernel]

    # ----------------------------------------------------------------- steps, as asm/pgtable.h names them

    def protection(self, *, write: bool, execute: bool = False, shared: bool = False) -> int:
        """vm_page_prot of a VMA that can be read: only shared memory is writable from the start."""
        prot = bits.PRESENT | bits.USER | bits.ACCESSED | (0 if execute else bits.NO_EXECUTE)
        return prot | (bits.WRITE if write and shared else 0)

    def mksaveddirty(self, entry: int) -> int:
        """Dirty of a read-only entry goes to bit 58: write=0 with dirty=1 would be a shadow stack."""
        if not bits.RELEASES[self.kernel].saved_dirty or entry & bits.WRITE or not entry & bits.DIRTY:
            return entry
        return entry & ~bits.DIRTY | bits.SAVED_DIRTY

    def clear_saveddirty(self, entry: int) -> int:
        """... and back, in a writable one."""
        if not entry & bits.WRITE or not entry & bits.SAVED_DIRTY:
            return entry
        return entry & ~bits.SAVED_DIRTY | bits.DIRTY

    def mkdirty(self, entry: int) -> int:
        return self.mksaveddirty(entry | bits.DIRTY | (bits.SOFT_DIRTY if self.soft_dirty else 0))

    def mkwrite(self, entry: int) -> int:
        return self.clear_saveddirty(entry | bits.WRITE)

    def mkold(self, entry: int) -> int:
        return entry & ~bits.ACCESSED

    def wrprotect(self, entry: int) -> int:
        """What fork leaves with the parent."""
        return self.mksaveddirty(entry & ~bits.WRITE)

    def fork_child(self, entry: int) -> int:
        """What fork gives the child, of private memory: mm/memory.c:__copy_present_ptes()."""
        return self.mkold(self.wrprotect(entry))

    def modify(self, entry: int, prot: int, *, thp: bool = False) -> int:
        """mprotect: pte_modify(), which HugeTLB uses for every size, too. `prot` is a protection() or PAGE_NONE.

        thp: pmd_modify(), of a transparent huge page. It inverts frame bits from 21 up only, where pte_modify()
        inverts all, so that a HugeTLB page that is protection-none has bits 12 to 20 set (captured).
        """
        frame = bits.ADDRESS & -(1 << 21) if thp else bits.ADDRESS
        kept = frame | _KEPT | (bits.PAT_LARGE if thp else 0)
        lost = bits.DIRTY if thp and bits.RELEASES[self.kernel].thp_modify_drops_dirty else 0
        changed = entry & kept & ~lost | prot & ~kept
        if inverted(entry) != inverted(changed):
            changed ^= frame
        return self.mksaveddirty(changed) if entry & bits.WRITE else self.clear_saveddirty(changed)

    def split_thp(self, entry: int) -> int:
        """The first of the 512 entries that a transparent huge page is split into: __split_huge_pmd_locked()."""
        pat = bits.PAT_4K if entry & bits.PAT_LARGE else 0
        lost = bits.DIRTY if bits.RELEASES[self.kernel].thp_split_drops_dirty else 0
        return entry & ~(bits.LARGE | bits.PAT_LARGE | lost) | pat

    def moved(self, entry: int) -> int:
        """A page that mremap moved: mm/mremap.c:move_soft_dirty_pte()."""
        return entry | (bits.SOFT_DIRTY if self.soft_dirty else 0)

    def make_accessible(self, entry: int, *, execute: bool = False) -> int:
        """mprotect to read-write of a private page of its own: no fault is needed (can_change_pte_writable())."""
        return self.mkwrite(self.modify(entry, self.protection(write=True, execute=execute)))

    # ----------------------------------------------------------------- what a fault or mmap writes

    def anonymous(self, pfn: int = 0, *, level: int = 1, write: bool = True, execute: bool = False) -> int:
        """A page or transparent huge page (level 2) of private memory: mm/memory.c:do_anonymous_page()."""
        entry = self._frame(pfn) | self.protection(write=write, execute=execute) | _large(level)
        return self.mkwrite(self.mkdirty(entry)) if write else entry

    def zero_page(self, pfn: int = 0, *, execute: bool = False) -> int:
        """A page that was only read, of private memory."""
        return self._frame(pfn) | self.protection(write=False, execute=execute) | bits.SPECIAL

    def huge_zero_page(self, pfn: int = 0) -> int:
        """The same of 2M: mm/huge_memory.c:set_huge_zero_folio()."""
        special = bits.SPECIAL if bits.RELEASES[self.kernel].special_huge_zero else 0
        return self._frame(pfn) | self.protection(write=False) | bits.LARGE | special

    def file_page(
        self,
        pfn: int = 0,
        *,
        write_fault: bool,
        folio_dirty: bool = False,
        write: bool = True,
        shared: bool = True,
        execute: bool = False,
    ) -> int:
        """A page-cache page, also of guest_memfd: mm/memory.c:set_pte_range(). write, shared: of the VMA."""
        entry = self._frame(pfn) | self.protection(write=write, execute=execute, shared=shared)
        if write_fault:
            return self.mkwrite(self.mkdirty(entry))
        return self.mkdirty(entry) if folio_dirty and entry & bits.WRITE else entry

    def guest_memfd_page(self, pfn: int = 0) -> int:
        """A page of guest_memfd in a shared writable VMA, written, or read when its folio is dirty already."""
        return self.file_page(pfn, write_fault=False, folio_dirty=True)

    def hugetlb(self, level: int, pfn: int = 0, *, shared: bool, write: bool = True, write_fault: bool = False) -> int:
        """A HugeTLB page: mm/hugetlb.c:make_huge_pte(). write: of the VMA.

        A shared page is writable and dirty from its first read on. A private one that is written keeps bit 58:
        huge_pte_mkwrite() does not clear it, and hardware sets the dirty bit with the write that follows.
        """
        entry = self._frame(pfn) | self.protection(write=write, shared=shared) | _large(level)
        if write and (shared or write_fault):
            return self.mkdirty(entry) | bits.WRITE
        return entry

    def special_pfn(
        self, level: int = 1, pfn: int = 0, *, write: bool = True, make_write: bool = False, cache: str = "WB"
    ) -> int:
        """vmf_insert_pfn(), _pmd() and _pud() into a shared VMA, and remap_pfn_range().

        write: of the VMA. make_write: the `write` argument of _pmd() and _pud(). cache: memory type, "WB" for RAM,
        "UC-" for a PCI BAR and /dev/mem outside RAM, "WC", "UC", "WP" or "WT" if the driver asked for it
        (arch/x86/mm/pat/memtype.c:pfnmap_setup_cachemode()). ValueError for another name.
        """
        cached = memory_type(cache, level)
        entry = self._frame(pfn) | self.protection(write=write, shared=True) | _large(level) | bits.SPECIAL | cached
        return self.mkwrite(self.mkdirty(entry)) if make_write else entry

    def bar(self, level: int = 1, pfn: int = 0, *, written: bool = False) -> int:
        """A PCI BAR mapped by VFIO, before or after the first write: hardware sets dirty, Linux nothing."""
        return self.special_pfn(level, pfn, cache="UC-") | (bits.DIRTY if written else 0)

    def protection_none(self, entry: int, *, thp: bool = False) -> int:
        """What mprotect(PROT_NONE) makes of a present entry: its frame bits inverted."""
        return self.modify(entry, PAGE_NONE, thp=thp)

    def marker(self, marks: int) -> int:
        """An entry that is not present and only remembers `marks` (MARKER_*): include/linux/swapops.h."""
        return swap_entry(SWAP_PTE_MARKER, marks)

    def guard(self) -> int:
        """MADV_GUARD_INSTALL. ValueError for a kernel without it."""
        if not bits.RELEASES[self.kernel].guards:
            raise ValueError(f"Linux {self.kernel} has no guard pages: they came with 6.13")
        return self.marker(MARKER_GUARD)

    # ----------------------------------------------------------------- the kernel's vmemmap

    def vmemmap(self, pfn: int = 0, *, level: int = 1, write: bool = True, boot: bool = False) -> int:
        """PAGE_KERNEL, at level 2 PAGE_KERNEL_LARGE, or a tail of an optimised folio (`write` False).

        boot: the folio was set up by the boot allocator.
        """
        parameters = bits.RELEASES[self.kernel]
        entry = self._frame(pfn) | (bits.VMEMMAP_LARGE if level == 2 else bits.VMEMMAP_PAGE)
        if self.pti:
            entry &= ~bits.GLOBAL
        if write:
            return entry
        # PAGE_KERNEL_RO lost its dirty bit together with the saved one's introduction.
        entry &= ~bits.WRITE & ~(bits.DIRTY if parameters.saved_dirty else 0)
        return entry | (bits.SAVED_DIRTY if boot and parameters.boot_marks else 0)

    def _frame(self, pfn: int) -> int:
        address = pfn << 12
        if address & ~bits.ADDRESS:
            raise ValueError(f"frame {pfn:#x}: expected at most 40 bits")
        return address


def memory_type(name: str, level: int) -> int:
    """PWT, PCD and PAT of a memory type in a leaf of `level`. ValueError for a name that Linux's PAT does not have."""
    for known, by_level in X86_MEMORY_TYPES:
        if known == name:
            return by_level[level - 1]
    known_names = ", ".join(dict.fromkeys(known for known, _ in X86_MEMORY_TYPES))
    raise ValueError(f"memory type {name!r}: expected one of {known_names}")


def _large(level: int) -> int:
    return bits.LARGE if level > 1 else 0


# --------------------------------------------------------------------------- KVM


def stage2_leaf(
    fmt: PageFormat,
    level: int,
    address: int = 0,
    *,
    write: bool = True,
    host_writable: bool | None = None,
    mmu_writable: bool | None = None,
    execute: bool = True,
    prefetched: bool = False,
    memory_type: str = "WB",
) -> int:
    """A leaf as arch/x86/kvm/mmu/spte.c:make_spte(), or stage2_set_prot_attr() of Arm, writes it.

    host_writable, mmu_writable: KVM's marks, as `write` unless given. prefetched: not yet used, made by
    KVM_PRE_FAULT_MEMORY. Huge pages are not executable under fmt.nx_huge_pages. ValueError as PageFormat.encode().
    """
    execute = execute and not (level > 1 and fmt.nx_huge_pages)
    marks = (fmt.host_writable if (write if host_writable is None else host_writable) else 0) | (
        fmt.mmu_writable if (write if mmu_writable is None else mmu_writable) else 0
    )
    entry = fmt.encode(
        level,
        address,
        write=write,
        execute=execute,
        accessed=not prefetched or fmt.break_before_make,  # Arm's KVM always sets the access flag
        memory_type=memory_type,
        extra=fmt.kvm_leaf | marks | (fmt.kvm_execute if execute else 0),
    )
    return access_tracked(fmt, entry) if prefetched and fmt.saved_rights else entry


def read_only(fmt: PageFormat, level: int, address: int = 0, *, execute: bool = True) -> int:
    """A leaf of memory that the host has read-only: the zero page, a read-only slot or VMA, after fork."""
    return stage2_leaf(fmt, level, address, write=False, execute=execute)


def write_protected(fmt: PageFormat, entry: int) -> int:
    """A leaf under dirty logging: KVM's marks stay, so that the next write needs nothing of the host."""
    return entry & ~fmt.write


def access_tracked(fmt: PageFormat, entry: int) -> int:
    """spte.c:mark_spte_for_access_track() without accessed bits: R and X are kept above, the entry is not present."""
    return (entry | (entry & 0b101) << fmt.saved_rights) & ~bits.EPT_RWX


def mmio(fmt: PageFormat, gfn: int, generation: int, *, write: bool = True, user: bool = True) -> int:
    """A cached MMIO access to guest frame `gfn`: spte.c:make_mmio_spte().

    generation: of the memslots, 19 bits of it. write, user: rights that AMD's entry keeps; EPT's keeps none.
    ValueError where KVM caches none (52 address bits on AMD).
    """
    if not fmt.mmio_value:
        raise ValueError(f"{fmt.name} with {fmt.maxphyaddr} address bits: KVM caches no MMIO accesses")
    address = gfn << 12
    rights = fmt.mmio_rights & ((bits.WRITE if write else 0) | (bits.USER if user else 0))
    kept = (generation & 0xFF) << 3 | (generation >> 8 & 0x7FF) << 52
    return fmt.mmio_value | rights | kept | address | fmt.mmio_moved | (address & fmt.mmio_moved) << 5


def mmio_gfn(fmt: PageFormat, entry: int) -> int:
    """Guest frame of a cached MMIO access: arch/x86/kvm/mmu/mmu.c:get_mmio_spte_gfn()."""
    lowest = fmt.mmio_moved & -fmt.mmio_moved or 1 << fmt.maxphyaddr
    return (entry & (lowest - 1) & bits.ADDRESS | entry >> 5 & fmt.mmio_moved) >> 12


def mmio_generation(entry: int) -> int:
    """Memslots generation, 19 bits, of a cached MMIO access."""
    return entry >> 3 & 0xFF | (entry >> 52 & 0x7FF) << 8
