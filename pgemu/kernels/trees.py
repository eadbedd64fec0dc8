"""Page tables as compiled functions take them: one uint64 array each, made here."""

from __future__ import annotations

from typing import Any

import numpy as np

from pgemu.machine.arguments import guards
from pgemu.machine.core import Core
from pgemu.machine.field_rules import shown
from pgemu.objects.address_space import AddressSpace
from pgemu.objects.vm import Vm
from pgemu.tables.access import Access, rows_of
from pgemu.tables.page_table import PageTable
from pgemu.tables.translation import nested_rows
from pgemu_kernels import words as W
from pgemu_kernels.formats.bits import HOST_X86_64
from pgemu_kernels.formats.page_format import Family
from pgemu_kernels.words.call_words import PLAIN_KIND

__all__ = (
    "PLAIN", "T_EDITS", "T_FORMAT", "T_GENERATION", "T_GENERATION_AT", "T_INPUT_BITS", "T_KINDS", "T_MACHINE",
    "T_MAGIC", "T_PARTIAL", "T_ROOT", "T_ROOT_AT", "T_SIGN_EXTENDED", "T_UNMAP", "T_WORDS", "nested_tree", "tree",
)  # fmt: skip

Array = np.ndarray[Any, Any]
PLAIN = PLAIN_KIND
"""Kind of a walk without an access, beside READ to USER_FETCH. pgemu.Kind has no such member: Python says None."""
_ROWS = int(W.ACCESS_ROWS)
_NOWHERE = (1 << 64) - 1

# Words of a tree. Access rows by kind follow (X_*), PLAIN's last; of a nested one the guest's, then those of stage 2.
T_MAGIC = 0
T_MACHINE = 1  # address of the machine's descriptor
T_FORMAT = 2  # row of the machine's formats
T_ROOT = 3  # physical address of the top table; 0 once it is gone
T_ROOT_AT = 4  # where in `state` the root stands that a process or VM has now, else all ones
T_GENERATION_AT = 5  # ... and the generation of the row, else all ones
T_GENERATION = 6
T_KINDS = 7  # kinds of access that the format knows, from 0
T_EDITS = 8  # 1: edits may change it, 2: but for maps
T_UNMAP = 9  # EDIT_* of an unmap as Linux does it with the format
T_PARTIAL = 10  # ... of a protect
T_INPUT_BITS = 11
T_SIGN_EXTENDED = 12
T_WORDS = 32
MAGIC_ONE, MAGIC_NESTED = 0x7067_656D_7531_0001, 0x7067_656D_7531_0002


@guards()
def tree(of: PageTable | AddressSpace | Vm, access: Access | None = None, *, private: bool = False) -> Array:
    """uint64[320]: a page table for `translate`, `walk` and edits.

    of: a PageTable, a process, or a VM (its stage 2; `private`: below the root of private memory). access: the control
    registers under which kinds of access are judged. A process's or VM's root is looked up at each call; of a PageTable
    that was destroyed, or was made taller since, the array is closed.
    """
    if isinstance(of, PageTable):
        row, words = of.row, _of_table(of)
    elif isinstance(of, AddressSpace):
        row, words = int(HOST_X86_64), _of_process(of)
    elif isinstance(of, Vm):
        row, words = of.machine.register(W.R_STAGE2_FORMAT), _of_vm(of, private)
    else:
        raise TypeError(f"of {shown(of)} ({type(of).__name__}): expected a PageTable, an AddressSpace or a Vm")
    machine = of.machine
    fmt = machine.format_row(row)
    devices = fmt[W.F_FAMILY] in (Family.VTD, Family.AMD_IOMMU)
    words |= {T_MAGIC: MAGIC_ONE, T_FORMAT: row, T_KINDS: 2 if devices else 6}
    words |= {T_INPUT_BITS: int(fmt[W.F_INPUT_BITS]), T_SIGN_EXTENDED: int(fmt[W.F_SIGN_EXTENDED])}
    size = machine.arrays.ram.nbytes
    found = _with_rows(machine, words, rows_of(fmt, size, access, plain=False), rows_of(fmt, size, None, plain=True))
    if isinstance(of, PageTable):
        of._forget_in(found, T_ROOT)
    return found


@guards()
def nested_tree(vm: Vm, access: Access | None = None, *, stage2_access: Access | None = None) -> Array:
    """uint64[544]: a VM's stage 2, and how its guest's x86-64 tables are walked, for `translate_nested`.

    access: the guest's control registers; stage2_access: those of stage 2, where they matter (default: the same).
    """
    machine = vm.machine
    stage2 = machine.register(W.R_STAGE2_FORMAT)
    access = access or Access()
    rows = nested_rows(machine, (int(HOST_X86_64), stage2), (access, stage2_access or access))
    return _with_rows(machine, _of_vm(vm, False) | {T_MAGIC: MAGIC_NESTED, T_FORMAT: stage2, T_KINDS: 6}, rows)


def _with_rows(machine: Core, words: dict[int, int], *rows: Array) -> Array:
    """A tree of its words and access rows."""
    head = np.zeros(T_WORDS, np.uint64)
    nowhere = {T_ROOT_AT: _NOWHERE, T_GENERATION_AT: _NOWHERE, T_MACHINE: machine.descriptor.ctypes.data}
    for word, value in (nowhere | words).items():
        head[word] = value
    found: Array = np.concatenate([head, *rows])
    return found


def _of_table(table: PageTable) -> dict[int, int]:
    if not table.root:
        raise ValueError(f"of {table!r}: the page table was destroyed, expected one that was not")
    if type(table) is not PageTable:
        raise ValueError(f"of {table!r}: a device's, expected a table of Machine.create_page_table()")
    grows = bool(table.machine.format_row(table.row)[W.F_TALLER])
    unmap, partial = table._rules()
    return {T_ROOT: table.root, T_EDITS: 2 if grows else 1, T_UNMAP: unmap, T_PARTIAL: partial}


def _of_process(process: AddressSpace) -> dict[int, int]:
    if process.ended:
        raise ValueError(f"of {process!r}: it has ended, expected a process that has not")
    row = int(W.STATE_SPACES) + process.space * int(W.S_WORDS)
    generation = {T_GENERATION_AT: row + int(W.S_GENERATION), T_GENERATION: process.generation}
    return {T_ROOT_AT: row + int(W.S_ROOT), **generation}


def _of_vm(vm: Vm, private: bool) -> dict[int, int]:
    if not vm.root:
        raise ValueError(f"of {vm!r}: it is closed, expected a VM that is not")
    row = int(W.STATE_VMS) + vm.vm * int(W.V_WORDS)
    return {T_ROOT_AT: row + int(W.V_PRIVATE_ROOT if private else W.V_ROOT)}
