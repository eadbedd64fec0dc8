"""A stream of a program's accesses as a trace that machines replay, for what compares designs by records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from pgemu.guest.options import GuestOptions
from pgemu.guest.program import GuestProgram
from pgemu.trace.lowered import Accounting, Lowered
from pgemu.trace.schema import Operation, Records

__all__ = ("lower_accesses",)


def lower_accesses(
    batches: Iterable[Records], options: GuestOptions | None = None, source: str = "accesses"
) -> Lowered:
    """Return the operations of a stream of accesses (records of GUEST_ACCESS), all of them in memory.

    One record for each page that is used for the first time, for each first write and first fetch, and again after a
    conversion in the same GiB; the accounting says how many accesses changed nothing, whatever the design.
    """
    program = GuestProgram(options or GuestOptions())
    setup = program.setup()
    records = Records.concatenate([setup, *(program.feed(batch).records for batch in batches)])
    return Lowered(
        records, program.layout, "private" if program.options.private else "shared",
        bool((records.op == Operation.CONVERT).any()), _accounting(program, len(records), len(setup)), source,
        accesses=True, machine=_machine(program), notes=program.options.notes(),
    )  # fmt: skip


def _accounting(program: GuestProgram, operations: int, setup: int) -> Accounting:
    """Accesses that became an operation, those that did not and why, and what else became one."""
    counts, touches = program.counts, program.operations["touches"]
    accesses = counts["accesses"]
    without = Counter({"no memory": counts["no memory"], "not canonical": counts["not canonical"]})
    without["its leaf is there"] = accesses - touches - without.total()
    return Accounting(
        events=accesses, inputs=Counter({"access": accesses}), operations=operations, setup=setup,
        extra_pieces=operations - setup - touches, without_operation=+without,
    )  # fmt: skip


def _machine(program: GuestProgram) -> dict[str, Any]:
    return {"vm": "sw"} if program.options.private else {}
