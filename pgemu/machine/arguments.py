"""What the parameters of public methods may be: read off their annotations, and checked before anything is done.

The rules and their complaints are made as those of Config's fields are (field_rules.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from types import FunctionType, MappingProxyType
from typing import Any, NoReturn, TypeVar

import numpy as np

from pgemu.machine.columns import addresses_of, integers
from pgemu.machine.field_rules import SWITCH, Rule, amount, checked, shown
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Event, Gauge
from pgemu_kernels.words.operations import Operation

__all__ = ("OfMachine", "argument", "guarded", "guards_methods")

_Class = TypeVar("_Class", bound=type)
_WORD = amount(0, (1 << 64) - 1, "an integer from 0 to 2**64 - 1")
_SIGNED = amount(-(1 << 63), (1 << 64) - 1, "an integer from -2**63 to 2**64 - 1")
_FRAME = amount(0, (1 << 52) - 1, "a frame or page number as an integer from 0 to 2**52 - 1")
_NUMBER = amount(0, (1 << 32) - 1, "an integer from 0 to 2**32 - 1")


def _array(value: Any) -> Any:
    """`value` as an array; TypeError for what is no array and no sequence."""
    if isinstance(value, str | bytes | dict | set | np.ma.MaskedArray) or not hasattr(value, "__iter__"):
        raise TypeError
    if not hasattr(value, "__len__"):
        value = list(value)
    if not isinstance(value, np.ndarray | range) and any(isinstance(one, bool | np.bool_) for one in value):
        raise TypeError
    try:
        return integers(value)
    except (ValueError, OverflowError):  # rows of several lengths, numbers beyond every type
        raise TypeError from None


def _up_to(most: int) -> Callable[[Any], bool]:
    def holds(given: Any) -> bool:
        """Whether an array is one of integers, in one dimension, none of them negative or beyond `most`."""
        if given.ndim != 1:
            return False
        if given.dtype == np.uint64 and most >> 64 == 0 and most & 1 << 63:
            return True
        if not given.size:
            return given.dtype.kind in "uif"  # of an empty list NumPy makes floats
        return given.dtype.kind in "ui" and int(given.min()) >= 0 and int(given.max()) <= most

    return holds


def _member(kind: type[Any]) -> Rule:
    return Rule(lambda: f"one of pgemu_kernels.words.{kind.__name__}", lambda value: _of(kind, value), lambda _: True)


def _of(kind: type[Any], value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError
    return value


def _fraction(value: Any) -> float:
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError
    return float(value)


def _bytes(value: Any) -> bytes:
    if not isinstance(value, bytes | bytearray | memoryview):
        raise TypeError
    return bytes(value)


def _nodes(value: Any) -> tuple[int, ...]:
    if isinstance(value, str | bytes) or not hasattr(value, "__iter__"):
        raise TypeError
    return tuple(amount(0, 63, "").plain(node) for node in value)


_WORDS = "a sequence or array of integers, one dimension, each from 0 to {}"
_EACH = Rule(lambda: _WORDS.format("2**64 - 1"), _array, _up_to((1 << 64) - 1))
_EACH_FRAME = Rule(lambda: _WORDS.format("2**52 - 1"), _array, _up_to((1 << 52) - 1))

BY_ANNOTATION: Mapping[str, Rule] = MappingProxyType(
    {
        "int": _WORD,
        "np.uint64": _WORD,
        "bool": SWITCH,
        "float": Rule(lambda: "a number from 0 to 1", _fraction, lambda value: 0 <= value <= 1),
        "bytes": Rule(lambda: "bytes", _bytes, lambda _: True),
        "Array": _EACH,
        "Sequence[int]": _EACH,
        "range": _EACH,
        "Iterable[int]": Rule(lambda: "node numbers, each from 0 to 63", _nodes, lambda n: all(0 <= i < 64 for i in n)),
        "Operation": _member(Operation),
        "Event": _member(Event),
        "Gauge": _member(Gauge),
    }
)
BY_NAME: Mapping[str, Rule] = MappingProxyType(
    {
        "actor": amount(0, int(W.ACTORS) - 1, f"an integer from 0 to {int(W.ACTORS) - 1}"),
        "vm": amount(0, (1 << 16) - 1, "a number of a VM, an integer from 0 to 2**16 - 1"),
        "pfn": _FRAME,
        "page": _FRAME,
        "pin": _NUMBER,
        "slot": _NUMBER,
        "pfns": _EACH_FRAME,
    }
)
"""Of a parameter by its name, where the type says less."""

_OBJECTS = ("AddressSpace", "Vm", "GuestMemfd", "GuestMemfd4K", "HugetlbFile", "Device")
_VALUES = ("PageFormat", "Access", "str", "Config")  # of no machine
_OWN_CHECK = ("log", "owner", "out")  # arrays of other types, which are written to
_Check = Callable[[Any, str, Any], Any]


def argument(name: str, value: Any, annotation: str = "int") -> Any:
    """An argument as the method takes it; TypeError or ValueError that name it, its value and what is expected."""
    return checked(name, value, {name: _rule_of(name, annotation)})


def _rule_of(name: str, annotation: str) -> Rule:
    return BY_NAME.get(name) or BY_ANNOTATION[annotation]


def _check_of(name: str, annotation: str, signed: bool) -> _Check | None:
    """What checks a parameter (owner, name, value); None where its function does."""
    parts = [part.strip() for part in annotation.split("|")]
    kinds = [part for part in parts if part != "None"]
    optional = len(kinds) < len(parts)
    if kinds and all(kind in _OBJECTS or kind in _VALUES for kind in kinds):
        return lambda owner, name, value: _own(owner, name, value, kinds, optional)
    if not kinds or name in _OWN_CHECK or any(kind not in BY_ANNOTATION for kind in kinds):
        return None
    kind = "Array" if "Array" in kinds else kinds[0]
    rule = (_SIGNED if signed else _rule_of(name, kind))._replace(optional=optional)
    rules = {name: rule}
    if rule.plain is _array:
        return lambda owner, name, value: addresses_of(checked(name, value, rules))
    return lambda owner, name, value: checked(name, value, rules)


def _own(owner: Any, name: str, value: Any, kinds: list[str], optional: bool) -> Any:
    """An object of the same machine, of one of the classes."""
    if value is None and optional:
        return value
    if not any(base.__name__ in kinds for base in type(value).__mro__):
        expected = " or ".join(f"a {kind}" for kind in kinds)
        raise TypeError(f"{name} {shown(value)} ({type(value).__name__}): expected {'None or ' * optional}{expected}")
    if hasattr(value, "machine") and value.machine is not getattr(owner, "machine", owner):
        raise ValueError(f"{name} {shown(value)}: expected one of the same machine")
    return value


def guarded(function: Any, *, signed: tuple[str, ...] = (), method: bool = True) -> Any:
    """The function, its arguments checked by what their annotations say; itself where they say nothing of it.

    :param signed: names of its parameters that may be negative
    :param method: whether the first parameter is the object
    """
    parameters = list(inspect.signature(function).parameters.values())
    checks = {
        one.name: check
        for one in parameters
        if isinstance(one.annotation, str) and (check := _check_of(one.name, one.annotation, one.name in signed))
    }
    if not checks:
        return function
    places = [(i, one.name, checks[one.name]) for i, one in enumerate(parameters) if one.name in checks]

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        owner = arguments[0] if arguments else None
        given = list(arguments)
        for i, name, check in places:
            if i < len(given):
                given[i] = check(owner, name, given[i])
            elif name in named:
                named[name] = check(owner, name, named[name])
        return function(*given, **named)

    return call


def guards_methods(cls: _Class, but: tuple[str, ...] = (), signed: tuple[str, ...] = ()) -> _Class:
    """Guard every public method and setter of a class.

    :param but: names of those that check their arguments themselves
    :param signed: names of parameters that may be negative
    """
    for name, member in list(vars(cls).items()):
        if name.startswith("_") or name in but:
            continue
        if isinstance(member, FunctionType):
            setattr(cls, name, guarded(member, signed=signed))
        elif isinstance(member, property) and member.fset is not None:
            setattr(cls, name, member.setter(guarded(member.fset)))
    return cls


class OfMachine:
    """What holds a machine: its methods' arguments are checked, and there is no copy of it.

    Kernels know a machine's arrays by their addresses: what a copy or a pickle did would be done in the original, or in
    memory that is gone.
    """

    def __init_subclass__(cls, but: tuple[str, ...] = (), signed: tuple[str, ...] = (), **others: Any) -> None:
        """Guard the methods that the class defines; see guards_methods()."""
        super().__init_subclass__(**others)
        guards_methods(cls, but, signed)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """TypeError: what copy, deepcopy and pickle call."""
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled: it stands on a machine's memory; make another Machine "
            "of the same Config and run the operations again"
        )
