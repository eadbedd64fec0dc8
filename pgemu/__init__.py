"""pgemu: two designs of guest_memfd with HugeTLB, run on the same trace and on the data structures Linux keeps.

>>> import pgemu
>>> from pgemu.experiments.compare import compare
>>> comparison = compare(pgemu.load("workload:tdx-boot"), designs=["pfnmap"])
>>> comparison.runs[0].count
10136

Names are imported at first use, so that `import pgemu` loads no compiler.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pgemu.capi import get_include
    from pgemu.errors import InputError
    from pgemu.experiments.compare import Comparison
    from pgemu.images.folio import Folio
    from pgemu.images.image import Image, open_image
    from pgemu.machine.config import Config
    from pgemu.machine.results import Errno, Result, Results, RetPf, VmFault
    from pgemu.machine.statistics import Statistics
    from pgemu.objects.address_space import AddressSpace
    from pgemu.objects.guest_memfd import GuestMemfd
    from pgemu.objects.machine import Machine
    from pgemu.objects.vm import Vm
    from pgemu.tables.flush import Flush
    from pgemu.tables.page_table import EditResult, EditResults, PageTable
    from pgemu.tables.translation import Access, Kind, Translation, translate, translate_nested
    from pgemu.trace import Lowered, LoweringOptions, Records, load

    __version__: str

__all__ = (
    "Access",
    "AddressSpace",
    "Comparison",
    "Config",
    "EditResult",
    "EditResults",
    "Errno",
    "Flush",
    "Folio",
    "GuestMemfd",
    "Image",
    "InputError",
    "Kind",
    "Lowered",
    "LoweringOptions",
    "Machine",
    "PageTable",
    "Records",
    "Result",
    "Results",
    "RetPf",
    "Statistics",
    "Translation",
    "Vm",
    "VmFault",
    "__version__",
    "get_include",
    "load",
    "open_image",
    "translate",
    "translate_nested",
)

_HOMES = {
    "Access": "tables.translation",
    "AddressSpace": "objects.address_space",
    "Comparison": "experiments.compare",
    "Config": "machine.config",
    "EditResult": "tables.page_table",
    "EditResults": "tables.page_table",
    "Errno": "machine.results",
    "Flush": "tables.flush",
    "Folio": "images.folio",
    "GuestMemfd": "objects.guest_memfd",
    "Image": "images.image",
    "InputError": "errors",
    "Kind": "tables.translation",
    "Lowered": "trace",
    "LoweringOptions": "trace",
    "Machine": "objects.machine",
    "PageTable": "tables.page_table",
    "Records": "trace",
    "Result": "machine.results",
    "Results": "machine.results",
    "RetPf": "machine.results",
    "Statistics": "machine.statistics",
    "Translation": "tables.translation",
    "Vm": "objects.vm",
    "VmFault": "machine.results",
    "get_include": "capi",
    "load": "trace",
    "open_image": "images.image",
    "translate": "tables.translation",
    "translate_nested": "tables.translation",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from pgemu.version import version

        return version()
    if name in _HOMES:
        value = getattr(import_module(f"pgemu.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'pgemu' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
