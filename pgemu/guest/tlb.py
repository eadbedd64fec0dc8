"""TLBs in front of a walk: what hits, what misses, and what the misses read.

>>> from pgemu import Config, Machine
>>> from pgemu.guest import Tlb
>>> table = Machine(Config()).create_page_table("x86-64")
>>> table.map_range(0x4000_0000, physical=0x8000_0000, length=4 << 20).detail  # two 2M leaves
2
>>> tlb = Tlb("skylake-sp")
>>> found = tlb.translate(table, [0x4000_0000, 0x4000_1000, 0x4020_0000])
>>> found.found.tolist(), found.levels.tolist(), found.references.tolist()  # TlbFound; the PDPTE is cached by then
([2, 0, 2], [2, 2, 2], [3, 0, 1])

A simulator calls `translate` with its batches for a table of one stage, or `translate_nested` for a guest's. Every
batch goes on where the last one ended; what is flushed on the real machine is for the caller to `flush`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np

from pgemu.guest.processors import LEVELS, PROCESSORS, Cache, Processor, TlbCache
from pgemu.machine.arguments import guards_methods
from pgemu.machine.arrays import I64, U8, U64, Integers
from pgemu.machine.columns import column_of
from pgemu.machine.core import Core
from pgemu.machine.field_rules import shown
from pgemu.tables.access import rows_of
from pgemu.tables.page_table import PageTable
from pgemu.tables.translation import checked_formats, checked_root
from pgemu_kernels import words as W
from pgemu_kernels.formats.page_format import Family
from pgemu_kernels.words import guest_words as G

__all__ = ("Tlb", "TlbCounts", "TlbFound", "TlbLookups")

Array = np.ndarray[Any, Any]

WHAT = ("reads", "writes", "fetches")
FOUND = ("first level", "second level", "missed")
_KINDS = {"data": int(G.KIND_DATA), "fetch": int(G.KIND_FETCH)}
_NO_WORDS = np.zeros(0, np.uint64)


class TlbFound(IntEnum):
    """Where an access found its translation."""

    FIRST = 0
    SECOND = 1
    MISSED = 2


class TlbLookups(NamedTuple):
    """What became of a batch of accesses, in their order.

    found: uint8[n], TlbFound. levels: uint8[n], of the entry used or made: the smaller one of the guest's leaf and
    stage 2's (1 = 4K, 2 = 2M, 3 = 1G), or less where no TLB holds that; 0: there is no translation. references:
    uint8[n], entries of tables that the walk read.
    """

    found: U8
    levels: U8
    references: U8

    def __repr__(self) -> str:
        missed = int(np.count_nonzero(self.found == TlbFound.MISSED))
        return f"TlbLookups({len(self.found):,}: {missed:,} missed, {int(self.references.sum()):,} references)"


@guards_methods
@dataclass(frozen=True, eq=False)
class TlbCounts:
    """What TLBs were asked, and what they had.

    Attributes:
        accesses: int64[3, 3, 4], by what was accessed (reads, writes, fetches), where it was found (first level,
            second level, missed) and level of the entry (0: no translation, 4K, 2M, 1G)
        sums: int64[3, 4], by what was accessed: entries of the guest's tables read, of stage 2 read; guest physical
            addresses found in their cache, and looked up
        flushes: how many times everything was flushed

    >>> table = Machine(Config()).create_page_table("x86-64")
    >>> table.map(0x4000_0000, 0x8000_0000).name
    'ok'
    >>> tlb = Tlb("skylake-sp")
    >>> tlb.translate(table, [0x4000_0000, 0x4000_0008]).found.tolist()
    [2, 0]
    >>> tlb.counts
    TlbCounts(2: 1 missed, 4 references)
    """

    accesses: I64
    sums: I64
    flushes: int

    def __repr__(self) -> str:
        return f"TlbCounts({self.total:,}: {self.missed:,} missed, {self.references:,} references)"

    @property
    def total(self) -> int:
        """Accesses."""
        return int(self.accesses.sum())

    @property
    def missed(self) -> int:
        """Accesses that no TLB had a translation for, and that have one."""
        return int(self.accesses[:, TlbFound.MISSED, 1:].sum())

    @property
    def untranslated(self) -> int:
        """Accesses without a translation."""
        return int(self.accesses[:, :, 0].sum())

    @property
    def references(self) -> int:
        """Entries of tables read by walks, of both stages."""
        return int(self.sums[:, :2].sum())

    def share(self, size: str) -> float:
        """Share of the translated accesses that went through an entry of "4K", "2M" or "1G"; 0 of none.

        ValueError for another size.

        >>> tlb.counts.share("4K")
        1.0
        """
        if size not in LEVELS:
            raise ValueError(f"size {shown(size)}: expected one of {', '.join(LEVELS)}")
        translated = self.total - self.untranslated
        return int(self.accesses[:, :, LEVELS[size]].sum()) / translated if translated else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts, ints and floats.

        >>> tlb.counts.to_json()["missed"]
        1
        """
        by_kind = {}
        for number, what in enumerate(WHAT):
            rows = self.accesses[number]
            names = ("none", *LEVELS)
            found = {where: dict(zip(names, (int(n) for n in rows[i]), strict=True)) for i, where in enumerate(FOUND)}
            guest, stage2, hits, nested = (int(n) for n in self.sums[number])
            by_kind[what] = {
                **found, "guest_references": guest, "stage2_references": stage2,
                "nested_hits": hits, "nested_lookups": nested,
            }  # fmt: skip
        totals = {
            "accesses": self.total, "missed": self.missed, "untranslated": self.untranslated,
            "references": self.references, "flushes": self.flushes,
        }  # fmt: skip
        return {**totals, **{f"share_{size}": self.share(size) for size in LEVELS}, "by_kind": by_kind}


