"""Huge entries of processes by vmf_insert_pfn_pmd() and _pud(): stand-in, all entries are of 4K."""

from __future__ import annotations

from pgemu_kernels.bits import U1
from pgemu_kernels.compile import kernel
from pgemu_kernels.layout import STOP


@kernel
def host_level(m, op):
    """The level at which a host fault is entered."""
    return U1


@kernel
def insert(m, op, level):
    """Enter the fault's frame at `level`, unlock, and end the fault, as pfnmap.fault_map() does."""
    return STOP
