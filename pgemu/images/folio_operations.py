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
        """Take `n` references, as FOLL_GET does: refused (-ENOMEM) while the refcount is zero or negative.

        >>> folio.get(3).name, folio.refcount
        ('ok', 4)
        """
        return self._operate(Operation.FOLIO_REFERENCE, n, Flag.SHARED)

    def put(self, n: int = 1) -> Result:
        """Drop `n` references; the last one frees the folio.

        >>> folio.get().name, folio.put().name, folio.refcount
        ('ok', 'ok', 1)
        >>> folio.put().name, machine.hugetlb().free_hugepages, folio.put().name
        ('ok', 2, '-EINVAL')
        """
        return self._operate(Operation.FOLIO_REFERENCE, n, Flag.READ)

    def pin(self, n: int = 1) -> Result:
        """Pin `n` times, as FOLL_PIN does: 1024 references each of a small folio, a reference and a pin of a large.

        >>> folio.pin(2).name, folio.pincount, folio.refcount, folio.maybe_dma_pinned
        ('ok', 2, 3, True)
        """
        return self._operate(Operation.FOLIO_REFERENCE, n, Flag.WRITE | Flag.SHARED)

    def unpin(self, n: int = 1) -> Result:
        """Undo `n` pins.

        >>> folio.pin(2).name, folio.unpin().name, folio.pincount
        ('ok', 'ok', 1)
        """
        return self._operate(Operation.FOLIO_REFERENCE, n, Flag.WRITE | Flag.READ)

    def freeze(self, expected: int) -> bool:
        """Set the refcount to 0 if it is `expected`: folio_ref_freeze(). OSError ENOSPC past words.FROZEN folios.

        >>> folio.freeze(2), folio.freeze(1), folio.refcount, folio.get().name
        (False, True, 0, '-ENOMEM')
        """
        status = self._operate(Operation.FOLIO_FREEZE, expected).status
        if status == -ENOSPC:
            raise OSError(ENOSPC, "as many folios are frozen as the machine keeps count of")
        return status == 1

    def unfreeze(self, n: int) -> bool:
        """Set the refcount of a frozen folio to `n`: folio_ref_unfreeze(). False if it was not frozen.

        >>> folio.unfreeze(2), folio.freeze(1), folio.unfreeze(2), folio.refcount
        (False, True, True, 2)
        """
        return self._operate(Operation.FOLIO_FREEZE, n, Flag.READ).status == 1

    def split(self) -> Result:
        """Split it into 4K folios, in the way of the machine's `split_form`; its vmemmap is restored first.

        >>> folio.split().name, folio.order, machine.folio(pfn + 5).pfn - pfn
        ('ok', 0, 5)
        """
        return self._operate(Operation.FOLIO_SPLIT, PAGE_4K << self.order)

    def merge(self, order: int | None = None) -> Result:
        """Make one folio of `order` again of the 4K folios from this one on.

        order: if None, the order that it had when this Folio was made, or that of the machine's pool.

        >>> folio.split().name, folio.merge().name, folio.order, machine.folio(pfn + 5).pfn - pfn
        ('ok', 'ok', 9, 0)
        """
        return self._operate(Operation.FOLIO_MERGE, PAGE_4K << (self._order if order is None else order))

    def optimize(self) -> Result:
        """hugetlb_vmemmap_optimize_folio().

        >>> free = machine.folio(machine.hugetlb().free_list()[0])
        >>> free.restore().name, free.optimize().name, len({page.frame for page in free.vmemmap})
        ('ok', 'ok', 2)
        >>> folio.optimize().name  # in use
        '-EBUSY'
        """
        return self._operate(Operation.VMEMMAP_OPTIMIZE, PAGE_4K << self.order)

    def restore(self) -> Result:
        """hugetlb_vmemmap_restore_folio().

        >>> free = machine.folio(machine.hugetlb().free_list()[0])
        >>> free.restore().name, free.optimized, len({page.frame for page in free.vmemmap})
        ('ok', False, 8)
        >>> folio.restore().name  # in use
        '-EBUSY'
        """
        return self._operate(Operation.VMEMMAP_RESTORE, PAGE_4K << self.order)
