"""What the address of a guest fault is: KVM prints whatever the hardware reported, which is not always a GPA of the VM.

One classification, before memory slots are inferred: every fault whose address is no guest physical address of the
VM's memory is left out, with the reason; what is left is a GPA without a TD's shared bit.

Sources: arch/x86/kvm/vmx/tdx.c (TDX_SHARED_BIT_PWL_4, TDX_SHARED_BIT_PWL_5; tdx_handle_ept_violation() prints the
address with the bit), arch/x86/kvm/mmu/mmu.c:kvm_handle_page_fault() (under shadow paging the guest virtual address),
arch/x86/include/asm/apicdef.h (APIC_DEFAULT_PHYS_BASE, IO_APIC_DEFAULT_PHYS_BASE), arch/x86/include/asm/kvm_host.h.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pgemu.machine.field_rules import MOST_VCPUS
from pgemu.trace.events import TDX_SHARED_BITS, Input
from pgemu.trace.log import NO_VCPU
from pgemu.trace.lowered import LoweringOptions
from pgemu.trace.memory_layout import LARGEST_RANGE, Slot
from pgemu.trace.range_index import covered
from pgemu_kernels.words.operations import PAGE_4K

__all__ = (
    "APIC",
    "BEYOND",
    "DEVICE",
    "IO_APIC",
    "L2",
    "L2_OR_L1",
    "PRIVATE_ACCESS",
    "SAYS_PRIVATE",
    "VIRTUAL",
    "GuestAddresses",
    "gfn_range",
    "is_qualification",
)

_Words = npt.NDArray[np.uint64]
_Mask = npt.NDArray[np.bool_]

_KIND, _A, _B, _C, _E = 0, 4, 5, 6, 8
_RESERVED = 8  # PFERR_RSVD_MASK: a cached MMIO entry
_NESTED_STAGE = 3 << 32  # PFERR_GUEST_FINAL_MASK, PFERR_GUEST_PAGE_MASK
_LINEAR_VALID = 0x80  # EPT_VIOLATION_GVA_IS_VALID: the printed code is an exit qualification
# PFERR_GUEST_ENC_MASK, what SEV-SNP's hardware says, and PFERR_PRIVATE_ACCESS, what KVM makes of it:
# arch/x86/include/asm/kvm_host.h, arch/x86/kvm/svm/svm.c:npf_interception()
PRIVATE_ACCESS = 1 << 49
SAYS_PRIVATE = (1 << 34) | PRIVATE_ACCESS
_KERNEL_HALF = 0xFF << 56  # of canonical virtual addresses, with four or five levels; no GPA has these bits
_REACH = 48  # bits that four levels of stage 2 reach
_NEAR = 30  # what lies in the same GiB as other memory may be memory
_GFN_LIMIT = 1 << 51
_APIC_PAGE, _IO_APIC_PAGE = 0xFEE00, 0xFEC00

DEVICE = "access to a device"
L2 = "address of an L2 guest"
L2_OR_L1 = "address of an L2 guest, or of L1 (neither kvm_exit nor kvm_nested_vmexit_inject recorded)"
VIRTUAL = "guest virtual address (shadow paging)"
BEYOND = f"address beyond the reach of stage 2 ({_REACH} bits)"
APIC = "page of the local APIC"
IO_APIC = "page of the I/O APIC"
_ARTICLES = {L2: "an", L2_OR_L1: "an", VIRTUAL: "a", BEYOND: "an", APIC: "the", IO_APIC: "the"}


def is_qualification(code: _Words) -> _Mask:
    """bool[n]: EPT logs of KVM print the exit qualification where the error code should be."""
    result: _Mask = ((code & np.uint64(_NESTED_STAGE)) == 0) & ((code & np.uint64(_LINEAR_VALID)) != 0)
    return result


def gfn_range(rows: _Words) -> tuple[_Words, _Words]:
    """Guest addresses of attribute rows; gfns beyond any guest address are cut so that they fit 64 bits."""
    start, end = (np.minimum(rows[:, word], np.uint64(_GFN_LIMIT)) * np.uint64(PAGE_4K) for word in (_A, _B))
    return start, end


def _is_device(code: _Words) -> _Mask:
    # In an exit qualification bit 3 says that the page was readable.
    reserved: _Mask = (code & np.uint64(_RESERVED)) != 0
    return reserved & ~is_qualification(code)


@dataclass
class GuestAddresses:
    """The guest faults of a log, told apart.

    Attributes:
        rows: uint64[n, 10], the log's rows; the addresses of guest faults that are not left out are GPAs without a
            shared bit, and private accesses of a TD have PRIVATE_ACCESS in their code
        left_out: positions of the faults left out, by reason, in the order in which reasons are looked for
        notes: what was taken to mean something, and what was left out, in words
        machine: fields of Config that the faults tell: a shared bit makes the VM a TD, codes are of EPT or of NPT, and
            there are as many vCPUs as fault
        tells_kind: accesses say whether they are private or shared, by their code or a TD's shared bit; in another VM
            an access is of the kind that memory is (attributes)
    """

    rows: _Words
    left_out: dict[str, npt.NDArray[np.intp]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    machine: Mapping[str, Any] = field(default_factory=dict)
    tells_kind: bool = False

    @classmethod
    def of(
        cls, rows: _Words, slots: Sequence[Slot], nested_told: bool, options: LoweringOptions,
        stage2: str | None = None, kinds_told: bool = False,
    ) -> GuestAddresses:  # fmt: skip
        """Classify.

        :param rows: uint64[n, 10] as in Log
        :param slots: that the log's VMM made, at any time
        :param nested_told: as in Log
        :param stage2, kinds_told: as in Log
        """
        faults = rows[rows[:, _KIND] == Input.GUEST_FAULT]
        found = cls(rows, machine=_stage2_of(faults[:, _B], stage2) | _vcpus_of(faults[:, _C]))
        left = np.flatnonzero(rows[:, _KIND] == Input.GUEST_FAULT)
        for reason, mask in found._reasons(slots, nested_told, options):
            out = mask[left]
            if out.any():
                found.left_out[reason] = left[out]
                left = left[~out]
        is_td = found.machine.get("vm") == "tdx"
        found.tells_kind = kinds_told or is_td or bool((found.rows[found.inside(), _B] & np.uint64(SAYS_PRIVATE)).any())
        named = [
            f"{len(out)} at {_ARTICLES[reason]} {reason}" for reason, out in found.left_out.items() if reason != DEVICE
        ]
        if named:
            found.notes += (f"guest faults left out: {', '.join(named)}",)
        return found

    def inside(self) -> npt.NDArray[np.intp]:
        """intp[n]: positions of the faults that are not left out."""
        chosen = self.rows[:, _KIND] == Input.GUEST_FAULT
        for out in self.left_out.values():
            chosen[out] = False
        return np.flatnonzero(chosen)

    def _reasons(
        self, slots: Sequence[Slot], nested_told: bool, options: LoweringOptions
    ) -> Iterator[tuple[str, _Mask]]:
        """Reasons with the rows (of guest faults, among others) that they hold for; a row's first one counts."""
        rows = self.rows
        address, code = rows[:, _A], rows[:, _B]
        yield (L2 if nested_told else L2_OR_L1), rows[:, _E] != 0
        if options.fault_address != "physical":
            faults = rows[(rows[:, _KIND] == Input.GUEST_FAULT) & (rows[:, _E] == 0)]
            kernel = address >= np.uint64(_KERNEL_HALF)
            all_ = options.fault_address == "virtual" or _under_shadow_paging(faults)
            yield VIRTUAL, np.ones_like(kernel) if all_ else kernel
        yield DEVICE, _is_device(code)
        self._take_shared_bit(slots, options)
        address = self.rows[:, _A]
        yield BEYOND, address >> np.uint64(_REACH) != 0
        page = address // np.uint64(PAGE_4K)
        for reason, number in ((APIC, _APIC_PAGE), (IO_APIC, _IO_APIC_PAGE)):
            backed = any(slot.gpa <= number * PAGE_4K < slot.gpa + slot.size for slot in slots)
            yield reason, (page == np.uint64(number)) & (not backed)

    def _take_shared_bit(self, slots: Sequence[Slot], options: LoweringOptions) -> None:
        """Take a TD's shared bit out of the addresses; accesses without it are private."""
        faults = self.inside()
        address = self.rows[faults, _A]
        wanted = options.tdx_shared_bit
        bit = (
            _inferred_bit(address, self.rows, slots) if wanted == "auto" else None if wanted == "none" else int(wanted)
        )
        if bit is None:
            return
        shared = (address >> np.uint64(bit) & np.uint64(1)) != 0
        self.rows = self.rows.copy()
        self.rows[faults, _A] = address & ~np.uint64(1 << bit)
        self.rows[faults[~shared], _B] |= np.uint64(PRIVATE_ACCESS)
        self.machine = {**self.machine, "vm": "tdx", "stage2": "ept"}
        is_ = "is" if wanted != "auto" else "is taken for"
        counts = f"{int(shared.sum())} shared and {int((~shared).sum())} private accesses"
        self.notes += (f"bit {bit} of the addresses {is_} the TD's shared bit: {counts} (--tdx-shared-bit)",)


