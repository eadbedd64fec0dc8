"""Edits of one page table: 4K leaves mapped and unmapped, one by one in batches and as one range."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from control import walk_and_store
from pgemu.objects.machine import Config, Machine
from pgemu.tables.page_table import PageTable
from pgemu_kernels.formats.page_format import UnmapRule
from pgemu_kernels.words.operations import PAGE_1G, PAGE_4K

BASE = 1 << 39
PAGES = PAGE_1G // PAGE_4K
FORMATS = ["x86-64", "ept", "arm64-s2-48", "vtd-s2", "amd-v1"]
PARAMETERS = {"amd-v1": {"levels": 4, "page_sizes": PAGE_4K}}  # every leaf one of 4K, as of the others
ORDERS = ["sequential", "random"]


def build(fmt: str, order: str) -> tuple[PageTable, np.ndarray[Any, Any]]:
    """A table whose last level is linked everywhere, and the addresses of 1 GiB."""
    table = Machine(Config()).create_page_table(fmt, **PARAMETERS.get(fmt, {}))
    addresses = BASE + np.arange(PAGES, dtype=np.uint64) * np.uint64(PAGE_4K)
    assert table.map_range(BASE, 0, PAGE_1G, max_level=1).status == 0
    unmap_all(table)
    if order == "random":
        addresses = np.random.default_rng(1).permutation(addresses)
    return table, addresses


def is_domain(table: PageTable) -> bool:
    """Whether an unmap has its kernel's rule for tables, and tells bytes."""
    return table.format.unmap_rule != UnmapRule.EVERY_LEAF


def unmap_all(table: PageTable) -> None:
    """Unmap the range and keep its tables: a domain's go with an unmap that covers them."""
    if is_domain(table):
        pages = BASE + np.arange(PAGES, dtype=np.uint64) * np.uint64(PAGE_4K)
        assert not table.unmap_many(pages).status.any()
    else:
        table.unmap(BASE, PAGE_1G, tables="zap")


def measure(
    benchmark: Any, group: str, call: Callable[[], object], prepare: Callable[[], object] | None = None
) -> None:
    benchmark.group = f"edit, {group} over 1G"
    benchmark.extra_info["operations"] = PAGES
    benchmark.pedantic(call, setup=lambda: prepare and prepare() and None, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_map(benchmark: Any, fmt: str, order: str) -> None:
    table, addresses = build(fmt, order)
    physical = addresses - np.uint64(BASE)
    measure(
        benchmark,
        f"{fmt}, {order}",
        lambda: table.map_many(addresses, physical),
        lambda: unmap_all(table),
    )
    assert table.map(BASE, 0).status == (-98 if is_domain(table) else -17)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_unmap(benchmark: Any, fmt: str, order: str) -> None:
    table, addresses = build(fmt, order)
    tables: Any = None if is_domain(table) else "zap"
    measure(
        benchmark,
        f"{fmt}, {order}",
        lambda: table.unmap_many(addresses, tables=tables),
        lambda: table.map_range(BASE, 0, PAGE_1G, max_level=1),
    )
    assert table.unmap(BASE)[:2] == ((0, 0) if is_domain(table) else (-2, 0))


@pytest.mark.parametrize("fmt", FORMATS)
def test_map_range(benchmark: Any, fmt: str) -> None:
    table, _ = build(fmt, "sequential")
    measure(
        benchmark,
        f"{fmt}, sequential",
        lambda: table.map_range(BASE, 0, PAGE_1G, max_level=1),
        lambda: unmap_all(table),
    )


@pytest.mark.parametrize("fmt", FORMATS)
def test_unmap_range(benchmark: Any, fmt: str) -> None:
    """A domain's tables go with it, and are made again before the next round."""
    table, _ = build(fmt, "sequential")
    tables: Any = None if is_domain(table) else "zap"
    measure(
        benchmark,
        f"{fmt}, sequential",
        lambda: table.unmap(BASE, PAGE_1G, tables=tables),
        lambda: table.map_range(BASE, 0, PAGE_1G, max_level=1),
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_control(benchmark: Any, fmt: str, order: str) -> None:
    """Walk four levels and store, over the same tables. (x86-64's address bits do for the others' entries, too.)"""
    table, addresses = build(fmt, order)
    ram, root, pages = table.machine.arrays.ram, np.uint64(table.root), addresses >> np.uint64(12)
    measure(benchmark, f"{fmt}, {order}", lambda: walk_and_store(ram, root, pages, np.uint64(0)))
