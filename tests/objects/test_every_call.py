"""Whatever a public call is given: a result, or one line that names the argument, its value and what is expected.

The calls are found by looking (public_calls.py), so that a new one is among them.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

import pgemu
from pgemu import Config, InputError, Lowered, LoweringOptions, Machine
from pgemu.machine.arguments import OfMachine
from pgemu.machine.designs import DESIGNS, ROWS
from pgemu.machine.field_rules import shown
from pgemu.tables.translation import Kind
from pgemu_kernels import words as W
from public_calls import Call, World, alternatives, good_values, properties, public_calls, public_classes

OTHER = Machine(Config("pfnmap", pool=W.PAGE_2M, page_size=W.PAGE_2M))
STRANGERS = [
    OTHER, OTHER.create_guest_memfd(W.PAGE_2M), OTHER.create_guest_memfd_4k(4096), OTHER.create_process(),
    OTHER.create_vm(), OTHER.create_device(0, 1), OTHER.create_hugetlb_file(W.PAGE_2M),
]  # fmt: skip
WRONG: list[Any] = [
    None, True, False, np.bool_(True), 1.0, 0.5, float("nan"), float("inf"), np.float64(4096), 1j, "0", "abc", "", b"x",
    -1, -4096, -(1 << 63) - 1, 1 << 52, (1 << 52) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, 1 << 70,
    10**5000, np.zeros(0, bool),
    np.int64(-1), np.uint64(1 << 63), np.array(5), np.array([1, 2, 3]), np.array([[1, 2], [3, 4]]), np.array([0.5]),
    np.array([1, "a"], dtype=object), np.array([1 << 63], np.uint64), np.array([-1]), np.array([True]),
    np.ma.masked_array([1, 2], [True, False]), np.array(["2026-01-01"], "M8[s]"),
    np.zeros(3, [("a", int)]),
    np.arange(8, dtype=np.uint64)[::2], np.frombuffer(bytes(17), np.uint64, 2, offset=1), np.zeros((2, 3), np.uint64),
    [1, 2.5], ["a"], [[1], [2, 3]], [-1], [1 << 64], [1, 1 << 63], [True], (), {}, {1}, range(5), object(), int, len,
    Kind.READ, W.Broken.NONE, slice(0, 2.5), slice("a", None), slice(0, 1 << 70), Path("nowhere"), "a\0b", "\ud800",
    *STRANGERS,
]  # fmt: skip
CALLS = public_calls()
# Constructors that check nothing: of what pgemu makes to be read.
MADE = {"BrokenRule", "Comparison", "Image", "InputError", "Lowered", "Page", "PhysicalMemory", "TlbCounts"}
CHECKED = [
    call for call in CALLS if not (call.name == "__init__" and call.owner in MADE) and call.owner != "Comparison"
]
LONGEST = 400
RAISED = (TypeError, ValueError, InputError, OSError)


def fits(kind: str, value: Any) -> bool | None:
    """Whether a value is of a type that an annotation names, said without the rules; None where nothing is said."""
    truth = isinstance(value, bool | np.bool_)
    if kind == "int":
        return isinstance(value, int | np.integer) and not truth
    if kind == "bool":
        return truth
    if kind == "str":
        return isinstance(value, str)
    if kind == "float":
        return isinstance(value, int | float | np.integer | np.floating) and not truth
    if kind in ("Integers", "Sequence[int]"):
        return of_integers(value)
    if kind in (
        "GuestMemfd",
        "GuestMemfd4K",
        "AddressSpace",
        "HugetlbFile",
        "Device",
        "Vm",
        "Access",
        "Config",
        "Core",
    ):
        return any(one.__name__ == kind for one in type(value).__mro__)
    return value is None if kind == "None" else None


def of_integers(value: Any) -> bool:
    if isinstance(value, np.ma.MaskedArray | str | bytes) or not hasattr(value, "__len__"):
        return False
    if isinstance(value, np.ndarray):
        return value.ndim == 1 and value.dtype.kind in "ui"
    return isinstance(value, list | tuple | range) and all(fits("int", one) for one in value)


def is_wrong(call: Call, parameter: inspect.Parameter, value: Any) -> bool:
    """Whether it must be refused."""
    if parameter.name in ("log", "owner", "out", "kinds", "words"):
        return False
    said = [fits(kind, value) for kind in alternatives(str(parameter.annotation))]
    return None not in said and not any(said)


def attempt(world: World, call: Call, arguments: dict[str, Any], bad: str = "") -> bool:
    """Do a call, of whose arguments `bad` alone may be wrong: whether it raised nothing.

    What it raises is one of four errors, in one line that says enough.
    """
    named = {name: value for name, value in arguments.items() if name != "parameters"}
    places = [world.of[call.owner][0]] if call.owner else []
    try:
        perform(call, places, named)
    except RAISED as error:
        said = str(error)
        about = f"{call}({shown(arguments)}): {type(error).__name__}: {said:.300}"
        assert "\n" not in said, about
        assert len(said) <= LONGEST, about
        if not isinstance(error, InputError | OSError) and not said.startswith("PFN "):  # no argument, but memory
            assert "expected" in said, about
            names = [parameter.name for parameter in call.parameters]
            names += [name.removesuffix("es") for name in names]  # one of them
            states = ("process", "VM", "image", "page table", "device", "mapped page", "pfn cache")
            assert any(re.search(rf"\b{name}\b", said) for name in (*names, *states)), about
            if isinstance(error, TypeError) and bad:
                assert re.match(rf"{bad} ", said), about
        return False
    return True


def perform(call: Call, owner: list[Any], named: dict[str, Any]) -> None:
    """The call itself, as people write it."""
    if call.name == "__init__":
        type_of(call, owner)(**named)
    elif call.name.endswith("="):
        setattr(owner[0], call.name[:-1], *named.values())
    elif call.name == "__getitem__":
        owner[0][named["piece"]]
    elif owner:
        result = getattr(owner[0], call.name)(**named)
        if inspect.isgenerator(result):
            list(result)
    else:
        getattr(pgemu, call.name)(**named)


def type_of(call: Call, owner: list[Any]) -> Any:
    return getattr(pgemu, call.owner, None) or type(owner[0])


def usual(world: World, call: Call) -> dict[str, Any]:
    """Good arguments of a call, those without a default."""
    needed = [one for one in call.parameters if one.default is one.empty and one.kind is not one.VAR_KEYWORD]
    return {one.name: good_values(call, one, world)[0] for one in needed}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where calls that write may write; designs that they add are forgotten."""
    monkeypatch.chdir(tmp_path)
    for name in {"abc", "x"} - {*ROWS}:
        monkeypatch.setitem(ROWS, name, None)
        monkeypatch.delitem(ROWS, name)
    return tmp_path


