"""From what a log's kernel was asked to operations on guest_memfd.

The logs are those of VMs over other memory, or of VMs whose shared memory was elsewhere. Lowering says what the
same requests are when one guest_memfd holds all guest memory, private and shared: a host fault in a memory
slot's host range is one on guest_memfd, MADV_DONTNEED is a hole, a changed attribute is a conversion.
Whole columns are worked on at a time; only slot lines, of which there are few, are played one by one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from pgemu.errors import InputError
from pgemu.trace.events import LEVELS, Input
from pgemu.trace.guest_addresses import PRIVATE_ACCESS, GuestAddresses, gfn_range, is_qualification
from pgemu.trace.log import NO_VCPU, Log
from pgemu.trace.lowered import Accounting, Init, Lowered, LoweringOptions
from pgemu.trace.memory_layout import (
    Layout,
    Region,
    Slot,
    given_layout,
    grow,
    inferred_slots,
    place_regions,
    ram_ranges,
)
from pgemu.trace.processes import of_vm
from pgemu.trace.schema import ACTOR_LIMIT, FIRST_HOST_ACTOR, Records
from pgemu.trace.slot_history import SlotHistory, SlotLine
from pgemu_kernels.words.operations import PAGE_4K, Flag, Operation

__all__ = ("adapt", "lower")

_Words = npt.NDArray[np.uint64]
_Rows = npt.NDArray[np.intp]
_Mask = npt.NDArray[np.bool_]

_KIND, _TIME, _TASK, _LINE, _A, _B, _C, _D, _E, _STATE = range(10)
_PUNCH = 2  # FALLOC_FL_PUNCH_HOLE
_REMOVE = 9  # MADV_REMOVE
_PRIVATE_ATTRIBUTE = 8  # KVM_MEMORY_ATTRIBUTE_PRIVATE
# PFERR_GUEST_ENC_MASK (SEV-SNP) and PFERR_PRIVATE_ACCESS, arch/x86/include/asm/kvm_host.h
_PRIVATE_ACCESS = (1 << 34) | PRIVATE_ACCESS

NO_SLOT = "no memory slot"
NOT_GUEST_MEMORY = "not guest memory"
NO_HOST_ADDRESSES = "not guest memory (no slot line: host addresses unknown)"


def lower(log: Log, options: LoweringOptions) -> Lowered:
    """Lay a log over guest_memfd.

    :raises InputError: several VMs and none chosen, no slot of the log can be bound, given slots are wrong or miss a
        guest fault (with its line), or `guest_memory` does not fit
    """
    log, others = of_vm(log, options.vm_processes)
    lines = [
        SlotLine(row, *(int(word) for word in log.rows[row, _A : _E + 1]))
        for row in np.flatnonzero(log.rows[:, _KIND] == Input.MEMSLOT).tolist()
    ]
    history = SlotHistory.build(lines)
    addresses = GuestAddresses.of(log.rows, history.accepted, log.nested_told, options)
    log = replace(log, rows=addresses.rows, notes=log.notes + addresses.notes)
    layout, history = _lay_out(log, history, addresses, options)
    layout = grow(layout, options.page_size, options.guest_memory)
    lowering = _Lowering(log, layout, history, addresses, options)
    lowering.run()
    return lowering.result(others)


def _lay_out(
    log: Log, history: SlotHistory, addresses: GuestAddresses, options: LoweringOptions
) -> tuple[Layout, SlotHistory]:
    refused = sorted(history.epochs[-1].refused, key=lambda slot: (slot.slot, slot.gpa))
    if options.memslots:
        layout = given_layout(options.memslots, history.accepted, refused, options.page_size)
        return layout, history.with_slots(layout.slots, "memory slots were given")
    if history.accepted:
        regions = place_regions(ram_ranges(history.accepted), history.accepted, options.page_size)
        placed = history.placed(regions)
        last = sorted(placed.epochs[-1].bound, key=lambda slot: slot.gpa)
        return Layout(0, options.page_size, tuple(regions), tuple(last), tuple(refused)), placed
    if history.without_operation:
        raise InputError(
            f"guest_memfd can back no memory slot of this log ({history.without_operation[0][1]})", log.source
        )
    slots = inferred_slots(*_guest_ranges(addresses))
    regions = place_regions(ram_ranges(slots), slots, options.page_size)
    placed = history.with_slots(slots, "").placed(regions)
    return Layout(0, options.page_size, tuple(regions), tuple(placed.accepted), (), "inferred"), placed


def _guest_ranges(addresses: GuestAddresses) -> tuple[_Words, _Words]:
    """What the guest touches and what is converted: first addresses, and those behind the last."""
    rows = addresses.rows
    touched = rows[addresses.inside(), _A]
    start, end = gfn_range(rows[rows[:, _KIND] == Input.ATTRIBUTES])
    some = end > start
    return np.concatenate([touched, start[some]]), np.concatenate([touched + np.uint64(1), end[some]])


def _bit(words: _Words, bit: int, flag: Flag) -> npt.NDArray[np.uint8]:
    return (((words >> np.uint64(bit)) & np.uint64(1)) * np.uint64(flag)).astype(np.uint8)


def _guest_flags(code: _Words) -> npt.NDArray[np.uint8]:
    fetch = np.where(is_qualification(code), _bit(code, 2, Flag.EXEC), _bit(code, 4, Flag.EXEC))
    private = np.where((code & np.uint64(_PRIVATE_ACCESS)) != 0, np.uint8(Flag.PRIVATE), np.uint8(0))
    return _bit(code, 1, Flag.WRITE) | fetch | private


class _Lowering:
    """Operations so far, each with the input row it came from, and why the other rows have none."""

    def __init__(
        self, log: Log, layout: Layout, history: SlotHistory, addresses: GuestAddresses, options: LoweringOptions
    ) -> None:
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
        # Guest memory by host address: unknown where the log has no slot lines.
        regions = () if layout.origin == "inferred" else layout.regions
        self._regions = [(region, _mapped_from(log.rows, region)) for region in regions]

    def run(self) -> None:
        """Lower every kind of input, but the guest faults whose address is none of guest memory."""
        for reason, rows in self._addresses.left_out.items():
            self._without(rows, reason)
        self._slot_changes()
        self._host_faults()
        for epoch, first, end in self._epochs():
            self._guest_faults(epoch, first, end)
            self._attributes(epoch, first, end)
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
        levels = self._fault_levels(origin[order], len(setup))
        return Lowered(
            records, self._layout, self._init(converts), converts, accounting, self._log.source, levels,
            machine=self._addresses.machine, notes=self._log.notes,
        )  # fmt: skip

    def _fault_levels(self, origin: _Rows, setup: int) -> npt.NDArray[np.uint8] | None:
        """uint8[setup + len(origin)]: the recorded level of each record's fault; None if the log tells none."""
        if not LEVELS & self._log.outcomes.keys():
            return None
        rows = self._rows[origin]
        levels = np.where(rows[:, _KIND] == Input.GUEST_FAULT, rows[:, _D], 0)
        return np.concatenate([np.zeros(setup), levels]).astype(np.uint8)

    def _init(self, converts: bool) -> Init:
        if self._options.init != "auto":
            return self._options.init
        # A TD's memory is private until it is converted, which the log may not show.
        return "private" if converts or self._addresses.machine.get("vm") == "tdx" else "shared"

    def _setup(self) -> Records:
        regions = self._layout.regions
        time = int(self._rows[0, _TIME]) if len(self._rows) else 0
        actor = FIRST_HOST_ACTOR
        maps = Records.build(
            len(regions),
            time=time,
            op=Operation.MMAP,
            actor=actor,
            address=[region.address for region in regions],
            offset=[region.offset for region in regions],
            length=[region.size for region in regions],
        )
        slots = () if self._layout.origin == "trace" else self._layout.slots
        return Records.concatenate([maps, *(_bind(slot, time, actor) for slot in slots)])

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

    def _epochs(self) -> Iterator[tuple[int, int, int]]:
        firsts = [epoch.first for epoch in self._history.epochs] + [len(self._rows)]
        for number, (first, end) in enumerate(pairwise(firsts)):
            if first < end:
                yield number, first, end

    def _slot_changes(self) -> None:
        for row, op, slot in self._history.changes:
            time, actor = int(self._rows[row, _TIME]), int(self._host_actor[row])
            if op is Operation.BIND:
                record = _bind(slot, time, actor)
            else:
                record = Records.build(1, time=time, op=op, actor=actor, address=slot.gpa)
            self._pieces.append((np.array([row]), record))
        for row, reason in self._history.without_operation:
            self._without(np.array([row]), reason)

    def _host_faults(self) -> None:
        rows = self._of(Input.HOST_FAULT)
        address, code = self._rows[rows, _A], self._rows[rows, _B]
        inside = np.zeros(len(rows), dtype=bool)
        for region, first in self._regions:
            inside |= (rows >= first) & (address >= np.uint64(region.address)) & (address < np.uint64(region.end))
        self._without(rows[~inside], self._elsewhere())
        flags = _bit(code, 1, Flag.WRITE) | _bit(code, 4, Flag.EXEC)
        self._emit(rows[inside], Operation.HOST_FAULT, flags=flags[inside], address=address[inside])

    def _elsewhere(self) -> str:
        return NO_HOST_ADDRESSES if self._layout.origin == "inferred" else NOT_GUEST_MEMORY

    def _guest_faults(self, number: int, first: int, end: int) -> None:
        epoch = self._history.epochs[number]
        rows = self._slice(Input.GUEST_FAULT, first, end)
        address, code, vcpu = (self._rows[rows, word] for word in (_A, _B, _C))
        left = self._reason[rows] < 0
        bound = np.zeros(len(rows), dtype=bool)
        for slot in epoch.bound:
            bound |= left & (address >= np.uint64(slot.gpa)) & (address < np.uint64(slot.gpa + slot.size))
        left &= ~bound
        for refused in epoch.refused:
            gpa, size = np.uint64(refused.gpa), np.uint64(refused.size)
            inside = left & (address >= gpa) & (address - gpa < size)
            self._without(rows[inside], f"{NOT_GUEST_MEMORY}: {refused.reason}")
            left &= ~inside
        if left.any() and self._layout.origin == "given":
            row = rows[left][0]
            raise InputError(
                f"guest fault at {int(self._rows[row, _A]):#x} lies outside the given memory slots",
                self._log.source,
                int(self._rows[row, _LINE]),
            )
        self._without(rows[left], NO_SLOT)
        actor = np.where(vcpu == np.uint64(NO_VCPU), self._rows[rows, _TASK], vcpu) % np.uint64(FIRST_HOST_ACTOR)
        self._emit(
            rows[bound],
            Operation.GUEST_FAULT,
            flags=_guest_flags(code)[bound],
            actor=actor[bound],
            address=address[bound],
        )

    def _attributes(self, number: int, first: int, end: int) -> None:
        rows = self._slice(Input.ATTRIBUTES, first, end)
        start, stop = gfn_range(self._rows[rows])
        private = (self._rows[rows, _C] & np.uint64(_PRIVATE_ATTRIBUTE)) != 0
        flags = np.where(private, np.uint8(Flag.PRIVATE), np.uint8(Flag.SHARED))
        reached = np.zeros(len(rows), dtype=bool)
        for slot in self._history.epochs[number].bound:
            low, high, hit = _clip(start, stop, slot.gpa, slot.gpa + slot.size)
            offset = low - np.uint64(slot.gpa) + np.uint64(slot.offset)
            reached |= hit
            self._emit(rows[hit], Operation.CONVERT, flags=flags[hit], offset=offset[hit], length=(high - low)[hit])
        self._without(rows[~reached], NO_SLOT)

    def _slice(self, kind: Input, first: int, end: int) -> _Rows:
        return first + np.flatnonzero(self._rows[first:end, _KIND] == kind)

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
        reached = np.zeros(len(rows), dtype=bool)
        for region, first in self._regions:
            low, high, hit = _clip(start, end, region.address, region.end)
            hit &= rows >= first
            reached |= hit
            low, length = low[hit], (high - low)[hit]
            if choice == "punch":
                offset = low - np.uint64(region.address) + np.uint64(region.offset)
                self._emit(rows[hit], Operation.PUNCH_HOLE, offset=offset, length=length)
            else:
                op = Operation.MUNMAP if choice == "munmap" else Operation.ZAP
                self._emit(rows[hit], op, flags=flags, address=low, length=length)
        self._without(rows[~reached], self._elsewhere())

    def _fallocates(self, kind: Input) -> None:
        """Holes in the file behind guest memory; which file that is shows in the unmaps or the sizes."""
        rows = self._of(kind)
        punched = (self._rows[rows, _B] & np.uint64(_PUNCH)) != 0
        self._without(rows[~punched], "allocate")
        rows = rows[punched]
        for file in np.unique(self._rows[rows, _A]):
            chosen = rows[self._rows[rows, _A] == file]
            base = self._file_base(chosen)
            if base is None:
                self._without(chosen, "fallocate of another file")
                continue
            # Only whole pages become a hole; what the kernel zeroes at the ends changes no mapping.
            page = np.uint64(PAGE_4K - 1)
            start = (self._rows[chosen, _C] + page) & ~page
            end = np.maximum((self._rows[chosen, _C] + self._rows[chosen, _D]) & ~page, start)
            self._host_range(chosen, start + np.uint64(base), end + np.uint64(base), "punch", 0)

    def _file_base(self, rows: _Rows) -> int | None:
        """Host address of a file's first byte, None if the file is not behind guest memory."""
        regions = [region for region, _ in self._regions]
        for hva, offset in self._rows[rows][:, [_E, _C]].tolist():
            if any(region.address <= hva < region.end for region in regions):
                return int(hva - offset)
        needed = int((self._rows[rows, _C] + self._rows[rows, _D]).max())
        fitting = [region for region in regions if region.size >= needed]
        return fitting[0].address if len(fitting) == 1 else None


