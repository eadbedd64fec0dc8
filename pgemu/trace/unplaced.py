"""Records that came without a memory layout, as tables of the schema's columns do: where their guest memory lies.

It is what the records say of it (MMAP, BIND), what the user says (`--memslot`), or inferred from the addresses as for
logs. Then an offset into the inode tells of memory only where it is the address, too; elsewhere it is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from pgemu.errors import InputError
from pgemu.trace.conversions import contradictions
from pgemu.trace.lowered import Accounting, Init, Lowered, LoweringOptions
from pgemu.trace.lowering import NOT_GUEST_MEMORY, initial, setup_records
from pgemu.trace.memory_layout import (
    Layout,
    Region,
    Slot,
    bind_slots,
    given_layout,
    grow,
    inferred_slots,
    place_regions,
    ram_ranges,
)
from pgemu.trace.range_index import covered
from pgemu.trace.schema import COLUMNS, Operation, Records
from pgemu_kernels.words.operations import PAGE_4K, Flag
from pgemu_kernels.words.rows import NO_INODE

__all__ = ("Unplaced", "place")

NO_HOST_ADDRESSES = f"{NOT_GUEST_MEMORY} (no mmap row: host addresses unknown)"
_MAKES_MEMORY = (Operation.MMAP, Operation.BIND)
_GPA_LIMIT = 1 << 52  # physical addresses of x86-64


def _reading(column: str, meaning: str) -> list[int]:
    """Codes of the operations of which a column means something."""
    return [int(op) for op, meanings in COLUMNS.items() if meanings.get(column, "").startswith(meaning)]


_GPA, _HVA, _INTO_INODE = _reading("address", "GPA"), _reading("address", "HVA"), _reading("offset", "bytes into")


@dataclass(frozen=True)
class Unplaced:
    """Records without a memory layout.

    Attributes:
        records: the operations, in order
        source: name of the file
        fault_levels: as in Lowered
        notes: what of the file was taken to mean something, or left out, in words
    """

    records: Records
    source: str
    fault_levels: npt.NDArray[np.uint8] | None = None
    notes: tuple[str, ...] = ()


def place(found: Unplaced, options: LoweringOptions) -> Lowered:
    """Say where the guest memory of records lies.

    :raises InputError: an option that only logs follow, or slots that are at odds with the records (with the row)
    """
    logs_only = replace(
        options, page_size=LoweringOptions().page_size, init="auto", memslots=(), other_ranges=(), guest_memory=None
    )
    if logs_only != LoweringOptions():
        raise InputError("the VM's process, its addresses and the meaning of MADV_DONTNEED are fixed", found.source)
    records = found.records
    reading = {name: np.isin(records.op, codes) for name, codes in (("gpa", _GPA), ("hva", _HVA), ("in", _INTO_INODE))}
    # An access by a mapping that is there names no address of its own.
    reading["gpa"] &= (records.op != Operation.NESTED_MAP) | (records.flags & np.uint8(Flag.THROUGH) == 0)
    reading["in"] &= ~_of_other_memory(records)
    _check_numbers(found)
    _check_ranges(found, reading["gpa"], reading["in"])
    maps = [Region(*one) for one in _columns(records, Operation.MMAP, "address", "offset", "length") if one[2]]
    if (records.op == Operation.BIND).any():
        if options.memslots:
            raise InputError("its memory slots are records (bind), which --memslot cannot replace", found.source)
        layout, setup = _recorded(records, maps, options), Records.build(0)
        first = int(np.argmin(np.isin(records.op, _MAKES_MEMORY))) if not _all_make(records) else len(records)
    else:
        layout = _slots_for(found, options, reading)
        regions = layout.regions
        time = int(records.time[0]) if len(records) else 0
        layout = replace(layout, regions=tuple(maps) or regions)
        setup = setup_records(() if maps else regions, layout.slots, time)
        first = 0
    ends = (records.offset + records.length)[reading["in"]]
    needed = max([int(ends.max()) if len(ends) else 0, *(slot.offset + slot.size for slot in layout.slots)])
    layout = grow(layout, options.page_size, options.guest_memory, needed)
    kept, reasons = _kept(records, layout, reading["hva"], bool(maps))
    return _lowered(found, options, layout, setup, first, kept, reasons)


def _of_other_memory(records: Records) -> npt.NDArray[np.bool_]:
    """Maps for devices whose `offset` is no place in the guest_memfd: a host address, or what another IOAS has."""
    copies = records.flags & np.uint8(int(Flag.COPY)) != 0
    found: npt.NDArray[np.bool_] = (records.op == Operation.DMA_MAP) & (copies | (records.object == NO_INODE))
    return found


def _all_make(records: Records) -> bool:
    return bool(np.isin(records.op, _MAKES_MEMORY).all())


def _columns(records: Records, op: Operation, *names: str) -> list[tuple[int, ...]]:
    chosen = records.op == op
    return list(zip(*(getattr(records, name)[chosen].tolist() for name in names), strict=True))


def _check_numbers(found: Unplaced) -> None:
    """Refuse other VMs and inodes than the one that there is, and a kind of memory that is none or both."""
    records = found.records
    both = np.uint64(Flag.PRIVATE | Flag.SHARED)
    kind = records.flags & both
    converts = records.op == Operation.CONVERT
    known = (records.object == 0) | (records.object == NO_INODE) | _of_other_memory(records)
    for name, bad, expected in (
        ("vm", np.isin(records.op, _reading("vm", "VM")) & (records.vm != 0), "0, the only VM of a trace"),
        ("object", np.isin(records.op, _reading("object", "inode")) & ~known, "0, the only guest_memfd of a trace"),
        ("flags", converts & (kind == 0), "PRIVATE or SHARED"),
        ("flags", (converts | (records.op == Operation.GUEST_FAULT)) & (kind == both), "PRIVATE or SHARED, not both"),
    ):
        if bad.any():
            row = int(np.argmax(bad))
            raise InputError(f"row {row}: {name} {int(getattr(records, name)[row])}, expected {expected}", found.source)


def _check_ranges(found: Unplaced, gpa: npt.NDArray[np.bool_], inode: npt.NDArray[np.bool_]) -> None:
    """Refuse what is no guest address, and what ends beyond any memory."""
    records, limit = found.records, np.uint64(_GPA_LIMIT)
    for name, bad in (
        ("address", gpa & (records.address >= limit)),
        ("offset", inode & (records.offset >= limit)),
        ("length", (gpa | inode) & (records.length > limit)),
    ):
        if bad.any():
            row = int(np.argmax(bad))
            value = int(getattr(records, name)[row])
            raise InputError(f"row {row}: {name} {value:#x}, expected guest memory below 2^52", found.source)


def _recorded(records: Records, maps: Sequence[Region], options: LoweringOptions) -> Layout:
    """The layout that MMAP and BIND say, slots as they stand at the end."""
    slots: dict[int, Slot] = {}
    making = np.isin(records.op, (Operation.BIND, Operation.UNBIND))
    parts = (getattr(records, name)[making].tolist() for name in ("op", "address", "offset", "length"))
    for op, gpa, offset, size in zip(*parts, strict=True):
        slots.pop(gpa, None)
        if op == Operation.BIND:
            slots[gpa] = Slot(len(slots), gpa, size, _host(maps, offset), offset)
    last = [replace(slots[gpa], slot=number) for number, gpa in enumerate(sorted(slots))]
    regions = tuple(sorted(maps, key=lambda region: region.address))
    return Layout(0, options.page_size, regions, tuple(last), (), "trace")


def _host(maps: Sequence[Region], offset: int) -> int:
    """Host address of an offset, 0 where nothing maps it."""
    return next((one.address + offset - one.offset for one in maps if one.offset <= offset < one.offset + one.size), 0)


def _slots_for(found: Unplaced, options: LoweringOptions, reading: dict[str, npt.NDArray[np.bool_]]) -> Layout:
    """The layout that the user states, or that is inferred from what is touched."""
    records, gpa, inode = found.records, reading["gpa"], reading["in"] & (found.records.op != Operation.MMAP)
    if options.memslots:
        layout = given_layout(options.memslots, (), (), options.page_size)
        outside = gpa & ~covered(records.address, [(slot.gpa, slot.gpa + slot.size - 1) for slot in layout.slots])
        if outside.any():
            row = int(np.argmax(outside))
            address = int(records.address[row])
            raise InputError(f"row {row}: address {address:#x} lies outside the given memory slots", found.source)
        return layout
    page = np.uint64(PAGE_4K)
    first = np.concatenate([records.address[gpa], records.offset[inode]])
    length = np.concatenate([np.where(gpa, np.uint64(1), page)[gpa], np.maximum(records.length, page)[inode]])
    slots = inferred_slots(first, first + length)
    regions = place_regions(ram_ranges(slots), slots, options.page_size)
    layout = Layout(0, options.page_size, tuple(regions), tuple(bind_slots(slots, regions)), (), "inferred")
    same = [(slot.gpa, slot.gpa + slot.size - 1) for slot in layout.slots if slot.gpa == slot.offset]
    unknown = inode & ~covered(records.offset, same)
    if unknown.any():
        row = int(np.argmax(unknown))
        offset = int(records.offset[row])
        raise InputError(
            f"row {row}: which guest memory offset {offset:#x} is cannot be inferred, give --memslot GPA:SIZE:OFFSET",
            found.source,
        )
    return layout


def _kept(
    records: Records, layout: Layout, hva: npt.NDArray[np.bool_], mapped: bool
) -> tuple[npt.NDArray[np.bool_], Counter[str]]:
    """Which records ask something of guest memory: host addresses do only where they are known, as in logs."""
    if mapped:
        return np.ones(len(records), dtype=bool), Counter()
    known = layout.regions if layout.origin == "given" else ()
    ranges = [(region.address, region.end - 1) for region in known]
    kept = ~hva | covered(records.address, ranges)
    copies = records.flags & np.uint8(int(Flag.COPY)) != 0
    kept &= ~_of_other_memory(records) | copies | covered(records.offset, ranges)
    reason = NOT_GUEST_MEMORY if layout.origin == "given" else NO_HOST_ADDRESSES
    return kept, +Counter({reason: int((~kept).sum())})


def _lowered(
    found: Unplaced, options: LoweringOptions, layout: Layout, setup: Records, first: int,
    kept: npt.NDArray[np.bool_], reasons: Counter[str],
) -> Lowered:  # fmt: skip
    """The trace behind what makes its memory; the records before `first` make it themselves."""
    places = np.flatnonzero(kept)
    records = Records.concatenate([setup, found.records.take(places)])
    levels = found.fault_levels
    if levels is not None:
        levels = np.concatenate([np.zeros(len(setup), np.uint8), levels[places]])
    asked = len(kept) - first
    accounting = Accounting(
        events=asked, inputs=+Counter({"record": asked}), operations=len(records), setup=len(setup) + first,
        without_operation=reasons,
    )  # fmt: skip
    converts = bool((records.op == Operation.CONVERT).any())
    init: Init = initial(options, records)
    notes = found.notes + contradictions(records, init)
    return Lowered(records, layout, init, converts, accounting, found.source, levels, notes=notes)
