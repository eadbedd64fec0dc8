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

from pgemu.machine.arguments import OfMachine
from pgemu.machine.core import Core
from pgemu.machine.field_rules import shown
from pgemu_kernels.engine.compile import current_stamp
from pgemu_kernels.run.entries import declared
from pgemu_kernels.words.registers import R_FULL

__all__ = (
    "H_DESCRIPTOR", "H_DESIGNS", "H_DEVICES", "H_EDIT", "H_LENGTH", "H_LOOPS", "H_NESTED", "H_ORDINARY", "H_POOLING",
    "H_RUN", "H_TRANSLATE", "Handle", "HandleType", "stamp",
)  # fmt: skip

Array = np.ndarray[Any, Any]
What = Literal["translate", "translate_nested", "edit", "operate", "full", "ordinary", "pooling", "devices"]
USUAL: tuple[What, ...] = ("translate", "translate_nested", "edit", "operate")

# Words of a handle: the address of the machine's descriptor (0: closed), then of machine code (0: not loaded).
H_DESCRIPTOR, H_TRANSLATE, H_NESTED, H_EDIT, H_RUN, H_DESIGNS, H_ORDINARY, H_POOLING, H_DEVICES = range(9)
H_LOOPS = 9  # + 0 .. 2: the loops that `run` goes to
H_LENGTH = 12  # words of the descriptor
H_WORDS = 13

_ENTRIES: dict[str, dict[int, str]] = {
    "translate": {H_TRANSLATE: "translate"},
    "translate_nested": {H_NESTED: "translate_nested"},
    "edit": {H_EDIT: "edit"},
    "operate": {H_RUN: "run", H_LOOPS: "run_faults", H_LOOPS + 1: "run_converts", H_LOOPS + 2: "run_others"},
    "full": {H_DESIGNS: "run_designs"},
    "ordinary": {H_ORDINARY: "run_ordinary"},
    "pooling": {H_POOLING: "run_pooling"},
    "devices": {H_DEVICES: "run_devices", H_DESIGNS: "run_designs"},
}


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
        four), "full" (operations of machines with parameters of their own, and those that default machines leave to
        them), "ordinary" (process memory and memory slots of neither design), "pooling" (huge pages themselves),
        "devices". Their machine code is loaded, or compiled if it is in no cache.
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
        """Load the machine code of more. ValueError for another word.

        A machine that got parameters of its own after the handle was made (a VM of another kind than the default)
        needs "operate" to be loaded again.
        """
        known = {entry.name: entry for entry in declared}
        for one in what:
            if one not in _ENTRIES:
                raise ValueError(f"what {shown(one)}: expected one of {', '.join(_ENTRIES)}")
            full = one == "operate" and self.machine.register(R_FULL)
            for word, name in _ENTRIES["full" if full else one].items():
                self._words[word] = known[name].address()

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
