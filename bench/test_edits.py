"""Edits of one page table: 4K leaves mapped and unmapped, one by one in batches and as one range."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from control import walk_and_store
from pgemu.objects.machine import Config, Machine
from pgemu.tables.page_table import PageTable
from pgemu_kernels.words.operations import PAGE_1G, PAGE_4K

BASE = 1 << 39
PAGES = PAGE_1G // PAGE_4K
FORMATS = ["x86-64", "ept", "arm64-s2-48"]
ORDERS = ["sequential", "random"]


def build(fmt: str, order: str) -> tuple[PageTable, np.ndarray[Any, Any]]:
    """A table whose last level is linked everywhere, and the addresses of 1 GiB."""
    table = Machine(Config()).create_page_table(fmt)
    addresses = BASE + np.arange(PAGES, dtype=np.uint64) * np.uint64(PAGE_4K)
    assert table.map_range(BASE, 0, PAGE_1G, max_level=1).status == 0
    assert table.unmap(BASE, PAGE_1G, tables="zap").status == 0
    if order == "random":
        addresses = np.random.default_rng(1).permutation(addresses)
    return table, addresses


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
        lambda: table.unmap(BASE, PAGE_1G, tables="zap"),
    )
    assert table.map(BASE, 0).status == -17


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_unmap(benchmark: Any, fmt: str, order: str) -> None:
    table, addresses = build(fmt, order)
    measure(
        benchmark,
        f"{fmt}, {order}",
        lambda: table.unmap_many(addresses, tables="zap"),
        lambda: table.map_range(BASE, 0, PAGE_1G, max_level=1),
    )
    assert table.unmap(BASE).status == -2


@pytest.mark.parametrize("fmt", FORMATS)
def test_map_range(benchmark: Any, fmt: str) -> None:
    table, _ = build(fmt, "sequential")
    measure(
        benchmark,
        f"{fmt}, sequential",
        lambda: table.map_range(BASE, 0, PAGE_1G, max_level=1),
        lambda: table.unmap(BASE, PAGE_1G, tables="zap"),
    )


@pytest.mark.parametrize("fmt", FORMATS)
def test_unmap_range(benchmark: Any, fmt: str) -> None:
    table, _ = build(fmt, "sequential")
    measure(
        benchmark,
        f"{fmt}, sequential",
        lambda: table.unmap(BASE, PAGE_1G, tables="zap"),
        lambda: table.map_range(BASE, 0, PAGE_1G, max_level=1),
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fmt", FORMATS)
def test_control(benchmark: Any, fmt: str, order: str) -> None:
    """Walk four levels and store, over the same tables. (x86-64's address bits do for the others' entries, too.)"""
    table, addresses = build(fmt, order)
    ram, root, pages = table.machine.arrays.ram, np.uint64(table.root), addresses >> np.uint64(12)
    measure(benchmark, f"{fmt}, {order}", lambda: walk_and_store(ram, root, pages, np.uint64(0)))
