"""A simulator in Python, with a TLB and a walker in the shape of gem5's, over both designs of a VM's memory.

A guest touches 64 MiB of its memory, a 1G page, at random; one 4K page of it is shared with the host. Each miss sends
what its walk reads to a cache of 256 lines. Run it: python -m pgemu.examples.gem5_mmu
"""

from __future__ import annotations

import random
from collections import OrderedDict
from typing import Literal

from pgemu import Config, Machine
from pgemu.adapters.gem5 import Mode, Request, Tlb, Walker

Design = Literal["restructure", "pfnmap"]
PAGE, SIZE, LINES = 1 << 30, 64 << 20, 256


class Cache:
    """Lines of 64 bytes, the one used last going last."""

    def __init__(self) -> None:
        self.lines: OrderedDict[int, None] = OrderedDict()
        self.misses = 0

    def read(self, address: int) -> None:
        line = address // 64
        self.misses += line not in self.lines
        self.lines[line] = None
        self.lines.move_to_end(line)
        if len(self.lines) > LINES:
            self.lines.popitem(last=False)


def simulate(design: Design, accesses: int = 2000) -> tuple[int, int, int]:
    """Misses of the TLB, reads of walks, misses of the cache."""
    machine = Machine(Config(design, pool=PAGE))
    gmem, vm = machine.create_guest_memfd(PAGE), machine.create_vm(protected=True)
    vm.bind(gmem, gpa=0)
    gmem.convert(0, 4096, shared=True)
    vm.touch_many(range(0, SIZE, 4096))
    tlb, cache, reads = Tlb(Walker(vm), entries=64), Cache(), 0
    draw = random.Random(1)
    for _ in range(accesses):
        request = Request(draw.randrange(SIZE))
        walk = tlb.translate_timing(request, Mode.READ)
        if walk is not None:
            for read in walk.reads:
                cache.read(read.address)
            reads += len(walk.reads)
            fault = walk.finish()
            assert fault is None, fault
        assert request.paddr is not None
    return tlb.misses, reads, cache.misses


def main() -> None:
    """Print both designs."""
    designs: tuple[Design, ...] = ("restructure", "pfnmap")
    for design in designs:
        missed, reads, cold = simulate(design)
        print(f"{design}: {missed} TLB misses, {reads} reads by walks, {cold} of them from memory")


if __name__ == "__main__":
    main()
