"""`workload:dma-steady`: a device that keeps using bounce buffers while pages of them become private and shared again.

Published:

- the buffers of a confidential guest are one range of 6 % of its memory, 64 MiB to 1 GiB: SEV's swiotlb
  (arch/x86/mm/mem_encrypt.c:mem_encrypt_setup_arch())
- what a device is to reach is mapped at the address that the guest has it at, where the guest sees no IOMMU: QEMU

Chosen here, and a parameter where it could be another number:

- `guest_memory`: 1 GiB; `buffers`: the share of it that buffers are, in place of the published one
- `mapping`: buffers are mapped for the device 2 MiB at a time, at the start, by their addresses in the process
- `flips`: 1000 times one page of the buffers, each as likely as any other, becomes private and shared again
- `accesses`: in each the device uses 64 pages, half of them before the page is shared again; half are writes
- `late`: a transfer to the page that has become private is still under way in one of 50 flips
- the guest has used its other memory, a page of each 2 MiB, and all of its buffers; it uses the page of a flip when it
  is private and when it is shared again
- times: 10 us from one record to the next
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pgemu.errors import InputError
from pgemu.trace.lowered import Lowered
from pgemu.trace.memory_layout import SYNTHETIC_HVA, align_up
from pgemu.trace.schema import FIRST_HOST_ACTOR, Records
from pgemu.workload.parts import (
    LARGEST,
    Pages,
    checked_number,
    checked_share,
    in_turn,
    made,
    one_slot,
    setup,
    vcpu_uses,
)
from pgemu_kernels.words.operations import PAGE_1G, PAGE_2M, PAGE_4K, Flag, Operation
from pgemu_kernels.words.rows import NO_INODE

__all__ = ("DEVICE", "NAME", "build")

NAME = "workload:dma-steady"
DEVICE = FIRST_HOST_ACTOR + 1
MACHINE = {"vcpus": 8}
_SHARE = 0.06  # of swiotlb
_LEAST, _MOST = 64 << 20, 1 << 30
_MANY = 1 << 22  # flips, and accesses in all
_RIGHTS = int(Flag.READ | Flag.WRITE)


def build(
    seed: int = 0, guest_memory: float = PAGE_1G, flips: float = 1000, accesses: float = 64,
    buffers: float | None = None, late: float = 0.02, mapping: float = PAGE_2M,
) -> Lowered:  # fmt: skip
    """Return the workload; equal seeds and parameters make equal traces.

    :param guest_memory: bytes, a multiple of 2 MiB
    :param flips: how often a page becomes private and shared again
    :param accesses: of the device in each flip, 4K each
    :param buffers: share of memory that is the device's, 0 to 1; None: 0.06, 64 MiB at least and 1 GiB at most
    :param late: share of flips in which a transfer to the page is still under way, 0 to 1
    :param mapping: bytes of each map for the device, a multiple of 4096
    :raises InputError: another number, with what was expected
    """
    size = checked_number("guest_memory", guest_memory, 2 * PAGE_2M, LARGEST, PAGE_2M, source=NAME)
    count = checked_number("flips", flips, 0, _MANY, source=NAME)
    each = checked_number("accesses", accesses, 0, _MANY // max(count, 1), source=NAME)
    piece = checked_number("mapping", mapping, PAGE_4K, LARGEST, PAGE_4K, source=NAME)
    used = _buffers(size, buffers)
    random = np.random.Generator(np.random.PCG64(seed))
    start = min(size, 2 * PAGE_1G) - used  # as high as it fits below 2 GiB
    pages = np.arange(start // PAGE_4K, (start + used) // PAGE_4K)
    layout = one_slot(size)
    pieces = [
        _guest(_others(random, size, start, used), Flag.PRIVATE, random),
        Records.build(1, op=Operation.CONVERT, flags=int(Flag.SHARED), offset=start, length=used),
        _guest(pages, Flag.SHARED, random),
        _maps(start, used, piece),
        _flips(random, pages, count, each, checked_share("late", late, source=NAME)),
    ]
    return made(setup(layout), pieces, layout, NAME, machine=MACHINE)


def _buffers(memory: int, share: Any) -> int:
    """Bytes of buffers, a multiple of 2 MiB."""
    if share is None:
        wanted = min(max(int(memory * _SHARE), _LEAST), _MOST)
    else:
        wanted = int(memory * checked_share("buffers", share, source=NAME))
    size = align_up(max(wanted, PAGE_2M), PAGE_2M)
    if size > min(memory, 2 * PAGE_1G) - PAGE_2M:
        what = f"buffers of {size} bytes in {memory} of memory"
        raise InputError(f"{what}: expected 2 MiB beside them, and no more than they have below 2 GiB", NAME)
    return size


def _others(random: np.random.Generator, size: int, start: int, used: int) -> Pages:
    """A page of each 2 MiB that are no buffers, in any order."""
    blocks = np.arange(size // PAGE_2M)
    blocks = blocks[(blocks < start // PAGE_2M) | (blocks >= (start + used) // PAGE_2M)]
    return random.permutation(blocks) * 512 + random.integers(512, size=len(blocks))


def _guest(pages: Pages, kind: Flag, random: np.random.Generator) -> Records:
    """The guest writes to each page."""
    return vcpu_uses(pages, int(Flag.WRITE | kind), random.integers(MACHINE["vcpus"], size=len(pages)))


def _maps(start: int, used: int, piece: int) -> Records:
    """Maps for the device, at the guest's addresses, by those of the process."""
    starts = np.arange(start, start + used, piece, dtype=np.uint64)
    lengths = np.minimum(np.uint64(start + used) - starts, np.uint64(piece))
    return Records.build(
        len(starts), op=Operation.DMA_MAP, flags=_RIGHTS, actor=FIRST_HOST_ACTOR, object=int(NO_INODE), address=starts,
        offset=starts + np.uint64(SYNTHETIC_HVA), length=lengths,
    )  # fmt: skip


