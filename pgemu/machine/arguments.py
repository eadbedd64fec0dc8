"""What the parameters of public functions and methods may be: read off their annotations, and checked before anything.

The rules and their complaints are made as those of Config's fields are (field_rules.py).
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, wraps
from itertools import islice
from types import FunctionType, MappingProxyType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

import numpy as np

from pgemu.machine.columns import EACH, as_column, each, unsigned
from pgemu.machine.field_rules import (
    FILE_NAME,
    HUGE_PAGE,
    SWITCH,
    TEXT,
    Rule,
    amount,
    checked,
    choice,
    one_of,
    shown,
)
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Event, Gauge
from pgemu_kernels.words.operations import ENOMEM, Operation
from pgemu_kernels.words.properties import Property

__all__ = ("OfMachine", "argument", "guarded", "guards", "guards_creation", "guards_methods", "plain")

_Class = TypeVar("_Class", bound=type)
_Function = TypeVar("_Function", bound=Callable[..., Any])
_MOST = (1 << 64) - 1
_WORD = amount(0, _MOST, "an integer from 0 to 2**64 - 1")
_SIGNED = amount(-(1 << 63), _MOST, "an integer from -2**63 to 2**64 - 1")
_FRAME = amount(0, (1 << 52) - 1, "a frame or page number as an integer from 0 to 2**52 - 1")
_NUMBER = amount(0, (1 << 32) - 1, "an integer from 0 to 2**32 - 1")


def _member(kind: type[Any]) -> Rule:
    return Rule(lambda: f"one of pgemu_kernels.words.{kind.__name__}", lambda value: _of(kind, value), lambda _: True)


def _of(kind: type[Any], value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError
    return value


def _fraction(value: Any) -> float:
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError
    return float(value) if 0 <= value <= 1 else -1.0  # of the largest integers there are no floats


def _bytes(value: Any) -> bytes:
    if not isinstance(value, bytes | bytearray | memoryview):
        raise TypeError
    return bytes(value)


def _slice(value: Any) -> slice:
    if not isinstance(value, slice):
        raise TypeError
    for one in (value.start, value.stop, value.step):
        if one is not None:
            _WORD.plain(one)
    return value


def _records(value: Any) -> tuple[Any, ...]:
    if not hasattr(value, "__iter__"):
        raise TypeError
    found = tuple(value)
    if not all(type(one).__name__ == "Records" for one in found):
        raise TypeError
    return found


def _texts(value: Any) -> tuple[str, ...]:
    if isinstance(value, str | bytes) or not hasattr(value, "__iter__"):
        raise TypeError
    return tuple(TEXT.plain(one) for one in islice(value, 1 << 16))


def _named(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(one, str) for one in value):
        raise TypeError
    return value


def _nodes(value: Any) -> tuple[int, ...]:
    if isinstance(value, str | bytes) or not hasattr(value, "__iter__"):
        raise TypeError
    return tuple(_WORD.plain(node) for node in islice(value, 1 << 16))


BY_ANNOTATION: Mapping[str, Rule] = MappingProxyType(
    {
        "int": _WORD,
        "np.uint64": _WORD,
        "bool": SWITCH,
        "str": TEXT,
        "os.PathLike[str]": FILE_NAME,
        "float": Rule(lambda: "a number from 0 to 1", _fraction, lambda value: 0 <= value <= 1),
        "bytes": Rule(lambda: "bytes", _bytes, lambda _: True),
        "slice": Rule(lambda: "a slice of integers", _slice, lambda _: True),
        "Integers": EACH,
        "U64": EACH,
        "npt.NDArray[np.intp]": EACH,
        "Sequence[int]": EACH,
        "range": EACH,
        "Iterable[Records]": Rule(lambda: "Records, any number of them", _records, lambda _: True),
        "Iterable[int]": Rule(lambda: "node numbers, each from 0 to 63", _nodes, lambda n: all(0 <= i < 64 for i in n)),
        "Operation": _member(Operation),
        "W.Operation": _member(Operation),
        "Event": _member(Event),
        "Gauge": _member(Gauge),
        "Property": _member(Property),
        "Iterable[str]": Rule(lambda: "names, any number of them", _texts, lambda _: True),
        "Mapping[str, Any]": Rule(lambda: "a dict by names", _named, lambda _: True),
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
        "pfns": each(52),
        "index": _NUMBER,
        "prot": amount(0, 7, "PROT_READ 1, PROT_WRITE 2, PROT_EXEC 4 or a sum of them, 0 to 7"),
        "page_size": HUGE_PAGE,
        "new_length": amount(0, (1 << 44) - 1, "bytes as an integer from 0 to 2**44 - 1"),
        "generation": amount(-1, (1 << 63) - 1, "an integer from -1 to 2**63 - 1"),
        "seed": amount(0, (1 << 63) - 1, "an integer from 0 to 2**63 - 1"),
    }
)
"""Of a parameter by its name, where the type says less."""

# Of no machine, or to be of the same one; by name, for modules above define some of them. Their words where they have
# others than their names.
_CLASSES: Mapping[str, str] = MappingProxyType(
    {
        "AddressSpace": "", "Vm": "", "GuestMemfd": "", "GuestMemfd4K": "", "HugetlbFile": "", "ShmemFile": "",
        "Device": "", "IoSpace": "", "Ioas": "",
        "PageFormat": "", "PageLayout": "", "Access": "", "Config": "", "LoweringOptions": "", "Core": "Machine",
        "PageTable": "", "Processor": "",
    }
)  # fmt: skip
# What only has to have some methods.
_LIKE: Mapping[str, tuple[str, tuple[str, ...]]] = MappingProxyType(
    {
        "Columns": ("Records", ("actor", "object", "address", "offset", "length", "header", "__len__")),
        "Memory": ("an Image, a Machine, or what has their words(), load() and holds()", ("words", "load", "holds")),
    }
)
OWN_CHECK = ("log", "owner", "out", "kinds", "words")
"""Parameters that functions check themselves: arrays of other types, most of them to be written to."""

_Check = Callable[[Any, Any], Any]  # of the machine, or what is of it, and a value: the value as the function takes it


def argument(name: str, value: Any, annotation: str = "int") -> Any:
    """An argument as the method takes it; TypeError or ValueError that name it, its value and what is expected."""
    return checked(name, value, {name: BY_NAME.get(name) or BY_ANNOTATION[annotation]})


# --------------------------------------------------------------------------- a check of a parameter


def _parts(annotation: str) -> list[str]:
    """Alternatives of an annotation: "Literal['a', 'b'] | None" has two."""

    def split(node: ast.expr) -> Iterator[str]:
        if isinstance(node, ast.BinOp):
            yield from split(node.left)
            yield from split(node.right)
        else:
            yield ast.unparse(node)

    return list(split(ast.parse(annotation, mode="eval").body))


def _known_words(part: str, function: Any) -> tuple[Any, ...]:
    """What a Literal allows, written out or by a name of the function's module; nothing of what is none."""
    if part.startswith("Literal["):
        return tuple(ast.literal_eval(f"({part[8:-1]},)"))
    named = getattr(inspect.unwrap(function), "__globals__", {}).get(part)
    return get_args(named) if get_origin(named) is Literal else ()