def test_there_is_one_of_every_class(folder: Path) -> None:
    world = World("restructure", folder)
    with_calls = {call.owner for call in CALLS if call.name != "__init__"}
    with_calls |= {one.__name__ for one in public_classes() if properties(one)}
    assert with_calls - {"", "Comparison", "BrokenRule"} <= world.of.keys()
    assert len(CALLS) > 200
    assert {"touch_many", "translate", "open_image", "load", "nr_overcommit_hugepages="} <= {
        call.name for call in CALLS
    }


@pytest.mark.parametrize("design", DESIGNS)
def test_what_is_read_can_be_read(design: str, folder: Path) -> None:
    """Of what has ended, too."""
    for objects in World(design, folder).of.values():
        for one in objects:
            for name in properties(type(one)):
                getattr(one, name)
            assert repr(one)
            assert one == one
            if not isinstance(one, tuple | LoweringOptions | Lowered):
                hash(one)


@pytest.mark.parametrize("design", DESIGNS)
def test_every_object_shows_itself_in_a_line(design: str, folder: Path) -> None:
    """And in a notebook in a table that is short, with nothing in it but what it is made of."""
    world, shown_as_tables = World(design, folder), set()
    world.of["AddressSpace"][0].touch_many(range(0, 1 << 24, 4096))
    for name, objects in world.of.items():
        for one in objects:
            text = repr(one)
            assert "\n" not in text, name
            assert len(text) <= 240, (name, text)
            assert not re.search(r"array\(| object at 0x|dtype", text), (name, text)
            if hasattr(one, "_repr_html_"):
                shown_as_tables.add(name)
                table = one._repr_html_()
                assert len(table) <= 4000, name
                tags = set(re.findall(r"<[^>]*>", table))
                assert tags <= {f"<{end}{tag}>" for end in ("", "/") for tag in ("table", "tr", "th", "td", "p")}, tags
                assert table.count("<tr>") == table.count("</tr>") >= 1
    assert {"Result", "Results", "EditResult", "EditResults", "Translation", "NestedTranslation", "PageTable",
            "Statistics", "Stage2", "Page"} <= shown_as_tables  # fmt: skip


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_is_a_real_one_or_is_refused(copied: Any, folder: Path) -> None:
    """A copy does not change with the machine; what would is refused, by the name of its class."""
    world, refused = World("restructure", folder), set()
    for name, objects in world.of.items():
        for one in objects:
            before, said = repr(one), ""
            try:
                again = copied(one)
            except TypeError as error:
                said = str(error)
            if said:
                assert said.startswith(f"{type(one).__name__} cannot be copied or pickled: it stands on ")
                refused.add(name)
            else:
                assert type(again) is type(one)
                assert repr(again) == before
    stand_on_one = {name for name, objects in world.of.items() if isinstance(objects[0], OfMachine)}
    assert refused == stand_on_one | {"Image"}
    assert len(refused) > 10


