"""What a log asks for, whatever format it was in: rows of inputs, and how its lines were classified."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ("NO_VCPU", "Log")

NO_VCPU = (1 << 64) - 1
"""vCPU of a guest fault whose line names none (before Linux 6.0)."""


@dataclass(frozen=True)
class Log:
    """What a log asks for, and how its lines were classified.

    Attributes:
        source: name of the file
        rows: uint64[n, 10], one row per input in the order of the file: kind (`Input`), time (ns), task (dense
            index), line, five words as `Input` says, and 1 where the system call failed; an mmap that returned has
            the address it returned
        events: lines that hold an event
        inputs, outcomes, ignored, unknown: events by name
        lost: events that the ring buffer dropped
    """

    source: str
    rows: npt.NDArray[np.uint64]
    events: int
    inputs: Counter[str]
    outcomes: Counter[str]
    ignored: Counter[str]
    unknown: Counter[str]
    lost: int
