"""What claims about devices measure: the figures worked out by hand, on either IOMMU, for each kind of VM."""

from __future__ import annotations

from typing import Any

import pytest

from pgemu.experiments.audit import CLAIMS
from pgemu.experiments.claims.claim import Value
from pgemu_kernels import words as W

UNITS = pytest.mark.parametrize("unit", ["vtd", "amd"])


def figures(name: str, **changes: Any) -> dict[str, tuple[Value, Value]]:
    """By name of a figure: of pfnmap, of restructure."""
    claim = next(one for one in CLAIMS if one.name == name)
    found = claim.measure(claim.setting.changed(changes))
    return {key: (figure.trial, figure.other) for key, figure in found.items()}


def _vm(kind: str) -> dict[str, Any]:
    return {"fields": {"vm": kind, "stage2": "npt" if kind == "snp" else "ept"}}


@UNITS
def test_vfio_as_it_is(unit: str) -> None:
    found = figures("vfio-bar-not-ram", unit=unit)
    assert found == {
        "bar": ("ok", "ok"), "bar_pins": (0, 0), "ram": ("-EFAULT", "ok"), "ram_pins": (0, 512),
        "convert": ("ok", "-EAGAIN"),
    }  # fmt: skip


@UNITS
def test_vfio_without_its_check(unit: str) -> None:
    """512 pages of 2M are unpinned: a reference each of the one folio that pfnmap keeps, 1024 of restructure's."""
    naive = figures("vfio-unchecked-unpins", unit=unit, door="vfio naive")
    assert (naive["held"], naive["left"]) == ((0, 512 * 1024), (-512, 0))
    assert naive["findings"][0]
    assert not naive["findings"][1]
    tracked = figures("vfio-unchecked-unpins", unit=unit, door="vfio tracked")
    assert (tracked["left"], tracked["findings"], tracked["stale"]) == ((0, 0), (0, 0), (1, 0))


@UNITS
@pytest.mark.parametrize("mode", ["none", "notifier", "revoke", "mirror"])
def test_who_must_unmap(mode: str, unit: str) -> None:
    found = figures("devices-need-no-kernel", unit=unit, door=f"iommufd {mode}")
    stale = int(mode == "none")
    assert {name: found[name] for name in ("conversion", "hole", "end")} == dict.fromkeys(
        ("conversion", "hole", "end"), (stale, stale)
    )
    assert {found[name] for name in ("munmap", "slot", "shared")} == {(0, 0)}
    assert found["failed"] == (1, 1)


@pytest.mark.parametrize(
    ("kind", "changed", "faults", "checks"), [("sw", 8, 0, 0), ("tdx", 8, 0, 1), ("snp", 0, 1, 0), ("plain", 0, 0, 0)]
)
def test_what_a_stale_write_does(kind: str, changed: int, faults: int, checks: int) -> None:
    """To a private page, which a plain VM has not; to what a hole freed it gets through whatever the VM."""
    private = figures("stale-entry-private", door="iommufd none", **_vm(kind))
    assert private["convert"] == (("-EINVAL" if kind == "plain" else "ok"),) * 2
    assert [private[name] for name in ("changed", "faults", "checks")] == [(n, n) for n in (changed, faults, checks)]
    freed = figures("stale-entry-freed", door="iommufd none", **_vm(kind))
    assert [freed[name] for name in ("changed", "faults", "checks")] == [(8, 8), (0, 0), (0, 0)]


@pytest.mark.parametrize("mode", ["notifier", "revoke", "mirror"])
@pytest.mark.parametrize("name", ["stale-entry-private", "stale-entry-freed"])
def test_nothing_is_written_where_the_kernel_unmaps(name: str, mode: str) -> None:
    found = figures(name, door=f"iommufd {mode}")
    assert (found["changed"], found["faults"]) == ((0, 0), (1, 1))


@pytest.mark.parametrize(
    ("mode", "unit", "leaves", "tables"),
    [
        # Two leaves of 1G; then one of them, 511 of 2M, 511 of 4K. On AMD the first is one of 2G.
        ("mirror", "vtd", (2, 1 + 511 + 511, 2), 0),
        ("mirror", "amd", (1, 1 + 511 + 511, 1), 0),
        # Mapped again as it is, and the page that comes back by an entry of its own: nothing puts them together.
        ("revoke", "vtd", (2, 1 + 511 + 511, 1 + 511 + 512), 2),
        # 4 pages and 1 before page 5, behind it 2, and 8 to 262,144 by powers of two.
        ("revoke", "amd", (1, 2 + 1 + 16, 2 + 1 + 16 + 1), 2),
    ],
)
def test_large_entries(mode: str, unit: str, leaves: tuple[int, ...], tables: int) -> None:
    found = figures("large-entries-follow", door=f"iommufd {mode}", unit=unit)
    assert [found[name] for name in ("before", "private", "after")] == [(n, n) for n in leaves]
    assert (found["tables"], found["kept"]) == ((2, 2), (tables, tables))


@pytest.mark.parametrize(
    ("mode", "unit", "page_size", "widened"),
    [
        ("revoke", "vtd", W.PAGE_1G, (1 << 18) - 1),
        ("revoke", "amd", W.PAGE_1G, (1 << 19) - 1),
        ("revoke", "vtd", W.PAGE_2M, 511),
        ("revoke", "amd", W.PAGE_2M, 1023),
        ("mirror", "vtd", W.PAGE_1G, 0),
        ("mirror", "amd", W.PAGE_1G, 0),
        ("notifier", "vtd", W.PAGE_1G, (1 << 18) - 1),
    ],
)
def test_how_wide_a_revoke_gets(mode: str, unit: str, page_size: int, widened: int) -> None:
    found = figures("revoke-is-exact", door=f"iommufd {mode}", unit=unit, page_size=page_size)
    assert (found["taken"], found["widened"]) == ((widened + 1,) * 2, (widened,) * 2)
    assert found["returned"] == (widened if mode == "revoke" else 0,) * 2
    for side in (0, 1):
        assert bool(found["between"][side]) == bool(found["least"][side] or mode == "notifier")
        assert found["least"][side] <= found["most"][side]  # type: ignore[operator]
        assert found["afterwards"][side] == (mode == "notifier")
