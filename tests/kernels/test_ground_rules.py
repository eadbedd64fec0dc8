"""Rules that every kernel obeys, read off the compiled code, and what importing the kernels may not do.

The rules need the compiler's own record of types, which a kernel loaded from the cache has not: entry points
that came from there are compiled once more, beside the cache.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from numba import njit, types
from numba.core import ir
from numba.core.dispatcher import Dispatcher

import pgemu_kernels
from pgemu import capi
from pgemu.guest import GuestOptions, run_accesses
from pgemu.machine.designs import DESIGNS
from pgemu.objects.machine import Config, Machine
from pgemu.tables.translation import Kind, translate, translate_nested
from pgemu.trace.accesses import Tally
from pgemu.trace.fast_lines import FastLines
from pgemu.trace.readers import lackey
from pgemu.trace.schema import Records
from pgemu_kernels import words as W
from pgemu_kernels.engine import compile as kernel_compile
from pgemu_kernels.engine.ahead import Declared
from pgemu_kernels.engine.inner_functions import StepCompiler
from pgemu_kernels.engine.numba_internals import EntryCompiler
from pgemu_kernels.run import c_calls, c_walks
from pgemu_kernels.run.entries import declared

ENTRY_LIMIT = 19  # what one and the next have in common is compiled twice

# Arguments and variables of these names hold page-table values or index arrays of them.
NUMBERS = {"gfn", "pfn", "frame", "page", "index", "start", "end", "level", "slot"}
PAGE_TABLE_NAMES = NUMBERS | {"address", "root", "table", "entry", "value", "mask"}
# A gauge has a `value` too, which is signed.
VARIABLE_NAMES = PAGE_TABLE_NAMES - {"value"}


class Overload(NamedTuple):
    """A kernel compiled for one signature."""

    name: str
    inlined: bool
    symbol: str
    arguments: dict[str, types.Type]
    variables: dict[str, types.Type]
    index_types: list[types.Type]


def exercise(machine: Machine) -> None:
    """Run every operation of a design, so that every entry point is compiled or loaded."""
    process = machine.create_process()
    gmem = machine.create_guest_memfd(2 * W.PAGE_2M, shared=False)
    vm = machine.create_vm(process, protected=True)
    base = 0x7F00_0000_0000
    assert process.mmap(gmem, base).status == 0
    assert vm.bind(gmem, gpa=0).status == 0
    assert vm.touch(0).detail == 2
    assert gmem.convert(0, W.PAGE_4K, shared=True).status == 0
    process.touch(base, write=True)
    assert translate(machine, 0, process.root, [base], Kind.USER_WRITE).status.tolist() == [0]
    # Nothing backs the guest's top table: its first entry reads as zero.
    assert translate_nested(machine, 0, W.PAGE_2M, 1, vm.root, [0]).status.tolist() == [W.WalkStatus.NOT_PRESENT]
    reference = gmem.get_reference(0)
    gmem.put_reference(reference.detail)
    process.pin(base, W.PAGE_4K, pin=0)
    machine.unpin(0)
    machine.drain_lru()
    machine.write_frame(gmem.pfn(0) or 0, b"contents")
    process.zap(base, W.PAGE_4K)
    assert gmem.convert(0, W.PAGE_4K, shared=False).status == 0
    machine.begin(1, W.Operation.GUEST_FAULT, vm=vm.vm, address=W.PAGE_2M)
    while machine.step(1) != W.STOP:
        pass
    assert gmem.punch_hole(0, W.PAGE_2M).status == 0
    process.munmap(base, gmem.size)
    vm.unbind(0)
    machine.operate(W.Operation.PROTECT, space=process.space, address=base, length=W.PAGE_4K)
    ioas = machine.create_iommufd().create_ioas(guest_memfd="revoke")
    ioas.attach()
    assert ioas.map_file(0, W.PAGE_4K, process, gmem, 0).status == 0
    assert gmem.close().status == 0
    assert machine.hugetlb(W.PAGE_2M).resize(1).detail == 1
    container = machine.create_vfio_container()
    container.attach()
    assert container.unmap_all().status == 0
    machine.create_iommufd().create_ioas()
    table = machine.create_page_table("ept")
    assert table.map(0, 0, level=2).status == 0
    assert table.unmap(0).status == 0
    assert machine.check() == 0
    capi.functions()
    FastLines(NoLines(), array("Q"), None, array("Q")).feed(b"\n")
    assert len(list(lackey._KernelLines(Tally(), 0).read(b" L 04032e58,8\n"))) == 1
    access = Records.build(1, op=W.Operation.GUEST_ACCESS)
    run_accesses([access], {"one": Config("pfnmap")}, GuestOptions(1 << 30, private=False))


class NoLines:
    """Who reads the lines that the kernel does not."""

    line = events = 0

    def feed_slow(self, piece: bytes, block: bytes, before: int) -> None:
        assert piece == block


def freshly_compiled(declared: Declared) -> Any:
    """The entry point with the compiler's annotations."""
    entry = getattr(importlib.import_module(declared.module), declared.name)
    signatures = declared.dispatcher.signatures
    results = [entry.overloads.get(signature) for signature in signatures]
    if all(result and hasattr(result.type_annotation, "typemap") for result in results):
        return entry
    twin = njit(pipeline_class=EntryCompiler, **kernel_compile.OPTIONS)(entry.py_func)
    for signature in signatures:
        twin.compile(signature)
    return twin