@guards_methods
class Tlb:
    """TLBs and paging-structure caches of a processor, for each vCPU its own.

    :param processor: one of PROCESSORS by its name, or one that is made
    :param vcpus: how many; an access is looked up in those of its actor, modulo these

    >>> table = Machine(Config()).create_page_table("x86-64")
    >>> table.map_range(0x4000_0000, physical=0x8000_0000, length=4 << 20).detail
    2
    >>> tlb = Tlb("skylake-sp")
    """

    def __init__(self, processor: Processor | str = "skylake-sp", *, vcpus: int = 1) -> None:
        if isinstance(processor, str):
            if processor not in PROCESSORS:
                known = ", ".join(PROCESSORS)
                raise ValueError(f"processor {shown(processor)}: expected one of {known}, or a Processor")
            self.name = processor
            processor = PROCESSORS[processor]
        else:
            self.name = "own"
        if not 1 <= vcpus <= _MOST_VCPUS:
            raise ValueError(f"vcpus {vcpus}: expected 1 to {_MOST_VCPUS}")
        self.processor = processor
        self.vcpus = vcpus
        self.words = _lay_out(processor, vcpus)
        self._counts = np.zeros(G.COUNT_WORDS, np.uint64)

    def __repr__(self) -> str:
        return f"Tlb({self.name!r}, vcpus={self.vcpus})"

    @property
    def counts(self) -> TlbCounts:
        """What was counted by now (a copy)."""
        words = self._counts.astype(np.int64)
        accesses = words[: int(G.N_SUMS)].reshape(G.N_KINDS, G.N_FOUND, G.N_LEVELS)
        sums = words[int(G.N_SUMS) :].reshape(G.N_KINDS, G.SUM_WORDS)
        return TlbCounts(accesses, sums, int(self.words[G.TLB_FLUSHES]))

    def flush(self) -> None:
        """Forget every translation and cached entry, of all vCPUs.

        >>> tlb.translate(table, [0x4000_0000]), tlb.flush(), tlb.translate(table, [0x4000_0000])
        (TlbLookups(1: 1 missed, 3 references), None, TlbLookups(1: 1 missed, 3 references))
        """
        first = int(self.words[G.TLB_AREA])
        self.words[first:] = 0
        rows = self.words[int(G.TLB_ROWS) : int(G.TLB_ROWS) + int(self.words[G.TLB_LAST]) * G.CACHE_WORDS]
        rows.reshape(-1, G.CACHE_WORDS)[:, G.CACHE_HELD] = 0
        self.words[G.TLB_FLUSHES] += np.uint64(1)

    def translate(
        self, table: PageTable, addresses: Integers, flags: Integers = (0,), *,
        space: int = 0, actors: Integers = (0,),
    ) -> TlbLookups:  # fmt: skip
        """Look up accesses (uint64[n]) to a table of one stage, in order.

        flags: Flag.WRITE, Flag.EXEC or none, of each access, or one for all. space: the tag of the table's entries,
        below 65536. actors: the vCPU of each access, or one for all. ValueError for what does not fit, and for a table
        of another format than x86-64, EPT and NPT.

        >>> tlb.translate(table, [0x4000_0000, 0x4000_1000, 0x4020_0000]).found.tolist()
        [2, 0, 2]
        """
        if table.format.family not in (Family.X86, Family.EPT, Family.NPT):
            raise ValueError(f"table {table!r}: expected one of format x86-64, EPT or NPT")
        given = np.array(addresses, np.uint64)
        roots = _roots(space)
        roots[space] = table.root
        control = lookup_control((table.row, 0), (0, 0), direct=True)
        return self._look_up(table.machine, control, roots, given, flags, space, actors)

    def translate_nested(
        self, machine: Core, guest_format: int, guest_root: int, stage2_format: int, stage2_root: int,
        addresses: Integers, flags: Integers = (0,), *, space: int = 0,
        actors: Integers = (0,),
    ) -> TlbLookups:  # fmt: skip
        """Look up accesses (uint64[n]) of a guest whose tables lie in its memory, through stage 2, in order.

        The formats and roots are those of pgemu.tables.translation.translate_nested, the rest as of translate().

        >>> machine = Machine(Config("pfnmap", pool=2 << 20, page_size=2 << 20))
        >>> vm = machine.create_vm()
        >>> tlb.translate_nested(machine, 0, 0x1000, 1, vm.root, [0x7F00_0000_0000]).levels.tolist()  # none
        [0]
        """
        checked_formats(machine, guest_format, stage2_format)
        checked_root("stage2_root", stage2_root)
        given = np.array(addresses, np.uint64)
        roots = _roots(space)
        roots[space] = checked_root("guest_root", guest_root)
        control = lookup_control((guest_format, stage2_format), (stage2_root, stage2_root), direct=False)
        return self._look_up(machine, control, roots, given, flags, space, actors)

    def _look_up(
        self, machine: Core, control: Array, roots: Array, addresses: U64, flags: Any, space: int, actors: Any,
    ) -> TlbLookups:  # fmt: skip
        count = len(addresses)
        given = (("flags", flags, np.uint8), ("actors", actors, np.uint16))
        columns = (
            addresses,
            *(
                np.broadcast_to(column_of(values, count, name, np.dtype(kind)), count).copy()
                for name, values, kind in given
            ),
            np.full(count, space, np.uint16),
        )
        told = tuple(np.zeros(count, np.uint8) for _ in range(3))
        # Flushes of the machine are for the caller to make.
        self.words[G.TLB_SEEN] = flushes_of(machine)
        run_lookups(self, machine, machine, control, roots, columns, told)
        return TlbLookups(*told)


