"""Counting and pricing: `charge`, and the frame around every operation."""

from __future__ import annotations

import numpy as np

from pgemu_kernels import words
from pgemu_kernels.engine.bits import U0, U1, U2, U3, U4, U7, U8, U63, leading_zeros, trailing_zeros
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.words.events import (
    CLOCK_HIGH,
    CLOCK_LOW,
    HISTOGRAM_BUCKETS,
    PRICE_EACH_HIGH,
    PRICE_EACH_LOW,
    PRICE_FIXED_HIGH,
    PRICE_FIXED_LOW,
    STATS_COST,
    STATS_COUNTERS,
    STATS_GAUGES,
    STATS_HISTOGRAM,
    STATS_LAST,
    STATS_PRICES,
    STATS_PRICES_ONE,
    STATS_REPEATED,
    STATS_TALLY,
    STATS_WORST,
)
from pgemu_kernels.words.registers import R_COUNTER_ROW
from pgemu_kernels.words.rows import (
    O_CLOCK_HIGH,
    O_CLOCK_LOW,
    O_DETAIL,
    O_LOCKED,
    O_OP,
    O_PAUSED_HIGH,
    O_PAUSED_LOW,
    O_PHASE,
    O_REFERENCED,
    O_ROUND_END,
    O_STATUS,
)

U = np.uint64


_EVENTS = U(words.EVENTS)
_TALLY_SLOTS = U(words.TALLY_SLOTS)
_BUCKETS = U(HISTOGRAM_BUCKETS)
_LAST_BUCKET = U(HISTOGRAM_BUCKETS - 1)
_FAULT_BIT = U(words.TALLY_FAULT_BIT)
_SIXTEEN = U(16)


@kernel
def charge(m, event, n):
    """Count `n` (int64) of `event` (uint64) for the operation under way and advance both clocks."""
    stats = m.stats
    counter = m.state[R_COUNTER_ROW] + event
    stats[counter] += n
    stats[counter + STATS_REPEATED - STATS_COUNTERS] += n - 1  # whoever prices the counts later knows the charges
    price = STATS_PRICES + event * U4
    stats[CLOCK_LOW] += stats[price + PRICE_FIXED_LOW] + stats[price + PRICE_EACH_LOW] * n
    stats[CLOCK_HIGH] += stats[price + PRICE_FIXED_HIGH] + stats[price + PRICE_EACH_HIGH] * n


@kernel
def charge_each(m, event, n):
    """Charge `event` `n` (int64) times, once each."""
    stats = m.stats
    stats[m.state[R_COUNTER_ROW] + event] += n
    price = STATS_PRICES_ONE + event * U2
    stats[CLOCK_LOW] += stats[price] * n
    stats[CLOCK_HIGH] += stats[price + U1] * n


@kernel
def charge_one(m, event):
    """charge(m, event, 1), without the multiplications."""
    charge_each(m, event, 1)


@kernel
def change(stats, gauge, n):
    """Add `n` (int64) to a gauge and keep its peak."""
    at = STATS_GAUGES + gauge * U2
    value = stats[at] + n
    stats[at] = value
    if value > stats[at + U1]:
        stats[at + U1] = value


@kernel
def change_value(stats, gauge, n):
    """The same for gauges whose peak nobody asks for (hot paths)."""
    stats[STATS_GAUGES + gauge * U2] += n


@kernel
def begin_operation(m, op):
    """Make the record at `op` the one that events are charged to."""
    state = m.state
    state[R_COUNTER_ROW] = STATS_COUNTERS + state[op + O_OP] * _EVENTS
    state[op + O_CLOCK_LOW] = U(m.stats[CLOCK_LOW])
    state[op + O_CLOCK_HIGH] = U(m.stats[CLOCK_HIGH])
    state[op + O_PHASE] = U0
    state[op + O_STATUS] = U0
    state[op + O_DETAIL] = U0
    state[op + O_LOCKED] = U0
    state[op + O_REFERENCED] = U0
    state[op + O_ROUND_END] = U0


@kernel
def pause(m, op):
    """Stop an operation's clock between two of its steps."""
    m.state[op + O_PAUSED_LOW] = U(m.stats[CLOCK_LOW])
    m.state[op + O_PAUSED_HIGH] = U(m.stats[CLOCK_HIGH])


@kernel
def resume(m, op):
    """Let an operation's clock go on: what others cost meanwhile is not its own."""
    state = m.state
    state[op + O_CLOCK_LOW] += U(m.stats[CLOCK_LOW]) - state[op + O_PAUSED_LOW]
    state[op + O_CLOCK_HIGH] += U(m.stats[CLOCK_HIGH]) - state[op + O_PAUSED_HIGH]


@kernel
def bucket(picoseconds):
    """Index of the log-linear bucket: eight per power of two of nanoseconds."""
    value = U(picoseconds) // U(125) + U8  # eighths of a nanosecond, so that the first octave is linear
    top = U63 - leading_zeros(value)
    index = (top - U3) * U8 + ((value >> (top - U3)) & U7)
    return min(index, _LAST_BUCKET)


@kernel
def tally_slot(status):
    """Index of a result's counter: small codes, VM_FAULT bits from 16 on, errno from 32 on."""
    if status < 0:
        return min(U(-status) + U(words.TALLY_ERRNO), _TALLY_SLOTS - U1)
    if U(status) < _SIXTEEN:
        return U(status)
    return _FAULT_BIT + trailing_zeros(U(status))


@outlined
def note_worst(stats, kind, low, high):
    """An operation that has just been counted takes more than all of its kind before it: its cost, and which it is."""
    tally = STATS_TALLY + kind * _TALLY_SLOTS
    ended = np.int64(0)
    for slot in range(tally, tally + _TALLY_SLOTS):
        ended += stats[slot]
    worst = STATS_WORST + kind * U4
    stats[worst] = low
    stats[worst + U1] = high
    stats[worst + U2] = ended - 1


@kernel
def forget_last(stats):
    """The next operation is of another kind than the last: that it costs the same says nothing."""
    stats[STATS_LAST] = -1


@kernel
def finish_operation(m, op):
    """Book the result and the cost of the operation whose record is at `op`; forget_last() where its kind is new."""
    state = m.state
    stats = m.stats
    kind = state[op + O_OP]
    stats[STATS_TALLY + kind * _TALLY_SLOTS + tally_slot(np.int64(state[op + O_STATUS]))] += 1
    low = stats[CLOCK_LOW] - np.int64(state[op + O_CLOCK_LOW])
    high = stats[CLOCK_HIGH] - np.int64(state[op + O_CLOCK_HIGH])
    stats[STATS_COST + kind * U2] += low
    stats[STATS_COST + kind * U2 + U1] += high
    # Operations of a batch mostly cost the same: then the buckets are known, and nothing waits for the clock.
    if low != stats[STATS_LAST] or high != stats[STATS_LAST + U1]:
        stats[STATS_LAST] = low
        stats[STATS_LAST + U1] = high
        stats[STATS_LAST + U2] = np.int64(bucket(low))
        stats[STATS_LAST + U3] = np.int64(bucket(high))
        if high > stats[STATS_WORST + kind * U4 + U1]:
            note_worst(stats, kind, low, high)
    row = STATS_HISTOGRAM + kind * U2 * _BUCKETS
    stats[row + U(stats[STATS_LAST + U2])] += 1
    stats[row + _BUCKETS + U(stats[STATS_LAST + U3])] += 1


@kernel
def result(state, op, status):
    """Store a result (int64) in the record and return it."""
    state[op + O_STATUS] = U(status)
    return status
