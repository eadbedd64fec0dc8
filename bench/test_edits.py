"""Edits of one page table: 4K leaves mapped and unmapped, one by one in batches and as one range."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from amounts import amount
from pgemu.objects.machine import Config, Machine
from pgemu.pytest_plugin import Benchmark, Controls
from pgemu.tables.page_table import PageTable
from pgemu_kernels.formats.page_format import UnmapRule
from pgemu_kernels.words.operations import PAGE_1G, PAGE_4K

BASE = 1 << 39
SIZE = amount(PAGE_1G, 16 << 20)
PAGES = SIZE // PAGE_4K
Measure = Callable[..., None]
Array = np.ndarray[Any, Any]
FORMATS = ["x86-64", "ept", "arm64-s2-48", "vtd-s2", "amd-v1"]
PARAMETERS = {"amd-v1": {"levels": 4, "page_sizes": PAGE_4K}}  # every leaf one of 4K, as of the others
ORDERS = ["sequential", "random"]


def build(fmt: str, order: str) -> tuple[PageTable, Array]:
    """A table whose last level is linked everywhere, and the addresses, in order or not."""
    table = Machine(Config()).create_page_table(fmt, **PARAMETERS.get(fmt, {}))
    assert table.map_range(BASE, 0, SIZE, max_level=1).status == 0
    unmap_all(table)
    return table, ordered(order)


def ordered(order: str) -> Array:
    addresses = BASE + np.arange(PAGES, dtype=np.uint64) * np.uint64(PAGE_4K)
    return np.random.default_rng(1).permutation(addresses) if order == "random" else addresses


def is_domain(table: PageTable) -> bool:
    """Whether an unmap has its kernel's rule for tables, and tells bytes."""
    return table.format.unmap_rule != UnmapRule.EVERY_LEAF


def unmap_all(table: PageTable) -> None:
    """Unmap the range and keep its tables: a domain's go with an unmap that covers them."""
    if is_domain(table):
        pages = BASE + np.arange(PAGES, dtype=np.uint64) * np.uint64(PAGE_4K)
        assert not table.unmap_many(pages).status.any()
    else:
        table.unmap(BASE, SIZE, tables="zap")


@pytest.fixture
def measure(pgemu_benchmark: Benchmark) -> Measure:
    def measure(
        fmt: str, order: str, call: Callable[[], object], prepare: Callable[[], object] | None = None,
        table: PageTable | None = None,
    ) -> None:  # fmt: skip
        pgemu_benchmark(
            call, setup=prepare, operations=PAGES, group=f"edit {fmt}", order=order, footprint=PAGES * PAGE_4K,
            machine=table.machine if table else None,
        )  # fmt: skip

    return measure


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_map(measure: Measure, fmt: str, order: str) -> None:
    table, addresses = build(fmt, order)
    physical = addresses - np.uint64(BASE)
    measure(
        fmt,
        order,
        lambda: table.map_many(addresses, physical),
        lambda: unmap_all(table),
        table,
    )
    assert table.map(BASE, 0).status == (-98 if is_domain(table) else -17)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_unmap(measure: Measure, fmt: str, order: str) -> None:
    table, addresses = build(fmt, order)
    tables: Any = None if is_domain(table) else "zap"
    measure(
        fmt,
        order,
        lambda: table.unmap_many(addresses, tables=tables),
        lambda: table.map_range(BASE, 0, SIZE, max_level=1),
        table,
    )
    assert table.unmap(BASE)[:2] == ((0, 0) if is_domain(table) else (-2, 0))


@pytest.mark.parametrize("fmt", FORMATS)
def test_map_range(measure: Measure, fmt: str) -> None:
    table, _ = build(fmt, "sequential")
    measure(
        fmt,
        "sequential",
        lambda: table.map_range(BASE, 0, SIZE, max_level=1),
        lambda: unmap_all(table),
        table,
    )


@pytest.mark.parametrize("fmt", FORMATS)
def test_unmap_range(measure: Measure, fmt: str) -> None:
    """A domain's tables go with it, and are made again before the next round."""
    table, _ = build(fmt, "sequential")
    tables: Any = None if is_domain(table) else "zap"
    measure(
        fmt,
        "sequential",
        lambda: table.unmap(BASE, SIZE, tables=tables),
        lambda: table.map_range(BASE, 0, SIZE, max_level=1),
        table,
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_control(measure: Measure, pgemu_control: Controls, fmt: str, order: str) -> None:
    """Walk four levels and store, over as many tables of x86-64."""
    measure(fmt, order, pgemu_control(ordered(order)))
