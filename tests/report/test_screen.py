"""The first screen: small, plain, and complete."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from comparisons import converts_nothing, lowered, mixed, mixed_records, one, setup
from pgemu.experiments.compare import Comparison, compare
from pgemu.experiments.sensitivity import Sensitivity, sensitivity
from pgemu.experiments.verdict import QUESTIONS, Trial, measure, refused, verdict
from pgemu.machine.presets import Versions
from pgemu.report.screen import HEIGHT, WIDTH, mixed as by_hand, screen
from pgemu.trace import Flag, Lowered, LoweringOptions, Operation, Records, load, shipped
from pgemu_kernels.words.operations import PAGE_4K
from pgemu_kernels.words.rows import SPINS
from random_traces import traces

HUGETLB = Path(__file__).parents[1] / "data" / "traces" / "vm-boot-microvm-hugetlb.ftrace.txt.xz"


def shown(comparison: Comparison, found: Sensitivity | None = None) -> str:
    return screen(comparison, verdict(comparison, found), found)


def assert_fits(text: str) -> None:
    lines = text.splitlines()
    assert len(lines) <= HEIGHT == 24
    assert max(map(len, lines)) <= WIDTH == 80
    assert text.isascii()
    assert text.isprintable() or set(text) - {"\n"} == {c for c in text if c.isprintable()}
    assert all(line == line.rstrip() for line in lines)
    for question in QUESTIONS.values():
        assert sum(line.startswith(f"{question.text} ") for line in lines) == 1


@pytest.mark.parametrize("trace", [shipped(), HUGETLB], ids=lambda path: path.name.split(".")[0])
def test_recorded_traces(trace: Path) -> None:
    comparison = compare(load(trace, LoweringOptions()))
    found = sensitivity(comparison)
    text = shown(comparison, found)
    assert_fits(text)
    assert "\nrestructure like dec2025 (branch of Dec 2025); pfnmap corrected (slides, mended)\n" in text
    assert "1 vCPU, Linux 6.18\n" in text
    assert f"{len(found.trials)} alternatives tried" in text
    assert_fits(shown(comparison))
    if trace == HUGETLB:
        assert "refuses huge pages that are shared at first (-EINVAL)" in " ".join(text.split())


def test_a_confidential_boot_with_and_without_overlap() -> None:
    """The workload's ends: the screen says what the other one would be, though there is no room for all causes."""
    trace = load("workload:tdx-boot", LoweringOptions(), 0, overlap=1.0)
    comparison = compare(trace)
    text = shown(comparison)
    assert_fits(text)
    assert "both: tdx VM, memory private at first, EPT, 8 vCPUs, Linux 6.18" in text


@settings(max_examples=10, suppress_health_check=list(HealthCheck))
@given(traces())
def test_random_comparisons_fit(trace: Lowered) -> None:
    comparison = compare(trace)
    assert_fits(shown(comparison, sensitivity(comparison)))


def test_what_a_question_rests_on_is_named() -> None:
    comparison = compare(load(shipped(), LoweringOptions()))
    text = " ".join(shown(comparison, sensitivity(comparison)).split())
    assert "guest faults undecided if pfnmap zeroed whole folios (pfnmap-zeroing)" in text
    assert "guest leaves >= 2M alike if pfnmap mapped only whole huge pages large (pfnmap-level)" in text


def test_what_is_broken_names_its_defect() -> None:
    # One page of the 2M folio is zeroed; the guest's leaf shows it whole.
    assert "restructure shows guest or host stale contents of 511 pages (defect uptodate-unzeroed)" in " ".join(
        shown(mixed()).split()
    )


def test_conversions_that_the_model_drops_are_no_refusals() -> None:
    pages = [page % 511 * PAGE_4K for page in range(SPINS + 2)]
    records = [
        *setup(),
        one(Operation.GUEST_FAULT, address=0),
        one(Operation.GET, offset=0),
        Records.build(len(pages), op=Operation.CONVERT, flags=Flag.SHARED, offset=pages, length=PAGE_4K),
    ]
    comparison = compare(lowered(records))
    text = " ".join(shown(comparison).split())
    assert (
        "restructure: 2 conversions that would spin beyond 4,096 at a time were dropped, a limit of this model" in text
    )
    assert [refused(run) for run in comparison.runs] == [0, 0]
    assert_fits(shown(comparison))


def test_a_refusal_is_the_result() -> None:
    text = " ".join(shown(compare(lowered(setup(), "shared"), strict=True)).split())
    assert "restructure: dec2025 refuses huge pages that are shared at first (-EINVAL)" in text
    assert "created as rfc2 does" not in text
    assert "dec2025 refuses huge pages that are shared at first (-EINVAL): created as rfc2 does" in " ".join(
        shown(converts_nothing()).split()
    )


def test_an_interruption_is_said() -> None:
    found = sensitivity(mixed())
    cut = replace(found, trials=found.trials[:2], complete=False)
    assert "2 alternatives tried, interrupted; " in shown(mixed(), cut)
    assert_fits(shown(mixed(), cut))
    assert "interrupted" not in shown(mixed(), found)
    assert "no alternatives tried" in shown(mixed())


def test_what_is_mixed_by_hand_is_one_line() -> None:
    assert by_hand(mixed()) == ""
    options = {"order": "jan2026", "zero": "page", "kernel": "7.3", "punch": "refuse", "host_huge": True}
    comparison = compare(lowered(mixed_records()), **options)  # type: ignore[arg-type]
    assert by_hand(comparison) == "order jan2026, host-huge True, zero page, kernel 7.3"
    assert "\nmixed by hand: order jan2026, host-huge True, zero page, kernel 7.3\n" in shown(comparison)


def test_a_plan_without_code_is_said_to_be_one() -> None:
    text = " ".join(shown(compare(lowered(mixed_records()), versions=Versions("jan2026"))).split())
    assert "restructure like jan2026 (the plan of January 2026, without code: dec2025 but for its order)" in text


def test_an_alternative_that_moves_a_time_is_said_though_it_turns_nothing() -> None:
    """Flips that overlap take a hundredth of what others do; pfnmap is better either way."""
    comparison = compare(load(shipped(), LoweringOptions()))
    base = measure(*comparison.runs)
    low, high = base["conversions"].difference  # type: ignore[misc]
    moved = base | {"conversions": base["conversions"]._replace(difference=(low / 100, high / 100))}
    runs = (comparison.runs[0], comparison.runs[1])
    text = shown(comparison, Sensitivity((Trial("overlap", "1", "", moved, runs),)))
    assert "conversions: pfnmap by 3." in " ".join(text.split())
    assert_fits(text)
    near = base | {"conversions": base["conversions"]._replace(difference=(low / 2, high / 2))}
    assert "stayed shared all the time" not in shown(comparison, Sensitivity((Trial("overlap", "1", "", near, runs),)))
