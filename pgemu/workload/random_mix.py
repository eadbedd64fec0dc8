"""`workload:random`: operations drawn at random over one memory, each by its weight.

Nothing of it is published or captured: it is for what no trace has, and for shapes between the others. Of it no figure
says how VMs behave. Chosen here, and all parameters:

- `guest_memory`: 1 GiB in one slot, private at first, 8 vCPUs; `operations`: 100,000
- the weights: `guest_fault` 50, `host_fault` 30, `convert` 15, `punch_hole` 1, `zap` 2, `prefault` 1, `remap` 0 (a
  range of the host's mapping is unmapped and mapped again), `get` 1 (a transient reference), `pin` 0 (FOLL_LONGTERM),
  `nested_map` 0, `dma_map` 0 (with a device's access). What holds a page is given back after 16 other operations
- `zipf`: 0, every page is as likely; s: the page of rank k has the weight 1/k^s, ranks are drawn
- `large`: 0.05, the share of ranges (of convert, punch_hole, zap, prefault, remap) that are 2 MiB, aligned; others 4K
- `writes`: half of all accesses; a conversion is to shared or to private, each as likely
- times: 10 us from one record to the next
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pgemu.errors import InputError
from pgemu.trace.lowered import Lowered
from pgemu.trace.memory_layout import SYNTHETIC_HVA
from pgemu.trace.schema import FIRST_HOST_ACTOR, Records
from pgemu.workload.parts import Pages, checked_number, checked_share, made, one_slot, setup
from pgemu_kernels.words.operations import PAGE_1G, PAGE_2M, PAGE_4K, Flag, Operation
from pgemu_kernels.words.rows import NO_INODE

__all__ = ("NAME", "build")

NAME = "workload:random"
MACHINE = {"vcpus": 8}
DEVICE = FIRST_HOST_ACTOR + 1
_LARGEST = 64 * PAGE_1G  # a page's weight takes 16 bytes
_MANY = 1 << 24
_HELD = 16  # operations for which a reference, a pin or a mapping is held
_HANDLES = 256  # pins and nested mappings
_READ, _WRITE = int(Flag.READ), int(Flag.WRITE)
_GUEST, _HOST, _RANGE, _HOST_RANGE = range(4)

_DRAWN = {
    "guest_fault": (Operation.GUEST_FAULT, None),
    "host_fault": (Operation.HOST_FAULT, None),
    "convert": (Operation.CONVERT, None),
    "punch_hole": (Operation.PUNCH_HOLE, None),
    "zap": (Operation.ZAP, None),
    "prefault": (Operation.PREFAULT, None),
    "remap": (Operation.MUNMAP, Operation.MMAP),
    "get": (Operation.GET, Operation.PUT),
    "pin": (Operation.PIN, Operation.UNPIN),
    "nested_map": (Operation.NESTED_MAP, Operation.NESTED_UNMAP),
    "dma_map": (Operation.DMA_MAP, Operation.DMA_UNMAP),
}
"""What each weight draws, and what ends it."""
_AT_ONCE = (Operation.MUNMAP,)  # ended by the next record
_RANGES = (Operation.CONVERT, Operation.PUNCH_HOLE, Operation.ZAP, Operation.PREFAULT, Operation.MUNMAP)
_BY_HOST = (Operation.HOST_FAULT, Operation.ZAP, Operation.MUNMAP, Operation.PIN)
_BY_GUEST = (Operation.GUEST_FAULT, Operation.PREFAULT, Operation.NESTED_MAP, Operation.DMA_MAP)
_OF_INODE = (Operation.CONVERT, Operation.PUNCH_HOLE, Operation.GET)

_Column = npt.NDArray[np.int64]


def build(
    seed: int = 0, guest_memory: float = PAGE_1G, operations: float = 100_000, zipf: float = 0.0, large: float = 0.05,
    writes: float = 0.5, guest_fault: float = 50, host_fault: float = 30, convert: float = 15, punch_hole: float = 1,
    zap: float = 2, prefault: float = 1, remap: float = 0, get: float = 1, pin: float = 0, nested_map: float = 0,
    dma_map: float = 0,
) -> Lowered:  # fmt: skip
    """Return the workload; equal seeds and parameters make equal traces.

    :param guest_memory: bytes, a multiple of 2 MiB, 64 GiB at most
    :param operations: how many are drawn; what ends one is a record more
    :param zipf: exponent, 0 (uniform) to 4
    :param large: share of ranges that are 2 MiB, 0 to 1
    :param writes: share of accesses that write, 0 to 1
    :param guest_fault, host_fault, convert, punch_hole, zap, prefault, remap, get, pin, nested_map, dma_map: weights,
        of which one at least is not 0
    :raises InputError: another number, with what was expected
    """
    weights = {
        "guest_fault": guest_fault, "host_fault": host_fault, "convert": convert, "punch_hole": punch_hole,
        "zap": zap, "prefault": prefault, "remap": remap, "get": get, "pin": pin, "nested_map": nested_map,
        "dma_map": dma_map,
    }  # fmt: skip
    size = checked_number("guest_memory", guest_memory, PAGE_2M, _LARGEST, PAGE_2M, source=NAME)
    count = checked_number("operations", operations, 0, _MANY, source=NAME)
    shares = _shares(weights)
    exponent = checked_share("zipf", zipf, 4, "a number", source=NAME)
    wide, written = (checked_share(*one, source=NAME) for one in (("large", large), ("writes", writes)))
    random = np.random.Generator(np.random.PCG64(seed))
    op = np.array([int(first) for first, _ in _DRAWN.values()])[random.choice(len(shares), count, p=shares)]
    pages = _pages(random, size // PAGE_4K, count, exponent)
    ranges = np.isin(op, _RANGES) & (random.random(count) < wide)
    begun = _begun(op, np.where(ranges, pages // 512 * 512, pages), ranges, _flags(random, op, written), random)
    layout = one_slot(size)
    return made(setup(layout), [_with_ends(begun)], layout, NAME, machine=MACHINE)


def _shares(weights: dict[str, float]) -> npt.NDArray[np.float64]:
    """The weights, as shares of their sum."""
    found = np.array([checked_share(name, one, 1e9, "a weight", source=NAME) for name, one in weights.items()])
    if not found.sum():
        raise InputError(f"{', '.join(weights)}: all are 0, expected a weight", NAME)
    shares: npt.NDArray[np.float64] = found / found.sum()
    return shares


def _pages(random: np.random.Generator, pages: int, count: int, exponent: float) -> Pages:
    """A page for each operation."""
    if not exponent:
        return random.integers(pages, size=count)
    weights = np.cumsum(np.arange(1, pages + 1, dtype=np.float64) ** -exponent)
    ranks = np.searchsorted(weights, random.random(count) * weights[-1], side="right")
    found: Pages = random.permutation(pages)[np.minimum(ranks, pages - 1)]
    return found


def _flags(random: np.random.Generator, op: _Column, written: float) -> _Column:
    """What each operation asks, in its flags."""
    writes = (random.random(len(op)) < written) * _WRITE
    target = np.where(random.integers(2, size=len(op)) == 1, int(Flag.SHARED), int(Flag.PRIVATE))
    asked: dict[Operation, npt.ArrayLike] = {
        Operation.CONVERT: target,
        Operation.ZAP: int(Flag.MADVISE),
        Operation.PIN: writes | int(Flag.LONGTERM),
        Operation.DMA_MAP: _READ | _WRITE,
    }
    plain = (Operation.GUEST_FAULT, Operation.HOST_FAULT, Operation.NESTED_MAP)
    otherwise = np.where(np.isin(op, plain), writes, 0)
    choices = [np.broadcast_to(flags, op.shape) for flags in asked.values()]
    return np.select([op == one for one in asked], choices, otherwise)


def _begun(op: _Column, pages: Pages, ranges: npt.NDArray[np.bool_], flags: _Column, random: np.random.Generator) -> (
    Records
):  # fmt: skip
    """What is drawn, a record each; what is held has a number of its own as long as it is held."""
    at = pages * PAGE_4K
    handle = np.arange(len(op)) % _HANDLES
    device = op == Operation.DMA_MAP
    address = np.select([np.isin(op, _BY_HOST), np.isin(op, _BY_GUEST)], [at + SYNTHETIC_HVA, at], 0)
    offset = np.select([np.isin(op, _OF_INODE), device], [at, at + SYNTHETIC_HVA], 0)
    long = np.isin(op, (*_RANGES, Operation.PIN, Operation.DMA_MAP))
    held = np.isin(op, (Operation.PIN, Operation.NESTED_MAP))
    guest = np.isin(op, (Operation.GUEST_FAULT, Operation.CONVERT, Operation.PREFAULT, Operation.NESTED_MAP))
    return Records.build(
        len(op), op=op, flags=flags, address=address, offset=offset,
        length=np.where(long, np.where(ranges, PAGE_2M, PAGE_4K), 0),
        object=np.where(held, handle, np.where(device, int(NO_INODE), 0)),
        actor=np.where(guest, random.integers(MACHINE["vcpus"], size=len(op)), FIRST_HOST_ACTOR),
    )  # fmt: skip


def _with_ends(begun: Records) -> Records:
    """The records, and behind each that is held its end: at once, or after 16 others."""
    place = np.arange(len(begun))
    pieces, places = [begun], [2 * place]
    for first, last in _DRAWN.values():
        rows = np.flatnonzero(begun.op == first)
        if last is None or not len(rows):
            continue
        ends = begun.take(rows)
        ends.op[:] = last
        if first is Operation.MUNMAP:
            ends.offset[:] = ends.address - np.uint64(SYNTHETIC_HVA)
        elif first is Operation.DMA_MAP:
            pieces.append(_accesses(ends))
            places.append(2 * rows + 1)
        if first is not Operation.MUNMAP:
            ends.flags[:] = 0
        pieces.append(ends)
        places.append(2 * (rows + (0 if first in _AT_ONCE else _HELD)) + 1)
    return Records.concatenate(pieces).take(np.argsort(np.concatenate(places), kind="stable"))


def _accesses(maps: Records) -> Records:
    """A device writes to what is mapped for it."""
    return Records.build(
        len(maps), op=Operation.DMA_ACCESS, flags=_WRITE, actor=DEVICE, address=maps.address, length=PAGE_4K
    )
