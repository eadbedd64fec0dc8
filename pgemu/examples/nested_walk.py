"""A guest's walk through its own tables and stage 2, with every entry that it reads, in order.

The guest's tables lie at guest physical addresses, so that each of their entries is found by a walk of stage 2, and so
is the page in the end: with four levels each and leaves of 4K that is 4 x (4 + 1) + 4 = 24 entries. With leaves of 2M
in both it is 3 x (3 + 1) + 3 = 15.

It prints:

    leaves of level 1 over 1: 24 entries read
      the guest's (1) and stage 2's (2), in order: 222212222122221222212222
      the last one lies at 0xc000, the page at 0x100004234
    leaves of level 2 over 2: 15 entries read
      the guest's (1) and stage 2's (2), in order: 222122212221222
      the last one lies at 0xa008, the page at 0x100201234
"""

from collections.abc import Iterator

import numpy as np

from pgemu import Config, GuestMemfd, Kind, Machine, Vm

PRESENT, WRITE, HUGE = 1, 2, 0x80
ROOT, VIRTUAL, PAGE = 0x1000, 0x7F00_0000_1000, 0x20_0000


def tables(lowest: int) -> Iterator[tuple[int, bytes]]:
    """The guest's tables of levels 4 to `lowest`, a page each, which map VIRTUAL to PAGE."""
    for level in range(4, lowest - 1, -1):
        at = ROOT + (4 - level) * 0x1000
        entry = at + 0x1000 if level > lowest else PAGE | (HUGE if level == 2 else 0)
        words = np.zeros(512, np.uint64)
        words[VIRTUAL >> 12 + 9 * (level - 1) & 511] = entry | PRESENT | WRITE
        yield at, words.tobytes()


def guest(page_size: int) -> tuple[Machine, GuestMemfd, Vm]:
    """A VM whose memory is a guest_memfd of pages of a size."""
    machine = Machine(Config("pfnmap", pool=4 << 20, page_size=page_size))
    gmem, vm = machine.create_guest_memfd(4 << 20), machine.create_vm(protected=True)
    vm.bind(gmem, gpa=0)
    return machine, gmem, vm


def main() -> None:
    """The same access with leaves of 4K, and with leaves of 2M."""
    for page_size, lowest in ((4 << 10, 1), (2 << 20, 2)):
        machine, gmem, vm = guest(page_size)
        for gpa, table in tables(lowest):
            vm.touch(gpa, write=True)  # a guest fault, which maps it in stage 2
            machine.write_frame(gmem.pfn(gpa) or 0, table)
        vm.touch_many(range(PAGE, 2 * PAGE, 0x1000))
        found = vm.translate_virtual(ROOT, [VIRTUAL + 0x234], Kind.READ, references=True)
        assert found.references is not None
        stages = "".join(map(str, found.references.read_stages[0].tolist()))
        print(f"leaves of level {found.guest_level[0]} over {found.host_level[0]}: {found.read_count[0]} entries read")
        print(f"  the guest's (1) and stage 2's (2), in order: {stages}")
        print(f"  the last one lies at {found.references.reads[0, -1]:#x}, the page at {found.physical[0]:#x}")


if __name__ == "__main__":
    main()
