"""What each mistake of posted code does, which version has it, and where that can be read.

Their names are those of words.Defect; what removes each is shown in tests/kernels/gmem/test_defects.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from pgemu.machine.presets import LIKE, MAINLINE, PFNMAP

__all__ = ("TEXTS", "Text", "versions_of")


class Text(NamedTuple):
    """One defect.

    Attributes:
        does: what the code does, in a line
        source: where that can be read: a function, and of which code
        reported: of which code it is where no version of presets.py has it, else ""
    """

    does: str
    source: str
    reported: str = ""


TEXTS: Mapping[str, Text] = MappingProxyType(
    {
        "allocation-race": Text(
            "two first faults in one huge page both take a page of the subpool, and the loser gets -ENOMEM",
            "RFC v2, cover letter; fixed in 2026 by a mutex for each huge page",
        ),
        "convert-keeps-leaves": Text(
            "a conversion to private keeps guest leaves where no process maps the page: only the notifier drops them",
            "RFC v2: unmap_mapping_pages() without a zap of stage 2",
        ),
        "cut-huge-pfn": Text(
            "cutting a VMA inside a 1G PFN entry, off 2M, takes the entry for a table: a crash, or a hang on RAM",
            "mainline, mm/huge_memory.c:split_huge_pmd_address() and mm_find_pmd(); captured on 6.12, 6.18 and 7.3",
        ),
        "hole-zeroes-from-start": Text(
            "a hole in a part of a huge folio zeroes from the folio's first page on, also what is in use",
            "RFC v2: kvm_gmem_zero_range(), folio_zero_segment() from 0",
        ),
        "huge-over-private": Text(
            "a fault on shared memory takes the level of the host's page, and its leaf covers private pages beside it",
            "report of V. Annapurve, June 2022",
            "the private-memory series of 2022",
        ),
        "insert-unlocked": Text(
            "a host fault inserts its entry after the invalidate_lock was dropped: a conversion in between is missed",
            "slides of 2025-08-07: vmf_insert_pfn() as the change was built and captured on Linux 7.3",
        ),
        "mapping-order": Text(
            "the level of a guest fault looks at the pages behind the faulting one, not at its own huge page",
            "branch of Dec 2025, helper for the mapping's order: index not rounded down",
        ),
        "merge-keeps-flag": Text(
            "a merged folio is up to date or not as its first page was: others are zeroed again, or never",
            "RFC v2: prep_compound_page() keeps the first page's PG_uptodate",
        ),
        "punch-keeps-entries": Text(
            "a hole leaves the host's special entries, which show the page to whoever gets it next",
            "slides of 2025-08-07, captured on Linux 7.3: mm/truncate.c finds no mapped folio to unmap",
        ),
        "rollback-at-zero": Text(
            "a failed conversion in the file's first huge page never ends: an unsigned index is counted down below 0",
            "RFC v2: the rollback loop of the restructuring",
        ),
        "unbind-dying": Text(
            "deleting a slot of a file that is dying takes no lock, and a conversion's invalidation never ends",
            "virt/kvm/guest_memfd.c:kvm_gmem_unbind() before kvm-x86 0ee2c883b62d",
            "mainline before September 2026",
        ),
        "uptodate-unzeroed": Text(
            "a first use zeroes the first 4K of a folio and counts all of it as zeroed: the guest sees old contents",
            "branch of Dec 2025: clear_highpage(folio_page(folio, 0)), folio_mark_uptodate()",
        ),
    }
)
"""By name, in its order."""


def versions_of(defect: str) -> str:
    """Which posted version has a defect, and whether by itself or with --as-posted only."""
    always = [name for name, version in LIKE.items() if defect in version.fields.get("defects", ())]
    always += [name for name, pfnmap in PFNMAP.items() if defect in pfnmap.defects]
    asked = [f"{name} --as-posted" for name, version in LIKE.items() if defect in (*version.fixed, *MAINLINE)]
    return ", ".join([*always, *asked]) or TEXTS[defect].reported
