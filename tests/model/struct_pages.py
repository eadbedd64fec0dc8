"""What the vmemmap consists of: struct pages of 8 words, pages of 64 of them, and what kernels write there.

A vmemmap page is an object; an entry of the vmemmap's page table names one, so that sharing is identity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

STRUCT_PAGES = 64  # of one vmemmap page
ALL_ONES = (1 << 64) - 1
LOW32 = (1 << 32) - 1
VMEMMAP = 0xFFFF_EA00_0000_0000
LISTS = 0xFFFF_FFFF_8200_0000  # where the machine says that the kernel has its list heads
CGROUP = 0xFFFF_8880_0030_0000
RAW_POISON = 0xFFFF_8880_0031_0000
POISON1, POISON2 = 0xDEAD_0000_0000_0100, 0xDEAD_0000_0000_0122
TAIL_MAPPING = 0xDEAD_0000_0000_0400
HUGETLB, BUDDY = 0xF400_0000, 0xF000_0000  # page types
HEAD = 1 << 6
PAGE_FLAGS = (1 << 19) - 1  # those that a page has for itself
INHERITED = sum(1 << bit for bit in (0, 2, 3, 4, 8, 9, 10, 17, 18))  # those that the pages of a split folio get
FREED, OPTIMIZED = 1 << 3, 1 << 4  # of a huge page's private word

FLAGS, NEXT, PREV, MAPPING, INDEX, PRIVATE, COUNTS, MEMCG = range(8)  # the words of a struct page

READ_WRITE, READ_ONLY, LARGE, SAVED_DIRTY = 0x8000_0000_0000_0163, 0x8000_0000_0000_0121, 0x8000_0000_0000_01E3, 1 << 58


class Word(NamedTuple):
    """A word of a huge page: in its n-th struct page."""

    page: int
    word: int


@dataclass(frozen=True)
class Kernel:
    """What differs between kernels, by what their sources and the captures say.

    masks: compound_info is a mask and tails share one page per node and order. reset: struct pages rewritten in each
    restored vmemmap page. early: the boot allocator optimises 1G pages. batches_nothing: how often a batch without a
    page flushes.
    """

    masks: bool
    reset: int
    early: bool
    order: dict[Word, int]  # what prep_compound_head() writes for any order
    pages: Word
    subpool: Word
    cgroup: Word
    raw_poison: Word
    deferred_list: Word | None
    batches_nothing: int
    hwpoison: int = 1 << 21
    ascending: bool = True


_LATER: dict[str, Any] = {
    "early": True,
    "order": {Word(1, 2): LOW32, Word(1, 3): LOW32, Word(1, 4): ALL_ONES},
    "pages": Word(1, 7),
    "subpool": Word(3, 2),
    "cgroup": Word(3, 3),
    "raw_poison": Word(3, 5),
    "deferred_list": Word(2, 2),
    "batches_nothing": 1,
}
KERNELS = {
    "6.12": Kernel(
        masks=False, reset=3, early=False, order={Word(1, 2): ALL_ONES, Word(1, 3): 0}, pages=Word(1, 4),
        subpool=Word(2, 2), cgroup=Word(2, 3), raw_poison=Word(2, 5), deferred_list=None, batches_nothing=2,
        hwpoison=1 << 20,
    ),
    "6.18": Kernel(masks=False, reset=4, **_LATER),
    "7.3": Kernel(masks=True, reset=0, ascending=False, **_LATER),
}  # fmt: skip


class Configuration(NamedTuple):
    """Flags of struct pages at boot and of those made later; where the node begins; what is configured."""

    flags: int
    later: int
    node_shift: int
    cgroups: bool
    deferred: bool
    memory_failure: bool


CONFIGURATIONS = {
    "debian": Configuration(0x0017_FFFF_C000_0000, 0x0010_0000_0000_0000, 54, True, True, True),
    "small": Configuration(0x4000_0000_0000_0000, 0x4000_0000_0000_0000, 0, False, False, False),
}


@dataclass(eq=False)
class VmemmapPage:
    """A page of 64 struct pages; `boot`: the boot allocator gave it."""

    words: np.ndarray[Any, Any]
    boot: bool = False

    def copy(self) -> VmemmapPage:
        return VmemmapPage(self.words.copy())


class Entry(NamedTuple):
    """A 4K entry of the vmemmap's table."""

    page: VmemmapPage
    bits: int

    @property
    def writable(self) -> bool:
        return bool(self.bits & 2)
