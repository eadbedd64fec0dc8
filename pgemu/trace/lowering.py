"""From what a log's kernel was asked to operations on guest_memfd.

The logs are those of VMs over other memory, or of VMs whose shared memory was elsewhere. Lowering says what the
same requests are when one guest_memfd holds all guest memory, private and shared: a host fault in a memory
slot's host range is one on guest_memfd, MADV_DONTNEED is a hole, a changed attribute is a conversion.
Whole columns are worked on at a time; only slot lines are played one by one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from pgemu.errors import InputError
from pgemu.trace.conversions import PRIVATE_ATTRIBUTE, contradictions, with_requests
from pgemu.trace.doubts import mostly_left_out
from pgemu.trace.events import LEVELS, REQUEST, Input
from pgemu.trace.guest_addresses import SAYS_PRIVATE, GuestAddresses, gfn_range, is_qualification
from pgemu.trace.log import NO_VCPU, Doubt, Log
from pgemu.trace.lowered import Accounting, Init, Lowered, LoweringOptions, private_because
from pgemu.trace.memory_layout import (
    Layout,
    Region,
    Slot,
    given_layout,
    grow,
    inferred_slots,
    place_regions,
    ram_ranges,
    with_host_addresses,
)
from pgemu.trace.processes import of_vm
from pgemu.trace.range_index import ALWAYS, RangeIndex, alike, pieces
from pgemu.trace.schema import ACTOR_LIMIT, FIRST_HOST_ACTOR, Records
from pgemu.trace.slot_history import SlotHistory, SlotLine, standing_before
from pgemu_kernels.words.operations import PAGE_4K, Flag, Operation
from pgemu_kernels.words.rows import NO_INODE

__all__ = ("NOT_GUEST_MEMORY", "NO_HOST_ADDRESSES", "adapt", "initial", "lower", "setup_records")

_Words = npt.NDArray[np.uint64]
_Rows = npt.NDArray[np.intp]
_Mask = npt.NDArray[np.bool_]

_KIND, _TIME, _TASK, _LINE, _A, _B, _C, _D, _E, _STATE = range(10)
_PUNCH = 2  # FALLOC_FL_PUNCH_HOLE
_REMOVE = 9  # MADV_REMOVE

NO_SLOT = "no memory slot"
NO_SLOT_YET = "no memory slot (before the log's first slot line)"
NOT_GUEST_MEMORY = "not guest memory"
NO_HOST_ADDRESSES = "not guest memory (no slot line: host addresses unknown)"
NOT_STATED = "not guest memory (--memslot without a host address)"
NO_DEVICE = "iommu:map and unmap of an unknown device"
NOT_GUEST_IOVA = "not guest memory (IOVA outside the memory slots)"
NO_PAGES = "iommu:map and unmap of parts of pages"


def lower(log: Log, options: LoweringOptions) -> Lowered:
    """Lay a log over guest_memfd.

    :raises InputError: several VMs and none chosen, no slot of the log can be bound, given slots are wrong or miss a
        guest fault (with its line), or `guest_memory` does not fit
    """
    log, others = of_vm(log, options.vm_processes)
    log = with_requests(log, options.requests)
    lines = [
        SlotLine(row, *(int(word) for word in log.rows[row, _A : _E + 1]))
        for row in np.flatnonzero(log.rows[:, _KIND] == Input.MEMSLOT).tolist()
    ]
    history = SlotHistory.build(lines)
    addresses = GuestAddresses.of(
        log.rows, history.accepted, log.nested_told, options, log.stage2, kinds_told=log.kinds_told
    )
    log = replace(log, rows=addresses.rows, notes=log.notes + addresses.notes)
    first_line = lines[0].row if lines and not options.memslots else 0
    if first_line and options.early_slots == "stand":
        inside = addresses.inside()
        early = standing_before(lines, addresses.rows[inside[inside < first_line], _A])
        history = SlotHistory.build(lines, early)
        log = replace(log, notes=log.notes + _early_note(early))
    layout, history, known = _lay_out(log, history, addresses, options)
    layout = grow(layout, options.page_size, options.guest_memory)
    lowering = _Lowering(log, layout, history, addresses, options, known, first_line)
    lowering.run()
    return lowering.result(others)


def _early_note(early: Sequence[SlotLine]) -> tuple[str, ...]:
    if not early:
        return ()
    what = "a memory slot is" if len(early) == 1 else f"{len(early)} memory slots are"
    return (f"the guest uses memory before the first slot line: {what} taken to stand before (--early-slots)",)


def _lay_out(
    log: Log, history: SlotHistory, addresses: GuestAddresses, options: LoweringOptions
) -> tuple[Layout, SlotHistory, tuple[Region, ...]]:
    """Where guest memory lies, its slots over time, and those host mappings whose addresses are the VMM's."""
    refused = sorted((slot for slot, _ in history.refused(last=True)), key=lambda slot: (slot.slot, slot.gpa))
    if options.memslots:
        layout = given_layout(options.memslots, history.accepted, refused, options.page_size)
        known = {slot.hva for slot in with_host_addresses(options.memslots, history.accepted)}
        regions = [region for region in layout.regions if region.address in known]
        history = history.with_slots(layout.slots, "memory slots were given", options.other_ranges)
        return layout, history, tuple(regions)
    if history.accepted:
        regions = place_regions(ram_ranges(history.accepted), history.accepted, options.page_size)
        placed = history.placed(regions)
        last = sorted((slot for slot, _ in placed.bound(last=True)), key=lambda slot: slot.gpa)
        return Layout(0, options.page_size, tuple(regions), tuple(last), tuple(refused)), placed, tuple(regions)
    if history.without_operation:
        raise InputError(
            f"guest_memfd can back no memory slot of this log ({history.without_operation[0][1]})", log.source
        )
    slots = inferred_slots(*_guest_ranges(addresses))
    regions = place_regions(ram_ranges(slots), slots, options.page_size)
    placed = history.with_slots(slots, "").placed(regions)
    return Layout(0, options.page_size, tuple(regions), tuple(placed.accepted), (), "inferred"), placed, ()


