"""Devices of a trace: their address spaces on a machine, by which door they map guest memory, and what they did.

Column `space` of records of devices is the number of an address space. Each is made before the first record, with one
device; Config.iommu, dma and iommu_unmaps say what it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pgemu.errors import InputError
from pgemu.machine.config import BY_KERNEL
from pgemu.trace.devices import ByUserSpace, of_devices, through, with_unmaps
from pgemu.trace.lowered import Lowered
from pgemu_kernels.words.events import Event
from pgemu_kernels.words.operations import Operation
from pgemu_kernels.words.rows import DOMAINS, NO_INODE

if TYPE_CHECKING:
    from pgemu.machine.config import Config
    from pgemu.objects.devices import Ioas, IoSpace, Unit
    from pgemu.objects.machine import Machine

__all__ = (
    "BY_USER_SPACE",
    "COUNTS",
    "Arrangement",
    "DeviceRun",
    "DevicesOfRun",
    "arranged",
    "arrangement",
    "has_devices",
)

BY_USER_SPACE = ("vmm", "vmm-late", "notifier")
"""Of Config.iommu_unmaps those in which user space follows conversions. Behind a notifier it does so late: the kernel
has unmapped by then, and never maps again."""


@dataclass(frozen=True)
class Arrangement:
    """How devices reach guest memory.

    Attributes:
        iommu, dma, iommu_unmaps: as in Config, with what None stands for
        by_file: guest memory is mapped as pages of the guest_memfd, else by the process's addresses
        tracked: VFIO takes memory under VM_PFNMAP, without references
    """

    iommu: Unit
    dma: Literal["vfio", "iommufd"]
    iommu_unmaps: str
    by_file: bool
    tracked: bool


def has_devices(lowered: Lowered) -> bool:
    """Whether a trace has records of devices."""
    return bool(of_devices(lowered.records).any())


def arrangement(lowered: Lowered, config: Config) -> Arrangement:
    """What a machine's devices are for a trace.

    Without Config.dma it is iommufd where the kernel unmaps or a map of the trace names the guest_memfd, else VFIO.
    iommufd takes a guest_memfd by file in every what-if; VFIO pins what has references even then.
    """
    records = lowered.records
    named = bool(((records.op == Operation.DMA_MAP) & (records.object != NO_INODE)).any())
    unmaps = config.iommu_unmaps
    dma = config.dma or ("iommufd" if unmaps in BY_KERNEL or named else "vfio")
    what_if = unmaps != "refused"
    unit: Unit = config.iommu or ("vtd" if config.stage2 == "ept" else "amd")
    return Arrangement(unit, dma, unmaps, dma == "iommufd" and what_if, dma == "vfio" and what_if)


def arranged(lowered: Lowered, config: Config) -> tuple[Lowered, ByUserSpace]:
    """A trace as devices of a machine have it: maps named as their door takes them, and what user space adds.

    With Config.dma or a what-if; else the trace is as it is.
    """
    nothing = ByUserSpace(0, 0)
    if not has_devices(lowered):
        return lowered, nothing
    how = arrangement(lowered, config)
    if config.dma or how.iommu_unmaps != "refused":
        from dataclasses import replace

        records = through(lowered.records, lowered.layout.regions, "file" if how.by_file else "address")
        lowered = replace(lowered, records=records)
    if how.iommu_unmaps in BY_USER_SPACE:
        return with_unmaps(lowered, late=how.iommu_unmaps != "vmm")
    return lowered, nothing


@dataclass(frozen=True)
class DevicesOfRun:
    """The address spaces that a trace names, each with a device."""

    how: Arrangement
    spaces: tuple[IoSpace, ...]

    @classmethod
    def create(cls, machine: Machine, lowered: Lowered) -> DevicesOfRun | None:
        """Make them; None where the trace names none.

        :raises InputError: a number past words.DOMAINS, or no memory for a root
        """
        used = of_devices(lowered.records)
        if not used.any():
            return None
        named = np.unique(lowered.records.space[used]).tolist()
        if named[-1] >= DOMAINS:
            row = int(np.argmax(used & (lowered.records.space >= DOMAINS)))
            what = f"row {row}: space {named[-1]} of a device"
            raise InputError(f"{what}, expected the number of an address space below {DOMAINS}", lowered.source)
        how = arrangement(lowered, machine.config)
        made = [_create(machine, how) for _ in range(named[-1] + 1)]
        try:
            for number in named:
                made[number].attach()
        except OSError as error:
            raise InputError(f"no memory for address spaces of devices ({error})", lowered.source) from None
        return cls(how, tuple(made))

    def close(self) -> None:
        """The VMM goes, and with it what devices may reach."""
        from pgemu.objects.devices import VfioContainer

        for space in self.spaces:
            if isinstance(space, VfioContainer):
                space.close()
            else:
                space.unmap_all()


def _create(machine: Machine, how: Arrangement) -> IoSpace:
    if how.dma == "vfio":
        return machine.create_vfio_container(how.iommu, policy="tracked" if how.tracked else "linux")
    kinds: dict[str, Any] = {"vmm": "none", "vmm-late": "none"}
    return machine.create_iommufd().create_ioas(how.iommu, guest_memfd=kinds.get(how.iommu_unmaps, how.iommu_unmaps))


# --------------------------------------------------------------------------- what they did

COUNTS = {
    "accesses": "accesses",
    "faulted": "of them faulted",
    "stale_private": "reached private memory",
    "stale_freed": "reached freed memory",
    "machine_checks": "of these machine checks",
    "maps_refused": "maps refused",
    "conversions_pinned": "conversions -EAGAIN for pins",
    "revoked": "4K pages revoked",
    "widened": "of them shared ones",
    "returned": "4K pages returned",
    "lost": "not returned, no memory",
    "cut": "large entries cut",
    "joined": "large entries joined",
    "windows": "windows without shared pages",
    "vmm_unmaps": "unmaps added by user space",
    "vmm_maps": "maps added by user space",
}
"""Counts of DeviceRun, as people read them."""


@dataclass(frozen=True)
class DeviceRun:
    """What devices did on one machine.

    Attributes:
        how: how they reach guest memory
        accesses, faulted: DMA_ACCESS, and those that the unit refused
        stale_private, stale_freed: 4K pages that an access reached through an entry that outlived their conversion to
            private, or their page cache
        machine_checks: of stale_private the writes to a TDX VM's, which end the host
        maps_refused: DMA_MAP that ended in an error
        conversions_pinned: conversions that ended with -EAGAIN at a folio that may be pinned
        revoked, widened, returned, lost, cut, joined, windows, window_ns: objects.devices.Revocations, of all spaces
        vmm_unmaps, vmm_maps: records that user space added
    """

    how: Arrangement
    accesses: int
    faulted: int
    stale_private: int
    stale_freed: int
    machine_checks: int
    maps_refused: int
    conversions_pinned: int
    revoked: int
    widened: int
    returned: int
    lost: int
    cut: int
    joined: int
    windows: int
    window_ns: tuple[float, float]
    vmm_unmaps: int
    vmm_maps: int

    @property
    def stale(self) -> int:
        """Pages that devices reached and should not have."""
        return self.stale_private + self.stale_freed

    @classmethod
    def of(cls, machine: Machine, devices: DevicesOfRun, added: ByUserSpace) -> DeviceRun:
        """Collect it, before anything is closed."""
        statistics = machine.statistics
        results = {op: statistics.results(op) for op in (Operation.DMA_ACCESS, Operation.DMA_MAP)}
        refused = {op: sum(n for status, n in found.items() if status < 0) for op, found in results.items()}
        spaces: list[Ioas] = [space for space in devices.spaces if devices.how.by_file]  # type: ignore[misc]
        found = [space.revocations for space in spaces]
        names = ("revoked", "widened", "returned", "lost", "cut", "joined", "windows")
        return cls(
            devices.how, sum(results[Operation.DMA_ACCESS].values()), refused[Operation.DMA_ACCESS],
            statistics.event(Event.IOMMU_STALE_PRIVATE), statistics.event(Event.IOMMU_STALE_FREED),
            machine.machine_checks, refused[Operation.DMA_MAP],
            statistics.event(Event.CONVERT_PINNED, Operation.CONVERT),
            window_ns=(sum(one.window_ns[0] for one in found), sum(one.window_ns[1] for one in found)),
            vmm_unmaps=added.unmaps, vmm_maps=added.maps,
            **{name: sum(getattr(one, name) for one in found) for name in names},
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts, lists and numbers; counts are ints, times are nanoseconds."""
        how = {name: getattr(self.how, name) for name in ("iommu", "dma", "iommu_unmaps")}
        return {**how, **{name: getattr(self, name) for name in COUNTS}, "window_ns": list(self.window_ns)}
