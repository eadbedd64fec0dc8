"""The entries of default machines: batch calls, replay and benchmarks enter here.

`run` goes from stretch to stretch; the loops that run them are entries of their own, so that they can be compiled at
once and only where they are used. It calls them by their addresses: they cost it no more than other functions.
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.compile import entry
from pgemu_kernels.engine.handle import open_machine
from pgemu_kernels.engine.records import Columns, element
from pgemu_kernels.run.loops import (
    OP_HOST_FAULT,
    OP_ZAP,
    converts,
    guest_faults,
    host_faults,
    others,
    run_stretches,
    zaps,
)

U = np.uint64
_BYTE = U(0xFF)


@entry
def run(descriptor, loops, header, object_, address, offset, length, status, detail, first):
    """Run operations from `first` on, in order, on the machine behind `descriptor`; see Columns for the arrays.

    Ends at the first operation that is for another entry: routing.stopped_at(). Where `loops` (uint64[3], addresses)
    has 0 for the loop that an operation needs: its index and that loop, see loops.py:run_elsewhere.
    """
    columns = Columns(header, object_, address, offset, length, status, detail)
    return run_stretches(open_machine(descriptor), columns, first, (descriptor, loops))


@entry
def run_faults(descriptor, header, object_, address, offset, length, status, detail, first, last):
    """A stretch of faults of one kind, from the host or a guest."""
    m = open_machine(descriptor)
    columns = Columns(header, object_, address, offset, length, status, detail)
    if element(header, first) & _BYTE == OP_HOST_FAULT:
        host_faults(m, columns, first, last)
    else:
        guest_faults(m, columns, first, last)
    return np.int64(0)


@entry
def run_converts(descriptor, header, object_, address, offset, length, status, detail, first, last):
    """A stretch of conversions."""
    columns = Columns(header, object_, address, offset, length, status, detail)
    converts(open_machine(descriptor), columns, first, last)
    return np.int64(0)


@entry
def run_others(descriptor, header, object_, address, offset, length, status, detail, first, last):
    """A stretch of zaps, or of what is rare."""
    m = open_machine(descriptor)
    columns = Columns(header, object_, address, offset, length, status, detail)
    if element(header, first) & _BYTE == OP_ZAP:
        zaps(m, columns, first, last)
    else:
        others(m, columns, first, last)
    return np.int64(0)