def _guest_ranges(addresses: GuestAddresses) -> tuple[_Words, _Words]:
    """What the guest touches and what is converted: first addresses, and those behind the last."""
    rows = addresses.rows
    touched = rows[addresses.inside(), _A]
    start, end = gfn_range(rows[rows[:, _KIND] == Input.ATTRIBUTES])
    some = end > start
    return np.concatenate([touched, start[some]]), np.concatenate([touched + np.uint64(1), end[some]])


def _bit(words: _Words, bit: int, flag: Flag) -> npt.NDArray[np.uint8]:
    return (((words >> np.uint64(bit)) & np.uint64(1)) * np.uint64(flag)).astype(np.uint8)


def _guest_flags(code: _Words, tells_kind: bool) -> npt.NDArray[np.uint8]:
    fetch = np.where(is_qualification(code), _bit(code, 2, Flag.EXEC), _bit(code, 4, Flag.EXEC))
    other = np.uint8(Flag.SHARED if tells_kind else 0)
    kind = np.where((code & np.uint64(SAYS_PRIVATE)) != 0, np.uint8(Flag.PRIVATE), other)
    return _bit(code, 1, Flag.WRITE) | fetch | kind


class _Lowering:
    """Operations so far, each with the input row it came from, and why the other rows have none."""

    def __init__(
        self, log: Log, layout: Layout, history: SlotHistory, addresses: GuestAddresses, options: LoweringOptions,
        regions: Sequence[Region], first_line: int,
    ) -> None:  # fmt: skip
        """`regions`: guest memory by host address, where that is known; `first_line`: row of the first slot line."""
        self._log = log
        self._addresses = addresses
        self._rows = log.rows
        self._layout = layout
        self._history = history
        self._options = options
        self._pieces: list[tuple[_Rows, Records]] = []
        self._reasons: list[str] = []
        self._reason = np.full(len(log.rows), -1, dtype=np.int64)
        tasks = np.asarray(log.rows[:, _TASK], dtype=np.int64)
        self._host_actor = FIRST_HOST_ACTOR + tasks % (ACTOR_LIMIT - FIRST_HOST_ACTOR)
        self._regions = regions
        self._first_line = first_line
        self._mapped = [(first, ALWAYS[1]) for first in _mapped_from(log.rows, regions)]

    def run(self) -> None:
        """Lower every kind of input, but the guest faults whose address is none of guest memory."""
        for reason, rows in self._addresses.left_out.items():
            self._without(rows, reason)
        self._slot_changes()
        self._host_faults()
        self._guest_faults()
        self._attributes()
        self._iommu()
        self._without(self._of(Input.MMAP, failed=True), "mmap")
        for kind in (Input.MADVISE, Input.MUNMAP, Input.FALLOCATE, Input.HUGETLBFS_FALLOCATE):
            rows = self._of(kind, failed=True)
            self._without(rows[self._rows[rows, _STATE] != 0], "the call failed")
        self._host_ranges()
        self._fallocates(Input.FALLOCATE)
        self._fallocates(Input.HUGETLBFS_FALLOCATE)

    def result(self, others: Counter[str]) -> Lowered:
        """Put the pieces in order, behind the records that make guest memory.

        :param others: inputs that were left out before, by reason
        """
        setup = self._setup()
        origin = np.concatenate([np.zeros(0, np.intp), *(rows for rows, _ in self._pieces)])
        order = np.argsort(origin, kind="stable")
        made = Records.concatenate(piece for _, piece in self._pieces).take(order)
        records = Records.concatenate([setup, made])
        served = np.unique(origin)
        if bool((self._reason[served] >= 0).any()) or len(served) + int((self._reason >= 0).sum()) != len(self._rows):
            raise AssertionError("an input was lowered twice, or not at all")
        reasons = np.bincount(self._reason[self._reason >= 0], minlength=len(self._reasons))
        accounting = Accounting(
            self._log.events,
            self._log.inputs,
            self._log.outcomes,
            self._log.ignored,
            self._log.unknown,
            self._log.lost,
            self._log.skipped,
            operations=len(records),
            setup=len(setup),
            extra_pieces=len(made) - len(served),
            without_operation=others
            + Counter({name: int(n) for name, n in zip(self._reasons, reasons, strict=True) if n}),
        )
        converts = bool((records.op == Operation.CONVERT).any())
        init = initial(self._options, records, self._addresses.machine.get("vm"), self._log.ignored[REQUEST] > 0)
        notes = self._log.notes + contradictions(records, init) + _unplaced(accounting.without_operation)
        levels = self._fault_levels(origin[order], len(setup))
        return Lowered(
            records, self._layout, init, converts, accounting, self._log.source, levels,
            machine=self._addresses.machine, notes=notes, doubts=self._doubts(),
        )  # fmt: skip

    def _doubts(self) -> tuple[Doubt, ...]:
        return (*self._log.doubts, *mostly_left_out(self._rows, self._reason, self._reasons, NO_HOST_ADDRESSES))

    def _fault_levels(self, origin: _Rows, setup: int) -> npt.NDArray[np.uint8] | None:
        """uint8[setup + len(origin)]: the recorded level of each record's fault; None if the log tells none."""
        if not LEVELS & self._log.outcomes.keys():
            return None
        rows = self._rows[origin]
        levels = np.where(rows[:, _KIND] == Input.GUEST_FAULT, rows[:, _D], 0)
        return np.concatenate([np.zeros(setup), levels]).astype(np.uint8)

    def _setup(self) -> Records:
        time = int(self._rows[0, _TIME]) if len(self._rows) else 0
        slots = self._history.early if self._layout.origin == "trace" else self._layout.slots
        return setup_records(self._layout.regions, slots, time)

    def _of(self, kind: Input, failed: bool = False) -> _Rows:
        """Rows of a kind; without those whose call failed unless asked for."""
        chosen = self._rows[:, _KIND] == kind
        return np.flatnonzero(chosen if failed else chosen & (self._rows[:, _STATE] == 0))

    def _without(self, rows: _Rows, reason: str) -> None:
        if len(rows):
            if reason not in self._reasons:
                self._reasons.append(reason)
            self._reason[rows] = self._reasons.index(reason)

    def _emit(self, rows: _Rows, op: Operation, **columns: npt.ArrayLike) -> None:
        columns = {"actor": self._host_actor[rows], **columns}
        self._pieces.append((rows, Records.build(len(rows), time=self._rows[rows, _TIME], op=op, **columns)))

    def _slot_changes(self) -> None:
        for kind in (Operation.UNBIND, Operation.BIND):  # of a row that does both, in this order
            changes = [(row, slot) for row, op, slot in self._history.changes if op is kind]
            rows = np.array([row for row, _ in changes], np.intp)
            columns = _bind_columns([slot for _, slot in changes])
            self._emit(rows, kind, **(columns if kind is Operation.BIND else {"address": columns["address"]}))
        for reason in {reason: None for _, reason in self._history.without_operation}:
            rows = np.array([row for row, why in self._history.without_operation if why == reason], np.intp)
            self._without(rows, reason)

    def _host_faults(self) -> None:
        rows = self._of(Input.HOST_FAULT)
        address, code = self._rows[rows, _A], self._rows[rows, _B]
        inside = np.zeros(len(rows), dtype=bool)
        for _, found in RangeIndex(rows, address, address).meetings(_ends(self._regions), self._mapped):
            inside[found] = True
        self._without(rows[~inside], self._elsewhere())
        flags = _bit(code, 1, Flag.WRITE) | _bit(code, 4, Flag.EXEC)
        self._emit(rows[inside], Operation.HOST_FAULT, flags=flags[inside], address=address[inside])

    def _elsewhere(self) -> str:
        if self._regions:
            return NOT_GUEST_MEMORY
        return NOT_STATED if self._layout.origin == "given" else NO_HOST_ADDRESSES

    def _no_slot(self, rows: _Rows) -> None:
        self._without(rows[rows < self._first_line], NO_SLOT_YET)
        self._without(rows[rows >= self._first_line], NO_SLOT)

    def _guest_faults(self) -> None:
        rows = self._of(Input.GUEST_FAULT)
        rows = rows[self._reason[rows] < 0]
        address, code, vcpu = (self._rows[rows, word] for word in (_A, _B, _C))
        index = RangeIndex(rows, address, address)
        bound, left = np.zeros(len(rows), dtype=bool), np.ones(len(rows), dtype=bool)
        slots, stand = self._bound()
        for _, found in index.meetings([(slot.gpa, slot.gpa + slot.size - 1) for slot in slots], stand):
            bound[found] = True
        left &= ~bound
        refused = self._history.refused()
        ranges = [(slot.gpa, slot.gpa + slot.size - 1) for slot, _ in refused]
        for number, found in index.meetings(ranges, [span for _, span in refused]):
            self._without(rows[found[left[found]]], f"{NOT_GUEST_MEMORY}: {refused[number][0].reason}")
            left[found] = False
        if left.any() and self._layout.origin == "given":
            row = rows[left][0]
            raise InputError(
                f"guest fault at {int(self._rows[row, _A]):#x} lies outside the given memory slots",
                self._log.source,
                int(self._rows[row, _LINE]),
            )
        self._no_slot(rows[left])
        actor = np.where(vcpu == np.uint64(NO_VCPU), self._rows[rows, _TASK], vcpu) % np.uint64(FIRST_HOST_ACTOR)
        self._emit(
            rows[bound],
            Operation.GUEST_FAULT,
            flags=_guest_flags(code, self._addresses.tells_kind)[bound],
            actor=actor[bound],
            address=address[bound],
        )

    def _bound(self) -> tuple[list[Slot], list[tuple[int, int]]]:
        """Slots that are bound, and the rows for which they are."""
        found = self._history.bound()
        return [slot for slot, _ in found], [span for _, span in found]

    def _attributes(self) -> None:
        rows = self._of(Input.ATTRIBUTES)
        start, stop = gfn_range(self._rows[rows])
        private = (self._rows[rows, _C] & np.uint64(PRIVATE_ATTRIBUTE)) != 0
        flags = np.where(private, np.uint8(Flag.PRIVATE), np.uint8(Flag.SHARED))
        slots, stand = self._bound()
        ranges = [(slot.gpa, slot.gpa + slot.size - 1) for slot in slots]
        at, low, length, number = pieces(rows, start, stop, ranges, stand)
        move = np.array([(slot.offset - slot.gpa) % (1 << 64) for slot in slots], np.uint64)[number]
        self._emit(rows[at], Operation.CONVERT, flags=flags[at], offset=low + move, length=length)
        self._no_slot(np.delete(rows, at))

    def _iommu(self) -> None:
        """iommu:map and iommu:unmap, which say neither device nor domain: of a VM's device if that is said
        (LoweringOptions.iova). The physical address is another machine's: which memory it is follows from the IOVA."""
        maps, unmaps = self._of(Input.IOMMU_MAP), self._of(Input.IOMMU_UNMAP)
        if self._options.iova == "ignored":
            for rows in (maps, unmaps):
                self._without(rows, NO_DEVICE)
            return
        slots, stand = self._bound()
        ranges = [(slot.gpa, slot.gpa + slot.size - 1) for slot in slots]
        page = np.uint64(PAGE_4K - 1)
        for rows, op in ((maps, Operation.DMA_MAP), (unmaps, Operation.DMA_UNMAP)):
            start, length = self._rows[rows, _A], self._rows[rows, _B]
            whole = ((start | length) & page == 0) & (start + length >= start)
            self._without(rows[~whole], NO_PAGES)
            rows, start, length = rows[whole], start[whole], length[whole]
            at, low, size, number = pieces(rows, start, start + length, ranges, stand)
            columns: dict[str, npt.ArrayLike] = {"address": low, "length": size}
            if op is Operation.DMA_MAP:
                move = np.array([(self._hva(slot) - slot.gpa) % (1 << 64) for slot in slots], np.uint64)[number]
                columns |= {"offset": low + move, "object": int(NO_INODE), "flags": int(Flag.READ | Flag.WRITE)}
            self._emit(rows[at], op, **columns)
            self._without(np.delete(rows, at), NOT_GUEST_IOVA)

    def _hva(self, slot: Slot) -> int:
        """Where the process has a slot's memory here."""
        regions = self._layout.regions
        region = next(one for one in regions if one.offset <= slot.offset < one.offset + one.size)
        return region.address + slot.offset - region.offset

    def _host_ranges(self) -> None:
        """madvise, munmap, and unmaps that no call asked for."""
        madvise, unmap = self._of(Input.MADVISE), self._of(Input.UNMAP)
        removed = self._rows[madvise, _C] == _REMOVE
        remove, discard = madvise[removed], madvise[~removed]
        page = np.uint64(PAGE_4K - 1)
        for rows, choice in ((remove, "punch"), (discard, self._options.dontneed or "punch")):
            end = (self._rows[rows, _A] + self._rows[rows, _B] + page) & ~page
            self._host_range(rows, self._rows[rows, _A], end, choice, int(Flag.MADVISE))
        self._host_range(unmap, self._rows[unmap, _A], self._rows[unmap, _B], self._options.dontneed or "zap", 0)
        munmap = self._of(Input.MUNMAP)
        end = (self._rows[munmap, _A] + self._rows[munmap, _B] + page) & ~page
        self._host_range(munmap, self._rows[munmap, _A], end, "munmap", 0)

    def _host_range(self, rows: _Rows, start: _Words, end: _Words, choice: str, flags: int) -> None:
        """Lower ranges of host addresses, clipped to the host mappings of guest memory."""
        at, low, length, number = pieces(rows, start, end, _ends(self._regions), self._mapped)
        if choice == "punch":
            move = np.array([(region.offset - region.address) % (1 << 64) for region in self._regions], np.uint64)[
                number
            ]
            self._emit(rows[at], Operation.PUNCH_HOLE, offset=low + move, length=length)
        else:
            op = Operation.MUNMAP if choice == "munmap" else Operation.ZAP
            self._emit(rows[at], op, flags=flags, address=low, length=length)
        self._without(np.delete(rows, at), self._elsewhere())

    def _fallocates(self, kind: Input) -> None:
        """Holes in the file behind guest memory; which file that is shows in the unmaps or the sizes."""
        rows = self._of(kind)
        punched = (self._rows[rows, _B] & np.uint64(_PUNCH)) != 0
        self._without(rows[~punched], "allocate")
        rows = rows[punched]
        bases = np.zeros(len(rows), np.uint64)
        known = np.zeros(len(rows), dtype=bool)
        for places in alike(self._rows[rows, _A]):
            base = self._file_base(rows[places])
            known[places], bases[places] = base is not None, base or 0
        self._without(rows[~known], "fallocate of another file" if self._regions else self._elsewhere())
        rows, bases = rows[known], bases[known]
        # Only whole pages become a hole; what the kernel zeroes at the ends changes no mapping.
        page = np.uint64(PAGE_4K - 1)
        start = (self._rows[rows, _C] + page) & ~page
        end = np.maximum((self._rows[rows, _C] + self._rows[rows, _D]) & ~page, start)
        self._host_range(rows, start + bases, end + bases, "punch", 0)

    def _file_base(self, rows: _Rows) -> int | None:
        """Host address of a file's first byte, None if the file is not behind guest memory."""
        starts = [region.address for region in self._regions]
        for hva, offset in self._rows[rows][:, [_E, _C]].tolist():
            place = bisect_right(starts, hva) - 1
            if place >= 0 and hva < self._regions[place].end:
                return int(hva - offset) % (1 << 64)
        needed = int((self._rows[rows, _C] + self._rows[rows, _D]).max())
        largest = sorted(self._regions, key=lambda region: -region.size)[:2]
        fitting = [region for region in largest if region.size >= needed]
        return fitting[0].address if len(fitting) == 1 else None


