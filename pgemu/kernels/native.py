"""What the functions of this package are made of: arrays on the stack, calls of machine code by its address, checks."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.errors import TypingError
from numba.extending import intrinsic, overload, register_jitable

from pgemu.kernels.handle import H_DESCRIPTOR, H_LENGTH, HandleType
from pgemu_kernels.engine.handle import machine_type
from pgemu_kernels.engine.inner_functions import array_value
from pgemu_kernels.words.call_words import BAD_ARGUMENT, BAD_MACHINE, NO_CODE
from pgemu_kernels.words.operations import Flag

__all__ = (
    "BYTES", "CLOSED", "FLAGS", "FOREIGN", "HANDLE", "NOT_LOADED", "NUMBER", "REFUSED", "TRUTH", "WORDS", "address_of",
    "called", "compiled", "descriptor_of", "flag_bits", "handle_word", "inlined", "machine_of", "no_words",
    "stack_bytes", "stack_status", "stack_words",
)  # fmt: skip

# What functions return that could not do anything: below every -errno (include/linux/err.h:MAX_ERRNO).
CLOSED, REFUSED, NOT_LOADED = BAD_MACHINE, BAD_ARGUMENT, NO_CODE  # as to C
FOREIGN = -5005

_WORD, _POINTER = ir.IntType(64), ir.IntType(64).as_pointer()
_WORDS, _BYTES, _INTS = (types.Array(kind, 1, "C") for kind in (types.uint64, types.uint8, types.int64))


# --------------------------------------------------------------------------- types of arguments


def HANDLE(kind: Any) -> str:  # noqa: N802
    """The first argument."""
    return "" if isinstance(kind, HandleType) else "a pgemu.kernels.Handle"


def NUMBER(kind: Any) -> str:  # noqa: N802
    """An address, a length, a code."""
    integer = isinstance(kind, types.Integer | types.IntEnumMember)
    return "" if integer else "an integer (uint64; others are converted, modulo 2**64)"


def FLAGS(kind: Any) -> str:  # noqa: N802
    """The same, or a pgemu.Flag, which numba takes for no number."""
    return "" if _is_flag(kind) else NUMBER(kind) and "an integer or a pgemu.Flag"


def TRUTH(kind: Any) -> str:  # noqa: N802
    """Yes or no."""
    return "" if isinstance(kind, types.Boolean) else NUMBER(kind) and "a bool, or an integer that is 0 for no"


def _is_flag(kind: Any) -> bool:
    return isinstance(kind, types.EnumMember) and kind.instance_class is Flag


def WORDS(kind: Any) -> str:  # noqa: N802
    """An array of words."""
    return "" if _is_array(kind, types.uint64) else "a writable uint64 array of one dimension, C order"


def BYTES(kind: Any) -> str:  # noqa: N802
    """An array of small numbers."""
    return "" if _is_array(kind, types.uint8) else "a writable uint8 array of one dimension, C order"


def _is_array(kind: Any, item: Any) -> bool:
    plain = isinstance(kind, types.Array) and kind.dtype == item and kind.ndim == 1
    return bool(plain and kind.layout == "C" and kind.mutable)


# Nothing is allocated, and counting references would cost more than a walk: they are counted atomically.
_OPTIONS = {"nogil": True, "_nrt": False}
inlined = register_jitable(forceinline=True, **_OPTIONS)
called = register_jitable(**_OPTIONS)


def compiled(inline: bool = False, /, **expected: Callable[[Any], str]) -> Callable[[Callable[..., Any]], Any]:
    """Decorate a function that compiled functions call: with others' arguments than expected they do not compile.

    Python cannot call it: TypeError.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        name = f"pgemu.kernels.{function.__name__}()"

        def public(*arguments: Any, **named: Any) -> Any:
            raise TypeError(f"{name} is called by functions that numba compiles: call it from an @njit function")

        def chosen(*kinds: Any) -> Any:
            for (argument, check), kind in zip(expected.items(), kinds, strict=True):
                told = check(kind)
                if told:
                    raise TypingError(f"{name}: {argument} is {kind}, expected {told}")
            return function

        for one in (public, chosen):
            one.__name__ = one.__qualname__ = function.__name__
            one.__doc__, one.__module__ = function.__doc__, function.__module__
            one.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
        overload(public, jit_options={"forceinline": inline, **_OPTIONS}, strict=False)(chosen)
        return public

    return decorate


