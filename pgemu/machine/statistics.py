"""What a machine counted, decoded from its `stats` array. Needs no compiler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pgemu.machine.arguments import guards_methods
from pgemu.machine.arrays import I64
from pgemu.machine.field_rules import shown
from pgemu.machine.results import operation_name, result_name
from pgemu.machine.short import counted, html_table
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Event, Gauge
from pgemu_kernels.words.operations import Operation


class Worst(NamedTuple):
    """The operation of a kind that takes the most by the high end of its band; of several, the first.

    cost: (low, high) nanoseconds. number: how many of its kind had ended before.
    """

    cost: tuple[float, float]
    number: int


@guards_methods
@dataclass(frozen=True, eq=False)
class Statistics:
    """`words` is a copy of a machine's `stats`, int64[words.STATS_SIZE].

    >>> machine = Machine(Config("pfnmap", pool=2 << 20, page_size=2 << 20))
    >>> gmem = machine.create_guest_memfd(2 << 20)
    >>> gmem.convert_many([0, 4096, 0], shared=True).outcomes
    {'ok': 3}
    >>> statistics = machine.statistics
    """

    words: I64

    def __post_init__(self) -> None:
        words: Any = self.words
        expected = f"expected int64[{W.STATS_SIZE}], a machine's stats"
        if not isinstance(words, np.ndarray):
            raise TypeError(f"words {shown(words)} ({type(words).__name__}): {expected}")
        if words.dtype != np.int64 or words.shape != (W.STATS_SIZE,):
            raise ValueError(f"words of {words.dtype}{list(words.shape)}: {expected}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Statistics) and np.array_equal(self.words, other.words)

    def __hash__(self) -> int:
        return hash(self.words.tobytes())

    def __repr__(self) -> str:
        counts = {operation_name(op): n for op in Operation if (n := self.count(op))}
        return f"Statistics({counted(counts)})"

    def _repr_html_(self) -> str:
        rows = [(operation_name(op), n, *map(round, self.cost(op))) for op in Operation if (n := self.count(op))]
        return html_table(("operation", "how many", "ns from", "ns to"), rows, len(rows))

    def gauge(self, gauge: Gauge) -> int:
        """Value of a gauge now.

        >>> statistics.gauge(Gauge.POOL_FREE)
        1
        """
        return int(self.words[int(W.STATS_GAUGES) + 2 * gauge])

    def peak(self, gauge: Gauge) -> int:
        """Largest value a gauge had; kept for frames, tables, vmemmap pages, blocks and contents.

        >>> statistics.peak(Gauge.FRAMES_USED) >= statistics.gauge(Gauge.FRAMES_USED)
        True
        """
        return int(self.words[int(W.STATS_GAUGES) + 2 * gauge + 1])

    @property
    def events(self) -> I64:
        """int64[OPERATIONS, EVENTS]: events by the operation they were charged to."""
        start = int(W.STATS_COUNTERS)
        return self.words[start : start + W.OPERATIONS * W.EVENTS].reshape(W.OPERATIONS, W.EVENTS)

    @property
    def charges(self) -> I64:
        """int64[OPERATIONS, EVENTS]: how often each was charged; one charge may be of many units, or of none."""
        start = int(W.STATS_REPEATED)
        repeated = self.words[start : start + W.OPERATIONS * W.EVENTS].reshape(W.OPERATIONS, W.EVENTS)
        return self.events - repeated

    def event(self, event: Event, op: Operation | None = None) -> int:
        """How often an event was counted, in all or for one operation.

        >>> statistics.event(Event.ATTRIBUTES_STORED), statistics.event(Event.ATTRIBUTES_STORED, Operation.WORK)
        (2, 0)
        """
        column = self.events[:, event]
        return int(column.sum() if op is None else column[op])

    def results(self, op: Operation) -> dict[int, int]:
        """How often each result came, by status as the kernel returns it.

        >>> statistics.results(Operation.CONVERT)
        {0: 3}
        """
        start = int(W.STATS_TALLY) + op * W.TALLY_SLOTS
        row = self.words[start : start + W.TALLY_SLOTS]
        return {status_of(int(slot)): int(row[slot]) for slot in np.flatnonzero(row)}

    def count(self, op: Operation) -> int:
        """How many operations of a kind ended.

        >>> statistics.count(Operation.CONVERT)
        3
        """
        return sum(self.results(op).values())

    def cost(self, op: Operation) -> tuple[float, float]:
        """Estimated kernel time of all operations of a kind, nanoseconds: low and high end of the band.

        >>> low, high = statistics.cost(Operation.CONVERT)
        >>> 0 < low < high
        True
        """
        start = int(W.STATS_COST) + 2 * op
        low, high = self.words[start : start + 2] / 1000
        return float(low), float(high)

    def worst(self, op: Operation) -> Worst | None:
        """The one that takes the most of a kind; None without any.

        >>> statistics.worst(Operation.CONVERT).number, statistics.worst(Operation.WORK)
        (0, None)
        """
        if not self.count(op):
            return None
        start = int(W.STATS_WORST) + 4 * op
        low, high, number = self.words[start : start + 3].tolist()
        return Worst((low / 1000, high / 1000), number)

    def percentile(self, op: Operation, fraction: float) -> tuple[float, float] | None:
        """Kernel time that `fraction` of the operations of a kind do not exceed, nanoseconds, or None without any.

        Upper edge of the bucket, for the low and the high end of the band. Percentiles come from the
        mix of operations, not from jitter.

        >>> low, high = statistics.percentile(Operation.CONVERT, 0.99)
        >>> 0 < low < high
        True
        """
        start = int(W.STATS_HISTOGRAM) + 2 * op * W.HISTOGRAM_BUCKETS
        rows = self.words[start : start + 2 * W.HISTOGRAM_BUCKETS].reshape(2, W.HISTOGRAM_BUCKETS)
        total = int(rows[0].sum())
        if total == 0:
            return None
        needed = max(1, int(np.ceil(fraction * total)))
        low, high = (bucket_edge(int(np.searchsorted(np.cumsum(row), needed))) for row in rows)
        return low, high

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain dicts by name, without what is zero; times are nanoseconds, (low, high).

        operations: of each kind its count, its outcomes and its estimated kernel time. events: of each kind of
        operation how often each event was counted for it. gauges: their values now.

        >>> statistics.as_dict()["operations"]["convert"]["count"]
        3
        """
        operations = {}
        for op in Operation:
            if count := self.count(op):
                outcomes = {result_name(op, status): n for status, n in self.results(op).items()}
                operations[operation_name(op)] = {"count": count, "outcomes": outcomes, "nanoseconds": self.cost(op)}
        events = {
            operation_name(op): {
                event.name.lower(): int(self.events[op, event]) for event in Event if self.events[op, event]
            }
            for op in Operation
            if self.events[op].any()
        }
        gauges = {gauge.name.lower(): self.gauge(gauge) for gauge in Gauge if self.gauge(gauge)}
        return {"operations": operations, "events": events, "gauges": gauges}


def status_of(slot: int) -> int:
    """The result that a tally slot counts."""
    if slot >= W.TALLY_ERRNO:
        return W.TALLY_ERRNO - slot
    if slot >= W.TALLY_FAULT_BIT:
        return 1 << slot - W.TALLY_FAULT_BIT
    return slot


def bucket_edge(index: int) -> float:
    """Upper edge of a histogram bucket in nanoseconds: pgemu_kernels.engine.charge.bucket() the other way round."""
    octave, part = divmod(index, 8)
    return ((8 + part + 1 << octave) - 8) / 8
