"""References and pins of folios: what get_user_pages(), transient holders and a freeze do to the counts.

Each function takes `ram` and `page`, the index in `ram` of the head's struct page (folio.struct_page() of the head's
PFN, never of a tail). The counts are 32 bits wide and signed, as atomic_t: they wrap. None of these functions frees a
folio, charges anything or knows who holds what; `n` is at least 1.

Sources: include/linux/page_ref.h, include/linux/mm.h and page-flags.h of 6.12.107 and 7.3.4, which agree here; mm/gup.c
of 6.12 for try_grab_folio(), try_grab_folio_fast() and gup_put_folio().
"""

from __future__ import annotations

import numpy as np

from pgemu_kernels.engine.bits import LOW32, U0, U1, U24, U32
from pgemu_kernels.engine.compile import kernel
from pgemu_kernels.folios.folio import (
    COUNTS,
    FLAGS,
    MAPPING,
    PGTY_HUGETLB,
    add_references,
    folio_order,
    folio_test_large,
    mappings,
    reference_count,
)
from pgemu_kernels.words.rows import GUP_PIN_COUNTING_BIAS

U = np.uint64

NEGATIVE = U(1 << 31)  # sign of a count
ANONYMOUS = U(1)  # FOLIO_MAPPING_ANON, of the word MAPPING
PG_PRIVATE = U(1 << 14)
PG_SWAPCACHE = U(1 << 10 | 1 << 17)  # PG_owner_priv_1 and PG_swapbacked: folio_test_swapcache()
TYPES = U(0x80)  # top byte of a page type, from here to
NO_TYPE = U(0xFF)  # ... below this: page_type_has_type()

# Words of a large folio that lie in its second struct page, from the head on: the same places in 6.12, 6.18 and 7.3,
# unlike _entire_mapcount and the number of pages (see hugetlb.write_order()).
LARGE_MAPCOUNT = U(10)  # low half
PINCOUNT = U(11)  # high half


@kernel
def pin_count(ram, page):
    """_pincount of a large folio."""
    return ram[page + PINCOUNT] >> U32


@kernel
def map_count(ram, page):
    """mm.h:folio_mapcount(): page-table entries that map any part of the folio."""
    if folio_test_large(ram, page):
        return ram[page + LARGE_MAPCOUNT] + U1 & LOW32
    return U0 if has_type(ram, page) else mappings(ram, page)


@kernel
def has_type(ram, page):
    """page-flags.h:page_has_type()."""
    top = (ram[page + COUNTS] & LOW32) >> U24
    return TYPES <= top < NO_TYPE


@kernel
def try_get(ram, page, n):
    """Take `n` references unless there is none: folio_ref_try_add(). Returns whether it did.

    A count that overflowed into the negative is no obstacle here; a frozen or freed folio is.
    """
    if reference_count(ram, page) == U0:
        return False
    add_references(ram, page, n)
    return True


@kernel
def put_refs(ram, page, n):
    """Drop `n` references: folio_put_refs(). Returns whether these were the last."""
    add_references(ram, page, U0 - n)
    return reference_count(ram, page) == U0


@kernel
def may_grab(ram, page):
    """Whether try_grab_folio() takes a folio: it refuses (-ENOMEM) a count that is zero or negative."""
    return U0 < reference_count(ram, page) < NEGATIVE


@kernel
def try_grab(ram, page, n):
    """Take `n` references for FOLL_GET: try_grab_folio(). Returns whether it did; the sum may become negative."""
    if not may_grab(ram, page):
        return False
    add_references(ram, page, n)
    return True


@kernel
def try_pin(ram, page, n):
    """Pin `n` times for FOLL_PIN: try_grab_folio(). Returns whether it did.

    A large folio gets a reference and a pin each time, a small one 1024 references.
    """
    if not may_grab(ram, page):
        return False
    if folio_test_large(ram, page):
        add_references(ram, page, n)
        ram[page + PINCOUNT] += n << U32
    else:
        add_references(ram, page, n * GUP_PIN_COUNTING_BIAS)
    return True


@kernel
def unpin(ram, page, n):
    """Undo `n` pins: gup_put_folio(). Returns whether the last reference went with them."""
    if folio_test_large(ram, page):
        ram[page + PINCOUNT] -= n << U32
        return put_refs(ram, page, n)
    return put_refs(ram, page, n * GUP_PIN_COUNTING_BIAS)


@kernel
def maybe_dma_pinned(ram, page):
    """mm.h:folio_maybe_dma_pinned(): exact for a large folio; 1024 references of any kind make a small one look pinned.

    The count of a small folio is compared unsigned, so one that overflowed looks pinned, that of a large one signed.
    """
    if folio_test_large(ram, page):
        return U0 < pin_count(ram, page) < NEGATIVE
    return reference_count(ram, page) >= GUP_PIN_COUNTING_BIAS


@kernel
def freeze(ram, page, expected):
    """Set the count from `expected` to 0: folio_ref_freeze(). Returns whether it was `expected`, else nothing changes.

    `expected` of 0 holds for a frozen folio, as the compare and exchange does.
    """
    if reference_count(ram, page) != expected & LOW32:
        return False
    ram[page + COUNTS] &= LOW32
    return True


@kernel
def unfreeze(ram, page, n):
    """Set the count of a frozen folio to `n`: folio_ref_unfreeze(). Returns whether it was frozen and `n` is not 0.

    Where it returns False the kernel has a VM_BUG_ON; nothing changes.
    """
    if reference_count(ram, page) != U0 or n & LOW32 == U0:
        return False
    ram[page + COUNTS] |= n << U32
    return True


@kernel
def expected_count(ram, page):
    """mm.h:folio_expected_ref_count(): references of caches, of private data and of mappings; 0 for other types.

    One per page from the swap cache, and unless it is anonymous one per page from the page cache and one if PG_private
    is set; one per page-table entry.
    """
    flags = ram[page + FLAGS]
    if has_type(ram, page) and (ram[page + COUNTS] & LOW32) >> U24 != PGTY_HUGETLB >> U24:
        return U0
    pages = U1 << folio_order(ram, page)
    expected = map_count(ram, page)
    if flags & PG_SWAPCACHE == PG_SWAPCACHE:
        expected += pages
    mapping = ram[page + MAPPING]
    if mapping & ANONYMOUS == U0:
        if mapping != U0:
            expected += pages
        if flags & PG_PRIVATE != U0:
            expected += U1
    return expected
