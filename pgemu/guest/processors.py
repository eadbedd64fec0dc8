"""TLBs and paging-structure caches of processors: sizes, and where each number is from.

Manuals state how many translations a processor holds, and of which sizes. Of its paging-structure caches Intel's only
say what they may hold (SDM volume 3, "Caching Translation Information" and "Information That May Be Cached"): such a
number is `assumed`, and so is that the least recently used entry goes, and that a set is chosen by the low bits of the
page number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from pgemu.machine.arguments import guards_creation
from pgemu.machine.field_rules import Rule, amount

__all__ = ("PROCESSORS", "Cache", "Processor", "TlbCache")

Size = Literal["4K", "2M", "1G"]
Kind = Literal["data", "fetch"]
LEVELS: Mapping[str, int] = MappingProxyType({"4K": 1, "2M": 2, "1G": 3})

_MOST = 1 << 20
_ENTRIES = amount(0, _MOST, f"an integer from 0 to {_MOST}")


def _checked_sets(entries: int, ways: int) -> None:
    """ValueError where entries are not a power of two of sets, all of as many ways."""
    if not entries and not ways:
        return
    sets = entries // ways if ways else 0
    if not sets or sets * ways != entries or sets & (sets - 1):
        raise ValueError(f"entries {entries} with ways {ways}: expected a power of two of sets, times the ways")


@guards_creation(entries=_ENTRIES, ways=_ENTRIES)
@dataclass(frozen=True)
class Cache:
    """A set-associative cache; as many ways as entries: fully associative; 0 of both: there is none.

    ValueError where the number of sets is no power of two.
    """

    entries: int = 0
    ways: int = 0

    def __post_init__(self) -> None:
        _checked_sets(self.entries, self.ways)


def _values(value: Any) -> tuple[str, ...]:
    if not isinstance(value, tuple | list) or not all(isinstance(one, str) for one in value):
        raise TypeError
    return tuple(value)


_SIZES = Rule(lambda: 'some of ("4K", "2M", "1G")', _values, lambda given: bool(given) and set(given) <= {*LEVELS})
_SERVES = Rule(
    lambda: 'some of ("data", "fetch")', _values, lambda given: bool(given) and set(given) <= {"data", "fetch"}
)


@guards_creation(entries=_ENTRIES, ways=_ENTRIES, sizes=_SIZES, serves=_SERVES)
@dataclass(frozen=True)
class TlbCache:
    """A TLB, or the part of one that holds translations of some sizes, for data accesses, fetches, or both.

    ValueError where the number of sets is no power of two.
    """

    entries: int
    ways: int
    sizes: tuple[Size, ...]
    serves: tuple[Kind, ...]

    def __post_init__(self) -> None:
        _checked_sets(self.entries, self.ways)


@dataclass(frozen=True)
class Processor:
    """A processor's TLBs and caches of entries.

    Attributes:
        first, second: TLBs of the first and the second level. A translation goes to the one that holds its size, or
            else the largest size below: it is then entered in pieces of that size
        pml4e, pdpte, pde: caches of the guest's entries that lead to tables, by their level
        stage2_pml4e, stage2_pdpte, stage2_pde: the same of stage 2
        nested: translations of guest physical addresses, of any size
        sources: what each number is from
        assumed: what no manual states
    """

    first: tuple[TlbCache, ...]
    second: tuple[TlbCache, ...] = ()
    pml4e: Cache = Cache()
    pdpte: Cache = Cache()
    pde: Cache = Cache()
    stage2_pml4e: Cache = Cache()
    stage2_pdpte: Cache = Cache()
    stage2_pde: Cache = Cache()
    nested: Cache = Cache()
    sources: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()

    def without_caches(self) -> Processor:
        """The same TLBs without paging-structure caches: every miss is a whole walk."""
        return Processor(self.first, self.second, sources=self.sources)


_DATA: tuple[Kind, ...] = ("data",)
_FETCH: tuple[Kind, ...] = ("fetch",)
_BOTH: tuple[Kind, ...] = ("data", "fetch")
_REPLACEMENT = "replacement: least recently used; sets by the low bits of the page number (no manual states either)"
_ASSOCIATED = "what is entered after a walk is entered in both levels; TLBs are tagged by process (PCID, ASID)"

_SKYLAKE = Processor(
    first=(
        TlbCache(64, 4, ("4K",), _DATA),
        TlbCache(32, 4, ("2M",), _DATA),
        TlbCache(4, 4, ("1G",), _DATA),
        TlbCache(128, 8, ("4K",), _FETCH),
        TlbCache(8, 8, ("2M",), _FETCH),
    ),
    second=(TlbCache(1536, 12, ("4K", "2M"), _BOTH), TlbCache(16, 4, ("1G",), _BOTH)),
    pml4e=Cache(4, 4),
    pdpte=Cache(4, 4),
    pde=Cache(32, 4),
    stage2_pml4e=Cache(4, 4),
    stage2_pdpte=Cache(4, 4),
    stage2_pde=Cache(32, 4),
    nested=Cache(32, 4),
    sources=(
        "Intel 64 and IA-32 Architectures Optimization Reference Manual (248966-045, February 2022), table 2-15, TLB "
        "parameters of the Skylake microarchitecture: entries and ways of all TLBs",
        "CPUID leaf 2, descriptor 76H: 8 fully associative entries for fetches from 2M pages (the table: 8 per thread)",
        "Intel SDM volume 3, VMX support for address translation, Information That May Be Cached: combined and "
        "guest-physical mappings",
    ),
    assumed=(
        "entries of the paging-structure caches (PML4E 4, PDPTE 4, PDE 32, for the guest's and stage 2's each) and of "
        "the cache of guest physical addresses (32)",
        "fetches from 1G pages are entered as 2M",
        _REPLACEMENT,
        _ASSOCIATED,
    ),
)


def _zen(data_entries: int, data_ways: int, manual: str) -> Processor:
    return Processor(
        first=(TlbCache(64, 64, ("4K", "2M", "1G"), _DATA), TlbCache(64, 64, ("4K", "2M", "1G"), _FETCH)),
        second=(TlbCache(data_entries, data_ways, ("4K", "2M"), _DATA), TlbCache(512, 8, ("4K", "2M"), _FETCH)),
        pml4e=Cache(16, 16),
        pdpte=Cache(48, 48),
        pde=Cache(64, 64),
        stage2_pml4e=Cache(16, 16),
        stage2_pdpte=Cache(48, 48),
        stage2_pde=Cache(64, 64),
        nested=Cache(64, 64),
        sources=(
            f"{manual}, L1 Translation Lookaside Buffers: 64 entries, fully associative, of all sizes, for data and "
            "fetches each",
            f"{manual}, L2 Translation Lookaside Buffers: data {data_entries} entries in {data_ways} ways, fetches 512 "
            "in 8, 4K and 2M; a 1G page is smashed into 2M entries, and installed as 1G in the first level",
            f"{manual}, Hardware Page Table Walkers: a page directory cache of 64 entries for PML4 and PDP entries",
        ),
        assumed=(
            "the 64 entries of the page directory cache are 16 of PML4 and 48 of PDP entries, and stage 2 has as many",
            "page directory entries, which the second-level data TLB holds beside translations, have 64 entries of "
            "their own, and those of stage 2, too; 64 guest physical addresses are cached",
            "a cached entry of the guest's tables leads to the host's address of the next table, as Intel's does",
            "the data TLB of the second level is no skewed one; neighbouring 4K pages do not share an entry",
            _REPLACEMENT,
            _ASSOCIATED,
        ),
    )


PROCESSORS: Mapping[str, Processor] = MappingProxyType(
    {
        "skylake-sp": _SKYLAKE,
        "zen": _zen(1536, 12, "Software Optimization Guide for AMD Family 17h Processors (55723)"),
        "zen3": _zen(2048, 16, "Software Optimization Guide for AMD Family 19h Processors (56665)"),
    }
)
"""Processors by name: Xeon of the Skylake generation; EPYC 7001; EPYC 7003."""