def _flips(random: np.random.Generator, pages: Pages, count: int, each: int, late: float) -> Records:
    """Each flip is a row: private, half of the accesses, the guest's use; shared, the guest's use, the others."""
    page = pages[random.integers(len(pages), size=count)]
    used = pages[random.integers(len(pages), size=(count, each))]
    before = each - each // 2
    # A device that uses what is private by now is one whose transfer is late.
    private = used[:, :before] == page[:, None]
    used[:, :before] = np.where(private, pages[(page - pages[0] + 1) % len(pages)][:, None], used[:, :before])
    if each:
        chosen = random.permutation(count)[: round(late * count)]
        used[chosen, 0] = page[chosen]
    vcpu = random.integers(MACHINE["vcpus"], size=count)
    writes = random.integers(2, size=(count, each)) * int(Flag.WRITE)
    convert: dict[str, npt.ArrayLike] = {
        "op": Operation.CONVERT, "actor": vcpu, "offset": page * PAGE_4K, "length": PAGE_4K,
    }  # fmt: skip
    touch: dict[str, npt.ArrayLike] = {"op": Operation.GUEST_FAULT, "actor": vcpu, "address": page * PAGE_4K}
    steps = [
        Records.build(count, flags=int(Flag.PRIVATE), **convert),
        *(_access(used[:, i], writes[:, i]) for i in range(before)),
        Records.build(count, flags=int(Flag.WRITE | Flag.PRIVATE), **touch),
        Records.build(count, flags=int(Flag.SHARED), **convert),
        Records.build(count, flags=int(Flag.WRITE | Flag.SHARED), **touch),
        *(_access(used[:, i], writes[:, i]) for i in range(before, each)),
    ]
    return in_turn(steps)


def _access(pages: Pages, flags: Pages) -> Records:
    return Records.build(
        len(pages), op=Operation.DMA_ACCESS, flags=flags, actor=DEVICE, address=pages * PAGE_4K, length=PAGE_4K
    )
