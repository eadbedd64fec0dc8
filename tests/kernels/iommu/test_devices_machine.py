"""Sequences over a process, a VFIO container and two IOAS against a model of dicts that shares no code with them.

The model knows pages of memory as objects: what the process has at an address, what each I/O page names. Pages have
contents of their own, so that a device which reaches another page than the model says is found.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from typing import Any, ClassVar

from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pgemu.objects.devices import Accounts, Ioas, VfioContainer
from pgemu.objects.io_space import IoDevice
from pgemu.objects.machine import Config, Machine
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Gauge

PAGE = W.PAGE_4K
VA = 0x7300_0000_0000
IOVA = 0x40_0000_0000
PAGES = 12  # of the process
ROOM = 24  # I/O pages that are used
_numbers = count(1)


@dataclass(eq=False)
class Page:
    """A page of memory: what it holds, how many pins it has."""

    content: int = 0
    pins: int = 0


@dataclass
class Pages:
    """What a map was of, io_pages of iommufd: pages of the process from one on; those that are pinned, and by how many
    areas."""

    first: int
    writable: bool
    pinned: dict[int, tuple[Page, int]] = field(default_factory=dict)


@dataclass
class Area:
    """A mapping: I/O pages, rights, the pages that they name while there is a domain."""

    start: int
    size: int
    read: bool
    write: bool
    pages: Pages
    offset: int = 0
    named: list[Page] | None = None

    @property
    def end(self) -> int:
        return self.start + self.size


class Space:
    """A container or an IOAS: areas by their start."""

    def __init__(self) -> None:
        self.areas: dict[int, Area] = {}
        self.attached = 0

    def meeting(self, start: int, size: int) -> list[Area]:
        return [a for _, a in sorted(self.areas.items()) if a.start < start + size and start < a.end]


class DevicesMachine(RuleBasedStateMachine):
    """Both at once."""

    MEMLOCK: ClassVar = 20

    @initialize(
        unit=st.sampled_from(["vtd", "amd"]), version=st.sampled_from([1, 2]), limit=st.integers(1, 4),
        kernel=st.sampled_from(["6.12", "6.18", "7.3"]), seed=st.integers(0, 3),
    )  # fmt: skip
    def begin(self, unit: Any, version: Any, limit: int, kernel: Any, seed: int) -> None:
        self.machine = Machine(Config(pool=W.PAGE_2M, page_size=W.PAGE_2M, kernel=kernel, seed=seed))
        self.process = self.machine.create_process()
        self.process.mmap_anonymous(VA, PAGES * PAGE, 3)
        self.container: VfioContainer = self.machine.create_vfio_container(
            unit, version=version, dma_entry_limit=limit, memlock=self.MEMLOCK * PAGE
        )
        iommufd = self.machine.create_iommufd()
        self.ioas: list[Ioas] = [iommufd.create_ioas(unit) for _ in range(2)]
        self.version, self.limit = version, limit
        self.devices: list[IoDevice | None] = [self.container.attach(), None, None]
        self.spaces = [Space(), Space(), Space()]
        self.spaces[0].attached = 1
        self.memory: dict[int, Page] = {}  # of the process
        self.locked = 0

    # ------------------------------------------------------------------ the process

    @rule(page=st.integers(0, PAGES - 1))
    def store(self, page: int) -> None:
        self.process.touch(VA + page * PAGE, write=True)
        content = next(_numbers)
        _, _, entry = self.process.walk(VA + page * PAGE)[-1]
        self.machine.arrays.ram[(entry & 0xF_FFFF_FFFF_F000) // 8] = content
        self.memory.setdefault(page, Page()).content = content

    @rule(page=st.integers(0, PAGES - 1), size=st.integers(1, PAGES))
    def drop(self, page: int, size: int) -> None:
        size = min(size, PAGES - page)
        assert self.process.madvise_dontneed(VA + page * PAGE, size * PAGE).status == 0
        for i in range(page, page + size):
            self.memory.pop(i, None)

    @rule()
    def fork(self) -> None:
        """What is pinned stays the parent's."""
        self.process.fork().exit()

    def page_of(self, page: int) -> Page | None:
        return self.memory.setdefault(page, Page()) if 0 <= page < PAGES else None

    # ------------------------------------------------------------------ VFIO

    @rule(
        start=st.integers(0, ROOM - 1), size=st.integers(0, 6), page=st.integers(-1, PAGES), read=st.booleans(),
        write=st.booleans(),
    )  # fmt: skip
    def dma_map(self, start: int, size: int, page: int, read: bool, write: bool) -> None:
        done = self.container.map(
            IOVA + start * PAGE, size * PAGE, self.process, VA + page * PAGE, read=read, write=write
        )
        assert done.status == self._dma_map(start, size, page, read, write)

    def _dma_map(self, start: int, size: int, page: int, read: bool, write: bool) -> int:
        space = self.spaces[0]
        if not size or not (read or write):
            return -W.EINVAL
        if space.meeting(start, size):
            return -W.EEXIST
        if len(space.areas) >= self.limit:
            return -W.ENOSPC
        area = Area(start, size, read, write, Pages(page, write), named=[])
        if space.attached:
            for i in range(page, page + size):
                found = self.page_of(i)
                if found is None:
                    return -W.EFAULT
                if self.locked + (i - page) + 1 > self.MEMLOCK:
                    return -W.ENOMEM
                assert area.named is not None
                area.named.append(found)
            self.locked += size
            for named in area.named or ():
                named.pins += 1
        else:
            area.named = None
        space.areas[start] = area
        return 0

    def _dma_drop(self, area: Area) -> None:
        for page in area.named or ():
            page.pins -= 1
            self.locked -= 1
        del self.spaces[0].areas[area.start]

    @rule(start=st.integers(0, ROOM - 1), size=st.integers(0, ROOM))
    def dma_unmap(self, start: int, size: int) -> None:
        done = self.container.unmap(IOVA + start * PAGE, size * PAGE)
        met = self.spaces[0].meeting(start, size)
        if not size:
            assert done == (-W.EINVAL, 0)
            return
        if self.version == 2 and any(a.start < start or a.end > start + size for a in met):
            assert done == (-W.EINVAL, 0)
            return
        if self.version == 1 and met and met[0].start < start:
            met = []
        for area in met:
            self._dma_drop(area)
        assert done == (0, sum(a.size for a in met) * PAGE)

    # ------------------------------------------------------------------ iommufd

    def _fill(self, area: Area) -> bool:
        named = []
        for i in range(area.offset, area.offset + area.size):
            held, users = area.pages.pinned.get(i, (None, 0))
            found = held or self.page_of(area.pages.first + i)
            if found is None:
                for k, page in enumerate(named):
                    self._release(area.pages, area.offset + k, page)
                return False
            if not held:
                found.pins += 1
            area.pages.pinned[i] = found, users + 1
            named.append(found)
        area.named = named
        return True

    @staticmethod
    def _release(pages: Pages, index: int, page: Page) -> None:
        _, users = pages.pinned.pop(index)
        if users > 1:
            pages.pinned[index] = page, users - 1
        else:
            page.pins -= 1

    def _unfill(self, area: Area) -> None:
        for k, page in enumerate(area.named or ()):
            self._release(area.pages, area.offset + k, page)
        area.named = None

    @rule(
        which=st.integers(1, 2), start=st.integers(0, ROOM - 1), size=st.integers(0, 6), page=st.integers(-1, PAGES),
        read=st.booleans(), write=st.booleans(),
    )  # fmt: skip
    def io_map(self, which: int, start: int, size: int, page: int, read: bool, write: bool) -> None:
        done = self.ioas[which - 1].map(
            IOVA + start * PAGE, size * PAGE, self.process, VA + page * PAGE, read=read, write=write
        )
        space = self.spaces[which]
        expected = 0
        if not size or not (read or write):
            expected = -W.EINVAL
        elif space.meeting(start, size):
            expected = -W.EEXIST
        else:
            area = Area(start, size, read, write, Pages(page, write))
            if space.attached and not self._fill(area):
                expected = -W.EFAULT
            else:
                space.areas[start] = area
        assert done == (expected, 0 if expected else IOVA + start * PAGE)

    @rule(
        which=st.integers(1, 2), start=st.integers(0, ROOM - 1), size=st.integers(1, 6), source=st.integers(1, 2),
        at=st.integers(0, ROOM - 1), write=st.booleans(),
    )  # fmt: skip
    def io_copy(self, which: int, start: int, size: int, source: int, at: int, write: bool) -> None:
        done = self.ioas[which - 1].copy(
            IOVA + start * PAGE, size * PAGE, self.ioas[source - 1], IOVA + at * PAGE, write=write
        )
        met = self.spaces[source].meeting(at, size)
        covered = sum(min(a.end, at + size) - max(a.start, at) for a in met)
        expected = 0
        if covered != size:
            expected = -W.ENOENT
        elif self.spaces[which].meeting(start, size):
            expected = -W.EEXIST
        elif write and not all(a.pages.writable for a in met):
            expected = -W.EPERM
        made: list[Area] = []
        for a in met if not expected else ():
            first, last = max(a.start, at), min(a.end, at + size)
            area = Area(start + first - at, last - first, True, write, a.pages, a.offset + first - a.start)
            if self.spaces[which].attached and not self._fill(area):
                expected = -W.EFAULT
                break
            made.append(area)
        for area in made:
            if expected:
                self._unfill(area)
            else:
                self.spaces[which].areas[area.start] = area
        assert done == (expected, 0 if expected else IOVA + start * PAGE)

    @rule(which=st.integers(1, 2), start=st.integers(0, ROOM - 1), size=st.integers(0, ROOM))
    def io_unmap(self, which: int, start: int, size: int) -> None:
        done = self.ioas[which - 1].unmap(IOVA + start * PAGE, size * PAGE)
        gone, status = 0, 0 if size else -W.EINVAL
        for area in self.spaces[which].meeting(start, size) if size else ():
            if area.start < start or area.end > start + size:
                status = -W.ENOENT
                break
            self._unfill(area)
            del self.spaces[which].areas[area.start]
            gone += area.size
        if not gone and not status:
            status = -W.ENOENT
        assert done == (status, 0 if status else gone * PAGE)

    @rule(which=st.integers(0, 2))
    def attach_or_detach(self, which: int) -> None:
        device, space = self.devices[which], self.spaces[which]
        if device is not None:
            device.detach()
            self.devices[which], space.attached = None, 0
            for area in list(space.areas.values()):
                if which:
                    self._unfill(area)
                else:
                    self._dma_drop(area)
            return
        try:
            self.devices[which] = (self.container if not which else self.ioas[which - 1]).attach()
            status = 0
        except OSError as error:
            status = -int(error.errno or 0)
        assert status == self._attach(which)

    def _attach(self, which: int) -> int:
        space = self.spaces[which]
        space.attached = 1
        waiting = [area for _, area in sorted(space.areas.items())]
        if which:
            for i, area in enumerate(waiting):
                if not self._fill(area):
                    for before in waiting[:i]:
                        self._unfill(before)
                    space.attached = 0
                    return -W.EFAULT
            return 0
        for area in waiting:  # the container maps again what was mapped without a device
            del space.areas[area.start]
            status = self._dma_map(area.start, area.size, area.pages.first, area.read, area.write)
            if status:
                for other in list(space.areas.values()):
                    self._dma_drop(other)
                space.attached = 0
                return status
        return 0

    # ------------------------------------------------------------------ devices

    @rule(which=st.integers(0, 2), at=st.integers(0, ROOM - 1), write=st.booleans())
    def access(self, which: int, at: int, write: bool) -> None:
        device = self.devices[which]
        if device is None:
            return
        met = self.spaces[which].meeting(at, 1)
        allowed = bool(met) and (met[0].write if write else met[0].read or self._reads_anyway(which))
        content = next(_numbers)
        try:
            if write:
                device.write(IOVA + at * PAGE, content.to_bytes(8, "little"))
            else:
                found = int.from_bytes(device.read(IOVA + at * PAGE, 8), "little")
            done = True
        except OSError as error:
            if error.errno != W.EFAULT:
                raise
            done = False
        assert done == allowed
        if not done:
            return
        named = met[0].named
        assert named is not None
        page = named[at - met[0].start]
        if write:
            page.content = content
        else:
            assert found == page.content

    def _reads_anyway(self, which: int) -> bool:
        """6.12's VT-d: what may be written may be read."""
        space = self.container if not which else self.ioas[which - 1]
        return self.machine.config.kernel == "6.12" and space.unit == "vtd"

    # ------------------------------------------------------------------ what is compared

    @invariant()
    def same(self) -> None:
        if not hasattr(self, "spaces"):
            return
        every: dict[int, Pages] = {}
        for space in self.spaces[1:]:
            for area in space.areas.values():
                every[id(area.pages)] = area.pages
        pinned = sum(len(pages.pinned) for pages in every.values())
        assert Accounts.of(self.process) == (self.locked, pinned)
        assert self.machine.statistics.gauge(Gauge.PAGES_PINNED) == self.locked + pinned
        assert [self.container.mappings, *(ioas.mappings for ioas in self.ioas)] == [len(s.areas) for s in self.spaces]
        assert self.machine.check() == 0, self.machine.findings


TestDevices = DevicesMachine.TestCase
TestDevices.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
