"""uint64 constants, the arithmetic of page numbers, and three machine instructions that numba has no name for."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

# uint64 combined with a literal or an int64 becomes int64: every constant is typed, shift counts too.
U0 = np.uint64(0)
U1 = np.uint64(1)
U2 = np.uint64(2)
U3 = np.uint64(3)
U4 = np.uint64(4)
U5 = np.uint64(5)
U6 = np.uint64(6)
U7 = np.uint64(7)
U8 = np.uint64(8)
U9 = np.uint64(9)
U12 = np.uint64(12)
U16 = np.uint64(16)
U18 = np.uint64(18)
U21 = np.uint64(21)
U24 = np.uint64(24)
U27 = np.uint64(27)
U30 = np.uint64(30)
U32 = np.uint64(32)
U39 = np.uint64(39)
U48 = np.uint64(48)
U63 = np.uint64(63)
U64 = np.uint64(64)
U511 = np.uint64(511)
U512 = np.uint64(512)
U4095 = np.uint64(4095)
LOW8 = np.uint64(0xFF)
LOW16 = np.uint64(0xFFFF)
LOW32 = np.uint64(0xFFFFFFFF)
ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
NONE = ALL  # "no such index"


@intrinsic
def prefetch(typingctx: Any, array: Any, index: Any) -> Any:
    """prefetch(array, index): ask for the cache line of array[index], for reading and soon."""
    signature = types.void(array, index)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        address = builder.bitcast(builder.gep(data, [args[1]]), ir.IntType(8).as_pointer())
        i32 = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), i32, i32, i32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [address, i32(0), i32(3), i32(1)])
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def merge_words(typingctx: Any, array: Any, target: Any, source: Any, kept: Any, put: Any, first: Any) -> Any:
    """Four words at once: array[target + i] = array[source + i] & kept[i] | put[i]; `first` is or-ed into word 0.

    The array is uint64; `kept` and `put` are tuples of four uint64. No bounds are checked.
    """
    signature = types.void(array, target, source, kept, put, first)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        words = ir.VectorType(ir.IntType(64), 4)
        i32 = ir.IntType(32)

        def pointer(index: Any) -> Any:
            return builder.bitcast(builder.gep(data, [index]), words.as_pointer())

        def vector(values: list[Any]) -> Any:
            found = ir.Constant(words, [0] * 4)
            for i, value in enumerate(values):
                found = builder.insert_element(found, value, i32(i))
            return found

        masks, values = (vector([builder.extract_value(args[n], i) for i in range(4)]) for n in (3, 4))
        found = builder.and_(builder.load(pointer(args[2]), align=8), masks)
        found = builder.or_(builder.or_(found, values), vector([args[5]]))
        builder.store(found, pointer(args[1]), align=8)
        return context.get_dummy_value()

    return signature, codegen


def _unary(name: str) -> Any:
    def declare(typingctx: Any, value: Any) -> Any:
        signature = types.uint64(types.uint64)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            i64 = ir.IntType(64)
            i1 = ir.IntType(1)
            if name == "ctpop":
                function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(i64, [i64]), "llvm.ctpop.i64")
                return builder.call(function, [args[0]])
            function = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(i64, [i64, i1]), f"llvm.{name}.i64"
            )
            return builder.call(function, [args[0], i1(0)])

        return signature, codegen

    return intrinsic(declare)


leading_zeros = _unary("ctlz")
trailing_zeros = _unary("cttz")
population = _unary("ctpop")
