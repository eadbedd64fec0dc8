"""The machine: arrays, their boot, and the ways to run operations on them."""

from __future__ import annotations

import mmap
import os
import sys
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from pgemu import cost
from pgemu.designs import DESIGNS, Design
from pgemu.statistics import Statistics
from pgemu_kernels import formats, layout as L, page_format
from pgemu_kernels.handle import DTYPES, Machine as Arrays, describe
from pgemu_kernels.layout import Operation
from pgemu_kernels.page_format import PageFormat

if TYPE_CHECKING:
    from pgemu.folio import Folio
    from pgemu.image import Root
    from pgemu.physical import PhysicalMemory
    from pgemu.trace.schema import Records
    from pgemu_kernels.page_format import PageFormat

Array = np.ndarray[Any, Any]
NONE = np.uint64(0xFFFF_FFFF_FFFF_FFFF)  # "no operation" of run_pooling()
SERIES = {"rfc2": L.SERIES_RFC2, "jan2026": L.SERIES_LATER}


@dataclass(frozen=True)
class Config:
    """What a machine is made of.

    design: "restructure" or "pfnmap", which matters to guest_memfd inodes only.
    pool: bytes of HugeTLB memory, a multiple of `page_size` (2 MiB or 1 GiB); 0 for page tables alone.
    memory: bytes of ordinary memory (tables, anonymous pages), beside what the pool's metadata takes.
    kernel: "6.12", "6.18" or "7.3": what Linux writes (formats.KERNELS). stage2: "npt" or "ept".
    hvo: whether the pool's vmemmap is optimised.
    vcpus, host_cpus: for the price of flushes; the default, one of each, makes them as cheap as
    can be. zero: "folio" or "page", how much a first use zeroes.
    seed: order of never used frames; 0 is ascending.
    frames: how many metadata frames may be in use at once; a small number makes -ENOMEM happen. None is
    enough for every struct page and for the page tables of one process and one VM, all at 4K at once.
    rounded_zap_drops_both_kinds: restructure zaps rounded out to huge pages, and where private and shared
    pages share one root that drops leaves of both kinds (inference; False: only those of the kind left).
    notifier: unmapping host entries drops stage-2 leaves through KVM's MMU notifier (as captured).
    dontneed_on_pfnmap: let MADV_DONTNEED work on VM_PFNMAP, which no kernel does.
    nx_huge_pages: KVM's iTLB-multihit mitigation on EPT.
    l1tf: the processor has that bug, so that EPT's MMIO entries carry address bits 43:39.
    profile: a cost profile (pgemu.cost): its name, or the path of a TOML file. Its prices per CPU are multiplied
    by `vcpus` or `host_cpus`, whatever machine they were taken on. InputError for a bad file.
    other_pool: bytes of a second pool, of the huge page size that `page_size` is not, for HugeTLB mappings.
    nodes: NUMA nodes, 1 or 2; pools, `reserved` and `buddy` memory are spread over them, node 0 first.
    buddy: bytes beside the pools that the page allocator has, in blocks of 2 MiB: pools grow from them.
    reserved: bytes of each node behind its 1G pages that the kernel itself uses; they shift the 2M pages.
    configuration: "debian" or "small", the kernel configurations captured (formats.CONFIGURATIONS).
    pti: page-table isolation: processes have two top tables and the kernel's copy of an entry is no-execute.
    series: whose split and merge of folios: "rfc2" (page by page), "jan2026" (in place; pgemu_kernels.splitting).
    """

    design: Design = "restructure"
    pool: int = 0
    page_size: int = L.PAGE_1G
    kernel: str = "7.3"
    stage2: Literal["npt", "ept"] = "npt"
    hvo: bool = True
    vcpus: int = 1
    host_cpus: int = 1
    zero: Literal["folio", "page"] = "folio"
    seed: int = 0
    frames: int | None = None
    rounded_zap_drops_both_kinds: bool = True
    notifier: bool = True
    dontneed_on_pfnmap: bool = False
    nx_huge_pages: bool = False
    l1tf: bool = False
    profile: str | os.PathLike[str] = "published"
    memory: int = 64 << 20
    other_pool: int = 0
    pti: bool = False
    nodes: int = 1
    buddy: int = 0
    reserved: int = 0
    configuration: Literal["debian", "small"] = "debian"
    series: Literal["rfc2", "jan2026"] = "jan2026"

    def __post_init__(self) -> None:
        checks = (
            (self.design in DESIGNS, f"design {self.design!r}: expected one of {', '.join(DESIGNS)}"),
            (self.page_size in (L.PAGE_2M, L.PAGE_1G), f"page size {self.page_size}: expected 2M or 1G"),
            (self.kernel in formats.KERNELS, f"kernel {self.kernel!r}: expected one of {', '.join(formats.KERNELS)}"),
            (self.stage2 in ("npt", "ept"), f"stage 2 {self.stage2!r}: expected npt or ept"),
            (self.zero in ("folio", "page"), f"zero {self.zero!r}: expected folio or page"),
            (self.vcpus > 0 and self.host_cpus > 0, "vcpus and host_cpus: expected positive numbers"),
            (self.nodes in (1, L.NODES), f"nodes {self.nodes}: expected 1 or {L.NODES}"),
            (
                self.configuration in formats.CONFIGURATIONS,
                f"configuration {self.configuration!r}: expected one of {', '.join(formats.CONFIGURATIONS)}",
            ),
            (
                self.nodes == 1 or self.configuration != "small",
                f"{self.nodes} nodes: expected 1 in configuration 'small', which has no NUMA",
            ),
            (self.series in SERIES, f"series {self.series!r}: expected one of {', '.join(SERIES)}"),
            (self.frames is None or self.frames > 0, f"frames {self.frames}: expected a positive number"),
            (self.seed >= 0, f"seed {self.seed}: expected no negative number"),
        )
        for holds, complaint in checks:
            if not holds:
                raise ValueError(complaint)
        if self.pool < 0 or self.pool % self.page_size:
            raise ValueError(f"pool of {self.pool} bytes: expected a multiple of {self.page_size}, or 0")
        if self.memory < 0 or self.memory % L.PAGE_4K:
            raise ValueError(f"memory of {self.memory} bytes: expected a multiple of {L.PAGE_4K}, or 0")
        if self.other_pool < 0 or self.other_pool % self.other_page_size:
            raise ValueError(f"other pool of {self.other_pool} bytes: expected a multiple of {self.other_page_size}")
        for name, size in (("buddy", self.buddy), ("reserved", self.reserved)):
            if size < 0 or size % L.PAGE_2M:
                raise ValueError(f"{name} memory of {size} bytes: expected a multiple of {L.PAGE_2M}, or 0")
        cost.profile(self.profile)  # ValueError or InputError for what is none
        if not isinstance(self.profile, str):  # a path remains one, "./published" too
            object.__setattr__(self, "profile", os.path.join(os.curdir, self.profile))

    @property
    def order(self) -> int:
        """Order of the pool's huge pages: 9 or 18."""
        return L.ORDER_2M if self.page_size == L.PAGE_2M else L.ORDER_1G

    @property
    def pool_pages(self) -> int:
        """Huge pages in the pool."""
        return self.pool // self.page_size

    @property
    def other_page_size(self) -> int:
        """Size of the huge pages of the second pool: 1 GiB where the first has 2 MiB, and the other way round."""
        return L.PAGE_1G if self.page_size == L.PAGE_2M else L.PAGE_2M

    @property
    def other_pool_pages(self) -> int:
        """Huge pages in the second pool."""
        return self.other_pool // self.other_page_size

    def node(self, number: int) -> Node:
        """What lies on a NUMA node. Its part of the HugeTLB zone begins at a multiple of 1 GiB."""
        sizes = {self.order: self.pool_pages, L.ORDER_1G + L.ORDER_2M - self.order: self.other_pool_pages}

        def share(count: int) -> int:
            return (count + self.nodes - 1 - number) // self.nodes

        return Node(
            share(sizes[L.ORDER_1G]), self.reserved >> 12, share(sizes[L.ORDER_2M]), share(self.buddy // L.PAGE_2M)
        )

    @property
    def guest_pages(self) -> int:
        """4K pages from the start of the HugeTLB zone to its end."""
        *others, last = (self.node(number) for number in range(self.nodes))
        return sum(node.span for node in others) + last.pages


class Node(NamedTuple):
    """A NUMA node's part of the HugeTLB zone, in the order in which it lies there.

    gigantic: 1G pages of boot. reserved: 4K pages that the kernel uses. huge: 2M pages of boot. free: 2M blocks that
    the page allocator has.
    """

    gigantic: int
    reserved: int
    huge: int
    free: int

    @property
    def pages(self) -> int:
        """4K pages in all."""
        return (self.gigantic << 18) + self.reserved + (self.huge + self.free << 9)

    @property
    def span(self) -> int:
        """4K pages up to the next node."""
        return -(-self.pages >> 18) << 18

    def boot_frames(self, hvo: bool) -> int:
        """Frames of the boot allocator at most: 512 for 128 MiB not all optimised, one for a 1G page that is.

        Those of the 1G pages and their shared page are rounded up: 512 frames of 128 MiB are aligned.
        """
        if not hvo:
            return -(-self.pages >> 15) * 512
        start = self.gigantic << 18
        optimized = range(start + self.reserved, start + self.reserved + (self.huge << 9))
        sections = -(-(self.pages - start) >> 15) - len(range(-(-optimized.start >> 15), optimized.stop >> 15))
        return sections * 512 + -(-(self.gigantic + 1) // 512) * 512


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


# Python names it from 3.13 on; the number is that of every Linux architecture but Alpha, MIPS and PowerPC.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


def _lay_out(sizes: dict[np.uint64, int], begin: int, begins: dict[np.uint64, int]) -> int:
    """Put tables behind one another from `begin` on, note where each begins, and return where the last one ends."""
    for register, size in sizes.items():
        begins[register] = begin
        begin += size
    return begin


def _map_memory(words: int, huge: bool) -> Array:
    """uint64[words] of zeroes, not reserved; `huge` asks the host for transparent huge pages."""
    size = max(words * 8, mmap.PAGESIZE)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    memory = mmap.mmap(-1, size, flags=flags)
    if huge and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint64, count=words)


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

    def __post_init__(self) -> None:
        self.arrays = self._allocate()
        self.descriptor = describe(self.arrays)
        self._set_registers()
        from pgemu_kernels.boot import MACHINE, provide

        if provide(self.descriptor, MACHINE, np.uint64(0)) != 0 or not self._prepare_memory():
            raise _os_error(L.ENOMEM, f"the vmemmap of {self.config.pool_pages} huge pages needs more frames")

    # ------------------------------------------------------------------ making

    def _prepare_memory(self) -> bool:
        """The second part of boot, of memory whose struct pages are all there, if any: whether the frames sufficed."""
        if self.config.hvo and not (self.config.buddy or self.config.reserved):
            return True
        from pgemu_kernels.pooling import run_pooling

        nothing = np.zeros(1, np.uint64)
        columns = (nothing,) * 5
        return int(run_pooling(self.descriptor, *columns, nothing.view(np.int64), nothing, NONE)) == 0

    def _allocate(self) -> Arrays:
        config = self.config
        frames = self._frames()
        blocks = 4 * config.pool_pages + L.INODES
        pages = blocks << config.order
        tails = {
            L.R_FREE_STACK: frames + self._boot_frames(),
            L.R_BLOCK_ROWS: blocks * L.B_WORDS,
            L.R_WORD_ROWS: pages >> 6,
            L.R_ZEROED_ROWS: pages >> 6,
            L.R_CONTIGUOUS_MAP: L.CONTIGUOUS_FRAMES // 64,
        }
        counts = {L.R_CONTENTS: config.guest_pages, L.R_SHARED: (pages >> 9) + (pages >> 18) + 2 * L.INODES}
        begins: dict[np.uint64, int] = {}
        for number in range(config.nodes):  # a bit per 2M block, whole 1G at a time
            tails[self._node_word(number, L.N_BLOCKS)] = config.node(number).span >> 15
        state_size = _lay_out(tails, L.STATE_SIZE, begins)
        counts_size = _lay_out(counts, self._all_frames(), begins)
        arrays = Arrays(
            # Frames in a seed's order are scattered: each would cost the host a huge page.
            ram=_map_memory(self._all_frames() * 512, huge=config.seed == 0),
            state=np.zeros(state_size, DTYPES["state"]),
            stats=np.zeros(L.STATS_SIZE, DTYPES["stats"]),
            counts=np.zeros(counts_size, DTYPES["counts"]),
        )
        for register, begin in begins.items():
            arrays.state[register] = begin
        return arrays

    def _frames(self) -> int:
        """Frames of the metadata zone: a power of two, enough for everything at once and for contents."""
        gigabytes = (self.config.pool + self.config.other_pool + self.config.buddy) / L.PAGE_1G
        tables = 2 * (513 + 2) + 16
        nodes = 512 * 9 // 7 + 8  # of the page cache, and what is stashed, while every huge page of 2M is split
        huge_pages = self.config.pool_pages + self.config.other_pool_pages + self.config.buddy // L.PAGE_2M
        needed = int(gigabytes * (4096 + tables + nodes)) + 2 * huge_pages + (self.config.memory >> 12)
        return 1 << max(needed, self.config.frames or 0, 511).bit_length()

    def _boot_frames(self) -> int:
        """Frames behind the others, with the vmemmap that the boot allocator gives."""
        config = self.config
        return sum(config.node(number).boot_frames(config.hvo) for number in range(config.nodes))

    @staticmethod
    def _node_word(number: int, word: np.uint64) -> np.uint64:
        """Index in `state` of a word of a node's row."""
        return np.uint64(int(L.STATE_NODES) + number * L.N_WORDS + int(word))

    def _all_frames(self) -> int:
        """Frames that have a place in `ram`: those handed out one by one, those of boot, those for runs."""
        return self._contiguous() + L.CONTIGUOUS_FRAMES

    def _contiguous(self) -> int:
        """The first frame of those for runs, aligned to the longest run."""
        return -(-(self._frames() + self._boot_frames()) // 64) * 64

    def _set_registers(self) -> None:
        config = self.config
        kernel = formats.KERNELS[config.kernel]
        configuration = formats.CONFIGURATIONS[config.configuration]
        frames = self._frames()
        random = np.random.default_rng(config.seed)
        base = max(1 << 20, -(-self._all_frames() // (1 << 18)) << 18)
        limit = frames - 1 if config.frames is None else min(config.frames, frames - 1)
        shown = ~formats.GLOBAL if config.pti else -1
        registers = {
            L.R_DESIGN: DESIGNS.index(config.design),
            L.R_FRAMES: frames,
            L.R_FRAMES_MASK: frames - 1,
            L.R_FRAMES_LIMIT: limit,
            L.R_BOOT_FRAMES: self._boot_frames(),
            L.R_CONTIGUOUS: self._contiguous(),
            L.R_SEED_MULTIPLIER: 1 if config.seed == 0 else int(random.integers(frames // 2)) * 2 + 1,
            L.R_SEED_OFFSET: 0 if config.seed == 0 else int(random.integers(frames)),
            L.R_POOL_BASE: base,
            L.R_GUEST_PAGES: config.guest_pages,
            L.R_ORDER: config.order,
            L.R_HSTATE: int(L.STATE_HSTATES) + (L.H_WORDS if config.order == L.ORDER_1G else 0),
            L.R_NODES: config.nodes,
            L.R_HVO: config.hvo,
            L.R_OPTIMIZE_VMEMMAP: config.hvo,
            L.R_PTI: config.pti,
            L.R_GUARDS: kernel.guards,
            L.R_VMEMMAP: 0xFFFF_EA00_0000_0000,
            L.R_HOST_FORMAT: formats.HOST_X86_64,
            L.R_FORMATS: 3,
            L.R_STAGE2_FORMAT: formats.STAGE2_EPT if config.stage2 == "ept" else formats.STAGE2_NPT,
            L.R_LAST_VMA: L.STATE_VMAS,
            L.R_LAST_MEMSLOT: L.STATE_MEMSLOTS,
            L.R_PAGE_FLAGS: configuration.page_flags,
            L.R_TAIL_FLAGS: configuration.tail_flags,
            L.R_NODE_SHIFT: configuration.node_shift,
            L.R_HUGETLB_CGROUP: configuration.hugetlb_cgroup,
            L.R_DEFERRED_STRUCT_PAGES: configuration.deferred_struct_pages,
            L.R_BOOT_MARKS: kernel.boot_marks,
            L.R_HWPOISON: kernel.hwpoison if configuration.memory_failure else 0,
            L.R_VIRTUAL_INDEX: kernel.virtual_index,
            L.R_BOOT_ASCENDING: kernel.boot_list_ascending,
            L.R_VMEMMAP_PAGE: formats.VMEMMAP_PAGE & shown,
            L.R_VMEMMAP_READ_ONLY: formats.VMEMMAP_READ_ONLY & shown,
            L.R_VMEMMAP_LARGE: formats.VMEMMAP_LARGE & shown,
            L.R_MASK_TAILS: kernel.mask_tails,
            L.R_FOLIO_6_12: kernel.folio_6_12,
            L.R_RESET_STRUCT_PAGES: kernel.reset_struct_pages,
            L.R_DONTNEED_FREES_TABLES: kernel.dontneed_frees_tables,
            L.R_ZERO_PAGE: config.zero == "page",
            L.R_ZAP_BOTH_KINDS: config.rounded_zap_drops_both_kinds,
            L.R_NOTIFIER: config.notifier,
            L.R_DONTNEED_PFNMAP: config.dontneed_on_pfnmap,
            L.R_RECOVER_HUGE: kernel.recovers_huge_pages,
            L.R_SERIES: SERIES[config.series],
            L.R_GMEM_MMAP: kernel.guest_memfd_mmap,
        }
        state = self.arrays.state
        for register, value in registers.items():
            state[register] = value
        for number in range(config.nodes):
            node = config.node(number)
            words = {L.N_BASE: base, L.N_PAGES: node.pages, L.N_GIGANTIC: node.gigantic, L.N_RESERVED: node.reserved,
                     L.N_HUGE: node.huge}  # fmt: skip
            for word, value in words.items():
                state[self._node_word(number, word)] = value
            base += node.span
        table = page_format.format_table(config.kernel, **self._format_parameters())
        state[int(L.STATE_FORMATS) : int(L.STATE_FORMATS) + table.size] = table.reshape(-1)
        prices = cost.price_table(config.profile, config.vcpus, config.host_cpus)
        stats = self.arrays.stats
        stats[int(L.STATS_PRICES) : int(L.STATS_PRICES) + prices.size] = prices.reshape(-1)
        one = prices[:, [int(L.PRICE_FIXED_LOW), int(L.PRICE_FIXED_HIGH)]]
        one = one + prices[:, [int(L.PRICE_EACH_LOW), int(L.PRICE_EACH_HIGH)]]
        stats[int(L.STATS_PRICES_ONE) : int(L.STATS_PRICES_ONE) + one.size] = one.reshape(-1)

    def register(self, index: Any) -> int:
        """A named scalar of the machine (layout.R_*)."""
        return int(self.arrays.state[index])

    # ------------------------------------------------------------------ formats

    def format_row(self, index: int) -> Array:
        """uint64[F_WORDS]: row `index` of the machine's formats (a view). ValueError for a row that is not in use.

        Rows 0 to 2 are the host's x86-64, NPT and EPT (formats.HOST_X86_64, STAGE2_NPT, STAGE2_EPT).
        """
        if not 0 <= index < self.register(L.R_FORMATS):
            raise ValueError(f"format row {index}: expected 0 to {self.register(L.R_FORMATS) - 1}")
        begin = int(L.STATE_FORMATS) + index * L.F_WORDS
        return self.arrays.state[begin : begin + L.F_WORDS]

    def add_format(self, fmt: PageFormat) -> int:
        """The row of an entry format, added if the machine has none that is equal. ValueError past layout.FORMATS."""
        row = fmt.row()
        used = self.register(L.R_FORMATS)
        for index in range(used):
            if np.array_equal(self.format_row(index), row):
                return index
        if used == L.FORMATS:
            raise ValueError(f"format {fmt.name}: the machine has {L.FORMATS} formats already")
        self.arrays.state[L.R_FORMATS] = used + 1
        self.format_row(used)[:] = row
        return used

    # ------------------------------------------------------------------ objects

    def create_guest_memfd(self, size: int, *, shared: bool = False) -> GuestMemfd:
        """Create a guest_memfd inode over HugeTLB memory, all private or (`shared`) all shared.

        OSError: EINVAL for a size that is no positive multiple of the huge page, ENOMEM when the pool
        cannot reserve it, ENOSPC past layout.INODES inodes.
        """
        from pgemu.memory import GuestMemfd

        return GuestMemfd.create(self, size, shared)

    def create_hugetlb_file(self, size: int, page_size: int = L.PAGE_2M) -> HugetlbFile:
        """Create a file of hugetlbfs with pages of 2 MiB or 1 GiB, all absent.

        ValueError for another page size; OSError: EINVAL for a size that is no positive multiple of it, ENOSPC.
        """
        from pgemu.files import HugetlbFile

        return HugetlbFile.create(self, size, page_size)

    def create_device(
        self, pfn: int, pages: int, *, remap: bool = False, memory_type: str = "uncached-minus"
    ) -> Device:
        """Create a device's region of `pages` 4K frames from `pfn` on, without struct pages.

        remap: its mmap enters everything at once (remap_pfn_range()), else pages come at their fault.
        memory_type: "write-back", "write-combining", "uncached-minus" or "uncached".
        ValueError for another memory type or a region beyond 2^52; OSError ENOSPC.
        """
        from pgemu.files import Device

        return Device.create(self, pfn, pages, remap, memory_type)

    def create_guest_memfd_4k(self, size: int, *, mmap: bool = True, init_shared: bool = True) -> GuestMemfd4K:
        """Create a guest_memfd as merged in Linux 6.8, of 4K folios; the flags are those of 6.18.

        mmap: GUEST_MEMFD_FLAG_MMAP. init_shared: GUEST_MEMFD_FLAG_INIT_SHARED, without which host faults end in
        SIGBUS; before 6.18 there are none. OSError: EINVAL for a size that is no positive multiple of 4096 or for a
        flag that the kernel lacks, ENOSPC.
        """
        from pgemu.files import GuestMemfd4K

        return GuestMemfd4K.create(self, size, mmap, init_shared)

    def create_process(self) -> AddressSpace:
        """Create a process: an empty page table. OSError ENOMEM or ENOSPC."""
        from pgemu.memory import AddressSpace

        return AddressSpace.create(self)

    def create_vm(self, process: AddressSpace | None = None, *, protected: bool = False) -> Vm:
        """Create a VM of a process; `protected` is KVM_X86_SW_PROTECTED_VM. OSError ENOMEM or ENOSPC."""
        from pgemu.memory import Vm

        return Vm.create(self, process, protected)

    def create_page_table(self, fmt: PageFormat | str) -> PageTable:
        """Create an empty page table of a format, or of the format of a name (page_format.FORMATS).

        OSError ENOMEM. ValueError for another name, past layout.FORMATS formats, or for AMD's IOMMU format, whose
        tables this does not edit.
        """
        from pgemu.page_table import PageTable

        return PageTable.create(self, fmt)

    # ------------------------------------------------------------------ huge pages

    def hugetlb(self, page_size: int = L.PAGE_2M) -> HugetlbPool:
        """The pool of huge pages of 2 MiB or 1 GiB. ValueError for another size."""
        from pgemu.hugetlb import HugetlbPool

        if page_size not in (L.PAGE_2M, L.PAGE_1G):
            raise ValueError(f"page size {page_size}: expected {L.PAGE_2M} or {L.PAGE_1G}")
        return HugetlbPool(self, L.ORDER_2M if page_size == L.PAGE_2M else L.ORDER_1G)

    @property
    def optimize_vmemmap(self) -> bool:
        """vm.hugetlb_optimize_vmemmap: whether pages that join a pool are optimised; can be set."""
        return bool(self.register(L.R_OPTIMIZE_VMEMMAP))

    @optimize_vmemmap.setter
    def optimize_vmemmap(self, on: bool) -> None:
        self.arrays.state[L.R_OPTIMIZE_VMEMMAP] = on

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
        """Store a word at a virtual address of the vmemmap: 0, or -EFAULT through a read-only entry; and the entry's
        physical address. In Linux an oops.
        """
        return self.operate(Operation.VMEMMAP_STORE, address=address, offset=value)

    def meminfo(self) -> dict[str, int]:
        """/proc/meminfo, as far as it is modelled: see pgemu.hugetlb.meminfo()."""
        from pgemu.hugetlb import meminfo

        return meminfo(self)

    def vmstat(self) -> dict[str, int]:
        """/proc/vmstat, as far as it is modelled: see pgemu.hugetlb.vmstat()."""
        from pgemu.hugetlb import vmstat

        return vmstat(self)

    # ------------------------------------------------------------------ running

    def run(self, records: Records) -> Results:
        """Run trace records in order. ValueError for actors beyond layout.ACTORS."""
        if len(records) and int(records.actor.max()) >= L.ACTORS:
            raise ValueError(f"actor {int(records.actor.max())}: expected less than {L.ACTORS}")
        columns = (records.object, records.address, records.offset, records.length)
        return self.run_columns(records.header(), *columns, count=len(records))

    def run_columns(
        self, header: Any, object_: Any = 0, address: Any = 0, offset: Any = 0, length: Any = 0, *, count: int
    ) -> Results:
        """Run `count` operations given as columns: uint64 arrays of `count` elements, or of one for all.

        header: op | flags << 8 | actor << 16 | vm << 32 | space << 48.
        """
        from pgemu_kernels.replay import run

        columns = [_column(c, count) for c in (header, object_, address, offset, length)]
        status = np.empty(count, np.int64)
        detail = np.empty(count, np.uint64)
        done = run(self.descriptor, *columns, status, detail, np.uint64(0))
        while done < count:
            if int(columns[0][done if columns[0].size > 1 else 0]) & 0xFF >= L.Operation.POOL_RESIZE:
                from pgemu_kernels.pooling import run_pooling as elsewhere
            else:
                from pgemu_kernels.ordinary import run_ordinary as elsewhere
            done = elsewhere(self.descriptor, *columns, status, detail, np.uint64(done))
            if done < count:
                done = run(self.descriptor, *columns, status, detail, np.uint64(done))
        return Results(status, detail)

    def operate(
        self,
        op: L.Operation,
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
        op: L.Operation,
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
        from pgemu_kernels.stepping import step

        _check_fields(op, flags, actor, vm, space, object_, address, offset, length)
        if self._record(actor, L.O_ACTIVE):
            raise ValueError(f"actor {actor} is in the middle of an operation")
        words = {
            L.O_OP: op, L.O_FLAGS: flags, L.O_ACTOR: actor, L.O_VM: vm, L.O_SPACE: space, L.O_OBJECT: object_,
            L.O_ADDRESS: address, L.O_OFFSET: offset, L.O_LENGTH: length,
        }  # fmt: skip
        row = int(L.STATE_OPS) + actor * L.O_WORDS
        for word, value in words.items():
            self.arrays.state[row + int(word)] = value
        step(self.descriptor, np.uint64(actor), True)

    def step(self, actor: int) -> int:
        """Do the next step of an actor's operation: layout.GO, STOP (it ended, see `result`) or BLOCKED.

        ValueError if the actor has no operation under way.
        """
        from pgemu_kernels.stepping import step

        if not self._record(actor, L.O_ACTIVE):
            raise ValueError(f"actor {actor} has no operation under way")
        return int(step(self.descriptor, np.uint64(actor), False))

    def result(self, actor: int) -> Result:
        """What the operation in an actor's record returned."""
        status = np.uint64(self._record(actor, L.O_STATUS)).astype(np.int64)
        return Result(int(status), self._record(actor, L.O_DETAIL))

    def _record(self, actor: int, word: np.uint64) -> int:
        if not 0 <= actor < L.ACTORS:
            raise ValueError(f"actor {actor}: expected 0 to {L.ACTORS - 1}")
        return int(self.arrays.state[int(L.STATE_OPS) + actor * L.O_WORDS + int(word)])

    # ------------------------------------------------------------------ looking

    @property
    def statistics(self) -> Statistics:
        """Counters, gauges, results and costs as they stand (a copy)."""
        return Statistics(self.arrays.stats.copy())

    def check(self) -> int:
        """Recount everything and compare: how many rules of pgemu_kernels.invariants are broken, ever."""

        from pgemu_kernels.recount import check

        owner = np.zeros(self.arrays.ram.size // 512, np.uint8)
        for kind, frame in [finding for table in self.page_tables for finding in table.recount(owner)]:
            if self.register(L.R_BROKEN) == 0:
                self.arrays.state[L.R_BROKEN_FIRST] = kind << 48 | frame
            self.arrays.state[L.R_BROKEN] += np.uint64(1)
        found = np.zeros(L.FOUND_WORDS, np.int64)
        if self.register(L.R_ORDINARY):
            from pgemu_kernels.ordinary_recount import check_ordinary

            check_ordinary(self.descriptor, owner, found)
        return int(check(self.descriptor, owner, np.zeros(3, np.int64), found))

    def check_each(self, on: bool = True) -> None:
        """Check after every operation what it touched; `broken` tells what was found."""
        self.arrays.state[L.R_CHECK] = on

    @property
    def broken(self) -> tuple[int, L.Broken, int]:
        """(findings, kind of the first one, the page or count it is about)."""
        first = self.register(L.R_BROKEN_FIRST)
        return self.register(L.R_BROKEN), L.Broken(first >> 48), first & (1 << 48) - 1

    def walk(self, root: int, page: int) -> list[tuple[int, int, int]]:
        """Walk a page table from physical address `root` to a page number: [(level, entry address, entry)].

        Ends at the leaf or at the entry that is neither leaf nor table; reads `ram` and nothing else. A VM's root is
        walked in the stage-2 format, any other in the host's.
        """
        from pgemu.walk import walk

        first = int(L.STATE_VMS) + int(L.V_ROOT)
        stage2 = root in self.arrays.state[first : first + self.register(L.R_VMS) * L.V_WORDS : L.V_WORDS].tolist()
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
        return self._formats[self.register(L.R_STAGE2_FORMAT)]

    @property
    def _formats(self) -> tuple[PageFormat, PageFormat, PageFormat]:
        return page_format.machine_formats(self.config.kernel, **self._format_parameters())

    def _format_parameters(self) -> dict[str, bool]:
        """What of the configuration changes the entries that a kernel writes."""
        config = self.config
        return {"nx_huge_pages": config.nx_huge_pages, "l1tf": config.l1tf, "pti": config.pti}

    def struct_page(self, pfn: int) -> Array:
        """uint64[8]: a struct page of the HugeTLB zone, read through the kernel's page table (a copy).

        ValueError outside the zone.
        """
        self._guest_frame(pfn)
        address = self.register(L.R_VMEMMAP) + pfn * 64
        level, _, entry = self.walk(self.register(L.R_KERNEL_ROOT), (address & (1 << 48) - 1) >> 12)[-1]
        inside = (1 << 12 + 9 * (level - 1)) - 1
        word = ((entry & formats.ADDRESS & ~inside) + (address & inside)) // 8
        return self.arrays.ram[word : word + 8].copy()

    def folio(self, pfn: int) -> Folio:
        """The folio that holds a PFN of the HugeTLB zone, a tail's as well as a head's. ValueError outside the zone."""
        from pgemu.folio import Folio

        self._guest_frame(pfn)
        return Folio.of_machine(self, pfn)

    # ------------------------------------------------------------------ physical memory

    @cached_property
    def memory(self) -> PhysicalMemory:
        """What lies at physical addresses, and which frames are in use."""
        from pgemu.physical import PhysicalMemory

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
        from pgemu.image import Root

        state = self.arrays.state
        found = [Root("kernel", self.host_format.name, self.register(L.R_KERNEL_ROOT))]
        for name, fmt, rows, count, words, word in (
            ("process", self.host_format, L.STATE_SPACES, L.R_SPACES, L.S_WORDS, L.S_ROOT),
            ("vm", self.stage2_format, L.STATE_VMS, L.R_VMS, L.V_WORDS, L.V_ROOT),
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
        from pgemu.image import write_image

        write_image(self, path, format)

    # ------------------------------------------------------------------ contents of guest frames

    def read_frame(self, pfn: int) -> bytes:
        """The 4096 bytes of a guest frame; frames never written read as zero. ValueError outside the pool."""
        frame = int(self.arrays.counts[self.register(L.R_CONTENTS) + self._guest_frame(pfn)])
        return self.arrays.ram[frame * 512 : (frame + 1) * 512].tobytes() if frame else bytes(L.PAGE_4K)

    def write_frame(self, pfn: int, data: bytes, offset: int = 0) -> None:
        """Store bytes in a guest frame. ValueError outside the frame or the pool, OSError ENOMEM."""
        from pgemu_kernels.boot import CONTENTS, provide

        if offset < 0 or offset + len(data) > L.PAGE_4K:
            raise ValueError(f"{len(data)} bytes at {offset}: expected to lie within {L.PAGE_4K}")
        self._guest_frame(pfn)
        frame = int(provide(self.descriptor, CONTENTS, np.uint64(pfn)))
        if frame < 0:
            raise _os_error(-frame, "no frame for the contents")
        memory = self.arrays.ram[frame * 512 : (frame + 1) * 512].view(np.uint8)
        memory[offset : offset + len(data)] = np.frombuffer(data, np.uint8)

    def _guest_frame(self, pfn: int) -> int:
        index = pfn - self.register(L.R_POOL_BASE)
        for number in range(self.config.nodes):
            base = int(self.arrays.state[self._node_word(number, L.N_BASE)])
            if base <= pfn < base + int(self.arrays.state[self._node_word(number, L.N_PAGES)]):
                return index
        raise ValueError(f"frame {pfn:#x}: expected a frame of the HugeTLB zone")


def _check_fields(
    op: int, flags: int, actor: int, vm: int, space: int, object_: int, address: int, offset: int, length: int
) -> None:
    """ValueError where a value does not fit its column of the trace schema."""
    limits = {"operation": (op, 256), "flags": (flags, 256), "actor": (actor, L.ACTORS), "vm": (vm, 1 << 16),
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
    from pgemu.files import Device, GuestMemfd4K, HugetlbFile
    from pgemu.hugetlb import HugetlbPool
    from pgemu.memory import AddressSpace, GuestMemfd, Vm
    from pgemu.page_table import PageTable
