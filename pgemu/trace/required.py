"""Whether a trace asks anything of guest memory; one that does not is refused, not compared."""

from __future__ import annotations

from collections import Counter

from pgemu.errors import InputError
from pgemu.trace.columns import CONTRACT
from pgemu.trace.log import NAMELESS
from pgemu.trace.lowered import Accounting, Lowered
from pgemu_kernels.words.operations import Operation

__all__ = ("require_input", "require_one_vm")

_MAKES_MEMORY = (Operation.MMAP, Operation.BIND, Operation.UNBIND)
_SHOWN = 4
_ARM = ("kvm_guest_fault", "kvm_access_fault", "kvm_handle_sys_reg", "kvm_set_way_flush", "kvm_toggle_cache")
"""arch/arm64/kvm/trace_arm.h"""
_HINTS = {
    **dict.fromkeys(_ARM, " (of KVM on Arm, not read)"),
    NAMELESS: " (perf script -F +event prints it)",
}
_ROWS = "expected rows of guest fault, host fault, convert, punch hole, ..., in columns"
_RECORD = (
    "record kvm:kvm_page_fault (address, error_code), kvm:kvm_vm_set_mem_attributes (START -- END [ATTRIBUTES]), "
    "kvm:kvm_unmap_hva_range (START -- END), exceptions:page_fault_user (address, error_code), the calls madvise, "
    "munmap, mmap and fallocate of the VMM, and kvm_memslot (slot, flags, gpa, size, hva; pgemu compare --help): "
    "pgemu record --events prints how"
)


def require_one_vm(lowered: Lowered) -> None:
    """Refuse what is no trace of one VM's memory. InputError, with what runs it."""
    if lowered.kind == "process":
        raise InputError("a process's memory, no VM's: pgemu replay runs it", lowered.source)
    if lowered.guests:
        raise InputError(f"memory of {len(lowered.guests)} VMs: pgemu replay runs it", lowered.source)


def require_input(lowered: Lowered) -> None:
    """Refuse a trace of which nothing concerns guest memory.

    :raises InputError: what was found instead, and what to record, or which rows a table needs
    """
    require_one_vm(lowered)
    records = lowered.records[lowered.accounting.setup :]
    if any(operation not in _MAKES_MEMORY for operation in set(records.op.tolist())):
        return
    found = _found(lowered.accounting)
    slots = "but memory slots " if len(records) else ""
    if lowered.table:
        raise InputError(f"no input {slots}in it, found {found}: {_ROWS} {CONTRACT}", lowered.source)
    raise InputError(f"no input {slots}in it, found {found}: {_RECORD}", lowered.source)


def _found(accounting: Accounting) -> str:
    """Events and inputs without an operation, the most frequent first."""
    others = accounting.unknown + accounting.ignored + accounting.outcomes
    told: Counter[str] = Counter()
    for name, count in (others + accounting.without_operation).items():
        told[name + _HINTS.get(name, "")] = count
    listed = [f"{count} {name}" for name, count in told.most_common(_SHOWN)]
    return ", ".join(listed) + (f" and {len(told) - _SHOWN} more" if len(told) > _SHOWN else "") or "nothing"
