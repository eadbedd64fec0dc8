"""What KVM_CREATE_GUEST_MEMFD is given, by the form of the kernel that is asked."""

from __future__ import annotations

from enum import IntFlag
from typing import TYPE_CHECKING, Literal, NamedTuple

from pgemu_kernels import words as W

if TYPE_CHECKING:
    from pgemu.machine.config import Config

__all__ = ("CreateFlags", "Creation", "Form", "Rfc2Flags", "Stat", "check_creation", "usual_flags")

Form = Literal["main", "next", "rfc2", "wip"]


class CreateFlags(IntFlag):
    """Flags of KVM_CREATE_GUEST_MEMFD: GUEST_MEMFD_FLAG_* of include/uapi/linux/kvm.h.

    HUGETLB is that of the public branch of December 2025 (form "wip") only; its bit there is inference.
    """

    MMAP = 1 << 0
    INIT_SHARED = 1 << 1
    HUGETLB = 1 << 2


class Rfc2Flags(IntFlag):
    """The same in the 1G series' RFC v2 of May 2025; SIZE_* are GUESTMEM_HUGETLB_FLAG_* of its linux/guestmem.h."""

    SUPPORT_SHARED = 1 << 0
    INIT_PRIVATE = 1 << 1
    HUGETLB = 1 << 2
    SIZE_2M = 21 << 58
    SIZE_1G = 30 << 58


_SIZE_SHIFT = 58
_SIZE_MASK = 0x3F << _SIZE_SHIFT
_ORDERS = (W.ORDER_2M, W.ORDER_1G)


class Stat(NamedTuple):
    """What fstat() of the file says: inode number, bytes, preferred block size, 512-byte blocks.

    Blocks are counted by RFC v2 and its successors, huge page by huge page; merged code does not count (inference).
    """

    st_ino: int
    st_size: int
    st_blksize: int
    st_blocks: int


class Creation(NamedTuple):
    """What creation flags ask for."""

    mappable: bool
    shared: bool
    huge: bool


def _invalid(text: str) -> OSError:
    return OSError(W.EINVAL, text)


def _checked_order(config: Config, order: int) -> None:
    """Huge pages of an order: EINVAL where the kernel has none of that size, ValueError where the machine's differ."""
    if order not in _ORDERS:
        raise _invalid(f"huge pages of order {order}: expected 9 or 18")
    if order != config.page_order:
        raise ValueError(
            f"flags and page_order of order {order}: expected {config.page_order}, the order of the machine's page_size"
        )


def _check_rfc2(config: Config, flags: int) -> Creation:
    """guestmem_hugetlb_setup() and kvm_gmem_create() of RFC v2."""
    valid = int(Rfc2Flags.SUPPORT_SHARED)
    if flags & Rfc2Flags.SUPPORT_SHARED:
        valid |= int(Rfc2Flags.INIT_PRIVATE)
    if flags & Rfc2Flags.HUGETLB:
        valid |= int(Rfc2Flags.HUGETLB) | _SIZE_MASK
    if flags & ~valid:
        raise _invalid(f"flags {flags:#x}: expected some of {valid:#x}")
    huge = bool(flags & Rfc2Flags.HUGETLB)
    if huge:  # without a size the default one, which is the machine's if it has huge pages
        _checked_order(config, (flags >> _SIZE_SHIFT) - 12 if flags & _SIZE_MASK else config.page_order or W.ORDER_2M)
    shared = bool(flags & Rfc2Flags.SUPPORT_SHARED)
    return Creation(shared, shared and not flags & Rfc2Flags.INIT_PRIVATE, huge)


def _check_main(config: Config, form: Form, flags: int, page_order: int) -> Creation:
    """kvm_gmem_create() as merged, and with `page_order` of struct kvm_create_guest_memfd as in December 2025."""
    valid = int(CreateFlags.MMAP | CreateFlags.INIT_SHARED)
    if form == "wip":
        valid |= int(CreateFlags.HUGETLB)
    if flags & ~valid:
        raise _invalid(f"flags {flags:#x}: expected some of {valid:#x}")
    huge = bool(flags & CreateFlags.HUGETLB)
    if page_order and not huge:
        raise _invalid(f"page order {page_order}: expected 0 without HUGETLB")
    if huge:
        if flags & CreateFlags.INIT_SHARED:
            raise _invalid("HUGETLB with INIT_SHARED: disabled in the branch of December 2025")
        _checked_order(config, page_order)
    return Creation(bool(flags & CreateFlags.MMAP), bool(flags & CreateFlags.INIT_SHARED), huge)


def check_creation(config: Config, size: int, flags: int, form: Form = "main", page_order: int = 0) -> Creation:
    """Check what KVM_CREATE_GUEST_MEMFD is given, flags first, as the form's kernel does: what the flags ask for.

    OSError EINVAL: an unknown flag; rfc2: INIT_PRIVATE without SUPPORT_SHARED, a size that no hstate has; wip: a
    page order without HUGETLB, HUGETLB with INIT_SHARED; a size that is no positive multiple of the page. ValueError
    for huge pages that are not the machine's. Files have no numbers here, so there is no EMFILE.
    """
    rfc2 = form == "rfc2"
    creation = _check_rfc2(config, flags) if rfc2 else _check_main(config, form, flags, page_order)
    if size <= 0 or size % config.page_size:
        unit = "huge page" if config.page_order else "page"
        raise _invalid(f"size {size}: expected a positive multiple of the {unit}, {config.page_size}")
    return creation


def usual_flags(config: Config, shared: bool, form: Form) -> tuple[int, int]:
    """Flags and page order of a file that can be mapped, all shared or all private."""
    if form == "rfc2":
        flags = Rfc2Flags.SUPPORT_SHARED | (0 if shared else Rfc2Flags.INIT_PRIVATE)
        return int(flags | (Rfc2Flags.HUGETLB if config.page_order else 0)), 0
    flags_main = CreateFlags.MMAP | (CreateFlags.INIT_SHARED if shared else 0)
    if form == "wip" and config.page_order:
        return int(flags_main | CreateFlags.HUGETLB), config.page_order
    return int(flags_main), 0
