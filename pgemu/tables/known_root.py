"""Who else knows where a page table begins, and has to forget it when it is gone."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

from pgemu.machine.arguments import OfMachine

if TYPE_CHECKING:
    from pgemu.machine.core import Core

__all__ = ("KnownRoot",)

Array = np.ndarray[Any, Any]


class KnownRoot(OfMachine):
    """A page table whose root stands in arrays, too, which compiled functions read (pgemu.kernels.tree)."""

    machine: Core
    _known_in: tuple[tuple[weakref.ref[Array], int], ...] = ()

    def _forget_in(self, array: Array, word: int) -> None:
        """Zero a word of an array once the root is another one, or none."""
        alive = (one for one in self._known_in if one[0]() is not None)
        self._known_in = (*alive, (weakref.ref(array), word))

    def _moved(self) -> None:
        """The root is another one, or none."""
        for known, word in self._known_in:
            array = known()
            if array is not None:
                array[word] = 0
        self._known_in = ()
        self.machine._tell_of_tables()
