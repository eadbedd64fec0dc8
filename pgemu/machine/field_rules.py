"""What each field of Config may be: a row per field, from which the check and its complaint are both made.

What fields have to be together is in config.py.
"""

from __future__ import annotations

import operator
import os
import reprlib
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from pgemu.machine.designs import ORDERS, ROWS
from pgemu.machine.vm_kinds import KINDS, PRIVATE_LEVELS
from pgemu_kernels import words as W
from pgemu_kernels.formats import bits as formats

__all__ = ("DEFECTS", "LEVEL_RULES", "MOST_HOST_CPUS", "MOST_VCPUS", "RULES", "SPLIT_FORMS", "Rule", "checked", "shown")

DEFECTS = {defect.name.lower().replace("_", "-"): defect for defect in W.Defect if defect.name}
LEVEL_RULES = {"uniform": W.LEVEL_UNIFORM, "whole": W.LEVEL_WHOLE, "private": W.LEVEL_PRIVATE}
SPLIT_FORMS = {"rfc2": W.SPLIT_FORM_RFC2, "jan2026": W.SPLIT_FORM_LATER}

MOST_VCPUS = 4096  # arch/x86/kvm/Kconfig: KVM_MAX_NR_VCPUS
MOST_HOST_CPUS = 8192  # arch/x86/Kconfig: NR_CPUS_RANGE_END
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_MOST_BYTES = 1 << 52  # physical addresses of x86-64
_MOST_SEED = (1 << 63) - 1


class Rule(NamedTuple):
    """What a field may be.

    Attributes:
        expected: that in words; a function where rows may be added
        plain: a value as the field keeps it; TypeError for another type
        holds: whether such a value is one of those expected
        optional: whether None is one
    """

    expected: Callable[[], str]
    plain: Callable[[Any], Any]
    holds: Callable[[Any], bool]
    optional: bool = False


def checked(name: str, value: Any) -> Any:
    """Return a field's value as Config keeps it: an int for numpy's, a tuple for a list of defects.

    :raises TypeError: a value of another type
    :raises ValueError: one of that type that the field does not take
    """
    rule = RULES[name]
    if value is None and rule.optional:
        return None
    expected = f"{'None or ' * rule.optional}{rule.expected()}"
    try:
        plain = rule.plain(value)
    except TypeError:
        raise TypeError(f"{name} {shown(value)} ({type(value).__name__}): expected {expected}") from None
    if not rule.holds(plain):
        raise ValueError(f"{name} {shown(value)}: expected {expected}")
    return plain


def shown(value: Any) -> str:
    """A value in one line of a complaint."""
    return " ".join(_SHORT.repr(value).split())


# --------------------------------------------------------------------------- kinds of fields


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return str(value)


def _switch(value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):  # 1 and "no" are true as well: they say nothing
        raise TypeError
    return bool(value)


def _integer(value: Any) -> int:
    if isinstance(value, bool | np.bool_):
        raise TypeError
    if isinstance(value, np.ndarray):  # of one element is an index, and no number
        raise TypeError
    return int(operator.index(value))


def _names(value: Any) -> tuple[str, ...]:
    """Names in the order given; a set's in alphabetical order."""
    if not isinstance(value, tuple | list | set | frozenset):
        raise TypeError
    names = tuple(_text(one) for one in value)
    return tuple(sorted(names)) if isinstance(value, set | frozenset) else names


def _path(value: Any) -> Any:
    """A name or a path, as it is; a path of bytes is no name."""
    text = os.fspath(value)
    if not isinstance(text, str):
        raise TypeError
    return value


def _names_a_file(value: Any) -> bool:
    text = os.fspath(value)
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _choice(known: Collection[str], *, optional: bool = False) -> Rule:
    """One of a few words; `known` may grow: designs are rows."""
    return Rule(lambda: f"one of {', '.join(known)}", _text, known.__contains__, optional)


def _amount(lowest: int, highest: int, said: str, *, optional: bool = False) -> Rule:
    return Rule(lambda: said, _integer, lambda value: lowest <= value <= highest, optional)


def _cpus(most: int) -> Rule:
    return _amount(1, most, f"an integer from 1 to {most}")


_SWITCH = Rule(lambda: "True or False", _switch, lambda _: True)
_BYTES = _amount(0, _MOST_BYTES, "bytes as an integer from 0 to 2**52")
_PAGE_SIZES = (W.PAGE_4K, W.PAGE_2M, W.PAGE_1G)

RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "design": _choice(ROWS),
        "pool": _BYTES,
        "page_size": Rule(
            lambda: f"bytes as an integer: {', '.join(map(str, _PAGE_SIZES))}", _integer, _PAGE_SIZES.__contains__
        ),
        "kernel": _choice(formats.KERNELS),
        "stage2": _choice(("npt", "ept")),
        "hvo": _SWITCH,
        "vcpus": _cpus(MOST_VCPUS),
        "host_cpus": _cpus(MOST_HOST_CPUS),
        "zero": _choice(("folio", "page")),
        "seed": _amount(0, _MOST_SEED, "an integer from 0 to 2**63 - 1"),
        "frames": _amount(1, _MOST_BYTES >> 12, "an integer from 1 to 2**40", optional=True),
        "zap_filter": _choice(("both", "target")),
        "vm": _choice(KINDS),
        "private_level": _choice(PRIVATE_LEVELS, optional=True),
        "notifier": _SWITCH,
        "dontneed_on_pfnmap": _SWITCH,
        "nx_huge_pages": _SWITCH,
        "l1tf": _SWITCH,
        "protection_keys": _SWITCH,
        "profile": Rule(lambda: "the name of a cost profile, or the path of a TOML file", _path, _names_a_file),
        "memory": _BYTES,
        "other_pool": _BYTES,
        "pti": _SWITCH,
        "nodes": _amount(1, int(W.NODES), f"an integer from 1 to {W.NODES}"),
        "buddy": _BYTES,
        "reserved": _BYTES,
        "configuration": _choice(formats.CONFIGURATIONS),
        "split_form": _choice(SPLIT_FORMS),
        "order": _choice(ORDERS),
        "batch": _choice(("range", "block")),
        "split_to": _choice(("4K", "2M")),
        "merge": _choice(("now", "lazy")),
        "merge_zero": _choice(("none", "unzeroed")),
        "flush": _choice(("each", "batched")),
        "defects": Rule(
            lambda: f"a tuple of some of {', '.join(sorted(DEFECTS))}", _names, lambda names: {*names} <= {*DEFECTS}
        ),
        "lru_cache": _SWITCH,
        "worker": _choice(("immediate", "queued")),
        "punch": _choice(("zero", "refuse")),
        "level_rule": _choice(LEVEL_RULES),
        "host_huge": _SWITCH,
        "large_folios": _SWITCH,
        "dirty_log_guest_memfd": _SWITCH,
        "in_place_conversion": _SWITCH,
        "zap": _choice(("exact", "rounded")),
        "invalidate": _choice(("rounded", "exact")),
    }
)
"""By field, in Config's order."""
