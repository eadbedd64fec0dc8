"""The table of operations: codes of the trace format, and the classes that routing reads off the rows."""

from __future__ import annotations

import numpy as np
import pytest

from pgemu.machine.config import Config
from pgemu.objects.machine import Machine
from pgemu_kernels import words as W
from pgemu_kernels.words import enum_words, operations
from pgemu_kernels.words.operations import By, Entry, Operation

# Stored traces hold these numbers: the n-th name has code n.
CODES = """
    HOST_FAULT GUEST_FAULT CONVERT PUNCH_HOLE ALLOCATE MMAP MUNMAP ZAP BIND UNBIND PIN UNPIN GET PUT DMA_MAP DMA_UNMAP
    DMA_ACCESS NESTED_MAP NESTED_UNMAP MEMORY_FAILURE CLOSE VM_EXIT GUEST_ACCESS PROTECT FORK EXIT MEMSLOT DIRTY_LOG
    ATTRIBUTES PREFAULT POPULATE READ_SMAPS REVOKE RESTORE GUARD_INSTALL GUARD_REMOVE REMAP POOL_RESIZE POOL_DEMOTE
    FOLIO_ALLOCATE FOLIO_FREE VMEMMAP_OPTIMIZE VMEMMAP_RESTORE FOLIO_SPLIT FOLIO_MERGE FOLIO_REFERENCE FOLIO_FREEZE
    DISSOLVE POISON VMEMMAP_STORE RELEASE LRU_DRAIN WORK MEMORY_POLICY DIRTY_LOGGING POOL_RESERVE LOCK DONTFORK DOFORK
    ADVISE_HUGE COLLAPSE INJECT UNPOISON
""".split()  # noqa: SIM905


def names(bits: np.uint64) -> set[str]:
    return {operation.name for operation in Operation if int(bits) >> operation & 1}


def test_codes_are_those_of_stored_traces() -> None:
    assert {operation.name: int(operation) for operation in Operation} == {
        name: code for code, name in enumerate(CODES, 1)
    }
    assert max(Operation) < W.OPERATIONS
    assert Operation(3) is Operation.CONVERT


def test_classes_hold_what_the_rows_say() -> None:
    assert names(operations.OPS_FULL) == {
        *("ALLOCATE", "PIN", "UNPIN", "PREFAULT", "RELEASE", "LRU_DRAIN", "WORK", "MEMORY_POLICY", "DIRTY_LOGGING"),
        *("NESTED_MAP", "NESTED_UNMAP"),
    }
    assert names(operations.OPS_POOLING) == {*CODES[37:50], "POOL_RESERVE"}
    assert names(operations.OPS_BY_FILE) == {"CONVERT", "PUNCH_HOLE", "ALLOCATE", "BIND", "GET", "PUT", "CLOSE"}
    assert names(operations.OPS_FOUNDING) - names(operations.OPS_ALWAYS_ORDINARY) == {"MMAP"}
    assert names(operations.OPS_OF_VM) == {
        *("GUEST_FAULT", "BIND", "UNBIND", "MEMSLOT", "DIRTY_LOG", "ATTRIBUTES", "PREFAULT", "VM_EXIT"),
    }


def test_an_operation_that_one_entry_runs_alone_is_always_or_never_ordinary() -> None:
    for operation in Operation:
        if operation.entry is Entry.ORDINARY:
            assert operation.ordinary is By.ALWAYS, operation.name
        elif operation.entry in (Entry.POOLING, Entry.DEVICES, Entry.NOBODY):
            assert operation.ordinary is By.NEVER, operation.name
        else:
            assert operation.ordinary is not By.ALWAYS, operation.name
    assert {operation.name for operation in Operation if not operation.sources} == {
        operation.name for operation in Operation if operation.entry is Entry.NOBODY
    }


@pytest.mark.parametrize("prefix", enum_words.PREFIXES)
def test_members_are_exported_once_as_uint64(prefix: str) -> None:
    members = enum_words.PREFIXES[prefix].__members__
    exported = {name: value for name, value in vars(enum_words).items() if name.startswith(f"{prefix}_")}
    of_longer_prefix = {name for name in exported if any(name.startswith(f"{other}_") for other in longer(prefix))}
    assert {name: int(exported[name]) for name in exported.keys() - of_longer_prefix} == {
        f"{prefix}_{name}": int(member) for name, member in members.items()
    }
    assert {type(value) for value in exported.values()} == {np.uint64}


def longer(prefix: str) -> list[str]:
    return [other for other in enum_words.PREFIXES if other.startswith(f"{prefix}_")]


def test_nothing_else_has_the_name_of_a_member() -> None:
    """`from words import *`: a name that two files export would be whichever came last."""
    exported = {name for name in vars(enum_words) if name.startswith(tuple(f"{p}_" for p in enum_words.PREFIXES))}
    others = set().union(*(vars(module) for module in (operations, *modules())))
    assert exported & others == set()


def modules() -> list[object]:
    from pgemu_kernels.words import events, mapped_pages, registers, rows, table_words

    return [events, mapped_pages, registers, rows, table_words]


@pytest.mark.parametrize("code", [0, 23, 64, 65, 128, 200, 255])
def test_what_nobody_runs_is_not_supported(code: int) -> None:
    """Codes past the table, and past the 64 bits of a class, are of no class."""
    machine = Machine(Config(pool=W.PAGE_2M, page_size=W.PAGE_2M))
    machine.create_process()
    machine.create_vm()
    assert machine.operate(code).status == -W.EOPNOTSUPP  # type: ignore[arg-type]
