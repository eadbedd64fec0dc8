"""What compile.py and handle.py give to kernels, on kernels of a few lines, compiled for both types of machines."""

import gc
import re
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numba import njit
from numba.core import config
from numba.core.errors import NumbaError, TypingError
from numba.core.types.functions import BaseFunction

from pgemu_kernels.engine import ahead, inner_functions
from pgemu_kernels.engine.bits import U0, U1
from pgemu_kernels.engine.compile import OPTIONS
from pgemu_kernels.engine.handle import Machine, describe, full_only, open_full_machine, open_machine, parameter
from pgemu_kernels.engine.numba_internals import EntryCompiler, library_of
from pgemu_kernels.run import entries

U = np.uint64
SEVEN = U(7)

# As compile.py makes them, but not in its lists, which the ground rules go through.
kernel = inner_functions.inner_function(forceinline=True, **OPTIONS)
step = inner_functions.inner_function(inner_functions.StepCompiler, forceinline=False, **OPTIONS)
outlined = inner_functions.inner_function(forceinline=False, **OPTIONS)
entry = njit(pipeline_class=EntryCompiler, **OPTIONS)

chosen = parameter(U1, SEVEN)


@step
def add_chosen(m, value):  # type: ignore[no-untyped-def]
    m.state[U0] = m.state[U0] + value
    return m.state[U0] + chosen(m)


@outlined
def every_array(m, first, second, third):  # type: ignore[no-untyped-def]
    return m.ram[first] + m.state[second] + U(m.counts[third]) + U(len(m.ram))


@kernel
def nothing(m, first, second, third):  # type: ignore[no-untyped-def]
    return second


for_full = full_only(every_array, nothing)
number_for_others = full_only(every_array, SEVEN)


@kernel
def store_seven(m, at):  # type: ignore[no-untyped-def]
    m.state[at] = SEVEN


@kernel
def is_seven(m, at):  # type: ignore[no-untyped-def]
    return m.state[at] == SEVEN


nothing_for_others = full_only(store_seven, None)
true_for_others = full_only(is_seven, True)


@entry
def fast(descriptor, value):  # type: ignore[no-untyped-def]
    return add_chosen(open_machine(descriptor), value)


@entry
def full(descriptor, value):  # type: ignore[no-untyped-def]
    return add_chosen(open_full_machine(descriptor), value)


@entry
def fast_choice(descriptor):  # type: ignore[no-untyped-def]
    return for_full(open_machine(descriptor), U0, U1, U1)


@entry
def full_choice(descriptor):  # type: ignore[no-untyped-def]
    return for_full(open_full_machine(descriptor), U0, U1, U1)


@entry
def fast_values(descriptor):  # type: ignore[no-untyped-def]
    m = open_machine(descriptor)
    nothing_for_others(m, U1)
    return number_for_others(m, U0, U1, U1) + U(true_for_others(m, U0))


@entry
def full_values(descriptor):  # type: ignore[no-untyped-def]
    m = open_full_machine(descriptor)
    nothing_for_others(m, U1)
    return number_for_others(m, U0, U1, U1) + U(true_for_others(m, U0))


def arrays() -> Machine:
    return Machine(
        np.array([1000, 2000], np.uint64),
        np.array([5, 40, 0], np.uint64),
        np.zeros(1, np.int64),
        np.array([0, 300], np.uint32),
    )


@pytest.mark.parametrize(("add", "expected"), [(fast, 5 + 2 + 7), (full, 5 + 2 + 40)])
def test_a_parameter_is_a_constant_or_a_register(add: Callable[..., int], expected: int) -> None:
    machine = arrays()
    assert add(describe(machine), U(2)) == expected
    assert machine.state.tolist() == [7, 40, 0]


def test_a_step_is_inlined_where_parameters_are_constants_and_called_elsewhere() -> None:
    machine = arrays()
    assembly = {}
    for add in (fast, full):
        add(describe(machine), U0)
        assembly[add] = "\n".join(add.inspect_asm().values())
    symbols = [compiled.fndesc.llvm_func_name for compiled in add_chosen.overloads.values()]
    assert [symbol in assembly[add] for add in (fast, full) for symbol in symbols] == [False, False, False, True]


def test_a_kernel_for_full_machines_is_not_compiled_for_others() -> None:
    machine = arrays()
    assert fast_choice(describe(machine)) == 1
    assert [signature[0].full for signature in every_array.overloads] == []
    assert full_choice(describe(machine)) == 1000 + 40 + 300 + 2
    assert [signature[0].full for signature in every_array.overloads] == [True]


