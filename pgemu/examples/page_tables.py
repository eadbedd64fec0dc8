"""Page tables in ten lines: map, walk, unmap, and what must be flushed.

It prints:

    EditResult(status=0, detail=257, flush=None, records=0)
    (4, 0x2000, 0x3067)
    (3, 0x3008, 0x4067)
    (2, 0x4000, 0x800008e7)
    EditResult(status=0, detail=1, flush=Flush(0x40000000, 0x40200000, level=1), records=0)
    (4, 0x2000, 0x3067)
    (3, 0x3008, 0x4067)
    (2, 0x4000, 0x6067)
    (1, 0x6010, 0x80002867)
    ['0x80000000', '0x0', '0x80200123'] [0, 1, 0] [1, 1, 1]
"""

from pgemu import Config, Machine


def main() -> None:
    """Map 3 MiB, unmap one page of them."""
    machine = Machine(Config())
    table = machine.create_page_table("x86-64")  # or "ept", "npt", "arm64-s2", "vtd-s2", "amd-v1"
    print(table.map_range(0x4000_0000, physical=0x8000_0000, length=3 << 20))
    for step in table.walk(0x4000_2000):
        print(step)
    edit = table.unmap(0x4000_1000)  # splits the leaf of 2M
    print(edit)
    for step in table.walk(0x4000_2000):
        print(step)
    found = table.translate([0x4000_0000, 0x4000_1000, 0x4020_0123])
    print([hex(address) for address in found.physical.tolist()], found.status.tolist(), found.level.tolist())


if __name__ == "__main__":
    main()
