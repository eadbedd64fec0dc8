"""What a machine keeps beside its arrays, as JSON and back: formats, page tables, address spaces of devices."""

from __future__ import annotations

from dataclasses import asdict, fields
from enum import IntEnum
from typing import TYPE_CHECKING, Any, get_type_hints

import numpy as np

from pgemu.errors import InputError
from pgemu.machine.single import Single
from pgemu.machine.snapshot import Snapshot
from pgemu.objects.devices import _FORMATS, Ioas, VfioContainer
from pgemu.objects.files import Device, GuestMemfd4K, HugetlbFile, ShmemFile
from pgemu.objects.io_space import DomainTable
from pgemu.tables.page_table import PageTable, table_of_rows
from pgemu_kernels import words as W
from pgemu_kernels.engine.handle import TELL_DEVICES, Machine as Arrays, describe
from pgemu_kernels.formats.entry_format import Execute
from pgemu_kernels.formats.page_format import PageFormat

if TYPE_CHECKING:
    from pgemu.machine.config import Config
    from pgemu.machine.core import Core
    from pgemu.objects.address_space import AddressSpace
    from pgemu.objects.guest_memfd import GuestMemfd
    from pgemu.objects.vm import Vm

__all__ = ("KEY", "beside", "inodes", "io_spaces", "made_of", "processes", "restored", "vms")

KEY = "machine"
"""Of a snapshot's header: what beside() says."""


def beside(machine: Core) -> dict[str, Any]:
    """What is to be kept beside the arrays."""
    own = [table for table in machine.tables_made if table.root and type(table) is PageTable]
    return {
        "frames_limit": machine._frames_limit,
        "tells_devices": bool(machine.descriptor[TELL_DEVICES]),
        "formats": {str(row): asdict(fmt) for row, fmt in machine.formats_made.items()},
        "tables": [{"root": table.root, "row": table._row, "rows": list(table._formats)} for table in own],
    }


def made_of(kind: type[Any], config: Config, arrays: Arrays, kept: dict[str, Any]) -> Any:
    """A machine of arrays, and of what beside() said of them.

    KeyError, TypeError or ValueError for what it did not say.
    """
    machine = object.__new__(kind)
    machine.config = config
    machine.arrays = arrays
    machine.descriptor = describe(arrays)
    machine._frames_limit = int(kept["frames_limit"])
    machine.single = Single()
    machine._entry = None
    machine.tables_made = []
    machine.walk_rows = {}
    machine.formats_made = {int(row): _format(fmt) for row, fmt in kept["formats"].items()}
    if kept["tells_devices"]:
        from pgemu_kernels.run.entries import tell_devices

        machine.descriptor[TELL_DEVICES] = tell_devices.address()  # of this process
    for table in kept["tables"]:
        formats = {int(row): machine.formats_made[int(row)] for row in table["rows"]}
        machine.tables_made.append(table_of_rows(machine, int(table["root"]), int(table["row"]), formats))
    machine.tables_made.extend(space.table for space in io_spaces(machine) if space.root)
    return machine


def restored(kind: type[Any], snapshot: Snapshot, name: str) -> Any:
    """A machine out of a file of that name. InputError where what it says beside its arrays is of no use."""
    try:
        return made_of(kind, snapshot.config, snapshot.arrays, snapshot.header[KEY])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"what the machine keeps beside its arrays cannot be used ({str(error)[:100]})", name
        ) from None


def _format(document: dict[str, Any]) -> PageFormat:
    """An entry format of its fields."""
    hints = get_type_hints(PageFormat)
    return PageFormat(**{field.name: _field(hints[field.name], document[field.name]) for field in fields(PageFormat)})


def _field(kind: Any, value: Any) -> Any:
    if isinstance(kind, type) and issubclass(kind, IntEnum):
        return kind(value)
    if kind is Execute:
        return Execute(**value)
    return _tuples(value)


def _tuples(value: Any) -> Any:
    """JSON has lists."""
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


# --------------------------------------------------------------------------- handles of what a machine has


def _rows(machine: Core, begin: int, count: int, words: int) -> np.ndarray[Any, Any]:
    return machine.arrays.state[begin : begin + count * words].reshape(count, words)


def processes(machine: Core) -> list[AddressSpace]:
    """See Machine.processes."""
    from pgemu.objects.address_space import AddressSpace

    rows = _rows(machine, int(W.STATE_SPACES), machine.register(W.R_SPACES), W.S_WORDS)
    return [AddressSpace(machine, i) for i, row in enumerate(rows) if row[W.S_ROOT]]


def vms(machine: Core) -> list[Vm]:
    """See Machine.vms."""
    from pgemu.objects.vm import Vm

    rows = _rows(machine, int(W.STATE_VMS), machine.register(W.R_VMS), W.V_WORDS)
    return [Vm(machine, i) for i, row in enumerate(rows) if row[W.V_ROOT]]


def inodes(machine: Core) -> list[GuestMemfd | GuestMemfd4K | HugetlbFile | ShmemFile | Device]:
    """See Machine.inodes."""
    return [_inode(machine, i) for i in range(machine.register(W.R_INODES))]


def _inode(machine: Core, number: int) -> GuestMemfd | GuestMemfd4K | HugetlbFile | ShmemFile | Device:
    row = _rows(machine, int(W.STATE_INODES), machine.register(W.R_INODES), W.I_WORDS)[number]
    kind, size, flags = int(row[W.I_KIND]), int(row[W.I_PAGES]) << 12, row[W.I_FLAGS]
    if kind == W.INODE_GUEST_MEMFD:
        from pgemu.objects.guest_memfd import GuestMemfd

        return GuestMemfd(machine, number, size)
    if kind == W.INODE_HUGETLB:
        return HugetlbFile(machine, number, size, page_size=W.PAGE_4K << int(row[W.I_ORDER]))
    if kind == W.INODE_DEVICE:
        return Device(machine, number, size, int(row[W.I_BASE]))
    return ShmemFile(machine, number, size) if flags & W.INODE_SHMEM else GuestMemfd4K(machine, number, size)


def io_spaces(machine: Core) -> list[VfioContainer | Ioas]:
    """See Machine.io_spaces."""
    rows = _rows(machine, int(W.STATE_DOMAINS), machine.register(W.R_DOMAINS), W.D_WORDS)
    return [_io_space(machine, i, row) for i, row in enumerate(rows) if row[W.D_KIND]]


def _io_space(machine: Core, number: int, row: np.ndarray[Any, Any]) -> VfioContainer | Ioas:
    kind: type[VfioContainer | Ioas] = Ioas if row[W.D_KIND] == W.DOMAIN_IOAS else VfioContainer
    formats: dict[int, Any] = {}
    least = int(row[W.D_EMPTY_FORMAT])
    while least and least not in formats:
        formats[least] = machine.formats_made[least]
        least = int(machine.format_row(least)[W.F_TALLER])
    space = object.__new__(kind)
    space.machine, space.number, space._closed = machine, number, False
    name = next(iter(formats.values())).name
    space.unit = "vtd" if name.startswith(_FORMATS["vtd"]) else "amd"
    space.table = DomainTable(space, formats)
    return space
