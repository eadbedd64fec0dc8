"""Named scenarios: a machine, what is done to it in which order, and what came of it.

>>> from pgemu.scenarios import smallest_pfnmap
>>> boot = smallest_pfnmap(guest_memory=32 << 20)  # doctest: +SKIP
>>> boot.phases[0].results  # doctest: +SKIP
{'VM_FAULT_NOPAGE': 2048}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pgemu.machine.results import operation_name, result_name
from pgemu.sizes import size as size_text
from pgemu_kernels import words as W
from pgemu_kernels.formats.bits import ADDRESS
from pgemu_kernels.words.events import Event, Gauge
from pgemu_kernels.words.operations import Operation

if TYPE_CHECKING:
    from pgemu.machine.results import Results
    from pgemu.objects.address_space import AddressSpace
    from pgemu.objects.guest_memfd import GuestMemfd
    from pgemu.objects.machine import Machine
    from pgemu.objects.vm import Vm

__all__ = ("SCENARIOS", "Phase", "SmallestPfnmap", "smallest_pfnmap")

_PAGE = W.PAGE_4K
_MOST_MEMORY = 64 << 30  # every page of 4K is one of the page allocator's, with a struct page of its own

# Where kvmtool puts things (x86/kvm.c, x86/include/kvm/kvm-arch.h, x86/include/kvm/bios.h): guest addresses.
KVMTOOL_HVA = 0x7F00_0000_0000  # a model address: kvmtool takes what mmap gives it
SETUP_CODE = 0x1_0000  # BOOT_LOADER_SELECTOR 0x1000
COMMAND_LINE = 0x2_0000  # BOOT_CMDLINE_OFFSET
EBDA = 0x9_FC00  # EBDA_START, with the e820 map
VGA_ROM = 0xC_0000
BIOS = 0xF_0000  # MB_BIOS_BEGIN, with the MP table
KERNEL_IMAGE = 0x10_0000  # BZ_KERNEL_START
INITRD_MAX = 0x7FFF_FFFF  # initrd_addr_max of a usual bzImage
DECOMPRESSED = 0x100_0000  # CONFIG_PHYSICAL_START


class Phase(NamedTuple):
    """One stretch of accesses: by the process (HOST_FAULT) or the guest (GUEST_FAULT), a page each."""

    name: str
    operation: Operation
    pages: int
    results: dict[str, int]
    levels: dict[int, int]

    @property
    def document(self) -> dict[str, Any]:
        """The same, ready for JSON."""
        levels = {str(level): count for level, count in self.levels.items()}
        operation = operation_name(self.operation)
        return {"phase": self.name, "operation": operation, "pages": self.pages, "results": self.results} | {
            "levels": levels
        }


def _phase(name: str, operation: Operation, results: Results) -> Phase:
    names = Counter(result_name(operation, int(status)) for status in results.status)
    levels = Counter(int(level) for level in results.detail)
    return Phase(name, operation, len(results.status), dict(names), dict(levels))


@dataclass(frozen=True)
class SmallestPfnmap:
    """What the slides' smallest tested change does; see smallest_pfnmap().

    host_entry, guest_entry: the process's and the VM's leaf of the kernel image's first page. references, mapcount:
    of its struct page. sees_host_data, sees_guest_data: whether what one side stores is what the other loads.
    dontneed: status of MADV_DONTNEED on the mapping. broken: rules found broken by Machine.check().
    """

    machine: Machine
    gmem: GuestMemfd
    process: AddressSpace
    vm: Vm
    phases: tuple[Phase, ...]
    host_entry: int
    guest_entry: int
    references: int
    mapcount: int
    sees_host_data: bool
    sees_guest_data: bool
    dontneed: int
    broken: int

    @property
    def document(self) -> dict[str, Any]:
        """What happened, ready for JSON."""
        statistics = self.machine.statistics
        return {
            "scenario": "smallest-pfnmap",
            "phases": [phase.document for phase in self.phases],
            "host_entry": f"{self.host_entry:#x}",
            "guest_entry": f"{self.guest_entry:#x}",
            "references": self.references,
            "mapcount": self.mapcount,
            "sees_host_data": self.sees_host_data,
            "sees_guest_data": self.sees_guest_data,
            "dontneed": self.dontneed,
            "host_leaves": statistics.gauge(Gauge.HOST_LEAVES_4K),
            "stage2_leaves": statistics.gauge(Gauge.STAGE2_LEAVES_4K),
            "rmap_changes": statistics.event(Event.RMAP_CHANGED),
            "pages_zeroed": statistics.event(Event.PAGE_ZEROED),
            "pages_allocated": statistics.gauge(Gauge.BLOCKS_HUGE),
            "broken": self.broken,
        }

    def lines(self) -> Iterator[str]:
        """What happened, in lines of text."""
        facts = self.document
        yield f"guest memory: {size_text(self.gmem.size)} of 4K folios, all shared, mapped with VM_PFNMAP"
        for phase in self.phases:
            results = ", ".join(f"{name} {count}" for name, count in phase.results.items())
            yield f"{phase.name}: {phase.pages} {operation_name(phase.operation)}s: {results}"
        yield f"entry of the process: {facts['host_entry']} (special), of the VM: {facts['guest_entry']}"
        yield f"its struct page: {self.references} reference (the page cache's), mapcount {self.mapcount}"
        yield f"leaves: {facts['host_leaves']} of the process, {facts['stage2_leaves']} of the VM, all of 4K"
        yield f"guest sees what the host wrote: {_yes(self.sees_host_data)}; host what the guest wrote: " + _yes(
            self.sees_guest_data
        )
        yield f"MADV_DONTNEED of the mapping: {result_name(Operation.ZAP, self.dontneed)}"
        yield f"rules broken: {self.broken}"


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"


def _initrd_address(memory: int, size: int) -> int:
    """As high as it fits, in steps of 1 MiB, below the kernel's initrd_addr_max: x86/kvm.c:load_bzimage()."""
    address = min(memory, INITRD_MAX) & ~0xFFFFF
    while address >= memory - size:
        address -= 0x100000
    return address


