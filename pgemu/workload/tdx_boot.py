"""`workload:tdx-boot`: the boot of a 4 GiB TDX guest with 8 vCPUs, as its published counters have it.

Published (Yan Zhao, June and July 2025, aF0Kg8FcHVMvsqSo and aGSoDnODoG2/pbYn @yzhao56-desk.sh.intel.com):

- memory slots: gfn 0 and gfn 0x100000 with 0x80000 pages each, gfn 0xffc00 with 0x400 pages
- about 4 MB of initial private memory, always added at 4K
- about 2710 accepts at 4K while 2M would have been possible, all on vCPU 0: gfn 0x806-0x9ff once each (the
  report counts 506 pages), gfn 0x7e800-0x7e9ff once each (512), and gfn 0x7d3ff-0x7e7fe converted again and
  again, most of all 0x7d9d7 (974 times), 0x7d9da (476) and 0x7d9d9 (156)
- 1144 mappings at 2M from the start of the kernel to the login prompt

Inferred here:

- the initial memory is the firmware in the slot at gfn 0xffc00, which has just that size
- an accept of a hot page ends a time of being shared, in which the host touched the page; so each of them is
  four records: convert to shared, host fault, convert to private, guest fault
- all of that initial memory and of those accepts is mapped at 4K where a kind of VM knows accepts (Flag.ACCEPT_4K)
- the 2710 - 506 - 512 - 1606 = 86 other accepts fall evenly on the rest of the hot range
- the order of the phases: firmware, its accepts, the conversions, the early kernel's accepts, swiotlb, first
  touches; conversions and first touches are shuffled
- swiotlb is converted to shared once, in one piece: 64 MiB (IO_TLB_DEFAULT_SIZE, the lower bound of what
  confidential guests reserve) at gfn 0x70000, aligned to its size, below 2 GiB and clear of the pages above; 64
  pages of it are then touched by the host and by the guest
- `overlap`, the share of the hot flips that happen while another page of the same GiB stays shared: nobody has
  counted it. One of the other accepts is the end of that page's time; counts are the same for every share
- 12 rare conversions between the first touches, on any vCPU, of pages that are mapped at 2M by then
- times: 10 us from one record to the next
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pgemu.trace.lowered import Lowered
from pgemu.trace.memory_layout import SYNTHETIC_HVA, Layout, Region, Slot
from pgemu.trace.schema import FIRST_HOST_ACTOR, Records
from pgemu.workload.parts import checked_share, in_turn, made, setup
from pgemu_kernels.words.operations import PAGE_1G, PAGE_2M, PAGE_4K, Flag, Operation

__all__ = ("CONVERSIONS", "GUEST_FAULTS", "HOST_FAULTS", "LAYOUT", "NAME", "build")

NAME = "workload:tdx-boot"

VCPUS = 8
FIRMWARE_GFN = 0xFFC00
FIRMWARE_PAGES = 0x400
FIRMWARE_ACCEPTS = range(0x806, 0xA00)
KERNEL_ACCEPTS = range(0x7E800, 0x7EA00)
HOT = {0x7D9D7: 974, 0x7D9DA: 476, 0x7D9D9: 156}
HOT_RANGE = range(0x7D3FF, 0x7E7FF)
ACCEPTS = 2710
TAIL = ACCEPTS - len(FIRMWARE_ACCEPTS) - len(KERNEL_ACCEPTS) - sum(HOT.values())
FIRST_TOUCHES = 1144
SWIOTLB_GFN = 0x70000
SWIOTLB_PAGES = (64 << 20) // PAGE_4K
SWIOTLB_TOUCHES = 64
RARE = 12
FLIPS = sum(HOT.values()) + TAIL + RARE
CONVERSIONS = 2 * FLIPS + 1
HOST_FAULTS = FLIPS + SWIOTLB_TOUCHES
GUEST_FAULTS = FIRMWARE_PAGES + ACCEPTS + RARE + SWIOTLB_TOUCHES + FIRST_TOUCHES

_ACCEPTED = Flag.PRIVATE | Flag.ACCEPT_4K
_LOW_PAGES = 0x80000
_HIGH_GFN = 0x100000
_PAGES_2M = PAGE_2M // PAGE_4K
_FIRMWARE_OFFSET = 4 * PAGE_1G + FIRMWARE_GFN * PAGE_4K % PAGE_1G

LAYOUT = Layout(
    5 * PAGE_1G,
    PAGE_1G,
    (
        Region(SYNTHETIC_HVA, 0, 4 * PAGE_1G),
        Region(SYNTHETIC_HVA + 8 * PAGE_1G, _FIRMWARE_OFFSET, FIRMWARE_PAGES * PAGE_4K),
    ),
    (
        Slot(0, 0, 2 * PAGE_1G, SYNTHETIC_HVA, 0),
        Slot(2, FIRMWARE_GFN * PAGE_4K, FIRMWARE_PAGES * PAGE_4K, SYNTHETIC_HVA + 8 * PAGE_1G, _FIRMWARE_OFFSET),
        Slot(1, _HIGH_GFN * PAGE_4K, 2 * PAGE_1G, SYNTHETIC_HVA + 2 * PAGE_1G, 2 * PAGE_1G),
    ),
    (),
    "workload",
)

_Gfns = npt.NDArray[np.int64]


MACHINE = {"vm": "tdx", "stage2": "ept", "vcpus": VCPUS}


def build(seed: int = 0, overlap: float = 0.0) -> Lowered:
    """Return the boot; `seed` orders the conversions and the first touches, the counts are fixed.

    :param overlap: share of the hot flips that happen while another page of their GiB stays shared, 0 to 1
    :raises InputError: another share
    """
    checked_share("overlap", overlap, source=NAME)
    random = np.random.Generator(np.random.PCG64(seed))
    firmware = np.arange(FIRMWARE_GFN, FIRMWARE_GFN + FIRMWARE_PAGES)
    pieces = [
        _touch(firmware, _ACCEPTED),
        _touch(np.array(FIRMWARE_ACCEPTS), _ACCEPTED),
        _hot_flips(random, overlap),
        _touch(np.array(KERNEL_ACCEPTS), _ACCEPTED),
        _swiotlb(random),
        _first_touches(random),
    ]
    return made(setup(LAYOUT), pieces, LAYOUT, NAME, machine=MACHINE)


def _offset(gfns: _Gfns) -> _Gfns:
    """Offset of RAM pages (not of the firmware's) in the inode, bytes."""
    return np.where(gfns < _LOW_PAGES, gfns, gfns - _HIGH_GFN + _LOW_PAGES) * PAGE_4K


def _touch(gfns: _Gfns, kind: Flag, vcpus: npt.ArrayLike = 0) -> Records:
    """Guest writes to each page."""
    return Records.build(
        len(gfns), op=Operation.GUEST_FAULT, flags=int(Flag.WRITE | kind), actor=vcpus, address=gfns * PAGE_4K
    )


def _flip(gfns: _Gfns, vcpus: _Gfns) -> Records:
    """Make each page shared, let the host write to it, make it private again and let the guest accept it."""
    offset = _offset(gfns)
    count = len(gfns)
    convert: dict[str, npt.ArrayLike] = {"op": Operation.CONVERT, "actor": vcpus, "offset": offset, "length": PAGE_4K}
    steps = [
        Records.build(count, flags=int(Flag.SHARED), **convert),
        Records.build(
            count,
            op=Operation.HOST_FAULT,
            flags=int(Flag.WRITE),
            actor=FIRST_HOST_ACTOR,
            address=offset + SYNTHETIC_HVA,
        ),
        Records.build(count, flags=int(Flag.PRIVATE), **convert),
        _touch(gfns, _ACCEPTED, vcpus),
    ]
    return in_turn(steps)


def _hot_pages(random: np.random.Generator) -> _Gfns:
    hot = np.repeat(np.array(list(HOT)), list(HOT.values()))
    rest = np.setdiff1d(np.array(HOT_RANGE), hot)
    tail = rest[np.linspace(0, len(rest) - 1, TAIL).astype(np.int64)]
    return random.permutation(np.concatenate([hot, tail]))


def _hot_flips(random: np.random.Generator, overlap: float) -> Records:
    """The flips of the hot range. With an overlap the first page that flips only once is shared before all others, and
    becomes private again after that share of them."""
    pages = _hot_pages(random)
    flips = _flip(pages, np.zeros(len(pages), np.int64))
    if not overlap:
        return flips
    once = int(np.flatnonzero(~np.isin(pages, list(HOT)))[0])
    own = np.arange(4 * once, 4 * once + 4)
    others = np.delete(np.arange(4 * len(pages)), own)
    until = 4 * round(overlap * (len(pages) - 1))
    return flips.take(np.concatenate([own[:2], others[:until], own[2:], others[until:]]))


def _swiotlb(random: np.random.Generator) -> Records:
    touched = SWIOTLB_GFN + np.sort(random.choice(SWIOTLB_PAGES, SWIOTLB_TOUCHES, replace=False))
    convert = Records.build(
        1,
        op=Operation.CONVERT,
        flags=int(Flag.SHARED),
        offset=SWIOTLB_GFN * PAGE_4K,
        length=SWIOTLB_PAGES * PAGE_4K,
    )
    host = Records.build(
        SWIOTLB_TOUCHES,
        op=Operation.HOST_FAULT,
        flags=int(Flag.WRITE),
        actor=FIRST_HOST_ACTOR,
        address=_offset(touched) + SYNTHETIC_HVA,
    )
    return Records.concatenate([convert, host, _touch(touched, Flag.SHARED)])


def _first_touches(random: np.random.Generator) -> Records:
    """1144 of the 2M blocks that no page above lies in, and between them the rare conversions."""
    low = np.arange(_LOW_PAGES // _PAGES_2M)
    blocks = np.concatenate([low, low + _HIGH_GFN // _PAGES_2M]) * _PAGES_2M
    swiotlb = np.arange(SWIOTLB_GFN, SWIOTLB_GFN + SWIOTLB_PAGES)
    used = np.concatenate([FIRMWARE_ACCEPTS, KERNEL_ACCEPTS, HOT_RANGE, swiotlb]) // _PAGES_2M * _PAGES_2M
    chosen = random.choice(np.setdiff1d(blocks, used), FIRST_TOUCHES, replace=False)
    touched = chosen + random.integers(_PAGES_2M, size=FIRST_TOUCHES)
    vcpus = random.integers(VCPUS, size=FIRST_TOUCHES)
    pieces = []
    for part in np.array_split(np.arange(FIRST_TOUCHES), RARE):
        page = chosen[part[-1:]] + random.integers(_PAGES_2M, size=1)
        pieces += [_touch(touched[part], Flag.PRIVATE, vcpus[part]), _flip(page, random.integers(VCPUS, size=1))]
    return Records.concatenate(pieces)