# --------------------------------------------------------------------------- flags


def flag_bits(flags: Any) -> Any:
    """flag_bits(flags): an integer or a Flag, as uint64; of compiled functions."""
    raise TypeError("flag_bits() is called by compiled functions")


@overload(flag_bits, jit_options={"forceinline": True, **_OPTIONS}, strict=False)
def _flag_bits(flags: Any) -> Any:
    if _is_flag(flags):
        return lambda flags: np.uint64(flags.value)
    return lambda flags: np.uint64(flags)


@overload(operator.or_, jit_options={"forceinline": True, **_OPTIONS}, strict=False)
def _both_flags(one: Any, other: Any) -> Any:
    """Flag.WRITE | Flag.EXEC in a caller's function: an integer."""
    if _is_flag(one) and (_is_flag(other) or isinstance(other, types.Integer)):
        return lambda one, other: flag_bits(one) | flag_bits(other)
    if _is_flag(other) and isinstance(one, types.Integer):
        return lambda one, other: flag_bits(one) | flag_bits(other)
    return None


# --------------------------------------------------------------------------- the handle's words


@intrinsic
def handle_word(typingctx: Any, handle: Any, index: Any) -> Any:
    """handle_word(handle, index): a word of the handle, uint64."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.load(builder.gep(values[0], [values[1]]))

    return types.uint64(handle, types.uint64), generate


def _descriptor(builder: Any, handle: Any) -> Any:
    address = builder.load(builder.gep(handle, [ir.Constant(_WORD, H_DESCRIPTOR)]))
    return builder.inttoptr(address, _POINTER)


@intrinsic
def machine_of(typingctx: Any, handle: Any) -> Any:
    """machine_of(handle): the machine as kernels take it; of a handle that is open."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return _descriptor(builder, values[0])

    return machine_type(handle), generate


@intrinsic
def descriptor_of(typingctx: Any, handle: Any) -> Any:
    """descriptor_of(handle): the descriptor as entries take it, int64."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        length = builder.load(builder.gep(values[0], [ir.Constant(_WORD, H_LENGTH)]))
        return array_value(context, builder, _INTS, _descriptor(builder, values[0]), length)

    return _INTS(handle), generate


# --------------------------------------------------------------------------- arrays on the stack


def _on_stack(kind: Any) -> Any:
    """An intrinsic (count) that gives an array which ends with its function; nothing of it is set."""

    @intrinsic(prefer_literal=True)
    def stack_array(typingctx: Any, count: Any) -> Any:
        length = ir.Constant(_WORD, count.literal_value)

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            data = cgutils.alloca_once(builder, context.get_data_type(kind.dtype), size=length)
            return array_value(context, builder, kind, data, length)

        return kind(count), generate

    return stack_array


stack_words = _on_stack(_WORDS)
stack_bytes = _on_stack(_BYTES)
stack_status = _on_stack(_INTS)


@intrinsic
def no_words(typingctx: Any) -> Any:
    """no_words(): uint64[0]."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return array_value(context, builder, _WORDS, ir.Constant(_POINTER, None), ir.Constant(_WORD, 0))

    return _WORDS(), generate


@intrinsic
def address_of(typingctx: Any, words: Any) -> Any:
    """address_of(words): where an array begins, uint64."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        data = context.make_array(words)(context, builder, values[0]).data
        return builder.ptrtoint(data, _WORD)

    return types.uint64(words), generate
