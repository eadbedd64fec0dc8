"""Versions of both designs: which fields of Config come together, and what is given by hand beside them."""

from __future__ import annotations

from typing import Any

import pytest

from pgemu.machine.presets import LIKE, PFNMAP, Versions
from pgemu_kernels.words.operations import PAGE_1G, PAGE_2M, PAGE_4K

POOL = 2 << 30
RFC2_DEFECTS = ("convert-keeps-leaves", "hole-zeroes-from-start", "merge-keeps-flag")


def configured(design: str, versions: Versions, **given: Any) -> dict[str, Any]:
    """The fields that say how a design does what it does."""
    config = versions.configuration(design, **{"pool": POOL, **given})
    names = ("order", "batch", "split_form", "zero", "punch", "kernel", "defects")
    return {name: getattr(config, name) for name in names}


@pytest.mark.parametrize(
    ("like", "page_size", "expected"),
    [
        ("rfc2", PAGE_1G, ("rfc2", "range", "rfc2", "folio", "zero", "6.18", RFC2_DEFECTS)),
        ("dec2025", PAGE_1G, ("fixup", "block", "jan2026", "folio", "refuse", "6.18", ("uptodate-unzeroed",))),
        ("jan2026", PAGE_1G, ("jan2026", "block", "jan2026", "folio", "refuse", "6.18", ("uptodate-unzeroed",))),
        ("next", PAGE_4K, ("next4k", "range", "jan2026", "folio", "zero", "7.3", ())),
    ],
)
def test_versions_of_restructure(like: str, page_size: int, expected: tuple[object, ...]) -> None:
    found = configured("restructure", Versions(like), page_size=page_size)
    assert tuple(found.values()) == expected


@pytest.mark.parametrize(
    ("pfnmap", "defects"), [("corrected", ()), ("slides2025", ("insert-unlocked", "punch-keeps-entries"))]
)
@pytest.mark.parametrize(("like", "punch"), [("rfc2", "zero"), ("dec2025", "refuse")])
def test_pfnmap_has_the_kernel_and_the_holes_of_the_version_beside_it(
    like: str, punch: str, pfnmap: str, defects: tuple[str, ...]
) -> None:
    found = configured("pfnmap", Versions(like, pfnmap))
    expected = {"batch": "range", "zero": "page", "punch": punch, "kernel": "6.18", "defects": defects}
    assert expected.items() <= found.items()


def test_a_plan_is_the_branch_but_for_its_order() -> None:
    plan, branch = (configured("restructure", Versions(like)) for like in ("jan2026", "dec2025"))
    assert {name for name, value in plan.items() if branch[name] != value} == {"order"}


@pytest.mark.parametrize(
    ("like", "fixed"),
    [
        ("rfc2", tuple(sorted(("allocation-race", "cut-huge-pfn", *RFC2_DEFECTS, "rollback-at-zero")))),
        ("dec2025", ("allocation-race", "cut-huge-pfn", "mapping-order", "uptodate-unzeroed")),
    ],
)
def test_as_posted_has_the_mistakes_with_a_known_fix(like: str, fixed: tuple[str, ...]) -> None:
    assert configured("restructure", Versions(like, as_posted=True))["defects"] == fixed
    assert configured("pfnmap", Versions(like, as_posted=True))["defects"] == ("cut-huge-pfn",)  # of every kernel


@pytest.mark.parametrize("zero", ["folio", "page"])
def test_an_explicit_zeroing_takes_the_place_of_the_defect(zero: str) -> None:
    for design in ("restructure", "pfnmap"):
        found = configured(design, Versions(), zero=zero)
        assert (found["zero"], found["defects"]) == (zero, ())
    kept = configured("restructure", Versions(as_posted=True), zero=zero)
    assert kept["defects"] == ("allocation-race", "cut-huge-pfn", "mapping-order")


def test_what_is_given_by_hand_wins_and_none_is_as_without_it() -> None:
    found = configured("restructure", Versions(), order="rfc2", punch=None, kernel="7.3", defects=("merge-keeps-flag",))
    assert (found["order"], found["punch"], found["kernel"]) == ("rfc2", "refuse", "7.3")
    assert found["defects"] == ("merge-keeps-flag", "uptodate-unzeroed")
    given = {"order": "rfc2", "punch": "refuse", "kernel": None, "zap": "rounded", "batch": "block"}
    assert Versions().mixed("restructure", given) == {"order": "rfc2"}
    assert Versions().mixed("pfnmap", given) == {}


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        ({"like": "v2"}, "like 'v2': expected one of rfc2, dec2025, jan2026, next"),
        ({"pfnmap": "slides"}, "pfnmap 'slides': expected one of corrected, slides2025"),
    ],
)
def test_a_name_that_is_none_is_refused(names: dict[str, str], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Versions(**names)  # type: ignore[arg-type]


def test_page_sizes_and_sources_are_said() -> None:
    assert LIKE["next"].page_sizes == (PAGE_4K,)
    assert LIKE["dec2025"].page_sizes == LIKE["rfc2"].page_sizes == (PAGE_1G, PAGE_2M, PAGE_4K)
    assert {name: version.shared_huge for name, version in LIKE.items()} == {
        "rfc2": True,
        "dec2025": False,
        "jan2026": False,
        "next": True,
    }
    assert all(version.text and version.source for version in (*LIKE.values(), *PFNMAP.values()))
