"""Entries of stage 2 that a log says KVM wrote: which fault they belong to, and all of them as rows, if asked for."""

from __future__ import annotations

from array import array
from collections import Counter
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from pgemu.trace.events import TDX_SHARED_BITS
from pgemu.trace.task_calls import TaskCalls

__all__ = ("OUTCOME_WORDS", "SET_SPTE", "SPTE_CHANGED", "Kept", "Outcomes")

SET_SPTE, SPTE_CHANGED = "kvm_mmu_set_spte", "kvm_tdp_mmu_spte_changed"
OUTCOME_WORDS = 9

_LEVEL = 7  # word D of a guest fault
_SPTE_PRESENT, _SPTE_LARGE = 1 << 11, 1 << 7  # SPTE_MMU_PRESENT_MASK (Linux 5.13), PT_PAGE_SIZE_MASK
_SHARED_BITS = sum(1 << bit for bit in TDX_SHARED_BITS)


class Kept(IntEnum):
    """Kinds of rows of outcomes; what the words behind kind, time, task and line hold."""

    CHANGED = 1  # kvm_tdp_mmu_spte_changed: address space, gfn, level, old entry, new entry
    SET = 2  # kvm_mmu_set_spte: 0, gfn, level, entry, physical address of the entry
    ZAP_ALL = 3  # kvm_mmu_zap_all_fast: nothing
    FAST = 4  # fast_page_fault: whether it fixed the entry, 0, 0, old entry, new entry
    ROOT = 5  # kvm_mmu_get_page of a top table: nothing


class Outcomes:
    """What the lines of outcomes said so far; `rows` are those of inputs, whose guest faults get their level."""

    def __init__(self, rows: array[int], calls: TaskCalls, counts: Counter[str], *, keep: bool) -> None:
        self._rows = rows
        self._calls = calls
        self._counts = counts
        self.kept = array("Q") if keep else None

    @property
    def rows(self) -> npt.NDArray[np.uint64] | None:
        """uint64[n, 9] in the order of the lines: kind (`Kept`), time (ns), task, line, and what the kind says."""
        if self.kept is None:
            return None
        return np.frombuffer(self.kept, dtype=np.uint64).reshape(-1, OUTCOME_WORDS)

    def set_spte(self, event: str, task: int, time: int, line: int) -> bool:
        """An entry that KVM wrote: "gfn G spte S (rwxu) level L at A". Whether it was understood."""
        words = event.split()
        try:
            gfn, spte, level, at = int(words[2], 16), int(words[4], 16), int(words[7]), int(words[9], 16)
        except (ValueError, IndexError):
            self._counts[f"{SET_SPTE} (not understood)"] += 1
            return False
        self._counts[SET_SPTE] += 1
        self._mapped(task, gfn, level)
        if self.kept is not None:
            self.kept.extend((Kept.SET, time, task, line, 0, gfn, level, spte, at))
        return True

    def spte_changed(self, event: str, task: int, time: int, line: int) -> None:
        """An entry that became another: "as id N gfn G level L old_spte S new_spte S"."""
        words = event.split()
        try:
            space, gfn, level = int(words[3]), int(words[5], 16), int(words[7])
            old, new = int(words[9], 16), int(words[11], 16)
        except (ValueError, IndexError):
            self._counts[f"{SPTE_CHANGED} (not understood)"] += 1
            return
        self._counts[SPTE_CHANGED] += 1
        if new & _SPTE_PRESENT and (level == 1 or new & _SPTE_LARGE):
            self._mapped(task, gfn, level)
        if self.kept is not None:
            self.kept.extend((Kept.CHANGED, time, task, line, space, gfn, level, old, new))

    def zap_all(self, event: str, task: int, time: int, line: int) -> None:
        """A VM's whole tree was dropped."""
        self._counts["kvm_mmu_zap_all_fast"] += 1
        if self.kept is not None:
            self.kept.extend((Kept.ZAP_ALL, time, task, line, 0, 0, 0, 0, 0))

    def fast_page_fault(self, event: str, task: int, time: int, line: int) -> None:
        """A fault that was or was not mended without the lock: "... old S new S spurious N fixed N"."""
        self._counts["fast_page_fault"] += 1
        words = event.split()
        try:
            fixed, old, new = int(words[-1]), int(words[-7], 16), int(words[-5], 16)
        except (ValueError, IndexError):
            return
        if self.kept is not None:
            self.kept.extend((Kept.FAST, time, task, line, fixed, 0, 0, old, new))

    def get_page(self, event: str, task: int, time: int, line: int) -> None:
        """A table was made; of a top one a VM begins, or goes on after its tree was dropped."""
        self._counts["kvm_mmu_get_page"] += 1
        if self.kept is not None and (" l4 " in event or " l5 " in event) and event.rstrip().endswith(" new"):
            self.kept.extend((Kept.ROOT, time, task, line, 0, 0, 0, 0, 0))

    def _mapped(self, task: int, gfn: int, level: int) -> None:
        """A leaf was written: note its level at the task's guest fault, if it is the fault's."""
        position = self._calls.fault(task)
        if position < 0 or not 1 <= level <= 3:
            return
        # KVM prints a TD's fault with its shared bit, the entry without.
        differ = (self._rows[position + 4] ^ gfn << 12) & ~_SHARED_BITS
        if differ >> 12 + 9 * (level - 1) == 0:
            self._rows[position + _LEVEL] = level
