"""Folios, read from anything that holds physical memory: a machine, an image of a kernel.

>>> from pgemu import Config, Machine
>>> machine = Machine(Config(pool=1 << 30, page_size=2 << 20, kernel="6.18"))
>>> folio = machine.folio((1 << 20) + 70)  # a tail gives its folio
>>> folio.pfn == 1 << 20, folio.order, folio.refcount, folio.type, folio.optimized
(True, 9, 0, 'hugetlb', True)
>>> folio.hugetlb.flags
('freed', 'vmemmap_optimized')
>>> [(page.frame == folio.vmemmap[0].frame, page.writable) for page in folio.vmemmap[:2]]
[(True, True), (True, False)]

A Folio is a reader: every property looks into memory anew. Layouts are data (pgemu_kernels.formats.struct_page). No
compiler is involved except by the operations of a machine's folios.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pgemu.images.folio_operations import FolioOperations
from pgemu.images.folio_problems import FolioProblem, check_order, folio_problem
from pgemu.images.struct_page import (
    VMEMMAP_SIZE,
    Mapping,
    Page,
    Value,
    decode_page,
    flags_of,
    head_of,
    hugetlb_flags,
    second_order,
    signed,
    type_of,
)
from pgemu.images.vmemmap import VmemmapPage, vmemmap_pages
from pgemu.machine.arrays import U64
from pgemu.tables.walk import Kind, Memory, Step, leaf_address, walk
from pgemu_kernels.formats.page_format import PageFormat, x86_64
from pgemu_kernels.formats.struct_page import (
    GUP_PIN_COUNTING_BIAS,
    MAPPING_ANON,
    STRUCT_PAGE,
    VMEMMAP,
    PageLayout,
    page_layout,
)
from pgemu_kernels.words.operations import PAGE_4K, Operation

if TYPE_CHECKING:
    from pgemu.machine.core import Core
    from pgemu.machine.results import Result

__all__ = ("Folio", "FolioProblem", "Hugetlb", "Mapping", "MmIds", "Page", "Value", "VmemmapPage", "decode_page")

_HUGETLB_DTOR = 2  # 6.1: HUGETLB_PAGE_DTOR
_MM_ID_BITS = 31  # mm_types.h: MM_ID_BITS; bit 31 of the first ID is a lock, of the second "mapped shared"


class Hugetlb(NamedTuple):
    """What a HugeTLB folio has of its own: names of its flags, and pointers (0: none).

    hwpoison: the first raw_hwp_page, see Folio.poisoned_pages.
    """

    flags: tuple[str, ...]
    subpool: int
    cgroup: int
    cgroup_rsvd: int
    hwpoison: int


class MmIds(NamedTuple):
    """MM owner tracking of a large folio, 6.15 and later: mm_types.h. An ID of 0 is none; mapcounts as counts."""

    ids: tuple[int, int]
    mapcounts: tuple[int, int]
    locked: bool
    shared: bool


def _struct_page_address(memory: Memory, fmt: PageFormat, root: int, vmemmap: int, pfn: int) -> int:
    """Physical address of a PFN's struct page. ValueError where it is not mapped."""
    address = vmemmap + STRUCT_PAGE * pfn
    steps = walk(memory, fmt, root, address) if 0 <= pfn < VMEMMAP_SIZE // STRUCT_PAGE else []
    if not steps or steps[-1].kind is not Kind.LEAF:
        why = "not in memory" if steps and steps[-1].kind is Kind.UNREADABLE else "not mapped"
        raise ValueError(f"PFN {pfn:#x}: its struct page at {address:#x} is {why}")
    return leaf_address(fmt, steps[-1].level, steps[-1].entry, address)


def struct_page(core: Core, pfn: int) -> U64:
    """See Machine.struct_page."""
    from pgemu_kernels import words as W

    core.guest_frame(pfn)
    root, vmemmap = core.register(W.R_KERNEL_ROOT), core.register(W.R_VMEMMAP)
    return core.words(_struct_page_address(core, core.host_format, root, vmemmap, pfn), 8).copy()


