"""What KVM's lpage_info says of a memory slot: where a leaf of 2M or 1G is forbidden."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from pgemu.machine.rows import memslot_rows
from pgemu_kernels import words as W

if TYPE_CHECKING:
    from pgemu.machine.core import Core

Array = np.ndarray[Any, Any]
MIXED = 1 << 31  # KVM_LPAGE_MIXED_FLAG


class LargePage(NamedTuple):
    """One element of kvm_arch_memory_slot.lpage_info.

    disallow_lpage: how often a large leaf is disallowed, without the flag. mixed: KVM_LPAGE_MIXED_FLAG, bit 31: the
    block has private and shared pages.
    """

    disallow_lpage: int
    mixed: bool

    @property
    def word(self) -> int:
        """The int as Linux has it."""
        return self.disallow_lpage | (MIXED if self.mixed else 0)

    @property
    def allows(self) -> bool:
        """Whether a leaf of the level may be there: disallow_lpage == 0."""
        return self.word == 0


def lpage_info(machine: Core, vm: int, gpa: int, level: Literal[2, 3]) -> LargePage | None:
    """The element for guest address `gpa` at `level` 2 (2M) or 3 (1G); None where the VM has no slot.

    The count is that of arch/x86/kvm/x86.c:kvm_alloc_memslot_metadata(): 1 where the aligned block reaches out of the
    slot, or where guest frame and userspace address (slots of a guest_memfd of the designs: its offset) disagree
    modulo the block's size, and it is not added up. Write tracking, which could add to it, is not modelled. The flag
    is that of mmu.c:kvm_arch_post_set_memory_attributes(), kept only for blocks that the slot holds whole and only in
    VMs with private memory. Inference: in the designs' slots, whose attributes the inode has, Linux keeps no flag; it
    is what it would be.
    """
    slot = _find_slot(machine, vm, gpa >> 12)
    if slot is None:
        return None
    pages = 1 << 9 * (level - 1)
    base, count = int(slot[W.M_BASE_GFN]), int(slot[W.M_PAGES])
    designs = int(slot[W.M_KIND]) == int(W.SLOT_GUEST_MEMFD)
    backing = int(slot[W.M_PGOFF]) if designs else int(slot[W.M_HVA]) >> 12
    first = (gpa >> 12) // pages * pages
    whole = first >= base and first + pages <= base + count
    aligned = (base ^ backing) % pages == 0
    mixed = False
    if whole and designs:
        mixed = _is_mixed(_inode_bits(machine, slot, first, pages))
    elif whole and _field(machine, vm, W.V_PROTECTED):
        mixed = _is_mixed(_attribute_bits(machine, vm, first, pages))
    return LargePage(0 if whole and aligned else 1, mixed)


def _find_slot(machine: Core, vm: int, gfn: int) -> Array | None:
    """The row of the VM's slot that holds a guest frame, uint64[M_WORDS]."""
    rows = memslot_rows(machine)
    inside = np.uint64(gfn) - rows[:, W.M_BASE_GFN] < rows[:, W.M_PAGES]
    found = np.flatnonzero(inside & (rows[:, W.M_VM] == vm) & (rows[:, W.M_LIVE] != 0))
    return rows[found[0]] if found.size else None


def _field(machine: Core, vm: int, name: np.uint64) -> int:
    """A word of a VM's row."""
    return int(machine.arrays.state[int(W.STATE_VMS) + vm * W.V_WORDS + int(name)])


def _is_mixed(bits: Array) -> bool:
    return bool(bits.any() and not bits.all())


def _inode_bits(machine: Core, slot: Array, first: int, pages: int) -> Array:
    """uint8[pages]: shareability of the pages of a designs' slot from guest frame `first` on."""
    row = int(W.STATE_INODES) + int(slot[W.M_INODE]) * W.I_WORDS
    word = int(machine.arrays.state[row + int(W.I_WORD)])
    index = first - int(slot[W.M_BASE_GFN]) + int(slot[W.M_PGOFF])
    words = machine.arrays.state[word + (index >> 6) : word + (index + pages + 63 >> 6)]
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), bitorder="little")
    return bits[index & 63 :][:pages]


def _attribute_bits(machine: Core, vm: int, first: int, pages: int) -> Array:
    """uint8[pages]: private (1) or shared, as the VM's attributes have it, from guest frame `first` on."""
    from pgemu.objects.stage2 import radix_tree

    index, words = radix_tree(machine.arrays.ram, _field(machine, vm, W.V_ATTRIBUTES))
    here = (index >= first >> 6) & (index < first + pages >> 6)
    values = np.zeros(pages >> 6, "<u8")
    values[(index[here] - np.uint64(first >> 6)).astype(np.int64)] = words[here]
    return np.unpackbits(values.view(np.uint8), bitorder="little")
