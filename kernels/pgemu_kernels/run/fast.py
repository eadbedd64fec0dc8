"""The entry of default machines: batch calls, replay and benchmarks enter here."""

from __future__ import annotations

from pgemu_kernels.engine.compile import entry
from pgemu_kernels.engine.handle import open_machine
from pgemu_kernels.engine.records import Columns
from pgemu_kernels.run.loops import run_stretches


@entry
def run(descriptor, header, object_, address, offset, length, status, detail, first):
    """Run operations from `first` on, in order, on the machine behind `descriptor`; see Columns for the arrays.

    Ends at the first operation that is for another entry: routing.stopped_at().
    """
    columns = Columns(header, object_, address, offset, length, status, detail)
    return run_stretches(open_machine(descriptor), columns, first)
