"""What no folio can be: an order that no page has, a head off its place, a tail that leads elsewhere.

A struct page whose words are garbage has such a folio; whatever counts pages by its order would go on without an end.
Sources: arch/x86/mm/hugetlbpage.c:arch_hugetlb_valid_size() for the largest page; mm/page_alloc.c:prep_compound_page()
for heads and tails; buddy and HugeTLB pages stand at multiples of their size.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ("LARGEST_ORDER", "FolioProblem", "check_order", "folio_problem")

LARGEST_ORDER = 18  # a page of 1G, the largest that x86-64 has


class FolioProblem(NamedTuple):
    """Why a struct page belongs to no folio that can be. head: PFN of what should be its head; what: in words."""

    head: int
    what: str

    def __str__(self) -> str:
        return f"folio {self.head:#x}: {self.what}"


def folio_problem(given: int, head: int, large: bool, order: int) -> FolioProblem | None:
    """Why the folio of a head cannot be what it says, or cannot have the PFN `given`; None where it can.

    large: whether the head has PG_head. order: as its second struct page says, 0 of a small one.
    """
    if large and not 1 <= order <= LARGEST_ORDER:
        return FolioProblem(head, f"order {order}: expected 1 to {LARGEST_ORDER} (1G)")
    if head & (1 << order) - 1:
        return FolioProblem(head, f"order {order}: expected a head at a multiple of {1 << order:#x}")
    if not 0 <= given - head < 1 << order:
        what = f"order {order}" if large else "no head"
        return FolioProblem(head, f"{what}: expected the head of a folio that holds PFN {given:#x}")
    return None


def check_order(head: int, order: int) -> int:
    """The order, where pages can be counted by it. ValueError where no page is that large."""
    if order > LARGEST_ORDER:
        raise ValueError(str(folio_problem(head, head, True, order)))
    return order
