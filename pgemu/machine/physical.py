"""The physical memory of a machine: what lies at an address, and which frames were ever in use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pgemu.machine.arguments import OfMachine
from pgemu.machine.arrays import I64, U64, Bools, Integers
from pgemu.machine.field_rules import shown
from pgemu_kernels import words as W

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pgemu_kernels.engine.handle import Machine as Arrays

__all__ = ("PhysicalMemory",)

Array = np.ndarray[Any, Any]

_PIECE = 1 << 20  # frames looked at in one go
_RANGES = 1024  # an image has at most so many: readers walk their list


class PhysicalMemory(OfMachine):
    """Physical addresses of a machine: the metadata zone, whose frames are `ram`, and the HugeTLB zone.

    A frame of the HugeTLB zone that was never written holds zeroes. See Core.words() and Core.load().

    >>> machine = Machine(Config("pfnmap", pool=2 << 20, page_size=2 << 20))
    >>> memory = machine.memory
    """

    def __init__(self, arrays: Arrays) -> None:
        self._arrays = arrays
        state = arrays.state
        self._ram_end = arrays.ram.size * 8
        self._contents = int(state[W.R_CONTENTS])  # where a uint32 per frame begins in `counts`
        self._pool_start = int(state[W.R_POOL_BASE]) << 12
        self._pool_end = self._pool_start + (int(state[W.R_GUEST_PAGES]) << 12)

    def __repr__(self) -> str:
        return f"PhysicalMemory(metadata below {self._ram_end:#x}, HugeTLB {self._pool_start:#x}-{self._pool_end:#x})"

    def holds(self, addresses: Integers) -> Bools:
        """bool[n]: whether the word at each address (uint64[n], multiples of 8) is memory.

        >>> memory.holds([0x1000, 1 << 51]).tolist()
        [True, False]
        """
        start, end = np.uint64(self._pool_start), np.uint64(self._pool_end)
        given = np.asarray(addresses, np.uint64)
        inside: Bools = (given < np.uint64(self._ram_end)) | ((given >= start) & (given < end))
        return inside

    def words(self, address: int, count: int) -> U64:
        """uint64[count] at a physical address; read-only. ValueError if unaligned or not all of it is memory.

        >>> memory.words(0x1000, 4).tolist()
        [0, 0, 0, 0]
        """
        if address & 7:
            raise ValueError(f"address {address:#x}: expected a multiple of 8")
        end = address + count * 8
        if end <= self._ram_end:
            found = self._arrays.ram[address >> 3 : end >> 3]
        elif self._pool_start <= address and end <= self._pool_end:
            found = self._guest_words(np.arange(address, end, 8, dtype=np.uint64))
        else:
            raise ValueError(f"address {address:#x} and count {count}: expected memory of the machine")
        found.flags.writeable = False
        return found

    def load(self, addresses: Integers) -> U64:
        """uint64[n]: the words at physical addresses (uint64[n]). ValueError if unaligned or not memory.

        >>> memory.load([0x1000, 0x1008]).tolist()
        [0, 0]
        """
        given = np.asarray(addresses, np.uint64)
        if (given & np.uint64(7)).any() or not self.holds(given).all():
            raise ValueError(f"addresses {shown(addresses)}: expected multiples of 8 within the machine's memory")
        ram = given < np.uint64(self._ram_end)
        found: U64 = np.empty(given.shape, np.uint64)
        found[ram] = self._arrays.ram[given[ram] >> np.uint64(3)]
        found[~ram] = self._guest_words(given[~ram])
        return found

    def _guest_words(self, addresses: U64) -> U64:
        """Words of the HugeTLB zone."""
        pages = (addresses - np.uint64(self._pool_start)) >> np.uint64(12)
        frames = self._arrays.counts[np.uint64(self._contents) + pages].astype(np.uint64)
        words: U64 = self._arrays.ram[(frames << np.uint64(9)) + (addresses >> np.uint64(3) & np.uint64(511))]
        words[frames == 0] = 0
        return words

    # ------------------------------------------------------------------ frames in use

    def ranges(self) -> list[tuple[int, int]]:
        """[(start, end)] in bytes, ascending: every frame that was ever handed out or has contents, and few others.

        At most _RANGES ranges: where use is scattered the narrowest gaps between them are included.

        >>> all(start < end for start, end in memory.ranges())
        True
        """
        used = np.concatenate([self.metadata_frames(), *self._guest_frames()])
        if not used.size:
            return []
        gaps = np.diff(used)
        wide = np.flatnonzero(gaps > 1)
        if wide.size >= _RANGES:
            widest = np.argpartition(gaps[wide], -(_RANGES - 1))[-(_RANGES - 1) :]
            wide = wide[widest]
        guest = np.searchsorted(used, self._pool_start >> 12)  # the zones may touch
        wide = np.union1d(wide, [guest - 1] if 0 < guest < used.size else []).astype(np.int64)
        starts = np.concatenate([used[:1], used[wide + 1]])
        ends = np.concatenate([used[wide], used[-1:]]) + 1
        return [(start << 12, end << 12) for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]

    def metadata_frames(self) -> I64:
        """int64, ascending: frames of the metadata zone that take_frame() ever gave, those of boot, and runs in use.

        >>> memory.metadata_frames().dtype
        dtype('int64')
        """
        state = self._arrays.state
        order = np.arange(int(state[W.R_FRESH]), dtype=np.uint64)
        frames = order * state[W.R_SEED_MULTIPLIER] + state[W.R_SEED_OFFSET] & state[W.R_FRAMES_MASK]
        frames = np.sort(frames[frames != 0]).astype(np.int64)
        first = int(state[W.R_FRAMES])
        boot = np.arange(first, first + int(state[W.R_BOOT_FRAMES]), dtype=np.int64)
        in_use = state[int(state[W.R_CONTIGUOUS_MAP]) :][: W.CONTIGUOUS_FRAMES // 64].astype("<u8").view(np.uint8)
        runs = np.flatnonzero(np.unpackbits(in_use, bitorder="little")) + int(state[W.R_CONTIGUOUS])
        return np.concatenate([frames, boot, runs])

    def _guest_frames(self) -> Iterator[Array]:
        """int64, ascending: frames of the HugeTLB zone that have contents."""
        if self._arrays.stats[int(W.STATS_GAUGES) + 2 * int(W.Gauge.CONTENT_FRAMES)] == 0:
            return
        pages = self._pool_end - self._pool_start >> 12
        for first in range(0, pages, _PIECE):
            at = self._contents + first
            written = np.flatnonzero(self._arrays.counts[at : at + min(_PIECE, pages - first)])
            yield written + first + (self._pool_start >> 12)

    def pieces(self, start: int, end: int) -> Iterator[tuple[int, U64]]:
        """Yield (address, uint64[] of whole frames) for what is not zero in a range of `ranges()`, ascending.

        ValueError for what is no range of frames of one zone.

        >>> start, end = memory.ranges()[0]
        >>> address, words = next(memory.pieces(start, end))
        >>> start <= address < end, words.size % 512
        (True, 0)
        """
        inside = start <= end <= self._ram_end or self._pool_start <= start <= end <= self._pool_end
        if not inside or (start | end) & 0xFFF:
            raise ValueError(f"start {start:#x} and end {end:#x}: expected a range of ranges(), or frames of one")
        return self._pieces(start, end)

    def _pieces(self, start: int, end: int) -> Iterator[tuple[int, U64]]:
        for first in range(start, end, _PIECE << 12):
            last = min(first + (_PIECE << 12), end)
            if start < self._ram_end:
                yield from self._nonzero(first, self._arrays.ram[first >> 3 : last >> 3])
                continue
            at = self._contents + (first - self._pool_start >> 12)
            frames = self._arrays.counts[at : at + (last - first >> 12)]
            for page in np.flatnonzero(frames).tolist():
                frame = int(frames[page])
                yield first + (page << 12), self._arrays.ram[frame << 9 : frame + 1 << 9]

    @staticmethod
    def _nonzero(address: int, words: Array) -> Iterator[tuple[int, U64]]:
        """Runs of frames that hold anything but zeroes."""
        holds = np.zeros(words.size // 512 + 2, np.int8)
        holds[1:-1] = words.reshape(-1, 512).any(axis=1)
        edges = np.flatnonzero(np.diff(holds))
        for begin, end in edges.reshape(-1, 2).tolist():
            yield address + (begin << 12), words[begin << 9 : end << 9]
