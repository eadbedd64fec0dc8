"""Memory slots over time: what KVM was told, and what of it a guest_memfd could back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from pgemu.trace.memory_layout import RefusedSlot, Region, Slot, bind_slots
from pgemu_kernels.words.operations import PAGE_4K, Operation

__all__ = ("Epoch", "SlotHistory", "SlotLine")

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


@dataclass
class Epoch:
    """Slots that stand from input row `first` on, until the next epoch."""

    first: int
    bound: list[Slot]
    refused: list[RefusedSlot]


@dataclass
class SlotHistory:
    """What became of the slot lines.

    Attributes:
        epochs: the slots that stand, by row; the first epoch begins at row 0
        changes: BIND and UNBIND at their rows, in order
        without_operation: rows that change nothing of guest_memfd, with the reason
        accepted: every slot that was ever bound
    """

    epochs: list[Epoch] = field(default_factory=lambda: [Epoch(0, [], [])])
    changes: list[tuple[int, Operation, Slot]] = field(default_factory=list)
    without_operation: list[tuple[int, str]] = field(default_factory=list)
    accepted: list[Slot] = field(default_factory=list)

    @classmethod
    def build(cls, lines: Iterable[SlotLine]) -> SlotHistory:
        """Play the slot lines, in their order."""
        history = cls()
        live: dict[int, Slot | RefusedSlot] = {}
        for line in lines:
            history._apply(line, live)
            history.epochs.append(
                Epoch(
                    line.row,
                    [slot for slot in live.values() if isinstance(slot, Slot)],
                    [slot for slot in live.values() if isinstance(slot, RefusedSlot)],
                )
            )
        return history

    def placed(self, regions: Sequence[Region]) -> SlotHistory:
        """Return the same history with the offsets that the regions give."""
        changes = [(row, op, bind_slots([slot], regions)[0]) for row, op, slot in self.changes]
        epochs = [replace(epoch, bound=bind_slots(epoch.bound, regions)) for epoch in self.epochs]
        return replace(self, epochs=epochs, changes=changes, accepted=bind_slots(self.accepted, regions))

    def with_slots(self, slots: Sequence[Slot], reason: str) -> SlotHistory:
        """Return a history in which `slots` stand all the time and slot lines change nothing, for `reason`."""
        rows = sorted({row for row, _, _ in self.changes} | {row for row, _ in self.without_operation})
        return replace(
            self,
            epochs=[replace(epoch, bound=list(slots)) for epoch in self.epochs],
            changes=[],
            without_operation=[(row, reason) for row in rows],
            accepted=list(slots),
        )

    def _apply(self, line: SlotLine, live: dict[int, Slot | RefusedSlot]) -> None:
        old = live.pop(line.slot, None)
        if line.size and old is not None and (old.gpa, old.size) == (line.gpa, line.size):
            live[line.slot] = old
            self.without_operation.append((line.row, "flags of a memory slot"))
            return
        if isinstance(old, Slot):
            self.changes.append((line.row, Operation.UNBIND, old))
        if line.size == 0:
            if not isinstance(old, Slot):
                self.without_operation.append((line.row, old.reason if old else "memory slot that was not there"))
            return
        reason = _refusal(line, (slot for slot in live.values() if isinstance(slot, Slot)))
        if reason is None:
            slot = Slot(line.slot, line.gpa, line.size, line.hva)
            live[line.slot] = slot
            self.accepted.append(slot)
            self.changes.append((line.row, Operation.BIND, slot))
            return
        live[line.slot] = RefusedSlot(line.slot, line.gpa, line.size, reason)
        if not isinstance(old, Slot):
            self.without_operation.append((line.row, reason))


def _refusal(line: SlotLine, bound: Iterable[Slot]) -> str | None:
    """Why guest_memfd would not take the slot, None if it would."""
    if line.slot >= _ADDRESS_SPACE:
        return SMM_SLOT
    if line.flags & _READ_ONLY:
        return READ_ONLY_SLOT
    if (line.gpa | line.size | line.hva) % PAGE_4K:
        return UNALIGNED_SLOT
    if any(slot.hva < line.hva + line.size and line.hva < slot.hva + slot.size for slot in bound):
        return ALIASED_SLOT
    return None
