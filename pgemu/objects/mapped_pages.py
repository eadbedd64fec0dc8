"""Pages of a VM that KVM itself maps, as an L1 hypervisor's L2 guests make it: pgemu_kernels.gmem.mapped_pages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from pgemu.machine.arguments import OfMachine, guards_creation
from pgemu.machine.field_rules import number_of
from pgemu.machine.results import errno_name
from pgemu_kernels import words as W
from pgemu_kernels.words.operations import Flag, Operation

if TYPE_CHECKING:
    import numpy as np

    from pgemu.machine.core import Core
    from pgemu.machine.results import Result

__all__ = ("MappedPage", "PfnCache")

_NONE = W.MAPPED_PAGES  # the number of one that is no more
_NUMBER = number_of("a page that KVM maps", W.MAPPED_PAGES)


def _word_at(machine: Core, number: int, name: np.uint64) -> int:
    """A word of a row."""
    return int(machine.arrays.state[int(W.STATE_MAPPED) + number * W.K_WORDS + int(name)])


def _free_number(machine: Core) -> int:
    """The first number that no mapping has. OSError ENOSPC past words.MAPPED_PAGES, which Linux does not know."""
    number = next((i for i in range(W.MAPPED_PAGES) if not _word_at(machine, i, W.K_KIND)), None)
    if number is None:
        raise OSError(W.ENOSPC, f"more than {W.MAPPED_PAGES} pages that KVM maps")
    return number


@guards_creation(number=_NUMBER)
@dataclass(frozen=True)
class _Mapped(OfMachine):
    """One of them; another one may get the number when this one is gone. Then it is still gone."""

    machine: Core = field(repr=False)
    number: int
    generation: int = field(default=-1, repr=False, kw_only=True)
    _kind: ClassVar[int]
    _what: ClassVar[str]

    def __post_init__(self) -> None:
        """It is the one that has its number now."""
        if self._word(W.K_KIND) != self._kind:
            raise ValueError(f"number {self.number}: expected that of a {type(self).__name__}")
        if self.generation < 0:
            object.__setattr__(self, "generation", self._word(W.K_LIVES))

    def _word(self, name: np.uint64) -> int:
        return _word_at(self.machine, self.number, name)

    @property
    def live(self) -> bool:
        """Whether it is there still: not unmapped, nor gone with its VM."""
        return bool(self._word(W.K_KIND)) and self._word(W.K_LIVES) == self.generation

    def _of(self, name: np.uint64) -> int:
        """A word of its row; 0 when it is gone, and the row perhaps another's."""
        return self._word(name) if self.live else 0

    def _check_live(self) -> None:
        if not self.live:
            raise ValueError(f"{self._what} {self.number}: it is gone, expected one that is not")

    @property
    def vm(self) -> int:
        """Number of the VM; 0, here and below, when it is gone."""
        return self._of(W.K_VM)

    @property
    def gpa(self) -> int:
        """Guest physical address that was mapped, bytes."""
        return self._of(W.K_GPA)

    @property
    def pfn(self) -> int:
        """Frame that KVM uses; 0 of a cache whose last look-up failed."""
        return self._of(W.K_PFN)

    @property
    def references(self) -> int:
        """References on the frame's folio that are held for it: 1024 of a pin, 1 before Linux 6.13, or 0."""
        return self._of(W.K_REFERENCES)

    @property
    def _now(self) -> int:
        return self.number if self.live else _NONE

    def _extent(self) -> tuple[int, int]:
        """Where in the page it begins, and its bytes."""
        return 0, W.PAGE_4K

    def _place(self, offset: int, length: int) -> int:
        """Where in the page `length` bytes from `offset` of the mapping on are. ValueError outside it, or when it is
        gone."""
        self._check_live()
        begin, size = self._extent()
        if offset > size or length > size - offset:
            raise ValueError(f"offset {offset} of {length} bytes: expected to lie within {size}")
        return begin + offset

    def _access(self, flags: int) -> int:
        """KVM accesses the page: its frame. OSError: EFAULT where a cache has to be refreshed."""
        flags |= Flag.THROUGH
        result = self.machine.operate(Operation.NESTED_MAP, flags=flags, vm=self.vm, object_=self.number)
        if result.status:
            raise OSError(-result.status, f"{self._what} {self.number}: {errno_name(-result.status)}")
        return result.detail

    def read(self, offset: int = 0, length: int | None = None) -> bytes:
        """What KVM reads by it: `length` bytes, or all that follow, from `offset` of it on.

        Whatever lies in the frame now is read: of a page that has become private, or is another file's, that counts as
        MAPPED_STALE_PRIVATE or MAPPED_STALE_FREED. ValueError when it is gone, or outside it; OSError EFAULT of a cache
        that is not valid (check(), refresh()).

        >>> len(vm.pfn_cache(8, 8).read())
        8
        """
        self._check_live()
        size = max(self._extent()[1] - offset, 0) if length is None else length
        place = self._place(offset, size)
        return self.machine.read_frame(self._access(0))[place : place + size]

    def write(self, data: bytes, offset: int = 0) -> None:
        """Let KVM write by it. As read(); ValueError too of a mapping that is not for writing, OSError ENOMEM.

        >>> vm.pfn_cache(8, 8).write(b"hello")
        """
        place = self._place(offset, len(data))
        if not self._of(W.K_WRITE):
            raise ValueError(f"{self._what} {self.number}: it is mapped for reading, expected one for writing")
        self.machine.write_frame(self._access(Flag.WRITE), data, place)

    def _end(self) -> Result:
        return self.machine.operate(Operation.NESTED_UNMAP, object_=self._now)


