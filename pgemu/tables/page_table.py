"""Page tables of any format, edited as Linux edits them: what simulators of TLBs and caches stand on.

>>> from pgemu import Config, Machine
>>> table = Machine(Config()).create_page_table("x86-64")
>>> table.map_range(0x4000_0000, physical=0x8000_0000, length=3 << 20).detail  # one 2M leaf, 256 of 4K
257
>>> result = table.unmap(0x4000_1000)  # splits the large one
>>> result.flush
Flush(0x40000000, 0x40200000, level=1)
>>> [(level, hex(entry)) for level, _, entry in table.walk(0x4000_2000)][-2:]
[(2, '0x6067'), (1, '0x80002867')]
>>> table.translate([0x4000_1234, 0x4000_2234]).status.tolist()  # pgemu.tables.translation.WalkStatus
[1, 0]

Every edit returns what must be flushed from TLBs, on request the entries it read and wrote, in order. Levels are KVM's:
1 = 4K, 2 = 2M, 3 = 1G. Errors that a kernel returns are results, ValueError is misuse.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pgemu.machine.arrays import U64, Integers
from pgemu.machine.short import html_table
from pgemu.tables.edits import EditResult as EditResult, EditResults as EditResults, log_words, size_of
from pgemu.tables.flush import Flush
from pgemu.tables.formats import add_formats, format_of
from pgemu.tables.reading import Reading
from pgemu_kernels import words as W
from pgemu_kernels.formats.page_format import FlushRule, PageFormat, UnmapRule
from pgemu_kernels.words.operations import PAGE_4K
from pgemu_kernels.words.table_words import Edit

if TYPE_CHECKING:
    from pgemu.machine.core import Core

Array = np.ndarray[Any, Any]
Partial = Literal["split", "whole"]
Tables = Literal["munmap", "madvise", "zap"]

_TABLE_FLAGS = {"munmap": int(W.EDIT_FREE), "madvise": int(W.EDIT_FREE_COVERED), "zap": 0}
_REPLACE, _EXACT = int(W.EDIT_REPLACE), int(W.EDIT_EXACT)
_NO_ADDRESS = np.zeros(1, np.uint64)


class PageTable(Reading):
    """One tree of tables. Made by Machine.create_page_table().

    A `log` argument is a uint64 array of shape (n, 3), C order: kind (words.LogKind) | level << 8, address, value;
    an exchange of an entry is one WRITE. An edit walks down from the root for each run of entries within a table.
    `partial` tells what happens to a leaf that a range covers in part: "split" it, or edit it "whole" as a zap of
    KVM does. `tables` tells which empty tables are freed: "munmap" all, "madvise" the last-level ones that the range
    covers (CONFIG_PT_RECLAIM), "zap" none. None is what Linux does with the format: a process splits and frees at
    munmap, KVM on x86 goes whole and frees none, on Arm it goes whole and frees.

    >>> machine = Machine(Config())
    >>> table = machine.create_page_table("x86-64")
    >>> table.map_range(0x4000_0000, 0x8000_0000, 4 << 20)
    EditResult(status=0, detail=2, flush=None, records=0)
    """

    def __init__(self, machine: Core, fmt: PageFormat) -> None:
        self.machine = machine
        self._request = np.zeros(W.E_WORDS, np.uint64)
        self._formats = add_formats(machine, fmt)
        self._row = next(iter(self._formats))
        self._root = 0
        if self._one(Edit.CREATE, 0).status != 0:
            raise OSError(W.ENOMEM, f"no {fmt.root_tables} frames in a row for a top table")
        self._root = int(self._request[W.E_ROOT])
        machine.tables_made.append(self)
        machine._tell_of_tables()

    def __repr__(self) -> str:
        return f"PageTable({self.format.name!r}, root={self.root:#x})"

    def _repr_html_(self) -> str:
        pages = self.table_pages().items() if self.root else ()
        return html_table(
            (f"{self.format.name}, level", "table pages"), [(level, len(tables)) for level, tables in pages]
        )

    @classmethod
    def create(cls, machine: Core, fmt: PageFormat | str, **parameters: Any) -> PageTable:
        """See Machine.create_page_table.

        >>> PageTable.create(machine, "ept").format.name
        'ept'
        """
        if isinstance(fmt, str):
            return cls(machine, format_of(fmt, parameters))
        if parameters:
            raise ValueError(f"{', '.join(parameters)}: expected none beside a format that is made")
        return cls(machine, fmt)

    def destroy(self, *, log: U64 | None = None) -> EditResult:
        """Free the whole tree; nothing else may be done with it then. A process is flushed, a VM is not: it is gone.

        >>> table.destroy().name, table.root
        ('ok', 0)
        """
        result = self._one(Edit.DESTROY, 0, log=log)
        self._root = 0
        self._moved()
        return result

    # ------------------------------------------------------------------ map

    def map(
        self, address: int, physical: int, *, level: int = 1, attributes: int | None = None, replace: bool = False,
        log: U64 | None = None,
    ) -> EditResult:  # fmt: skip
        """Map one leaf of a level.

        attributes: bits of a 4K leaf (format.leaf[0] if None); a larger leaf gets them in its own form.
        replace: what is mapped there goes as on a fault of a VM: tables are torn down, larger leaves split (Arm:
        dropped, the rest to be faulted in again); otherwise -EEXIST. -EINVAL: alignment, reserved bits, level.
        -ERANGE: beyond the input addresses. -ENOMEM: tables linked by then stay. -EAGAIN: the entry is frozen.

        >>> table.map(0x5000_0000, 0x1000), table.map(0x5000_0000, 0x1000).name
        (EditResult(status=0, detail=1, flush=None, records=0), '-EEXIST')
        """
        flags = _EXACT | (_REPLACE if replace else 0)
        return self._one(
            Edit.MAP, address, physical, size_of(level), level, self._bits(attributes), flags=flags, log=log
        )

    def map_many(
        self, addresses: Integers, physical: Integers, *, level: int = 1, attributes: int | None = None,
        replace: bool = False, log: U64 | None = None,
    ) -> EditResults:  # fmt: skip
        """Map one leaf of a level at each of `addresses` (uint64[n]) to `physical` (uint64[n]).

        >>> table.map_many([0x5000_0000, 0x5000_1000], [0x1000, 0x2000]).detail.tolist()
        [1, 1]
        """
        flags = _EXACT | (_REPLACE if replace else 0)
        return self._run(
            Edit.MAP, addresses, physical, size_of(level), level, self._bits(attributes), flags=flags, log=log
        )

    def map_range(
        self, address: int, physical: int, length: int, *, max_level: int | None = None,
        attributes: int | None = None, replace: bool = False, log: U64 | None = None,
    ) -> EditResult:  # fmt: skip
        """Map [address, address + length) with the largest leaves that both addresses and the length allow.

        The first leaf that cannot be mapped ends it; those before it stay. Errors as for `map`.

        >>> table.map_range(0x6000_0000, 0x1000_0000, 3 << 20).detail  # one leaf of 2M, 256 of 4K
        257
        """
        flags = _REPLACE if replace else 0
        level = self.format.largest_leaf if max_level is None else max_level
        return self._one(Edit.MAP, address, physical, length, level, self._bits(attributes), flags=flags, log=log)

    def map_range_many(
        self, addresses: Integers, physical: Integers, length: int, *, max_level: int | None = None,
        attributes: int | None = None, replace: bool = False, log: U64 | None = None,
    ) -> EditResults:  # fmt: skip
        """map_range() of `length` bytes at each of `addresses` (uint64[n]).

        >>> table.map_range_many([0x6000_0000, 0x7000_0000], [0, 2 << 20], 2 << 20).detail.tolist()
        [1, 1]
        """
        flags = _REPLACE if replace else 0
        level = self.format.largest_leaf if max_level is None else max_level
        return self._run(Edit.MAP, addresses, physical, length, level, self._bits(attributes), flags=flags, log=log)

    # ------------------------------------------------------------------ unmap and protect

    def unmap(
        self, address: int, length: int = PAGE_4K, *, partial: Partial | None = None, tables: Tables | None = None,
        log: U64 | None = None,
    ) -> EditResult:  # fmt: skip
        """Clear the leaves of a range: -ENOENT if there was none, -ENOMEM if one could not be split.

        >>> table.unmap(0x4000_1000).flush
        Flush(0x40000000, 0x40200000, level=1)
        """
        flags = self._partial(partial) | self._tables(tables)
        return self._one(Edit.UNMAP, address, 0, length, flags=flags, log=log)

    def unmap_many(
        self, addresses: Integers, length: int = PAGE_4K, *, partial: Partial | None = None,
        tables: Tables | None = None, log: U64 | None = None,
    ) -> EditResults:  # fmt: skip
        """unmap() of `length` bytes at each of `addresses` (uint64[n]).

        >>> table.unmap_many([0x4000_0000, 0x4020_0000], 2 << 20)
        EditResults(2: 2 ok; detail=[1 1], flush=Flush(0x40000000, 0x40400000, level=2, freed_tables=True), records=0)
        """
        flags = self._partial(partial) | self._tables(tables)
        return self._run(Edit.UNMAP, addresses, _NO_ADDRESS, length, flags=flags, log=log)

    def free_tables(
        self, address: int, length: int, *, tables: Tables = "munmap", log: U64 | None = None
    ) -> EditResult:
        """Free the empty tables of a range (free_pgtables()): how many.

        >>> table.unmap(0x4000_0000, 4 << 20, tables="zap").name, table.free_tables(0x4000_0000, 1 << 30).detail
        ('ok', 2)
        """
        return self._one(Edit.FREE_TABLES, address, 0, length, flags=self._tables(tables), log=log)

    def protect(
        self, address: int, length: int = PAGE_4K, *, set_bits: int = 0, clear_bits: int = 0,
        partial: Partial | None = None, log: U64 | None = None,
    ) -> EditResult:  # fmt: skip
        """Clear, then set bits of a range's leaves, given as those of a 4K leaf.

        -EINVAL for address and type bits and where a leaf would be absent, reserved or misconfigured.

        >>> table.protect(0x4000_0000, 2 << 20, clear_bits=2).flush  # bit 1: writable
        Flush(0x40000000, 0x40200000, level=2)
        """
        flags = self._partial(partial)
        return self._one(Edit.PROTECT, address, 0, length, 0, set_bits, clear_bits, flags, log)

    def protect_many(
        self, addresses: Integers, length: int = PAGE_4K, *, set_bits: int = 0, clear_bits: int = 0,
        partial: Partial | None = None, log: U64 | None = None,
    ) -> EditResults:  # fmt: skip
        """protect() of `length` bytes at each of `addresses` (uint64[n]).

        >>> table.protect_many([0x4000_0000, 0x4020_0000], 2 << 20, clear_bits=2).detail.tolist()
        [1, 1]
        """
        flags = self._partial(partial)
        return self._run(Edit.PROTECT, addresses, _NO_ADDRESS, length, 0, set_bits, clear_bits, flags, log)

    # ------------------------------------------------------------------ accessed and dirty

    def clear_accessed(self, address: int, length: int = PAGE_4K, *, log: U64 | None = None) -> EditResult:
        """Clear the accessed bit of a range's leaves: `detail` had it. Not flushed, as in Linux.

        -EOPNOTSUPP where the hardware sets none. Sources: arch/x86/mm/pgtable.c:ptep_clear_flush_young(),
        arch/arm64/kvm/hyp/pgtable.c:kvm_pgtable_stage2_test_clear_young().

        >>> table.clear_accessed(0x4000_0000, 4 << 20).detail
        2
        """
        return self._one(Edit.CLEAR_ACCESSED, address, 0, length, log=log)

    def clear_accessed_many(self, addresses: Integers, length: int = PAGE_4K, *, log: U64 | None = None) -> EditResults:
        """clear_accessed() of `length` bytes at each of `addresses` (uint64[n]); detail tells which had it.

        >>> table.clear_accessed_many([0x4000_0000, 0x4000_0000]).detail.tolist()
        [1, 0]
        """
        return self._run(Edit.CLEAR_ACCESSED, addresses, _NO_ADDRESS, length, log=log)

    def clear_dirty(self, address: int, length: int = PAGE_4K, *, log: U64 | None = None) -> EditResult:
        """Clear the dirty bit of a range's leaves: `detail` had it. Arm's is the right to write: they are protected.

        >>> table.clear_dirty(0x4000_0000, 4 << 20)
        EditResult(status=0, detail=2, flush=Flush(0x40000000, 0x40400000, level=2), records=0)
        """
        return self._one(Edit.CLEAR_DIRTY, address, 0, length, log=log)

    def clear_dirty_many(self, addresses: Integers, length: int = PAGE_4K, *, log: U64 | None = None) -> EditResults:
        """clear_dirty() of `length` bytes at each of `addresses` (uint64[n]); detail tells which had it.

        >>> table.clear_dirty_many([0x4000_0000, 0x4000_0000]).detail.tolist()
        [1, 0]
        """
        return self._run(Edit.CLEAR_DIRTY, addresses, _NO_ADDRESS, length, log=log)

    # ------------------------------------------------------------------ split and collapse

    def split(self, address: int, length: int = PAGE_4K, *, level: int = 1, log: U64 | None = None) -> EditResult:
        """Split the leaves over a range until none is larger than `level`: how many splits.

        x86 KVM: tdp_mmu_split_huge_pages_root(), no flush. Arm: a 1G block whose pages are asked for is split whole,
        as stage2_split_walker() does, where 513 frames are left. -ENOENT without a leaf, -ENOMEM.

        >>> table.split(0x4000_0000, 4 << 20).detail
        2
        """
        return self._one(Edit.SPLIT, address, 0, length, level, log=log)

    def split_many(
        self, addresses: Integers, length: int = PAGE_4K, *, level: int = 1, log: U64 | None = None
    ) -> EditResults:
        """split() of `length` bytes at each of `addresses` (uint64[n]).

        >>> table.split_many([0x4000_0000, 0x4020_0000]).detail.tolist()
        [1, 1]
        """
        return self._run(Edit.SPLIT, addresses, _NO_ADDRESS, length, level, log=log)

    def collapse(self, address: int, *, level: int = 2, log: U64 | None = None) -> EditResult:
        """Put one leaf of `level` in the place of 512 that follow one another and are alike; `detail` is 1 then.

        Accessed and dirty bits are OR-ed. -ENOENT: nothing there. -EINVAL: not alike, not aligned, or no table.
        KVM does this when dirty logging ends (recover_huge_pages_range()); 6.12 dropped the table and left the entry
        empty, which is unmap() of the range and free_tables().

        >>> table.split(0x4000_0000).detail, table.collapse(0x4000_0000).detail
        (1, 1)
        """
        return self._one(Edit.COLLAPSE, address, 0, size_of(level), level, log=log)

    def collapse_many(self, addresses: Integers, *, level: int = 2, log: U64 | None = None) -> EditResults:
        """collapse() at each of `addresses` (uint64[n]).

        >>> table.split(0x4000_0000, 4 << 20).detail, table.collapse_many([0x4000_0000, 0x4020_0000]).detail.tolist()
        (2, [1, 1])
        """
        return self._run(Edit.COLLAPSE, addresses, _NO_ADDRESS, size_of(level), level, log=log)

    # ------------------------------------------------------------------ entries

    def store(self, address: int, entry: int, *, level: int = 1, log: U64 | None = None) -> EditResult:
        """Store any value in the entry of `level` over `address`: `detail` is what was there.

        -ENOENT without a table of that level, -EBUSY over a table, -EINVAL for an entry that points to a table, and
        for a change of a valid entry that Arm allows only through an invalid one and a flush (break-before-make).

        >>> hex(table.store(0x4000_0000, 0, level=2).detail), table.walk(0x4000_0000)[-1].entry
        ('0x800008e7', 0)
        >>> table.store(0x4000_0000, 0).name  # there is no table of 4K entries
        '-ENOENT'
        """
        return self._one(Edit.STORE, address & -PAGE_4K, 0, PAGE_4K, level, entry, log=log)

    # ------------------------------------------------------------------ calling the kernel

    def _bits(self, attributes: int | None) -> int:
        return self.format.leaf[0] if attributes is None else attributes

    def _rules(self) -> tuple[int, int]:
        """What Linux does with the format: words.EDIT_* of an unmap, and of a protect."""
        return self._partial(None) | self._tables(None), self._partial(None)

    def _partial(self, partial: Partial | None) -> int:
        self._check_rule("partial", partial)
        if partial is None:
            partial = "split" if self.format.flush == FlushRule.PROCESS else "whole"
        return int(W.EDIT_SPLIT) if partial == "split" else 0

    def _check_rule(self, name: str, given: str | None) -> None:
        if given is not None and self.format.unmap_rule != UnmapRule.EVERY_LEAF:
            raise ValueError(f"{name} {given!r}: expected None, for a domain's kernel has a rule of its own")

    def _tables(self, tables: Tables | None) -> int:
        self._check_rule("tables", tables)
        if tables is None:
            tables = "zap" if self.format.flush == FlushRule.WHOLE_VM else "munmap"
        return _TABLE_FLAGS[tables]

    def _one(
        self, op: Edit, address: int, physical: int = 0, length: int = PAGE_4K, level: int = 0, set_bits: int = 0,
        clear_bits: int = 0, flags: int = 0, log: U64 | None = None,
    ) -> EditResult:  # fmt: skip
        """One edit at one address."""
        at, to = np.array([address], np.uint64), np.array([physical], np.uint64)
        status, detail, flush, records = self._run(op, at, to, length, level, set_bits, clear_bits, flags, log)
        return EditResult(int(status[0]), int(detail[0]), flush, records)

    def _run(
        self, op: Edit, addresses: Any, physical: Any, length: int = PAGE_4K, level: int = 0, set_bits: int = 0,
        clear_bits: int = 0, flags: int = 0, log: U64 | None = None,
    ) -> EditResults:  # fmt: skip
        """One edit at each address."""
        from pgemu_kernels.run.entries import edit

        if op != Edit.CREATE:
            self._check_root()
        if physical.size not in (1, addresses.size):
            raise ValueError(f"physical of {physical.size} elements: expected {addresses.size} or 1, as of addresses")
        request = self._request
        request[:] = 0
        words = (op, self._row, self.root, length, level if 0 <= level < 8 else 0, set_bits, clear_bits, flags)
        request[: len(words)] = np.array(words, np.uint64)
        status = np.empty(addresses.size, np.int64)
        detail = np.zeros(addresses.size, np.uint64)
        edit(self.machine.descriptor, request, addresses, physical, status, detail, log_words(log))
        if request[W.E_ROOT] != self._root and self._root:
            self._row, self._root = int(request[W.E_FORMAT]), int(request[W.E_ROOT])
            self._moved()
        return EditResults(status, detail, self._flush(), int(request[W.E_RECORDS]))

    def _flush(self) -> Flush | None:
        request = self._request
        start, end = int(request[W.E_FLUSH_START]), int(request[W.E_FLUSH_END])
        if end == 0:
            return None
        bits = self.format.input_bits
        offset = (1 << 64) - (1 << bits) if self.format.sign_extended else 0
        # Addresses of the upper half are sign-extended; a batch in both halves covers the hole between them, too.
        first = start + offset if start >> bits - 1 else start
        last = end + offset if end - 1 >> bits - 1 else end
        return Flush(first, last, int(request[W.E_FLUSH_LEVEL]), bool(request[W.E_FREED]))


def table_of_rows(machine: Core, root: int, row: int, formats: dict[int, PageFormat]) -> PageTable:
    """A table that a machine has: its root, and of the rows of its formats, the least first, the one it is in."""
    table = object.__new__(PageTable)
    table.machine = machine
    table._request = np.zeros(W.E_WORDS, np.uint64)
    table._formats, table._row, table._root = formats, row, root
    return table
