"""The operation of each kind that takes the most: which record it is, when it came, and what it spends its time on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pgemu.cost.difference import Contribution, difference
from pgemu.cost.prices import Band
from pgemu.machine.statistics import Statistics
from pgemu.trace.lowered import Lowered
from pgemu_kernels.words.operations import Operation

if TYPE_CHECKING:
    from pgemu.objects.machine import Machine

__all__ = ("WorstOperation", "explain", "worst_operations")


@dataclass(frozen=True)
class WorstOperation:
    """The operation of a kind that takes the most, by the high end of its band; of several, the first.

    Attributes:
        operation: the kind
        cost: estimated kernel time, (low, high) nanoseconds
        record: its index in the trace
        time: of that record, nanoseconds as the trace has them
        events: what it is made of, largest first; empty until explain() has looked
    """

    operation: Operation
    cost: Band
    record: int
    time: int
    events: tuple[Contribution, ...] = ()

    @property
    def largest(self) -> Contribution | None:
        """The event that takes most of it; None where nobody has looked, or nothing has a price."""
        return self.events[0] if self.events else None


def worst_operations(
    lowered: Lowered, statistics: Statistics, booted: Statistics | None = None
) -> dict[Operation, WorstOperation]:
    """Name the worst operation of every kind in a trace, from what a machine counted; nothing is run.

    :param statistics: after the last record, before anything else was done
    :param booted: of the same machine before the first record; None: nothing was done until then
    """
    found = {}
    for op in Operation:
        worst = statistics.worst(op)
        number = worst.number - (booted.count(op) if booted else 0) if worst else -1
        if worst is None or number < 0:  # none, or one of those before the trace
            continue
        record = int(np.flatnonzero(lowered.records.op == op)[number])
        found[op] = WorstOperation(op, worst.cost, record, int(lowered.records.time[record]))
    return found


def explain(
    lowered: Lowered, worst: Iterable[WorstOperation], boot: Callable[[], Machine]
) -> Mapping[Operation, WorstOperation]:
    """Say what operations are made of: the trace runs again, as far as the last of them.

    :param boot: makes a machine such as the first one was before the first record
    """
    machine = boot()
    config = machine.config
    done, found = 0, {}
    for one in sorted(worst, key=lambda one: one.record):
        machine.run(lowered.records[done : one.record])
        before = machine.statistics
        machine.run(lowered.records[one.record : one.record + 1])
        done = one.record + 1
        spent = difference(before, machine.statistics, config.profile, config.vcpus, config.host_cpus, one.operation)
        found[one.operation] = WorstOperation(one.operation, one.cost, one.record, one.time, spent.events)
    return found
