"""Machines from C and C++: pgemu.h's table of functions over a machine that was made in Python.

>>> from pgemu import Config, Machine, capi
>>> machine = Machine(Config("pfnmap", pool=2 << 30))
>>> capi.handle(machine) == capi.handle(machine) != 0
True
>>> capi.mmu(machine), capi.mmu(machine, access=Access(write_protect=False))
(0, 4)

A program embeds Python, or is an extension: it takes the table by `pgemu_import()` and a machine by `pgemu_handle()`,
both in the header (`pgemu.get_include()`), and calls without returning to Python. Others that can call C functions
(ctypes, cffi, Rust, Julia) take their addresses from `functions()`.

A handle is valid as long as its machine lives: whoever calls keeps the Python object. What machine code a program needs
is compiled when it asks for it first, and kept as all machine code is; `pgemu warmup --all` compiles ahead.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from pgemu.capi.words_header import words_header as words_header
from pgemu.machine.arguments import guards
from pgemu.machine.core import Core, row_of_format
from pgemu.tables.access import Access, Kind, rows_of
from pgemu.tables.translation import nested_rows
from pgemu_kernels import words as W
from pgemu_kernels.engine.handle import C_CONTEXT
from pgemu_kernels.formats import bits as formats
from pgemu_kernels.formats.page_format import Family
from pgemu_kernels.words import call_words as C
from pgemu_kernels.words.operations import Entry

__all__ = ("ABI", "functions", "get_include", "handle", "mmu", "nested_mmu", "words_header")

ABI = 1  # PGEMU_ABI of pgemu.h
CAPSULE = b"pgemu.capi._C_API"  # PGEMU_CAPSULE; PyCapsule_New() keeps its address

Array = np.ndarray[Any, Any]
_DEVICES = (Family.VTD, Family.AMD_IOMMU)
_PLAIN = 1 << C.PLAIN_KIND


def get_include() -> str:
    """The folder of pgemu.h and pgemu_words.h, for a C compiler's -I.

    >>> import os
    >>> sorted(os.listdir(get_include()))
    ['pgemu.h', 'pgemu_shared.h', 'pgemu_words.h']
    """
    return str(Path(__file__).parents[1] / "include")


# --------------------------------------------------------------------------- the table


@cache
def functions() -> Mapping[str, int]:
    """Addresses of the C functions by their names in struct pgemu_api, in its order: loaded, or compiled first.

    A program without Python.h (PGEMU_NO_PYTHON) makes the table of them: uint32 `ABI`, uint32 bytes of the struct, then
    these addresses, uint64 each.
    """
    from pgemu_kernels.run.c_entries import FUNCTIONS

    return MappingProxyType({name: entry.c_address() for name, entry in FUNCTIONS.items()})


@cache
def _table() -> Array:
    """struct pgemu_api: ABI and size in the first word, then the functions."""
    addresses = list(functions().values())
    return np.array([ABI | 8 * (1 + len(addresses)) << 32, *addresses], np.uint64)


@cache
def _capsule() -> Any:
    import ctypes

    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return new(_table().ctypes.data, CAPSULE, None)


def __getattr__(name: str) -> Any:
    if name == "_C_API":  # what pgemu_import() asks for
        return _capsule()
    raise AttributeError(f"module 'pgemu.capi' has no attribute {name!r}")


@cache
def _loader() -> Any:
    import ctypes

    from pgemu_kernels.run.c_entries import provide_address

    return ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_uint64)(provide_address)


def _calls() -> Array:
    """The process's table of entries that C functions call."""
    import ctypes

    from pgemu_kernels.run.c_entries import calls

    found: Array = calls(ctypes.cast(_loader(), ctypes.c_void_p).value or 0)
    return found


# --------------------------------------------------------------------------- machines


