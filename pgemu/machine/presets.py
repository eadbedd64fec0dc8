"""Versions of both designs that belong together: fields of Config under one name each.

>>> Versions("rfc2").configuration("restructure", pool=2 << 30).order
'rfc2'
>>> Versions("rfc2").configuration("pfnmap", pool=2 << 30).punch
'zero'

Config("restructure") alone is no version that anybody posted. It is dec2025 on the newest kernel and mended, and a
version shows in what it differs from that:

>>> Versions("dec2025").configuration("restructure")
Config('restructure', kernel='6.18', defects=('uptodate-unzeroed',))
>>> Versions("next").configuration("pfnmap")
Config('pfnmap', page_size=4 << 10, punch='zero')
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from pgemu.machine.arguments import guards_methods
from pgemu.machine.config import Config
from pgemu.machine.designs import ROWS
from pgemu.machine.field_rules import checked, shown
from pgemu_kernels import words as W

__all__ = ("LIKE", "MAINLINE", "PFNMAP", "Pfnmap", "Version", "Versions")

Form = Literal["main", "next", "rfc2", "wip"]
_SIZES = {W.PAGE_4K: "4K", W.PAGE_2M: "2M", W.PAGE_1G: "1G"}


class Version(NamedTuple):
    """A version of restructure: what was posted together.

    Attributes:
        text: in a few words
        source: where it can be read
        form: whose checks a guest_memfd passes when it is created (Machine.create_guest_memfd)
        fields: fields of Config that restructure has
        common: those that pfnmap has as well, for both are of one kernel: the rest of guest_memfd is that version's
        fixed: defects of its code with a known fix, which are off unless they are asked for
        page_sizes: those that it knows
        shared_huge: whether memory of huge pages may be shared at first
    """

    text: str
    source: str
    form: Form
    fields: Mapping[str, Any]
    common: Mapping[str, Any]
    fixed: tuple[str, ...] = ()
    page_sizes: tuple[int, ...] = (W.PAGE_1G, W.PAGE_2M, W.PAGE_4K)
    shared_huge: bool = True


class Pfnmap(NamedTuple):
    """A version of pfnmap: its text and source, and the defects that it has."""

    text: str
    source: str
    defects: tuple[str, ...] = ()


_DEC2025: dict[str, Any] = {
    "order": "fixup",
    "batch": "block",
    "split_form": "jan2026",
    "defects": ("uptodate-unzeroed",),
}

LIKE: Mapping[str, Version] = MappingProxyType(
    {
        "rfc2": Version(
            "RFC v2 of May 2025",
            "lore cover.1747264138.git.ackerleytng@google.com",
            "rfc2",
            {
                "order": "rfc2",
                "batch": "range",
                "split_form": "rfc2",
                "zero": "folio",
                "defects": ("convert-keeps-leaves", "hole-zeroes-from-start", "merge-keeps-flag"),
            },
            {"punch": "zero", "kernel": "6.18"},
            ("allocation-race", "rollback-at-zero"),
        ),
        "dec2025": Version(
            "branch of Dec 2025",
            "linux-cc wip-gmem-conversions-hugetlb-restructuring-12-08-25",
            "wip",
            _DEC2025,
            {"punch": "refuse", "kernel": "6.18"},
            ("allocation-race", "mapping-order"),
            shared_huge=False,
        ),
        "jan2026": Version(
            "the plan of January 2026, without code: dec2025 but for its order",
            "lore CAEvNRgGG+xYhsz62 (reply in the TDX huge page v3 thread)",
            "wip",
            {**_DEC2025, "order": "jan2026"},
            {"punch": "refuse", "kernel": "6.18"},
            ("allocation-race", "mapping-order"),
            shared_huge=False,
        ),
        "next": Version(
            "in-place conversion of 4K folios, v13, linux-next of September 2026",
            "kvm-x86 799c9fadc639 and its series",
            "next",
            {"order": "next4k", "batch": "range", "split_form": "jan2026"},
            {"punch": "zero", "kernel": "7.3"},
            page_sizes=(W.PAGE_4K,),
        ),
    }
)
"""Versions of restructure by name. The kernels are inference: the bases of the branches lie between releases."""

PFNMAP: Mapping[str, Pfnmap] = MappingProxyType(
    {
        "corrected": Pfnmap("slides, mended", "inference"),
        "slides2025": Pfnmap(
            "as captured",
            "slides of 2025-08-07; captures of Linux 7.3 with the change",
            ("insert-unlocked", "punch-keeps-entries"),
        ),
    }
)
"""Versions of pfnmap by name."""


MAINLINE = ("cut-huge-pfn",)
"""Defects of every kernel that the versions are of, 6.12 to 7.3, which are off unless they are asked for."""


@partial(guards_methods, but=("__init__",))
@dataclass(frozen=True)
class Versions:
    """Which version of each design: `like` of LIKE, `pfnmap` of PFNMAP.

    as_posted: with the defects, too, that have a known fix. ValueError for a name that is none, TypeError for what is
    no name.

    >>> Versions("rfc2")
    Versions(like='rfc2', pfnmap='corrected', as_posted=False)
    """

    like: str = "dec2025"
    pfnmap: str = "corrected"
    as_posted: bool = False

    def __post_init__(self) -> None:
        for name, known in (("like", LIKE), ("pfnmap", PFNMAP)):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise TypeError(f"{name} {shown(value)} ({type(value).__name__}): expected one of {', '.join(known)}")
            if value not in known:
                raise ValueError(f"{name} {shown(value)}: expected one of {', '.join(known)}")
        if not isinstance(self.as_posted, bool):
            found = f"{shown(self.as_posted)} ({type(self.as_posted).__name__})"
            raise TypeError(f"as_posted {found}: expected True or False")

    def fields(self, design: str) -> dict[str, Any]:
        """Return the fields of Config that these versions give a design.

        >>> Versions("rfc2").fields("pfnmap")
        {'punch': 'zero', 'kernel': '6.18', 'defects': ()}
        """
        version = LIKE[self.like]
        if design == "pfnmap":
            own = PFNMAP[self.pfnmap].defects
            return {**version.common, "defects": (*own, *(MAINLINE if self.as_posted else ()))}
        if design not in ROWS or ROWS[design].order is not None:  # what such a design does is in its row
            return dict(version.common)
        fields = {"defects": (), **version.common, **version.fields}
        return {**fields, "defects": (*fields["defects"], *((*version.fixed, *MAINLINE) if self.as_posted else ()))}

    def configuration(self, design: str, defects: Iterable[str] = (), **given: Any) -> Config:
        """Return a design's configuration; what is given by hand and is not None wins.

        defects: further ones. An explicit `zero` takes the place of the defect uptodate-unzeroed. Without a `page_size`
        it is Config's, or the only one that the version knows.
        ValueError for what Config refuses, and for pages of a size that the version does not know.

        >>> Versions("next").configuration("pfnmap")
        Config('pfnmap', page_size=4 << 10, punch='zero')
        """
        given = {name: value for name, value in given.items() if value is not None}
        fields = self.fields(design)
        sizes = LIKE[self.like].page_sizes
        default = Config.page_size if Config.page_size in sizes else sizes[0]
        page_size = given["page_size"] = checked("page_size", given.get("page_size", default))
        if page_size not in sizes:
            known = " or ".join(_SIZES[size] for size in sizes)
            raise ValueError(f"pages of {_SIZES[page_size]}: {self.like} knows pages of {known} only")
        own = {name for name in fields.pop("defects", ()) if name != "uptodate-unzeroed" or "zero" not in given}
        fields |= {"defects": tuple(sorted(own | set(defects)))}
        return Config(design, **{**fields, **given})

    def mixed(self, design: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return those fields given by hand that differ from these versions', and their values.

        >>> Versions("rfc2").mixed("restructure", {"order": "fixup", "batch": "range"})
        {'order': 'fixup'}
        """
        own = self.fields(design)
        found = {name: value for name, value in given.items() if name in own and name != "defects"}
        return {name: value for name, value in found.items() if value is not None and value != own[name]}
