"""Traces: real logs, stored ones and built-in workloads, all as records of one schema.

>>> from pgemu import trace
>>> lowered = trace.load(trace.shipped())
>>> lowered.init, len(lowered.records)
('private', 17716)
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from pgemu.errors import InputError
from pgemu.machine.arguments import guards
from pgemu.trace.accesses import AccessStream
from pgemu.trace.log import Log
from pgemu.trace.lowered import Accounting, Lowered, LoweringOptions
from pgemu.trace.lowering import adapt, lower
from pgemu.trace.memory_layout import GivenSlot, Layout, RefusedSlot, Region, Slot
from pgemu.trace.process_lowering import is_of_processes, lower_processes
from pgemu.trace.readers import formats, read
from pgemu.trace.required import require_input
from pgemu.trace.schema import COLUMNS, SIMULATED, Flag, Operation, Records, columns_table
from pgemu.trace.source import open_source
from pgemu.trace.unplaced import Unplaced, place
from pgemu_kernels.words.rows import SLOT_IDS, VMAS

__all__ = (
    "COLUMNS",
    "SIMULATED",
    "Accounting",
    "Flag",
    "GivenSlot",
    "Layout",
    "Lowered",
    "LoweringOptions",
    "Operation",
    "Records",
    "RefusedSlot",
    "Region",
    "Slot",
    "columns_table",
    "load",
    "opened",
    "require_input",
    "shipped",
)

_WORKLOAD = "workload:"


@guards()
def load(
    name_or_path: str | os.PathLike[str],
    options: LoweringOptions | None = None,
    seed: int = 0,
    input_format: str | None = None,
    **parameters: float,
) -> Lowered:
    """Load a trace, whatever holds it.

    :param name_or_path: `workload:NAME`; a path to Parquet, to text of ftrace, trace-cmd, perf script or strace, QEMU's
        trace output or CSV, or to a snapshot of a process (text of /proc/PID/maps or smaps, or a zip file of these with
        pagemap), plain or compressed with xz, gzip or zstd; to a recording of perf or trace-cmd, whose tool is run; "-"
        for standard input. Of a log without a VM, and of a snapshot, it is the memory of processes (`Lowered.kind`)
    :param seed: of a workload; logs have none
    :param input_format: of a file, one of pgemu.trace.readers.formats(); None: as its content says
    :param parameters: of a workload, see pgemu.workload.open(); logs have none
    :raises TypeError, ValueError: an argument that is no such thing
    :raises InputError: unreadable, malformed (with the line), or at odds with the options

    >>> load("workload:tdx-boot").records
    Records(10,136: 4,954 guest fault, 3,409 convert, 1,768 host fault, 3 bind, 2 others)
    """
    options = options or LoweringOptions()
    name = os.fspath(name_or_path)
    if name.startswith(_WORKLOAD):
        from pgemu import workload

        known = workload.parameters_of(name)
        of_options = {one: getattr(options, one) for one in ("guest_memory",) if one in known}
        given = {**{one: value for one, value in of_options.items() if value is not None}, **parameters}
        made = workload.open(name.removeprefix(_WORKLOAD), seed, **given)
        return replace(adapt(made, options), again=partial(load, name, options, seed, None, **parameters))
    if parameters:
        raise InputError(f"no workload, which alone has {' and '.join(parameters)}", name)
    found = opened(name, options, input_format)
    if isinstance(found, AccessStream):
        found.close()
        raise InputError(
            f"this is {found.format}, a program's addresses, expected what a VM does: pgemu guest runs it", name
        )
    return found


def opened(
    path: str | os.PathLike[str], options: LoweringOptions | None = None, input_format: str | None = None
) -> Lowered | AccessStream:
    """Open a file, whatever it holds: what can be replayed, or a stream of a program's accesses.

    :param path: as of load(), but for workloads
    :param input_format: as of load()
    :raises InputError: as of load()
    """
    options = options or LoweringOptions()
    expected = formats().get(input_format, "a trace") if input_format else "a trace"
    found = read(open_source(path, expected), input_format)
    if isinstance(found, AccessStream):
        return found
    if isinstance(found, Log):
        return lower_processes(found, options) if is_of_processes(found, options) else _told(lower(found, options))
    if isinstance(found, Lowered) and found.kind == "process":
        return found
    placed = place(found, options) if isinstance(found, Unplaced) else adapt(found, options)
    return _told(replace(placed, table=True))


def _told(lowered: Lowered) -> Lowered:
    """The trace with notes of what there is no room for: slots, in KVM; mappings, in a machine."""
    notes = []
    if (most := _most(lowered.records.op, Operation.BIND, Operation.UNBIND)) > SLOT_IDS:
        notes.append(f"{most} memory slots at once: KVM has {SLOT_IDS} for a VM, the others are -EINVAL")
    if (most := _most(lowered.records.op, Operation.MMAP, Operation.MUNMAP)) > VMAS:
        notes.append(f"up to {most} mappings at once: a machine has room for {VMAS}, the others are -ENOMEM")
    return replace(lowered, notes=(*lowered.notes, *notes)) if notes else lowered


def _most(op: np.ndarray, more: Operation, less: Operation) -> int:
    """How many of what one operation makes and another one ends there are at once."""
    return int(np.cumsum((op == more).astype(np.int64) - (op == less)).max(initial=0))


def shipped() -> Path:
    """Return the path of the trace that comes with pgemu.

    It is the life of a software-protected VM with 512 MiB on Linux 7.3: 16,825 guest faults, 445 changes of
    attributes. The guest is scripted; faults, zaps and attributes are the kernel's.
    """
    path = Path(__file__).parents[1] / "data" / "vm-convert-swprot.ftrace.txt.xz"
    if not path.is_file():
        raise InputError("pgemu must be installed as files, not run from an archive", str(path))
    return path