def _unplaced(without: Counter[str]) -> tuple[str, ...]:
    """A note of what asks for memory by host addresses that are not known, and of what tells them."""
    found = [f"{count} {reason}" for reason, count in without.items() if reason in (NO_HOST_ADDRESSES, NOT_STATED)]
    help_ = "--memslot GPA:SIZE::HVA, or record kvm_memslot (pgemu compare --help)"
    notes = (f"left out: {', '.join(found)}; {help_}",) * bool(found)
    if devices := without[NO_DEVICE]:
        notes += (f"left out: {devices} {NO_DEVICE}; --iova guest takes them for the VM's, at its addresses",)
    return notes


def _mapped_from(rows: _Words, regions: Sequence[Region]) -> list[int]:
    """Of each region the row at which its addresses are guest memory: its last mmap before a slot names it.

    A VMM uses host addresses for other things before guest memory lies there.
    """
    slots = np.flatnonzero((rows[:, _KIND] == Input.MEMSLOT) & (rows[:, _D] > 0))
    named = RangeIndex(slots, rows[slots, _E], rows[slots, _E] + rows[slots, _D] - np.uint64(1))
    before = dict.fromkeys(range(len(regions)), 0)
    before |= {number: int(slots[found[0]]) for number, found in named.meetings(_ends(regions))}
    maps = np.flatnonzero((rows[:, _KIND] == Input.MMAP) & (rows[:, _STATE] == 0) & (rows[:, _B] > 0))
    mapped = RangeIndex(maps, rows[maps, _A], rows[maps, _A] + rows[maps, _B] - np.uint64(1))
    begins = [(region.address, region.address) for region in regions]
    firsts = [0] * len(regions)
    for number, found in mapped.meetings(begins, [(0, row) for row in before.values()]):
        firsts[number] = int(maps[found[-1]])
    return firsts


