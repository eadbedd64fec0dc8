"""`workload:swiotlb-steady`: the I/O of a guest that runs, through bounce buffers that stay shared.

Published:

- the bounce buffers of a confidential guest are one range, 64 MiB at least (IO_TLB_DEFAULT_SIZE, kernel/dma/swiotlb.h),
  and are made shared once; a request takes slots of 2 KiB in a row, 256 KiB at most (IO_TLB_SEGSIZE), and the next one
  those behind them (kernel/dma/swiotlb.c:swiotlb_area_find_slots())
- how often running guests convert memory nobody has counted: it is a parameter, and none without it

Chosen here, and a parameter where it could be another number:

- `guest_memory`: 4 GiB in one slot, 8 vCPUs; `buffers`: 64 MiB of it, as high as they fit below 2 GiB
- `requests`: 100,000 of `request` bytes each, 4096, `rate`: 10,000 a second
- half of the requests, chosen one by one, write: the guest fills the buffer and the host reads it; else the host fills
  it and the guest reads it. A record for each page
- `conversions`: so many a second of pages outside of the buffers, evenly spread: one of the 64 pages that are used so
  becomes shared, the host writes to it, and with the next conversion it is private and the guest uses it
- before that the guest has used its other memory, a page of each 2 MiB, 10 us from one to the next
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pgemu.errors import InputError
from pgemu.trace.lowered import Lowered
from pgemu.trace.schema import FIRST_HOST_ACTOR, Records
from pgemu.workload.parts import (
    LARGEST,
    Pages,
    checked_number,
    checked_share,
    convert,
    host_uses,
    in_turn,
    made,
    one_slot,
    setup,
    vcpu_uses,
)
from pgemu_kernels.words.operations import PAGE_1G, PAGE_2M, PAGE_4K, Flag, Operation

__all__ = ("NAME", "build")

NAME = "workload:swiotlb-steady"
MACHINE = {"vcpus": 8}
_SEGMENT = 256 << 10
_CONVERTED = 64  # pages outside
_MANY = 1 << 24  # records
_STEP_NS = 10_000
_SECOND = 10**9

_Times = npt.NDArray[np.uint64]


def build(
    seed: int = 0, guest_memory: float = 4 * PAGE_1G, buffers: float = 64 << 20, requests: float = 100_000,
    request: float = PAGE_4K, rate: float = 10_000, conversions: float = 0.0,
) -> Lowered:  # fmt: skip
    """Return the workload; `seed` chooses which requests write, which vCPU makes them, and which pages are converted.

    :param guest_memory: bytes, a multiple of 2 MiB
    :param buffers: bytes of them, a multiple of 2 MiB, less than the memory below 2 GiB
    :param requests: how many
    :param request: bytes of each, a multiple of 4096, 256 KiB at most
    :param rate: requests a second
    :param conversions: conversions a second, outside of the buffers
    :raises InputError: another number, with what was expected
    """
    size = checked_number("guest_memory", guest_memory, 2 * PAGE_2M, LARGEST, PAGE_2M, source=NAME)
    used = checked_number("buffers", buffers, PAGE_2M, min(size, 2 * PAGE_1G) - PAGE_2M, PAGE_2M, source=NAME)
    each = checked_number("request", request, PAGE_4K, _SEGMENT, PAGE_4K, source=NAME)
    count = checked_number("requests", requests, 0, _MANY * PAGE_4K // each, source=NAME)
    a_second = checked_number("rate", rate, 1, _SECOND, source=NAME)
    converted = round(checked_share("conversions", conversions, 1e9, "a number", source=NAME) * count / a_second)
    if converted > _MANY:
        raise InputError(f"conversions {conversions:g}: {converted} in all, expected at most {_MANY}", NAME)
    random = np.random.Generator(np.random.PCG64(seed))
    first = (min(size, 2 * PAGE_1G) - used) // PAGE_4K
    others = _others(random, size // PAGE_4K, first, used // PAGE_4K)
    layout = one_slot(size)
    begin = setup(layout)
    shared = convert(np.array([first]), Flag.SHARED, used)
    before = [vcpu_uses(others, int(Flag.WRITE | Flag.PRIVATE), random.integers(MACHINE["vcpus"], size=len(others)))]
    before.append(shared)
    began = len(begin) + sum(map(len, before))
    seconds = count / a_second
    kinds = [_requests(random, first, used // PAGE_4K, count, each // PAGE_4K), _conversions(random, others, converted)]
    ends = [_evenly(len(piece), count_, seconds) for piece, count_ in zip(kinds, (count, converted), strict=True)]
    steady = Records.concatenate(kinds)
    when = np.concatenate(ends)
    order = np.argsort(when, kind="stable")
    times = np.concatenate([np.arange(began, dtype=np.uint64) * np.uint64(_STEP_NS), when[order] + _after(began)])
    return made(begin, [*before, steady.take(order)], layout, NAME, machine=MACHINE, times=times)


def _after(records: int) -> np.uint64:
    """When what is steady begins, ns."""
    return np.uint64(records * _STEP_NS)


def _others(random: np.random.Generator, pages: int, first: int, used: int) -> Pages:
    """A page of each 2 MiB that are no buffers, in any order."""
    blocks = np.arange(pages // 512)
    blocks = blocks[(blocks < first // 512) | (blocks >= (first + used) // 512)]
    return random.permutation(blocks) * 512 + random.integers(512, size=len(blocks))


def _evenly(records: int, groups: int, seconds: float) -> _Times:
    """Times of so many groups of records, evenly spread over the seconds, ns."""
    if not groups:
        return np.zeros(0, np.uint64)
    found: _Times = (np.repeat(np.arange(groups), records // groups) * (seconds * _SECOND / groups)).astype(np.uint64)
    return found


def _requests(random: np.random.Generator, first: int, room: int, count: int, pages: int) -> Records:
    """Each page of a request is filled by one side and read by the other."""
    slots = first + (np.arange(count * pages) % room)
    writes = np.repeat(random.integers(2, size=count), pages)
    vcpus = np.repeat(random.integers(MACHINE["vcpus"], size=count), pages)
    rows = np.arange(len(slots))
    guest = vcpu_uses(slots, writes * int(Flag.WRITE) | int(Flag.SHARED), vcpus)
    host = host_uses(slots, (1 - writes) * int(Flag.WRITE))
    both = Records.concatenate([guest, host])
    filled = np.where(writes == 1, rows, rows + len(rows))
    drained = np.where(writes == 1, rows + len(rows), rows)
    # All pages of a request are filled before the first one is read.
    turns = np.stack([filled.reshape(count, pages), drained.reshape(count, pages)], axis=1)
    return both.take(turns.reshape(-1))


def _conversions(random: np.random.Generator, others: Pages, count: int) -> Records:
    """Two records each: a page is made shared and the host writes to it; it is made private and the guest uses it."""
    converted = random.choice(others, min(_CONVERTED, len(others)), replace=False)
    page = np.repeat(converted[random.integers(len(converted), size=(count + 1) // 2)], 2)[:count]
    back = np.arange(count) % 2
    vcpus = random.integers(MACHINE["vcpus"], size=count)
    asked = Records.build(
        count, op=Operation.CONVERT, actor=vcpus, offset=page * PAGE_4K, length=PAGE_4K,
        flags=np.where(back == 1, int(Flag.PRIVATE), int(Flag.SHARED)),
    )  # fmt: skip
    guest, host = vcpu_uses(page, int(Flag.WRITE | Flag.PRIVATE), vcpus), host_uses(page)
    used = Records.build(
        count, op=np.where(back == 1, guest.op, host.op), flags=np.where(back == 1, guest.flags, host.flags),
        actor=np.where(back == 1, vcpus, FIRST_HOST_ACTOR), address=np.where(back == 1, guest.address, host.address),
    )  # fmt: skip
    return in_turn([asked, used])
