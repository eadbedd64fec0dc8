"""`workload:convert-loop`: the loop of the kernel's benchmark of conversions.

Published: gmem_benchmark_tdx_convert.c (tools/testing/selftests/kvm/x86 of googleprodkernel/linux-cc, commit
a644618f270f): a TD with one vCPU and a slot of 4 GiB at guest address 4 GiB. The guest accepts each 4K page and writes
to it; ten times all of it is then converted to shared and to private again, in one call each, and accepted again. Its
results were not published.

Chosen here:

- `guest_memory` and `iterations` are the benchmark's, and its options; `stride`: 4096, bytes from one page that the
  guest accepts to the next
- an accept at 4K and the write behind it are one record; the memory that the guest's code has is left out
- the host never touches the memory, as in the benchmark: its shared mapping is of another file
- times: 10 us from one record to the next
"""

from __future__ import annotations

import numpy as np

from pgemu.errors import InputError
from pgemu.trace.lowered import Lowered
from pgemu.workload.parts import LARGEST, checked_number, convert, made, one_slot, setup, vcpu_uses
from pgemu_kernels.words.operations import PAGE_1G, PAGE_2M, PAGE_4K, Flag

__all__ = ("NAME", "build")

NAME = "workload:convert-loop"
MACHINE = {"vm": "tdx", "stage2": "ept", "vcpus": 1}
_GPA = 4 * PAGE_1G
_MANY = 1 << 26  # records, of 44 bytes each


def build(seed: int = 0, guest_memory: float = 4 * PAGE_1G, iterations: float = 10, stride: float = PAGE_4K) -> Lowered:
    """Return the loop; nothing in it is drawn, so that every `seed` makes the same.

    :param guest_memory: bytes, a multiple of 4096
    :param iterations: how often all of it is converted to shared and back
    :param stride: bytes from one page that the guest accepts to the next, a multiple of 4096, at most 2 MiB
    :raises InputError: another number, with what was expected
    """
    size = checked_number("guest_memory", guest_memory, PAGE_4K, LARGEST, PAGE_4K, source=NAME)
    count = checked_number("iterations", iterations, 0, 1 << 20, source=NAME)
    step = checked_number("stride", stride, PAGE_4K, PAGE_2M, PAGE_4K, source=NAME)
    pages = np.arange(0, size, step) // PAGE_4K
    if (records := (count + 1) * (len(pages) + 2)) > _MANY:
        raise InputError(f"iterations {count} make {records} records, expected at most {_MANY}", NAME)
    layout = one_slot(size, _GPA)
    accepted = vcpu_uses(pages, int(Flag.WRITE | Flag.PRIVATE | Flag.ACCEPT_4K), gpa=_GPA)
    first = np.zeros(1, np.int64)
    turn = [convert(first, Flag.SHARED, size), convert(first, Flag.PRIVATE, size), accepted]
    return made(setup(layout), [accepted, *turn * count], layout, NAME, machine=MACHINE)
