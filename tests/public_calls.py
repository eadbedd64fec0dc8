"""Every public call, found by looking: what pgemu names, and the methods of whatever that returns."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import pkgutil
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np

import pgemu
from pgemu import Config, LoweringOptions, Machine, Property, Tlb, Versions
from pgemu.tables.translation import Access, Kind
from pgemu.trace.schema import Records
from pgemu_kernels import words as W
from pgemu_kernels.formats import page_format, struct_page
from pgemu_kernels.words.operations import Operation

M2, PAGE = W.PAGE_2M, W.PAGE_4K
VA = {"anonymous": 0x40_0000, "small": 0x80_0000, "device": 0xC0_0000, "huge": 0x100_0000, "gmem": 0x200_0000}


# What runs experiments is tried by tests/experiments/test_wrong_arguments.py: a call takes seconds.
NAMES = [name for name in pgemu.__all__ if name != "__version__" and name not in pgemu.GROUPS["experiments"]]
NAMES += ["Comparison"]


class Call(NamedTuple):
    """One public call: the class whose it is ("" of a function), its name, the function, its parameters."""

    owner: str
    name: str
    function: Any
    parameters: tuple[inspect.Parameter, ...]

    def __repr__(self) -> str:
        return f"{self.owner}.{self.name}" if self.owner else self.name


def _classes() -> dict[str, list[type]]:
    """Every class of the package by name; a few share one."""
    found: dict[str, list[type]] = {}
    for info in pkgutil.walk_packages(pgemu.__path__, "pgemu."):
        if not info.name.endswith("__main__"):
            for one in vars(importlib.import_module(info.name)).values():
                if inspect.isclass(one) and one.__module__ == info.name:
                    found.setdefault(one.__name__, []).append(one)
    return found


def public_classes() -> list[type]:
    """Those that pgemu names, and those that annotations of what they return name, and so on."""
    known = _classes()
    todo = [getattr(pgemu, name) for name in NAMES]
    found: list[type] = []
    while todo:
        one = todo.pop()
        if inspect.isclass(one):
            if one in found:
                continue
            found.append(one)
        for function in _functions(one):
            for name in re.findall(r"\w+", str(getattr(function, "__annotations__", {}).get("return", ""))):
                todo += known.get(name, [])
    return sorted(found, key=lambda one: (one.__name__, one.__module__))


def _functions(one: Any) -> Iterator[Any]:
    if not inspect.isclass(one):
        yield one
        return
    for name in _public(one):
        member = inspect.getattr_static(one, name)
        yield from (getattr(member, part) for part in ("__func__", "fget", "func") if hasattr(member, part))
        if isinstance(member, FunctionType):
            yield member


def _public(one: type) -> list[str]:
    """Names of what a class, or one of this package that it is made of, says itself."""
    own = {name for base in one.__mro__ if base.__module__.startswith("pgemu") for name in vars(base)}
    return sorted(name for name in own if not name.startswith("_") or name == "__getitem__")


def properties(one: type) -> list[str]:
    """What is read without a call."""
    kinds = (property, cached_property)
    return [name for name in _public(one) if isinstance(inspect.getattr_static(one, name), kinds)]


def public_calls() -> list[Call]:
    """Functions, constructors, methods and setters, in order of their names."""
    found = []
    for name in NAMES:
        one = getattr(pgemu, name)
        if inspect.isfunction(one):
            found.append(_call("", name, one))
    for kind in public_classes():
        if not issubclass(kind, tuple | int | list):  # those of numbers, tuples and lists are Python's
            found.append(_call(kind.__name__, "__init__", vars(kind).get("__init__", kind.__init__)))  # type: ignore[misc]
        for name in _public(kind):
            member = inspect.getattr_static(kind, name)
            if isinstance(member, property) and member.fset:
                found.append(_call(kind.__name__, f"{name}=", member.fset))
            function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
            if isinstance(function, FunctionType):
                found.append(_call(kind.__name__, name, function))
    return found


def _call(owner: str, name: str, function: Any) -> Call:
    parameters = tuple(inspect.signature(function).parameters.values())
    return Call(owner, name, function, parameters[1:] if owner else parameters)


# --------------------------------------------------------------------------- a machine with one of everything


class World:
    """A machine in use, another one, and instances of every public class by name, those that have ended last."""

    def __init__(self, design: Any, folder: Path) -> None:
        self.machine = Machine(
            Config(design, pool=8 * M2, page_size=M2, buddy=4 * M2, frames=4000, allow_unsafe_mappings=True)
        )
        self.folder = folder
        self.of: dict[str, list[Any]] = {}
        self._inhabit(self.machine)
        self._values()

    def _inhabit(self, machine: Machine) -> None:
        gmem, closed = machine.create_guest_memfd(2 * M2, shared=True), machine.create_guest_memfd(M2)
        small, huge, device = machine.create_guest_memfd_4k(M2), machine.create_hugetlb_file(M2), self.device(machine)
        process, ended = machine.create_process(), machine.create_process()
        done = [process.mmap_anonymous(VA["anonymous"], M2), process.mmap(small, VA["small"], length=M2)]
        done += [process.mmap_device(device, VA["device"]), process.mmap_hugetlb(VA["huge"], file=huge)]
        done += [process.mmap(gmem, VA["gmem"])]
        vm, gone = machine.create_vm(process, protected=True), machine.create_vm()
        done += [vm.bind(gmem, 0), vm.set_memory_region(5, 1 << 30, M2, VA["anonymous"])]
        done += [
            ended.exit(),
            gone.close(),
            closed.close(),
            process.pin(VA["gmem"], PAGE, pin=0) if self.pins() else done[0],
        ]
        assert {result.status for result in done} == {0}, done
        for place in VA.values():
            process.touch(place, write=True)
        vm.touch(0)
        vm.touch(1 << 30, write=True)
        mapped, unmapped = vm.map_page(0), vm.map_page(PAGE, write=False)
        cache, deactivated = vm.pfn_cache(8, 8), vm.pfn_cache(PAGE, 8)
        assert unmapped.unmap().status == deactivated.deactivate().status == 0
        table, destroyed = machine.create_page_table("x86-64"), machine.create_page_table("ept")
        table.map_range(0, 0, 2 * M2)
        destroyed.destroy()
        container, closed_container = machine.create_vfio_container(), machine.create_vfio_container("amd", version=1)
        closed_container.close()
        iommufd = machine.create_iommufd()
        ioas, destroyed_ioas = iommufd.create_ioas(), iommufd.create_ioas("amd")
        destroyed_ioas.destroy()
        one_device, detached = container.attach(), ioas.attach()
        ioas.map(None, PAGE, process, VA["anonymous"])
        container.map(PAGE, PAGE, process, VA["anonymous"])
        detached.detach()
        shut, tlb = machine.create_device(0x9000, 4), Tlb()
        shut.close()
        closed_segment = Machine(Config("pfnmap", pool=M2, page_size=M2)).share(SEGMENT, replace=True, reserve=False)
        closed_segment.close()
        segment = Machine(Config("pfnmap", pool=M2, page_size=M2)).share(SEGMENT, replace=True, reserve=False)
        NAMED["segment"] = (segment._segment,)
        self.of |= {
            "Machine": [machine], "GuestMemfd": [gmem, closed], "GuestMemfd4K": [small], "HugetlbFile": [huge],
            "ShmemFile": [machine.create_memfd(M2)],
            "Device": [device, shut], "AddressSpace": [process, ended], "Vm": [vm, gone],
            "MappedPage": [mapped, unmapped], "PfnCache": [cache, deactivated],
            "PageTable": [table, destroyed],
            "HugetlbPool": [machine.hugetlb(), machine.hugetlb(W.PAGE_1G)], "Folio": [machine.folio(gmem.pfn(0) or 0)],
            "VfioContainer": [container, closed_container], "Iommufd": [iommufd], "Ioas": [ioas, destroyed_ioas],
            "Revocations": [ioas.revocations],
            "IoDevice": [one_device, detached], "ContainerInfo": [container.info()], "Range": container.ranges()[:1],
            "IoSpace": [container], "SharedMachine": [segment, closed_segment],
            "Tlb": [tlb], "TlbCounts": [tlb.counts],
            "TlbLookups": [tlb.translate(table, [0])], "Versions": [Versions()],
            "PhysicalMemory": [machine.memory], "Statistics": [machine.statistics], "Config": [machine.config],
        }  # fmt: skip

    def pins(self) -> bool:
        return self.machine.config.design == "restructure"

    @staticmethod
    def device(machine: Machine) -> Any:
        return machine.create_device(0x1000, 512)

    def _values(self) -> None:
        """What is of no machine, or was only told by one."""
        machine, folder = self.machine, self.folder
        process, vm, table, gmem = (self.of[name][0] for name in ("AddressSpace", "Vm", "PageTable", "GuestMemfd"))
        path = folder / "world.elf"  # no call writes it
        if not path.exists():
            machine.write_image(path)
        shut = pgemu.open_image(path)
        shut.close()
        folio, trace = self.of["Folio"][0], pgemu.load("workload:tdx-boot") if not TRACE else TRACE[0]
        TRACE[:] = [trace]
        one = [table.map_many(np.array([1 << 30], np.uint64), np.array([0], np.uint64)), table.map(1 << 31, 0)]
        run, nested = machine.run_columns(Operation.WORK, count=2), vm.translate_virtual(0, [0], Kind.READ)
        self.of |= {
            "Image": [pgemu.open_image(path), shut], "Records": [Records.build(3, op=Operation.WORK)],
            "Lowered": [trace],
            "LoweringOptions": [LoweringOptions()], "Access": [Access()], "Results": [run], "Result": [machine.work()],
            "EditResults": one[:1], "EditResult": one[1:], "Flush": [table.unmap(1 << 31).flush], "Kind": [Kind.READ],
            "Translation": [process.translate([VA["gmem"]])], "NestedTranslation": [nested], "Stage2": [vm.stage2()],
            "References": [table.translate([0], references=True).references], "MemoryPolicy": [gmem.mempolicy(0)],
            "Page": [folio.page()], "VmemmapPage": folio.vmemmap[:1], "Node": [machine.config.node(0)],
            "Worst": [machine.statistics.worst(Operation.WORK)], "TablePages": [process.table_pages],
            "Stat": [gmem.stat()], "NodePool": [machine.hugetlb().node(0)], "LargePage": [vm.lpage_info(0, 2)],
            "Root": machine.roots()[:1],
        }  # fmt: skip


TRACE: list[Any] = []  # made once
SEGMENT = f"pgemu-world-{os.getpid()}"  # of shared memory

# Good values by name of a parameter, where those of its type do not do.
NAMED: dict[str, tuple[Any, ...]] = {
    "gpa": (0, PAGE, 1 << 30),
    "iova": (PAGE, 1 << 30, 1 << 30 | PAGE),
    "iovas": (np.array([PAGE, 1 << 30], np.uint64), [0]),
    "Tlb.processor": ("skylake-sp",),
    "Tlb.vcpus": (1, 2),
    "Tlb.flags": ([0],),
    "Tlb.actors": ([0],),
    "Tlb.space": (0, 1),
    "Versions.like": ("rfc2",),
    "Versions.pfnmap": ("slides2025",),
    "Versions.design": ("pfnmap", "restructure"),
    "TlbCounts.size": ("4K", "1G"),
    "order": (None, "slides"),
    "vaddr": (VA["anonymous"], VA["huge"]),
    "vaddrs": ([VA["anonymous"]],),
    "unit": ("vtd", "amd"),
    "version": (1, 2),
    "policy": ("linux", "tracked"),
    "guest_memfd": ("refused", "revoke"),
    "parameters": ({},),
    "memlock": (None, PAGE),
    "address": (*VA.values(), 0, PAGE),
    "gpas": ([0, PAGE], [1 << 30]),
    "addresses": (np.array([VA["gmem"]], np.uint64), [0], np.zeros(0, np.uint64)),
    "length": (PAGE, M2, 0),
    "size": (M2, 2 * M2),
    "page_size": (M2, W.PAGE_1G),
    "physical": (0, M2),
    "Integers physical": ([0], [M2]),
    "level": (1, 2),
    "number": (0, 1),
    "PfnCache.length": (8, 0),
    "count": (1, 2),
    "prot": (0, 1, 3),
    "new_length": (PAGE, 2 * M2),
    "PageFormat | str fmt": ("x86-64", page_format.ept()),
    "mode": ("default", "bind", 1),
    "int mode": (1, 3),
    "nodes": ((), (0,)),
    "kinds": (Kind.READ, None, [1], np.array([0])),
    "log": (None, np.zeros((4, 3), np.uint64)),
    "owner": (None,),
    "out": (None,),
    "form": ("main", "next", "rfc2"),
    "kind": ("plain", "sw", None),
    "memory_type": ("uncached",),
    "partial": (None, "whole"),
    "tables": (None, "zap"),
    "format": ("elf", "raw", None),
    "path": (Path("m.elf"), "m.elf"),
    "str name": (SEGMENT,),
    "name_or_path": ("workload:tdx-boot", "m.elf"),
    "layout": (struct_page.page_layout("7.3"),),
    "fraction": (0.5, 1),
    "piece": (slice(0, 2), slice(None)),
    "Records.order": ([0, 1], [2]),
    "pieces": ((), (Records.build(1),)),
    "header": (int(Operation.WORK), [1, 2]),
    "memslots": ((),),
    "vm_processes": ((),),
    "pfn": (1 << 20, 1 << 18),
    "pfns": ([1 << 20],),
    "HugetlbPool.order": (9, 18),
    "Folio.order": (9, None),
    "offset": (0, PAGE),
    "offsets": ([0], [PAGE, 0]),
    "pins": ([3],),
    "words": (np.zeros(W.STATS_SIZE, np.int64),),
    "parts": ([],),
    "roots": ([],),
    "data": (b"x", memoryview(b"")),
}
TYPED: dict[str, tuple[Any, ...]] = {
    "int": (0, 1, PAGE),
    "bool": (False, True),
    "str": ("abc",),
    "bytes": (b"abc",),
    "float": (0.5,),
    "Operation": (Operation.WORK, Operation.CONVERT),
    "W.Operation": (Operation.WORK, Operation.GUEST_FAULT),
    "Event": (W.Event.SYSCALL,),
    "Gauge": (W.Gauge.POOL_FREE,),
    "Property": (Property.SPECIAL_ENTRIES, Property.GUP),
    "Iterable[str]": ((), ("rollback-at-zero",)),
    "Mapping[str, Any]": ({"zero": "page"},),
    "Integers": ([0], np.array([PAGE], np.uint64)),
    "None": (None,),
    "PageFormat": (page_format.x86_64(), page_format.npt()),
    "Access": (Access(),),
    "Config": (Config(),),
    "Any": (0, [0]),
    "LoweringOptions": (LoweringOptions(),),
    **{f"npt.NDArray[np.{dtype}]": (np.zeros(2, dtype),) for dtype in ("uint8", "uint16", "uint32", "uint64")},
    "Sequence[int]": ([PAGE],),
    "np.uint64": (np.uint64(1),),
}


def alternatives(annotation: str) -> list[str]:
    """What an annotation allows, by its parts."""
    node = ast.parse(annotation, mode="eval").body
    parts: list[ast.expr] = [node]
    while any(isinstance(part, ast.BinOp) for part in parts):
        parts = [
            side for part in parts for side in ((part.left, part.right) if isinstance(part, ast.BinOp) else (part,))
        ]
    return [ast.unparse(part) for part in parts]


def good_values(call: Call, parameter: inspect.Parameter, world: World) -> list[Any]:
    """Values that a parameter may have, and its default."""
    found = [] if parameter.default is parameter.empty else [parameter.default]
    kinds = alternatives(str(parameter.annotation))
    for kind in kinds:
        found += world.of.get({"Core": "Machine", "Memory": "Machine", "Columns": "Records"}.get(kind, kind), [])[:1]
    if not found or parameter.default is not parameter.empty:
        names = [f"{call.owner}.{parameter.name}", f"{parameter.annotation} {parameter.name}", parameter.name]
        named = [NAMED[name] for name in names[: 1 if kinds[0] in TYPED and "npt." in kinds[0] else 3] if name in NAMED]
        found += named[0] if named else [value for kind in kinds for value in TYPED.get(kind, ())]
    return found