def _rule_of(name: str, kinds: list[str], function: Any) -> Rule | None:
    """The rule of a parameter that may be of `kinds`; None where none is known."""
    if words := [word for kind in kinds for word in _known_words(kind, function)]:
        return one_of(words) if isinstance(words[0], int) else choice(words)
    if any(kind not in BY_ANNOTATION for kind in kinds) or {*kinds} == {"str", "int"}:
        return None  # what may be text or a number the function tells apart
    rules = [BY_ANNOTATION[kind] for kind in kinds]
    rule = next((rule for rule in rules if rule in (EACH, FILE_NAME)), rules[0])
    return BY_NAME.get(name, rule) if rule in (_WORD, EACH) else rule


def _check_of(function: Any, name: str, annotation: str, signed: bool, given: Mapping[str, Rule]) -> _Check | None:
    """What checks a parameter; None where its function does."""
    parts = _parts(annotation)
    kinds = [part for part in parts if part != "None"]
    optional = len(kinds) < len(parts)
    if name in OWN_CHECK or not kinds:
        return None
    if kinds[0] in _LIKE:
        return _like(name, *_LIKE[kinds[0]])
    if kinds[0] in _CLASSES and all(kind in _CLASSES or kind == "str" for kind in kinds):
        return _of_class(name, kinds, optional)
    rule = given.get(name) or _rule_of(name, kinds, function)
    if rule is None:
        return None
    return _of_rule(name, (_SIGNED if signed and rule is _WORD else rule)._replace(optional=optional or rule.optional))


