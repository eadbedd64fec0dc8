"""Contents of guest frames: 4096 bytes of each that something was ever written to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pgemu.machine.arguments import OfMachine
from pgemu.machine.arrays import I64
from pgemu.machine.boot import node_word
from pgemu.machine.config import Config
from pgemu_kernels import words as W

if TYPE_CHECKING:
    from pgemu_kernels.engine.handle import Machine as Arrays

__all__ = ("FrameContents",)


class FrameContents(OfMachine):
    """What of a machine is about its guest frames' contents, and how its words are read."""

    config: Config
    arrays: Arrays
    descriptor: I64

    def register(self, index: int | np.uint64) -> int:
        """A named scalar of the machine (words.R_*). ValueError for another number.

        >>> from pgemu_kernels import words as W
        >>> machine.register(W.R_VMS)
        1
        """
        if index >= W.R_WORD_COUNT:
            raise ValueError(f"index {index}: expected one of words.R_*, below {W.R_WORD_COUNT}")
        return int(self.arrays.state[index])

    def read_frame(self, pfn: int) -> bytes:
        """The 4096 bytes of a guest frame; frames never written read as zero. ValueError outside the pool.

        >>> machine.write_frame(gmem.pfn(0), b"hello", offset=8)
        >>> machine.read_frame(gmem.pfn(0))[8:13]
        b'hello'
        """
        frame = int(self.arrays.counts[self.register(W.R_CONTENTS) + self.guest_frame(pfn)])
        return self.arrays.ram[frame * 512 : (frame + 1) * 512].tobytes() if frame else bytes(W.PAGE_4K)

    def write_frame(self, pfn: int, data: bytes, offset: int = 0) -> None:
        """Store bytes in a guest frame. ValueError outside the frame or the pool, OSError ENOMEM.

        >>> machine.write_frame(gmem.pfn(0), bytes(range(16)), offset=4080)
        >>> list(machine.read_frame(gmem.pfn(0))[-2:])
        [14, 15]
        """
        from pgemu_kernels.run.entries import provide
        from pgemu_kernels.words.requests import CONTENTS

        if offset + len(data) > W.PAGE_4K:
            raise ValueError(f"offset {offset} of {len(data)} bytes of data: expected to lie within {W.PAGE_4K}")
        self.guest_frame(pfn)
        frame = int(provide(self.descriptor, CONTENTS, np.uint64(pfn)))
        if frame < 0:
            raise OSError(-frame, "no frame for the contents")
        memory = self.arrays.ram[frame * 512 : (frame + 1) * 512].view(np.uint8)
        memory[offset : offset + len(data)] = np.frombuffer(data, np.uint8)

    def guest_frame(self, pfn: int) -> int:
        """Index in the HugeTLB zone of a frame by its number. ValueError outside the zone.

        >>> machine.guest_frame(gmem.pfn(0)), machine.guest_frame(gmem.pfn(0x5000))
        (0, 5)
        """
        for number in range(self.config.nodes):
            base = int(self.arrays.state[node_word(number, W.N_BASE)])
            if base <= pfn < base + int(self.arrays.state[node_word(number, W.N_PAGES)]):
                return pfn - self.register(W.R_POOL_BASE)
        raise ValueError(f"pfn {pfn:#x}: expected a frame of the HugeTLB zone")