def array_indices(annotation: Any) -> Iterator[types.Type]:
    """Types of the values that index arrays."""
    for instruction, signature in annotation.calltypes.items():
        stores = isinstance(instruction, ir.SetItem)
        loads = isinstance(instruction, ir.Expr) and instruction.op == "getitem"
        if (stores or loads) and isinstance(signature.args[0], types.Array):
            yield signature.args[1]


def is_inlined(dispatcher: Any, signature: Any) -> bool:
    """By the decorator; a step is inlined into the loops of machines without parameters, the fast ones."""
    if dispatcher._compiler.pipeline_class is StepCompiler:
        return not signature[0].full
    return bool(dispatcher.targetoptions.get("forceinline"))


def overloads_of(dispatcher: Any) -> Iterator[Overload]:
    code = dispatcher.py_func.__code__
    names = code.co_varnames[: code.co_argcount]
    for signature, result in dispatcher.overloads.items():
        annotation = result.type_annotation
        yield Overload(
            name=f"{dispatcher.py_func.__module__}.{dispatcher.py_func.__qualname__}",
            inlined=is_inlined(dispatcher, signature),
            symbol=result.fndesc.llvm_func_name,
            arguments=dict(zip(names, signature, strict=True)),
            variables=dict(annotation.typemap),
            index_types=list(array_indices(annotation)),
        )


@pytest.fixture(scope="module")
def compiled_entries() -> dict[str, Any]:
    if os.environ.get("NUMBA_BOUNDSCHECK") == "1":
        pytest.skip("types and calls are those of the code without bounds checks")
    kernel_modules()  # all of them: machine code from the cache is used without its module
    for entry in declared:
        if entry.missing(in_cache=True):
            entry.compile_here()  # with annotations; another process would keep them to itself
    for design in DESIGNS:
        exercise(Machine(Config(design, pool=4 * W.PAGE_2M, page_size=W.PAGE_2M)))
    never_run = [entry.name for entry in declared if not entry.ready()]
    assert never_run == [], "exercise() leaves entry points out"
    assert {entry.name for entry in declared} == {entry.py_func.__qualname__ for entry in own_entries()}
    assert {len(entry.dispatcher.signatures) for entry in declared} == {1}, "declared with other types than called"
    found = {entry.name: freshly_compiled(entry) for entry in declared}
    gc.collect()
    gc.freeze()  # millions of objects, which stay: all other tests would have the collector go through them
    return found


@pytest.fixture(scope="module")
def overloads(compiled_entries: dict[str, Any]) -> list[Overload]:
    inner = [dispatcher for dispatcher in kernel_compile.kernels if dispatcher not in kernel_compile.entries]
    return [overload for dispatcher in [*compiled_entries.values(), *inner] for overload in overloads_of(dispatcher)]


@pytest.fixture(scope="module")
def assembly(compiled_entries: dict[str, Any]) -> dict[str, str]:
    return {name: "\n".join(entry.inspect_asm().values()) for name, entry in compiled_entries.items()}


def own_entries() -> list[Any]:
    """Entries of the kernels; tests may have some of their own."""
    return [entry for entry in kernel_compile.entries if entry.py_func.__module__.startswith("pgemu_kernels.")]


def kernel_modules() -> list[Any]:
    found = pkgutil.walk_packages(pgemu_kernels.__path__, "pgemu_kernels.")
    return [importlib.import_module(module.name) for module in found]