class Folio(FolioOperations):
    """The folio that holds a PFN, read through the kernel's page table. Made by Machine.folio(), or directly.

    memory: an Image, a Machine, or anything with their words(), load() and holds(). layout: page_layout(). root:
    physical address of the kernel's top table, fmt: its format. vmemmap: address of the struct page of PFN 0.

    pfn: PFN of the head. given: the PFN asked for. fake: its struct page shows a head that is another one's: what
    page_fixed_fake_head() sees through before 7.1. Other attributes are read when asked for, so they follow what
    happens to the machine; `pfn` stays. ValueError, now or then, where a struct page is not mapped or not in memory.

    >>> machine = Machine(Config("restructure", pool=4 << 20, page_size=2 << 20))
    >>> pfn = machine.hugetlb().allocate().detail
    >>> folio = machine.folio(pfn)
    >>> folio.order, folio.refcount, folio.optimized
    (9, 1, True)
    """

    memory: Memory
    layout: PageLayout
    root: int
    format: PageFormat
    vmemmap_base: int
    machine: Core | None
    given: int
    pfn: int
    fake: bool

    def __init__(
        self, memory: Memory, pfn: int, layout: PageLayout, root: int, *, fmt: PageFormat | None = None,
        vmemmap: int = VMEMMAP, machine: Core | None = None,
    ) -> None:  # fmt: skip
        self.memory, self.layout, self.root = memory, layout, root
        self.format = x86_64() if fmt is None else fmt
        self.vmemmap_base = vmemmap
        self.machine = machine
        self.given = pfn
        self.pfn, self.fake = self._find_head(pfn)
        self._order = self.order or (machine.config.page_order if machine is not None else 0)

    def __repr__(self) -> str:
        return f"Folio(pfn={self.pfn:#x}, order={self.order}, refcount={self.refcount}, type={self.type!r})"

    @classmethod
    def of_machine(cls, machine: Core, pfn: int) -> Folio:
        """See Machine.folio.

        >>> Folio.of_machine(machine, pfn + 5).index
        0
        """
        from pgemu_kernels import words as W

        layout = page_layout(machine.config.kernel, machine.config.configuration)
        root, vmemmap = machine.register(W.R_KERNEL_ROOT), machine.register(W.R_VMEMMAP)
        return cls(machine.memory, pfn, layout, root, fmt=machine.host_format, vmemmap=vmemmap, machine=machine)

    def _operate(self, op: Operation, length: int, flags: int = 0) -> Result:
        if self.machine is None:
            raise ValueError("a folio of an image: expected one of a machine")
        return self.machine.operate(op, address=self.pfn << 12, length=length, flags=flags)

    # ------------------------------------------------------------------ words

    def _walk(self, address: int) -> list[Step]:
        return walk(self.memory, self.format, self.root, address)

    def physical(self, index: int = 0) -> int:
        """Physical address of the folio's struct page `index`. ValueError where it is not mapped.

        >>> hex(folio.physical(1) - folio.physical(0))
        '0x40'
        """
        return self._physical(self.pfn + index)

    def _physical(self, pfn: int) -> int:
        return _struct_page_address(self.memory, self.format, self.root, self.vmemmap_base, pfn)

    def words(self, index: int = 0) -> tuple[int, ...]:
        """The eight words that the folio's struct page `index` shows.

        >>> len(folio.words(0))
        8
        """
        return self._words(self.pfn + index)

    def _words(self, pfn: int) -> tuple[int, ...]:
        physical = self._physical(pfn)
        try:
            return tuple(self.memory.words(physical, 8).tolist())
        except ValueError:
            raise ValueError(f"PFN {pfn:#x}: its struct page at physical {physical:#x} is not in memory") from None

    def shown(self, index: int) -> int:
        """Which of its struct pages the folio shows at `index`: optimised before 7.1, one of the first 64.

        >>> folio.shown(5), folio.shown(500)
        (5, 500)
        """
        offset = self.physical(index) - self.physical()
        return offset // STRUCT_PAGE if 0 <= offset < PAGE_4K else index

    def page(self, index: int = 0) -> Page:
        """Struct page `index` of the folio, decoded: as the one that it shows, where that is one of the first 64.

        >>> folio.page()
        Page(pfn=0x100000, 'head', refcount=1, type='hugetlb')
        >>> folio.page(1)
        Page(pfn=0x100001, 'tail', order=9, refcount=0, type=None)
        """
        return decode_page(
            self.words(index), self.pfn + index, self.layout, vmemmap=self.vmemmap_base, folio_type=self.type,
            index=self.shown(index),
        )  # fmt: skip

    @property
    def given_page(self) -> Page:
        """The struct page of `given`, decoded: as of its folio, or where that cannot be, by its own words."""
        if self.problem is None:
            return self.page(self.given - self.pfn)
        return decode_page(self._words(self.given), self.given, self.layout, vmemmap=self.vmemmap_base)

    @property
    def given_physical(self) -> int:
        """Physical address of the struct page of `given`."""
        return self._physical(self.given)

    def _find_head(self, pfn: int) -> tuple[int, bool]:
        """PFN of the head, and whether the page shows a head that is not its own: page-flags.h:_compound_head()."""
        words = self._words(pfn)
        if words[1] & 1:
            head = head_of(words[1], pfn, self.vmemmap_base)
            if head is None:
                raise ValueError(f"PFN {pfn:#x}: a tail whose word {words[1]:#x} leads to no struct page")
            return head, False
        # Only the first struct page of a vmemmap page can be another's head; the one after it tells.
        if words[0] & self.layout.head and (self.vmemmap_base + STRUCT_PAGE * pfn) % PAGE_4K == 0:
            info = self._words(pfn + 1)[1]
            head = head_of(info, pfn + 1, self.vmemmap_base) if info & 1 else None
            if head is not None and head != pfn:
                return head, True
        return pfn, False

    def _field(self, name: str) -> int | None:
        """A field of a large folio by name, as it is stored; None for a small one, or where there is no such field."""
        field = self.layout.field(name)
        if field is None or not self.large:
            return None
        index = field.offset // STRUCT_PAGE
        return field.value(self.words(index), index * STRUCT_PAGE)

    def _count(self, name: str, less_one: bool = False) -> int | None:
        value = self._field(name)
        return None if value is None else signed(value) + less_one

    # ------------------------------------------------------------------ what every folio has

    @property
    def large(self) -> bool:
        """Whether it has more than one page."""
        return self.words()[0] & self.layout.head != 0

    @property
    def order(self) -> int:
        """0 for a page of 4K, 9 for 2M, 18 for 1G; of a damaged one anything up to 255, see `problem`."""
        return second_order(self.layout, self.words(1)) if self.large else 0

    @property
    def problem(self) -> FolioProblem | None:
        """Why it cannot be a folio of `given`, as of garbage; None where it can."""
        return folio_problem(self.given, self.pfn, self.large, self.order)

    @property
    def nr_pages(self) -> int:
        """Pages, as the folio's own field says."""
        pages = self._field("_nr_pages")
        pages = self._field("_folio_nr_pages") if pages is None else pages
        return 1 if pages is None else pages

    @property
    def flags(self) -> tuple[str, ...]:
        """Names of the head's flags and of those that the second struct page keeps for the folio."""
        return flags_of(self.layout, self.words()[0], False)[0] + self._second_flags

    @property
    def _second_flags(self) -> tuple[str, ...]:
        """Names of the flags that the second struct page keeps for the folio."""
        second = self.words(1)[0] if self.large else 0
        return tuple(bits.name for bits in self.layout.second_flags if second & bits.mask)

    @property
    def type(self) -> str | None:
        """Page type: "hugetlb", "slab", ...; None for what processes map and the page cache holds."""
        words = self.words()
        if not self.layout.types_cleared or not words[0] & self.layout.head:
            return type_of(self.layout, words[6] & 0xFFFF_FFFF, words[0])
        if self._field("_folio_dtor") == _HUGETLB_DTOR or "hugetlb" in self._second_flags:
            return "hugetlb"
        return type_of(self.layout, words[6] & 0xFFFF_FFFF, words[0])

    @property
    def refcount(self) -> int:
        """References, signed as the kernel's."""
        return signed(self.words()[6] >> 32)

    @property
    def mapcount(self) -> int:
        """Page-table entries that map any part of it: mm.h:folio_mapcount(). 0 for a type that is never mapped.

        6.1 to 6.8: its entire mappings; those of single pages of a transparent huge page are not added up.
        """
        for name in ("_large_mapcount", "_total_mapcount", "_entire_mapcount"):
            count = self._count(name, less_one=True)
            if count is not None:
                return count
        return self.page().mapcount or 0

    @property
    def large_mapcount(self) -> int | None:
        """Mappings of any part; None of a small folio, and on 6.1."""
        return self._count("_large_mapcount", less_one=True)

    @property
    def entire_mapcount(self) -> int | None:
        """Mappings of the whole by one entry; None of a small folio."""
        count = self._count("_entire_mapcount", less_one=True)
        return self._count("_total_mapcount", less_one=True) if count is None else count

    @property
    def pincount(self) -> int | None:
        """Pins; None of a small folio, whose pins are in its references."""
        return self._count("_pincount")

    @property
    def mm_ids(self) -> MmIds | None:
        """MM owner tracking; None of a small folio and before 6.15."""
        ids = [self._field(f"_mm_id[{i}]") for i in (0, 1)]
        counts = [self._count(f"_mm_id_mapcount[{i}]", less_one=True) for i in (0, 1)]
        if ids[0] is None or ids[1] is None or counts[0] is None or counts[1] is None:
            return None
        mask = (1 << _MM_ID_BITS) - 1
        return MmIds(
            (ids[0] & mask, ids[1] & mask), (counts[0], counts[1]), ids[0] > mask, ids[1] > mask
        )  # fmt: skip

    @property
    def mapping(self) -> Mapping | None:
        """What owns it: an address_space, an anon_vma, nothing."""
        return self.page().mapping

    @property
    def inode(self) -> int | None:
        """Of a machine: number of the inode whose page cache holds it."""
        from pgemu_kernels.folios.hugetlb import MAPPING_ADDRESS
        from pgemu_kernels.words.rows import INODES

        mapping = self.mapping if self.machine is not None else None
        if mapping is None or mapping.kind != "address_space":
            return None
        inode = mapping.address - int(MAPPING_ADDRESS) >> 12
        return inode if 0 <= inode < INODES else None

    @property
    def index(self) -> int:
        """Offset in its mapping, as stored: in pages, of HugeTLB's private mappings before 7.3 in huge pages."""
        return self.words()[4]

    # ------------------------------------------------------------------ references

    @property
    def expected_references(self) -> int:
        """References that the page cache, the swap cache, private data and mappings hold: folio_expected_ref_count().

        Every other one is a pin, a fault under way, or somebody's transient reference. 0 for a type other than
        "hugetlb". 6.1 has no such function: its page cache holds one reference of a HugeTLB folio. ValueError for an
        order that no page has.
        """
        if self.type not in (None, "hugetlb"):
            return 0
        words, layout = self.words(), self.layout
        flags = set(flags_of(layout, words[0], False)[0])
        pages = 1 << check_order(self.pfn, self.order)
        expected = self.mapcount
        if {"swapbacked", "owner_priv_1"} <= flags:  # PG_swapcache
            expected += pages
        if not words[3] & MAPPING_ANON:
            cached = pages if layout.cached_per_page or self.type is None else 1
            expected += (cached if words[3] else 0) + ("private" in flags)
        return expected

    @property
    def maybe_dma_pinned(self) -> bool:
        """mm.h:folio_maybe_dma_pinned(). Of a small folio 1024 ordinary references look like a pin."""
        pins = self.pincount
        return pins > 0 if pins is not None else self.refcount & 0xFFFF_FFFF >= GUP_PIN_COUNTING_BIAS

    # ------------------------------------------------------------------ HugeTLB

    @property
    def hugetlb(self) -> Hugetlb | None:
        """None unless it is a HugeTLB folio."""
        if self.type != "hugetlb":
            return None
        pointers = (self._field(f"_hugetlb_{name}") or 0 for name in ("subpool", "cgroup", "cgroup_rsvd", "hwpoison"))
        return Hugetlb(hugetlb_flags(self.layout, self.words()[5]), *pointers)

    @property
    def optimized(self) -> bool:
        """Whether HugeTLB vmemmap optimisation took its tails' pages: the flag of the folio."""
        hugetlb = self.hugetlb
        return hugetlb is not None and "vmemmap_optimized" in hugetlb.flags

    @property
    def poisoned_pages(self) -> list[int] | None:
        """PFNs on its list of poisoned pages (mm/memory-failure.c: raw_hwp_page), None where that cannot be read.

        In the order of the list; a machine's objects lie at model addresses: ascending. A list that leads out of the
        folio, or has more entries than the folio has pages, is damaged and cannot be read.
        """
        hugetlb = self.hugetlb
        node = hugetlb.hwpoison if hugetlb is not None else 0
        if node and self.machine is not None:
            return self._poisoned_rows(self.machine)
        found: dict[int, None] = {}
        end = self.pfn + (1 << check_order(self.pfn, self.order))
        while node:
            steps = self._walk(node)
            if not steps or steps[-1].kind is not Kind.LEAF:
                return None
            try:
                where = leaf_address(self.format, steps[-1].level, steps[-1].entry, node)
                node, page = self.memory.words(where, 2).tolist()
            except ValueError:
                return None
            pfn = (page - self.vmemmap_base) // STRUCT_PAGE
            if pfn in found or not self.pfn <= pfn < end:
                return None
            found[pfn] = None
        return list(found)

    def _poisoned_rows(self, machine: Core) -> list[int]:
        from pgemu_kernels.words.rows import POISONED, STATE_POISONED

        rows = machine.arrays.state[int(STATE_POISONED) :][:POISONED].tolist()
        return sorted(pfn for pfn in rows if pfn and self.pfn <= pfn < self.pfn + self.nr_pages)

    @property
    def vmemmap(self) -> list[VmemmapPage]:
        """What maps its struct pages, one VmemmapPage for each 4K of them: 8 for 2M, 4096 for 1G, 1 up to 256K.

        ValueError for an order that no page has.
        """
        address = self.vmemmap_base + STRUCT_PAGE * self.pfn
        end = address + (STRUCT_PAGE << check_order(self.pfn, self.order))
        return list(vmemmap_pages(self.memory, self.format, self.root, address & -PAGE_4K, end))
