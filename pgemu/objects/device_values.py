"""What containers of devices tell: ranges, limits, accounts, what a conversion took from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pgemu_kernels import words as W

if TYPE_CHECKING:
    from pgemu.objects.address_space import AddressSpace

__all__ = ("Accounts", "ContainerInfo", "Range", "Revocations")


class Range(NamedTuple):
    """I/O addresses [start, last], bytes."""

    start: int
    last: int

    def __repr__(self) -> str:
        return f"Range({self.start:#x}, {self.last:#x})"


class ContainerInfo(NamedTuple):
    """VFIO_IOMMU_GET_INFO: page_sizes is a bitmap, available how many mappings more there may be, ranges the usable
    addresses."""

    page_sizes: int
    available: int
    ranges: tuple[Range, ...]

    def __repr__(self) -> str:
        ranges = ", ".join(map(repr, self.ranges))
        return f"ContainerInfo(page_sizes={self.page_sizes:#x}, available={self.available}, ranges=({ranges}))"


class Accounts(NamedTuple):
    """Pages of a process that devices have: locked by VFIO (of VmLck: mm->locked_vm), pinned by iommufd (VmPin)."""

    locked: int
    pinned: int

    @classmethod
    def of(cls, process: AddressSpace) -> Accounts:
        """Those of a process."""
        row = int(W.STATE_SPACES) + process.space * W.S_WORDS
        state = process.machine.arrays.state
        return cls(*(int(state[row + int(word)]) for word in (W.S_LOCKED_VM, W.S_PINNED_VM)))


class Revocations(NamedTuple):
    """What conversions and holes did to I/O entries over guest_memfd, 4K pages: see Iommufd.create_ioas().

    revoked: unmapped; widened: of them, pages that stay the device's, under a large entry that went whole; returned:
    entered by the kernel, again or because they became shared; lost: to be entered without memory for a table. cut,
    joined: large entries cut, and put together. windows: how often a device faulted meanwhile on pages that it had
    before and after, window_ns: low and high end of how long they were together.
    """

    revoked: int
    widened: int
    returned: int
    lost: int
    cut: int
    joined: int
    windows: int
    window_ns: tuple[float, float]
