"""What the kernel's selftests have around their cases: a VM, a guest_memfd mapped by its process, reads and writes.

Bytes travel as they would: an access walks the page tables of the process or of stage 2, and what is read or written is
the frame that the leaf names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pgemu.objects.address_space import AddressSpace
from pgemu.objects.guest_memfd import Form, GuestMemfd
from pgemu.objects.machine import Config, Machine, Result
from pgemu.objects.vm import Vm
from pgemu_kernels import words as W
from pgemu_kernels.formats.bits import ADDRESS
from pgemu_kernels.words.operations import Flag, Operation

PAGE = W.PAGE_4K
HVA = 0x7F00_0000_0000
GPA = 1 << 32  # above the APIC page, as the selftests have it
SIZES = {"4K": PAGE, "2M": W.PAGE_2M, "1G": W.PAGE_1G}


@dataclass(frozen=True)
class Variant:
    """A design, whose order of steps, and the allocator's page size.

    posted: whether kernel code of this form exists, so that the kernel's test could run on it. For the others (pfnmap;
    larger pages than a series has) a case says what is expected, and why.
    """

    design: str
    order: str
    size: str
    posted: bool

    @property
    def name(self) -> str:
        return f"{self.order or self.design}-{self.size}"

    @property
    def restructure(self) -> bool:
        return self.design == "restructure"

    @property
    def page_size(self) -> int:
        return SIZES[self.size]

    @property
    def form(self) -> Form:
        """Whose checks creation, mmap and bind have. Designs without a posted form have those of merged code."""
        return {"rfc2": "rfc2", "next4k": "next"}.get(self.order, "main")  # type: ignore[return-value]

    def config(self, bytes_: int, **parameters: Any) -> Config:
        """A machine with memory for `bytes_` of guest memory."""
        if self.restructure:
            parameters |= {"order": self.order, "split_form": "rfc2" if self.order == "rfc2" else "jan2026"}
        smallest = max(self.page_size, W.PAGE_2M)
        parameters.setdefault("punch", "zero")  # as RFC v2; the tests of merged code have pages of 4K
        parameters.setdefault("pool", -(-bytes_ // smallest) * smallest)
        return Config(self.design, page_size=self.page_size, **parameters)  # type: ignore[arg-type]


VARIANTS = (
    Variant("restructure", "next4k", "4K", True),
    *(Variant("restructure", "rfc2", size, True) for size in SIZES),
    *(Variant("restructure", "fixup", size, True) for size in ("2M", "1G")),
    *(Variant("restructure", "jan2026", size, False) for size in SIZES),
    *(Variant("pfnmap", "", size, False) for size in SIZES),
)


@dataclass(frozen=True)
class Case:
    """One of the kernel's tests: its file, its name, and what it does; `page` where it is run for several pages."""

    source: str
    name: str
    run: Callable[[Any], None]
    page: int | None = None
    variants: tuple[Variant, ...] = VARIANTS

    @property
    def id(self) -> str:
        return self.name if self.page is None else f"{self.name}-{self.page}"


CASES: list[Case] = []


