"""A machine as compiled functions take it: where its arrays are, and where the machine code of pgemu's entries begins.

numba's cache of a caller's function is keyed by the types of its arguments. The type of a handle carries the digest of
all that callers compile in (the kernels' sources, this package's, the compilers' versions): a function that was cached
with another pgemu is compiled again. Addresses are read from the handle at each call and are in no cached code.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import NativeValue, models, register_model, typeof_impl, unbox

from pgemu.capi import operating
from pgemu.machine.arguments import OfMachine
from pgemu.machine.core import Core
from pgemu.machine.field_rules import shown
from pgemu_kernels.engine.compile import current_stamp
from pgemu_kernels.run.entries import declared
from pgemu_kernels.words.operations import Entry
from pgemu_kernels.words.registers import R_FULL

__all__ = (
    "H_DESCRIPTOR", "H_EDIT", "H_LENGTH", "H_NESTED", "H_OPERATE", "H_TRANSLATE", "Handle", "HandleType", "stamp",
)  # fmt: skip

Array = np.ndarray[Any, Any]
What = Literal["translate", "translate_nested", "edit", "operate", "full", "ordinary", "pooling", "devices"]
USUAL: tuple[What, ...] = ("translate", "translate_nested", "edit", "operate")

# Words of a handle: the address of the machine's descriptor (0: closed), then of machine code (0: not loaded).
H_DESCRIPTOR, H_TRANSLATE, H_NESTED, H_EDIT, H_OPERATE = range(5)
H_LENGTH = 5  # words of the descriptor
H_WORDS = 6

_ENTRIES = {"translate": (H_TRANSLATE, "translate"), "translate_nested": (H_NESTED, "translate_nested")}
_ENTRIES |= {"edit": (H_EDIT, "edit")}
# What operations are run by: all go through c_operate(), which calls these by their addresses.
_RUN_BY: dict[str, tuple[Entry, ...]] = {
    "operate": (Entry.FAST,), "full": (Entry.FULL,), "ordinary": (Entry.ORDINARY,), "pooling": (Entry.POOLING,),
    "devices": (Entry.DEVICES, Entry.FULL),
}  # fmt: skip


@cache
def stamp() -> str:
    """Digest of what callers compile in, 64 hexadecimal digits."""
    digest = hashlib.sha256(current_stamp().encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class Handle(OfMachine):
    """What functions of pgemu.kernels take first; it keeps the machine alive.

    :param machine: the Machine
    :param what: what is going to be called, of "translate", "translate_nested", "edit", "operate" (the default: these
        four), and what operations go on to: "full" (operations of the designs that are rare, such as ALLOCATE; on
        machines with parameters of their own all operations, and there "operate" is enough), "ordinary" (process memory
        and memory slots of neither design), "pooling" (huge pages themselves), "devices". Their machine code is loaded
        now, or compiled if it is in no cache. None of the last four has to be named: the first operation that needs one
        loads it. Name it where that cannot be: in functions with `parallel=True`, whose threads wait for Python in
        vain, or where the first operation must take no longer than others.
    """

    machine: Core

    def __init__(self, machine: Core, *what: What) -> None:
        self.machine = machine
        self._words = np.zeros(H_WORDS, np.uint64)
        self._words[H_DESCRIPTOR] = machine.descriptor.ctypes.data
        self._words[H_LENGTH] = machine.descriptor.size
        self._address = self._words.ctypes.data
        self.load(*(what or USUAL))

    def __repr__(self) -> str:
        return f"Handle({self.machine!r})" if self._words[H_DESCRIPTOR] else "Handle(closed)"

    def load(self, *what: What) -> None:
        """Load the machine code of more. ValueError for another word."""
        known = {entry.name: entry for entry in declared}
        for one in what:
            if one in _ENTRIES:
                word, name = _ENTRIES[one]
                self._words[word] = known[name].address()
            elif one in _RUN_BY:
                full = one == "operate" and self.machine.register(R_FULL)
                self._words[H_OPERATE] = operating(self.machine, *_RUN_BY["full" if full else one])
            else:
                raise ValueError(f"what {shown(one)}: expected one of {', '.join((*_ENTRIES, *_RUN_BY))}")

    def close(self) -> None:
        """Let go of the machine: every call with the handle returns CLOSED from now on."""
        self._words[:] = 0


class HandleType(types.Type):
    """The type of a handle in compiled functions."""

    def __init__(self, digest: str) -> None:
        super().__init__(name=f"pgemu.kernels.Handle({digest})")


@typeof_impl.register(Handle)
def _type_of(value: Handle, context: Any) -> HandleType:
    return HandleType(stamp())


@register_model(HandleType)
class _HandleModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: HandleType) -> None:
        super().__init__(manager, kind, ir.IntType(64).as_pointer())


@unbox(HandleType)
def _unbox(kind: HandleType, value: Any, c: Any) -> NativeValue:
    held = c.pyapi.object_getattr_string(value, "_address")
    address = c.pyapi.long_as_ulonglong(held)
    c.pyapi.decref(held)
    failed = cgutils.is_not_null(c.builder, c.pyapi.err_occurred())
    return NativeValue(c.builder.inttoptr(address, ir.IntType(64).as_pointer()), is_error=failed)