def _of_rule(name: str, rule: Rule) -> _Check:
    """A check that lets what is plain already pass at one look."""
    rules = {name: rule}
    if rule.between is not None:
        low, high = rule.between

        def check(_: Any, value: Any) -> Any:
            if type(value) is int and low <= value <= high:
                return value
            return checked(name, value, rules)
    elif rule.plain is SWITCH.plain:

        def check(_: Any, value: Any) -> Any:
            return value if value is True or value is False else checked(name, value, rules)
    elif rule.plain is EACH.plain:
        every = rule.holds is EACH.holds

        def check(_: Any, value: Any) -> Any:
            column = as_column(value) if every else None
            if column is not None:
                return column
            plain = checked(name, value, rules)
            return None if plain is None else unsigned(plain)
    else:

        def check(_: Any, value: Any) -> Any:
            return checked(name, value, rules)

    return check


def _like(name: str, what: str, names: tuple[str, ...]) -> _Check:
    """Of what is not asked for its class."""

    def check(_: Any, value: Any) -> Any:
        if isinstance(value, type) or not all(hasattr(value, one) for one in names):
            raise TypeError(f"{name} {shown(value)} ({type(value).__name__}): expected {what}")
        return value

    return check


def _of_class(name: str, kinds: list[str], optional: bool) -> _Check:
    """Of an object of the same machine, or of none, of one of the classes."""
    names = ["text" if kind == "str" else _CLASSES[kind] or kind for kind in kinds]
    said = [name if name == "text" else f"{'an' if name[0] in 'AEIOU' else 'a'} {name}" for name in names]
    expected = " or ".join(["None"] * optional + said)

    def check(owner: Any, value: Any) -> Any:
        if value is None and optional:
            return value
        if not any(base.__name__ in kinds for base in type(value).__mro__):
            raise TypeError(f"{name} {shown(value)} ({type(value).__name__}): expected {expected}")
        of_none = not hasattr(owner, "machine") and not hasattr(owner, "arrays")  # a Tlb stands in front of any table
        if hasattr(value, "machine") and not of_none and value.machine is not getattr(owner, "machine", owner):
            raise ValueError(f"{name} {shown(value)}: expected one of the same machine")
        return value

    return check


# --------------------------------------------------------------------------- functions and classes


def _places(
    function: Any, signed: bool, given: Mapping[str, Rule]
) -> tuple[list[tuple[int, str, _Check]], tuple[int, str]]:
    """Where the parameters are that are checked, and where the one whose machine objects have to be of."""
    parameters = list(inspect.signature(function).parameters.values())
    found = []
    owner = 0, ""
    for i, one in enumerate(parameters):
        if not isinstance(one.annotation, str) or one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD):
            continue
        if one.annotation == "Core" and owner == (0, ""):
            owner = i, one.name
        check = _check_of(function, one.name, one.annotation, signed, given)
        if check:
            found.append((i, one.name, check))
    return found, owner


