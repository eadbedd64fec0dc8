"""Memory and functions of C by their addresses, for what C calls (run/c_calls.py)."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pgemu_kernels.engine.handle import DESCRIPTOR_WORDS
from pgemu_kernels.engine.inner_functions import array_value

_WORD = ir.IntType(64)


def _array(context: Any, builder: Any, kind: Any, address: Any, length: Any) -> Any:
    return array_value(
        context, builder, kind, builder.inttoptr(address, context.get_data_type(kind.dtype).as_pointer()), length
    )


def _array_at(item: Any) -> Any:
    """An intrinsic (address, length): the array of `item`s there, both uint64. No bounds are known."""

    @intrinsic
    def array_at(typingctx: Any, address: Any, length: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            return _array(context, builder, signature.return_type, *values)

        return types.Array(item, 1, "C")(types.uint64, types.uint64), generate

    return array_at


words_at = _array_at(types.uint64)
signed_words_at = _array_at(types.int64)
bytes_at = _array_at(types.uint8)


@intrinsic
def descriptor_at(typingctx: Any, address: Any) -> Any:
    """descriptor_at(address): the descriptor of a machine that lies there."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return _array(context, builder, signature.return_type, values[0], ir.Constant(_WORD, DESCRIPTOR_WORDS))

    return types.Array(types.int64, 1, "C")(types.uint64), generate


@intrinsic
def call_c(typingctx: Any, address: Any, argument: Any) -> Any:
    """call_c(address, argument): call a C function that takes a uint64_t and returns an int64_t."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kind = ir.FunctionType(_WORD, [_WORD])
        return builder.call(builder.inttoptr(values[0], kind.as_pointer()), [values[1]])

    return types.int64(types.uint64, types.uint64), generate
