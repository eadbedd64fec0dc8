"""Members of the words' enums as uint64, PREFIX_MEMBER each: what kernels compare words with.

A member itself is an int, and uint64 combined with an int is an int64. `OP_HOST_FAULT` is U(Operation.HOST_FAULT).
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

from pgemu_kernels.words.broken import Broken
from pgemu_kernels.words.events import Event, Gauge
from pgemu_kernels.words.failures import MfPage, MfResult
from pgemu_kernels.words.operations import Defect, Flag, Operation
from pgemu_kernels.words.properties import VmProperty
from pgemu_kernels.words.table_words import Edit, LogKind, WalkStage, WalkStatus

if TYPE_CHECKING:

    def __getattr__(name: str) -> np.uint64: ...


PREFIXES: dict[str, type[IntEnum] | type[Flag] | type[Defect] | type[VmProperty]] = {
    "OP": Operation,
    "FLAG": Flag,
    "DEFECT": Defect,
    "BROKEN": Broken,
    "EVENT": Event,
    "GAUGE": Gauge,
    "EDIT_OP": Edit,
    "LOG": LogKind,
    "WALK": WalkStatus,
    "STAGE": WalkStage,
    "VM": VmProperty,
    "MF_RESULT": MfResult,
    "MF_PAGE": MfPage,
}

for _prefix, _enum in PREFIXES.items():
    globals().update({f"{_prefix}_{_name}": np.uint64(_member) for _name, _member in _enum.__members__.items()})
