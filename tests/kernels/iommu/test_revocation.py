"""Random conversions and holes of a guest_memfd that devices map without references, against a model of sets.

The model knows which page of the file each I/O page may name and which of them are entered. It shares no code with the
kernels; leaves are read from memory by pins.leaves_of().
"""

from __future__ import annotations

from typing import Any, ClassVar

from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pgemu.objects.devices import Ioas
from pgemu.objects.io_space import IoDevice
from pgemu.objects.machine import Config, Machine
from pgemu.objects.pins import leaves_of
from pgemu_kernels import words as W
from pgemu_kernels.words.events import Gauge
from pgemu_kernels.words.operations import Flag, Operation

PAGE, BLOCK = W.PAGE_4K, 512
BLOCKS = 3
PAGES = BLOCK * BLOCKS
IOVA = 0x40_0000_0000
WAYS = ("none", "notifier", "revoke", "mirror")


class Space:
    """An IOAS: areas by I/O page (first, pages, page of the file), and what is entered: I/O page -> frame."""

    def __init__(self, ioas: Ioas, way: str) -> None:
        self.ioas, self.way = ioas, way
        self.device: IoDevice | None = None
        self.areas: dict[int, tuple[int, int]] = {}
        self.entered: dict[int, int] = {}

    def names(self, pages: set[int]) -> dict[int, int]:
        """I/O pages of areas over some pages of the file: I/O page -> page of the file."""
        return {
            start + i: first + i
            for start, (count, first) in self.areas.items()
            for i in range(count)
            if first + i in pages
        }

    def found(self, machine: Machine) -> dict[int, int]:
        """What its table maps: I/O page -> frame."""
        if not self.ioas.root:
            return {}
        starts, sizes = leaves_of(machine.arrays.ram, self.ioas.table.format, self.ioas.root)
        return {
            int(iova) - (IOVA >> 12) + i: int(pfn) + i
            for (iova, pfn), size in zip(starts.tolist(), sizes.tolist(), strict=True)
            for i in range(size)
        }


