"""Large differences in words."""

from __future__ import annotations

import pytest

from comparisons import converts_nothing, lowered, mixed, mixed_records, one, setup
from pgemu.experiments.compare import compare
from pgemu.report import sentences
from pgemu.trace import Operation


def test_one_sentence_per_large_difference() -> None:
    found = sentences.differences(mixed())
    assert "restructure split 1 huge folio, pfnmap 0." in found
    assert "restructure flushed the kernel's TLB on all CPUs 2 times, pfnmap 0." in found
    assert "restructure restored 28 KiB of vmemmap, pfnmap 0." in found
    # Split 511 x 44, merge 511 x 24 bytes, and 28 for the folio of each design when it is taken.
    assert f"restructure wrote {(511 * 68 + 28) / 1024:.1f} KiB of struct pages, pfnmap 28 B." in found
    assert "restructure refused 2 conversions, pfnmap 1." in found
    assert "restructure refused 0 calls of MADV_DONTNEED, pfnmap 1." in found
    assert len(found) == len(set(found))


def test_levels_are_one_sentence_for_all_sizes() -> None:
    found = sentences.differences(converts_nothing())
    assert "Stage 2 maps at the end: restructure 4 KiB at 4K, pfnmap 2 MiB at 2M." in found
    assert not any(sentence.startswith("The host maps") for sentence in found)


def test_times_differ_only_where_bands_lie_apart() -> None:
    # The pfnmap fault zeroes 512 pages, restructure's one; a guest fault alone has overlapping bands.
    found = sentences.differences(converts_nothing())
    assert any(sentence.startswith("On average a host fault takes ") for sentence in found)
    assert not any("munmap takes" in sentence for sentence in sentences.differences(mixed()))


def test_equal_sides_need_no_sentence() -> None:
    assert sentences.differences(compare(lowered(setup()))) == []


def test_one_design_has_nothing_to_differ_from() -> None:
    assert sentences.differences(compare(lowered(mixed_records()), ["pfnmap"])) == []


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
