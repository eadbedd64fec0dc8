"""Boot of a machine with a large pool of optimised 1G pages: time, and resident memory beside that of a small one.

Resident memory is measured in a process of its own, which boots one machine after the kernels are loaded. Figures of
one run stand in `extra_info`: `resident_mib`, and `more_than_1g_mib` of the large pool.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from pgemu.objects.machine import Config, Machine
from pgemu.pytest_plugin import Benchmark
from pgemu_kernels.words.operations import PAGE_1G

POOLS = {"1G": PAGE_1G, "1T": 1024 * PAGE_1G}
CHILD = """
import sys
from pgemu.objects.machine import Config, Machine

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

Machine(Config(pool=1 << 30, kernel=sys.argv[2]))
before = resident()
machine = Machine(Config(pool=int(sys.argv[1]), kernel=sys.argv[2]))
print(resident() - before)
"""


def resident(size: int, kernel: str) -> float:
    """MiB that one machine adds to a process."""
    command = [sys.executable, "-c", CHILD, str(size), kernel]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / (1 << 20)


@pytest.mark.parametrize("kernel", ["6.12", "6.18", "7.3"])
@pytest.mark.parametrize("pool", list(POOLS))
def test_boot(pgemu_benchmark: Benchmark, pool: str, kernel: str) -> None:
    size = POOLS[pool]
    info = {}
    if not pgemu_benchmark.disabled or (pool, kernel) == ("1G", "7.3"):
        own = resident(size, kernel)
        more = own - resident(PAGE_1G, kernel) if size > PAGE_1G else 0
        info = {"resident_mib": round(own, 1), "more_than_1g_mib": round(more, 1)}
    pgemu_benchmark(
        lambda: Machine(Config(pool=size, kernel=kernel)),
        operations=size // PAGE_1G, group=f"boot {kernel}, pool of {pool}", rounds=3, **info,
    )  # fmt: skip
