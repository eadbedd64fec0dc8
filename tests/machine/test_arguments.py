"""What a complaint says it expects is accepted: of every rule of fields, of columns and of arguments."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from pgemu import Config, Machine
from pgemu.machine.arguments import BY_ANNOTATION, BY_NAME, argument, guarded, plain
from pgemu.machine.columns import EACH, FIELDS, column_of, each
from pgemu.machine.field_rules import RULES, Rule, checked, shown
from pgemu.trace import lowered
from pgemu_kernels import words as W
from public_calls import Call, public_calls

TABLES: dict[str, Any] = {"Config": RULES, "columns": FIELDS, "names": BY_NAME, "annotations": BY_ANNOTATION}
TABLES["LoweringOptions"] = lowered._RULES
ALL = {f"{table} {name}": rule for table, rules in TABLES.items() for name, rule in rules.items()}
NUMBER = r"-?\d+(?:\*\*\d+)?(?: - \d+)?"


def number(text: str) -> int:
    """2**64 - 1, as complaints write it."""
    power, _, less = text.partition(" - ")
    base, _, exponent = power.lstrip("-").partition("**")
    value = int(base) ** int(exponent or 1)
    return (-value if text.startswith("-") else value) - int(less or 0)


def accepted(rule: Rule, value: Any) -> bool:
    try:
        checked("it", value, {"it": rule})
    except (TypeError, ValueError):
        return False
    return True


@pytest.mark.parametrize("name", ALL)
def test_the_range_that_is_named_is_the_one_that_is_taken(name: str) -> None:
    rule = ALL[name]
    said = re.search(rf"({NUMBER}) to ({NUMBER})", rule.expected())
    if rule.between is None or said is None:
        assert rule.between is None
        return
    low, high = rule.between
    assert (number(said[1]), number(said[2])) == (low, high)
    assert accepted(rule, low)
    assert accepted(rule, high)
    assert accepted(rule, np.int64(max(low, 1)))
    assert not accepted(rule, low - 1)
    assert not accepted(rule, high + 1)
    assert not accepted(rule, True)
    assert not accepted(rule, float(low))


def named_words(expected: str) -> list[Any]:
    """Words and numbers that a complaint lists, None among them."""
    found: list[Any] = [None] if expected.startswith("None or ") else []
    listed = re.search(r"(?:one of|some of|integer:) ([^()]*)$", expected)
    if listed and "pgemu_kernels" not in expected:
        found += [int(word) if word.isdigit() and "integer:" in expected else word for word in listed[1].split(", ")]
    if either := re.search(r"(?:^|or )(\d+(?: or \d+)+)$", expected):
        found += map(int, either[1].split(" or "))
    return found


@pytest.mark.parametrize("name", ALL)
def test_every_word_that_is_named_is_taken(name: str) -> None:
    rule = ALL[name]
    for word in named_words(f"{'None or ' * rule.optional}{rule.expected()}"):
        assert accepted(rule, (word,) if "some of" in rule.expected() and word else word), (name, word)


def test_words_are_found() -> None:
    found = {name: words for name, rule in ALL.items() if (words := named_words(rule.expected()))}
    assert found["Config page_size"] == [4096, W.PAGE_2M, W.PAGE_1G]
    assert found["names page_size"] == [W.PAGE_2M, W.PAGE_1G]
    assert found["Config stage2"] == ["npt", "ept"]
    assert len(found) > 25


CHOICES = [
    (call, one.name)
    for call in public_calls()
    for one in call.parameters
    if call.owner in ("Machine", "Vm", "PageTable", "AddressSpace", "GuestMemfd", "HugetlbPool", "")
]


@pytest.fixture(scope="module")
def objects() -> dict[str, Any]:
    machine = Machine(Config("pfnmap", pool=4 * W.PAGE_2M, page_size=W.PAGE_2M))
    return {
        "Machine": machine, "Vm": machine.create_vm(), "PageTable": machine.create_page_table("ept"),
        "AddressSpace": machine.create_process(), "GuestMemfd": machine.create_guest_memfd(W.PAGE_2M),
        "HugetlbPool": machine.hugetlb(), "": machine,
    }  # fmt: skip


@pytest.mark.parametrize(("call", "name"), CHOICES, ids=str)
def test_what_a_call_names_it_takes(objects: dict[str, Any], call: Call, name: str) -> None:
    """A value of no type at all is told what is expected; every word of that gets past the same check."""
    for word in named_words(complaint(objects, call, name, object())):
        assert not complaint(objects, call, name, word), (call, name, word)


def test_calls_name_words(objects: dict[str, Any]) -> None:
    words = {
        f"{call} {name}": found
        for call, name in CHOICES
        if (found := named_words(complaint(objects, call, name, object())))
    }
    assert words["Machine.create_vm kind"] == [None, "plain", "sw", "snp", "tdx"]
    assert words["PageTable.unmap partial"] == [None, "split", "whole"]
    assert words["Vm.lpage_info level"] == [2, 3]
    assert len(words) > 40


def complaint(objects: dict[str, Any], call: Call, name: str, value: Any) -> str:
    """What the check of one argument says was expected; nothing where it says nothing."""
    try:
        plain(call.function.__wrapped__ if hasattr(call.function, "__wrapped__") else call.function,
              objects[call.owner], **{name: value})  # fmt: skip
    except KeyError:
        return ""  # the function checks it itself
    except (TypeError, ValueError) as error:
        who, _, expected = str(error).partition(": expected ")
        return expected if who.startswith(f"{name} ") else str(error)
    return ""


# --------------------------------------------------------------------------- what is given is what arrives


@given(st.one_of(st.integers(0, (1 << 64) - 1), st.booleans()), st.integers(0, 2))
def test_a_guard_changes_no_value(value: int, form: int) -> None:
    def told(self: Any, offset: int, shared: bool = False) -> tuple[Any, Any]:
        return offset, shared

    told.__annotations__ = {"self": "Any", "offset": "int", "shared": "bool"}
    call = guarded(told)
    given: Any = value if form == 0 or isinstance(value, bool) else np.uint64(value)
    if isinstance(value, bool):
        with pytest.raises(TypeError, match=r"^offset (True|False) \(bool\): expected an integer from 0 to "):
            call(None, given)
        assert call(None, 1, given) == call(None, 1, shared=given) == (1, value)
        return
    for found in (call(None, given), call(None, offset=given)):
        assert found == (value, False)
        assert type(found[0]) is int


@given(st.lists(st.integers(0, (1 << 64) - 1)), st.sampled_from((list, tuple, iter)))
def test_columns_are_what_was_given(values: list[int], kind: Any) -> None:
    column = argument("gpas", kind(values), "Integers")
    assert column.tolist() == values
    assert column_of(kind(values), len(values), "gpas").tolist() == values
    for bits in (8, 16, 32):
        assert accepted(each(bits), values) == all(value >> bits == 0 for value in values)


def test_a_column_of_one_type_does_not_wrap() -> None:
    for wrong in (256, [0, 256], np.array([256]), -1, 1.0, True):
        with pytest.raises(
            (TypeError, ValueError), match=r"^flags .*: expected an integer, or a sequence .* to 2\*\*8 - 1$"
        ):
            column_of(wrong, 2, "flags", np.dtype(np.uint8))


def test_the_longest_numbers_are_shown_by_their_size() -> None:
    assert shown(10**5000) == "an integer of 16610 bits"
    assert shown([10**5000, 1]) == "[an integer of 16610 bits, 1]"
    assert not accepted(EACH, [10**5000])