def test_one_decorator_makes_every_kernel() -> None:
    modules = kernel_modules()
    made = set(map(id, kernel_compile.kernels)) | {id(entry.dispatcher) for entry in declared}
    others = [
        f"{module.__name__}.{name}"
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, Dispatcher) and id(value) not in made
    ]
    assert len(made) > 100
    assert others == []


def test_few_entry_points() -> None:
    kernel_modules()
    # What C calls is compiled for who asks for it, and small: what takes long is called by its address.
    modules = [entry.py_func.__module__ for entry in own_entries()]
    for_c = sum(modules.count(module.__name__) for module in (c_calls, c_walks))
    assert 0 < len(modules) - for_c <= ENTRY_LIMIT
    assert for_c == len(capi.functions())


def test_no_kernel_counts_references(assembly: dict[str, str]) -> None:
    counting = {name: set(re.findall(r"NRT_\w+", text)) for name, text in assembly.items()}
    assert {name: found for name, found in counting.items() if found} == {}


def test_small_kernels_are_inlined(overloads: list[Overload], assembly: dict[str, str]) -> None:
    inlined = {overload.symbol: overload.name for overload in overloads if overload.inlined}
    outlined = {overload.symbol for overload in overloads if not overload.inlined}
    # Calls go through registers; a function that is called has its symbol in the text.
    symbols = {name: set(re.findall(r"_ZN13pgemu_kernels\w+", text)) for name, text in assembly.items()}
    assert [f"{name} calls {inlined[symbol]}" for name in symbols for symbol in symbols[name] & inlined.keys()] == []
    assert len(inlined) > 100
    assert len(symbols["run_others"] & outlined) > 5, "symbols are no longer found by their names"


def is_unsigned(kind: types.Type) -> bool:
    scalar = kind.dtype if isinstance(kind, types.Array) else kind
    return bool(scalar == types.uint64)


def test_page_table_values_are_uint64(overloads: list[Overload]) -> None:
    wrong = {
        f"{overload.name}: argument {name} is {kind}"
        for overload in overloads
        for name, kind in overload.arguments.items()
        if name in PAGE_TABLE_NAMES and not is_unsigned(kind)
    } | {
        f"{overload.name}: {name} is {kind}"
        for overload in overloads
        for name, kind in overload.variables.items()
        if name.split(".")[0] in VARIABLE_NAMES and not is_unsigned(kind)
    }
    assert sorted(wrong) == []


def test_arrays_are_indexed_by_uint64(overloads: list[Overload]) -> None:
    # A signed index costs a test for negative ones at every load.
    wrong = {
        f"{overload.name}: {kind}"
        for overload in overloads
        for kind in overload.index_types
        if isinstance(kind, types.Integer) and kind.signed
    }
    assert sum(len(overload.index_types) for overload in overloads) > 100
    assert sorted(wrong) == []


def test_no_kernel_computes_with_floats(overloads: list[Overload]) -> None:
    wrong = {
        f"{overload.name}: {name} is {kind}"
        for overload in overloads
        for name, kind in overload.variables.items()
        if isinstance(kind, types.Float)
    }
    assert sorted(wrong) == []


@pytest.mark.skipif(os.environ.get("NUMBA_BOUNDSCHECK") != "1", reason="kernels are compiled without bounds checks")
def test_bounds_checks_are_on() -> None:
    from pgemu_kernels.engine.handle import describe

    machine = Machine(Config("pfnmap", pool=W.PAGE_2M, page_size=W.PAGE_2M))
    vm = machine.create_vm(protected=True)
    vm.bind(machine.create_guest_memfd(W.PAGE_2M), gpa=0)
    vars(machine)["descriptor"] = describe(machine.arrays._replace(ram=machine.arrays.ram[:1]))
    with pytest.raises(IndexError):
        vm.touch(0)


# ------------------------------------------------------------------ the cache, on a package of two kernels

CALLEE = """
import numpy as np
from pgemu_kernels.engine.compile import kernel

@kernel
def next_value(value):
    return value + np.uint64({step})
"""

CALLER = """
import json, sys
import numpy as np
from pgemu_kernels.callee import next_value
from pgemu_kernels.engine.compile import entry

@entry
def call(values):
    values[0] = next_value(values[0])

@entry
def store(values, index):
    values[index] = np.uint64(7)

values = np.zeros(4, np.uint64)
call(values)
try:
    # One past the end of the view, inside the array.
    store(values[:2], np.uint64(2))
    stored = True
except IndexError:
    stored = False
hits = [sum(f.stats.cache_hits.values()) for f in (call, store)]
print(json.dumps({"value": int(values[0]), "stored": stored, "hits": hits}))
"""