def _pages(start: int, length: int) -> np.ndarray[Any, Any]:
    """uint64[n]: addresses of the pages that [start, start + length) touches."""
    return np.arange(start & ~(_PAGE - 1), start + length, _PAGE, dtype=np.uint64)


def _leaf(steps: Sequence[tuple[int, int, int]]) -> int:
    return steps[-1][2]


def smallest_pfnmap(
    *,
    guest_memory: int = 64 << 20,
    kernel_image: int = 12 << 20,
    initrd: int = 4 << 20,
    **options: Any,
) -> SmallestPfnmap:
    """Boot a VM over the smallest change that the slides of 2025-08-07 say was tested.

    A guest_memfd of 4K folios, all shared, no confidential VM; its mmap sets VM_PFNMAP, and its fault handler returns
    VM_FAULT_NOPAGE after vmf_insert_pfn() where it handed the page to core-mm. A VM booted with kvmtool. kvmtool writes
    through its mapping the kernel's setup code and image, the command line, the initrd and the BIOS's tables where its
    sources put them; then the guest runs over them and into fresh memory (which part of it: inference, every fourth
    page behind the kernel).

    :param guest_memory: bytes of guest memory, a multiple of 2 MiB that holds what is loaded
    :param kernel_image: bytes of the protected-mode kernel. initrd: bytes of the initrd
    :param options: further fields of pgemu.Config: kernel, stage2, seed, ...
    :raises ValueError: guest memory too small, or a parameter that Config refuses

    >>> smallest_pfnmap(guest_memory=32 << 20, kernel_image=4 << 20, initrd=1 << 20).phases[0].results
    {'VM_FAULT_NOPAGE': 1024}
    """
    if guest_memory > _MOST_MEMORY:
        raise ValueError(f"guest memory of {guest_memory} bytes: expected at most {_MOST_MEMORY}, which is 64 GiB")
    if guest_memory < DECOMPRESSED + 2 * kernel_image + initrd + (2 << 20):
        raise ValueError(
            f"guest memory of {guest_memory} bytes: expected room for the kernel, decompressed as well, and the initrd"
        )
    machine, gmem, process, vm = _scene(guest_memory, options)
    written = _loaded(guest_memory, kernel_image, initrd)
    phases = [_accessed(process, name, _pages(*written[name]) + np.uint64(KVMTOOL_HVA)) for name in written]
    data = b"loaded by the host"
    first = _leaf(process.walk(KVMTOOL_HVA + KERNEL_IMAGE))
    machine.write_frame((first & ADDRESS) >> 12, data)
    run = _run(written, guest_memory, kernel_image)
    phases += [_phase(name, Operation.GUEST_FAULT, vm.touch_many(pages, write=True)) for name, pages in run.items()]
    second = _leaf(vm.walk(KERNEL_IMAGE))
    sees_host_data = machine.read_frame((second & ADDRESS) >> 12).startswith(data)
    fresh = int(run["fresh memory"][0])
    answer = b"stored by the guest"
    machine.write_frame((_leaf(vm.walk(fresh)) & ADDRESS) >> 12, answer)
    phases.append(_accessed(process, "console buffer", np.array([KVMTOOL_HVA + fresh], np.uint64), write=False))
    seen = machine.read_frame((_leaf(process.walk(KVMTOOL_HVA + fresh)) & ADDRESS) >> 12)
    counts = int(machine.struct_page((first & ADDRESS) >> 12)[6])
    return SmallestPfnmap(
        machine,
        gmem,
        process,
        vm,
        tuple(phases),
        first,
        second,
        references=counts >> 32,
        mapcount=(counts + 1) & 0xFFFF_FFFF,
        sees_host_data=sees_host_data,
        sees_guest_data=seen.startswith(answer),
        dontneed=process.madvise_dontneed(KVMTOOL_HVA, guest_memory).status,
        broken=machine.check(),
    )


