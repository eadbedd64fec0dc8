"""The machine as kernels see it: a NamedTuple of arrays behind one int64 descriptor.

The descriptor holds address and length of each array, in the order of the fields. It is what entry
points take (0.55 us a call, against 2-3 us for the tuple) and what other languages will hold.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

Words = np.ndarray[Any, Any]


class Machine(NamedTuple):
    """Arrays of one machine; all one-dimensional, C order. Their words are told in layout.py."""

    ram: Words  # uint64, physical memory of the metadata zone, index = address / 8
    state: Words  # uint64, named scalars (R_*), formats and the rows of every object, STATE_*
    stats: Words  # int64, clock, gauges, prices, counters and histograms, STATS_*
    free: Words  # uint64, stack of freed frames
    pool: Words  # uint64, stack of free huge pages (their first PFNs)
    blocks: Words  # uint64, rows B_*, one per huge page of an inode
    shareability: Words  # uint64, one bit per page of an inode, 1 = shared
    zeroed: Words  # uint64, one bit per page, where zeroing is tracked by page
    shared: Words  # uint32, shared pages in each 2M (from I_PMD) and in each 1G (from I_PUD) of an inode
    leaves: Words  # uint32, leaves below each table page, by frame
    contents: Words  # uint32, frame with the contents of each guest frame, 0 = the zero page


DTYPES: dict[str, type[np.generic]] = dict.fromkeys(Machine._fields, np.uint64) | {
    "stats": np.int64,
    "shared": np.uint32,
    "leaves": np.uint32,
    "contents": np.uint32,
}

_ARRAY_TYPES = [types.Array(types.Integer.from_bitwidth(np.dtype(d).itemsize * 8, np.dtype(d).kind == "i"), 1, "C")
                for d in DTYPES.values()]  # fmt: skip


def describe(machine: Machine) -> Words:
    """int64 array: address and length of each array. The caller keeps the arrays alive."""
    words = [word for array in machine for word in (array.ctypes.data, array.size)]
    return np.array(words, dtype=np.int64)


@intrinsic
def open_machine(typingctx: Any, descriptor: Any) -> Any:
    """open_machine(descriptor) -> Machine, inside a kernel; no reference counts are involved."""
    signature = types.NamedTuple(_ARRAY_TYPES, Machine)(descriptor)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        words = context.make_array(sig.args[0])(context, builder, args[0]).data
        values = []
        for field, array_type in enumerate(sig.return_type.types):
            address = builder.load(builder.gep(words, [context.get_constant(types.intp, 2 * field)]))
            length = builder.load(builder.gep(words, [context.get_constant(types.intp, 2 * field + 1)]))
            size = context.get_constant(types.intp, array_type.dtype.bitwidth // 8)
            array = context.make_array(array_type)(context, builder)
            array.data = builder.inttoptr(address, array.data.type)
            array.nitems = length
            array.itemsize = size
            array.shape = cgutils.pack_array(builder, [length])
            array.strides = cgutils.pack_array(builder, [size])
            array.meminfo = cgutils.get_null_value(array.meminfo.type)
            array.parent = cgutils.get_null_value(array.parent.type)
            values.append(array._getvalue())
        return context.make_tuple(builder, sig.return_type, values)

    return signature, codegen
