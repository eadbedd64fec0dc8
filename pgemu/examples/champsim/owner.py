"""The machine behind ChampSim: it maps a page when ChampSim's walker finds none; its tables lie in shared memory.

Started by vmem.cc, which says what is to be done on stdin, 16 bytes each: a core and a virtual address. Each answer is
8 bytes: 0, or a status. A core is a VM of its own, whose guest physical addresses are the program's virtual ones: of
each GiB that is touched a memory slot is bound to the next GiB of a guest_memfd.
"""

from __future__ import annotations

import argparse
import struct
import sys

import numpy as np

from pgemu import Config, Machine
from pgemu.objects.guest_memfd import GuestMemfd
from pgemu.objects.vm import Vm

PAGE_1G = 1 << 30
_ASKED, _ANSWER = struct.Struct("<QQ"), struct.Struct("<q")
_ENOMEM = -12


class Owner:
    """A machine of one design, of which every `shared_every`-th page of 4K is shared with the host, 0: none."""

    def __init__(self, design: str, gigabytes: int, shared_every: int, cores: int) -> None:
        self.machine = Machine(Config(design, pool=gigabytes * PAGE_1G))
        self.gmem: GuestMemfd = self.machine.create_guest_memfd(gigabytes * PAGE_1G)
        process = self.machine.create_process()
        self.vms: list[Vm] = [self.machine.create_vm(process, protected=True) for _ in range(cores)]
        self._left = iter(range(gigabytes))
        self._bound: set[tuple[int, int]] = set()
        self._every = shared_every * 4096

    def touch(self, core: int, address: int) -> int:
        """Map the page of an address: 0, or what went wrong."""
        region = address // PAGE_1G
        if (core, region) not in self._bound:
            number = next(self._left, None)
            if number is None:
                return _ENOMEM
            bound = self.vms[core].bind(self.gmem, region * PAGE_1G, offset=number * PAGE_1G, length=PAGE_1G)
            if bound.status < 0:
                return bound.status
            self._bound.add((core, region))
            if self._every:
                first = number * PAGE_1G
                for offset in range(first, first + PAGE_1G, self._every):
                    self.gmem.convert(offset, 4096, shared=True)
        result = self.vms[core].touch(address)
        return min(int(np.int64(result.status)), 0)


def main() -> None:
    """Share the machine, say so, and answer until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="of the shared memory")
    parser.add_argument("--design", choices=["restructure", "pfnmap"], default="restructure")
    parser.add_argument("--gigabytes", type=int, default=16, help="guest memory; a GiB of addresses takes one")
    parser.add_argument("--shared-every", type=int, default=0, help="convert every n-th 4K page to shared; 0: none")
    parser.add_argument("--cores", type=int, default=1)
    options = parser.parse_args()
    owner = Owner(options.design, options.gigabytes, options.shared_every, options.cores)
    ask, answer = sys.stdin.buffer, sys.stdout.buffer
    with owner.machine.share(options.name, replace=True, reserve=False):
        answer.write(_ANSWER.pack(0))
        answer.flush()
        while len(asked := ask.read(_ASKED.size)) == _ASKED.size:
            core, address = _ASKED.unpack(asked)
            answer.write(_ANSWER.pack(owner.touch(core, address)))
            answer.flush()


if __name__ == "__main__":
    main()
