"""pgemu: two designs of guest_memfd with HugeTLB, run on the same trace and on the data structures Linux keeps.

>>> import pgemu
>>> comparison = pgemu.compare(pgemu.load("workload:tdx-boot"), designs=["pfnmap"])
>>> comparison.runs[0].count
10136

The public API are these names, the public methods and attributes of what they are and of what they return, and the
commands of `pgemu`. It follows semantic versioning (https://semver.org): before 1.0 a minor version may change or
remove a name, and CHANGELOG.md says so under "Breaking"; a patch version only adds and mends. Other modules may change
at any time. Examples of methods go on from the example of their class.

machine: a machine of one design, what it has, what its operations return and count
    Config, Versions, Machine, SharedMachine, GuestMemfd, GuestMemfd4K, HugetlbFile, ShmemFile, Device, HugetlbPool,
    AddressSpace, Vm, VfioContainer, Iommufd, Ioas, IoDevice, Operation, Flag, Result, Results, Errno, RetPf, VmFault,
    Statistics, Event, Gauge, Property, add_design, get_include, InputError

tables: page tables of any format, translations, TLBs in front of them
    PageTable, EditResult, EditResults, Flush, Walk, translate, translate_nested, Access, Kind, Translation,
    NestedTranslation, References, WalkStatus, WalkStage, Tlb, TlbCounts, TlbFound, TlbLookups

images: memory images of machines and of real kernels, folios decoded
    open_image, Image, Folio

traces: logs, stored traces and workloads, all as records of one schema
    load, Lowered, LoweringOptions, Records

experiments: what is done with several machines
    compare, Comparison, audit, smallest_pfnmap, verify, run_accesses, GuestOptions

`python -m pgemu.examples` lists programs to start from. Names are imported at first use, so that `import pgemu` loads
no compiler.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pgemu.capi import get_include as get_include
    from pgemu.errors import InputError as InputError
    from pgemu.experiments.audit import audit as audit
    from pgemu.experiments.compare import Comparison as Comparison, compare as compare
    from pgemu.experiments.scenarios import smallest_pfnmap as smallest_pfnmap
    from pgemu.experiments.verification.run import verify as verify
    from pgemu.guest.options import GuestOptions as GuestOptions
    from pgemu.guest.run import run_accesses as run_accesses
    from pgemu.guest.tlb import Tlb as Tlb, TlbCounts as TlbCounts, TlbFound as TlbFound, TlbLookups as TlbLookups
    from pgemu.images.folio import Folio as Folio
    from pgemu.images.image import Image as Image, open_image as open_image
    from pgemu.machine.config import Config as Config
    from pgemu.machine.event_meanings import Event as Event, Gauge as Gauge
    from pgemu.machine.own_designs import add_design as add_design
    from pgemu.machine.presets import Versions as Versions
    from pgemu.machine.results import (
        Errno as Errno,
        Result as Result,
        Results as Results,
        RetPf as RetPf,
        VmFault as VmFault,
    )
    from pgemu.machine.statistics import Statistics as Statistics
    from pgemu.objects.address_space import AddressSpace as AddressSpace
    from pgemu.objects.devices import (
        Ioas as Ioas,
        Iommufd as Iommufd,
        VfioContainer as VfioContainer,
    )
    from pgemu.objects.files import (
        Device as Device,
        GuestMemfd4K as GuestMemfd4K,
        HugetlbFile as HugetlbFile,
        ShmemFile as ShmemFile,
    )
    from pgemu.objects.guest_memfd import GuestMemfd as GuestMemfd
    from pgemu.objects.hugetlb import HugetlbPool as HugetlbPool
    from pgemu.objects.io_space import IoDevice as IoDevice
    from pgemu.objects.machine import Machine as Machine
    from pgemu.objects.shared import SharedMachine as SharedMachine
    from pgemu.objects.vm import Vm as Vm
    from pgemu.tables.access import Access as Access, Kind as Kind
    from pgemu.tables.flush import Flush as Flush
    from pgemu.tables.page_table import EditResult as EditResult, EditResults as EditResults, PageTable as PageTable
    from pgemu.tables.translation import (
        NestedTranslation as NestedTranslation,
        References as References,
        Translation as Translation,
        translate as translate,
        translate_nested as translate_nested,
    )
    from pgemu.tables.walked import Walk as Walk
    from pgemu.trace import load as load
    from pgemu.trace.lowered import Lowered as Lowered, LoweringOptions as LoweringOptions
    from pgemu.trace.schema import Records as Records
    from pgemu_kernels.words.operations import Flag as Flag, Operation as Operation
    from pgemu_kernels.words.properties import Property as Property
    from pgemu_kernels.words.table_words import WalkStage as WalkStage, WalkStatus as WalkStatus

    __version__: str

_PLACES = {
    "machine": {
        "pgemu.machine.config": ("Config",),
        "pgemu.machine.presets": ("Versions",),
        "pgemu.objects.machine": ("Machine",),
        "pgemu.objects.shared": ("SharedMachine",),
        "pgemu.objects.guest_memfd": ("GuestMemfd",),
        "pgemu.objects.files": ("GuestMemfd4K", "HugetlbFile", "ShmemFile", "Device"),
        "pgemu.objects.hugetlb": ("HugetlbPool",),
        "pgemu.objects.address_space": ("AddressSpace",),
        "pgemu.objects.vm": ("Vm",),
        "pgemu.objects.devices": ("VfioContainer", "Iommufd", "Ioas"),
        "pgemu.objects.io_space": ("IoDevice",),
        "pgemu_kernels.words.operations": ("Operation", "Flag"),
        "pgemu.machine.results": ("Result", "Results", "Errno", "RetPf", "VmFault"),
        "pgemu.machine.statistics": ("Statistics",),
        "pgemu.machine.event_meanings": ("Event", "Gauge"),
        "pgemu_kernels.words.properties": ("Property",),
        "pgemu.machine.own_designs": ("add_design",),
        "pgemu.capi": ("get_include",),
        "pgemu.errors": ("InputError",),
    },
    "tables": {
        "pgemu.tables.page_table": ("PageTable",),
        "pgemu.tables.edits": ("EditResult", "EditResults"),
        "pgemu.tables.flush": ("Flush",),
        "pgemu.tables.walked": ("Walk",),
        "pgemu.tables.translation": ("translate", "translate_nested", "Translation", "NestedTranslation", "References"),
        "pgemu.tables.access": ("Access", "Kind"),
        "pgemu_kernels.words.table_words": ("WalkStatus", "WalkStage"),
        "pgemu.guest.tlb": ("Tlb", "TlbCounts", "TlbFound", "TlbLookups"),
    },
    "images": {
        "pgemu.images.image": ("open_image", "Image"),
        "pgemu.images.folio": ("Folio",),
    },
    "traces": {
        "pgemu.trace": ("load",),
        "pgemu.trace.lowered": ("Lowered", "LoweringOptions"),
        "pgemu.trace.schema": ("Records",),
    },
    "experiments": {
        "pgemu.experiments.compare": ("compare", "Comparison"),
        "pgemu.experiments.audit": ("audit",),
        "pgemu.experiments.scenarios": ("smallest_pfnmap",),
        "pgemu.experiments.verification.run": ("verify",),
        "pgemu.guest.run": ("run_accesses",),
        "pgemu.guest.options": ("GuestOptions",),
    },
}
"""Where the public names of each group are at home."""

GROUPS = {group: tuple(name for names in homes.values() for name in names) for group, homes in _PLACES.items()}
"""The public names of each group."""

_HOMES = {name: home for homes in _PLACES.values() for home, names in homes.items() for name in names}

__all__ = (
    "Access",
    "AddressSpace",
    "Comparison",
    "Config",
    "Device",
    "EditResult",
    "EditResults",
    "Errno",
    "Event",
    "Flag",
    "Flush",
    "Folio",
    "Gauge",
    "GuestMemfd",
    "GuestMemfd4K",
    "GuestOptions",
    "HugetlbFile",
    "HugetlbPool",
    "Image",
    "InputError",
    "IoDevice",
    "Ioas",
    "Iommufd",
    "Kind",
    "Lowered",
    "LoweringOptions",
    "Machine",
    "NestedTranslation",
    "Operation",
    "PageTable",
    "Property",
    "Records",
    "References",
    "Result",
    "Results",
    "RetPf",
    "SharedMachine",
    "ShmemFile",
    "Statistics",
    "Tlb",
    "TlbCounts",
    "TlbFound",
    "TlbLookups",
    "Translation",
    "Versions",
    "VfioContainer",
    "Vm",
    "VmFault",
    "Walk",
    "WalkStage",
    "WalkStatus",
    "__version__",
    "add_design",
    "audit",
    "compare",
    "get_include",
    "load",
    "open_image",
    "run_accesses",
    "smallest_pfnmap",
    "translate",
    "translate_nested",
    "verify",
)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from pgemu.version import version

        return version()
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'pgemu' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
