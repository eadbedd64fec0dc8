"""Translate addresses: what an access asks of a walk, and what a walk gives back.

>>> from pgemu import Config, Machine
>>> from pgemu.tables.translation import Access, Kind, translate
>>> machine = Machine(Config("pfnmap", pool=4 << 30))
>>> gmem = machine.create_guest_memfd(4 << 30, shared=True)
>>> process = machine.create_process()
>>> process.mmap(gmem, 0x7F00_0000_0000).status, process.touch(0x7F00_0000_1234).status
(0, 256)
>>> found = translate(machine, 0, process.root, [0x7F00_0000_1234, 0x7F00_0000_2000], Kind.USER_WRITE, Access())
>>> found.status.tolist(), found.level.tolist(), [hex(error) for error in found.error.tolist()]
([0, 1], [1, 1], ['0x0', '0x6'])
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pgemu.machine.arguments import guards
from pgemu.machine.columns import column_of
from pgemu.machine.core import row_of_format
from pgemu.machine.field_rules import amount, shown
from pgemu.machine.short import column, html_walks, walks
from pgemu.tables.access import Access as Access, Kind as Kind, rows_of
from pgemu_kernels import words as W
from pgemu_kernels.formats.page_format import Family
from pgemu_kernels.words.table_words import WalkStage, WalkStatus

if TYPE_CHECKING:
    from pgemu.machine.core import Core

__all__ = ("Access", "Kind", "NestedTranslation", "References", "Translation", "WalkStage", "WalkStatus",
           "translate", "translate_nested", "translated")  # fmt: skip

Array = np.ndarray[Any, Any]
_WORD, _BYTE = np.dtype(np.uint64), np.dtype(np.uint8)
_CODES = [np.array([kind], _BYTE) for kind in Kind]
_OF_DEVICES = (Family.VTD, Family.AMD_IOMMU)
_NO_WORDS = np.zeros(0, np.uint64)
_SCRATCH = int(W.WALK_SCRATCH)


class References(NamedTuple):
    """Entries read and written by each walk, in order: what a cache or TLB simulator feeds on.

    reads: uint64[n, k], physical addresses of entries, k the most that any walk read; of row i the first
    `read_counts[i]` count (uint8[n]). writes, write_counts: the same of the 8-byte writes of accessed and dirty
    bits. The stages (uint8, shaped like the addresses) are those of a nested walk: 1 an entry of the guest's,
    2 one of stage 2; 0 in a walk of one stage.
    """

    reads: Array
    read_counts: Array
    writes: Array
    write_counts: Array
    read_stages: Array
    write_stages: Array

    def __repr__(self) -> str:
        return f"References(read_counts={column(self.read_counts)}, write_counts={column(self.write_counts)})"


class Translation(NamedTuple):
    """What a batch of walks gave, in the order of the addresses.

    physical: uint64[n], 0 on failure. status: uint8[n], `WalkStatus`. level: uint8[n], of the leaf or of the
    entry at fault (the top level where the address itself is refused). error: uint64[n], the error word: x86
    page-fault error code; EPT exit qualification; NPT EXITINFO1; Arm DFSC[5:0], WnR in bit 6, S1PTW in bit 7; VT-d
    fault reason of legacy mode; AMD's IOMMU the flags of IO_PAGE_FAULT (PR 0x10, RW 0x20, PE 0x40, RZ 0x80);
    0 for a general protection fault, an EPT misconfiguration and OUTSIDE_MEMORY. references: if asked for.
    """

    physical: Array
    status: Array
    level: Array
    error: Array
    references: References | None = None

    def __repr__(self) -> str:
        return walks(self, WalkStatus)

    def _repr_html_(self) -> str:
        return html_walks(self, WalkStatus, {"level": self.level, "error": self.error})


def _kinds(kinds: int | Sequence[int] | Array, count: int) -> Array:
    """The codes as uint8[1] or uint8[n]. TypeError and ValueError for others."""
    if type(kinds) is Kind:
        return _CODES[kinds]
    given = column_of(kinds, count, "kinds")
    if given.size and given.max() > Kind.USER_FETCH:
        raise ValueError(f"kinds {shown(kinds)}: expected members of Kind, {int(Kind.READ)} to {int(Kind.USER_FETCH)}")
    return given.astype(np.uint8)


def _checked_root(name: str, root: int) -> np.uint64:
    if root >> 52 or root % W.PAGE_4K:
        raise ValueError(f"{name} {root:#x}: expected the physical address of a page, below 2**52")
    return np.uint64(root)


def _checked_out(out: Any, count: int) -> tuple[Array, Array, Array, Array]:
    """The arrays of an earlier translation, to be filled again."""
    if not isinstance(out, Translation):
        raise TypeError(f"out {shown(out)} ({type(out).__name__}): expected a Translation")
    for array, dtype in zip(out[:4], (_WORD, _BYTE, _BYTE, _WORD), strict=True):
        fits = isinstance(array, np.ndarray) and array.shape == (count,) and array.dtype == dtype
        if not fits or not array.flags.carray:
            raise ValueError(f"out {shown(out)}: expected arrays of {count} elements, as an earlier call gave them")
    return out[:4]


def _outputs(count: int, reads: int, writes: int, wanted: bool) -> tuple[Array, Array, Array]:
    """Lists of references as kernels fill them: reads, writes, and how many there are of each."""
    if not wanted:
        return _NO_WORDS, _NO_WORDS, _NO_WORDS
    return np.zeros(count * reads, np.uint64), np.zeros(count * writes, np.uint64), np.zeros(count * 2, np.uint64)


def _unpack(lists: Array, counts: Array) -> tuple[Array, Array]:
    """Addresses and stages of lists as kernels fill them (the stage in the low bits), as wide as the longest."""
    used = lists[:, : int(counts.max(initial=0))]
    stages = np.bitwise_and(used, np.uint64(7), out=np.empty(used.shape, np.uint8), casting="unsafe")
    return used & ~np.uint64(7), stages


def _references(reads: Array, writes: Array, counts: Array, count: int) -> References:
    """Lists as kernels fill them as `References`."""
    read_counts, write_counts = counts[0::2], counts[1::2]
    read, read_stages = _unpack(reads.reshape(count, reads.size // max(count, 1)), read_counts)
    written, write_stages = _unpack(writes.reshape(count, writes.size // max(count, 1)), write_counts)
    return References(
        read, read_counts.astype(np.uint8), written, write_counts.astype(np.uint8), read_stages, write_stages
    )


@cache
def _entry() -> Any:
    from pgemu_kernels.run.entries import translate as entry

    return entry


@guards()
def translate(
    machine: Core,
    format_row: int,
    root: int,
    addresses: Sequence[int] | Array,
    kinds: Kind | Sequence[int] | Array | None = None,
    access: Access | None = None,
    *,
    references: bool = False,
    out: Translation | None = None,
) -> Translation:
    """Translate addresses (uint64[n]) through the tables below physical address `root`, in order.

    format_row: row of the machine's formats (Machine.add_format; 0 host, 1 NPT, 2 EPT).
    kinds: `Kind` codes, one for each address or one for all, checked under `access`; the hardware's accessed and
    dirty bits are set where a walk succeeds. None: a plain walk, present or not, nothing checked, nothing set.
    references: also list the entries read and written, at most 6 of each. out: arrays of an earlier call with as
    many addresses, to be filled again. Tables may lie in the metadata zone or in guest frames.
    TypeError and ValueError for what is none of that: a format row or kind that is not there, a root that is no page,
    arrays that do not fit.
    """
    return translated(machine, format_row, root, np.asarray(addresses), kinds, access, references, out)


def translated(
    machine: Core,
    format_row: int,
    root: int,
    given: Array,
    kinds: Kind | Sequence[int] | Array | None = None,
    access: Access | None = None,
    references: bool = False,
    out: Translation | None = None,
) -> Translation:
    """translate() of arguments that were checked, the addresses a column; but `root`, the row, `kinds` and `out`."""
    count = given.size
    plain = kinds is None
    row = row_of_format(machine, "format_row", format_row)
    rows = rows_of(row, machine.arrays.ram.nbytes, None if plain else access, plain=plain)
    codes = _CODES[0] if kinds is None else _kinds(kinds, count)
    if not plain and row[W.F_FAMILY] in _OF_DEVICES and codes.max(initial=0) > Kind.WRITE:
        raise ValueError(f"kinds {shown(kinds)}: expected READ and WRITE, which is what devices do")
    if out is None:
        physical, error = np.empty(count, _WORD), np.zeros(count, _WORD)
        status, level = np.empty(count, _BYTE), np.empty(count, _BYTE)
    else:
        physical, status, level, error = _checked_out(out, count)
    reads, writes, counts = _outputs(count, W.WALK_READS, W.WALK_READS, references)
    _entry()(
        machine.descriptor, np.uint64(format_row), _checked_root("root", root), given, codes, rows,
        physical, status, level, error, reads, writes, counts, np.empty(_SCRATCH, _WORD),
    )  # fmt: skip
    listed = _references(reads, writes, counts, count) if references else None
    return Translation._make((physical, status, level, error, listed))


class NestedTranslation(NamedTuple):
    """What a batch of nested walks gave, in the order of the addresses.

    physical: uint64[n], host physical addresses, 0 on failure. status: uint8[n], `WalkStatus`. stage: uint8[n],
    `WalkStage`, where it failed. guest_level: uint8[n], of the guest's leaf, of its entry at fault, or (stage
    TABLE) of the entry that was to be read. host_level: uint8[n], the same of stage 2, 0 if the guest's tables
    failed; a TLB entry covers the smaller of the two leaves. error: uint64[n], the word of the stage that failed,
    as in `Translation`; an x86 guest gets a page fault's. fault_address: uint64[n], the virtual address for
    stage GUEST, the guest physical address for TABLE and FINAL. read_count, write_count: uint64[n], entries
    of both stages read and written; the latter only counts accessed and dirty bits. references: if asked for.
    """

    physical: Array
    status: Array
    stage: Array
    guest_level: Array
    host_level: Array
    error: Array
    fault_address: Array
    read_count: Array
    write_count: Array
    references: References | None = None

    def __repr__(self) -> str:
        return walks(self, WalkStatus)

    def _repr_html_(self) -> str:
        return html_walks(self, WalkStatus, {"guest level": self.guest_level, "host level": self.host_level})


def nested_rows(machine: Core, rows: tuple[int, int], accesses: tuple[Access, Access]) -> Array:
    """Access rows of the guest, then of stage 2. ValueError for formats that cannot stand there."""
    names = ("guest_format", "stage2_format")
    guest, stage2 = (row_of_format(machine, name, row) for name, row in zip(names, rows, strict=True))
    if guest[W.F_FAMILY] != Family.X86 or stage2[W.F_FAMILY] == Family.X86:
        raise ValueError(
            f"guest_format {rows[0]} and stage2_format {rows[1]}: expected x86-64 tables over EPT, NPT or Arm stage 2"
        )
    # Where a guest's table may lie is for stage 2 to say.
    anywhere = 1 << 52
    stage2_rows = rows_of(stage2, machine.arrays.ram.nbytes, accesses[1], plain=False)
    return np.concatenate([rows_of(guest, anywhere, accesses[0], plain=False), stage2_rows])


@guards(together=amount(1, W.WALK_BLOCK, f"an integer from 1 to {W.WALK_BLOCK}"))
def translate_nested(
    machine: Core,
    guest_format: int,
    guest_root: int,
    stage2_format: int,
    stage2_root: int,
    addresses: Sequence[int] | Array,
    kinds: Kind | Sequence[int] | Array = Kind.READ,
    access: Access | None = None,
    *,
    stage2_access: Access | None = None,
    references: bool = False,
    together: int = W.WALK_BLOCK,
) -> NestedTranslation:
    """Translate a guest's virtual addresses (uint64[n]) through its tables and stage 2, in order.

    guest_format, stage2_format: rows of the machine's formats. guest_root: guest physical address of the guest's
    top table; its tables lie in guest memory, reached through stage 2 (Machine.write_frame puts them there).
    access: the guest's control registers; stage2_access: those of stage 2, where they matter (default: the same).
    references: also list every entry read and written. together: how many walks are interleaved, at most 64;
    1 walks one after the other (to see what interleaving brings).
    TypeError and ValueError for formats, kinds, roots or `together` that cannot be.
    """
    from pgemu_kernels.run.entries import translate_nested as entry

    given = np.asarray(addresses)
    count = given.size
    access = access or Access()
    rows = nested_rows(machine, (guest_format, stage2_format), (access, stage2_access or access))
    physical, error, fault = (np.empty(count, np.uint64) for _ in range(3))
    status, stage = (np.empty(count, np.uint8) for _ in range(2))
    levels = np.empty((count, 2), np.uint8)
    reads, writes, counts = _outputs(count, W.NESTED_READS, W.NESTED_WRITES, references)
    counts = np.zeros(count * 2, np.uint64)
    entry(
        machine.descriptor, np.uint64(guest_format), _checked_root("guest_root", guest_root), np.uint64(stage2_format),
        _checked_root("stage2_root", stage2_root), given, _kinds(kinds, count), rows, physical, status, stage,
        levels.reshape(-1), error, fault, reads, writes, counts, np.zeros(W.NESTED_SCRATCH, np.uint64),
        np.uint64(together),
    )  # fmt: skip
    return NestedTranslation(
        physical, status, stage, levels[:, 0], levels[:, 1], error, fault, counts[0::2], counts[1::2],
        _references(reads, writes, counts, count) if references else None,
    )  # fmt: skip
