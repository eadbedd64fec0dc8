"""What a field of Config may be: every field refuses what it is not, by name, whatever that is."""

from __future__ import annotations

import re
from dataclasses import fields
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from click import IntRange
from hypothesis import given, settings, strategies as st

from comparisons import lowered, setup
from pgemu.cli import main
from pgemu.errors import InputError
from pgemu.experiments.compare import compare
from pgemu.machine.config import Config
from pgemu.machine.field_rules import DEFECTS, MOST_HOST_CPUS, MOST_VCPUS, RULES, checked
from pgemu.machine.presets import Versions
from pgemu.trace import GivenSlot as GivenSlot, LoweringOptions

pytestmark = pytest.mark.same_with_checks

HINTS = get_type_hints(Config)
NAMES = tuple(field.name for field in fields(Config))

ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 80), 1 << 80),
    st.sampled_from([0, 1, 2, 3, 4096, 2 << 20, 1 << 30, 1 << 52, (1 << 52) + 1, 1 << 63]),
    st.floats(),
    st.sampled_from([4096.0, float("nan"), Decimal(1), 1j, np.float64(2), np.array([1]), np.array([1, 2]), object()]),
    st.sampled_from([np.uint64(4096), np.int8(1), np.bool_(True), np.str_("ept"), PurePosixPath("no/such.toml")]),
    st.binary(max_size=5),
    st.text(max_size=8),
    st.sampled_from(["restructure", "4K", "2M", "ept", "page", "tdx", "a\0.toml", "\ud800.toml", "published"]),
    st.lists(st.one_of(st.text(max_size=3), st.integers(), st.sampled_from(sorted(DEFECTS))), max_size=3),
    st.lists(st.sampled_from(sorted(DEFECTS)), max_size=3).map(frozenset),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def is_of(name: str, value: Any) -> bool:
    """Whether a value is one that the field's annotation allows, said without the rules."""
    hint = HINTS[name]
    if name in ("zero", "batch"):  # None is the design's
        hint = hint | None
    if name == "defects":
        return isinstance(value, tuple | list | set | frozenset)
    if name == "profile":
        return isinstance(value, str | PurePosixPath)
    options = get_args(hint) if get_origin(hint) is not Literal else (hint,)
    for one in options or (hint,):
        if get_origin(one) is Literal and isinstance(value, str) and value in get_args(one):
            return True
        if one is bool and isinstance(value, bool | np.bool_):
            return True
        if one is int and isinstance(value, int | np.integer) and not isinstance(value, bool):
            return True
        if one is str and isinstance(value, str):
            return True
        if one is type(None) and value is None:
            return True
    return False


def test_every_field_has_a_rule_and_no_other() -> None:
    assert tuple(RULES) == NAMES