def _scene(guest_memory: int, options: dict[str, Any]) -> tuple[Machine, GuestMemfd, AddressSpace, Vm]:
    """A VM over a guest_memfd that its VMM has mapped."""
    from pgemu.objects.guest_memfd import CreateFlags
    from pgemu.objects.machine import Config, Machine

    machine = Machine(Config("pfnmap", pool=guest_memory, page_size=_PAGE, **options))
    gmem = machine.create_guest_memfd(guest_memory, flags=CreateFlags.MMAP | CreateFlags.INIT_SHARED)
    process = machine.create_process()
    vm = machine.create_vm(process)
    for what, result in (("mmap()", process.mmap(gmem, KVMTOOL_HVA)), ("memory slot", vm.bind(gmem, 0))):
        if result.status:
            raise ValueError(f"guest memory of {guest_memory} bytes: its {what} is {result.name}")
    return machine, gmem, process, vm


def _loaded(guest_memory: int, kernel_image: int, initrd: int) -> dict[str, tuple[int, int]]:
    """What kvmtool writes before the guest runs: start and bytes."""
    return {
        "kernel image": (KERNEL_IMAGE, kernel_image),
        "setup code": (SETUP_CODE, 16 << 10),
        "command line": (COMMAND_LINE, 2048),
        "initrd": (_initrd_address(guest_memory, initrd), initrd),
        "BIOS tables": (0, 0x500),  # interrupt vectors and BIOS data area
        "EBDA and e820 map": (EBDA, 0x400),
        "VGA ROM": (VGA_ROM, 0x8000),
        "BIOS": (BIOS, 0x1_0000),
    }


def _run(written: dict[str, tuple[int, int]], guest_memory: int, kernel_image: int) -> dict[str, Any]:
    """What the guest then touches, in order: pages of each stretch."""
    run = {name: _pages(*written[name]) for name in ("setup code", "BIOS tables", "EBDA and e820 map", "command line")}
    run["kernel image"] = _pages(*written["kernel image"])
    run["decompressed kernel"] = _pages(DECOMPRESSED, 2 * kernel_image)
    run["initrd"] = _pages(*written["initrd"])
    behind = _pages(DECOMPRESSED + 2 * kernel_image, guest_memory - DECOMPRESSED - 2 * kernel_image)
    run["fresh memory"] = np.setdiff1d(behind, run["initrd"])[::4]
    return run


def _accessed(process: AddressSpace, name: str, addresses: Any, *, write: bool = True) -> Phase:
    return _phase(name, Operation.HOST_FAULT, process.touch_many(addresses, write=write))


SCENARIOS: Mapping[str, Callable[..., SmallestPfnmap]] = MappingProxyType({"smallest-pfnmap": smallest_pfnmap})
"""Scenarios by the name that `pgemu scenario` takes."""