class _Context:
    """What calls from C need beside a machine, as words/call_words.py lays it out."""

    def __init__(self, machine: Core) -> None:
        self.words = np.zeros(C.CONTEXT_WORDS, np.uint64)
        self.mmus = np.zeros((C.MMUS, C.MMU_WORDS), np.uint64)
        self.numbers: dict[Any, int] = {}
        self.kept: list[Array] = []  # access rows, which `mmus` has the addresses of
        self.words[C.CONTEXT_MACHINE] = machine.descriptor.ctypes.data
        self.words[C.CONTEXT_CALLS] = _calls().ctypes.data
        self.words[C.CONTEXT_MMUS] = self.mmus.ctypes.data
        machine.descriptor[C_CONTEXT] = self.words.ctypes.data

    def add(self, key: Any, format_row: int, stage2_row: int, kinds: int, rows: Array) -> int:
        """Number of an MMU, a new one if none is alike. ValueError past words.call_words.MMUS."""
        if key in self.numbers:
            return self.numbers[key]
        number = len(self.numbers)
        if number == C.MMUS:
            raise ValueError(f"access {key[-1]}: the machine has {C.MMUS} MMUs already, expected one of those")
        self.kept.append(rows)
        self.mmus[number] = format_row, stage2_row, kinds, rows.ctypes.data
        self.numbers[key] = number
        self.words[C.CONTEXT_MMU_COUNT] = number + 1
        return number


_contexts: WeakKeyDictionary[Core, _Context] = WeakKeyDictionary()


def _context(machine: Core) -> _Context:
    found = _contexts.get(machine)
    if found is None:
        found = _contexts[machine] = _Context(machine)
        for row in (formats.HOST_X86_64, formats.STAGE2_NPT, formats.STAGE2_EPT):
            _mmu(machine, found, int(row), Access())
        _nested_mmu(machine, found, (int(formats.HOST_X86_64), machine.register(W.R_STAGE2_FORMAT)), Access(), Access())
    return found


@guards()
def handle(machine: Core) -> int:
    """The address that C functions know a machine by: `pgemu_machine *`, that of its descriptor.

    It is valid as long as the machine lives, which the caller sees to: a handle keeps nothing alive, and of a machine
    that is gone none may be used. A copy and a machine that was loaded have handles of their own. TypeError for what is
    no Machine.
    """
    _context(machine)
    return int(machine.descriptor.ctypes.data)


def operating(machine: Core, *entries: Entry) -> int:
    """The address of the entry `c_operate`, for call_address(), with what operations go on to loaded.

    OSError where machine code cannot be had, the reason on stderr.
    """
    from pgemu_kernels.run.c_entries import provide_address

    handle(machine)
    loops = range(int(C.CALL_LOOP), int(C.CALL_LOOP) + 3) if Entry.FAST in entries else ()
    if any(provide_address(int(number)) for number in (*entries, *loops)):
        raise OSError(f"no machine code of {', '.join(entry.name for entry in entries)}")
    return int(_calls()[C.CALL_OPERATE])


@guards()
def mmu(machine: Core, format_row: int = 0, access: Access | None = None) -> int:
    """The number by which `translate` of C knows entries of a format walked under control registers.

    format_row: row of the machine's formats (Machine.add_format, PageTable.row). access: default Access().
    Numbers 0 to 2 are those of the format rows 0 to 2 (host, NPT, EPT) under Access(), 3 is that of nested walks.
    ValueError for a row that is not there, or past words.call_words.MMUS different ones.
    """
    return _mmu(machine, _context(machine), format_row, access or Access())


@guards()
def nested_mmu(
    machine: Core, guest_format: int = 0, stage2_format: int | None = None, access: Access | None = None, *,
    stage2_access: Access | None = None,
) -> int:  # fmt: skip
    """The same for `translate_nested` of C: a guest's tables over stage 2.

    stage2_format: None is the machine's own. access: the guest's control registers; stage2_access: those of stage 2
    (default: the same). ValueError as mmu(), and for formats that cannot stand there.
    """
    stage2 = machine.register(W.R_STAGE2_FORMAT) if stage2_format is None else stage2_format
    access = access or Access()
    return _nested_mmu(machine, _context(machine), (guest_format, stage2), access, stage2_access or access)


def _mmu(machine: Core, context: _Context, format_row: int, access: Access) -> int:
    row = row_of_format(machine, "format_row", format_row)
    ram_bytes = machine.arrays.ram.nbytes
    rows = np.concatenate([rows_of(row, ram_bytes, access, plain=False), rows_of(row, ram_bytes, None, plain=True)])
    last = Kind.WRITE if row[W.F_FAMILY] in _DEVICES else Kind.USER_FETCH
    return context.add((format_row, access), format_row, int(C.NO_STAGE2), (2 << last) - 1 | _PLAIN, rows)


def _nested_mmu(machine: Core, context: _Context, rows: tuple[int, int], access: Access, stage2_access: Access) -> int:
    key = (*rows, access, stage2_access)
    return context.add(key, *rows, (2 << Kind.USER_FETCH) - 1, nested_rows(machine, rows, (access, stage2_access)))
