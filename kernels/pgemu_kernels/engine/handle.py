"""The machine as kernels see it: one pointer, to a descriptor that holds address and length of each array.

The int64 descriptor is what entry points take (0.55 us a call, against 2-3 us for a tuple of arrays) and what other
languages will hold. Inside kernels a machine is that one word too: a call passes a pointer, and `m.state` loads the
array where it is used. The descriptor does not change while a kernel runs, so LLVM loads each array once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import from_dtype, typeof, types
from numba.core.dispatcher import Dispatcher
from numba.core.typing.templates import AbstractTemplate, AttributeTemplate, infer_global, signature as call_signature
from numba.extending import infer_getattr, intrinsic, lower_builtin, lower_getattr_generic, models, register_model

from pgemu_kernels.engine.inner_functions import array_value

Words = np.ndarray[Any, Any]


class Machine(NamedTuple):
    """Arrays of one machine; all one-dimensional, C order. Their words are told in layout.py."""

    ram: Words  # uint64, physical memory of the metadata zone, index = address / 8
    state: Words  # uint64, registers (R_*), formats, rows of every object, stacks, a bit per page for each inode
    stats: Words  # int64, clock, gauges, prices, counters and histograms (STATS_*)
    # uint32: leaves below each table page by frame (edits.py: present entries in it), contents of guest frames, shared
    # pages per 2M and 1G
    counts: Words


DTYPES: dict[str, type[np.generic]] = {"ram": np.uint64, "state": np.uint64, "stats": np.int64, "counts": np.uint32}

_ARRAY_TYPES = {name: types.Array(from_dtype(np.dtype(dtype)), 1, "C") for name, dtype in DTYPES.items()}


TELL_DEVICES = 2 * len(DTYPES)  # word of a descriptor: where the entry run/revocations.py:tell_devices begins, or 0
C_CONTEXT = TELL_DEVICES + 1  # ... and where what calls from C need beside the machine lies (pgemu.capi), or 0
DESCRIPTOR_WORDS = C_CONTEXT + 1


def describe(machine: Machine) -> Words:
    """int64 array: address and length of each array, TELL_DEVICES, C_CONTEXT. The caller keeps the arrays alive."""
    words = [word for array in machine for word in (array.ctypes.data, array.size)]
    return np.array([*words, 0, 0], dtype=np.int64)


_WORD = ir.IntType(64)


class MachineType(types.Type):  # type: ignore[misc]
    """A machine inside kernels, which are compiled for each of the two types by itself.

    `full`: as entries see it that know every parameter. That keeps what only such machines need out of the fast loops'
    compilation: see `full_only`, `parameter` and compile.py:step.
    """

    def __init__(self, full: bool) -> None:
        self.full = full
        super().__init__("FullMachine" if full else "Machine")


machine_type = MachineType(full=False)
full_machine_type = MachineType(full=True)


@register_model(MachineType)
class _MachineModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _WORD.as_pointer())


@infer_getattr
class _MachineAttributes(AttributeTemplate):  # type: ignore[misc]
    key = MachineType

    def generic_resolve(self, machine: Any, name: str) -> Any:
        return _ARRAY_TYPES.get(name)


def _descriptor_word(builder: Any, machine: Any, index: int) -> Any:
    word = builder.load(builder.gep(machine, [ir.Constant(_WORD, index)], inbounds=True))
    word.set_metadata("invariant.load", builder.module.add_metadata([]))
    return word


@lower_getattr_generic(MachineType)
def _load_array(context: Any, builder: Any, machine_kind: Any, machine: Any, name: str) -> Any:
    """The array's value: address and length from the descriptor."""
    position = 2 * list(DTYPES).index(name)
    address, length = (_descriptor_word(builder, machine, position + k) for k in range(2))
    kind = _ARRAY_TYPES[name]
    data = builder.inttoptr(address, context.get_data_type(kind.dtype).as_pointer())
    return array_value(context, builder, kind, data, length)


