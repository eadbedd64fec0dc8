"""Frames of a guest's memory, handed out as its kernel would: in order, in any order, or 2 MiB at a time.

`thp` is the rule of anonymous transparent huge pages: a 2M range that nothing was mapped in gets an aligned 2 MiB at
its first touch (mm/memory.c:__handle_mm_fault(), pmd_none()), and 4K where none is free (mm/huge_memory.c:
do_huge_pmd_anonymous_page(), VM_FAULT_FALLBACK). Small requests take what is left of broken blocks first, as a buddy
allocator does (mm/page_alloc.c:__rmqueue_smallest()).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from pgemu_kernels.words.operations import PAGE_2M, PAGE_4K

__all__ = ("Allocation", "Frames")

Allocation = Literal["sequential", "random", "thp"]
Array = np.ndarray[Any, Any]

_IN_BLOCK = PAGE_2M // PAGE_4K
_ROUNDS = 4
_CHUNK = 1 << 16


class Frames:
    """Free frames of a guest.

    :param count: frames of guest memory, a multiple of 512
    :param policy: "sequential": ascending; "random": a permutation by `seed`; "thp": huge ones on request
    :param taken: frames that are in use from the start, uint64[n]
    :param reserved: a range of frames that is in use from the start
    :param fragmentation: share of the 2 MiB blocks, chosen by `seed`, of which the first frame is in use
    """

    def __init__(
        self, count: int, policy: Allocation, seed: int, taken: Array, reserved: range, fragmentation: float
    ) -> None:
        random = np.random.Generator(np.random.PCG64([seed, 1]))
        blocks = count // _IN_BLOCK
        self._count, self._policy = count, policy
        self._broken = np.zeros(blocks, bool)
        self._broken[random.permutation(blocks)[: round(fragmentation * blocks)]] = True
        first = np.flatnonzero(self._broken).astype(np.uint64) * np.uint64(_IN_BLOCK)
        self._reserved = reserved
        taken = np.unique(np.concatenate([taken, first]))
        outside = (taken < reserved.start) | (taken >= reserved.stop)
        self._taken = taken[outside & (taken < count)]
        self.left = count - len(self._taken) - len(reserved)
        self._next = 0
        self._bits = max(2, (count - 1).bit_length() + (count - 1).bit_length() % 2)
        self._keys = [int(key) for key in random.integers(1 << 62, size=_ROUNDS)]
        if policy == "thp":
            self._prepare_blocks(blocks)

    def _prepare_blocks(self, blocks: int) -> None:
        """Blocks that are whole, and those of which something is free."""
        partly = np.zeros(blocks, bool)
        partly[(self._taken // np.uint64(_IN_BLOCK)).astype(np.int64)] = True
        partly[self._reserved.start // _IN_BLOCK : -(-self._reserved.stop // _IN_BLOCK)] = True
        self._whole = np.flatnonzero(~partly)[::-1].tolist()  # the lowest at the end
        self._partial = np.flatnonzero(partly)[::-1].tolist()
        self._rest = np.zeros(0, np.uint64)

    # ------------------------------------------------------------------ taking

    def take(self, count: int) -> Array:
        """uint64[count]: the next frames; no more than are left may be asked for."""
        if count > self.left:
            raise ValueError(f"count {count}: expected at most {self.left}, which are left")
        self.left -= count
        pieces = []
        while count:
            piece = self._blocks_piece(count) if self._policy == "thp" else self._ordered_piece(count)
            pieces.append(piece)
            count -= len(piece)
        return np.concatenate([np.zeros(0, np.uint64), *pieces])

    def take_huge(self) -> int | None:
        """The first of 512 frames, aligned; None where no whole block is free."""
        if not self._whole:
            return None
        self.left -= _IN_BLOCK
        return int(self._whole.pop()) * _IN_BLOCK

    def _free(self, frames: Array) -> Array:
        """Those that are not in use from the start."""
        inside = (frames >= self._reserved.start) & (frames < self._reserved.stop)
        return frames[~(inside | np.isin(frames, self._taken))]

    def _ordered_piece(self, count: int) -> Array:
        """At most `count` frames of the order of all."""
        last = min(self._next + min(count, _CHUNK), self._count)
        frames = np.arange(self._next, last, dtype=np.uint64)
        self._next = last
        return self._free(self._permuted(frames) if self._policy == "random" else frames)

    def _blocks_piece(self, count: int) -> Array:
        """At most `count` frames of a block that is not whole, or is not any more."""
        if not len(self._rest):
            block = self._partial.pop() if self._partial else self._whole.pop()
            self._rest = self._free(np.arange(block * _IN_BLOCK, (block + 1) * _IN_BLOCK, dtype=np.uint64))
        piece, self._rest = self._rest[:count], self._rest[count:]
        return piece

    def _permuted(self, numbers: Array) -> Array:
        """A permutation of all frames: a Feistel network over the next even number of bits, walked until it is one."""
        half = np.uint64(self._bits // 2)
        mask = (np.uint64(1) << half) - np.uint64(1)
        found = numbers.copy()
        again = np.ones(len(found), bool)
        while again.any():
            left, right = found[again] >> half, found[again] & mask
            for key in self._keys:
                mixed = (right ^ np.uint64(key)) * np.uint64(0x9E3779B97F4A7C15)
                mixed ^= mixed >> np.uint64(29)
                mixed *= np.uint64(0xBF58476D1CE4E5B9)
                left, right = right, left ^ (mixed >> np.uint64(32)) & mask
            found[again] = left << half | right
            again = found >= self._count
        return found
