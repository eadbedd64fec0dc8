"""What the machine's design is like: the only kernels that know, and they know properties, not names.

A design is a row of properties and an order of conversion (pgemu/machine/designs.py).
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import U0
from pgemu_kernels.engine.compile import kernel
from pgemu_kernels.engine.handle import parameter
from pgemu_kernels.words.properties import Property
from pgemu_kernels.words.registers import R_PROPERTIES

U = np.uint64
_SPECIAL_ENTRIES = U(Property.SPECIAL_ENTRIES)
_VMA_PFNMAP = U(Property.VMA_PFNMAP)
_GUP = U(Property.GUP)
_SPLITS_FOLIOS = U(Property.SPLITS_FOLIOS)
_LEVEL_BY_FOLIO = U(Property.LEVEL_BY_FOLIO)
_INSERTS_LOCKED = U(Property.INSERTS_LOCKED)
_HOLES_UNMAP = U(Property.HOLES_UNMAP)
_ROUNDS_RANGES = U(Property.ROUNDS_RANGES)
_ZAPS_EXACTLY = U(Property.ZAPS_EXACTLY)
_PREALLOCATES = U(Property.PREALLOCATES)
_NAMES_PAGE = U(Property.NAMES_PAGE)
_DRAINS_LRU = U(Property.DRAINS_LRU)
_KEEPS_REFERENCE = U(Property.KEEPS_REFERENCE)

# Default machines have the orders jan2026 and slides, which are alike in what these bits say.
_of_order = parameter(R_PROPERTIES, _PREALLOCATES)


@kernel
def entries_are_special(m):
    """Whether host entries have neither mapcount nor reference: pte_special(), vm_normal_page()."""
    return m.state[R_PROPERTIES] & _SPECIAL_ENTRIES != U0


@kernel
def vma_is_pfnmap(m):
    """Whether the VMA is VM_PFNMAP.

    MADV_DONTNEED refuses it (mm/madvise.c:madvise_dontneed_free_valid_vma()), fork() copies it
    (include/linux/mm.h:VM_COPY_ON_FORK), and it is flushed before it goes (include/asm-generic/tlb.h:tlb_free_vmas()).
    """
    return m.state[R_PROPERTIES] & _VMA_PFNMAP != U0


@kernel
def gup_works(m):
    """Whether get_user_pages() gets at the pages: mm/gup.c:check_vma_flags(), vm_normal_page()."""
    return m.state[R_PROPERTIES] & _GUP != U0


@kernel
def splits_folios(m):
    """Whether folios are of 4K while any of their pages is shared."""
    return m.state[R_PROPERTIES] & _SPLITS_FOLIOS != U0


@kernel
def level_is_folios(m):
    """Whether stage 2 maps at the level of the folio, rather than at that of a block of pages of one kind."""
    return m.state[R_PROPERTIES] & _LEVEL_BY_FOLIO != U0


@kernel
def inserts_locked(m):
    """Whether the host entry is inserted before the fault lets the invalidate_lock go."""
    return m.state[R_PROPERTIES] & _INSERTS_LOCKED != U0


@kernel
def holes_unmap(m):
    """Whether a hole unmaps its whole range from processes before anything is truncated."""
    return m.state[R_PROPERTIES] & _HOLES_UNMAP != U0


@kernel
def rounds_ranges(m):
    """Whether a conversion's range is rounded out to huge pages for invalidation and zap."""
    return m.state[R_PROPERTIES] & _ROUNDS_RANGES != U0


@kernel
def zaps_exactly(m):
    """Whether the zap leaves the rounding out."""
    return _of_order(m) & _ZAPS_EXACTLY != U0


@kernel
def preallocates(m):
    """Whether a conversion allocates the attribute tree's nodes before it does anything."""
    return _of_order(m) & _PREALLOCATES != U0


@kernel
def names_page(m):
    """Whether a failed conversion names the page, where others name none before the range."""
    return _of_order(m) & _NAMES_PAGE != U0


@kernel
def drains_lru(m):
    """Whether the gate drains LRU batches for the sake of a 4K folio."""
    return _of_order(m) & _DRAINS_LRU != U0


@kernel
def keeps_reference(m):
    """Whether KVM holds the folio until its leaf is there: kvm_release_faultin_page() of rfc2 and fixup.

    Later orders return no struct page: kvm_gmem_get_pfn() puts the folio, after it released the lock.
    """
    return _of_order(m) & _KEEPS_REFERENCE != U0
