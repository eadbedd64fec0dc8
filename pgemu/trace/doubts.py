"""When a trace is not, or not all, of one VM's memory: then what a comparison of it says is in doubt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from pgemu.trace.events import Input
from pgemu.trace.guest_addresses import APIC, DEVICE, IO_APIC
from pgemu.trace.log import Doubt

__all__ = ("mostly_left_out",)

_KIND = 0
_NO_MEMORY = (DEVICE, APIC, IO_APIC)  # accesses of which it is known that they are to no memory
_UNMAPS = (Input.MADVISE, Input.MUNMAP, Input.UNMAP)
_KINDS: tuple[tuple[str, tuple[Input, ...], bool], ...] = (
    ("guest faults", (Input.GUEST_FAULT,), False),
    ("conversions", (Input.ATTRIBUTES,), False),
    ("host faults", (Input.HOST_FAULT,), True),
    ("unmaps and holes", _UNMAPS, True),
)
"""Kinds of input; whether they are of host addresses, of which most belong to something else."""


def mostly_left_out(
    rows: npt.NDArray[np.uint64], reason: npt.NDArray[np.int64], reasons: Sequence[str], unknown: str
) -> Iterator[Doubt]:
    """Yield a doubt for each kind of input of which more than half is left out, though it may be of the VM's memory.

    :param rows: uint64[n, 10] as in Log
    :param reason: int64[n]: why a row is left out, an index of `reasons`; negative: it is not
    :param unknown: the reason of host addresses of which nobody knows whether they are guest memory
    """
    elsewhere = {
        host: [number for number, name in enumerate(reasons) if (name != unknown if host else name in _NO_MEMORY)]
        for host in (False, True)
    }
    for name, kinds, host in _KINDS:
        theirs = reason[np.isin(rows[:, _KIND], np.array(kinds, np.uint64))]
        theirs = theirs[~np.isin(theirs, elsewhere[host])]
        kept = int((theirs < 0).sum())
        if 2 * kept < len(theirs):
            some = f"only {kept:,}" if kept else "none"
            are = "is" if kept == 1 else "are"
            tells = "known to be of this memory: there is no slot line" if host else "of this memory"
            yield Doubt(f"{some} of {len(theirs):,} {name} {are} {tells}", name)
