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

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt

from pgemu.errors import InputError
from pgemu.machine.field_rules import shown
from pgemu.trace.lowered import Accounting, Lowered
from pgemu.trace.memory_layout import SYNTHETIC_HVA, Layout, Region, Slot, align_up
from pgemu.trace.schema import FIRST_HOST_ACTOR, Records
from pgemu_kernels.words.operations import PAGE_1G, PAGE_2M, PAGE_4K, Flag, Operation
from pgemu_kernels.words.rows import NO_INODE

__all__ = ("DEVICE", "NAME", "build", "checked_number", "checked_share")

NAME = "workload:dma-steady"
DEVICE = FIRST_HOST_ACTOR + 1
MACHINE = {"vcpus": 8}
_STEP_NS = 10_000
_SHARE = 0.06  # of swiotlb
_LEAST, _MOST = 64 << 20, 1 << 30
_LARGEST = 1 << 40  # of memory; a record takes 44 bytes
_MANY = 1 << 22  # flips, and accesses in all
_RIGHTS = int(Flag.READ | Flag.WRITE)

_Pages = npt.NDArray[np.int64]


def checked_number(name: str, value: Any, least: int, most: int, unit: int = 1, source: str = NAME) -> int:
    """A parameter that is a whole number in a range. InputError for another one."""
    whole = isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1
    if not whole or not least <= value <= most or int(value) % unit:
        multiple = f"a multiple of {unit} " if unit > 1 else "a whole number "
        raise InputError(f"{name} {shown(value)}: expected {multiple}from {least} to {most}", source)
    return int(value)


def checked_share(name: str, value: Any, source: str = NAME) -> float:
    """A parameter that is a share. InputError for another one."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InputError(f"{name} {shown(value)}: expected a share from 0 to 1", source)
    return float(value)


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
    size = checked_number("guest_memory", guest_memory, 2 * PAGE_2M, _LARGEST, PAGE_2M)
    count = checked_number("flips", flips, 0, _MANY)
    each = checked_number("accesses", accesses, 0, _MANY // max(count, 1))
    piece = checked_number("mapping", mapping, PAGE_4K, _LARGEST, PAGE_4K)
    used = _buffers(size, buffers)
    random = np.random.Generator(np.random.PCG64(seed))
    start = min(size, 2 * PAGE_1G) - used  # as high as it fits below 2 GiB
    layout = Layout(
        align_up(size, PAGE_1G), PAGE_1G, (Region(SYNTHETIC_HVA, 0, size),), (Slot(0, 0, size, SYNTHETIC_HVA, 0),), (),
        "workload",
    )  # fmt: skip
    pages = np.arange(start // PAGE_4K, (start + used) // PAGE_4K)
    setup = [
        Records.build(1, op=Operation.MMAP, actor=FIRST_HOST_ACTOR, address=SYNTHETIC_HVA, length=size),
        Records.build(1, op=Operation.BIND, actor=FIRST_HOST_ACTOR, length=size),
    ]
    records = Records.concatenate(
        [
            *setup,
            _guest(_others(random, size, start, used), Flag.PRIVATE, random),
            Records.build(1, op=Operation.CONVERT, flags=int(Flag.SHARED), offset=start, length=used),
            _guest(pages, Flag.SHARED, random),
            _maps(start, used, piece),
            _flips(random, pages, count, each, checked_share("late", late)),
        ]
    )
    records.time[:] = np.arange(len(records), dtype=np.uint64) * np.uint64(_STEP_NS)
    made = len(records) - len(setup)
    accounting = Accounting(made, Counter({"record": made}), operations=len(records), setup=len(setup))
    return Lowered(records, layout, "private", True, accounting, NAME, accesses=True, machine=MACHINE)


def _buffers(memory: int, share: Any) -> int:
    """Bytes of buffers, a multiple of 2 MiB."""
    if share is None:
        wanted = min(max(int(memory * _SHARE), _LEAST), _MOST)
    else:
        wanted = int(memory * checked_share("buffers", share))
    size = align_up(max(wanted, PAGE_2M), PAGE_2M)
    if size > min(memory, 2 * PAGE_1G) - PAGE_2M:
        what = f"buffers of {size} bytes in {memory} of memory"
        raise InputError(f"{what}: expected 2 MiB beside them, and no more than they have below 2 GiB", NAME)
    return size


def _others(random: np.random.Generator, size: int, start: int, used: int) -> _Pages:
    """A page of each 2 MiB that are no buffers, in any order."""
    blocks = np.arange(size // PAGE_2M)
    blocks = blocks[(blocks < start // PAGE_2M) | (blocks >= (start + used) // PAGE_2M)]
    return random.permutation(blocks) * 512 + random.integers(512, size=len(blocks))


def _guest(pages: _Pages, kind: Flag, random: np.random.Generator) -> Records:
    """The guest writes to each page."""
    return Records.build(
        len(pages), op=Operation.GUEST_FAULT, flags=int(Flag.WRITE | kind),
        actor=random.integers(MACHINE["vcpus"], size=len(pages)), address=pages * PAGE_4K,
    )  # fmt: skip


def _maps(start: int, used: int, piece: int) -> Records:
    """Maps for the device, at the guest's addresses, by those of the process."""
    starts = np.arange(start, start + used, piece, dtype=np.uint64)
    lengths = np.minimum(np.uint64(start + used) - starts, np.uint64(piece))
    return Records.build(
        len(starts), op=Operation.DMA_MAP, flags=_RIGHTS, actor=FIRST_HOST_ACTOR, object=int(NO_INODE), address=starts,
        offset=starts + np.uint64(SYNTHETIC_HVA), length=lengths,
    )  # fmt: skip


def _flips(random: np.random.Generator, pages: _Pages, count: int, each: int, late: float) -> Records:
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
    return Records.concatenate(steps).take(np.arange(len(steps) * count).reshape(len(steps), count).T.reshape(-1))


def _access(pages: _Pages, flags: _Pages) -> Records:
    return Records.build(
        len(pages), op=Operation.DMA_ACCESS, flags=flags, actor=DEVICE, address=pages * PAGE_4K, length=PAGE_4K
    )
