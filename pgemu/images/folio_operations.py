"""What is done to a folio of a machine: references, pins, freezing, split and merge, vmemmap optimisation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pgemu.machine.arguments import OfMachine
from pgemu_kernels.words.operations import ENOSPC, PAGE_4K, Flag, Operation

if TYPE_CHECKING:
    from pgemu.machine.results import Result

__all__ = ("FolioOperations",)


class FolioOperations(OfMachine):
    """A folio, as far as something is done to it: each a ValueError where it is one of an image."""

    _order: int  # that it is merged to

    @property
    def order(self) -> int:
        raise NotImplementedError

    def _operate(self, op: Operation, length: int, flags: int = 0) -> Result:
        raise NotImplementedError

    def get(self, n: int = 1) -> Result:
        """Take `n` references, as FOLL_GET does: refused (-ENOMEM) while the refcount is zero or negative."""
        return self._operate(Operation.FOLIO_REFERENCE, n, Flag.SHARED)

    def put(self, n: int = 1) -> Result:
        """Drop `n` references; the last one frees the folio."""
        return self._operate(Operation.FOLIO_REFERENCE, n, Flag.READ)

    def pin(self, n: int = 1) -> Result:
        """Pin `n` times, as FOLL_PIN does: 1024 references each of a small folio, a reference and a pin of a large."""
        return self._operate(Operation.FOLIO_REFERENCE, n, Flag.WRITE | Flag.SHARED)

    def unpin(self, n: int = 1) -> Result:
        """Undo `n` pins."""
        return self._operate(Operation.FOLIO_REFERENCE, n, Flag.WRITE | Flag.READ)

    def freeze(self, expected: int) -> bool:
        """Set the refcount to 0 if it is `expected`: folio_ref_freeze(). OSError ENOSPC past words.FROZEN folios."""
        status = self._operate(Operation.FOLIO_FREEZE, expected).status
        if status == -ENOSPC:
            raise OSError(ENOSPC, "as many folios are frozen as the machine keeps count of")
        return status == 1

    def unfreeze(self, n: int) -> bool:
        """Set the refcount of a frozen folio to `n`: folio_ref_unfreeze(). False if it was not frozen."""
        return self._operate(Operation.FOLIO_FREEZE, n, Flag.READ).status == 1

    def split(self) -> Result:
        """Split it into 4K folios, in the way of the machine's `split_form`; its vmemmap is restored first."""
        return self._operate(Operation.FOLIO_SPLIT, PAGE_4K << self.order)

    def merge(self, order: int | None = None) -> Result:
        """Make one folio of `order` again of the 4K folios from this one on.

        order: if None, the order that it had when this Folio was made, or that of the machine's pool.
        """
        return self._operate(Operation.FOLIO_MERGE, PAGE_4K << (self._order if order is None else order))

    def optimize(self) -> Result:
        """hugetlb_vmemmap_optimize_folio()."""
        return self._operate(Operation.VMEMMAP_OPTIMIZE, PAGE_4K << self.order)

    def restore(self) -> Result:
        """hugetlb_vmemmap_restore_folio()."""
        return self._operate(Operation.VMEMMAP_RESTORE, PAGE_4K << self.order)