class RevocationMachine(RuleBasedStateMachine):
    """Two address spaces over one file."""

    page_size: ClassVar = W.PAGE_2M

    @initialize(
        design=st.sampled_from(["restructure", "pfnmap"]), units=st.sampled_from(["vtd vtd", "amd vtd", "amd amd"]),
        ways=st.tuples(st.sampled_from(WAYS), st.sampled_from(WAYS)), shared=st.booleans(),
        kernel=st.sampled_from(["6.12", "6.18", "7.3"]), order=st.sampled_from(["", "rfc2", "fixup", "jan2026"]),
        seed=st.integers(0, 3),
    )  # fmt: skip
    def begin(self, design: Any, units: str, ways: Any, shared: bool, kernel: Any, order: Any, seed: int) -> None:
        chosen: dict[str, Any] = {"order": order} if order and design == "restructure" else {}
        self.machine = Machine(
            Config(
                design, pool=(BLOCKS + 1) << 21, page_size=W.PAGE_2M, kernel=kernel, seed=seed, punch="zero", **chosen
            )
        )
        self.gmem = self.machine.create_guest_memfd(PAGES * PAGE, shared=shared)
        self.process = self.machine.create_process()
        self.vm = self.machine.create_vm(self.process, kind="sw")
        assert self.vm.bind(self.gmem, gpa=0).status == 0
        iommufd = self.machine.create_iommufd()
        self.spaces = [
            Space(iommufd.create_ioas(unit, guest_memfd=way), way)
            for unit, way in zip(units.split(), ways, strict=True)
        ]
        self.shared = set(range(PAGES)) if shared else set()
        self.frames: dict[int, int] = {}  # of pages that are backed
        self.open = True

    def mappable(self, names: dict[int, int]) -> dict[int, int]:
        """What of I/O pages may be entered, by the frames that there are now."""
        return {at: self.frames[page] for at, page in names.items() if page in self.shared and page in self.frames}

    # ------------------------------------------------------------------ the file

    @rule(block=st.integers(0, BLOCKS - 1))
    def allocate(self, block: int) -> None:
        """Nothing is entered by itself."""
        if not self.open:
            return
        assert self.gmem.allocate(block * BLOCK * PAGE, BLOCK * PAGE).status == 0
        self._note_frames()

    def _note_frames(self) -> None:
        self.frames = {}
        for block in range(BLOCKS):
            status, pfn = self.gmem.get_reference(block * BLOCK * PAGE)
            if status == 0:
                assert self.gmem.put_reference(pfn).status == 0
                self.frames.update({block * BLOCK + i: pfn + i for i in range(BLOCK)})

    @rule(page=st.integers(0, PAGES - 1))
    def touch(self, page: int) -> None:
        if self.open:
            assert self.vm.touch(page * PAGE, write=True).status >= 0
            self._note_frames()

    @rule(
        first=st.integers(0, PAGES - 1), count=st.sampled_from([1, 2, 7, 64, BLOCK, PAGES]), shared=st.booleans(),
        aligned=st.booleans(), stepped=st.booleans(), starved=st.booleans(),
    )  # fmt: skip
    def convert(self, first: int, count: int, shared: bool, aligned: bool, stepped: bool, starved: bool) -> None:
        if not self.open:
            return
        first = first // BLOCK * BLOCK if aligned else first
        count = min(count, PAGES - first)
        pages = set(range(first, first + count))
        changed = pages - self.shared if shared else pages & self.shared
        counted = [space.ioas.revocations for space in self.spaces]
        if starved:
            self.machine.limit_frames(first % 3)
        status = self._convert(first, count, shared, stepped)
        self.machine.limit_frames(None)
        assert status in ((0, -W.ENOMEM) if starved else (0,))
        if status == 0:
            self.shared = self.shared | pages if shared else self.shared - pages
        else:  # what restructure's own failures leave is their tests' business
            self.shared = {i for i in range(PAGES) if self._is_shared(i)}
        for space, before in zip(self.spaces, counted, strict=True):
            self._compare(space, set() if shared else changed, changed if shared else set(), before, starved)

    def _is_shared(self, page: int) -> bool:
        bits = int(self.machine.arrays.state[int(W.STATE_INODES) + self.gmem.inode * W.I_WORDS + int(W.I_WORD)])
        return bool(int(self.machine.arrays.state[bits + page // 64]) >> page % 64 & 1)

    def _convert(self, first: int, count: int, shared: bool, stepped: bool) -> int:
        if not stepped:
            return self.gmem.convert(first * PAGE, count * PAGE, shared=shared).status
        asked = {"object_": self.gmem.inode, "offset": first * PAGE, "length": count * PAGE}
        self.machine.begin(1, Operation.CONVERT, flags=Flag.SHARED if shared else Flag.PRIVATE, **asked)
        while self.machine.step(1) == W.GO:
            self._no_private()
        return self.machine.result(1).status

    def _no_private(self) -> None:
        """Between any two steps: what is private is reached by no device that the kernel takes it from."""
        for space in self.spaces:
            if space.way != "none":
                private = space.names({i for i in range(PAGES) if not self._is_shared(i)})
                assert not private.keys() & space.found(self.machine).keys()

    @rule(first=st.integers(0, PAGES - 1), count=st.sampled_from([1, 7, BLOCK, 2 * BLOCK]), aligned=st.booleans())
    def punch(self, first: int, count: int, aligned: bool) -> None:
        if not self.open:
            return
        first = first // BLOCK * BLOCK if aligned else first
        count = min(count, PAGES - first)
        counted = [space.ioas.revocations for space in self.spaces]
        assert self.gmem.punch_hole(first * PAGE, count * PAGE).status == 0
        pages = set(range(first, first + count))
        self._note_frames()
        for space, before in zip(self.spaces, counted, strict=True):
            self._compare(space, pages, set(), before, False)

    @rule()
    def close(self) -> None:
        assert self.gmem.close().status == (0 if self.open else -W.EBADF)
        self.open = False
        self.frames = {}
        for space in self.spaces:
            if space.way != "none":
                for at in space.names(set(range(PAGES))):
                    space.entered.pop(at, None)

    # ------------------------------------------------------------------ devices

    @rule(which=st.integers(0, 1), slot=st.integers(0, 2), first=st.integers(0, PAGES - 1), count=st.integers(1, PAGES))
    def map_file(self, which: int, slot: int, first: int, count: int) -> None:
        """Slots of 4G each, aligned as the file is."""
        space = self.spaces[which]
        start = (slot << 20) + first
        count = min(count, PAGES - first)
        done = space.ioas.map_file(IOVA + start * PAGE, count * PAGE, self.process, self.gmem, first * PAGE)
        if not self.open:
            assert done.status == -W.EINVAL
        elif any(a < start + count and start < a + n for a, (n, _) in space.areas.items()):
            assert done.status == -W.EEXIST
        else:
            assert done.status == 0
            space.areas[start] = count, first
            if space.device:
                names = {start + i: first + i for i in range(count)}
                space.entered.update(self.mappable(names))

    @rule(which=st.integers(0, 1), slot=st.integers(0, 2))
    def unmap(self, which: int, slot: int) -> None:
        space = self.spaces[which]
        for start in [a for a in space.areas if a >> 20 == slot]:
            count, _ = space.areas.pop(start)
            assert space.ioas.unmap(IOVA + start * PAGE, count * PAGE) == (0, count * PAGE)
            for at in range(start, start + count):
                space.entered.pop(at, None)

    @rule(which=st.integers(0, 1))
    def attach_or_detach(self, which: int) -> None:
        space = self.spaces[which]
        if space.device:
            space.device.detach()
            space.device, space.entered = None, {}
        else:
            space.device = space.ioas.attach()
            space.entered = self.mappable(space.names(set(range(PAGES))))

    # ------------------------------------------------------------------ what is compared

    def _compare(self, space: Space, taken: set[int], given: set[int], before: Any, starved: bool) -> None:
        """After pages of the file were taken, or given: what is entered, and what was counted."""
        if not space.device or space.way == "none":
            return
        found = space.found(self.machine)
        lost = space.names(taken).keys() & space.entered.keys()
        least = {at: pfn for at, pfn in space.entered.items() if at not in lost}
        returned = space.way in ("revoke", "mirror")
        most = self.mappable(space.names(set(range(PAGES))))
        if returned:
            again = self.mappable(space.names(taken | given))  # a hole that zeroes, what became shared
            least.update(again)
        done = space.ioas.revocations
        revoked, widened = done.revoked - before.revoked, done.widened - before.widened
        assert revoked - widened == len(lost)
        assert found.items() <= most.items()
        if space.way == "notifier":
            assert found.items() <= least.items()
            assert widened == len(least) - len(found)
        elif not starved:
            assert least.items() <= found.items()
            assert done.lost == before.lost
            if space.way == "mirror":
                assert found == least
                assert widened == 0
        space.entered = found

    @invariant()
    def same(self) -> None:
        if not hasattr(self, "spaces"):
            return
        total = 0
        for space in self.spaces:
            found = space.found(self.machine)
            assert found == space.entered
            total += len(found)
        assert self.machine.statistics.gauge(Gauge.IOMMU_PAGES) == total
        assert self.machine.check() == 0, self.machine.findings


TestRevocation = RevocationMachine.TestCase
TestRevocation.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
