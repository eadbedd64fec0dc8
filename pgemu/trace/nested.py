"""Which guest faults are those of an L2 guest: what tasks tell of their vCPU's way between L1 and L2, why they exit.

Every exit from L2 prints kvm_nested_vmexit before it is handled, also one that KVM handles itself
(arch/x86/kvm/vmx/nested.c:nested_vmx_reflect_vmexit(), svm/svm.c:svm_handle_exit()); only kvm_nested_vmexit_inject
says that L1 runs next. A kvm_page_fault between a kvm_nested_vmexit and the next entry or exit is therefore L2's.
Where L1 gave L2 no tables of its own (nested_ept=n, npt: off), L2's addresses are L1's.
"""

from __future__ import annotations

import re
from typing import Literal

__all__ = ("NESTED", "NestedGuests")

NESTED = frozenset(
    {
        "kvm_nested_vmenter",
        "kvm_nested_vmrun",
        "kvm_nested_vmenter_failed",
        "kvm_nested_vmexit",
        "kvm_nested_vmexit_inject",
    }
)
"""Events that tell; kvm_entry and kvm_exit, too, once one of these was seen."""

# arch/x86/include/uapi/asm/vmx.h:VMX_EXIT_REASONS, svm.h:SVM_EXIT_REASONS
_STAGE2: dict[str, Literal["ept", "npt"]] = {"EPT_VIOLATION": "ept", "EPT_MISCONFIG": "ept", "npf": "npt"}
_REASON = re.compile(r".*\breason (\w+)\b.*")

_ENTERED, _EXITED = 1, 2
_NO_TABLES = re.compile(r".*\b(?:nested_(?:ept|npt)=n|npt: off)\b.*")


class NestedGuests:
    """Tasks whose vCPU is in L2, by what they printed so far."""

    def __init__(self) -> None:
        self._states: dict[int, int] = {}
        self._without_tables: set[int] = set()  # tasks whose last L2 guest has L1's addresses
        self._seen: set[str] = set()
        self.stage2: Literal["ept", "npt"] | None = None  # of the first exit for its sake

    def event(self, name: str, text: str, task: int) -> None:
        """Note an event of NESTED, or kvm_entry or kvm_exit."""
        if name == "kvm_exit" and self.stage2 is None and (reason := _REASON.fullmatch(text)):
            self.stage2 = _STAGE2.get(reason[1])
        if not self._seen and name not in NESTED:  # until there is an L2 guest an exit tells nothing else
            return
        self._seen.add(name)
        if name in ("kvm_nested_vmenter", "kvm_nested_vmrun"):
            self._states[task] = _ENTERED
            self._without_tables.discard(task)
            if _NO_TABLES.fullmatch(text):
                self._without_tables.add(task)
        elif name == "kvm_nested_vmexit":
            self._states[task] = _EXITED
        elif name not in ("kvm_entry", "kvm_exit") or self._states.get(task) == _EXITED:
            self._states.pop(task, None)

    def is_l2(self, task: int) -> bool:
        """Whether the address of a guest fault that the task prints now is one of L2's own."""
        return task in self._states and task not in self._without_tables

    @property
    def wanted(self) -> dict[str, bool]:
        """Whether the events that are none of NESTED are still to be noted."""
        return {"kvm_entry": bool(self._seen), "kvm_exit": bool(self._seen) or self.stage2 is None}

    @property
    def told(self) -> bool:
        """Whether the log has what ends the time of an L2 guest; else later faults may be L1's."""
        exits = "kvm_nested_vmexit" in self._seen and not self._seen.isdisjoint({"kvm_entry", "kvm_exit"})
        return not self._states or exits or "kvm_nested_vmexit_inject" in self._seen
