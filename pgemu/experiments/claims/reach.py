"""A device that has a guest_memfd's memory, for claims about devices.

It has it through a "door": "vfio" and a policy of Machine.create_vfio_container() maps the process's mapping, "iommufd"
and a mode of Iommufd.create_ioas() the file, without references.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pgemu.experiments.claims.claim import HVA, Figure, Scene, Setting, Switch
from pgemu.machine.designs import Design
from pgemu.objects.devices import Ioas, IoSpace, VfioContainer
from pgemu.objects.io_space import IoDevice
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Event

__all__ = ("DMA", "IOVA", "MAILS", "OFFSET", "UNITS", "Measured", "Reach", "both")

Measured = dict[str, Any]  # a value by name
MAILS = "iommufd and guest_memfd, mails of 2026-02-25"
UNITS = Switch("IOMMU", {"VT-d": {"unit": "vtd"}, "AMD": {"unit": "amd"}})
IOVA = 1 << 32
OFFSET = 5 * W.PAGE_4K  # in a huge page, of what is converted
DMA = b"\xda" * 8  # what a device writes


class Reach(NamedTuple):
    """A device that has a scene's memory from IOVA on. status: of the map."""

    scene: Scene
    space: IoSpace
    device: IoDevice
    status: int

    @classmethod
    def through(cls, setting: Setting, design: Design, count: int, **given: Any) -> Reach:
        """All of so many huge pages, shared and backed, through the door that a setting names."""
        scene = setting.scene(design, count + 1, shared=True, **given)
        if scene.gmem.allocate(0, count * setting.page_size).status:
            raise RuntimeError("fallocate of a file that the pool has room for")
        door, _, mode = setting.what.get("door", "iommufd none").partition(" ")
        unit, size = setting.what.get("unit", "vtd"), count * setting.page_size
        space: VfioContainer | Ioas
        if door == "vfio":
            space = scene.machine.create_vfio_container(unit, policy=mode)
            device = space.attach()
            return cls(scene, space, device, space.map(IOVA, size, scene.process, HVA).status)
        space = scene.machine.create_iommufd().create_ioas(unit, guest_memfd=mode)
        device = space.attach()
        return cls(scene, space, device, space.map_file(IOVA, size, scene.process, scene.gmem, 0).status)

    def writes(self, offset: int) -> bool:
        """Whether a write reaches memory."""
        try:
            self.device.write(IOVA + offset, DMA)
        except OSError as error:
            if error.errno != W.EFAULT:
                raise
            return False
        return True

    def stale(self) -> int:
        """Accesses so far to what is private, free or somebody else's."""
        statistics = self.scene.machine.statistics
        return sum(statistics.event(event) for event in (Event.IOMMU_STALE_PRIVATE, Event.IOMMU_STALE_FREED))

    def reaches_wrongly(self, offset: int) -> bool:
        """Whether a write lands in such memory."""
        before = self.stale()
        return self.writes(offset) and self.stale() != before


def both(
    setting: Setting, tried: Callable[[Setting, Design], Measured], whats: Mapping[str, tuple[str, str]]
) -> dict[str, Figure]:
    """tried(setting, design): a value by name; whats: what each is, and its unit."""
    trial, other = tried(setting, setting.on_trial), tried(setting, setting.other)
    return {name: Figure(what, trial[name], other[name], unit) for name, (what, unit) in whats.items()}