def test_where_a_kernel_is_for_full_machines_others_have_a_value() -> None:
    machine = arrays()
    assert fast_values(describe(machine)) == 7 + 1
    assert machine.state.tolist() == [5, 40, 0]
    assert [signature[0].full for signature in store_seven.overloads] == []
    assert full_values(describe(machine)) == 1000 + 7 + 300 + 2 + 0
    assert machine.state.tolist() == [5, 7, 0]


def test_inner_functions_link_into_functions_that_numba_compiles_by_itself() -> None:
    @njit(**OPTIONS)
    def plain(descriptor):  # type: ignore[no-untyped-def]
        m = open_full_machine(descriptor)
        return add_chosen(m, U1) + for_full(m, U0, U1, U1)

    machine = arrays()
    assert plain(describe(machine)) == (5 + 1 + 40) + (1000 + 40 + 300 + 2)


# ------------------------------------------------------------------ compilation with less to do


@pytest.mark.parametrize("collecting", [True, False])
@pytest.mark.parametrize("broken", [True, False])
def test_numba_and_the_collector_are_left_as_they_were_also_by_a_kernel_that_does_not_compile(
    collecting: bool, broken: bool
) -> None:
    @entry
    def unknown(values):  # type: ignore[no-untyped-def]
        return values.no_such_attribute

    @entry
    def good(values):  # type: ignore[no-untyped-def]
        return values[U0]

    before = BaseFunction.get_call_type
    if not collecting:
        gc.disable()
    try:
        if broken:
            with pytest.raises(TypingError):
                unknown(np.zeros(1, np.uint64))
        else:
            assert good(np.zeros(1, np.uint64)) == 0
        assert gc.isenabled() == collecting
        assert BaseFunction.get_call_type is before
    finally:
        gc.enable()


def mixture(a: Any, b: Any) -> Any:
    return a + b, a < b, max(a, b), a // b, -a, (a, b)[1]


@pytest.mark.parametrize("first", [np.uint64, np.int64, np.uint32, np.bool_, np.float64])
@pytest.mark.parametrize("second", [np.uint64, np.int64, np.int32])
def test_remembered_signatures_are_those_numba_resolves(first: Any, second: Any) -> None:
    arguments = first(1), second(3)
    if first is np.bool_:
        expected, remembered = (decorate(lambda a, b: (a + b, a < b, a | (b > b))) for decorate in (njit, entry))
    else:
        expected, remembered = njit(**OPTIONS)(mixture), entry(mixture)
    assert remembered(*arguments) == expected(*arguments)
    assert remembered.nopython_signatures == expected.nopython_signatures
    again = entry(remembered.py_func)
    assert again(*arguments) == expected(*arguments)
    assert again.nopython_signatures == expected.nopython_signatures


# ------------------------------------------------------------------ what an inner function is lowered to


def swapped_in_a_loop(words, count):  # type: ignore[no-untyped-def]
    first, second, last = U0, U1, U(7)
    while count > U0:
        first, second = second, first + second
        if first & U1:
            last = second
        count -= U1
    return words[last % U(words.size)] + first


def one_of_two_values(words, count):  # type: ignore[no-untyped-def]
    for k in range(words.size):
        if words[k] > count:
            found = words[k]
            break
    else:
        found = count
    return found + words[-1]


def stored_and_read_back(words, count):  # type: ignore[no-untyped-def]
    words[1] = count
    words[U0] = words[1] + U1
    part = words[1:3]
    part[0] += U1
    return words[0] * U(100) + words[1] + U(part.size)


def several_values(words, count):  # type: ignore[no-untyped-def]
    return (words, count), (count + U1, words[2], words)


def takes_them_apart(words, count):  # type: ignore[no-untyped-def]
    (same, kept), (more, third, again) = several_values(words, count)
    return same[1] + kept + more + third + again[0]


def smallest_and_largest(words, count):  # type: ignore[no-untyped-def]
    return min(words[0], count) * U(1000) + max(words[1], count) + U(bool(count))