@settings(max_examples=1500, deadline=None)
@given(name=st.sampled_from(NAMES), value=ANYTHING)
def test_a_field_is_as_annotated_or_named_in_one_line(name: str, value: Any) -> None:
    try:
        config = Config(**{name: value})
    except (TypeError, ValueError, InputError) as error:
        said = str(error)
        assert "\n" not in said
        assert len(said) < 400
        assert "expected" in said or "cannot be read" in said
        assert re.search(rf"\b{name}\b", said) or name == "profile", said
        if isinstance(error, TypeError):
            assert not (is_of(name, value) and value != [] and name != "defects"), said
            assert f"({type(value).__name__}): expected " in said
        return
    assert is_of(name, value), (name, value)
    kept = getattr(config, name)
    assert type(kept) in (bool, int, str, tuple, type(None))
    assert eval(repr(config)) == config
    hash(config)


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(NAMES), value=ANYTHING)
def test_what_is_refused_is_none_of_what_is_expected(name: str, value: Any) -> None:
    """A complaint that lists the words must not list the one it complains of."""
    said = ""
    try:
        checked(name, value)
    except (TypeError, ValueError) as error:
        said = str(error)
    words = re.split(r", | or | of ", said.partition("expected ")[2]) if said else []
    assert not (isinstance(value, str) and value in words and name != "defects"), said
    assert not (type(value) is int and str(value) in words), said


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"design": b"x"}, TypeError, "design b'x' (bytes): expected one of restructure, pfnmap"),
        ({"hvo": 1}, TypeError, "hvo 1 (int): expected True or False"),
        ({"vcpus": True}, TypeError, "vcpus True (bool): expected an integer from 1 to 4096"),
        ({"vcpus": 2.0}, TypeError, "vcpus 2.0 (float): expected an integer from 1 to 4096"),
        ({"host_cpus": 1 << 13 | 1}, ValueError, "host_cpus 8193: expected an integer from 1 to 8192"),
        ({"pool": 1 << 70}, ValueError, f"pool {1 << 70}: expected bytes as an integer from 0 to 2**52"),
        ({"page_size": "4K"}, TypeError, "page_size '4K' (str): expected bytes as an integer: 4096, 2097152, "),
        ({"kernel": 6.12}, TypeError, "kernel 6.12 (float): expected one of 6.12, 6.18, 7.3"),
        ({"defects": "insert-unlocked"}, TypeError, "defects 'insert-unlocked' (str): expected a tuple of some of "),
        ({"defects": ("x",)}, ValueError, "defects ('x',): expected a tuple of some of allocation-race, "),
        ({"profile": 5}, TypeError, "profile 5 (int): expected the name of a cost profile, or the path of a TOML file"),
        ({"profile": "a\0.toml"}, ValueError, "profile 'a\\x00.toml': expected the name of a cost profile, or "),
        ({"frames": 0}, ValueError, "frames 0: expected None or an integer from 1 to 2**40"),
        ({"nodes": 2, "configuration": "small"}, ValueError, "nodes 2 with configuration 'small': expected 1, "),
        ({"page_size": 4096, "buddy": 2 << 20}, ValueError, "buddy 2097152 with page_size 4096: expected 0, for "),
        ({"page_size": 4096, "split_to": "2M"}, ValueError, "split_to '2M' with page_size 4096: expected '4K', for "),
        ({"order": "next4k"}, ValueError, "order 'next4k' with page_size 1073741824: expected page_size 4096, "),
    ],
)
def test_complaints(given: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        Config(**given)
    assert str(caught.value).startswith(said)


def test_numbers_of_numpy_and_lists_of_names_are_kept_as_plain_ones() -> None:
    config = Config("pfnmap", pool=np.uint64(1 << 30), hvo=np.True_, defects=["insert-unlocked"])  # type: ignore[arg-type]
    assert (type(config.pool), config.hvo, config.defects) == (int, True, ("insert-unlocked",))
    assert config == Config("pfnmap", pool=1 << 30, defects=("insert-unlocked",))


def test_a_path_is_a_profile(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        Config(profile=tmp_path / "none.toml")


def test_the_command_line_has_the_same_limits() -> None:
    command = main.get_command(None, "compare")  # type: ignore[arg-type]
    assert command
    limits = {one.name: one.type for one in command.params if isinstance(one.type, IntRange)}
    assert (limits["vcpus"].min, limits["vcpus"].max) == (1, MOST_VCPUS)
    assert (limits["host_cpus"].min, limits["host_cpus"].max) == (1, MOST_HOST_CPUS)
    checked("seed", limits["seed"].max)
    with pytest.raises(ValueError, match="seed"):
        checked("seed", limits["seed"].max + 1)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"like": b"rfc2"}, "like b'rfc2' (bytes): expected one of rfc2, dec2025, jan2026, next"),
        ({"like": ["rfc2"]}, "like ['rfc2'] (list): expected one of "),
        ({"pfnmap": None}, "pfnmap None (NoneType): expected one of corrected, slides2025"),
        ({"as_posted": 1}, "as_posted 1 (int): expected True or False"),
    ],
)
def test_versions_are_names(names: dict[str, Any], said: str) -> None:
    with pytest.raises(TypeError) as caught:
        Versions(**names)
    assert str(caught.value).startswith(said)


def test_versions_of_small_pages_need_no_size_by_hand() -> None:
    for design in ("restructure", "pfnmap"):
        assert Versions("next").configuration(design).page_size == 4096
        assert Versions("rfc2").configuration(design).page_size == Config.page_size
        with pytest.raises(ValueError, match="pages of 2M: next knows pages of 4K only"):
            Versions("next").configuration(design, page_size=2 << 20)
        with pytest.raises(TypeError, match=r"page_size \[\] \(list\): expected bytes"):
            Versions("next").configuration(design, page_size=[])


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from([field.name for field in fields(LoweringOptions)]), value=ANYTHING)
def test_options_of_lowering_are_refused_in_the_same_way(name: str, value: Any) -> None:
    try:
        options = LoweringOptions(**{name: value})
    except (TypeError, ValueError) as error:
        said = str(error)
        assert said.startswith(f"{name} ")
        assert "expected" in said
        assert "\n" not in said
        return
    hash(options)
    assert eval(repr(options)) == options


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"check": 1.5}, "check 1.5 (float): expected 'end', 'every' or a positive number of operations"),
        ({"check": True}, "check True (bool): expected 'end', "),
        ({"designs": "pfnmap"}, "designs 'pfnmap' (str): expected a sequence of names"),
        ({"versions": "rfc2"}, "versions 'rfc2' (str): expected Versions"),
        ({"pool": 5}, "pool 5: expected no such argument, for it follows from the trace"),
        ({"lowered": 5}, "lowered 5 (int): expected Lowered"),
        ({"designs": [b"x"]}, "design b'x' (bytes): expected text"),
        ({"vcpus": "4"}, "vcpus '4' (str): expected an integer from 1 to 4096"),
    ],
)
def test_arguments_of_compare(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(TypeError) as caught:
        compare(**{"lowered": lowered(setup()), **arguments})
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"check": "x"}, "check 'x': expected 'end', "), ({"designs": []}, "designs: expected at least one")],
)
def test_arguments_of_compare_of_another_value(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        compare(lowered(setup()), **arguments)
    assert str(caught.value).startswith(said)