def case(
    source: str, pages: Iterable[int] | None = None, variants: Callable[[Variant], bool] | None = None
) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Register a function as a case named as in the kernel; with `pages` once for each, as `t.page`."""

    def register(function: Callable[[Any], None]) -> Callable[[Any], None]:
        chosen = tuple(v for v in VARIANTS if variants is None or variants(v))
        name = function.__name__
        CASES.extend(Case(source, name, function, page, chosen) for page in (pages if pages is not None else (None,)))
        return function

    return register


class Scene:
    """A VM of a process that maps all of a guest_memfd at HVA, bound at GPA."""

    def __init__(self, variant: Variant, page: int | None = None) -> None:
        self.variant = variant
        self.page = page if page is not None else 0

    def set_up(self, size: int, *, shared: bool, **parameters: Any) -> Scene:
        """A guest_memfd of at least `size` bytes, all shared or all private."""
        self.boot(size, **parameters)
        self.gmem: GuestMemfd = self.machine.create_guest_memfd(self.size, shared=shared, form=self.variant.form)
        self.process: AddressSpace = self.machine.create_process()
        self.vm: Vm = self.machine.create_vm(self.process, protected=True)
        assert self.process.mmap(self.gmem, HVA).status == 0
        assert self.vm.bind(self.gmem, GPA).status == 0
        return self

    def boot(self, size: int, **parameters: Any) -> None:
        """A machine for guest memory of at least `size` bytes, and nothing on it."""
        page_size = self.variant.page_size
        self.size = -(-size // page_size) * page_size
        self.machine = Machine(self.variant.config(self.size, **parameters))
        self.machine.check_each()

    @property
    def test_page_size(self) -> int:
        """What the RFC v2 tests convert at a time: the allocator's page."""
        return self.variant.page_size

    def by_design(self, restructure: Any, pfnmap: Any, reason: str) -> Any:
        """What is expected; `reason`: why of pfnmap, for which no kernel exists."""
        assert reason
        return restructure if self.variant.restructure else pfnmap

    def clean_up(self) -> None:
        """As cleanup_test(): the VM, the mapping, the file; the machine is recounted before and after."""
        assert self.machine.check() == 0, self.machine.broken
        if hasattr(self, "gmem"):
            self.gmem.close()
        assert self.machine.check() == 0, self.machine.broken

    # ------------------------------------------------------------------ bytes

    def _frame(self, walk: list[tuple[int, int, int]], address: int) -> int:
        level, _, entry = walk[-1]
        assert entry & 1, "the access succeeded, but no entry is present"
        inside = (1 << 9 * (level - 1)) - 1
        return ((entry & ADDRESS) >> 12 & ~inside) + (address >> 12 & inside)

    def _use(self, pfn: int, expected: str | int | None, value: str | int | None) -> None:
        if expected is not None:
            assert self.machine.read_frame(pfn)[0] == byte(expected)
        if value is not None:
            self.machine.write_frame(pfn, bytes([byte(value)]))

    def host_rmw(
        self, offset: int, expected: str | int | None, value: str | int | None, process: AddressSpace | None = None
    ) -> None:
        """The host reads `expected` at an offset and writes `value`; None: does not look, does not write."""
        process = process or self.process
        result = process.touch(HVA + offset, write=value is not None)
        assert result.status in (0, W.VM_FAULT_LOCKED, W.VM_FAULT_NOPAGE), f"host access: {result}"
        self._use(self._frame(process.walk(HVA + offset), HVA + offset), expected, value)

    def host_cannot(self, offset: int, process: AddressSpace | None = None) -> None:
        """Reads and writes of the host end in SIGBUS."""
        for write in (False, True):
            assert (process or self.process).touch(HVA + offset, write=write).status == W.VM_FAULT_SIGBUS

    def guest_rmw(self, offset: int, expected: str | int | None, value: str | int | None, vm: Vm | None = None) -> None:
        """The guest reads `expected` at an offset and writes `value`."""
        vm = vm or self.vm
        result = vm.touch(GPA + offset, write=value is not None)
        assert result.status in (W.RET_PF_FIXED, W.RET_PF_SPURIOUS), f"guest access: {result}"
        self._use(self._frame(vm.walk(GPA + offset), GPA + offset), expected, value)

    def guest_fault(self, offset: int, *, private: bool) -> Result:
        """A guest access of one kind, as hardware that has private and shared addresses tells."""
        flags = Flag.PRIVATE if private else Flag.SHARED
        return self.machine.operate(Operation.GUEST_FAULT, flags=flags, vm=self.vm.vm, address=GPA + offset)

    # ------------------------------------------------------------------ what the in-place tests assert

    def private(self, offset: int, expected: str | int, value: str | int) -> None:
        """test_private(): the host gets SIGBUS, the guest reads and writes."""
        self.host_cannot(offset)
        self.guest_rmw(offset, expected, value)
        self.host_cannot(offset)

    def shared(self, offset: int, expected: str | int, host: str | int, guest: str | int) -> None:
        """test_shared(): host and guest see what the other wrote."""
        self.host_rmw(offset, expected, host)
        self.guest_rmw(offset, host, guest)
        self.host_rmw(offset, guest, None)

    def to_private(self, offset: int, expected: str | int, value: str | int, size: int = PAGE) -> None:
        """test_convert_to_private()."""
        assert self.gmem.convert(offset, size, shared=False) == (0, 0)
        self.private(offset, expected, value)

    def to_shared(self, offset: int, expected: str | int, host: str | int, guest: str | int, size: int = PAGE) -> None:
        """test_convert_to_shared()."""
        assert self.gmem.convert(offset, size, shared=True) == (0, 0)
        self.shared(offset, expected, host, guest)

    def to_private_fails(self, offset: int, size: int, error_offset: int) -> None:
        """test_convert_to_private_fails(): -EAGAIN with the offset of the page that is in use."""
        assert self.gmem.convert(offset, size, shared=False) == (-W.EAGAIN, error_offset)


def byte(value: str | int) -> int:
    return ord(value) if isinstance(value, str) else value
