"""A machine as a trace finds it before its first record, and how many records to run at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pgemu.errors import InputError
from pgemu.experiments.devices import DevicesOfRun
from pgemu.experiments.process_machine import boot_processes
from pgemu.machine.presets import LIKE, Versions
from pgemu.sizes import size as size_text
from pgemu.trace.lowered import Guest

if TYPE_CHECKING:
    from pgemu.machine.config import Config
    from pgemu.objects.guest_memfd import GuestMemfd
    from pgemu.objects.machine import Machine
    from pgemu.trace.lowered import Lowered

__all__ = ("ONE", "Named", "Pace", "boot", "fill", "refused")

# Records run between two looks at the clock: few at first, then what takes this many seconds.
_FIRST_PIECE = 256
_PIECE_SECONDS = 0.1


class Named(NamedTuple):
    """How many processes, VMs and inodes there are before the first record; VM i is of process i."""

    processes: int
    vms: int
    inodes: int


ONE = Named(1, 1, 1)
"""Of a trace of one VM: one of each."""


def boot(lowered: Lowered, config: Config, named: Named = ONE) -> Machine:
    """A machine with its processes and VMs. InputError where this computer cannot model it."""
    from pgemu.objects.machine import Machine

    if lowered.kind == "process":
        return boot_processes(lowered, config)
    size = lowered.layout.inode_size * named.inodes
    try:
        machine = Machine(config)
    except (MemoryError, OSError):
        raise InputError(f"{size_text(size)} of guest memory: more than this computer can model") from None
    try:
        processes = [machine.create_process() for _ in range(named.processes)]
        for process in processes[: named.vms]:
            machine.create_vm(process)
    except OSError as error:
        raise InputError(
            f"{named.processes} processes and {named.vms} VMs ({error.strerror})", lowered.source
        ) from None
    return machine


def fill(machine: Machine, lowered: Lowered, inodes: int = 1) -> tuple[GuestMemfd, DevicesOfRun | None]:
    """The inodes, of which the first is returned, and the address spaces of devices that a trace names."""
    guests = lowered.guests or (Guest(lowered.layout, lowered.init),) * inodes
    try:
        made = [machine.create_guest_memfd(one.layout.inode_size, shared=one.init == "shared") for one in guests]
    except OSError as error:
        raise InputError(f"{len(guests)} inodes ({error.strerror})", lowered.source) from None
    return made[0], DevicesOfRun.create(machine, lowered)


def refused(lowered: Lowered, config: Config, versions: Versions) -> str:
    """What a version's code refuses and the trace needs, or "": virt/kvm/guest_memfd.c:kvm_gmem_create()."""
    version = LIKE[versions.like]
    shared = lowered.init == "shared" and config.page_order != 0
    if not shared or version.shared_huge or config.design != "restructure":
        return ""
    return f"{versions.like} refuses huge pages that are shared at first (-EINVAL)"


class Pace:
    """How many records to run in one go, so that each takes about a tenth of a second."""

    def __init__(self) -> None:
        self.piece = _FIRST_PIECE

    def took(self, records: int, seconds: float) -> None:
        """So many records took so long."""
        self.piece = max(1, min(4 * self.piece, int(records * _PIECE_SECONDS / max(seconds, 1e-6))))
