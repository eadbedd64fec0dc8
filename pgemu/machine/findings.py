"""Rules that a machine broke, and which of its defects explain them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from pgemu.machine.config import DEFECTS
from pgemu_kernels import words as W

__all__ = ("INDEX", "BrokenRule", "explained_by", "findings_of", "note_broken")

_PAGE = "page {} of the guest_memfd"
INDEX: Mapping[W.Broken, str] = MappingProxyType(
    {
        W.Broken.FRAMES: "frame, or count of frames, {}",
        W.Broken.HOST_PRIVATE: _PAGE,
        W.Broken.MIXED_LEAF: _PAGE,
        W.Broken.LEAF_OVER_FOLIO: _PAGE,
        W.Broken.BLOCK_STATE: _PAGE,
        W.Broken.WRONG_PFN: "page {} of the guest, the process or the guest_memfd",
        W.Broken.COUNTS: "count, or what it is of, {}",
        W.Broken.VMEMMAP: "{} pages of vmemmap counted",
        W.Broken.IN_PROGRESS: "VM {}",
        W.Broken.REFERENCES: "page, or frame, {}",
        W.Broken.WRONG_ROOT: "guest page {}",
        W.Broken.PRIVATE_LEVEL: "page {} of the guest or the guest_memfd",
        W.Broken.STALE_CONTENTS: _PAGE,
        W.Broken.LOST_CONTENTS: _PAGE,
        W.Broken.STALE_MAPPING: _PAGE,
        W.Broken.SLOTS: "guest page, address, number or page of a memory slot, or VM, {}",
    }
)
"""What the index of a finding is, by its rule; pages are of 4K (pgemu_kernels.rules)."""


@dataclass(frozen=True)
class BrokenRule:
    """A rule that was found broken.

    Attributes:
        rule: which
        count: how often
        index: what the first finding is about, as INDEX says
        explained_by: names of the machine's defects that explain it, in alphabetical order; empty: none does
    """

    rule: W.Broken
    count: int
    index: int
    explained_by: tuple[str, ...]


def explained_by(rule: W.Broken, defects: Iterable[str]) -> tuple[str, ...]:
    """Which of some defects explain that a rule is broken (pgemu_kernels.words.operations.RULE_EXPLAINED_BY)."""
    bits = W.RULE_EXPLAINED_BY.get(rule, W.Defect(0))
    return tuple(sorted(name for name in set(defects) if DEFECTS[name] & bits))


def findings_of(state: Any, defects: Iterable[str]) -> tuple[BrokenRule, ...]:
    """What a machine's `state` says, in the order of the rules' numbers."""
    found = []
    for rule in W.Broken:
        row = int(W.STATE_FINDINGS) + rule * W.FINDING_WORDS
        count, index = (int(word) for word in state[row : row + W.FINDING_WORDS])
        if count:
            found.append(BrokenRule(rule, count, index, explained_by(rule, defects)))
    return tuple(found)


def note_broken(state: Any, rule: int, index: int) -> None:
    """Record a finding, as pgemu_kernels.engine.rows.broken()."""
    row = int(W.STATE_FINDINGS) + rule * W.FINDING_WORDS
    if not state[W.R_BROKEN]:
        state[W.R_BROKEN_FIRST] = rule << 48 | index & (1 << 48) - 1
    if not state[row]:
        state[row + int(W.FINDING_INDEX)] = index
    state[W.R_BROKEN] += np.uint64(1)
    state[row] += np.uint64(1)