@intrinsic
def open_machine(typingctx: Any, descriptor: Any) -> Any:
    """open_machine(descriptor) -> the machine, inside a kernel; no reference counts are involved."""
    return machine_type(descriptor), _open


@intrinsic
def open_full_machine(typingctx: Any, descriptor: Any) -> Any:
    """The same for an entry that knows every parameter."""
    return full_machine_type(descriptor), _open


def _open(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    return context.make_array(signature.args[0])(context, builder, arguments[0]).data


@intrinsic
def descriptor_of(typingctx: Any, machine: Any) -> Any:
    """descriptor_of(m): the descriptor that a machine was opened by, to call another entry with it."""
    kind = types.Array(types.int64, 1, "C")

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return array_value(context, builder, kind, arguments[0], ir.Constant(_WORD, DESCRIPTOR_WORDS))

    return kind(machine), generate


def full_only(function: Any, otherwise: Any) -> Any:
    """What kernels call as `function` where the machine is a full one; elsewhere it is `otherwise`.

    That is a small kernel of the same arguments, or what such a one would return: a number, a truth value, None. Chosen
    when a caller is compiled, by the type of the first argument, the machine: an entry that opens one by `open_machine`
    never compiles `function`, and a value is no call at all.
    """
    is_kernel = isinstance(otherwise, Dispatcher)
    value_type = None if is_kernel else typeof(otherwise)

    def chosen(*arguments: Any) -> Any:
        raise NotImplementedError("only kernels call this")

    def value(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.get_constant_generic(builder, signature.return_type, otherwise)

    class Choice(AbstractTemplate):  # type: ignore[misc]
        """Calls of it are calls of one of the two kernels, or the value: nothing of its own is compiled."""

        key = chosen

        def generic(self, args: Any, kws: Any) -> Any:
            if not (is_kernel or args[0].full):
                return call_signature(value_type, *args)
            return self.kernel_type(args).get_call_type(self.context, args, kws)

        def get_impl_key(self, signature: Any) -> Any:
            if not (is_kernel or signature.args[0].full):
                return value
            return self.kernel_type(signature.args).get_impl_key(signature)

        def kernel_type(self, args: Any) -> Any:
            return types.Dispatcher(function if args[0].full else otherwise)

    infer_global(chosen, types.Function(Choice))
    if not is_kernel:
        lower_builtin(value, types.VarArg(types.Any))(value)
    return chosen


gifts: list[list[Any]] = []  # what each call of given_later() has been given


def given_later() -> tuple[Any, Any]:
    """(call, give): kernels call `call`, a kernel that a module above hands over by `give(kernel)` before they compile.

    What `->fault` of struct vm_operations_struct is to mm/memory.c, but chosen when the caller is compiled. An entry's
    module sees to it that the module above is imported, whichever entries are compiled elsewhere.
    """
    given: list[Any] = []
    gifts.append(given)

    def later(*arguments: Any) -> Any:
        raise NotImplementedError("only kernels call this")

    class Given(AbstractTemplate):  # type: ignore[misc]
        """Calls of it are calls of the kernel that was given."""

        key = later

        def generic(self, args: Any, kws: Any) -> Any:
            return types.Dispatcher(given[0]).get_call_type(self.context, args, kws)

        def get_impl_key(self, signature: Any) -> Any:
            return types.Dispatcher(given[0]).get_impl_key(signature)

    infer_global(later, types.Function(Given))
    return later, given.append


def parameter(register: Any, fixed: Any) -> Any:
    """parameter(register, fixed)(m): the register of a full machine; elsewhere the constant `fixed`, both uint64."""

    @intrinsic
    def read(typingctx: Any, machine: Any) -> Any:
        return types.uint64(machine), load if machine.full else constant

    def load(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _descriptor_word(builder, arguments[0], 2 * list(DTYPES).index("state"))
        registers = builder.inttoptr(address, _WORD.as_pointer())
        return builder.load(builder.gep(registers, [ir.Constant(_WORD, int(register))], inbounds=True))

    def constant(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return ir.Constant(_WORD, int(fixed))

    return read
