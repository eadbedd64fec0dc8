"""Programs and machines of tests of exports."""

from __future__ import annotations

from typing import Any

import numpy as np

from pgemu import Config
from pgemu.guest import GuestOptions, GuestProgram
from pgemu.trace.schema import Flag, Operation, Records

M2, M64 = 1 << 21, 64 << 20


def program_of(**options: Any) -> GuestProgram:
    return GuestProgram(GuestOptions(guest_memory=M64, bounce_size=1 << 20, **options))


def accesses(addresses: Any, flags: Any = 0, space: Any = 0) -> Records:
    given = np.asarray(addresses, np.uint64)
    return Records.build(
        len(given), op=Operation.GUEST_ACCESS, address=given, flags=flags, space=np.broadcast_to(space, len(given))
    )


def random_accesses(seed: int, count: int, spaces: int = 1) -> Records:
    random = np.random.default_rng(seed)
    addresses = 0x7F00_0000_0000 + random.integers(0, 16 << 20, count, dtype=np.uint64)
    flags = np.where(random.integers(0, 3, count) == 0, int(Flag.WRITE), 0).astype(np.uint8)
    return accesses(addresses, flags, random.integers(0, spaces, count).astype(np.uint16))


def config(design: str, vm: str = "sw", **fields: Any) -> Config:
    return Config(design, pool=1 << 30, page_size=M2, vm=vm, stage2="ept" if vm == "tdx" else "npt", **fields)