def _stage2_of(code: _Words, told_by_exits: str | None) -> dict[str, Any]:
    """What exits say, else which processor's fault codes these are; nothing where none tells, or they are of both.

    VMX prints its exit qualification (arch/x86/kvm/vmx/vmx.c:handle_ept_violation()), SVM an error code that says at
    which stage of nested paging the fault was (arch/x86/kvm/svm/svm.c:npf_interception()).
    """
    if told_by_exits:
        return {"stage2": told_by_exits}
    told = {"ept": is_qualification(code).any(), "npt": ((code & np.uint64(_NESTED_STAGE)) != 0).any()}
    names = [name for name, is_ in told.items() if is_]
    return {"stage2": names[0]} if len(names) == 1 else {}


def _vcpus_of(numbers: _Words) -> dict[str, Any]:
    """How many vCPUs there are, of which each faults; nothing where no line names one, or more than a VM can have."""
    count = len(np.unique(numbers[numbers != np.uint64(NO_VCPU)]))
    return {"vcpus": count} if 0 < count <= MOST_VCPUS else {}


def _under_shadow_paging(faults: _Words) -> bool:
    """Whether addresses are virtual: the kernel half is among them, and no code is one of nested paging."""
    code = faults[:, _B]
    nested = ((code & np.uint64(_NESTED_STAGE)) != 0) | is_qualification(code)
    return bool((faults[:, _A] >= np.uint64(_KERNEL_HALF)).any()) and not bool(nested.any())


def _inferred_bit(address: _Words, rows: _Words, slots: Sequence[Slot]) -> int | None:
    """The TD's shared bit, if there are addresses with one that without it lie where the VM has memory."""
    for bit in TDX_SHARED_BITS:
        shared = address >> np.uint64(bit) == np.uint64(1)
        if not shared.any():
            continue
        bare = address[shared] & ~np.uint64(1 << bit)
        near = np.isin(bare >> np.uint64(_NEAR), address[~shared] >> np.uint64(_NEAR))
        near |= covered(bare, [(first, end - 1) for first, end in _memory(rows, slots)])
        if near.any():
            return bit
    return None


def _memory(rows: _Words, slots: Sequence[Slot]) -> Iterator[tuple[int, int]]:
    """Guest addresses that slots or attributes name: (first, end)."""
    yield from ((slot.gpa, slot.gpa + slot.size) for slot in slots)
    start, end = gfn_range(rows[rows[:, _KIND] == Input.ATTRIBUTES])
    memory = (end > start) & (end - start <= np.uint64(LARGEST_RANGE))
    yield from set(zip(start[memory].tolist(), end[memory].tolist(), strict=True))
