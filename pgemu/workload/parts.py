"""What workloads have in common: checks of parameters, how memory is set up, steps in rows, and the trace they make."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pgemu.errors import InputError
from pgemu.machine.field_rules import shown
from pgemu.trace.lowered import Accounting, Init, Lowered
from pgemu.trace.memory_layout import SYNTHETIC_HVA, Layout, Region, Slot, align_up
from pgemu.trace.schema import FIRST_HOST_ACTOR, Records
from pgemu_kernels.words.operations import PAGE_1G, PAGE_4K, Flag, Operation

__all__ = (
    "LARGEST",
    "Pages",
    "checked_number",
    "checked_share",
    "convert",
    "host_uses",
    "in_turn",
    "made",
    "one_slot",
    "setup",
    "vcpu_uses",
)

LARGEST = 1 << 40
"""Bytes of a workload's memory, at most."""

Pages = npt.NDArray[np.int64]
"""Numbers of 4K pages of guest_memfd, which are the guest's frame numbers where it has one slot from 0 on."""

_STEP_NS = 10_000


def checked_number(name: str, value: Any, least: int, most: int, unit: int = 1, *, source: str) -> int:
    """A parameter that is a whole number in a range. InputError for another one."""
    whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
    if not whole or not least <= value <= most or int(value) % unit:
        multiple = f"a multiple of {unit} " if unit > 1 else "a whole number "
        raise InputError(f"{name} {shown(value)}: expected {multiple}from {least} to {most}", source)
    return int(value)


def checked_share(name: str, value: Any, most: float = 1, what: str = "a share", *, source: str) -> float:
    """A parameter that is a share, or another number from 0 on. InputError for another one."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise InputError(f"{name} {shown(value)}: expected {what} from 0 to {most:g}", source)
    return float(value)


def one_slot(size: int, gpa: int = 0) -> Layout:
    """Memory of `size` bytes in one slot and one mapping; the guest_memfd has whole 1G pages."""
    region, slot = Region(SYNTHETIC_HVA, 0, size), Slot(0, gpa, size, SYNTHETIC_HVA, 0)
    return Layout(align_up(size, PAGE_1G), PAGE_1G, (region,), (slot,), (), "workload")


def setup(layout: Layout) -> list[Records]:
    """Map each region and bind each slot."""
    common = {"actor": FIRST_HOST_ACTOR}
    maps = [
        Records.build(1, op=Operation.MMAP, address=one.address, offset=one.offset, length=one.size, **common)
        for one in layout.regions
    ]
    binds = [
        Records.build(1, op=Operation.BIND, address=one.gpa, offset=one.offset, length=one.size, **common)
        for one in layout.slots
    ]
    return maps + binds


def vcpu_uses(pages: Pages, flags: npt.ArrayLike, vcpus: npt.ArrayLike = 0, gpa: int = 0) -> Records:
    """The guest uses each page of the slot that begins at `gpa`."""
    return Records.build(len(pages), op=Operation.GUEST_FAULT, flags=flags, actor=vcpus, address=pages * PAGE_4K + gpa)


def host_uses(pages: Pages, flags: npt.ArrayLike = int(Flag.WRITE)) -> Records:
    """The VMM uses each page."""
    address = pages * PAGE_4K + SYNTHETIC_HVA
    return Records.build(len(pages), op=Operation.HOST_FAULT, flags=flags, actor=FIRST_HOST_ACTOR, address=address)


def convert(pages: Pages, kind: Flag, length: int = PAGE_4K, vcpus: npt.ArrayLike = 0) -> Records:
    """Convert `length` bytes from each page on."""
    return Records.build(
        len(pages), op=Operation.CONVERT, flags=int(kind), actor=vcpus, offset=pages * PAGE_4K, length=length
    )


def in_turn(steps: Sequence[Records]) -> Records:
    """Steps of equal length, in rows: the first of each, then the second of each."""
    count = len(steps[0])
    return Records.concatenate(steps).take(np.arange(len(steps) * count).reshape(len(steps), count).T.reshape(-1))


def made(
    begin: Sequence[Records], pieces: Iterable[Records], layout: Layout, source: str, *, init: Init = "private",
    machine: Mapping[str, Any], notes: tuple[str, ...] = (), times: npt.NDArray[np.uint64] | None = None,
) -> Lowered:  # fmt: skip
    """The trace of some records behind those that set memory up.

    :param times: uint64, ns, of all records; None: 10 us from one record to the next
    """
    records = Records.concatenate([*begin, *pieces])
    count = len(records) - len(begin)
    records.time[:] = np.arange(len(records), dtype=np.uint64) * np.uint64(_STEP_NS) if times is None else times
    accounting = Accounting(count, Counter({"record": count}), operations=len(records), setup=len(begin))
    converts = bool((records.op == Operation.CONVERT).any())
    return Lowered(
        records, layout, init, converts, accounting, source, accesses=True, machine=machine, notes=notes
    )  # fmt: skip
