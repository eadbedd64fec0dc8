"""Memory slots over time: what KVM was told, and what of it a guest_memfd could back."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from pgemu.trace.memory_layout import RefusedSlot, Region, Slot, bind_slots
from pgemu.trace.range_index import ALWAYS, RangeIndex
from pgemu_kernels.words.operations import PAGE_4K, Operation

__all__ = ("SlotHistory", "SlotLine", "Stand", "standing_before")

_READ_ONLY = 2  # KVM_MEM_READONLY
_ADDRESS_SPACE = 1 << 16  # KVM_SET_USER_MEMORY_REGION2: the slot's upper half

READ_ONLY_SLOT = "read-only memory slot"  # kvm_set_memory_region(): GUEST_MEMFD excludes READONLY
SMM_SLOT = "memory slot of address space 1 (SMM)"
ALIASED_SLOT = "memory slot whose host memory another slot has"  # kvm_gmem_bind(): bindings may not overlap
UNALIGNED_SLOT = "memory slot not made of whole pages"


@dataclass(frozen=True)
class SlotLine:
    """One kvm_memslot line: `row` among the inputs, and what the kernel was asked (size 0 deletes), in bytes."""

    row: int
    slot: int
    flags: int
    gpa: int
    size: int
    hva: int


@dataclass(frozen=True)
class Stand:
    """A slot as long as it stands: for input rows from `first` to before `end`."""

    slot: Slot | RefusedSlot
    first: int = ALWAYS[0]
    end: int = ALWAYS[1]

    @property
    def rows(self) -> tuple[int, int]:
        """First row, and the one behind the last."""
        return self.first, self.end


@dataclass
class SlotHistory:
    """What became of the slot lines.

    Attributes:
        stands: what stood when, in the order in which the lines named it
        changes: BIND and UNBIND at their rows, in order
        without_operation: rows that change nothing of guest_memfd, with the reason
        accepted: every slot that was ever bound
        early: slots that are bound before the first row
    """

    stands: list[Stand] = field(default_factory=list)
    changes: list[tuple[int, Operation, Slot]] = field(default_factory=list)
    without_operation: list[tuple[int, str]] = field(default_factory=list)
    accepted: list[Slot] = field(default_factory=list)
    early: list[Slot] = field(default_factory=list)

    @classmethod
    def build(cls, lines: Iterable[SlotLine], early: Iterable[SlotLine] = ()) -> SlotHistory:
        """Play the slot lines, in their order; work grows with their number, and hardly more.

        :param early: what stands before the first row, as the lines that name it later (standing_before())
        """
        history = cls()
        live = _Live()
        for line in early:
            history._apply(replace(line, row=ALWAYS[0]), live)
        history.early = [slot for _, _, slot in history.changes]
        history.changes, history.without_operation = [], []
        for line in lines:
            history._apply(line, live)
        return history

    def bound(self, last: bool = False) -> list[tuple[Slot, tuple[int, int]]]:
        """Slots that are bound, with the rows for which they stand; only those that stand at the end if asked for."""
        return [(one.slot, one.rows) for one in self._standing(last) if isinstance(one.slot, Slot)]

    def refused(self, last: bool = False) -> list[tuple[RefusedSlot, tuple[int, int]]]:
        """The same of slots that are refused."""
        return [(one.slot, one.rows) for one in self._standing(last) if isinstance(one.slot, RefusedSlot)]

    def _standing(self, last: bool) -> Iterator[Stand]:
        return (one for one in self.stands if not last or one.end == ALWAYS[1])

    def placed(self, regions: Sequence[Region]) -> SlotHistory:
        """Return the same history with the offsets that the regions give."""
        bound = iter(bind_slots([slot for slot, _ in self.bound()], regions))
        stands = [replace(one, slot=next(bound)) if isinstance(one.slot, Slot) else one for one in self.stands]
        changed = bind_slots([slot for _, _, slot in self.changes], regions)
        changes = [(row, op, slot) for (row, op, _), slot in zip(self.changes, changed, strict=True)]
        accepted, early = (bind_slots(slots, regions) for slots in (self.accepted, self.early))
        return replace(self, stands=stands, changes=changes, accepted=accepted, early=early)

    def with_slots(self, slots: Sequence[Slot], reason: str, others: Sequence[RefusedSlot] = ()) -> SlotHistory:
        """Return a history in which `slots` and `others` stand all the time and slot lines change nothing, for
        `reason`."""
        rows = sorted({row for row, _, _ in self.changes} | {row for row, _ in self.without_operation})
        return replace(
            self,
            stands=[*map(Stand, slots), *map(Stand, others), *(Stand(slot, *rows) for slot, rows in self.refused())],
            changes=[],
            without_operation=[(row, reason) for row in rows],
            accepted=list(slots),
            early=[],
        )

    def _apply(self, line: SlotLine, live: _Live) -> None:
        number, old = live.take(line.slot)
        if number is not None:
            self.stands[number] = replace(self.stands[number], end=line.row)
        if line.size and old is not None and (old.gpa, old.size) == (line.gpa, line.size):
            self._stand(old, line, live)
            self.without_operation.append((line.row, "flags of a memory slot"))
            return
        if isinstance(old, Slot):
            self.changes.append((line.row, Operation.UNBIND, old))
        if line.size == 0:
            if not isinstance(old, Slot):
                self.without_operation.append((line.row, old.reason if old else "memory slot that was not there"))
            return
        reason = _refusal(line, live)
        if reason is None:
            slot = Slot(line.slot, line.gpa, line.size, line.hva)
            self._stand(slot, line, live)
            self.accepted.append(slot)
            self.changes.append((line.row, Operation.BIND, slot))
            return
        self._stand(RefusedSlot(line.slot, line.gpa, line.size, reason), line, live)
        if not isinstance(old, Slot):
            self.without_operation.append((line.row, reason))

    def _stand(self, slot: Slot | RefusedSlot, line: SlotLine, live: _Live) -> None:
        live.put(line.slot, len(self.stands), slot)
        self.stands.append(Stand(slot, line.row))


class _Live:
    """Slots that stand, by number, and the host memory of those that are bound, which do not overlap, by address."""

    def __init__(self) -> None:
        self._slots: dict[int, tuple[int, Slot | RefusedSlot]] = {}
        self._host: list[tuple[int, int]] = []  # first address, end

    def take(self, number: int) -> tuple[int, Slot | RefusedSlot] | tuple[None, None]:
        """Remove a slot; return where it is among the stands, and itself."""
        found = self._slots.pop(number, None)
        if found is None:
            return None, None
        if isinstance(slot := found[1], Slot):
            del self._host[bisect_left(self._host, (slot.hva, slot.hva + slot.size))]
        return found

    def put(self, number: int, stand: int, slot: Slot | RefusedSlot) -> None:
        """Add a slot that is the stand of that position."""
        self._slots[number] = stand, slot
        if isinstance(slot, Slot):
            range_ = slot.hva, slot.hva + slot.size
            self._host.insert(bisect_left(self._host, range_), range_)

    def aliases(self, first: int, end: int) -> bool:
        """Whether a bound slot has host memory in a range."""
        after = bisect_left(self._host, (end,))
        return after > 0 and self._host[after - 1][1] > first


def standing_before(lines: Sequence[SlotLine], used: npt.NDArray[np.uint64]) -> list[SlotLine]:
    """Slots that the first line of a log cannot have created: the guest used them before it.

    KVM maps nothing where no slot is (arch/x86/kvm/mmu/mmu.c:kvm_handle_noslot_fault() makes it MMIO). A log that
    begins while a VM runs names a slot when its flags change or it is made again; where it lay before is what its
    first line says, if no slot of another number lay there meanwhile.

    :param lines: in their order
    :param used: uint64[n], the GPAs of guest faults before the first line
    """
    found: list[SlotLine] = []
    seen: set[int] = set()
    ranges = [(one.gpa, one.gpa + max(one.size, 1) - 1) for one in lines]
    low, high = np.array(ranges, np.uint64).reshape(-1, 2).T
    made = np.array([one.size > 0 and one.slot < _ADDRESS_SPACE for one in lines], dtype=bool)
    touched = {number for number, _ in RangeIndex(np.arange(len(used)), used, used).meetings(ranges)}
    for number, line in enumerate(lines):
        if line.slot in seen:
            continue
        seen.add(line.slot)
        if not made[number] or number not in touched:
            continue
        before = made[:number] & (low[:number] <= high[number]) & (high[:number] >= low[number])
        if not before.any():
            found.append(line)
    return found


def _refusal(line: SlotLine, live: _Live) -> str | None:
    """Why guest_memfd would not take the slot, None if it would."""
    if line.slot >= _ADDRESS_SPACE:
        return SMM_SLOT
    if line.flags & _READ_ONLY:
        return READ_ONLY_SLOT
    if (line.gpa | line.size | line.hva) % PAGE_4K:
        return UNALIGNED_SLOT
    if live.aliases(line.hva, line.hva + line.size):
        return ALIASED_SLOT
    return None
