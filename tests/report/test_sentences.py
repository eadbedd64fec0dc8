"""Notes to the tables."""

from __future__ import annotations

import pytest

from comparisons import converts_nothing, lowered, mixed, one, setup
from pgemu.experiments.compare import compare
from pgemu.report import sentences
from pgemu.trace import Operation


def test_a_trace_that_converts_nothing_is_told_of_one_that_does() -> None:
    assert any("pgemu compare workload:tdx-boot" in note for note in sentences.notes(converts_nothing()))
    assert not any("workload:tdx-boot" in note for note in sentences.notes(mixed()))


@pytest.mark.parametrize("word", ["RET_PF_SPURIOUS", "-EOPNOTSUPP"])
def test_results_that_need_a_word_get_one(word: str) -> None:
    assert any(note.startswith(f"{word}: ") for note in sentences.notes(mixed()))
    assert not any(note.startswith(f"{word}: ") for note in sentences.notes(compare(lowered(setup()))))


def test_huge_pages_that_stay_away_are_mentioned() -> None:
    held = compare(lowered([*setup(), one(Operation.GUEST_FAULT), one(Operation.GET)]))
    assert any("missing from the pool" in note for note in sentences.notes(held))
    assert not any("missing from the pool" in note for note in sentences.notes(mixed()))