@pytest.mark.parametrize("call", CHECKED, ids=repr)
def test_every_wrong_argument_is_refused_by_name(call: Call, folder: Path) -> None:
    world = World("restructure", folder)
    for parameter in call.parameters:
        if parameter.kind is parameter.VAR_KEYWORD:
            continue
        for value in WRONG:
            done = attempt(world, call, usual(world, call) | {parameter.name: value}, parameter.name)
            assert not (done and is_wrong(call, parameter, value)), (call, parameter.name, shown(value))
    assert world.machine.check() == 0, world.machine.broken


# --------------------------------------------------------------------------- one after the other


def some_arguments(draw: Any, world: World, call: Call) -> dict[str, Any]:
    """Arguments, good ones and a few wrong ones."""
    found = {}
    for one in call.parameters:
        if one.kind is one.VAR_KEYWORD or (one.default is not one.empty and draw(st.booleans())):
            continue
        if draw(st.integers(0, 5)) == 0:
            found[one.name] = draw(st.sampled_from(WRONG))
        else:
            found[one.name] = draw(st.sampled_from(good_values(call, one, world)))
    return found


@pytest.mark.parametrize("design", DESIGNS)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_no_sequence_of_calls_harms_a_machine(design: str, folder: Path, data: st.DataObject) -> None:
    """Objects end in the course of it, and are called all the same."""
    world = World(design, folder)
    if data.draw(st.booleans()):
        world.machine.check_each()
    for call in data.draw(st.lists(st.sampled_from(CHECKED), min_size=1, max_size=30)):
        arguments = some_arguments(data.draw, world, call)
        which = data.draw(st.integers(0, 1))
        if call.owner:
            world.of[call.owner] = world.of[call.owner][which:] + world.of[call.owner][:which]
        attempt(world, call, arguments)
    world.machine.check()
    # What KVM maps of pfnmap by its module parameter is left behind, as it says.
    found = {finding.rule for finding in world.machine.findings}
    assert found <= ({W.Broken.STALE_MAPPING} if design == "pfnmap" else set()), world.machine.findings


# --------------------------------------------------------------------------- sizes