several_values = inner_functions.inner_function(forceinline=False, **OPTIONS)(several_values)
SHAPES = (swapped_in_a_loop, one_of_two_values, stored_and_read_back, takes_them_apart, smallest_and_largest)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_inner_function_does_what_numbas_does(shape: Any) -> None:
    inner = inner_functions.inner_function(forceinline=False, **OPTIONS)(shape)

    @entry
    def call(words, count):  # type: ignore[no-untyped-def]
        return inner(words, count)

    if shape is takes_them_apart:
        expected = 1 + 5 + (5 + 1) + 2 + 3, [3, 1, 2]
        words = np.array([3, 1, 2], np.uint64)
        assert (call(words, U(5)), words.tolist()) == expected
        return
    plain = njit(**OPTIONS)(shape)
    for count in map(U, (0, 1, 2, 3, 10, 50)):
        results = []
        for function in (plain, call):
            words = np.array([4, 9, 2, 30], np.uint64)
            results.append((function(words, count), words.tolist()))
        assert results[0] == results[1]


def test_an_inner_function_that_raises_does_not_compile() -> None:
    @inner_functions.inner_function(forceinline=True, **OPTIONS)
    def raises(value):  # type: ignore[no-untyped-def]
        if value:
            raise ValueError
        return value

    @entry
    def call(value):  # type: ignore[no-untyped-def]
        return raises(value)

    if config.BOUNDSCHECK:
        with pytest.raises(ValueError):
            call(U1)
    else:
        with pytest.raises(NumbaError, match="inner functions return errors"):
            call(U1)


@pytest.mark.skipif(bool(config.BOUNDSCHECK), reason="numba's own calls take everything")
@pytest.mark.parametrize("strange", ["every other item", "two dimensions", "a default"])
def test_what_an_inner_function_cannot_take_does_not_compile(strange: str) -> None:
    @inner_functions.inner_function(forceinline=False, **OPTIONS)
    def first(values, k=U1):  # type: ignore[no-untyped-def]
        return k + U(values.size)

    @entry
    def call(values):  # type: ignore[no-untyped-def]
        return first(values, U0)

    @entry
    def call_with_less(values):  # type: ignore[no-untyped-def]
        return first(values)

    function = call_with_less if strange == "a default" else call
    values = np.zeros((2, 2), np.uint64) if strange == "two dimensions" else np.zeros(4, np.uint64)
    with pytest.raises(NumbaError, match="inner functions take"):
        function(values[::2] if strange == "every other item" else values)


def test_every_other_item_is_found_where_numba_finds_it() -> None:
    def second(words):  # type: ignore[no-untyped-def]
        part = words[::2]
        part[U1] += U1
        return part[U1] * U(10) + words[::-1][U1]

    inner = inner_functions.inner_function(forceinline=False, **OPTIONS)(second)

    @entry
    def call(words):  # type: ignore[no-untyped-def]
        return inner(words)

    results = [function(np.arange(5, 11, dtype=np.uint64)) for function in (njit(**OPTIONS)(second), call)]
    assert results == [8 * 10 + 9] * 2


def test_functions_of_one_name_in_two_entries_stay_apart() -> None:
    """Entries come from several processes, which number the functions of a closure alike."""
    machine = arrays()
    for add in (fast, full):
        add(describe(machine), U0)
        (result,) = add.overloads.values()
        names = re.findall(rb"_ZN[0-9A-Za-z_]+", library_of(result)._get_compiled_object())
        assert result.fndesc.llvm_func_name.encode() in names
        assert [name for name in names if b"add_chosen" in name and not name.startswith(b"_ZN08NumbaEnv")] == []


ALONE = """
import sys
from importlib import import_module
from pgemu_kernels.engine.handle import gifts
module = sys.argv[1]
import_module(module)
needed = "pgemu_kernels.process.operations" in sys.modules  # whose faults are those of the designs, too
print(module, not needed or all(len(given) == 1 for given in gifts))
"""


def test_every_entry_can_be_compiled_where_no_other_is() -> None:
    """As by a process that finds the others in the cache: what its kernels call is there with its module alone."""
    modules = sorted({one.module for one in entries.declared if one.module.startswith("pgemu_kernels.")})
    assert len(modules) > 5
    for module in modules:
        done = subprocess.run([sys.executable, "-c", ALONE, module], capture_output=True, text=True, check=True)
        assert done.stdout == f"{module} True\n"


def test_an_entry_of_a_module_that_another_thread_imports_is_not_compiled_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    one = next(one for one in ahead.declared if one.dispatcher is entries.check)
    monkeypatch.setitem(sys.modules, one.module, ModuleType(one.module))  # as it is before its first definition
    assert one.compiled_here() is False
    monkeypatch.delitem(sys.modules, one.module)
    assert one.compiled_here() is False