_MOST_VCPUS, _SPACES = 1 << 10, 1 << 16
ANYWHERE = 1 << 52  # bytes of memory, for access rows of tables whose words are looked for in both zones


def run_lookups(
    tlb: Tlb, guest: Core, machine: Core, control: Array, roots: Array, accesses: tuple[Array, ...],
    told: tuple[Array, ...] = (), between: tuple[Array, ...] = (),
) -> bool:  # fmt: skip
    """The kernel, from where `control` (guest_words.LOOK_*) says: whether an operation is for the caller to run.

    accesses: addresses, flags, actors, spaces. told: arrays of TlbLookups, to be filled, or none. between:
    operations with the place of each, as guest/tlb.py has them, or none.
    """
    from pgemu_kernels.run.entries import look_up, loops_of

    nothing = np.zeros(0, np.uint8)
    columns = between or (*(_NO_WORDS,) * 6, np.zeros(0, np.int64), _NO_WORDS)
    own, stage2 = (
        rows_of(core.format_row(int(control[word])), size, None, plain=True)
        for core, word, size in (
            (guest, G.LOOK_GUEST_FORMAT, ANYWHERE), (machine, G.LOOK_STAGE2_FORMAT, machine.arrays.ram.nbytes),
        )
    )  # fmt: skip
    return bool(
        look_up(
            guest.descriptor, machine.descriptor, tlb.words, control, tlb._counts, own, stage2, roots, *accesses,
            *(told or (nothing,) * 3), *columns, loops_of(),
        )
    )  # fmt: skip