def _ends(regions: Sequence[Region]) -> list[tuple[int, int]]:
    """First and last address of each."""
    return [(region.address, region.end - 1) for region in regions]


def _bind_columns(slots: Sequence[Slot]) -> dict[str, npt.ArrayLike]:
    """What BIND reads of slots."""
    columns = {"address": "gpa", "offset": "offset", "length": "size"}
    return {name: np.array([getattr(slot, of) for slot in slots], np.uint64) for name, of in columns.items()}


def setup_records(regions: Sequence[Region], slots: Sequence[Slot], time: int) -> Records:
    """Records that map guest memory and bind it, before anything is asked; time in ns."""
    maps = Records.build(
        len(regions),
        time=time,
        op=Operation.MMAP,
        actor=FIRST_HOST_ACTOR,
        address=np.array([region.address for region in regions], np.uint64),
        offset=np.array([region.offset for region in regions], np.uint64),
        length=np.array([region.size for region in regions], np.uint64),
    )
    columns = _bind_columns(slots)
    binds = Records.build(len(slots), time=time, op=Operation.BIND, actor=FIRST_HOST_ACTOR, **columns)
    return Records.concatenate([maps, binds])


def initial(options: LoweringOptions, records: Records, vm: str | None = None, asked: bool = False) -> Init:
    """What memory is at first: as asked for, else private if the trace converts, has private faults, or is a TD's, or
    the guest `asked` for conversions."""
    if options.init != "auto":
        return options.init
    return "private" if private_because(records, vm, asked) else "shared"


def adapt(lowered: Lowered, options: LoweringOptions) -> Lowered:
    """Apply the options that a trace which is lowered already can still follow.

    :raises InputError: an option says how to read a log, or `guest_memory` does not fit
    """
    fixed = LoweringOptions(options.page_size, options.init, guest_memory=options.guest_memory)
    if options != fixed:
        raise InputError(
            "memory slots, the VM's process, its addresses and the meaning of MADV_DONTNEED are fixed in this trace",
            lowered.source,
        )
    layout = grow(lowered.layout, options.page_size, options.guest_memory)
    init = lowered.init if options.init == "auto" else options.init
    return replace(lowered, layout=layout, init=init)
