"""pgemu: two designs of guest_memfd with HugeTLB, run on the same trace and on the data structures Linux keeps.

>>> import pgemu
>>> from pgemu.compare import compare
>>> comparison = compare(pgemu.load("workload:tdx-boot"), designs=["pfnmap"])
>>> comparison.runs[0].count
10136

Names are imported at first use, so that `import pgemu` loads no compiler.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pgemu.address_space import AddressSpace
    from pgemu.compare import Comparison
    from pgemu.config import Config
    from pgemu.errors import InputError
    from pgemu.folio import Folio
    from pgemu.guest_memfd import GuestMemfd
    from pgemu.image import Image, open_image
    from pgemu.machine import Machine, Result, Results
    from pgemu.page_table import EditResult, EditResults, Flush, PageTable
    from pgemu.statistics import Statistics
    from pgemu.trace import Lowered, LoweringOptions, Records, load
    from pgemu.translation import Access, Kind, Translation, translate, translate_nested
    from pgemu.vm import Vm

    __version__: str

__all__ = (
    "Access",
    "AddressSpace",
    "Comparison",
    "Config",
    "EditResult",
    "EditResults",
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
    "Statistics",
    "Translation",
    "Vm",
    "__version__",
    "load",
    "open_image",
    "translate",
    "translate_nested",
)

_HOMES = {
    "Access": "translation",
    "AddressSpace": "address_space",
    "Comparison": "compare",
    "Config": "config",
    "EditResult": "page_table",
    "EditResults": "page_table",
    "Flush": "page_table",
    "Folio": "folio",
    "GuestMemfd": "guest_memfd",
    "Image": "image",
    "InputError": "errors",
    "Kind": "translation",
    "Lowered": "trace",
    "LoweringOptions": "trace",
    "Machine": "machine",
    "PageTable": "page_table",
    "Records": "trace",
    "Result": "machine",
    "Results": "machine",
    "Statistics": "statistics",
    "Translation": "translation",
    "Vm": "vm",
    "load": "trace",
    "open_image": "image",
    "translate": "translation",
    "translate_nested": "translation",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("pgemu")
        except PackageNotFoundError:  # run from the sources, not installed
            return "unknown"
    if name in _HOMES:
        value = getattr(import_module(f"pgemu.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'pgemu' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
