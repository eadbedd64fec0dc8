"""What tells private memory from shared in a log: requests of the guest, and accesses that say which they are.

Sources: Documentation/virt/kvm/x86/hypercalls.rst and arch/x86/kvm/x86.c:____kvm_emulate_hypercall()
(KVM_HC_MAP_GPA_RANGE leaves KVM with KVM_EXIT_HYPERCALL; the VMM does it, or not),
arch/x86/kvm/mmu/mmu_internal.h:kvm_mmu_do_page_fault(), arch/x86/kvm/mmu/mmu.c:kvm_mmu_prepare_memory_fault_exit().
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from pgemu.trace.events import REQUEST, Input
from pgemu.trace.log import Log
from pgemu.trace.lowered import Init
from pgemu.trace.schema import Records
from pgemu_kernels.words.operations import PAGE_4K, Flag, Operation

__all__ = ("REFUSED_REQUEST", "contradictions", "with_requests")

REFUSED_REQUEST = f"{REQUEST}, refused by KVM"
PRIVATE_ATTRIBUTE = 8  # KVM_MEMORY_ATTRIBUTE_PRIVATE

_KIND, _A, _B, _C = 0, 4, 5, 6
_EVENT = "kvm_hypercall"
_ENCRYPTED = 1 << 4  # KVM_MAP_GPA_RANGE_ENCRYPTED
_GFNS = np.uint64(52)  # bits of a number of a page of 4 KiB


def with_requests(log: Log, requests: str) -> Log:
    """The log with the guest's requests as conversions, where it has no conversions and `requests` is "done"; else
    without them: they are counted among the ignored events."""
    asking = log.rows[:, _KIND] == Input.MAP_GPA_RANGE
    if not asking.any():
        return log
    refused = asking & _refused(log.rows)
    recorded = bool((log.rows[:, _KIND] == Input.ATTRIBUTES).any())
    done = asking & ~refused & (requests == "done" and not recorded)
    rows = log.rows.copy()
    gfn, pages, encrypted = rows[done, _A] >> np.uint64(12), rows[done, _B], rows[done, _C] & np.uint64(_ENCRYPTED)
    rows[done, _KIND] = Input.ATTRIBUTES
    rows[done, _A], rows[done, _B] = gfn, gfn + pages
    rows[done, _C] = np.where(encrypted != 0, np.uint64(PRIVATE_ATTRIBUTE), np.uint64(0))
    dropped = Counter({REFUSED_REQUEST: int(refused.sum()), REQUEST: int((asking & ~refused & ~done).sum())})
    inputs = log.inputs - Counter({_EVENT: dropped.total()})
    notes = tuple(_request_notes(int(done.sum()), dropped[REQUEST], recorded))
    return replace(
        log, rows=rows[~asking | done], inputs=inputs, ignored=log.ignored + dropped, notes=log.notes + notes
    )


def _refused(rows: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """bool[n]: what KVM answers with -KVM_EINVAL, read as requests: no whole pages, none, or beyond 64 bits."""
    gpa, pages = rows[:, _A], rows[:, _B]
    gfn = gpa >> np.uint64(12)
    beyond: npt.NDArray[np.bool_] = (pages >> _GFNS != 0) | (gfn + pages >> _GFNS != 0)
    refused: npt.NDArray[np.bool_] = (gpa % np.uint64(PAGE_4K) != 0) | (pages == 0) | beyond
    return refused


def _request_notes(done: int, ignored: int, recorded: bool) -> Iterator[str]:
    if done:
        yield (
            f"{done} conversion{'s are' if done > 1 else ' is'} what the guest asked for (KVM_HC_MAP_GPA_RANGE), taken "
            "as done: no kvm_vm_set_mem_attributes says what the VMM did (--requests)"
        )
    elif ignored and not recorded:
        what = f"{ignored} request{'s' * (ignored > 1)} of the guest to convert (KVM_HC_MAP_GPA_RANGE)"
        yield f"{what} {'are' if ignored > 1 else 'is'} ignored as asked for, nothing else converts (--requests)"


def contradictions(records: Records, init: Init) -> tuple[str, ...]:
    """A note of accesses that say they are of another kind than memory is, if nothing converts it.

    :param init: what memory is
    """
    if (records.op == Operation.CONVERT).any():
        return ()
    flags = records.flags[records.op == Operation.GUEST_FAULT]
    kinds = {"private": Flag.PRIVATE, "shared": Flag.SHARED}
    counts = {name: int((flags & np.uint8(kind) != 0).sum()) for name, kind in kinds.items()}
    other = "shared" if init == "private" else "private"
    if not counts[other]:
        return ()
    said = ", ".join(f"{count} say {kind}" for kind, count in counts.items() if count)
    return (
        f"of the accesses {said}, and no conversion is recorded: {counts[other]} to memory that is {init} end with "
        "KVM_EXIT_MEMORY_FAULT, -EFAULT (record kvm:kvm_vm_set_mem_attributes)",
    )
