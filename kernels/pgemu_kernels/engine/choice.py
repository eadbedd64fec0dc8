"""One of several kernels, chosen by a number: of an operation, of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from pgemu_kernels.engine.compile import kernel

Operate = Callable[..., Any]  # a kernel that takes the machine and the record, and returns an int64


def by_number(cases: Iterable[tuple[np.uint64, Operate]], otherwise: Operate) -> Operate:
    """A kernel (m, op, number) that does what the case of that number does, or else `otherwise`: what it returns.

    cases: (number, kernel of m and op), tried in order. otherwise: takes what the made kernel takes.
    """
    for number, operate in reversed(list(cases)):
        otherwise = _unless(number, operate, otherwise)
    return otherwise


def _unless(number: np.uint64, operate: Operate, otherwise: Operate) -> Operate:
    @kernel
    def choose(m, op, asked):
        return np.int64(operate(m, op)) if asked == number else np.int64(otherwise(m, op, asked))

    return choose