def _roots(space: int) -> Array:
    if space >= _SPACES:
        raise ValueError(f"space {space}: expected a tag below {_SPACES}")
    return np.zeros(space + 1, np.uint64)


def lookup_control(rows: tuple[int, int], stage2: tuple[int, int], *, direct: bool) -> Array:
    """uint64[LOOK_WORDS] for a batch: rows of the guest's format and stage 2's, roots of shared and private memory."""
    control = np.zeros(int(G.LOOK_WORDS) + int(W.WALK_SCRATCH), np.uint64)
    words = (G.LOOK_GUEST_FORMAT, G.LOOK_STAGE2_FORMAT, G.LOOK_ROOT, G.LOOK_PRIVATE_ROOT, G.LOOK_DIRECT)
    for word, value in zip(words, (*rows, *stage2, direct), strict=True):
        control[word] = value
    return control


def flushes_of(machine: Core) -> int:
    """How many times a machine has flushed VMs."""
    first = int(W.STATS_COUNTERS) + int(W.Event.TLB_FLUSH_VM)
    return int(machine.arrays.stats[first : first + W.OPERATIONS * W.EVENTS : W.EVENTS].sum())


def _lay_out(processor: Processor, vcpus: int) -> Array:
    """The words of TLBs: header, a row for each cache, and an area for each vCPU."""
    caching: list[Cache | TlbCache] = [
        processor.pde, processor.pdpte, processor.pml4e, processor.stage2_pde, processor.stage2_pdpte,
        processor.stage2_pml4e, processor.nested, *processor.first, *processor.second,
    ]  # fmt: skip
    rows = np.zeros((len(caching), G.CACHE_WORDS), np.uint64)
    begin = G.AREA_CACHES
    for number, (row, cache) in enumerate(zip(rows, caching, strict=True)):
        sizes, kinds = (cache.sizes, cache.serves) if isinstance(cache, TlbCache) else ((), ())
        row[G.CACHE_SETS] = cache.entries // cache.ways - 1 if cache.ways else 0
        row[G.CACHE_WAYS], row[G.CACHE_ENTRIES], row[G.CACHE_BEGIN] = cache.ways, cache.entries, begin
        row[G.CACHE_SIZES] = sum(1 << LEVELS[size] for size in sizes)
        row[G.CACHE_KINDS] = sum(_KINDS[kind] for kind in kinds)
        begin += (3 if number < G.ROW_STAGE2 else 2) * cache.entries
    area = -(-begin // 8) * 8
    first = int(G.TLB_ROWS) + rows.size
    words = np.zeros(first + vcpus * area, np.uint64)
    words[int(G.TLB_ROWS) : first] = rows.reshape(-1)
    header = {
        G.TLB_SECOND: int(G.ROW_TLBS) + len(processor.first), G.TLB_LAST: len(caching), G.TLB_VCPUS: vcpus,
        G.TLB_AREA: first, G.TLB_AREA_WORDS: area,
    }  # fmt: skip
    for word, value in header.items():
        words[word] = value
    return words