def guarded(function: Any, rules: Mapping[str, Rule] = MappingProxyType({}), *, signed: bool = False) -> Any:
    """The function, its arguments checked by what their annotations say; itself where they say nothing of it.

    :param rules: of parameters of which this function expects something else
    :param signed: whether its integers may be negative
    """
    places, (owner_at, owner_name) = _places(function, signed, rules)
    if not places:
        return function

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        count = len(arguments)
        owner = arguments[owner_at] if owner_at < count else named.get(owner_name)
        given: Any = arguments
        try:
            for i, name, check in places:
                if i < count:
                    value = given[i]
                    kept = check(owner, value)
                    if kept is not value:
                        given = [*given[:i], kept, *given[i + 1 :]]
                elif name in named:
                    named[name] = check(owner, named[name])
            return function(*given, **named)
        except MemoryError:
            told = f"{_called(function, arguments)}({', '.join(map(shown, arguments[1:]))})"
            raise OSError(ENOMEM, f"{told}: more than this computer can hold") from None

    return call


def _called(function: Any, arguments: tuple[Any, ...]) -> str:
    """A function's name; a method's with the class of what it was called on, not of the part that defines it."""
    holder = arguments[0] if arguments else None
    kind = holder if isinstance(holder, type) else type(holder)
    is_method = "." in function.__qualname__ and hasattr(kind, function.__name__)
    return f"{kind.__name__}.{function.__name__}" if is_method else str(function.__qualname__)


@cache
def _checks(function: Any) -> dict[str, _Check]:
    return {name: check for _, name, check in _places(function, False, {})[0]}


def plain(function: Any, owner: Any, /, **arguments: Any) -> tuple[Any, ...]:
    """Arguments of a function that is not guarded, as it takes them: what one that is called often looks at itself."""
    checks = _checks(function)
    return tuple(checks[name](owner, value) if name in checks else value for name, value in arguments.items())


def guards(**rules: Rule) -> Callable[[_Function], _Function]:
    """Decorate a function: see guarded()."""

    def decorate(function: _Function) -> _Function:
        made: _Function = guarded(function, rules)
        return made

    return decorate


def guards_methods(cls: _Class, but: Iterable[str] = (), signed: Iterable[str] = ()) -> _Class:
    """Guard the constructor that a class defines, its public methods and its setters.

    :param but: names of those that check their arguments themselves
    :param signed: names of those whose integers may be negative
    """
    for name, member in list(vars(cls).items()):
        if (name.startswith("_") and name not in ("__init__", "__getitem__")) or name in but:
            continue
        if isinstance(member, FunctionType):
            setattr(cls, name, guarded(member, signed=name in signed))
        elif isinstance(member, classmethod):
            setattr(cls, name, classmethod(guarded(member.__func__)))
        elif isinstance(member, property) and member.fset is not None:
            setattr(cls, name, member.setter(guarded(member.fset)))
    return cls


def guards_creation(**rules: Rule) -> Callable[[_Class], _Class]:
    """Decorate a dataclass: its fields are checked as arguments are, by these rules where they say more."""

    def decorate(cls: _Class) -> _Class:
        cls.__init__ = guarded(cls.__init__, rules)  # type: ignore[misc]
        return cls

    return decorate


class OfMachine:
    """What holds a machine: its methods' arguments are checked, nothing is written past them, it cannot be copied.

    Kernels know a machine's arrays by their addresses: what a copy or a pickle did would be done in the original, or in
    memory that is gone.
    """

    def __init_subclass__(cls, but: tuple[str, ...] = (), signed: tuple[str, ...] = (), **others: Any) -> None:
        """Guard the methods that the class defines; see guards_methods()."""
        super().__init_subclass__(**others)
        guards_methods(cls, but, signed)

    def __setattr__(self, name: str, value: Any) -> None:
        """AttributeError for what was set when it was made, and for what it does not have."""
        known = hasattr(type(self), name) or any(
            name in vars(base).get("__annotations__", ()) for base in type(self).__mro__
        )
        if not name.startswith("_") and (name in vars(self) or not known):
            raise AttributeError(f"{type(self).__name__} has no {name!r} that can be written")
        object.__setattr__(self, name, value)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """TypeError: what copy, deepcopy and pickle call."""
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled: it stands on a machine's memory; Machine.copy() makes "
            "another machine, Machine.save() a file for other processes"
        )
