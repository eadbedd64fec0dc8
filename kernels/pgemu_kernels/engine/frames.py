"""Frames of the metadata zone, and contents of guest frames on demand."""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import ALL, NONE, U0, U1, U2, U6, U9, U63, U64, U512
from pgemu_kernels.engine.charge import change
from pgemu_kernels.engine.compile import kernel, outlined
from pgemu_kernels.words.enum_words import GAUGE_CONTENT_FRAMES, GAUGE_FRAMES_USED
from pgemu_kernels.words.events import STATS_GAUGES
from pgemu_kernels.words.registers import (
    CONTIGUOUS_FRAMES,
    R_CONTENTS,
    R_CONTIGUOUS,
    R_CONTIGUOUS_MAP,
    R_FRAMES_LIMIT,
    R_FRAMES_MASK,
    R_FREE,
    R_FREE_STACK,
    R_FRESH,
    R_POOL_BASE,
    R_SEED_MULTIPLIER,
    R_SEED_OFFSET,
)

U = np.uint64


@kernel
def frames_left(m):
    """How many frames may still be taken before -ENOMEM."""
    used = U(m.stats[STATS_GAUGES + GAUGE_FRAMES_USED * U2])
    limit = m.state[R_FRAMES_LIMIT]
    return limit - used if used < limit else U0


@kernel
def take_frame(m):
    """A frame with whatever it held, or NONE. The last one freed comes back first, as from a per-CPU list.

    Frames never used come in ascending order, or in the order of the machine's seed; frame 0 never.
    """
    state = m.state
    if frames_left(m) == U0:
        return NONE
    change(m.stats, GAUGE_FRAMES_USED, 1)
    top = state[R_FREE]
    if top != U0:
        state[R_FREE] = top - U1
        return state[state[R_FREE_STACK] + top - U1]
    fresh = state[R_FRESH]
    frame = (fresh * state[R_SEED_MULTIPLIER] + state[R_SEED_OFFSET]) & state[R_FRAMES_MASK]
    if frame == U0:
        fresh += U1
        frame = (fresh * state[R_SEED_MULTIPLIER] + state[R_SEED_OFFSET]) & state[R_FRAMES_MASK]
    state[R_FRESH] = fresh + U1
    return frame


@kernel
def put_frame(m, frame):
    """Give a frame back."""
    state = m.state
    top = state[R_FREE]
    state[state[R_FREE_STACK] + top] = frame
    state[R_FREE] = top + U1
    change(m.stats, GAUGE_FRAMES_USED, -1)


@outlined
def take_run(m, n):
    """`n` frames in a row, 2 to 64 and a power of two, aligned to n frames: the first one, or NONE.

    They come from frames set apart, since those of a machine with a seed are handed out in no order.
    """
    state = m.state
    if frames_left(m) < n:
        return NONE
    bits = ALL >> (U64 - n)
    for i in range(U0, U(CONTIGUOUS_FRAMES), n):
        word = state[R_CONTIGUOUS_MAP] + (i >> U6)
        if state[word] >> (i & U63) & bits == U0:
            state[word] |= bits << (i & U63)
            change(m.stats, GAUGE_FRAMES_USED, np.int64(n))
            return state[R_CONTIGUOUS] + i
    return NONE


@outlined
def put_run(m, frame, n):
    """Give back what take_run() gave."""
    i = frame - m.state[R_CONTIGUOUS]
    m.state[m.state[R_CONTIGUOUS_MAP] + (i >> U6)] &= ~((ALL >> (U64 - n)) << (i & U63))
    change(m.stats, GAUGE_FRAMES_USED, -np.int64(n))


@kernel
def fill_frame(ram, frame, value):
    """Store `value` in all 512 words of a frame."""
    base = frame << U9
    for i in range(U512):
        ram[base + i] = value


@kernel
def empty_frame(m, value, gauge):
    """A frame full of `value`, counted: its number, or NONE."""
    frame = take_frame(m)
    if frame != NONE:
        fill_frame(m.ram, frame, value)
        m.counts[frame] = np.uint32(0)
        change(m.stats, gauge, 1)
    return frame


@kernel
def copy_frame(ram, target, source):
    """Copy 4096 bytes from frame to frame."""
    to = target << U9
    at = source << U9
    for i in range(U512):
        ram[to + i] = ram[at + i]


@outlined
def drop_contents(m, pfn, pages):
    """Forget what guest frames [pfn, pfn + pages) hold: they read as zero afterwards."""
    first = m.state[R_CONTENTS] + pfn - m.state[R_POOL_BASE]
    for i in range(first, first + pages):
        frame = U(m.counts[i])
        if frame != U0:
            m.counts[i] = np.uint32(0)
            put_frame(m, frame)
            change(m.stats, GAUGE_CONTENT_FRAMES, -1)


@kernel
def zero_contents(m, pfn, pages):
    """Zero guest frames; costs nothing here while no frame has contents."""
    if m.stats[STATS_GAUGES + GAUGE_CONTENT_FRAMES * U2] != 0:
        drop_contents(m, pfn, pages)
