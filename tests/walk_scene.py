"""The machine, formats and registers that the tests of walks share."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from model.walks import Format
from pgemu.objects.machine import Config, Machine
from pgemu.tables.translation import Access
from pgemu_kernels import words as W
from pgemu_kernels.formats import page_format

FRAMES = 160

FORMATS: dict[str, tuple[Format, page_format.PageFormat]] = {
    "x86-64": (Format("x86", 4, 48), page_format.x86_64()),
    "x86-64-5": (Format("x86", 5, 57), page_format.x86_64(5)),
    "x86-64 small": (
        Format("x86", 4, 48, maxphyaddr=36, nx=False, pages_1g=False),
        page_format.x86_64(maxphyaddr=36, nx=False, pages_1g=False),
    ),
    "x86-64 amd": (Format("x86", 4, 48, maxphyaddr=46, amd=True), page_format.x86_64(maxphyaddr=46, amd=True)),
    "npt": (Format("npt", 4, 48, maxphyaddr=51), page_format.npt()),
    "npt-5": (Format("npt", 5, 57, maxphyaddr=51, nx=False), page_format.npt(5, nx=False)),
    "ept": (Format("ept", 4, 48), page_format.ept()),
    "ept-5": (Format("ept", 5, 57, maxphyaddr=46), page_format.ept(5, maxphyaddr=46)),
    "ept old": (
        Format("ept", 4, 48, accessed_dirty=False, execute_only=False),
        page_format.ept(accessed_dirty=False, execute_only=False),
    ),
    "ept mode-based": (Format("ept", 4, 48, mode_based=True), page_format.ept(mode_based_execute=True)),
    "arm64 3 levels": (Format("arm", 3, 40, root_bits=10), page_format.arm64_stage2(40)),
    "arm64 4 levels": (
        Format("arm", 4, 48, accessed_dirty=False),
        page_format.arm64_stage2(48, hardware_access_flag=False),
    ),
    "arm64 16 roots": (
        Format("arm", 3, 43, root_bits=13, accessed_dirty=False),
        page_format.arm64_stage2(43, hardware_access_flag=False),
    ),
    "arm64 36 bits": (Format("arm", 3, 36), page_format.arm64_stage2(36)),
    "arm64 2 levels": (Format("arm", 2, 33, root_bits=12), page_format.arm64_stage2(33)),
}


class Memory:
    """The words of a machine that a walk can meet, as the model sees them."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.pool = machine.register(W.R_POOL_BASE) << 12
        state = machine.arrays.state
        self.first = (machine.register(W.R_FRESH) + 1) << 12
        state[W.R_FRESH] += np.uint64(FRAMES + 1)
        machine.arrays.stats[int(W.STATS_GAUGES) + 2 * int(W.Gauge.FRAMES_USED)] += FRAMES + 1
        self.contents = machine.register(W.R_CONTENTS)

    def frames(self) -> Any:
        return iter(range(self.first, self.first + FRAMES * 4096, 4096))

    def read(self, address: int) -> int | None:
        """A word of `ram` or of a guest frame; None where there is no memory."""
        ram = self.machine.arrays.ram
        if address // 8 < ram.size:
            return int(ram[address // 8])
        frame = (address - self.pool) >> 12
        if not 0 <= frame < self.machine.config.pool >> 12:
            return None
        content = int(self.machine.arrays.counts[self.contents + frame])
        return int(ram[content * 512 + (address >> 3 & 511)]) if content else 0

    def write(self, address: int, value: int) -> None:
        ram = self.machine.arrays.ram
        if address // 8 < ram.size:
            ram[address // 8] = value
            return
        self.machine.write_frame(address >> 12, value.to_bytes(8, "little"), address & 4095)

    def store(self, words: dict[int, int]) -> None:
        """Put words into memory; those of guest frames that are zero only where the frame has contents."""
        ram = self.machine.arrays.ram
        addresses = np.fromiter(words, np.uint64, len(words)) >> np.uint64(3)
        values = np.fromiter(words.values(), np.uint64, len(words))
        inside = addresses < np.uint64(ram.size)
        ram[addresses[inside]] = values[inside]
        for word, value in zip(addresses[~inside].tolist(), values[~inside].tolist(), strict=True):
            if value or self.read(word * 8):
                self.write(word * 8, value)


def small_machine() -> Machine:
    return Machine(Config("pfnmap", pool=8 * W.PAGE_2M, page_size=W.PAGE_2M))


def random_access(rng: random.Random) -> Access:
    coin = [rng.random() < 0.5 for _ in range(8)]
    return Access(
        write_protect=coin[0], smep=coin[1], smap=coin[2], ac=coin[3], pke=coin[4], pks=coin[5],
        pkru=rng.choice((0, 0x5555_5554, 0xC, rng.getrandbits(32))), pkrs=rng.choice((0, 0xC, rng.getrandbits(32))),
        hardware_dirty=coin[6], xnx=coin[7], update=rng.random() < 0.7,
    )  # fmt: skip