@guards_creation(number=_NUMBER)
@dataclass(frozen=True)
class MappedPage(_Mapped):
    """A page that KVM has mapped by kvm_vcpu_map(): struct kvm_host_map. See Vm.map_page.

    >>> machine = Machine(Config("restructure", pool=4 << 20, page_size=2 << 20))
    >>> gmem, process = machine.create_guest_memfd(4 << 20, shared=True), machine.create_process()
    >>> vm = machine.create_vm(process, protected=True)
    >>> process.mmap(gmem, 0x4000_0000).name, vm.bind(gmem, gpa=0, userspace_addr=0x4000_0000).name
    ('ok', 'ok')
    >>> page = vm.map_page(0)
    """

    _kind = int(W.MAPPED_MAP)
    _what = "mapped page"

    @classmethod
    def create(cls, machine: Core, vm: int, gpa: int, write: bool) -> MappedPage:
        """See Vm.map_page.

        >>> type(page).create(machine, vm.vm, 4096, True).gpa
        4096
        """
        number = _free_number(machine)
        flags = Flag.WRITE if write else 0
        result = machine.operate(Operation.NESTED_MAP, flags=flags, vm=vm, object_=number, address=gpa)
        if result.status:
            raise OSError(-result.status, f"kvm_vcpu_map() of VM {vm} at {gpa:#x}: {errno_name(-result.status)}")
        return cls(machine, number)

    def unmap(self) -> Result:
        """kvm_vcpu_unmap(): 0, or -ENOENT when it is gone. What it held of the folio is given back.

        >>> page.unmap().name, page.live
        ('ok', False)
        """
        return self._end()


@guards_creation(number=_NUMBER)
@dataclass(frozen=True)
class PfnCache(_Mapped):
    """A struct gfn_to_pfn_cache. virt/kvm/pfncache.c; see Vm.pfn_cache.

    >>> machine = Machine(Config("restructure", pool=4 << 20, page_size=2 << 20))
    >>> gmem, process = machine.create_guest_memfd(4 << 20, shared=True), machine.create_process()
    >>> vm = machine.create_vm(process, protected=True)
    >>> process.mmap(gmem, 0x4000_0000).name, vm.bind(gmem, gpa=0, userspace_addr=0x4000_0000).name
    ('ok', 'ok')
    >>> cache = vm.pfn_cache(8, 8)
    """

    _kind = int(W.MAPPED_CACHE)
    _what = "pfn cache"

    @classmethod
    def create(cls, machine: Core, vm: int, gpa: int, length: int) -> PfnCache:
        """See Vm.pfn_cache.

        >>> type(cache).create(machine, vm.vm, 16, 8).length
        8
        """
        number = _free_number(machine)
        result = _activate(machine, vm, number, gpa, length)
        if result.status not in (0, -W.EFAULT):
            raise OSError(-result.status, f"kvm_gpc_activate() of VM {vm} at {gpa:#x}: {errno_name(-result.status)}")
        return cls(machine, number)

    @property
    def length(self) -> int:
        """Bytes."""
        return self._of(W.K_LENGTH)

    def _extent(self) -> tuple[int, int]:
        return self.gpa % W.PAGE_4K, self.length

    def check(self) -> bool:
        """kvm_gpc_check(): whether the frame can be used: no notifier came, no memory slot changed. False when gone.

        >>> cache.check(), process.zap(0x4000_0000, 4096).name, cache.check()
        (True, 'ok', False)
        """
        if not self.live:
            return False
        vm = int(W.STATE_VMS) + self.vm * W.V_WORDS
        return bool(self._word(W.K_VALID) and self._word(W.K_SLOTS) == self.machine.arrays.state[vm + W.V_GENERATION])

    def refresh(self) -> Result:
        """kvm_gpc_refresh(): 0 with the frame, -EFAULT where none can be had, and the cache is invalid; -EBUSY where
        Linux would wait for a conversion; -EOPNOTSUPP over memory of other kinds. ValueError when it is gone.

        >>> process.zap(0x4000_0000, 4096).name, cache.refresh().name, cache.check()
        ('ok', 'ok', True)
        """
        return self.activate(self.gpa, self.length)

    def activate(self, gpa: int, length: int) -> Result:
        """kvm_gpc_activate() at another guest address: as refresh(); -EINVAL past the page, and all is as before.

        >>> cache.activate(4096, 16).name, cache.gpa
        ('ok', 4096)
        """
        self._check_live()
        return _activate(self.machine, self.vm, self.number, gpa, length)

    def deactivate(self) -> Result:
        """kvm_gpc_deactivate(): 0, or -ENOENT when it is gone.

        >>> cache.deactivate().name, cache.check()
        ('ok', False)
        """
        return self._end()


def _activate(machine: Core, vm: int, number: int, gpa: int, length: int) -> Result:
    return machine.operate(Operation.NESTED_MAP, flags=Flag.CACHED, vm=vm, object_=number, address=gpa, length=length)
