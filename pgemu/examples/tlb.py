"""A TLB in front of translations: what hits, what misses, what the misses read; edits say what to flush.

A program strides over 4 MiB of a process's memory, once mapped by leaves of 4K and once by two of 2M. Then a page of it
is unmapped: the edit returns the range that a kernel flushes, and the TLB is flushed with it.

It prints:

    leaves of 4K: {'first': 0, 'second': 1024, 'missed': 1024}, entries read: 1028
      after unmap() flush Flush(0x40005000, 0x40006000, level=1)
      {'first': 0, 'second': 1023, 'missed': 1025}, entries read: 1029
      2 accesses without a translation, 1 flush
    leaves of 2M: {'first': 2046, 'second': 0, 'missed': 2}, entries read: 4
      after unmap() flush Flush(0x40000000, 0x40200000, level=1)
      {'first': 1023, 'second': 511, 'missed': 514}, entries read: 517
      2 accesses without a translation, 1 flush
"""

from pgemu import Config, Machine, PageTable, Tlb, TlbFound

START, SIZE, PAGE = 0x4000_0000, 4 << 20, 4096


def stride(tlb: Tlb, table: PageTable) -> str:
    """Go over the memory twice, a page at a time: where translations were found."""
    found = tlb.translate(table, list(range(START, START + SIZE, PAGE)) * 2)
    where = {place.name.lower(): int((found.found == place).sum()) for place in TlbFound}
    return f"{where}, entries read: {int(found.references.sum())}"


def main() -> None:
    """Skylake's TLBs have 64 entries of 4K, and 1536 at the second level."""
    machine = Machine(Config())
    for level, name in ((1, "4K"), (2, "2M")):
        table, tlb = machine.create_page_table("x86-64"), Tlb("skylake-sp")
        table.map_range(START, physical=0x8000_0000, length=SIZE, max_level=level)
        print(f"leaves of {name}: {stride(tlb, table)}")
        edit = table.unmap(START + 5 * PAGE)
        print(f"  after unmap() flush {edit.flush}")
        if edit.flush is not None:
            tlb.flush()
        print(f"  {stride(tlb, table)}")
        print(f"  {tlb.counts.untranslated} accesses without a translation, {tlb.counts.flushes} flush")


if __name__ == "__main__":
    main()
