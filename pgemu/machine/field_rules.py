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

__all__ = (
    "BYTES", "DEFECTS", "FILE_NAME", "HUGE_PAGE", "LEVEL_RULES", "MOST_HOST_CPUS", "MOST_VCPUS", "RULES", "SPLIT_FORMS",
    "SWITCH", "TEXT", "THP", "Rule", "amount", "checked", "choice", "number_of", "one_of", "shown",
)  # fmt: skip

DEFECTS = {defect.name.lower().replace("_", "-"): defect for defect in W.Defect if defect.name}
LEVEL_RULES = {"uniform": W.LEVEL_UNIFORM, "whole": W.LEVEL_WHOLE, "private": W.LEVEL_PRIVATE}
THP = {"never": W.THP_NEVER, "madvise": W.THP_MADVISE, "always": W.THP_ALWAYS}
SPLIT_FORMS = {"rfc2": W.SPLIT_FORM_RFC2, "jan2026": W.SPLIT_FORM_LATER}

MOST_VCPUS = 4096  # arch/x86/kvm/Kconfig: KVM_MAX_NR_VCPUS
MOST_HOST_CPUS = 8192  # arch/x86/Kconfig: NR_CPUS_RANGE_END
_MOST_BYTES = 1 << 52  # physical addresses of x86-64
_MOST_SEED = (1 << 63) - 1


class Rule(NamedTuple):
    """What a field may be.

    Attributes:
        expected: that in words; a function where rows may be added
        plain: a value as the field keeps it; TypeError for another type
        holds: whether such a value is one of those expected
        optional: whether None is one
        between: the lowest and the highest of a range of integers
    """

    expected: Callable[[], str]
    plain: Callable[[Any], Any]
    holds: Callable[[Any], bool]
    optional: bool = False
    between: tuple[int, int] | None = None


class _Short(reprlib.Repr):
    """Values in a few words."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 60

    def repr_int(self, x: int, level: int) -> str:
        """Python refuses to write the longest ones in decimal."""
        return super().repr_int(x, level) if x.bit_length() < 1 << 10 else f"an integer of {x.bit_length()} bits"


_SHORT = _Short()


def checked(name: str, value: Any, rules: Mapping[str, Rule] | None = None) -> Any:
    """Return a field's value as Config keeps it: an int for numpy's, a tuple for a list of defects.

    :param rules: those of another class's fields
    :raises TypeError: a value of another type
    :raises ValueError: one of that type that the field does not take
    """
    rule = (rules or RULES)[name]
    if value is None and rule.optional:
        return None
    try:
        plain = rule.plain(value)
    except TypeError:
        raise TypeError(f"{name} {shown(value)} ({type(value).__name__}): expected {_expected(rule)}") from None
    if not rule.holds(plain):
        raise ValueError(f"{name} {shown(value)}: expected {_expected(rule)}")
    return plain


def _expected(rule: Rule) -> str:
    """What is expected, in words. Only where something else came: every argument of every call is checked."""
    return f"{'None or ' * rule.optional}{rule.expected()}"


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


def one_of(known: Collection[int]) -> Rule:
    """One of a few integers."""
    return Rule(lambda: " or ".join(map(str, known)), _integer, known.__contains__)


def choice(known: Collection[str], *, optional: bool = False) -> Rule:
    """One of a few words; `known` may grow: designs are rows."""
    return Rule(lambda: f"one of {', '.join(known)}", _text, known.__contains__, optional)


def amount(lowest: int, highest: int, said: str, *, optional: bool = False) -> Rule:
    """An integer in a range; `said` tells it in words."""
    return Rule(lambda: said, _integer, lambda value: lowest <= value <= highest, optional, (lowest, highest))


def number_of(what: str, limit: int | np.uint64) -> Rule:
    """A number of a row of a kind, of which there are `limit`."""
    return amount(0, int(limit) - 1, f"a number of {what}, an integer from 0 to {int(limit) - 1}")


def _cpus(most: int) -> Rule:
    return amount(1, most, f"an integer from 1 to {most}")


SWITCH = Rule(lambda: "True or False", _switch, lambda _: True)
BYTES = amount(0, _MOST_BYTES, "bytes as an integer from 0 to 2**52")
TEXT = Rule(lambda: "text", _text, lambda _: True)
FILE_NAME = Rule(lambda: "the path of a file", _path, _names_a_file)
HUGE_PAGE = one_of((W.PAGE_2M, W.PAGE_1G))
_PAGE_SIZES = (W.PAGE_4K, W.PAGE_2M, W.PAGE_1G)

RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "design": choice(ROWS),
        "pool": BYTES,
        "page_size": Rule(
            lambda: f"bytes as an integer: {', '.join(map(str, _PAGE_SIZES))}", _integer, _PAGE_SIZES.__contains__
        ),
        "kernel": choice(formats.KERNELS),
        "stage2": choice(("npt", "ept")),
        "hvo": SWITCH,
        "vcpus": _cpus(MOST_VCPUS),
        "host_cpus": _cpus(MOST_HOST_CPUS),
        "zero": choice(("folio", "page")),
        "seed": amount(0, _MOST_SEED, "an integer from 0 to 2**63 - 1"),
        "frames": amount(1, _MOST_BYTES >> 12, "an integer from 1 to 2**40", optional=True),
        "zap_filter": choice(("both", "target")),
        "vm": choice(KINDS),
        "private_level": choice(PRIVATE_LEVELS, optional=True),
        "notifier": SWITCH,
        "dontneed_on_pfnmap": SWITCH,
        "nx_huge_pages": SWITCH,
        "l1tf": SWITCH,
        "protection_keys": SWITCH,
        "profile": Rule(lambda: "the name of a cost profile, or the path of a TOML file", _path, _names_a_file),
        "memory": BYTES,
        "other_pool": BYTES,
        "pti": SWITCH,
        "nodes": amount(1, int(W.NODES), f"an integer from 1 to {W.NODES}"),
        "buddy": BYTES,
        "reserved": BYTES,
        "configuration": choice(formats.CONFIGURATIONS),
        "split_form": choice(SPLIT_FORMS),
        "order": choice(ORDERS),
        "batch": choice(("range", "block")),
        "split_to": choice(("4K", "2M")),
        "merge": choice(("now", "lazy")),
        "merge_zero": choice(("none", "unzeroed")),
        "flush": choice(("each", "batched")),
        "defects": Rule(
            lambda: f"a tuple of some of {', '.join(sorted(DEFECTS))}", _names, lambda names: {*names} <= {*DEFECTS}
        ),
        "lru_cache": SWITCH,
        "worker": choice(("immediate", "queued")),
        "punch": choice(("zero", "refuse")),
        "level_rule": choice(LEVEL_RULES),
        "host_huge": SWITCH,
        "large_folios": SWITCH,
        "dirty_log_guest_memfd": SWITCH,
        "in_place_conversion": SWITCH,
        "zap": choice(("exact", "rounded")),
        "invalidate": choice(("rounded", "exact")),
        "thp": choice(THP),
        "memory_failure": choice(("handled", "marked")),
        "poisoned_blocks": choice(("refuse", "move")),
        "mf_delayed": SWITCH,
        "allow_unsafe_mappings": SWITCH,
        "iommu": choice(("vtd", "amd"), optional=True),
        "dma": choice(("vfio", "iommufd"), optional=True),
        "iommu_unmaps": choice(("refused", "none", "vmm", "vmm-late", "notifier", "revoke", "mirror")),
    }
)
"""By field, in Config's order."""
