"""HugeTLB pools as /sys/kernel/mm/hugepages shows them, and what one can do with their pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pgemu.machine.arguments import OfMachine, guards_creation
from pgemu.machine.field_rules import one_of
from pgemu.machine.results import Result
from pgemu_kernels import words as W
from pgemu_kernels.words.operations import Operation

if TYPE_CHECKING:
    from pgemu.machine.core import Core

__all__ = ("HugetlbPool", "NodePool", "meminfo", "vmstat")


_COUNTS = ("nr", "free", "resv", "surplus")


class NodePool(NamedTuple):
    """One node's part of a pool: /sys/devices/system/node/nodeN/hugepages."""

    nr_hugepages: int
    free_hugepages: int
    surplus_hugepages: int


@guards_creation(order=one_of((W.ORDER_2M, W.ORDER_1G)))
@dataclass(unsafe_hash=True, repr=False)
class HugetlbPool(OfMachine):
    """The huge pages of one size; made by Machine.hugetlb(). mm/hugetlb.c:struct hstate

    Errors that Linux would return are results.

    >>> machine = Machine(Config("restructure", pool=8 << 20, page_size=2 << 20, buddy=8 << 20))
    >>> pool = machine.hugetlb(2 << 20)
    >>> pool.nr_hugepages, pool.free_hugepages
    (4, 4)
    """

    machine: Core = field(repr=False)
    order: int

    def __repr__(self) -> str:
        counts = ", ".join(f"{name}_hugepages={getattr(self, f'{name}_hugepages')}" for name in _COUNTS)
        return f"HugetlbPool(page_size={self.page_size >> 20} << 20, {counts})"

    @classmethod
    def of_size(cls, machine: Core, page_size: int) -> HugetlbPool:
        """See Machine.hugetlb.

        >>> HugetlbPool.of_size(machine, 2 << 20).page_size
        2097152
        """
        return cls(machine, W.ORDER_2M if page_size == W.PAGE_2M else W.ORDER_1G)

    @property
    def page_size(self) -> int:
        """Bytes of a page."""
        return W.PAGE_4K << self.order

    @property
    def _row(self) -> int:
        return int(W.STATE_HSTATES) + (W.H_WORDS if self.order == W.ORDER_1G else 0)

    def _word(self, name: np.uint64) -> int:
        return int(self.machine.arrays.state[self._row + int(name)])

    # ------------------------------------------------------------------ counts

    @property
    def nr_hugepages(self) -> int:
        """Pages of the pool, surplus ones included."""
        return self._word(W.H_PAGES)

    @property
    def free_hugepages(self) -> int:
        """Pages that nobody uses, reserved ones included."""
        return self._word(W.H_FREE)

    @property
    def resv_hugepages(self) -> int:
        """Pages that mappings and subpools have reserved and not yet allocated."""
        return self._word(W.H_RESERVED)

    @property
    def surplus_hugepages(self) -> int:
        """Pages above nr_hugepages as it was last written; they leave when they are freed."""
        return self._word(W.H_SURPLUS)

    @property
    def nr_overcommit_hugepages(self) -> int:
        """How many surplus pages may be allocated on demand; can be set. EINVAL for 1G pages before Linux 6.19."""
        return self._word(W.H_OVERCOMMIT)

    @nr_overcommit_hugepages.setter
    def nr_overcommit_hugepages(self, count: int) -> None:
        if self.order == W.ORDER_1G and not self.machine.register(W.R_GIGANTIC_SURPLUS):
            raise OSError(W.EINVAL, "gigantic pages cannot be surplus before 6.19")
        self.machine.arrays.state[self._row + int(W.H_OVERCOMMIT)] = count

    def node(self, number: int) -> NodePool:
        """The counts of a NUMA node. ValueError if the machine has no such node.

        >>> pool.node(0).free_hugepages
        4
        """
        row = self._row + int(W.H_NODE) + self._node("number", number) * W.H_NODE_WORDS
        words = (W.H_NODE_PAGES, W.H_NODE_FREE, W.H_NODE_SURPLUS)
        return NodePool(*(int(self.machine.arrays.state[row + int(word)]) for word in words))

    def free_list(self, node: int = 0) -> list[int]:
        """Frames of a node's free pages in the order in which they are taken, off the links in their struct pages.

        >>> len(pool.free_list())
        4
        """
        from pgemu.images.folio import struct_page

        row = self._row + int(W.H_NODE) + self._node("node", node) * W.H_NODE_WORDS + int(W.H_NODE_FREE_LIST)
        vmemmap = self.machine.register(W.R_VMEMMAP)
        link = int(self.machine.arrays.state[row])
        found = []
        while link < W.HSTATES_ADDRESS:
            found.append((link - vmemmap) // 64)
            link = int(struct_page(self.machine, found[-1])[1])
        return found

    def _node(self, name: str, number: int) -> int:
        if number >= self.machine.config.nodes:
            raise ValueError(f"{name} {number}: expected a node of the machine, 0 to {self.machine.config.nodes - 1}")
        return number

    def _space(self, node: int | None) -> int:
        return 0 if node is None else self._node("node", node) + 1

    # ------------------------------------------------------------------ operations

    def resize(self, count: int, node: int | None = None) -> Result:
        """Write nr_hugepages, of all nodes or of one: 0, and the pages there are afterwards.

        New pages are optimised in one batch, the vmemmap of pages that leave is restored in one batch. It ends early
        where memory ends; pages in use become surplus. mm/hugetlb.c:set_max_huge_pages()

        >>> pool.resize(6).name, pool.nr_hugepages
        ('ok', 6)
        """
        return self.machine.operate(Operation.POOL_RESIZE, space=self._space(node), object_=self.order, length=count)

    def demote(self, count: int = 1, node: int | None = None) -> Result:
        """Write `demote` of 1G pages, each becomes 512 of 2M: 0 and the pages demoted, as many as are free.

        -EBUSY: all free ones are poisoned. -ENOMEM: the vmemmap of one could not be restored. -EINVAL for 2M pages.
        demote_store()

        >>> pool.demote()  # 2M pages are the smallest
        Result(status=-EINVAL, detail=0)
        >>> machine.hugetlb(1 << 30).demote()  # and of 1G there is none
        Result(status=0, detail=0)
        """
        return self.machine.operate(Operation.POOL_DEMOTE, space=self._space(node), object_=self.order, length=count)

    def allocate(self, node: int | None = None) -> Result:
        """Take a page, preferably of a node: 0 and the frame of its head, which has one reference; -ENOMEM.

        alloc_hugetlb_folio(), without a reservation. Machine.free_folio() gives it back.

        >>> pfn = pool.allocate().detail
        >>> pool.free_hugepages, machine.free_folio(pfn).name
        (3, 'ok')
        """
        return self.machine.operate(Operation.FOLIO_ALLOCATE, space=self._space(node), object_=self.order)

    def optimize(self, pfns: Sequence[int] | range) -> Result:
        """Optimise the vmemmap of free pages, each by its head's frame: 0 and how many, or what ended it.

        Neighbours go in one batch: hugetlb_vmemmap_optimize_folios(), with two flushes; one page alone is
        hugetlb_vmemmap_optimize_folio(), with its own. -ENOMEM, -EBUSY for a page in use, -EINVAL.

        >>> pfns = pool.free_list()[:1]
        >>> pool.restore(pfns).name, pool.optimize(pfns).name
        ('ok', 'ok')
        """
        return self._over_ranges(Operation.VMEMMAP_OPTIMIZE, pfns)

    def restore(self, pfns: Sequence[int] | range) -> Result:
        """Restore the vmemmap of free pages: as `optimize`. hugetlb_vmemmap_restore_folio() and _folios()

        >>> pool.restore(pool.free_list()[:1])
        Result(status=0, detail=1)
        """
        return self._over_ranges(Operation.VMEMMAP_RESTORE, pfns)

    def _over_ranges(self, op: Operation, pfns: Sequence[int] | range) -> Result:
        size = 1 << self.order
        done = 0
        ordered = sorted(pfns)
        first = 0
        for i in range(1, len(ordered) + 1):
            if i < len(ordered) and ordered[i] == ordered[i - 1] + size:
                continue
            length = (i - first) * self.page_size
            result = self.machine.operate(op, address=ordered[first] << 12, length=length)
            done += result.detail
            if result.status:
                return result._replace(detail=done)
            first = i
        return Result(0, done)


def meminfo(machine: Core) -> dict[str, int]:
    """What /proc/meminfo shows of what pgemu models, with its names: kB, HugePages_* in pages of the default size.

    HugePages_* are those of the size that the designs use (default_hugepagesz), Hugetlb of both.
    """
    gauge = machine.statistics.gauge
    default = HugetlbPool.of_size(machine, max(machine.config.page_size, W.PAGE_2M))
    pools = _both(machine)
    return {
        "AnonPages": (gauge(W.Gauge.ANONYMOUS_PAGES) + machine.register(W.R_LARGE_MAPPED)) * 4,
        "AnonHugePages": gauge(W.Gauge.ANON_HUGE_PAGES) * 2048,
        "PageTables": gauge(W.Gauge.HOST_TABLES) * 4,
        "SecPageTables": gauge(W.Gauge.STAGE2_TABLES) * 4,
        "HugePages_Total": default.nr_hugepages,
        "HugePages_Free": default.free_hugepages,
        "HugePages_Rsvd": default.resv_hugepages,
        "HugePages_Surp": default.surplus_hugepages,
        "Hugepagesize": default.page_size // 1024,
        "Hugetlb": sum(pool.nr_hugepages * pool.page_size for pool in pools) // 1024,
    }


THP_COUNTERS = {
    "thp_fault_alloc": W.R_THP_FAULT_ALLOC,
    "thp_fault_fallback": W.R_THP_FAULT_FALLBACK,
    "thp_collapse_alloc": W.R_THP_COLLAPSE_ALLOC,
    "thp_deferred_split_page": W.R_THP_DEFERRED_SPLIT,
    "thp_split_pmd": W.R_THP_SPLIT_PMD,
    "thp_zero_page_alloc": W.R_THP_ZERO_PAGE_ALLOC,
}
"""Names in /proc/vmstat of what is counted of transparent huge pages, and the registers."""


def vmstat(machine: Core) -> dict[str, int]:
    """What /proc/vmstat shows of what pgemu models, with its names: pages."""
    gauge = machine.statistics.gauge
    return {
        "nr_anon_pages": gauge(W.Gauge.ANONYMOUS_PAGES) + machine.register(W.R_LARGE_MAPPED),
        "nr_anon_transparent_hugepages": gauge(W.Gauge.ANON_HUGE_PAGES),
        "nr_page_table_pages": gauge(W.Gauge.HOST_TABLES),
        "nr_sec_page_table_pages": gauge(W.Gauge.STAGE2_TABLES),
        "nr_hugetlb": _in_use(machine),
        "nr_memmap_pages": gauge(W.Gauge.MEMMAP_PAGES),
        "nr_memmap_boot_pages": gauge(W.Gauge.MEMMAP_BOOT_PAGES),
        **{name: machine.register(register) for name, register in THP_COUNTERS.items()},
    }


def _in_use(machine: Core) -> int:
    """4K pages of huge pages that are not free: NR_HUGETLB, since 6.14."""
    return sum((pool.nr_hugepages - pool.free_hugepages) << pool.order for pool in _both(machine))


def _both(machine: Core) -> list[HugetlbPool]:
    return [HugetlbPool.of_size(machine, size) for size in (W.PAGE_2M, W.PAGE_1G)]
