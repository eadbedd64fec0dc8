"""A design of one's own: a row of properties, which machines, comparisons and the command line take by its name.

"frames" enters frame numbers into page tables without counting them, as pfnmap does, but under a VMA that is not
VM_PFNMAP: madvise(MADV_DONTNEED) is not refused then. What each property does is in
pgemu_kernels/words/properties.py, the steps of each order of conversion in pgemu_kernels/gmem/orders.py. A design that
needs a step which none has is no row, but a change of pgemu.

It prints:

    restructure: pin_user_pages() ok, MADV_DONTNEED ok
    pfnmap: pin_user_pages() -EFAULT, MADV_DONTNEED -EINVAL
    frames: pin_user_pages() -EFAULT, MADV_DONTNEED ok
    restructure: conversions {'ok': 3409}, flushes of the VM in them 1612
    pfnmap: conversions {'ok': 3409}, flushes of the VM in them 1615
    frames: conversions {'ok': 3409}, flushes of the VM in them 1615
    a rule was found broken that no defect of the version explains: False
"""

from pgemu import Config, Event, Machine, Operation, Property, add_design, compare, load

PAGE, M2, HVA = 4096, 2 << 20, 0x7F00_0000_0000


def main() -> None:
    """Add it, try one call of each design, and compare all three."""
    add_design(
        "frames",
        Property.SPECIAL_ENTRIES | Property.INSERTS_LOCKED | Property.HOLES_UNMAP,
        order="slides",
        batch="range",
        zero="page",
    )
    designs = ("restructure", "pfnmap", "frames")
    for design in designs:
        machine = Machine(Config(design, pool=M2, page_size=M2))
        gmem, process = machine.create_guest_memfd(M2, shared=True), machine.create_process()
        process.mmap(gmem, HVA)
        process.touch(HVA)
        pin, zap = process.pin(HVA, PAGE, pin=0), process.madvise_dontneed(HVA, PAGE)
        print(f"{design}: pin_user_pages() {pin.name}, MADV_DONTNEED {zap.name}")
    comparison = compare(load("workload:tdx-boot"), designs)
    for run in comparison.runs:
        convert = run.operation(Operation.CONVERT)
        assert convert is not None
        flushes = run.statistics.event(Event.TLB_FLUSH_VM, Operation.CONVERT)
        print(f"{run.design}: conversions {convert.outcomes}, flushes of the VM in them {flushes}")
    print("a rule was found broken that no defect of the version explains:", comparison.broken)


if __name__ == "__main__":
    main()
