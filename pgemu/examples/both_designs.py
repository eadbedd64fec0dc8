"""Both designs of guest_memfd: one conversion, looked at closely, then a workload, compared.

It prints:

    restructure: ok; leaves of 4K, 2M and 1G: (0, 2, 0), then (512, 1, 0)
      guest faults afterwards: {'RET_PF_FIXED': 512, 'RET_PF_SPURIOUS': 512}
      the conversion: folio_split 1, vmemmap_page_restored 7, struct_page_written 511, spte_cleared 1, tlb_flush_vm 1
    pfnmap: ok; leaves of 4K, 2M and 1G: (0, 2, 0), then (512, 1, 0)
      guest faults afterwards: {'RET_PF_FIXED': 512, 'RET_PF_SPURIOUS': 512}
      the conversion: spte_cleared 1, tlb_flush_vm 1
    restructure: 10136 operations, 3409 conversions: {'ok': 3409}
      vmemmap pages restored: 6969690
    pfnmap: 10136 operations, 3409 conversions: {'ok': 3409}
      vmemmap pages restored: 0
    a rule was found broken that no defect of the version explains: False
"""

from pgemu import Config, Event, Machine, Operation, compare, load

SHOWN = ("folio_split", "vmemmap_page_restored", "struct_page_written", "spte_cleared", "tlb_flush_vm")


def one_page() -> None:
    """One page of 4 MiB of guest memory, in huge pages of 2M, is made shared: what that does."""
    for design in ("restructure", "pfnmap"):
        machine = Machine(Config(design, pool=4 << 20, page_size=2 << 20))
        gmem, vm = machine.create_guest_memfd(4 << 20), machine.create_vm(protected=True)
        vm.bind(gmem, gpa=0)
        vm.touch_many(range(0, 4 << 20, 4096))
        before = vm.leaves()
        done = gmem.convert(0x3000, 4096, shared=True)
        again = vm.touch_many(range(0, 4 << 20, 4096))
        counts = machine.statistics.as_dict()["events"]["convert"]
        print(f"{design}: {done.name}; leaves of 4K, 2M and 1G: {before}, then {vm.leaves()}")
        print(f"  guest faults afterwards: {again.outcomes}")
        print(f"  the conversion: {', '.join(f'{name} {counts[name]}' for name in SHOWN if name in counts)}")
        broken = machine.check()
        assert not broken


def a_workload() -> None:
    """The boot of a TDX guest on both, in pages of 1G."""
    comparison = compare(load("workload:tdx-boot"))
    for run in comparison.runs:
        convert = run.operation(Operation.CONVERT)
        assert convert is not None
        vmemmap = run.statistics.event(Event.VMEMMAP_PAGE_RESTORED)
        print(f"{run.design}: {run.count} operations, {convert.count} conversions: {convert.outcomes}")
        print(f"  vmemmap pages restored: {vmemmap}")
    print("a rule was found broken that no defect of the version explains:", comparison.broken)


def main() -> None:
    """Both, one after the other."""
    one_page()
    a_workload()


if __name__ == "__main__":
    main()
