"""The machine as kernels see it: a NamedTuple of arrays behind one int64 descriptor.

The descriptor holds address and length of each array, in the order of the fields. It is what entry
points take (0.55 us a call, against 2-3 us for the tuple) and what other languages will hold.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

Words = np.ndarray[Any, Any]


class Machine(NamedTuple):
    """Arrays of one machine; all one-dimensional, C order. Their words are told in layout.py."""

    ram: Words  # uint64, physical memory of the metadata zone, index = address / 8
    state: Words  # uint64, registers (R_*), formats, rows of every object, stacks, a bit per page for each inode
    stats: Words  # int64, clock, gauges, prices, counters and histograms (STATS_*)
    # uint32: leaves below each table page by frame (edits.py: present entries in it), contents of guest frames, shared
    # pages per 2M and 1G
    counts: Words


class FullMachine(NamedTuple):
    """The same, as entries see it that know every parameter: kernels are compiled for each type by itself.

    That keeps what only such machines need out of the fast loops' compilation: see `full_only`.
    """

    ram: Words
    state: Words
    stats: Words
    counts: Words


DTYPES: dict[str, type[np.generic]] = {"ram": np.uint64, "state": np.uint64, "stats": np.int64, "counts": np.uint32}

_ARRAY_TYPES = [types.Array(types.Integer.from_bitwidth(np.dtype(d).itemsize * 8, np.dtype(d).kind == "i"), 1, "C")
                for d in DTYPES.values()]  # fmt: skip


def describe(machine: Machine) -> Words:
    """int64 array: address and length of each array. The caller keeps the arrays alive."""
    words = [word for array in machine for word in (array.ctypes.data, array.size)]
    return np.array(words, dtype=np.int64)


@intrinsic
def open_machine(typingctx: Any, descriptor: Any) -> Any:
    """open_machine(descriptor) -> Machine, inside a kernel; no reference counts are involved."""
    return _open(Machine, descriptor)


@intrinsic
def open_full_machine(typingctx: Any, descriptor: Any) -> Any:
    """The same for an entry that knows every parameter: -> FullMachine."""
    return _open(FullMachine, descriptor)


def _open(machine: type, descriptor: Any) -> Any:
    signature = types.NamedTuple(_ARRAY_TYPES, machine)(descriptor)

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


def full_only(function: Any, otherwise: Any) -> Any:
    """What kernels call as `function` where the machine is a FullMachine; elsewhere it is `otherwise`, which is small.

    Chosen when a caller is compiled, by the type of the first argument: an entry that opens a Machine never compiles
    `function`. Both are kernels that take the same arguments, the machine first.
    """
    options = {"nogil": True, "_nrt": False, "forceinline": True}

    def stub(m, *arguments): ...  # type: ignore[no-untyped-def]

    @overload(stub, jit_options=options)
    def choose(m, *arguments):  # type: ignore[no-untyped-def]
        if m.instance_class is FullMachine:
            return lambda m, *arguments: function(m, *arguments)
        return lambda m, *arguments: otherwise(m, *arguments)

    return stub