class Outcome(NamedTuple):
    value: int
    stored: bool
    hits: list[int]
    stderr: str


ENGINE = ("__init__", "compile", "inner_functions", "machine_code", "numba_internals", "progress")


class SmallPackage:
    """A package of the kernels' name with their decorator, one caller and one callee."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.package = folder / "pgemu_kernels"
        (self.package / "engine").mkdir(parents=True)
        for name in ("__init__", *(f"engine/{name}" for name in ENGINE)):
            (self.package / f"{name}.py").write_bytes((kernel_compile.SOURCES / f"{name}.py").read_bytes())
        (self.package / "caller.py").write_text(CALLER)
        self.edit_callee(step=1)

    def edit_callee(self, step: int) -> None:
        (self.package / "callee.py").write_text(CALLEE.format(step=step))

    def run(self, boundscheck: str = "0") -> Outcome:
        environment = os.environ | {
            "NUMBA_BOUNDSCHECK": boundscheck,
            "PGEMU_CACHE_DIR": str(self.folder / "cache"),
            "PYTHONPATH": str(self.folder),
            "NUMBA_DISABLE_JIT": "0",  # it is compiled as `boundscheck` says whatever tests run with
        }
        command = [sys.executable, "-P", "-m", "pgemu_kernels.caller"]
        done = subprocess.run(command, env=environment, cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return Outcome(**json.loads(done.stdout), stderr=done.stderr)


@pytest.mark.same_with_checks
def test_an_edited_callee_is_seen_and_the_compilation_is_announced_once(tmp_path: Path) -> None:
    package = SmallPackage(tmp_path)
    cold = package.run()
    assert cold.value == 1
    assert cold.hits == [0, 0]
    assert cold.stderr.count("compiling") == 1  # for two entry points
    assert len(cold.stderr.splitlines()) == 1

    assert package.run() == Outcome(value=1, stored=True, hits=[1, 1], stderr="")

    package.edit_callee(step=5)
    edited = package.run()
    assert edited.value == 5
    assert edited.hits == [0, 0]


@pytest.mark.same_with_checks
def test_bounds_checks_do_not_run_unchecked_code_from_the_cache(tmp_path: Path) -> None:
    package = SmallPackage(tmp_path)
    assert package.run(boundscheck="0").stored
    checked = package.run(boundscheck="1")
    assert not checked.stored
    assert checked.hits == [0, 0]


def test_the_stamp_covers_every_source_and_the_options(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    sources = [tmp_path / "a.py", tmp_path / "inner" / "b.py"]
    stamps = [kernel_compile.source_stamp(tmp_path)]
    for source in sources:
        source.write_text("pass\n")
        stamps.append(kernel_compile.source_stamp(tmp_path))
    sources[0].rename(tmp_path / "c.py")
    stamps.append(kernel_compile.source_stamp(tmp_path))
    stamps.append(kernel_compile.source_stamp(tmp_path, {"nogil": False}))
    assert len(set(stamps)) == len(stamps)
    assert kernel_compile.source_stamp(tmp_path) == stamps[-2]


# ------------------------------------------------------------------ imports


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_numba_is_left_as_it_was() -> None:
    output = run_python("""
import importlib, pkgutil
from numba.core import config
def settings():
    return {name: value for name, value in vars(config).items() if name.isupper()}
before = settings()
import pgemu_kernels
for module in pkgutil.walk_packages(pgemu_kernels.__path__, "pgemu_kernels."):
    importlib.import_module(module.name)
after = settings()
print(len(before), {name for name in before | after if before.get(name) != after.get(name)} or "unchanged")
""")
    count, changed = output.split(maxsplit=1)
    assert int(count) > 20
    assert changed.strip() == "unchanged"


@pytest.mark.same_with_checks
@pytest.mark.parametrize("module", ["pgemu", "pgemu.cli", "pgemu.trace", "pgemu.workload", "pgemu_kernels.words"])
def test_no_compiler_and_no_arrow_until_they_are_used(module: str) -> None:
    file, *loaded = run_python(f"""
import sys, {module}
print({module}.__file__)
for name in sys.modules:
    print(name)
""").splitlines()
    assert file.endswith(".py")
    assert {"numba", "llvmlite", "pyarrow"}.isdisjoint(loaded)