def test_what_no_computer_holds_is_one_error() -> None:
    calls = [
        lambda: OTHER.create_process().touch_many(range(1 << 45)), lambda: OTHER.run_columns(1, count=1 << 50),
        lambda: OTHER.run_columns(1, count=1 << 63), lambda: pgemu.Records.build(1 << 45),
        lambda: pgemu.Records.build((1 << 64) - 1),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(OSError, match="more than this computer can hold") as told:
            call()
        assert told.value.errno == W.ENOMEM


def test_what_no_computer_holds_is_told_by_the_name_of_the_public_class() -> None:
    """Not by that of the part of it in which the method is defined."""
    with pytest.raises(OSError, match=r"Machine\.run_columns\(1\): more than"):
        OTHER.run_columns(1, count=1 << 63)
    with pytest.raises(OSError, match=r"Folio\.merge\(1099511627776\): more than"):
        OTHER.folio(OTHER.hugetlb().free_list()[0]).merge(1 << 40)


@pytest.mark.parametrize("design", DESIGNS)
def test_the_largest_mapping_is_looked_through_by_its_tables(design: Any) -> None:
    """Of 64 TiB mapped there are four table pages."""
    machine = Machine(Config(design, pool=W.PAGE_2M, page_size=W.PAGE_2M, defects=("punch-keeps-entries",)))
    gmem, process = machine.create_guest_memfd(W.PAGE_2M, shared=True), machine.create_process()
    assert process.mmap(gmem, 1 << 30, length=1 << 46).status == 0
    process.touch((1 << 30) + 5 * 4096)
    assert gmem.stale_entries() == []
    pfn = gmem.pfn(5 * 4096)
    assert gmem.punch_hole(0, W.PAGE_2M).status == 0
    found = [(entry.space, entry.address, entry.pfn) for entry in gmem.stale_entries()]
    assert found == ([] if design == "restructure" else [(process.space, (1 << 30) + 5 * 4096, pfn)])


def test_a_system_call_of_the_largest_length_is_a_result() -> None:
    """mm/mmap.c:do_mmap(): a length that is none when it is rounded up, or past TASK_SIZE, is -ENOMEM or -EINVAL."""
    process = OTHER.create_process()
    for length in ((1 << 64) - 1, 1 << 63, (1 << 63) - 1):
        for call in (process.mmap_anonymous, process.mmap_hugetlb):
            for shared in (False, True):
                assert call(0x40000000, length, shared=shared).status in (-W.ENOMEM, -W.EINVAL)
    assert OTHER.check() == 0


FORMS = {
    "list": list, "tuple": tuple, "an iterator": iter, "int64": lambda v: np.array(v, np.int64),
    "big-endian": lambda v: np.array(v, ">u8"), "every second": lambda v: np.repeat(np.array(v, np.uint64), 2)[::2],
    "misaligned": lambda v: np.frombuffer(b"x" + np.array(v, np.uint64).tobytes(), np.uint64, len(v), offset=1),
    "read-only": lambda v: np.frombuffer(np.array(v, np.uint64).tobytes(), np.uint64),
    "backwards": lambda v: np.array(v[::-1], np.uint64)[::-1],
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=20)
@given(pages=st.lists(st.integers(0, 1023), max_size=20))
def test_an_array_is_what_is_in_it(form: str, pages: list[int]) -> None:
    """However it lies in memory: the same results, the same machine."""
    told = []
    for make in (FORMS[form], lambda values: np.array(values, np.uint64)):
        machine = Machine(Config("pfnmap", pool=2 * W.PAGE_2M, page_size=W.PAGE_2M))
        gmem, process = machine.create_guest_memfd(2 * W.PAGE_2M, shared=True), machine.create_process()
        vm, table = machine.create_vm(process, protected=True), machine.create_page_table("x86-64")
        assert process.mmap(gmem, 0).status == vm.bind(gmem, 0).status == 0
        at = [page << 12 for page in pages]
        results = [
            process.touch_many(make(at)), vm.touch_many(make(at)), gmem.convert_many(make(at), shared=False),
            vm.translate(make(at)), process.translate(make(at)), gmem.get_reference_many(make(at)),
            table.map_many(make(at), make(at)), table.translate(make(at), make([1] * len(at))),
            machine.load(make(at)), process.zap_many(make(at)),
            machine.run_columns(make([int(W.Operation.GUEST_FAULT)] * len(at)), 0, make(at), count=len(at)),
        ]  # fmt: skip
        arrays = [array for one in results for array in (one if isinstance(one, tuple) else (one,))]
        told.append([array.tolist() for array in arrays if isinstance(array, np.ndarray)])
        assert len(told[-1]) > 25
        assert machine.check() == 0, machine.broken
    assert told[0] == told[1]