def _mapped_from(rows: _Words, region: Region) -> int:
    """First row at which the region's addresses are guest memory: its last mmap before a slot names it.

    A VMM uses host addresses for other things before guest memory lies there.
    """
    slots = np.flatnonzero((rows[:, _KIND] == Input.MEMSLOT) & (rows[:, _D] > 0))
    start, end = rows[slots, _E], rows[slots, _E] + rows[slots, _D]
    naming = slots[(start < np.uint64(region.end)) & (end > np.uint64(region.address))]
    if len(naming) == 0:
        return 0
    before = rows[: naming[0]]
    maps = np.flatnonzero((before[:, _KIND] == Input.MMAP) & (before[:, _STATE] == 0))
    address, length = before[maps, _A], before[maps, _B]
    covering = maps[(address <= np.uint64(region.address)) & (np.uint64(region.address) < address + length)]
    return int(covering[-1]) if len(covering) else 0


def _bind(slot: Slot, time: int, actor: int) -> Records:
    return Records.build(
        1, time=time, op=Operation.BIND, actor=actor, address=slot.gpa, offset=slot.offset, length=slot.size
    )


def _clip(start: _Words, end: _Words, low: int, high: int) -> tuple[_Words, _Words, _Mask]:
    """Intersect ranges with [low, high); the third array says which are not empty."""
    first = np.maximum(start, np.uint64(low))
    last = np.minimum(end, np.uint64(high))
    return first, last, last > first


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
