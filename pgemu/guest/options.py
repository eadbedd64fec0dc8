"""What a guest is that runs a recorded program: its memory, how its kernel hands it out, and its I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pgemu.guest.frames import Allocation
from pgemu.machine.arguments import guards_creation
from pgemu.machine.field_rules import Rule, amount, shown
from pgemu.sizes import size as size_text
from pgemu.trace.memory_layout import align_up
from pgemu_kernels.words.operations import PAGE_1G, PAGE_2M, PAGE_4K

__all__ = ("GuestOptions",)

_LARGEST = 1 << 40
_LOW = 2 * PAGE_1G


def _is_share(value: float) -> bool:
    return 0 <= value <= 1


_SHARE = Rule(lambda: "a share from 0 to 1", float, _is_share)
_SIZES = amount(0, _LARGEST, f"bytes, an integer from 0 to {_LARGEST}")


@guards_creation(guest_memory=_SIZES, bounce_size=_SIZES, io_rate=_SHARE, fragmentation=_SHARE,
                 seed=amount(0, (1 << 63) - 1, "an integer from 0 on"))  # fmt: skip
@dataclass(frozen=True)
class GuestOptions:
    """A guest.

    Attributes:
        guest_memory: bytes from guest physical address 0 on, one memory slot; a multiple of 2 MiB
        allocation: how frames are handed out at the first touch of a page: "sequential", "random" (a permutation by
            `seed`), "thp" (2 MiB for a 2M range that nothing was mapped in, else 4K); see pgemu.guest.frames
        seed: of everything that is drawn
        fragmentation: share of the 2 MiB blocks of which the guest's kernel has a page already: no huge page
        private: its memory is private (a confidential VM); without it host and guest share everything
        io_rate: share of the accesses after which a page of I/O happens, evenly spread
        io: "bounce": through shared buffers, one after the other; "convert": the page of the access becomes shared,
            the host writes to it, and it is private and accepted again; "direct": the host writes to the page as it
            is, for guests that are not private
        bounce_size: bytes of the buffers; 64 MiB is IO_TLB_DEFAULT_SIZE (include/linux/swiotlb.h), the least that
            guests of SEV and TDX have (arch/x86/mm/mem_encrypt.c:mem_encrypt_setup_arch(): 6 % up to 1 GiB)

    TypeError for a field of another type, ValueError for a value that it does not take, or two that do not fit.

    >>> GuestOptions(guest_memory=1 << 30, allocation="thp").allocation
    'thp'
    """

    guest_memory: int = 4 << 30
    allocation: Allocation = "sequential"
    seed: int = 0
    fragmentation: float = 0.0
    private: bool = True
    io_rate: float = 0.0
    io: Literal["bounce", "convert", "direct"] = "bounce"
    bounce_size: int = 64 << 20

    def __post_init__(self) -> None:
        if not self.guest_memory or self.guest_memory % PAGE_2M:
            raise ValueError(f"guest_memory {self.guest_memory}: expected a multiple of {PAGE_2M}, above 0")
        if self.bounce_size % PAGE_4K or (self.has_bounce and not self.bounce_size):
            raise ValueError(f"bounce_size {self.bounce_size}: expected a multiple of {PAGE_4K}, above 0")
        if self.io_rate and self.private == (self.io == "direct"):
            wanted = "'bounce' or 'convert'" if self.private else "'direct'"
            raise ValueError(f"io {shown(self.io)} with private {self.private}: expected {wanted}")
        if self.has_bounce and align_up(self.bounce_size, PAGE_2M) + PAGE_2M > min(self.guest_memory, _LOW):
            raise ValueError(
                f"bounce_size {self.bounce_size} with guest_memory {self.guest_memory}: expected no more than there is "
                "below 2 GiB, and 2 MiB beside"
            )

    @property
    def has_bounce(self) -> bool:
        """Whether there are bounce buffers."""
        return bool(self.io_rate) and self.io == "bounce"

    @property
    def bounce(self) -> range:
        """Guest physical addresses of the bounce buffers: as high as they fit below 2 GiB; none without I/O."""
        size = align_up(self.bounce_size, PAGE_2M) if self.has_bounce else 0
        end = min(self.guest_memory, _LOW)
        return range(end - size, end - size + (self.bounce_size if size else 0))

    def notes(self) -> tuple[str, ...]:
        """What is assumed of the guest, in words, for people who see figures of it.

        >>> len(GuestOptions().notes())
        3
        """
        rules = {
            "sequential": "frames are handed out in ascending order, of page tables as of data",
            "random": f"frames are handed out in the order of a permutation (seed {self.seed}), as after long use",
            "thp": "transparent huge pages: every 2M range counts as anonymous memory that is all one mapping",
        }
        found = [
            f"guest: {size_text(self.guest_memory)} from guest physical address 0 on; {rules[self.allocation]}",
            "guest: a page gets its frame at its first access; nothing is freed; its kernel's own accesses are in no "
            "recording, and none are added",
            "operations: the first use, write and fetch of a page and of the tables on its way, and again after a "
            "conversion in its GiB; any other access finds its leaf, whatever the design, and only the TLBs see it",
        ]
        if self.fragmentation:
            found.append(f"guest: {self.fragmentation:g} of its 2M blocks have a page in use (a parameter, no source)")
        if self.io_rate:
            found.append(f"I/O: a page after {self.io_rate:g} of all accesses, evenly spread: a parameter, no source")
            found.append(self._io_note())
        return tuple(found)

    def _io_note(self) -> str:
        if self.io == "bounce":
            return (
                f"I/O goes through {size_text(self.bounce_size)} of bounce buffers (swiotlb: 64 MiB unless it is told "
                "otherwise), shared from the start, used one after the other; the guest's copy is an operation of the "
                "machine, but no access of the TLBs"
            )
        if self.io == "convert":
            return "I/O converts the page itself, the host writes to it, and the guest makes it private and accepts it"
        return "I/O: the host writes to the page itself"
