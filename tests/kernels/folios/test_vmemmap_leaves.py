"""The vmemmap of memory that no huge page was optimised in: 2M leaves, under huge pages, too."""

from __future__ import annotations

import pytest

from pgemu.objects.machine import Config, Machine
from pgemu_kernels import words as W


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("kernel", ["6.12", "6.18", "7.3"])
def test_pages_whose_vmemmap_is_a_2m_leaf(kernel: str, nodes: int) -> None:
    """A pool grows, not optimised, over memory whose vmemmap was never split: leaves are aligned, check() holds."""
    machine = Machine(
        Config(pool=4 * W.PAGE_2M, page_size=W.PAGE_2M, other_pool=2 << 30, buddy=1 << 29, kernel=kernel, nodes=nodes)
    )
    machine.optimize_vmemmap = False
    pool = machine.hugetlb(W.PAGE_2M)
    assert pool.resize(200).detail == 200
    assert machine.check() == 0, machine.broken
    levels = set()
    for pfn in pool.free_list() + (pool.free_list(1) if nodes == 2 else []):
        address = machine.register(W.R_VMEMMAP) + pfn * 64
        level, _, entry = machine.walk(machine.register(W.R_KERNEL_ROOT), (address & (1 << 48) - 1) >> 12)[-1]
        levels.add(level)
        assert level == 1 or (entry >> 12 & 511) == 0
        assert int(machine.struct_page(pfn)[0]) & 1 << 6
    assert levels == {1, 2}
    machine.optimize_vmemmap = True
    assert pool.resize(4).detail == 4
    assert machine.check() == 0
